//! Unix sockets to listen on: private to their owner from the first moment, and never in the way of the next server.
//!
//! Invariants: a socket file is created with mode 0600 before anyone can connect to it. A file that lies in the way is
//! removed only if it is a socket on which nobody listens. When the listener goes, its file goes, if it still is its own.

use crate::error::{Error, Result};
use rustix::fs::{Mode, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::path::{Path, PathBuf};
use std::task::{Context, Poll};
use tokio::net::UnixStream;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A Unix socket that listens; its file is removed on drop.
#[derive(Debug)]
pub(crate) struct UnixListener {
    listener: tokio::net::UnixListener,
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl UnixListener {
    /// Listens on `path`. Must be called within a tokio runtime.
    pub(crate) fn bind(path: &Path) -> Result<Self> {
        let address = || format!("unix:{}", path.display());
        let failed = |errno| Error::Listen { address: address(), errno };
        let name = SocketAddrUnix::new(path).map_err(failed)?;
        let socket = new_socket().map_err(failed)?;
        match rustix::net::bind(&socket, &name) {
            Err(Errno::ADDRINUSE) => {
                if !is_stale(path).map_err(failed)? {
                    return Err(Error::AddressInUse { address: address() });
                }
                std::fs::remove_file(path)
                    .map_err(|e| failed(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
                rustix::net::bind(&socket, &name).map_err(failed)?;
            }
            bound => bound.map_err(failed)?,
        }
        // Nobody can connect before `listen`: there is no moment at which others may.
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
        let listener = tokio::net::UnixListener::from_std(socket.into())
            .map_err(|e| failed(Errno::from_io_error(&e).unwrap_or(Errno::IO)))?;
        Ok(Self { listener, path: path.to_owned(), identity: identity(path) })
    }

    /// The next connection.
    pub(crate) fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<UnixStream>> {
        self.listener.poll_accept(cx).map_ok(|(stream, _)| stream)
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for UnixListener {
    fn drop(&mut self) {
        // Another server may have taken the place; its socket is not ours to remove.
        if self.identity.is_some()
            && identity(&self.path) == self.identity
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!("{}: cannot remove the socket: {error}", self.path.display());
        }
    }
}

fn new_socket() -> std::result::Result<std::os::fd::OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Whether `path` is a socket on which nobody listens.
fn is_stale(path: &Path) -> std::result::Result<bool, Errno> {
    let stat = rustix::fs::lstat(path)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Socket {
        return Ok(false);
    }
    let probe = new_socket()?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => Ok(true),
        // Connected, or its backlog is full: someone is there.
        Ok(()) | Err(Errno::AGAIN) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    rustix::fs::lstat(path).ok().map(|Stat { st_dev, st_ino, .. }| (st_dev, st_ino))
}
