//! The cleaner: compaction of one partition at a time, the dirtiest first, at a bounded rate.
//!
//! A partition in which it meets damage, a batch of which no copy is good among it, is parked: it is told of once, the others
//! are cleaned, and it is tried again when something has changed that may help: its log begins further up, batches were
//! healed, or other copies are read ([`Ground`]). What is still bad then parks it again. Any other failure is tried again the
//! next time.

use crate::catalog::records::PartitionKey;
use crate::error::Error;
use crate::records::RecordFault;
use crate::segment::{Placed, Segment};
use parking_lot::Mutex;
use raid::runtime::Runtime;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// Bytes read between two looks at the clock.
const STRIDE: u64 = 256 * 1024;

/// What compaction may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CleanerOptions {
    /// Bytes of memory for the map of keys (Kafka's `log.cleaner.dedupe.buffer.size`).
    pub memory: usize,
    /// Bytes read in a second at most (Kafka's `log.cleaner.io.max.bytes.per.second`); infinite for no limit.
    pub bytes_per_second: f64,
}

impl Default for CleanerOptions {
    fn default() -> Self {
        Self { memory: 32 << 20, bytes_per_second: f64::INFINITY }
    }
}

/// What a parked partition is parked for; it is tried again once any of it is otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ground {
    /// First offset held.
    pub(crate) log_start: i64,
    /// Batches healed anywhere.
    pub(crate) healed: u64,
    /// Which copies are read.
    pub(crate) arrangement: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Cleaner {
    options: CleanerOptions,
    /// One partition is cleaned at a time; closing the store waits for it.
    pub(crate) turn: tokio::sync::Mutex<()>,
    /// Bytes read since the last rest.
    read: Mutex<u64>,
    parked: Mutex<HashMap<PartitionKey, Ground>>,
    /// Unreadable batches that were told of, by partition, and the offset of the last.
    told: Mutex<HashSet<(PartitionKey, i64)>>,
}

impl Cleaner {
    pub(crate) fn new(options: CleanerOptions) -> Self {
        Self {
            options,
            turn: tokio::sync::Mutex::default(),
            read: Mutex::default(),
            parked: Mutex::default(),
            told: Mutex::default(),
        }
    }

    pub(crate) fn memory(&self) -> usize {
        self.options.memory
    }

    /// Rests as long as the rate asks for after so many bytes more.
    pub(crate) async fn pace(&self, runtime: &Arc<dyn Runtime>, bytes: u32) {
        let rest = {
            let mut read = self.read.lock();
            *read += u64::from(bytes);
            if *read < STRIDE || !self.options.bytes_per_second.is_finite() {
                return;
            }
            std::mem::take(&mut *read) as f64 / self.options.bytes_per_second.max(1.0)
        };
        runtime.sleep(Duration::from_secs_f64(rest.min(60.0))).await;
    }

    /// Says once that a batch is kept as it is.
    pub(crate) fn unreadable(&self, segment: &Segment, placed: &Placed, fault: &RecordFault) {
        /// More than these are not remembered, and said again.
        const MOST: usize = 10_000;
        let (topic, partition, offset) = (&segment.id.topic, segment.id.number(), placed.header.base_offset);
        let mut told = self.told.lock();
        if told.len() < MOST && told.insert((segment.id.key, offset)) {
            tracing::warn!("{topic}-{partition}: the batch at offset {offset} is kept as it is: {fault}");
        }
    }

    /// Whether a partition is left alone for now. One for which something has changed is not parked any more.
    pub(crate) fn is_parked(&self, key: PartitionKey, now: Ground) -> bool {
        let mut parked = self.parked.lock();
        let is_parked = parked.get(&key).is_some_and(|then| *then == now);
        if !is_parked {
            parked.remove(&key);
        }
        is_parked
    }

    /// Partitions that are left alone.
    pub(crate) fn parked(&self) -> usize {
        self.parked.lock().len()
    }

    /// Forgets the partitions that are not among `known`.
    pub(crate) fn keep(&self, known: impl Fn(PartitionKey) -> bool) {
        self.parked.lock().retain(|key, _| known(*key));
    }

    /// Says what went wrong with a partition, and parks one that has damage.
    pub(crate) fn failed(&self, key: PartitionKey, name: &str, error: &Error, now: Ground) {
        let is_damage = matches!(
            error,
            Error::DamagedLog { .. } | Error::LostBatch { .. } | Error::DamagedCatalog { .. }
        );
        if is_damage {
            self.parked.lock().insert(key, now);
            tracing::warn!(
                "{name} is not compacted until batches are healed, their segment is deleted, or the store is opened anew: \
                 {error}"
            );
        } else {
            tracing::warn!("compaction of {name}: {error}");
        }
    }
}
