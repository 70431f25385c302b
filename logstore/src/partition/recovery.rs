//! How a partition is opened.
//!
//! **Closed in order**: the catalog says where the log ends and how long its last segment is; if what is there agrees,
//! nothing is read. **Not closed in order**: segments that end at or before the recovery point are whole; from there
//! on every batch is read and checked (frame, checksum, offsets that follow each other), up to the first that is not sound
//! in any copy. Its leader epoch no checksum covers: the catalog knew it before the first append of each, and where the
//! batch says another, it is stamped anew. Where copies may differ, the good one is made the content of all before it
//! counts ([`crate::heal`]). Segments that are not read are guarded where copies
//! may differ ([`crate::unsynced`]). What lies behind the end is cut off, and the cut is made durable before anything is
//! served: a tail that was torn once can never come back, not even in part. So is all that was read: a process that was
//! killed may have left it in the page cache only, and its producers will be told that they sent it twice. Index and
//! producers are made on the way.
//! Then the leader epoch rises, so that whoever saw more of the log can tell.
//!
//! What a scan reads is bounded by the segments that were not sealed: usually the last one.
//!
//! A place that cannot be read in any copy ends what is served of its log, but not the log: nothing is cut, the catalog's
//! record stays as it was, appends are refused, and the next start tries again. All other logs are opened. A directory
//! that is missing is made anew, empty; no offset is given out again that the catalog knows to have been.
//!
//! Compaction leaves gaps between offsets, and only below the recovery point: there they are accepted, in case such a
//! segment is scanned after all; from the recovery point on, offsets are contiguous.
//!
//! Nothing below the recovery point is cut: it was durable, so what is not sound there has rotted, and what follows it has
//! not. It is noted as lost, as it would be in a segment that is not scanned.

use super::transactions::{Replay, kept_at_start};
use super::{Appender, Log, Partition, Progress, Visible, Withheld, append::Active};
use crate::batch::{self, BatchFault, Header};
use crate::catalog::records::PartitionRecord;
use crate::config::TopicConfig;
use crate::context::Context;
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::ground::Ground;
use crate::heal::Lost;
use crate::home::{Found, PartitionId, SegmentBytes};
use crate::index::Index;
use crate::producers::Producers;
use crate::scan::Scan;
use crate::segment::{End, Segment};
use crate::unsynced;
use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, RwLock};
use raid::device::Durability;
use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

/// A segment that recovery found whole but not sealed, with the producers at its end.
pub(crate) type Unsealed = (Arc<Segment>, Bytes);

/// A partition, opened.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) partition: Arc<Partition>,
    /// Its bytes must be made durable before it may be served.
    pub(crate) scanned: bool,
    /// And then its record, which changed.
    pub(crate) recovered: bool,
    pub(crate) unsealed: Vec<Unsealed>,
}

/// Opens a partition that is as its record says.
pub(crate) async fn open(
    context: &Arc<Context>,
    id: PartitionId,
    record: PartitionRecord,
    config: Arc<TopicConfig>,
) -> Result<Opened> {
    let found = match context.home.segments(&id, record.swap).await {
        Err(error @ Error::File { .. }) => {
            tracing::error!("{}-{}: {error}", id.topic, id.key.partition);
            let (offset, behind) = (record.log_start, Vec::new());
            let withheld = Withheld { offset, segment: offset, position: 0, behind };
            return Ok(withhold(context, id, record, config, Vec::new(), offset, None, withheld));
        }
        found => below_start_erased(&record, found?).await?,
    };
    if let Some(segments) = as_closed(&id, &record, &found, context.wall_clock()) {
        // `as_closed` answers only with a clean marker.
        let end = record.clean.map_or(record.log_start, |clean| clean.end);
        let progress = Progress::opened(end, record.clean.and_then(|clean| clean.first_open));
        let partition = assemble(context, id, record, config, segments, progress, Appender::default(), None);
        return Ok(Opened { partition, scanned: false, recovered: false, unsealed: Vec::new() });
    }
    recover(context, id, record, config, found).await
}

/// A partition that has just been made.
pub(crate) fn create(context: &Arc<Context>, id: PartitionId, config: Arc<TopicConfig>) -> Arc<Partition> {
    let record = PartitionRecord::default();
    assemble(context, id, record, config, Vec::new(), Progress::opened(0, None), Appender::default(), None)
}

/// A partition that is served as far as it could be read, and not changed.
#[allow(clippy::too_many_arguments)] // it is what a partition is made of
fn withhold(
    context: &Arc<Context>,
    id: PartitionId,
    record: PartitionRecord,
    config: Arc<TopicConfig>,
    segments: Vec<Arc<Segment>>,
    log_end: i64,
    first_open: Option<i64>,
    withheld: Withheld,
) -> Opened {
    let progress = Progress::opened(log_end.max(record.log_start), first_open);
    let appender = Appender::default();
    let partition = assemble(context, id, record, config, segments, progress, appender, Some(withheld));
    if let Err(error) = partition.check_whole() {
        tracing::error!("{error}");
    }
    Opened { partition, scanned: true, recovered: false, unsealed: Vec::new() }
}

/// Finishes the removal of segments that lie wholly below the log's start.
async fn below_start_erased(record: &PartitionRecord, mut found: Vec<Found>) -> Result<Vec<Found>> {
    let gone = found.windows(2).take_while(|pair| pair[1].base <= record.log_start).count();
    for segment in found.drain(..gone) {
        segment.bytes.erase().await?;
    }
    Ok(found)
}

/// The segments of a log that was closed in order; `None` when it was not, or what is there does not agree.
fn as_closed(
    id: &PartitionId,
    record: &PartitionRecord,
    found: &[Found],
    now: i64,
) -> Option<Vec<Arc<Segment>>> {
    let clean = record.clean?;
    let disagrees = |what: &str| {
        tracing::warn!("{}-{} was closed in order, but {what}: it is checked", id.topic, id.key.partition);
        None
    };
    let Some(last) = found.last() else {
        return if clean.end == record.log_start { Some(Vec::new()) } else { disagrees("has no segment") };
    };
    if clean.end < last.base || record.log_start > clean.end {
        return disagrees("its last segment starts behind its end");
    }
    if last.reach < clean.size || (last.exact && last.reach != clean.size) {
        return disagrees("its last segment has another length");
    }
    let mut segments = Vec::with_capacity(found.len());
    for pair in found.windows(2) {
        let Some(size) = pair[0].sealed else { return disagrees("a segment before the last is not sealed") };
        segments.push(closed(id, record, &pair[0], End { size, next: pair[1].base }, now));
    }
    segments.push(closed(id, record, last, End { size: clean.size, next: clean.end }, now));
    Some(segments)
}

/// One that was closed before, and is not read now.
fn closed(id: &PartitionId, record: &PartitionRecord, found: &Found, end: End, now: i64) -> Arc<Segment> {
    let bytes = unsynced::guard(id, found.base, &found.bytes, end, &record.epochs);
    segment(id, found, bytes, end, found.written, now)
}

/// One that was found, last appended to when it says so, or else now.
fn segment(
    id: &PartitionId,
    found: &Found,
    bytes: Arc<dyn SegmentBytes>,
    end: End,
    written: Option<i64>,
    now: i64,
) -> Arc<Segment> {
    let segment = Segment::new(id.clone(), found.base, bytes, end, found.sealed.is_some());
    segment.set_written(written.map_or(now, |at| at.min(now)));
    segment
}

/// What a scan found in one segment.
struct Scanned {
    end: End,
    index: Index,
    opened: Option<i64>,
    /// Offset of the first batch of a transaction.
    transactions_from: Option<i64>,
    /// Places below the recovery point without a good batch, with sound ones behind.
    lost: Vec<Lost>,
    /// What stands behind the last sound batch, unless the segment ends there.
    fault: Option<BatchFault>,
}

/// Checks a segment from its start to the end of `ground`, which is that of its bytes.
async fn scan(
    bytes: &Arc<dyn SegmentBytes>,
    ground: Ground<'_>,
    interval: u64,
    chain: &mut Chain<'_>,
    replay: &mut Replay,
) -> Result<Scanned> {
    let Ground { name, base, end: End { size: reach, .. }, .. } = ground;
    let mut scan = Scan::new(reach);
    let mut index = Index::new(base);
    let mut end = End { size: 0, next: base };
    let (mut opened, mut transactions_from, mut fault, mut lost) = (None, None, None, Vec::new());
    let mut mends = Mends::default();
    let mut restamped = 0;
    loop {
        let outcome = match answered(name, scan.batch_at(ground.bytes, end.size).await)? {
            Ok(None) => break,
            Ok(Some(outcome)) => outcome,
            Err(unreadable) => Err(unreadable),
        };
        let found = outcome.and_then(|header| follows(header, end, base, chain));
        let mut header = match choose(bytes, &ground, &mut scan, &mut mends, end, chain, found).await? {
            Ok(header) => header,
            Err(found) => {
                // What cannot be read now may be read at the next start: nothing is given up for it.
                if end.next < chain.gaps_below && found != BatchFault::Unreadable {
                    let (position, next) = ground.next_sound(end.size, end.next).await?;
                    if position < reach && next <= chain.gaps_below {
                        lost.push(Lost {
                            position: end.size,
                            end: position,
                            from: end.next,
                            next,
                            fault: found,
                        });
                        end = End { size: position, next };
                        continue;
                    }
                }
                fault = Some(found);
                break;
            }
        };
        let epoch = chain.epoch_of(&header);
        if header.leader_epoch != epoch {
            // What waits to be made equal in all copies says the other epoch, and would be written over it.
            mends.carry_out(bytes).await?;
            header.leader_epoch = epoch;
            restamp(bytes, &ground, end.size, epoch).await;
            restamped += 1;
        }
        let marker = match answered(name, scan.marker_at(ground.bytes, end.size, &header).await)? {
            Ok(marker) => marker,
            Err(unreadable) => {
                fault = Some(unreadable);
                break;
            }
        };
        index.add(&header, end.size, interval);
        replay.see(&header, marker);
        if header.is_transactional() {
            transactions_from.get_or_insert(header.base_offset);
        }
        opened.get_or_insert(header.max_timestamp);
        chain.epoch = header.leader_epoch;
        end = End { size: end.size + u64::from(header.size), next: header.next_offset() };
    }
    mends.carry_out(bytes).await?;
    if restamped > 0 {
        tracing::warn!(
            "{name}: {restamped} batches of segment {base} said a leader epoch in which they were not written"
        );
    }
    if mends.batches > 0 {
        bytes.healing().mended(mends.batches);
        tracing::warn!(
            "{name}: {} batches of segment {base} were not the same in all copies; they are now",
            mends.batches
        );
    }
    Ok(Scanned { end, index, opened, transactions_from, lost, fault })
}

/// What was read. That a disk does not answer is the fault of the batch it was asked for, and no other log's.
fn answered<T>(name: &dyn Display, read: Result<T>) -> Result<std::result::Result<T, BatchFault>> {
    match read {
        Ok(read) => Ok(Ok(read)),
        Err(error @ (Error::Device(_) | Error::File { .. })) => {
            tracing::warn!("{name}: {error}");
            Ok(Err(BatchFault::Unreadable))
        }
        Err(error) => Err(error),
    }
}

/// Batches that are good in one copy, side by side, to be made good in all.
#[derive(Default)]
struct Mends {
    at: u64,
    good: BytesMut,
    gathered: u64,
    /// Made good in all copies.
    batches: u64,
}

impl Mends {
    /// Bytes that are mended at once: each time costs a flush.
    const MOST: usize = 1 << 20;

    async fn add(&mut self, bytes: &Arc<dyn SegmentBytes>, at: u64, good: &Bytes) -> Result<()> {
        if self.at + self.good.len() as u64 != at || self.good.len() + good.len() > Self::MOST {
            self.carry_out(bytes).await?;
            self.at = at;
        }
        self.good.extend_from_slice(good);
        self.gathered += 1;
        Ok(())
    }

    /// A failure is one of recovery where copies may differ without a fault: what makes them equal later may copy the bad
    /// one. Elsewhere nothing does; the good one is durable with the flush that ends recovery, and reads find it.
    async fn carry_out(&mut self, bytes: &Arc<dyn SegmentBytes>) -> Result<()> {
        let (good, made) = (self.good.split().freeze(), std::mem::take(&mut self.gathered));
        if good.is_empty() {
            return Ok(());
        }
        let len = good.len() as u64;
        match bytes.mend(self.at, good).await {
            Ok(_) => self.batches += made,
            Err(error) if bytes.may_differ(self.at, len) => return Err(error),
            Err(error) => tracing::warn!("{made} batches are good in some copies only: {error}"),
        }
        Ok(())
    }
}

/// Looks at the other copies where one is not sound, or where they may differ: what is kept is what every later read
/// returns, from whichever copy. `Unreadable` is only what no copy answers.
async fn choose(
    bytes: &Arc<dyn SegmentBytes>,
    ground: &Ground<'_>,
    scan: &mut Scan,
    mends: &mut Mends,
    end: End,
    chain: &Chain<'_>,
    found: std::result::Result<Header, BatchFault>,
) -> Result<std::result::Result<Header, BatchFault>> {
    // What was read at once goes further than the batch: it may be readable by itself.
    if bytes.copies() == 1 && found != Err(BatchFault::Unreadable) {
        return Ok(found);
    }
    if let Ok(header) = &found {
        let len = u64::from(header.size);
        let is_sure = !bytes.may_differ(end.size, len)
            || answered(ground.name, bytes.agree(end.size, len).await)?.unwrap_or(false);
        if is_sure && !ground.is_odd(header, Some(end.next)) {
            return Ok(found);
        }
    }
    let best = match ground.best(end.size, Some(end.next)).await? {
        Ok(best) => best,
        Err(fault) => {
            let first = found.err().filter(|&found| found != BatchFault::Unreadable).unwrap_or(fault);
            return Ok(Err(told(ground, end, first).await?));
        }
    };
    let follows = follows(best.header, end, ground.base, chain);
    if follows.is_ok() {
        if bytes.copies() > 1 {
            mends.add(bytes, end.size, &best.bytes).await?;
        }
        scan.patch(end.size, best.bytes);
    }
    Ok(follows)
}

/// What is wrong at the end of what is good, as the copies tell that answer.
async fn told(ground: &Ground<'_>, end: End, fault: BatchFault) -> Result<BatchFault> {
    if fault != BatchFault::Unreadable || ground.bytes.copies() == 1 {
        return Ok(fault);
    }
    for copy in 0..ground.bytes.copies() {
        match ground.look(end.size, Some(end.next), Some(copy)).await? {
            Err(BatchFault::Unreadable) => {}
            // What it has is not sound, or it would have been taken.
            answer => return Ok(answer.err().unwrap_or(BatchFault::Empty)),
        }
    }
    Ok(fault)
}

/// What holds a batch to those before it.
struct Chain<'a> {
    /// The epoch of the batch before.
    epoch: i32,
    /// The newest that may have written.
    latest: i32,
    /// What wrote where, as the catalog has it.
    epochs: &'a Epochs,
    /// Before this offset compaction may have left gaps.
    gaps_below: i64,
}

impl Chain<'_> {
    /// The epoch in which a sound batch was written. Before the start of the log the catalog does not know it.
    fn epoch_of(&self, header: &Header) -> i32 {
        let said = || header.leader_epoch.clamp(self.epoch, self.latest.max(self.epoch));
        self.epochs.at(header.base_offset).unwrap_or_else(said)
    }
}

/// Writes the right leader epoch into a batch: durable with the flush that ends recovery. A disk that does not take it
/// changes nothing of what is served but this number.
async fn restamp(bytes: &Arc<dyn SegmentBytes>, ground: &Ground<'_>, position: u64, epoch: i32) {
    let (stamp, Ground { name, base, .. }) = (Bytes::copy_from_slice(&epoch.to_be_bytes()), ground);
    if let Err(error) = bytes.write(position + batch::FRAME as u64, stamp, Durability::Cached).await {
        tracing::warn!("{name}: byte {position} of segment {base} keeps a wrong leader epoch: {error}");
    }
}

/// Whether a sound batch may stand where it stands.
fn follows(
    header: Header,
    end: End,
    base: i64,
    chain: &Chain<'_>,
) -> std::result::Result<Header, BatchFault> {
    let (found, expected) = (header.base_offset, end.next);
    // Offsets and positions of a segment fit 32 bits, relative to its base; more than that was never written.
    let fits = header.next_offset() > expected
        && header.last_offset() - base <= i64::from(i32::MAX)
        && u32::try_from(end.size).is_ok();
    let in_place = found == expected || (found > expected && header.next_offset() <= chain.gaps_below);
    if !in_place || !fits {
        return Err(BatchFault::BaseOffset { found, expected });
    }
    Ok(header)
}

async fn recover(
    context: &Arc<Context>,
    id: PartitionId,
    mut record: PartitionRecord,
    config: Arc<TopicConfig>,
    found: Vec<Found>,
) -> Result<Opened> {
    let (now, epochs) = (context.wall_clock(), record.epochs.clone());
    if found.is_empty() {
        // Nothing is left of what there was.
        let known = record.clean.map_or(0, |clean| clean.end).max(record.recovery_point);
        record.log_start = record.log_start.max(known);
    }
    let trusted = found
        .windows(2)
        .take_while(|pair| pair[0].sealed.is_some() && pair[1].base <= record.recovery_point)
        .count();
    let mut segments = Vec::with_capacity(found.len());
    for pair in found.windows(2).take(trusted) {
        let size = pair[0].sealed.unwrap_or_default();
        segments.push(closed(&id, &record, &pair[0], End { size, next: pair[1].base }, now));
    }
    let mut replay = Replay::after(context, id.key, &segments, now).await.unwrap_or_else(|error| {
        // Known producers are a convenience; records are not to be withheld for want of them.
        tracing::warn!("producers of {}-{} are known in part: {error}", id.topic, id.key.partition);
        Replay::new(Producers::default(), now)
    });
    let mut unsealed: Vec<Unsealed> = Vec::new();
    let mut appender = Appender { ready: true, ..Appender::default() };
    let (latest, gaps_below) = (record.epoch, record.recovery_point);
    let mut chain = Chain { epoch: -1, latest, epochs: &epochs, gaps_below };
    let mut log_end = record.log_start;
    let mut rest = found.into_iter().skip(trusted).collect::<VecDeque<_>>();
    while let Some(here) = rest.pop_front() {
        let reach = here.sealed.map_or(here.reach, |sealed| sealed.min(here.reach));
        let interval = config.index_interval_bytes as u64;
        let ground = Ground {
            name: &id,
            bytes: &*here.bytes,
            base: here.base,
            end: End { size: reach, next: i64::MAX },
            epochs: Some(&epochs),
            ended: Some(chain.gaps_below),
        };
        let mut scanned = scan(&here.bytes, ground, interval, &mut chain, &mut replay).await?;
        let next = rest.front().map(|next| next.base);
        let (end, lost) = end_of(&mut scanned, here.sealed.map(|_| reach), next, record.recovery_point);
        let written = here.written.filter(|_| here.sealed.is_some() || here.exact);
        let whole = segment(&id, &here, Arc::clone(&here.bytes), end, written, now);
        log_end = end.next;
        if scanned.end.size > 0 || scanned.fault != Some(BatchFault::Unreadable) {
            whole.bytes.found();
        }
        for lost in lost {
            whole.lose(lost);
        }
        whole.open_index(scanned.index);
        whole.aborted.open(std::mem::take(&mut replay.aborted));
        record.transactions_from = record.transactions_from.or(scanned.transactions_from);
        segments.push(Arc::clone(&whole));
        if scanned.fault == Some(BatchFault::Unreadable) {
            let behind = rest.into_iter().map(|found| found.bytes).collect();
            let withheld =
                Withheld { offset: log_end, segment: here.base, position: scanned.end.size, behind };
            let first_open = replay.producers.first_open();
            return Ok(withhold(context, id, record, config, segments, log_end, first_open, withheld));
        }
        if rest.front().is_some_and(|next| next.base == log_end) {
            // A file's length does not tell whether it was sealed: above the recovery point it was not.
            unsealed.push((whole, replay.producers.snapshot()));
            continue;
        }
        report(&id, here.base, end, scanned.fault, rest.len());
        if here.reach > end.size {
            here.bytes.cut(end.size).await?;
        }
        // A sealed segment is never appended to again.
        if whole.sealed && !here.exact {
            whole.close_index(&context.indexes);
        } else {
            appender.active = Some(Active::found(whole, scanned.opened, now));
        }
        for lost in rest.drain(..) {
            lost.bytes.erase().await?;
        }
    }
    if log_end <= record.log_start {
        // All records were deleted, or the tail was lost up to before the log's start: nothing that is left belongs to it.
        for segment in segments.drain(..) {
            segment.bytes.erase().await?;
        }
        appender.active = None;
        unsealed.clear();
        log_end = record.log_start;
        replay.know_kept(kept_at_start(context, id.key)?);
    }
    if let Some(first) = segments.first() {
        record.log_start = record.log_start.max(first.base);
    }
    let first_open = replay.producers.first_open();
    appender.producers = replay.producers;
    record.clean = None;
    record.swap = None;
    record.cleaned = record.cleaned.min(log_end);
    record.epoch = record.epoch.max(chain.epoch).saturating_add(1);
    record.epochs.begin(record.epoch, log_end);
    record.recovery_point = record.recovery_point.min(log_end);
    let progress = Progress::opened(log_end, first_open);
    let partition = assemble(context, id, record, config, segments, progress, appender, None);
    Ok(Opened { partition, scanned: true, recovered: true, unsealed })
}

/// Where a segment that was scanned ends, and what of it is lost: below the recovery point nothing is cut. `closed`: its
/// bytes, if it was closed; `next`: where the segment behind it begins, if there is one.
fn end_of(
    scanned: &mut Scanned,
    closed: Option<u64>,
    next: Option<i64>,
    recovery_point: i64,
) -> (End, Vec<Lost>) {
    let (mut end, mut lost) = (scanned.end, std::mem::take(&mut scanned.lost));
    let due = next.unwrap_or(recovery_point);
    if end.next >= due || due > recovery_point {
        return (end, lost);
    }
    match scanned.fault {
        // It may be read at the next start.
        Some(BatchFault::Unreadable) => {}
        Some(fault) => {
            // Up to where it was closed, if that is known.
            let tail = closed.map_or(end.size, |reach| reach.max(end.size));
            lost.push(Lost { position: end.size, end: tail, from: end.next, next: due, fault });
            end = End { size: tail, next: due };
        }
        // The records between were compacted away.
        None if next.is_some() => end.next = due,
        None => {}
    }
    (end, lost)
}

fn report(id: &PartitionId, base: i64, end: End, fault: Option<BatchFault>, lost: usize) {
    let (topic, partition, End { size, next }) = (&id.topic, id.key.partition, end);
    match fault {
        // What was never written reads as zeroes: the usual end on a volume.
        None | Some(BatchFault::Zeroes) if lost == 0 => {
            tracing::info!("{topic}-{partition}: checked segment {base}, the log ends at {next}");
        }
        fault => {
            let reason =
                fault.map_or_else(|| "the next segment does not follow".to_owned(), |f| f.to_string());
            tracing::warn!(
                "{topic}-{partition}: the log is cut at offset {next}, byte {size} of segment {base}, \
                 with {lost} later segments: {reason}"
            );
        }
    }
}

#[allow(clippy::too_many_arguments)] // it is what a partition is made of
fn assemble(
    context: &Arc<Context>,
    id: PartitionId,
    record: PartitionRecord,
    config: Arc<TopicConfig>,
    segments: Vec<Arc<Segment>>,
    progress: Progress,
    appender: Appender,
    withheld: Option<Withheld>,
) -> Arc<Partition> {
    let visible: Visible = progress.visible();
    Arc::new(Partition {
        id,
        context: Arc::clone(context),
        config: RwLock::new(config),
        log: RwLock::new(Log { start: record.log_start, segments }),
        cleanings: AtomicU64::new(record.swap.map_or(0, |swap| swap.turn)),
        record: Mutex::new(record),
        progress: Mutex::new(progress),
        visible: watch::Sender::new(visible),
        in_flight: OnceLock::new(),
        appender: Arc::new(tokio::sync::Mutex::new(appender)),
        maintenance: tokio::sync::Mutex::new(()),
        sealing: Mutex::new(VecDeque::new()),
        deleted: AtomicBool::new(false),
        withheld: withheld.map(Box::new),
    })
}

#[cfg(test)]
mod tests;
