//! The NBD server on a mirrored volume, against servers of a plain file: nbdkit and nbd-server; and against the least
//! that a server can do (`bare`, twice for reads), which shows how much of a goal this machine and this client leave to
//! anybody.
//!
//! All of them serve memory-backed files over Unix sockets to the same client, fio's nbd engine, so that what is compared
//! is the servers. The volume is near-2 on four members: it writes everything twice, its peers once.

use crate::measure::{Bench, against_peers, fio, timed};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::process::{Sandbox, Server, eventually, succeed};
use tests::volumes::{Served, create};

/// MiB that are read and written.
const MIB: u64 = 1000;

/// A load, by fio's names.
struct Case {
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    /// What our figure is to be, as a multiple of the peer's, and our CPU time per operation.
    goal: &'static str,
}

const CASES: [Case; 6] = [
    Case {
        name: "4k-randread",
        rw: "randread",
        block: "4k",
        depth: 32,
        goal: "(at least 1.4, CPU at most 0.55)",
    },
    Case {
        name: "4k-randwrite",
        rw: "randwrite",
        block: "4k",
        depth: 32,
        goal: "(at least 1.3, CPU at most 0.7)",
    },
    Case {
        name: "64k-randread",
        rw: "randread",
        block: "64k",
        depth: 16,
        goal: "(at least 1.8, CPU at most 0.4)",
    },
    Case { name: "1m-read", rw: "read", block: "1m", depth: 8, goal: "(at least 1.5, CPU at most 0.4)" },
    Case { name: "1m-write", rw: "write", block: "1m", depth: 8, goal: "(at least 0.7)" },
    Case { name: "4k-read-qd1", rw: "randread", block: "4k", depth: 1, goal: "(at least 1.0)" },
];

/// What there is to measure, by name: each case over one connection, and over four.
pub fn benches() -> Vec<Bench> {
    let bench = |case: &'static Case, connections: u32, name: String| {
        let run: Box<dyn Fn()> = Box::new(move || measure(case, connections));
        (name, run)
    };
    let one = CASES.iter().map(|case| bench(case, 1, case.name.to_owned()));
    let four = CASES.iter().map(|case| bench(case, 4, format!("{}-x4", case.name)));
    one.chain(four).collect()
}

fn measure(case: &Case, connections: u32) {
    let sandbox = Sandbox::in_memory();
    let members = sandbox.images(4);
    create(&sandbox, &members, "--size 512M --name vol --layout n2");
    let served = Served::start(&sandbox, &members, "");
    let kit = Peer::nbdkit(&sandbox);
    let plain = Peer::nbd_server(&sandbox, "plain", false);
    let spliced = Peer::nbd_server(&sandbox, "splice", true);
    let mut peers = vec![("nbdkit file", kit), ("nbd-server", plain), ("nbd-server splice", spliced)];
    if case.rw.ends_with("read") {
        peers.push(("(no RAID, reads no file)", Peer::bare(&sandbox, "nothing")));
    }
    peers.push(("(no RAID)", Peer::bare(&sandbox, "file")));
    let mut names = vec!["raid10 n2 on 4 members"];
    let mut servers = vec![(served.server.pid(), served.uri())];
    for (name, peer) in &peers {
        names.push(name);
        servers.push((peer.process.pid(), peer.uri.clone()));
    }
    for (pid, uri) in &servers {
        // Holes would be read without touching anything.
        fio(*pid, uri, "write", &format!("--bs=1m --iodepth=4 --size={MIB}M"));
    }
    let Case { name, rw, block, depth, goal } = case;
    let how = format!("--bs={block} --iodepth={depth} --numjobs={connections} --size={MIB}M {}", timed());
    let unit = if rw.starts_with("rand") { "IOPS" } else { "MiB/s" };
    let title = format!("{name}, {connections} connections of depth {depth}");
    // Once without counting: pages that are touched for the second time cost their file system more than later on.
    for (pid, uri) in &servers {
        fio(*pid, uri, rw, &how);
    }
    against_peers(&title, unit, &names, goal, |variant, _| {
        let (pid, uri) = &servers[variant];
        fio(*pid, uri, rw, &how)
    });
    served.stop();
}

/// A server of a plain file; killed when dropped.
struct Peer {
    process: Process,
    uri: String,
}

/// How a peer runs.
enum Process {
    Foreground(Server),
    /// nbd-server: the releases that Debian has cannot serve more than one client without going to the background.
    Daemon(Pid),
}

impl Process {
    fn pid(&self) -> u32 {
        match self {
            Self::Foreground(server) => server.pid(),
            Self::Daemon(pid) => pid.as_raw_pid().unsigned_abs(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Self::Daemon(pid) = self
            && let Err(e) = kill_process(*pid, Signal::KILL)
        {
            eprintln!("cannot kill the daemon {}: {e}", pid.as_raw_pid());
        }
    }
}

impl Peer {
    fn nbdkit(sandbox: &Sandbox) -> Self {
        let (file, socket) = (backing(sandbox, "nbdkit"), sandbox.join("nbdkit.sock"));
        let command = &mut sandbox.command("nbdkit");
        let server = Server::spawn(command.arg("-f").arg("-U").arg(&socket).arg("file").arg(file));
        Self::when_ready(Process::Foreground(server), &socket, "")
    }

    fn nbd_server(sandbox: &Sandbox, name: &str, splice: bool) -> Self {
        let (file, socket) = (backing(sandbox, name), sandbox.join(format!("{name}.sock")));
        let config = sandbox.join(format!("{name}.conf"));
        let text = format!(
            "[generic]\nunixsock = {}\n[file]\nexportname = {}\nflush = true\nfua = true\nsplice = {splice}\n",
            socket.display(),
            file.display(),
        );
        std::fs::write(&config, text).expect("the sandbox can be written");
        let pid_file = sandbox.join(format!("{name}.pid"));
        succeed(sandbox.command("nbd-server").arg("-C").arg(config).arg("-p").arg(&pid_file));
        let pid = eventually("the pid of nbd-server", Duration::from_secs(10), || {
            let pid = std::fs::read_to_string(&pid_file).ok()?.trim().parse().ok()?;
            Pid::from_raw(pid)
        });
        Self::when_ready(Process::Daemon(pid), &socket, "file")
    }

    fn bare(sandbox: &Sandbox, reads: &str) -> Self {
        let files = [0, 1].map(|leg| backing(sandbox, &format!("bare-{reads}-{leg}")));
        let socket = sandbox.join(format!("bare-{reads}.sock"));
        let me = std::env::current_exe().expect("Linux knows the running program");
        let server = Server::spawn(sandbox.command(me).arg("bare-child").arg(reads).arg(&socket).args(files));
        Self::when_ready(Process::Foreground(server), &socket, "")
    }

    fn when_ready(process: Process, socket: &Path, export: &str) -> Self {
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        eventually("a peer to serve", Duration::from_secs(10), || {
            tests::process::run(Command::new("nbdinfo").args(["--size", &uri])).status.success().then_some(())
        });
        Self { process, uri }
    }
}

/// A file of as much as is read and written, and a little more.
fn backing(sandbox: &Sandbox, name: &str) -> PathBuf {
    let path = sandbox.join(name);
    succeed(Command::new("truncate").arg("--size").arg(format!("{}M", MIB + 24)).arg(&path));
    path
}
