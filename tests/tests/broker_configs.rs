//! Settings of flushing, compaction and scrubs over the wire: taken when a topic is made, refused by name, and described
//! with their values, types and sources, broker-wide and topic by topic.

use kafka_protocol::ResponseError;
use kafka_protocol::messages::create_topics_request::{CreatableTopic, CreatableTopicConfig};
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::*;
use kafka_protocol::protocol::StrBytes;
use tests::broker::{Client, Running, Under};

fn text(of: &str) -> StrBytes {
    StrBytes::from_string(of.to_owned())
}

/// Asks for a topic; returns the error code.
async fn create(client: &mut Client, name: &str, configs: &[(&str, &str)]) -> i16 {
    let configs = configs
        .iter()
        .map(|(k, v)| CreatableTopicConfig::default().with_name(text(k)).with_value(Some(text(v))))
        .collect();
    let topic = CreatableTopic::default()
        .with_name(TopicName(text(name)))
        .with_num_partitions(1)
        .with_replication_factor(1)
        .with_configs(configs);
    client.ask(7, &CreateTopicsRequest::default().with_topics(vec![topic])).await.topics[0].error_code
}

// Where a value comes from: the topic, the broker's file, Kafka's default. And what it is.
const TOPIC: i8 = 1;
const BROKER: i8 = 4;
const DEFAULT: i8 = 5;
const INT: i8 = 3;
const LONG: i8 = 5;
const DOUBLE: i8 = 6;

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_taken_refused_and_described_with_their_sources() {
    let wide = [
        "log.flush.interval.ms=5000",
        "log.cleaner.min.cleanable.ratio=0.25",
        "log.cleaner.delete.retention.ms=77",
        "log.flush.offset.checkpoint.interval.ms=4321",
    ];
    let broker = Running::start(Under::Directory, &wide).await;
    let mut client = broker.client().await;
    let own = [
        ("flush.ms", "250"),
        ("flush.messages", "9"),
        ("min.cleanable.dirty.ratio", "0.75"),
        ("min.compaction.lag.ms", "6"),
        ("max.compaction.lag.ms", "60000"),
    ];
    assert_eq!(create(&mut client, "own", &own).await, 0);
    assert_eq!(create(&mut client, "plain", &[]).await, 0);
    for (key, value) in [("flush.ms", "-1"), ("min.cleanable.dirty.ratio", "1.5"), ("flush.millis", "1")] {
        let refused = create(&mut client, "refused", &[(key, value)]).await;
        assert_eq!(refused, ResponseError::InvalidConfig.code(), "{key}={value}");
    }
    // What a topic sets is kept.
    let broker = broker.restart(&wide).await;
    let mut client = broker.client().await;
    let resources = [(2, "own"), (2, "plain"), (4, "1")].map(|(kind, name)| {
        DescribeConfigsResource::default()
            .with_resource_type(kind)
            .with_resource_name(text(name))
            .with_configuration_keys(None)
    });
    let request = DescribeConfigsRequest::default().with_resources(resources.to_vec());
    let answer = client.ask(4, &request).await;
    let find = |n: usize, key: &str| {
        let config = answer.results[n].configs.iter().find(|c| &*c.name == key).expect("the key");
        let value = config.value.as_ref().map(ToString::to_string).unwrap_or_default();
        (value, config.config_source, config.config_type)
    };
    let is = |value: &str, source: i8, kind: i8| (value.to_owned(), source, kind);
    for (key, value) in own {
        assert_eq!(
            find(0, key),
            is(value, TOPIC, if key.ends_with("ratio") { DOUBLE } else { LONG }),
            "{key}"
        );
    }
    let never = i64::MAX.to_string();
    assert_eq!(find(1, "flush.ms"), is("5000", BROKER, LONG));
    assert_eq!(find(1, "flush.messages"), is(&never, DEFAULT, LONG));
    assert_eq!(find(1, "min.cleanable.dirty.ratio"), is("0.25", BROKER, DOUBLE));
    assert_eq!(find(1, "delete.retention.ms"), is("77", BROKER, LONG));
    assert_eq!(find(1, "max.compaction.lag.ms"), is(&never, DEFAULT, LONG));
    for (key, expected) in [
        ("log.flush.interval.ms", is("5000", BROKER, LONG)),
        ("log.cleaner.min.cleanable.ratio", is("0.25", BROKER, DOUBLE)),
        ("log.cleaner.io.max.bytes.per.second", is("1.7976931348623157E308", DEFAULT, DOUBLE)),
        ("log.flush.offset.checkpoint.interval.ms", is("4321", BROKER, INT)),
        ("log.flush.start.offset.checkpoint.interval.ms", is("60000", DEFAULT, INT)),
        ("replica.high.watermark.checkpoint.interval.ms", is("5000", DEFAULT, LONG)),
        ("log.commit.linger.ms", is("0", DEFAULT, INT)),
        ("log.scrub.interval.ms", is("604800000", DEFAULT, LONG)),
        ("log.verify.interval.ms", is("-1", DEFAULT, LONG)),
    ] {
        assert_eq!(find(2, key), expected, "{key}");
    }
    broker.stop().await;
}
