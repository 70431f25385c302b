//! Volumes served by `raid10` in a process of its own, and what the operating system stacks on them: loop devices,
//! FUSE, mounts. All of it is undone when dropped, in whatever state a failed test leaves it.

use crate::process::{Sandbox, Server, eventually, run, succeed};
use rustix::process::Signal;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// `raid10 create` on the given members, with further arguments, separated by white space.
pub fn create(sandbox: &Sandbox, members: &[PathBuf], arguments: &str) {
    succeed(sandbox.raid10().arg("create").args(members).args(arguments.split_whitespace()));
}

/// A volume that `raid10 serve` serves on a Unix socket; killed when dropped.
#[derive(Debug)]
pub struct Served {
    /// The process.
    pub server: Server,
    socket: PathBuf,
}

impl Served {
    /// Serves these members, with further arguments, separated by white space.
    #[must_use]
    pub fn start(sandbox: &Sandbox, members: &[PathBuf], arguments: &str) -> Self {
        let socket = sandbox.join("nbd.sock");
        let mut command = sandbox.raid10();
        command.arg("serve").args(members).args(["--nbd", &format!("unix:{}", socket.display())]);
        let server = Server::start(command.args(arguments.split_whitespace()));
        Self { server, socket }
    }

    /// Where NBD clients find it.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Bytes it holds.
    #[must_use]
    pub fn size(&self) -> u64 {
        let told = succeed(Command::new("nbdinfo").args(["--size", &self.uri()]));
        told.trim().parse().unwrap_or_else(|e| panic!("nbdinfo says {told}: {e}"))
    }

    /// Writes a file of just its size to it, and flushes.
    pub fn fill(&self, from: &Path) {
        succeed(Command::new("nbdcopy").arg("--flush").arg(from).arg(self.uri()));
    }

    /// Reads all of it to a file.
    pub fn dump(&self, to: &Path) {
        succeed(Command::new("nbdcopy").arg(self.uri()).arg(to));
    }

    /// SIGTERM; it must end in order.
    pub fn stop(self) {
        self.server.stop();
    }
}

/// Writes `size` bytes to `path`, no two sectors of which are equal, nor equal to a sector of another `seed`.
pub fn pattern(path: &Path, size: u64, seed: u64) {
    let mut out = BufWriter::new(std::fs::File::create(path).expect("the sandbox can be written"));
    for word in words(size, seed) {
        out.write_all(&word).expect("the sandbox has room");
    }
    out.flush().expect("the sandbox has room");
}

/// The bytes that [`pattern`] writes.
#[must_use]
pub fn patterned(size: u64, seed: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size as usize);
    words(size, seed).for_each(|word| bytes.extend_from_slice(&word));
    bytes
}

fn words(size: u64, seed: u64) -> impl Iterator<Item = [u8; 8]> {
    // Odd multipliers mix without losing anything: equal words only for equal (word, seed).
    let mixed = move |word: u64| (word ^ seed.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..size / 8).map(move |word| mixed(word).to_le_bytes())
}

/// The SHA-256 of the first `size` bytes of a file, in hexadecimal.
#[must_use]
pub fn sha256(path: &Path, size: u64) -> String {
    let script = format!("head -c {size} '{}' | sha256sum", path.display());
    let told = succeed(Command::new("sh").args(["-c", &script]));
    told.split_whitespace().next().expect("sha256sum prints the sum first").to_owned()
}

/// A loop device over a file; detached when dropped.
#[derive(Debug)]
pub struct Loop {
    device: PathBuf,
    attached: bool,
}

impl Loop {
    /// Attaches the next free one.
    #[must_use]
    pub fn attach(file: &Path) -> Self {
        let told = succeed(Command::new("losetup").args(["--find", "--show"]).arg(file));
        Self { device: told.trim().into(), attached: true }
    }

    /// Where it is.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Detaches it, which must work.
    pub fn detach(mut self) {
        self.attached = false;
        succeed(Command::new("losetup").arg("--detach").arg(&self.device));
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if self.attached {
            report(Command::new("losetup").arg("--detach").arg(&self.device));
        }
    }
}

/// A served volume as a file, by `nbdfuse`; unmounted when dropped.
#[derive(Debug)]
pub struct Fuse {
    server: Server,
    file: PathBuf,
    mounted: bool,
}

impl Fuse {
    /// The volume behind `socket`, as the file `volume.raw` in the sandbox.
    #[must_use]
    pub fn mount(sandbox: &Sandbox, socket: &Path) -> Self {
        let file = sandbox.join("volume.raw");
        std::fs::write(&file, "").expect("the sandbox can be written");
        let server = Server::spawn(sandbox.command("nbdfuse").arg(&file).arg("--unix").arg(socket));
        let mounted = Self { server, file, mounted: true };
        eventually("nbdfuse to show the volume", Duration::from_secs(60), || {
            std::fs::metadata(&mounted.file).ok().filter(|file| file.len() > 0)
        });
        mounted
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Stops nbdfuse, for as long as what is given lives: who reads or writes the file then hangs in the kernel, and so
    /// does whoever waits for the end of such a process. Declare it after those.
    #[must_use]
    pub fn stand_still(&self) -> Still<'_> {
        self.server.freeze();
        Still(self)
    }

    /// Unmounts it, which must work, and waits for nbdfuse to end in order.
    pub fn unmount(mut self) {
        self.mounted = false;
        succeed(Command::new("fusermount3").arg("-u").arg(&self.file));
        let status = self.server.wait();
        assert!(status.success(), "nbdfuse: {status}: {}", self.server.stderr());
    }
}

/// A file that does not answer; dropped, it goes on.
#[derive(Debug)]
pub struct Still<'a>(&'a Fuse);

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.0.server.signal(Signal::CONT);
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        if self.mounted {
            report(Command::new("fusermount3").arg("-uz").arg(&self.file));
        }
    }
}

/// A mounted file system; unmounted when dropped.
#[derive(Debug)]
pub struct Mount {
    dir: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Mounts `device` on the new directory `dir`, with further arguments, separated by white space.
    #[must_use]
    pub fn of(device: &Path, dir: &Path, arguments: &str) -> Self {
        std::fs::create_dir_all(dir).expect("the sandbox can be written");
        succeed(Command::new("mount").args(arguments.split_whitespace()).arg(device).arg(dir));
        Self { dir: dir.to_owned(), mounted: true }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unmounts it, which must work.
    pub fn unmount(mut self) {
        self.mounted = false;
        succeed(Command::new("umount").arg(&self.dir));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            report(Command::new("umount").arg("--lazy").arg(&self.dir));
        }
    }
}

/// Runs a command that cleans up after a failed test: what it cannot do is said, and not a failure of its own.
fn report(command: &mut Command) {
    let ended = run(command);
    if !ended.status.success() {
        eprintln!("{command:?}: {}", ended.stderr.trim_end());
    }
}

/// Bytes of a file that are in the page cache.
#[must_use]
pub fn resident(file: &Path) -> u64 {
    let told =
        succeed(Command::new("fincore").args(["--bytes", "--noheadings", "--output", "RES"]).arg(file));
    told.trim().parse().unwrap_or_else(|e| panic!("fincore says {told}: {e}"))
}
