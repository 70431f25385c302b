//! The whole path with real input: a large text (Debian's package index, over a million lines) goes line by line
//! through the broker with kcat, in every codec, and comes back byte for byte; also after a restart, and whatever was
//! acknowledged after `kill -9`.

use std::path::Path;
use std::time::{Duration, Instant};
use tests::clients::{
    Broker, Logs, Record, acked_of, all_lines, client, lines_of, orderly, records_of, text,
};
use tests::process::{Sandbox, Server, bytes_of, left_out};

const CODECS: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];

/// Consumes a whole partition with kcat and compares it with the text.
fn read_back(sandbox: &Sandbox, broker: &Broker, topic: &str, expected: &[u8]) {
    let got = sandbox.join(format!("{topic}.out"));
    let mut command = broker.kcat(sandbox, &format!("-C -t {topic} -p 0 -o beginning -e -q"));
    // A client that waits a second whenever its queue of 100,000 records is full measures its own patience.
    command.args(["-X", "queued.min.messages=1000000"]);
    let script = format!("exec \"$@\" > '{}'", got.display());
    let mut to_file = sandbox.command("sh");
    to_file.args(["-c", &script, "sh"]).arg(command.get_program()).args(command.get_args());
    client(&mut to_file);
    same(&bytes_of(&got), expected, topic);
    std::fs::remove_file(&got).expect("it was just written");
}

/// Compares without printing fifty megabytes.
fn same(got: &[u8], expected: &[u8], what: &str) {
    let differ = got.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        differ.is_none() && got.len() == expected.len(),
        "{what}: {} bytes instead of {}, first difference at {differ:?}",
        got.len(),
        expected.len()
    );
}

#[test]
fn a_million_lines_in_every_codec_and_after_a_restart() {
    let sandbox = Sandbox::new();
    let source = sandbox.join("text");
    let lines = text(&source, all_lines());
    let expected = bytes_of(&source);
    let broker = Broker::start(&sandbox, &[]);
    for codec in CODECS {
        let begun = Instant::now();
        let mut produce = broker.kcat(&sandbox, &format!("-P -t text-{codec} -z {codec} -l"));
        client(produce.arg(&source));
        let produced = begun.elapsed();
        let begun = Instant::now();
        read_back(&sandbox, &broker, &format!("text-{codec}"), &expected);
        eprintln!("{codec}: {lines} lines produced in {produced:.1?}, consumed in {:.1?}", begun.elapsed());
    }
    let broker = broker.restarted(&sandbox, orderly);
    for codec in CODECS {
        read_back(&sandbox, &broker, &format!("text-{codec}"), &expected);
    }
    let broker = broker.restarted(&sandbox, Server::kill);
    read_back(&sandbox, &broker, "text-none", &expected);
    broker.stop();
}

/// Kills the broker `kills` times in the middle of a produce, each time when some more records were acknowledged;
/// gives the acknowledgements and what a consumer then finds.
fn produce_through_kills(
    sandbox: &Sandbox,
    logs: Logs,
    source: &Path,
    kills: usize,
    settings: &[&str],
) -> (Vec<(usize, i32, i64)>, Vec<Record>) {
    let lines = text(source, 300_000);
    // Segments end and are sealed meanwhile.
    let mut broker = Broker::start_on(sandbox, logs, &["log.segment.bytes=4194304"]);
    let (acked, consumed) = (sandbox.join("acked"), sandbox.join("consumed"));
    let mut arguments = vec!["killed", source.to_str().expect("UTF-8"), acked.to_str().expect("UTF-8")];
    arguments.extend(settings);
    let mut producer = Server::spawn(&mut broker.python(sandbox, "produce", "confluent", &arguments));
    for _ in 0..kills {
        // Each line tells of a thousand more; the producer goes on meanwhile, so the kill falls where it falls.
        for _ in 0..30 {
            let line = producer.line(Duration::from_secs(120));
            assert!(line.is_some_and(|line| line.starts_with("acked")), "the producer stopped too early");
        }
        broker = broker.restarted(sandbox, Server::kill);
        assert!(producer.is_running(), "the producer had ended before the kill: that was not in the middle");
    }
    let status = producer.wait();
    assert!(status.success(), "the producer: {status}: {}", producer.stderr());
    // Once more, so that what was acknowledged last is read from a broker that was killed too.
    let broker = broker.restarted(sandbox, Server::kill);
    let acked = acked_of(&acked);
    assert_eq!(acked.len(), lines, "the producer went on to the end");
    let highest = acked.iter().map(|&(_, _, offset)| offset).max().expect("there are acknowledgements");
    let count = (highest + 1).to_string();
    let out = consumed.to_str().expect("UTF-8");
    client(&mut broker.python(sandbox, "consume", "confluent", &["killed", &count, out]));
    broker.stop();
    (acked, records_of(&consumed))
}

/// Every acknowledged record stands at the offset that the acknowledgement named.
fn assert_acknowledged_are_there(acked: &[(usize, i32, i64)], records: &[Record], lines: &[String]) {
    for (at, record) in records.iter().enumerate() {
        assert_eq!(record.offset, i64::try_from(at).expect("small"), "offsets are contiguous");
    }
    for &(line, partition, offset) in acked {
        // An idempotent producer that was told of a duplicate may not know the offset.
        let Ok(at) = usize::try_from(offset) else { continue };
        let found = records
            .get(at)
            .unwrap_or_else(|| panic!("line {line} was acknowledged at {offset}, past the end"));
        assert_eq!(
            (found.partition, &found.value),
            (partition, &lines[line]),
            "line {line} at offset {offset}"
        );
    }
}

#[test]
fn after_kill_9_every_record_acknowledged_by_the_leader_is_there() {
    if left_out("produce with acks=1 through kills (needs confluent-kafka)") || Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.join("text");
    let logs = Logs::Volume(sandbox.images(4), "1G");
    let (acked, records) = produce_through_kills(&sandbox, logs, &source, 4, &["acks=1"]);
    assert_acknowledged_are_there(&acked, &records, &lines_of(&source));
}

#[test]
fn after_kill_9_an_idempotent_producer_leaves_neither_gap_nor_duplicate() {
    if left_out("idempotent produce through kills (needs confluent-kafka)") || Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    let logs = Logs::Volume(sandbox.images(4), "1G");
    all_lines_once_through_kills(&sandbox, logs);
}

#[test]
fn after_kill_9_in_a_directory_an_idempotent_producer_leaves_neither_gap_nor_duplicate() {
    if left_out("idempotent produce to a directory through kills (needs confluent-kafka)")
        || Broker::is_kafka()
    {
        return;
    }
    let sandbox = Sandbox::new();
    let logs = Logs::Directory(sandbox.join("logs"));
    all_lines_once_through_kills(&sandbox, logs);
}

fn all_lines_once_through_kills(sandbox: &Sandbox, logs: Logs) {
    let source = sandbox.join("text");
    let settings = ["acks=all", "enable.idempotence=true", "compression.type=lz4", "linger.ms=1"];
    let (acked, records) = produce_through_kills(sandbox, logs, &source, 4, &settings);
    let lines = lines_of(&source);
    assert_acknowledged_are_there(&acked, &records, &lines);
    let values: Vec<&String> = records.iter().map(|record| &record.value).collect();
    let differ = values.iter().zip(&lines).position(|(got, line)| *got != line);
    assert_eq!((values.len(), differ), (lines.len(), None), "all lines once, in order");
}
