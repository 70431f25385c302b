//! Members that the engine made and wrote, in the eyes of mdadm: superblock, checksum, bitmap, bad-block log and
//! clean or active state, on plain files, without md in the kernel.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use raid::create::{Bitmap, CreateOptions, create, make_image};
use raid::device::{Device, Durability, FileDevice, OpenMode};
use raid::geometry::Layout;
use raid::runtime::{Runtime, TokioRuntime};
use raid::volume::{AssembleOptions, Volume};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const MEMBER: u64 = 256 << 20;

fn open(path: &Path) -> Arc<dyn Device> {
    Arc::new(FileDevice::open(path, OpenMode::ReadWrite).unwrap())
}

/// What mdadm prints; it must find nothing to complain about.
fn mdadm(what: &str, path: &Path) -> String {
    let output = Command::new("mdadm").arg(what).arg(path).output().expect("mdadm is installed by tests/run");
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "mdadm {what} failed: {err}{out}");
    assert_eq!(err, "", "mdadm {what} complains");
    out
}

/// What mdadm prints of a member's bitmap. On block devices it finds the bitmap by itself; in a plain file it expects
/// one at the start, so the bitmap is taken out into a file of its own.
fn mdadm_bitmap(member: &Path) -> String {
    let (mut bytes, taken) = (vec![0; 8192], member.with_extension("bitmap"));
    std::fs::File::open(member).unwrap().read_exact_at(&mut bytes, 8192).unwrap();
    std::fs::write(&taken, bytes).unwrap();
    mdadm("--examine-bitmap", &taken)
}

/// The value behind `name :` in mdadm's output.
fn field<'a>(output: &'a str, name: &str) -> &'a str {
    output
        .lines()
        .find_map(|line| line.trim().strip_prefix(name)?.trim_start().strip_prefix(':').map(str::trim))
        .unwrap_or_else(|| panic!("mdadm prints no `{name}`:\n{output}"))
}

struct Array {
    _dir: tempfile::TempDir,
    paths: Vec<PathBuf>,
    uuid: uuid::Uuid,
    runtime: Arc<dyn Runtime>,
}

impl Array {
    async fn new(members: usize, layout: Layout, assume_clean: bool, blank: bool) -> Self {
        Self::with_bitmap(members, layout, Bitmap::STANDARD, assume_clean, blank).await
    }

    async fn with_bitmap(
        members: usize,
        layout: Layout,
        bitmap: Bitmap,
        assume_clean: bool,
        blank: bool,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime::current());
        let paths: Vec<PathBuf> = (0..members).map(|i| dir.path().join(format!("disk{i}"))).collect();
        for path in &paths {
            make_image(path, MEMBER).unwrap();
            if !blank {
                let file = std::fs::File::options().write(true).open(path).unwrap();
                file.write_all_at(b"x", MEMBER / 2).unwrap();
            }
        }
        let options = CreateOptions {
            name: "logs".to_owned(),
            layout,
            chunk: 512 << 10,
            bitmap,
            assume_clean,
            force: true,
        };
        let devices: Vec<_> = paths.iter().map(|path| open(path)).collect();
        let uuid = create(&devices, &options, runtime.as_ref()).await.unwrap();
        Self { _dir: dir, paths, uuid, runtime }
    }

    async fn start(&self, present: &[usize]) -> Arc<Volume> {
        let devices = present.iter().map(|&i| open(&self.paths[i])).collect();
        Volume::assemble(devices, AssembleOptions::default(), Arc::clone(&self.runtime)).await.unwrap()
    }
}

/// md's spelling of a UUID: four groups of eight digits.
fn spelled(uuid: uuid::Uuid) -> String {
    let digits = uuid.simple().to_string();
    digits.as_bytes().chunks(8).map(|group| std::str::from_utf8(group).unwrap()).collect::<Vec<_>>().join(":")
}

#[tokio::test]
async fn a_new_array_is_what_mdadm_expects() {
    for (members, layout) in
        [(2, Layout::near(2)), (3, Layout::near(2)), (4, Layout::near(2)), (5, Layout::near(3))]
    {
        let array = Array::new(members, layout, false, true).await;
        for (slot, path) in array.paths.iter().enumerate() {
            let shown = mdadm("--examine", path);
            assert_eq!(field(&shown, "Magic"), "a92b4efc");
            assert_eq!(field(&shown, "Version"), "1.2");
            assert_eq!(field(&shown, "Array UUID"), spelled(array.uuid));
            assert_eq!(field(&shown, "Name"), "logs");
            assert_eq!(field(&shown, "Raid Level"), "raid10");
            assert_eq!(field(&shown, "Raid Devices"), members.to_string());
            assert_eq!(field(&shown, "Layout"), layout.to_string());
            assert_eq!(field(&shown, "Chunk Size"), "512K");
            assert_eq!(field(&shown, "State"), "clean");
            assert!(field(&shown, "Checksum").ends_with("- correct"), "{shown}");
            assert_eq!(field(&shown, "Super Offset"), "8 sectors");
            assert_eq!(field(&shown, "Internal Bitmap"), "8 sectors from superblock");
            assert_eq!(field(&shown, "Bad Block Log"), "512 entries available at offset 16 sectors");
            assert_eq!(field(&shown, "Device Role"), format!("Active device {slot}"));
            assert_eq!(field(&shown, "Array State").split(' ').next(), Some(&*"A".repeat(members)));
            let size = array.start(&(0..members).collect::<Vec<_>>()).await.size();
            let shown_size = field(&shown, "Array Size").split(' ').next().unwrap().parse::<u64>().unwrap();
            assert_eq!(shown_size * 1024, size, "{shown}");
            let bitmap = mdadm_bitmap(path);
            assert_eq!(field(&bitmap, "Magic"), "6d746962");
            assert_eq!(field(&bitmap, "Version"), "4");
            assert_eq!(field(&bitmap, "UUID"), spelled(array.uuid));
            assert_eq!(field(&bitmap, "Chunksize"), "64 MB");
            assert_eq!(field(&bitmap, "Events"), field(&shown, "Events"));
            assert!(field(&bitmap, "Bitmap").contains(" 0 dirty"), "{bitmap}");
            assert!(field(&bitmap, "Sync Size").starts_with(&(size / 1024).to_string()), "{bitmap}");
        }
    }
}

#[tokio::test]
async fn members_that_held_data_start_with_every_region_dirty() {
    let array = Array::new(2, Layout::near(2), false, false).await;
    let shown = mdadm("--examine", &array.paths[1]);
    assert_eq!(field(&shown, "State"), "active");
    assert!(field(&mdadm_bitmap(&array.paths[1]), "Bitmap").contains("(100.0%)"));
    let array = Array::new(2, Layout::near(2), true, false).await;
    assert_eq!(field(&mdadm("--examine", &array.paths[1]), "State"), "clean");
}

#[tokio::test]
async fn a_bitmap_has_the_regions_asked_for_or_is_not_there() {
    let bitmap = Bitmap::Internal { region: Some(64 << 10) };
    let array = Array::with_bitmap(3, Layout::far(2), bitmap, true, true).await;
    let volume = array.start(&[0, 1, 2]).await;
    volume.write(70 << 20, Bytes::from_static(b"hello"), Durability::Stable).await.unwrap();
    let shown = mdadm("--examine", &array.paths[0]);
    assert_eq!(field(&shown, "Internal Bitmap"), "8 sectors from superblock");
    let bitmap = mdadm_bitmap(&array.paths[0]);
    assert_eq!(field(&bitmap, "Chunksize"), "64 KB");
    let regions = volume.size().div_ceil(64 << 10);
    assert!(field(&bitmap, "Bitmap").starts_with(&format!("{regions} bits (chunks), 1 dirty")), "{bitmap}");

    let array = Array::with_bitmap(4, Layout::near(2), Bitmap::None, false, false).await;
    let shown = mdadm("--examine", &array.paths[0]);
    assert_eq!((field(&shown, "State"), field(&shown, "Feature Map")), ("active", "0x0"));
    assert!(!shown.contains("Internal Bitmap"), "{shown}");
    // Without a bitmap any place may differ after an unclean stop, and is made equal before it is read.
    let file =
        |slot: usize| std::fs::File::options().read(true).write(true).open(&array.paths[slot]).unwrap();
    let mut byte = [0];
    file(1).write_all_at(b"y", MEMBER - (1 << 20)).unwrap();
    let volume = array.start(&[0, 1, 2, 3]).await;
    let size = volume.size();
    drop(volume.read(0, raid::device::buffer(size as usize)).await.unwrap());
    volume.stop().await.unwrap();
    file(1).read_exact_at(&mut byte, MEMBER - (1 << 20)).unwrap();
    assert_eq!(byte, [0]);
    assert_eq!(field(&mdadm("--examine", &array.paths[1]), "State"), "clean");
}

#[tokio::test]
async fn life_of_an_array_as_mdadm_sees_it() {
    let array = Array::new(4, Layout::near(2), false, true).await;
    let events = |path: &Path| field(&mdadm("--examine", path), "Events").parse::<u64>().unwrap();
    let fresh = events(&array.paths[0]);

    let volume = array.start(&[2, 0, 3, 1]).await;
    volume.write(70 << 20, Bytes::from_static(b"hello"), Durability::Stable).await.unwrap();
    for path in &array.paths {
        assert_eq!(field(&mdadm("--examine", path), "State"), "active");
        assert!(field(&mdadm_bitmap(path), "Bitmap").contains(" 1 dirty"));
        assert_eq!(events(path), fresh + 1);
    }
    volume.stop().await.unwrap();
    drop(volume);
    for path in &array.paths {
        assert_eq!(field(&mdadm("--examine", path), "State"), "clean");
        assert!(field(&mdadm_bitmap(path), "Bitmap").contains(" 0 dirty"));
        assert_eq!(events(path), fresh + 2);
    }

    // Without member 1: its absence is on record with the first write, and the regions written stay dirty for it.
    let volume = array.start(&[0, 2, 3]).await;
    volume.write(0, Bytes::from_static(b"degraded"), Durability::Stable).await.unwrap();
    volume.stop().await.unwrap();
    drop(volume);
    let shown = mdadm("--examine", &array.paths[0]);
    assert_eq!(field(&shown, "State"), "clean");
    assert!(field(&shown, "Array State").starts_with("A.AA"), "{shown}");
    assert!(field(&shown, "Checksum").ends_with("- correct"), "{shown}");
    assert!(field(&mdadm_bitmap(&array.paths[0]), "Bitmap").contains(" 1 dirty"));
    let stale = mdadm("--examine", &array.paths[1]);
    assert!(field(&stale, "Array State").starts_with("AAAA"), "{stale}");
}
