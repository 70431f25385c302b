//! `Fetch`: records go from the files they lie in to the socket; this file writes what stands around them.
//!
//! The codec would put the whole response, records included, into one buffer; so the framing around each `records` field
//! is written by hand here, version by version, from Kafka's `FetchResponse.json` (4–18). The tests read it back with
//! the codec.
//!
//! Cost per partition besides the log's lookup: some 60 bytes of head in one buffer a response, and 17 for each aborted
//! transaction in what a `read_committed` consumer gets; no record byte.
//!
//! Fetch sessions (KIP-227) are not kept: session id 0 tells the client to send full requests, which is always legal.

use super::{OK, check_epoch, partition_of, topic_of};
use crate::dispatch::{Answer, Context};
use crate::errors;
use crate::send::{Part, Response};
use crate::waiters::Waiter;
use crate::wire::{EncodeError, put_uvarint};
use bytes::{BufMut, BytesMut};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::FetchRequest;
use kafka_protocol::messages::fetch_request::FetchTopic;
use logstore::transactions::Aborted;
use logstore::{Offsets, Partition, ReadLimit, Slice};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

/// The longest a fetch may wait, whatever it asks for: it holds a place in its connection's queue.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// What one partition gives.
struct Read {
    index: i32,
    error: i16,
    offsets: Option<Offsets>,
    records: Option<Slice>,
    /// Transactions that a `read_committed` consumer skips in them.
    aborted: Vec<Aborted>,
}

impl Read {
    /// Without records.
    fn empty(error: i16, offsets: Option<Offsets>) -> Self {
        Self { index: 0, error, offsets, records: None, aborted: Vec::new() }
    }
}

/// One round over all partitions.
struct Round {
    topics: Vec<(String, Uuid, Vec<Read>)>,
    bytes: u64,
    failed: bool,
}

/// Leaves the fetch for the connection's writer: it reads once it is at the queue's head.
pub fn fetch(context: Context, body: FetchRequest) -> Answer {
    Answer::Later(Box::pin(async move { run(&context, &body).await }))
}

async fn run(context: &Context, body: &FetchRequest) -> Result<Response, EncodeError> {
    // A session we never made; -1 and 0 ask for a full fetch.
    if context.version() >= 7 && body.session_id != 0 && body.session_epoch > 0 {
        let error = ResponseError::FetchSessionIdNotFound.code();
        return Ok(encode(context, body, error, Round { topics: Vec::new(), bytes: 0, failed: true }));
    }
    let wait = Duration::from_millis(u64::try_from(body.max_wait_ms).unwrap_or(0)).min(LONGEST_WAIT);
    let deadline = Instant::now() + wait;
    let limit = if body.isolation_level == 1 { ReadLimit::LastStable } else { ReadLimit::HighWatermark };
    let mut stopping = context.broker.stopping();
    loop {
        // Subscribed before reading: what comes in between wakes us.
        let mut waiter = Waiter::new(limit);
        let round = read_all(context, body, limit, &mut waiter).await;
        let enough = round.bytes >= u64::try_from(body.min_bytes).unwrap_or(0);
        let nothing_to_wait_for = waiter.is_empty();
        if enough || round.failed || nothing_to_wait_for || Instant::now() >= deadline || *stopping.borrow() {
            return Ok(encode(context, body, OK, round));
        }
        // The leases go while we wait.
        drop(round);
        tokio::select! {
            () = waiter.wait() => {}
            () = tokio::time::sleep_until(deadline) => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
    }
}

async fn read_all(context: &Context, body: &FetchRequest, limit: ReadLimit, waiter: &mut Waiter) -> Round {
    let asked = u64::try_from(body.max_bytes).unwrap_or(0);
    let mut room = asked.min(context.broker.config.fetch_max_bytes as u64);
    let mut round = Round { topics: Vec::with_capacity(body.topics.len()), bytes: 0, failed: false };
    for topic in &body.topics {
        let FetchTopic { topic: name, topic_id, partitions, .. } = topic;
        let found = topic_of(&context.broker.store, context.version() >= 13, name, *topic_id);
        let mut reads = Vec::with_capacity(partitions.len());
        for wanted in partitions {
            let partition = partition_of(&found, wanted.partition)
                .and_then(|p| check_epoch(&p, wanted.current_leader_epoch).map(|()| p));
            let read = match partition {
                Ok(partition) => {
                    waiter.watch(partition.subscribe());
                    let max = u64::try_from(wanted.partition_max_bytes).unwrap_or(0).min(room) as u32;
                    // KIP-74: the first batch of the response comes whole, whatever the limits say.
                    read_one(&partition, wanted.fetch_offset, max, limit, round.bytes == 0).await
                }
                Err(error) => Read::empty(error.code(), None),
            };
            let bytes = read.records.as_ref().map_or(0, Slice::len);
            room = room.saturating_sub(bytes);
            round.bytes += bytes;
            round.failed |= read.error != OK;
            reads.push(Read { index: wanted.partition, ..read });
        }
        round.topics.push((name.to_string(), *topic_id, reads));
    }
    round
}

async fn read_one(partition: &Arc<Partition>, from: i64, max: u32, limit: ReadLimit, first: bool) -> Read {
    let mut offsets = partition.offsets();
    let end = match limit {
        ReadLimit::LastStable => offsets.last_stable,
        ReadLimit::HighWatermark | ReadLimit::LogEnd => offsets.high_watermark,
    };
    // Nothing new, the usual case of a consumer that keeps up: no lookup at all.
    if from == end || (max == 0 && !first) {
        return Read::empty(OK, Some(offsets));
    }
    let read = match limit {
        ReadLimit::LastStable => partition.read_committed(from, max, first).await,
        _ => partition.read(from, max, limit, first).await.map(|slice| (slice, Vec::new())),
    };
    match read {
        Ok((slice, aborted)) => {
            // What is sent must not lie over the high watermark that is told with it.
            offsets = partition.offsets();
            Read { records: Some(slice), aborted, ..Read::empty(OK, Some(offsets)) }
        }
        // Below the end of the log but over the high watermark: not visible yet, and no reason to start over.
        Err(logstore::Error::OffsetOutOfRange { .. }) if from > end && from <= offsets.log_end => {
            Read::empty(OK, Some(offsets))
        }
        Err(error) => {
            let code = errors::kafka(&error);
            if code == ResponseError::OffsetOutOfRange {
                offsets = partition.offsets();
            } else {
                tracing::error!(%error, "a read failed");
            }
            Read::empty(code.code(), Some(offsets))
        }
    }
}

fn encode(context: &Context, body: &FetchRequest, error: i16, round: Round) -> Response {
    let version = context.version();
    let flexible = version >= 12;
    let mut parts = Vec::new();
    let mut out = BytesMut::with_capacity(64 + 96 * round.topics.len());
    let mut before = 0u64;
    out.put_i32(0); // the frame's length, below
    out.put_i32(context.header.correlation);
    if flexible {
        put_uvarint(&mut out, 0); // response header version 1: no tagged fields
    }
    out.put_i32(0); // throttle time
    if version >= 7 {
        out.put_i16(error);
        out.put_i32(0); // session id: none
    }
    put_length(&mut out, round.topics.len(), flexible);
    for (name, id, reads) in round.topics {
        if version >= 13 {
            out.put_slice(id.as_bytes());
        } else if flexible {
            put_uvarint(&mut out, name.len() as u32 + 1);
            out.put_slice(name.as_bytes());
        } else {
            out.put_i16(name.len() as i16);
            out.put_slice(name.as_bytes());
        }
        put_length(&mut out, reads.len(), flexible);
        for read in reads {
            put_partition_head(&mut out, version, body.isolation_level, &read);
            let records = read.records.filter(|slice| !slice.is_empty());
            put_length(&mut out, records.as_ref().map_or(0, Slice::len) as usize, flexible);
            if let Some(slice) = records {
                let head = out.split();
                before += head.len() as u64 + slice.len();
                parts.push(Part::Bytes(head.freeze()));
                parts.push(Part::Records(slice));
            }
            if flexible {
                put_uvarint(&mut out, 0);
            }
        }
        if flexible {
            put_uvarint(&mut out, 0);
        }
    }
    if flexible {
        put_uvarint(&mut out, 0);
    }
    let total = before + out.len() as u64 - 4;
    if !out.is_empty() {
        parts.push(Part::Bytes(out.freeze()));
    }
    write_length(&mut parts, total);
    Response(parts)
}

/// The frame's length stands in the first four bytes of the first part, which is known only at the end.
fn write_length(parts: &mut [Part], total: u64) {
    if let Some(Part::Bytes(first)) = parts.first_mut() {
        let mut head = BytesMut::from(std::mem::take(first));
        head[..4].copy_from_slice(&(total as u32).to_be_bytes());
        *first = head.freeze();
    }
}

fn put_partition_head(out: &mut BytesMut, version: i16, isolation_level: i8, read: &Read) {
    let unknown = Offsets { log_start: -1, high_watermark: -1, last_stable: -1, log_end: -1 };
    let offsets = read.offsets.unwrap_or(unknown);
    out.put_i32(read.index);
    out.put_i16(read.error);
    out.put_i64(offsets.high_watermark);
    out.put_i64(offsets.last_stable);
    if version >= 5 {
        out.put_i64(offsets.log_start);
    }
    let flexible = version >= 12;
    // Null for who did not ask.
    match (isolation_level == 1, flexible) {
        (true, _) => put_length(out, read.aborted.len(), flexible),
        (false, true) => put_uvarint(out, 0),
        (false, false) => out.put_i32(-1),
    }
    for aborted in &read.aborted {
        out.put_i64(aborted.producer_id);
        out.put_i64(aborted.first_offset);
        if flexible {
            put_uvarint(out, 0);
        }
    }
    if version >= 11 {
        out.put_i32(-1); // no preferred replica
    }
}

/// The length of an array or of bytes.
fn put_length(out: &mut BytesMut, length: usize, flexible: bool) {
    if flexible {
        put_uvarint(out, length as u32 + 1);
    } else {
        out.put_i32(length as i32);
    }
}
