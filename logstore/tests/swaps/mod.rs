//! A compacted segment takes the place of others in a directory, and is cut short between any two file operations: by a kill,
//! or by a power cut that loses some of what was done since the directory was synced last. The next start makes it what it
//! was to be, or what it was: no record is lost, none is there twice, no file is left, every index is there. A look offline
//! shows the same before that start.
//!
//! The states are made by hand from what lay there before and after, in the order that the head of
//! `src/directory/swap.rs` gives.

use super::common::*;
use super::transactions::{committed, last_of_each, take_turns_ended};
use bytes::Bytes;
use logstore::inspect::{Inspection, Severity, verify};
use logstore::{Partition, ReadLimit, Store};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

const DERIVED: [&str; 3] = ["index", "timeindex", "txnindex"];
const RETENTION: u64 = 3_600_000;

/// The files of a directory, by name.
type Files = BTreeMap<String, Vec<u8>>;

fn files_in(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

fn lay(dir: &Path, files: &Files) {
    fs::remove_dir_all(dir).unwrap();
    fs::create_dir(dir).unwrap();
    for (name, bytes) in files {
        fs::write(dir.join(name), bytes).unwrap();
    }
}

fn named(base: i64, kind: &str) -> String {
    format!("{base:020}.{kind}")
}

/// The base offset of a file of a segment.
fn base_of(name: &str) -> Option<i64> {
    let (base, kind) = name.split_once('.')?;
    (kind == "log" || DERIVED.contains(&kind)).then(|| base.parse().unwrap())
}

fn bases(files: &Files) -> Vec<i64> {
    files.keys().filter_map(|name| name.strip_suffix(".log")?.parse().ok()).collect()
}

/// The runs of segments that were compacted between two states, as (base, end).
fn swapped(before: &Files, after: &Files) -> Vec<(i64, i64)> {
    let (old, new) = (bases(before), bases(after));
    let is_new = |base: i64, end: i64| {
        let log = named(base, "log");
        old.iter().any(|at| *at > base && *at < end) || before.get(&log) != after.get(&log)
    };
    new.windows(2).map(|pair| (pair[0], pair[1])).filter(|(base, end)| is_new(*base, *end)).collect()
}

/// One file operation on a directory.
#[derive(Debug, Clone)]
enum Op {
    Rename(String, String),
    Remove(String),
}

impl Op {
    fn on(&self, files: &mut Files) {
        match self {
            Self::Rename(from, to) => {
                let bytes = files.remove(from).unwrap();
                files.insert(to.clone(), bytes);
            }
            Self::Remove(name) => drop(files.remove(name).unwrap()),
        }
    }
}

/// A log that was compacted, and what there was just before the last segment took its place.
struct Sample {
    before: Place,
    after: Place,
    /// All that is in the log, batch by batch, before and after.
    batches: [Vec<(i64, Bytes)>; 2],
    last: BTreeMap<String, (i64, String)>,
}

fn copy_of(place: &Place) -> Place {
    fn copy_all(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let (path, target) = {
                let entry = entry.unwrap();
                (entry.path(), to.join(entry.file_name()))
            };
            if path.is_dir() {
                copy_all(&path, &target);
            } else {
                fs::copy(path, target).unwrap();
            }
        }
    }
    let copy = Place { dir: TempDir::new().unwrap(), volume: place.volume };
    copy_all(place.dir.path(), copy.dir.path());
    copy
}

async fn all_of(log: &Arc<Partition>) -> Vec<(i64, Bytes)> {
    let (mut at, mut batches) = (0, Vec::new());
    while at < log.offsets().log_end {
        let mut bytes = log.read(at, 9000, ReadLimit::LogEnd, true).await.unwrap().copy().await.unwrap();
        assert!(!bytes.is_empty(), "nothing at {at}");
        while !bytes.is_empty() {
            let header = logstore::batch::Header::parse(&bytes).unwrap();
            assert!(header.base_offset >= at, "{} is there twice", header.base_offset);
            at = header.next_offset();
            batches.push((header.base_offset, bytes.split_to(header.size as usize)));
        }
    }
    batches
}

async fn last_of(log: &Arc<Partition>) -> BTreeMap<String, (i64, String)> {
    let all = committed(log).await;
    last_of_each(&all).into_iter().map(|(key, (at, value))| (key.clone(), (at, value.clone()))).collect()
}

impl Sample {
    /// After so many rounds of transactions and compactions, in the first few of which some were aborted; `wide`: the last
    /// compaction makes one segment of all.
    fn new(rounds: i64, with_aborts: i64, wide: bool) -> Self {
        let (place, clock, mut sequences) = (Place::directory(), Clock::default(), [0i32; 4]);
        let own = [
            ("cleanup.policy", "compact"),
            ("segment.bytes", "2000"),
            ("min.cleanable.dirty.ratio", "0.01"),
            ("index.interval.bytes", "300"),
            ("delete.retention.ms", "3600000"),
        ];
        for round in 0..rounds {
            place.run_by(&clock, true, async |store: Arc<Store>| {
                let log = if round == 0 { topic(&store, "t", &own).await } else { first(&store, "t") };
                let turns = round * 12..round * 12 + 12;
                take_turns_ended(&log, &mut sequences, turns, round < with_aborts).await;
            });
            if round + 1 == rounds {
                clock.pass(RETENTION + 1000);
                break;
            }
            place.run_by(&clock, true, async |store: Arc<Store>| {
                assert_eq!(store.compact().await.unwrap(), 1);
            });
        }
        let before = copy_of(&place);
        let (batches, last) = place.run_by(&clock, true, async |store: Arc<Store>| {
            let log = first(&store, "t");
            let (all, last) = (all_of(&log).await, last_of(&log).await);
            if wide {
                let config = config(&own).with(own.iter().copied().chain([("segment.bytes", "1000000")]));
                store.configure_topic("t", config.unwrap()).await.unwrap();
            }
            assert_eq!(store.compact().await.unwrap(), 1);
            assert_eq!(last_of(&log).await, last);
            ([all, all_of(&log).await], last)
        });
        Self { before, after: place, batches, last }
    }

    /// The number of the attempt that was decided last, which stands in the names of its files: of one file for each that it
    /// may be, a start takes the right one.
    fn turn(&self, base: i64, end: i64) -> u64 {
        let place = copy_of(&self.after);
        let dir = place.partition_dir("t", 0);
        for turn in 1..500 {
            let name = format!("{base:020}.timeindex.{end:020}.{turn}.swap");
            fs::write(dir.join(name), format!("turn {turn}")).unwrap();
        }
        place.run(async |_| ());
        let taken = fs::read(dir.join(named(base, "timeindex"))).unwrap();
        let taken = String::from_utf8(taken).expect("one was taken");
        taken.strip_prefix("turn ").expect("one was taken").parse().unwrap()
    }

    /// Opens a place in each way, and holds it against what it should be.
    fn examine(&self, place: &Place, is_done: bool, what: &str) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let looked = Inspection::directory(&place.dir.path().join("data")).await.unwrap();
            let mut findings = looked.findings.clone();
            for view in &looked.partitions {
                let options = verify::Options { now: None };
                findings.extend(verify::verify(view, options, &mut |_| ()).await.unwrap().1);
            }
            findings.retain(|finding| finding.severity == Severity::Fault);
            assert_eq!(findings, [], "{what}");
        });
        place.run_and_close(async |store: Arc<Store>| {
            let log = first(&store, "t");
            assert!(all_of(&log).await == self.batches[usize::from(is_done)], "{what}: other batches");
            assert_eq!(last_of(&log).await, self.last, "{what}");
        });
        let should = if is_done { &self.after } else { &self.before };
        let (found, should) =
            (files_in(&place.partition_dir("t", 0)), files_in(&should.partition_dir("t", 0)));
        let names = |files: &Files| files.keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(names(&found), names(&should), "{what}");
        for (name, bytes) in &found {
            assert!(*bytes == should[name], "{what}: {name} is another");
        }
    }
}

/// Numbers that look random and are the same in each run.
struct Seeded(u64);

impl Seeded {
    fn coin(&mut self) -> bool {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 63 == 1
    }
}

/// What lies there until it is decided: the files before, and more and more of what is written beside them.
fn undecided(
    old: &Files,
    new: &Files,
    base: i64,
    kinds: &[&str],
    turn: u64,
    swap: &impl Fn(&str) -> String,
) -> Vec<Files> {
    let log = &new[&named(base, "log")];
    let cleaned = named(base, &format!("log.{turn}.cleaned"));
    let mut files = old.clone();
    files.insert(cleaned.clone(), log[..log.len() / 2].to_vec());
    let mut states = vec![files.clone()];
    files.insert(cleaned.clone(), log.clone());
    states.push(files.clone());
    for kind in kinds {
        let bytes = &new[&named(base, kind)];
        files.insert(swap(kind), bytes[..bytes.len() / 2].to_vec());
        states.push(files.clone());
        files.insert(swap(kind), bytes.clone());
        states.push(files.clone());
    }
    Op::Rename(cleaned, swap("log")).on(&mut files);
    states.push(files);
    states
}

#[test]
fn a_swap_is_finished_or_undone_from_wherever_it_was_cut() {
    let mut txn_indexes = BTreeSet::new();
    for (rounds, with_aborts, wide) in [(1, 1, false), (1, 1, true), (4, 4, true), (1, 0, true)] {
        let sample = Sample::new(rounds, with_aborts, wide);
        let (old, new) =
            (files_in(&sample.before.partition_dir("t", 0)), files_in(&sample.after.partition_dir("t", 0)));
        let all = swapped(&old, &new);
        let (base, end) = *all.last().unwrap();
        let turn = sample.turn(base, end);
        let what =
            format!("rounds {rounds}, {with_aborts} with aborts, wide {wide}, segment {base} to {end}");
        assert!(!wide || all.len() == 1, "{what}: {all:?}");
        let swap = |kind: &str| format!("{base:020}.{kind}.{end:020}.{turn}.swap");
        // As it lay before the last one: what the others before it made, and the old ones of this.
        let is_here = |name: &str| base_of(name).is_some_and(|at| at >= base && at < end);
        let mut start: Files = new.clone();
        start.retain(|name, _| !is_here(name));
        start.extend(
            old.iter().filter(|(name, _)| is_here(name)).map(|(name, bytes)| (name.clone(), bytes.clone())),
        );
        let kinds: Vec<&str> =
            DERIVED.into_iter().filter(|kind| new.contains_key(&named(base, kind))).collect();

        // Not decided: what was written beside goes. Only where one segment was all that was to be swapped is what lay
        // there before known to be what the catalog has.
        if all.len() == 1 {
            let states = undecided(&old, &new, base, &kinds, turn, &swap);
            for (at, files) in states.iter().enumerate() {
                let place = copy_of(&sample.before);
                lay(&place.partition_dir("t", 0), files);
                sample.examine(&place, false, &format!("{what}, undecided state {at}"));
            }
        }

        // Decided: three runs of operations, the directory synced behind each.
        start.insert(swap("log"), new[&named(base, "log")].clone());
        for kind in &kinds {
            start.insert(swap(kind), new[&named(base, kind)].clone());
        }
        if !kinds.contains(&"txnindex") {
            // As if something was aborted in the old segment, and nothing of it is left.
            start.insert(named(base, "txnindex"), vec![0; 34]);
        }
        txn_indexes.insert((start.contains_key(&named(base, "txnindex")), kinds.contains(&"txnindex")));
        let stale = DERIVED.iter().map(|kind| (named(base, kind), swap(kind)));
        let stale = stale.filter(|(own, swap)| start.contains_key(own) && !start.contains_key(swap));
        let runs = [
            stale.map(|(own, _)| Op::Remove(own)).collect::<Vec<_>>(),
            vec![Op::Rename(swap("log"), named(base, "log"))],
            kinds
                .iter()
                .map(|kind| Op::Rename(swap(kind), named(base, kind)))
                .chain(
                    old.keys()
                        .filter(|name| base_of(name).is_some_and(|at| at > base && at < end))
                        .map(|name| Op::Remove(name.clone())),
                )
                .collect(),
        ];
        let (mut states, mut seeded) = (vec![start.clone()], Seeded(rounds as u64));
        let mut files = start;
        for ops in &runs {
            // A kill: as far as it came. A power cut: any of them, each alone missing or alone there among them.
            let mut choices: Vec<Vec<bool>> =
                (1..=ops.len()).map(|to| (0..ops.len()).map(|n| n < to).collect()).collect();
            for one in 0..ops.len() {
                choices.push((0..ops.len()).map(|n| n == one).collect());
                choices.push((0..ops.len()).map(|n| n != one).collect());
                choices.push((0..ops.len()).map(|_| seeded.coin()).collect());
            }
            choices.sort();
            choices.dedup();
            for choice in choices {
                let mut files = files.clone();
                ops.iter()
                    .zip(&choice)
                    .filter(|(_, is_done)| **is_done)
                    .for_each(|(op, _)| op.on(&mut files));
                states.push(files);
            }
            for op in ops {
                op.on(&mut files);
            }
        }
        assert!(files == new, "{what}: the operations lead to what is there");
        assert!(states.len() > 4, "{what}");
        for (at, files) in states.iter().enumerate() {
            let place = copy_of(&sample.after);
            lay(&place.partition_dir("t", 0), files);
            sample.examine(&place, true, &format!("{what}, decided state {at} of {}", states.len()));
        }

        // Left of an attempt at the same segments again: not taken for the one that was decided.
        let place = copy_of(&sample.after);
        for kind in ["log", "index", "timeindex", "txnindex"] {
            let again = swap(kind).replace(&format!(".{turn}.swap"), &format!(".{}.swap", turn + 1));
            fs::write(place.partition_dir("t", 0).join(again), "noise").unwrap();
        }
        fs::write(place.partition_dir("t", 0).join(named(base, &format!("log.{turn}.cleaned"))), "noise")
            .unwrap();
        sample.examine(&place, true, &format!("{what}, another attempt"));
    }
    for case in [(true, true), (true, false)] {
        assert!(
            txn_indexes.contains(&case),
            "{txn_indexes:?}: an index of aborted transactions is replaced, and one goes"
        );
    }
}
