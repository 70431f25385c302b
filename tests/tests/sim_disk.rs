//! The simulator itself: an oracle is worth what its own tests are worth. Each promise of `sim::disk` and
//! `sim::executor` is shown here, and each cruelty is shown to happen.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use raid::device::{Device, Durability, Extent, ZeroMode};
use raid::error::{Error, Operation};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tests::sim::{CutStyle, Fault, PowerCut, SECTOR, SilentFault, Sim, SimDisk, SimDiskOptions};

const SIZE: u64 = 1 << 20;

fn machine(seed: u64) -> (Sim, Arc<SimDisk>, Arc<dyn Device>) {
    let sim = Sim::new(seed);
    let disk = sim.disk("d", SIZE, SimDiskOptions::default());
    let plugged = sim.plug(&disk);
    (sim, disk, plugged)
}

fn sector(byte: u8) -> Bytes {
    Bytes::from(vec![byte; SECTOR as usize])
}

/// The first byte of sector `n` as it would survive.
fn durable(disk: &SimDisk, n: u64) -> u8 {
    disk.peek_durable(n * SECTOR, 1)[0]
}

fn visible(disk: &SimDisk, n: u64) -> u8 {
    disk.peek(n * SECTOR, 1)[0]
}

async fn read_byte(device: &Arc<dyn Device>, n: u64) -> Result<u8, Error> {
    Ok(device.read(n * SECTOR, BytesMut::zeroed(1)).await?[0])
}

#[test]
fn a_flush_covers_what_completed_before_it_was_submitted_and_nothing_else() {
    let mut uncovered = 0;
    for seed in 0..200 {
        let (sim, disk, device) = machine(seed);
        sim.block_on(async {
            device.write(0, sector(1), Durability::Cached).await.unwrap();
            // Submitted before the flush, not completed before it.
            let late = device.write(SECTOR, sector(2), Durability::Cached);
            let flush = device.flush();
            let later = device.write(2 * SECTOR, sector(3), Durability::Cached);
            assert_eq!(durable(&disk, 0), 0, "not durable before the flush completes");
            let (a, b, c) = futures_util::join!(late, flush, later);
            a.and(b).and(c).unwrap();
        })
        .unwrap();
        assert_eq!((durable(&disk, 0), durable(&disk, 1), durable(&disk, 2)), (1, 0, 0));
        assert_eq!((visible(&disk, 0), visible(&disk, 1), visible(&disk, 2)), (1, 2, 3));
        sim.set_cut_style(CutStyle::Chance);
        sim.cut_now();
        assert_eq!(visible(&disk, 0), 1, "seed {seed}: a flushed write is gone");
        uncovered += u32::from(visible(&disk, 1) == 0) + u32::from(visible(&disk, 2) == 0);
    }
    assert!(uncovered > 100, "unflushed writes hardly ever get lost ({uncovered} of 400)");
}

#[test]
fn a_stable_write_makes_itself_durable_alone() {
    for seed in 0..50 {
        let (sim, disk, device) = machine(seed);
        sim.block_on(async {
            device.write(0, sector(1), Durability::Cached).await.unwrap();
            device.write(SECTOR, sector(2), Durability::Stable).await.unwrap();
            device.write_zeroes(2 * SECTOR, SECTOR, ZeroMode::MayPunch, Durability::Stable).await.unwrap();
            device.write(3 * SECTOR, sector(4), Durability::Cached).await.unwrap();
            // Over a cached version of itself.
            device.write(3 * SECTOR, sector(5), Durability::Stable).await.unwrap();
        })
        .unwrap();
        assert_eq!(disk.unflushed(), 1);
        sim.set_cut_style(CutStyle::AllLost);
        sim.cut_now();
        let after: Vec<u8> = (0..4).map(|n| visible(&disk, n)).collect();
        assert_eq!(after, [0, 2, 0, 5]);
    }
}

#[test]
fn every_subset_of_unflushed_sectors_can_survive() {
    let mut seen = BTreeSet::new();
    for bits in 0..8 {
        let (sim, disk, device) = machine(7);
        sim.block_on(device.write(0, Bytes::from(vec![9; 3 * SECTOR as usize]), Durability::Cached))
            .unwrap()
            .unwrap();
        sim.set_cut_style(CutStyle::Subset(bits));
        sim.cut_now();
        seen.insert((visible(&disk, 0), visible(&disk, 1), visible(&disk, 2)));
    }
    assert_eq!(seen.len(), 8);
}

#[test]
fn by_chance_a_cut_leaves_any_version_of_a_sector_and_one_in_ten_is_clean() {
    let mut seen = [0; 3];
    let mut whole = 0;
    for seed in 0..400 {
        let (sim, disk, device) = machine(seed);
        sim.block_on(async {
            for byte in [1, 2] {
                let writes = (0..12).map(|n| device.write(n * SECTOR, sector(byte), Durability::Cached));
                futures_util::future::try_join_all(writes).await.unwrap();
            }
        })
        .unwrap();
        sim.cut_now();
        let kept: Vec<u8> = (0..12).map(|n| visible(&disk, n)).collect();
        seen[kept[0] as usize] += 1;
        whole += u32::from(kept.iter().all(|byte| *byte == 2));
    }
    assert!(seen.iter().all(|n| *n > 40), "old, middle, new: {seen:?}");
    assert!((60..140).contains(&whole), "{whole} of 400 cuts kept everything");
}

#[test]
fn a_harsh_disk_tears_sectors_and_loses_some_but_only_unflushed_ones() {
    let (mut torn, mut unreadable) = (0, 0);
    for seed in 0..300 {
        let sim = Sim::new(seed);
        let disk = sim.disk("d", SIZE, SimDiskOptions::harsh());
        let device = sim.plug(&disk);
        sim.block_on(async {
            device.write(0, sector(1), Durability::Stable).await.unwrap();
            device
                .write(SECTOR, Bytes::from(vec![2; 8 * SECTOR as usize]), Durability::Cached)
                .await
                .unwrap();
        })
        .unwrap();
        sim.cut_now();
        let device = sim.plug(&disk);
        assert_eq!(sim.block_on(read_byte(&device, 0)).unwrap().unwrap(), 1);
        for n in 1..9 {
            match sim.block_on(device.read(n * SECTOR, BytesMut::zeroed(SECTOR as usize))).unwrap() {
                Err(Error::Io { errno, .. }) => {
                    assert_eq!(errno, rustix::io::Errno::IO);
                    unreadable += 1;
                    // A new write heals it.
                    sim.block_on(device.write(n * SECTOR, sector(3), Durability::Cached)).unwrap().unwrap();
                    assert_eq!(sim.block_on(read_byte(&device, n)).unwrap().unwrap(), 3);
                }
                Err(other) => panic!("{other}"),
                Ok(bytes) => torn += u32::from(bytes[0] != bytes[SECTOR as usize - 1]),
            }
        }
    }
    assert!(torn > 10 && unreadable > 10, "torn {torn}, unreadable {unreadable}");
}

#[test]
fn kill_minus_nine_keeps_every_completed_write_though_not_durably() {
    for seed in 0..50 {
        let (sim, disk, device) = machine(seed);
        sim.block_on(async {
            device.write(0, sector(1), Durability::Cached).await.unwrap();
            device.write(0, sector(2), Durability::Cached).await.unwrap();
            assert!(device.write(SECTOR, sector(3), Durability::Cached).now_or_never().is_none());
        })
        .unwrap();
        sim.set_cut_style(CutStyle::ProcessKilled);
        sim.cut_now();
        assert_eq!(visible(&disk, 0), 2, "seed {seed}");
        assert!(visible(&disk, 1) == 0 || visible(&disk, 1) == 3);
        sim.set_cut_style(CutStyle::AllLost);
        sim.cut_now();
        assert_eq!((visible(&disk, 0), visible(&disk, 1)), (0, 0));
    }
}

#[test]
fn after_a_failed_flush_no_later_flush_saves_what_it_covered() {
    let mut lost = 0;
    for seed in 0..100 {
        let (sim, disk, device) = machine(seed);
        disk.fail(Fault::once(&[Operation::Flush]));
        sim.block_on(async {
            device.write(0, sector(1), Durability::Cached).await.unwrap();
            device.flush().await.unwrap_err();
            device.write(SECTOR, sector(2), Durability::Cached).await.unwrap();
            device.flush().await.unwrap();
            assert_eq!(read_byte(&device, 0).await.unwrap(), 1, "still visible");
        })
        .unwrap();
        sim.cut_now();
        lost += u32::from(visible(&disk, 0) == 0);
        assert_eq!(visible(&disk, 1), 2);
    }
    assert!((25..75).contains(&lost), "{lost} of 100");
}

#[test]
fn a_failed_write_leaves_each_sector_old_or_new() {
    let mut kept = [0; 2];
    for seed in 0..50 {
        let (sim, disk, device) = machine(seed);
        disk.fail(Fault { within: SECTOR..2 * SECTOR, ..Fault::once(&[Operation::Write]) });
        sim.block_on(async {
            device.write(4 * SECTOR, sector(1), Durability::Cached).await.expect("elsewhere");
            let failed = device.write(0, Bytes::from(vec![1; 4 * SECTOR as usize]), Durability::Stable).await;
            let Err(Error::Io { operation: Operation::Write, at: 0, .. }) = failed else {
                panic!("{failed:?}")
            };
            device.write(SECTOR, sector(7), Durability::Cached).await.expect("once");
        })
        .unwrap();
        (0..4).filter(|n| *n != 1).for_each(|n| kept[visible(&disk, n) as usize] += 1);
    }
    assert!(kept[0] > 20 && kept[1] > 20, "{kept:?}");
}

#[test]
fn silent_faults_are_silent() {
    let (sim, disk, device) = machine(3);
    disk.fail_silently(SilentFault::Lost);
    disk.fail_silently(SilentFault::Misdirected(8 * SECTOR));
    sim.block_on(async {
        device.write(0, sector(1), Durability::Stable).await.unwrap();
        device.write(SECTOR, sector(2), Durability::Stable).await.unwrap();
        device.write(2 * SECTOR, sector(3), Durability::Stable).await.unwrap();
    })
    .unwrap();
    assert_eq!((durable(&disk, 0), durable(&disk, 1), durable(&disk, 2), durable(&disk, 9)), (0, 0, 3, 2));
    disk.flip(2 * SECTOR, 2);
    assert_eq!((visible(&disk, 2), durable(&disk, 2)), (7, 7));
}

#[test]
fn a_vanished_disk_fails_everything_and_comes_back_as_it_was() {
    let (sim, disk, device) = machine(3);
    sim.block_on(async {
        device.write(0, sector(1), Durability::Cached).await.unwrap();
        let in_flight = device.write(SECTOR, sector(2), Durability::Cached);
        disk.vanish();
        in_flight.await.unwrap_err();
        device.flush().await.unwrap_err();
        read_byte(&device, 0).await.unwrap_err();
        disk.come_back();
        assert_eq!(read_byte(&device, 0).await.unwrap(), 1);
    })
    .unwrap();
}

#[test]
fn a_decayed_sector_is_unreadable_until_written_whole() {
    let (sim, disk, device) = machine(3);
    disk.decay(0..2 * SECTOR);
    sim.block_on(async {
        read_byte(&device, 1).await.unwrap_err();
        device.write(SECTOR + 8, Bytes::from_static(b"part"), Durability::Cached).await.unwrap_err();
        device.write(SECTOR, sector(1), Durability::Cached).await.unwrap();
        assert_eq!(read_byte(&device, 1).await.unwrap(), 1);
        read_byte(&device, 0).await.unwrap_err();
    })
    .unwrap();
}

#[test]
fn overlapping_operations_in_flight_see_each_other_by_chance() {
    let (mut reads, mut finals) = (BTreeSet::new(), BTreeSet::new());
    for seed in 0..60 {
        let (sim, disk, device) = machine(seed);
        sim.block_on(async {
            let a = device.write(0, sector(1), Durability::Cached);
            let b = device.write(0, sector(2), Durability::Cached);
            let (a, b, seen) = futures_util::join!(a, b, read_byte(&device, 0));
            a.and(b).unwrap();
            reads.insert(seen.unwrap());
        })
        .unwrap();
        finals.insert(visible(&disk, 0));
    }
    assert_eq!(Vec::from_iter(reads), [0, 1, 2]);
    assert_eq!(Vec::from_iter(finals), [1, 2]);
}

#[test]
fn ranges_need_not_be_whole_sectors_and_may_not_pass_the_end() {
    let (sim, disk, device) = machine(3);
    sim.block_on(async {
        device.write(0, Bytes::from(vec![1; 2048]), Durability::Cached).await.unwrap();
        device.write(500, Bytes::from(vec![2; 600]), Durability::Stable).await.unwrap();
        device.write_zeroes(510, 4, ZeroMode::Allocate, Durability::Cached).await.unwrap();
        let past = device.write(SIZE - 1, sector(1), Durability::Cached).await;
        assert!(matches!(past, Err(Error::OutOfBounds { operation: Operation::Write, .. })), "{past:?}");
        assert!(matches!(read_byte(&device, SIZE / SECTOR).await, Err(Error::OutOfBounds { .. })));
    })
    .unwrap();
    let mut expected = vec![1; 2048];
    expected[500..1100].fill(2);
    expected[510..514].fill(0);
    assert_eq!(disk.peek(0, 2048), expected);
}

/// Spawned clients, timers, a power cut by chance and a second boot.
fn busy_run(seed: u64) -> (u64, Vec<u8>) {
    let (sim, disk, device) = machine(seed);
    let mut rng = sim.fork_rng();
    sim.cut_after(Some(rng.within(1..60)));
    let runtime = sim.runtime();
    for client in 0..4u8 {
        let (device, clock) = (Arc::clone(&device), Arc::clone(&runtime));
        let mut rng = rng.fork();
        runtime.spawn(Box::pin(async move {
            for _ in 0..10 {
                clock.sleep(Duration::from_micros(rng.below(500))).await;
                let at = rng.below(16) * SECTOR;
                device.write(at, sector(client + 1), Durability::Cached).await.unwrap();
                let mut id = [0; 16];
                clock.fill_random(&mut id);
                device.write(32 * SECTOR, Bytes::copy_from_slice(&id), Durability::Stable).await.unwrap();
            }
        }));
    }
    let ended = sim.idle(Duration::from_secs(1));
    let device = sim.plug(&disk);
    let bytes = sim.block_on(device.read(0, BytesMut::zeroed(33 * SECTOR as usize))).unwrap().unwrap();
    assert_eq!(ended, Err(PowerCut));
    (sim.trace(), bytes.to_vec())
}

#[test]
fn the_same_seed_is_the_same_run() {
    let runs: Vec<_> = (0..20).map(busy_run).collect();
    for (seed, run) in runs.iter().enumerate() {
        assert!(*run == busy_run(seed as u64), "seed {seed} ran differently the second time");
    }
    let traces: BTreeSet<u64> = runs.iter().map(|(trace, _)| *trace).collect();
    assert_eq!(traces.len(), 20, "different seeds, different runs");
}

#[test]
fn the_power_goes_at_the_boundary_asked_for() {
    // A write and a flush, one after the other: two submissions, two completions.
    for k in 1..=4 {
        let (sim, disk, device) = machine(11);
        sim.cut_after(Some(k));
        sim.set_cut_style(CutStyle::AllLost);
        let got_to = std::cell::Cell::new(0);
        let ended = sim.block_on(async {
            device.write(0, sector(1), Durability::Cached).await.unwrap();
            got_to.set(1);
            device.flush().await.unwrap();
            got_to.set(2);
        });
        assert_eq!((ended, sim.boundaries()), (Err(PowerCut), k));
        assert_eq!(got_to.get(), i32::from(k > 2), "no task runs after the power has gone");
        assert_eq!(durable(&disk, 0), u8::from(k == 4), "the flush had completed on the disk at boundary 4");
        // The old handles are dead: nothing submitted through them reaches the disk, no answer ever comes.
        assert!(device.write(0, sector(9), Durability::Stable).now_or_never().is_none());
        assert_eq!(disk.in_flight(), Vec::<String>::new());
        assert_eq!(sim.block_on(read_byte(&sim.plug(&disk), 0)).unwrap().unwrap(), u8::from(k == 4));
    }
}

#[test]
fn time_passes_only_when_nothing_can_run() {
    let (sim, _, _) = machine(1);
    let runtime = sim.runtime();
    let before = runtime.wall_clock();
    sim.block_on(async {
        let slept = runtime.sleep(Duration::from_secs(60));
        runtime.sleep(Duration::from_secs(1)).await;
        assert_eq!(runtime.now(), Duration::from_secs(1));
        slept.await;
    })
    .unwrap();
    assert_eq!(runtime.now(), Duration::from_secs(60));
    assert_eq!(runtime.wall_clock(), before + Duration::from_secs(60));
}

#[test]
#[should_panic(expected = "deadlock: no task can run and nothing is due (seed 5")]
fn a_deadlock_is_noticed() {
    let (sim, _, _) = machine(5);
    sim.block_on(std::future::pending::<()>()).unwrap();
}

#[test]
#[should_panic(expected = "in flight: d: write of 512 bytes at 1024")]
fn a_deadlock_names_what_the_disks_owe() {
    let (sim, disk, device) = machine(5);
    disk.hang();
    sim.block_on(device.write(2 * SECTOR, sector(1), Durability::Cached)).unwrap().unwrap();
}

#[test]
#[should_panic(expected = "hung: out of patience")]
fn a_task_that_ticks_for_ever_does_not_hide_a_hang() {
    let (sim, _, _) = machine(5);
    let runtime = sim.runtime();
    let clock = Arc::clone(&runtime);
    runtime.spawn(Box::pin(async move {
        loop {
            clock.sleep(Duration::from_secs(5)).await;
        }
    }));
    sim.block_on(std::future::pending::<()>()).unwrap();
}

#[test]
fn growth_is_seen_by_who_looks_and_by_every_later_boot() {
    let (sim, disk, device) = machine(1);
    sim.block_on(async {
        disk.grow(SIZE + SECTOR);
        assert_eq!(device.size(), SIZE);
        let beyond = device.write(SIZE, sector(1), Durability::Stable).await;
        assert!(matches!(beyond, Err(Error::OutOfBounds { .. })), "{beyond:?}");
        assert_eq!(device.refresh().await.unwrap(), SIZE + SECTOR);
        assert_eq!(device.size(), SIZE + SECTOR);
        device.write(SIZE, sector(1), Durability::Stable).await.unwrap();
        disk.vanish();
        assert!(matches!(device.refresh().await, Err(Error::Size { .. })));
    })
    .unwrap();
    assert_eq!(durable(&disk, SIZE / SECTOR), 1);
    assert_eq!(sim.plug(&disk).size(), SIZE + SECTOR);
}

#[test]
fn what_was_never_written_is_a_hole() {
    let (sim, _, device) = machine(1);
    let told = |at, len| sim.block_on(device.extents(at, len)).unwrap();
    let (data, hole) = (|len| Extent { len, hole: false }, |len| Extent { len, hole: true });
    assert_eq!(told(0, SIZE).unwrap(), [hole(SIZE)]);
    for n in [2, 3, 5] {
        sim.block_on(device.write(n * SECTOR, sector(1), Durability::Cached)).unwrap().unwrap();
    }
    sim.block_on(device.flush()).unwrap().unwrap();
    sim.block_on(device.write(0, sector(1), Durability::Cached)).unwrap().unwrap();
    let one = SECTOR;
    let expected = [data(one), hole(one), data(2 * one), hole(one), data(one), hole(SIZE - 6 * one)];
    assert_eq!(told(0, SIZE).unwrap(), expected);
    assert_eq!(told(10, one).unwrap(), [data(one - 10), hole(10)]);
    assert_eq!(told(2 * one + 1, one).unwrap(), [data(one)]);
    assert_eq!(told(4 * one, 2 * one + 1).unwrap(), [hole(one), data(one), hole(1)]);
    assert!(told(7, 0).unwrap().is_empty());
    assert!(matches!(told(SIZE, 1), Err(Error::OutOfBounds { .. })));
}
