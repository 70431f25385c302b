//! Sending: all replies that are ready leave together.

use super::stream::Stream;
use super::{Connection, Ended};
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Slices that one `writev` may carry.
const MAX_SLICES: usize = 128;

impl<S: Stream> Connection<'_, S> {
    /// Sends what is ready; whether any byte left.
    pub(super) fn poll_send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while !self.replies.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let mut used = 0;
            let mut skip = self.sent;
            'gather: for part in self.replies.iter().flat_map(super::Reply::parts) {
                for bytes in part.slices(&self.tray) {
                    let rest = &bytes[skip.min(bytes.len())..];
                    skip = skip.saturating_sub(bytes.len());
                    if rest.is_empty() {
                        continue;
                    }
                    if used == MAX_SLICES {
                        break 'gather;
                    }
                    slices[used] = IoSlice::new(rest);
                    used += 1;
                }
                // What is in its pipe has to leave first.
                if part.is_spliced() {
                    break;
                }
            }
            let written = if used > 0 {
                Pin::new(&mut *self.stream).poll_write_vectored(cx, &slices[..used])
            } else {
                let more = self.replies.len() > 1;
                let pipe = self.replies.front_mut().and_then(super::Reply::pipe);
                match pipe.zip(self.stream.plain()) {
                    Some((pipe, plain)) => plain.poll_splice(cx, pipe, more),
                    // Nothing is put in a pipe for such a stream, and a reply has bytes left while it is here.
                    None => Poll::Ready(Ok(0)),
                }
            };
            match written {
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
            self.purse.give_back(&reply.end(&mut self.tray));
        }
    }
}
