//! The read path.
//!
//! Cost of a read that finds its index in memory: two short locks, a binary search over the segments and one over the
//! index, one to three cached reads of 4 KiB for headers (see [`crate::segment`]), one `locate`. No record byte is
//! read here: the caller sends the pieces.

use super::{Partition, ReadLimit};
use crate::batch;
use crate::error::{Error, Result};
use crate::home::SegmentBytes;
use crate::segment::Segment;
use bytes::Bytes;
use raid::device::Piece;
use std::sync::Arc;

/// Whole batches of one segment, with a lease that keeps their bytes in place: while it lives, retention, deletion and
/// truncation wait before they give the space away.
#[derive(Debug)]
pub struct Slice {
    lease: Option<Arc<dyn SegmentBytes>>,
    position: u64,
    len: u64,
    pieces: Option<Vec<Piece>>,
}

impl Slice {
    fn empty() -> Self {
        Self { lease: None, position: 0, len: 0, pieces: Some(Vec::new()) }
    }

    /// Whether it is of this segment.
    pub(super) fn is_of(&self, bytes: &Arc<dyn SegmentBytes>) -> bool {
        self.lease.as_ref().is_some_and(|lease| Arc::ptr_eq(lease, bytes))
    }

    /// Position in the segment after its last byte.
    pub(super) fn end_position(&self) -> u64 {
        self.position + self.len
    }

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

    /// Where the bytes lie in open files, in order, for `sendfile`; `None` where no kernel can send them, and then
    /// [`Slice::copy`] is the way.
    #[must_use]
    pub fn pieces(&self) -> Option<&[Piece]> {
        self.pieces.as_deref()
    }

    /// The bytes, read into memory.
    pub async fn copy(&self) -> Result<Bytes> {
        self.copy_range(0, self.len).await
    }

    /// `len` bytes from `at`, relative to the slice's start, read into memory: for what `sendfile` could not send. A
    /// range past the end is shortened to it.
    pub async fn copy_range(&self, at: u64, len: u64) -> Result<Bytes> {
        let len = len.min(self.len.saturating_sub(at));
        match &self.lease {
            Some(bytes) if len > 0 => {
                Ok(bytes.read(self.position + at, raid::device::buffer(len as usize)).await?.freeze())
            }
            _ => Ok(Bytes::new()),
        }
    }
}

impl Partition {
    /// Whole batches from `from` on, the first of which contains it; at most `max_bytes`, but with `at_least_one` the
    /// first batch is whole even if it is larger. Empty at the limit. The batches are of one segment: a longer read is
    /// several.
    pub async fn read(
        &self,
        from: i64,
        max_bytes: u32,
        limit: ReadLimit,
        at_least_one: bool,
    ) -> Result<Slice> {
        self.check_exists()?;
        let offsets = self.offsets();
        let limit = match limit {
            ReadLimit::HighWatermark => offsets.high_watermark,
            ReadLimit::LastStable => offsets.last_stable,
            ReadLimit::LogEnd => offsets.log_end,
        };
        if from < offsets.log_start || from > offsets.log_end {
            return Err(Error::OffsetOutOfRange {
                topic: Arc::clone(&self.id.topic),
                partition: self.index(),
                offset: from,
                log_start: offsets.log_start,
                log_end: offsets.log_end,
            });
        }
        if from >= limit {
            return Ok(Slice::empty());
        }
        for segment in self.segments_from(from) {
            let Some(first) = segment.find(from, &self.context.indexes).await? else { continue };
            if first.header.next_offset() > limit {
                return Ok(Slice::empty());
            }
            let (start, most) = (first.position, first.position + u64::from(max_bytes));
            let end = if first.end() <= most {
                segment.find_end(start, most, limit, &self.context.indexes).await?
            } else if at_least_one {
                first.end()
            } else {
                start
            };
            return slice(&segment, start, end).await;
        }
        Ok(Slice::empty())
    }

    /// The segments that may hold `offset` or later ones, in order.
    fn segments_from(&self, offset: i64) -> Vec<Arc<Segment>> {
        let log = self.log.read();
        let after = log.segments.partition_point(|segment| segment.base <= offset);
        // Usually one, and the one after it when the offset lies in a gap that compaction left at its end.
        log.segments[after.saturating_sub(1)..].iter().take(2).map(Arc::clone).collect()
    }

    /// The first visible record with a timestamp of at least `timestamp`, as (offset, timestamp). In a compressed batch
    /// that only ends late enough, the batch's first record: never too late.
    pub async fn offset_for_timestamp(&self, timestamp: i64) -> Result<Option<(i64, i64)>> {
        self.check_exists()?;
        let offsets = self.offsets();
        let segments = self.log.read().segments.clone();
        for segment in segments {
            let largest = segment.largest_timestamp(&self.context.indexes).await?;
            if largest.is_none_or(|(largest, _)| largest < timestamp) {
                continue;
            }
            let found = segment.find_time(timestamp, offsets.log_start, &self.context.indexes).await?;
            let Some(placed) = found else { continue };
            if placed.header.next_offset() > offsets.high_watermark {
                return Ok(None);
            }
            let bytes = segment.read_batch(&placed).await?;
            let record = batch::first_at_or_after(&placed.header, &bytes, timestamp);
            return Ok(record.map(|(offset, at)| (offset.max(offsets.log_start), at)));
        }
        Ok(None)
    }

    /// The visible record with the largest timestamp, as (offset, timestamp); of a compressed batch, its first record.
    pub async fn offset_of_max_timestamp(&self) -> Result<Option<(i64, i64)>> {
        self.check_exists()?;
        let segments = self.log.read().segments.clone();
        let mut largest: Option<i64> = None;
        for segment in segments {
            let found = segment.largest_timestamp(&self.context.indexes).await?;
            largest = largest.max(found.map(|(timestamp, _)| timestamp));
        }
        match largest.filter(|&timestamp| timestamp >= 0) {
            Some(timestamp) => self.offset_for_timestamp(timestamp).await,
            None => Ok(None),
        }
    }
}

async fn slice(segment: &Segment, start: u64, end: u64) -> Result<Slice> {
    if end <= start {
        return Ok(Slice::empty());
    }
    let len = end - start;
    let pieces = segment.bytes.locate(start, len).await?;
    Ok(Slice { lease: Some(Arc::clone(&segment.bytes)), position: start, len, pieces })
}
