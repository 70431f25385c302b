//! A regular file or a block device of the operating system, through its page cache or past it (`direct`).
//!
//! Cost of a cached read: one `preadv2(RWF_NOWAIT)`, no thread hop, no copy besides the kernel's. What would wait for the
//! disk runs on tokio's blocking threads: a hop each for reads that are not cached, or go past the page cache, for
//! flushes and discards; writes into the page cache share hops (`write_queue`). A file system in memory has no disk to
//! wait for: there what is not large ([`at_once`]) is done by the caller, one system call for a read, two (a look at the
//! file's length) for a change. What comes through [`Device::write_now`] looks at the length once in a tick of the
//! kernel's coarse clock (some milliseconds).

use super::direct::Direct;
use super::resident::Residency;
use super::syncs::Syncs;
use super::write_back::WriteBack;
use super::write_queue::WriteQueue;
use super::{Device, Durability, Extent, INSTANT, Identity, Io, Piece, ZeroMode, check_range, push_extent};
use crate::error::{Error, Operation, Result};
use bytes::{Bytes, BytesMut};
use rustix::fs::{Advice, FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::Semaphore;

/// Extents that one call looks for at most, two seeks each.
const MOST_EXTENTS: usize = 1024;
/// Bytes that one call brings into the page cache at most.
const MOST_PREFETCH: u64 = 64 << 20;
/// Bytes of a page of the page cache. Zeroing a disk throws its pages away: whole ones must be all that it meets.
const PAGE: u64 = 4096;
/// What the kernel is taken to read ahead at once where it does not say.
const UNKNOWN_AHEAD: u64 = 2 << 20;
/// More than that is not believed.
const MOST_AHEAD: u64 = 64 << 20;

/// What the holder of a [`FileDevice`] may do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Reads only; anybody else may hold it open too.
    ReadOnly,
    /// Reads and writes, under an exclusive lock against other holders.
    ReadWrite,
}

/// Whether the page cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// Reads and writes go through it.
    PageCache,
    /// They go past it (`O_DIRECT`): for whoever has a cache of its own, such as a mounted file system.
    Direct,
}

/// Bytes of one operation that a caller may spend its own time on, where there is no disk: copying them takes some
/// hundred microseconds. (Writes of 256 KiB and more by several threads at once were tried: no faster, for half as much
/// processor time again.)
fn at_once(operation: Operation) -> u64 {
    if operation == Operation::Flush { u64::MAX } else { INSTANT }
}

/// Blocking threads that a program with files open should allow, made as they are needed: the share of some twenty files.
pub const BLOCKING_THREADS: usize = 512;
/// Blocking threads that the operations of one file may hold, besides its flushes: a disk that hangs must leave some to the
/// others.
const MOST_THREADS: usize = 24;

/// A file or block device that is open.
#[derive(Debug)]
pub struct FileDevice {
    file: Arc<File>,
    name: String,
    path: PathBuf,
    /// What was last found; grows only.
    size: AtomicU64,
    is_regular: bool,
    mode: OpenMode,
    /// `None`: through the page cache.
    direct: Option<Arc<Direct>>,
    /// What zeroing and giving back want to be aligned to: 1 for files.
    granule: u64,
    /// Whether holes can be punched fast. Tried when it was opened, so that nobody waits for it later.
    punches: bool,
    identity: Identity,
    /// Whether it lies on a rotating disk, once that was looked for.
    rotates: OnceLock<bool>,
    /// How far the system reads ahead, once that was looked for.
    ahead: OnceLock<u64>,
    writes: Arc<WriteQueue>,
    write_back: Arc<WriteBack>,
    residency: Arc<Residency>,
    syncs: Arc<Syncs>,
    /// How many more operations may hold a blocking thread.
    turns: Arc<Semaphore>,
    /// The tick in which the length was last found right.
    looked: AtomicU64,
}

/// Why a blocking operation failed.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) errno: Errno,
    /// It failed to become durable, whatever was asked: what is in the cache may be lost, and a later flush may
    /// say that all is well.
    pub(super) flush: bool,
}

impl From<Errno> for Failed {
    fn from(errno: Errno) -> Self {
        Self { errno, flush: false }
    }
}

impl FileDevice {
    /// Opens `path`, which must exist, through the page cache.
    pub fn open(path: &Path, mode: OpenMode) -> Result<Self> {
        Self::open_with(path, mode, Caching::PageCache)
    }

    /// Opens `path`, which must exist. Past the page cache its size is that of its whole blocks.
    pub fn open_with(path: &Path, mode: OpenMode, caching: Caching) -> Result<Self> {
        let name = path.display().to_string();
        let failed = |errno| match (errno, caching) {
            // What `open` says where there is no O_DIRECT, and what `Direct::of` says.
            (Errno::INVAL | Errno::OPNOTSUPP, Caching::Direct) => Error::NoDirect { device: name.clone() },
            _ => Error::Open { device: name.clone(), errno },
        };
        let flags = if caching == Caching::Direct { OFlags::DIRECT } else { OFlags::empty() };
        let file = File::options()
            .read(true)
            .write(mode == OpenMode::ReadWrite)
            .custom_flags(flags.bits() as i32)
            .open(path)
            .map_err(|e| failed(errno_of(&e)))?;
        if mode == OpenMode::ReadWrite {
            let locked = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
            locked.map_err(|errno| match errno {
                Errno::WOULDBLOCK => Error::InUse { device: name.clone() },
                other => failed(other),
            })?;
        }
        Self::over(Arc::new(file), path, mode, caching).map_err(failed)
    }

    /// A file that is open already for reading and writing, under whatever lock its owner has: for reading, through the page
    /// cache, and to tell what is in it.
    pub fn of(file: Arc<File>, path: &Path) -> Result<Self> {
        let failed = |errno| Error::Open { device: path.display().to_string(), errno };
        let mut device = Self::over(file, path, OpenMode::ReadOnly, Caching::PageCache).map_err(failed)?;
        if !device.residency.is_in_memory() {
            device.residency = Arc::new(Residency::of_writable());
        }
        Ok(device)
    }

    fn over(
        file: Arc<File>,
        path: &Path,
        mode: OpenMode,
        caching: Caching,
    ) -> std::result::Result<Self, Errno> {
        let stat = rustix::fs::fstat(&file)?;
        let is_regular = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => true,
            FileType::BlockDevice => false,
            _ => return Err(Errno::NOTBLK),
        };
        let direct = match caching {
            Caching::PageCache => None,
            Caching::Direct => Some(Arc::new(Direct::of(&file)?)),
        };
        let size = size_of(&file, direct.as_deref())?;
        let residency = if is_regular && is_in_memory(&file)? {
            Residency::in_memory()
        } else if mode == OpenMode::ReadWrite {
            Residency::of_writable()
        } else {
            Residency::unknown()
        };
        let granule = if is_regular { 1 } else { u64::from(rustix::fs::ioctl_blksszget(&file)?).max(PAGE) };
        let punches = mode == OpenMode::ReadWrite
            && if is_regular { can_punch(&file) } else { gives_space_back(&file) };
        let identity = Identity::of(&stat);
        let (name, path, size) = (path.display().to_string(), path.to_owned(), AtomicU64::new(size));
        let writes = Arc::new(WriteQueue::new(Arc::clone(&file)));
        let write_back = Arc::new(WriteBack::new(Arc::clone(&file)));
        Ok(Self {
            file,
            name,
            path,
            size,
            is_regular,
            mode,
            direct,
            granule,
            punches,
            identity,
            rotates: OnceLock::new(),
            ahead: OnceLock::new(),
            writes,
            write_back,
            residency: Arc::new(residency),
            syncs: Arc::default(),
            turns: Arc::new(Semaphore::new(MOST_THREADS)),
            looked: AtomicU64::new(0),
        })
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` where it may block.
    fn blocking<T: Send + 'static>(
        &self,
        operation: Operation,
        at: u64,
        len: u64,
        work: impl FnOnce(&File) -> std::result::Result<T, Failed> + Send + 'static,
    ) -> Io<'_, T> {
        let least = self.least(operation);
        if self.residency.is_in_memory() && len <= at_once(operation) {
            let outcome = check_length(&self.file, least, operation).and_then(|()| work(&self.file));
            let outcome = outcome.map_err(|failed| self.told(operation, at, len, &failed));
            return Box::pin(std::future::ready(outcome));
        }
        let (file, turns) = (Arc::clone(&self.file), Arc::clone(&self.turns));
        Box::pin(async move {
            // A flush shows whether the disk still answers: it never waits for a turn.
            let turn = match operation {
                Operation::Flush => None,
                _ => turns.acquire_owned().await.ok(),
            };
            let done = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                check_length(&file, least, operation)?;
                work(&file)
            });
            // A join error means that the runtime is shutting down: the operation's outcome is unknown.
            let outcome = done.await.unwrap_or(Err(Failed::from(Errno::SHUTDOWN)));
            outcome.map_err(|failed| self.told(operation, at, len, &failed))
        })
    }

    fn is_long_enough(&self) -> bool {
        check_length(&self.file, self.least(Operation::Write), Operation::Write).is_ok()
    }

    /// Whether the file was long enough in this tick of the coarse clock. A look costs a tenth of what a small write
    /// does. Not enough before a write at the very end: that would give a file back its length that was cut short in
    /// this tick, and nobody would ever know.
    fn was_long_enough(&self) -> bool {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
        let tick = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        if self.looked.load(Ordering::Relaxed) == tick {
            return true;
        }
        let is_so = self.is_long_enough();
        if is_so {
            self.looked.store(tick, Ordering::Relaxed);
        }
        is_so
    }

    /// What `check_length` is to find before an operation; 0 for any length.
    fn least(&self, operation: Operation) -> u64 {
        if self.is_regular && operation != Operation::Read { self.size() } else { 0 }
    }

    fn told(&self, operation: Operation, at: u64, len: u64, failed: &Failed) -> Error {
        let operation = if failed.flush { Operation::Flush } else { operation };
        self.failed(operation, at, len, failed.errno)
    }

    fn failed(&self, operation: Operation, at: u64, len: u64, errno: Errno) -> Error {
        Error::Io { device: self.name.clone(), operation, at, len, errno }
    }

    fn check(&self, operation: Operation, at: u64, len: u64) -> Result<()> {
        if self.mode == OpenMode::ReadOnly && operation != Operation::Read && operation != Operation::Flush {
            return Err(Error::ReadOnly { operation });
        }
        check_range(operation, at, len, self.size())
    }
}

impl Device for FileDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn refresh(&self) -> Io<'_, u64> {
        let file = Arc::clone(&self.file);
        let direct = self.direct.clone();
        Box::pin(async move {
            // A network file system asks its server: not on this thread.
            let looked = tokio::task::spawn_blocking(move || size_of(&file, direct.as_deref())).await;
            let size = looked
                .unwrap_or(Err(Errno::SHUTDOWN))
                .map_err(|errno| Error::Size { device: self.name.clone(), errno })?;
            let promised = self.size.fetch_max(size, Ordering::AcqRel);
            if size < promised {
                return Err(Error::Shrank { device: self.name.clone(), promised, size });
            }
            Ok(size)
        })
    }

    fn read(&self, at: u64, mut buf: BytesMut) -> Io<'_, BytesMut> {
        let len = buf.len() as u64;
        if let Err(refused) = self.check(Operation::Read, at, len) {
            return Box::pin(async { Err(refused) });
        }
        if let Some(direct) = self.direct.clone() {
            return self.blocking(Operation::Read, at, len, move |file| {
                direct.read(file, at, &mut buf)?;
                Ok(buf)
            });
        }
        let mut done = 0;
        if !self.residency.is_in_memory() {
            // Any failure of the hopeful try (not cached, not supported) is settled by the blocking read.
            let parts = &mut [IoSliceMut::new(&mut buf)];
            done = rustix::io::preadv2(&self.file, parts, at, ReadWriteFlags::NOWAIT).unwrap_or(0);
            if done == buf.len() {
                return Box::pin(std::future::ready(Ok(buf)));
            }
        }
        self.blocking(Operation::Read, at, len, move |file| {
            read_exact(file, at + done as u64, &mut buf[done..])?;
            Ok(buf)
        })
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        let len = data.len() as u64;
        if let Err(refused) = self.check(Operation::Write, at, len) {
            return Box::pin(async { Err(refused) });
        }
        let direct = self.direct.clone();
        if !self.residency.is_in_memory() && direct.is_none() && durability == Durability::Cached {
            let written = self.writes.submit(at, data, self.least(Operation::Write));
            return Box::pin(async move {
                written.await.map_err(|failed| self.told(Operation::Write, at, len, &failed))
            });
        }
        let syncs = Arc::clone(&self.syncs);
        self.blocking(Operation::Write, at, len, move |file| {
            let write = || match &direct {
                Some(direct) => direct.write(file, at, &data, durability),
                None => write_all(file, at, &data, durability),
            };
            if durability == Durability::Stable { syncs.run(write) } else { write() }
        })
    }

    fn is_instant(&self) -> bool {
        self.residency.is_in_memory() && self.direct.is_none() && self.mode == OpenMode::ReadWrite
    }

    fn read_now(&self, at: u64, buf: &mut [u8]) -> bool {
        if self.direct.is_some() || self.check(Operation::Read, at, buf.len() as u64).is_err() {
            return false;
        }
        if self.residency.is_in_memory() {
            return buf.len() as u64 <= at_once(Operation::Read) && read_exact(&self.file, at, buf).is_ok();
        }
        let len = buf.len();
        let parts = &mut [IoSliceMut::new(buf)];
        rustix::io::preadv2(&self.file, parts, at, ReadWriteFlags::NOWAIT) == Ok(len)
    }

    fn write_now(&self, at: u64, data: &[u8]) -> bool {
        let len = data.len() as u64;
        self.is_instant()
            && len <= at_once(Operation::Write)
            && self.check(Operation::Write, at, len).is_ok()
            && (at + len < self.size() && self.was_long_enough() || self.is_long_enough())
            && write_all(&self.file, at, data, Durability::Cached).is_ok()
    }

    fn flush(&self) -> Io<'_, ()> {
        self.write_back.is_flushed();
        let syncs = Arc::clone(&self.syncs);
        self.blocking(Operation::Flush, 0, self.size(), move |file| syncs.run(|| sync(file)))
    }

    fn begin_write_back(&self, at: u64, len: u64) {
        if !self.residency.is_in_memory()
            && self.direct.is_none()
            && self.check(Operation::Write, at, len).is_ok()
        {
            self.write_back.begin(at..at + len);
        }
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        if let Err(refused) = self.check(Operation::Discard, at, len) {
            return Box::pin(async { Err(refused) });
        }
        // It is advice: the ends of what is not whole blocks of a disk stay.
        let middle = within(at..at + len, self.granule);
        self.blocking(Operation::Discard, at, len, move |file| {
            match punch(file, middle.start, middle.end - middle.start) {
                // A file system without holes keeps the data, which is allowed.
                Err(Errno::OPNOTSUPP) => Ok(()),
                other => Ok(other?),
            }
        })
    }

    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        if let Err(refused) = self.check(Operation::WriteZeroes, at, len) {
            return Box::pin(async { Err(refused) });
        }
        let (direct, syncs) = (self.direct.clone(), Arc::clone(&self.syncs));
        let (middle, end) = (within(at..at + len, self.granule), at + len);
        self.blocking(Operation::WriteZeroes, at, len, move |file| {
            let write = |at: u64, len: u64| match &direct {
                _ if len == 0 => Ok(()),
                Some(direct) => direct.zero(file, at, len),
                None => zero_by_writing(file, at, len),
            };
            let quick = match mode {
                _ if middle.is_empty() => Ok(()),
                ZeroMode::MayPunch => punch(file, middle.start, middle.end - middle.start),
                ZeroMode::Allocate => {
                    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(file, flags, middle.start, middle.end - middle.start)
                }
            };
            match quick {
                Err(Errno::OPNOTSUPP) => write(at, len)?,
                Err(errno) => return Err(errno.into()),
                // A disk takes whole blocks only.
                Ok(()) => {
                    write(at, middle.start - at)?;
                    write(middle.end, end - middle.end)?;
                }
            }
            if durability == Durability::Stable { syncs.run(|| sync(file)) } else { Ok(()) }
        })
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        // What goes past the page cache has nothing there to send.
        let piece = || {
            let (file, residency) = (Arc::clone(&self.file), Some(Arc::clone(&self.residency)));
            vec![Piece { residency, ..Piece::new(file, at, len) }]
        };
        let located = self.check(Operation::Read, at, len).map(|()| self.direct.is_none().then(piece));
        Box::pin(std::future::ready(located))
    }

    /// Holes of a file are told by its file system; a block device says that all is data.
    fn extents(&self, at: u64, len: u64) -> Io<'_, Vec<Extent>> {
        if let Err(refused) = self.check(Operation::Read, at, len) {
            return Box::pin(async { Err(refused) });
        }
        if !self.is_regular || len == 0 {
            let all = Vec::from_iter((len > 0).then_some(Extent { len, hole: false }));
            return Box::pin(async { Ok(all) });
        }
        self.blocking(Operation::Read, at, len, move |file| Ok(extents_of(file, at, len)?))
    }

    fn prefetch(&self, at: u64, len: u64) -> Io<'_, ()> {
        if let Err(refused) = self.check(Operation::Read, at, len) {
            return Box::pin(async { Err(refused) });
        }
        let wanted = NonZeroU64::new(len.min(MOST_PREFETCH)).filter(|_| self.direct.is_none());
        let Some(wanted) = wanted else { return Box::pin(async { Ok(()) }) };
        // It may wait for a place in the disk's queue: not on this thread.
        self.blocking(Operation::Read, at, len, move |file| {
            Ok(rustix::fs::fadvise(file, at, Some(wanted), Advice::WillNeed)?)
        })
    }

    /// A file system in memory has no other place for its pages.
    fn keeps_pages(&self) -> bool {
        self.direct.is_none() && !self.residency.is_in_memory()
    }

    fn cold(&self, at: u64, len: u64) -> Vec<Range<u64>> {
        let is_known = self.direct.is_none() && self.check(Operation::Read, at, len).is_ok();
        if is_known { self.residency.absent(&self.file, at, len) } else { Vec::new() }
    }

    /// The kernel asks for a window while the one before is being read.
    fn reads_ahead(&self) -> u64 {
        *self.ahead.get_or_init(|| {
            let window = disk_says(&self.file, self.is_regular, "read_ahead_kb").map(|kib| kib << 10);
            2 * window.unwrap_or(UNKNOWN_AHEAD).min(MOST_AHEAD)
        })
    }

    fn forget(&self, ranges: Vec<Range<u64>>) -> Io<'_, ()> {
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
            return Box::pin(async { Ok(()) });
        };
        let (at, len) = (first.start, last.end - first.start);
        self.blocking(Operation::Read, at, len, move |file| {
            for range in ranges {
                // Without a length it would be all that follows.
                let len = NonZeroU64::new(range.end.saturating_sub(range.start));
                if len.is_some() {
                    rustix::fs::fadvise(file, range.start, len, Advice::DontNeed)?;
                }
            }
            Ok(())
        })
    }

    /// Punching is fast where the file system can do it, and on a disk that knows of space it need not keep. What keeps
    /// its space may be slow.
    fn zeroes_fast(&self, mode: ZeroMode) -> bool {
        mode == ZeroMode::MayPunch && self.punches
    }

    fn identity(&self) -> Option<Identity> {
        Some(self.identity)
    }

    fn is_rotational(&self) -> bool {
        *self.rotates.get_or_init(|| rotates(&self.file, self.is_regular).unwrap_or(false))
    }
}

/// What of a range of a regular file is data and what holes, as far as [`MOST_EXTENTS`] go.
fn extents_of(file: &File, at: u64, len: u64) -> std::result::Result<Vec<Extent>, Errno> {
    let end = at + len;
    if (rustix::fs::fstat(file)?.st_size as u64) < end {
        // It was cut short under us: that is no hole.
        return Err(Errno::IO);
    }
    // Seeking moves the file's own position, which nothing here uses.
    let seek = |to| rustix::fs::seek(file, to).map(|found| found.min(end));
    let mut extents = Vec::new();
    let mut next = at;
    // Writers may change the file meanwhile: what is told was so at some moment.
    for _ in 0..MOST_EXTENTS / 2 {
        let data = match seek(SeekFrom::Data(next)) {
            Ok(data) => data.max(next),
            // No data behind it.
            Err(Errno::NXIO) => end,
            // A file system that does not tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => next,
            Err(errno) => return Err(errno),
        };
        push_extent(&mut extents, Extent { len: data - next, hole: true });
        next = match seek(SeekFrom::Hole(data)) {
            _ if data == end => end,
            Ok(hole) => hole.max(data),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => end,
            Err(errno) => return Err(errno),
        };
        push_extent(&mut extents, Extent { len: next - data, hole: false });
        if next == end {
            break;
        }
    }
    if extents.is_empty() {
        extents.push(Extent { len, hole: false });
    }
    Ok(extents)
}

/// Whether the file system can punch holes, tried where the file has nothing: behind its end.
fn can_punch(file: &File) -> bool {
    let behind = rustix::fs::fstat(file).map(|stat| (stat.st_size as u64).next_multiple_of(4096));
    behind.and_then(|at| punch(file, at, 4096)).is_ok()
}

/// What sysfs says of the disk that a file lies on, or that it is; `None` where that cannot be told.
fn disk_says(file: &File, is_regular: bool, what: &str) -> Option<u64> {
    let stat = rustix::fs::fstat(file).ok()?;
    let device = if is_regular { stat.st_dev } else { stat.st_rdev };
    let dir = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    // A partition has no queue of its own; its disk's lies one level up.
    let told = ["queue", "../queue"].map(|queue| std::fs::read_to_string(format!("{dir}/{queue}/{what}")));
    told.into_iter().flatten().next()?.trim().parse().ok()
}

fn rotates(file: &File, is_regular: bool) -> Option<bool> {
    disk_says(file, is_regular, "rotational").map(|told| told == 1)
}

/// Whether a disk zeroes by itself, and knows of space that is not used: one that only does the first writes it all, too.
fn gives_space_back(disk: &File) -> bool {
    ["discard_max_bytes", "write_zeroes_max_bytes"]
        .iter()
        .all(|limit| disk_says(disk, false, limit).is_some_and(|most| most > 0))
}

/// Whether a file consists of one hole: it has never been written to and reads as zeroes. `false` where that cannot be
/// told, as for block devices.
#[must_use]
pub fn is_one_hole(file: &File) -> bool {
    let is_file = rustix::fs::fstat(file)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    // Moves the file's own position, which nothing here uses: all reads and writes say where.
    is_file && rustix::fs::seek(file, SeekFrom::Data(0)) == Err(Errno::NXIO)
}

/// Whether the file lies in a file system without a disk.
fn is_in_memory(file: &File) -> std::result::Result<bool, Errno> {
    /// What `statfs(2)` calls tmpfs and ramfs.
    const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    let kind = rustix::fs::fstatfs(file)?.f_type as u64;
    Ok(IN_MEMORY.contains(&(kind & 0xffff_ffff)))
}

/// Bytes that a file or block device has now. To seek to the end works for both, and costs a third of an `fstat`; it moves
/// the file's own position, which nothing here uses.
pub(super) fn length(file: &File) -> std::result::Result<u64, Errno> {
    rustix::fs::seek(file, SeekFrom::End(0))
}

/// A regular file may be cut short under us: a write behind its new end would bring the length back, and zeroes where
/// data was, without an error. `least`: 0 for any length.
pub(super) fn check_length(file: &File, least: u64, operation: Operation) -> std::result::Result<(), Failed> {
    if least > 0 && length(file)? < least {
        return Err(Failed { errno: Errno::IO, flush: operation == Operation::Flush });
    }
    Ok(())
}

fn size_of(file: &File, direct: Option<&Direct>) -> std::result::Result<u64, Errno> {
    let size = length(file)?;
    Ok(direct.map_or(size, |direct| direct.reachable(size)))
}

pub(super) fn read_exact(file: &File, mut at: u64, mut out: &mut [u8]) -> std::result::Result<(), Errno> {
    while !out.is_empty() {
        match rustix::io::pread(file, &mut *out, at) {
            // The file ends before its size at opening: it was truncated under us.
            Ok(0) => return Err(Errno::IO),
            Ok(n) => {
                out = &mut out[n..];
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Makes what was written durable.
fn sync(file: &File) -> std::result::Result<(), Failed> {
    rustix::fs::fdatasync(file).map_err(|errno| Failed { errno, flush: true })
}

pub(super) fn write_all(
    file: &File,
    mut at: u64,
    mut data: &[u8],
    durability: Durability,
) -> std::result::Result<(), Failed> {
    while !data.is_empty() {
        let written = match durability {
            Durability::Cached => rustix::io::pwrite(file, data, at),
            Durability::Stable => {
                rustix::io::pwritev2(file, &[IoSlice::new(data)], at, ReadWriteFlags::DSYNC)
            }
        };
        match written {
            Ok(0) => return Err(Errno::IO.into()),
            Ok(n) => {
                data = &data[n..];
                at += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) if durability == Durability::Cached => return Err(errno.into()),
            // A stable write fails in its write or in its sync. No space for the write is the client's affair: then
            // the same without the sync fails too. Anything else counts as the sync's, which is the graver one.
            Err(errno @ (Errno::NOSPC | Errno::DQUOT)) => {
                write_all(file, at, data, Durability::Cached)?;
                return Err(Failed { errno, flush: true });
            }
            Err(errno) => return Err(Failed { errno, flush: true }),
        }
    }
    Ok(())
}

/// The whole granules within a range; empty, and at one of its ends, if there are none.
fn within(range: Range<u64>, granule: u64) -> Range<u64> {
    let start = range.start.next_multiple_of(granule).min(range.end);
    start..(range.end / granule * granule).max(start)
}

fn punch(file: &File, at: u64, len: u64) -> std::result::Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len)
}

fn zero_by_writing(file: &File, mut at: u64, len: u64) -> std::result::Result<(), Failed> {
    static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];
    let end = at + len;
    while at < end {
        let n = (end - at).min(ZEROES.len() as u64) as usize;
        write_all(file, at, &ZEROES[..n], Durability::Cached)?;
        at += n as u64;
    }
    Ok(())
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests;
