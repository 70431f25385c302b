//! What a replacement is filled from, on simulated disks: the member that leaves, as long as that works, and other
//! copies of what it cannot read.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use parking_lot::Mutex;
use raid::error::Operation;
use raid::geometry::Layout;
use raid::orders::MemberName;
use raid::status::MemberState;
use raid::volume::Volume;
use rustix::io::Errno;
use std::sync::Arc;
use std::time::Duration;
use tests::sim::array::{DATA, Rig, Shape};
use tests::sim::clients::Step;
use tests::sim::{Fault, SECTOR, SimDisk, SimDiskOptions};

/// The slot whose member is replaced: not the first, which others are filled from.
const LEAVING: usize = 1;
/// Bytes of data on a member: several windows of a rebuild.
const USED: u64 = 8 << 20;

/// An array of steady disks and a blank one, all of it written.
fn rig(layout: Layout, members: usize) -> Rig {
    let disks = SimDiskOptions { stragglers: 0, ..SimDiskOptions::default() };
    let (chunk, region) = (64 << 10, 1 << 20);
    let shape =
        Shape { blanks: 1, chunk, chunks: USED / chunk, region, disks, ..Shape::small(layout, members) };
    let rig = Rig::create(shape, 1);
    let sectors = rig.shape.size() / SECTOR;
    rig.sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&rig.slots())).await.unwrap();
            for at in (0..sectors).step_by(1024) {
                assert!(rig.witness.step(&*volume, Step::Write(at, 1024.min(sectors - at))).await);
            }
            volume.stop().await.unwrap();
        })
        .unwrap();
    rig
}

/// Reads that the disks were asked for so far.
fn reads(disks: &[Arc<SimDisk>]) -> Vec<u64> {
    disks.iter().map(|disk| disk.counts().reads).collect()
}

/// Replaces a member, waits until its successor holds its slot, and compares what they hold. Returns how often each
/// disk was read for that, and how many read errors the member that left has.
fn replace(rig: &Rig, meanwhile: impl FnMut() + Send + 'static) -> (Vec<u64>, u64) {
    let new = rig.shape.members;
    let found = rig
        .sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&rig.slots())).await.unwrap();
            let name: MemberName = LEAVING.to_string().parse().unwrap();
            let before = reads(&rig.disks);
            let mut meanwhile = meanwhile;
            rig.sim.watch(Some(Box::new(move |_| meanwhile())));
            volume.replace(&name, rig.plug_one(new)).await.unwrap();
            until(rig, &volume, |volume| {
                let status = volume.status();
                let its = |disk: usize| status.members.iter().find(|one| one.path == rig.disks[disk].name());
                let is_in =
                    its(new).is_some_and(|one| one.slot == Some(LEAVING) && one.state == MemberState::InSync);
                is_in && its(LEAVING).is_some_and(|one| one.state == MemberState::Faulty)
            })
            .await;
            rig.sim.watch(None);
            let counts = reads(&rig.disks).iter().zip(before).map(|(now, before)| now - before).collect();
            let status = volume.status();
            let left = status.members.iter().find(|one| one.path == rig.disks[LEAVING].name()).unwrap();
            rig.witness.read_all(&*volume).await;
            volume.stop().await.unwrap();
            (counts, left.read_errors)
        })
        .unwrap();
    rig.witness.judge();
    rig.disks[LEAVING].heal();
    assert!(
        rig.disks[new].try_peek(DATA, USED).is_some_and(|bytes| bytes == rig.disks[LEAVING].peek(DATA, USED)),
        "the new member does not hold what the old one held"
    );
    // The power goes, and the old one is gone: the new one is as good.
    rig.cut();
    let mut members = rig.without(&[LEAVING]);
    members.push(new);
    assert!(rig.check_with(&members).contains(&(new, LEAVING)));
    found
}

async fn until(rig: &Rig, volume: &Volume, what: impl Fn(&Volume) -> bool) {
    for _ in 0..600 {
        if what(volume) {
            return;
        }
        rig.sim.runtime().sleep(Duration::from_secs(1)).await;
    }
    panic!("it did not come to that within ten minutes: {:?}", volume.status());
}

#[test]
fn it_is_filled_from_the_member_that_leaves() {
    let layouts = [(Layout::near(2), 2), (Layout::near(2), 3), (Layout::near(3), 4), (Layout::far(2), 3)];
    for (layout, members) in layouts {
        let rig = rig(layout, members);
        let (reads, errors) = replace(&rig, || {});
        for (disk, count) in reads.into_iter().enumerate().take(members) {
            // Window by window, in one piece each.
            let expected = if disk == LEAVING { USED >> 20 } else { 0 };
            assert_eq!(count, expected, "{layout:?} of {members}: reads of disk {disk}");
        }
        assert_eq!(errors, 0);
    }
}

#[test]
fn what_the_leaving_member_cannot_read_comes_from_another() {
    for (layout, members) in [(Layout::near(2), 3), (Layout::near(3), 3), (Layout::offset(2), 4)] {
        let rig = rig(layout, members);
        let bad = DATA + (5 << 20) + 7 * SECTOR;
        rig.disks[LEAVING].decay(bad..bad + SECTOR);
        let (reads, errors) = replace(&rig, || {});
        assert!(errors > 0, "it was not asked");
        assert!(reads[LEAVING] > USED >> 20, "all of the rest is read from it: {reads:?}");
        let others: u64 = (0..members).filter(|disk| *disk != LEAVING).map(|disk| reads[disk]).sum();
        assert_eq!(others, 1, "one sector is read from one other member: {reads:?}");
    }
}

/// It fails every read from some moment on, or is taken out of the array, while its successor is being filled.
#[test]
fn when_the_leaving_member_fails_the_others_fill_its_successor() {
    for is_gone in [false, true] {
        let rig = rig(Layout::near(2), 3);
        let (disk, begun) = (Arc::clone(&rig.disks[LEAVING]), rig.disks[LEAVING].counts());
        let fault = Fault { errno: Errno::IO, ..Fault::lasting(&[Operation::Read]) };
        let struck = Arc::new(Mutex::new(false));
        let note = Arc::clone(&struck);
        let (reads, _) = replace(&rig, move || {
            let mut struck = note.lock();
            if !*struck && disk.counts().reads > begun.reads + 5 {
                *struck = true;
                if is_gone {
                    disk.hang();
                } else {
                    disk.fail(fault.clone());
                }
            }
        });
        assert!(*struck.lock(), "it failed in the middle");
        assert!(reads[LEAVING] > 2, "{reads:?}");
        assert!(
            reads[0] > 0 && reads[2] > 0,
            "near copies of three: each of the others has a half: {reads:?}"
        );
    }
}

/// Where copies may differ, the first in slot order counts for all, the new member among them.
#[test]
fn what_may_differ_comes_from_the_copy_that_counts() {
    for seed in 0..20 {
        let template = rig(Layout::near(2), 2);
        let unclean = Rig::create(Shape { clean: false, ..template.shape.clone() }, seed);
        for (slot, disk) in unclean.disks.iter().take(2).enumerate() {
            disk.poke(DATA, &vec![slot as u8 + 1; USED as usize]);
        }
        unclean
            .sim
            .block_on(async {
                let volume = unclean.assemble(unclean.plug(&[0, 1])).await.unwrap();
                let name: MemberName = LEAVING.to_string().parse().unwrap();
                volume.replace(&name, unclean.plug_one(2)).await.unwrap();
                until(&unclean, &volume, |volume| {
                    let status = volume.status();
                    let all = status.members.iter().filter(|one| one.state == MemberState::InSync);
                    all.count() == 2 && status.members.iter().any(|one| one.state == MemberState::Faulty)
                })
                .await;
                volume.stop().await.unwrap();
            })
            .unwrap();
        let (first, new) = (unclean.disks[0].peek(DATA, USED), unclean.disks[2].peek(DATA, USED));
        assert!(first == new, "seed {seed}: the two members in sync differ");
    }
}
