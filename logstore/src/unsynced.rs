//! Closed segments that lie where an unclean stop left the copies of the volume apart.
//!
//! After an unclean stop the volume does not know which of its dirty regions had writes under way. It makes all of them
//! equal as md does: the first copy in slot order counts, at the first read, or in the background. For what was being
//! written one copy is as good as another, and what recovery has read it has already made equal itself. But a region also
//! holds segments that were closed long before, which lie beside what was written. Their copies *were* equal and durable;
//! where they differ now, one has rotted, and if that is the first, it would be copied over the good one.
//!
//! So such a segment is read through [`Unsynced`]: before the volume may make a part of it equal, its copies are compared,
//! and where they differ, the good batches are made the content of all ([`crate::heal`]). Readers do it for what they
//! read; [`Store::settle_copies`] for all the rest, and only then may the volume resync
//! (`hold_resync` of `raid::volume::AssembleOptions`).
//!
//! Invariant: no plain read of a part of which copies differ reaches the volume while a batch in it that is good in some
//! copy is not in all. If such a batch cannot be rewritten, the read is an error: the good copy is worth more.
//!
//! Cost: of each dirty part, one more read of all copies, which the resync that follows finds in memory; no time at start.
//! Where copies differ, which is rare, one pass over the segment.

use crate::batch::Header;
use crate::catalog::Change;
use crate::catalog::records::Kind;
use crate::epochs::Epochs;
use crate::error::Result;
use crate::ground::Ground;
use crate::heal::Healing;
use crate::home::{Copies, Io, MayGoOn, PartitionId, Sealing, SegmentBytes};
use crate::segment::End;
use crate::store::Store;
use crate::volume::extent::UNIT;
use bytes::{Bytes, BytesMut};
use raid::device::{Durability, EQUALISED, Holder, Piece};
use raid::range_set::RangeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that are compared at once in the background.
const WINDOW: u64 = 1 << 20;

// What a read makes equal lies in the same extent, and so in the same segment.
const _: () = assert!(UNIT.is_multiple_of(EQUALISED) && WINDOW.is_multiple_of(EQUALISED));

/// The bytes of a closed segment, some of which may differ between copies.
pub(crate) struct Unsynced {
    bytes: Arc<dyn SegmentBytes>,
    id: PartitionId,
    base: i64,
    end: End,
    epochs: Epochs,
    /// What is good in some copy is in all.
    settled: AtomicBool,
    /// Held while batches are chosen.
    choosing: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Unsynced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Unsynced").field(&self.bytes).finish()
    }
}

/// The bytes of a segment that was closed before, guarded where that is needed.
pub(crate) fn guard(
    id: &PartitionId,
    base: i64,
    bytes: &Arc<dyn SegmentBytes>,
    end: End,
    epochs: &Epochs,
) -> Arc<dyn SegmentBytes> {
    if bytes.copies() == 1 || !bytes.may_differ(0, end.size) {
        return Arc::clone(bytes);
    }
    let (bytes, id, epochs) = (Arc::clone(bytes), id.clone(), epochs.clone());
    let (settled, choosing) = (AtomicBool::new(false), tokio::sync::Mutex::default());
    Arc::new(Unsynced { bytes, id, base, end, epochs, settled, choosing })
}

impl Unsynced {
    fn is_open(&self, at: u64, len: u64) -> bool {
        // Right behind the end as well: what such a read makes equal begins before it.
        let from = at / EQUALISED * EQUALISED;
        !self.settled.load(Ordering::Acquire)
            && from < self.end.size
            && self.bytes.may_differ(from, at + len - from)
    }

    /// What a plain read of a range may make equal, as far as it belongs to the segment as it was closed.
    fn around(&self, at: u64, len: u64) -> (u64, u64) {
        let from = at / EQUALISED * EQUALISED;
        (from, (at + len).next_multiple_of(EQUALISED).min(self.end.size) - from)
    }

    /// To be called before a plain read: nothing that is good in some copy can be lost by it afterwards.
    async fn settle_range(&self, at: u64, len: u64) -> Result<()> {
        if !self.is_open(at, len) {
            return Ok(());
        }
        let (from, len) = self.around(at, len);
        if self.bytes.agree(from, len).await? {
            return Ok(());
        }
        self.choose().await
    }

    /// Makes all copies hold what is good in some, batch by batch from the start: only so is it known where batches begin.
    async fn choose(&self) -> Result<()> {
        let _one = self.choosing.lock().await;
        if self.settled.load(Ordering::Acquire) {
            return Ok(());
        }
        let Self { id, bytes, base, end, .. } = self;
        let epochs = Some(&self.epochs);
        let ground = Ground { name: id, bytes: &**bytes, base: *base, end: *end, epochs, ended: None };
        let (mut position, mut next, mut rewritten) = (0, *base, 0);
        let mut equal = RangeSet::default();
        while position < end.size {
            if let Some(header) = self.equal(&ground, position, next, &mut equal).await? {
                (position, next) = (position + u64::from(header.size), header.next_offset());
                continue;
            }
            let Ok(sound) = ground.best(position, Some(next)).await? else {
                // Whatever the volume makes of it, there is nothing to lose.
                (position, next) = ground.next_sound(position, next).await?;
                continue;
            };
            rewritten += u64::from(bytes.mend(position, sound.bytes).await? > 0);
            position += u64::from(sound.header.size);
            next = sound.header.next_offset();
        }
        self.settled.store(true, Ordering::Release);
        if rewritten > 0 {
            bytes.healing().mended(rewritten);
            tracing::warn!(
                "{id}: {rewritten} batches of segment {base} were not the same in all copies after an unclean stop; they \
                 are now"
            );
        }
        Ok(())
    }

    /// The header at a position if nothing speaks against it, and all copies of its batch are equal.
    async fn equal(
        &self,
        ground: &Ground<'_>,
        position: u64,
        next: i64,
        equal: &mut RangeSet,
    ) -> Result<Option<Header>> {
        let Ok(header) = ground.head(position, Some(0)).await? else { return Ok(None) };
        if ground.fits(&header, position, Some(next)).is_err() || ground.is_odd(&header, Some(next)) {
            return Ok(None);
        }
        let end = position + u64::from(header.size);
        let mut at = position / EQUALISED * EQUALISED;
        while at < end {
            let window = at..(at + EQUALISED).min(self.end.size);
            if !equal.covers(&window) {
                if !self.bytes.agree(window.start, window.end - window.start).await? {
                    return Ok(None);
                }
                equal.insert(window.clone());
            }
            at = window.end;
        }
        Ok(Some(header))
    }

    async fn settle_all(&self, may_go_on: MayGoOn<'_>) -> Result<()> {
        let mut at = 0;
        while at < self.end.size {
            may_go_on()?;
            self.settle_range(at, WINDOW.min(self.end.size - at)).await?;
            at += WINDOW;
        }
        self.settled.store(true, Ordering::Release);
        Ok(())
    }
}

impl Store {
    /// After an unclean stop, and before the volume resyncs: compares the copies of closed segments where they may
    /// differ, and makes all hold what is good in some. Until it has returned `Ok`, nothing but reads of this store should
    /// make copies equal. The first error is returned after everything has been tried; it may be called again.
    pub async fn settle_copies(&self) -> Result<()> {
        let mut first = Ok(());
        let may_go_on = || self.context.check();
        for topic in self.topics() {
            for partition in topic.partitions() {
                let mut next = i64::MIN;
                while let Some(segment) = partition.segment_from(next) {
                    may_go_on()?;
                    next = segment.base + 1;
                    if let Err(error) = segment.bytes.settle_copies(&may_go_on).await {
                        let (name, index, base) = (topic.name(), partition.index(), segment.base);
                        tracing::warn!("{name}-{index}: copies of segment {base} may differ still: {error}");
                        first = first.and(Err(error));
                    }
                }
            }
        }
        first
    }
}

impl Copies for Unsynced {
    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        if !self.is_open(at, buf.len() as u64) {
            return self.bytes.read(at, buf);
        }
        Box::pin(async move {
            self.settle_range(at, buf.len() as u64).await?;
            self.bytes.read(at, buf).await
        })
    }

    fn copies(&self) -> usize {
        self.bytes.copies()
    }

    fn read_copy(&self, at: u64, buf: BytesMut, copy: usize) -> Io<'_, BytesMut> {
        self.bytes.read_copy(at, buf, copy)
    }

    fn may_differ(&self, at: u64, len: u64) -> bool {
        self.bytes.may_differ(at, len)
    }
}

impl SegmentBytes for Unsynced {
    fn begin(&self) -> Io<'_, ()> {
        self.bytes.begin()
    }

    fn reserve(&self, end: u64, limit: u64) -> Io<'_, ()> {
        self.bytes.reserve(end, limit)
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        self.bytes.write(at, data, durability)
    }

    fn place_all(&self) -> Io<'_, ()> {
        self.bytes.place_all()
    }

    fn found(&self) {
        self.bytes.found();
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        Box::pin(async move {
            self.settle_range(at, len).await?;
            self.bytes.locate(at, len).await
        })
    }

    fn agree(&self, at: u64, len: u64) -> Io<'_, bool> {
        self.bytes.agree(at, len)
    }

    fn holders(&self, at: u64, len: u64) -> Io<'_, Vec<Holder>> {
        self.bytes.holders(at, len)
    }

    fn mend(&self, at: u64, good: Bytes) -> Io<'_, u64> {
        self.bytes.mend(at, good)
    }

    fn settle_copies<'a>(&'a self, may_go_on: MayGoOn<'a>) -> Io<'a, ()> {
        Box::pin(self.settle_all(may_go_on))
    }

    fn healing(&self) -> &Arc<Healing> {
        self.bytes.healing()
    }

    fn cut(&self, end: u64) -> Io<'_, ()> {
        self.bytes.cut(end)
    }

    fn sidecar(&self, kind: Kind, end: i64) -> Io<'_, Option<Bytes>> {
        self.bytes.sidecar(kind, end)
    }

    fn seal(&self, sealing: Sealing) -> Io<'_, ()> {
        self.bytes.seal(sealing)
    }

    fn forget<'a>(&'a self, change: &'a mut Change) -> Io<'a, ()> {
        self.bytes.forget(change)
    }

    fn forgotten(&self) {
        self.bytes.forgotten();
    }

    fn take_place<'a>(&'a self, old: &'a [Arc<dyn SegmentBytes>], sealing: Sealing) -> Io<'a, ()> {
        self.bytes.take_place(old, sealing)
    }

    fn settle<'a>(&'a self, old: &'a [Arc<dyn SegmentBytes>]) -> Io<'a, ()> {
        self.bytes.settle(old)
    }

    fn hold(&self) -> Io<'_, ()> {
        self.bytes.hold()
    }

    fn replaced(&self) {
        self.bytes.replaced();
    }

    fn erase(&self) -> Io<'_, ()> {
        self.bytes.erase()
    }
}
