//! The group protocol: finding the coordinator, joining, syncing, staying, leaving, and listing groups.

use super::{OK, text};
use crate::dispatch::{Answer, Context};
use crate::errors;
use crate::groups::exchange::{Join, Joined, Sync, Synced};
use crate::groups::member::Protocol;
use crate::send::Response;
use crate::wire::EncodeError;
use bytes::Bytes;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::delete_groups_response::DeletableGroupResult;
use kafka_protocol::messages::describe_groups_response::{DescribedGroup, DescribedGroupMember};
use kafka_protocol::messages::find_coordinator_response::Coordinator;
use kafka_protocol::messages::join_group_response::JoinGroupResponseMember;
use kafka_protocol::messages::leave_group_response::MemberResponse;
use kafka_protocol::messages::list_groups_response::ListedGroup;
use kafka_protocol::messages::{
    BrokerId, DeleteGroupsRequest, DeleteGroupsResponse, DescribeGroupsRequest, DescribeGroupsResponse,
    FindCoordinatorRequest, FindCoordinatorResponse, GroupId, HeartbeatRequest, HeartbeatResponse,
    JoinGroupRequest, JoinGroupResponse, LeaveGroupRequest, LeaveGroupResponse, ListGroupsRequest,
    ListGroupsResponse, SyncGroupRequest, SyncGroupResponse,
};
use kafka_protocol::protocol::StrBytes;
use std::time::Duration;

/// Codes as the responses carry them.
fn code(refusal: Option<ResponseError>) -> i16 {
    refusal.map_or(OK, |error| error.code())
}

/// `FindCoordinator`: it is us, for groups; nobody, for what does not exist yet.
pub async fn find_coordinator(
    context: &Context,
    body: FindCoordinatorRequest,
) -> Result<Response, EncodeError> {
    let refused = match body.key_type {
        0 => context.broker.groups.ensure_topic().await.err().map(|error| {
            tracing::error!(%error, "the topic of committed offsets could not be made");
            (ResponseError::CoordinatorNotAvailable, errors_text(&error))
        }),
        1 => Some((
            ResponseError::InvalidRequest,
            "transactions are not supported by this broker yet; use an idempotent producer without a transactional.id"
                .to_owned(),
        )),
        other => Some((ResponseError::InvalidRequest, format!("there is no coordinator of type {other}"))),
    };
    let broker = &context.broker;
    let (node, host, port) = match &refused {
        None => (broker.config.node_id, broker.advertised.host.as_str(), i32::from(broker.advertised.port)),
        Some(_) => (-1, "", -1),
    };
    let error = refused.as_ref().map_or(OK, |(error, _)| error.code());
    let message = refused.map(|(_, message)| text(message));
    let mut response = FindCoordinatorResponse::default();
    if context.version() >= 4 {
        for key in body.coordinator_keys {
            response.coordinators.push(
                Coordinator::default()
                    .with_key(key)
                    .with_node_id(BrokerId(node))
                    .with_host(text(host))
                    .with_port(port)
                    .with_error_code(error)
                    .with_error_message(message.clone()),
            );
        }
    } else {
        response.error_code = error;
        response.error_message = if context.version() >= 1 { message } else { None };
        response.node_id = BrokerId(node);
        response.host = text(host);
        response.port = port;
    }
    context.respond(&response)
}

fn errors_text(error: &logstore::Error) -> String {
    format!("{error} ({:?})", errors::kafka(error))
}

/// `JoinGroup`; the answer comes with the rebalance.
pub async fn join(context: Context, body: JoinGroupRequest) -> Result<Answer, EncodeError> {
    let config = &context.broker.config;
    let session = body.session_timeout_ms;
    let allowed = config.group_min_session_timeout_ms..=config.group_max_session_timeout_ms;
    let refused = if body.group_id.is_empty() {
        Some(ResponseError::InvalidGroupId)
    } else if !allowed.contains(&session) {
        Some(ResponseError::InvalidSessionTimeout)
    } else {
        None
    };
    if let Some(error) = refused {
        return joined(&context, Joined::refused(error, &body.member_id)).map(Answer::Now);
    }
    let version = context.version();
    let instance_id = body.group_instance_id.as_ref().map(ToString::to_string);
    // Before version 1 one timeout meant both.
    let rebalance = if version >= 1 { body.rebalance_timeout_ms } else { session };
    let stem = instance_id.as_deref().unwrap_or(&context.header.client_id);
    let join = Join {
        member_id: body.member_id.to_string(),
        fresh_id: format!("{stem}-{}", context.broker.groups.fresh_uuid()),
        client_id: context.header.client_id.clone(),
        client_host: format!("/{}", context.peer.ip()),
        instance_id,
        protocol_type: body.protocol_type.to_string(),
        // Copied: a slice would keep the whole frame in memory for as long as the member lives.
        protocols: body
            .protocols
            .iter()
            .map(|p| Protocol { name: p.name.to_string(), metadata: Bytes::copy_from_slice(&p.metadata) })
            .collect(),
        session_timeout: millis(session),
        rebalance_timeout: millis(rebalance),
        id_required: version >= 4,
        can_skip_assignment: version >= 9,
    };
    let answer = context.broker.groups.join(&body.group_id, join).await;
    Ok(Answer::Later(Box::pin(async move { joined(&context, answer.await) })))
}

fn millis(ms: i32) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

fn joined(context: &Context, joined: Joined) -> Result<Response, EncodeError> {
    let version = context.version();
    // Up to version 6 the protocol's name cannot be null.
    let protocol = joined.protocol.map(text).or_else(|| (version < 7).then(StrBytes::default));
    let members = joined.members.into_iter().map(|(id, instance, metadata)| {
        let member = JoinGroupResponseMember::default().with_member_id(text(id)).with_metadata(metadata);
        if version >= 5 { member.with_group_instance_id(instance.map(text)) } else { member }
    });
    let mut response = JoinGroupResponse::default()
        .with_error_code(code(joined.refusal))
        .with_generation_id(joined.generation)
        .with_protocol_name(protocol)
        .with_leader(text(joined.leader))
        .with_member_id(text(joined.member_id))
        .with_members(members.collect());
    if version >= 7 {
        response.protocol_type = joined.protocol_type.map(text);
    }
    if version >= 9 {
        response.skip_assignment = joined.skip_assignment;
    }
    context.respond(&response)
}

/// `SyncGroup`; the answer comes with the leader's assignment.
pub async fn sync(context: Context, body: SyncGroupRequest) -> Result<Answer, EncodeError> {
    let sync = Sync {
        member_id: body.member_id.to_string(),
        instance_id: body.group_instance_id.as_ref().map(ToString::to_string),
        generation: body.generation_id,
        protocol_type: body.protocol_type.as_ref().map(ToString::to_string),
        protocol: body.protocol_name.as_ref().map(ToString::to_string),
        assignments: body
            .assignments
            .iter()
            .map(|a| (a.member_id.to_string(), Bytes::copy_from_slice(&a.assignment)))
            .collect(),
    };
    let answer = context.broker.groups.sync(&body.group_id, sync).await;
    Ok(Answer::Later(Box::pin(async move { synced(&context, answer.await) })))
}

fn synced(context: &Context, synced: Synced) -> Result<Response, EncodeError> {
    let mut response =
        SyncGroupResponse::default().with_error_code(code(synced.refusal)).with_assignment(synced.assignment);
    if context.version() >= 5 {
        response.protocol_type = synced.protocol_type.map(text);
        response.protocol_name = synced.protocol.map(text);
    }
    context.respond(&response)
}

/// `Heartbeat`.
pub fn heartbeat(context: &Context, body: &HeartbeatRequest) -> Result<Response, EncodeError> {
    let verdict = context.broker.groups.heartbeat(
        &body.group_id,
        &body.member_id,
        body.group_instance_id.as_deref(),
        body.generation_id,
    );
    context.respond(&HeartbeatResponse::default().with_error_code(code(verdict.err())))
}

/// `LeaveGroup`: of the member itself, or, from version 3, of several.
pub async fn leave(context: &Context, body: LeaveGroupRequest) -> Result<Response, EncodeError> {
    let groups = &context.broker.groups;
    let mut response = LeaveGroupResponse::default();
    if context.version() < 3 {
        response.error_code = code(groups.leave(&body.group_id, &body.member_id, None).await.err());
        return context.respond(&response);
    }
    for member in body.members {
        let verdict =
            groups.leave(&body.group_id, &member.member_id, member.group_instance_id.as_deref()).await;
        response.members.push(
            MemberResponse::default()
                .with_member_id(member.member_id)
                .with_group_instance_id(member.group_instance_id)
                .with_error_code(code(verdict.err())),
        );
    }
    context.respond(&response)
}

/// `ListGroups`.
pub fn list(context: &Context, body: &ListGroupsRequest) -> Result<Response, EncodeError> {
    let version = context.version();
    let passes = |filter: &[StrBytes], value: &str| {
        filter.is_empty() || filter.iter().any(|wanted| wanted.eq_ignore_ascii_case(value))
    };
    let mut response = ListGroupsResponse::default();
    for group in context.broker.groups.describe_all() {
        if !passes(&body.states_filter, group.state) || !passes(&body.types_filter, "classic") {
            continue;
        }
        let mut listed = ListedGroup::default()
            .with_group_id(GroupId(text(group.name)))
            .with_protocol_type(text(group.protocol_type));
        if version >= 4 {
            listed.group_state = text(group.state);
        }
        if version >= 5 {
            listed.group_type = text("classic");
        }
        response.groups.push(listed);
    }
    context.respond(&response)
}

/// `DescribeGroups`.
pub fn describe(context: &Context, body: DescribeGroupsRequest) -> Result<Response, EncodeError> {
    let version = context.version();
    let mut response = DescribeGroupsResponse::default();
    for id in body.groups {
        let described = DescribedGroup::default().with_authorized_operations(i32::MIN);
        if let Err(error) = context.broker.groups.check(&id) {
            response.groups.push(described.with_error_code(error.code()).with_group_id(id));
            continue;
        }
        let described = match context.broker.groups.describe(&id) {
            Some(group) => described
                .with_group_state(text(group.state))
                .with_protocol_type(text(group.protocol_type))
                .with_protocol_data(text(group.protocol.clone()))
                .with_members(
                    group.members.iter().map(|m| described_member(m, &group.protocol, version)).collect(),
                ),
            // From version 6 on (KIP-1043) unknown groups are an error; before, they are dead.
            None if version >= 6 => described
                .with_group_state(text("Dead"))
                .with_error_code(ResponseError::GroupIdNotFound.code())
                .with_error_message(Some(text(format!("there is no group {}", &*id.0)))),
            None => described.with_group_state(text("Dead")),
        };
        response.groups.push(described.with_group_id(id));
    }
    context.respond(&response)
}

fn described_member(
    member: &crate::groups::member::Member,
    protocol: &str,
    version: i16,
) -> DescribedGroupMember {
    let described = DescribedGroupMember::default()
        .with_member_id(text(member.id.clone()))
        .with_client_id(text(member.client_id.clone()))
        .with_client_host(text(member.client_host.clone()))
        .with_member_metadata(member.metadata(protocol))
        .with_member_assignment(member.assignment.clone());
    if version >= 4 {
        described.with_group_instance_id(member.instance_id.clone().map(text))
    } else {
        described
    }
}

/// `DeleteGroups`.
pub async fn delete(context: &Context, body: DeleteGroupsRequest) -> Result<Response, EncodeError> {
    let mut response = DeleteGroupsResponse::default();
    for id in body.groups_names {
        let verdict = context.broker.groups.delete(&id).await;
        response
            .results
            .push(DeletableGroupResult::default().with_group_id(id).with_error_code(code(verdict.err())));
    }
    context.respond(&response)
}
