//! A member of an array: a device, the superblock that makes it one, its state, and its error counters.
//!
//! | state | written | read | flushed |
//! |---|---|---|---|
//! | in sync | yes | yes | yes |
//! | rebuilding | yes | below [`Member::recovered`] | yes |
//! | spare | metadata only | no | no |
//! | faulty | no | no | no |
//!
//! Invariants: a member that has become faulty never comes back as this object; its device returns as a new member.
//! Whoever wants to take one out asks `volume` first, because the last copy of anything stays. Ranges of its data area
//! that are listed as bad are never read.

use crate::badblocks;
use crate::bitmap::BitmapError;
use crate::device::{Device, buffer};
use crate::error::{Error, Result};
use crate::geometry::{MemberOffset, Slot};
use crate::load::Load;
use crate::range_set::RangeSet;
use crate::record::{self, RECORD_BYTES, RECORDS_BYTES, Record};
use crate::superblock::{Recovery, Role, SECTOR, SUPER_BYTES, SUPER_OFFSET, Superblock, SuperblockError};
use crate::unread::Unread;
use bytes::BytesMut;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};

/// How a member takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It holds good data everywhere (but for bad blocks).
    InSync,
    /// It is being filled.
    Rebuilding,
    /// It waits for a slot.
    Spare,
    /// It is out.
    Faulty,
}

const STATES: [State; 4] = [State::InSync, State::Rebuilding, State::Spare, State::Faulty];
const NO_SLOT: usize = usize::MAX;

/// Ranges of the data area, in bytes.
#[derive(Debug, Default)]
struct Bad {
    /// They hold no good data.
    listed: RangeSet,
    /// Listed, and written well since.
    healed: RangeSet,
    /// The same, and a flush that covers them is under way.
    flushing: RangeSet,
}

/// A device that takes part in an array.
pub struct Member {
    /// The device.
    pub device: Arc<dyn Device>,
    /// Its superblock as it was read or made; what changes in the life of the array is kept by the volume.
    pub superblock: Superblock,
    /// Where its records lie, if it has any.
    pub records: Option<u64>,
    slot: AtomicUsize,
    /// Sectors of its data area: the superblock's, until the array grows.
    data_size: AtomicU64,
    state: AtomicU8,
    /// Bytes of the data area, from its start, that hold good data while it is rebuilding.
    recovered: AtomicU64,
    /// How much of `recovered` was durable when the target was last flushed.
    checkpoint: AtomicU64,
    /// Whether the rebuild needs to look at dirty regions only.
    by_bitmap: AtomicBool,
    bad: Mutex<Bad>,
    has_bad: AtomicBool,
    /// Counts changes of what is listed as bad.
    bad_version: AtomicU64,
    read_errors: AtomicU64,
    corrected: AtomicU64,
    /// How busy it is, and how fast it answers.
    pub(crate) load: Load,
    /// What was written to it that others are read for.
    pub(crate) unread: Unread,
}

impl Member {
    /// Takes a device in as what its superblock says it is: in sync or rebuilding in `slot`, or a spare without one.
    /// Reads its bad-block log where it has one; `found` is what its records say.
    pub async fn join(
        device: Arc<dyn Device>,
        superblock: Superblock,
        slot: Option<Slot>,
        found: &Records,
    ) -> Result<Self> {
        let (logged, record) = (Self::bad_blocks(device.as_ref(), &superblock).await, &found.current);
        // A log that a power cut has torn may lack some, or cannot be read at all: the record has them, too.
        let mut bad = match (&logged, record) {
            (Ok(logged), _) => logged.clone(),
            (Err(_), Some(_)) => RangeSet::default(),
            (Err(failure), None) => return Err(failure.clone()),
        };
        bad.extend(record.iter().flat_map(|record| record.bad.iter()));
        let changes = u64::from(!logged.is_ok_and(|logged| logged == bad));
        let state = match (slot, superblock.recovery) {
            (None, _) => State::Spare,
            (Some(_), Some(_)) => State::Rebuilding,
            // Filled to the end, but it has not taken over yet.
            (Some(_), None) if superblock.replacement => State::Rebuilding,
            (Some(_), None) => State::InSync,
        };
        let member = Self::new(device, superblock, state, found.at);
        member.slot.store(slot.map_or(NO_SLOT, |slot| slot.0), Ordering::Release);
        member.has_bad.store(!bad.is_empty(), Ordering::Release);
        member.bad_version.store(changes, Ordering::Release);
        member.bad.lock().listed = bad;
        Ok(member)
    }

    /// A member whose metadata is known, without a slot.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, superblock: Superblock, state: State, records: Option<u64>) -> Self {
        let filled = if superblock.replacement { superblock.size } else { 0 };
        let recovery = superblock.recovery.unwrap_or(Recovery { offset: filled, by_bitmap: false });
        let from = recovery.offset.saturating_mul(SECTOR);
        let corrected = AtomicU64::new(u64::from(superblock.corrected));
        let data_size = AtomicU64::new(superblock.data_size);
        Self {
            device,
            superblock,
            records,
            slot: AtomicUsize::new(NO_SLOT),
            data_size,
            state: AtomicU8::new(state as u8),
            recovered: AtomicU64::new(from),
            checkpoint: AtomicU64::new(from),
            by_bitmap: AtomicBool::new(recovery.by_bitmap),
            bad: Mutex::default(),
            has_bad: AtomicBool::new(false),
            bad_version: AtomicU64::new(0),
            read_errors: AtomicU64::new(0),
            corrected,
            load: Load::default(),
            unread: Unread::default(),
        }
    }

    /// Reads a device's bad-block log, where it has entries: ranges of its data area.
    pub async fn bad_blocks(device: &dyn Device, superblock: &Superblock) -> Result<RangeSet> {
        let Some((start, len)) = superblock.bad_blocks_in_use() else { return Ok(RangeSet::default()) };
        let log = device.read(start, buffer(len)).await?;
        let shift = superblock.bad_block_log.map_or(0, |log| log.shift);
        Ok(badblocks::decode(&log, shift, superblock.data_start()))
    }

    /// Its number in the role table.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.superblock.dev_number
    }

    /// Its place in the array, if it has one.
    #[must_use]
    pub fn slot(&self) -> Option<Slot> {
        Some(self.slot.load(Ordering::Acquire)).filter(|&slot| slot != NO_SLOT).map(Slot)
    }

    /// Sectors of its data area.
    #[must_use]
    pub(crate) fn data_size(&self) -> u64 {
        self.data_size.load(Ordering::Acquire)
    }

    /// Its device has become larger, and the array uses that.
    pub(crate) fn set_data_size(&self, sectors: u64) {
        self.data_size.store(sectors, Ordering::Release);
    }

    /// How it takes part.
    #[must_use]
    pub fn state(&self) -> State {
        STATES[usize::from(self.state.load(Ordering::Acquire))]
    }

    /// Whether it is read everywhere.
    #[must_use]
    pub fn is_in_sync(&self) -> bool {
        self.state() == State::InSync
    }

    /// Whether it is written.
    #[must_use]
    pub fn is_written(&self) -> bool {
        matches!(self.state(), State::InSync | State::Rebuilding)
    }

    /// Whether it is out.
    #[must_use]
    pub fn is_faulty(&self) -> bool {
        self.state() == State::Faulty
    }

    /// Takes it out for good.
    pub(crate) fn expel(&self) {
        self.state.store(State::Faulty as u8, Ordering::Release);
    }

    /// Gives a member without a slot one, to be filled from its start.
    pub(crate) fn take_slot(&self, slot: Slot, by_bitmap: bool) {
        self.slot.store(slot.0, Ordering::Release);
        self.recovered.store(0, Ordering::Release);
        self.checkpoint.store(0, Ordering::Release);
        self.by_bitmap.store(by_bitmap, Ordering::Release);
        self.state.store(State::Rebuilding as u8, Ordering::Release);
    }

    /// It has been filled: from now on it counts. Only a rebuilding member becomes in sync.
    #[must_use]
    pub(crate) fn complete(&self) -> bool {
        let (from, to) = (State::Rebuilding as u8, State::InSync as u8);
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Bytes of the data area that hold good data while it is rebuilding.
    #[must_use]
    pub fn recovered(&self) -> u64 {
        self.recovered.load(Ordering::Acquire)
    }

    /// Moves the border of what may be read.
    pub(crate) fn set_recovered(&self, bytes: u64) {
        self.recovered.store(bytes, Ordering::Release);
    }

    /// The part of `recovered` that is durable.
    #[must_use]
    pub(crate) fn checkpoint(&self) -> u64 {
        self.checkpoint.load(Ordering::Acquire)
    }

    /// Notes that everything below `bytes` has been flushed.
    pub(crate) fn set_checkpoint(&self, bytes: u64) {
        self.checkpoint.store(bytes, Ordering::Release);
    }

    /// Whether its rebuild looks at dirty regions only.
    #[must_use]
    pub(crate) fn is_by_bitmap(&self) -> bool {
        self.by_bitmap.load(Ordering::Acquire)
    }

    /// What the role table says of it.
    #[must_use]
    pub(crate) fn role(&self) -> Role {
        match (self.state(), self.slot()) {
            (State::InSync | State::Rebuilding, Some(slot)) => Role::Active(slot),
            (State::Spare, _) => Role::Spare,
            _ => Role::Faulty,
        }
    }

    /// Whether the range of its data area may be read.
    #[must_use]
    pub fn is_readable(&self, at: MemberOffset, len: u64) -> bool {
        let filled = match self.state() {
            State::InSync => true,
            State::Rebuilding => at.0 + len <= self.recovered(),
            State::Spare | State::Faulty => false,
        };
        filled && !self.is_bad(at, len)
    }

    /// Whether any of the range is listed as bad.
    #[must_use]
    pub fn is_bad(&self, at: MemberOffset, len: u64) -> bool {
        self.has_bad() && self.bad.lock().listed.intersects(&(at.0..at.0 + len))
    }

    /// Whether anything is listed as bad.
    #[must_use]
    pub fn has_bad(&self) -> bool {
        self.has_bad.load(Ordering::Acquire)
    }

    /// Lists a range as bad, where the member has a list. From here on it is not read.
    #[must_use]
    pub(crate) fn note_bad(&self, range: Range<u64>) -> bool {
        if self.superblock.bad_block_log.is_none() {
            return false;
        }
        let mut bad = self.bad.lock();
        bad.healed.remove(&range);
        bad.flushing.remove(&range);
        bad.listed.insert(range);
        self.has_bad.store(true, Ordering::Release);
        self.bad_version.fetch_add(1, Ordering::AcqRel);
        true
    }

    /// A range has been written well. What of it is listed as bad stays so until that is durable.
    pub(crate) fn note_written(&self, range: &Range<u64>) {
        if self.has_bad() {
            let mut bad = self.bad.lock();
            for healed in bad.listed.within(range) {
                bad.healed.insert(healed);
            }
        }
    }

    /// Begins to clear what was written well: the caller flushes the member next. Returns whether there is anything.
    pub(crate) fn begin_clearing(&self) -> bool {
        if !self.has_bad() {
            return false;
        }
        let mut bad = self.bad.lock();
        bad.flushing = std::mem::take(&mut bad.healed);
        !bad.flushing.is_empty()
    }

    /// The flush after [`Member::begin_clearing`] has been done: what was written well before it is good.
    pub(crate) fn clear_flushed(&self) {
        let mut bad = self.bad.lock();
        for range in std::mem::take(&mut bad.flushing).iter() {
            bad.listed.remove(&range);
        }
        self.has_bad.store(!bad.listed.is_empty(), Ordering::Release);
        self.bad_version.fetch_add(1, Ordering::AcqRel);
    }

    /// What is listed as bad, and which change of the list that is.
    #[must_use]
    pub(crate) fn listed(&self) -> (RangeSet, u64) {
        let bad = self.bad.lock();
        (bad.listed.clone(), self.bad_version())
    }

    /// Counts changes of what is listed as bad.
    #[must_use]
    pub(crate) fn bad_version(&self) -> u64 {
        self.bad_version.load(Ordering::Acquire)
    }

    /// The position on the device of a position in the data area.
    #[must_use]
    pub fn position(&self, at: MemberOffset) -> u64 {
        self.superblock.data_start() + at.0
    }

    /// Counts a failed read.
    pub fn count_read_error(&self) {
        self.read_errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a read error that was made good.
    pub fn count_corrected(&self) {
        self.corrected.fetch_add(1, Ordering::Relaxed);
    }

    /// Failed reads, and those made good.
    #[must_use]
    pub fn counters(&self) -> (u64, u64) {
        (self.read_errors.load(Ordering::Relaxed), self.corrected.load(Ordering::Relaxed))
    }
}
/// Reads and decodes a device's superblock.
pub async fn read_superblock(device: &dyn Device) -> Result<Superblock> {
    Ok(read_superblock_bytes(device).await?.0)
}

/// The same, with its bytes.
pub async fn read_superblock_bytes(device: &dyn Device) -> Result<(Superblock, Box<[u8; SUPER_BYTES]>)> {
    let refused = |cause| Error::Superblock { device: device.name().to_owned(), cause };
    if device.size() < SUPER_OFFSET + SUPER_BYTES as u64 {
        return Err(refused(SuperblockError::Short));
    }
    let found = device.read(SUPER_OFFSET, buffer(SUPER_BYTES)).await?;
    let mut bytes = Box::new([0; SUPER_BYTES]);
    bytes.copy_from_slice(&found);
    let superblock = Superblock::decode(&bytes[..], device.size()).map_err(refused)?;
    Ok((superblock, bytes))
}

/// What a device's two records say.
#[derive(Debug, Default)]
pub struct Records {
    /// Where they lie; `None` if there are none.
    pub at: Option<u64>,
    /// The one that belongs to the superblock beside it; `None` if another program has written that since.
    pub current: Option<Record>,
    /// The highest sequence number of the two.
    pub sequence: u64,
}

/// Reads the records beside a superblock that is whole.
pub async fn read_records(device: &dyn Device, superblock: &Superblock, bytes: &[u8]) -> Records {
    let Some(at) = superblock.records_start() else { return Records::default() };
    let (a, b) = (
        read_or_zeroes(device, at, RECORD_BYTES),
        read_or_zeroes(device, at + RECORD_BYTES as u64, RECORD_BYTES),
    );
    let (a, b) = (a.await, b.await);
    let Some(newest) = record::newest(&a, &b) else { return Records::default() };
    let sequence = newest.sequence;
    Records { at: Some(at), current: record::matching(&a, &b, bytes), sequence }
}

/// What cannot be read counts as zeroes: for records as good as none, and then md's own rules judge the member.
async fn read_or_zeroes(device: &dyn Device, at: u64, len: usize) -> BytesMut {
    device.read(at, buffer(len)).await.unwrap_or_else(|_| BytesMut::zeroed(len))
}

/// How far into a device records are looked for where there is no superblock to say where they lie.
const SEARCHED: u64 = 1 << 20;

/// Looks for the records of a device whose superblock is damaged: the newest one has what was being written.
pub async fn search_records(device: &dyn Device) -> Option<(Superblock, Records)> {
    let len = SEARCHED.min(device.size() / SUPER_BYTES as u64 * SUPER_BYTES as u64);
    // A superblock of zeroes was not torn: somebody has wiped it, and meant it.
    let found = device.read(SUPER_OFFSET, buffer(SUPER_BYTES)).await;
    if found.is_ok_and(|bytes| bytes.iter().all(|&byte| byte == 0)) {
        return None;
    }
    let mut head = BytesMut::with_capacity(len as usize);
    for at in (0..len).step_by(SUPER_BYTES) {
        head.extend_from_slice(&read_or_zeroes(device, at, SUPER_BYTES).await);
    }
    let pages = (0..(len + 1).saturating_sub(RECORDS_BYTES)).step_by(SUPER_BYTES);
    for at in pages {
        let found = &head[at as usize..(at + RECORDS_BYTES) as usize];
        let (a, b) = found.split_at(RECORD_BYTES);
        let Some(newest) = record::newest(a, b) else { continue };
        let Ok(superblock) = Superblock::decode(&newest.superblock[..], device.size()) else { continue };
        // A record B alone looks like a record A at its place; and what was copied from elsewhere does not fit.
        if superblock.records_start() == Some(at) {
            let sequence = newest.sequence;
            return Some((superblock, Records { at: Some(at), current: Some(newest), sequence }));
        }
    }
    None
}

/// Reads a member's whole bitmap, header included, for an array of `size` bytes; `None` where the array has none.
pub async fn read_bitmap(
    device: &dyn Device,
    superblock: &Superblock,
    size: u64,
) -> Result<Option<(crate::bitmap::BitmapHeader, Vec<u8>)>> {
    use crate::bitmap::{BitmapHeader, PAGE};
    let Some(start) = superblock.bitmap_start() else { return Ok(None) };
    let refused = |cause| Error::Bitmap { device: device.name().to_owned(), cause };
    let room = superblock.bitmap_room();
    if room < PAGE as u64 {
        return Err(refused(BitmapError::TooLarge(0)));
    }
    let page = device.read(start, buffer(PAGE)).await?;
    let header = BitmapHeader::decode(&page, superblock.array, size, room).map_err(refused)?;
    let mut bytes = page.to_vec();
    let rest = header.bytes() - PAGE;
    if rest > 0 {
        bytes.extend_from_slice(&device.read(start + PAGE as u64, buffer(rest)).await?);
    }
    Ok(Some((header, bytes)))
}
