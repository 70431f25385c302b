//! The store: topics on one home.

use crate::config::TopicConfig;
use crate::error::{Error, Result};
use crate::partition::Partition;
use raid::device::Device;
use raid::runtime::Runtime;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Where a store lives.
pub enum Home {
    /// On a block device of its own, usually a RAID volume.
    Volume(Arc<dyn Device>),
    /// In a directory, as Kafka-named files.
    Directory(PathBuf),
}

/// How a store is run.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// What topics get that do not set a key themselves.
    pub topic_defaults: TopicConfig,
    /// How long an idle producer's sequence numbers are remembered (Kafka's `producer.id.expiration.ms`).
    pub producer_expiration: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            topic_defaults: TopicConfig::kafka_defaults(),
            producer_expiration: Duration::from_secs(24 * 60 * 60),
        }
    }
}

/// A topic: a name, an id, a configuration and partitions.
#[derive(Debug)]
pub struct Topic {
    name: Arc<str>,
    id: Uuid,
    config: Arc<TopicConfig>,
    partitions: Vec<Arc<Partition>>,
}

impl Topic {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Its id; never zero, never used again.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }
    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> Arc<TopicConfig> {
        Arc::clone(&self.config)
    }
    /// Its partitions, by number.
    #[must_use]
    pub fn partitions(&self) -> &[Arc<Partition>] {
        &self.partitions
    }
    /// A partition by number.
    #[must_use]
    pub fn partition(&self, index: i32) -> Option<&Arc<Partition>> {
        self.partitions.get(usize::try_from(index).ok()?)
    }
}

/// Topics on one home.
#[derive(Debug)]
pub struct Store {
    cluster_id: String,
}

impl Store {
    /// Opens the store at `home`; formats an all-zero volume or an empty directory, and refuses anything else that
    /// is not a log store.
    pub async fn open(_home: Home, _options: StoreOptions, _runtime: Arc<dyn Runtime>) -> Result<Arc<Self>> {
        Err(Error::Closed)
    }
    /// The cluster's id, made when the store was formatted.
    #[must_use]
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }
    /// Flushes, writes snapshots and the clean markers: the next open scans nothing.
    pub async fn close(&self) -> Result<()> {
        Err(Error::Closed)
    }
    /// What topics get that do not set a key themselves.
    #[must_use]
    pub fn topic_defaults(&self) -> TopicConfig {
        TopicConfig::kafka_defaults()
    }
    /// Makes a topic. It exists wholly or, after a power cut, not at all.
    pub async fn create_topic(&self, name: &str, partitions: u32, config: TopicConfig) -> Result<Arc<Topic>> {
        let partitions = (0..partitions as i32).map(|index| Arc::new(Partition::new(index))).collect();
        Ok(Arc::new(Topic { name: name.into(), id: Uuid::nil(), config: Arc::new(config), partitions }))
    }
    /// Deletes a topic.
    pub async fn delete_topic(&self, name: &str) -> Result<()> {
        Err(Error::UnknownTopic { name: name.to_owned() })
    }
    /// A topic by name.
    #[must_use]
    pub fn topic(&self, _name: &str) -> Option<Arc<Topic>> {
        None
    }
    /// A topic by id.
    #[must_use]
    pub fn topic_by_id(&self, _id: Uuid) -> Option<Arc<Topic>> {
        None
    }
    /// All topics, by name.
    #[must_use]
    pub fn topics(&self) -> Vec<Arc<Topic>> {
        Vec::new()
    }
    /// A producer id that was never given out before, whatever happens to the store later.
    pub async fn allocate_producer_id(&self) -> Result<i64> {
        Err(Error::Closed)
    }
    /// Deletes what the topics' retention says; to be called every few minutes by whoever runs the store.
    pub async fn enforce_retention(&self) -> Result<()> {
        Err(Error::Closed)
    }
}
