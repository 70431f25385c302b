//! Transactions of a log (KIP-98): the aborted ones, which `read_committed` consumers skip, and how far all is decided.
//! Pure.
//!
//! An aborted transaction is kept with the segment that holds its marker. Bytes of a `.txnindex` file, as Kafka's
//! `TransactionIndex` writes them, big-endian, 34 an entry:
//!
//! ```text
//! i16 version = 0 · i64 producer id · i64 first offset · i64 last offset (the marker's) · i64 last stable offset then
//! ```
//!
//! Invariants of a list: each marker lies in the segment, markers rise strictly, and a transaction begins before its
//! marker. [`decode`] refuses bytes that break them. They have no checksum: whoever stores them keeps one elsewhere.

use crate::batch::Outcome;
use crate::producers::Ended;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::VecDeque;

/// Bytes of an entry.
const ENTRY: usize = 2 + 4 * 8;
/// Version of an entry.
const VERSION: i16 = 0;

/// A transaction that was aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aborted {
    /// Whose.
    pub producer_id: i64,
    /// Offset of its first record.
    pub first_offset: i64,
    /// Offset of its marker.
    pub last_offset: i64,
    /// The last stable offset once it was aborted: no transaction that began before it is listed after this one.
    pub last_stable: i64,
}

impl Aborted {
    /// A transaction that has ended, if it was aborted.
    #[must_use]
    pub fn from_ended(ended: Ended) -> Option<Self> {
        let Ended { producer_id, first_offset, last_offset, last_stable, outcome } = ended;
        (outcome == Outcome::Abort).then_some(Self { producer_id, first_offset, last_offset, last_stable })
    }
}

/// Why stored bytes are not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TxnIndexFault {
    /// Not a whole number of entries.
    #[error("its length is not a whole number of entries")]
    Length,
    /// Another version.
    #[error("it has an entry of version {0}, expected 0")]
    Version(i16),
    /// Markers that do not rise, or lie outside the segment; fields that contradict each other.
    #[error("it has an entry that no transaction of its segment has")]
    Entry,
}

/// The bytes of a `.txnindex`.
#[must_use]
pub fn encode(list: &[Aborted]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(list.len() * ENTRY);
    for Aborted { producer_id, first_offset, last_offset, last_stable } in list {
        bytes.put_i16(VERSION);
        bytes.put_i64(*producer_id);
        bytes.put_i64(*first_offset);
        bytes.put_i64(*last_offset);
        bytes.put_i64(*last_stable);
    }
    bytes.freeze()
}

/// Reads the `.txnindex` of a segment whose offsets are `base..end`.
pub fn decode(mut bytes: &[u8], base: i64, end: i64) -> Result<Vec<Aborted>, TxnIndexFault> {
    if !bytes.len().is_multiple_of(ENTRY) {
        return Err(TxnIndexFault::Length);
    }
    let mut list = Vec::with_capacity(bytes.len() / ENTRY);
    let mut least = base;
    while !bytes.is_empty() {
        let version = bytes.get_i16();
        if version != VERSION {
            return Err(TxnIndexFault::Version(version));
        }
        let [producer_id, first_offset, last_offset, last_stable] = [(); 4].map(|()| bytes.get_i64());
        let begins = (0..last_offset).contains(&first_offset);
        let stable = (0..=last_offset.saturating_add(1)).contains(&last_stable);
        if producer_id < 0 || !begins || !stable || !(least..end).contains(&last_offset) {
            return Err(TxnIndexFault::Entry);
        }
        least = last_offset + 1;
        list.push(Aborted { producer_id, first_offset, last_offset, last_stable });
    }
    Ok(list)
}

/// Adds to `found` those of a segment's aborted transactions that overlap `from..upper`. Whether later segments can
/// have no more of them.
pub fn collect(list: &[Aborted], from: i64, upper: i64, found: &mut Vec<Aborted>) -> bool {
    let first = list.partition_point(|aborted| aborted.last_offset < from);
    for aborted in &list[first..] {
        if aborted.first_offset < upper {
            found.push(*aborted);
        }
        if aborted.last_stable >= upper {
            return true;
        }
    }
    false
}

/// What keeps the last stable offset from being the high watermark. An idle one takes no memory beyond itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stability {
    /// First offset of the oldest open transaction.
    first_open: Option<i64>,
    /// Ended transactions whose marker is not below the high watermark yet, as (first offset, marker's offset).
    unseen: VecDeque<(i64, i64)>,
}

impl Stability {
    /// With this oldest open transaction, all else being visible.
    pub(crate) fn new(first_open: Option<i64>) -> Self {
        Self { first_open, unseen: VecDeque::new() }
    }

    /// Takes note of the oldest open transaction.
    pub(crate) fn set_first_open(&mut self, first_open: Option<i64>) {
        self.first_open = first_open;
    }

    /// Takes note of a transaction that has ended, whose marker may not be visible yet.
    pub(crate) fn ended(&mut self, first_offset: i64, marker: i64) {
        self.unseen.push_back((first_offset, marker));
    }

    /// Forgets what is decided for all to see.
    pub(crate) fn advance(&mut self, high_watermark: i64) {
        if !self.unseen.is_empty() {
            self.unseen.retain(|&(_, marker)| marker >= high_watermark);
        }
    }

    /// Everything below is decided, as far as `high_watermark` goes.
    pub(crate) fn last_stable(&self, high_watermark: i64) -> i64 {
        let unseen = self.unseen.iter().map(|&(first, _)| first).min();
        self.first_open.into_iter().chain(unseen).fold(high_watermark, i64::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn aborted(first_offset: i64, last_offset: i64, last_stable: i64) -> Aborted {
        Aborted { producer_id: first_offset % 7, first_offset, last_offset, last_stable }
    }

    #[test]
    fn entries_are_kafkas_bytes() {
        let entry = Aborted { producer_id: 1, first_offset: 2, last_offset: 0x0304, last_stable: 5 };
        let bytes = encode(&[entry]);
        let mut expected = vec![0; 34];
        (expected[9], expected[17], expected[24], expected[25], expected[33]) = (1, 2, 3, 4, 5);
        assert_eq!(bytes, expected);
        assert_eq!(decode(&bytes, 0, 0x0305), Ok(vec![entry]));
    }

    #[test]
    fn bytes_of_another_segment_or_with_impossible_fields_are_refused() {
        let list = [aborted(5, 20, 15), aborted(15, 30, 31)];
        let bytes = encode(&list);
        assert_eq!(decode(&bytes, 10, 31), Ok(list.to_vec()));
        for (base, end) in [(21, 40), (0, 30), (40, 90), (0, 0)] {
            assert_eq!(decode(&bytes, base, end), Err(TxnIndexFault::Entry), "{base}..{end}");
        }
        for cut in 1..34 {
            assert_eq!(decode(&bytes[..cut], 10, 31), Err(TxnIndexFault::Length));
        }
        let swapped = encode(&[list[1], list[0]]);
        assert_eq!(decode(&swapped, 10, 31), Err(TxnIndexFault::Entry));
        for wrong in [
            aborted(20, 20, 5),
            aborted(5, 20, 22),
            Aborted { producer_id: -1, ..list[0] },
            aborted(-1, 20, 5),
            aborted(5, 20, -1),
        ] {
            assert_eq!(decode(&encode(&[wrong]), 10, 31), Err(TxnIndexFault::Entry), "{wrong:?}");
        }
        let mut version = bytes.to_vec();
        version[1] = 1;
        assert_eq!(decode(&version, 10, 31), Err(TxnIndexFault::Version(1)));
    }

    #[test]
    fn a_search_ends_where_nothing_older_can_follow() {
        let list = [aborted(5, 20, 15), aborted(15, 30, 31), aborted(32, 40, 41)];
        let search = |from, upper| {
            let mut found = Vec::new();
            let done = collect(&list, from, upper, &mut found);
            (found, done)
        };
        assert_eq!(search(0, 10), (vec![list[0]], true));
        assert_eq!(search(0, 20), (vec![list[0], list[1]], true), "the second began before the first ended");
        assert_eq!(search(21, 33), (vec![list[1], list[2]], true));
        assert_eq!(search(31, 32), (vec![], true));
        assert_eq!(search(31, 90), (vec![list[2]], false), "a later segment may hold more");
        assert_eq!(search(41, 90), (vec![], false));
    }

    #[test]
    fn an_ended_transaction_is_unstable_until_its_marker_is_visible() {
        let mut stability = Stability::new(Some(10));
        assert_eq!(stability.last_stable(50), 10);
        assert_eq!(stability.last_stable(5), 5);
        stability.set_first_open(Some(30));
        stability.ended(10, 60);
        assert_eq!(stability.last_stable(60), 10);
        stability.advance(60);
        assert_eq!(stability.last_stable(60), 10, "the marker at 60 is not below 60");
        stability.advance(61);
        assert_eq!(stability.last_stable(61), 30);
        stability.set_first_open(None);
        assert_eq!(stability.last_stable(61), 61);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), base: i64, end: i64) {
            let _any = decode(&bytes, base, end);
        }
    }
}
