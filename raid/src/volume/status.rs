//! Filling in the status document.

use super::Inner;
use crate::geometry::Slot;
use crate::member::Member;
use crate::status::{BitmapStatus, MemberState, MemberStatus, Status, SyncAction, SyncStatus, VolumeState};
use std::sync::atomic::Ordering;

pub(super) fn status(inner: &Inner) -> Status {
    let geometry = &inner.geometry;
    let state = if inner.lost.load(Ordering::Acquire) {
        VolumeState::Failed
    } else if inner.is_degraded() {
        VolumeState::Degraded
    } else if inner.active.load(Ordering::Acquire) {
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
        members: (0..geometry.members()).map(|slot| member_status(inner, Slot(slot))).collect(),
        sync: sync_status(inner),
        mismatches: 0,
        bitmap,
    }
}

fn member_status(inner: &Inner, slot: Slot) -> MemberStatus {
    let absent = |path: &str, state| MemberStatus {
        slot: Some(slot.0),
        path: path.to_owned(),
        state,
        read_errors: 0,
        corrected: 0,
    };
    match &inner.members[slot.0] {
        Some(member) => present(member),
        None => match inner.stale.iter().find(|(stale, _)| *stale == slot) {
            Some((_, path)) => absent(path, MemberState::Faulty),
            None => absent("", MemberState::Missing),
        },
    }
}

fn present(member: &Member) -> MemberStatus {
    let (read_errors, corrected) = member.counters();
    let state = if member.is_in_sync() { MemberState::InSync } else { MemberState::Faulty };
    let path = member.device.name().to_owned();
    MemberStatus { slot: Some(member.slot.0), path, state, read_errors, corrected }
}

fn sync_status(inner: &Inner) -> SyncStatus {
    let left = inner.unsynced.lock().len();
    let progress = inner.progress.lock();
    if left == 0 || !progress.running {
        return SyncStatus { action: SyncAction::Idle, done: 0, total: 0, speed: 0, eta_s: 0 };
    }
    let total = progress.total.max(left);
    let done = total - left;
    let elapsed = inner.runtime.now().saturating_sub(progress.started).as_millis().max(1);
    let speed = (u128::from(done) * 1000 / elapsed) as u64;
    let eta_s = left.checked_div(speed).unwrap_or(0);
    SyncStatus { action: SyncAction::Resync, done, total, speed, eta_s }
}
