//! Clients that people use, each with its own code for the protocol: kafka-python, librdkafka under Python, and Java's
//! own tools. Each sends real text and gets it back byte for byte; in groups, members come, leave and are killed, and
//! nothing is lost or processed twice.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tests::clients::{
    Broker, Record, acked_of, all_lines, client, lines_of, orderly, record_of, records_of, text,
};
use tests::process::{PATIENCE, Sandbox, Server, bytes_of, eventually, left_out};

/// No waiting for further members: tests say themselves who joins when.
const PROMPT: &str = "group.initial.rebalance.delay.ms=0";

/// Produces `lines` lines with a Python client, and consumes them with the same; again after a restart.
fn there_and_back(library: &str, lines: usize, produce: &[&str]) {
    let sandbox = Sandbox::new();
    let broker = Broker::start(&sandbox, &[]);
    // Clients run in the sandbox: the names are enough for them.
    let count = text(&sandbox.join("text"), lines);
    let expected = lines_of(&sandbox.join("text"));
    let begun = Instant::now();
    let arguments = [&["there", "text", "acked"], produce].concat();
    client(&mut broker.python(&sandbox, "produce", library, &arguments));
    let produced = begun.elapsed();
    let acked = acked_of(&sandbox.join("acked"));
    assert_eq!(acked.len(), count, "{library}: every record is acknowledged once");
    let consume = |broker: &Broker| {
        let arguments = ["there", &count.to_string(), "out"];
        client(&mut broker.python(&sandbox, "consume", library, &arguments));
        let records = records_of(&sandbox.join("out"));
        // One producer, one partition: the order is that of the lines.
        for (at, (record, line)) in records.iter().zip(&expected).enumerate() {
            assert_eq!((record.partition, record.offset), (0, i64::try_from(at).expect("small")));
            assert_eq!(&record.value, line, "{library}: line {at}");
        }
        assert_eq!(records.len(), count);
    };
    let begun = Instant::now();
    consume(&broker);
    eprintln!("{library}: {count} lines produced in {produced:.1?}, consumed in {:.1?}", begun.elapsed());
    let broker = broker.restarted(&sandbox, orderly);
    consume(&broker);
    broker.stop();
}

#[test]
fn librdkafka_there_and_back() {
    if left_out("confluent-kafka") {
        return;
    }
    let settings = ["acks=all", "enable.idempotence=true", "compression.type=zstd"];
    there_and_back("confluent", all_lines(), &settings);
}

#[test]
fn kafka_python_there_and_back() {
    if left_out("kafka-python") {
        return;
    }
    // Pure Python, so a part of the text: it is there for its own reading of the protocol, not for its speed.
    there_and_back("kafka-python", 100_000, &["acks=all", "compression_type=gzip"]);
}

/// What the members of a group did, from their files: each record with how often it was processed and committed.
fn processed(files: &[PathBuf]) -> HashMap<(i32, i64), (usize, String)> {
    let mut done: HashMap<(i32, i64), (usize, String)> = HashMap::new();
    for file in files {
        let mut batch: Vec<Record> = Vec::new();
        for line in lines_of(file) {
            if line == "commit" {
                for record in batch.drain(..) {
                    done.entry((record.partition, record.offset)).or_insert((0, record.value)).0 += 1;
                }
            } else {
                batch.push(record_of(&line).unwrap_or_else(|| panic!("not a record: {line}")));
            }
        }
        // What is left in `batch` was not committed: its member was killed, and others must have processed it.
    }
    done
}

/// Waits until each of the members has been assigned `want` partitions, all distinct.
fn assigned(members: &[Server], want: usize) {
    let mut held: BTreeMap<usize, Vec<i32>> = BTreeMap::new();
    eventually("the group to share the partitions", PATIENCE, || {
        for (at, member) in members.iter().enumerate() {
            while let Some(line) = member.line(Duration::from_millis(10)) {
                let Some(list) = line.strip_prefix("assigned [").and_then(|rest| rest.strip_suffix(']'))
                else {
                    panic!("a member said {line} before the partitions were shared");
                };
                held.insert(at, list.split(", ").filter_map(|number| number.parse().ok()).collect());
            }
        }
        let mut all: Vec<i32> = held.values().flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        let fair = held.values().all(|partitions| partitions.len() == want);
        (fair && held.len() == members.len() && all.len() == members.len() * want).then_some(())
    });
}

/// Three members share six partitions; one leaves in order, one is killed with a batch processed and not committed,
/// the third takes over: every record is processed and committed exactly once.
fn a_group(library: &str) {
    let sandbox = Sandbox::new();
    let broker = Broker::start(&sandbox, &[PROMPT, "num.partitions=6"]);
    let source = sandbox.join("text");
    let lines = text(&source, 60_000);
    // The topic is there before the members look for it, with one record in it.
    std::fs::write(sandbox.join("one"), "first\n").expect("the sandbox can be written");
    client(&mut broker.python(&sandbox, "produce", library, &["shared", "one", "acked"]));

    let files: Vec<PathBuf> = (0..3).map(|at| sandbox.join(format!("member{at}"))).collect();
    let ends = ["leave:8000", "die:8000", "idle:10"];
    let mut members: Vec<Server> = Vec::new();
    for (file, end) in files.iter().zip(ends) {
        let arguments = ["shared", "group", file.to_str().expect("UTF-8"), end];
        members.push(Server::spawn(&mut broker.python(&sandbox, "member", library, &arguments)));
    }
    assigned(&members, 2);
    client(&mut broker.python(&sandbox, "produce", library, &["shared", "text", "acked", spread(library)]));
    for (member, end) in members.iter_mut().zip(ends) {
        let status = member.wait();
        assert!(status.success() || end.starts_with("die"), "{end}: {status}: {}", member.stderr());
    }

    let done = processed(&files);
    let twice: Vec<_> = done.iter().filter(|(_, (times, _))| *times != 1).take(5).collect();
    assert!(twice.is_empty(), "{library}: processed more than once: {twice:?}");
    assert_eq!(done.len(), lines + 1, "{library}: records lost");
    let mut got: Vec<String> = done.into_values().map(|(_, value)| value).collect();
    let mut sent = lines_of(&source);
    sent.push("first".to_owned());
    got.sort_unstable();
    sent.sort_unstable();
    assert!(got == sent, "{library}: other values than were sent");
    broker.stop();
}

/// Keyless records go to one partition at a time, unless batches are small.
fn spread(library: &str) -> &'static str {
    if library == "confluent" { "sticky.partitioning.linger.ms=0" } else { "batch_size=4096" }
}

#[test]
fn librdkafka_group_shares_and_takes_over() {
    if !left_out("groups with confluent-kafka") {
        a_group("confluent");
    }
}

#[test]
fn kafka_python_group_shares_and_takes_over() {
    if !left_out("groups with kafka-python") {
        a_group("kafka-python");
    }
}

#[test]
fn java_console_there_and_back() {
    if left_out("Java's console tools") {
        return;
    }
    let sandbox = Sandbox::new();
    let broker = Broker::start(&sandbox, &[]);
    let source = sandbox.join("text");
    let lines = text(&source, all_lines());
    client(&mut broker.java(&sandbox, "TopicCommand", "--create --topic console --partitions 1"));
    let topics = client(&mut broker.java(&sandbox, "TopicCommand", "--list"));
    assert!(topics.lines().any(|topic| topic == "console"), "{topics}");

    let mut produce = broker.java(&sandbox, "ConsoleProducer", "--topic console --compression-codec lz4");
    produce.stdin(Stdio::from(std::fs::File::open(&source).expect("just written")));
    client(&mut produce);
    let arguments = format!("--topic console --partition 0 --offset earliest --max-messages {lines}");
    let got = client(&mut broker.java(&sandbox, "consumer.ConsoleConsumer", &arguments));
    assert!(got.as_bytes() == bytes_of(&source), "{} bytes came back, not the text", got.len());

    // And as a member of a group.
    let group =
        "--topic console --group console --command-property auto.offset.reset=earliest --timeout-ms 15000";
    let got = client(&mut broker.java(
        &sandbox,
        "consumer.ConsoleConsumer",
        &format!("{group} --max-messages {lines}"),
    ));
    assert!(got.as_bytes() == bytes_of(&source), "{} bytes came back to the group, not the text", got.len());

    client(&mut broker.java(&sandbox, "TopicCommand", "--delete --topic console"));
    let topics = client(&mut broker.java(&sandbox, "TopicCommand", "--list"));
    assert!(!topics.lines().any(|topic| topic == "console"), "{topics}");
    broker.stop();
}

#[test]
fn java_performance_tools() {
    if left_out("Java's performance tools") {
        return;
    }
    let sandbox = Sandbox::new();
    let broker = Broker::start(&sandbox, &["num.partitions=3"]);
    let arguments = "--topic perf --num-records 200000 --record-size 200 --throughput -1 \
                     --command-property acks=all --command-property compression.type=none";
    let report = client(&mut broker.java(&sandbox, "ProducerPerformance", arguments));
    assert!(report.contains("200000 records sent"), "{report}");
    let report = client(&mut broker.java(
        &sandbox,
        "ConsumerPerformance",
        "--topic perf --num-records 200000 --timeout 60000 --hide-header",
    ));
    // start.time, end.time, data.consumed.in.MB, MB.sec, data.consumed.in.nMsg, …
    let consumed = report.lines().filter_map(|line| line.split(", ").nth(4)?.parse::<u64>().ok()).max();
    assert!(consumed.is_some_and(|n| n >= 200_000), "{report}");
    broker.stop();
}

/// Kafka's own verifiers: an idempotent producer, two consumers in a group, of which one is told to stop half-way. A
/// consumer tells of each record and each commit; what it committed is processed, all of it, once.
#[test]
fn java_verifiers_share_a_group() {
    if left_out("Java's verifiers") {
        return;
    }
    let sandbox = Sandbox::new();
    let broker = Broker::start(&sandbox, &[PROMPT]);
    client(&mut broker.java(&sandbox, "TopicCommand", "--create --topic verified --partitions 4"));
    let group = "--topic verified --group-id verified --reset-policy earliest --verbose";
    let mut consumers: Vec<Server> =
        (0..2).map(|_| Server::spawn(&mut broker.java(&sandbox, "VerifiableConsumer", group))).collect();
    let mut ledgers = vec![Ledger::default(), Ledger::default()];
    eventually("both consumers to hold two partitions", PATIENCE, || {
        for (consumer, ledger) in consumers.iter().zip(&mut ledgers) {
            ledger.follow(consumer);
        }
        ledgers.iter().all(|ledger| ledger.held == 2).then_some(())
    });

    let sent = 40_000;
    let produce = format!("--topic verified --max-messages {sent} --acks -1 --throughput 8000");
    let mut producer = Server::spawn(&mut broker.java(&sandbox, "VerifiableProducer", &produce));
    let mut left = None;
    eventually("all records to be processed and committed", PATIENCE, || {
        for (consumer, ledger) in consumers.iter().zip(&mut ledgers) {
            ledger.follow(consumer);
        }
        if left.is_none() && ledgers[0].committed.len() > sent / 8 {
            left = consumers.drain(..1).next();
            let leaver = left.as_mut().expect("there were two");
            leaver.signal(rustix::process::Signal::TERM);
            leaver.wait();
            ledgers[0].follow(leaver);
            ledgers.swap(0, 1);
        }
        // Drains what it says, one line a record: it must not stand still at a full pipe.
        while producer.line(Duration::ZERO).is_some() {}
        (ledgers.iter().map(|ledger| ledger.committed.len()).sum::<usize>() >= sent).then_some(())
    });
    assert!(producer.wait().success(), "{}", producer.stderr());
    assert!(left.is_some(), "one consumer left half-way");
    let mut all: Vec<(i64, i64)> =
        ledgers.iter().flat_map(|ledger| ledger.committed.iter().copied()).collect();
    all.sort_unstable();
    let with_doubles = all.len();
    all.dedup();
    assert_eq!((all.len(), with_doubles), (sent, sent), "each record processed and committed once");
    broker.stop();
}

/// What a `VerifiableConsumer` has told of.
#[derive(Default)]
struct Ledger {
    held: usize,
    batch: Vec<(i64, i64)>,
    committed: Vec<(i64, i64)>,
}

impl Ledger {
    fn follow(&mut self, consumer: &Server) {
        while let Some(line) = consumer.line(Duration::from_millis(5)) {
            let event: serde_json::Value =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"));
            match event["name"].as_str() {
                Some("partitions_assigned") => {
                    self.held = event["partitions"].as_array().map_or(0, Vec::len);
                }
                Some("record_data") => {
                    let number = |field: &str| event[field].as_i64().unwrap_or_else(|| panic!("{line}"));
                    self.batch.push((number("partition"), number("offset")));
                }
                Some("offsets_committed") if event["success"] == true => {
                    self.committed.append(&mut self.batch);
                }
                Some("offsets_committed") => self.batch.clear(),
                _ => {}
            }
        }
    }
}
