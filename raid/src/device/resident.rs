//! Whether a range of a file is in the page cache, whole and valid, so that the kernel can send it without waiting for a
//! disk.
//!
//! `mincore` tells, of pages that are mapped; `cachestat` would need no mapping, but also counts pages that a read has yet
//! to fill, and to wait for one of a disk that hangs is what this is here to avoid. The mapping is never touched and
//! allows no access, so that nothing can fault, whatever becomes of the file. It takes addresses, not memory.
//!
//! Costs: a lock that is shared, one system call, a look at each page. The answer may be old when it is used: a page that
//! was taken away meanwhile is waited for, once.

// One of the modules that may: `mincore` has no safe face, and a mapping is a pointer.
#![allow(unsafe_code)]

use super::file::length;
use parking_lot::RwLock;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::ptr::{NonNull, null_mut};

/// Bytes of a page: the smallest there is. Where they are larger, an answer fills more than its share.
const PAGE: u64 = 4096;
/// Pages that are asked for at once.
const MOST: usize = 512;

/// Addresses that stand for a file's first bytes.
#[derive(Debug)]
struct Mapping {
    base: NonNull<c_void>,
    len: usize,
}

// SAFETY: the pointer is only ever handed to system calls that check what they are given; nothing is read through it.
unsafe impl Send for Mapping {}
// SAFETY: as above; the calls that take it may run at once.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn of(file: &File, len: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping wherever the kernel finds room replaces nothing, and without access there is no memory
        // whose contents could change under anybody.
        let base = unsafe { mmap(null_mut(), len, ProtFlags::empty(), MapFlags::SHARED, file, 0)? };
        Ok(Self { base: NonNull::new(base).ok_or(Errno::NOMEM)?, len })
    }

    /// Whether all of these pages are in memory and valid. `len` is not more than [`MOST`] pages, and the range lies
    /// within the mapping.
    fn holds(&self, page: usize, pages: usize) -> bool {
        let mut answers = [0_u8; MOST];
        let (at, len) = (page * PAGE as usize, pages * PAGE as usize);
        debug_assert!(pages <= MOST && at + len <= self.len);
        // SAFETY: the address lies within our mapping, and the kernel writes a byte a page: `answers` has as many.
        let told = unsafe { libc::mincore(self.base.as_ptr().byte_add(at), len, answers.as_mut_ptr()) };
        // The lowest bit counts, the others are undefined.
        told == 0 && answers[..pages].iter().all(|answer| answer & 1 == 1)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is ours, whole, and nobody else has its address.
        if let Err(errno) = unsafe { munmap(self.base.as_ptr(), self.len) } {
            tracing::warn!("addresses of a file are not given back: {errno}");
        }
    }
}

/// What can be known of a file's place in memory.
#[derive(Debug)]
pub struct Residency(Knowledge);

#[derive(Debug)]
enum Knowledge {
    /// Its file system has no disk.
    InMemory,
    /// What the kernel tells; the mapping is made when it is first asked.
    Asked(RwLock<Option<Mapping>>),
    /// Nothing.
    None,
}

impl Residency {
    /// Of a file on a file system without a disk.
    pub(super) fn in_memory() -> Self {
        Self(Knowledge::InMemory)
    }

    /// Of a file that is open for writing: of others the kernel may say yes to everything.
    pub(super) fn of_writable() -> Self {
        Self(Knowledge::Asked(RwLock::default()))
    }

    /// Of any other.
    pub(super) fn unknown() -> Self {
        Self(Knowledge::None)
    }

    /// Whether [`Residency::holds`] has an answer: not where pages are not of 4 KiB, unless all is in memory.
    pub(super) fn is_known(&self) -> bool {
        match self.0 {
            Knowledge::InMemory => true,
            Knowledge::Asked(_) => rustix::param::page_size() as u64 == PAGE,
            Knowledge::None => false,
        }
    }

    /// Whether all of the file always is.
    pub(super) fn is_in_memory(&self) -> bool {
        matches!(self.0, Knowledge::InMemory)
    }

    /// Whether the range is in memory, whole and valid. Where pages are larger than 4 KiB, what lies on a disk never is.
    pub(super) fn holds(&self, file: &File, at: u64, len: u64) -> bool {
        let mapping = match &self.0 {
            Knowledge::InMemory => return true,
            Knowledge::Asked(mapping) => mapping,
            Knowledge::None => return false,
        };
        let pages = (at + len).div_ceil(PAGE) - at / PAGE;
        if len == 0 || pages > MOST as u64 || rustix::param::page_size() as u64 != PAGE {
            return false;
        }
        let (page, pages) = ((at / PAGE) as usize, pages as usize);
        let ask = |mapping: &Mapping| {
            ((page + pages) * PAGE as usize <= mapping.len).then(|| mapping.holds(page, pages))
        };
        if let Some(told) = mapping.read().as_ref().and_then(ask) {
            return told;
        }
        // The first time, or the file has grown. Without addresses to spare, it is as if it were not in memory.
        let mut mapping = mapping.write();
        *mapping = length(file).and_then(|size| Mapping::of(file, size.next_multiple_of(PAGE) as usize)).ok();
        mapping.as_ref().and_then(ask).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::Advice;
    use std::io::Write;

    #[test]
    fn what_was_dropped_from_the_cache_is_not_there_and_what_was_read_is() {
        // Not in memory, where nothing is ever dropped.
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let size = 64 * PAGE;
        file.write_all(&vec![7; size as usize]).unwrap();
        let resident = Residency::of_writable();
        assert!(resident.holds(&file, 0, size));
        assert!(resident.holds(&file, 4095, 2));
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        assert!(!resident.holds(&file, 0, size));
        rustix::io::pread(&file, &mut vec![0; 8192][..], 32 * PAGE).unwrap();
        assert!(resident.holds(&file, 32 * PAGE, 2 * PAGE));
    }

    #[test]
    fn a_file_that_grows_is_known_as_it_is_and_one_cut_short_is_not_there() {
        let file = tempfile::tempfile().unwrap();
        rustix::io::pwrite(&file, &[7; 4096], 0).unwrap();
        let resident = Residency::of_writable();
        assert!(resident.holds(&file, 0, PAGE));
        rustix::io::pwrite(&file, &[7; 8192], PAGE).unwrap();
        assert!(resident.holds(&file, 0, 3 * PAGE));
        file.set_len(PAGE).unwrap();
        assert!(!resident.holds(&file, 0, 3 * PAGE));
        assert!(resident.holds(&file, 0, PAGE));
    }
}
