//! Offline looks at a store, for tools: nothing is written, nothing is recovered, and what is damaged is told and
//! passed over.
//!
//! [`Inspection`] says what is there: partitions, segments, what is derived from them. `source` reads their bytes,
//! [`walk`] goes over the batches of a segment whatever is between them, [`sidecars`] reads Kafka's small formats,
//! `checkpoints` holds Kafka's offset checkpoints against the catalog, [`verify`] everything against everything else.
//!
//! Invariants: the catalog is opened as a copy in memory, so that even the database's own repair writes nothing; a
//! record that makes no sense costs that record, a catalog that cannot be read costs nothing in a directory, whose
//! names say what is there. On a volume there is no other map: then opening fails, and says why.
//!
//! A store that is open elsewhere is refused: what is read would change under the reader. A directory's lock is held
//! as long as the [`Inspection`] lives; a volume's members are the caller's to lock.

mod checkpoints;
pub mod sidecars;
pub mod source;
pub(crate) mod track;
pub mod verify;
pub mod walk;

use crate::batch;
use crate::catalog::records::{
    Clean, Kind, PartitionKey, PartitionRecord, SegmentKey, SegmentRecord, Table, TopicRecord,
};
use crate::catalog::{self, Tables, read_tables};
use crate::checkpoints::{Checkpoint, Marks};
use crate::directory::offline;
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::volume::copies::{Head, Versions};
use crate::volume::extent::{Extent, FreeSpace};
use crate::volume::journal::{Found as Journal, Segments};
use crate::volume::layout::Layout;
use raid::device::Device;
use serde::Serialize;
use serde::de::DeserializeOwned;
use source::{Damaged, Journaled, Place, Stored};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something is lost, or may be.
    Fault,
    /// Worth knowing; the next start sees to it, or it is only strange.
    Note,
}

/// Something that is not as it should be, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// The topic, if it concerns one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// The partition's number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<u32>,
    /// Base offset of the segment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment: Option<i64>,
    /// Byte position in the segment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<u64>,
    /// First and last offset concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offsets: Option<(i64, i64)>,
    /// Where copies are not as they should be, or, where no good one is known, where all of them lie.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<Damaged>,
    /// Whether another copy is sound, so that a store that is opened can heal it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healable: Option<bool>,
    /// What it is.
    pub what: String,
}

impl Finding {
    pub(crate) fn of_store(severity: Severity, what: String) -> Self {
        let (topic, partition, segment, position, offsets) = (None, None, None, None, None);
        let (damaged, healable) = (Vec::new(), None);
        Self { severity, topic, partition, segment, position, offsets, damaged, healable, what }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(topic), Some(partition)) = (&self.topic, self.partition) {
            write!(f, "{topic}-{partition}: ")?;
        }
        if let Some(segment) = self.segment {
            write!(f, "segment {segment}")?;
            if let Some(position) = self.position {
                write!(f, ", byte {position}")?;
            }
            match self.offsets {
                Some((first, last)) if first == last => write!(f, ", offset {first}: ")?,
                Some((first, last)) => write!(f, ", offsets {first} to {last}: ")?,
                None => write!(f, ": ")?,
            }
        }
        f.write_str(&self.what)
    }
}

/// A segment, as far as it is known without reading it.
#[derive(Debug)]
pub struct SegmentView {
    /// Offset of its first record, or less.
    pub base: i64,
    /// Bytes that may hold batches.
    pub len: u64,
    /// It was closed: nothing is appended to it.
    pub sealed: bool,
    /// Batches fill it to its last byte, or should.
    pub exact: bool,
    pub(crate) place: Place,
    /// Its offset index, if one is kept.
    pub index: Option<Stored>,
    /// Its time index.
    pub time_index: Option<Stored>,
    /// Its aborted transactions.
    pub txn_index: Option<Stored>,
}

/// A partition, as far as it is known without reading it.
#[derive(Debug)]
pub struct PartitionView {
    /// Its topic's name.
    pub topic: String,
    /// Its topic's id, where that is known.
    pub topic_id: Option<Uuid>,
    /// Its number.
    pub partition: u32,
    /// First offset held.
    pub log_start: i64,
    /// Everything below is on stable storage and was checked.
    pub recovery_point: i64,
    /// Offset after the last record, if the log was closed in order.
    pub clean_end: Option<i64>,
    /// Its segments, by base offset.
    pub segments: Vec<SegmentView>,
    /// Snapshots of its producers, by the offset they are at.
    pub snapshots: Vec<(i64, Stored)>,
    /// Below it compaction has looked at every record.
    pub cleaned: i64,
    /// What Kafka's offset checkpoints say of it, as far as the catalog does not say otherwise.
    pub checkpoints: Vec<(Checkpoint, i64)>,
    /// Compaction may have left gaps between its offsets.
    pub compacted: bool,
    pub(crate) index_interval: u64,
    pub(crate) epochs: Epochs,
}

impl PartitionView {
    /// `<topic>-<partition>`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}-{}", self.topic, self.partition)
    }

    /// The text of its `leader-epoch-checkpoint`.
    #[must_use]
    pub fn epoch_checkpoint(&self) -> String {
        self.epochs.checkpoint()
    }

    /// What offset checkpoints say of a copy that is durable up to `end`, and visible.
    pub(crate) fn marks(&self, end: i64) -> Marks {
        Marks {
            log_start: self.log_start,
            first_base: self.segments.first().map(|segment| segment.base),
            durable: end,
            high_watermark: end,
            cleaned: self.cleaned.min(end),
        }
    }

    /// Bytes that its segments may hold.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.len).sum()
    }

    pub(crate) fn finding(&self, segment: Option<i64>, severity: Severity, what: String) -> Finding {
        Finding {
            topic: Some(self.topic.clone()),
            partition: Some(self.partition),
            segment,
            ..Finding::of_store(severity, what)
        }
    }
}

/// A store, opened for looking only.
#[derive(Debug)]
pub struct Inspection {
    /// The volume or directory.
    pub place: String,
    /// The cluster's id, as Kafka prints it.
    pub cluster_id: Option<String>,
    /// All partitions, by topic and number.
    pub partitions: Vec<PartitionView>,
    /// What was wrong already while opening.
    pub findings: Vec<Finding>,
    _lock: Option<File>,
}

/// What the catalog says, read as far as it makes sense.
struct Known {
    cluster_id: Option<String>,
    topics: Vec<TopicRecord>,
    partitions: HashMap<PartitionKey, PartitionRecord>,
}

impl Known {
    fn read(tables: &Tables, findings: &mut Vec<Finding>) -> Self {
        let meta = tables.rows(Table::Meta).iter().find(|(key, _)| key == b"cluster_id");
        let cluster_id = meta.and_then(|(_, value)| serde_json::from_slice(value).ok());
        let topics = parse_rows::<TopicRecord>(tables, Table::Topics, findings);
        let mut partitions = HashMap::new();
        for (key, record) in parse_rows(tables, Table::Partitions, findings) {
            match PartitionKey::read(&key) {
                Some(key) => drop(partitions.insert(key, record)),
                None => findings.push(fault("the catalog: a partition's key is not one".to_owned())),
            }
        }
        Self { cluster_id, topics: topics.into_iter().map(|(_, topic)| topic).collect(), partitions }
    }
}

fn fault(what: String) -> Finding {
    Finding::of_store(Severity::Fault, what)
}

fn parse_rows<T: DeserializeOwned>(
    tables: &Tables,
    table: Table,
    findings: &mut Vec<Finding>,
) -> Vec<(Vec<u8>, T)> {
    let mut parsed = Vec::new();
    for (key, value) in tables.rows(table) {
        match serde_json::from_slice(value) {
            Ok(record) => parsed.push((key.clone(), record)),
            Err(error) => findings.push(fault(format!("the catalog: a record of {table:?}: {error}"))),
        }
    }
    parsed
}

/// Settings of a topic that matter here; Kafka's defaults where they are not set.
fn settings(record: &TopicRecord) -> (bool, u64) {
    let compacted = record.config.get("cleanup.policy").is_some_and(|policy| policy.contains("compact"));
    let interval = record.config.get("index.interval.bytes").and_then(|text| text.parse().ok());
    (compacted, interval.unwrap_or(4096))
}

fn view(topic: &str, topic_id: Option<Uuid>, partition: u32, record: &PartitionRecord) -> PartitionView {
    PartitionView {
        topic: topic.to_owned(),
        topic_id,
        partition,
        log_start: record.log_start,
        recovery_point: record.recovery_point,
        clean_end: record.clean.map(|clean| clean.end),
        segments: Vec::new(),
        snapshots: Vec::new(),
        cleaned: record.cleaned,
        checkpoints: Vec::new(),
        compacted: false,
        index_interval: 4096,
        epochs: record.epochs.clone(),
    }
}

impl Inspection {
    /// Opens the store on a volume. `device` may be read-only.
    pub async fn volume(device: Arc<dyn Device>) -> Result<Self> {
        let place = device.name().to_owned();
        let mut findings = Vec::new();
        let Some(Head { layout, .. }) = crate::volume::read_head(&device).await? else {
            return Err(Error::NotALogStore { place, found: "it is blank".to_owned() });
        };
        let versions = Versions::read(&device, layout.catalog.at, layout.catalog_len).await?;
        let content =
            catalog::choose(&place, &versions, layout.catalog.len).unwrap_or_else(|| versions.any());
        let tables = read_tables(&place, &content, &mut findings)?;
        let known = Known::read(&tables, &mut findings);
        let mut segments: BTreeMap<SegmentKey, SegmentRecord> = BTreeMap::new();
        for (key, record) in parse_rows(&tables, Table::Segments, &mut findings) {
            match SegmentKey::read(&key) {
                Some(key) => drop(segments.insert(key, record)),
                None => findings.push(fault("the catalog: a segment's key is not one".to_owned())),
            }
        }
        check_extents(&layout, &segments, &mut findings);
        let journaled = journaled(&device, &layout, &mut findings).await;
        let mut partitions = Vec::new();
        for topic in &known.topics {
            for partition in 0..topic.partitions {
                let key = PartitionKey { topic: topic.id, partition };
                let record = known.partitions.get(&key).cloned().unwrap_or_default();
                let mut view = view(&topic.name, Some(topic.id), partition, &record);
                (view.compacted, view.index_interval) = settings(topic);
                let from = SegmentKey { partition: key, base: 0 };
                let to = SegmentKey { partition: key, base: i64::MAX };
                let own: Vec<_> = segments.range(from..=to).collect();
                let volume =
                    OnVolume { device: &device, tables: &tables, layout: &layout, journaled: &journaled };
                on_volume(&volume, &mut view, &own, record.clean, &mut findings);
                partitions.push(view);
            }
        }
        let topics: Vec<Uuid> = known.topics.iter().map(|topic| topic.id).collect();
        for key in segments.keys().filter(|key| !topics.contains(&key.partition.topic)) {
            let PartitionKey { topic, partition } = key.partition;
            findings.push(fault(format!(
                "the catalog: segment {} of partition {partition} belongs to topic {topic}, which it does not know",
                key.base
            )));
        }
        partitions.sort_by(|a, b| (&a.topic, a.partition).cmp(&(&b.topic, b.partition)));
        Ok(Self { place, cluster_id: known.cluster_id, partitions, findings, _lock: None })
    }

    /// Opens the store in a directory, ours or (without a catalog) any that holds Kafka's partition directories.
    pub async fn directory(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let mut findings = Vec::new();
        let lock = offline::lock(path).await?;
        let content = offline::catalog(path).await?;
        let known = match content {
            Some(content) => match read_tables(&place, &content, &mut findings) {
                Ok(tables) => Some(Known::read(&tables, &mut findings)),
                Err(error) => {
                    findings
                        .push(fault(format!("{error}; topics and partitions are taken from the names here")));
                    None
                }
            },
            None => None,
        };
        let mut dirs = offline::partition_dirs(path).await?;
        if known.is_none() && findings.is_empty() && dirs.is_empty() {
            let found = "it has neither a catalog nor partitions".to_owned();
            return Err(Error::NotALogStore { place, found });
        }
        let mut partitions = Vec::new();
        for topic in known.iter().flat_map(|known| &known.topics) {
            for partition in 0..topic.partitions {
                let key = PartitionKey { topic: topic.id, partition };
                let record = known.as_ref().and_then(|known| known.partitions.get(&key));
                let record = record.cloned().unwrap_or_default();
                let mut view = view(&topic.name, Some(topic.id), partition, &record);
                (view.compacted, view.index_interval) = settings(topic);
                if let Some(dir) = dirs.remove(&(topic.name.clone(), partition)) {
                    in_directory(&mut view, &dir, &record, &mut findings).await?;
                } else {
                    let gone = "its directory is missing".to_owned();
                    findings.push(view.finding(None, Severity::Fault, gone));
                }
                partitions.push(view);
            }
        }
        let of_catalog = partitions.len();
        for ((topic, partition), dir) in dirs {
            let record = PartitionRecord { clean: None, ..Default::default() };
            let mut view = view(&topic, None, partition, &record);
            // Nothing says whether it was compacted: gaps are no reason for alarm.
            view.compacted = true;
            if known.is_some() {
                let stray = "its directory belongs to no topic of the catalog".to_owned();
                findings.push(view.finding(None, Severity::Note, stray));
            }
            in_directory(&mut view, &dir, &record, &mut findings).await?;
            view.log_start = view.segments.first().map_or(0, |segment| segment.base);
            partitions.push(view);
        }
        checkpoints::read(path, &mut partitions, of_catalog, &mut findings).await;
        partitions.sort_by(|a, b| (&a.topic, a.partition).cmp(&(&b.topic, b.partition)));
        let cluster_id = known.and_then(|known| known.cluster_id);
        Ok(Self { place, cluster_id, partitions, findings, _lock: lock })
    }
}

/// Holds the extents that the catalog gives out against each other and the volume.
fn check_extents(
    layout: &Layout,
    segments: &BTreeMap<SegmentKey, SegmentRecord>,
    findings: &mut Vec<Finding>,
) {
    let mut space = FreeSpace::new(layout.space);
    for (key, record) in segments {
        let blobs = record.blobs.values().filter_map(|blob| blob.at.as_ref());
        for extent in record.extents.iter().chain(blobs) {
            if let Err(misplaced) = space.claim(*extent) {
                let PartitionKey { topic, partition } = key.partition;
                findings.push(fault(format!(
                    "the catalog: segment {} of partition {partition} of topic {topic}: {misplaced}",
                    key.base
                )));
            }
        }
    }
}

/// What is in the journal only: the next start brings it to its places.
async fn journaled(device: &Arc<dyn Device>, layout: &Layout, findings: &mut Vec<Finding>) -> Segments {
    if layout.journal.len == 0 {
        return Segments::default();
    }
    match Journal::read(device, layout.journal, layout.store, false).await {
        Ok(Journal { gaps, segments, .. }) => {
            if gaps > 0 {
                findings.push(fault(format!(
                    "the journal: {gaps} records are damaged in all copies; what was appended by them is there if it had \
                     reached its place, and else the next start cuts their logs there"
                )));
            }
            segments
        }
        Err(error) => {
            findings.push(fault(format!("the journal: {error}; what is in it only is not shown")));
            Segments::default()
        }
    }
}

/// A volume that is looked at.
struct OnVolume<'a> {
    device: &'a Arc<dyn Device>,
    tables: &'a Tables,
    layout: &'a Layout,
    journaled: &'a Segments,
}

fn on_volume(
    volume: &OnVolume<'_>,
    view: &mut PartitionView,
    own: &[(&SegmentKey, &SegmentRecord)],
    clean: Option<Clean>,
    findings: &mut Vec<Finding>,
) {
    let OnVolume { device, tables, layout, journaled } = *volume;
    let place =
        |extents: Vec<Extent>, journaled| Place::Extents { device: Arc::clone(device), extents, journaled };
    for (at, (key, record)) in own.iter().enumerate() {
        let extents: Vec<Extent> =
            record.extents.iter().take_while(|e| layout.space.contains(e)).copied().collect();
        let room: u64 = extents.iter().map(|extent| extent.len).sum();
        let is_last = at + 1 == own.len();
        let known = record.sealed.or(clean.filter(|_| is_last).map(|clean| clean.size));
        if let Some(size) = known.filter(|&size| size > room) {
            let what = format!("its extents hold {room} bytes, the catalog says that it has {size}");
            findings.push(view.finding(Some(key.base), Severity::Fault, what));
        }
        let stored = |kind: Kind| {
            let blob = record.blobs.get(&kind)?;
            let place = match blob.at {
                Some(extent) if layout.space.contains(&extent) && blob.len <= extent.len => {
                    place(vec![extent], Journaled::default())
                }
                Some(_) => Place::Memory(bytes::Bytes::new()),
                None => Place::Memory(tables.get(Table::Blobs, &key.blob(kind))?.to_vec().into()),
            };
            Some(Stored { place, len: blob.len, crc: Some(blob.crc) })
        };
        let end = own.get(at + 1).map(|(next, _)| next.base).or(clean.map(|clean| clean.end));
        if let (Some(snapshot), Some(end)) = (stored(Kind::Snapshot), end) {
            view.snapshots.push((end, snapshot));
        }
        // What was closed was flushed first.
        let journaled = if record.sealed.is_none() { journaled.of(key) } else { &[] };
        view.segments.push(SegmentView {
            base: key.base,
            len: known.unwrap_or(room).min(room),
            sealed: record.sealed.is_some(),
            exact: known.is_some(),
            index: stored(Kind::OffsetIndex),
            time_index: stored(Kind::TimeIndex),
            txn_index: stored(Kind::TxnIndex),
            place: place(extents, journaled.into()),
        });
    }
}

async fn in_directory(
    view: &mut PartitionView,
    dir: &Path,
    record: &PartitionRecord,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let (files, clean) = (offline::partition_files(dir, record.swap).await?, record.clean);
    if files.is_half_swapped {
        let what = "a compacted segment is taking the place of others; the next start ends that".to_owned();
        findings.push(view.finding(record.swap.map(|swap| swap.base), Severity::Note, what));
    }
    if let Some(id) = &files.metadata {
        match (sidecars::topic_id(id), view.topic_id) {
            (Ok(found), None) => view.topic_id = Some(found),
            (Ok(found), Some(known)) if found == known => {}
            (Ok(_), Some(_)) => {
                let what = "partition.metadata has another topic's id".to_owned();
                findings.push(view.finding(None, Severity::Fault, what));
            }
            (Err(what), _) => {
                findings.push(view.finding(None, Severity::Fault, format!("partition.metadata: {what}")));
            }
        }
    } else {
        let what = "partition.metadata is missing".to_owned();
        findings.push(view.finding(None, Severity::Note, what));
    }
    if let Some(text) = &files.epochs {
        match sidecars::epochs(text) {
            Ok(entries) if view.epochs.checkpoint() != *text => {
                let (known, found) = (view.epochs.checkpoint().lines().count(), entries.len() + 2);
                // The catalog is ahead of its copy for a moment, and alone where there is none.
                if known > 2 && view.topic_id.is_some() {
                    let what = format!(
                        "leader-epoch-checkpoint is not what the catalog says ({found} lines, {known} there)"
                    );
                    findings.push(view.finding(None, Severity::Note, what));
                } else {
                    for &(epoch, start) in &entries {
                        view.epochs.begin(epoch, start);
                    }
                }
            }
            Ok(_) => {}
            Err(what) => {
                let what = format!("leader-epoch-checkpoint: {what}");
                findings.push(view.finding(None, Severity::Fault, what));
            }
        }
    }
    let count = files.logs.len();
    for (at, (base, log, len)) in files.logs.iter().enumerate() {
        let is_last = at + 1 == count;
        let known = clean.filter(|_| is_last).map(|clean| clean.size);
        if let Some(size) = known.filter(|size| size != len) {
            let what = format!("its file has {len} bytes, the catalog says that it has {size}");
            findings.push(view.finding(Some(*base), Severity::Fault, what));
        }
        let stored = |extension| {
            let path = offline::offset_file(dir, *base, extension);
            let (path, len) = files.sidecars.get(&path)?.clone();
            Some(Stored { place: Place::File(path), len, crc: None })
        };
        view.segments.push(SegmentView {
            base: *base,
            len: *len,
            sealed: !is_last,
            exact: !is_last || clean.is_some(),
            index: stored("index"),
            time_index: stored("timeindex"),
            txn_index: stored("txnindex"),
            place: Place::File(log.clone()),
        });
    }
    for (offset, path, len) in files.snapshots {
        view.snapshots.push((offset, Stored { place: Place::File(path), len, crc: None }));
    }
    Ok(())
}

/// A segment that is a file of its own, named as Kafka names it or otherwise.
pub async fn lone_segment(path: &Path) -> Result<SegmentView> {
    let len = offline::len(path).await?;
    let base = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
    Ok(SegmentView {
        base: base.unwrap_or(0),
        len,
        sealed: false,
        exact: false,
        place: Place::File(path.to_owned()),
        index: None,
        time_index: None,
        txn_index: None,
    })
}

/// Bytes of a small file, at most as many as an index may have.
pub async fn lone_file(path: PathBuf) -> Result<bytes::Bytes> {
    let len = offline::len(&path).await?;
    Stored { place: Place::File(path), len, crc: None }.read().await
}

/// Largest batch that tools take into memory.
pub(crate) const LARGEST_BATCH: u64 = 1 << 30;
const _: () = assert!(LARGEST_BATCH <= batch::MAX_BATCH);
