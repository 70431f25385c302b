//! The catalog's database file on a volume: held in memory, every change recorded, and replayed onto the reserved
//! region.
//!
//! The database is synchronous and believes it has a file. Here its writes go to memory; a sync closes a [`Step`]:
//! every 4 KiB block changed since the sync before, and the file's length. After a commit the catalog replays the
//! steps in order: the blocks, the length if it changed, then a flush of the volume. So the region passes through the
//! very states that a file would, and the database's own argument for atomic commits holds on it. What follows the
//! last sync stays in memory until the next one: a file system promises no more.
//!
//! Memory: as much as the database uses, in chunks of 64 KiB; a chunk that was never written costs nothing.

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use redb::StorageBackend;
use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;

const CHUNK: u64 = 64 * 1024;
const BLOCK: u64 = 4096;

/// What lies between two syncs.
#[derive(Debug)]
pub(crate) struct Step {
    /// Changed runs of whole blocks: position in the region, bytes.
    pub(crate) runs: Vec<(u64, Bytes)>,
    /// Length of the file at the sync.
    pub(crate) len: u64,
}

#[derive(Debug)]
struct State {
    chunks: Vec<Option<Box<[u8]>>>,
    len: u64,
    /// Blocks changed since the last sync.
    dirty: BTreeSet<u64>,
    /// From here on the region on the volume is known to hold zeroes.
    zero_from: u64,
    steps: VecDeque<Step>,
}

/// The memory behind the database; a clone is another handle to the same.
#[derive(Debug, Clone)]
pub(crate) struct Recorded {
    state: Arc<Mutex<State>>,
    capacity: u64,
}

impl Recorded {
    /// Memory for a region of `capacity` bytes that holds only zeroes.
    pub(crate) fn empty(capacity: u64) -> Self {
        let state = State {
            chunks: Vec::new(),
            len: 0,
            dirty: BTreeSet::new(),
            zero_from: 0,
            steps: VecDeque::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), capacity }
    }

    /// Memory with the used part of a region, as read back from the volume.
    pub(crate) fn load(content: &[u8], capacity: u64) -> Self {
        let recorded = Self::empty(capacity);
        {
            let mut state = recorded.state.lock();
            state.len = content.len() as u64;
            // What an earlier life left behind the end is not known to be zero.
            state.zero_from = capacity;
            for chunk in content.chunks(CHUNK as usize) {
                let mut held = vec![0; CHUNK as usize].into_boxed_slice();
                held[..chunk.len()].copy_from_slice(chunk);
                state.chunks.push(Some(held));
            }
        }
        recorded
    }

    /// The oldest step that was not taken yet.
    pub(crate) fn next_step(&self) -> Option<Step> {
        self.state.lock().steps.pop_front()
    }
}

impl State {
    fn copy_out(&self, at: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let position = at + done as u64;
            let within = (position % CHUNK) as usize;
            let n = (out.len() - done).min(CHUNK as usize - within);
            let target = &mut out[done..done + n];
            match self.chunks.get((position / CHUNK) as usize) {
                Some(Some(chunk)) => target.copy_from_slice(&chunk[within..within + n]),
                _ => target.fill(0),
            }
            done += n;
        }
    }

    fn copy_in(&mut self, at: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let position = at + done as u64;
            let (number, within) = ((position / CHUNK) as usize, (position % CHUNK) as usize);
            let n = (data.len() - done).min(CHUNK as usize - within);
            if self.chunks.len() <= number {
                self.chunks.resize_with(number + 1, || None);
            }
            let chunk = self.chunks[number].get_or_insert_with(|| vec![0; CHUNK as usize].into_boxed_slice());
            chunk[within..within + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
        self.touch(at, at + data.len() as u64);
    }

    fn touch(&mut self, from: u64, to: u64) {
        if from < to {
            self.dirty.extend(from / BLOCK..to.div_ceil(BLOCK));
        }
    }

    fn resize(&mut self, len: u64) {
        if len < self.len {
            // What is cut off reads as zeroes when the file grows again.
            let keep = len.div_ceil(CHUNK) as usize;
            self.chunks.truncate(keep);
            if let Some(Some(chunk)) = self.chunks.get_mut((len / CHUNK) as usize) {
                chunk[(len % CHUNK) as usize..].fill(0);
            }
            self.dirty.retain(|block| block * BLOCK < len);
        } else {
            self.touch(self.len, len.min(self.zero_from));
        }
        self.zero_from = self.zero_from.max(len);
        self.len = len;
    }

    fn close_step(&mut self) {
        let mut runs: Vec<(u64, BytesMut)> = Vec::new();
        for block in std::mem::take(&mut self.dirty) {
            let at = block * BLOCK;
            let joins = runs.last().is_some_and(|(start, bytes)| start + bytes.len() as u64 == at);
            if !joins {
                runs.push((at, BytesMut::new()));
            }
            if let Some((_, bytes)) = runs.last_mut() {
                let from = bytes.len();
                bytes.resize(from + BLOCK as usize, 0);
                self.copy_out(at, &mut bytes[from..]);
            }
        }
        let runs = runs.into_iter().map(|(at, bytes)| (at, bytes.freeze())).collect();
        self.steps.push_back(Step { runs, len: self.len });
    }
}

fn outside(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{what} past the end of the catalog"))
}

impl StorageBackend for Recorded {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock();
        if offset.checked_add(out.len() as u64).is_none_or(|end| end > state.len) {
            return Err(outside("read"));
        }
        state.copy_out(offset, out);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.capacity {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the catalog region is full"));
        }
        self.state.lock().resize(len);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.state.lock().close_step();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > state.len) {
            return Err(outside("write"));
        }
        state.copy_in(offset, data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Op {
        Write(u64, Vec<u8>),
        Resize(u64),
        Sync,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0u64..300_000, prop::collection::vec(1u8.., 1..9000)).prop_map(|(at, data)| Op::Write(at, data)),
            (0u64..400_000).prop_map(Op::Resize),
            Just(Op::Sync),
        ]
    }

    proptest! {
        /// Memory behaves as a file does, and the replayed region equals it at every sync, even where an earlier
        /// life had left noise.
        #[test]
        fn replay_reproduces_the_file(ops in prop::collection::vec(op(), 1..60), noise in any::<bool>()) {
            let capacity = 350_000;
            let (recorded, mut region) = if noise {
                (Recorded::load(&[], capacity), vec![0xaa; 360_448])
            } else {
                (Recorded::empty(capacity), vec![0; 360_448])
            };
            let mut file: Vec<u8> = Vec::new();
            for op in ops {
                match op {
                    Op::Write(at, data) => {
                        let end = at as usize + data.len();
                        let fits = end <= file.len();
                        prop_assert_eq!(recorded.write(at, &data).is_ok(), fits);
                        if fits {
                            file[at as usize..end].copy_from_slice(&data);
                        }
                    }
                    Op::Resize(len) => {
                        let fits = len <= capacity;
                        prop_assert_eq!(recorded.set_len(len).is_ok(), fits);
                        if fits {
                            file.resize(len as usize, 0);
                        }
                    }
                    Op::Sync => {
                        recorded.sync_data().unwrap();
                        let step = recorded.next_step().unwrap();
                        for (at, bytes) in step.runs {
                            region[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                        }
                        prop_assert_eq!(step.len as usize, file.len());
                        prop_assert!(region[..file.len()] == file[..]);
                    }
                }
                let mut seen = vec![1; file.len()];
                recorded.read(0, &mut seen).unwrap();
                prop_assert!(seen == file);
                prop_assert!(recorded.read(file.len() as u64, &mut [0]).is_err());
            }
        }
    }
}
