//! The head of a volume: where the catalog and the space for extents lie. Pure.
//!
//! ```text
//!      0   header, copy A (4096 bytes, of which 92 are used)
//!   4096   header, copy B
//!  65536   catalog region
//!      …   journal, of `journal_len` bytes, which may be none (see `journal`)
//!      …   space for extents, from `space_at` to `space_at + space_len`
//! ```
//!
//! A header, little-endian: magic 8 bytes · version u32 · reserved u32 · generation u64 · store id 16 bytes · catalog
//! at u64, capacity u64, used length u64 · space at u64, length u64 · journal length u64 (…88) · crc32c u32 over all before
//! it. Version 1 has no journal; a store that was made with it goes on without.
//!
//! A change writes the copy that does *not* hold the newest generation, and never touches the other before a flush
//! has made the new one durable: tearing one update leaves the copy before it. The reader takes the newest copy whose
//! checksum and every field pass; geometry is checked before anything computes with it.

use super::extent::{Extent, UNIT};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use uuid::Uuid;

/// Bytes of a copy.
pub const COPY: u64 = 4096;
/// Where the catalog region starts.
pub const CATALOG_AT: u64 = UNIT;
/// Format version.
pub const VERSION: u32 = 2;
/// The version without a journal.
const UNJOURNALED: u32 = 1;
/// A start holds all of it in memory.
const LONGEST_JOURNAL: u64 = 1 << 30;
const MAGIC: [u8; 8] = *b"decalogV";
const CRC_AT: usize = 88;

/// A parsed header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Rises with each write; its parity says which copy it lies in.
    pub generation: u64,
    /// The store's id.
    pub store: Uuid,
    /// The region reserved for the catalog.
    pub catalog: Extent,
    /// How much of that region is in use.
    pub catalog_len: u64,
    /// The region of the journal, behind the catalog's; of no length where there is none.
    pub journal: Extent,
    /// The region extents are taken from.
    pub space: Extent,
}

/// Why a header is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// There is something else.
    #[error("it does not start with a log store's header")]
    Magic,
    /// A torn or rotten copy.
    #[error("its checksum is wrong")]
    Checksum,
    /// A later format.
    #[error("its version is {0}")]
    Version(u32),
    /// Geometry that contradicts itself or the volume.
    #[error("its {0} does not fit the volume")]
    Geometry(&'static str),
}

impl Layout {
    /// Lays out a volume of `size` bytes with a catalog of `catalog` bytes and a journal of `journal`; `None` when it is too
    /// small.
    #[must_use]
    pub fn plan(size: u64, catalog: u64, journal: u64, store: Uuid) -> Option<Self> {
        let catalog = Extent { at: CATALOG_AT, len: catalog.next_multiple_of(UNIT) };
        let journal = Extent { at: catalog.end(), len: journal.next_multiple_of(UNIT) };
        let at = journal.end();
        let len = size.checked_sub(at)? / UNIT * UNIT;
        (len >= UNIT).then_some(Self {
            generation: 1,
            store,
            catalog,
            catalog_len: 0,
            journal,
            space: Extent { at, len },
        })
    }

    /// Where this generation's copy lies.
    #[must_use]
    pub fn copy_at(&self) -> u64 {
        (self.generation % 2) * COPY
    }

    /// The bytes of a copy.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(COPY as usize);
        bytes.put_slice(&MAGIC);
        bytes.put_u32_le(if self.journal.len > 0 { VERSION } else { UNJOURNALED });
        bytes.put_u32_le(0);
        bytes.put_u64_le(self.generation);
        bytes.put_slice(self.store.as_bytes());
        bytes.put_u64_le(self.catalog.at);
        bytes.put_u64_le(self.catalog.len);
        bytes.put_u64_le(self.catalog_len);
        bytes.put_u64_le(self.space.at);
        bytes.put_u64_le(self.space.len);
        bytes.put_u64_le(self.journal.len);
        let crc = crc32c::crc32c(&bytes);
        bytes.put_u32_le(crc);
        bytes.resize(COPY as usize, 0);
        bytes.freeze()
    }

    /// Reads a copy of a volume of `size` bytes.
    pub fn decode(copy: &[u8], size: u64) -> Result<Self, HeaderFault> {
        if copy.len() < COPY as usize || copy[..8] != MAGIC {
            return Err(HeaderFault::Magic);
        }
        let mut at = &copy[8..];
        let version = at.get_u32_le();
        let stored = u32::from_le_bytes([copy[CRC_AT], copy[CRC_AT + 1], copy[CRC_AT + 2], copy[CRC_AT + 3]]);
        if crc32c::crc32c(&copy[..CRC_AT]) != stored {
            return Err(HeaderFault::Checksum);
        }
        if !(UNJOURNALED..=VERSION).contains(&version) {
            return Err(HeaderFault::Version(version));
        }
        at.advance(4);
        let generation = at.get_u64_le();
        let mut store = [0; 16];
        at.copy_to_slice(&mut store);
        let catalog = Extent { at: at.get_u64_le(), len: at.get_u64_le() };
        let catalog_len = at.get_u64_le();
        let space = Extent { at: at.get_u64_le(), len: at.get_u64_le() };
        let journal = Extent { at: catalog.end(), len: at.get_u64_le() };
        let store = Uuid::from_bytes(store);
        let layout = Self { generation, store, catalog, catalog_len, journal, space };
        if (version == UNJOURNALED) != (journal.len == 0) {
            return Err(HeaderFault::Geometry("journal"));
        }
        layout.check(size)?;
        Ok(layout)
    }

    fn check(&self, size: u64) -> Result<(), HeaderFault> {
        let fits = |extent: Extent| {
            extent.at.is_multiple_of(UNIT)
                && extent.len.is_multiple_of(UNIT)
                && extent.len > 0
                && extent.at.checked_add(extent.len).is_some_and(|end| end <= size)
        };
        if self.catalog.at != CATALOG_AT || !fits(self.catalog) || self.catalog_len > self.catalog.len {
            return Err(HeaderFault::Geometry("catalog region"));
        }
        if self.journal.len > 0 && (!fits(self.journal) || self.journal.len > LONGEST_JOURNAL) {
            return Err(HeaderFault::Geometry("journal"));
        }
        if self.space.at < self.journal.end() || !fits(self.space) {
            return Err(HeaderFault::Geometry("space region"));
        }
        Ok(())
    }

    /// The newest good one of several copies.
    pub fn choose<'a>(copies: impl IntoIterator<Item = &'a [u8]>, size: u64) -> Result<Self, HeaderFault> {
        let mut best: Result<Self, HeaderFault> = Err(HeaderFault::Magic);
        for copy in copies {
            match (Self::decode(copy, size), &best) {
                (Ok(found), Ok(known)) if found.generation <= known.generation => {}
                (Ok(found), _) => best = Ok(found),
                // A damaged copy says more than a blank one.
                (Err(fault), Err(HeaderFault::Magic)) => best = Err(fault),
                (Err(_), _) => {}
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 64 << 20;

    fn layout() -> Layout {
        Layout::plan(SIZE, 4 << 20, 1 << 20, Uuid::from_bytes([7; 16])).unwrap()
    }

    #[test]
    fn a_header_reads_back_and_every_flipped_bit_is_seen() {
        let layout = layout();
        let bytes = layout.encode();
        assert_eq!(bytes.len() as u64, COPY);
        assert_eq!(Layout::decode(&bytes, SIZE), Ok(layout));
        for bit in 0..(CRC_AT + 4) * 8 {
            let mut bad = bytes.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Layout::decode(&bad, SIZE).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn one_without_a_journal_is_of_the_first_version() {
        let old = Layout::plan(SIZE, 4 << 20, 0, Uuid::nil()).unwrap();
        let bytes = old.encode();
        assert_eq!((bytes[8], Layout::decode(&bytes, SIZE)), (1, Ok(old)));
        for (version, journal) in [(1, UNIT), (2, 0), (2, u64::MAX), (2, 1), (3, UNIT)] {
            let mut bytes = layout().encode().to_vec();
            bytes[8] = version;
            bytes[80..88].copy_from_slice(&journal.to_le_bytes());
            let crc = crc32c::crc32c(&bytes[..CRC_AT]);
            bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
            assert!(Layout::decode(&bytes, SIZE).is_err(), "version {version}, {journal} bytes");
        }
    }

    #[test]
    fn geometry_is_checked_against_the_volume() {
        assert!(matches!(Layout::decode(&layout().encode(), SIZE - UNIT), Err(HeaderFault::Geometry(_))));
        let mut overlapping = layout();
        overlapping.space = Extent { at: UNIT, len: UNIT };
        assert!(matches!(Layout::decode(&overlapping.encode(), SIZE), Err(HeaderFault::Geometry(_))));
        let mut overflowing = layout();
        overflowing.space.len = u64::MAX / UNIT * UNIT;
        assert!(matches!(Layout::decode(&overflowing.encode(), SIZE), Err(HeaderFault::Geometry(_))));
        assert_eq!(Layout::plan(4 << 20, 4 << 20, 0, Uuid::nil()), None);
    }

    #[test]
    fn the_newest_good_copy_is_chosen() {
        let (old, new) = (layout(), Layout { generation: 2, catalog_len: 5, ..layout() });
        assert_ne!(old.copy_at(), new.copy_at());
        let (a, b, blank) = (new.encode(), old.encode(), vec![0; COPY as usize]);
        let choose = |copies: &[&[u8]]| Layout::choose(copies.iter().copied(), SIZE);
        assert_eq!(choose(&[&a, &b]), Ok(new));
        assert_eq!(choose(&[&b, &a]), Ok(new));
        assert_eq!(choose(&[&blank, &b]), Ok(old));
        assert_eq!(choose(&[&blank, &blank]), Err(HeaderFault::Magic));
        let mut torn = a.to_vec();
        torn[20] ^= 1;
        assert_eq!(choose(&[&torn, &b]), Ok(old));
        assert_eq!(choose(&[&torn, &blank]), Err(HeaderFault::Checksum));
        assert_eq!(choose(&[&blank, &torn]), Err(HeaderFault::Checksum));
        assert_eq!(choose(&[&torn, &blank, &b, &a]), Ok(new));
    }
}
