//! The RAID engine, without chance: every short sequence of operations on a tiny array, the power cut at every I/O
//! boundary, every set of unflushed sectors that can survive, and then every start that must work.
//!
//! Everyday runs take sequences of up to two operations and at most [`SUBSETS`] sets of survivors at a boundary
//! (all, where there are no more). `SIM_DEPTH=3` and `SIM_SUBSETS=4096` go further.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use futures_util::future::join_all;
use raid::error::Operation;
use tests::sim::array::{BITMAP, DATA, Rig, SUPERBLOCK, Shape};
use tests::sim::bugs::{Bug, Buggy};
use tests::sim::clients::Step;
use tests::sim::{CutStyle, Fault, Rng, SimDiskOptions, number};

/// Sets of surviving sectors tried at a boundary, unless `SIM_SUBSETS` says otherwise.
const SUBSETS: u64 = 6;

/// One operation of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    /// What a client does.
    Do(Step),
    /// The member of this slot fails every write from now on.
    FailWrites(usize),
    /// The member of this slot fails its next flush.
    FailFlush(usize),
}

/// The first and second sector overlap between the two writes; the third write spans two chunks.
const ACTS: [Act; 9] = [
    Act::Do(Step::Write(0, 2)),
    Act::Do(Step::Write(1, 2)),
    Act::Do(Step::Write(7, 2)),
    Act::Do(Step::WriteStable(0, 2)),
    Act::Do(Step::Flush),
    Act::Do(Step::Discard(0, 2)),
    Act::Do(Step::Zero(1, 1, true)),
    Act::FailWrites(0),
    Act::FailFlush(1),
];

fn template(members: usize, clean: bool) -> Rig {
    // One chunk a member is enough for a mirror; two for an array whose chunks have different mirrors.
    let shape =
        Shape { members, chunk: 4096, chunks: 2, region: 4096, disks: SimDiskOptions::default(), clean };
    Rig::create(shape, 1)
}

/// Assembles and runs the script; with `together`, its operations at once. The last thing is a moment of rest.
async fn play(rig: &Rig, script: &[Act], together: bool, bug: Option<&Bug>) {
    let mut members = rig.plug(&rig.slots());
    if let Some(bug) = bug {
        let runtime = rig.sim.runtime();
        members = members.into_iter().map(|member| Buggy::plant(member, bug.clone(), &runtime)).collect();
    }
    let volume = rig.assemble(members).await.unwrap();
    let mut steps = Vec::new();
    for act in script {
        match act {
            Act::Do(step) if together => steps.push(rig.witness.step(&*volume, *step)),
            Act::Do(step) => drop(rig.witness.step(&*volume, *step).await),
            Act::FailWrites(slot) => {
                rig.disks[*slot].fail(Fault::lasting(&[Operation::Write, Operation::WriteZeroes]));
            }
            Act::FailFlush(slot) => rig.disks[*slot].fail(Fault::once(&[Operation::Flush])),
        }
    }
    join_all(steps).await;
    rig.sim.runtime().sleep(std::time::Duration::from_secs(11)).await;
}

/// Runs the script up to boundary `k`, where the power goes and `survivors` says which unflushed sectors stay.
fn wreck(
    template: &Rig,
    script: &[Act],
    together: bool,
    bug: Option<&Bug>,
    k: u64,
    survivors: u64,
) -> Option<Rig> {
    // The seed decides the order in which operations complete: it is the boundary's, so that they differ.
    let rig = template.fork(k);
    rig.sim.set_cut_style(CutStyle::Subset(survivors));
    rig.sim.cut_after(Some(k));
    if rig.sim.block_on(play(&rig, script, together, bug)).is_ok() {
        return None;
    }
    rig.witness.power_cut();
    rig.witness.judge();
    for disk in &rig.disks {
        disk.heal();
    }
    Some(rig)
}

/// What must hold after a cut: a start with all members, then one without any of those that are dispensable, and
/// the same without them at once.
fn inspect(rig: &Rig, failing: &[usize]) {
    let current = |gone: &Vec<usize>| failing.is_empty() || gone.iter().all(|slot| failing.contains(slot));
    let all = rig.fork(1);
    all.sim.set_cut_style(CutStyle::AllLost);
    all.check_with(&all.slots());
    all.cut();
    for gone in rig.dispensable().iter().filter(|gone| !gone.is_empty() && current(gone)) {
        all.fork(2).check_with(&rig.without(gone));
        rig.fork(3).check_with(&rig.without(gone));
    }
}

/// Every boundary and (as far as wanted) every set of survivors of one script. Returns how many wrecks that were.
fn exhaust(template: &Rig, script: &[Act], together: bool, bug: Option<&Bug>) -> u64 {
    let failing: Vec<usize> = script
        .iter()
        .filter_map(|act| match act {
            Act::FailWrites(slot) | Act::FailFlush(slot) => Some(*slot),
            Act::Do(_) => None,
        })
        .collect();
    let most = number("SIM_SUBSETS").unwrap_or(SUBSETS);
    let mut wrecks = 0;
    for k in 1.. {
        let Some(first) = wreck(template, script, together, bug, k, 0) else { return wrecks };
        let unflushed = first.sim.unflushed_at_cut();
        let all = 1u64 << unflushed.min(12);
        let mut rng = Rng::new(k);
        let sets = (0..all.min(most)).map(|n| {
            // None, all, and some between; or simply each.
            if all <= most { n } else { [0, u64::MAX].get(n as usize).copied().unwrap_or_else(|| rng.draw()) }
        });
        for survivors in sets {
            let rig = wreck(template, script, together, bug, k, survivors).unwrap();
            wrecks += 1;
            let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| inspect(&rig, &failing)));
            if let Err(panic) = tried {
                eprintln!(
                    "{} members, {script:?}, together: {together}, boundary {k}, survivors {survivors:#x}",
                    rig.shape.members
                );
                std::panic::resume_unwind(panic);
            }
        }
    }
    wrecks
}

fn scripts(depth: usize) -> Vec<Vec<Act>> {
    let mut all = vec![vec![]];
    let mut longest: Vec<Vec<Act>> = vec![vec![]];
    for _ in 0..depth {
        longest = longest
            .iter()
            .flat_map(|script| ACTS.iter().map(move |act| [script.as_slice(), &[*act]].concat()))
            .collect();
        all.extend(longest.clone());
    }
    let failing = |act: &Act| !matches!(act, Act::Do(_));
    let ends_in_work = |script: &Vec<Act>| script.last().is_some_and(|act| !failing(act));
    // Two failing members of a mirror are more than it must bear.
    all.retain(|script| {
        let failures: std::collections::BTreeSet<_> =
            script.iter().filter(|a| failing(a)).map(|a| format!("{a:?}")).collect();
        ends_in_work(script) && failures.len() < 2
    });
    all
}

fn campaign(members: usize, depth: usize, clean: bool) {
    let depth = number("SIM_DEPTH").map_or(depth, |depth| depth as usize);
    let template = template(members, clean);
    let mut wrecks = 0;
    for script in scripts(depth) {
        wrecks += exhaust(&template, &script, false, None);
        if script.len() == 2 && script.iter().all(|act| matches!(act, Act::Do(_))) {
            wrecks += exhaust(&template, &script, true, None);
        }
    }
    println!("{members} members: {wrecks} wrecks");
    assert!(wrecks > 100, "hardly anything was tried");
}

#[test]
fn two_members() {
    campaign(2, 2, true);
}

#[test]
fn two_members_that_never_were_equal() {
    campaign(2, 1, false);
}

#[test]
fn three_members() {
    campaign(3, 1, true);
}

#[test]
fn four_members() {
    campaign(4, 1, true);
}

/// The search finds what it is for: each of these shows in some script of one or two operations.
#[test]
fn planted_bugs_are_found() {
    let bugs = [
        Bug::DropFlushes,
        Bug::FlushLater,
        Bug::IgnoreStable,
        Bug::WriteLater(BITMAP),
        Bug::WriteLater(DATA..u64::MAX),
        Bug::DropWrites(SUPERBLOCK),
        Bug::CutWritesShort(DATA..u64::MAX),
        Bug::SwallowErrors,
    ];
    let template = template(2, true);
    let scripts = scripts(2);
    for bug in bugs {
        let finds = |script: &&Vec<Act>| {
            let search = || exhaust(&template, script, false, Some(&bug));
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(search)).is_err()
        };
        let found = scripts.iter().find(finds);
        println!("{bug:?}: {found:?}");
        assert!(found.is_some(), "{bug:?} was not found");
    }
}
