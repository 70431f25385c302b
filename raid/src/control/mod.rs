//! Steering a volume that is being served, from outside the process that serves it: HTTP and JSON over a Unix socket
//! named after the volume's UUID in the runtime directory. `raid10 serve` and `broker serve` listen ([`serve`]), the
//! command line is the client ([`Client`]).
//!
//! | request | answer |
//! |---|---|
//! | `GET /status` | [`Status`](crate::status::Status), the document of `raid10 status --json` |
//! | `POST /stop` | `{}` once the volume is flushed and marked clean; refused while it is attached |
//! | `POST /fail`, `/remove` `{"member"}` | `{}` |
//! | `POST /add` `{"path","force"}` | [`Added`](crate::orders::Added): being rebuilt, caught up, or a spare |
//! | `POST /replace` `{"member","path"}` | `{}` once the copying has begun |
//! | `POST /scrub` `{"repair","wait"}` | [`ScrubReport`]; without `wait` at once |
//! | `POST /scrub/cancel` | `{}` |
//! | `GET /mismatches` | what the last scrub found |
//! | `POST /grow` | `{"size"}` |
//! | `GET /attached` | [`Shown`](crate::attach::Shown), or `null` |
//! | `POST /attach` [`Way`](crate::attach::Way) | [`Shown`](crate::attach::Shown): the volume is a file or a disk of this machine |
//! | `POST /detach` | `{}` once that is flushed and gone; refused while the file is in use |
//! | `POST /limit` `{"min","max"}` | [`SpeedLimits`](crate::orders::SpeedLimits) as they are now; a limit that is left out stays |
//!
//! A member is `{"slot": 1}` or `{"path": "…"}`; paths are absolute, and are opened by the process that serves. A
//! failure is answered with status 4xx (the request is at fault, and nothing has changed) or 5xx and
//! `{"error": "a sentence"}`.
//!
//! Invariants: only the owner can connect (directory 0700 if made here, socket 0600). The socket exists while the
//! server lives; a dead server's is taken over by the next one, and told from a living one by connecting. Commands are
//! carried out to their end, even if the client goes away; those that change the volume one at a time. To attach and to
//! detach are not among these: they are calls to the kernel, which may take for as long as some disk hangs, and hold up
//! nothing else.

mod attach;
pub mod client;
mod members;
pub mod on_event;
mod requests;
pub mod server;

pub use client::Client;
pub use members::{Opener, read_write};
pub use on_event::{OnEvent, Program};
pub use requests::ScrubReport;
pub use server::{ControlServer, Handles, StopHandle, serve};

use crate::error::{Error, Result};
use rustix::io::Errno;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// What a control socket's name ends with, after the UUID.
const SUFFIX: &str = "sock";

/// Where served volumes are found: `$RAID10_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/raid10`, else `/run/raid10`.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("RAID10_RUNTIME_DIR")
        .or_else(|| set("XDG_RUNTIME_DIR").map(|dir| dir.join("raid10")))
        .unwrap_or_else(|| "/run/raid10".into())
}

/// Makes the runtime directory if it is not there, for its owner only.
pub fn make_runtime_dir(dir: &Path) -> Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| Error::RuntimeDir {
        path: dir.display().to_string(),
        errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    })
}

/// Another runtime directory than this process's in which somebody serves the volume, as the kernel lists listening
/// sockets (`/proc/net/unix`). Disks of the kernel's NBD driver are the whole machine's, whatever directory is looked at.
#[must_use]
pub fn served_elsewhere(volume: Uuid) -> Option<PathBuf> {
    let here = runtime_dir();
    let here = here.canonicalize().unwrap_or(here);
    let listed = std::fs::read_to_string("/proc/net/unix").ok()?;
    let dirs = listening(&listed, volume).filter_map(|socket| socket.parent());
    dirs.map(|dir| dir.canonicalize().unwrap_or_else(|_| dir.to_owned())).find(|dir| *dir != here)
}

/// The control sockets of the volume among those that listen.
fn listening(listed: &str, volume: Uuid) -> impl Iterator<Item = &Path> {
    /// `__SO_ACCEPTCON`
    const LISTENS: &str = "00010000";
    let name = format!("{volume}.{SUFFIX}");
    listed.lines().filter_map(move |line| {
        let flags = line.split_whitespace().nth(3)?;
        let path = Path::new(&line[line.find(" /")? + 1..]);
        (flags == LISTENS && path.file_name().is_some_and(|file| file == name.as_str())).then_some(path)
    })
}

/// The control socket of a volume.
fn socket_path(dir: &Path, volume: Uuid) -> PathBuf {
    dir.join(format!("{volume}.{SUFFIX}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_found_wherever_they_listen() {
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let listed = format!(
            "Num       RefCount Protocol Flags    Type St Inode Path\n\
             0000: 00000002 00000000 00010000 0001 01 100 /run/raid10/{one}.sock\n\
             0000: 00000003 00000000 00000000 0001 03 101 /tmp/peer/{one}.sock\n\
             0000: 00000002 00000000 00010000 0001 01 102 /run/user/0/my dir/{one}.sock\n\
             0000: 00000002 00000000 00010000 0001 01 103 @abstract\n\
             0000: 00000002 00000000 00010000 0001 01 104\n"
        );
        let found: Vec<_> =
            listening(&listed, one).map(|path| path.parent().unwrap().to_str().unwrap()).collect();
        assert_eq!(found, ["/run/raid10", "/run/user/0/my dir"]);
        assert_eq!(listening(&listed, other).count(), 0);
    }
}
