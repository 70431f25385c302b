//! The write path.
//!
//! Cost of an append to a warm partition, for however many batches it carries: one CRC-32C pass and no copy if the
//! caller's buffer is not shared, else one copy (two more passes over the bytes under `LogAppendTime`); three async locks
//! without contention; one task, which owns the write, so that a caller that goes away cannot leave two writes racing
//! for one place; one device write; where that is small and on a volume, a copy into its journal, under a short lock of all
//! partitions, and if somebody waits for its commit a second copy instead of the device write, which comes later for many
//! appends at once. Some fifteen short locks: `progress` three or four times; `record`, the index, the end, and
//! what counts as checked once; the count of tasks and the watch channel. As many shared looks, at health, configuration, the
//! end and the map of extents. Allocations: the task with its channel, the header list, the boxed futures of reserve and
//! write, the list of places, the list of what is in flight and a channel to the next one (`turn`), and what the device's
//! write takes. System calls, counted with `strace` on a volume on a disk: for each leg a `pwrite` and a look at the length
//! of its file, on a thread that may block; in a directory a `pwrite`.
//! Checks are made before the lock is taken, so that producers to one partition check in parallel. What comes while
//! another one is being written shares its way to the device, for a copy (`turn`).
//!
//! A segment is closed when it is full, or when what is appended is younger than its first batch by `segment.ms` (on compacted
//! topics, by `max.compaction.lag.ms` if that is shorter), as in Kafka. Kafka closes none to which nobody appends; here
//! that happens too, by the broker's clock (`Partition::roll_if_old`).
//!
//! Order: judge sequences → roll → stamp → reserve → write → index, producers, aborted → end → watermark. A power cut or an
//! error before the end moved leaves the log as it was; bytes that were written by then lie behind the end, and are
//! cut off before anything is written there again, so they can never be taken for the tail of something else.

use super::turn::{Flight, InFlight, Tail, Turn};
use super::{Appended, Appender, Partition, transactions};
use crate::batch::{self, BatchFault, Header, Marker, Origin};
use crate::catalog::Change;
use crate::catalog::records::Table;
use crate::compaction::INFLATED;
use crate::config::{TimestampType, TopicConfig};
use crate::error::{Error, Result};
use crate::heal::step_aside;
use crate::index::{Index, TIME_ENTRY};
use crate::producers::{Ended, Producers, Refusal, Verdict};
use crate::records::KeyCheck;
use crate::segment::{End, Segment, Walk};
use crate::transactions::Aborted;
use bytes::{Bytes, BytesMut};
use raid::device::Durability;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::{OwnedMutexGuard, oneshot};

/// What records may decompress to where they are looked into, in multiples of `max.message.bytes`: several times what text
/// in columns compresses to.
const INFLATION: usize = 32;

/// Where a batch goes that is a plain case.
struct Place {
    flight: Flight,
    segment: Arc<Segment>,
    at: Tail,
    header: Header,
    config: Arc<TopicConfig>,
    log_append_time: Option<i64>,
}

/// The segment being appended to.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) segment: Arc<Segment>,
    /// Timestamp of its first batch, from which `segment.ms` counts for those that follow; `None` while it is empty.
    pub(super) opened: Option<i64>,
    /// When that came, in milliseconds of the broker's clock, from which `segment.ms` counts while none follows; `None` while
    /// it is empty.
    pub(super) since: Option<i64>,
}

impl Active {
    /// An empty one.
    fn empty(segment: Arc<Segment>) -> Self {
        Self { segment, opened: None, since: None }
    }

    /// One of an earlier life. When its first batch came is told by its timestamp, or is now.
    pub(super) fn found(segment: Arc<Segment>, opened: Option<i64>, now: i64) -> Self {
        let since = opened.map(|at| if at >= 0 { at.min(now) } else { now });
        Self { segment, opened, since }
    }
}

/// What is to be appended, with the checks behind it that need no state.
pub(super) enum Job {
    Batches { headers: Vec<Header>, bytes: Bytes, origin: Origin },
    Marker { producer_id: i64, producer_epoch: i16, marker: Marker },
}

impl Partition {
    /// Appends one or more batches as they came from a producer; all of them or none.
    ///
    /// With [`Durability::Stable`] the answer carries a [`Commit`](super::Commit) to wait for, and without it for the
    /// append that makes `flush.messages` records since the last commit. A duplicate of an earlier append is not
    /// appended again, and answered with the offsets it got then.
    pub async fn append(self: &Arc<Self>, batches: Bytes, durability: Durability) -> Result<Appended> {
        self.append_from(Origin::Client, batches, durability).await
    }

    /// The same, for batches that do not come from a client: a coordinator's may lack sequence numbers.
    pub async fn append_from(
        self: &Arc<Self>,
        origin: Origin,
        batches: Bytes,
        durability: Durability,
    ) -> Result<Appended> {
        self.context.check()?;
        self.check_exists()?;
        let headers = self.check_batches(&batches, origin).await?;
        self.run(Job::Batches { headers, bytes: batches, origin }, durability).await
    }

    /// Does the job once it is its turn, whether or not the caller still waits then.
    pub(super) async fn run(self: &Arc<Self>, job: Job, durability: Durability) -> Result<Appended> {
        let turn = self.turn().await;
        let (done, outcome) = oneshot::channel();
        let partition = Arc::clone(self);
        self.context.tasks.spawn(Box::pin(async move {
            // Whoever asked may be gone; the append stands all the same.
            drop(done.send(partition.append_in_turn(turn, job, durability).await));
        }));
        outcome.await.unwrap_or(Err(Error::Interrupted))
    }

    fn invalid(&self, fault: BatchFault) -> Error {
        Error::InvalidBatch { topic: Arc::clone(&self.id.topic), partition: self.id.number(), fault }
    }

    fn too_large(&self, size: u64, max: u64) -> Error {
        Error::BatchTooLarge { topic: Arc::clone(&self.id.topic), partition: self.id.number(), size, max }
    }

    async fn check_batches(&self, bytes: &[u8], origin: Origin) -> Result<Vec<Header>> {
        let config = self.config();
        let now = self.context.wall_clock();
        let mut headers = Vec::with_capacity(1);
        let mut rest = bytes;
        while !rest.is_empty() {
            let header = Header::parse(rest).map_err(|fault| self.invalid(fault))?;
            let size = header.size as usize;
            // Before the checksum: a batch that is too large is not worth the pass.
            let max = config.max_message_bytes as u64;
            if size as u64 > max {
                return Err(self.too_large(size as u64, max));
            }
            let whole = rest.get(..size).ok_or_else(|| {
                self.invalid(BatchFault::Truncated { needed: size as u64, available: rest.len() as u64 })
            })?;
            let checks = batch::check(&header, whole).and_then(|()| batch::check_produced(&header, origin));
            checks.map_err(|fault| self.invalid(fault))?;
            if config.cleanup_policy.compact {
                check_keys(&header, whole, max).await.map_err(|fault| self.invalid(fault))?;
            }
            self.check_time(&header, &config, now)?;
            headers.push(header);
            rest = &rest[size..];
        }
        if headers.is_empty() {
            return Err(self.invalid(BatchFault::Empty));
        }
        Ok(headers)
    }

    fn check_time(&self, header: &Header, config: &TopicConfig, now: i64) -> Result<()> {
        if config.message_timestamp_type == TimestampType::LogAppendTime {
            return Ok(());
        }
        if header.is_log_append_time() {
            // Only a broker may say so.
            return Err(self.invalid(BatchFault::Attributes { attributes: header.attributes }));
        }
        let earliest = now.saturating_sub(config.message_timestamp_before_max_ms);
        let latest = now.saturating_add(config.message_timestamp_after_max_ms);
        let timestamp = header.max_timestamp;
        // −1 is Kafka's "no timestamp".
        if timestamp == -1 || (earliest..=latest).contains(&timestamp) {
            return Ok(());
        }
        let (topic, partition) = (Arc::clone(&self.id.topic), self.id.number());
        Err(Error::InvalidTimestamp { topic, partition, timestamp, earliest, latest })
    }

    /// The plain case beside what is in flight, all else alone.
    async fn append_in_turn(
        self: &Arc<Self>,
        turn: OwnedMutexGuard<()>,
        mut job: Job,
        durability: Durability,
    ) -> Result<Appended> {
        if let Job::Batches { headers, bytes, origin } = &mut job
            && let Some(place) = self.take_off(headers, bytes, *origin, durability).await?
        {
            drop(turn);
            return self.land(place, durability).await;
        }
        let turn = self.alone(turn).await;
        self.append_alone(turn, job, durability).await
    }

    /// Gives these batches their place, and takes their bytes, if they are a plain case: one batch without a transaction that
    /// comes next, in a segment that need not be closed first. The caller has its turn.
    async fn take_off(
        self: &Arc<Self>,
        headers: &[Header],
        bytes: &mut Bytes,
        origin: Origin,
        durability: Durability,
    ) -> Result<Option<Place>> {
        let [header] = headers else { return Ok(None) };
        if header.is_transactional() || self.context.check().and_then(|()| self.check_exists()).is_err() {
            return Ok(None);
        }
        let (config, len) = (self.config(), u64::from(header.size));
        let (segment, at, placed) = {
            let appender = self.appender.lock().await;
            let Some(active) = appender.active.as_ref().filter(|_| appender.ready && !appender.torn) else {
                return Ok(None);
            };
            let Some((mut judged, tail)) = self.in_flight().tail() else { return Ok(None) };
            let End { size, next } = active.segment.end();
            let at = tail.unwrap_or(Tail { size, next });
            let waiting = judged.len();
            judged.push(*header);
            let comes_next = matches!(appender.producers.judge(&judged, origin), Ok(Verdict::Next));
            let placed = Header { base_offset: at.next, ..*header };
            if !comes_next || size == 0 || must_roll(active, at.size, waiting, &placed, len, &config) {
                return Ok(None);
            }
            (Arc::clone(&active.segment), at, placed)
        };
        segment.bytes.reserve(at.size + len, config.segment_bytes as u64).await?;
        let mut headers = [placed];
        let (data, log_append_time) = self.stamped(std::mem::take(bytes), &mut headers, at.next, &config);
        let [header] = headers;
        match InFlight::take_off(self, &header, at, data, durability) {
            Ok(flight) => Ok(Some(Place { flight, segment, at, header, config, log_append_time })),
            Err(data) => {
                *bytes = data;
                Ok(None)
            }
        }
    }

    /// Has a batch written that has its place, and moves the end behind it once all before it has landed.
    async fn land(self: &Arc<Self>, place: Place, durability: Durability) -> Result<Appended> {
        let Place { mut flight, segment, at, header, config, log_append_time } = place;
        if self.in_flight().is_wanted() {
            // The next one takes its turn while this one is written, where that takes the thread's own time.
            step_aside().await;
        }
        flight.write(&segment).await?;
        let end = header.next_offset();
        let durability = {
            let mut appender = self.appender.lock().await;
            self.settle(&mut appender, &segment, at.size, &[header], None, &config);
            let first_open = appender.producers.first_open();
            let durability = self.appended(end, durability, &config, first_open, None);
            flight.landed();
            durability
        };
        Ok(self.answer(at.next, end - 1, log_append_time, durability))
    }

    /// The critical section of all else.
    async fn append_alone(
        self: &Arc<Self>,
        mut appender: Turn,
        job: Job,
        durability: Durability,
    ) -> Result<Appended> {
        let appender = &mut *appender;
        // Both may have changed while waiting for the lock.
        self.context.check()?;
        self.check_exists()?;
        self.check_whole()?;
        if !appender.ready {
            self.prepare(appender).await?;
        }
        let (mut headers, bytes, marker) = match job {
            Job::Batches { headers, bytes, origin } => {
                if let Some((base_offset, last_offset)) = self.judge(&appender.producers, &headers, origin)? {
                    return Ok(self.answer(base_offset, last_offset, None, durability));
                }
                (headers, bytes, None)
            }
            Job::Marker { producer_id, producer_epoch, marker } => {
                let verdict = appender.producers.judge_marker(producer_id, producer_epoch, marker);
                verdict.map_err(|refusal| {
                    self.refused(refusal, producer_id, producer_epoch, marker.coordinator_epoch)
                })?;
                let bytes = marker.batch(producer_id, producer_epoch, self.context.wall_clock()).freeze();
                let header = Header::parse(&bytes).map_err(|fault| self.invalid(fault))?;
                (vec![header], bytes, Some(marker))
            }
        };
        let config = self.config();
        let base_offset = self.progress.lock().log_end;
        if headers.iter().any(Header::is_transactional) {
            self.note_transactions(base_offset).await;
        }
        let (data, log_append_time) = self.stamped(bytes, &mut headers, base_offset, &config);
        let ended = self.write(appender, &headers, marker, data, durability, &config).await?;
        // `check_batches` leaves no empty list.
        let end = headers.last().map_or(base_offset, Header::next_offset);
        let durability = self.appended(end, durability, &config, appender.producers.first_open(), ended);
        Ok(self.answer(base_offset, end - 1, log_append_time, durability))
    }

    fn answer(
        self: &Arc<Self>,
        base_offset: i64,
        last_offset: i64,
        log_append_time: Option<i64>,
        durability: Durability,
    ) -> Appended {
        let log_start = self.log.read().start;
        // A repeated append joins too: the first one may not be durable yet.
        let end = self.progress.lock().log_end;
        let waits = durability == Durability::Stable || self.is_held_back(last_offset);
        let commit = waits.then(|| self.context.committer.join(Arc::clone(self), end));
        Appended { base_offset, last_offset, log_append_time, log_start, commit }
    }

    /// Judges sequence numbers, epochs and transactions. `Some` with the first offsets if this is a repetition.
    fn judge(&self, producers: &Producers, headers: &[Header], origin: Origin) -> Result<Option<(i64, i64)>> {
        match producers.judge(headers, origin) {
            Ok(Verdict::Next) => Ok(None),
            Ok(Verdict::Duplicate { base_offset, last_offset }) => Ok(Some((base_offset, last_offset))),
            Err((at, refusal)) => {
                let Header { producer_id, producer_epoch, base_sequence, .. } = headers[at];
                Err(self.refused(refusal, producer_id, producer_epoch, base_sequence))
            }
        }
    }

    /// `found` is the sequence number, or the coordinator's epoch, that was refused.
    fn refused(&self, refusal: Refusal, producer_id: i64, epoch: i16, found: i32) -> Error {
        let (topic, partition) = (Arc::clone(&self.id.topic), self.id.number());
        match refusal {
            Refusal::OutOfOrder { expected } => {
                Error::OutOfOrderSequence { topic, partition, producer_id, epoch, expected, found }
            }
            Refusal::Fenced { current } => {
                Error::FencedProducer { topic, partition, producer_id, found: epoch, current }
            }
            Refusal::InTransaction { first_offset } => {
                Error::InTransaction { topic, partition, producer_id, first_offset }
            }
            Refusal::FencedCoordinator { current } => {
                Error::FencedCoordinator { topic, partition, producer_id, found, current }
            }
        }
    }

    /// The batches as they are written, and the broker's time if they bear it.
    fn stamped(
        &self,
        bytes: Bytes,
        headers: &mut [Header],
        base_offset: i64,
        config: &TopicConfig,
    ) -> (Bytes, Option<i64>) {
        let mut data = bytes.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
        let log_append_time = self.stamp(headers, &mut data, base_offset, config);
        (data.freeze(), log_append_time)
    }

    /// Gives the batches their offsets and epoch, in `headers` and in `data`, and the broker's time if configured.
    fn stamp(
        &self,
        headers: &mut [Header],
        data: &mut BytesMut,
        base_offset: i64,
        config: &TopicConfig,
    ) -> Option<i64> {
        let leader_epoch = self.record.lock().epoch;
        let append_time = config.message_timestamp_type == TimestampType::LogAppendTime;
        let now = append_time.then(|| self.context.wall_clock());
        let (mut next, mut from) = (base_offset, 0);
        for header in headers {
            let to = from + header.size as usize;
            let bytes = &mut data[from..to];
            header.base_offset = next;
            header.leader_epoch = leader_epoch;
            batch::stamp(bytes, next, leader_epoch);
            if let Some(now) = now {
                header.max_timestamp = now;
                batch::stamp_append_time(bytes, now);
            }
            next = header.next_offset();
            from = to;
        }
        now
    }

    async fn write(
        self: &Arc<Self>,
        appender: &mut Appender,
        headers: &[Header],
        marker: Option<Marker>,
        data: Bytes,
        durability: Durability,
        config: &TopicConfig,
    ) -> Result<Option<Ended>> {
        let (Some(first), Some(last)) = (headers.first(), headers.last()) else { return Ok(None) };
        let limit = config.segment_bytes as u64;
        if data.len() as u64 > limit {
            return Err(self.too_large(data.len() as u64, limit));
        }
        let (segment, is_new) = self.place_for(appender, first, last, data.len() as u64, config).await?;
        let End { size, .. } = segment.end();
        segment.bytes.reserve(size + data.len() as u64, limit).await?;
        if is_new {
            // Not before it has a place: the segment that was the last must stay the last as long as no other is found.
            self.log.write().segments.push(Arc::clone(&segment));
            appender.active = Some(Active::empty(Arc::clone(&segment)));
        }
        if std::mem::take(&mut appender.torn) {
            // Set again if this fails or is cut short.
            appender.torn = true;
            segment.bytes.cut(size).await?;
            // Whole batches may lie there. Were what is written now durable and the cut not, they might follow it.
            if let Err(cause) = self.context.home.flush().await {
                self.context.health.fail(&cause);
                return Err(cause);
            }
        }
        appender.torn = true;
        segment.bytes.write(size, data, durability).await?;
        appender.torn = false;
        Ok(self.settle(appender, &segment, size, headers, marker, config))
    }

    /// Batches are written at `size`, the end of the active segment: takes note of them, and moves its end behind them.
    fn settle(
        &self,
        appender: &mut Appender,
        segment: &Arc<Segment>,
        size: u64,
        headers: &[Header],
        marker: Option<Marker>,
        config: &TopicConfig,
    ) -> Option<Ended> {
        let (first, last) = (headers.first()?, headers.last()?);
        let written: u64 = headers.iter().map(|header| u64::from(header.size)).sum();
        let interval = config.index_interval_bytes as u64;
        segment.with_open_index(|index| {
            let mut position = size;
            for header in headers {
                index.add(header, position, interval);
                position += u64::from(header.size);
            }
        });
        let now = self.context.wall_clock();
        let mut ended = None;
        for header in headers {
            ended = appender.producers.note(header, marker, now).or(ended);
        }
        if let Some(aborted) = ended.and_then(Aborted::from_ended) {
            // Before the end moves: whoever may read past it finds it listed.
            segment.aborted.push(aborted);
        }
        if let Some(active) = &mut appender.active {
            active.opened.get_or_insert(first.max_timestamp);
            active.since.get_or_insert(now);
        }
        segment.set_written(now);
        segment.set_end(End { size: size + written, next: last.next_offset() });
        segment.appended(size..size + written);
        ended
    }

    /// The segment that takes the batches: the active one, or a new one after a roll, and whether it is new.
    async fn place_for(
        self: &Arc<Self>,
        appender: &mut Appender,
        first: &Header,
        last: &Header,
        len: u64,
        config: &TopicConfig,
    ) -> Result<(Arc<Segment>, bool)> {
        if let Some(active) = &appender.active {
            if !must_roll(active, active.segment.end().size, 0, last, len, config) {
                return Ok((Arc::clone(&active.segment), false));
            }
            self.cut_torn(appender).await?;
            self.place_active(appender).await?;
            self.roll(appender);
        }
        Ok((self.empty_segment(first.base_offset), true))
    }

    /// A segment without bytes, in no list yet.
    fn empty_segment(&self, base: i64) -> Arc<Segment> {
        let bytes = self.context.home.new_segment(&self.id, base);
        let segment = Segment::new(self.id.clone(), base, bytes, End { size: 0, next: base }, false);
        segment.open_index(Index::new(base));
        segment.aborted.open(Vec::new());
        segment
    }

    /// Cuts off what a failed write may have left behind the end of the active segment.
    async fn cut_torn(&self, appender: &mut Appender) -> Result<()> {
        if let Some(active) = appender.active.as_ref().filter(|_| appender.torn) {
            active.segment.bytes.cut(active.segment.end().size).await?;
        }
        appender.torn = false;
        Ok(())
    }

    /// Ends the active segment when it has been appended to for long enough, though nobody appends: compaction takes closed
    /// ones only. The next one begins, empty, so that the log's end is still told by its last segment. Costs a look at memory
    /// when it is not due, and a commit of the catalog or two when it is: once, until somebody appends again.
    pub(crate) async fn roll_if_old(self: &Arc<Self>) -> Result<()> {
        if self.withheld.is_some() {
            return Ok(());
        }
        // Whoever appends at this moment keeps it from being looked at until the next time.
        let Some(mut appender) = self.try_turn_alone() else { return Ok(()) };
        let since = if appender.ready {
            appender.active.as_ref().and_then(|active| active.since)
        } else {
            self.record.lock().clean.and_then(|clean| clean.since)
        };
        let age = since.map_or(0, |since| self.context.wall_clock().saturating_sub(since));
        if age <= self.config().open_ms() {
            return Ok(());
        }
        self.context.check()?;
        self.check_exists()?;
        if !appender.ready {
            self.prepare(&mut appender).await?;
        }
        if appender.active.as_ref().is_none_or(|active| active.segment.end().size == 0) {
            return Ok(());
        }
        self.cut_torn(&mut appender).await?;
        self.place_active(&appender).await?;
        let next = self.empty_segment(self.progress.lock().log_end);
        next.bytes.begin().await?;
        self.roll(&mut appender);
        self.log.write().segments.push(Arc::clone(&next));
        appender.active = Some(Active::empty(next));
        Ok(())
    }

    /// Before the first append since the partition was opened: brings producers and index into memory, and makes it
    /// durable that the log is in use, so that the next open does not trust its clean marker.
    async fn prepare(self: &Arc<Self>, appender: &mut Appender) -> Result<()> {
        let _only = self.maintenance.lock().await;
        let segments = self.log.read().segments.clone();
        let (mut producers, index, aborted) = self.load_state(&segments).await?;
        producers.expire(self.oldest_producer());
        appender.producers = producers;
        if let Some(segment) = segments.last().map(Arc::clone) {
            // A sealed segment is not appended to again: its record says where it ends.
            if !segment.sealed {
                segment.aborted.open(aborted);
                let first = Walk::new(&segment, segment.end()).batch_at(0).await?;
                segment.open_index(index);
                let opened = first.map(|placed| placed.header.max_timestamp);
                let mut active = Active::found(segment, opened, self.context.wall_clock());
                let noted = self.record.lock().clean.and_then(|clean| clean.since);
                active.since = noted.filter(|_| opened.is_some()).or(active.since);
                appender.active = Some(active);
            }
        }
        let mut record = self.record.lock().clone();
        let before = record.epochs.clone();
        record.clean = None;
        record.epochs.begin(record.epoch, self.progress.lock().log_end);
        let mut change = Change::new();
        change.put(Table::Partitions, &self.id.key.bytes(), &record);
        self.context.catalog.submit(change).await?;
        if record.epochs != before {
            self.context.home.note_epochs(&self.id, &record.epochs).await?;
        }
        *self.record.lock() = record;
        appender.ready = true;
        Ok(())
    }

    /// Producers at the end of a log that was closed in order; index and aborted transactions of its last segment.
    async fn load_state(&self, segments: &[Arc<Segment>]) -> Result<(Producers, Index, Vec<Aborted>)> {
        let Some((segment, before)) = segments.split_last() else {
            let producers = transactions::kept_at_start(&self.context, self.id.key)?;
            return Ok((producers, Index::new(0), Vec::new()));
        };
        let end = segment.end();
        let stop = self.record.lock().clean;
        if let Some(producers) = transactions::snapshot_at_end(&self.context, segments, stop).await? {
            let mut index = segment.load_index().await?;
            index.resume(end.size);
            let aborted = self.load_aborted(segments).await?;
            return Ok((producers, index, aborted));
        }
        let now = self.context.wall_clock();
        let mut replay = transactions::Replay::after(&self.context, self.id.key, before, now).await?;
        let mut index = segment.replay(|header, marker| replay.see(header, marker)).await?;
        index.resume(end.size);
        if let Some(stop) = stop {
            // A marker may be lost. That its transaction had ended was noted.
            replay.producers.close_before(stop.first_open);
        }
        Ok((replay.producers, index, replay.aborted))
    }

    /// To be called before the active segment ends: what comes into the next one may be answered before this one is sealed, and a
    /// kill must not leave a hole before it.
    async fn place_active(&self, appender: &Appender) -> Result<()> {
        match &appender.active {
            Some(active) => active.segment.bytes.place_all().await,
            None => Ok(()),
        }
    }

    /// Ends the active segment; a task makes it durable and keeps its index.
    fn roll(self: &Arc<Self>, appender: &mut Appender) {
        let Some(Active { segment, .. }) = appender.active.take() else { return };
        let oldest = self.oldest_producer();
        appender.producers.expire(oldest);
        self.enqueue_seal(segment, appender.producers.snapshot());
    }

    /// Producers silent since before this time, in milliseconds, are forgotten.
    pub(super) fn oldest_producer(&self) -> i64 {
        let expiration = self.context.producer_expiration.as_millis();
        self.context.wall_clock().saturating_sub(i64::try_from(expiration).unwrap_or(i64::MAX))
    }

    /// Refuses every later append.
    pub(crate) fn mark_deleted(&self) {
        self.deleted.store(true, Ordering::Release);
    }
}

/// Whether each record has a key, without which compaction could not keep it. Costs a pass over the records as they come out
/// of their codec, [`INFLATION`] times the largest batch at most, with no memory but the codec's own, and other tasks run in
/// between.
async fn check_keys(header: &Header, batch: &[u8], max: u64) -> std::result::Result<(), BatchFault> {
    let limit = (max as usize).saturating_mul(INFLATION).min(INFLATED);
    let mut check = KeyCheck::new(header, batch, limit).map_err(|_| BatchFault::Records)?;
    loop {
        match check.step().map_err(|_| BatchFault::Records)? {
            Some(true) => return Ok(()),
            Some(false) => return Err(BatchFault::Keyless),
            None => step_aside().await,
        }
    }
}

/// Whether the active segment ends before `len` bytes up to the batch `last`, at `size`, where `waiting` batches in flight
/// are still to come into its index.
fn must_roll(
    active: &Active,
    size: u64,
    waiting: usize,
    last: &Header,
    len: u64,
    config: &TopicConfig,
) -> bool {
    let Active { segment, opened, .. } = active;
    if size == 0 {
        return false;
    }
    let limit = config.segment_bytes as u64;
    let too_old = opened.is_some_and(|opened| last.max_timestamp.saturating_sub(opened) > config.open_ms());
    let entries = (config.segment_index_bytes as u64).saturating_sub((waiting * TIME_ENTRY) as u64);
    let index_full = segment.with_open_index(|index| index.is_full(entries)).unwrap_or_default();
    let full = index_full || segment.aborted.is_full();
    size + len > limit || too_old || full || last.last_offset() - segment.base > i64::from(i32::MAX)
}
