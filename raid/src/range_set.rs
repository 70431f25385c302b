//! A set of byte positions, kept as disjoint half-open ranges in order. Pure.
//!
//! Invariant: ranges are not empty, do not touch, and stand in order; so the set has one form only.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of byte positions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// Start → end.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Bytes in it.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }

    /// Adds a range.
    pub fn insert(&mut self, range: Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        if start >= end {
            return;
        }
        if let Some((&before, &before_end)) = self.ranges.range(..start).next_back()
            && before_end >= start
        {
            start = before;
            end = end.max(before_end);
        }
        while let Some((&next, &next_end)) = self.ranges.range(start..=end).next() {
            self.ranges.remove(&next);
            end = end.max(next_end);
        }
        self.ranges.insert(start, end);
    }

    /// Ranges in it.
    #[must_use]
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Its ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&start, &end)| start..end)
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: &Range<u64>) {
        if range.start >= range.end {
            return;
        }
        if let Some((&before, &before_end)) = self.ranges.range(..range.start).next_back()
            && before_end > range.start
        {
            self.ranges.insert(before, range.start);
            if before_end > range.end {
                self.ranges.insert(range.end, before_end);
            }
        }
        while let Some((&next, &next_end)) = self.ranges.range(range.clone()).next() {
            self.ranges.remove(&next);
            if next_end > range.end {
                self.ranges.insert(range.end, next_end);
            }
        }
    }

    /// Whether any byte of the range is in the set.
    #[must_use]
    pub fn intersects(&self, range: &Range<u64>) -> bool {
        range.start < range.end
            && self.ranges.range(..range.end).next_back().is_some_and(|(_, &end)| end > range.start)
    }

    /// Whether every byte of the range is in the set. An empty range always is.
    #[must_use]
    pub fn covers(&self, range: &Range<u64>) -> bool {
        range.start >= range.end
            || self.ranges.range(..=range.start).next_back().is_some_and(|(_, &end)| end >= range.end)
    }

    /// The parts of the range that are in the set, in order.
    #[must_use]
    pub fn within(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let before = self.ranges.range(..range.start).next_back().map(|(&start, &end)| start..end);
        let rest = self.ranges.range(range.clone()).map(|(&start, &end)| start..end);
        before
            .into_iter()
            .chain(rest)
            .map(|found| found.start.max(range.start)..found.end.min(range.end))
            .filter(|found| found.start < found.end)
            .collect()
    }

    /// The first range that reaches past `from`, from there on.
    #[must_use]
    pub fn next(&self, from: u64) -> Option<Range<u64>> {
        let at = self.ranges.range(..=from).next_back().filter(|&(_, &end)| end > from);
        at.or_else(|| self.ranges.range(from..).next()).map(|(&start, &end)| start.max(from)..end)
    }
}

impl Extend<Range<u64>> for RangeSet {
    fn extend<I: IntoIterator<Item = Range<u64>>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert(range);
        }
    }
}

impl FromIterator<Range<u64>> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::default();
        set.extend(ranges);
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against the plainest model there is: an array of flags.
        #[test]
        fn behaves_like_a_set_of_positions(
            steps in prop::collection::vec((any::<bool>(), 0..60u64, 0..20u64), 1..40),
            asked in (0..60u64, 0..20u64),
        ) {
            let (mut set, mut model) = (RangeSet::default(), [false; 80]);
            for (add, start, len) in steps {
                let range = start..start + len;
                model[start as usize..(start + len) as usize].fill(add);
                if add { set.insert(range) } else { set.remove(&range) }
            }
            let positions: Vec<u64> = (0..80).filter(|&at| model[at as usize]).collect();
            let listed: Vec<u64> = set.within(&(0..80)).into_iter().flatten().collect();
            prop_assert_eq!(&listed, &positions);
            prop_assert_eq!(set.len(), positions.len() as u64);
            prop_assert_eq!(set.is_empty(), positions.is_empty());
            let asked = asked.0..asked.0 + asked.1;
            let inside: Vec<u64> = positions.iter().copied().filter(|at| asked.contains(at)).collect();
            prop_assert_eq!(set.intersects(&asked), !inside.is_empty());
            prop_assert_eq!(set.covers(&asked), inside.len() as u64 == asked.end - asked.start);
            prop_assert_eq!(set.within(&asked).into_iter().flatten().collect::<Vec<_>>(), inside);
            let next = positions.iter().copied().find(|&at| at >= asked.start);
            prop_assert_eq!(set.next(asked.start).map(|range| range.start), next);
            let ranges: Vec<_> = set.within(&(0..80));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "ranges touch");
            prop_assert_eq!(set.count(), ranges.len());
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), ranges);
        }

        /// Whatever the order and however the ranges overlap, the set is the same.
        #[test]
        fn a_union_is_what_either_holds(
            one in prop::collection::vec((0..60u64, 0..20u64), 0..12),
            other in prop::collection::vec((0..60u64, 0..20u64), 0..12),
        ) {
            let ranges = |of: &[(u64, u64)]| of.iter().map(|&(start, len)| start..start + len).collect::<Vec<_>>();
            let (one, other) = (ranges(&one), ranges(&other));
            let mut union: RangeSet = one.iter().cloned().collect();
            union.extend(other.iter().cloned());
            let backwards: RangeSet = other.iter().chain(&one).rev().cloned().collect();
            prop_assert_eq!(&union, &backwards);
            for at in 0..80 {
                let held = one.iter().chain(&other).any(|range| range.contains(&at));
                prop_assert_eq!(union.covers(&(at..at + 1)), held);
            }
        }
    }
}
