//! What takes records out of a log, under power cuts: compaction, also of what is closed for its age only, retention,
//! `DeleteRecords` and changes of the catalog, with the power going at every I/O boundary of a life that has all of them.
//! Judged afterwards, twice:
//!
//! - the table of a compacted log is that of what was sent up to its end, and what was acknowledged is below its end;
//! - every record that is read is the one that was sent there; offsets rise;
//! - a log's start is where `DeleteRecords` was answered, or beyond;
//! - free space and what the catalog says is held are all of the space.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use kafka_protocol::records::{
    Compression, Record, RecordBatchDecoder, RecordBatchEncoder, RecordEncodeOptions, TimestampType,
};
use logstore::{CleanerOptions, Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use parking_lot::Mutex;
use raid::device::Durability;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tests::sim::{CutStyle, Sim, SimDisk, SimDiskOptions, at_every_boundary};

/// Bytes of the volume.
const SIZE: u64 = 16 << 20;

/// A record as it was sent: key, and value or tombstone.
type Sent = (String, Option<String>);

/// What is known of one log.
#[derive(Debug, Default)]
struct Model {
    /// By offset.
    sent: Vec<Sent>,
    /// All below was acknowledged as durable.
    stable: i64,
    /// Where `DeleteRecords` was asked for, and answered.
    deleted_asked: i64,
    deleted: i64,
}

struct World {
    sim: Sim,
    disk: Arc<SimDisk>,
    compacted: Mutex<Model>,
    plain: Mutex<Model>,
    compactions: Mutex<usize>,
}

fn batch(records: &[Sent], at: i64) -> Bytes {
    let record = |(n, (key, value)): (usize, &Sent)| Record {
        transactional: false,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: -1,
        producer_id: -1,
        producer_epoch: -1,
        timestamp_type: TimestampType::Creation,
        offset: n as i64,
        sequence: n as i32,
        timestamp: at,
        key: Some(Bytes::from(key.clone())),
        value: value.clone().map(Bytes::from),
        headers: std::iter::empty().collect(),
    };
    let records: Vec<Record> = records.iter().enumerate().map(record).collect();
    let mut out = BytesMut::new();
    let options = RecordEncodeOptions { version: 2, compression: Compression::None };
    RecordBatchEncoder::encode(&mut out, &records, &options).unwrap();
    out[53..57].copy_from_slice(&(-1i32).to_be_bytes());
    let crc = crc32c::crc32c(&out[21..]);
    out[17..21].copy_from_slice(&crc.to_be_bytes());
    out.freeze()
}

async fn read(log: &Partition) -> BTreeMap<i64, Sent> {
    let (mut at, end) = (log.offsets().log_start, log.offsets().log_end);
    let mut found = BTreeMap::new();
    while at < end {
        let bytes = log.read(at, 6000, ReadLimit::LogEnd, true).await.unwrap().copy().await.unwrap();
        // Compaction may have taken all up to the end of what is closed, and nothing was written since.
        let mut rest = bytes.clone();
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            let header = logstore::batch::Header::parse(&rest).unwrap();
            let one = rest.split_to(header.size as usize);
            logstore::batch::check(&header, &one).unwrap();
            at = header.next_offset();
            let records = if header.count == 0 {
                Vec::new()
            } else {
                RecordBatchDecoder::decode(&mut one.clone()).unwrap().records
            };
            let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).unwrap();
            for record in records {
                let last = found.last_key_value().map_or(-1, |(offset, _)| *offset);
                assert!(record.offset > last, "{} after {last}", record.offset);
                found.insert(record.offset, (text(record.key.unwrap()), record.value.map(text)));
            }
        }
    }
    found
}

impl World {
    fn new(seed: u64) -> Self {
        let sim = Sim::new(seed);
        let disk = sim.disk("d", SIZE, SimDiskOptions::default());
        let (compacted, plain, compactions) = Default::default();
        Self { sim, disk, compacted, plain, compactions }
    }

    async fn open(&self) -> Arc<Store> {
        let home = Home::Volume(self.sim.plug(&self.disk));
        // A map this small needs several passes.
        let cleaner = CleanerOptions { memory: 5 * logstore::compaction::ENTRY, ..CleanerOptions::default() };
        let options = StoreOptions { cleaner, ..StoreOptions::default() };
        Store::open(home, options, self.sim.runtime()).await.unwrap()
    }

    async fn append(&self, log: &Arc<Partition>, model: &Mutex<Model>, records: &[Sent], all: bool) {
        let now = self.sim.runtime().wall_clock().as_millis() as i64;
        model.lock().sent.extend_from_slice(records);
        let durability = if all { Durability::Stable } else { Durability::Cached };
        let appended = log.append(batch(records, now), durability).await.unwrap();
        let end = model.lock().sent.len() as i64;
        assert_eq!(appended.last_offset + 1, end);
        if let Some(commit) = appended.commit {
            commit.await.unwrap();
            model.lock().stable = end;
        }
    }

    async fn life(&self) {
        let store = self.open().await;
        let own = [
            ("segment.bytes", "2048"),
            ("segment.ms", "60000"),
            ("file.delete.delay.ms", "0"),
            ("min.cleanable.dirty.ratio", "0.01"),
            ("delete.retention.ms", "0"),
        ];
        let config = |more: (&str, &str)| {
            let config = TopicConfig::kafka_defaults().with(own.into_iter().chain([more]));
            config.unwrap()
        };
        let compacted = store.create_topic("c", 1, config(("cleanup.policy", "compact"))).await.unwrap();
        let plain = store.create_topic("p", 1, config(("retention.ms", "-1"))).await.unwrap();
        let (compacted, plain) = (&compacted.partitions()[0], &plain.partitions()[0]);
        for round in 0..3 {
            for n in 0..10 {
                let key = |n: u32| format!("k{}", n % 8);
                let value = |n: u32| (n % 5 != 4).then(|| format!("{round} {n} {}", "x".repeat(300)));
                let records = [(key(n), value(n)), (key(n * 3 + 1), value(n + 1))];
                self.append(compacted, &self.compacted, &records, n % 3 == 2).await;
                self.append(plain, &self.plain, &records[..1], n % 4 == 3).await;
            }
            store.quiet().await;
            *self.compactions.lock() += store.compact().await.unwrap();
            let to = self.plain.lock().sent.len() as i64 - 4;
            let before = self.plain.lock().deleted_asked;
            self.plain.lock().deleted_asked = before.max(to);
            assert!(plain.delete_records_before(to).await.unwrap() >= to);
            self.plain.lock().deleted = to;
            if round == 1 {
                store.configure_topic("p", config(("retention.bytes", "1000"))).await.unwrap();
                let all = self.plain.lock().sent.len() as i64;
                self.plain.lock().deleted_asked = all;
                store.enforce_retention().await.unwrap();
            }
            if round == 2 {
                store.create_topic("x", 3, config(("retention.ms", "-1"))).await.unwrap();
                store.delete_topic("x").await.unwrap();
            }
        }
        // Nobody writes any more: what is open is closed for its age, and compacted too.
        self.sim.runtime().sleep(Duration::from_secs(61)).await;
        store.compact().await.unwrap();
        store.enforce_retention().await.unwrap();
        store.quiet().await;
        *self.compactions.lock() += store.compact().await.unwrap();
        store.close().await.unwrap();
    }

    /// What is there is what may be there.
    async fn judge(&self, store: &Store) {
        if let Some(topic) = store.topic("c") {
            let log = &topic.partitions()[0];
            let offsets = log.offsets();
            let found = read(log).await;
            let model = self.compacted.lock();
            assert!(offsets.log_end >= model.stable, "{offsets:?}, {} was durable", model.stable);
            assert_eq!(offsets.log_start, 0);
            let mut table: BTreeMap<&String, (i64, &Option<String>)> = BTreeMap::new();
            for (offset, (key, value)) in model.sent.iter().enumerate().take(offsets.log_end as usize) {
                table.insert(key, (offset as i64, value));
            }
            for (offset, record) in &found {
                assert_eq!(Some(record), model.sent.get(*offset as usize), "at {offset}");
            }
            for (key, (offset, value)) in table {
                assert!(
                    found.contains_key(&offset) || value.is_none(),
                    "the last of {key}, at {offset}, is gone"
                );
                // Where the last tombstone is gone, all before it are gone too.
                let last = found.iter().rev().find(|(_, (found, _))| found == key).map(|(at, _)| *at);
                assert!(last.is_none_or(|last| last == offset), "{key} is back at {last:?}");
            }
        } else {
            assert_eq!(self.compacted.lock().stable, 0);
        }
        if let Some(topic) = store.topic("p") {
            let log = &topic.partitions()[0];
            let (offsets, found, model) = (log.offsets(), read(log).await, self.plain.lock());
            assert!(offsets.log_end >= model.stable.max(model.deleted), "{offsets:?} {model:?}");
            assert!(offsets.log_start >= model.deleted, "{offsets:?}, deleted below {}", model.deleted);
            assert!(offsets.log_start <= model.deleted_asked.max(model.deleted), "{offsets:?}");
            for offset in offsets.log_start.max(model.deleted)..offsets.log_end {
                assert_eq!(found.get(&offset), model.sent.get(offset as usize), "at {offset}");
            }
        }
        store.quiet().await;
        let space = store.space().unwrap().unwrap();
        assert_eq!(space.free + space.held, space.total, "{space:?}");
    }

    /// Opens twice with a power cut between; the second time it is compacted once more, and still says the same.
    fn finale(&self) {
        self.sim.cut_after(None);
        self.sim.set_cut_style(CutStyle::AllLost);
        for again in [false, true] {
            let run = async {
                let store = self.open().await;
                self.judge(&store).await;
                if again {
                    store.compact().await.unwrap();
                    self.judge(&store).await;
                }
            };
            self.sim.block_on(run).unwrap();
            self.sim.cut_now();
        }
    }
}

#[test]
fn the_power_goes_at_every_boundary() {
    let live = |world: &World| world.sim.block_on(world.life()).is_ok();
    at_every_boundary(
        100,
        World::new,
        |world| &world.sim,
        live,
        |world, _, whole| {
            world.finale();
            assert!(!whole || *world.compactions.lock() == 4, "hardly anything was tried");
        },
    );
}
