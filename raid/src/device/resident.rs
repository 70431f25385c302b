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
use std::ops::Range;
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

    /// Whether each of these pages is in memory and valid; `None` if the kernel does not say. They are not more than
    /// [`MOST`], and lie within the mapping.
    fn ask<'a>(&self, page: usize, pages: usize, answers: &'a mut [u8; MOST]) -> Option<&'a [u8]> {
        let (at, len) = (page * PAGE as usize, pages * PAGE as usize);
        debug_assert!(pages <= MOST && at + len <= self.len);
        // SAFETY: the address lies within our mapping, and the kernel writes a byte a page: `answers` has as many.
        let told = unsafe { libc::mincore(self.base.as_ptr().byte_add(at), len, answers.as_mut_ptr()) };
        (told == 0).then_some(&answers[..pages])
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
        let pages = (at + len).div_ceil(PAGE) - at / PAGE;
        match &self.0 {
            Knowledge::InMemory => true,
            Knowledge::Asked(mapping) if len > 0 && pages <= MOST as u64 => {
                let (page, pages) = ((at / PAGE) as usize, pages as usize);
                ask(mapping, file, page, pages, &mut [0; MOST])
                    .is_some_and(|told| told.iter().all(|answer| is_there(*answer)))
            }
            _ => false,
        }
    }

    /// The pages of a range that are not in memory, as ranges of the file; none where nobody can tell.
    pub(super) fn absent(&self, file: &File, at: u64, len: u64) -> Vec<Range<u64>> {
        let Knowledge::Asked(mapping) = &self.0 else { return Vec::new() };
        let (mut absent, mut answers): (Vec<Range<u64>>, _) = (Vec::new(), [0; MOST]);
        let (mut page, end) = ((at / PAGE) as usize, (at + len).div_ceil(PAGE) as usize);
        while page < end {
            let pages = (end - page).min(MOST);
            let Some(told) = ask(mapping, file, page, pages, &mut answers) else { break };
            for (number, _) in (page as u64..).zip(told).filter(|(_, answer)| !is_there(**answer)) {
                match absent.last_mut().filter(|last| last.end == number * PAGE) {
                    Some(last) => last.end += PAGE,
                    None => absent.push(number * PAGE..(number + 1) * PAGE),
                }
            }
            page += pages;
        }
        absent
    }
}

/// The lowest bit counts, the others are undefined.
fn is_there(answer: u8) -> bool {
    answer & 1 == 1
}

/// What the kernel says of these pages of a file; `None` if it does not, or pages are larger than 4 KiB.
fn ask<'a>(
    mapping: &RwLock<Option<Mapping>>,
    file: &File,
    page: usize,
    pages: usize,
    answers: &'a mut [u8; MOST],
) -> Option<&'a [u8]> {
    if rustix::param::page_size() as u64 != PAGE {
        return None;
    }
    let reaches = |mapping: &&Mapping| (page + pages) * PAGE as usize <= mapping.len;
    if let Some(mapping) = mapping.read().as_ref().filter(reaches) {
        return mapping.ask(page, pages, answers);
    }
    // The first time, or the file has grown. Without addresses to spare, it is as if it were not in memory.
    let mut mapping = mapping.write();
    *mapping = length(file).and_then(|size| Mapping::of(file, size.next_multiple_of(PAGE) as usize)).ok();
    mapping.as_ref().filter(reaches)?.ask(page, pages, answers)
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
        assert_eq!(resident.absent(&file, 1, size - 1), std::slice::from_ref(&(0..size)));
        rustix::io::pread(&file, &mut vec![0; 8192][..], 32 * PAGE).unwrap();
        assert!(resident.holds(&file, 32 * PAGE, 2 * PAGE));
        let absent = resident.absent(&file, 0, size);
        assert!(absent.iter().all(|range| range.end <= 32 * PAGE || range.start >= 34 * PAGE), "{absent:?}");
        assert_eq!(absent.first().map(|range| range.start), Some(0));
        assert!(resident.absent(&file, size, PAGE).is_empty(), "there is nothing");
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
