//! Whose turn it is to append, and the appends that are in flight.
//!
//! A producer that does not wait for one answer before it sends the next batch would otherwise wait here: each append has
//! threads to wake, while disks and processors are idle. So the plain case, one batch that belongs to no transaction and
//! goes into the active segment, is only given its place in its turn ([`InFlight::take_off`]). What has its place while
//! another one is being written is written next, all of it at once ([`Flight::write`]), and lands, one after the other.
//! Whatever else changes the log has its turn alone, with nothing in flight ([`Turn`]).
//!
//! Invariants: places in flight follow each other without a gap, from the log's end on; they are written in that order, by
//! one at a time, and the end moves over them in that order. When one cannot be written, those behind it have failed too:
//! the next turn finds the log torn, and cuts it off at its end before anything else is written.
//!
//! A power cut or a kill leaves any of what is in flight and not the rest, as of one request with as many batches. None of it
//! was acknowledged: recovery keeps what follows the end without a gap, and cuts off what is left.
//!
//! Cost of what is written together: one copy of it.

use super::{Appender, Partition};
use crate::batch::Header;
use crate::error::{Error, Result};
use crate::segment::Segment;
use bytes::Bytes;
use parking_lot::Mutex;
use raid::device::Durability;
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Notify, OwnedMutexGuard, oneshot};

/// Appends in flight at most: a Kafka producer sends five requests before it waits for an answer.
const MOST: usize = 16;
/// Bytes that are written at once at most, but for a single batch.
const MOST_BYTES: usize = 512 << 10;

/// The right to change the log, with nothing in flight.
pub(super) struct Turn {
    appender: OwnedMutexGuard<Appender>,
    _turn: Option<OwnedMutexGuard<()>>,
}

impl Deref for Turn {
    type Target = Appender;
    fn deref(&self) -> &Appender {
        &self.appender
    }
}

impl DerefMut for Turn {
    fn deref_mut(&mut self) -> &mut Appender {
        &mut self.appender
    }
}

/// An end of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tail {
    /// Bytes of the active segment.
    pub(super) size: u64,
    /// Offset of the next record.
    pub(super) next: i64,
}

/// What one that waits is told.
#[derive(Debug)]
enum Word {
    /// It was written, or was not.
    Written(Result<()>),
    /// It writes itself and those behind it.
    Write,
}

#[derive(Debug)]
struct Queued {
    data: Bytes,
    durability: Durability,
    tell: oneshot::Sender<Word>,
}

#[derive(Debug, Default)]
struct State {
    /// What is in flight, in order, each with the end of the log behind it.
    headers: VecDeque<(Header, Tail)>,
    /// Told when the last of them has landed or failed.
    last: Option<oneshot::Receiver<Result<()>>>,
    /// Somebody writes.
    is_writing: bool,
    /// What is to be written next, in order.
    queue: VecDeque<Queued>,
    /// Something in flight was not written.
    torn: bool,
}

/// The appends that have their place and have not landed.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    /// Whoever holds it gives the next place.
    turn: Arc<tokio::sync::Mutex<()>>,
    state: Mutex<State>,
    landed: Notify,
    /// How many wait for their turn.
    waiting: AtomicUsize,
}

/// One that waits for its turn.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An append in flight.
pub(super) struct Flight {
    partition: Arc<Partition>,
    at: u64,
    data: Bytes,
    durability: Durability,
    /// Where somebody else writes: told how that went, or that it is next.
    word: Option<oneshot::Receiver<Word>>,
    /// It is the one that writes.
    writes: bool,
    before: Option<oneshot::Receiver<Result<()>>>,
    done: Option<oneshot::Sender<Result<()>>>,
}

impl InFlight {
    /// The batches in flight and the end of the log behind them, if there are any; `None` if nothing may follow them.
    pub(super) fn tail(&self) -> Option<(Vec<Header>, Option<Tail>)> {
        let state = self.state.lock();
        let headers = state.headers.iter().map(|(header, _)| *header).collect();
        (!state.torn && state.headers.len() < MOST).then(|| (headers, state.headers.back().map(|one| one.1)))
    }

    /// Gives a batch the place `at`, which is behind all that is in flight; the caller has its turn, and writes it next. Gives
    /// `data` back if what it would follow was not written.
    pub(super) fn take_off(
        partition: &Arc<Partition>,
        header: &Header,
        at: Tail,
        data: Bytes,
        durability: Durability,
    ) -> std::result::Result<Flight, Bytes> {
        let mut state = partition.in_flight().state.lock();
        if state.torn {
            return Err(data);
        }
        let after = Tail { size: at.size + data.len() as u64, next: header.next_offset() };
        let (done, landed) = oneshot::channel();
        let before = state.last.replace(landed);
        state.headers.push_back((*header, after));
        let word = std::mem::replace(&mut state.is_writing, true).then(|| {
            let (tell, word) = oneshot::channel();
            state.queue.push_back(Queued { data: data.clone(), durability, tell });
            word
        });
        let (partition, writes) = (Arc::clone(partition), word.is_none());
        Ok(Flight { partition, at: at.size, data, durability, word, writes, before, done: Some(done) })
    }

    /// Whether somebody waits for a turn.
    pub(super) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Takes from the queue what is written together with `data`, and what all of that is: stable if all of it waits for that.
    fn join(&self, data: Bytes, durability: Durability) -> (Bytes, Durability, Vec<oneshot::Sender<Word>>) {
        let mut state = self.state.lock();
        let (mut len, mut count) = (data.len(), 0);
        for next in &state.queue {
            if len + next.data.len() > MOST_BYTES {
                break;
            }
            (len, count) = (len + next.data.len(), count + 1);
        }
        let taken: Vec<Queued> = state.queue.drain(..count).collect();
        drop(state);
        if taken.is_empty() {
            return (data, durability, Vec::new());
        }
        let mut all = raid::device::room(len);
        all.extend_from_slice(&data);
        for one in &taken {
            all.extend_from_slice(&one.data);
        }
        let waits = |of: Durability| of == Durability::Stable;
        let all_wait = waits(durability) && taken.iter().all(|one| waits(one.durability));
        let durability = if all_wait { Durability::Stable } else { Durability::Cached };
        (all.freeze(), durability, taken.into_iter().map(|one| one.tell).collect())
    }

    /// Somebody has written. The next one in the queue writes then; none, if that has failed.
    fn hand_over(&self, outcome: &Result<()>) {
        let mut state = self.state.lock();
        state.torn |= outcome.is_err();
        while let Some(next) = state.queue.pop_front() {
            if outcome.is_err() {
                // It may have gone with its runtime.
                drop(next.tell.send(Word::Written(outcome.clone())));
            } else if next.tell.send(Word::Write).is_ok() {
                return;
            }
        }
        state.is_writing = false;
    }

    fn end(&self, outcome: &Result<()>) {
        let mut state = self.state.lock();
        state.headers.pop_front();
        state.torn |= outcome.is_err();
        if state.headers.is_empty() {
            // The next one follows nobody. An idle partition keeps no room: there are tens of thousands.
            state.last = None;
            state.headers = VecDeque::new();
            state.queue = VecDeque::new();
            self.landed.notify_waiters();
        }
    }
}

impl Flight {
    /// Writes it, in its order, with those behind it that are there by then, and waits for those before it. When this has
    /// succeeded it is next to land.
    pub(super) async fn write(&mut self, segment: &Segment) -> Result<()> {
        let word = match self.word.take() {
            None => Word::Write,
            // Whoever is gone without a word has not written.
            Some(word) => word.await.unwrap_or(Word::Written(Err(Error::Interrupted))),
        };
        let written = match word {
            Word::Written(outcome) => outcome,
            Word::Write => {
                self.writes = true;
                let partition = Arc::clone(&self.partition);
                let data = std::mem::take(&mut self.data);
                let (data, durability, others) = partition.in_flight().join(data, self.durability);
                let outcome = segment.bytes.write(self.at, data, durability).await;
                for other in others {
                    drop(other.send(Word::Written(outcome.clone())));
                }
                self.writes = false;
                partition.in_flight().hand_over(&outcome);
                outcome
            }
        };
        let before = match self.before.take() {
            Some(before) => before.await.unwrap_or(Err(Error::Interrupted)),
            None => Ok(()),
        };
        let outcome = before.and(written);
        if outcome.is_err() {
            self.finish(outcome.clone());
        }
        outcome
    }

    /// The log's end is behind it now. The caller holds `appender`, so that nobody takes its batch for one in flight still.
    pub(super) fn landed(mut self) {
        self.finish(Ok(()));
    }

    fn finish(&mut self, outcome: Result<()>) {
        let Some(done) = self.done.take() else { return };
        self.partition.in_flight().end(&outcome);
        // Nobody need follow.
        drop(done.send(outcome));
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if self.done.is_none() {
            return;
        }
        // It has neither landed nor failed: its task has ended with its runtime.
        let is_next = self.word.take().is_some_and(|mut word| matches!(word.try_recv(), Ok(Word::Write)));
        if self.writes || is_next {
            self.partition.in_flight().hand_over(&Err(Error::Interrupted));
        }
        self.finish(Err(Error::Interrupted));
    }
}

impl Partition {
    /// The appends in flight.
    pub(super) fn in_flight(&self) -> &InFlight {
        self.in_flight.get_or_init(Box::default)
    }

    /// The turn of whoever came first; what is in flight may still be.
    pub(super) async fn turn(&self) -> OwnedMutexGuard<()> {
        let in_flight = self.in_flight();
        let _waits = Waits::new(&in_flight.waiting);
        Arc::clone(&in_flight.turn).lock_owned().await
    }

    /// Waits for one's turn, and until nothing is in flight.
    pub(super) async fn turn_alone(&self) -> Turn {
        let turn = self.turn().await;
        self.alone(turn).await
    }

    /// Waits until nothing is in flight.
    pub(super) async fn alone(&self, turn: OwnedMutexGuard<()>) -> Turn {
        let in_flight = self.in_flight();
        loop {
            // Before the look: whoever lands after it is heard.
            let landed = in_flight.landed.notified();
            if in_flight.state.lock().headers.is_empty() {
                break;
            }
            landed.await;
        }
        let mut appender = Arc::clone(&self.appender).lock_owned().await;
        appender.torn |= std::mem::take(&mut in_flight.state.lock().torn);
        Turn { appender, _turn: Some(turn) }
    }

    /// The turn, if nobody has it and nothing is in flight. Costs an idle partition no memory: where nobody has appended yet,
    /// `appender` alone keeps others from taking a place.
    pub(super) fn try_turn_alone(&self) -> Option<Turn> {
        let turn = match self.in_flight.get() {
            Some(in_flight) => Some(Arc::clone(&in_flight.turn).try_lock_owned().ok()?),
            None => None,
        };
        let mut appender = Arc::clone(&self.appender).try_lock_owned().ok()?;
        if let Some(in_flight) = self.in_flight.get() {
            let mut state = in_flight.state.lock();
            if !state.headers.is_empty() {
                return None;
            }
            appender.torn |= std::mem::take(&mut state.torn);
        }
        Some(Turn { appender, _turn: turn })
    }
}
