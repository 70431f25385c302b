//! What the journal holds: records of appends, and pointers to the first that counts. Bytes ↔ values; pure.
//!
//! A record fills whole blocks of 4096 bytes, little-endian: magic 8 bytes · crc32c u32 over all behind it up to the length ·
//! length u32 · salt u64 · number u64 · store id 16 bytes · appends u32 · reserved u32 (…56), then each append: topic id
//! 16 bytes · partition u32 · base offset of the segment i64 · position there u64 · length u32, and its bytes. Zeroes fill the
//! last block, and count for nothing.
//!
//! A pointer fills a block: magic 8 bytes · crc32c u32 over all behind it up to 56 · closed u32 · turn u64 · salt u64 ·
//! first u64 · store id 16 bytes (…56).

use super::Segments;
use crate::catalog::records::{PartitionKey, SegmentKey};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use uuid::Uuid;

/// Unit of the journal.
pub(super) const BLOCK: u64 = 4096;
/// Bytes before the first append.
pub(super) const HEAD: usize = 56;
/// Bytes before an append's own.
const APPEND_HEAD: usize = 40;
/// Longest record, in bytes.
pub(super) const LONGEST: usize = 512 << 10;

/// No store writes so many blocks: numbers below can be computed with.
const FURTHEST: u64 = 1 << 60;

const RECORD: [u8; 8] = *b"decalogJ";
const POINTER: [u8; 8] = *b"decalogP";
/// Where the checksum stands, and where what it covers begins.
const CRC_AT: usize = 8;
const COVERED: usize = 12;

/// What tells a record from any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Name {
    /// Which store's.
    pub(super) store: Uuid,
    /// Of the life of the store in which it was written: drawn at its start, so that no client can know it, whose bytes may
    /// lie where a record is looked for.
    pub(super) salt: u64,
    /// Its first block, counted from the journal's beginning without an end: the block of the region is the remainder.
    pub(super) number: u64,
}

/// Room for a record of some `len` bytes, with its head left open.
pub(super) fn begin(len: usize) -> BytesMut {
    let mut record = raid::device::room(len.clamp(BLOCK as usize, LONGEST));
    record.resize(HEAD, 0);
    record
}

/// Bytes that an append of `len` takes.
pub(super) fn taken_by(len: usize) -> usize {
    APPEND_HEAD + len
}

/// Adds an append.
pub(super) fn push(record: &mut BytesMut, key: &SegmentKey, at: u64, data: &[u8]) {
    record.put_slice(key.partition.topic.as_bytes());
    record.put_u32_le(key.partition.partition);
    record.put_i64_le(key.base);
    record.put_u64_le(at);
    record.put_u32_le(data.len() as u32);
    record.put_slice(data);
}

/// Completes a record of so many appends.
pub(super) fn finish(mut record: BytesMut, name: Name, appends: u32) -> Bytes {
    let len = record.len();
    let mut head = &mut record[..HEAD];
    head.put_slice(&RECORD);
    head.put_u32_le(0);
    head.put_u32_le(len as u32);
    head.put_u64_le(name.salt);
    head.put_u64_le(name.number);
    head.put_slice(name.store.as_bytes());
    head.put_u32_le(appends);
    head.put_u32_le(0);
    let crc = crc32c::crc32c(&record[COVERED..]);
    record[CRC_AT..COVERED].copy_from_slice(&crc.to_le_bytes());
    record.resize(len.next_multiple_of(BLOCK as usize), 0);
    record.freeze()
}

/// How long a record says that it is, and which one; `None` if a block does not begin one of this store.
pub(super) fn head(block: &[u8], store: Uuid) -> Option<(usize, Name)> {
    let mut rest = block.get(..HEAD)?.strip_prefix(&RECORD)?;
    rest.advance(4);
    let len = rest.get_u32_le() as usize;
    let (salt, number) = (rest.get_u64_le(), rest.get_u64_le());
    let found = Uuid::from_slice(rest.get(..16)?).ok()?;
    (found == store && (HEAD..=LONGEST).contains(&len)).then_some((len, Name { store, salt, number }))
}

/// Whether these bytes begin with a sound record; how long it is, and which one.
pub(super) fn check(bytes: &[u8], store: Uuid) -> Option<(usize, Name)> {
    let (len, name) = head(bytes, store)?;
    let stored = u32::from_le_bytes(bytes.get(CRC_AT..COVERED)?.try_into().ok()?);
    (crc32c::crc32c(bytes.get(COVERED..len)?) == stored).then_some((len, name))
}

/// Adds the appends of a sound record to what is known of segments. `None`, and nothing more is added, where they do not fit
/// the record: whoever wrote it had a fault.
pub(super) fn replay(record: &Bytes, len: usize, segments: &mut Segments) -> Option<u64> {
    let mut count = record.get(HEAD - 8..HEAD - 4)?;
    let (count, mut rest) = (count.get_u32_le(), record.slice(HEAD..len));
    for _ in 0..count {
        if rest.len() < APPEND_HEAD {
            return None;
        }
        let topic = Uuid::from_slice(&rest.split_to(16)).ok()?;
        let (partition, base) = (rest.get_u32_le(), rest.get_i64_le());
        let (at, len) = (rest.get_u64_le(), rest.get_u32_le() as usize);
        if len > rest.len() {
            return None;
        }
        let key = SegmentKey { partition: PartitionKey { topic, partition }, base };
        segments.add(key, at, &rest.split_to(len));
    }
    Some(u64::from(count))
}

/// Where the journal begins to count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pointer {
    /// Rises with each; its parity says in which of the two places it lies.
    pub(super) turn: u64,
    /// Of the current life of the store: what other records hold counts for nothing.
    pub(super) salt: u64,
    /// What was appended before the record with this number is in its segments, durably.
    pub(super) first: u64,
    /// The store was closed behind it: there are no records.
    pub(super) closed: bool,
}

impl Pointer {
    /// Where it lies in the journal.
    pub(super) fn at(&self) -> u64 {
        self.turn % 2 * BLOCK
    }

    pub(super) fn encode(&self, store: Uuid) -> Bytes {
        let mut bytes = raid::device::room(BLOCK as usize);
        bytes.put_slice(&POINTER);
        bytes.put_u32_le(0);
        bytes.put_u32_le(u32::from(self.closed));
        bytes.put_u64_le(self.turn);
        bytes.put_u64_le(self.salt);
        bytes.put_u64_le(self.first);
        bytes.put_slice(store.as_bytes());
        let crc = crc32c::crc32c(&bytes[COVERED..]);
        bytes[CRC_AT..COVERED].copy_from_slice(&crc.to_le_bytes());
        bytes.resize(BLOCK as usize, 0);
        bytes.freeze()
    }

    pub(super) fn decode(block: &[u8], store: Uuid) -> Option<Self> {
        let mut rest = block.get(..HEAD)?.strip_prefix(&POINTER)?;
        let (stored, closed) = (rest.get_u32_le(), rest.get_u32_le() == 1);
        let (turn, salt, first) = (rest.get_u64_le(), rest.get_u64_le(), rest.get_u64_le());
        let pointer = Self { turn, salt, first, closed };
        let is_sound = crc32c::crc32c(&block[COVERED..HEAD]) == stored
            && pointer.turn.max(pointer.first) < FURTHEST
            && rest.get(..16)? == store.as_bytes();
        is_sound.then_some(pointer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: Uuid = Uuid::from_u128(9);

    fn key(partition: u32) -> SegmentKey {
        SegmentKey { partition: PartitionKey { topic: Uuid::from_u128(3), partition }, base: 7 }
    }

    fn record() -> Bytes {
        let mut record = begin(0);
        push(&mut record, &key(1), 100, b"abc");
        push(&mut record, &key(2), 5, b"");
        push(&mut record, &key(1), 103, b"de");
        finish(record, Name { store: STORE, salt: 4, number: 11 }, 3)
    }

    #[test]
    fn a_record_reads_back_and_every_flipped_bit_is_seen() {
        let record = record();
        let (len, name) = check(&record, STORE).unwrap();
        assert_eq!((name, record.len() as u64), (Name { store: STORE, salt: 4, number: 11 }, BLOCK));
        let mut segments = Segments::default();
        assert_eq!(replay(&record, len, &mut segments), Some(3));
        assert_eq!(segments.of(&key(1)), [(100, BytesMut::from(&b"abcde"[..]))]);
        assert_eq!(check(&record, Uuid::nil()), None);
        for bit in 0..len * 8 {
            let mut bad = record.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(check(&bad, STORE), None, "bit {bit}");
        }
        for cut in 0..len {
            assert_eq!(check(&record[..cut], STORE), None, "{cut} bytes");
        }
    }

    #[test]
    fn false_lengths_within_a_record_are_refused() {
        for (at, wrong) in [(HEAD - 8, 4u32), (HEAD + 36, 1000), (HEAD + 36, u32::MAX)] {
            let mut bytes = record().to_vec();
            bytes[at..at + 4].copy_from_slice(&wrong.to_le_bytes());
            let len = check(&record(), STORE).unwrap().0;
            assert_eq!(replay(&bytes.into(), len, &mut Segments::default()), None, "{wrong} at {at}");
        }
    }

    #[test]
    fn a_pointer_reads_back_and_every_flipped_bit_is_seen() {
        let pointer = Pointer { turn: 3, salt: 2, first: 900, closed: true };
        let bytes = pointer.encode(STORE);
        assert_eq!((bytes.len() as u64, pointer.at()), (BLOCK, BLOCK));
        assert_eq!(Pointer::decode(&bytes, STORE), Some(pointer));
        assert_eq!(Pointer::decode(&bytes, Uuid::nil()), None);
        for bit in 0..HEAD * 8 {
            let mut bad = bytes.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Pointer::decode(&bad, STORE), None, "bit {bit}");
        }
    }
}
