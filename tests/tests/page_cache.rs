//! The page cache is the cache: what a volume on a disk has taken is in memory once, though it is on two legs.

use std::path::PathBuf;
use std::process::Command;
use tests::process::{Sandbox, bytes_of};
use tests::volumes::{Served, create, pattern, resident};

const MIB: u64 = 1 << 20;

fn volume(sandbox: &Sandbox, arguments: &str) -> (Served, Vec<PathBuf>) {
    let members = sandbox.images(4);
    create(sandbox, &members, "--size 64M --name vol");
    (Served::start(sandbox, &members, arguments), members)
}

/// Bytes of all members that are in memory.
fn cached(members: &[PathBuf]) -> u64 {
    members.iter().map(|member| resident(member)).sum()
}

#[test]
fn what_was_flushed_is_in_memory_once_and_read_from_there() {
    let sandbox = Sandbox::new();
    let (served, members) = volume(&sandbox, "");
    let (source, copy) = (sandbox.join("source"), sandbox.join("copy"));
    let size = served.size();
    assert!(size > 100 * MIB, "{size}");
    pattern(&source, size, 1);
    served.fill(&source);
    // Each member may keep some that is not worth a call yet, and metadata.
    let most = size + 4 * 5 * MIB;
    let held = cached(&members);
    assert!((size..most).contains(&held), "{held} bytes of {size} are in memory");
    // Reads go where it is: they bring nothing in.
    served.dump(&copy);
    assert!(bytes_of(&source) == bytes_of(&copy), "other bytes came back");
    let held = cached(&members);
    assert!(held < most, "{held} bytes of {size} are in memory after all was read");
    served.stop();
}

#[test]
fn appends_are_forgotten_by_whole_pages_and_come_back_right() {
    /// Appends as a log makes them: aligned to nothing, flushed after each few.
    const APPENDER: &str = r"
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
data = open(sys.argv[2], 'rb').read()
at = 0
while at < len(data):
    for _ in range(16):
        h.pwrite(data[at:at + 61_007], at)
        at = min(at + 61_007, len(data))
        if at == len(data):
            break
    h.flush()
";
    let sandbox = Sandbox::new();
    let (served, members) = volume(&sandbox, "");
    let (source, copy) = (sandbox.join("source"), sandbox.join("copy"));
    let size = served.size();
    pattern(&source, size, 2);
    tests::process::succeed(
        Command::new("/usr/bin/python3").args(["-c", APPENDER, &served.uri()]).arg(&source),
    );
    let held = cached(&members);
    assert!(held < size + 4 * 5 * MIB, "{held} bytes of {size} are in memory");
    served.dump(&copy);
    assert!(bytes_of(&source) == bytes_of(&copy), "other bytes came back");
    served.stop();
}
