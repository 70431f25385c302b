//! What many idle partitions cost: memory each, and time to start. Figures are printed; asserted are the limit on memory, and
//! a bound on the start that only reading data would break.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use futures_util::{StreamExt, stream};
use logstore::{Home, Partition, Store, StoreOptions, TopicConfig};
use raid::device::{Durability, FileDevice, OpenMode};
use raid::runtime::TokioRuntime;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tests::broker::batch;

const PARTITIONS: u32 = 10_000;
/// With the catalog, which on a volume is held in memory. Units: bytes.
const MOST: u64 = 4096;

/// Resident memory of this process. Units: bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Set for the process that makes the store: what making takes of memory is not to be taken for what being open does.
const MAKE: &str = "PARTITIONS_IMAGE_TO_MAKE";

async fn open(image: &Path) -> Arc<Store> {
    let device = FileDevice::open(image, OpenMode::ReadWrite).unwrap();
    let runtime = Arc::new(TokioRuntime::current());
    Store::open(Home::Volume(Arc::new(device)), StoreOptions::default(), runtime).await.unwrap()
}

async fn make(image: &Path) {
    let store = open(image).await;
    let topic = store.create_topic("t", PARTITIONS, TopicConfig::kafka_defaults()).await.unwrap();
    let one = async |partition: &Arc<Partition>| {
        let batch = batch(&[b"a value of some length"], 1000);
        partition.append(batch, Durability::Cached).await.unwrap();
    };
    stream::iter(topic.partitions()).for_each_concurrent(500, one).await;
    store.close().await.unwrap();
}

#[test]
fn ten_thousand_idle_partitions() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    if let Some(image) = std::env::var_os(MAKE) {
        return runtime.block_on(make(Path::new(&image)));
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("volume.img");
    std::fs::File::create(&image).unwrap().set_len(4 << 30).unwrap();
    let mut maker = Command::new(std::env::current_exe().unwrap());
    let made = maker.args(["--exact", "ten_thousand_idle_partitions"]).env(MAKE, &image).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stdout));
    let (before, begun) = (resident(), Instant::now());
    runtime.block_on(async {
        let store = open(&image).await;
        let (took, each) = (begun.elapsed(), resident().saturating_sub(before) / u64::from(PARTITIONS));
        eprintln!("{PARTITIONS} partitions: open after {took:.1?}, {each} bytes each");
        assert!(store.topic("t").unwrap().partitions().iter().all(|p| p.offsets().log_end == 1));
        assert!(took < Duration::from_secs(20), "open after {took:?}");
        assert!(each <= MOST, "{each} bytes a partition");
        store.close().await.unwrap();
    });
}
