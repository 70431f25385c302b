//! Each API of the broker, in every advertised version, and what it says to requests that are wrong. The messages are
//! the `kafka-protocol` crate's; each test runs over a directory and over a volume of four images.

use bytes::{Bytes, BytesMut};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::create_topics_request::{CreatableTopic, CreatableTopicConfig};
use kafka_protocol::messages::delete_topics_request::DeleteTopicState;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::*;
use kafka_protocol::protocol::{Request, StrBytes};
use kafka_protocol::records::RecordBatchDecoder;
use logstore::batch::{Marker, Outcome};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tests::broker::{Client, Running, Under, batch, batch_of};
use uuid::Uuid;

const HOMES: [Under; 2] = [Under::Directory, Under::Volume];

fn text(of: &str) -> StrBytes {
    StrBytes::from_string(of.to_owned())
}

fn topic_name(of: &str) -> TopicName {
    TopicName(text(of))
}

fn code(error: ResponseError) -> i16 {
    error.code()
}

async fn create(client: &mut Client, name: &str, partitions: i32, configs: &[(&str, &str)]) -> Uuid {
    let configs = configs
        .iter()
        .map(|(k, v)| CreatableTopicConfig::default().with_name(text(k)).with_value(Some(text(v))))
        .collect();
    let topic = CreatableTopic::default()
        .with_name(topic_name(name))
        .with_num_partitions(partitions)
        .with_replication_factor(1)
        .with_configs(configs);
    let made = client.ask(7, &CreateTopicsRequest::default().with_topics(vec![topic])).await;
    assert_eq!(made.topics[0].error_code, 0, "{:?}", made.topics[0].error_message);
    made.topics[0].topic_id
}

fn produce(topic: &str, id: Uuid, version: i16, acks: i16, batches: &[(i32, Bytes)]) -> ProduceRequest {
    let data = batches
        .iter()
        .map(|(index, b)| PartitionProduceData::default().with_index(*index).with_records(Some(b.clone())))
        .collect();
    let topic_data = if version >= 13 {
        TopicProduceData::default().with_topic_id(id)
    } else {
        TopicProduceData::default().with_name(topic_name(topic))
    };
    ProduceRequest::default()
        .with_acks(acks)
        .with_timeout_ms(10_000)
        .with_topic_data(vec![topic_data.with_partition_data(data)])
}

fn fetch(topic: &str, id: Uuid, version: i16, partitions: &[(i32, i64)]) -> FetchRequest {
    let wanted = partitions
        .iter()
        .map(|(index, from)| {
            FetchPartition::default()
                .with_partition(*index)
                .with_fetch_offset(*from)
                .with_partition_max_bytes(1 << 20)
        })
        .collect();
    let topic = if version >= 13 {
        FetchTopic::default().with_topic_id(id)
    } else {
        FetchTopic::default().with_topic(topic_name(topic))
    };
    FetchRequest::default()
        .with_max_wait_ms(0)
        .with_min_bytes(1)
        .with_max_bytes(8 << 20)
        .with_topics(vec![topic.with_partitions(wanted)])
}

/// Values of the records in a `records` field, by offset.
fn values(records: Option<&Bytes>) -> BTreeMap<i64, Bytes> {
    let mut raw = records.cloned().unwrap_or_default();
    let sets = RecordBatchDecoder::decode_all(&mut raw).expect("whole batches");
    sets.into_iter()
        .flat_map(|set| set.records)
        .map(|record| (record.offset, record.value.unwrap_or_default()))
        .collect()
}

async fn produced(client: &mut Client, topic: &str, records: &[&[u8]]) -> i64 {
    let answer = client.ask(12, &produce(topic, Uuid::nil(), 12, -1, &[(0, batch(records, 1000))])).await;
    let partition = &answer.responses[0].partition_responses[0];
    assert_eq!(partition.error_code, 0, "{:?}", partition.error_message);
    partition.base_offset
}

#[tokio::test(flavor = "multi_thread")]
async fn api_versions_tells_the_truth_in_every_version() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = broker.client().await;
    for version in 0..=4 {
        let mut request = ApiVersionsRequest::default();
        if version >= 3 {
            request =
                request.with_client_software_name(text("tests")).with_client_software_version(text("1.0"));
        }
        let answer = client.ask(version, &request).await;
        assert_eq!(answer.error_code, 0);
        let range = |key: ApiKey| {
            let api = answer.api_keys.iter().find(|a| a.api_key == key as i16);
            api.map(|a| (a.min_version, a.max_version))
        };
        assert_eq!(range(ApiKey::Produce), Some((0, 13)));
        assert_eq!(range(ApiKey::Fetch), Some((4, 18)));
        assert_eq!(range(ApiKey::Metadata), Some((0, 13)));
        assert_eq!(range(ApiKey::PushTelemetry), None, "telemetry is not advertised");
    }
    // A client must not give itself an improper name.
    let nameless = client.ask(3, &ApiVersionsRequest::default()).await;
    assert_eq!(nameless.error_code, code(ResponseError::InvalidRequest));

    // Version 99: header version 0 and body version 0, error 35, the ranges.
    client.write(&[0, 0, 0, 10, 0, 18, 0, 99, 0, 0, 0, 7, 0xff, 0xff]).await;
    let mut frame = client.read_frame().await.expect("an answer");
    let header = <ResponseHeader as kafka_protocol::protocol::Decodable>::decode(&mut frame, 0).unwrap();
    assert_eq!(header.correlation_id, 7);
    let answer = <ApiVersionsResponse as kafka_protocol::protocol::Decodable>::decode(&mut frame, 0).unwrap();
    assert_eq!(answer.error_code, code(ResponseError::UnsupportedVersion));
    assert!(answer.api_keys.len() >= 15);
    // And the connection goes on.
    assert_eq!(client.ask(0, &ApiVersionsRequest::default()).await.error_code, 0);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_go_in_and_come_out_in_every_version_of_produce_and_fetch() {
    for under in HOMES {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        let id = create(&mut client, "t", 2, &[]).await;
        let mut next = 0;
        for version in 3..=13 {
            for acks in [1, -1] {
                let sent = produce("t", id, version, acks, &[(1, batch(&[b"a", b"b"], 5))]);
                let answer = client.ask(version, &sent).await;
                let partition = &answer.responses[0].partition_responses[0];
                assert_eq!((partition.error_code, partition.base_offset), (0, next), "version {version}");
                next += 2;
            }
        }
        for version in 4..=18 {
            let answer = client.ask(version, &fetch("t", id, version, &[(0, 0), (1, 0)])).await;
            let topic = &answer.responses[0];
            assert_eq!(topic.partitions.len(), 2, "all partitions asked for are answered");
            let (empty, full) = (&topic.partitions[0], &topic.partitions[1]);
            assert_eq!((empty.error_code, empty.high_watermark), (0, 0));
            assert_eq!(empty.records.as_ref().map(Bytes::len), Some(0), "no records are empty, not null");
            assert_eq!((full.error_code, full.high_watermark, full.last_stable_offset), (0, next, next));
            if version >= 5 {
                assert_eq!(full.log_start_offset, 0);
            }
            let read = values(full.records.as_ref());
            assert_eq!(read.len() as i64, next);
            assert!(read.keys().copied().eq(0..next));
        }
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_returns_whole_batches_within_limits_and_at_least_one() {
    for under in HOMES {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        let id = create(&mut client, "t", 2, &[]).await;
        let big = vec![b'x'; 10_000];
        for partition in 0..2 {
            for _ in 0..5 {
                let records: Vec<&[u8]> = vec![&big; 3];
                let sent = produce("t", id, 13, 1, &[(partition, batch(&records, 5))]);
                assert_eq!(client.ask(13, &sent).await.responses[0].partition_responses[0].error_code, 0);
            }
        }
        // From the middle of a batch: the whole batch, which begins before.
        let mut request = fetch("t", id, 13, &[(0, 4)]);
        request.topics[0].partitions[0].partition_max_bytes = 40_000;
        let answer = client.ask(13, &request).await;
        let read = values(answer.responses[0].partitions[0].records.as_ref());
        assert!(read.keys().copied().eq(3..6), "{:?}", read.keys());
        // Limits smaller than a batch: one batch, of one partition.
        let mut request = fetch("t", id, 13, &[(0, 0), (1, 0)]);
        request.max_bytes = 1;
        request.topics[0].partitions[0].partition_max_bytes = 1;
        let answer = client.ask(13, &request).await;
        let partitions = &answer.responses[0].partitions;
        assert_eq!(values(partitions[0].records.as_ref()).len(), 3);
        assert_eq!(values(partitions[1].records.as_ref()).len(), 0);
        // The limit of the whole response counts over partitions.
        let mut request = fetch("t", id, 13, &[(0, 0), (1, 0)]);
        request.max_bytes = 100_000;
        let answer = client.ask(13, &request).await;
        let total: usize =
            answer.responses[0].partitions.iter().map(|p| p.records.as_ref().map_or(0, Bytes::len)).sum();
        assert!((60_000..=100_000).contains(&total), "{total}");
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_waits_for_records_and_not_longer_than_it_was_told() {
    for under in HOMES {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        let id = create(&mut client, "t", 1, &[]).await;
        let started = Instant::now();
        let answer = client.ask(13, &fetch("t", id, 13, &[(0, 0)]).with_max_wait_ms(300)).await;
        assert_eq!(values(answer.responses[0].partitions[0].records.as_ref()).len(), 0);
        assert!(started.elapsed() >= Duration::from_millis(290));

        let waiting = client.send(13, &fetch("t", id, 13, &[(0, 0)]).with_max_wait_ms(20_000)).await;
        assert!(client.is_silent_for(Duration::from_millis(100)).await);
        let started = Instant::now();
        produced(&mut broker.client().await, "t", &[b"now"]).await;
        let answer = client.receive_as::<FetchRequest>(13, waiting).await;
        assert!(started.elapsed() < Duration::from_secs(10), "the record wakes it");
        assert_eq!(values(answer.responses[0].partitions[0].records.as_ref())[&0], "now");

        // An error is no reason to wait.
        let started = Instant::now();
        let answer = client.ask(13, &fetch("t", id, 13, &[(0, 99)]).with_max_wait_ms(20_000)).await;
        assert_eq!(answer.responses[0].partitions[0].error_code, code(ResponseError::OffsetOutOfRange));
        assert!(started.elapsed() < Duration::from_secs(10));
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fetches_get_the_protocols_own_errors() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = broker.client().await;
    let id = create(&mut client, "t", 1, &[]).await;
    let error = |answer: &FetchResponse| answer.responses[0].partitions[0].error_code;
    let unknown = client.ask(12, &fetch("nope", Uuid::nil(), 12, &[(0, 0)])).await;
    assert_eq!(error(&unknown), code(ResponseError::UnknownTopicOrPartition));
    let unknown = client.ask(13, &fetch("", Uuid::from_u128(5), 13, &[(0, 0)])).await;
    assert_eq!(error(&unknown), code(ResponseError::UnknownTopicId));
    let unknown = client.ask(13, &fetch("t", id, 13, &[(7, 0)])).await;
    assert_eq!(error(&unknown), code(ResponseError::UnknownTopicOrPartition));
    let mut request = fetch("t", id, 13, &[(0, 0)]);
    request.topics[0].partitions[0].current_leader_epoch = 1000;
    assert_eq!(error(&client.ask(13, &request).await), code(ResponseError::UnknownLeaderEpoch));
    let negative = client.ask(13, &fetch("t", id, 13, &[(0, -5)])).await;
    assert_eq!(error(&negative), code(ResponseError::OffsetOutOfRange));
    let session = fetch("t", id, 13, &[(0, 0)]).with_session_id(77).with_session_epoch(3);
    let answer = client.ask(13, &session).await;
    assert_eq!(answer.error_code, code(ResponseError::FetchSessionIdNotFound));
    // A client that would like a session gets id 0 and everything.
    let answer = client.ask(13, &fetch("t", id, 13, &[(0, 0)]).with_session_epoch(0)).await;
    assert_eq!((answer.session_id, answer.error_code, answer.responses.len()), (0, 0, 1));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_produces_get_the_protocols_own_errors_and_change_nothing() {
    for under in HOMES {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        let id = create(&mut client, "t", 1, &[("max.message.bytes", "1000")]).await;
        let good = batch(&[b"good"], 5);
        let mut flipped = BytesMut::from(&good[..]);
        *flipped.last_mut().unwrap() ^= 1;
        let mut old = BytesMut::from(&good[..]);
        old[16] = 1;
        let large = batch(&[&[0; 2000]], 5);
        let cases: Vec<(Bytes, i32, ResponseError)> = vec![
            (flipped.freeze(), 0, ResponseError::CorruptMessage),
            (old.freeze(), 0, ResponseError::UnsupportedForMessageFormat),
            (good.slice(..good.len() - 3), 0, ResponseError::CorruptMessage),
            (Bytes::from_static(b"garbage"), 0, ResponseError::CorruptMessage),
            (Bytes::new(), 0, ResponseError::InvalidRecord),
            (large, 0, ResponseError::MessageTooLarge),
            (good.clone(), 9, ResponseError::UnknownTopicOrPartition),
        ];
        for (records, partition, expected) in cases {
            for acks in [1, -1] {
                let sent = produce("t", id, 12, acks, &[(partition, records.clone())]);
                let answer = client.ask(12, &sent).await;
                let got = &answer.responses[0].partition_responses[0];
                assert_eq!(got.error_code, code(expected), "{expected:?}: {:?}", got.error_message);
                assert_eq!(got.base_offset, -1);
            }
        }
        let wrong = client.ask(12, &produce("t", id, 12, 2, &[(0, good.clone())])).await;
        let got = wrong.responses[0].partition_responses[0].error_code;
        assert_eq!(got, code(ResponseError::InvalidRequiredAcks));
        let internal = client.ask(12, &produce("__consumer_offsets", id, 12, 1, &[(0, good.clone())])).await;
        let got = internal.responses[0].partition_responses[0].error_code;
        assert!([3, code(ResponseError::InvalidTopicException)].contains(&got), "{got}");
        let marker = Marker { outcome: Outcome::Commit, coordinator_epoch: 0 }.batch(1, 0, 1).freeze();
        let answer = client.ask(12, &produce("t", id, 12, -1, &[(0, marker)])).await;
        let got = &answer.responses[0].partition_responses[0];
        assert_eq!(got.error_code, code(ResponseError::InvalidRecord), "clients write no markers");
        // One bad partition does not spoil a good one.
        let both = produce("t", id, 12, -1, &[(5, good.clone()), (0, good)]);
        let answer = client.ask(12, &both).await;
        let by_index: BTreeMap<i32, (i16, i64)> = answer.responses[0]
            .partition_responses
            .iter()
            .map(|p| (p.index, (p.error_code, p.base_offset)))
            .collect();
        assert_eq!(by_index[&5].0, code(ResponseError::UnknownTopicOrPartition));
        assert_eq!(by_index[&0], (0, 0), "nothing was appended by all the refused ones");
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ancient_produces_are_refused_by_name() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = broker.client().await;
    for version in 0..3i16 {
        let mut body = vec![0, 0];
        body.extend(version.to_be_bytes());
        body.extend(7i32.to_be_bytes());
        body.extend((-1i16).to_be_bytes()); // no client id
        body.extend(1i16.to_be_bytes()); // acks
        body.extend(1000i32.to_be_bytes());
        body.extend(1i32.to_be_bytes());
        body.extend([0, 1, b't']);
        body.extend(1i32.to_be_bytes());
        body.extend(0i32.to_be_bytes());
        body.extend(2i32.to_be_bytes());
        body.extend([1, 2]);
        let mut frame = (body.len() as i32).to_be_bytes().to_vec();
        frame.extend(body);
        client.write(&frame).await;
        let answer = client.read_frame().await.expect("an answer");
        assert_eq!(&answer[..4], 7i32.to_be_bytes());
        // correlation, one topic "t", one partition, index 0, then the error.
        assert_eq!(&answer[4..15], [0, 0, 0, 1, 0, 1, b't', 0, 0, 0, 1]);
        assert_eq!(&answer[19..21], code(ResponseError::UnsupportedVersion).to_be_bytes());
        let expected = 21 + 8 + if version >= 2 { 8 } else { 0 } + if version >= 1 { 4 } else { 0 };
        assert_eq!(answer.len(), expected, "version {version}");
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idempotent_producers_are_held_to_their_sequences() {
    for under in HOMES {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        let id = create(&mut client, "t", 1, &[]).await;
        let mut ids = Vec::new();
        for version in 0..=5 {
            let request = InitProducerIdRequest::default().with_transactional_id(None);
            let answer = client.ask(version, &request.with_transaction_timeout_ms(1)).await;
            assert_eq!((answer.error_code, answer.producer_epoch), (0, 0));
            ids.push(answer.producer_id.0);
        }
        let unique: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(unique.len(), 6, "{ids:?}");
        let pid = ids[0];
        let send = |sequence| produce("t", id, 12, -1, &[(0, batch_of(&[b"x", b"y"], 5, pid, 0, sequence))]);
        let result = |answer: ProduceResponse| {
            let p = &answer.responses[0].partition_responses[0];
            (p.error_code, p.base_offset)
        };
        assert_eq!(result(client.ask(12, &send(0)).await), (0, 0));
        assert_eq!(result(client.ask(12, &send(2)).await), (0, 2));
        assert_eq!(result(client.ask(12, &send(2)).await), (0, 2), "a repeated batch has its first offset");
        let gap = result(client.ask(12, &send(8)).await);
        assert_eq!(gap.0, code(ResponseError::OutOfOrderSequenceNumber));
        let transactional =
            InitProducerIdRequest::default().with_transactional_id(Some(TransactionalId(text("tx"))));
        let refused = client.ask(4, &transactional).await;
        assert_eq!((refused.error_code, refused.producer_id.0), (code(ResponseError::InvalidRequest), -1));
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_describes_and_makes_topics_in_every_version() {
    for under in HOMES {
        let broker = Running::start(under, &["num.partitions=3"]).await;
        let mut client = broker.client().await;
        let id = create(&mut client, "made", 2, &[]).await;
        assert!(!id.is_nil());
        for version in 0..=13 {
            let all = if version == 0 { Some(Vec::new()) } else { None };
            let answer = client.ask(version, &MetadataRequest::default().with_topics(all)).await;
            assert_eq!(answer.brokers.len(), 1);
            assert_eq!(answer.brokers[0].port, i32::from(broker.address.port()));
            if version >= 2 {
                assert_eq!(answer.cluster_id.as_deref(), Some(broker.broker.store.cluster_id()));
            }
            if version >= 1 {
                assert_eq!(answer.controller_id, answer.brokers[0].node_id);
            }
            let made = answer.topics.iter().find(|t| t.name == Some(topic_name("made"))).expect("the topic");
            assert_eq!((made.error_code, made.partitions.len()), (0, 2));
            assert_eq!(made.partitions[1].leader_id, answer.brokers[0].node_id);
            assert_eq!(made.partitions[1].isr_nodes.len(), 1);
            if version >= 10 {
                assert_eq!(made.topic_id, id, "topic ids are stable");
            }
            let name = format!("auto-{version}");
            let wanted = MetadataRequestTopic::default().with_name(Some(topic_name(&name)));
            let answer =
                client.ask(version, &MetadataRequest::default().with_topics(Some(vec![wanted]))).await;
            assert_eq!((answer.topics[0].error_code, answer.topics[0].partitions.len()), (0, 3));
        }
        let ask = async |client: &mut Client, name: &str, allow: bool| {
            let wanted = MetadataRequestTopic::default().with_name(Some(topic_name(name)));
            let request = MetadataRequest::default()
                .with_topics(Some(vec![wanted]))
                .with_allow_auto_topic_creation(allow);
            client.ask(12, &request).await.topics[0].error_code
        };
        for bad in ["", ".", "..", "sp ace", "sla/sh", &"x".repeat(250)] {
            assert_eq!(
                ask(&mut client, bad, true).await,
                code(ResponseError::InvalidTopicException),
                "{bad:?}"
            );
        }
        assert_eq!(ask(&mut client, "absent", false).await, code(ResponseError::UnknownTopicOrPartition));
        assert_eq!(ask(&mut client, "absent", false).await, code(ResponseError::UnknownTopicOrPartition));
        let by_id = |id| MetadataRequestTopic::default().with_name(None).with_topic_id(id);
        for version in 10..=13 {
            if version < 12 {
                continue; // null names come with version 12
            }
            let request =
                MetadataRequest::default().with_topics(Some(vec![by_id(id), by_id(Uuid::from_u128(9))]));
            let answer = client.ask(version, &request).await;
            assert_eq!(answer.topics[0].name, Some(topic_name("made")));
            assert_eq!(answer.topics[1].error_code, code(ResponseError::UnknownTopicId));
        }
        let none = client.ask(12, &MetadataRequest::default().with_topics(Some(Vec::new()))).await;
        assert!(none.topics.is_empty(), "from version 1 an empty list means none");
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn auto_creation_can_be_switched_off() {
    let broker = Running::start(Under::Directory, &["auto.create.topics.enable=false"]).await;
    let mut client = broker.client().await;
    let wanted = MetadataRequestTopic::default().with_name(Some(topic_name("t")));
    let answer = client.ask(12, &MetadataRequest::default().with_topics(Some(vec![wanted]))).await;
    assert_eq!(answer.topics[0].error_code, code(ResponseError::UnknownTopicOrPartition));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_are_made_and_deleted_in_every_version() {
    for under in HOMES {
        let broker = Running::start(under, &["num.partitions=4"]).await;
        let mut client = broker.client().await;
        for version in 2..=7 {
            let name = format!("t{version}");
            let topic = CreatableTopic::default()
                .with_name(topic_name(&name))
                .with_num_partitions(if version >= 4 { -1 } else { 4 })
                .with_replication_factor(if version >= 4 { -1 } else { 1 });
            let request = CreateTopicsRequest::default().with_topics(vec![topic]);
            let dry = client.ask(version, &request.clone().with_validate_only(true)).await;
            assert_eq!(dry.topics[0].error_code, 0);
            assert!(broker.broker.store.topic(&name).is_none(), "validate_only makes nothing");
            let made = client.ask(version, &request).await;
            assert_eq!(made.topics[0].error_code, 0);
            if version >= 5 {
                assert_eq!(made.topics[0].num_partitions, 4);
                let configs = made.topics[0].configs.as_ref().unwrap();
                assert!(configs.iter().any(|c| &*c.name == "retention.ms"));
            }
            assert_eq!(broker.broker.store.topic(&name).unwrap().partitions().len(), 4);
            let again = client.ask(version, &request).await;
            assert_eq!(again.topics[0].error_code, code(ResponseError::TopicAlreadyExists));
        }
        for version in 1..=6 {
            let name = format!("t{}", version + 1);
            let request = |name: &str| {
                let request = DeleteTopicsRequest::default().with_timeout_ms(1000);
                if version >= 6 {
                    let state = DeleteTopicState::default().with_name(Some(topic_name(name)));
                    request.with_topics(vec![state])
                } else {
                    request.with_topic_names(vec![topic_name(name)])
                }
            };
            let gone = client.ask(version, &request(&name)).await;
            assert_eq!(gone.responses[0].error_code, 0);
            assert!(broker.broker.store.topic(&name).is_none());
            let again = client.ask(version, &request(&name)).await;
            assert_eq!(again.responses[0].error_code, code(ResponseError::UnknownTopicOrPartition));
        }
        let id = create(&mut client, "by-id", 1, &[]).await;
        let state = DeleteTopicState::default().with_name(None).with_topic_id(id);
        let gone = client.ask(6, &DeleteTopicsRequest::default().with_topics(vec![state])).await;
        assert_eq!(gone.responses[0].error_code, 0);
        assert_eq!(gone.responses[0].name, Some(topic_name("by-id")));
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_creations_are_refused_topic_by_topic() {
    let broker = Running::start(Under::Directory, &[]).await;
    let mut client = broker.client().await;
    let plain = |name: &str| {
        let topic = CreatableTopic::default().with_name(topic_name(name));
        topic.with_num_partitions(1).with_replication_factor(1)
    };
    let config = |key: &str, value: &str| {
        vec![CreatableTopicConfig::default().with_name(text(key)).with_value(Some(text(value)))]
    };
    let wrong = [
        (plain("a").with_num_partitions(0), ResponseError::InvalidPartitions),
        (plain("b").with_num_partitions(i32::MAX), ResponseError::InvalidPartitions),
        (plain("c").with_replication_factor(3), ResponseError::InvalidReplicationFactor),
        (plain("d e"), ResponseError::InvalidTopicException),
        (plain("f").with_configs(config("retention.ms", "soon")), ResponseError::InvalidConfig),
        (plain("g").with_configs(config("no.such.key", "1")), ResponseError::InvalidConfig),
        (plain("__consumer_offsets"), ResponseError::InvalidTopicException),
        (plain("twice"), ResponseError::InvalidRequest),
    ];
    let mut topics: Vec<CreatableTopic> = wrong.iter().map(|(topic, _)| topic.clone()).collect();
    topics.push(plain("twice"));
    topics.push(plain("fine"));
    let answer = client.ask(7, &CreateTopicsRequest::default().with_topics(topics)).await;
    for ((topic, expected), got) in wrong.iter().zip(&answer.topics) {
        assert_eq!(got.name, topic.name);
        assert_eq!(got.error_code, code(*expected), "{:?}: {:?}", topic.name, got.error_message);
        assert!(got.error_message.is_some());
    }
    assert_eq!(answer.topics.last().unwrap().error_code, 0, "a wrong topic does not spoil a right one");
    let broker = broker.restart(&["delete.topic.enable=false"]).await;
    let mut client = broker.client().await;
    let request = DeleteTopicsRequest::default().with_topic_names(vec![topic_name("fine")]);
    let refused = client.ask(5, &request).await;
    assert_eq!(refused.responses[0].error_code, code(ResponseError::TopicDeletionDisabled));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_are_listed_by_end_and_by_time_in_every_version() {
    for under in HOMES {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        create(&mut client, "t", 1, &[]).await;
        for n in 0..5i64 {
            let sent = produce("t", Uuid::nil(), 12, 1, &[(0, batch(&[b"a", b"b"], 1000 + 100 * n))]);
            assert_eq!(client.ask(12, &sent).await.responses[0].partition_responses[0].error_code, 0);
        }
        let ask = async |client: &mut Client, version: i16, partition: i32, timestamp: i64| {
            let wanted =
                ListOffsetsPartition::default().with_partition_index(partition).with_timestamp(timestamp);
            let topic = ListOffsetsTopic::default().with_name(topic_name("t")).with_partitions(vec![wanted]);
            let request =
                ListOffsetsRequest::default().with_replica_id(BrokerId(-1)).with_topics(vec![topic]);
            let answer = client.ask(version, &request).await;
            let p = &answer.topics[0].partitions[0];
            (p.error_code, p.offset, p.timestamp)
        };
        for version in 1..=10 {
            assert_eq!(ask(&mut client, version, 0, -1).await, (0, 10, -1), "latest");
            assert_eq!(ask(&mut client, version, 0, -2).await, (0, 0, -1), "earliest");
            assert_eq!(ask(&mut client, version, 0, 0).await, (0, 0, 1000));
            assert_eq!(ask(&mut client, version, 0, 1101).await, (0, 3, 1101));
            assert_eq!(ask(&mut client, version, 0, 1102).await, (0, 4, 1200));
            assert_eq!(ask(&mut client, version, 0, 5000).await, (0, -1, -1), "nothing so late");
            let unknown = ask(&mut client, version, 3, -1).await;
            assert_eq!(unknown.0, code(ResponseError::UnknownTopicOrPartition));
            let max = ask(&mut client, version, 0, -3).await;
            if version >= 7 {
                assert_eq!(max, (0, 9, 1401), "the largest timestamp");
            } else {
                assert_eq!(max.0, code(ResponseError::UnsupportedVersion));
            }
            if version >= 8 {
                assert_eq!(ask(&mut client, version, 0, -4).await, (0, 0, -1), "earliest local");
            }
            if version >= 9 {
                assert_eq!(ask(&mut client, version, 0, -5).await, (0, -1, -1), "nothing is tiered");
            }
        }
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cluster_and_its_configuration_are_described() {
    let broker = Running::start(Under::Directory, &["log.retention.ms=12345"]).await;
    let mut client = broker.client().await;
    for version in 0..=2 {
        let answer = client.ask(version, &DescribeClusterRequest::default().with_endpoint_type(1)).await;
        assert_eq!((answer.error_code, answer.brokers.len()), (0, 1));
        assert_eq!(&*answer.cluster_id, broker.broker.store.cluster_id());
    }
    create(&mut client, "t", 1, &[("cleanup.policy", "compact")]).await;
    for version in 1..=4 {
        let topic = DescribeConfigsResource::default()
            .with_resource_type(2)
            .with_resource_name(text("t"))
            .with_configuration_keys(None);
        let node = DescribeConfigsResource::default()
            .with_resource_type(4)
            .with_resource_name(text("1"))
            .with_configuration_keys(None);
        let absent = DescribeConfigsResource::default()
            .with_resource_type(2)
            .with_resource_name(text("absent"))
            .with_configuration_keys(None);
        let request = DescribeConfigsRequest::default()
            .with_resources(vec![topic, node, absent])
            .with_include_synonyms(true);
        let answer = client.ask(version, &request).await;
        let find = |n: usize, key: &str| {
            let config = answer.results[n].configs.iter().find(|c| &*c.name == key).expect("the key");
            (config.value.as_ref().map(ToString::to_string), config.config_source)
        };
        assert_eq!(find(0, "cleanup.policy"), (Some("compact".into()), 1));
        assert_eq!(find(0, "retention.ms"), (Some("12345".into()), 4));
        assert_eq!(find(0, "segment.bytes"), (Some("1073741824".into()), 5));
        assert_eq!(find(1, "log.retention.ms"), (Some("12345".into()), 4));
        assert_eq!(find(1, "log.retention.minutes"), (None, 5));
        assert_eq!(answer.results[2].error_code, code(ResponseError::UnknownTopicOrPartition));
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_is_there_after_a_restart() {
    for under in HOMES {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        let id = create(&mut client, "t", 1, &[]).await;
        for n in 0..10u8 {
            assert_eq!(produced(&mut client, "t", &[&[n]]).await, i64::from(n));
        }
        let cluster = broker.broker.store.cluster_id().to_owned();
        let broker = broker.restart(&[]).await;
        assert_eq!(broker.broker.store.cluster_id(), cluster);
        let mut client = broker.client().await;
        let answer = client.ask(13, &fetch("t", id, 13, &[(0, 0)])).await;
        let read = values(answer.responses[0].partitions[0].records.as_ref());
        assert!(read.values().map(|v| v[0]).eq(0..10), "the topic id and the records are the same");
        broker.stop().await;
    }
}

/// Keeps the version sweeps honest: whoever advertises an API also tests all its versions, here or beside.
#[test]
fn every_served_api_has_its_sweep() {
    let swept = [
        ProduceRequest::KEY,
        FetchRequest::KEY,
        ListOffsetsRequest::KEY,
        MetadataRequest::KEY,
        ApiVersionsRequest::KEY,
        CreateTopicsRequest::KEY,
        DeleteTopicsRequest::KEY,
        InitProducerIdRequest::KEY,
        DescribeConfigsRequest::KEY,
        DescribeClusterRequest::KEY,
        // In broker_transactions.rs:
        DescribeProducersRequest::KEY,
        OffsetForLeaderEpochRequest::KEY,
        // In broker_cleaning.rs:
        DeleteRecordsRequest::KEY,
        // In broker_groups.rs:
        FindCoordinatorRequest::KEY,
        JoinGroupRequest::KEY,
        SyncGroupRequest::KEY,
        HeartbeatRequest::KEY,
        LeaveGroupRequest::KEY,
        OffsetCommitRequest::KEY,
        OffsetFetchRequest::KEY,
        ListGroupsRequest::KEY,
        DescribeGroupsRequest::KEY,
        DeleteGroupsRequest::KEY,
    ];
    for api in broker::wire::apis::SERVED {
        assert!(swept.contains(&api.key), "API {} is advertised and not swept", api.key);
    }
}
