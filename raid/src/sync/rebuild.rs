//! Filling members: those that have joined, and replacements of members that are about to leave.
//!
//! The target's data area is walked from its start, a window at a time, so that it is written in order whatever the
//! layout. A window is copied under the range lock of all it holds; several are in flight at once, and
//! [`Member::recovered`] moves on behind the last of which all earlier ones are done. Every [`CHECKPOINT`] the target is
//! flushed and its superblock told how far it is: there a rebuild goes on after a restart, whatever ended it.
//!
//! A replacement is filled from the member it is to take over from, as long as that one works: the window lies on it in one
//! piece, and the others keep their time for clients. What it cannot read, and all that other members lack, comes from
//! the first copy in slot order.
//!
//! A member that returned with a known history is filled by bitmap: what no dirty region touches it has already.
//!
//! What was never written reads as zeroes on arrays that were blank at first: it is zeroed, not copied.
//!
//! What no other member can read is listed as bad on the target too, where it has a list: one lost sector does not
//! keep a whole member from being filled.
//!
//! Cost of a window: one task, one range lock, a read for each run of the target that lies in one piece on its source, one
//! write; one buffer, not copied.

use super::Pace;
use crate::device::{Durability, ZeroMode};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::geometry::{Geometry, MemberOffset, Slot, Span};
use crate::member::{Member, State};
use crate::superblock::SECTOR;
use crate::volume::{Copy, Inner, Order, Roster, Seat, Verdict, run_to_end};
use bytes::BytesMut;
use futures_util::stream::{FuturesOrdered, StreamExt};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of the target's data area that are copied at once.
const WINDOW: u64 = 1 << 20;
/// Windows in flight.
const DEPTH: usize = 4;
/// Time between two checkpoints.
const CHECKPOINT: Duration = Duration::from_secs(5);

/// Fills the first member that needs it. Returns whether there was one.
pub(super) async fn next(inner: &Arc<Inner>) -> Result<bool> {
    let roster = inner.roster();
    let target = roster.seats.iter().flat_map(Seat::all).find(|one| one.state() == State::Rebuilding);
    let Some(target) = target.cloned() else { return Ok(false) };
    let Some(slot) = target.slot() else { return Ok(false) };
    let path = target.device.name().to_owned();
    inner.tell(Event::RebuildStarted { slot: slot.0, path: path.clone(), from: target.recovered() });
    match fill(inner, &target, slot).await {
        Ok(()) => {
            inner.tell(Event::RebuildFinished { slot: slot.0, path });
            Ok(true)
        }
        Err(stopped @ Error::Stopped { .. }) => Err(stopped),
        Err(failure) => {
            inner.tell(Event::RebuildStopped { slot: slot.0, path, cause: failure.to_string() });
            // One that is out now made room for the next.
            if target.is_faulty() { Ok(true) } else { Err(failure) }
        }
    }
}

async fn fill(inner: &Arc<Inner>, target: &Arc<Member>, slot: Slot) -> Result<()> {
    // The array does not grow while a member is being filled.
    let used = inner.roster().geometry.used();
    let running = inner.progress.recover.begin(inner.runtime.now(), used, target.recovered());
    let mut pace = Pace::new(inner);
    let mut checked = inner.runtime.now();
    let mut next = target.recovered();
    let mut under_way = FuturesOrdered::new();
    loop {
        while under_way.len() < DEPTH && next < used {
            let window = next..(next / WINDOW * WINDOW + WINDOW).min(used);
            next = window.end;
            let (body, target) = (Arc::clone(inner), Arc::clone(target));
            // A task of its own: what it has locked it lets go, whatever is waited for here.
            under_way.push_back(run_to_end(inner, async move { copy(&body, &target, slot, window).await }));
        }
        let Some(done) = under_way.next().await else { break };
        let (window, bytes): (Range<u64>, u64) = done?;
        target.set_recovered(window.end);
        running.advance(window.end);
        if target.is_faulty() {
            return Err(Error::JoinFailed { device: target.device.name().to_owned() });
        }
        if inner.runtime.now().saturating_sub(checked) >= CHECKPOINT {
            let _entered = inner.enter()?;
            inner.checkpoint(target, window.end).await?;
            checked = inner.runtime.now();
        }
        pace.took(inner, bytes).await;
    }
    let _entered = inner.enter()?;
    flush(inner, target).await?;
    inner.complete(target).await
}

async fn flush(inner: &Inner, target: &Arc<Member>) -> Result<()> {
    let flushed = inner.ask(target, Order::Flush).await;
    flushed.map(drop).map_err(|failure| gone(inner, target, failure))
}

/// A run of the target: what it holds, and where.
#[derive(Debug, Clone, Copy)]
struct Part {
    span: Span,
    /// First byte in the target's data area.
    at: u64,
}

/// What of the array lies in a window of a slot's data area, in order. Cells that hold nothing are left out.
fn parts(geometry: &Geometry, slot: Slot, window: &Range<u64>) -> Vec<Part> {
    let chunk = geometry.chunk();
    let mut parts = Vec::new();
    for row in window.start / chunk..window.end.div_ceil(chunk) {
        let Some((number, _)) = geometry.chunk_at(slot, row) else { continue };
        let (start, end) = (window.start.max(row * chunk), window.end.min((row + 1) * chunk));
        let within = start - row * chunk;
        let span = Span { chunk: number, within, at: number.0 * chunk + within, len: end - start };
        parts.push(Part { span, at: start });
    }
    parts
}

/// Parts of which nothing was ever written, and the others.
fn split_untouched(inner: &Inner, parts: Vec<Part>) -> (Vec<Part>, Vec<Part>) {
    parts.into_iter().partition(|part| inner.untouched.covers(&(part.span.at..part.span.at + part.span.len)))
}

/// Copies one window to the target. Gives it back, and how many bytes of it there were to copy.
async fn copy(
    inner: &Arc<Inner>,
    target: &Arc<Member>,
    slot: Slot,
    window: Range<u64>,
) -> Result<(Range<u64>, u64)> {
    let _entered = inner.enter()?;
    let mut parts = parts(&inner.roster().geometry, slot, &window);
    if target.is_by_bitmap()
        && let Some(intent) = &inner.intent
    {
        // A region that becomes dirty from here on is written on the target as well.
        let intent = intent.lock();
        parts.retain(|part| intent.is_dirty(&(part.span.at..part.span.at + part.span.len)));
    }
    let hull = parts.iter().map(|part| part.span.at..part.span.at + part.span.len);
    let hull = hull.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
    let bytes = parts.iter().map(|part| part.span.len).sum();
    let Some(hull) = hull else { return Ok((window, bytes)) };
    let _lock = inner.locks.lock(inner.blocks(hull.start, hull.end - hull.start)).await;
    // Under the lock: who is in sync now has all that was acknowledged.
    let roster = inner.roster();
    if inner.untouched.blank() {
        let (untouched, rest) = split_untouched(inner, parts);
        parts = rest;
        for part in untouched {
            let at = target.position(MemberOffset(part.at));
            let (mode, durability) = (ZeroMode::MayPunch, Durability::Cached);
            let zeroed = inner.ask(target, Order::Zero { at, len: part.span.len, mode, durability });
            zeroed.await.map_err(|failure| gone(inner, target, failure))?;
        }
    }
    for run in runs(inner, &roster, target, &parts) {
        match copy_run(inner, target, &run).await {
            Ok(()) => {}
            Err(Trouble::Target(failure)) => return Err(gone(inner, target, failure)),
            // Piece by piece: what one source cannot read, another may.
            Err(Trouble::Source) => {
                for part in &run.parts {
                    copy_pieces(inner, &roster, target, *part).await?;
                }
            }
        }
    }
    // Whoever failed meanwhile is on record before what was copied without it counts.
    inner.recorded().await?;
    Ok((window, bytes))
}

/// Parts that lie in one piece on the target and on the member they are copied from.
struct Run {
    source: Option<(Arc<Member>, u64)>,
    parts: Vec<Part>,
}

impl Run {
    fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.span.len).sum()
    }
}

fn runs(inner: &Inner, roster: &Roster, target: &Arc<Member>, parts: &[Part]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for part in parts {
        let first = sources(inner, roster, target, part.span).into_iter().next();
        let source = first.map(|(member, at)| (Arc::clone(member), at));
        if let Some(last) = runs.last_mut()
            && let (Some((member, from)), Some((one, at))) = (&last.source, &source)
            && Arc::ptr_eq(member, one)
            && from + last.len() == *at
            && last.parts[0].at + last.len() == part.at
        {
            last.parts.push(*part);
            continue;
        }
        runs.push(Run { source, parts: vec![*part] });
    }
    runs
}

/// Who a span can be copied from, the best first: who is to be replaced, then the others in slot order. Where copies may
/// still differ, slot order alone: resync goes by that, and must not find the target filled with something else.
fn sources<'a>(inner: &Inner, roster: &'a Roster, target: &Arc<Member>, span: Span) -> Vec<Copy<'a>> {
    let mut copies = roster.readable(span);
    copies.retain(|(member, _)| !Arc::ptr_eq(member, target));
    if !inner.may_differ(span.at, span.len)
        && let Some(leaving) = roster.replaced_by(target)
    {
        copies.sort_by_key(|(member, _)| !Arc::ptr_eq(member, leaving));
    }
    copies
}

/// Why a run was not copied.
enum Trouble {
    /// It cannot be read as a whole.
    Source,
    /// It cannot be written.
    Target(Error),
}

async fn copy_run(inner: &Inner, target: &Arc<Member>, run: &Run) -> std::result::Result<(), Trouble> {
    let Some((source, from)) = &run.source else { return Err(Trouble::Source) };
    let read = inner.ask(source, Order::Read { at: *from, len: run.len() }).await;
    let bytes = read.map_err(|failure| {
        source.count_read_error();
        tracing::warn!(member = source.device.name(), %failure, "read failed");
        Trouble::Source
    })?;
    let at = target.position(MemberOffset(run.parts[0].at));
    write(inner, target, at, bytes).await.map_err(Trouble::Target)
}

/// Copies a part from whatever can be read, down to sectors; what cannot is listed as bad on the target.
async fn copy_pieces(inner: &Arc<Inner>, roster: &Roster, target: &Arc<Member>, part: Part) -> Result<()> {
    let mut left = vec![part];
    while let Some(part) = left.pop() {
        match read_any(inner, roster, target, part.span).await {
            Ok(bytes) => {
                let at = target.position(MemberOffset(part.at));
                let written = write(inner, target, at, bytes).await;
                written.map_err(|failure| gone(inner, target, failure))?;
            }
            Err(_) if part.span.len > SECTOR => {
                let halves = part.span.halves(SECTOR);
                left.extend(halves.map(|span| Part { span, at: part.at + span.at - part.span.at }));
            }
            // Lost on all of them, it is lost here too: listed, so that nobody takes what lies there for data.
            Err(failure) => {
                if !inner.list_bad(target, part.at..part.at + part.span.len) {
                    return Err(failure);
                }
            }
        }
    }
    Ok(())
}

async fn write(inner: &Inner, target: &Arc<Member>, at: u64, bytes: BytesMut) -> Result<()> {
    let write = Order::Write { at, data: bytes.freeze(), durability: Durability::Cached };
    inner.ask(target, write).await.map(drop)
}

async fn read_any(inner: &Inner, roster: &Roster, target: &Arc<Member>, span: Span) -> Result<BytesMut> {
    let mut last = None;
    for (member, at) in sources(inner, roster, target, span) {
        match inner.ask(member, Order::Read { at, len: span.len }).await {
            Ok(bytes) => return Ok(bytes),
            Err(failure) => last = Some(failure),
        }
    }
    Err(last.unwrap_or_else(|| inner.no_copy(span)))
}

fn gone(inner: &Inner, target: &Arc<Member>, failure: Error) -> Error {
    match inner.judge(target, &failure) {
        Verdict::Evicted => Error::JoinFailed { device: target.device.name().to_owned() },
        Verdict::Kept => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Layout;

    const K: u64 = 4096;

    #[test]
    fn a_window_holds_what_the_layout_puts_there() {
        let geometry = Geometry::new(Layout::near(2), 3, K, 4 * K).unwrap();
        // Rows of slot 1: 0, 2, 3, 5.
        let found = parts(&geometry, Slot(1), &(K / 2..3 * K));
        let found: Vec<_> = found.iter().map(|part| (part.at, part.span.at, part.span.len)).collect();
        assert_eq!(found, vec![(K / 2, K / 2, K / 2), (K, 2 * K, K), (2 * K, 3 * K, K)]);
    }
}
