//! Several appends to one partition at once, in the simulation: what comes while one is written is written together and
//! lands in order; none is acknowledged before those that came before it, whatever fails and whenever the power goes.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use futures_util::future::join_all;
use logstore::batch::{Header, check};
use logstore::{Error, Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use parking_lot::Mutex;
use raid::device::Durability;
use raid::error::Operation;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tests::sim::ledger::Ledger;
use tests::sim::{CutStyle, Fault, Sim, SimDisk, SimDiskOptions, at_every_boundary};

/// As many as a Kafka producer sends before it waits for an answer.
const AT_ONCE: usize = 5;

#[derive(Debug, Default)]
struct Told {
    /// By its offset, the checksum of each batch that was acknowledged.
    batches: BTreeMap<i64, u32>,
    /// What survives a kill ends here at least, and what survives a power cut.
    cached: i64,
    stable: i64,
}

struct World {
    sim: Sim,
    disk: Arc<SimDisk>,
    told: Mutex<Told>,
}

/// The batches of one idempotent producer.
fn batches(from: usize, count: usize) -> Vec<Bytes> {
    let asked = |n: usize| {
        let stamp = Some((7, 0, n as i32));
        Ledger::shared().lock().append_asked((uuid::Uuid::nil(), 0), 1, 300 + n, stamp, false, 1).1
    };
    (from..from + count).map(asked).collect()
}

impl World {
    fn new(seed: u64, options: SimDiskOptions) -> Self {
        let sim = Sim::new(seed);
        let disk = sim.disk("d", 16 << 20, options);
        Self { sim, disk, told: Mutex::default() }
    }

    async fn open(&self) -> Arc<Store> {
        let home = Home::Volume(self.sim.plug(&self.disk));
        Store::open(home, StoreOptions::default(), self.sim.runtime()).await.unwrap()
    }

    /// A log with one batch, so that later ones find it in use.
    async fn begun(&self) -> (Arc<Store>, Arc<Partition>) {
        let store = self.open().await;
        let topic = store.create_topic("t", 1, TopicConfig::kafka_defaults()).await.unwrap();
        let log = Arc::clone(&topic.partitions()[0]);
        self.append(&log, &batches(0, 1)[0], Durability::Stable).await.unwrap();
        (store, log)
    }

    async fn append(
        &self,
        log: &Arc<Partition>,
        batch: &Bytes,
        durability: Durability,
    ) -> Result<i64, Error> {
        let appended = log.append(batch.clone(), durability).await?;
        let (base, end) = (appended.base_offset, appended.last_offset + 1);
        {
            let mut told = self.told.lock();
            told.batches.insert(base, Header::parse(batch).unwrap().crc);
            told.cached = told.cached.max(end);
        }
        if let Some(commit) = appended.commit {
            commit.await?;
            let mut told = self.told.lock();
            told.stable = told.stable.max(end);
        }
        Ok(base)
    }

    async fn append_all(&self, log: &Arc<Partition>, batches: &[Bytes]) -> Vec<Result<i64, Error>> {
        let durability = |n| if n % 3 == 2 { Durability::Stable } else { Durability::Cached };
        let appends = batches.iter().enumerate().map(|(n, batch)| self.append(log, batch, durability(n)));
        join_all(appends).await
    }

    async fn life(&self) {
        let (_store, log) = self.begun().await;
        for round in 0..3 {
            for outcome in self.append_all(&log, &batches(1 + round * AT_ONCE, AT_ONCE)).await {
                outcome.unwrap();
            }
        }
    }

    /// The log has no gap, holds what was acknowledged where that was said to be, and ends at `least` or later.
    async fn judge(&self, log: &Partition, least: i64) {
        let end = log.offsets().log_end;
        assert!(end >= least, "the log ends at {end}, {least} was acknowledged");
        let told = self.told.lock().batches.clone();
        let mut at = 0;
        while at < end {
            let mut rest =
                log.read(at, 1 << 20, ReadLimit::LogEnd, true).await.unwrap().copy().await.unwrap();
            assert!(!rest.is_empty(), "nothing at {at}, before {end}");
            while !rest.is_empty() {
                let header = Header::parse(&rest).unwrap();
                let one = rest.split_to(header.size as usize);
                check(&header, &one).unwrap();
                assert_eq!(header.base_offset, at);
                assert!(told.get(&at).is_none_or(|crc| *crc == header.crc), "another batch at {at}");
                at = header.next_offset();
            }
        }
    }

    fn judge_reopened(&self, style: CutStyle) {
        self.sim.cut_after(None);
        let run = async {
            let store = self.open().await;
            let Some(topic) = store.topic("t") else {
                assert_eq!(self.told.lock().cached, 0);
                return;
            };
            let (cached, stable) = {
                let told = self.told.lock();
                (told.cached, told.stable)
            };
            let least = if style == CutStyle::ProcessKilled { cached } else { stable };
            self.judge(&topic.partitions()[0], least).await;
        };
        self.sim.block_on(run).unwrap();
    }
}

#[test]
fn the_power_goes_at_every_boundary() {
    at_every_boundary(
        50,
        |seed| World::new(seed, SimDiskOptions::default()),
        |world| &world.sim,
        |world| world.sim.block_on(world.life()).is_ok(),
        |world, style, _| world.judge_reopened(style),
    );
}

#[test]
fn what_comes_while_one_is_written_is_written_together() {
    let millisecond = SimDiskOptions { latency: 1000..1001, stragglers: 0, ..SimDiskOptions::default() };
    let world = World::new(1, millisecond);
    let run = async {
        let (_store, log) = world.begun().await;
        let before = world.sim.now();
        let appends = batches(1, AT_ONCE);
        let outcomes = join_all(appends.iter().map(|one| world.append(&log, one, Durability::Cached))).await;
        let bases: Vec<i64> = outcomes.into_iter().map(Result::unwrap).collect();
        assert_eq!(bases, [1, 2, 3, 4, 5], "in the order in which they came");
        let took = world.sim.now().saturating_sub(before);
        assert!(took < Duration::from_millis(3), "{AT_ONCE} appends took {took:?}, a write 1 ms");
    };
    world.sim.block_on(run).unwrap();
}

#[test]
fn what_comes_behind_a_failed_one_fails_and_can_be_sent_again() {
    let mut seen = [0; AT_ONCE + 1];
    for seed in 0..100 {
        let world = World::new(seed, SimDiskOptions::default());
        let run = async {
            let (_store, log) = world.begun().await;
            let spare = (seed % 3) as u32;
            world.disk.fail(Fault { spare, ..Fault::once(&[Operation::Write]) });
            let sent = batches(1, AT_ONCE);
            // The last one comes when others have been written.
            let appends = sent.iter().enumerate().map(async |(n, one)| {
                world.sim.runtime().sleep(Duration::from_millis(n as u64 / 2)).await;
                world.append(&log, one, Durability::Cached).await
            });
            let outcomes = join_all(appends).await;
            world.disk.heal();
            let good = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
            assert!(outcomes[..good].iter().all(Result::is_ok), "{outcomes:?}");
            assert_eq!(log.offsets().log_end, 1 + good as i64);
            for one in &sent[good..] {
                world.append(&log, one, Durability::Cached).await.unwrap();
            }
            world.judge(&log, 1 + AT_ONCE as i64).await;
            good
        };
        seen[world.sim.block_on(run).unwrap()] += 1;
        let style = if seed % 2 == 0 { CutStyle::Chance } else { CutStyle::ProcessKilled };
        world.sim.set_cut_style(style);
        world.sim.cut_now();
        world.judge_reopened(style);
    }
    println!("so often, so many were written beside one that failed: {seen:?}");
    assert!(seen[..AT_ONCE].iter().filter(|often| **often > 0).count() >= 2, "{seen:?}");
}
