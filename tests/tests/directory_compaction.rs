//! Compaction of a log in a directory, on a real file system.
//!
//! One that is full: compaction that finds no room gives up, leaves nothing, rests and is told of once; what is there is
//! served; records can be deleted and the store is closed in order; and once there is room, everything goes on.
//!
//! In which order its files are synced, renamed and removed, as the kernel sees it: that what the tests of the log store make
//! of it (`logstore/tests/swaps`) is what happens.

use bytes::Bytes;
use logstore::inspect::{Inspection, Severity, verify};
use logstore::{Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use raid::device::Durability;
use raid::runtime::{BoxFuture, Runtime, TokioRuntime};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tests::broker::keyed_batch;
use tests::process::{PATIENCE, Sandbox, Server, eventually, left_out, succeed};
use tests::volumes::{Loop, Mount};

const MIB: usize = 1 << 20;

/// The machine, by a clock that can be moved on.
struct Late {
    inner: TokioRuntime,
    ahead: Arc<AtomicU64>,
}

impl Runtime for Late {
    fn now(&self) -> Duration {
        self.inner.now() + Duration::from_secs(self.ahead.load(Ordering::SeqCst))
    }

    fn wall_clock(&self) -> Duration {
        self.inner.wall_clock()
    }

    fn fill_random(&self, out: &mut [u8]) {
        self.inner.fill_random(out);
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.inner.spawn(task);
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        self.inner.sleep(time)
    }
}

/// Records with these keys, each with so many bytes.
fn keyed(keys: &[&str], bytes: usize) -> Bytes {
    let value = vec![b'v'; bytes];
    let records: Vec<(&str, &[u8])> = keys.iter().map(|key| (*key, value.as_slice())).collect();
    keyed_batch(&records, 1_700_000_000_000)
}

async fn append(log: &Arc<Partition>, batch: Bytes) -> logstore::Result<()> {
    let appended = log.append(batch, Durability::Stable).await?;
    appended.commit.expect("asked for").await
}

/// Base offsets and checksums of all batches.
async fn all_of(log: &Partition) -> Vec<(i64, u32)> {
    let (mut at, mut found) = (log.offsets().log_start, Vec::new());
    while at < log.offsets().high_watermark {
        let slice = log.read(at, 1, ReadLimit::HighWatermark, true).await.expect("it is served");
        let bytes = slice.copy().await.expect("it is served");
        let header = logstore::batch::Header::parse(&bytes).expect("a batch");
        found.push((header.base_offset, crc32c::crc32c(&bytes)));
        at = header.next_offset();
    }
    found
}

fn options() -> StoreOptions {
    let mut topic_defaults = TopicConfig::kafka_defaults();
    for (key, value) in [
        ("retention.ms", "-1"),
        ("max.message.bytes", "50000000"),
        ("min.cleanable.dirty.ratio", "0.01"),
        ("file.delete.delay.ms", "0"),
        ("segment.bytes", "8000000"),
    ] {
        topic_defaults.set_default(key, value).expect("a key of Kafka's");
    }
    StoreOptions { topic_defaults, ..StoreOptions::default() }
}

async fn topic(store: &Store, name: &str, policy: &str) -> Arc<Partition> {
    let config = options().topic_defaults.with([("cleanup.policy", policy)]).expect("a key of Kafka's");
    Arc::clone(&store.create_topic(name, 1, config).await.expect("a topic").partitions()[0])
}

/// What lies in the partitions' directories that compaction has not finished.
fn left_of_compaction(data: &Path) -> Vec<PathBuf> {
    let list = |dir: &Path| {
        let entries = std::fs::read_dir(dir).expect("it can be listed");
        entries.map(|entry| entry.expect("it can be listed").path()).collect::<Vec<_>>()
    };
    let all = list(data).into_iter().filter(|path| path.is_dir()).flat_map(|dir| list(&dir));
    all.filter(|path| path.extension().is_some_and(|kind| kind == "cleaned" || kind == "swap")).collect()
}

fn free(dir: &Path) -> usize {
    let found = rustix::fs::statvfs(dir).expect("it is mounted");
    (found.f_bavail * found.f_frsize) as usize
}

/// A file that takes all room but so much.
fn fill(dir: &Path, but: usize) {
    let mut file = File::create(dir.join("filler")).expect("it can be made");
    while free(dir) > but {
        let n = (free(dir) - but).clamp(1, MIB);
        match file.write_all(&vec![1; n]).and_then(|()| file.sync_data()) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return,
            Err(error) => panic!("{error}"),
        }
    }
}

/// What an offline look says, but for notes.
async fn faults(data: &Path) -> Vec<String> {
    let looked = Inspection::directory(data).await.expect("it can be looked at");
    let mut findings = looked.findings.clone();
    for view in &looked.partitions {
        let options = verify::Options { now: None };
        findings.extend(verify::verify(view, options, &mut |_| ()).await.expect("it can be read").1);
    }
    findings.retain(|finding| finding.severity == Severity::Fault);
    findings.iter().map(ToString::to_string).collect()
}

async fn live_on(dir: &Path, what: &str) {
    let data = dir.join("data");
    let ahead = Arc::new(AtomicU64::new(0));
    let runtime = Arc::new(Late { inner: TokioRuntime::current(), ahead: Arc::clone(&ahead) });
    let store = Store::open(Home::Directory(data.clone()), options(), runtime).await.expect("a store");
    let (many, large) = (topic(&store, "many", "compact").await, topic(&store, "large", "compact").await);
    let plain = topic(&store, "plain", "delete").await;
    for at in 0..150 {
        append(&many, keyed(&["again", &format!("k{at}")], 50_000)).await.expect("there is room");
    }
    // Of each the second record stays, 6 MiB of it: more than is free when it is written.
    for at in 0..3 {
        append(&large, keyed(&["again", &format!("k{at}")], 3 * MIB)).await.expect("there is room");
        append(&plain, keyed(&["k"], 100_000)).await.expect("there is room");
    }
    store.quiet().await;
    let before = [all_of(&many).await, all_of(&large).await, all_of(&plain).await];

    // Some room, and not enough: the writing finds the end.
    fill(dir, 5 * MIB - MIB / 2);
    let room = free(dir);
    assert!((4 * MIB..5 * MIB).contains(&room), "{what}: {room} bytes free");
    // The smaller batches fit; of the large ones none does.
    let done = store.compact().await.expect("the store goes on");
    store.quiet().await;
    assert_eq!(store.uncleanable(), 2 - done, "{what}");
    assert_eq!(left_of_compaction(&data), Vec::<PathBuf>::new(), "{what}");
    assert_eq!(all_of(&large).await, before[1], "{what}");
    append(&plain, keyed(&["k"], 1000)).await.expect("there is room for that");
    std::fs::remove_file(dir.join("filler")).expect("it is ours");

    // None at all.
    fill(dir, 0);
    for _ in 0..3 {
        assert_eq!(store.compact().await.expect("the store goes on"), 0, "{what}");
    }
    assert!(store.uncleanable() >= 1, "{what}");
    assert_eq!(left_of_compaction(&data), Vec::<PathBuf>::new(), "{what}");
    let refused = append(&plain, keyed(&["k"], 300_000)).await.expect_err("there is no room");
    assert!(refused.is_no_room(), "{what}: {refused}");
    let own = options().topic_defaults.with([("retention.bytes", "1")]).expect("a key of Kafka's");
    let refused = store.configure_topic("plain", own).await.expect_err("the catalog needs room for its own");
    assert!(refused.is_no_room(), "{what}: {refused}");
    let catalog = std::fs::metadata(data.join("catalog.redb")).expect("it is there");
    assert!(catalog.blocks() * 512 >= catalog.len(), "{what}: what is vital finds room in it: {catalog:?}");
    assert_eq!(all_of(&large).await, before[1], "{what}: all is served");
    assert_eq!(all_of(&plain).await[..3], before[2], "{what}: all is served");
    // Its time has not come; when it has, there is still no room; and it rests longer.
    ahead.fetch_add(61, Ordering::SeqCst);
    assert_eq!(store.compact().await.expect("the store goes on"), 0, "{what}");
    // Records go even so, and give room.
    assert_eq!(plain.delete_records_before(2).await.expect("records can be deleted"), 2, "{what}");
    store.quiet().await;

    std::fs::remove_file(dir.join("filler")).expect("it is ours");
    append(&plain, keyed(&["k"], 300_000)).await.expect("there is room again");
    assert_eq!(store.compact().await.expect("the store goes on"), 0, "{what}: it rests still");
    ahead.fetch_add(32 * 60 + 1, Ordering::SeqCst);
    assert!(store.compact().await.expect("the store goes on") >= 1, "{what}");
    assert_eq!(store.uncleanable(), 0, "{what}: it is tried again, and works");
    store.quiet().await;
    assert_ne!(all_of(&large).await, before[1], "{what}: it was compacted");
    let after = [all_of(&many).await, all_of(&large).await, all_of(&plain).await];
    store.close().await.expect("it is closed in order");
    // The directory is locked as long as anything of the store is held.
    drop((many, large, plain, store));
    assert_eq!(faults(&data).await, Vec::<String>::new(), "{what}");

    let runtime = Arc::new(TokioRuntime::current());
    let store = Store::open(Home::Directory(data), options(), runtime).await.expect("a store");
    for (name, after) in ["many", "large", "plain"].into_iter().zip(after) {
        let topic = store.topic(name).expect("it is there");
        assert_eq!(all_of(&topic.partitions()[0]).await, after, "{what}: {name}");
    }
    store.close().await.expect("it is closed in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_waits_for_room_and_serving_goes_on() {
    if left_out("a full file system (needs root)") {
        return;
    }
    let sandbox = Sandbox::new();
    let memory = Mount::of(Path::new("none"), &sandbox.join("memory"), "-t tmpfs -o size=96M");
    live_on(memory.dir(), "tmpfs").await;
    memory.unmount();

    let image = sandbox.join("disk.img");
    File::create_new(&image).and_then(|file| file.set_len(128 << 20)).expect("the image is sparse");
    let disk = Loop::attach(&image);
    // Nothing is kept back for root, who runs this.
    succeed(sandbox.command("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(disk.device()));
    let mount = Mount::of(disk.device(), &sandbox.join("disk"), "");
    live_on(mount.dir(), "ext4").await;
    mount.unmount();
    disk.detach();
}

/// The process: it says so once, counts it, answers, and ends in order.
#[test]
fn a_broker_says_once_that_there_is_no_room() {
    if left_out("a full file system (needs root)") {
        return;
    }
    let sandbox = Sandbox::new();
    let memory = Mount::of(Path::new("none"), &sandbox.join("memory"), "-t tmpfs -o size=32M");
    let data = memory.dir().join("data");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let runtime = Arc::new(TokioRuntime::current());
        let store = Store::open(Home::Directory(data.clone()), options(), runtime).await.expect("a store");
        let log = topic(&store, "t", "compact").await;
        for _ in 0..20 {
            append(&log, keyed(&["again"], 900_000)).await.expect("there is room");
        }
        store.close().await.expect("it is closed in order");
    });
    fill(memory.dir(), 0);
    let mut server = serve(&sandbox, &data, &["log.cleaner.backoff.ms=20"]);
    let told = |server: &Server| server.stderr().matches("is not compacted until there is room").count();
    eventually("the broker to say it", Duration::from_secs(20), || (told(&server) > 0).then_some(()));
    let address = server.stderr();
    let address = address.split("http://").nth(1).and_then(|rest| rest.split_whitespace().next());
    let address = address.expect("it says where its pages are").to_owned();
    let page = |path: &str| {
        use std::io::Read;
        let mut stream = std::net::TcpStream::connect(&address).expect("a connection");
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    // Fifty times its interval.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(told(&server), 1, "{}", server.stderr());
    let metrics = page("/metrics");
    assert!(metrics.contains("uncleanable_partitions 1"), "{metrics}");
    assert!(server.is_running());
    let ended = server.terminate();
    assert_eq!(ended.code(), 0, "{}", ended.stderr);
    assert!(!ended.stderr.contains("ERROR"), "{}", ended.stderr);
    memory.unmount();
}

/// One line of `strace -f -y`, if it begins a call on a file of the partition or on the catalog: what is done, to what.
fn step(line: &str, dir: &str) -> Option<String> {
    let (_, call) = line.split_once(' ')?;
    let (name, arguments) = call.trim_start().split_once('(')?;
    let short = |path: &str| {
        let name = path.strip_prefix(dir)?.strip_prefix('/')?;
        // The offsets and the turn are the same in all of them.
        let words =
            name.split('.').filter(|word| word.is_empty() || !word.bytes().all(|b| b.is_ascii_digit()));
        let of_first = name.starts_with("00000000000000000000.");
        Some(format!("{}{}", if of_first { "" } else { "later " }, words.collect::<Vec<_>>().join(".")))
    };
    let open = || arguments.split_once('<')?.1.split_once('>').map(|(path, _)| path);
    let quoted = |nth: usize| arguments.split('"').nth(nth);
    match name {
        "fsync" | "fdatasync" if open()? == dir => Some("sync the directory".to_owned()),
        "fsync" | "fdatasync" if open()?.ends_with("/catalog.redb") => Some("sync the catalog".to_owned()),
        "fsync" | "fdatasync" => Some(format!("sync {}", short(open()?)?)),
        "rename" => Some(format!("rename {} to {}", short(quoted(1)?)?, short(quoted(3)?)?)),
        "unlink" => Some(format!("remove {}", short(quoted(1)?)?)),
        _ => None,
    }
}

/// A directory with a log of some closed segments that will be compacted into one; all that is in it.
fn prefilled(data: &Path) -> Vec<(i64, u32)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let runtime = Arc::new(TokioRuntime::current());
        let store = Store::open(Home::Directory(data.to_owned()), options(), runtime).await.expect("a store");
        let sized = |bytes| {
            let own = [("cleanup.policy", "compact"), ("segment.bytes", bytes)];
            options().topic_defaults.with(own).expect("keys of Kafka's")
        };
        let made = store.create_topic("t", 1, sized("20000")).await.expect("a topic");
        let log = &made.partitions()[0];
        for at in 0..10 {
            append(log, keyed(&["again", &format!("k{at}")], 4000)).await.expect("there is room");
        }
        store.configure_topic("t", sized("100000000")).await.expect("a key of Kafka's");
        let all = all_of(log).await;
        store.close().await.expect("it is closed in order");
        all
    })
}

fn logs(data: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(data.join("t-0")).expect("it can be listed");
    let paths = entries.map(|entry| entry.expect("it can be listed").path());
    let mut found: Vec<_> = paths.filter(|path| path.extension().is_some_and(|kind| kind == "log")).collect();
    found.sort();
    found
}

/// A broker on a directory, with its pages, on whatever ports are free.
fn serve(sandbox: &Sandbox, data: &Path, settings: &[&str]) -> Server {
    let mut command = sandbox.broker();
    command.args(["serve", "--listen", "127.0.0.1:0", "--advertise", "127.0.0.1:9092"]);
    command.args(["--admin", "127.0.0.1:0", "--data-dir"]).arg(data);
    for setting in settings {
        command.args(["--set", setting]);
    }
    Server::start(&mut command)
}

/// A broker that will compact in a moment, and strace at work on it before that.
fn traced(sandbox: &Sandbox, data: &Path, arguments: &[&str]) -> (Server, Server) {
    let before = logs(data).len();
    assert!(before > 3, "{before} segments");
    let settings = ["log.cleaner.backoff.ms=2000", "log.cleaner.min.cleanable.ratio=0.01"];
    let server = serve(sandbox, data, &settings);
    let mut strace = sandbox.command("strace");
    strace.args(["-f", "-y", "-s", "4096"]).args(arguments).args(["-p", &server.pid().to_string()]);
    let strace = Server::spawn(&mut strace);
    eventually("strace to attach", PATIENCE, || strace.stderr().contains("attached").then_some(()));
    assert_eq!(logs(data).len(), before, "strace is there before compaction begins");
    (server, strace)
}

#[test]
fn files_are_synced_renamed_and_removed_in_the_order_that_is_tested() {
    let sandbox = Sandbox::new();
    let (data, trace) = (sandbox.join("data"), sandbox.join("trace"));
    prefilled(&data);
    let before = logs(&data).len();
    let output = trace.display().to_string();
    let (server, mut strace) =
        traced(&sandbox, &data, &["-e", "trace=rename,unlink,fsync,fdatasync", "-o", &output]);
    eventually("compaction", PATIENCE, || (logs(&data).len() == 2).then_some(()));
    server.stop();
    strace.wait();

    let dir = data.join("t-0").display().to_string();
    let told = std::fs::read_to_string(&trace).expect("strace wrote it");
    let mut steps: Vec<String> = told.lines().filter_map(|line| step(line, &dir)).collect();
    steps.dedup();
    let from = steps.iter().position(|step| step == "sync log.cleaned").unwrap_or_else(|| panic!("{told}"));
    let mut expected: Vec<String> = [
        "sync log.cleaned",
        "sync index.swap",
        "sync timeindex.swap",
        "rename log.cleaned to log.swap",
        "sync the directory",
        "sync the catalog",
        "rename log.swap to log",
        "sync the directory",
        "rename index.swap to index",
        "rename timeindex.swap to timeindex",
    ]
    .map(str::to_owned)
    .to_vec();
    // The first segment is there still, the last one is left alone.
    for _ in 0..before - 2 {
        expected.extend(["index", "log", "timeindex"].map(|kind| format!("remove later {kind}")));
    }
    expected.push("sync the directory".to_owned());
    let found = &steps[from..steps.len().min(from + expected.len())];
    assert_eq!(found, expected, "{told}");
}

/// Kills a broker that compacts as it is about to rename or remove `victim`; says whether the log is as it was.
fn killed_at(sandbox: &Sandbox, prototype: &Path, all: &[(i64, u32)], victim: &str) -> bool {
    let data = sandbox.join(format!("data-{victim}"));
    succeed(sandbox.command("cp").arg("-r").arg(prototype).arg(&data));
    let path = data.join("t-0").join(victim).display().to_string();
    let calls = ["-P", &path, "-e", "trace=rename,unlink", "-e", "inject=rename,unlink:signal=KILL"];
    let (mut server, mut strace) = traced(sandbox, &data, &calls);
    eventually("the kill", PATIENCE, || (!server.is_running()).then_some(()));
    strace.wait();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let after = runtime.block_on(async {
        assert_eq!(faults(&data).await, Vec::<String>::new(), "{victim}: before the next start");
        let runtime = Arc::new(TokioRuntime::current());
        let home = Home::Directory(data.clone());
        let store = Store::open(home, options(), runtime).await.expect("a store");
        let found = all_of(&store.topic("t").expect("it is there").partitions()[0]).await;
        store.close().await.expect("it is closed in order");
        drop(store);
        assert_eq!(faults(&data).await, Vec::<String>::new(), "{victim}");
        found
    });
    assert_eq!(left_of_compaction(&data), Vec::<PathBuf>::new(), "{victim}");
    // It is as it was, or as it was to be.
    let (segments, is_whole) = (logs(&data).len(), after == all);
    assert_eq!(segments == logs(prototype).len(), is_whole, "{victim}: {segments} segments");
    assert!(is_whole || segments == 2, "{victim}: {segments} segments");
    for log in logs(&data) {
        for kind in ["index", "timeindex"] {
            assert!(log.with_extension(kind).exists(), "{victim}: no {kind} of {}", log.display());
        }
    }
    is_whole
}

/// Killed as it is about to rename or remove a file, for each kind of file. All at the same time: each waits for its compaction.
#[test]
fn a_kill_at_each_step_costs_nothing() {
    let sandbox = Sandbox::new();
    let prototype = sandbox.join("prototype");
    let all = prefilled(&prototype);
    let names: Vec<String> = logs(&prototype)
        .iter()
        .map(|log| log.file_name().expect("a file").to_string_lossy().into_owned())
        .collect();
    let end = names.last().and_then(|name| name.strip_suffix(".log")).expect("the one that is left alone");
    // By the name it has before: of a renaming, strace matches that one alone.
    let beside = |kind: &str| format!("00000000000000000000.{kind}.{end}.1.swap");
    let victims = [
        "00000000000000000000.log.1.cleaned".to_owned(),
        beside("log"),
        beside("index"),
        beside("timeindex"),
        names[2].clone(),
    ];
    let outcomes = std::thread::scope(|scope| {
        let (sandbox, prototype, all) = (&sandbox, &prototype, &all);
        let killed = |victim| scope.spawn(move || killed_at(sandbox, prototype, all, victim));
        let running: Vec<_> = victims.iter().map(|victim| killed(victim.as_str())).collect();
        running.into_iter().map(|one| one.join().expect("it says what is wrong")).collect::<Vec<_>>()
    });
    assert_eq!(outcomes, [true, false, false, false, false], "only the first comes before the decision");
}
