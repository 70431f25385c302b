//! `OffsetForLeaderEpoch` and `DescribeProducers`: what a log says of its epochs and of who writes to it.

use super::{OK, check_epoch, partition_of, text, topic_of};
use crate::dispatch::Context;
use crate::errors;
use crate::send::Response;
use crate::wire::EncodeError;
use kafka_protocol::messages::describe_producers_response::{
    PartitionResponse, ProducerState, TopicResponse,
};
use kafka_protocol::messages::offset_for_leader_epoch_response::{
    EpochEndOffset, OffsetForLeaderTopicResult,
};
use kafka_protocol::messages::{
    DescribeProducersRequest, DescribeProducersResponse, OffsetForLeaderEpochRequest,
    OffsetForLeaderEpochResponse, ProducerId,
};
use uuid::Uuid;

/// Epoch or offset that is not known.
const UNKNOWN: i32 = -1;

/// `OffsetForLeaderEpoch`: where an epoch ended, so that a consumer notices that what it read was cut off.
pub fn offset_for_leader_epoch(
    context: &Context,
    body: OffsetForLeaderEpochRequest,
) -> Result<Response, EncodeError> {
    let mut response = OffsetForLeaderEpochResponse::default();
    for topic in body.topics {
        let found = topic_of(&context.broker.store, false, &topic.topic, Uuid::nil());
        let mut answered = OffsetForLeaderTopicResult::default().with_topic(topic.topic);
        for wanted in topic.partitions {
            let partition = partition_of(&found, wanted.partition)
                .and_then(|p| check_epoch(&p, wanted.current_leader_epoch).map(|()| p));
            let (error, end) = match partition {
                Ok(partition) => (OK, partition.end_of_epoch(wanted.leader_epoch)),
                Err(error) => (error.code(), None),
            };
            let (epoch, offset) = end.unwrap_or((UNKNOWN, i64::from(UNKNOWN)));
            answered.partitions.push(
                EpochEndOffset::default()
                    .with_partition(wanted.partition)
                    .with_error_code(error)
                    .with_leader_epoch(epoch)
                    .with_end_offset(offset),
            );
        }
        response.topics.push(answered);
    }
    context.respond(&response)
}

/// `DescribeProducers`.
pub async fn describe_producers(
    context: &Context,
    body: DescribeProducersRequest,
) -> Result<Response, EncodeError> {
    let mut response = DescribeProducersResponse::default();
    for topic in body.topics {
        let found = topic_of(&context.broker.store, false, &topic.name, Uuid::nil());
        let mut answered = TopicResponse::default().with_name(topic.name);
        for index in topic.partition_indexes {
            let described = PartitionResponse::default().with_partition_index(index);
            answered.partitions.push(match partition_of(&found, index) {
                Ok(partition) => match partition.producers().await {
                    Ok(states) => described.with_active_producers(states.iter().map(state).collect()),
                    Err(error) => {
                        let code = errors::kafka(&error).code();
                        described.with_error_code(code).with_error_message(Some(text(error.to_string())))
                    }
                },
                Err(error) => described.with_error_code(error.code()),
            });
        }
        response.topics.push(answered);
    }
    context.respond(&response)
}

fn state(of: &logstore::ProducerState) -> ProducerState {
    ProducerState::default()
        .with_producer_id(ProducerId(of.id))
        .with_producer_epoch(i32::from(of.epoch))
        .with_last_sequence(of.last_sequence)
        .with_last_timestamp(of.last_timestamp)
        .with_coordinator_epoch(of.coordinator_epoch)
        .with_current_txn_start_offset(of.open_from.unwrap_or(-1))
}
