//! Small appends to many partitions become durable by one write to the volume's journal, and come back from there after a
//! power cut.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use futures_util::future::join_all;
use logstore::inspect::verify::{Options, verify};
use logstore::inspect::{Inspection, Severity};
use logstore::{Error, Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use parking_lot::Mutex;
use raid::device::{Device, Durability};
use raid::error::Operation;
use rustix::io::Errno;
use std::sync::Arc;
use std::time::Duration;
use tests::sim::bugs::{Bug, Buggy};
use tests::sim::ledger::Ledger;
use tests::sim::{CutStyle, Fault, Sim, SimDisk, SimDiskOptions, at_every_boundary};

const SIZE: u64 = 64 << 20;
/// Bytes of a record that no journal takes.
const LARGE: usize = 40_000;
/// Longer than everything that a store does at once takes on a simulated disk.
const SOON: Duration = Duration::from_millis(200);

struct World {
    sim: Sim,
    disk: Arc<SimDisk>,
    bug: Option<Bug>,
    /// Records of each partition whose commit was answered.
    committed: Arc<Mutex<Vec<i64>>>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self::of_size(seed, SIZE)
    }

    fn of_size(seed: u64, size: u64) -> Self {
        let sim = Sim::new(seed);
        let disk = sim.disk("d", size, SimDiskOptions::default());
        sim.set_cut_style(CutStyle::AllLost);
        Self { sim, disk, bug: None, committed: Arc::default() }
    }

    fn device(&self) -> Arc<dyn Device> {
        let device = self.sim.plug(&self.disk);
        match &self.bug {
            Some(bug) => Buggy::plant(device, bug.clone(), &self.sim.runtime()),
            None => device,
        }
    }

    async fn open(&self) -> Arc<Store> {
        self.open_with(Duration::ZERO).await
    }

    /// A store whose commits wait so long for company.
    async fn open_with(&self, commit_linger: Duration) -> Arc<Store> {
        let options = StoreOptions { commit_linger, ..StoreOptions::default() };
        Store::open(Home::Volume(self.device()), options, self.sim.runtime()).await.unwrap()
    }

    /// A topic to which everything was appended for which the catalog is needed.
    async fn topic(&self, store: &Store, partitions: u32, own: &[(&str, &str)]) -> Vec<Arc<Partition>> {
        let config = TopicConfig::kafka_defaults().with(own.iter().copied()).unwrap();
        let topic = store.create_topic("t", partitions, config).await.unwrap();
        *self.committed.lock() = vec![0; partitions as usize];
        let all = topic.partitions().to_vec();
        self.append_to_each(&all).await;
        self.sim.runtime().sleep(SOON).await;
        all
    }

    /// One record to each, and its commit, all at once.
    async fn append_to_each(&self, partitions: &[Arc<Partition>]) {
        self.append_records(partitions, 100).await;
    }

    /// The same, of so many bytes.
    async fn append_records(&self, partitions: &[Arc<Partition>], size: usize) {
        join_all(partitions.iter().map(|partition| async {
            let appended = partition.append(record_of(size), Durability::Stable).await.unwrap();
            appended.commit.unwrap().await.unwrap();
            let committed = &mut self.committed.lock()[partition.index() as usize];
            *committed = (*committed).max(appended.last_offset + 1);
        }))
        .await;
    }

    fn ends_after(&self, life: impl Future<Output = Arc<Store>>) -> Vec<i64> {
        let store = self.sim.block_on(life).unwrap();
        self.sim.cut_now();
        drop(store);
        self.sim.block_on(async { ends(self.open().await.as_ref()) }).unwrap()
    }

    /// The store is open again: nothing that was committed is missing, and all of it can be read.
    async fn judge(&self, store: &Store) {
        let Some(topic) = store.topic("t") else { return };
        let all = self.committed.lock().clone();
        for (partition, committed) in topic.partitions().iter().zip(all) {
            let end = partition.offsets().log_end;
            assert!(end >= committed, "{committed} records were committed, {end} are there");
            let mut next = 0;
            while next < end {
                let slice = partition.read(next, 1 << 20, ReadLimit::LogEnd, true).await.unwrap();
                let bytes = slice.copy().await.unwrap();
                assert_eq!(bytes[..8], next.to_be_bytes(), "another batch at offset {next}");
                next += 1;
                let size = 12 + u32::from_be_bytes(bytes[8..12].try_into().unwrap()) as usize;
                assert!(bytes.len() >= size, "{} bytes of {size}", bytes.len());
            }
        }
    }
}

fn ends(store: &Store) -> Vec<i64> {
    let topic = store.topic("t").unwrap();
    topic.partitions().iter().map(|partition| partition.offsets().log_end).collect()
}

/// A batch of one record.
fn record() -> Bytes {
    record_of(100)
}

fn record_of(size: usize) -> Bytes {
    Ledger::shared().lock().append_asked((uuid::Uuid::nil(), 0), 1, size, None, false, 1).1
}

#[test]
fn one_write_makes_appends_to_all_partitions_durable() {
    const PARTITIONS: u32 = 100;
    let world = World::new(3);
    let mut before = world.disk.counts();
    let ends = world.ends_after(async {
        let store = world.open().await;
        let partitions = world.topic(&store, PARTITIONS, &[]).await;
        before = world.disk.counts();
        world.append_to_each(&partitions).await;
        store
    });
    let flushes = world.disk.counts().flushes - before.flushes;
    let stable = world.disk.counts().stable_writes - before.stable_writes;
    // Those that came first did not wait for the others.
    assert!(stable <= 10, "{stable} stable writes for one append to each of {PARTITIONS} partitions");
    assert_eq!(ends, [2; PARTITIONS as usize], "{flushes} flushes");
}

/// Where stable writes are none, the same loses records: it is the journal that brings them back, and nothing has flushed them.
#[test]
fn it_is_the_journal_that_brings_them_back() {
    let mut world = World::new(3);
    world.bug = Some(Bug::IgnoreStable);
    let ends = world.ends_after(async {
        let store = world.open().await;
        let partitions = world.topic(&store, 10, &[]).await;
        world.append_to_each(&partitions).await;
        store
    });
    assert!(ends.iter().all(|&end| end < 2), "{ends:?}");
}

/// Whoever waits for commits does not wait for writes to places besides; a read finds all the same what it is to find.
#[test]
fn appends_come_to_their_places_together() {
    const TURNS: u64 = 20;
    let world = World::new(3);
    let life = async {
        let store = world.open().await;
        let partitions = world.topic(&store, 2, &[]).await;
        let begun = world.disk.counts();
        for _ in 0..TURNS {
            world.append_to_each(&partitions).await;
        }
        let committed = world.disk.counts();
        assert_eq!(committed.writes - begun.writes, committed.stable_writes - begun.stable_writes);
        assert!(committed.stable_writes > begun.stable_writes);
        world.judge(&store).await;
        let read = world.disk.counts();
        assert_eq!(
            read.writes - committed.writes,
            2,
            "{TURNS} appends to each of two partitions are two writes"
        );
        assert_eq!(ends(&store), [1 + TURNS as i64; 2]);
    };
    world.sim.block_on(life).unwrap();
}

#[test]
fn what_is_answered_before_a_commit_outlives_a_kill_and_so_does_all_before_it() {
    let world = World::new(3);
    world.sim.set_cut_style(CutStyle::ProcessKilled);
    let ends = world.ends_after(async {
        let store = world.open_with(10 * SOON).await;
        let partitions = world.topic(&store, 1, &[]).await;
        // Its commit would take longer than the next append.
        drop(partitions[0].append(record(), Durability::Stable).await.unwrap());
        partitions[0].append(record(), Durability::Cached).await.unwrap();
        store
    });
    assert_eq!(ends, [3]);
}

/// The same where the later one begins a segment, while the one before is not sealed yet.
#[test]
fn a_kill_leaves_no_hole_before_a_segment_that_was_answered_for() {
    for seed in 0..300 {
        let world = World::new(seed);
        world.sim.set_cut_style(CutStyle::ProcessKilled);
        let ends = world.ends_after(async {
            let store = world.open_with(10 * SOON).await;
            let partitions = world.topic(&store, 1, &[("segment.bytes", "2000")]).await;
            drop(partitions[0].append(record(), Durability::Stable).await.unwrap());
            partitions[0].append(record_of(1700), Durability::Cached).await.unwrap();
            store
        });
        assert_eq!(ends, [3], "seed {seed}");
    }
}

/// A file system without room under an image: nobody reads what is not in its place, and commits fail when the journal is full;
/// but nothing is lost, and all goes on when there is room.
#[test]
fn a_store_outlives_places_without_room() {
    let world = World::of_size(3, 8 << 20);
    let mut refused = 0;
    let life = async {
        let store = world.open().await;
        let partitions = world.topic(&store, 1, &[]).await;
        let bytes = world.disk.peek(0, 8 << 20);
        let first = record();
        // Not what the store stamps. The journal, which may hold it too, lies before all segments.
        let is_first = |window: &[u8]| window[16..] == first[16..];
        let space = bytes.windows(first.len()).rposition(is_first).unwrap() as u64;
        let no_room = Fault { errno: Errno::NOSPC, lands: false, ..Fault::lasting(&[Operation::Write]) };
        world.disk.fail(Fault { within: space..u64::MAX, ..no_room });
        for _ in 0..60 {
            let appended = partitions[0].append(record_of(1500), Durability::Stable).await.unwrap();
            match appended.commit.unwrap().await {
                Ok(()) => world.committed.lock()[0] = appended.last_offset + 1,
                Err(error) => {
                    assert!(matches!(error, Error::Unplaced { .. }), "{error}");
                    refused += 1;
                    break;
                }
            }
        }
        let error = partitions[0].read(1, 1 << 20, ReadLimit::HighWatermark, true).await.unwrap_err();
        assert!(error.to_string().contains("safe in the journal"), "{error}");
        world.disk.heal();
        world.append_to_each(&partitions).await;
        world.judge(&store).await;
        store
    };
    let ends = world.ends_after(life);
    assert_eq!(refused, 1, "the journal was never full");
    assert!(ends[0] > 20, "{ends:?}");
}

/// What was committed is not for long in the journal only, though nobody does anything any more.
#[test]
fn what_is_committed_comes_to_its_place_in_time() {
    let world = World::new(3);
    let life = async {
        let store = world.open().await;
        let partitions = world.topic(&store, 1, &[]).await;
        world.append_to_each(&partitions).await;
        let committed = world.disk.counts();
        world.sim.runtime().sleep(Duration::from_secs(6)).await;
        let later = world.disk.counts();
        // The append, and the pointer of the journal.
        assert_eq!((later.writes - committed.writes, later.flushes - committed.flushes), (2, 1));
        world.sim.runtime().sleep(Duration::from_secs(60)).await;
        assert_eq!(world.disk.counts().writes, later.writes, "an idle store writes");
        store
    };
    assert_eq!(world.ends_after(life), [2]);
}

/// What cannot be brought to its place is not given up: it is there for the next one who wants it.
#[test]
fn a_write_to_a_place_that_fails_is_made_again() {
    let world = World::new(3);
    let life = async {
        let store = world.open().await;
        let partitions = world.topic(&store, 1, &[]).await;
        world.append_to_each(&partitions).await;
        world.disk.fail(Fault::lasting(&[Operation::Write]));
        partitions[0].read(1, 1 << 20, ReadLimit::LogEnd, true).await.unwrap_err();
        world.disk.heal();
        world.judge(&store).await;
        world.append_to_each(&partitions).await;
        store
    };
    assert_eq!(world.ends_after(life), [3]);
}

/// Space is given to somebody else only when nothing is to be written there any more.
#[test]
fn what_is_deleted_before_it_comes_to_its_place_never_does() {
    let world = World::new(3);
    let life = async {
        let store = world.open().await;
        let config = [("file.delete.delay.ms", "0")];
        let before = world.topic(&store, 1, &config).await;
        for _ in 0..5 {
            world.append_to_each(&before).await;
        }
        drop(before);
        store.delete_topic("t").await.unwrap();
        store.quiet().await;
        let free = store.space().unwrap().unwrap();
        assert_eq!(free.free, free.total, "all is given back");
        let after = world.topic(&store, 1, &config).await;
        // Answered when they are in their place, which is the first that is free.
        for _ in 0..5 {
            after[0].append(record_of(70), Durability::Cached).await.unwrap();
        }
        store.close().await.unwrap();
    };
    world.sim.block_on(life).unwrap();
    let again = async {
        let store = world.open().await;
        world.judge(&store).await;
        assert_eq!(ends(&store), [6]);
    };
    world.sim.block_on(again).unwrap();
}

#[test]
fn a_volume_in_memory_has_no_use_for_it() {
    let mut world = World::new(3);
    world.disk = world.sim.disk("m", SIZE, SimDiskOptions { instant: 1, ..SimDiskOptions::default() });
    let run = async {
        let store = world.open().await;
        let partitions = world.topic(&store, 10, &[]).await;
        let before = world.disk.counts();
        world.append_to_each(&partitions).await;
        let after = world.disk.counts();
        assert_eq!(after.stable_writes, before.stable_writes);
        assert!(after.flushes > before.flushes);
    };
    world.sim.block_on(run).unwrap();
}

#[test]
fn tools_see_what_is_in_the_journal_only() {
    let world = World::new(3);
    let life = async {
        let store = world.open().await;
        let partitions = world.topic(&store, 5, &[]).await;
        world.append_to_each(&partitions).await;
        world.append_to_each(&partitions).await;
        store
    };
    drop(world.sim.block_on(life).unwrap());
    world.sim.cut_now();
    let look = async {
        let inspection = Inspection::volume(world.device()).await.unwrap();
        assert_eq!(inspection.findings, []);
        for view in &inspection.partitions {
            let (counts, findings) = verify(view, Options { now: None }, &mut |_| {}).await.unwrap();
            let faults: Vec<_> = findings.iter().filter(|one| one.severity == Severity::Fault).collect();
            assert!(faults.is_empty(), "{faults:?}");
            assert_eq!(counts.records, 3, "{}", view.name());
        }
        inspection.partitions.len()
    };
    let before = world.disk.counts();
    assert_eq!(world.sim.block_on(look).unwrap(), 5);
    assert_eq!(world.disk.counts().writes, before.writes, "a look has written");
}

/// A life of commits, some more than the journal holds, with rolled segments, appends that nobody waits for, and large ones, for
/// which only a flush will do; a stop in order, and more of the same. The power goes at every I/O boundary of it, and again while
/// the store opens.
#[test]
fn the_power_goes_at_every_boundary_of_a_life_of_commits() {
    let live = |world: &World| {
        let life = async {
            let store = world.open().await;
            let partitions = world.topic(&store, 3, &[("segment.bytes", "42000")]).await;
            for turn in 0..17 {
                world.append_records(&partitions, 1500).await;
                match turn % 8 {
                    2 => drop(partitions[0].append(record(), Durability::Cached).await.unwrap()),
                    4 => world.append_records(&partitions[..1], LARGE).await,
                    7 => drop(partitions[0].append(record_of(LARGE), Durability::Cached).await.unwrap()),
                    _ => {}
                }
            }
            store.close().await.unwrap();
            let store = world.open().await;
            world.judge(&store).await;
            let partitions = store.topic("t").unwrap().partitions().to_vec();
            for _ in 0..6 {
                world.append_records(&partitions, 1500).await;
            }
        };
        world.sim.block_on(life).is_ok()
    };
    at_every_boundary(
        200,
        // A journal of 30 blocks.
        |seed| World::of_size(seed, 8 << 20),
        |world| &world.sim,
        live,
        |world, style, _| {
            world.sim.set_cut_style(style);
            world.sim.cut_after(Some(world.sim.seed() % 40 + 1));
            let again = world.sim.block_on(async {
                let store = world.open().await;
                world.judge(&store).await;
            });
            if again.is_ok() {
                world.sim.cut_now();
            }
            world.sim.cut_after(None);
            let at_last = world.sim.block_on(async {
                let store = world.open().await;
                world.judge(&store).await;
            });
            at_last.unwrap();
        },
    );
}
