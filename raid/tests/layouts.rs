//! Every layout through the whole engine, on real files: what is written is read, lies on its members where the
//! geometry says, and is still there without any set of members that the layout can spare.

// A test fails by panicking, in its helpers too.
#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use raid::create::{Bitmap, CreateOptions, create, make_image};
use raid::device::{Device, Durability, FileDevice, OpenMode, ZeroMode, buffer};
use raid::geometry::{Chunk, Geometry, Layout, Slot};
use raid::runtime::{Runtime, TokioRuntime};
use raid::superblock::{SUPER_BYTES, SUPER_OFFSET, Superblock};
use raid::volume::{AssembleOptions, Volume};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const CHUNK: u64 = 4 << 10;
/// Rows of a member: no multiple of any number of far copies used here.
const ROWS: u64 = 61;

const SHAPES: [(&str, usize); 14] = [
    ("n2", 3),
    ("n2", 4),
    ("n3", 5),
    ("f2", 2),
    ("f2", 3),
    ("f2", 4),
    ("f2", 5),
    ("f3", 4),
    ("f3", 6),
    ("o2", 3),
    ("o2", 4),
    ("o3", 5),
    ("n2f2", 4),
    ("n2f2", 5),
];

fn runtime() -> Arc<dyn Runtime> {
    Arc::new(TokioRuntime::current())
}

fn open(path: &Path) -> Arc<dyn Device> {
    Arc::new(FileDevice::open(path, OpenMode::ReadWrite).unwrap())
}

struct Array {
    _dir: tempfile::TempDir,
    paths: Vec<PathBuf>,
}

impl Array {
    async fn new(layout: Layout, members: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..members).map(|i| dir.path().join(format!("disk{i}"))).collect();
        for path in &paths {
            make_image(path, (1 << 20) + ROWS * CHUNK).unwrap();
        }
        let options = CreateOptions {
            name: "test".to_owned(),
            layout,
            chunk: CHUNK,
            bitmap: Bitmap::STANDARD,
            assume_clean: false,
            force: false,
        };
        let devices: Vec<_> = paths.iter().map(|path| open(path)).collect();
        create(&devices, &options, runtime().as_ref()).await.unwrap();
        Self { _dir: dir, paths }
    }

    async fn try_start(&self, is_lost: impl Fn(usize) -> bool) -> raid::Result<Arc<Volume>> {
        let present = self.paths.iter().enumerate().filter(|(slot, _)| !is_lost(*slot));
        let devices = present.map(|(_, path)| open(path)).collect();
        Volume::assemble(devices, AssembleOptions::default(), runtime()).await
    }

    fn superblock(&self, slot: usize) -> Superblock {
        let file = std::fs::File::open(&self.paths[slot]).unwrap();
        let mut bytes = [0; SUPER_BYTES];
        file.read_exact_at(&mut bytes, SUPER_OFFSET).unwrap();
        Superblock::decode(&bytes, file.metadata().unwrap().len()).unwrap()
    }

    /// Every copy of every chunk, read from the images without the engine.
    fn assert_holds(&self, geometry: &Geometry, content: &[u8], shape: &str) {
        let files: Vec<_> = self.paths.iter().map(|path| std::fs::File::open(path).unwrap()).collect();
        let start = self.superblock(0).data_start();
        for (number, expected) in content.chunks(CHUNK as usize).enumerate() {
            for place in geometry.places(Chunk(number as u64)) {
                let mut found = vec![0; CHUNK as usize];
                files[place.slot.0].read_exact_at(&mut found, start + place.at.0).unwrap();
                assert!(found == expected, "{shape}: chunk {number} at {place:?}");
            }
        }
    }
}

fn pattern(len: u64) -> BytesMut {
    (0..len / 8).flat_map(|word| (word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes()).collect()
}

async fn read(volume: &Volume) -> BytesMut {
    volume.read(0, buffer(volume.size() as usize)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_layout_keeps_its_copies_and_spares_what_it_promises() {
    for (layout, members) in SHAPES {
        let shape = format!("{layout} on {members}");
        let layout: Layout = layout.parse().unwrap();
        let array = Array::new(layout, members).await;
        let geometry = Geometry::new(layout, members, CHUNK, ROWS * CHUNK).unwrap();
        assert_eq!(array.superblock(0).geometry().unwrap(), geometry, "{shape}");

        let volume = array.try_start(|_| false).await.unwrap();
        assert_eq!(volume.size(), geometry.size(), "{shape}");
        let mut content = pattern(volume.size());
        volume.write(0, Bytes::copy_from_slice(&content), Durability::Cached).await.unwrap();
        // Over several chunks, at no chunk's border.
        let zeroes = CHUNK + 512..9 * CHUNK + 1024;
        let len = zeroes.end - zeroes.start;
        volume.write_zeroes(zeroes.start, len, ZeroMode::MayPunch, Durability::Cached).await.unwrap();
        content[zeroes.start as usize..zeroes.end as usize].fill(0);
        assert!(read(&volume).await == content, "{shape}");
        volume.stop().await.unwrap();
        drop(volume);
        array.assert_holds(&geometry, &content, &shape);

        // Nothing is written while members are missing, so each start finds all of them current.
        let sets = geometry.mirror_sets();
        for lost in 0..1u32 << members {
            let is_lost = |slot: usize| lost >> slot & 1 == 1;
            let spared = sets.iter().all(|set| set.iter().any(|&Slot(slot)| !is_lost(slot)));
            match array.try_start(is_lost).await {
                Ok(volume) => {
                    assert!(spared, "{shape}: started without {lost:#b}");
                    assert!(read(&volume).await == content, "{shape} without {lost:#b}");
                    volume.stop().await.unwrap();
                }
                Err(refused) => assert!(!spared, "{shape} without {lost:#b}: {refused}"),
            }
        }
    }
}

/// Of far and offset layouts each member is read in one part only, so that a sequential read is RAID 0's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn far_layouts_are_read_like_raid_0() {
    for (layout, members) in SHAPES.into_iter().filter(|(layout, _)| !layout.starts_with('n')) {
        let layout: Layout = layout.parse().unwrap();
        let array = Array::new(layout, members).await;
        let volume = array.try_start(|_| false).await.unwrap();
        let geometry = Geometry::new(layout, members, CHUNK, ROWS * CHUNK).unwrap();
        let start = array.superblock(0).data_start();
        for chunk in 0..geometry.size() / CHUNK {
            let pieces = volume.locate(chunk * CHUNK, CHUNK).await.unwrap().unwrap();
            let first = geometry.place(Chunk(chunk), 0);
            assert_eq!((pieces.len(), pieces[0].at), (1, start + first.at.0), "{layout} on {members}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_copies_than_members_and_members_without_room_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..3).map(|i| dir.path().join(format!("disk{i}"))).collect();
    for path in &paths {
        make_image(path, (1 << 20) + 2 * CHUNK).unwrap();
    }
    let refused = |layout: &str, members: usize, chunk: u64| {
        let options = CreateOptions {
            name: "test".to_owned(),
            layout: layout.parse().unwrap(),
            chunk,
            bitmap: Bitmap::STANDARD,
            assume_clean: false,
            force: false,
        };
        let devices: Vec<_> = paths[..members].iter().map(|path| open(path)).collect();
        async move { create(&devices, &options, runtime().as_ref()).await.map_err(|e| e.to_string()) }
    };
    let said = refused("f3", 2, CHUNK).await.unwrap_err();
    assert!(said.contains("far=3") && said.contains("there are 2"), "{said}");
    let said = refused("n2f2", 3, CHUNK).await.unwrap_err();
    assert!(said.contains("near=2,far=2"), "{said}");
    // Two rows are too few for three far copies.
    let said = refused("f3", 3, CHUNK).await.unwrap_err();
    assert!(said.contains("needs at least"), "{said}");
    let said = refused("f2", 3, u64::MAX / 2 + 1).await.unwrap_err();
    assert!(said.contains("not a power of two from 4K"), "{said}");
    refused("f2", 3, CHUNK).await.unwrap();
}
