//! Superblocks and bitmap on the members: when they are written, in which order, and what has to wait for them.
//!
//! All metadata I/O happens under one asynchronous mutex, so that pages are never written twice at once. Waiters
//! that find their need met by an earlier holder go on at once: that is what batches bitmap updates.
//!
//! The order of one round, and why:
//!
//! 1. bitmap pages, header first, to one half of the live members, then to the other: at any moment one half
//!    holds intact pages, so torn ones lose nothing (a start takes the union of all);
//! 2. bad-block logs that have changed;
//! 3. our records (`record`), all at once, then the superblocks, all at once: at any moment each member has a
//!    superblock, or a copy in a record, that is whole. Members without records (md made them) are written one after
//!    another, so that at any moment at most one is torn;
//! 4. if somebody has left, the records again: the generation that begins without them counts once all who take part
//!    have it, and nothing is acknowledged before.
//!
//! A member that does not answer would hold the mutex for ever: it has a limit (`stall`).
//!
//! Members that an interrupted round left behind are brought up before the next event is counted: live members never
//! differ by more than one event, which is the difference assembly tolerates.
//!
//! The bitmap's event count is therefore never behind the superblock's; one that is behind was not kept up, and
//! is not trusted.

use super::{Inner, Order, Roster, Verdict};
use crate::badblocks;
use crate::bitmap::PAGE;
use crate::device::Durability;
use crate::error::{Error, Result};
use crate::member::{Member, State};
use crate::record::{self, History, RECORD_BYTES, Record};
use crate::superblock::{CLEAN, Recovery, Role, SECTOR, SUPER_BYTES, SUPER_OFFSET, Superblock, timestamp};

use bytes::Bytes;
use futures_util::future::join_all;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What the superblocks say besides what never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    /// First sector that may differ between copies.
    pub(super) resync_offset: u64,
    pub(super) roles: Vec<Role>,
    /// Sectors of the data area used on each member.
    pub(super) size: u64,
    /// By device number: how far those are who are being filled, and whether they are replacements.
    pub(super) filling: BTreeMap<u32, (Recovery, bool)>,
    /// By device number: which change of its list of bad blocks its log holds.
    pub(super) bad: BTreeMap<u32, u64>,
    /// The last generation of the history, and whether it is confirmed.
    pub(super) generation: Option<(u64, bool)>,
}

impl Content {
    /// Device numbers of those who hold good data.
    fn holders(&self) -> BTreeSet<u32> {
        let active = |role: &Role| matches!(role, Role::Active(_));
        let numbers = (0..self.roles.len() as u32).filter(|&number| active(&self.roles[number as usize]));
        numbers.filter(|number| !self.filling.contains_key(number)).collect()
    }
}

fn last(history: &History) -> Option<(u64, bool)> {
    history.generations().last().map(|one| (one.id, history.is_confirmed()))
}

impl Content {
    /// What `superblock` says, with what each of `members` says of itself.
    pub(super) fn of<'a>(
        superblock: &Superblock,
        members: impl Iterator<Item = &'a Superblock>,
        history: &History,
    ) -> Self {
        let filling = members.filter_map(|its| Some((its.dev_number, (its.recovery?, its.replacement))));
        let (resync_offset, roles, size) =
            (superblock.resync_offset, superblock.roles.clone(), superblock.size);
        let (filling, bad, generation) = (filling.collect(), BTreeMap::new(), last(history));
        Self { resync_offset, roles, size, filling, bad, generation }
    }

    /// What `roster` is, as of now.
    ///
    /// `handover`: the numbers of a replacement that is whole now and of the member it takes over from.
    fn now(roster: &Roster, resync_offset: u64, history: &History, handover: Option<(u32, u32)>) -> Self {
        let replacements = || roster.seats.iter().filter_map(|seat| seat.replacement.as_ref());
        let filling = roster.enlisted().filter(|member| member.state() == State::Rebuilding).map(|member| {
            let offset = member.checkpoint() / SECTOR;
            let recovery = Recovery { offset, by_bitmap: member.is_by_bitmap() };
            (member.number(), (recovery, replacements().any(|one| Arc::ptr_eq(one, member))))
        });
        // Filled to the end is not being filled any more: the superblock says so before anybody relies on it.
        let filling = filling
            .filter(|(_, (recovery, is_replacement))| *is_replacement || recovery.offset < roster.size);
        let filling = filling.filter(|(number, _)| handover.is_none_or(|(whole, _)| whole != *number));
        let bad = roster.enlisted().map(|member| (member.number(), member.bad_version()));
        let bad = bad.filter(|(_, version)| *version > 0).collect();
        let (filling, size, generation) = (filling.collect(), roster.size, last(history));
        let mut roles = roster.roles();
        if let Some((_, leaving)) = handover {
            roles[leaving as usize] = Role::Faulty;
        }
        Self { resync_offset, roles, size, filling, bad, generation }
    }
}

/// In which wave of a round a member's superblock is written. Those that become whole come first, so that the slot they
/// fill has somebody in any case; those that do not count come last, so that they are never ahead of all that do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wave {
    BecomesWhole,
    Whole,
    DoesNotCount,
}

/// The state of the members' metadata, as far as it was written.
#[derive(Debug)]
pub(super) struct Meta {
    /// The highest event count given out.
    pub(super) events: u64,
    /// What all live superblocks say; `None` while they may differ.
    pub(super) content: Option<Content>,
    /// By device number: what the member has. Who is not listed has nothing.
    pub(super) written: BTreeMap<u32, Written>,
    /// By device number: the sequence number of the newest record.
    pub(super) sequences: BTreeMap<u32, u64>,
    /// Device numbers of those who held good data when `history` last changed.
    pub(super) holders: BTreeSet<u32>,
    /// The generations so far; empty where no member has records.
    pub(super) history: History,
    /// A replacement that is whole, and who it takes over from, until the roster says so.
    pub(super) handover: Option<(u32, u32)>,
    /// Whether the freshest superblock said "clean" at assembly.
    pub(super) was_clean: bool,
    /// Whether anything was written since.
    pub(super) touched: bool,
}

/// What a member's metadata says, as far as it was written.
#[derive(Debug, Clone, Default)]
pub(super) struct Written {
    /// The superblock's event count; 0 for one that is to be written again.
    pub(super) events: u64,
    /// Whether the superblock says that the member holds everything its slot should.
    pub(super) whole: bool,
    /// The superblock; `None` if it is not whole.
    pub(super) superblock: Option<Box<[u8; SUPER_BYTES]>>,
    /// Which change of its list of bad blocks its log holds.
    pub(super) bad: u64,
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
    /// Counts a change of the range, and tells whether it may begin: see [`Inner::prepare`].
    pub(super) fn track(&self, range: &Range<u64>) -> (Tracked<'_>, bool) {
        let known = self.untouched.touch(range);
        if !known {
            // It was left alone while nobody used it; now its copies are made equal.
            self.wake.notify_one();
        }
        let durable = self.intent.as_ref().is_none_or(|intent| intent.lock().begin(range)) && known;
        let tracked = Tracked { inner: self, range: range.clone() };
        (tracked, durable && self.active.load(Ordering::Acquire) && self.is_recorded())
    }

    /// Makes sure that a change of the range may begin: its bits are durable on all live members, the superblocks
    /// say "active", and every failure noticed so far is on record. Normally all that is so already.
    pub(crate) async fn prepare(&self, range: &Range<u64>) -> Result<Tracked<'_>> {
        let (tracked, is_prepared) = self.track(range);
        if is_prepared {
            return Ok(tracked);
        }
        let mut meta = self.meta.lock().await;
        let durable = self.intent.as_ref().is_none_or(|intent| intent.lock().is_durable(range))
            && self.untouched.is_recorded(range);
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
        self.record(&mut meta).await
    }

    /// Writes what is not on record yet, without a change of whether the array is in use.
    pub(super) async fn record(&self, meta: &mut Meta) -> Result<()> {
        let resync_offset = if self.active.load(Ordering::Acquire) { 0 } else { self.first_unsynced() };
        self.write_all(meta, resync_offset).await
    }

    /// What a superblock says while the array is not in use: the first sector that may differ between copies.
    fn first_unsynced(&self) -> u64 {
        self.unsynced.lock().next(0).map_or(CLEAN, |range| range.start / SECTOR)
    }

    pub(super) fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Acquire) == self.noticed.load(Ordering::Acquire)
    }

    /// Marks the array as stopped. Everything has been flushed, and no change is in flight.
    pub(super) async fn mark_stopped(&self) -> Result<()> {
        let mut meta = self.meta.lock().await;
        if meta.was_clean && !meta.touched {
            // Never written to. A degraded array in particular must not call its absent members failed for that.
            return Ok(());
        }
        if let Some(intent) = &self.intent
            && !self.roster().is_degraded()
        {
            intent.lock().clear_settled(|region| self.unsynced.lock().intersects(&region));
        }
        let resync_offset = self.first_unsynced();
        // Everything has been flushed: what was filled so far is durable.
        for member in self.roster().written() {
            member.set_checkpoint(member.recovered());
        }
        self.write_all(&mut meta, resync_offset).await?;
        self.active.store(false, Ordering::Release);
        Ok(())
    }

    /// Takes blocks off the lists of bad ones that have been written well since.
    pub(crate) async fn clear_healed_blocks(&self) -> Result<()> {
        let roster = self.roster();
        let healed: Vec<_> = roster.written().filter(|member| member.begin_clearing()).collect();
        if healed.is_empty() {
            return Ok(());
        }
        // What was written well is durable before it counts as good: else a power cut would leave an old block, which
        // nothing calls bad any more.
        self.flush().await?;
        // Before and after: who looks in between knows the one or the other.
        self.rearranged();
        for member in healed.into_iter().filter(|member| !member.is_faulty()) {
            member.clear_flushed();
        }
        self.rearranged();
        self.noticed.fetch_add(1, Ordering::AcqRel);
        self.recorded().await
    }

    /// Clears the bits of regions that have had no writer for a while. Degraded arrays keep theirs: they say what a
    /// returning member lacks.
    pub(crate) async fn clear_idle_bits(&self) -> Result<()> {
        let Some(intent) = &self.intent else { return Ok(()) };
        let is_unsynced = |region: Range<u64>| self.unsynced.lock().intersects(&region);
        let idle = intent.lock().idle(is_unsynced);
        if idle.is_empty() || self.roster().is_degraded() {
            return Ok(());
        }
        self.flush().await?;
        let mut meta = self.meta.lock().await;
        if self.roster().is_degraded() {
            return Ok(());
        }
        intent.lock().clear(&idle, is_unsynced);
        self.write_pages(&mut meta).await
    }

    /// Writes what has changed of the bitmap, and the superblocks if they do not say yet what they should.
    pub(super) async fn write_all(&self, meta: &mut Meta, resync_offset: u64) -> Result<()> {
        meta.touched = true;
        loop {
            let roster = self.roster();
            let (noticed, content) = {
                // Who notices something counts it and then makes it so, under this lock: what is counted is in the content.
                let _nobody_meanwhile = self.verdicts.lock();
                let noticed = self.noticed.load(Ordering::Acquire);
                // If the replacement fails in the middle of this, nobody takes over.
                let takes_over = |(whole, _): &(u32, u32)| roster.written().any(|one| one.number() == *whole);
                let handover = meta.handover.filter(takes_over);
                (noticed, Content::now(&roster, resync_offset, &meta.history, handover))
            };
            self.update_history(meta, &roster, &content);
            let content = Content { generation: last(&meta.history), ..content };
            // Who has nothing yet does not lag: it is told with the others, and after them.
            let lags = |member: &Arc<Member>| {
                meta.written.get(&member.number()).is_some_and(|written| written.events != meta.events)
            };
            let lagging = roster.enlisted().any(lags);
            if !lagging && meta.content.as_ref() == Some(&content) {
                self.write_pages(meta).await?;
                if self.untouched.is_pending() {
                    self.write_records(meta, &roster).await?;
                }
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
            self.write_bad_blocks(meta, &roster).await?;
            self.write_superblocks(meta, &roster, &content).await?;
            if !lagging {
                if !meta.history.generations().is_empty() && !meta.history.is_confirmed() {
                    meta.history.confirm();
                    self.write_records(meta, &roster).await?;
                }
                meta.content = Some(Content { generation: last(&meta.history), ..content });
            }
        }
    }

    /// Begins a generation if somebody who held good data has left, or none is known.
    fn update_history(&self, meta: &mut Meta, roster: &Roster, content: &Content) {
        let holders = content.holders();
        let begins = meta.history.generations().is_empty() || !meta.holders.is_subset(&holders);
        if begins && roster.written().any(|member| member.records.is_some()) {
            let mut id = [0; 8];
            self.runtime.fill_random(&mut id);
            meta.history.begin(u64::from_le_bytes(id), meta.events + 1);
        }
        meta.holders = holders;
    }

    /// Writes the superblocks that lack the current event count, and the records that go with them first.
    async fn write_superblocks(&self, meta: &mut Meta, roster: &Roster, content: &Content) -> Result<()> {
        let updated = timestamp(self.runtime.wall_clock());
        let events =
            |meta: &Meta, member: &Member| meta.written.get(&member.number()).map_or(0, |one| one.events);
        let is_whole = |member: &Member| match member.role() {
            Role::Active(_) => !content.filling.contains_key(&member.number()),
            _ => false,
        };
        let wave = |meta: &Meta, member: &Member| {
            let was_whole = meta.written.get(&member.number()).is_some_and(|written| written.whole);
            match (is_whole(member), was_whole) {
                (true, false) => Wave::BecomesWhole,
                (true, true) => Wave::Whole,
                (false, _) => Wave::DoesNotCount,
            }
        };
        let mut order: Vec<(&Arc<Member>, Box<[u8; SUPER_BYTES]>)> = roster
            .enlisted()
            .filter(|member| events(meta, member) != meta.events)
            .map(|member| (member, Box::new(superblock(member, meta.events, updated, content).encode())))
            .collect();
        order.sort_by_key(|(member, _)| (wave(meta, member), events(meta, member), member.number()));
        let mut waves: Vec<(Wave, bool, Vec<_>)> = Vec::new();
        for one in order {
            let (wave, alone) = (wave(meta, one.0), one.0.records.is_none());
            match waves.last_mut() {
                Some((same, false, batch)) if *same == wave && !alone => batch.push(one),
                _ => waves.push((wave, alone, vec![one])),
            }
        }
        for (_, _, wave) in waves {
            self.write_records_of(meta, &wave).await?;
            let (live, orders): (Vec<_>, Vec<_>) = wave
                .into_iter()
                .filter(|(member, _)| !member.is_faulty())
                .map(|(member, bytes)| {
                    let write = stable(SUPER_OFFSET, Bytes::copy_from_slice(&bytes[..]));
                    ((member, bytes), (member, write))
                })
                .unzip();
            for ((member, bytes), outcome) in live.into_iter().zip(self.ask_all(orders).await) {
                let written = meta.written.entry(member.number()).or_default();
                match outcome {
                    Ok(_) => {
                        (written.events, written.superblock) = (meta.events, Some(bytes));
                        written.whole = is_whole(member);
                    }
                    Err(failure) => {
                        // It may be torn, or new: nothing that relies on it is written to this member any more.
                        written.superblock = None;
                        self.settle_failure(member, failure)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes all records anew, beside the superblocks that are there; then they know all that was touched before.
    async fn write_records(&self, meta: &mut Meta, roster: &Roster) -> Result<()> {
        let granules = self.untouched.granules();
        let there = |member: &Arc<Member>| meta.written.get(&member.number())?.superblock.clone();
        let all: Vec<_> = roster.enlisted().filter_map(|member| Some((member, there(member)?))).collect();
        self.write_records_of(meta, &all).await?;
        self.untouched.written(&granules);
        Ok(())
    }

    /// Writes the records that go with these superblocks, on members that have records.
    async fn write_records_of(
        &self,
        meta: &mut Meta,
        list: &[(&Arc<Member>, Box<[u8; SUPER_BYTES]>)],
    ) -> Result<()> {
        let (mut writes, mut outcomes) = (Vec::new(), Vec::new());
        for (member, superblock) in list {
            let Some(start) = member.records else { continue };
            let sequence = meta.sequences.entry(member.number()).or_default();
            *sequence += 1;
            let sequence = *sequence;
            let (untouched, blank) = (self.untouched.granules(), self.untouched.blank());
            let (bad, superblock) = (member.listed().0, superblock.clone());
            let history = meta.history.clone();
            let record = Record { sequence, superblock, blank, untouched, history, bad }.encode();
            let at = start + record::slot_of(sequence) * RECORD_BYTES as u64;
            match record {
                Ok(bytes) => writes.push((*member, stable(at, Bytes::from(bytes)))),
                Err(cause) => {
                    let failure = Error::Record { device: member.device.name().to_owned(), cause };
                    outcomes.push((*member, Err(failure)));
                }
            }
        }
        let members: Vec<&Arc<Member>> = writes.iter().map(|(member, _)| *member).collect();
        outcomes.extend(members.into_iter().zip(self.ask_all(writes).await));
        for (member, outcome) in outcomes {
            outcome.map(drop).or_else(|failure| self.settle_failure(member, failure))?;
        }
        Ok(())
    }

    /// Writes the bad-block logs whose lists have changed. A member whose list does not fit is taken out.
    async fn write_bad_blocks(&self, meta: &mut Meta, roster: &Roster) -> Result<()> {
        for member in roster.written() {
            let known = meta.written.get(&member.number()).map_or(0, |written| written.bad);
            if member.bad_version() == known {
                continue;
            }
            let (Some((at, room)), Some(log)) =
                (member.superblock.bad_block_log_area(), member.superblock.bad_block_log)
            else {
                continue;
            };
            let (listed, version) = member.listed();
            let bytes = badblocks::encode(&listed, member.superblock.data_start(), log.shift, room);
            let outcome = match bytes {
                Some(bytes) => self.ask(member, stable(at, Bytes::from(bytes))).await,
                None => Err(Error::TooManyBadBlocks { device: member.device.name().to_owned() }),
            };
            match outcome {
                Ok(_) => meta.written.entry(member.number()).or_default().bad = version,
                Err(failure) => self.settle_failure(member, failure)?,
            }
        }
        Ok(())
    }

    /// Writes the bitmap pages that have changed to all live members, and notes which bits are durable then.
    pub(super) async fn write_pages(&self, _meta: &mut Meta) -> Result<()> {
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
        let roster = self.roster();
        let members: Vec<&Arc<Member>> = roster.written().collect();
        let (first, second) = members.split_at(members.len().div_ceil(2));
        let pages: Vec<(u64, Bytes)> =
            pages.iter().map(|(at, bytes)| (*at as u64, Bytes::copy_from_slice(bytes))).collect();
        debug_assert!(pages.iter().all(|(_, bytes)| bytes.len() == PAGE));
        for half in [first, second] {
            let outcomes = join_all(half.iter().map(|member| self.write_pages_to(member, &pages))).await;
            for (member, outcome) in half.iter().zip(outcomes) {
                if let Err(failure) = outcome {
                    self.settle_failure(member, failure)?;
                }
            }
        }
        Ok(())
    }

    async fn write_pages_to(&self, member: &Arc<Member>, pages: &[(u64, Bytes)]) -> Result<()> {
        let Some(start) = member.superblock.bitmap_start() else { return Ok(()) };
        for (at, bytes) in pages {
            self.ask(member, stable(start + at, bytes.clone())).await?;
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

/// What a member's superblock is to say.
fn superblock(member: &Member, events: u64, updated: u64, content: &Content) -> Superblock {
    let mut superblock = member.superblock.clone();
    let filling = content.filling.get(&member.number());
    superblock.events = events;
    superblock.updated = updated;
    superblock.resync_offset = content.resync_offset;
    superblock.roles.clone_from(&content.roles);
    superblock.size = content.size;
    superblock.data_size = member.data_size();
    if let Some(log) = &mut superblock.bad_block_log {
        // Once used, it is read: md takes the same view.
        log.in_use |= content.bad.contains_key(&member.number());
    }
    superblock.recovery = filling.map(|(recovery, _)| *recovery).filter(|r| r.offset < content.size);
    superblock.replacement = filling.is_some_and(|(_, is_replacement)| *is_replacement);
    superblock.corrected = u32::try_from(member.counters().1).unwrap_or(u32::MAX);
    superblock
}

fn stable(at: u64, data: Bytes) -> Order {
    Order::Write { at, data, durability: Durability::Stable }
}
