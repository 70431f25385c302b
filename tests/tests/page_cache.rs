//! The page cache is the cache: what a volume on a disk has taken is in memory once, though it is on two legs; and a scrub
//! of the logs leaves in it what was there, and nothing else.

use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{FetchRequest, MetadataRequest, ProduceRequest, TopicName, metadata_request};
use kafka_protocol::protocol::StrBytes;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests::broker::{Client, Running, Under, batch};
use tests::process::{Sandbox, bytes_of};
use tests::volumes::{Served, create, pattern, patterned, resident};

const MIB: u64 = 1 << 20;

fn volume(sandbox: &Sandbox, arguments: &str) -> (Served, Vec<PathBuf>) {
    let members = sandbox.images(4);
    create(sandbox, &members, "--size 64M --name vol");
    (Served::start(sandbox, &members, arguments), members)
}

/// Bytes of all members that are in memory.
fn cached(members: &[PathBuf]) -> u64 {
    members.iter().map(|member| resident(member)).sum()
}

#[test]
fn what_was_flushed_is_in_memory_once_and_read_from_there() {
    let sandbox = Sandbox::new();
    let (served, members) = volume(&sandbox, "");
    let (source, copy) = (sandbox.join("source"), sandbox.join("copy"));
    let size = served.size();
    assert!(size > 100 * MIB, "{size}");
    pattern(&source, size, 1);
    served.fill(&source);
    // Each member may keep some that is not worth a call yet, and metadata.
    let most = size + 4 * 5 * MIB;
    let held = cached(&members);
    assert!((size..most).contains(&held), "{held} bytes of {size} are in memory");
    // Reads go where it is: they bring nothing in.
    served.dump(&copy);
    assert!(bytes_of(&source) == bytes_of(&copy), "other bytes came back");
    let held = cached(&members);
    assert!(held < most, "{held} bytes of {size} are in memory after all was read");
    served.stop();
}

#[test]
fn appends_are_forgotten_by_whole_pages_and_come_back_right() {
    /// Appends as a log makes them: aligned to nothing, flushed after each few.
    const APPENDER: &str = r"
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
data = open(sys.argv[2], 'rb').read()
at = 0
while at < len(data):
    for _ in range(16):
        h.pwrite(data[at:at + 61_007], at)
        at = min(at + 61_007, len(data))
        if at == len(data):
            break
    h.flush()
";
    let sandbox = Sandbox::new();
    let (served, members) = volume(&sandbox, "");
    let (source, copy) = (sandbox.join("source"), sandbox.join("copy"));
    let size = served.size();
    pattern(&source, size, 2);
    tests::process::succeed(
        Command::new("/usr/bin/python3").args(["-c", APPENDER, &served.uri()]).arg(&source),
    );
    let held = cached(&members);
    assert!(held < size + 4 * 5 * MIB, "{held} bytes of {size} are in memory");
    served.dump(&copy);
    assert!(bytes_of(&source) == bytes_of(&copy), "other bytes came back");
    served.stop();
}

/// Bytes of the log that a scrub reads.
const LOG: u64 = 48 * MIB;

fn name() -> TopicName {
    TopicName(StrBytes::from_static_str("t"))
}

/// Appends [`LOG`] bytes.
async fn fill(client: &mut Client) {
    let wanted = metadata_request::MetadataRequestTopic::default().with_name(Some(name()));
    client.ask(12, &MetadataRequest::default().with_topics(Some(vec![wanted]))).await;
    for number in 0..LOG / MIB {
        let record = patterned(MIB - 1024, number);
        let data = PartitionProduceData::default().with_records(Some(batch(&[&record], 5)));
        let topic = TopicProduceData::default().with_name(name()).with_partition_data(vec![data]);
        let request =
            ProduceRequest::default().with_acks(-1).with_timeout_ms(30_000).with_topic_data(vec![topic]);
        let answer = client.ask(9, &request).await;
        assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
    }
}

/// Reads some megabytes from an offset.
async fn read(client: &mut Client, from: i64) {
    let partition =
        FetchPartition::default().with_partition(0).with_fetch_offset(from).with_partition_max_bytes(6 << 20);
    let topic = FetchTopic::default().with_topic(name()).with_partitions(vec![partition]);
    let request =
        FetchRequest::default().with_max_wait_ms(10_000).with_max_bytes(6 << 20).with_topics(vec![topic]);
    let answer = client.ask(11, &request).await;
    let records = answer.responses[0].partitions[0].records.clone().unwrap_or_default();
    assert!(records.len() as u64 > 4 * MIB, "{} bytes", records.len());
}

/// Files with the log's bytes.
fn log_files(place: &Path, under: Under) -> Vec<PathBuf> {
    match under {
        Under::Volume => Running::images(place),
        Under::Directory => vec![place.join("log/t-0/00000000000000000000.log")],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_of_the_logs_leaves_the_page_cache_as_it_was() {
    let settings = ["message.max.bytes=2000000", "log.scrub.max.bytes.per.second=1000000000"];
    for under in [Under::Volume, Under::Directory] {
        let broker = Running::start(under, &settings).await;
        fill(&mut broker.client().await).await;
        let (place, under) = broker.stop().await;
        let files = log_files(place.path(), under);
        for file in &files {
            let file = std::fs::File::open(file).expect("it is there");
            file.sync_all().expect("it can be written back");
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
        }
        let broker = Running::start_in(place, under, &settings).await;
        // In the middle: what a scrub reads before and after it is cold.
        read(&mut broker.client().await, 20).await;
        let before = cached(&files);
        assert!((4 * MIB..LOG).contains(&before), "{under:?}: {before} bytes are in memory");
        let store = &broker.broker.store;
        assert!(store.start_scrub().expect("it is open"));
        while store.scrub_status().expect("it is open").running {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert!(store.scrub_status().expect("it is open").bytes > LOG - MIB);
        let after = cached(&files);
        // The catalog, where the scrub notes that it has ended, is not the log.
        assert!(
            (before..before + 2 * MIB).contains(&after),
            "{under:?}: {before} bytes before, {after} after"
        );
        broker.stop().await;
    }
}
