//! File systems on an attached volume under load, while a member fails and is rebuilt, and another one is replaced: a
//! database and fio on ext4 and on xfs, and Apache Kafka itself on ext4. Nobody who uses the file system notices; all
//! that was acknowledged is there, and the file system is clean.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::attach::Attached;
use tests::clients::{Broker, kafka_tool};
use tests::process::{Sandbox, Server, left_out, run, succeed};
use tests::volumes::{Served, create};

const PATIENCE: Duration = Duration::from_secs(120);

/// Commits a row a transaction, each on stable storage before its number is printed, until the file `STOP` is there.
const DATABASE: &str = r#"
import hashlib, os, sqlite3, sys
path, stop = sys.argv[1:]
db = sqlite3.connect(path)
db.execute("PRAGMA journal_mode=WAL")
db.execute("PRAGMA synchronous=FULL")
db.execute("CREATE TABLE rows (n INTEGER PRIMARY KEY, body BLOB, sum TEXT)")
n = 0
while not os.path.exists(stop):
    body = os.urandom(3000)
    with db:
        db.execute("INSERT INTO rows VALUES (?, ?, ?)", (n, body, hashlib.sha256(body).hexdigest()))
        if n % 3 == 2:
            db.execute("UPDATE rows SET body = ?, sum = ? WHERE n = ?", (body, hashlib.sha256(body).hexdigest(), n // 2))
    print(n, flush=True)
    n += 1
"#;

/// Checks such a database: it is sound, and holds just the rows 0 to N-1, each as its sum says.
const CHECK: &str = r#"
import hashlib, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
rows = db.execute("SELECT n, body, sum FROM rows ORDER BY n").fetchall()
assert [row[0] for row in rows] == list(range(int(sys.argv[2]))), len(rows)
assert all(hashlib.sha256(body).hexdigest() == sum for _, body, sum in rows)
"#;

/// A file system on an attached volume of four members.
struct Rig {
    // Dropped in this order.
    attached: Attached,
    served: Served,
    images: Vec<PathBuf>,
    dir: PathBuf,
}

impl Rig {
    fn new(sandbox: &Sandbox, size: &str, mkfs: &[&str]) -> Self {
        let images = sandbox.images(4);
        create(sandbox, &images, &format!("--size {size} --chunk 64K --name vol"));
        let served = Served::start(sandbox, &images, "--direct");
        let bare = Attached::new(sandbox, "vol", &[]);
        succeed(sandbox.command(mkfs[0]).args(&mkfs[1..]).arg(bare.device()));
        assert_eq!(bare.detach(), "");
        let dir = sandbox.join("mnt");
        let attached = Attached::mounted(sandbox, "vol", &dir);
        Self { attached, served, images, dir }
    }

    /// The image of one member is deleted and it fails, another takes its place; then one that works is replaced.
    /// After each step the volume is whole again.
    fn lose_and_replace(&self, sandbox: &Sandbox) {
        let raid10 = |words: &[&str]| succeed(sandbox.raid10().args(words));
        let blank = |name: &str| {
            let path = sandbox.join(name);
            let file = std::fs::File::create_new(&path).expect("the sandbox can be written");
            file.set_len(self.images[0].metadata().expect("it is there").len()).expect("the image is sparse");
            path.to_str().expect("UTF-8").to_owned()
        };
        std::fs::remove_file(&self.images[1]).expect("the image is there");
        raid10(&["fail", "vol", "1"]);
        assert_eq!(status(sandbox)["state"], "degraded");
        raid10(&["add", "vol", &blank("new1.img")]);
        raid10(&["wait", "vol"]);
        assert_eq!(states(sandbox), ["in_sync"; 4]);
        raid10(&["replace", "vol", "2", &blank("new2.img")]);
        raid10(&["wait", "vol"]);
        assert_eq!(states(sandbox), ["in_sync"; 4]);
        let members = status(sandbox)["members"].to_string();
        assert!(members.contains("new1.img") && members.contains("new2.img"), "{members}");
    }

    /// Unmounts, checks the file system and the copies, and stops.
    fn end(self, sandbox: &Sandbox, fsck: &[&str]) {
        assert_eq!(self.attached.detach(), "");
        let bare = Attached::new(sandbox, "vol", &[]);
        let checked = run(sandbox.command(fsck[0]).args(&fsck[1..]).arg(bare.device()));
        assert!(checked.status.success(), "{fsck:?}: {}{}", checked.stdout, checked.stderr);
        assert_eq!(bare.detach(), "");
        succeed(sandbox.raid10().args(["scrub", "vol", "--wait"]));
        assert_eq!(status(sandbox)["mismatches"], 0);
        self.served.stop();
    }
}

fn status(sandbox: &Sandbox) -> Value {
    let told = succeed(sandbox.raid10().args(["status", "vol", "--json"]));
    serde_json::from_str(&told).expect("one JSON document")
}

/// The states of the members that have a slot.
fn states(sandbox: &Sandbox) -> Vec<String> {
    let status = status(sandbox);
    let members = status["members"].as_array().expect("members");
    let slots = members.iter().filter(|member| !member["slot"].is_null());
    slots.map(|member| member["state"].as_str().expect("a state").to_owned()).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Waits for `n` more lines of a process; gives the last one.
fn lines(server: &Server, n: usize) -> String {
    let mut last = String::new();
    for _ in 0..n {
        last = server.line(PATIENCE).unwrap_or_else(|| panic!("no more lines: {}", server.stderr()));
    }
    last
}

fn database_and_fio(mkfs: &[&str], fsck: &[&str]) {
    if left_out("file systems under load on an attached volume (needs root)") {
        return;
    }
    let sandbox = Sandbox::new();
    let rig = Rig::new(&sandbox, "192M", mkfs);
    let (rows, stop) = (rig.dir.join("rows.db"), sandbox.join("stop"));
    let mut python = sandbox.command("/usr/bin/python3");
    let mut database = Server::spawn(python.args(["-c", DATABASE, text(&rows), text(&stop)]));
    lines(&database, 20);
    let fio = format!(
        "--name=load --directory={} --size=48M --rw=randrw --bsrange=4k-128k --fsync=32 --ioengine=psync \
         --verify=crc32c --verify_fatal=1 --verify_backlog=256 --do_verify=1 --rate=12m,12m",
        text(&rig.dir)
    );
    let mut fio = Server::spawn(sandbox.command("fio").args(fio.split_whitespace()));
    rig.lose_and_replace(&sandbox);
    lines(&database, 50);
    std::fs::write(&stop, "").expect("the sandbox can be written");
    assert!(database.wait().success(), "the database: {}", database.stderr());
    assert!(fio.wait().success(), "fio: {}", fio.stderr());
    let mut last = String::new();
    while let Some(line) = database.line(PATIENCE) {
        last = line;
    }
    let committed = last.parse::<u64>().map_or_else(|_| panic!("the last row: {last}"), |last| last + 1);
    let check = |path: &Path| {
        succeed(Command::new("/usr/bin/python3").args(["-c", CHECK, text(path), &committed.to_string()]));
    };
    check(&rows);
    rig.end(&sandbox, fsck);
}

#[test]
fn a_database_and_fio_on_ext4_while_members_come_and_go() {
    database_and_fio(&["mkfs.ext4", "-q", "-F"], &["e2fsck", "-f", "-n"]);
}

#[test]
fn a_database_and_fio_on_xfs_while_members_come_and_go() {
    database_and_fio(&["mkfs.xfs", "-q", "-f"], &["xfs_repair", "-n"]);
}

/// The values that a verifiable client told of in lines of that name.
fn values(told: &[Value], name: &str) -> Vec<u64> {
    let named = told.iter().filter(|line| line["name"] == name);
    named.map(|line| line["value"].as_str().and_then(|v| v.parse().ok()).expect("a number as text")).collect()
}

/// What a verifiable client prints, one JSON document a line, until it ends.
fn told_to_the_end(client: &mut Server, told: &mut Vec<Value>) {
    while let Some(line) = client.line(PATIENCE) {
        told.push(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}")));
    }
    assert!(client.wait().success(), "{}", client.stderr());
}

#[test]
fn apache_kafka_on_ext4_while_members_come_and_go() {
    const RECORDS: u64 = 30_000;
    if left_out("Apache Kafka on an attached volume (needs root)") {
        return;
    }
    let sandbox = Sandbox::new();
    let rig = Rig::new(&sandbox, "512M", &["mkfs.ext4", "-q", "-F"]);
    let logs = rig.dir.join("logs");
    let settings = ["num.partitions=2", "log.flush.interval.messages=500", "log.segment.bytes=1048576"];
    let kafka = Broker::kafka(&sandbox, &logs, &settings);
    let topic = format!("--topic verified --max-messages {RECORDS}");
    let mut producer = Server::spawn(&mut kafka.java(
        &sandbox,
        "VerifiableProducer",
        &format!("{topic} --throughput 1500 --acks -1"),
    ));
    let mut consumer = Server::spawn(&mut kafka.java(
        &sandbox,
        "VerifiableConsumer",
        &format!("{topic} --group-id all --reset-policy earliest --verbose"),
    ));
    let mut sent_lines = Vec::new();
    let acknowledged = |sent_lines: &[Value]| values(sent_lines, "producer_send_success").len() as u64;
    while acknowledged(&sent_lines) < 1000 {
        sent_lines.push(serde_json::from_str(&lines(&producer, 1)).expect("a JSON document"));
    }
    rig.lose_and_replace(&sandbox);
    // What it has printed meanwhile, and no more: it must still be at work.
    while let Some(line) = producer.line(Duration::ZERO) {
        sent_lines.push(serde_json::from_str(&line).expect("a JSON document"));
    }
    let meanwhile = acknowledged(&sent_lines);
    assert!(meanwhile > 1000 && meanwhile < RECORDS, "{meanwhile} records were acknowledged meanwhile");

    told_to_the_end(&mut producer, &mut sent_lines);
    let mut got_lines = Vec::new();
    told_to_the_end(&mut consumer, &mut got_lines);
    let all: BTreeSet<u64> = (0..RECORDS).collect();
    let errors: Vec<_> = sent_lines.iter().filter(|line| line["name"] == "producer_send_error").collect();
    assert!(errors.is_empty(), "{errors:?}");
    let sent = values(&sent_lines, "producer_send_success");
    assert!(sent.len() == all.len() && BTreeSet::from_iter(sent) == all, "not every record was acknowledged");
    let got = values(&got_lines, "record_data");
    assert!(got.len() == all.len() && BTreeSet::from_iter(got) == all, "not every record came, each once");

    let ended = kafka.server.terminate();
    assert_eq!(ended.status.code(), Some(143), "Kafka: {}", ended.stderr);
    let segments = segments(&logs);
    let files = segments.iter().map(|path| text(path)).collect::<Vec<_>>().join(",");
    let dumped =
        succeed(&mut kafka_tool(&sandbox, "DumpLogSegments", &["--deep-iteration", "--files", &files]));
    let batches = dumped.lines().filter(|line| line.starts_with("baseOffset:")).collect::<Vec<_>>();
    let records: u64 = batches.iter().map(|batch| field(batch, "count")).sum();
    assert_eq!(records, RECORDS, "records in {files}");
    for bad in ["isvalid: false", "Found invalid", "Non-consecutive", "mismatch", "orrupt"] {
        assert!(!dumped.contains(bad), "kafka-dump-log says {bad}");
    }
    rig.end(&sandbox, &["e2fsck", "-f", "-n"]);
}

/// The segments of the topic's partitions.
fn segments(logs: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for partition in ["verified-0", "verified-1"] {
        let dir = logs.join(partition);
        for entry in std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.expect("a directory can be read to its end").path();
            found.extend(path.extension().is_some_and(|extension| extension == "log").then_some(path));
        }
    }
    found
}

/// The number behind `NAME: ` in a line.
fn field(line: &str, name: &str) -> u64 {
    let mut words = line.split_whitespace().skip_while(|word| *word != format!("{name}:"));
    let value = words.nth(1).and_then(|value| value.parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {line}"))
}

#[test]
fn the_workload_scripts_are_sound() {
    if left_out("the workloads of attached volumes") {
        return;
    }
    let sandbox = Sandbox::new();
    let (rows, stop) = (sandbox.join("rows.db"), sandbox.join("stop"));
    let mut database =
        Server::spawn(sandbox.command("/usr/bin/python3").args(["-c", DATABASE, text(&rows), text(&stop)]));
    lines(&database, 10);
    std::fs::write(&stop, "").expect("the sandbox can be written");
    assert!(database.wait().success());
    let more = std::iter::from_fn(|| database.line(PATIENCE)).last();
    let count = more.map_or(10, |last| last.parse::<u64>().expect("a number") + 1);
    // The check notices a row that is missing: it can fail.
    for (rows_expected, sound) in [(count, true), (count + 1, false)] {
        let mut check = sandbox.command("/usr/bin/python3");
        let ended = run(check.args(["-c", CHECK, text(&rows), &rows_expected.to_string()]));
        assert_eq!(ended.status.success(), sound, "{}", ended.stderr);
    }
}
