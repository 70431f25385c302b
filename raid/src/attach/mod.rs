//! A served volume as a disk of the machine it runs on: what its kernel mounts file systems from.
//!
//! The process that serves shows the volume as one file (`file`), by FUSE and without any hop over NBD; a loop device
//! over that file is the disk ([`disk`]). What is attached is never written down: the kernel's own lists say it, so
//! that it can be undone after any crash. Only which mount is ours to undo is a note in the runtime directory.
//!
//! | who | does |
//! |---|---|
//! | the serving process | [`Attacher`]: the file comes, goes, and holds up a stop while it is there |
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

pub use error::AttachError;

use crate::control::{make_runtime_dir, runtime_dir};
use crate::device::Device;
use crate::error::{Error, Result};
use file::VolumeFile;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mm::{MlockAllFlags, mlockall, munlockall};
use rustix::process::{configure_io_flusher_behavior, is_io_flusher};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;

/// What the file of an attached volume is called, behind its UUID, in the runtime directory.
const FILE_SUFFIX: &str = "disk";
/// What the note of the directory is called that `attach --mount` has mounted the volume on.
const NOTE_SUFFIX: &str = "mounted";
/// In the kernel's list of mounts, what such a file comes from: this and the volume's name.
const SOURCE_PREFIX: &str = "raid10:";

/// The file of a volume, while it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// Where, without symbolic links.
    pub path: PathBuf,
    /// Whether it refuses to be written.
    pub read_only: bool,
    /// What is not as it should be under a mounted file system, and what that means.
    pub warnings: Vec<String>,
}

/// Shows one volume as a file, or not. Its methods may block.
#[derive(Debug)]
pub struct Attacher {
    read_only: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Detached,
    Attached(VolumeFile),
    /// The volume is about to be stopped.
    Closed,
}

impl Attacher {
    /// For a volume that is served.
    #[must_use]
    pub fn new(read_only: bool) -> Self {
        Self { read_only, state: Mutex::new(State::Detached) }
    }

    /// The file, if it is there.
    #[must_use]
    pub fn shown(&self) -> Option<Shown> {
        match &*self.state.lock() {
            State::Attached(file) if file.is_mounted() => Some(self.describe(file)),
            _ => None,
        }
    }

    fn describe(&self, file: &VolumeFile) -> Shown {
        Shown { path: file.path().to_owned(), read_only: self.read_only, warnings: Vec::new() }
    }

    /// Makes the file appear; called on a thread of the runtime `io`, on which its operations run.
    pub fn attach(&self, device: Arc<dyn Device>, volume: Uuid, io: tokio::runtime::Handle) -> Result<Shown> {
        let mut state = self.state.lock();
        match &*state {
            State::Closed => return Err(Error::Stopped { name: device.name().to_owned() }),
            State::Attached(file) if file.is_mounted() => return Ok(self.describe(file)),
            State::Attached(_) | State::Detached => {}
        }
        let dir = runtime_dir();
        make_runtime_dir(&dir)?;
        let dir = dir.canonicalize().map_err(|error| Error::RuntimeDir {
            path: dir.display().to_string(),
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })?;
        let path = dir.join(format!("{volume}.{FILE_SUFFIX}"));
        let file = VolumeFile::mount(device, path, self.read_only, io)?;
        let shown = Shown { warnings: hold_memory(), ..self.describe(&file) };
        *state = State::Attached(file);
        Ok(shown)
    }

    /// Makes the file go. Refused, and nothing has changed, while somebody has it open. Flushing the volume is the
    /// caller's business, before.
    pub fn detach(&self) -> Result<()> {
        let mut state = self.state.lock();
        if let State::Attached(file) = &mut *state {
            file.unmount()?;
            *state = State::Detached;
            munlockall().map_err(|errno| AttachError::Memory { errno })?;
        }
        Ok(())
    }

    /// Before a stop: refused while the file is there; from then on it does not come back.
    pub fn close(&self, name: &str) -> Result<()> {
        let mut state = self.state.lock();
        if let State::Attached(file) = &*state
            && file.is_mounted()
        {
            return Err(AttachError::StopAttached { name: name.to_owned() }.into());
        }
        *state = State::Closed;
        Ok(())
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
