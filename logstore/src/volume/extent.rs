//! Free space of a volume, in extents. Pure: what is free is what no record of the catalog claims.
//!
//! Invariants: free runs do not overlap, do not touch (neighbours are joined), lie in the space region, and start and
//! end on a multiple of [`UNIT`]. Freeing what is free, or what lies outside, is refused and changes nothing.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Space is given out in multiples of this many bytes: a batch of a default producer is 16 KiB, a page of any disk
/// 4 KiB; less would fragment, more would waste the end of every small partition.
pub const UNIT: u64 = 64 * 1024;

/// A run of bytes on the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First byte on the volume.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

impl Extent {
    /// Byte after the last.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.at.saturating_add(self.len)
    }

    /// Whether all of another one lies within it.
    #[must_use]
    pub fn contains(&self, other: &Self) -> bool {
        other.at >= self.at && other.at.checked_add(other.len).is_some_and(|end| end <= self.end())
    }
}

/// Rounds up to whole units.
#[must_use]
pub fn round_up(bytes: u64) -> u64 {
    bytes.div_ceil(UNIT).saturating_mul(UNIT)
}

/// An extent that cannot be taken or given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the extent of {} bytes at {} is out of place or claimed twice", .0.len, .0.at)]
pub struct Misplaced(pub Extent);

/// The free runs of a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeSpace {
    region: Extent,
    /// Start → length.
    runs: BTreeMap<u64, u64>,
    free: u64,
    /// Where the last search ended, so that the front of the region is not searched over and over.
    cursor: u64,
}

impl FreeSpace {
    /// A region of which everything is free. Its bounds are narrowed to whole units.
    #[must_use]
    pub fn new(region: Extent) -> Self {
        let at = round_up(region.at);
        let end = region.end() / UNIT * UNIT;
        let region = Extent { at, len: end.saturating_sub(at) };
        let mut runs = BTreeMap::new();
        if region.len > 0 {
            runs.insert(region.at, region.len);
        }
        Self { region, runs, free: region.len, cursor: region.at }
    }

    /// Bytes in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.region.len
    }

    /// Bytes free.
    #[must_use]
    pub fn free(&self) -> u64 {
        self.free
    }

    fn in_place(&self, extent: Extent) -> Result<(), Misplaced> {
        let aligned = extent.at.is_multiple_of(UNIT) && extent.len.is_multiple_of(UNIT) && extent.len > 0;
        let inside = extent.at >= self.region.at
            && extent.at.checked_add(extent.len).is_some_and(|end| end <= self.region.end());
        if aligned && inside { Ok(()) } else { Err(Misplaced(extent)) }
    }

    /// Takes a given extent, all of which must be free.
    pub fn claim(&mut self, extent: Extent) -> Result<(), Misplaced> {
        self.in_place(extent)?;
        let run = self.runs.range(..=extent.at).next_back().map(|(&at, &len)| Extent { at, len });
        let Some(run) = run.filter(|run| run.end() >= extent.end()) else { return Err(Misplaced(extent)) };
        self.runs.remove(&run.at);
        if extent.at > run.at {
            self.runs.insert(run.at, extent.at - run.at);
        }
        if run.end() > extent.end() {
            self.runs.insert(extent.end(), run.end() - extent.end());
        }
        self.free -= extent.len;
        Ok(())
    }

    /// Takes `want` bytes in one piece if there is one, else the largest piece there is: first what follows `after`,
    /// so that a segment stays in one run, then the next run that is large enough.
    pub fn allocate(&mut self, want: u64, after: Option<u64>) -> Option<Extent> {
        let want = round_up(want.max(1));
        let found = self.follow(want, after).or_else(|| self.search(want))?;
        self.claim(found).ok()?;
        self.cursor = found.end();
        Some(found)
    }

    fn follow(&self, want: u64, after: Option<u64>) -> Option<Extent> {
        let at = after?;
        let &len = self.runs.get(&at)?;
        // A short run here would only make the next extent start elsewhere.
        (len >= want).then_some(Extent { at, len: want })
    }

    fn search(&self, want: u64) -> Option<Extent> {
        let ahead = self.runs.range(self.cursor..);
        let mut all = ahead.chain(self.runs.range(..self.cursor)).map(|(&at, &len)| Extent { at, len });
        if let Some(run) = all.find(|run| run.len >= want) {
            return Some(Extent { at: run.at, len: want });
        }
        self.runs.iter().map(|(&at, &len)| Extent { at, len }).max_by_key(|run| run.len)
    }

    /// The first free run that reaches past `from`, from there on, and `most` bytes of it at most.
    #[must_use]
    pub fn next_free(&self, from: u64, most: u64) -> Option<Extent> {
        let before = self.runs.range(..=from).next_back().filter(|&(&at, &len)| at + len > from);
        let (&at, &len) = before.or_else(|| self.runs.range(from..).next())?;
        let start = at.max(from);
        Some(Extent { at: start, len: (at + len - start).min(most / UNIT * UNIT) })
    }

    /// Gives an extent back, no part of which may be free.
    pub fn release(&mut self, extent: Extent) -> Result<(), Misplaced> {
        self.in_place(extent)?;
        let before = self.runs.range(..extent.end()).next_back().map(|(&at, &len)| Extent { at, len });
        if before.is_some_and(|run| run.end() > extent.at) {
            return Err(Misplaced(extent));
        }
        let mut joined = extent;
        if let Some(run) = before.filter(|run| run.end() == extent.at) {
            self.runs.remove(&run.at);
            joined = Extent { at: run.at, len: run.len + joined.len };
        }
        if let Some(len) = self.runs.remove(&extent.end()) {
            joined.len += len;
        }
        self.runs.insert(joined.at, joined.len);
        self.free += extent.len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UNITS: u64 = 64;

    fn space() -> FreeSpace {
        FreeSpace::new(Extent { at: UNIT - 5, len: UNITS * UNIT + 9 })
    }

    proptest! {
        /// Against a model of one flag a unit: no unit is given out twice, the sums are right, runs are joined.
        #[test]
        fn space_is_given_out_once(steps in prop::collection::vec((any::<bool>(), 1u64..20, any::<u16>()), 1..200)) {
            let mut space = space();
            let mut used = vec![false; UNITS as usize];
            let mut held: Vec<Extent> = Vec::new();
            for (take, units, pick) in steps {
                if take || held.is_empty() {
                    let after = held.last().map(Extent::end);
                    if let Some(extent) = space.allocate(units * UNIT - 1, after) {
                        prop_assert!(extent.len <= units * UNIT);
                        for unit in extent.at / UNIT..extent.end() / UNIT {
                            prop_assert!(!std::mem::replace(&mut used[unit as usize - 1], true));
                        }
                        held.push(extent);
                    } else {
                        prop_assert!(used.iter().all(|&unit| unit));
                    }
                } else {
                    let extent = held.swap_remove(pick as usize % held.len());
                    space.release(extent).unwrap();
                    prop_assert_eq!(space.release(extent), Err(Misplaced(extent)));
                    for unit in extent.at / UNIT..extent.end() / UNIT {
                        used[unit as usize - 1] = false;
                    }
                }
                let free = used.iter().filter(|&&unit| !unit).count() as u64 * UNIT;
                prop_assert_eq!(space.free(), free);
                // A walk over free runs, a piece at a time, comes by every free unit once.
                let (mut at, mut seen) = (0, 0);
                while let Some(run) = space.next_free(at, 3 * UNIT + 5) {
                    prop_assert!(run.at >= at && run.len > 0 && run.len <= 3 * UNIT);
                    prop_assert!((run.at / UNIT..run.end() / UNIT).all(|unit| !used[unit as usize - 1]));
                    (at, seen) = (run.end(), seen + run.len);
                }
                prop_assert_eq!(seen, free);
                prop_assert_eq!(space.runs.values().sum::<u64>(), free);
                let mut last_end = 0;
                for (&at, &len) in &space.runs {
                    prop_assert!(at > last_end, "neighbours are joined");
                    last_end = at + len;
                }
            }
            // Rebuilding from what is held gives the same space, as opening a store does.
            let mut rebuilt = self::space();
            for extent in &held {
                rebuilt.claim(*extent).unwrap();
            }
            prop_assert_eq!(rebuilt.runs, space.runs);
        }
    }

    #[test]
    fn what_is_out_of_place_is_refused() {
        let mut space = space();
        let before = space.clone();
        for extent in [
            Extent { at: 0, len: UNIT },
            Extent { at: UNIT, len: 0 },
            Extent { at: UNIT + 1, len: UNIT },
            Extent { at: UNIT, len: u64::MAX / UNIT * UNIT },
            Extent { at: UNIT, len: (UNITS + 1) * UNIT },
        ] {
            assert_eq!(space.claim(extent), Err(Misplaced(extent)));
            assert_eq!(space.release(extent), Err(Misplaced(extent)));
        }
        assert_eq!(space, before);
        space.claim(Extent { at: 2 * UNIT, len: UNIT }).unwrap();
        assert!(space.claim(Extent { at: UNIT, len: 2 * UNIT }).is_err());
    }
}
