//! The sparse indexes of a segment: offset → position, and timestamp → offset. Pure, and derived: whatever is wrong
//! with a stored index, it is rebuilt from the log.
//!
//! Bytes, big-endian, as Kafka's `OffsetIndex` and `TimeIndex` write them:
//!
//! ```text
//! .index      entry 8 bytes:  i32 offset of a batch's last record, less the segment's base · i32 position of that batch
//! .timeindex  entry 12 bytes: i64 largest timestamp so far · i32 last offset of the batch that holds it, less the base
//! ```
//!
//! Invariants: offsets, positions and timestamps each rise strictly from entry to entry; every position is below the
//! segment's size. [`Index::decode`] refuses bytes that break them.
//!
//! Memory: 20 bytes for every `index.interval.bytes` of log at most.

use crate::batch::Header;
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes of an offset index entry.
pub const OFFSET_ENTRY: usize = 8;
/// Bytes of a time index entry.
pub const TIME_ENTRY: usize = 12;

/// A batch's place, by the offset of its last record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct OffsetEntry {
    relative: u32,
    position: u32,
}

/// The largest timestamp up to a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TimeEntry {
    timestamp: i64,
    relative: u32,
}

/// Why stored index bytes are not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IndexFault {
    /// Not a whole number of entries.
    #[error("its length is not a whole number of entries")]
    Length,
    /// Entries that do not rise.
    #[error("its entries do not rise")]
    Order,
    /// An entry that points past the end of the segment.
    #[error("an entry points past the end of its segment")]
    Bounds,
}

/// Both indexes of one segment, and what is needed to go on writing them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    base: i64,
    offsets: Vec<OffsetEntry>,
    times: Vec<TimeEntry>,
    /// Bytes of log since the last offset entry.
    since_entry: u64,
    /// Largest timestamp so far, and the last offset of the batch that has it.
    largest: Option<(i64, i64)>,
}

impl Index {
    /// The index of an empty segment.
    #[must_use]
    pub fn new(base: i64) -> Self {
        Self { base, offsets: Vec::new(), times: Vec::new(), since_entry: 0, largest: None }
    }

    /// Takes note of a batch that was appended at `position`.
    pub fn add(&mut self, header: &Header, position: u64, interval: u64) {
        let last = header.last_offset();
        if self.largest.is_none_or(|(timestamp, _)| header.max_timestamp > timestamp) {
            self.largest = Some((header.max_timestamp, last));
        }
        if self.since_entry > interval {
            // Both fit 32 bits: a segment is rolled before either could not.
            let (relative, position) = ((last - self.base) as u32, position as u32);
            self.offsets.push(OffsetEntry { relative, position });
            self.note_time();
            self.since_entry = 0;
        }
        self.since_entry += u64::from(header.size);
    }

    /// Closes the time index with the segment's largest timestamp, as a roll and a clean stop do.
    pub fn finish(&mut self) {
        self.note_time();
    }

    fn note_time(&mut self) {
        let Some((timestamp, offset)) = self.largest else { return };
        let relative = (offset - self.base) as u32;
        let rises =
            self.times.last().is_none_or(|last| timestamp > last.timestamp && relative > last.relative);
        if timestamp >= 0 && rises {
            self.times.push(TimeEntry { timestamp, relative });
        }
    }

    /// Position from which a scan for `offset` starts: no batch before it holds `offset` or a later one.
    #[must_use]
    pub fn floor(&self, offset: i64) -> u64 {
        let relative = offset.saturating_sub(self.base);
        let after = self.offsets.partition_point(|entry| i64::from(entry.relative) <= relative);
        after.checked_sub(1).map_or(0, |at| u64::from(self.offsets[at].position))
    }

    /// The last known batch boundary at or before `position`.
    #[must_use]
    pub fn boundary(&self, position: u64) -> u64 {
        let after = self.offsets.partition_point(|entry| u64::from(entry.position) <= position);
        after.checked_sub(1).map_or(0, |at| u64::from(self.offsets[at].position))
    }

    /// The first known batch at or after `position`, as (its position, its last offset).
    #[must_use]
    pub fn ceiling(&self, position: u64) -> Option<(u64, i64)> {
        let before = self.offsets.partition_point(|entry| u64::from(entry.position) < position);
        let entry = self.offsets.get(before)?;
        Some((u64::from(entry.position), self.base + i64::from(entry.relative)))
    }

    /// Position from which a scan for the first record with a timestamp of at least `timestamp` starts.
    #[must_use]
    pub fn floor_time(&self, timestamp: i64) -> u64 {
        // Records up to an entry's offset are not later than its timestamp; those of an equal one may be the first.
        let after = self.times.partition_point(|entry| entry.timestamp <= timestamp);
        after.checked_sub(1).map_or(0, |at| self.floor(self.base + i64::from(self.times[at].relative)))
    }

    /// Largest timestamp so far, with the last offset of the batch that has it.
    #[must_use]
    pub fn largest_timestamp(&self) -> Option<(i64, i64)> {
        self.largest
    }

    /// Whether an offset index of `limit` bytes has no room for another entry.
    #[must_use]
    pub fn is_full(&self, limit: u64) -> bool {
        ((self.offsets.len() + 1) * OFFSET_ENTRY) as u64 > limit
            || ((self.times.len() + 1) * TIME_ENTRY) as u64 > limit
    }

    /// Bytes of memory it holds, for the budget of the cache.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.offsets.capacity() * size_of::<OffsetEntry>() + self.times.capacity() * size_of::<TimeEntry>()
    }

    /// The bytes of `.index` and `.timeindex`.
    #[must_use]
    pub fn encode(&self) -> (Bytes, Bytes) {
        let mut offsets = BytesMut::with_capacity(self.offsets.len() * OFFSET_ENTRY);
        for entry in &self.offsets {
            offsets.put_u32(entry.relative);
            offsets.put_u32(entry.position);
        }
        let mut times = BytesMut::with_capacity(self.times.len() * TIME_ENTRY);
        for entry in &self.times {
            times.put_i64(entry.timestamp);
            times.put_u32(entry.relative);
        }
        (offsets.freeze(), times.freeze())
    }

    /// Reads stored indexes of a segment of `size` bytes whose next offset is `next`, and checks all that can be
    /// checked without the log. An index so read can be looked up; to go on writing it, [`Index::resume`] it.
    pub fn decode(
        base: i64,
        mut offsets: &[u8],
        mut times: &[u8],
        size: u64,
        next: i64,
    ) -> Result<Self, IndexFault> {
        if !offsets.len().is_multiple_of(OFFSET_ENTRY) || !times.len().is_multiple_of(TIME_ENTRY) {
            return Err(IndexFault::Length);
        }
        let mut index = Self::new(base);
        index.offsets.reserve_exact(offsets.len() / OFFSET_ENTRY);
        index.times.reserve_exact(times.len() / TIME_ENTRY);
        while !offsets.is_empty() {
            let entry = OffsetEntry { relative: offsets.get_u32(), position: offsets.get_u32() };
            let rises = |last: &OffsetEntry| entry.relative > last.relative && entry.position > last.position;
            if !index.offsets.last().is_none_or(rises) {
                return Err(IndexFault::Order);
            }
            if u64::from(entry.position) >= size || i64::from(entry.relative) >= next - base {
                return Err(IndexFault::Bounds);
            }
            index.offsets.push(entry);
        }
        while !times.is_empty() {
            let entry = TimeEntry { timestamp: times.get_i64(), relative: times.get_u32() };
            let rises = |last: &TimeEntry| entry.timestamp > last.timestamp && entry.relative > last.relative;
            if entry.timestamp < 0 || !index.times.last().is_none_or(rises) {
                return Err(IndexFault::Order);
            }
            if i64::from(entry.relative) >= next - base {
                return Err(IndexFault::Bounds);
            }
            index.times.push(entry);
        }
        index.largest = index.times.last().map(|entry| (entry.timestamp, base + i64::from(entry.relative)));
        Ok(index)
    }

    /// Makes a decoded index of a segment of `size` bytes ready for more batches.
    pub fn resume(&mut self, size: u64) {
        let from = self.offsets.last().map_or(0, |entry| u64::from(entry.position));
        self.since_entry = size.saturating_sub(from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(base_offset: i64, records: i32, size: u32, max_timestamp: i64) -> Header {
        Header {
            base_offset,
            size,
            leader_epoch: 0,
            crc: 0,
            attributes: 0,
            last_offset_delta: records - 1,
            base_timestamp: max_timestamp,
            max_timestamp,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            count: records,
        }
    }

    proptest! {
        /// Floors never skip the batch looked for, and lie within an interval and a batch of it.
        #[test]
        fn floors_find_every_batch(
            batches in prop::collection::vec((1i32..50, 61u32..9000, 0i64..1000), 1..200),
            base in 0i64..1_000_000,
        ) {
            let mut index = Index::new(base);
            let (mut offset, mut position, mut placed) = (base, 0u64, Vec::new());
            for (records, size, timestamp) in batches {
                let header = header(offset, records, size, timestamp);
                index.add(&header, position, 4096);
                placed.push((header, position));
                offset = header.next_offset();
                position += u64::from(size);
            }
            index.finish();
            for (header, at) in &placed {
                for wanted in [header.base_offset, header.last_offset()] {
                    let floor = index.floor(wanted);
                    prop_assert!(floor <= *at);
                    prop_assert!(at - floor <= 4096 + 2 * 9000);
                }
                prop_assert!(index.boundary(*at + 1) <= *at);
            }
            for wanted in 0..1000 {
                if let Some((_, at)) = placed.iter().find(|(header, _)| header.max_timestamp >= wanted) {
                    prop_assert!(index.floor_time(wanted) <= *at);
                }
            }
            let (offsets, times) = index.encode();
            let mut read = Index::decode(base, &offsets, &times, position, offset).unwrap();
            read.resume(position);
            prop_assert_eq!(&read.offsets, &index.offsets);
            prop_assert_eq!(&read.times, &index.times);
            let largest = placed.iter().map(|(header, _)| header.max_timestamp).max();
            prop_assert_eq!(read.largest_timestamp().map(|(timestamp, _)| timestamp), largest);
        }

        #[test]
        fn any_bytes_decode_or_are_refused(
            offsets in prop::collection::vec(any::<u8>(), 0..64),
            times in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let read = Index::decode(7, &offsets, &times, 1000, 100);
            if let Ok(index) = read {
                prop_assert!(index.floor(i64::MAX) < 1000 && index.floor_time(i64::MAX) < 1000);
                prop_assert!(index.floor(i64::MIN) < 1000);
            }
        }
    }

    #[test]
    fn wrong_indexes_are_refused() {
        let entry = |relative: u32, position: u32| [relative.to_be_bytes(), position.to_be_bytes()].concat();
        let decode = |bytes: &[u8]| Index::decode(0, bytes, &[], 100, 10);
        assert_eq!(decode(&entry(1, 10)[..7]), Err(IndexFault::Length));
        assert_eq!(decode(&[entry(5, 10), entry(5, 20)].concat()), Err(IndexFault::Order));
        assert_eq!(decode(&entry(1, 100)), Err(IndexFault::Bounds));
        assert_eq!(decode(&entry(10, 10)), Err(IndexFault::Bounds));
    }
}
