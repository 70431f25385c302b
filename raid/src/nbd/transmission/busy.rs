//! Looking for the next request of a client that asks one thing at a time, for a moment, before the thread sleeps. Where
//! processors sleep deeply, most of all in virtual machines, to be woken takes longer than the operation: asked one by one,
//! 4 KiB reads come twice as fast (two cores, nothing else running: 29,000 a second instead of 15,000, at 37 µs of CPU time
//! each instead of 28). Where others want the processor it is the other way round (22,000 instead of 42,000).
//!
//! A thread that looks does nothing else. So it looks only while that pays, which is measured: how long it took until the
//! next request, with looking and without. And only while requests come one by one, the connection is the server's only
//! one, and the machine has a core for the client. Cost: a `recv` that finds nothing each microsecond or so, for
//! [`Timing::busy`](super::Timing::busy) at most; else two readings of the clock each time nothing is left to do.
//!
//! The runtime hears of what was received here too, later, and finds nothing: that is an event for nobody.

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Room for what such a client sends at once: a write of 4 KiB with the longer of the two headers.
const ROOM: usize = 4096 + 32;
/// Pauses of the processor between two looks.
const PAUSES: u32 = 16;
/// So many requests in a row must have come one by one: of a queue of requests one comes alone now and then, and to look
/// for the next would take the others from being received together.
const ALONE: u32 = 16;
/// One turn of so many is spent on what seems to pay less, to learn whether that is still so.
const TRIAL: u32 = 32;

/// Time until the next request, by one of two ways of waiting.
#[derive(Debug, Clone, Copy, Default)]
struct Mean(Option<Duration>);

impl Mean {
    fn learn(&mut self, gap: Duration) {
        self.0 = Some(self.0.map_or(gap, |mean| (mean * 3 + gap) / 4));
    }
}

/// Whether looking pays, from what the client did so far. Pure: it is told the time.
pub(super) struct Habit {
    /// How long a look may take; there is none if zero.
    bound: Duration,
    /// Requests since there was nothing left to do.
    requests: u32,
    /// Requests in a row that came one by one.
    turns: u32,
    /// Since when nothing has been left to do, and whether it was looked.
    idle: Option<(Instant, bool)>,
    slept: Mean,
    looked: Mean,
}

impl Habit {
    pub(super) fn new(bound: Duration) -> Self {
        Self { bound, requests: 0, turns: 0, idle: None, slept: Mean::default(), looked: Mean::default() }
    }

    /// A request was taken.
    pub(super) fn took(&mut self) {
        self.requests = self.requests.saturating_add(1);
    }

    /// Requests taken since there was nothing left to do.
    pub(super) fn requests(&self) -> u32 {
        self.requests
    }

    /// Nothing is left to do at `now`: how long to look, if that pays. `may_look`: nobody else wants the thread.
    pub(super) fn rests(&mut self, now: Instant, may_look: bool) -> Option<Duration> {
        self.idle = None;
        match std::mem::take(&mut self.requests) {
            // Something else woke the task.
            0 => return None,
            1 => self.turns = self.turns.checked_add(1).unwrap_or(ALONE),
            // The client waits for no single answer.
            _ => self.turns = 0,
        }
        if self.turns < ALONE || self.bound.is_zero() || !may_look {
            return None;
        }
        let looks = self.pays() != self.turns.is_multiple_of(TRIAL);
        self.idle = Some((now, looks));
        looks.then_some(self.bound)
    }

    /// Whether looking has the next request here in three quarters of the time, or is still to be tried.
    fn pays(&self) -> bool {
        match (self.slept.0, self.looked.0) {
            (Some(slept), Some(looked)) => looked < slept * 3 / 4,
            (slept, None) => slept.is_some(),
            (None, Some(_)) => false,
        }
    }

    /// Bytes came.
    pub(super) fn received(&mut self, now: impl FnOnce() -> Instant) {
        let Some((idle, looked)) = self.idle.take() else { return };
        // Of a client that takes its time, how much says nothing.
        let gap = now().saturating_duration_since(idle).min(self.bound * 2);
        if looked { self.looked.learn(gap) } else { self.slept.learn(gap) }
    }
}

/// What came from a socket within `limit` from `start`, its end aside: that, and errors, are for whoever reads next.
pub(super) fn look(socket: impl AsFd, start: Instant, limit: Duration, into: &mut bytes::BytesMut) -> bool {
    let mut room = [MaybeUninit::<u8>::uninit(); ROOM];
    loop {
        match recv(&socket, &mut room, RecvFlags::DONTWAIT) {
            Ok(((came, _), _)) => {
                into.extend_from_slice(came);
                return !came.is_empty();
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return false,
        }
        if start.elapsed() >= limit {
            return false;
        }
        for _ in 0..PAUSES {
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a thousand turns of so many requests, how many are looked for: by the time in µs until the next request, without
    /// looking and with.
    fn looks(requests: u32, slept: u64, looked: u64) -> u32 {
        let mut habit = Habit::new(Duration::from_micros(100));
        let (mut now, mut looks) = (Instant::now(), 0);
        for _ in 0..1000 {
            (0..requests).for_each(|_| habit.took());
            let is_looked = habit.rests(now, true).is_some();
            looks += u32::from(is_looked);
            now += Duration::from_micros(if is_looked { looked } else { slept });
            habit.received(|| now);
        }
        looks
    }

    #[test]
    fn it_is_looked_where_that_is_quicker() {
        assert!((940..1000).contains(&looks(1, 60, 25)), "a machine that sleeps");
        assert!((1..50).contains(&looks(1, 15, 30)), "a machine that is busy");
        assert!((1..50).contains(&looks(1, 20, 19)), "no difference that counts");
        assert!((1..50).contains(&looks(1, 5000, 5000)), "a client that takes its time");
        assert_eq!(looks(2, 60, 25), 0, "a queue of requests");
        let mut habit = Habit::new(Duration::from_micros(100));
        for turn in 0..1000 {
            (0..=u32::from(turn % 10 == 0)).for_each(|_| habit.took());
            assert_eq!(
                habit.rests(Instant::now(), true),
                None,
                "a queue of which one comes alone now and then"
            );
            habit.received(Instant::now);
        }
        assert_eq!(looks(0, 60, 25), 0, "no requests");
    }

    #[test]
    fn what_was_learnt_is_learnt_anew() {
        let mut habit = Habit::new(Duration::from_micros(100));
        let mut now = Instant::now();
        let mut turns = |slept, looked| {
            let mut looks = 0;
            for turn in 0..400 {
                habit.took();
                let is_looked = habit.rests(now, true).is_some();
                looks += u32::from(is_looked && turn >= 200);
                now += Duration::from_micros(if is_looked { looked } else { slept });
                habit.received(|| now);
            }
            looks
        };
        assert!(turns(60, 25) > 180);
        assert!(turns(15, 30) < 20);
        assert!(turns(60, 25) > 180);
    }

    #[test]
    fn there_is_no_looking_without_a_bound_or_beside_others() {
        for (bound, may_look) in [(0, true), (100, false)] {
            let mut habit = Habit::new(Duration::from_micros(bound));
            for _ in 0..100 {
                habit.took();
                assert_eq!(habit.rests(Instant::now(), may_look), None);
                habit.received(Instant::now);
            }
        }
    }

    #[test]
    fn what_comes_is_found_and_the_end_is_left() {
        let (mut client, server) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut got = bytes::BytesMut::from(&b"a"[..]);
        let briefly = Duration::from_micros(10);
        assert!(!look(&server, Instant::now(), briefly, &mut got));
        let sender = std::thread::spawn(move || {
            std::io::Write::write_all(&mut client, &[7; ROOM + 1]).unwrap();
            client
        });
        assert!(look(&server, Instant::now(), Duration::from_secs(60), &mut got));
        let client = sender.join().unwrap();
        while look(&server, Instant::now(), briefly, &mut got) {}
        assert_eq!(got, [&b"a"[..], &[7; ROOM + 1]].concat());
        drop(client);
        assert!(!look(&server, Instant::now(), Duration::from_secs(60), &mut got));
        assert_eq!(got.len(), ROOM + 2);
    }
}
