//! A second copy of the superblock, in the room that md leaves alone: bytes ↔ value. Pure.
//!
//! A power cut may tear the superblock that is being written, and a member without one is lost to its array. The
//! copy is written before the superblock and durable before that begins, so one of the two is whole at any time. It
//! is read only where the superblock is damaged; where md has written since, it is merely older and counts as such.
//!
//! It exists on members that were created here, right behind the bad-block log; 4 KiB, little-endian:
//!
//! ```text
//!    0 magic "dclg-sb1"
//!    8 crc32c u32 of everything behind it
//!   12 length u32 of the superblock's bytes, at most 4080
//!   16 superblock, then zeroes
//! ```
//!
//! Guards against: torn writes and bit rot (crc32c), copies of another array or member (the superblock inside names
//! both), leftovers of something else (magic).

use crate::superblock::{SUPER_BYTES, Superblock, SuperblockError};

/// Bytes of the copy.
pub const BACKUP_BYTES: usize = 4096;

const MAGIC: &[u8; 8] = b"dclg-sb1";
const AT_CRC: usize = 8;
const AT_LENGTH: usize = 12;
const AT_SUPERBLOCK: usize = 16;

/// The copy of a superblock; `None` if it has so many roles that it does not fit.
#[must_use]
pub fn encode(superblock: &[u8; SUPER_BYTES]) -> Option<[u8; BACKUP_BYTES]> {
    let length = superblock.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let mut bytes = [0; BACKUP_BYTES];
    bytes.get_mut(AT_SUPERBLOCK..AT_SUPERBLOCK + length)?.copy_from_slice(&superblock[..length]);
    bytes[..AT_CRC].copy_from_slice(MAGIC);
    bytes[AT_LENGTH..AT_SUPERBLOCK].copy_from_slice(&(length as u32).to_le_bytes());
    let crc = crc32c::crc32c(&bytes[AT_LENGTH..]);
    bytes[AT_CRC..AT_LENGTH].copy_from_slice(&crc.to_le_bytes());
    Some(bytes)
}

/// The superblock in a copy found on a device of `device_bytes`; `None` if it is no intact copy.
#[must_use]
pub fn decode(bytes: &[u8], device_bytes: u64) -> Option<Result<Superblock, SuperblockError>> {
    let bytes: &[u8; BACKUP_BYTES] = bytes.try_into().ok()?;
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let length = word(AT_LENGTH) as usize;
    let whole = bytes.starts_with(MAGIC) && word(AT_CRC) == crc32c::crc32c(&bytes[AT_LENGTH..]);
    let inside = bytes.get(AT_SUPERBLOCK..AT_SUPERBLOCK + length).filter(|_| whole)?;
    let mut superblock = [0; SUPER_BYTES];
    superblock[..length].copy_from_slice(inside);
    Some(Superblock::decode(&superblock, device_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Layout;
    use crate::superblock::{CLEAN, initial_roles};
    use uuid::Uuid;

    fn sample(members: usize) -> Superblock {
        Superblock {
            array: Uuid::from_u128(1),
            name: "a".to_owned(),
            created: 0,
            layout: Layout::near(2),
            size: 2048,
            chunk: 128,
            raid_disks: members as u32,
            bitmap_offset: None,
            data_offset: 2048,
            data_size: 2048,
            recovery: None,
            replacement: false,
            dev_number: 0,
            corrected: 0,
            device: Uuid::from_u128(2),
            devflags: 0,
            bad_block_log: None,
            updated: 0,
            events: 3,
            resync_offset: CLEAN,
            roles: initial_roles(members),
        }
    }

    #[test]
    fn a_copy_is_whole_or_none() {
        let superblock = sample(4);
        let copy = encode(&superblock.encode()).unwrap();
        assert_eq!(decode(&copy, 2 << 20), Some(Ok(superblock)));
        for at in [0, 9, 13, 20, 1500, BACKUP_BYTES - 1] {
            let mut torn = copy;
            torn[at] ^= 1;
            assert_eq!(decode(&torn, 2 << 20), None, "byte {at}");
        }
        assert_eq!(decode(&copy[1..], 2 << 20), None);
        assert!(matches!(decode(&copy, 1 << 20), Some(Err(SuperblockError::Region { .. }))));
    }

    #[test]
    fn arrays_of_very_many_members_do_without() {
        assert!(encode(&sample(1900).encode()).is_some());
        assert!(encode(&sample(1915).encode()).is_none());
    }
}
