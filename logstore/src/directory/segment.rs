//! A segment's bytes as a `.log` file, and what is derived from it as files beside it.
//!
//! Cost of a write: one `pwrite` on a blocking thread, no copy. A cached read is one `preadv2(RWF_NOWAIT)` without a
//! thread hop. The file being appended to stays open; a closed one is opened when it is read, and for as long as a
//! reader holds it, so that descriptors do not grow with the number of segments.
//!
//! Names: a segment that is dropped from a log that goes on holds an offset at least, and a log's end never goes back while
//! its partition is open: so the name of one that waits to be removed is never given to another.
//!
//! Kafka's indexes have no checksums, and a snapshot's does not say whose it is. So the catalog keeps the lengths and
//! checksums of what lies beside a closed segment; an index without them is none, and is made from the log. A `.txnindex`
//! without entries has no file.
//!
//! What compaction writes beside the log is synced by compaction, not by the flushes that appends wait for.

use super::place::PartitionDir;
use super::{DirectoryHome, at, blocking, entries, names, remove_file, swap, sync_dir, write_file};
use crate::catalog::Change;
use crate::catalog::records::{BlobRecord, Kind, PartitionKey, SegmentKey, SegmentRecord, Swap, Table};
use crate::error::{Error, Result};
use crate::heal::Healing;
use crate::home::{Copies, Found, Home, Io, PartitionId, Sealing, SegmentBytes};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use raid::device::{Device, Durability, FileDevice, Holder, Piece};
use rustix::io::ReadWriteFlags;
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, UNIX_EPOCH};

/// Largest derived file that is read; anything larger is not one of ours.
const LARGEST_SIDECAR: u64 = 64 << 20;

#[derive(Debug, Default)]
struct Slot {
    /// Kept while the segment is appended to.
    held: Option<Arc<File>>,
    /// What readers hold.
    seen: Weak<File>,
}

/// A segment in a directory.
pub(super) struct FileSegment {
    home: Arc<DirectoryHome>,
    partition: PartitionKey,
    dir: Arc<PartitionDir>,
    base: i64,
    slot: Mutex<Slot>,
    /// It is in the home's list of files to sync.
    dirty: AtomicBool,
    /// Nothing may be made for it any more.
    dead: AtomicBool,
    /// No record speaks of it: its files go when it is dropped.
    freed: AtomicBool,
    /// Its files are gone.
    erased: AtomicBool,
    /// It is written beside the log, under another name.
    beside: AtomicBool,
    /// Whose place it is to take; the end is known when all is written.
    swap: Mutex<Swap>,
    this: Weak<Self>,
}

impl std::fmt::Debug for FileSegment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileSegment").field("path", &self.path()).finish_non_exhaustive()
    }
}

/// The segments in a partition's directory.
pub(super) fn find(
    home: &Arc<DirectoryHome>,
    id: &PartitionId,
    place: &Arc<PartitionDir>,
    decided: Option<Swap>,
) -> Result<Vec<Found>> {
    let dir = &*place.path();
    if let Some(decided) = decided {
        swap::finish(dir, decided)?;
    }
    for (name, path) in entries(dir)? {
        if names::is_of_compaction(&name) {
            // Never decided.
            remove_file(&path)?;
        }
    }
    let mut found = Vec::new();
    for (name, path) in entries(dir)? {
        if let Some(base) = names::offset_of(&name, "log") {
            let data = at("look at", &path, fs::metadata(&path))?;
            let size = data.len();
            let written =
                Some(data.mtime().saturating_mul(1000).saturating_add(data.mtime_nsec() / 1_000_000));
            let bytes = FileSegment::new(home, id, Arc::clone(place), base);
            found.push(Found { base, bytes, sealed: Some(size), reach: size, exact: true, written });
        }
    }
    found.sort_by_key(|segment| segment.base);
    // The last is the one that may go on growing.
    if let Some(last) = found.last_mut() {
        last.sealed = None;
    }
    Ok(found)
}

impl FileSegment {
    pub(super) fn new(
        home: &Arc<DirectoryHome>,
        id: &PartitionId,
        dir: Arc<PartitionDir>,
        base: i64,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            home: Arc::clone(home),
            partition: id.key,
            dir,
            base,
            slot: Mutex::new(Slot::default()),
            dirty: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            freed: AtomicBool::new(false),
            erased: AtomicBool::new(false),
            beside: AtomicBool::new(false),
            swap: Mutex::new(Swap { base, ..Swap::default() }),
            this: Weak::clone(this),
        })
    }

    /// A segment that is to take the place of another.
    pub(super) fn beside(
        home: &Arc<DirectoryHome>,
        id: &PartitionId,
        dir: Arc<PartitionDir>,
        base: i64,
        turn: u64,
    ) -> Arc<Self> {
        let segment = Self::new(home, id, dir, base);
        segment.swap.lock().turn = turn;
        segment.beside.store(true, Ordering::Release);
        segment
    }

    fn path(&self) -> PathBuf {
        self.dir.with(|dir| self.path_in(dir))
    }

    fn path_in(&self, dir: &Path) -> PathBuf {
        if self.beside.load(Ordering::Acquire) {
            return names::cleaned_file(dir, *self.swap.lock());
        }
        names::offset_file(dir, self.base, "log")
    }

    fn sidecar_in(&self, dir: &Path, kind: Kind, end: i64) -> PathBuf {
        match kind {
            Kind::OffsetIndex => names::offset_file(dir, self.base, "index"),
            Kind::TimeIndex => names::offset_file(dir, self.base, "timeindex"),
            Kind::Snapshot => names::offset_file(dir, end, "snapshot"),
            Kind::TxnIndex => names::offset_file(dir, self.base, "txnindex"),
        }
    }

    fn key(&self) -> Vec<u8> {
        SegmentKey { partition: self.partition, base: self.base }.bytes()
    }

    /// What the catalog keeps of the segment's files.
    fn record(&self) -> Result<Option<SegmentRecord>> {
        self.home.catalog.get().map_or(Ok(None), |catalog| catalog.record(Table::Segments, &self.key()))
    }

    /// The files that nobody needs without the segment; the producers where it starts among them.
    fn names(&self) -> [PathBuf; 5] {
        let here = Path::new("");
        let derived = [Kind::OffsetIndex, Kind::TimeIndex, Kind::TxnIndex, Kind::Snapshot];
        let [offsets, times, aborted, producers] = derived.map(|kind| self.sidecar_in(here, kind, self.base));
        [self.path_in(here), offsets, times, aborted, producers]
    }

    fn is_open(&self) -> Option<Arc<File>> {
        let slot = self.slot.lock();
        slot.held.clone().or_else(|| slot.seen.upgrade())
    }

    /// The file, opened if it is not.
    async fn file(&self) -> Result<Arc<File>> {
        if let Some(file) = self.is_open() {
            return Ok(file);
        }
        let (dir, name) = (Arc::clone(&self.dir), self.path_in(Path::new("")));
        let file = blocking(move || {
            dir.with(|dir| {
                let path = dir.join(name);
                at("open", &path, File::options().read(true).write(true).open(&path)).map(Arc::new)
            })
        })
        .await?;
        let mut slot = self.slot.lock();
        if let Some(held) = &slot.held {
            // The name may be another's since (see `hold`).
            return Ok(Arc::clone(held));
        }
        slot.seen = Arc::downgrade(&file);
        Ok(file)
    }

    /// The file, made if it does not exist, and kept open.
    async fn file_to_append(&self) -> Result<Arc<File>> {
        if let Some(file) = self.slot.lock().held.clone() {
            return Ok(file);
        }
        if self.dead.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        let (dir, name) = (Arc::clone(&self.dir), self.path_in(Path::new("")));
        let file = blocking(move || {
            dir.with(|dir| {
                let path = dir.join(name);
                let options = File::options().read(true).write(true).create(true).truncate(false).open(&path);
                at("open", &path, options).map(Arc::new)
            })
        })
        .await?;
        if !self.beside.load(Ordering::Acquire) {
            self.home.soil_dir(&self.dir.path());
        }
        let mut slot = self.slot.lock();
        slot.seen = Arc::downgrade(&file);
        slot.held = Some(Arc::clone(&file));
        Ok(file)
    }

    fn soil(&self) {
        if !self.dirty.swap(true, Ordering::AcqRel) {
            self.home.soil(Weak::clone(&self.this));
        }
    }

    /// Makes what was written durable.
    pub(super) async fn sync(&self) -> Result<()> {
        // Cleared first: a write that comes while the sync runs makes it dirty again.
        self.dirty.store(false, Ordering::Release);
        if self.freed.load(Ordering::Acquire) || self.erased.load(Ordering::Acquire) {
            return Ok(());
        }
        let (file, path) = (self.file().await?, self.path());
        blocking(move || at("sync", &path, file.sync_data())).await
    }

    async fn seal_now(&self, sealing: Sealing) -> Result<()> {
        let Sealing { end, sidecars, trim, mut change, .. } = sealing;
        if self.dead.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        self.sync().await?;
        change.put(Table::Segments, &self.key(), &checksums(&sidecars));
        let (dir, base) = (self.dir.path(), self.base);
        let files: Vec<_> =
            sidecars.into_iter().map(|(kind, bytes)| (self.sidecar_in(&dir, kind, end), bytes)).collect();
        blocking(move || {
            for (path, bytes) in &files {
                let absent = bytes.is_empty() && path.extension().is_some_and(|found| found == "txnindex");
                if absent { remove_file(path)? } else { write_file(path, bytes)? }
            }
            remove_old_snapshots(&dir, base, end)?;
            sync_dir(&dir)
        })
        .await?;
        if trim {
            self.slot.lock().held = None;
        }
        let catalog = self.home.catalog.get().ok_or(Error::Closed)?;
        catalog.submit(change).await
    }
}

impl FileSegment {
    async fn take_place_now(&self, old: &[Arc<dyn SegmentBytes>], sealing: Sealing) -> Result<()> {
        let Sealing { end, sidecars, written, change, .. } = sealing;
        let swap = {
            let mut swap = self.swap.lock();
            swap.end = end;
            *swap
        };
        let (sums, dir) = (checksums(&sidecars), self.dir.path());
        // The snapshot at its end is there already.
        let derived = sidecars.into_iter().filter_map(|(kind, bytes)| {
            let name = match kind {
                Kind::OffsetIndex => "index",
                Kind::TimeIndex => "timeindex",
                Kind::TxnIndex if !bytes.is_empty() => "txnindex",
                Kind::TxnIndex | Kind::Snapshot => return None,
            };
            Some((names::swap_file(&dir, name, swap), bytes))
        });
        let derived: Vec<_> = derived.collect();
        let (file, from) = (self.file_to_append().await?, self.path());
        let to = names::swap_file(&dir, "log", swap);
        // All of it, before the catalog says that it is there.
        blocking(move || {
            if let Some(written) = written.and_then(|at| u64::try_from(at).ok()) {
                // It is not younger for having been compacted.
                let time = UNIX_EPOCH + Duration::from_millis(written);
                at("set the time of", &from, file.set_modified(time))?;
            }
            at("sync", &from, file.sync_all())?;
            derived.iter().try_for_each(|(path, bytes)| write_file(path, bytes))?;
            at("rename", &from, fs::rename(&from, &to))?;
            sync_dir(&dir)
        })
        .await?;
        let mut all = Change::vital();
        for segment in old {
            segment.hold().await?;
            segment.forget(&mut all).await?;
        }
        all.put(Table::Segments, &self.key(), &sums);
        all.join(change);
        let catalog = self.home.catalog.get().ok_or(Error::Closed)?;
        // From here on its files are removed only if it is known that the commit did not happen.
        self.beside.store(false, Ordering::Release);
        let outcome = catalog.submit(all).await;
        if outcome.as_ref().is_err_and(Error::is_no_room) {
            self.beside.store(true, Ordering::Release);
        }
        outcome
    }

    async fn settle_now(&self) -> Result<()> {
        let (dir, swap) = (self.dir.path(), *self.swap.lock());
        blocking(move || swap::finish(&dir, swap)).await?;
        // It has its name, and is opened when it is read.
        self.slot.lock().held = None;
        Ok(())
    }
}

impl Copies for FileSegment {
    fn read(&self, position: u64, mut buf: BytesMut) -> Io<'_, BytesMut> {
        Box::pin(async move {
            let file = self.file().await?;
            let hopeful = rustix::io::preadv2(
                &file,
                &mut [IoSliceMut::new(&mut buf)],
                position,
                ReadWriteFlags::NOWAIT,
            );
            // Any failure of the hopeful try is settled by the blocking read.
            let done = hopeful.unwrap_or(0);
            if done == buf.len() {
                return Ok(buf);
            }
            let path = self.path();
            blocking(move || {
                at("read", &path, file.read_exact_at(&mut buf[done..], position + done as u64))?;
                Ok(buf)
            })
            .await
        })
    }
}

impl SegmentBytes for FileSegment {
    fn begin(&self) -> Io<'_, ()> {
        Box::pin(async { self.file_to_append().await.map(drop) })
    }

    fn reserve(&self, _: u64, _: u64) -> Io<'_, ()> {
        Box::pin(async {
            if self.beside.load(Ordering::Acquire) {
                self.home.room_to_clean().await?;
            }
            self.file_to_append().await.map(drop)
        })
    }

    fn write(&self, position: u64, data: Bytes, _: Durability) -> Io<'_, ()> {
        Box::pin(async move {
            let (file, path) = (self.file_to_append().await?, self.path());
            let outcome = blocking(move || at("write", &path, file.write_all_at(&data, position))).await;
            // Even a failed write may have left bytes. What is beside the log is no concern of whoever flushes it.
            if !self.beside.load(Ordering::Acquire) {
                self.soil();
            }
            outcome
        })
    }

    fn locate(&self, position: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        Box::pin(async move { Ok(Some(vec![Piece::new(self.file().await?, position, len)])) })
    }

    fn found(&self) {
        self.soil();
        self.home.soil_dir(&self.dir.path());
    }

    fn holders(&self, at: u64, len: u64) -> Io<'_, Vec<Holder>> {
        Box::pin(async move {
            let device: Arc<dyn Device> = Arc::new(FileDevice::of(self.file().await?, &self.path())?);
            Ok(vec![Holder { device, at, len, of: 0 }])
        })
    }

    fn healing(&self) -> &Arc<Healing> {
        &self.home.healing
    }

    fn cut(&self, end: u64) -> Io<'_, ()> {
        Box::pin(async move {
            let (file, path) = (self.file().await?, self.path());
            blocking(move || at("truncate", &path, file.set_len(end))).await?;
            self.soil();
            Ok(())
        })
    }

    fn sidecar(&self, kind: Kind, end: i64) -> Io<'_, Option<Bytes>> {
        Box::pin(async move {
            let known = self.record()?.and_then(|record| record.blobs.get(&kind).cloned());
            match &known {
                // A snapshot says itself whether it is whole.
                None if kind != Kind::Snapshot => return Ok(None),
                Some(blob) if blob.len == 0 => return Ok(Some(Bytes::new())),
                _ => {}
            }
            let (dir, name) = (Arc::clone(&self.dir), self.sidecar_in(Path::new(""), kind, end));
            let wanted = name.clone();
            let found = blocking(move || dir.with(|dir| read_whole(&dir.join(wanted)))).await?;
            let Some(blob) = known else { return Ok(found) };
            let good = found.filter(|b| b.len() as u64 == blob.len && crc32c::crc32c(b) == blob.crc);
            if good.is_none() {
                let path = self.dir.path().join(name);
                tracing::warn!("{} is missing or not as it was written, and is not used", path.display());
            }
            Ok(good)
        })
    }

    fn seal(&self, sealing: Sealing) -> Io<'_, ()> {
        Box::pin(self.seal_now(sealing))
    }

    fn forget<'a>(&'a self, change: &'a mut Change) -> Io<'a, ()> {
        // A file below its log's start is no part of the log: the partition's record says it all.
        self.dead.store(true, Ordering::Release);
        change.delete(Table::Segments, &self.key());
        Box::pin(async { Ok(()) })
    }

    fn forgotten(&self) {
        self.freed.store(true, Ordering::Release);
        self.slot.lock().held = None;
    }

    fn take_place<'a>(&'a self, old: &'a [Arc<dyn SegmentBytes>], sealing: Sealing) -> Io<'a, ()> {
        Box::pin(self.take_place_now(old, sealing))
    }

    fn settle<'a>(&'a self, _: &'a [Arc<dyn SegmentBytes>]) -> Io<'a, ()> {
        Box::pin(self.settle_now())
    }

    fn hold(&self) -> Io<'_, ()> {
        Box::pin(async {
            let file = self.file().await?;
            // A read that is about to open the name by itself finds this one first.
            self.slot.lock().held.get_or_insert(file);
            Ok(())
        })
    }

    fn replaced(&self) {
        // Its name is another's or gone; the open file is what is left, and goes with the last lease.
    }

    fn erase(&self) -> Io<'_, ()> {
        self.dead.store(true, Ordering::Release);
        self.erased.store(true, Ordering::Release);
        self.slot.lock().held = None;
        let (names, dir) = (self.names(), Arc::clone(&self.dir));
        Box::pin(async move {
            blocking(move || {
                dir.with(|dir| {
                    names.iter().try_for_each(|name| remove_file(&dir.join(name)))?;
                    sync_dir(dir)
                })
            })
            .await?;
            let (Some(catalog), Some(_)) = (self.home.catalog.get(), self.record()?) else { return Ok(()) };
            let mut change = Change::vital();
            change.delete(Table::Segments, &self.key());
            catalog.submit(change).await
        })
    }
}

impl Drop for FileSegment {
    fn drop(&mut self) {
        if *self.beside.get_mut() {
            // Written for nothing: it never took its place.
            let names = swap::names_beside(Path::new(""), *self.swap.get_mut()).collect();
            let dir = Arc::clone(&self.dir);
            self.home.tasks.spawn(Box::pin(async move {
                if let Err(error) = remove_all(dir, names).await {
                    tracing::warn!(
                        "what compaction wrote for nothing is there until the next start: {error}"
                    );
                }
            }));
            return;
        }
        if !*self.freed.get_mut() {
            return;
        }
        let (dir, names) = (Arc::clone(&self.dir), self.names().to_vec());
        self.home.tasks.spawn(Box::pin(async move {
            if let Err(error) = remove_all(dir, names).await {
                // The next start removes it: it lies below its log's start.
                tracing::warn!("a deleted segment is still there: {error}");
            }
        }));
    }
}

/// Lengths and checksums of files that can't vouch for themselves.
fn checksums(sidecars: &[(Kind, Bytes)]) -> SegmentRecord {
    let blob = |bytes: &Bytes| BlobRecord { len: bytes.len() as u64, crc: crc32c::crc32c(bytes), at: None };
    let blobs = sidecars.iter().map(|(kind, bytes)| (*kind, blob(bytes))).collect();
    SegmentRecord { blobs, ..SegmentRecord::default() }
}

/// The bytes of a derived file; `None` when it is missing, or too large to be one.
fn read_whole(path: &Path) -> Result<Option<Bytes>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        outcome => at("open", path, outcome)?,
    };
    let mut bytes = Vec::new();
    at("read", path, file.take(LARGEST_SIDECAR + 1).read_to_end(&mut bytes))?;
    Ok((bytes.len() as u64 <= LARGEST_SIDECAR).then(|| Bytes::from(bytes)))
}

/// Snapshots are kept where a segment starts, as Kafka does, and where the last one ends; what earlier stops left is
/// not.
fn remove_old_snapshots(dir: &Path, base: i64, end: i64) -> Result<()> {
    let starts = |offset| names::offset_file(dir, offset, "log").exists();
    for (name, path) in entries(dir)? {
        let offset = names::offset_of(&name, "snapshot");
        if offset.is_some_and(|offset| offset != base && offset < end && !starts(offset)) {
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// Removes files by the name that their directory has when its turn comes.
async fn remove_all(dir: Arc<PartitionDir>, names: Vec<PathBuf>) -> Result<()> {
    blocking(move || dir.with(|dir| names.iter().try_for_each(|name| remove_file(&dir.join(name))))).await
}
