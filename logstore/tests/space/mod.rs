//! Space on a volume: the images shrink when records go, and after any sequence of what a store does, free space and what
//! the catalog says is held are all there is, no extent has two owners, and a restart finds the same.

use super::common::{self, Clock, NOW, append, append_stable, batch, defaults, first, sized};
use super::healing::Mirror;
use bytes::Bytes;
use logstore::inspect::Inspection;
use logstore::{Error, Partition, Store, TopicConfig};
use raid::device::{FileDevice, OpenMode};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

/// Bytes that a file takes on its file system.
fn taken(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Bytes that all members of a mirror take.
fn taken_by(mirror: &Mirror) -> u64 {
    mirror.images.iter().map(|image| taken(image)).sum()
}

async fn fill(log: &Arc<Partition>, bytes: u64) {
    let value = "v".repeat(60_000);
    for _ in 0..bytes / 60_000 {
        append(log, &batch(&[&value])).await;
    }
    append_stable(log, &batch(&["end"])).await;
}

#[test]
fn images_shrink_when_records_are_deleted_in_each_way() {
    const LOG: u64 = 6 << 20;
    for way in ["a topic is deleted", "retention", "DeleteRecords"] {
        let mirror = Mirror::new("n2", 2);
        mirror.run(true, async |store, volume| {
            let own = [("segment.bytes", "1000000"), ("file.delete.delay.ms", "0")];
            let log = common::topic(&store, "t", &own).await;
            let other = common::topic(&store, "other", &own).await;
            fill(&other, LOG / 2).await;
            let empty = taken_by(&mirror);
            fill(&log, LOG).await;
            store.quiet().await;
            let full = taken_by(&mirror);
            assert!(full > empty + 2 * (LOG - (1 << 20)), "{way}: {empty} {full}: both members hold it");
            match way {
                "a topic is deleted" => store.delete_topic("t").await.unwrap(),
                "retention" => {
                    let config = defaults().with(own).unwrap().with([("retention.bytes", "0")]).unwrap();
                    store.configure_topic("t", config).await.unwrap();
                    store.enforce_retention().await.unwrap();
                }
                _ => drop(log.delete_records_before(log.offsets().high_watermark).await.unwrap()),
            }
            drop(log);
            store.quiet().await;
            raid::device::Device::flush(&*volume).await.unwrap();
            let left = taken_by(&mirror);
            // The segment that is appended to stays, but where the topic goes.
            let kept = if way == "a topic is deleted" { 1 << 20 } else { 2 * (2 << 20) };
            assert!(left < empty + kept, "{way}: {empty} {full} {left}");
            assert_eq!(common::read_all(&other).await.len() as u64, LOG / 2 / 60_000 + 1);
        });
    }
}

/// Space that a commit has freed, and a kill has kept from being discarded, leaves the images after the next start.
#[test]
fn images_shrink_though_a_kill_came_before_the_discard() {
    const LOG: u64 = 6 << 20;
    let mirror = Mirror::new("n2", 2);
    let own = [("segment.bytes", "1000000")];
    let empty = mirror.run(true, async |store, _volume| {
        fill(&common::topic(&store, "kept", &own).await, LOG / 2).await;
        taken_by(&mirror)
    });
    mirror.run(false, async |store, _volume| {
        let log = common::topic(&store, "t", &own).await;
        fill(&log, LOG).await;
        store.quiet().await;
        // Its space waits for `file.delete.delay.ms`, which is a minute.
        store.delete_topic("t").await.unwrap();
    });
    let full = taken_by(&mirror);
    assert!(full > empty + 2 * (LOG - (1 << 20)), "{empty} {full}");
    mirror.run(true, async |store, volume| {
        store.quiet().await;
        raid::device::Device::flush(&*volume).await.unwrap();
        let left = taken_by(&mirror);
        assert!(left < empty + (2 << 20), "{empty} {full} {left}");
        let kept = common::read_all(&first(&store, "kept")).await;
        assert_eq!(kept.len() as u64, LOG / 2 / 60_000 + 1);
        accounted(&store, "discarding");
    });
}

/// Numbers that look random and are the same in each run.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn settings(seeded: &mut Seeded) -> TopicConfig {
    let segment = ["30000", "70000", "200000"][seeded.below(3) as usize];
    let policy = ["delete", "compact"][seeded.below(2) as usize];
    let own = [
        ("segment.bytes", segment),
        ("cleanup.policy", policy),
        ("retention.bytes", "150000"),
        ("file.delete.delay.ms", "0"),
        ("min.cleanable.dirty.ratio", "0.1"),
    ];
    defaults().with(own).unwrap()
}

fn accounted(store: &Store, what: &str) -> u64 {
    let space = store.space().unwrap().unwrap();
    assert_eq!(space.free + space.held, space.total, "after {what}: {space:?}");
    space.free
}

/// One thing that a store is asked to do, of those that take or free space.
async fn step(store: &Arc<Store>, seeded: &mut Seeded) -> String {
    let topics = store.topics();
    if topics.len() < 2 || (topics.len() < 6 && seeded.below(8) == 0) {
        let name = format!("t{}", seeded.below(1 << 30));
        let partitions = 1 + seeded.below(3) as u32;
        let made = store.create_topic(&name, partitions, settings(seeded)).await;
        assert!(matches!(made, Ok(_) | Err(Error::TopicExists { .. })), "{made:?}");
        return format!("making {name}");
    }
    let topic = &topics[seeded.below(topics.len() as u64) as usize];
    let log = Arc::clone(&topic.partitions()[seeded.below(topic.partitions().len() as u64) as usize]);
    let name = format!("{}-{}", topic.name(), log.index());
    match seeded.below(12) {
        0 => {
            store.delete_topic(topic.name()).await.unwrap();
            format!("deleting {name}")
        }
        1 => {
            let offsets = log.offsets();
            let to = offsets.log_start
                + seeded.below((offsets.high_watermark - offsets.log_start + 1) as u64) as i64;
            log.delete_records_before(to).await.unwrap();
            format!("deleting {name} up to {to}")
        }
        2 => {
            store.enforce_retention().await.unwrap();
            "retention".to_owned()
        }
        3 => {
            store.compact().await.unwrap();
            "compaction".to_owned()
        }
        _ => {
            let mut count = 0;
            for _ in 0..seeded.below(12) {
                let value = "x".repeat(seeded.below(28_000) as usize);
                let key = format!("k{}", seeded.below(5));
                let sent = common::keyed(&[(&key, Some(&value))]).at(NOW);
                match log.append(sent.bytes(), raid::device::Durability::Cached).await {
                    Ok(_) => count += 1,
                    // The volume may be full: then something is freed, one of these times.
                    Err(Error::NoSpace { .. } | Error::CatalogFull { .. }) => break,
                    Err(error) => panic!("{name}: {error}"),
                }
            }
            format!("{count} appends to {name}")
        }
    }
}

#[test]
fn whatever_a_store_does_its_space_is_accounted_for() {
    for seed in 0..6 {
        let place = common::Place::volume(8 << 20);
        let mut seeded = Seeded(seed);
        let mut was: Option<(bool, u64)> = None;
        let mut least = u64::MAX;
        for life in 0..8 {
            let in_order = seeded.below(2) == 0;
            let work = async |store: Arc<Store>| {
                // What recovery found closed but not sealed is sealed behind its back, and gives space back; what was free is
                // discarded, after a kill.
                store.quiet().await;
                let free = accounted(&store, "opening");
                if let Some((true, before)) = was {
                    assert_eq!(free, before, "seed {seed}, life {life}: a restart finds the same");
                }
                for number in 0..40 {
                    let what = step(&store, &mut seeded).await;
                    store.quiet().await;
                    let what = format!("seed {seed}, life {life}, step {number}, {what}");
                    least = least.min(accounted(&store, &what));
                }
                if in_order {
                    store.close().await.unwrap();
                }
                let space = store.space();
                space.ok().flatten().map(|space| space.free)
            };
            let free = place.run(work);
            was = free.map(|free| (in_order, free));
            let inspection = runtime().block_on(async {
                let device = FileDevice::open(&place.image(), OpenMode::ReadOnly).unwrap();
                Inspection::volume(Arc::new(device)).await.unwrap()
            });
            // Among them would be extents that are out of place or claimed twice.
            let told: Vec<String> = inspection.findings.iter().map(ToString::to_string).collect();
            assert!(told.is_empty(), "seed {seed}, life {life}: {told:#?}");
        }
        assert!(least < 3 << 20, "seed {seed}: the volume was never near full: {least} free");
        // All of it comes back.
        place.run_and_close(async |store: Arc<Store>| {
            for topic in store.topics() {
                store.delete_topic(topic.name()).await.unwrap();
            }
            store.quiet().await;
            let space = store.space().unwrap().unwrap();
            assert_eq!((space.free, space.held), (space.total, 0), "seed {seed}");
        });
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A volume that is full of records: what frees space is done, and then there is room again.
#[test]
fn on_a_full_volume_records_and_topics_can_be_deleted() {
    let place = common::Place::volume(8 << 20);
    place.run_and_close(async |store: Arc<Store>| {
        let own =
            [("segment.bytes", "65536"), ("file.delete.delay.ms", "0"), ("index.interval.bytes", "100")];
        for name in ["a", "b"] {
            common::topic(&store, name, &own).await;
        }
        let full = async || {
            let value = sized(1000, 1).bytes();
            for name in ["a", "b"].iter().cycle() {
                let Some(topic) = store.topic(name) else { continue };
                let log = &topic.partitions()[0];
                if let Err(error) = log.append(Bytes::clone(&value), raid::device::Durability::Cached).await {
                    assert!(matches!(error, Error::NoSpace { .. } | Error::CatalogFull { .. }), "{error}");
                    return;
                }
            }
        };
        full().await;
        store.quiet().await;
        let log = first(&store, "a");
        let end = log.offsets().high_watermark;
        log.delete_records_before(end / 2).await.unwrap();
        store.quiet().await;
        full().await;
        store.quiet().await;
        store.enforce_retention().await.unwrap();
        store.delete_topic("b").await.unwrap();
        store.quiet().await;
        append_stable(&log, &sized(1000, 1)).await;
        accounted(&store, "all that");
    });
}

/// A volume on which compaction finds no room, half-way and from the beginning: it is given up and leaves no space taken, is
/// parked, and goes on when there is room and its time has come. What is there is served.
#[test]
fn compaction_without_room_rests_and_goes_on() {
    let place = common::Place::volume(24 << 20);
    let clock = Clock::default();
    let own = |policy: &'static str| {
        [
            ("cleanup.policy", policy),
            ("segment.bytes", "6000000"),
            ("file.delete.delay.ms", "0"),
            ("min.cleanable.dirty.ratio", "0.01"),
            ("max.message.bytes", "6000000"),
        ]
    };
    place.run_by(&clock, true, async |store: Arc<Store>| {
        let log = common::topic(&store, "t", &own("compact")).await;
        let filler = common::topic(&store, "filler", &own("delete")).await;
        // One key in three comes again; what stays of a segment is more than half the reserve.
        for at in 0..150 {
            let key = if at % 3 == 0 { "again".to_owned() } else { format!("k{at}") };
            let value = format!("{at} {}", "v".repeat(80_000));
            append_stable(&log, &common::keyed(&[(&key, Some(&value))])).await;
        }
        store.quiet().await;
        let value = sized(50_000, 1).bytes();
        while filler.append(Bytes::clone(&value), raid::device::Durability::Cached).await.is_ok() {}
        store.quiet().await;
        let (expected, batches) = (super::cleaning::table(&log).await, common::read_all(&log).await.len());
        let free = accounted(&store, "filling");
        for attempt in 0..3 {
            assert_eq!(store.compact().await.unwrap(), 0, "attempt {attempt}");
            store.quiet().await;
            assert_eq!(accounted(&store, "an attempt"), free, "attempt {attempt}: it left nothing");
            assert_eq!(store.uncleanable(), 1);
            assert_eq!(super::cleaning::table(&log).await, expected);
            // Once more at once, and once more when its time has come.
            if attempt == 1 {
                clock.pass(61_000);
            }
        }
        let refused = filler.append(value, raid::device::Durability::Cached).await;
        assert!(refused.is_err_and(|error| error.is_no_room()));
        filler.delete_records_before(filler.offsets().high_watermark).await.unwrap();
        store.quiet().await;
        assert_eq!(store.compact().await.unwrap(), 0, "its time has not come");
        clock.pass(121_000);
        assert_eq!(store.compact().await.unwrap(), 1);
        assert_eq!(store.uncleanable(), 0);
        store.quiet().await;
        assert_eq!(super::cleaning::table(&log).await, expected);
        assert!(log.size() < batches as u64 * 80_000 * 4 / 5);
        accounted(&store, "compaction");
    });
}
