//! Responses to a socket: bytes of ours, and slices of the log that the kernel sends from the files they lie in.
//!
//! Cost of a fetch response of one partition: one `send` of the head (with `MSG_MORE`, so that head and records share
//! packets), then per step of at most [`STEP`] bytes of a piece one question whether it is cached (`mincore`; in a
//! directory two one-byte `preadv2(RWF_NOWAIT)`) and one `sendfile` (more if the socket is full). No record byte is
//! copied in the process, none is allocated.
//!
//! `sendfile` waits for the disk when a page is not cached, which would stall every connection of the network thread.
//! So a cold step runs on a blocking thread: all of it is asked of the disk at once, and then sent. The socket stays
//! non-blocking, so that thread waits for the disk only, never for the peer.
//!
//! When a piece cannot be sent from its file (a leg died, the file was cut short), the rest of the slice is read
//! through the log store, which knows the other leg, and copied: a dead leg costs a copy, not a consumer.

use crate::metrics::Metrics;
use bytes::Bytes;
use logstore::Slice;
use raid::device::Piece;
use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::SendFlags;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// The most one `sendfile` is asked for. Large enough to be cheap, small enough to look at the clock now and then.
pub const STEP: u64 = 1024 * 1024;

/// The most one fallback read copies at a time.
const COPY: u64 = 256 * 1024;

/// After this long without a byte accepted by the peer, it is taken for gone. It holds leases on segments.
pub const STALL: Duration = Duration::from_secs(60);

/// A part of a response.
#[derive(Debug)]
pub enum Part {
    /// From memory.
    Bytes(Bytes),
    /// From the log.
    Records(Slice),
}

/// A response, framed, in parts.
#[derive(Debug)]
pub struct Response(pub Vec<Part>);

impl From<Bytes> for Response {
    fn from(bytes: Bytes) -> Self {
        Self(vec![Part::Bytes(bytes)])
    }
}

/// Sends a whole response, or fails; after a failure the connection is of no use.
pub async fn send(stream: &Arc<TcpStream>, response: Response, metrics: &Metrics) -> io::Result<()> {
    let mut parts = response.0.into_iter().peekable();
    while let Some(part) = parts.next() {
        let more = parts.peek().is_some();
        match part {
            Part::Bytes(bytes) => {
                send_bytes(stream, &bytes, more).await?;
                metrics.sent.inc_by(bytes.len() as u64);
            }
            Part::Records(slice) => send_slice(stream, &slice, more, metrics).await?,
        }
    }
    Ok(())
}

async fn send_bytes(stream: &TcpStream, mut bytes: &[u8], more: bool) -> io::Result<()> {
    let flags = if more { SendFlags::MORE | SendFlags::NOSIGNAL } else { SendFlags::NOSIGNAL };
    while !bytes.is_empty() {
        let sent = in_time(stream.async_io(Interest::WRITABLE, || {
            rustix::net::send(stream, bytes, flags).map_err(io::Error::from)
        }))
        .await?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

async fn send_slice(stream: &Arc<TcpStream>, slice: &Slice, more: bool, metrics: &Metrics) -> io::Result<()> {
    let mut done = 0;
    for piece in slice.pieces().unwrap_or_default() {
        let (sent, outcome) = send_piece(stream, piece, metrics).await;
        done += sent;
        metrics.sent_by_kernel.inc_by(sent);
        match outcome {
            Ok(()) => {}
            Err(Trouble::Socket(error)) => return Err(error),
            Err(Trouble::File(errno)) => {
                tracing::warn!(%errno, at = piece.at + sent, "sendfile failed; the rest of the fetch is copied");
                break;
            }
        }
    }
    while done < slice.len() {
        let len = COPY.min(slice.len() - done);
        let bytes = slice.copy_range(done, len).await.map_err(io::Error::other)?;
        let last = done + len == slice.len();
        send_bytes(stream, &bytes, more || !last).await?;
        done += len;
        metrics.sent_by_copy.inc_by(len);
    }
    Ok(())
}

/// Why a piece was not sent to its end.
enum Trouble {
    /// The peer is gone.
    Socket(io::Error),
    /// The file cannot be read.
    File(Errno),
}

/// Sends a piece; also tells how many bytes of it went out.
async fn send_piece(stream: &Arc<TcpStream>, piece: &Piece, metrics: &Metrics) -> (u64, Result<(), Trouble>) {
    let mut done = 0;
    while done < piece.len {
        let step = piece.part(done, STEP.min(piece.len - done));
        let sent = if is_cached(&step) {
            in_time(stream.async_io(Interest::WRITABLE, || send_step(stream, &step))).await
        } else {
            metrics.cold_steps.inc();
            in_time(send_cold(Arc::clone(stream), step)).await
        };
        match sent {
            // The file ends before the piece does.
            Ok(0) => return (done, Err(Trouble::File(Errno::IO))),
            Ok(sent) => done += sent as u64,
            Err(error) => return (done, Err(blame(error))),
        }
    }
    (done, Ok(()))
}

fn send_step(stream: &TcpStream, step: &Piece) -> io::Result<usize> {
    let mut at = step.at;
    rustix::fs::sendfile(stream, &step.file, Some(&mut at), step.len as usize).map_err(io::Error::from)
}

/// The same on a thread that may wait for the disk.
async fn send_cold(stream: Arc<TcpStream>, step: Piece) -> io::Result<usize> {
    let step = Arc::new(step);
    loop {
        stream.writable().await?;
        let (socket, step) = (Arc::clone(&stream), Arc::clone(&step));
        let sent = tokio::task::spawn_blocking(move || {
            // One large read instead of many small ones. Advice: what it does not bring, `sendfile` waits for.
            let wanted = NonZeroU64::new(step.len);
            if let Err(errno) = rustix::fs::fadvise(&step.file, step.at, wanted, Advice::WillNeed) {
                tracing::debug!(%errno, "a cold range is not read ahead");
            }
            // Through the runtime, so that a full socket clears its readiness and we do not spin.
            socket.try_io(Interest::WRITABLE, || send_step(&socket, &step))
        })
        .await
        .map_err(io::Error::other)?;
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

/// Whether a step is in the page cache. A member of a volume tells of every page. Of a file in a directory both ends are
/// tried: read-ahead brings whole windows, so the middle follows.
fn is_cached(step: &Piece) -> bool {
    if step.tells_residency() {
        return step.is_resident();
    }
    let probe = |at| {
        let mut byte = [0];
        let mut into = [io::IoSliceMut::new(&mut byte)];
        match rustix::io::preadv2(&step.file, &mut into, at, ReadWriteFlags::NOWAIT) {
            Ok(_) => true,
            // A file system that cannot tell is not probed; its files are sent as if cached.
            Err(errno) => errno == Errno::OPNOTSUPP,
        }
    };
    step.len == 0 || (probe(step.at) && probe(step.at + step.len - 1))
}

fn blame(error: io::Error) -> Trouble {
    match Errno::from_io_error(&error) {
        Some(
            Errno::PIPE
            | Errno::CONNRESET
            | Errno::CONNABORTED
            | Errno::NOTCONN
            | Errno::TIMEDOUT
            | Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::NETDOWN
            | Errno::NOBUFS,
        )
        | None => Trouble::Socket(error),
        Some(errno) => Trouble::File(errno),
    }
}

/// Gives up on a peer that takes nothing for [`STALL`].
async fn in_time<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(STALL, step).await {
        Ok(outcome) => outcome,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes no data")),
    }
}
