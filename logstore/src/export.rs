//! Copies of partitions in Kafka's own layout, for Kafka and its tools: what `broker log export` writes.
//!
//! ```text
//! <topic>-<partition>/<base, 20 digits>.log .index .timeindex .txnindex   <end, 20 digits>.snapshot
//!                     leader-epoch-checkpoint   partition.metadata
//! recovery-point-offset-checkpoint   log-start-offset-checkpoint   meta.properties
//! ```
//!
//! Batches are copied as they are, up to the last sound one; damaged ones between sound ones too, and told. Indexes are
//! made anew from the batches, never copied. Everything is durable before the checkpoints that speak of it are written.
//!
//! Cost: the log is read twice, once to find its end and to make the indexes, once to copy it; the second time it is
//! mostly in memory.

use crate::directory::names;
use crate::directory::offline::{self, Writer};
use crate::error::Result;
use crate::index::Index;
use crate::inspect::track::Track;
use crate::inspect::walk::{Step, Walk};
use crate::inspect::{Finding, Inspection, PartitionView, SegmentView, Severity};
use crate::transactions::{Aborted, encode};
use bytes::Bytes;
use std::fmt::Write as _;
use std::path::Path;
use uuid::Uuid;

/// Bytes copied at once.
const CHUNK: u64 = 1 << 20;

/// Exports the partitions that `wanted` picks to the directory `to`; `progress` is told of bytes as they are done. The
/// findings say what was damaged.
pub async fn export(
    inspection: &Inspection,
    to: &Path,
    force: bool,
    wanted: &(dyn Fn(&PartitionView) -> bool + Sync),
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<Vec<Finding>> {
    offline::target(to, force).await?;
    let mut findings = Vec::new();
    let (mut ends, mut starts) = (Vec::new(), Vec::new());
    for view in inspection.partitions.iter().filter(|view| wanted(view)) {
        let end = partition(view, to, &mut findings, progress).await?;
        ends.push((view, end));
        if view.segments.first().is_some_and(|first| view.log_start > first.base) {
            starts.push((view, view.log_start));
        }
    }
    offline::sync_names(to).await?;
    for (name, rows) in
        [("recovery-point-offset-checkpoint", &ends), ("log-start-offset-checkpoint", &starts)]
    {
        offline::write_whole(to.join(name), checkpoint(rows)).await?;
    }
    if let Some(cluster) = &inspection.cluster_id {
        // The directory's id only has to differ from those of its neighbours: the place it came from names it.
        let id = Uuid::from_u128(u128::from(crc32c::crc32c(inspection.place.as_bytes())) << 64 | 0x4000_8000);
        let text =
            format!("cluster.id={cluster}\ndirectory.id={}\nnode.id=1\nversion=1\n", names::base64_id(id));
        offline::write_whole(to.join("meta.properties"), text.into()).await?;
    }
    offline::sync_names(to).await?;
    Ok(findings)
}

fn checkpoint(rows: &[(&PartitionView, i64)]) -> Bytes {
    let mut text = format!("0\n{}\n", rows.len());
    for (view, offset) in rows {
        // Writing to a String cannot fail.
        let _infallible = writeln!(text, "{} {} {offset}", view.topic, view.partition);
    }
    text.into()
}

/// Exports one partition; returns the offset after its last record.
async fn partition(
    view: &PartitionView,
    to: &Path,
    findings: &mut Vec<Finding>,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<i64> {
    let dir = to.join(view.name());
    offline::fresh_dir(&dir).await?;
    let mut track = Track::default();
    let mut end = view.log_start;
    for segment in &view.segments {
        let made = scan(view, segment, &mut track, findings).await?;
        let file = |extension| names::offset_file(&dir, segment.base, extension);
        let writer = Writer::create(file("log")).await?;
        let walk = Walk::new(segment)?;
        let mut at = 0;
        while at < made.size {
            let n = (made.size - at).min(CHUNK);
            writer.append(walk.raw(at, n as usize).await?).await?;
            at += n;
            progress(n);
        }
        writer.finish().await?;
        progress(segment.len - made.size);
        let (offsets, times) = made.index.encode();
        offline::write_whole(file("index"), offsets).await?;
        offline::write_whole(file("timeindex"), times).await?;
        if !made.aborted.is_empty() {
            offline::write_whole(file("txnindex"), encode(&made.aborted)).await?;
        }
        end = made.next;
    }
    for (at, snapshot) in view.snapshots.iter().filter(|(at, _)| *at <= end) {
        let bytes = snapshot.read().await?;
        match snapshot.fault(&bytes) {
            None => offline::write_whole(names::offset_file(&dir, *at, "snapshot"), bytes).await?,
            Some(what) => {
                let what = format!("the snapshot at {at} is left out: {what}");
                findings.push(view.finding(None, Severity::Fault, what));
            }
        }
    }
    offline::write_whole(dir.join("leader-epoch-checkpoint"), view.epoch_checkpoint().into()).await?;
    if let Some(id) = view.topic_id {
        offline::write_whole(dir.join("partition.metadata"), names::partition_metadata(id).into()).await?;
    }
    offline::sync_names(&dir).await?;
    Ok(end)
}

/// What a scan of a segment made.
struct Made {
    /// Bytes up to the end of the last batch.
    size: u64,
    /// Offset after it.
    next: i64,
    index: Index,
    aborted: Vec<Aborted>,
}

async fn scan(
    view: &PartitionView,
    segment: &SegmentView,
    track: &mut Track,
    findings: &mut Vec<Finding>,
) -> Result<Made> {
    let base = segment.base;
    let mut made = Made { size: 0, next: base, index: Index::new(base), aborted: Vec::new() };
    let mut walk = Walk::new(segment)?;
    while let Some(step) = walk.next().await? {
        let (position, what) = match step {
            Step::Batch { position, header, fault } => {
                if fault.is_none() {
                    let marker = if header.is_control() {
                        Some(walk.batch(position, &header, None).await?)
                    } else {
                        None
                    };
                    made.aborted.extend(track.see(&header, marker.as_deref()));
                    made.index.add(&header, position, view.index_interval);
                    made.next = header.next_offset();
                    made.size = position + u64::from(header.size);
                }
                (position, fault.map(|fault| format!("a damaged batch is copied as it is: {fault}")))
            }
            Step::Gap { zeroes: true, end, .. } if end == segment.len && !segment.exact => break,
            Step::Gap { position, end, fault, .. } => {
                let done = if end == segment.len { "left out" } else { "copied as they are" };
                (position, Some(format!("{} bytes that are no batch are {done}: {fault}", end - position)))
            }
        };
        if let Some(what) = what {
            let finding = view.finding(Some(base), Severity::Fault, what);
            let offsets = Some((made.next, made.next));
            findings.push(Finding { position: Some(position), offsets, ..finding });
        }
    }
    made.index.finish();
    Ok(made)
}
