//! A partition's public face: append, read, offsets.

use crate::error::{Error, Result};
use bytes::Bytes;
use raid::device::{Durability, Piece};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::watch;

/// The offsets that bound a partition. `log_start <= last_stable <= high_watermark <= log_end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offsets {
    /// First offset held.
    pub log_start: i64,
    /// Records below it are visible to consumers.
    pub high_watermark: i64,
    /// Records below it belong to no open transaction.
    pub last_stable: i64,
    /// Offset the next record will get.
    pub log_end: i64,
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
    /// With `Stable`: completes once the records are on stable storage.
    pub commit: Option<Commit>,
}

/// Completes once an append is on stable storage of every live leg. Dropping it does not undo the commit.
#[derive(Debug)]
pub struct Commit(pub(crate) tokio::sync::oneshot::Receiver<Result<()>>);

impl Future for Commit {
    type Output = Result<()>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        // A commit task that vanishes takes its runtime with it: nothing is promised then.
        Pin::new(&mut self.0).poll(context).map(|outcome| outcome.unwrap_or(Err(Error::Interrupted)))
    }
}

/// Whole batches of one segment, with a lease that keeps their bytes in place.
#[derive(Debug)]
pub struct Slice {
    pieces: Option<Vec<Piece>>,
    len: u64,
}

impl Slice {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Where the bytes lie in open files, for `sendfile`; `None` where no kernel can send them, and then
    /// [`Slice::copy`] is the way.
    #[must_use]
    pub fn pieces(&self) -> Option<&[Piece]> {
        self.pieces.as_deref()
    }
    /// The bytes, read into memory.
    pub async fn copy(&self) -> Result<Bytes> {
        self.copy_range(0, self.len).await
    }
    /// A range of the bytes, relative to the slice's start, read into memory.
    pub async fn copy_range(&self, _at: u64, _len: u64) -> Result<Bytes> {
        Err(Error::Closed)
    }
}

/// One log, with one appender at a time.
#[derive(Debug)]
pub struct Partition {
    index: i32,
    watermark: watch::Sender<i64>,
}

impl Partition {
    pub(crate) fn new(index: i32) -> Self {
        Self { index, watermark: watch::Sender::new(0) }
    }
    /// Its number in the topic.
    #[must_use]
    pub fn index(&self) -> i32 {
        self.index
    }
    /// The offsets that bound it now.
    #[must_use]
    pub fn offsets(&self) -> Offsets {
        Offsets { log_start: 0, high_watermark: 0, last_stable: 0, log_end: 0 }
    }
    /// The epoch stamped on new batches.
    #[must_use]
    pub fn leader_epoch(&self) -> i32 {
        0
    }
    /// Appends one or more batches as they came from a producer.
    pub async fn append(&self, _batches: Bytes, _durability: Durability) -> Result<Appended> {
        Err(Error::Closed)
    }
    /// Whole batches from `from` on, the first of which contains it; at most `max_bytes`, but with `at_least_one`
    /// the first batch is always whole.
    pub async fn read(
        &self,
        _from: i64,
        _max_bytes: u32,
        _limit: ReadLimit,
        _at_least_one: bool,
    ) -> Result<Slice> {
        Err(Error::Closed)
    }
    /// Follows the high watermark, for long polls.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<i64> {
        self.watermark.subscribe()
    }
    /// The first visible record with a timestamp of at least `timestamp`, as (offset, timestamp).
    pub async fn offset_for_timestamp(&self, _timestamp: i64) -> Result<Option<(i64, i64)>> {
        Err(Error::Closed)
    }
    /// The visible record with the largest timestamp, as (offset, timestamp).
    pub async fn offset_of_max_timestamp(&self) -> Result<Option<(i64, i64)>> {
        Err(Error::Closed)
    }
}
