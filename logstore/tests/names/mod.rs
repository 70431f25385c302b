//! Names and places that are used again: whoever gave one up takes nothing of its next holder's with it. On both homes, with
//! and without a delay between a deletion and the return of the space.

use super::common::*;
use logstore::{Error, Partition, ReadLimit, Store};
use std::sync::Arc;
use std::time::Duration;

/// How long what is deleted stays, in milliseconds.
const DELAYS: [&str; 2] = ["0", "300"];

async fn fill(log: &Arc<Partition>, numbers: std::ops::Range<u8>) {
    for at in numbers {
        append_stable(log, &sized(300, at)).await;
    }
}

async fn holds(log: &Partition, from: i64, numbers: std::ops::Range<u8>, what: &str) {
    let got = read_all(log).await;
    assert_eq!(got.first().map(|(base, _)| *base), Some(from), "{what}");
    assert_eq!(got.len(), numbers.len(), "{what}");
    for ((_, got), at) in got.iter().zip(numbers) {
        assert_eq!(records(got), records(&sized(300, at).bytes()), "{what}: record {at}");
    }
}

/// Lets the delay of whatever was deleted pass, and the removal come to its end: nothing tells of it.
async fn delay_passed(store: &Store) {
    tokio::time::sleep(Duration::from_millis(600)).await;
    store.quiet().await;
}

#[test]
fn a_topic_made_anew_keeps_its_records_when_the_old_one_goes() {
    for delay in DELAYS {
        for (place, home) in Place::both().into_iter().zip(["directory", "volume"]) {
            let what = format!("{home}, delay {delay}");
            let own = [("segment.bytes", "4000"), ("file.delete.delay.ms", delay)];
            place.run_and_close(async |store: Arc<Store>| {
                let old = topic(&store, "t", &own).await;
                fill(&old, 0..60).await;
                // Some of it waits to be removed by itself already.
                let early = old.read(0, 1000, ReadLimit::HighWatermark, true).await.unwrap();
                assert!(old.delete_records_before(30).await.unwrap() == 30);
                let late = old.read(55, 1000, ReadLimit::HighWatermark, true).await.unwrap();
                let before = (early.copy().await.unwrap(), late.copy().await.unwrap());
                store.delete_topic("t").await.unwrap();
                drop(old);
                let new = topic(&store, "t", &own).await;
                fill(&new, 100..160).await;
                assert_eq!((early.copy().await.unwrap(), late.copy().await.unwrap()), before, "{what}");
                drop((early, late));
                delay_passed(&store).await;
                holds(&new, 0, 100..160, &what).await;
            });
            place.run(async |store: Arc<Store>| {
                let log = first(&store, "t");
                holds(&log, 0, 100..160, &what).await;
                fill(&log, 160..170).await;
            });
            place.run(async |store: Arc<Store>| {
                assert_eq!(read_all(&first(&store, "t")).await.len(), 70, "{what}");
            });
        }
    }
}

#[test]
fn what_follows_an_empty_segment_survives_its_deletion() {
    for delay in DELAYS {
        for (place, home) in Place::both().into_iter().zip(["directory", "volume"]) {
            let what = format!("{home}, delay {delay}");
            let clock = Clock::default();
            place.run_by(&clock, true, async |store: Arc<Store>| {
                let own = [("segment.ms", "1000"), ("file.delete.delay.ms", delay)];
                let log = topic(&store, "t", &own).await;
                fill(&log, 0..10).await;
                clock.pass(5000);
                // The segment is old and ends: the one that begins is empty.
                store.enforce_retention().await.unwrap();
                assert_eq!(log.delete_records_before(10).await.unwrap(), 10);
                fill(&log, 10..20).await;
                delay_passed(&store).await;
                holds(&log, 10, 10..20, &what).await;
            });
            for in_order in [false, true] {
                place.run_by(&clock, in_order, async |store: Arc<Store>| {
                    holds(&first(&store, "t"), 10, 10..20, &what).await;
                });
            }
        }
    }
}

#[test]
fn a_creation_that_failed_half_way_leaves_the_name_free() {
    let place = Place::directory();
    place.run_and_close(async |store: Arc<Store>| {
        // Somebody's records, where the third partition would be.
        let foreign = place.partition_dir("t", 2);
        std::fs::create_dir(&foreign).unwrap();
        std::fs::write(foreign.join("00000000000000000000.log"), "precious").unwrap();
        for _ in 0..2 {
            let refused = store.create_topic("t", 4, defaults()).await;
            assert!(matches!(refused, Err(Error::File { action: "create", .. })), "{refused:?}");
            assert!(!place.partition_dir("t", 0).exists() && !place.partition_dir("t", 3).exists());
        }
        assert_eq!(std::fs::read(foreign.join("00000000000000000000.log")).unwrap(), b"precious");
        std::fs::remove_dir_all(&foreign).unwrap();
        // What a creation left that was cut short, of another topic of the name.
        for partition in [1, 3] {
            std::fs::create_dir(place.partition_dir("t", partition)).unwrap();
        }
        std::fs::write(place.partition_dir("t", 1).join("partition.metadata"), "version: 0\n").unwrap();
        let made = store.create_topic("t", 4, defaults()).await.unwrap();
        for partition in made.partitions() {
            append_stable(partition, &batch(&["a"])).await;
        }
    });
    place.run(async |store: Arc<Store>| {
        for partition in store.topic("t").unwrap().partitions() {
            assert_eq!(read_all(partition).await.len(), 1);
        }
    });
}

#[test]
fn a_creation_that_was_cut_short_behind_a_deletion() {
    let place = Place::directory();
    place.run(async |store: Arc<Store>| {
        let log = topic(&store, "t", &[("file.delete.delay.ms", "3600000")]).await;
        fill(&log, 0..3).await;
        store.delete_topic("t").await.unwrap();
    });
    // The old one waits under its new name, and has records; the new one has no record in the catalog yet.
    let half_made = place.partition_dir("t", 0);
    std::fs::create_dir(&half_made).unwrap();
    std::fs::write(half_made.join("partition.metadata"), "version: 0\n").unwrap();
    place.run(async |store: Arc<Store>| {
        assert!(store.topic("t").is_none() && !half_made.exists());
        let log = topic(&store, "t", &[]).await;
        fill(&log, 10..13).await;
    });
    place.run(async |store: Arc<Store>| holds(&first(&store, "t"), 0, 10..13, "made anew").await);
}
