//! The journal of a volume: small appends to many partitions become durable by one write.
//!
//! Without it a commit flushes all members, and each place that was appended to since the last one is a write of its own to a
//! disk: sixty-four small appends to as many partitions cost it as much as sixty-four. So what is appended is also gathered
//! here, and a commit writes what was gathered as one record, stably. The appends themselves stay in memory, where readers find
//! them, and go to their places later, many of one partition at once, with a flush that nobody waits for.
//!
//! Which way a commit takes: the record, if all that was written since the last commit was small appends, and few enough of
//! them; a flush of everything else, which no record can stand for. A volume in memory has no use for it.
//!
//! Invariants:
//! - An append is gathered after it was written to its place. So a flush that begins when the next record would be `n` covers
//!   all appends of records before `n`; after it the pointer says `n`, and only when *that* is durable their room is used again.
//! - Records follow each other: one that does not fit before the region's end begins at its beginning, and the next starts
//!   where the last one ended. None is written before the one before it is durable, so what is missing behind the last one was
//!   never acknowledged.
//! - A record names segments, not places of the volume, and a start writes its appends only to segments that the catalog knows
//!   as open. What was closed was flushed first, what is gone is in no table; a segment's name is never used again.
//! - A start replays before anything is read, flushes, and begins a new life: from then on no record of an earlier one counts.
//!   A power cut before that has the next start do the same again.
//!
//! What is not sound here in one copy is looked for in the others, and mended. A record that has rotted in all of them is told
//! of and passed over: its appends may well be in their places.
//!
//! Cost: for an append one copy and a short lock; for a commit one stable write, a system call for each leg of it. At a start:
//! what counts of the journal is read, and the length of one record behind it. Memory: a record, while it is gathered; at a
//! start as much as the journal holds.

mod record;

use super::copies::Versions;
use super::extent::Extent;
use crate::catalog::records::SegmentKey;
use crate::error::{Error, Result};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use raid::device::{Device, Durability};
use record::{BLOCK, LONGEST, Name, Pointer};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// Longest append that is gathered: a longer one costs a disk more by its bytes than by its place.
const SMALL: usize = 32 << 10;
/// Share of a volume that the journal takes, and its bounds in bytes: the more fit, the more of a partition's appends are
/// written to their place at once.
const SHARE: u64 = 128;
const LEAST: u64 = 128 << 10;
const MOST: u64 = 32 << 20;
/// Bytes of the two pointers before the records.
const POINTERS: u64 = 2 * BLOCK;

/// Bytes of the journal of a volume of `size` bytes.
pub(super) fn share(size: u64) -> u64 {
    (size / SHARE).clamp(LEAST, MOST)
}

/// What records say of segments: for each, runs of bytes in the order in which they were written.
#[derive(Debug, Default)]
pub(crate) struct Segments(BTreeMap<SegmentKey, Vec<(u64, BytesMut)>>);

impl Segments {
    fn add(&mut self, key: SegmentKey, at: u64, data: &[u8]) {
        let runs = self.0.entry(key).or_default();
        match runs.last_mut() {
            // Appends to one segment mostly follow each other.
            Some((from, run)) if from.checked_add(run.len() as u64) == Some(at) => {
                run.extend_from_slice(data);
            }
            _ => runs.push((at, BytesMut::from(data))),
        }
    }

    /// The runs of one segment.
    pub(crate) fn of(&self, key: &SegmentKey) -> &[(u64, BytesMut)] {
        self.0.get(key).map_or(&[], |runs| &runs[..])
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl IntoIterator for Segments {
    type Item = (SegmentKey, Vec<(u64, BytesMut)>);
    type IntoIter = std::collections::btree_map::IntoIter<SegmentKey, Vec<(u64, BytesMut)>>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// The journal as a start finds it.
#[derive(Debug)]
pub(crate) struct Found {
    pointer: Pointer,
    /// Number that the next record would have.
    end: u64,
    /// Appends that its records hold.
    pub(crate) appends: u64,
    /// Places between records that count where a record is missing that must have been there, as far as is known.
    pub(crate) gaps: u64,
    pub(crate) segments: Segments,
}

/// Where blocks of the journal lie, and how they are read.
struct Blocks<'a> {
    device: &'a Arc<dyn Device>,
    region: Extent,
    store: Uuid,
    /// Whether what is sound in some copies only is made the content of all.
    mends: bool,
}

impl Blocks<'_> {
    /// Blocks for records.
    fn count(&self) -> u64 {
        count(self.region)
    }

    /// A sound record with this number, and its length.
    async fn record(&self, number: u64, salt: u64) -> Result<Option<(Bytes, usize, Name)>> {
        let at = place(self.region, number);
        let is_it = |(_, name): &(usize, Name)| name.number == number && name.salt == salt;
        let first = Versions::read(self.device, at, BLOCK).await?;
        let first = first.block(0);
        let heads = first.iter().filter_map(|block| record::head(block, self.store)).filter(is_it);
        let Some(len) = heads.map(|(len, _)| len).max() else { return Ok(None) };
        let all = (len as u64).next_multiple_of(BLOCK);
        if number % self.count() + all / BLOCK > self.count() {
            return Ok(None);
        }
        let versions = Versions::read(self.device, at, all).await?;
        let sound = |content: &[u8]| record::check(content, self.store).filter(is_it);
        let Some(good) = versions.best(|content| sound(content).map(|_| 0)) else {
            return Ok(None);
        };
        if self.mends {
            versions.mend(self.device, &good, "the journal").await?;
        }
        Ok(sound(&good).map(|(len, name)| (good, len, name)))
    }

    /// The next number from `from` on, within `blocks`, that a block of this life says to be a record's.
    async fn next_head(&self, from: u64, blocks: u64, salt: u64) -> Option<u64> {
        let (mut next, end) = (from, from + blocks);
        while next < end {
            let run = (end - next).min(self.count() - next % self.count()).min(LONGEST as u64 / BLOCK);
            let Ok(content) = Versions::read(self.device, place(self.region, next), run * BLOCK).await else {
                // Nothing that counts need lie there.
                next += run;
                continue;
            };
            for (number, at) in (next..).zip((0..run * BLOCK).step_by(BLOCK as usize)) {
                let heads = content.block(at as usize);
                let mut names = heads.iter().filter_map(|block| record::head(block, self.store));
                if names.any(|(_, name)| name.number == number && name.salt == salt) {
                    return Some(number);
                }
            }
            next += run;
        }
        None
    }
}

/// Blocks for records in a region.
fn count(region: Extent) -> u64 {
    (region.len - POINTERS) / BLOCK
}

fn place(region: Extent, number: u64) -> u64 {
    region.at + POINTERS + number % count(region) * BLOCK
}

impl Found {
    /// Reads the journal in `region`, and makes what is sound in some copies the content of all if `mends`.
    pub(crate) async fn read(
        device: &Arc<dyn Device>,
        region: Extent,
        store: Uuid,
        mends: bool,
    ) -> Result<Self> {
        let versions = Versions::read(device, region.at, POINTERS).await?;
        let slots = [0, BLOCK as usize].map(|from| {
            let candidates = versions.block(from).into_iter();
            let sound = candidates.filter_map(|block| Some((Pointer::decode(&block, store)?, block)));
            sound.max_by_key(|(pointer, _)| pointer.turn)
        });
        let newest = slots.iter().flatten().map(|(pointer, _)| *pointer).max_by_key(|pointer| pointer.turn);
        let Some(pointer) = newest else {
            let reason = "neither pointer of its journal is sound in any copy".to_owned();
            return Err(Error::DamagedHeader { place: device.name().to_owned(), reason });
        };
        if let (true, [Some((_, a)), Some((_, b))]) = (mends, &slots) {
            let good = Bytes::from([&a[..], &b[..]].concat());
            versions.mend(device, &good, "the journal").await?;
        }
        let blocks = Blocks { device, region, store, mends };
        // Where one pointer is not sound, the other may be older: then nothing is known of where records end.
        let is_torn = slots.iter().any(Option::is_none);
        let ahead = if is_torn { blocks.count() } else { LONGEST as u64 / BLOCK };
        let (mut appends, mut gaps, mut segments) = (0, 0, Segments::default());
        let mut end = pointer.first;
        loop {
            let lap = end.next_multiple_of(blocks.count());
            let mut next = blocks.record(end, pointer.salt).await?;
            if next.is_none() && lap > end {
                next = blocks.record(lap, pointer.salt).await?;
            }
            if let Some((record, len, name)) = next {
                match record::replay(&record, len, &mut segments) {
                    Some(count) => appends += count,
                    None => gaps += 1,
                }
                end = name.number + record.len() as u64 / BLOCK;
                continue;
            }
            // Behind the last one nothing of this life is left, unless one was passed over.
            match blocks.next_head(end + 1, ahead, pointer.salt).await {
                Some(number) => {
                    // One that is torn is the last, and owed to nobody; one with others behind it was durable.
                    let is_sound = blocks.record(number, pointer.salt).await?.is_some();
                    gaps += u64::from(is_sound);
                    end = number + u64::from(!is_sound);
                }
                None => break,
            }
        }
        Ok(Self { pointer, end, appends, gaps, segments })
    }
}

/// What was written since the last commit.
#[derive(Debug)]
struct Gathered {
    /// The record that is being made; `None` while it is empty.
    record: Option<BytesMut>,
    appends: u32,
    /// Something was written that no record can stand for: only a flush makes it durable.
    beside: bool,
    /// Bytes of the last record, for room.
    last: usize,
}

/// Where the journal ends.
#[derive(Debug)]
struct End {
    pointer: Pointer,
    /// Number of the next record.
    next: u64,
}

/// The journal of a store that is open.
pub(super) struct Journal {
    device: Arc<dyn Device>,
    region: Extent,
    store: Uuid,
    gathered: Mutex<Gathered>,
    /// Held while a record or a pointer is written.
    end: tokio::sync::Mutex<End>,
}

/// How all became durable.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Committed {
    /// By a record, or it was so before.
    Written,
    /// The same, and half of the journal is full: a flush should make room.
    HalfFull,
    /// By a flush of everything.
    Flushed,
}

/// What was gathered, on its way. If it does not arrive, only a flush makes it durable.
struct Taken<'a> {
    gathered: &'a Mutex<Gathered>,
    record: Option<BytesMut>,
    appends: u32,
    beside: bool,
    arrived: bool,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if !self.arrived {
            self.gathered.lock().beside = true;
        }
    }
}

impl Journal {
    /// Makes an empty journal of a store that is being made.
    pub(super) async fn format(device: &Arc<dyn Device>, region: Extent, store: Uuid) -> Result<()> {
        for turn in 0..2 {
            let pointer = Pointer { turn, salt: 0, first: 0 };
            device.write(region.at + pointer.at(), pointer.encode(store), Durability::Stable).await?;
        }
        Ok(())
    }

    /// Begins a new life, in which nothing counts that was found. Everything that was found is in its place, durably.
    pub(super) async fn begin(
        device: Arc<dyn Device>,
        region: Extent,
        store: Uuid,
        found: &Found,
        salt: u64,
    ) -> Result<Self> {
        let Found { pointer, end, .. } = *found;
        // What an earlier start has written, nobody here has flushed.
        let gathered = Gathered { record: None, appends: 0, beside: true, last: 0 };
        let journal = Self {
            device,
            region,
            store,
            gathered: Mutex::new(gathered),
            end: tokio::sync::Mutex::new(End { pointer, next: end }),
        };
        // Both pointers: if one rots, the other one knows as much.
        for _ in 0..2 {
            journal.point(&mut *journal.end.lock().await, end, salt).await?;
        }
        Ok(journal)
    }

    /// An append was written at `at` of a segment.
    pub(super) fn gather(&self, key: &SegmentKey, at: u64, data: &[u8]) {
        let mut gathered = self.gathered.lock();
        if gathered.beside {
            return;
        }
        let len = gathered.record.as_ref().map_or(record::HEAD, BytesMut::len);
        if data.len() > SMALL || len + record::taken_by(data.len()) > LONGEST {
            (gathered.beside, gathered.record, gathered.appends) = (true, None, 0);
            return;
        }
        let last = gathered.last;
        record::push(gathered.record.get_or_insert_with(|| record::begin(last)), key, at, data);
        gathered.appends += 1;
    }

    /// Something was written that is no append.
    pub(super) fn write_beside(&self) {
        self.gathered.lock().beside = true;
    }

    /// Makes durable all that was written before this call.
    pub(super) async fn commit(&self) -> Result<Committed> {
        let mut end = self.end.lock().await;
        let mut taken = self.take();
        let record = taken.record.take().filter(|_| !taken.beside);
        let placed = record.and_then(|bytes| {
            let number = self.room(&end, (bytes.len() as u64).div_ceil(BLOCK))?;
            Some((bytes, number))
        });
        if let Some((bytes, number)) = placed {
            let name = Name { store: self.store, salt: end.pointer.salt, number };
            let bytes = record::finish(bytes, name, taken.appends);
            // Before it is written: should nobody wait for that to the end, no other one may be written over it.
            end.next = number + bytes.len() as u64 / BLOCK;
            self.device.write(place(self.region, number), bytes, Durability::Stable).await?;
        } else if taken.beside || taken.appends > 0 {
            self.flush(&mut end).await?;
            taken.arrived = true;
            return Ok(Committed::Flushed);
        }
        taken.arrived = true;
        let is_half_full = end.next - end.pointer.first > count(self.region) / 2;
        Ok(if is_half_full { Committed::HalfFull } else { Committed::Written })
    }

    fn take(&self) -> Taken<'_> {
        let mut gathered = self.gathered.lock();
        let record = gathered.record.take();
        gathered.last = record.as_ref().map_or(gathered.last, BytesMut::len);
        let (appends, beside) = (std::mem::take(&mut gathered.appends), std::mem::take(&mut gathered.beside));
        Taken { gathered: &self.gathered, record, appends, beside, arrived: false }
    }

    /// The number of a record of so many blocks, if there is room for it.
    fn room(&self, end: &End, blocks: u64) -> Option<u64> {
        let all = count(self.region);
        let number = match end.next % all {
            at if at + blocks > all => end.next.next_multiple_of(all),
            _ => end.next,
        };
        (number + blocks <= end.pointer.first + all).then_some(number)
    }

    /// Number of the next record: a flush that begins now covers the appends of all before it.
    pub(super) async fn next(&self) -> u64 {
        self.end.lock().await.next
    }

    /// A flush has covered all appends of records before `first`: their room may be used again.
    pub(super) async fn covered(&self, first: u64) -> Result<()> {
        let mut end = self.end.lock().await;
        self.move_to(&mut end, first).await
    }

    async fn flush(&self, end: &mut End) -> Result<()> {
        self.device.flush().await?;
        self.move_to(end, end.next).await
    }

    /// Has the journal begin at `first`, unless it begins further on.
    async fn move_to(&self, end: &mut End, first: u64) -> Result<()> {
        if first <= end.pointer.first {
            return Ok(());
        }
        self.point(end, first, end.pointer.salt).await
    }

    async fn point(&self, end: &mut End, first: u64, salt: u64) -> Result<()> {
        let pointer = Pointer { turn: end.pointer.turn + 1, salt, first };
        let bytes = pointer.encode(self.store);
        // As for a record.
        end.pointer.turn = pointer.turn;
        self.device.write(self.region.at + pointer.at(), bytes, Durability::Stable).await?;
        end.pointer = pointer;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
