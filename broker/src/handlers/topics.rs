//! `CreateTopics` and `DeleteTopics`.

use super::{OK, text};
use crate::broker::is_internal;
use crate::dispatch::Context;
use crate::errors;
use crate::handlers::cluster::is_legal;
use crate::send::Response;
use crate::wire::EncodeError;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::create_topics_request::CreatableTopic;
use kafka_protocol::messages::create_topics_response::{CreatableTopicConfigs, CreatableTopicResult};
use kafka_protocol::messages::delete_topics_response::DeletableTopicResult;
use kafka_protocol::messages::{
    CreateTopicsRequest, CreateTopicsResponse, DeleteTopicsRequest, DeleteTopicsResponse, TopicName,
};
use logstore::TopicConfig;
use std::collections::HashMap;
use uuid::Uuid;

/// An error and its sentence.
type Refused = (ResponseError, String);

/// `CreateTopics`: each topic succeeds or fails by itself.
pub async fn create(context: &Context, body: CreateTopicsRequest) -> Result<Response, EncodeError> {
    let mut named = HashMap::new();
    for topic in &body.topics {
        *named.entry(topic.name.clone()).or_insert(0u32) += 1;
    }
    let mut response = CreateTopicsResponse::default();
    for topic in body.topics {
        let name = topic.name.clone();
        let result = if named.get(&name).is_some_and(|n| *n > 1) {
            Err((ResponseError::InvalidRequest, "the request names this topic more than once".to_owned()))
        } else {
            create_one(context, &topic, body.validate_only).await
        };
        response.topics.push(match result {
            Ok(created) => created.with_name(name),
            Err((error, message)) => CreatableTopicResult::default()
                .with_name(name)
                .with_error_code(error.code())
                .with_error_message(Some(text(message)))
                .with_num_partitions(-1)
                .with_replication_factor(-1)
                .with_configs(Some(Vec::new())),
        });
    }
    context.respond(&response)
}

async fn create_one(
    context: &Context,
    topic: &CreatableTopic,
    validate_only: bool,
) -> Result<CreatableTopicResult, Refused> {
    let store = &context.broker.store;
    let name: &str = &topic.name;
    if !is_legal(name) {
        let rule = "a topic name has 1 to 249 of a-z, A-Z, 0-9, '.', '_' and '-', and is not '.' or '..'";
        return Err((ResponseError::InvalidTopicException, rule.to_owned()));
    }
    if is_internal(name) {
        return Err((ResponseError::InvalidTopicException, "the broker makes its own topics".to_owned()));
    }
    if store.topic(name).is_some() {
        return Err((ResponseError::TopicAlreadyExists, format!("topic {name} exists already")));
    }
    let partitions = partition_count(context, topic)?;
    let mut config = store.topic_defaults();
    for entry in &topic.configs {
        // A null value asks for the default.
        if let Some(value) = &entry.value {
            config.set(&entry.name, value).map_err(|error| (errors::kafka(&error), error.to_string()))?;
        }
    }
    let id = if validate_only {
        Uuid::nil()
    } else {
        let created = store.create_topic(name, partitions, config.clone()).await;
        created.map_err(|error| (errors::kafka(&error), error.to_string()))?.id()
    };
    Ok(CreatableTopicResult::default()
        .with_topic_id(id)
        .with_error_code(OK)
        .with_num_partitions(partitions as i32)
        .with_replication_factor(1)
        .with_configs(Some(described(&config))))
}

fn partition_count(context: &Context, topic: &CreatableTopic) -> Result<u32, Refused> {
    let node = context.broker.config.node_id;
    if !topic.assignments.is_empty() {
        if topic.num_partitions != -1 || topic.replication_factor != -1 {
            let rule = "with assignments, partition count and replication factor are -1";
            return Err((ResponseError::InvalidRequest, rule.to_owned()));
        }
        let mut indexes: Vec<i32> = topic.assignments.iter().map(|a| a.partition_index).collect();
        indexes.sort_unstable();
        let contiguous = indexes.iter().copied().eq(0..indexes.len() as i32);
        let ours = topic.assignments.iter().all(|a| a.broker_ids.iter().map(|b| b.0).eq([node]));
        if !contiguous || !ours {
            let rule = format!("assignments number the partitions from 0 and name broker {node} alone");
            return Err((ResponseError::InvalidReplicaAssignment, rule));
        }
        return Ok(indexes.len() as u32);
    }
    if topic.replication_factor != -1 && topic.replication_factor != 1 {
        let rule = format!(
            "replication factor {} is not possible: there is one broker, and its volume mirrors every record",
            topic.replication_factor
        );
        return Err((ResponseError::InvalidReplicationFactor, rule));
    }
    match topic.num_partitions {
        -1 => Ok(context.broker.config.num_partitions as u32),
        n if n > 0 => Ok(n as u32),
        n => Err((ResponseError::InvalidPartitions, format!("a topic cannot have {n} partitions"))),
    }
}

fn described(config: &TopicConfig) -> Vec<CreatableTopicConfigs> {
    let entry = |key: &logstore::config::ConfigKey| {
        let own = config.overrides().contains_key(key.name);
        CreatableTopicConfigs::default()
            .with_name(text(key.name))
            .with_value(config.get(key.name).map(text))
            .with_config_source(if own { 1 } else { 5 })
    };
    logstore::config::KEYS.iter().map(entry).collect()
}

/// `DeleteTopics`, by name or, from version 6, by id.
pub async fn delete(context: &Context, body: DeleteTopicsRequest) -> Result<Response, EncodeError> {
    let by_name = |name: TopicName| (Some(name), Uuid::nil());
    let wanted: Vec<(Option<TopicName>, Uuid)> = if context.version() >= 6 {
        body.topics.into_iter().map(|t| (t.name, t.topic_id)).collect()
    } else {
        body.topic_names.into_iter().map(by_name).collect()
    };
    let mut response = DeleteTopicsResponse::default();
    for (name, id) in wanted {
        let mut result = DeletableTopicResult::default().with_name(name.clone()).with_topic_id(id);
        match delete_one(context, name, id).await {
            Ok((name, id)) => {
                result.name = Some(name);
                // Before version 6 the response has no place for it.
                result.topic_id = if context.version() >= 6 { id } else { Uuid::nil() };
            }
            Err((error, message)) => {
                result.error_code = error.code();
                result.error_message = Some(text(message));
            }
        }
        response.responses.push(result);
    }
    context.respond(&response)
}

async fn delete_one(
    context: &Context,
    name: Option<TopicName>,
    id: Uuid,
) -> Result<(TopicName, Uuid), Refused> {
    let broker = &context.broker;
    if !broker.config.delete_topics {
        let error = if context.version() >= 3 {
            ResponseError::TopicDeletionDisabled
        } else {
            ResponseError::InvalidRequest
        };
        return Err((error, "topic deletion is disabled: see delete.topic.enable".to_owned()));
    }
    let topic = match (&name, id.is_nil()) {
        (Some(name), true) => broker.store.topic(name).ok_or_else(|| {
            (ResponseError::UnknownTopicOrPartition, format!("there is no topic {}", &**name))
        })?,
        (None, false) => broker
            .store
            .topic_by_id(id)
            .ok_or_else(|| (ResponseError::UnknownTopicId, format!("there is no topic with id {id}")))?,
        _ => {
            return Err((
                ResponseError::InvalidRequest,
                "name the topic by name or by id, not both".to_owned(),
            ));
        }
    };
    if is_internal(topic.name()) {
        let message = format!("{} is the broker's own", topic.name());
        return Err((ResponseError::InvalidTopicException, message));
    }
    let refused = |error: logstore::Error| (errors::kafka(&error), error.to_string());
    broker.store.delete_topic(topic.name()).await.map_err(refused)?;
    // A topic made later under the same name must not inherit offsets.
    broker.groups.forget_topic(topic.name()).await;
    Ok((TopicName(text(topic.name())), topic.id()))
}
