//! Why bytes are not a superblock that can be used: a variant a cause, in words for the person who has to act.

use super::SECTOR;
use crate::geometry::GeometryError;

/// Why bytes are not a superblock that this version can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// No md superblock at 4 KiB.
    #[error("no md superblock (metadata 1.2) was found on it; name a member of the array, or create one")]
    Magic,
    /// Fewer bytes than a superblock.
    #[error("too small to be a member of an array: it ends before a superblock could; check the path")]
    Short,
    /// Some other metadata version.
    #[error("its superblock has metadata version {0}; only version 1.2 is supported")]
    Version(u32),
    /// A damaged superblock.
    #[error("its superblock is damaged: checksum {found:#010x} where {computed:#010x} belongs")]
    Checksum {
        /// What is stored.
        found: u32,
        /// What the bytes give.
        computed: u32,
    },
    /// An event count that counting does not reach; adding to it would overflow.
    #[error("its superblock claims {0} events, which no array has seen: it is damaged or made up")]
    Events(u64),
    /// A role table that does not fit.
    #[error("its superblock claims {0} device numbers, more than fit")]
    MaxDev(u32),
    /// Another RAID level.
    #[error("its array is RAID level {0}, not 10")]
    Level(i32),
    /// Feature bits that this version does not honour.
    #[error("its superblock uses {what} (feature bits {0:#x}), which this version does not know; {remedy}",
        what = what(*_0), remedy = remedy(*_0))]
    Features(u32),
    /// A feature that says nothing without another.
    #[error(
        "its superblock has feature bit {0:#x} without {1}, without which it means nothing: it is damaged or made up"
    )]
    Alone(u32, &'static str),
    /// A bad-block log whose units are larger than any device.
    #[error(
        "its bad-block log counts in units of 2^{0} sectors, more than any device has: it is damaged or made up"
    )]
    BadBlockUnit(u8),
    /// A rebuild that has come further than the member reaches.
    #[error(
        "its superblock claims that {} bytes of it were rebuilt, and the array uses {} of it: it is damaged or made up",
        bytes(*.offset), bytes(*.size)
    )]
    Recovery {
        /// Sectors it claims.
        offset: u64,
        /// Sectors the array uses.
        size: u64,
    },
    /// The superblock says it lies elsewhere.
    #[error("its superblock says it belongs at sector {0}, not 8: the member is shifted or a copy of a part")]
    Misplaced(u64),
    /// A layout, chunk or size that no array has.
    #[error("its geometry is impossible: {0}")]
    Geometry(#[from] GeometryError),
    /// Its own number is not in the role table.
    #[error("its own number {number} lies outside its table of {count} roles")]
    DevNumber {
        /// The number.
        number: u32,
        /// Roles in the table.
        count: usize,
    },
    /// A role names a slot the array has not.
    #[error("its table gives number {number} the slot {slot}, and the array has {raid_disks} members")]
    RoleSlot {
        /// The device number.
        number: usize,
        /// The slot.
        slot: usize,
        /// Members of the array.
        raid_disks: u32,
    },
    /// A region reaches outside the device or over another.
    #[error("its {region} (bytes {start} to {end}) does not fit on a device of {device} bytes")]
    Region {
        /// Which: data area, bitmap, bad-block log.
        region: &'static str,
        /// First byte.
        start: i128,
        /// Byte behind the last.
        end: i128,
        /// Bytes of the device.
        device: u64,
    },
    /// The data area is smaller than what the array uses of it.
    #[error("its data area has {} bytes and the array uses {} of each member", bytes(*.data_size), bytes(*.size))]
    DataSize {
        /// Sectors of the data area.
        data_size: u64,
        /// Sectors used.
        size: u64,
    },
}

/// Bytes of a number of sectors.
fn bytes(sectors: u64) -> u128 {
    u128::from(sectors) * u128::from(SECTOR)
}

/// Feature bits that are refused, with what they mean.
const REFUSED: [(u32, &str); 6] = [
    (4 | 32 | 64, "a reshape"),
    (256, "a cluster"),
    (512, "a journal"),
    (1024 | 2048, "a partial parity log"),
    (4096, "a RAID 0 layout"),
    (!0x1fff, "something unheard of"),
];

/// The first of the refused features among the bits.
fn what(bits: u32) -> &'static str {
    REFUSED.iter().find(|(mask, _)| bits & mask != 0).map_or("nothing", |(_, name)| name)
}

/// What to do about them.
fn remedy(bits: u32) -> &'static str {
    if bits & (4 | 32 | 64) != 0 { "let mdadm finish that first" } else { "use the array with mdadm" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_features_are_named() {
        let text = |bits| SuperblockError::Features(bits).to_string();
        assert!(
            text(4).contains("uses a reshape (feature bits 0x4)") && text(4).ends_with("finish that first")
        );
        assert!(text(64).contains("a reshape"));
        assert!(text(0x200).contains("a journal") && text(0x200).ends_with("use the array with mdadm"));
        assert!(text(0x800).contains("a partial parity log"));
        assert!(text(1 << 20).contains("something unheard of"));
    }

    #[test]
    fn sizes_are_told_in_bytes() {
        let text = SuperblockError::DataSize { data_size: 8, size: u64::MAX }.to_string();
        assert!(text.contains("4096 bytes") && text.contains("9444732965739290426880 of each"), "{text}");
    }
}
