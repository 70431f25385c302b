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
//! **What is done** (`settle`). The batch is looked at in every way that the home can read it. Sound are bytes whose
//! checksum is right and whose first 16 bytes, which no checksum covers, are what they must be: the offset that
//! follows, the epoch that wrote there. If no copy is sound as a whole, sectors of several are put together. What is
//! found good is served, and the home makes all copies hold it, durably. Batches at odd offsets or epochs that all copies
//! agree on stand: compaction leaves gaps.
//!
//! **What is lost.** If no copy is good, the batch's place is noted in the segment (`Lost`): reads of its offsets are
//! an error that names them, reads of others go on. Its length cannot be trusted, so the next batch is where a sound one
//! begins: at the length that some copy tells, or else at the first place where the bytes say so.
//!
//! Cost: of a check one read of the bytes (from the page cache, where they are sent from next) and one pass of CRC-32C,
//! in steps of 256 KiB between which other tasks run; what is not cached is read by threads of its own. Of a bad batch,
//! a read in each way, and of one that is lost a pass over what follows.

use crate::batch::{self, BatchFault, HEADER, Header};
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::home::{PartitionId, SegmentBytes};
use crate::segment::{End, Placed, Scan, Segment};
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
/// Bytes in which a next batch is looked for at once.
const WINDOW: u64 = 1 << 20;
/// Bytes that are checked before other tasks get their turn.
const STEP: u64 = 256 << 10;
/// A batch that says it is larger is checked before there is memory for it.
const LARGE: u32 = 1 << 20;
/// Unit in which copies are put together.
const SECTOR: u64 = 512;
/// Ways to put copies together that are tried. With a 32-bit checksum, one in 16 million would be right by chance.
const MOST_MIXES: usize = 256;
/// Largest batch that is put together from several copies.
const LARGEST_MIX: u64 = 16 << 20;

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

/// The bytes in which a batch is looked for.
#[derive(Clone, Copy)]
pub(crate) struct Ground<'a> {
    pub(crate) id: &'a PartitionId,
    pub(crate) bytes: &'a Arc<dyn SegmentBytes>,
    pub(crate) base: i64,
    pub(crate) end: End,
    /// What wrote where, if it is known.
    pub(crate) epochs: Option<&'a Epochs>,
    /// The least epoch that may have written.
    pub(crate) epoch: i32,
}

/// Sound bytes found in some way.
pub(crate) struct Sound {
    pub(crate) header: Header,
    pub(crate) bytes: Bytes,
}

impl Ground<'_> {
    /// Whether a header may stand at `position`, after batches that end at `expected`.
    pub(crate) fn fits(
        &self,
        header: &Header,
        position: u64,
        expected: Option<i64>,
    ) -> std::result::Result<(), BatchFault> {
        let (needed, available) = (u64::from(header.size), self.end.size - position);
        let found = header.base_offset;
        let least = expected.unwrap_or(self.base);
        if found < least || header.last_offset_delta < 0 || header.next_offset() > self.end.next {
            return Err(BatchFault::BaseOffset { found, expected: least });
        }
        if needed > available {
            return Err(BatchFault::Truncated { needed, available });
        }
        if header.leader_epoch < self.epoch {
            return Err(BatchFault::LeaderEpoch { found: header.leader_epoch, previous: self.epoch });
        }
        Ok(())
    }

    /// Whether what no checksum covers is other than expected, though it may be right.
    pub(crate) fn is_odd(&self, header: &Header, expected: Option<i64>) -> bool {
        let gap = expected.is_some_and(|expected| header.base_offset != expected);
        let epoch = self.epochs.and_then(|epochs| epochs.at(header.base_offset));
        gap || epoch.is_some_and(|epoch| epoch != header.leader_epoch)
    }

    /// Reads as everybody does (`None`), or in one way. What cannot be read is a fault of the batch.
    async fn read(
        &self,
        at: u64,
        len: u64,
        way: Option<usize>,
    ) -> Result<std::result::Result<Bytes, BatchFault>> {
        let buf = raid::device::buffer(len as usize);
        let read = match way {
            None => self.bytes.read(at, buf).await,
            Some(way) => self.bytes.read_copy(at, buf, way).await,
        };
        match read {
            Ok(bytes) => Ok(Ok(bytes.freeze())),
            Err(error @ (Error::Device(_) | Error::File { .. })) => {
                tracing::warn!("{}-{}: {error}", self.id.topic, self.id.number());
                Ok(Err(BatchFault::Unreadable))
            }
            Err(error) => Err(error),
        }
    }

    /// The header at `position` as one way has it.
    pub(crate) async fn head(
        &self,
        position: u64,
        way: Option<usize>,
    ) -> Result<std::result::Result<Header, BatchFault>> {
        let len = (HEADER as u64).min(self.end.size - position);
        Ok(self.read(position, len, way).await?.and_then(|head| Header::parse(&head)))
    }

    /// The batch at `position` as one way has it.
    pub(crate) async fn look(
        &self,
        position: u64,
        expected: Option<i64>,
        way: Option<usize>,
    ) -> Result<std::result::Result<Sound, BatchFault>> {
        let header = match self.head(position, way).await? {
            Ok(header) => header,
            Err(fault) => return Ok(Err(fault)),
        };
        if let Err(fault) = self.fits(&header, position, expected) {
            return Ok(Err(fault));
        }
        if header.size > LARGE
            && let Err(fault) = self.adds_up(position, &header, way).await?
        {
            return Ok(Err(fault));
        }
        let bytes = match self.read(position, u64::from(header.size), way).await? {
            Ok(bytes) => bytes,
            Err(fault) => return Ok(Err(fault)),
        };
        Ok(Header::parse(&bytes)
            .and_then(|header| batch::check(&header, &bytes).map(|()| Sound { header, bytes })))
    }

    /// Checks the batch of a header in steps: one that is not sound may say any length, and takes no memory for it.
    async fn adds_up(
        &self,
        position: u64,
        header: &Header,
        way: Option<usize>,
    ) -> Result<std::result::Result<(), BatchFault>> {
        let (mut at, mut crc, end) = (batch::CRC_FROM as u64, 0, u64::from(header.size));
        while at < end {
            let len = (end - at).min(STEP);
            match self.read(position + at, len, way).await? {
                Ok(part) => crc = crc32c::crc32c_append(crc, &part),
                Err(fault) => return Ok(Err(fault)),
            }
            at += len;
        }
        Ok(batch::check_sums(header, crc))
    }

    fn ways(&self) -> Vec<Option<usize>> {
        let copies = self.bytes.copies();
        // Where copies may differ, a plain read would first make them equal, from the wrong one perhaps.
        let raw = self.bytes.may_differ(0, self.end.size);
        let plain = (!raw || copies == 1).then_some(None);
        let apart = (0..copies).map(Some).filter(|_| copies > 1);
        plain.into_iter().chain(apart).collect()
    }

    /// The best there is at `position`, over all ways; else the first fault.
    pub(crate) async fn best(
        &self,
        position: u64,
        expected: Option<i64>,
    ) -> Result<std::result::Result<Sound, BatchFault>> {
        let (mut odd, mut fault): (Option<Sound>, _) = (None, None);
        for way in self.ways() {
            match self.look(position, expected, way).await? {
                Ok(sound) if !self.is_odd(&sound.header, expected) => return Ok(Ok(sound)),
                Ok(sound) => {
                    let nearer =
                        odd.as_ref().is_none_or(|odd| sound.header.base_offset < odd.header.base_offset);
                    if nearer {
                        odd = Some(sound);
                    }
                }
                Err(found) => {
                    fault.get_or_insert(found);
                }
            }
        }
        if let Some(odd) = odd {
            return Ok(Ok(odd));
        }
        let fault = fault.unwrap_or(BatchFault::Empty);
        Ok(self.mixed(position, expected).await?.ok_or(fault))
    }

    /// The batch put together from parts of several copies, where that gives a sound one.
    async fn mixed(&self, position: u64, expected: Option<i64>) -> Result<Option<Sound>> {
        if self.bytes.copies() == 1 {
            return Ok(None);
        }
        let mut sizes: Vec<u64> = Vec::new();
        for way in self.ways() {
            let Ok(header) = self.head(position, way).await? else { continue };
            let size = u64::from(header.size);
            if size <= (self.end.size - position).min(LARGEST_MIX) && !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        for size in sizes {
            let mut copies: Vec<Bytes> = Vec::new();
            for way in self.ways() {
                if let Ok(copy) = self.read(position, size, way).await?
                    && !copies.contains(&copy)
                {
                    copies.push(copy);
                }
            }
            let sound = mix(&copies, position, |bytes| {
                let header = Header::parse(bytes).ok()?;
                self.fits(&header, position, expected).ok()?;
                batch::check(&header, bytes).ok()?;
                (!self.is_odd(&header, expected)).then_some(header)
            });
            if let Some((header, bytes)) = sound {
                return Ok(Some(Sound { header, bytes }));
            }
        }
        Ok(None)
    }

    /// Where the batch at `position`, which should begin at offset `from`, ends: the next sound batch, or the end.
    pub(crate) async fn next_sound(&self, position: u64, from: i64) -> Result<(u64, i64)> {
        // As long as some copy says it is, if a sound one follows.
        for way in self.ways() {
            let Ok(header) = self.head(position, way).await? else { continue };
            let next = position + u64::from(header.size);
            if next == self.end.size && header.base_offset == from {
                return Ok((self.end.size, self.end.next));
            }
            if next < self.end.size
                && let Ok(sound) = self.best(next, Some(from + 1)).await?
            {
                return Ok((next, sound.header.base_offset));
            }
        }
        let mut at = position + 1;
        while at + (HEADER as u64) <= self.end.size {
            let len = (WINDOW + HEADER as u64).min(self.end.size - at);
            let mut seen: Vec<Bytes> = Vec::new();
            let mut first: Option<(u64, i64)> = None;
            for way in self.ways() {
                let Ok(window) = self.read(at, len, way).await? else { continue };
                if seen.contains(&window) {
                    continue;
                }
                for start in self.candidates(&window, at, from) {
                    if first.is_some_and(|(best, _)| best <= start) {
                        break;
                    }
                    if let Ok(sound) = self.look(start, Some(from + 1), way).await? {
                        first = Some((start, sound.header.base_offset));
                        break;
                    }
                }
                seen.push(window);
            }
            if let Some(found) = first {
                return Ok(found);
            }
            at += WINDOW;
        }
        Ok((self.end.size, self.end.next))
    }

    /// Places in a window at which a header of a later batch may stand.
    fn candidates(&self, window: &[u8], at: u64, from: i64) -> Vec<u64> {
        let headers = window.windows(HEADER).enumerate();
        // The format's number first: it rules out nearly everything.
        let plausible = headers.filter(|(_, bytes)| bytes[16] == 2).filter_map(|(index, bytes)| {
            let (position, header) = (at + index as u64, Header::parse(bytes).ok()?);
            self.fits(&header, position, Some(from + 1)).ok().map(|()| position)
        });
        plausible.collect()
    }
}

/// Puts copies together, sector by sector where they differ, until `check` is content.
fn mix<T>(copies: &[Bytes], position: u64, check: impl Fn(&[u8]) -> Option<T>) -> Option<(T, Bytes)> {
    let (first, others) = copies.split_first()?;
    // Runs of sectors in which copies differ, each with its distinct contents.
    let mut runs: Vec<(Range<usize>, Vec<&[u8]>)> = Vec::new();
    let mut start = 0;
    while start < first.len() {
        let to_border = SECTOR - (position + start as u64) % SECTOR;
        let range = start..(start + to_border as usize).min(first.len());
        start = range.end;
        if others.iter().all(|other| other[range.clone()] == first[range.clone()]) {
            continue;
        }
        match runs.last_mut() {
            Some((last, _)) if last.end == range.start && others.len() == 1 => last.end = range.end,
            _ => runs.push((range, Vec::new())),
        }
    }
    let mut count = 1usize;
    for (range, contents) in &mut runs {
        for copy in copies {
            if !contents.contains(&&copy[range.clone()]) {
                contents.push(&copy[range.clone()]);
            }
        }
        count = count.saturating_mul(contents.len());
    }
    if count > MOST_MIXES {
        return None;
    }
    let mut mixed = BytesMut::from(&first[..]);
    for number in 0..count {
        let mut rest = number;
        for (range, contents) in &runs {
            mixed[range.clone()].copy_from_slice(contents[rest % contents.len()]);
            rest /= contents.len();
        }
        if let Some(found) = check(&mixed) {
            return Some((found, mixed.freeze()));
        }
    }
    None
}

/// Finds out about a batch that does not look sound: heals it, or finds where it ends. `expected` is the offset that
/// should stand there, if it is known.
pub(crate) async fn settle(ground: &Ground<'_>, position: u64, expected: Option<i64>) -> Result<Outcome> {
    let healing = ground.bytes.healing();
    match ground.best(position, expected).await? {
        Ok(Sound { header, bytes }) => {
            mend(ground, &header, position, &bytes).await;
            Ok(Outcome::Sound(Placed { header, position }, bytes))
        }
        Err(fault) => {
            let Some(from) = expected else { return Ok(Outcome::Unknown) };
            let (end, next) = ground.next_sound(position, from).await?;
            healing.found_bad();
            Ok(Outcome::Lost(Lost { position, end, from, next, fault }))
        }
    }
}

/// Makes all copies hold a batch that is known to be good. That they could not be made to is no reason not to serve it.
pub(crate) async fn mend(ground: &Ground<'_>, header: &Header, position: u64, good: &Bytes) {
    let healing = ground.bytes.healing();
    let (topic, partition, segment) = (&ground.id.topic, ground.id.number(), ground.base);
    let (from, to) = (header.base_offset, header.last_offset());
    match ground.bytes.mend(position, good.clone()).await {
        Ok(0) => {}
        Ok(copies) => {
            healing.mended(1);
            tracing::warn!(
                "{topic}-{partition}: the batch of offsets {from}..={to}, byte {position} of segment {segment}, was bad \
                 in {copies} of its copies; it was rewritten from a good one"
            );
        }
        Err(error) => {
            healing.found_bad();
            tracing::warn!(
                "{topic}-{partition}: the batch of offsets {from}..={to}, byte {position} of segment {segment}, is bad \
                 in one of its copies, which could not be rewritten: {error}"
            );
        }
    }
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
    fn ground<'a>(&'a self, epochs: Option<&'a Epochs>) -> Ground<'a> {
        Ground { id: &self.id, bytes: &self.bytes, base: self.base, end: self.end(), epochs, epoch: i32::MIN }
    }

    /// Whether a batch may be read as a whole: its header is believed, or its checksum is right.
    pub(crate) async fn is_worth_memory(&self, placed: &Placed) -> Result<bool> {
        let Placed { header, position } = placed;
        Ok(header.size <= LARGE || self.ground(None).adds_up(*position, header, None).await?.is_ok())
    }

    /// Finds out about the batch at `position`, and notes it if it is lost.
    pub(crate) async fn settle(
        &self,
        position: u64,
        expected: Option<i64>,
        epochs: Option<&Epochs>,
    ) -> Result<Outcome> {
        let expected = expected.or((position == 0).then_some(self.base));
        let outcome = settle(&self.ground(epochs), position, expected).await?;
        match &outcome {
            Outcome::Sound(placed, _) => self.found(placed.position..placed.end()),
            Outcome::Lost(lost) => self.lose(*lost),
            Outcome::Unknown => {}
        }
        Ok(outcome)
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
        let mut scan = Scan::new(&self.bytes, end.size);
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
            let found = match scan.batch_at(position).await {
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
