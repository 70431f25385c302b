//! Making arrays: superblocks, bitmaps and empty bad-block logs on new members, and image files to put them on.
//!
//! What a member looks like afterwards (offsets from its start):
//!
//! ```text
//!   4 KiB   superblock
//!   8 KiB   bitmap, whole pages
//!   then    bad-block log, 4 KiB, empty
//!   then    room that md leaves alone: our two records, 16 KiB each (`record`), and room for checksums of 1/1024
//!           of the data area
//!   data_offset, a multiple of 1 MiB
//! ```
//!
//! An array without a bitmap leaves the bitmap's place empty: `mdadm --grow --bitmap=internal` can put one there later.
//!
//! The superblock is written last: a power cut before leaves no array, not half of one. On members that are all one
//! hole, or with `assume_clean`, the copies are equal from the start; otherwise all regions start dirty and the first
//! one to serve the array makes them equal, but for what was never written: that can wait until it is.

use crate::bitmap::{BitmapHeader, Intent};
use crate::device::{Device, Durability, ZeroMode, buffer, is_one_hole};
use crate::error::{Error, Operation, Result};
use crate::geometry::{Geometry, Layout};
use crate::member::read_superblock;
use crate::range_set::RangeSet;
use crate::record::{Granules, History, RECORDS_BYTES, Record};
use crate::runtime::Runtime;
use crate::superblock::{
    BadBlockLog, CLEAN, SECTOR, SUPER_BYTES, SUPER_OFFSET, Superblock, initial_roles, timestamp,
};
use bytes::Bytes;
use futures_util::future::try_join_all;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

/// The data area starts at a multiple of this.
const ALIGN: u64 = 1 << 20;
/// The bad-block log's bytes.
const BAD_BLOCK_LOG: u64 = 4096;
/// One byte of checksums for so many of data.
const DATA_PER_CHECKSUM_BYTE: u64 = 1024;
/// How far into a device, and how far from its end, creation looks for data in the way.
const LOOK: u64 = 1 << 20;
const LOOK_END: u64 = 128 << 10;

/// How to make an array.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Its name, 1 to 32 bytes.
    pub name: String,
    /// How copies are laid out.
    pub layout: Layout,
    /// Bytes a chunk.
    pub chunk: u64,
    /// Whether and how what is being written is noted.
    pub bitmap: Bitmap,
    /// Whether the members' data areas are known to be equal already.
    pub assume_clean: bool,
    /// Whether data and superblocks on the members may be destroyed.
    pub force: bool,
}

/// The write-intent bitmap of a new array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bitmap {
    /// On the members: after an unclean stop only what was being written is made equal.
    Internal {
        /// Bytes of the array that one bit stands for, a power of two from 4 KiB to 2 GiB; chosen by the array's size
        /// if not given.
        region: Option<u64>,
    },
    /// None: no writes for it, and after an unclean stop the whole array is made equal.
    None,
}

impl Bitmap {
    /// What everybody uses who has no reason not to.
    pub const STANDARD: Self = Self::Internal { region: None };

    /// The header for an array of `size` bytes. Without a bitmap: the one that its place is kept for.
    fn header(self, array: Uuid, size: u64, events: u64) -> Result<BitmapHeader> {
        match self {
            Self::Internal { region: Some(region) } => {
                BitmapHeader::asked(array, size, events, region).map_err(Error::BitmapAsked)
            }
            Self::Internal { region: None } | Self::None => Ok(BitmapHeader::new(array, size, events)),
        }
    }
}

/// Makes an array of `members`, in slot order, and returns its identity. All is durable when this returns.
pub async fn create(
    members: &[Arc<dyn Device>],
    options: &CreateOptions,
    runtime: &dyn Runtime,
) -> Result<Uuid> {
    create_with_spares(members, &[], options, runtime).await
}

/// The same, with devices that wait to take the place of a member that fails.
pub async fn create_with_spares(
    members: &[Arc<dyn Device>],
    spares: &[Arc<dyn Device>],
    options: &CreateOptions,
    runtime: &dyn Runtime,
) -> Result<Uuid> {
    let all: Vec<Arc<dyn Device>> = members.iter().chain(spares).map(Arc::clone).collect();
    let name = &options.name;
    if name.is_empty() || name.len() > 32 || name.contains(|c: char| c.is_control() || c == '/') {
        return Err(Error::Name(name.clone()));
    }
    let plan =
        Plan::new(&all, members.len(), options, random_uuid(runtime), timestamp(runtime.wall_clock()))?;
    let are_holes = try_join_all(all.iter().map(|member| is_hole(member.as_ref()))).await?;
    if !options.force {
        let used = all.iter().zip(&are_holes).filter(|(_, is_hole)| !**is_hole);
        try_join_all(used.map(|(member, _)| refuse_data(member.as_ref()))).await?;
    }
    // A spare may be blank or not, whatever the members are.
    let holes = are_holes[..members.len()].iter().all(|&is_hole| is_hole);
    let equal = options.assume_clean || holes;
    let mut intent = Intent::new(plan.bitmap.clone(), false);
    if !equal {
        intent.set_all();
    }
    let bitmap = plan.has_bitmap.then(|| Bytes::from(intent.encode()));
    let mut generation = [0; 8];
    runtime.fill_random(&mut generation);
    let mut history = History::default();
    history.begin(u64::from_le_bytes(generation), 1);
    history.confirm();
    // Copies that were promised to be equal are taken as they are: what they hold was written, if not by us.
    let is_new = !options.assume_clean;
    let record = Record {
        sequence: 0,
        superblock: Box::new([0; SUPER_BYTES]),
        blank: holes,
        untouched: Granules::new(plan.geometry.size(), plan.bitmap.region, is_new),
        history,
        bad: RangeSet::default(),
    };
    let writes = all.iter().zip(are_holes).enumerate().map(|(number, (member, is_hole))| {
        let superblock = plan.superblock(number, member.size(), random_uuid(runtime), equal);
        let (bitmap, record) = (bitmap.clone(), record.clone());
        async move { write_member(member.as_ref(), &superblock, bitmap, record, is_hole).await }
    });
    try_join_all(writes).await?;
    Ok(plan.array)
}

/// Makes a sparse file of `size` bytes at `path`, where nothing may exist. File and name are durable afterwards.
pub fn make_image(path: &Path, size: u64) -> Result<()> {
    let failed = |e: &std::io::Error| Error::Io {
        device: path.display().to_string(),
        operation: Operation::Open,
        at: 0,
        len: size,
        errno: rustix::io::Errno::from_io_error(e).unwrap_or(rustix::io::Errno::IO),
    };
    let file = File::options().read(true).write(true).create_new(true).open(path).map_err(|e| failed(&e))?;
    let sized = file.set_len(size).and_then(|()| file.sync_all());
    if let Err(e) = sized {
        // What was made here is taken away again; that this may fail too changes nothing for the caller.
        drop(std::fs::remove_file(path));
        return Err(failed(&e));
    }
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|e| failed(&e))
}

/// Everything the members have in common.
struct Plan {
    array: Uuid,
    name: String,
    created: u64,
    geometry: Geometry,
    /// Its place is kept on members in any case.
    bitmap: BitmapHeader,
    has_bitmap: bool,
    data_offset: u64,
}

impl Plan {
    /// For an array of `count` members; `devices` are those and the spares.
    fn new(
        devices: &[Arc<dyn Device>],
        count: usize,
        options: &CreateOptions,
        array: Uuid,
        created: u64,
    ) -> Result<Self> {
        let smallest = devices.iter().min_by_key(|member| member.size()).ok_or(Error::NoMembers)?;
        let size = smallest.size() / SECTOR * SECTOR;
        // The layout, chunk and member count are refused first, whatever the sizes.
        let some_rows = options.chunk.saturating_mul(options.layout.copies() as u64);
        Geometry::new(options.layout, count, options.chunk, some_rows)?;
        // An upper bound of the array's size gives an upper bound of the bitmap's.
        let most = size.saturating_mul(count as u64);
        let bitmap_room = options.bitmap.header(array, most, 0)?.bytes() as u64;
        let before_checksums =
            SUPER_OFFSET + SUPER_BYTES as u64 + bitmap_room + BAD_BLOCK_LOG + RECORDS_BYTES;
        let data_offset = (before_checksums + size / DATA_PER_CHECKSUM_BYTE).next_multiple_of(ALIGN);
        let needed = data_offset + options.chunk * options.layout.copies() as u64;
        let usable = size.checked_sub(data_offset).filter(|_| size >= needed);
        let usable = usable.ok_or_else(|| Error::TooSmall {
            device: smallest.name().to_owned(),
            size: smallest.size(),
            needed,
        })?;
        let geometry = Geometry::new(options.layout, count, options.chunk, usable)?;
        let bitmap = options.bitmap.header(array, geometry.size(), 1)?;
        let (name, has_bitmap) = (options.name.clone(), options.bitmap != Bitmap::None);
        Ok(Self { array, name, created, geometry, bitmap, has_bitmap, data_offset })
    }

    fn superblock(&self, number: usize, device_bytes: u64, device: Uuid, equal: bool) -> Superblock {
        let bitmap_sectors = self.bitmap.bytes() as u64 / SECTOR;
        Superblock {
            array: self.array,
            name: self.name.clone(),
            created: self.created,
            layout: self.geometry.layout(),
            size: self.geometry.used() / SECTOR,
            chunk: (self.geometry.chunk() / SECTOR) as u32,
            raid_disks: self.geometry.members() as u32,
            bitmap_offset: self.has_bitmap.then_some(SUPER_SECTORS),
            data_offset: self.data_offset / SECTOR,
            data_size: (device_bytes - self.data_offset) / SECTOR,
            recovery: None,
            replacement: false,
            dev_number: number as u32,
            corrected: 0,
            device,
            devflags: 0,
            bad_block_log: Some(BadBlockLog {
                offset: SUPER_SECTORS + bitmap_sectors as i32,
                sectors: (BAD_BLOCK_LOG / SECTOR) as u16,
                shift: 0,
                in_use: false,
            }),
            updated: self.created,
            events: 1,
            resync_offset: if equal { CLEAN } else { 0 },
            roles: initial_roles(self.geometry.members()),
        }
    }
}

const SUPER_SECTORS: i32 = (SUPER_BYTES as u64 / SECTOR) as i32;

async fn write_member(
    member: &dyn Device,
    superblock: &Superblock,
    bitmap: Option<Bytes>,
    record: Record,
    is_hole: bool,
) -> Result<()> {
    if !is_hole {
        // Whatever else had its marks here (file systems, partition tables, md versions 0.90 and 1.0 at the end)
        // must not be found any more.
        let end = member.size() / SECTOR * SECTOR;
        let tail = end.saturating_sub(LOOK_END).max(superblock.data_start());
        member.write_zeroes(0, superblock.data_start(), ZeroMode::MayPunch, Durability::Cached).await?;
        member.write_zeroes(tail, end - tail, ZeroMode::MayPunch, Durability::Cached).await?;
        member.flush().await?;
    }
    if let (Some(at), Some(bitmap)) = (superblock.bitmap_start(), bitmap) {
        member.write(at, bitmap, Durability::Cached).await?;
    }
    if let Some(log) = superblock.bad_block_log {
        let at = SUPER_OFFSET.saturating_add_signed(i64::from(log.offset) * SECTOR as i64);
        let empty = Bytes::from(vec![0xff; BAD_BLOCK_LOG as usize]);
        member.write(at, empty, Durability::Cached).await?;
    }
    let bytes = superblock.encode();
    if let Some(at) = superblock.records_start() {
        let record = Record { superblock: Box::new(bytes), ..record };
        let bytes =
            record.encode().map_err(|cause| Error::Record { device: member.name().to_owned(), cause })?;
        member.write(at, Bytes::from(bytes), Durability::Cached).await?;
    }
    member.flush().await?;
    let bytes = Bytes::copy_from_slice(&bytes);
    member.write(SUPER_OFFSET, bytes, Durability::Stable).await
}

/// Refuses a device that holds a superblock, or data where one would look for it.
async fn refuse_data(member: &dyn Device) -> Result<()> {
    let holds = |what: String| Err(Error::HoldsData { device: member.name().to_owned(), what });
    if let Ok(superblock) = read_superblock(member).await {
        return holds(format!("a member of array `{}` ({})", superblock.name, superblock.array));
    }
    let size = member.size();
    let (head, tail) = (size.min(LOOK), size.saturating_sub(LOOK_END));
    for (at, len) in [(0, head), (tail, size - tail)] {
        let found = member.read(at, buffer(len as usize)).await?;
        if found.iter().any(|&byte| byte != 0) {
            return holds("data".to_owned());
        }
    }
    Ok(())
}

/// Whether the device is a file without any data in it.
async fn is_hole(member: &dyn Device) -> Result<bool> {
    let pieces = member.locate(0, member.size()).await?;
    Ok(pieces.is_some_and(|pieces| pieces.iter().all(|piece| is_one_hole(&piece.file))))
}

fn random_uuid(runtime: &dyn Runtime) -> Uuid {
    let mut bytes = [0; 16];
    runtime.fill_random(&mut bytes);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}
