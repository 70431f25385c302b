//! `raid10 attach` and `detach`: a served volume as a disk of this machine, mounted from it, and all of it undone, also
//! after a crash of the server. What is in use is refused, and nothing changes.

use rustix::process::Signal;
use serde_json::Value;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::attach::Attached;
use tests::clients::{Broker, Logs};
use tests::process::{Sandbox, Server, bytes_of, eventually, left_out, refuse, run, succeed};
use tests::volumes::{Mount, Served, create, pattern, patterned};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

fn without_root() -> bool {
    left_out("attached volumes (needs root)")
}

/// A volume of four members of 96 MiB, named `vol`.
fn volume(sandbox: &Sandbox) -> Vec<PathBuf> {
    let images = sandbox.images(4);
    create(sandbox, &images, "--size 96M --chunk 64K --name vol");
    images
}

fn status(sandbox: &Sandbox, volume: &str) -> Value {
    let told = succeed(sandbox.raid10().args(["status", volume, "--json"]));
    serde_json::from_str(&told).expect("one JSON document")
}

fn refused(sandbox: &Sandbox, words: &[&str], parts: &[&str]) {
    let said = refuse(sandbox.raid10().args(words), 1);
    for part in parts {
        assert!(said.contains(part), "{words:?}: {said}");
    }
}

fn mkfs(sandbox: &Sandbox, device: &Path) {
    succeed(sandbox.command("mkfs.ext4").args(["-q", "-F"]).arg(device));
}

/// Writes a file and has it on stable storage.
fn write_through(path: &Path, bytes: &[u8]) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).expect("the file system can be written");
    file.write_all(bytes).and_then(|()| file.sync_all()).expect("the file system has room");
}

/// Whether anything over the volume's file is left.
fn traces(sandbox: &Sandbox) -> Vec<String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("the kernel lists mounts");
    let home = sandbox.path().to_str().expect("UTF-8").to_owned();
    let mounts = mounts.lines().filter(|line| line.contains(&home)).map(str::to_owned);
    let loops = succeed(sandbox.command("losetup").arg("--all"));
    let loops: Vec<String> = loops.lines().filter(|line| line.contains(&home)).map(str::to_owned).collect();
    let run = std::fs::read_dir(sandbox.runtime_dir()).expect("the runtime directory is there");
    let files = run.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned());
    let files = files.filter(|name| [".disk", ".mounted"].iter().any(|suffix| name.ends_with(suffix)));
    mounts.chain(loops).chain(files).collect()
}

/// Kilobytes that a process has locked in memory.
fn locked(server: &Server) -> u64 {
    let path = format!("/proc/{}/status", server.pid());
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let line = text.lines().find_map(|line| line.strip_prefix("VmLck:")).expect("a live process has VmLck");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number of kB")
}

#[test]
fn what_is_written_to_the_disk_is_on_the_volume() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let served = Served::start(&sandbox, &images, "");
    let attached = Attached::new(&sandbox, "vol", &[]);
    let device = attached.device().to_owned();
    assert!(locked(&served.server) > 0, "the server's memory is not locked");
    let told = status(&sandbox, "vol");
    assert_eq!(told["attached"]["device"], device.to_str().expect("UTF-8"), "{told}");
    let size = succeed(sandbox.command("blockdev").arg("--getsize64").arg(&device));
    assert_eq!(size.trim_end().parse(), Ok(served.size()));
    refused(&sandbox, &["attach", "vol"], &["attached at /dev/loop", "raid10 detach vol"]);

    mkfs(&sandbox, &device);
    let mount = Mount::of(&device, &sandbox.join("mnt"), "");
    let source = sandbox.join("source");
    pattern(&source, 20 * MIB, 3);
    std::fs::copy(&source, mount.dir().join("copy")).expect("the file system has room");
    // Mounted by hand: not ours to unmount.
    refused(&sandbox, &["detach", "vol"], &["not by `raid10 attach`", "`umount /"]);
    assert!(mount.dir().join("copy").is_file(), "a refused detach changes nothing");
    mount.unmount();
    assert_eq!(attached.detach(), "");
    assert_eq!(traces(&sandbox), Vec::<String>::new());
    assert_eq!(status(&sandbox, "vol")["attached"], Value::Null);
    assert_eq!(locked(&served.server), 0, "the server's memory is still locked");
    refused(&sandbox, &["detach", "vol"], &["vol is not attached"]);

    // By NBD, from the same server: the file system as it was left.
    let dump = sandbox.join("dump");
    served.dump(&dump);
    served.stop();
    let checked = run(sandbox.command("e2fsck").args(["-f", "-n"]).arg(&dump));
    assert!(checked.status.success(), "{}{}", checked.stdout, checked.stderr);
    let copy = sandbox.join("copy");
    let request = format!("dump /copy {}", copy.display());
    succeed(sandbox.command("debugfs").args(["-R", &request]).arg(&dump));
    assert!(bytes_of(&copy) == bytes_of(&source), "another file than was written");
}

#[test]
fn a_mounted_volume_is_held_until_nobody_uses_it() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let served = Served::start(&sandbox, &images, "--direct");
    let dir = sandbox.join("mnt");
    std::fs::create_dir(&dir).expect("the sandbox can be written");
    let at = dir.to_str().expect("UTF-8");

    // What cannot be mounted is refused, and nothing is left of the try.
    refused(&sandbox, &["attach", "vol", "--mount", at], &["no file system", "mkfs.ext4"]);
    refused(&sandbox, &["attach", "vol", "--mount", "/nowhere"], &["/nowhere", "mkdir"]);
    refused(&sandbox, &["attach", "vol", "--mount", "/proc"], &["/proc", "mounted there already"]);
    assert_eq!(traces(&sandbox), Vec::<String>::new());

    let attached = Attached::new(&sandbox, "vol", &[]);
    mkfs(&sandbox, attached.device());
    let reader = sandbox
        .command("sh")
        .args(["-c", &format!("exec sleep 600 <{}", attached.device().display())])
        .spawn();
    let mut reader = reader.expect("a shell");
    let pid = reader.id().to_string();
    eventually("the device to be opened", PATIENCE, || {
        std::fs::read_link(format!("/proc/{pid}/fd/0")).ok().filter(|path| path == attached.device())
    });
    refused(&sandbox, &["detach", "vol"], &["in use by", &pid]);
    reader.kill().and_then(|()| reader.wait()).expect("the reader is ours");
    // Attached already, it is mounted from its device.
    succeed(sandbox.raid10().args(["attach", "vol", "--mount", at]));
    write_through(&dir.join("one"), b"one");
    let told = status(&sandbox, "vol");
    assert_eq!(told["attached"]["mounted"][0], at, "{told}");
    refused(&sandbox, &["stop", "vol"], &["raid10 detach vol"]);

    let user = sandbox.command("sleep").arg("600").current_dir(&dir).spawn();
    let mut user = user.expect("sleep can be run");
    refused(&sandbox, &["detach", "vol"], &["in use", "fuser -vm"]);
    write_through(&dir.join("two"), b"two");
    user.kill().and_then(|()| user.wait()).expect("the user is ours");
    assert_eq!(attached.detach(), "");
    assert_eq!(traces(&sandbox), Vec::<String>::new());
    assert!(!dir.join("one").exists(), "the directory is empty again");

    let again = Attached::mounted(&sandbox, "vol", &dir);
    assert_eq!((bytes_of(&dir.join("one")), bytes_of(&dir.join("two"))), (b"one".to_vec(), b"two".to_vec()));
    assert_eq!(again.detach(), "");
    served.stop();
}

#[test]
fn space_that_the_file_system_gives_back_leaves_the_images() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let served = Served::start(&sandbox, &images, "");
    let attached = Attached::new(&sandbox, "vol", &[]);
    mkfs(&sandbox, attached.device());
    let dir = sandbox.join("mnt");
    let mount = Mount::of(attached.device(), &dir, "");
    let stored =
        || images.iter().map(|image| image.metadata().expect("it is there").blocks() * 512).sum::<u64>();
    let empty = stored();
    write_through(&dir.join("large"), &patterned(40 * MIB, 1));
    assert!(stored() >= empty + 80 * MIB, "two copies of 40 MiB take {} bytes", stored() - empty);
    std::fs::remove_file(dir.join("large")).expect("the file is there");
    // Freed blocks can be trimmed once the journal says so.
    succeed(sandbox.command("sync").arg("-f").arg(&dir));
    succeed(sandbox.command("fstrim").arg(&dir));
    assert!(stored() < empty + 10 * MIB, "{} bytes are stored, {empty} before", stored());
    mount.unmount();
    assert_eq!(attached.detach(), "");
    served.stop();
}

#[test]
fn an_attached_volume_grows() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let served = Served::start(&sandbox, &images, "");
    let attached = Attached::new(&sandbox, "vol", &[]);
    mkfs(&sandbox, attached.device());
    let dir = sandbox.join("mnt");
    let mount = Mount::of(attached.device(), &dir, "");
    write_through(&dir.join("kept"), b"kept");
    for image in &images {
        let file = std::fs::File::options().write(true).open(image).expect("the image is there");
        file.set_len(160 * MIB).expect("the image is sparse");
    }
    let before = served.size();
    succeed(sandbox.raid10().args(["grow", "vol"]));
    let size = succeed(sandbox.command("blockdev").arg("--getsize64").arg(attached.device()));
    assert_eq!(size.trim_end().parse(), Ok(served.size()));
    assert!(served.size() > before + 100 * MIB, "{before} bytes before, {size} after");
    mount.unmount();
    succeed(sandbox.command("e2fsck").args(["-f", "-p"]).arg(attached.device()));
    succeed(sandbox.command("resize2fs").arg(attached.device()));
    let mount = Mount::of(attached.device(), &dir, "");
    let large = patterned(200 * MIB, 4);
    write_through(&dir.join("large"), &large);
    mount.unmount();
    let mount = Mount::of(attached.device(), &dir, "");
    assert!(bytes_of(&dir.join("kept")) == b"kept" && bytes_of(&dir.join("large")) == large);
    mount.unmount();
    assert_eq!(attached.detach(), "");
    served.stop();
}

/// Random writes of all sizes on the device itself, many at a time, read back and compared.
#[test]
fn fio_verifies_the_disk() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let served = Served::start(&sandbox, &images, "--direct");
    let attached = Attached::new(&sandbox, "vol", &[]);
    let device = attached.device().to_str().expect("UTF-8").to_owned();
    for (name, engine) in
        [("direct", "--ioengine=libaio --direct=1"), ("cached", "--ioengine=psync --direct=0 --fsync=32")]
    {
        let arguments = format!(
            "--name={name} --filename={device} {engine} --rw=randwrite --bsrange=4k-512k --iodepth=16 --size=100% \
             --io_size=96M --verify=crc32c --verify_fatal=1 --verify_backlog=64 --allow_file_create=0"
        );
        succeed(sandbox.command("fio").args(arguments.split_whitespace()));
    }
    assert_eq!(attached.detach(), "");
    served.stop();
}

#[test]
fn a_server_that_dies_leaves_nothing_that_detach_cannot_undo() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let served = Served::start(&sandbox, &images, "");
    let attached = Attached::new(&sandbox, "vol", &[]);
    mkfs(&sandbox, attached.device());
    assert_eq!(attached.detach(), "");
    let dir = sandbox.join("mnt");
    let kept = patterned(4 * MIB, 9);

    // Killed, and detached without a server: by its name, since the file tells it.
    let attached = Attached::mounted(&sandbox, "vol", &dir);
    write_through(&dir.join("kept"), &kept);
    std::fs::write(dir.join("not kept"), &kept).expect("the page cache has room");
    served.server.kill();
    let told = status(&sandbox, images[0].to_str().expect("UTF-8"));
    assert_eq!(told["attached"]["mounted"][0], dir.to_str().expect("UTF-8"), "{told}");
    let said = attached.detach();
    assert!(said.contains("without a server: unmounted") && said.contains("is free again"), "{said}");
    assert_eq!(traces(&sandbox), Vec::<String>::new());

    // Killed while a process uses it, and attached again by the next server.
    let served = Served::start(&sandbox, &images, "");
    let attached = Attached::mounted(&sandbox, "vol", &dir);
    assert!(bytes_of(&dir.join("kept")) == kept, "what was on stable storage is there");
    let user = sandbox.command("sleep").arg("600").current_dir(&dir).spawn();
    let mut user = user.expect("sleep can be run");
    served.server.kill();
    let served = Served::start(&sandbox, &images, "");
    let again = Attached::mounted(&sandbox, "vol", &dir);
    assert!(bytes_of(&dir.join("kept")) == kept, "what was on stable storage is there");
    user.kill().and_then(|()| user.wait()).expect("the user is ours");
    eventually("the old loop device to go", PATIENCE, || {
        let loops = succeed(sandbox.command("losetup").args(["--noheadings", "--output", "NAME"]));
        let old = attached.device().to_str().expect("UTF-8");
        (again.device() == attached.device() || !loops.lines().any(|line| line.trim() == old)).then_some(())
    });
    attached.undone();
    assert_eq!(again.detach(), "");
    assert_eq!(traces(&sandbox), Vec::<String>::new());
    let checking = Attached::new(&sandbox, "vol", &[]);
    let checked = run(sandbox.command("e2fsck").args(["-f", "-n"]).arg(checking.device()));
    assert!(checked.status.success(), "{}{}", checked.stdout, checked.stderr);
    assert_eq!(checking.detach(), "");
    served.stop();
}

#[test]
fn a_signal_to_an_attached_server_is_refused_once() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let mut served = Served::start(&sandbox, &images, "");
    let attached = Attached::new(&sandbox, "vol", &[]);
    served.server.signal(Signal::TERM);
    eventually("the refusal", PATIENCE, || served.server.stderr().contains("not stopping").then_some(()));
    assert!(served.server.is_running());
    succeed(
        sandbox
            .command("dd")
            .arg("if=/dev/zero")
            .args(["bs=1M", "count=4", "oflag=direct"])
            .arg(format!("of={}", attached.device().display())),
    );
    served.stop();
    let said = attached.detach();
    assert!(said.contains("is free again"), "{said}");
    assert_eq!(traces(&sandbox), Vec::<String>::new());
    assert_eq!(status(&sandbox, images[0].to_str().expect("UTF-8"))["state"], "clean");
}

#[test]
fn what_the_volume_refuses_the_disk_refuses() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let served = Served::start(&sandbox, &images, "");
    let attached = Attached::new(&sandbox, "vol", &[]);
    mkfs(&sandbox, attached.device());
    assert_eq!(attached.detach(), "");
    served.stop();

    let served = Served::start(&sandbox, &images, "--read-only");
    let dir = sandbox.join("mnt");
    let attached = Attached::mounted(&sandbox, "vol", &dir);
    let read_only = succeed(sandbox.command("blockdev").arg("--getro").arg(attached.device()));
    assert_eq!(read_only.trim_end(), "1");
    assert!(dir.join("lost+found").is_dir() && std::fs::write(dir.join("file"), b"x").is_err());
    assert_eq!(attached.detach(), "");
    served.stop();

    // Members on a file system that is full: the writer is told.
    let small = sandbox.join("small");
    let place = Mount::of(Path::new("tmpfs"), &small, "-t tmpfs -o size=16M");
    let images: Vec<PathBuf> = (0..2).map(|at| small.join(format!("disk{at}.img"))).collect();
    create(&sandbox, &images, "--size 64M --chunk 64K --name full");
    let served = Served::start(&sandbox, &images, "");
    let attached = Attached::new(&sandbox, "full", &[]);
    let to = format!("of={}", attached.device().display());
    let written =
        run(sandbox.command("dd").args(["if=/dev/zero", "bs=1M", "count=48", "oflag=direct"]).arg(to));
    let said = &written.stderr;
    assert!(!written.status.success() && said.contains("error writing"), "{said}");
    assert_eq!(attached.detach(), "");
    // Who leaves it to the page cache is told at the end, and it is the end all the same.
    let attached = Attached::new(&sandbox, "full", &[]);
    let to = format!("of={}", attached.device().display());
    succeed(sandbox.command("dd").args(["if=/dev/zero", "bs=1M", "count=48"]).arg(to));
    let device = attached.device().to_str().expect("UTF-8").to_owned();
    refused(&sandbox, &["detach", "full"], &[&device, "not all that was written to it has reached", "fsck"]);
    attached.undone();
    assert_eq!(status(&sandbox, "full")["attached"], Value::Null);
    served.stop();
    place.unmount();
}

/// What is the kernel's NBD driver's to do is in `kernel_attach.rs`, in a virtual machine.
#[test]
fn where_the_kernel_has_no_nbd_driver_the_volume_goes_another_way() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = volume(&sandbox);
    let served = Served::start(&sandbox, &images, "");
    for other in ["/dev/sda", "/dev/nbd", "/dev/nbd0p1"] {
        let said = refuse(sandbox.raid10().args(["attach", "vol", "--device", other]), 2);
        assert!(said.contains("/dev/nbd0, /dev/nbd1"), "{said}");
    }
    let has_driver = Path::new("/sys/module/nbd").exists();
    if !has_driver {
        refused(&sandbox, &["attach", "vol", "--device", "/dev/nbd0"], &["no nbd driver", "`modprobe nbd`"]);
    }
    assert_eq!(traces(&sandbox), Vec::<String>::new());
    let attached = run(sandbox.raid10().args(["attach", "vol"]));
    assert!(attached.status.success(), "{}", attached.stderr);
    let (device, way) = if has_driver { ("/dev/nbd", "NBD driver") } else { ("/dev/loop", "FUSE") };
    assert!(attached.stdout.starts_with(device) && attached.stderr.contains(way), "{attached:?}");
    succeed(sandbox.raid10().args(["detach", "vol"]));
    served.stop();
}

#[test]
fn a_brokers_volume_is_its_own() {
    if without_root() || Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    let images = sandbox.images(4);
    let broker = Broker::start_on(&sandbox, Logs::Volume(images.clone(), "64M"), &[]);
    let member = images[0].to_str().expect("UTF-8");
    refused(&sandbox, &["attach", member], &["served by a broker", "raid10 serve"]);
    broker.stop();
}

#[test]
fn only_root_attaches() {
    if without_root() {
        return;
    }
    let sandbox = Sandbox::new();
    let binary = sandbox.raid10().get_program().to_owned();
    for command in ["attach", "detach"] {
        let mut other = sandbox.command("setpriv");
        other.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&binary).args([command, "vol"]);
        let said = refuse(&mut other, 1);
        assert!(said.contains("only root"), "{said}");
    }
}
