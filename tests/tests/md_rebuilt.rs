//! Arrays that have lived here, and md's verdict, in a virtual machine: members failed, came back, were rebuilt on disks
//! that were not blank, replaced, taken over from by a spare, while clients wrote. md assembles what is left with all
//! members in sync and nothing to do, its check finds no mismatch, and it reads what clients wrote.
//!
//! Each layout on 3 to 6 members; one boot a layout.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;
use tests::md::{Array, Legs, guest, superblock};
use tests::process::left_out;
use tests::vm::{boot, drives, results};

/// Many times what the machine needs when it has a core to itself.
const LIMIT: Duration = Duration::from_secs(600);
/// The data area holds 115 chunks and a bit: no multiple of two or three, so that rounding shows.
const MEMBER: u64 = (1 << 20) + 115 * (64 << 10) + 4096;

/// A member fails, clients go on, and another disk takes its place.
fn is_rebuilt(array: &mut Array, slots: &[usize]) {
    let n = array.images().len();
    assert_eq!(array.states(), vec!["in_sync"; n], "{}", array.name());
    assert_ne!(array.status()["state"], "degraded", "{}", array.name());
    for slot in slots {
        array.raid10("fail", &[&slot.to_string()]);
        assert_eq!(array.states()[*slot], "faulty", "{}", array.name());
    }
    assert_eq!(array.status()["state"], "degraded", "{}", array.name());
    array.write_more();
    for slot in slots {
        array.raid10("remove", &[&slot.to_string()]);
        assert_eq!(array.states()[*slot], "missing", "{}", array.name());
    }
    array.write_more();
    for slot in slots {
        let device = array.device(&format!("new{slot}"), MEMBER);
        let said = array.raid10("add", &[device.to_str().expect("plain")]);
        assert!(said.contains(&format!("is being rebuilt in slot {slot}")), "{said}");
    }
    array.write_more();
    array.raid10("wait", &[]);
    assert_eq!(array.states(), vec!["in_sync"; n], "{}", array.name());
    array.write_more();
}

/// A member that works is replaced, and leaves.
fn is_replaced(array: &mut Array, slot: usize) {
    let leaving = array.images()[slot].clone();
    let device = array.device("replacement", MEMBER);
    array.raid10("replace", &[&slot.to_string(), device.to_str().expect("plain")]);
    array.write_more();
    array.until_in_sync(slot, &device);
    array.write_more();
    array.raid10("remove", &[leaving.to_str().expect("plain")]);
    assert!(!array.images().contains(&leaving), "{}", array.name());
    array.write_more();
}

/// A member is away for a while, and is given what it missed.
fn returns(array: &mut Array, slot: usize) {
    let away = array.images()[slot].clone();
    let path = away.to_str().expect("plain");
    array.raid10("fail", &[path]);
    array.write_more();
    array.raid10("remove", &[path]);
    array.write_more();
    assert_eq!(array.status()["state"], "degraded", "{}", array.name());
    let said = array.raid10("add", &[path]);
    assert!(said.contains(&format!("is back in slot {slot}")), "{said}");
    array.write_more();
    array.raid10("wait", &[]);
    array.until_in_sync(slot, &away);
    array.write_more();
}

/// A spare takes over by itself.
fn is_taken_over(array: &mut Array, slot: usize) {
    let device = array.device("spare", MEMBER);
    let said = array.raid10("add", &[device.to_str().expect("plain")]);
    assert!(said.contains("is a spare"), "{said}");
    let failed = array.images()[slot].clone();
    array.raid10("fail", &[&slot.to_string()]);
    array.write_more();
    array.until_in_sync(slot, &device);
    array.raid10("remove", &[failed.to_str().expect("plain")]);
    array.write_more();
}

/// An array of `n` members, each of which has a past; stopped. And its images.
fn life(layout: &str, n: usize) -> (Array, Vec<PathBuf>) {
    let name = format!("{layout}x{n}");
    let mut array = Array::create(&name, layout, n, MEMBER, "--bitmap-chunk 64K", "");
    // A third is left to those who write here and there: what nobody ever wrote is to be zeroes on new disks, too.
    array.fill(array.served().size() / 3 * 2 / 4096 * 4096);
    is_rebuilt(&mut array, &[1]);
    match n {
        // What was just rebuilt is the source now.
        3 if layout.ends_with('2') => is_rebuilt(&mut array, &[0]),
        3 => is_rebuilt(&mut array, &[0, 2]),
        4 => is_replaced(&mut array, 2),
        5 => returns(&mut array, 3),
        _ => is_taken_over(&mut array, 4),
    }
    array.assert_content();
    let images = array.images();
    array.stop();
    for image in &images {
        let found = superblock(image);
        assert!(found.is_clean() && found.holds_everything(), "{}: {found:?}", image.display());
    }
    (array, images)
}

fn rebuilt(layout: &str) {
    if left_out(&format!("{layout} arrays rebuilt here and judged by the kernel's md, in a virtual machine"))
    {
        return;
    }
    let lives: Vec<(Array, Vec<PathBuf>)> = (3..=6).map(|n| life(layout, n)).collect();
    let mut script = String::new();
    for (at, (_, images)) in lives.iter().enumerate() {
        let n = images.len();
        write!(
            script,
            "/tools/mdadm --assemble /dev/md{n} {}\n\
             cd /sys/block/md{n}/md\n\
             echo RESULT states{n} $(cat dev-*/state) degraded $(cat degraded) action $(cat sync_action)\n\
             echo check > sync_action\n\
             until [ $(cat sync_action) = idle ]; do usleep 50000; done\n\
             echo RESULT mismatches{n} $(cat mismatch_cnt)\n\
             echo RESULT sum{n} $(sha256sum < /dev/md{n})\n\
             cd /\n\
             /tools/mdadm --stop /dev/md{n}\n",
            guest(images)
        )
        .expect("a String takes all");
        if at == 0 {
            // That md's check would find something: one page of a rebuilt member is made wrong.
            let legs = Legs::of(images);
            let page = (legs.start() + legs.place(3, 0).at.0) / 4096;
            let leg = guest(&images[legs.place(3, 0).slot.0..][..1]);
            write!(
                script,
                "dd if={leg} of=/tmp/page bs=4096 skip={page} count=1\n\
                 dd if=/dev/urandom of={leg} bs=4096 seek={page} count=1 conv=fsync\n\
                 /tools/mdadm --assemble /dev/md{n} {}\n\
                 echo check > /sys/block/md{n}/md/sync_action\n\
                 until [ $(cat /sys/block/md{n}/md/sync_action) = idle ]; do usleep 50000; done\n\
                 echo RESULT planted $(cat /sys/block/md{n}/md/mismatch_cnt)\n\
                 /tools/mdadm --stop /dev/md{n}\n\
                 dd if=/tmp/page of={leg} bs=4096 seek={page} count=1 conv=fsync\n",
                guest(images)
            )
            .expect("a String takes all");
        }
    }
    let all: Vec<PathBuf> = lives.iter().flat_map(|(_, images)| images.clone()).collect();
    let output = boot(&lives[0].0.sandbox, &drives(&all), &script, LIMIT);
    let told = results(&output);
    assert_ne!(told["planted"], "0", "md's check finds nothing:\n{output}");
    for (mut array, images) in lives {
        let (n, name) = (images.len(), array.name().to_owned());
        let whole = format!("{}degraded 0 action idle", "in_sync ".repeat(n));
        assert_eq!(told[format!("states{n}").as_str()], whole, "{name}:\n{output}");
        assert_eq!(told[format!("mismatches{n}").as_str()], "0", "{name}: copies differ:\n{output}");
        let sum = told[format!("sum{n}").as_str()].split_whitespace().next();
        assert_eq!(sum, Some(array.sum().as_str()), "{name}: md reads other bytes");
        // And back here.
        array.serve(&images, "");
        assert_eq!(array.states(), vec!["in_sync"; n], "{name} after md had it");
        array.assert_content();
        array.stop();
    }
}

#[test]
fn near_2() {
    rebuilt("n2");
}

#[test]
fn near_3() {
    rebuilt("n3");
}

#[test]
fn far_2() {
    rebuilt("f2");
}

#[test]
fn far_3() {
    rebuilt("f3");
}

#[test]
fn offset_2() {
    rebuilt("o2");
}
