//! What the kernel has listed: mounts, loop devices, who uses a device. Read anew each time; nothing is kept.

use super::AttachError;
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

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

/// A loop device that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoopDevice {
    /// Its path in `/dev`.
    pub(super) path: PathBuf,
    /// Its number, `MAJOR:MINOR`.
    pub(super) number: String,
    /// The file behind it.
    pub(super) backing: PathBuf,
    /// Devices stacked on it.
    pub(super) holders: Vec<String>,
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

/// The loop devices over a file, in the order of their names.
pub(super) fn loops_over(file: &Path) -> Result<Vec<LoopDevice>, AttachError> {
    let home = Path::new("/sys/block");
    let mut found = Vec::new();
    let entries = match fs::read_dir(home) {
        // A container may be without: then without such devices, too.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        entries => entries.map_err(|error| failed(home, &error))?,
    };
    for entry in entries {
        let name = entry.map_err(|error| failed(home, &error))?.file_name();
        let device = home.join(&name);
        // A device that is not in use, or goes at this moment, has no such files.
        let Ok(backing) = fs::read(device.join("loop/backing_file")) else { continue };
        let Ok(number) = fs::read_to_string(device.join("dev")) else { continue };
        let backing = PathBuf::from(OsStr::from_bytes(backing.trim_ascii_end()));
        if backing != file {
            continue;
        }
        let holders = fs::read_dir(device.join("holders")).into_iter().flatten().flatten();
        found.push(LoopDevice {
            path: Path::new("/dev").join(&name),
            number: number.trim_end().to_owned(),
            backing,
            holders: holders.map(|holder| holder.file_name().to_string_lossy().into_owned()).collect(),
        });
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(found)
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
    fn who_has_a_file_open_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let me = format!("({})", std::process::id());
        let found = openers(file.path());
        assert!(found.len() == 1 && found[0].ends_with(&me), "{found:?}");
        assert!(openers(Path::new("/nowhere")).is_empty());
    }
}
