//! What connections do to the broker: pipelining, silence, garbage, oversize frames, slow senders, half-closed sockets.

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::*;
use kafka_protocol::protocol::StrBytes;
use std::time::Duration;
use tests::broker::{Client, Running, Under, batch, frame};

fn metadata(topic: &str) -> MetadataRequest {
    let name = TopicName(StrBytes::from_string(topic.to_owned()));
    let wanted = metadata_request::MetadataRequestTopic::default().with_name(Some(name));
    MetadataRequest::default().with_topics(Some(vec![wanted]))
}

fn produce(topic: &str, acks: i16, records: Bytes) -> ProduceRequest {
    let data = PartitionProduceData::default().with_index(0).with_records(Some(records));
    let topic = TopicProduceData::default()
        .with_name(TopicName(StrBytes::from_string(topic.to_owned())))
        .with_partition_data(vec![data]);
    ProduceRequest::default().with_acks(acks).with_timeout_ms(10_000).with_topic_data(vec![topic])
}

async fn ready(broker: &Running) -> Client {
    let mut client = broker.client().await;
    assert_eq!(client.ask(12, &metadata("t")).await.topics[0].error_code, 0);
    client
}

async fn is_alive(broker: &Running) -> bool {
    let mut client = broker.client().await;
    client.ask(0, &ApiVersionsRequest::default()).await.error_code == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_produces_are_answered_in_order_with_offsets_in_order() {
    for under in [Under::Directory, Under::Volume] {
        let broker = Running::start(under, &[]).await;
        let mut client = ready(&broker).await;
        let mut sent = Vec::new();
        for n in 0..200u8 {
            let acks = if n % 3 == 0 { 1 } else { -1 };
            sent.push(client.send(9, &produce("t", acks, batch(&[&[n]], 5))).await);
        }
        for (n, correlation) in sent.into_iter().enumerate() {
            let answer = client.receive_as::<ProduceRequest>(9, correlation).await;
            let partition = &answer.responses[0].partition_responses[0];
            assert_eq!((partition.error_code, partition.base_offset), (0, n as i64));
        }
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_produce_without_acknowledgement_has_no_response() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = ready(&broker).await;
    for n in 0..10u8 {
        client.send(9, &produce("t", 0, batch(&[&[n]], 5))).await;
    }
    // The next response is the one to the next request.
    let correlation = client.send(9, &produce("t", 1, batch(&[b"last"], 5))).await;
    let answer = client.receive_as::<ProduceRequest>(9, correlation).await;
    assert_eq!(answer.responses[0].partition_responses[0].base_offset, 10);
    // One that fails closes the connection: there is no other way to tell.
    client.send(9, &produce("t", 0, Bytes::from_static(b"garbage"))).await;
    assert_eq!(client.read_frame().await, None);
    assert!(is_alive(&broker).await);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_oversize_frames_close_the_connection_and_nothing_else() {
    let broker = Running::start(Under::Directory, &["socket.request.max.bytes=1000000"]).await;
    let mut unwelcome: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3],
        vec![0xff; 64],
        vec![0; 64],
        vec![0, 0, 0, 3, 1, 2, 3],
        // An API that does not exist, a version that does not, an API that is not served.
        vec![0, 0, 0, 10, 0x55, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff],
        vec![0, 0, 0, 10, 0, 3, 0, 99, 0, 0, 0, 1, 0xff, 0xff],
        vec![0, 0, 0, 10, 0, 71, 0, 0, 0, 0, 0, 1, 0xff, 0xff],
        // Metadata 1 with two billion topics in four bytes.
        vec![0, 0, 0, 14, 0, 3, 0, 1, 0, 0, 0, 1, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff],
        // A client id that reaches past the frame.
        vec![0, 0, 0, 10, 0, 3, 0, 1, 0, 0, 0, 1, 0x7f, 0xff],
    ];
    // A large first frame that is no produce.
    let mut large = 100_000i32.to_be_bytes().to_vec();
    large.extend([0, 3, 0, 9]);
    unwelcome.push(large);
    // Larger than the limit.
    let mut huge = 1_000_001i32.to_be_bytes().to_vec();
    huge.extend([0, 0, 0, 9]);
    unwelcome.push(huge);
    for bytes in unwelcome {
        let mut client = broker.client().await;
        client.write(&bytes).await;
        assert_eq!(client.read_frame().await, None, "{bytes:02x?}");
    }
    // After a valid request the limit is larger, and still there.
    let mut client = ready(&broker).await;
    let mut huge = BytesMut::new();
    huge.put_i32(1_000_001);
    client.write(&huge).await;
    assert_eq!(client.read_frame().await, None);
    assert!(is_alive(&broker).await);
    assert!(broker.broker.metrics.misbehaved.get() >= 13);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_knows_our_versions_may_produce_a_large_batch_at_once() {
    let broker = Running::start(Under::Volume, &[]).await;
    drop(ready(&broker).await);
    let mut client = broker.client().await;
    let big = vec![7; 900_000];
    let answer = client.ask(9, &produce("t", -1, batch(&[&big], 5))).await;
    assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_may_come_byte_by_byte_and_many_at_once() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = broker.client().await;
    let request = frame(5, 0, &ApiVersionsRequest::default());
    for byte in &request {
        client.write(&[*byte]).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(client.receive_as::<ApiVersionsRequest>(0, 5).await.error_code, 0);
    let many: Vec<u8> = (0..500).flat_map(|n| frame(n, 0, &ApiVersionsRequest::default())).collect();
    let (first, second) = many.split_at(many.len() / 2 + 1);
    client.write(first).await;
    client.write(second).await;
    for n in 0..500 {
        assert_eq!(client.receive_as::<ApiVersionsRequest>(0, n).await.error_code, 0);
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_stops_sending_still_gets_what_it_asked_for() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = ready(&broker).await;
    let correlation = client.send(9, &produce("t", -1, batch(&[b"x"], 5))).await;
    client.finish().await;
    let answer = client.receive_as::<ProduceRequest>(9, correlation).await;
    assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
    assert_eq!(client.read_frame().await, None);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_cut_off_is_forgotten() {
    let broker = Running::start(Under::Directory, &[]).await;
    for cut in [1, 3, 4, 5, 10, 20] {
        let mut client = broker.client().await;
        let request = frame(1, 12, &metadata("never"));
        client.write(&request[..cut]).await;
        client.finish().await;
        assert_eq!(client.read_frame().await, None);
    }
    assert!(broker.broker.store.topic("never").is_none());
    assert!(is_alive(&broker).await);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_and_one_that_waits_for_an_answer_is_not() {
    let broker = Running::start(Under::Directory, &["connections.max.idle.ms=300"]).await;
    let mut idle = ready(&broker).await;
    let mut waiting = ready(&broker).await;
    let topic = fetch_request::FetchTopic::default()
        .with_topic(TopicName(StrBytes::from_static_str("t")))
        .with_partitions(vec![
            fetch_request::FetchPartition::default().with_partition_max_bytes(1000).with_fetch_offset(0),
        ]);
    let poll = FetchRequest::default()
        .with_max_wait_ms(1000)
        .with_min_bytes(1)
        .with_max_bytes(1000)
        .with_topics(vec![topic]);
    let correlation = waiting.send(12, &poll).await;
    assert_eq!(idle.read_frame().await, None);
    waiting.receive_as::<FetchRequest>(12, correlation).await;
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_byte_budget_bounds_what_is_in_memory_and_delays_nobody_for_ever() {
    let settings = ["socket.request.max.bytes=1048576", "queued.max.request.bytes=1048576"];
    let broker = Running::start(Under::Directory, &settings).await;
    let mut slow = ready(&broker).await;
    // Announces the whole budget and sends next to nothing.
    let mut head = BytesMut::new();
    head.put_i32(1_048_000);
    head.put_slice(&[0, 0, 0, 9]);
    slow.write(&head).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut other = broker.client().await;
    let correlation = other.send(9, &produce("t", 1, batch(&[&[1; 2000]], 5))).await;
    assert!(other.is_silent_for(Duration::from_millis(300)).await, "no budget is left");
    drop(slow);
    let answer = other.receive_as::<ProduceRequest>(9, correlation).await;
    assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_the_limit_are_refused() {
    let broker = Running::start(Under::Directory, &["max.connections=2"]).await;
    let first = ready(&broker).await;
    let _second = ready(&broker).await;
    let mut third = broker.client().await;
    drop(third.try_write(&frame(1, 0, &ApiVersionsRequest::default())).await);
    assert_eq!(third.read_frame().await, None);
    drop(first);
    for _ in 0..100 {
        let mut again = broker.client().await;
        if again.try_write(&frame(1, 0, &ApiVersionsRequest::default())).await.is_ok()
            && again.read_frame().await.is_some()
        {
            broker.stop().await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("a place that was given back is not given out");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_answers_what_waits_and_leaves_no_connection() {
    let broker = Running::start(Under::Volume, &[]).await;
    let mut client = ready(&broker).await;
    let topic = fetch_request::FetchTopic::default()
        .with_topic(TopicName(StrBytes::from_static_str("t")))
        .with_partitions(vec![
            fetch_request::FetchPartition::default().with_partition_max_bytes(1000).with_fetch_offset(0),
        ]);
    let poll = FetchRequest::default()
        .with_max_wait_ms(60_000)
        .with_min_bytes(1)
        .with_max_bytes(1000)
        .with_topics(vec![topic]);
    let correlation = client.send(12, &poll).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let started = std::time::Instant::now();
    broker.stop().await;
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    let answer = client.receive_as::<FetchRequest>(12, correlation).await;
    assert_eq!(answer.responses[0].partitions[0].error_code, 0);
    assert_eq!(client.read_frame().await, None);
}
