//! One segment of a log: its bytes, where they end, and its index.
//!
//! Finding an offset costs a binary search in memory and then a walk over batch headers from the index entry before
//! it: about `index.interval.bytes` of log, read in chunks of [`CHUNK`], so one to three cached reads. The index of a
//! closed segment is loaded when first asked for, checked, and kept in a bounded cache; so is the list of its aborted
//! transactions, if there are any. A closed segment's largest timestamp is kept when its index goes: a lookup by time
//! asks every segment before the one it ends in, and must not load an index for each, each time.
//!
//! Records may have no timestamps (−1). A segment in which none has any is as old as its last append, as Kafka goes by a
//! file's modification time: in a directory it is that; on a volume it is kept with the segment's place in the catalog
//! when the segment is sealed or the log closed in order, and for such segments only: it costs no write of its own. What a
//! kill leaves unsealed counts as appended when it is recovered, which is too late and never too early.
//!
//! Invariants: `end.size` is the end of a whole batch, `end.next` the offset after it; both move together, and only
//! the appender moves them. Bytes below `end.size` never change.

use crate::aborted::AbortedList;
use crate::batch::{self, BatchFault, HEADER, Header, Marker};
use crate::catalog::records::Kind;
use crate::error::{Error, Result};
use crate::heal::{Checked, Lost, Outcome};
use crate::home::{PartitionId, SegmentBytes};
use crate::index::Index;
use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, RwLock};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Weak};

/// Bytes read at once while walking over headers.
const CHUNK: u64 = 4096;

/// Where a segment ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// Bytes of whole batches.
    pub(crate) size: u64,
    /// Offset after the last record.
    pub(crate) next: i64,
}

#[derive(Debug)]
enum Slot {
    /// Not in memory.
    Absent,
    /// Being written.
    Open(Box<Index>),
    /// Of a closed segment, or of one that is not appended to.
    Loaded(Arc<Index>),
}

/// Who is shown each header of a segment, and what it says if it ends a transaction.
type See<'a> = &'a mut (dyn FnMut(&Header, Option<Marker>) + Send);

/// A segment.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) id: PartitionId,
    pub(crate) base: i64,
    pub(crate) bytes: Arc<dyn SegmentBytes>,
    /// It was closed in an earlier life.
    pub(crate) sealed: bool,
    /// The aborted transactions whose markers lie in it.
    pub(crate) aborted: AbortedList,
    end: RwLock<End>,
    index: RwLock<Slot>,
    /// What the index said last about the largest timestamp; forgotten, under the lock of `index`, when the index is
    /// written on or made anew.
    largest: Mutex<Option<(i64, i64)>>,
    /// When it was last appended to, in milliseconds of the broker's clock, as far as that is known.
    written: AtomicI64,
    /// What was checked lately (see [`crate::heal`]).
    pub(crate) checked: Mutex<Option<Box<Checked>>>,
    /// Places without a good batch, as far as they were found, by position.
    pub(crate) lost: Mutex<Vec<Lost>>,
}

/// A batch and where it starts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed {
    pub(crate) header: Header,
    pub(crate) position: u64,
}

impl Placed {
    /// Position after it.
    pub(crate) fn end(&self) -> u64 {
        self.position + u64::from(self.header.size)
    }
}

impl Segment {
    pub(crate) fn new(
        id: PartitionId,
        base: i64,
        bytes: Arc<dyn SegmentBytes>,
        end: End,
        sealed: bool,
    ) -> Arc<Self> {
        let (aborted, end, index) = (AbortedList::default(), RwLock::new(end), RwLock::new(Slot::Absent));
        let (largest, checked, lost) = (Mutex::default(), Mutex::default(), Mutex::default());
        let written = AtomicI64::new(i64::MAX);
        Arc::new(Self { id, base, bytes, sealed, aborted, end, index, largest, written, checked, lost })
    }

    /// When it was last appended to, as far as that is known; never, if it is not.
    pub(crate) fn written(&self) -> i64 {
        self.written.load(Ordering::Relaxed)
    }

    /// It was appended to at this time.
    pub(crate) fn set_written(&self, at: i64) {
        self.written.store(at, Ordering::Relaxed);
    }

    /// Where it ends now.
    pub(crate) fn end(&self) -> End {
        *self.end.read()
    }

    /// Moves the end, after the bytes and the index are in place.
    pub(crate) fn set_end(&self, end: End) {
        *self.end.write() = end;
    }

    /// Puts an index in place that will be written on.
    pub(crate) fn open_index(&self, index: Index) {
        let mut slot = self.index.write();
        *slot = Slot::Open(Box::new(index));
        *self.largest.lock() = None;
    }

    /// Changes the index being written; `None` when there is none.
    pub(crate) fn with_open_index<R>(&self, change: impl FnOnce(&mut Index) -> R) -> Option<R> {
        match &mut *self.index.write() {
            Slot::Open(index) => Some(change(index)),
            _ => None,
        }
    }

    /// Ends the writing of the index and returns it; `None` when it is not in memory.
    pub(crate) fn close_index(self: &Arc<Self>, cache: &IndexCache) -> Option<Arc<Index>> {
        let mut slot = self.index.write();
        let (index, closed) = match std::mem::replace(&mut *slot, Slot::Absent) {
            Slot::Open(mut index) => {
                index.finish();
                (Arc::new(*index), true)
            }
            Slot::Loaded(index) => (index, false),
            Slot::Absent => return None,
        };
        *slot = Slot::Loaded(Arc::clone(&index));
        drop(slot);
        if closed {
            cache.note(self, index.memory());
        }
        Some(index)
    }

    /// Lets what was loaded go.
    fn unload(&self) {
        self.aborted.unload();
        let mut slot = self.index.write();
        if matches!(*slot, Slot::Loaded(_)) {
            *slot = Slot::Absent;
        }
    }

    /// An error that names the place.
    pub(crate) fn damaged(&self, offset: i64, position: u64, fault: BatchFault) -> Error {
        Error::DamagedLog {
            topic: Arc::clone(&self.id.topic),
            partition: self.id.number(),
            offset,
            segment: self.base,
            position,
            fault,
        }
    }

    /// An error that names a place where no batch is to be told.
    pub(crate) fn damaged_at(&self, position: u64) -> Error {
        self.damaged(self.base, position, BatchFault::Unreadable)
    }

    /// Asks the index, which is loaded first if it must be.
    async fn ask<R>(self: &Arc<Self>, cache: &IndexCache, question: impl Fn(&Index) -> R) -> Result<R> {
        {
            let slot = self.index.read();
            match &*slot {
                Slot::Open(index) => return Ok(question(index)),
                Slot::Loaded(index) => return Ok(question(index)),
                Slot::Absent => {}
            }
        }
        let index = self.load_index().await?;
        let answer = question(&index);
        self.keep(index, cache);
        Ok(answer)
    }

    fn keep(self: &Arc<Self>, index: Index, cache: &IndexCache) {
        let memory = index.memory();
        let mut slot = self.index.write();
        // Never in the place of one that is being written.
        if matches!(*slot, Slot::Absent) {
            *slot = Slot::Loaded(Arc::new(index));
            drop(slot);
            cache.note(self, memory);
        }
    }

    /// The stored index if it is there and sound, else one made from the log.
    pub(crate) async fn load_index(&self) -> Result<Index> {
        let end = self.end();
        let offsets = self.bytes.sidecar(Kind::OffsetIndex, end.next).await?;
        let times = self.bytes.sidecar(Kind::TimeIndex, end.next).await?;
        if let (Some(offsets), Some(times)) = (offsets, times) {
            match Index::decode(self.base, &offsets, &times, end.size, end.next) {
                Ok(index) => return Ok(index),
                Err(fault) => tracing::warn!(
                    "{}-{}: the index of segment {} is rebuilt: {fault}",
                    self.id.topic,
                    self.id.key.partition,
                    self.base
                ),
            }
        }
        self.rebuild_index().await
    }

    /// Makes the index from the batch headers.
    pub(crate) async fn rebuild_index(&self) -> Result<Index> {
        self.walk_all(None).await
    }

    /// The same, and shows each header to `see`, with what it says if it ends a transaction. A marker of which no copy is good
    /// says nothing: one lost batch takes neither the index nor the others with it.
    pub(crate) async fn replay(&self, mut see: impl FnMut(&Header, Option<Marker>) + Send) -> Result<Index> {
        self.walk_all(Some(&mut see)).await
    }

    async fn walk_all(&self, mut see: Option<See<'_>>) -> Result<Index> {
        /// Kafka's default; the density of a rebuilt index is free.
        const INTERVAL: u64 = 4096;
        let mut index = Index::new(self.base);
        let mut walk = Walk::new(self, self.end());
        let mut position = 0;
        while let Some(placed) = walk.batch_at(position).await? {
            index.add(&placed.header, position, INTERVAL);
            if let Some(see) = &mut see {
                see(&placed.header, self.marker_at(&placed).await?);
            }
            position = placed.end();
        }
        index.finish();
        Ok(index)
    }

    /// What a batch says if it ends a transaction.
    async fn marker_at(&self, placed: &Placed) -> Result<Option<Marker>> {
        if !placed.header.is_control() {
            return Ok(None);
        }
        match self.read_batch(placed).await {
            Ok(bytes) => Ok(Marker::read(&placed.header, &bytes)),
            Err(Error::LostBatch { .. } | Error::DamagedLog { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The first batch that holds `offset` or a later one; `None` at the end.
    pub(crate) async fn find(self: &Arc<Self>, offset: i64, cache: &IndexCache) -> Result<Option<Placed>> {
        let from = self.ask(cache, |index| index.floor(offset)).await?;
        let fits = |header: &Header| header.base_offset <= offset;
        self.walk_from(
            from,
            cache,
            |index| index.floor(offset),
            fits,
            |header| header.last_offset() >= offset,
        )
        .await
    }

    /// The first batch with records that says it has a timestamp of at least `timestamp`, and ends at or after `offset`;
    /// from a batch's position on, or from where the index says.
    pub(crate) async fn find_time(
        self: &Arc<Self>,
        timestamp: i64,
        offset: i64,
        from: Option<u64>,
        cache: &IndexCache,
    ) -> Result<Option<Placed>> {
        let wanted = |header: &Header| {
            header.max_timestamp >= timestamp && header.count > 0 && header.last_offset() >= offset
        };
        if let Some(mut position) = from {
            let mut walk = Walk::new(self, self.end());
            while let Some(placed) = walk.batch_at(position).await? {
                if wanted(&placed.header) {
                    return Ok(Some(placed));
                }
                position = placed.end();
            }
            return Ok(None);
        }
        let from = self.ask(cache, |index| index.floor_time(timestamp)).await?;
        self.walk_from(from, cache, |index| index.floor_time(timestamp), |_| true, wanted).await
    }

    /// The largest timestamp that batches with records speak of: a batch that compaction has emptied keeps the one it had,
    /// and the index may have it. Costs a walk over all headers.
    pub(crate) async fn largest_of_records(&self) -> Result<Option<i64>> {
        let (mut walk, mut position, mut largest) = (Walk::new(self, self.end()), 0, None);
        while let Some(placed) = walk.batch_at(position).await? {
            if placed.header.count > 0 {
                largest = largest.max(Some(placed.header.max_timestamp));
            }
            position = placed.end();
        }
        Ok(largest)
    }

    /// Walks from a position that the index gave to the first batch that is `wanted`. If no batch that `fits` starts
    /// there, the index is another segment's or damaged: it is made anew, once.
    async fn walk_from(
        self: &Arc<Self>,
        from: u64,
        cache: &IndexCache,
        floor: impl Fn(&Index) -> u64,
        fits: impl Fn(&Header) -> bool,
        wanted: impl Fn(&Header) -> bool,
    ) -> Result<Option<Placed>> {
        let first = Walk::new(self, self.end()).batch_at(from).await;
        let sound = from == 0 || matches!(&first, Ok(Some(placed)) if fits(&placed.header));
        let mut position = from;
        if !sound {
            let rebuilt = self.rebuild_index().await?;
            position = floor(&rebuilt);
            self.unload();
            *self.largest.lock() = None;
            self.keep(rebuilt, cache);
        }
        let mut walk = Walk::new(self, self.end());
        while let Some(placed) = walk.batch_at(position).await? {
            if wanted(&placed.header) {
                return Ok(Some(placed));
            }
            position = placed.end();
        }
        Ok(None)
    }

    /// The end of the last whole batch that ends at or before `most` and lies below `limit`, walking from `start`,
    /// the position of a batch. At least `start`.
    pub(crate) async fn find_end(
        self: &Arc<Self>,
        start: u64,
        most: u64,
        limit: i64,
        cache: &IndexCache,
    ) -> Result<u64> {
        let end = self.end();
        if most >= end.size && limit >= end.next {
            return Ok(end.size);
        }
        let near = |index: &Index| index.boundary(most).min(index.floor(limit.saturating_sub(1)));
        let mut position = self.ask(cache, near).await?.max(start);
        let mut walk = Walk::new(self, end);
        if !matches!(walk.batch_at(position).await, Ok(Some(_))) {
            // Not a batch: the index is wrong, and this way is longer but sure.
            position = start;
        }
        while let Some(placed) = walk.batch_at(position).await? {
            if placed.end() > most || placed.header.next_offset() > limit {
                break;
            }
            position = placed.end();
        }
        Ok(position)
    }

    /// An offset above those of all batches before `position`, at most an index entry further.
    pub(crate) async fn offset_bound(self: &Arc<Self>, position: u64, cache: &IndexCache) -> Result<i64> {
        let end = self.end();
        if let Some((at, last)) = self.ask(cache, |index| index.ceiling(position)).await?
            && let Ok(Some(placed)) = Walk::new(self, end).batch_at(at).await
            && placed.header.last_offset() == last
        {
            return Ok(last);
        }
        Ok(end.next)
    }

    /// The largest timestamp, with the last offset of the batch that has it.
    pub(crate) async fn largest_timestamp(
        self: &Arc<Self>,
        cache: &IndexCache,
    ) -> Result<Option<(i64, i64)>> {
        // Asked of every segment of a log: an index that had to make room for others is not loaded again for it.
        let known = *self.largest.lock();
        if known.is_some() {
            return Ok(known);
        }
        let largest = self.ask(cache, Index::largest_timestamp).await?;
        if let Slot::Loaded(index) = &*self.index.read() {
            self.set_largest(index.largest_timestamp());
        }
        Ok(largest)
    }

    /// Takes note of what its index, which is not in memory, says about the largest timestamp.
    pub(crate) fn set_largest(&self, largest: Option<(i64, i64)>) {
        // That there is none is known as well.
        *self.largest.lock() = largest.or(Some((-1, -1)));
    }

    /// Whether some record has a timestamp, as far as its index is in memory.
    pub(crate) fn is_timed(&self) -> bool {
        let largest = match &*self.index.read() {
            Slot::Open(index) => index.largest_timestamp(),
            Slot::Loaded(index) => index.largest_timestamp(),
            Slot::Absent => *self.largest.lock(),
        };
        largest.is_some_and(|(at, _)| at >= 0)
    }

    /// The time of its newest record: the largest timestamp, or that of the last append if no record has any.
    pub(crate) async fn newest(self: &Arc<Self>, cache: &IndexCache) -> Result<i64> {
        let largest = self.largest_timestamp(cache).await?;
        Ok(largest.map(|(at, _)| at).filter(|&at| at >= 0).unwrap_or_else(|| self.written()))
    }

    /// The bytes of a batch, checked, and healed if they must be.
    pub(crate) async fn read_batch(&self, placed: &Placed) -> Result<Bytes> {
        if self.ground(None).is_worth_memory(&placed.header, placed.position).await? {
            let buf = raid::device::buffer(placed.header.size as usize);
            if let Ok(bytes) = self.bytes.read(placed.position, buf).await
                && batch::check(&placed.header, &bytes).is_ok()
            {
                return Ok(bytes.freeze());
            }
        }
        match self.settle(placed.position, Some(placed.header.base_offset), None).await? {
            Outcome::Sound(_, bytes) => Ok(bytes),
            Outcome::Lost(lost) => Err(self.lost_error(&lost)),
            Outcome::Unknown => {
                Err(self.damaged(placed.header.base_offset, placed.position, BatchFault::Empty))
            }
        }
    }

    /// Position from which a look for `offset` starts.
    pub(crate) async fn floor(self: &Arc<Self>, offset: i64, cache: &IndexCache) -> Result<u64> {
        self.ask(cache, |index| index.floor(offset)).await
    }

    /// The last position at or before `position` at which the index knows a batch to start.
    pub(crate) async fn boundary(self: &Arc<Self>, position: u64, cache: &IndexCache) -> Result<u64> {
        self.ask(cache, |index| index.boundary(position)).await
    }
}

/// A walk over batch headers, reading a chunk at a time.
pub(crate) struct Walk<'a> {
    segment: &'a Segment,
    end: End,
    chunk: BytesMut,
    chunk_at: u64,
    /// The batch before, and whether its records were looked at.
    before: Option<(Placed, bool)>,
    /// What is lost is an error, not stepped over.
    strict: bool,
}

impl<'a> Walk<'a> {
    /// A walk that does not go past `end`.
    pub(crate) fn new(segment: &'a Segment, end: End) -> Self {
        Self { segment, end, chunk: BytesMut::new(), chunk_at: 0, before: None, strict: false }
    }

    /// A walk over all of a segment that stops with an error where a batch is lost, looking anew at what was lost before: for
    /// whoever would leave behind what is not found.
    pub(crate) fn of_all(segment: &'a Segment) -> Self {
        Self { strict: true, ..Self::new(segment, segment.end()) }
    }

    /// The batch at `position`; `None` at the end. Its header is checked as far as it can be without its records. One that
    /// cannot be right is looked for in the other copies; where there is none, or another one further on, that is what is
    /// found, and its place tells.
    pub(crate) async fn batch_at(&mut self, position: u64) -> Result<Option<Placed>> {
        let mut position = position;
        let mut expected = (position == 0).then_some(self.segment.base);
        if let Some((before, _)) = self.before.filter(|(before, _)| before.end() == position) {
            expected = Some(before.header.next_offset());
        }
        loop {
            if !self.strict
                && let Some(lost) = self.segment.lost_from(position)
            {
                (position, expected) = (lost.end, Some(lost.next));
                continue;
            }
            let fault = match self.header_at(position).await {
                Ok(None) => return Ok(None),
                Ok(Some(placed)) if expected.is_none_or(|least| placed.header.base_offset >= least) => {
                    self.before = Some((placed, false));
                    return Ok(Some(placed));
                }
                Ok(Some(Placed { header, .. })) => {
                    let (found, expected) = (header.base_offset, expected.unwrap_or(self.segment.base));
                    self.segment.damaged(found, position, BatchFault::BaseOffset { found, expected })
                }
                Err(fault @ (Error::DamagedLog { .. } | Error::Device(_) | Error::File { .. })) => fault,
                Err(error) => return Err(error),
            };
            if let Some((before, false)) = self.before.filter(|(before, _)| before.end() == position) {
                // Perhaps it is the one before that told a wrong length.
                self.before = Some((before, true));
                let least = Some(before.header.base_offset);
                if let Outcome::Sound(placed, _) = self.segment.settle(before.position, least, None).await?
                    && placed.end() != position
                {
                    self.before = Some((placed, true));
                    (position, expected) = (placed.end(), Some(placed.header.next_offset()));
                    self.chunk.clear();
                    continue;
                }
            }
            match self.segment.settle(position, expected, None).await? {
                Outcome::Sound(placed, _) => {
                    self.chunk.clear();
                    self.before = Some((placed, true));
                    return Ok(Some(placed));
                }
                Outcome::Lost(lost) if self.strict => return Err(self.segment.lost_error(&lost)),
                Outcome::Lost(lost) => (position, expected) = (lost.end, Some(lost.next)),
                Outcome::Unknown => return Err(fault),
            }
        }
    }

    /// The header at `position` as it is read.
    async fn header_at(&mut self, position: u64) -> Result<Option<Placed>> {
        if position >= self.end.size {
            return Ok(None);
        }
        let held = self.chunk_at..(self.chunk_at + self.chunk.len() as u64);
        let needed = (position + HEADER as u64).min(self.end.size);
        if !(held.contains(&position) && needed <= held.end) {
            let len = (self.end.size - position).min(CHUNK) as usize;
            let mut buf = std::mem::take(&mut self.chunk);
            // A shorter last chunk reuses the memory; growing back never happens within a walk forward.
            if buf.len() < len {
                buf = raid::device::buffer(len);
            }
            buf.truncate(len);
            self.chunk = self.segment.bytes.read(position, buf).await?;
            self.chunk_at = position;
        }
        let header = Header::parse(&self.chunk[(position - self.chunk_at) as usize..])
            .map_err(|fault| self.segment.damaged(self.segment.base, position, fault))?;
        self.check(&header, position)?;
        Ok(Some(Placed { header, position }))
    }

    fn check(&self, header: &Header, position: u64) -> Result<()> {
        let (needed, available) = (u64::from(header.size), self.end.size - position);
        let damaged = |fault| Err(self.segment.damaged(header.base_offset, position, fault));
        if needed > available {
            return damaged(BatchFault::Truncated { needed, available });
        }
        if header.base_offset < self.segment.base || header.next_offset() > self.end.next {
            let (found, expected) = (header.base_offset, self.segment.base);
            return damaged(BatchFault::BaseOffset { found, expected });
        }
        if header.last_offset_delta < 0 || header.count < 0 {
            let (count, last_offset_delta) = (header.count, header.last_offset_delta);
            return damaged(BatchFault::Count { count, last_offset_delta });
        }
        Ok(())
    }
}

/// Indexes of closed segments in memory, within a budget; the one loaded first goes first.
#[derive(Debug)]
pub(crate) struct IndexCache {
    budget: usize,
    state: Mutex<Held>,
}

/// Bytes of memory held, and by which segments, the oldest first.
type Held = (usize, VecDeque<(Weak<Segment>, usize)>);

impl IndexCache {
    pub(crate) fn new(budget: usize) -> Self {
        Self { budget, state: Mutex::default() }
    }

    pub(crate) fn note(&self, segment: &Arc<Segment>, memory: usize) {
        let mut gone = Vec::new();
        {
            let mut state = self.state.lock();
            let (held, queue) = &mut *state;
            queue.push_back((Arc::downgrade(segment), memory));
            *held += memory;
            while *held > self.budget && queue.len() > 1 {
                if let Some((segment, memory)) = queue.pop_front() {
                    *held -= memory;
                    gone.push(segment);
                }
            }
        }
        // Outside the lock: segments have locks of their own.
        for segment in gone.iter().filter_map(Weak::upgrade) {
            segment.unload();
        }
    }
}
