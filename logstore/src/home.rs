//! The seam: where the bytes of segments live. Extents of a volume (`volume`) and files in a directory (`directory`)
//! are its two homes; everything above is written once against these two traits.
//!
//! Rules both homes keep:
//!
//! - [`SegmentBytes::reserve`] before [`SegmentBytes::write`]: when it returns, the place is there and will be found
//!   again after a power cut, once a flush has covered the write.
//! - Nothing that was in a place before it was reserved is ever read back as a segment's bytes: what was not written
//!   reads as zeroes, or is past the end.
//! - The `Arc` of a segment's bytes is the lease. After [`SegmentBytes::forgotten`] the space is given back when the
//!   last `Arc` is dropped, and not before.

use crate::catalog::Change;
use crate::catalog::records::{Kind, PartitionKey, Swap, TopicRecord};
use crate::directory::checkpoints::Checkpoints;
use crate::epochs::Epochs;
use crate::error::Result;
use crate::heal::Healing;
use bytes::{Bytes, BytesMut};
use raid::device::{Durability, Holder, Piece};
use raid::runtime::BoxFuture;
use std::fmt::{self, Debug};
use std::sync::Arc;

/// An operation of a home under way.
pub(crate) type Io<'a, T> = BoxFuture<'a, Result<T>>;

/// Whether something long may go on; the error with which it ends if not.
pub(crate) type MayGoOn<'a> = &'a (dyn Fn() -> Result<()> + Send + Sync);

/// A partition, as homes and messages name it.
#[derive(Debug, Clone)]
pub(crate) struct PartitionId {
    pub(crate) key: PartitionKey,
    pub(crate) topic: Arc<str>,
}

impl fmt::Display for PartitionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.topic, self.key.partition)
    }
}

impl PartitionId {
    /// The number as Kafka has it.
    pub(crate) fn number(&self) -> i32 {
        self.key.partition as i32
    }
}

/// What is known of a segment when a store is opened.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) base: i64,
    pub(crate) bytes: Arc<dyn SegmentBytes>,
    /// Its size, if it was closed.
    pub(crate) sealed: Option<u64>,
    /// Byte after the last that may hold data.
    pub(crate) reach: u64,
    /// Data reaches exactly so far, if the log was closed in order.
    pub(crate) exact: bool,
    /// When it was last appended to, in milliseconds since the epoch, if that is known. Of one that is not `sealed`, it is
    /// only as old as the last stop in order, unless it is `exact`.
    pub(crate) written: Option<i64>,
}

/// What makes a segment a closed one.
#[derive(Debug)]
pub(crate) struct Sealing {
    /// Bytes of whole batches.
    pub(crate) size: u64,
    /// Offset after the last record.
    pub(crate) end: i64,
    /// Derived bytes to keep beside it.
    pub(crate) sidecars: Vec<(Kind, Bytes)>,
    /// Nothing will be appended: give unused space back.
    pub(crate) trim: bool,
    /// When it was last appended to, in milliseconds since the epoch, if its records do not tell.
    pub(crate) written: Option<i64>,
    /// What becomes true in the catalog at the same moment.
    pub(crate) change: Change,
}

/// Bytes that may be kept in several copies, for reading: a segment's, of a store that is open or one that is looked at.
pub(crate) trait Copies: Send + Sync {
    /// Reads bytes that were written.
    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut>;

    /// In how many ways bytes can be read that differ in the copies they go to (see [`raid::device::Device`], also for
    /// the next two).
    fn copies(&self) -> usize {
        1
    }

    /// Reads bytes in one of these ways, as they are.
    fn read_copy(&self, at: u64, buf: BytesMut, _copy: usize) -> Io<'_, BytesMut> {
        self.read(at, buf)
    }

    /// Whether copies may differ without a fault.
    fn may_differ(&self, _at: u64, _len: u64) -> bool {
        false
    }
}

/// The bytes of one segment.
pub(crate) trait SegmentBytes: Copies + Debug {
    /// Makes sure that bytes up to `end` have a place. `limit`: how far the segment will grow at most.
    fn reserve(&self, end: u64, limit: u64) -> Io<'_, ()>;

    /// Makes it known that the segment begins here, before it has bytes: with the next flush, or the next segment that is
    /// sealed, it will be found again after a power cut.
    fn begin(&self) -> Io<'_, ()>;

    /// Writes into a reserved place. With [`Durability::Stable`] whoever asked waits for a flush that begins after this: until
    /// then a kill may lose it, and a home need not bring it to its place before somebody reads it there.
    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()>;

    /// Brings to its place what of it may wait for that: a kill loses nothing then that was written before this call.
    fn place_all(&self) -> Io<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Recovery has read it and will serve it: the next flush makes it durable, whoever wrote it and whenever.
    fn found(&self);

    /// Where bytes lie in open files; `None` where no kernel can send them.
    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>>;

    /// Whether all copies are equal (see [`raid::device::Device`], also for the next).
    fn agree(&self, _at: u64, _len: u64) -> Io<'_, bool> {
        Box::pin(async { Ok(true) })
    }

    /// Where all copies lie, on the devices whose page cache they go through.
    fn holders(&self, at: u64, len: u64) -> Io<'_, Vec<Holder>>;

    /// Makes all copies hold `good`, durably; returns how many did not. Without copies there is nothing to do it from.
    fn mend(&self, _at: u64, _good: Bytes) -> Io<'_, u64> {
        Box::pin(async { Ok(0) })
    }

    /// Makes all copies hold what is good in some, where they may differ without a fault ([`crate::unsynced`]).
    fn settle_copies<'a>(&'a self, _may_go_on: MayGoOn<'a>) -> Io<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    /// What this store knows of checks and repairs.
    fn healing(&self) -> &Arc<Healing>;

    /// Makes everything from `end` on read as if it was never written.
    fn cut(&self, end: u64) -> Io<'_, ()>;

    /// Derived bytes that were kept when the segment was sealed with this `end`; `None` when there are none, or they
    /// are damaged: they can be had again from the log.
    fn sidecar(&self, kind: Kind, end: i64) -> Io<'_, Option<Bytes>>;

    /// Makes the segment's bytes durable, keeps what is derived from it, and commits the change, in this order.
    fn seal(&self, sealing: Sealing) -> Io<'_, ()>;

    /// Adds the removal of the segment to a change. Nothing may be reserved or sealed afterwards.
    fn forget<'a>(&'a self, change: &'a mut Change) -> Io<'a, ()>;

    /// That change is durable.
    fn forgotten(&self);

    /// Of a segment from [`Home::cleaned_segment`]: makes its bytes durable and puts it in the place of `old`, neighbours
    /// of which the first has its base offset, in one commit with the change. When that failed, `old` is as it was.
    fn take_place<'a>(&'a self, old: &'a [Arc<dyn SegmentBytes>], sealing: Sealing) -> Io<'a, ()>;

    /// Finishes what the commit of [`SegmentBytes::take_place`] has decided.
    fn settle<'a>(&'a self, old: &'a [Arc<dyn SegmentBytes>]) -> Io<'a, ()>;

    /// Another segment is about to take this one's place: whoever reads it goes on reading what it is now.
    fn hold(&self) -> Io<'_, ()>;

    /// Another segment has taken its place: the space is given back with the last lease.
    fn replaced(&self);

    /// Removes the segment at once and durably: recovery found that it is no part of its log. Nobody reads it.
    fn erase(&self) -> Io<'_, ()>;
}

/// Where the space for records is. Units: bytes. With nothing under way and nothing leased, `free + held` is `total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// Free, what is kept back from records included.
    pub free: u64,
    /// What the catalog says segments and their derived bytes hold.
    pub held: u64,
}

/// Where segments live.
pub(crate) trait Home: Debug + Send + Sync {
    /// What to call it in messages.
    fn name(&self) -> &str;

    /// The segments of a partition, by base offset, when the store is opened. `swap` is finished first, if it was not.
    fn segments<'a>(&'a self, id: &'a PartitionId, swap: Option<Swap>) -> Io<'a, Vec<Found>>;

    /// What this store knows of checks and repairs.
    fn healing(&self) -> &Arc<Healing>;

    /// A segment that has no bytes yet, and leaves no trace before the first is reserved.
    fn new_segment(&self, id: &PartitionId, base: i64) -> Arc<dyn SegmentBytes>;

    /// A segment that is written beside those of the log, to take the place of the one with this base offset and of
    /// neighbours: without a trace until then. No two of a partition have the same `turn` while the store is open.
    fn cleaned_segment(&self, id: &PartitionId, base: i64, turn: u64) -> Arc<dyn SegmentBytes>;

    /// All partitions are open: what an earlier life left undone may be done now, in the background.
    fn opened(&self) -> Result<()> {
        Ok(())
    }

    /// Where the space is; `None` where a file system keeps the accounts.
    fn space(&self) -> Result<Option<Space>>;

    /// Whether there is room for compaction to write anything at all; the error says what is missing.
    fn room_to_clean(&self) -> Io<'_, ()>;

    /// Where Kafka's offset checkpoints are kept; `None` where nobody else looks for them.
    fn checkpoints(&self) -> Option<&Checkpoints>;

    /// Makes every write that completed before this call durable, in all partitions; but of segments that are written beside
    /// the log: [`SegmentBytes::take_place`] sees to those.
    fn flush(&self) -> Io<'_, ()>;

    /// The catalog is closed: nothing is written any more.
    fn closed(&self) -> Io<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Prepares for a topic whose record is about to be committed.
    fn prepare_topic<'a>(&'a self, record: &'a TopicRecord) -> Io<'a, ()>;

    /// Adds to a change what a topic's deletion needs besides the removal of its records and segments.
    fn forget_topic(&self, record: &TopicRecord, change: &mut Change);

    /// That change is durable: moves out of the way what bears the topic's name.
    fn topic_forgotten<'a>(&'a self, record: &'a TopicRecord) -> Io<'a, ()>;

    /// Gives back what is left of a topic, when its time has come.
    fn remove_topic<'a>(&'a self, record: &'a TopicRecord) -> Io<'a, ()>;

    /// The epochs of a partition changed; the catalog has them already.
    fn note_epochs<'a>(&'a self, id: &'a PartitionId, epochs: &'a Epochs) -> Io<'a, ()>;
}
