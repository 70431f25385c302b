//! Idempotent producers of a partition (KIP-98): the last batches of each, so that a repeated one is answered and
//! not appended again, and a gap is refused. Pure.
//!
//! Per producer id: its epoch and its last five batches, as many as a client may have in flight. A producer that is
//! not known may start at any sequence number: its history may have expired or been deleted with its records.
//! Sequence numbers wrap from `i32::MAX` to 0.
//!
//! Snapshot, as Kafka's `ProducerStateManager` writes `.snapshot` files, big-endian: i16 version = 1 · u32 CRC-32C of
//! what follows · i32 count · per producer: i64 id, i16 epoch, i32 last sequence, i64 last offset, i32 offset delta of
//! the last batch, i64 timestamp, i32 coordinator epoch, i64 first offset of the open transaction (−1). It keeps one
//! batch of each producer; the other four come back when recovery scans what follows the snapshot.
//!
//! Transactions have their place here: open ones per producer, and the aborted ones of a segment. Until then a
//! transactional batch is refused before it gets here.

use crate::batch::{Header, add_sequence};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};

/// Batches remembered per producer.
const REMEMBERED: usize = 5;
/// Version of the snapshot format.
const VERSION: i16 = 1;
/// Bytes of a producer in a snapshot.
const ENTRY: usize = 8 + 2 + 4 + 8 + 4 + 8 + 4 + 8;
/// Bytes before the part that the CRC covers.
const CRC_END: usize = 6;

/// A batch that a producer appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sent {
    last_sequence: i32,
    last_offset: i64,
    offset_delta: i32,
    timestamp: i64,
}

impl Sent {
    fn first_sequence(&self) -> i32 {
        add_sequence(self.last_sequence, -self.offset_delta)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Producer {
    epoch: i16,
    /// Oldest first, never empty, at most [`REMEMBERED`].
    sent: VecDeque<Sent>,
}

/// What the sequence numbers say about a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next one.
    Next,
    /// It was appended before, at these offsets.
    Duplicate {
        /// Offset of its first record.
        base_offset: i64,
        /// Offset of its last record.
        last_offset: i64,
    },
    /// It leaves a gap, or steps back further than is remembered.
    OutOfOrder {
        /// The sequence number that would be the next.
        expected: i32,
    },
    /// A newer producer with the same id has been here.
    Fenced {
        /// The newest epoch.
        current: i16,
    },
}

/// Why snapshot bytes are not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotFault {
    /// Shorter or longer than its count says.
    #[error("its length does not match its count")]
    Length,
    /// Another version.
    #[error("its version is {0}, expected 1")]
    Version(i16),
    /// A wrong checksum.
    #[error("its checksum is wrong")]
    Checksum,
    /// A field that no snapshot has.
    #[error("it holds a producer with impossible fields")]
    Field,
}

/// All producers of a partition. Empty, it takes no memory beyond itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Producers(BTreeMap<i64, Producer>);

impl Producers {
    /// Judges a batch; changes nothing. `before` are earlier batches of the same request, already judged `Next`.
    #[must_use]
    pub fn judge(&self, header: &Header, before: &[Header]) -> Verdict {
        if !header.is_idempotent() {
            return Verdict::Next;
        }
        let sequence = header.base_sequence;
        let earlier = before.iter().rev().find(|earlier| earlier.producer_id == header.producer_id);
        if let Some(earlier) = earlier.filter(|earlier| earlier.producer_epoch == header.producer_epoch) {
            let expected = add_sequence(earlier.last_sequence(), 1);
            return if sequence == expected { Verdict::Next } else { Verdict::OutOfOrder { expected } };
        }
        let Some(producer) = self.0.get(&header.producer_id) else { return Verdict::Next };
        if header.producer_epoch < producer.epoch {
            return Verdict::Fenced { current: producer.epoch };
        }
        if header.producer_epoch > producer.epoch {
            // A new epoch starts over.
            return if sequence == 0 { Verdict::Next } else { Verdict::OutOfOrder { expected: 0 } };
        }
        let same =
            |sent: &&Sent| sent.first_sequence() == sequence && sent.last_sequence == header.last_sequence();
        if let Some(sent) = producer.sent.iter().find(same) {
            let base_offset = sent.last_offset - i64::from(sent.offset_delta);
            return Verdict::Duplicate { base_offset, last_offset: sent.last_offset };
        }
        let expected = producer.sent.back().map_or(0, |sent| add_sequence(sent.last_sequence, 1));
        if sequence == expected { Verdict::Next } else { Verdict::OutOfOrder { expected } }
    }

    /// Takes note of a batch that is in the log. `header` has its final base offset. `now`, in milliseconds, is when:
    /// the records' own timestamps may be years old, and must not make a producer that is at work expire.
    pub fn note(&mut self, header: &Header, now: i64) {
        if !header.is_idempotent() || header.is_control() {
            return;
        }
        let sent = Sent {
            last_sequence: header.last_sequence(),
            last_offset: header.last_offset(),
            offset_delta: header.last_offset_delta,
            timestamp: now,
        };
        let producer = self
            .0
            .entry(header.producer_id)
            .or_insert_with(|| Producer { epoch: header.producer_epoch, sent: VecDeque::with_capacity(1) });
        if producer.epoch != header.producer_epoch {
            producer.epoch = header.producer_epoch;
            producer.sent.clear();
        }
        if producer.sent.len() == REMEMBERED {
            producer.sent.pop_front();
        }
        producer.sent.push_back(sent);
    }

    /// Forgets producers whose last batch came before `oldest`, in milliseconds since the epoch.
    pub fn expire(&mut self, oldest: i64) {
        self.0.retain(|_, producer| producer.sent.back().is_some_and(|sent| sent.timestamp >= oldest));
    }

    /// How many are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes of a snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(CRC_END + 4 + self.0.len() * ENTRY);
        bytes.put_i16(VERSION);
        bytes.put_u32(0);
        bytes.put_i32(self.0.len() as i32);
        for (&id, producer) in &self.0 {
            let Some(last) = producer.sent.back() else { continue };
            bytes.put_i64(id);
            bytes.put_i16(producer.epoch);
            bytes.put_i32(last.last_sequence);
            bytes.put_i64(last.last_offset);
            bytes.put_i32(last.offset_delta);
            bytes.put_i64(last.timestamp);
            bytes.put_i32(-1); // coordinator epoch: no transaction marker was written
            bytes.put_i64(-1); // no open transaction
        }
        let crc = crc32c::crc32c(&bytes[CRC_END..]);
        bytes[2..CRC_END].copy_from_slice(&crc.to_be_bytes());
        bytes.freeze()
    }

    /// Reads a snapshot, checking every field.
    pub fn read_snapshot(mut bytes: &[u8]) -> Result<Self, SnapshotFault> {
        if bytes.len() < CRC_END + 4 {
            return Err(SnapshotFault::Length);
        }
        let version = bytes.get_i16();
        if version != VERSION {
            return Err(SnapshotFault::Version(version));
        }
        let stored = bytes.get_u32();
        if stored != crc32c::crc32c(bytes) {
            return Err(SnapshotFault::Checksum);
        }
        let count = bytes.get_i32();
        if count < 0 || bytes.len() as u64 != count as u64 * ENTRY as u64 {
            return Err(SnapshotFault::Length);
        }
        let mut producers = Self::default();
        for _ in 0..count {
            let (id, epoch) = (bytes.get_i64(), bytes.get_i16());
            let sent = Sent {
                last_sequence: bytes.get_i32(),
                last_offset: bytes.get_i64(),
                offset_delta: bytes.get_i32(),
                timestamp: bytes.get_i64(),
            };
            bytes.advance(4 + 8);
            if id < 0 || epoch < 0 || sent.offset_delta < 0 || sent.last_offset < i64::from(sent.offset_delta)
            {
                return Err(SnapshotFault::Field);
            }
            // Kafka keeps a producer without data as sequence −1; it says nothing that unknown does not.
            if sent.last_sequence >= 0 {
                producers.0.insert(id, Producer { epoch, sent: VecDeque::from([sent]) });
            }
        }
        Ok(producers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(id: i64, epoch: i16, sequence: i32, records: i32, offset: i64) -> Header {
        Header {
            base_offset: offset,
            size: 100,
            leader_epoch: 0,
            crc: 0,
            attributes: 0,
            last_offset_delta: records - 1,
            base_timestamp: offset,
            max_timestamp: offset,
            producer_id: id,
            producer_epoch: epoch,
            base_sequence: sequence,
            count: records,
        }
    }

    #[test]
    fn sequences_duplicates_gaps_and_epochs() {
        let mut producers = Producers::default();
        let judge = |producers: &Producers, header| producers.judge(&header, &[]);
        assert_eq!(judge(&producers, batch(7, 0, 42, 3, 0)), Verdict::Next, "unknown: any start");
        for at in 0..6 {
            let next = batch(7, 0, at * 10, 10, i64::from(at) * 10);
            assert_eq!(judge(&producers, next), Verdict::Next);
            producers.note(&next, 0);
        }
        assert_eq!(
            judge(&producers, batch(7, 0, 50, 10, 0)),
            Verdict::Duplicate { base_offset: 50, last_offset: 59 }
        );
        assert_eq!(
            judge(&producers, batch(7, 0, 10, 10, 0)),
            Verdict::Duplicate { base_offset: 10, last_offset: 19 }
        );
        let expected = 60;
        assert_eq!(judge(&producers, batch(7, 0, 0, 10, 0)), Verdict::OutOfOrder { expected }, "a sixth");
        assert_eq!(judge(&producers, batch(7, 0, 70, 10, 0)), Verdict::OutOfOrder { expected });
        assert_eq!(judge(&producers, batch(7, 0, 50, 5, 0)), Verdict::OutOfOrder { expected });
        assert_eq!(judge(&producers, batch(7, 1, 60, 1, 0)), Verdict::OutOfOrder { expected: 0 });
        assert_eq!(judge(&producers, batch(7, 1, 0, 1, 0)), Verdict::Next);
        producers.note(&batch(7, 1, 0, 1, 60), 0);
        assert_eq!(judge(&producers, batch(7, 0, 60, 1, 0)), Verdict::Fenced { current: 1 });
        assert_eq!(judge(&producers, batch(-1, -1, -1, 1, 0)), Verdict::Next);
    }

    #[test]
    fn sequences_wrap() {
        let mut producers = Producers::default();
        let last = batch(1, 0, i32::MAX - 1, 3, 0);
        assert_eq!(last.last_sequence(), 0);
        producers.note(&last, 0);
        assert_eq!(producers.judge(&batch(1, 0, 1, 1, 0), &[]), Verdict::Next);
        assert_eq!(producers.judge(&last, &[]), Verdict::Duplicate { base_offset: 0, last_offset: 2 });
    }

    #[test]
    fn batches_of_one_request_follow_each_other() {
        let producers = Producers::default();
        let first = batch(1, 0, 0, 5, 0);
        assert_eq!(producers.judge(&batch(1, 0, 5, 1, 0), &[first]), Verdict::Next);
        assert_eq!(producers.judge(&batch(1, 0, 6, 1, 0), &[first]), Verdict::OutOfOrder { expected: 5 });
    }

    #[test]
    fn expiry_goes_by_the_last_batch() {
        let mut producers = Producers::default();
        producers.note(&batch(1, 0, 0, 1, 0), 100);
        producers.note(&batch(2, 0, 0, 1, 0), 200);
        producers.expire(150);
        assert_eq!(producers.len(), 1);
        assert_eq!(producers.judge(&batch(1, 0, 9, 1, 0), &[]), Verdict::Next);
    }

    proptest! {
        #[test]
        fn snapshots_round_trip_and_any_damage_is_seen(ids in prop::collection::btree_set(0i64..1000, 0..20), at in 0usize..500, bit in 0u8..8) {
            let mut producers = Producers::default();
            for id in ids {
                producers.note(&batch(id, (id % 7) as i16, (id * 3) as i32, 4, id * 10), id);
            }
            let bytes = producers.snapshot();
            prop_assert_eq!(Producers::read_snapshot(&bytes).unwrap(), producers);
            let mut bad = bytes.to_vec();
            let at = at % bad.len();
            bad[at] ^= 1 << bit;
            prop_assert!(Producers::read_snapshot(&bad).is_err());
            prop_assert!(Producers::read_snapshot(&bytes[..at]).is_err());
        }
    }
}
