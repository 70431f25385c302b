//! Reading copies apart, and making all of them hold what somebody above knows to be right.
//!
//! The array itself cannot tell which of two copies that differ is good. Who keeps checksums in what it stores can: it
//! reads the range in one way after the other ([`Inner::read_copy`]), and gives back what it found good
//! ([`Inner::mend`]).
//!
//! **Ways.** With r copies and N members there are r ways by number, and r + N where members hold more than one number
//! (all layouts but near copies on r members): way `c` reads copy number c of each chunk; way `r + m` avoids the member in slot m. So whichever *one*
//! member holds noise, one way reads none of it, however a range is spread over chunks; and if in each set of mirrors
//! it is the same number, one way does as well. A copy that is missing, incomplete, listed as bad or unreadable is
//! skipped for the next of its chunk. Who wants to know which member holds what asks for [`Inner::holders`].
//!
//! **A mend is no write.** The array's content stays the same: one copy did not have it. Therefore no bit is set before:
//! a bit would, after a power cut, have the first copy in slot order copied over the others, and that may be the
//! wrong one. A mend that is cut short leaves the wrong copy wrong in part, as it was. For the same reason a copy that
//! could not be rewritten does not make the range unsynced: the error says that it differs still.
//!
//! Whole blocks are read and written, under their range lock: what else is in them stays what that copy held, and no
//! writer comes between. A copy that cannot be read is written, with what another copy holds around the range. Members
//! that are being filled, and blocks that are listed as bad, are written without a look: a rebuild may have copied the
//! bad content already and not have counted it yet. Where a member is missing, the range is marked dirty in the bitmap
//! once all others are equal, so that it gets what was mended when it returns. Rewrites are durable and read back before
//! the lock is let go; as long as one copy is not known to be good, the mend is an error.
//!
//! Cost: all copies of the range are read, up to [`WINDOW`] at once; each copy that differs costs a write and a read of
//! the blocks that differ, and its member a flush a window.

use super::{Contents, Inner, Order, Roster, Verdict, run_to_end};
use crate::device::{Durability, Holder, check_range};
use crate::error::{Error, Operation, Result};
use crate::event::Event;
use crate::geometry::{Chunk, MemberOffset, Slot, Span};
use crate::member::Member;
use crate::sync::differing_runs;
use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Bytes of the array that are mended at once: writers wait for no longer than that takes.
const WINDOW: u64 = 1 << 20;

/// A part of a copy that is rewritten.
struct Rewrite {
    member: Arc<Member>,
    /// First byte on its device.
    at: u64,
    good: Bytes,
    /// First byte of the array that differs, and bytes to the last one that does.
    of: (u64, u64),
    /// The copy was one that is read. One that is being filled, or listed as bad, is written without a look.
    counts: bool,
}

impl Inner {
    /// In how many ways a range can be read.
    pub(super) fn ways(&self) -> usize {
        let roster = self.roster.load();
        let (copies, members) = (roster.geometry.copies(), roster.geometry.members());
        let slot = |chunk, copy| roster.geometry.place(Chunk(chunk), copy).slot;
        // Neighbouring chunks tell: what moves on does so from the first to the second.
        let is_apart = members == copies && (0..copies).all(|copy| slot(0, copy) == slot(1, copy));
        if is_apart { copies } else { copies + members }
    }

    /// Reads a range in one way, as it is: nothing is settled first.
    pub(super) async fn read_copy(self: &Arc<Self>, at: u64, buf: BytesMut, way: usize) -> Result<BytesMut> {
        let (len, inner) = (buf.len() as u64, Arc::clone(self));
        check_range(Operation::Read, at, len, self.size())?;
        if way >= self.ways() {
            return Err(Error::NoCopy { name: self.name.clone(), at, len });
        }
        if len == 0 {
            return Ok(buf);
        }
        run_to_end(self, async move {
            // No write is half on its legs while this reads.
            let _lock = inner.locks.lock(inner.blocks(at, len)).await;
            let roster = inner.roster();
            let mut whole = buf;
            for span in roster.geometry.spans(at, len) {
                let part = inner.read_way(&roster, span, way).await?;
                let start = (span.at - at) as usize;
                whole[start..start + part.len()].copy_from_slice(&part);
            }
            Ok(whole)
        })
        .await
    }

    async fn read_way(&self, roster: &Roster, span: Span, way: usize) -> Result<BytesMut> {
        let mut failure = None;
        for (member, at) in in_order(roster, span, way) {
            match self.ask(member, Order::Read { at, len: span.len }).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    member.count_read_error();
                    failure.get_or_insert(error);
                }
            }
        }
        Err(failure.unwrap_or_else(|| self.no_copy(span)))
    }

    /// Where each readable copy of a range lies; nothing of a range that reaches past the end.
    pub(super) fn holders(&self, at: u64, len: u64) -> Vec<Holder> {
        let roster = self.roster();
        if check_range(Operation::Read, at, len, roster.geometry.size()).is_err() {
            return Vec::new();
        }
        let spans = roster.geometry.spans(at, len);
        let copies = spans.flat_map(|span| {
            let holder = |(member, place): (&Arc<Member>, u64)| Holder {
                device: Arc::clone(&member.device),
                at: place,
                len: span.len,
                of: span.at - at,
            };
            roster.readable(span).into_iter().map(holder).collect::<Vec<_>>()
        });
        copies.collect()
    }

    /// Whether all copies of the range can be read and are equal.
    pub(super) async fn agree(self: &Arc<Self>, at: u64, len: u64) -> Result<bool> {
        check_range(Operation::Read, at, len, self.size())?;
        let inner = Arc::clone(self);
        run_to_end(self, async move {
            let mut next = at;
            while next < at + len {
                let part = (WINDOW - next % WINDOW).min(at + len - next);
                let _lock = inner.locks.lock(inner.blocks(next, part)).await;
                let roster = inner.roster();
                for span in roster.geometry.spans(next, part) {
                    let Contents { good, bad } = inner.read_copies(&roster.readable(span), span.len).await;
                    for (member, ..) in &bad {
                        member.count_read_error();
                    }
                    let differs = good.windows(2).any(|pair| pair[0].2 != pair[1].2);
                    if differs || good.is_empty() || !bad.is_empty() {
                        return Ok(false);
                    }
                }
                next += part;
            }
            Ok(true)
        })
        .await
    }

    /// Rewrites every copy of the range that differs from `good`. Returns how many did.
    pub(super) async fn mend(self: &Arc<Self>, at: u64, good: Bytes) -> Result<u64> {
        if self.read_only {
            return Err(Error::ReadOnly { operation: Operation::Write });
        }
        check_range(Operation::Write, at, good.len() as u64, self.size())?;
        let inner = Arc::clone(self);
        run_to_end(self, async move {
            let _entered = inner.enter()?;
            let (mut rest, mut next, mut rewritten) = (good, at, 0);
            while !rest.is_empty() {
                // Cut where windows end in the array, so that no block is in two of them.
                let len = (WINDOW - next % WINDOW).min(rest.len() as u64);
                rewritten = inner.mend_window(next, &rest.split_to(len as usize)).await?.max(rewritten);
                next += len;
            }
            Ok(rewritten)
        })
        .await
    }

    async fn mend_window(self: &Arc<Self>, at: u64, good: &Bytes) -> Result<u64> {
        let range = self.blocks(at, good.len() as u64);
        let _lock = self.locks.lock(range.clone()).await;
        self.refuse_if_lost()?;
        // Taken under the lock: who has joined by now is mended, and who joins later copies what is mended.
        let roster = self.roster();
        let mut rewrites = Vec::new();
        for span in roster.geometry.spans(range.start, range.end - range.start) {
            rewrites.extend(self.to_rewrite(&roster, span, at, good).await?);
        }
        if rewrites.is_empty() {
            return Ok(0);
        }
        let outcome = self.carry_out(&rewrites).await;
        // Who was taken out is on record before the others count.
        let recorded = self.recorded().await;
        let members = outcome.and_then(|members| recorded.map(|()| members))?;
        if self.roster().is_degraded() {
            // Who returns gets what is dirty. All copies that are here are equal now: it does no harm.
            self.prepare(&range).await?;
        }
        Ok(members)
    }

    /// What is to be written to make all copies of a span hold what of `good`, which begins at `at`, belongs there. An
    /// error, where a copy can neither be read nor be written as a whole.
    async fn to_rewrite(&self, roster: &Roster, span: Span, at: u64, good: &Bytes) -> Result<Vec<Rewrite>> {
        let (from, to) = (at.max(span.at), (at + good.len() as u64).min(span.at + span.len));
        let part = good.slice((from - at) as usize..(to - at) as usize);
        let skip = from - span.at;
        let written = roster.geometry.places(span.chunk).flat_map(|place| {
            let at = MemberOffset(place.at.0 + span.within);
            let members = roster.at(place).filter(|member| member.is_written());
            members.map(move |member| (member, at))
        });
        let (counted, others): (Vec<_>, Vec<_>) =
            written.partition(|(member, at)| member.is_readable(*at, span.len));
        let counted: Vec<_> = counted.into_iter().map(|(member, at)| (member, member.position(at))).collect();
        let Contents { good: copies, bad } = self.read_copies(&counted, span.len).await;
        let patched = |content: &BytesMut| {
            let mut wanted = content.clone();
            wanted[skip as usize..skip as usize + part.len()].copy_from_slice(&part);
            wanted.freeze()
        };
        let mut rewrites = Vec::new();
        for (member, place, content) in &copies {
            let wanted = patched(content);
            rewrites.extend(differing_runs(Some(content), &wanted).into_iter().map(|run| {
                let start = run.start as u64;
                let good = wanted.slice(run.clone());
                let of = differing(&content[run], &good);
                let of = (span.at + start + of.start as u64, of.len() as u64);
                Rewrite { member: Arc::clone(member), at: place + start, good, of, counts: true }
            }));
        }
        for (member, place, failure) in bad {
            member.count_read_error();
            // Whole blocks: of the rest of them, what another copy holds.
            let wanted = match copies.first() {
                Some((.., content)) => patched(content),
                None if part.len() as u64 == span.len => part.clone(),
                None => return Err(failure),
            };
            rewrites.push(Rewrite { member, at: place, good: wanted, of: (from, to - from), counts: true });
        }
        for (member, place) in others {
            let (member, at) = (Arc::clone(member), member.position(place) + skip);
            rewrites.push(Rewrite { member, at, good: part.clone(), of: (from, to - from), counts: false });
        }
        Ok(rewrites)
    }

    /// Writes, flushes and reads back. Returns how many members have been made good.
    async fn carry_out(&self, rewrites: &[Rewrite]) -> Result<u64> {
        let orders = rewrites.iter().map(|one| {
            let (at, data) = (one.at, one.good.clone());
            (&one.member, Order::Write { at, data, durability: Durability::Cached })
        });
        let written = self.ask_all(orders.collect()).await;
        let mut members: Vec<&Arc<Member>> = Vec::new();
        for Rewrite { member, .. } in rewrites {
            if !members.iter().any(|one| Arc::ptr_eq(one, member)) {
                members.push(member);
            }
        }
        let flushes = members.iter().map(|member| (*member, Order::Flush)).collect();
        let mut outcomes: Vec<Result<()>> =
            self.ask_all(flushes).await.into_iter().map(|flushed| flushed.map(drop)).collect();
        for (one, written) in rewrites.iter().zip(written) {
            let number = members.iter().position(|member| Arc::ptr_eq(member, &one.member)).unwrap_or(0);
            let outcome = &mut outcomes[number];
            if outcome.is_ok() {
                *outcome = match written {
                    Ok(_) => self.verify(&one.member, one.at, &one.good).await,
                    Err(failure) => Err(failure),
                };
            }
        }
        let (mut mended, mut unsettled) = (0, None);
        for (member, outcome) in members.iter().zip(outcomes) {
            match outcome {
                Ok(()) => {
                    let own = || rewrites.iter().filter(|one| Arc::ptr_eq(&one.member, member));
                    for Rewrite { at, good, .. } in own() {
                        let at = at - member.position(MemberOffset(0));
                        member.note_written(&(at..at + good.len() as u64));
                    }
                    if own().any(|one| one.counts) {
                        mended += 1;
                        member.count_corrected();
                    }
                    own().filter(|one| one.counts).for_each(|one| self.tell_of(one));
                }
                Err(failure) if self.judge(member, &failure) == Verdict::Kept => {
                    unsettled.get_or_insert(failure);
                }
                Err(_) => {}
            }
        }
        unsettled.map_or(Ok(mended), Err)
    }

    fn tell_of(&self, one: &Rewrite) {
        let (path, (at, len)) = (one.member.device.name().to_owned(), one.of);
        if let Some(slot) = one.member.slot() {
            self.tell(Event::Corrected { slot: slot.0, path, at, len });
        }
    }

    /// Changes whenever another copy may have become the one that is usually read.
    pub(super) fn arrangement(&self) -> u64 {
        self.arrangements.load(Ordering::Acquire)
    }
}

/// The readable copies of a span, in the order in which a way asks them.
fn in_order(roster: &Roster, span: Span, way: usize) -> Vec<super::Copy<'_>> {
    let (geometry, copies) = (&roster.geometry, roster.geometry.copies());
    let avoided = way.checked_sub(copies).map(Slot);
    let mut numbers: Vec<usize> = (0..copies).map(|number| (way.min(copies) + number) % copies).collect();
    if let Some(avoided) = avoided {
        numbers.sort_by_key(|number| geometry.place(span.chunk, *number).slot == avoided);
    }
    let places = numbers.into_iter().map(|number| geometry.place(span.chunk, number));
    let readable = places.filter_map(|place| {
        let at = MemberOffset(place.at.0 + span.within);
        let member = roster.at(place).find(|member| member.is_readable(at, span.len))?;
        Some((member, member.position(at)))
    });
    readable.collect()
}

/// From the first byte that differs to the last.
fn differing(old: &[u8], new: &[u8]) -> std::ops::Range<usize> {
    let differs = |(old, new): (&u8, &u8)| old != new;
    let first = old.iter().zip(new).position(differs).unwrap_or(0);
    let last = old.iter().zip(new).rposition(differs).unwrap_or(0);
    first..last + 1
}
