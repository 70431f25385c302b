//! What clients ask first: which APIs there are, who is in the cluster, where topics lie.

use super::{OK, text};
use crate::broker::is_internal;
use crate::dispatch::Context;
use crate::errors;
use crate::send::Response;
use crate::wire::{self, EncodeError, apis};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::api_versions_response::ApiVersion;
use kafka_protocol::messages::describe_cluster_response::DescribeClusterBroker;
use kafka_protocol::messages::metadata_response::{
    MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
};
use kafka_protocol::messages::{
    ApiVersionsRequest, ApiVersionsResponse, BrokerId, DescribeClusterRequest, DescribeClusterResponse,
    MetadataRequest, MetadataResponse, TopicName,
};
use logstore::Topic;
use std::sync::Arc;
use uuid::Uuid;

/// No operation is authorized or not: there is no authorizer (Kafka's "absent").
const NO_OPERATIONS: i32 = i32::MIN;

fn ranges() -> Vec<ApiVersion> {
    let of = |api: &apis::Api| {
        let range = ApiVersion::default();
        range.with_api_key(api.key).with_min_version(api.min).with_max_version(api.max)
    };
    apis::SERVED.iter().map(of).collect()
}

/// `ApiVersions`.
pub fn api_versions(context: &Context, body: &ApiVersionsRequest) -> Result<Response, EncodeError> {
    // KIP-511: a client that gives itself a name must give a proper one.
    let named = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.')
    };
    let proper =
        context.version() < 3 || (named(&body.client_software_name) && named(&body.client_software_version));
    let error = if proper { OK } else { ResponseError::InvalidRequest.code() };
    let keys = if proper { ranges() } else { Vec::new() };
    context.respond(&ApiVersionsResponse::default().with_error_code(error).with_api_keys(keys))
}

/// `ApiVersions` in a version of the future: answered in version 0, which everybody reads.
pub fn api_versions_unknown(context: &Context) -> Result<Response, EncodeError> {
    let body = ApiVersionsResponse::default()
        .with_error_code(ResponseError::UnsupportedVersion.code())
        .with_api_keys(ranges());
    wire::response(context.header.correlation, context.header.api, 0, &body).map(Response::from)
}

/// `Metadata`; makes topics that are asked for, where that is allowed.
pub async fn metadata(context: &Context, body: MetadataRequest) -> Result<Response, EncodeError> {
    let broker = &context.broker;
    let may_create = broker.config.auto_create_topics && body.allow_auto_topic_creation;
    let mut topics = Vec::new();
    match body.topics {
        // In version 0 an empty list means all.
        Some(wanted) if !(wanted.is_empty() && context.version() == 0) => {
            for topic in wanted {
                topics.push(match topic.name {
                    Some(name) => named_topic(context, name, may_create).await,
                    None => topic_with_id(context, topic.topic_id),
                });
            }
        }
        _ => topics.extend(broker.store.topics().iter().map(|topic| described(context, topic))),
    }
    let node = BrokerId(broker.config.node_id);
    let us = MetadataResponseBroker::default()
        .with_node_id(node)
        .with_host(text(&broker.advertised.host))
        .with_port(i32::from(broker.advertised.port));
    let response = MetadataResponse::default()
        .with_brokers(vec![us])
        .with_cluster_id(Some(text(broker.store.cluster_id())))
        .with_controller_id(node)
        .with_topics(topics)
        .with_cluster_authorized_operations(NO_OPERATIONS);
    context.respond(&response)
}

async fn named_topic(context: &Context, name: TopicName, may_create: bool) -> MetadataResponseTopic {
    let store = &context.broker.store;
    let found = match store.topic(&name) {
        Some(topic) => Ok(topic),
        None if may_create && !is_internal(&name) => {
            context.broker.create_default_topic(&name).await.map_err(|error| {
                tracing::warn!(topic = %&*name, %error, "topic not created");
                match errors::kafka(&error) {
                    // It exists under a name that collides.
                    ResponseError::TopicAlreadyExists => ResponseError::InvalidTopicException,
                    code => code,
                }
            })
        }
        None if is_legal(&name) => Err(ResponseError::UnknownTopicOrPartition),
        None => Err(ResponseError::InvalidTopicException),
    };
    match found {
        Ok(topic) => described(context, &topic),
        Err(error) => {
            let internal = is_internal(&name);
            failed(error).with_name(Some(name)).with_is_internal(internal)
        }
    }
}

fn topic_with_id(context: &Context, id: Uuid) -> MetadataResponseTopic {
    match context.broker.store.topic_by_id(id) {
        Some(topic) => described(context, &topic),
        // Before version 12 a name cannot be null.
        None if context.version() < 12 => {
            failed(ResponseError::UnknownTopicId).with_topic_id(id).with_name(Some(TopicName::default()))
        }
        None => failed(ResponseError::UnknownTopicId).with_topic_id(id).with_name(None),
    }
}

fn failed(error: ResponseError) -> MetadataResponseTopic {
    MetadataResponseTopic::default()
        .with_error_code(error.code())
        .with_topic_authorized_operations(NO_OPERATIONS)
}

fn described(context: &Context, topic: &Arc<Topic>) -> MetadataResponseTopic {
    let node = BrokerId(context.broker.config.node_id);
    let partitions = topic.partitions().iter().map(|partition| {
        MetadataResponsePartition::default()
            .with_partition_index(partition.index())
            .with_leader_id(node)
            .with_leader_epoch(partition.leader_epoch())
            .with_replica_nodes(vec![node])
            .with_isr_nodes(vec![node])
    });
    MetadataResponseTopic::default()
        .with_name(Some(TopicName(text(topic.name()))))
        .with_topic_id(topic.id())
        .with_is_internal(is_internal(topic.name()))
        .with_partitions(partitions.collect())
        .with_topic_authorized_operations(NO_OPERATIONS)
}

/// Kafka's rule for topic names.
#[must_use]
pub fn is_legal(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=249).contains(&name.len()) && name != "." && name != ".." && name.chars().all(letter)
}

/// `DescribeCluster`.
pub fn describe_cluster(context: &Context, body: &DescribeClusterRequest) -> Result<Response, EncodeError> {
    let broker = &context.broker;
    let node = BrokerId(broker.config.node_id);
    let mut response = DescribeClusterResponse::default()
        .with_cluster_id(text(broker.store.cluster_id()))
        .with_controller_id(node)
        .with_cluster_authorized_operations(NO_OPERATIONS);
    // 1 is brokers; controllers (2) are no endpoints of their own here.
    if context.version() >= 1 && body.endpoint_type != 1 {
        response.error_code = ResponseError::MismatchedEndpointType.code();
        response.error_message = Some(text("this is a broker: ask for brokers (endpoint type 1)"));
    } else {
        response.brokers.push(
            DescribeClusterBroker::default()
                .with_broker_id(node)
                .with_host(text(&broker.advertised.host))
                .with_port(i32::from(broker.advertised.port)),
        );
    }
    context.respond(&response)
}
