//! The journal of a volume: small appends to many partitions become durable by one write.
//!
//! Without it a commit flushes all members, and each place that was appended to since the last one is a write of its own to a
//! disk: sixty-four small appends to as many partitions cost it as much as sixty-four. So what is appended is also gathered
//! here, and a commit writes what was gathered as one record, stably. The appends themselves reach the disks later, many of one
//! partition at once, with a flush that nobody waits for. Those that somebody waits to have committed are not even written to
//! their places before that, unless somebody wants to read them (`unplaced`).
//!
//! Which way a commit takes: the record, if all that was written since the last commit was small appends, and few enough of
//! them; a flush of everything else, which no record can stand for. A volume in memory has no use for it.
//!
//! Invariants:
//! - An append is gathered after it was written to its place, or is known to be brought there. So when the next record would be
//!   `n`, whoever places all and then flushes has made durable all appends of records before `n`; after that the pointer says
//!   `n`, and only when *that* is durable their room is used again.
//! - Records follow each other: one that does not fit before the region's end begins at its beginning, and the next starts
//!   where the last one ended. None is written before the one before it is durable, so one that the power was cut in is the
//!   last, and was never acknowledged.
//! - A record names segments, not places of the volume, and a start writes its appends only to segments that the catalog knows
//!   as open. What was closed was flushed first, what is gone is in no table; a segment's name is never used again.
//! - A start replays before anything is read, flushes, and begins a new life: from then on no record of an earlier one counts.
//!   A power cut before that has the next start do the same again.
//!
//! What is not sound here in one copy is looked for in the others, and mended. A record that has rotted in all of them is told
//! of and passed over, if others follow: its appends are in their places if a flush or a reader brought them there. If it was the last one, nothing tells it from
//! one that the power was cut in. One that cannot be read, and that others follow, has the store not open: it may be read the
//! next time.
//!
//! Cost: for an append one copy and two short locks; for a commit one stable write, a system call for each leg of it. A start
//! after a stop in order reads the pointers, any other one the whole journal. Memory: a record, while it is gathered; at a
//! start twice as much as the journal holds at most.

mod record;
mod unplaced;

use super::copies::Versions;
use super::extent::Extent;
use crate::catalog::records::SegmentKey;
use crate::error::{Error, Result};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use raid::device::{Device, Durability};
use record::{BLOCK, LONGEST, Name, Pointer};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use uuid::Uuid;

pub(super) use unplaced::Unplaced;

/// Longest append that is gathered: a longer one costs a disk more by its bytes than by its place.
const SMALL: usize = 32 << 10;
/// Share of a volume that the journal takes, and its bounds in bytes: the more fit, the more of a partition's appends are
/// written to their place at once. At a thousand partitions of 1 KiB appends, commits in a second with 32, 64 and 128 MiB were
/// 0.7, 0.85 and 0.9 of those at ten. More than that takes memory and a start's time for little.
const SHARE: u64 = 64;
const LEAST: u64 = 128 << 10;
const MOST: u64 = 128 << 20;
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
        if data.is_empty() {
            return;
        }
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
    /// Places before its last record where there must have been others.
    pub(crate) gaps: u64,
    pub(crate) segments: Segments,
}

/// Blocks for records in a region.
fn count(region: Extent) -> u64 {
    (region.len - POINTERS) / BLOCK
}

fn place(region: Extent, number: u64) -> u64 {
    region.at + POINTERS + number % count(region) * BLOCK
}

/// The number of the record that follows at `next`, if it has so many blocks.
fn following(region: Extent, next: u64, blocks: u64) -> u64 {
    let all = count(region);
    if next % all + blocks > all { next.next_multiple_of(all) } else { next }
}

/// Where the journal lies, and how it is read.
struct Reader<'a> {
    device: &'a Arc<dyn Device>,
    region: Extent,
    store: Uuid,
    /// Whether what is sound in some copies only is made the content of all.
    mends: bool,
}

/// What blocks say of records, unchecked: the lengths that a number has in some copy.
struct Heads {
    lengths: BTreeMap<u64, BTreeSet<usize>>,
    /// Blocks that no copy answers, and why.
    unreadable: Vec<(u64, Error)>,
}

impl Reader<'_> {
    /// The sound pointers in the two places for them.
    async fn pointers(&self) -> Result<[Option<Pointer>; 2]> {
        let (mut found, mut failure) = ([None; 2], None);
        for (slot, found) in found.iter_mut().enumerate() {
            let at = self.region.at + slot as u64 * BLOCK;
            let versions = match Versions::read(self.device, at, BLOCK).await {
                Ok(versions) => versions,
                Err(error) => {
                    failure = Some(error);
                    continue;
                }
            };
            let turn = |content: &[u8]| Pointer::decode(content, self.store).map(|pointer| pointer.turn);
            let Some(good) = versions.best(turn) else { continue };
            if self.mends {
                versions.mend(self.device, &good, "the journal").await?;
            }
            *found = Pointer::decode(&good, self.store);
        }
        match failure {
            Some(error) if found.iter().all(Option::is_none) => Err(error),
            _ => Ok(found),
        }
    }

    /// What all blocks say of records that count by `pointer`.
    async fn heads(&self, pointer: Pointer) -> Heads {
        let mut heads = Heads { lengths: BTreeMap::new(), unreadable: Vec::new() };
        let (all, at_once) = (count(self.region), LONGEST as u64 / BLOCK);
        let mut at = 0;
        while at < all {
            let run = (all - at).min(at_once);
            if self.heads_of(pointer, at, run, &mut heads).await.is_err() {
                for one in at..at + run {
                    if let Err(error) = self.heads_of(pointer, one, 1, &mut heads).await {
                        heads.unreadable.push((one, error));
                    }
                }
            }
            at += run;
        }
        heads
    }

    async fn heads_of(&self, pointer: Pointer, at: u64, run: u64, heads: &mut Heads) -> Result<()> {
        let content = Versions::read(self.device, place(self.region, at), run * BLOCK).await?;
        let all = count(self.region);
        for (block, from) in (at..at + run).zip((0..).step_by(BLOCK as usize)) {
            for copy in content.block(from) {
                let Some((len, name)) = record::head(&copy, self.store) else { continue };
                // Two laps: one of two pointers may be a lap behind.
                let is_live = name.salt == pointer.salt
                    && (pointer.first..pointer.first + 2 * all).contains(&name.number);
                if is_live && name.number % all == block {
                    heads.lengths.entry(name.number).or_default().insert(len);
                }
            }
        }
        Ok(())
    }

    /// A sound record with this number and length. What cannot be read is not sound.
    async fn record(&self, number: u64, salt: u64, len: usize) -> Result<Option<Bytes>> {
        let blocks = (len as u64).div_ceil(BLOCK);
        if number % count(self.region) + blocks > count(self.region) {
            return Ok(None);
        }
        let Ok(versions) = Versions::read(self.device, place(self.region, number), blocks * BLOCK).await
        else {
            return Ok(None);
        };
        let wanted = (len, Name { store: self.store, salt, number });
        let Some(good) = versions.best(|content| {
            let is_it = record::check(content, self.store) == Some(wanted);
            is_it.then_some(0)
        }) else {
            return Ok(None);
        };
        if self.mends {
            versions.mend(self.device, &good, "the journal").await?;
        }
        Ok(Some(good))
    }
}

impl Found {
    /// Reads the journal in `region`, and makes what is sound in some copies the content of all if `mends`. An error says that
    /// a record that must have been there cannot be read now: nothing is given up for that.
    pub(crate) async fn read(
        device: &Arc<dyn Device>,
        region: Extent,
        store: Uuid,
        mends: bool,
    ) -> Result<Self> {
        let reader = Reader { device, region, store, mends };
        let pointers = reader.pointers().await?;
        let Some(pointer) = pointers.iter().flatten().copied().max_by_key(|pointer| pointer.turn) else {
            let reason = "neither pointer of its journal is sound in any copy".to_owned();
            return Err(Error::DamagedHeader { place: device.name().to_owned(), reason });
        };
        let mut found =
            Self { pointer, end: pointer.first, appends: 0, gaps: 0, segments: Segments::default() };
        if pointer.closed && pointers.iter().all(Option::is_some) {
            return Ok(found);
        }
        let Heads { lengths, mut unreadable } = reader.heads(pointer).await;
        // Records before it are known to follow each other only if this pointer is the last that was written.
        let mut is_first = pointers.iter().any(Option::is_none);
        for (number, lengths) in lengths {
            if number < found.end {
                // Within another one.
                continue;
            }
            for len in lengths {
                let Some(record) = reader.record(number, pointer.salt, len).await? else { continue };
                let blocks = (len as u64).div_ceil(BLOCK);
                if !std::mem::take(&mut is_first) && following(region, found.end, blocks) != number {
                    let between = |(block, _): &(u64, Error)| {
                        let all = count(region);
                        let nearest = found.end + (block + all - found.end % all) % all;
                        nearest < number
                    };
                    if let Some(at) = unreadable.iter().position(between) {
                        return Err(unreadable.swap_remove(at).1);
                    }
                    found.gaps += 1;
                }
                match record::replay(&record, len, &mut found.segments) {
                    Some(appends) => found.appends += appends,
                    None => found.gaps += 1,
                }
                found.end = number + blocks;
                break;
            }
        }
        Ok(found)
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
    /// Of what segments something is not in its place.
    unplaced: Mutex<Vec<Arc<Unplaced>>>,
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
            let pointer = Pointer { turn, salt: 0, first: 0, closed: true };
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
        let pointer = Pointer { closed: false, ..pointer };
        // What an earlier start has written, nobody here has flushed.
        let gathered = Gathered { record: None, appends: 0, beside: true, last: 0 };
        let journal = Self {
            device,
            region,
            store,
            gathered: Mutex::new(gathered),
            unplaced: Mutex::default(),
            end: tokio::sync::Mutex::new(End { pointer, next: end }),
        };
        // Both pointers: if one rots, the other one knows as much.
        for _ in 0..2 {
            journal.point(&mut *journal.end.lock().await, Pointer { salt, first: end, ..pointer }).await?;
        }
        Ok(journal)
    }

    /// Whether an append of so many bytes would be gathered now.
    pub(super) fn takes(&self, len: usize) -> bool {
        len <= SMALL && !self.gathered.lock().beside
    }

    /// Takes note of an append at `at` of a segment, which is in its place or kept until it is there. Whether the next commit
    /// can go without a flush for its sake.
    pub(super) fn gather(&self, key: &SegmentKey, at: u64, data: &[u8]) -> bool {
        let mut gathered = self.gathered.lock();
        if gathered.beside {
            return false;
        }
        let len = gathered.record.as_ref().map_or(record::HEAD, BytesMut::len);
        if data.len() > SMALL || len + record::taken_by(data.len()) > LONGEST {
            (gathered.beside, gathered.record, gathered.appends) = (true, None, 0);
            return false;
        }
        let last = gathered.last;
        record::push(gathered.record.get_or_insert_with(|| record::begin(last)), key, at, data);
        gathered.appends += 1;
        true
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
        let number = following(self.region, end.next, blocks);
        (number + blocks <= end.pointer.first + count(self.region)).then_some(number)
    }

    /// Number of the next record: what places all and flushes from now on covers the appends of all before it.
    pub(super) async fn next(&self) -> u64 {
        self.end.lock().await.next
    }

    /// All appends of records before `first` are in their places, durably: their room may be used again.
    pub(super) async fn covered(&self, first: u64) -> Result<()> {
        let mut end = self.end.lock().await;
        self.move_to(&mut end, first).await
    }

    async fn flush(&self, end: &mut End) -> Result<()> {
        self.place_all().await?;
        self.device.flush().await?;
        self.move_to(end, end.next).await
    }

    /// Has the journal begin at `first`, unless it begins further on.
    async fn move_to(&self, end: &mut End, first: u64) -> Result<()> {
        if first <= end.pointer.first {
            return Ok(());
        }
        self.point(end, Pointer { first, ..end.pointer }).await
    }

    /// Brings all to its place. Nothing is appended any more.
    pub(super) async fn close(&self) -> Result<()> {
        let mut end = self.end.lock().await;
        self.place_all().await?;
        self.device.flush().await?;
        let pointer = Pointer { first: end.next, closed: true, ..end.pointer };
        // Both, as in the beginning.
        self.point(&mut end, pointer).await?;
        self.point(&mut end, pointer).await
    }

    /// Writes this pointer, but for its turn.
    async fn point(&self, end: &mut End, pointer: Pointer) -> Result<()> {
        let pointer = Pointer { turn: end.pointer.turn + 1, ..pointer };
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
