//! Batches that are not sound, and what can be done about them: another copy has them good, or they are lost.
//!
//! **Where it is checked.** Recovery checks every batch that it exposes. After that a batch is checked with its checksum
//! before it is served (`Segment::verify`), and by the scrub. What was checked, or appended, counts as checked until the
//! store is closed, or for `log.verify.interval.ms` if that is set: so records are sent without a copy. What goes bad
//! *after* that in this life, be it overwritten by somebody, is noticed by a scrub, by a header, or by the consumer; who
//! will not have that sets the interval to 0, and pays a pass over the bytes with each read.
//! The memory of it (`Checked`) is bounded, a few ranges a segment, and void at once when something bad was found
//! anywhere, or when another copy becomes the one that is read: it speaks for the copy that was read.
//!
//! **What is done** (`settle`). The batch is looked at in every way that the home can read it (`ground`). What is
//! found good is served, and the home makes all copies hold it, durably. Batches at odd offsets or epochs that all copies
//! agree on stand: compaction leaves gaps.
//!
//! **What is lost.** If no copy is good, the batch's place is noted in the segment (`Lost`): reads of its offsets are
//! an error that names them, reads of others go on. Its length cannot be trusted; where the log goes on,
//! `search` finds out.
//!
//! Cost: of a check one read of the bytes (from the page cache, where they are sent from next) and one pass of CRC-32C,
//! in steps of 256 KiB between which other tasks run; what is not cached is read by threads of its own. Of a bad batch,
//! a read in each way, and of one that is lost a pass over what follows.

use crate::batch::{self, BatchFault, Header};
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::ground::{Ground, Sound};
use crate::home::Copies;
use crate::scan::Scan;
use crate::segment::{Placed, Segment};
use crate::tasks::Tasks;
use bytes::{Bytes, BytesMut};
use raid::device::Device;
use raid::range_set::RangeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Ranges of a segment that are remembered as checked.
const MOST_CHECKED: usize = 32;
/// Lost places of a segment that are kept; further ones are found again each time.
const MOST_LOST: usize = 64;
/// Bytes that are checked before other tasks get their turn.
const STEP: u64 = 256 << 10;

/// What was checked and repaired since the store was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HealingCounts {
    /// Batches that were bad in one copy and good in another, and were rewritten.
    pub healed: u64,
    /// Bad batches without a good copy, each counted when it was found.
    pub unreadable: u64,
    /// Bytes of batches whose checksums were checked after they were on disk.
    pub verified: u64,
}

/// What a store knows of checks and repairs, shared by its segments.
pub(crate) struct Healing {
    device: Option<Arc<dyn Device>>,
    tasks: Arc<Tasks>,
    /// Milliseconds for which a check counts. 0: not at all. `u64::MAX`: as long as the store is open.
    interval: AtomicU64,
    /// Counts what was found bad: each time, what was checked before counts no more.
    evidence: AtomicU64,
    healed: AtomicU64,
    unreadable: AtomicU64,
    verified: AtomicU64,
}

impl std::fmt::Debug for Healing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Healing").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

/// That for which a check counts: the arrangement of copies, the evidence, and the interval of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp(u64, u64, u64);

impl Healing {
    pub(crate) fn new(device: Option<Arc<dyn Device>>, tasks: Arc<Tasks>) -> Arc<Self> {
        let (interval, evidence) = (AtomicU64::new(0), AtomicU64::new(0));
        let (healed, unreadable, verified) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Self { device, tasks, interval, evidence, healed, unreadable, verified })
    }

    /// How long a check counts, in milliseconds.
    pub(crate) fn set_interval(&self, interval: u64) {
        self.interval.store(interval, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> HealingCounts {
        HealingCounts {
            healed: self.healed.load(Ordering::Relaxed),
            unreadable: self.unreadable.load(Ordering::Relaxed),
            verified: self.verified.load(Ordering::Relaxed),
        }
    }

    /// What a check that is made now counts for; `None`: it does not count at all.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        let interval = self.interval.load(Ordering::Relaxed);
        if interval == 0 {
            return None;
        }
        let now = self.tasks.runtime().now().as_millis() as u64;
        Some(Stamp(self.arrangement(), self.evidence.load(Ordering::Acquire), now / interval))
    }

    /// Changes when other copies are read.
    pub(crate) fn arrangement(&self) -> u64 {
        self.device.as_ref().map_or(0, |device| device.arrangement())
    }

    /// So many batches were made good in all copies.
    pub(crate) fn mended(&self, batches: u64) {
        self.healed.fetch_add(batches, Ordering::Relaxed);
        self.found_bad();
    }

    fn found_bad(&self) {
        self.evidence.fetch_add(1, Ordering::AcqRel);
    }
}

/// The parts of a segment that were checked.
#[derive(Debug)]
pub(crate) struct Checked {
    stamp: Stamp,
    ranges: RangeSet,
}

/// A place without a good batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Where it begins.
    pub(crate) position: u64,
    /// Where the next sound batch begins, or the segment ends.
    pub(crate) end: u64,
    /// The first offset that is lost.
    pub(crate) from: i64,
    /// The first that is not.
    pub(crate) next: i64,
    /// What is wrong with it.
    pub(crate) fault: BatchFault,
}

/// What a batch that did not look sound turned out to be.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// A good copy was found, or the oddity is genuine.
    Sound(Placed, Bytes),
    /// No copy is good.
    Lost(Lost),
    /// No batch can be told from noise here: nothing says which offset should stand here.
    Unknown,
}

/// How far a check got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verified {
    /// All batches up to this position are sound, or noted as lost; the offset that follows there, if any was looked at.
    To(u64, Option<i64>),
    /// Where it was to begin there is no batch.
    NoBatch,
}

/// Lets other tasks run once.
pub(crate) async fn step_aside() {
    let mut asked = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut asked, true) {
            return std::task::Poll::Ready(());
        }
        context.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

impl Segment {
    pub(crate) fn ground<'a>(&'a self, epochs: Option<&'a Epochs>) -> Ground<'a> {
        let (name, bytes, end) = (&self.id, self.readable(), self.end());
        Ground { name, bytes, base: self.base, end, epochs, ended: None }
    }

    fn readable(&self) -> &dyn Copies {
        &*self.bytes
    }

    /// Makes all copies hold a batch that is known to be good. That they could not be made to is no reason not to serve
    /// it.
    async fn mend(&self, header: &Header, position: u64, good: &Bytes) {
        let (healing, id, segment) = (self.bytes.healing(), &self.id, self.base);
        let (from, to) = (header.base_offset, header.last_offset());
        match self.bytes.mend(position, good.clone()).await {
            Ok(0) => {}
            Ok(copies) => {
                healing.mended(1);
                tracing::warn!(
                    "{id}: the batch of offsets {from}..={to}, byte {position} of segment {segment}, was bad in {copies} \
                     of its copies; it was rewritten from a good one"
                );
            }
            Err(error) => {
                healing.found_bad();
                tracing::warn!(
                    "{id}: the batch of offsets {from}..={to}, byte {position} of segment {segment}, is bad in one of its \
                     copies, which could not be rewritten: {error}"
                );
            }
        }
    }

    /// Finds out about a batch that does not look sound: heals it, or finds where it ends and notes that it is lost.
    /// `expected` is the offset that should stand there, if it is known.
    pub(crate) async fn settle(
        &self,
        position: u64,
        expected: Option<i64>,
        epochs: Option<&Epochs>,
    ) -> Result<Outcome> {
        let expected = expected.or((position == 0).then_some(self.base));
        let ground = self.ground(epochs);
        let fault = match ground.best(position, expected).await? {
            Ok(Sound { header, bytes }) => {
                self.mend(&header, position, &bytes).await;
                let placed = Placed { header, position };
                self.found(placed.position..placed.end());
                return Ok(Outcome::Sound(placed, bytes));
            }
            Err(fault) => fault,
        };
        let Some(from) = expected else { return Ok(Outcome::Unknown) };
        let (end, next) = ground.next_sound(position, from).await?;
        self.bytes.healing().found_bad();
        let lost = Lost { position, end, from, next, fault };
        self.lose(lost);
        Ok(Outcome::Lost(lost))
    }

    /// Checks whole batches from `from`, the position of one that begins at offset `expected` if that is known, until `until` is reached and offset `offset` has been seen.
    /// What is bad is healed, or noted as lost.
    pub(crate) async fn verify(
        &self,
        from: u64,
        until: u64,
        offset: i64,
        expected: Option<i64>,
        epochs: Option<&Epochs>,
    ) -> Result<Verified> {
        let healing = Arc::clone(self.bytes.healing());
        let (ground, end) = (self.ground(epochs), self.end());
        let before = healing.stamp();
        let mut scan = Scan::new(end.size);
        let mut position = from;
        let mut expected = expected.or((from == 0).then_some(self.base));
        let (mut healed, mut rested) = (0, from);
        while position < end.size {
            if position - rested >= STEP {
                rested = position;
                step_aside().await;
            }
            if position >= until && expected.is_some_and(|next| next > offset) {
                break;
            }
            let found = match scan.batch_at(self.readable(), position).await {
                Ok(None) => break,
                Ok(Some(found)) => found,
                Err(Error::Device(_) | Error::File { .. }) => Err(BatchFault::Unreadable),
                Err(error) => return Err(error),
            };
            let sound = found.and_then(|header| ground.fits(&header, position, expected).map(|()| header));
            let placed = match sound {
                Ok(header)
                    if self.bytes.copies() == 1
                        || !ground.is_odd(&header, expected)
                            && !self.bytes.may_differ(position, u64::from(header.size)) =>
                {
                    Placed { header, position }
                }
                _ => {
                    let counted = healing.evidence.load(Ordering::Acquire);
                    let outcome = self.settle(position, expected, epochs).await?;
                    // Others may count as well: then less is remembered than might be.
                    healed += u64::from(healing.evidence.load(Ordering::Acquire) != counted);
                    match outcome {
                        Outcome::Sound(placed, bytes) => {
                            scan.patch(position, bytes);
                            placed
                        }
                        Outcome::Lost(lost) => {
                            (position, expected) = (lost.end, Some(lost.next));
                            continue;
                        }
                        Outcome::Unknown => return Ok(Verified::NoBatch),
                    }
                }
            };
            position = placed.end();
            expected = Some(placed.header.next_offset());
        }
        healing.verified.fetch_add(position - from, Ordering::Relaxed);
        if let Some(Stamp(arrangement, evidence, time)) = before
            && self.is_usual(from..position).await?
        {
            self.note_checked(Stamp(arrangement, evidence + healed, time), from..position);
        }
        Ok(Verified::To(position, expected))
    }

    /// Whole batches from `position`, that of one, to at most `end`, the end of one: at least one, and about a window of
    /// them. The very bytes that are returned are checked.
    pub(crate) async fn read_sound(&self, position: u64, end: u64) -> Result<Bytes> {
        let ground = self.ground(None);
        let len = (end - position).min(STEP);
        let read = ground.read(position, len, None).await?.unwrap_or_default();
        let mut sound = BytesMut::with_capacity(read.len());
        loop {
            let at = position + sound.len() as u64;
            if at >= end {
                break;
            }
            let rest = read.get(sound.len()..).unwrap_or_default();
            let whole = Header::parse(rest).and_then(|header| {
                ground.fits(&header, at, None)?;
                let bytes = rest.get(..header.size as usize).ok_or(BatchFault::Empty)?;
                batch::check(&header, bytes).map(|()| bytes)
            });
            if let Ok(whole) = whole {
                sound.extend_from_slice(whole);
                continue;
            }
            if !sound.is_empty() {
                // Cut short by the window, or bad: seen to when it is the first.
                break;
            }
            match self.settle(at, None, None).await? {
                Outcome::Sound(_, bytes) => return Ok(bytes),
                Outcome::Lost(lost) => return Err(self.lost_error(&lost)),
                Outcome::Unknown => {
                    return Err(self.damaged(self.base, at, whole.err().unwrap_or(BatchFault::Empty)));
                }
            }
        }
        Ok(sound.freeze())
    }

    /// Whether what is read of a range now is what is usually read.
    async fn is_usual(&self, range: Range<u64>) -> Result<bool> {
        if self.bytes.copies() == 1 {
            return Ok(true);
        }
        let pieces = self.bytes.locate(range.start, range.end - range.start).await?;
        Ok(pieces.is_none_or(|pieces| pieces.iter().all(|piece| piece.usual)))
    }

    /// How far from `from` on everything counts as checked.
    pub(crate) fn checked_to(&self, from: u64) -> u64 {
        let Some(stamp) = self.bytes.healing().stamp() else { return from };
        let checked = self.checked.lock();
        let ranges = checked.as_ref().filter(|checked| checked.stamp == stamp).map(|checked| &checked.ranges);
        let next = ranges.and_then(|ranges| ranges.next(from)).filter(|range| range.start == from);
        next.map_or(from, |range| range.end)
    }

    /// Whole batches were appended: their checksums were right.
    pub(crate) fn appended(&self, range: Range<u64>) {
        if let Some(stamp) = self.bytes.healing().stamp() {
            self.note_checked(stamp, range);
        }
    }

    fn note_checked(&self, stamp: Stamp, range: Range<u64>) {
        let mut checked = self.checked.lock();
        match &mut *checked {
            Some(checked) if checked.stamp == stamp && checked.ranges.count() < MOST_CHECKED => {
                checked.ranges.insert(range);
            }
            other => {
                let mut ranges = RangeSet::default();
                ranges.insert(range);
                *other = Some(Box::new(Checked { stamp, ranges }));
            }
        }
    }

    /// Takes note of a place without a good batch.
    pub(crate) fn lose(&self, lost: Lost) {
        let mut all = self.lost.lock();
        if all.contains(&lost) {
            return;
        }
        all.retain(|one| one.end <= lost.position || lost.end <= one.position);
        if all.len() < MOST_LOST {
            all.push(lost);
            all.sort_unstable_by_key(|one| one.position);
        }
        drop(all);
        self.bytes.healing().unreadable.fetch_add(1, Ordering::Relaxed);
        tracing::error!("no copy is good: {}", self.lost_error(&lost));
    }

    /// Something good stands there: what was lost is found.
    fn found(&self, range: Range<u64>) {
        self.lost.lock().retain(|one| one.end <= range.start || range.end <= one.position);
    }

    /// The lost place that begins at a position.
    pub(crate) fn lost_from(&self, position: u64) -> Option<Lost> {
        self.lost.lock().iter().find(|lost| lost.position == position).copied()
    }

    /// The lost place that an offset belongs to.
    pub(crate) fn lost_at(&self, offset: i64) -> Option<Lost> {
        self.lost.lock().iter().find(|lost| (lost.from..lost.next).contains(&offset)).copied()
    }

    /// The first lost place that begins at a position or after it.
    pub(crate) fn lost_after(&self, position: u64) -> Option<Lost> {
        self.lost.lock().iter().find(|lost| lost.position >= position).copied()
    }

    /// What whoever asks for lost records is told.
    pub(crate) fn lost_error(&self, lost: &Lost) -> Error {
        Error::LostBatch {
            topic: Arc::clone(&self.id.topic),
            partition: self.id.number(),
            from: lost.from,
            next: lost.next,
            segment: self.base,
            position: lost.position,
            end: lost.end,
            fault: lost.fault,
        }
    }
}
