//! The log store through its library, without a broker: appends against `dd`, recovery as the log grows, commits over
//! few and many partitions, lookups in a large log, what idle partitions cost.
//!
//! Volumes are near-2 on four files. What must survive or free a whole process runs in a child of its own (`bench
//! log-child`), which is killed: nothing is closed that a crash would not close.

use crate::measure::{Bench, Measured, ROUNDS, compare};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use logstore::{Home, Partition, Store, StoreOptions, Topic, TopicConfig};
use raid::device::Durability;
use raid::runtime::{Runtime, TokioRuntime};
use std::fs::File;
use std::future::ready;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tests::process::{Sandbox, Server};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
/// Bytes of a batch of records of 1 KiB.
const BATCH: usize = 64 << 10;

/// Batches that a Kafka producer sends before it waits for an answer, unless told otherwise.
const IN_FLIGHT: usize = 5;

/// What there is to measure, by name.
pub fn benches() -> Vec<Bench> {
    let others: [Bench; 5] = [
        ("recovery".to_owned(), Box::new(recovery)),
        ("commit".to_owned(), Box::new(crate::commit::commit)),
        ("sync".to_owned(), Box::new(sync)),
        ("lookup".to_owned(), Box::new(crate::lookup::lookup)),
        ("partitions".to_owned(), Box::new(partitions)),
    ];
    appends().chain(others).collect()
}

/// A runtime like the broker's.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(3)
        .max_blocking_threads(raid::device::BLOCKING_THREADS)
        .enable_all()
        .build()
        .expect("threads can be started")
}

/// Runs on a runtime of its own.
pub fn on_runtime<T>(work: impl Future<Output = T>) -> T {
    let runtime = runtime();
    let done = runtime.block_on(work);
    runtime.shutdown_background();
    done
}

/// A store on a volume in `dir`, made with members of `size` bytes where none is; or in a directory.
pub async fn open(dir: &Path, size: Option<u64>) -> Arc<Store> {
    let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime::current());
    let Some(size) = size else {
        let home = Home::Directory(dir.join("data"));
        return Store::open(home, StoreOptions::default(), runtime).await.expect("the store opens");
    };
    let members: Vec<PathBuf> = (0..4).map(|n| dir.join(format!("d{n}.img"))).collect();
    let opened = broker::volume::open(&members, Some(size), Arc::clone(&runtime)).await;
    let volume = opened.unwrap_or_else(|error| panic!("{error}")).volume;
    let home = Home::Volume(volume.clone());
    let store = Store::open(home, StoreOptions::default(), Arc::clone(&runtime)).await;
    let store = store.expect("the store opens");
    let settled = (Arc::downgrade(&volume), Arc::downgrade(&store));
    runtime.clone().spawn(Box::pin(broker::volume::resync_when_settled(settled.0, settled.1, runtime)));
    store
}

/// A batch of records with values of `value` bytes, about `size` bytes in all.
pub fn batch(size: usize, value: usize, timestamp: i64) -> Bytes {
    let varint = |out: &mut Vec<u8>, value: i64| {
        let mut rest = value.unsigned_abs() << 1;
        while rest >= 0x80 {
            out.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        out.push(rest as u8);
    };
    let count = (size / (value + 16)).max(1);
    let mut records = Vec::with_capacity(size);
    for n in 0..count {
        // Attributes, time, offset, no key (−1 is 1 in zigzag), the value, no headers.
        let mut record = vec![0, 0];
        varint(&mut record, n as i64);
        record.push(1);
        varint(&mut record, value as i64);
        record.resize(record.len() + value, 0);
        record.push(0);
        varint(&mut records, record.len() as i64);
        records.extend(record);
    }
    let mut body = BytesMut::with_capacity(records.len() + 40);
    body.put_i16(0);
    body.put_i32(count as i32 - 1);
    body.put_i64(timestamp);
    body.put_i64(timestamp);
    body.put_i64(-1);
    body.put_i16(-1);
    body.put_i32(-1);
    body.put_i32(count as i32);
    body.put_slice(&records);
    let mut out = BytesMut::with_capacity(body.len() + 21);
    out.put_i64(0);
    out.put_i32(9 + body.len() as i32);
    out.put_i32(-1);
    out.put_i8(2);
    out.put_u32(crc32c::crc32c(&body));
    out.put_slice(&body);
    out.freeze()
}

/// Appends a copy, as one that came from a socket.
pub async fn send(partition: &Arc<Partition>, batch: &[u8], durability: Durability) {
    let appended = partition.append(Bytes::copy_from_slice(batch), durability).await.expect("an append");
    if let Some(commit) = appended.commit {
        commit.await.expect("a commit");
    }
}

pub async fn topic(store: &Store, name: &str, partitions: u32) -> Arc<Topic> {
    store.create_topic(name, partitions, TopicConfig::kafka_defaults()).await.expect("a topic is made")
}

/// What there is to append to, by name: a place, how many producers write there, and how many batches each has in flight.
fn appends() -> impl Iterator<Item = Bench> {
    let places = [("disk", false), ("tmpfs", true)];
    let ways = [(1, 1), (1, IN_FLIGHT), (4, 1)];
    let cases = places.into_iter().flat_map(move |place| ways.map(|way| (place, way)));
    cases.map(|((place, in_memory), (producers, in_flight))| -> Bench {
        let many = if in_flight > 1 { format!("-x{in_flight}") } else { String::new() };
        let bench = move || append(place, in_memory, producers, in_flight);
        (format!("append-{place}-{producers}{many}"), Box::new(bench))
    })
}

/// Records of 1 KiB in batches of 64 KiB, cached, and one flush at the end; against two `dd`, each of which writes as
/// many bytes to a file and syncs it. Both write new files, on both sides each byte goes to two legs.
fn append(place: &str, in_memory: bool, producers: u64, in_flight: usize) {
    const BYTES: u64 = GIB;
    let waits = if in_flight == 1 {
        "waits for each answer".to_owned()
    } else {
        format!("has {in_flight} batches in flight")
    };
    let title = format!(
        "append on {place}: {} MiB to two legs, batches of 64 KiB, then a flush; {producers} partitions, a producer \
         each, which {waits}",
        BYTES / MIB
    );
    compare(&title, "MiB/s", ["two dd, fdatasync", "log store, near-2"], "(at least 0.8)", |variant, _| {
        let sandbox = if in_memory { Sandbox::in_memory() } else { Sandbox::new() };
        let took = if variant == 0 {
            dd(&sandbox, BYTES)
        } else {
            append_once(&sandbox, BYTES, producers, in_flight)
        };
        Measured { figure: BYTES as f64 / MIB as f64 / took.as_secs_f64(), cpu: None }
    });
}

fn dd(sandbox: &Sandbox, bytes: u64) -> Duration {
    let begun = Instant::now();
    let run = |name: &str| {
        let mut command = Command::new("dd");
        let to = format!("of={}", sandbox.join(name).display());
        command.args(["if=/dev/zero", &to, "bs=64K", "conv=fdatasync", "status=none"]);
        command.arg(format!("count={}", bytes / (64 << 10)));
        command.spawn().expect("dd runs")
    };
    for mut child in [run("a"), run("b")] {
        assert!(child.wait().expect("dd ends").success(), "dd failed");
    }
    begun.elapsed()
}

fn append_once(sandbox: &Sandbox, bytes: u64, producers: u64, in_flight: usize) -> Duration {
    on_runtime(async {
        let store = open(sandbox.path(), Some(bytes)).await;
        let topic = topic(&store, "t", producers as u32).await;
        let batch = batch(BATCH, 1024, 1);
        let begun = Instant::now();
        let tasks = topic.partitions().iter().map(|partition| {
            let (partition, batch) = (Arc::clone(partition), batch.clone());
            tokio::spawn(async move {
                let count = bytes / producers / batch.len() as u64;
                let sends = (1..count).map(|_| send(&partition, &batch, Durability::Cached));
                stream::iter(sends).buffered(in_flight).for_each(|()| ready(())).await;
                send(&partition, &batch, Durability::Stable).await;
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.expect("a producer ends well");
        }
        begun.elapsed()
    })
}

/// What makes many files durable: a sync of each, four at a time as in a directory store, or one of the file system;
/// alone, and while others have dirtied it.
fn sync() {
    for (others, foreign) in [("alone", 0), ("256 MiB dirtied by others", 256)] {
        for files in [1, 10, 100, 1000] {
            let sandbox = Sandbox::new();
            let open: Vec<File> = (0..files)
                .map(|n| File::create(sandbox.join(format!("f{n}"))).expect("the sandbox can be written"))
                .collect();
            let root = File::open(sandbox.path()).expect("the sandbox is there");
            let noise = File::create(sandbox.join("noise")).expect("the sandbox can be written");
            let title = format!("sync of {files} files with 4 KiB new each, {others}");
            compare(&title, "ms", ["fdatasync each, 4 at once", "syncfs"], "", |variant, round| {
                use std::os::unix::fs::FileExt;
                let at = (round * 2 + variant) as u64 * 4096;
                for file in &open {
                    file.write_all_at(&[1; 4096], at).expect("a write");
                }
                for n in 0..foreign {
                    noise.write_all_at(&vec![2; MIB as usize], n * MIB).expect("a write");
                }
                let begun = Instant::now();
                if variant == 0 {
                    std::thread::scope(|scope| {
                        for part in open.chunks(open.len().div_ceil(4)) {
                            scope.spawn(|| part.iter().for_each(|file| file.sync_data().expect("a sync")));
                        }
                    });
                } else {
                    rustix::fs::syncfs(&root).expect("a sync");
                }
                let figure = begun.elapsed().as_secs_f64() * 1e3;
                noise.sync_data().expect("a sync");
                Measured { figure, cpu: None }
            });
        }
    }
}

/// A child that does `what` and says so; it is killed when it is dropped.
fn child(arguments: &[&str]) -> (Server, Vec<f64>) {
    let me = std::env::current_exe().expect("Linux knows the running program");
    let mut command = Command::new(me);
    command.arg("log-child").args(arguments).stderr(Stdio::inherit());
    let server = Server::spawn(&mut command);
    // Filling takes as long as the disk makes it.
    let line = server.line(Duration::from_secs(1200)).unwrap_or_else(|| panic!("{arguments:?} said nothing"));
    let figures = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    (server, figures)
}

/// Work that is done in a process of its own: prints a line of figures, and waits to be killed.
pub fn work_as_child(arguments: &[String]) {
    let [what, dir, size, amount] = arguments else { panic!("log-child is called by bench only") };
    let (dir, amount) = (Path::new(dir), amount.parse::<u64>().expect("a number"));
    let size = size.parse::<u64>().ok();
    on_runtime(async {
        let figures = match what.as_str() {
            "fill" => fill(dir, size, amount).await,
            "open" => {
                let begun = Instant::now();
                let store = open(dir, size).await;
                let took = begun.elapsed().as_secs_f64();
                let partitions: usize = store.topics().iter().map(|topic| topic.partitions().len()).sum();
                let figures = vec![took, resident() as f64, partitions as f64];
                std::mem::forget(store);
                figures
            }
            "make" => make(dir, size, amount as u32).await,
            "close" => {
                let store = open(dir, size).await;
                store.close().await.expect("the store closes");
                vec![1.0]
            }
            other => panic!("log-child does no {other}"),
        };
        let words: Vec<String> = figures.iter().map(ToString::to_string).collect();
        println!("{}", words.join(" "));
        std::future::pending::<()>().await;
    });
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

async fn fill(dir: &Path, size: Option<u64>, bytes: u64) -> Vec<f64> {
    let store = open(dir, size).await;
    let topic = match store.topic("t") {
        Some(topic) => topic,
        None => topic(&store, "t", 1).await,
    };
    let (partition, batch) = (&topic.partitions()[0], batch(BATCH, 1024, 1));
    while partition.size() < bytes {
        send(partition, &batch, Durability::Cached).await;
    }
    send(partition, &batch, Durability::Stable).await;
    let figures = vec![partition.size() as f64];
    std::mem::forget(store);
    figures
}

async fn make(dir: &Path, size: Option<u64>, partitions: u32) -> Vec<f64> {
    let store = open(dir, size).await;
    let topic = topic(&store, "t", partitions).await;
    let batch = batch(1024, 1024, 1);
    for some in topic.partitions().chunks(256) {
        let sent = some.iter().map(|partition| send(partition, &batch, Durability::Stable));
        futures_util::future::join_all(sent).await;
    }
    std::mem::forget(store);
    vec![f64::from(partitions)]
}

/// Pages of the members leave the memory, as after a power cut.
fn forget_pages(dir: &Path) {
    for entry in std::fs::read_dir(dir).expect("the sandbox is there").filter_map(Result::ok) {
        let Ok(file) = File::open(entry.path()) else { continue };
        if entry.path().is_file() {
            file.sync_all().expect("a sync");
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice is taken");
        }
    }
}

fn ordered(mut figures: Vec<f64>) -> Vec<f64> {
    figures.sort_by(f64::total_cmp);
    figures
}

/// Time to open a log that was killed, as it grows; its last segment always holds 256 MiB.
fn recovery() {
    const TAIL: u64 = 256 * MIB;
    let sandbox = Sandbox::new();
    let free = rustix::fs::statvfs(sandbox.path()).map(|fs| fs.f_bavail * fs.f_frsize).unwrap_or_default();
    println!(
        "\nrecovery: seconds to open after kill -9, cold page cache, {} MiB in the last segment, 3 starts",
        TAIL / MIB
    );
    println!("  {:<12} {:>10} {:>10} {:>10}   (constant)", "GiB in log", "lowest", "median", "highest");
    let (dir, size) = (sandbox.path().display().to_string(), (6 * GIB).to_string());
    for gib in [1, 2, 5, 10] {
        // Two legs, and what others need meanwhile.
        if gib * GIB * 2 + 4 * GIB > free {
            println!("  {gib:<12} left out: {} GiB are free, two legs need {}", free / GIB, 2 * gib);
            continue;
        }
        let (filled, _) = child(&["fill", &dir, &size, &(gib * GIB + TAIL).to_string()]);
        filled.kill();
        let mut took = Vec::new();
        for _ in 0..3 {
            forget_pages(sandbox.path());
            let (opened, figures) = child(&["open", &dir, &size, "0"]);
            opened.kill();
            took.push(figures[0]);
        }
        let took = ordered(took);
        println!("  {gib:<12} {:>10.3} {:>10.3} {:>10.3}", took[0], took[1], took[2]);
    }
}

/// Memory and start-up time with many partitions that each hold a record.
fn partitions() {
    println!(
        "\npartitions: volume of four files; each partition holds one record; medians of {ROUNDS} starts"
    );
    println!(
        "  {:<12} {:<8} {:>12} {:>16}   (at most 4 KiB resident a partition)",
        "partitions", "stop", "open, s", "bytes/partition"
    );
    let start = |dir: &str, size: &str| -> [f64; 2] {
        let runs: Vec<Vec<f64>> = (0..ROUNDS)
            .map(|_| {
                let (server, figures) = child(&["open", dir, size, "0"]);
                server.kill();
                figures
            })
            .collect();
        [0, 1].map(|figure| ordered(runs.iter().map(|run| run[figure]).collect())[ROUNDS / 2])
    };
    for count in [10_000_u64, 30_000] {
        let sandbox = Sandbox::new();
        let (dir, size) = (sandbox.path().display().to_string(), (4 * GIB).to_string());
        let empty = Sandbox::new();
        let empty_dir = empty.path().display().to_string();
        child(&["make", &empty_dir, &size, "1"]).0.kill();
        let [_, floor] = start(&empty_dir, &size);
        child(&["make", &dir, &size, &count.to_string()]).0.kill();
        for stop in ["unclean", "clean"] {
            if stop == "clean" {
                child(&["close", &dir, &size, "0"]).0.kill();
            }
            let [took, held] = start(&dir, &size);
            println!("  {count:<12} {stop:<8} {took:>12.3} {:>16.0}", (held - floor) / count as f64);
        }
    }
}
