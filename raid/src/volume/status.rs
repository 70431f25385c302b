//! Filling in the status document.

use super::{Inner, Roster};
use crate::member::{Member, State};
use crate::status::{BitmapStatus, MemberState, MemberStatus, Status, SyncAction, SyncStatus, VolumeState};
use crate::sync::due;
use std::sync::atomic::Ordering;

pub(super) fn status(inner: &Inner) -> Status {
    let roster = inner.roster();
    let geometry = &roster.geometry;
    let state = if inner.lost.load(Ordering::Acquire) {
        VolumeState::Failed
    } else if roster.is_degraded() {
        VolumeState::Degraded
    } else if inner.active.load(Ordering::Acquire) || inner.any_unsynced.load(Ordering::Acquire) {
        VolumeState::Active
    } else {
        VolumeState::Clean
    };
    let bitmap = inner.intent.as_ref().map_or(BitmapStatus { chunk: 0, dirty: 0 }, |intent| {
        let intent = intent.lock();
        BitmapStatus { chunk: intent.header().region, dirty: intent.dirty() }
    });
    Status {
        name: inner.name.clone(),
        uuid: inner.uuid,
        layout: geometry.layout().to_string(),
        chunk: geometry.chunk(),
        size: geometry.size(),
        state,
        members: member_statuses(&roster),
        sync: sync(inner, &roster),
        mismatches: inner.scrub.count(),
        bitmap,
    }
}

/// What is under way. A member that waits to be filled counts, a spare that waits for its slot, and ranges that a walk is
/// about to make equal: whoever waits for the end does not take the time before the beginning for it.
fn sync(inner: &Inner, roster: &Roster) -> SyncStatus {
    let sync = inner.progress.status(inner.runtime.now());
    if sync.action != SyncAction::Idle || inner.refuse_if_unwritable().is_err() {
        return sync;
    }
    let is_walked = inner.walked.load(Ordering::Acquire) == inner.marked.load(Ordering::Acquire);
    let unsynced = if is_walked || inner.held.load(Ordering::Acquire) { 0 } else { due(inner).len() };
    if unsynced > 0 {
        return SyncStatus { action: SyncAction::Resync, done: 0, total: unsynced, speed: 0, eta_s: 0 };
    }
    let filled = roster.written().find(|member| member.state() == State::Rebuilding);
    let waits = filled.or_else(|| roster.vacancy().and_then(|_| roster.spare()));
    waits.map_or(sync, |member| {
        let (done, total) = (member.recovered(), roster.geometry.used());
        SyncStatus { action: SyncAction::Recover, done, total, speed: 0, eta_s: 0 }
    })
}

/// Slots in order, replacements behind whom they are to replace, then those without a slot.
fn member_statuses(roster: &Roster) -> Vec<MemberStatus> {
    let mut all = Vec::new();
    for (slot, seat) in roster.seats.iter().enumerate() {
        let absent = |path: &str, state| MemberStatus {
            slot: Some(slot),
            path: path.to_owned(),
            state,
            read_errors: 0,
            corrected: 0,
        };
        if seat.member.is_none() {
            all.push(match roster.stale.iter().find(|(stale, _)| stale.0 == slot) {
                Some((_, path)) => absent(path, MemberState::Faulty),
                None => absent("", MemberState::Missing),
            });
        }
        all.extend(seat.all().map(|member| present(member, Some(slot))));
    }
    all.extend(roster.idle.iter().map(|member| present(member, None)));
    all
}

fn present(member: &Member, slot: Option<usize>) -> MemberStatus {
    let (read_errors, corrected) = member.counters();
    let state = match member.state() {
        State::InSync => MemberState::InSync,
        State::Rebuilding => MemberState::Rebuilding,
        State::Spare => MemberState::Spare,
        State::Faulty => MemberState::Faulty,
    };
    MemberStatus { slot, path: member.device.name().to_owned(), state, read_errors, corrected }
}
