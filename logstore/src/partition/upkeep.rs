//! What happens to a partition besides appends and reads: sealing a rolled segment, retention, a stop in order,
//! deletion. All of it holds `maintenance`, so that the partition's record has one writer at a time.

use super::{Appender, Offsets, Partition};
use crate::catalog::Change;
use crate::catalog::records::{Clean, Kind, PartitionRecord, Table};
use crate::error::{Error, Result};
use crate::home::{Sealing, SegmentBytes};
use crate::segment::Segment;
use crate::transactions::encode;
use bytes::Bytes;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

impl Partition {
    /// Queues a rolled segment behind those rolled before it, with the producers at its end, and sees to it.
    pub(crate) fn enqueue_seal(self: &Arc<Self>, segment: Arc<Segment>, snapshot: Bytes) {
        self.sealing.lock().push_back((segment, snapshot));
        let partition = Arc::clone(self);
        self.context.tasks.spawn(Box::pin(async move { partition.seal_rolled().await }));
    }

    /// Seals what was rolled, the oldest first: makes it durable, keeps its index and the producers, moves the recovery point
    /// behind it. One that finds no room waits for the next that is rolled: the recovery point never passes it.
    async fn seal_rolled(self: &Arc<Self>) {
        let _only = self.maintenance.lock().await;
        loop {
            let Some((segment, snapshot)) = self.sealing.lock().pop_front() else { return };
            let kept = self.log.read().segments.iter().any(|held| Arc::ptr_eq(held, &segment));
            if !kept {
                // Retention was faster.
                continue;
            }
            let Err(error) = self.seal(&segment, snapshot.clone(), true, |_| ()).await else { continue };
            let (topic, index, base) = (self.topic(), self.index(), segment.base);
            if is_harmless(&error) {
                // Its bytes are safe.
                tracing::warn!("{topic}-{index}: segment {base} was not sealed: {error}");
                self.sealing.lock().push_front((segment, snapshot));
            } else {
                self.context.health.fail(&error);
            }
            return;
        }
    }

    /// Seals a segment; `also` is what else becomes true of the partition's record at that moment.
    async fn seal(
        &self,
        segment: &Arc<Segment>,
        snapshot: Bytes,
        trim: bool,
        also: impl FnOnce(&mut PartitionRecord),
    ) -> Result<()> {
        let end = segment.end();
        let mut sidecars = vec![(Kind::Snapshot, snapshot)];
        if let Some(index) = segment.close_index(&self.context.indexes) {
            let (offsets, times) = index.encode();
            sidecars.extend([(Kind::OffsetIndex, offsets), (Kind::TimeIndex, times)]);
        }
        let mut record = self.record.lock().clone();
        if record.transactions_from.is_some_and(|from| from < end.next)
            && let Some(list) = segment.aborted.close()
        {
            if !list.is_empty() {
                self.context.indexes.note(segment, size_of_val(&*list));
            }
            sidecars.push((Kind::TxnIndex, encode(&list)));
        }
        if trim {
            record.recovery_point = record.recovery_point.max(end.next);
        }
        also(&mut record);
        let mut change = Change::vital();
        change.put(Table::Partitions, &self.id.key.bytes(), &record);
        let written = (!segment.is_timed()).then(|| segment.written());
        segment
            .bytes
            .seal(Sealing { size: end.size, end: end.next, sidecars, trim, written, change })
            .await?;
        *self.record.lock() = record;
        Ok(())
    }

    /// Deletes the segments that retention no longer covers; their space follows after `file.delete.delay.ms`.
    pub(crate) async fn enforce_retention(self: &Arc<Self>) -> Result<()> {
        if !self.config().cleanup_policy.delete || self.withheld.is_some() {
            return Ok(());
        }
        // Only the appender may end the active segment, and its lock comes first.
        let count = self.expired().await?;
        if count == 0 {
            return Ok(());
        }
        let all = count == self.log.read().segments.len();
        let mut appender = if all { Some(self.turn_alone().await) } else { None };
        let partition = Arc::clone(self);
        let delete = async move { partition.delete_expired(appender.as_deref_mut()).await };
        self.context.tasks.finish(delete).await
    }

    /// How many segments from the start on are no longer covered. All of them only if the last has expired too.
    async fn expired(&self) -> Result<usize> {
        let config = self.config();
        let now = self.context.wall_clock();
        let segments = self.log.read().segments.clone();
        let high_watermark = self.progress.lock().high_watermark;
        let mut total: u64 = segments.iter().map(|segment| segment.end().size).sum();
        let mut count = 0;
        for segment in &segments {
            let end = segment.end();
            let is_last = count + 1 == segments.len();
            if end.next > high_watermark || (end.size == 0 && is_last) {
                break;
            }
            if end.size == 0 {
                // Compaction left nothing of it.
                count += 1;
                continue;
            }
            let too_old = config.retention_ms >= 0
                && now.saturating_sub(segment.newest(&self.context.indexes).await?) > config.retention_ms;
            let left = total - end.size;
            let too_much = !is_last && config.retention_bytes >= 0 && left >= config.retention_bytes as u64;
            if !too_old && !too_much {
                break;
            }
            total = left;
            count += 1;
        }
        Ok(count)
    }

    async fn delete_expired(self: &Arc<Self>, appender: Option<&mut Appender>) -> Result<()> {
        let _only = self.maintenance.lock().await;
        self.check_exists()?;
        let count = self.expired().await?;
        self.drop_segments(count, 0, appender).await
    }

    /// Moves the log's start up to `before`, durably, and deletes the segments that lie wholly below it (Kafka's
    /// `DeleteRecords`). Returns the first offset held. One that the start has passed already changes nothing; one above
    /// the high watermark is refused.
    pub async fn delete_records_before(self: &Arc<Self>, before: i64) -> Result<i64> {
        self.context.check()?;
        // Only the appender may end the active segment, and its lock comes first.
        let mut appender = self.turn_alone().await;
        let partition = Arc::clone(self);
        let delete = async move { partition.delete_before(before, &mut appender).await };
        self.context.tasks.finish(delete).await
    }

    async fn delete_before(self: &Arc<Self>, before: i64, appender: &mut Appender) -> Result<i64> {
        let _only = self.maintenance.lock().await;
        self.context.check()?;
        self.check_exists()?;
        self.check_whole()?;
        let Offsets { log_start, high_watermark, log_end, .. } = self.offsets();
        if before < 0 || before > high_watermark {
            return Err(Error::OffsetOutOfRange {
                topic: Arc::clone(&self.id.topic),
                partition: self.index(),
                offset: before,
                log_start,
                log_end,
            });
        }
        if before <= log_start {
            return Ok(log_start);
        }
        let segments = self.log.read().segments.clone();
        let count = segments.iter().take_while(|segment| segment.end().next <= before).count();
        drop(segments);
        self.drop_segments(count, before, Some(appender)).await?;
        Ok(self.log.read().start)
    }

    /// Takes the first `count` segments off the log, which then starts at `start` or later. All of them only with the
    /// appender at hand. The caller holds `maintenance`.
    async fn drop_segments(
        self: &Arc<Self>,
        count: usize,
        start: i64,
        appender: Option<&mut Appender>,
    ) -> Result<()> {
        let segments = self.log.read().segments.clone();
        // An empty one at the end stays: the next one would have its base offset, and in a directory its name.
        let empty = segments.last().filter(|last| last.end().next == last.base);
        let mut count = count.min(segments.len() - usize::from(empty.is_some()));
        let mut all_of = None;
        match appender {
            // It is deleted, so it need not be sealed.
            Some(appender) if count == segments.len() => all_of = Some(appender),
            _ => count = count.min(segments.len().saturating_sub(1)),
        }
        let last = count.checked_sub(1).and_then(|at| segments.get(at));
        let log_start = last.map_or(start, |last| last.end().next.max(start));
        if log_start <= self.record.lock().log_start && count == 0 {
            return Ok(());
        }
        let gone = &segments[..count];
        let mut producers = self.producers_to_keep(&segments, count, all_of.as_deref_mut()).await?;
        if let Some(appender) = all_of {
            appender.active = None;
        }
        let mut record = self.record.lock().clone();
        record.log_start = record.log_start.max(log_start);
        record.recovery_point = record.recovery_point.max(log_start);
        record.epochs.trim_start(record.log_start);
        if let Some(clean) = &mut record.clean
            && count == segments.len()
        {
            (clean.size, clean.since) = (0, None);
        }
        loop {
            let mut change = Change::vital();
            for segment in gone {
                segment.bytes.forget(&mut change).await?;
            }
            let is_kept = producers.is_some();
            match producers.take() {
                Some(snapshot) => change.put_bytes(Table::Blobs, &self.id.key.bytes(), snapshot.to_vec()),
                None if count > 0 => change.delete(Table::Blobs, &self.id.key.bytes()),
                None => {}
            }
            change.put(Table::Partitions, &self.id.key.bytes(), &record);
            match self.context.catalog.submit(change).await {
                // No deletion is refused for want of room.
                Err(Error::CatalogFull { .. }) if is_kept => {}
                outcome => break outcome?,
            }
        }
        {
            let mut log = self.log.write();
            log.start = record.log_start;
            log.segments.drain(..count);
        }
        *self.record.lock() = record;
        if gone.is_empty() {
            return Ok(());
        }
        let bytes: Vec<_> = gone.iter().map(|segment| Arc::clone(&segment.bytes)).collect();
        for segment in &bytes {
            segment.forgotten();
        }
        tracing::info!("{}-{}: deleted {count} segments below {log_start}", self.topic(), self.index());
        let delay = Duration::from_millis(self.config().file_delete_delay_ms as u64);
        drop(segments);
        self.context.graveyard.bury(delay, bytes, None).await;
        Ok(())
    }

    /// A snapshot of the producers behind the first `count` segments, where these are about to go and none is left that keeps
    /// one: without it a restart would forget what was sent, and append it again. Kafka keeps that of the last segment.
    async fn producers_to_keep(
        &self,
        segments: &[Arc<Segment>],
        count: usize,
        all_of: Option<&mut Appender>,
    ) -> Result<Option<Bytes>> {
        /// Larger ones are not kept: the catalog is held in memory.
        const LARGEST: usize = 64 << 10;
        let Some(last) = count.checked_sub(1).and_then(|at| segments.get(at)) else { return Ok(None) };
        let snapshot = match all_of {
            Some(appender) if appender.ready => {
                appender.producers.expire(self.oldest_producer());
                Some(appender.producers.snapshot())
            }
            // The next one has its own, unless it is not sealed yet.
            _ if count + 1 < segments.len() && !self.is_unsealed(&segments[count]) => None,
            _ => {
                let is_last = |(rolled, _): &&(Arc<Segment>, Bytes)| Arc::ptr_eq(rolled, last);
                let rolled = self.sealing.lock().iter().find(is_last).map(|(_, snapshot)| snapshot.clone());
                match rolled {
                    Some(snapshot) => Some(snapshot),
                    None => last.bytes.sidecar(Kind::Snapshot, last.end().next).await?,
                }
            }
        };
        Ok(snapshot.filter(|bytes| bytes.len() <= LARGEST))
    }

    /// Whether a segment was rolled and waits to be sealed.
    fn is_unsealed(&self, segment: &Arc<Segment>) -> bool {
        self.sealing.lock().iter().any(|(rolled, _)| Arc::ptr_eq(rolled, segment))
    }

    /// Ends a log in order, as far as the catalog has room for that: `false` where it has not, and the next start recovers it.
    pub(crate) async fn close_if_it_fits(self: &Arc<Self>) -> Result<bool> {
        match self.close().await {
            Ok(()) => Ok(true),
            Err(error @ Error::CatalogFull { .. }) => {
                tracing::warn!("{}-{} is not closed in order: {error}", self.topic(), self.index());
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Forgets all epochs but the last: the partition's record is to be small.
    pub(crate) fn forget_epochs(&self) {
        self.record.lock().epochs.keep_last(1);
    }

    /// Ends a log in order: what was appended since the store was opened is sealed, and the record says that nothing
    /// need be checked. No task of the store runs any more.
    pub(crate) async fn close(self: &Arc<Self>) -> Result<()> {
        let mut appender = self.turn_alone().await;
        let _only = self.maintenance.lock().await;
        if self.record.lock().clean.is_some() || self.withheld.is_some() {
            return Ok(());
        }
        let log_end = self.progress.lock().log_end;
        let last = self.log.read().segments.last().cloned();
        let size = last.as_ref().map_or(0, |segment| segment.end().size);
        let since = appender.active.as_ref().and_then(|active| active.since);
        let clean = Clean { end: log_end, size, first_open: appender.producers.first_open(), since };
        let torn = std::mem::take(&mut appender.torn);
        if let Some(active) = appender.active.take() {
            if torn {
                active.segment.bytes.cut(size).await?;
            }
            if size > 0 {
                appender.producers.expire(self.oldest_producer());
                let snapshot = appender.producers.snapshot();
                return self
                    .seal(&active.segment, snapshot, false, |record| record.clean = Some(clean))
                    .await;
            }
        }
        let mut record = self.record.lock().clone();
        record.clean = Some(clean);
        let mut change = Change::owed();
        change.put(Table::Partitions, &self.id.key.bytes(), &record);
        self.context.catalog.submit(change).await?;
        *self.record.lock() = record;
        Ok(())
    }

    /// Ends all appends and adds the partition's removal to a change; returns what holds its space.
    pub(crate) async fn forget(self: &Arc<Self>, change: &mut Change) -> Result<Vec<Arc<dyn SegmentBytes>>> {
        let mut appender = self.turn_alone().await;
        let _only = self.maintenance.lock().await;
        self.mark_deleted();
        appender.active = None;
        let segments = std::mem::take(&mut self.log.write().segments);
        let mut bytes = Vec::with_capacity(segments.len());
        for segment in segments {
            segment.bytes.forget(change).await?;
            bytes.push(Arc::clone(&segment.bytes));
        }
        for behind in self.withheld.iter().flat_map(|withheld| &withheld.behind) {
            behind.forget(change).await?;
            bytes.push(Arc::clone(behind));
        }
        change.delete(Table::Partitions, &self.id.key.bytes());
        change.delete(Table::Blobs, &self.id.key.bytes());
        Ok(bytes)
    }

    /// The partition's record, for a change that the store makes.
    pub(crate) fn put_record(&self, change: &mut Change) {
        change.put(Table::Partitions, &self.id.key.bytes(), &*self.record.lock());
    }

    /// Tells the home about epochs that are durable in the catalog.
    pub(crate) async fn note_epochs(&self) -> Result<()> {
        let epochs = self.record.lock().epochs.clone();
        self.context.home.note_epochs(&self.id, &epochs).await
    }
}

/// Whether a seal that failed has cost no promise: there was no room for what can be had again.
fn is_harmless(error: &Error) -> bool {
    match error {
        Error::CatalogFull { .. }
        | Error::NoSpace { .. }
        | Error::Unplaced { .. }
        | Error::Closed
        | Error::Poisoned { .. } => true,
        Error::File { action: "create" | "write", source, .. } => source.kind() == ErrorKind::StorageFull,
        _ => false,
    }
}
