//! `DeleteRecords`: moves the start of logs up. Answered once the new start is durable.

use super::{OK, partition_of, topic_of};
use crate::broker::is_internal;
use crate::dispatch::Context;
use crate::errors;
use crate::send::Response;
use crate::wire::EncodeError;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::delete_records_response::{
    DeleteRecordsPartitionResult, DeleteRecordsTopicResult,
};
use kafka_protocol::messages::{DeleteRecordsRequest, DeleteRecordsResponse};
use logstore::Topic;
use std::sync::Arc;
use uuid::Uuid;

/// Stands for the high watermark in a request.
const HIGH_WATERMARK: i64 = -1;

/// `DeleteRecords`.
pub async fn delete(context: &Context, body: DeleteRecordsRequest) -> Result<Response, EncodeError> {
    let mut response = DeleteRecordsResponse::default();
    for topic in body.topics {
        let found = topic_of(&context.broker.store, false, &topic.name, Uuid::nil());
        let mut answered = DeleteRecordsTopicResult::default().with_name(topic.name);
        for wanted in topic.partitions {
            let result = DeleteRecordsPartitionResult::default().with_partition_index(wanted.partition_index);
            answered.partitions.push(match delete_one(&found, wanted.partition_index, wanted.offset).await {
                Ok(start) => result.with_error_code(OK).with_low_watermark(start),
                Err(error) => result.with_error_code(error.code()).with_low_watermark(-1),
            });
        }
        response.topics.push(answered);
    }
    context.respond(&response)
}

async fn delete_one(
    topic: &Result<Arc<Topic>, ResponseError>,
    index: i32,
    offset: i64,
) -> Result<i64, ResponseError> {
    let partition = partition_of(topic, index)?;
    if is_internal(partition.topic()) {
        return Err(ResponseError::InvalidTopicException);
    }
    // Who keeps the last record of each key does not want it deleted by its age.
    if topic.as_ref().is_ok_and(|topic| !topic.config().cleanup_policy.delete) {
        return Err(ResponseError::PolicyViolation);
    }
    let before = if offset == HIGH_WATERMARK { partition.offsets().high_watermark } else { offset };
    partition.delete_records_before(before).await.map_err(|error| {
        let code = errors::kafka(&error);
        if code == ResponseError::KafkaStorageError {
            tracing::error!(%error, "records could not be deleted");
        }
        code
    })
}
