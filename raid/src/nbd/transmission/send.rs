//! Sending: all replies that are ready leave together.

use super::{Connection, Ended};
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite};

/// Slices that one `writev` may carry.
const MAX_SLICES: usize = 128;

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Connection<'_, S> {
    /// Sends what is ready; whether any byte left.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while !self.replies.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let mut used = 0;
            let mut skip = self.sent;
            let parts = self.replies.iter().flat_map(super::Reply::parts);
            for bytes in parts.flat_map(super::reply::Part::slices) {
                let rest = &bytes[skip.min(bytes.len())..];
                skip = skip.saturating_sub(bytes.len());
                if rest.is_empty() {
                    continue;
                }
                if used == MAX_SLICES {
                    break;
                }
                slices[used] = IoSlice::new(rest);
                used += 1;
            }
            match Pin::new(&mut *self.stream).poll_write_vectored(cx, &slices[..used]) {
                Poll::Pending => return moved,
                Poll::Ready(Ok(0)) => self.abandon(Ended::Broken(std::io::ErrorKind::WriteZero)),
                Poll::Ready(Ok(sent)) => self.account(sent),
                Poll::Ready(Err(error)) => self.abandon(Ended::Broken(error.kind())),
            }
            moved = true;
        }
        // A plain socket holds nothing back and says so at once.
        if self.unflushed {
            match Pin::new(&mut *self.stream).poll_flush(cx) {
                Poll::Pending => return moved,
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => self.abandon(Ended::Broken(error.kind())),
            }
        }
        self.stall = None;
        moved
    }

    /// `sent` more bytes have left: lets go of the replies that are out.
    fn account(&mut self, sent: usize) {
        self.unflushed = true;
        self.total_sent += sent as u64;
        self.sent += sent;
        while self.replies.front().is_some_and(|reply| reply.len() <= self.sent) {
            let Some(reply) = self.replies.pop_front() else { return };
            self.sent -= reply.len();
            self.purse.give_back(&reply.lease);
        }
    }
}
