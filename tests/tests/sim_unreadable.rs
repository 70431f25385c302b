//! A place of a log that no copy answers when the store is opened: its partition is served up to there, changed by nothing
//! but its deletion, and whole again once the disk answers. Every other log is as it was.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use logstore::{Error, Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use raid::device::{Device, Durability};
use raid::error::Operation;
use raid::geometry::Layout;
use std::sync::Arc;
use std::time::Duration;
use tests::broker::batch;
use tests::sim::array::{Rig, Shape};
use tests::sim::{CutStyle, Fault, Sim, SimDisk, SimDiskOptions};

const SIZE: u64 = 16 << 20;
/// Records of each log, each of which is a batch.
const COUNT: i64 = 40;
/// The one that will not be answered, in the middle of what recovery reads at once.
const HIT: i64 = 30;

/// A lone disk, or a mirror of two.
enum Ground {
    Disk(Sim, Arc<SimDisk>),
    Array(Box<Rig>),
}

impl Ground {
    fn sim(&self) -> &Sim {
        match self {
            Self::Disk(sim, _) => sim,
            Self::Array(rig) => &rig.sim,
        }
    }

    fn disks(&self) -> Vec<Arc<SimDisk>> {
        match self {
            Self::Disk(_, disk) => vec![Arc::clone(disk)],
            Self::Array(rig) => rig.disks.clone(),
        }
    }

    async fn open(&self) -> Arc<Store> {
        let device: Arc<dyn Device> = match self {
            Self::Disk(sim, disk) => sim.plug(disk),
            Self::Array(rig) => rig.assemble(rig.plug(&rig.slots())).await.unwrap(),
        };
        let home = Home::Volume(device);
        Store::open(home, StoreOptions::default(), self.sim().runtime()).await.unwrap()
    }

    fn end(&self, style: CutStyle) {
        self.sim().set_cut_style(style);
        self.sim().cut_now();
    }
}

/// Lets the disks refuse to read the middle of a value, in its segment: the journal, which may hold it too, lies before all of them.
fn hide(disks: &[Arc<SimDisk>], needle: &[u8]) {
    for disk in disks {
        let bytes = disk.peek(0, disk.size());
        let at = bytes.windows(needle.len()).rposition(|window| window == needle).unwrap() as u64;
        let within = at + 300..at + 301;
        disk.fail(Fault { within, lands: false, ..Fault::lasting(&[Operation::Read]) });
    }
}

fn value(name: &str, at: i64) -> Vec<u8> {
    format!("{name} {at:04} ").repeat(80).into_bytes()
}

fn log_of(store: &Store, name: &str) -> Arc<Partition> {
    Arc::clone(&store.topic(name).unwrap().partitions()[0])
}

async fn append(log: &Arc<Partition>, name: &str, at: i64) -> Result<i64, Error> {
    let appended = log.append(batch(&[&value(name, at)], 1), Durability::Stable).await?;
    appended.commit.unwrap().await?;
    Ok(appended.base_offset)
}

async fn holds(log: &Partition, name: &str, end: i64) {
    assert_eq!((log.offsets().high_watermark, log.offsets().log_end), (end, end), "{name}");
    for at in 0..end {
        let slice = log.read(at, 1, ReadLimit::HighWatermark, true).await.unwrap();
        let bytes = slice.copy().await.unwrap();
        let value = value(name, at);
        assert!(bytes.windows(value.len()).any(|window| window == value), "{name} {at}");
    }
}

fn grounds() -> Vec<Ground> {
    let sim = Sim::new(1);
    let disk = sim.disk("d", SIZE, SimDiskOptions::default());
    let (chunk, disks) = (64 << 10, SimDiskOptions::default());
    let shape =
        Shape { chunk, chunks: SIZE / chunk, region: 1 << 20, disks, ..Shape::small(Layout::near(2), 2) };
    let grounds = vec![Ground::Disk(sim, disk), Ground::Array(Box::new(Rig::create(shape, 1)))];
    for ground in &grounds {
        let life = async {
            let store = ground.open().await;
            for name in ["hit", "other"] {
                let config = TopicConfig::kafka_defaults().with([("retention.ms", "-1")]).unwrap();
                store.create_topic(name, 1, config).await.unwrap();
                for at in 0..COUNT {
                    append(&log_of(&store, name), name, at).await.unwrap();
                }
            }
            // Until nothing is in the journal only.
            ground.sim().runtime().sleep(Duration::from_secs(10)).await;
        };
        ground.sim().block_on(life).unwrap();
        ground.end(CutStyle::AllLost);
    }
    grounds
}

#[test]
fn what_no_copy_answers_is_the_fault_of_its_partition_alone() {
    for ground in grounds() {
        let sim = ground.sim();
        hide(&ground.disks(), &value("hit", HIT));
        let life = async {
            let store = ground.open().await;
            let hit = log_of(&store, "hit");
            holds(&hit, "hit", HIT).await;
            let refused = append(&hit, "hit", HIT).await.unwrap_err();
            assert!(matches!(refused, Error::UnreadableLog { offset: HIT, segment: 0, .. }), "{refused}");
            let refused = hit.delete_records_before(HIT).await.unwrap_err();
            assert!(matches!(refused, Error::UnreadableLog { .. }), "{refused}");
            store.enforce_retention().await.unwrap();
            store.compact().await.unwrap();
            let other = log_of(&store, "other");
            holds(&other, "other", COUNT).await;
            assert_eq!(append(&other, "other", COUNT).await.unwrap(), COUNT);
            store.close().await.unwrap();
        };
        sim.block_on(life).unwrap();
        ground.end(CutStyle::AllLost);
        ground.disks().iter().for_each(|disk| disk.heal());
        for end in COUNT..COUNT + 2 {
            let life = async {
                let store = ground.open().await;
                let hit = log_of(&store, "hit");
                holds(&hit, "hit", end).await;
                assert_eq!(append(&hit, "hit", end).await.unwrap(), end);
                holds(&log_of(&store, "other"), "other", COUNT + 1).await;
            };
            sim.block_on(life).unwrap();
            ground.end(CutStyle::AllLost);
        }
    }
}

#[test]
fn a_topic_that_cannot_be_read_can_be_deleted() {
    for ground in grounds() {
        let sim = ground.sim();
        hide(&ground.disks(), &value("hit", HIT));
        let life = async {
            let store = ground.open().await;
            store.delete_topic("hit").await.unwrap();
            store.delete_topic("other").await.unwrap();
            store.close().await.unwrap();
        };
        sim.block_on(life).unwrap();
        let life = async {
            let store = ground.open().await;
            let space = store.space().unwrap().unwrap();
            assert_eq!((space.free, space.held), (space.total, 0));
        };
        sim.block_on(life).unwrap();
    }
}

#[test]
fn one_copy_that_answers_is_enough() {
    for leg in 0..2 {
        let ground = grounds().pop().unwrap();
        hide(&ground.disks()[leg..=leg], &value("hit", HIT));
        let life = async {
            let store = ground.open().await;
            let hit = log_of(&store, "hit");
            holds(&hit, "hit", COUNT).await;
            assert_eq!(append(&hit, "hit", COUNT).await.unwrap(), COUNT);
        };
        ground.sim().block_on(life).unwrap();
    }
}
