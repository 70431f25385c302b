//! The vocabulary of block devices: what a file, a disk, a simulated disk and a RAID volume all understand.
//! Whoever knows this file knows the architecture.
//!
//! Shapes and units: every position and length is in bytes. Ranges are half open. A range that reaches past
//! [`Device::size`] is refused whole, with [`Error::OutOfBounds`], before anything happens.
//!
//! Invariants every implementation keeps:
//!
//! - An operation owns its buffers until it completes: a future that is dropped half-way leaves no borrowed
//!   memory behind. A dropped *write* leaves each byte old or new.
//! - Reads and writes may run concurrently and complete in any order. Overlapping writes in flight leave each
//!   block with one of the values; a mirror leaves all its legs with the *same* one.
//! - [`Device::flush`] makes durable every write that completed before it was called. A [`Durability::Stable`]
//!   write is durable when it completes. A flush that failed is never retried in the hope that it passes: the
//!   kernel has marked the pages clean.
//! - After a failed write the range holds old or new values, block by block.

mod direct;
mod file;
mod resident;
mod syncs;
mod write_back;
mod write_queue;

pub use file::{BLOCKING_THREADS, Caching, FileDevice, OpenMode, is_one_hole};

use resident::Residency;

use crate::error::{Error, Operation, Result};
use crate::runtime::BoxFuture;
use bytes::{Bytes, BytesMut};
use rustix::fs::FileType;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

/// Where copies may differ without a fault ([`Device::may_differ`]), a read makes them equal in whole multiples of so many
/// bytes.
pub const EQUALISED: u64 = 64 << 10;

/// Bytes that [`Device::read_now`] and [`Device::write_now`] take at most: longer ones are not tried.
pub const INSTANT: u64 = 1 << 20;

/// An operation of a device under way.
pub type Io<'a, T> = BoxFuture<'a, Result<T>>;

/// When a write counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Visible to every later read; a power cut may still lose it.
    Cached,
    /// On stable storage (NBD calls it FUA).
    Stable,
}

/// Whether zeroes may be stored as a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// Space may be given back: reads return zeroes, a later write may fail for want of space.
    MayPunch,
    /// Space stays allocated (NBD's `NO_HOLE`).
    Allocate,
}

/// A range of bytes in an open file, from which the kernel can send to a socket without a copy.
///
/// The `Arc` keeps the file open for as long as the piece lives, whatever becomes of the member.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The open file or block device.
    pub file: Arc<File>,
    /// First byte in the file.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Of several copies, it is the one that is read of this range as long as nothing speaks against it, and until
    /// [`Device::arrangement`] changes. Where there is one copy, it is that one.
    pub usual: bool,
    residency: Option<Arc<Residency>>,
}

impl Piece {
    /// A piece of which nothing more is known.
    #[must_use]
    pub fn new(file: Arc<File>, at: u64, len: u64) -> Self {
        Self { file, at, len, usual: true, residency: None }
    }

    /// A part of it.
    #[must_use]
    pub fn part(&self, skip: u64, len: u64) -> Self {
        let len = len.min(self.len.saturating_sub(skip));
        Self { len, at: self.at + skip, ..self.clone() }
    }

    /// Whether anybody can tell what of it is in memory.
    #[must_use]
    pub fn tells_residency(&self) -> bool {
        self.residency.as_ref().is_some_and(|residency| residency.is_known())
    }

    /// Whether all of it is in memory now, so that sending it waits for no disk. Costs a system call and a look at each
    /// page, where its file lies on a disk.
    #[must_use]
    pub fn is_resident(&self) -> bool {
        self.residency.as_ref().is_some_and(|residency| residency.holds(&self.file, self.at, self.len))
    }
}

/// A file or disk of the system, while it is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// A regular file, by the device that it lies on and its number there.
    File {
        /// Its number, as `stat(2)` has it.
        device: u64,
        /// The file's number there.
        inode: u64,
    },
    /// A block device, by its number: several nodes may lead to it.
    Disk(u64),
}

/// A device that another one is made of, and the part of a copy that lies there.
#[derive(Clone)]
pub struct Holder {
    /// The device below.
    pub device: Arc<dyn Device>,
    /// First byte there.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Which byte of the range that was asked for is the first one.
    pub of: u64,
}

impl Identity {
    /// Of what `stat(2)` was told of.
    pub(crate) fn of(stat: &rustix::fs::Stat) -> Self {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => Self::Disk(stat.st_rdev),
            _ => Self::File { device: stat.st_dev, inode: stat.st_ino },
        }
    }
}

/// A run of bytes that is stored in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, at least 1.
    pub len: u64,
    /// Nothing is stored there, and it reads as zeroes for sure. Else it is data, or nothing is known of it.
    pub hole: bool,
}

/// Puts extents behind each other; neighbours of one kind become one.
pub fn push_extent(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        _ if next.len == 0 => {}
        Some(last) if last.hole == next.hole => last.len += next.len,
        _ => extents.push(next),
    }
}

/// A block device. Object-safe: layers hold `Arc<dyn Device>` and stack.
pub trait Device: Send + Sync + 'static {
    /// What to call it in messages: a path, or a volume's name.
    fn name(&self) -> &str;

    /// Bytes it holds, as last looked at: constant while it is open, but for growth that [`Device::refresh`] finds.
    fn size(&self) -> u64;

    /// Looks again how large it is, and tells; [`Device::size`] says the same from then on. It never takes back what
    /// was promised: a device that has become smaller is an error, [`Error::Shrank`], and the size stays.
    fn refresh(&self) -> Io<'_, u64>;

    /// Reads `buf.len()` bytes at `at` into `buf` and returns it.
    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut>;

    /// Writes all of `data` at `at`.
    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()>;

    /// Whether it lies in memory: [`Device::write_now`] is worth a try, with [`INSTANT`] bytes at most.
    fn is_instant(&self) -> bool {
        false
    }

    /// Reads into `buf` where that waits for nothing, and returns whether it did: else `buf` may hold anything, and
    /// [`Device::read`] is the way, which tells of errors too. Costs no allocation.
    fn read_now(&self, _at: u64, _buf: &mut [u8]) -> bool {
        false
    }

    /// Writes all of `data` as [`Durability::Cached`] where that waits for nothing, and returns whether it did: else
    /// some of it may be written, and [`Device::write`] of the same is the way, which tells of errors too. Costs no
    /// allocation.
    fn write_now(&self, _at: u64, _data: &[u8]) -> bool {
        false
    }

    /// Makes every write that completed before this call durable.
    fn flush(&self) -> Io<'_, ()>;

    /// Begins to bring what was written of a range from memory to the disk, so that a later flush finds less to do, and
    /// returns at once. Advice: nothing becomes durable by it, and what fails is for the flush to tell.
    fn begin_write_back(&self, _at: u64, _len: u64) {}

    /// Gives the space of a range back. What it reads as afterwards is undefined, but the same on every read.
    fn discard(&self, at: u64, len: u64) -> Io<'_, ()>;

    /// Makes a range read as zeroes.
    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()>;

    /// Where the range lies in open files, in order, for `sendfile`; `None` where no kernel can send it (a
    /// simulated disk, say), and then [`Device::read`] is the way. The pieces hold good, current data at the
    /// time of the call; whoever may overwrite the range must be held off by the caller's own lease.
    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>>;

    /// How a range is stored, from `at` on: at least one extent unless the range is empty, in order, each of another
    /// kind than the one before, all within the range. They may end before the range does: the work of one call is
    /// bounded. Without knowledge everything is data, which is always safe to say.
    fn extents(&self, at: u64, len: u64) -> Io<'_, Vec<Extent>> {
        let all = check_range(Operation::Read, at, len, self.size());
        let all = all.map(|()| Vec::from_iter((len > 0).then_some(Extent { len, hole: false })));
        Box::pin(async { all })
    }

    /// The parts of a range that are known to read as zeroes without a look at any device, in order and apart from each
    /// other. Reads ask this each time: it costs no system call. Without such knowledge there are none.
    fn blank(&self, _at: u64, _len: u64) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// Brings a range into the page cache, or as much of it as is reasonable; it need not be there when this is done.
    /// Advice: where there is no such cache there is nothing to do.
    fn prefetch(&self, at: u64, len: u64) -> Io<'_, ()> {
        let checked = check_range(Operation::Read, at, len, self.size());
        Box::pin(async { checked })
    }

    /// In how many ways a range can be read that differ in the copies they go to; 1 where everything is kept once. For
    /// those who can tell good content from bad: where one way gives them bad content, another may have it good.
    fn copies(&self) -> usize {
        1
    }

    /// Reads in one of these ways, `0..copies()`. What it returns is what those copies hold: nothing is settled or
    /// repaired first, so two ways may differ, after an unclean stop legitimately, and [`Device::read`] may give
    /// something else again until the range is mended. A copy that is missing, incomplete or unreadable is an error.
    fn read_copy(&self, at: u64, buf: BytesMut, copy: usize) -> Io<'_, BytesMut> {
        if copy == 0 {
            return self.read(at, buf);
        }
        let missing = Error::NoCopy { name: self.name().to_owned(), at, len: buf.len() as u64 };
        Box::pin(async { Err(missing) })
    }

    /// Whether copies of a range may differ without a fault: after an unclean stop, before they were made equal. Costs
    /// no I/O.
    fn may_differ(&self, _at: u64, _len: u64) -> bool {
        false
    }

    /// Where a range lies on the devices that this one is made of: a holder for each part of each copy that may be read,
    /// part by part, in order. None where it is made of no others. For those who look at copies one by one, and while
    /// nobody writes the range: who reads a holder goes past all that this device knows.
    fn holders(&self, _at: u64, _len: u64) -> Vec<Holder> {
        Vec::new()
    }

    /// Whether all copies of a range can be read and hold the same. Reads each once.
    fn agree(&self, at: u64, len: u64) -> Io<'_, bool> {
        let checked = check_range(Operation::Read, at, len, self.size());
        Box::pin(async { checked.map(|()| true) })
    }

    /// Makes every copy of a range hold `good`, which the caller knows to be its content: copies that hold something
    /// else are rewritten, durably, and nothing beside the range changes. Returns how many copies were rewritten. The
    /// caller makes sure that nobody writes the range to something else meanwhile.
    ///
    /// Without copies of its own, a device compares and rewrites itself.
    fn mend(&self, at: u64, good: Bytes) -> Io<'_, u64> {
        Box::pin(async move {
            if self.read(at, buffer(good.len())).await.is_ok_and(|found| found == good) {
                return Ok(0);
            }
            self.write(at, good.clone(), Durability::Stable).await?;
            let (len, found) = (good.len() as u64, self.read(at, buffer(good.len())).await?);
            if found == good {
                return Ok(1);
            }
            let device = self.name().to_owned();
            Err(Error::Io { device, operation: Operation::Read, at, len, errno: rustix::io::Errno::IO })
        })
    }

    /// Changes whenever another copy becomes the one that is usually read, somewhere. What was learned of a range by
    /// reading it holds for the copy that was read.
    fn arrangement(&self) -> u64 {
        0
    }

    /// Whether what is written here stays in memory for later reads, beside the disk.
    fn keeps_pages(&self) -> bool {
        false
    }

    /// The parts of a range that are not in memory, in whole pages, in order: for those who let go again of what they read.
    /// None where there is no such memory, or nobody can tell. Costs a system call for some megabytes, and waits for no
    /// disk.
    fn cold(&self, _at: u64, _len: u64) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// How far behind what is read a read may bring in more, in bytes: the system reads ahead.
    fn reads_ahead(&self) -> u64 {
        0
    }

    /// Lets go of what memory holds of these ranges and the disk has too. Advice: nothing that is read changes.
    fn forget(&self, _ranges: Vec<Range<u64>>) -> Io<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    /// Whether [`Device::write_zeroes`] is known to be faster than writing zeroes. Devices that do not know say no. Asks
    /// nobody, so that it can be asked with a lock held.
    fn zeroes_fast(&self, _mode: ZeroMode) -> bool {
        false
    }

    /// Which of the system's files it is, whatever path leads there by now; `None` if it is none. Asks nobody.
    fn identity(&self) -> Option<Identity> {
        None
    }

    /// Whether it is known to be a rotating disk, or to lie on one.
    fn is_rotational(&self) -> bool {
        false
    }
}

/// Refuses a range that reaches past `size`, without overflow for any input.
pub fn check_range(operation: Operation, at: u64, len: u64, size: u64) -> Result<()> {
    match at.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::OutOfBounds { operation, at, len, size }),
    }
}

/// Memory for `len` bytes of I/O, aligned to 4096 so that `O_DIRECT` members can use it as it is; zeroed. Costs one
/// pass over it: [`room`] spares that where bytes are appended.
#[must_use]
pub fn buffer(len: usize) -> BytesMut {
    let mut buf = room(len);
    buf.resize(len, 0);
    buf
}

/// Room for `len` bytes that begins as aligned as [`buffer`] does, and holds none yet.
#[must_use]
pub fn room(len: usize) -> BytesMut {
    const ALIGN: usize = 4096;
    let mut room = BytesMut::with_capacity(len + ALIGN);
    let skip = room.as_ptr().align_offset(ALIGN);
    // Splitting off the head keeps the rest where it lies: no copy, and the alignment holds for its lifetime.
    room.resize(skip, 0);
    drop(room.split_to(skip));
    room
}
