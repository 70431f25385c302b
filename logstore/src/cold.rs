//! What the scrub reads cold, it lets go of again: what nobody else reads is not to push out of the page cache what others
//! do.
//!
//! Before it reads, it looks which pages of all copies are not in memory ([`Cold::look`]); those that it has passed it lets
//! go of a little later ([`Cold::forget_passed`]), and what was in memory before stays. The kernel reads ahead: so it looks
//! further than it reads; what lies ahead stays until it is read, or until the end. A page cache may keep several pages
//! together and lets go of all of them or none: so only what whole blocks of it were passed goes before the end.
//!
//! Advice on both sides: where nobody can tell what is in memory, all that is read stays; and what somebody else has
//! brought in between goes as well, once.
//!
//! Cost: for each megabyte and copy a system call to look, and one to let go for each stride and run of pages.

use crate::error::Result;
use crate::home::SegmentBytes;
use raid::device::{Device, Holder};
use raid::range_set::RangeSet;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Bytes that are read before pages are let go of.
const STRIDE: u64 = 8 << 20;
/// The most that a page cache keeps together: a huge page.
const BLOCK: u64 = 2 << 20;
/// Bytes of a file, besides what is read ahead, of which is kept in mind whether they were in memory.
const MOST_KEPT: u64 = 64 << 20;
/// Files that are kept open meanwhile.
const MOST_FILES: usize = 64;

/// The pages of a file that are not to stay.
struct Pages {
    device: Arc<dyn Device>,
    /// Where it is known what was in memory.
    looked: RangeSet,
    /// What was not.
    cold: RangeSet,
    /// What was read on purpose.
    passed: RangeSet,
}

impl Pages {
    fn new(device: Arc<dyn Device>) -> Self {
        let (looked, cold, passed) = (RangeSet::default(), RangeSet::default(), RangeSet::default());
        Self { device, looked, cold, passed }
    }

    /// Takes what is in whole blocks that were passed, or all of it; returns what of it was not in memory.
    fn take(&mut self, all: bool) -> Vec<Range<u64>> {
        if all {
            let cold = std::mem::take(&mut self.cold);
            *self = Self::new(Arc::clone(&self.device));
            return cold.iter().collect();
        }
        let whole = |range: Range<u64>| range.start..range.end / BLOCK * BLOCK;
        let passed: Vec<_> = self.passed.iter().map(whole).filter(|range| range.start < range.end).collect();
        let cold = passed.iter().flat_map(|range| self.cold.within(range)).collect();
        for range in &passed {
            for set in [&mut self.looked, &mut self.cold, &mut self.passed] {
                set.remove(range);
            }
        }
        cold
    }
}

/// Pages that were not in memory before they were read.
#[derive(Default)]
pub(crate) struct Cold {
    files: BTreeMap<String, Pages>,
    read: u64,
}

impl Cold {
    /// To be called before a range is read: notes what of it, and of what lies behind it, is not in memory.
    pub(crate) async fn look(&mut self, bytes: &dyn SegmentBytes, at: u64, len: u64) -> Result<()> {
        for Holder { device, at, len, .. } in bytes.holders(at, len).await? {
            if !device.keeps_pages() {
                continue;
            }
            let range = at..(at + len + device.reads_ahead()).min(device.size());
            let new = || Pages::new(Arc::clone(&device));
            let pages = self.files.entry(device.name().to_owned()).or_insert_with(new);
            let mut rest = RangeSet::from_iter([range.clone()]);
            pages.looked.within(&range).iter().for_each(|looked| rest.remove(looked));
            for range in rest.iter() {
                pages.cold.extend(device.cold(range.start, range.end - range.start));
            }
            pages.looked.insert(range);
        }
        Ok(())
    }

    /// A range was read. Whether it is time to let go of what was passed.
    pub(crate) async fn passed(&mut self, bytes: &dyn SegmentBytes, at: u64, len: u64) -> Result<bool> {
        for Holder { device, at, len, .. } in bytes.holders(at, len).await? {
            if let Some(pages) = self.files.get_mut(device.name()) {
                pages.passed.insert(at..at + len);
            }
        }
        self.read += len;
        Ok(self.read >= STRIDE || self.files.len() > MOST_FILES)
    }

    /// Lets go of what was passed and was not in memory before.
    pub(crate) async fn forget_passed(&mut self) {
        self.forget(self.files.len() > MOST_FILES).await;
    }

    /// Lets go of all that was not in memory before.
    pub(crate) async fn forget_all(&mut self) {
        self.forget(true).await;
    }

    async fn forget(&mut self, all: bool) {
        self.read = 0;
        for (name, pages) in &mut self.files {
            let is_much = pages.looked.len() > MOST_KEPT + 2 * pages.device.reads_ahead();
            let ranges = pages.take(all || is_much);
            if let Err(error) = pages.device.forget(ranges).await {
                tracing::debug!("what the scrub read of {name} stays in memory: {error}");
            }
        }
        self.files.retain(|_, pages| !pages.looked.is_empty());
    }
}
