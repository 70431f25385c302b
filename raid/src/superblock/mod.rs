//! The superblock of Linux md, metadata 1.2: bytes ↔ value. Pure; who reads and writes it is `member`'s business.
//!
//! It lies 4 KiB into each member. All fields are little-endian; sectors are 512 bytes.
//!
//! ```text
//!    0 magic u32 = a92b4efc      72 level u32 = 10       144 super_offset u64 = 8   208 resync_offset u64
//!    4 major u32 = 1             76 layout u32           152 recovery_offset u64    216 checksum u32
//!    8 feature_map u32           80 size u64             160 dev_number u32         220 max_dev u32
//!   12 zero u32                  88 chunk u32            164 corrected u32          224 zeroes
//!   16 set_uuid 16 bytes         92 raid_disks u32       168 device_uuid 16 bytes   256 roles u16 × max_dev
//!   32 name 32 bytes             96 bitmap_offset i32    184 devflags u8
//!   64 ctime u64                100 reshape fields       185 bad-block log: shift u8, size u16, offset i32
//!                               128 data_offset u64      192 utime u64
//!                               136 data_size u64        200 events u64
//! ```
//!
//! Invariants of a [`Superblock`] that [`Superblock::decode`] returned:
//! - the checksum was right, the geometry is one that [`Geometry::new`] accepts, and the member's own number lies in
//!   the role table;
//! - a rebuild it tells of has come no further than the member is used;
//! - the data area, the bitmap and the bad-block log lie inside the device, behind the superblock, and clear of it;
//! - no feature bit is set that this version does not honour: a bit that we ignored could make every byte wrong.
//!
//! Feature bits that are honoured: 1 bitmap, 2 recovery offset, 8 bad blocks, 16 replacement, 128 recovery guided by
//! the bitmap. Members without bit 2 hold good data throughout. A replacement has the same slot in the role table as
//! the member it is to replace; the bit in its own superblock tells the two apart.
//!
//! Source: `md_p.h` and `md.c` of Linux.

mod error;

pub use error::SuperblockError;

use crate::geometry::{Geometry, GeometryError, Layout, MAX_MEMBERS, Slot};
use crate::record::RECORDS_BYTES;
use uuid::Uuid;

/// Bytes a sector, md's unit.
pub const SECTOR: u64 = 512;
/// Where the superblock lies on a member, in bytes.
pub const SUPER_OFFSET: u64 = 4096;
/// Bytes read and written at once for a superblock.
pub const SUPER_BYTES: usize = 4096;
/// The role table's length that we write, as mdadm does: it fills a kibibyte.
const DEFAULT_MAX_DEV: usize = 384;
/// `resync_offset` of an array that was stopped cleanly.
pub const CLEAN: u64 = u64::MAX;

const MAGIC: u32 = 0xa92b_4efc;
const LEVEL_RAID10: u32 = 10;
const FEATURE_BITMAP: u32 = 1;
const FEATURE_RECOVERY: u32 = 2;
const FEATURE_BAD_BLOCKS: u32 = 8;
const FEATURE_REPLACEMENT: u32 = 16;
const FEATURE_BY_BITMAP: u32 = 128;
const HONOURED: u32 =
    FEATURE_BITMAP | FEATURE_RECOVERY | FEATURE_BAD_BLOCKS | FEATURE_REPLACEMENT | FEATURE_BY_BITMAP;
/// A recovery offset as md writes it between the end of a rebuild and the member's being in sync.
const RECOVERED: u64 = u64::MAX;

const AT_MAGIC: usize = 0;
const AT_MAJOR: usize = 4;
const AT_FEATURES: usize = 8;
const AT_SET_UUID: usize = 16;
const AT_NAME: usize = 32;
const AT_CTIME: usize = 64;
const AT_LEVEL: usize = 72;
const AT_LAYOUT: usize = 76;
const AT_SIZE: usize = 80;
const AT_CHUNK: usize = 88;
const AT_RAID_DISKS: usize = 92;
const AT_BITMAP_OFFSET: usize = 96;
const AT_DATA_OFFSET: usize = 128;
const AT_DATA_SIZE: usize = 136;
const AT_SUPER_OFFSET: usize = 144;
const AT_RECOVERY_OFFSET: usize = 152;
const AT_DEV_NUMBER: usize = 160;
const AT_CORRECTED: usize = 164;
const AT_DEVICE_UUID: usize = 168;
const AT_DEVFLAGS: usize = 184;
const AT_BBLOG_SHIFT: usize = 185;
const AT_BBLOG_SIZE: usize = 186;
const AT_BBLOG_OFFSET: usize = 188;
const AT_UTIME: usize = 192;
const AT_EVENTS: usize = 200;
const AT_RESYNC_OFFSET: usize = 208;
const AT_CHECKSUM: usize = 216;
const AT_MAX_DEV: usize = 220;
const AT_ROLES: usize = 256;
const _: () = assert!(AT_ROLES + 2 * MAX_MEMBERS == SUPER_BYTES);

/// What a superblock's role table says of one device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Holds a slot.
    Active(Slot),
    /// Failed or missing.
    Faulty,
    /// In the array without a slot; also written for numbers that were never given out.
    Spare,
    /// A journal device, which RAID 10 has not; kept as it is found.
    Journal,
}

impl Role {
    fn decode(word: u16) -> Self {
        match word {
            0xffff => Self::Spare,
            0xfffe => Self::Faulty,
            0xfffd => Self::Journal,
            slot => Self::Active(Slot(usize::from(slot))),
        }
    }

    fn encode(self) -> u16 {
        match self {
            Self::Spare => 0xffff,
            Self::Faulty => 0xfffe,
            Self::Journal => 0xfffd,
            Self::Active(slot) => slot.0 as u16,
        }
    }
}

/// Where a member's bad-block log lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadBlockLog {
    /// Sectors from the superblock; may be negative.
    pub offset: i32,
    /// Sectors.
    pub sectors: u16,
    /// Its units are sectors shifted by this much.
    pub shift: u8,
    /// Whether it has entries; an empty log is not read.
    pub in_use: bool,
}

/// How far a member that holds a slot was filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovery {
    /// Sectors from the start of the data area that hold good data; at most the superblock's `size`, where the rebuild
    /// is done and only the member's being in sync was not on record yet.
    pub offset: u64,
    /// Whether what lies behind held good data before, so that only what the bitmap marks is missing.
    pub by_bitmap: bool,
}

/// A superblock's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The array's identity.
    pub array: Uuid,
    /// The array's name, at most 32 bytes; md writes `host:name`.
    pub name: String,
    /// Creation time: seconds since the epoch in the low 40 bits, microseconds above.
    pub created: u64,
    /// How copies are laid out.
    pub layout: Layout,
    /// Sectors of each member that the array uses.
    pub size: u64,
    /// Sectors a chunk.
    pub chunk: u32,
    /// Members of the array.
    pub raid_disks: u32,
    /// Sectors from the superblock to the internal bitmap, where there is one; may be negative.
    pub bitmap_offset: Option<i32>,
    /// First sector of the data area.
    pub data_offset: u64,
    /// Sectors of the data area; at least `size`.
    pub data_size: u64,
    /// How far the member was filled, while it is not in sync.
    pub recovery: Option<Recovery>,
    /// Whether it is to take the place of another that holds the same slot.
    pub replacement: bool,
    /// This member's number, an index into `roles`.
    pub dev_number: u32,
    /// Read errors that were corrected on this member.
    pub corrected: u32,
    /// This member's identity.
    pub device: Uuid,
    /// md's flags of this member (write-mostly, fail-fast); kept as found.
    pub devflags: u8,
    /// The bad-block log, where there is one.
    pub bad_block_log: Option<BadBlockLog>,
    /// Last change, in the form of `created`.
    pub updated: u64,
    /// Counts superblock changes: the higher knows more.
    pub events: u64,
    /// First sector of the array that may differ between copies; [`CLEAN`] when none does.
    pub resync_offset: u64,
    /// What each device number is, as this member last knew.
    pub roles: Vec<Role>,
}

/// The largest event count that is believed: at a million a second it takes 290,000 years.
const MOST_EVENTS: u64 = i64::MAX as u64;

impl Superblock {
    /// Decodes and checks the bytes found at [`SUPER_OFFSET`] of a device of `device_bytes`.
    pub fn decode(bytes: &[u8], device_bytes: u64) -> Result<Self, SuperblockError> {
        let bytes: &[u8; SUPER_BYTES] =
            bytes.first_chunk().filter(|_| bytes.len() == SUPER_BYTES).ok_or(SuperblockError::Short)?;
        if get32(bytes, AT_MAGIC) != MAGIC {
            return Err(SuperblockError::Magic);
        }
        if get32(bytes, AT_MAJOR) != 1 {
            return Err(SuperblockError::Version(get32(bytes, AT_MAJOR)));
        }
        let max_dev = get32(bytes, AT_MAX_DEV);
        if max_dev as usize > MAX_MEMBERS {
            return Err(SuperblockError::MaxDev(max_dev));
        }
        let (found, computed) = (get32(bytes, AT_CHECKSUM), checksum(bytes, max_dev as usize));
        if found != computed {
            return Err(SuperblockError::Checksum { found, computed });
        }
        let level = get32(bytes, AT_LEVEL);
        if level != LEVEL_RAID10 {
            return Err(SuperblockError::Level(level as i32));
        }
        let features = get32(bytes, AT_FEATURES);
        if features & !HONOURED != 0 {
            return Err(SuperblockError::Features(features & !HONOURED));
        }
        let events = get64(bytes, AT_EVENTS);
        if events > MOST_EVENTS {
            return Err(SuperblockError::Events(events));
        }
        let super_offset = get64(bytes, AT_SUPER_OFFSET);
        if super_offset != SUPER_OFFSET / SECTOR {
            return Err(SuperblockError::Misplaced(super_offset));
        }
        let (bblog_offset, bblog_size) = (get32(bytes, AT_BBLOG_OFFSET) as i32, get16(bytes, AT_BBLOG_SIZE));
        let decoded = Self {
            array: get_uuid(bytes, AT_SET_UUID),
            name: decode_name(&bytes[AT_NAME..AT_CTIME]),
            created: get64(bytes, AT_CTIME),
            layout: Layout::from_word(get32(bytes, AT_LAYOUT))?,
            size: get64(bytes, AT_SIZE),
            chunk: get32(bytes, AT_CHUNK),
            raid_disks: get32(bytes, AT_RAID_DISKS),
            bitmap_offset: (features & FEATURE_BITMAP != 0).then(|| get32(bytes, AT_BITMAP_OFFSET) as i32),
            data_offset: get64(bytes, AT_DATA_OFFSET),
            data_size: get64(bytes, AT_DATA_SIZE),
            recovery: decode_recovery(bytes, features)?,
            replacement: features & FEATURE_REPLACEMENT != 0,
            dev_number: get32(bytes, AT_DEV_NUMBER),
            corrected: get32(bytes, AT_CORRECTED),
            device: get_uuid(bytes, AT_DEVICE_UUID),
            devflags: bytes[AT_DEVFLAGS],
            bad_block_log: (bblog_offset != 0 && bblog_size != 0).then(|| BadBlockLog {
                offset: bblog_offset,
                sectors: bblog_size,
                shift: bytes[AT_BBLOG_SHIFT],
                in_use: features & FEATURE_BAD_BLOCKS != 0,
            }),
            updated: get64(bytes, AT_UTIME),
            events,
            resync_offset: get64(bytes, AT_RESYNC_OFFSET),
            roles: (0..max_dev as usize).map(|i| Role::decode(get16(bytes, AT_ROLES + 2 * i))).collect(),
        };
        decoded.check(device_bytes, features)?;
        Ok(decoded)
    }

    /// The checks that need several fields or the device's size.
    fn check(&self, device_bytes: u64, features: u32) -> Result<(), SuperblockError> {
        self.geometry()?;
        if self.dev_number as usize >= self.roles.len() {
            return Err(SuperblockError::DevNumber { number: self.dev_number, count: self.roles.len() });
        }
        for (number, role) in self.roles.iter().enumerate() {
            if let Role::Active(slot) = role
                && slot.0 >= self.raid_disks as usize
            {
                return Err(SuperblockError::RoleSlot { number, slot: slot.0, raid_disks: self.raid_disks });
            }
        }
        if self.data_size < self.size {
            return Err(SuperblockError::DataSize { data_size: self.data_size, size: self.size });
        }
        if let Some(Recovery { offset, .. }) = self.recovery
            && offset > self.size
        {
            return Err(SuperblockError::Recovery { offset, size: self.size });
        }
        let device = device_bytes / SECTOR;
        let region = |region, start: i128, len: i128, first: i128, last: i128| {
            let end = start + len;
            if start >= first && end <= last {
                return Ok(());
            }
            let (start, end) = (start * i128::from(SECTOR), end * i128::from(SECTOR));
            Err(SuperblockError::Region { region, start, end, device: device_bytes })
        };
        let behind_super = i128::from(SUPER_OFFSET / SECTOR) + SUPER_BYTES as i128 / i128::from(SECTOR);
        let (data, device_end) = (i128::from(self.data_offset), i128::from(device));
        region("data area", data, i128::from(self.size), behind_super, device_end)?;
        // The bitmap and the log lie between superblock and data; md 1.2 leaves no other room for them.
        let super_at = i128::from(SUPER_OFFSET / SECTOR);
        if let Some(offset) = self.bitmap_offset {
            region("bitmap", super_at + i128::from(offset), 1, behind_super, data)?;
        }
        match self.bad_block_log {
            Some(log) => {
                let (start, len) = (super_at + i128::from(log.offset), i128::from(log.sectors));
                region("bad-block log", start, len, behind_super, data)?;
                if log.shift > 32 {
                    return Err(SuperblockError::BadBlockUnit(log.shift));
                }
            }
            None if features & FEATURE_BAD_BLOCKS != 0 => {
                return Err(SuperblockError::Alone(FEATURE_BAD_BLOCKS, "a bad-block log"));
            }
            None => {}
        }
        Ok(())
    }

    /// The 4 KiB that belong at [`SUPER_OFFSET`], checksum included.
    #[must_use]
    pub fn encode(&self) -> [u8; SUPER_BYTES] {
        let mut bytes = [0; SUPER_BYTES];
        let out = &mut bytes;
        let mut features = 0;
        put32(out, AT_MAGIC, MAGIC);
        put32(out, AT_MAJOR, 1);
        put(out, AT_SET_UUID, self.array.as_bytes());
        put(out, AT_NAME, &self.name.as_bytes()[..self.name.len().min(AT_CTIME - AT_NAME)]);
        put64(out, AT_CTIME, self.created);
        put32(out, AT_LEVEL, LEVEL_RAID10);
        put32(out, AT_LAYOUT, self.layout.word());
        put64(out, AT_SIZE, self.size);
        put32(out, AT_CHUNK, self.chunk);
        put32(out, AT_RAID_DISKS, self.raid_disks);
        if let Some(offset) = self.bitmap_offset {
            features |= FEATURE_BITMAP;
            put32(out, AT_BITMAP_OFFSET, offset as u32);
        }
        put64(out, AT_DATA_OFFSET, self.data_offset);
        put64(out, AT_DATA_SIZE, self.data_size);
        put64(out, AT_SUPER_OFFSET, SUPER_OFFSET / SECTOR);
        if let Some(recovery) = self.recovery {
            features |= FEATURE_RECOVERY | if recovery.by_bitmap { FEATURE_BY_BITMAP } else { 0 };
            put64(out, AT_RECOVERY_OFFSET, recovery.offset);
        }
        features |= if self.replacement { FEATURE_REPLACEMENT } else { 0 };
        put32(out, AT_DEV_NUMBER, self.dev_number);
        put32(out, AT_CORRECTED, self.corrected);
        put(out, AT_DEVICE_UUID, self.device.as_bytes());
        out[AT_DEVFLAGS] = self.devflags;
        if let Some(log) = self.bad_block_log {
            features |= if log.in_use { FEATURE_BAD_BLOCKS } else { 0 };
            out[AT_BBLOG_SHIFT] = log.shift;
            put(out, AT_BBLOG_SIZE, &log.sectors.to_le_bytes());
            put32(out, AT_BBLOG_OFFSET, log.offset as u32);
        }
        put32(out, AT_FEATURES, features);
        put64(out, AT_UTIME, self.updated);
        put64(out, AT_EVENTS, self.events);
        put64(out, AT_RESYNC_OFFSET, self.resync_offset);
        let count = self.roles.len().min(MAX_MEMBERS);
        put32(out, AT_MAX_DEV, count as u32);
        for (i, role) in self.roles[..count].iter().enumerate() {
            put(out, AT_ROLES + 2 * i, &role.encode().to_le_bytes());
        }
        put32(out, AT_CHECKSUM, checksum(out, count));
        bytes
    }

    /// The mapping this superblock describes.
    pub fn geometry(&self) -> Result<Geometry, GeometryError> {
        let usable = self.size.checked_mul(SECTOR).ok_or(GeometryError::TooLarge(u64::MAX))?;
        Geometry::new(self.layout, self.raid_disks as usize, u64::from(self.chunk) * SECTOR, usable)
    }

    /// Whether the member holds a slot and all that belongs there.
    #[must_use]
    pub fn holds_everything(&self) -> bool {
        matches!(self.own_role(), Role::Active(_)) && self.recovery.is_none() && !self.replacement
    }

    /// What this member's table says it is itself.
    #[must_use]
    pub fn own_role(&self) -> Role {
        self.role_of(self.dev_number)
    }

    /// What this member's table says of a device number.
    #[must_use]
    pub fn role_of(&self, number: u32) -> Role {
        self.roles.get(number as usize).copied().unwrap_or(Role::Spare)
    }

    /// Whether the array was stopped cleanly, as far as this member knows.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.resync_offset == CLEAN
    }

    /// First byte of the data area.
    #[must_use]
    pub fn data_start(&self) -> u64 {
        self.data_offset * SECTOR
    }

    /// Byte position of the internal bitmap, where there is one.
    #[must_use]
    pub fn bitmap_start(&self) -> Option<u64> {
        // Checked by `decode` to lie behind the superblock.
        self.bitmap_offset
            .map(|sectors| SUPER_OFFSET.saturating_add_signed(i64::from(sectors) * SECTOR as i64))
    }

    /// Bytes from the bitmap's start that it may take: up to the data area, or to a bad-block log in between.
    #[must_use]
    pub fn bitmap_room(&self) -> u64 {
        let Some(start) = self.bitmap_start() else { return 0 };
        let log = self
            .bad_block_log
            .map(|log| SUPER_OFFSET.saturating_add_signed(i64::from(log.offset) * SECTOR as i64));
        let end = log.filter(|&log| log > start).map_or(self.data_start(), |log| log.min(self.data_start()));
        end.saturating_sub(start)
    }

    /// Byte position where our two records belong: behind the bad-block log, at a multiple of 4 KiB, if both fit before
    /// the data. Whether they are there, only reading tells: md knows nothing of them.
    #[must_use]
    pub fn records_start(&self) -> Option<u64> {
        self.room_behind_log(RECORDS_BYTES)
    }

    /// The first multiple of 4 KiB behind the bad-block log, if so many bytes fit from there to the data area, clear of
    /// a bitmap in between.
    fn room_behind_log(&self, bytes: u64) -> Option<u64> {
        let log = self.bad_block_log?;
        let end = i64::from(log.offset).checked_add(i64::from(log.sectors))? * SECTOR as i64;
        let start = SUPER_OFFSET.checked_add_signed(end)?.next_multiple_of(SUPER_BYTES as u64);
        let clear = self.bitmap_start().filter(|&bitmap| bitmap >= start).unwrap_or(u64::MAX);
        (start.checked_add(bytes)? <= self.data_start().min(clear)).then_some(start)
    }

    /// Byte position and length of the bad-block log, where there is one.
    #[must_use]
    pub fn bad_block_log_area(&self) -> Option<(u64, usize)> {
        self.bad_block_log.map(|log| {
            let start = SUPER_OFFSET.saturating_add_signed(i64::from(log.offset) * SECTOR as i64);
            (start, usize::from(log.sectors) * SECTOR as usize)
        })
    }

    /// Byte position and length of the bad-block log, where it has entries.
    #[must_use]
    pub fn bad_blocks_in_use(&self) -> Option<(u64, usize)> {
        self.bad_block_log.filter(|log| log.in_use).map(|log| {
            let start = SUPER_OFFSET.saturating_add_signed(i64::from(log.offset) * SECTOR as i64);
            (start, usize::from(log.sectors) * SECTOR as usize)
        })
    }
}

/// A role table of the length md uses, with `members` numbers that hold the slots of the same number.
#[must_use]
pub fn initial_roles(members: usize) -> Vec<Role> {
    let mut roles: Vec<Role> = (0..members).map(|slot| Role::Active(Slot(slot))).collect();
    roles.resize(members.max(DEFAULT_MAX_DEV), Role::Spare);
    roles
}

/// A time in the form superblocks keep: seconds in the low 40 bits, microseconds above.
#[must_use]
pub fn timestamp(since_epoch: std::time::Duration) -> u64 {
    (since_epoch.as_secs() & ((1 << 40) - 1)) | u64::from(since_epoch.subsec_micros()) << 40
}

/// What the feature bits and the recovery offset say of a rebuild. That the offset is not too far, `check` sees to.
fn decode_recovery(bytes: &[u8; SUPER_BYTES], features: u32) -> Result<Option<Recovery>, SuperblockError> {
    let by_bitmap = features & FEATURE_BY_BITMAP != 0;
    if features & FEATURE_RECOVERY == 0 {
        // md would take such a member for whole. It never writes one, and nothing says what it holds.
        return if by_bitmap {
            Err(SuperblockError::Alone(FEATURE_BY_BITMAP, "a recovery offset"))
        } else {
            Ok(None)
        };
    }
    if by_bitmap && features & FEATURE_BITMAP == 0 {
        return Err(SuperblockError::Alone(FEATURE_BY_BITMAP, "a bitmap"));
    }
    let offset = match get64(bytes, AT_RECOVERY_OFFSET) {
        RECOVERED => get64(bytes, AT_SIZE),
        offset => offset,
    };
    Ok(Some(Recovery { offset, by_bitmap }))
}

/// md's checksum: the sum of the 32-bit words in 64 bits, the checksum's own field taken as zero, the high half
/// folded into the low one once.
fn checksum(bytes: &[u8; SUPER_BYTES], max_dev: usize) -> u32 {
    let used = &bytes[..AT_ROLES + 2 * max_dev];
    let (words, rest) = used.as_chunks::<4>();
    let mut sum: u64 = words.iter().map(|word| u64::from(u32::from_le_bytes(*word))).sum();
    if let [low, high] = rest {
        sum += u64::from(u16::from_le_bytes([*low, *high]));
    }
    sum -= u64::from(get32(bytes, AT_CHECKSUM));
    (sum as u32).wrapping_add((sum >> 32) as u32)
}

fn decode_name(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn get<const N: usize>(bytes: &[u8; SUPER_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn get16(bytes: &[u8; SUPER_BYTES], at: usize) -> u16 {
    u16::from_le_bytes(get(bytes, at))
}

fn get32(bytes: &[u8; SUPER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(get(bytes, at))
}

fn get64(bytes: &[u8; SUPER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(get(bytes, at))
}

fn get_uuid(bytes: &[u8; SUPER_BYTES], at: usize) -> Uuid {
    Uuid::from_bytes(get(bytes, at))
}

fn put(out: &mut [u8; SUPER_BYTES], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn put32(out: &mut [u8; SUPER_BYTES], at: usize, value: u32) {
    put(out, at, &value.to_le_bytes());
}

fn put64(out: &mut [u8; SUPER_BYTES], at: usize, value: u64) {
    put(out, at, &value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEVICE: u64 = 64 << 20;

    fn sample() -> Superblock {
        Superblock {
            array: Uuid::from_u128(0x1234),
            name: "host:logs".to_owned(),
            created: 77,
            layout: Layout::near(2),
            size: (DEVICE / SECTOR) - 4096,
            chunk: 1024,
            raid_disks: 4,
            bitmap_offset: Some(8),
            data_offset: 4096,
            data_size: (DEVICE / SECTOR) - 4096,
            recovery: None,
            replacement: false,
            dev_number: 2,
            corrected: 3,
            device: Uuid::from_u128(0x5678),
            devflags: 1,
            bad_block_log: Some(BadBlockLog { offset: 24, sectors: 8, shift: 0, in_use: false }),
            updated: 78,
            events: 42,
            resync_offset: CLEAN,
            roles: initial_roles(4),
        }
    }

    /// Changes a field and makes the checksum right again, so that only the field itself can be at fault.
    fn refusal(at: usize, field: &[u8]) -> SuperblockError {
        let mut bytes = sample().encode();
        put(&mut bytes, at, field);
        let max_dev = get32(&bytes, AT_MAX_DEV) as usize;
        if max_dev <= MAX_MEMBERS {
            let sum = checksum(&bytes, max_dev);
            put32(&mut bytes, AT_CHECKSUM, sum);
        }
        Superblock::decode(&bytes, DEVICE).unwrap_err()
    }

    #[test]
    fn what_was_encoded_is_decoded() {
        assert_eq!(Superblock::decode(&sample().encode(), DEVICE), Ok(sample()));
        let plain = Superblock { bitmap_offset: None, bad_block_log: None, ..sample() };
        assert_eq!(Superblock::decode(&plain.encode(), DEVICE), Ok(plain));
        for (by_bitmap, replacement) in [(false, false), (false, true), (true, false), (true, true)] {
            for offset in [0, 1024, sample().size] {
                let recovery = Some(Recovery { offset, by_bitmap });
                let rebuilding = Superblock { recovery, replacement, ..sample() };
                assert_eq!(Superblock::decode(&rebuilding.encode(), DEVICE), Ok(rebuilding));
            }
        }
    }

    #[test]
    fn a_rebuild_is_written_as_md_does() {
        let recovery = Some(Recovery { offset: 0x0102_0304, by_bitmap: true });
        let bytes = Superblock { recovery, replacement: true, ..sample() }.encode();
        assert_eq!(bytes[8..12], [1 | 2 | 16 | 128, 0, 0, 0]);
        assert_eq!(bytes[152..160], [4, 3, 2, 1, 0, 0, 0, 0]);
        let whole = sample().encode();
        assert_eq!(whole[8..12], [1, 0, 0, 0]);
        assert_eq!(whole[152..160], [0; 8]);
    }

    #[test]
    fn md_writes_all_ones_for_a_rebuild_that_is_done() {
        let recovery = Some(Recovery { offset: u64::MAX, by_bitmap: false });
        let found = Superblock::decode(&Superblock { recovery, ..sample() }.encode(), DEVICE).unwrap();
        assert_eq!(found.recovery, Some(Recovery { offset: sample().size, by_bitmap: false }));
    }

    #[test]
    fn a_rebuild_beyond_the_member_is_refused() {
        let with = |offset| {
            let recovery = Some(Recovery { offset, by_bitmap: false });
            Superblock::decode(&Superblock { recovery, ..sample() }.encode(), DEVICE)
        };
        for offset in [sample().size + 1, u64::MAX - 1, 1 << 63] {
            assert_eq!(with(offset), Err(SuperblockError::Recovery { offset, size: sample().size }));
        }
    }

    #[test]
    fn each_cause_has_its_refusal() {
        use SuperblockError as E;
        assert_eq!(refusal(AT_MAGIC, &[0]), E::Magic);
        assert_eq!(refusal(AT_MAJOR, &[2]), E::Version(2));
        assert_eq!(refusal(AT_LEVEL, &[5]), E::Level(5));
        assert_eq!(refusal(AT_FEATURES, &[1 | 4]), E::Features(4));
        for bit in [4u16, 32, 64, 256, 512, 1024, 2048, 4096] {
            assert_eq!(refusal(AT_FEATURES, &(bit | 1).to_le_bytes()), E::Features(u32::from(bit)));
        }
        assert_eq!(refusal(AT_FEATURES + 2, &[1]), E::Features(0x1_0000));
        assert_eq!(refusal(AT_FEATURES, &[1 | 128]), E::Alone(128, "a recovery offset"));
        assert_eq!(refusal(AT_FEATURES, &[2 | 128]), E::Alone(128, "a bitmap"));
        assert_eq!(refusal(AT_SUPER_OFFSET, &[0]), E::Misplaced(0));
        assert_eq!(refusal(AT_MAX_DEV, &[0xff, 0xff]), E::MaxDev(0xffff));
        assert!(matches!(refusal(AT_LAYOUT, &[0, 0]), E::Geometry(GeometryError::LayoutWord(_))));
        assert!(matches!(refusal(AT_CHUNK, &[3, 0]), E::Geometry(GeometryError::ChunkSize(_))));
        assert!(matches!(refusal(AT_RAID_DISKS, &[0]), E::Geometry(_)));
        assert!(matches!(refusal(AT_RAID_DISKS, &[0, 0, 0, 1]), E::Geometry(_)));
        assert!(matches!(refusal(AT_SIZE, &[0xff; 8]), E::Geometry(_)));
        assert!(matches!(refusal(AT_DEV_NUMBER, &[0xff, 0xff]), E::DevNumber { .. }));
        assert!(matches!(refusal(AT_ROLES, &[9, 0]), E::RoleSlot { number: 0, slot: 9, .. }));
        assert!(matches!(refusal(AT_DATA_OFFSET, &[15, 0]), E::Region { region: "data area", .. }));
        assert!(matches!(refusal(AT_DATA_OFFSET, &[0xff; 8]), E::Region { region: "data area", .. }));
        assert!(matches!(refusal(AT_DATA_SIZE, &[0; 8]), E::DataSize { .. }));
        assert!(matches!(refusal(AT_BITMAP_OFFSET, &[1]), E::Region { region: "bitmap", .. }));
        assert!(matches!(refusal(AT_BITMAP_OFFSET, &[0xff; 4]), E::Region { region: "bitmap", .. }));
        assert!(matches!(refusal(AT_BBLOG_OFFSET, &[1]), E::Region { region: "bad-block log", .. }));
        let mut torn = sample().encode();
        torn[AT_EVENTS] ^= 1;
        assert!(matches!(Superblock::decode(&torn, DEVICE), Err(E::Checksum { .. })));
        assert!(matches!(
            Superblock::decode(&sample().encode(), DEVICE - SECTOR),
            Err(E::Region { region: "data area", .. })
        ));
        assert_eq!(Superblock::decode(&[0; 100], DEVICE), Err(E::Short));
    }

    #[test]
    fn records_lie_behind_the_log_if_there_is_room() {
        let at = |data_offset, bitmap| {
            Superblock { data_offset, bitmap_offset: Some(bitmap), ..sample() }.records_start()
        };
        // The log ends at sector 8 + 24 + 8 = 40, 20 KiB in; the records take 64 sectors from there.
        assert_eq!(at(104, 8), Some(20480));
        assert_eq!(at(103, 8), None);
        assert_eq!(at(2048, 32), None, "a bitmap right behind the log");
        assert_eq!(at(2048, 96), Some(20480));
        assert_eq!(at(2048, 95), None);
        assert_eq!(Superblock { bad_block_log: None, ..sample() }.records_start(), None);
    }

    proptest! {
        /// Nothing a disk may hold makes the decoder panic, whatever the checksum says.
        #[test]
        fn garbage_is_refused_without_panic(
            patches in prop::collection::vec((0..SUPER_BYTES, any::<u8>()), 0..40),
            size in any::<u64>(),
        ) {
            let mut bytes = sample().encode();
            for (at, byte) in patches {
                bytes[at] = byte;
            }
            let max_dev = get32(&bytes, AT_MAX_DEV) as usize;
            if max_dev <= MAX_MEMBERS {
                let sum = checksum(&bytes, max_dev);
                put32(&mut bytes, AT_CHECKSUM, sum);
            }
            if let Ok(decoded) = Superblock::decode(&bytes, size) {
                prop_assert!(decoded.data_start() + decoded.size * SECTOR <= size);
                prop_assert!(decoded.geometry().is_ok());
                prop_assert!(decoded.recovery.is_none_or(|recovery| recovery.offset <= decoded.size));
            }
        }
    }
}
