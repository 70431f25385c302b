//! Listeners, connections and the graceful stop.
//!
//! Invariants:
//!
//! - At most [`Limits::connections`] connections are open; one more is closed at once. A client that vanishes frees
//!   its place: closed sockets are noticed by reading, silent TCP peers by keep-alive, and a handshake has a deadline.
//! - Addresses are bound before anything else is touched ([`Listeners::bind`]), connections accepted only from
//!   [`Server::start`] on.
//! - The time for a handshake includes that of TLS within it.
//! - [`Server::stop`] returns when no operation of any connection is under way any more.

use super::handshake::{Exports, Handshake, Progress, Refused, Session};
use super::listen::{Accepted, Listeners};
use super::tls::Security;
use super::transmission::{self, Ended, Line, Pool, Stop, Stream, Timing};
use bytes::BytesMut;
use rustix::io::Errno;
use rustix::net::sockopt;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio_rustls::server::TlsStream;

/// How long a silent TCP peer is believed in before it is asked, and how often and how long it is asked then.
const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_PROBES: u32 = 3;
/// How long a peer may leave replies unacknowledged, or its window shut: nobody asks it then, and Linux would go on for a
/// quarter of an hour.
const UNACKNOWLEDGED: Duration = Duration::from_secs(300);
/// After a failed accept (no file descriptors, say), the next try waits so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What a Unix socket may hold of replies that its client has not read. The usual 208 KiB are three replies of 64 KiB:
/// server and client then wake each other for each. The kernel doubles it for its own needs, and takes as much as
/// `net.core.wmem_max` allows. Pages that were spliced stay page cache while they wait here; what was copied is the kernel's
/// memory, up to a megabyte for each client that does not read, beside the bytes in flight.
pub(crate) const SEND_BUFFER: usize = 512 << 10;
/// How long the next request is looked for: what it takes a client that sleeps to wake, take its answer and ask again in a
/// virtual machine. Where waking takes less, the look ends earlier.
const BUSY: Duration = Duration::from_micros(100);
/// Capacity for one receive of the handshake.
const HANDSHAKE_RECEIVE: usize = 4096;

/// What a server bears.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Open connections.
    pub connections: usize,
    /// Bytes in flight that all connections share, beyond the little each has of its own.
    pub shared_bytes: u32,
    /// How long a handshake may take.
    pub handshake: Duration,
    /// How long clients may let things stand.
    pub timing: Timing,
}

impl Limits {
    /// For a server that has a machine's disks behind it.
    #[must_use]
    pub fn standard() -> Self {
        // Where there is one only, a client cannot ask while the server looks.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            connections: 256,
            shared_bytes: 256 << 20,
            handshake: Duration::from_secs(10),
            timing: Timing {
                stall: Duration::from_secs(10),
                drain: Duration::from_secs(5),
                busy: if cores > 1 { BUSY } else { Duration::ZERO },
            },
        }
    }
}

/// A server at work. Dropping it leaves it running to the end of the runtime; [`Server::stop`] ends it well.
pub struct Server {
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Accepts connections from now on, on the tokio runtime of the caller.
    #[must_use]
    pub fn start(listeners: Listeners, exports: Exports, limits: Limits, security: Security) -> Self {
        let (stop, stopping) = watch::channel(false);
        let pool = Arc::new(Pool::new(limits.shared_bytes));
        let house = Arc::new(House { exports, limits, security, pool });
        Self { stop, accepting: tokio::spawn(accept(listeners, house, stopping)) }
    }

    /// Takes no more connections and requests, lets what runs end, answers it, and closes.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        if let Err(error) = self.accepting.await {
            tracing::error!("the NBD server ended badly: {error}");
        }
    }
}

/// What all connections share.
struct House {
    exports: Exports,
    limits: Limits,
    security: Security,
    pool: Arc<Pool>,
}

async fn accept(listeners: Listeners, house: Arc<House>, mut stopping: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => break,
            Some(ended) = connections.join_next() => {
                report(ended);
                continue;
            }
            accepted = std::future::poll_fn(|cx| listeners.poll_accept(cx)) => accepted,
        };
        match accepted {
            Ok(_) if connections.len() >= house.limits.connections => {
                tracing::warn!("NBD connection refused: {} are open", connections.len());
            }
            Ok(Accepted::Unix(stream)) => {
                // Less room costs speed only.
                if let Err(errno) = sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER) {
                    tracing::debug!("NBD connection with a small send buffer: {errno}");
                }
                connections.spawn(connection(stream, Arc::clone(&house), stopping.clone()));
            }
            Ok(Accepted::Tcp(stream)) => {
                if let Err(errno) = tune(&stream) {
                    tracing::warn!("NBD connection without keep-alive: {errno}");
                }
                connections.spawn(connection(stream, Arc::clone(&house), stopping.clone()));
            }
            Err(error) => {
                tracing::warn!("cannot accept an NBD connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listeners);
    while let Some(ended) = connections.join_next().await {
        report(ended);
    }
}

fn report(ended: std::result::Result<(), JoinError>) {
    if let Err(error) = ended {
        tracing::error!("an NBD connection ended badly: {error}");
    }
}

/// Replies leave at once, and a peer whose machine is gone is noticed.
fn tune(stream: &TcpStream) -> std::result::Result<(), Errno> {
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEP_ALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED.as_millis() as u32)
}

/// One client, from its first byte to its last.
async fn connection<S>(stream: S, house: Arc<House>, mut stopping: watch::Receiver<bool>)
where
    S: Stream,
{
    let haggling = tokio::time::timeout(house.limits.handshake, open(stream, &house));
    let opened = tokio::select! {
        opened = haggling => opened,
        _ = stopping.wait_for(|stop| *stop) => return,
    };
    match opened {
        Ok(Ok(Some(Opened::Plain(stream, session, input)))) => {
            serve(stream, session, input, house, stopping).await;
        }
        Ok(Ok(Some(Opened::Secure(stream, session, input)))) => {
            serve(*stream, session, input, house, stopping).await;
        }
        Ok(Ok(None)) => {}
        Ok(Err(refused)) => tracing::debug!("NBD handshake refused: {refused}"),
        Err(_) => tracing::debug!("NBD handshake took too long"),
    }
}

/// A connection whose handshake is done, and what was received beyond it.
enum Opened<S> {
    Plain(S, Session, BytesMut),
    Secure(Box<TlsStream<S>>, Session, BytesMut),
}

/// What a haggling led to.
enum Agreed {
    Session(Session),
    StartTls,
}

/// The whole handshake, TLS within it. `None`: the client left, or TLS refused it.
async fn open<S>(mut stream: S, house: &House) -> std::result::Result<Option<Opened<S>>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut input, mut output) = (BytesMut::with_capacity(HANDSHAKE_RECEIVE), BytesMut::new());
    let mut handshake = Handshake::start(house.exports.clone(), house.security.offer(), &mut output);
    match haggle(&mut stream, &mut handshake, &mut input, &mut output).await? {
        None => return Ok(None),
        Some(Agreed::Session(session)) => return Ok(Some(Opened::Plain(stream, session, input))),
        Some(Agreed::StartTls) => {}
    }
    let Some(acceptor) = house.security.acceptor() else { return Ok(None) };
    let mut stream = match acceptor.accept(stream).await {
        Ok(stream) => Box::new(stream),
        Err(error) => {
            tracing::info!("NBD client refused by TLS: {error}");
            return Ok(None);
        }
    };
    handshake.secured();
    let agreed = haggle(&mut *stream, &mut handshake, &mut input, &mut output).await?;
    // TLS within TLS is refused by the haggling.
    let Some(Agreed::Session(session)) = agreed else { return Ok(None) };
    Ok(Some(Opened::Secure(stream, session, input)))
}

/// Drives a handshake over a socket. `None`: the client left.
async fn haggle<S>(
    stream: &mut S,
    handshake: &mut Handshake,
    input: &mut BytesMut,
    output: &mut BytesMut,
) -> std::result::Result<Option<Agreed>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let progress = handshake.advance(input, output);
        // What a refused client had been answered before is sent all the same.
        if stream.write_all_buf(output).await.is_err() || stream.flush().await.is_err() {
            return Ok(None);
        }
        match progress? {
            Progress::More => {}
            Progress::Chosen(session) => return Ok(Some(Agreed::Session(session))),
            Progress::StartTls => return Ok(Some(Agreed::StartTls)),
            Progress::Goodbye => {
                // The client closes too; one that is gone already does not mind.
                drop(stream.shutdown().await);
                return Ok(None);
            }
        }
        input.reserve(HANDSHAKE_RECEIVE);
        match stream.read_buf(input).await {
            Ok(0) | Err(_) => return Ok(None),
            Ok(_) => {}
        }
    }
}

/// The transmission phase.
async fn serve<S>(
    stream: S,
    session: Session,
    input: BytesMut,
    house: Arc<House>,
    stopping: watch::Receiver<bool>,
) where
    S: Stream,
{
    let (pool, timing) = (Arc::clone(&house.pool), house.limits.timing);
    transmit(stream, session, input, pool, timing, stopping, None).await;
}

/// Serves a connection that needs no handshake: both ends know what is served, and how ([`Session`]). Ends like any
/// other, but what it has not taken in at the stop, or when its client hung up, it leaves unanswered: the client asks it
/// of the next server, or of a sibling of this `line`. The device must make changes that overlap in the order in which
/// they were first polled.
pub async fn adopt<S>(
    stream: S,
    session: Session,
    pool: Arc<Pool>,
    timing: Timing,
    stopping: watch::Receiver<bool>,
    line: Line,
) -> Ended
where
    S: Stream,
{
    transmit(stream, session, BytesMut::new(), pool, timing, stopping, Some(line)).await
}

async fn transmit<S>(
    mut stream: S,
    session: Session,
    input: BytesMut,
    pool: Arc<Pool>,
    timing: Timing,
    mut stopping: watch::Receiver<bool>,
    line: Option<Line>,
) -> Ended
where
    S: Stream,
{
    tracing::debug!(export = session.export.name, style = ?session.style, "NBD client connected");
    let announced = Box::pin(async move {
        // The sender goes only with the server: the end of both is the same to a connection.
        drop(stopping.wait_for(|stop| *stop).await);
    });
    let ended = transmission::run(&mut stream, input, session, pool, timing, Stop { announced, line }).await;
    tracing::debug!("NBD client gone: {ended}");
    // What could be sent has been sent. Under TLS the farewell is a record of its own, which a client that takes
    // nothing any more would not take either.
    match tokio::time::timeout(timing.drain, stream.shutdown()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("NBD connection not shut down: {error}"),
        Err(_) => tracing::debug!("NBD connection not shut down in time"),
    }
    ended
}
