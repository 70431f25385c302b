//! How fast walks go: as fast as they can while nobody else works, no faster than a maximum, and while clients work
//! no faster than leaves them room, but never slower than a minimum.
//!
//! After each window a walk tells how much it did, and is held as long as its limit asks for.

use crate::volume::Inner;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The share of its own time that a walk leaves to clients while they work: it rests so many times as long as it worked.
const COURTESY: u32 = 3;
/// The longest rest at once: limits that change are noticed after that.
const LONGEST: Duration = Duration::from_millis(500);

/// The limits, and how much clients have done. Bytes a second.
#[derive(Debug)]
pub(crate) struct Speed {
    least: AtomicU64,
    most: AtomicU64,
    /// Changes and reads that clients have begun.
    foreground: AtomicU64,
}

impl Default for Speed {
    fn default() -> Self {
        Self { least: AtomicU64::new(1 << 20), most: AtomicU64::new(u64::MAX), foreground: AtomicU64::new(0) }
    }
}

impl Speed {
    /// Sets both limits; a maximum below the minimum counts for both.
    pub(crate) fn limit(&self, least: u64, most: u64) {
        self.least.store(least.min(most).max(1), Ordering::Relaxed);
        self.most.store(most.max(1), Ordering::Relaxed);
    }

    /// The limits: least, most.
    pub(crate) fn limits(&self) -> (u64, u64) {
        (self.least.load(Ordering::Relaxed), self.most.load(Ordering::Relaxed))
    }

    /// A client has begun something.
    pub(crate) fn count(&self) {
        self.foreground.fetch_add(1, Ordering::Relaxed);
    }
}

/// The pace of one walk.
pub(crate) struct Pace {
    /// When the window began that is not told yet.
    since: Duration,
    foreground: u64,
}

impl Pace {
    /// Of a walk that begins now.
    pub(crate) fn new(inner: &Inner) -> Self {
        let foreground = inner.speed.foreground.load(Ordering::Relaxed);
        Self { since: inner.runtime.now(), foreground }
    }

    /// The walk has done so many bytes since it was last here: rests as long as it should.
    pub(crate) async fn took(&mut self, inner: &Inner, bytes: u64) {
        let foreground = inner.speed.foreground.load(Ordering::Relaxed);
        let busy = foreground != self.foreground;
        let done = inner.runtime.now();
        let worked = done.saturating_sub(self.since);
        self.foreground = foreground;
        loop {
            let (least, most) = inner.speed.limits();
            let rested = inner.runtime.now().saturating_sub(done);
            let left = rest(bytes, worked, busy, least, most).saturating_sub(rested);
            if left.is_zero() || inner.is_stopping() {
                break;
            }
            inner.runtime.sleep(left.min(LONGEST)).await;
        }
        self.since = inner.runtime.now();
    }
}

/// How long to rest after `bytes` were done in `worked`.
fn rest(bytes: u64, worked: Duration, busy: bool, least: u64, most: u64) -> Duration {
    let time_at = |speed: u64| Duration::from_secs_f64(bytes as f64 / speed as f64);
    let for_most = time_at(most).saturating_sub(worked);
    // Not so long that the walk falls below the minimum.
    let for_clients =
        if busy { (worked * COURTESY).min(time_at(least).saturating_sub(worked)) } else { Duration::ZERO };
    for_most.max(for_clients).min(LONGEST.max(for_most))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn nobody_else_and_no_limit_is_no_rest() {
        assert_eq!(rest(MIB, Duration::from_millis(1), false, MIB, u64::MAX), Duration::ZERO);
    }

    #[test]
    fn a_maximum_holds() {
        let rest = rest(MIB, Duration::from_millis(100), false, 1, MIB);
        assert_eq!(rest, Duration::from_millis(900));
    }

    #[test]
    fn clients_get_their_share_down_to_the_minimum() {
        let worked = Duration::from_millis(10);
        assert_eq!(rest(MIB, worked, true, MIB, u64::MAX), worked * COURTESY);
        assert_eq!(rest(MIB, worked, true, 100 * MIB, u64::MAX), Duration::ZERO);
    }
}
