//! What md's metadata has no room for: two records beside it on each member, bytes ↔ value. Pure.
//!
//! They lie in the room that md leaves alone ([`Superblock::records_start`]), on members that were created here: record
//! A, and B right behind it. Records take turns by the parity of their sequence number, so that the one before stays
//! whole while the next is written. Each carries a copy of the member's superblock and is durable before that
//! superblock is written, so whatever a power cut leaves:
//!
//! - superblock old or new: the newest record with an equal copy belongs to it ([`matching`]);
//! - superblock torn: the newest record has what was being written ([`newest`]);
//! - superblock written by md meanwhile: no copy is equal, and neither record is used.
//!
//! A record is four pages of 4 KiB, little-endian; what is not named is written as zeroes and not looked at:
//!
//! ```text
//!     0 magic "dclg-rec"                                28 generations u32, at most 64
//!     8 crc32c u32 of everything behind it              32 bad ranges u32, at most 256
//!    12 version u32 = 1                                 36 granules u32, at most 32768
//!    16 sequence u64                                    40 bytes a granule u64, a power of two, at least 4096
//!    24 flags u32: 1 blank, 2 confirmed                 48 bytes of the array u64, as the granules divide it
//!    64 history, oldest first: id u64, events u64 at which the generation began
//!  4096 superblock, as written
//!  8192 untouched: a bit a granule, least significant first
//! 12288 bad ranges of the data area, in order, apart from each other: start u64, length u64, both in bytes
//! ```
//!
//! Blank: every member was all holes when the array was created, so untouched granules read as zeroes. Confirmed: the
//! last generation stands on every member that takes part in it.
//!
//! Guards against: torn writes and bit rot (crc32c), records of another array or member and records older than the
//! superblock (the copy inside), leftovers of something else (magic), records of a later version (version, flags).
//! Doubt means that a record is not used: then nothing counts as untouched, and md's own rules judge the member.
//!
//! [`Superblock::records_start`]: crate::superblock::Superblock::records_start

mod granules;
mod history;

pub use granules::{Granules, MOST_GRANULES, SMALLEST_GRANULE};
pub use history::{Generation, History, MOST_GENERATIONS, Relation};

use crate::range_set::RangeSet;
use crate::superblock::SUPER_BYTES;

/// Bytes of one record.
pub const RECORD_BYTES: usize = 16 << 10;
/// Bytes of the two records of a member.
pub const RECORDS_BYTES: u64 = 2 * RECORD_BYTES as u64;
/// Bad ranges a record holds.
pub const MOST_BAD_RANGES: usize = 256;

const MAGIC: &[u8; 8] = b"dclg-rec";
const VERSION: u32 = 1;
const BLANK: u32 = 1;
const CONFIRMED: u32 = 2;

const AT_CRC: usize = 8;
const AT_VERSION: usize = 12;
const AT_SEQUENCE: usize = 16;
const AT_FLAGS: usize = 24;
const AT_GENERATIONS: usize = 28;
const AT_BAD_COUNT: usize = 32;
const AT_GRANULES: usize = 36;
const AT_GRANULE_SIZE: usize = 40;
const AT_ARRAY_BYTES: usize = 48;
const AT_HISTORY: usize = 64;
const AT_SUPERBLOCK: usize = 4096;
const AT_UNTOUCHED: usize = AT_SUPERBLOCK + SUPER_BYTES;
const AT_BAD: usize = AT_UNTOUCHED + MOST_GRANULES as usize / 8;
const PAIR: usize = 16;
const _: () = assert!(AT_HISTORY + MOST_GENERATIONS * PAIR <= AT_SUPERBLOCK);
const _: () = assert!(AT_BAD + MOST_BAD_RANGES * PAIR == RECORD_BYTES);

/// Why a record can't be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// More bad ranges than a record has room for.
    #[error("it has {0} bad ranges, and its record holds no more than {MOST_BAD_RANGES}; replace it")]
    BadRanges(usize),
}

/// A record's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Counts the records written to this member: the higher is newer.
    pub sequence: u64,
    /// The member's superblock, as it is written.
    pub superblock: Box<[u8; SUPER_BYTES]>,
    /// Whether untouched granules read as zeroes.
    pub blank: bool,
    /// What was never written since the array was created.
    pub untouched: Granules,
    /// The generations that this member took part in.
    pub history: History,
    /// Bytes of the data area that hold no good data.
    pub bad: RangeSet,
}

impl Record {
    /// The record's [`RECORD_BYTES`] bytes.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        if self.bad.count() > MOST_BAD_RANGES {
            return Err(RecordError::BadRanges(self.bad.count()));
        }
        let (history, untouched) = (&self.history, &self.untouched);
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let mut bytes = vec![0; RECORD_BYTES];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, AT_VERSION, &VERSION.to_le_bytes());
        put(&mut bytes, AT_SEQUENCE, &self.sequence.to_le_bytes());
        let flags = flag(self.blank, BLANK) | flag(history.is_confirmed(), CONFIRMED);
        put(&mut bytes, AT_FLAGS, &flags.to_le_bytes());
        put(&mut bytes, AT_GENERATIONS, &(history.generations().len() as u32).to_le_bytes());
        put(&mut bytes, AT_BAD_COUNT, &(self.bad.count() as u32).to_le_bytes());
        put(&mut bytes, AT_GRANULES, &(untouched.count() as u32).to_le_bytes());
        put(&mut bytes, AT_GRANULE_SIZE, &untouched.size().to_le_bytes());
        put(&mut bytes, AT_ARRAY_BYTES, &untouched.array_bytes().to_le_bytes());
        put_pairs(&mut bytes, AT_HISTORY, history.generations().iter().map(|one| (one.id, one.events)));
        put(&mut bytes, AT_SUPERBLOCK, &self.superblock[..]);
        for (at, word) in untouched.words().iter().enumerate() {
            put(&mut bytes, AT_UNTOUCHED + 8 * at, &word.to_le_bytes());
        }
        put_pairs(&mut bytes, AT_BAD, self.bad.iter().map(|range| (range.start, range.end - range.start)));
        let crc = crc32c::crc32c(&bytes[AT_VERSION..]);
        put(&mut bytes, AT_CRC, &crc.to_le_bytes());
        Ok(bytes)
    }

    /// The record in bytes that were found; `None` if they are no intact one, or one that this version does not know.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let whole = bytes.len() == RECORD_BYTES
            && bytes.starts_with(MAGIC)
            && get32(bytes, AT_CRC) == crc32c::crc32c(&bytes[AT_VERSION..]);
        let flags = whole.then(|| get32(bytes, AT_FLAGS))?;
        if get32(bytes, AT_VERSION) != VERSION || flags & !(BLANK | CONFIRMED) != 0 {
            return None;
        }
        Some(Self {
            sequence: get64(bytes, AT_SEQUENCE),
            superblock: Box::new(*bytes[AT_SUPERBLOCK..].first_chunk()?),
            blank: flags & BLANK != 0,
            untouched: decode_untouched(bytes)?,
            history: decode_history(bytes, flags & CONFIRMED != 0)?,
            bad: decode_bad(bytes)?,
        })
    }
}

/// Which of its member's two records one with this sequence number is: 0 is A, 1 is B.
#[must_use]
pub fn slot_of(sequence: u64) -> u64 {
    sequence % 2
}

/// The record that belongs to the superblock found beside it, of the two found: the newest with an equal copy.
#[must_use]
pub fn matching(a: &[u8], b: &[u8], superblock_found: &[u8]) -> Option<Record> {
    newest_of([a, b], |record| record.superblock[..] == *superblock_found)
}

/// The newest of the two records found, where the superblock is damaged.
#[must_use]
pub fn newest(a: &[u8], b: &[u8]) -> Option<Record> {
    newest_of([a, b], |_| true)
}

fn newest_of(found: [&[u8]; 2], wanted: impl Fn(&Record) -> bool) -> Option<Record> {
    found.into_iter().filter_map(Record::decode).filter(wanted).max_by_key(|record| record.sequence)
}

fn decode_history(bytes: &[u8], confirmed: bool) -> Option<History> {
    let count = Some(get32(bytes, AT_GENERATIONS) as usize).filter(|&count| count <= MOST_GENERATIONS)?;
    let generations = pairs(bytes, AT_HISTORY, count).map(|(id, events)| Generation { id, events });
    History::from_parts(generations.collect(), confirmed)
}

fn decode_untouched(bytes: &[u8]) -> Option<Granules> {
    let words: Vec<u64> = (AT_UNTOUCHED..AT_BAD).step_by(8).map(|at| get64(bytes, at)).collect();
    let count = u64::from(get32(bytes, AT_GRANULES));
    Granules::from_parts(get64(bytes, AT_GRANULE_SIZE), get64(bytes, AT_ARRAY_BYTES), count, &words)
}

/// The bad ranges; `None` if one is empty, ends beyond all bytes, or does not lie behind the one before.
fn decode_bad(bytes: &[u8]) -> Option<RangeSet> {
    let count = get32(bytes, AT_BAD_COUNT) as usize;
    if count > MOST_BAD_RANGES {
        return None;
    }
    let mut before: Option<u64> = None;
    pairs(bytes, AT_BAD, count)
        .map(|(start, len)| {
            let end = start.checked_add(len).filter(|_| len > 0)?;
            let apart = before.is_none_or(|before| before < start);
            before = Some(end);
            apart.then_some(start..end)
        })
        .collect()
}

/// `count` pairs of words; the caller has checked that so many fit.
fn pairs(bytes: &[u8], at: usize, count: usize) -> impl Iterator<Item = (u64, u64)> + '_ {
    (0..count).map(move |pair| (get64(bytes, at + pair * PAIR), get64(bytes, at + pair * PAIR + 8)))
}

fn put_pairs(bytes: &mut [u8], at: usize, pairs: impl Iterator<Item = (u64, u64)>) {
    for (pair, (one, other)) in pairs.enumerate() {
        put(bytes, at + pair * PAIR, &one.to_le_bytes());
        put(bytes, at + pair * PAIR + 8, &other.to_le_bytes());
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]))
}

fn get64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECTOR: usize = 512;
    const MIB: u64 = 1 << 20;

    fn superblock(seed: u64) -> Box<[u8; SUPER_BYTES]> {
        let byte = |at: usize| (seed.wrapping_add(at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        Box::new(std::array::from_fn(byte))
    }

    fn sample_history(generations: u64) -> History {
        let mut history = History::default();
        for at in 0..generations {
            history.begin(at + 1, at * 10);
            history.confirm();
        }
        history
    }

    fn sample(sequence: u64) -> Record {
        let mut untouched = Granules::new(100 * MIB + 512, MIB, true);
        untouched.touch(&(3 * MIB..5 * MIB));
        Record {
            sequence,
            superblock: superblock(7),
            blank: true,
            untouched,
            history: sample_history(3),
            bad: [4096..8192, MIB..MIB + 512].into_iter().collect(),
        }
    }

    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let crc = crc32c::crc32c(&bytes[AT_VERSION..]);
        put(&mut bytes, AT_CRC, &crc.to_le_bytes());
        bytes
    }

    /// What becomes of the sample with other bytes somewhere, under a checksum that is right.
    fn forged(at: usize, value: &[u8]) -> Option<Record> {
        let mut bytes = sample(5).encode().unwrap();
        put(&mut bytes, at, value);
        Record::decode(&sealed(bytes))
    }

    prop_compose! {
        fn any_granules()(
            bytes in prop_oneof![0..40 * SMALLEST_GRANULE, any::<u64>()],
            hint in prop_oneof![0..3 * SMALLEST_GRANULE, any::<u64>()],
            untouched: bool,
            touched in prop::collection::vec((any::<u64>(), 0..40 * SMALLEST_GRANULE), 0..5),
        ) -> Granules {
            let mut granules = Granules::new(bytes, hint, untouched);
            for (start, len) in touched {
                let start = start % bytes.max(1);
                granules.touch(&(start..start.saturating_add(len)));
            }
            granules
        }
    }

    prop_compose! {
        fn any_record()(
            (sequence, seed, blank) in any::<(u64, u64, bool)>(),
            untouched in any_granules(),
            generations in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..80),
            bad in prop::collection::vec((0..1u64 << 40, 1..1u64 << 20), 0..=MOST_BAD_RANGES),
        ) -> Record {
            let mut history = History::default();
            for (id, events, confirmed) in generations {
                history.begin(id, events);
                if confirmed {
                    history.confirm();
                }
            }
            let bad = bad.into_iter().map(|(start, len)| start..start + len).collect();
            Record { sequence, superblock: superblock(seed), blank, untouched, history, bad }
        }
    }

    #[test]
    fn the_layout_is_what_the_head_says() {
        let bytes = sample(0x0102).encode().unwrap();
        assert_eq!(bytes.len(), 16384);
        assert_eq!(bytes[..8], *b"dclg-rec");
        assert_eq!(bytes[12..28], [1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[28..40], [3, 0, 0, 0, 2, 0, 0, 0, 101, 0, 0, 0]);
        assert_eq!((get64(&bytes, 40), get64(&bytes, 48)), (MIB, 100 * MIB + 512));
        assert_eq!(pairs(&bytes, 64, 4).collect::<Vec<_>>(), [(1, 0), (2, 10), (3, 20), (0, 0)]);
        assert_eq!(bytes[4096..8192], superblock(7)[..]);
        assert_eq!(
            bytes[8192..8192 + 14],
            [0xe7, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 31, 0]
        );
        assert_eq!(pairs(&bytes, 12288, 3).collect::<Vec<_>>(), [(4096, 4096), (MIB, 512), (0, 0)]);
        assert_eq!(get32(&bytes, 8), crc32c::crc32c(&bytes[12..]));
        assert_eq!((slot_of(6), slot_of(7)), (0, 1));
    }

    #[test]
    fn bad_ranges_beyond_the_room_are_an_error() {
        let with = |count: u64| {
            let bad = (0..count).map(|at| at * 8192..at * 8192 + 4096).collect();
            Record { bad, ..sample(1) }.encode()
        };
        assert!(with(256).is_ok_and(|bytes| Record::decode(&bytes).is_some()));
        assert_eq!(with(257), Err(RecordError::BadRanges(257)));
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed() {
        let mut bytes = sample(5).encode().unwrap();
        for bit in 0..8 * RECORD_BYTES {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(&bytes), None, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(Record::decode(&bytes), Some(sample(5)));
        assert_eq!(Record::decode(&bytes[1..]), None);
        assert_eq!(Record::decode(&[&bytes[..], &[0]].concat()), None);
        assert_eq!(Record::decode(&[]), None);
    }

    #[test]
    fn torn_in_one_place_it_is_neither() {
        let (old, new) = (sample(5), sample(7));
        let new = Record { superblock: superblock(8), untouched: Granules::none(), ..new };
        let (old, new) = (old.encode().unwrap(), new.encode().unwrap());
        for cut in (0..=RECORD_BYTES).step_by(SECTOR) {
            let torn = [&new[..cut], &old[cut..]].concat();
            let wanted = [&old, &new].into_iter().any(|whole| *whole == torn);
            assert_eq!(Record::decode(&torn).is_some(), wanted, "cut at {cut}");
        }
    }

    #[test]
    fn hostile_fields_are_refused() {
        assert_eq!(forged(AT_SEQUENCE, &6u64.to_le_bytes()), Some(sample(6)), "forging itself works");
        assert_eq!(forged(60, &[1]), Some(sample(5)), "a reserved byte");
        assert_eq!(forged(AT_UNTOUCHED + 12, &[0xff]), Some(sample(5)), "bits behind the last granule");
        for version in [0, 2, u32::MAX] {
            assert_eq!(forged(AT_VERSION, &version.to_le_bytes()), None, "version {version}");
        }
        for flags in [4, 7, 1 << 31] {
            assert_eq!(forged(AT_FLAGS, &u32::to_le_bytes(flags)), None, "flags {flags:#x}");
        }
        for count in [65, u32::MAX, 1 << 28] {
            assert_eq!(forged(AT_GENERATIONS, &count.to_le_bytes()), None, "{count} generations");
        }
        assert_eq!(forged(AT_GENERATIONS, &[0]), None, "the last of none is confirmed");
        assert!(forged(AT_GENERATIONS, &[64]).is_some());
        for count in [3, 257, u32::MAX, 1 << 28] {
            assert_eq!(forged(AT_BAD_COUNT, &count.to_le_bytes()), None, "{count} bad ranges");
        }
        for count in [0, 100, 102, 32769, u32::MAX] {
            assert_eq!(forged(AT_GRANULES, &u32::to_le_bytes(count)), None, "{count} granules");
        }
        for size in [0, 1, 512, MIB - 1, MIB / 2, 2 * MIB, u64::MAX, 1 << 63] {
            assert_eq!(forged(AT_GRANULE_SIZE, &size.to_le_bytes()), None, "granules of {size}");
        }
        // A size that fits the count, but is no power of two, or too small.
        let geometry = |count: u32, size: u64, bytes: u64| {
            let words = [&count.to_le_bytes()[..], &size.to_le_bytes(), &bytes.to_le_bytes()].concat();
            forged(AT_GRANULES, &words)
        };
        assert!(geometry(32768, 4096, 32768 * 4096).is_some());
        assert_eq!(geometry(32769, 4096, 32769 * 4096), None);
        assert_eq!(geometry(2, 2048, 4096), None);
        assert_eq!(geometry(2, 12288, 24576), None);
        assert!(geometry(2, 1 << 63, u64::MAX).is_some_and(|record| record.untouched.ranges().count() == 1));
    }

    #[test]
    fn bad_ranges_stand_in_order_and_apart() {
        let bad = |ranges: [(u64, u64); 2]| {
            let words = ranges.into_iter().flat_map(|(start, len)| [start, len]);
            forged(AT_BAD, &words.flat_map(u64::to_le_bytes).collect::<Vec<_>>())
        };
        assert!(bad([(0, 512), (513, u64::MAX - 513)]).is_some());
        assert_eq!(bad([(0, 512), (513, 0)]), None, "empty");
        assert_eq!(bad([(0, 0), (513, 1)]), None, "empty");
        assert_eq!(bad([(0, 512), (513, u64::MAX - 512)]), None, "overflow");
        assert_eq!(bad([(0, 512), (512, 512)]), None, "meeting");
        assert_eq!(bad([(0, 512), (511, 512)]), None, "overlapping");
        assert_eq!(bad([(512, 512), (0, 512)]), None, "out of order");
    }

    #[test]
    fn the_record_of_the_superblock_is_found() {
        let of = |sequence, seed| Record { superblock: superblock(seed), ..sample(sequence) };
        let bytes = |record: &Record| record.encode().unwrap();
        let (old, new) = (of(4, 1), of(5, 2));
        let (a, b) = (bytes(&old), bytes(&new));
        assert_eq!(matching(&a, &b, &superblock(1)[..]), Some(old.clone()), "cut before the superblock");
        assert_eq!(matching(&a, &b, &superblock(2)[..]), Some(new.clone()));
        assert_eq!(matching(&a, &b, &superblock(3)[..]), None, "md wrote meanwhile");
        assert_eq!(matching(&a, &b, &superblock(2)[1..]), None);
        assert_eq!(newest(&a, &b), Some(new.clone()));
        let (torn, same) = ([&a[..512], &b[512..]].concat(), bytes(&of(6, 2)));
        assert_eq!(newest(&a, &torn), Some(old.clone()));
        assert_eq!(newest(&torn, &b), Some(new.clone()));
        assert_eq!(newest(&torn, &torn), None);
        assert_eq!(matching(&same, &b, &superblock(2)[..]), Some(of(6, 2)), "the newer of two that match");
        let far = bytes(&of(u64::MAX, 2));
        assert_eq!(newest(&same, &far), Some(of(u64::MAX, 2)));
        assert_eq!(newest(&[], &b), Some(new));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(record in any_record()) {
            let bytes = record.encode().unwrap();
            prop_assert_eq!(Record::decode(&bytes), Some(record));
        }

        #[test]
        fn no_changed_byte_goes_unnoticed(record in any_record(), at in 0..RECORD_BYTES, change in 1..=255u8) {
            let mut bytes = record.encode().unwrap();
            bytes[at] ^= change;
            prop_assert_eq!(Record::decode(&bytes), None);
        }

        /// Whichever sectors of the new record reached the disk.
        #[test]
        fn torn_it_is_neither(old in any_record(), new in any_record(), written: u32, alike: bool) {
            let new = if alike { Record { sequence: new.sequence, bad: new.bad, ..old.clone() } } else { new };
            let (old, new) = (old.encode().unwrap(), new.encode().unwrap());
            let sectors = old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate();
            let torn: Vec<u8> =
                sectors.flat_map(|(at, (old, new))| if written >> at & 1 == 1 { new } else { old }).copied().collect();
            prop_assert_eq!(Record::decode(&torn).is_some(), torn == old || torn == new);
        }

        /// Whatever a disk may hold under a checksum that is right.
        #[test]
        fn garbage_does_no_harm(
            record in any_record(),
            patches in prop::collection::vec((prop_oneof![AT_VERSION..AT_HISTORY, 0..RECORD_BYTES], any::<u8>()), 0..6),
            asked: (u64, u64),
        ) {
            let mut bytes = record.encode().unwrap();
            for (at, byte) in patches {
                bytes[at] = byte;
            }
            if let Some(mut found) = Record::decode(&sealed(bytes)) {
                let again = found.encode().map(|bytes| Record::decode(&bytes));
                prop_assert_eq!(again, Ok(Some(found.clone())));
                let asked = asked.0..asked.1;
                let untouched = &mut found.untouched;
                prop_assert!(asked.is_empty() || !untouched.is_untouched(&asked) || untouched.any_untouched(&asked));
                untouched.touch(&asked);
                prop_assert!(!untouched.any_untouched(&asked));
                untouched.resize(asked.end);
                prop_assert!(untouched.ranges().all(|range| !range.is_empty() && range.end <= asked.end));
            }
        }
    }
}
