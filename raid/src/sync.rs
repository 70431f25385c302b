//! Making copies equal: after an unclean stop, for the first time, and where a full disk left legs apart.
//!
//! What may differ is the volume's set of unsynced ranges. A piece of it is taken under the range lock, its copies
//! are compared, and blocks that differ are written from the first readable copy in slot order, as md does. The
//! writes are durable before the piece leaves the set: only then may a reader see it, because from then on what it
//! holds must not change, whichever member is lost.
//!
//! Two callers: a reader that needs a range now, and a walk in the background. Neither costs anything once the set
//! is empty. The same background task clears the bits of regions that have come to rest.

use crate::device::{Durability, buffer};
use crate::error::{Error, Result};
use crate::geometry::Span;
use crate::member::Member;
use crate::volume::{BLOCK, Inner, Verdict};
use bytes::BytesMut;
use futures_util::future::{Either, select};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What a reader has made equal at least, so that neighbouring reads need not each do it.
const READ_WINDOW: u64 = 64 << 10;
/// What the background walk makes equal at once: writers wait for no longer than that takes.
const WALK_WINDOW: u64 = 1 << 20;
/// Time between looks for bits to clear, and before what could not be made equal is tried again.
const LOOK: Duration = Duration::from_secs(5);

/// Starts the volume's background task. It ends when the volume is stopped or dropped.
pub(crate) fn spawn(inner: &Arc<Inner>) {
    let (runtime, wake) = (Arc::clone(&inner.runtime), Arc::clone(&inner.wake));
    let volume = Arc::downgrade(inner);
    let sleeper = Arc::clone(&runtime);
    runtime.spawn(Box::pin(async move {
        loop {
            let Some(inner) = volume.upgrade() else { return };
            let walked = walk(&inner).await;
            if matches!(walked, Err(Error::Stopped { .. })) {
                return;
            }
            if let Err(failure) = look(&inner).await {
                if matches!(failure, Error::Stopped { .. }) {
                    return;
                }
                tracing::warn!(volume = %inner.name, %failure, "the bitmap could not be cleared");
            }
            let more = walked.is_ok() && inner.any_unsynced.load(Ordering::Acquire);
            // Held no longer than needed: a volume that was dropped must not live on in its own background.
            drop(inner);
            if !more {
                let (asleep, woken) = (sleeper.sleep(LOOK), wake.notified());
                futures_util::pin_mut!(woken);
                match select(asleep, woken).await {
                    Either::Left(_) | Either::Right(_) => {}
                }
            }
        }
    }));
}

async fn look(inner: &Arc<Inner>) -> Result<()> {
    let _entered = inner.enter()?;
    inner.clear_idle_bits().await
}

/// Goes over all unsynced ranges once. An error says that some could not be made equal.
async fn walk(inner: &Arc<Inner>) -> Result<()> {
    if !inner.any_unsynced.load(Ordering::Acquire) {
        return Ok(());
    }
    {
        let total = inner.unsynced.lock().len();
        let mut progress = inner.progress.lock();
        (progress.total, progress.started, progress.running) = (total, inner.runtime.now(), true);
    }
    tracing::info!(volume = %inner.name, "resync begins");
    let (mut from, mut outcome) = (0, Ok(()));
    loop {
        let next = inner.unsynced.lock().next(from);
        let Some(next) = next else { break };
        let window = next.start..next.end.min((next.start / WALK_WINDOW + 1) * WALK_WINDOW);
        from = window.end;
        match equalise_window(inner, window).await {
            Err(stopped @ Error::Stopped { .. }) => return Err(stopped),
            Err(failure) => {
                tracing::warn!(volume = %inner.name, %failure, "a range could not be made equal");
                outcome = Err(failure);
            }
            Ok(()) => {}
        }
    }
    inner.progress.lock().running = false;
    tracing::info!(volume = %inner.name, complete = outcome.is_ok(), "resync ends");
    outcome
}

/// Makes the copies of a range equal, and as much around it as makes whole windows.
pub(crate) async fn equalise(inner: &Arc<Inner>, range: Range<u64>) -> Result<()> {
    let size = inner.geometry.size();
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

/// Makes what is unsynced of a window equal, under its range lock.
async fn equalise_window(inner: &Arc<Inner>, window: Range<u64>) -> Result<()> {
    let _entered = inner.enter()?;
    let _lock = inner.locks.lock(window.clone()).await;
    let ranges = inner.unsynced.lock().within(&window);
    for range in ranges {
        for span in inner.geometry.spans(range.start, range.end - range.start) {
            equalise_span(inner, span).await?;
        }
        // A leg that was taken out meanwhile is on record before what the others hold counts as the truth.
        inner.recorded().await?;
        let mut unsynced = inner.unsynced.lock();
        unsynced.remove(&range);
        inner.any_unsynced.store(!unsynced.is_empty(), Ordering::Release);
    }
    Ok(())
}

/// Makes all copies of a span equal and durable. Where a target's disk is full, that target becomes the source: what
/// it holds needs no new space anywhere it was written before.
async fn equalise_span(inner: &Arc<Inner>, span: Span) -> Result<()> {
    let mut first_source = 0;
    let tries = inner.geometry.copies();
    let mut outcome = Ok(());
    for _ in 0..tries {
        match copy_from(inner, span, first_source).await {
            Ok(()) => return Ok(()),
            Err((target, failure)) if failure.spares_device() && target != first_source => {
                first_source = target;
                outcome = Err(failure);
            }
            Err((_, failure)) => return Err(failure),
        }
    }
    outcome
}

/// Copies a span from the first readable copy, beginning with number `first` of the live ones in slot order, to all
/// others. An error names the copy that failed.
async fn copy_from(inner: &Arc<Inner>, span: Span, first: usize) -> std::result::Result<(), (usize, Error)> {
    let copies = inner.copies(span, true);
    let mut contents: Vec<Option<BytesMut>> = Vec::with_capacity(copies.len());
    let mut last = Error::NoCopy { name: inner.name.clone(), at: span.at, len: span.len };
    for (member, at) in &copies {
        match member.device.read(*at, buffer(span.len as usize)).await {
            Ok(bytes) => contents.push(Some(bytes)),
            Err(failure) => {
                member.count_read_error();
                last = failure;
                contents.push(None);
            }
        }
    }
    let order = (0..copies.len()).map(|i| (first + i) % copies.len());
    let Some((source, good)) = order.into_iter().find_map(|i| contents[i].take().map(|bytes| (i, bytes)))
    else {
        return Err((first, last));
    };
    for (number, ((member, at), old)) in copies.iter().zip(contents).enumerate() {
        if number == source || old.as_ref() == Some(&good) {
            continue;
        }
        overwrite(inner, span, member, *at, old.as_ref(), &good)
            .await
            .map_err(|failure| (number, failure))?;
    }
    Ok(())
}

/// Writes the blocks of `good` that differ from `old` (all, if that could not be read), durably.
async fn overwrite(
    inner: &Arc<Inner>,
    span: Span,
    member: &Member,
    at: u64,
    old: Option<&BytesMut>,
    good: &BytesMut,
) -> Result<()> {
    let _tracked = inner.prepare(&(span.at..span.at + span.len)).await?;
    let blocks = good.chunks(BLOCK as usize).enumerate().map(|(number, block)| {
        let start = number * BLOCK as usize;
        let same = old.is_some_and(|old| &old[start..start + block.len()] == block);
        (start..start + block.len(), same)
    });
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (range, _) in blocks.filter(|(_, same)| !same) {
        match runs.last_mut() {
            Some(run) if run.end == range.start => run.end = range.end,
            _ => runs.push(range),
        }
    }
    let mut outcome = Ok(());
    for run in runs {
        let bytes = bytes::Bytes::copy_from_slice(&good[run.clone()]);
        outcome = member.device.write(at + run.start as u64, bytes, Durability::Cached).await;
        if outcome.is_err() {
            break;
        }
    }
    if outcome.is_ok() {
        outcome = member.device.flush().await;
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
