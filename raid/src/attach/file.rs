//! A device as one file, by FUSE: the mount point is a regular file, and the device is what it holds.
//!
//! The kernel caches nothing of it (`FOPEN_DIRECT_IO`): whoever mounts a file system from it has those pages in a cache
//! already. A write is answered when the device has it, `fsync` is a flush, a punched hole reads as zeroes from then on and
//! its space is given back; what fails is answered with its errno. Everything else that can be done to a file (making it
//! longer, say) is refused.
//!
//! One thread takes the requests from the kernel and starts each as a task of the runtime; they end in any order. What
//! is in flight is bounded by the kernel: [`MAX_BACKGROUND`] requests of [`MAX_REQUEST`] bytes.

use super::{AttachError, SOURCE_PREFIX};
use crate::device::{Device, Durability, ZeroMode, buffer};
use crate::error::{Error, Result};
use fuser::{
    Config, Errno as FuseErrno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request, Session, SessionACL, WriteFlags,
};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

/// The largest read or write; the kernel splits what is larger.
const MAX_REQUEST: u32 = 1 << 20;
/// Requests that the kernel has under way at most, of those that nobody waits for one by one.
const MAX_BACKGROUND: u16 = 64;
/// What the device is best read and written in.
const BLOCK: u32 = 4096;
/// One punched hole may be as large as the device; between parts of this size others have their turn.
const HOLE_PART: u64 = 256 << 20;

/// The file of a device, while it is mounted.
#[derive(Debug)]
pub(super) struct VolumeFile {
    path: PathBuf,
    session: Option<JoinHandle<io::Result<()>>>,
}

impl VolumeFile {
    /// Mounts it on `path`, which is made. Whatever was mounted there before must be gone.
    pub(super) fn mount(
        device: Arc<dyn Device>,
        path: PathBuf,
        read_only: bool,
        runtime: tokio::runtime::Handle,
    ) -> Result<Self> {
        let show = |errno| AttachError::Show { path: path.display().to_string(), errno };
        let fuse = File::options().read(true).write(true).open("/dev/fuse");
        let fuse = fuse.map_err(|error| AttachError::NoFuse { errno: errno_of(&error) })?;
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| show(errno_of(&error)))?;
        let source = format!("{SOURCE_PREFIX}{}", device.name());
        // The root of this file system is a regular file.
        let data = format!("fd={},rootmode=100000,user_id=0,group_id=0", fuse.as_raw_fd());
        let data = CString::new(data).map_err(|_| show(Errno::INVAL))?;
        let mut flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
        flags.set(MountFlags::RDONLY, read_only);
        mount(source, &path, "fuse.raid10", flags, data.as_c_str()).map_err(show)?;
        let files = OneFile { device, read_only, runtime };
        let session = Session::from_fd(files, fuse.into(), SessionACL::All, Config::default());
        let thread = std::thread::Builder::new().name("fuse".to_owned());
        let running = session.and_then(|session| thread.spawn(move || session.run()));
        match running {
            Ok(session) => Ok(Self { path, session: Some(session) }),
            Err(error) => {
                // Nobody answers there any more; left mounted, it would be in the way of the next one.
                if let Err(errno) = unmount(&path, UnmountFlags::DETACH) {
                    tracing::warn!("{} stays mounted: {errno}", path.display());
                }
                Err(show(errno_of(&error)).into())
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is there: anybody may unmount it.
    pub(super) fn is_mounted(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !session.is_finished())
    }

    /// Unmounts it, and waits until the last request is answered. Refused while somebody has it open.
    pub(super) fn unmount(&mut self) -> Result<()> {
        if self.is_mounted() {
            unmount(&self.path, UnmountFlags::empty())
                .map_err(|errno| AttachError::Hide { path: self.path.display().to_string(), errno })?;
        }
        let ended = self.session.take().map(JoinHandle::join);
        match ended {
            Some(Ok(Err(error))) => tracing::warn!("{} ended badly: {error}", self.path.display()),
            Some(Err(_)) => tracing::error!("{}: its thread died", self.path.display()),
            Some(Ok(Ok(()))) | None => {}
        }
        std::fs::remove_file(&self.path).map_err(|error| {
            AttachError::Files { path: self.path.display().to_string(), errno: errno_of(&error) }.into()
        })
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// A file system whose root is its only file.
struct OneFile {
    device: Arc<dyn Device>,
    read_only: bool,
    runtime: tokio::runtime::Handle,
}

impl OneFile {
    fn attributes(&self) -> FileAttr {
        let size = self.device.size();
        FileAttr {
            ino: INodeNo::ROOT,
            size,
            blocks: size / 512,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: FileType::RegularFile,
            perm: if self.read_only { 0o400 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }
}

/// The errno a failed operation is answered with.
fn refusal(device: &dyn Device, error: &Error) -> FuseErrno {
    tracing::warn!(device = device.name(), "request of the attached disk failed: {error}");
    FuseErrno::from_i32(error.errno().raw_os_error())
}

fn settle(device: &dyn Device, outcome: Result<()>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(refusal(device, &error)),
    }
}

impl Filesystem for OneFile {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let too_much = |_| io::Error::from(io::ErrorKind::Unsupported);
        config.set_max_write(MAX_REQUEST).map_err(too_much)?;
        config.set_max_background(MAX_BACKGROUND).map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
        // Direct I/O of a loop device is then under way many requests at a time. Kernels without it do one by one.
        if config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).is_err() {
            tracing::info!(
                "this kernel's FUSE has no asynchronous direct I/O: the attached disk will be slow"
            );
        }
        Ok(())
    }

    fn getattr(&self, _req: &Request, _ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        // Not kept: an array may grow.
        reply.attr(&Duration::ZERO, &self.attributes());
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // The block size is what a loop device gives space back in.
        reply.statfs(self.device.size() / u64::from(BLOCK), 0, 0, 1, 0, BLOCK, 255, BLOCK);
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), direct | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // A file is read up to its end; a device refuses what reaches past it.
        let left = self.device.size().saturating_sub(offset).min(u64::from(size.min(MAX_REQUEST)));
        let device = Arc::clone(&self.device);
        self.runtime.spawn(async move {
            if left == 0 {
                return reply.data(&[]);
            }
            match device.read(offset, buffer(left as usize)).await {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(refusal(&*device, &error)),
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut owned = buffer(data.len());
        owned.copy_from_slice(data);
        let (device, owned, len) = (Arc::clone(&self.device), owned.freeze(), data.len() as u32);
        self.runtime.spawn(async move {
            match device.write(offset, owned, Durability::Cached).await {
                Ok(()) => reply.written(len),
                Err(error) => reply.error(refusal(&*device, &error)),
            }
        });
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let device = Arc::clone(&self.device);
        self.runtime.spawn(async move { settle(&*device, device.flush().await, reply) });
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(zeroes) = zeroes(mode) else { return reply.error(FuseErrno::EOPNOTSUPP) };
        let device = Arc::clone(&self.device);
        let Some(end) = offset.checked_add(length).filter(|end| *end <= device.size()) else {
            return reply.error(FuseErrno::ENOSPC);
        };
        self.runtime.spawn(async move {
            let mut outcome = Ok(());
            let mut at = offset;
            while at < end && outcome.is_ok() {
                let len = HOLE_PART.min(end - at);
                outcome = device.write_zeroes(at, len, zeroes, Durability::Cached).await;
                at += len;
            }
            settle(&*device, outcome, reply);
        });
    }
}

/// What `fallocate` asks of a file that keeps its size. A loop device discards and zeroes by punching holes: what is
/// discarded must read as zeroes.
fn zeroes(mode: i32) -> Option<ZeroMode> {
    let mode = FallocateFlags::from_bits(mode as u32)?;
    let what = mode.difference(FallocateFlags::KEEP_SIZE);
    if what == FallocateFlags::PUNCH_HOLE {
        Some(ZeroMode::MayPunch)
    } else if what == FallocateFlags::ZERO_RANGE {
        Some(ZeroMode::Allocate)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeroes_are_told_from_all_else() {
        let flags = |flags: FallocateFlags| flags.bits() as i32;
        let (keep, punch) = (FallocateFlags::KEEP_SIZE, FallocateFlags::PUNCH_HOLE);
        assert_eq!(zeroes(flags(keep | punch)), Some(ZeroMode::MayPunch));
        assert_eq!(zeroes(flags(keep | FallocateFlags::ZERO_RANGE)), Some(ZeroMode::Allocate));
        assert_eq!(zeroes(flags(FallocateFlags::ZERO_RANGE)), Some(ZeroMode::Allocate));
        for other in [0, flags(keep), flags(FallocateFlags::COLLAPSE_RANGE), -1] {
            assert_eq!(zeroes(other), None);
        }
    }
}
