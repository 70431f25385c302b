//! The power is cut under a log store in a directory: of its files and their names there is what was synced, and of the rest
//! what chance leaves. Whatever was acknowledged with acks=all is there, where it was; a kill before does not change that.
//! The disk is strace's record of a real process (`tests::disk_of`).

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use logstore::{Home, Partition, ReadLimit, Store, StoreOptions};
use raid::runtime::TokioRuntime;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use tests::disk_of::{Disk, Left, Lie, Step, traced};
use tests::process::{Sandbox, binary, run_within};
use uuid::Uuid;

/// Cuts that are tried of one life.
const CUTS: usize = 60;

/// What a topic has been promised.
#[derive(Debug, Clone, Default)]
struct Promised {
    /// The last offset that was acknowledged with acks=all; all before it are durable too.
    stable: Option<i64>,
    /// Records before it may have been deleted.
    purged: i64,
    /// It may have been deleted.
    deleting: bool,
    /// It is compacted: of each of three keys, which come by turns, the last record stays.
    is_table: bool,
}

type Promises = BTreeMap<Uuid, Promised>;

fn promise(promises: &mut Promises, line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    let Some(id) = words.get(1).and_then(|id| Uuid::parse_str(id).ok()) else { return };
    let topic = promises.entry(id).or_default();
    match words[..] {
        ["made", _] => {}
        ["table", _] => topic.is_table = true,
        ["stable", _, offset] => topic.stable = topic.stable.max(offset.parse().ok()),
        ["purging", _, before] => topic.purged = before.parse().unwrap(),
        ["deleting", _] => topic.deleting = true,
        _ => panic!("{line}: not understood"),
    }
}

/// Runs a process to its end, kill or close, on what the one before left in memory and on disk.
fn live(sandbox: &Sandbox, actions: &[&str]) -> Vec<String> {
    let (data, trace) = (sandbox.join("data"), sandbox.join("trace"));
    let arguments = [&[data.to_str().unwrap()], actions].concat();
    let ended = run_within(
        &mut traced(sandbox, &trace, &binary("directory_life"), &arguments),
        tests::process::PATIENCE,
    );
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    std::fs::read_to_string(&trace).unwrap().lines().map(str::to_owned).collect()
}

async fn check_log(log: &Partition, id: Uuid, promised: &Promised, what: &str) {
    let offsets = log.offsets();
    assert!(offsets.log_start <= promised.purged, "{what}: {id} starts at {}", offsets.log_start);
    let mut at = offsets.log_start;
    while at < offsets.log_end {
        let slice = log.read(at, 1, ReadLimit::HighWatermark, true).await;
        let bytes = slice.unwrap_or_else(|error| panic!("{what}: {error}")).copy().await.unwrap();
        let header = logstore::batch::Header::parse(&bytes).unwrap();
        logstore::batch::check(&header, &bytes).unwrap();
        assert_eq!(header.base_offset, at, "{what}: {id}");
        let wanted = format!("{id} {at} xxx");
        let is_there = bytes.windows(wanted.len()).any(|window| window == wanted.as_bytes());
        assert!(is_there, "{what}: {id} has another record at {at}");
        at = header.next_offset();
    }
    if let Some(stable) = promised.stable.filter(|&stable| stable >= promised.purged) {
        assert!(at > stable, "{what}: {id} was acknowledged up to {stable}, and ends at {at}");
    }
}

/// A table: of each key the last record that was acknowledged, or a later one; nothing twice.
async fn check_table(log: &Partition, id: Uuid, promised: &Promised, what: &str) {
    let (mut at, mut last) = (0, [-1; 3]);
    while at < log.offsets().log_end {
        let slice = log.read(at, 1, ReadLimit::HighWatermark, true).await;
        let bytes = slice.unwrap_or_else(|error| panic!("{what}: {error}")).copy().await.unwrap();
        let header = logstore::batch::Header::parse(&bytes).unwrap();
        logstore::batch::check(&header, &bytes).unwrap();
        assert!(header.base_offset >= at, "{what}: {id} has {} twice", header.base_offset);
        at = header.next_offset();
        if header.count > 0 {
            let wanted = format!("{id} {} xxx", header.base_offset);
            let is_there = bytes.windows(wanted.len()).any(|window| window == wanted.as_bytes());
            assert!(is_there, "{what}: {id} has another record at {}", header.base_offset);
            last[(header.base_offset % 3) as usize] = header.base_offset;
        }
    }
    for stable in promised.stable.iter().flat_map(|&stable| (stable - 2).max(0)..=stable) {
        let found = last[(stable % 3) as usize];
        assert!(
            found >= stable,
            "{what}: {id}: of key {} {stable} was acknowledged, {found} is there",
            stable % 3
        );
    }
}

/// No file is left of what compaction did not end, and each closed segment has its indexes.
fn check_files(dir: &Path, what: &str) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            assert!(path.extension().is_none_or(|kind| kind != "tmp"), "{what}: {}", path.display());
            continue;
        }
        let mut logs: Vec<_> = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
        logs.sort();
        let left =
            logs.iter().find(|path| path.extension().is_some_and(|kind| kind == "swap" || kind == "cleaned"));
        assert_eq!(left, None, "{what}");
        logs.retain(|path| path.extension().is_some_and(|kind| kind == "log"));
        for log in logs.iter().filter(|log| std::fs::metadata(log).unwrap().len() > 0) {
            for kind in ["index", "timeindex"] {
                assert!(log.with_extension(kind).exists(), "{what}: no {kind} of {}", log.display());
            }
        }
    }
}

/// Opens what a cut left, and holds it against what was promised.
fn check(dir: &Path, promises: &Promises, what: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let runtime = Arc::new(TokioRuntime::current());
        let store = Store::open(Home::Directory(dir.to_owned()), StoreOptions::default(), runtime).await;
        let store = store.unwrap_or_else(|error| panic!("{what}: {error}"));
        for (id, promised) in promises.iter().filter(|(_, promised)| !promised.deleting) {
            let topic = store.topic_by_id(*id).unwrap_or_else(|| panic!("{what}: topic {id} is gone"));
            let log = &topic.partitions()[0];
            if promised.is_table {
                check_table(log, *id, promised, what).await;
            } else {
                check_log(log, *id, promised, what).await;
            }
        }
        store.quiet().await;
        store.close().await.unwrap();
    });
    if promises.values().any(|promised| promised.is_table) {
        check_files(dir, what);
    }
}

/// Some lives, each of which goes on where the one before ended.
fn record(lives: &[&[&str]]) -> (Sandbox, Vec<Vec<String>>) {
    // Their syncs are real and cost nothing there.
    let sandbox = Sandbox::in_memory();
    std::fs::create_dir(sandbox.join("data")).unwrap();
    let records = lives.iter().map(|actions| live(&sandbox, actions)).collect();
    (sandbox, records)
}

/// Cuts the power at many points of them.
fn cut_in(lives: &[&[&str]], lie: Option<Lie>) {
    let (sandbox, records) = record(lives);
    let mut disk = Disk::new(&sandbox.join("data"), lie);
    let all: usize = records.iter().map(Vec::len).sum();
    assert!(all > 50, "{all} calls only: the record is not what it should be");
    let every = (all / CUTS).max(1);
    let (mut promises, mut seen, mut cuts) = (Promises::new(), 0, 0);
    for line in records.iter().flatten() {
        seen += 1;
        let said = match disk.follow(line) {
            Step::Said(said) => {
                promise(&mut promises, &said);
                // What was said last is in the greatest danger.
                true
            }
            Step::Changed | Step::Synced => false,
            Step::Nothing => continue,
        };
        if seen % every == 0 || said {
            cuts += 1;
            for left in [Left::Nothing, Left::Some(seen as u64)] {
                let dir = sandbox.join(format!("cut{seen}"));
                disk.after_a_cut(&dir, left);
                check(&dir, &promises, &format!("cut at call {seen} of {all}, {left:?} left"));
                std::fs::remove_dir_all(&dir).unwrap();
            }
        }
    }
    assert!(cuts > 20 && !promises.is_empty(), "{cuts} cuts: {promises:?}");
}

/// Cuts the power while compaction is at work, wherever names have changed that are not durable, at each change of a name and
/// each sync. Returns how often.
fn cut_in_compaction(sandbox: &Sandbox, records: &[Vec<String>], lie: Option<Lie>) -> usize {
    let mut disk = Disk::new(&sandbox.join("data"), lie);
    let (mut promises, mut is_compacting, mut cuts) = (Promises::new(), false, 0);
    for (seen, line) in (0u64..).zip(records.iter().flatten()) {
        let open = disk.open_names();
        match disk.follow(line) {
            Step::Said(said) => {
                is_compacting = said == "compacting" || is_compacting && said != "compacted";
                promise(&mut promises, &said);
                continue;
            }
            Step::Changed if disk.open_names() == open => continue,
            Step::Changed | Step::Synced => {}
            Step::Nothing => continue,
        }
        if !is_compacting || disk.open_names() == 0 {
            continue;
        }
        cuts += 1;
        for left in
            [Left::Nothing, Left::Each(seen), Left::Each(seen + (1 << 40)), Left::Each(seen + (2 << 40))]
        {
            let dir = sandbox.join(format!("cut{seen}"));
            disk.after_a_cut(&dir, left);
            check(&dir, &promises, &format!("{lie:?}, cut at call {seen}, {left:?} left"));
            std::fs::remove_dir_all(&dir).unwrap();
        }
    }
    cuts
}

/// Each segment by itself; then all that is closed into one, with what is left of the keys before.
const TABLE: &[&[&str]] = &[
    &["table:t", "keyed:t:23", "compact", "keyed:t:3"],
    &["wide:t", "keyed:t:6", "compact", "keyed:t:3", "close"],
];
const ORDINARY: &[&str] = &["create:t", "stable:t:8", "cached:t:4", "stable:t:3", "close"];

#[test]
fn what_was_acknowledged_is_there() {
    cut_in(&[ORDINARY, &["stable:t:2", "cached:t:1", "stable:t:1"], &["stable:t:6"]], None);
}

#[test]
fn what_a_retry_is_told_is_on_the_disk_though_a_killed_process_wrote_it() {
    // The producer's answer was lost with the process; the page cache has what it sent.
    cut_in(&[&["create:t", "stable:t:2", "cached:t:1"], &["again:t"]], None);
    // Segments have ended and begun meanwhile, of which nothing was synced.
    cut_in(&[&["create:t", "cached:t:23"], &["again:t", "stable:t:9"], &["again:t"]], None);
}

#[test]
fn a_topic_made_anew_and_records_deleted() {
    let lives: [&[&str]; 2] = [
        &[
            "create:t",
            "stable:t:12",
            "purge:t:7",
            "delete:t",
            "create:t",
            "stable:t:10",
            "pause:300",
            "stable:t:3",
            "purge:t:13",
            "stable:t:2",
            "pause:300",
            "stable:t:1",
        ],
        &["again:t", "stable:t:3"],
    ];
    cut_in(&lives, None);
}

#[test]
fn compacted_segments_take_the_place_of_others() {
    cut_in(TABLE, None);
}

/// A file system may make durable what was done later and not what was done before, unless a sync lies between.
#[test]
fn no_sync_of_the_directory_is_missing_when_compacted_segments_take_the_place_of_others() {
    let (sandbox, records) = record(TABLE);
    let cuts = cut_in_compaction(&sandbox, &records, None);
    assert!(cuts > 20, "{cuts} cuts");
    // The compacted file's name beside the log's, before the catalog says that it counts; and its name as the log's.
    for missing in [".cleaned", ".log.0"] {
        let lie = Some(Lie::Renamed(missing));
        let caught = catch_unwind(AssertUnwindSafe(|| cut_in_compaction(&sandbox, &records, lie)));
        assert!(caught.is_err(), "{lie:?} was not noticed");
    }
}

#[test]
fn a_disk_that_lies_is_caught() {
    for lie in [Lie::Files("log"), Lie::Files("redb"), Lie::Directories] {
        let caught = catch_unwind(AssertUnwindSafe(|| cut_in(&[ORDINARY], Some(lie))));
        assert!(caught.is_err(), "{lie:?} was not noticed");
    }
}
