//! Topic configuration, with Kafka's names, defaults and bounds (`TopicConfig`, `LogConfig` of Kafka 4.1).
//!
//! One table below defines every key: its field, type, default, and what it does here. A key that stands in
//! the table is accepted and kept; one that does not is an error. The `effect` column says which of them act now:
//! the others are stored and described to clients, and act when the room they belong to does.
//!
//! A [`TopicConfig`] is a whole configuration: the defaults it was made from, and what a topic overrides.

use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// The type of a value, as `DescribeConfigs` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigKind {
    /// true or false.
    Boolean,
    /// 32-bit integer.
    Int,
    /// 64-bit integer.
    Long,
    /// Floating point.
    Double,
    /// One word.
    String,
    /// Comma-separated words.
    List,
}

/// Whether a key does something in this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It acts.
    Acts,
    /// It is accepted, kept and described; nothing reads it yet.
    Kept,
}

/// What there is to know about a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfigKey {
    /// Kafka's name.
    pub name: &'static str,
    /// The type of its values.
    pub kind: ConfigKind,
    /// Kafka's default, as text.
    pub default: &'static str,
    /// Whether it does something yet.
    pub effect: Effect,
    /// One sentence for a person.
    pub doc: &'static str,
}

/// What to do with old records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CleanupPolicy {
    /// Delete whole segments by time and size.
    pub delete: bool,
    /// Keep the last record of each key.
    pub compact: bool,
}

/// Whose clock a record's timestamp is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimestampType {
    /// The producer's.
    CreateTime,
    /// The broker's, at append.
    LogAppendTime,
}

/// A type that a configuration value can have.
trait Value: Sized {
    fn read(text: &str) -> std::result::Result<Self, String>;
    fn show(&self) -> String;
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Value for $type {
            fn read(text: &str) -> std::result::Result<Self, String> {
                text.trim().parse().map_err(|_| format!("not a {} number", stringify!($type)))
            }
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}
number!(i32, i64, f64);

impl Value for bool {
    fn read(text: &str) -> std::result::Result<Self, String> {
        match text.trim().to_ascii_lowercase().as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err("neither true nor false".to_owned()),
        }
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for String {
    fn read(text: &str) -> std::result::Result<Self, String> {
        Ok(text.trim().to_owned())
    }
    fn show(&self) -> String {
        self.clone()
    }
}

impl Value for CleanupPolicy {
    fn read(text: &str) -> std::result::Result<Self, String> {
        let mut policy = Self { delete: false, compact: false };
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match word.to_ascii_lowercase().as_str() {
                "delete" => policy.delete = true,
                "compact" => policy.compact = true,
                _ => return Err("a list of delete and compact".to_owned()),
            }
        }
        Ok(policy)
    }
    fn show(&self) -> String {
        let words = [(self.compact, "compact"), (self.delete, "delete")];
        words.iter().filter(|(on, _)| *on).map(|(_, word)| *word).collect::<Vec<_>>().join(",")
    }
}

impl Value for TimestampType {
    fn read(text: &str) -> std::result::Result<Self, String> {
        match text.trim() {
            "CreateTime" => Ok(Self::CreateTime),
            "LogAppendTime" => Ok(Self::LogAppendTime),
            _ => Err("CreateTime or LogAppendTime".to_owned()),
        }
    }
    fn show(&self) -> String {
        match self {
            Self::CreateTime => "CreateTime".to_owned(),
            Self::LogAppendTime => "LogAppendTime".to_owned(),
        }
    }
}

#[allow(clippy::needless_pass_by_value)] // numbers
fn at_least<T: PartialOrd + std::fmt::Display>(value: &T, least: T) -> std::result::Result<(), String> {
    if *value >= least { Ok(()) } else { Err(format!("at least {least}")) }
}

#[allow(clippy::needless_pass_by_value)] // numbers
fn between<T: PartialOrd + std::fmt::Display>(
    value: &T,
    least: T,
    most: T,
) -> std::result::Result<(), String> {
    if *value >= least && *value <= most { Ok(()) } else { Err(format!("from {least} to {most}")) }
}

fn one_of(value: &str, words: &[&str]) -> std::result::Result<(), String> {
    if words.contains(&value) { Ok(()) } else { Err(format!("one of {}", words.join(", "))) }
}

#[allow(clippy::unnecessary_wraps)] // the other checks can fail
fn any<T>(_: &T) -> std::result::Result<(), String> {
    Ok(())
}

macro_rules! table {
    ($($field:ident: $type:ty, $kind:ident, $key:literal = $default:literal, $effect:ident, $check:expr, $doc:literal;)*) => {
        /// A topic's configuration. Fields are Kafka's keys with underscores; see [`KEYS`] for each one's meaning.
        #[derive(Debug, Clone, PartialEq)]
        pub struct TopicConfig {
            $(#[doc = $doc] pub $field: $type,)*
            overrides: BTreeMap<String, String>,
        }

        /// Every key there is, in alphabetical order.
        pub const KEYS: &[ConfigKey] = &[$(ConfigKey {
            name: $key, kind: ConfigKind::$kind, default: $default, effect: Effect::$effect, doc: $doc,
        },)*];

        impl TopicConfig {
            /// Kafka's defaults.
            #[must_use]
            pub fn kafka_defaults() -> Self {
                Self {
                    $($field: <$type as Value>::read($default).expect("the table's defaults are checked by a test"),)*
                    overrides: BTreeMap::new(),
                }
            }

            /// Sets a field without recording it as a topic's own.
            fn assign(&mut self, key: &str, text: &str) -> Result<()> {
                let refused = |reason| Error::InvalidConfig { key: key.to_owned(), value: text.to_owned(), reason };
                match key {
                    $($key => {
                        let value = <$type as Value>::read(text).map_err(refused)?;
                        let check: fn(&$type) -> std::result::Result<(), String> = $check;
                        check(&value).map_err(refused)?;
                        self.$field = value;
                    })*
                    _ => return Err(Error::UnknownConfig { key: key.to_owned() }),
                }
                Ok(())
            }

            /// The value of a key, as text; `None` for a key that does not exist.
            #[must_use]
            pub fn get(&self, key: &str) -> Option<String> {
                match key {
                    $($key => Some(self.$field.show()),)*
                    _ => None,
                }
            }
        }
    };
}

const MAX: i64 = i64::MAX;

table! {
    cleanup_policy: CleanupPolicy, List, "cleanup.policy" = "delete", Acts, any,
        "What happens to old segments: delete, compact, or both.";
    compression_gzip_level: i32, Int, "compression.gzip.level" = "-1", Kept, |v| between(v, -1, 9),
        "Level for gzip when the broker compresses.";
    compression_lz4_level: i32, Int, "compression.lz4.level" = "9", Kept, |v| between(v, 1, 17),
        "Level for lz4 when the broker compresses.";
    compression_type: String, String, "compression.type" = "producer", Kept,
        |v| one_of(v, &["uncompressed", "zstd", "lz4", "snappy", "gzip", "producer"]),
        "Codec of stored batches. Batches are kept as the producer compressed them.";
    compression_zstd_level: i32, Int, "compression.zstd.level" = "3", Kept, |v| between(v, -131_072, 22),
        "Level for zstd when the broker compresses.";
    delete_retention_ms: i64, Long, "delete.retention.ms" = "86400000", Acts, |v| between(v, 0, MAX),
        "How long compaction keeps tombstones, in milliseconds.";
    file_delete_delay_ms: i64, Long, "file.delete.delay.ms" = "60000", Acts, |v| between(v, 0, MAX),
        "How long the space of a removed segment is kept before it is given back, in milliseconds.";
    flush_messages: i64, Long, "flush.messages" = "9223372036854775807", Acts, |v| between(v, 1, MAX),
        "Unflushed records at which an append waits for a flush, whatever its acks. acks=all always does.";
    flush_ms: i64, Long, "flush.ms" = "9223372036854775807", Acts, |v| between(v, 0, MAX),
        "Milliseconds within which every append is flushed. acks=all always is, before it is answered.";
    follower_throttled: String, List, "follower.replication.throttled.replicas" = "", Kept, any,
        "Replicas whose replication is throttled on the follower.";
    index_interval_bytes: i32, Int, "index.interval.bytes" = "4096", Acts, |v| at_least(v, 0),
        "Bytes of log between two index entries.";
    leader_throttled: String, List, "leader.replication.throttled.replicas" = "", Kept, any,
        "Replicas whose replication is throttled on the leader.";
    local_retention_bytes: i64, Long, "local.retention.bytes" = "-2", Kept, |v| at_least(v, -2),
        "Local size limit under tiered storage, in bytes.";
    local_retention_ms: i64, Long, "local.retention.ms" = "-2", Kept, |v| at_least(v, -2),
        "Local time limit under tiered storage, in milliseconds.";
    max_compaction_lag_ms: i64, Long, "max.compaction.lag.ms" = "9223372036854775807", Acts, |v| at_least(v, 1),
        "Longest time that a record stays out of compaction, in milliseconds.";
    max_message_bytes: i32, Int, "max.message.bytes" = "1048588", Acts, |v| at_least(v, 0),
        "Largest batch that is accepted, in bytes.";
    message_timestamp_after_max_ms: i64, Long, "message.timestamp.after.max.ms" = "3600000", Acts, |v| at_least(v, 0),
        "How far a timestamp may lie after the broker's clock, in milliseconds.";
    message_timestamp_before_max_ms: i64, Long, "message.timestamp.before.max.ms" = "9223372036854775807", Acts,
        |v| at_least(v, 0),
        "How far a timestamp may lie before the broker's clock, in milliseconds.";
    message_timestamp_type: TimestampType, String, "message.timestamp.type" = "CreateTime", Acts, any,
        "Whose clock timestamps are: `CreateTime` or `LogAppendTime`.";
    min_cleanable_dirty_ratio: f64, Double, "min.cleanable.dirty.ratio" = "0.5", Acts, |v| between(v, 0.0, 1.0),
        "Dirty share of a log at which compaction starts.";
    min_compaction_lag_ms: i64, Long, "min.compaction.lag.ms" = "0", Acts, |v| at_least(v, 0),
        "Shortest time that a record stays out of compaction, in milliseconds.";
    min_insync_replicas: i32, Int, "min.insync.replicas" = "1", Kept, |v| at_least(v, 1),
        "Replicas that must be in sync. The volume's legs are the replicas here.";
    preallocate: bool, Boolean, "preallocate" = "false", Kept, any,
        "Whether segment files are allocated ahead. Extents of a volume always are.";
    remote_log_copy_disable: bool, Boolean, "remote.log.copy.disable" = "false", Kept, any,
        "Whether tiered data becomes read-only.";
    remote_log_delete_on_disable: bool, Boolean, "remote.log.delete.on.disable" = "false", Kept, any,
        "Whether tiered data is deleted when tiering is switched off.";
    remote_storage_enable: bool, Boolean, "remote.storage.enable" = "false", Kept, any,
        "Whether closed segments go to tiered storage.";
    retention_bytes: i64, Long, "retention.bytes" = "-1", Acts, |v| at_least(v, -1),
        "Size over which a partition's oldest segments are deleted, in bytes; -1 is no limit.";
    retention_ms: i64, Long, "retention.ms" = "604800000", Acts, |v| at_least(v, -1),
        "Age over which a partition's oldest segments are deleted, in milliseconds; -1 is no limit.";
    segment_bytes: i32, Int, "segment.bytes" = "1073741824", Acts, |v| at_least(v, 1024),
        "Largest size of a segment, in bytes.";
    segment_index_bytes: i32, Int, "segment.index.bytes" = "10485760", Acts, |v| at_least(v, 4),
        "Largest size of a segment's index, in bytes.";
    segment_jitter_ms: i64, Long, "segment.jitter.ms" = "0", Kept, |v| at_least(v, 0),
        "Random part taken off segment.ms, in milliseconds.";
    segment_ms: i64, Long, "segment.ms" = "604800000", Acts, |v| at_least(v, 1),
        "Age at which a segment is closed even when it is not full, in milliseconds.";
    unclean_leader_election: bool, Boolean, "unclean.leader.election.enable" = "false", Kept, any,
        "Whether a replica that is behind may lead. There is no election here.";
}

impl TopicConfig {
    /// How long a segment is appended to: `segment.ms`, and no longer than records may stay out of compaction.
    #[must_use]
    pub fn open_ms(&self) -> i64 {
        let lag = if self.cleanup_policy.compact { self.max_compaction_lag_ms } else { i64::MAX };
        self.segment_ms.min(lag)
    }

    /// This configuration as the defaults of others: nothing in it counts as a topic's own.
    #[must_use]
    pub fn as_defaults(&self) -> Self {
        Self { overrides: BTreeMap::new(), ..self.clone() }
    }

    /// Sets a default (a broker's `log.*` key, already under its topic name).
    pub fn set_default(&mut self, key: &str, value: &str) -> Result<()> {
        self.assign(key, value)
    }

    /// Sets a key as a topic's own.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        self.assign(key, value)?;
        self.overrides.insert(key.to_owned(), value.trim().to_owned());
        Ok(())
    }

    /// These defaults with a topic's own settings on top.
    pub fn with<'a>(&self, own: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut config = self.as_defaults();
        for (key, value) in own {
            config.set(key, value)?;
        }
        Ok(config)
    }

    /// What the topic itself sets, apart from defaults.
    #[must_use]
    pub fn overrides(&self) -> &BTreeMap<String, String> {
        &self.overrides
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_valid_and_reads_back() {
        let mut config = TopicConfig::kafka_defaults();
        for key in KEYS {
            config.set(key.name, key.default).unwrap();
            assert_eq!(config.get(key.name).as_deref(), Some(key.default), "{}", key.name);
        }
        assert!(KEYS.is_sorted_by(|a, b| a.name < b.name));
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused() {
        let mut config = TopicConfig::kafka_defaults();
        assert!(matches!(config.set("retention.hours", "1"), Err(Error::UnknownConfig { .. })));
        for (key, value) in [
            ("retention.ms", "soon"),
            ("retention.ms", "-2"),
            ("cleanup.policy", "burn"),
            ("message.timestamp.type", "logappendtime"),
            ("min.cleanable.dirty.ratio", "NaN"),
            ("segment.bytes", "10"),
        ] {
            assert!(matches!(config.set(key, value), Err(Error::InvalidConfig { .. })), "{key}={value}");
        }
        assert!(config.overrides().is_empty());
    }

    #[test]
    fn overrides_stand_apart_from_defaults() {
        let mut defaults = TopicConfig::kafka_defaults();
        defaults.set_default("retention.ms", "5").unwrap();
        let config = defaults.with([("cleanup.policy", "delete, compact")]).unwrap();
        assert_eq!(config.retention_ms, 5);
        assert_eq!(config.get("cleanup.policy").as_deref(), Some("compact,delete"));
        assert_eq!(config.overrides().len(), 1);
    }
}
