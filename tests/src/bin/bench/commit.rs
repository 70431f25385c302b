//! Commits of producers that wait for each, over ten partitions and over a thousand.
//!
//! In memory this shows what the store itself spends. On a disk it also shows what the disk charges for many small
//! places instead of few, as far as the volume's journal does not spare it them: so the same is measured of bare files,
//! without any store: as many bytes at as many places of two files, and one `fdatasync` of each for a group as large as
//! the store's were.

use crate::log::{GIB, batch, open, runtime, send, topic};
use crate::measure::{Measured, compare};
use logstore::Topic;
use raid::device::Durability;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tests::process::Sandbox;

/// Producers that wait for commits.
const PRODUCERS: u64 = 64;
/// Bytes of a record's value.
const VALUE: usize = 1024;
/// Partitions that are compared.
const PARTITIONS: [u32; 2] = [10, 1000];
/// Time of one measurement.
const SPAN: Duration = Duration::from_secs(3);
/// Writes that one flush of a bare file covers: what the store's groups are on the disk that this was written on.
const GROUP: usize = 20;

/// See the head.
pub fn commit() {
    for (home, in_memory, size) in [
        // Some gigabytes are committed in half a minute.
        ("a volume in memory", true, Some(16 * GIB)),
        ("a volume", false, Some(16 * GIB)),
        ("a directory", false, None),
    ] {
        let sandbox = if in_memory { Sandbox::in_memory() } else { Sandbox::new() };
        let runtime = runtime();
        let (_store, topics) = runtime.block_on(async {
            let store = open(sandbox.path(), size).await;
            let [few, many] = PARTITIONS;
            let topics = [topic(&store, "few", few).await, topic(&store, "many", many).await];
            // Once without counting: each partition takes its first space.
            for topic in &topics {
                let first = topic.partitions().iter().map(|partition| async {
                    send(partition, &batch(VALUE, VALUE, 1), Durability::Stable).await;
                });
                futures_util::future::join_all(first).await;
            }
            (store, topics)
        });
        show(home, |variant| runtime.block_on(committed(&topics[variant])));
        runtime.shutdown_background();
    }
    show("two bare files", |variant| bare(PARTITIONS[variant]));
}

fn show(home: &str, measure: impl Fn(usize) -> f64) {
    let title = format!("commit, {home}: acks=all, {PRODUCERS} producers in flight, a record of 1 KiB each");
    let names = ["10 partitions", "1,000 partitions"];
    compare(&title, "commits/s", names, "(at least 0.9)", |variant, _| Measured {
        figure: measure(variant),
        cpu: None,
    });
}

/// Commits per second.
async fn committed(topic: &Arc<Topic>) -> f64 {
    let (count, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let batch = batch(VALUE, VALUE, 1);
    let begun = Instant::now();
    let tasks: Vec<_> = (0..PRODUCERS)
        .map(|producer| {
            let (topic, batch) = (Arc::clone(topic), batch.clone());
            let (count, over) = (Arc::clone(&count), Arc::clone(&over));
            tokio::spawn(async move {
                let partitions = topic.partitions();
                let mut at = producer as usize;
                while !over.load(Ordering::Relaxed) {
                    send(&partitions[at % partitions.len()], &batch, Durability::Stable).await;
                    count.fetch_add(1, Ordering::Relaxed);
                    at += PRODUCERS as usize + 1;
                }
            })
        })
        .collect();
    tokio::time::sleep(SPAN).await;
    over.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.expect("a producer ends well");
    }
    count.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64()
}

/// Appends per second at `places` places of two new files, each group of them durable in both before the next begins.
fn bare(places: u32) -> f64 {
    let sandbox = Sandbox::new();
    let files = [sandbox.join("a"), sandbox.join("b")].map(|path| {
        let file = File::create(path).expect("the sandbox can be written");
        file.set_len(2 * GIB).expect("files may be sparse");
        file
    });
    let (batch, room) = (batch(VALUE, VALUE, 1), 2 * GIB / u64::from(places));
    let mut taken = vec![0; places as usize];
    let mut next = 0;
    let mut group = |size: usize| {
        let mut places = Vec::with_capacity(size);
        for _ in 0..size {
            places.push(next as u64 * room + taken[next]);
            taken[next] += batch.len() as u64;
            assert!(taken[next] <= room, "more was written than there is room for");
            next = (next + 1) % taken.len();
        }
        std::thread::scope(|scope| {
            for file in &files {
                scope.spawn(|| {
                    for place in &places {
                        file.write_all_at(&batch, *place).expect("a write");
                    }
                    file.sync_data().expect("a sync");
                });
            }
        });
    };
    // As for the store: each place is begun before it counts.
    group(places as usize);
    let (mut count, begun) = (0, Instant::now());
    while begun.elapsed() < SPAN {
        group(GROUP);
        count += GROUP;
    }
    count as f64 / begun.elapsed().as_secs_f64()
}
