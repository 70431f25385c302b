//! Discards free space that an earlier life could not: a commit had freed it, and the process was killed, or the power went,
//! before it was discarded. Nothing else would ever do that, and images would stay as large as they are.
//!
//! Only after a stop out of order, and until it was done once; a stop in order on the way leaves a mark in the catalog, so
//! that the next start goes on. It begins when all partitions are open, goes piece by piece, and rests as long as each took.
//!
//! Invariants: a run is taken from free space before it is discarded and given back after, so nobody has it meanwhile.
//! What is free by the catalog at the start is so durably: to open the catalog ends with a flush. So no power cut can
//! bring back a record that claims what was discarded. Where images hold nothing there is nothing to discard.

use super::VolumeHome;
use super::extent::{Extent, UNIT};
use crate::catalog::Change;
use crate::catalog::records::Table;
use crate::error::Result;
use std::sync::Arc;
use std::time::Duration;

/// Bytes that are taken at once at most; and this share of what records may use, so that whoever appends finds room.
const PIECE: u64 = 64 << 20;
const PIECE_SHARE: u64 = 4;
/// Longest rest: whoever closes the store waits for it.
const LONGEST_REST: Duration = Duration::from_millis(500);
/// In [`Table::Meta`]: a stop in order came before all was discarded.
const MARK: &[u8] = b"discard_free";

/// Starts it, if it is due. Costs one lookup in the catalog if not.
pub(super) fn discard(home: &Arc<VolumeHome>) -> Result<()> {
    let is_marked = home.catalog.record::<bool>(Table::Meta, MARK)?.is_some();
    if is_marked || home.catalog.was_left_open() {
        let home = Arc::clone(home);
        let tasks = Arc::clone(&home.tasks);
        tasks.spawn(Box::pin(async move {
            let mut change = Change::vital();
            match (home.discard_free().await, is_marked) {
                (true, true) => change.delete(Table::Meta, MARK),
                (false, false) => change.put(Table::Meta, MARK, &true),
                _ => return,
            }
            if let Err(error) = home.catalog.submit(change).await {
                // Or for nothing, if the mark stays.
                tracing::warn!("free space is not discarded after the next start: {error}");
            }
        }));
    }
    Ok(())
}

impl VolumeHome {
    /// Whether it came to its end: it does not when the store is closed.
    async fn discard_free(&self) -> bool {
        let runtime = self.tasks.runtime();
        let mut from = 0;
        while let Some(run) = self.take_free(from) {
            from = run.end();
            let before = runtime.now();
            let outcome = self.discard_stored(run).await;
            self.release_now(&[run]);
            match outcome {
                Ok(0) => {}
                Ok(_) => runtime.sleep(runtime.now().saturating_sub(before).min(LONGEST_REST)).await,
                Err(error) => {
                    // The space is free all the same, and what refused this would refuse the rest.
                    tracing::warn!("free space was not discarded: {error}");
                    return true;
                }
            }
            if self.tasks.is_ending() {
                return false;
            }
        }
        true
    }

    /// The next piece of free space.
    fn take_free(&self, from: u64) -> Option<Extent> {
        let mut space = self.space.lock();
        let usable = space.free().saturating_sub(self.reserve);
        let run = space.next_free(from, (usable / PIECE_SHARE).clamp(UNIT, PIECE))?;
        space.claim(run).ok()?;
        Some(run)
    }

    /// Discards what is stored of a run; returns how many bytes.
    async fn discard_stored(&self, run: Extent) -> Result<u64> {
        let (mut at, mut discarded) = (run.at, 0);
        while at < run.end() {
            let found = self.device.extents(at, run.end() - at).await?;
            let before = at;
            for part in found {
                if !part.hole {
                    self.device.discard(at, part.len).await?;
                    discarded += part.len;
                }
                at += part.len;
            }
            if at == before {
                break;
            }
        }
        Ok(discarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Catalog;
    use crate::catalog::records::{PartitionKey, SegmentKey, SegmentRecord};
    use crate::home::{Home, SegmentBytes};
    use crate::tasks::Tasks;
    use crate::volume::segment::VolumeSegment;
    use bytes::Bytes;
    use raid::device::{Durability, FileDevice, OpenMode};
    use raid::runtime::TokioRuntime;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    struct Life {
        home: Arc<VolumeHome>,
        catalog: Arc<Catalog>,
        tasks: Arc<Tasks>,
    }

    /// One life of a store: it ends with its runtime, and with whatever still holds its file.
    fn live<T>(path: &Path, life: impl AsyncFnOnce(&Life) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let device = Arc::new(FileDevice::open(path, OpenMode::ReadWrite).unwrap());
            let tasks = Tasks::new(Arc::new(TokioRuntime::current()));
            let (home, catalog) = VolumeHome::open(device, Arc::clone(&tasks), Arc::default()).await.unwrap();
            // Nobody asks for them here, and they hold on to their home.
            home.found.lock().clear();
            life(&Life { home, catalog, tasks }).await
        })
    }

    impl Life {
        /// Stores something wherever nothing is claimed; returns how many bytes.
        async fn litter(&self) -> u64 {
            let (mut from, mut all) = (0, 0);
            loop {
                let run = self.home.space.lock().next_free(from, 1 << 20);
                let Some(run) = run else { return all };
                let noise = Bytes::from(vec![7; run.len as usize]);
                self.home.device.write(run.at, noise, Durability::Cached).await.unwrap();
                (from, all) = (run.end(), all + run.len);
            }
        }

        /// What it does once all is open; returns how many bytes are free afterwards.
        async fn goes_on(&self) -> u64 {
            self.home.opened().unwrap();
            self.tasks.idle().await;
            self.home.space.lock().free()
        }

        fn is_marked(&self) -> bool {
            self.catalog.record::<bool>(Table::Meta, MARK).unwrap().is_some()
        }
    }

    #[test]
    fn free_space_is_discarded_after_a_kill_to_its_end_and_then_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume");
        std::fs::File::create(&path).unwrap().set_len(32 << 20).unwrap();
        let taken = || std::fs::metadata(&path).unwrap().blocks() * 512;
        let partition = PartitionKey { topic: uuid::Uuid::from_u128(1), partition: 0 };
        let key = SegmentKey { partition, base: 0 };

        // Killed.
        let (free, full) = live(&path, async |life| {
            let segment = VolumeSegment::new(&life.home, key, SegmentRecord::default());
            segment.reserve(100, 1 << 20).await.unwrap();
            segment.write(0, Bytes::from_static(&[9; 100]), Durability::Cached).await.unwrap();
            life.tasks.idle().await;
            let free = life.litter().await;
            let full = taken();
            assert!(full > free, "{free} {full}");
            (free, full)
        });
        // Stopped in order as soon as it has begun.
        live(&path, async |life| {
            life.tasks.end();
            assert_eq!(life.goes_on().await, free);
            let some = taken();
            assert!(some < full - free / 8 && some > full / 2, "{full} {some}");
            assert!(life.is_marked());
            life.catalog.close().await.unwrap();
        });
        live(&path, async |life| {
            assert!(!life.catalog.was_left_open());
            assert_eq!(life.goes_on().await, free);
            let left = taken();
            // A file system may count blocks of its own.
            assert!(left <= full - free + (64 << 10), "{full} {left}");
            assert!(!life.is_marked());
            let record: SegmentRecord = life.catalog.record(Table::Segments, &key.bytes()).unwrap().unwrap();
            let place = record.extents[0].at;
            let kept = life.home.device.read(place, raid::device::buffer(100)).await.unwrap();
            assert_eq!(kept[..], [9; 100]);
            life.catalog.close().await.unwrap();
        });
        // After a stop in order nothing is looked for.
        live(&path, async |life| {
            assert_eq!(life.litter().await, free);
            let full = taken();
            assert_eq!(life.goes_on().await, free);
            assert_eq!(taken(), full);
        });
    }
}
