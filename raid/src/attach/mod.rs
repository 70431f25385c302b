//! A served volume as a disk of the machine it runs on: what its kernel mounts file systems from. Two ways lead there:
//!
//! - The kernel's own NBD driver, where it has one: `/dev/nbdN` (`kernel_disk`). The disk outlives its server and waits
//!   for the next one.
//! - FUSE and a loop device: the process that serves shows the volume as one file (`file`), without any hop over NBD, and
//!   a loop device over that file is the disk. It dies with its server.
//!
//! What is attached is never written down: the kernel's own lists say it, so that it can be undone after any crash. Only
//! which mount is ours to undo is a note in the runtime directory.
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
//! Detached means flushed.

pub mod disk;
mod error;
mod file;
mod kernel;
mod kernel_disk;
mod netlink;

pub use error::AttachError;

use crate::control::{make_runtime_dir, runtime_dir};
use crate::device::Device;
use crate::error::{Error, Result};
use file::VolumeFile;
use kernel_disk::KernelDisk;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall, munlockall};
use rustix::process::{configure_io_flusher_behavior, is_io_flusher};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// What the file of an attached volume is called, behind its UUID, in the runtime directory.
const FILE_SUFFIX: &str = "disk";
/// What the note of the directory is called that `attach --mount` has mounted the volume on.
const NOTE_SUFFIX: &str = "mounted";
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

/// Shows one volume as a file or a disk, or not. Its methods may block.
#[derive(Debug)]
pub struct Attacher {
    read_only: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Detached,
    File(VolumeFile),
    Disk(KernelDisk),
    /// The volume is about to be stopped.
    Closed,
}

impl State {
    /// What there is; anybody may have taken it away.
    fn shown(&self, read_only: bool) -> Option<Shown> {
        let (path, nbd) = match self {
            Self::File(file) if file.is_mounted() => (file.path().to_owned(), None),
            Self::Disk(disk) if disk.stands() => (kernel_disk::path(disk.number()), Some(disk.number())),
            _ => return None,
        };
        Some(Shown { path, nbd, read_only, warnings: Vec::new() })
    }
}

impl Attacher {
    /// For a volume that is served.
    #[must_use]
    pub fn new(read_only: bool) -> Self {
        Self { read_only, state: Mutex::new(State::Detached) }
    }

    /// The file or the disk, if it is there.
    #[must_use]
    pub fn shown(&self) -> Option<Shown> {
        self.state.lock().shown(self.read_only)
    }

    /// Makes the file or the disk appear; its operations run on the runtime `io`.
    pub fn attach(
        &self,
        device: Arc<dyn Device>,
        volume: Uuid,
        way: Way,
        io: &tokio::runtime::Handle,
    ) -> Result<Shown> {
        let mut state = self.state.lock();
        if let State::Closed = &*state {
            return Err(Error::Stopped { name: device.name().to_owned() });
        }
        if let Some(shown) = state.shown(self.read_only) {
            return Ok(shown);
        }
        let mut warnings = Vec::new();
        *state = match way {
            Way::File => State::File(self.show(device, volume, io)?),
            Way::Nbd { device: number } => {
                State::Disk(KernelDisk::connect(device, volume, self.read_only, number, io)?)
            }
            Way::NbdAgain { device: number } => {
                let (disk, warning) = KernelDisk::take_over(device, volume, self.read_only, number, io)?;
                warnings.extend(warning);
                State::Disk(disk)
            }
        };
        let shown =
            state.shown(self.read_only).ok_or(AttachError::NotAttached { name: volume.to_string() })?;
        warnings.extend(hold_memory());
        Ok(Shown { warnings, ..shown })
    }

    fn show(&self, device: Arc<dyn Device>, volume: Uuid, io: &tokio::runtime::Handle) -> Result<VolumeFile> {
        let dir = runtime_dir();
        make_runtime_dir(&dir)?;
        let dir = dir.canonicalize().map_err(|error| Error::RuntimeDir {
            path: dir.display().to_string(),
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
        let path = dir.join(format!("{volume}.{FILE_SUFFIX}"));
        VolumeFile::mount(device, path, self.read_only, io.clone())
    }

    /// Makes the file or the disk go. Refused, and nothing has changed, while somebody has the file open; that nobody
    /// uses the disk is the caller's business, and so is flushing the volume before.
    pub fn detach(&self) -> Result<()> {
        let mut state = self.state.lock();
        match &mut *state {
            State::File(file) => file.unmount()?,
            State::Disk(disk) => disk.disconnect()?,
            State::Detached | State::Closed => return Ok(()),
        }
        let was = std::mem::replace(&mut *state, State::Detached);
        // Waiting keeps nobody who only looks.
        drop(state);
        if let State::Disk(disk) = was {
            disk.wait();
        }
        munlockall().map_err(|errno| AttachError::Memory { errno })?;
        Ok(())
    }

    /// Before a stop: refused while the file or the disk is there; from then on neither comes back.
    pub fn close(&self, name: &str) -> Result<()> {
        let mut state = self.state.lock();
        if state.shown(self.read_only).is_some() {
            return Err(AttachError::StopAttached { name: name.to_owned() }.into());
        }
        *state = State::Closed;
        Ok(())
    }

    /// Whether what there is would wait for the next server.
    #[must_use]
    pub fn outlives_server(&self) -> bool {
        matches!(&*self.state.lock(), State::Disk(disk) if disk.stands())
    }

    /// At a stop all the same: what is under way on a disk is answered, and nothing more is taken.
    pub async fn leave(&self) {
        let was = std::mem::replace(&mut *self.state.lock(), State::Closed);
        if let State::Disk(disk) = was {
            disk.leave().await;
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
