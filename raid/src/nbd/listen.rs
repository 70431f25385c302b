//! Addresses to listen on, and sockets that a service manager has opened for us.
//!
//! Invariants:
//!
//! - All addresses are taken, or none: of a name each that it has, but for those that this machine does not have.
//! - A TCP address off loopback is refused where plain text may be spoken, unless the caller says in so many words that it
//!   may leave the machine. That holds for sockets that were passed as well.

use crate::error::{Error, Result};
use crate::socket::UnixListener;
use rustix::io::Errno;
use rustix::net::sockopt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::task::{Context, Poll};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};

/// Sockets that a service manager may pass.
const MOST_PASSED: usize = 64;
/// TCP connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

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

enum Listener {
    Unix(UnixListener),
    /// Its file is its maker's.
    PassedUnix(tokio::net::UnixListener),
    Tcp(TcpListener),
}

pub(super) enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Addresses that are taken but not yet served.
pub struct Listeners(Vec<Listener>);

impl Listeners {
    /// Takes every address, or none. `remote`: allow TCP addresses that other machines reach.
    pub async fn bind(addresses: &[Address], remote: bool) -> Result<Self> {
        let mut listeners = Vec::with_capacity(addresses.len());
        for address in addresses {
            match address {
                Address::Unix(path) => listeners.push(Listener::Unix(UnixListener::bind(path)?)),
                Address::Tcp(host_and_port) => {
                    let bound = bind_tcp(address, host_and_port, remote).await?;
                    listeners.extend(bound.into_iter().map(Listener::Tcp));
                }
            }
        }
        Ok(Self(listeners))
    }

    /// Takes over what a service manager has opened. Must be called within a tokio runtime. `remote` as in
    /// [`Listeners::bind`].
    pub fn take_over(passed: Passed, remote: bool) -> Result<Self> {
        let Passed(mut sockets) = passed;
        let count = sockets.len();
        let listener = |at| {
            let failed = |errno| Error::PassedSocket { number: at, errno };
            let errno =
                |error: std::io::Error| failed(Errno::from_io_error(&error).unwrap_or(Errno::NOTSOCK));
            if let Ok(Some(unix)) = sockets.take_unix_listener(at) {
                unix.set_nonblocking(true).map_err(errno)?;
                listens(&unix).map_err(failed)?;
                return Ok(Listener::PassedUnix(tokio::net::UnixListener::from_std(unix).map_err(errno)?));
            }
            let tcp = sockets.take_tcp_listener(at).map_err(errno)?.ok_or(failed(Errno::BADF))?;
            tcp.set_nonblocking(true).map_err(errno)?;
            listens(&tcp).map_err(failed)?;
            let address = tcp.local_addr().map_err(errno)?;
            if !remote && !address.ip().is_loopback() {
                return Err(Error::PlaintextRemote { address: format!("tcp:{address}") });
            }
            Ok(Listener::Tcp(TcpListener::from_std(tcp).map_err(errno)?))
        };
        (0..count).map(listener).collect::<Result<_>>().map(Self)
    }

    /// All of both.
    pub fn extend(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    /// Whether it listens nowhere.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Where it listens, as URIs that NBD clients understand. `secure`: under TLS.
    #[must_use]
    pub fn uris(&self, secure: bool) -> Vec<String> {
        let scheme = if secure { "nbds" } else { "nbd" };
        let unix = |path: &Path| format!("{scheme}+unix:///?socket={}", path.display());
        let uri = |listener: &Listener| match listener {
            Listener::Unix(listener) => Some(unix(listener.path())),
            Listener::PassedUnix(listener) => listener.local_addr().ok()?.as_pathname().map(unix),
            Listener::Tcp(tcp) => tcp.local_addr().ok().map(|address| format!("{scheme}://{address}")),
        };
        self.0.iter().filter_map(uri).collect()
    }

    pub(super) fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<Accepted>> {
        for listener in &self.0 {
            let accepted = match listener {
                Listener::Unix(unix) => unix.poll_accept(cx).map_ok(Accepted::Unix),
                Listener::PassedUnix(unix) => {
                    unix.poll_accept(cx).map_ok(|(stream, _)| Accepted::Unix(stream))
                }
                Listener::Tcp(tcp) => tcp.poll_accept(cx).map_ok(|(stream, _)| Accepted::Tcp(stream)),
            };
            if accepted.is_ready() {
                return accepted;
            }
        }
        Poll::Pending
    }
}

/// Listens on all addresses of a name.
async fn bind_tcp(address: &Address, host_and_port: &str, remote: bool) -> Result<Vec<TcpListener>> {
    let failed = |error: &std::io::Error| match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => Error::AddressInUse { address: address.to_string() },
        Some(errno) => Error::Listen { address: address.to_string(), errno },
        // Name resolution reports no errno.
        None => Error::UnknownHost { address: address.to_string() },
    };
    let found: Vec<SocketAddr> =
        tokio::net::lookup_host(host_and_port).await.map_err(|error| failed(&error))?.collect();
    if !remote && !found.iter().all(|address| address.ip().is_loopback()) {
        return Err(Error::PlaintextRemote { address: address.to_string() });
    }
    bind_each(&found).map_err(|error| failed(&error))
}

/// Listens on each address, but for those that this machine does not have, if one is left. Where the port is 0, all have the
/// one that the first is given.
fn bind_each(addresses: &[SocketAddr]) -> std::io::Result<Vec<TcpListener>> {
    let is_mixed = addresses.iter().any(SocketAddr::is_ipv4) && addresses.iter().any(SocketAddr::is_ipv6);
    let (mut listeners, mut absent): (Vec<TcpListener>, _) = (Vec::new(), None);
    for (number, address) in addresses.iter().enumerate() {
        if addresses[..number].contains(address) {
            continue;
        }
        let mut address = *address;
        if let Some(first) = listeners.first().filter(|_| address.port() == 0) {
            address.set_port(first.local_addr()?.port());
        }
        match bind_one(address, is_mixed) {
            Ok(listener) => listeners.push(listener),
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
                    tracing::debug!("not listening on {address}: {error}");
                    absent.get_or_insert(error);
                }
                _ => return Err(error),
            },
        }
    }
    match absent {
        Some(error) if listeners.is_empty() => Err(error),
        _ => Ok(listeners),
    }
}

/// `is_mixed`: another socket has the addresses of IPv4, and this one is not to take them.
fn bind_one(address: SocketAddr, is_mixed: bool) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    if address.is_ipv6() && is_mixed {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Sockets that a service manager has opened for this process, as systemd does (`sd_listen_fds(3)`).
pub struct Passed(listenfd::ListenFd);

impl Passed {
    /// What the environment tells, if it tells it to this process: `LISTEN_PID` is its number, `LISTEN_FDS` counts the
    /// descriptors from 3 on. Both are taken out, so that nobody else takes them for theirs: call it before any thread
    /// is started.
    pub fn from_environment() -> Result<Option<Self>> {
        let variable = |name| std::env::var(name).ok();
        let own = std::process::id().to_string();
        let Some(count) = variable("LISTEN_FDS").filter(|_| variable("LISTEN_PID") == Some(own)) else {
            return Ok(None);
        };
        match count.parse::<usize>() {
            Ok(0) => Ok(None),
            Ok(1..=MOST_PASSED) => Ok(Some(Self(listenfd::ListenFd::from_env()))),
            _ => Err(Error::PassedSockets { count }),
        }
    }
}

/// Refuses a socket that does not listen.
fn listens(socket: &impl std::os::fd::AsFd) -> std::result::Result<(), Errno> {
    if sockopt::socket_acceptconn(socket)? { Ok(()) } else { Err(Errno::INVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpStream;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn errno(outcome: std::io::Result<Vec<TcpListener>>) -> Option<Errno> {
        Errno::from_io_error(&outcome.unwrap_err())
    }

    #[tokio::test]
    async fn a_name_is_listened_on_at_each_of_its_addresses() {
        let listeners = bind_each(&addresses(&["127.0.0.1:0", "127.0.0.1:0", "127.0.0.2:0"])).unwrap();
        assert_eq!(listeners.len(), 2);
        let port = listeners[0].local_addr().unwrap().port();
        for host in ["127.0.0.1", "127.0.0.2"] {
            TcpStream::connect((host, port)).await.unwrap();
        }
        let all = Listeners(listeners.into_iter().map(Listener::Tcp).collect());
        let wanted = ["127.0.0.1", "127.0.0.2"].map(|host| format!("nbd://{host}:{port}"));
        assert_eq!(all.uris(false), wanted);
    }

    #[tokio::test]
    async fn both_families_share_a_port_also_where_all_addresses_are_meant() {
        for (four, six) in [("127.0.0.1:0", "[::1]:0"), ("0.0.0.0:0", "[::]:0")] {
            // A machine without IPv6 has the one.
            let has_six = std::net::TcpListener::bind("[::1]:0").is_ok();
            for order in [[four, six], [six, four]] {
                let listeners = bind_each(&addresses(&order)).unwrap();
                assert_eq!(listeners.len(), 1 + usize::from(has_six), "{order:?}");
                let port = listeners[0].local_addr().unwrap().port();
                TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                if has_six {
                    TcpStream::connect(("::1", port)).await.unwrap();
                }
            }
        }
    }

    #[tokio::test]
    async fn an_address_that_is_not_here_is_passed_over_and_one_in_use_is_not() {
        // Of a network that is there for examples.
        let listeners = bind_each(&addresses(&["192.0.2.1:0", "127.0.0.1:0"])).unwrap();
        assert_eq!(listeners.len(), 1);
        assert_eq!(errno(bind_each(&addresses(&["192.0.2.1:0"]))), Some(Errno::ADDRNOTAVAIL));
        let taken = listeners[0].local_addr().unwrap();
        let free = SocketAddr::from(([127, 0, 0, 2], taken.port()));
        assert_eq!(errno(bind_each(&[free, taken])), Some(Errno::ADDRINUSE));
        // All or none.
        assert_eq!(bind_each(&[free]).unwrap().len(), 1);
    }
}
