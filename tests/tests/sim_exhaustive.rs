//! The RAID engine, without chance: every short sequence of operations on a tiny array, the power cut at every I/O
//! boundary, every set of unflushed sectors that can survive, and then every start that must work.
//!
//! Sequences of one or two operations (three on two members), on near-2 with two, three and four members, far-2 and offset-2.
//! At a boundary at most [`SUBSETS`] sets of survivors are tried (all, where there are no more; `SIM_SUBSETS=4096` takes
//! all of up to twelve sectors), in [`ORDERS`] orders of completion (`SIM_ORDERS`). The whole search is
//! `SIM_DEPTH=3 SIM_SUBSETS=64 SIM_ORDERS=4`; it takes a good while on two processors.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use futures_util::future::join_all;
use raid::error::Operation;
use raid::geometry::Layout;
use std::sync::atomic::Ordering;
use tests::sim::array::{BITMAP, DATA, Rig, SUPERBLOCK, Shape};
use tests::sim::bugs::{Bug, Buggy};
use tests::sim::clients::Step;
use tests::sim::exhaust::{Search, on_all_processors};
use tests::sim::orders::{Order, is_refusal};
use tests::sim::{Fault, number};

/// Sets of surviving sectors tried at a boundary, unless `SIM_SUBSETS` says otherwise.
const SUBSETS: u64 = 6;
/// Orders in which operations complete, for each script, unless `SIM_ORDERS` says otherwise.
const ORDERS: u64 = 2;

/// One operation of a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    /// What a client does.
    Do(Step),
    /// The member of this slot fails every write from now on.
    FailWrites(usize),
    /// The member of this slot fails its next flush.
    FailFlush(usize),
    /// What an administrator does.
    Tell(Order),
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

fn template(layout: Layout, members: usize, clean: bool) -> Rig {
    // Two chunks a member: enough for each chunk to have mirrors of its own.
    Rig::create(Shape { clean, ..Shape::small(layout, members) }, 1)
}

/// Assembles and runs the script; with `together`, its operations at once. The last thing is a moment of rest.
async fn play(rig: &Rig, script: &[Act], together: bool, bug: Option<&Bug>) {
    let mut members = rig.plug(&rig.members());
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
            Act::Tell(order) => match rig.order(&volume, *order).await {
                Err(error) if !is_refusal(&error) => panic!("{order:?}: {error}"),
                _ => {}
            },
        }
    }
    join_all(steps).await;
    rig.sim.runtime().sleep(std::time::Duration::from_secs(11)).await;
}

fn sequences(acts: &[Act], depth: usize) -> Vec<Vec<Act>> {
    let mut all = vec![vec![]];
    let mut longest: Vec<Vec<Act>> = vec![vec![]];
    for _ in 0..depth {
        longest = longest
            .iter()
            .flat_map(|script| acts.iter().map(move |act| [script.as_slice(), &[*act]].concat()))
            .collect();
        all.extend(longest.clone());
    }
    all
}

fn scripts(depth: usize) -> Vec<Vec<Act>> {
    let mut all = sequences(&ACTS, depth);
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

/// A script, and whether its operations run at once.
type Case = (Vec<Act>, bool);

fn cases(depth: usize) -> Vec<Case> {
    let is_step = |act: &Act| matches!(act, Act::Do(_));
    let overlaps = |script: &Vec<Act>| script.len() == 2 && script.iter().all(is_step);
    let one_by_one = scripts(depth).into_iter();
    one_by_one.flat_map(|s| overlaps(&s).then(|| (s.clone(), true)).into_iter().chain([(s, false)])).collect()
}

/// Members come and go. `blank` is the number of a blank disk.
fn life_acts(blank: usize) -> [Act; 11] {
    [
        Act::Do(Step::Write(0, 2)),
        Act::Do(Step::WriteStable(7, 2)),
        Act::Do(Step::Flush),
        Act::Do(Step::Discard(0, 2)),
        Act::Tell(Order::Fail(0)),
        Act::Tell(Order::Fail(1)),
        Act::Tell(Order::Readd(0)),
        Act::Tell(Order::Add(blank)),
        Act::Tell(Order::Replace(0, blank)),
        Act::Tell(Order::Rest),
        Act::Tell(Order::Rebuilt),
    ]
}

/// Scripts in which the array changes, without those that say the same as a shorter one.
fn lives(blank: usize, depth: usize, degraded: bool) -> Vec<Case> {
    let tell = |order| move |act: &Act| *act == Act::Tell(order);
    let waits = |act: &Act| matches!(act, Act::Tell(Order::Rest | Order::Rebuilt));
    let changes = |act: &Act| matches!(act, Act::Tell(_)) && !waits(act);
    let makes_sense = |script: &Vec<Act>| {
        let first_change = script.iter().position(changes);
        let failed = script.iter().position(tell(Order::Fail(0)));
        let again = script.iter().position(tell(Order::Readd(0)));
        let paused = script.iter().position(waits);
        let uses_blank = [Order::Add(blank), Order::Replace(0, blank)];
        let uses = script.iter().filter(|act| uses_blank.iter().any(|order| tell(*order)(act))).count();
        first_change.is_some()
            && uses < 2
            && again.is_none_or(|again| degraded || failed.is_some_and(|failed| failed < again))
            && paused.is_none_or(|paused| first_change < Some(paused))
            && !script.windows(2).any(|two| waits(&two[0]) && waits(&two[1]))
            && !script.last().is_some_and(waits)
    };
    sequences(&life_acts(blank), depth)
        .into_iter()
        .filter(makes_sense)
        .map(|script| (script, false))
        .collect()
}

/// An array whose disk 0 was declared failed and has missed a write since.
fn degrade(rig: &Rig) -> Rig {
    let rig = rig.fork(1);
    let script = [
        Act::Do(Step::Write(0, 2)),
        Act::Do(Step::Flush),
        Act::Tell(Order::Fail(0)),
        Act::Do(Step::WriteStable(0, 1)),
    ];
    rig.sim.block_on(play(&rig, &script, false, None)).unwrap();
    rig.witness.judge();
    rig.cut();
    rig
}

fn live(layout: Layout, members: usize, depth: usize, degraded: bool) {
    let depth = number("SIM_DEPTH").map_or(depth, |depth| depth as usize);
    let mut template = Rig::create(Shape { blanks: 1, ..Shape::small(layout, members) }, 1);
    if degraded {
        template = degrade(&template);
    }
    exhaust(&template, &lives(members, depth, degraded));
}

fn campaign(layout: Layout, members: usize, depth: usize, clean: bool) {
    let depth = number("SIM_DEPTH").map_or(depth, |depth| depth as usize);
    exhaust(&template(layout, members, clean), &cases(depth));
}

fn exhaust(template: &Rig, cases: &[Case]) {
    let most = number("SIM_SUBSETS").unwrap_or(SUBSETS);
    let search = Search::new(template, most, number("SIM_ORDERS").unwrap_or(ORDERS));
    let begun = std::time::Instant::now();
    on_all_processors(cases, |(script, together)| {
        search.exhaust(&async |rig: &Rig| play(rig, script, *together, None).await);
    });
    let tally = search.tally();
    let Shape { layout, members, .. } = template.shape;
    println!("{layout}, {members} members, {} scripts: {tally:?} in {:?}", cases.len(), begun.elapsed());
    assert!(tally.wrecks.load(Ordering::Relaxed) > 50, "hardly anything was tried");
}

#[test]
fn two_members() {
    campaign(Layout::near(2), 2, 3, true);
}

#[test]
fn two_members_that_never_were_equal() {
    campaign(Layout::near(2), 2, 2, false);
}

#[test]
fn three_members() {
    campaign(Layout::near(2), 3, 2, true);
}

#[test]
fn four_members() {
    campaign(Layout::near(2), 4, 2, true);
}

#[test]
fn far_copies() {
    campaign(Layout::far(2), 3, 2, true);
    campaign(Layout::far(2), 4, 2, true);
}

#[test]
fn offset_copies() {
    campaign(Layout::offset(2), 3, 2, true);
    campaign(Layout::offset(2), 4, 2, true);
}

#[test]
fn members_come_and_go() {
    live(Layout::near(2), 2, 2, false);
    live(Layout::near(2), 2, 2, true);
}

#[test]
fn members_come_and_go_among_three() {
    live(Layout::near(2), 3, 2, false);
    live(Layout::near(2), 3, 2, true);
}

#[test]
fn members_come_and_go_among_four() {
    live(Layout::near(2), 4, 1, false);
    live(Layout::near(2), 4, 1, true);
}

#[test]
fn members_come_and_go_in_other_layouts() {
    for layout in [Layout::far(2), Layout::offset(2)] {
        for members in [3, 4] {
            live(layout, members, 1, false);
            live(layout, members, 1, true);
        }
    }
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
    let template = template(Layout::near(2), 2, true);
    let scripts = scripts(2);
    for bug in bugs {
        let search = Search::new(&template, SUBSETS, ORDERS);
        let finds = |script: &&Vec<Act>| {
            let look = || search.exhaust(&async |rig: &Rig| play(rig, script, false, Some(&bug)).await);
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(look)).is_err()
        };
        let found = scripts.iter().find(finds);
        println!("{bug:?}: {found:?}");
        assert!(found.is_some(), "{bug:?} was not found");
    }
}
