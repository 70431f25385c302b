//! The volume on real files under tokio: what is written is read, across restarts, degraded, and after crashes.

// A test fails by panicking, in its helpers too.
#![allow(clippy::unwrap_used)]

use bytes::{Bytes, BytesMut};
use raid::create::{Bitmap, CreateOptions, create, make_image};
use raid::device::{Device, Durability, FileDevice, OpenMode, ZeroMode, buffer};
use raid::error::Error;
use raid::geometry::Layout;
use raid::runtime::{BoxFuture, Runtime, TokioRuntime};
use raid::status::{MemberState, SyncAction, VolumeState};
use raid::volume::{AssembleOptions, Volume};
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const MEMBER: u64 = 16 << 20;
const CHUNK: u64 = 64 << 10;
/// Many times what letting go takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn runtime() -> Arc<dyn Runtime> {
    Arc::new(TokioRuntime::current())
}

fn open(path: &Path) -> Arc<dyn Device> {
    Arc::new(FileDevice::open(path, OpenMode::ReadWrite).unwrap())
}

/// Opens what a volume may still hold that was merely dropped: its background lets go of its members when it notices.
async fn open_again(path: &Path) -> Arc<dyn Device> {
    let begun = Instant::now();
    loop {
        match FileDevice::open(path, OpenMode::ReadWrite) {
            Err(Error::InUse { .. }) if begun.elapsed() < PATIENCE => {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            opened => return Arc::new(opened.unwrap()),
        }
    }
}

fn options(name: &str) -> CreateOptions {
    CreateOptions {
        name: name.to_owned(),
        layout: Layout::near(2),
        chunk: CHUNK,
        bitmap: Bitmap::STANDARD,
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
        let devices = present.rev().map(|(_, path)| open(path)).collect();
        Volume::assemble(devices, AssembleOptions::default(), runtime()).await
    }

    /// After a volume that was not stopped.
    async fn start_after_a_crash(&self) -> Arc<Volume> {
        let mut devices = Vec::new();
        for path in &self.paths {
            devices.push(open_again(path).await);
        }
        Volume::assemble(devices, AssembleOptions::default(), runtime()).await.unwrap()
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_cut_short_is_taken_out_and_its_mirror_serves() {
    let array = Array::new(2).await;
    let volume = array.start().await;
    let data = pattern(0, 1 << 20, 3);
    volume.write(0, data.clone(), Durability::Stable).await.unwrap();
    std::fs::File::options().write(true).open(&array.paths[0]).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(read(&volume, 0, 1 << 20).await, data);
    volume.write(0, pattern(0, 4096, 4), Durability::Cached).await.unwrap();
    volume.flush().await.unwrap();
    let status = volume.status();
    assert_eq!(status.state, VolumeState::Degraded);
    assert_eq!(status.members[0].state, MemberState::Faulty);
    assert_eq!(read(&volume, 0, 4096).await, pattern(0, 4096, 4));
    volume.stop().await.unwrap();
    drop(volume);
    let Err(refused) = array.try_start_without(&[]).await else { panic!("a member that shrank was taken") };
    assert!(refused.to_string().contains("disk0"), "{refused}");
    let volume = array.start_without(&[0]).await;
    assert_eq!(read(&volume, 4096, 4096).await, pattern(4096, 4096, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_returned_member_that_missed_writes_is_not_read() {
    let array = Array::new(4).await;
    let volume = array.start_without(&[1]).await;
    volume.write(0, pattern(0, 4 * CHUNK as usize, 5), Durability::Stable).await.unwrap();
    volume.stop().await.unwrap();
    drop(volume);
    let volume = array.start().await;
    let status = volume.status();
    assert_eq!(status.members[1].state, MemberState::Faulty, "{status:?}");
    assert!(status.members[1].path.ends_with("disk1"));
    assert_eq!(read(&volume, 0, 4 * CHUNK as usize).await, pattern(0, 4 * CHUNK as usize, 5));
    volume.stop().await.unwrap();
    drop(volume);
    let Err(refused) = array.try_start_without(&[0]).await else { panic!("started without a current copy") };
    assert!(refused.to_string().contains("disk1"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_crash_dirty_regions_are_made_equal_and_cleared() {
    let array = Array::new(2).await;
    let volume = array.start().await;
    volume.write(0, pattern(0, 1 << 20, 6), Durability::Cached).await.unwrap();
    drop(volume);
    let volume = array.start_after_a_crash().await;
    assert_eq!(read(&volume, 0, 1 << 20).await, pattern(0, 1 << 20, 6));
    while volume.status().sync.action != SyncAction::Idle {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    volume.stop().await.unwrap();
    assert_eq!(volume.status().bitmap.dirty, 0);
}

/// The machine, with tasks that are looked after every few milliseconds only.
struct Sluggish(TokioRuntime);

impl Runtime for Sluggish {
    fn now(&self) -> Duration {
        self.0.now()
    }

    fn wall_clock(&self) -> Duration {
        self.0.wall_clock()
    }

    fn fill_random(&self, out: &mut [u8]) {
        self.0.fill_random(out);
    }

    fn spawn(&self, mut task: BoxFuture<'static, ()>) {
        self.0.spawn(Box::pin(async move {
            let mut is_done = false;
            while !is_done {
                tokio::time::sleep(Duration::from_millis(20)).await;
                is_done = poll_fn(|cx| Poll::Ready(task.as_mut().poll(cx).is_ready())).await;
            }
        }));
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        self.0.sleep(time)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_until_the_background_has_let_go_of_the_members() {
    let array = Array::new(2).await;
    // In the middle of a resync, of a scrub, and at rest.
    for busy in ["resync", "scrub", "nothing"] {
        let volume = array.start().await;
        volume.write(0, pattern(0, 1 << 20, 6), Durability::Cached).await.unwrap();
        if busy == "resync" {
            drop(volume);
        } else {
            volume.stop().await.unwrap();
            drop(volume);
        }
        let mut devices = Vec::new();
        for path in &array.paths {
            devices.push(open_again(path).await);
        }
        let sluggish = Arc::new(Sluggish(TokioRuntime::current()));
        let volume = Volume::assemble(devices, AssembleOptions::default(), sluggish).await.unwrap();
        let doing = match busy {
            "resync" => SyncAction::Resync,
            "scrub" => {
                volume.scrub(false).await.unwrap();
                SyncAction::Check
            }
            _ => SyncAction::Idle,
        };
        while volume.status().sync.action != doing {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        volume.stop().await.unwrap();
        drop(volume);
        for path in &array.paths {
            let opened = FileDevice::open(path, OpenMode::ReadWrite);
            assert!(opened.is_ok(), "{busy}: {:?}", opened.err());
        }
    }
}

/// On one thread: the walk has not begun when the start returns.
#[tokio::test]
async fn who_waits_right_after_a_start_waits_for_the_resync() {
    let array = Array::new(2).await;
    let volume = array.start().await;
    volume.write(0, pattern(0, 1 << 20, 6), Durability::Cached).await.unwrap();
    drop(volume);
    let volume = array.start_after_a_crash().await;
    let sync = volume.status().sync;
    assert!(sync.action == SyncAction::Resync && sync.total >= 1 << 20, "{sync:?}");
    while volume.status().sync.action != SyncAction::Idle {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    volume.stop().await.unwrap();
    assert_eq!(volume.status().bitmap.dirty, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_for_sendfile_hold_the_bytes() {
    use std::os::unix::fs::FileExt;
    let array = Array::new(4).await;
    let volume = array.start().await;
    let (at, len) = (CHUNK / 2, 5 * CHUNK as usize);
    volume.write(at, pattern(at, len, 7), Durability::Cached).await.unwrap();
    let pieces = volume.locate(at, len as u64).await.unwrap().unwrap();
    let mut bytes = Vec::new();
    for piece in pieces {
        let mut part = vec![0; piece.len as usize];
        piece.file.read_exact_at(&mut part, piece.at).unwrap();
        bytes.extend(part);
    }
    assert_eq!(bytes, pattern(at, len, 7));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_array_is_not_made_over_data_or_started_twice() {
    let array = Array::new(2).await;
    let volume = array.start().await;
    let again = FileDevice::open(&array.paths[0], OpenMode::ReadWrite);
    assert!(again.unwrap_err().to_string().contains("in use"));
    volume.stop().await.unwrap();
    drop(volume);
    let devices: Vec<_> = array.paths.iter().map(|path| open(path)).collect();
    let refused = create(&devices, &options("other"), runtime().as_ref()).await.unwrap_err();
    assert!(refused.to_string().contains("--force"), "{refused}");
}
