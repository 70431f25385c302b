//! What mdadm says of arrays that have grown. Alone in its file: a process that is started beside other tests holds their
//! images for a moment, as its parent's open files are its own until its program begins.

// A test fails by panicking, in its helpers too.
#![allow(clippy::unwrap_used)]

use raid::create::{Bitmap, CreateOptions, create, make_image};
use raid::device::{Device, FileDevice, OpenMode};
use raid::member::read_superblock;
use raid::runtime::{Runtime, TokioRuntime};
use raid::volume::{AssembleOptions, Volume};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 64 << 10;

/// What mdadm says of a member under some heading, if there is an mdadm.
fn mdadm(path: &Path, heading: &str) -> Option<u64> {
    let output = std::process::Command::new("mdadm").arg("--examine").arg(path).output().ok()?;
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.trim().starts_with(heading));
    let line = line.unwrap_or_else(|| panic!("no {heading} in:\n{text}"));
    Some(line.split(':').nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap())
}

fn open(paths: &[PathBuf], mode: OpenMode) -> Vec<Arc<dyn Device>> {
    paths.iter().map(|path| Arc::new(FileDevice::open(path, mode).unwrap()) as Arc<dyn Device>).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mdadm_sees_the_new_sizes() {
    for (layout, members) in [("n2", 2), ("n2", 3), ("n3", 5), ("o2", 3)] {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..members).map(|i| dir.path().join(format!("disk{i}"))).collect();
        for path in &paths {
            make_image(path, 6 * MIB).unwrap();
        }
        let options = CreateOptions {
            name: "test".to_owned(),
            layout: layout.parse().unwrap(),
            chunk: CHUNK,
            bitmap: Bitmap::STANDARD,
            assume_clean: false,
            force: false,
        };
        let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime::current());
        create(&open(&paths, OpenMode::ReadWrite), &options, runtime.as_ref()).await.unwrap();
        let devices = open(&paths, OpenMode::ReadWrite);
        let volume = Volume::assemble(devices, AssembleOptions::default(), runtime).await.unwrap();
        for path in &paths {
            File::options().write(true).open(path).unwrap().set_len(12 * MIB + CHUNK / 2).unwrap();
        }
        let size = volume.grow().await.unwrap();
        volume.stop().await.unwrap();
        for (path, device) in paths.iter().zip(open(&paths, OpenMode::ReadOnly)) {
            let superblock = read_superblock(device.as_ref()).await.unwrap();
            assert_eq!(superblock.geometry().unwrap().size(), size);
            // mdadm counts a part of a chunk that the last row leaves over.
            let about = size / 1024..(size + CHUNK) / 1024;
            assert!(mdadm(path, "Array Size").is_none_or(|kib| about.contains(&kib)));
            assert!(mdadm(path, "Used Dev Size").is_none_or(|sectors| sectors == superblock.size));
            assert!(mdadm(path, "Avail Dev Size").is_none_or(|sectors| sectors == superblock.data_size));
        }
    }
}
