//! What the catalog keeps: keys as fixed bytes (so that a range is a topic or a partition), values as JSON (so that
//! no byte sequence can do worse than fail to parse, and fields can be added).
//!
//! ```text
//! meta        "format" · "cluster_id" · "next_producer_id" · "log_scrub"
//! topics      topic id (16)                                        TopicRecord
//! partitions  topic id · partition u32                             PartitionRecord; absent: empty and clean
//! segments    topic id · partition u32 · base offset i64           SegmentRecord (in directories: checksums of the
//!                                                                      files beside a closed segment)
//! blobs       segment key · kind u8                                small index and snapshot bytes (volumes only)
//!             topic id · partition u32                             the producers as they were where the log's first segment
//!                                                                      begins, if no segment is left that keeps a snapshot
//! dying       topic id                                             directories still to be removed (directories only)
//! ```
//! Numbers in keys are big-endian, so that keys sort as numbers do; offsets are never negative.

use crate::epochs::Epochs;
use crate::volume::extent::Extent;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Version of the records.
pub(crate) const FORMAT: u32 = 1;

/// A table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    Meta,
    Topics,
    Partitions,
    Segments,
    Blobs,
    Dying,
}

/// Which partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PartitionKey {
    pub(crate) topic: Uuid,
    pub(crate) partition: u32,
}

impl PartitionKey {
    pub(crate) fn bytes(self) -> Vec<u8> {
        [self.topic.as_bytes().as_slice(), &self.partition.to_be_bytes()].concat()
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let topic = Uuid::from_bytes(bytes.get(..16)?.try_into().ok()?);
        let partition = u32::from_be_bytes(bytes.get(16..)?.try_into().ok()?);
        Some(Self { topic, partition })
    }
}

/// Which segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SegmentKey {
    pub(crate) partition: PartitionKey,
    pub(crate) base: i64,
}

impl SegmentKey {
    pub(crate) fn bytes(self) -> Vec<u8> {
        [self.partition.bytes().as_slice(), &self.base.to_be_bytes()].concat()
    }

    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let partition = PartitionKey::read(bytes.get(..20)?)?;
        let base = i64::from_be_bytes(bytes.get(20..)?.try_into().ok()?);
        (base >= 0).then_some(Self { partition, base })
    }

    pub(crate) fn blob(self, kind: Kind) -> Vec<u8> {
        let mut bytes = self.bytes();
        bytes.push(kind as u8);
        bytes
    }
}

/// What is derived from a segment and stored beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
pub(crate) enum Kind {
    /// The offset index of the segment.
    OffsetIndex = 0,
    /// The time index of the segment.
    TimeIndex = 1,
    /// The producers as they were at the segment's end.
    Snapshot = 2,
    /// The aborted transactions whose markers lie in the segment.
    TxnIndex = 3,
}

impl Kind {
    /// All there are.
    pub(crate) const ALL: [Self; 4] = [Self::OffsetIndex, Self::TimeIndex, Self::Snapshot, Self::TxnIndex];
}

/// A topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TopicRecord {
    pub(crate) name: String,
    pub(crate) id: Uuid,
    pub(crate) partitions: u32,
    pub(crate) config: BTreeMap<String, String>,
}

/// How a log ended when it was closed in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Clean {
    /// Offset after the last record.
    pub(crate) end: i64,
    /// Bytes of the last segment.
    pub(crate) size: u64,
    /// First offset of the oldest open transaction: consumers need it before anything is read.
    #[serde(default)]
    pub(crate) first_open: Option<i64>,
    /// When the first batch of the last segment came, by the broker's clock, in milliseconds; absent where it is empty, or
    /// nothing will be appended to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) since: Option<i64>,
}

/// A compacted segment that takes the place of all with records of its offsets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Swap {
    /// Its base offset.
    pub(crate) base: i64,
    /// Where the next segment begins.
    pub(crate) end: i64,
    /// Which attempt it was, in this partition: the same segments may be compacted again, and what that leaves half-done
    /// must not be taken for what was decided.
    #[serde(default)]
    pub(crate) turn: u64,
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PartitionRecord {
    /// First offset held.
    pub(crate) log_start: i64,
    /// Segments that end at or before it are whole and durable.
    pub(crate) recovery_point: i64,
    /// The epoch to stamp.
    pub(crate) epoch: i32,
    /// Where each epoch began.
    pub(crate) epochs: Epochs,
    /// Present when nothing was appended since a stop in order.
    pub(crate) clean: Option<Clean>,
    /// Below it compaction has looked at every record.
    #[serde(default)]
    pub(crate) cleaned: i64,
    /// In a directory, the files that took the place of others last.
    #[serde(default)]
    pub(crate) swap: Option<Swap>,
    /// No transactional batch or marker lies below; absent: there never was one.
    #[serde(default)]
    pub(crate) transactions_from: Option<i64>,
}

impl Default for PartitionRecord {
    fn default() -> Self {
        Self {
            log_start: 0,
            recovery_point: 0,
            epoch: 0,
            epochs: Epochs::default(),
            clean: Some(Clean { end: 0, size: 0, first_open: None, since: None }),
            cleaned: 0,
            swap: None,
            transactions_from: None,
        }
    }
}

/// Where derived bytes of a segment lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlobRecord {
    pub(crate) len: u64,
    pub(crate) crc: u32,
    /// Absent: in the table `blobs`.
    pub(crate) at: Option<Extent>,
}

/// A segment on a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentRecord {
    /// Its bytes, in order.
    pub(crate) extents: Vec<Extent>,
    /// Its size once it was closed.
    pub(crate) sealed: Option<u64>,
    /// When it was last appended to before it was closed, in milliseconds since the epoch, if no record has a timestamp.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) written: Option<i64>,
    pub(crate) blobs: BTreeMap<Kind, BlobRecord>,
}

impl SegmentRecord {
    /// Bytes of the volume that it claims.
    pub(crate) fn held(&self) -> u64 {
        let blobs = self.blobs.values().filter_map(|blob| blob.at.as_ref());
        self.extents.iter().chain(blobs).map(|extent| extent.len).sum()
    }
}
