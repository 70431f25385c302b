//! Segments as extents of a volume: the home that owns its disks.
//!
//! The head of the volume is described in [`layout`], free space in [`extent`], a segment's bytes in `segment`; which copy of
//! the header and the catalog is believed, in [`copies`].
//!
//! Space: what no record of the catalog claims is free. An extent is zeroed before the commit that records it, and
//! that commit makes both durable, the zeroes first; it is free again only after the commit that drops it *and* after
//! the last lease on it. So a recycled extent can never show an old batch as the tail of a new log.
//!
//! What becomes durable where: small appends in the `journal`, many at once, and in their places with the next flush that
//! somebody or nobody asked for; all else by a flush. What the journal has and its place has not, a read brings there first.
//!
//! Freed space is discarded, so that images shrink; what a kill kept from it, the next start discards (see `leftovers`).
//!
//! The disks write while the log grows: what was written to its place is on its way to them soon (`segment`), so that the flush
//! that somebody waits for finds little left to do, and growth, which waits for a flush as well, keeps ahead. What nobody asks
//! to be flushed is flushed all the same, every [`UNFLUSHED`] bytes, when half of the journal is full, and [`KEPT_FOR`] after a
//! commit that the journal alone holds; and nobody waits for that: then second copies leave the memory. Like any other flush it
//! is never tried again, and its failure stops the store.
//!
//! A part of the space is kept back from records ([`VolumeHome::reserve`]), so that index bytes and the catalog's own
//! changes find room on a full volume and topics can be deleted; compaction may take half of it, for as long as it takes.

pub(crate) mod copies;
pub(crate) mod extent;
pub(crate) mod journal;
pub(crate) mod layout;
mod leftovers;
mod segment;

use crate::catalog::records::{PartitionKey, SegmentKey, SegmentRecord, Swap, Table, TopicRecord};
use crate::catalog::{Catalog, Change};
use crate::directory::checkpoints::Checkpoints;
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::heal::Healing;
use crate::health::Health;
use crate::home::{Found, Home, Io, PartitionId, SegmentBytes, Space};
use crate::ids;
use crate::tasks::Tasks;
use copies::{Head, look_blank};
use extent::{Extent, FreeSpace, round_up};
use futures_util::{StreamExt, TryStreamExt, stream};
use journal::{Committed, Found as FoundJournal, Journal, Segments, Unplaced};
use layout::{HeaderFault, Layout};
use parking_lot::Mutex;
use raid::device::{Device, Durability, Holder, ZeroMode};
use segment::VolumeSegment;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use uuid::Uuid;

/// Share of a volume that the catalog may take, and its bounds in bytes.
const CATALOG_SHARE: u64 = 64;
const CATALOG_LEAST: u64 = 2 << 20;
const CATALOG_MOST: u64 = 256 << 20;
/// Share of the space kept back from records, and its bounds in bytes.
const RESERVE_SHARE: u64 = 64;
const RESERVE_LEAST: u64 = 256 << 10;
const RESERVE_MOST: u64 = 64 << 20;
/// Bytes of batches after which a flush begins that nobody has asked for. Less would keep the disks busy with the journals of
/// file systems (at 32 MiB appends were a tenth slower), more would keep second copies in memory for longer.
const UNFLUSHED: u64 = 96 << 20;
/// How long what was committed may be in the journal only.
pub(crate) const KEPT_FOR: Duration = Duration::from_secs(5);
/// How long a flush that nobody asks for waits, after what was kept could not be written to its place.
const ANEW_AFTER: Duration = Duration::from_secs(1);
/// Segments to which appends from the journal are written at the same time.
const REPLAYED_AT_ONCE: usize = 32;
/// The smallest volume that makes sense.
const LEAST_SIZE: u64 = CATALOG_LEAST + (2 << 20);

/// A volume with a log store on it.
pub(crate) struct VolumeHome {
    device: Arc<dyn Device>,
    catalog: Arc<Catalog>,
    tasks: Arc<Tasks>,
    health: Arc<Health>,
    /// `None` on a volume in memory, where no place costs more than others, and on one that was made before there were any.
    journal: Option<Journal>,
    /// Bytes of batches since a flush last began.
    unflushed: AtomicU64,
    /// A flush is under way that nobody has asked for.
    flushing: AtomicBool,
    /// One is due [`KEPT_FOR`] after a commit.
    due: AtomicBool,
    space: Mutex<FreeSpace>,
    /// Bytes kept back from records.
    reserve: u64,
    healing: Arc<Healing>,
    /// Segments found at open that nobody has asked for yet.
    found: Mutex<HashMap<PartitionKey, Vec<Found>>>,
}

impl std::fmt::Debug for VolumeHome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumeHome").field("device", &self.device.name()).finish_non_exhaustive()
    }
}

impl VolumeHome {
    /// Opens the store on `device`, or formats it when it is blank.
    pub(crate) async fn open(
        device: Arc<dyn Device>,
        tasks: Arc<Tasks>,
        health: Arc<Health>,
    ) -> Result<(Arc<Self>, Arc<Catalog>)> {
        let layout = match read_head(&device).await? {
            Some(head) => {
                head.mend(&device).await?;
                head.layout
            }
            None => format(&device, &tasks).await?,
        };
        if layout.catalog_len == 0 && layout.journal.len > 0 {
            // It is being made: whatever a making before this one has left there.
            Journal::format(&device, layout.journal, layout.store).await?;
        }
        let catalog =
            Catalog::on_volume(Arc::clone(&device), layout, Arc::clone(&tasks), Arc::clone(&health)).await?;
        let mut space = FreeSpace::new(layout.space);
        let segments = find_segments(&catalog, &mut space)?;
        let journal = replay(&device, &layout, &segments, &tasks).await?;
        let reserve = (layout.space.len / RESERVE_SHARE).clamp(RESERVE_LEAST, RESERVE_MOST);
        let home = Arc::new(Self {
            healing: Healing::new(Some(Arc::clone(&device)), Arc::clone(&tasks)),
            journal: journal.filter(|_| !device.is_instant()),
            device,
            catalog: Arc::clone(&catalog),
            tasks,
            health,
            unflushed: AtomicU64::new(0),
            flushing: AtomicBool::new(false),
            due: AtomicBool::new(false),
            space: Mutex::new(space),
            reserve,
            found: Mutex::new(HashMap::new()),
        });
        home.keep(segments);
        Ok((home, catalog))
    }

    /// Keeps segments for whoever asks for them.
    fn keep(self: &Arc<Self>, segments: Vec<(SegmentKey, SegmentRecord)>) {
        let mut found = self.found.lock();
        for (key, record) in segments {
            let (sealed, written) = (record.sealed, record.written);
            let reach = record.extents.iter().map(|extent| extent.len).sum();
            let bytes = VolumeSegment::new(self, key, record);
            // Keys come sorted, so segments do too.
            let of_partition = found.entry(key.partition).or_default();
            of_partition.push(Found { base: key.base, bytes, sealed, reach, exact: false, written });
        }
    }

    /// Space for records: leaves the reserve alone. The largest piece up to `want`, at least something.
    fn allocate(&self, want: u64, after: Option<u64>) -> Result<Extent> {
        self.allocate_above(self.reserve, want, after)
    }

    /// Space for what compaction writes, which will free more: half the reserve is enough for all else.
    fn allocate_to_clean(&self, want: u64, after: Option<u64>) -> Result<Extent> {
        self.allocate_above(self.reserve / 2, want, after)
    }

    fn allocate_above(&self, reserve: u64, want: u64, after: Option<u64>) -> Result<Extent> {
        let mut space = self.space.lock();
        let usable = space.free().saturating_sub(reserve);
        let full =
            || Error::NoSpace { place: self.device.name().to_owned(), free: usable, wanted: round_up(want) };
        let want = round_up(want).min(usable / extent::UNIT * extent::UNIT);
        if want == 0 {
            return Err(full());
        }
        space.allocate(want, after).ok_or_else(full)
    }

    /// Space for derived bytes, in one piece, from the reserve if need be.
    fn allocate_derived(&self, want: u64) -> Option<Extent> {
        let mut space = self.space.lock();
        let extent = space.allocate(want, None)?;
        if extent.len >= want {
            return Some(extent);
        }
        // It was just taken, so it can be given back.
        space.release(extent).ok()?;
        None
    }

    /// Bytes of batches are about to be written. Costs an atomic operation.
    fn writes(self: &Arc<Self>, bytes: u64) {
        let before = self.unflushed.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes >= UNFLUSHED {
            self.flush_unasked();
        }
    }

    /// Begins a flush that nobody waits for, if none is under way.
    fn flush_unasked(self: &Arc<Self>) {
        if self.flushing.swap(true, Ordering::AcqRel) {
            return;
        }
        let home = Arc::clone(self);
        self.tasks.spawn(Box::pin(async move {
            if let Err(cause) = home.flush_all().await {
                home.health.fail(&cause);
                if matches!(cause, Error::Unplaced { .. }) {
                    home.tasks.runtime().sleep(ANEW_AFTER).await;
                }
            }
            home.flushing.store(false, Ordering::Release);
        }));
    }

    /// Brings all that was written to its place, durably; commits go on meanwhile.
    async fn flush_all(&self) -> Result<()> {
        self.unflushed.store(0, Ordering::Relaxed);
        let Some(journal) = &self.journal else { return Ok(self.device.flush().await?) };
        let next = journal.next().await;
        journal.place_all().await?;
        self.device.flush().await?;
        // One that failed beside it may have been told what is lost here.
        self.health.check()?;
        journal.covered(next).await
    }

    /// Makes all that was written durable, in its place or in the journal.
    async fn commit(self: &Arc<Self>) -> Result<()> {
        let Some(journal) = &self.journal else { return self.flush_all().await };
        match journal.commit().await? {
            Committed::Written => self.flush_later(),
            Committed::HalfFull => self.flush_unasked(),
            Committed::Flushed => self.unflushed.store(0, Ordering::Relaxed),
        }
        Ok(())
    }

    /// Has a flush come [`KEPT_FOR`] from now, if none is to come. Not counted among the tasks that closing waits for: it sleeps,
    /// and a stop in order flushes.
    fn flush_later(self: &Arc<Self>) {
        if self.due.swap(true, Ordering::AcqRel) {
            return;
        }
        let (home, runtime) = (Arc::downgrade(self), Arc::clone(self.tasks.runtime()));
        self.tasks.runtime().spawn(Box::pin(async move {
            runtime.sleep(KEPT_FOR).await;
            let Some(home) = home.upgrade() else { return };
            home.due.store(false, Ordering::Release);
            if home.journal.as_ref().is_some_and(Journal::keeps) {
                home.flush_unasked();
                // One that was under way already need not cover what was committed last.
                home.flush_later();
            }
        }));
    }

    /// Gives space back at once: no image behind it holds data of ours.
    fn release_now(&self, extents: &[Extent]) {
        let mut space = self.space.lock();
        for extent in extents {
            if let Err(misplaced) = space.release(*extent) {
                tracing::error!("{}: {misplaced}; it stays unused until the next start", self.device.name());
            }
        }
    }

    /// Discards extents, so that images shrink, and gives them back. They are in no record and under no lease; what was still
    /// to be written there is not.
    fn release(self: &Arc<Self>, extents: Vec<Extent>, unplaced: Option<Arc<Unplaced>>) {
        if extents.is_empty() {
            return;
        }
        let home = Arc::clone(self);
        self.tasks.spawn(Box::pin(async move {
            if let Some(unplaced) = unplaced {
                unplaced.abandon().await;
            }
            for extent in &extents {
                if let Err(error) = home.device.discard(extent.at, extent.len).await {
                    // The space is free all the same; only the images stay as large as they are.
                    tracing::warn!("freed space was not discarded: {error}");
                }
            }
            home.release_now(&extents);
        }));
    }
}

impl Home for Arc<VolumeHome> {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn segments<'a>(&'a self, id: &'a PartitionId, _: Option<Swap>) -> Io<'a, Vec<Found>> {
        let found = self.found.lock().remove(&id.key).unwrap_or_default();
        Box::pin(async { Ok(found) })
    }

    fn healing(&self) -> &Arc<Healing> {
        &self.healing
    }

    fn new_segment(&self, id: &PartitionId, base: i64) -> Arc<dyn SegmentBytes> {
        VolumeSegment::new(self, SegmentKey { partition: id.key, base }, SegmentRecord::default())
    }

    fn cleaned_segment(&self, id: &PartitionId, base: i64, _: u64) -> Arc<dyn SegmentBytes> {
        VolumeSegment::beside(self, SegmentKey { partition: id.key, base })
    }

    fn space(&self) -> Result<Option<Space>> {
        let records = self.catalog.records::<SegmentRecord>(Table::Segments)?;
        let held = records.iter().map(|(_, record)| record.held()).sum();
        let space = self.space.lock();
        Ok(Some(Space { total: space.total(), free: space.free(), held }))
    }

    fn room_to_clean(&self) -> Io<'_, ()> {
        let (free, reserve) = (self.space.lock().free(), self.reserve / 2);
        let (place, wanted) = (self.device.name(), extent::UNIT);
        Box::pin(async move {
            if free < reserve + wanted {
                let free = free.saturating_sub(reserve);
                return Err(Error::NoSpace { place: place.to_owned(), free, wanted });
            }
            Ok(())
        })
    }

    fn checkpoints(&self) -> Option<&Checkpoints> {
        None
    }

    fn flush(&self) -> Io<'_, ()> {
        Box::pin(self.commit())
    }

    fn closed(&self) -> Io<'_, ()> {
        Box::pin(async {
            match &self.journal {
                // The next start has nothing to replay.
                Some(journal) => journal.close().await,
                None => Ok(()),
            }
        })
    }

    fn prepare_topic<'a>(&'a self, _: &'a TopicRecord) -> Io<'a, ()> {
        // Nothing bears a topic's name here but its record.
        Box::pin(async { Ok(()) })
    }

    fn forget_topic(&self, _: &TopicRecord, _: &mut Change) {}

    fn topic_forgotten<'a>(&'a self, _: &'a TopicRecord) -> Io<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn opened(&self) -> Result<()> {
        leftovers::discard(self)
    }

    fn remove_topic<'a>(&'a self, _: &'a TopicRecord) -> Io<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn note_epochs<'a>(&'a self, _: &'a PartitionId, _: &'a Epochs) -> Io<'a, ()> {
        // The catalog is the only place for them.
        Box::pin(async { Ok(()) })
    }
}

/// The header of the volume; `None` when the volume is blank in every copy.
pub(crate) async fn read_head(device: &Arc<dyn Device>) -> Result<Option<Head>> {
    let (place, size) = (device.name().to_owned(), device.size());
    if size < LEAST_SIZE {
        return Err(Error::TooSmall { place, size, needed: LEAST_SIZE });
    }
    match Head::read(device).await? {
        Ok(head) => Ok(Some(head)),
        Err(HeaderFault::Magic) => {
            // Where the header, the catalog and the journal would go.
            let head = layout::CATALOG_AT + catalog_share(size) + journal::share(size);
            look_blank(device, head.min(size)).await?;
            Ok(None)
        }
        Err(HeaderFault::Version(found)) => {
            Err(Error::UnsupportedFormat { place, found, supported: layout::VERSION })
        }
        Err(fault) => Err(Error::DamagedHeader { place, reason: fault.to_string() }),
    }
}

fn catalog_share(size: u64) -> u64 {
    (size / CATALOG_SHARE).clamp(CATALOG_LEAST, CATALOG_MOST)
}

/// Writes the first header. Nothing but the header makes a volume a store: before it is durable there is none.
async fn format(device: &Arc<dyn Device>, tasks: &Arc<Tasks>) -> Result<Layout> {
    let (place, size) = (device.name().to_owned(), device.size());
    let store = ids::fresh(tasks.runtime().as_ref());
    let layout = Layout::plan(size, catalog_share(size), journal::share(size), store)
        .ok_or(Error::TooSmall { place, size, needed: LEAST_SIZE })?;
    device.write(layout.copy_at(), layout.encode(), Durability::Cached).await?;
    device.flush().await?;
    tracing::info!("formatted {} as log store {}", device.name(), Uuid::hyphenated(store));
    Ok(layout)
}

/// The segments that the catalog knows, by key. Their space is taken.
fn find_segments(catalog: &Catalog, space: &mut FreeSpace) -> Result<Vec<(SegmentKey, SegmentRecord)>> {
    let mut segments = Vec::new();
    for (key, record) in catalog.records::<SegmentRecord>(Table::Segments)? {
        let key =
            SegmentKey::read(&key).ok_or_else(|| catalog.damaged("a segment's key is not one".to_owned()))?;
        let what = |reason: &dyn std::fmt::Display| {
            let PartitionKey { topic, partition } = key.partition;
            catalog
                .damaged(format!("segment {} of partition {partition} of topic {topic}: {reason}", key.base))
        };
        let blobs = record.blobs.values().filter_map(|blob| blob.at.as_ref());
        for extent in record.extents.iter().chain(blobs) {
            space.claim(*extent).map_err(|misplaced| what(&misplaced))?;
        }
        let room: u64 = record.extents.iter().map(|extent| extent.len).sum();
        if record.sealed.is_some_and(|sealed| sealed > room) {
            return Err(what(&"it is larger than its extents"));
        }
        if record.blobs.values().any(|blob| blob.at.is_some_and(|at| at.len < blob.len)) {
            return Err(what(&"its index bytes are larger than their extent"));
        }
        segments.push((key, record));
    }
    Ok(segments)
}

/// Writes appends that are in the journal only to their places, and begins a new life of it. `None` where there is none.
async fn replay(
    device: &Arc<dyn Device>,
    layout: &Layout,
    known: &[(SegmentKey, SegmentRecord)],
    tasks: &Tasks,
) -> Result<Option<Journal>> {
    let Layout { journal: region, store, .. } = *layout;
    if region.len == 0 {
        return Ok(None);
    }
    let mut found = FoundJournal::read(device, region, store, true).await?;
    let place = device.name();
    if found.gaps > 0 {
        tracing::error!(
            "{place}: {} records of the journal are damaged in all copies; what was appended by them is there if it \
             had reached its place, and else their logs are cut there",
            found.gaps
        );
    }
    if !found.segments.is_empty() {
        let segments = std::mem::take(&mut found.segments);
        let written = write_back(device, known, segments).await?;
        device.flush().await?;
        tracing::info!(
            "{place}: {} appends of the journal were brought to their places, {written} bytes",
            found.appends
        );
    }
    let mut salt = [0; 8];
    tasks.runtime().fill_random(&mut salt);
    let journal = Journal::begin(Arc::clone(device), region, store, &found, u64::from_le_bytes(salt)).await?;
    Ok(Some(journal))
}

/// Writes bytes to segments that are open; returns how many. What cannot be written is an error: it is in the journal, and
/// will be there at the next start.
async fn write_back(
    device: &Arc<dyn Device>,
    known: &[(SegmentKey, SegmentRecord)],
    segments: Segments,
) -> Result<u64> {
    let open: HashMap<&SegmentKey, &SegmentRecord> = known
        .iter()
        .filter(|(_, record)| record.sealed.is_none())
        .map(|(key, record)| (key, record))
        .collect();
    let open = &open;
    let written = stream::iter(segments)
        .map(|(key, runs)| async move {
            let mut written = 0;
            let Some(record) = open.get(&key) else { return Ok(0) };
            for (at, run) in runs {
                let len = run.len() as u64;
                let Some(places) = segment::places(&record.extents, at, len) else {
                    let SegmentKey { partition: PartitionKey { topic, partition }, base } = key;
                    tracing::warn!(
                        "the journal has {len} bytes at {at} of segment {base} of partition {partition} of topic \
                         {topic}, where it has no place"
                    );
                    continue;
                };
                let mut rest = run.freeze();
                for place in places {
                    let part = rest.split_to(place.len as usize);
                    device.write(place.at, part, Durability::Cached).await?;
                }
                written += len;
            }
            Ok::<u64, Error>(written)
        })
        .buffer_unordered(REPLAYED_AT_ONCE)
        .try_fold(0, |all, written| std::future::ready(Ok(all + written)))
        .await?;
    Ok(written)
}

/// Makes an extent read as zeroes, whatever it held.
async fn zero(device: &Arc<dyn Device>, extent: Extent) -> Result<()> {
    Ok(device.write_zeroes(extent.at, extent.len, ZeroMode::MayPunch, Durability::Cached).await?)
}

/// Where all copies of these places lie, one place after the other; of a device that is made of no others, there.
pub(crate) fn holders(device: &Arc<dyn Device>, places: &[Extent]) -> Vec<Holder> {
    let (mut all, mut of) = (Vec::new(), 0);
    for &Extent { at, len } in places {
        let below = device.holders(at, len);
        if below.is_empty() {
            all.push(Holder { device: Arc::clone(device), at, len, of });
        }
        all.extend(below.into_iter().map(|one| Holder { of: one.of + of, ..one }));
        of += len;
    }
    all
}
