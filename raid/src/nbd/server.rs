//! Listeners, connections and the graceful stop.
//!
//! Invariants:
//!
//! - At most [`Limits::connections`] connections are open; one more is closed at once. A client that vanishes frees
//!   its place: closed sockets are noticed by reading, silent TCP peers by keep-alive, and a handshake has a deadline.
//! - Addresses are bound before anything else is touched ([`Listeners::bind`]), connections accepted only from
//!   [`Server::start`] on.
//! - A TCP address off loopback is refused unless the caller says in so many words that plain text may leave the machine.
//! - [`Server::stop`] returns when no operation of any connection is under way any more.

use super::handshake::{Exports, Handshake, Progress, Refused, Session, Tls};
use super::transmission::{self, Pool, Timing};
use crate::error::{Error, Result};
use crate::socket::UnixListener;
use bytes::BytesMut;
use rustix::io::Errno;
use rustix::net::sockopt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle, JoinSet};

/// How long a silent TCP peer is believed in before it is asked, and how often and how long it is asked then.
const KEEP_ALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_PROBES: u32 = 3;
/// After a failed accept (no file descriptors, say), the next try waits so long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Capacity for one receive of the handshake.
const HANDSHAKE_RECEIVE: usize = 4096;

/// Where to listen, as the command line writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `tcp:HOST:PORT`, without the `tcp:`.
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        if let Some(rest) = text.strip_prefix("tcp:") {
            let port = rest
                .rsplit_once(':')
                .filter(|(host, _)| !host.is_empty())
                .map(|(_, port)| port.parse::<u16>());
            if matches!(port, Some(Ok(_))) {
                return Ok(Self::Tcp(rest.to_owned()));
            }
        }
        Err("an address is unix:PATH or tcp:HOST:PORT".to_owned())
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host_and_port) => write!(f, "tcp:{host_and_port}"),
        }
    }
}

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
        Self {
            connections: 256,
            shared_bytes: 256 << 20,
            handshake: Duration::from_secs(10),
            timing: Timing { stall: Duration::from_secs(10), drain: Duration::from_secs(5) },
        }
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Addresses that are taken but not yet served.
pub struct Listeners(Vec<Listener>);

impl Listeners {
    /// Takes every address, or none. `plaintext_remote`: allow TCP addresses that other machines reach.
    pub async fn bind(addresses: &[Address], plaintext_remote: bool) -> Result<Self> {
        let mut listeners = Vec::with_capacity(addresses.len());
        for address in addresses {
            listeners.push(match address {
                Address::Unix(path) => Listener::Unix(UnixListener::bind(path)?),
                Address::Tcp(host_and_port) => {
                    Listener::Tcp(bind_tcp(address, host_and_port, plaintext_remote).await?)
                }
            });
        }
        Ok(Self(listeners))
    }

    /// Where it listens, as URIs that NBD clients understand.
    #[must_use]
    pub fn uris(&self) -> Vec<String> {
        let uri = |listener: &Listener| match listener {
            Listener::Unix(unix) => Some(format!("nbd+unix:///?socket={}", unix.path().display())),
            Listener::Tcp(tcp) => tcp.local_addr().ok().map(|address| format!("nbd://{address}")),
        };
        self.0.iter().filter_map(uri).collect()
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<Accepted>> {
        for listener in &self.0 {
            let accepted = match listener {
                Listener::Unix(unix) => unix.poll_accept(cx).map_ok(Accepted::Unix),
                Listener::Tcp(tcp) => tcp.poll_accept(cx).map_ok(|(stream, _)| Accepted::Tcp(stream)),
            };
            if accepted.is_ready() {
                return accepted;
            }
        }
        Poll::Pending
    }
}

async fn bind_tcp(address: &Address, host_and_port: &str, plaintext_remote: bool) -> Result<TcpListener> {
    let failed = |error: &std::io::Error| match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => Error::AddressInUse { address: address.to_string() },
        Some(errno) => Error::Listen { address: address.to_string(), errno },
        // Name resolution reports no errno.
        None => Error::UnknownHost { address: address.to_string() },
    };
    let found: Vec<SocketAddr> =
        tokio::net::lookup_host(host_and_port).await.map_err(|error| failed(&error))?.collect();
    if !plaintext_remote && !found.iter().all(|address| address.ip().is_loopback()) {
        return Err(Error::PlaintextRemote { address: address.to_string() });
    }
    TcpListener::bind(&found[..]).await.map_err(|error| failed(&error))
}

/// A server at work. Dropping it leaves it running to the end of the runtime; [`Server::stop`] ends it well.
pub struct Server {
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Accepts connections from now on, on the tokio runtime of the caller.
    #[must_use]
    pub fn start(listeners: Listeners, exports: Exports, limits: Limits) -> Self {
        let (stop, stopping) = watch::channel(false);
        let house = Arc::new(House { exports, limits, pool: Arc::new(Pool::new(limits.shared_bytes)) });
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
    sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_PROBES)
}

/// One client, from its first byte to its last.
async fn connection<S>(mut stream: S, house: Arc<House>, mut stopping: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let haggling = tokio::time::timeout(house.limits.handshake, negotiate(&mut stream, &house.exports));
    let negotiated = tokio::select! {
        negotiated = haggling => negotiated,
        _ = stopping.wait_for(|stop| *stop) => return,
    };
    let (session, input) = match negotiated {
        Ok(Ok(Some(negotiated))) => negotiated,
        Ok(Ok(None)) => return,
        Ok(Err(refused)) => return tracing::debug!("NBD handshake refused: {refused}"),
        Err(_) => return tracing::debug!("NBD handshake took too long"),
    };
    tracing::debug!(export = session.export.name, style = ?session.style, "NBD client connected");
    let stop = Box::pin(async move {
        // The sender goes only with the server: the end of both is the same to a connection.
        drop(stopping.wait_for(|stop| *stop).await);
    });
    let (pool, timing) = (Arc::clone(&house.pool), house.limits.timing);
    let ended = transmission::run(&mut stream, input, session, pool, timing, stop).await;
    tracing::debug!("NBD client gone: {ended}");
    // What could be sent has been sent; a peer that is gone already does not mind.
    if let Err(error) = stream.shutdown().await {
        tracing::debug!("NBD connection not shut down: {error}");
    }
}

/// Drives a handshake over a socket. `None`: the client left.
async fn negotiate<S>(
    stream: &mut S,
    exports: &Exports,
) -> std::result::Result<Option<(Session, BytesMut)>, Refused>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut input, mut output) = (BytesMut::with_capacity(HANDSHAKE_RECEIVE), BytesMut::new());
    let mut handshake = Handshake::start(exports.clone(), Tls::Off, &mut output);
    loop {
        let progress = handshake.advance(&mut input, &mut output);
        // What a refused client had been answered before is sent all the same.
        if stream.write_all_buf(&mut output).await.is_err() {
            return Ok(None);
        }
        match progress? {
            Progress::More => {}
            Progress::Chosen(session) => return Ok(Some((session, input))),
            Progress::StartTls | Progress::Goodbye => return Ok(None),
        }
        input.reserve(HANDSHAKE_RECEIVE);
        match stream.read_buf(&mut input).await {
            Ok(0) | Err(_) => return Ok(None),
            Ok(_) => {}
        }
    }
}
