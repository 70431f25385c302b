//! What the tests of the whole store share: batches, homes, a store that can be stopped in order or dropped.
#![allow(clippy::unwrap_used, missing_docs)] // a test fails by panicking

use bytes::{BufMut, Bytes, BytesMut};
use logstore::compression::{Codec, compress};
use logstore::{Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use raid::device::{Durability, FileDevice, OpenMode};
use raid::runtime::{BoxFuture, Runtime, TokioRuntime};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;

pub const NOW: i64 = 1_700_000_000_000;

/// A batch of uncompressed records with these values; timestamps rise by one millisecond.
pub struct Batch {
    pub values: Vec<Vec<u8>>,
    /// Of each value its key, and whether it is none but a tombstone; none where the list ends before.
    pub keys: Vec<(Vec<u8>, bool)>,
    pub timestamp: i64,
    pub producer: (i64, i16, i32),
    pub attributes: i16,
}

pub fn batch(values: &[&str]) -> Batch {
    Batch {
        values: values.iter().map(|value| value.as_bytes().to_vec()).collect(),
        keys: Vec::new(),
        timestamp: NOW,
        producer: (-1, -1, -1),
        attributes: 0,
    }
}

/// Records with keys; no value makes a tombstone.
pub fn keyed(records: &[(&str, Option<&str>)]) -> Batch {
    let values: Vec<&str> = records.iter().map(|(_, value)| value.unwrap_or_default()).collect();
    let keys = records.iter().map(|(key, value)| (key.as_bytes().to_vec(), value.is_none())).collect();
    Batch { keys, ..batch(&values) }
}

pub fn sized(bytes: usize, fill: u8) -> Batch {
    Batch { values: vec![vec![fill; bytes]], ..batch(&[]) }
}

fn varint(out: &mut Vec<u8>, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)) as u64;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

impl Batch {
    pub fn at(mut self, timestamp: i64) -> Self {
        self.timestamp = timestamp;
        self
    }

    pub fn by(mut self, id: i64, epoch: i16, sequence: i32) -> Self {
        self.producer = (id, epoch, sequence);
        self
    }

    /// Part of a transaction.
    pub fn txn(mut self) -> Self {
        self.attributes |= 0x10;
        self
    }

    pub fn bytes(&self) -> Bytes {
        let mut records = Vec::new();
        for (at, value) in self.values.iter().enumerate() {
            let mut record = vec![0];
            varint(&mut record, if self.timestamp < 0 { 0 } else { at as i64 });
            varint(&mut record, at as i64);
            let key = self.keys.get(at);
            varint(&mut record, key.map_or(-1, |(key, _)| key.len() as i64));
            record.extend(key.iter().flat_map(|(key, _)| key));
            let is_tombstone = key.is_some_and(|(_, is_tombstone)| *is_tombstone);
            varint(&mut record, if is_tombstone { -1 } else { value.len() as i64 });
            record.extend(value);
            varint(&mut record, 0);
            varint(&mut records, record.len() as i64);
            records.extend(record);
        }
        let count = self.values.len() as i32;
        let mut body = BytesMut::new();
        body.put_i16(self.attributes);
        body.put_i32(count - 1);
        body.put_i64(self.timestamp);
        let largest = if self.timestamp < 0 { -1 } else { self.timestamp + i64::from(count) - 1 };
        body.put_i64(largest);
        body.put_i64(self.producer.0);
        body.put_i16(self.producer.1);
        body.put_i32(self.producer.2);
        body.put_i32(count);
        body.put_slice(&records);
        let mut bytes = BytesMut::new();
        bytes.put_i64(0);
        bytes.put_i32(4 + 1 + 4 + body.len() as i32);
        bytes.put_i32(-1);
        bytes.put_i8(2);
        bytes.put_u32(crc32c::crc32c(&body));
        bytes.put_slice(&body);
        bytes.freeze()
    }
}

impl Batch {
    /// The same with its records compressed.
    pub fn packed(&self, codec: Codec) -> Bytes {
        let plain = self.bytes();
        let mut bytes = BytesMut::from(&plain[..61]);
        bytes.put_slice(&compress(codec, &plain[61..]).unwrap());
        let length = bytes.len() as i32 - 12;
        bytes[8..12].copy_from_slice(&length.to_be_bytes());
        bytes[22] |= (0..5).find(|number| Codec::of(*number) == Some(codec)).unwrap() as u8;
        let crc = crc32c::crc32c(&bytes[21..]);
        bytes[17..21].copy_from_slice(&crc.to_be_bytes());
        bytes.freeze()
    }
}

/// A clock that is so many milliseconds ahead of the machine's.
#[derive(Clone, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    pub fn pass(&self, millis: u64) {
        self.0.fetch_add(millis, Ordering::SeqCst);
    }

    pub fn now(&self) -> i64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        (now.as_millis() as u64 + self.0.load(Ordering::SeqCst)) as i64
    }
}

/// The machine, by that clock.
struct Late {
    inner: TokioRuntime,
    clock: Clock,
}

impl Runtime for Late {
    fn now(&self) -> Duration {
        self.inner.now() + Duration::from_millis(self.clock.0.load(Ordering::SeqCst))
    }

    fn wall_clock(&self) -> Duration {
        self.inner.wall_clock() + Duration::from_millis(self.clock.0.load(Ordering::SeqCst))
    }

    fn fill_random(&self, out: &mut [u8]) {
        self.inner.fill_random(out);
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.inner.spawn(task);
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        self.inner.sleep(time)
    }
}

/// A place for a store that outlives it.
pub struct Place {
    pub dir: TempDir,
    pub volume: Option<u64>,
}

impl Place {
    pub fn directory() -> Self {
        Self { dir: TempDir::new().unwrap(), volume: None }
    }

    pub fn volume(size: u64) -> Self {
        let dir = TempDir::new().unwrap();
        File::create(dir.path().join("volume.img")).unwrap().set_len(size).unwrap();
        Self { dir, volume: Some(size) }
    }

    pub fn both() -> [Self; 2] {
        [Self::directory(), Self::volume(64 << 20)]
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("volume.img")
    }

    pub fn home(&self) -> Home {
        if self.volume.is_some() {
            Home::Volume(Arc::new(FileDevice::open(&self.image(), OpenMode::ReadWrite).unwrap()))
        } else {
            Home::Directory(self.dir.path().join("data"))
        }
    }

    pub fn partition_dir(&self, topic: &str, partition: u32) -> PathBuf {
        self.dir.path().join("data").join(format!("{topic}-{partition}"))
    }

    /// Runs `work` on a store, and then drops everything without closing, as kill -9 does: the runtime goes, and
    /// every task with it.
    pub fn run<T>(&self, work: impl AsyncFnOnce(Arc<Store>) -> T) -> T {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        runtime.block_on(async {
            let store = self.open().await.unwrap();
            work(store).await
        })
    }

    /// The same with other options.
    pub fn run_with<T>(
        &self,
        set: impl FnOnce(&mut StoreOptions),
        work: impl AsyncFnOnce(Arc<Store>) -> T,
    ) -> T {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        runtime.block_on(async {
            let mut options = StoreOptions { topic_defaults: defaults(), ..StoreOptions::default() };
            set(&mut options);
            let runtime = Arc::new(TokioRuntime::current());
            work(Store::open(self.home(), options, runtime).await.unwrap()).await
        })
    }

    /// The same by another clock; `in_order` closes the store.
    pub fn run_by<T>(&self, clock: &Clock, in_order: bool, work: impl AsyncFnOnce(Arc<Store>) -> T) -> T {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        runtime.block_on(async {
            let options = StoreOptions { topic_defaults: defaults(), ..StoreOptions::default() };
            let runtime = Arc::new(Late { inner: TokioRuntime::current(), clock: clock.clone() });
            let store = Store::open(self.home(), options, runtime).await.unwrap();
            let answer = work(Arc::clone(&store)).await;
            if in_order {
                store.close().await.unwrap();
            }
            answer
        })
    }

    /// The same, and closes the store in order.
    pub fn run_and_close<T>(&self, work: impl AsyncFnOnce(Arc<Store>) -> T) -> T {
        self.run(async |store: Arc<Store>| {
            let answer = work(Arc::clone(&store)).await;
            store.close().await.unwrap();
            answer
        })
    }

    pub async fn open(&self) -> logstore::Result<Arc<Store>> {
        let options = StoreOptions { topic_defaults: defaults(), ..StoreOptions::default() };
        Store::open(self.home(), options, Arc::new(TokioRuntime::current())).await
    }
}

/// Retention is by the wall clock, and the batches here are old.
pub fn defaults() -> TopicConfig {
    let mut config = TopicConfig::kafka_defaults();
    config.set_default("retention.ms", "-1").unwrap();
    config
}

pub fn config(own: &[(&str, &str)]) -> TopicConfig {
    defaults().with(own.iter().copied()).unwrap()
}

pub async fn topic(store: &Store, name: &str, own: &[(&str, &str)]) -> Arc<Partition> {
    let topic = store.create_topic(name, 1, config(own)).await.unwrap();
    Arc::clone(&topic.partitions()[0])
}

pub fn first(store: &Store, name: &str) -> Arc<Partition> {
    Arc::clone(&store.topic(name).unwrap().partitions()[0])
}

pub async fn append(partition: &Arc<Partition>, batch: &Batch) -> i64 {
    partition.append(batch.bytes(), Durability::Cached).await.unwrap().base_offset
}

pub async fn append_stable(partition: &Arc<Partition>, batch: &Batch) -> i64 {
    let appended = partition.append(batch.bytes(), Durability::Stable).await.unwrap();
    appended.commit.unwrap().await.unwrap();
    appended.base_offset
}

/// Everything from the log's start, as (base offset, batch bytes), and checks that offsets follow each other.
pub async fn read_all(partition: &Partition) -> Vec<(i64, Bytes)> {
    let mut at = partition.offsets().log_start;
    let mut batches = Vec::new();
    loop {
        let slice = partition.read(at, 100_000, ReadLimit::HighWatermark, true).await.unwrap();
        if slice.is_empty() {
            assert_eq!(at, partition.offsets().high_watermark);
            return batches;
        }
        let mut bytes = slice.copy().await.unwrap();
        assert_eq!(bytes.len() as u64, slice.len());
        let sent: u64 = slice.pieces().unwrap().iter().map(|piece| piece.len).sum();
        assert_eq!(sent, slice.len());
        while !bytes.is_empty() {
            let header = logstore::batch::Header::parse(&bytes).unwrap();
            let batch = bytes.split_to(header.size as usize);
            logstore::batch::check(&header, &batch).unwrap();
            assert!(header.base_offset == at || batches.is_empty(), "{} follows {at}", header.base_offset);
            at = header.next_offset();
            batches.push((header.base_offset, batch));
        }
    }
}

/// The records part of a batch: what no broker may change.
pub fn records(batch: &[u8]) -> &[u8] {
    &batch[61..]
}

pub fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    found.sort();
    found
}
