//! The second way to run, on a real kernel: loop devices over images, a RAID volume on them, NBD, FUSE, a loop device,
//! ext4, and the broker with its files on that.

use std::path::PathBuf;
use tests::clients::{Broker, Logs, client, orderly, text};
use tests::process::{Sandbox, bytes_of, left_out, run, succeed};
use tests::volumes::{Fuse, Loop, Mount, Served, create};

fn produce(sandbox: &Sandbox, broker: &Broker, topic: &str) {
    client(broker.kcat(sandbox, &format!("-P -t {topic} -z lz4 -l")).arg(sandbox.join("text")));
}

fn assert_consumed(sandbox: &Sandbox, broker: &Broker, topic: &str) {
    let got = client(&mut broker.kcat(sandbox, &format!("-C -t {topic} -p 0 -o beginning -e -q")));
    assert!(got.as_bytes() == bytes_of(&sandbox.join("text")), "{topic}: {} bytes, not the text", got.len());
}

#[test]
fn broker_on_ext4_on_a_volume_on_loop_devices() {
    if left_out("the mounted volume (needs root)") || Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    let lines = text(&sandbox.join("text"), 300_000);
    // What undoes an attachment stands in a variable declared after what it is attached to: a failed test unwinds in
    // the right order.
    let loops: Vec<Loop> = (0..4)
        .map(|at| {
            let image = sandbox.join(format!("disk{at}.img"));
            let file = std::fs::File::create_new(&image).expect("the sandbox can be written");
            file.set_len(256 << 20).expect("the image is sparse");
            Loop::attach(&image)
        })
        .collect();
    let members: Vec<PathBuf> = loops.iter().map(|device| device.device().to_owned()).collect();
    create(&sandbox, &members, "--name mounted");
    let served = Served::start(&sandbox, &members, "");
    let fuse = Fuse::mount(&sandbox, served.socket());
    let disk = Loop::attach(fuse.file());
    succeed(sandbox.command("mkfs.ext4").args(["-q", "-F"]).arg(disk.device()));
    let mount = Mount::of(disk.device(), &sandbox.join("mnt"), "");

    let logs = Logs::Directory(mount.dir().join("logs"));
    let broker = Broker::start_on(&sandbox, logs.clone(), &["log.segment.bytes=4194304"]);
    produce(&sandbox, &broker, "first");
    assert_consumed(&sandbox, &broker, "first");
    // A restart, and then kill -9: the files are in the page cache of a file system that stays mounted.
    let broker = broker.restarted(&sandbox, orderly);
    assert_consumed(&sandbox, &broker, "first");
    produce(&sandbox, &broker, "second");
    let broker = broker.restarted(&sandbox, tests::process::Server::kill);
    assert_consumed(&sandbox, &broker, "first");
    assert_consumed(&sandbox, &broker, "second");
    broker.stop();
    let segments = files(&mount.dir().join("logs/first-0"), "log");
    assert!(segments > 1, "{lines} lines fill more than one segment of 4 MiB, Kafka-named files: {segments}");

    mount.unmount();
    let checked = run(sandbox.command("e2fsck").args(["-f", "-n"]).arg(disk.device()));
    assert!(checked.status.success(), "the file system is not clean: {}{}", checked.stdout, checked.stderr);
    disk.detach();
    fuse.unmount();
    served.stop();

    // Offline, the array is clean; and all of it once more, to see that the data was on the volume and nowhere else.
    let status = succeed(sandbox.raid10().arg("status").arg(&members[0]).arg("--json"));
    let status: serde_json::Value = serde_json::from_str(&status).expect("status --json prints JSON");
    assert_eq!(status["state"], "clean", "{status}");
    let served = Served::start(&sandbox, &members, "");
    let fuse = Fuse::mount(&sandbox, served.socket());
    let disk = Loop::attach(fuse.file());
    let mount = Mount::of(disk.device(), &sandbox.join("mnt"), "");
    let broker = Broker::start_on(&sandbox, logs, &[]);
    assert_consumed(&sandbox, &broker, "second");
    broker.stop();
    mount.unmount();
    disk.detach();
    fuse.unmount();
    served.stop();
    loops.into_iter().for_each(Loop::detach);
}

fn files(dir: &std::path::Path, extension: &str) -> usize {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries
        .filter(|entry| entry.as_ref().is_ok_and(|e| e.path().extension().is_some_and(|x| x == extension)))
        .count()
}
