//! What a broker is given wrongly: each gets one clear line (what, where, what to do) or the protocol's own error; never
//! a panic, never a damaged volume, and the next right input works.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::clients::{Broker, Logs, acked_of, client, client_ended, lines_of, records_of, serve, text};
use tests::process::{Sandbox, Server, assert_refusal, bytes_of, free_port, left_out, run, succeed};
use tests::volumes::{Mount, Served, create, pattern};

/// Runs a broker that must refuse to start; gives the one line it says.
fn refused(what: &str, command: &mut Command) -> String {
    let ended = Server::start_refused(command);
    assert_refusal(what, &ended, 1);
    ended.stderr.trim_end().to_owned()
}

/// The message names all of these.
fn names(message: &str, all: &[&str]) {
    for part in all {
        assert!(message.contains(part), "the message does not name {part}: {message}");
    }
}

fn on(members: &[PathBuf]) -> Logs {
    Logs::Volume(members.to_vec(), "256M")
}

#[test]
fn a_port_that_is_taken() {
    let sandbox = Sandbox::new();
    let port = free_port();
    let taken = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
    let line = refused("a taken port", &mut serve(&sandbox, &on(&sandbox.images(4)), &[], port));
    names(&line, &[&format!("127.0.0.1:{port}"), "--listen"]);
    assert!(!sandbox.images(4)[0].exists(), "it made a volume before it looked at the port");
    drop(taken);
    let server = Server::start(&mut serve(&sandbox, &on(&sandbox.images(4)), &[], port));
    server.stop();
}

#[test]
fn a_data_directory_that_is_a_file() {
    let sandbox = Sandbox::new();
    let file = sandbox.join("file");
    std::fs::write(&file, "precious").expect("the sandbox can be written");
    let mut command = sandbox.broker();
    command.args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--data-dir"]).arg(&file);
    names(&refused("a file", &mut command), &["is a file", "name a directory"]);
    assert_eq!(std::fs::read(&file).expect("it is there"), b"precious");
}

#[test]
fn settings_that_are_wrong() {
    let sandbox = Sandbox::new();
    let logs = on(&sandbox.images(4));
    let start = |setting: &str| refused(setting, &mut serve(&sandbox, &logs, &[setting], free_port()));
    names(&start("log.retention.houres=3"), &["log.retention.houres"]);
    names(&start("num.partitions=many"), &["num.partitions", "many"]);
    names(&start("num.partitions=-3"), &["num.partitions", "-3"]);
    names(&start("log.segment.bytes=1"), &["log.segment.bytes"]);
    names(&start("no-equals-sign"), &["no-equals-sign"]);
    let file = sandbox.join("server.properties");
    std::fs::write(&file, "num.partitions=2\nnonsense.key=1\n").expect("the sandbox can be written");
    let mut command = serve(&sandbox, &logs, &[], free_port());
    names(&refused("a file", command.arg("--config").arg(&file)), &["server.properties", "nonsense.key"]);
    let mut command = serve(&sandbox, &logs, &[], free_port());
    names(&refused("no file", command.arg("--config").arg(sandbox.join("absent"))), &["absent"]);
    assert!(!sandbox.images(4)[0].exists(), "it made a volume before it looked at its settings");
}

#[test]
fn usage_that_is_wrong_exits_with_2() {
    let sandbox = Sandbox::new();
    for arguments in
        ["serve --no-such-flag", "sevre", "serve --volume a --data-dir b", "serve --create-size tiny"]
    {
        let ended = run(sandbox.broker().args(arguments.split(' ')));
        assert_refusal(arguments, &ended, 2);
    }
}

#[test]
fn volumes_that_are_none() {
    let sandbox = Sandbox::new();
    let start = |members: &[PathBuf]| {
        let mut command = sandbox.broker();
        command.arg("serve").arg("--volume").args(members);
        command.args(["--listen", &format!("127.0.0.1:{}", free_port())]);
        command.args(["--admin", &format!("127.0.0.1:{}", free_port())]);
        command
    };
    // Not there.
    let absent = sandbox.images(4);
    names(&refused("absent", &mut start(&absent)), &["disk0.img"]);
    // No array, but somebody's data: not touched, also not when sizes to create are given.
    let data: Vec<PathBuf> = (0..2).map(|at| sandbox.join(format!("data{at}"))).collect();
    for path in &data {
        pattern(path, 32 << 20, 7);
    }
    let before = bytes_of(&data[0]);
    names(&refused("no array", &mut start(&data)), &["data0"]);
    names(&refused("no array, create", start(&data).args(["--create-size", "32M"])), &["data0"]);
    assert!(bytes_of(&data[0]) == before, "somebody's data was overwritten");
    // Two arrays mixed.
    let make = |name: &str| {
        let members: Vec<PathBuf> = (0..4).map(|at| sandbox.join(format!("{name}{at}"))).collect();
        create(&sandbox, &members, &format!("--size 128M --name {name}"));
        members
    };
    let (one, two) = (make("one"), make("two"));
    let mixed = [&one[..2], &two[2..]].concat();
    names(&refused("mixed", &mut start(&mixed)), &[&sandbox.path().display().to_string()]);
    // One member twice; by another name too.
    let twice = [&one[..3], &one[..1]].concat();
    names(&refused("twice", &mut start(&twice)), &["one0"]);
    std::fs::hard_link(&one[0], sandbox.join("alias")).expect("the sandbox can be written");
    let alias = [&one[..3], &[sandbox.join("alias")]].concat();
    names(&refused("twice, linked", &mut start(&alias)), &["alias"]);
    // Both legs of one mirror missing.
    names(&refused("half", &mut start(&one[..2])), &["array one", "slots [2, 3]"]);
    // A directory, and a device that is none.
    names(&refused("a directory", &mut start(&[sandbox.path().to_owned(), one[1].clone()])), &["dcl"]);
    names(&refused("a character device", &mut start(&["/dev/null".into(), one[1].clone()])), &["/dev/null"]);
    // Cut short.
    let cut: Vec<PathBuf> = two.clone();
    for member in &cut {
        let file = File::options().write(true).open(member).expect("the image is ours");
        file.set_len(16 << 20).expect("the image is ours");
    }
    names(&refused("cut short", &mut start(&cut)), &["two"]);
    // After all that, what is right works.
    Server::start(&mut start(&one)).stop();
}

#[test]
fn a_volume_that_another_process_has() {
    let sandbox = Sandbox::new();
    let broker = Broker::start(&sandbox, &[]);
    let line =
        refused("in use", &mut serve(&sandbox, &Logs::Volume(sandbox.images(4), "1G"), &[], free_port()));
    names(&line, &["disk0.img"]);
    let raid10 = run(sandbox.raid10().arg("serve").args(sandbox.images(4)).args(["--nbd", "unix:nbd.sock"]));
    assert_refusal("raid10 serve", &raid10, 1);
    let mut produce = broker.kcat(&sandbox, "-P -t still -l lines");
    std::fs::write(sandbox.join("lines"), "served\n").expect("the sandbox can be written");
    client(&mut produce);
    broker.stop();
}

#[test]
fn a_data_directory_that_is_none() {
    let sandbox = Sandbox::new();
    let start = |dir: &Path| {
        refused("data-dir", &mut serve(&sandbox, &Logs::Directory(dir.to_owned()), &[], free_port()))
    };
    std::fs::write(sandbox.join("file"), "x").expect("the sandbox can be written");
    names(&start(&sandbox.join("file")), &["file"]);
    names(&start(&sandbox.join("file/below")), &["file/below"]);
    // Not even root writes there.
    names(&start(Path::new("/proc/decalog")), &["/proc/decalog"]);
    // Somebody's directory.
    let home = sandbox.join("home");
    std::fs::create_dir(&home).expect("the sandbox can be written");
    std::fs::write(home.join("letter"), "dear").expect("the sandbox can be written");
    names(&start(&home), &["home"]);
    assert_eq!(bytes_of(&home.join("letter")), b"dear");
}

/// Sends bytes to a port; gives what comes back until the other side closes. It must close, or answer, in a while.
fn send(port: u16, bytes: &[u8], half_close: bool) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the server takes connections");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout above zero");
    // It may close before it has taken everything, which is its right.
    let sent = stream.write_all(bytes);
    if half_close && sent.is_ok() {
        drop(stream.shutdown(std::net::Shutdown::Write));
    }
    let mut got = Vec::new();
    match stream.read_to_end(&mut got) {
        Ok(_) => {}
        Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
        Err(e) => panic!("the server neither answered nor closed: {e}"),
    }
    got
}

/// A request: length, then a header of version 1 with this key and version, then a body.
fn frame(key: i16, version: i16, body: &[u8]) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend_from_slice(&key.to_be_bytes());
    request.extend_from_slice(&version.to_be_bytes());
    request.extend_from_slice(&7i32.to_be_bytes());
    request.extend_from_slice(&4i16.to_be_bytes());
    request.extend_from_slice(b"test");
    request.extend_from_slice(body);
    let mut whole = (request.len() as i32).to_be_bytes().to_vec();
    whole.extend_from_slice(&request);
    whole
}

#[test]
fn garbage_on_the_kafka_port() {
    let sandbox = Sandbox::new();
    let broker = Broker::start(&sandbox, &[]);
    std::fs::write(sandbox.join("lines"), "one\ntwo\n").expect("the sandbox can be written");
    client(&mut broker.kcat(&sandbox, "-P -t some -l lines"));
    let before = broker.server.resident();
    // Lengths: none, negative, zero, just oversize, the largest there is.
    send(broker.port(), b"", true);
    for length in [-1, i32::MIN, 0, 1, 7, 1 << 30, i32::MAX] {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0; 64]);
        send(broker.port(), &bytes, true);
    }
    // Other protocols.
    let tls_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    for other in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], tls_hello, b"SSH-2.0-x\r\n"] {
        send(broker.port(), other, true);
    }
    // Headers with unknown keys and versions, bodies cut short, and array lengths that lie.
    for key in [-1, 4, 77, 9999, i16::MAX] {
        send(broker.port(), &frame(key, 0, b""), true);
    }
    for key in [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 18, 19, 20, 22] {
        for version in [-1, 0, 4, 9, 13, 99] {
            for body in [&b""[..], &[0x7f; 9], &[0xff; 40], &[0; 3]] {
                send(broker.port(), &frame(key, version, body), true);
            }
        }
    }
    // Half a frame, and then nothing more.
    let whole = frame(3, 1, &[0xff; 4]);
    for cut in [1, 3, 4, 9, whole.len() - 1] {
        send(broker.port(), &whole[..cut], true);
    }
    let grown = broker.server.resident().saturating_sub(before);
    assert!(grown < 64 << 20, "garbage made it grow by {grown} bytes");
    let said = broker.server.stderr();
    assert!(!said.contains("panicked at"), "{said}");
    // It still serves, and what was there is there.
    let got = client(&mut broker.kcat(&sandbox, "-C -t some -p 0 -o beginning -e -q"));
    assert_eq!(got, "one\ntwo\n");
    broker.stop();
}

#[test]
fn garbage_on_the_nbd_port() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(4);
    create(&sandbox, &images, "--size 64M --chunk 64K");
    let port = free_port();
    let served = Served::start(&sandbox, &images, &format!("--nbd tcp:127.0.0.1:{port}"));
    let content = sandbox.join("content");
    pattern(&content, served.size(), 1);
    served.fill(&content);
    send(port, b"", true);
    send(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", true);
    send(port, &[0xff; 4096], true);
    // A client that agrees to everything and then asks for options of absurd lengths.
    for length in [0u32, 1, 4097, u32::MAX] {
        let mut bytes = 3u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(b"IHAVEOPT");
        bytes.extend_from_slice(&7u32.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&[0xff; 64]);
        send(port, &bytes, true);
    }
    let dump = sandbox.join("dump");
    served.dump(&dump);
    assert!(bytes_of(&dump) == bytes_of(&content), "garbage changed the volume");
    assert!(!served.server.stderr().contains("panicked at"), "{}", served.server.stderr());
    served.stop();
}

/// Sparse images on a file system that fills up: the producer gets the protocol's error, what was acknowledged stays
/// readable, also after a restart, and writing goes on once there is room.
#[test]
fn a_disk_that_is_full() {
    if left_out("a full disk (needs root)") || Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    let small = Mount::of(Path::new("tmpfs"), &sandbox.join("small"), "-t tmpfs -o size=96m");
    let images: Vec<PathBuf> = (0..4).map(|at| small.dir().join(format!("disk{at}.img"))).collect();
    let logs = Logs::Volume(images.clone(), "1G");
    text(&sandbox.join("text"), usize::MAX);
    let broker = Broker::start_on(&sandbox, logs, &[]);
    // Two copies of 50 MB of text do not fit. The error is one that clients retry: it must end nevertheless.
    let settings =
        ["full", "text", "acked", "acks=all", "message.timeout.ms=8000", "enable.idempotence=true"];
    let ended = client_ended(&mut broker.python(&sandbox, "produce", "confluent", &settings));
    assert_eq!(ended.code(), 1, "it all fitted?\n{}{}", ended.stdout, ended.stderr);
    let acked = acked_of(&sandbox.join("acked"));
    assert!(acked.len() > 10_000, "only {} records fitted", acked.len());
    let lines = lines_of(&sandbox.join("text"));
    let assert_all_there = |broker: &Broker| {
        let highest = acked.iter().map(|&(_, _, offset)| offset).max().expect("there are acknowledgements");
        client(&mut broker.python(
            &sandbox,
            "consume",
            "confluent",
            &["full", &(highest + 1).to_string(), "out"],
        ));
        let records = records_of(&sandbox.join("out"));
        for &(line, _, offset) in acked.iter().filter(|(_, _, offset)| *offset >= 0) {
            assert_eq!(records[offset as usize].value, lines[line], "line {line} at offset {offset}");
        }
    };
    assert_all_there(&broker);
    assert!(!broker.server.stderr().contains("panicked at"), "{}", broker.server.stderr());
    // Killed, not stopped: it must come up on a disk that is still full.
    let broker = broker.restarted(&sandbox, Server::kill);
    assert_all_there(&broker);
    let told = succeed(sandbox.raid10().arg("status").arg(&images[0]).arg("--json"));
    let status: serde_json::Value = serde_json::from_str(&told).expect("status --json prints JSON");
    let members = status["members"].as_array().unwrap_or_else(|| panic!("{status}"));
    let faulty: Vec<_> = members.iter().filter(|member| member["state"] != "in_sync").collect();
    assert!(faulty.is_empty(), "a full file system is not a faulty member: {status}");
    // Room again.
    succeed(Command::new("mount").args(["-o", "remount,size=512m"]).arg(small.dir()));
    std::fs::write(sandbox.join("more"), "there is room again\n").expect("the sandbox can be written");
    client(&mut broker.kcat(&sandbox, "-P -t room -X acks=all -l more"));
    let got = client(&mut broker.kcat(&sandbox, "-C -t room -p 0 -o beginning -e -q"));
    assert_eq!(got, "there is room again\n");
    assert_all_there(&broker);
    broker.stop();
    small.unmount();
}
