//! What the command line does about the disk of an attached volume: loop device and mount are made and undone here, by
//! root; all functions block. (A disk of the kernel's NBD driver is the serving process's to make.)
//!
//! What there is of an attachment is read from the kernel each time ([`find`]). It is undone from the top: mount, device,
//! file. With a server that lives, each step is checked before the first is taken, and what is in use is refused. With a
//! server that died, nothing of a loop device can be saved any more: what can be undone is, and the rest goes when the
//! last process lets it go. A disk of the NBD driver waits for the next server ([`Attachment::waiting`]), and is undone
//! without one only if asked for: then it is noted as given up, so that nobody takes it over, and its requests fail first, so
//! that unmounting waits for none.
//!
//! What cannot be written any more is no reason to keep a disk, and is told once it is gone ([`Held`]).

use super::kernel::{
    BlockDevice, Mounted, NbdDisk, bound_discards, failed, loops_over, mounts, openers, our_nbd_disks,
};
use super::kernel_disk::{give_up, parse_backend};
use super::netlink::Driver;
use super::notes::{Lost, Notes};
use super::{AttachError, FILE_SUFFIX, LOCK_SUFFIX, NOTE_SUFFIX, SOURCE_PREFIX, Shown, Way};
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

/// Keeps other commands from attaching and detaching the volume at the same time, for as long as it lives. Other volumes are
/// not held up by what the kernel takes long for.
pub fn alone(volume: Uuid) -> Result<File> {
    let path = runtime_dir().join(format!("{volume}.{LOCK_SUFFIX}"));
    let opened = File::options().create(true).truncate(false).write(true).open(&path);
    let opened = opened.map_err(|error| failed(&path, &error))?;
    flock(&opened, FlockOperation::LockExclusive).map_err(|errno| failed(&path, &errno.into()))?;
    Ok(opened)
}

/// Whether the kernel has its NBD driver loaded. What cannot be asked is taken for no.
#[must_use]
pub fn kernel_has_nbd() -> bool {
    matches!(Driver::find(), Ok(Some(_)))
}

/// What there is of a volume's attachment: at least one of file, device and mount.
#[derive(Debug)]
pub struct Attachment {
    volume: Uuid,
    /// Where the volume is shown as a file, and whether it still is.
    file: PathBuf,
    shown: bool,
    disks: Vec<Disk>,
    /// Disks that were disconnected, or given up, while they were in use: they go when they are let go.
    dead: Vec<BlockDevice>,
    /// Where the disks are mounted, the dead ones too; the oldest first.
    mounts: Vec<PathBuf>,
    /// Which mount `attach --mount` has made.
    ours: Option<PathBuf>,
}

#[derive(Debug)]
struct Disk {
    device: BlockDevice,
    by: By,
}

#[derive(Debug)]
enum By {
    Loop,
    /// `lost`: it has waited in vain for a server.
    Nbd {
        number: u32,
        backend: String,
        lost: Option<Lost>,
    },
}

/// What becomes of a disk of the NBD driver without a server.
enum Fate {
    Waits,
    Lost(Lost),
    Dead,
}

/// Devices that nobody else can mount, or open for themselves alone, while this lives.
#[derive(Debug)]
#[must_use]
pub struct Held {
    devices: Vec<File>,
    /// What could not be written any more.
    unwritten: Option<AttachError>,
}

impl Held {
    /// Takes note of how the last of what was written to a device has fared.
    fn written(&mut self, device: &Path, outcome: rustix::io::Result<()>) {
        let device = || device.display().to_string();
        let unwritten = outcome.err().map(|errno| AttachError::Unwritten { device: device(), errno });
        self.unwritten = self.unwritten.take().or(unwritten);
    }
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
    let notes = Notes::of_machine()?;
    found(volume, |disk| {
        Ok(match notes.lost(disk)? {
            Some(Lost::GivenUp) => Fate::Dead,
            _ if !stands(disk.number, &disk.backend) => Fate::Dead,
            Some(lost) => Fate::Lost(lost),
            None => Fate::Waits,
        })
    })
}

/// The same for who only looks, from the kernel's lists and the notes alone: the NBD driver, which may take long, is not
/// asked. A disk that somebody else has disconnected while it was in use is taken for one that waits for its server then,
/// and so is one whose note may not be read.
pub fn look(volume: Uuid) -> Result<Option<Attachment>> {
    let notes = Notes::of_machine().ok();
    found(volume, |disk| {
        let lost = notes.as_ref().and_then(|notes| notes.lost(disk).ok()?);
        Ok(match lost {
            Some(Lost::GivenUp) => Fate::Dead,
            Some(lost) => Fate::Lost(lost),
            None => Fate::Waits,
        })
    })
}

fn found(volume: Uuid, fate: impl Fn(&NbdDisk) -> Result<Fate>) -> Result<Option<Attachment>> {
    // What stands there is found by the device's own word, wherever the runtime directory is.
    let dir = home().unwrap_or_else(runtime_dir);
    let file = dir.join(format!("{volume}.{FILE_SUFFIX}"));
    let mounts = mounts()?;
    let shown = mounts.iter().any(|mount| mount.point == file);
    let mut disks: Vec<Disk> =
        loops_over(&file)?.into_iter().map(|device| Disk { device, by: By::Loop }).collect();
    let mut dead = Vec::new();
    for disk in our_nbd_disks()?.into_iter().filter(|disk| disk.volume() == Some(volume)) {
        let lost = match fate(&disk)? {
            Fate::Dead => {
                dead.push(disk.device);
                continue;
            }
            Fate::Lost(lost) => Some(lost),
            Fate::Waits => None,
        };
        let by = By::Nbd { number: disk.number, backend: disk.backend, lost };
        disks.push(Disk { device: disk.device, by });
    }
    let devices = || disks.iter().map(|disk| &disk.device).chain(&dead);
    let of_disks = |mount: &&Mounted| devices().any(|device| device.numbers.contains(&mount.number));
    let mounts: Vec<PathBuf> = mounts.iter().filter(of_disks).map(|mount| mount.point.clone()).collect();
    if !shown && disks.is_empty() && mounts.is_empty() {
        return Ok(None);
    }
    // Without a note, no mount is ours.
    let ours =
        std::fs::read(note(&dir, volume)).ok().map(|path| PathBuf::from(std::ffi::OsString::from_vec(path)));
    Ok(Some(Attachment { volume, file, shown, disks, dead, mounts, ours }))
}

/// Whether a disk of the NBD driver can be connected again. Who may not ask is told yes.
fn stands(number: u32, backend: &str) -> bool {
    match Driver::find() {
        Ok(Some(driver)) => driver.stands(number, backend).unwrap_or(true),
        Ok(None) => false,
        Err(_) => true,
    }
}

/// The volumes of that name, or UUID, that are attached, whether their servers live or not.
pub fn named(volume: &str) -> Result<Vec<Uuid>> {
    let meant = |uuid: Uuid| Uuid::parse_str(volume) == Ok(uuid);
    let mut found = Vec::new();
    if let Some(home) = home() {
        let source = format!("{SOURCE_PREFIX}{volume}");
        let uuid_of = |mount: &Mounted| {
            let name = mount.point.strip_prefix(&home).ok()?.to_str()?;
            let uuid = Uuid::parse_str(name.strip_suffix(FILE_SUFFIX)?.strip_suffix('.')?).ok()?;
            (mount.source == OsStr::new(&source) || meant(uuid)).then_some(uuid)
        };
        found.extend(mounts()?.iter().filter_map(uuid_of));
    }
    for disk in our_nbd_disks()? {
        let told = parse_backend(&disk.backend);
        found.extend(told.and_then(|(uuid, name)| (name == volume || meant(uuid)).then_some(uuid)));
    }
    found.sort();
    found.dedup();
    Ok(found)
}

impl Attachment {
    /// The device, if it has come that far.
    #[must_use]
    pub fn device(&self) -> Option<&Path> {
        self.disks.first().map(|disk| disk.device.path.as_path())
    }

    /// The disk of the kernel's NBD driver, which outlives its server, and how the next one takes it over.
    #[must_use]
    pub fn waiting(&self) -> Option<Way> {
        self.disks.iter().find_map(|disk| match disk.by {
            By::Nbd { number, .. } => Some(Way::NbdAgain { device: number }),
            By::Loop => None,
        })
    }

    /// Why the next server cannot take it over, if so.
    #[must_use]
    pub fn lost(&self, name: &str) -> Option<AttachError> {
        let lost = self.disks.iter().find_map(|disk| match disk.by {
            By::Nbd { lost, .. } => lost,
            By::Loop => None,
        });
        lost.map(|lost| lost.error(name, self.place()))
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

    /// Undoes mount and loop device, while the server lives: all, or it is refused and nothing has changed. The file, or
    /// the disk of the NBD driver, is the server's to take away, after this; meanwhile nobody else gets hold of it.
    pub fn let_go(&self) -> Result<Held> {
        self.refuse_if_used()?;
        let mut held = Held { devices: Vec::new(), unwritten: None };
        for point in self.mounts.iter().rev() {
            // To unmount says nothing of what it could not write.
            let root = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let synced = open(point, root, Mode::empty()).and_then(rustix::fs::syncfs);
            held.written(point, synced);
            unmount(point, UnmountFlags::NOFOLLOW).map_err(|errno| AttachError::MountInUse {
                dir: point.display().to_string(),
                said: errno_words(errno),
            })?;
        }
        for disk in &self.disks {
            let path = &disk.device.path;
            let claimed = open(path, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty());
            let claimed = claimed.map_err(|errno| match errno {
                // Claimed by what is not listed above: a mount in another namespace, swap.
                Errno::BUSY => {
                    let who = "a file system mounted in another mount namespace, or swap".to_owned();
                    AttachError::DeviceInUse { device: path.display().to_string(), who }
                }
                errno => failed(path, &errno.into()),
            })?;
            // What was written to the device itself is in its page cache.
            held.written(path, rustix::fs::fsync(&claimed));
            match disk.by {
                By::Loop => {
                    drop(claimed);
                    self.release(&disk.device)?;
                    self.refuse_if_there(&disk.device)?;
                }
                By::Nbd { .. } => held.devices.push(File::from(claimed)),
            }
        }
        self.forget_note()?;
        Ok(held)
    }

    /// Waits until the disk of the NBD driver is free, after the server has let it go. An error, too, if not all of what
    /// was written could be.
    pub fn await_end(&self, held: Held) -> Result<()> {
        drop(held.devices);
        for disk in self.disks.iter().filter(|disk| matches!(disk.by, By::Nbd { .. })) {
            self.refuse_if_there(&disk.device)?;
        }
        held.unwritten.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Makes the disk as large as the volume has become, in bytes.
    pub fn resize(&self, size: u64) -> Result<()> {
        if self.shown {
            // Looked at, the file's size is asked for anew.
            self.file.metadata().map_err(|error| failed(&self.file, &error))?;
        }
        for disk in &self.disks {
            let path = &disk.device.path;
            match &disk.by {
                By::Loop => {
                    run(Command::new("losetup").arg("--set-capacity").arg(path))?;
                }
                By::Nbd { number, backend, .. } => {
                    let refused = |errno| AttachError::Nbd { device: path.display().to_string(), errno };
                    let driver = Driver::find().map_err(refused)?.ok_or(AttachError::NoNbd)?;
                    driver.resize(*number, backend, size).map_err(refused)?;
                    bound_discards(*number);
                }
            }
        }
        Ok(())
    }

    fn refuse_if_used(&self) -> Result<()> {
        if let Some(other) = self.mounts.iter().find(|point| Some(*point) != self.ours.as_ref()) {
            let device = self.device().unwrap_or(&self.file).display().to_string();
            return Err(AttachError::MountedByOthers { device, dir: other.display().to_string() }.into());
        }
        for BlockDevice { path, holders, partitions, .. } in self.disks.iter().map(|disk| &disk.device) {
            let begun = Instant::now();
            let using = || partitions.iter().chain([path]).flat_map(|path| openers(path)).collect::<Vec<_>>();
            let mut users = holders.clone();
            users.extend(using());
            // Who only looks at it, as udev does at new devices, is gone soon.
            while !users.is_empty() && holders.is_empty() && begun.elapsed() < LOOKING {
                std::thread::sleep(Duration::from_millis(20));
                users = using();
            }
            if !users.is_empty() {
                let device = path.display().to_string();
                return Err(AttachError::DeviceInUse { device, who: users.join(", ") }.into());
            }
        }
        Ok(())
    }

    fn release(&self, device: &BlockDevice) -> Result<()> {
        run(Command::new("losetup").arg("--detach").arg(&device.path)).map(|_| ()).or_else(|error| {
            // It may have gone by itself, with the last mount.
            if self.is_there(device)? { Err(error.into()) } else { Ok(()) }
        })
    }

    fn is_there(&self, device: &BlockDevice) -> Result<bool> {
        let mut nbd = our_nbd_disks()?.into_iter().filter(|disk| disk.volume() == Some(self.volume));
        Ok(loops_over(&self.file)?.iter().any(|other| other.path == device.path)
            || nbd.any(|other| other.device.path == device.path))
    }

    /// Waits a little until the device is free; the kernel frees it when the last one closes it.
    fn is_gone(&self, device: &BlockDevice) -> Result<bool> {
        let begun = Instant::now();
        while self.is_there(device)? {
            if begun.elapsed() > GOING {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(true)
    }

    fn refuse_if_there(&self, device: &BlockDevice) -> Result<()> {
        if self.is_gone(device)? {
            return Ok(());
        }
        let who = "a process that has just opened it (it goes when that ends)".to_owned();
        Err(AttachError::DeviceInUse { device: device.path.display().to_string(), who }.into())
    }

    fn forget_note(&self) -> Result<()> {
        let note = self.file.with_extension(NOTE_SUFFIX);
        match std::fs::remove_file(&note) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(&note, &error).into()),
            _ => Ok(()),
        }
    }

    /// Undoes what a server that died has left; whatever was not written yet is lost then. Gives a sentence for each
    /// thing that was there.
    pub fn clean_up(&self) -> Result<Vec<String>> {
        let mut told = Vec::new();
        let mut held = false;
        for disk in &self.disks {
            if let By::Nbd { number, backend, .. } = &disk.by {
                give_up(*number, backend)?;
            }
        }
        for point in self.mounts.iter().rev() {
            held |= abandon(point, &mut told)?;
        }
        for disk in self.disks.iter().filter(|disk| matches!(disk.by, By::Loop)) {
            self.release(&disk.device)?;
        }
        for device in self.disks.iter().map(|disk| &disk.device).chain(&self.dead) {
            let path = device.path.display();
            told.push(if !held && self.is_gone(device)? {
                format!("{path} is free again")
            } else {
                format!("{path} becomes free when {} let it go", openers_or_others(&device.path))
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

/// The disk: that of the NBD driver, or the next free loop device, over the file. Gives its path.
pub fn set_up(shown: &Shown) -> Result<PathBuf> {
    let unseen = || AttachError::Unseen { path: shown.path.display().to_string() };
    if shown.nbd.is_some() {
        // Made by the kernel where `/dev` is its own.
        shown.path.metadata().map_err(|_| unseen())?;
        return Ok(shown.path.clone());
    }
    if !mounts()?.iter().any(|mount| mount.point == shown.path) {
        return Err(unseen().into());
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
