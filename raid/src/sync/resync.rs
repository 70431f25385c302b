//! Making copies equal: after an unclean stop, for the first time, and where a full disk left legs apart.
//!
//! What may differ is the volume's set of unsynced ranges. A piece of it is taken under the range lock, its copies
//! are compared, and blocks that differ are written from the first readable copy in slot order, as md does. The
//! writes are durable before the piece leaves the set: only then may a reader see it, because from then on what it
//! holds must not change, whichever member is lost. So is what a killed process wrote and never flushed.
//!
//! Two callers: a reader that needs a range now, and a walk in the background. Neither costs anything once the set
//! is empty.

use super::Pace;
use crate::device::{Durability, EQUALISED};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::geometry::Span;
use crate::member::Member;
use crate::superblock::SECTOR;
use crate::volume::{BLOCK, Contents, Inner, Order, RangeSet, Verdict};
use bytes::{Bytes, BytesMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What a reader has made equal at least, so that neighbouring reads need not each do it.
const READ_WINDOW: u64 = EQUALISED;
/// What the background walk makes equal at once: writers wait for no longer than that takes.
const WALK_WINDOW: u64 = 1 << 20;

/// Goes over all unsynced ranges once. An error says that some could not be made equal.
pub(super) async fn walk(inner: &Arc<Inner>) -> Result<()> {
    let marked = inner.marked.load(Ordering::Acquire);
    let total = due(inner).len();
    let running = (total > 0).then(|| inner.progress.resync.begin(inner.runtime.now(), total, 0));
    // Told after the beginning, so that nobody sees a time between.
    inner.walked.store(marked, Ordering::Release);
    let Some(running) = running else { return Ok(()) };
    let mut pace = Pace::new(inner);
    inner.tell(Event::ResyncStarted { total });
    let (mut from, mut done, mut outcome) = (0, 0, Ok(()));
    loop {
        let next = inner.unsynced.lock().next(from);
        let Some(next) = next else { break };
        let window = next.start..next.end.min((next.start / WALK_WINDOW + 1) * WALK_WINDOW);
        from = window.end;
        let bytes = window.end - window.start;
        if inner.untouched.covers(&window) {
            continue;
        }
        match equalise_window(inner, window).await {
            Err(stopped @ Error::Stopped { .. }) => return Err(stopped),
            Err(failure) => {
                tracing::warn!(volume = %inner.name, %failure, "a range could not be made equal");
                outcome = Err(failure);
            }
            Ok(()) => {}
        }
        done += bytes;
        running.advance(done.min(total));
        pace.took(inner, bytes).await;
    }
    drop(running);
    inner.tell(match &outcome {
        Ok(()) => Event::ResyncFinished,
        Err(failure) => Event::ResyncStopped { cause: failure.to_string() },
    });
    outcome
}

/// What is to be made equal without anybody asking: nobody misses what was never written, and it is made equal when it
/// is, or when it is read.
pub(crate) fn due(inner: &Inner) -> RangeSet {
    if !inner.any_unsynced.load(Ordering::Acquire) {
        return RangeSet::default();
    }
    let mut due = inner.unsynced.lock().clone();
    for range in inner.untouched.ranges() {
        due.remove(&range);
    }
    due
}

/// Makes the copies of a range equal, and as much around it as makes whole windows.
pub(crate) async fn equalise(inner: &Arc<Inner>, range: Range<u64>) -> Result<()> {
    let size = inner.size();
    let end = range.end.next_multiple_of(READ_WINDOW).min(size);
    let mut at = range.start / READ_WINDOW * READ_WINDOW;
    let mut outcome = Ok(());
    // A long range goes window by window, so that writers elsewhere in it get their turn.
    while at < end {
        let window = at..(at + WALK_WINDOW).min(end);
        at = window.end;
        if let Err(failure) = equalise_window(inner, window).await {
            outcome = Err(failure);
        }
    }
    outcome
}

/// Makes what is unsynced of a window equal, under its range lock. An error says that some of it stays unsynced.
async fn equalise_window(inner: &Arc<Inner>, window: Range<u64>) -> Result<()> {
    let _entered = inner.enter()?;
    let _lock = inner.locks.lock(window.clone()).await;
    inner.settle_caches().await?;
    let ranges = inner.unsynced.lock().within(&window);
    let mut failed: Vec<(Range<u64>, Error)> = Vec::new();
    let roster = inner.roster();
    for range in &ranges {
        for span in roster.geometry.spans(range.start, range.end - range.start) {
            equalise_span(inner, span, &mut failed).await;
        }
    }
    // A leg that was taken out meanwhile is on record before what the others hold counts as the truth.
    inner.recorded().await?;
    let mut unsynced = inner.unsynced.lock();
    for range in &ranges {
        unsynced.remove(range);
    }
    for (range, _) in &failed {
        unsynced.insert(range.clone());
    }
    inner.any_unsynced.store(!unsynced.is_empty(), Ordering::Release);
    failed.pop().map_or(Ok(()), |(_, failure)| Err(failure))
}

/// Makes all copies of a span equal and durable; adds what could not be to `failed`.
///
/// Where no copy can be read as a whole, the span is halved, down to a sector: two legs that each lost another
/// sector hold everything together.
async fn equalise_span(inner: &Arc<Inner>, span: Span, failed: &mut Vec<(Range<u64>, Error)>) {
    let mut left = vec![span];
    while let Some(span) = left.pop() {
        match equalise_piece(inner, span).await {
            Ok(()) => {}
            Err(Trouble::Unreadable(_)) if span.len > SECTOR => left.extend(span.halves(SECTOR)),
            Err(Trouble::Unreadable(failure) | Trouble::Unwritable(_, failure)) => {
                failed.push((span.at..span.at + span.len, failure));
            }
        }
    }
}

/// Why copies could not be made equal.
enum Trouble {
    /// No copy can be read as a whole.
    Unreadable(Error),
    /// The copy of this member could not be written.
    Unwritable(Arc<Member>, Error),
}

/// Makes copies equal. Where a target's disk is full, that target becomes the source: what it holds needs no new
/// space anywhere it was written before.
async fn equalise_piece(inner: &Arc<Inner>, span: Span) -> std::result::Result<(), Trouble> {
    let mut from: Option<Arc<Member>> = None;
    for _ in 1..inner.roster().geometry.copies() {
        match copy_from(inner, span, from.as_ref()).await {
            Err(Trouble::Unwritable(target, failure)) if failure.spares_device() => from = Some(target),
            outcome => return outcome,
        }
    }
    copy_from(inner, span, from.as_ref()).await
}

/// Copies a span to all other copies: from that of the member given if it can be read, else from the first in slot order
/// that can.
async fn copy_from(
    inner: &Arc<Inner>,
    span: Span,
    from: Option<&Arc<Member>>,
) -> std::result::Result<(), Trouble> {
    let roster = inner.roster();
    let copies = roster.readable(span);
    if copies.len() == 1 {
        // Nothing to compare with; whether it can be read is its reader's affair.
        return Ok(());
    }
    let Contents { mut good, mut bad } = inner.read_copies(&copies, span.len).await;
    for (member, ..) in &bad {
        member.count_read_error();
    }
    if good.is_empty() {
        let failure = bad.pop().map_or_else(|| inner.no_copy(span), |(.., failure)| failure);
        return Err(Trouble::Unreadable(failure));
    }
    let is_wanted =
        |(member, ..): &(Arc<Member>, u64, BytesMut)| from.is_some_and(|one| Arc::ptr_eq(one, member));
    let (.., source) = good.remove(good.iter().position(is_wanted).unwrap_or(0));
    let others = good.into_iter().map(|(member, at, old)| (member, at, Some(old)));
    for (member, at, old) in others.chain(bad.into_iter().map(|(member, at, _)| (member, at, None))) {
        if old.as_ref() != Some(&source) {
            let outcome = overwrite(inner, span, &member, at, old.as_ref(), &source).await;
            outcome.map_err(|failure| Trouble::Unwritable(member, failure))?;
        }
    }
    Ok(())
}

/// Writes the blocks of `good` that differ from `old` (all, if that could not be read), durably.
async fn overwrite(
    inner: &Arc<Inner>,
    span: Span,
    member: &Arc<Member>,
    at: u64,
    old: Option<&BytesMut>,
    good: &BytesMut,
) -> Result<()> {
    let _tracked = inner.prepare(&(span.at..span.at + span.len)).await?;
    let mut outcome = Ok(());
    for run in differing_runs(old, good) {
        let data = Bytes::copy_from_slice(&good[run.clone()]);
        let write = Order::Write { at: at + run.start as u64, data, durability: Durability::Cached };
        outcome = inner.ask(member, write).await.map(drop);
        if outcome.is_err() {
            break;
        }
    }
    if outcome.is_ok() {
        outcome = inner.ask(member, Order::Flush).await.map(drop);
    }
    match outcome {
        Ok(()) => {
            if old.is_none() {
                member.count_corrected();
            }
            Ok(())
        }
        Err(failure) => match inner.judge(member, &failure) {
            Verdict::Evicted => Ok(()),
            Verdict::Kept => Err(failure),
        },
    }
}

/// Ranges of whole blocks in which two buffers of one length differ.
pub(crate) fn differing_runs(old: Option<&BytesMut>, good: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (number, block) in good.chunks(BLOCK as usize).enumerate() {
        let range = number * BLOCK as usize..number * BLOCK as usize + block.len();
        if old.is_some_and(|old| &old[range.clone()] == block) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == range.start => run.end = range.end,
            _ => runs.push(range),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_blocks_that_differ_are_copied() {
        let good = BytesMut::zeroed(5 * BLOCK as usize + 10);
        let mut old = good.clone();
        assert!(differing_runs(Some(&old), &good).is_empty());
        old[BLOCK as usize] = 1;
        old[3 * BLOCK as usize - 1] = 1;
        old[5 * BLOCK as usize + 9] = 1;
        let block = BLOCK as usize;
        assert_eq!(differing_runs(Some(&old), &good), vec![block..3 * block, 5 * block..5 * block + 10]);
        assert_eq!(differing_runs(None, &good), vec![0..5 * block + 10]);
    }
}
