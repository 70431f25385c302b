//! `DeleteRecords` over the wire, in every version.

use kafka_protocol::ResponseError;
use kafka_protocol::messages::create_topics_request::{CreatableTopic, CreatableTopicConfig};
use kafka_protocol::messages::delete_records_request::{DeleteRecordsPartition, DeleteRecordsTopic};
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::*;
use kafka_protocol::protocol::StrBytes;
use tests::broker::{Client, Running, Under, batch};

fn text(of: &str) -> StrBytes {
    StrBytes::from_string(of.to_owned())
}

async fn create(client: &mut Client, name: &str, policy: &str) {
    let config =
        CreatableTopicConfig::default().with_name(text("cleanup.policy")).with_value(Some(text(policy)));
    let topic = CreatableTopic::default()
        .with_name(TopicName(text(name)))
        .with_num_partitions(1)
        .with_replication_factor(1)
        .with_configs(vec![config]);
    let made = client.ask(7, &CreateTopicsRequest::default().with_topics(vec![topic])).await;
    assert_eq!(made.topics[0].error_code, 0, "{:?}", made.topics[0].error_message);
}

async fn delete(client: &mut Client, version: i16, topic: &str, partition: i32, offset: i64) -> (i16, i64) {
    let partition = DeleteRecordsPartition::default().with_partition_index(partition).with_offset(offset);
    let topic =
        DeleteRecordsTopic::default().with_name(TopicName(text(topic))).with_partitions(vec![partition]);
    let request = DeleteRecordsRequest::default().with_topics(vec![topic]).with_timeout_ms(10_000);
    let answer = client.ask(version, &request).await;
    let partition = &answer.topics[0].partitions[0];
    (partition.error_code, partition.low_watermark)
}

async fn start_of(client: &mut Client, topic: &str) -> i64 {
    let partition = ListOffsetsPartition::default().with_partition_index(0).with_timestamp(-2);
    let topic =
        ListOffsetsTopic::default().with_name(TopicName(text(topic))).with_partitions(vec![partition]);
    let request = ListOffsetsRequest::default().with_replica_id(BrokerId(-1)).with_topics(vec![topic]);
    client.ask(5, &request).await.topics[0].partitions[0].offset
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_deleted_in_every_version() {
    for under in [Under::Directory, Under::Volume] {
        let broker = Running::start(under, &[]).await;
        let mut client = broker.client().await;
        create(&mut client, "t", "delete").await;
        create(&mut client, "compacted", "compact").await;
        let data = PartitionProduceData::default().with_index(0);
        let ten = data.with_records(Some(batch(&[b"v".as_slice(); 10], 1000)));
        let topic =
            TopicProduceData::default().with_name(TopicName(text("t"))).with_partition_data(vec![ten]);
        let request = ProduceRequest::default().with_acks(-1).with_timeout_ms(10_000);
        let answer = client.ask(12, &request.with_topic_data(vec![topic])).await;
        assert_eq!(answer.responses[0].partition_responses[0].error_code, 0);
        for version in 0..=2 {
            let to = i64::from(version) * 2 + 3;
            assert_eq!(delete(&mut client, version, "t", 0, to).await, (0, to));
            assert_eq!(start_of(&mut client, "t").await, to);
            let refused = |error: ResponseError| (error.code(), -1);
            let beyond = delete(&mut client, version, "t", 0, 11).await;
            assert_eq!(beyond, refused(ResponseError::OffsetOutOfRange));
            let nowhere = refused(ResponseError::UnknownTopicOrPartition);
            assert_eq!(delete(&mut client, version, "t", 9, 1).await, nowhere);
            assert_eq!(delete(&mut client, version, "none", 0, 1).await, nowhere);
            let kept = delete(&mut client, version, "compacted", 0, 0).await;
            assert_eq!(kept, refused(ResponseError::PolicyViolation));
        }
        assert_eq!(delete(&mut client, 2, "t", 0, -1).await, (0, 10), "-1 is the high watermark");
        let broker = broker.restart(&[]).await;
        let mut client = broker.client().await;
        assert_eq!(start_of(&mut client, "t").await, 10);
        broker.stop().await;
    }
}
