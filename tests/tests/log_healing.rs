//! A member of a live volume is overwritten with noise while producers and consumers are at work: every record is served
//! as it was sent, the member is made good, and the counts say so. Then once more after a restart, when nothing has been
//! checked yet.
//!
//! Reads are checked each time here (`log.verify.interval.ms=0`): what was checked before somebody overwrites it would
//! count as checked otherwise.

use bytes::Bytes;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{FetchRequest, MetadataRequest, ProduceRequest, TopicName, metadata_request};
use kafka_protocol::protocol::StrBytes;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;
use tests::broker::{Client, Running, Under, batch};

/// Bytes of a record.
const RECORD: usize = 16 << 10;
/// Records of each producer before and after the noise.
const RECORDS: i64 = 400;
const PRODUCERS: i64 = 3;

fn name(topic: &str) -> TopicName {
    TopicName(StrBytes::from_string(topic.to_owned()))
}

/// What the record of a producer holds: found nowhere else.
fn value(producer: i64, number: i64) -> Vec<u8> {
    let line = format!("<{producer}:{number}>");
    line.bytes().cycle().take(RECORD).collect()
}

async fn make_topics(client: &mut Client) {
    let wanted =
        |topic: String| metadata_request::MetadataRequestTopic::default().with_name(Some(name(&topic)));
    let all = (0..PRODUCERS).map(|producer| wanted(format!("t{producer}"))).collect();
    let answer = client.ask(12, &MetadataRequest::default().with_topics(Some(all))).await;
    assert!(answer.topics.iter().all(|topic| topic.error_code == 0), "{answer:?}");
}

/// Sends records of one producer, each acknowledged before the next.
async fn produce(mut client: Client, producer: i64, numbers: std::ops::Range<i64>, sent: Arc<AtomicI64>) {
    for number in numbers {
        let records = batch(&[&value(producer, number)], 5);
        let data = PartitionProduceData::default().with_index(0).with_records(Some(records));
        let topic = TopicProduceData::default()
            .with_name(name(&format!("t{producer}")))
            .with_partition_data(vec![data]);
        let request =
            ProduceRequest::default().with_acks(-1).with_timeout_ms(30_000).with_topic_data(vec![topic]);
        let answer = client.ask(9, &request).await;
        let partition = &answer.responses[0].partition_responses[0];
        assert_eq!((partition.error_code, partition.base_offset), (0, number), "{producer}");
        sent.fetch_add(1, Ordering::Release);
    }
}

/// Fetches from an offset; the records field.
async fn fetch(client: &mut Client, producer: i64, from: i64) -> Bytes {
    let partition =
        FetchPartition::default().with_partition(0).with_fetch_offset(from).with_partition_max_bytes(300_000);
    let topic =
        FetchTopic::default().with_topic(name(&format!("t{producer}"))).with_partitions(vec![partition]);
    let request = FetchRequest::default()
        .with_max_wait_ms(200)
        .with_min_bytes(1)
        .with_max_bytes(1 << 20)
        .with_topics(vec![topic]);
    let answer = client.ask(11, &request).await;
    let partition = &answer.responses[0].partitions[0];
    assert_eq!(partition.error_code, 0, "t{producer} from {from}");
    partition.records.clone().unwrap_or_default()
}

/// Reads a topic from its start to an offset, and compares each record with what was sent.
async fn consume(client: &mut Client, producer: i64, end: i64, give_up: &AtomicBool) {
    let mut at = 0;
    while at < end && !give_up.load(Ordering::Acquire) {
        let mut bytes = fetch(client, producer, at).await;
        while bytes.len() > 61 {
            let length = i32::from_be_bytes(bytes[8..12].try_into().expect("four bytes")) as usize + 12;
            let one = bytes.split_to(length);
            assert_eq!(i64::from_be_bytes(one[..8].try_into().expect("eight bytes")), at, "t{producer}");
            let sent = batch(&[&value(producer, at)], 5);
            // All but what the log stamps: offset and epoch.
            assert!(one[16..] == sent[16..], "t{producer}: the record at {at} is not what was sent");
            at += 1;
        }
    }
}

/// Overwrites a member from the first record on it to its end.
fn overwrite(image: &Path) {
    let bytes = std::fs::read(image).expect("it can be read");
    let first = bytes.windows(16).position(|window| window.starts_with(b"<") && is_record(window));
    let from = first.expect("records lie on each member") as u64;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(bytes.len() - from as usize)
    .collect();
    File::options()
        .write(true)
        .open(image)
        .expect("it can be written")
        .write_all_at(&noise, from)
        .expect("noise");
}

fn is_record(window: &[u8]) -> bool {
    (0..PRODUCERS).any(|producer| window.starts_with(format!("<{producer}:").as_bytes()))
}

async fn scrubbed(broker: &Running) -> logstore::ScrubStatus {
    let store = &broker.broker.store;
    assert!(store.start_scrub().expect("it is open"));
    loop {
        let status = store.scrub_status().expect("it is open");
        if !status.running {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_overwritten_with_noise_harms_no_record_and_is_made_good() {
    let settings = ["log.verify.interval.ms=0", "log.scrub.max.bytes.per.second=1000000000"];
    let place = Arc::new(tempfile::tempdir().expect("a temporary directory"));
    let broker = Running::start_in(Arc::clone(&place), Under::Volume, &settings).await;
    let images = Running::images(place.path());
    make_topics(&mut broker.client().await).await;

    let (sent, never) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut tasks = Vec::new();
    for producer in 0..PRODUCERS {
        tasks.push(tokio::spawn(produce(broker.client().await, producer, 0..2 * RECORDS, Arc::clone(&sent))));
        for _ in 0..2 {
            let (mut client, never) = (broker.client().await, Arc::clone(&never));
            tasks
                .push(tokio::spawn(async move { consume(&mut client, producer, 2 * RECORDS, &never).await }));
        }
    }
    while sent.load(Ordering::Acquire) < PRODUCERS * RECORDS {
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(tasks.iter().all(|task| !task.is_finished()), "a client failed before the noise");
    }
    let noisy = images[0].clone();
    tokio::task::spawn_blocking(move || overwrite(&noisy)).await.expect("noise is made");
    for task in tasks {
        task.await.expect("every record is served as it was sent");
    }
    for producer in 0..PRODUCERS {
        consume(&mut broker.client().await, producer, 2 * RECORDS, &never).await;
    }
    let healed = broker.broker.store.healing();
    assert!(healed.healed > 0 && healed.unreadable == 0, "{healed:?}");
    let page = broker.broker.metrics.page(healed, 0).expect("a page");
    assert!(page.contains(&format!("decalog_batches_healed_total {}", healed.healed)), "{page}");

    // The other pair's member, while the broker is down: nothing has been checked when it starts.
    let (place, under) = broker.stop().await;
    overwrite(&images[3]);
    let broker = Running::start_in(place, under, &settings).await;
    for producer in 0..PRODUCERS {
        consume(&mut broker.client().await, producer, 2 * RECORDS, &never).await;
    }
    let status = scrubbed(&broker).await;
    assert_eq!(status.unreadable, 0, "{status:?}");
    assert!(broker.broker.store.healing().healed > 0);
    // All copies of all batches are the same and good.
    let status = scrubbed(&broker).await;
    assert_eq!((status.healed, status.unreadable), (0, 0), "{status:?}");
    broker.stop().await;
}
