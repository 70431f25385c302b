//! Large reads of what is in memory: they leave without a copy, and must be the same bytes all the same, in every
//! style of reply, at every boundary, and while a member is cut short or overwritten under them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests::process::{Sandbox, bytes_of, succeed};
use tests::volumes::{Served, create, pattern};

/// Reads ranges by libnbd, many at once, and compares them with a file. Ranges begin before, at and behind the
/// boundaries of pages, chunks and pipes.
const READER: &str = r"
import nbd, sys
uri, source, structured = sys.argv[1], sys.argv[2], sys.argv[3] == 'structured'
data = open(source, 'rb').read()
h = nbd.NBD()
h.set_request_structured_replies(structured)
h.set_strict_mode(0)
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() == structured
lengths = [16 << 10, (16 << 10) + 512, 64 << 10, (124 << 10), (128 << 10), 512 << 10, 1 << 20, (1 << 20) + 4096, 3 << 20]
starts = [0, 512, 4096, (64 << 10) - 512, (512 << 10) - 4096, (512 << 10), (1 << 20) + 1, 5 << 20]
pending = []
for start in starts:
    for length in lengths:
        buffer = nbd.Buffer(length)
        pending.append((start, length, buffer, h.aio_pread(buffer, start)))
for start, length, buffer, cookie in pending:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    assert bytes(buffer.to_bytearray()) == data[start:start + length], (start, length)
print(len(pending), 'reads')
";

/// Four members in memory, filled with what `source` holds.
fn filled(sandbox: &Sandbox) -> (Served, Vec<PathBuf>, PathBuf) {
    let (members, source) = (sandbox.images(4), sandbox.join("source"));
    create(sandbox, &members, "--size 16M --name vol --layout n2");
    let served = Served::start(sandbox, &members, "");
    pattern(&source, served.size(), 1);
    served.fill(&source);
    (served, members, source)
}

fn read_all(served: &Served, source: &Path) {
    for style in ["simple", "structured"] {
        let mut python = Command::new("/usr/bin/python3");
        let told = succeed(python.args(["-c", READER, &served.uri()]).arg(source).arg(style));
        assert_eq!(told.trim(), "72 reads");
    }
}

/// System calls of a kind that the server makes while `work` is done.
fn calls(served: &Served, kind: &str, sandbox: &Sandbox, work: impl FnOnce()) -> usize {
    let trace = sandbox.join("trace");
    let pid = served.server.pid().to_string();
    let mut strace = tests::process::Server::spawn(
        sandbox.command("strace").args(["-f", "-qq", "-e", kind, "-p", &pid, "-o"]).arg(&trace),
    );
    tests::process::eventually("strace to attach", std::time::Duration::from_secs(10), || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0")).then_some(())
    });
    work();
    strace.signal(rustix::process::Signal::INT);
    strace.wait();
    String::from_utf8_lossy(&bytes_of(&trace)).matches(&format!("{kind}(")).count()
}

#[test]
fn large_reads_of_what_lies_in_memory_are_not_copied_and_are_right() {
    let sandbox = Sandbox::in_memory();
    let (served, _, source) = filled(&sandbox);
    let spliced = calls(&served, "splice", &sandbox, || read_all(&served, &source));
    // Two for each reply at least, of those that a pipe holds.
    assert!(spliced > 100, "{spliced} calls of splice");
    served.stop();
}

#[test]
fn members_on_a_disk_are_not_copied_while_they_are_cached() {
    let sandbox = Sandbox::new();
    let (served, members, source) = filled(&sandbox);
    let spliced = calls(&served, "splice", &sandbox, || read_all(&served, &source));
    assert!(spliced > 100, "{spliced} calls of splice");
    // What is not cached is read, from the disk, and then it is.
    for member in &members {
        let file = File::open(member).expect("the member is there");
        file.sync_all().expect("it can be synced");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("its pages can be dropped");
    }
    read_all(&served, &source);
    served.stop();
}

#[test]
fn what_no_pipe_can_take_from_a_member_is_read_from_its_mirror() {
    let sandbox = Sandbox::in_memory();
    let (served, members, source) = filled(&sandbox);
    let file = File::options().write(true).open(&members[0]).expect("the member is there");
    file.set_len(3 << 20).expect("it can be cut");
    read_all(&served, &source);
    served.stop();
}

#[test]
fn writes_are_seen_by_the_reads_after_them() {
    let sandbox = Sandbox::in_memory();
    let (served, _, source) = filled(&sandbox);
    // Each round writes what the next reads: nothing of an earlier round may be left in any pipe.
    for seed in 2..5 {
        pattern(&source, served.size(), seed);
        served.fill(&source);
        read_all(&served, &source);
    }
    let random =
        ["--name=v", "--ioengine=nbd", "--rw=randrw", "--bsrange=4k-512k", "--iodepth=8", "--size=16M"];
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--loops=2", "--uri"];
    succeed(sandbox.command("fio").args(random).args(verify).arg(served.uri()));
    served.stop();
}

#[test]
fn a_client_that_leaves_in_the_middle_of_replies_takes_nothing_from_the_others() {
    let sandbox = Sandbox::in_memory();
    let (served, _, source) = filled(&sandbox);
    // More replies in flight than there are pipes, from clients that take none of them.
    let asks = r"
import nbd, os, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
buffers = [nbd.Buffer(1 << 20) for _ in range(100)]
for buffer in buffers:
    h.aio_pread(buffer, 4096)
os._exit(0)
";
    for _ in 0..3 {
        succeed(Command::new("/usr/bin/python3").args(["-c", asks, &served.uri()]));
    }
    read_all(&served, &source);
    served.stop();
}
