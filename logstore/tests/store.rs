//! The whole store, on both homes: the same bodies run on a directory and on a volume.

#![allow(clippy::unwrap_used)] // a test fails by panicking

mod ageing;
mod bad_input;
mod cleaning;
mod common;
mod heads;
mod healing;
mod names;
mod recovering;
mod space;
mod swaps;
mod transactions;

use common::*;
use logstore::{Error, Home, ReadLimit, Store, StoreOptions};
use raid::device::{Device, Durability, FileDevice, OpenMode};
use raid::runtime::TokioRuntime;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

#[test]
fn records_come_back_as_they_were_from_any_offset() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log =
                topic(&store, "t", &[("segment.bytes", "20000"), ("index.interval.bytes", "1000")]).await;
            let mut sent = Vec::new();
            for at in 0..200 {
                let value = format!("record {at} ").repeat(20);
                let batch = batch(&[&value, "second", "third"]);
                assert_eq!(append(&log, &batch).await, at * 3);
                sent.push(batch.bytes());
            }
            let got = read_all(&log).await;
            assert_eq!(got.len(), 200);
            for (sent, (_, got)) in sent.iter().zip(&got) {
                assert_eq!(records(sent), records(got));
            }
            for from in 0..600 {
                let slice = log.read(from, 1, ReadLimit::HighWatermark, true).await.unwrap();
                assert_eq!(slice.copy().await.unwrap(), got[from as usize / 3].1, "offset {from}");
                assert!(log.read(from, 1, ReadLimit::HighWatermark, false).await.unwrap().is_empty());
            }
            for beyond in [-1, 601] {
                let refused = log.read(beyond, 1, ReadLimit::HighWatermark, true).await;
                assert!(matches!(refused, Err(Error::OffsetOutOfRange { log_end: 600, .. })));
            }
            assert!(log.read(600, 1, ReadLimit::HighWatermark, true).await.unwrap().is_empty());
        });
    }
}

#[test]
fn a_stop_in_order_needs_no_scan() {
    for place in Place::both() {
        let before = place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[("segment.bytes", "5000")]).await;
            for at in 0..50 {
                append_stable(&log, &sized(300, at).by(9, 0, i32::from(at))).await;
            }
            (read_all(&log).await, store.cluster_id().to_owned(), store.topic("t").unwrap().id())
        });
        place.run_and_close(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!(log.leader_epoch(), 0, "the epoch rises only with a recovery");
            assert_eq!(
                (read_all(&log).await, store.cluster_id().to_owned(), store.topic("t").unwrap().id()),
                before
            );
            let again = log.append(sized(300, 49).by(9, 0, 49).bytes(), Durability::Cached).await.unwrap();
            assert_eq!(again.base_offset, 49, "producers are remembered");
            assert_eq!(append(&log, &sized(300, 50).by(9, 0, 50)).await, 50);
        });
        // And once more without a single append, to see that markers stay.
        place.run_and_close(async |store: Arc<Store>| assert_eq!(first(&store, "t").offsets().log_end, 51));
        place.run(async |store: Arc<Store>| {
            assert_eq!(first(&store, "t").leader_epoch(), 0);
            assert_eq!(read_all(&first(&store, "t")).await.len(), 51);
        });
    }
}

#[test]
fn a_kill_loses_nothing_that_was_acknowledged() {
    for place in Place::both() {
        place.run(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[("segment.bytes", "5000")]).await;
            for at in 0..50 {
                append(&log, &sized(300, at).by(9, 0, i32::from(at))).await;
            }
        });
        place.run(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!(log.leader_epoch(), 1);
            let got = read_all(&log).await;
            assert_eq!(got.len(), 50);
            for (at, (base, bytes)) in got.iter().enumerate() {
                assert_eq!(*base, at as i64);
                assert_eq!(records(bytes), records(&sized(300, at as u8).bytes()));
            }
            for at in 46..50 {
                let again =
                    log.append(sized(300, at).by(9, 0, i32::from(at)).bytes(), Durability::Cached).await;
                assert_eq!(again.unwrap().base_offset, i64::from(at), "all of the last five are remembered");
            }
            assert_eq!(append(&log, &sized(300, 50).by(9, 0, 50)).await, 50);
        });
        place.run(async |store: Arc<Store>| {
            assert_eq!(first(&store, "t").leader_epoch(), 2);
            assert_eq!(read_all(&first(&store, "t")).await.len(), 51);
        });
    }
}

#[test]
fn sequences_are_held() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[]).await;
            append(&log, &batch(&["a", "b"]).by(1, 0, 0)).await;
            append(&log, &batch(&["c"]).by(1, 0, 2)).await;
            assert_eq!(append(&log, &batch(&["a", "b"]).by(1, 0, 0)).await, 0);
            assert_eq!(append_stable(&log, &batch(&["c"]).by(1, 0, 2)).await, 2);
            let gap = log.append(batch(&["e"]).by(1, 0, 4).bytes(), Durability::Cached).await;
            assert!(matches!(gap, Err(Error::OutOfOrderSequence { expected: 3, found: 4, .. })));
            append(&log, &batch(&["x"]).by(1, 1, 0)).await;
            let old = log.append(batch(&["d"]).by(1, 0, 3).bytes(), Durability::Cached).await;
            assert!(matches!(old, Err(Error::FencedProducer { found: 0, current: 1, .. })));
            assert_eq!(log.offsets().log_end, 4);
            let (one, two) =
                (store.allocate_producer_id().await.unwrap(), store.allocate_producer_id().await.unwrap());
            assert!(two > one);
        });
        let used = place.run(async |store: Arc<Store>| store.allocate_producer_id().await.unwrap());
        let next = place.run(async |store: Arc<Store>| store.allocate_producer_id().await.unwrap());
        assert!(next > used);
    }
}

#[test]
fn timestamps_are_found() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[("segment.bytes", "4000"), ("index.interval.bytes", "500")]).await;
            for at in 0..100i64 {
                append(&log, &batch(&["a".repeat(100).as_str(), "b", "c"]).at(NOW + at * 10)).await;
            }
            for wanted in -5..1000 {
                let found = log.offset_for_timestamp(NOW + wanted).await.unwrap();
                let expected = (0..300i64)
                    .map(|offset| (offset, NOW + offset / 3 * 10 + offset % 3))
                    .find(|&(_, at)| at >= NOW + wanted);
                assert_eq!(found, expected, "{wanted}");
            }
            assert_eq!(log.offset_of_max_timestamp().await.unwrap(), Some((299, NOW + 992)));
            let future = log.append(batch(&["x"]).at(i64::MAX / 2).bytes(), Durability::Cached).await;
            assert!(matches!(future, Err(Error::InvalidTimestamp { .. })));
            let stamped = topic(&store, "s", &[("message.timestamp.type", "LogAppendTime")]).await;
            let appended = stamped.append(batch(&["x"]).bytes(), Durability::Cached).await.unwrap();
            let now = appended.log_append_time.unwrap();
            assert_eq!(stamped.offset_for_timestamp(now).await.unwrap(), Some((0, now)));
            read_all(&stamped).await;
        });
    }
}

#[test]
fn malformed_batches_are_refused_and_change_nothing() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[("max.message.bytes", "1000")]).await;
            let good = batch(&["hello", "world"]).bytes();
            for cut in 0..good.len() {
                let refused = log.append(good.slice(..cut), Durability::Cached).await;
                assert!(matches!(refused, Err(Error::InvalidBatch { .. })), "{cut}");
            }
            for bit in 8 * 8..good.len() * 8 {
                // The leader epoch is the broker's to set.
                if (12 * 8..16 * 8).contains(&bit) {
                    continue;
                }
                let mut bad = good.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                let refused = log.append(bad.into(), Durability::Cached).await;
                assert!(
                    matches!(refused, Err(Error::InvalidBatch { .. } | Error::BatchTooLarge { .. })),
                    "bit {bit}"
                );
            }
            let large = log.append(sized(2000, 1).bytes(), Durability::Cached).await;
            assert!(matches!(large, Err(Error::BatchTooLarge { max: 1000, .. })));
            let both = [good.clone(), good.slice(..70)].concat();
            assert!(log.append(both.into(), Durability::Cached).await.is_err());
            assert_eq!(log.offsets().log_end, 0);
            let two = [good.clone(), good].concat();
            assert_eq!(log.append(two.into(), Durability::Cached).await.unwrap().last_offset, 3);
            assert_eq!(read_all(&log).await.len(), 2);
        });
    }
}

#[test]
fn retention_deletes_whole_segments_and_readers_keep_theirs() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let own = [("segment.bytes", "4000"), ("retention.bytes", "8000"), ("file.delete.delay.ms", "0")];
            let log = topic(&store, "t", &own).await;
            for at in 0..100 {
                append(&log, &sized(300, at)).await;
            }
            let reading = log.read(0, 1000, ReadLimit::HighWatermark, true).await.unwrap();
            let before = reading.copy().await.unwrap();
            store.enforce_retention().await.unwrap();
            let start = log.offsets().log_start;
            assert!(start > 50 && start < 90, "{start}");
            assert!(log.size() >= 8000 && log.size() < 12500);
            assert!(matches!(
                log.read(start - 1, 1, ReadLimit::HighWatermark, true).await,
                Err(Error::OffsetOutOfRange { .. })
            ));
            assert_eq!(read_all(&log).await.first().unwrap().0, start);
            assert_eq!(reading.copy().await.unwrap(), before, "a lease holds deleted bytes");
            // By time: everything is old, the active segment too.
            store
                .configure_topic("t", config(&[("retention.ms", "1000"), ("file.delete.delay.ms", "0")]))
                .await
                .unwrap();
            store.enforce_retention().await.unwrap();
            assert_eq!(log.offsets().log_start, 100);
            assert_eq!(append(&log, &sized(10, 1).at(NOW)).await, 100);
        });
        place.run(async |store: Arc<Store>| {
            assert_eq!(first(&store, "t").offsets().log_start, 100);
            assert_eq!(read_all(&first(&store, "t")).await.len(), 1);
        });
    }
}

#[test]
fn topics_are_made_and_deleted() {
    for place in Place::both() {
        place.run(async |store: Arc<Store>| {
            let log = topic(&store, "a.b", &[("retention.ms", "5"), ("file.delete.delay.ms", "0")]).await;
            append(&log, &batch(&["x"])).await;
            for name in ["", ".", "..", "a/b", "ä", &"x".repeat(250)] {
                let refused = store.create_topic(name, 1, defaults()).await;
                assert!(matches!(refused, Err(Error::InvalidTopicName { .. })), "{name}");
            }
            assert!(matches!(store.create_topic("a_b", 1, defaults()).await, Err(Error::TopicExists { .. })));
            assert!(matches!(
                store.create_topic("n", 0, defaults()).await,
                Err(Error::InvalidPartitionCount { .. })
            ));
            let old = store.topic("a.b").unwrap().id();
            store.delete_topic("a.b").await.unwrap();
            assert!(store.topic("a.b").is_none() && store.topic_by_id(old).is_none());
            assert!(matches!(store.delete_topic("a.b").await, Err(Error::UnknownTopic { .. })));
            assert!(log.append(batch(&["y"]).bytes(), Durability::Cached).await.is_err());
            let fresh = topic(&store, "a.b", &[]).await;
            assert_ne!(store.topic("a.b").unwrap().id(), old);
            assert_eq!(append(&fresh, &batch(&["z"])).await, 0);
            topic(&store, "other", &[("retention.ms", "7")]).await;
        });
        place.run(async |store: Arc<Store>| {
            assert_eq!(store.topics().len(), 2);
            assert_eq!(store.topic("other").unwrap().config().retention_ms, 7);
            let got = read_all(&first(&store, "a.b")).await;
            assert_eq!(records(&got[0].1), records(&batch(&["z"]).bytes()));
            assert_eq!(got.len(), 1);
        });
    }
}

#[test]
fn visibility_waits_for_durability() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[]).await;
            let mut watermark = log.subscribe();
            append(&log, &batch(&["a"])).await;
            assert_eq!(log.offsets().high_watermark, 1);
            let stable = log.append(batch(&["b"]).bytes(), Durability::Stable).await.unwrap();
            stable.commit.unwrap().await.unwrap();
            assert_eq!(log.offsets().high_watermark, 2);
            watermark.wait_for(|seen| seen.high_watermark == 2).await.unwrap();
            let many = (0..40).map(|_| async { append_stable(&log, &batch(&["c"])).await });
            let mut offsets = futures_util::future::join_all(many).await;
            offsets.sort_unstable();
            assert_eq!(offsets, (2..42).collect::<Vec<_>>());
        });
    }
}

#[test]
fn what_is_no_store_is_left_alone() {
    let place = Place::volume(16 << 20);
    let image = std::fs::File::options().write(true).open(place.image()).unwrap();
    image.write_all_at(b"\x53\xef", 1024 + 56).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        assert!(matches!(place.open().await, Err(Error::NotALogStore { .. })));
        assert!(matches!(Place::volume(1 << 20).open().await, Err(Error::TooSmall { .. })));
        let foreign = Place::directory();
        std::fs::create_dir(foreign.dir.path().join("data")).unwrap();
        std::fs::write(foreign.dir.path().join("data/letter.txt"), "dear").unwrap();
        assert!(matches!(foreign.open().await, Err(Error::NotALogStore { .. })));
        assert_eq!(std::fs::read_dir(foreign.dir.path().join("data")).unwrap().count(), 1);
        let used = Place::directory();
        let _store = used.open().await.unwrap();
        assert!(matches!(used.open().await, Err(Error::InUse { .. })));
    });
}

#[test]
fn a_full_volume_refuses_appends_serves_reads_and_can_be_emptied() {
    let place = Place::volume(8 << 20);
    place.run_and_close(async |store: Arc<Store>| {
        let own = [("segment.bytes", "500000"), ("file.delete.delay.ms", "0")];
        let log = topic(&store, "t", &own).await;
        let mut count = 0;
        let full = loop {
            match log.append(sized(50_000, count).bytes(), Durability::Stable).await {
                Ok(appended) => appended.commit.unwrap().await.unwrap(),
                Err(error) => break error,
            }
            count += 1;
        };
        assert!(matches!(full, Error::NoSpace { .. }), "{full}");
        assert!(count > 60, "{count} batches fit");
        assert_eq!(read_all(&log).await.len(), usize::from(count));
        store.create_topic("another", 3, defaults()).await.unwrap();
        store.delete_topic("t").await.unwrap();
        drop(log);
        // The space comes back in the background; the second log then holds other batches in the same place.
        let log = topic(&store, "u", &own).await;
        let mut tries = 0;
        while log.append(sized(50_000, 1).bytes(), Durability::Stable).await.is_err() {
            tries += 1;
            assert!(tries < 200, "the space of a deleted topic comes back");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    });
    place.run(async |store: Arc<Store>| {
        let log = first(&store, "u");
        assert_eq!(log.offsets().log_end, 1, "nothing of the old log is taken for the new one's tail");
        // Not closed in order from here on: recovery scans recycled space.
        append(&log, &sized(50_000, 2)).await;
        append(&log, &sized(50_000, 3)).await;
    });
    place.run(async |store: Arc<Store>| {
        let got = read_all(&first(&store, "u")).await;
        assert_eq!(got.len(), 3);
        assert_eq!(records(&got[2].1), records(&sized(50_000, 3).bytes()));
    });
}

#[test]
fn torn_and_wrong_tails_are_cut_and_never_come_back() {
    type Harm = fn(&std::fs::File, u64);
    let damage: [(&str, Harm); 4] = [
        ("truncated", |file, size| file.set_len(size - 7).unwrap()),
        ("noise behind", |file, size| file.write_all_at(&[0xa5; 3000], size).unwrap()),
        ("zeroes behind", |file, size| file.set_len(size + 5000).unwrap()),
        ("a flipped bit", |file, size| file.write_all_at(&[0xff], size - 3).unwrap()),
    ];
    for (what, harm) in damage {
        let place = Place::directory();
        place.run(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[]).await;
            for at in 0..10 {
                append(&log, &sized(300, at)).await;
            }
        });
        let path = &files(&place.partition_dir("t", 0), "log")[0];
        let file = std::fs::File::options().write(true).open(path).unwrap();
        let size = file.metadata().unwrap().len();
        harm(&file, size);
        let kept = if what.ends_with("behind") { 10 } else { 9 };
        place.run(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!(read_all(&log).await.len(), kept, "{what}");
            assert_eq!(append(&log, &sized(300, 77)).await, kept as i64);
        });
        place.run(async |store: Arc<Store>| {
            let got = read_all(&first(&store, "t")).await;
            assert_eq!(got.len(), kept + 1, "{what}");
            assert_eq!(records(&got[kept].1), records(&sized(300, 77).bytes()));
        });
    }
}

#[test]
fn a_torn_batch_on_a_volume_does_not_let_the_one_behind_it_return() {
    let place = Place::volume(16 << 20);
    place.run(async |store: Arc<Store>| {
        let log = topic(&store, "t", &[]).await;
        for at in 0..10u8 {
            // In its segment, and not in the journal, which would bring it back.
            append(&log, &sized(300, 0x40 + at)).await;
        }
    });
    // Tear the sixth: its successors are still whole on the volume.
    let image = std::fs::read(place.image()).unwrap();
    let at = image.windows(200).position(|bytes| bytes.iter().all(|&byte| byte == 0x45)).unwrap();
    let file = std::fs::File::options().write(true).open(place.image()).unwrap();
    file.write_all_at(&[0], at as u64).unwrap();
    for round in 0..3 {
        place.run(async |store: Arc<Store>| {
            let log = first(&store, "t");
            let got = read_all(&log).await;
            assert_eq!(got.len(), 5 + round, "round {round}");
            append(&log, &sized(300, 0x60)).await;
        });
    }
}

#[test]
fn damaged_indexes_and_snapshots_are_made_anew() {
    for extension in ["index", "timeindex", "snapshot"] {
        for harm in ["gone", "noise", "another's", "cut", "emptied"] {
            let place = Place::directory();
            let own = [("segment.bytes", "4000"), ("index.interval.bytes", "500")];
            place.run_and_close(async |store: Arc<Store>| {
                let log = topic(&store, "t", &own).await;
                for at in 0..60u8 {
                    append(&log, &sized(200, at).at(NOW + i64::from(at)).by(3, 0, i32::from(at))).await;
                }
            });
            let paths = files(&place.partition_dir("t", 0), extension);
            assert!(!paths.is_empty());
            let other = std::fs::read(&paths[0]).unwrap();
            for path in &paths {
                match harm {
                    "gone" => std::fs::remove_file(path).unwrap(),
                    "noise" => std::fs::write(path, [0x5a; 96]).unwrap(),
                    // Whole entries of both indexes.
                    "cut" => {
                        let whole = std::fs::read(path).unwrap();
                        std::fs::write(path, &whole[..whole.len().min(24)]).unwrap();
                    }
                    "emptied" => std::fs::write(path, []).unwrap(),
                    _ => std::fs::write(path, &other).unwrap(),
                }
            }
            place.run_and_close(async |store: Arc<Store>| {
                let log = first(&store, "t");
                let got = read_all(&log).await;
                assert_eq!(got.len(), 60, "{extension} {harm}");
                for at in 0..60u8 {
                    let slice = log.read(i64::from(at), 1, ReadLimit::HighWatermark, true).await.unwrap();
                    assert_eq!(
                        slice.copy().await.unwrap(),
                        got[usize::from(at)].1,
                        "{extension} {harm} {at}"
                    );
                    let at = i64::from(at);
                    let found = log.offset_for_timestamp(NOW + at).await.unwrap();
                    assert_eq!(found, Some((at, NOW + at)), "{extension} {harm}");
                }
                assert_eq!(append(&log, &sized(200, 59).by(3, 0, 59)).await, 59);
                assert_eq!(append(&log, &sized(200, 60)).await, 60);
            });
        }
    }
}

#[test]
fn both_header_copies_and_catalog_damage_are_told() {
    let place = Place::volume(16 << 20);
    place.run_and_close(async |store: Arc<Store>| {
        append_stable(&topic(&store, "t", &[]).await, &batch(&["x"])).await;
    });
    let good = std::fs::read(place.image()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    // Any single damaged page of the catalog: an error, or the right data; never a panic out of the library.
    for at in (0..200_000).step_by(1009) {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        std::fs::write(place.image(), &bad).unwrap();
        runtime.block_on(async {
            match place.open().await {
                Ok(store) => {
                    if let Some(topic) = store.topic("t") {
                        let slice =
                            topic.partitions()[0].read(0, 1, ReadLimit::HighWatermark, true).await.unwrap();
                        assert!(slice.len() > 61);
                    }
                    store.close().await.unwrap();
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        });
    }
}

#[test]
fn the_volume_sees_one_flush_for_many_commits() {
    let place = Place::volume(64 << 20);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let device: Arc<dyn Device> =
            Arc::new(FileDevice::open(&place.image(), OpenMode::ReadWrite).unwrap());
        let options = StoreOptions { topic_defaults: defaults(), ..StoreOptions::default() };
        let store =
            Store::open(Home::Volume(device), options, Arc::new(TokioRuntime::current())).await.unwrap();
        let topic = store.create_topic("many", 100, defaults()).await.unwrap();
        for round in 0..3 {
            let appends = topic
                .partitions()
                .iter()
                .map(async |partition| append_stable(partition, &sized(100, round)).await);
            futures_util::future::join_all(appends).await;
        }
        for partition in topic.partitions() {
            assert_eq!(partition.offsets().high_watermark, 3);
        }
        store.close().await.unwrap();
    });
}

/// Polls once, and lets go; where all lies in memory, it may be done by then.
async fn abandoned<T>(work: impl Future<Output = T>) {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|context| {
        let _is_done = work.as_mut().poll(context).is_ready();
        std::task::Poll::Ready(())
    })
    .await;
}

/// Whoever asks may go away half-way: what the catalog says by then is what memory says.
#[test]
fn what_is_asked_of_a_store_is_done_to_its_end() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[("segment.bytes", "2000"), ("file.delete.delay.ms", "0")]).await;
            for at in 0..40 {
                append_stable(&log, &sized(300, at)).await;
            }
            store.quiet().await;
            abandoned(log.delete_records_before(20)).await;
            store.quiet().await;
            assert_eq!(log.offsets().log_start, 20);
            assert_eq!(read_all(&log).await.len(), 20 + usize::from(read_all(&log).await[0].0 < 20));
            abandoned(store.create_topic("new", 1, config(&[]))).await;
            store.quiet().await;
            abandoned(
                store.configure_topic("t", config(&[("retention.bytes", "0"), ("segment.bytes", "2000")])),
            )
            .await;
            store.quiet().await;
            assert_eq!(append_stable(&first(&store, "new"), &sized(300, 0)).await, 0);
            assert_eq!(store.topic("t").unwrap().config().retention_bytes, 0);
            abandoned(store.delete_topic("new")).await;
            store.quiet().await;
            assert!(store.topic("new").is_none());
            store.enforce_retention().await.unwrap();
            assert_eq!(append_stable(&log, &sized(300, 40)).await, 40);
        });
        place.run_and_close(async |store: Arc<Store>| {
            assert!(store.topic("new").is_none());
            assert_eq!(first(&store, "t").offsets().log_end, 41);
        });
    }
}
