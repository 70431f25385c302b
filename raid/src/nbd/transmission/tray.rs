//! Where the data of small reads lies from the device to the socket: side by side in memory that a connection keeps, which
//! stays in the processor's cache and is neither taken, nor cleared, nor given back for each.
//!
//! Invariants: what was laid down stays as it is until its reply has been sent or dropped. Room is used from the start
//! again only when nothing lies there.

use std::ops::Range;

/// Bytes of a tray: as many as small requests in flight have of their own.
const BYTES: usize = super::PRIVATE_BYTES as usize;

/// A connection's tray. It takes no memory before the first small read.
#[derive(Default)]
pub(super) struct Tray {
    bytes: Vec<u8>,
    used: usize,
    /// Replies whose data lies there.
    replies: usize,
}

/// Where a reply's data lies. It is given back by [`Tray::take_away`].
#[derive(Debug)]
pub(super) struct Laid(Range<usize>);

impl Laid {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Tray {
    /// Whether there is room for so many bytes.
    pub(super) fn has_room(&self, len: usize) -> bool {
        len <= BYTES - self.used
    }

    /// Has `fill` write `len` bytes; `None` if there is no room for them, or it could not.
    pub(super) fn lay(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> bool) -> Option<Laid> {
        if self.bytes.is_empty() {
            self.bytes = vec![0; BYTES];
        }
        let place = self.used..self.used + len;
        if !fill(self.bytes.get_mut(place.clone())?) {
            return None;
        }
        self.used = place.end;
        self.replies += 1;
        Some(Laid(place))
    }

    /// What lies there.
    pub(super) fn bytes(&self, laid: &Laid) -> &[u8] {
        &self.bytes[laid.0.clone()]
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
        let mut tray = Tray::default();
        let lay = |tray: &mut Tray, len, byte: u8| {
            let has_room = tray.has_room(len);
            let laid = tray.lay(len, |room| {
                room.fill(byte);
                true
            });
            assert_eq!(laid.is_some(), has_room);
            laid
        };
        let first = lay(&mut tray, BYTES / 2, 1).unwrap();
        assert!(tray.lay(8, |_| false).is_none());
        let second = lay(&mut tray, BYTES / 2, 2).unwrap();
        assert!(lay(&mut tray, 1, 3).is_none(), "it is full");
        assert!(tray.bytes(&first).iter().all(|&byte| byte == 1) && first.len() == BYTES / 2);
        tray.take_away(first);
        assert!(lay(&mut tray, 1, 3).is_none(), "something lies there");
        assert!(tray.bytes(&second).iter().all(|&byte| byte == 2));
        tray.take_away(second);
        assert!(lay(&mut tray, BYTES, 4).is_some() && lay(&mut tray, 0, 4).is_some());
    }
}
