//! Which APIs are served, and in which versions. What is not here is not advertised, and closes the connection.
//!
//! The ranges are Kafka 4.1's, cut to what the codec of each *message* really decodes (its `VERSIONS`; the crate's
//! `ApiKey::valid_versions` promises more). One exception: `Produce` is advertised from 0, since older librdkafka stops
//! compressing otherwise, and its versions 0–2 are answered with `UNSUPPORTED_VERSION`, as Kafka 4 does.

use kafka_protocol::messages::{
    ApiKey, ApiVersionsRequest, CreateTopicsRequest, DeleteGroupsRequest, DeleteRecordsRequest,
    DeleteTopicsRequest, DescribeClusterRequest, DescribeConfigsRequest, DescribeGroupsRequest,
    DescribeProducersRequest, FetchRequest, FindCoordinatorRequest, HeartbeatRequest, InitProducerIdRequest,
    JoinGroupRequest, LeaveGroupRequest, ListGroupsRequest, ListOffsetsRequest, MetadataRequest,
    OffsetCommitRequest, OffsetFetchRequest, OffsetForLeaderEpochRequest, ProduceRequest, SyncGroupRequest,
};
use kafka_protocol::protocol::{Message, Request};

/// An API that is served, with its advertised versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Api {
    /// Which.
    pub key: i16,
    /// The first version.
    pub min: i16,
    /// The last version.
    pub max: i16,
}

/// Lets an API be served from `min` to `max`, as far as the codecs of request and response go.
const fn api<R>(min: i16, max: i16) -> Api
where
    R: Request,
{
    let (ours, theirs) = (R::VERSIONS, <R::Response as Message>::VERSIONS);
    let low = greater(min, greater(ours.min, theirs.min));
    let high = lesser(max, lesser(ours.max, theirs.max));
    Api { key: R::KEY, min: low, max: high }
}

const fn greater(a: i16, b: i16) -> i16 {
    if a > b { a } else { b }
}

const fn lesser(a: i16, b: i16) -> i16 {
    if a < b { a } else { b }
}

/// Everything that is served, by key.
pub const SERVED: [Api; 23] = [
    Api { min: 0, ..api::<ProduceRequest>(3, 13) },
    api::<FetchRequest>(4, 18),
    api::<ListOffsetsRequest>(1, 10),
    api::<MetadataRequest>(0, 13),
    api::<OffsetCommitRequest>(2, 9),
    api::<OffsetFetchRequest>(1, 9),
    api::<FindCoordinatorRequest>(0, 6),
    api::<JoinGroupRequest>(0, 9),
    api::<HeartbeatRequest>(0, 4),
    api::<LeaveGroupRequest>(0, 5),
    api::<SyncGroupRequest>(0, 5),
    api::<DescribeGroupsRequest>(0, 6),
    api::<ListGroupsRequest>(0, 5),
    api::<ApiVersionsRequest>(0, 4),
    api::<CreateTopicsRequest>(2, 7),
    api::<DeleteTopicsRequest>(1, 6),
    api::<DeleteRecordsRequest>(0, 2),
    api::<InitProducerIdRequest>(0, 5),
    api::<OffsetForLeaderEpochRequest>(2, 4),
    api::<DescribeConfigsRequest>(1, 4),
    api::<DeleteGroupsRequest>(0, 2),
    api::<DescribeClusterRequest>(0, 2),
    api::<DescribeProducersRequest>(0, 0),
];

/// Whether `version` of `key` is served.
#[must_use]
pub fn served(key: ApiKey, version: i16) -> bool {
    SERVED.iter().any(|api| api.key == key as i16 && (api.min..=api.max).contains(&version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranges_are_the_ones_clients_rely_on() {
        let range =
            |key: ApiKey| SERVED.iter().find(|a| a.key == key as i16).map(|a| (a.min, a.max)).unwrap();
        assert_eq!(range(ApiKey::Produce), (0, 13));
        assert_eq!(range(ApiKey::Fetch), (4, 18));
        assert_eq!(range(ApiKey::Metadata), (0, 13));
        assert_eq!(range(ApiKey::ListOffsets), (1, 10));
        assert_eq!(range(ApiKey::OffsetFetch), (1, 9));
        assert_eq!(range(ApiKey::FindCoordinator), (0, 6));
        assert_eq!(range(ApiKey::JoinGroup), (0, 9));
        assert!(SERVED.iter().all(|a| a.min <= a.max));
        assert!(SERVED.windows(2).all(|w| w[0].key < w[1].key));
    }
}
