//! Holding a partition against itself: each batch, each copy of it, what is derived from the log against the log, and
//! what the catalog says, the leader epochs among it, against what is there.
//!
//! Of a batch or of derived bytes that a copy does not have good, the finding names the bytes of the member's file, and
//! whether another copy is sound: then a store that is opened heals it.
//!
//! Cost: the log is read once, once more for each copy, and no record is unpacked but markers. Memory: the batches'
//! places of one segment, 24 bytes each.

use super::sidecars;
use super::source::{Damaged, Stored};
use super::track::Track;
use super::walk::{Step, Walk};
use super::{Finding, PartitionView, SegmentView, Severity};
use crate::batch::{BatchFault, Header};
use crate::error::Result;
use crate::transactions::Aborted;
use bytes::Bytes;
use serde::Serialize;
use std::collections::HashMap;

/// What was looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Segments.
    pub segments: u64,
    /// Batches, damaged ones included.
    pub batches: u64,
    /// Records in sound batches.
    pub records: u64,
    /// Bytes of batches.
    pub bytes: u64,
}

/// How to verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The time now, in milliseconds: later timestamps are noted. `None`: none is.
    pub now: Option<i64>,
}

/// A batch's place in a segment.
struct Placed {
    position: u64,
    last_offset: i64,
    max_timestamp: i64,
}

/// A verification of a partition under way.
struct Run<'a> {
    view: &'a PartitionView,
    options: Options,
    findings: Vec<Finding>,
    counts: Counts,
    track: Track,
    /// Offset that should follow; `None` before the first batch.
    next: Option<i64>,
    /// First offset that was seen.
    first: i64,
    epoch: i32,
    /// The last pair of a batch's epoch and the listed one that was told, so that a run of them is told once.
    epochs_told: Option<(i32, i32)>,
    /// Where segments end.
    ends_seen: Vec<i64>,
}

/// Verifies a partition; `progress` is told of bytes as they are done.
pub async fn verify(
    view: &PartitionView,
    options: Options,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<(Counts, Vec<Finding>)> {
    let first = view.segments.first().map_or(view.log_start, |segment| segment.base);
    let mut run = Run {
        view,
        options,
        findings: Vec::new(),
        counts: Counts::default(),
        track: Track::default(),
        next: None,
        first,
        epoch: -1,
        epochs_told: None,
        ends_seen: Vec::new(),
    };
    for (at, segment) in view.segments.iter().enumerate() {
        run.segment(segment, at + 1 == view.segments.len(), progress).await?;
    }
    run.other_snapshots().await;
    run.ends();
    Ok((run.counts, run.findings))
}

impl Run<'_> {
    fn tell(&mut self, segment: i64, severity: Severity, what: String) {
        let finding = self.view.finding(Some(segment), severity, what);
        self.findings.push(finding);
    }

    fn tell_at(
        &mut self,
        segment: i64,
        position: u64,
        offsets: Option<(i64, i64)>,
        severity: Severity,
        what: String,
    ) {
        let finding = self.view.finding(Some(segment), severity, what);
        self.findings.push(Finding { position: Some(position), offsets, ..finding });
    }

    async fn segment(
        &mut self,
        segment: &SegmentView,
        is_last: bool,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<()> {
        let base = segment.base;
        self.counts.segments += 1;
        if let Some(next) = self.next.filter(|&next| next != base && !(self.view.compacted && next < base)) {
            let what = format!("it starts at {base}, {next} should follow");
            self.tell(base, Severity::Fault, what);
        }
        let mut walk = match Walk::new(self.view, segment) {
            Ok(walk) => walk,
            Err(error) => {
                self.tell(base, Severity::Fault, error.to_string());
                return Ok(());
            }
        };
        let (mut placed, mut aborted): (Vec<Placed>, Vec<Aborted>) = (Vec::new(), Vec::new());
        self.next = Some(self.next.map_or(base, |next| next.max(base)));
        loop {
            let step = match walk.next().await {
                Ok(Some(step)) => step,
                Ok(None) => break,
                Err(error) => {
                    self.tell(base, Severity::Fault, format!("it cannot be read to its end: {error}"));
                    break;
                }
            };
            let (from, done) = match step {
                Step::Batch { position, header, fault, .. } => {
                    let end = position + u64::from(header.size);
                    let damaged =
                        walk.damaged(position, end, Some(&header).filter(|_| fault.is_none())).await?;
                    if fault.is_none() {
                        let is_fault = !walk.may_differ(position, end);
                        self.healable(base, position, &header, damaged, is_fault);
                        let is_marker = header.is_control();
                        let marker =
                            if is_marker { Some(walk.batch(position, &header).await?) } else { None };
                        aborted.extend(self.track.see(&header, marker.as_deref()));
                        self.batch(segment, position, &header, None);
                    } else {
                        self.batch(segment, position, &header, fault.map(|fault| (fault, damaged)));
                    }
                    // A damaged batch keeps its place: indexes point to it rightly.
                    placed.push(Placed {
                        position,
                        last_offset: header.last_offset(),
                        max_timestamp: header.max_timestamp,
                    });
                    (position, position + u64::from(header.size))
                }
                Step::Gap { position, end, fault, zeroes } => {
                    // But for space that was taken ahead.
                    if !(zeroes && end == segment.len && !segment.exact) {
                        let damaged = walk.damaged(position, end, None).await?;
                        self.gap(segment, is_last, position, end, fault, damaged);
                    }
                    (position, end)
                }
            };
            progress(done - from);
        }
        self.indexes(segment, &placed).await;
        self.transactions(segment, &aborted).await;
        let end = self.next.unwrap_or(base);
        self.ends_seen.push(end);
        self.snapshot(base, end, true).await;
        Ok(())
    }

    fn batch(
        &mut self,
        segment: &SegmentView,
        position: u64,
        header: &Header,
        fault: Option<(BatchFault, Vec<Damaged>)>,
    ) {
        let base = segment.base;
        let offsets = Some((header.base_offset, header.last_offset()));
        self.counts.batches += 1;
        self.counts.bytes += u64::from(header.size);
        let expected = self.next.unwrap_or(base);
        let is_sound = fault.is_none();
        if let Some((fault, damaged)) = fault {
            // Its own numbers are not to be believed.
            let offsets = Some((expected, expected));
            self.lost(base, position, offsets, Severity::Fault, &fault.to_string(), damaged);
        } else {
            self.counts.records += header.count.max(0) as u64;
            self.listed(base, position, header);
        }
        let found = header.base_offset;
        if found != expected && !(self.view.compacted && found > expected) {
            let what = BatchFault::BaseOffset { found, expected }.to_string();
            self.tell_at(base, position, offsets, Severity::Fault, what);
        }
        if is_sound && header.leader_epoch < self.epoch {
            let what = BatchFault::LeaderEpoch { found: header.leader_epoch, previous: self.epoch };
            self.tell_at(base, position, offsets, Severity::Fault, what.to_string());
        }
        if is_sound && self.options.now.is_some_and(|now| header.max_timestamp > now) {
            let what = format!("its timestamp, {}, lies in the future", header.max_timestamp);
            self.tell_at(base, position, offsets, Severity::Note, what);
        }
        if header.next_offset() > expected && header.last_offset() - base <= i64::from(i32::MAX) {
            self.next = Some(header.next_offset());
        }
        if is_sound {
            self.epoch = self.epoch.max(header.leader_epoch);
        }
    }

    /// Holds a sound batch against the list of leader epochs.
    fn listed(&mut self, base: i64, position: u64, header: &Header) {
        // Of what lies before the log's start, the list tells no more.
        let offset = header.base_offset.max(self.view.log_start);
        let (found, listed) = (header.leader_epoch, self.view.epochs.at(offset));
        let wrong = listed.filter(|&listed| listed != found).map(|listed| (found, listed));
        if let Some((found, listed)) = wrong.filter(|_| self.epochs_told != wrong) {
            let what = format!(
                "it was written in leader epoch {found}, the list of leader epochs has {listed} there"
            );
            let offsets = Some((header.base_offset, header.last_offset()));
            self.tell_at(base, position, offsets, Severity::Fault, what);
        }
        self.epochs_told = wrong;
    }

    /// Tells of a batch that is sound in some copy, and not in these.
    fn healable(&mut self, base: i64, position: u64, header: &Header, damaged: Vec<Damaged>, is_fault: bool) {
        if damaged.is_empty() {
            return;
        }
        let offsets = Some((header.base_offset, header.last_offset()));
        let (severity, what) = if is_fault {
            (Severity::Fault, format!("damaged: {}; another copy is sound", list(&damaged)))
        } else {
            let why = "an unclean stop left the copies apart, and the next start makes them equal";
            (Severity::Note, format!("not as in another copy, which is sound: {}; {why}", list(&damaged)))
        };
        let finding = self.view.finding(Some(base), severity, what);
        let finding = Finding { position: Some(position), offsets, damaged, healable: Some(true), ..finding };
        self.findings.push(finding);
    }

    /// Tells of bytes of which no copy is good.
    fn lost(
        &mut self,
        base: i64,
        position: u64,
        offsets: Option<(i64, i64)>,
        severity: Severity,
        what: &str,
        damaged: Vec<Damaged>,
    ) {
        let what = match &damaged[..] {
            [] => what.to_owned(),
            [one] => format!("{what}; {one}"),
            _ => format!("{what}; no copy is sound: {}", list(&damaged)),
        };
        let finding = self.view.finding(Some(base), severity, what);
        let finding =
            Finding { position: Some(position), offsets, damaged, healable: Some(false), ..finding };
        self.findings.push(finding);
    }

    fn gap(
        &mut self,
        segment: &SegmentView,
        is_last: bool,
        position: u64,
        end: u64,
        fault: BatchFault,
        damaged: Vec<Damaged>,
    ) {
        let reaches_end = end == segment.len;
        let bytes = end - position;
        let expected = self.next.unwrap_or(segment.base);
        let offsets = Some((expected, expected));
        if reaches_end && is_last && !segment.exact {
            let what = format!("{fault}; the next start cuts off {bytes} bytes from here on");
            self.tell_at(segment.base, position, offsets, Severity::Note, what);
            return;
        }
        let follows = if reaches_end { "nothing follows" } else { "a sound batch follows" };
        let what = format!("{bytes} bytes are no batch: {fault}; {follows}");
        self.lost(segment.base, position, offsets, Severity::Fault, &what, damaged);
        if !reaches_end {
            // The step over what is lost was told.
            self.next = None;
        }
    }

    /// Reads derived bytes, and tells if they are not what was stored.
    async fn stored(&mut self, base: i64, name: &str, stored: Option<&Stored>) -> Option<Bytes> {
        let stored = stored?;
        match stored.read_apart().await {
            Ok((bytes, damaged)) => {
                let fault = stored.fault(&bytes);
                let told = match &fault {
                    Some(what) => Some(format!("{name}: {what}")),
                    None if damaged.is_empty() => None,
                    None => Some(format!("{name}: damaged: {}; another copy is sound", list(&damaged))),
                };
                if let Some(what) = told {
                    let healable = (!damaged.is_empty()).then_some(fault.is_none());
                    let finding = self.view.finding(Some(base), Severity::Fault, what);
                    self.findings.push(Finding { damaged, healable, ..finding });
                }
                fault.is_none().then_some(bytes)
            }
            Err(error) => {
                self.tell(base, Severity::Fault, format!("{name}: {error}"));
                None
            }
        }
    }

    async fn indexes(&mut self, segment: &SegmentView, placed: &[Placed]) {
        let base = segment.base;
        let by_position: HashMap<u64, i64> =
            placed.iter().map(|placed| (placed.position, placed.last_offset)).collect();
        if let Some(bytes) = self.stored(base, "offset index", segment.index.as_ref()).await {
            let (entries, fault) = sidecars::offset_index(base, &bytes);
            let rises =
                entries.windows(2).all(|p| p[1].offset > p[0].offset && p[1].position > p[0].position);
            let wrong = entries
                .iter()
                .find(|entry| by_position.get(&u64::from(entry.position)) != Some(&entry.offset));
            let what =
                fault.or((!rises).then(|| "its entries do not rise".to_owned())).or(wrong.map(|entry| {
                    format!("offset {} does not end a batch at byte {}", entry.offset, entry.position)
                }));
            if let Some(what) = what {
                self.tell(base, Severity::Fault, format!("offset index: {what}"));
            }
        }
        if let Some(bytes) = self.stored(base, "time index", segment.time_index.as_ref()).await {
            let (entries, fault) = sidecars::time_index(base, &bytes);
            let by_offset: HashMap<i64, i64> =
                placed.iter().map(|placed| (placed.last_offset, placed.max_timestamp)).collect();
            let rises =
                entries.windows(2).all(|p| p[1].offset > p[0].offset && p[1].timestamp > p[0].timestamp);
            let wrong = entries.iter().find(|entry| by_offset.get(&entry.offset) != Some(&entry.timestamp));
            let what =
                fault.or((!rises).then(|| "its entries do not rise".to_owned())).or(wrong.map(|entry| {
                    format!("no batch that ends at offset {} has timestamp {}", entry.offset, entry.timestamp)
                }));
            if let Some(what) = what {
                self.tell(base, Severity::Fault, format!("time index: {what}"));
            }
        }
    }

    /// Of a log that was compacted, the batches may say less than the index: the marker of a transaction is still there when
    /// its first batches, or all, are gone.
    async fn transactions(&mut self, segment: &SegmentView, aborted: &[Aborted]) {
        let base = segment.base;
        let Some(bytes) = self.stored(base, "transaction index", segment.txn_index.as_ref()).await else {
            if segment.sealed && !aborted.is_empty() && segment.txn_index.is_none() {
                let what = format!("its index of {} aborted transactions is missing", aborted.len());
                self.tell(base, Severity::Fault, what);
            }
            return;
        };
        let (entries, fault) = sidecars::txn_index(&bytes);
        let stored = entries.iter().map(|one| (one.producer_id, one.first_offset, one.last_offset));
        let mut told = aborted.iter().map(|one| (one.producer_id, one.first_offset, one.last_offset));
        let same = if self.view.compacted {
            told.all(|(id, first, last)| {
                stored.clone().any(|one| one.0 == id && one.1 <= first && one.2 == last)
            })
        } else {
            stored.eq(told)
        };
        // Of transactions that began before the log's start, the first offset is not known.
        let known = aborted.len() == entries.len() || self.first == 0;
        let what = fault.or((known && !same).then(|| {
            format!("it has {} aborted transactions, the log says {} others", entries.len(), aborted.len())
        }));
        if let Some(what) = what {
            self.tell(base, Severity::Fault, format!("transaction index: {what}"));
        }
    }

    /// Snapshots at `end`; `is_of_log` if the producers up to there are known.
    async fn snapshot(&mut self, base: i64, end: i64, is_of_log: bool) {
        let Some((at, stored)) = self.view.snapshots.iter().find(|(at, _)| *at == end) else { return };
        let at = *at;
        let Some(bytes) = self.stored(base, &format!("snapshot at {at}"), Some(stored)).await else { return };
        let (entries, mut fault) = sidecars::snapshot(&bytes);
        if fault.is_none() {
            let ahead = entries.iter().find(|entry| entry.last_offset >= at);
            fault = ahead.map(|entry| format!("producer {} is ahead of it", entry.producer_id));
        }
        // Compaction may remove a producer's batches.
        if fault.is_none() && is_of_log && !self.view.compacted {
            fault = entries.iter().find_map(|entry| self.track.contradicts(entry, self.first));
        }
        if let Some(what) = fault {
            self.tell(base, Severity::Fault, format!("snapshot at {at}: {what}"));
        }
    }

    /// Those of earlier stops, in the middle of a segment, and those at offsets where nothing ends.
    async fn other_snapshots(&mut self) {
        for (at, _) in &self.view.snapshots {
            if !self.ends_seen.contains(at) {
                let base =
                    self.view.segments.iter().rev().map(|segment| segment.base).find(|base| base <= at);
                self.snapshot(base.unwrap_or(*at), *at, false).await;
            }
        }
    }

    /// What the partition's record says of its ends.
    fn ends(&mut self) {
        let end = self.next.unwrap_or(self.view.log_start);
        let mut told = Vec::new();
        if let Some(clean) = self.view.clean_end.filter(|&clean| clean != end) {
            // Compaction may have emptied the end.
            if !(self.view.compacted && clean > end) {
                told.push(format!("it was closed with its end at offset {clean}, and ends at {end}"));
            }
        }
        if self.view.log_start > end {
            told.push(format!("its log starts at {}, and ends at {end}", self.view.log_start));
        }
        if self.view.recovery_point > end && !self.view.compacted {
            told.push(format!(
                "it is on record as durable up to offset {}, and ends at {end}",
                self.view.recovery_point
            ));
        }
        if self.view.epochs.is_empty() && self.view.topic_id.is_some() && self.counts.records > 0 {
            let what = "no leader epoch is listed".to_owned();
            self.findings.push(self.view.finding(None, Severity::Note, what));
        }
        // Compaction may have emptied the end, and keeps its offset.
        let end = end.max(self.view.log_start).max(self.view.clean_end.unwrap_or(0));
        told.extend(self.view.epochs.fault(end));
        for what in told {
            self.findings.push(self.view.finding(None, Severity::Fault, what));
        }
        // Compaction may have emptied the end.
        let least = if self.view.compacted { self.view.recovery_point } else { 0 };
        let reach = end.max(self.view.clean_end.unwrap_or(least));
        for (of, offset) in self.view.checkpoints.iter().filter(|(_, offset)| *offset > reach) {
            let what = format!("{} says offset {offset}, and its log ends at {end}", of.file_name());
            self.findings.push(self.view.finding(None, Severity::Note, what));
        }
    }
}

/// Places, one after the other.
fn list(damaged: &[Damaged]) -> String {
    damaged.iter().map(Damaged::to_string).collect::<Vec<_>>().join(", ")
}
