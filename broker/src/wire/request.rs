//! Header and body of a request.
//!
//! A body is decoded from the frame's own [`Bytes`]: strings and record batches are slices of it, not copies.

use super::shape::{self, Malformed};
use super::{Misbehaved, apis};
use crate::records::Cursor;
use bytes::Bytes;
use kafka_protocol::messages::{
    ApiKey, ApiVersionsRequest, CreateTopicsRequest, DeleteGroupsRequest, DeleteRecordsRequest,
    DeleteTopicsRequest, DescribeClusterRequest, DescribeConfigsRequest, DescribeGroupsRequest,
    DescribeProducersRequest, FetchRequest, FindCoordinatorRequest, HeartbeatRequest, InitProducerIdRequest,
    JoinGroupRequest, LeaveGroupRequest, ListGroupsRequest, ListOffsetsRequest, MetadataRequest,
    OffsetCommitRequest, OffsetFetchRequest, OffsetForLeaderEpochRequest, ProduceRequest, SyncGroupRequest,
};
use kafka_protocol::protocol::Decodable;

/// What stands before every body.
#[derive(Debug, Clone)]
pub struct Header {
    /// Which API.
    pub api: ApiKey,
    /// Which version of it.
    pub version: i16,
    /// Comes back in the response.
    pub correlation: i32,
    /// What the client calls itself.
    pub client_id: String,
}

/// A request, decoded.
#[derive(Debug)]
#[allow(missing_docs)] // each is the API of its name
pub enum Request {
    ApiVersions(ApiVersionsRequest),
    /// A version we do not know; it is answered, not refused.
    ApiVersionsUnknown,
    CreateTopics(CreateTopicsRequest),
    DeleteGroups(DeleteGroupsRequest),
    DeleteRecords(DeleteRecordsRequest),
    DeleteTopics(DeleteTopicsRequest),
    DescribeCluster(DescribeClusterRequest),
    DescribeConfigs(DescribeConfigsRequest),
    DescribeGroups(DescribeGroupsRequest),
    DescribeProducers(DescribeProducersRequest),
    Fetch(FetchRequest),
    FindCoordinator(FindCoordinatorRequest),
    Heartbeat(HeartbeatRequest),
    InitProducerId(InitProducerIdRequest),
    JoinGroup(JoinGroupRequest),
    LeaveGroup(LeaveGroupRequest),
    ListGroups(ListGroupsRequest),
    ListOffsets(ListOffsetsRequest),
    Metadata(MetadataRequest),
    OffsetCommit(OffsetCommitRequest),
    OffsetFetch(OffsetFetchRequest),
    OffsetForLeaderEpoch(OffsetForLeaderEpochRequest),
    Produce(ProduceRequest),
    /// Versions 0 to 2: topics and partitions only, to say no to each.
    ProduceAncient(Vec<(String, Vec<i32>)>, i16),
    SyncGroup(SyncGroupRequest),
}

/// Decodes a frame (without its length).
pub fn decode(mut frame: Bytes) -> Result<(Header, Request), Misbehaved> {
    let mut at = Cursor(&frame);
    let (Some(key), Some(version), Some(correlation)) = (at.i16(), at.i16(), at.i32()) else {
        return Err(Misbehaved::Header);
    };
    let api = ApiKey::try_from(key).map_err(|()| Misbehaved::NotServed { key, version })?;
    if !apis::served(api, version) {
        if api == ApiKey::ApiVersions {
            // The rest of a header of the future is not ours to understand (KIP-511).
            let header = Header { api, version, correlation, client_id: String::new() };
            return Ok((header, Request::ApiVersionsUnknown));
        }
        return Err(Misbehaved::NotServed { key, version });
    }
    let client_id = at.nullable_string().ok_or(Misbehaved::Header)?.unwrap_or_default();
    if api.request_header_version(version) >= 2 {
        let tags = shape::check_header_tags(at.0).map_err(|_| Misbehaved::Header)?;
        at.take(tags).ok_or(Misbehaved::Header)?;
    }
    let body = frame.split_off(frame.len() - at.0.len());
    let header = Header { api, version, correlation, client_id };
    let request = body_of(&header, body).map_err(|cause| Misbehaved::Body { api, version, cause })?;
    Ok((header, request))
}

fn body_of(header: &Header, body: Bytes) -> Result<Request, Malformed> {
    let version = header.version;
    if header.api == ApiKey::Produce && version < 3 {
        return ancient_produce(&body).map(|(topics, acks)| Request::ProduceAncient(topics, acks));
    }
    shape::check(header.api, version, &body)?;
    Ok(match header.api {
        ApiKey::ApiVersions => Request::ApiVersions(typed(body, version)?),
        ApiKey::CreateTopics => Request::CreateTopics(typed(body, version)?),
        ApiKey::DeleteGroups => Request::DeleteGroups(typed(body, version)?),
        ApiKey::DeleteRecords => Request::DeleteRecords(typed(body, version)?),
        ApiKey::DeleteTopics => Request::DeleteTopics(typed(body, version)?),
        ApiKey::DescribeCluster => Request::DescribeCluster(typed(body, version)?),
        ApiKey::DescribeConfigs => Request::DescribeConfigs(typed(body, version)?),
        ApiKey::DescribeGroups => Request::DescribeGroups(typed(body, version)?),
        ApiKey::DescribeProducers => Request::DescribeProducers(typed(body, version)?),
        ApiKey::Fetch => Request::Fetch(typed(body, version)?),
        ApiKey::FindCoordinator => Request::FindCoordinator(typed(body, version)?),
        ApiKey::Heartbeat => Request::Heartbeat(typed(body, version)?),
        ApiKey::InitProducerId => Request::InitProducerId(typed(body, version)?),
        ApiKey::JoinGroup => Request::JoinGroup(typed(body, version)?),
        ApiKey::LeaveGroup => Request::LeaveGroup(typed(body, version)?),
        ApiKey::ListGroups => Request::ListGroups(typed(body, version)?),
        ApiKey::ListOffsets => Request::ListOffsets(typed(body, version)?),
        ApiKey::Metadata => Request::Metadata(typed(body, version)?),
        ApiKey::OffsetCommit => Request::OffsetCommit(typed(body, version)?),
        ApiKey::OffsetFetch => Request::OffsetFetch(typed(body, version)?),
        ApiKey::OffsetForLeaderEpoch => Request::OffsetForLeaderEpoch(typed(body, version)?),
        ApiKey::Produce => Request::Produce(typed(body, version)?),
        ApiKey::SyncGroup => Request::SyncGroup(typed(body, version)?),
        _ => return Err(Malformed::Field),
    })
}

fn typed<T: Decodable>(mut body: Bytes, version: i16) -> Result<T, Malformed> {
    T::decode(&mut body, version).map_err(|_| Malformed::Field)
}

/// Versions 0 to 2 of `Produce` are one layout: acks, timeout, topics of partitions of records.
#[allow(clippy::type_complexity)]
fn ancient_produce(body: &[u8]) -> Result<(Vec<(String, Vec<i32>)>, i16), Malformed> {
    let mut at = Cursor(body);
    let acks = at.i16().ok_or(Malformed::Short)?;
    at.i32().ok_or(Malformed::Short)?;
    let mut topics = Vec::new();
    for _ in 0..at.i32().ok_or(Malformed::Short)? {
        let name = at.string().ok_or(Malformed::Short)?;
        let mut partitions = Vec::new();
        for _ in 0..at.i32().ok_or(Malformed::Short)? {
            partitions.push(at.i32().ok_or(Malformed::Short)?);
            at.bytes().ok_or(Malformed::Short)?;
        }
        topics.push((name, partitions));
    }
    Ok((topics, acks))
}
