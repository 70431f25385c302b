//! `DescribeConfigs`: what topics and the broker are set to, and where each value comes from.

use super::{OK, text};
use crate::config::Kind;
use crate::dispatch::Context;
use crate::send::Response;
use crate::wire::EncodeError;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::describe_configs_response::{
    DescribeConfigsResourceResult, DescribeConfigsResult, DescribeConfigsSynonym,
};
use kafka_protocol::messages::{DescribeConfigsRequest, DescribeConfigsResponse};
use kafka_protocol::protocol::StrBytes;
use logstore::config::{ConfigKind, KEYS};

const TOPIC: i8 = 2;
const BROKER: i8 = 4;

// Where a value comes from (`ConfigSource`).
const SET_ON_TOPIC: i8 = 1;
const SET_ON_BROKER: i8 = 4;
const DEFAULT: i8 = 5;

/// `DescribeConfigs`.
pub fn describe_configs(context: &Context, body: DescribeConfigsRequest) -> Result<Response, EncodeError> {
    let mut response = DescribeConfigsResponse::default();
    for resource in body.resources {
        let result = match resource.resource_type {
            TOPIC => topic(context, &resource, body.include_synonyms, body.include_documentation),
            BROKER => broker(context, &resource),
            other => Err((
                ResponseError::InvalidRequest,
                format!("resources of type {other} have no configuration"),
            )),
        };
        let described = match result {
            Ok(configs) => DescribeConfigsResult::default().with_error_code(OK).with_configs(configs),
            Err((error, message)) => DescribeConfigsResult::default()
                .with_error_code(error.code())
                .with_error_message(Some(text(message))),
        };
        response.results.push(
            described.with_resource_type(resource.resource_type).with_resource_name(resource.resource_name),
        );
    }
    context.respond(&response)
}

type Described = Result<Vec<DescribeConfigsResourceResult>, (ResponseError, String)>;

fn wanted(keys: Option<&Vec<StrBytes>>, name: &str) -> bool {
    keys.is_none_or(|keys| keys.is_empty() || keys.iter().any(|key| **key == *name))
}

fn topic(context: &Context, resource: &DescribeConfigsResource, synonyms: bool, docs: bool) -> Described {
    let name = &resource.resource_name;
    let Some(topic) = context.broker.store.topic(name) else {
        return Err((ResponseError::UnknownTopicOrPartition, format!("there is no topic {}", &**name)));
    };
    let (config, defaults) = (topic.config(), context.broker.store.topic_defaults());
    let keys = KEYS.iter().filter(|key| wanted(resource.configuration_keys.as_ref(), key.name));
    let describe = |key: &logstore::config::ConfigKey| {
        let own = config.overrides().contains_key(key.name);
        let default = defaults.get(key.name);
        let from_broker = default.as_deref() != Some(key.default);
        let default_source = if from_broker { SET_ON_BROKER } else { DEFAULT };
        let source = if own { SET_ON_TOPIC } else { default_source };
        let synonym = |value: Option<String>, source| {
            DescribeConfigsSynonym::default()
                .with_name(text(key.name))
                .with_value(value.map(text))
                .with_source(source)
        };
        let mut described = DescribeConfigsResourceResult::default()
            .with_name(text(key.name))
            .with_value(config.get(key.name).map(text))
            .with_config_source(source);
        if synonyms {
            if own {
                described.synonyms.push(synonym(config.get(key.name), SET_ON_TOPIC));
            }
            described.synonyms.push(synonym(default, default_source));
        }
        if context.version() >= 3 {
            described.config_type = match key.kind {
                ConfigKind::Boolean => 1,
                ConfigKind::String => 2,
                ConfigKind::Int => 3,
                ConfigKind::Long => 5,
                ConfigKind::Double => 6,
                ConfigKind::List => 7,
            };
            described.documentation = docs.then(|| text(key.doc));
        }
        described
    };
    Ok(keys.map(describe).collect())
}

fn broker(context: &Context, resource: &DescribeConfigsResource) -> Described {
    let node = context.broker.config.node_id.to_string();
    // An empty name asks for dynamic defaults of all brokers, of which there are none.
    if resource.resource_name.is_empty() {
        return Ok(Vec::new());
    }
    if *resource.resource_name != *node {
        let message = format!("this is broker {node}, not {}", &*resource.resource_name);
        return Err((ResponseError::InvalidRequest, message));
    }
    let entries = context.broker.config.entries();
    let keys = entries.into_iter().filter(|(key, ..)| wanted(resource.configuration_keys.as_ref(), key));
    let describe = |(key, value, kind, own): (&'static str, Option<String>, Kind, bool)| {
        let described = DescribeConfigsResourceResult::default()
            .with_name(text(key))
            .with_value(value.map(text))
            .with_read_only(true)
            .with_config_source(if own { SET_ON_BROKER } else { DEFAULT });
        if context.version() >= 3 {
            described.with_config_type(match kind {
                Kind::Boolean => 1,
                Kind::Text => 2,
                Kind::Int => 3,
                Kind::Long => 5,
                Kind::Double => 6,
            })
        } else {
            described
        }
    };
    Ok(keys.map(describe).collect())
}
