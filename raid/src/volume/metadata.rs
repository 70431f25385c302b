//! Superblocks and bitmap on the members: when they are written, in which order, and what has to wait for them.
//!
//! All metadata I/O happens under one asynchronous mutex, so that pages are never written twice at once. Waiters
//! that find their need met by an earlier holder go on at once: that is what batches bitmap updates.
//!
//! The order of one round, and why:
//!
//! 1. bitmap pages, header first, to one half of the live members, then to the other: at any moment one half
//!    holds intact pages, so torn ones lose nothing (a start takes the union of all);
//! 2. second copies of the superblocks (`backup`), all at once, then the superblocks, all at once: at any moment each
//!    member has one that is whole. Members without a second copy (md made them) are written one after another, so
//!    that at any moment at most one is torn.
//!
//! Members that an interrupted round left behind are brought up before the next event is counted: live members never
//! differ by more than one event, which is the difference assembly tolerates.
//!
//! The bitmap's event count is therefore never behind the superblock's; one that is behind was not kept up, and
//! is not trusted.

use super::{Inner, Verdict};
use crate::backup;
use crate::bitmap::PAGE;
use crate::device::Durability;
use crate::error::{Error, Result};
use crate::geometry::Slot;
use crate::member::Member;
use crate::superblock::{CLEAN, Role, SECTOR, SUPER_BYTES, SUPER_OFFSET, timestamp};

use bytes::Bytes;
use futures_util::future::join_all;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// What the superblocks say besides what never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    /// First sector that may differ between copies.
    pub(super) resync_offset: u64,
    pub(super) roles: Vec<Role>,
}

/// The state of the members' metadata, as far as it was written.
#[derive(Debug)]
pub(super) struct Meta {
    /// The highest event count given out.
    pub(super) events: u64,
    /// What all live superblocks say; `None` while they may differ.
    pub(super) content: Option<Content>,
    /// By slot: the event count in the member's superblock.
    pub(super) written: Vec<u64>,
    /// Whether the freshest superblock said "clean" at assembly.
    pub(super) was_clean: bool,
    /// Whether anything was written since.
    pub(super) touched: bool,
}

/// A writer that the bitmap counts, until it is dropped.
pub(crate) struct Tracked<'a> {
    inner: &'a Inner,
    range: Range<u64>,
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        if let Some(intent) = &self.inner.intent {
            intent.lock().end(&self.range);
        }
    }
}

impl Inner {
    /// Makes sure that a change of the range may begin: its bits are durable on all live members, the superblocks
    /// say "active", and every failure noticed so far is on record. Normally all that is so already.
    pub(crate) async fn prepare(&self, range: &Range<u64>) -> Result<Tracked<'_>> {
        let durable = self.intent.as_ref().is_none_or(|intent| intent.lock().begin(range));
        let tracked = Tracked { inner: self, range: range.clone() };
        if durable && self.active.load(Ordering::Acquire) && self.is_recorded() {
            return Ok(tracked);
        }
        let mut meta = self.meta.lock().await;
        let durable = self.intent.as_ref().is_none_or(|intent| intent.lock().is_durable(range));
        if !(durable && self.active.load(Ordering::Acquire) && self.is_recorded()) {
            self.write_all(&mut meta, 0).await?;
            self.active.store(true, Ordering::Release);
        }
        Ok(tracked)
    }

    /// Waits until every failure noticed so far is on record on all survivors.
    pub(crate) async fn recorded(&self) -> Result<()> {
        if self.is_recorded() {
            return Ok(());
        }
        let mut meta = self.meta.lock().await;
        if self.is_recorded() {
            return Ok(());
        }
        let resync_offset = if self.active.load(Ordering::Acquire) { 0 } else { CLEAN };
        self.write_all(&mut meta, resync_offset).await
    }

    fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Acquire) == self.noticed.load(Ordering::Acquire)
    }

    /// Marks the array as stopped. Everything has been flushed, and no change is in flight.
    pub(super) async fn mark_stopped(&self) -> Result<()> {
        let mut meta = self.meta.lock().await;
        if meta.was_clean && !meta.touched {
            // Never written to. A degraded array in particular must not call its absent members failed for that.
            return Ok(());
        }
        let first_unsynced = self.unsynced.lock().next(0).map(|range| range.start);
        if let Some(intent) = &self.intent
            && !self.is_degraded()
        {
            intent.lock().clear_settled(|region| self.unsynced.lock().intersects(&region));
        }
        let resync_offset = first_unsynced.map_or(CLEAN, |at| at / SECTOR);
        self.write_all(&mut meta, resync_offset).await?;
        self.active.store(false, Ordering::Release);
        Ok(())
    }

    /// Clears the bits of regions that have had no writer for a while. Degraded arrays keep theirs: they say what a
    /// returning member lacks.
    pub(crate) async fn clear_idle_bits(&self) -> Result<()> {
        let Some(intent) = &self.intent else { return Ok(()) };
        let is_unsynced = |region: Range<u64>| self.unsynced.lock().intersects(&region);
        let idle = intent.lock().idle(is_unsynced);
        if idle.is_empty() || self.is_degraded() {
            return Ok(());
        }
        self.flush().await?;
        let mut meta = self.meta.lock().await;
        if self.is_degraded() {
            return Ok(());
        }
        intent.lock().clear(&idle, is_unsynced);
        self.write_pages(&mut meta).await
    }

    /// Writes what has changed of the bitmap, and the superblocks if they do not say yet what they should.
    async fn write_all(&self, meta: &mut Meta, resync_offset: u64) -> Result<()> {
        meta.touched = true;
        loop {
            let noticed = self.noticed.load(Ordering::Acquire);
            let content = Content { resync_offset, roles: self.roles() };
            let lagging = self.live_members().any(|member| meta.written[member.slot.0] != meta.events);
            if !lagging && meta.content.as_ref() == Some(&content) {
                self.write_pages(meta).await?;
                if noticed == self.noticed.load(Ordering::Acquire) {
                    self.recorded.store(noticed, Ordering::Release);
                    return Ok(());
                }
                continue;
            }
            if !lagging {
                meta.events += 1;
            }
            meta.content = None;
            if let Some(intent) = &self.intent {
                intent.lock().set_events(meta.events);
            }
            self.write_pages(meta).await?;
            self.write_superblocks(meta, &content, !lagging).await?;
            if !lagging {
                meta.content = Some(content);
            }
        }
    }

    /// What each device number is, as of now.
    fn roles(&self) -> Vec<Role> {
        let mut roles = self.roles_at_start();
        for member in self.members.iter().flatten() {
            let role = if member.is_in_sync() { Role::Active(member.slot) } else { Role::Faulty };
            roles[member.superblock.dev_number as usize] = role;
        }
        roles
    }

    /// The freshest table at assembly; whoever holds a slot there and was not present counts as failed from now on.
    fn roles_at_start(&self) -> Vec<Role> {
        let present = |slot: Slot, number: usize| {
            self.members[slot.0]
                .as_ref()
                .is_some_and(|member| member.superblock.dev_number as usize == number)
        };
        let table = self.members.iter().flatten().max_by_key(|member| member.superblock.events);
        let mut roles = table.map(|member| member.superblock.roles.clone()).unwrap_or_default();
        for (number, role) in roles.iter_mut().enumerate() {
            if let Role::Active(slot) = *role
                && !present(slot, number)
            {
                *role = Role::Faulty;
            }
        }
        roles
    }

    /// Writes the superblocks that lack the current event count. With `copies`, their second copies first.
    async fn write_superblocks(&self, meta: &mut Meta, content: &Content, copies: bool) -> Result<()> {
        let updated = timestamp(self.runtime.wall_clock());
        let mut order: Vec<(&Member, [u8; SUPER_BYTES])> = self
            .live_members()
            .filter(|member| meta.written[member.slot.0] != meta.events)
            .map(|member| {
                let mut superblock = member.superblock.clone();
                superblock.events = meta.events;
                superblock.updated = updated;
                superblock.resync_offset = content.resync_offset;
                superblock.roles.clone_from(&content.roles);
                superblock.corrected = u32::try_from(member.counters().1).unwrap_or(u32::MAX);
                (member, superblock.encode())
            })
            .collect();
        order.sort_by_key(|(member, _)| (meta.written[member.slot.0], member.slot));
        if copies {
            let backups = order.iter().filter_map(|(member, bytes)| {
                let copy = Bytes::copy_from_slice(&backup::encode(bytes)?);
                Some((*member, member.device.write(member.backup?, copy, Durability::Stable)))
            });
            let backups = backups.map(|(member, write)| async move { (member, write.await) });
            for (member, outcome) in join_all(backups).await {
                outcome.or_else(|failure| self.settle_failure(member, failure))?;
            }
        }
        let (together, alone): (Vec<_>, Vec<_>) =
            order.into_iter().partition(|(member, _)| member.backup.is_some());
        let waves = std::iter::once(together).chain(alone.into_iter().map(|one| vec![one]));
        for wave in waves {
            let writes = wave.iter().filter(|(member, _)| member.is_in_sync()).map(|(member, bytes)| async {
                let bytes = Bytes::copy_from_slice(bytes);
                (*member, member.device.write(SUPER_OFFSET, bytes, Durability::Stable).await)
            });
            for (member, outcome) in join_all(writes).await {
                match outcome {
                    Ok(()) => meta.written[member.slot.0] = meta.events,
                    Err(failure) => self.settle_failure(member, failure)?,
                }
            }
        }
        Ok(())
    }

    /// Writes the bitmap pages that have changed to all live members, and notes which bits are durable then.
    async fn write_pages(&self, _meta: &mut Meta) -> Result<()> {
        let Some(intent) = &self.intent else { return Ok(()) };
        let pages = intent.lock().take_changed();
        if pages.is_empty() {
            return Ok(());
        }
        let outcome = self.write_pages_to_halves(&pages).await;
        let mut intent = intent.lock();
        match outcome {
            Ok(()) => intent.written(&pages),
            Err(_) => intent.unwritten(&pages),
        }
        outcome
    }

    async fn write_pages_to_halves(&self, pages: &[(usize, Vec<u8>)]) -> Result<()> {
        let members: Vec<&Member> = self.live_members().collect();
        let (first, second) = members.split_at(members.len().div_ceil(2));
        let pages: Vec<(u64, Bytes)> =
            pages.iter().map(|(at, bytes)| (*at as u64, Bytes::copy_from_slice(bytes))).collect();
        debug_assert!(pages.iter().all(|(_, bytes)| bytes.len() == PAGE));
        for half in [first, second] {
            let outcomes = join_all(half.iter().map(|member| write_pages_to(member, &pages))).await;
            for (member, outcome) in half.iter().zip(outcomes) {
                if let Err(failure) = outcome {
                    self.settle_failure(member, failure)?;
                }
            }
        }
        Ok(())
    }

    /// A member that failed a metadata write is taken out, or the operation that needed it fails.
    fn settle_failure(&self, member: &Member, failure: Error) -> Result<()> {
        match self.judge(member, &failure) {
            Verdict::Evicted => Ok(()),
            Verdict::Kept => Err(failure),
        }
    }
}

async fn write_pages_to(member: &Member, pages: &[(u64, Bytes)]) -> Result<()> {
    let Some(start) = member.superblock.bitmap_start() else { return Ok(()) };
    for (at, bytes) in pages {
        member.device.write(start + at, bytes.clone(), Durability::Stable).await?;
    }
    Ok(())
}
