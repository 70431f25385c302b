//! What of the array is data and what are holes that read as zeroes for sure; read-ahead; what members are like.
//!
//! A hole is what was never written on members that were blank, known in memory; or a place where *every* copy that may
//! be read is a hole of its member's file: then it does not matter which copy a read gets, nor whether they may differ.
//! What no copy can be read of, and what a member does not tell, is data: nothing is promised of it.
//!
//! Cost: one call looks at [`WINDOW`] bytes of what was written, [`WINDOW_CHUNKS`] chunks and [`MOST_STEPS`] parts of it
//! at most, and asks each member once for each of its ranges; what was never written costs nothing. Answers may end
//! before the range does.

use super::{Inner, RangeSet, Roster};
use crate::device::{Extent, ZeroMode, check_range, push_extent};
use crate::error::{Operation, Result};
use crate::geometry::Span;
use crate::member::Member;
use futures_util::future::{join_all, try_join_all};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of what was written that one call looks at.
const WINDOW: u64 = 1 << 30;
/// Chunks of it.
const WINDOW_CHUNKS: u64 = 4096;
/// Parts of it, between what was never written.
const MOST_STEPS: usize = 64;
/// Bytes that one call reads ahead.
const MOST_PREFETCH: u64 = 64 << 20;

/// What a member said of its ranges.
#[derive(Default)]
struct Said {
    told: RangeSet,
    holes: RangeSet,
}

/// Members by identity, and ranges of their devices.
type Asked<'a> = BTreeMap<usize, (&'a Arc<Member>, RangeSet)>;

fn key(member: &Arc<Member>) -> usize {
    Arc::as_ptr(member) as usize
}

impl Inner {
    pub(super) async fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        let roster = self.roster();
        check_range(Operation::Read, at, len, roster.geometry.size())?;
        let end = at + len;
        let blank: RangeSet = self.untouched.blank_within(&(at..end)).into_iter().collect();
        let mut extents = Vec::new();
        let (mut next, mut steps) = (at, 0);
        let mut window = WINDOW.min(WINDOW_CHUNKS * roster.geometry.chunk());
        while next < end {
            let hole = blank.next(next).unwrap_or(end..end);
            if hole.start == next {
                push_extent(&mut extents, Extent { len: hole.end - next, hole: true });
                next = hole.end;
                continue;
            }
            let to = hole.start.min(next.saturating_add(window));
            if to == next || steps == MOST_STEPS {
                break;
            }
            let told = stored(&roster, next..to, &mut extents).await;
            (window, steps) = (window - (told - next), steps + 1);
            next = told;
            if told < to {
                break;
            }
        }
        Ok(extents)
    }

    /// Brings the copies that reads prefer into the page cache.
    pub(super) async fn prefetch(&self, at: u64, len: u64) -> Result<()> {
        let roster = self.roster();
        check_range(Operation::Read, at, len, roster.geometry.size())?;
        let mut asked = Asked::new();
        for span in roster.geometry.spans(at, len.min(MOST_PREFETCH)) {
            if let Some((member, position)) = self.preferred(&roster, span) {
                ask(&mut asked, member, position, span.len);
            }
        }
        let advice = asked.values().flat_map(|(member, ranges)| {
            ranges.iter().map(|range| member.device.prefetch(range.start, range.end - range.start))
        });
        try_join_all(advice).await.map(drop)
    }

    pub(super) fn zeroes_fast(&self, mode: ZeroMode) -> bool {
        self.roster().written().all(|member| member.device.zeroes_fast(mode))
    }

    pub(super) fn is_rotational(&self) -> bool {
        self.roster().written().any(|member| member.device.is_rotational())
    }
}

fn ask<'a>(asked: &mut Asked<'a>, member: &'a Arc<Member>, at: u64, len: u64) {
    asked.entry(key(member)).or_insert_with(|| (member, RangeSet::default())).1.insert(at..at + len);
}

/// Appends what members store of a range, which is not empty, and returns up to where that could be told: at least a
/// little.
async fn stored(roster: &Roster, range: Range<u64>, extents: &mut Vec<Extent>) -> u64 {
    // Taken once: who may be read may change meanwhile.
    let spans = roster.geometry.spans(range.start, range.end - range.start);
    let copies: Vec<(Span, _)> = spans.map(|span| (span, roster.readable(span))).collect();
    let mut asked = Asked::new();
    for (span, members) in &copies {
        for (member, position) in members {
            ask(&mut asked, member, *position, span.len);
        }
    }
    let answers = asked.iter().map(|(key, (member, ranges))| async move {
        let mut said = Said::default();
        for range in ranges.iter() {
            let told = member.device.extents(range.start, range.end - range.start).await;
            let mut at = range.start;
            // A member that cannot tell has data.
            for extent in told.unwrap_or_else(|_| vec![Extent { len: range.end - at, hole: false }]) {
                said.told.insert(at..at + extent.len);
                if extent.hole {
                    said.holes.insert(at..at + extent.len);
                }
                at += extent.len;
            }
        }
        (*key, said)
    });
    let said: BTreeMap<usize, Said> = join_all(answers).await.into_iter().collect();
    for (span, members) in &copies {
        let (told, holes) = combined(*span, members, &said);
        // The first members were asked from here on; were they silent, it would still be data.
        let told = if told == 0 && span.at == range.start { span.len } else { told };
        let mut at = 0;
        for hole in holes.within(&(0..told)) {
            push_extent(extents, Extent { len: hole.start - at, hole: false });
            push_extent(extents, Extent { len: hole.end - hole.start, hole: true });
            at = hole.end;
        }
        push_extent(extents, Extent { len: told - at, hole: false });
        if told < span.len {
            return span.at + told;
        }
    }
    range.end
}

/// How many bytes of a span all its copies have told of, and where in it all of them have holes.
fn combined(span: Span, members: &[(&Arc<Member>, u64)], said: &BTreeMap<usize, Said>) -> (u64, RangeSet) {
    let mut told = span.len;
    let mut holes = RangeSet::default();
    if !members.is_empty() {
        holes.insert(0..span.len);
    }
    for (member, position) in members {
        let (Some(said), end) = (said.get(&key(member)), position + span.len) else { return (0, holes) };
        let known = said.told.next(*position).filter(|known| known.start == *position);
        told = told.min(known.map_or(0, |known| known.end - position));
        let mut data: RangeSet = std::iter::once(0..span.len).collect();
        for hole in said.holes.within(&(*position..end)) {
            data.remove(&(hole.start - position..hole.end - position));
        }
        data.iter().for_each(|part| holes.remove(&part));
    }
    (told, holes)
}
