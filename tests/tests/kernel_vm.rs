//! The kernel's NBD client, in a virtual machine, attaches our server and puts file systems on it.

use std::time::Duration;
use tests::clients::text;
use tests::process::{Sandbox, Server, bytes_of, free_port, left_out, run, succeed};
use tests::vm::{boot, results};
use tests::volumes::{Served, create, sha256};

/// Many times what the machine needs when it has a core to itself.
const LIMIT: Duration = Duration::from_secs(600);

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
