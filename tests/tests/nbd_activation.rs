//! Sockets that a service manager has opened: libnbd starts our server as systemd would, and so does a script that passes
//! more than one, or what is none.

use std::process::Command;
use tests::process::{Sandbox, Server, assert_refusal, binary, free_port, run, succeed};
use tests::volumes::create;

/// Opens what it is told to (`unix:PATH`, `tcp:ADDRESS:PORT`, `file`), and becomes `raid10` with these as descriptors from
/// 3 on. The process number stays, so that it can be told in advance.
const PASS: &str = r#"
import os, socket, sys
kinds, pid, command = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
passed = []
for kind in kinds:
    if kind.startswith("unix:"):
        s = socket.socket(socket.AF_UNIX)
        s.bind(kind[5:])
        s.listen(8)
    elif kind.startswith("tcp:"):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((kind.split(":")[1], int(kind.split(":")[2])))
        s.listen(8)
    elif kind == "deaf":
        s = socket.socket(socket.AF_UNIX)
        s.bind("deaf")
    else:
        s = open("/dev/null")
    passed.append(s)
# Out of the way first: they may stand where others are to go.
held = [os.dup2(s.fileno(), 50 + i) for i, s in enumerate(passed)]
for i, fd in enumerate(held):
    os.dup2(fd, 3 + i, inheritable=True)
os.environ["LISTEN_FDS"] = str(len(held))
os.environ["LISTEN_PID"] = str(os.getpid()) if pid == "own" else pid
os.execv(command[0], command)
"#;

fn pass(sandbox: &Sandbox, kinds: &str, pid: &str, images: &[std::path::PathBuf]) -> Command {
    let mut command = sandbox.command("python3");
    command.args(["-c", PASS, kinds, pid]).arg(binary("raid10")).arg("serve").args(images);
    command
}

#[test]
fn libnbd_starts_us_as_systemd_would() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(2);
    create(&sandbox, &images, "--size 16M --name vol");
    let started = |program: &str, before: &[&str], after: &[&str]| {
        let mut command = sandbox.command(program);
        command.args(before).arg("--").arg("[").arg(binary("raid10")).arg("serve").args(&images).arg("]");
        succeed(command.args(after))
    };
    // Both write to the same place: ours has nothing to say there.
    let size: u64 = started("nbdinfo", &["--size"], &[]).trim_end().parse().unwrap();
    let (source, back) = (sandbox.join("source"), sandbox.join("back"));
    tests::volumes::pattern(&source, size, 3);
    // A copy into a server that ends with it, and out of another one.
    let mut copy = sandbox.command("nbdcopy");
    copy.arg("--flush")
        .arg("--")
        .arg(&source)
        .arg("[")
        .arg(binary("raid10"))
        .arg("serve")
        .args(&images)
        .arg("]");
    succeed(&mut copy);
    started("nbdcopy", &[], &[back.to_str().unwrap()]);
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&back).unwrap());
    // To the place where a server that was started otherwise says "ready".
    let mut copy = sandbox.command("sh");
    copy.args(["-c", "nbdcopy -- [ \"$@\" ] - >there", "sh"])
        .arg(binary("raid10"))
        .arg("serve")
        .args(&images);
    succeed(&mut copy);
    assert!(std::fs::read(&source).unwrap() == std::fs::read(sandbox.join("there")).unwrap());
}

#[test]
fn who_is_passed_all_its_sockets_says_so_unless_whoever_passed_them_writes_there_too() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(2);
    create(&sandbox, &images, "--size 16M --name vol");
    // Returns when it has read "ready": this process has another stdout than the server.
    let server = Server::start(&mut pass(&sandbox, "unix:passed", "own", &images));
    succeed(sandbox.command("nbdinfo").arg("nbd+unix:///vol?socket=passed"));
    server.stop();
}

#[test]
fn all_that_is_passed_is_served_beside_what_is_asked_for() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(2);
    create(&sandbox, &images, "--size 16M --name vol");
    let port = free_port();
    let mut command = pass(&sandbox, &format!("unix:passed,tcp:127.0.0.1:{port}"), "own", &images);
    let server = Server::start(command.args(["--nbd", "unix:own"]));
    for uri in [
        "nbd+unix:///vol?socket=passed".to_owned(),
        "nbd+unix:///vol?socket=own".to_owned(),
        format!("nbd://127.0.0.1:{port}/vol"),
    ] {
        succeed(sandbox.command("nbdinfo").arg(&uri));
    }
    server.stop();
    // A passed socket's file is its maker's.
    assert!(sandbox.join("passed").exists() && !sandbox.join("own").exists());
    // What is meant for another process is not taken: the default address is.
    let server = Server::start(&mut pass(&sandbox, "unix:other", "1", &images));
    assert!(
        !run(sandbox.command("timeout").args(["2", "nbdinfo", "nbd+unix:///vol?socket=other"]))
            .status
            .success()
    );
    let default = std::fs::read_dir(sandbox.runtime_dir()).unwrap();
    let paths: Vec<_> = default.map(|entry| entry.unwrap().path()).collect();
    assert!(paths.iter().any(|path| path.extension().is_some_and(|ext| ext == "nbd")), "{paths:?}");
    server.stop();
}

#[test]
fn what_cannot_be_served_is_refused_before_the_array_is_touched() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(2);
    create(&sandbox, &images, "--size 16M --name vol");
    let before = std::fs::read(&images[0]).unwrap();
    let everywhere = format!("tcp:0.0.0.0:{}", free_port());
    for (kinds, part) in [("file", "LISTEN_FDS"), ("deaf", "LISTEN_FDS"), (&*everywhere, "--insecure-tcp")] {
        let ended = Server::start_refused(&mut pass(&sandbox, kinds, "own", &images));
        assert_refusal(kinds, &ended, 1);
        assert!(ended.stderr.contains(part), "{}", ended.stderr);
    }
    assert!(std::fs::read(&images[0]).unwrap() == before);
}
