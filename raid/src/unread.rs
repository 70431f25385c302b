//! Pages of copies that nobody reads.
//!
//! A write into the page cache leaves a page on each leg, and reads prefer one of them (`volume::choice`). What lies on the others
//! is let go once a flush has brought it to disk, so that memory holds what is written once and not once a copy. Only
//! whole pages are: an append goes on in the page where the last one ended, and must not have to read it back.
//!
//! It is advice. Whatever is forgotten here (a restart, a flush that fails, too many scattered writes) stays in memory until
//! the kernel wants the page for something else.
//!
//! Cost: a mutex a leg that is not read, where its device has pages at all; for every [`LEAST`] bytes, a task that looks at
//! each of their pages once a flush is over. Never more than [`MOST`] ranges a member: writes that are scattered so widely are left alone.

use crate::range_set::RangeSet;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// The largest page there may be.
const PAGE: u64 = 64 << 10;
/// Bytes that are worth a call.
const LEAST: u64 = 4 << 20;
/// Ranges that are kept in mind.
const MOST: usize = 1024;

/// What was written to a member for the sake of redundancy only, since that was last let go. Positions on its device.
#[derive(Debug, Default)]
pub(crate) struct Unread {
    ranges: Mutex<RangeSet>,
    /// Pages are being let go.
    busy: AtomicBool,
}

impl Unread {
    /// A range was written.
    pub(crate) fn note(&self, range: Range<u64>) {
        let mut ranges = self.ranges.lock();
        ranges.insert(range);
        if ranges.count() > MOST {
            *ranges = RangeSet::default();
        }
    }

    /// Whether pages are being let go. One call at a time: a disk that hangs in it holds up no other.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// That begins, or ends.
    pub(crate) fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::Release);
    }

    /// The whole pages, if they are worth a call: the caller flushes the member next, and lets go of them when that is
    /// done. Parts of pages stay for what is written beside them.
    pub(crate) fn take(&self) -> Vec<Range<u64>> {
        if self.is_busy() {
            return Vec::new();
        }
        let mut ranges = self.ranges.lock();
        let whole = |range: Range<u64>| range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
        let pages: Vec<_> = ranges.iter().map(whole).filter(|pages| pages.start < pages.end).collect();
        if pages.iter().map(|pages| pages.end - pages.start).sum::<u64>() < LEAST {
            return Vec::new();
        }
        for whole in &pages {
            ranges.remove(whole);
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appends_let_go_of_whole_pages_and_keep_the_one_they_go_on_in() {
        let unread = Unread::default();
        let mut at = 100;
        for _ in 0..(LEAST + PAGE) / 1000 {
            assert_eq!(unread.take(), []);
            unread.note(at..at + 1000);
            at += 1000;
        }
        unread.note(at..at + PAGE);
        let taken = unread.take();
        let whole = PAGE..(at + PAGE) / PAGE * PAGE;
        assert_eq!(taken, vec![whole]);
        // Both ends wait for what will be written beside them.
        let left = RangeSet::from_iter([100..PAGE, taken[0].end..at + PAGE]);
        assert_eq!(*unread.ranges.lock(), left);
    }

    #[test]
    fn little_waits_for_more_and_scattered_writes_are_left_alone() {
        let unread = Unread::default();
        unread.note(0..LEAST - PAGE);
        assert_eq!(unread.take(), []);
        for at in 1..=MOST as u64 {
            unread.note(LEAST * at..LEAST * at + PAGE);
        }
        assert_eq!(unread.take(), []);
        assert!(unread.ranges.lock().is_empty());
    }
}
