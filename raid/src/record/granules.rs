//! Which parts of the array were never written since it was created, in granules of equal size. Pure.
//!
//! Costs: a bit a granule, at most 4 KiB in all; each question takes as long as its range has granules.

use std::ops::Range;

/// Granules an array is divided into at most.
pub const MOST_GRANULES: u64 = 32768;
/// Bytes of the smallest granule.
pub const SMALLEST_GRANULE: u64 = 4096;

/// Which parts of the array were never written since it was created.
///
/// Invariants: `size` is a power of two, at least [`SMALLEST_GRANULE`]; `bytes` take at most [`MOST_GRANULES`] of it,
/// the last maybe not whole; `bits` has just the words they need, and no bit set behind the last granule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granules {
    size: u64,
    bytes: u64,
    bits: Vec<u64>,
}

impl Granules {
    /// For an array of so many bytes: granules of at least `hint` bytes, and as small as their number allows.
    #[must_use]
    pub fn new(array_bytes: u64, hint: u64, all_untouched: bool) -> Self {
        let least = array_bytes.div_ceil(MOST_GRANULES).max(hint).max(SMALLEST_GRANULE);
        let Some(size) = least.checked_next_power_of_two() else { return Self::none() };
        let mut granules = Self { size, bytes: array_bytes, bits: Vec::new() };
        granules.bits.resize(granules.words_needed(), if all_untouched { u64::MAX } else { 0 });
        granules.mask_tail();
        granules
    }

    /// Nothing is known to be untouched.
    #[must_use]
    pub fn none() -> Self {
        Self { size: SMALLEST_GRANULE, bytes: 0, bits: Vec::new() }
    }

    /// Bytes a granule.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Granules in all.
    #[must_use]
    pub fn count(&self) -> usize {
        self.bytes.div_ceil(self.size) as usize
    }

    /// Whether anything is untouched.
    #[must_use]
    pub fn any(&self) -> bool {
        self.bits.iter().any(|&word| word != 0)
    }

    /// Whether every granule that the range touches is untouched. What lies outside the array never is.
    #[must_use]
    pub fn is_untouched(&self, range: &Range<u64>) -> bool {
        range.start >= range.end || (range.end <= self.bytes && self.over(range).all(|at| self.bit(at)))
    }

    /// Whether any granule that the range touches is untouched.
    #[must_use]
    pub fn any_untouched(&self, range: &Range<u64>) -> bool {
        self.over(range).any(|at| self.bit(at))
    }

    /// Takes note that the range is written; tells whether that was news.
    pub fn touch(&mut self, range: &Range<u64>) -> bool {
        let mut changed = false;
        for at in self.over(range) {
            changed |= self.bit(at);
            self.clear(at);
        }
        changed
    }

    /// Leaves untouched only what is so in both. Granules of another size say nothing.
    pub fn intersect(&mut self, other: &Self) {
        if other.size != self.size {
            self.bits.fill(0);
        } else if other.bytes == self.bytes {
            self.bits.iter_mut().zip(&other.bits).for_each(|(mine, theirs)| *mine &= theirs);
        } else {
            let mut other = other.clone();
            other.resize(self.bytes);
            if other.bytes == self.bytes {
                self.intersect(&other);
            } else {
                self.bits.fill(0);
            }
        }
    }

    /// Follows the array to another size. Nothing that is added counts as untouched; where it takes too many granules,
    /// nothing does at all.
    pub fn resize(&mut self, new_array_bytes: u64) {
        if new_array_bytes.div_ceil(self.size) > MOST_GRANULES {
            *self = Self::none();
            return;
        }
        let partial = !self.bytes.is_multiple_of(self.size);
        if new_array_bytes > self.bytes && partial {
            self.clear(self.count() - 1);
        }
        self.bytes = new_array_bytes;
        self.bits.resize(self.words_needed(), 0);
        self.mask_tail();
    }

    /// The untouched bytes of the array, as ranges in order that do not meet.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = (at..self.count()).find(|&granule| self.bit(granule))?;
            at = (first..self.count()).find(|&granule| !self.bit(granule)).unwrap_or(self.count());
            Some(first as u64 * self.size..(at as u64).saturating_mul(self.size).min(self.bytes))
        })
    }

    /// The untouched parts of a range, in order, apart from each other.
    #[must_use]
    pub fn within(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut parts: Vec<Range<u64>> = Vec::new();
        for at in self.over(range).filter(|&at| self.bit(at)) {
            let start = (at as u64 * self.size).max(range.start);
            let end = (at as u64 + 1).saturating_mul(self.size).min(self.bytes).min(range.end);
            match parts.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => parts.push(start..end),
            }
        }
        parts
    }

    /// The granules that a range touches, as far as it lies in the array.
    fn over(&self, range: &Range<u64>) -> Range<usize> {
        if range.start >= range.end.min(self.bytes) {
            return 0..0;
        }
        let first = (range.start / self.size) as usize;
        first..range.end.min(self.bytes).div_ceil(self.size) as usize
    }

    fn bit(&self, at: usize) -> bool {
        self.bits[at / 64] >> (at % 64) & 1 != 0
    }

    fn clear(&mut self, at: usize) {
        self.bits[at / 64] &= !(1 << (at % 64));
    }

    fn words_needed(&self) -> usize {
        self.count().div_ceil(64)
    }

    fn mask_tail(&mut self) {
        let used = self.count() % 64;
        if let Some(last) = self.bits.last_mut().filter(|_| used != 0) {
            *last &= (1 << used) - 1;
        }
    }

    /// Bytes of the array that the granules divide.
    pub(super) fn array_bytes(&self) -> u64 {
        self.bytes
    }

    /// A bit a granule, least significant first; zeroes behind the last.
    pub(super) fn words(&self) -> &[u64] {
        &self.bits
    }

    /// Granules as they were recorded, with more words than they need; `None` if none can be so.
    pub(super) fn from_parts(size: u64, bytes: u64, count: u64, words: &[u64]) -> Option<Self> {
        let possible = size.is_power_of_two() && size >= SMALLEST_GRANULE && count <= MOST_GRANULES;
        if !possible || bytes.div_ceil(size) != count {
            return None;
        }
        let mut granules = Self { size, bytes, bits: Vec::new() };
        granules.bits = words.get(..granules.words_needed())?.to_vec();
        granules.mask_tail();
        Some(granules)
    }
}

#[cfg(test)]
mod tests {
    // A list of one range is what is meant.
    #![allow(clippy::single_range_in_vec_init)]

    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn granules_are_as_small_as_their_number_allows() {
        let size = |bytes, hint| {
            let granules = Granules::new(bytes, hint, true);
            (granules.size(), granules.count())
        };
        assert_eq!(size(0, 0), (4096, 0));
        assert_eq!(size(1, 0), (4096, 1));
        assert_eq!(size(4097, 4096), (4096, 2));
        assert_eq!(size(MIB, 4097), (8192, 128));
        assert_eq!(size(32768 * 4096, 0), (4096, 32768));
        assert_eq!(size(32768 * 4096 + 1, 0), (8192, 16385));
        assert_eq!(size(u64::MAX, 0), (1 << 49, 32768));
        assert_eq!(size(u64::MAX, 1 << 63), (1 << 63, 2));
        assert_eq!(Granules::new(MIB, u64::MAX, true), Granules::none());
        assert!(!Granules::none().any() && !Granules::new(MIB, 0, false).any());
        let whole = Granules::new(u64::MAX, 0, true);
        assert_eq!(whole.ranges().collect::<Vec<_>>(), [0..u64::MAX]);
    }

    #[test]
    fn a_write_touches_all_of_its_granules() {
        let mut granules = Granules::new(10_000, 0, true);
        assert_eq!(granules.ranges().collect::<Vec<_>>(), [0..10_000]);
        assert!(granules.is_untouched(&(0..10_000)) && !granules.is_untouched(&(0..10_001)));
        assert!(!granules.is_untouched(&(10_000..10_001)) && !granules.any_untouched(&(10_000..12_000)));
        assert!(!granules.touch(&(5000..5000)) && !granules.touch(&(10_000..u64::MAX)));
        assert!(granules.touch(&(4095..4096)));
        assert!(!granules.touch(&(0..4096)));
        assert_eq!(granules.ranges().collect::<Vec<_>>(), [4096..10_000]);
        assert!(!granules.is_untouched(&(4095..4097)) && granules.any_untouched(&(4095..4097)));
        assert!(granules.touch(&(9999..20_000)));
        assert_eq!(granules.ranges().collect::<Vec<_>>(), [4096..8192]);
        assert!(granules.touch(&(0..u64::MAX)) && !granules.any());
    }

    #[test]
    fn what_an_array_grows_by_is_touched() {
        let resized = |bytes: u64, to: u64| {
            let mut granules = Granules::new(bytes, 0, true);
            granules.resize(to);
            (granules.count(), granules.ranges().collect::<Vec<_>>())
        };
        assert_eq!(resized(8192, 20_000), (5, vec![0..8192]));
        assert_eq!(resized(10_000, 10_001), (3, vec![0..8192]), "the granule that got more bytes");
        assert_eq!(resized(10_000, 10_000), (3, vec![0..10_000]));
        assert_eq!(resized(10_000, 5000), (2, vec![0..5000]));
        assert_eq!(resized(8192, 32768 * 4096), (32768, vec![0..8192]));
        assert_eq!(resized(8192, 32768 * 4096 + 1), (0, vec![]));
        let mut back = Granules::new(300 * 4096, 0, true);
        back.resize(70 * 4096);
        back.resize(300 * 4096);
        assert_eq!(back.ranges().collect::<Vec<_>>(), [0..70 * 4096]);
    }

    #[test]
    fn intersections_of_unlike_granules_are_cautious() {
        let both = |mine: (u64, u64), theirs: (u64, u64)| {
            let mut granules = Granules::new(mine.0, mine.1, true);
            granules.intersect(&Granules::new(theirs.0, theirs.1, true));
            granules.ranges().collect::<Vec<_>>()
        };
        assert_eq!(both((10_000, 0), (10_000, 0)), [0..10_000]);
        assert_eq!(both((10_000, 0), (10_000, 8192)), []);
        assert_eq!(both((20_000, 0), (10_000, 0)), [0..8192], "the other's last granule says less");
        assert_eq!(both((10_000, 0), (20_000, 0)), [0..10_000]);
        let mut granules = Granules::new(10_000, 0, true);
        granules.intersect(&Granules::none());
        assert_eq!((granules.any(), granules.count()), (false, 3));
    }

    proptest! {
        /// Against the plainest model there is: a flag a granule.
        #[test]
        fn granules_behave_like_flags(
            (bytes, all) in (0..80 * 4096u64, any::<bool>()),
            touched in prop::collection::vec((0..90 * 4096u64, 0..10_000u64), 0..8),
            asked in (0..90 * 4096u64, 0..20_000u64),
            other in (0..90 * 4096u64, 0..20_000u64),
        ) {
            let mut granules = Granules::new(bytes, 0, all);
            let mut model = vec![all; granules.count()];
            let over = |range: &Range<u64>, at: usize| {
                range.start < range.end && range.start < (at as u64 + 1) * 4096 && range.end > at as u64 * 4096
                    && range.start < bytes
            };
            for (start, len) in touched {
                let range = start..start + len;
                let news = (0..model.len()).filter(|&at| over(&range, at) && model[at]).count() > 0;
                prop_assert_eq!(granules.touch(&range), news);
                (0..model.len()).filter(|&at| over(&range, at)).for_each(|at| model[at] = false);
            }
            let asked = asked.0..asked.0 + asked.1;
            let met: Vec<bool> = (0..model.len()).filter(|&at| over(&asked, at)).map(|at| model[at]).collect();
            let inside = asked.end <= bytes;
            prop_assert_eq!(granules.any_untouched(&asked), met.contains(&true));
            prop_assert_eq!(granules.is_untouched(&asked), asked.is_empty() || (inside && !met.contains(&false)));
            prop_assert_eq!(granules.any(), model.contains(&true));
            let flags = |granules: &Granules| (0..granules.count()).map(|at| granules.bit(at)).collect::<Vec<_>>();
            prop_assert_eq!(&flags(&granules), &model);
            let ranges: Vec<_> = granules.ranges().collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert!(ranges.iter().all(|range| granules.is_untouched(range)));
            let untouched: u64 = (0..model.len() as u64)
                .filter(|&at| model[at as usize])
                .map(|at| 4096.min(bytes - at * 4096))
                .sum();
            prop_assert_eq!(ranges.iter().map(|range| range.end - range.start).sum::<u64>(), untouched);
            let other = other.0..other.0 + other.1;
            let mut second = Granules::new(bytes, 0, true);
            second.touch(&other);
            granules.intersect(&second);
            (0..model.len()).filter(|&at| over(&other, at)).for_each(|at| model[at] = false);
            prop_assert_eq!(flags(&granules), model);
        }
    }
}
