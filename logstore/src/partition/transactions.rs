//! Transactions of a partition: their markers, which ones were aborted, and who has one open.
//!
//! What is known of them is derived from the log. The newest snapshot of the producers saves reading it all; a snapshot
//! that speaks of an open transaction is held against the log first, where the log still has that offset. The list of
//! aborted transactions of a closed segment is loaded when a `read_committed` consumer first needs it, or made again from
//! the log. A log without transactions has none of this: its record says so.

use super::append::Job;
use super::{Appended, Partition, ReadLimit, Slice};
use crate::batch::{Header, Marker, Outcome};
use crate::catalog::records::{Clean, Kind, PartitionKey, Table};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::producers::{ProducerState, Producers, SnapshotFault};
use crate::segment::Segment;
use crate::transactions::{Aborted, collect, decode};
use raid::device::Durability;
use std::sync::Arc;

impl Partition {
    /// Appends the control batch that ends a producer's transaction. A newer `producer_epoch` than the transaction's
    /// fences the producer that began it. An older one, and an older coordinator than one that has been here, is
    /// refused; a marker that finds no transaction open is written all the same, as Kafka does.
    pub async fn append_marker(
        self: &Arc<Self>,
        producer_id: i64,
        producer_epoch: i16,
        coordinator_epoch: i32,
        outcome: Outcome,
        durability: Durability,
    ) -> Result<Appended> {
        self.context.check()?;
        self.check_exists()?;
        if producer_id < 0 || producer_epoch < 0 {
            let fault =
                crate::batch::BatchFault::Producer { producer_id, epoch: producer_epoch, sequence: -1 };
            let (topic, partition) = (Arc::clone(&self.id.topic), self.id.number());
            return Err(Error::InvalidBatch { topic, partition, fault });
        }
        let marker = Marker { outcome, coordinator_epoch };
        self.run(Job::Marker { producer_id, producer_epoch, marker }, durability).await
    }

    /// Takes note, before the first transactional batch is appended at `offset`, that the log has such.
    pub(super) async fn note_transactions(&self, offset: i64) {
        if self.record.lock().transactions_from.is_none() {
            // Whoever changes the record puts a changed copy back.
            let _only = self.maintenance.lock().await;
            self.record.lock().transactions_from.get_or_insert(offset);
        }
    }

    /// The aborted transactions with records or markers in `from..upper`, by the offset of their markers: what a
    /// `read_committed` consumer of that range must skip. `upper` is at most the last stable offset.
    pub async fn aborted(&self, from: i64, upper: i64) -> Result<Vec<Aborted>> {
        self.check_exists()?;
        let mut found = Vec::new();
        if !self.has_transactions_below(upper) {
            return Ok(found);
        }
        let segments = self.log.read().segments.clone();
        let first = segments.partition_point(|segment| segment.base <= from).saturating_sub(1);
        for at in first..segments.len() {
            let segment = &segments[at];
            let in_memory = segment.aborted.ask(|list| collect(list, from, upper, &mut found));
            let complete = if let Some(complete) = in_memory {
                complete
            } else {
                let list: Arc<[Aborted]> = self.load_aborted(&segments[..=at]).await?.into();
                segment.aborted.keep(&list);
                if !list.is_empty() {
                    self.context.indexes.note(segment, size_of_val(&*list));
                }
                collect(&list, from, upper, &mut found)
            };
            if complete {
                break;
            }
        }
        Ok(found)
    }

    /// A read up to the last stable offset, like [`Partition::read`], with the aborted transactions in it. The list may
    /// have some that begin a little behind the read's end.
    pub async fn read_committed(
        &self,
        from: i64,
        max_bytes: u32,
        at_least_one: bool,
    ) -> Result<(Slice, Vec<Aborted>)> {
        loop {
            let slice = self.read(from, max_bytes, ReadLimit::LastStable, at_least_one).await?;
            let last_stable = self.offsets().last_stable;
            if slice.is_empty() || !self.has_transactions_below(last_stable) {
                return Ok((slice, Vec::new()));
            }
            let own = |segment: &&Arc<Segment>| slice.is_of(&segment.bytes);
            let segment = self.log.read().segments.iter().find(own).cloned();
            // Gone while it was read, and with it the list of what was aborted in it: asked again, the log says so.
            let Some(segment) = segment else { continue };
            let upper = segment.offset_bound(slice.end_position(), &self.context.indexes).await?;
            let aborted = self.aborted(from, upper.min(last_stable)).await?;
            let still = self.log.read().segments.iter().any(|held| Arc::ptr_eq(held, &segment));
            if still {
                return Ok((slice, aborted));
            }
        }
    }

    /// What is known of the producers that wrote here and have not expired.
    pub async fn producers(&self) -> Result<Vec<ProducerState>> {
        self.check_exists()?;
        let appender = self.appender.lock().await;
        if appender.ready {
            return Ok(appender.producers.states());
        }
        let segments = self.log.read().segments.clone();
        let now = self.context.wall_clock();
        let mut producers = Replay::after(&self.context, self.id.key, &segments, now).await?.producers;
        producers.expire(self.oldest_producer());
        Ok(producers.states())
    }

    /// Lets producers go that have been silent for too long; not while somebody appends, there is no hurry.
    pub(crate) fn expire_producers(&self) {
        if let Ok(mut appender) = self.appender.try_lock() {
            appender.producers.expire(self.oldest_producer());
        }
    }

    fn has_transactions_below(&self, offset: i64) -> bool {
        self.record.lock().transactions_from.is_some_and(|from| from < offset)
    }

    /// The aborted transactions of the last of these segments, which start at the log's start: as stored, or from the
    /// log.
    pub(super) async fn load_aborted(&self, segments: &[Arc<Segment>]) -> Result<Vec<Aborted>> {
        let Some((segment, before)) = segments.split_last() else { return Ok(Vec::new()) };
        let end = segment.end();
        if !self.has_transactions_below(end.next) {
            return Ok(Vec::new());
        }
        let stored = segment.bytes.sidecar(Kind::TxnIndex, end.next).await?;
        match stored.map(|bytes| decode(&bytes, segment.base, end.next)) {
            Some(Ok(list)) => return Ok(list),
            Some(Err(fault)) => self.rebuilds(segment, &fault),
            None => self.rebuilds(segment, &"it is missing"),
        }
        let now = self.context.wall_clock();
        let mut replay = Replay::after(&self.context, self.id.key, before, now).await?;
        segment.replay(|header, marker| replay.see(header, marker)).await?;
        Ok(replay.aborted)
    }

    fn rebuilds(&self, segment: &Segment, why: &dyn std::fmt::Display) {
        let (topic, partition, base) = (self.topic(), self.index(), segment.base);
        tracing::warn!("{topic}-{partition}: the transaction index of segment {base} is rebuilt: {why}");
    }
}

/// Producers and aborted transactions as a walk over the log finds them.
#[derive(Debug)]
pub(super) struct Replay {
    pub(super) producers: Producers,
    /// Since the walk began.
    pub(super) aborted: Vec<Aborted>,
    now: i64,
}

impl Replay {
    /// A walk that begins with these producers.
    pub(super) fn new(producers: Producers, now: i64) -> Self {
        Self { producers, aborted: Vec::new(), now }
    }

    /// A walk that begins behind whole segments, which start at the log's start: at their end the producers are those
    /// of the newest snapshot, and of the batches after it. A segment with a damaged batch gives what it can.
    pub(super) async fn after(
        context: &Context,
        key: PartitionKey,
        segments: &[Arc<Segment>],
        now: i64,
    ) -> Result<Self> {
        let mut replay = Self::new(Producers::default(), now);
        let mut known = segments.len();
        while known > 0 {
            if let Some(found) = snapshot_at_end(context, &segments[..known], None).await? {
                replay.producers = found;
                break;
            }
            known -= 1;
        }
        if known == 0 {
            replay.producers = kept_at_start(context, key)?;
        }
        for segment in &segments[known..] {
            match segment.replay(|header, marker| replay.see(header, marker)).await {
                Ok(_) => {}
                Err(error @ (Error::DamagedLog { .. } | Error::LostBatch { .. })) => {
                    tracing::warn!("producers are known in part: {error}");
                }
                Err(error) => return Err(error),
            }
        }
        replay.aborted.clear();
        Ok(replay)
    }

    /// Nothing is left of the log, for the start of which these producers were kept. A kill in the middle of the deletion of
    /// what lay before leaves any of it, so that what was seen may be less.
    pub(super) fn know_kept(&mut self, kept: Producers) {
        let reach = |producers: &Producers| producers.states().iter().map(|state| state.last_offset).max();
        if reach(&kept) > reach(&self.producers) {
            self.producers = kept;
        }
    }

    /// The next batch of the log.
    pub(super) fn see(&mut self, header: &Header, marker: Option<Marker>) {
        let ended = self.producers.note(header, marker, self.now);
        self.aborted.extend(ended.and_then(Aborted::from_ended));
    }
}

/// The producers as they were where the log's first segment begins, as far as they were kept when those before it were deleted.
pub(super) fn kept_at_start(context: &Context, key: PartitionKey) -> Result<Producers> {
    let Some(bytes) = context.catalog.bytes(Table::Blobs, &key.bytes())? else {
        return Ok(Producers::default());
    };
    // The catalog has checksums of its own.
    Ok(Producers::read_snapshot(&bytes, i64::MAX).unwrap_or_else(|fault| {
        tracing::warn!("a snapshot of producers that was kept is not used: {fault}");
        Producers::default()
    }))
}

/// The producers kept at the end of the last of these segments; `None` without a snapshot that can be trusted. A
/// stop in order has noted in the catalog which open transaction is the oldest.
pub(super) async fn snapshot_at_end(
    context: &Context,
    segments: &[Arc<Segment>],
    stop: Option<Clean>,
) -> Result<Option<Producers>> {
    let Some(segment) = segments.last() else { return Ok(None) };
    let end = segment.end().next;
    let Some(bytes) = segment.bytes.sidecar(Kind::Snapshot, end).await? else { return Ok(None) };
    let checked = match Producers::read_snapshot(&bytes, end) {
        Ok(found) if stop.is_some_and(|stop| stop.first_open != found.first_open()) => {
            Err(SnapshotFault::Unstable)
        }
        Ok(found) => match false_claim(context, segments, &found).await {
            Some(fault) => Err(fault),
            None => Ok(found),
        },
        Err(fault) => Err(fault),
    };
    Ok(checked
        .inspect_err(|fault| {
            let (topic, partition) = (&segment.id.topic, segment.id.number());
            tracing::warn!("{topic}-{partition}: the snapshot at {end} is not used: {fault}");
        })
        .ok())
}

/// An open transaction that the snapshot speaks of and the log does not.
async fn false_claim(
    context: &Context,
    segments: &[Arc<Segment>],
    producers: &Producers,
) -> Option<SnapshotFault> {
    let open: Vec<_> = producers.open().collect();
    for (offset, producer_id) in open {
        // What was deleted can't be asked.
        let Some(segment) = segments.iter().rev().find(|segment| segment.base <= offset) else { continue };
        let found = match segment.find(offset, &context.indexes).await {
            Ok(found) => found.map(|placed| placed.header),
            // Nor what is damaged.
            Err(_) => continue,
        };
        let begins = found.is_some_and(|header| {
            (header.base_offset, header.producer_id) == (offset, producer_id)
                && header.is_transactional()
                && !header.is_control()
        });
        if !begins {
            return Some(SnapshotFault::Transaction { producer_id, offset });
        }
    }
    None
}
