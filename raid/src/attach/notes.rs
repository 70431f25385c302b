//! What is on record of the disks of the kernel's NBD driver: which of them have lost something.
//!
//! Without a server a disk keeps what is asked of it for [`PATIENCE`], or until it is given up by `raid10 detach --force`;
//! then that fails, and all that comes later. The driver does not remember it: given sockets, a disk that has waited in
//! vain goes on as if nothing had been, and on kernels before 2025 one that was given up does too. What lies on it would go
//! on with holes in it. So it is on record here, and whoever takes disks over looks here first ([`Notes::lost`]).
//!
//! A disk's note is one line in a file of its own, in a directory that is the same for the whole machine, as the disks are,
//! whatever runtime directory a command looks at: the boot, the process that made the disk (the driver tells it), and
//! `served` or `lost`. Of another boot or another process, it is of a disk that is gone. When the disk had a connection
//! last is the file's time of modification, in the monotonic clock, which stands still when the driver's own timers do.
//!
//! Invariants: `lost` is on record before the driver is told to let a disk go. A disk counts as lost a little before it can
//! be: from [`MARGIN`] before [`PATIENCE`] is over, counted from the last time it is known to have had a connection. (An
//! idle disk has lost nothing then; nobody can tell.) What cannot be read is an error, not a disk in order.
//!
//! Cost: one `futimens`, on a file in memory, every [`BEAT`].

use super::AttachError;
use super::kernel::{NbdDisk, failed};
use super::kernel_disk::PATIENCE;
use crate::control::make_runtime_dir;
use crate::error::Error;
use rustix::time::{ClockId, clock_gettime};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Where the notes are; gone with the boot.
const HOME: &str = "/run/raid10";
/// Where the kernel tells which boot this is.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
/// More bytes than a note has.
const MOST: u64 = 256;
/// How often a server that has connections notes so.
pub(super) const BEAT: Duration = Duration::from_secs(5);
/// Longer than two of these, and than it takes to connect a disk.
const MARGIN: Duration = Duration::from_secs(20);

/// The notes of a machine, in one boot.
#[derive(Debug)]
pub(super) struct Notes {
    home: PathBuf,
    boot: String,
}

/// Why a disk must not be connected again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    /// It was given up.
    GivenUp,
    /// It was without a server for too long.
    InVain,
}

impl Lost {
    /// For who wants to connect the disk of a volume; `device`: for a person, where it is.
    pub(super) fn error(self, name: &str, device: String) -> AttachError {
        let why = match self {
            Self::GivenUp => "was given up",
            Self::InVain => "was without a server for longer than it waits",
        };
        AttachError::Lost { name: name.to_owned(), device, why }
    }
}

/// The note of a disk that has a server.
#[derive(Debug)]
pub(super) struct Beating {
    path: PathBuf,
    file: File,
}

const SERVED: &str = "served";
const LOST: &str = "lost";

impl Notes {
    /// Those of this machine.
    pub(super) fn of_machine() -> Result<Self, AttachError> {
        let boot = Path::new(BOOT);
        let told = fs::read_to_string(boot).map_err(|error| failed(boot, &error))?;
        Ok(Self { home: HOME.into(), boot: told.trim_end().to_owned() })
    }

    fn path(&self, number: u32) -> PathBuf {
        self.home.join(format!("nbd{number}.note"))
    }

    /// What is said of a disk before the word on its state.
    fn identity(&self, disk: &NbdDisk) -> String {
        format!("{} {} ", self.boot, disk.maker)
    }

    /// In the place of any older one, at once.
    fn write(&self, disk: &NbdDisk, word: &str) -> Result<Beating, AttachError> {
        make_runtime_dir(&self.home).map_err(|error| AttachError::Files {
            path: self.home.display().to_string(),
            errno: Error::errno(&error),
        })?;
        let path = self.path(disk.number);
        let new = path.with_extension("new");
        let written = File::create(&new).and_then(|mut file| {
            writeln!(file, "{}{word}", self.identity(disk))?;
            file.set_modified(now())?;
            fs::rename(&new, &path)?;
            Ok(file)
        });
        Ok(Beating { file: written.map_err(|error| failed(&path, &error))?, path })
    }

    /// Notes that a disk has a server.
    pub(super) fn serve(&self, disk: &NbdDisk) -> Result<Beating, AttachError> {
        self.write(disk, SERVED)
    }

    /// Notes that a disk is given up.
    pub(super) fn give_up(&self, disk: &NbdDisk) -> Result<(), AttachError> {
        self.write(disk, LOST).map(drop)
    }

    /// Lets go of the note of a disk that is gone.
    pub(super) fn forget(&self, number: u32) -> Result<(), AttachError> {
        let path = self.path(number);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(failed(&path, &error)),
            _ => Ok(()),
        }
    }

    /// Whether a disk without a server has lost what it was to keep. One without a note has not.
    pub(super) fn lost(&self, disk: &NbdDisk) -> Result<Option<Lost>, AttachError> {
        let path = self.path(disk.number);
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(MOST + 1).read_to_end(&mut text)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|error| failed(&path, &error))?,
        };
        let broken = || AttachError::Note { path: path.display().to_string() };
        let text =
            std::str::from_utf8(&text).ok().filter(|text| text.len() as u64 <= MOST).ok_or_else(broken)?;
        let line = text.strip_suffix('\n').ok_or_else(broken)?;
        match line.strip_prefix(&self.identity(disk)) {
            // Of a disk that was.
            None if line.split(' ').count() == 3 => Ok(None),
            Some(LOST) => Ok(Some(Lost::GivenUp)),
            Some(SERVED) => {
                let last = path.metadata().and_then(|file| file.modified());
                Ok(is_over(last.map_err(|error| failed(&path, &error))?).then_some(Lost::InVain))
            }
            _ => Err(broken()),
        }
    }
}

impl Beating {
    /// Notes that the disk has a connection at this moment.
    pub(super) fn beat(&self) {
        if let Err(error) = self.file.set_modified(now()) {
            tracing::warn!("{}: cannot be kept up to date: {error}", self.path.display());
        }
    }

    /// Whether the disk has been without a connection for so long that it may have lost something.
    pub(super) fn is_lost(&self) -> bool {
        let last = self.file.metadata().and_then(|file| file.modified());
        last.is_ok_and(is_over)
    }
}

/// The monotonic clock, as a file's time.
fn now() -> SystemTime {
    let now = clock_gettime(ClockId::Monotonic);
    // Neither is ever negative there.
    SystemTime::UNIX_EPOCH + Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

/// Whether a disk's patience is over that had a connection last at this time.
fn is_over(last: SystemTime) -> bool {
    now().duration_since(last).is_ok_and(|without| without + MARGIN > PATIENCE)
}

#[cfg(test)]
mod tests {
    use super::super::kernel::BlockDevice;
    use super::*;

    fn disk(number: u32, maker: &str) -> NbdDisk {
        let device = BlockDevice {
            path: format!("/dev/nbd{number}").into(),
            numbers: Vec::new(),
            partitions: Vec::new(),
            holders: Vec::new(),
        };
        let (backend, maker) = (String::new(), maker.to_owned());
        NbdDisk { device, number, backend, maker, read_only: false, size: 4096 }
    }

    fn notes(dir: &Path, boot: &str) -> Notes {
        Notes { home: dir.join("made"), boot: boot.to_owned() }
    }

    #[test]
    fn a_disk_that_was_given_up_stays_so_until_it_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let notes_of_boot = |boot| notes(dir.path(), boot);
        let notes = notes_of_boot("b");
        let ours = disk(3, "77");
        assert_eq!(notes.lost(&ours), Ok(None), "nothing is on record");
        let beating = notes.serve(&ours).unwrap();
        assert_eq!(notes.lost(&ours), Ok(None));
        notes.give_up(&ours).unwrap();
        assert_eq!(notes.lost(&ours), Ok(Some(Lost::GivenUp)));
        // Whoever still believes to serve it does not undo that.
        beating.beat();
        assert_eq!(notes.lost(&ours), Ok(Some(Lost::GivenUp)));
        for (boot, other) in [("b", disk(4, "77")), ("b", disk(3, "78")), ("c", disk(3, "77"))] {
            assert_eq!(notes_of_boot(boot).lost(&other), Ok(None), "{boot} {other:?}");
        }
        notes.serve(&disk(3, "78")).unwrap();
        assert_eq!(notes.lost(&ours), Ok(None), "the number is another disk's by now");
        notes.forget(3).unwrap();
        notes.forget(3).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("made")).unwrap().count(), 0);
    }

    #[test]
    fn a_disk_without_a_server_for_too_long_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let notes = notes(dir.path(), "b");
        let ours = disk(0, "77");
        let beating = notes.serve(&ours).unwrap();
        let most = PATIENCE.as_secs() - MARGIN.as_secs();
        let since = |seconds| beating.file.set_modified(now() - Duration::from_secs(seconds)).unwrap();
        since(most - 5);
        assert_eq!((notes.lost(&ours), beating.is_lost()), (Ok(None), false));
        since(most + 5);
        assert_eq!((notes.lost(&ours), beating.is_lost()), (Ok(Some(Lost::InVain)), true));
        beating.beat();
        assert_eq!((notes.lost(&ours), beating.is_lost()), (Ok(None), false));
    }

    #[test]
    fn what_is_no_note_is_no_disk_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let notes = notes(dir.path(), "b");
        let ours = disk(0, "77");
        drop(notes.serve(&ours).unwrap());
        let path = notes.path(0);
        for text in [
            "",
            "b 77 served",
            "b 77 \n",
            "b 77 kept\n",
            "b\n",
            &"x".repeat(MOST as usize + 1),
            "b 77 served\nlost\n",
        ] {
            fs::write(&path, text).unwrap();
            let told = notes.lost(&ours);
            assert_eq!(told, Err(AttachError::Note { path: path.display().to_string() }), "{text:?}");
        }
        fs::write(&path, [0xff, b'\n']).unwrap();
        assert!(notes.lost(&ours).is_err());
    }

    #[test]
    fn this_machine_tells_its_boot() {
        let boot = Notes::of_machine().unwrap().boot;
        assert!(uuid::Uuid::parse_str(&boot).is_ok(), "{boot}");
    }
}
