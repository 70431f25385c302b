//! Unclean arrays, exchanged with the real md in a virtual machine: what one left half-way the other makes equal, and
//! only where the bitmap says so; and what md's bad-block log says is bad is not read here.

use std::fmt::Write;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::md::{Legs, blank, guest, members, superblock};
use tests::process::{Sandbox, eventually, left_out, succeed};
use tests::vm::{DONE, POWER_CUT, boot, drives, results};
use tests::volumes::{Served, create, pattern};

/// Many times what the machine needs when it has a core to itself.
const LIMIT: Duration = Duration::from_secs(600);
const CHUNK: u64 = 64 << 10;
const MEMBER: u64 = (1 << 20) + 64 * CHUNK;
/// The chunk that is dirty when the power goes, and one that is not.
const DIRTY: u64 = 7;
const CLEAN: u64 = 20;

const SHAPES: [(&str, usize); 4] = [("n2", 3), ("n2", 4), ("f2", 3), ("o2", 4)];

fn blanks(sandbox: &Sandbox, name: &str, n: usize) -> Vec<PathBuf> {
    let images = members(sandbox, name, n);
    for image in &images {
        blank(image, MEMBER);
    }
    images
}

/// Waits until nothing is being made equal any more, and stops the server.
fn settle(sandbox: &Sandbox, served: Served, member: &Path) {
    eventually("the resync to end", Duration::from_secs(60), || {
        let told = succeed(sandbox.raid10().arg("status").arg(member).arg("--json"));
        told.contains("\"action\": \"idle\"").then_some(())
    });
    served.stop();
}

/// The power goes while md's arrays are in use: here only what md's bitmap calls dirty is made equal, and all of an
/// array without a bitmap. What md's bad-block log names is read from the other leg.
#[test]
fn what_md_left_unclean_is_made_equal_here() {
    if left_out("arrays that md left unclean, in a virtual machine") {
        return;
    }
    let sandbox = Sandbox::new();
    let mut images = Vec::new();
    let mut script = String::new();
    let mut cut = String::new();
    let source = sandbox.join("source");
    pattern(&source, 4 * MEMBER, 3);
    let arrays = SHAPES.iter().map(|&(layout, n)| (layout, n, "internal --bitmap-chunk=64K"));
    let arrays: Vec<_> = arrays.chain([("n2", 2, "none")]).collect();
    for (at, (layout, n, bitmap)) in arrays.iter().enumerate() {
        images.extend(blanks(&sandbox, &format!("md{at}"), *n));
        let drives = guest(&members(&sandbox, &format!("md{at}"), *n));
        write!(
            script,
            "/tools/mdadm --create /dev/md{at} --run --homehost=any --name=md{at} --metadata=1.2 --level=10 \
             --layout={layout} --chunk=64 --data-offset=1M --bitmap={bitmap} --raid-devices={n} {drives}\n\
             /tools/mdadm --wait /dev/md{at} || true\n\
             dd if=/dev/drive/source of=/dev/md{at} bs=64k count=40 conv=fsync\n\
             /tools/mdadm --stop /dev/md{at}\n\
             /tools/mdadm --assemble /dev/md{at} {drives}\n\
             echo 60 > /sys/block/md{at}/md/safe_mode_delay\n"
        )
        .expect("a String takes all");
        writeln!(
            cut,
            "dd if=/dev/drive/source of=/dev/md{at} bs=64k skip=50 seek={DIRTY} count=1 oflag=direct"
        )
        .expect("a String takes all");
    }
    let bad = blanks(&sandbox, "bad", 2);
    images.extend(bad.clone());
    // Sectors of the device: the first chunk of its data area.
    write!(script, "/tools/mdadm --create /dev/md20 --run --homehost=any --name=bad --metadata=1.2 --level=10 --layout=n2 \
         --chunk=64 --data-offset=1M --bitmap=internal --raid-devices=2 {}\n\
         /tools/mdadm --wait /dev/md20 || true\n\
         dd if=/dev/drive/source of=/dev/md20 bs=64k count=40 conv=fsync\n\
         leg=$(readlink /dev/drive/bad-0)\n\
         echo '2048 16' > /sys/block/md20/md/dev-${{leg##*/}}/bad_blocks\n\
         dd if=/dev/drive/source of=/dev/md20 bs=64k skip=30 seek=30 count=1 conv=fsync\n\
         echo RESULT bad $(cat /sys/block/md20/md/dev-${{leg##*/}}/bad_blocks)\n\
         /tools/mdadm --stop /dev/md20\n",
        guest(&bad)).expect("a String takes all");
    images.push(source.clone());
    let output = boot(&sandbox, &drives(&images), &(script + DONE + &cut + POWER_CUT), LIMIT);
    assert_eq!(results(&output).get("bad"), Some(&"2048 16"), "{output}");

    let mut written = vec![0; CHUNK as usize];
    File::open(&source).and_then(|file| file.read_exact_at(&mut written, 50 * CHUNK)).expect("just written");
    for (at, (layout, n, bitmap)) in arrays.iter().enumerate() {
        let made = members(&sandbox, &format!("md{at}"), *n);
        let what = format!("md's {layout} array of {n}, bitmap {bitmap}");
        assert!(!superblock(&made[0]).is_clean(), "{what} was stopped cleanly");
        let legs = Legs::of(&made);
        assert!(legs.read(DIRTY, 0) == written, "{what}: the last write is not there");
        legs.spoil(DIRTY, 1);
        legs.spoil(CLEAN, 1);
        let served = Served::start(&sandbox, &made, "");
        settle(&sandbox, served, &made[0]);
        assert!(legs.agree(DIRTY), "{what}: dirty and not made equal");
        // A clean region is nobody's business but a scrub's.
        assert_eq!(legs.agree(CLEAN), *bitmap == "none", "{what}");
        assert!(superblock(&made[0]).is_clean(), "{what}");
    }

    let legs = Legs::of(&bad);
    let place = legs.place(0, 0);
    let file = File::options().write(true).open(&bad[place.slot.0]).expect("the image is there");
    file.write_all_at(&[0xa5; 8192], legs.start() + place.at.0).expect("the image can be written");
    let served = Served::start(&sandbox, &bad, "");
    let dump = sandbox.join("dump");
    served.dump(&dump);
    served.stop();
    let head = |path: &Path| {
        let mut bytes = vec![0; 40 * CHUNK as usize];
        File::open(path).and_then(|file| file.read_exact_at(&mut bytes, 0)).expect("as long as it was made");
        bytes
    };
    assert!(head(&dump) == head(&source), "blocks were read that md's bad-block log names");
}

/// Our server is killed while the array is in use, and one leg differs where its bitmap is dirty (anywhere, where there
/// is no bitmap): md makes that equal by itself, and its check then finds nothing.
#[test]
fn what_we_left_unclean_is_made_equal_by_md() {
    if left_out("arrays left unclean here, in a virtual machine") {
        return;
    }
    let sandbox = Sandbox::new();
    let (mut images, mut script) = (Vec::new(), String::new());
    let arrays = SHAPES.iter().map(|&(layout, n)| (layout, n, "--bitmap-chunk 64K"));
    let arrays: Vec<_> = arrays.chain([("n2", 2, "--bitmap none")]).collect();
    for (at, (layout, n, bitmap)) in arrays.iter().enumerate() {
        let made = members(&sandbox, &format!("ours{at}"), *n);
        create(
            &sandbox,
            &made,
            &format!("--size {MEMBER} --chunk 64K --layout {layout} --name ours{at} {bitmap}"),
        );
        let served = Served::start(&sandbox, &made, "");
        let content = sandbox.join("content");
        pattern(&content, served.size(), at as u64);
        served.fill(&content);
        served.stop();
        let served = Served::start(&sandbox, &made, "");
        let write = format!("write -P 0x77 {} 64k", DIRTY * CHUNK);
        succeed(sandbox.command("qemu-io").args(["-f", "raw", &served.uri(), "-c", &write]));
        served.server.kill();
        assert!(!superblock(&made[0]).is_clean());
        let legs = Legs::of(&made);
        legs.spoil(DIRTY, 1);
        if bitmap.ends_with("none") {
            legs.spoil(CLEAN, 1);
        }
        images.extend(made.clone());
        write!(
            script,
            "/tools/mdadm --assemble /dev/md{at} {}\n\
             /tools/mdadm --wait /dev/md{at} || true\n\
             echo check > /sys/block/md{at}/md/sync_action\n\
             /tools/mdadm --wait /dev/md{at} || true\n\
             echo RESULT mismatches{at} $(cat /sys/block/md{at}/md/mismatch_cnt)\n\
             /tools/mdadm --stop /dev/md{at}\n",
            guest(&made)
        )
        .expect("a String takes all");
    }
    let output = boot(&sandbox, &drives(&images), &script, LIMIT);
    let told = results(&output);
    for (at, (layout, n, bitmap)) in arrays.iter().enumerate() {
        let what = format!("our {layout} array of {n}, {bitmap}");
        assert_eq!(told[format!("mismatches{at}").as_str()], "0", "{what}:\n{output}");
        let made = members(&sandbox, &format!("ours{at}"), *n);
        let legs = Legs::of(&made);
        assert!(legs.agree(DIRTY), "{what}");
        assert!(
            legs.read(DIRTY, 0).iter().all(|&byte| byte == 0x77),
            "{what}: the first copy was the source"
        );
        assert!(superblock(&made[0]).is_clean(), "{what}");
    }
}
