//! The volume on real files under tokio: what is written is read, across restarts, degraded, and after crashes.

// A test fails by panicking, in its helpers too.
#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use raid::create::{CreateOptions, create, make_image};
use raid::device::{Device, Durability, FileDevice, OpenMode, ZeroMode, buffer};
use raid::geometry::Layout;
use raid::runtime::{Runtime, TokioRuntime};
use raid::status::{SyncAction, VolumeState};
use raid::volume::{AssembleOptions, Volume};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

const MEMBER: u64 = 16 << 20;
const CHUNK: u64 = 64 << 10;

fn runtime() -> Arc<dyn Runtime> {
    Arc::new(TokioRuntime::current())
}

fn open(path: &Path) -> Arc<dyn Device> {
    Arc::new(FileDevice::open(path, OpenMode::ReadWrite).unwrap())
}

fn options(name: &str) -> CreateOptions {
    CreateOptions {
        name: name.to_owned(),
        layout: Layout::near(2),
        chunk: CHUNK,
        assume_clean: false,
        force: false,
    }
}

/// An array on new image files.
struct Array {
    _dir: TempDir,
    paths: Vec<PathBuf>,
}

impl Array {
    async fn new(members: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..members).map(|i| dir.path().join(format!("disk{i}"))).collect();
        for path in &paths {
            make_image(path, MEMBER).unwrap();
        }
        let devices: Vec<_> = paths.iter().map(|path| open(path)).collect();
        create(&devices, &options("test"), runtime().as_ref()).await.unwrap();
        Self { _dir: dir, paths }
    }

    async fn start(&self) -> Arc<Volume> {
        self.start_without(&[]).await
    }

    async fn start_without(&self, absent: &[usize]) -> Arc<Volume> {
        self.try_start_without(absent).await.unwrap()
    }

    async fn try_start_without(&self, absent: &[usize]) -> raid::Result<Arc<Volume>> {
        let present = self.paths.iter().enumerate().filter(|(i, _)| !absent.contains(i));
        let devices = present.map(|(_, path)| open(path)).rev().collect();
        Volume::assemble(devices, AssembleOptions::default(), runtime()).await
    }
}

/// Bytes that differ from place to place and from round to round.
fn pattern(at: u64, len: usize, round: u8) -> Bytes {
    (at..at + len as u64).map(|i| (i / 512) as u8 ^ (i as u8) ^ round).collect()
}

async fn read(volume: &Volume, at: u64, len: usize) -> BytesMut {
    volume.read(at, buffer(len)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_is_read_back_after_a_restart() {
    for members in [2, 3, 4, 5] {
        let array = Array::new(members).await;
        let volume = array.start().await;
        assert_eq!(volume.status().state, VolumeState::Clean);
        assert_eq!(volume.status().sync.action, SyncAction::Idle, "fresh images need no resync");
        let ranges = [(0, 1), (CHUNK - 1, 2), (5 * CHUNK - 700, 3 * CHUNK as usize), (volume.size() - 9, 9)];
        for (at, len) in ranges {
            volume.write(at, pattern(at, len, 1), Durability::Cached).await.unwrap();
            assert_eq!(read(&volume, at, len).await, pattern(at, len, 1));
        }
        volume.write_zeroes(6 * CHUNK, 100, ZeroMode::MayPunch, Durability::Stable).await.unwrap();
        volume.flush().await.unwrap();
        assert_eq!(volume.status().state, VolumeState::Active);
        assert_eq!(volume.status().bitmap.dirty, 1);
        volume.stop().await.unwrap();
        assert!(volume.write(0, Bytes::from_static(b"x"), Durability::Cached).await.is_err());
        drop(volume);

        let volume = array.start().await;
        assert_eq!(volume.status().state, VolumeState::Clean);
        assert_eq!(volume.status().bitmap.dirty, 0);
        for (at, len) in ranges {
            let mut expected = BytesMut::from(&pattern(at, len, 1)[..]);
            if at < 6 * CHUNK && at + len as u64 > 6 * CHUNK {
                let zeroes = (6 * CHUNK - at) as usize;
                expected[zeroes..zeroes + 100].fill(0);
            }
            assert_eq!(read(&volume, at, len).await, expected);
        }
    }
}
