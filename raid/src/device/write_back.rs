//! Dirty pages of a file on their way to its disk before anybody asks for that, so that the disk works meanwhile and a
//! flush finds less to do. A flush would do as well, but writes the file system's journal and empties the disk's own
//! cache each time: one every 32 MiB made appends slower by a fifth than this does (`bench log append-disk`).
//!
//! Nothing becomes durable by it, and nobody hears of its errors: the kernel keeps them for the next `fdatasync`, which
//! `sync_file_range` takes none from unless it is told to wait.
//!
//! Cost: a mutex; a thread that may block while anything is left, one a file at most, however long its disk takes;
//! a system call for each run of pages.

// One of the modules that may: `sync_file_range` has no safe face.
#![allow(unsafe_code)]

use crate::range_set::RangeSet;
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Ranges that are kept in mind. Whoever writes so widely scattered leaves it to the kernel.
const MOST: usize = 1024;

#[derive(Debug, Default)]
struct State {
    ranges: RangeSet,
    /// A thread works, or is on its way.
    is_served: bool,
}

/// What of a file is to be brought to disk.
#[derive(Debug)]
pub(super) struct WriteBack {
    file: Arc<File>,
    state: Mutex<State>,
}

impl WriteBack {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self { file, state: Mutex::default() }
    }

    /// Begins with a range, and returns at once.
    pub(super) fn begin(self: &Arc<Self>, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        {
            let mut state = self.state.lock();
            if state.ranges.count() >= MOST {
                state.ranges = RangeSet::default();
            }
            state.ranges.insert(range);
            if std::mem::replace(&mut state.is_served, true) {
                return;
            }
        }
        let this = Arc::clone(self);
        // It has no outcome. Should the runtime end before it runs, nobody begins here again.
        drop(tokio::task::spawn_blocking(move || this.work()));
    }

    /// A flush begins, which does what is left here.
    pub(super) fn is_flushed(&self) {
        self.state.lock().ranges = RangeSet::default();
    }

    fn work(&self) {
        loop {
            let ranges = {
                let mut state = self.state.lock();
                let ranges = std::mem::take(&mut state.ranges);
                state.is_served = !ranges.is_empty();
                ranges
            };
            if ranges.is_empty() {
                return;
            }
            for range in ranges.iter() {
                if let Err(error) = start(&self.file, &range) {
                    tracing::debug!("{range:?} is written later: {error}");
                }
            }
        }
    }
}

/// Has the kernel begin to write the dirty pages of a range that is not empty. Waits where the disk's queue is full, for
/// nothing else.
fn start(file: &File, range: &Range<u64>) -> io::Result<()> {
    let place = |bytes: u64| i64::try_from(bytes).map_err(io::Error::other);
    let (at, len) = (place(range.start)?, place(range.end - range.start)?);
    // SAFETY: takes a descriptor that `file` keeps open, and three numbers; no memory of ours is touched.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), at, len, libc::SYNC_FILE_RANGE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn write_back() -> Arc<WriteBack> {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all(&[7; 16 << 10]).unwrap();
        Arc::new(WriteBack::new(Arc::new(file)))
    }

    #[test]
    fn the_kernel_takes_what_it_is_given() {
        let some = write_back();
        start(&some.file, &(4096..8192)).unwrap();
        // Past the end there is nothing to write.
        start(&some.file, &(2 << 20..3 << 20)).unwrap();
        assert!(start(&some.file, &(u64::MAX - 1..u64::MAX)).is_err());
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        assert!(start(&File::from(pipe), &(0..1)).is_err(), "a pipe has no pages");
    }

    #[tokio::test]
    async fn one_thread_does_what_there_is_and_goes() {
        let some = write_back();
        some.begin(0..0);
        assert!(!some.state.lock().is_served);
        for n in 0..64 {
            some.begin(n << 14..(n + 1) << 14);
        }
        while some.state.lock().is_served {
            tokio::task::yield_now().await;
        }
        assert!(some.state.lock().ranges.is_empty());
        assert_eq!(Arc::strong_count(&some.file), 1, "no thread holds the file");
    }

    #[tokio::test]
    async fn what_is_kept_in_mind_is_bounded_and_ends_with_a_flush() {
        let some = write_back();
        // As if a thread hung at a disk.
        some.state.lock().is_served = true;
        for n in 0..3 * MOST as u64 {
            some.begin(n * 8192..n * 8192 + 4096);
            assert!(some.state.lock().ranges.count() <= MOST);
        }
        assert!(!some.state.lock().ranges.is_empty());
        some.is_flushed();
        assert!(some.state.lock().ranges.is_empty());
    }
}
