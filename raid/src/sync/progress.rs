//! How far each walk is, for `raid10 status`.

use crate::status::{SyncAction, SyncStatus};
use parking_lot::Mutex;
use std::time::Duration;

/// The walks of a volume. One of a kind runs at a time.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Copies that may differ.
    pub(crate) resync: Walk,
    /// A member that is being filled.
    pub(crate) recover: Walk,
    /// A comparison of copies.
    pub(crate) check: Walk,
    /// The same, with repair.
    pub(crate) repair: Walk,
}

/// A walk that runs, or does not.
#[derive(Debug, Default)]
pub(crate) struct Walk(Mutex<Option<Running>>);

#[derive(Debug)]
struct Running {
    started: Duration,
    /// Bytes in all.
    total: u64,
    /// Bytes that were done when it began: it goes on where an earlier one ended.
    before: u64,
    done: u64,
}

/// Says that a walk runs, until it is dropped.
pub(crate) struct Underway<'a>(&'a Walk);

impl Walk {
    /// The walk begins, or begins again.
    pub(crate) fn begin(&self, now: Duration, total: u64, before: u64) -> Underway<'_> {
        *self.0.lock() = Some(Running { started: now, total, before, done: before });
        Underway(self)
    }
}

impl Underway<'_> {
    /// So many bytes of the whole are done.
    pub(crate) fn advance(&self, done: u64) {
        if let Some(running) = self.0.0.lock().as_mut() {
            running.done = done;
        }
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        *self.0.0.lock() = None;
    }
}

impl Progress {
    /// What is under way; where several walks are, what matters most to redundancy.
    pub(crate) fn status(&self, now: Duration) -> SyncStatus {
        let walks = [
            (&self.recover, SyncAction::Recover),
            (&self.resync, SyncAction::Resync),
            (&self.repair, SyncAction::Repair),
            (&self.check, SyncAction::Check),
        ];
        for (walk, action) in walks {
            if let Some(running) = walk.0.lock().as_ref() {
                return running.status(action, now);
            }
        }
        SyncStatus { action: SyncAction::Idle, done: 0, total: 0, speed: 0, eta_s: 0 }
    }
}

impl Running {
    fn status(&self, action: SyncAction, now: Duration) -> SyncStatus {
        let elapsed = now.saturating_sub(self.started).as_millis().max(1);
        let speed = (u128::from(self.done.saturating_sub(self.before)) * 1000 / elapsed) as u64;
        let left = self.total.saturating_sub(self.done);
        let eta_s = left.checked_div(speed).unwrap_or(0);
        SyncStatus { action, done: self.done, total: self.total, speed, eta_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_counts_what_this_run_did() {
        let progress = Progress::default();
        let running = progress.recover.begin(Duration::from_secs(10), 1000, 400);
        running.advance(600);
        let status = progress.status(Duration::from_secs(12));
        assert_eq!((status.action, status.done, status.total), (SyncAction::Recover, 600, 1000));
        assert_eq!((status.speed, status.eta_s), (100, 4));
        drop(running);
        assert_eq!(progress.status(Duration::from_secs(12)).action, SyncAction::Idle);
    }

    #[test]
    fn recovery_is_told_before_a_check() {
        let progress = Progress::default();
        let _check = progress.check.begin(Duration::ZERO, 10, 0);
        assert_eq!(progress.status(Duration::ZERO).action, SyncAction::Check);
        let _recover = progress.recover.begin(Duration::ZERO, 10, 0);
        assert_eq!(progress.status(Duration::ZERO).action, SyncAction::Recover);
    }
}
