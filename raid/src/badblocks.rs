//! md's bad-block log: bytes ↔ the ranges of a member's data area that hold no good data. Pure.
//!
//! It is an array of little-endian u64, 512 to 4 KiB, ended by one of all ones or by the end of its room:
//!
//! ```text
//!   bits 63..10  first unit, counted from the start of the *device*
//!   bits  9..0   units, 1 to 512
//! ```
//!
//! A unit is a sector, or several where the superblock gives a shift. Zero is no entry: mdadm has made logs of zeroes,
//! and md passes over them.
//!
//! What stands in a log is not believed further than it makes sense, and doubt counts as bad: a length of zero at some
//! position is one unit, a length over 512 is taken as it stands, and an end beyond all devices is cut there. What lies
//! before the data area is cut off: nothing is read from there.
//!
//! Source: `badblocks.h` and `md.c` of Linux.

use crate::range_set::RangeSet;
use crate::superblock::SECTOR;
use std::ops::Range;

/// Units an entry can stand for.
const MOST_UNITS: u64 = 512;
const LENGTH_BITS: u32 = 10;
const LENGTH_MASK: u64 = (1 << LENGTH_BITS) - 1;
const END: u64 = u64::MAX;
/// Shifts beyond this give units larger than any device; the superblock that has one is refused.
const MOST_SHIFT: u8 = 32;

/// The ranges of the data area, which begins at byte `data_start` of the device, that a log calls bad.
#[must_use]
pub fn decode(bytes: &[u8], shift: u8, data_start: u64) -> RangeSet {
    let unit = u128::from(SECTOR) << shift.min(MOST_SHIFT);
    let within = |at: u128| u64::try_from(at.saturating_sub(u128::from(data_start))).unwrap_or(u64::MAX);
    let entries = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry));
    entries
        .take_while(|&entry| entry != END)
        .filter(|&entry| entry != 0)
        .map(|entry| {
            let (first, units) = (u128::from(entry >> LENGTH_BITS), u128::from((entry & LENGTH_MASK).max(1)));
            within(first * unit)..within((first + units) * unit)
        })
        .collect()
}

/// A log of `room` bytes that says so; `None` if it takes more entries than fit, or lies beyond what an entry can name.
/// Ranges are rounded out to whole units.
#[must_use]
pub fn encode(bad: &RangeSet, data_start: u64, shift: u8, room: usize) -> Option<Vec<u8>> {
    let unit = u128::from(SECTOR) << shift.min(MOST_SHIFT);
    let units = |range: Range<u64>| -> Option<Range<u64>> {
        let (start, end) = (
            u128::from(range.start) + u128::from(data_start),
            u128::from(range.end) + u128::from(data_start),
        );
        Some(u64::try_from(start / unit).ok()?..u64::try_from(end.div_ceil(unit)).ok()?)
    };
    // Rounding out may make ranges meet: together they take fewer entries.
    let whole: RangeSet = bad.iter().map(units).collect::<Option<_>>()?;
    let mut bytes = vec![0xff; room];
    let mut entries = bytes.as_chunks_mut::<8>().0.iter_mut();
    for range in whole.iter() {
        // Before the first entry is written: a range of the whole address space would take for ever.
        if range.end > END >> LENGTH_BITS {
            return None;
        }
        let mut first = range.start;
        while first < range.end {
            let count = (range.end - first).min(MOST_UNITS);
            *entries.next()? = ((first << LENGTH_BITS) | count).to_le_bytes();
            first += count;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    // A set of one range is what is meant.
    #![allow(clippy::single_range_in_vec_init)]

    use super::*;
    use proptest::prelude::*;

    const DATA: u64 = 1 << 20;
    const FIRST: u64 = DATA / SECTOR;

    fn log(entries: &[u64]) -> Vec<u8> {
        let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        bytes.resize(4096, 0xff);
        bytes
    }

    fn ranges(set: &RangeSet) -> Vec<Range<u64>> {
        set.iter().collect()
    }

    #[test]
    fn entries_are_sectors_of_the_device() {
        let bytes = log(&[(FIRST + 100) << 10 | 8]);
        assert_eq!(ranges(&decode(&bytes, 0, DATA)), [51_200..55_296]);
        assert_eq!(encode(&[51_200..55_296].into_iter().collect(), DATA, 0, 4096), Some(bytes));
        assert_eq!(ranges(&decode(&log(&[(100 << 10) | 8]), 3, 0)), [409_600..442_368]);
        assert_eq!(encode(&RangeSet::default(), DATA, 0, 4096), Some(vec![0xff; 4096]));
    }

    #[test]
    fn nonsense_counts_as_bad() {
        let at = |sector: u64, len: u64| ranges(&decode(&log(&[sector << 10 | len]), 0, DATA));
        assert_eq!(at(FIRST + 1, 0), [512..1024], "no length");
        assert_eq!(at(FIRST, 1000), [0..512_000], "more than md writes");
        assert_eq!(at(0, 0), [], "no entry");
        assert_eq!(at(FIRST - 4, 4), [], "before the data");
        assert_eq!(at(FIRST - 4, 5), [0..512], "over its edge");
        assert!(decode(&log(&[u64::MAX - 1]), 32, DATA).is_empty(), "beyond all devices");
        let across = decode(&log(&[(u64::MAX << 10) | 512]), 1, 0);
        assert_eq!(ranges(&across), [u64::MAX - 1023..u64::MAX], "over the end of all devices");
        let ended = log(&[FIRST << 10 | 1, END, (FIRST + 9) << 10 | 1]);
        assert_eq!(ranges(&decode(&ended, 0, DATA)), [0..512], "what stands behind the end");
        let gap = log(&[0, FIRST << 10 | 1]);
        assert_eq!(ranges(&decode(&gap, 0, DATA)), [0..512], "zero is no end");
        assert_eq!(ranges(&decode(&[1; 7], 0, DATA)), [], "no whole entry");
    }

    #[test]
    fn what_does_not_fit_is_not_written() {
        let whole = |len: u64| [0..len].into_iter().collect::<RangeSet>();
        let split = encode(&whole(513 * SECTOR), DATA, 0, 4096).unwrap();
        assert_eq!(split[..24], log(&[FIRST << 10 | 512, (FIRST + 512) << 10 | 1])[..24]);
        let most = 512 * 512 * SECTOR;
        assert!(encode(&whole(most), DATA, 0, 4096).is_some_and(|bytes| bytes[4088..] != [0xff; 8]));
        assert_eq!(encode(&whole(most + 1), DATA, 0, 4096), None);
        assert!(encode(&whole(most + 1), DATA, 1, 4096).is_some());
        assert_eq!(encode(&whole(u64::MAX), DATA, 0, 4096), None);
        let far = (1u64 << 54) * SECTOR;
        assert_eq!(encode(&[far..far + 1].into_iter().collect(), 0, 0, 4096), None);
        assert_eq!(encode(&whole(1), DATA, 0, 0), None);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            parts in prop::collection::vec((0..1u64 << 30, 1..1u64 << 20), 0..40),
            shift in 0..6u8,
        ) {
            let bad: RangeSet = parts.iter().map(|&(start, len)| start..start + len).collect();
            let unit = SECTOR << shift;
            let rounded: RangeSet =
                bad.iter().map(|range| range.start / unit * unit..range.end.next_multiple_of(unit)).collect();
            let entries: u64 =
                rounded.iter().map(|range| ((range.end - range.start) / unit).div_ceil(512)).sum();
            match encode(&bad, DATA, shift, 4096) {
                Some(bytes) => prop_assert_eq!(decode(&bytes, shift, DATA), rounded),
                None => prop_assert!(entries > 512),
            }
            prop_assert_eq!(encode(&bad, DATA, shift, 4096).is_some(), entries <= 512);
        }

        #[test]
        fn garbage_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300), shift: u8, data: u64) {
            let found = decode(&bytes, shift, data);
            prop_assert!(found.count() <= bytes.len() / 8);
        }
    }
}
