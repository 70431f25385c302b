//! Comparing copies, and making them equal where asked to: md's `check` and `repair`.
//!
//! The array is walked in windows under range locks. All copies of a window that may be read are read at once and
//! compared there: outside the lock, a write under way would look like a difference. What is still unsynced is made
//! equal first, or left out where that cannot be done: it is known to differ.
//!
//! Where more than half of the copies agree, they are right; else the first in slot order is taken, as md does. A
//! repair is prepared like a write, durable and read back before the lock is let go. A power cut in its middle leaves
//! a dirty region, which the next start makes equal.
//!
//! A sector that one copy cannot read is rewritten from another one, with repair or without, as a client's read does.
//! To find it, the span is halved down to blocks: what can be read is compared, not overwritten unseen.
//!
//! Cost: each copy is read once; a window's worth of memory for each copy, and no copying unless something differs.

use super::Pace;
use super::resync::{differing_runs, equalise};
use crate::device::Durability;
use crate::error::{Error, Result};
use crate::event::{Event, Mismatch, Place};
use crate::geometry::{MemberOffset, Span};
use crate::member::Member;
use crate::superblock::SECTOR;
use crate::volume::{BLOCK, Contents, Inner, Order, RangeSet, Roster, Verdict};
use bytes::{Bytes, BytesMut};
use futures_util::future::{join_all, select};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::Notify;

/// Bytes of the array that are compared at once: writers wait for no longer than that takes.
const WINDOW: u64 = 1 << 20;
/// Mismatches of a scrub that are kept and told one by one. More are counted only: they say that a member is wrong as a
/// whole.
const MOST_KEPT: usize = 1000;

/// The scrub of a volume: whether one runs, and what the last one found.
#[derive(Debug, Default)]
pub(crate) struct Scrub {
    state: Mutex<State>,
    cancelled: Notify,
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    is_running: bool,
    is_cancelled: bool,
    /// Mismatches, counted.
    count: u64,
    /// The first of them.
    found: Vec<Mismatch>,
}

/// A scrub that runs. One at a time.
struct Running(Arc<Inner>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.scrub.state.lock().is_running = false;
        self.0.scrub.ended.notify_waiters();
    }
}

impl Scrub {
    /// Mismatches that the last scrub found, or the one that runs has found so far.
    pub(crate) fn count(&self) -> u64 {
        self.state.lock().count
    }

    /// The first [`MOST_KEPT`] of them.
    pub(crate) fn mismatches(&self) -> Vec<Mismatch> {
        self.state.lock().found.clone()
    }

    /// Lets the scrub that runs, if there is one, end after its window.
    pub(crate) fn cancel(&self) {
        self.state.lock().is_cancelled = true;
        self.cancelled.notify_waiters();
    }

    /// Waits until none runs.
    pub(crate) async fn ended(&self) {
        loop {
            let ended = self.ended.notified();
            futures_util::pin_mut!(ended);
            ended.as_mut().enable();
            if !self.state.lock().is_running {
                return;
            }
            ended.await;
        }
    }

    fn is_cancelled(&self) -> bool {
        self.state.lock().is_cancelled
    }

    /// Counts mismatches in; gives those that are to be told.
    fn note(&self, mut found: Vec<Mismatch>) -> Vec<Mismatch> {
        let mut state = self.state.lock();
        state.count += found.len() as u64;
        found.truncate(MOST_KEPT - state.found.len());
        state.found.extend(found.iter().cloned());
        found
    }
}

/// Starts a scrub, unless one runs.
pub(crate) fn start(inner: &Arc<Inner>, repair: bool) -> Result<()> {
    let _entered = inner.enter()?;
    inner.refuse_if_unwritable()?;
    {
        let mut state = inner.scrub.state.lock();
        if state.is_running {
            return Err(Error::ScrubRunning { name: inner.name.clone() });
        }
        *state = State { is_running: true, ..State::default() };
    }
    let (running, present) = (Running(Arc::clone(inner)), inner.background.enter());
    inner.runtime.spawn(Box::pin(async move {
        run(running, repair).await;
        drop(present);
    }));
    Ok(())
}

/// Why a scrub that did not fail came to its end.
enum End {
    Reached,
    Cancelled,
}

async fn run(running: Running, repair: bool) {
    let inner = Arc::clone(&running.0);
    inner.tell(Event::ScrubStarted { repair });
    let outcome = walk(&inner, repair).await;
    let mismatches = inner.scrub.count();
    // Before its end is told: whoever waits for that may start the next one.
    drop(running);
    inner.tell(match outcome {
        Ok(End::Reached) => Event::ScrubFinished { repair, mismatches },
        Ok(End::Cancelled) => Event::ScrubStopped { cause: "it was cancelled".to_owned() },
        Err(failure) => Event::ScrubStopped { cause: failure.to_string() },
    });
}

async fn walk(inner: &Arc<Inner>, repair: bool) -> Result<End> {
    let total = inner.size();
    let walk = if repair { &inner.progress.repair } else { &inner.progress.check };
    let underway = walk.begin(inner.runtime.now(), total, 0);
    let mut pace = Pace::new(inner);
    let mut next = 0;
    while next < total {
        if inner.scrub.is_cancelled() {
            // A volume that is being stopped ends its scrub too, and says so.
            let _entered = inner.enter()?;
            return Ok(End::Cancelled);
        }
        let window = next..(next + WINDOW).min(total);
        next = window.end;
        let bytes = window.end - window.start;
        if inner.untouched.covers(&window) {
            // Nothing was ever written there: what copies hold means nothing.
            underway.advance(next);
            continue;
        }
        scrub_window(inner, window, repair).await?;
        underway.advance(next);
        rest(inner, &mut pace, bytes).await;
    }
    Ok(End::Reached)
}

/// Keeps the pace, unless the scrub is cancelled meanwhile.
async fn rest(inner: &Arc<Inner>, pace: &mut Pace, bytes: u64) {
    let cancelled = inner.scrub.cancelled.notified();
    futures_util::pin_mut!(cancelled);
    cancelled.as_mut().enable();
    if inner.scrub.is_cancelled() {
        return;
    }
    let rested = pace.took(inner, bytes);
    futures_util::pin_mut!(rested);
    let _whichever_comes_first = select(rested, cancelled).await;
}

/// Compares all copies of a window, and makes them equal if asked to.
async fn scrub_window(inner: &Arc<Inner>, window: Range<u64>, repair: bool) -> Result<()> {
    let is_unsynced = inner.unsynced.lock().intersects(&window);
    // While resync is held back, who holds it looks for the good copies itself: what is unsynced is not compared.
    if is_unsynced && !inner.held.load(Ordering::Acquire) {
        match equalise(inner, window.clone()).await {
            Err(stopped @ Error::Stopped { .. }) => return Err(stopped),
            Err(failure) => tracing::warn!(volume = %inner.name, %failure, "not scrubbed: still unsynced"),
            Ok(()) => {}
        }
    }
    let _entered = inner.enter()?;
    let _lock = inner.locks.lock(window.clone()).await;
    inner.refuse_if_unwritable()?;
    let roster = inner.roster();
    let spans = spans(&roster, &window, &inner.unsynced.lock().within(&window));
    let looks = spans.into_iter().map(|span| look(inner, &roster, span));
    let findings: Vec<Finding> = join_all(looks).await.into_iter().flatten().collect();
    let outcome = if repair { mend(inner, &findings).await } else { Ok(vec![false; findings.len()]) };
    // A member that was taken out, here or elsewhere, is on record before the others count as the truth.
    let recorded = inner.recorded().await;
    let repaired = outcome.as_ref().map_or_else(|_| vec![false; findings.len()], Clone::clone);
    report(inner, &roster, &findings, &repaired);
    outcome.and(recorded)
}

/// What is to be compared of a window: all but what is unsynced, in whole blocks.
fn spans(roster: &Roster, window: &Range<u64>, unsynced: &[Range<u64>]) -> Vec<Span> {
    let mut rest = RangeSet::default();
    rest.insert(window.clone());
    for range in unsynced {
        rest.remove(&(range.start / BLOCK * BLOCK..range.end.next_multiple_of(BLOCK)));
    }
    let spans = |range: Range<u64>| roster.geometry.spans(range.start, range.end - range.start);
    rest.within(window).into_iter().flat_map(spans).collect()
}

/// A span whose copies differ somewhere.
struct Finding {
    span: Span,
    /// The member, the position on its device, and what is there.
    copies: Vec<(Arc<Member>, u64, BytesMut)>,
    differences: Vec<Difference>,
}

impl Finding {
    /// What all copies should hold.
    fn good(&self) -> BytesMut {
        let mut good = self.copies[0].2.clone();
        for Difference { range, source, .. } in self.differences.iter().filter(|one| one.source > 0) {
            good[range.clone()].copy_from_slice(&self.copies[*source].2[range.clone()]);
        }
        good
    }
}

/// Reads and compares the copies of a span. Copies that cannot be read are rewritten.
async fn look(inner: &Arc<Inner>, roster: &Roster, span: Span) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut left = vec![(span, false)];
    while let Some((span, is_counted)) = left.pop() {
        // What is listed as bad on one member is no reason to leave the rest of the span out.
        if span.len > BLOCK && has_bad(roster, span) {
            left.extend(halves(span).map(|half| (half, is_counted)));
            continue;
        }
        let Contents { mut good, bad } = inner.read_copies(&roster.readable(span), span.len).await;
        for (member, _, failure) in bad.iter().filter(|_| !is_counted) {
            member.count_read_error();
            tracing::warn!(volume = %inner.name, member = member.device.name(), %failure, "read failed");
        }
        if !bad.is_empty() && span.len > BLOCK {
            left.extend(halves(span).map(|half| (half, true)));
            continue;
        }
        if !bad.is_empty() {
            rewrite_unreadable(inner, span).await;
            good = inner.read_copies(&roster.readable(span), span.len).await.good;
        }
        let contents: Vec<&[u8]> = good.iter().map(|(.., content)| content.as_ref()).collect();
        let differences = differences(&contents);
        if !differences.is_empty() {
            findings.push(Finding { span, copies: good, differences });
        }
    }
    findings
}

/// A span in two parts, cut at a block, the last one first: that is how they come off a stack in order.
fn halves(span: Span) -> [Span; 2] {
    let [first, second] = span.halves(BLOCK);
    [second, first]
}

/// Whether anything of a span is listed as bad on a member that holds a copy of it.
fn has_bad(roster: &Roster, span: Span) -> bool {
    roster.geometry.places(span.chunk).any(|place| {
        let at = MemberOffset(place.at.0 + span.within);
        roster.at(place).any(|member| member.is_written() && member.is_bad(at, span.len))
    })
}

/// Rewrites what cannot be read on one copy of a span from another one. Two that each lost another sector help each
/// other out.
async fn rewrite_unreadable(inner: &Arc<Inner>, span: Span) {
    let mut left = vec![span];
    while let Some(piece) = left.pop() {
        match inner.recover_piece(piece).await {
            Ok(_) => {}
            Err(_) if piece.len > SECTOR => left.extend(piece.halves(SECTOR)),
            Err(failure) => tracing::warn!(volume = %inner.name, %failure, "no copy can be read"),
        }
    }
}

/// A run of sectors in which copies differ in one and the same way.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    /// Bytes, from the start of the copies.
    range: Range<usize>,
    /// The copy that differs from all others, which agree and are at least two.
    wrong: Option<usize>,
    /// The copy to go by.
    source: usize,
}

/// Compares copies of one length sector by sector.
fn differences(copies: &[&[u8]]) -> Vec<Difference> {
    let mut found: Vec<Difference> = Vec::new();
    let Some((first, others)) = copies.split_first() else { return found };
    if others.iter().all(|other| other == first) {
        return found;
    }
    for start in (0..first.len()).step_by(SECTOR as usize) {
        let range = start..(start + SECTOR as usize).min(first.len());
        let sectors: Vec<&[u8]> = copies.iter().map(|copy| &copy[range.clone()]).collect();
        let Some((source, wrong)) = verdict(&sectors) else { continue };
        match found.last_mut() {
            Some(last) if last.range.end == range.start && (last.source, last.wrong) == (source, wrong) => {
                last.range.end = range.end;
            }
            _ => found.push(Difference { range, wrong, source }),
        }
    }
    found
}

/// Which copy to go by, and which is the odd one; `None` where all are equal.
fn verdict(copies: &[&[u8]]) -> Option<(usize, Option<usize>)> {
    let votes = |copy: &[u8]| copies.iter().filter(|other| **other == copy).count();
    let majority = copies.iter().position(|copy| votes(copy) * 2 > copies.len());
    let source = majority.unwrap_or(0);
    let mut unlike = (0..copies.len()).filter(|&number| copies[number] != copies[source]);
    let first = unlike.next()?;
    let is_alone = unlike.next().is_none();
    Some((source, Some(first).filter(|_| is_alone && majority.is_some())))
}

/// A part of a copy that is rewritten.
struct Rewrite<'a> {
    /// Which of the findings it is of.
    finding: usize,
    member: &'a Arc<Member>,
    at: u64,
    good: Bytes,
}

/// Makes the copies of all findings equal, durably. Returns which of them are equal now.
async fn mend(inner: &Arc<Inner>, findings: &[Finding]) -> Result<Vec<bool>> {
    let (Some(first), Some(last)) = (findings.first(), findings.last()) else { return Ok(Vec::new()) };
    let _tracked = inner.prepare(&(first.span.at..last.span.at + last.span.len)).await?;
    let rewrites = rewrites(findings);
    let writes = rewrites.iter().map(|one| {
        let (at, data) = (one.at, one.good.clone());
        (one.member, Order::Write { at, data, durability: Durability::Cached })
    });
    let mut outcomes = inner.ask_all(writes.collect()).await;
    let mut members: Vec<&Arc<Member>> = Vec::new();
    for Rewrite { member, .. } in &rewrites {
        if !members.iter().any(|one| Arc::ptr_eq(one, member)) {
            members.push(member);
        }
    }
    let flushes = members.iter().map(|member| (*member, Order::Flush)).collect();
    for (member, flushed) in members.iter().zip(inner.ask_all(flushes).await) {
        let Err(failure) = flushed else { continue };
        let own = rewrites.iter().zip(&mut outcomes).filter(|(one, _)| Arc::ptr_eq(one.member, member));
        own.for_each(|(_, outcome)| *outcome = Err(failure.clone()));
    }
    let mut repaired = vec![true; findings.len()];
    for (one, written) in rewrites.iter().zip(outcomes) {
        let outcome = match written {
            Ok(_) => inner.verify(one.member, one.at, &one.good).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = outcome
            && inner.judge(one.member, &failure) == Verdict::Kept
        {
            tracing::warn!(volume = %inner.name, %failure, "a copy could not be made equal");
            repaired[one.finding] = false;
        }
    }
    Ok(repaired)
}

/// All that has to be written to make copies equal, in whole blocks.
fn rewrites(findings: &[Finding]) -> Vec<Rewrite<'_>> {
    let mut rewrites = Vec::new();
    for (finding, one) in findings.iter().enumerate() {
        let good = one.good().freeze();
        for (member, at, content) in &one.copies {
            rewrites.extend(differing_runs(Some(content), &good).into_iter().map(|run| {
                let at = at + run.start as u64;
                Rewrite { finding, member, at, good: good.slice(run) }
            }));
        }
    }
    rewrites
}

/// Counts, keeps and tells what was found.
fn report(inner: &Inner, roster: &Roster, findings: &[Finding], repaired: &[bool]) {
    let chunk = roster.geometry.chunk();
    let mut mismatches: Vec<Mismatch> = Vec::new();
    for (finding, &repaired) in findings.iter().zip(repaired) {
        for next in finding.differences.iter().map(|one| mismatch(finding, one, repaired)) {
            match mismatches.last_mut() {
                Some(last) if last.at / chunk == next.at / chunk && adjoin(last, &next) => {
                    last.len += next.len;
                }
                _ => mismatches.push(next),
            }
        }
    }
    for found in inner.scrub.note(mismatches) {
        inner.tell(Event::Mismatch(found));
    }
}

fn mismatch(finding: &Finding, difference: &Difference, repaired: bool) -> Mismatch {
    let start = difference.range.start as u64;
    let copies = finding.copies.iter().map(|(member, at, _)| Place {
        // Who is written has a slot.
        slot: member.slot().map_or(0, |slot| slot.0),
        path: member.device.name().to_owned(),
        sector: (at + start) / SECTOR,
        file_offset: at + start,
    });
    Mismatch {
        at: finding.span.at + start,
        len: difference.range.len() as u64,
        copies: copies.collect(),
        wrong: difference.wrong,
        repaired,
    }
}

/// Whether one mismatch goes on where the other ends, in the same way on the same members.
fn adjoin(one: &Mismatch, next: &Mismatch) -> bool {
    let goes_on = |(a, b): (&Place, &Place)| a.path == b.path && a.file_offset + one.len == b.file_offset;
    one.at + one.len == next.at
        && (one.wrong, one.repaired) == (next.wrong, next.repaired)
        && one.copies.len() == next.copies.len()
        && one.copies.iter().zip(&next.copies).all(goes_on)
}

#[cfg(test)]
mod tests {
    // A slice of one range is what is meant.
    #![allow(clippy::single_range_in_vec_init)]

    use super::*;
    use crate::geometry::{Geometry, Layout};

    const K: u64 = 4096;
    const S: usize = SECTOR as usize;

    #[test]
    fn the_majority_is_right_and_else_the_first() {
        let judged =
            |copies: &[&str]| verdict(&copies.iter().map(|copy| copy.as_bytes()).collect::<Vec<_>>());
        assert_eq!(judged(&[]), None);
        assert_eq!(judged(&["a"]), None);
        assert_eq!(judged(&["a", "a"]), None);
        assert_eq!(judged(&["a", "b"]), Some((0, None)));
        assert_eq!(judged(&["a", "b", "b"]), Some((1, Some(0))));
        assert_eq!(judged(&["a", "b", "a"]), Some((0, Some(1))));
        assert_eq!(judged(&["a", "b", "c"]), Some((0, None)));
        assert_eq!(judged(&["a", "a", "b", "b"]), Some((0, None)));
        assert_eq!(judged(&["a", "b", "b", "b"]), Some((1, Some(0))));
        assert_eq!(judged(&["a", "b", "c", "b", "b"]), Some((1, None)), "two are wrong");
    }

    #[test]
    fn adjoining_sectors_are_one_difference_as_long_as_the_same_copy_is_wrong() {
        let good = vec![7; 10 * S];
        let (mut one, mut two) = (good.clone(), good.clone());
        assert!(differences(&[&good, &one, &two]).is_empty());
        one[S] = 1;
        one[3 * S - 1] = 1;
        two[3 * S] = 1;
        two[9 * S + 5] = 1;
        let found = differences(&[&good, &one, &two]);
        let found: Vec<_> = found.into_iter().map(|one| (one.range, one.wrong, one.source)).collect();
        let expected = [(S..3 * S, Some(1), 0), (3 * S..4 * S, Some(2), 0), (9 * S..10 * S, Some(2), 0)];
        assert_eq!(found, expected);
        let pair = differences(&[&good, &one]);
        assert_eq!(pair, [Difference { range: S..3 * S, wrong: None, source: 0 }]);
    }

    #[test]
    fn what_is_unsynced_is_left_out_in_whole_blocks() {
        let geometry = Geometry::new(Layout::near(2), 2, 4 * K, 16 * K).unwrap();
        let roster = Roster::new(geometry, 16 * K / SECTOR, Vec::new());
        let unsynced = [K + 512..K + 1024, 6 * K..7 * K];
        let ranges: Vec<Range<u64>> = spans(&roster, &(0..8 * K), &unsynced)
            .into_iter()
            .map(|span| span.at..span.at + span.len)
            .collect();
        assert_eq!(ranges, [0..K, 2 * K..4 * K, 4 * K..6 * K, 7 * K..8 * K]);
    }

    #[test]
    fn spans_are_halved_at_blocks() {
        let span = Span { chunk: crate::geometry::Chunk(1), within: K, at: 9 * K, len: 3 * K };
        let [second, first] = halves(span);
        assert_eq!((first.at, first.within, first.len), (9 * K, K, 2 * K));
        assert_eq!((second.at, second.within, second.len), (11 * K, 3 * K, K));
    }

    #[test]
    fn no_more_mismatches_are_kept_than_anybody_reads() {
        let scrub = Scrub::default();
        let one = Mismatch { at: 0, len: 512, copies: Vec::new(), wrong: None, repaired: false };
        assert_eq!(scrub.note(vec![one.clone(); MOST_KEPT - 1]).len(), MOST_KEPT - 1);
        assert_eq!(scrub.note(vec![one.clone(); 3]).len(), 1);
        assert_eq!(scrub.note(vec![one]).len(), 0);
        assert_eq!((scrub.count(), scrub.mismatches().len()), (MOST_KEPT as u64 + 3, MOST_KEPT));
    }
}
