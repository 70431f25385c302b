//! The `raid10` command as scripts and people use it: the contract of its command line, and every wrong input that
//! concerns it. Each is refused in one line, and nothing is damaged.

use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::process::{
    Sandbox, Server, assert_refusal, binary, bytes_of, eventually, free_port, refuse, run, succeed,
};

/// Makes an array of `n` new images; gives their paths and the UUID it printed.
fn make(sandbox: &Sandbox, n: usize, name: &str) -> (Vec<PathBuf>, String) {
    let images: Vec<PathBuf> = (0..n).map(|i| sandbox.join(format!("{name}{i}.img"))).collect();
    let mut create = sandbox.raid10();
    create.arg("create").args(&images).args(["--size", "16M", "--chunk", "64K", "--name", name]);
    let uuid = succeed(&mut create).trim().to_owned();
    assert_eq!(uuid.len(), 36, "{uuid}");
    (images, uuid)
}

/// `raid10 serve` of these images on the sandbox's socket `nbd`.
fn serve(sandbox: &Sandbox, images: &[PathBuf]) -> Command {
    let mut serve = sandbox.raid10();
    serve.arg("serve").args(images).arg("--nbd").arg(format!("unix:{}", sandbox.join("nbd").display()));
    serve
}

fn uri(sandbox: &Sandbox) -> String {
    format!("nbd+unix:///?socket={}", sandbox.join("nbd").display())
}

fn status(sandbox: &Sandbox, volume: &str) -> Value {
    let text = succeed(sandbox.raid10().args(["status", volume, "--json"]));
    serde_json::from_str(&text).expect("one JSON document")
}

fn qemu_io(sandbox: &Sandbox, steps: &[&str]) -> Command {
    let mut command = sandbox.command("qemu-io");
    command.args(["-f", "raw", &uri(sandbox)]);
    for step in steps {
        command.args(["-c", step]);
    }
    command
}

fn read_all(sandbox: &Sandbox) -> Vec<u8> {
    let copy = sandbox.join("copy");
    succeed(sandbox.command("nbdcopy").arg(uri(sandbox)).arg(&copy));
    let bytes = bytes_of(&copy);
    std::fs::remove_file(copy).expect("just made");
    bytes
}

fn fill(sandbox: &Sandbox, seed: u8) {
    let source = sandbox.join("source");
    let size = succeed(sandbox.command("nbdinfo").arg("--size").arg(uri(sandbox)));
    let size: usize = size.trim().parse().expect("a number");
    let mut state = u32::from(seed) + 1;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(size)
    .collect();
    std::fs::write(&source, bytes).expect("the sandbox is writable");
    succeed(sandbox.command("nbdcopy").args(["--connections=4", "--flush"]).arg(&source).arg(uri(sandbox)));
}

#[test]
fn an_array_is_made_served_filled_stopped_and_served_again() {
    let sandbox = Sandbox::new();
    let (images, uuid) = make(&sandbox, 4, "vol");
    assert!(images.iter().all(|image| image.metadata().unwrap().len() == 16 << 20));
    assert!(images.iter().all(|image| image.metadata().unwrap().blocks() * 512 < 1 << 20), "not sparse");
    let server = Server::start(&mut serve(&sandbox, &images));
    fill(&sandbox, 1);
    let filled = read_all(&sandbox);
    assert!(filled == bytes_of(&sandbox.join("source")));
    assert!(server.resident() < 64 << 20, "{} bytes resident", server.resident());
    server.stop();
    assert!(!sandbox.join("nbd").exists());
    // Any order of members.
    let turned: Vec<_> = images.iter().rev().cloned().collect();
    let mut server = Server::start(&mut serve(&sandbox, &turned));
    assert!(read_all(&sandbox) == filled);
    succeed(sandbox.raid10().args(["stop", "vol"]));
    // It is over when `stop` returns; the process needs only a moment more.
    assert_eq!(server.wait().code(), Some(0));
    let examined = succeed(sandbox.raid10().arg("examine").args(&images).arg("--json"));
    let examined: Value = serde_json::from_str(&examined).unwrap();
    assert_eq!(examined.as_array().unwrap().len(), 4);
    for (slot, member) in examined.as_array().unwrap().iter().enumerate() {
        assert_eq!(member["uuid"], uuid.as_str());
        assert_eq!(member["slot"], slot);
        assert_eq!(member["clean"], true);
    }
}

#[test]
fn status_is_the_document_of_the_contract_served_and_offline() {
    let sandbox = Sandbox::new();
    let (images, uuid) = make(&sandbox, 4, "vol");
    let server = Server::start(&mut serve(&sandbox, &images));
    let live = status(&sandbox, "vol");
    let keys = |value: &Value| {
        let mut keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys.join(" ")
    };
    assert_eq!(keys(&live), "bitmap chunk layout members mismatches name size state sync uuid");
    assert_eq!(keys(&live["sync"]), "action done eta_s speed total");
    assert_eq!(keys(&live["bitmap"]), "chunk dirty");
    assert_eq!(keys(&live["members"][0]), "corrected path read_errors slot state");
    assert_eq!(
        (&live["name"], &live["uuid"], &live["layout"], &live["chunk"], &live["state"]),
        (&"vol".into(), &uuid.as_str().into(), &"near=2".into(), &(64 << 10).into(), &"clean".into())
    );
    for (slot, member) in live["members"].as_array().unwrap().iter().enumerate() {
        assert_eq!(member["slot"], slot);
        assert_eq!(member["state"], "in_sync");
        assert_eq!(member["path"], images[slot].to_str().unwrap());
    }
    // Name, UUID in both spellings, any member.
    let md_uuid: String = uuid.replace('-', "").as_bytes().chunks(8).fold(String::new(), |mut text, part| {
        text += if text.is_empty() { "" } else { ":" };
        text + std::str::from_utf8(part).unwrap()
    });
    for volume in [uuid.as_str(), &md_uuid, images[2].to_str().unwrap(), "vol3.img"] {
        assert_eq!(status(&sandbox, volume), live, "{volume}");
    }
    // A member that has been deleted is still one.
    std::fs::remove_file(&images[3]).unwrap();
    assert_eq!(status(&sandbox, images[3].to_str().unwrap()), live);
    succeed(&mut qemu_io(&sandbox, &["write -P 1 0 64k"]));
    assert_eq!(status(&sandbox, "vol")["state"], "active");
    let human = succeed(sandbox.raid10().args(["status", "vol"]));
    assert!(human.contains(&uuid) && human.lines().count() < 20 && !human.contains('{'), "{human}");
    server.stop();

    let offline = status(&sandbox, images[0].to_str().unwrap());
    assert_eq!(keys(&offline), keys(&live));
    assert_eq!(offline["state"], "clean");
    assert_eq!(offline["members"].as_array().unwrap().len(), 4);
    // Members that lie side by side are found; the one that was deleted is on record, and nowhere.
    for (slot, image) in images.iter().enumerate() {
        let known = if slot == 3 { "" } else { image.to_str().unwrap() };
        assert_eq!(offline["members"][slot]["path"], known);
    }
    let human = succeed(sandbox.raid10().arg("status").arg(&images[1]));
    assert!(human.contains("not served") && human.contains("name it to see it"), "{human}");
    for unserved in ["vol", &uuid, images[3].to_str().unwrap()] {
        let said = refuse(sandbox.raid10().args(["status", unserved]), 1);
        assert!(said.contains("not being served"), "{said}");
    }
    let said = refuse(sandbox.raid10().args(["stop", images[0].to_str().unwrap()]), 1);
    assert!(said.contains("not being served"), "{said}");
}

#[test]
fn signals_and_the_stop_command_all_end_it_in_order() {
    let sandbox = Sandbox::new();
    let (images, uuid) = make(&sandbox, 2, "vol");
    for way in ["term", "int", "name", "uuid", "path"] {
        let mut server = Server::start(&mut serve(&sandbox, &images));
        let mut connected = UnixStream::connect(sandbox.join("nbd")).unwrap();
        succeed(&mut qemu_io(&sandbox, &["write -P 1 0 64k"]));
        match way {
            "term" => server.signal(Signal::TERM),
            "int" => server.signal(Signal::INT),
            "name" => drop(succeed(sandbox.raid10().args(["stop", "vol"]))),
            "uuid" => drop(succeed(sandbox.raid10().args(["stop", &uuid]))),
            _ => drop(succeed(sandbox.raid10().arg("stop").arg(&images[1]))),
        }
        assert_eq!(server.wait().code(), Some(0), "{way}: {}", server.stderr());
        let mut rest = Vec::new();
        connected.read_to_end(&mut rest).unwrap();
        assert_eq!(status(&sandbox, images[0].to_str().unwrap())["state"], "clean");
        assert_eq!(std::fs::read_dir(sandbox.runtime_dir()).unwrap().count(), 0, "sockets left behind");
        // Nothing but the one word is for scripts.
        assert_eq!(server.line(Duration::from_secs(5)), None);
    }
}

#[test]
fn a_killed_server_leaves_nothing_in_the_way_of_the_next() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 4, "vol");
    let server = Server::start(&mut serve(&sandbox, &images));
    succeed(&mut qemu_io(&sandbox, &["write -P 5 0 1M", "flush"]));
    server.kill();
    assert!(sandbox.join("nbd").exists());
    let offline = status(&sandbox, images[0].to_str().unwrap());
    assert_eq!(offline["state"], "active");
    let said = refuse(sandbox.raid10().args(["status", "vol"]), 1);
    assert!(said.contains("not being served"), "{said}");
    let server = Server::start(&mut serve(&sandbox, &images));
    succeed(&mut qemu_io(&sandbox, &["read -P 5 0 1M"]));
    assert_eq!(status(&sandbox, "vol")["name"], "vol");
    server.stop();
}

#[test]
fn without_an_address_it_listens_beside_the_control_socket() {
    let sandbox = Sandbox::new();
    let (images, uuid) = make(&sandbox, 2, "vol");
    let runtime = sandbox.join("made/for/it");
    let mut serve = sandbox.raid10();
    let server = Server::start(serve.env("RAID10_RUNTIME_DIR", &runtime).arg("serve").args(&images));
    assert_eq!(runtime.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    for name in [format!("{uuid}.nbd"), format!("{uuid}.sock")] {
        assert_eq!(runtime.join(name).metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    let uri = format!("nbd+unix:///vol?socket={}", runtime.join(format!("{uuid}.nbd")).display());
    succeed(sandbox.command("nbdinfo").arg(uri));
    server.stop();
}

#[test]
fn several_addresses_at_once_tcp_and_unix() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 2, "vol");
    let (first, second) = (free_port(), free_port());
    let mut command = serve(&sandbox, &images);
    command.args(["--nbd", &format!("tcp:127.0.0.1:{first}"), "--nbd", &format!("tcp:localhost:{second}")]);
    let server = Server::start(&mut command);
    succeed(&mut qemu_io(&sandbox, &["write -P 3 0 64k"]));
    for port in [first, second] {
        let tcp = format!("nbd://127.0.0.1:{port}/vol");
        succeed(sandbox.command("qemu-io").args(["-f", "raw", &tcp, "-c", "read -P 3 0 64k"]));
    }
    server.stop();
}

#[test]
fn one_image_gone_is_survived_and_the_whole_of_a_mirror_is_not() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 4, "vol");
    let server = Server::start(&mut serve(&sandbox, &images));
    fill(&sandbox, 2);
    let filled = read_all(&sandbox);
    server.stop();
    std::fs::remove_file(&images[1]).unwrap();
    let server = Server::start(&mut serve(&sandbox, &images));
    let now = status(&sandbox, "vol");
    assert_eq!((&now["state"], &now["members"][1]["state"]), (&"degraded".into(), &"missing".into()));
    assert!(server.stderr().contains("slot=\"1\""), "{}", server.stderr());
    assert!(read_all(&sandbox) == filled);
    server.stop();
    std::fs::remove_file(&images[0]).unwrap();
    let ended = Server::start_refused(&mut serve(&sandbox, &images));
    assert_refusal("serve", &ended, 1);
    assert!(ended.stderr.contains("slots"), "{}", ended.stderr);
    for image in &images[2..] {
        std::fs::remove_file(image).unwrap();
    }
    let said = refuse(&mut serve(&sandbox, &images), 1);
    assert!(said.contains("none of the named members exists"), "{said}");
}

#[test]
fn read_only_serves_and_touches_nothing() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 2, "vol");
    let server = Server::start(&mut serve(&sandbox, &images));
    succeed(&mut qemu_io(&sandbox, &["write -P 9 0 1M", "flush"]));
    server.kill();
    let before: Vec<_> = images.iter().map(|image| bytes_of(image)).collect();
    let server = Server::start(serve(&sandbox, &images).arg("--read-only"));
    let said = run(&mut qemu_io(&sandbox, &["write -P 1 0 64k"]));
    assert!(said.stdout.contains("ermission") || said.stderr.contains("ermission"), "{said:?}");
    succeed(sandbox.command("qemu-io").args(["-r", "-f", "raw", &uri(&sandbox), "-c", "read -P 9 0 1M"]));
    let info: Value =
        serde_json::from_str(&succeed(sandbox.command("nbdinfo").args(["--json", &uri(&sandbox)]))).unwrap();
    assert_eq!(info["exports"][0]["is_read_only"], true);
    server.stop();
    assert!(images.iter().zip(before).all(|(image, before)| bytes_of(image) == before));
}

#[test]
fn creation_refuses_what_would_destroy_or_cannot_be() {
    let sandbox = Sandbox::new();
    let create = |args: &[&str]| {
        let mut command = sandbox.raid10();
        command.arg("create").args(args);
        command
    };
    let refused = |args: &[&str], part: &str| {
        let said = refuse(&mut create(args), 1);
        assert!(said.contains(part), "{args:?}: {said}");
    };
    let left = || {
        let mut names: Vec<_> = std::fs::read_dir(sandbox.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "run")
            .collect();
        names.sort();
        names.join(" ")
    };
    refused(&["a", "b"], "a does not exist");
    refused(&["a", "b", "--size", "4K"], "needs at least");
    refused(&["a", "--size", "16M"], "member");
    refused(&["a", "a", "--size", "16M"], "twice");
    refused(&["a", "./a", "--size", "16M"], "twice");
    refused(&["a", "b", "--size", "16M", "--chunk", "5K"], "chunk");
    refused(&["a", "b", "--size", "16M", "--chunk", "128M"], "chunk");
    refused(&["a", "b", "--size", "16M", "--layout", "n3"], "cop");
    refused(&["a", "b", "--size", "16M", "--bitmap-chunk", "3M"], "a power of two from 4K to 2G");
    refused(&["a", "b", "--size", "16M", "--bitmap-chunk", "2K"], "a power of two from 4K to 2G");
    refused(&["a", "b", "--size", "2T", "--bitmap-chunk", "64K"], "use at least 262144");
    refused(&["a", "b", "--size", "16M", "--name", &"x".repeat(33)], "1 to 32 bytes");
    refused(&["a", "b", "--size", "16M", "--name", "a\nb"], "1 to 32 bytes");
    refused(&["a", "none/b", "--size", "16M"], "No such file");
    refused(&["a", "run", "--size", "16M"], "run");
    refused(&["a", "/dev/null", "--size", "16M"], "/dev/null");
    assert_eq!(left(), "", "what was made is removed when creation fails");
    for wrong in [
        &["create"][..],
        &["create", "a", "--size", "1.5G"],
        &["create", "a", "--size", "0"],
        &["create", "a", "--layout", "5"],
        &["create", "a", "--bitmap", "external"],
        &["create", "a", "--bitmap", "none", "--bitmap-chunk", "1M"],
        &["create", "a", "--no-such-flag"],
        &["no-such-command"],
        &[],
        &["serve"],
        &["serve", "a", "--nbd", "pipe:x"],
        &["serve", "a", "--nbd", "tcp:nowhere"],
        &["status"],
        &["status", "a", "--json", "--watch"],
    ] {
        refuse(sandbox.raid10().args(wrong), 2);
    }
    assert_eq!(left(), "");

    // Data and arrays in the way.
    let data = vec![0xab; 16 << 20];
    std::fs::write(sandbox.join("data"), &data).unwrap();
    refused(&["data", "b", "--size", "16M"], "--force");
    assert!(bytes_of(&sandbox.join("data")) == data, "refused, and yet changed");
    assert_eq!(left(), "data");
    std::os::unix::fs::symlink("nowhere", sandbox.join("dangling")).unwrap();
    refused(&["dangling", "b", "--size", "16M"], "dangling");
    std::fs::remove_file(sandbox.join("dangling")).unwrap();
    succeed(&mut create(&["data", "b", "--size", "16M", "--force"]));
    let before = bytes_of(&sandbox.join("b"));
    refused(&["b", "c", "--size", "16M"], "--force");
    assert!(bytes_of(&sandbox.join("b")) == before);
    assert_eq!(left(), "b data");
    let first = succeed(sandbox.raid10().args(["examine", "b", "--json"]));
    let uuid = succeed(&mut create(&["b", "c", "--size", "16M", "--force"]));
    assert!(!first.contains(uuid.trim()));
    assert!(succeed(sandbox.raid10().args(["examine", "b"])).contains(uuid.trim()));
    // One that is being served is locked, even with --force.
    let (images, _) = make(&sandbox, 2, "vol");
    let server = Server::start(&mut serve(&sandbox, &images));
    refused(&[images[0].to_str().unwrap(), "d", "--size", "16M", "--force"], "in use");
    server.stop();
}

#[test]
fn serving_refuses_what_is_not_one_array() {
    let sandbox = Sandbox::new();
    let (ours, _) = make(&sandbox, 4, "ours");
    let (other, _) = make(&sandbox, 2, "other");
    let before: Vec<_> = ours.iter().chain(&other).map(|image| bytes_of(image)).collect();
    let refused = |members: &[&Path], part: &str| {
        let members: Vec<PathBuf> = members.iter().map(|&member| member.to_owned()).collect();
        let ended = Server::start_refused(&mut serve(&sandbox, &members));
        assert_refusal(&format!("{members:?}"), &ended, 1);
        assert!(ended.stderr.contains(part), "{members:?}: {}", ended.stderr);
        assert!(!sandbox.join("nbd").exists());
    };
    let junk = sandbox.join("junk");
    std::fs::write(&junk, vec![0x33; 1 << 20]).unwrap();
    let short = sandbox.join("short");
    std::fs::write(&short, b"short").unwrap();
    let empty = sandbox.join("empty");
    std::fs::write(&empty, b"").unwrap();
    let copy = sandbox.join("copy");
    std::fs::copy(&ours[0], &copy).unwrap();
    let run = sandbox.runtime_dir();
    refused(&[&junk], "junk");
    refused(&[&short], "short");
    refused(&[&empty], "empty");
    refused(&[&run], "run");
    refused(&[&ours[0], &junk], "junk");
    refused(&[&ours[0], &other[0]], "belongs to array");
    refused(&[&ours[0], &ours[0]], "twice");
    refused(&[&ours[0], &ours[1], &ours[2], &copy], "same member");
    refused(&[&ours[0], &ours[1]], "slots");
    let said = refuse(sandbox.raid10().arg("examine").arg(&junk), 1);
    assert!(said.contains("junk"), "{said}");
    refuse(sandbox.raid10().arg("examine").arg(sandbox.join("nothing")), 1);
    refuse(sandbox.raid10().arg("status").arg(&junk), 1);
    for (image, before) in ours.iter().chain(&other).zip(before) {
        assert!(bytes_of(image) == before, "refused, and yet {} changed", image.display());
    }
    // A second server on the same members.
    let server = Server::start(&mut serve(&sandbox, &ours));
    let mut second = sandbox.raid10();
    second.arg("serve").args(&ours).args(["--nbd", "unix:second"]);
    let said = refuse(&mut second, 1);
    assert!(said.contains("in use"), "{said}");
    assert!(!sandbox.join("second").exists());
    assert_eq!(status(&sandbox, "ours")["state"], "clean");
    server.stop();
}

#[test]
fn addresses_that_cannot_be_had_are_refused_before_the_array_is_touched() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 2, "vol");
    let before: Vec<_> = images.iter().map(|image| bytes_of(image)).collect();
    let refused = |address: &str, part: &str| {
        let mut command = sandbox.raid10();
        command.arg("serve").args(&images).args(["--nbd", address]);
        let ended = Server::start_refused(&mut command);
        assert_refusal(address, &ended, 1);
        assert!(ended.stderr.contains(part) && ended.stderr.contains(address), "{}", ended.stderr);
    };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    refused(&format!("tcp:127.0.0.1:{}", taken.local_addr().unwrap().port()), "in use");
    let listening = std::os::unix::net::UnixListener::bind(sandbox.join("taken")).unwrap();
    refused("unix:taken", "in use");
    std::fs::write(sandbox.join("file"), b"precious").unwrap();
    refused("unix:file", "in use");
    assert_eq!(bytes_of(&sandbox.join("file")), b"precious");
    refused("unix:no/such/dir/socket", "No such file");
    refused(&format!("unix:{}", "x".repeat(200)), "");
    refused("tcp:no.such.host.invalid:10809", "unknown");
    refused(&format!("tcp:0.0.0.0:{}", free_port()), "--insecure-tcp");
    refused(&format!("tcp:[::]:{}", free_port()), "--insecure-tcp");
    assert!(images.iter().zip(before).all(|(image, before)| bytes_of(image) == before));
    // In so many words it is allowed.
    let port = free_port();
    let mut command = sandbox.raid10();
    command.arg("serve").args(&images);
    command.args(["--nbd", &format!("tcp:0.0.0.0:{port}"), "--insecure-tcp"]);
    let server = Server::start(&mut command);
    succeed(sandbox.command("nbdinfo").arg(format!("nbd://127.0.0.1:{port}/vol")));
    server.stop();
    // A dead server's socket is no obstacle.
    drop(listening);
    let mut command = sandbox.raid10();
    Server::start(command.arg("serve").args(&images).args(["--nbd", "unix:taken"])).stop();
}

#[test]
fn a_runtime_directory_that_cannot_be_used_is_said_and_the_array_stays_clean() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 2, "vol");
    std::fs::write(sandbox.join("file"), b"").unwrap();
    let mut command = serve(&sandbox, &images);
    let ended = Server::start_refused(command.env("RAID10_RUNTIME_DIR", sandbox.join("file/run")));
    assert_refusal("serve", &ended, 1);
    assert!(ended.stderr.contains("RAID10_RUNTIME_DIR"), "{}", ended.stderr);
    assert_eq!(status(&sandbox, images[0].to_str().unwrap())["state"], "clean");
}

#[test]
fn members_that_may_not_be_opened_are_refused() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 2, "vol");
    std::fs::set_permissions(&images[1], std::fs::Permissions::from_mode(0o000)).unwrap();
    // Root may open everything: the command runs as nobody, from a place that nobody may reach.
    let program = sandbox.join("raid10");
    // By another process: a handle for writing in ours would be inherited by whatever other tests start meanwhile, and
    // a program that is open for writing does not run.
    succeed(sandbox.command("cp").arg(binary("raid10")).arg(&program));
    for path in [sandbox.path(), &program, &images[0]] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    }
    let is_root = rustix::process::geteuid().is_root();
    let unprivileged = || {
        let mut command = sandbox.command(if is_root { "setpriv".as_ref() } else { program.as_os_str() });
        if is_root {
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        }
        command
    };
    for command in ["serve", "examine"] {
        let said = refuse(unprivileged().arg(command).args(&images), 1);
        assert!(said.contains("vol1.img") && said.contains("ermission denied"), "{said}");
    }
    let said = refuse(unprivileged().args(["create", "x"]).arg(&images[1]).args(["--size", "16M"]), 1);
    assert!(said.contains("vol1.img") && said.contains("ermission denied"), "{said}");
    assert!(!sandbox.join("x").exists());
}

/// A small file system of a test's own; needs root, as the whole suite may say.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(sandbox: &Sandbox, size: &str) -> Self {
        let dir = sandbox.join("small");
        std::fs::create_dir(&dir).expect("the sandbox is writable");
        let mut mount = sandbox.command("mount");
        succeed(mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(&dir));
        Self(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn a_full_disk_is_said_by_create_and_leaves_nothing_behind() {
    let sandbox = Sandbox::new();
    let small = Tmpfs::mount(&sandbox, "64k");
    let images: Vec<_> = (0..4).map(|i| small.0.join(format!("{i}.img"))).collect();
    std::fs::write(small.0.join("ballast"), vec![1; 56 << 10]).unwrap();
    let said = refuse(sandbox.raid10().arg("create").args(&images).args(["--size", "16M"]), 1);
    assert!(said.contains("No space left"), "{said}");
    assert_eq!(std::fs::read_dir(&small.0).unwrap().count(), 1);
}

#[test]
fn a_disk_that_fills_up_costs_the_write_and_nothing_else() {
    let sandbox = Sandbox::new();
    let small = Tmpfs::mount(&sandbox, "12m");
    let images: Vec<_> = (0..4).map(|i| small.0.join(format!("{i}.img"))).collect();
    let mut create = sandbox.raid10();
    succeed(create.arg("create").args(&images).args(["--size", "16M", "--chunk", "64K", "--name", "vol"]));
    let server = Server::start(&mut serve(&sandbox, &images));
    succeed(&mut qemu_io(&sandbox, &["write -P 1 0 2M", "flush"]));
    let ended = run(&mut qemu_io(&sandbox, &["write -P 2 8M 8M"]));
    assert!(format!("{ended:?}").contains("No space left"), "{ended:?}");
    let now = status(&sandbox, "vol");
    assert!(now["members"].as_array().unwrap().iter().all(|member| member["state"] == "in_sync"), "{now}");
    succeed(&mut qemu_io(
        &sandbox,
        &["read -P 1 0 2M", "discard 8M 8M", "write -P 3 2M 1M", "read -P 3 2M 1M"],
    ));
    server.stop();
    let server = Server::start(&mut serve(&sandbox, &images));
    succeed(&mut qemu_io(&sandbox, &["read -P 1 0 2M", "read -P 3 2M 1M"]));
    server.stop();
}

#[test]
fn the_control_socket_bears_nonsense_and_crowds() {
    let sandbox = Sandbox::new();
    let (images, uuid) = make(&sandbox, 2, "vol");
    let mut server = Server::start(&mut serve(&sandbox, &images));
    let socket = sandbox.runtime_dir().join(format!("{uuid}.sock"));
    let ask = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.write_all(bytes).unwrap();
        // To an HTTP server, a closed sending end is a client that has gone: a whole request waits for its answer.
        if !bytes.ends_with(b"\r\n\r\n") {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut answer = Vec::new();
        // A reset is an answer too.
        drop(stream.read_to_end(&mut answer));
        String::from_utf8_lossy(&answer).into_owned()
    };
    assert!(ask(b"GET /status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").contains("near=2"));
    assert!(ask(b"GET /nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").contains("404"));
    assert!(ask(b"GET /stop HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").contains("405"));
    ask(&[0xff; 10_000]);
    ask(b"POST /stop HT");
    let idle: Vec<_> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert!(server.is_running());
    assert_eq!(status(&sandbox, "vol")["state"], "clean");
    // Those that say nothing do not hold up the stop.
    succeed(sandbox.raid10().args(["stop", "vol"]));
    assert_eq!(server.wait().code(), Some(0));
    drop(idle);
}

#[test]
fn two_volumes_of_one_name_are_told_apart() {
    let sandbox = Sandbox::new();
    let (first, uuid) = make(&sandbox, 2, "vol");
    let second = [sandbox.join("x0"), sandbox.join("x1")];
    succeed(sandbox.raid10().arg("create").args(&second).args(["--size", "16M", "--name", "vol"]));
    let mut command = sandbox.raid10();
    let one = Server::start(command.arg("serve").args(&first));
    let mut command = sandbox.raid10();
    let two = Server::start(command.arg("serve").args(&second));
    let said = refuse(sandbox.raid10().args(["status", "vol"]), 1);
    assert!(said.contains(&uuid), "{said}");
    assert_eq!(status(&sandbox, &uuid)["uuid"], uuid.as_str());
    assert_eq!(status(&sandbox, "x1")["members"][0]["path"], second[0].to_str().unwrap());
    one.stop();
    assert_ne!(status(&sandbox, "vol")["uuid"], uuid.as_str());
    two.stop();
}

#[test]
fn a_server_that_stands_still_keeps_no_other_from_being_found() {
    let sandbox = Sandbox::new();
    let serve = |name| {
        let (images, uuid) = make(&sandbox, 2, name);
        let mut command = sandbox.raid10();
        (Server::start(command.arg("serve").args(&images)), uuid)
    };
    let (still, _) = serve("still");
    let (other, uuid) = serve("other");
    still.freeze();
    // By its id it is asked alone, and by its name all are.
    assert_eq!(status(&sandbox, &uuid)["name"], "other");
    assert_eq!(status(&sandbox, "other")["uuid"], uuid.as_str());
    for name in ["still", "third"] {
        let said = refuse(sandbox.raid10().args(["status", name]), 1);
        assert!(said.contains("has not answered for 3 s"), "{said}");
    }
    still.signal(Signal::CONT);
    assert_eq!(status(&sandbox, "still")["name"], "still");
    let said = refuse(sandbox.raid10().args(["status", "third"]), 1);
    assert!(said.contains("is not being served"), "{said}");
    still.stop();
    other.stop();
}

#[test]
fn a_directory_of_a_volumes_name_is_not_in_its_way() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 2, "vol");
    std::fs::create_dir(sandbox.join("vol")).unwrap();
    let said = refuse(sandbox.raid10().args(["status", "vol"]), 1);
    assert!(said.contains("not being served"), "{said}");
    let server = Server::start(&mut serve(&sandbox, &images));
    assert_eq!(status(&sandbox, "vol")["name"], "vol");
    // Overwritten under the array, it still names it.
    let junk = std::fs::OpenOptions::new().write(true).open(&images[1]).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&junk, &[0x33; 8192], 0).unwrap();
    assert_eq!(status(&sandbox, images[1].to_str().unwrap())["name"], "vol");
    let said = refuse(sandbox.raid10().arg("examine").arg(sandbox.join("vol")), 1);
    assert!(said.contains("a member is a regular file or a block device"), "{said}");
    server.kill();
}

#[test]
fn status_watched_shows_it_again_and_again() {
    let sandbox = Sandbox::new();
    let (images, _) = make(&sandbox, 2, "vol");
    let server = Server::start(&mut serve(&sandbox, &images));
    let mut command = sandbox.raid10();
    let watch = Server::spawn(command.args(["status", "vol", "--watch"]));
    let mut seen = 0;
    eventually("a second look", Duration::from_secs(30), || {
        seen += usize::from(watch.line(Duration::from_secs(10)).is_some_and(|line| line.contains("State")));
        (seen >= 4).then_some(())
    });
    watch.kill();
    server.stop();
}
