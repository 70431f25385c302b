//! A rest before the next requests are received, so that more of them come together: what network cards do when they
//! hold back an interrupt. A server that is quicker than its client otherwise takes each request as it comes, and a
//! `recv`, an `epoll_wait` and a `writev` are spent on one or two. The client gains as well, as it finds many replies
//! where it looks for one: over one connection of depth 32, 4 KiB reads went from 150,000 to 180,000 a second, at two
//! thirds of the processor time.
//!
//! How long to rest depends on how many requests the client has open and how fast it is, which nobody tells. So it is
//! tried: a while with a shorter or longer rest, between two with the one that was best so far. A longer one is kept
//! only if clearly more requests were done in the same time: what a client waits for is never held back to save our
//! time, since a client with so many requests open waits the less the more are done. Trials that bring nothing become
//! rare. Clients that ask one thing at a time, and several connections, are not rested for.
//!
//! Cost: a reading of the clock each time nothing is left to do, which `busy` shares.

use std::cell::Cell;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// Rests to choose from, in µs.
const RESTS: [u64; 7] = [0, 10, 20, 30, 45, 70, 100];
/// Least time and least requests by which a rest is judged.
const WINDOW: Duration = Duration::from_millis(3);
const REQUESTS: u32 = 64;
/// Nothing for so long: the client does something else, and what was learnt of it is old.
const PAUSE: Duration = Duration::from_millis(20);
/// By how much more must be done with a longer rest.
const GAIN: f64 = 1.05;
/// Windows between two trials, at most.
const SELDOM: u32 = 64;

/// What is being found out, by windows.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Nothing, for so many more.
    Settled(u32),
    /// The rate with another rest; the one before is known.
    Trying { other: usize, before: f64 },
    /// The rate with the rest as it was, once more.
    Checking { other: usize, before: f64, tried: f64 },
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
    begun: Option<Instant>,
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

    /// Nothing is left to do at `now`, after so many requests: how long to rest.
    pub(super) fn rests(&mut self, now: Instant, requests: u32) -> Duration {
        if requests == 0 {
            // Something else woke the task.
            return Duration::ZERO;
        }
        let paused = self.last.replace(now).is_none_or(|last| now.saturating_duration_since(last) > PAUSE);
        let begun = match self.begun {
            Some(begun) if !paused => begun,
            _ => {
                self.forget(now);
                return Duration::ZERO;
            }
        };
        self.requests = self.requests.saturating_add(requests);
        self.rests += 1;
        let took = now.saturating_duration_since(begun);
        if took >= WINDOW && self.requests >= REQUESTS {
            let is_queue = self.requests > self.rests + self.rests / 16;
            let rate = f64::from(self.requests) / took.as_secs_f64();
            (self.begun, self.requests, self.rests) = (Some(now), 0, 0);
            if is_queue {
                self.judge(rate);
            } else {
                self.forget(now);
            }
        }
        let rest = if let Phase::Trying { other, .. } = self.phase { other } else { self.rest };
        Duration::from_micros(RESTS[rest])
    }

    /// Begins anew.
    fn forget(&mut self, now: Instant) {
        *self = Self { begun: Some(now), last: Some(now), ..Self::new() };
    }

    /// A window is over, with so many requests a second.
    fn judge(&mut self, rate: f64) {
        self.phase = match self.phase {
            Phase::Settled(left @ 1..) => Phase::Settled(left - 1),
            Phase::Settled(0) => {
                if let Some(other) = self.other() {
                    Phase::Trying { other, before: rate }
                } else {
                    self.longer = !self.longer;
                    Phase::Settled(0)
                }
            }
            Phase::Trying { other, before } => Phase::Checking { other, before, tried: rate },
            Phase::Checking { other, before, tried } => {
                let gain = if other > self.rest { GAIN } else { 1.0 };
                if tried > before.max(rate) * gain {
                    // And on, the same way.
                    self.rest = other;
                    self.patience = 1;
                    Phase::Settled(0)
                } else {
                    self.longer = !self.longer;
                    self.patience = (self.patience * 2).min(SELDOM);
                    Phase::Settled(self.patience)
                }
            }
        };
    }

    /// The next rest to try.
    fn other(&self) -> Option<usize> {
        let other = if self.longer { self.rest + 1 } else { self.rest.checked_sub(1)? };
        (other < RESTS.len()).then_some(other)
    }
}

thread_local! {
    /// Whether this thread sleeps as long as it says, and not up to 50 µs longer.
    static PUNCTUAL: Cell<bool> = const { Cell::new(false) };
}

/// Rests. The thread does nothing else meanwhile: for those who share it with nobody.
pub(super) fn rest(time: Duration) {
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
        noise: u32,
    }

    impl Client {
        fn new() -> Self {
            Self { coalescing: Coalescing::new(), now: Instant::now(), noise: 1 }
        }

        /// For so many ms it sends `requests` at a time, each of which takes so many ns after a rest of so many µs, a
        /// tenth more or less. Returns the mean rest of the second half, in ns.
        fn goes_on(&mut self, ms: u64, requests: u32, each: impl Fn(u64) -> u64) -> u64 {
            let (begun, half, end) = (self.now, Duration::from_millis(ms / 2), Duration::from_millis(ms));
            let (mut rests, mut turns) = (0, 0);
            while self.now - begun < end {
                let rest = self.coalescing.rests(self.now, requests).as_micros() as u64;
                if self.now - begun >= half {
                    (rests, turns) = (rests + rest, turns + 1);
                }
                self.noise = self.noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let noise = u64::from(self.noise >> 16) % 20 + 90;
                self.now += Duration::from_nanos(u64::from(requests.max(1)) * each(rest) * noise / 100);
            }
            rests * 1000 / turns
        }
    }

    /// More and more is done up to a rest of 30 µs, and less beyond.
    fn gains(rest: u64) -> u64 {
        6_000 - rest.min(30) * 50 + rest.saturating_sub(30) * 100
    }

    /// All wait for what is held back.
    fn waits(rest: u64) -> u64 {
        6_000 + rest * 500
    }

    #[test]
    fn a_rest_is_as_long_as_it_brings_more() {
        let mean = Client::new().goes_on(4000, 4, gains);
        assert!((24_000..36_000).contains(&mean), "{mean}");
    }

    #[test]
    fn whoever_waits_is_not_kept_waiting() {
        for requests in [2, 3, 30] {
            let mean = Client::new().goes_on(4000, requests, waits);
            assert!(mean < 200, "{requests}: {mean}");
        }
        let mean = Client::new().goes_on(4000, 4, |_| 6_000);
        assert!(mean < 5_000, "no difference: {mean}");
        assert_eq!(Client::new().goes_on(4000, 1, gains), 0, "one at a time");
        assert_eq!(Client::new().goes_on(4000, 0, gains), 0, "woken by something else");
    }

    #[test]
    fn what_was_learnt_is_learnt_anew() {
        let mut client = Client::new();
        assert!(client.goes_on(2000, 4, gains) > 20_000);
        let mean = client.goes_on(2000, 4, waits);
        assert!(mean < 1_000, "{mean}");
        assert!(client.goes_on(4000, 4, gains) > 20_000);
        client.now += Duration::from_secs(1);
        assert_eq!(client.coalescing.rests(client.now, 4), Duration::ZERO, "a pause");
        assert!(client.goes_on(2000, 4, gains) > 20_000);
        assert_eq!(client.goes_on(100, 1, gains), 0, "one at a time");
    }

    #[test]
    fn a_rest_takes_about_as_long_as_it_says() {
        let begun = Instant::now();
        (0..100).for_each(|_| rest(Duration::from_micros(10)));
        assert!(begun.elapsed() >= Duration::from_millis(1));
    }
}
