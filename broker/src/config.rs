//! The broker's configuration: Kafka's own key names, typed, with Kafka's defaults.
//!
//! Sources, the later winning: defaults, `--config server.properties`, `--set KEY=VALUE`. A key nobody here reads is
//! an error with the nearest known name, so that a typing mistake never passes for a setting.

use logstore::Checkpoint;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot read the configuration: {cause}", .path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// A key that no setting has.
    #[error("{source_of}: unknown configuration key `{key}`{}", suggestion(*.nearest))]
    UnknownKey {
        /// File and line, or `--set`.
        source_of: String,
        /// As written.
        key: String,
        /// The closest known key, if one is close.
        nearest: Option<&'static str>,
    },
    /// A value the key does not take.
    #[error("{source_of}: `{key}={value}`: {expected}")]
    Value {
        /// File and line, or `--set`.
        source_of: String,
        /// The key.
        key: String,
        /// As written.
        value: String,
        /// What it takes.
        expected: String,
    },
    /// `--set` without `=`.
    #[error("--set {0}: write it as KEY=VALUE")]
    NotAPair(String),
}

fn suggestion(nearest: Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |name| format!("; did you mean `{name}`?"))
}

/// How a value is read from text.
trait Value: Sized + std::fmt::Display {
    fn parse(text: &str) -> Result<Self, String>;

    /// As `DescribeConfigs` tells it.
    fn show(&self) -> String;
}

macro_rules! integer_value {
    ($($t:ty),*) => {$(
        impl Value for $t {
            fn parse(text: &str) -> Result<Self, String> {
                text.trim().parse().map_err(|_| "write a whole number".to_owned())
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}

integer_value!(i32, i64);

impl Value for f64 {
    fn parse(text: &str) -> Result<Self, String> {
        let number: Option<Self> = text.trim().parse().ok();
        number.filter(|number| number.is_finite()).ok_or_else(|| "write a number".to_owned())
    }

    fn show(&self) -> String {
        // As Java writes it: 0.5, 1.0, 1.048576E7, 1.7976931348623157E308.
        if *self == 0.0 || (1e-3..1e7).contains(&self.abs()) {
            return format!("{self:?}");
        }
        let shown = format!("{self:E}");
        match shown.split_once('E') {
            Some((whole, exponent)) if !whole.contains('.') => format!("{whole}.0E{exponent}"),
            _ => shown,
        }
    }
}

impl Value for bool {
    fn parse(text: &str) -> Result<Self, String> {
        match text.trim().to_ascii_lowercase().as_str() {
            "true" => Ok(true),
            "false" => Ok(false),
            _ => Err("write true or false".to_owned()),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for String {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.trim().to_owned())
    }

    fn show(&self) -> String {
        self.clone()
    }
}

/// What kind of value a key takes, as `DescribeConfigs` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `true` or `false`.
    Boolean,
    /// 32 bits.
    Int,
    /// 64 bits.
    Long,
    /// Floating point.
    Double,
    /// Text.
    Text,
}

macro_rules! kind {
    (bool) => {
        Kind::Boolean
    };
    (i32) => {
        Kind::Int
    };
    (i64) => {
        Kind::Long
    };
    (f64) => {
        Kind::Double
    };
    (String) => {
        Kind::Text
    };
}

macro_rules! settings {
    ($($(#[$doc:meta])* $field:ident: $t:ident = $default:expr, $key:literal, $check:expr;)*) => {
        /// Everything that can be set. Units are in the names of the keys.
        #[derive(Debug, Clone)]
        pub struct Config {
            $($(#[$doc])* pub $field: $t,)*
            /// Keys set by file or `--set`, for `DescribeConfigs`.
            set_by_user: std::collections::BTreeSet<&'static str>,
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($field: $t::from($default),)* set_by_user: std::collections::BTreeSet::new() }
            }
        }

        /// Every key there is, as listed here.
        pub const KEYS: &[&str] = &[$($key),*];

        impl Config {
            /// Sets one key; the error says what it takes. `Ok(false)` means there is no such key.
            fn assign(&mut self, key: &str, text: &str) -> Result<bool, String> {
                match key {
                    $($key => {
                        let value = <$t as Value>::parse(text)?;
                        let check: fn(&$t) -> Result<(), String> = $check;
                        check(&value)?;
                        self.$field = value;
                        self.set_by_user.insert($key);
                        Ok(true)
                    })*
                    _ => Ok(false),
                }
            }

            /// Key, value (none for a key that stands back for a coarser one), kind, and whether the user set it.
            #[must_use]
            pub fn entries(&self) -> Vec<(&'static str, Option<String>, Kind, bool)> {
                vec![$({
                    let value = Some(Value::show(&self.$field)).filter(|v| *v != UNSET.to_string());
                    ($key, value, kind!($t), self.set_by_user.contains($key))
                }),*]
            }
        }
    };
}

/// Stands for "not set": a coarser key counts.
const UNSET: i64 = i64::MIN;

#[allow(clippy::unnecessary_wraps)] // one signature for all checks
fn any<T>(_: &T) -> Result<(), String> {
    Ok(())
}

fn at_least<const MIN: i64, T: Copy + Into<i64>>(value: &T) -> Result<(), String> {
    if (*value).into() >= MIN { Ok(()) } else { Err(format!("it must be at least {MIN}")) }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // one signature for all checks
fn between<const MIN: i32, const MAX: i32>(value: &i32) -> Result<(), String> {
    if (MIN..=MAX).contains(value) { Ok(()) } else { Err(format!("it must be from {MIN} to {MAX}")) }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // one signature for all checks
fn ratio(value: &f64) -> Result<(), String> {
    if (0.0..=1.0).contains(value) { Ok(()) } else { Err("it must be from 0 to 1".to_owned()) }
}

fn one_of(value: &str, allowed: &[&str]) -> Result<(), String> {
    if allowed.contains(&value) { Ok(()) } else { Err(format!("it must be one of {}", allowed.join(", "))) }
}

settings! {
    /// This broker's id in Metadata.
    node_id: i32 = 1, "node.id", at_least::<0, i32>;
    /// Threads that serve connections.
    network_threads: i32 = 3, "num.network.threads", at_least::<1, i32>;
    /// Partitions of a topic made without a number.
    num_partitions: i32 = 1, "num.partitions", at_least::<1, i32>;
    /// Whether Metadata makes a topic that is asked for.
    auto_create_topics: bool = true, "auto.create.topics.enable", any;
    /// Whether `DeleteTopics` may.
    delete_topics: bool = true, "delete.topic.enable", any;
    /// The largest record batch.
    message_max_bytes: i32 = 1_048_588, "message.max.bytes", at_least::<0, i32>;
    /// The largest request.
    request_max_bytes: i32 = 104_857_600, "socket.request.max.bytes", at_least::<1024, i32>;
    /// Bytes of requests that may be in memory at once, over all connections; -1 for a bound of our choice.
    queued_max_request_bytes: i64 = -1, "queued.max.request.bytes", at_least::<-1, i64>;
    /// The most a fetch returns, whatever it asks for.
    fetch_max_bytes: i32 = 57_671_680, "fetch.max.bytes",
        |v| at_least::<1024, i32>(v).and(if *v <= 1 << 30 { Ok(()) } else { Err("it must be at most 1 GiB".to_owned()) });
    /// Connections at once.
    max_connections: i32 = i32::MAX, "max.connections", at_least::<1, i32>;
    /// After this long without a request, a connection is closed.
    connections_max_idle_ms: i64 = 600_000, "connections.max.idle.ms", at_least::<-1, i64>;
    /// How long the first rebalance of an empty group waits for more members.
    group_initial_rebalance_delay_ms: i32 = 3000, "group.initial.rebalance.delay.ms", at_least::<0, i32>;
    /// The shortest session a member may ask for.
    group_min_session_timeout_ms: i32 = 6000, "group.min.session.timeout.ms", at_least::<1, i32>;
    /// The longest session a member may ask for.
    group_max_session_timeout_ms: i32 = 1_800_000, "group.max.session.timeout.ms", at_least::<1, i32>;
    /// Members of a group.
    group_max_size: i32 = i32::MAX, "group.max.size", at_least::<1, i32>;
    /// Partitions of `__consumer_offsets`; counts when the topic is made.
    offsets_topic_partitions: i32 = 50, "offsets.topic.num.partitions", at_least::<1, i32>;
    /// Segment size of `__consumer_offsets`.
    offsets_topic_segment_bytes: i32 = 104_857_600, "offsets.topic.segment.bytes", at_least::<1024, i32>;
    /// The longest text a consumer may keep with an offset.
    offset_metadata_max_bytes: i32 = 4096, "offset.metadata.max.bytes", at_least::<0, i32>;
    /// Segment size.
    log_segment_bytes: i32 = 1_073_741_824, "log.segment.bytes", at_least::<1024, i32>;
    /// Roll a segment after this time; -1: `log.roll.hours` counts.
    log_roll_ms: i64 = -1, "log.roll.ms", at_least::<-1, i64>;
    /// Roll a segment after this time.
    log_roll_hours: i32 = 168, "log.roll.hours", at_least::<1, i32>;
    /// Keep records this long; -1: `log.retention.minutes` or `log.retention.hours` counts.
    log_retention_ms: i64 = UNSET, "log.retention.ms", at_least::<-1, i64>;
    /// Keep records this long.
    log_retention_minutes: i64 = UNSET, "log.retention.minutes", at_least::<-1, i64>;
    /// Keep records this long; -1 for ever.
    log_retention_hours: i32 = 168, "log.retention.hours", at_least::<-1, i32>;
    /// Keep this many bytes a partition; -1 for all.
    log_retention_bytes: i64 = -1, "log.retention.bytes", at_least::<-1, i64>;
    /// How often retention looks.
    log_retention_check_interval_ms: i64 = 300_000, "log.retention.check.interval.ms", at_least::<1, i64>;
    /// `delete`, `compact` or both.
    log_cleanup_policy: String = "delete", "log.cleanup.policy",
        |v| v.split(',').try_for_each(|p| one_of(p.trim(), &["delete", "compact"]));
    /// Whether compaction runs.
    log_cleaner_enable: bool = true, "log.cleaner.enable", any;
    /// How long compaction rests when nothing is due.
    log_cleaner_backoff_ms: i64 = 15_000, "log.cleaner.backoff.ms", at_least::<0, i64>;
    /// Memory for the keys of a pass; Kafka's default is 128 MiB.
    log_cleaner_dedupe_buffer_size: i64 = 33_554_432, "log.cleaner.dedupe.buffer.size", at_least::<1_048_576, i64>;
    /// Bytes a second that compaction reads at most.
    log_cleaner_io_max_bytes_per_second: f64 = f64::MAX, "log.cleaner.io.max.bytes.per.second",
        |v| if *v > 0.0 { Ok(()) } else { Err("it must be more than 0".to_owned()) };
    /// Dirty share of a log at which compaction starts.
    log_cleaner_min_cleanable_ratio: f64 = 0.5, "log.cleaner.min.cleanable.ratio", ratio;
    /// How long tombstones are kept.
    log_cleaner_delete_retention_ms: i64 = 86_400_000, "log.cleaner.delete.retention.ms", at_least::<0, i64>;
    /// The shortest time that a record stays out of compaction.
    log_cleaner_min_compaction_lag_ms: i64 = 0, "log.cleaner.min.compaction.lag.ms", at_least::<0, i64>;
    /// The longest time that a record stays out of compaction.
    log_cleaner_max_compaction_lag_ms: i64 = i64::MAX, "log.cleaner.max.compaction.lag.ms", at_least::<1, i64>;
    /// How long the space of a removed segment is kept.
    log_segment_delete_delay_ms: i64 = 60_000, "log.segment.delete.delay.ms", at_least::<0, i64>;
    /// Bytes of log between two index entries.
    log_index_interval_bytes: i32 = 4096, "log.index.interval.bytes", at_least::<0, i32>;
    /// The largest index of a segment.
    log_index_size_max_bytes: i32 = 10_485_760, "log.index.size.max.bytes", at_least::<4, i32>;
    /// How far a timestamp may lie before the broker's clock.
    log_message_timestamp_before_max_ms: i64 = i64::MAX, "log.message.timestamp.before.max.ms",
        at_least::<0, i64>;
    /// How far a timestamp may lie after the broker's clock.
    log_message_timestamp_after_max_ms: i64 = 3_600_000, "log.message.timestamp.after.max.ms",
        at_least::<0, i64>;
    /// How long the first commit of a group waits for others, so that one flush makes all of them durable.
    log_commit_linger_ms: i32 = 0, "log.commit.linger.ms", between::<0, 1000>;
    /// Unflushed records of a partition at which an append waits for a flush, whatever its acks.
    log_flush_interval_messages: i64 = i64::MAX, "log.flush.interval.messages", at_least::<1, i64>;
    /// Every append is flushed within this time; unset: `log.flush.scheduler.interval.ms` counts.
    log_flush_interval_ms: i64 = UNSET, "log.flush.interval.ms", at_least::<0, i64>;
    /// Every append is flushed within this time.
    log_flush_scheduler_interval_ms: i64 = i64::MAX, "log.flush.scheduler.interval.ms", at_least::<1, i64>;
    /// How often it is written down, in a directory, up to where each log is flushed (`recovery-point-offset-checkpoint`).
    log_flush_offset_checkpoint_interval_ms: i32 = 60_000, "log.flush.offset.checkpoint.interval.ms",
        at_least::<0, i32>;
    /// How often it is written down, in a directory, where each log starts (`log-start-offset-checkpoint`).
    log_flush_start_offset_checkpoint_interval_ms: i32 = 60_000, "log.flush.start.offset.checkpoint.interval.ms",
        at_least::<0, i32>;
    /// How often it is written down, in a directory, up to where each log is visible (`replication-offset-checkpoint`).
    replica_high_watermark_checkpoint_interval_ms: i64 = 5000, "replica.high.watermark.checkpoint.interval.ms",
        at_least::<0, i64>;
    /// How long an idle producer's sequence numbers are remembered.
    producer_id_expiration_ms: i32 = 86_400_000, "producer.id.expiration.ms", at_least::<1, i32>;
    /// For how long a batch counts as sound once its checksum was checked; 0: each read checks; -1: until
    /// the broker stops, or something bad is found.
    log_verify_interval_ms: i64 = -1, "log.verify.interval.ms", at_least::<-1, i64>;
    /// Time from the end of a scrub of the logs to the next; -1: none begins by itself.
    log_scrub_interval_ms: i64 = 604_800_000, "log.scrub.interval.ms", at_least::<-1, i64>;
    /// Bytes of log that a scrub checks in a second at most.
    log_scrub_max_bytes_per_second: i64 = 33_554_432, "log.scrub.max.bytes.per.second", at_least::<1, i64>;
    /// Whose clock stamps records.
    log_message_timestamp_type: String = "CreateTime", "log.message.timestamp.type",
        |v| one_of(v, &["CreateTime", "LogAppendTime"]);
}

impl Config {
    /// Reads a properties file and then the `KEY=VALUE` pairs.
    pub fn load(file: Option<&Path>, pairs: &[String]) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        if let Some(path) = file {
            config.read_file(path)?;
        }
        for pair in pairs {
            let (key, value) = pair.split_once('=').ok_or_else(|| ConfigError::NotAPair(pair.clone()))?;
            config.set("--set", key.trim(), value)?;
        }
        Ok(config)
    }

    fn read_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let failed = |cause: String| ConfigError::Unreadable { path: path.to_owned(), cause };
        let file = std::fs::File::open(path).map_err(|e| failed(e.to_string()))?;
        for line in java_properties::PropertiesIter::new(std::io::BufReader::new(file)) {
            let line = line.map_err(|e| failed(e.to_string()))?;
            let source = format!("{}:{}", path.display(), line.line_number());
            if let java_properties::LineContent::KVPair(key, value) = line.consume_content() {
                self.set(&source, &key, &value)?;
            }
        }
        Ok(())
    }

    fn set(&mut self, source: &str, key: &str, value: &str) -> Result<(), ConfigError> {
        match self.assign(key, value) {
            Ok(true) => Ok(()),
            Ok(false) => Err(ConfigError::UnknownKey {
                source_of: source.to_owned(),
                key: key.to_owned(),
                nearest: nearest(key, KEYS),
            }),
            Err(expected) => Err(ConfigError::Value {
                source_of: source.to_owned(),
                key: key.to_owned(),
                value: value.to_owned(),
                expected,
            }),
        }
    }

    /// How long records are kept: the finest unit that is set wins, as in Kafka. `None`: for ever.
    #[must_use]
    pub fn retention_ms(&self) -> Option<i64> {
        let (ms, minutes) = (self.log_retention_ms, self.log_retention_minutes);
        let chosen = if ms != UNSET {
            ms
        } else if minutes != UNSET {
            if minutes < 0 { -1 } else { minutes.saturating_mul(60_000) }
        } else if self.log_retention_hours < 0 {
            -1
        } else {
            i64::from(self.log_retention_hours) * 3_600_000
        };
        (chosen >= 0).then_some(chosen)
    }

    /// How long a segment takes records before the next one begins.
    #[must_use]
    pub fn roll_ms(&self) -> i64 {
        if self.log_roll_ms >= 0 { self.log_roll_ms } else { i64::from(self.log_roll_hours) * 3_600_000 }
    }

    /// Within what time every append is flushed.
    #[must_use]
    pub fn flush_ms(&self) -> i64 {
        let (interval, scheduler) = (self.log_flush_interval_ms, self.log_flush_scheduler_interval_ms);
        if interval == UNSET { scheduler } else { interval }
    }

    /// For how long the check of a batch counts.
    #[must_use]
    pub fn verify_interval(&self) -> Duration {
        u64::try_from(self.log_verify_interval_ms).map_or(Duration::MAX, Duration::from_millis)
    }

    /// How the logs are scrubbed.
    #[must_use]
    pub fn scrub(&self) -> logstore::ScrubOptions {
        let interval = u64::try_from(self.log_scrub_interval_ms).ok().map(Duration::from_millis);
        logstore::ScrubOptions { bytes_per_second: self.log_scrub_max_bytes_per_second as u64, interval }
    }

    /// What compaction may take.
    #[must_use]
    pub fn cleaner(&self) -> logstore::CleanerOptions {
        let most = self.log_cleaner_io_max_bytes_per_second;
        logstore::CleanerOptions {
            memory: self.log_cleaner_dedupe_buffer_size as usize,
            bytes_per_second: if most < f64::MAX { most } else { f64::INFINITY },
        }
    }

    /// The offset checkpoints that are written now and then, and how often.
    #[must_use]
    pub fn checkpoints(&self) -> [(Checkpoint, Duration); 3] {
        let (flushed, start) = (
            self.log_flush_offset_checkpoint_interval_ms,
            self.log_flush_start_offset_checkpoint_interval_ms,
        );
        let visible = self.replica_high_watermark_checkpoint_interval_ms;
        [
            (Checkpoint::RecoveryPoint, i64::from(flushed)),
            (Checkpoint::LogStart, i64::from(start)),
            (Checkpoint::HighWatermark, visible),
        ]
        // Kafka takes 0 as well; it is not meant to be busy with nothing else.
        .map(|(of, ms)| (of, Duration::from_millis(ms.max(10) as u64)))
    }

    /// What topics get that do not set a key themselves: the `log.*` keys under their topic names.
    pub fn topic_defaults(&self) -> logstore::Result<logstore::TopicConfig> {
        let mut topic = logstore::TopicConfig::kafka_defaults();
        let pairs = [
            ("segment.bytes", self.log_segment_bytes.to_string()),
            ("segment.ms", self.roll_ms().max(1).to_string()),
            ("retention.ms", self.retention_ms().unwrap_or(-1).to_string()),
            ("retention.bytes", self.log_retention_bytes.to_string()),
            ("cleanup.policy", self.log_cleanup_policy.clone()),
            ("message.timestamp.type", self.log_message_timestamp_type.clone()),
            ("message.timestamp.before.max.ms", self.log_message_timestamp_before_max_ms.to_string()),
            ("message.timestamp.after.max.ms", self.log_message_timestamp_after_max_ms.to_string()),
            ("max.message.bytes", self.message_max_bytes.to_string()),
            ("index.interval.bytes", self.log_index_interval_bytes.to_string()),
            ("segment.index.bytes", self.log_index_size_max_bytes.to_string()),
            ("file.delete.delay.ms", self.log_segment_delete_delay_ms.to_string()),
            ("flush.messages", self.log_flush_interval_messages.to_string()),
            ("flush.ms", self.flush_ms().to_string()),
            ("delete.retention.ms", self.log_cleaner_delete_retention_ms.to_string()),
            ("min.cleanable.dirty.ratio", self.log_cleaner_min_cleanable_ratio.to_string()),
            ("min.compaction.lag.ms", self.log_cleaner_min_compaction_lag_ms.to_string()),
            ("max.compaction.lag.ms", self.log_cleaner_max_compaction_lag_ms.to_string()),
        ];
        for (key, value) in pairs {
            topic.set_default(key, &value)?;
        }
        Ok(topic)
    }

    /// Bytes of requests in memory at once; at least one request of the largest size fits.
    #[must_use]
    pub fn request_budget(&self) -> usize {
        const OURS: i64 = 256 * 1024 * 1024;
        let wanted = if self.queued_max_request_bytes > 0 { self.queued_max_request_bytes } else { OURS };
        wanted.max(i64::from(self.request_max_bytes)) as usize
    }

    /// How long a connection may say nothing; `None`: for ever.
    #[must_use]
    pub fn idle(&self) -> Option<Duration> {
        u64::try_from(self.connections_max_idle_ms).ok().map(Duration::from_millis)
    }
}

/// The known name closest to `key`, if it is close enough to be meant.
#[must_use]
pub fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let (distance, name) = known.iter().map(|name| (edit_distance(key, name), *name)).min()?;
    (distance <= key.len().max(6) / 3).then_some(name)
}

/// Levenshtein's distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(256).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let cost = if from == *to { diagonal } else { diagonal + 1 };
            diagonal = row[j + 1];
            row[j + 1] = cost.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[&str]) -> Result<Config, ConfigError> {
        Config::load(None, &pairs.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_misspelt_key_names_the_one_that_was_meant() {
        let error = with(&["num.partition=3"]).unwrap_err().to_string();
        assert_eq!(error, "--set: unknown configuration key `num.partition`; did you mean `num.partitions`?");
        let error = with(&["zookeeper.connect=x"]).unwrap_err().to_string();
        assert_eq!(error, "--set: unknown configuration key `zookeeper.connect`");
    }

    #[test]
    fn values_are_typed_and_bounded() {
        assert_eq!(with(&["num.partitions=12"]).unwrap().num_partitions, 12);
        assert_eq!(
            with(&["num.partitions=0"]).unwrap_err().to_string(),
            "--set: `num.partitions=0`: it must be at least 1"
        );
        assert!(with(&["num.partitions=many"]).unwrap_err().to_string().contains("whole number"));
        assert!(with(&["auto.create.topics.enable=yes"]).is_err());
        assert!(with(&["log.cleanup.policy=compact,delete"]).is_ok());
        assert!(with(&["log.cleanup.policy=shred"]).is_err());
        assert!(with(&["num.partitions"]).unwrap_err().to_string().contains("KEY=VALUE"));
    }

    #[test]
    fn a_file_is_read_and_set_wins_over_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("server.properties");
        std::fs::write(&path, "# comment\nnum.partitions = 4\n\nmessage.max.bytes=2000000\n").unwrap();
        let config = Config::load(Some(&path), &["num.partitions=8".to_owned()]).unwrap();
        assert_eq!((config.num_partitions, config.message_max_bytes), (8, 2_000_000));
        std::fs::write(&path, "a=b\n").unwrap();
        let error = Config::load(Some(&path), &[]).unwrap_err().to_string();
        assert!(error.contains("server.properties:1: unknown configuration key `a`"), "{error}");
        assert!(Config::load(Some(&dir.path().join("none")), &[]).is_err());
    }

    #[test]
    fn flush_keys_reach_topics_under_their_names() {
        let get = |pairs: &[&str], key| with(pairs).unwrap().topic_defaults().unwrap().get(key).unwrap();
        assert_eq!(get(&[], "flush.ms"), i64::MAX.to_string());
        assert_eq!(get(&["log.flush.scheduler.interval.ms=9"], "flush.ms"), "9");
        assert_eq!(get(&["log.flush.scheduler.interval.ms=9", "log.flush.interval.ms=0"], "flush.ms"), "0");
        assert_eq!(get(&["log.flush.interval.messages=1"], "flush.messages"), "1");
        assert!(with(&["log.commit.linger.ms=1001"]).is_err());
    }

    #[test]
    fn cleaner_keys_reach_topics_and_the_cleaner() {
        let get = |pairs: &[&str], key| with(pairs).unwrap().topic_defaults().unwrap().get(key).unwrap();
        for (key, topic_key, default, other) in [
            ("log.cleaner.min.cleanable.ratio", "min.cleanable.dirty.ratio", "0.5", "0.25"),
            ("log.cleaner.delete.retention.ms", "delete.retention.ms", "86400000", "7"),
            ("log.cleaner.min.compaction.lag.ms", "min.compaction.lag.ms", "0", "8"),
            ("log.cleaner.max.compaction.lag.ms", "max.compaction.lag.ms", "9223372036854775807", "9"),
            ("log.cleanup.policy", "cleanup.policy", "delete", "compact"),
        ] {
            assert_eq!(get(&[], topic_key), default, "{key}: Kafka's default");
            assert_eq!(get(&[&format!("{key}={other}")], topic_key), other, "{key}");
            let defaults = with(&[&format!("{key}={other}")]).unwrap().topic_defaults().unwrap();
            let own = defaults.with([(topic_key, default)]).unwrap();
            assert_eq!(own.get(topic_key).unwrap(), default, "{topic_key}: the topic's own wins");
        }
        let config = with(&[]).unwrap();
        assert!(config.log_cleaner_enable && config.log_cleaner_backoff_ms == 15_000);
        assert_eq!(config.cleaner(), logstore::CleanerOptions::default());
        let set = ["log.cleaner.dedupe.buffer.size=2000000", "log.cleaner.io.max.bytes.per.second=1048576.5"];
        let cleaner = with(&set).unwrap().cleaner();
        assert_eq!((cleaner.memory, cleaner.bytes_per_second), (2_000_000, 1_048_576.5));
        let kafkas = with(&["log.cleaner.io.max.bytes.per.second=1.7976931348623157E308"]).unwrap();
        assert_eq!(
            kafkas.cleaner(),
            logstore::CleanerOptions::default(),
            "Kafka's default, as Kafka writes it"
        );
        for bad in [
            "log.cleaner.min.cleanable.ratio=1.1",
            "log.cleaner.min.cleanable.ratio=-0.1",
            "log.cleaner.min.cleanable.ratio=NaN",
            "log.cleaner.min.cleanable.ratio=half",
            "log.cleaner.io.max.bytes.per.second=0",
            "log.cleaner.io.max.bytes.per.second=inf",
            "log.cleaner.dedupe.buffer.size=1",
            "log.cleaner.backoff.ms=-1",
            "log.cleaner.max.compaction.lag.ms=0",
            "log.cleaner.enable=maybe",
        ] {
            assert!(with(&[bad]).unwrap_err().to_string().contains("--set: `log.cleaner."), "{bad}");
        }
    }

    #[test]
    fn keys_of_kafka_that_nothing_here_reads_are_unknown() {
        for key in ["log.cleaner.threads", "log.cleaner.io.buffer.size", "log.cleaner.io.buffer.load.factor"]
        {
            let error = with(&[&format!("{key}=1")]).unwrap_err().to_string();
            assert!(error.contains(&format!("unknown configuration key `{key}`")), "{error}");
        }
    }

    #[test]
    fn checkpoints_are_written_as_often_as_kafkas() {
        let every = |pairs: &[&str]| with(pairs).unwrap().checkpoints().map(|(_, every)| every.as_millis());
        assert_eq!(every(&[]), [60_000, 60_000, 5000]);
        let set = [
            "log.flush.offset.checkpoint.interval.ms=1000",
            "log.flush.start.offset.checkpoint.interval.ms=2000",
            "replica.high.watermark.checkpoint.interval.ms=0",
        ];
        assert_eq!(every(&set), [1000, 2000, 10]);
        for key in set.map(|pair| pair.split_once('=').unwrap().0) {
            assert!(with(&[&format!("{key}=-1")]).is_err(), "{key}");
        }
        assert!(
            with(&["log.flush.offset.checkpoint.interval.ms=2147483648"]).is_err(),
            "Kafka has an int there"
        );
    }

    #[test]
    fn checks_and_scrubs_are_set_in_milliseconds_or_switched_off() {
        let config = with(&[]).unwrap();
        assert_eq!(config.verify_interval(), Duration::MAX);
        assert_eq!(config.scrub(), logstore::ScrubOptions::default());
        assert_eq!(with(&["log.verify.interval.ms=0"]).unwrap().verify_interval(), Duration::ZERO);
        assert_eq!(
            with(&["log.verify.interval.ms=30"]).unwrap().verify_interval(),
            Duration::from_millis(30)
        );
        assert_eq!(with(&["log.scrub.interval.ms=-1"]).unwrap().scrub().interval, None);
        let set = with(&["log.scrub.interval.ms=40", "log.scrub.max.bytes.per.second=5"]).unwrap().scrub();
        assert_eq!((set.interval, set.bytes_per_second), (Some(Duration::from_millis(40)), 5));
        for bad in [
            "log.verify.interval.ms=-2",
            "log.scrub.interval.ms=-2",
            "log.scrub.max.bytes.per.second=0",
            "log.commit.linger.ms=-1",
            "log.flush.interval.ms=-1",
            "log.flush.interval.messages=0",
            "log.flush.scheduler.interval.ms=0",
        ] {
            assert!(with(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_default_is_shown_as_it_is_read() {
        for (key, value, kind, is_set) in Config::default().entries() {
            assert!(!is_set, "{key}");
            let Some(value) = value else { continue };
            let mut again = Config::default();
            assert_eq!(again.assign(key, &value), Ok(true), "{key}={value}");
            let shown = again.entries().into_iter().find(|(found, ..)| *found == key).unwrap();
            assert_eq!(shown, (key, Some(value), kind, true));
        }
        let told =
            |key: &str| Config::default().entries().into_iter().find(|(found, ..)| *found == key).unwrap();
        assert_eq!(told("log.cleaner.min.cleanable.ratio").1.unwrap(), "0.5");
        assert_eq!(told("log.cleaner.io.max.bytes.per.second").1.unwrap(), "1.7976931348623157E308");
        for (number, shown) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.001, "0.001"),
            (0.000_25, "2.5E-4"),
            (1e-5, "1.0E-5"),
            (9_999_999.5, "9999999.5"),
            (1e7, "1.0E7"),
            (10_485_760.0, "1.048576E7"),
        ] {
            assert_eq!(Value::show(&number), shown, "as Double.toString of Java");
        }
    }

    #[test]
    fn the_finest_retention_that_is_set_wins() {
        assert_eq!(with(&[]).unwrap().retention_ms(), Some(168 * 3_600_000));
        assert_eq!(with(&["log.retention.hours=-1"]).unwrap().retention_ms(), None);
        assert_eq!(with(&["log.retention.minutes=5"]).unwrap().retention_ms(), Some(300_000));
        assert_eq!(with(&["log.retention.minutes=5", "log.retention.ms=7"]).unwrap().retention_ms(), Some(7));
    }
}
