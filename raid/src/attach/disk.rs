//! The disk over a shown volume: a loop device, and what is mounted from it. Made and undone by the command line, which
//! must be root; all functions block.
//!
//! What there is of an attachment is read from the kernel each time ([`find`]). It is undone from the top: mount, loop
//! device, file. With a server that lives, each step is checked before the first is taken, and what is in use is refused.
//! With a server that died nothing can be saved any more: what can be undone is, and the rest goes when the last process
//! lets it go.

use super::kernel::{LoopDevice, Mounted, failed, loops_over, mounts, openers};
use super::{AttachError, FILE_SUFFIX, NOTE_SUFFIX, SOURCE_PREFIX, Shown};
use crate::control::runtime_dir;
use crate::error::Result;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long a loop device may take to go after it was let go: something may look at it at this moment (udev does).
const GOING: Duration = Duration::from_secs(5);

/// How long somebody may have a device open before that counts as using it.
const LOOKING: Duration = Duration::from_secs(2);

/// Refuses everybody but root.
pub fn need_root() -> Result<()> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(AttachError::NotRoot.into()) }
}

/// Keeps other commands from attaching and detaching at the same time, for as long as it lives.
pub fn alone() -> Result<File> {
    let dir = runtime_dir();
    let opened = File::open(&dir).map_err(|error| failed(&dir, &error))?;
    flock(&opened, FlockOperation::LockExclusive).map_err(|errno| failed(&dir, &errno.into()))?;
    Ok(opened)
}

/// What there is of a volume's attachment: at least one of file, loop device and mount.
#[derive(Debug)]
pub struct Attachment {
    /// Where the volume is shown as a file, and whether it still is.
    file: PathBuf,
    shown: bool,
    disks: Vec<LoopDevice>,
    /// Where the disks are mounted, the oldest first.
    mounts: Vec<PathBuf>,
    /// Which mount `attach --mount` has made.
    ours: Option<PathBuf>,
}

/// The runtime directory as the kernel names it; `None` where there is none, and so nothing attached.
fn home() -> Option<PathBuf> {
    runtime_dir().canonicalize().ok()
}

fn note(home: &Path, volume: Uuid) -> PathBuf {
    home.join(format!("{volume}.{NOTE_SUFFIX}"))
}

/// Finds what there is of a volume's attachment, whether its server lives or not. `None`: nothing.
pub fn find(volume: Uuid) -> Result<Option<Attachment>> {
    let Some(home) = home() else { return Ok(None) };
    let file = home.join(format!("{volume}.{FILE_SUFFIX}"));
    let mounts = mounts()?;
    let shown = mounts.iter().any(|mount| mount.point == file);
    let disks = loops_over(&file)?;
    let of_disks = |mount: &&Mounted| disks.iter().any(|disk| disk.number == mount.number);
    let mounts: Vec<PathBuf> = mounts.iter().filter(of_disks).map(|mount| mount.point.clone()).collect();
    if !shown && disks.is_empty() && mounts.is_empty() {
        return Ok(None);
    }
    // Without a note, no mount is ours.
    let ours =
        std::fs::read(note(&home, volume)).ok().map(|path| PathBuf::from(std::ffi::OsString::from_vec(path)));
    Ok(Some(Attachment { file, shown, disks, mounts, ours }))
}

/// The volumes of that name, or UUID, that are shown as files, whether their servers live or not.
pub fn named(volume: &str) -> Result<Vec<Uuid>> {
    let Some(home) = home() else { return Ok(Vec::new()) };
    let source = format!("{SOURCE_PREFIX}{volume}");
    let uuid_of = |mount: &Mounted| {
        let name = mount.point.strip_prefix(&home).ok()?.to_str()?;
        let uuid = Uuid::parse_str(name.strip_suffix(FILE_SUFFIX)?.strip_suffix('.')?).ok()?;
        (mount.source == OsStr::new(&source) || Uuid::parse_str(volume) == Ok(uuid)).then_some(uuid)
    };
    Ok(mounts()?.iter().filter_map(uuid_of).collect())
}

impl Attachment {
    /// The device, if it has come that far.
    #[must_use]
    pub fn device(&self) -> Option<&Path> {
        self.disks.first().map(|disk| disk.path.as_path())
    }

    /// Where the device is mounted.
    #[must_use]
    pub fn mounts(&self) -> &[PathBuf] {
        &self.mounts
    }

    /// For a person: the device, and where it is mounted.
    #[must_use]
    pub fn place(&self) -> String {
        let device = self.device().unwrap_or(&self.file).display();
        let points: Vec<String> = self.mounts.iter().map(|point| point.display().to_string()).collect();
        if points.is_empty() { device.to_string() } else { format!("{device} on {}", points.join(" and ")) }
    }

    /// Undoes mount and loop device, while the server lives: all, or it is refused and nothing has changed. The file is
    /// the server's to take away, after this.
    pub fn let_go(&self) -> Result<()> {
        self.refuse_if_used()?;
        for point in self.mounts.iter().rev() {
            unmount(point, UnmountFlags::NOFOLLOW).map_err(|errno| AttachError::MountInUse {
                dir: point.display().to_string(),
                said: errno_words(errno),
            })?;
        }
        for disk in &self.disks {
            // Claimed by what is not listed above: a mount in another namespace, swap.
            let device = disk.path.display().to_string();
            if open(&disk.path, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()).is_err() {
                let who = "a file system mounted in another mount namespace, or swap".to_owned();
                return Err(AttachError::DeviceInUse { device, who }.into());
            }
            self.release(disk)?;
            if !self.is_gone(disk)? {
                let who = "a process that has just opened it (it goes when that ends)".to_owned();
                return Err(AttachError::DeviceInUse { device, who }.into());
            }
        }
        self.forget_note()
    }

    /// Makes the disk as large as the volume has become.
    pub fn resize(&self) -> Result<()> {
        // Looked at, the file's size is asked for anew.
        self.file.metadata().map_err(|error| failed(&self.file, &error))?;
        for disk in &self.disks {
            run(Command::new("losetup").arg("--set-capacity").arg(&disk.path))?;
        }
        Ok(())
    }

    fn refuse_if_used(&self) -> Result<()> {
        if let Some(other) = self.mounts.iter().find(|point| Some(*point) != self.ours.as_ref()) {
            let device = self.device().unwrap_or(&self.file).display().to_string();
            return Err(AttachError::MountedByOthers { device, dir: other.display().to_string() }.into());
        }
        for disk in &self.disks {
            let begun = Instant::now();
            let mut users = disk.holders.clone();
            users.extend(openers(&disk.path));
            // Who only looks at it, as udev does at new devices, is gone soon.
            while !users.is_empty() && disk.holders.is_empty() && begun.elapsed() < LOOKING {
                std::thread::sleep(Duration::from_millis(20));
                users = openers(&disk.path);
            }
            if !users.is_empty() {
                let device = disk.path.display().to_string();
                return Err(AttachError::DeviceInUse { device, who: users.join(", ") }.into());
            }
        }
        Ok(())
    }

    fn release(&self, disk: &LoopDevice) -> Result<()> {
        run(Command::new("losetup").arg("--detach").arg(&disk.path)).map(|_| ()).or_else(|error| {
            // It may have gone by itself, with the last mount.
            if loops_over(&self.file)?.iter().any(|other| other.path == disk.path) {
                Err(error.into())
            } else {
                Ok(())
            }
        })
    }

    /// Waits a little until the device is free; the kernel frees it when the last one closes it.
    fn is_gone(&self, disk: &LoopDevice) -> Result<bool> {
        let begun = Instant::now();
        while loops_over(&self.file)?.iter().any(|other| other.path == disk.path) {
            if begun.elapsed() > GOING {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(true)
    }

    fn forget_note(&self) -> Result<()> {
        let note = self.file.with_extension(NOTE_SUFFIX);
        match std::fs::remove_file(&note) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(&note, &error).into()),
            _ => Ok(()),
        }
    }

    /// Undoes what a server that died has left; whatever was not written yet is lost already. Gives a sentence for each
    /// thing that was there.
    pub fn clean_up(&self) -> Result<Vec<String>> {
        let mut told = Vec::new();
        let mut held = false;
        for point in self.mounts.iter().rev() {
            held |= abandon(point, &mut told)?;
        }
        for disk in &self.disks {
            self.release(disk)?;
            let device = disk.path.display();
            told.push(if !held && self.is_gone(disk)? {
                format!("{device} is free again")
            } else {
                format!("{device} becomes free when {} let it go", openers_or_others(&disk.path))
            });
        }
        if self.shown {
            abandon(&self.file, &mut told)?;
            std::fs::remove_file(&self.file).map_err(|error| failed(&self.file, &error))?;
        }
        self.forget_note()?;
        Ok(told)
    }
}

fn openers_or_others(device: &Path) -> String {
    let openers = openers(device);
    if openers.is_empty() { "the processes with files on it".to_owned() } else { openers.join(", ") }
}

/// Unmounts what no server answers for any more. Gives whether somebody holds on to it.
fn abandon(point: &Path, told: &mut Vec<String>) -> Result<bool> {
    let dir = point.display();
    match unmount(point, UnmountFlags::NOFOLLOW) {
        Ok(()) => {
            told.push(format!("{dir} was still mounted, without a server: unmounted"));
            Ok(false)
        }
        Err(Errno::BUSY) => {
            unmount(point, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
                .map_err(|errno| failed(point, &errno.into()))?;
            told.push(format!(
                "{dir} was still mounted, without a server, and in use: taken away; who uses it gets errors"
            ));
            Ok(true)
        }
        Err(errno) => Err(failed(point, &errno.into()).into()),
    }
}

/// Makes the next free loop device a disk over the file; gives its path.
pub fn set_up(shown: &Shown) -> Result<PathBuf> {
    if !mounts()?.iter().any(|mount| mount.point == shown.path) {
        return Err(AttachError::Unseen { path: shown.path.display().to_string() }.into());
    }
    let mut losetup = Command::new("losetup");
    // Past the loop device's own page cache; where the kernel cannot, it goes through that.
    losetup.args(["--find", "--show", "--direct-io=on"]);
    if shown.read_only {
        losetup.arg("--read-only");
    }
    let told = run(losetup.arg(&shown.path))?;
    Ok(PathBuf::from(told.trim_end()))
}

/// A directory to mount on, as the kernel names it.
pub fn mount_point(dir: &Path) -> Result<PathBuf> {
    let refused = |why: &str| AttachError::MountPoint { dir: dir.display().to_string(), why: why.to_owned() };
    let real = dir.canonicalize().map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        refused(&format!("{}; `mkdir` makes it", errno_words(errno)))
    })?;
    if !real.is_dir() {
        return Err(refused("it is no directory").into());
    }
    if mounts()?.iter().any(|mount| mount.point == real) {
        return Err(
            refused("something is mounted there already; `umount` it, or choose another directory").into()
        );
    }
    Ok(real)
}

/// Mounts the file system on the device of the volume `name` on a [`mount_point`].
pub fn mount_on(device: &Path, dir: &Path, name: &str, volume: Uuid, read_only: bool) -> Result<()> {
    if holds_nothing(device) {
        return Err(AttachError::NoFileSystem { name: name.to_owned() }.into());
    }
    let Some(home) = home() else { return Err(AttachError::NotAttached { name: name.to_owned() }.into()) };
    let note = note(&home, volume);
    // Before the mount: after a crash in between, there is a note without a mount, which says nothing.
    std::fs::write(&note, dir.as_os_str().as_bytes()).map_err(|error| failed(&note, &error))?;
    let mut mount = Command::new("mount");
    if read_only {
        mount.args(["-o", "ro"]);
    }
    if let Err(error) = run(mount.arg(device).arg(dir)) {
        std::fs::remove_file(&note).map_err(|error| failed(&note, &error))?;
        return Err(error.into());
    }
    Ok(())
}

/// Whether the system's prober is sure that there is nothing it knows. Without a prober, `mount` will say.
fn holds_nothing(device: &Path) -> bool {
    const NOTHING: i32 = 2;
    let probed = Command::new("blkid").args(["--probe", "--match-tag", "TYPE"]).arg(device).output();
    probed.is_ok_and(|probed| probed.status.code() == Some(NOTHING))
}

/// Runs a program of the system; gives what it printed.
fn run(command: &mut Command) -> std::result::Result<String, AttachError> {
    let line = || {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
    };
    let line = line();
    let ended = command.output().map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        AttachError::Command { command: line.clone(), said: errno_words(errno) }
    })?;
    if ended.status.success() {
        return Ok(String::from_utf8_lossy(&ended.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    let said = if said.is_empty() { ended.status.to_string() } else { said };
    Err(AttachError::Command { command: line, said })
}

fn errno_words(errno: Errno) -> String {
    crate::error::words(errno)
}
