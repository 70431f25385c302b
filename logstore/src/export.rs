//! Copies of partitions in Kafka's own layout, for Kafka and its tools: what `broker log export` writes.
//!
//! ```text
//! <topic>-<partition>/<base, 20 digits>.log .index .timeindex .txnindex   <end, 20 digits>.snapshot
//!                     leader-epoch-checkpoint   partition.metadata
//! recovery-point-offset-checkpoint   log-start-offset-checkpoint   cleaner-offset-checkpoint
//! replication-offset-checkpoint      meta.properties
//! ```
//!
//! Batches are copied as they are, up to the last sound one; one that is bad in some copy from a sound one; one that is bad
//! in all, between sound ones, as it is, and told. Indexes are made anew from the batches, never copied. Everything is durable
//! before the checkpoints that speak of it are written.
//!
//! Cost: the log is read twice, once to find its end and to make the indexes, once to copy it; the second time it is
//! mostly in memory. Memory: a chunk, and a header for each batch that is taken from another copy than the first.

use crate::batch::Header;
use crate::checkpoints::{self, Checkpoint, Row};
use crate::directory::names;
use crate::directory::offline::{self, Writer};
use crate::error::Result;
use crate::ids;
use crate::index::Index;
use crate::inspect::track::Track;
use crate::inspect::walk::{Step, Walk};
use crate::inspect::{Finding, Inspection, PartitionView, SegmentView, Severity};
use crate::transactions::{Aborted, encode};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Bytes copied at once.
const CHUNK: u64 = 1 << 20;

/// What an export met.
#[derive(Debug, Default)]
pub struct Met {
    /// What was damaged, and is missing or damaged in what was written.
    pub findings: Vec<Finding>,
    /// Batches that one copy did not have good, and another did: they are good in what was written.
    pub healed: u64,
}

/// Exports the partitions that `wanted` picks to the directory `to`; `progress` is told of bytes as they are done.
pub async fn export(
    inspection: &Inspection,
    to: &Path,
    force: bool,
    wanted: &(dyn Fn(&PartitionView) -> bool + Sync),
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<Met> {
    offline::target(to, force).await?;
    let mut met = Met::default();
    let mut marks = Vec::new();
    for view in inspection.partitions.iter().filter(|view| wanted(view)) {
        let end = partition(view, to, &mut met, progress).await?;
        marks.push((view, view.marks(end)));
    }
    offline::sync_names(to).await?;
    for of in Checkpoint::ALL {
        let rows: Vec<Row<'_>> = marks
            .iter()
            .filter_map(|(view, marks)| Some((view.topic.as_str(), view.partition, marks.row(of)?)))
            .collect();
        offline::replace_whole(to.join(of.file_name()), checkpoints::text(&rows).into()).await?;
    }
    if let Some(cluster) = &inspection.cluster_id {
        // The directory's id only has to differ from those of its neighbours: the place it came from names it.
        let id = Uuid::from_u128(u128::from(crc32c::crc32c(inspection.place.as_bytes())) << 64 | 0x4000_8000);
        let text = format!("cluster.id={cluster}\ndirectory.id={}\nnode.id=1\nversion=1\n", ids::base64(id));
        offline::write_whole(to.join("meta.properties"), text.into()).await?;
    }
    offline::sync_names(to).await?;
    Ok(met)
}

/// Exports one partition; returns the offset after its last record.
async fn partition(
    view: &PartitionView,
    to: &Path,
    met: &mut Met,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<i64> {
    let dir = to.join(view.name());
    offline::fresh_dir(&dir).await?;
    let mut track = Track::default();
    let mut end = view.log_start;
    for segment in &view.segments {
        let made = scan(view, segment, &mut track, &mut met.findings).await?;
        let file = |extension| names::offset_file(&dir, segment.base, extension);
        copy(&Walk::new(view, segment)?, &made, file("log"), progress).await?;
        met.healed += made.healed.len() as u64;
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
                met.findings.push(view.finding(None, Severity::Fault, what));
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

/// Copies the batches of a segment to a file.
async fn copy(walk: &Walk, made: &Made, path: PathBuf, progress: &mut (dyn FnMut(u64) + Send)) -> Result<()> {
    let writer = Writer::create(path).await?;
    let (mut at, mut healed) = (0, made.healed.iter().peekable());
    while at < made.size {
        let bytes = if let Some((_, header)) = healed.next_if(|(position, _)| *position == at) {
            walk.batch(at, header).await?
        } else {
            let end = healed.peek().map_or(made.size, |(position, _)| *position);
            walk.raw(at, (end - at).min(CHUNK) as usize).await?
        };
        let n = bytes.len() as u64;
        writer.append(bytes).await?;
        at += n;
        progress(n);
    }
    writer.finish().await
}

/// What a scan of a segment made.
struct Made {
    /// Bytes up to the end of the last batch.
    size: u64,
    /// Offset after it.
    next: i64,
    index: Index,
    aborted: Vec<Aborted>,
    /// Batches that are to be taken from another copy than the first, and where they stand.
    healed: Vec<(u64, Header)>,
}

async fn scan(
    view: &PartitionView,
    segment: &SegmentView,
    track: &mut Track,
    findings: &mut Vec<Finding>,
) -> Result<Made> {
    let base = segment.base;
    let mut made =
        Made { size: 0, next: base, index: Index::new(base), aborted: Vec::new(), healed: Vec::new() };
    let mut walk = Walk::new(view, segment)?;
    while let Some(step) = walk.next().await? {
        let (position, what) = match step {
            Step::Batch { position, header, fault, healed } => {
                if healed {
                    made.healed.push((position, header));
                }
                if fault.is_none() {
                    let is_marker = header.is_control();
                    let marker = if is_marker { Some(walk.batch(position, &header).await?) } else { None };
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
