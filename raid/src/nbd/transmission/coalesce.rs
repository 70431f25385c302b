//! A rest before the next requests are received, so that more of them come together: what network cards do when they
//! hold back an interrupt. A server that is quicker than its client otherwise takes each request as it comes, and a
//! `recv`, an `epoll_wait` and a `writev` are spent on one or two. The client gains as well, as it finds many replies
//! where it looks for one: over one connection of depth 32, 4 KiB reads went from 150,000 to 180,000 a second, at two
//! thirds of the processor time.
//!
//! How long to rest depends on how many requests the client has open and how fast it is, which nobody tells. So it is
//! tried: some windows of time with a shorter or longer rest, between as many with the one that was best so far. What a
//! client waits for is never held back to save our time: a longer rest is kept only if no less is done in the same time
//! (a client with so many requests open waits the less the more are done), and if more is done or it costs less. What
//! counts is the rate, and, by a third of it, the requests done in the same processor time: over a Unix socket, 64 KiB
//! reads are about as many with any rest up to 50 µs, but those of 10 µs cost a third more. Trials that bring nothing
//! become rare. Clients that ask one thing at a time, and several connections, are not rested for.
//!
//! Cost: a reading of the clock each time nothing is left to do, which `busy` shares, and one of the thread's processor time
//! every [`WINDOW`].

use rustix::time::{ClockId, clock_gettime};
use std::cell::Cell;
use std::num::NonZeroU64;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// Rests to choose from, in µs.
const RESTS: [u64; 7] = [0, 10, 20, 30, 45, 70, 100];
/// Least time and least requests of a window.
const WINDOW: Duration = Duration::from_millis(3);
const REQUESTS: u32 = 64;
/// Nothing for so long: the client does something else, and what was learnt of it is old.
const PAUSE: Duration = Duration::from_millis(20);
/// By how much more a longer rest must be worth.
const GAIN: f64 = 1.05;
/// Windows between two trials, at most.
const SELDOM: u32 = 128;
/// The windows of a trial: which have the other rest. What changes steadily meanwhile counts for both alike.
const TRIAL: [bool; 8] = [false, true, true, false, false, true, true, false];

/// What was done in some windows.
#[derive(Debug, Clone, Copy, Default)]
struct Done {
    requests: u32,
    took: Duration,
    /// Processor time.
    cost: Duration,
}

impl Done {
    fn add(&mut self, more: Self) {
        self.requests = self.requests.saturating_add(more.requests);
        self.took += more.took;
        self.cost += more.cost;
    }

    /// By how much more was done in the same time, and in the same processor time.
    fn than(&self, other: &Self) -> (f64, f64) {
        let per = |done: &Self, time: Duration| f64::from(done.requests) / time.as_secs_f64().max(1e-9);
        (per(self, self.took) / per(other, other.took), per(self, self.cost) / per(other, other.cost))
    }
}

/// What is being found out, by windows.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Nothing, for so many more.
    Settled(u32),
    /// What another rest is worth; how many windows of [`TRIAL`] are over, and what was done with the best one and the other.
    Trying { other: usize, window: usize, done: [Done; 2] },
}

/// Processor time that a thread has used.
pub(super) type Spent = (ThreadId, Duration);

/// Where a window began.
#[derive(Debug, Clone, Copy)]
struct Begun {
    at: Instant,
    spent: Spent,
}

/// How long to rest, from what the client did so far. Pure: it is told the time.
#[derive(Debug)]
pub(super) struct Coalescing {
    /// Which of [`RESTS`] is the best so far.
    rest: usize,
    phase: Phase,
    /// The next other one is a longer one.
    longer: bool,
    /// Windows until the next trial, after one that brought nothing.
    patience: u32,
    /// Since when requests are counted.
    begun: Option<Begun>,
    /// When nothing was left to do the last time.
    last: Option<Instant>,
    requests: u32,
    rests: u32,
}

impl Coalescing {
    pub(super) fn new() -> Self {
        Self {
            rest: 0,
            phase: Phase::Settled(0),
            longer: true,
            patience: 1,
            begun: None,
            last: None,
            requests: 0,
            rests: 0,
        }
    }

    /// Nothing is left to do at `now`, after so many requests: how long to rest. `spent` tells what processor time was
    /// used until now.
    pub(super) fn rests(&mut self, now: Instant, requests: u32, spent: impl FnOnce() -> Spent) -> Duration {
        if requests == 0 {
            // Something else woke the task.
            return Duration::ZERO;
        }
        let paused = self.last.replace(now).is_none_or(|last| now.saturating_duration_since(last) > PAUSE);
        let begun = match self.begun {
            Some(begun) if !paused => begun,
            _ => {
                self.forget(Begun { at: now, spent: spent() });
                return Duration::ZERO;
            }
        };
        self.requests = self.requests.saturating_add(requests);
        self.rests += 1;
        let took = now.saturating_duration_since(begun.at);
        if took >= WINDOW && self.requests >= REQUESTS {
            let is_queue = self.requests > self.rests + self.rests / 16;
            let next = Begun { at: now, spent: spent() };
            let cost = next.spent.1.saturating_sub(begun.spent.1);
            let done = Done { requests: self.requests, took, cost };
            (self.begun, self.requests, self.rests) = (Some(next), 0, 0);
            if !is_queue {
                self.forget(next);
            } else if next.spent.0 == begun.spent.0 {
                self.judge(done);
            }
            // Else the task has moved to another thread, and what this window cost is not known: it is tried again.
        }
        Duration::from_micros(RESTS[self.rest_now()])
    }

    /// Begins anew.
    fn forget(&mut self, begun: Begun) {
        *self = Self { begun: Some(begun), last: Some(begun.at), ..Self::new() };
    }

    fn rest_now(&self) -> usize {
        match self.phase {
            Phase::Trying { other, window, .. } if TRIAL[window] => other,
            _ => self.rest,
        }
    }

    /// A window is over.
    fn judge(&mut self, in_it: Done) {
        match &mut self.phase {
            Phase::Settled(left @ 1..) => *left -= 1,
            Phase::Settled(0) => {
                let other = if self.longer { Some(self.rest + 1) } else { self.rest.checked_sub(1) };
                match other.filter(|&other| other < RESTS.len()) {
                    Some(other) => self.phase = Phase::Trying { other, window: 0, done: Default::default() },
                    None => self.longer = !self.longer,
                }
            }
            Phase::Trying { other, window, done } => {
                done[usize::from(TRIAL[*window])].add(in_it);
                *window += 1;
                if *window == TRIAL.len() {
                    let (other, [best, tried]) = (*other, *done);
                    self.choose(other, tried.than(&best));
                }
            }
        }
    }

    /// A trial is over: by how much more the other rest did in the same time, and in the same processor time.
    fn choose(&mut self, other: usize, (rate, thrift): (f64, f64)) {
        let worth = rate * thrift.cbrt();
        let is_better = if other > self.rest { rate >= 1.0 && worth > GAIN } else { worth > 1.0 };
        if is_better {
            // And on, the same way.
            self.rest = other;
            self.patience = 1;
            self.phase = Phase::Settled(0);
        } else {
            self.longer = !self.longer;
            self.patience = (self.patience * 2).min(SELDOM);
            self.phase = Phase::Settled(self.patience);
        }
    }
}

/// Processor time that this thread has used.
pub(super) fn spent() -> Spent {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    // Neither is ever negative.
    let used = Duration::new(used.tv_sec.unsigned_abs(), used.tv_nsec.unsigned_abs() as u32);
    (std::thread::current().id(), used)
}

thread_local! {
    /// Whether this thread sleeps as long as it says, and not up to 50 µs longer.
    static PUNCTUAL: Cell<bool> = const { Cell::new(false) };
}

/// Rests. The thread does nothing else meanwhile: for those who share it with nobody.
pub(super) fn rest(time: Duration) {
    if time.is_zero() {
        return;
    }
    if !PUNCTUAL.replace(true)
        && let Err(errno) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1))
    {
        tracing::debug!("rests will take longer than they should: {errno}");
    }
    std::thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client, and what it has been answered.
    struct Client {
        coalescing: Coalescing,
        now: Instant,
        used: Duration,
        noise: u32,
    }

    impl Client {
        fn new() -> Self {
            Self { coalescing: Coalescing::new(), now: Instant::now(), used: Duration::ZERO, noise: 1 }
        }

        /// A tenth more or less.
        fn about(&mut self, ns: u64) -> Duration {
            self.noise = self.noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let noise = u64::from(self.noise >> 16) % 20 + 90;
            Duration::from_nanos(ns * noise / 100)
        }

        fn rests(&mut self, requests: u32) -> Duration {
            let spent = (std::thread::current().id(), self.used);
            self.coalescing.rests(self.now, requests, || spent)
        }

        /// For so many ms it sends `requests` at a time, each of which takes so many ns, and costs so many ns of processor
        /// time, after a rest of so many µs. Returns the mean rest of the second half, in ns.
        fn goes_on(&mut self, ms: u64, requests: u32, each: impl Fn(u64) -> (u64, u64)) -> u64 {
            let (begun, half, end) = (self.now, Duration::from_millis(ms / 2), Duration::from_millis(ms));
            let (mut rests, mut turns) = (0, 0);
            while self.now - begun < end {
                let rest = self.rests(requests).as_micros() as u64;
                if self.now - begun >= half {
                    (rests, turns) = (rests + rest, turns + 1);
                }
                let (takes, costs) = each(rest);
                let (takes, costs) = (self.about(takes), self.about(costs));
                self.now += takes * requests.max(1);
                self.used += costs * requests.max(1);
            }
            rests * 1000 / turns
        }
    }

    /// More and more is done up to a rest of 30 µs, and less beyond, at the same cost.
    fn gains(rest: u64) -> (u64, u64) {
        (6_000 - rest.min(30) * 50 + rest.saturating_sub(30) * 100, 3_000)
    }

    /// All wait for what is held back, which would save time.
    fn waits(rest: u64) -> (u64, u64) {
        (6_000 + rest * 50, 3_000 - rest * 20)
    }

    #[test]
    fn a_rest_is_as_long_as_it_brings_more() {
        let mean = Client::new().goes_on(4000, 4, gains);
        assert!((20_000..36_000).contains(&mean), "{mean}");
    }

    #[test]
    fn whoever_waits_is_not_kept_waiting() {
        for requests in [2, 3, 30] {
            let mean = Client::new().goes_on(4000, requests, waits);
            assert!(mean < 500, "{requests}: {mean}");
        }
        assert_eq!(Client::new().goes_on(4000, 1, gains), 0, "one at a time");
        assert_eq!(Client::new().goes_on(4000, 0, gains), 0, "woken by something else");
    }

    #[test]
    fn where_as_much_is_done_the_cheaper_is_chosen() {
        let mean = |cost: fn(u64) -> u64| Client::new().goes_on(4000, 4, |rest| (6_000, cost(rest)));
        let (dear, same, cheap) =
            (mean(|rest| 3_000 + rest.min(1) * 1_000), mean(|_| 3_000), mean(gains_time));
        assert!(dear < 1_000, "a rest costs more: {dear}");
        assert!(same < 2_000, "no difference: {same}");
        assert!(cheap > 15_000, "a rest costs less: {cheap}");
    }

    /// Less and less is used.
    fn gains_time(rest: u64) -> u64 {
        4_000 - rest.min(30) * 80
    }

    #[test]
    fn what_was_learnt_is_learnt_anew() {
        let mut client = Client::new();
        assert!(client.goes_on(2000, 4, gains) > 20_000);
        let mean = client.goes_on(4000, 4, waits);
        assert!(mean < 1_000, "{mean}");
        assert!(client.goes_on(4000, 4, gains) > 20_000);
        client.now += Duration::from_secs(1);
        assert_eq!(client.rests(4), Duration::ZERO, "a pause");
        assert!(client.goes_on(2000, 4, gains) > 20_000);
        assert_eq!(client.goes_on(100, 1, gains), 0, "one at a time");
    }

    #[test]
    fn a_task_that_moves_to_another_thread_is_not_misjudged() {
        let mut client = Client::new();
        assert!(client.goes_on(2000, 4, gains) > 20_000);
        let rest = client.coalescing.rest;
        let elsewhere = std::thread::spawn(|| std::thread::current().id()).join().unwrap();
        for turn in 0..100_000 {
            let id = if turn % 2 == 0 { elsewhere } else { std::thread::current().id() };
            client.coalescing.rests(client.now, 64, || (id, Duration::ZERO));
            client.now += WINDOW;
        }
        assert_eq!(client.coalescing.rest, rest);
    }

    #[test]
    fn a_rest_takes_about_as_long_as_it_says() {
        let (begun, (thread, used)) = (Instant::now(), spent());
        (0..100).for_each(|_| rest(Duration::from_micros(10)));
        assert!(begun.elapsed() >= Duration::from_millis(1));
        let (same, more) = spent();
        assert!(same == thread && more > used && more.saturating_sub(used) < begun.elapsed());
    }
}
