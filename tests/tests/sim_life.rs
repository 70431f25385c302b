//! The life of an array on simulated disks, by chance: an administrator fails, removes, adds and replaces members while
//! clients work, disks fail and the power goes, boot after boot. Judged by the register model.
//!
//! `SIM_SEEDS=20000 cargo test -p tests --test sim_life` runs more than the everyday number.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use futures_util::future::join;
use raid::device::{Device, Durability};
use raid::error::{Error, Operation};
use raid::geometry::Layout;
use raid::status::{MemberState, SyncAction};
use raid::superblock::Superblock;
use raid::volume::Volume;
use rustix::io::Errno;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tests::sim::array::{BITMAP, DATA, Holders, Rig, SUPERBLOCK, Shape};
use tests::sim::bugs::{Bug, Plant};
use tests::sim::clients::{Step, Workload};
use tests::sim::orders::{Order, is_refusal};
use tests::sim::{CutStyle, Fault, Rng, SECTOR, SimDiskOptions, for_seeds};

fn template(layout: Layout, members: usize) -> Rig {
    let disks = SimDiskOptions { instant: 300, ..SimDiskOptions::default() };
    Rig::create(Shape { chunks: 12, region: 8192, blanks: 2, disks, ..Shape::small(layout, members) }, 1)
}

/// What an administrator does next. Where disks are made to fail (`victims`), only those slots are touched: of the
/// others every copy is needed.
fn draw_order(rig: &Rig, rng: &mut Rng) -> Order {
    let slots = if rig.victims.is_empty() { rig.slots() } else { rig.victims.clone() };
    let slot = *rng.pick(&slots);
    let disk = rng.below(rig.disks.len() as u64) as usize;
    let blank = rig.shape.members + rng.below(rig.shape.blanks as u64) as usize;
    match rng.below(12) {
        0..3 => Order::Fail(slot),
        3..5 => Order::Readd(slot),
        5 => Order::Readd(disk),
        6..8 => Order::Add(blank),
        8..10 => Order::Replace(slot, blank),
        10 => Order::Rest,
        _ => Order::Rebuilt,
    }
}

async fn administer(rig: &Rig, volume: &Volume, orders: &[(u64, Order)]) {
    for (pause, order) in orders {
        rig.sim.runtime().sleep(Duration::from_micros(*pause)).await;
        if let Err(error) = rig.order(volume, *order).await {
            // A disk that is made to fail may fail in the middle of an order, too.
            let excused =
                !rig.victims.is_empty() && matches!(error, Error::Io { .. } | Error::JoinFailed { .. });
            assert!(excused || is_refusal(&error), "{order:?}: {error}");
        }
    }
}

/// One boot, from disks that the array can start from; ends in a stop, in a wait, or however the power goes.
fn boot(rig: &Rig, rng: &mut Rng, current: &Holders, decayed: &mut Vec<usize>) {
    let mut disks = rig.members();
    if rig.victims.is_empty() {
        // Any disk may be missing for once, as long as those in sync are enough without it.
        for disk in disks.clone() {
            let left: Vec<usize> = disks.iter().copied().filter(|one| *one != disk).collect();
            let slots: Vec<usize> = current
                .iter()
                .filter(|(one, _)| left.contains(one) && rig.knows_that_it_counts(*one))
                .map(|(_, slot)| *slot)
                .collect();
            if rng.one_in(1, 6) && rig.covers(&slots) {
                disks = left;
            }
        }
    }
    for victim in &rig.victims {
        rig.disks[*victim].heal();
        match rng.below(4) {
            0 => disks.retain(|disk| disk != victim),
            1 => {}
            _ => afflict(rig, *victim, rng, decayed),
        }
    }
    rng.shuffle(&mut disks);
    let style = *rng.pick(&[CutStyle::Chance, CutStyle::Chance, CutStyle::AllLost, CutStyle::ProcessKilled]);
    rig.sim.set_cut_style(style);
    rig.sim.cut_after(rng.one_in(3, 4).then(|| rng.within(1..900)));
    let load = Workload { clients: 2, operations: 15, longest: 20, span: rig.shape.size() / SECTOR };
    let orders: Vec<_> = (0..rng.below(7)).map(|_| (rng.below(30_000), draw_order(rig, rng))).collect();
    let stop = rng.one_in(1, 3);
    let run = async {
        let Some(volume) = rig.start(rig.plug(&disks)).await else { return };
        let device: Arc<dyn Device> = Arc::<Volume>::clone(&volume);
        let runtime = rig.sim.runtime();
        let work = rig.witness.run(&device, &runtime, rng, &load);
        join(work, administer(rig, &volume, &orders)).await;
        if stop {
            volume.stop().await.unwrap();
        } else {
            runtime.sleep(Duration::from_secs(12)).await;
        }
    };
    rig.end(&rig.sim.block_on(run), style);
}

fn afflict(rig: &Rig, victim: usize, rng: &mut Rng, decayed: &mut Vec<usize>) {
    let disk = &rig.disks[victim];
    let writes = [Operation::Write, Operation::WriteZeroes];
    let spare = rng.below(80) as u32;
    let block = DATA + rng.below(rig.shape.chunks * rig.shape.chunk / SECTOR) * SECTOR;
    match rng.below(8) {
        0 => disk.fail(Fault { spare, ..Fault::once(&writes) }),
        1 => disk.fail(Fault { spare, ..Fault::lasting(&writes) }),
        2 => disk.fail(Fault { spare, ..Fault::once(&[Operation::Flush]) }),
        3 => disk.fail(Fault { spare, ..Fault::lasting(&[Operation::Read]) }),
        // Some blocks only: what can't be written there is listed as bad, or the member goes.
        4 => disk.fail(Fault { within: block..block + SECTOR, ..Fault::lasting(&writes) }),
        5 => {
            decayed.push(victim);
            disk.decay(block..block + SECTOR);
        }
        6 => disk.vanish(),
        _ => disk.slow(Duration::from_millis(30)),
    }
}

fn run(template: &Rig, seed: u64, plant: Option<&Plant>) {
    let mut rig = template.fork(seed);
    let mut rng = rig.sim.fork_rng();
    rig.plant = plant.cloned();
    if rng.one_in(1, 2) && plant.is_none() {
        rig.victims = rig.choose_victims(&mut rng);
    }
    let tracked = rig.track();
    let mut decayed = Vec::new();
    for _ in 0..rng.within(1..5) {
        let current = tracked.lock().clone();
        boot(&rig, &mut rng, &current, &mut decayed);
    }
    rig.plant = None;
    finale(&rig, &mut rng, &decayed);
}

/// Reads everything from all disks, then again after each loss that the array must bear: of any disks, as long as those
/// that it calls in sync cover everything without them.
fn finale(rig: &Rig, rng: &mut Rng, decayed: &[usize]) {
    for disk in &rig.disks {
        disk.heal();
    }
    rig.sim.watch(None);
    rig.sim.cut_after(None);
    rig.sim.set_cut_style(CutStyle::AllLost);
    let mut disks = rig.members();
    rng.shuffle(&mut disks);
    let mut in_sync = rig.check_with(&disks);
    if rng.one_in(1, 2) {
        // Whoever is being filled gets the time for it.
        rig.sim.idle(Duration::from_secs(30)).unwrap();
        rig.cut();
        in_sync = rig.check_with(&disks);
    }
    rig.cut();
    // What a member calls in sync may still have sectors that can't be read, where the test saw to that, or that are
    // listed as bad.
    in_sync.retain(|(disk, _)| !decayed.contains(disk) && !lists_bad_blocks(rig, *disk));
    in_sync.retain(|(disk, _)| rig.knows_that_it_counts(*disk));
    for bits in 1..1u64 << disks.len() {
        let left: Vec<usize> =
            disks.iter().enumerate().filter(|(at, _)| bits >> at & 1 == 0).map(|(_, disk)| *disk).collect();
        let holders = in_sync.iter().filter(|(disk, _)| left.contains(disk));
        if rig.covers(&holders.map(|(_, slot)| *slot).collect::<Vec<_>>()) {
            rig.fork(rng.draw()).check_with(&left);
        }
    }
}

fn lists_bad_blocks(rig: &Rig, disk: usize) -> bool {
    let bytes = rig.disks[disk].peek(SUPERBLOCK.start, SUPERBLOCK.end - SUPERBLOCK.start);
    let superblock = Superblock::decode(&bytes, rig.disks[disk].size());
    superblock.is_ok_and(|superblock| superblock.bad_block_log.is_some_and(|log| log.in_use))
}

fn campaign(name: &str, shapes: &[(Layout, usize)], count: u64) {
    let templates: Vec<Rig> = shapes.iter().map(|(layout, members)| template(*layout, *members)).collect();
    for_seeds(&format!("sim_life::{name}"), count, |seed| {
        run(&templates[seed as usize % templates.len()], seed, None);
    });
}

#[test]
fn near_copies() {
    campaign("near_copies", &[(Layout::near(2), 2), (Layout::near(2), 4), (Layout::near(2), 3)], 240);
}

#[test]
fn far_and_offset_copies() {
    let shapes = [(Layout::far(2), 4), (Layout::offset(2), 4), (Layout::far(2), 3), (Layout::offset(2), 3)];
    campaign("far_and_offset_copies", &shapes, 160);
}

#[test]
fn three_copies() {
    campaign("three_copies", &[(Layout::near(3), 3), (Layout::far(3), 4)], 80);
}

#[test]
fn the_same_seed_is_the_same_run() {
    let template = template(Layout::near(2), 4);
    let trace = |seed| {
        let rig = template.fork(seed);
        let mut rng = rig.sim.fork_rng();
        boot(&rig, &mut rng, &Vec::new(), &mut Vec::new());
        rig.sim.trace()
    };
    for seed in 0..10 {
        assert_eq!(trace(seed), trace(seed), "seed {seed} ran differently the second time");
    }
}

#[test]
fn every_planted_bug_is_caught() {
    let data = DATA..u64::MAX;
    let on = |disk, bug| Plant { bug, disk: Some(disk) };
    let on_all = |bug| Plant { bug, disk: None };
    let newcomer = 2;
    let plants = [
        // The target of a rebuild: its flush is dropped, its checkpoints come before its data, its data goes astray.
        on(newcomer, Bug::DropFlushes),
        on(newcomer, Bug::FlushLater),
        on(newcomer, Bug::DropWrites(data.clone())),
        on(newcomer, Bug::WriteLater(data.clone())),
        on(newcomer, Bug::CutWritesShort(data.clone())),
        on(newcomer, Bug::ShiftWrites(data.clone(), 4096)),
        on(newcomer, Bug::DropZeroes),
        // The source of a rebuild answers with what once was.
        on(1, Bug::StaleReads(data)),
        // Failures and newcomers that are not put on record, on one member or on all.
        on(1, Bug::DropWrites(SUPERBLOCK)),
        on_all(Bug::RepeatWrites(SUPERBLOCK)),
        on_all(Bug::WriteLater(SUPERBLOCK)),
        // Bits that are cleared before what they stand for is durable, or are never set.
        on_all(Bug::ClearFrom(BITMAP, 256)),
    ];
    let template = template(Layout::near(2), 2);
    for plant in plants {
        let caught = (0..800).find(|seed| {
            std::panic::catch_unwind(AssertUnwindSafe(|| run(&template, *seed, Some(&plant)))).is_err()
        });
        println!("{plant:?}: seed {caught:?}");
        assert!(caught.is_some(), "{plant:?} was not caught");
    }
}

/// A full disk is the client's error: nobody is taken out, reads go on, and the legs agree whichever is lost.
#[test]
fn a_full_disk_is_an_error_and_nothing_else() {
    let template = template(Layout::near(2), 2);
    for_seeds("sim_life::a_full_disk_is_an_error_and_nothing_else", 60, |seed| {
        let rig = template.fork(seed);
        let full: &[usize] = [&[0usize][..], &[1], &[0, 1]][seed as usize % 3];
        let write = async |volume: &Volume| {
            assert!(rig.witness.step(volume, Step::WriteStable(0, 16)).await);
            for disk in full {
                let writes = [Operation::Write, Operation::WriteZeroes];
                let within = DATA..u64::MAX;
                rig.disks[*disk].fail(Fault { within, errno: Errno::NOSPC, ..Fault::lasting(&writes) });
            }
            let data = vec![7; SECTOR as usize].into();
            let refused = volume.write(20 * SECTOR, data, Durability::Cached).await;
            assert!(matches!(refused, Err(Error::Io { errno: Errno::NOSPC, .. })), "{refused:?}");
            rig.witness.excuse_errors(true);
            rig.witness.step(volume, Step::Write(4, 8)).await;
            rig.witness.excuse_errors(false);
            assert!(rig.witness.step(volume, Step::Read(0, 16)).await);
            let status = volume.status();
            assert!(status.members.iter().all(|member| member.state == MemberState::InSync), "{status:?}");
        };
        rig.sim.block_on(async { write(&*rig.assemble(rig.plug(&[0, 1])).await.unwrap()).await }).unwrap();
        rig.witness.judge();
        rig.cut();
        rig.disks.iter().for_each(|disk| disk.heal());
        if full.len() == 2 {
            // Neither leg could be made like the other: which one counts after a cut is open.
            return;
        }
        // The write past the model's back may have reached its place.
        rig.sim
            .block_on(async {
                let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
                assert!(rig.witness.step(&*volume, Step::WriteStable(20, 1)).await);
            })
            .unwrap();
        rig.cut();
        rig.check_with(&[0, 1]);
        rig.cut();
        for alone in [0, 1] {
            rig.fork(seed).check_with(&[alone]);
        }
    });
}

/// Each half of a mirror was started and written without the other: nobody can say which is wanted.
#[test]
fn halves_that_ran_apart_are_refused_and_each_still_starts_alone() {
    let template = template(Layout::near(2), 2);
    for seed in 0..40 {
        let rig = template.fork(seed);
        let alone = |rig: &Rig, disk: usize, at: u64| {
            rig.sim
                .block_on(async {
                    let volume = rig.assemble(rig.plug(&[disk])).await.unwrap();
                    assert!(rig.witness.step(&*volume, Step::WriteStable(at, 4)).await);
                    if seed % 2 == 0 {
                        volume.stop().await.unwrap();
                    }
                })
                .unwrap();
            rig.cut();
        };
        let other = rig.fork(seed + 1000);
        alone(&rig, 0, 0);
        alone(&other, 1, 8);
        let joined = rig.with_disks(seed, [rig.disks[0].copy(), other.disks[1].copy()], rig.witness.fork());
        let refused = joined.sim.block_on(joined.assemble(joined.plug(&[0, 1]))).unwrap();
        assert!(
            matches!(refused, Err(Error::Diverged { .. })),
            "seed {seed}: {:?}",
            refused.map(|v| v.status())
        );
        joined.check_with(&[0]);
        other.check_with(&[1]);
    }
}

/// A member that missed writes returns: it is not read, whatever it says of itself.
#[test]
fn a_stale_member_that_returns_is_not_read() {
    for (layout, members) in [(Layout::near(2), 2), (Layout::far(2), 3), (Layout::offset(2), 4)] {
        let template = template(layout, members);
        for seed in 0..30 {
            let rig = template.fork(seed);
            rig.sim
                .block_on(async {
                    let volume = rig.assemble(rig.plug(&rig.without(&[0]))).await.unwrap();
                    assert!(rig.witness.step(&*volume, Step::WriteStable(0, 24)).await);
                    if seed % 2 == 0 {
                        volume.stop().await.unwrap();
                    }
                })
                .unwrap();
            rig.cut();
            let in_sync = rig.check_with(&rig.slots());
            assert!(in_sync.iter().all(|(disk, _)| *disk != 0), "seed {seed}: it counts without a rebuild");
            rig.cut();
            rig.check_with(&rig.slots());
        }
    }
}

/// `raid10 add` and then `raid10 wait`: whoever asks what is under way is told of a rebuild before it has begun, and
/// between that of one member and that of the next.
#[test]
fn a_member_that_waits_to_be_filled_is_under_way() {
    for_seeds("sim_life::a_member_that_waits_to_be_filled_is_under_way", 20, |seed| {
        let rig = template(Layout::near(2), 4).fork(seed);
        let runtime = rig.sim.runtime();
        let run = async {
            let volume = rig.start(rig.plug(&rig.slots())).await.unwrap();
            for order in [Order::Fail(0), Order::Fail(2), Order::Add(4), Order::Add(5)] {
                rig.order(&volume, order).await.unwrap();
            }
            loop {
                let status = volume.status();
                if status.members.iter().all(|member| member.state != MemberState::Rebuilding) {
                    break;
                }
                assert_ne!(status.sync.action, SyncAction::Idle, "{status:?}");
                runtime.sleep(Duration::from_micros(10)).await;
            }
            volume.stop().await.unwrap();
        };
        rig.end(&rig.sim.block_on(run), CutStyle::AllLost);
    });
}
