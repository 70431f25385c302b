//! What recovery keeps of a log that was not closed in order, whatever else is wrong with it, and what nobody may believe of
//! the files beside it.

use super::common::*;
use logstore::{Error, ReadLimit, Store};
use raid::device::Durability;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

fn flip(path: &Path, byte: u64, bit: u8) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut one = [0];
    file.read_exact_at(&mut one, byte).unwrap();
    one[0] ^= 1 << bit;
    file.write_all_at(&one, byte).unwrap();
}

#[test]
fn a_flipped_leader_epoch_costs_nothing() {
    // Of batches of the first epoch and of the second: less and more than it was, by little and by much, below zero.
    let flips = [(3, 15, 0), (3, 12, 7), (3, 12, 6), (12, 15, 0), (12, 14, 1), (12, 12, 7), (14, 13, 3)];
    for place in Place::both() {
        let fill = async |store: &Store, numbers: std::ops::Range<u8>| {
            for at in numbers {
                append_stable(&first(store, "t"), &sized(300, at)).await;
            }
        };
        place.run(async |store: Arc<Store>| {
            topic(&store, "t", &[]).await;
            fill(&store, 0..10).await;
        });
        let before = place.run(async |store: Arc<Store>| {
            fill(&store, 10..15).await;
            read_all(&first(&store, "t")).await
        });
        let path = if place.volume.is_some() {
            place.image()
        } else {
            files(&place.partition_dir("t", 0), "log").remove(0)
        };
        for (round, (batch, byte, bit)) in flips.into_iter().enumerate() {
            let what = format!("{}: batch {batch}, byte {byte}, bit {bit}", path.display());
            let held = std::fs::read(&path).unwrap();
            let known = &before[batch].1;
            let at = held.windows(known.len()).position(|window| window == known).expect("it was restamped");
            flip(&path, at as u64 + byte, bit);
            place.run(async |store: Arc<Store>| {
                let log = first(&store, "t");
                assert_eq!(read_all(&log).await, before, "{what}");
                assert_eq!(log.leader_epoch(), round as i32 + 2, "{what}");
                assert_eq!(log.end_of_epoch(0), Some((0, 10)), "{what}");
                assert_eq!(log.end_of_epoch(1), Some((1, 15)), "{what}");
            });
        }
        place.run(async |store: Arc<Store>| {
            assert_eq!(append(&first(&store, "t"), &sized(300, 15)).await, 15);
        });
    }
}

#[test]
fn a_time_index_that_lies_deletes_nothing_and_hides_nothing() {
    // Of the last entry of each: 35 years less, 35 years more, another offset. Fewer entries. Another segment's.
    for harm in ["earlier", "later", "offset", "cut", "exchanged"] {
        let (place, clock) = (Place::directory(), Clock::default());
        let start = clock.now() - 60_000;
        place.run_by(&clock, true, async |store: Arc<Store>| {
            let own =
                [("segment.bytes", "4000"), ("index.interval.bytes", "500"), ("retention.ms", "3600000")];
            let log = topic(&store, "t", &own).await;
            for at in 0..60 {
                append(&log, &sized(300, at).at(start + i64::from(at) * 10)).await;
            }
        });
        let paths = files(&place.partition_dir("t", 0), "timeindex");
        assert!(paths.len() > 4, "{paths:?}");
        let last = std::fs::read(paths.last().unwrap()).unwrap();
        for path in &paths {
            let len = std::fs::metadata(path).unwrap().len();
            match harm {
                // A single entry, which rises by itself.
                "earlier" => {
                    let mut entry = std::fs::read(path).unwrap().split_off(len as usize - 12);
                    entry[2] ^= 1;
                    std::fs::write(path, entry).unwrap();
                }
                "later" => flip(path, len - 12 + 2, 1),
                "offset" => flip(path, len - 1, 0),
                "cut" => std::fs::File::options().write(true).open(path).unwrap().set_len(12).unwrap(),
                _ => std::fs::write(path, &last).unwrap(),
            }
        }
        place.run_by(&clock, true, async |store: Arc<Store>| {
            store.enforce_retention().await.unwrap();
            let log = first(&store, "t");
            assert_eq!(log.offsets().log_start, 0, "{harm}: records of the last minute are there");
            for at in 0..60 {
                let found = log.offset_for_timestamp(start + at * 10).await.unwrap();
                assert_eq!(found, Some((at, start + at * 10)), "{harm}");
            }
            assert_eq!(log.offset_of_max_timestamp().await.unwrap(), Some((59, start + 590)), "{harm}");
            clock.pass(2 * 3_600_000);
            store.enforce_retention().await.unwrap();
            assert_eq!(log.offsets().log_start, 60, "{harm}: and go in their time");
        });
    }
}

/// A store that was killed with a topic whose last segment is not sealed, and another topic.
fn killed() -> Place {
    let place = Place::directory();
    place.run(async |store: Arc<Store>| {
        for name in ["hit", "other"] {
            let log = topic(&store, name, &[("segment.bytes", "4000")]).await;
            for at in 0..30 {
                append_stable(&log, &sized(300, at)).await;
            }
        }
        store.quiet().await;
    });
    place
}

#[test]
fn a_file_that_cannot_be_read_is_the_fault_of_its_partition_alone() {
    let place = killed();
    let dir = place.partition_dir("hit", 0);
    let last = files(&dir, "log").pop().unwrap();
    let base: i64 = last.file_stem().unwrap().to_str().unwrap().parse().unwrap();
    assert!(base > 10 && base < 30, "{base}");
    let aside = dir.with_file_name("aside");
    std::fs::rename(&last, &aside).unwrap();
    // Whoever opens it is told that it is no file.
    std::fs::create_dir(&last).unwrap();
    for in_order in [false, true] {
        place.run(async |store: Arc<Store>| {
            let log = first(&store, "hit");
            assert_eq!(read_all(&log).await.len() as i64, base);
            let refused = log.append(sized(300, 30).bytes(), Durability::Cached).await;
            let told = refused.unwrap_err();
            assert!(
                matches!(told, Error::UnreadableLog { offset, segment, position: 0, .. } if (offset, segment) == (base, base)),
                "{told}"
            );
            assert!(log.read(base, 1, ReadLimit::HighWatermark, true).await.unwrap().is_empty());
            store.enforce_retention().await.unwrap();
            let other = first(&store, "other");
            let end = other.offsets().log_end;
            assert_eq!(append_stable(&other, &sized(300, 30)).await, end);
            if in_order {
                store.close().await.unwrap();
            }
        });
    }
    std::fs::remove_dir(&last).unwrap();
    std::fs::rename(&aside, &last).unwrap();
    place.run(async |store: Arc<Store>| {
        assert_eq!(read_all(&first(&store, "hit")).await.len(), 30);
        assert_eq!(append_stable(&first(&store, "hit"), &sized(300, 30)).await, 30);
        assert_eq!(read_all(&first(&store, "other")).await.len(), 32);
    });
}

#[test]
fn a_directory_that_is_missing_is_made_anew_and_no_offset_is_given_twice() {
    for in_order in [false, true] {
        let place = killed();
        if in_order {
            place.run_and_close(async |_| ());
        }
        let dir = place.partition_dir("hit", 0);
        let sealed: i64 =
            files(&dir, "log").pop().unwrap().file_stem().unwrap().to_str().unwrap().parse().unwrap();
        let known = if in_order { 30 } else { sealed };
        std::fs::remove_dir_all(&dir).unwrap();
        place.run(async |store: Arc<Store>| {
            let log = first(&store, "hit");
            assert_eq!((log.offsets().log_start, log.offsets().log_end), (known, known));
            assert_eq!(append_stable(&log, &sized(300, 30)).await, known);
            assert_eq!(read_all(&first(&store, "other")).await.len(), 30);
        });
        assert!(dir.join("partition.metadata").is_file());
        place.run_and_close(async |store: Arc<Store>| {
            let got = read_all(&first(&store, "hit")).await;
            assert_eq!(got.iter().map(|(base, _)| *base).collect::<Vec<_>>(), [known]);
        });
    }
}
