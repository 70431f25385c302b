//! Lookups by offset and by time in a partition of 100 GiB.
//!
//! The log is made by appending: batches of 64 KiB with one record of zeroes each, on a device that keeps only what is
//! not zero, in memory. So segments, extents, indexes, catalog and batch headers are real, at every offset; what is
//! left out is the disk. `BENCH_LOOKUP_GIB` makes the log smaller or larger.

use crate::log::{batch, on_runtime};
use bytes::{Bytes, BytesMut};
use logstore::{Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use parking_lot::Mutex;
use raid::Result;
use raid::device::{Device, Durability, Io, Piece, ZeroMode};
use raid::runtime::{Runtime, TokioRuntime};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

const PAGE: usize = 4096;
/// Locks that the pages share.
const SHARDS: usize = 64;

/// Keeps the part of each page up to its last byte that is not zero.
struct Sparse {
    size: u64,
    shards: Vec<Mutex<HashMap<u64, Box<[u8]>>>>,
}

impl Sparse {
    fn new(size: u64) -> Self {
        Self { size, shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    fn get(&self, page: u64, out: &mut [u8; PAGE]) {
        out.fill(0);
        if let Some(kept) = self.shards[page as usize % SHARDS].lock().get(&page) {
            out[..kept.len()].copy_from_slice(kept);
        }
    }

    fn put(&self, page: u64, content: &[u8]) {
        // By words: nearly all of it is zero.
        let zero = content.as_chunks::<16>().0.iter().rposition(|word| u128::from_ne_bytes(*word) != 0);
        let mut shard = self.shards[page as usize % SHARDS].lock();
        match zero {
            Some(last) => drop(shard.insert(page, content[..(last + 1) * 16].into())),
            None => drop(shard.remove(&page)),
        }
    }

    /// Runs over the pages of a range: page number, where in the page, where in the range.
    fn pages(at: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let (page, from) =
                ((at + done as u64) / PAGE as u64, ((at + done as u64) % PAGE as u64) as usize);
            let n = (PAGE - from).min(len - done);
            let here = (n > 0).then_some((page, from..from + n, done));
            done += n;
            here
        })
    }

    fn set(&self, at: u64, data: &[u8]) {
        let mut whole = [0; PAGE];
        for (page, within, from) in Self::pages(at, data.len()) {
            let part = &data[from..from + within.len()];
            if part.len() == PAGE {
                self.put(page, part);
                continue;
            }
            self.get(page, &mut whole);
            whole[within].copy_from_slice(part);
            self.put(page, &whole);
        }
    }
}

impl Device for Sparse {
    fn name(&self) -> &'static str {
        "sparse memory"
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn refresh(&self) -> Io<'_, u64> {
        Box::pin(async { Ok(self.size) })
    }

    fn read(&self, at: u64, mut buf: BytesMut) -> Io<'_, BytesMut> {
        let mut whole = [0; PAGE];
        for (page, within, from) in Self::pages(at, buf.len()) {
            self.get(page, &mut whole);
            buf[from..from + within.len()].copy_from_slice(&whole[within]);
        }
        Box::pin(async { Ok(buf) })
    }

    fn write(&self, at: u64, data: Bytes, _: Durability) -> Io<'_, ()> {
        self.set(at, &data);
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> Io<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.write_zeroes(at, len, ZeroMode::MayPunch, Durability::Cached)
    }

    fn write_zeroes(&self, at: u64, len: u64, _: ZeroMode, _: Durability) -> Io<'_, ()> {
        let zeroes = [0; PAGE];
        for (page, within, _) in Self::pages(at, len as usize) {
            self.set(page * PAGE as u64 + within.start as u64, &zeroes[within]);
        }
        Box::pin(async { Ok(()) })
    }

    fn locate(&self, _: u64, _: u64) -> Io<'_, Option<Vec<Piece>>> {
        Box::pin(async { Result::Ok(None) })
    }
}

async fn open(device: &Arc<Sparse>) -> Arc<Store> {
    let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime::current());
    let home = Home::Volume(device.clone());
    Store::open(home, StoreOptions::default(), runtime).await.expect("the store opens")
}

/// Microseconds of lookups, lowest, median, 99 of 100 and highest.
fn tell(what: &str, mut took: Vec<f64>) {
    took.sort_by(f64::total_cmp);
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize];
    println!("  {what:<44} {:>10.1} {:>10.1} {:>10.1} {:>10.1}", at(0.0), at(0.5), at(0.99), at(1.0));
}

async fn by_offset(partition: &Partition, offset: i64) -> f64 {
    let begun = Instant::now();
    let slice = partition.read(offset, 1, ReadLimit::HighWatermark, true).await.expect("a read");
    assert!(!slice.is_empty(), "nothing at {offset}");
    begun.elapsed().as_secs_f64() * 1e6
}

async fn by_time(partition: &Partition, offset: i64) -> f64 {
    // Each batch has the time of its offset.
    let begun = Instant::now();
    let found = partition.offset_for_timestamp(offset).await.expect("a lookup");
    assert_eq!(found, Some((offset, offset)));
    begun.elapsed().as_secs_f64() * 1e6
}

/// Builds the log, and looks things up in it.
pub fn lookup() {
    let gib: u64 = std::env::var("BENCH_LOOKUP_GIB").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    on_runtime(async {
        let device = Arc::new(Sparse::new((gib + 4) << 30));
        let store = open(&device).await;
        let topic = store.create_topic("t", 1, TopicConfig::kafka_defaults()).await.expect("a topic is made");
        let partition = &topic.partitions()[0];
        let begun = Instant::now();
        let mut count = 0;
        while partition.size() < gib << 30 {
            let batch = batch(65 << 10, 64 << 10, count);
            partition.append(batch, Durability::Cached).await.expect("an append");
            count += 1;
        }
        store.close().await.expect("the store closes");
        println!(
            "\nlookup: {gib} GiB in one partition, {count} batches of 64 KiB (made in {:.0} s), microseconds (bar: microseconds)",
            begun.elapsed().as_secs_f64()
        );
        println!("  {:<44} {:>10} {:>10} {:>10} {:>10}", "", "lowest", "median", "99 %", "highest");
        let spread = |n: i64| (n * 7_919_317 + 13) % count;
        let segment = |n: i64| n * (count / gib as i64) + 100;
        for time in [false, true] {
            let name = if time { "by time" } else { "by offset" };
            let look = async |partition: &Partition, offset| {
                if time { by_time(partition, offset).await } else { by_offset(partition, offset).await }
            };
            let store = open(&device).await;
            let topic = store.topic("t").expect("it was made");
            let partition = &topic.partitions()[0];
            tell(&format!("{name}, the first of all"), vec![look(partition, count - 1).await]);
            let mut took = Vec::new();
            for n in 0..gib as i64 - 1 {
                took.push(look(partition, segment(n)).await);
            }
            tell(&format!("{name}, each segment's first (cold index)"), took);
            let mut took = Vec::new();
            for n in 0..2000 {
                took.push(look(partition, spread(n)).await);
            }
            tell(&format!("{name}, anywhere (indexes past their budget)"), took);
            let mut took = Vec::new();
            for n in 0..5000 {
                took.push(look(partition, spread(n) % 16_000).await);
            }
            tell(&format!("{name}, in one segment (warm index)"), took);
            store.close().await.expect("the store closes");
        }
    });
}
