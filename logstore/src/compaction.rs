//! Log compaction: which records of a batch stay, and what the batch becomes. Pure.
//!
//! Two walks, as Kafka's `LogCleaner` makes them. The first notes the latest offset of each key in an [`OffsetMap`]; the
//! second puts each batch through [`filter`]. Rules:
//!
//! - A record stays if no later one of its key is in the map, or if it lies behind all that the map has seen.
//! - A tombstone stays until its batch's delete horizon has passed. The horizon is set by the first cleaning that keeps
//!   the tombstone, `delete.retention.ms` ahead (attribute bit 6; the base timestamp *is* the horizon then, and
//!   timestamps of records count from it).
//! - Records without a key, and those of aborted transactions, go.
//! - A transaction marker stays as long as a batch of its transaction is there, be it an empty one ([`Traces`]): without it,
//!   readers would take a later marker for its own. The first cleaning that finds none sets a delete horizon, as for
//!   tombstones, for readers that have seen records and wait for the marker; the first one behind that takes it out.
//! - A batch keeps its base and last offset, its sequences and its leader epoch, so that offsets never change. One that
//!   has the last record of a producer that is still known stays even when it is empty, its sequence is needed; so does the
//!   only marker that tells a producer's epoch; and so does the last batch of all that is cleaned, for the sake of readers who
//!   want to get to the end.
//! - Records that stay are copied byte for byte, but for the timestamp's difference where a horizon is set. A batch of
//!   which all stays is copied whole, compressed or not.
//! - What cannot be read stays as it is: a batch whose records do not add up, or that decompresses to more than
//!   [`INFLATED`].
//!
//! Keys are known by 128 bits of a keyed hash, so that nobody can make two of them collide on purpose.
//!
//! Memory: [`ENTRY`] bytes a key at most, in a map with a limit; one batch, decompressed, and what it becomes.

use crate::batch::{self, DELETE_HORIZON, Header, Marker};
use crate::compression::{Codec, compress};
use crate::records::{Record, RecordFault, Records, unpack};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, DefaultHasher, Hasher};

/// Largest batch, decompressed, that is looked into. Units: bytes.
pub const INFLATED: usize = 128 << 20;
/// Bytes of memory that a key takes in the map at most, also while the map grows.
pub const ENTRY: usize = 96;

/// The latest offset of each key, as far as the log was walked.
#[derive(Debug)]
pub struct OffsetMap {
    seed: [u8; 16],
    offsets: HashMap<[u64; 2], i64, BuildHasherDefault<DefaultHasher>>,
    most: usize,
    latest: i64,
}

impl OffsetMap {
    /// An empty map for at most `memory` bytes (at least one key); `seed` is random.
    #[must_use]
    pub fn new(seed: [u8; 16], memory: usize) -> Self {
        Self { seed, offsets: HashMap::default(), most: (memory / ENTRY).max(1), latest: -1 }
    }

    fn hash(&self, key: &[u8]) -> [u64; 2] {
        [0u8, 1].map(|half| {
            let mut hasher = DefaultHasher::new();
            hasher.write(&self.seed);
            hasher.write_u8(half);
            hasher.write(key);
            hasher.finish()
        })
    }

    /// Notes a record; `false`, and nothing is noted, when the map is full.
    fn note(&mut self, key: &[u8], offset: i64) -> bool {
        let hash = self.hash(key);
        if self.offsets.len() >= self.most && !self.offsets.contains_key(&hash) {
            return false;
        }
        self.offsets.insert(hash, offset);
        self.latest = offset;
        true
    }

    /// Notes a batch without records that count.
    pub fn pass(&mut self, header: &Header) {
        self.latest = self.latest.max(header.last_offset());
    }

    /// Notes the records from `from` on of a whole, sound batch. `false` when the map was full before its last record: then
    /// [`OffsetMap::latest`] is the offset of the last that was noted.
    pub fn note_batch(&mut self, header: &Header, batch: &[u8], from: i64) -> Result<bool, RecordFault> {
        let unpacked = unpack(header, batch, INFLATED)?;
        let records: Vec<_> = Records::new(header, &unpacked).collect::<Result<_, _>>()?;
        for record in records.iter().filter(|record| record.offset >= from) {
            if let Some(key) = record.key
                && !self.note(key, record.offset)
            {
                return Ok(false);
            }
        }
        self.pass(header);
        Ok(true)
    }

    /// The largest offset noted; −1 when none was.
    #[must_use]
    pub fn latest(&self) -> i64 {
        self.latest
    }

    /// Keys noted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// Whether no key was noted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    fn is_latest(&self, key: &[u8], offset: i64) -> bool {
        offset > self.latest || self.offsets.get(&self.hash(key)).is_none_or(|&latest| offset >= latest)
    }
}

/// What a batch is judged by besides the map.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// The clock, in milliseconds.
    pub now: i64,
    /// `delete.retention.ms`.
    pub delete_retention_ms: i64,
    /// The batch stays when it is empty: it has the last record of a producer that is still known, is a marker that alone
    /// tells its epoch, or is the last batch of all that is cleaned.
    pub stays_empty: bool,
    /// It ends a transaction of which nothing is left.
    pub is_spent: bool,
    /// The batch belongs to a transaction that was aborted.
    pub is_aborted: bool,
}

/// What is left of transactions, as a walk from the log's start finds it.
#[derive(Debug, Default)]
pub struct Traces {
    /// Producers with batches since their last marker.
    open: HashSet<i64>,
}

impl Traces {
    /// Takes note of the next batch. Whether it is a marker, and nothing was found of its transaction.
    pub fn see(&mut self, header: &Header) -> bool {
        if header.is_control() {
            return !self.open.remove(&header.producer_id);
        }
        if header.is_transactional() {
            self.open.insert(header.producer_id);
        }
        false
    }
}

/// What a batch becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// It is copied as it is.
    Whole,
    /// These bytes stand for it.
    Changed(Bytes),
    /// Nothing stands for it.
    Nothing,
}

/// Judges a whole, sound batch.
pub fn filter(header: &Header, batch: &[u8], map: &OffsetMap, rules: Rules) -> Result<Kept, RecordFault> {
    if header.base_offset > map.latest {
        return Ok(Kept::Whole);
    }
    if header.is_control() {
        return filter_marker(header, batch, rules);
    }
    let unpacked = unpack(header, batch, INFLATED)?;
    let records: Vec<_> = Records::new(header, &unpacked).collect::<Result<_, _>>()?;
    let horizon = header.delete_horizon();
    let is_over = horizon.is_some_and(|horizon| rules.now >= horizon);
    let stays = |record: &Record<'_>| {
        if rules.is_aborted {
            return false;
        }
        let Some(key) = record.key else { return record.offset > map.latest };
        map.is_latest(key, record.offset)
            && (record.value.is_some() || !is_over || record.offset > map.latest)
    };
    let kept: Vec<_> = records.iter().copied().filter(stays).collect();
    if kept.is_empty() {
        return Ok(empty(header, rules));
    }
    // What lies behind the map was not cleaned yet: its tombstones start to wait when it is.
    let waits = |record: &Record<'_>| record.value.is_none() && record.offset <= map.latest;
    let fresh = (horizon.is_none() && kept.iter().any(waits))
        .then(|| rules.now.saturating_add(rules.delete_retention_ms));
    if kept.len() == records.len() && fresh.is_none() {
        return Ok(Kept::Whole);
    }
    rebuilt(header, &kept, fresh).map(Kept::Changed)
}

/// Judges a control batch.
fn filter_marker(header: &Header, batch: &[u8], rules: Rules) -> Result<Kept, RecordFault> {
    if header.count == 0 {
        return Ok(empty(header, rules));
    }
    if !rules.is_spent || Marker::read(header, batch).is_none() {
        return Ok(Kept::Whole);
    }
    match header.delete_horizon() {
        None => {
            let unpacked = unpack(header, batch, INFLATED)?;
            let records: Vec<_> = Records::new(header, &unpacked).collect::<Result<_, _>>()?;
            let horizon = rules.now.saturating_add(rules.delete_retention_ms);
            rebuilt(header, &records, Some(horizon)).map(Kept::Changed)
        }
        Some(horizon) if rules.now >= horizon => Ok(empty(header, rules)),
        Some(_) => Ok(Kept::Whole),
    }
}

/// What becomes of a batch of whose records none stays.
fn empty(header: &Header, rules: Rules) -> Kept {
    match (rules.stays_empty, header.count == 0) {
        (false, _) => Kept::Nothing,
        (true, true) => Kept::Whole,
        (true, false) => Kept::Changed(emptied(header)),
    }
}

/// A batch without records.
fn emptied(header: &Header) -> Bytes {
    let attributes = header.attributes & !(batch::COMPRESSION | DELETE_HORIZON);
    Header { attributes, base_timestamp: -1, count: 0, ..*header }.with_records(&[]).freeze()
}

/// A batch with these of its records; `fresh` is the delete horizon to set, if one is.
fn rebuilt(header: &Header, kept: &[Record<'_>], fresh: Option<i64>) -> Result<Bytes, RecordFault> {
    let codec = Codec::of(header.attributes).ok_or(RecordFault::Codec(header.attributes & 7))?;
    let mut header = *header;
    let mut records = Vec::with_capacity(kept.iter().map(|record| record.bytes.len() + 10).sum());
    if let Some(horizon) = fresh {
        header.attributes |= DELETE_HORIZON;
        header.base_timestamp = horizon;
    }
    for record in kept {
        match fresh {
            None => records.extend_from_slice(record.bytes),
            Some(horizon) => rebased(record, horizon, &mut records),
        }
    }
    if !header.is_log_append_time() {
        header.max_timestamp = kept.iter().map(|record| record.timestamp).max().unwrap_or(-1);
    }
    header.count = kept.len() as i32;
    Ok(header.with_records(&compress(codec, &records)?).freeze())
}

/// Writes a record with its timestamp counted from `base`.
fn rebased(record: &Record<'_>, base: i64, out: &mut Vec<u8>) {
    let mut body = Vec::with_capacity(record.after_timestamp.len() + 11);
    body.push(record.attributes);
    put_varint(&mut body, record.timestamp.saturating_sub(base));
    body.extend_from_slice(record.after_timestamp);
    put_varint(out, body.len() as i64);
    out.extend_from_slice(&body);
}

fn put_varint(out: &mut Vec<u8>, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)) as u64;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

#[cfg(test)]
mod tests;
