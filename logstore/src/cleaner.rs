//! The cleaner: compaction of one partition at a time, the dirtiest first, at a bounded rate.
//!
//! A partition in which it meets damage, a batch of which no copy is good among it, is parked: it is told of once, the others
//! are cleaned, and it is tried again when something has changed that may help: its log begins further up, batches were
//! healed, or other copies are read ([`Ground`]). What is still bad then parks it again.
//!
//! One for which there is no room, in the volume, its catalog or the file system, is parked too, and told of once: it is
//! tried again after a minute, then after two, four … up to [`LONGEST_REST`], since room comes back without a word to us.
//! Any other failure is tried again the next time.

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
/// How long one is left alone for which there was no room, the first time and at most.
const FIRST_REST: Duration = Duration::from_secs(60);
const LONGEST_REST: Duration = Duration::from_secs(32 * 60);

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

/// Why a partition is parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parked {
    Damaged(Ground),
    /// There was no room; it is tried again at `until` by the runtime's clock. `rest` was the time until then.
    NoRoom {
        until: Duration,
        rest: Duration,
    },
}

/// What a partition with damage is parked for; it is tried again once any of it is otherwise.
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
    parked: Mutex<HashMap<PartitionKey, Parked>>,
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

    /// Whether a partition is left alone for now, at `time`. One with damage for which something has changed is not parked any
    /// more.
    pub(crate) fn is_parked(&self, key: PartitionKey, ground: Ground, time: Duration) -> bool {
        let mut parked = self.parked.lock();
        match parked.get(&key) {
            None => false,
            Some(Parked::NoRoom { until, .. }) => time < *until,
            Some(Parked::Damaged(then)) if *then == ground => true,
            Some(Parked::Damaged(_)) => {
                parked.remove(&key);
                false
            }
        }
    }

    /// A partition was compacted, or there was nothing to do: it is not parked any more.
    pub(crate) fn succeeded(&self, key: PartitionKey, name: impl FnOnce() -> String) {
        if self.parked.lock().remove(&key).is_some() {
            tracing::info!("{} is not kept from compaction any more", name());
        }
    }

    /// Partitions that are left alone.
    pub(crate) fn parked(&self) -> usize {
        self.parked.lock().len()
    }

    /// Forgets the partitions that are not among `known`.
    pub(crate) fn keep(&self, known: impl Fn(PartitionKey) -> bool) {
        self.parked.lock().retain(|key, _| known(*key));
    }

    /// Says what went wrong with a partition, and parks one that has damage, or no room.
    pub(crate) fn failed(&self, key: PartitionKey, name: &str, error: &Error, now: Ground, time: Duration) {
        let is_damage = matches!(
            error,
            Error::DamagedLog { .. } | Error::LostBatch { .. } | Error::DamagedCatalog { .. }
        );
        let mut parked = self.parked.lock();
        if is_damage {
            parked.insert(key, Parked::Damaged(now));
            tracing::warn!(
                "{name} is not compacted until batches are healed, their segment is deleted, or the store is opened anew: \
                 {error}"
            );
        } else if error.is_no_room() {
            let rest = if let Some(Parked::NoRoom { rest, .. }) = parked.get(&key) {
                LONGEST_REST.min(*rest * 2)
            } else {
                tracing::warn!("{name} is not compacted until there is room for it: {error}");
                FIRST_REST
            };
            parked.insert(key, Parked::NoRoom { until: time.saturating_add(rest), rest });
        } else {
            tracing::warn!("compaction of {name}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_without_room_rests_longer_and_longer_and_is_tried_for_ever() {
        let cleaner = Cleaner::new(CleanerOptions::default());
        let key = PartitionKey { topic: uuid::Uuid::from_u128(1), partition: 0 };
        let ground = Ground { log_start: 0, healed: 0, arrangement: 0 };
        let full = Error::CatalogFull { place: "v".to_owned(), capacity: 1 };
        let (mut time, mut rests) = (Duration::from_secs(5), Vec::new());
        for _ in 0..9 {
            assert!(!cleaner.is_parked(key, ground, time));
            cleaner.failed(key, "t-0", &full, ground, time);
            assert_eq!(cleaner.parked(), 1);
            let rest =
                (1..10_000).find(|&rest| !cleaner.is_parked(key, ground, time + Duration::from_secs(rest)));
            rests.push(rest.unwrap() / 60);
            time += Duration::from_secs(rest.unwrap());
        }
        assert_eq!(rests, [1, 2, 4, 8, 16, 32, 32, 32, 32]);
        cleaner.succeeded(key, || "t-0".to_owned());
        assert_eq!(cleaner.parked(), 0);
        cleaner.failed(key, "t-0", &full, ground, time);
        assert!(!cleaner.is_parked(key, ground, time + FIRST_REST), "it begins anew");
    }
}
