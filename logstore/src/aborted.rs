//! The aborted transactions of one segment, in memory.
//!
//! Of a segment that is appended to, the list is there and grows; of a closed one it is loaded when a `read_committed`
//! consumer first comes by, and let go with the segment's index when memory is short. A list without entries, the usual
//! one, takes no memory and is never let go.
//!
//! Bound: a segment is rolled when it has [`MOST`] of them (2 MiB); Kafka, which keeps them in a file only, has no limit.

use crate::transactions::Aborted;
use parking_lot::RwLock;
use std::sync::Arc;

/// Aborted transactions of one segment.
pub(crate) const MOST: usize = 65_536;

#[derive(Debug, Default)]
enum Slot {
    /// Not in memory.
    #[default]
    Absent,
    /// Being written.
    Open(Vec<Aborted>),
    /// Of a segment that is not appended to.
    Loaded(Arc<[Aborted]>),
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct AbortedList(RwLock<Slot>);

impl AbortedList {
    /// Puts a list in place that will be written on.
    pub(crate) fn open(&self, list: Vec<Aborted>) {
        *self.0.write() = Slot::Open(list);
    }

    /// Adds one to a list that is being written.
    pub(crate) fn push(&self, aborted: Aborted) {
        if let Slot::Open(list) = &mut *self.0.write() {
            list.push(aborted);
        }
    }

    /// Ends the writing and returns the list; `None` when it is not in memory.
    pub(crate) fn close(&self) -> Option<Arc<[Aborted]>> {
        let mut slot = self.0.write();
        let list: Arc<[Aborted]> = match std::mem::take(&mut *slot) {
            Slot::Open(list) => list.into(),
            Slot::Loaded(list) => list,
            Slot::Absent => return None,
        };
        *slot = Slot::Loaded(Arc::clone(&list));
        Some(list)
    }

    /// Keeps a list that was loaded, unless one is there.
    pub(crate) fn keep(&self, list: &Arc<[Aborted]>) {
        let mut slot = self.0.write();
        if matches!(*slot, Slot::Absent) {
            *slot = Slot::Loaded(Arc::clone(list));
        }
    }

    /// Asks the list; `None` when it is not in memory.
    pub(crate) fn ask<R>(&self, question: impl FnOnce(&[Aborted]) -> R) -> Option<R> {
        match &*self.0.read() {
            Slot::Open(list) => Some(question(list)),
            Slot::Loaded(list) => Some(question(list)),
            Slot::Absent => None,
        }
    }

    /// Whether the segment should be appended to no more.
    pub(crate) fn is_full(&self) -> bool {
        self.ask(<[Aborted]>::len).is_some_and(|len| len >= MOST)
    }

    /// Lets a loaded list go.
    pub(crate) fn unload(&self) {
        let mut slot = self.0.write();
        if matches!(&*slot, Slot::Loaded(list) if !list.is_empty()) {
            *slot = Slot::Absent;
        }
    }
}
