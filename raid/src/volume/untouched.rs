//! What of the array was never written, in memory: asked by every change, and told to the members' records before the
//! first write of a granule begins.
//!
//! Invariant: a granule that any data was submitted to is touched in the records of all members, durably. So what they
//! call untouched holds nothing anybody has written, whatever was lost since.
//!
//! Cost for a change once everything was touched: one atomic load; before, one mutex and a look at a bit a granule.

use crate::record::Granules;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// What was never written.
#[derive(Debug)]
pub(crate) struct Untouched {
    state: Mutex<State>,
    /// Whether the records call anything untouched.
    any: AtomicBool,
    blank: bool,
}

#[derive(Debug)]
struct State {
    /// As the next records have it.
    now: Granules,
    /// As the records of all members have it, or did before.
    recorded: Granules,
}

impl Default for Untouched {
    fn default() -> Self {
        Self::new(Granules::none(), false)
    }
}

impl Untouched {
    /// As the members' records agree on. `blank`: untouched granules read as zeroes on every member.
    pub(crate) fn new(granules: Granules, blank: bool) -> Self {
        let any = AtomicBool::new(granules.any());
        Self { state: Mutex::new(State { now: granules.clone(), recorded: granules }), any, blank }
    }

    /// Whether untouched granules read as zeroes on every member.
    pub(crate) fn blank(&self) -> bool {
        self.blank
    }

    /// What is untouched.
    pub(crate) fn granules(&self) -> Granules {
        self.state.lock().now.clone()
    }

    /// Ranges of the array that are untouched.
    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        self.state.lock().now.ranges().collect()
    }

    /// Whether nothing of the range was ever written.
    pub(crate) fn covers(&self, range: &Range<u64>) -> bool {
        self.any.load(Ordering::Acquire) && self.state.lock().now.is_untouched(range)
    }

    /// The parts of a range that read as zeroes because they were never written, in order, apart from each other.
    pub(crate) fn blank_within(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        if self.blank && self.any.load(Ordering::Acquire) {
            self.state.lock().now.within(range)
        } else {
            Vec::new()
        }
    }

    /// The range is about to be written. Returns whether the records know already; if not, they are to be written first.
    #[must_use]
    pub(crate) fn touch(&self, range: &Range<u64>) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return true;
        }
        let mut state = self.state.lock();
        state.now.touch(range);
        !state.recorded.any_untouched(range)
    }

    /// Whether the records know that the range was touched.
    pub(crate) fn is_recorded(&self, range: &Range<u64>) -> bool {
        !self.any.load(Ordering::Acquire) || !self.state.lock().recorded.any_untouched(range)
    }

    /// Whether the records are behind.
    pub(crate) fn is_pending(&self) -> bool {
        self.any.load(Ordering::Acquire) && {
            let state = self.state.lock();
            state.now != state.recorded
        }
    }

    /// The records of all members say `granules` now.
    pub(crate) fn written(&self, granules: &Granules) {
        let mut state = self.state.lock();
        state.recorded.intersect(granules);
        self.any.store(state.recorded.any(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_granule_counts_once_the_records_know() {
        let untouched = Untouched::new(Granules::new(1 << 20, 4096, true), true);
        assert!(untouched.covers(&(0..8192)) && !untouched.is_pending());
        assert!(!untouched.touch(&(0..512)));
        assert!(!untouched.covers(&(0..4096)) && untouched.is_pending() && !untouched.is_recorded(&(0..512)));
        let snapshot = untouched.granules();
        assert!(!untouched.touch(&(8192..8193)));
        untouched.written(&snapshot);
        assert!(untouched.touch(&(0..4096)) && untouched.is_recorded(&(0..512)));
        assert!(!untouched.touch(&(8192..8193)), "touched after the snapshot was taken");
    }

    #[test]
    fn what_is_blank_ends_where_it_was_touched() {
        let untouched = Untouched::new(Granules::new(1 << 20, 4096, true), true);
        let size = untouched.granules().size();
        let ends = 100..4 * size + 7;
        assert_eq!(untouched.blank_within(&ends), std::slice::from_ref(&ends));
        assert!(!untouched.touch(&(2 * size + 1..2 * size + 2)));
        assert_eq!(untouched.blank_within(&ends), [100..2 * size, 3 * size..4 * size + 7]);
        assert!(untouched.blank_within(&(2 * size..3 * size)).is_empty());
        // Never written, but nobody knows with what.
        let unknown = Untouched::new(Granules::new(1 << 20, 4096, true), false);
        assert!(unknown.blank_within(&(0..4096)).is_empty());
    }
}
