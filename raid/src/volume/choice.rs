//! Which copy a read goes to.
//!
//! By address first, so that the page cache holds one copy of what is read. Near copies take turns every few megabytes
//! of a member: far enough apart that read-ahead on one leg does not run into what belongs to the other, close enough
//! that streams spread over all members. Of far and offset copies the first is preferred: those lie like RAID 0.
//!
//! That copy is left for another where its member
//! - has more than [`MARGIN`] reads in flight more than another's: an idle disk beside a busy one is worth a second
//!   copy in the page cache;
//! - has been slow lately (see `load`), and the other has not.
//!
//! Where copies may still differ all reads go to the first in slot order, whatever it costs: what has been read once
//! must not change.
//!
//! The kernel's read-ahead knows nothing of turns: a disk that is set to read ahead by megabytes fills memory with what the
//! other legs are read for.
//!
//! Cost: besides the arithmetic of the layout, two atomic loads; only a member that is busy or slow costs a look at the
//! others and at the clock.

use super::{Inner, Roster};
use crate::geometry::{MemberOffset, Span};
use crate::member::Member;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Bytes of a member's data area after which another copy is preferred.
const TURN: u64 = 4 << 20;
/// Reads in flight that the preferred member may have more than another.
const MARGIN: u32 = 8;

/// A member, and where on its device a copy lies.
pub(crate) type Copy<'a> = (&'a Arc<Member>, u64);

impl Inner {
    /// The copy that is read, where any can be.
    pub(super) fn preferred<'a>(&self, roster: &'a Roster, span: Span) -> Option<Copy<'a>> {
        if self.may_differ(span.at, span.len) {
            return roster.readable(span).into_iter().next();
        }
        let mut copies = by_turn(roster, span);
        let first = copies.next()?;
        let load = &first.0.load;
        let busy = load.reads();
        if busy <= MARGIN && !load.is_slow() {
            return Some(first);
        }
        let now = self.runtime.now();
        let Some(other) = copies.min_by_key(|copy| burden(copy, now)) else { return Some(first) };
        let is_better = burden(&other, now) < (load.is_spared(now), busy.saturating_sub(MARGIN));
        Some(if is_better { other } else { first })
    }

    /// The best copy of those whose members have not been asked; `None` where it must be the first that was.
    pub(super) fn alternative<'a>(
        &self,
        roster: &'a Roster,
        span: Span,
        is_asked: impl Fn(&Arc<Member>) -> bool,
    ) -> Option<Copy<'a>> {
        if self.may_differ(span.at, span.len) {
            return None;
        }
        let now = self.runtime.now();
        let others = by_turn(roster, span).filter(|(member, _)| !is_asked(member));
        others.min_by_key(|copy| burden(copy, now))
    }

    /// Whether copies of the range may differ.
    pub(crate) fn may_differ(&self, at: u64, len: u64) -> bool {
        self.any_unsynced.load(Ordering::Acquire) && self.unsynced.lock().intersects(&(at..at + len))
    }
}

/// Whether a member holds the copy that the address gives.
pub(super) fn is_first(roster: &Roster, span: Span, member: &Arc<Member>) -> bool {
    by_turn(roster, span).next().is_some_and(|(first, _)| Arc::ptr_eq(first, member))
}

/// The copies that can be read, in the order that their address gives.
fn by_turn(roster: &Roster, span: Span) -> impl Iterator<Item = Copy<'_>> {
    let geometry = &roster.geometry;
    let rows = (TURN / geometry.chunk()).max(1);
    let turn = span.chunk.0 / (geometry.period() * rows);
    geometry.read_order(span.chunk, turn).filter_map(move |place| {
        let at = MemberOffset(place.at.0 + span.within);
        let member = roster.at(place).find(|member| member.is_readable(at, span.len))?;
        Some((member, member.position(at)))
    })
}

fn burden((member, _): &Copy<'_>, now: Duration) -> (bool, u32) {
    (member.load.is_spared(now), member.load.reads())
}
