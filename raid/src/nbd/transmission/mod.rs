//! The transmission phase of one connection: requests in, replies out.
//!
//! One task drives everything of a connection: it receives, starts operations, collects those that completed, and
//! sends. Cost: a receive brings as many requests as the client has sent (one `recv` into 128 KiB), small ones that need
//! not wait are done where they stand ([`Device::read_now`](crate::device::Device::read_now) and `write_now`: no
//! allocation, what is read lies on the connection's `tray`), any other is a boxed future that is polled once at once, and all replies that are
//! ready leave in one `writev`. Small payloads stay where they were received; large ones are received into their own
//! page-aligned buffer. No locks. A reply's payload is the buffer the device filled.
//!
//! Counted on files in memory, four members near-2, 4 KiB at depth 32 over one connection, for each request: write 2
//! `pwrite`, 0.04 to 0.07 `recv` and `writev` each (2 more `lseek`, about 12 allocations and twice the time in our own
//! code before there was `write_now`); read 1 `pread`, 0.17 `recv`, `writev` and `epoll_wait` each (0.46 before there was
//! `coalesce`). Of the time of a write nine tenths are the kernel's.
//!
//! The rooms, in the order in which a request passes them: `busy` (it may be looked for), `coalesce` (or waited for, to
//! come with others), `receive` (bytes become requests), `admit` (the one check), `memory` (what a request takes),
//! `siblings` (whose turn it is to begin changes, for clients that ask twice), `execute` (what the device is asked),
//! `reply` (its bytes in each style), `tray` (where those of small reads lie), `send`.
//!
//! Invariants:
//!
//! - A request is validated once, before anything is taken for it (`admit`).
//! - Memory is taken before a payload is received or a read is started, and given back when the reply has been sent:
//!   [`PRIVATE_BYTES`] of its own for each connection, so that it goes on whatever others do, and beyond that from the
//!   [`Pool`] that all share, [`SHARED_BYTES_PER_CONNECTION`] at most.
//! - A reply's header is sent only when its outcome is settled, payload included.
//! - Once replies in chunks were negotiated, every reply is made of chunks.
//! - The payload of a refused request is drained; one too long for that ends the connection.
//! - Operations that have been started run to their end, whatever becomes of the client: the task lives until then.
//! - A client that does not take its replies blocks itself only. If others wait for the memory it holds, or it has
//!   sent its last request, and it has taken nothing for [`Timing::stall`], it is disconnected.

mod admit;
mod busy;
mod coalesce;
mod execute;
mod memory;
mod pipes;
mod receive;
mod reply;
mod send;
mod siblings;
mod stream;
mod tray;

pub use memory::{PRIVATE_BYTES, Pool, SHARED_BYTES_PER_CONNECTION};
pub use siblings::{Line, Siblings};
pub use stream::{Plain, Stream};

use super::handshake::Session;
use super::wire::Malformed;
use crate::device::room;
use crate::runtime::BoxFuture;
use admit::Admitted;
use busy::Habit;
use bytes::{Bytes, BytesMut};
use coalesce::Coalescing;
use futures_util::stream::{FuturesUnordered, StreamExt};
use memory::{Lease, Present, Purse};
use pipes::Pipes;
use receive::{RECEIVE_BYTES, Receiving};
use reply::{Reply, To};
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};
use tray::Tray;

/// Requests of one connection that may be in flight, replies not yet sent included.
pub const MAX_REQUESTS: usize = 256;

/// How many times what it was charged for a request that waits may hold: its payload lies in a receive that it shares.
const MOST_UNCHARGED: usize = 4;

/// Rounds of receiving, doing and sending that one connection has before others have their turn: about a millisecond of
/// small requests.
const ROUNDS: usize = 16;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// A client that takes no reply for so long while others wait for memory, or after its last request, is
    /// disconnected.
    pub stall: Duration,
    /// After the stop was announced, a client has so long to take its last replies.
    pub drain: Duration,
    /// How long the next request of a client that asks one thing at a time is looked for before the thread sleeps; zero: not
    /// at all.
    pub busy: Duration,
}

/// When the server is to end, and how.
pub struct Stop {
    /// Completes then.
    pub announced: BoxFuture<'static, ()>,
    /// Of a client that gives what was not answered to another connection or the next server, and its users no error
    /// before: what comes later is left unanswered. Others are refused it (`ESHUTDOWN`), as the protocol has it.
    pub line: Option<Line>,
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The client sent `DISC`.
    #[error("the client disconnected")]
    ByClient,
    /// The client closed its end between requests.
    #[error("the client closed the connection")]
    HungUp,
    /// The client vanished in the middle of something.
    #[error("the connection broke: {0}")]
    Broken(std::io::ErrorKind),
    /// The bytes are not the protocol's.
    #[error("not a request: {0}")]
    Malformed(#[from] Malformed),
    /// A refused request with more payload than is worth draining.
    #[error("a payload of {0} bytes")]
    AbsurdPayload(u64),
    /// The client did not take its replies while others waited.
    #[error("the client did not take its replies")]
    Stalled,
    /// The server stopped.
    #[error("the server stopped")]
    Stopped,
}

/// Serves a session on a connection whose handshake is done; `input` is what was received beyond it. Returns
/// when everything that was started has ended.
pub async fn run<S>(
    stream: &mut S,
    input: BytesMut,
    session: Session,
    pool: Arc<Pool>,
    timing: Timing,
    stop: Stop,
) -> Ended
where
    S: Stream,
{
    let mut connection = Connection {
        stream,
        session,
        present: pool.enter(),
        habit: Habit::new(timing.busy),
        coalescing: Coalescing::new(),
        purse: Purse::new(pool),
        timing,
        stop: Some(stop.announced),
        line: stop.line,
        deadline: None,
        stall: None,
        receiving: Receiving::Header,
        input,
        drained: false,
        eof: false,
        running: FuturesUnordered::new(),
        replies: VecDeque::new(),
        tray: Tray::default(),
        sent: 0,
        total_sent: 0,
        unflushed: false,
        broken: None,
    };
    std::future::poll_fn(|cx| connection.poll(cx)).await
}

struct Connection<'a, S> {
    stream: &'a mut S,
    session: Session,
    /// One of those that share the pool.
    present: Present,
    /// How the client asks.
    habit: Habit,
    /// Whether to let more requests come together.
    coalescing: Coalescing,
    purse: Purse,
    timing: Timing,
    /// Completes when the server is to end; `None` once it has.
    stop: Option<BoxFuture<'static, ()>>,
    /// Out of here while a turn is made of it.
    line: Option<Line>,
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
    /// Operations under way.
    running: FuturesUnordered<BoxFuture<'static, Reply>>,
    /// Replies to be sent, oldest first.
    replies: VecDeque<Reply>,
    /// Data of some of them.
    tray: Tray,
    /// Bytes of `replies[0]` that have been sent; less than its length.
    sent: usize,
    /// Bytes sent since the beginning.
    total_sent: u64,
    /// The stream may hold back what it was given: under TLS, a record.
    unflushed: bool,
    /// The client can no longer be reached; what runs is waited for.
    broken: Option<Ended>,
}

impl<S: Stream> Connection<'_, S> {
    /// Goes round until nothing moves, when every part has registered its waker, or it is the others' turn.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        self.poll_stop(cx);
        for _ in 0..ROUNDS {
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
                if self.is_done() && self.wait() {
                    continue;
                }
                self.poll_stall(cx);
                // The stall may just have broken the connection, with nothing left to wait for.
                return self.finished().map_or(Poll::Pending, Poll::Ready);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
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
        for reply in self.replies.drain(..) {
            self.purse.give_back(&reply.end(&mut self.tray));
        }
        self.sent = 0;
        self.unflushed = false;
        self.purse.stop_waiting();
        self.receiving = Receiving::Closed(ended.clone());
        self.broken.get_or_insert(ended);
    }

    /// How it ended, if nothing is left to do.
    fn finished(&self) -> Option<Ended> {
        if !self.running.is_empty() || !self.replies.is_empty() || self.unflushed {
            return None;
        }
        match &self.receiving {
            _ if self.broken.is_some() => self.broken.clone(),
            Receiving::Closed(ended) => Some(ended.clone()),
            Receiving::Header if self.stopping() && self.drained => Some(Ended::Stopped),
            _ => None,
        }
    }

    /// All that was asked is answered, and nobody wants us to end.
    fn is_done(&self) -> bool {
        self.running.is_empty() && self.replies.is_empty() && !self.unflushed && !self.stopping()
    }

    /// Starts an operation. One that completes at once never becomes a task.
    fn start(&mut self, cx: &mut Context<'_>, admitted: Admitted, payload: Bytes, to: To, lease: Lease) {
        let device = &self.session.export.device;
        let lease = match execute::at_once(&**device, admitted, &payload, to, lease, &mut self.tray) {
            Ok(reply) => return self.replies.push_back(reply),
            Err(unused) => unused,
        };
        let device = Arc::clone(device);
        // One that has to wait must not hold a whole receive for the little that it is charged for.
        let payload = if (1..RECEIVE_BYTES / MOST_UNCHARGED).contains(&payload.len()) {
            let mut own = room(payload.len());
            own.extend_from_slice(&payload);
            own.freeze()
        } else {
            payload
        };
        let pipes = match admitted {
            Admitted::Read { len, .. } if Pipes::are_worth(len) && self.stream.plain().is_some() => {
                Some(Arc::clone(self.purse.pipes()))
            }
            _ => None,
        };
        let mut operation: BoxFuture<'static, Reply> =
            Box::pin(execute::execute(device, admitted, payload, to, lease, pipes));
        match operation.as_mut().poll(cx) {
            Poll::Ready(reply) => self.replies.push_back(reply),
            Poll::Pending => self.running.push(operation),
        }
    }

    /// Called when nothing moves: watches clients that do not take their replies.
    fn poll_stall(&mut self, cx: &mut Context<'_>) {
        if self.replies.is_empty() && !self.unflushed {
            return;
        }
        let (limit, now) = (self.timing.stall, Instant::now());
        let total_sent = self.total_sent;
        let (timer, before) =
            self.stall.get_or_insert_with(|| (Box::pin(tokio::time::sleep(limit)), total_sent));
        while timer.as_mut().poll(cx).is_ready() {
            let matters = self.purse.contended() || matches!(self.receiving, Receiving::Closed(_));
            if *before == total_sent && matters {
                self.abandon(Ended::Stalled);
                return;
            }
            *before = total_sent;
            timer.as_mut().reset(now + limit);
        }
    }
}
