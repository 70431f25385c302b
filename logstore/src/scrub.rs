//! The scrub of the logs: all batches of all partitions, in all copies, at a pace that leaves the disks to others.
//!
//! What nobody reads for months rots unseen, and the copy that is not read rots unseen for ever. The scrub reads every
//! segment once: checksums, offsets and epochs of all batches ([`crate::heal`]), and whether all copies are the same. What
//! is bad in one is made good from another; what is lost is noted and told.
//!
//! It begins when it is asked for, or when the last one that ended is long enough ago ([`Store::scrub_if_due`]). One runs at a
//! time. It goes by topic id, partition and segment; where it is, and what it found, is kept in the catalog once a minute
//! and when it is stopped, so that it goes on there after a restart. What was appended after it came by waits for the next.
//!
//! Cost: each copy is read once, its bytes bounded by [`ScrubOptions::bytes_per_second`] (counted once, whatever the
//! copies); two windows of memory, and no more of the page cache than before (`cold`); one small commit a minute. The
//! next segment is found by a search, whatever the number of topics.

use crate::catalog::Change;
use crate::catalog::records::Table;
use crate::cold::Cold;
use crate::error::{Error, Result};
use crate::heal::{HealingCounts, Outcome, Verified};
use crate::partition::Partition;
use crate::segment::{Segment, Walk};
use crate::store::Store;
use futures_util::future::select;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use uuid::Uuid;

/// Bytes of a segment that are checked at once.
const WINDOW: u64 = 1 << 20;
/// A rest over which what was read cold is not kept in memory.
const LONG: Duration = Duration::from_millis(100);
/// Time between notes of where it is.
const NOTE: Duration = Duration::from_secs(60);
/// Under which it is kept in the catalog.
const KEY: &[u8] = b"log_scrub";

/// Where a segment stands in the order of a scrub: topic id, partition, base offset.
type Place = (u128, i32, i64);

/// What the catalog keeps of scrubs.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
struct Record {
    /// The segment that comes next, if one was begun and has not ended.
    next: Option<Place>,
    /// When the last one ended, in milliseconds since the epoch; 0: none has.
    ended: i64,
    bytes: u64,
    healed: u64,
    unreadable: u64,
}

/// How a scrub of the logs stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ScrubStatus {
    /// Whether one runs.
    pub running: bool,
    /// When the last one came to its end, in milliseconds since the epoch; 0: none has.
    pub ended: i64,
    /// Bytes of batches that this one, or else the last one, has checked.
    pub bytes: u64,
    /// Batches that it made good, and those that anybody did meanwhile.
    pub healed: u64,
    /// Batches without a good copy that it found.
    pub unreadable: u64,
}

/// How scrubs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubOptions {
    /// Bytes of log that it checks in a second at most.
    pub bytes_per_second: u64,
    /// Time from the end of one to the begin of the next that begins by itself; `None`: none does.
    pub interval: Option<Duration>,
}

impl Default for ScrubOptions {
    fn default() -> Self {
        Self { bytes_per_second: 32 << 20, interval: Some(Duration::from_secs(7 * 24 * 60 * 60)) }
    }
}

/// The scrub of a store.
#[derive(Debug)]
pub(crate) struct Scrub {
    options: ScrubOptions,
    state: Mutex<State>,
    /// Bytes checked since the last note of where it is.
    progress: AtomicU64,
    stopped: Notify,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    stopping: bool,
    record: Record,
    /// What had been found in this life when it began, or went on.
    before: HealingCounts,
}

/// That a scrub runs.
struct Running(Arc<Store>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.scrub.state.lock().running = false;
    }
}

impl Scrub {
    pub(crate) fn new(options: ScrubOptions) -> Self {
        Self { options, state: Mutex::default(), progress: AtomicU64::new(0), stopped: Notify::new() }
    }

    /// Lets the one that runs end where it is; it goes on from there the next time.
    pub(crate) fn stop(&self) {
        self.state.lock().stopping = true;
        self.stopped.notify_waiters();
    }

    fn is_stopping(&self) -> bool {
        self.state.lock().stopping
    }

    /// The time that so many bytes may take.
    fn time_for(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.options.bytes_per_second.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

impl Store {
    /// Starts a scrub of all logs in the background, or goes on with one that was interrupted. Whether there was one to
    /// start: `false` while one runs.
    pub fn start_scrub(self: &Arc<Self>) -> Result<bool> {
        self.context.check()?;
        let kept = self.context.catalog.record::<Record>(Table::Meta, KEY)?.unwrap_or_default();
        {
            let mut state = self.scrub.state.lock();
            if state.running {
                return Ok(false);
            }
            let fresh = Record { ended: kept.ended, next: Some((0, 0, 0)), ..Record::default() };
            let record = if kept.next.is_some() { kept } else { fresh };
            *state = State { running: true, stopping: false, record, before: self.healing() };
        }
        let running = Running(Arc::clone(self));
        self.context.tasks.spawn(Box::pin(async move { run(running).await }));
        Ok(true)
    }

    /// Starts one if that is due by itself; to be called every few minutes by whoever runs the store. One that was
    /// interrupted is.
    pub fn scrub_if_due(self: &Arc<Self>) -> Result<()> {
        let Some(interval) = self.scrub.options.interval else { return Ok(()) };
        let kept = self.context.catalog.record::<Record>(Table::Meta, KEY)?;
        let since = kept.map_or(0, |kept| kept.ended);
        let passed = self.context.wall_clock().saturating_sub(since);
        let is_due = passed >= i64::try_from(interval.as_millis()).unwrap_or(i64::MAX);
        // A store that was never scrubbed is as old as its first look: nothing in it has had time to rot.
        if kept.is_none() {
            let record = Record { ended: self.context.wall_clock(), ..Record::default() };
            return self.note_first(record);
        }
        if is_due || kept.is_some_and(|kept| kept.next.is_some()) {
            self.start_scrub()?;
        }
        Ok(())
    }

    fn note_first(self: &Arc<Self>, record: Record) -> Result<()> {
        self.context.check()?;
        let store = Arc::clone(self);
        self.context.tasks.spawn(Box::pin(async move { store.keep(record).await }));
        Ok(())
    }

    /// Lets the scrub that runs end where it is; the next one goes on from there.
    pub fn stop_scrub(&self) {
        self.scrub.stop();
    }

    /// How it stands.
    pub fn scrub_status(&self) -> Result<ScrubStatus> {
        let counts = self.healing();
        {
            let state = self.scrub.state.lock();
            if state.running {
                let mut record = state.record;
                record.add(self.scrub.progress.load(Ordering::Relaxed), state.before, counts);
                return Ok(record.status(true));
            }
        }
        let kept = self.context.catalog.record::<Record>(Table::Meta, KEY)?.unwrap_or_default();
        Ok(kept.status(false))
    }

    /// Keeps where it is. That it cannot be kept costs that it is done again.
    async fn keep(&self, record: Record) {
        let mut change = Change::new();
        change.put(Table::Meta, KEY, &record);
        if let Err(error) = self.context.catalog.submit(change).await {
            tracing::warn!("where the scrub of the logs is was not kept: {error}");
        }
    }

    /// Adds what was found to the record, and returns it.
    fn scrub_record(&self, next: Option<Place>) -> Record {
        let counts = self.healing();
        let mut state = self.scrub.state.lock();
        let (before, bytes) = (state.before, self.scrub.progress.swap(0, Ordering::Relaxed));
        state.record.add(bytes, before, counts);
        state.record.next = next;
        state.before = counts;
        state.record
    }
}

impl Record {
    fn add(&mut self, bytes: u64, before: HealingCounts, now: HealingCounts) {
        self.bytes += bytes;
        self.healed += now.healed - before.healed;
        self.unreadable += now.unreadable - before.unreadable;
    }

    fn status(self, running: bool) -> ScrubStatus {
        let Self { ended, bytes, healed, unreadable, .. } = self;
        ScrubStatus { running, ended, bytes, healed, unreadable }
    }
}

async fn run(running: Running) {
    let store = Arc::clone(&running.0);
    tracing::info!("scrub of the logs begins");
    let outcome = walk(&store).await;
    let mut record = store.scrub_record(match &outcome {
        Ok(next) => *next,
        Err((next, _)) => Some(*next),
    });
    if record.next.is_none() {
        record.ended = store.context.wall_clock();
        store.scrub.state.lock().record = record;
    }
    store.keep(record).await;
    drop(running);
    let Record { bytes, healed, unreadable, .. } = record;
    match outcome {
        Ok(None) => tracing::info!(bytes, healed, unreadable, "scrub of the logs is done"),
        Ok(Some(_)) => {
            tracing::info!(bytes, healed, unreadable, "scrub of the logs was stopped, and goes on later");
        }
        Err((_, error)) => tracing::warn!(bytes, "scrub of the logs was interrupted: {error}"),
    }
}

/// Goes over all that is left. Returns the segment at which it was stopped.
async fn walk(store: &Arc<Store>) -> std::result::Result<Option<Place>, (Place, Error)> {
    let mut cold = Cold::default();
    let outcome = walk_on(store, &mut cold).await;
    cold.forget_all().await;
    outcome
}

async fn walk_on(store: &Arc<Store>, cold: &mut Cold) -> std::result::Result<Option<Place>, (Place, Error)> {
    let mut next = store.scrub.state.lock().record.next.unwrap_or_default();
    let mut noted = store.context.tasks.runtime().now();
    loop {
        let Some((place, partition, segment)) = store.from(next) else { return Ok(None) };
        next = place;
        if !scrub_segment(store, cold, &partition, &segment).await.map_err(|error| (place, error))? {
            return Ok(Some(place));
        }
        next.2 += 1;
        let now = store.context.tasks.runtime().now();
        if now.saturating_sub(noted) >= NOTE {
            noted = now;
            let record = store.scrub_record(Some(next));
            store.keep(record).await;
        }
    }
}

impl Store {
    /// The first segment at a place or after it.
    fn from(&self, next: Place) -> Option<(Place, Arc<Partition>, Arc<Segment>)> {
        let mut id = Some(next.0);
        while let Some(topic) = id.and_then(|id| self.topic_from(Uuid::from_u128(id))) {
            let number = topic.id().as_u128();
            let (first, least) = if number == next.0 { (next.1, next.2) } else { (0, 0) };
            for partition in topic.partitions().iter().skip(first.max(0) as usize) {
                let least = if partition.index() == first { least } else { 0 };
                if let Some(segment) = partition.segment_from(least) {
                    return Some(((number, partition.index(), segment.base), Arc::clone(partition), segment));
                }
            }
            id = number.checked_add(1);
        }
        None
    }
}

/// Checks a segment; `false` if it was stopped.
async fn scrub_segment(
    store: &Arc<Store>,
    cold: &mut Cold,
    partition: &Partition,
    segment: &Arc<Segment>,
) -> Result<bool> {
    let epochs = partition.epochs();
    let (mut position, mut expected) = (0, Some(segment.base));
    while position < segment.end().size {
        if store.scrub.is_stopping() || store.context.check().is_err() {
            return Ok(false);
        }
        // The last batch of the window may reach into the next.
        let reach = (2 * WINDOW).min(segment.end().size - position);
        cold.look(&*segment.bytes, position, reach).await?;
        let verified = segment.verify(position, position + WINDOW, i64::MIN, expected, Some(&epochs)).await?;
        let Verified::To(end, next) = verified else { return Err(segment.damaged_at(position)) };
        if !segment.bytes.agree(position, end - position).await.unwrap_or(false) {
            make_agree(segment, position, end, expected, &epochs).await?;
        }
        let bytes = end - position;
        store.scrub.progress.fetch_add(bytes, Ordering::Relaxed);
        let time = store.scrub.time_for(bytes);
        if cold.passed(&*segment.bytes, position, bytes).await? || time > LONG {
            cold.forget_passed().await;
        }
        (position, expected) = (end, next);
        rest(store, time).await;
    }
    Ok(true)
}

/// Makes all copies of the batches from one position to another the same.
async fn make_agree(
    segment: &Arc<Segment>,
    from: u64,
    to: u64,
    mut expected: Option<i64>,
    epochs: &crate::epochs::Epochs,
) -> Result<()> {
    let mut walk = Walk::new(segment, segment.end());
    let mut position = from;
    while position < to {
        let Some(placed) = walk.batch_at(position).await? else { break };
        let len = u64::from(placed.header.size);
        if placed.position != position {
            // Lost, up to here.
            expected = Some(placed.header.base_offset);
        }
        (position, expected) = if segment.bytes.agree(placed.position, len).await.unwrap_or(false) {
            (placed.end(), Some(placed.header.next_offset()))
        } else {
            match segment.settle(placed.position, expected, Some(epochs)).await? {
                Outcome::Sound(found, _) => (found.end(), Some(found.header.next_offset())),
                Outcome::Lost(lost) => (lost.end, Some(lost.next)),
                Outcome::Unknown => (placed.end(), None),
            }
        };
    }
    Ok(())
}

/// Keeps the pace, unless it is stopped meanwhile.
async fn rest(store: &Store, time: Duration) {
    let stopped = store.scrub.stopped.notified();
    futures_util::pin_mut!(stopped);
    stopped.as_mut().enable();
    if store.scrub.is_stopping() {
        return;
    }
    let _whichever_comes_first = select(store.context.tasks.runtime().sleep(time), stopped).await;
}
