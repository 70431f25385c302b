//! The kernel as judge, in a virtual machine: its md makes arrays that must open here, and assembles and checks arrays
//! that were made here; its NBD client attaches our server and puts file systems on it.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::clients::text;
use tests::process::{Sandbox, Server, bytes_of, free_port, left_out, run, succeed};
use tests::vm::boot;
use tests::volumes::{Served, create, pattern, sha256};

/// Many times what the machine needs when it has a core to itself.
const LIMIT: Duration = Duration::from_secs(600);
const MEMBER: u64 = 24 << 20;

/// Images for an array of `n` members: `NAME-0` and so on, made if absent.
fn members(sandbox: &Sandbox, name: &str, n: usize) -> Vec<PathBuf> {
    (0..n).map(|slot| sandbox.join(format!("{name}-{slot}"))).collect()
}

/// The values a script printed as `KEY VALUE` after `RESULT`.
fn results(output: &str) -> HashMap<&str, &str> {
    let lines = output.lines().filter_map(|line| line.strip_prefix("RESULT "));
    lines.filter_map(|line| line.split_once(' ')).collect()
}

fn drives(images: &[PathBuf]) -> Vec<(&str, &Path)> {
    let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).map(str::len);
    images
        .iter()
        .map(|path| {
            let whole = path.to_str().expect("UTF-8");
            (&whole[whole.len() - name(path).expect("images have names")..], path.as_path())
        })
        .collect()
}

/// md's drives of an array, as the guest's shell names them.
fn guest(name: &str, n: usize) -> String {
    let names: Vec<String> = (0..n).map(|slot| format!("/dev/drive/{name}-{slot}")).collect();
    names.join(" ")
}

const SIZES: [usize; 4] = [2, 3, 4, 5];

/// One boot for all: md makes near-2 arrays on two to five members and fills them; and it assembles those that were
/// made and filled here, checks that both copies agree, and reads them.
#[test]
fn md_and_we_read_each_others_arrays() {
    if left_out("arrays exchanged with the kernel's md, in a virtual machine") {
        return;
    }
    let sandbox = Sandbox::new();
    let (mut images, mut ours) = (Vec::new(), HashMap::new());
    for n in SIZES {
        let made = members(&sandbox, &format!("ours{n}"), n);
        create(&sandbox, &made, &format!("--size 24M --chunk 64K --name ours{n}"));
        let served = Served::start(&sandbox, &made, "");
        let content = sandbox.join("content");
        pattern(&content, served.size(), n as u64);
        served.fill(&content);
        ours.insert(n, (served.size(), sha256(&content, served.size())));
        served.stop();
        images.extend(made);
        let for_md = members(&sandbox, &format!("md{n}"), n);
        for image in &for_md {
            let file = std::fs::File::create_new(image).expect("the sandbox can be written");
            file.set_len(MEMBER).expect("the image is sparse");
        }
        images.extend(for_md);
    }
    // What md's arrays are filled with: as much of it as each holds.
    let source = sandbox.join("source");
    pattern(&source, MEMBER * 5, 99);
    images.push(source.clone());

    let mut script = String::new();
    for n in SIZES {
        let (mine, theirs) = (guest(&format!("ours{n}"), n), guest(&format!("md{n}"), n));
        write!(
            script,
            "/tools/mdadm --assemble /dev/md{n} {mine}\n\
             echo check > /sys/block/md{n}/md/sync_action\n\
             /tools/mdadm --wait /dev/md{n} || true\n\
             echo RESULT mismatches{n} $(cat /sys/block/md{n}/md/mismatch_cnt)\n\
             echo RESULT state{n} $(cat /sys/block/md{n}/md/array_state) degraded $(cat /sys/block/md{n}/md/degraded)\n\
             echo RESULT sum{n} $(sha256sum < /dev/md{n})\n\
             /tools/mdadm --stop /dev/md{n}\n\
             /tools/mdadm --create /dev/md1{n} --run --homehost=any --name=md{n} --metadata=1.2 --level=10 --layout=n2 \
             --chunk=64 --bitmap=internal --raid-devices={n} {theirs}\n\
             /tools/mdadm --wait /dev/md1{n} || true\n\
             size=$(cat /sys/block/md1{n}/size)\n\
             dd if=/dev/drive/source of=/dev/md1{n} bs=64k count=$((size / 128)) conv=fsync\n\
             echo RESULT sectors{n} $((size / 128 * 128))\n\
             /tools/mdadm --stop /dev/md1{n}\n"
        )
        .expect("a String takes all");
    }
    let output = boot(&sandbox, &drives(&images), &script, LIMIT);
    let told = results(&output);
    for n in SIZES {
        let (size, sum) = &ours[&n];
        assert_eq!(
            told[format!("mismatches{n}").as_str()],
            "0",
            "copies of our array of {n} differ:\n{output}"
        );
        assert!(told[format!("state{n}").as_str()].ends_with("degraded 0"), "{output}");
        let theirs = told[format!("sum{n}").as_str()].split_whitespace().next();
        assert_eq!(theirs, Some(sum.as_str()), "md reads other bytes in our array of {n} ({size} bytes)");

        let for_md = members(&sandbox, &format!("md{n}"), n);
        let filled = told[format!("sectors{n}").as_str()].parse::<u64>().expect("a number") * 512;
        // In another order than their slots: it is the superblock that says which is which.
        let mut shuffled = for_md.clone();
        shuffled.reverse();
        let served = Served::start(&sandbox, &shuffled, "");
        assert!(served.size() >= filled && served.size() < filled + (64 << 10), "size of md's array of {n}");
        let dump = sandbox.join("dump");
        served.dump(&dump);
        assert_eq!(
            sha256(&dump, filled),
            sha256(&source, filled),
            "we read other bytes in md's array of {n}"
        );
        served.stop();
        // Ours after md had it, and md's after we had it: mdadm still takes every member for its own, and clean.
        for member in members(&sandbox, &format!("ours{n}"), n).iter().chain(&for_md) {
            let told = succeed(sandbox.command("mdadm").arg("--examine").arg(member));
            assert!(told.contains("State : clean") && told.contains("- correct"), "{told}");
        }
        let ours = Served::start(&sandbox, &members(&sandbox, &format!("ours{n}"), n), "");
        ours.dump(&dump);
        assert_eq!(&sha256(&dump, *size), sum, "our array of {n} after md had it");
        ours.stop();
    }
}

/// The kernel's own NBD client attaches our server over TCP; file systems are made, mounted, filled, read and checked.
#[test]
fn the_kernels_nbd_client_mounts_our_volume() {
    if left_out("the kernel's NBD client, in a virtual machine") {
        return;
    }
    let sandbox = Sandbox::new();
    let images = sandbox.images(4);
    create(&sandbox, &images, "--size 256M --chunk 64K --name kernel");
    let port = free_port();
    let mut serve = sandbox.raid10();
    serve.arg("serve").args(&images).args(["--nbd", &format!("tcp:127.0.0.1:{port}")]);
    let server = Server::start(&mut serve);
    let source = sandbox.join("source");
    let lines = text(&source, 200_000);
    let sum = sha256(&source, u64::MAX >> 1);
    let length = bytes_of(&source).len();
    // A drive has whole sectors.
    let file = std::fs::File::options().write(true).open(&source).expect("just written");
    file.set_len((length as u64).next_multiple_of(512)).expect("the sandbox has room");
    let script = format!(
        "attach() {{ /tools/nbd-client 10.0.2.2 {port} /dev/nbd0 -N kernel -b 4096 -C 2; }}\n\
         head -c {length} /dev/drive/source > /tmp/source\n\
         for fs in xfs ext4; do\n\
         attach\n\
         case $fs in ext4) /tools/mke2fs -q -t ext4 -F /dev/nbd0 ;; xfs) /tools/mkfs.xfs -q -f /dev/nbd0 ;; esac\n\
         mount -t $fs /dev/nbd0 /mnt\n\
         for i in 1 2 3; do cp /tmp/source /mnt/text$i; done\n\
         sync\n\
         rm /mnt/text2\n\
         fstrim /mnt || true\n\
         umount /mnt\n\
         /tools/nbd-client -d /dev/nbd0\n\
         attach\n\
         mount -t $fs /dev/nbd0 /mnt\n\
         echo RESULT $fs $(sha256sum < /mnt/text1)\n\
         echo RESULT $fs-again $(sha256sum < /mnt/text3)\n\
         umount /mnt\n\
         [ $fs != ext4 ] || /tools/e2fsck -f -n /dev/nbd0\n\
         /tools/nbd-client -d /dev/nbd0\n\
         done\n"
    );
    let output = boot(&sandbox, &[("source", source.as_path())], &script, LIMIT);
    let told = results(&output);
    for key in ["xfs", "xfs-again", "ext4", "ext4-again"] {
        assert_eq!(
            told.get(key).and_then(|told| told.split_whitespace().next()),
            Some(sum.as_str()),
            "{key}: {output}"
        );
    }
    server.stop();

    // From our side, after a restart, without any kernel: the file system lies on the volume as it was left.
    let again = Served::start(&sandbox, &images, "");
    let dump = sandbox.join("dump");
    again.dump(&dump);
    again.stop();
    let checked = run(sandbox.command("e2fsck").args(["-f", "-n"]).arg(&dump));
    assert!(checked.status.success(), "{}{}", checked.stdout, checked.stderr);
    let copy = sandbox.join("copy");
    let request = format!("dump /text3 {}", copy.display());
    succeed(sandbox.command("debugfs").args(["-R", &request]).arg(&dump));
    assert_eq!(sha256(&copy, u64::MAX >> 1), sum, "{lines} lines of text in the file system");
}
