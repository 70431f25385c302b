//! Input and output past the page cache (`O_DIRECT`): positions, lengths and memory have to be aligned there, and
//! requests need not be.
//!
//! What a request has besides whole blocks is read, changed and written back as whole blocks. Two such writes to one
//! device exclude each other, so that neighbours in a block never undo each other. Invariant asked of whoever writes:
//! a write of a whole block and a write of a part of the same block *overlap*, and are not in flight together. The
//! volume keeps it: it holds a range lock over all that a write touches.
//!
//! Costs: an aligned request goes as it is, without a lock or a copy; memory that is not aligned costs a copy; a part
//! of a block costs a read of the block more, one at a time.

use super::file::{Failed, read_exact, write_all};
use super::{Durability, buffer};
use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, StatxFlags};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;

/// What [`buffer`] aligns to, and so the largest block that can be had.
const MOST: u64 = 4096;
/// Bytes that are copied or zeroed at once.
const PIECE: usize = 1 << 20;

/// How a file wants to be read and written directly.
#[derive(Debug)]
pub(super) struct Direct {
    /// Positions and lengths are multiples of this: 512 or 4096.
    block: u64,
    /// Memory begins at multiples of this; not more than [`MOST`].
    memory: usize,
    /// Held over a read, change and write of parts of blocks.
    partial: Mutex<()>,
}

impl Direct {
    /// What an open file needs; `OPNOTSUPP` if it cannot be had.
    pub(super) fn of(file: &File) -> Result<Self, Errno> {
        let stat =
            match rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE | StatxFlags::DIOALIGN) {
                // Containers may forbid the call: then as if it knew nothing.
                Err(Errno::NOSYS | Errno::PERM) => None,
                other => Some(other?),
            };
        // Since Linux 6.1 the kernel tells, but not every file system.
        let told =
            stat.filter(|stat| StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN));
        let (block, memory) = if let Some(told) = told {
            (u64::from(told.stx_dio_offset_align), u64::from(told.stx_dio_mem_align))
        } else if FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) == FileType::BlockDevice {
            (u64::from(rustix::fs::ioctl_blksszget(file)?), MOST)
        } else {
            (MOST, MOST)
        };
        Self::with(block, memory)
    }

    fn with(block: u64, memory: u64) -> Result<Self, Errno> {
        // 0 says that there is no direct access to this file.
        let fits = |align: u64| align.is_power_of_two() && align <= MOST;
        if !fits(block) || !fits(memory) {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(Self { block: block.max(512), memory: memory as usize, partial: Mutex::new(()) })
    }

    /// The whole blocks of a file of `size` bytes: the rest cannot be reached.
    pub(super) fn reachable(&self, size: u64) -> u64 {
        size / self.block * self.block
    }

    fn blocks(&self, at: u64, len: usize) -> Range<u64> {
        at / self.block * self.block..(at + len as u64).next_multiple_of(self.block)
    }

    fn is_aligned(&self, at: u64, bytes: &[u8]) -> bool {
        at.is_multiple_of(self.block)
            && (bytes.len() as u64).is_multiple_of(self.block)
            && (bytes.as_ptr() as usize).is_multiple_of(self.memory)
    }

    /// Fills `out` from `at`.
    pub(super) fn read(&self, file: &File, at: u64, out: &mut [u8]) -> Result<(), Errno> {
        if self.is_aligned(at, out) {
            return read_exact(file, at, out);
        }
        let mut at = at;
        for part in out.chunks_mut(PIECE) {
            let blocks = self.blocks(at, part.len());
            let mut whole = buffer((blocks.end - blocks.start) as usize);
            read_exact(file, blocks.start, &mut whole)?;
            let skip = (at - blocks.start) as usize;
            part.copy_from_slice(&whole[skip..skip + part.len()]);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes `data` at `at`.
    pub(super) fn write(
        &self,
        file: &File,
        at: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<(), Failed> {
        if self.is_aligned(at, data) {
            return write_all(file, at, data, durability);
        }
        let whole_blocks = at.is_multiple_of(self.block) && (data.len() as u64).is_multiple_of(self.block);
        let _alone = (!whole_blocks).then(|| self.partial.lock());
        let mut at = at;
        for part in data.chunks(PIECE) {
            let blocks = self.blocks(at, part.len());
            let mut whole = buffer((blocks.end - blocks.start) as usize);
            let (first, end) = ((at - blocks.start) as usize, (at - blocks.start) as usize + part.len());
            let block = self.block as usize;
            let last = whole.len() - block;
            if first > 0 {
                read_exact(file, blocks.start, &mut whole[..block])?;
            }
            // One block that is both the first and the last is read once.
            if end < whole.len() && (first == 0 || last > 0) {
                read_exact(file, blocks.start + last as u64, &mut whole[last..])?;
            }
            whole[first..end].copy_from_slice(part);
            write_all(file, blocks.start, &whole, durability)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes `len` zeroes at `at`.
    pub(super) fn zero(&self, file: &File, mut at: u64, len: u64) -> Result<(), Failed> {
        let end = at + len;
        let zeroes = buffer(len.min(PIECE as u64) as usize);
        while at < end {
            // Up to a multiple of the piece, so that only the ends are parts of blocks.
            let stop = end.min((at / PIECE as u64 + 1) * PIECE as u64);
            self.write(file, at, &zeroes[..(stop - at) as usize], Durability::Cached)?;
            at = stop;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Caching, Device, FileDevice, OpenMode, ZeroMode};
    use crate::error::Error;
    use bytes::{Bytes, BytesMut};
    use proptest::prelude::*;
    use std::sync::Arc;

    const SIZE: usize = 256 << 10;

    /// A file in a directory whose file system does direct I/O: that of temporary files, or this crate's.
    fn open() -> (tempfile::NamedTempFile, FileDevice) {
        let dirs = [std::env::temp_dir(), env!("CARGO_MANIFEST_DIR").into()];
        let mut refusals = Vec::new();
        for dir in dirs {
            let file = tempfile::NamedTempFile::new_in(dir).unwrap();
            file.as_file().set_len(SIZE as u64).unwrap();
            match FileDevice::open_with(file.path(), OpenMode::ReadWrite, Caching::Direct) {
                Ok(device) => return (file, device),
                Err(refused) => refusals.push(refused),
            }
        }
        panic!("neither directory does direct I/O: {refusals:?}; set TMPDIR to one that does");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write { at: usize, len: usize, off: usize, byte: u8, stable: bool },
        Zero { at: usize, len: usize, mode: ZeroMode },
        Read { at: usize, len: usize },
    }

    /// Ranges of any alignment, short ones and such as end at the end of the device.
    fn range() -> impl Strategy<Value = (usize, usize)> {
        let unit = prop_oneof![Just(1_usize), Just(512), Just(4096)];
        (unit, 0..SIZE, 1..20_000_usize).prop_map(|(unit, at, len)| {
            let at = (at / unit * unit).min(SIZE - unit);
            (at, len.next_multiple_of(unit).min(SIZE - at))
        })
    }

    fn step() -> impl Strategy<Value = Step> {
        let write = (range(), 0..600_usize, 1_u8.., any::<bool>())
            .prop_map(|((at, len), off, byte, stable)| Step::Write { at, len, off, byte, stable });
        let zero = (range(), any::<bool>()).prop_map(|((at, len), punch)| {
            let mode = if punch { ZeroMode::MayPunch } else { ZeroMode::Allocate };
            Step::Zero { at, len, mode }
        });
        let read = range().prop_map(|(at, len)| Step::Read { at, len });
        prop_oneof![3 => write, 1 => zero, 2 => read]
    }

    /// `off` bytes into a buffer, so that the memory is aligned to nothing in particular.
    fn payload(len: usize, off: usize, byte: u8) -> Bytes {
        let mut bytes = BytesMut::zeroed(off + len);
        for (i, slot) in bytes.iter_mut().enumerate() {
            *slot = byte.wrapping_add((i / 512) as u8);
        }
        bytes.freeze().slice(off..)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn requests_of_any_alignment_do_what_a_model_does(steps in prop::collection::vec(step(), 1..24)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (file, device) = open();
            let mut model = vec![0_u8; SIZE];
            runtime.block_on(async {
                for step in steps {
                    match step {
                        Step::Write { at, len, off, byte, stable } => {
                            let data = payload(len, off, byte);
                            model[at..at + len].copy_from_slice(&data);
                            let durability = if stable { Durability::Stable } else { Durability::Cached };
                            device.write(at as u64, data, durability).await.unwrap();
                        }
                        Step::Zero { at, len, mode } => {
                            model[at..at + len].fill(0);
                            device.write_zeroes(at as u64, len as u64, mode, Durability::Cached).await.unwrap();
                        }
                        Step::Read { at, len } => {
                            let found = device.read(at as u64, BytesMut::zeroed(len)).await.unwrap();
                            assert!(found == model[at..at + len], "read of {len} bytes at {at}");
                        }
                    }
                }
                device.flush().await.unwrap();
            });
            // Past all this, through the page cache.
            prop_assert!(std::fs::read(file.path()).unwrap() == model);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn neighbours_in_a_block_do_not_undo_each_other() {
        let (file, device) = open();
        let device = Arc::new(device);
        for round in 1..=20_u8 {
            let writes = (0..64_u64).map(|i| {
                let device = Arc::clone(&device);
                tokio::spawn(async move {
                    device.write(i * 100, payload(100, 0, round), Durability::Cached).await.unwrap();
                })
            });
            futures_util::future::join_all(writes).await.into_iter().for_each(|done| done.unwrap());
            let found = std::fs::read(file.path()).unwrap();
            assert!(found[..6400].iter().all(|byte| *byte == round), "round {round}");
        }
    }

    #[tokio::test]
    async fn zeroes_are_written_where_they_cannot_be_asked_for() {
        let (file, device) = open();
        device.write(0, payload(SIZE, 0, 1), Durability::Cached).await.unwrap();
        let direct = Direct::of(&File::open(file.path()).unwrap()).unwrap();
        let options = || File::options().read(true).write(true).open(file.path()).unwrap();
        assert!(direct.zero(&options(), 700, 10_000).is_ok());
        let found = std::fs::read(file.path()).unwrap();
        let zeroes = found.iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(at, _)| at);
        let expected = (0..SIZE).filter(|at| (700..10_700).contains(at) || payload_byte(*at) == 0);
        assert!(zeroes.eq(expected));
    }

    fn payload_byte(at: usize) -> u8 {
        1_u8.wrapping_add((at / 512) as u8)
    }

    #[tokio::test]
    async fn the_part_of_a_block_at_the_end_is_not_there() {
        let (file, device) = open();
        let block = Direct::of(file.as_file()).unwrap().block;
        drop(device);
        file.as_file().set_len(SIZE as u64 + block - 1).unwrap();
        let device = FileDevice::open_with(file.path(), OpenMode::ReadWrite, Caching::Direct).unwrap();
        assert_eq!(device.size(), SIZE as u64);
        file.as_file().set_len(SIZE as u64 + block).unwrap();
        assert_eq!(device.refresh().await.unwrap(), SIZE as u64 + block);
        // Nothing for `sendfile`.
        assert!(device.locate(0, 4096).await.unwrap().is_none());
    }

    #[test]
    fn blocks_and_memory_that_cannot_be_had_are_refused() {
        for (block, memory) in [(0, 0), (512, 0), (0, 512), (8192, 512), (512, 8192), (520, 4)] {
            assert_eq!(Direct::with(block, memory).err(), Some(Errno::OPNOTSUPP), "{block}, {memory}");
        }
        let small = Direct::with(512, 4).unwrap();
        assert_eq!((small.block, small.memory, small.reachable(1025)), (512, 4, 1024));
        assert_eq!(Direct::with(4096, 4096).unwrap().reachable(8191), 4096);
    }

    #[test]
    fn what_has_no_direct_access_is_refused_with_what_to_do() {
        // The kernel's own files are regular ones without it.
        let refused = FileDevice::open_with("/proc/version".as_ref(), OpenMode::ReadOnly, Caching::Direct);
        let refused = refused.unwrap_err();
        assert!(matches!(refused, Error::NoDirect { .. }), "{refused:?}");
        assert!(refused.to_string().contains("leave --direct out"), "{refused}");
    }
}
