//! Sending: all replies that are ready leave together.

use super::reply::Reply;
use super::stream::Stream;
use super::tray::Tray;
use super::{Connection, Ended};
use std::collections::VecDeque;
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
            let used = gather(&self.replies, self.sent, &self.tray, &mut slices);
            let written = if used > 0 {
                Pin::new(&mut *self.stream).poll_write_vectored(cx, &slices[..used])
            } else {
                let more = self.replies.len() > 1;
                let pipe = self.replies.front_mut().and_then(Reply::pipe);
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

/// What is to be sent next of `replies`, of which `sent` bytes are out, up to where something waits in a pipe; returns how many slices it is.
fn gather<'a>(
    replies: &'a VecDeque<Reply>,
    sent: usize,
    tray: &'a Tray,
    slices: &mut [IoSlice<'a>; MAX_SLICES],
) -> usize {
    let (mut used, mut skip) = (0, sent);
    // The last slice, if it lies on the tray: what lies behind it there makes it longer.
    let mut run = 0..0;
    for part in replies.iter().flat_map(Reply::parts) {
        if let Some(mut place) = part.place() {
            // Only the first reply has been sent in part.
            place.start += std::mem::take(&mut skip);
            if run.end == place.start && !run.is_empty() {
                run.end = place.end;
                slices[used - 1] = IoSlice::new(tray.bytes(run.clone()));
                continue;
            }
            if used == MAX_SLICES {
                return used;
            }
            run = place;
            slices[used] = IoSlice::new(tray.bytes(run.clone()));
            used += 1;
            continue;
        }
        for bytes in part.slices() {
            let rest = &bytes[skip.min(bytes.len())..];
            skip = skip.saturating_sub(bytes.len());
            if rest.is_empty() {
                continue;
            }
            if used == MAX_SLICES {
                return used;
            }
            slices[used] = IoSlice::new(rest);
            used += 1;
            run = 0..0;
        }
        // What is in its pipe has to leave first.
        if part.is_spliced() {
            break;
        }
    }
    used
}

#[cfg(test)]
mod tests {
    use super::super::super::wire::Style;
    use super::super::memory::Lease;
    use super::super::reply::To;
    use super::*;
    use bytes::Bytes;

    /// Replies of each kind, one from the tray if `laid`, with `len` bytes of data.
    fn reply(tray: &mut Tray, laid: bool, byte: u8, len: usize) -> Reply {
        let to = To { style: Style::Structured, cookie: byte.into(), offset: 0 };
        let lease = Lease::Private(0);
        if laid {
            let fill = |room: &mut [u8]| {
                room.fill(byte);
                true
            };
            return Reply::laid(to, 0, len, lease, tray, fill).unwrap_or_else(|_| panic!("there is room"));
        }
        Reply::data(to, 0, Bytes::from(vec![byte; len]), lease)
    }

    fn gathered(replies: &VecDeque<Reply>, sent: usize, tray: &Tray) -> (usize, Vec<u8>) {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let used = gather(replies, sent, tray, &mut slices);
        (used, slices[..used].iter().flat_map(|slice| slice.to_vec()).collect())
    }

    #[test]
    fn what_lies_behind_each_other_leaves_as_one_piece_from_any_byte_on() {
        let mut tray = Tray::default();
        let kinds = [true, true, false, true, true, true, false, false];
        let replies: VecDeque<_> = (1..)
            .zip(kinds)
            .map(|(byte, laid)| reply(&mut tray, laid, byte, 100 + usize::from(byte)))
            .collect();
        // A chunk's header, where its data begins, and the data: 20, 8 and as many bytes.
        let all: Vec<u8> = gathered(&replies, 0, &tray).1;
        let mut at = 0;
        for byte in 1..=8_u8 {
            let data = at + 28..at + 128 + usize::from(byte);
            assert_eq!((all[at + 15], &all[data.clone()]), (byte, &vec![byte; data.len()][..]));
            at = data.end;
        }
        assert_eq!((at, replies.iter().map(Reply::len).sum()), (all.len(), all.len()));
        assert_eq!(gathered(&replies, 0, &tray).0, 1 + 2 + 1 + 2 + 2, "slices");
        for sent in 0..replies[0].len() {
            assert_eq!(gathered(&replies, sent, &tray).1, all[sent..]);
        }
        let many: VecDeque<_> = (0..=MAX_SLICES).map(|_| reply(&mut tray, false, 9, 1)).collect();
        assert_eq!(gathered(&many, 0, &tray).0, MAX_SLICES, "no more than there is room for");
    }
}
