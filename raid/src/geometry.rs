//! Where a byte of the array lies on its members: pure arithmetic, no I/O.
//!
//! The array is cut into chunks of `k` bytes, numbered from 0. Each chunk is stored `n·f` times: `n` *near* copies
//! beside each other and `f` *far* copies of the whole in another place. A member's data area is cut into rows of
//! one chunk each. In the pictures a column is a member, a line a row, a number the chunk that is stored there.
//!
//! ```text
//!  near 2, 4 members      near 2, 3 members     near 3, 4 members
//!    0  0  1  1             0  0  1               0  0  0  1
//!    2  2  3  3             1  2  2               1  1  2  2
//!                           3  3  4               2  3  3  3
//!
//!  far 2, 4 members       offset 2, 4 members
//!    0  1  2  3             0  1  2  3
//!    4  5  6  7             3  0  1  2      each row again, one member further
//!   ────────────            4  5  6  7
//!    3  0  1  2             7  4  5  6
//!    7  4  5  6   the whole again in the far half, one member further
//! ```
//!
//! *Near* numbers the cells of the array in reading order: copy `i` of chunk `c` is cell `c·n + i`. With an odd
//! number of members a chunk's copies may stand on two rows. *Far* reads like RAID 0 but writes far apart;
//! *offset* is in between. Near and far copies can be mixed: each far part then holds the near picture, moved on by
//! `n` members. md starts such arrays, though mdadm has no words to make one.
//!
//! What can be lost, with `r` copies on `N` members: any `r - 1` members, and at most `N - ⌈N/r⌉`. Between the two it
//! depends on which: [`Geometry::mirror_sets`].
//!
//! Invariants:
//! - the copies of a chunk lie on distinct members, and no two copies share a place;
//! - [`Geometry::chunk_at`] is the inverse of [`Geometry::place`]; a cell of an incomplete last stripe holds no chunk;
//! - every field was checked by [`Geometry::new`], so nothing here overflows or divides by zero afterwards.
//!
//! Source: the mapping of Linux md's raid10, checked against the real driver.

use std::fmt;
use std::str::FromStr;

/// Most members an array may have: the role table of a 4 KiB superblock ends there.
pub const MAX_MEMBERS: usize = 1920;
/// Smallest chunk in bytes.
pub const MIN_CHUNK: u64 = 4 << 10;
/// Largest chunk in bytes.
pub const MAX_CHUNK: u64 = 64 << 20;
/// Data areas larger than this (4 EiB) are not addressed, so that products of chunk numbers fit in 64 bits.
const MAX_USABLE: u64 = 1 << 62;

/// A member's place in the array, `0..members`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub usize);

/// The number of a chunk of the array, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chunk(pub u64);

/// A byte position in a member's data area (what comes on top of the member's `data_offset`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberOffset(pub u64);

/// How copies are laid out: Linux md's layout word `near | far << 8 | offset << 16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    near: u8,
    far: u8,
    offset: bool,
}

/// Why a layout or geometry is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The layout word has bits or counts that no array has.
    #[error("layout word {0:#x} is not a RAID 10 layout")]
    LayoutWord(u32),
    /// The text names no layout.
    #[error(
        "`{0}` is not a layout: write n2, f2 or o2 for two near, far or offset copies, n2f2 for two by two"
    )]
    LayoutText(String),
    /// More copies than members.
    #[error("layout {layout} keeps {copies} copies, which needs as many members; there are {members}")]
    TooFewMembers {
        /// The layout.
        layout: Layout,
        /// Copies it keeps of each chunk.
        copies: usize,
        /// Members given.
        members: usize,
    },
    /// More members than a superblock can name.
    #[error("{0} members are more than an array can have ({MAX_MEMBERS})")]
    TooManyMembers(usize),
    /// The chunk size is no power of two in range. Bytes.
    #[error("a chunk of {0} bytes is not a power of two from 4K to 64M")]
    ChunkSize(u64),
    /// The data areas hold not even one chunk. Bytes.
    #[error("a data area of {usable} bytes a member holds no chunk of {chunk} bytes")]
    NoRoom {
        /// Bytes a member offers.
        usable: u64,
        /// Bytes a chunk.
        chunk: u64,
    },
    /// The data areas are larger than can be addressed. Bytes.
    #[error("a data area of {0} bytes a member is beyond what can be addressed")]
    TooLarge(u64),
}

impl Layout {
    /// `copies` near copies, the layout nearly everybody uses with two.
    #[must_use]
    pub const fn near(copies: u8) -> Self {
        Self { near: copies, far: 1, offset: false }
    }

    /// `copies` far copies.
    #[must_use]
    pub const fn far(copies: u8) -> Self {
        Self { near: 1, far: copies, offset: false }
    }

    /// `copies` offset copies.
    #[must_use]
    pub const fn offset(copies: u8) -> Self {
        Self { near: 1, far: copies, offset: true }
    }

    /// `near` copies beside each other, all of that `far` times.
    #[must_use]
    pub const fn mixed(near: u8, far: u8) -> Self {
        Self { near, far, offset: false }
    }

    /// Decodes a superblock's layout word. Refuses what md's formula cannot map (near and offset mixed collides)
    /// and bits that we do not know.
    pub fn from_word(word: u32) -> Result<Self, GeometryError> {
        let (near, far, offset) = ((word & 0xff) as u8, (word >> 8 & 0xff) as u8, word >> 16);
        let layout = Self { near, far, offset: offset == 1 };
        if near == 0 || far == 0 || offset > 1 || (layout.offset && near > 1) || layout.copies() < 2 {
            return Err(GeometryError::LayoutWord(word));
        }
        Ok(layout)
    }

    /// The superblock's layout word.
    #[must_use]
    pub fn word(self) -> u32 {
        u32::from(self.near) | u32::from(self.far) << 8 | u32::from(self.offset) << 16
    }

    /// Whether later copies lie in another part of the members, which moves with their size.
    #[must_use]
    pub fn is_far(self) -> bool {
        self.far > 1 && !self.offset
    }

    /// Copies kept of each chunk.
    #[must_use]
    pub fn copies(self) -> usize {
        usize::from(self.near) * usize::from(self.far)
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.near, self.far, self.offset) {
            (near, 1, _) => write!(f, "near={near}"),
            (1, far, true) => write!(f, "offset={far}"),
            (1, far, false) => write!(f, "far={far}"),
            (near, far, _) => write!(f, "near={near},far={far}"),
        }
    }
}

impl FromStr for Layout {
    type Err = GeometryError;

    fn from_str(text: &str) -> Result<Self, GeometryError> {
        let refused = || GeometryError::LayoutText(text.to_owned());
        let copies = |digits: &str| -> Result<u8, GeometryError> {
            let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
            digits.parse().ok().filter(|&n| plain && n >= 2).ok_or_else(refused)
        };
        if let Some(near) = text.strip_prefix('n') {
            return match near.split_once('f') {
                Some((near, far)) => Ok(Self::mixed(copies(near)?, copies(far)?)),
                None => Ok(Self::near(copies(near)?)),
            };
        }
        if let Some(far) = text.strip_prefix('f') {
            return Ok(Self::far(copies(far)?));
        }
        Ok(Self::offset(copies(text.strip_prefix('o').ok_or_else(refused)?)?))
    }
}

/// Where one copy of a chunk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Which member.
    pub slot: Slot,
    /// First byte of the chunk in that member's data area.
    pub at: MemberOffset,
}

/// A part of a logical range that lies within one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The chunk.
    pub chunk: Chunk,
    /// First byte within the chunk.
    pub within: u64,
    /// First byte of the span in the array.
    pub at: u64,
    /// Bytes, at least 1.
    pub len: u64,
}

impl Span {
    /// The span in two parts, cut at a multiple of `unit` from its start; it must be longer than one.
    #[must_use]
    pub fn halves(self, unit: u64) -> [Self; 2] {
        let cut = (self.len / 2).next_multiple_of(unit);
        let second = Self { within: self.within + cut, at: self.at + cut, len: self.len - cut, ..self };
        [Self { len: cut, ..self }, second]
    }
}

/// The whole mapping of one array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    layout: Layout,
    members: u64,
    chunk: u64,
    /// Chunks in the array.
    chunks: u64,
    /// Rows each member uses.
    rows: u64,
    /// Rows between a far copy and the next.
    stride: u64,
}

impl Geometry {
    /// The geometry of `members` members that offer `usable` bytes each, in chunks of `chunk` bytes.
    pub fn new(layout: Layout, members: usize, chunk: u64, usable: u64) -> Result<Self, GeometryError> {
        if members > MAX_MEMBERS {
            return Err(GeometryError::TooManyMembers(members));
        }
        if layout.copies() > members {
            return Err(GeometryError::TooFewMembers { layout, copies: layout.copies(), members });
        }
        if !chunk.is_power_of_two() || !(MIN_CHUNK..=MAX_CHUNK).contains(&chunk) {
            return Err(GeometryError::ChunkSize(chunk));
        }
        if usable > MAX_USABLE {
            return Err(GeometryError::TooLarge(usable));
        }
        // 128 bits: 2^50 rows times 1920 members fits in 64, but the intention is easier to see than to prove.
        let (near, far) = (u128::from(layout.near), u128::from(layout.far));
        let (count, depth) = (members as u128, u128::from(usable / chunk));
        let chunks = depth / far * count / near;
        let rows = (chunks * near * far).div_ceil(count);
        let size = chunks * u128::from(chunk);
        if chunks == 0 {
            return Err(GeometryError::NoRoom { usable, chunk });
        }
        if size > u128::from(MAX_USABLE) {
            return Err(GeometryError::TooLarge(usable));
        }
        let stride = if layout.offset { 1 } else { rows / far };
        Ok(Self {
            layout,
            members: members as u64,
            chunk,
            chunks: chunks as u64,
            rows: rows as u64,
            stride: stride as u64,
        })
    }

    /// The layout.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// How many members.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members as usize
    }

    /// Bytes a chunk.
    #[must_use]
    pub fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Bytes the array holds.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.chunks * self.chunk
    }

    /// Bytes used in each member's data area.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.rows * self.chunk
    }

    /// Copies of each chunk.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.layout.copies()
    }

    /// Where copy number `copy` (`0..copies`) of a chunk lies. Copies are numbered near ones first.
    #[must_use]
    pub fn place(&self, chunk: Chunk, copy: usize) -> Place {
        let near = u64::from(self.layout.near);
        let (i, j) = (copy as u64 % near, copy as u64 / near);
        let cell = chunk.0 * near;
        let (mut row, first) = (cell / self.members, cell % self.members);
        if self.layout.offset {
            row *= u64::from(self.layout.far);
        }
        let row = row + (first + i) / self.members + j * self.stride;
        let slot = ((first + i) % self.members + j * near) % self.members;
        Place { slot: Slot(slot as usize), at: MemberOffset(row * self.chunk) }
    }

    /// Every place of a chunk, in order of copy number.
    pub fn places(&self, chunk: Chunk) -> impl Iterator<Item = Place> + '_ {
        (0..self.copies()).map(move |copy| self.place(chunk, copy))
    }

    /// Every place of a chunk, in the order in which reads prefer them. `turn` moves on among near copies, which are
    /// equally good. Far and offset copies come last: the first ones alone are laid out like RAID 0, so that a
    /// sequential read goes through all members at once and never seeks between the parts of one.
    pub fn read_order(&self, chunk: Chunk, turn: u64) -> impl Iterator<Item = Place> + '_ {
        let near = u64::from(self.layout.near);
        (0..self.copies() as u64)
            .map(move |i| self.place(chunk, (i / near * near + (turn + i) % near) as usize))
    }

    /// Which chunk lies at a member's row, and which of its copies; `None` for a cell of an incomplete last stripe.
    #[must_use]
    pub fn chunk_at(&self, slot: Slot, row: u64) -> Option<(Chunk, usize)> {
        let (near, far) = (u64::from(self.layout.near), u64::from(self.layout.far));
        let (mut row, mut slot) = (row, slot.0 as u64);
        let mut copy = 0;
        if self.layout.offset {
            copy = row % far;
            row /= far;
            slot = (slot + self.members * far - copy * near) % self.members;
        } else {
            while far > 1 && row >= self.stride && copy + 1 < far {
                row -= self.stride;
                slot = (slot + self.members - near) % self.members;
                copy += 1;
            }
        }
        let cell = row * self.members + slot;
        let chunk = Chunk(cell / near);
        (chunk.0 < self.chunks).then_some((chunk, (copy * near + cell % near) as usize))
    }

    /// Cuts a logical range, which must lie within the array, at chunk borders.
    pub fn spans(&self, at: u64, len: u64) -> impl Iterator<Item = Span> + use<> {
        let chunk = self.chunk;
        let end = at + len;
        let mut next = at;
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let within = next % chunk;
            let span =
                Span { chunk: Chunk(next / chunk), within, at: next, len: (chunk - within).min(end - next) };
            next += span.len;
            Some(span)
        })
    }

    /// Which sets of members hold a chunk together: losing all members of one set loses data. Each set is sorted,
    /// and no set comes twice.
    #[must_use]
    pub fn mirror_sets(&self) -> Vec<Vec<Slot>> {
        let mut sets: Vec<Vec<Slot>> = (0..self.period().min(self.chunks))
            .map(|chunk| {
                let mut set: Vec<Slot> = self.places(Chunk(chunk)).map(|place| place.slot).collect();
                set.sort_unstable();
                set
            })
            .collect();
        sets.sort();
        sets.dedup();
        sets
    }

    /// Chunks after which the pattern of slots repeats.
    #[must_use]
    pub fn period(&self) -> u64 {
        let (mut a, mut b) = (self.members, u64::from(self.layout.near));
        while b != 0 {
            (a, b) = (b, a % b);
        }
        self.members / a
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const K: u64 = MIN_CHUNK;

    /// The member rows of a small array, as the pictures show them.
    fn grid(layout: Layout, members: usize, rows: u64) -> String {
        let geometry = Geometry::new(layout, members, K, rows * K).unwrap();
        (0..rows)
            .map(|row| {
                (0..members)
                    .map(|slot| {
                        geometry
                            .chunk_at(Slot(slot), row)
                            .map_or_else(|| "-".to_owned(), |(chunk, _)| chunk.0.to_string())
                    })
                    .collect::<Vec<_>>()
                    .join(" ")
            })
            .collect::<Vec<_>>()
            .join(" / ")
    }

    /// Each grid was read off the real md driver.
    #[test]
    fn grids_are_those_of_md() {
        assert_eq!(grid(Layout::near(2), 4, 2), "0 0 1 1 / 2 2 3 3");
        assert_eq!(grid(Layout::near(2), 3, 3), "0 0 1 / 1 2 2 / 3 3 4".replace('4', "-"));
        assert_eq!(grid(Layout::near(2), 3, 4), "0 0 1 / 1 2 2 / 3 3 4 / 4 5 5");
        assert_eq!(grid(Layout::near(2), 5, 2), "0 0 1 1 2 / 2 3 3 4 4");
        assert_eq!(grid(Layout::near(3), 4, 3), "0 0 0 1 / 1 1 2 2 / 2 3 3 3");
        assert_eq!(grid(Layout::near(3), 5, 3), "0 0 0 1 1 / 1 2 2 2 3 / 3 3 4 4 4");
        assert_eq!(grid(Layout::far(2), 4, 4), "0 1 2 3 / 4 5 6 7 / 3 0 1 2 / 7 4 5 6");
        assert_eq!(grid(Layout::far(2), 3, 4), "0 1 2 / 3 4 5 / 2 0 1 / 5 3 4");
        assert_eq!(grid(Layout::offset(2), 4, 4), "0 1 2 3 / 3 0 1 2 / 4 5 6 7 / 7 4 5 6");
        assert_eq!(grid(Layout::offset(2), 5, 2), "0 1 2 3 4 / 4 0 1 2 3");
        assert_eq!(grid(Layout::mixed(2, 2), 4, 2), "0 0 1 1 / 1 1 0 0");
        assert_eq!(grid(Layout::mixed(2, 2), 5, 4), "0 0 1 1 2 / 2 3 3 4 4 / 1 2 0 0 1 / 4 4 2 3 3");
    }

    /// md rounds the same way: whole chunks, a multiple of the far copies of them, then whole chunks of the array.
    #[test]
    fn sizes_are_those_of_md() {
        let sizes = |layout, members, rows| {
            let geometry = Geometry::new(layout, members, K, rows * K + K - 512).unwrap();
            (geometry.used() / K, geometry.size() / K)
        };
        assert_eq!(sizes(Layout::near(2), 3, 7), (7, 10));
        assert_eq!(sizes(Layout::near(3), 4, 7), (7, 9));
        assert_eq!(sizes(Layout::far(2), 3, 7), (6, 9));
        assert_eq!(sizes(Layout::far(3), 4, 7), (6, 8));
        assert_eq!(sizes(Layout::offset(2), 5, 7), (6, 15));
        assert_eq!(sizes(Layout::mixed(2, 2), 5, 7), (6, 7));
    }

    #[test]
    fn reads_take_turns_among_near_copies_and_never_prefer_far_ones() {
        let order = |layout, turn| {
            let geometry = Geometry::new(layout, 4, K, 64 * K).unwrap();
            geometry.read_order(Chunk(0), turn).map(|place| place.slot.0).collect::<Vec<_>>()
        };
        assert_eq!((order(Layout::near(2), 0), order(Layout::near(2), 1)), (vec![0, 1], vec![1, 0]));
        assert_eq!(order(Layout::near(3), 2), [2, 0, 1]);
        assert_eq!((order(Layout::far(2), 0), order(Layout::far(2), 1)), (vec![0, 1], vec![0, 1]));
        assert_eq!(order(Layout::offset(3), 5), [0, 1, 2]);
        assert_eq!(order(Layout::mixed(2, 2), 1), [1, 0, 3, 2]);
    }

    #[test]
    fn pairs_of_failures_survived() {
        let survived = |layout, members| {
            let sets = Geometry::new(layout, members, K, 64 * K).unwrap().mirror_sets();
            let mut count = 0;
            for a in 0..members {
                for b in a + 1..members {
                    let lost = |set: &Vec<Slot>| set.iter().all(|slot| slot.0 == a || slot.0 == b);
                    count += usize::from(!sets.iter().any(lost));
                }
            }
            count
        };
        assert_eq!(survived(Layout::near(2), 4), 4);
        assert_eq!(survived(Layout::far(2), 4), 2);
        assert_eq!(survived(Layout::offset(2), 4), 2);
        assert_eq!(survived(Layout::near(2), 5), 5);
        assert_eq!(survived(Layout::near(2), 3), 0);
    }

    #[test]
    fn layouts_that_collide_or_are_unknown_are_refused() {
        for word in [0, 1, 0x100, 0x101, 0x001, 0x10202, 0x20201, 0x40201, 0xff00_0102] {
            assert_eq!(Layout::from_word(word), Err(GeometryError::LayoutWord(word)), "{word:#x}");
        }
        for text in [
            "", "n", "n1", "n0", "x2", "n+2", "n 2", "n256", "2", "ñ2", "n2f", "n2f1", "f2n2", "n2o2",
            "n2f+2",
        ] {
            assert!(text.parse::<Layout>().is_err(), "{text}");
        }
        assert_eq!("n3".parse(), Ok(Layout::near(3)));
        assert_eq!("f2".parse(), Ok(Layout::far(2)));
        assert_eq!("o12".parse(), Ok(Layout::offset(12)));
        assert_eq!("n2f3".parse(), Ok(Layout::mixed(2, 3)));
        assert_eq!(Layout::offset(2).word(), 0x10201);
        assert!(Geometry::new(Layout::near(3), 2, K, K).is_err());
        assert!(Geometry::new(Layout::near(2), 2, K + 1, 8 * K).is_err());
        assert!(Geometry::new(Layout::near(2), 2, K, K - 1).is_err());
        assert!(Geometry::new(Layout::near(2), 2, K, u64::MAX).is_err());
    }

    /// Whether every chunk keeps a copy when the members in `lost`, a bit each, are gone.
    fn survives(sets: &[Vec<Slot>], lost: u32) -> bool {
        sets.iter().all(|set| set.iter().any(|slot| lost >> slot.0 & 1 == 0))
    }

    fn layouts() -> impl Strategy<Value = Layout> {
        prop_oneof![
            (2..6u8).prop_map(Layout::near),
            (2..6u8).prop_map(Layout::far),
            (2..6u8).prop_map(Layout::offset),
            (2..4u8, 2..4u8).prop_map(|(near, far)| Layout::mixed(near, far)),
        ]
    }

    proptest! {
        #[test]
        fn mapping_and_inverse_agree(layout in layouts(), extra in 0..8usize, rows in 8..80u64) {
            let members = layout.copies() + extra;
            let geometry = Geometry::new(layout, members, K, rows * K).unwrap();
            prop_assert_eq!(Layout::from_word(layout.word()), Ok(layout));
            let mut taken = BTreeSet::new();
            let sets = geometry.mirror_sets();
            for chunk in (0..geometry.size() / K).map(Chunk) {
                let mut slots = BTreeSet::new();
                for (copy, place) in geometry.places(chunk).enumerate() {
                    prop_assert!(place.at.0 + K <= geometry.used());
                    prop_assert!(taken.insert(place), "two copies at {:?}", place);
                    prop_assert!(slots.insert(place.slot), "two copies on {:?}", place.slot);
                    prop_assert_eq!(geometry.chunk_at(place.slot, place.at.0 / K), Some((chunk, copy)));
                }
                prop_assert!(sets.contains(&slots.into_iter().collect()));
            }
            prop_assert!(geometry.used() <= rows * K);
            // What md gets when it computes the array's size from the part of the members that is used.
            prop_assert_eq!(&Geometry::new(layout, members, K, geometry.used()).unwrap(), &geometry);
            // And every cell that holds a chunk is one of those.
            for slot in (0..members).map(Slot) {
                for row in 0..geometry.used() / K {
                    let place = Place { slot, at: MemberOffset(row * K) };
                    prop_assert_eq!(geometry.chunk_at(slot, row).is_some(), taken.contains(&place));
                }
            }
        }

        /// With r copies on N members any r - 1 may fail, some sets of N - ⌈N/r⌉, and none larger.
        #[test]
        fn survivable_sets(layout in layouts(), extra in 0..5usize) {
            let (copies, members) = (layout.copies(), layout.copies() + extra);
            let geometry = Geometry::new(layout, members, K, 64 * K).unwrap();
            let sets = geometry.mirror_sets();
            let mut most = 0;
            for lost in 0..1u32 << members {
                let count = lost.count_ones() as usize;
                let survived = survives(&sets, lost);
                prop_assert!(survived || count >= copies, "{:#b} lost with {} copies", lost, copies);
                // The mapping itself says the same.
                let mapped = (0..geometry.size() / K).map(Chunk).all(|chunk| {
                    geometry.places(chunk).any(|place| lost >> place.slot.0 & 1 == 0)
                });
                prop_assert_eq!(survived, mapped, "{:#b}", lost);
                if survived {
                    most = most.max(count);
                }
            }
            prop_assert_eq!(most, members - members.div_ceil(copies));
        }

        #[test]
        fn read_order_is_every_place_once(layout in layouts(), extra in 0..8usize, turn: u64, chunk in 0..50u64) {
            let geometry = Geometry::new(layout, layout.copies() + extra, K, 160 * K).unwrap();
            let order: BTreeSet<Place> = geometry.read_order(Chunk(chunk), turn).collect();
            prop_assert_eq!(order, geometry.places(Chunk(chunk)).collect::<BTreeSet<_>>());
        }

        #[test]
        fn spans_cover_the_range_in_order(at in 0..1u64 << 20, len in 0..1u64 << 18) {
            let geometry = Geometry::new(Layout::near(2), 3, K, 1 << 20).unwrap();
            let mut next = at;
            for span in geometry.spans(at, len) {
                prop_assert_eq!(span.at, next);
                prop_assert_eq!(span.chunk.0 * K + span.within, span.at);
                prop_assert!(span.len > 0 && span.within + span.len <= K);
                next += span.len;
            }
            prop_assert_eq!(next, at + len);
        }
    }
}
