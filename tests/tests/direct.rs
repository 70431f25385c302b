//! `raid10 serve --direct`: members past the page cache, for clients that align nothing.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::PathBuf;
use tests::process::{Sandbox, bytes_of, refuse, succeed};
use tests::volumes::{Loop, Served, create, pattern};

/// Whether a process has the file open past the page cache.
fn holds_directly(pid: u32, path: &std::path::Path) -> bool {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let open: Vec<PathBuf> = fds.filter(|fd| std::fs::read_link(fd).is_ok_and(|to| to == path)).collect();
    assert!(!open.is_empty(), "{} is not open", path.display());
    open.iter().all(|fd| {
        let number = fd.file_name().unwrap().to_str().unwrap();
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        u32::from_str_radix(flags, 8).unwrap() & 0o40000 != 0
    })
}

/// Writes, zeroes and reads at any byte, overlapping and not, several under way at once, against a model in memory.
const CLIENT: &str = r#"
import nbd, random, sys
random.seed(7)
h = nbd.NBD()
h.connect_uri(sys.argv[1])
size = 3 << 20
model = bytearray(h.pread(size, 0))
for step in range(400):
    unit = random.choice([1, 512, 4096])
    at = random.randrange(size) // unit * unit
    n = min(-(-random.randint(1, 30000) // unit) * unit, size - at)
    kind = random.randrange(4)
    if kind == 0:
        h.zero(n, at, random.choice([0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA]))
        model[at:at + n] = bytes(n)
    elif kind == 1:
        # Neighbours in one block, in flight together.
        at = min(at, size - 700)
        parts = [(at + i * 7, bytes([random.randrange(256)]) * 7) for i in range(100)]
        cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b)), a) for a, b in parts]
        while h.aio_in_flight() > 0:
            h.poll(-1)
        for c in cookies:
            assert h.aio_command_completed(c)
        for a, b in parts:
            model[a:a + len(b)] = b
    elif kind == 2:
        data = random.randbytes(n)
        h.pwrite(data, at, random.choice([0, nbd.CMD_FLAG_FUA]))
        model[at:at + n] = data
    else:
        assert h.pread(n, at) == model[at:at + n], (step, at, n)
h.flush()
assert h.pread(size, 0) == model
open(sys.argv[2], "wb").write(model)
h.shutdown()
"#;

#[test]
fn clients_that_align_nothing_are_served_past_the_page_cache() {
    let sandbox = Sandbox::new();
    let members = sandbox.images(3);
    create(&sandbox, &members, "--size 16M --chunk 64K --name vol");
    let volume = Served::start(&sandbox, &members, "--direct");
    assert!(members.iter().all(|member| holds_directly(volume.server.pid(), member)));
    let (source, model, back) = (sandbox.join("source"), sandbox.join("model"), sandbox.join("back"));
    pattern(&source, volume.size(), 1);
    volume.fill(&source);
    succeed(sandbox.command("/usr/bin/python3").args(["-c", CLIENT, &volume.uri()]).arg(&model));
    volume.dump(&back);
    let mut expected = bytes_of(&source);
    let changed = bytes_of(&model);
    expected[..changed.len()].copy_from_slice(&changed);
    assert!(bytes_of(&back) == expected, "what was read past the page cache");
    volume.stop();

    // The same through the page cache, and from either leg.
    let volume = Served::start(&sandbox, &members, "");
    assert!(!holds_directly(volume.server.pid(), &members[0]));
    volume.dump(&back);
    assert!(bytes_of(&back) == expected, "what was written past the page cache");
    volume.stop();
    for without in 0..members.len() {
        let rest: Vec<_> =
            members.iter().enumerate().filter(|(i, _)| *i != without).map(|(_, m)| m.clone()).collect();
        let volume = Served::start(&sandbox, &rest, "--read-only --direct");
        volume.dump(&back);
        assert!(bytes_of(&back) == expected, "without member {without}");
        volume.stop();
    }
}

/// Disks take whole blocks to be zeroed and given back, and the same client asks for bytes.
#[test]
fn clients_that_align_nothing_are_served_from_disks() {
    let sandbox = Sandbox::new();
    let attach = |image: &PathBuf| {
        File::create_new(image).and_then(|file| file.set_len(16 << 20)).unwrap();
        Loop::attach(image)
    };
    let disks: Vec<Loop> = sandbox.images(2).iter().map(attach).collect();
    let members: Vec<PathBuf> = disks.iter().map(|disk| disk.device().to_owned()).collect();
    create(&sandbox, &members, "--chunk 64K --name vol");
    for how in ["", "--direct"] {
        let volume = Served::start(&sandbox, &members, how);
        let (model, back) = (sandbox.join("model"), sandbox.join("back"));
        succeed(sandbox.command("/usr/bin/python3").args(["-c", CLIENT, &volume.uri()]).arg(&model));
        volume.dump(&back);
        let model = bytes_of(&model);
        assert!(bytes_of(&back)[..model.len()] == model[..], "serve {how}");
        volume.stop();
    }
    disks.into_iter().for_each(Loop::detach);
}

#[test]
fn a_file_without_direct_access_is_refused_with_what_to_do() {
    let sandbox = Sandbox::new();
    let refused = refuse(sandbox.raid10().args(["serve", "--read-only", "--direct", "/proc/version"]), 1);
    assert!(refused.contains("/proc/version") && refused.contains("leave --direct out"), "{refused}");
}
