//! What a member says of itself and its array, offline: the document of `raid10 examine --json`.

use crate::bitmap::{BitmapHeader, Intent};
use crate::device::Device;
use crate::error::Result;
use crate::member::{read_bitmap, read_superblock};
use crate::superblock::{Role, SECTOR, Superblock};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What was found on one device. Sizes and positions in bytes, times in seconds since the epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examined {
    /// Where it was opened.
    pub path: String,
    /// The array's identity.
    pub uuid: Uuid,
    /// The array's name.
    pub name: String,
    /// This member's identity.
    pub device_uuid: Uuid,
    /// How copies are laid out, such as `near=2`.
    pub layout: String,
    /// Bytes a chunk.
    pub chunk: u64,
    /// Bytes the array holds.
    pub size: u64,
    /// Members of the array.
    pub members: usize,
    /// This member's number in the role table.
    pub number: u32,
    /// What this member is: a slot, or `spare`, `faulty`, `journal`.
    pub role: String,
    /// Its slot, where it has one.
    pub slot: Option<usize>,
    /// A letter a slot: `A` in sync, `.` missing, as this member last knew.
    pub slots: String,
    /// Whether the array was stopped cleanly.
    pub clean: bool,
    /// Counts superblock changes.
    pub events: u64,
    /// When the array was made.
    pub created: u64,
    /// When the superblock was last written.
    pub updated: u64,
    /// Where the data area starts.
    pub data_offset: u64,
    /// Bytes of the data area that the array uses.
    pub used: u64,
    /// The write-intent bitmap, where the array has one.
    pub bitmap: Option<ExaminedBitmap>,
    /// Bytes of the device listed in the bad-block log.
    pub bad_blocks: u64,
}

/// A bitmap as it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExaminedBitmap {
    /// Bytes a region.
    pub chunk: u64,
    /// Regions in all.
    pub regions: u64,
    /// Regions that are marked dirty.
    pub dirty: u64,
    /// The event count it was last written at.
    pub events: u64,
    /// The event count at which bits were last cleared.
    pub events_cleared: u64,
}

/// Reads a member's superblock, bitmap and bad-block log.
pub async fn examine(device: &dyn Device) -> Result<Examined> {
    let superblock = read_superblock(device).await?;
    let bitmap = read_bitmap(device, &superblock, array_bytes(&superblock)).await?;
    let bitmap = bitmap.map(|(header, bytes)| count(header, &bytes));
    let member = crate::member::Member::bad_blocks(device, &superblock).await?;
    let bad_blocks = member.len();
    Ok(describe(device, &superblock, bitmap, bad_blocks))
}

fn array_bytes(superblock: &Superblock) -> u64 {
    // It was checked when the superblock was decoded.
    superblock.geometry().map_or(0, |geometry| geometry.size())
}

fn count(header: BitmapHeader, bytes: &[u8]) -> ExaminedBitmap {
    let (chunk, regions) = (header.region, header.regions());
    let (events, events_cleared) = (header.events, header.events_cleared);
    let mut intent = Intent::new(header, false);
    intent.merge(bytes, true);
    ExaminedBitmap { chunk, regions, dirty: intent.dirty(), events, events_cleared }
}

fn describe(
    device: &dyn Device,
    superblock: &Superblock,
    bitmap: Option<ExaminedBitmap>,
    bad_blocks: u64,
) -> Examined {
    let seconds = |stamp: u64| stamp & ((1 << 40) - 1);
    let (role, slot) = match superblock.own_role() {
        Role::Active(slot) => (format!("slot {}", slot.0), Some(slot.0)),
        Role::Faulty => ("faulty".to_owned(), None),
        Role::Spare => ("spare".to_owned(), None),
        Role::Journal => ("journal".to_owned(), None),
    };
    let slots = (0..superblock.raid_disks as usize)
        .map(|slot| {
            let held = superblock.roles.iter().any(|role| matches!(role, Role::Active(s) if s.0 == slot));
            if held { 'A' } else { '.' }
        })
        .collect();
    Examined {
        path: device.name().to_owned(),
        uuid: superblock.array,
        name: superblock.name.clone(),
        device_uuid: superblock.device,
        layout: superblock.layout.to_string(),
        chunk: u64::from(superblock.chunk) * SECTOR,
        size: array_bytes(superblock),
        members: superblock.raid_disks as usize,
        number: superblock.dev_number,
        role,
        slot,
        slots,
        clean: superblock.is_clean(),
        events: superblock.events,
        created: seconds(superblock.created),
        updated: seconds(superblock.updated),
        data_offset: superblock.data_start(),
        used: superblock.size * SECTOR,
        bitmap,
        bad_blocks,
    }
}
