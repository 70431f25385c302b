//! Growing on real files: what was there stays, what is new is equal on all copies before anybody reads it, and a power
//! cut in the middle leaves the array before or after.

use crate::images::{Array, flip, next, open, pattern, superblock};
use bytes::BytesMut;
use raid::create::Bitmap;
use raid::create::make_image;
use raid::device::{Device, Durability, buffer};
use raid::error::Error;
use raid::event::Event;
use raid::examine::examine;
use raid::geometry::Geometry;
use raid::orders::{Added, MemberName, SpeedLimits};
use raid::status::{MemberState, SyncAction, VolumeState};
use raid::superblock::{SECTOR, SUPER_BYTES, SUPER_OFFSET};
use raid::volume::Volume;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 64 << 10;
const MEMBER: u64 = 6 * MIB;

fn extend(path: &Path, size: u64) {
    File::options().write(true).open(path).unwrap().set_len(size).unwrap();
}

async fn read(volume: &Volume, at: u64, len: u64) -> BytesMut {
    volume.read(at, buffer(len as usize)).await.unwrap()
}

/// Bytes of the array that the bitmap on a member is for.
fn bitmap_size(path: &Path) -> u64 {
    let at = superblock(path).bitmap_start().unwrap() + 40;
    let mut sectors = [0; 8];
    File::open(path).unwrap().read_exact_at(&mut sectors, at).unwrap();
    u64::from_le_bytes(sectors) * SECTOR
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_array_takes_the_room_that_all_its_members_gained() {
    let standard = Bitmap::STANDARD;
    let small = Bitmap::Internal { region: Some(4096) };
    let shapes = [
        ("n2", 2, standard),
        ("n2", 3, small),
        ("n2", 4, Bitmap::None),
        ("n3", 5, standard),
        ("o2", 3, small),
    ];
    for (layout, members, bitmap) in shapes {
        let shape = format!("{layout} on {members}");
        let array = Array::new(layout, &vec![MEMBER; members], CHUNK, bitmap).await;
        let volume = array.start().await;
        let old = volume.size();
        let content = pattern(1, old);
        volume.write(0, content.clone(), Durability::Cached).await.unwrap();
        let refused = volume.grow().await.unwrap_err();
        assert!(matches!(refused, Error::NothingToGain { .. }), "{refused}");
        // All but one.
        for path in &array.paths[1..] {
            extend(path, 3 * MEMBER);
        }
        let refused = volume.grow().await.unwrap_err().to_string();
        assert!(refused.contains(&format!("disk0 has {MEMBER} bytes")), "{refused}");
        assert!(refused.contains(&format!("disk1 has {} bytes", 3 * MEMBER)), "{refused}");
        assert_eq!(volume.size(), old);

        let smallest = 2 * MEMBER + CHUNK / 2;
        extend(&array.paths[0], smallest);
        let usable = smallest - array.data_start;
        let geometry = Geometry::new(array.geometry.layout(), members, CHUNK, usable).unwrap();
        // What is new lies on the disk as it lies: here, each copy another way.
        let last = geometry.size() / CHUNK - 1;
        let place = geometry.place(raid::geometry::Chunk(last), 1);
        flip(&array.paths[place.slot.0], array.data_start + place.at.0, CHUNK as usize);

        let mut events = volume.events();
        let size = volume.grow().await.unwrap();
        assert_eq!((size, volume.size()), (geometry.size(), geometry.size()), "{shape}");
        let told = next(&mut events, |event| match event {
            Event::Grown { size } => Some(size),
            _ => None,
        });
        assert_eq!(told.await, size, "{shape}");
        assert!(matches!(volume.grow().await, Err(Error::NothingToGain { .. })));
        let first_read = read(&volume, last * CHUNK, CHUNK).await;
        assert!(read(&volume, 0, old).await == content, "{shape}");
        let new = pattern(2, 3 * CHUNK);
        volume.write(old - CHUNK, new.clone(), Durability::Cached).await.unwrap();
        next(&mut events, |event| matches!(event, Event::ResyncFinished).then_some(())).await;
        array.stop(volume).await;

        let mut expected = BytesMut::from(&content[..]);
        expected.resize(size as usize, 0);
        expected[(old - CHUNK) as usize..(old + 2 * CHUNK) as usize].copy_from_slice(&new);
        expected[(last * CHUNK) as usize..].copy_from_slice(&first_read);
        for (copy, found) in array.contents(&geometry).into_iter().enumerate() {
            assert!(found == expected, "{shape}: copy {copy}");
        }
        for path in &array.paths {
            let superblock = superblock(path);
            assert_eq!(superblock.geometry().unwrap(), geometry, "{shape}");
            let room = path.metadata().unwrap().len() - array.data_start;
            assert_eq!(superblock.data_size, room / SECTOR, "{shape}");
            if bitmap != Bitmap::None {
                assert_eq!(bitmap_size(path), size, "{shape}");
            }
        }
        let volume = array.start().await;
        let status = volume.status();
        assert_eq!((status.state, status.sync.action), (VolumeState::Clean, SyncAction::Idle), "{shape}");
        assert!(read(&volume, 0, size).await == expected, "{shape}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_go_on_while_it_grows() {
    let array = Array::new("n2", &[MEMBER; 3], CHUNK, Bitmap::Internal { region: Some(4096) }).await;
    let volume = array.start().await;
    let old = volume.size();
    let end = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3u64)
        .map(|writer| {
            let (volume, end) = (Arc::clone(&volume), Arc::clone(&end));
            // Each has a part of its own, so that what is read last is known.
            let part = old / 3 * writer..old / 3 * (writer + 1);
            tokio::spawn(async move {
                let mut round = 0;
                while !end.load(Ordering::Relaxed) || round < 20 {
                    round += 1;
                    let len = part.end - part.start;
                    let content = pattern(writer << 32 | round, len);
                    volume.write(part.start, content.clone(), Durability::Cached).await.unwrap();
                    assert!(read(&volume, part.start, len).await == content);
                }
            })
        })
        .collect();
    for factor in 2..6 {
        for path in &array.paths {
            extend(path, factor * MEMBER);
        }
        let size = volume.grow().await.unwrap();
        volume.write(size - CHUNK, pattern(factor, CHUNK), Durability::Stable).await.unwrap();
        assert!(read(&volume, size - CHUNK, CHUNK).await == pattern(factor, CHUNK));
    }
    end.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    let content = read(&volume, 0, volume.size()).await;
    array.stop(volume).await;
    let geometry = superblock(&array.paths[0]).geometry().unwrap();
    assert!(array.contents(&geometry).iter().all(|copy| *copy == content));
}

/// The parts of an image that a growth writes, as they are: superblock, then bitmap.
struct Metadata {
    superblock: Vec<u8>,
    bitmap: Vec<u8>,
}

impl Metadata {
    fn read(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let found = crate::images::superblock(path);
        let (mut superblock, mut bitmap) = (vec![0; SUPER_BYTES], vec![0; found.bitmap_room() as usize]);
        file.read_exact_at(&mut superblock, SUPER_OFFSET).unwrap();
        file.read_exact_at(&mut bitmap, found.bitmap_start().unwrap()).unwrap();
        Self { superblock, bitmap }
    }

    fn write(&self, path: &Path, superblock: bool, bitmap: bool) {
        let file = File::options().write(true).open(path).unwrap();
        if superblock {
            file.write_all_at(&self.superblock, SUPER_OFFSET).unwrap();
        }
        if bitmap {
            file.write_all_at(&self.bitmap, SUPER_OFFSET + SUPER_BYTES as u64).unwrap();
        }
    }
}

/// An array that was in use and has just grown, stopped by a power cut: its images as they are, and the metadata that
/// each had before.
async fn cut(factor: u64) -> (Array, Vec<Metadata>, u64, u64, BytesMut) {
    let array = Array::new("n2", &[MEMBER; 4], CHUNK, Bitmap::Internal { region: Some(4096) }).await;
    let volume = array.start().await;
    let old = volume.size();
    let content = BytesMut::from(&pattern(3, old)[..]);
    volume.write(0, content.clone().freeze(), Durability::Stable).await.unwrap();
    array.stop(volume).await;
    // In use again, with a few dirty regions, and nothing in the way of the growth but the cut.
    let volume = array.start().await;
    volume
        .write(
            CHUNK,
            content.clone().freeze().slice(CHUNK as usize..CHUNK as usize + 8192),
            Durability::Stable,
        )
        .await
        .unwrap();
    let before: Vec<Metadata> = array.paths.iter().map(|path| Metadata::read(path)).collect();
    for path in &array.paths {
        extend(path, factor * MEMBER);
        // Nothing is equal in what is new.
        let first = array.data_start + array.geometry.used();
        let seed = path.to_string_lossy().bytes().map(u64::from).sum();
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&pattern(seed, 4 * MIB), first).unwrap();
    }
    // Slow enough that most of what is new is not equal yet.
    volume.set_speed(SpeedLimits { min: 1, max: 10 * MIB });
    let size = volume.grow().await.unwrap();
    array.crash(volume).await;
    (array, before, old, size, content)
}

/// Starts what is left, and checks that it holds what it should, equal on all copies.
async fn assert_whole(array: &Array, content: &BytesMut, size: u64, what: &str) {
    let volume = array.start().await;
    assert_eq!(volume.size(), size, "{what}");
    let status = volume.status();
    assert!(status.members.iter().all(|member| member.state == MemberState::InSync), "{what}: {status:?}");
    assert!(read(&volume, 0, content.len() as u64).await == content, "{what}");
    let all = read(&volume, 0, size).await;
    array.stop(volume).await;
    let geometry = superblock(&array.paths[0]).geometry().unwrap();
    assert_eq!(geometry.size(), size, "{what}");
    for (copy, found) in array.contents(&geometry).into_iter().enumerate() {
        assert!(found == all, "{what}: copy {copy}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_cut_leaves_it_before_or_after() {
    // Twice as large: regions as before. Eleven times: two become one, for want of room.
    for factor in [2, 11] {
        // Bitmaps of all members, then of some; then superblocks of some, then of all.
        for written in 0..=8 {
            let (array, before, old, size, content) = cut(factor).await;
            let what = format!("{factor} times, {written} written");
            let events = |path: &Path| superblock(path).events;
            let after = events(&array.paths[0]);
            let region = if factor == 2 { 4096 } else { 8192 };
            let examined = examine(open(&array.paths[0]).as_ref()).await.unwrap();
            assert_eq!(examined.bitmap.unwrap().chunk, region, "{what}");
            for (slot, path) in array.paths.iter().enumerate() {
                before[slot].write(path, slot + 4 >= written, slot >= written);
            }
            let expected = if written <= 4 { old } else { size };
            if written < 8 {
                assert_eq!(events(&array.paths[3]) + 1, after, "growing is one event");
            }
            if factor == 2 && (1..=4).contains(&written) {
                let examined = examine(open(&array.paths[0]).as_ref()).await.unwrap();
                assert_eq!(examined.bitmap.unwrap().dirty, 2, "{what}: what it says of the smaller array");
                let volume = array.start().await;
                assert_eq!(volume.status().bitmap.dirty, 2, "{what}: no bitmap was distrusted");
                array.crash(volume).await;
            }
            assert_whole(&array, &content, expected, &what).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_grow_is_refused_and_nothing_changes() {
    let array = Array::new("f2", &[MEMBER; 2], CHUNK, Bitmap::STANDARD).await;
    let volume = array.start().await;
    for path in &array.paths {
        extend(path, 2 * MEMBER);
    }
    let refused = volume.grow().await.unwrap_err();
    assert!(matches!(refused, Error::GrowFar { .. }), "{refused}");
    assert_eq!(volume.size(), array.geometry.size());
    array.stop(volume).await;

    let array = Array::new("n2", &[MEMBER; 4], CHUNK, Bitmap::STANDARD).await;
    for path in &array.paths {
        extend(path, 2 * MEMBER);
    }
    let spare = array.paths[0].with_file_name("spare");
    make_image(&spare, MEMBER).unwrap();
    let volume = array.start().await;
    assert_eq!(volume.add(open(&spare), false).await.unwrap(), Added::Spare);
    let refused = volume.grow().await.unwrap_err().to_string();
    assert!(refused.contains(&format!("spare has {MEMBER} bytes")), "{refused}");
    volume.remove(&MemberName::Path(spare.display().to_string())).await.unwrap();
    volume.fail(&MemberName::Slot(1)).await.unwrap();
    let refused = volume.grow().await.unwrap_err();
    assert!(matches!(refused, Error::GrowNotInSync { .. }), "{refused}");
    assert_eq!(volume.size(), array.geometry.size());

    // What joins later must be as large as the array is then.
    extend(&spare, 2 * MEMBER);
    volume.remove(&MemberName::Slot(1)).await.unwrap();
    let mut events = volume.events();
    volume.add(open(&spare), false).await.unwrap();
    next(&mut events, |event| matches!(event, Event::SpareActive { .. }).then_some(())).await;
    volume.grow().await.unwrap();
    let small = array.paths[0].with_file_name("small");
    make_image(&small, MEMBER).unwrap();
    let refused = volume.add(open(&small), false).await.unwrap_err();
    assert!(matches!(refused, Error::TooSmall { .. }), "{refused}");
    volume.stop().await.unwrap();
}
