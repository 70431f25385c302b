//! What opening a store, and reading it then, makes of damage: what was durable and has rotted is lost, and nothing behind
//! it, whatever the catalog says of the segment it is in; a full catalog keeps no store closed; a wrong length takes no memory.

use crate::catalog::Change;
use crate::catalog::records::{SegmentKey, SegmentRecord, Table};
use crate::partition::ReadLimit;
use crate::store::{Home, Store, StoreOptions};
use crate::{Error, Partition, TopicConfig};
use bytes::{BufMut, Bytes, BytesMut};
use raid::device::{Device, Durability, FileDevice, Io, OpenMode, Piece, ZeroMode};
use raid::runtime::TokioRuntime;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A batch of one record, which nobody looks into.
fn batch(text: &str) -> Bytes {
    holding(text.repeat(100).as_bytes())
}

/// One with a batch in it that says it stands at this offset.
fn planted(number: i64, offset: i64) -> Bytes {
    let mut inner = BytesMut::from(&batch("<inside>")[..]);
    inner[..8].copy_from_slice(&offset.to_be_bytes());
    inner[12..16].copy_from_slice(&[0; 4]);
    holding(&[text(number).as_bytes(), &inner, b"and more"].concat())
}

fn holding(payload: &[u8]) -> Bytes {
    let mut covered = BytesMut::new();
    covered.put_slice(&[0; 2 + 4]);
    covered.put_i64(1000);
    covered.put_i64(1000);
    covered.put_slice(&[0xff; 8 + 2 + 4]);
    covered.put_i32(1);
    covered.put_slice(payload);
    let mut bytes = BytesMut::new();
    bytes.put_i64(0);
    bytes.put_i32(4 + 1 + 4 + covered.len() as i32);
    bytes.put_i32(-1);
    bytes.put_i8(2);
    bytes.put_u32(crc32c::crc32c(&covered));
    bytes.put_slice(&covered);
    bytes.freeze()
}

fn text(number: i64) -> String {
    format!("<{number:06}>")
}

/// A life of the store, which ends with its runtime: every task goes with it, as a kill has it.
fn life<T>(path: &Path, work: impl AsyncFnOnce(Arc<Store>) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async { work(open(path).await).await })
}

/// A volume that outlives stores.
fn volume() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume");
    File::create(&path).unwrap().set_len(32 << 20).unwrap();
    (dir, path)
}

async fn open(path: &Path) -> Arc<Store> {
    let device = Arc::new(FileDevice::open(path, OpenMode::ReadWrite).unwrap());
    let mut topic_defaults = TopicConfig::kafka_defaults();
    topic_defaults.set_default("retention.ms", "-1").unwrap();
    let options = StoreOptions { topic_defaults, ..StoreOptions::default() };
    Store::open(Home::Volume(device), options, Arc::new(TokioRuntime::current())).await.unwrap()
}

fn log(store: &Store) -> Arc<Partition> {
    Arc::clone(&store.topic("t").unwrap().partitions()[0])
}

/// The first offsets of the batches that are read, and what is told as lost.
async fn read(log: &Partition) -> (Vec<i64>, Vec<(i64, i64)>) {
    let (mut at, mut found, mut lost) = (0, Vec::new(), Vec::new());
    while at < log.offsets().log_end {
        match log.read(at, 1, ReadLimit::LogEnd, true).await {
            Ok(slice) => {
                let header = crate::batch::Header::parse(&slice.copy().await.unwrap()).unwrap();
                found.push(header.base_offset);
                at = header.next_offset();
            }
            Err(Error::LostBatch { from, next, .. }) => {
                lost.push((from, next));
                at = next;
            }
            Err(error) => panic!("at {at}: {error}"),
        }
    }
    (found, lost)
}

const BATCHES: i64 = 40;

/// A log of which the third segment is closed, and not closed for the catalog; a kill, and damage to one of its batches: at
/// this byte, these.
fn damaged(
    path: &Path,
    content: impl Fn(i64) -> Bytes,
    (from, harm): (i64, &[u8]),
    damaged: impl FnOnce(i64, i64) -> i64,
) -> i64 {
    let number = life(path, async |store: Arc<Store>| {
        let config = store.topic_defaults().with([("segment.bytes", "4000")]).unwrap();
        store.create_topic("t", 1, config).await.unwrap();
        let log = log(&store);
        for number in 0..BATCHES {
            log.append(content(number), Durability::Cached).await.unwrap();
        }
        store.quiet().await;
        let segment = log.segment_from(1).and_then(|second| log.segment_from(second.base + 1)).unwrap();
        let key = SegmentKey { partition: log.key(), base: segment.base }.bytes();
        let catalog = &store.context.catalog;
        let mut record: SegmentRecord = catalog.record(Table::Segments, &key).unwrap().unwrap();
        assert!(record.sealed.take().is_some());
        let mut change = Change::new();
        change.put(Table::Segments, &key, &record);
        catalog.submit(change).await.unwrap();
        damaged(segment.base, segment.end().next)
    });
    let bytes = std::fs::read(path).unwrap();
    let mark = text(number).into_bytes();
    let at = bytes.windows(mark.len()).position(|window| window == mark).unwrap() - crate::batch::HEADER;
    File::options().write(true).open(path).unwrap().write_all_at(harm, at as u64 + from as u64).unwrap();
    number
}

fn all_but(number: i64) -> Vec<i64> {
    (0..BATCHES).filter(|other| *other != number).collect()
}

#[test]
fn recovery_cuts_nothing_that_was_durable() {
    for first in [true, false] {
        let (_dir, path) = volume();
        let which = |base, end| if first { base } else { base + (end - base) / 2 };
        let number = damaged(&path, |number| batch(&text(number)), (161, b"rotten"), which);
        for _ in 0..2 {
            life(&path, async |store: Arc<Store>| {
                let (found, lost) = read(&log(&store)).await;
                assert_eq!((found, lost), (all_but(number), vec![(number, number + 1)]));
                store.quiet().await;
            });
        }
    }
}

#[test]
fn recovery_believes_no_batch_that_a_user_planted() {
    let harms: [(i64, &[u8]); 4] = [(0, &[0; 61]), (8, &[0, 0, 9, 9]), (17, b"rot"), (300, b"rotten")];
    for (offset, harm) in [1, 2, 20].into_iter().flat_map(|offset| harms.map(|harm| (offset, harm))) {
        let (_dir, path) = volume();
        let middle = |base, end| base + (end - base) / 2;
        let number = damaged(&path, |number| planted(number, number + offset), harm, middle);
        for _ in 0..2 {
            life(&path, async |store: Arc<Store>| {
                let found = read(&log(&store)).await;
                assert_eq!(found, (all_but(number), vec![(number, number + 1)]), "{offset} {harm:?}");
                store.quiet().await;
            });
        }
    }
}

/// Where the segment ended nobody knows; what follows it is there.
#[test]
fn a_last_batch_that_rotted_costs_no_later_segment() {
    let (_dir, path) = volume();
    let number = damaged(&path, |number| batch(&text(number)), (161, b"rotten"), |_, end| end - 1);
    life(&path, async |store: Arc<Store>| {
        assert_eq!(read(&log(&store)).await.0, all_but(number));
        assert_eq!(store.healing().unreadable, 1);
    });
}

/// Recovery once had no room for the records that it makes a little larger, and the store could not be opened for ever.
#[test]
fn a_store_whose_catalog_is_full_to_the_brim_opens_and_stops() {
    let (_dir, path) = volume();
    let append = async |store: &Store| {
        for partition in store.topic("t").unwrap().partitions() {
            partition.append(batch("<v>"), Durability::Cached).await.unwrap();
        }
        store.quiet().await;
    };
    life(&path, async |store: Arc<Store>| {
        store.create_topic("t", 100, store.topic_defaults()).await.unwrap();
        append(&store).await;
        let catalog = &store.context.catalog;
        for size in [900, 10] {
            for number in 0u32.. {
                let mut change = Change::vital();
                let key = [size as u8, (number >> 8) as u8, number as u8];
                change.put_bytes(Table::Blobs, &key, vec![7; size]);
                match catalog.submit(change).await {
                    Ok(()) => {}
                    Err(Error::CatalogFull { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
        }
    });
    let all_end_at = |store: &Store, end: i64| {
        let topic = store.topic("t").unwrap();
        assert!(topic.partitions().iter().all(|partition| partition.offsets().log_end == end), "{end}");
    };
    for number in 0..5 {
        life(&path, async |store: Arc<Store>| {
            all_end_at(&store, 1 + number);
            append(&store).await;
        });
    }
    for _ in 0..2 {
        life(&path, async |store: Arc<Store>| {
            all_end_at(&store, 6);
            store.close().await.unwrap();
        });
    }
}

/// A device that remembers the largest read.
struct Largest {
    inner: FileDevice,
    largest: AtomicUsize,
}

impl Device for Largest {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn refresh(&self) -> Io<'_, u64> {
        self.inner.refresh()
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        self.largest.fetch_max(buf.len(), Ordering::SeqCst);
        self.inner.read(at, buf)
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        self.inner.write(at, data, durability)
    }

    fn flush(&self) -> Io<'_, ()> {
        self.inner.flush()
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.inner.discard(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        self.inner.write_zeroes(at, len, mode, durability)
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        self.inner.locate(at, len)
    }
}

/// A batch whose length is wrong says that it is as large as the rest of its segment: that is not read into memory at once.
#[test]
fn a_wrong_length_takes_no_memory() {
    let (_dir, path) = volume();
    let options = life(&path, async |store: Arc<Store>| {
        store.create_topic("t", 1, store.topic_defaults()).await.unwrap();
        for number in 0..10_000 {
            log(&store).append(batch(&text(number)), Durability::Cached).await.unwrap();
        }
        store.close().await.unwrap();
        StoreOptions { topic_defaults: store.topic_defaults(), ..StoreOptions::default() }
    });
    let bytes = std::fs::read(&path).unwrap();
    let mark = text(7).into_bytes();
    let at = bytes.windows(mark.len()).position(|window| window == mark).unwrap() - crate::batch::HEADER;
    assert_eq!(bytes[at..at + 8], 7i64.to_be_bytes());
    // 7 MiB of the nearly 9 that follow.
    let image = File::options().write(true).open(&path).unwrap();
    image.write_all_at(&(7i32 << 20).to_be_bytes(), at as u64 + 8).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let inner = FileDevice::open(&path, OpenMode::ReadWrite).unwrap();
        let device = Arc::new(Largest { inner, largest: AtomicUsize::new(0) });
        let home = Home::Volume(device.clone());
        let store = Store::open(home, options, Arc::new(TokioRuntime::current())).await.unwrap();
        device.largest.store(0, Ordering::SeqCst);
        let lost = log(&store).read(7, 1000, ReadLimit::LogEnd, true).await;
        assert!(matches!(lost, Err(Error::LostBatch { from: 7, next: 8, .. })), "{lost:?}");
        assert!(!log(&store).read(8, 1000, ReadLimit::LogEnd, true).await.unwrap().is_empty());
        let largest = device.largest.load(Ordering::SeqCst);
        assert!(largest <= 2 << 20, "{largest} bytes were read at once");
    });
}
