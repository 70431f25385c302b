//! Transactions in the log, on both homes: what is stable, what was aborted, and what a restart makes of it.

use super::cleaning::verified;
use super::common::*;
use logstore::batch::{Header, Marker};
use logstore::transactions::Aborted;
use logstore::{Error, Outcome, Partition, ReadLimit, Store};
use raid::device::Durability;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

async fn end(log: &Arc<Partition>, id: i64, epoch: i16, outcome: Outcome) -> i64 {
    log.append_marker(id, epoch, 0, outcome, Durability::Cached).await.unwrap().base_offset
}

fn one(id: i64, sequence: i32) -> Batch {
    batch(&["x"]).by(id, 0, sequence).txn()
}

fn aborted(producer_id: i64, first_offset: i64, last_offset: i64, last_stable: i64) -> Aborted {
    Aborted { producer_id, first_offset, last_offset, last_stable }
}

#[test]
fn what_is_stable_follows_the_oldest_open_transaction() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[]).await;
            let mut seen = log.subscribe();
            append(&log, &batch(&["plain"])).await;
            assert_eq!(log.offsets().last_stable, 1);
            assert_eq!(append(&log, &one(1, 0)).await, 1);
            assert_eq!(append(&log, &one(2, 0)).await, 2);
            append(&log, &one(1, 1)).await;
            append(&log, &batch(&["behind"])).await;
            let offsets = log.offsets();
            assert_eq!((offsets.last_stable, offsets.high_watermark), (1, 5));
            assert!(log.read(1, 1000, ReadLimit::LastStable, true).await.unwrap().is_empty());
            let (slice, none) = log.read_committed(0, 1000, true).await.unwrap();
            assert_eq!(
                (Header::parse(&slice.copy().await.unwrap()).unwrap().last_offset(), none.len()),
                (0, 0)
            );
            // A plain batch of a producer inside its transaction is refused, and changes nothing.
            let plain = log.append(batch(&["x"]).by(1, 0, 2).bytes(), Durability::Cached).await;
            assert!(matches!(plain, Err(Error::InTransaction { first_offset: 1, producer_id: 1, .. })));
            assert_eq!(end(&log, 1, 0, Outcome::Abort).await, 5);
            assert_eq!(log.offsets().last_stable, 2);
            assert_eq!(end(&log, 2, 0, Outcome::Commit).await, 6);
            assert_eq!(log.offsets().last_stable, 7);
            seen.wait_for(|visible| visible.last_stable == 7).await.unwrap();
            assert_eq!(log.aborted(0, 7).await.unwrap(), [aborted(1, 1, 5, 2)]);
            assert_eq!(log.aborted(6, 7).await.unwrap(), [], "it ended before");
            assert_eq!(log.aborted(0, 1).await.unwrap(), [], "it began later");
            let states = log.producers().await.unwrap();
            let of = |state: &logstore::ProducerState| {
                (state.id, state.last_sequence, state.last_offset, state.coordinator_epoch, state.open_from)
            };
            assert_eq!(states.iter().map(of).collect::<Vec<_>>(), [(1, 1, 3, 0, None), (2, 0, 2, 0, None)]);
        });
    }
}

#[test]
fn the_marker_in_the_log_is_a_control_batch() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[]).await;
            append(&log, &one(7, 0)).await;
            log.append_marker(7, 3, 11, Outcome::Commit, Durability::Cached).await.unwrap();
            let batches = read_all(&log).await;
            let header = Header::parse(&batches[1].1).unwrap();
            assert!(header.is_control() && header.is_transactional());
            assert_eq!((header.producer_id, header.producer_epoch, header.base_sequence), (7, 3, -1));
            let marker = Marker::read(&header, &batches[1].1).unwrap();
            assert_eq!(marker, Marker { outcome: Outcome::Commit, coordinator_epoch: 11 });
            // What a client sends must not be one.
            let sent = log.append(batches[1].1.clone(), Durability::Cached).await;
            assert!(matches!(sent, Err(Error::InvalidBatch { .. })));
            let old = log.append_marker(7, 2, 11, Outcome::Commit, Durability::Cached).await;
            assert!(matches!(old, Err(Error::FencedProducer { found: 2, current: 3, .. })));
            let zombie = log.append_marker(7, 3, 10, Outcome::Commit, Durability::Cached).await;
            assert!(matches!(zombie, Err(Error::FencedCoordinator { found: 10, current: 11, .. })));
            for (id, epoch) in [(-1, 0), (0, -1)] {
                let nobody = log.append_marker(id, epoch, 0, Outcome::Abort, Durability::Cached).await;
                assert!(matches!(nobody, Err(Error::InvalidBatch { .. })));
            }
            assert_eq!(log.offsets().log_end, 2);
            // The epoch was bumped: the old producer is fenced, a new one starts over.
            let fenced = log.append(one(7, 1).bytes(), Durability::Cached).await;
            assert!(matches!(fenced, Err(Error::FencedProducer { found: 0, current: 3, .. })));
            let gap = log.append(batch(&["x"]).by(7, 3, 1).bytes(), Durability::Cached).await;
            assert!(matches!(gap, Err(Error::OutOfOrderSequence { expected: 0, found: 1, .. })));
            append(&log, &batch(&["x"]).by(7, 3, 0)).await;
        });
    }
}

#[test]
fn a_marker_counts_once_it_is_durable_if_it_must_be() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &[]).await;
            append(&log, &one(1, 0)).await;
            let appended = log.append_marker(1, 0, 0, Outcome::Abort, Durability::Stable).await.unwrap();
            appended.commit.unwrap().await.unwrap();
            assert_eq!(log.offsets().last_stable, 2);
            assert_eq!(log.aborted(0, 2).await.unwrap().len(), 1);
        });
    }
}

/// Five producers, transactions that span segments, some aborted, some committed, some left open; the expectation is
/// kept beside the log.
struct Story {
    /// Per producer: next sequence, first offset if open.
    producers: [(i32, Option<i64>); 5],
    aborted: Vec<Aborted>,
}

impl Story {
    fn new() -> Self {
        Self { producers: [(0, None); 5], aborted: Vec::new() }
    }

    fn first_open(&self) -> Option<i64> {
        self.producers.iter().filter_map(|(_, open)| *open).min()
    }

    /// One step that depends on nothing but its number.
    async fn step(&mut self, log: &Arc<Partition>, n: i32) {
        let id = (n * 7 % 5) as usize;
        let (sequence, open) = self.producers[id];
        let ends = open.is_some() && n % 3 == 0;
        if ends {
            let outcome = if n % 2 == 0 { Outcome::Abort } else { Outcome::Commit };
            let offset = end(log, id as i64, 0, outcome).await;
            self.producers[id].1 = None;
            if outcome == Outcome::Abort {
                let stable = self.first_open().unwrap_or(offset + 1);
                self.aborted.push(aborted(id as i64, open.unwrap(), offset, stable));
            }
        } else {
            let value = "v".repeat(150);
            let offset = append(log, &batch(&[&value, "w"]).by(id as i64, 0, sequence).txn()).await;
            self.producers[id] = (sequence + 2, open.or(Some(offset)));
        }
    }

    async fn check(&self, log: &Arc<Partition>) {
        let offsets = log.offsets();
        assert_eq!(offsets.last_stable, self.first_open().unwrap_or(offsets.log_end));
        let end = offsets.log_end;
        for from in (0..end).step_by(13) {
            for upper in [from + 1, from + 20, end] {
                let found = log.aborted(from, upper).await.unwrap();
                let expected: Vec<_> = self
                    .aborted
                    .iter()
                    .filter(|aborted| aborted.last_offset >= from && aborted.first_offset < upper)
                    .copied()
                    .collect();
                assert_eq!(found, expected, "{from}..{upper}");
            }
        }
        let open: Vec<_> = self
            .producers
            .iter()
            .enumerate()
            .filter_map(|(id, (_, open))| open.map(|open| (id as i64, open)))
            .collect();
        let states = log.producers().await.unwrap();
        let told: Vec<_> =
            states.iter().filter_map(|state| state.open_from.map(|open| (state.id, open))).collect();
        assert_eq!(told, open);
    }
}

const SMALL: [(&str, &str); 2] = [("segment.bytes", "2000"), ("index.interval.bytes", "500")];

#[test]
fn aborted_lists_and_open_transactions_survive_stops_and_kills() {
    for place in Place::both() {
        let mut story = Story::new();
        place.run_and_close(async |store: Arc<Store>| {
            topic(&store, "t", &SMALL).await;
        });
        let mut n = 0;
        for life in 0..6 {
            let work = async |store: Arc<Store>| {
                let log = first(&store, "t");
                // Before anything is appended: a consumer may be the first to come.
                story.check(&log).await;
                for _ in 0..17 {
                    n += 1;
                    story.step(&log, n).await;
                }
                story.check(&log).await;
            };
            if life % 2 == 0 { place.run_and_close(work) } else { place.run(work) }
        }
        assert!(story.aborted.len() > 8, "{}", story.aborted.len());
        assert!(story.first_open().is_some());
    }
}

#[test]
fn a_committed_read_lists_what_overlaps_it() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log = topic(&store, "t", &SMALL).await;
            let mut story = Story::new();
            for n in 1..80 {
                story.step(&log, n).await;
            }
            let stable = log.offsets().last_stable;
            let (mut at, mut listed) = (0, Vec::new());
            while at < stable {
                let (slice, found) = log.read_committed(at, 700, true).await.unwrap();
                let mut bytes = slice.copy().await.unwrap();
                assert!(!bytes.is_empty());
                let mut next = at;
                while !bytes.is_empty() {
                    let header = Header::parse(&bytes).unwrap();
                    next = header.next_offset();
                    drop(bytes.split_to(header.size as usize));
                }
                assert!(next <= stable);
                for expected in story.aborted.iter().filter(|a| a.last_offset >= at && a.first_offset < next)
                {
                    assert!(found.contains(expected), "{expected:?} is in {at}..{next}");
                }
                for found in &found {
                    assert!(story.aborted.contains(found) && found.last_offset >= at, "{found:?}");
                }
                listed.extend(found);
                at = next;
            }
            assert!(!listed.is_empty());
        });
    }
}

#[test]
fn damaged_transaction_files_are_never_believed() {
    let place = Place::directory();
    let mut story = Story::new();
    place.run_and_close(async |store: Arc<Store>| {
        let log = topic(&store, "t", &SMALL).await;
        for n in 1..90 {
            story.step(&log, n).await;
        }
    });
    let dir = place.partition_dir("t", 0);
    let good: Vec<_> = ["txnindex", "snapshot"]
        .iter()
        .flat_map(|kind| files(&dir, kind))
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    let lists: Vec<_> = good.iter().filter(|(path, _)| path.extension().unwrap() == "txnindex").collect();
    assert!(lists.len() > 2, "{}", lists.len());
    let judge = |what: &str| {
        place.run(async |store: Arc<Store>| {
            println!("{what}");
            story.check(&first(&store, "t")).await;
        });
        for (path, bytes) in &good {
            std::fs::write(path, bytes).unwrap();
        }
    };
    for (path, bytes) in &good {
        for bit in (0..bytes.len() * 8).step_by(311) {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(path, bad).unwrap();
            judge(&format!("bit {bit} of {}", path.display()));
        }
        std::fs::write(path, &bytes[..bytes.len() - 34]).unwrap();
        judge(&format!("{} without its end", path.display()));
        std::fs::remove_file(path).unwrap();
        judge(&format!("{} is missing", path.display()));
    }
    std::fs::write(&lists[0].0, &lists[1].1).unwrap();
    judge("the list of another segment");
}

#[test]
fn a_snapshot_that_lies_of_open_transactions_is_held_against_the_log() {
    let place = Place::directory();
    place.run_and_close(async |store: Arc<Store>| {
        let log = topic(&store, "t", &[]).await;
        append(&log, &batch(&["a"]).by(3, 0, 0)).await;
        append(&log, &batch(&["b"]).by(3, 0, 1)).await;
    });
    let snapshot = files(&place.partition_dir("t", 0), "snapshot").pop().unwrap();
    let mut lie = std::fs::read(&snapshot).unwrap();
    let last = lie.len() - 8;
    lie[last..].copy_from_slice(&0i64.to_be_bytes());
    let crc = crc32c::crc32c(&lie[6..]);
    lie[2..6].copy_from_slice(&crc.to_be_bytes());
    std::fs::write(&snapshot, lie).unwrap();
    place.run_and_close(async |store: Arc<Store>| {
        let log = first(&store, "t");
        assert_eq!(log.producers().await.unwrap()[0].open_from, None);
        assert_eq!(append(&log, &batch(&["c"]).by(3, 0, 2)).await, 2);
        assert_eq!(log.offsets().last_stable, 3);
    });
}

#[test]
fn the_start_of_an_open_transaction_may_be_deleted() {
    for place in Place::both() {
        place.run(async |store: Arc<Store>| {
            let own = [("segment.bytes", "2000"), ("retention.bytes", "3000"), ("file.delete.delay.ms", "0")];
            let log = topic(&store, "t", &own).await;
            append(&log, &one(1, 0)).await;
            for at in 0..30 {
                append(&log, &sized(300, at)).await;
            }
            store.enforce_retention().await.unwrap();
            let offsets = log.offsets();
            assert!(offsets.log_start > 10);
            assert_eq!(offsets.last_stable, offsets.log_start);
        });
        place.run_and_close(async |store: Arc<Store>| {
            let log = first(&store, "t");
            let offsets = log.offsets();
            assert_eq!(offsets.last_stable, offsets.log_start, "after a recovery too");
            assert_eq!(
                append(&log, &one(1, 1)).await,
                offsets.log_end,
                "the producer is known by its snapshot"
            );
        });
        place.run_and_close(async |store: Arc<Store>| {
            let log = first(&store, "t");
            let (start, end_offset) = (log.offsets().log_start, log.offsets().log_end);
            assert_eq!(log.offsets().last_stable, start, "and after a stop in order");
            assert_eq!(end(&log, 1, 0, Outcome::Abort).await, end_offset);
            assert_eq!(log.offsets().last_stable, end_offset + 1);
            let found = log.aborted(start, end_offset + 1).await.unwrap();
            assert_eq!(found, [aborted(1, 0, end_offset, end_offset + 1)]);
        });
    }
}

#[test]
fn a_log_without_transactions_keeps_nothing_of_them() {
    let place = Place::directory();
    place.run_and_close(async |store: Arc<Store>| {
        let log = topic(&store, "t", &SMALL).await;
        for at in 0..30 {
            append(&log, &sized(300, at).by(1, 0, i32::from(at))).await;
        }
        assert_eq!(log.aborted(0, 30).await.unwrap(), []);
    });
    assert!(files(&place.partition_dir("t", 0), "txnindex").is_empty());
}

/// What a `read_committed` consumer makes of the log, as Kafka's does: by offset the key and the value.
pub async fn committed(log: &Arc<Partition>) -> BTreeMap<i64, (String, String)> {
    let end = log.offsets().last_stable;
    let (mut at, mut found) = (log.offsets().log_start, BTreeMap::new());
    let mut skipped = BTreeSet::new();
    while at < end {
        let (slice, mut aborted) = log.read_committed(at, 3000, true).await.unwrap();
        aborted.sort_by_key(|one| one.first_offset);
        let mut bytes = slice.copy().await.unwrap();
        assert!(!bytes.is_empty(), "nothing at {at}, before {end}");
        let mut waiting = aborted.into_iter().peekable();
        skipped.clear();
        while !bytes.is_empty() {
            let header = Header::parse(&bytes).unwrap();
            let one = bytes.split_to(header.size as usize);
            while let Some(next) = waiting.next_if(|one| one.first_offset <= header.last_offset()) {
                skipped.insert(next.producer_id);
            }
            at = header.next_offset();
            if header.is_control() {
                let marker = Marker::read(&header, &one);
                if marker.is_some_and(|marker| marker.outcome == Outcome::Abort) {
                    skipped.remove(&header.producer_id);
                }
                continue;
            }
            if header.is_transactional() && skipped.contains(&header.producer_id) {
                continue;
            }
            let unpacked = logstore::records::unpack(&header, &one, 1 << 20).unwrap();
            for record in logstore::records::Records::new(&header, &unpacked) {
                let record = record.unwrap();
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                found.insert(record.offset, (text(record.key.unwrap()), text(record.value.unwrap())));
            }
        }
    }
    found
}

/// The last of each key.
pub fn last_of_each(records: &BTreeMap<i64, (String, String)>) -> BTreeMap<&String, (i64, &String)> {
    records.iter().map(|(offset, (key, value))| (key, (*offset, value))).collect()
}

async fn markers(log: &Arc<Partition>) -> usize {
    let (mut at, mut count) = (0, 0);
    while at < log.offsets().log_end {
        let mut bytes = log.read(at, 9000, ReadLimit::LogEnd, true).await.unwrap().copy().await.unwrap();
        assert!(!bytes.is_empty(), "nothing at {at}");
        while !bytes.is_empty() {
            let header = Header::parse(&bytes).unwrap();
            at = header.next_offset();
            let one = bytes.split_to(header.size as usize);
            count += usize::from(Marker::read(&header, &one).is_some());
        }
    }
    count
}

/// Four producers take turns; every third transaction is aborted; each has two batches, between those of another.
pub async fn take_turns(log: &Arc<Partition>, sequences: &mut [i32; 4], from: i64, to: i64) {
    take_turns_ended(log, sequences, from..to, true).await;
}

/// The same, or without aborts.
pub async fn take_turns_ended(
    log: &Arc<Partition>,
    sequences: &mut [i32; 4],
    turns: Range<i64>,
    with_aborts: bool,
) {
    for n in turns {
        for half in 0..2 {
            for id in [n % 4, (n + 1) % 4] {
                let sequence = &mut sequences[id as usize];
                let (key, value) =
                    (format!("k{}", (n * 2 + half + id) % 7), format!("{n} {}", "v".repeat(60)));
                append(log, &keyed(&[(&key, Some(&value))]).by(id, 0, *sequence).txn()).await;
                *sequence += 1;
            }
        }
        for id in [n % 4, (n + 1) % 4] {
            let is_aborted = with_aborts && (n + id) % 3 == 0;
            end(log, id, 0, if is_aborted { Outcome::Abort } else { Outcome::Commit }).await;
        }
    }
}

#[test]
fn compaction_takes_markers_out_once_nothing_of_their_transactions_is_left() {
    const RETENTION: u64 = 3_600_000;
    for place in Place::both() {
        let clock = Clock::default();
        let own = [
            ("cleanup.policy", "compact"),
            ("segment.bytes", "2000"),
            ("min.cleanable.dirty.ratio", "0.01"),
            ("file.delete.delay.ms", "0"),
            ("delete.retention.ms", "3600000"),
        ];
        let mut sequences = [0i32; 4];
        let mut expected = BTreeMap::new();
        for round in 0..4 {
            place.run_by(&clock, round % 2 == 0, async |store: Arc<Store>| {
                let log = if round == 0 { topic(&store, "t", &own).await } else { first(&store, "t") };
                if round > 0 {
                    let now = committed(&log).await;
                    assert_eq!(last_of_each(&now), last_of_each(&expected), "round {round}");
                }
                take_turns(&log, &mut sequences, round * 30, round * 30 + 30).await;
                store.quiet().await;
                expected = committed(&log).await;
                let stable = log.offsets();
                let before = markers(&log).await;
                assert_eq!(store.compact().await.unwrap(), 1);
                let after = committed(&log).await;
                assert_eq!(last_of_each(&after), last_of_each(&expected), "round {round}");
                assert!(after.iter().all(|(offset, record)| expected.get(offset) == Some(record)));
                assert_eq!(log.offsets(), stable);
                let left = markers(&log).await;
                // First the records go; then horizons are set, and none passes while the clock stands; then the markers go.
                if round < 3 {
                    assert_eq!(left, before, "round {round}");
                } else {
                    assert!(left < before - 60, "{left} of {before}");
                }
                if round == 2 {
                    clock.pass(RETENTION + 1000);
                }
                for state in log.producers().await.unwrap() {
                    assert_eq!(state.last_sequence, sequences[state.id as usize] - 1);
                }
            });
            // Offline, the index of aborted transactions is what it may be.
            if round % 2 == 0 {
                verified(&place);
            }
        }
        // A producer whose markers are gone begins a transaction and commits it: nobody skips it.
        place.run_by(&clock, true, async |store: Arc<Store>| {
            let log = first(&store, "t");
            let before = committed(&log).await;
            take_turns(&log, &mut sequences, 121, 123).await;
            let after = committed(&log).await;
            assert_eq!(after.len(), before.len() + 6, "three of the four transactions were committed");
        });
    }
}
