//! Apache Kafka's own tools on our logs, and ours beside them: kafka-dump-log reads segments, indexes and snapshots, from
//! a directory that the broker kept and from an export of a volume, verifies indexes against their logs, and says of
//! every batch what `broker log dump` says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tests::clients::{Broker, Logs, acked_of, client, kafka_tool, orderly, text};
use tests::process::{Sandbox, refuse, succeed};

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

#[test]
fn kafkas_tools_read_a_directory_of_ours() {
    let sandbox = Sandbox::new();
    let logs = sandbox.join("logs");
    filled(&sandbox, Logs::Directory(logs.clone()));
    kafka_reads(&sandbox, &logs);
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
    let rows = std::fs::read_to_string(out.join("recovery-point-offset-checkpoint")).expect("a checkpoint");
    assert!(rows.starts_with("0\n3\n") && rows.contains("old 0 "), "{rows}");
    assert!(out.join("log-start-offset-checkpoint").exists() && out.join("meta.properties").exists());

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
