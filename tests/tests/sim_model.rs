//! The model against plain simulated disks: they keep the vocabulary's promises, so it must never complain; and
//! against disks with planted bugs, each of which it must catch.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use raid::device::Device;
use raid::error::Operation;
use std::sync::Arc;
use tests::sim::bugs::{Bug, Buggy};
use tests::sim::clients::{Step, Witness, Workload};
use tests::sim::registers::{Registers, Violation, payload};
use tests::sim::{CutStyle, Fault, SECTOR, Sim, SimDiskOptions, for_seeds};

const SECTORS: u64 = 64;

/// Three boots with random clients and a power cut between them; what the model says in the end.
fn run(seed: u64, options: &SimDiskOptions, bug: Option<&Bug>) -> Option<Violation> {
    let sim = Sim::new(seed);
    let harsh = options.torn > 0;
    let disk = sim.disk("d", SECTORS * SECTOR, options.clone());
    let witness = Witness::new(SECTORS, harsh);
    // A lone disk passes its errors on; what they leave behind is judged none the less.
    witness.excuse_errors(!matches!(bug, Some(Bug::FailReads(_))));
    let load = Workload { clients: 4, operations: 25, longest: 8, span: SECTORS / 2 };
    let mut rng = sim.fork_rng();
    for _ in 0..3 {
        let runtime = sim.runtime();
        let mut device: Arc<dyn Device> = sim.plug(&disk);
        if let Some(bug) = bug {
            device = Buggy::plant(device, bug.clone(), &runtime);
        }
        if rng.one_in(1, 2) {
            let operations = [Operation::Write, Operation::Flush, Operation::WriteZeroes];
            disk.fail(Fault { spare: rng.below(20) as u32, ..Fault::once(&operations) });
        }
        sim.cut_after(Some(rng.within(1..250)));
        let style = if rng.one_in(1, 5) { CutStyle::ProcessKilled } else { CutStyle::Chance };
        sim.set_cut_style(style);
        let clients = async {
            witness.read_all(&*device).await;
            witness.run(&device, &runtime, &mut rng, &load).await;
            witness.read_all(&*device).await;
        };
        if sim.block_on(clients).is_ok() {
            sim.cut_now();
        }
        match style {
            CutStyle::ProcessKilled => witness.process_killed(),
            _ => witness.power_cut(),
        }
    }
    let device = sim.plug(&disk);
    for _ in 0..2 {
        sim.block_on(witness.read_all(&*device)).unwrap();
    }
    witness.violation()
}

#[test]
fn a_good_disk_is_never_accused() {
    for_seeds("sim_model::a_good_disk_is_never_accused", 300, |seed| {
        if let Some(violation) = run(seed, &SimDiskOptions::default(), None) {
            panic!("{violation}");
        }
    });
}

#[test]
fn a_harsh_disk_is_never_accused() {
    for_seeds("sim_model::a_harsh_disk_is_never_accused", 300, |seed| {
        if let Some(violation) = run(seed, &SimDiskOptions::harsh(), None) {
            panic!("{violation}");
        }
    });
}

#[test]
fn every_planted_bug_is_caught() {
    let everywhere = 0..u64::MAX;
    let bugs = [
        Bug::DropFlushes,
        Bug::FlushLater,
        Bug::RetryFlushes,
        Bug::IgnoreStable,
        Bug::DropWrites(0..8 * SECTOR),
        Bug::WriteLater(everywhere.clone()),
        Bug::SwallowErrors,
        Bug::CutWritesShort(everywhere.clone()),
        Bug::ShiftWrites(0..8 * SECTOR, 2 * SECTOR),
        Bug::StaleReads(everywhere.clone()),
        Bug::DropZeroes,
        Bug::DiscardTooMuch,
        Bug::DiscardUnsettled,
        Bug::FailReads(0..8 * SECTOR),
    ];
    for bug in bugs {
        let caught = (0..300).find(|seed| run(*seed, &SimDiskOptions::default(), Some(&bug)).is_some());
        println!("{bug:?}: seed {caught:?}");
        assert!(caught.is_some(), "{bug:?} was not caught in 300 runs");
    }
}

#[test]
fn the_same_seed_is_the_same_verdict() {
    for seed in 0..20 {
        let verdict = || run(seed, &SimDiskOptions::harsh(), Some(&Bug::DropFlushes)).map(|v| v.to_string());
        assert_eq!(verdict(), verdict());
    }
}

/// What the model permits a sector to be after a script, found by asking it.
fn permits(registers: &Registers, write: u64) -> bool {
    let mut registers = registers.clone();
    let token = registers.begin_read(0..1);
    let seen = if write == 0 { vec![0; SECTOR as usize].into() } else { payload(write, 0, 1) };
    registers.end_read(&token, &seen).is_ok()
}

#[test]
fn a_register_permits_exactly_what_it_should() {
    let mut registers = Registers::zeroed(1, false);
    let first = registers.begin_write(0, &payload(1, 0, 1));
    assert_eq!([0, 1, 2].map(|w| permits(&registers, w)), [true, true, false], "in flight: old or new");
    registers.end_write(&first, true, false);
    assert_eq!([0, 1].map(|w| permits(&registers, w)), [false, true], "answered: new");
    let second = registers.begin_write(0, &payload(2, 0, 1));
    let third = registers.begin_write(0, &payload(3, 0, 1));
    registers.end_write(&second, true, false);
    registers.end_write(&third, true, false);
    assert_eq!([1, 2, 3].map(|w| permits(&registers, w)), [false, true, true], "they overlapped: either");
    let mut cut = registers.clone();
    cut.power_cut();
    assert_eq!([0, 1, 2, 3].map(|w| permits(&cut, w)), [true; 4], "none of them was flushed");
    let token = registers.begin_read(0..1);
    registers.end_read(&token, &payload(3, 0, 1)).unwrap();
    assert_eq!([2, 3].map(|w| permits(&registers, w)), [false, true], "the first read settled it");
    let flush = registers.begin_flush();
    let fourth = registers.begin_write(0, &payload(4, 0, 1));
    registers.end_write(&fourth, true, false);
    registers.end_flush(&flush, true);
    registers.power_cut();
    assert_eq!([0, 1, 2, 3, 4].map(|w| permits(&registers, w)), [false, false, false, true, true]);
    let token = registers.begin_read(0..1);
    registers.end_read(&token, &payload(3, 0, 1)).unwrap();
    registers.power_cut();
    assert_eq!([3, 4].map(|w| permits(&registers, w)), [true, false], "settled for good");
    let discard = registers.begin_discard(0..1);
    registers.end_write(&discard, true, false);
    assert!(permits(&registers, 99), "anything");
    let token = registers.begin_read(0..1);
    registers.end_read(&token, &payload(99, 0, 1)).unwrap();
    assert_eq!([98, 99].map(|w| permits(&registers, w)), [false, true], "but one thing");
    let failed = registers.begin_write(0, &payload(5, 0, 1));
    registers.end_write(&failed, false, true);
    assert_eq!([99, 5].map(|w| permits(&registers, w)), [true, true], "failed: old or new");
}

#[test]
fn a_stable_write_outlives_a_cut_in_the_model() {
    let sim = Sim::new(0);
    let disk = sim.disk("d", SECTORS * SECTOR, SimDiskOptions::default());
    let witness = Witness::new(SECTORS, false);
    let device = sim.plug(&disk);
    sim.block_on(async {
        assert!(witness.step(&*device, Step::WriteStable(0, 4)).await);
        assert!(witness.step(&*device, Step::Flush).await);
    })
    .unwrap();
    sim.set_cut_style(CutStyle::AllLost);
    sim.cut_now();
    witness.power_cut();
    // As if the disk had lost it after all.
    disk.poke(0, &[0; SECTOR as usize]);
    sim.block_on(witness.read_all(&*sim.plug(&disk))).unwrap();
    assert_eq!(witness.violation().unwrap().sector, 0);
}
