//! Compaction of a partition's closed segments: the edge around [`crate::compaction`].
//!
//! What may be cleaned: segments that are sealed, that lie below the recovery point and the last stable offset, and whose
//! youngest record is older than `min.compaction.lag.ms`. It is done when the share of what was never looked at reaches
//! `min.cleanable.dirty.ratio`, or its oldest record is older than `max.compaction.lag.ms`.
//!
//! Order of a pass: walk the dirty segments into a map → for each group of neighbours that fit one segment together:
//! write what stays beside them → make it durable and put it in their place, one commit of the catalog → let the old
//! bytes go when their last reader has → after the last group, note how far the log is clean. When the map was full before
//! the end, the next pass goes on from there. A power cut at any point leaves a group as it was or as it is to be; what
//! was written beside and not committed is free space, or a file that the next start removes.
//!
//! A batch of which no copy is good ends the pass: what is left of it stays where it is, for the day on which a copy comes
//! back, and its consumers are told of it for as long. Nothing is taken out by a map that lacks its keys.
//!
//! Where there is no room for what is written beside, the pass ends too, and what it wrote goes at once; groups before it
//! stay as they are now.
//!
//! Readers and appenders are not held up: the writing takes no lock but the last step, which takes `maintenance`. If
//! retention or a deletion was faster, what was written is thrown away.
//!
//! Memory: the map (a budget), one batch decompressed, [`BUFFER`] bytes of output, and the new segment's index.

use super::Partition;
use crate::catalog::Change;
use crate::catalog::records::{Kind, Swap, Table};
use crate::cleaner::Cleaner;
use crate::compaction::{Kept, OffsetMap, Rules, Traces, filter};
use crate::config::TopicConfig;
use crate::error::{Error, Result};
use crate::home::Sealing;
use crate::index::Index;
use crate::segment::{End, Placed, Segment, Walk};
use crate::transactions::{Aborted, encode};
use bytes::{Bytes, BytesMut};
use raid::device::Durability;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Bytes of output gathered before they are written.
const BUFFER: usize = 1 << 20;

/// What a pass knows of the log besides the keys.
struct Pass<'a> {
    map: OffsetMap,
    now: i64,
    config: &'a TopicConfig,
    /// Where what is cleaned ends.
    end: i64,
    /// Producer id → offset of its last record, −1 where none is known, and its epoch.
    last_of: HashMap<i64, (i64, i16)>,
    /// Producer id → its aborted transactions, as (first, last) offsets.
    aborted: HashMap<i64, Vec<(i64, i64)>>,
}

impl Pass<'_> {
    fn is_aborted(&self, placed: &Placed) -> bool {
        let header = &placed.header;
        header.is_transactional()
            && self.aborted.get(&header.producer_id).is_some_and(|ranges| {
                ranges.iter().any(|(first, last)| (*first..=*last).contains(&header.base_offset))
            })
    }

    fn rules(&self, placed: &Placed, is_spent: bool) -> Rules {
        let header = &placed.header;
        let tells = |&(last, epoch): &(i64, i16)| {
            if last >= 0 {
                last == header.last_offset()
            } else {
                header.is_control() && epoch == header.producer_epoch
            }
        };
        Rules {
            now: self.now,
            delete_retention_ms: self.config.delete_retention_ms,
            stays_empty: header.next_offset() == self.end
                || header.is_idempotent() && self.last_of.get(&header.producer_id).is_some_and(tells),
            is_spent,
            is_aborted: self.is_aborted(placed),
        }
    }
}

impl Partition {
    /// How urgent a compaction is, between 0 and 1; `None` when there is nothing to do.
    pub(crate) async fn dirty_share(&self) -> Result<Option<f64>> {
        let config = self.config();
        if !config.cleanup_policy.compact || self.withheld.is_some() {
            return Ok(None);
        }
        let now = self.context.wall_clock();
        let segments = self.cleanable(&config, now).await?;
        let cleaned = self.record.lock().cleaned;
        let bytes = |is_wanted: &dyn Fn(&Arc<Segment>) -> bool| -> u64 {
            segments.iter().filter(|segment| is_wanted(segment)).map(|segment| segment.end().size).sum()
        };
        let (all, dirty) = (bytes(&|_| true), bytes(&|segment| segment.end().next > cleaned));
        if dirty == 0 {
            return Ok(None);
        }
        let share = dirty as f64 / all as f64;
        if share >= config.min_cleanable_dirty_ratio {
            return Ok(Some(share));
        }
        let oldest = segments.iter().find(|segment| segment.end().next > cleaned && segment.end().size > 0);
        let Some(oldest) = oldest else { return Ok(None) };
        let first = Walk::new(oldest, oldest.end()).batch_at(0).await?;
        let since = first.map(|placed| placed.header.max_timestamp).filter(|&at| at >= 0);
        let since = since.unwrap_or_else(|| oldest.written());
        Ok((now.saturating_sub(since) > config.max_compaction_lag_ms).then_some(1.0))
    }

    /// The segments that may be cleaned, from the start of the log on.
    async fn cleanable(&self, config: &TopicConfig, now: i64) -> Result<Vec<Arc<Segment>>> {
        let mut segments = self.log.read().segments.clone();
        // Even when it is sealed, the last one stays: the log's end is told from it.
        segments.pop();
        let (cleaned, sealed) = {
            let record = self.record.lock();
            (record.cleaned, record.recovery_point)
        };
        let bound = sealed.min(self.offsets().last_stable);
        let mut count = 0;
        for segment in &segments {
            let end = segment.end();
            if end.next > bound {
                break;
            }
            if config.min_compaction_lag_ms > 0 && end.next > cleaned {
                let newest = segment.newest(&self.context.indexes).await?;
                if now.saturating_sub(newest) < config.min_compaction_lag_ms {
                    break;
                }
            }
            count += 1;
        }
        segments.truncate(count);
        Ok(segments)
    }

    /// Cleans what may be cleaned, in as many passes as the map needs.
    pub(crate) async fn compact(self: &Arc<Self>, cleaner: &Cleaner) -> Result<()> {
        let config = self.config();
        let now = self.context.wall_clock();
        let mut seed = [0; 16];
        self.context.tasks.runtime().fill_random(&mut seed);
        loop {
            // Fresh each time: groups of the pass before have taken the place of what was there, and others were closed.
            let segments = self.cleanable(&config, now).await?;
            let from = self.record.lock().cleaned;
            let Some(end) = segments.last().map(|segment| segment.end().next) else { return Ok(()) };
            if from >= end {
                return Ok(());
            }
            // Before anything is read for nothing.
            self.context.home.room_to_clean().await?;
            // After the segments were taken, never before: one that was closed in between may hold what was aborted since, and
            // that must not count as the last of its keys.
            let (last_of, aborted) = (self.last_of_producers().await?, self.aborted_ranges(end).await?);
            let map = OffsetMap::new(seed, cleaner.memory());
            let mut pass = Pass { map, now, config: &config, end, last_of, aborted };
            let clean_to = self.note_keys(cleaner, &mut pass, &segments, from).await?;
            // From the log's start on, whichever segments are cleaned: groups begin there.
            let mut traces = Traces::default();
            for group in groups(&segments, &config, pass.map.latest()) {
                self.clean_group(cleaner, &pass, &mut traces, group).await?;
            }
            let _only = self.maintenance.lock().await;
            self.context.check()?;
            self.check_exists()?;
            let mut record = self.record.lock().clone();
            record.cleaned = record.cleaned.max(clean_to);
            let mut change = Change::vital();
            change.put(Table::Partitions, &self.id.key.bytes(), &record);
            self.context.catalog.submit(change).await?;
            *self.record.lock() = record;
        }
    }

    /// The last record of each producer that is still known, as [`Pass`] keeps it.
    async fn last_of_producers(&self) -> Result<HashMap<i64, (i64, i16)>> {
        let states = self.producers().await?.into_iter();
        Ok(states.map(|state| (state.id, (state.last_offset, state.epoch))).collect())
    }

    /// The aborted transactions below `end`, as [`Pass`] keeps them.
    async fn aborted_ranges(&self, end: i64) -> Result<HashMap<i64, Vec<(i64, i64)>>> {
        let mut ranges: HashMap<i64, Vec<(i64, i64)>> = HashMap::new();
        for Aborted { producer_id, first_offset, last_offset, .. } in
            self.aborted(self.log_start(), end).await?
        {
            ranges.entry(producer_id).or_default().push((first_offset, last_offset));
        }
        Ok(ranges)
    }

    /// Walks the dirty part of the log into the map; returns up to where it went.
    async fn note_keys(
        &self,
        cleaner: &Cleaner,
        pass: &mut Pass<'_>,
        segments: &[Arc<Segment>],
        from: i64,
    ) -> Result<i64> {
        let mut end = from;
        for segment in segments.iter().filter(|segment| segment.end().next > from) {
            let mut walk = Walk::of_all(segment);
            let mut position = 0;
            while let Some(placed) = walk.batch_at(position).await? {
                self.context.check()?;
                position = placed.end();
                if placed.header.next_offset() <= from {
                    continue;
                }
                cleaner.pace(self.context.tasks.runtime(), placed.header.size).await;
                if placed.header.is_control() || pass.is_aborted(&placed) {
                    pass.map.pass(&placed.header);
                    continue;
                }
                let bytes = segment.read_batch(&placed).await?;
                match pass.map.note_batch(&placed.header, &bytes, from) {
                    Ok(true) => {}
                    Ok(false) => return Ok(pass.map.latest() + 1),
                    Err(fault) => {
                        cleaner.unreadable(segment, &placed, &fault);
                        pass.map.pass(&placed.header);
                    }
                }
            }
            end = segment.end().next;
        }
        Ok(end)
    }

    /// Writes what stays of neighbouring segments beside them, and puts it in their place.
    async fn clean_group(
        self: &Arc<Self>,
        cleaner: &Cleaner,
        pass: &Pass<'_>,
        traces: &mut Traces,
        group: &[Arc<Segment>],
    ) -> Result<()> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { return Ok(()) };
        let interval = pass.config.index_interval_bytes as u64;
        let turn = self.cleanings.fetch_add(1, Ordering::Relaxed) + 1;
        let fresh = self.context.home.cleaned_segment(&self.id, first.base, turn);
        let mut index = Index::new(first.base);
        let (mut size, mut at, mut changed) = (0u64, 0u64, group.len() > 1);
        let mut buffer = BytesMut::new();
        // Markers of transactions of which nothing is left.
        let mut spent = HashSet::new();
        for segment in group {
            let mut walk = Walk::of_all(segment);
            let mut position = 0;
            while let Some(placed) = walk.batch_at(position).await? {
                self.context.check()?;
                position = placed.end();
                cleaner.pace(self.context.tasks.runtime(), placed.header.size).await;
                let bytes = segment.read_batch(&placed).await?;
                let is_spent = traces.see(&placed.header);
                if is_spent {
                    spent.insert(placed.header.base_offset);
                }
                let rules = pass.rules(&placed, is_spent);
                let kept = filter(&placed.header, &bytes, &pass.map, rules).unwrap_or_else(|fault| {
                    cleaner.unreadable(segment, &placed, &fault);
                    Kept::Whole
                });
                let out: Bytes = match kept {
                    Kept::Whole => bytes,
                    Kept::Changed(bytes) => bytes,
                    Kept::Nothing => {
                        changed = true;
                        continue;
                    }
                };
                let header = crate::batch::Header::parse(&out)
                    .map_err(|fault| segment.damaged(placed.header.base_offset, placed.position, fault))?;
                changed |= header != placed.header;
                index.add(&header, size, interval);
                size += out.len() as u64;
                buffer.extend_from_slice(&out);
                if buffer.len() >= BUFFER {
                    at = put(&*fresh, at, &mut buffer).await?;
                }
            }
        }
        if !changed {
            return Ok(());
        }
        put(&*fresh, at, &mut buffer).await?;
        if size > u64::from(u32::MAX) {
            // Recompression made more of it than a segment can hold: it stays as it is.
            return Ok(());
        }
        index.finish();
        let end = End { size, next: last.end().next };
        let (offsets, times) = index.encode();
        let mut sidecars = vec![(Kind::OffsetIndex, offsets), (Kind::TimeIndex, times)];
        if let Some(snapshot) = last.bytes.sidecar(Kind::Snapshot, end.next).await? {
            sidecars.push((Kind::Snapshot, snapshot));
        }
        let smaller = Segment::new(self.id.clone(), first.base, fresh, end, true);
        smaller.set_written(last.written());
        smaller.set_largest(index.largest_timestamp());
        let (done, outcome) = tokio::sync::oneshot::channel();
        let (partition, group) = (Arc::clone(self), group.to_vec());
        self.context.tasks.spawn(Box::pin(async move {
            // Whoever asked may be gone; what is half-way done is done to its end all the same.
            drop(done.send(partition.replace(&group, smaller, turn, sidecars, &spent).await));
        }));
        outcome.await.unwrap_or(Err(Error::Interrupted))
    }

    /// Puts a segment in the place of others, durably.
    async fn replace(
        self: &Arc<Self>,
        group: &[Arc<Segment>],
        cleaned: Arc<Segment>,
        turn: u64,
        mut sidecars: Vec<(Kind, Bytes)>,
        spent: &HashSet<i64>,
    ) -> Result<()> {
        let _only = self.maintenance.lock().await;
        self.context.check()?;
        self.check_exists()?;
        let segments = self.log.read().segments.clone();
        let start = segments.iter().position(|segment| Arc::ptr_eq(segment, &group[0]));
        let still = start.and_then(|start| segments.get(start..start + group.len()));
        if !still.is_some_and(|still| still.iter().zip(group).all(|(a, b)| Arc::ptr_eq(a, b))) {
            // Retention was faster.
            return Ok(());
        }
        let start = start.unwrap_or_default();
        let end = cleaned.end();
        let mut record = self.record.lock().clone();
        if record.transactions_from.is_some_and(|from| from < end.next) {
            let mut list = Vec::new();
            for at in 0..group.len() {
                list.extend(self.load_aborted(&segments[..=start + at]).await?);
            }
            // Of those nobody has anything to skip; and where the marker goes, whoever skipped for it would not stop.
            list.retain(|aborted| !spent.contains(&aborted.last_offset));
            sidecars.push((Kind::TxnIndex, encode(&list)));
        }
        record.swap = Some(Swap { base: cleaned.base, end: end.next, turn });
        let mut change = Change::vital();
        change.put(Table::Partitions, &self.id.key.bytes(), &record);
        let old: Vec<_> = group.iter().map(|segment| Arc::clone(&segment.bytes)).collect();
        let sealing = Sealing {
            size: end.size,
            end: end.next,
            sidecars,
            trim: true,
            written: (!cleaned.is_timed()).then(|| cleaned.written()),
            change,
        };
        cleaned.bytes.take_place(&old, sealing).await?;
        *self.record.lock() = record;
        self.log.write().segments.splice(start..start + group.len(), [Arc::clone(&cleaned)]);
        // The commit stands: what cannot be finished now leaves memory and home at odds.
        if let Err(error) = cleaned.bytes.settle(&old).await {
            self.context.health.fail(&error);
            return Err(error);
        }
        for bytes in &old {
            bytes.replaced();
        }
        let before: u64 = group.iter().map(|segment| segment.end().size).sum();
        tracing::debug!(
            "{}-{}: compacted {} segments from {}, {before} to {} bytes",
            self.topic(),
            self.index(),
            group.len(),
            cleaned.base,
            end.size
        );
        Ok(())
    }
}

async fn put(fresh: &dyn crate::home::SegmentBytes, at: u64, buffer: &mut BytesMut) -> Result<u64> {
    let data = buffer.split().freeze();
    let end = at + data.len() as u64;
    fresh.reserve(end, end).await?;
    if !data.is_empty() {
        fresh.write(at, data, Durability::Cached).await?;
    }
    Ok(end)
}

/// Neighbours that make one segment together, as Kafka groups them by the sizes they have. Those behind `latest` are
/// left alone.
fn groups<'a>(segments: &'a [Arc<Segment>], config: &TopicConfig, latest: i64) -> Vec<&'a [Arc<Segment>]> {
    let count = segments.partition_point(|segment| segment.base <= latest);
    let segments = &segments[..count];
    let (mut out, mut from) = (Vec::new(), 0);
    while from < segments.len() {
        let (mut to, mut size) = (from + 1, segments[from].end().size);
        while let Some(next) = segments.get(to) {
            let End { size: more, next: end } = next.end();
            if size + more > config.segment_bytes as u64 || end - segments[from].base > i64::from(i32::MAX) {
                break;
            }
            size += more;
            to += 1;
        }
        out.push(&segments[from..to]);
        from = to;
    }
    out
}

/// Whether a failure concerns one partition, and the next one may be tried.
pub(crate) fn is_local(error: &Error) -> bool {
    !matches!(error, Error::Closed | Error::Poisoned { .. } | Error::Interrupted)
}
