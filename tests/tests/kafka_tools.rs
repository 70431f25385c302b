//! Apache Kafka's own tools on our logs, and ours beside them: kafka-dump-log reads segments, indexes and snapshots, from
//! a directory that the broker kept and from an export of a volume, verifies indexes against their logs, and says of
//! every batch, record and aborted transaction what `broker log dump` says. And Kafka itself opens an export, serves it and
//! goes on with it.

use logstore::Outcome;
use logstore::inspect::sidecars;
use raid::device::Durability;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use tests::broker::{Running, Under, batch, batch_of};
use tests::clients::{Broker, Logs, acked_of, client, kafka_tool, orderly, text};
use tests::process::{Sandbox, refuse, succeed};
use uuid::Uuid;

/// Segments and indexes are small, so that there are many.
const SETTINGS: [&str; 2] = ["log.segment.bytes=300000", "log.index.interval.bytes=2000"];
const LINES: usize = 20_000;
/// librdkafka's codecs, and Java's, which frames snappy otherwise.
const CODECS: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];

/// A broker that has been given batches of every codec by two implementations, and was ended in order.
fn filled(sandbox: &Sandbox, logs: Logs) {
    let broker = Broker::start_on(sandbox, logs, &SETTINGS);
    text(&sandbox.join("text"), LINES);
    for codec in CODECS {
        let compression = format!("compression.type={codec}");
        let settings = [
            "plain-and-packed",
            "text",
            "acked",
            &compression,
            "enable.idempotence=true",
            "batch.size=16384",
        ];
        client(&mut broker.python(sandbox, "produce", "confluent", &settings));
        assert_eq!(acked_of(&sandbox.join("acked")).len(), LINES);
        let mut produce =
            broker.java(sandbox, "ConsoleProducer", &format!("--topic java --compression-codec {codec}"));
        let source = std::fs::File::open(sandbox.join("text")).expect("just written");
        client(produce.stdin(std::process::Stdio::from(source)));
    }
    let old = ["old", "text", "acked", "compression_type=gzip", "acks=1"];
    client(&mut broker.python(sandbox, "produce", "kafka-python", &old));
    orderly(broker.server);
}

/// The files of a partition with one of these endings, in order.
fn files(dir: &Path, endings: &[&str]) -> Vec<PathBuf> {
    let listed = std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut found: Vec<PathBuf> = listed
        .map(|entry| entry.expect("a directory can be read to its end").path())
        .filter(|path| endings.iter().any(|ending| path.extension().is_some_and(|found| found == *ending)))
        .collect();
    found.sort();
    found
}

/// What kafka-dump-log says of files, with further arguments; it must find nothing wrong.
fn kafka_says(sandbox: &Sandbox, files: &[PathBuf], arguments: &[&str]) -> String {
    let list = files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(",");
    let said = succeed(&mut kafka_tool(
        sandbox,
        "DumpLogSegments",
        &[&["--files", list.as_str()], arguments].concat(),
    ));
    let mut lines = said.lines().filter(|line| !line.starts_with('|'));
    let bad = lines.find(|line| {
        [
            "isvalid: false",
            "nvalid",
            "on-consecutive",
            "ismatch",
            "orrupt",
            "rror",
            "xception",
            "Out of order",
        ]
        .iter()
        .any(|word| line.contains(word))
            && !line.ends_with("isvalid: true")
    });
    assert_eq!(bad, None, "kafka-dump-log of {list}");
    said
}

/// What ours says.
fn we_say(sandbox: &Sandbox, files: &[PathBuf], arguments: &[&str]) -> String {
    let mut command = sandbox.broker();
    command.args(["log", "dump"]).args(files).args(arguments);
    succeed(&mut command)
}

fn lines<'a>(said: &'a str, start: &str) -> Vec<&'a str> {
    said.lines().filter(|line| line.starts_with(start)).collect()
}

/// Holds a directory in Kafka's layout against Kafka's tools.
fn kafka_reads(sandbox: &Sandbox, root: &Path) {
    for partition in ["plain-and-packed-0", "java-0", "old-0"] {
        let dir = root.join(partition);
        let (logs, indexes) = (files(&dir, &["log"]), files(&dir, &["index", "timeindex"]));
        assert!(logs.len() > 3 || partition == "old-0", "{partition} has only {} segments", logs.len());
        assert_eq!(indexes.len(), logs.len() * 2, "{partition}");

        // Every batch, its records unpacked: the same lines, checksums included.
        let kafkas = kafka_says(sandbox, &logs, &["--deep-iteration"]);
        let ours = we_say(sandbox, &logs, &[]);
        let batches = lines(&kafkas, "baseOffset:");
        assert!(batches.len() > 100 || partition != "java-0", "{partition}: {} batches", batches.len());
        assert_eq!(lines(&ours, "baseOffset:"), batches, "{partition}");
        let starts = lines(&ours, "Log starting offset:");
        assert_eq!(starts, lines(&kafkas, "Log starting offset:"), "{partition}");
        let codecs: BTreeSet<&str> = batches
            .iter()
            .filter_map(|line| line.split("compresscodec: ").nth(1)?.split_whitespace().next())
            .collect();
        // kafka-python leaves a batch alone that does not shrink, and how it cuts them is its own affair.
        let expected: BTreeSet<&str> = if partition == "old-0" { ["gzip"].into() } else { CODECS.into() };
        assert!(codecs.is_superset(&expected), "{partition}: {codecs:?}");

        // Every record of one segment, unpacked by both.
        let some = &logs[logs.len() / 2..=logs.len() / 2];
        let kafkas = kafka_says(sandbox, some, &["--print-data-log"]);
        let ours = we_say(sandbox, some, &["--records", "--json"]);
        let ours: serde_json::Value = serde_json::from_str(&ours).expect("one JSON document");
        let records: Vec<String> = ours[0]["entries"]
            .as_array()
            .expect("entries")
            .iter()
            .flat_map(|batch| batch["records"].as_array().expect("records"))
            .map(|record| {
                let number = |name: &str| record[name].as_i64().expect("a number");
                let value = record["value"].as_str().expect("a value");
                format!("{} {} {} {value}", number("offset"), number("timestamp"), number("sequence"))
            })
            .collect();
        let after = |line: &str, name: &str| {
            line.split(&format!("{name}: ")).nth(1).and_then(|rest| rest.split(' ').next()).map(str::to_owned)
        };
        let theirs: Vec<String> = lines(&kafkas, "| offset:")
            .into_iter()
            .map(|line| {
                let field = |name: &str| after(line, name).unwrap_or_else(|| panic!("no {name}: {line}"));
                let value = line.split_once(" payload: ").map_or("", |(_, value)| value);
                format!("{} {} {} {value}", field("offset"), field("CreateTime"), field("sequence"))
            })
            .collect();
        assert!(!theirs.is_empty());
        assert_eq!(records, theirs, "{partition}");

        // Indexes: against themselves, and against their logs.
        let sane = kafka_says(sandbox, &files(&dir, &["index"]), &["--index-sanity-check"]);
        assert_eq!(sane.matches("passed sanity check").count(), logs.len(), "{sane}");
        let times = kafka_says(sandbox, &files(&dir, &["timeindex"]), &["--index-sanity-check"]);
        assert_eq!(times.matches("passed sanity check").count(), logs.len(), "{times}");
        kafka_says(sandbox, &indexes, &["--verify-index-only"]);
        let kafkas = kafka_says(sandbox, &indexes, &[]);
        let ours = we_say(sandbox, &indexes, &[]);
        assert!(lines(&ours, "offset:").len() > logs.len(), "{partition}: indexes are empty");
        for start in ["offset:", "timestamp:"] {
            assert_eq!(lines(&ours, start), lines(&kafkas, start), "{partition}");
        }

        // Snapshots: the producers at the end of a segment.
        let snapshots = files(&dir, &["snapshot"]);
        assert!(!snapshots.is_empty(), "{partition} has no snapshot");
        let (kafkas, ours) = (kafka_says(sandbox, &snapshots, &[]), we_say(sandbox, &snapshots, &[]));
        let sorted = |said: &str| {
            let mut lines: Vec<String> = lines(said, "producerId:").into_iter().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&ours), sorted(&kafkas), "{partition}");
        assert!(partition == "old-0" || !sorted(&ours).is_empty(), "{partition} knows no producer");
        for name in ["leader-epoch-checkpoint", "partition.metadata"] {
            assert!(dir.join(name).exists(), "{partition}/{name}");
        }
    }
}

/// The offset checkpoints beside the partitions, each with Kafka's rows.
fn checkpoints_are_there(sandbox: &Sandbox, root: &Path) {
    for name in ["recovery-point-offset-checkpoint", "replication-offset-checkpoint"] {
        let told = std::fs::read_to_string(root.join(name)).expect("a checkpoint");
        assert!(told.starts_with("0\n3\njava 0 ") && told.contains("\nold 0 "), "{name}: {told}");
        let dumped = we_say(sandbox, &[root.join(name)], &[]);
        assert_eq!(lines(&dumped, "topic: ").len(), 3, "{name}: {dumped}");
    }
    for name in ["log-start-offset-checkpoint", "cleaner-offset-checkpoint"] {
        let told = std::fs::read_to_string(root.join(name)).expect("a checkpoint");
        assert_eq!(told, "0\n0\n", "{name}");
        we_say(sandbox, &[root.join(name)], &[]);
    }
}

#[test]
fn kafkas_tools_read_a_directory_of_ours() {
    let sandbox = Sandbox::new();
    let logs = sandbox.join("logs");
    filled(&sandbox, Logs::Directory(logs.clone()));
    kafka_reads(&sandbox, &logs);
    checkpoints_are_there(&sandbox, &logs);
    let verify = |sandbox: &Sandbox| {
        let mut command = sandbox.broker();
        command.args(["log", "verify", "--data-dir"]).arg(&logs);
        command
    };
    let said = succeed(&mut verify(&sandbox));
    assert!(said.ends_with("all sound\n"), "{said}");

    // One bit: the report names the place, and the dump shows all that is sound.
    let file = files(&logs.join("java-0"), &["log"])[1].clone();
    let mut bytes = std::fs::read(&file).expect("a segment");
    bytes[5000] ^= 4;
    std::fs::write(&file, bytes).expect("the sandbox can be written");
    let ended = tests::process::run(&mut verify(&sandbox));
    assert_eq!(ended.code(), 1);
    let faults = lines(&ended.stdout, "fault: java-0: segment ");
    assert_eq!(faults.len(), 1, "{}", ended.stdout);
    assert!(faults[0].contains("checksum"), "{}", ended.stdout);
    assert!(ended.stderr.contains("1 fault found"), "{}", ended.stderr);
    let dumped = we_say(&sandbox, &[file], &[]);
    assert_eq!(dumped.matches("isvalid: false").count(), 1, "{dumped}");
    assert!(dumped.matches("isvalid: true").count() > 3, "{dumped}");
}

#[test]
fn kafkas_tools_read_an_export_of_a_volume() {
    let sandbox = Sandbox::new();
    let members = sandbox.images(4);
    filled(&sandbox, Logs::Volume(members.clone(), "1G"));
    let log = |arguments: &[&str]| {
        let mut command = sandbox.broker();
        command.arg("log").args(arguments).arg("--volume").args(&members);
        command
    };
    let before: Vec<_> = members.iter().map(|path| tests::process::bytes_of(path)).collect();
    let said = succeed(&mut log(&["verify"]));
    assert!(said.ends_with("all sound\n"), "{said}");
    let out = sandbox.join("out");
    succeed(&mut log(&["export", "--to", "out"]));
    kafka_reads(&sandbox, &out);
    let dumped = succeed(&mut log(&["dump", "--topic", "java"]));
    let exported = we_say(&sandbox, &files(&out.join("java-0"), &["log"]), &[]);
    assert_eq!(lines(&dumped, "baseOffset:"), lines(&exported, "baseOffset:"));
    checkpoints_are_there(&sandbox, &out);
    assert!(out.join("meta.properties").exists());

    // Again only if somebody says so; and what does not exist is not exported.
    refuse(&mut log(&["export", "--to", "out"]), 1);
    succeed(&mut log(&["export", "--to", "out", "--topic", "old", "--force"]));
    let said = refuse(&mut log(&["dump", "--topic", "absent"]), 1);
    assert!(said.contains("there is no topic absent here") && said.contains("java-0"), "{said}");
    // Nothing was written to the members.
    for (path, before) in members.iter().zip(&before) {
        assert!(tests::process::bytes_of(path) == *before, "{} was changed", path.display());
    }

    // Nor is a volume looked at that somebody serves.
    let broker = Broker::start_on(&sandbox, Logs::Volume(members.clone(), "1G"), &SETTINGS);
    let said = refuse(&mut log(&["verify"]), 1);
    assert!(said.contains("in use by another process"), "{said}");
    orderly(broker.server);
}

/// A batch of one record in a transaction.
fn transactional(producer: i64, sequence: i32, value: &str) -> bytes::Bytes {
    let mut bytes = batch_of(&[value.as_bytes()], now(), producer, 0, sequence).to_vec();
    bytes[22] |= 0x10;
    let crc = crc32c::crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes.into()
}

fn now() -> i64 {
    std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_millis() as i64
}

/// A log with transactions that were committed, aborted and left open, over several segments, whose broker was ended in
/// order; and the values in it, in order, with whether a reader of committed records sees them.
async fn with_transactions(under: Under) -> (Arc<TempDir>, Vec<(String, bool)>) {
    let broker = Running::start(under, &[]).await;
    let store = &broker.broker.store;
    let config = store.topic_defaults().with([("segment.bytes", "16384")]).expect("a valid setting");
    let topic = store.create_topic("t", 1, config).await.expect("a topic");
    let log = &topic.partitions()[0];
    let mut values = Vec::new();
    for round in 0..60 {
        let (quick, slow) = (1000 + round % 3, 2000);
        let (aborts, slow_aborts) = (round % 4 == 0, round / 10 % 2 == 0);
        let committed = |is_aborted: bool, is_open: bool| !is_aborted && !is_open;
        let mut append = async |bytes: bytes::Bytes, value: String, is_seen: bool| {
            log.append(bytes, Durability::Cached).await.expect("appended");
            values.push((value, is_seen));
        };
        let value = |who: i64| format!("{who} in round {round}: {}", "=".repeat(300));
        let own = value(quick);
        append(transactional(quick, (round / 3) as i32, &own), own, committed(aborts, false)).await;
        let own = value(slow);
        append(transactional(slow, round as i32, &own), own, committed(slow_aborts, false)).await;
        let own = value(0);
        append(batch(&[own.as_bytes()], now()), own, true).await;
        let end = |is_aborted: bool| if is_aborted { Outcome::Abort } else { Outcome::Commit };
        let mark = async |producer: i64, outcome: Outcome| {
            log.append_marker(producer, 0, 7, outcome, Durability::Cached).await.expect("appended");
        };
        mark(quick, end(aborts)).await;
        if round % 10 == 9 {
            mark(slow, end(slow_aborts)).await;
        }
    }
    let own = "never ended".to_owned();
    log.append(transactional(3000, 0, &own), Durability::Stable).await.expect("appended");
    values.push((own, false));
    let (place, _) = broker.stop().await;
    (place, values)
}

/// Holds a log with transactions against Kafka's tools, line for line.
fn kafka_reads_transactions(sandbox: &Sandbox, dir: &Path, values: &[(String, bool)]) {
    let (logs, indexes, snapshots) =
        (files(dir, &["log"]), files(dir, &["txnindex"]), files(dir, &["snapshot"]));
    assert!(logs.len() > 3 && indexes.len() > 3, "{} segments, {} with an index", logs.len(), indexes.len());
    // Aborted transactions.
    let (kafkas, ours) = (kafka_says(sandbox, &indexes, &[]), we_say(sandbox, &indexes, &[]));
    let listed = lines(&kafkas, "version:");
    assert_eq!(lines(&ours, "version:"), listed);
    assert_eq!(listed.len(), 15 + 3, "{kafkas}");
    // Batches, records and markers; what stands in the last column is only ours to escape.
    let kafkas = kafka_says(sandbox, &logs, &["--deep-iteration", "--print-data-log"]);
    let ours = we_say(sandbox, &logs, &["--records"]);
    let of = |said: &str| -> Vec<String> {
        let wanted = |line: &&str| line.starts_with("baseOffset:") || line.starts_with("| ");
        said.lines().filter(wanted).map(str::to_owned).collect()
    };
    let (kafkas, ours) = (of(&kafkas), of(&ours));
    for (ours, kafkas) in ours.iter().zip(&kafkas) {
        assert_eq!(ours, kafkas);
    }
    assert_eq!(ours.len(), kafkas.len());
    let payloads = kafkas.iter().filter_map(|line| Some(line.split_once(" payload: ")?.1));
    assert!(payloads.eq(values.iter().map(|(value, _)| value.as_str())));
    let markers = kafkas.iter().filter(|line| line.contains(" endTxnMarker: "));
    assert_eq!(markers.filter(|line| line.ends_with(" coordinatorEpoch: 7")).count(), 60 + 6);
    // Producers, one of whom has a transaction open.
    let (kafkas, ours) = (kafka_says(sandbox, &snapshots, &[]), we_say(sandbox, &snapshots, &[]));
    let sorted = |said: &str| {
        let mut lines: Vec<String> = lines(said, "producerId:").into_iter().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&ours), sorted(&kafkas));
    let is_open = |line: &&String| line.starts_with("producerId: 3000 ") && line.contains("OptionalLong[");
    assert_eq!(sorted(&kafkas).iter().filter(is_open).count(), 1, "{kafkas}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kafkas_tools_read_transactions_as_ours_do() {
    let sandbox = Sandbox::new();
    let (place, values) = with_transactions(Under::Directory).await;
    kafka_reads_transactions(&sandbox, &place.path().join("log/t-0"), &values);
    let (place, values) = with_transactions(Under::Volume).await;
    let mut export = sandbox.broker();
    succeed(export.args(["log", "export", "--to", "out", "--volume"]).args(Running::images(place.path())));
    kafka_reads_transactions(&sandbox, &sandbox.join("out/t-0"), &values);
    let mut verify = sandbox.broker();
    let said = succeed(verify.args(["log", "verify", "--data-dir", "out"]));
    assert!(said.ends_with("all sound\n"), "{said}");
}

/// What `KRaft`'s metadata log says of a topic of one partition, led by node 1 from an epoch on: the values of a `TopicRecord`
/// and a `PartitionRecord`, each with its frame (version 1, kind, version of the kind).
fn kraft_topic(name: &str, id: Uuid, epoch: i32) -> [Vec<u8>; 2] {
    let (node, nobody, no_tags) = (1i32.to_be_bytes(), [1u8], [0u8]);
    let length = [u8::try_from(name.len() + 1).expect("a short name")];
    let topic = [&[1, 2, 0][..], &length, name.as_bytes(), id.as_bytes(), &no_tags].concat();
    let one = [&[2][..], &node].concat();
    // Its directory is not assigned yet: that is the id of all zeroes.
    let directories = [&[2][..], &[0; 16]].concat();
    let head = [&[1, 3, 1][..], &0i32.to_be_bytes(), id.as_bytes()].concat();
    let replicas = [&one[..], &one, &nobody, &nobody].concat();
    let leader = [node, epoch.to_be_bytes(), 0i32.to_be_bytes()].concat();
    [topic, [head, replicas, leader, directories, no_tags.to_vec()].concat()]
}

/// The records of `t` as kcat reads them, by lines.
fn read_by_kcat(sandbox: &Sandbox, broker: &Broker, isolation: &str) -> Vec<String> {
    let isolation = format!("-X isolation.level={isolation}");
    let arguments = format!("-C -t t -p 0 -o beginning -e -q {isolation}");
    client(&mut broker.kcat(sandbox, &arguments)).lines().map(str::to_owned).collect()
}

/// Of what stands in an export, only the topics must be told to Kafka: it keeps them in a metadata log of its own, which no
/// log directory has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kafka_itself_serves_an_export_and_goes_on_with_it() {
    let sandbox = Sandbox::new();
    let (place, mut values) = with_transactions(Under::Volume).await;
    let mut export = sandbox.broker();
    succeed(export.args(["log", "export", "--to", "out", "--volume"]).args(Running::images(place.path())));
    let out = sandbox.join("out");
    let text = |path: &str| std::fs::read_to_string(out.join(path)).expect("the export has it");
    let properties = text("meta.properties");
    let cluster = properties.lines().find_map(|line| line.strip_prefix("cluster.id=")).expect("a cluster");
    let id = sidecars::topic_id(&text("t-0/partition.metadata")).expect("a topic's id");
    let epochs = sidecars::epochs(&text("t-0/leader-epoch-checkpoint")).expect("epochs");
    let (epoch, _) = *epochs.last().expect("the log has records");
    let records = kraft_topic("t", id, epoch + 1);
    let topics = batch(&[&records[0], &records[1]], now());

    let kafka = Broker::kafka_on(&sandbox, &out, cluster, &topics);
    let all: Vec<String> = values.iter().map(|(value, _)| value.clone()).collect();
    assert_eq!(read_by_kcat(&sandbox, &kafka, "read_uncommitted"), all);
    let committed = |values: &[(String, bool)]| -> Vec<String> {
        values.iter().filter(|(_, is_seen)| *is_seen).map(|(value, _)| value.clone()).collect()
    };
    assert_eq!(read_by_kcat(&sandbox, &kafka, "read_committed"), committed(&values));
    // It goes on where the log ends.
    std::fs::write(sandbox.join("more"), "more\n").expect("the sandbox can be written");
    client(&mut kafka.kcat(&sandbox, "-P -t t -p 0 -l more"));
    values.push(("more".to_owned(), true));
    let all: Vec<String> = values.iter().map(|(value, _)| value.clone()).collect();
    assert_eq!(read_by_kcat(&sandbox, &kafka, "read_uncommitted"), all);
    drop(kafka.server.terminate());
    // What it left is Kafka's own, and sound to us.
    let mut verify = sandbox.broker();
    let said = succeed(verify.args(["log", "verify", "--data-dir", "out"]));
    assert!(said.ends_with("all sound\n"), "{said}");
}
