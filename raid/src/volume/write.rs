//! Changes: writes, zeroes, flush, and the clean stop.
//!
//! The order of one change, and what a power cut or a dying leg means at each step:
//!
//! 1. range lock: nothing has happened yet;
//! 2. bits and "active" durable ([`Inner::prepare`]): the region is resynced at the next start, to no harm;
//! 3. data to all live legs at once: legs may differ, and the bit says so;
//! 4. of a leg that failed, a few blocks are listed as bad, or it is taken out, or the range becomes unsynced and the
//!    client gets the error;
//! 5. what was listed or taken out is on record: from here on it is never read again;
//! 6. acknowledged.
//!
//! Where all legs lie in memory and nothing has to be waited for, [`Inner::write_now`] takes the same steps in one go:
//! no allocation, no task. Whatever is unusual there is left to the long way.

use super::choice::is_first;
use super::metadata::Tracked;
use super::{BLOCK, Inner, Order, RangeSet, Roster, Verdict};
use crate::device::{Durability, ZeroMode};
use crate::error::{Error, Operation, Result};
use crate::event::Event;
use crate::geometry::{MemberOffset, Span};
use crate::member::Member;
use bytes::{Bytes, BytesMut};
use futures_util::future::select;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Bytes that are zeroed or given back under one lock.
const MOST_AT_ONCE: u64 = 64 << 20;
/// How long a stop waits for what is at work in the background: many times what it takes.
const LETTING_GO: Duration = Duration::from_secs(2);
/// Blocks of one write that may turn out bad before its member counts as failed.
const MOST_BAD: u64 = 16;

/// What is to become of a range.
pub(crate) enum Change {
    /// These bytes.
    Data(Bytes),
    /// Zeroes, so many.
    Zeroes(u64, ZeroMode),
    /// So many bytes are of no use any more: holes, or what there was where a member would have to write zeroes for them.
    Discard(u64),
}

impl Change {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeroes(len, _) | Self::Discard(len) => *len,
        }
    }

    /// The same for the first `len` bytes.
    fn part(&self, len: u64) -> Self {
        match self {
            Self::Data(data) => Self::Data(data.slice(..len as usize)),
            Self::Zeroes(_, mode) => Self::Zeroes(len, *mode),
            Self::Discard(_) => Self::Discard(len),
        }
    }
}

/// A part of a change, on one leg.
struct Leg<'a> {
    member: &'a Arc<Member>,
    /// First byte of the array that it is a copy of; `None` where several pieces of the array were joined.
    of: Option<u64>,
    /// First byte in the member's data area.
    at: u64,
    len: u64,
    /// `None`: zeroes.
    data: Option<Bytes>,
    /// Its pages in memory are of no use: another copy is read.
    is_unread: bool,
}

impl Leg<'_> {
    fn range(&self) -> Range<u64> {
        self.at..self.at + self.len
    }

    fn order(&self, mode: ZeroMode, durability: Durability) -> Order {
        let at = self.member.position(MemberOffset(self.at));
        match &self.data {
            Some(data) => Order::Write { at, data: data.clone(), durability },
            None => Order::Zero { at, len: self.len, mode, durability },
        }
    }
}

impl Inner {
    /// Makes a change on all live legs. The range lies within the array and is not empty. What comes without a payload may be
    /// of any length: it is made part by part, each under a lock of its own, so that a leg that has to write the zeroes is
    /// late with none of them, and nobody waits for all of it who wants some.
    pub(super) async fn change_in_parts(
        self: &Arc<Self>,
        at: u64,
        change: Change,
        durability: Durability,
    ) -> Result<()> {
        let _entered = self.enter()?;
        let end = at + change.len();
        if matches!(change, Change::Data(_)) || change.len() <= MOST_AT_ONCE {
            return self.change(at, change, durability).await;
        }
        let mut next = at;
        while next < end {
            let len = (end - next).min(MOST_AT_ONCE - next % MOST_AT_ONCE);
            self.change(next, change.part(len), Durability::Cached).await?;
            next += len;
        }
        // One flush for all parts.
        if durability == Durability::Stable { self.flush().await } else { Ok(()) }
    }

    /// Makes a change on all live legs. The range lies within the array and is not empty.
    async fn change(self: &Arc<Self>, at: u64, change: Change, durability: Durability) -> Result<()> {
        let range = self.blocks(at, change.len());
        let _lock = self.locks.lock(range.clone()).await;
        self.refuse_if_lost()?;
        if matches!(change, Change::Discard(_)) && !self.zeroes_fast(ZeroMode::MayPunch) {
            // Nobody is promised zeroes. Untouched, all legs stay as equal as they were.
            return Ok(());
        }
        let _tracked: Tracked<'_> = self.prepare(&range).await?;
        let failure = self.change_legs(at, &change, durability).await;
        if failure.is_some() {
            // Legs may differ now; while the lock is held nobody has seen that yet.
            self.mark_unsynced(range.start / BLOCK * BLOCK..range.end);
        }
        self.recorded().await?;
        failure.map_or(Ok(()), Err)
    }

    /// Writes all live legs where that waits for nothing, in the same order of steps; returns whether it is done. Else
    /// it is to be done by [`Inner::change`], from the start.
    pub(super) fn write_now(self: &Arc<Self>, at: u64, data: &[u8]) -> bool {
        // Members are of one kind, mostly: one of them tells whether this is worth a lock.
        if !self.roster.load().written().next().is_some_and(|member| member.device.is_instant()) {
            return false;
        }
        let Ok(_entered) = self.enter() else { return false };
        let range = self.blocks(at, data.len() as u64);
        let Some(_lock) = self.locks.try_lock(range.clone()) else { return false };
        if self.refuse_if_lost().is_err() {
            return false;
        }
        let (_tracked, true) = self.track(&range) else { return false };
        let roster = self.roster.load();
        let legs = || targets(&roster, at, data.len() as u64);
        if !legs().all(|leg| leg.member.device.is_instant() && !leg.member.is_faulty()) {
            return false;
        }
        for Target { span, member, at: to } in legs() {
            let _counted = member.load.begin();
            let part = &data[(span.at - at) as usize..][..span.len as usize];
            if !member.device.write_now(member.position(to), part) {
                // As where a leg fails: legs may differ now; while the lock is held nobody has seen that yet.
                self.mark_unsynced(range.start / BLOCK * BLOCK..range.end);
                return false;
            }
            member.note_written(&(to.0..to.0 + span.len));
        }
        self.is_recorded()
    }

    /// Submits the change to all live legs at once and waits for all. Returns a failure that was not settled by
    /// taking the leg out or by listing blocks of it as bad.
    async fn change_legs(&self, at: u64, change: &Change, durability: Durability) -> Option<Error> {
        // Taken under the range lock: whoever has joined by now is written, and whoever joins later copies this.
        let roster = self.roster();
        let legs = match change {
            Change::Data(data) => data_legs(&roster, at, data),
            Change::Zeroes(len, _) | Change::Discard(len) => zero_legs(&roster, at, *len),
        };
        let mode = match change {
            Change::Zeroes(_, mode) => *mode,
            Change::Discard(_) => ZeroMode::MayPunch,
            Change::Data(_) => ZeroMode::Allocate,
        };
        let orders = legs.iter().map(|leg| (leg.member, leg.order(mode, durability))).collect();
        let answers = self.ask_all(orders).await;
        let outcomes: Vec<(Leg<'_>, Result<BytesMut>)> = legs.into_iter().zip(answers).collect();
        for (leg, _) in outcomes.iter().filter(|(_, outcome)| outcome.is_ok()) {
            leg.member.note_written(&leg.range());
            if leg.is_unread {
                let at = leg.member.position(MemberOffset(leg.at));
                leg.member.unread.note(at..at + leg.len);
            }
        }
        let mut unsettled = None;
        for (leg, outcome) in &outcomes {
            let Err(failure) = outcome else { continue };
            // Another leg that counts has this: then a few bad blocks need not cost the member.
            let is_elsewhere = outcomes.iter().any(|(other, outcome)| {
                outcome.is_ok() && other.of == leg.of && other.of.is_some() && other.member.is_in_sync()
            });
            if is_elsewhere && self.narrow(leg, failure, durability).await {
                continue;
            }
            if self.judge(leg.member, failure) == Verdict::Kept {
                unsettled.get_or_insert_with(|| failure.clone());
            }
        }
        unsettled
    }

    /// Writes a leg that failed again, block by block, and lists those that fail again as bad. Returns whether that was
    /// possible: it is not for a device that seems gone as a whole, nor where durability failed.
    async fn narrow(&self, leg: &Leg<'_>, failure: &Error, durability: Durability) -> bool {
        let (Some(data), Error::Io { operation: Operation::Write, .. }, false) =
            (&leg.data, failure, failure.spares_device())
        else {
            return false;
        };
        if leg.member.superblock.bad_block_log.is_none() || leg.member.is_faulty() {
            return false;
        }
        let (mut at, end) = (leg.at, leg.at + leg.len);
        let mut bad = RangeSet::default();
        while at < end {
            let to = ((at / BLOCK + 1) * BLOCK).min(end);
            let part = data.slice((at - leg.at) as usize..(to - leg.at) as usize);
            let to_be = leg.member.position(MemberOffset(at));
            match self.ask(leg.member, Order::Write { at: to_be, data: part, durability }).await {
                Ok(_) => leg.member.note_written(&(at..to)),
                // Whole blocks: what a partial write of a block left in the rest of it is unknown.
                Err(Error::Io { operation: Operation::Write, .. }) => {
                    bad.insert(at / BLOCK * BLOCK..to.next_multiple_of(BLOCK));
                }
                Err(_) => return false,
            }
            if bad.len() > MOST_BAD * BLOCK {
                return false;
            }
            at = to;
        }
        for range in bad.iter() {
            if !self.list_bad(leg.member, range) {
                return false;
            }
        }
        true
    }

    /// Lists a range of a member's data area as bad; `false` where the member has no list. The caller waits for
    /// `recorded` before it acknowledges anything that relies on it.
    pub(crate) fn list_bad(&self, member: &Member, range: Range<u64>) -> bool {
        let (at, len) = (member.position(MemberOffset(range.start)), range.end - range.start);
        {
            let _nobody_meanwhile = self.verdicts.lock();
            self.noticed.fetch_add(1, Ordering::AcqRel);
            if !member.note_bad(range) {
                return false;
            }
            self.rearranged();
        }
        if let Some(slot) = member.slot() {
            let path = member.device.name().to_owned();
            self.tell(Event::BadBlocks { slot: slot.0, path, at, len });
        }
        true
    }

    /// Makes all completed changes durable on every live leg.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.refuse_if_lost()?;
        // Members that are being filled as well: what was acknowledged must be on them when they count.
        let roster = self.roster();
        let members: Vec<&Arc<Member>> = roster.written().collect();
        let unread: Vec<_> = members.iter().map(|member| member.unread.take()).collect();
        let answers = self.ask_all(members.iter().map(|member| (*member, Order::Flush)).collect()).await;
        let mut unsettled = None;
        for ((member, outcome), pages) in members.into_iter().zip(answers).zip(unread) {
            let Err(failure) = outcome else {
                self.forget(member, pages);
                continue;
            };
            if self.judge(member, &failure) == Verdict::Kept {
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

    /// Has all live legs begin to write a range to their disks, each in its own time.
    pub(super) fn begin_write_back(&self, at: u64, len: u64) {
        for leg in zero_legs(&self.roster(), at, len) {
            leg.member.device.begin_write_back(leg.member.position(MemberOffset(leg.at)), leg.len);
        }
    }

    /// Lets go of pages that are on disk now, in a task of its own: nobody waits for advice. A member has one at a time; a
    /// disk that hangs in it loses no more than that.
    fn forget(&self, member: &Arc<Member>, pages: Vec<Range<u64>>) {
        if pages.is_empty() {
            return;
        }
        member.unread.set_busy(true);
        let member = Arc::clone(member);
        self.runtime.spawn(Box::pin(async move {
            if let Err(refused) = member.device.forget(pages).await {
                tracing::debug!(member = member.device.name(), %refused, "pages of a second copy stay in memory");
            }
            member.unread.set_busy(false);
        }));
    }

    /// Makes durable, once, what an earlier process may have left in the machine's caches when it was killed: two copies
    /// that are equal there may differ after a power cut.
    pub(crate) async fn settle_caches(&self) -> Result<()> {
        if !self.settled.load(Ordering::Acquire) {
            self.flush().await?;
            self.settled.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The clean stop. Runs once; a second call finds everything done.
    pub(super) async fn stop(self: &Arc<Self>) -> Result<()> {
        self.gate.close();
        self.held.store(false, Ordering::Release);
        self.wake.notify_one();
        self.vacancy.notify_one();
        self.scrub.cancel();
        self.gate.drained().await;
        let outcome = if self.read_only { Ok(()) } else { self.mark_clean().await };
        let let_go = pin!(self.let_go());
        // Whichever comes first: a disk that hangs is waited for no longer.
        drop(select(let_go, self.runtime.sleep(LETTING_GO)).await);
        outcome
    }

    async fn mark_clean(&self) -> Result<()> {
        self.flush().await?;
        self.mark_stopped().await
    }

    /// Waits until nobody is at work in the members: whoever opens them next finds them free.
    async fn let_go(&self) {
        self.background.ended().await;
        let roster = self.roster();
        while roster.written().any(|member| member.unread.is_busy()) {
            self.runtime.sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Where a part of a chunk is written.
struct Target<'a> {
    span: Span,
    member: &'a Arc<Member>,
    at: MemberOffset,
}

/// Where a range is written: span by span, each on all live members that hold its chunk.
fn targets(roster: &Roster, at: u64, len: u64) -> impl Iterator<Item = Target<'_>> {
    roster.geometry.spans(at, len).flat_map(move |span| {
        roster.geometry.places(span.chunk).flat_map(move |place| {
            let at = MemberOffset(place.at.0 + span.within);
            let members = roster.at(place).filter(|member| member.is_written());
            members.map(move |member| Target { span, member, at })
        })
    })
}

fn data_legs<'a>(roster: &'a Roster, at: u64, data: &Bytes) -> Vec<Leg<'a>> {
    let legs = targets(roster, at, data.len() as u64).map(|Target { span, member, at: to }| {
        let start = (span.at - at) as usize;
        let data = Some(data.slice(start..start + span.len as usize));
        let is_unread = member.device.keeps_pages() && !is_first(roster, span, member);
        Leg { member, of: Some(span.at), at: to.0, len: span.len, data, is_unread }
    });
    legs.collect()
}

/// Where a range lies on each live member. Without a payload to split, neighbouring chunks of a member become one range: a few
/// operations for any length.
fn zero_legs(roster: &Roster, at: u64, len: u64) -> Vec<Leg<'_>> {
    let mut ranges: Vec<RangeSet> = vec![RangeSet::default(); roster.seats.len()];
    for span in roster.geometry.spans(at, len) {
        for place in roster.geometry.places(span.chunk) {
            let start = place.at.0 + span.within;
            ranges[place.slot.0].insert(start..start + span.len);
        }
    }
    let mut legs = Vec::new();
    for (seat, set) in roster.seats.iter().zip(ranges) {
        for member in seat.all().filter(|member| member.is_written()) {
            legs.extend(set.iter().map(|range| {
                let len = range.end - range.start;
                Leg { member, of: None, at: range.start, len, data: None, is_unread: false }
            }));
        }
    }
    legs
}
