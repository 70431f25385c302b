//! A segment's bytes as a chain of extents.
//!
//! Cost of a write: one device write (two where it crosses from one extent to a neighbourless next), a read lock for the map;
//! no copy, but of a small one, which the journal gathers. A small one that somebody waits to have committed costs two copies
//! and no device write: it comes to its place with others, for a flush or for whoever reads it.
//!
//! Growth is rare and ahead of need: when half of the segment's space is used, or its last 64 MiB are begun, the next extent,
//! as large as the space so far (up to 64 MiB), is zeroed and recorded by a task of its own, so that a busy log rarely waits
//! for the catalog: its two flushes take as long as some ten MiB of appends to a fast disk. The first extent is taken by the
//! first write. Every [`WRITE_BACK`] bytes that are written in place the disks are told to begin with them; what came there from
//! the journal, the flush that has brought it there follows.
//!
//! Invariant: `record` is what the catalog holds for this segment, or what the change under way will make it hold;
//! only the holder of `growth` changes it.

use super::extent::{Extent, UNIT, round_up};
use super::journal::{Journal, Unplaced};
use super::{VolumeHome, holders, zero};
use crate::catalog::Change;
use crate::catalog::records::{BlobRecord, Kind, SegmentKey, SegmentRecord, Table};
use crate::error::{Error, Result};
use crate::heal::Healing;
use crate::home::{Copies, Io, Sealing, SegmentBytes};
use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, RwLock};
use raid::device::{Durability, Holder, Piece};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

/// Largest extent taken at once.
const LARGEST: u64 = 64 << 20;
/// Bytes of a segment that begin to be written to disk at once: whole pages, since what is on its way to a disk would have to
/// be written again. Less would be a call for every few batches, more would leave the disks idle at first.
const WRITE_BACK: u64 = 2 << 20;
/// Derived bytes up to this size are kept in the catalog itself.
const INLINE: usize = 1024;

/// A segment on a volume.
pub(super) struct VolumeSegment {
    home: Arc<VolumeHome>,
    key: SegmentKey,
    record: RwLock<SegmentRecord>,
    /// Held while the map changes.
    growth: tokio::sync::Mutex<()>,
    /// An extent is being taken ahead.
    growing: AtomicBool,
    /// It is, or is about to be, in no record any more: nothing may be taken for it.
    dead: AtomicBool,
    /// No record speaks of it: its space goes back when it is dropped.
    freed: AtomicBool,
    /// It is written beside the log, and in no record yet.
    beside: AtomicBool,
    /// What of it is in the journal and not in its place; `None` until something is.
    unplaced: Mutex<Option<Arc<Unplaced>>>,
    this: Weak<Self>,
}

impl std::fmt::Debug for VolumeSegment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeSegment").field("key", &self.key).finish_non_exhaustive()
    }
}

fn room(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

/// The places of `len` bytes from `at` on, as (position on the volume, bytes).
pub(super) fn places(extents: &[Extent], at: u64, len: u64) -> Option<Vec<Extent>> {
    let mut found: Vec<Extent> = Vec::with_capacity(1);
    let (mut skip, mut left) = (at, len);
    for extent in extents {
        if left == 0 {
            break;
        }
        if skip >= extent.len {
            skip -= extent.len;
            continue;
        }
        let n = (extent.len - skip).min(left);
        found.push(Extent { at: extent.at + skip, len: n });
        skip = 0;
        left -= n;
    }
    (left == 0).then_some(found)
}

/// Adds an extent at the end, joined with the last one where they touch.
fn append(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut().filter(|last| last.end() == extent.at) {
        Some(last) => last.len += extent.len,
        None => extents.push(extent),
    }
}

/// Cuts a chain to `keep` bytes, in whole units; returns what is cut off.
fn trim(extents: &mut Vec<Extent>, keep: u64) -> Vec<Extent> {
    let (mut left, mut off) = (round_up(keep), Vec::new());
    extents.retain_mut(|extent| {
        let n = extent.len.min(left);
        left -= n;
        if n < extent.len {
            off.push(Extent { at: extent.at + n, len: extent.len - n });
        }
        extent.len = n;
        n > 0
    });
    off
}

/// Where the derived bytes lie that have a place of their own.
fn blobs_of(record: &SegmentRecord) -> Vec<Extent> {
    record.blobs.values().filter_map(|blob| blob.at).collect()
}

impl VolumeSegment {
    pub(super) fn new(home: &Arc<VolumeHome>, key: SegmentKey, record: SegmentRecord) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            home: Arc::clone(home),
            key,
            record: RwLock::new(record),
            growth: tokio::sync::Mutex::new(()),
            growing: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            freed: AtomicBool::new(false),
            beside: AtomicBool::new(false),
            unplaced: Mutex::default(),
            this: Weak::clone(this),
        })
    }

    /// A segment that is to take the place of another.
    pub(super) fn beside(home: &Arc<VolumeHome>, key: SegmentKey) -> Arc<Self> {
        let segment = Self::new(home, key, SegmentRecord::default());
        segment.beside.store(true, Ordering::Release);
        segment
    }

    fn places(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        places(&self.record.read().extents, at, len).ok_or_else(|| {
            let base = self.key.base;
            self.home.catalog.damaged(format!("{len} bytes at {at} of segment {base} lie in no extent"))
        })
    }

    /// The journal, where it takes this segment's appends: what is written beside the log is flushed before it takes its place.
    fn journal(&self) -> Option<&Journal> {
        self.home.journal.as_ref().filter(|_| !self.beside.load(Ordering::Acquire))
    }

    /// Brings to its place what of these bytes is not there yet: to be called before they are read from there.
    async fn place(&self, range: Range<u64>) -> Result<()> {
        let unplaced = self.unplaced.lock().as_ref().filter(|unplaced| unplaced.has(&range)).cloned();
        match unplaced {
            Some(unplaced) => unplaced.place_by(&self.home.tasks).await,
            None => Ok(()),
        }
    }

    /// Gives an append to the journal, and keeps it until it is brought to its place, if it can wait for that.
    async fn keep(&self, journal: &Journal, at: u64, data: &Bytes) -> Result<bool> {
        let unplaced = {
            let mut slot = self.unplaced.lock();
            Arc::clone(slot.get_or_insert_with(|| Unplaced::new(&self.home.device)))
        };
        if !unplaced.ends_at(at) {
            return Ok(false);
        }
        let places = self.places(at, data.len() as u64)?;
        if !journal.keep(&unplaced, &self.key, at, &places, data) {
            unplaced.place_by(&self.home.tasks).await?;
        }
        Ok(true)
    }

    async fn write_in_place(&self, at: u64, data: &Bytes) -> Result<()> {
        let places = self.places(at, data.len() as u64)?;
        if let [place] = places[..] {
            return Ok(self.home.device.write(place.at, data.clone(), Durability::Cached).await?);
        }
        let mut from = 0;
        let writes: Vec<_> = places
            .iter()
            .map(|place| {
                let part = data.slice(from..from + place.len as usize);
                from += place.len as usize;
                self.home.device.write(place.at, part, Durability::Cached)
            })
            .collect();
        futures_util::future::try_join_all(writes).await?;
        Ok(())
    }

    /// Takes space until there is room for `end` bytes, and usually for more.
    async fn grow(&self, end: u64, limit: u64) -> Result<()> {
        let _only = self.growth.lock().await;
        loop {
            if self.dead.load(Ordering::Acquire) {
                return Err(Error::Closed);
            }
            let mut record = self.record.read().clone();
            let have = room(&record.extents);
            if have >= end {
                return Ok(());
            }
            if record.sealed.is_some() {
                // Whoever grows it ahead has come too late. A record that says otherwise would have the next recovery scan
                // from here.
                return Err(Error::Closed);
            }
            if self.beside.load(Ordering::Acquire) {
                // Nothing is read past what was written, and nothing is recorded before all is: no zeroes, no commit.
                let extent =
                    self.home.allocate_to_clean(end - have, record.extents.last().map(Extent::end))?;
                append(&mut record.extents, extent);
                *self.record.write() = record;
                continue;
            }
            let double = have.clamp(UNIT, LARGEST).min(round_up(limit.saturating_sub(have)));
            let want = double.max(round_up(end - have));
            let extent = self.home.allocate(want, record.extents.last().map(Extent::end))?;
            append(&mut record.extents, extent);
            if let Err(error) = self.take(extent, &record).await {
                // In no record that is durable; and whoever takes it next zeroes it first.
                if !matches!(error, Error::Catalog { .. } | Error::Device(_) | Error::Poisoned { .. }) {
                    self.home.release_now(&[extent]);
                }
                return Err(error);
            }
            *self.record.write() = record;
        }
    }

    async fn take(&self, extent: Extent, record: &SegmentRecord) -> Result<()> {
        zero(&self.home.device, extent).await?;
        let mut change = Change::new();
        change.put(Table::Segments, &self.key.bytes(), record);
        self.home.catalog.submit(change).await
    }

    /// Takes the next extent before it is needed, if that is near.
    fn grow_ahead(&self, end: u64, limit: u64) {
        let have = room(&self.record.read().extents);
        let near = have.saturating_sub(end) < (have / 2).min(LARGEST);
        if !near || have >= limit || self.growing.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        self.home.tasks.spawn(Box::pin(async move {
            if let Err(error) = this.grow(have + 1, limit).await {
                // Whoever really needs the space will say so.
                tracing::debug!("no space was taken ahead: {error}");
            }
            this.growing.store(false, Ordering::Release);
        }));
    }

    /// These bytes are written, and all before them: has the disks begin with each [`WRITE_BACK`] of the segment that is full
    /// by them. Nobody waits for that.
    fn begin_write_back(&self, written: &Range<u64>) {
        let whole = |at: u64| at / WRITE_BACK * WRITE_BACK;
        let (begin, end) = (whole(written.start), whole(written.end));
        if begin < end {
            for place in places(&self.record.read().extents, begin, end - begin).unwrap_or_default() {
                self.home.device.begin_write_back(place.at, place.len);
            }
        }
    }

    /// Stores derived bytes; `None` when there is no room: they can be had again from the log.
    async fn store_blob(&self, kind: Kind, bytes: &Bytes, change: &mut Change) -> Result<Option<BlobRecord>> {
        let mut blob = BlobRecord { len: bytes.len() as u64, crc: crc32c::crc32c(bytes), at: None };
        if bytes.len() <= INLINE {
            change.put_bytes(Table::Blobs, &self.key.blob(kind), bytes.to_vec());
            return Ok(Some(blob));
        }
        change.delete(Table::Blobs, &self.key.blob(kind));
        let Some(extent) = self.home.allocate_derived(blob.len) else { return Ok(None) };
        if let Err(error) = self.home.device.write(extent.at, bytes.clone(), Durability::Cached).await {
            self.home.release_now(&[extent]);
            return Err(error.into());
        }
        blob.at = Some(extent);
        Ok(Some(blob))
    }

    async fn read_blob(&self, kind: Kind) -> Result<Option<Bytes>> {
        let Some(blob) = self.record.read().blobs.get(&kind).cloned() else { return Ok(None) };
        let bytes = match blob.at {
            Some(extent) => {
                let buf = raid::device::buffer(blob.len as usize);
                self.home.device.read(extent.at, buf).await?.freeze()
            }
            None => match self.home.catalog.bytes(Table::Blobs, &self.key.blob(kind))? {
                Some(bytes) => Bytes::from(bytes),
                None => return Ok(None),
            },
        };
        let good = bytes.len() as u64 == blob.len && crc32c::crc32c(&bytes) == blob.crc;
        if !good {
            tracing::warn!("{:?} of segment {} is damaged and is rebuilt", kind, self.key.base);
        }
        Ok(good.then_some(bytes))
    }

    async fn seal_now(&self, sealing: Sealing) -> Result<()> {
        let _only = self.growth.lock().await;
        let Sealing { size, sidecars, trim: trims, written, mut change, .. } = sealing;
        if self.dead.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        // A start brings nothing to its place of what the catalog says is closed.
        self.place(0..u64::MAX).await?;
        let before = self.record.read().clone();
        let extents = before.extents.clone();
        let mut record = SegmentRecord { extents, written, ..SegmentRecord::default() };
        let mut free = blobs_of(&before);
        if trims {
            record.sealed = Some(size);
            free.extend(trim(&mut record.extents, size));
        }
        for (kind, bytes) in &sidecars {
            if let Some(blob) = self.store_blob(*kind, bytes, &mut change).await? {
                record.blobs.insert(*kind, blob);
            }
        }
        change.put(Table::Segments, &self.key.bytes(), &record);
        // The commit's first flush makes batches and derived bytes durable before the record that vouches for them.
        if let Err(error) = self.home.catalog.submit(change).await {
            if matches!(error, Error::CatalogFull { .. }) {
                // It did not happen, and whoever tries again takes space again.
                self.home.release_now(&blobs_of(&record));
            }
            return Err(error);
        }
        *self.record.write() = record;
        if trims {
            // Nothing is appended any more.
            *self.unplaced.lock() = None;
        }
        self.home.release(free, None);
        Ok(())
    }
}

impl VolumeSegment {
    async fn take_place_now(&self, old: &[Arc<dyn SegmentBytes>], sealing: Sealing) -> Result<()> {
        let _only = self.growth.lock().await;
        let Sealing { size, sidecars, written, change, .. } = sealing;
        let extents = self.record.read().extents.clone();
        let mut record = SegmentRecord { extents, written, ..SegmentRecord::default() };
        record.sealed = Some(size);
        let unused = trim(&mut record.extents, size);
        let mut all = Change::vital();
        for segment in old {
            segment.forget(&mut all).await?;
        }
        for (kind, bytes) in &sidecars {
            if let Some(blob) = self.store_blob(*kind, bytes, &mut all).await? {
                record.blobs.insert(*kind, blob);
            }
        }
        all.put(Table::Segments, &self.key.bytes(), &record);
        all.join(change);
        // From here on its space is free only if it is known that the commit did not happen.
        self.beside.store(false, Ordering::Release);
        // The commit's first flush makes the batches durable before the record that vouches for them.
        if let Err(error) = self.home.catalog.submit(all).await {
            if matches!(error, Error::CatalogFull { .. }) {
                self.beside.store(true, Ordering::Release);
                self.home.release_now(&blobs_of(&record));
            }
            return Err(error);
        }
        *self.record.write() = record;
        self.home.release(unused, None);
        Ok(())
    }
}

impl Copies for VolumeSegment {
    fn read(&self, at: u64, mut buf: BytesMut) -> Io<'_, BytesMut> {
        Box::pin(async move {
            self.place(at..at + buf.len() as u64).await?;
            let places = self.places(at, buf.len() as u64)?;
            if let [place] = places[..] {
                return Ok(self.home.device.read(place.at, buf).await?);
            }
            let mut from = 0;
            for place in places {
                let part = raid::device::buffer(place.len as usize);
                let part = self.home.device.read(place.at, part).await?;
                buf[from..from + part.len()].copy_from_slice(&part);
                from += part.len();
            }
            Ok(buf)
        })
    }

    fn copies(&self) -> usize {
        self.home.device.copies()
    }

    fn read_copy(&self, at: u64, mut buf: BytesMut, copy: usize) -> Io<'_, BytesMut> {
        Box::pin(async move {
            self.place(at..at + buf.len() as u64).await?;
            let places = self.places(at, buf.len() as u64)?;
            if let [place] = places[..] {
                return Ok(self.home.device.read_copy(place.at, buf, copy).await?);
            }
            let mut from = 0;
            for place in places {
                let part = raid::device::buffer(place.len as usize);
                let part = self.home.device.read_copy(place.at, part, copy).await?;
                buf[from..from + part.len()].copy_from_slice(&part);
                from += part.len();
            }
            Ok(buf)
        })
    }

    fn may_differ(&self, at: u64, len: u64) -> bool {
        let places = places(&self.record.read().extents, at, len).unwrap_or_default();
        places.iter().any(|place| self.home.device.may_differ(place.at, place.len))
    }
}

impl SegmentBytes for VolumeSegment {
    fn begin(&self) -> Io<'_, ()> {
        Box::pin(async {
            let _only = self.growth.lock().await;
            if self.dead.load(Ordering::Acquire) {
                return Err(Error::Closed);
            }
            let mut change = Change::new();
            change.put(Table::Segments, &self.key.bytes(), &*self.record.read());
            self.home.catalog.submit(change).await
        })
    }

    fn reserve(&self, end: u64, limit: u64) -> Io<'_, ()> {
        let enough = room(&self.record.read().extents) >= end;
        Box::pin(async move {
            if !enough {
                self.grow(end, limit).await?;
            }
            self.grow_ahead(end, limit);
            Ok(())
        })
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        let len = data.len() as u64;
        self.home.writes(len);
        Box::pin(async move {
            let journal = self.journal();
            if let Some(journal) = journal
                && durability == Durability::Stable
                && journal.takes(data.len())
                && self.keep(journal, at, &data).await?
            {
                return Ok(());
            }
            // What is answered before it is committed is in the page cache by then, and so is all before it: a kill loses
            // nothing of it.
            self.place(0..u64::MAX).await?;
            self.write_in_place(at, &data).await?;
            if let Some(journal) = journal {
                journal.gather(&self.key, at, &data);
            }
            self.begin_write_back(&(at..at + len));
            Ok(())
        })
    }

    fn place_all(&self) -> Io<'_, ()> {
        Box::pin(self.place(0..u64::MAX))
    }

    fn found(&self) {
        // The first commit of a life is a flush (`journal`), and that covers all that is on the volume: each of its members is
        // synced as a whole, whoever wrote to it.
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        Box::pin(async move {
            self.place(at..at + len).await?;
            let mut pieces = Vec::new();
            for place in self.places(at, len)? {
                match self.home.device.locate(place.at, place.len).await? {
                    Some(found) => pieces.extend(found),
                    None => return Ok(None),
                }
            }
            Ok(Some(pieces))
        })
    }

    fn agree(&self, at: u64, len: u64) -> Io<'_, bool> {
        Box::pin(async move {
            self.place(at..at + len).await?;
            for place in self.places(at, len)? {
                if !self.home.device.agree(place.at, place.len).await? {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    fn holders(&self, at: u64, len: u64) -> Io<'_, Vec<Holder>> {
        Box::pin(async move { Ok(holders(&self.home.device, &self.places(at, len)?)) })
    }

    fn mend(&self, at: u64, mut good: Bytes) -> Io<'_, u64> {
        Box::pin(async move {
            // Its places stay its own while it is mended.
            let _only = self.growth.lock().await;
            self.place(at..at + good.len() as u64).await?;
            let mut mended = 0;
            for place in self.places(at, good.len() as u64)? {
                let part = good.split_to(place.len as usize);
                mended = self.home.device.mend(place.at, part).await?.max(mended);
            }
            Ok(mended)
        })
    }

    fn healing(&self) -> &Arc<Healing> {
        &self.home.healing
    }

    fn cut(&self, end: u64) -> Io<'_, ()> {
        Box::pin(async move {
            let _only = self.growth.lock().await;
            self.place(0..u64::MAX).await?;
            let reach = room(&self.record.read().extents);
            for place in self.places(end, reach.saturating_sub(end))? {
                zero(&self.home.device, place).await?;
            }
            if let Some(journal) = &self.home.journal {
                journal.write_beside();
            }
            Ok(())
        })
    }

    fn sidecar(&self, kind: Kind, _: i64) -> Io<'_, Option<Bytes>> {
        Box::pin(self.read_blob(kind))
    }

    fn seal(&self, sealing: Sealing) -> Io<'_, ()> {
        Box::pin(self.seal_now(sealing))
    }

    fn forget<'a>(&'a self, change: &'a mut Change) -> Io<'a, ()> {
        Box::pin(async move {
            let _only = self.growth.lock().await;
            self.dead.store(true, Ordering::Release);
            change.delete(Table::Segments, &self.key.bytes());
            for kind in Kind::ALL {
                change.delete(Table::Blobs, &self.key.blob(kind));
            }
            Ok(())
        })
    }

    fn forgotten(&self) {
        self.freed.store(true, Ordering::Release);
    }

    fn take_place<'a>(&'a self, old: &'a [Arc<dyn SegmentBytes>], sealing: Sealing) -> Io<'a, ()> {
        Box::pin(self.take_place_now(old, sealing))
    }

    fn settle<'a>(&'a self, _: &'a [Arc<dyn SegmentBytes>]) -> Io<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn hold(&self) -> Io<'_, ()> {
        // Its extents are its own.
        Box::pin(async { Ok(()) })
    }

    fn replaced(&self) {
        self.forgotten();
    }

    fn erase(&self) -> Io<'_, ()> {
        Box::pin(async {
            let mut change = Change::vital();
            self.forget(&mut change).await?;
            self.home.catalog.submit(change).await?;
            self.forgotten();
            Ok(())
        })
    }
}

impl Drop for VolumeSegment {
    fn drop(&mut self) {
        if *self.freed.get_mut() || *self.beside.get_mut() {
            let record = self.record.get_mut();
            let mut extents = std::mem::take(&mut record.extents);
            extents.extend(blobs_of(record));
            self.home.release(extents, self.unplaced.get_mut().take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::records::PartitionKey;
    use crate::tasks::Tasks;
    use raid::device::{FileDevice, OpenMode};
    use raid::runtime::TokioRuntime;

    const fn units(at: u64, len: u64) -> Extent {
        Extent { at: at * UNIT, len: len * UNIT }
    }

    #[test]
    fn places_follow_the_chain() {
        let chain = [units(10, 1), units(2, 2)];
        assert_eq!(places(&chain, 5, 10), Some(vec![Extent { at: 10 * UNIT + 5, len: 10 }]));
        let crossing = vec![Extent { at: 11 * UNIT - 1, len: 1 }, units(2, 2)];
        assert_eq!(places(&chain, UNIT - 1, 2 * UNIT + 1), Some(crossing));
        assert_eq!(places(&chain, UNIT, 2 * UNIT + 1), None);
        assert_eq!(places(&chain, 3 * UNIT, 0), Some(vec![]));
    }

    #[test]
    fn trimming_gives_back_whole_units() {
        let mut chain = vec![units(10, 2), units(2, 2)];
        assert_eq!(trim(&mut chain, UNIT + 1), [units(2, 2)]);
        assert_eq!(chain, [units(10, 2)]);
        assert_eq!(trim(&mut chain, 1), [units(11, 1)]);
        assert_eq!(trim(&mut chain, 0), [units(10, 1)]);
        assert!(chain.is_empty());
        append(&mut chain, units(4, 1));
        append(&mut chain, units(5, 1));
        append(&mut chain, units(9, 1));
        assert_eq!(chain, [units(4, 2), units(9, 1)]);
    }

    /// Whoever takes space ahead may come after the segment was closed.
    #[tokio::test]
    async fn a_closed_segment_does_not_grow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume");
        std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
        let device = Arc::new(FileDevice::open(&path, OpenMode::ReadWrite).unwrap());
        let tasks = Tasks::new(Arc::new(TokioRuntime::current()));
        let (home, catalog) = VolumeHome::open(device, Arc::clone(&tasks), Arc::default()).await.unwrap();
        let partition = PartitionKey { topic: uuid::Uuid::from_u128(1), partition: 0 };
        let key = SegmentKey { partition, base: 0 };
        let segment = VolumeSegment::new(&home, key, SegmentRecord::default());
        segment.reserve(100, 1 << 20).await.unwrap();
        segment.write(0, Bytes::from_static(&[7; 100]), Durability::Cached).await.unwrap();
        let change = Change::vital();
        let sealing = Sealing { size: 100, end: 1, sidecars: Vec::new(), trim: true, written: None, change };
        segment.seal_now(sealing).await.unwrap();
        assert!(matches!(segment.grow(UNIT + 1, 1 << 20).await, Err(Error::Closed)));
        let record: Option<SegmentRecord> = catalog.record(Table::Segments, &key.bytes()).unwrap();
        assert_eq!(record.unwrap().sealed, Some(100));
    }
}
