//! Where the replies to small reads lie, header and data, from the device to the socket: side by side in memory that a
//! connection keeps, which stays in the processor's cache and is neither taken, nor cleared, nor given back for each.
//! Replies that lie behind each other leave as one piece: to copy two for each costs the kernel a tenth more.
//!
//! Invariants: what was laid down stays as it is until it has been sent or dropped. Room is used from the start
//! again only when nothing lies there.

use super::memory::{MIN_CHARGE, PRIVATE_BYTES};
use super::reply::HEAD;
use std::ops::Range;

/// Bytes of a tray: the data of as many small requests in flight as have memory of their own, and their headers.
const BYTES: usize = PRIVATE_BYTES as usize + (PRIVATE_BYTES / MIN_CHARGE) as usize * HEAD;

/// A connection's tray. It takes no memory before the first small read.
#[derive(Default)]
pub(super) struct Tray {
    bytes: Vec<u8>,
    used: usize,
    /// Replies that lie there.
    replies: usize,
}

/// Where a reply lies. It is given back by [`Tray::take_away`].
#[derive(Debug)]
pub(super) struct Laid(Range<usize>);

impl Laid {
    /// Bytes it has.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Where it lies.
    pub(super) fn place(&self) -> Range<usize> {
        self.0.clone()
    }
}

impl Tray {
    /// Whether there is room for so many bytes behind a header.
    pub(super) fn has_room(&self, len: usize) -> bool {
        HEAD + len <= BYTES - self.used
    }

    /// Has `fill` write `len` bytes behind `head`; `None` if there is no room for them, or it could not.
    pub(super) fn lay(
        &mut self,
        head: &[u8],
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> Option<Laid> {
        if self.bytes.is_empty() {
            self.bytes = vec![0; BYTES];
        }
        let place = self.used..self.used + head.len() + len;
        let (before, data) = self.bytes.get_mut(place.clone())?.split_at_mut(head.len());
        if !fill(data) {
            return None;
        }
        before.copy_from_slice(head);
        self.used = place.end;
        self.replies += 1;
        Some(Laid(place))
    }

    /// What lies there, of one reply or several behind each other.
    pub(super) fn bytes(&self, place: Range<usize>) -> &[u8] {
        &self.bytes[place]
    }

    /// A reply has been sent, or will not be.
    pub(super) fn take_away(&mut self, _: Laid) {
        self.replies -= 1;
        if self.replies == 0 {
            self.used = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_there_stays_until_it_is_taken_away() {
        const LEN: usize = BYTES / 2 - HEAD;
        let mut tray = Tray::default();
        let lay = |tray: &mut Tray, len, byte: u8| {
            let has_room = tray.has_room(len);
            let laid = tray.lay(&[byte; HEAD], len, |room| {
                room.fill(byte);
                true
            });
            assert_eq!(laid.is_some(), has_room);
            laid
        };
        let first = lay(&mut tray, LEN, 1).unwrap();
        assert!(tray.lay(&[9; HEAD], 8, |_| false).is_none());
        let second = lay(&mut tray, LEN, 2).unwrap();
        assert!(lay(&mut tray, 1, 3).is_none(), "it is full");
        let (ones, twos) = (vec![1; HEAD + LEN], vec![2; HEAD + LEN]);
        assert_eq!((tray.bytes(first.place()), first.len()), (&ones[..], HEAD + LEN));
        let both = tray.bytes(first.place().start..second.place().end);
        assert_eq!(both, [&ones[..], &twos].concat());
        tray.take_away(first);
        assert!(lay(&mut tray, 1, 3).is_none(), "something lies there");
        assert_eq!(tray.bytes(second.place()), twos);
        tray.take_away(second);
        assert!(lay(&mut tray, BYTES - HEAD, 4).is_some());
    }
}
