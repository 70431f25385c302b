//! What the kernel has listed: mounts, loop devices and NBD disks, who uses a device. Read anew each time; nothing is kept.

use super::AttachError;
use super::kernel_disk::parse_backend;
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A mount of this process's mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mounted {
    /// The device's number, `MAJOR:MINOR`.
    pub(super) number: String,
    /// The directory or file it is mounted on.
    pub(super) point: PathBuf,
    /// What it comes from, as whoever mounted it has put it.
    pub(super) source: OsString,
}

/// A block device with its partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockDevice {
    /// Its path in `/dev`.
    pub(super) path: PathBuf,
    /// Its number, `MAJOR:MINOR`, and those of its partitions.
    pub(super) numbers: Vec<String>,
    /// The paths of its partitions.
    pub(super) partitions: Vec<PathBuf>,
    /// Devices stacked on it or on them.
    pub(super) holders: Vec<String>,
}

/// A disk of the kernel's NBD driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NbdDisk {
    /// The device.
    pub(super) device: BlockDevice,
    /// N of `/dev/nbdN`.
    pub(super) number: u32,
    /// Whose it is, as whoever connected it has put it; empty if nothing was told.
    pub(super) backend: String,
    /// The process that made it, whoever serves it now: no two disks of one number have had the same, in one boot.
    pub(super) maker: String,
    /// Whether it refuses to be written.
    pub(super) read_only: bool,
    /// Bytes.
    pub(super) size: u64,
}

impl NbdDisk {
    /// Which of our volumes it is, if it is one.
    pub(super) fn volume(&self) -> Option<Uuid> {
        parse_backend(&self.backend).map(|(volume, _)| volume)
    }
}

pub(super) fn failed(path: &Path, error: &std::io::Error) -> AttachError {
    let errno = Errno::from_io_error(error).unwrap_or(Errno::IO);
    AttachError::Files { path: path.display().to_string(), errno }
}

/// All mounts, the oldest first.
pub(super) fn mounts() -> Result<Vec<Mounted>, AttachError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(|error| failed(path, &error))?;
    Ok(parse_mounts(&text))
}

/// The lines of `mountinfo` (`proc_pid_mountinfo(5)`); one that is not understood is passed over.
fn parse_mounts(text: &[u8]) -> Vec<Mounted> {
    let lines = text.split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let number = fields.nth(2)?;
            let point = fields.nth(1)?;
            // Optional fields end with a dash; type and source follow.
            let source = fields.by_ref().skip_while(|field| *field != b"-").nth(2)?;
            Some(Mounted {
                number: String::from_utf8(number.to_vec()).ok()?,
                point: unescaped(point).into(),
                source: unescaped(source),
            })
        })
        .collect()
}

/// White space and backslashes stand as three octal digits behind a backslash.
fn unescaped(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(plain)
}

/// Where the kernel lists block devices.
const DEVICES: &str = "/sys/block";

/// The names of all block devices; a container may be without: then without such devices, too.
fn names(home: &Path) -> Result<Vec<OsString>, AttachError> {
    let entries = match fs::read_dir(home) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| failed(home, &error))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        found.push(entry.map_err(|error| failed(home, &error))?.file_name());
    }
    found.sort();
    Ok(found)
}

/// The text of a file of a device. A device that is not in use, or goes at this moment, has it not.
fn fact(device: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(device.join(name)).ok()?;
    // One line's end: a name may end with white space of its own.
    Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

fn block_device(home: &Path, name: &OsStr) -> Option<BlockDevice> {
    let device = home.join(name);
    let listed = |dir: &Path| -> Vec<OsString> {
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
    };
    let holders = |device: &Path| listed(&device.join("holders"));
    let mut found = BlockDevice {
        path: Path::new("/dev").join(name),
        numbers: vec![fact(&device, "dev")?],
        partitions: Vec::new(),
        holders: Vec::new(),
    };
    let mut stacked = holders(&device);
    for part in listed(&device) {
        let part_device = device.join(&part);
        if let (Some(_), Some(number)) = (fact(&part_device, "partition"), fact(&part_device, "dev")) {
            found.numbers.push(number);
            found.partitions.push(Path::new("/dev").join(&part));
            stacked.extend(holders(&part_device));
        }
    }
    found.holders = stacked.iter().map(|holder| holder.to_string_lossy().into_owned()).collect();
    Some(found)
}

/// The loop devices over a file, in the order of their names.
pub(super) fn loops_over(file: &Path) -> Result<Vec<BlockDevice>, AttachError> {
    let home = Path::new(DEVICES);
    let over = |name: &OsString| {
        let backing = fs::read(home.join(name).join("loop/backing_file")).ok();
        backing.is_some_and(|backing| OsStr::from_bytes(backing.trim_ascii_end()) == file)
    };
    Ok(names(home)?.iter().filter(|name| over(name)).filter_map(|name| block_device(home, name)).collect())
}

/// The disks of ours that the kernel's NBD driver has.
pub(super) fn our_nbd_disks() -> Result<Vec<NbdDisk>, AttachError> {
    our_nbd_disks_in(Path::new(DEVICES))
}

fn our_nbd_disks_in(home: &Path) -> Result<Vec<NbdDisk>, AttachError> {
    let number = |name: &OsString| name.to_str()?.strip_prefix("nbd")?.parse().ok();
    let mut numbers: Vec<u32> = names(home)?.iter().filter_map(number).collect();
    numbers.sort_unstable();
    let disks = numbers.into_iter().filter_map(|number| nbd_disk_in(home, number));
    Ok(disks.filter(|disk| disk.volume().is_some()).collect())
}

/// A disk of the kernel's NBD driver, if it is connected, or was and is still used.
pub(super) fn nbd_disk(number: u32) -> Option<NbdDisk> {
    nbd_disk_in(Path::new(DEVICES), number)
}

fn nbd_disk_in(home: &Path, number: u32) -> Option<NbdDisk> {
    /// What sysfs counts sizes in, whatever a device's blocks are.
    const SECTOR: u64 = 512;
    let name = format!("nbd{number}");
    let device = home.join(&name);
    Some(NbdDisk {
        maker: fact(&device, "pid")?,
        device: block_device(home, OsStr::new(&name))?,
        number,
        backend: fact(&device, "backend").unwrap_or_default(),
        read_only: fact(&device, "ro")? == "1",
        size: fact(&device, "size")?.parse::<u64>().ok()?.checked_mul(SECTOR)?,
    })
}

/// Bytes of one discard on a disk of the kernel's NBD driver; some hundreds are under way at a time at most. The driver
/// itself knows no limit but 4 GiB.
const MOST_DISCARD: u64 = 64 << 20;

/// Bounds what the kernel asks a disk of its NBD driver to discard at a time. A change of its size may undo that, on
/// kernels before 6.9: it is to be done again then.
pub(super) fn bound_discards(number: u32) {
    let limit = format!("{DEVICES}/nbd{number}/queue/discard_max_bytes");
    if let Err(error) = fs::write(&limit, MOST_DISCARD.to_string()) {
        tracing::warn!("a discard on /dev/nbd{number} may take long: cannot write {limit}: {error}");
    }
}

/// The processes that have a device open, as far as this one may see: `NAME (PID)`.
pub(super) fn openers(device: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // Processes come and go meanwhile.
        let mut open = fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
        if open.any(|file| fs::read_link(file.path()).is_ok_and(|path| path == device)) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("{} ({pid})", name.trim_end()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_whatever_their_names_hold() {
        let text = b"22 28 0:21 / /proc rw,nosuid - proc proc rw\n\
            95 28 0:50 / /run/raid10/x.disk rw,nosuid shared:7 master:1 - fuse.raid10 raid10:my\\040vol rw,user_id=0\n\
            96 28 7:0 / /mnt/a\\134b\\040c rw - ext4 /dev/loop0 rw\n\
            nonsense\n\n97 28 7:1 / /short rw -\n";
        let mounts = parse_mounts(text);
        let told: Vec<_> = mounts
            .iter()
            .map(|m| (m.number.as_str(), m.point.to_str().unwrap(), m.source.to_str().unwrap()))
            .collect();
        assert_eq!(
            told,
            [
                ("0:21", "/proc", "proc"),
                ("0:50", "/run/raid10/x.disk", "raid10:my vol"),
                ("7:0", "/mnt/a\\b c", "/dev/loop0"),
            ]
        );
        assert_eq!(unescaped(b"a\\04"), "a\\04");
        assert_eq!(unescaped(b"\\999"), "\\999");
    }

    #[test]
    fn disks_of_the_kernels_nbd_driver_are_found() {
        let home = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            let path = home.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let ours = super::super::kernel_disk::backend(Uuid::from_u128(5), "vol ");
        for (name, facts) in [
            ("nbd0", &[("pid", "77\n"), ("backend", "\n")][..]),
            ("nbd10", &[("pid", "77\n"), ("backend", &format!("{ours}\n"))]),
            ("nbd2", &[]),
            ("nbd3", &[("pid", "77\n")]),
            ("nbdx", &[("pid", "77\n"), ("backend", &format!("{ours}\n"))]),
        ] {
            for (fact, text) in [("dev", "43:0\n"), ("ro", "0\n"), ("size", "8\n")].iter().chain(facts) {
                put(&format!("{name}/{fact}"), text);
            }
        }
        put("nbd10/nbd10p1/partition", "1\n");
        put("nbd10/nbd10p1/dev", "43:161\n");
        put("nbd10/nbd10p1/holders/dm-0/dev", "253:0\n");
        let found = our_nbd_disks_in(home.path()).unwrap();
        let device = BlockDevice {
            path: "/dev/nbd10".into(),
            numbers: vec!["43:0".to_owned(), "43:161".to_owned()],
            partitions: vec!["/dev/nbd10p1".into()],
            holders: vec!["dm-0".to_owned()],
        };
        let maker = "77".to_owned();
        let disk = NbdDisk { device, number: 10, backend: ours, maker, read_only: false, size: 4096 };
        assert_eq!(found, [disk]);
        // Others' are told from free ones.
        assert_eq!(nbd_disk_in(home.path(), 3).map(|disk| disk.backend), Some(String::new()));
        assert_eq!(nbd_disk_in(home.path(), 2), None);
        assert_eq!(nbd_disk_in(home.path(), 99), None);
        assert_eq!(our_nbd_disks_in(Path::new("/nowhere")).unwrap(), []);
    }

    #[test]
    fn who_has_a_file_open_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let me = format!("({})", std::process::id());
        let found = openers(file.path());
        assert!(found.len() == 1 && found[0].ends_with(&me), "{found:?}");
        assert!(openers(Path::new("/nowhere")).is_empty());
    }
}
