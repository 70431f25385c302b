//! What can go wrong in this crate: one enum, a variant a cause, each carrying what the reader needs to act.
//! The broker turns a cause into a Kafka error code in one function of its own; nothing here knows that protocol.
//!
//! Errors are cheap to clone: one failed flush fails every append that waited for it.

use crate::batch::BatchFault;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// A cause of failure.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The volume failed an operation.
    #[error(transparent)]
    Device(#[from] raid::Error),
    /// The file system failed an operation in the data directory.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was being done, as a verb phrase.
        action: &'static str,
        /// The file or directory concerned.
        path: PathBuf,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
    /// The volume or directory holds something else; it was left as it is.
    #[error("{place} holds data that is not a log store; give an empty one, or wipe it first ({found})")]
    NotALogStore {
        /// The volume or directory.
        place: String,
        /// What was found there.
        found: String,
    },
    /// Both copies of the header, or the structure it describes, are damaged.
    #[error("{place}: the log store's header is damaged: {reason}")]
    DamagedHeader {
        /// The volume.
        place: String,
        /// Which check failed.
        reason: String,
    },
    /// Written by a later version of this program.
    #[error("{place} was written in format {found}; this program reads up to {supported}: use a newer one")]
    UnsupportedFormat {
        /// The volume or directory.
        place: String,
        /// The version found.
        found: u32,
        /// The latest version understood.
        supported: u32,
    },
    /// The volume cannot hold a store. Units: bytes.
    #[error("{place} is too small for a log store: {size} bytes, at least {needed} are needed")]
    TooSmall {
        /// The volume.
        place: String,
        /// Its size.
        size: u64,
        /// The least size.
        needed: u64,
    },
    /// Another process holds the data directory.
    #[error("{path} is in use by another process; stop it first")]
    InUse {
        /// The data directory.
        path: PathBuf,
    },
    /// The catalog could not be read or changed.
    #[error("the catalog of {place} failed: {reason}")]
    Catalog {
        /// The volume or directory.
        place: String,
        /// What the database said.
        reason: String,
    },
    /// The catalog holds a record that makes no sense.
    #[error("the catalog of {place} is damaged: {what}")]
    DamagedCatalog {
        /// The volume or directory.
        place: String,
        /// Which record, and what is wrong with it.
        what: String,
    },
    /// The reserved region of the catalog is full. Units: bytes.
    #[error(
        "the catalog of {place} is full ({capacity} bytes): delete topics, or make a store with a larger catalog"
    )]
    CatalogFull {
        /// The volume.
        place: String,
        /// Size of the region.
        capacity: u64,
    },
    /// An earlier flush or catalog write failed, so nothing more can be promised until the store is reopened.
    #[error("the store refuses changes since an earlier failure: {cause}")]
    Poisoned {
        /// The first failure.
        cause: Box<Error>,
    },
    /// Appends cannot be written to where they are read. No damage: what was committed of them is in the volume's journal.
    #[error(
        "appends that wait for their place on {place} cannot be written there: {cause}; what was committed of them is safe in \
         the journal, and is written there as soon as that can be done, at the next start if not before"
    )]
    Unplaced {
        /// The volume.
        place: String,
        /// Why.
        cause: Box<raid::Error>,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
    /// No space for records is left. Reads and deletes go on.
    #[error(
        "{place} is full: {free} bytes are free, {wanted} are needed; delete topics or shorten retention"
    )]
    NoSpace {
        /// The volume.
        place: String,
        /// Bytes free for records.
        free: u64,
        /// Bytes asked for.
        wanted: u64,
    },
    /// A topic name that Kafka does not allow.
    #[error("topic name {name:?} is not allowed: {reason}")]
    InvalidTopicName {
        /// The name.
        name: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// A topic of that name, or one that collides with it, exists.
    #[error("topic {name} exists already")]
    TopicExists {
        /// The existing topic.
        name: String,
    },
    /// There is no such topic.
    #[error("there is no topic {name}")]
    UnknownTopic {
        /// The name asked for.
        name: String,
    },
    /// A partition count outside the bounds.
    #[error("a topic cannot have {count} partitions: at least 1, at most {max}")]
    InvalidPartitionCount {
        /// What was asked.
        count: u32,
        /// The limit.
        max: u32,
    },
    /// A configuration key that Kafka does not know for topics.
    #[error("unknown topic configuration key {key}")]
    UnknownConfig {
        /// The key.
        key: String,
    },
    /// A configuration value that its key does not allow.
    #[error("{value:?} is not allowed for {key}: {reason}")]
    InvalidConfig {
        /// The key.
        key: String,
        /// The value as given.
        value: String,
        /// What is allowed.
        reason: String,
    },
    /// A producer sent something that is not a well-formed batch. Nothing was appended.
    #[error("{topic}-{partition}: a batch was refused: {fault}")]
    InvalidBatch {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// What is wrong with it.
        fault: BatchFault,
    },
    /// A batch over `max.message.bytes`. Units: bytes.
    #[error("{topic}-{partition}: a batch of {size} bytes is over max.message.bytes, {max}")]
    BatchTooLarge {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// Its size.
        size: u64,
        /// The limit.
        max: u64,
    },
    /// A record's timestamp is too far from the broker's clock. Units: milliseconds since the epoch.
    #[error(
        "{topic}-{partition}: timestamp {timestamp} is outside {earliest}..={latest}, see message.timestamp.*.max.ms"
    )]
    InvalidTimestamp {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// The batch's timestamp.
        timestamp: i64,
        /// Least allowed.
        earliest: i64,
        /// Most allowed.
        latest: i64,
    },
    /// A gap or a step back in a producer's sequence numbers.
    #[error(
        "{topic}-{partition}: producer {producer_id} epoch {epoch} sent sequence {found}, expected {expected}"
    )]
    OutOfOrderSequence {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// Producer.
        producer_id: i64,
        /// Its epoch.
        epoch: i16,
        /// The sequence number that would follow.
        expected: i32,
        /// The one that came.
        found: i32,
    },
    /// A producer that a newer one with the same id has replaced.
    #[error("{topic}-{partition}: producer {producer_id} is fenced: epoch {found} is older than {current}")]
    FencedProducer {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// Producer.
        producer_id: i64,
        /// The epoch that came.
        found: i16,
        /// The newest known epoch.
        current: i16,
    },
    /// A batch outside its producer's transaction, which is open.
    #[error(
        "{topic}-{partition}: producer {producer_id} has a transaction open since offset {first_offset} and sent a \
         batch that is not part of it"
    )]
    InTransaction {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// Producer.
        producer_id: i64,
        /// Where its transaction begins.
        first_offset: i64,
    },
    /// A marker from a transaction coordinator that a newer one has replaced.
    #[error(
        "{topic}-{partition}: a marker for producer {producer_id} was refused: coordinator epoch {found} is older \
         than {current}"
    )]
    FencedCoordinator {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// Producer.
        producer_id: i64,
        /// The coordinator epoch that came.
        found: i32,
        /// The newest known one.
        current: i32,
    },
    /// A read outside what the log holds.
    #[error("{topic}-{partition}: offset {offset} is outside the log, {log_start}..={log_end}")]
    OffsetOutOfRange {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// The offset asked for.
        offset: i64,
        /// First offset held.
        log_start: i64,
        /// The limit of the read: high watermark or log end.
        log_end: i64,
    },
    /// Bytes of a segment that are not the batch that should be there.
    #[error(
        "{topic}-{partition}: bad batch at offset {offset}, byte {position} of segment {segment}: {fault}"
    )]
    DamagedLog {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// The offset expected there.
        offset: i64,
        /// Base offset of the segment.
        segment: i64,
        /// Byte position in the segment.
        position: u64,
        /// What is wrong.
        fault: BatchFault,
    },
    /// Records of which no copy is good.
    #[error(
        "{topic}-{partition}: the records at offsets {from}..={} are lost, bytes {position}..{end} of segment {segment}: \
         {fault}; go on reading at offset {next}", .next - 1
    )]
    LostBatch {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// The first offset lost.
        from: i64,
        /// The first offset after them.
        next: i64,
        /// Base offset of the segment.
        segment: i64,
        /// Byte position in the segment.
        position: u64,
        /// Byte position at which what follows begins.
        end: u64,
        /// What is wrong with the only copy, or the first.
        fault: BatchFault,
    },
    /// A log whose rest could not be read when the store was opened. It is served up to there, and left as it is.
    #[error(
        "{topic}-{partition} cannot be read from offset {offset} on, byte {position} of segment {segment}: it is served up to \
         there and left as it is; see to the disk and start again, or delete the topic"
    )]
    UnreadableLog {
        /// Topic.
        topic: Arc<str>,
        /// Partition number.
        partition: i32,
        /// The first offset that is withheld.
        offset: i64,
        /// Base offset of the segment.
        segment: i64,
        /// Byte position in the segment.
        position: u64,
    },
    /// The task that carried an operation was stopped with its runtime; the outcome is unknown.
    #[error("the operation was interrupted by shutdown; its outcome is unknown")]
    Interrupted,
}

impl Error {
    /// Whether there was no room for something, in the volume, its catalog or the file system. Nothing else was wrong, and
    /// there may be room another time.
    #[must_use]
    pub fn is_no_room(&self) -> bool {
        match self {
            Self::NoSpace { .. } | Self::CatalogFull { .. } => true,
            Self::File { source, .. } => {
                matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}
