//! The shape tables against the codec, and hostile bytes against both.

use super::request::{self, Request};
use super::shape::{Malformed, check};
use super::{Misbehaved, admit_frame, apis};
use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::messages::create_topics_request::{
    CreatableReplicaAssignment, CreatableTopic, CreatableTopicConfig,
};
use kafka_protocol::messages::delete_records_request::{DeleteRecordsPartition, DeleteRecordsTopic};
use kafka_protocol::messages::delete_topics_request::DeleteTopicState;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::describe_producers_request::TopicRequest;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic, ForgottenTopic, ReplicaState};
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::leave_group_request::MemberIdentity;
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::{
    OffsetFetchRequestGroup, OffsetFetchRequestTopic, OffsetFetchRequestTopics,
};
use kafka_protocol::messages::offset_for_leader_epoch_request::{
    OffsetForLeaderPartition, OffsetForLeaderTopic,
};
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::sync_group_request::SyncGroupRequestAssignment;
use kafka_protocol::messages::*;
use kafka_protocol::protocol::{Encodable, StrBytes};
use proptest::prelude::*;
use uuid::Uuid;

fn s(text: &'static str) -> StrBytes {
    StrBytes::from_static_str(text)
}

fn encoded<M: Encodable>(message: &M, version: i16) -> Bytes {
    let mut out = BytesMut::new();
    message.encode(&mut out, version).unwrap();
    out.freeze()
}

/// A request of an API with something in every field that the version has.
#[allow(clippy::too_many_lines)] // one arm an API
fn full(api: ApiKey, v: i16) -> Bytes {
    let id = Uuid::from_u128(7);
    let group = GroupId(s("group"));
    let topic = TopicName(s("topic"));
    match api {
        ApiKey::Produce => {
            let data =
                PartitionProduceData::default().with_index(1).with_records(Some(Bytes::from_static(b"xyz")));
            let mut topic_data = TopicProduceData::default().with_partition_data(vec![data.clone(), data]);
            if v >= 13 {
                topic_data.topic_id = id;
            } else {
                topic_data.name = topic;
            }
            let request = ProduceRequest::default().with_acks(-1).with_topic_data(vec![topic_data]);
            encoded(&request.with_transactional_id(Some(TransactionalId(s("tx")))), v)
        }
        ApiKey::Fetch => {
            let mut partition = FetchPartition::default().with_partition(3);
            if v >= 9 {
                partition.current_leader_epoch = 1;
            }
            if v >= 12 {
                partition.last_fetched_epoch = 1;
            }
            if v >= 17 {
                partition.replica_directory_id = id;
            }
            if v >= 18 {
                partition.high_watermark = 5;
            }
            let mut fetched = FetchTopic::default().with_partitions(vec![partition.clone(), partition]);
            let mut forgotten = ForgottenTopic::default().with_partitions(vec![1, 2, 3]);
            if v >= 13 {
                (fetched.topic_id, forgotten.topic_id) = (id, id);
            } else {
                (fetched.topic, forgotten.topic) = (topic.clone(), topic);
            }
            let mut request = FetchRequest::default().with_topics(vec![fetched]);
            if v >= 7 {
                request.forgotten_topics_data = vec![forgotten];
            }
            if v >= 11 {
                request.rack_id = s("rack");
            }
            if v >= 12 {
                request.cluster_id = Some(s("cluster"));
            }
            if v >= 15 {
                request.replica_state = ReplicaState::default().with_replica_id(BrokerId(4));
            }
            encoded(&request, v)
        }
        ApiKey::ListOffsets => {
            let partition = ListOffsetsPartition::default().with_timestamp(-1);
            let topics = ListOffsetsTopic::default().with_name(topic).with_partitions(vec![partition; 3]);
            encoded(&ListOffsetsRequest::default().with_topics(vec![topics]), v)
        }
        ApiKey::Metadata => {
            let mut wanted = MetadataRequestTopic::default().with_name(Some(topic));
            if v >= 10 {
                wanted.topic_id = id;
            }
            encoded(&MetadataRequest::default().with_topics(Some(vec![wanted; 2])), v)
        }
        ApiKey::OffsetCommit => {
            let partition = OffsetCommitRequestPartition::default().with_committed_metadata(Some(s("meta")));
            let topics =
                OffsetCommitRequestTopic::default().with_name(topic).with_partitions(vec![partition; 2]);
            let mut request = OffsetCommitRequest::default().with_group_id(group).with_topics(vec![topics]);
            if v >= 7 {
                request.group_instance_id = Some(s("instance"));
            }
            encoded(&request, v)
        }
        ApiKey::OffsetFetch if v >= 8 => {
            let topics =
                OffsetFetchRequestTopics::default().with_name(topic).with_partition_indexes(vec![0, 1]);
            let wanted =
                OffsetFetchRequestGroup::default().with_group_id(group).with_topics(Some(vec![topics]));
            encoded(&OffsetFetchRequest::default().with_groups(vec![wanted; 2]), v)
        }
        ApiKey::OffsetFetch => {
            let topics =
                OffsetFetchRequestTopic::default().with_name(topic).with_partition_indexes(vec![0, 1]);
            encoded(&OffsetFetchRequest::default().with_group_id(group).with_topics(Some(vec![topics])), v)
        }
        ApiKey::FindCoordinator if v >= 4 => {
            encoded(&FindCoordinatorRequest::default().with_coordinator_keys(vec![s("a"), s("b")]), v)
        }
        ApiKey::FindCoordinator => encoded(&FindCoordinatorRequest::default().with_key(s("a")), v),
        ApiKey::JoinGroup => {
            let protocol = JoinGroupRequestProtocol::default()
                .with_name(s("range"))
                .with_metadata(Bytes::from_static(b"m"));
            let mut request = JoinGroupRequest::default()
                .with_group_id(group)
                .with_protocol_type(s("consumer"))
                .with_protocols(vec![protocol; 2]);
            if v >= 5 {
                request.group_instance_id = Some(s("instance"));
            }
            if v >= 8 {
                request.reason = Some(s("why"));
            }
            encoded(&request, v)
        }
        ApiKey::Heartbeat => {
            let mut request = HeartbeatRequest::default().with_group_id(group).with_member_id(s("m"));
            if v >= 3 {
                request.group_instance_id = Some(s("instance"));
            }
            encoded(&request, v)
        }
        ApiKey::LeaveGroup if v >= 3 => {
            let mut member = MemberIdentity::default().with_member_id(s("m"));
            if v >= 5 {
                member.reason = Some(s("why"));
            }
            encoded(&LeaveGroupRequest::default().with_group_id(group).with_members(vec![member; 2]), v)
        }
        ApiKey::LeaveGroup => {
            encoded(&LeaveGroupRequest::default().with_group_id(group).with_member_id(s("m")), v)
        }
        ApiKey::SyncGroup => {
            let assignment = SyncGroupRequestAssignment::default().with_member_id(s("m"));
            let mut request =
                SyncGroupRequest::default().with_group_id(group).with_assignments(vec![assignment; 2]);
            if v >= 5 {
                request.protocol_type = Some(s("consumer"));
            }
            encoded(&request, v)
        }
        ApiKey::DescribeGroups => {
            encoded(&DescribeGroupsRequest::default().with_groups(vec![group.clone(), group]), v)
        }
        ApiKey::ListGroups => {
            let mut request = ListGroupsRequest::default();
            if v >= 4 {
                request.states_filter = vec![s("Stable")];
            }
            if v >= 5 {
                request.types_filter = vec![s("classic")];
            }
            encoded(&request, v)
        }
        ApiKey::ApiVersions => {
            let mut request = ApiVersionsRequest::default();
            if v >= 3 {
                request.client_software_name = s("name");
            }
            encoded(&request, v)
        }
        ApiKey::CreateTopics => {
            let assignment = CreatableReplicaAssignment::default().with_broker_ids(vec![BrokerId(1)]);
            let config = CreatableTopicConfig::default().with_name(s("k")).with_value(Some(s("v")));
            let made = CreatableTopic::default()
                .with_name(topic)
                .with_assignments(vec![assignment; 2])
                .with_configs(vec![config; 2]);
            encoded(&CreateTopicsRequest::default().with_topics(vec![made; 2]), v)
        }
        ApiKey::DeleteTopics if v >= 6 => {
            let state = DeleteTopicState::default().with_name(Some(topic)).with_topic_id(id);
            encoded(&DeleteTopicsRequest::default().with_topics(vec![state]), v)
        }
        ApiKey::DeleteTopics => encoded(&DeleteTopicsRequest::default().with_topic_names(vec![topic]), v),
        ApiKey::DeleteRecords => {
            let partition = DeleteRecordsPartition::default().with_partition_index(1).with_offset(7);
            let wanted = DeleteRecordsTopic::default().with_name(topic).with_partitions(vec![partition; 2]);
            encoded(&DeleteRecordsRequest::default().with_topics(vec![wanted; 2]), v)
        }
        ApiKey::InitProducerId => encoded(&InitProducerIdRequest::default(), v),
        ApiKey::DescribeConfigs => {
            let resource =
                DescribeConfigsResource::default().with_configuration_keys(Some(vec![s("a"), s("b")]));
            encoded(&DescribeConfigsRequest::default().with_resources(vec![resource; 2]), v)
        }
        ApiKey::DeleteGroups => encoded(&DeleteGroupsRequest::default().with_groups_names(vec![group]), v),
        ApiKey::DescribeCluster => encoded(&DescribeClusterRequest::default(), v),
        ApiKey::OffsetForLeaderEpoch => {
            let partition = OffsetForLeaderPartition::default().with_leader_epoch(3);
            let topics =
                OffsetForLeaderTopic::default().with_topic(topic).with_partitions(vec![partition; 3]);
            encoded(&OffsetForLeaderEpochRequest::default().with_topics(vec![topics; 2]), v)
        }
        ApiKey::DescribeProducers => {
            let topics = TopicRequest::default().with_name(topic).with_partition_indexes(vec![0, 1, 2]);
            encoded(&DescribeProducersRequest::default().with_topics(vec![topics; 2]), v)
        }
        other => panic!("no sample of {other:?}"),
    }
}

/// Every served API and version the codec knows.
fn served() -> Vec<(ApiKey, i16)> {
    let mut out = Vec::new();
    for api in apis::SERVED {
        let key = ApiKey::try_from(api.key).unwrap();
        let first = if key == ApiKey::Produce { 3 } else { api.min };
        out.extend((first..=api.max).map(|version| (key, version)));
    }
    out
}

fn frame(api: ApiKey, version: i16, body: &[u8]) -> Bytes {
    let header = RequestHeader::default()
        .with_request_api_key(api as i16)
        .with_request_api_version(version)
        .with_correlation_id(42)
        .with_client_id(Some(s("client")));
    let mut out = BytesMut::new();
    header.encode(&mut out, api.request_header_version(version)).unwrap();
    out.put_slice(body);
    out.freeze()
}

#[test]
fn the_tables_agree_with_the_codec_in_every_served_version() {
    for (api, version) in served() {
        let body = full(api, version);
        assert_eq!(check(api, version, &body), Ok(body.len()), "{api:?} {version}");
        for cut in 0..body.len() {
            assert!(check(api, version, &body[..cut]).is_err(), "{api:?} {version} cut at {cut}");
        }
        let (header, _) = request::decode(frame(api, version, &body)).unwrap();
        assert_eq!((header.api, header.version, header.correlation), (api, version, 42));
        assert_eq!(header.client_id, "client");
    }
}

#[test]
fn strangers_get_no_memory() {
    let limit = 100 << 20;
    let tls = i32::from_be_bytes([0x16, 3, 1, 2]);
    let http = i32::from_be_bytes(*b"GET ");
    assert!(matches!(admit_frame(tls, &[], false, limit), Err(Misbehaved::FrameTooLong { .. })));
    assert!(matches!(admit_frame(http, &[], false, limit), Err(Misbehaved::FrameTooLong { .. })));
    assert!(matches!(admit_frame(-1, &[], true, limit), Err(Misbehaved::FrameLength(-1))));
    assert!(matches!(admit_frame(7, &[], true, limit), Err(Misbehaved::FrameLength(7))));
    assert_eq!(admit_frame(1 << 20, &[], false, limit), Ok(None));
    assert_eq!(admit_frame(1 << 20, &[0, 0, 0, 9], false, limit), Ok(Some(1 << 20)));
    assert_eq!(admit_frame(1 << 20, &[0, 3, 0, 9], false, limit), Err(Misbehaved::FirstFrame(1 << 20)));
    assert_eq!(admit_frame(1 << 20, &[], true, limit), Ok(Some(1 << 20)));
}

#[test]
fn an_array_longer_than_its_frame_is_refused_before_anything_is_allocated() {
    // Metadata 1: an array of 2³¹-1 topics in four bytes.
    let refused = request::decode(frame(ApiKey::Metadata, 1, &i32::MAX.to_be_bytes()));
    assert!(matches!(refused, Err(Misbehaved::Body { cause: Malformed::Short, .. })), "{refused:?}");
    // Metadata 9: the same as a compact array.
    let refused = request::decode(frame(ApiKey::Metadata, 9, &[0xff, 0xff, 0xff, 0xff, 0x0f]));
    assert!(matches!(refused, Err(Misbehaved::Body { .. })), "{refused:?}");
    // Topics that are really there, but too many: an empty name costs two bytes.
    let mut body = BytesMut::new();
    body.put_i32(200_000);
    body.put_bytes(0, 400_000);
    let refused = request::decode(frame(ApiKey::Metadata, 1, &body));
    assert!(
        matches!(refused, Err(Misbehaved::Body { cause: Malformed::TooManyElements, .. })),
        "{refused:?}"
    );
}

#[test]
fn a_known_tag_that_lies_about_its_length_is_refused() {
    let version = 17;
    let mut body = BytesMut::from(&full(ApiKey::Fetch, version)[..]);
    // The first tagged field of the first partition: count 1, tag 0, length 16, a UUID of 7.
    let at = body.windows(3).position(|w| w == [1, 0, 16]).unwrap();
    body[at + 2] = 15;
    assert_eq!(check(ApiKey::Fetch, version, &body), Err(Malformed::TagLength));
}

#[test]
fn an_unknown_version_of_api_versions_is_for_the_handler_and_others_are_not() {
    let (header, asked) = request::decode(Bytes::from_static(&[0, 18, 0, 99, 0, 0, 0, 7])).unwrap();
    assert!(matches!(asked, Request::ApiVersionsUnknown));
    assert_eq!((header.version, header.correlation), (99, 7));
    let refused = request::decode(Bytes::from_static(&[0, 3, 0, 99, 0, 0, 0, 7]));
    assert!(matches!(refused, Err(Misbehaved::NotServed { key: 3, version: 99 })));
    let refused = request::decode(Bytes::from_static(&[0x7f, 0xff, 0, 0, 0, 0, 0, 7]));
    assert!(matches!(refused, Err(Misbehaved::NotServed { .. })));
    let refused = request::decode(Bytes::from_static(&[0, 71, 0, 0, 0, 0, 0, 7, 0, 0]));
    assert!(matches!(refused, Err(Misbehaved::NotServed { key: 71, .. })), "telemetry is not served");
}

#[test]
fn ancient_produces_are_read_far_enough_to_refuse_them() {
    let mut body = BytesMut::new();
    body.put_i16(1);
    body.put_i32(1000);
    body.put_i32(1);
    body.put_i16(1);
    body.put_slice(b"t");
    body.put_i32(1);
    body.put_i32(5);
    body.put_i32(3);
    body.put_slice(b"xyz");
    let (_, asked) = request::decode(frame(ApiKey::Produce, 2, &body)).unwrap();
    let Request::ProduceAncient(topics, acks) = asked else { panic!("{asked:?}") };
    assert_eq!((topics, acks), (vec![("t".to_owned(), vec![5])], 1));
    let cut = request::decode(frame(ApiKey::Produce, 2, &body[..body.len() - 1]));
    assert!(matches!(cut, Err(Misbehaved::Body { .. })));
}

proptest! {
    #[test]
    fn no_bytes_make_decoding_panic(
        which in any::<prop::sample::Index>(),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let all = served();
        let (api, version) = all[which.index(all.len())];
        drop(request::decode(frame(api, version, &noise)));
        drop(request::decode(Bytes::from(noise)));
    }

    #[test]
    fn no_flipped_bytes_make_decoding_panic_or_allocate_wildly(
        which in any::<prop::sample::Index>(),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let all = served();
        let (api, version) = all[which.index(all.len())];
        let mut bytes = BytesMut::from(&frame(api, version, &full(api, version))[..]);
        for (at, to) in flips {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        drop(request::decode(bytes.freeze()));
    }

    /// Whatever passes the walk decodes as far as the walk went, or fails for a reason the walk does not look at.
    #[test]
    fn the_walk_and_the_codec_read_the_same_bytes(
        which in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        to in any::<u8>(),
    ) {
        let all = served();
        let (api, version) = all[which.index(all.len())];
        let mut bytes = BytesMut::from(&full(api, version)[..]);
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        if let Ok(walked) = check(api, version, &bytes) {
            // Cut to what the walk says is enough, the codec must not run short.
            let exact = bytes.split_to(walked).freeze();
            if let Err(refused) = request::decode(frame(api, version, &exact)) {
                let field = matches!(refused, Misbehaved::Body { cause: Malformed::Field, .. });
                prop_assert!(field, "{refused:?}");
            }
        }
    }
}
