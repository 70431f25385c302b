//! A served volume as a disk of the machine it runs on: what its kernel mounts file systems from. Two ways lead there:
//!
//! - The kernel's own NBD driver, where it has one: `/dev/nbdN` (`kernel_disk`). The disk outlives its server and waits
//!   for the next one.
//! - FUSE and a loop device: the process that serves shows the volume as one file (`file`), without any hop over NBD, and
//!   a loop device over that file is the disk. It dies with its server.
//!
//! What is attached is never written down: the kernel's own lists say it, so that it can be undone after any crash. Only
//! which mount is ours to undo is a note in the runtime directory, and which disks have lost something (`notes`).
//!
//! | who | does |
//! |---|---|
//! | the serving process | [`Attacher`]: file or NBD disk come, go, and hold up a stop while they are there |
//! | the command line | [`disk`]: loop device, mount, and cleaning up what a crash has left |
//!
//! Under a mounted file system the serving process must never wait for memory that only it can free (a dirty page of
//! that file system is freed by writing it, to us). So its threads are marked as I/O flushers from the start
//! ([`flush_for_others`]), and while the volume is attached its pages stay in memory. Where the system does not permit
//! that, the user is told.
//!
//! Invariants: an array is attached once at most. It is not stopped while it is attached, but by a second signal.
//! Detached means flushed. No lock is held over a call to the kernel (`place`): who asks how things are is answered,
//! however long the kernel takes for what it was asked before.

pub mod disk;
mod error;
mod file;
mod kernel;
mod kernel_disk;
mod netlink;
mod notes;
mod place;

pub use error::AttachError;

use crate::control::{make_runtime_dir, runtime_dir};
use crate::device::Device;
use crate::error::{Error, Result};
use file::VolumeFile;
use kernel_disk::{KernelDisk, Served};
use place::{Begun, Place, State};
use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall, munlockall};
use rustix::process::{configure_io_flusher_behavior, is_io_flusher};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;
use uuid::Uuid;

/// What the file of an attached volume is called, behind its UUID, in the runtime directory.
const FILE_SUFFIX: &str = "disk";
/// What the note of the directory is called that `attach --mount` has mounted the volume on.
const NOTE_SUFFIX: &str = "mounted";
/// What the file is called that is locked by who attaches or detaches the volume.
const LOCK_SUFFIX: &str = "lock";
/// In the kernel's list of mounts, what such a file comes from: this and the volume's name.
const SOURCE_PREFIX: &str = "raid10:";

/// Connections of a disk of the kernel's NBD driver.
pub const CONNECTIONS: usize = kernel_disk::CONNECTIONS;
/// How long a disk of the kernel's NBD driver waits for a server before what is asked of it fails.
pub const PATIENCE: Duration = kernel_disk::PATIENCE;

/// How a volume is to become a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Shown as a file, which a loop device can be made over.
    File,
    /// By the kernel's NBD driver: `/dev/nbd<device>`, or a free one.
    Nbd {
        /// The number asked for.
        device: Option<u32>,
    },
    /// A disk of the kernel's NBD driver that another server has left.
    NbdAgain {
        /// Its number.
        device: u32,
    },
}

/// What a volume is on its machine, while it is that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// The file, without symbolic links, or the device.
    pub path: PathBuf,
    /// N of `/dev/nbdN`, if it is that.
    pub nbd: Option<u32>,
    /// Whether it refuses to be written.
    pub read_only: bool,
    /// What is not as it should be under a mounted file system, and what that means.
    pub warnings: Vec<String>,
}

/// How long the end waits for what the kernel is being asked.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// Shows one volume as a file or a disk, or not.
#[derive(Debug)]
pub struct Attacher {
    read_only: bool,
    place: Place<Thing>,
}

#[derive(Debug)]
enum Thing {
    File(VolumeFile),
    Disk(KernelDisk),
}

impl Thing {
    /// What it is; anybody may have taken it away.
    fn shown(&self, read_only: bool) -> Option<Shown> {
        let (path, nbd) = match self {
            Self::File(file) if file.is_mounted() => (file.path().to_owned(), None),
            Self::Disk(disk) if disk.stands() => (kernel_disk::path(disk.number()), Some(disk.number())),
            _ => return None,
        };
        Some(Shown { path, nbd, read_only, warnings: Vec::new() })
    }

    /// Takes it away. Refused while somebody has the file open. Blocks.
    fn end(&mut self) -> Result<()> {
        match self {
            Self::File(file) => file.unmount(),
            Self::Disk(disk) => disk.disconnect(),
        }
    }

    /// The server ends: what is under way on a disk is answered, and nothing more is taken. A file goes with its server.
    async fn leave(self) {
        if let Self::Disk(disk) = self {
            disk.leave().await;
        }
    }
}

impl Attacher {
    /// For a volume that is served.
    #[must_use]
    pub fn new(read_only: bool) -> Self {
        Self { read_only, place: Place::new() }
    }

    /// The file or the disk, if it is there: while it goes, too.
    #[must_use]
    pub fn shown(&self) -> Option<Shown> {
        self.place.look(|state| match state {
            State::Holds(thing) => thing.shown(self.read_only),
            State::Changing(changing) => changing.shown.clone(),
            State::Empty | State::Closed => None,
        })
    }

    /// Makes the file or the disk appear; its operations run on the runtime `io`. Refused while another attach or detach
    /// is under way. Blocks for as long as the kernel likes.
    pub fn attach(&self, device: Arc<dyn Device>, volume: Uuid, way: Way, io: &Handle) -> Result<Shown> {
        let name = device.name().to_owned();
        let stopped = || Error::Stopped { name: name.clone() };
        let (change, was) = match self.place.begin(|thing| thing.shown(self.read_only)) {
            Begun::Change(change, was) => (change, was),
            Begun::Busy => return Err(AttachError::Changing { name }.into()),
            Begun::Closed => return Err(stopped()),
        };
        let standing = was.filter(|thing| thing.shown(self.read_only).is_some());
        let (thing, mut warnings) = match standing {
            Some(thing) => (thing, Vec::new()),
            None => self.make(device, volume, way, change.leaving(), io)?,
        };
        let Some(shown) = thing.shown(self.read_only) else {
            return Err(AttachError::NotAttached { name }.into());
        };
        warnings.extend(hold_memory());
        match change.settle(Some(thing)) {
            None => Ok(Shown { warnings, ..shown }),
            // The server has ended meanwhile.
            Some(thing) => {
                io.block_on(thing.leave());
                Err(stopped())
            }
        }
    }

    fn make(
        &self,
        device: Arc<dyn Device>,
        volume: Uuid,
        way: Way,
        leaving: &watch::Sender<bool>,
        io: &Handle,
    ) -> Result<(Thing, Vec<String>)> {
        let served = Served { device, volume, read_only: self.read_only, stop: leaving.clone(), io };
        Ok(match way {
            Way::File => (Thing::File(self.show(served.device, volume, io)?), Vec::new()),
            Way::Nbd { device: number } => {
                let (disk, warnings) = KernelDisk::connect(served, number)?;
                (Thing::Disk(disk), warnings)
            }
            Way::NbdAgain { device: number } => {
                let (disk, warnings) = KernelDisk::take_over(served, number)?;
                (Thing::Disk(disk), warnings)
            }
        })
    }

    fn show(&self, device: Arc<dyn Device>, volume: Uuid, io: &Handle) -> Result<VolumeFile> {
        let dir = runtime_dir();
        make_runtime_dir(&dir)?;
        let dir = dir.canonicalize().map_err(|error| Error::RuntimeDir {
            path: dir.display().to_string(),
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
        let path = dir.join(format!("{volume}.{FILE_SUFFIX}"));
        VolumeFile::mount(device, path, self.read_only, io.clone())
    }

    /// Makes the file or the disk of the volume `name` go. Refused, and nothing has changed, while somebody has the file
    /// open, or another attach or detach is under way; that nobody uses the disk is the caller's business, and so is
    /// flushing the volume before. Blocks for as long as the kernel likes.
    pub fn detach(&self, name: &str) -> Result<()> {
        let (change, was) = match self.place.begin(|thing| thing.shown(self.read_only)) {
            Begun::Change(change, was) => (change, was),
            Begun::Busy => return Err(AttachError::Changing { name: name.to_owned() }.into()),
            Begun::Closed => return Ok(()),
        };
        let Some(mut thing) = was else { return Ok(()) };
        if let Err(refused) = thing.end() {
            if let Some(thing) = change.settle(Some(thing)) {
                Handle::current().block_on(thing.leave());
            }
            return Err(refused);
        }
        if let Thing::Disk(disk) = thing {
            disk.wait();
        }
        // Before the next one may lock it anew.
        let unlocked = munlockall();
        change.settle(None);
        unlocked.map_err(|errno| AttachError::Memory { errno }.into())
    }

    /// Before a stop: refused while the file or the disk is there, comes or goes; from then on neither comes back.
    pub fn close(&self, name: &str) -> Result<()> {
        if self.place.close_empty(|thing| thing.shown(self.read_only).is_some()) {
            return Ok(());
        }
        let name = name.to_owned();
        let changing = self.place.look(|state| matches!(state, State::Changing(_)));
        let refused =
            if changing { AttachError::Changing { name } } else { AttachError::StopAttached { name } };
        Err(refused.into())
    }

    /// Whether what there is would wait for the next server.
    #[must_use]
    pub fn outlives_server(&self) -> bool {
        self.shown().is_some_and(|shown| shown.nbd.is_some())
    }

    /// At a stop all the same: what is under way on a disk is answered, and nothing more is taken. What the kernel is just
    /// being asked is waited for a little; what comes of it later is left at once.
    pub async fn leave(&self) {
        if let Some(thing) = self.place.close(LAST_WAIT).await {
            thing.leave().await;
        }
    }
}

/// Marks this thread, and all that it starts, as one that others wait for to get memory free (`PR_SET_IO_FLUSHER`): what
/// it allocates never waits for I/O in turn. Called before there are threads, since none can be marked from outside; it
/// is always done, because the server cannot know which of its NBD clients is its own kernel. Where it is not permitted,
/// attaching tells that.
pub fn flush_for_others() {
    if let Err(errno) = configure_io_flusher_behavior(true) {
        tracing::debug!("not an I/O flusher: {errno}");
    }
}

/// Keeps what this process has in memory, now and later, in memory. Gives what could not be had.
fn hold_memory() -> Vec<String> {
    let mut warnings = Vec::new();
    if !is_io_flusher().unwrap_or(false) {
        warnings.push(
            "the serving process may not mark itself as an I/O flusher (it needs CAP_SYS_RESOURCE): when memory runs \
             out, it and a file system on the volume can wait for each other for ever"
                .to_owned(),
        );
    }
    // On fault: what has never been touched need not be read in, such as the stacks of idle threads.
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(errno) = mlockall(all) {
        warnings.push(format!(
            "the serving process may not lock its memory ({errno}; it needs CAP_IPC_LOCK): with swap in use, it can be \
             swapped out and then wait for memory that only it can free"
        ));
    }
    warnings
}
