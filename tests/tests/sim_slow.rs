//! Members that are slow, and members that do not answer, in virtual time: reads are answered by another copy, what
//! holds a lock is waited for no longer than a limit, and the last copy is waited for as long as it takes.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use futures_util::future::{join, join_all};
use raid::device::{Device, Durability};
use raid::error::Error;
use raid::event::Event;
use raid::geometry::Layout;
use raid::orders::{Added, MemberName};
use raid::status::MemberState;
use raid::volume::{AssembleOptions, Volume};
use std::sync::Arc;
use std::time::Duration;
use tests::sim::array::{DATA, Rig, Shape};
use tests::sim::clients::{Step, Workload};
use tests::sim::{SECTOR, SimDiskOptions};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// How long a member may leave unanswered what others have answered.
const STALL: Duration = Duration::from_secs(30);
/// What may come on top: looks are a second apart, and then the failure is put on record.
const GRACE: Duration = Duration::from_secs(2);

/// Disks that answer within two milliseconds unless a test slows them down.
fn rig(members: usize) -> Rig {
    let disks = SimDiskOptions { stragglers: 0, ..SimDiskOptions::default() };
    Rig::create(Shape { chunks: 12, region: 8192, disks, ..Shape::small(Layout::near(2), members) }, 1)
}

/// Runs `work` and says how long it took.
async fn timed<T>(rig: &Rig, work: impl Future<Output = T>) -> (T, Duration) {
    let clock = rig.sim.runtime();
    let begun = clock.now();
    let done = work.await;
    (done, clock.now().saturating_sub(begun))
}

fn state(volume: &Volume, slot: usize) -> MemberState {
    volume.status().members[slot].state
}

async fn until(rig: &Rig, what: impl Fn() -> bool) {
    for _ in 0..600 {
        if what() {
            return;
        }
        rig.sim.runtime().sleep(SECOND).await;
    }
    panic!("it did not come to that within ten minutes");
}

/// Fills the array, slows its preferred member down, and reads all of it: every read is quick, and after a few the
/// slow member is left alone. When it is well again it is read again.
fn slow_reads(rig: &Rig) {
    rig.sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
            let sectors = rig.shape.size() / SECTOR;
            for at in (0..sectors).step_by(8) {
                assert!(rig.witness.step(&*volume, Step::Write(at, 8)).await);
            }
            let reads = |slot: usize| rig.disks[slot].counts().reads;
            let other_before = reads(1);
            rig.witness.read_all(&*volume).await;
            assert_eq!(reads(1), other_before, "healthy: each address has its one copy");

            rig.disks[0].slow(2 * SECOND);
            let (mut longest, mut late) = (Duration::ZERO, 0);
            for round in 0..20 {
                for at in (0..sectors).step_by(8) {
                    let (ok, took) = timed(rig, rig.witness.step(&*volume, Step::Read(at, 8))).await;
                    assert!(ok);
                    longest = longest.max(took);
                    late += u32::from(took > 15 * MS);
                }
                assert!(round > 0 || late == 3, "three late reads are enough to know, not {late}");
            }
            assert!(longest < 120 * MS, "a read took {longest:?}");
            assert_eq!(late, 3, "later ones need not wait for the limit");
            assert_eq!(state(&volume, 0), MemberState::InSync, "late is not failed");

            rig.disks[0].heal();
            rig.sim.runtime().sleep(31 * SECOND).await;
            let before = reads(0);
            rig.witness.read_all(&*volume).await;
            assert!(reads(0) > before + 5, "it is read again when it is well");
        })
        .unwrap();
    rig.witness.judge();
}

#[test]
fn reads_of_a_slow_leg_are_answered_by_the_other() {
    slow_reads(&rig(2));
}

#[test]
fn the_same_seed_is_the_same_run() {
    let template = rig(2);
    let trace = |seed| {
        let rig = template.fork(seed);
        slow_reads(&rig);
        rig.sim.trace()
    };
    for seed in 1..4 {
        assert_eq!(trace(seed), trace(seed), "seed {seed} ran differently the second time");
    }
}

/// The late leg fails while the other has been asked as well, or the other fails: either way the client gets its data,
/// and the bad copy is written again.
#[test]
fn an_error_during_a_race_is_repaired() {
    for (bad, times) in [(0, [300 * MS, 5 * SECOND]), (1, [2 * SECOND, 10 * MS])] {
        let rig = rig(2);
        let bytes = Bytes::from(vec![7; 4096]);
        rig.sim
            .block_on(async {
                let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
                volume.write(0, bytes.clone(), Durability::Stable).await.unwrap();
                rig.disks[bad].decay(DATA..DATA + SECTOR);
                for (disk, time) in rig.disks.iter().zip(times) {
                    disk.slow(time);
                }
                let read = volume.read(0, BytesMut::zeroed(4096)).await.unwrap();
                assert_eq!(read, bytes);
                let status = volume.status();
                assert_eq!(status.members[bad].read_errors, 1, "{:?}", status.members);
                assert_eq!(status.members[bad].corrected, 1, "{:?}", status.members);
                assert!(status.members.iter().all(|member| member.state == MemberState::InSync));
            })
            .unwrap();
        assert_eq!(rig.disks[bad].try_peek(DATA, 4096).unwrap(), bytes, "the bad copy was not written again");
    }
}

/// Two of three copies answer nothing any more: the third does, as soon as both have had their time.
#[test]
fn a_read_is_answered_by_the_last_of_three_that_answers() {
    let template = rig(3);
    let rig = Rig::create(Shape { layout: Layout::near(3), ..template.shape.clone() }, 1);
    rig.sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&[0, 1, 2])).await.unwrap();
            assert!(rig.witness.step(&*volume, Step::Write(0, 8)).await);
            rig.disks[0].hang();
            rig.disks[1].hang();
            for round in 0..12 {
                let (ok, took) = timed(&rig, rig.witness.step(&*volume, Step::Read(0, 8))).await;
                assert!(ok && took < 3 * SECOND, "{ok} after {took:?}");
                assert!(round < 6 || took < 15 * MS, "both are known to be slow, and it took {took:?}");
            }
        })
        .unwrap();
    rig.witness.judge();
}

/// While copies may differ, whoever answered first would tell who reads what.
#[test]
fn what_may_differ_is_read_from_one_leg_however_slow() {
    let rig = rig(2);
    let unclean = Rig::create(Shape { clean: false, ..rig.shape.clone() }, 1);
    for (slot, disk) in unclean.disks.iter().enumerate() {
        disk.poke(DATA, &[slot as u8 + 1; 4096]);
    }
    unclean
        .sim
        .block_on(async {
            let options = AssembleOptions { read_only: true, ..AssembleOptions::default() };
            let volume =
                Volume::assemble(unclean.plug(&[0, 1]), options, unclean.sim.runtime()).await.unwrap();
            unclean.disks[0].slow(2 * SECOND);
            for _ in 0..5 {
                let (read, took) = timed(&unclean, volume.read(0, BytesMut::zeroed(4096))).await;
                assert_eq!(read.unwrap(), vec![1; 4096]);
                assert!(took >= 2 * SECOND, "{took:?}");
            }
        })
        .unwrap();
}

#[test]
fn a_busy_member_leaves_reads_to_an_idle_one() {
    let rig = rig(2);
    rig.sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
            let before = rig.disks[1].counts().reads;
            let at_once = |count: u64| {
                let volume = &volume;
                join_all((0..count).map(move |at| volume.read(at % 8 * 512, BytesMut::zeroed(512))))
            };
            assert!(at_once(9).await.iter().all(Result::is_ok));
            assert_eq!(rig.disks[1].counts().reads, before, "nine at once are no crowd");
            assert!(at_once(40).await.iter().all(Result::is_ok));
            let lent = rig.disks[1].counts().reads - before;
            assert!((10..=20).contains(&lent), "{lent} of 40 went to the idle member");
        })
        .unwrap();
}

/// A leg that answers nothing any more: from before the first write (its metadata hangs), after it (data hangs), or at a
/// flush. The client is answered after the limit, the leg is out and on record, and the data is right.
#[test]
fn a_leg_that_hangs_is_taken_out_and_the_client_is_answered() {
    for (warm, flush) in [(false, false), (true, false), (true, true)] {
        let rig = rig(4);
        rig.sim
            .block_on(async {
                let volume = rig.assemble(rig.plug(&[0, 1, 2, 3])).await.unwrap();
                if warm {
                    assert!(rig.witness.step(&*volume, Step::Write(0, 8)).await);
                }
                rig.disks[1].hang();
                let step = if flush { Step::Flush } else { Step::WriteStable(2, 4) };
                let (ok, took) = timed(&rig, rig.witness.step(&*volume, step)).await;
                assert!(ok && took >= STALL && took < STALL + GRACE, "{ok} after {took:?}");
                let expected =
                    [MemberState::InSync, MemberState::Faulty, MemberState::InSync, MemberState::InSync];
                assert_eq!([0, 1, 2, 3].map(|slot| state(&volume, slot)), expected);
                let (ok, took) = timed(&rig, rig.witness.step(&*volume, Step::WriteStable(0, 16))).await;
                assert!(ok && took < SECOND, "the next write needs nobody who is out: {took:?}");
                rig.witness.read_all(&*volume).await;
            })
            .unwrap();
        rig.witness.judge();
        // The power goes, and what hung lands or does not: it is not believed any more.
        rig.cut();
        rig.disks[1].heal();
        let in_sync = rig.check_with(&[1, 0, 3, 2]);
        assert_eq!(in_sync, [(0, 0), (2, 2), (3, 3)]);
    }
}

/// Clients in full work while a leg hangs from some moment on.
#[test]
fn clients_go_on_while_a_leg_hangs() {
    for seed in 0..20 {
        let rig = rig(4).fork(seed);
        let mut rng = rig.sim.fork_rng();
        let victim = rng.below(4) as usize;
        let load = Workload { clients: 4, operations: 40, longest: 20, span: rig.shape.size() / SECTOR };
        rig.sim
            .block_on(async {
                let volume = rig.assemble(rig.plug(&[0, 1, 2, 3])).await.unwrap();
                let device: Arc<dyn Device> = Arc::<Volume>::clone(&volume);
                let (disk, clock) = (Arc::clone(&rig.disks[victim]), rig.sim.runtime());
                let when = Duration::from_micros(rng.below(100_000));
                rig.sim.runtime().spawn(Box::pin(async move {
                    clock.sleep(when).await;
                    disk.hang();
                }));
                rig.witness.run(&device, &rig.sim.runtime(), &mut rng, &load).await;
                rig.witness.step(&*volume, Step::Flush).await;
                assert_eq!(state(&volume, victim), MemberState::Faulty);
                volume.stop().await.unwrap();
            })
            .unwrap();
        rig.witness.judge();
        rig.cut();
        rig.disks[victim].heal();
        assert_eq!(rig.check_with(&[0, 1, 2, 3]).len(), 3, "seed {seed}");
    }
}

#[test]
fn the_last_copy_is_waited_for() {
    let rig = rig(2);
    rig.sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&[0])).await.unwrap();
            assert!(rig.witness.step(&*volume, Step::Write(0, 8)).await);
            rig.disks[0].slow(600 * SECOND);
            let (ok, took) = timed(&rig, rig.witness.step(&*volume, Step::WriteStable(4, 8))).await;
            assert!(ok && took >= 600 * SECOND, "{took:?}");
            assert_eq!(state(&volume, 0), MemberState::InSync);
        })
        .unwrap();
    rig.witness.judge();
}

/// What holds up both (a controller, say) is no fault of either.
#[test]
fn who_stall_together_stay_together() {
    let rig = rig(2);
    rig.sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
            assert!(rig.witness.step(&*volume, Step::Write(0, 8)).await);
            rig.disks[0].slow(100 * SECOND);
            rig.disks[1].slow(110 * SECOND);
            for step in [Step::Write(4, 8), Step::Flush, Step::Read(0, 8)] {
                assert!(rig.witness.step(&*volume, step).await);
            }
            assert_eq!([state(&volume, 0), state(&volume, 1)], [MemberState::InSync; 2]);
        })
        .unwrap();
    rig.witness.judge();
}

/// What a member was asked before it was taken out may still land on it. It must not come back before that: the late
/// write would undo a newer one.
#[test]
fn a_member_that_still_owes_an_answer_neither_leaves_nor_returns() {
    let rig = rig(2);
    rig.sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
            assert!(rig.witness.step(&*volume, Step::Write(0, 8)).await);
            rig.disks[1].slow(200 * SECOND);
            assert!(rig.witness.step(&*volume, Step::Write(0, 8)).await);
            assert_eq!(state(&volume, 1), MemberState::Faulty);
            rig.disks[1].heal();
            assert!(rig.witness.step(&*volume, Step::Write(0, 8)).await, "newer than what is late");

            let name: MemberName = "1".parse().unwrap();
            let refused = volume.remove(&name).await;
            assert!(matches!(refused, Err(Error::Unanswered { .. })), "{refused:?}");
            let refused = volume.add(rig.sim.plug(&rig.disks[1]), true).await;
            assert!(matches!(refused, Err(Error::Unanswered { .. })), "{refused:?}");

            rig.sim.runtime().sleep(200 * SECOND).await;
            volume.remove(&name).await.unwrap();
            let added = volume.add(rig.sim.plug(&rig.disks[1]), false).await.unwrap();
            assert!(matches!(added, Added::Rebuilding(1) | Added::Readded(1)), "{added:?}");
            until(&rig, || state(&volume, 1) == MemberState::InSync).await;
            volume.stop().await.unwrap();
        })
        .unwrap();
    rig.cut();
    for slot in [1, 0] {
        assert_eq!(rig.fork(7).check_with(&[slot]), [(slot, slot)]);
    }
}

/// The same for a member that is declared failed while it does not answer, before anybody has given up on it.
#[test]
fn a_member_that_is_failed_by_hand_still_owes_what_it_was_asked() {
    let rig = rig(2);
    rig.sim
        .block_on(async {
            let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
            assert!(rig.witness.step(&*volume, Step::Write(0, 8)).await);
            rig.disks[1].slow(20 * SECOND);
            let name: MemberName = "1".parse().unwrap();
            let failed_and_removed = async {
                rig.sim.runtime().sleep(SECOND / 4).await;
                volume.fail(&name).await.unwrap();
                volume.remove(&name).await
            };
            let (written, refused) =
                join(rig.witness.step(&*volume, Step::Write(0, 8)), failed_and_removed).await;
            assert!(written);
            assert!(matches!(refused, Err(Error::Unanswered { .. })), "{refused:?}");
            rig.sim.runtime().sleep(20 * SECOND).await;
            volume.remove(&name).await.unwrap();
        })
        .unwrap();
    rig.witness.judge();
}

/// A device that hangs when it is looked at, or while it is made a member, holds nobody up for longer than the limit.
#[test]
fn a_newcomer_that_hangs_is_refused() {
    let shape = Shape { blanks: 1, chunks: 12, region: 8192, ..Shape::small(Layout::near(2), 2) };
    for after in [None, Some(MS / 100)] {
        let rig = Rig::create(shape.clone(), 1);
        rig.sim
            .block_on(async {
                let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
                let (disk, clock) = (Arc::clone(&rig.disks[2]), rig.sim.runtime());
                match after {
                    None => disk.hang(),
                    Some(after) => rig.sim.runtime().spawn(Box::pin(async move {
                        clock.sleep(after).await;
                        disk.hang();
                    })),
                }
                let (added, took) = timed(&rig, volume.add(rig.sim.plug(&rig.disks[2]), false)).await;
                assert!(matches!(added, Err(Error::Stalled { .. })), "{added:?}");
                assert!(took < STALL + GRACE, "{took:?}");
                let (ok, took) = timed(&rig, rig.witness.step(&*volume, Step::WriteStable(0, 8))).await;
                assert!(ok && took < SECOND, "{took:?}");
            })
            .unwrap();
        rig.witness.judge();
    }
}

/// A leg that hangs under a scrub: when it is to be read, or when a difference found on it is to be mended. The scrub
/// ends, and the leg is out.
#[test]
fn a_scrub_waits_for_a_leg_that_hangs_no_longer_than_the_limit() {
    for (repair, read_first) in [(false, false), (true, false), (true, true)] {
        let rig = rig(2);
        rig.sim
            .block_on(async {
                let volume = rig.assemble(rig.plug(&[0, 1])).await.unwrap();
                assert!(rig.witness.step(&*volume, Step::WriteStable(0, 8)).await);
                let disk = Arc::clone(&rig.disks[1]);
                if read_first {
                    disk.poke(DATA, &[7; 512]);
                    let before = disk.counts();
                    rig.sim.watch(Some(Box::new(move |_| {
                        if disk.counts().reads > before.reads {
                            disk.hang();
                        }
                    })));
                } else {
                    disk.hang();
                }
                let mut events = volume.events();
                let begun = rig.sim.runtime().now();
                volume.scrub(repair).await.unwrap();
                loop {
                    match events.recv().await.unwrap() {
                        Event::ScrubFinished { mismatches, .. } => {
                            assert_eq!(mismatches, u64::from(read_first));
                            break;
                        }
                        Event::ScrubStopped { cause, .. } => panic!("{cause}"),
                        _ => {}
                    }
                }
                let took = rig.sim.runtime().now().saturating_sub(begun);
                assert!(took >= STALL && took < STALL + 2 * GRACE, "{took:?}");
                assert_eq!(state(&volume, 1), MemberState::Faulty);
                let (ok, took) = timed(&rig, rig.witness.step(&*volume, Step::WriteStable(0, 8))).await;
                assert!(ok && took < 5 * SECOND, "the scrub let its lock go: {took:?}");
            })
            .unwrap();
        rig.sim.watch(None);
        rig.witness.judge();
    }
}
