//! Consumer groups over the wire: every API in every advertised version, commits that survive a restart, members that go
//! on after one, and the topic of committed offsets as Kafka's tools would read it.

use bytes::Bytes;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::leave_group_request::MemberIdentity;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::{
    OffsetFetchRequestGroup, OffsetFetchRequestTopic, OffsetFetchRequestTopics,
};
use kafka_protocol::messages::sync_group_request::SyncGroupRequestAssignment;
use kafka_protocol::messages::*;
use kafka_protocol::protocol::StrBytes;
use kafka_protocol::records::RecordBatchDecoder;
use std::time::Duration;
use tests::broker::{Client, Running, Under};

const HOMES: [Under; 2] = [Under::Directory, Under::Volume];
/// Few partitions make the topic of committed offsets quick to make; its number is honoured.
const FEW: &str = "offsets.topic.num.partitions=3";

fn text(of: &str) -> StrBytes {
    StrBytes::from_string(of.to_owned())
}

fn group(of: &str) -> GroupId {
    GroupId(text(of))
}

async fn with_topic(broker: &Running, topic: &str) -> Client {
    let mut client = broker.client().await;
    let wanted = MetadataRequestTopic::default().with_name(Some(TopicName(text(topic))));
    let answer = client.ask(12, &MetadataRequest::default().with_topics(Some(vec![wanted]))).await;
    assert_eq!(answer.topics[0].error_code, 0);
    client
}

fn join(name: &str, member: &str, version: i16) -> JoinGroupRequest {
    let protocol = JoinGroupRequestProtocol::default()
        .with_name(text("range"))
        .with_metadata(Bytes::from_static(b"wants t"));
    let request = JoinGroupRequest::default()
        .with_group_id(group(name))
        .with_session_timeout_ms(10_000)
        .with_member_id(text(member))
        .with_protocol_type(text("consumer"))
        .with_protocols(vec![protocol]);
    if version >= 1 { request.with_rebalance_timeout_ms(20_000) } else { request }
}

fn sync(name: &str, member: &str, generation: i32, shares: &[(&str, &'static str)]) -> SyncGroupRequest {
    let share = |(member, what): &(&str, &'static str)| {
        let share = SyncGroupRequestAssignment::default().with_member_id(text(member));
        share.with_assignment(Bytes::from_static(what.as_bytes()))
    };
    SyncGroupRequest::default()
        .with_group_id(group(name))
        .with_generation_id(generation)
        .with_member_id(text(member))
        .with_assignments(shares.iter().map(share).collect())
}

fn heartbeat(name: &str, member: &str, generation: i32) -> HeartbeatRequest {
    HeartbeatRequest::default()
        .with_group_id(group(name))
        .with_member_id(text(member))
        .with_generation_id(generation)
}

fn commit(
    name: &str,
    member: &str,
    generation: i32,
    topic: &str,
    offset: i64,
    note: &str,
) -> OffsetCommitRequest {
    let partition = OffsetCommitRequestPartition::default()
        .with_partition_index(0)
        .with_committed_offset(offset)
        .with_committed_metadata(Some(text(note)));
    let topic = OffsetCommitRequestTopic::default()
        .with_name(TopicName(text(topic)))
        .with_partitions(vec![partition]);
    OffsetCommitRequest::default()
        .with_group_id(group(name))
        .with_generation_id_or_member_epoch(generation)
        .with_member_id(text(member))
        .with_topics(vec![topic])
}

/// Offset and metadata of partition 0 of a topic.
async fn committed(client: &mut Client, version: i16, name: &str, topic: &str) -> (i64, String) {
    if version >= 8 {
        let topics = OffsetFetchRequestTopics::default()
            .with_name(TopicName(text(topic)))
            .with_partition_indexes(vec![0]);
        let wanted =
            OffsetFetchRequestGroup::default().with_group_id(group(name)).with_topics(Some(vec![topics]));
        let answer = client.ask(version, &OffsetFetchRequest::default().with_groups(vec![wanted])).await;
        assert_eq!(answer.groups[0].error_code, 0);
        let partition = &answer.groups[0].topics[0].partitions[0];
        assert_eq!(partition.error_code, 0);
        (partition.committed_offset, partition.metadata.clone().unwrap_or_default().to_string())
    } else {
        let topics = OffsetFetchRequestTopic::default()
            .with_name(TopicName(text(topic)))
            .with_partition_indexes(vec![0]);
        let request =
            OffsetFetchRequest::default().with_group_id(group(name)).with_topics(Some(vec![topics]));
        let answer = client.ask(version, &request).await;
        let partition = &answer.topics[0].partitions[0];
        assert_eq!(partition.error_code, 0);
        (partition.committed_offset, partition.metadata.clone().unwrap_or_default().to_string())
    }
}

/// Joins until the member has its id and a generation; returns both.
async fn member(client: &mut Client, name: &str, version: i16) -> (String, JoinGroupResponse) {
    let first = client.ask(version, &join(name, "", version)).await;
    if version < 4 {
        assert_eq!(first.error_code, 0);
        return (first.member_id.to_string(), first);
    }
    assert_eq!(first.error_code, ResponseError::MemberIdRequired.code());
    let id = first.member_id.to_string();
    let second = client.ask(version, &join(name, &id, version)).await;
    assert_eq!(second.error_code, 0);
    (id, second)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_coordinator_is_us_in_every_version() {
    let broker = Running::start(Under::Directory, &[FEW]).await;
    let mut client = broker.client().await;
    for version in 0..=6 {
        if version >= 4 {
            let keys = vec![text("a"), text("b")];
            let answer =
                client.ask(version, &FindCoordinatorRequest::default().with_coordinator_keys(keys)).await;
            assert_eq!(answer.coordinators.len(), 2);
            assert_eq!(answer.coordinators[1].error_code, 0);
            assert_eq!(answer.coordinators[1].port, i32::from(broker.address.port()));
        } else {
            let answer = client.ask(version, &FindCoordinatorRequest::default().with_key(text("a"))).await;
            assert_eq!((answer.error_code, answer.port), (0, i32::from(broker.address.port())));
        }
    }
    let request = FindCoordinatorRequest::default().with_key(text("tx")).with_key_type(1);
    let refused = client.ask(3, &request).await;
    assert_eq!(refused.error_code, ResponseError::InvalidRequest.code());
    assert!(refused.error_message.as_ref().is_some_and(|m| m.contains("transactions")), "it says why");
    assert_eq!(broker.broker.store.topic("__consumer_offsets").map(|t| t.partitions().len()), Some(3));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_joins_syncs_lives_commits_and_leaves_in_every_version() {
    let broker = Running::start(Under::Directory, &[FEW]).await;
    let mut client = with_topic(&broker, "t").await;
    for round in 0..=9i16 {
        let name = format!("g{round}");
        let (id, joined) = member(&mut client, &name, round).await;
        assert_eq!((joined.generation_id, joined.leader.to_string()), (1, id.clone()));
        assert_eq!(joined.members.len(), 1);
        assert_eq!(joined.members[0].metadata, Bytes::from_static(b"wants t"));
        assert_eq!(joined.protocol_name.as_deref(), Some("range"));
        let synced = client.ask(round.min(5), &sync(&name, &id, 1, &[(&id, "all of t")])).await;
        assert_eq!((synced.error_code, synced.assignment), (0, Bytes::from_static(b"all of t")));
        for version in 0..=4 {
            assert_eq!(client.ask(version, &heartbeat(&name, &id, 1)).await.error_code, 0);
            let stale = client.ask(version, &heartbeat(&name, &id, 7)).await;
            assert_eq!(stale.error_code, ResponseError::IllegalGeneration.code());
            let stranger = client.ask(version, &heartbeat(&name, "stranger", 1)).await;
            assert_eq!(stranger.error_code, ResponseError::UnknownMemberId.code());
        }
        for version in 2..=9 {
            let note = format!("by version {version}");
            let answer =
                client.ask(version, &commit(&name, &id, 1, "t", i64::from(version) * 10, &note)).await;
            assert_eq!(answer.topics[0].partitions[0].error_code, 0);
            for reader in 1..=9 {
                let (offset, metadata) = committed(&mut client, reader, &name, "t").await;
                assert_eq!((offset, metadata.as_str()), (i64::from(version) * 10, note.as_str()));
            }
        }
        let version = round.min(5);
        let leave = LeaveGroupRequest::default().with_group_id(group(&name));
        let left = if version >= 3 {
            let who = MemberIdentity::default().with_member_id(text(&id));
            let answer = client.ask(version, &leave.with_members(vec![who])).await;
            assert_eq!(answer.error_code, 0);
            answer.members[0].error_code
        } else {
            client.ask(version, &leave.with_member_id(text(&id))).await.error_code
        };
        assert_eq!(left, 0);
        let gone = client.ask(4, &heartbeat(&name, &id, 1)).await;
        assert_eq!(gone.error_code, ResponseError::UnknownMemberId.code());
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_members_share_a_group_and_one_takes_over_when_the_other_leaves() {
    let broker = Running::start(Under::Volume, &[FEW]).await;
    let mut a = with_topic(&broker, "t").await;
    let mut b = broker.client().await;
    let (a_id, _) = member(&mut a, "g", 9).await;
    assert_eq!(a.ask(5, &sync("g", &a_id, 1, &[(&a_id, "both")])).await.error_code, 0);

    let first = b.ask(9, &join("g", "", 9)).await;
    let b_id = first.member_id.to_string();
    let waiting = b.send(9, &join("g", &b_id, 9)).await;
    // The other learns of the rebalance from its heartbeat, and rejoins.
    let mut told = 0;
    while told == 0 {
        told = a.ask(4, &heartbeat("g", &a_id, 1)).await.error_code;
    }
    assert_eq!(told, ResponseError::RebalanceInProgress.code());
    let rejoined = a.ask(9, &join("g", &a_id, 9)).await;
    let joined = b.receive_as::<JoinGroupRequest>(9, waiting).await;
    assert_eq!((rejoined.generation_id, joined.generation_id), (2, 2));
    assert_eq!((rejoined.leader.to_string(), joined.leader.to_string()), (a_id.clone(), a_id.clone()));
    assert_eq!((rejoined.members.len(), joined.members.len()), (2, 0));

    let waiting = b.send(5, &sync("g", &b_id, 2, &[])).await;
    assert!(b.is_silent_for(Duration::from_millis(100)).await, "the leader has not spoken");
    let shares = [(a_id.as_str(), "first half"), (b_id.as_str(), "second half")];
    assert_eq!(a.ask(5, &sync("g", &a_id, 2, &shares)).await.assignment, Bytes::from_static(b"first half"));
    let synced = b.receive_as::<SyncGroupRequest>(5, waiting).await;
    assert_eq!(synced.assignment, Bytes::from_static(b"second half"));

    let who = MemberIdentity::default().with_member_id(text(&a_id));
    a.ask(5, &LeaveGroupRequest::default().with_group_id(group("g")).with_members(vec![who])).await;
    let rejoined = b.ask(9, &join("g", &b_id, 9)).await;
    assert_eq!((rejoined.generation_id, rejoined.leader.to_string()), (3, b_id));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_member_is_expired_by_the_clock() {
    let broker = Running::start(Under::Directory, &[FEW, "group.min.session.timeout.ms=100"]).await;
    let mut client = with_topic(&broker, "t").await;
    let joined = client.ask(3, &join("g", "", 3).with_session_timeout_ms(200)).await;
    let id = joined.member_id.to_string();
    client.ask(3, &sync("g", &id, 1, &[(&id, "x")])).await;
    assert_eq!(client.ask(3, &heartbeat("g", &id, 1)).await.error_code, 0);
    tokio::time::sleep(Duration::from_millis(600)).await;
    let gone = client.ask(3, &heartbeat("g", &id, 1)).await;
    assert_eq!(gone.error_code, ResponseError::UnknownMemberId.code());
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_group_requests_get_the_protocols_own_errors() {
    let broker = Running::start(Under::Directory, &[FEW]).await;
    let mut client = with_topic(&broker, "t").await;
    let nameless = client.ask(5, &join("", "", 5)).await;
    assert_eq!(nameless.error_code, ResponseError::InvalidGroupId.code());
    for timeout in [0, 5_999, 1_800_001, -1] {
        let refused = client.ask(5, &join("g", "", 5).with_session_timeout_ms(timeout)).await;
        assert_eq!(refused.error_code, ResponseError::InvalidSessionTimeout.code(), "{timeout}");
    }
    for version in 0..=9 {
        let stranger = client.ask(version, &join("never", "stranger", version)).await;
        assert_eq!(stranger.error_code, ResponseError::UnknownMemberId.code());
    }
    let unknown = client.ask(5, &sync("never", "stranger", 1, &[])).await;
    assert_eq!(unknown.error_code, ResponseError::UnknownMemberId.code());
    let unknown = client.ask(4, &heartbeat("never", "stranger", 1)).await;
    assert_eq!(unknown.error_code, ResponseError::UnknownMemberId.code());
    let code = |answer: OffsetCommitResponse| answer.topics[0].partitions[0].error_code;
    let unknown = code(client.ask(8, &commit("g", "", -1, "absent", 5, "")).await);
    assert_eq!(unknown, ResponseError::UnknownTopicOrPartition.code());
    let wordy = code(client.ask(8, &commit("g", "", -1, "t", 5, &"x".repeat(5000))).await);
    assert_eq!(wordy, ResponseError::OffsetMetadataTooLarge.code());
    let stale = code(client.ask(8, &commit("never", "m", 3, "t", 5, "")).await);
    assert_eq!(stale, ResponseError::IllegalGeneration.code());
    assert_eq!(committed(&mut client, 7, "never", "t").await, (-1, String::new()), "unknown is no error");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_and_members_survive_a_restart() {
    for under in HOMES {
        let broker = Running::start(under, &[FEW]).await;
        let mut client = with_topic(&broker, "t").await;
        let (id, _) = member(&mut client, "g", 9).await;
        client.ask(5, &sync("g", &id, 1, &[(&id, "all")])).await;
        for offset in 0..50 {
            let answer = client.ask(8, &commit("g", &id, 1, "t", offset, "note")).await;
            assert_eq!(answer.topics[0].partitions[0].error_code, 0);
        }
        // A consumer without membership, too.
        for n in 0..20 {
            let answer = client.ask(8, &commit(&format!("alone-{n}"), "", -1, "t", 100 + n, "")).await;
            assert_eq!(answer.topics[0].partitions[0].error_code, 0);
        }
        let broker = broker.restart(&[FEW]).await;
        let mut client = broker.client().await;
        assert_eq!(committed(&mut client, 9, "g", "t").await, (49, "note".to_owned()));
        for n in 0..20 {
            assert_eq!(committed(&mut client, 7, &format!("alone-{n}"), "t").await.0, 100 + n);
        }
        assert_eq!(client.ask(4, &heartbeat("g", &id, 1)).await.error_code, 0, "no rebalance, no new member");
        let again = client.ask(5, &sync("g", &id, 1, &[])).await;
        assert_eq!(again.assignment, Bytes::from_static(b"all"));
        broker.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_are_listed_described_and_deleted_in_every_version() {
    let broker = Running::start(Under::Directory, &[FEW]).await;
    let mut client = with_topic(&broker, "t").await;
    let (id, _) = member(&mut client, "living", 9).await;
    client.ask(5, &sync("living", &id, 1, &[(&id, "all")])).await;
    for version in 0..=5 {
        let answer = client.ask(version, &ListGroupsRequest::default()).await;
        assert_eq!((answer.error_code, answer.groups.len()), (0, 1));
        assert_eq!(answer.groups[0].group_id, group("living"));
        if version >= 4 {
            assert_eq!(&*answer.groups[0].group_state, "Stable");
            let none = ListGroupsRequest::default().with_states_filter(vec![text("Empty")]);
            assert!(client.ask(version, &none).await.groups.is_empty());
        }
    }
    for version in 0..=6 {
        let request = DescribeGroupsRequest::default().with_groups(vec![group("living"), group("absent")]);
        let answer = client.ask(version, &request).await;
        let living = &answer.groups[0];
        assert_eq!((living.error_code, &*living.group_state, living.members.len()), (0, "Stable", 1));
        assert_eq!(&*living.members[0].client_host, "/127.0.0.1");
        assert_eq!(&*answer.groups[1].group_state, "Dead");
    }
    for version in 0..=2 {
        let name = format!("dead{version}");
        client.ask(8, &commit(&name, "", -1, "t", 7, "")).await;
        let request = DeleteGroupsRequest::default().with_groups_names(vec![
            group(&name),
            group("living"),
            group("absent"),
        ]);
        let answer = client.ask(version, &request).await;
        let codes: Vec<i16> = answer.results.iter().map(|r| r.error_code).collect();
        let expected = [0, ResponseError::NonEmptyGroup.code(), ResponseError::GroupIdNotFound.code()];
        assert_eq!(codes, expected);
        assert_eq!(committed(&mut client, 7, &name, "t").await.0, -1);
    }
    let broker = broker.restart(&[FEW]).await;
    let mut client = broker.client().await;
    assert_eq!(committed(&mut client, 7, "dead1", "t").await.0, -1, "deleted groups stay deleted");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_topic_takes_its_offsets_along() {
    let broker = Running::start(Under::Directory, &[FEW]).await;
    let mut client = with_topic(&broker, "t").await;
    client.ask(8, &commit("g", "", -1, "t", 7, "")).await;
    let request = DeleteTopicsRequest::default().with_topic_names(vec![TopicName(text("t"))]);
    assert_eq!(client.ask(5, &request).await.responses[0].error_code, 0);
    assert_eq!(committed(&mut client, 7, "g", "t").await.0, -1);
    let broker = broker.restart(&[FEW]).await;
    let mut client = with_topic(&broker, "t").await;
    assert_eq!(committed(&mut client, 7, "g", "t").await.0, -1, "the new topic inherits nothing");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_offsets_of_a_group_can_be_asked_for() {
    let broker = Running::start(Under::Directory, &[FEW]).await;
    let mut client = with_topic(&broker, "t").await;
    with_topic(&broker, "u").await;
    client.ask(8, &commit("g", "", -1, "t", 1, "")).await;
    client.ask(8, &commit("g", "", -1, "u", 2, "")).await;
    for version in 2..=7 {
        let request = OffsetFetchRequest::default().with_group_id(group("g")).with_topics(None);
        let answer = client.ask(version, &request).await;
        assert_eq!(answer.topics.len(), 2);
    }
    for version in 8..=9 {
        let wanted = OffsetFetchRequestGroup::default().with_group_id(group("g")).with_topics(None);
        let answer = client.ask(version, &OffsetFetchRequest::default().with_groups(vec![wanted])).await;
        assert_eq!(answer.groups[0].topics.len(), 2);
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_topic_of_committed_offsets_holds_kafkas_own_records() {
    let broker = Running::start(Under::Volume, &["offsets.topic.num.partitions=1"]).await;
    let mut client = with_topic(&broker, "t").await;
    client.ask(8, &commit("g", "", -1, "t", 7, "note")).await;
    let wanted = FetchPartition::default().with_partition_max_bytes(1 << 20);
    let topic =
        FetchTopic::default().with_topic(TopicName(text("__consumer_offsets"))).with_partitions(vec![wanted]);
    let request = FetchRequest::default().with_max_bytes(1 << 20).with_topics(vec![topic]);
    let answer = client.ask(12, &request).await;
    let mut raw = answer.responses[0].partitions[0].records.clone().expect("records");
    let records = RecordBatchDecoder::decode(&mut raw).expect("a batch").records;
    // OffsetCommitKey 1: group, topic, partition. OffsetCommitValue 3: offset, epoch, metadata, time.
    assert_eq!(records[0].key.as_deref(), Some(&b"\0\x01\0\x01g\0\x01t\0\0\0\0"[..]));
    let value = records[0].value.as_deref().expect("a value");
    assert_eq!(&value[..20], b"\0\x03\0\0\0\0\0\0\0\x07\xff\xff\xff\xff\0\x04note");
    assert_eq!(value.len(), 28);
    broker.stop().await;
}

/// One batch of the topic of committed offsets once kept the whole broker from starting, if no copy of it was good.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_batch_of_committed_offsets_costs_what_is_in_it() {
    let broker = Running::start(Under::Directory, &[FEW]).await;
    let mut client = with_topic(&broker, "t").await;
    let names: Vec<String> = (0..12).map(|number| format!("g{number}")).collect();
    for offset in [1, 2] {
        for name in &names {
            let answer = client.ask(9, &commit(name, "", -1, "t", offset, "")).await;
            assert_eq!(answer.topics[0].partitions[0].error_code, 0);
        }
    }
    let (place, under) = broker.stop().await;
    let mut damaged = 0;
    for index in 0..3 {
        let dir = place.path().join(format!("log/__consumer_offsets-{index}"));
        for file in std::fs::read_dir(dir).expect("a partition").map(|entry| entry.expect("a file").path()) {
            if file.extension().is_some_and(|extension| extension == "log") {
                let mut bytes = std::fs::read(&file).expect("a segment");
                // The first batch has one record, and others follow.
                if bytes.len() > 200 {
                    bytes[70] ^= 0x55;
                    std::fs::write(&file, bytes).expect("written");
                    damaged += 1;
                }
            }
        }
    }
    assert!(damaged > 0, "twelve groups have records in some partition");
    let broker = Running::start_in(place, under, &[FEW]).await;
    let mut client = broker.client().await;
    for name in &names {
        assert_eq!(committed(&mut client, 9, name, "t").await.0, 2, "{name}");
        let answer = client.ask(9, &commit(name, "", -1, "t", 3, "")).await;
        assert_eq!(answer.topics[0].partitions[0].error_code, 0);
    }
    broker.stop().await;
}
