//! What was written is on its way to the disks before anybody flushes: the volume tells the members that hold it, and the
//! log store tells the volume of what it appended, whole pages, once.

use bytes::{Bytes, BytesMut};
use logstore::{Home, Store, StoreOptions, TopicConfig};
use parking_lot::Mutex;
use raid::create::{Bitmap, CreateOptions, create, make_image};
use raid::device::{Device, Durability, FileDevice, Io, OpenMode, Piece, ZeroMode};
use raid::error::Result;
use raid::geometry::Layout;
use raid::orders::MemberName;
use raid::runtime::{Runtime, TokioRuntime};
use raid::volume::{AssembleOptions, Volume};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use tests::broker::batch;
use tests::process::Sandbox;

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 64 << 10;
const PAGE: u64 = 4096;

/// A device that notes what it is told to begin with.
struct Told {
    inner: Arc<dyn Device>,
    ranges: Mutex<Vec<Range<u64>>>,
}

impl Told {
    fn over(inner: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { inner, ranges: Mutex::default() })
    }

    fn image(path: &Path, size: u64) -> Arc<Self> {
        make_image(path, size).expect("the sandbox can be written");
        Self::over(Arc::new(FileDevice::open(path, OpenMode::ReadWrite).expect("it was made")))
    }

    /// What it was told since it was last asked.
    fn take(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut *self.ranges.lock())
    }
}

impl Device for Told {
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
        self.inner.read(at, buf)
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        self.inner.write(at, data, durability)
    }

    fn flush(&self) -> Io<'_, ()> {
        self.inner.flush()
    }

    fn begin_write_back(&self, at: u64, len: u64) {
        self.ranges.lock().push(at..at + len);
        self.inner.begin_write_back(at, len);
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

fn runtime() -> Arc<dyn Runtime> {
    Arc::new(TokioRuntime::current())
}

#[tokio::test]
async fn a_volume_tells_the_members_that_hold_the_range() -> Result<()> {
    let sandbox = Sandbox::new();
    let members: Vec<Arc<Told>> =
        (0..4).map(|n| Told::image(&sandbox.join(format!("disk{n}")), 16 * MIB)).collect();
    let devices: Vec<Arc<dyn Device>> =
        members.iter().map(|one| Arc::clone(one) as Arc<dyn Device>).collect();
    let options = CreateOptions {
        name: "told".to_owned(),
        layout: Layout::near(2),
        chunk: CHUNK,
        bitmap: Bitmap::STANDARD,
        assume_clean: false,
        force: false,
    };
    create(&devices, &options, runtime().as_ref()).await?;
    let volume = Volume::assemble(devices, AssembleOptions::default(), runtime()).await?;
    let told = || members.iter().map(|one| one.take()).collect::<Vec<_>>();
    told();

    // Chunks 0, 2 and 4 lie on the first two, 1 and 3 on the others; the range begins in chunk 0 and ends in chunk 4.
    volume.begin_write_back(PAGE, 4 * CHUNK);
    let ranges = told();
    let lengths: Vec<Vec<u64>> =
        ranges.iter().map(|of| of.iter().map(|range| range.end - range.start).collect()).collect();
    assert_eq!(lengths, [[2 * CHUNK], [2 * CHUNK], [2 * CHUNK], [2 * CHUNK]]);
    assert_eq!(ranges[0], ranges[1]);
    assert_eq!(ranges[2], ranges[3]);
    let start = ranges[2][0].start;
    assert_eq!(ranges[0][0].start, start + PAGE, "the first chunk's first page is none of it");
    assert_eq!(start % CHUNK, 0);

    // Nobody who does not hold it, nobody who has failed, and nothing that is not there.
    let (nothing, page) = (Vec::new, || Vec::from_iter(Some(start..start + PAGE)));
    volume.begin_write_back(CHUNK, PAGE);
    assert_eq!(told(), [nothing(), nothing(), page(), page()]);
    volume.fail(&MemberName::Slot(3)).await?;
    volume.begin_write_back(CHUNK, PAGE);
    assert_eq!(told(), [nothing(), nothing(), page(), nothing()]);
    volume.begin_write_back(volume.size() - PAGE, 2 * PAGE);
    volume.begin_write_back(u64::MAX, 1);
    assert!(told().iter().all(Vec::is_empty));
    volume.stop().await
}

#[tokio::test]
async fn what_is_appended_is_begun_with_once_and_by_whole_pages() {
    let sandbox = Sandbox::new();
    let device = Told::image(&sandbox.join("volume"), 128 * MIB);
    let home = Home::Volume(Arc::clone(&device) as Arc<dyn Device>);
    let store = Store::open(home, StoreOptions::default(), runtime()).await.expect("the store opens");
    let topic = store.create_topic("t", 1, TopicConfig::kafka_defaults()).await.expect("a topic is made");
    let partition = &topic.partitions()[0];
    let records = batch(&[&vec![7; 100_001]], 5);
    let (mut begun, mut size) = (0, 0);
    while size < 20 * MIB {
        partition.append(records.clone(), Durability::Cached).await.expect("an append");
        size = partition.size();
        for range in device.take() {
            // The extents of the only log lie behind each other.
            assert!(range.start % PAGE == 0 && range.end % PAGE == 0, "{range:?}");
            begun += range.end - range.start;
        }
        assert!(begun <= size, "{begun} of {size}: something was begun with twice, or before it was written");
        assert!(size - begun <= 2 * MIB + PAGE + records.len() as u64, "{begun} of {size}: the disk is idle");
    }
    assert!(begun > 16 * MIB);
    store.close().await.expect("the store closes");

    // What an earlier life wrote is not begun with again.
    let home = Home::Volume(Arc::clone(&device) as Arc<dyn Device>);
    let store = Store::open(home, StoreOptions::default(), runtime()).await.expect("the store opens");
    let topic = store.topic("t").expect("it is there");
    device.take();
    for _ in 0..5 * MIB / records.len() as u64 {
        topic.partitions()[0].append(records.clone(), Durability::Cached).await.expect("an append");
    }
    let begun: u64 = device.take().iter().map(|range| range.end - range.start).sum();
    assert!((2 * MIB..=7 * MIB).contains(&begun), "{begun}");
    store.close().await.expect("the store closes");
}
