//! Small appends to many partitions become durable by one write to the volume's journal, and come back from there after a
//! power cut.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use futures_util::future::join_all;
use logstore::inspect::verify::{Options, verify};
use logstore::inspect::{Inspection, Severity};
use logstore::{Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use parking_lot::Mutex;
use raid::device::{Device, Durability};
use std::sync::Arc;
use std::time::Duration;
use tests::sim::bugs::{Bug, Buggy};
use tests::sim::ledger::Ledger;
use tests::sim::{CutStyle, Sim, SimDisk, SimDiskOptions, at_every_boundary};

const SIZE: u64 = 64 << 20;
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
        let sim = Sim::new(seed);
        let disk = sim.disk("d", SIZE, SimDiskOptions::default());
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
        Store::open(Home::Volume(self.device()), StoreOptions::default(), self.sim.runtime()).await.unwrap()
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
        join_all(partitions.iter().map(|partition| async {
            let appended = partition.append(record(), Durability::Stable).await.unwrap();
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
    Ledger::shared().lock().append_asked((uuid::Uuid::nil(), 0), 1, 100, None, false, 1).1
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

/// A life of commits, some more than the journal holds, with rolled segments and appends that nobody waits for; a stop in order,
/// and more of the same. The power goes at every I/O boundary of it, and again while the store opens.
#[test]
fn the_power_goes_at_every_boundary_of_a_life_of_commits() {
    let live = |world: &World| {
        let life = async {
            let store = world.open().await;
            let partitions = world.topic(&store, 3, &[("segment.bytes", "4000")]).await;
            for turn in 0..25 {
                world.append_to_each(&partitions).await;
                if turn % 6 == 5 {
                    partitions[0].append(record(), Durability::Cached).await.unwrap();
                }
            }
            store.close().await.unwrap();
            let store = world.open().await;
            world.judge(&store).await;
            let partitions = store.topic("t").unwrap().partitions().to_vec();
            for _ in 0..10 {
                world.append_to_each(&partitions).await;
            }
        };
        world.sim.block_on(life).is_ok()
    };
    at_every_boundary(
        200,
        World::new,
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
