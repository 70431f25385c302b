//! The header of a record batch (magic 2): a view of bytes, the checks on them, and the stamps a broker sets.
//!
//! Pure. Layout, big-endian, from Kafka's `DefaultRecordBatch`:
//!
//! ```text
//!  0 baseOffset i64      8 batchLength i32 (bytes after this field)   12 partitionLeaderEpoch i32   16 magic i8
//! 17 crc u32 (CRC-32C)  21 attributes i16   23 lastOffsetDelta i32    27 baseTimestamp i64
//! 35 maxTimestamp i64   43 producerId i64   51 producerEpoch i16      53 baseSequence i32   57 count i32   61 records
//! ```
//!
//! The CRC covers 21..end, so base offset and leader epoch are stamped without touching it; the timestamp of
//! `LogAppendTime` is not, and costs a second pass. Users' records are opaque: never decoded. Only the control batches
//! that end transactions are written and read here, one record each (Kafka's `EndTransactionMarker`): key i16 version 0,
//! i16 type (0 abort, 1 commit); value i16 version 0, i32 coordinator epoch.
//!
//! Invariant: a [`Header`] was parsed from at least [`HEADER`] bytes, and its `size` is between [`HEADER`] and
//! [`MAX_BATCH`]; nothing else about it is promised until [`check`] passed.

use bytes::{Buf, BufMut, BytesMut};

/// Bytes of a batch header.
pub const HEADER: usize = 61;
/// Bytes before `batchLength` starts to count: a batch is `12 + batchLength` bytes.
pub const FRAME: usize = 12;
/// Largest batch that a length field can describe.
pub const MAX_BATCH: u64 = i32::MAX as u64 + FRAME as u64;

const MAGIC_AT: usize = 16;
const CRC_AT: usize = 17;
/// Where the part begins that the checksum covers.
pub(crate) const CRC_FROM: usize = 21;
const MAX_TIMESTAMP_AT: usize = 35;

/// Compression codec, low three bits of the attributes.
pub(crate) const COMPRESSION: i16 = 0x07;
/// Timestamps are the broker's (`LogAppendTime`).
const LOG_APPEND_TIME: i16 = 0x08;
const TRANSACTIONAL: i16 = 0x10;
const CONTROL: i16 = 0x20;
/// The base timestamp is the time from which compaction drops the batch's tombstones.
pub(crate) const DELETE_HORIZON: i16 = 0x40;

/// What is wrong with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchFault {
    /// The bytes end inside a batch. Units: bytes.
    #[error("it needs {needed} bytes and {available} are there")]
    Truncated {
        /// Bytes the batch, or its header, takes.
        needed: u64,
        /// Bytes that are there.
        available: u64,
    },
    /// Only zeroes, where a header should be.
    #[error("there are zeroes where its header should be")]
    Zeroes,
    /// A length that no batch has.
    #[error("its length field says {length}")]
    Length {
        /// `batchLength` as found.
        length: i32,
    },
    /// A format other than 2.
    #[error("its format (magic) is {magic}, only 2 is supported")]
    Magic {
        /// The byte found.
        magic: i8,
    },
    /// The checksum does not match.
    #[error("its checksum is {computed:#010x}, its header says {stored:#010x}")]
    Checksum {
        /// From the header.
        stored: u32,
        /// Over the bytes.
        computed: u32,
    },
    /// Record count and last offset delta that contradict each other.
    #[error("it claims {count} records with a last offset delta of {last_offset_delta}")]
    Count {
        /// Number of records claimed.
        count: i32,
        /// Last offset delta claimed.
        last_offset_delta: i32,
    },
    /// An attribute combination that does not exist.
    #[error("its attributes {attributes:#06x} are not valid")]
    Attributes {
        /// As found.
        attributes: i16,
    },
    /// A producer id without epoch or sequence, or the reverse.
    #[error("its producer id, epoch and sequence ({producer_id}, {epoch}, {sequence}) do not go together")]
    Producer {
        /// Producer id.
        producer_id: i64,
        /// Producer epoch.
        epoch: i16,
        /// Base sequence.
        sequence: i32,
    },
    /// On disk: a base offset other than the one that should follow.
    #[error("its base offset is {found}, {expected} should follow")]
    BaseOffset {
        /// As found.
        found: i64,
        /// As expected.
        expected: i64,
    },
    /// On disk: a leader epoch lower than that of the batch before it.
    #[error("its leader epoch {found} is older than {previous} of the batch before it")]
    LeaderEpoch {
        /// As found.
        found: i32,
        /// Of the batch before.
        previous: i32,
    },
    /// On disk: the bytes cannot be read.
    #[error("it cannot be read")]
    Unreadable,
    /// A record without a key, where the last of each key is kept.
    #[error("it has a record without a key, and its topic is compacted")]
    Keyless,
    /// Records that cannot be read, or decompress to too much, where they must be read.
    #[error("its records cannot be read, or decompress to too many bytes, and its topic is compacted")]
    Records,
    /// A produce request with no batch in it.
    #[error("it is empty")]
    Empty,
}

/// A parsed batch header. Field names are Kafka's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Offset of the first record.
    pub base_offset: i64,
    /// Bytes of the whole batch, header included.
    pub size: u32,
    /// Epoch of the leader that appended it.
    pub leader_epoch: i32,
    /// CRC-32C over byte 21 to the end.
    pub crc: u32,
    /// Bit set, see the accessors.
    pub attributes: i16,
    /// Offset of the last record less the base offset.
    pub last_offset_delta: i32,
    /// Milliseconds; the first record's.
    pub base_timestamp: i64,
    /// Milliseconds; the largest of the records'.
    pub max_timestamp: i64,
    /// −1 without idempotence.
    pub producer_id: i64,
    /// −1 without idempotence.
    pub producer_epoch: i16,
    /// −1 without idempotence.
    pub base_sequence: i32,
    /// Records in the batch.
    pub count: i32,
}

impl Header {
    /// Parses the header that `bytes` start with. Checks only what is needed to find the batch's end.
    pub fn parse(bytes: &[u8]) -> Result<Self, BatchFault> {
        if bytes.len() < HEADER {
            return Err(BatchFault::Truncated { needed: HEADER as u64, available: bytes.len() as u64 });
        }
        let mut at = &bytes[..HEADER];
        let base_offset = at.get_i64();
        let length = at.get_i32();
        let leader_epoch = at.get_i32();
        let magic = at.get_i8();
        if length == 0 && magic == 0 && bytes[..HEADER].iter().all(|&byte| byte == 0) {
            return Err(BatchFault::Zeroes);
        }
        // Magic first: messages of formats 0 and 1 are shorter than a header, and deserve the right answer.
        if magic != 2 {
            return Err(BatchFault::Magic { magic });
        }
        if length < (HEADER - FRAME) as i32 {
            return Err(BatchFault::Length { length });
        }
        Ok(Self {
            base_offset,
            size: length as u32 + FRAME as u32,
            leader_epoch,
            crc: at.get_u32(),
            attributes: at.get_i16(),
            last_offset_delta: at.get_i32(),
            base_timestamp: at.get_i64(),
            max_timestamp: at.get_i64(),
            producer_id: at.get_i64(),
            producer_epoch: at.get_i16(),
            base_sequence: at.get_i32(),
            count: at.get_i32(),
        })
    }

    /// The whole batch of this header and these records, as they stand in it; its size and checksum are made.
    pub(crate) fn with_records(&self, records: &[u8]) -> BytesMut {
        let mut batch = BytesMut::with_capacity(HEADER + records.len());
        batch.put_i64(self.base_offset);
        batch.put_i32((HEADER - FRAME + records.len()) as i32);
        batch.put_i32(self.leader_epoch);
        batch.put_i8(2);
        batch.put_u32(0);
        batch.put_i16(self.attributes);
        batch.put_i32(self.last_offset_delta);
        batch.put_i64(self.base_timestamp);
        batch.put_i64(self.max_timestamp);
        batch.put_i64(self.producer_id);
        batch.put_i16(self.producer_epoch);
        batch.put_i32(self.base_sequence);
        batch.put_i32(self.count);
        batch.put_slice(records);
        restamp_crc(&mut batch);
        batch
    }

    /// Offset of the last record. Saturates, so that a hostile header cannot overflow.
    #[must_use]
    pub fn last_offset(&self) -> i64 {
        self.base_offset.saturating_add(i64::from(self.last_offset_delta))
    }

    /// Offset after the last record.
    #[must_use]
    pub fn next_offset(&self) -> i64 {
        self.last_offset().saturating_add(1)
    }

    /// Whether the timestamps are the broker's.
    #[must_use]
    pub fn is_log_append_time(&self) -> bool {
        self.attributes & LOG_APPEND_TIME != 0
    }

    /// Whether the records belong to a transaction.
    #[must_use]
    pub fn is_transactional(&self) -> bool {
        self.attributes & TRANSACTIONAL != 0
    }

    /// Whether it carries a transaction marker rather than records.
    #[must_use]
    pub fn is_control(&self) -> bool {
        self.attributes & CONTROL != 0
    }

    /// When compaction may drop the batch's tombstones, in milliseconds, once it has seen them.
    #[must_use]
    pub fn delete_horizon(&self) -> Option<i64> {
        (self.attributes & DELETE_HORIZON != 0).then_some(self.base_timestamp)
    }

    /// Whether the producer asked for idempotence.
    #[must_use]
    pub fn is_idempotent(&self) -> bool {
        self.producer_id >= 0
    }

    /// Sequence number of the last record; sequence numbers wrap from `i32::MAX` to 0. −1 in a batch without any.
    #[must_use]
    pub fn last_sequence(&self) -> i32 {
        if self.base_sequence < 0 {
            return -1;
        }
        add_sequence(self.base_sequence, self.last_offset_delta)
    }
}

/// How a transaction ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Its records never happened.
    Abort,
    /// Its records count.
    Commit,
}

/// What the control batch at the end of a transaction says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marker {
    /// How the transaction ends.
    pub outcome: Outcome,
    /// Epoch of the transaction coordinator that decided.
    pub coordinator_epoch: i32,
}

/// Bytes of a [`Marker`]'s record after its length: attributes, two deltas, key, value, no headers.
const MARKER_RECORD: i8 = 16;

impl Marker {
    /// The control batch of one record that says it, still without base offset and leader epoch.
    #[must_use]
    pub fn batch(self, producer_id: i64, producer_epoch: i16, now: i64) -> BytesMut {
        let mut record = BytesMut::with_capacity(1 + MARKER_RECORD as usize);
        // Lengths are zigzag varints: small ones are one byte of twice their value.
        record.put_i8(2 * MARKER_RECORD);
        record.put_slice(&[0, 0, 0]);
        record.put_i8(2 * 4);
        record.put_i16(0);
        record.put_i16(i16::from(self.outcome == Outcome::Commit));
        record.put_i8(2 * 6);
        record.put_i16(0);
        record.put_i32(self.coordinator_epoch);
        record.put_i8(0);
        let header = Header {
            base_offset: 0,
            size: 0,
            leader_epoch: 0,
            crc: 0,
            attributes: TRANSACTIONAL | CONTROL,
            last_offset_delta: 0,
            base_timestamp: now,
            max_timestamp: now,
            producer_id,
            producer_epoch,
            base_sequence: -1,
            count: 1,
        };
        header.with_records(&record)
    }

    /// Reads it from a whole, sound batch; `None` for one that ends no transaction: records of users, control batches of
    /// other kinds, and those that compaction has emptied.
    #[must_use]
    pub fn read(header: &Header, batch: &[u8]) -> Option<Self> {
        if !header.is_control() || header.count < 1 || header.attributes & COMPRESSION != 0 {
            return None;
        }
        let mut rest = batch.get(HEADER..)?;
        let length = usize::try_from(varint(&mut rest)?).ok()?;
        let mut record = rest.get(..length)?.get(1..)?;
        let _deltas = (varint(&mut record)?, varint(&mut record)?);
        let key = taken(&mut record)?;
        let value = taken(&mut record)?;
        if key.len() < 4 || value.len() < 6 {
            return None;
        }
        // Later versions keep the first fields.
        let (version, kind) = (i16::from_be_bytes([key[0], key[1]]), i16::from_be_bytes([key[2], key[3]]));
        let outcome = match kind {
            0 => Outcome::Abort,
            1 => Outcome::Commit,
            _ => return None,
        };
        let coordinator_epoch = i32::from_be_bytes([value[2], value[3], value[4], value[5]]);
        (version >= 0 && value[0] < 0x80).then_some(Self { outcome, coordinator_epoch })
    }
}

/// Bytes with a varint of their length before them.
fn taken<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(varint(bytes)?).ok()?;
    let found = bytes.get(..length)?;
    *bytes = &bytes[length..];
    Some(found)
}

/// Sequence number `by` steps after `sequence`, with Kafka's wrap from `i32::MAX` to 0.
#[must_use]
pub fn add_sequence(sequence: i32, by: i32) -> i32 {
    let sum = i64::from(sequence) + i64::from(by);
    (sum.rem_euclid(i64::from(i32::MAX) + 1)) as i32
}

/// Checks a whole batch, `bytes` from its first to its last byte, against its parsed header.
pub fn check(header: &Header, bytes: &[u8]) -> Result<(), BatchFault> {
    if bytes.len() as u64 != u64::from(header.size) {
        return Err(BatchFault::Truncated { needed: u64::from(header.size), available: bytes.len() as u64 });
    }
    check_sums(header, crc32c::crc32c(&bytes[CRC_FROM..]))
}

/// Checks a header against the checksum computed over byte 21 to the batch's end.
pub fn check_sums(header: &Header, computed: u32) -> Result<(), BatchFault> {
    if computed != header.crc {
        return Err(BatchFault::Checksum { stored: header.crc, computed });
    }
    // A compacted batch may hold fewer records than its delta says, or none; never more.
    let (count, last_offset_delta) = (header.count, header.last_offset_delta);
    if count < 0 || last_offset_delta < 0 || i64::from(count) > i64::from(last_offset_delta) + 1 {
        return Err(BatchFault::Count { count, last_offset_delta });
    }
    Ok(())
}

/// Who sends a batch, and so what is asked of it (Kafka's `AppendOrigin`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A producer.
    Client,
    /// A coordinator of the broker's own: it may leave sequence numbers out (−1), and they are not judged.
    Coordinator,
}

/// The further checks on a batch that is to be appended, on top of [`check`].
pub fn check_produced(header: &Header, origin: Origin) -> Result<(), BatchFault> {
    let Header { count, last_offset_delta, attributes, .. } = *header;
    if count < 1 || i64::from(count) != i64::from(last_offset_delta) + 1 {
        return Err(BatchFault::Count { count, last_offset_delta });
    }
    // Codecs 5..7 do not exist; only the broker says LogAppendTime or writes markers.
    if attributes & COMPRESSION > 4 || attributes & CONTROL != 0 {
        return Err(BatchFault::Attributes { attributes });
    }
    let (producer_id, epoch, sequence) = (header.producer_id, header.producer_epoch, header.base_sequence);
    let sequenced = sequence >= 0 || (origin == Origin::Coordinator && sequence == -1);
    let together = producer_id < 0 || (epoch >= 0 && sequenced);
    if !together || (producer_id < 0 && header.is_transactional()) {
        return Err(BatchFault::Producer { producer_id, epoch, sequence });
    }
    Ok(())
}

/// Stamps what the CRC does not cover: base offset and leader epoch. `batch` starts at a batch's first byte.
pub fn stamp(batch: &mut [u8], base_offset: i64, leader_epoch: i32) {
    (&mut batch[..8]).put_i64(base_offset);
    (&mut batch[FRAME..MAGIC_AT]).put_i32(leader_epoch);
}

/// Gives a whole batch the broker's timestamp, as `LogAppendTime` asks, and its new CRC.
pub fn stamp_append_time(batch: &mut [u8], now: i64) {
    let attributes = i16::from_be_bytes([batch[CRC_FROM], batch[CRC_FROM + 1]]) | LOG_APPEND_TIME;
    (&mut batch[CRC_FROM..]).put_i16(attributes);
    (&mut batch[MAX_TIMESTAMP_AT..]).put_i64(now);
    restamp_crc(batch);
}

fn restamp_crc(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[CRC_FROM..]);
    (&mut batch[CRC_AT..]).put_u32(crc);
}

/// A zigzag varint of up to 64 bits; `None` when the bytes end in it.
pub(crate) fn varint(bytes: &mut &[u8]) -> Option<i64> {
    let mut value = 0u64;
    for at in 0..10 {
        let byte = *bytes.get(at)?;
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            *bytes = &bytes[at + 1..];
            return Some((value >> 1) as i64 ^ -((value & 1) as i64));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_kafkas_bytes() {
        let marker = Marker { outcome: Outcome::Commit, coordinator_epoch: 0x0102_0304 };
        let mut bytes = marker.batch(0x55, 7, 1_000);
        stamp(&mut bytes, 42, 3);
        // A record as `MemoryRecords.withEndTransactionMarker` of Kafka 4.3 writes it.
        let record = [32, 0, 0, 0, 8, 0, 0, 0, 1, 12, 0, 0, 1, 2, 3, 4, 0];
        assert_eq!(bytes[HEADER..], record);
        let header = Header::parse(&bytes).unwrap();
        check(&header, &bytes).unwrap();
        assert!(header.is_control() && header.is_transactional());
        assert_eq!((header.base_offset, header.last_offset(), header.leader_epoch), (42, 42, 3));
        assert_eq!((header.producer_id, header.producer_epoch, header.base_sequence), (0x55, 7, -1));
        assert_eq!((header.base_timestamp, header.max_timestamp, header.count), (1_000, 1_000, 1));
        assert_eq!(Marker::read(&header, &bytes), Some(marker));
        let refused = check_produced(&header, Origin::Client);
        assert_eq!(refused, Err(BatchFault::Attributes { attributes: 0x30 }), "no client writes markers");
        let abort = Marker { outcome: Outcome::Abort, ..marker };
        assert_eq!(Marker::read(&header, &abort.batch(0x55, 7, 0)), Some(abort));
    }

    #[test]
    fn a_marker_cut_or_changed_anywhere_is_read_without_a_panic() {
        let bytes = Marker { outcome: Outcome::Abort, coordinator_epoch: 1 }.batch(1, 0, 0);
        let header = Header::parse(&bytes).unwrap();
        for end in 0..bytes.len() {
            let cut = Marker::read(&header, &bytes[..end]);
            assert!(cut.is_none(), "{end}");
        }
        for at in HEADER..bytes.len() {
            for value in 0..=255 {
                let mut bad = bytes.to_vec();
                bad[at] = value;
                let _any = Marker::read(&header, &bad);
            }
        }
        let plain = Header { attributes: 0x10, ..header };
        assert_eq!(Marker::read(&plain, &bytes), None, "what users write is never taken for a marker");
    }
}
