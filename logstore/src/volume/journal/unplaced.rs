//! Appends that the journal holds and that are not in their places yet: in memory, until somebody reads them or a flush needs
//! them there. So what comes to one partition goes to its place in one write, however many appends it was.
//!
//! Only what somebody waits to have committed is kept so. What is answered before that is in its place by then, as the page
//! cache outlives this process.
//!
//! Invariants:
//! - What is not in its place is the end of its segment, without a gap: nothing is written behind it before it is.
//! - It is kept before the journal gathers it, and until its write has succeeded. So whoever has seen a record's number, and
//!   has all placed then, has placed the appends of that record.
//! - Its places are not given to anybody else before [`Unplaced::abandon`] has returned.
//!
//! Cost: of an append one copy and three short locks, one of which all partitions share with the journal's; of what is brought
//! to its place a device write for each [`RUN`], and a task where it is not a flush that brings it there. Memory: twice the bytes
//! of what the journal holds at most, since buffers grow by doubling, and some hundred bytes for each segment. That is half of
//! the journal, and what comes while a flush is under way; and nothing is kept for much longer than [`super::super::KEPT_FOR`].

use super::super::extent::Extent;
use super::Journal;
use crate::catalog::records::SegmentKey;
use crate::error::{Error, Result};
use crate::tasks::Tasks;
use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use raid::device::{Device, Durability};
use std::ops::Range;
use std::sync::Arc;

/// Segments whose appends are brought to their places at the same time.
const AT_ONCE: usize = 32;
/// Longest write: what is kept of a busy partition is not to hold up what else the members have to do. Units: bytes.
const RUN: usize = 1 << 20;

#[derive(Debug, Default)]
struct State {
    /// Positions in the segment that are not in their place.
    range: Range<u64>,
    /// On their way there, by place on the volume.
    leaving: Vec<(u64, Bytes)>,
    /// Those behind them.
    kept: Vec<(u64, BytesMut)>,
    /// The journal knows of it.
    is_listed: bool,
}

/// What is not in its place of one segment.
pub(in crate::volume) struct Unplaced {
    device: Arc<dyn Device>,
    state: Mutex<State>,
    /// Held while it is brought there.
    placing: tokio::sync::Mutex<()>,
}

impl Unplaced {
    pub(in crate::volume) fn new(device: &Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self {
            device: Arc::clone(device),
            state: Mutex::default(),
            placing: tokio::sync::Mutex::default(),
        })
    }

    /// Whether something of these positions of the segment is not in its place.
    pub(in crate::volume) fn has(&self, range: &Range<u64>) -> bool {
        let state = self.state.lock();
        let start = range.start.max(state.range.start);
        start < range.end.min(state.range.end)
    }

    /// Whether what is written at `at` leaves no gap.
    pub(in crate::volume) fn ends_at(&self, at: u64) -> bool {
        let state = self.state.lock();
        state.range.is_empty() || state.range.end == at
    }

    /// Keeps an append at `at` of its segment, which belongs to these places. Whether nobody knows of it yet.
    fn keep(&self, at: u64, places: &[Extent], mut data: &[u8]) -> bool {
        let mut state = self.state.lock();
        if state.range.is_empty() {
            state.range = at..at;
        }
        debug_assert_eq!(state.range.end, at, "what is not in its place has no gaps");
        state.range.end += data.len() as u64;
        for place in places {
            let (part, rest) = data.split_at(place.len as usize);
            data = rest;
            match state.kept.last_mut() {
                Some((from, run))
                    if *from + run.len() as u64 == place.at && run.len() + part.len() <= RUN =>
                {
                    run.extend_from_slice(part);
                }
                // No more room than it takes: many segments have no second one.
                _ => state.kept.push((place.at, BytesMut::from(part))),
            }
        }
        !std::mem::replace(&mut state.is_listed, true)
    }

    /// What is to be written next, as long as something before `until` is not in its place.
    fn leave(&self, until: u64) -> Option<Vec<(u64, Bytes)>> {
        let mut state = self.state.lock();
        if state.range.is_empty() || state.range.start >= until {
            return None;
        }
        if state.leaving.is_empty() {
            // Else it did not arrive the last time.
            state.leaving =
                std::mem::take(&mut state.kept).into_iter().map(|(at, run)| (at, run.freeze())).collect();
        }
        Some(state.leaving.clone())
    }

    fn arrived(&self) {
        let mut state = self.state.lock();
        let len: usize = std::mem::take(&mut state.leaving).iter().map(|(_, run)| run.len()).sum();
        state.range.start += len as u64;
    }

    /// Brings all that was kept before this call to its place. To be polled to its end: a write that nobody waits for any more
    /// may come late.
    async fn place(&self) -> Result<()> {
        let until = self.state.lock().range.end;
        let _only = self.placing.lock().await;
        while let Some(runs) = self.leave(until) {
            let writes = runs.into_iter().map(|(at, run)| self.device.write(at, run, Durability::Cached));
            // All to their end, even if one fails.
            let outcome: raid::error::Result<()> = join_all(writes).await.into_iter().collect();
            // Not as the device's: whoever reads must not take it for a place that cannot be read.
            outcome.map_err(|cause| Error::Unplaced {
                place: self.device.name().to_owned(),
                cause: Box::new(cause),
            })?;
            self.arrived();
        }
        Ok(())
    }

    /// The same, for whoever may go away half-way.
    pub(in crate::volume) async fn place_by(self: &Arc<Self>, tasks: &Arc<Tasks>) -> Result<()> {
        let this = Arc::clone(self);
        match tasks.finish(async move { this.place().await }).await {
            // The store is closed and runs no task. Nor does it give any place to anybody else.
            Err(Error::Interrupted) => self.place().await,
            outcome => outcome,
        }
    }

    /// Its places are to be given to somebody else: nothing is written there any more when this has returned.
    pub(in crate::volume) async fn abandon(&self) {
        let _only = self.placing.lock().await;
        let mut state = self.state.lock();
        *state = State { is_listed: state.is_listed, ..State::default() };
    }

    /// Whether there is nothing to place; the journal need not know of it then.
    fn unlist(&self) -> bool {
        let mut state = self.state.lock();
        let is_empty = state.range.is_empty();
        if is_empty {
            // An idle partition keeps no room.
            *state = State::default();
        }
        is_empty
    }
}

impl Journal {
    /// Gathers an append, and keeps what belongs to `places`, its places, until it is brought there. The caller brings it
    /// there at once if the journal could not gather it: `false`.
    pub(in crate::volume) fn keep(
        &self,
        unplaced: &Arc<Unplaced>,
        key: &SegmentKey,
        at: u64,
        places: &[Extent],
        data: &[u8],
    ) -> bool {
        if unplaced.keep(at, places, data) {
            self.unplaced.lock().push(Arc::clone(unplaced));
        }
        // After it is kept: a flush that covers the record finds it.
        self.gather(key, at, data)
    }

    /// Whether it may be that something is not in its place.
    pub(in crate::volume) fn keeps(&self) -> bool {
        !self.unplaced.lock().is_empty()
    }

    /// Brings all that was kept before this call to its place.
    pub(in crate::volume) async fn place_all(&self) -> Result<()> {
        let all = self.unplaced.lock().clone();
        // All to their end, as in `Unplaced::place`.
        let placed = stream::iter(all).map(|one| async move { one.place().await }).buffer_unordered(AT_ONCE);
        let outcome = placed.fold(Ok(()), |all, one| std::future::ready(all.and(one))).await;
        self.unplaced.lock().retain(|one| !one.unlist());
        outcome
    }
}

impl std::fmt::Debug for Unplaced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unplaced").field("range", &self.state.lock().range).finish_non_exhaustive()
    }
}
