//! The read path.
//!
//! Cost of a read of what counts as checked, and whose index is in memory: binary searches over the segments and, two or
//! three times, over the index; three to five cached reads of 4 KiB for headers, each a system call and a buffer (see
//! [`crate::segment`]); one `locate`. No bytes of records are copied: the caller sends the pieces. Short locks: `record` (its
//! epochs are copied), what counts as checked, what is lost; shared ones of the log, the index and the end. Allocations: the list
//! of segments, the buffers, the pieces, a boxed future for each read. What has not been checked lately is read once, and its
//! checksums are checked ([`crate::heal`]). On a volume, the first read of what was committed lately brings it to its place: a task
//! and a write to all copies.

use super::{Partition, ReadLimit};
use crate::error::{Error, Result};
use crate::heal::Verified;
use crate::home::SegmentBytes;
use crate::records::first_at_or_after;
use crate::segment::{Placed, Segment};
use bytes::Bytes;
use raid::device::Piece;
use std::sync::Arc;

/// Batches that a lookup by time looks into at most.
const MOST_LOOKS: usize = 64;
/// Largest batch, decompressed, that it looks into. Units: bytes.
const LARGEST_LOOK: usize = 16 << 20;

/// Whole batches of one segment, with a lease that keeps their bytes in place: while it lives, retention, deletion and
/// truncation wait before they give the space away.
#[derive(Debug)]
pub struct Slice {
    lease: Option<Arc<dyn SegmentBytes>>,
    position: u64,
    len: u64,
    pieces: Option<Vec<Piece>>,
    /// Where what is copied is checked as it is read.
    checked: Option<CheckedCopy>,
}

/// A segment, and batches of it that were read and checked, with the position of the first.
type CheckedCopy = (Arc<Segment>, tokio::sync::Mutex<(u64, Bytes)>);

impl Slice {
    fn empty() -> Self {
        Self { lease: None, position: 0, len: 0, pieces: Some(Vec::new()), checked: None }
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
        match (&self.lease, &self.checked) {
            (Some(_), Some((segment, held))) if len > 0 => {
                let held = &mut *held.lock().await;
                self.copy_checked(segment, held, self.position + at, len as usize).await
            }
            (Some(bytes), None) if len > 0 => {
                Ok(bytes.read(self.position + at, raid::device::buffer(len as usize)).await?.freeze())
            }
            _ => Ok(Bytes::new()),
        }
    }

    /// What is read here may come from another copy than the one that was checked: so it is checked itself.
    async fn copy_checked(
        &self,
        segment: &Segment,
        (start, batches): &mut (u64, Bytes),
        from: u64,
        len: usize,
    ) -> Result<Bytes> {
        let mut out = bytes::BytesMut::with_capacity(len);
        while out.len() < len {
            let at = from + out.len() as u64;
            if at < *start || batches.is_empty() {
                (*start, *batches) = (self.position, Bytes::new());
            }
            while *start + batches.len() as u64 <= at {
                *start += batches.len() as u64;
                *batches = segment.read_sound(*start, self.position + self.len).await?;
            }
            let part = &batches[(at - *start) as usize..];
            out.extend_from_slice(&part[..part.len().min(len - out.len())]);
        }
        Ok(out.freeze())
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
            let Some((first, sound_to)) = self.find_sound(&segment, from, u64::from(max_bytes)).await? else {
                continue;
            };
            if first.header.next_offset() > limit {
                return Ok(Slice::empty());
            }
            let (start, most) = (first.position, first.position + u64::from(max_bytes));
            let end = if first.end() <= most {
                segment.find_end(start, most.min(sound_to), limit, &self.context.indexes).await?
            } else if at_least_one {
                first.end()
            } else {
                start
            };
            return slice(&segment, start, end).await;
        }
        Ok(Slice::empty())
    }

    /// The first batch that holds `offset` or a later one, checked; and up to where all is sound from there on: `most`
    /// bytes, or more, or to the next lost place. `None` at the segment's end.
    async fn find_sound(
        &self,
        segment: &Arc<Segment>,
        offset: i64,
        most: u64,
    ) -> Result<Option<(Placed, u64)>> {
        /// One for what is known, one for what is not, one more if what was healed begins elsewhere, and one in reserve.
        const LOOKS: usize = 4;
        let indexes = &self.context.indexes;
        let epochs = self.epochs();
        let floor = segment.floor(offset, indexes).await?;
        let (mut from, mut sound_to) = (floor, segment.checked_to(floor));
        for _ in 0..LOOKS {
            if sound_to > from {
                if let Some(lost) = segment.lost_at(offset) {
                    return Err(segment.lost_error(&lost));
                }
                let Some(first) = segment.find(offset, indexes).await? else { return Ok(None) };
                let enough = (first.position + most).min(segment.end().size);
                if first.position >= from && first.end() <= sound_to {
                    if sound_to < enough
                        && let Verified::To(further, _) =
                            segment.verify(sound_to, enough, offset, None, Some(&epochs)).await?
                    {
                        sound_to = further;
                    }
                    let lost = segment.lost_after(first.position).map_or(u64::MAX, |lost| lost.position);
                    return Ok(Some((first, sound_to.min(lost))));
                }
                if first.position < from || first.position > sound_to {
                    from = first.position;
                }
            }
            let until = from + most;
            let mut verified = segment.verify(from, until, offset, None, Some(&epochs)).await?;
            // Lost, or the index is wrong: from further back it can be told, and from the start for sure.
            while verified == Verified::NoBatch && from > 0 {
                from = if from == floor { segment.boundary(from - 1, indexes).await? } else { 0 };
                verified = segment.verify(from, until, offset, None, Some(&epochs)).await?;
            }
            let Verified::To(end, _) = verified else { return Ok(None) };
            sound_to = end;
            if sound_to <= from {
                return Ok(None);
            }
        }
        // What is read keeps changing under the eyes.
        Err(segment.damaged(offset, from, crate::batch::BatchFault::Unreadable))
    }

    /// The segments that may hold `offset` or later ones, in order.
    fn segments_from(&self, offset: i64) -> Vec<Arc<Segment>> {
        let log = self.log.read();
        let after = log.segments.partition_point(|segment| segment.base <= offset);
        // Usually one, and the one after it when the offset lies in a gap that compaction left at its end. Compaction
        // may have left nothing at all of others.
        let ahead = log.segments[after.saturating_sub(1)..].iter();
        ahead.filter(|segment| segment.end().size > 0).take(2).map(Arc::clone).collect()
    }

    /// The first visible record with a timestamp of at least `timestamp`, as (offset, timestamp). Batches are looked into,
    /// `MOST_LOOKS` at most: where so many only say that they have such a record, it is the beginning of the last, never too
    /// late.
    pub async fn offset_for_timestamp(&self, timestamp: i64) -> Result<Option<(i64, i64)>> {
        self.check_exists()?;
        let offsets = self.offsets();
        let segments = self.log.read().segments.clone();
        let mut looks = 0;
        for segment in segments {
            let largest = segment.largest_timestamp(&self.context.indexes).await?;
            if largest.is_none_or(|(largest, _)| largest < timestamp) {
                continue;
            }
            let (mut from, mut position) = (offsets.log_start, None);
            while let Some(placed) =
                segment.find_time(timestamp, from, position, &self.context.indexes).await?
            {
                let header = placed.header;
                if header.next_offset() > offsets.high_watermark {
                    return Ok(None);
                }
                match segment.read_batch(&placed).await {
                    Ok(bytes) => {
                        let found =
                            first_at_or_after(&header, &bytes, timestamp, offsets.log_start, LARGEST_LOOK);
                        if found.is_some() {
                            return Ok(found);
                        }
                        looks += 1;
                        if looks == MOST_LOOKS {
                            return Ok(Some((
                                header.base_offset.max(offsets.log_start),
                                header.max_timestamp,
                            )));
                        }
                        (from, position) = (header.next_offset(), Some(placed.end()));
                    }
                    // Those that are lost have no timestamps.
                    Err(Error::LostBatch { next, .. }) if next > from => {
                        (from, position) = (next, Some(placed.position));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(None)
    }

    /// The visible record with the largest timestamp, as (offset, timestamp).
    pub async fn offset_of_max_timestamp(&self) -> Result<Option<(i64, i64)>> {
        self.check_exists()?;
        let segments = self.log.read().segments.clone();
        let mut claims = Vec::new();
        for segment in segments {
            let claim = segment.largest_timestamp(&self.context.indexes).await?;
            claims.extend(
                claim.filter(|(timestamp, _)| *timestamp >= 0).map(|(timestamp, _)| (timestamp, segment)),
            );
        }
        // The largest first; of equal ones the first.
        claims.sort_by_key(|(timestamp, _)| std::cmp::Reverse(*timestamp));
        let Some(&(timestamp, _)) = claims.first() else { return Ok(None) };
        let found = self.offset_for_timestamp(timestamp).await?;
        if found.is_some() {
            return Ok(found);
        }
        // Claimed for a batch without records: the headers are asked.
        let mut largest: Option<i64> = None;
        for (claim, segment) in claims {
            if largest.is_some_and(|largest| largest >= claim) {
                break;
            }
            largest = largest.max(segment.largest_of_records().await?);
        }
        match largest.filter(|&timestamp| timestamp >= 0) {
            Some(timestamp) => self.offset_for_timestamp(timestamp).await,
            None => Ok(None),
        }
    }
}

async fn slice(segment: &Arc<Segment>, start: u64, end: u64) -> Result<Slice> {
    if end <= start {
        return Ok(Slice::empty());
    }
    let len = end - start;
    let pieces = segment.bytes.locate(start, len).await?;
    // What was checked is the copy that is usually read. Of another one the bytes are copied, and checked as they are.
    let pieces = pieces.filter(|pieces| pieces.iter().all(|piece| piece.usual));
    let checked = (segment.bytes.copies() > 1)
        .then(|| (Arc::clone(segment), tokio::sync::Mutex::new((start, Bytes::new()))));
    Ok(Slice { lease: Some(Arc::clone(&segment.bytes)), position: start, len, pieces, checked })
}
