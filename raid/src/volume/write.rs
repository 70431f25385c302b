//! Changes: writes, zeroes, flush, and the clean stop.
//!
//! The order of one change, and what a power cut or a dying leg means at each step:
//!
//! 1. range lock: nothing has happened yet;
//! 2. bits and "active" durable ([`Inner::prepare`]): the region is resynced at the next start, to no harm;
//! 3. data to all live legs at once: legs may differ, and the bit says so;
//! 4. a leg that failed is taken out, or the range becomes unsynced and the client gets the error;
//! 5. what was taken out is on record on the survivors: from here on the failed leg is never read again;
//! 6. acknowledged.

use super::metadata::Tracked;
use super::{BLOCK, Inner, Verdict};
use crate::device::{Durability, ZeroMode};
use crate::error::Result;
use crate::geometry::{MemberOffset, Slot};
use crate::member::Member;
use bytes::Bytes;
use futures_util::future::join_all;
use std::sync::Arc;

/// What is to become of a range.
pub(crate) enum Change {
    /// These bytes.
    Data(Bytes),
    /// Zeroes, so many.
    Zeroes(u64, ZeroMode),
}

impl Change {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeroes(len, _) => *len,
        }
    }
}

/// A part of a change, on one leg.
enum LegChange {
    Data(u64, Bytes),
    Zeroes(u64, u64),
}

impl Inner {
    /// Makes a change on all live legs. The range lies within the array and is not empty.
    pub(super) async fn change(
        self: &Arc<Self>,
        at: u64,
        change: Change,
        durability: Durability,
    ) -> Result<()> {
        let _entered = self.enter()?;
        let range = self.blocks(at, change.len());
        let _lock = self.locks.lock(range.clone()).await;
        self.refuse_if_lost()?;
        let _tracked: Tracked<'_> = self.prepare(&range).await?;
        let failure = self.change_legs(at, &change, durability).await;
        if failure.is_some() {
            // Legs may differ now; while the lock is held nobody has seen that yet.
            self.mark_unsynced(range.start / BLOCK * BLOCK..range.end);
        }
        self.recorded().await?;
        failure.map_or(Ok(()), Err)
    }

    /// Submits the change to all live legs at once and waits for all. Returns a failure that was not settled by
    /// taking the leg out.
    async fn change_legs(&self, at: u64, change: &Change, durability: Durability) -> Option<crate::Error> {
        let legs = match change {
            Change::Data(data) => self.data_legs(at, data),
            Change::Zeroes(len, _) => self.zero_legs(at, *len),
        };
        let mode = if let Change::Zeroes(_, mode) = change { *mode } else { ZeroMode::Allocate };
        let outcomes = join_all(legs.into_iter().map(|(member, leg)| async move {
            let outcome = match leg {
                LegChange::Data(at, data) => member.device.write(at, data, durability).await,
                LegChange::Zeroes(at, len) => member.device.write_zeroes(at, len, mode, durability).await,
            };
            (member, outcome)
        }))
        .await;
        let mut unsettled = None;
        for (member, outcome) in outcomes {
            if let Err(failure) = outcome
                && self.judge(member, &failure) == Verdict::Kept
            {
                unsettled.get_or_insert(failure);
            }
        }
        unsettled
    }

    fn data_legs(&self, at: u64, data: &Bytes) -> Vec<(&Member, LegChange)> {
        let mut legs = Vec::with_capacity(self.geometry.copies());
        for span in self.geometry.spans(at, data.len() as u64) {
            let start = (span.at - at) as usize;
            let part = data.slice(start..start + span.len as usize);
            for place in self.geometry.places(span.chunk) {
                if let Some(member) = self.live(place.slot) {
                    let at = member.position(MemberOffset(place.at.0 + span.within));
                    legs.push((member, LegChange::Data(at, part.clone())));
                }
            }
        }
        legs
    }

    /// Without a payload to split, neighbouring chunks of a member become one range: a few operations for any length.
    fn zero_legs(&self, at: u64, len: u64) -> Vec<(&Member, LegChange)> {
        let mut ranges: Vec<Vec<(u64, u64)>> = vec![Vec::new(); self.geometry.members()];
        for span in self.geometry.spans(at, len) {
            for place in self.geometry.places(span.chunk) {
                let (start, list) = (place.at.0 + span.within, &mut ranges[place.slot.0]);
                match list.last_mut() {
                    Some((first, len)) if *first + *len == start => *len += span.len,
                    _ => list.push((start, span.len)),
                }
            }
        }
        let mut legs = Vec::new();
        for (slot, list) in ranges.into_iter().enumerate() {
            if let Some(member) = self.live(Slot(slot)) {
                legs.extend(list.into_iter().map(|(start, len)| {
                    (member, LegChange::Zeroes(member.position(MemberOffset(start)), len))
                }));
            }
        }
        legs
    }

    /// Makes all completed changes durable on every live leg.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.refuse_if_lost()?;
        let flushes = self.live_members().map(|member| async move { (member, member.device.flush().await) });
        let outcomes = join_all(flushes).await;
        let mut unsettled = None;
        for (member, outcome) in outcomes {
            if let Err(failure) = outcome
                && self.judge(member, &failure) == Verdict::Kept
            {
                unsettled.get_or_insert(failure);
            }
        }
        if self.is_active() {
            self.recorded().await?;
        }
        // Another flush may have found the loss while this one was under way: its data counts for this one too.
        self.refuse_if_lost()?;
        unsettled.map_or(Ok(()), Err)
    }

    /// The clean stop. Runs once; a second call finds everything done.
    pub(super) async fn stop(self: &Arc<Self>) -> Result<()> {
        self.gate.close();
        self.wake.notify_one();
        self.gate.drained().await;
        if self.read_only {
            return Ok(());
        }
        self.flush().await?;
        self.mark_stopped().await
    }
}
