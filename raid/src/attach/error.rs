//! Why a volume could not be attached or detached, a variant a cause, each with its remedy.

use crate::error::words;
use rustix::io::Errno;

/// A cause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// Only root has devices and mounts.
    #[error("only root can attach or detach volumes; run it as root")]
    NotRoot,
    /// Whoever serves the volume has it for itself.
    #[error(
        "{name} is served by a broker, which keeps its log on it and nothing else; \
         to mount a volume, serve it with `raid10 serve`"
    )]
    OwnUse {
        /// The volume.
        name: String,
    },
    /// The kernel has no FUSE, or it is not loaded.
    #[error("cannot open /dev/fuse: {}; load it with `modprobe fuse`", words(*errno))]
    NoFuse {
        /// What the system said.
        errno: Errno,
    },
    /// The kernel has no NBD driver, or it is not loaded.
    #[error(
        "this kernel has no nbd driver, or has not loaded it; load it with `modprobe nbd`, or leave --device out: then it \
         goes through FUSE and a loop device"
    )]
    NoNbd,
    /// The kernel's NBD driver does not tell whose a disk is.
    #[error(
        "this kernel's nbd driver is too old: it does not tell whose its disks are (Linux 5.14 does); leave --device out: \
         then it goes through FUSE and a loop device"
    )]
    OldNbd,
    /// The disk that was asked for is another's.
    #[error("{device} is in use{by}; choose another, or leave --device out")]
    NbdBusy {
        /// The disk.
        device: String,
        /// ` by …`, if that is known.
        by: String,
    },
    /// The kernel's NBD driver refuses.
    #[error("the kernel's nbd driver refuses {device}: {}{}", words(*errno), nbd_remedy(*errno))]
    Nbd {
        /// The disk, or "a disk".
        device: String,
        /// What it said.
        errno: Errno,
    },
    /// A disk that may be written, and a server that writes nothing.
    #[error(
        "{device} was attached to be written, and its volume is served read-only now; serve it without --read-only"
    )]
    Writable {
        /// The disk.
        device: String,
    },
    /// Served, but not where this command looks.
    #[error("{name} is served from another runtime directory; run this with RAID10_RUNTIME_DIR={dir}")]
    Elsewhere {
        /// The volume.
        name: String,
        /// The directory.
        dir: String,
    },
    /// A disk without a server, which waits for one.
    #[error(
        "{name} has no server, and {device} keeps what is not written yet for the next one: serve it again and \
         `raid10 attach {name}`; or give that up with `raid10 detach {name} --force`"
    )]
    Waits {
        /// The volume.
        name: String,
        /// The disk, and where it is mounted.
        device: String,
    },
    /// A disk that has lost what it was to keep.
    #[error(
        "{device} {why}: what was written to it last may be lost, so it is not connected again; `raid10 detach {name} \
         --force` lets it go, and `raid10 attach {name}` makes a new disk then: check its file system before it is used"
    )]
    Lost {
        /// The volume.
        name: String,
        /// The disk, and where it is mounted.
        device: String,
        /// What became of it.
        why: &'static str,
    },
    /// What is on record of a disk cannot be made out.
    #[error("{path} is not what is noted of a disk; remove it if that disk has a server, or is not there")]
    Note {
        /// The file.
        path: String,
    },
    /// The disk is gone, and with it what could not be written.
    #[error(
        "{device} is gone, but not all that was written to it has reached the volume: {}; check what lies on it, for \
         example with `fsck`, before it is used",
        words(*errno)
    )]
    Unwritten {
        /// The disk, or where it was mounted.
        device: String,
        /// What the system said.
        errno: Errno,
    },
    /// The volume could not be flushed.
    #[error(
        "{name} is detached, but could not be flushed: {cause}; what was written last may be lost: check what lies on it, \
         for example with `fsck`, before it is used"
    )]
    Unflushed {
        /// The volume.
        name: String,
        /// Why.
        cause: String,
    },
    /// The volume could not be shown as a file.
    #[error("cannot show the volume as {path}: {}; the process that serves it must run as root", words(*errno))]
    Show {
        /// Where.
        path: String,
        /// What the system said.
        errno: Errno,
    },
    /// The file of a volume could not be taken away.
    #[error("cannot take {path} away: {}; `fuser -v {path}` shows who uses it", words(*errno))]
    Hide {
        /// Where it is.
        path: String,
        /// What the system said.
        errno: Errno,
    },
    /// What the server shows cannot be seen here.
    #[error(
        "{path} is not to be seen here: the process that serves the volume has mounts of its own; run both in one mount namespace"
    )]
    Unseen {
        /// Where it should be.
        path: String,
    },
    /// It is attached, and once is enough.
    #[error("{name} is attached at {place} already; `raid10 detach {name}` undoes that")]
    Already {
        /// The volume.
        name: String,
        /// The device, and the directory if it is mounted.
        place: String,
    },
    /// It is on its way.
    #[error(
        "{name} is being attached or detached at this moment, and the kernel has not answered yet; it waits for what is \
         under way on a disk: try again when that goes on"
    )]
    Changing {
        /// The volume.
        name: String,
    },
    /// It is not attached.
    #[error("{name} is not attached")]
    NotAttached {
        /// The volume.
        name: String,
    },
    /// A stop while attached.
    #[error("{name} is attached to this machine; `raid10 detach {name}` first")]
    StopAttached {
        /// The volume.
        name: String,
    },
    /// Somebody else mounted it.
    #[error("{device} is mounted on {dir}, and not by `raid10 attach`; `umount {dir}` first")]
    MountedByOthers {
        /// The device.
        device: String,
        /// Where.
        dir: String,
    },
    /// A mount that cannot be undone, because it is used.
    #[error("{dir} is in use: {said}; `fuser -vm {dir}` shows by whom; end them, then detach again")]
    MountInUse {
        /// Where.
        dir: String,
        /// What `umount` said.
        said: String,
    },
    /// A device that cannot be let go.
    #[error("{device} is in use by {who}; let it go there, then detach again")]
    DeviceInUse {
        /// The device.
        device: String,
        /// A device stacked on it, or a process.
        who: String,
    },
    /// There is nothing to be mounted on the volume.
    #[error(
        "{name} holds no file system that is known here; make one, for example with \
         `mkfs.ext4 \"$(raid10 attach {name})\"`, and attach it with --mount then"
    )]
    NoFileSystem {
        /// The volume.
        name: String,
    },
    /// Not a place to mount on.
    #[error("cannot mount on {dir}: {why}")]
    MountPoint {
        /// The directory.
        dir: String,
        /// What is wrong with it.
        why: String,
    },
    /// A program of the system failed.
    #[error("`{command}` failed: {said}")]
    Command {
        /// As it was run.
        command: String,
        /// What it said, or its exit status.
        said: String,
    },
    /// The kernel's lists could not be read, or the note not be written.
    #[error("{path}: {}", words(*errno))]
    Files {
        /// What was read or written.
        path: String,
        /// What the system said.
        errno: Errno,
    },
    /// Memory that was locked could not be unlocked; the volume is detached all the same.
    #[error("the volume is detached, but its server keeps its memory locked: {}", words(*errno))]
    Memory {
        /// What the system said.
        errno: Errno,
    },
}

fn nbd_remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::PERM => {
            "; the process that serves the volume must run as root, with CAP_SYS_ADMIN, and not in a container \
             with users of its own"
        }
        Errno::INVAL => "; `dmesg` says why",
        _ => "",
    }
}

impl AttachError {
    /// What the system calls it.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::NotRoot | Self::OwnUse { .. } => Errno::PERM,
            Self::NoFuse { errno }
            | Self::Memory { errno }
            | Self::Show { errno, .. }
            | Self::Hide { errno, .. }
            | Self::Files { errno, .. }
            | Self::Unwritten { errno, .. }
            | Self::Nbd { errno, .. } => *errno,
            Self::NotAttached { .. } | Self::NoNbd => Errno::NOENT,
            Self::OldNbd => Errno::NOTSUP,
            Self::Writable { .. } => Errno::ROFS,
            Self::Already { .. }
            | Self::Changing { .. }
            | Self::StopAttached { .. }
            | Self::MountedByOthers { .. }
            | Self::MountInUse { .. }
            | Self::NbdBusy { .. }
            | Self::Waits { .. }
            | Self::Elsewhere { .. }
            | Self::DeviceInUse { .. } => Errno::BUSY,
            Self::NoFileSystem { .. } | Self::MountPoint { .. } | Self::Note { .. } => Errno::INVAL,
            Self::Unseen { .. } | Self::Command { .. } | Self::Lost { .. } | Self::Unflushed { .. } => {
                Errno::IO
            }
        }
    }
}
