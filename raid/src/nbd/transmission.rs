//! The transmission phase of one connection: requests in, replies out.
//!
//! One task drives everything of a connection: it receives, starts operations, collects those that completed, and
//! sends. Cost: a receive brings as many requests as the client has sent (one `recv` into 128 KiB), each operation is
//! polled once where it stands (a cached read is answered without leaving the thread), and all replies that are ready
//! leave in one `writev`. Small payloads stay where they were received; large ones are received into their own
//! page-aligned buffer. No locks; one boxed future a request. A reply's payload is the buffer the device filled.
//!
//! Invariants:
//!
//! - A request is validated once, before anything is taken for it (`admit`).
//! - Memory is taken before a payload is received or a read is started, and given back when the reply has been sent:
//!   [`PRIVATE_BYTES`] of its own for each connection, so that it goes on whatever others do, and beyond that from the
//!   [`Pool`] that all share, [`SHARED_BYTES_PER_CONNECTION`] at most.
//! - A reply's header is sent only when its outcome is settled, payload included.
//! - The payload of a refused write is drained; one too long for that ends the connection.
//! - Operations that have been started run to their end, whatever becomes of the client: the task lives until then.
//! - A client that does not take its replies blocks itself only. If others wait for the memory it holds, or it has
//!   sent its last request, and it has taken nothing for [`Timing::stall`], it is disconnected.

use super::handshake::Export;
use super::wire::{self, Command, ErrorCode, Malformed, REQUEST_LEN, Request, SIMPLE_REPLY_LEN, SimpleReply};
use crate::device::{Device, Durability, ZeroMode, buffer, check_range, room};
use crate::error::{Error, Operation};
use crate::runtime::BoxFuture;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::VecDeque;
use std::future::Future;
use std::io::IoSlice;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// Bytes that each connection may hold in flight whatever the others do.
pub const PRIVATE_BYTES: u32 = 256 << 10;
/// Bytes of the shared pool that one connection may hold.
pub const SHARED_BYTES_PER_CONNECTION: u32 = 64 << 20;
/// Requests of one connection that may be in flight, replies not yet sent included.
pub const MAX_REQUESTS: usize = 256;
/// What even a request without payload is charged, for its bookkeeping.
const MIN_CHARGE: u32 = 4096;
/// Capacity for one receive.
const RECEIVE_BYTES: usize = 128 << 10;
/// A refused write's payload is drained up to this length.
const MAX_DRAIN: u32 = 2 * wire::MAX_PAYLOAD;
/// Replies that one `writev` may carry.
const MAX_SLICES: usize = 128;

/// The memory that all connections of a server share.
pub struct Pool {
    free: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

impl Pool {
    /// A pool of `bytes`, which must be enough for the largest request.
    #[must_use]
    pub fn new(bytes: u32) -> Self {
        let bytes = bytes.max(wire::MAX_PAYLOAD) as usize;
        Self { free: Arc::new(Semaphore::new(bytes)), waiting: Arc::new(AtomicUsize::new(0)) }
    }

    /// Whether someone waits for memory.
    fn contended(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    fn take(&self, bytes: u32) -> BoxFuture<'static, Lease> {
        struct Waiting(Arc<AtomicUsize>);
        impl Drop for Waiting {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting = Waiting(Arc::clone(&self.waiting));
        let free = Arc::clone(&self.free);
        Box::pin(async move {
            let permit = free.acquire_many_owned(bytes).await;
            drop(waiting);
            // The semaphore is never closed; were it, the request would go on uncharged.
            permit.map_or(Lease::Private(0), |permit| Lease::Shared(bytes, permit))
        })
    }
}

/// Bytes taken for a request, until its reply has been sent.
enum Lease {
    /// Of the connection's own; given back by hand.
    Private(u32),
    /// Of the pool; the permit gives itself back.
    Shared(u32, #[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit),
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// A client that takes no reply for so long while others wait for memory, or after its last request, is
    /// disconnected.
    pub stall: Duration,
    /// After the stop was announced, a client has so long to take its last replies.
    pub drain: Duration,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The client sent `DISC` or closed its end between requests.
    #[error("the client disconnected")]
    ByClient,
    /// The client vanished in the middle of something.
    #[error("the connection broke: {0}")]
    Broken(std::io::ErrorKind),
    /// The bytes are not the protocol's.
    #[error("not a request: {0}")]
    Malformed(#[from] Malformed),
    /// A refused write with more payload than is worth draining.
    #[error("a write of {0} bytes")]
    AbsurdWrite(u32),
    /// The client did not take its replies while others waited.
    #[error("the client did not take its replies")]
    Stalled,
    /// The server stopped.
    #[error("the server stopped")]
    Stopped,
}

/// A request that has passed every check.
enum Admitted {
    Read { at: u64, len: u32 },
    Write { at: u64, durability: Durability },
    Flush,
    Trim { at: u64, len: u64, durability: Durability },
    WriteZeroes { at: u64, len: u64, mode: ZeroMode, durability: Durability },
}

/// Checks a request once; afterwards it is trusted.
fn admit(export: &Export, request: &Request, stopping: bool) -> Result<Admitted, ErrorCode> {
    if stopping {
        return Err(ErrorCode::Shutdown);
    }
    let known = match request.command {
        Command::WriteZeroes => wire::CMD_FLAG_FUA | wire::CMD_FLAG_NO_HOLE,
        _ => wire::CMD_FLAG_FUA,
    };
    if request.flags & !known != 0 {
        return Err(ErrorCode::Invalid);
    }
    let (at, len) = (request.offset, u64::from(request.length));
    let durability =
        if request.flags & wire::CMD_FLAG_FUA == 0 { Durability::Cached } else { Durability::Stable };
    let (operation, admitted) = match request.command {
        Command::Read => (Operation::Read, Admitted::Read { at, len: request.length }),
        Command::Write => (Operation::Write, Admitted::Write { at, durability }),
        Command::Trim => (Operation::Discard, Admitted::Trim { at, len, durability }),
        Command::WriteZeroes => {
            let keep = request.flags & wire::CMD_FLAG_NO_HOLE != 0;
            let mode = if keep { ZeroMode::Allocate } else { ZeroMode::MayPunch };
            (Operation::WriteZeroes, Admitted::WriteZeroes { at, len, mode, durability })
        }
        Command::Flush if at == 0 && len == 0 => return Ok(Admitted::Flush),
        Command::Flush | Command::Disconnect | Command::Unknown(_) => return Err(ErrorCode::Invalid),
    };
    if export.read_only && operation != Operation::Read {
        return Err(ErrorCode::from(&Error::ReadOnly { operation }));
    }
    // TRIM and WRITE_ZEROES carry nothing: any length within the device is fine.
    let carries = matches!(request.command, Command::Read | Command::Write);
    if carries && request.length > wire::MAX_PAYLOAD {
        return Err(ErrorCode::Invalid);
    }
    check_range(operation, at, len, export.device.size()).map_err(|error| ErrorCode::from(&error))?;
    Ok(admitted)
}

/// Does what was admitted. `payload` is a write's.
async fn execute(
    device: Arc<dyn Device>,
    admitted: Admitted,
    payload: Bytes,
    cookie: u64,
    lease: Lease,
) -> Reply {
    let outcome = match admitted {
        // Nothing to do is done; no device needs to think about it.
        Admitted::Read { len: 0, .. }
        | Admitted::Trim { len: 0, .. }
        | Admitted::WriteZeroes { len: 0, .. } => Ok(()),
        Admitted::Write { .. } if payload.is_empty() => Ok(()),
        Admitted::Read { at, len } => match device.read(at, buffer(len as usize)).await {
            // Fewer bytes than announced would shift everything after them.
            Ok(data) if data.len() != len as usize => Err(ErrorCode::Io),
            Ok(data) => return Reply::new(cookie, Ok(()), data.freeze(), lease),
            Err(error) => Err(failed(&*device, &error)),
        },
        Admitted::Write { at, durability } => settle(&*device, device.write(at, payload, durability).await),
        Admitted::Flush => settle(&*device, device.flush().await),
        Admitted::Trim { at, len, durability } => {
            let mut outcome = device.discard(at, len).await;
            if outcome.is_ok() && durability == Durability::Stable {
                outcome = device.flush().await;
            }
            settle(&*device, outcome)
        }
        Admitted::WriteZeroes { at, len, mode, durability } => {
            settle(&*device, device.write_zeroes(at, len, mode, durability).await)
        }
    };
    Reply::new(cookie, outcome, Bytes::new(), lease)
}

fn settle(device: &dyn Device, outcome: crate::Result<()>) -> Result<(), ErrorCode> {
    outcome.map_err(|error| failed(device, &error))
}

fn failed(device: &dyn Device, error: &Error) -> ErrorCode {
    tracing::warn!(device = device.name(), "NBD request failed: {error}");
    ErrorCode::from(error)
}

/// A reply that waits to be sent.
struct Reply {
    header: [u8; SIMPLE_REPLY_LEN],
    payload: Bytes,
    lease: Lease,
}

impl Reply {
    fn new(cookie: u64, outcome: Result<(), ErrorCode>, payload: Bytes, lease: Lease) -> Self {
        Self { header: SimpleReply::new(cookie, outcome).encode(), payload, lease }
    }

    fn len(&self) -> usize {
        SIMPLE_REPLY_LEN + self.payload.len()
    }
}

/// What the next received bytes are.
enum Receiving {
    /// The header of a request, or nothing more.
    Header,
    /// The rest of a write's payload. `data.len() < length`, and memory has been taken for all of it.
    Payload { admitted: Admitted, cookie: u64, lease: Lease, data: BytesMut, length: usize },
    /// The rest of a refused write's payload, `left > 0`, and the answer it gets then.
    Drain { left: u32, cookie: u64, error: ErrorCode },
    /// Nothing: no more requests are taken.
    Closed(Ended),
}

/// Serves `export` on a connection whose handshake is done; `input` is what was received beyond it. `stop` completes
/// when the server is to end. Returns when everything that was started has ended.
pub async fn run<S>(
    stream: &mut S,
    input: BytesMut,
    export: Arc<Export>,
    pool: Arc<Pool>,
    timing: Timing,
    stop: BoxFuture<'static, ()>,
) -> Ended
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut connection = Connection {
        stream,
        export,
        pool,
        timing,
        stop: Some(stop),
        deadline: None,
        stall: None,
        receiving: Receiving::Header,
        input,
        drained: false,
        eof: false,
        private: PRIVATE_BYTES,
        shared: 0,
        taking: None,
        running: FuturesUnordered::new(),
        replies: VecDeque::new(),
        sent: 0,
        total_sent: 0,
        broken: None,
    };
    std::future::poll_fn(|cx| connection.poll(cx)).await
}

struct Connection<'a, S> {
    stream: &'a mut S,
    export: Arc<Export>,
    pool: Arc<Pool>,
    timing: Timing,
    /// Completes when the server is to end; `None` once it has.
    stop: Option<BoxFuture<'static, ()>>,
    /// Runs from the stop on: when the client's time is up.
    deadline: Option<Pin<Box<Sleep>>>,
    /// Runs while replies do not move, and what `total_sent` was when it was set.
    stall: Option<(Pin<Box<Sleep>>, u64)>,
    receiving: Receiving,
    /// Received and not yet understood.
    input: BytesMut,
    /// The socket had nothing more when last asked.
    drained: bool,
    /// The client has closed its sending end.
    eof: bool,
    /// What is left of [`PRIVATE_BYTES`].
    private: u32,
    /// Taken from the pool; at most [`SHARED_BYTES_PER_CONNECTION`].
    shared: u32,
    /// Memory being waited for, for the request at the head of `input`.
    taking: Option<BoxFuture<'static, Lease>>,
    /// Operations under way.
    running: FuturesUnordered<BoxFuture<'static, Reply>>,
    /// Replies to be sent, oldest first.
    replies: VecDeque<Reply>,
    /// Bytes of `replies[0]` that have been sent; less than its length.
    sent: usize,
    /// Bytes sent since the beginning.
    total_sent: u64,
    /// The client can no longer be reached; what runs is waited for.
    broken: Option<Ended>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Connection<'_, S> {
    /// Goes round until nothing moves: every part registers its waker when it cannot go on.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        self.poll_stop(cx);
        loop {
            let mut moved = false;
            while let Poll::Ready(Some(reply)) = self.running.poll_next_unpin(cx) {
                self.replies.push_back(reply);
                moved = true;
            }
            moved |= self.start_requests(cx);
            moved |= self.poll_send(cx);
            moved |= self.poll_receive(cx);
            if let Some(ended) = self.finished() {
                return Poll::Ready(ended);
            }
            if !moved {
                self.poll_stall(cx);
                // The stall may just have broken the connection, with nothing left to wait for.
                return self.finished().map_or(Poll::Pending, Poll::Ready);
            }
        }
    }

    fn stopping(&self) -> bool {
        self.stop.is_none()
    }

    fn poll_stop(&mut self, cx: &mut Context<'_>) {
        if self.stop.as_mut().is_some_and(|stop| stop.as_mut().poll(cx).is_ready()) {
            self.stop = None;
            self.deadline = Some(Box::pin(tokio::time::sleep(self.timing.drain)));
        }
        if self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            self.deadline = None;
            self.abandon(Ended::Stopped);
        }
    }

    /// The client is out of reach: no more requests, no more replies.
    fn abandon(&mut self, ended: Ended) {
        self.replies.clear();
        self.sent = 0;
        self.taking = None;
        self.receiving = Receiving::Closed(ended.clone());
        self.broken.get_or_insert(ended);
    }

    /// How it ended, if nothing is left to do.
    fn finished(&self) -> Option<Ended> {
        if !self.running.is_empty() || !self.replies.is_empty() {
            return None;
        }
        match &self.receiving {
            _ if self.broken.is_some() => self.broken.clone(),
            Receiving::Closed(ended) => Some(ended.clone()),
            Receiving::Header if self.stopping() && self.drained => Some(Ended::Stopped),
            _ => None,
        }
    }

    /// Understands what has been received, starts what it asks for; whether anything was understood.
    fn start_requests(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        loop {
            let step = match self.receiving {
                Receiving::Header => self.take_request(cx),
                Receiving::Payload { .. } => self.take_payload(cx),
                Receiving::Drain { .. } => self.take_refused_payload(),
                Receiving::Closed(_) => false,
            };
            if !step {
                return moved;
            }
            moved = true;
        }
    }

    /// Whether a whole request header was there and could be taken.
    fn take_request(&mut self, cx: &mut Context<'_>) -> bool {
        if self.running.len() + self.replies.len() >= MAX_REQUESTS {
            return false;
        }
        let Some((header, _)) = self.input.split_first_chunk::<REQUEST_LEN>() else {
            return self.part_of_request();
        };
        let request = match Request::decode(header) {
            Ok(request) => request,
            Err(malformed) => {
                self.receiving = Receiving::Closed(malformed.into());
                return true;
            }
        };
        if request.command == Command::Disconnect {
            self.receiving = Receiving::Closed(Ended::ByClient);
            return true;
        }
        let admitted = match admit(&self.export, &request, self.stopping()) {
            Ok(admitted) => admitted,
            Err(error) => {
                self.input.advance(REQUEST_LEN);
                self.taking = None;
                self.refuse(&request, error);
                return true;
            }
        };
        let carried = match request.command {
            Command::Read | Command::Write => request.length,
            _ => 0,
        };
        let Poll::Ready(lease) = self.poll_take(cx, carried.max(MIN_CHARGE)) else { return false };
        self.input.advance(REQUEST_LEN);
        if request.command == Command::Write {
            self.begin_payload(cx, admitted, &request, lease);
        } else {
            self.start(cx, admitted, Bytes::new(), request.cookie, lease);
        }
        true
    }

    /// Less than a header is there. What cannot become one (an option after `GO`, say) is not waited for.
    fn part_of_request(&mut self) -> bool {
        if let Some((found, _)) = self.input.split_first_chunk() {
            let (found, expected) = (u32::from_be_bytes(*found), wire::REQUEST_MAGIC);
            if found != expected {
                let malformed = Malformed::Magic { found: found.into(), expected: expected.into() };
                self.receiving = Receiving::Closed(malformed.into());
                return true;
            }
        }
        self.end_of_input(self.input.is_empty())
    }

    fn refuse(&mut self, request: &Request, error: ErrorCode) {
        let left = if request.command == Command::Write { request.length } else { 0 };
        if left > MAX_DRAIN {
            self.receiving = Receiving::Closed(Ended::AbsurdWrite(left));
        } else if left > 0 {
            self.receiving = Receiving::Drain { left, cookie: request.cookie, error };
        } else {
            self.replies.push_back(Reply::new(request.cookie, Err(error), Bytes::new(), Lease::Private(0)));
        }
    }

    /// Takes `bytes` for the request at the head of the input, its own allowance first.
    fn poll_take(&mut self, cx: &mut Context<'_>, bytes: u32) -> Poll<Lease> {
        if bytes <= self.private {
            self.private -= bytes;
            self.taking = None;
            return Poll::Ready(Lease::Private(bytes));
        }
        if self.taking.is_none() {
            if self.shared + bytes > SHARED_BYTES_PER_CONNECTION {
                // Its own replies must leave first; that moves this task again.
                return Poll::Pending;
            }
            self.taking = Some(self.pool.take(bytes));
        }
        let Some(taking) = self.taking.as_mut() else { return Poll::Pending };
        let lease = ready!(taking.as_mut().poll(cx));
        self.taking = None;
        if let Lease::Shared(bytes, _) = lease {
            self.shared += bytes;
        }
        Poll::Ready(lease)
    }

    fn give_back(&mut self, lease: &Lease) {
        match lease {
            Lease::Private(bytes) => self.private += bytes,
            Lease::Shared(bytes, _) => self.shared -= bytes,
        }
    }

    /// A write's header is taken. A payload that is here already stays where it lies, unless it is so small that it
    /// would hold a large buffer for little; the others get a page-aligned buffer of their own.
    fn begin_payload(&mut self, cx: &mut Context<'_>, admitted: Admitted, request: &Request, lease: Lease) {
        let length = request.length as usize;
        if self.input.len() >= length {
            let payload = self.input.split_to(length);
            let payload = if length < MIN_CHARGE as usize {
                Bytes::copy_from_slice(&payload)
            } else {
                payload.freeze()
            };
            self.start(cx, admitted, payload, request.cookie, lease);
            return;
        }
        let mut data = room(length);
        data.put(self.input.split_to(self.input.len()));
        self.receiving = Receiving::Payload { admitted, cookie: request.cookie, lease, data, length };
    }

    /// Starts a large write once all of its payload has come.
    fn take_payload(&mut self, cx: &mut Context<'_>) -> bool {
        if !matches!(&self.receiving, Receiving::Payload { data, length, .. } if data.len() == *length) {
            return self.end_of_input(false);
        }
        let whole = std::mem::replace(&mut self.receiving, Receiving::Header);
        if let Receiving::Payload { admitted, cookie, lease, data, .. } = whole {
            self.start(cx, admitted, data.freeze(), cookie, lease);
        }
        true
    }

    fn take_refused_payload(&mut self) -> bool {
        let Receiving::Drain { left, cookie, error } = &mut self.receiving else { return false };
        let taken = self.input.len().min(*left as usize);
        self.input.advance(taken);
        *left -= taken as u32;
        if *left == 0 {
            let reply = Reply::new(*cookie, Err(*error), Bytes::new(), Lease::Private(0));
            self.replies.push_back(reply);
            self.receiving = Receiving::Header;
        }
        taken > 0 || self.end_of_input(false)
    }

    /// Called when the input is used up: if nothing more will come, takes no more; whether that is so. A client that
    /// has closed its sending end may still read: what it asked for whole has been started, and is answered.
    fn end_of_input(&mut self, between_requests: bool) -> bool {
        if self.eof {
            let broken = Ended::Broken(std::io::ErrorKind::UnexpectedEof);
            self.receiving = Receiving::Closed(if between_requests { Ended::ByClient } else { broken });
        }
        self.eof
    }

    /// Starts an operation. One that completes at once never becomes a task.
    fn start(&mut self, cx: &mut Context<'_>, admitted: Admitted, payload: Bytes, cookie: u64, lease: Lease) {
        let device = Arc::clone(&self.export.device);
        let mut operation: BoxFuture<'static, Reply> =
            Box::pin(execute(device, admitted, payload, cookie, lease));
        match operation.as_mut().poll(cx) {
            Poll::Ready(reply) => self.replies.push_back(reply),
            Poll::Pending => self.running.push(operation),
        }
    }

    /// Sends what is ready; whether any byte left.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while !self.replies.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let mut used = 0;
            let mut skip = self.sent;
            for reply in self.replies.iter().take(MAX_SLICES / 2) {
                for part in [&reply.header[..], &reply.payload[..]] {
                    let rest = &part[skip.min(part.len())..];
                    skip = skip.saturating_sub(part.len());
                    if !rest.is_empty() {
                        slices[used] = IoSlice::new(rest);
                        used += 1;
                    }
                }
            }
            match Pin::new(&mut *self.stream).poll_write_vectored(cx, &slices[..used]) {
                Poll::Pending => return moved,
                Poll::Ready(Ok(0)) => self.abandon(Ended::Broken(std::io::ErrorKind::WriteZero)),
                Poll::Ready(Ok(sent)) => self.account(sent),
                Poll::Ready(Err(error)) => self.abandon(Ended::Broken(error.kind())),
            }
            moved = true;
        }
        self.stall = None;
        moved
    }

    /// `sent` more bytes have left: lets go of the replies that are out.
    fn account(&mut self, sent: usize) {
        self.total_sent += sent as u64;
        self.sent += sent;
        while self.replies.front().is_some_and(|reply| reply.len() <= self.sent) {
            let Some(reply) = self.replies.pop_front() else { return };
            self.sent -= reply.len();
            self.give_back(&reply.lease);
        }
    }

    /// Receives once; whether anything came (the end of the stream included).
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> bool {
        if self.eof {
            return false;
        }
        let received = match &mut self.receiving {
            Receiving::Closed(_) => return false,
            Receiving::Payload { data, length, .. } => {
                let left = *length - data.len();
                pin!(self.stream.read_buf(&mut data.limit(left))).poll(cx)
            }
            _ => {
                if self.input.len() >= RECEIVE_BYTES {
                    return false;
                }
                // Room for a good batch; reuses the buffer when its payloads have been let go.
                if self.input.capacity() - self.input.len() < RECEIVE_BYTES / 2 {
                    self.input.reserve(RECEIVE_BYTES);
                }
                pin!(self.stream.read_buf(&mut self.input)).poll(cx)
            }
        };
        self.drained = received.is_pending();
        match received {
            Poll::Pending => return false,
            Poll::Ready(Ok(0)) => self.eof = true,
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(error)) => self.abandon(Ended::Broken(error.kind())),
        }
        true
    }

    /// Called when nothing moves: watches clients that do not take their replies.
    fn poll_stall(&mut self, cx: &mut Context<'_>) {
        if self.replies.is_empty() {
            return;
        }
        let (limit, now) = (self.timing.stall, Instant::now());
        let total_sent = self.total_sent;
        let (timer, before) =
            self.stall.get_or_insert_with(|| (Box::pin(tokio::time::sleep(limit)), total_sent));
        while timer.as_mut().poll(cx).is_ready() {
            let matters = self.pool.contended() || matches!(self.receiving, Receiving::Closed(_));
            if *before == total_sent && matters {
                self.abandon(Ended::Stalled);
                return;
            }
            *before = total_sent;
            timer.as_mut().reset(now + limit);
        }
    }
}
