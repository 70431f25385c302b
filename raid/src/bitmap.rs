//! The write-intent bitmap of Linux md, version 4: which regions of the array may differ between copies. This file
//! has the bytes ↔ value part and the state in memory; writing it to members is `volume::metadata`'s business.
//!
//! On each member, at its superblock's `bitmap_offset`: a header of 256 bytes, then a bit a region, least
//! significant first; 1 means that the copies may differ. Regions are counted over the *array*, not over the member.
//! It is read and written in pages of 4 KiB, so that a bit costs one aligned block, and no sub-page write.
//!
//! ```text
//!    0 magic u32 = 6d746962 "bitm"    24 events u64           48 state u32             64 sectors_reserved u32
//!    4 version u32 = 4                32 events_cleared u64   52 chunk u32, bytes      68 nodes u32 (cluster; 0)
//!    8 array uuid 16 bytes            40 sync_size u64        56 daemon_sleep u32, s   72 zeroes
//!                                        (sectors)            60 write_behind u32     256 bits
//! ```
//!
//! Invariants of [`Intent`], on which rule "bit durable before data" rests:
//! - a region is *durable* only while its bit is 1 on stable storage of every live member;
//! - a region that has a writer, or lies in what is not yet resynced, keeps its bit;
//! - `durable` is lowered before the page with the cleared bit is written, never after.
//!
//! Source: `md-bitmap.h` of Linux.

use std::ops::Range;
use uuid::Uuid;

use crate::superblock::SECTOR;

/// Bytes a page of the bitmap, the unit of its reads and writes.
pub const PAGE: usize = 4096;
/// The region size that is used unless the bitmap would grow too large, in bytes. As mdadm.
pub const DEFAULT_REGION: u64 = 64 << 20;
/// Most regions a bitmap has: 128 KiB of bits.
const MAX_REGIONS: u64 = 1 << 20;
/// Most regions of a bitmap that md made or that was asked for, for the memory they take here (8 bytes each).
const MOST_REGIONS: u64 = 1 << 24;
/// The smallest and largest regions that can be asked for, in bytes: md writes in blocks of 4 KiB, and keeps the size
/// in 32 bits.
const REGIONS: Range<u64> = 4096..1 << 32;
/// Seconds between looks for bits to clear, as md's default.
const DAEMON_SLEEP: u32 = 5;

const MAGIC: u32 = 0x6d74_6962;
const VERSION: u32 = 4;
const HEADER: usize = 256;
const STATE_STALE: u32 = 1 << 1;

/// The header's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapHeader {
    /// The array's identity.
    pub array: Uuid,
    /// The superblocks' event count when the bitmap was last written.
    pub events: u64,
    /// The event count when bits were last cleared: a member that left later than this can be caught up by bitmap.
    pub events_cleared: u64,
    /// Sectors of the array.
    pub sync_size: u64,
    /// Whether the bits are not to be trusted (then all count as set).
    pub stale: bool,
    /// Bytes a region.
    pub region: u64,
    /// Seconds between looks for bits to clear.
    pub daemon_sleep: u32,
    /// md's limit of write-behind; kept as found.
    pub write_behind: u32,
    /// Sectors reserved for the bitmap; 0 where md has not noted it.
    pub sectors_reserved: u32,
}

/// Why bytes are not a bitmap that this version can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// No bitmap there.
    #[error("no bitmap where the superblock says one is")]
    Magic,
    /// Another version, such as a cluster's.
    #[error("bitmap version {0} is not supported, only 4")]
    Version(u32),
    /// The bitmap of another array.
    #[error("the bitmap belongs to the array {0}")]
    Foreign(Uuid),
    /// A region size that is no power of two from 512 bytes.
    #[error("bitmap regions of {0} bytes are impossible")]
    Region(u32),
    /// A region size that cannot be given to a new bitmap.
    #[error("bitmap regions of {0} bytes are not possible: a power of two from 4K to 2G is")]
    RegionAsked(u64),
    /// So many regions that their bits would take too much memory.
    #[error(
        "bitmap regions of {region} bytes are too small for an array of up to {size} bytes: use at least {least}"
    )]
    RegionTooSmall {
        /// Bytes of a region.
        region: u64,
        /// Bytes of the array, at most.
        size: u64,
        /// Bytes of the smallest region possible.
        least: u64,
    },
    /// It describes a smaller array. Sectors.
    #[error("the bitmap describes {found} sectors, the array has {expected}")]
    Size {
        /// What the header says.
        found: u64,
        /// What the array has.
        expected: u64,
    },
    /// The bits would reach over the data area or are too many to hold.
    #[error("the bitmap's {0} regions do not fit in front of the data")]
    TooLarge(u64),
}

impl BitmapHeader {
    /// The header of a new bitmap for an array of `size` bytes.
    #[must_use]
    pub fn new(array: Uuid, size: u64, events: u64) -> Self {
        let mut region = DEFAULT_REGION;
        while size.div_ceil(region) > MAX_REGIONS {
            region *= 2;
        }
        Self::with_region(array, size, events, region)
    }

    /// The same in at most `room` bytes; `None` if no region size makes it fit.
    #[must_use]
    pub fn fitting(array: Uuid, size: u64, events: u64, room: u64) -> Option<Self> {
        let mut header = Self::new(array, size, events);
        while header.bytes() as u64 > room {
            let region = header.region * 2;
            if region > 1 << 31 {
                return None;
            }
            header = Self::with_region(array, size, events, region);
        }
        Some(header)
    }

    /// The same with regions of the size asked for.
    pub fn asked(array: Uuid, size: u64, events: u64, region: u64) -> Result<Self, BitmapError> {
        if !region.is_power_of_two() || !REGIONS.contains(&region) {
            return Err(BitmapError::RegionAsked(region));
        }
        if size.div_ceil(region) > MOST_REGIONS {
            let least = size.div_ceil(MOST_REGIONS).next_power_of_two();
            return Err(BitmapError::RegionTooSmall { region, size, least });
        }
        Ok(Self::with_region(array, size, events, region))
    }

    fn with_region(array: Uuid, size: u64, events: u64, region: u64) -> Self {
        let mut header = Self {
            array,
            events,
            events_cleared: events,
            sync_size: size / SECTOR,
            stale: false,
            region,
            daemon_sleep: DAEMON_SLEEP,
            write_behind: 0,
            sectors_reserved: 0,
        };
        header.sectors_reserved = (header.bytes() as u64 / SECTOR) as u32;
        header
    }

    /// Decodes the first page, for the array `array` of `size` bytes, with `room` bytes up to the data area. A bitmap of a
    /// larger array, as an interrupted growth leaves it, is taken for what it says of this one.
    pub fn decode(page: &[u8], array: Uuid, size: u64, room: u64) -> Result<Self, BitmapError> {
        let bytes: &[u8; HEADER] = page.first_chunk().ok_or(BitmapError::Magic)?;
        let get32 = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let get64 = |at: usize| u64::from(get32(at)) | u64::from(get32(at + 4)) << 32;
        if get32(0) != MAGIC {
            return Err(BitmapError::Magic);
        }
        if get32(4) != VERSION || get32(68) > 1 {
            return Err(BitmapError::Version(get32(4)));
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[8..24]);
        if uuid != *array.as_bytes() {
            return Err(BitmapError::Foreign(Uuid::from_bytes(uuid)));
        }
        if !get32(52).is_power_of_two() || u64::from(get32(52)) < SECTOR {
            return Err(BitmapError::Region(get32(52)));
        }
        let (found, expected) = (get64(40), size / SECTOR);
        if found < expected {
            return Err(BitmapError::Size { found, expected });
        }
        let header = Self {
            array,
            events: get64(24),
            events_cleared: get64(32),
            sync_size: expected,
            stale: get32(48) & STATE_STALE != 0,
            region: u64::from(get32(52)),
            daemon_sleep: get32(56),
            write_behind: get32(60),
            sectors_reserved: get32(64),
        };
        if header.regions() > MOST_REGIONS || header.bytes() as u64 > room {
            return Err(BitmapError::TooLarge(header.regions()));
        }
        Ok(header)
    }

    fn encode(&self, out: &mut [u8]) {
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(4, &VERSION.to_le_bytes());
        put(8, self.array.as_bytes());
        put(24, &self.events.to_le_bytes());
        put(32, &self.events_cleared.to_le_bytes());
        put(40, &self.sync_size.to_le_bytes());
        put(48, &if self.stale { STATE_STALE } else { 0 }.to_le_bytes());
        put(52, &(self.region as u32).to_le_bytes());
        put(56, &self.daemon_sleep.to_le_bytes());
        put(60, &self.write_behind.to_le_bytes());
        put(64, &self.sectors_reserved.to_le_bytes());
    }

    /// Regions in the array.
    #[must_use]
    pub fn regions(&self) -> u64 {
        (u128::from(self.sync_size) * u128::from(SECTOR)).div_ceil(u128::from(self.region)) as u64
    }

    /// Bytes on a member, in whole pages.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (HEADER + self.regions().div_ceil(8) as usize).next_multiple_of(PAGE)
    }
}

/// One region's state in memory.
#[derive(Debug, Clone, Copy, Default)]
struct Region {
    /// Writers under way.
    writers: u32,
    /// The bit as the next write of its page has it.
    set: bool,
    /// The bit is 1 on stable storage of every live member.
    durable: bool,
    /// A writer came since the last look for idle regions.
    touched: bool,
}

/// A set of regions that [`Intent::idle`] found, to be cleared once all members have been flushed.
#[derive(Debug, Default)]
pub struct Idle(Vec<usize>);

impl Idle {
    /// Whether there is nothing to clear.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The bitmap in memory: which regions have writers, which bits are set, which are known to be durable.
#[derive(Debug)]
pub struct Intent {
    header: BitmapHeader,
    regions: Vec<Region>,
    /// Pages whose bits changed since they were last taken for writing.
    changed: Vec<bool>,
}

impl Intent {
    /// A bitmap with every bit as `set` says and none known to be durable.
    #[must_use]
    pub fn new(header: BitmapHeader, set: bool) -> Self {
        let regions = vec![Region { set, ..Region::default() }; header.regions() as usize];
        let pages = header.bytes() / PAGE;
        Self { header, regions, changed: vec![false; pages] }
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &BitmapHeader {
        &self.header
    }

    /// Notes the event count that goes with the next writing of the first page, which is due now.
    pub fn set_events(&mut self, events: u64) {
        self.header.events = events;
        self.header.stale = false;
        self.changed[0] = true;
    }

    /// Adds the bits of one member's bitmap (all of its bytes, header included). A bit becomes set where any member
    /// has it, and counts as durable only where all have it; call [`Intent::settle`] after the last one.
    pub fn merge(&mut self, bytes: &[u8], first: bool) {
        for (number, region) in self.regions.iter_mut().enumerate() {
            let bit = bytes.get(HEADER + number / 8).is_some_and(|byte| byte >> (number % 8) & 1 == 1);
            region.durable = bit && (first || region.durable);
            region.set |= bit;
        }
    }

    /// Follows the array to a larger size: `added` is what is new, and dirty. Regions become larger until their bits fit
    /// into `room` bytes; one that any dirty region was merged into is dirty. No writer is under way. Nothing counts as
    /// durable until all pages have been written again.
    pub fn grow(&mut self, added: &Range<u64>, room: u64) -> Result<(), BitmapError> {
        debug_assert!(self.regions.iter().all(|region| region.writers == 0));
        let mut header = BitmapHeader { sync_size: added.end / SECTOR, ..self.header.clone() };
        while header.regions() > MOST_REGIONS || header.bytes() as u64 > room {
            header.region *= 2;
            if header.region >= REGIONS.end {
                return Err(BitmapError::TooLarge(header.regions()));
            }
        }
        header.sectors_reserved = header.sectors_reserved.max((header.bytes() as u64 / SECTOR) as u32);
        let mut grown = Self::new(header, false);
        for range in self.dirty_ranges().chain([added.clone()]) {
            for number in grown.numbers(&range) {
                grown.regions[number].set = true;
            }
        }
        // Whoever looked for idle regions before knows them by numbers that mean something else now.
        grown.regions.iter_mut().for_each(|region| region.touched = true);
        grown.changed.fill(true);
        *self = grown;
        Ok(())
    }

    /// Marks pages that some member lacks a bit of, so that they are written before long.
    pub fn settle(&mut self) {
        for number in 0..self.regions.len() {
            if self.regions[number].set && !self.regions[number].durable {
                self.changed[page_of(number)] = true;
            }
        }
    }

    /// Sets every bit; none is durable then that was not before.
    pub fn set_all(&mut self) {
        self.regions.iter_mut().for_each(|region| region.set = true);
        self.settle();
    }

    /// Lowers the bits of all regions without writers that `keep` does not hold back. Everything has been flushed.
    pub fn clear_settled(&mut self, keep: impl Fn(Range<u64>) -> bool) {
        for number in 0..self.regions.len() {
            let range = self.range_of(number);
            let region = &mut self.regions[number];
            if region.set && region.writers == 0 && !keep(range) {
                region.set = false;
                region.durable = false;
                self.changed[page_of(number)] = true;
            }
        }
        self.note_cleared();
    }

    /// Some member's pages are not known to hold what they should: no bit counts as durable until all pages have
    /// been written again.
    pub fn distrust(&mut self) {
        self.regions.iter_mut().for_each(|region| region.durable = false);
        self.changed.fill(true);
    }

    /// Lowers every bit in memory: the array was stopped cleanly and whole, its bits mean nothing.
    pub fn clear_all(&mut self) {
        for region in &mut self.regions {
            region.set = false;
            region.durable = false;
        }
        self.note_cleared();
        self.changed.fill(true);
    }

    /// Counts a writer of the byte range in. Returns whether its bits are durable already; if not, they are set now,
    /// and data may be written only after the pages have been. Cost: a few instructions a region.
    #[must_use]
    pub fn begin(&mut self, range: &Range<u64>) -> bool {
        let mut durable = true;
        for number in self.numbers(range) {
            let region = &mut self.regions[number];
            region.writers += 1;
            region.touched = true;
            if !region.set {
                region.set = true;
                self.changed[page_of(number)] = true;
            }
            durable &= region.durable;
        }
        durable
    }

    /// Whether any bit of the range is set.
    #[must_use]
    pub fn is_dirty(&self, range: &Range<u64>) -> bool {
        self.numbers(range).any(|number| self.regions[number].set)
    }

    /// Whether all bits of the range are durable.
    #[must_use]
    pub fn is_durable(&self, range: &Range<u64>) -> bool {
        self.numbers(range).all(|number| self.regions[number].durable)
    }

    /// Counts a writer out.
    pub fn end(&mut self, range: &Range<u64>) {
        for number in self.numbers(range) {
            self.regions[number].writers -= 1;
        }
    }

    /// Regions that are set and had no writer since the last look; starts the next look. `keep` says which byte
    /// ranges must stay dirty (not resynced yet).
    pub fn idle(&mut self, keep: impl Fn(Range<u64>) -> bool) -> Idle {
        let mut idle = Vec::new();
        for number in 0..self.regions.len() {
            let range = self.range_of(number);
            let region = &mut self.regions[number];
            if region.set && region.writers == 0 && !region.touched && !keep(range) {
                idle.push(number);
            }
            region.touched = false;
        }
        Idle(idle)
    }

    /// Lowers the bits of regions that are still idle, after a flush of all members that began when
    /// [`Intent::idle`] had returned. Their pages are to be written, at leisure.
    pub fn clear(&mut self, idle: &Idle, keep: impl Fn(Range<u64>) -> bool) {
        for &number in &idle.0 {
            let range = self.range_of(number);
            let region = &mut self.regions[number];
            if region.writers == 0 && !region.touched && !keep(range) {
                region.set = false;
                region.durable = false;
                self.changed[page_of(number)] = true;
            }
        }
        self.note_cleared();
    }

    /// From here on the bits do not tell what a member that left earlier lacks; the header, which says so, is written
    /// before them.
    fn note_cleared(&mut self) {
        self.header.events_cleared = self.header.events;
        self.changed[0] = true;
    }

    /// Takes the pages to write: (offset in the bitmap, bytes). Until [`Intent::written`], their bits count as not
    /// durable where they were not.
    pub fn take_changed(&mut self) -> Vec<(usize, Vec<u8>)> {
        let changed: Vec<usize> = (0..self.changed.len()).filter(|&page| self.changed[page]).collect();
        self.changed.fill(false);
        changed.into_iter().map(|page| (page * PAGE, self.encode_page(page))).collect()
    }

    /// Every page, for members that never had them.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        (0..self.changed.len()).flat_map(|page| self.encode_page(page)).collect()
    }

    /// The pages taken before are durable on all live members.
    pub fn written(&mut self, pages: &[(usize, Vec<u8>)]) {
        for (offset, bytes) in pages {
            for number in regions_of(offset / PAGE, self.regions.len()) {
                let (byte, bit) = place_of(number);
                if bytes[byte % PAGE] >> bit & 1 == 1 && self.regions[number].set {
                    self.regions[number].durable = true;
                }
            }
        }
    }

    /// Writing the pages failed: they are to be written again before anything may rely on them.
    pub fn unwritten(&mut self, pages: &[(usize, Vec<u8>)]) {
        for (offset, _) in pages {
            self.changed[offset / PAGE] = true;
        }
    }

    /// Bits that are set.
    #[must_use]
    pub fn dirty(&self) -> u64 {
        self.regions.iter().filter(|region| region.set).count() as u64
    }

    /// The byte ranges whose bits are set.
    pub fn dirty_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        (0..self.regions.len()).filter(|&number| self.regions[number].set).map(|number| self.range_of(number))
    }

    fn numbers(&self, range: &Range<u64>) -> Range<usize> {
        if range.is_empty() {
            return 0..0;
        }
        let first = range.start / self.header.region;
        let end = range.end.div_ceil(self.header.region).min(self.regions.len() as u64);
        first as usize..end as usize
    }

    fn range_of(&self, number: usize) -> Range<u64> {
        let start = number as u64 * self.header.region;
        start..(start + self.header.region).min(self.header.sync_size * SECTOR)
    }

    fn encode_page(&self, page: usize) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        if page == 0 {
            self.header.encode(&mut bytes);
        }
        for number in regions_of(page, self.regions.len()) {
            if self.regions[number].set {
                let (byte, bit) = place_of(number);
                bytes[byte % PAGE] |= 1 << bit;
            }
        }
        bytes
    }
}

/// Byte (from the bitmap's start) and bit of a region.
fn place_of(number: usize) -> (usize, usize) {
    (HEADER + number / 8, number % 8)
}

fn page_of(number: usize) -> usize {
    place_of(number).0 / PAGE
}

/// The regions whose bits a page holds.
fn regions_of(page: usize, count: usize) -> Range<usize> {
    let first = (page * PAGE).saturating_sub(HEADER) * 8;
    let end = ((page + 1) * PAGE - HEADER) * 8;
    first.min(count)..end.min(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: u64 = DEFAULT_REGION;

    fn intent(regions: u64) -> Intent {
        Intent::new(BitmapHeader::new(Uuid::from_u128(7), regions * REGION, 5), false)
    }

    fn commit(intent: &mut Intent) -> usize {
        let pages = intent.take_changed();
        intent.written(&pages);
        pages.len()
    }

    #[test]
    fn a_bit_is_durable_only_after_its_page_was_written() {
        let mut intent = intent(100);
        let range = REGION - 1..REGION + 1;
        assert!(!intent.begin(&range));
        let pages = intent.take_changed();
        assert_eq!(pages.len(), 1);
        assert_eq!(pages[0].1[HEADER], 0b11);
        assert!(!intent.is_durable(&range));
        intent.written(&pages);
        assert!(intent.is_durable(&range));
        assert!(intent.begin(&range), "a write into a dirty region costs nothing");
        assert_eq!(intent.take_changed().len(), 0);
        intent.end(&range);
        intent.end(&range);
    }

    #[test]
    fn a_bit_set_while_its_page_was_under_way_needs_another_write() {
        let mut intent = intent(100);
        let (first, second) = (0..1, REGION..REGION + 1);
        assert!(!intent.begin(&first));
        let pages = intent.take_changed();
        assert!(!intent.begin(&second));
        intent.written(&pages);
        assert!(intent.is_durable(&first) && !intent.is_durable(&second));
        assert_eq!(commit(&mut intent), 1);
        assert!(intent.is_durable(&second));
    }

    #[test]
    fn bits_are_cleared_only_when_idle_for_a_whole_look() {
        let mut intent = intent(100);
        let range = 0..1;
        assert!(!intent.begin(&range));
        commit(&mut intent);
        assert!(intent.idle(|_| false).is_empty(), "a writer is under way");
        intent.end(&range);
        assert!(!intent.idle(|_| false).is_empty());
        assert!(intent.idle(|_| true).is_empty(), "not resynced yet");
        let idle = intent.idle(|_| false);
        assert!(intent.begin(&range));
        intent.end(&range);
        intent.clear(&idle, |_| false);
        assert_eq!(intent.dirty(), 1, "a writer came between the look and the flush");
        assert!(intent.idle(|_| false).is_empty());
        let idle = intent.idle(|_| false);
        intent.clear(&idle, |_| false);
        assert_eq!(intent.dirty(), 0);
        assert!(!intent.begin(&range), "cleared means not durable");
    }

    #[test]
    fn pages_hold_the_bits_where_md_puts_them() {
        let mut intent = intent(40_000);
        assert_eq!(intent.header().bytes(), 2 * PAGE);
        let first_of_second_page = (PAGE - HEADER) as u64 * 8;
        let range = first_of_second_page * REGION..first_of_second_page * REGION + 1;
        assert!(!intent.begin(&range));
        let pages = intent.take_changed();
        assert_eq!((pages.len(), pages[0].0, pages[0].1[0]), (1, PAGE, 1));
        let bytes = intent.encode();
        let header = BitmapHeader::decode(&bytes, Uuid::from_u128(7), 40_000 * REGION, 1 << 20).unwrap();
        assert_eq!(&header, intent.header());
        let mut again = Intent::new(header, false);
        again.merge(&bytes, true);
        again.settle();
        assert_eq!(again.dirty_ranges().collect::<Vec<_>>(), vec![range.start..range.start + REGION]);
        assert!(again.is_durable(&range));
        again.merge(&vec![0; bytes.len()], false);
        assert!(!again.is_durable(&range), "one member lacks it");
        assert_eq!(again.dirty(), 1, "and yet it is dirty");
    }

    #[test]
    fn regions_grow_until_they_fit() {
        let header = BitmapHeader::new(Uuid::nil(), 1 << 50, 1);
        assert!(header.regions() <= MAX_REGIONS);
        assert!(header.bytes() <= 128 * 1024 + PAGE);
    }

    #[test]
    fn regions_are_as_asked_or_refused() {
        let asked = |size, region| BitmapHeader::asked(Uuid::nil(), size, 1, region);
        let header = asked((1 << 30) + 512, 4096).unwrap();
        assert_eq!((header.region, header.regions(), header.bytes()), (4096, (1 << 18) + 1, 9 * PAGE));
        assert_eq!(asked(1 << 40, 1 << 31).unwrap().regions(), 512);
        for region in [0, 512, 2048, 4097, 3 << 20, 1 << 32] {
            assert_eq!(asked(1 << 30, region), Err(BitmapError::RegionAsked(region)));
        }
        let (size, region) = ((1 << 40) + 1, 1 << 16);
        let least = 1 << 17;
        assert_eq!(asked(size, region), Err(BitmapError::RegionTooSmall { region, size, least }));
        assert!(asked(size, least).is_ok() && asked(size - 1, region).is_ok());
    }

    #[test]
    fn a_larger_array_starts_dirty_where_it_is_new() {
        let mut intent = intent(100);
        let dirty = 3 * REGION..3 * REGION + 1;
        assert!(!intent.begin(&dirty));
        intent.end(&dirty);
        commit(&mut intent);
        let idle = intent.idle(|_| false);
        // From the middle of a region on: the array had no more.
        intent.grow(&(100 * REGION - 512..150 * REGION), PAGE as u64).unwrap();
        assert_eq!(intent.header().sync_size * SECTOR, 150 * REGION);
        let ranges: Vec<_> = intent.dirty_ranges().collect();
        assert_eq!(ranges.len(), 1 + 51);
        assert_eq!((ranges[0].start, ranges[1].start), (3 * REGION, 99 * REGION));
        assert!(!intent.is_durable(&dirty), "the pages have not been written");
        intent.clear(&idle, |_| false);
        assert_eq!(intent.dirty(), 52, "who looked before it grew knows nothing now");
        assert_eq!(commit(&mut intent), 1);
        assert!(intent.is_durable(&dirty) && intent.is_durable(&(99 * REGION..150 * REGION)));
    }

    #[test]
    fn regions_are_merged_where_the_room_is_too_small() {
        let mut intent = intent(30_000);
        for number in [5, 6, 29_999] {
            let range = number * REGION..number * REGION + 1;
            assert!(!intent.begin(&range));
            intent.end(&range);
        }
        let (old, new) = (30_000 * REGION, 100_000 * REGION);
        intent.grow(&(old..new), PAGE as u64).unwrap();
        let region = intent.header().region;
        assert_eq!((region, intent.header().bytes()), (4 * REGION, PAGE));
        let ranges: Vec<_> = intent.dirty_ranges().take(3).collect();
        let whole = |number: u64| number * region..(number + 1) * region;
        assert_eq!(ranges, [whole(1), whole(7_499), whole(7_500)]);
        assert_eq!(intent.dirty(), 2 + 17_500);
        let before = intent.encode();
        let most = (1 << 31) * (PAGE - HEADER) as u64 * 8;
        assert!(matches!(intent.grow(&(new..most + 512), PAGE as u64), Err(BitmapError::TooLarge(_))));
        assert!(intent.encode() == before, "refused, and nothing changed");
        intent.grow(&(new..most), PAGE as u64).unwrap();
    }

    #[test]
    fn a_bitmap_of_a_larger_array_tells_of_the_smaller_one() {
        let mut grown = intent(100);
        let dirty = 7 * REGION..7 * REGION + 1;
        assert!(!grown.begin(&dirty));
        grown.end(&dirty);
        grown.grow(&(100 * REGION..90_000 * REGION), 1 << 20).unwrap();
        let bytes = grown.encode();
        let array = Uuid::from_u128(7);
        let header = BitmapHeader::decode(&bytes, array, 100 * REGION, PAGE as u64).unwrap();
        assert_eq!((header.regions(), header.bytes()), (100, PAGE));
        let mut read = Intent::new(header, false);
        read.merge(&bytes[..PAGE], true);
        assert_eq!(read.dirty_ranges().collect::<Vec<_>>(), vec![7 * REGION..8 * REGION]);
        let larger = BitmapHeader::decode(&bytes, array, 90_000 * REGION + 512, 1 << 20);
        assert!(matches!(larger, Err(BitmapError::Size { .. })), "what it does not know may be dirty");
    }

    #[test]
    fn damaged_headers_are_refused() {
        let size = 100 * REGION;
        let good = intent(100).encode();
        let array = Uuid::from_u128(7);
        let refusal = |at: usize, byte: u8| {
            let mut page = good.clone();
            page[at] = byte;
            BitmapHeader::decode(&page, array, size, 1 << 20).unwrap_err()
        };
        assert_eq!(refusal(0, 0), BitmapError::Magic);
        assert_eq!(refusal(4, 5), BitmapError::Version(5));
        assert!(matches!(refusal(8, 9), BitmapError::Foreign(_)));
        assert!(matches!(refusal(52, 1), BitmapError::Region(_)));
        assert!(matches!(refusal(40 + 2, 0), BitmapError::Size { .. }));
        assert!(matches!(BitmapHeader::decode(&good, array, size, 256), Err(BitmapError::TooLarge(100))));
        assert_eq!(BitmapHeader::decode(&[], array, size, 256), Err(BitmapError::Magic));
    }
}
