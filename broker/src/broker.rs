//! What all connections share: the configuration, the store, the groups, the counters.

use crate::config::Config;
use crate::groups::Coordinator;
use crate::metrics::Metrics;
use logstore::{Checkpoint, Store, Topic};
use raid::runtime::Runtime;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// The topic of committed offsets.
pub const OFFSETS_TOPIC: &str = "__consumer_offsets";

/// Where clients are told to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// A name or address that resolves for clients.
    pub host: String,
    /// The port.
    pub port: u16,
}

/// The broker: one per process.
pub struct Broker {
    /// As set.
    pub config: Config,
    /// The log.
    pub store: Arc<Store>,
    /// Where clients are told to connect.
    pub advertised: Endpoint,
    /// Consumer groups.
    pub groups: Arc<Coordinator>,
    /// Counters.
    pub metrics: Metrics,
    /// Bytes of requests that may be in memory at once.
    pub budget: Arc<Semaphore>,
    /// Time and tasks.
    pub runtime: Arc<dyn Runtime>,
    stopping: watch::Sender<bool>,
}

impl Broker {
    /// Takes charge of an open store: loads groups and offsets.
    pub async fn new(
        config: Config,
        store: Arc<Store>,
        advertised: Endpoint,
        runtime: Arc<dyn Runtime>,
    ) -> logstore::Result<Arc<Self>> {
        let groups = Coordinator::load(&config, Arc::clone(&store), Arc::clone(&runtime)).await?;
        let budget = Arc::new(Semaphore::new(config.request_budget()));
        Ok(Arc::new(Self {
            config,
            store,
            advertised,
            groups,
            metrics: Metrics::new(),
            budget,
            runtime,
            stopping: watch::Sender::new(false),
        }))
    }

    /// Follows whether the broker is on its way down.
    #[must_use]
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Tells everybody to finish what they are at.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Makes a topic of users on first use, as the configuration has it.
    pub async fn create_default_topic(&self, name: &str) -> logstore::Result<Arc<Topic>> {
        let partitions = self.config.num_partitions as u32;
        match self.store.create_topic(name, partitions, self.store.topic_defaults()).await {
            // Two clients asked at once: the first one made it.
            Err(logstore::Error::TopicExists { name: existing }) if existing == name => {
                self.store.topic(name).ok_or_else(|| logstore::Error::UnknownTopic { name: name.to_owned() })
            }
            other => other,
        }
    }

    /// Enforces retention for as long as the broker runs, and begins scrubs of the logs when they are due.
    pub async fn enforce_retention(self: Arc<Self>) {
        let interval = Duration::from_millis(self.config.log_retention_check_interval_ms as u64);
        let mut stopping = self.stopping();
        loop {
            tokio::select! {
                () = self.runtime.sleep(interval) => {}
                _ = stopping.wait_for(|stop| *stop) => return,
            }
            if let Err(error) = self.store.enforce_retention().await {
                tracing::error!(%error, "retention could not be enforced");
            }
            if let Err(error) = self.store.scrub_if_due() {
                tracing::error!(%error, "the logs could not be scrubbed");
            }
        }
    }

    /// Keeps one of Kafka's offset checkpoints up to date for as long as the broker runs.
    pub async fn checkpoint(self: Arc<Self>, of: Checkpoint, interval: Duration) {
        let mut stopping = self.stopping();
        let mut is_behind = false;
        loop {
            tokio::select! {
                () = self.runtime.sleep(interval) => {}
                _ = stopping.wait_for(|stop| *stop) => return,
            }
            match self.store.checkpoint(of).await {
                Ok(_) => is_behind = false,
                // On the way down.
                Err(logstore::Error::Closed) => return,
                // Once, until it works again: nothing here depends on it.
                Err(error) if !std::mem::replace(&mut is_behind, true) => {
                    tracing::warn!(%error, "{} cannot be kept up to date", of.file_name());
                }
                Err(_) => {}
            }
        }
    }

    /// Compacts for as long as the broker runs.
    pub async fn compact(self: Arc<Self>) {
        let interval = Duration::from_millis(self.config.log_cleaner_backoff_ms as u64);
        let mut stopping = self.stopping();
        loop {
            tokio::select! {
                () = self.runtime.sleep(interval) => {}
                _ = stopping.wait_for(|stop| *stop) => return,
            }
            match self.store.compact().await {
                Ok(_) => {}
                // On the way down.
                Err(logstore::Error::Closed) => return,
                Err(error) => tracing::error!(%error, "compaction cannot go on"),
            }
        }
    }
}

/// Whether a topic is the broker's own: clients read it, only the broker writes it.
#[must_use]
pub fn is_internal(topic: &str) -> bool {
    topic == OFFSETS_TOPIC || topic == "__transaction_state"
}
