//! A compacted topic under real clients: kcat writes keys in every codec and reads the table back, before and after a
//! restart; Kafka's own tools make the topic and delete records from it.

use std::collections::BTreeMap;
use std::fmt::Write;
use tests::clients::{Broker, client, orderly};
use tests::process::{PATIENCE, Sandbox, eventually};

const CODECS: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];
const KEYS: usize = 100;
const ROUNDS: usize = 40;

/// The records of the topic from the beginning, as kcat prints them: key, value.
fn records(sandbox: &Sandbox, broker: &Broker, topic: &str) -> Vec<(String, String)> {
    let mut command = broker.kcat(sandbox, &format!("-C -t {topic} -p 0 -o beginning -e -q -K |"));
    let said = client(&mut command);
    let split = |line: &str| line.split_once('|').map(|(key, value)| (key.to_owned(), value.to_owned()));
    said.lines().map(|line| split(line).unwrap_or_else(|| panic!("not a record: {line}"))).collect()
}

#[test]
fn clients_see_the_table_and_delete_records() {
    if Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    let broker = Broker::start(&sandbox, &["log.cleaner.backoff.ms=100"]);
    let own = "--config cleanup.policy=compact,delete --config segment.ms=20 \
               --config min.cleanable.dirty.ratio=0.01";
    client(&mut broker.java(
        &sandbox,
        "TopicCommand",
        &format!("--create --topic table --partitions 1 --replication-factor 1 {own}"),
    ));
    let mut expected = BTreeMap::new();
    for round in 0..ROUNDS {
        let mut text = String::new();
        for n in 0..KEYS {
            let value = format!("{round}-{n}-{}", "v".repeat(150));
            writeln!(text, "key{n}|{value}").expect("a string takes all");
            expected.insert(format!("key{n}"), value);
        }
        let lines = sandbox.join("lines");
        std::fs::write(&lines, text).expect("the sandbox can be written");
        let codec = CODECS[round % CODECS.len()];
        let mut produce = broker.kcat(&sandbox, &format!("-P -t table -p 0 -K | -z {codec} -l"));
        client(produce.arg(&lines));
    }
    let table = |records: &[(String, String)]| records.iter().cloned().collect::<BTreeMap<_, _>>();
    let left = eventually("compaction to get on", PATIENCE, || {
        let records = records(&sandbox, &broker, "table");
        (records.len() < KEYS * ROUNDS / 2).then_some(records)
    });
    eprintln!("{} of {} records are left", left.len(), KEYS * ROUNDS);
    assert_eq!(table(&left), expected);
    let broker = broker.restarted(&sandbox, orderly);
    assert_eq!(table(&records(&sandbox, &broker, "table")), expected);

    let file = sandbox.join("delete.json");
    let to = KEYS * (ROUNDS - 1) + 10;
    let request =
        format!(r#"{{"partitions":[{{"topic":"table","partition":0,"offset":{to}}}],"version":1}}"#);
    std::fs::write(&file, request).expect("the sandbox can be written");
    let arguments = format!("--offset-json-file {}", file.display());
    let said = client(&mut broker.java(&sandbox, "DeleteRecordsCommand", &arguments));
    assert!(said.contains(&format!("low_watermark: {to}")), "{said}");
    let after = records(&sandbox, &broker, "table");
    assert_eq!(after.len(), KEYS - 10);
    assert!(after.iter().all(|(key, value)| expected.get(key) == Some(value)));
    broker.stop();
}
