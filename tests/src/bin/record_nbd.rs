//! Records sessions of real NBD clients as seeds for the fuzz targets, into `fuzz/seeds`:
//! `cargo run -p tests --bin record_nbd`. Needs what `tests/run` installs; the kernel's client runs in the virtual machine.

use raid::nbd::wire::{
    ALLOCATION_CONTEXT, ALLOCATION_ID, CMD_FLAG_PAYLOAD_LEN, ClientOption, StatusFilter, Style,
};
use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use tests::nbd::{Client, Serving};
use tests::process::{free_port, repository, succeed};
use tests::recorder::Recorder;
use tests::vm::boot;

const PYTHON: &str = r"
import nbd, sys
for structured in (True, False):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_full_info(True)
    h.connect_uri(sys.argv[1])
    h.pwrite(b'a' * 600, 1000, flags=nbd.CMD_FLAG_FUA)
    h.pread(2000, 500)
    h.zero(4096, 8192, flags=nbd.CMD_FLAG_NO_HOLE)
    h.zero(4096, 8192, flags=nbd.CMD_FLAG_FAST_ZERO)
    h.trim(4096, 16384)
    h.cache(4096, 0)
    h.flush()
    for call in (lambda: h.pread(512, 1 << 40), lambda: h.pwrite(b'x' * 512, 1 << 40), lambda: h.trim(0, 0),
                 lambda: h.block_status(1 << 20, 0, lambda *a: 0),
                 lambda: h.block_status(1 << 20, 0, lambda *a: 0, flags=nbd.CMD_FLAG_REQ_ONE)):
        try:
            call()
        except nbd.Error:
            pass
    h.shutdown()
";

fn main() {
    let serving = Serving::start();
    let sandbox = &serving.sandbox;
    let recorder = Recorder::of(&serving.socket());
    let socket = sandbox.join("recorder");
    recorder.listen(&socket);
    let uri = format!("nbd+unix:///vol?socket={}", socket.display());
    let source = sandbox.join("source");
    std::fs::write(&source, [7; 4096]).expect("the sandbox can be written");
    let run = |program: &str, arguments: &[&str]| {
        succeed(sandbox.command(program).args(arguments));
    };
    run("nbdinfo", &["--list", &uri]);
    run("nbdinfo", &["--map", &uri]);
    // What `nbdsh` is; by its name it may find a Python that knows nothing of it.
    run(
        "/usr/bin/python3",
        &["-m", "nbd", "-u", &uri, "-c", "h.pwrite(b'x' * 100, 7)", "-c", "h.pread(100, 7)"],
    );
    run("/usr/bin/python3", &["-c", PYTHON, &uri]);
    run("nbdcopy", &[source.to_str().expect("a plain path"), &uri]);
    let steps =
        ["write -P 7 0 512", "read 0 4k", "flush", "discard 0 4k", "write -z 4k 4k", "write -f 8k 512"];
    let mut io = sandbox.command("qemu-io");
    io.args(["-f", "raw", &uri]);
    for step in steps {
        io.args(["-c", step]);
    }
    succeed(&mut io);
    run("qemu-img", &["map", "-f", "raw", &uri]);
    // The kernel's client, whose handshake is nbd-client's.
    let port = free_port();
    recorder.listen_tcp(port);
    let script = format!(
        "/tools/nbd-client 10.0.2.2 {port} /dev/nbd0 -N vol -b 4096\n\
         dd if=/dev/zero of=/dev/nbd0 bs=4096 count=1 seek=3 conv=fsync\n\
         dd if=/dev/nbd0 of=/dev/null bs=4096 count=1\n\
         /tools/nbd-client -d /dev/nbd0\n"
    );
    println!("{}", boot(sandbox, &[], &script, Duration::from_secs(600)));

    extended(&socket);

    let target = repository().join("fuzz/seeds");
    let mut known = BTreeSet::new();
    let mut keep = |phase: &str, number: usize, seed: Vec<u8>| {
        let dir = target.join(phase);
        std::fs::create_dir_all(&dir).expect("the work tree can be written");
        if known.insert((phase.to_owned(), seed.clone())) {
            write(&dir.join(format!("session{number:02}")), &seed);
        }
    };
    for (number, session) in recorder.sessions().iter().enumerate() {
        let seeds = session.seeds(&serving.image());
        keep("handshake", number, seeds.handshake);
        if let Some((requests, replies)) = seeds.later {
            keep("transmission", number, requests);
            keep("replies", number, replies);
        }
    }
}

/// Debian's clients do not know extended headers yet: a client of our own, which asks for TLS first.
fn extended(socket: &Path) {
    let mut client = Client::over(UnixStream::connect(socket).expect("the recorder listens"));
    client.greet(3);
    client.option(&ClientOption::StartTls);
    client.option_reply();
    client.settle(Style::Extended);
    client.choose("vol", &["base:", ALLOCATION_CONTEXT]);
    client.go("vol");
    let mut filter = Vec::new();
    StatusFilter { length: 1 << 20, contexts: vec![ALLOCATION_ID] }.encode(&mut filter);
    let payload = CMD_FLAG_PAYLOAD_LEN;
    for (command, flags, offset, length, sent) in [
        (1, payload, 4096, 100, &[7; 100][..]),
        (0, 0, 4000, 300, &[]),
        (6, 0, 0, 1 << 40, &[]),
        (7, 0, 0, 1 << 20, &[]),
        (7, payload, 0, filter.len() as u64, &filter),
        (5, 0, 0, 4096, &[]),
        (0, payload, 0, 4, b"what"),
        (3, 0, 0, 0, &[]),
    ] {
        client.ask(command, flags, 9, offset, length);
        client.put(sent);
        client.chunks(9, offset);
    }
    client.ask(2, 0, 0, 0, 0);
    client.assert_closed();
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    println!("{} {}", path.display(), bytes.len());
}
