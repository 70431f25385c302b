//! Producers of a partition (KIP-98): the last batches of each, so that a repeated one is answered and not appended
//! again, and a gap is refused; and the transaction that each has open. Pure.
//!
//! Per producer id: its epoch, its last five batches, as many as a client may have in flight, the first offset of its
//! open transaction, and the epoch of the coordinator that ended the one before. A producer that is not known may start
//! at any sequence number: its history may have expired or been deleted with its records. Sequence numbers wrap from
//! `i32::MAX` to 0. A marker with a newer producer epoch fences the older one, and sequences start over: the producer is
//! then known without any batch.
//!
//! Snapshot, as Kafka's `ProducerStateManager` writes `.snapshot` files, big-endian: i16 version = 1 · u32 CRC-32C of
//! what follows · i32 count · per producer: i64 id, i16 epoch, i32 last sequence, i64 last offset, i32 offset delta of
//! the last batch, i64 timestamp, i32 coordinator epoch (−1: none), i64 first offset of the open transaction (−1: none).
//! One without batches has −1, −1 and 0. It keeps one batch of each producer; the other four come back when recovery
//! scans what follows the snapshot.
//!
//! Invariant: `open` has exactly the transactions of the producers that have one, by first offset.

use crate::batch::{Header, Marker, Origin, Outcome, add_sequence};
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
    /// −1 in a coordinator's batch.
    last_sequence: i32,
    last_offset: i64,
    offset_delta: i32,
}

impl Sent {
    fn base_offset(&self) -> i64 {
        self.last_offset - i64::from(self.offset_delta)
    }

    /// Whether `header` is this batch once more.
    fn is(&self, header: &Header) -> bool {
        self.last_sequence >= 0
            && self.last_sequence == header.last_sequence()
            && add_sequence(self.last_sequence, -self.offset_delta) == header.base_sequence
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Producer {
    epoch: i16,
    /// −1: no marker was written.
    coordinator_epoch: i32,
    /// When it was last heard of, in milliseconds.
    timestamp: i64,
    /// First offset of its open transaction.
    open: Option<i64>,
    /// Oldest first, at most [`REMEMBERED`], all of this epoch.
    sent: VecDeque<Sent>,
}

impl Producer {
    fn new(epoch: i16) -> Self {
        Self { epoch, coordinator_epoch: -1, timestamp: -1, open: None, sent: VecDeque::new() }
    }

    /// The sequence number that follows; a producer without batches starts at 0.
    fn expected(&self) -> i32 {
        self.sent.back().map_or(0, |sent| add_sequence(sent.last_sequence, 1))
    }

    fn judge(&self, header: &Header, origin: Origin) -> Result<Verdict, Refusal> {
        let (epoch, sequence) = (header.producer_epoch, header.base_sequence);
        if origin == Origin::Client
            && epoch == self.epoch
            && let Some(sent) = self.sent.iter().find(|sent| sent.is(header))
        {
            return Ok(Verdict::Duplicate { base_offset: sent.base_offset(), last_offset: sent.last_offset });
        }
        if epoch < self.epoch {
            return Err(Refusal::Fenced { current: self.epoch });
        }
        // A new epoch starts over.
        let expected = if epoch > self.epoch { 0 } else { self.expected() };
        if origin == Origin::Client && sequence != expected {
            return Err(Refusal::OutOfOrder { expected });
        }
        match self.open {
            Some(first_offset) if !header.is_transactional() => Err(Refusal::InTransaction { first_offset }),
            _ => Ok(Verdict::Next),
        }
    }

    fn enter(&mut self, epoch: i16, now: i64) {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.sent.clear();
        }
        self.timestamp = now;
    }

    /// Takes note of a batch; whether it opens a transaction.
    fn sent(&mut self, header: &Header, now: i64) -> bool {
        self.enter(header.producer_epoch, now);
        if self.sent.len() == REMEMBERED {
            self.sent.pop_front();
        }
        self.sent.push_back(Sent {
            last_sequence: header.last_sequence(),
            last_offset: header.last_offset(),
            offset_delta: header.last_offset_delta,
        });
        let opens = header.is_transactional() && self.open.is_none();
        if opens {
            self.open = Some(header.base_offset);
        }
        opens
    }
}

/// What is to be done with a request's batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// They come next: append them.
    Next,
    /// They were appended before, at these offsets.
    Duplicate {
        /// Offset of the first record.
        base_offset: i64,
        /// Offset of the last record.
        last_offset: i64,
    },
}

/// Why a batch or a marker must not be appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
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
    /// It is not transactional, and its producer has a transaction open.
    InTransaction {
        /// Where that begins.
        first_offset: i64,
    },
    /// A newer coordinator has ended a transaction of this producer.
    FencedCoordinator {
        /// The newest coordinator epoch.
        current: i32,
    },
}

/// A transaction that a marker has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Whose.
    pub producer_id: i64,
    /// Offset of its first record.
    pub first_offset: i64,
    /// Offset of its marker.
    pub last_offset: i64,
    /// Everything below is decided now.
    pub last_stable: i64,
    /// How it ended.
    pub outcome: Outcome,
}

/// What is known of a producer, for those who ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerState {
    /// Its id.
    pub id: i64,
    /// Its newest epoch.
    pub epoch: i16,
    /// Last sequence number; −1 for none.
    pub last_sequence: i32,
    /// Offset of its last record; −1 for none.
    pub last_offset: i64,
    /// When it was last heard of, in milliseconds since the epoch.
    pub last_timestamp: i64,
    /// Epoch of the coordinator that wrote its last marker; −1 for none.
    pub coordinator_epoch: i32,
    /// First offset of its open transaction.
    pub open_from: Option<i64>,
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
    /// Offsets at or behind the end of the log it is of.
    #[error("it speaks of offsets that its log does not have")]
    Offset,
    /// It says that a transaction is open, and the log does not.
    #[error(
        "it says that producer {producer_id} opened a transaction at {offset}, where the log has no such batch"
    )]
    Transaction {
        /// The producer.
        producer_id: i64,
        /// The claimed first offset.
        offset: i64,
    },
    /// It knows of another oldest open transaction than the catalog.
    #[error("its oldest open transaction is not the one that was noted at the stop")]
    Unstable,
}

/// All producers of a partition. Empty, it takes no memory beyond itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Producers {
    known: BTreeMap<i64, Producer>,
    /// First offset of each open transaction, and whose it is.
    open: BTreeMap<i64, i64>,
}

impl Producers {
    /// Judges the batches of one request, in order; changes nothing. The error has the place of the batch that is
    /// refused.
    pub fn judge(&self, headers: &[Header], origin: Origin) -> Result<Verdict, (usize, Refusal)> {
        let mut earlier: BTreeMap<i64, Producer> = BTreeMap::new();
        let (mut first, mut repeated, mut fresh) = (None, None, false);
        for (at, header) in headers.iter().enumerate() {
            let (id, mut verdict) = (header.producer_id, Verdict::Next);
            if header.is_idempotent() {
                let known = earlier.get(&id).or_else(|| self.known.get(&id));
                verdict =
                    known.map_or(Ok(verdict), |known| known.judge(header, origin)).map_err(|r| (at, r))?;
            }
            match verdict {
                Verdict::Next => {
                    fresh = true;
                    if header.is_idempotent() && headers.len() > 1 {
                        let known = || self.known.get(&id).cloned();
                        let known = || known().unwrap_or_else(|| Producer::new(header.producer_epoch));
                        earlier.entry(id).or_insert_with(known).sent(header, 0);
                    }
                }
                Verdict::Duplicate { base_offset, last_offset } => {
                    first.get_or_insert((at, base_offset));
                    repeated = Some(last_offset);
                }
            }
        }
        match (first, repeated) {
            // What is new in the request must not be answered as if it had been appended.
            (Some((at, _)), _) if fresh => {
                let expected = self.known.get(&headers[at].producer_id).map_or(0, Producer::expected);
                Err((at, Refusal::OutOfOrder { expected }))
            }
            (Some((_, base_offset)), Some(last_offset)) => {
                Ok(Verdict::Duplicate { base_offset, last_offset })
            }
            _ => Ok(Verdict::Next),
        }
    }

    /// Judges a marker that a coordinator wants to write.
    pub fn judge_marker(&self, id: i64, epoch: i16, marker: Marker) -> Result<(), Refusal> {
        let Some(producer) = self.known.get(&id) else { return Ok(()) };
        if epoch < producer.epoch {
            return Err(Refusal::Fenced { current: producer.epoch });
        }
        if marker.coordinator_epoch < producer.coordinator_epoch {
            return Err(Refusal::FencedCoordinator { current: producer.coordinator_epoch });
        }
        Ok(())
    }

    /// Takes note of a batch that is in the log. `header` has its final base offset; `marker` is what it says if it is
    /// a control batch. `now`, in milliseconds, is when: the records' own timestamps may be years old, and must not make
    /// a producer that is at work expire. Returns the transaction that it ends.
    pub fn note(&mut self, header: &Header, marker: Option<Marker>, now: i64) -> Option<Ended> {
        if !header.is_idempotent() {
            return None;
        }
        let (producer_id, epoch) = (header.producer_id, header.producer_epoch);
        if !header.is_control() {
            let producer = self.known.entry(producer_id).or_insert_with(|| Producer::new(epoch));
            if producer.sent(header, now) {
                self.open.insert(header.base_offset, producer_id);
            }
            return None;
        }
        // A control batch that compaction has emptied says nothing any more.
        let marker = marker?;
        let producer = self.known.entry(producer_id).or_insert_with(|| Producer::new(epoch));
        producer.enter(epoch, now);
        producer.coordinator_epoch = marker.coordinator_epoch;
        // Only a transaction with records matters to anybody.
        let first_offset = producer.open.take()?;
        self.open.remove(&first_offset);
        let (last_offset, outcome) = (header.last_offset(), marker.outcome);
        let last_stable = self.first_open().unwrap_or(last_offset.saturating_add(1));
        Some(Ended { producer_id, first_offset, last_offset, last_stable, outcome })
    }

    /// First offset of the oldest open transaction.
    #[must_use]
    pub fn first_open(&self) -> Option<i64> {
        self.open.first_key_value().map(|(&first, _)| first)
    }

    /// Nothing is open that began before `first_open`, or nothing at all.
    pub fn close_before(&mut self, first_open: Option<i64>) {
        let still = first_open.map_or_else(BTreeMap::new, |first| self.open.split_off(&first));
        for id in std::mem::replace(&mut self.open, still).into_values() {
            if let Some(producer) = self.known.get_mut(&id) {
                producer.open = None;
            }
        }
    }

    /// The open transactions, as (first offset, producer id), the oldest first.
    pub fn open(&self) -> impl Iterator<Item = (i64, i64)> + '_ {
        self.open.iter().map(|(&first, &id)| (first, id))
    }

    /// Everything known of every producer, by id.
    #[must_use]
    pub fn states(&self) -> Vec<ProducerState> {
        let state = |(&id, producer): (&i64, &Producer)| {
            let last = producer.sent.back();
            ProducerState {
                id,
                epoch: producer.epoch,
                last_sequence: last.map_or(-1, |sent| sent.last_sequence),
                last_offset: last.map_or(-1, |sent| sent.last_offset),
                last_timestamp: producer.timestamp,
                coordinator_epoch: producer.coordinator_epoch,
                open_from: producer.open,
            }
        };
        self.known.iter().map(state).collect()
    }

    /// Forgets producers that were last heard of at or before `oldest`, in milliseconds since the epoch; never one with
    /// an open transaction.
    pub fn expire(&mut self, oldest: i64) {
        self.known.retain(|_, producer| producer.open.is_some() || producer.timestamp > oldest);
    }

    /// How many are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// The bytes of a snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(CRC_END + 4 + self.known.len() * ENTRY);
        bytes.put_i16(VERSION);
        bytes.put_u32(0);
        bytes.put_i32(self.known.len() as i32);
        for (&id, producer) in &self.known {
            let none = Sent { last_sequence: -1, last_offset: -1, offset_delta: 0 };
            let last = producer.sent.back().copied().unwrap_or(none);
            bytes.put_i64(id);
            bytes.put_i16(producer.epoch);
            bytes.put_i32(last.last_sequence);
            bytes.put_i64(last.last_offset);
            bytes.put_i32(last.offset_delta);
            bytes.put_i64(producer.timestamp);
            bytes.put_i32(producer.coordinator_epoch);
            bytes.put_i64(producer.open.unwrap_or(-1));
        }
        let crc = crc32c::crc32c(&bytes[CRC_END..]);
        bytes[2..CRC_END].copy_from_slice(&crc.to_be_bytes());
        bytes.freeze()
    }

    /// Reads the snapshot of a log that ends at `end`, checking every field.
    pub fn read_snapshot(mut bytes: &[u8], end: i64) -> Result<Self, SnapshotFault> {
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
            let (id, producer) = read_producer(&mut bytes)?;
            let last = producer.sent.back().map_or(-1, |sent| sent.last_offset);
            if last >= end {
                return Err(SnapshotFault::Offset);
            }
            let twice = producer.open.and_then(|first| producers.open.insert(first, id));
            if twice.is_some() || producers.known.insert(id, producer).is_some() {
                return Err(SnapshotFault::Field);
            }
        }
        Ok(producers)
    }
}

/// One producer of a snapshot; `bytes` are [`ENTRY`] or more.
fn read_producer(bytes: &mut &[u8]) -> Result<(i64, Producer), SnapshotFault> {
    let (id, epoch) = (bytes.get_i64(), bytes.get_i16());
    let (last_sequence, last_offset) = (bytes.get_i32(), bytes.get_i64());
    let (offset_delta, timestamp) = (bytes.get_i32(), bytes.get_i64());
    let (coordinator_epoch, open) = (bytes.get_i32(), bytes.get_i64());
    let sent = Sent { last_sequence, last_offset, offset_delta };
    let has_batch = last_offset >= 0;
    let batch = if has_batch {
        last_sequence >= -1 && (0..=last_offset).contains(&i64::from(offset_delta))
    } else {
        (last_sequence, last_offset, offset_delta) == (-1, -1, 0)
    };
    // A transaction has a batch, and is open no later than its last.
    if id < 0 || epoch < 0 || !batch || coordinator_epoch < -1 || !(-1..=last_offset).contains(&open) {
        return Err(SnapshotFault::Field);
    }
    let sent = if has_batch { VecDeque::from([sent]) } else { VecDeque::new() };
    Ok((id, Producer { epoch, coordinator_epoch, timestamp, open: (open >= 0).then_some(open), sent }))
}

#[cfg(test)]
mod tests;
