//! What time does to a log that nobody writes to, by a clock of the test's own; on both homes.

use super::common::*;
use logstore::Store;
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
