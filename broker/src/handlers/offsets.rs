//! `ListOffsets`, `OffsetCommit` and `OffsetFetch`.

use super::{OK, check_epoch, partition_of, text, topic_of};
use crate::dispatch::Context;
use crate::errors;
use crate::groups::coordinator::Commit;
use crate::groups::records::Committed;
use crate::send::Response;
use crate::wire::EncodeError;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::list_offsets_response::{
    ListOffsetsPartitionResponse, ListOffsetsTopicResponse,
};
use kafka_protocol::messages::offset_commit_response::{
    OffsetCommitResponsePartition, OffsetCommitResponseTopic,
};
use kafka_protocol::messages::offset_fetch_response::{
    OffsetFetchResponseGroup, OffsetFetchResponsePartition, OffsetFetchResponsePartitions,
    OffsetFetchResponseTopic, OffsetFetchResponseTopics,
};
use kafka_protocol::messages::{
    GroupId, ListOffsetsRequest, ListOffsetsResponse, OffsetCommitRequest, OffsetCommitResponse,
    OffsetFetchRequest, OffsetFetchResponse, TopicName,
};
use kafka_protocol::protocol::StrBytes;
use logstore::Partition;
use std::collections::BTreeMap;
use uuid::Uuid;

const LATEST: i64 = -1;
const EARLIEST: i64 = -2;
const MAX_TIMESTAMP: i64 = -3;
const EARLIEST_LOCAL: i64 = -4;
const LATEST_TIERED: i64 = -5;

/// `ListOffsets`.
pub async fn list(context: &Context, body: ListOffsetsRequest) -> Result<Response, EncodeError> {
    let committed = body.isolation_level == 1;
    let mut response = ListOffsetsResponse::default();
    for topic in body.topics {
        let found = topic_of(&context.broker.store, false, &topic.name, Uuid::nil());
        let mut answered = ListOffsetsTopicResponse::default().with_name(topic.name);
        for wanted in topic.partitions {
            let partition = partition_of(&found, wanted.partition_index)
                .and_then(|p| check_epoch(&p, wanted.current_leader_epoch).map(|()| p));
            let place = match &partition {
                Ok(partition) => find(context, partition, wanted.timestamp, committed).await,
                Err(error) => Err(*error),
            };
            let result = ListOffsetsPartitionResponse::default().with_partition_index(wanted.partition_index);
            answered.partitions.push(match (place, partition) {
                (Ok(Some((offset, timestamp))), Ok(partition)) => {
                    let result = result.with_offset(offset).with_timestamp(timestamp);
                    if context.version() >= 4 {
                        result.with_leader_epoch(partition.leader_epoch())
                    } else {
                        result
                    }
                }
                (Err(error), _) | (_, Err(error)) => {
                    result.with_error_code(error.code()).with_offset(-1).with_timestamp(-1)
                }
                (Ok(None), _) => result.with_offset(-1).with_timestamp(-1),
            });
        }
        response.topics.push(answered);
    }
    context.respond(&response)
}

/// An offset, and a timestamp where the question was one of time.
async fn find(
    context: &Context,
    partition: &Partition,
    timestamp: i64,
    committed: bool,
) -> Result<Option<(i64, i64)>, ResponseError> {
    let offsets = partition.offsets();
    let end = if committed { offsets.last_stable } else { offsets.high_watermark };
    let found = match timestamp {
        LATEST => return Ok(Some((end, -1))),
        EARLIEST => return Ok(Some((offsets.log_start, -1))),
        MAX_TIMESTAMP if context.version() >= 7 => partition.offset_of_max_timestamp().await,
        // Nothing is tiered: all there is, is local.
        EARLIEST_LOCAL if context.version() >= 8 => return Ok(Some((offsets.log_start, -1))),
        LATEST_TIERED if context.version() >= 9 => return Ok(None),
        t if t >= 0 => partition.offset_for_timestamp(t).await,
        _ => return Err(ResponseError::UnsupportedVersion),
    };
    match found {
        Ok(found) => Ok(found.filter(|(offset, _)| *offset < end)),
        Err(error) => {
            tracing::error!(%error, "a lookup by time failed");
            Err(errors::kafka(&error))
        }
    }
}

/// `OffsetCommit`: answered once the offsets are on stable storage.
pub async fn commit(context: &Context, body: OffsetCommitRequest) -> Result<Response, EncodeError> {
    let broker = &context.broker;
    let longest = broker.config.offset_metadata_max_bytes as usize;
    let now = broker.runtime.wall_clock().as_millis() as i64;
    let mut offsets = Vec::new();
    let mut response = OffsetCommitResponse::default();
    // Which answers wait for the log's verdict.
    let mut pending = Vec::new();
    for (t, topic) in body.topics.into_iter().enumerate() {
        let found = topic_of(&broker.store, false, &topic.name, Uuid::nil());
        let mut answered = OffsetCommitResponseTopic::default().with_name(topic.name.clone());
        for (p, wanted) in topic.partitions.into_iter().enumerate() {
            let metadata = wanted.committed_metadata.as_deref().unwrap_or_default();
            let error = match partition_of(&found, wanted.partition_index) {
                Err(error) => error.code(),
                Ok(_) if metadata.len() > longest => ResponseError::OffsetMetadataTooLarge.code(),
                Ok(_) => {
                    let committed = Committed {
                        offset: wanted.committed_offset,
                        leader_epoch: wanted.committed_leader_epoch,
                        metadata: metadata.to_owned(),
                        timestamp: now,
                    };
                    offsets.push((topic.name.to_string(), wanted.partition_index, committed));
                    pending.push((t, p));
                    OK
                }
            };
            answered.partitions.push(
                OffsetCommitResponsePartition::default()
                    .with_partition_index(wanted.partition_index)
                    .with_error_code(error),
            );
        }
        response.topics.push(answered);
    }
    let commit = Commit {
        group: &body.group_id,
        member_id: &body.member_id,
        instance_id: body.group_instance_id.as_deref(),
        generation: body.generation_id_or_member_epoch,
        offsets,
    };
    if let Err(error) = broker.groups.commit(commit).await {
        for (t, p) in pending {
            response.topics[t].partitions[p].error_code = error.code();
        }
    }
    context.respond(&response)
}

/// What a partition without a committed offset answers.
const NONE: (i64, i32) = (-1, -1);

/// `OffsetFetch`: of one group, or, from version 8, of several.
pub fn fetch(context: &Context, body: OffsetFetchRequest) -> Result<Response, EncodeError> {
    let mut response = OffsetFetchResponse::default();
    if context.version() >= 8 {
        for group in body.groups {
            let wanted = group.topics.map(|topics| {
                topics.into_iter().map(|t| (t.name.to_string(), t.partition_indexes)).collect()
            });
            let mut answered = OffsetFetchResponseGroup::default().with_group_id(group.group_id.clone());
            if let Err(error) = context.broker.groups.check(&group.group_id) {
                response.groups.push(answered.with_error_code(error.code()));
                continue;
            }
            for (topic, partitions) in fetched(context, &group.group_id, wanted) {
                let partitions = partitions.into_iter().map(|(index, (offset, epoch), metadata)| {
                    OffsetFetchResponsePartitions::default()
                        .with_partition_index(index)
                        .with_committed_offset(offset)
                        .with_committed_leader_epoch(epoch)
                        .with_metadata(Some(metadata))
                });
                answered.topics.push(
                    OffsetFetchResponseTopics::default()
                        .with_name(topic)
                        .with_partitions(partitions.collect()),
                );
            }
            response.groups.push(answered);
        }
    } else {
        let refused = context.broker.groups.check(&body.group_id).map_or_else(|error| error.code(), |()| OK);
        if context.version() >= 2 {
            response.error_code = refused;
        }
        let wanted = body
            .topics
            .map(|topics| topics.into_iter().map(|t| (t.name.to_string(), t.partition_indexes)).collect());
        for (topic, partitions) in fetched(context, &body.group_id, wanted) {
            let partitions = partitions.into_iter().map(|(index, (offset, epoch), metadata)| {
                let partition = OffsetFetchResponsePartition::default()
                    .with_partition_index(index)
                    .with_error_code(refused)
                    .with_committed_offset(offset)
                    .with_metadata(Some(metadata));
                if context.version() >= 5 { partition.with_committed_leader_epoch(epoch) } else { partition }
            });
            response.topics.push(
                OffsetFetchResponseTopic::default().with_name(topic).with_partitions(partitions.collect()),
            );
        }
    }
    context.respond(&response)
}

type Fetched = Vec<(TopicName, Vec<(i32, (i64, i32), StrBytes)>)>;

/// The wanted offsets of a group, or all it has.
fn fetched(context: &Context, group: &GroupId, wanted: Option<Vec<(String, Vec<i32>)>>) -> Fetched {
    let groups = &context.broker.groups;
    let answer = |index: i32, committed: Option<Committed>| match committed {
        Some(c) => (index, (c.offset, c.leader_epoch), text(c.metadata)),
        None => (index, NONE, StrBytes::default()),
    };
    if let Some(topics) = wanted {
        let of = |topic: &str, indexes: Vec<i32>| {
            indexes.into_iter().map(|i| answer(i, groups.committed(group, topic, i))).collect()
        };
        return topics
            .into_iter()
            .map(|(t, indexes)| (TopicName(text(t.clone())), of(&t, indexes)))
            .collect();
    }
    let mut all: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for (topic, index, committed) in groups.all_committed(group) {
        all.entry(topic).or_default().push(answer(index, Some(committed)));
    }
    all.into_iter().map(|(topic, partitions)| (TopicName(text(topic)), partitions)).collect()
}
