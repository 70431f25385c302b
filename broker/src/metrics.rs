//! Counters, in the Prometheus text format on the admin port.
//!
//! Cost: an increment is one relaxed atomic addition; families are resolved when the broker starts, not per request.

use crate::wire::apis;
use kafka_protocol::messages::ApiKey;
use logstore::HealingCounts;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::collections::HashMap;
use std::sync::atomic::Ordering;

type Labels = Vec<(&'static str, String)>;

/// All counters of a broker.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: HashMap<i16, Counter>,
    /// Connections open now.
    pub connections: Gauge,
    /// Connections closed because the peer broke the protocol.
    pub misbehaved: Counter,
    /// Bytes of requests received.
    pub received: Counter,
    /// Bytes of responses sent from memory.
    pub sent: Counter,
    /// Bytes of records sent by `sendfile`, which never entered the process.
    pub sent_by_kernel: Counter,
    /// Bytes of records that had to be copied, because a piece could not be sent from its file.
    pub sent_by_copy: Counter,
    /// `sendfile` steps that were handed to a blocking thread because the pages were not cached.
    pub cold_steps: Counter,
    /// Batches' bytes appended.
    pub produced: Counter,
    /// What the log store counts itself.
    healed: Counter,
    unreadable: Counter,
    verified: Counter,
    uncleanable: Gauge,
}

impl Metrics {
    /// All at zero.
    #[must_use]
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("decalog");
        let by_api = Family::<Labels, Counter>::default();
        registry.register("requests", "Requests handled, by API", by_api.clone());
        let requests = apis::SERVED
            .iter()
            .map(|api| {
                let name =
                    ApiKey::try_from(api.key).map_or_else(|()| api.key.to_string(), |k| format!("{k:?}"));
                (api.key, by_api.get_or_create_owned(&vec![("api", name)]))
            })
            .collect();
        let connections = Gauge::default();
        registry.register("connections", "Connections open", connections.clone());
        let uncleanable = Gauge::default();
        let help = "Partitions that are not compacted because of damage, or for want of room";
        registry.register("uncleanable_partitions", help, uncleanable.clone());
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let misbehaved = counter("misbehaved_connections", "Connections closed for breaking the protocol");
        let received = counter("received_bytes", "Bytes of requests received");
        let sent = counter("sent_bytes", "Bytes of responses sent from memory");
        let sent_by_kernel = counter("sendfile_bytes", "Bytes of records sent by sendfile");
        let sent_by_copy = counter("copied_bytes", "Bytes of records copied because sendfile could not");
        let cold_steps =
            counter("sendfile_cold_steps", "sendfile steps that waited for a disk on a blocking thread");
        let produced = counter("produced_bytes", "Bytes of record batches appended");
        let healed =
            counter("batches_healed", "Batches that were bad in one copy and rewritten from another");
        let unreadable = counter("batches_unreadable", "Bad batches without a good copy, as they were found");
        let verified = counter("verified_bytes", "Bytes of batches on disk whose checksums were checked");
        Self {
            registry,
            requests,
            connections,
            misbehaved,
            received,
            sent,
            sent_by_kernel,
            sent_by_copy,
            cold_steps,
            produced,
            healed,
            unreadable,
            verified,
            uncleanable,
        }
    }

    /// Counts a request.
    pub fn request(&self, api: ApiKey) {
        if let Some(counter) = self.requests.get(&(api as i16)) {
            counter.inc();
        }
    }

    /// The page a Prometheus server reads, with what the log store counts, its uncleanable partitions among it.
    pub fn page(&self, healing: HealingCounts, uncleanable: usize) -> Result<String, std::fmt::Error> {
        self.uncleanable.set(uncleanable as i64);
        let HealingCounts { healed, unreadable, verified } = healing;
        for (counter, count) in
            [(&self.healed, healed), (&self.unreadable, unreadable), (&self.verified, verified)]
        {
            counter.inner().store(count, Ordering::Relaxed);
        }
        let mut out = String::new();
        encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}
