//! What each API does, a file per family. A handler gets a decoded body, which it may trust to be well-formed and
//! nothing else, and gives back a framed response.

pub mod admin;
pub mod cluster;
pub mod fetch;
pub mod groups;
pub mod logs;
pub mod offsets;
pub mod produce;
pub mod records;
pub mod topics;

use kafka_protocol::ResponseError;
use kafka_protocol::protocol::StrBytes;
use logstore::{Partition, Store, Topic};
use std::sync::Arc;
use uuid::Uuid;

/// `NONE`.
pub const OK: i16 = 0;

fn text(of: impl Into<String>) -> StrBytes {
    StrBytes::from_string(of.into())
}

/// A topic by name or, in versions that name topics by id, by id.
fn topic_of(store: &Store, by_id: bool, name: &str, id: Uuid) -> Result<Arc<Topic>, ResponseError> {
    if by_id {
        store.topic_by_id(id).ok_or(ResponseError::UnknownTopicId)
    } else {
        store.topic(name).ok_or(ResponseError::UnknownTopicOrPartition)
    }
}

fn partition_of(
    topic: &Result<Arc<Topic>, ResponseError>,
    index: i32,
) -> Result<Arc<Partition>, ResponseError> {
    match topic {
        Ok(topic) => topic.partition(index).cloned().ok_or(ResponseError::UnknownTopicOrPartition),
        Err(error) => Err(*error),
    }
}

/// What a client's idea of the leader epoch is worth (-1: it has none).
fn check_epoch(partition: &Partition, claimed: i32) -> Result<(), ResponseError> {
    match claimed.cmp(&partition.leader_epoch()) {
        _ if claimed < 0 => Ok(()),
        std::cmp::Ordering::Less => Err(ResponseError::FencedLeaderEpoch),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(ResponseError::UnknownLeaderEpoch),
    }
}
