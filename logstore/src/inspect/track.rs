//! What a log says of its producers and transactions, batch by batch: to hold snapshots and transaction indexes against,
//! and to make them for an export. Pure.

use super::sidecars::ProducerEntry;
use crate::batch::{Header, Marker, Outcome};
use crate::transactions::Aborted;
use std::collections::BTreeMap;

/// Producers and transactions up to some offset.
#[derive(Debug, Default)]
pub(crate) struct Track {
    /// Epoch, last sequence, last offset of each producer's last batch.
    producers: BTreeMap<i64, (i16, i32, i64)>,
    /// First offset of each producer's open transaction.
    open: BTreeMap<i64, i64>,
}

impl Track {
    /// Takes note of a sound batch; `batch` are its bytes if it is a control batch. Returns the transaction it aborts.
    pub(crate) fn see(&mut self, header: &Header, batch: Option<&[u8]>) -> Option<Aborted> {
        let id = header.producer_id;
        if id < 0 {
            return None;
        }
        if let Some(batch) = batch {
            let outcome = Marker::read(header, batch)?.outcome;
            let first_offset = self.open.remove(&id);
            if self.producers.get(&id).is_some_and(|known| known.0 != header.producer_epoch) {
                self.producers.remove(&id);
            }
            let last_offset = header.last_offset();
            let last_stable = self.open.values().min().copied().unwrap_or(last_offset + 1);
            let ended = |first_offset| Aborted { producer_id: id, first_offset, last_offset, last_stable };
            return first_offset.filter(|_| outcome == Outcome::Abort).map(ended);
        }
        self.producers.insert(id, (header.producer_epoch, header.last_sequence(), header.last_offset()));
        if header.is_transactional() {
            self.open.entry(id).or_insert(header.base_offset);
        }
        None
    }

    /// Why a snapshot's entry cannot be right for the log up to here, of which everything from `from` on was seen.
    pub(crate) fn contradicts(&self, entry: &ProducerEntry, from: i64) -> Option<String> {
        let id = entry.producer_id;
        if entry.last_offset < from || entry.last_sequence < 0 {
            return None;
        }
        let Some(&(epoch, sequence, offset)) = self.producers.get(&id) else {
            return Some(format!("producer {id} has no batch in the log up to there"));
        };
        let claimed = (entry.producer_epoch, entry.last_sequence, entry.last_offset);
        (claimed != (epoch, sequence, offset)).then(|| {
            format!(
                "producer {id} is at epoch {}, sequence {}, offset {}; the log says {epoch}, {sequence}, {offset}",
                claimed.0, claimed.1, claimed.2
            )
        })
    }
}
