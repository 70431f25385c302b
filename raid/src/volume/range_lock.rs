//! Exclusive locks on byte ranges, granted in the order they were asked for.
//!
//! Writers, resync and read repair hold one over what they change, so that two of them never interleave on the legs
//! of a mirror. Readers hold none.
//!
//! Invariants: held ranges are disjoint; a request waits for every overlapping one that came before it, held or
//! waiting, so nobody starves; a lock whose owner was dropped while it was handed over is handed on.
//!
//! Cost without contention: one mutex, one tree insertion, and the same again to release; no allocation but the
//! tree's nodes, no await.

use parking_lot::Mutex;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::oneshot;

#[derive(Debug, Default)]
struct State {
    /// Start → end of what is held.
    held: BTreeMap<u64, u64>,
    waiting: VecDeque<(Range<u64>, oneshot::Sender<RangeGuard>)>,
}

impl State {
    fn is_held(&self, range: &Range<u64>) -> bool {
        self.held.range(..range.end).next_back().is_some_and(|(_, &end)| end > range.start)
    }

    /// Whether whoever asks for the range now has to wait.
    fn blocks(&self, range: &Range<u64>) -> bool {
        self.is_held(range) || self.waiting.iter().any(|(earlier, _)| overlap(earlier, range))
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// The locks of one volume.
#[derive(Debug, Clone, Default)]
pub struct RangeLocks(Arc<Mutex<State>>);

/// Holds a range until it is dropped.
#[derive(Debug)]
pub struct RangeGuard {
    locks: RangeLocks,
    range: Range<u64>,
}

impl RangeLocks {
    /// Waits for the range, which must not be empty.
    pub async fn lock(&self, range: Range<u64>) -> RangeGuard {
        let granted = {
            let mut state = self.0.lock();
            if !state.blocks(&range) {
                state.held.insert(range.start, range.end);
                return RangeGuard { locks: self.clone(), range };
            }
            let (grant, granted) = oneshot::channel();
            state.waiting.push_back((range, grant));
            granted
        };
        // The sender lives in the queue, which lives as long as `self`, until the guard is sent.
        granted.await.expect("a waiting lock is granted before its queue is dropped")
    }

    /// Takes the range, which must not be empty, if that needs no waiting.
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard> {
        let mut state = self.0.lock();
        if state.blocks(&range) {
            return None;
        }
        state.held.insert(range.start, range.end);
        drop(state);
        Some(RangeGuard { locks: self.clone(), range })
    }

    fn release(&self, range: &Range<u64>) {
        let mut grants = Vec::new();
        {
            let mut state = self.0.lock();
            state.held.remove(&range.start);
            if state.waiting.is_empty() {
                return;
            }
            let mut passed: Vec<Range<u64>> = Vec::new();
            let mut still = VecDeque::with_capacity(state.waiting.len());
            while let Some((wanted, grant)) = state.waiting.pop_front() {
                if grant.is_closed() {
                    continue;
                }
                if state.is_held(&wanted) || passed.iter().any(|earlier| overlap(earlier, &wanted)) {
                    passed.push(wanted.clone());
                    still.push_back((wanted, grant));
                } else {
                    state.held.insert(wanted.start, wanted.end);
                    grants.push((grant, RangeGuard { locks: self.clone(), range: wanted }));
                }
            }
            state.waiting = still;
        }
        for (grant, guard) in grants {
            // A waiter that was dropped meanwhile sends the guard back: dropping it here hands the range on.
            drop(grant.send(guard));
        }
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.locks.release(&self.range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn disjoint_ranges_do_not_wait() {
        let locks = RangeLocks::default();
        let _a = locks.lock(0..10).now_or_never().unwrap();
        let _b = locks.lock(10..20).now_or_never().unwrap();
        assert!(locks.lock(9..11).now_or_never().is_none());
    }

    #[test]
    fn who_will_not_wait_neither_shares_nor_overtakes() {
        let locks = RangeLocks::default();
        let first = locks.try_lock(0..10).unwrap();
        assert!(locks.try_lock(9..11).is_none());
        let mut second = Box::pin(locks.lock(5..15));
        assert!(second.as_mut().now_or_never().is_none());
        assert!(locks.try_lock(12..20).is_none(), "must not overtake the second");
        drop(first);
        drop(second.now_or_never().unwrap());
        assert!(locks.try_lock(0..20).is_some());
    }

    #[test]
    fn overlapping_requests_are_granted_in_order() {
        let locks = RangeLocks::default();
        let first = locks.lock(0..10).now_or_never().unwrap();
        let (mut second, mut third) = (Box::pin(locks.lock(5..15)), Box::pin(locks.lock(12..20)));
        assert!(second.as_mut().now_or_never().is_none());
        assert!(third.as_mut().now_or_never().is_none(), "must not overtake the second");
        drop(first);
        assert!(third.as_mut().now_or_never().is_none());
        drop(second.now_or_never().unwrap());
        assert!(third.now_or_never().is_some());
    }

    #[test]
    fn a_dropped_waiter_blocks_nobody() {
        let locks = RangeLocks::default();
        let first = locks.lock(0..10).now_or_never().unwrap();
        let mut dropped_before = Box::pin(locks.lock(0..10));
        let mut dropped_after = Box::pin(locks.lock(0..10));
        let mut last = Box::pin(locks.lock(0..10));
        assert!(dropped_before.as_mut().now_or_never().is_none());
        assert!(dropped_after.as_mut().now_or_never().is_none());
        assert!(last.as_mut().now_or_never().is_none());
        drop(dropped_before);
        drop(first);
        // It was granted and never looked: the guard goes with it.
        drop(dropped_after);
        assert!(last.now_or_never().is_some());
    }
}
