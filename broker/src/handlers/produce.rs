//! `Produce` and `InitProducerId`.
//!
//! Cost of a produce of one partition besides the log's own: the batches are a slice of the frame (a reference count, no
//! copy); two allocations for the codec's two arrays, one for the result, one for the response. Several partitions
//! are appended at once. The appends are made before the connection's next request is looked at; only the wait for the
//! commit (`acks=all`) is left for later, so that pipelined produces share a flush.

use super::{OK, partition_of, text, topic_of};
use crate::broker::is_internal;
use crate::dispatch::{Answer, Context};
use crate::errors;
use crate::send::Response;
use crate::wire::{self, EncodeError};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::join_all;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::produce_response::{PartitionProduceResponse, TopicProduceResponse};
use kafka_protocol::messages::{
    InitProducerIdRequest, InitProducerIdResponse, ProduceRequest, ProduceResponse, ProducerId,
};
use logstore::batch::Header;
use logstore::{Appended, Topic};
use raid::device::Durability;
use std::sync::Arc;
use std::time::Duration;

/// What became of one partition's batches.
struct Outcome {
    index: i32,
    appended: Result<Appended, (ResponseError, String)>,
}

impl Outcome {
    fn refused(index: i32, error: ResponseError, message: &str) -> Self {
        Self { index, appended: Err((error, message.to_owned())) }
    }
}

/// `Produce`, from version 3.
pub async fn produce(context: Context, body: ProduceRequest) -> Result<Answer, EncodeError> {
    let by_id = context.version() >= 13;
    let refusal = refusal(&body);
    let durability = if body.acks == -1 { Durability::Stable } else { Durability::Cached };
    let mut topics = Vec::with_capacity(body.topic_data.len());
    for topic in body.topic_data {
        let found = topic_of(&context.broker.store, by_id, &topic.name, topic.topic_id);
        let mut outcomes = Vec::with_capacity(topic.partition_data.len());
        let mut appends = Vec::new();
        for data in topic.partition_data {
            match &refusal {
                Some((error, message)) => outcomes.push(Outcome::refused(data.index, *error, message)),
                None => appends.push(append(&context, &found, data.index, data.records, durability)),
            }
        }
        match appends.len() {
            0 => {}
            // The usual case needs no machinery.
            1 => outcomes.push(appends.remove(0).await),
            _ => outcomes.extend(join_all(appends).await),
        }
        topics.push((topic.name, topic.topic_id, outcomes));
    }
    if body.acks == 0 {
        let failed = topics.iter().any(|(_, _, outcomes)| outcomes.iter().any(|o| o.appended.is_err()));
        return Ok(if failed { Answer::Close } else { Answer::Nothing });
    }
    let timeout = Duration::from_millis(u64::try_from(body.timeout_ms).unwrap_or(0));
    let answer = async move {
        let deadline = tokio::time::Instant::now() + timeout;
        let mut response = ProduceResponse::default();
        for (name, id, outcomes) in topics {
            let mut answered = TopicProduceResponse::default().with_name(name).with_topic_id(id);
            for outcome in outcomes {
                answered.partition_responses.push(committed(outcome, deadline).await);
            }
            response.responses.push(answered);
        }
        context.respond(&response)
    };
    Ok(Answer::Later(Box::pin(answer)))
}

/// Why the whole request cannot be served. Whether a batch fits its producer's transaction is the log's to say.
fn refusal(body: &ProduceRequest) -> Option<(ResponseError, &'static str)> {
    if !(-1..=1).contains(&body.acks) {
        return Some((ResponseError::InvalidRequiredAcks, "acks is 0, 1 or -1"));
    }
    None
}

async fn append(
    context: &Context,
    topic: &Result<Arc<Topic>, ResponseError>,
    index: i32,
    records: Option<Bytes>,
    durability: Durability,
) -> Outcome {
    if topic.as_ref().is_ok_and(|topic| is_internal(topic.name())) {
        return Outcome::refused(
            index,
            ResponseError::InvalidTopicException,
            "only the broker writes its own topics",
        );
    }
    let partition = match partition_of(topic, index) {
        Ok(partition) => partition,
        Err(error) => return Outcome { index, appended: Err((error, String::new())) },
    };
    let Some(records) = records.filter(|r| !r.is_empty()) else {
        return Outcome::refused(index, ResponseError::InvalidRecord, "a produce holds at least one batch");
    };
    // As Kafka has it for batches of this format: what is looked into for one request is bounded by one batch.
    if Header::parse(&records).is_ok_and(|header| (header.size as usize) < records.len()) {
        return Outcome::refused(
            index,
            ResponseError::InvalidRecord,
            "a produce holds one batch for each partition, no more",
        );
    }
    let size = records.len() as u64;
    let appended = partition.append(records, durability).await;
    if appended.is_ok() {
        context.broker.metrics.produced.inc_by(size);
    }
    Outcome { index, appended: appended.map_err(|error| explain(&error)) }
}

fn explain(error: &logstore::Error) -> (ResponseError, String) {
    let code = errors::kafka(error);
    if code == ResponseError::KafkaStorageError || code == ResponseError::UnknownServerError {
        tracing::error!(%error, "an append failed");
    }
    (code, error.to_string())
}

/// Waits for the commit, if there is one to wait for.
async fn committed(outcome: Outcome, deadline: tokio::time::Instant) -> PartitionProduceResponse {
    let response = PartitionProduceResponse::default()
        .with_index(outcome.index)
        .with_base_offset(-1)
        .with_log_append_time_ms(-1)
        .with_log_start_offset(-1);
    let durable = match outcome.appended {
        Ok(mut appended) => match appended.commit.take() {
            Some(commit) => match tokio::time::timeout_at(deadline, commit).await {
                Ok(Ok(())) => Ok(appended),
                Ok(Err(error)) => Err(explain(&error)),
                Err(_) => Err((
                    ResponseError::RequestTimedOut,
                    "appended, but not yet on stable storage".to_owned(),
                )),
            },
            None => Ok(appended),
        },
        Err(refused) => Err(refused),
    };
    match durable {
        Ok(appended) => response
            .with_error_code(OK)
            .with_base_offset(appended.base_offset)
            .with_log_append_time_ms(appended.log_append_time.unwrap_or(-1))
            .with_log_start_offset(appended.log_start),
        Err((error, message)) => response
            .with_error_code(error.code())
            .with_error_message((!message.is_empty()).then(|| text(message))),
    }
}

/// Versions 0 to 2, which are advertised for old clients' sake and answered with `UNSUPPORTED_VERSION`. The codec
/// does not know their layout, so it is written here.
#[must_use]
pub fn ancient(context: &Context, topics: &[(String, Vec<i32>)], acks: i16) -> Answer {
    if acks == 0 {
        return Answer::Close;
    }
    let mut out = BytesMut::new();
    out.put_i32(0);
    out.put_i32(context.header.correlation);
    out.put_i32(topics.len() as i32);
    for (name, partitions) in topics {
        out.put_i16(name.len() as i16);
        out.put_slice(name.as_bytes());
        out.put_i32(partitions.len() as i32);
        for partition in partitions {
            out.put_i32(*partition);
            out.put_i16(ResponseError::UnsupportedVersion.code());
            out.put_i64(-1);
            if context.version() >= 2 {
                out.put_i64(-1);
            }
        }
    }
    if context.version() >= 1 {
        out.put_i32(0);
    }
    Answer::Now(Response::from(wire::framed(out)))
}

/// `InitProducerId`: for idempotence. Transactions are refused until they exist.
pub async fn init_producer_id(
    context: &Context,
    body: &InitProducerIdRequest,
) -> Result<Response, EncodeError> {
    let refused = |error: ResponseError| {
        InitProducerIdResponse::default()
            .with_error_code(error.code())
            .with_producer_id(ProducerId(-1))
            .with_producer_epoch(-1)
    };
    let response = if body.transactional_id.is_some() {
        // No message fits in this response; the coordinator's lookup, which comes first, has told why.
        refused(ResponseError::InvalidRequest)
    } else {
        match context.broker.store.allocate_producer_id().await {
            Ok(id) => {
                InitProducerIdResponse::default().with_producer_id(ProducerId(id)).with_producer_epoch(0)
            }
            Err(error) => {
                tracing::error!(%error, "no producer id could be allocated");
                refused(errors::kafka(&error))
            }
        }
    };
    context.respond(&response)
}
