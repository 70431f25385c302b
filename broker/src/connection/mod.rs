//! One client's connection: requests decoded in order, responses in request order.
//!
//! One task runs two futures. The *reader* takes a frame, decodes it and dispatches it; what can be answered later (a
//! commit, a long poll, a rebalance) it leaves as a future in a bounded queue, and goes on. The *writer* takes the
//! queue's head, waits for it and sends it. So a produce's wait for the disks holds up neither the next produce's
//! parsing nor its append, and at most [`IN_FLIGHT`] answers are owed at any time.
//!
//! Invariants:
//!
//! - An append is never dropped half-way: the reader is interrupted only where it waits for the peer's bytes.
//! - A frame's bytes are in memory only with a permit from the broker's budget, taken before its body is read and given
//!   back once its dispatch is over.
//! - An idle connection owns no buffer.
//!
//! Cost of a small request: one `read` (often of several requests), one `send`; two allocations (response and
//! queued future) besides the codec's. Of a produce: `read`s straight into the frame's one allocation, which the log
//! store gets slices of; nothing is copied but the few bytes that came with the header.

mod frame;

use crate::broker::Broker;
use crate::dispatch::{Answer, dispatch};
use crate::send::{Response, send};
use crate::wire::{EncodeError, Misbehaved, request};
use frame::{Frames, Next};
use futures_util::future::BoxFuture;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

/// Answers owed to one client at a time.
pub const IN_FLIGHT: usize = 64;

/// How long answers may still go out after the client stopped sending, or the broker is stopping.
const DRAIN: Duration = Duration::from_secs(5);

/// An answer that is, or will be, ready.
pub type Pending = BoxFuture<'static, Result<Response, EncodeError>>;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    /// The client closed it, was idle, or the broker stops: nobody did wrong.
    #[error("done")]
    Done,
    #[error(transparent)]
    Misbehaved(#[from] Misbehaved),
    #[error(transparent)]
    Encode(#[from] EncodeError),
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A produce without acknowledgement failed: closing is the only way to tell (as in Kafka).
    #[error("a produce with acks=0 failed")]
    Unacknowledged,
}

/// Serves a client until it leaves, breaks the protocol, or the broker stops.
pub async fn serve(broker: Arc<Broker>, stream: TcpStream, peer: SocketAddr) {
    broker.metrics.connections.inc();
    let end = run(&broker, stream, peer).await;
    broker.metrics.connections.dec();
    match end {
        Err(End::Misbehaved(fault)) => {
            broker.metrics.misbehaved.inc();
            tracing::warn!(%peer, %fault, "connection closed");
        }
        Err(End::Encode(fault)) => tracing::error!(%peer, %fault, "connection closed"),
        Err(End::Io(fault)) => tracing::debug!(%peer, %fault, "connection closed"),
        Err(End::Unacknowledged) => tracing::info!(%peer, "connection closed: a produce with acks=0 failed"),
        Err(End::Done) | Ok(()) => tracing::debug!(%peer, "connection closed"),
    }
}

async fn run(broker: &Arc<Broker>, stream: TcpStream, peer: SocketAddr) -> Result<(), End> {
    stream.set_nodelay(true)?;
    let stream = Arc::new(stream);
    let (queue, owed) = mpsc::channel(IN_FLIGHT);
    let in_flight = AtomicUsize::new(0);
    let hung_up = watch::Sender::new(false);
    let reader = async {
        let mut frames = Frames::new(broker, &stream, hung_up.subscribe(), &in_flight);
        let end = read(broker, peer, &mut frames, &queue, &in_flight).await;
        drop(queue);
        end
    };
    let writer = write(broker, &stream, owed, &in_flight);
    tokio::pin!(reader, writer);
    tokio::select! {
        end = &mut reader => {
            // What is owed still goes out, but a long poll does not keep a dead connection.
            match tokio::time::timeout(DRAIN, writer).await {
                Ok(written) => end.and(written),
                Err(_) => end,
            }
        }
        end = &mut writer => {
            hung_up.send_replace(true);
            let read = reader.await;
            end.and(read)
        }
    }
}

async fn read(
    broker: &Arc<Broker>,
    peer: SocketAddr,
    frames: &mut Frames<'_>,
    queue: &mpsc::Sender<Pending>,
    in_flight: &AtomicUsize,
) -> Result<(), End> {
    loop {
        // A place in the queue first: a request whose answer cannot be owed is not read.
        let Ok(place) = queue.reserve().await else { return Err(End::Done) };
        let (frame, permit) = match frames.next().await? {
            Next::Frame(frame, permit) => (frame, permit),
            Next::Closed => return Err(End::Done),
        };
        broker.metrics.received.inc_by(frame.len() as u64 + 4);
        let (header, request) = request::decode(frame)?;
        frames.trust();
        broker.metrics.request(header.api);
        in_flight.fetch_add(1, Ordering::Relaxed);
        let answer = dispatch(broker, peer, header, request).await?;
        drop(permit);
        match answer {
            Answer::Now(response) => place.send(Box::pin(std::future::ready(Ok(response)))),
            Answer::Later(pending) => place.send(pending),
            Answer::Nothing => {
                in_flight.fetch_sub(1, Ordering::Relaxed);
            }
            Answer::Close => return Err(End::Unacknowledged),
        }
    }
}

async fn write(
    broker: &Arc<Broker>,
    stream: &Arc<TcpStream>,
    mut owed: mpsc::Receiver<Pending>,
    in_flight: &AtomicUsize,
) -> Result<(), End> {
    while let Some(pending) = owed.recv().await {
        let response = pending.await?;
        send(stream, response, &broker.metrics).await?;
        in_flight.fetch_sub(1, Ordering::Relaxed);
    }
    Ok(())
}
