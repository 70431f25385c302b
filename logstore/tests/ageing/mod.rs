//! What time does to a log that nobody writes to, by a clock of the test's own; on both homes.

use super::cleaning::table;
use super::common::*;
use logstore::{Error, ReadLimit, Store};
use raid::device::Durability;
use std::sync::Arc;

const HOUR: u64 = 3_600_000;

#[test]
fn records_without_timestamps_go_by_the_time_of_the_last_append() {
    // How the store was stopped between the append and its end: not at all, in order, by a kill.
    for (stopped, in_order) in [(false, true), (true, true), (true, false)] {
        for place in Place::both() {
            let clock = Clock::default();
            // In a directory, files have the machine's own times.
            let mut expires = clock.now() + 10 * HOUR as i64;
            place.run_by(&clock, in_order, async |store: Arc<Store>| {
                let own =
                    [("segment.bytes", "4000"), ("retention.ms", "36000000"), ("file.delete.delay.ms", "0")];
                let log = topic(&store, "t", &own).await;
                for _ in 0..30 {
                    append(&log, &sized(500, 7).at(-1)).await;
                }
                store.quiet().await;
                if !stopped {
                    clock.pass(10 * HOUR - 60_000);
                    store.enforce_retention().await.unwrap();
                    assert_eq!(log.offsets().log_start, 0, "not yet");
                    append(&log, &sized(500, 7).at(-1)).await;
                    clock.pass(120_000);
                    store.enforce_retention().await.unwrap();
                    let start = log.offsets().log_start;
                    assert!((22..31).contains(&start), "all but the segment that was written to: {start}");
                    clock.pass(10 * HOUR);
                    store.enforce_retention().await.unwrap();
                    assert_eq!(log.offsets().log_start, 31);
                }
            });
            if !stopped {
                continue;
            }
            let first_of = async |store: Arc<Store>| first(&store, "t").offsets().log_start;
            clock.pass(6 * HOUR);
            if !in_order && place.volume.is_some() {
                // Of the segment that was open nobody knows better than that it was there when it was found again.
                expires = clock.now() + 10 * HOUR as i64;
            }
            // A life in which nothing happens, and one that ends before its time.
            place.run_by(&clock, true, first_of);
            clock.pass((expires - clock.now()) as u64 - 60_000);
            let start = place.run_by(&clock, true, async |store: Arc<Store>| {
                store.enforce_retention().await.unwrap();
                first_of(store).await
            });
            let closed_ones_go = !in_order && place.volume.is_some();
            assert!(if closed_ones_go { (22..30).contains(&start) } else { start == 0 }, "{start}");
            clock.pass(120_000);
            let start = place.run_by(&clock, true, async |store: Arc<Store>| {
                store.enforce_retention().await.unwrap();
                first_of(store).await
            });
            assert_eq!(start, 30, "{in_order}");
        }
    }
}

#[test]
fn records_without_timestamps_wait_for_compaction_as_long_as_others() {
    for place in Place::both() {
        let clock = Clock::default();
        let own = [
            ("cleanup.policy", "compact,delete"),
            ("segment.bytes", "4000"),
            ("min.cleanable.dirty.ratio", "0.01"),
            ("min.compaction.lag.ms", "3600000"),
            ("retention.ms", "36000000"),
            ("file.delete.delay.ms", "0"),
        ];
        place.run_by(&clock, true, async |store: Arc<Store>| {
            let log = topic(&store, "t", &own).await;
            for at in 0..60 {
                let key = format!("k{}", at.min(5));
                append(&log, &keyed(&[(key.as_str(), Some("v".repeat(200).as_str()))]).at(-1)).await;
            }
            store.quiet().await;
            let size = log.size();
            assert_eq!(store.compact().await.unwrap(), 0, "too young");
            clock.pass(HOUR + 1000);
            assert_eq!(store.compact().await.unwrap(), 1);
            assert!(log.size() < size / 2);
        });
        // Nor are they younger for having been compacted.
        clock.pass(9 * HOUR - 60_000);
        place.run_by(&clock, true, async |store: Arc<Store>| {
            store.enforce_retention().await.unwrap();
            assert_eq!(first(&store, "t").offsets().log_start, 0);
            clock.pass(120_000);
            store.enforce_retention().await.unwrap();
            assert_eq!(first(&store, "t").offsets().log_start, 60);
        });
    }
}

/// A compacted log in one segment, and what its keys say; the batches are by a producer.
async fn one_segment(store: &Store, own: &[(&str, &str)]) -> super::cleaning::Table {
    let policy =
        [("cleanup.policy", "compact"), ("min.cleanable.dirty.ratio", "0.01"), ("file.delete.delay.ms", "0")];
    let log = topic(store, "t", &[policy.as_slice(), own].concat()).await;
    for at in 0..40 {
        let (key, value) = (format!("k{}", at % 4), format!("{at} {}", "v".repeat(100)));
        append(&log, &keyed(&[(&key, Some(&value))]).at(NOW + i64::from(at)).by(8, 0, at)).await;
    }
    table(&log).await
}

#[test]
fn a_segment_that_nobody_writes_to_is_closed_and_compacted() {
    let day = "86400000";
    for (own, hours) in [
        ([("segment.ms", day), ("max.compaction.lag.ms", "9223372036854775807")], 24),
        ([("segment.ms", day), ("max.compaction.lag.ms", "7200000")], 2),
    ] {
        // The store is stopped in order before its time comes; is killed; runs through.
        for stopped in [Some(true), Some(false), None] {
            for place in Place::both() {
                let (clock, mut expected) = (Clock::default(), super::cleaning::Table::new());
                let passes = async |store: Arc<Store>| {
                    let log = first(&store, "t");
                    let size = log.size();
                    if stopped.is_none_or(|in_order| in_order) {
                        // The clock of a kill's recovery counts anew, unless the first timestamp tells.
                        assert_eq!(store.compact().await.unwrap(), 0, "its time has not come");
                        store.enforce_retention().await.unwrap();
                        store.quiet().await;
                        assert_eq!((store.compact().await.unwrap(), log.size()), (0, size));
                    }
                    clock.pass(120_000);
                    // The one that closes the segment compacts it too, if it is sealed fast enough.
                    let at_once = store.compact().await.unwrap();
                    store.quiet().await;
                    assert_eq!(at_once + store.compact().await.unwrap(), 1);
                    assert!(log.size() < size / 5, "{} of {size}", log.size());
                    // Once: an empty segment is old enough for ever.
                    for _ in 0..3 {
                        clock.pass(hours * HOUR + 1000);
                        store.enforce_retention().await.unwrap();
                        store.quiet().await;
                        assert_eq!(store.compact().await.unwrap(), 0);
                    }
                    if place.volume.is_none() {
                        assert_eq!(files(&place.partition_dir("t", 0), "log").len(), 2);
                    }
                    table(&log).await
                };
                place.run_by(&clock, stopped == Some(true), async |store: Arc<Store>| {
                    expected = one_segment(&store, &own).await;
                    clock.pass(hours * HOUR - 60_000);
                    if stopped.is_none() {
                        assert_eq!(passes(store).await, expected);
                    }
                });
                if stopped.is_some() {
                    place.run_by(&clock, true, async |store: Arc<Store>| {
                        assert_eq!(passes(store).await, expected);
                    });
                }
                for in_order in [false, true] {
                    place.run_by(&clock, in_order, async |store: Arc<Store>| {
                        let log = first(&store, "t");
                        let offsets = log.offsets();
                        assert_eq!((offsets.log_start, offsets.log_end, offsets.high_watermark), (0, 40, 40));
                        assert_eq!(table(&log).await, expected);
                        assert!(log.read(40, 1, ReadLimit::HighWatermark, true).await.unwrap().is_empty());
                    });
                }
                place.run_by(&clock, false, async |store: Arc<Store>| {
                    let log = first(&store, "t");
                    if hours == 2 {
                        let last = keyed(&[("k3", Some(&format!("39 {}", "v".repeat(100))))]).by(8, 0, 39);
                        assert_eq!(append(&log, &last).await, 39, "the producer is known for a day");
                    }
                    assert_eq!(append(&log, &keyed(&[("k0", None)]).by(8, 0, 40)).await, 40);
                    expected.insert("k0".to_owned(), (40, None));
                });
                place.run_by(&clock, true, async |store: Arc<Store>| {
                    assert_eq!(table(&first(&store, "t")).await, expected);
                });
            }
        }
    }
}

#[test]
fn what_is_old_goes_though_nothing_is_appended() {
    for place in Place::both() {
        let clock = Clock::default();
        let own = [("retention.ms", "36000000"), ("file.delete.delay.ms", "0")];
        place.run_by(&clock, true, async |store: Arc<Store>| {
            for name in ["here", "reopened"] {
                let log = topic(&store, name, &own).await;
                append(&log, &batch(&["a", "b"]).at(clock.now())).await;
            }
            let log = first(&store, "here");
            clock.pass(10 * HOUR - 60_000);
            store.enforce_retention().await.unwrap();
            assert_eq!(log.offsets().log_start, 0);
            append(&log, &batch(&["c"]).at(clock.now())).await;
            clock.pass(120_000);
            store.enforce_retention().await.unwrap();
            assert_eq!(log.offsets().log_start, 0, "it has a younger record");
            clock.pass(10 * HOUR);
            store.enforce_retention().await.unwrap();
            assert_eq!((log.offsets().log_start, log.offsets().log_end, log.size()), (3, 3, 0));
        });
        place.run_by(&clock, false, async |store: Arc<Store>| {
            store.enforce_retention().await.unwrap();
            for (name, end) in [("here", 3), ("reopened", 2)] {
                let log = first(&store, name);
                assert_eq!((log.offsets().log_start, log.size()), (end, 0));
                assert_eq!(append(&log, &batch(&["d"]).at(clock.now())).await, end);
            }
        });
    }
}

#[test]
fn a_segment_for_which_there_was_no_room_is_not_taken_for_the_last() {
    let place = Place::volume(5 << 20);
    let clock = Clock::default();
    let mut sent = 0;
    place.run_by(&clock, true, async |store: Arc<Store>| {
        let log = topic(&store, "t", &[("segment.bytes", "60000")]).await;
        loop {
            match log.append(sized(29_000, 7).bytes(), Durability::Cached).await {
                Ok(_) => sent += 1,
                Err(Error::NoSpace { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(sent > 4 && sent % 2 == 0, "{sent}: the last segment is full");
    });
    for in_order in [true, false] {
        place.run_by(&clock, in_order, async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert_eq!(read_all(&log).await.len() as i64, sent);
            let full = log.append(sized(29_000, 7).bytes(), Durability::Cached).await;
            assert!(matches!(full, Err(Error::NoSpace { .. })));
            assert_eq!(log.delete_records_before(0).await.unwrap(), 0);
        });
    }
    place.run_by(&clock, true, async |store: Arc<Store>| {
        assert_eq!(read_all(&first(&store, "t")).await.len() as i64, sent);
    });
}
