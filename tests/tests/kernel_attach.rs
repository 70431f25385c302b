//! `raid10 attach` by the kernel's own NBD driver, in a virtual machine in which the servers run, too: a disk, a mount, all
//! of it undone, and refusals; a mounted file system that lives through the death of its server, and through its end; a
//! members that fail under one and are replaced; a server that stands still for longer than the driver waits, and members that do; disks that were given up, or waited in
//! vain, or could not write all; a driver that is long in answering. One boot for all of it, of some 120 s: for 45 of them
//! the driver waits until a request that was under way when its server died is old enough to be asked again.

use std::path::PathBuf;
use std::time::Duration;
use tests::process::{Sandbox, left_out, run, succeed};
use tests::vm::{boot_with, drives, results, which};
use tests::volumes::Served;

/// Many times what the machine needs when it has its cores to itself.
const LIMIT: Duration = Duration::from_secs(900);

/// Functions for the script. `refuse` is given a part of the one line that must be said.
const FUNCTIONS: &str = r#"
export PATH=/bin:/tools
members="/dev/drive/disk0.img /dev/drive/disk1.img /dev/drive/disk2.img /dev/drive/disk3.img"
serve() {
    : >/tmp/ready
    $under raid10 serve $members "$@" >/tmp/ready 2>>/tmp/serve.log &
    server=$!
    n=0
    until grep -q ready /tmp/ready; do
        n=$((n + 1)); [ $n -lt 1200 ] || { cat /tmp/serve.log; exit 1; }
        sleep 0.1
    done
}
refuse() {
    part=$1; shift
    if "$@" >/tmp/said 2>&1; then echo "not refused: $*"; exit 1; fi
    grep -qF -- "$part" /tmp/said || { echo "$* said:"; cat /tmp/said; exit 1; }
    [ $(wc -l </tmp/said) = 1 ] || { echo "$* said more than one line:"; cat /tmp/said; exit 1; }
}
"#;

#[test]
fn a_mounted_disk_lives_through_the_death_of_its_server() {
    if left_out("attaching by the kernel's NBD driver, in a virtual machine") {
        return;
    }
    let sandbox = Sandbox::new();
    let images: Vec<PathBuf> = sandbox.images(5);
    for image in &images {
        let file = std::fs::File::create(image).expect("the sandbox can be written");
        file.set_len(96 << 20).expect("the sandbox has room");
    }
    let programs = [PathBuf::from(sandbox.raid10().get_program()), which("setpriv")];
    let script = [FUNCTIONS, include_str!("kernel_attach.sh")].concat();
    let output = boot_with(&sandbox, &drives(&images), &programs, 2, &script, LIMIT);
    let told = results(&output);
    for (key, expected) in [
        ("small", "/dev/nbd1"),
        ("attached", "/dev/nbd0"),
        // The file system's barriers reach us.
        ("queue", "write back, fua 1, discards of 67108864"),
        ("free", "0 ls: /sys/block/nbd0/pid: No such file or directory"),
        ("mounted", "/dev/nbd0 on /mnt"),
        ("unmounted", "0"),
        ("grown", "40894464 40894464 67108864"),
        (
            "waiting",
            "/dev/nbd0 on /mnt, waiting for a server: serve the volume, then `raid10 attach vol` connects it",
        ),
        ("server", "/dev/nbd0 on /mnt, waiting: `raid10 attach vol` connects it with its new server"),
        ("again", "/dev/nbd0 on /mnt"),
        ("churned", "all"),
        ("stopped", "ok"),
        ("thawed", "ok"),
        ("written", "all"),
        ("kept", "kept"),
        // The kernel's own word on all of the above.
        ("errors", "0"),
        ("anew", "/dev/nbd0 beside /sys/block/nbd1/pid"),
        ("noted", "served"),
        ("vain", "/dev/nbd1, without a server for too long: `raid10 detach small --force` lets it go"),
        ("forgotten", "ls: /run/raid10/nbd1.note: No such file or directory"),
        ("late", "/dev/nbd0"),
    ] {
        assert_eq!(told.get(key), Some(&expected), "{key}: {output}");
    }
    let number = |text: &str| text.parse::<u32>().expect("a number");
    let (right, written) = told["hurt"].split_once(" of ").expect("two numbers");
    assert!(number(right) >= 20 && right == written, "{output}");
    assert!(number(told["mended"]) >= 1, "a connection was given up and made anew: {output}");
    let (right, written) = told["files"].split_once(" of ").expect("two numbers");
    assert!(number(right) >= 20 && number(right) == number(written), "{output}");

    // From outside, without any kernel: the array was left clean, and the file system lies on it.
    let offline = succeed(sandbox.raid10().arg("status").arg(&images[0]));
    assert!(offline.contains("clean"), "{offline}");
    let served = Served::start(&sandbox, &images[..4], "");
    let dump = sandbox.join("dump");
    served.dump(&dump);
    served.stop();
    let checked = run(sandbox.command("e2fsck").args(["-f", "-n"]).arg(&dump));
    assert!(checked.status.success(), "{}{}", checked.stdout, checked.stderr);
}
