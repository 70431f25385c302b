//! What clients see of transactions: fetches and offsets at `read_committed`, producers and epochs of a log. The markers
//! are written into the log directly, as a coordinator does.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::describe_producers_request::TopicRequest;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::fetch_response::PartitionData;
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::offset_for_leader_epoch_request::{
    OffsetForLeaderPartition, OffsetForLeaderTopic,
};
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::*;
use kafka_protocol::protocol::StrBytes;
use logstore::{Outcome, Partition, TopicConfig};
use raid::device::Durability;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tests::broker::{Client, Running, Under, batch, batch_of};
use uuid::Uuid;

fn name() -> TopicName {
    TopicName(StrBytes::from_static_str("t"))
}

/// Markers bear the broker's time, and records of another age would be in another segment.
fn now() -> i64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as i64
}

/// A batch of one record in a transaction.
fn txn(producer_id: i64, sequence: i32) -> Bytes {
    let mut bytes = batch_of(&[b"value"], now(), producer_id, 0, sequence).to_vec();
    bytes[22] |= 0x10;
    let crc = crc32c::crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes.into()
}

async fn topic(broker: &Running) -> (Uuid, Arc<Partition>) {
    let topic = broker.broker.store.create_topic("t", 1, TopicConfig::kafka_defaults()).await.unwrap();
    (topic.id(), Arc::clone(&topic.partitions()[0]))
}

/// Produces as a transactional client does; the error and the base offset.
async fn produce(client: &mut Client, records: Bytes) -> (i16, i64) {
    let data = PartitionProduceData::default().with_records(Some(records));
    let topic = TopicProduceData::default().with_name(name()).with_partition_data(vec![data]);
    let request = ProduceRequest::default()
        .with_acks(-1)
        .with_timeout_ms(10_000)
        .with_transactional_id(Some(TransactionalId(StrBytes::from_static_str("tx"))))
        .with_topic_data(vec![topic]);
    let answer = client.ask(12, &request).await;
    let partition = &answer.responses[0].partition_responses[0];
    (partition.error_code, partition.base_offset)
}

async fn marker(log: &Arc<Partition>, producer_id: i64, outcome: Outcome) {
    let appended = log.append_marker(producer_id, 0, 0, outcome, Durability::Stable).await.unwrap();
    appended.commit.unwrap().await.unwrap();
}

fn fetch(id: Uuid, version: i16, from: i64, isolation: i8, wait_ms: i32) -> FetchRequest {
    let wanted = FetchPartition::default().with_fetch_offset(from).with_partition_max_bytes(1 << 20);
    let topic = if version >= 13 {
        FetchTopic::default().with_topic_id(id)
    } else {
        FetchTopic::default().with_topic(name())
    };
    FetchRequest::default()
        .with_max_wait_ms(wait_ms)
        .with_min_bytes(1)
        .with_max_bytes(1 << 20)
        .with_isolation_level(isolation)
        .with_topics(vec![topic.with_partitions(vec![wanted])])
}

async fn fetched(client: &mut Client, version: i16, request: &FetchRequest) -> PartitionData {
    client.ask(version, request).await.responses[0].partitions[0].clone()
}

/// Offset of the last record in the answer.
fn last(of: &PartitionData) -> Option<i64> {
    let mut rest = of.records.clone().unwrap_or_default();
    let mut last = None;
    while !rest.is_empty() {
        let header = logstore::batch::Header::parse(&rest).unwrap();
        last = Some(header.last_offset());
        drop(rest.split_to(header.size as usize));
    }
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn a_committed_fetch_ends_at_the_last_stable_offset_and_names_what_was_aborted() {
    for under in [Under::Directory, Under::Volume] {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        let (id, log) = topic(&broker).await;
        assert_eq!(produce(&mut client, txn(5, 0)).await, (0, 0));
        assert_eq!(produce(&mut client, txn(6, 0)).await, (0, 1));
        assert_eq!(produce(&mut client, batch(&[b"plain"], now())).await, (0, 2));
        let plain = batch_of(&[b"x"], now(), 5, 0, 1);
        assert_eq!(produce(&mut client, plain).await.0, ResponseError::InvalidTxnState.code());
        marker(&log, 5, Outcome::Abort).await;
        for version in 4..=18 {
            let got = fetched(&mut client, version, &fetch(id, version, 0, 1, 0)).await;
            assert_eq!((got.error_code, got.high_watermark, got.last_stable_offset), (0, 4, 1), "{version}");
            assert_eq!(last(&got), Some(0));
            let aborted = got.aborted_transactions.unwrap();
            let aborted: Vec<_> = aborted.iter().map(|a| (a.producer_id.0, a.first_offset)).collect();
            assert_eq!(aborted, [(5, 0)], "version {version}");
            let all = fetched(&mut client, version, &fetch(id, version, 0, 0, 0)).await;
            assert_eq!((last(&all), all.aborted_transactions), (Some(3), None));
            let none = fetched(&mut client, version, &fetch(id, version, 1, 1, 0)).await;
            assert_eq!((last(&none), none.aborted_transactions), (None, Some(vec![])));
        }
        marker(&log, 6, Outcome::Commit).await;
        let got = fetched(&mut client, 18, &fetch(id, 18, 1, 1, 0)).await;
        assert_eq!((last(&got), got.last_stable_offset), (Some(4), 5));
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_committed_fetch_waits_for_the_last_stable_offset() {
    let broker = Running::start(Under::Directory, &[]).await;
    let (mut client, mut other) = (broker.client().await, broker.client().await);
    let (id, log) = topic(&broker).await;
    produce(&mut other, txn(5, 0)).await;
    let start = Instant::now();
    let sent = client.send(18, &fetch(id, 18, 0, 1, 20_000)).await;
    // What is written behind the open transaction is no news for it.
    produce(&mut other, batch(&[b"plain"], now())).await;
    assert!(client.is_silent_for(Duration::from_millis(300)).await);
    marker(&log, 5, Outcome::Commit).await;
    let answer = client.receive_as::<FetchRequest>(18, sent).await;
    assert_eq!(last(&answer.responses[0].partitions[0]), Some(2));
    assert!(start.elapsed() < Duration::from_secs(15), "it was woken, and did not run out of time");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_committed_offset_is_the_last_stable_one() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = broker.client().await;
    let (_, log) = topic(&broker).await;
    produce(&mut client, batch(&[b"plain"], now())).await;
    produce(&mut client, txn(5, 0)).await;
    for (isolation, expected) in [(0, 2), (1, 1)] {
        let partition = ListOffsetsPartition::default().with_timestamp(-1);
        let topic = ListOffsetsTopic::default().with_name(name()).with_partitions(vec![partition]);
        let request = ListOffsetsRequest::default().with_isolation_level(isolation).with_topics(vec![topic]);
        let answer = client.ask(7, &request).await;
        assert_eq!(answer.topics[0].partitions[0].offset, expected);
    }
    drop(log);
    // The transaction is as open after a restart.
    let broker = broker.restart(&[]).await;
    let mut client = broker.client().await;
    let log = Arc::clone(&broker.broker.store.topic("t").unwrap().partitions()[0]);
    assert_eq!(log.offsets().last_stable, 1);
    let topics = TopicRequest::default().with_name(name()).with_partition_indexes(vec![0, 1]);
    let answer = client.ask(0, &DescribeProducersRequest::default().with_topics(vec![topics])).await;
    let [known, unknown] = &answer.topics[0].partitions[..] else { panic!("{answer:?}") };
    assert_eq!(unknown.error_code, ResponseError::UnknownTopicOrPartition.code());
    let [producer] = &known.active_producers[..] else { panic!("{known:?}") };
    assert_eq!((producer.producer_id.0, producer.producer_epoch, producer.last_sequence), (5, 0, 0));
    assert_eq!((producer.coordinator_epoch, producer.current_txn_start_offset), (-1, 1));
    marker(&log, 5, Outcome::Abort).await;
    let topics = TopicRequest::default().with_name(name()).with_partition_indexes(vec![0]);
    let answer = client.ask(0, &DescribeProducersRequest::default().with_topics(vec![topics])).await;
    let producer = &answer.topics[0].partitions[0].active_producers[0];
    assert_eq!((producer.coordinator_epoch, producer.current_txn_start_offset), (0, -1));
    drop(log);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_an_epoch_ended_is_told() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = broker.client().await;
    topic(&broker).await;
    produce(&mut client, batch(&[b"a", b"b"], now())).await;
    for version in 2..=4 {
        for (current, asked, error, expected) in [
            (0, 0, 0, (0, 2)),
            (-1, 0, 0, (0, 2)),
            (0, 1, 0, (-1, -1)),
            (0, -1, 0, (-1, -1)),
            (3, 0, ResponseError::UnknownLeaderEpoch.code(), (-1, -1)),
        ] {
            let partition = OffsetForLeaderPartition::default()
                .with_current_leader_epoch(current)
                .with_leader_epoch(asked);
            let topics = OffsetForLeaderTopic::default().with_topic(name()).with_partitions(vec![partition]);
            let request = OffsetForLeaderEpochRequest::default().with_topics(vec![topics]);
            let answer = client.ask(version, &request).await;
            let got = &answer.topics[0].partitions[0];
            assert_eq!((got.error_code, got.leader_epoch, got.end_offset), (error, expected.0, expected.1));
        }
    }
    broker.stop().await;
}
