//! A partition: one log, appended to by one at a time, read by many.
//!
//! - this file: what a partition is made of, its offsets, and who may see what when;
//! - `append`: the write path, `turn`: the appends that are being written; `read`: the read path; `transactions`: markers, what was aborted, who produces; `upkeep`:
//!   sealing, retention, a stop in order; `recovery`: how a partition is opened.
//!
//! **Visibility.** A record appended with `Cached` is visible at once, unless an earlier `Stable` one is still
//! uncommitted; a `Stable` one, and all after it, becomes visible only when a group commit has covered it. So what a
//! consumer saw under acks=all survives a power cut. The high watermark never goes back. The last stable offset follows
//! it, but for transactions: it stays before the oldest one that is open, or whose marker is not visible yet.
//!
//! **Locks**, in this order: `turn` (async; whose turn it is to append, see `turn`), `appender` (async; what appends share,
//! short while others are in flight), `maintenance` (async; whoever changes the
//! partition's record), then the short ones: `log`, `record`, `progress`. None of the short ones is held over an await.
//!
//! **Memory.** An idle partition is this struct, its watch channel, and a segment without an index: under 2 KiB. It has
//! no task and no timer. One that was appended to lately may have appends that wait for their place on a volume.

mod append;
pub(crate) mod compact;
mod read;
pub(crate) mod recovery;
mod transactions;
mod turn;
mod upkeep;

pub use read::Slice;

use crate::catalog::records::{PartitionKey, PartitionRecord};
use crate::checkpoints::Marks;
use crate::config::TopicConfig;
use crate::context::Context;
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::home::{PartitionId, SegmentBytes};
use crate::producers::{Ended, Producers};
use crate::segment::Segment;
use crate::transactions::Stability;
use parking_lot::{Mutex, RwLock};
use raid::device::Durability;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;
use tokio::sync::watch;

/// The offsets that bound a partition. `log_start <= last_stable <= high_watermark <= log_end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offsets {
    /// First offset held.
    pub log_start: i64,
    /// Records below it are visible to consumers.
    pub high_watermark: i64,
    /// Records below it are visible and belong to no open transaction: what `read_committed` consumers may see.
    pub last_stable: i64,
    /// Offset the next record will get.
    pub log_end: i64,
}

/// How far consumers see, for long polls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    /// Records below it are visible.
    pub high_watermark: i64,
    /// Records below it are visible to `read_committed` consumers too; a log's start may lie above it.
    pub last_stable: i64,
}

/// How far a read may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadLimit {
    /// What consumers may see.
    HighWatermark,
    /// What `read_committed` consumers may see.
    LastStable,
    /// Everything (tools).
    LogEnd,
}

/// The answer to an append.
#[derive(Debug)]
pub struct Appended {
    /// Offset of the first record; for a duplicate, the offset it got the first time.
    pub base_offset: i64,
    /// Offset of the last record.
    pub last_offset: i64,
    /// The broker's timestamp in milliseconds, under `LogAppendTime`.
    pub log_append_time: Option<i64>,
    /// First offset held.
    pub log_start: i64,
    /// With `Stable`, and when `flush.messages` asks for it: completes once the records are on stable storage.
    pub commit: Option<Commit>,
}

/// Completes once an append is on stable storage of every live leg. Dropping it does not undo the commit.
#[derive(Debug)]
pub struct Commit(pub(crate) tokio::sync::oneshot::Receiver<Result<()>>);

impl Future for Commit {
    type Output = Result<()>;
    fn poll(mut self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> Poll<Result<()>> {
        // A commit task that vanishes takes its runtime with it: nothing is promised then.
        Pin::new(&mut self.0).poll(context).map(|outcome| outcome.unwrap_or(Err(Error::Interrupted)))
    }
}

/// Segments in order, the last of which may be appended to.
#[derive(Debug)]
struct Log {
    start: i64,
    segments: Vec<Arc<Segment>>,
}

/// How far the log goes, and how far it may be seen.
#[derive(Debug)]
struct Progress {
    log_end: i64,
    high_watermark: i64,
    /// Everything below is on stable storage.
    durable: i64,
    /// End of the last append that must be durable before it is seen.
    must_commit: i64,
    stability: Stability,
    /// When the committer will have made durable what nobody waits for, if it was told.
    flush_due: Option<Duration>,
}

impl Progress {
    /// Of a log that is visible to its end.
    fn opened(log_end: i64, first_open: Option<i64>) -> Self {
        let stability = Stability::new(first_open);
        let (high_watermark, durable, must_commit) = (log_end, log_end, log_end);
        Self { log_end, high_watermark, durable, must_commit, stability, flush_due: None }
    }

    fn visible(&self) -> Visible {
        let high_watermark = self.high_watermark;
        Visible { high_watermark, last_stable: self.stability.last_stable(high_watermark) }
    }

    /// Moves the high watermark to where it may be, and the last stable offset after it.
    fn advance(&mut self) -> Visible {
        let visible = if self.durable >= self.must_commit { self.log_end } else { self.durable };
        self.high_watermark = self.high_watermark.max(visible);
        self.stability.advance(self.high_watermark);
        self.visible()
    }
}

/// What only those who append touch.
#[derive(Debug, Default)]
struct Appender {
    /// What appending needs is in memory, and the record says that the log is in use.
    ready: bool,
    producers: Producers,
    /// The segment being appended to, if there is one.
    active: Option<append::Active>,
    /// A write failed: bytes may lie behind the end.
    torn: bool,
}

/// What could not be read of a log when it was opened, and all behind it: left as it is until the next start.
#[derive(Debug)]
struct Withheld {
    offset: i64,
    segment: i64,
    position: u64,
    /// The segments behind the one that holds the place.
    behind: Vec<Arc<dyn SegmentBytes>>,
}

/// A partition.
#[derive(Debug)]
pub struct Partition {
    id: PartitionId,
    context: Arc<Context>,
    config: RwLock<Arc<TopicConfig>>,
    log: RwLock<Log>,
    record: Mutex<PartitionRecord>,
    progress: Mutex<Progress>,
    visible: watch::Sender<Visible>,
    /// Made by the first append: most of tens of thousands of partitions are idle.
    in_flight: OnceLock<Box<turn::InFlight>>,
    appender: Arc<tokio::sync::Mutex<Appender>>,
    maintenance: tokio::sync::Mutex<()>,
    /// Rolled segments that are not sealed yet, oldest first, with the producers at their end.
    sealing: Mutex<VecDeque<recovery::Unsealed>>,
    deleted: AtomicBool,
    /// Present when nothing may be changed but by the deletion of the topic.
    withheld: Option<Box<Withheld>>,
    /// Segments that compaction has begun to write, this one's last turn in the record included.
    cleanings: AtomicU64,
}

impl Partition {
    /// Its number in the topic.
    #[must_use]
    pub fn index(&self) -> i32 {
        self.id.number()
    }

    /// The name of its topic.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.id.topic
    }

    /// The offsets that bound it now.
    #[must_use]
    pub fn offsets(&self) -> Offsets {
        let log_start = self.log.read().start;
        let progress = self.progress.lock();
        let Visible { high_watermark, last_stable } = progress.visible();
        // The start of an open transaction may have been deleted.
        let last_stable = last_stable.max(log_start.min(high_watermark));
        Offsets { log_start, high_watermark, last_stable, log_end: progress.log_end }
    }

    /// First offset held.
    pub(crate) fn log_start(&self) -> i64 {
        self.log.read().start
    }

    /// The epoch stamped on new batches. It rises when the log was not closed in order.
    #[must_use]
    pub fn leader_epoch(&self) -> i32 {
        self.record.lock().epoch
    }

    /// The largest epoch up to `epoch` that wrote here, and the offset at which it ended (`OffsetForLeaderEpoch`); for
    /// one before the first that is known, that one's start; `None` for one that has not begun.
    #[must_use]
    pub fn end_of_epoch(&self, epoch: i32) -> Option<(i32, i64)> {
        let log_end = self.progress.lock().log_end;
        let record = self.record.lock();
        // The current epoch has its place even while it has written nothing.
        if epoch == record.epoch { Some((epoch, log_end)) } else { record.epochs.end_offset(epoch, log_end) }
    }

    /// The first segment with this base offset or a later one.
    pub(crate) fn segment_from(&self, base: i64) -> Option<Arc<Segment>> {
        let log = self.log.read();
        let before = log.segments.partition_point(|segment| segment.base < base);
        log.segments.get(before).map(Arc::clone)
    }

    /// Which epochs wrote where.
    pub(crate) fn epochs(&self) -> Epochs {
        self.record.lock().epochs.clone()
    }

    /// What Kafka's offset checkpoints say of it. Each offset is of what is durable by now.
    pub(crate) fn marks(&self) -> Marks {
        let (log_start, first_base) = {
            let log = self.log.read();
            (log.start, log.segments.first().map(|segment| segment.base))
        };
        let (clean, recovery_point, cleaned) = {
            let record = self.record.lock();
            (record.clean, record.recovery_point, record.cleaned)
        };
        let progress = self.progress.lock();
        let durable = clean.map_or(progress.durable, |clean| clean.end).max(recovery_point);
        Marks { log_start, first_base, durable, high_watermark: progress.high_watermark, cleaned }
    }

    /// Bytes of batches held.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.log.read().segments.iter().map(|segment| segment.end().size).sum()
    }

    /// Follows the high watermark and the last stable offset, for long polls.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Visible> {
        self.visible.subscribe()
    }

    pub(crate) fn key(&self) -> PartitionKey {
        self.id.key
    }

    fn config(&self) -> Arc<TopicConfig> {
        Arc::clone(&self.config.read())
    }

    pub(crate) fn set_config(&self, config: Arc<TopicConfig>) {
        *self.config.write() = config;
    }

    /// Refuses what is asked of a partition whose topic is gone.
    fn check_exists(&self) -> Result<()> {
        if self.deleted.load(Ordering::Acquire) {
            return Err(Error::UnknownTopic { name: self.id.topic.to_string() });
        }
        Ok(())
    }

    /// Refuses what would change a log that could not be read to its end: what is behind may be good.
    pub fn check_whole(&self) -> Result<()> {
        let Some(&Withheld { offset, segment, position, .. }) = self.withheld.as_deref() else {
            return Ok(());
        };
        let (topic, partition) = (Arc::clone(&self.id.topic), self.id.number());
        Err(Error::UnreadableLog { topic, partition, offset, segment, position })
    }

    /// Everything up to `end` is on stable storage now.
    pub(crate) fn committed(&self, end: i64) {
        let mut progress = self.progress.lock();
        progress.durable = progress.durable.max(end);
        self.publish(&mut progress);
    }

    /// An append is in the log; `first_open` is the oldest transaction open after it, `ended` the one it has ended.
    /// Returns whether somebody has to wait for it, as asked for or as `flush.messages` says; where nobody does,
    /// `flush.ms` bounds how long it may take to become durable.
    fn appended(
        self: &Arc<Self>,
        end: i64,
        asked: Durability,
        config: &TopicConfig,
        first_open: Option<i64>,
        ended: Option<Ended>,
    ) -> Durability {
        let mut progress = self.progress.lock();
        progress.log_end = end;
        let unflushed = end - progress.durable.max(progress.must_commit);
        let waits = asked == Durability::Stable || unflushed >= config.flush_messages;
        if waits {
            progress.must_commit = end;
        }
        progress.stability.set_first_open(first_open);
        if let Some(ended) = ended {
            progress.stability.ended(ended.first_offset, ended.last_offset);
        }
        self.publish(&mut progress);
        if waits {
            return Durability::Stable;
        }
        if config.flush_ms < i64::MAX {
            let within = Duration::from_millis(config.flush_ms.unsigned_abs());
            let due = self.context.tasks.runtime().now().saturating_add(within);
            if progress.flush_due.is_none_or(|known| due < known) {
                progress.flush_due = Some(due);
                drop(progress);
                self.context.committer.note(self, due);
            }
        }
        asked
    }

    /// Whether a record is held back until a commit that is under way.
    fn is_held_back(&self, offset: i64) -> bool {
        let progress = self.progress.lock();
        (progress.durable..progress.must_commit).contains(&offset)
    }

    /// A flush is about to start that covers all that was appended until now; returns where that ends.
    pub(crate) fn flush_starts(&self) -> i64 {
        let mut progress = self.progress.lock();
        progress.flush_due = None;
        progress.log_end
    }

    /// Tells the waiting; under the lock of `progress`, so that the order of watermarks is kept.
    fn publish(&self, progress: &mut Progress) {
        let now = progress.advance();
        self.visible.send_if_modified(|seen| std::mem::replace(seen, now) != now);
    }
}
