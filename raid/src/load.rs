//! How busy a member is and how fast it answers: what the choice of a copy rests on, and the decision that a member
//! has stalled.
//!
//! Reads that are answered at once (by the page cache) are never counted here, so they cost nothing. Nothing that must
//! be true depends on these figures but [`Load::is_unanswered`]; the others advise, and a lost update does no harm.
//! Times are those of the volume's [`Runtime`](crate::runtime::Runtime).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// What the first read of a member is taken to need: a seek of a spinning disk. Twenty reads of a faster one, and
/// this is forgotten.
const FIRST_GUESS: Duration = Duration::from_millis(10);
/// The share a new reading has in the average is one in so many.
const SMOOTHING: u64 = 8;
/// Reads in a row that another copy had to answer, after which a member counts as slow.
const LATE_IN_A_ROW: u32 = 3;
/// How long a slow member is spared reads before one is tried again.
const RESPITE: Duration = Duration::from_secs(30);

/// A member that has answered something in this time works; an operation that took longer was held up.
const LATELY: Duration = Duration::from_secs(5);

/// A member's figures.
#[derive(Debug)]
pub(crate) struct Load {
    /// Reads of clients that wait for an answer.
    reads: AtomicU32,
    /// Nanoseconds such a read takes, on average.
    average: AtomicU64,
    /// Reads in a row that another copy had to answer.
    late: AtomicU32,
    /// Nanoseconds: until then a slow member is not read where another copy is.
    spared_until: AtomicU64,
    /// Operations under a lock that wait for an answer.
    asked: AtomicU32,
    /// Nanoseconds: when the last of these was answered.
    answered: AtomicU64,
    /// Nanoseconds: when the last of these was answered that was held up.
    resumed: AtomicU64,
    /// Operations that nobody waits for any more, and that the device may still do.
    abandoned: AtomicU32,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            reads: AtomicU32::new(0),
            average: AtomicU64::new(nanos(FIRST_GUESS)),
            late: AtomicU32::new(0),
            spared_until: AtomicU64::new(0),
            asked: AtomicU32::new(0),
            answered: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            abandoned: AtomicU32::new(0),
        }
    }
}

/// Counts as one until it is dropped.
pub(crate) struct Counted<'a>(&'a AtomicU32);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicU32) -> Self {
        counter.fetch_add(1, Ordering::AcqRel);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Load {
    /// A read waits.
    pub(crate) fn begin_read(&self) -> Counted<'_> {
        Counted::new(&self.reads)
    }

    /// Reads that wait.
    pub(crate) fn reads(&self) -> u32 {
        self.reads.load(Ordering::Relaxed)
    }

    /// What a read that waits takes, on average.
    pub(crate) fn average(&self) -> Duration {
        Duration::from_nanos(self.average.load(Ordering::Relaxed))
    }

    /// A read that had to wait was answered after `took`.
    pub(crate) fn read_took(&self, took: Duration) {
        let old = self.average.load(Ordering::Relaxed);
        let new = old - old / SMOOTHING + nanos(took) / SMOOTHING;
        self.average.store(new, Ordering::Relaxed);
    }

    /// A read was answered in time. Returns whether the member counted as slow until now.
    pub(crate) fn was_in_time(&self) -> bool {
        // Mostly there is nothing to forget: no write to what other processors read.
        self.late.load(Ordering::Relaxed) != 0 && self.late.swap(0, Ordering::Relaxed) >= LATE_IN_A_ROW
    }

    /// Another copy had to answer a read. Returns whether the member counts as slow from now on, and did not before.
    pub(crate) fn was_late(&self, now: Duration) -> bool {
        let late = self.late.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if late >= LATE_IN_A_ROW {
            self.spared_until.store(nanos(now + RESPITE), Ordering::Relaxed);
        }
        late == LATE_IN_A_ROW
    }

    /// Whether it counts as slow: cheap, and the clock need not be asked while it does not.
    pub(crate) fn is_slow(&self) -> bool {
        self.late.load(Ordering::Relaxed) >= LATE_IN_A_ROW
    }

    /// Whether another copy is better read now.
    pub(crate) fn is_spared(&self, now: Duration) -> bool {
        self.is_slow() && nanos(now) < self.spared_until.load(Ordering::Relaxed)
    }

    /// An operation under a lock waits.
    pub(crate) fn begin(&self) -> Counted<'_> {
        Counted::new(&self.asked)
    }

    /// One of them, begun at `since`, was answered.
    pub(crate) fn was_answered(&self, since: Duration, now: Duration) {
        self.answered.fetch_max(nanos(now), Ordering::AcqRel);
        if now.saturating_sub(since) >= LATELY {
            self.resumed.fetch_max(nanos(now), Ordering::AcqRel);
        }
    }

    /// Whether it does its work: it has answered something lately, and nothing has been held up for `time`.
    pub(crate) fn has_worked_for(&self, time: Duration, now: Duration) -> bool {
        let ago = |moment: &AtomicU64| nanos(now).saturating_sub(moment.load(Ordering::Acquire));
        ago(&self.answered) < nanos(LATELY) && ago(&self.resumed) >= nanos(time)
    }

    /// Whether it has nothing to answer, so that nothing tells whether it works.
    pub(crate) fn is_idle(&self) -> bool {
        self.asked.load(Ordering::Acquire) == 0
    }

    /// An operation is not waited for any more, and has not ended.
    pub(crate) fn abandon(&self) {
        self.abandoned.fetch_add(1, Ordering::AcqRel);
    }

    /// Such an operation has ended.
    pub(crate) fn abandoned_ended(&self) {
        self.abandoned.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether the device may still do something that nobody waits for any more.
    pub(crate) fn is_unanswered(&self) -> bool {
        self.abandoned.load(Ordering::Acquire) > 0
    }
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_average_follows_what_reads_take() {
        let load = Load::default();
        assert_eq!(load.average(), FIRST_GUESS);
        (0..40).for_each(|_| load.read_took(MS / 10));
        assert!(load.average() < MS / 5, "{:?}", load.average());
        (0..40).for_each(|_| load.read_took(50 * MS));
        assert!(load.average() > 45 * MS && load.average() <= 50 * MS, "{:?}", load.average());
    }

    #[test]
    fn a_member_is_slow_after_three_late_reads_in_a_row_and_is_tried_again() {
        let load = Load::default();
        let late: Vec<bool> = (0..2).map(|_| load.was_late(MS)).collect();
        assert_eq!(late, [false, false]);
        assert!(!load.was_in_time(), "it did not count as slow yet");
        let told: Vec<bool> = (0..4).map(|_| load.was_late(MS)).collect();
        assert_eq!(told, [false, false, true, false], "told once");
        assert!(load.is_spared(2 * MS));
        let later = MS + RESPITE;
        assert!(!load.is_spared(later), "tried again after a while");
        assert!(!load.was_late(later) && load.is_spared(later + MS), "one late read is enough then");
        assert!(load.was_in_time() && !load.is_slow());
    }

    #[test]
    fn a_member_works_that_has_answered_lately_and_was_not_held_up() {
        let load = Load::default();
        let (limit, now) = (6 * LATELY, 100 * LATELY);
        assert!(!load.has_worked_for(limit, now), "nothing tells that it works");
        load.was_answered(now, now + MS);
        assert!(load.has_worked_for(limit, now + 2 * MS));
        assert!(!load.has_worked_for(limit, now + MS + LATELY), "that was long ago");
        load.was_answered(now, now + LATELY);
        assert!(!load.has_worked_for(limit, now + LATELY + MS), "held up until now");
        let later = now + LATELY + limit;
        load.was_answered(later, later + MS);
        assert!(load.has_worked_for(limit, later + MS));
    }

    #[test]
    fn who_waits_is_counted() {
        let load = Load::default();
        let (read, order) = (load.begin_read(), load.begin());
        assert!(load.reads() == 1 && !load.is_idle());
        drop((read, order));
        assert!(load.reads() == 0 && load.is_idle());
        load.abandon();
        assert!(load.is_unanswered());
        load.abandoned_ended();
        assert!(!load.is_unanswered());
    }
}
