//! When appends become durable, on the simulated clock: group commit and its linger, `flush.ms`, `flush.messages`.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use logstore::{Appended, Home, Partition, Store, StoreOptions, TopicConfig};
use raid::device::Durability;
use raid::error::Operation;
use std::sync::Arc;
use std::time::Duration;
use tests::sim::ledger::Ledger;
use tests::sim::{CutStyle, Fault, Sim, SimDisk, SimDiskOptions};

/// Longer than everything that a store does at once takes on a simulated disk.
const SOON: Duration = Duration::from_millis(200);

struct World {
    sim: Sim,
    disk: Arc<SimDisk>,
    linger: Duration,
}

impl World {
    fn new() -> Self {
        Self::of_size(16 << 20)
    }

    fn of_size(size: u64) -> Self {
        let sim = Sim::new(7);
        let disk = sim.disk("d", size, SimDiskOptions::default());
        // What is not flushed is lost.
        sim.set_cut_style(CutStyle::AllLost);
        Self { sim, disk, linger: Duration::ZERO }
    }

    async fn open(&self) -> Arc<Store> {
        let options = StoreOptions { commit_linger: self.linger, ..StoreOptions::default() };
        let home = Home::Volume(self.sim.plug(&self.disk));
        Store::open(home, options, self.sim.runtime()).await.unwrap()
    }

    /// A topic that was appended to, so that no later append needs the catalog.
    async fn topic(&self, store: &Store, partitions: u32, own: &[(&str, &str)]) -> Vec<Arc<Partition>> {
        let config = TopicConfig::kafka_defaults().with(own.iter().copied()).unwrap();
        let topic = store.create_topic("t", partitions, config).await.unwrap();
        for partition in topic.partitions() {
            append(partition, Durability::Stable).await.commit.unwrap().await.unwrap();
        }
        topic.partitions().to_vec()
    }

    async fn sleep(&self, time: Duration) {
        self.sim.runtime().sleep(time).await;
    }

    fn flushes(&self) -> u64 {
        self.disk.counts().flushes
    }

    /// How often something was made durable: by a flush of all, or by a write.
    fn syncs(&self) -> u64 {
        let counts = self.disk.counts();
        counts.flushes + counts.stable_writes
    }

    /// Offsets after a power cut at the end of `life`.
    fn ends_after(&self, life: impl Future<Output = Arc<Store>>) -> Vec<i64> {
        let store = self.sim.block_on(life).unwrap();
        self.sim.cut_now();
        drop(store);
        self.sim
            .block_on(async {
                let store = self.open().await;
                let topic = store.topic("t").unwrap();
                topic.partitions().iter().map(|partition| partition.offsets().log_end).collect()
            })
            .unwrap()
    }
}

/// A batch of one record.
fn record() -> Bytes {
    Ledger::shared().lock().append_asked((uuid::Uuid::nil(), 0), 1, 100, None, false, 1).1
}

async fn append(partition: &Arc<Partition>, durability: Durability) -> Appended {
    partition.append(record(), durability).await.unwrap()
}

#[test]
fn without_flush_ms_nobody_flushes_what_nobody_waits_for() {
    let world = World::new();
    let ends = world.ends_after(async {
        let store = world.open().await;
        let partitions = world.topic(&store, 1, &[]).await;
        assert!(append(&partitions[0], Durability::Cached).await.commit.is_none());
        world.sleep(Duration::from_secs(1000)).await;
        store
    });
    assert_eq!(ends, [1], "the append that nobody flushed is durable: this test and the next show nothing");
}

/// A log of 68 MB that has space for as much again: a while goes by before the catalog has to flush for it.
async fn long_log(world: &World, store: &Store) -> (Arc<Partition>, Bytes) {
    let partition = Arc::clone(&world.topic(store, 1, &[]).await[0]);
    let megabyte =
        Ledger::shared().lock().append_asked((uuid::Uuid::nil(), 0), 1, 1_000_000, None, false, 1).1;
    for _ in 0..68 {
        partition.append(megabyte.clone(), Durability::Cached).await.unwrap();
    }
    world.sleep(SOON).await;
    (partition, megabyte)
}

#[test]
fn what_nobody_waits_for_is_flushed_by_the_megabyte() {
    let world = World::of_size(256 << 20);
    let ends = world.ends_after(async {
        let store = world.open().await;
        let (partition, megabyte) = long_log(&world, &store).await;
        let before = world.flushes();
        for _ in 0..34 {
            partition.append(megabyte.clone(), Durability::Cached).await.unwrap();
        }
        world.sleep(SOON).await;
        assert_eq!(world.flushes() - before, 1, "flushes for 34 MB");
        store
    });
    assert!((69..=103).contains(&ends[0]), "{ends:?}");
}

#[test]
fn a_flush_that_nobody_waits_for_and_that_fails_stops_the_store() {
    let world = World::of_size(256 << 20);
    let test = async {
        let store = world.open().await;
        let (partition, megabyte) = long_log(&world, &store).await;
        world.disk.fail(Fault::once(&[Operation::Flush]));
        for _ in 0..34 {
            if let Err(error) = partition.append(megabyte.clone(), Durability::Cached).await {
                return error;
            }
        }
        world.sleep(SOON).await;
        partition.append(megabyte, Durability::Cached).await.unwrap_err()
    };
    let error = world.sim.block_on(test).unwrap();
    assert!(matches!(error, logstore::Error::Poisoned { .. }), "{error}");
}

#[test]
fn flush_ms_bounds_how_long_an_append_is_not_durable() {
    // Less than what was committed stays in the journal only: a flush comes then, too.
    const BOUND: Duration = Duration::from_secs(3);
    for (wait, durable) in [(BOUND.saturating_sub(SOON), false), (BOUND + SOON, true)] {
        let world = World::new();
        let ends = world.ends_after(async {
            let store = world.open().await;
            let partitions = world.topic(&store, 3, &[("flush.ms", "3000")]).await;
            let before = world.syncs();
            for partition in &partitions {
                assert!(append(partition, Durability::Cached).await.commit.is_none());
                assert_eq!(partition.offsets().high_watermark, 2, "what nobody waits for is visible at once");
            }
            world.sleep(wait).await;
            assert_eq!(world.syncs() - before, u64::from(durable), "one sync is enough for all partitions");
            store
        });
        assert_eq!(ends, if durable { [2; 3] } else { [1; 3] }, "after {wait:?}");
    }
}

#[test]
fn the_bound_counts_from_the_first_append_that_is_not_durable() {
    let world = World::new();
    let ends = world.ends_after(async {
        let store = world.open().await;
        let partitions = world.topic(&store, 1, &[("flush.ms", "2000")]).await;
        let before = world.syncs();
        // Without a pause of 2 s between any two.
        for _ in 0..10 {
            append(&partitions[0], Durability::Cached).await;
            world.sleep(Duration::from_millis(500)).await;
        }
        let syncs = world.syncs() - before;
        assert!((2..=3).contains(&syncs), "{syncs} syncs in 5 s");
        store
    });
    assert!((7..=10).contains(&ends[0]), "{ends:?}");
}

#[test]
fn a_shorter_bound_overtakes_a_longer_one() {
    let world = World::new();
    let ends = world.ends_after(async {
        let store = world.open().await;
        let partitions = world.topic(&store, 2, &[("flush.ms", "3600000")]).await;
        append(&partitions[0], Durability::Cached).await;
        let config = TopicConfig::kafka_defaults().with([("flush.ms", "1000")]).unwrap();
        store.configure_topic("t", config).await.unwrap();
        // The catalog's commit has flushed what came before it; this starts anew.
        append(&partitions[0], Durability::Cached).await;
        append(&partitions[1], Durability::Cached).await;
        world.sleep(Duration::from_secs(1) + SOON).await;
        store
    });
    assert_eq!(ends, [3, 2]);
}

#[test]
fn any_commit_covers_what_waits_for_its_time() {
    let world = World::new();
    let ends = world.ends_after(async {
        let store = world.open().await;
        let partitions = world.topic(&store, 2, &[("flush.ms", "1000")]).await;
        append(&partitions[0], Durability::Cached).await;
        append(&partitions[1], Durability::Stable).await.commit.unwrap().await.unwrap();
        let before = world.syncs();
        world.sleep(Duration::from_secs(3)).await;
        assert_eq!(world.syncs(), before, "nothing was left to sync");
        store
    });
    assert_eq!(ends, [2, 2]);
}

#[test]
fn flush_messages_makes_the_append_that_reaches_it_wait() {
    let world = World::new();
    let ends = world.ends_after(async {
        let store = world.open().await;
        let partitions = world.topic(&store, 1, &[("flush.messages", "3")]).await;
        let partition = &partitions[0];
        for _ in 0..2 {
            for _ in 0..2 {
                assert!(append(partition, Durability::Cached).await.commit.is_none());
            }
            let third = append(partition, Durability::Cached).await;
            third.commit.expect("the third record has to wait for a flush").await.unwrap();
        }
        // Not the third since the last flush.
        append(partition, Durability::Cached).await;
        store
    });
    assert_eq!(ends, [7]);
}

#[test]
fn closing_waits_for_no_bound() {
    let world = World::new();
    let ends = world.ends_after(async {
        let store = world.open().await;
        let partitions = world.topic(&store, 1, &[("flush.ms", "3600000")]).await;
        append(&partitions[0], Durability::Cached).await;
        let begun = world.sim.now();
        store.close().await.unwrap();
        assert!(
            world.sim.now().saturating_sub(begun) < Duration::from_secs(60),
            "closing waited for flush.ms"
        );
        store
    });
    assert_eq!(ends, [2]);
}

#[test]
fn a_linger_gathers_company_and_no_longer() {
    const LINGER: Duration = Duration::from_secs(3);
    for linger in [Duration::ZERO, LINGER] {
        let mut world = World::new();
        world.linger = linger;
        let run = async {
            let store = world.open().await;
            let partitions = world.topic(&store, 4, &[]).await;
            let (before, begun) = (world.syncs(), world.sim.now());
            let mut commits = Vec::new();
            for partition in &partitions {
                commits.push(append(partition, Durability::Stable).await.commit.unwrap());
                world.sleep(LINGER / 6).await;
            }
            for commit in commits {
                commit.await.unwrap();
            }
            let (syncs, took) = (world.syncs() - before, world.sim.now().saturating_sub(begun));
            if linger.is_zero() {
                assert_eq!(syncs, 4, "commits that came one by one");
                assert!(took < LINGER, "took {took:?}");
            } else {
                assert_eq!(syncs, 1, "commits that came within the linger");
                assert!(took >= LINGER && took < LINGER + SOON, "took {took:?}");
            }
            // The next group waits anew, no less and no more.
            let begun = world.sim.now();
            append(&partitions[0], Durability::Stable).await.commit.unwrap().await.unwrap();
            let took = world.sim.now().saturating_sub(begun);
            assert!(took >= linger && took < linger + SOON, "took {took:?}");
            store
        };
        assert_eq!(world.ends_after(run), [3, 2, 2, 2]);
    }
}
