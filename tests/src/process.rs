//! Real processes under test: where our binaries are, a directory a test has for itself, servers that are waited
//! for, measured, stopped and killed.
//!
//! Invariants:
//!
//! - Tests run in parallel, in threads and in processes: each has its own [`Sandbox`] (images, sockets, runtime
//!   directory) and takes its ports from [`free_port`], which no two living test processes share.
//! - A [`Server`] never outlives the test: it is killed when dropped, also when an assertion fails.
//! - Nothing waits for ever, and what failed says so with the output of the process concerned.

use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long a server may take until it is ready, and a command until it ends, before a test calls it hung. Far more
/// than any needs: the machine may be busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// One of our binaries, `raid10` or `broker`, from the build the running test belongs to.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let me = std::env::current_exe().expect("Linux always knows the running program");
    // target/PROFILE/deps/TEST-HASH for tests, target/PROFILE/NAME for the programs of this crate.
    let found = me.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("no binary `{name}` beside {}: run `cargo build --workspace` before the tests", me.display())
    })
}

/// The root of the repository's work tree.
#[must_use]
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("this crate lies in the workspace's root").to_owned()
}

/// A directory of one test's own: its images, sockets and runtime directory. Removed when dropped.
#[derive(Debug)]
pub struct Sandbox {
    dir: tempfile::TempDir,
}

impl Sandbox {
    /// An empty one, on the file system of temporary files.
    #[must_use]
    pub fn new() -> Self {
        Self::within(&std::env::temp_dir())
    }

    /// An empty one, in memory.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::within(Path::new("/dev/shm"))
    }

    fn within(parent: &Path) -> Self {
        // Short, since the path of a Unix socket has 107 bytes at most.
        let dir = tempfile::Builder::new().prefix("dcl").tempdir_in(parent);
        let dir = dir.expect("a temporary directory can be made");
        std::fs::create_dir(dir.path().join("run")).expect("the directory is new and ours");
        Self { dir }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The path of something in it, whether it exists or not.
    #[must_use]
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Paths for `n` member images: `disk0.img`, `disk1.img`, …
    #[must_use]
    pub fn images(&self, n: usize) -> Vec<PathBuf> {
        (0..n).map(|i| self.join(format!("disk{i}.img"))).collect()
    }

    /// The directory in which served volumes of this test are found.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.join("run")
    }

    /// Any program, run in this directory with this test's runtime directory.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.path()).env("RAID10_RUNTIME_DIR", self.runtime_dir()).stdin(Stdio::null());
        command
    }

    /// Our `raid10`.
    #[must_use]
    pub fn raid10(&self) -> Command {
        self.command(binary("raid10"))
    }

    /// Our `broker`.
    #[must_use]
    pub fn broker(&self) -> Command {
        self.command(binary("broker"))
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

/// What a command that ended left behind.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// All it printed on stdout; what is not UTF-8 is replaced.
    pub stdout: String,
    /// All it printed on stderr; what is not UTF-8 is replaced.
    pub stderr: String,
}

impl Ended {
    /// The exit code; −1 if a signal ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }
}

/// Runs a command to its end, within [`PATIENCE`].
#[must_use]
pub fn run(command: &mut Command) -> Ended {
    run_within(command, PATIENCE)
}

/// Runs a command to its end; panics, having killed it, when it takes longer than `limit`.
#[must_use]
pub fn run_within(command: &mut Command, limit: Duration) -> Ended {
    // Files, not pipes: a child that leaves a grandchild with the pipe in its hands would keep us reading.
    let (out, err) = (scratch_file(), scratch_file());
    command.stdout(clone_of(&out)).stderr(clone_of(&err));
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    let Some(status) = wait_within(&mut child, limit) else {
        stop_child(&mut child);
        let (stdout, stderr) = (contents(&out), contents(&err));
        panic!("{command:?} still ran after {limit:?}\nstdout: {stdout}\nstderr: {stderr}");
    };
    Ended { status, stdout: contents(&out), stderr: contents(&err) }
}

/// Runs a command that must succeed; gives its stdout, or panics with all it said.
pub fn succeed(command: &mut Command) -> String {
    let ended = run(command);
    assert!(
        ended.status.success(),
        "{command:?}: {}\nstdout: {}\nstderr: {}",
        ended.status,
        ended.stdout,
        ended.stderr
    );
    ended.stdout
}

/// Runs one of our commands that must fail as the command line contract says: the given exit code, one line on stderr
/// (for 1), nothing that looks like a panic. Gives the line.
pub fn refuse(command: &mut Command, code: i32) -> String {
    let ended = run(command);
    assert_refusal(&format!("{command:?}"), &ended, code);
    ended.stderr.trim_end().to_owned()
}

/// Holds what [`refuse`] promises against a process that has ended.
pub fn assert_refusal(what: &str, ended: &Ended, code: i32) {
    let told = format!("{what}: {}\nstdout: {}\nstderr: {}", ended.status, ended.stdout, ended.stderr);
    assert_eq!(ended.code(), code, "another exit status: {told}");
    assert!(!ended.stderr.contains("panicked at"), "a panic: {told}");
    assert!(!ended.stderr.trim().is_empty(), "no message: {told}");
    assert!(code != 1 || ended.stderr.trim_end().lines().count() == 1, "not one line: {told}");
}

/// A long-running process: one of our servers, or a peer's.
#[derive(Debug)]
pub struct Server {
    child: Child,
    command: String,
    stdout: Receiver<String>,
    stderr: File,
    ready_after: Duration,
}

impl Server {
    /// Starts one of our servers and waits for its line `ready`; panics with its stderr if that does not come.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        Self::start_when(command, |line| line == "ready")
    }

    /// Starts a server that must not get ready but end by itself; gives what it left behind.
    #[must_use]
    pub fn start_refused(command: &mut Command) -> Ended {
        match Self::launch(command, PATIENCE, &|line| line == "ready") {
            Ok(server) => {
                panic!("{} got ready, but should have refused\nstderr: {}", server.command, server.stderr())
            }
            Err(ended) => ended,
        }
    }

    /// Starts any server and waits for a line on stdout that `is_ready` recognises.
    #[must_use]
    pub fn start_when(command: &mut Command, is_ready: impl Fn(&str) -> bool) -> Self {
        Self::launch(command, PATIENCE, &is_ready).unwrap_or_else(|ended| {
            panic!(
                "{command:?} ended before it was ready: {}\nstdout: {}\nstderr: {}",
                ended.status, ended.stdout, ended.stderr
            )
        })
    }

    /// Starts a process without waiting for anything.
    #[must_use]
    pub fn spawn(command: &mut Command) -> Self {
        let stderr = scratch_file();
        command.stdout(Stdio::piped()).stderr(clone_of(&stderr));
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
        let pipe = child.stdout.take().expect("stdout was asked for as a pipe");
        // Unbounded, so that a talkative server is never held up; its output is small.
        let (send, stdout) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Self { child, command: format!("{command:?}"), stdout, stderr, ready_after: Duration::ZERO }
    }

    fn launch(
        command: &mut Command,
        limit: Duration,
        is_ready: &dyn Fn(&str) -> bool,
    ) -> Result<Self, Ended> {
        let begun = Instant::now();
        let mut server = Self::spawn(command);
        let mut seen = String::new();
        loop {
            match server.stdout.recv_timeout(limit.saturating_sub(begun.elapsed())) {
                Ok(line) if is_ready(&line) => {
                    server.ready_after = begun.elapsed();
                    return Ok(server);
                }
                Ok(line) => {
                    seen.push_str(&line);
                    seen.push('\n');
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!(
                        "{} not ready after {limit:?}\nstdout: {seen}\nstderr: {}",
                        server.command,
                        server.stderr()
                    )
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = server.wait();
                    return Err(Ended { status, stdout: seen, stderr: server.stderr() });
                }
            }
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// From just before it was started until its line `ready` was read.
    #[must_use]
    pub fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// The next line of its stdout, if one comes within `limit`.
    #[must_use]
    pub fn line(&self, limit: Duration) -> Option<String> {
        self.stdout.recv_timeout(limit).ok()
    }

    /// All it has printed on stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        contents(&self.stderr)
    }

    /// Its resident memory in bytes, as the kernel counts it.
    #[must_use]
    pub fn resident(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let line =
            text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a live process has VmRSS");
        let kib = line.split_whitespace().next().and_then(|n| n.parse::<u64>().ok());
        kib.expect("VmRSS is a number of kB") * 1024
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to it.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid())
            .ok()
            .and_then(Pid::from_raw)
            .expect("process ids are small and positive");
        // The child has not been waited for through `&mut self` elsewhere, so the id is still its own.
        kill_process(pid, signal).unwrap_or_else(|e| panic!("cannot signal {}: {e}", self.command));
    }

    /// SIGSTOP, and waits until all its threads stand still: a signal stops them one after the other, as they get their turn.
    /// SIGCONT makes it go on.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.pid());
        eventually("all threads to stand still", PATIENCE, || {
            let mut threads = std::fs::read_dir(&tasks).unwrap_or_else(|e| panic!("{tasks}: {e}"));
            let still = threads.all(|thread| {
                let stat = thread.and_then(|thread| std::fs::read_to_string(thread.path().join("stat")));
                // The state follows the name, which is in parentheses.
                stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
            });
            still.then_some(())
        });
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(mut self) {
        stop_child(&mut self.child);
    }

    /// SIGTERM, and waits for its end within [`PATIENCE`].
    #[must_use]
    pub fn terminate(mut self) -> Ended {
        self.signal(Signal::TERM);
        let status = self.wait();
        Ended { status, stdout: self.stdout.try_iter().collect::<Vec<_>>().join("\n"), stderr: self.stderr() }
    }

    /// SIGTERM to one of our servers, which must end in order: status 0, nothing like a panic on stderr.
    pub fn stop(self) {
        let command = self.command.clone();
        let ended = self.terminate();
        assert!(
            ended.status.success() && !ended.stderr.contains("panicked at"),
            "{command} did not stop in order: {}\nstderr: {}",
            ended.status,
            ended.stderr
        );
    }

    /// Waits for its end within [`PATIENCE`].
    pub fn wait(&mut self) -> ExitStatus {
        wait_within(&mut self.child, PATIENCE).unwrap_or_else(|| {
            let stderr = self.stderr();
            panic!("{} did not end within {PATIENCE:?}\nstderr: {stderr}", self.command)
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        stop_child(&mut self.child);
        if std::thread::panicking() {
            eprintln!("--- stderr of {}\n{}---", self.command, self.stderr());
        }
    }
}

/// A TCP port of the loopback that nobody listens on, and that no other test process on this machine is given while
/// this one lives.
#[must_use]
pub fn free_port() -> u16 {
    // Below the range from which the kernel takes the ports of outgoing connections.
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let spread = (std::process::id() % u32::from(COUNT / 16)) as u16 * 16;
    let claims = std::env::temp_dir().join("decalog-test-ports");
    std::fs::create_dir_all(&claims).unwrap_or_else(|e| panic!("{}: {e}", claims.display()));
    for _ in 0..COUNT {
        let port = FIRST + (NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add(spread)) % COUNT;
        let path = claims.join(port.to_string());
        let claim = File::create(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let ours = rustix::fs::flock(&claim, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok();
        if ours && TcpListener::bind(("127.0.0.1", port)).is_ok() {
            // The lock lasts as long as this process: other tests keep away from the port even before it is used.
            std::mem::forget(claim);
            return port;
        }
    }
    panic!("no free port on the loopback");
}

/// Polls until `done` gives something; panics, naming what it waited for, after `limit`.
pub fn eventually<T>(what: &str, limit: Duration, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begun.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether this is a quick run (`tests/run --quick`): no VM, no peers that must be installed, no long loops.
#[must_use]
pub fn quick() -> bool {
    std::env::var_os("DECALOG_QUICK").is_some_and(|value| !value.is_empty() && value != "0")
}

/// In a quick run, says that `what` is left out, and gives true: nothing is skipped silently.
#[must_use]
pub fn left_out(what: &str) -> bool {
    if quick() {
        // Not `eprintln!`, which the test harness swallows when the test passes.
        let line = format!("\nleft out by --quick: {what}\n");
        std::io::stderr().write_all(line.as_bytes()).expect("stderr can be written");
    }
    quick()
}

fn wait_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let begun = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        if let Some(status) = child.try_wait().expect("the child is ours to wait for") {
            return Some(status);
        }
        if begun.elapsed() >= limit {
            return None;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn stop_child(child: &mut Child) {
    // Both fail only for a child that was waited for already, which is what we want to reach.
    if child.kill().is_ok() {
        drop(child.wait());
    }
}

fn scratch_file() -> File {
    // Appended to through the child's handle, read through ours by position.
    tempfile::tempfile().expect("a temporary file can be made")
}

fn clone_of(file: &File) -> Stdio {
    file.try_clone().expect("there are file descriptors left").into()
}

fn contents(file: &File) -> String {
    let mut bytes = Vec::new();
    let mut at = 0;
    let mut piece = vec![0; 64 * 1024];
    loop {
        match file.read_at(&mut piece, at).expect("a temporary file can be read") {
            0 => return String::from_utf8_lossy(&bytes).into_owned(),
            n => {
                bytes.extend_from_slice(&piece[..n]);
                at += n as u64;
            }
        }
    }
}

/// All bytes of a file; panics with its path if it cannot be read.
#[must_use]
pub fn bytes_of(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.read_to_end(&mut bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_waited_for_and_killed_on_drop() {
        let sandbox = Sandbox::new();
        let server = Server::start(sandbox.command("sh").args(["-c", "echo ready; exec sleep 600"]));
        let proc = format!("/proc/{}", server.pid());
        assert!(Path::new(&proc).exists() && server.resident() > 0);
        drop(server);
        assert!(!Path::new(&proc).exists());
    }

    #[test]
    fn a_server_that_ends_instead_gives_its_output() {
        let sandbox = Sandbox::new();
        let ended =
            Server::start_refused(sandbox.command("sh").args(["-c", "echo x; echo port taken >&2; exit 1"]));
        assert_refusal("sh", &ended, 1);
        assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("x\n", "port taken\n"));
    }

    #[test]
    fn a_signal_ends_it_with_its_own_status() {
        let sandbox = Sandbox::new();
        let script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done";
        let server = Server::start(sandbox.command("sh").args(["-c", script]));
        assert_eq!(server.terminate().code(), 7);
    }

    #[test]
    fn ports_are_given_once() {
        let ports: Vec<u16> = (0..100).map(|_| free_port()).collect();
        let mut distinct = ports.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), ports.len());
    }

    #[test]
    #[should_panic(expected = "not one line")]
    fn a_refusal_is_one_line() {
        let sandbox = Sandbox::new();
        refuse(sandbox.command("sh").args(["-c", "echo a >&2; echo b >&2; exit 1"]), 1);
    }
}
