//! What a connection sends over: any byte stream, and for plain sockets the way past copying.

use super::pipes::Spliced;
use rustix::io::Errno;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, Interest};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::server::TlsStream;

/// A byte stream that a connection can be served on.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {
    /// The socket itself, where the kernel may write to it from a pipe; `None` if something lies between, such as TLS.
    fn plain(&self) -> Option<Plain<'_>> {
        None
    }
}

impl Stream for UnixStream {
    fn plain(&self) -> Option<Plain<'_>> {
        Some(Plain::Unix(self))
    }
}

impl Stream for TcpStream {
    fn plain(&self) -> Option<Plain<'_>> {
        Some(Plain::Tcp(self))
    }
}

/// A stream within the process, for whoever drives a connection by hand.
impl Stream for DuplexStream {}

/// What is encrypted has to be in our memory first.
impl<S: Stream> Stream for TlsStream<S> {}

/// A socket without anything in between.
pub enum Plain<'a> {
    /// Of this machine.
    Unix(&'a UnixStream),
    /// Of any machine.
    Tcp(&'a TcpStream),
}

impl Plain<'_> {
    /// Sends what the socket takes now; `more`: something follows at once.
    pub(super) fn poll_splice(
        &self,
        cx: &mut Context<'_>,
        from: &mut Spliced,
        more: bool,
    ) -> Poll<io::Result<usize>> {
        loop {
            let sent = match self {
                Self::Unix(socket) => {
                    ready!(socket.poll_write_ready(cx))?;
                    socket.try_io(Interest::WRITABLE, || from.send(socket, more).map_err(io::Error::from))
                }
                Self::Tcp(socket) => {
                    ready!(pin!(poll_fn(|cx| socket.poll_write_ready(cx))).poll(cx))?;
                    socket.try_io(Interest::WRITABLE, || from.send(socket, more).map_err(io::Error::from))
                }
            };
            match sent {
                // It said it was ready and is not: that is forgotten now, and the waker is set next time round.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if Errno::from_io_error(&error) == Some(Errno::INTR) => {}
                other => return Poll::Ready(other),
            }
        }
    }
}
