//! What takes records out of a log: `DeleteRecords`, retention, compaction; on both homes.

use super::common::*;
use logstore::batch::{BatchFault, Header, Outcome};
use logstore::compression::Codec;
use logstore::inspect::{Inspection, Severity, verify};
use logstore::records::{Records, unpack};
use logstore::{Error, Partition, ReadLimit, Store, StoreOptions};
use raid::device::{Durability, FileDevice, OpenMode};
use raid::runtime::{BoxFuture, Runtime, TokioRuntime};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};

#[test]
fn records_are_deleted_up_to_an_offset_for_good() {
    for place in Place::both() {
        place.run(async |store: Arc<Store>| {
            let own = [("segment.bytes", "4000"), ("file.delete.delay.ms", "0")];
            let log = topic(&store, "t", &own).await;
            for at in 0..60 {
                append(&log, &batch(&["a".repeat(300).as_str(), "b", "c"]).by(3, 0, at * 3)).await;
            }
            let size = log.size();
            for outside in [-1, 181, i64::MAX] {
                let refused = log.delete_records_before(outside).await;
                assert!(matches!(refused, Err(Error::OffsetOutOfRange { .. })), "{outside}");
            }
            assert_eq!(log.delete_records_before(0).await.unwrap(), 0);
            assert_eq!(log.delete_records_before(100).await.unwrap(), 100, "in the middle of a batch");
            assert_eq!(log.delete_records_before(50).await.unwrap(), 100, "it never goes back");
            assert_eq!(log.offsets().log_start, 100);
            assert!(log.size() < size * 6 / 10, "whole segments went");
            let below = log.read(99, 1, ReadLimit::HighWatermark, true).await;
            assert!(matches!(below, Err(Error::OffsetOutOfRange { log_start: 100, .. })));
            assert_eq!(read_all(&log).await.first().unwrap().0, 99, "its batch is whole");
        });
        // Nobody closed it: what was answered is there all the same.
        place.run_and_close(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!((log.offsets().log_start, log.offsets().log_end), (100, 180));
            assert_eq!(
                log.delete_records_before(180).await.unwrap(),
                180,
                "all of it, the active segment too"
            );
            assert_eq!(log.size(), 0);
            assert!(log.read(180, 1, ReadLimit::HighWatermark, true).await.unwrap().is_empty());
        });
        place.run_and_close(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!((log.offsets().log_start, log.offsets().log_end), (180, 180));
            assert_eq!(append(&log, &batch(&["d"])).await, 180);
        });
        // A log that was closed in order and not appended to since.
        place.run(async |store: Arc<Store>| {
            assert_eq!(first(&store, "t").delete_records_before(181).await.unwrap(), 181);
        });
        place.run(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!((log.offsets().log_start, log.offsets().log_end, log.size()), (181, 181, 0));
            assert_eq!(append_stable(&log, &batch(&["e"])).await, 181);
            assert_eq!(read_all(&log).await.len(), 1);
        });
    }
}

/// Of each key the offset of its last record, and what that says.
pub type Table = BTreeMap<String, (i64, Option<String>)>;

/// What a key's last record says, by reading the whole log; checks on the way that offsets rise.
pub async fn table(log: &Partition) -> Table {
    let mut table = Table::new();
    let end = log.offsets().log_end;
    let (mut at, mut last) = (log.offsets().log_start, -1);
    while at < end {
        let bytes = log.read(at, 5000, ReadLimit::HighWatermark, true).await.unwrap().copy().await.unwrap();
        assert!(!bytes.is_empty(), "nothing at {at}, before {end}");
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let header = Header::parse(rest).unwrap();
            let (batch, behind) = rest.split_at(header.size as usize);
            logstore::batch::check(&header, batch).unwrap();
            let unpacked = unpack(&header, batch, 1 << 20).unwrap();
            for record in Records::new(&header, &unpacked) {
                let record = record.unwrap();
                assert!(record.offset > last, "{} after {last}", record.offset);
                last = record.offset;
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                table.insert(text(record.key.unwrap()), (record.offset, record.value.map(text)));
            }
            at = header.next_offset();
            rest = behind;
        }
    }
    table
}

/// Nothing is wrong with a store that was closed in order.
pub fn verified(place: &Place) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let inspection = if place.volume.is_some() {
            let device = FileDevice::open(&place.image(), OpenMode::ReadOnly).unwrap();
            Inspection::volume(Arc::new(device)).await.unwrap()
        } else {
            Inspection::directory(&place.dir.path().join("data")).await.unwrap()
        };
        let mut findings = inspection.findings.clone();
        for view in &inspection.partitions {
            let options = verify::Options { now: None };
            findings.extend(verify::verify(view, options, &mut |_| ()).await.unwrap().1);
        }
        findings.retain(|finding| finding.severity == Severity::Fault);
        assert_eq!(findings, []);
    });
}

const COMPACTED: [(&str, &str); 5] = [
    ("cleanup.policy", "compact"),
    ("segment.bytes", "4000"),
    ("min.cleanable.dirty.ratio", "0.01"),
    ("index.interval.bytes", "500"),
    ("file.delete.delay.ms", "0"),
];

#[test]
fn the_last_record_of_each_key_stays() {
    for place in Place::both() {
        let mut expected = BTreeMap::new();
        place.run(async |store: Arc<Store>| {
            let log = topic(&store, "t", &COMPACTED).await;
            for at in 0..400i64 {
                let (key, value) = (format!("k{}", at % 17), format!("v{at} {}", "x".repeat(90)));
                let batch = keyed(&[(key.as_str(), Some(value.as_str())), ("again", Some("and again"))]);
                assert_eq!(append(&log, &batch.by(5, 0, at as i32 * 2)).await, at * 2);
            }
            store.quiet().await;
            let before = log.size();
            let reading = log.read(0, 3000, ReadLimit::HighWatermark, true).await.unwrap();
            let old = reading.copy().await.unwrap();
            expected = table(&log).await;
            assert_eq!(store.compact().await.unwrap(), 1);
            assert!(log.size() < before / 5, "{} of {before} bytes are left", log.size());
            assert_eq!(table(&log).await, expected);
            assert_eq!(reading.copy().await.unwrap(), old, "a lease holds what was replaced");
            assert_eq!(store.compact().await.unwrap(), 0, "there is nothing left to do");
            let offsets = log.offsets();
            assert_eq!((offsets.log_start, offsets.log_end), (0, 800));
            for from in 0..800 {
                let slice = log.read(from, 1, ReadLimit::HighWatermark, true).await.unwrap();
                assert!(Header::parse(&slice.copy().await.unwrap()).unwrap().last_offset() >= from);
            }
            assert_eq!(append(&log, &keyed(&[("k1", None)]).by(5, 0, 800)).await, 800);
            expected.insert("k1".to_owned(), (800, None));
        });
        // Killed; and then once more, closed.
        for _ in 0..2 {
            place.run_and_close(async |store: Arc<Store>| {
                let log = first(&store, "t");
                assert_eq!(table(&log).await, expected);
                let again =
                    log.append(keyed(&[("k1", None)]).by(5, 0, 800).bytes(), Durability::Cached).await;
                assert_eq!(again.unwrap().base_offset, 800, "the producer is known");
            });
        }
        if place.volume.is_none() {
            let dir = place.partition_dir("t", 0);
            assert!(files(&dir, "cleaned").is_empty() && files(&dir, "swap").is_empty());
            // Whatever a kill may leave of a compaction that was not decided goes.
            std::fs::write(dir.join("00000000000000000000.log.7.cleaned"), "noise").unwrap();
            std::fs::write(dir.join("00000000000000000000.log.00000000000000000100.7.swap"), "noise")
                .unwrap();
            place.run(async |store: Arc<Store>| assert_eq!(table(&first(&store, "t")).await, expected));
            assert!(files(&dir, "cleaned").is_empty() && files(&dir, "swap").is_empty());
        }
    }
}

#[test]
fn a_small_map_needs_several_passes_and_tombstones_go_in_time() {
    for place in Place::both() {
        let options = |options: &mut StoreOptions| options.cleaner.memory = 7 * logstore::compaction::ENTRY;
        place.run_with(options, async |store: Arc<Store>| {
            let own = [COMPACTED.as_slice(), &[("delete.retention.ms", "0")]].concat();
            let log = topic(&store, "t", &own).await;
            for at in 0..300 {
                let (key, other) = (format!("k{}", at % 40), format!("gone{}", at % 3));
                append(
                    &log,
                    &keyed(&[(key.as_str(), Some("v".repeat(100).as_str())), (other.as_str(), None)]),
                )
                .await;
            }
            store.quiet().await;
            let expected = table(&log).await;
            assert_eq!(store.compact().await.unwrap(), 1);
            assert_eq!(table(&log).await, expected, "tombstones wait for the next cleaning");
            for at in 0..300 {
                append(&log, &keyed(&[(format!("k{}", at % 40).as_str(), Some("v".repeat(100).as_str()))]))
                    .await;
            }
            store.quiet().await;
            let segments = |place: &Place| files(&place.partition_dir("t", 0), "log").len();
            let before = if place.volume.is_none() { segments(&place) } else { 0 };
            store.compact().await.unwrap();
            if place.volume.is_none() {
                assert!(segments(&place) < before / 2, "what has shrunk is merged");
            }
            let after = table(&log).await;
            assert!(after.keys().all(|key| key.starts_with('k')), "{after:?}");
            assert_eq!(after.len(), 40);
        });
    }
}

#[test]
fn lags_ratio_and_keys_are_held() {
    for place in Place::both() {
        place.run(async |store: Arc<Store>| {
            let own = |more: &[(&'static str, &'static str)]| [COMPACTED.as_slice(), more].concat();
            let fresh = topic(&store, "fresh", &own(&[("min.compaction.lag.ms", "3600000")])).await;
            let late = topic(
                &store,
                "late",
                &own(&[("min.cleanable.dirty.ratio", "1.0"), ("max.compaction.lag.ms", "1")]),
            )
            .await;
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
            for _ in 0..100 {
                append(&fresh, &keyed(&[("k", Some("v".repeat(100).as_str()))]).at(now as i64)).await;
                append(&late, &keyed(&[("k", Some("v".repeat(100).as_str()))])).await;
            }
            store.quiet().await;
            assert_eq!(store.compact().await.unwrap(), 1, "only what is old enough");
            assert!(late.size() < fresh.size() / 2);
            let keyless = fresh.append(batch(&["v"]).bytes(), Durability::Cached).await;
            assert!(matches!(keyless, Err(Error::InvalidBatch { fault: BatchFault::Keyless, .. })));
            let mut noise = keyed(&[("k", None)]);
            noise.attributes = 4;
            let unreadable = fresh.append(noise.bytes(), Durability::Cached).await;
            assert!(matches!(unreadable, Err(Error::InvalidBatch { fault: BatchFault::Records, .. })));
        });
    }
}

/// The machine, on which whoever rests stops until it is let go.
struct Stops {
    inner: TokioRuntime,
    stopped: Arc<Notify>,
    go: Arc<Semaphore>,
}

impl Runtime for Stops {
    fn now(&self) -> Duration {
        self.inner.now()
    }

    fn wall_clock(&self) -> Duration {
        self.inner.wall_clock()
    }

    fn fill_random(&self, out: &mut [u8]) {
        self.inner.fill_random(out);
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.inner.spawn(task);
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        self.stopped.notify_one();
        let go = Arc::clone(&self.go);
        Box::pin(async move { drop(go.acquire().await) })
    }
}

/// Compaction takes what was closed while it ran as well, in its next pass. It once went on with the list of aborted
/// transactions that it had begun with: what was written and aborted meanwhile counted as the last of its key, and the
/// record that was committed before it went for good.
#[test]
fn what_is_aborted_between_two_passes_takes_the_place_of_nothing() {
    for place in Place::both() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
        runtime.block_on(async {
            let (stopped, go) = (Arc::new(Notify::new()), Arc::new(Semaphore::new(0)));
            let stops =
                Stops { inner: TokioRuntime::current(), stopped: Arc::clone(&stopped), go: Arc::clone(&go) };
            let mut options = StoreOptions { topic_defaults: defaults(), ..StoreOptions::default() };
            options.cleaner.bytes_per_second = 1e9;
            let store = Store::open(place.home(), options, Arc::new(stops)).await.unwrap();
            let log = topic(&store, "t", &COMPACTED).await;
            let fill = async |count: usize| {
                for at in 0..count {
                    append(&log, &keyed(&[(format!("f{at}").as_str(), Some("v".repeat(1000).as_str()))]))
                        .await;
                }
            };
            append(&log, &keyed(&[("k", Some("stays"))])).await;
            // More than compaction reads before it rests for the first time.
            fill(300).await;
            store.quiet().await;
            let compacting = tokio::spawn({
                let store = Arc::clone(&store);
                async move { store.compact().await }
            });
            stopped.notified().await;
            let gone = log.offsets().log_end;
            append(&log, &keyed(&[("k", Some("aborted"))]).by(7, 0, 0).txn()).await;
            log.append_marker(7, 0, 0, Outcome::Abort, Durability::Cached).await.unwrap();
            fill(10).await;
            store.quiet().await;
            go.close();
            assert_eq!(compacting.await.unwrap().unwrap(), 1);
            let first = log.read(0, 1, ReadLimit::HighWatermark, true).await.unwrap().copy().await.unwrap();
            assert_eq!(Header::parse(&first).unwrap().base_offset, 0, "the last of its key that counts");
            let behind =
                log.read(gone, 1, ReadLimit::HighWatermark, true).await.unwrap().copy().await.unwrap();
            let behind = Header::parse(&behind).unwrap();
            let is_gone = behind.base_offset > gone || behind.count == 0;
            assert!(is_gone, "the second pass has been there: {behind:?}");
            store.close().await.unwrap();
        });
        verified(&place);
    }
}

/// A batch that compaction has emptied, for the sake of its producer's sequence, keeps the timestamp of what it held.
#[test]
fn lookups_by_time_pass_batches_without_records() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &COMPACTED).await;
            append(&log, &keyed(&[("k", Some("goes"))]).by(5, 0, 0).at(NOW + 100_000)).await;
            for at in 0..30 {
                append(
                    &log,
                    &keyed(&[(format!("f{at}").as_str(), Some("v".repeat(400).as_str()))]).at(NOW + at),
                )
                .await;
            }
            let last = append(&log, &keyed(&[("k", Some("stays"))]).at(NOW + 50_000)).await;
            append(&log, &keyed(&[("z", Some("v".repeat(3900).as_str()))]).at(NOW)).await;
            append(&log, &keyed(&[("z", Some("v".repeat(3900).as_str()))]).at(NOW)).await;
            store.quiet().await;
            assert_eq!(log.offset_of_max_timestamp().await.unwrap(), Some((0, NOW + 100_000)));
            assert_eq!(store.compact().await.unwrap(), 1);
            let first = log.read(0, 1, ReadLimit::HighWatermark, true).await.unwrap().copy().await.unwrap();
            let first = Header::parse(&first).unwrap();
            assert_eq!((first.base_offset, first.count, first.max_timestamp), (0, 0, NOW + 100_000));
            assert_eq!(log.offset_for_timestamp(NOW + 60_000).await.unwrap(), None);
            assert_eq!(log.offset_for_timestamp(NOW + 40_000).await.unwrap(), Some((last, NOW + 50_000)));
            assert_eq!(log.offset_for_timestamp(NOW + 7).await.unwrap(), Some((8, NOW + 7)));
            assert_eq!(log.offset_of_max_timestamp().await.unwrap(), Some((last, NOW + 50_000)));
        });
    }
}

#[test]
fn lookups_by_time_find_the_record_in_a_compressed_batch() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[]).await;
            for (number, codec) in
                [Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd].into_iter().enumerate()
            {
                let at = NOW + 100 * number as i64;
                let sent = batch(&["a", "b", "c", "d"]).at(at).packed(codec);
                let base = log.append(sent, Durability::Cached).await.unwrap().base_offset;
                assert_eq!(
                    log.offset_for_timestamp(at + 2).await.unwrap(),
                    Some((base + 2, at + 2)),
                    "{codec:?}"
                );
                assert_eq!(
                    log.offset_of_max_timestamp().await.unwrap(),
                    Some((base + 3, at + 3)),
                    "{codec:?}"
                );
            }
            // Records that were deleted are not found, though their batch is there.
            log.delete_records_before(3).await.unwrap();
            assert_eq!(log.offset_for_timestamp(NOW).await.unwrap(), Some((3, NOW + 3)));
            // Records that cannot be read: where they begin.
            let mut noise = batch(&["not compressed"]).at(NOW + 1000);
            noise.attributes = 4;
            let base = append(&log, &noise).await;
            assert_eq!(log.offset_for_timestamp(NOW + 1000).await.unwrap(), Some((base, NOW + 1000)));
        });
    }
}

/// What a producer sends once more is known for what it is, though all that it sent before was deleted and the store was
/// opened anew: no snapshot of a segment is left then.
#[test]
fn producers_are_known_when_nothing_of_what_they_sent_is_left() {
    let own = [("segment.bytes", "2000"), ("file.delete.delay.ms", "0")];
    for place in Place::both() {
        for (name, left, in_order) in [("a", 0, true), ("b", 0, false), ("c", 1, false), ("d", 1, true)] {
            let life = async |store: Arc<Store>| {
                let log = topic(&store, name, &own).await;
                for at in 0..20 {
                    append_stable(&log, &sized(300, 1).by(9, 2, at)).await;
                }
                store.quiet().await;
                // All, or all but what is still appended to, in which the producer has nothing.
                for _ in 0..left {
                    append_stable(&log, &sized(1900, 1)).await;
                }
                store.quiet().await;
                assert_eq!(log.delete_records_before(20).await.unwrap(), 20);
                assert_eq!(log.size() > 0, left > 0);
            };
            if in_order {
                place.run_and_close(life);
            } else {
                place.run(life);
            }
            place.run(async |store: Arc<Store>| {
                let log = first(&store, name);
                let again = log.append(sized(300, 1).by(9, 2, 19).bytes(), Durability::Cached).await;
                let again =
                    again.unwrap_or_else(|error| panic!("{name}, volume {:?}: {error}", place.volume));
                assert_eq!(again.base_offset, 19, "{name}: it is a repetition");
                let old = log.append(sized(300, 1).by(9, 1, 0).bytes(), Durability::Cached).await;
                assert!(matches!(old, Err(Error::FencedProducer { .. })), "{name}: {old:?}");
                assert_eq!(append(&log, &sized(300, 1).by(9, 2, 20)).await, 20 + left, "{name}");
            });
            place.run(async |store: Arc<Store>| {
                let log = first(&store, name);
                // By then a batch of it is in the log again, and what was kept is older.
                let again = log.append(sized(300, 1).by(9, 2, 20).bytes(), Durability::Cached).await.unwrap();
                assert_eq!(again.base_offset, 20 + left, "{name}");
                let config = config(&own).with([("retention.bytes", "0")]).unwrap();
                store.configure_topic(name, config).await.unwrap();
                for at in 21..40 {
                    append_stable(&log, &sized(300, 1).by(9, 2, at)).await;
                }
                store.quiet().await;
                store.enforce_retention().await.unwrap();
                assert!(log.offsets().log_start > 30, "{:?}", log.offsets());
            });
            place.run(async |store: Arc<Store>| {
                let log = first(&store, name);
                assert_eq!(append(&log, &sized(300, 1).by(9, 2, 40)).await, 40 + left, "{name}");
            });
        }
    }
}

/// The process is killed while it deletes files: of all segments the one before the last is left, which knows less.
#[test]
fn producers_are_known_where_a_deletion_left_some_files() {
    let place = Place::directory();
    let own = [("segment.bytes", "2000"), ("file.delete.delay.ms", "0")];
    let dir = place.partition_dir("t", 0);
    let left = ["00000000000000000010.log", "00000000000000000015.snapshot"].map(|name| dir.join(name));
    let kept = place.run(async |store: Arc<Store>| {
        let log = topic(&store, "t", &own).await;
        for at in 0..20 {
            append_stable(&log, &sized(300, 1).by(9, 2, at)).await;
        }
        store.quiet().await;
        let kept = left.each_ref().map(|path| std::fs::read(path).unwrap());
        assert_eq!(log.delete_records_before(20).await.unwrap(), 20);
        store.quiet().await;
        kept
    });
    assert_eq!(files(&dir, "log").len(), 0);
    for (path, bytes) in left.iter().zip(kept) {
        std::fs::write(path, bytes).unwrap();
    }
    place.run(async |store: Arc<Store>| {
        let log = first(&store, "t");
        let again = log.append(sized(300, 1).by(9, 2, 19).bytes(), Durability::Cached).await.unwrap();
        assert_eq!(again.base_offset, 19, "it is a repetition");
        assert_eq!(append(&log, &sized(300, 1).by(9, 2, 20)).await, 20);
    });
}

#[test]
fn on_a_compacted_topic_a_bomb_is_refused() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log =
                topic(&store, "t", &[("cleanup.policy", "compact"), ("max.message.bytes", "100000")]).await;
            for codec in [Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd] {
                let sent = |bytes: usize| keyed(&[("k", Some("0".repeat(bytes).as_str()))]).packed(codec);
                let most = if codec == Codec::Snappy { 1_000_000 } else { 3_000_000 };
                assert!(log.append(sent(most), Durability::Cached).await.is_ok(), "{codec:?}");
                let bomb = log.append(sent(3_300_000), Durability::Cached).await;
                assert!(
                    matches!(
                        bomb,
                        Err(Error::InvalidBatch { fault: BatchFault::Records, .. }
                            | Error::BatchTooLarge { .. })
                    ),
                    "{codec:?}: {bomb:?}"
                );
            }
        });
    }
}
