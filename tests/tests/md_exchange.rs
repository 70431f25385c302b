//! The real md as judge, in a virtual machine: arrays of every layout that md made and filled are read here byte for
//! byte, and those that were made and filled here are assembled, checked and read by md. Sizes and offsets agree.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;
use tests::md::{blank, guest, members};
use tests::process::{Sandbox, left_out, succeed};
use tests::vm::{boot, drives, results};
use tests::volumes::{Served, create, pattern, sha256};

/// Many times what the machine needs when it has a core to itself.
const LIMIT: Duration = Duration::from_secs(600);
/// The data area holds 115 chunks and a bit: no multiple of two or three, so that md's rounding shows.
const MEMBER: u64 = (1 << 20) + 115 * (64 << 10) + 4096;

fn examine(sandbox: &Sandbox, member: &Path) -> String {
    succeed(sandbox.command("mdadm").arg("--examine").arg(member))
}

/// The value behind `name :` in mdadm's output.
fn field<'a>(output: &'a str, name: &str) -> &'a str {
    let found =
        output.lines().find_map(|line| line.trim().strip_prefix(name)?.trim_start().strip_prefix(": "));
    found.unwrap_or_else(|| panic!("mdadm prints no `{name}`:\n{output}"))
}

/// What must be equal of two arrays of one shape, whoever made them.
fn assert_same_fields(sandbox: &Sandbox, ours: &Path, theirs: &Path) {
    let (ours, theirs) = (examine(sandbox, ours), examine(sandbox, theirs));
    let same = ["Layout", "Chunk Size", "Raid Devices", "Array Size", "Used Dev Size", "Avail Dev Size"];
    for name in same.into_iter().chain(["Data Offset", "Super Offset", "Internal Bitmap", "Bad Block Log"]) {
        assert_eq!(field(&ours, name), field(&theirs, name), "{name}");
    }
}

/// One boot: md makes arrays of `layout` on `theirs` members each and fills them; and it assembles those that were made
/// and filled here on `ours` members each, checks that all copies agree, and reads them.
fn exchange(layout: &str, ours: &[usize], theirs: &[usize]) {
    if left_out(&format!("{layout} arrays exchanged with the kernel's md, in a virtual machine")) {
        return;
    }
    let sandbox = Sandbox::new();
    let (mut images, mut made_here) = (Vec::new(), HashMap::new());
    for &n in ours {
        let made = members(&sandbox, &format!("ours{n}"), n);
        create(&sandbox, &made, &format!("--size {MEMBER} --chunk 64K --layout {layout} --name ours{n}"));
        let served = Served::start(&sandbox, &made, "");
        let content = sandbox.join("content");
        pattern(&content, served.size(), n as u64);
        served.fill(&content);
        made_here.insert(n, sha256(&content, served.size()));
        served.stop();
        images.extend(made);
    }
    for &n in theirs {
        for image in members(&sandbox, &format!("md{n}"), n) {
            blank(&image, MEMBER);
            images.push(image);
        }
    }
    // What md's arrays are filled with: as much of it as each holds.
    let source = sandbox.join("source");
    pattern(&source, MEMBER * 4, 99);
    images.push(source.clone());

    let mut script = String::new();
    for &n in ours {
        let mine = guest(&members(&sandbox, &format!("ours{n}"), n));
        write!(
            script,
            "/tools/mdadm --assemble /dev/md{n} {mine}\n\
             echo check > /sys/block/md{n}/md/sync_action\n\
             /tools/mdadm --wait /dev/md{n} || true\n\
             echo RESULT mismatches{n} $(cat /sys/block/md{n}/md/mismatch_cnt)\n\
             echo RESULT state{n} $(cat /sys/block/md{n}/md/array_state) degraded $(cat /sys/block/md{n}/md/degraded)\n\
             echo RESULT sum{n} $(sha256sum < /dev/md{n})\n\
             /tools/mdadm --stop /dev/md{n}\n"
        )
        .expect("a String takes all");
    }
    for &n in theirs {
        let drives = guest(&members(&sandbox, &format!("md{n}"), n));
        write!(
            script,
            "/tools/mdadm --create /dev/md1{n} --run --homehost=any --name=md{n} --metadata=1.2 --level=10 \
             --layout={layout} --chunk=64 --data-offset=1M --bitmap=internal --raid-devices={n} {drives}\n\
             /tools/mdadm --wait /dev/md1{n} || true\n\
             size=$(cat /sys/block/md1{n}/size)\n\
             dd if=/dev/drive/source of=/dev/md1{n} bs=64k count=$((size / 128)) conv=fsync\n\
             echo RESULT sectors{n} $size\n\
             /tools/mdadm --stop /dev/md1{n}\n"
        )
        .expect("a String takes all");
    }
    let output = boot(&sandbox, &drives(&images), &script, LIMIT);
    let told = results(&output);
    let dump = sandbox.join("dump");
    for &n in ours {
        assert_eq!(
            told[format!("mismatches{n}").as_str()],
            "0",
            "copies of our array of {n} differ:\n{output}"
        );
        assert!(told[format!("state{n}").as_str()].ends_with("degraded 0"), "{output}");
        let sum = told[format!("sum{n}").as_str()].split_whitespace().next();
        assert_eq!(sum, Some(made_here[&n].as_str()), "md reads other bytes in our array of {n}");
        // After md had it: mdadm takes every member for clean, and so do we.
        let made = members(&sandbox, &format!("ours{n}"), n);
        for member in &made {
            let shown = examine(&sandbox, member);
            assert!(shown.contains("State : clean") && shown.contains("- correct"), "{shown}");
        }
        let served = Served::start(&sandbox, &made, "");
        served.dump(&dump);
        assert_eq!(sha256(&dump, served.size()), made_here[&n], "our array of {n} after md had it");
        served.stop();
    }
    for &n in theirs {
        let for_md = members(&sandbox, &format!("md{n}"), n);
        let size = told[format!("sectors{n}").as_str()].parse::<u64>().expect("a number") * 512;
        // In another order than their slots: it is the superblock that says which is which.
        let mut shuffled = for_md.clone();
        shuffled.reverse();
        let served = Served::start(&sandbox, &shuffled, "");
        assert_eq!(served.size(), size, "md's array of {n}");
        served.dump(&dump);
        assert_eq!(sha256(&dump, size), sha256(&source, size), "we read other bytes in md's array of {n}");
        served.stop();
        for member in &for_md {
            let shown = examine(&sandbox, member);
            assert!(shown.contains("State : clean") && shown.contains("- correct"), "{shown}");
        }
        if ours.contains(&n) {
            assert_same_fields(&sandbox, &members(&sandbox, &format!("ours{n}"), n)[0], &for_md[0]);
        }
    }
}

#[test]
fn near_2() {
    exchange("n2", &[2, 3, 4, 5, 6], &[2, 3, 4, 5, 6]);
}

#[test]
fn near_3() {
    exchange("n3", &[3, 4, 5, 6], &[3, 4, 5, 6]);
}

#[test]
fn far_2() {
    exchange("f2", &[3, 4, 5, 6], &[3, 4, 5, 6]);
}

#[test]
fn far_3() {
    exchange("f3", &[3, 4, 5, 6], &[3, 4, 5, 6]);
}

#[test]
fn offset_2() {
    exchange("o2", &[3, 4, 5, 6], &[3, 4, 5, 6]);
}

/// mdadm has no words for these, so md gets ours only.
#[test]
fn near_and_far_mixed() {
    exchange("n2f2", &[4, 5, 6], &[]);
}
