//! A member of an array: a device, the superblock that makes it one, its state, and its error counters.
//!
//! Invariants: a member that has left `InSync` never comes back in this process; whoever wants to take
//! it out asks `volume` first, because the last copy of anything stays.

use crate::backup::{self, BACKUP_BYTES};
use crate::badblocks;
use crate::bitmap::BitmapError;
use crate::device::{Device, buffer};
use crate::error::{Error, Result};
use crate::geometry::{MemberOffset, Slot};
use crate::range_set::RangeSet;
use crate::superblock::{SUPER_BYTES, SUPER_OFFSET, Superblock, SuperblockError};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A device that holds a slot of an array.
pub struct Member {
    /// Its place in the array.
    pub slot: Slot,
    /// The device.
    pub device: Arc<dyn Device>,
    /// Its superblock as it was read; what changes in the life of the array is kept by the volume.
    pub superblock: Superblock,
    /// Ranges of the data area that hold no good data.
    bad: RangeSet,
    /// Where its second copy of the superblock lies, if it has one.
    pub backup: Option<u64>,
    in_sync: AtomicBool,
    read_errors: AtomicU64,
    corrected: AtomicU64,
}

impl Member {
    /// Takes a device into its slot; reads its bad-block log where it has one.
    pub async fn join(device: Arc<dyn Device>, superblock: Superblock, slot: Slot) -> Result<Self> {
        let bad = Self::bad_blocks(device.as_ref(), &superblock).await?;
        let backup = match read_backup(device.as_ref(), &superblock).await {
            Some(copy) if copy.device == superblock.device => superblock.backup_start(),
            _ => None,
        };
        let corrected = AtomicU64::new(u64::from(superblock.corrected));
        let (in_sync, read_errors) = (AtomicBool::new(true), AtomicU64::new(0));
        Ok(Self { slot, device, superblock, bad, backup, in_sync, read_errors, corrected })
    }

    /// Reads a device's bad-block log, where it has entries: ranges of its data area.
    pub async fn bad_blocks(device: &dyn Device, superblock: &Superblock) -> Result<RangeSet> {
        let Some((start, len)) = superblock.bad_blocks_in_use() else { return Ok(RangeSet::default()) };
        let log = device.read(start, buffer(len)).await?;
        let shift = superblock.bad_block_log.map_or(0, |log| log.shift);
        Ok(badblocks::decode(&log, shift, superblock.data_start()))
    }

    /// Whether it is read and written.
    #[must_use]
    pub fn is_in_sync(&self) -> bool {
        self.in_sync.load(Ordering::Acquire)
    }

    /// Takes it out for good.
    pub fn expel(&self) {
        self.in_sync.store(false, Ordering::Release);
    }

    /// Whether the range of its data area may be read.
    #[must_use]
    pub fn is_readable(&self, at: MemberOffset, len: u64) -> bool {
        self.is_in_sync() && !self.bad.intersects(&(at.0..at.0 + len))
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
    let refused = |cause| Error::Superblock { device: device.name().to_owned(), cause };
    if device.size() < SUPER_OFFSET + SUPER_BYTES as u64 {
        return Err(refused(SuperblockError::Short));
    }
    let bytes = device.read(SUPER_OFFSET, buffer(SUPER_BYTES)).await?;
    Superblock::decode(&bytes, device.size()).map_err(refused)
}

/// Reads a device's second copy of the superblock, from where it lies on members like `like`.
pub async fn read_backup(device: &dyn Device, like: &Superblock) -> Option<Superblock> {
    let at = like.backup_start()?;
    let bytes = device.read(at, buffer(BACKUP_BYTES)).await.ok()?;
    backup::decode(&bytes, device.size())?.ok().filter(|copy| copy.array == like.array)
}

/// Reads a member's whole bitmap, header included; `None` where the array has none.
pub async fn read_bitmap(
    device: &dyn Device,
    superblock: &Superblock,
) -> Result<Option<(crate::bitmap::BitmapHeader, Vec<u8>)>> {
    use crate::bitmap::{BitmapHeader, PAGE};
    let Some(start) = superblock.bitmap_start() else { return Ok(None) };
    let refused = |cause| Error::Bitmap { device: device.name().to_owned(), cause };
    let size = superblock.geometry().map_err(|cause| Error::Superblock {
        device: device.name().to_owned(),
        cause: SuperblockError::Geometry(cause),
    })?;
    let room = superblock.bitmap_room();
    if room < PAGE as u64 {
        return Err(refused(BitmapError::TooLarge(0)));
    }
    let page = device.read(start, buffer(PAGE)).await?;
    let header = BitmapHeader::decode(&page, superblock.array, size.size(), room).map_err(refused)?;
    let mut bytes = page.to_vec();
    let rest = header.bytes() - PAGE;
    if rest > 0 {
        bytes.extend_from_slice(&device.read(start + PAGE as u64, buffer(rest)).await?);
    }
    Ok(Some((header, bytes)))
}
