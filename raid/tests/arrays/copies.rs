//! Copies read apart and mended, on real files: whichever member holds noise, one way reads around it; a mend changes
//! what differs and nothing beside it; and what may differ after an unclean stop is left alone while it is held.

use crate::images::{Array, flip, next, open, pattern};
use bytes::{Bytes, BytesMut};
use raid::create::Bitmap;
use raid::device::{Caching, Device, Durability, FileDevice, OpenMode, buffer};
use raid::event::Event;
use raid::orders::SpeedLimits;
use raid::volume::{AssembleOptions, Volume};
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 8 << 10;
const MEMBER: u64 = 2 * MIB;
const SHAPES: [(&str, usize); 11] = [
    ("n2", 2),
    ("n2", 3),
    ("n2", 4),
    ("f2", 2),
    ("f2", 4),
    ("o2", 2),
    ("o2", 4),
    ("n3", 3),
    ("f3", 3),
    ("n3", 5),
    ("o2", 3),
];

async fn filled(layout: &str, members: usize) -> (Array, Bytes) {
    let array = Array::new(layout, &vec![MEMBER; members], CHUNK, Bitmap::STANDARD).await;
    let content = pattern(7, array.geometry.size());
    let volume = array.start().await;
    volume.write(0, content.clone(), Durability::Cached).await.unwrap();
    array.stop(volume).await;
    (array, content)
}

async fn way(volume: &Volume, at: u64, len: u64, way: usize) -> BytesMut {
    volume.read_copy(at, buffer(len as usize), way).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_way_reads_around_whichever_member_holds_noise_and_mending_makes_it_good() {
    for (layout, members) in SHAPES {
        let (array, content) = filled(layout, members).await;
        for noisy in 0..members {
            let volume = array.start().await;
            flip(&array.paths[noisy], array.data_start, array.geometry.used() as usize);
            // Unaligned, and over many chunks.
            let (at, len) = (3 * CHUNK + 777, 9 * CHUNK + 5);
            let wanted = content.slice(at as usize..(at + len) as usize);
            let mut good = 0;
            for number in 0..volume.copies() {
                good += usize::from(way(&volume, at, len, number).await == wanted);
            }
            assert!(good > 0, "{layout} {members}: no way around {noisy}");
            assert!(volume.read_copy(at, buffer(1), volume.copies()).await.is_err());
            assert!(!volume.agree(at, len).await.unwrap(), "{layout} {members}");
            let mended = volume.mend(0, content.clone()).await.unwrap();
            assert_eq!(mended, 1, "{layout} {members}");
            assert!(volume.agree(0, volume.size()).await.unwrap());
            assert_eq!(volume.mend(0, content.clone()).await.unwrap(), 0);
            array.stop(volume).await;
            for copy in array.contents(&array.geometry) {
                assert!(copy == content, "{layout} {members}: not mended");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holders_are_all_copies_of_a_range_and_say_where_each_part_lies() {
    for (layout, members) in SHAPES {
        let (array, content) = filled(layout, members).await;
        let volume = array.start().await;
        let (at, len) = (3 * CHUNK + 777, 9 * CHUNK + 5);
        let holders = volume.holders(at, len);
        let mut seen = vec![0; len as usize];
        for one in &holders {
            let found = one.device.read(one.at, buffer(one.len as usize)).await.unwrap();
            let from = (at + one.of) as usize;
            assert!(found == content[from..from + one.len as usize], "{layout} {members}");
            seen[one.of as usize..(one.of + one.len) as usize].iter_mut().for_each(|count| *count += 1);
        }
        assert!(seen.iter().all(|count| *count == array.geometry.copies()), "{layout} {members}");
        assert!(holders.is_sorted_by_key(|one| one.of));
        assert!(volume.holders(volume.size(), 1).is_empty() && holders[0].device.holders(0, 1).is_empty());
        drop(holders);
        array.stop(volume).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mend_changes_what_differs_on_each_copy_and_nothing_beside_it() {
    for caching in [Caching::PageCache, Caching::Direct] {
        let (array, content) = filled("n2", 2).await;
        let devices: raid::Result<Vec<_>> = array
            .paths
            .iter()
            .map(|path| FileDevice::open_with(path, OpenMode::ReadWrite, caching))
            .collect();
        // Not every file system has direct access.
        let Ok(devices) = devices else { continue };
        // Within one block: damage at 100 of one copy and at 200 of the other, and beside the mended range at 300.
        let files: Vec<_> = (0..2).map(|copy| array.copy(2, copy)).collect();
        flip(&files[0].0, files[0].1 + 100, 10);
        flip(&files[1].0, files[1].1 + 200, 10);
        flip(&files[1].0, files[1].1 + 300, 10);
        let volume = array.start_with(devices.into_iter().map(|one| Arc::new(one) as _).collect()).await;
        let mut events = volume.events();
        let start = 2 * CHUNK;
        let good = content.slice(start as usize + 90..start as usize + 250);
        assert_eq!(volume.mend(start + 90, good).await.unwrap(), 2);
        for (slot, at) in [(0, start + 100), (1, start + 200)] {
            let told = next(&mut events, |event| match event {
                Event::Corrected { slot, at, len, .. } => Some((slot, at, len)),
                _ => None,
            });
            assert_eq!(told.await, (slot, at, 10));
        }
        let corrected: Vec<u64> = volume.status().members.iter().map(|member| member.corrected).collect();
        assert_eq!(corrected, [1, 1]);
        array.stop(volume).await;
        let mut beside = content.to_vec();
        beside[start as usize + 300..start as usize + 310].iter_mut().for_each(|byte| *byte ^= 0xff);
        let copies = array.contents(&array.geometry);
        assert!(copies[0] == content, "{caching:?}");
        assert!(copies[1] == beside, "{caching:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_member_is_skipped_and_one_that_returns_gets_what_was_mended() {
    let (array, content) = filled("n2", 3).await;
    let volume = array.start().await;
    volume.fail(&"1".parse().unwrap()).await.unwrap();
    let size = volume.size();
    for number in 0..volume.copies() {
        assert!(way(&volume, 0, size, number).await == content);
    }
    // A chunk that member 1 has no copy of: the other copies mend each other.
    let chunk = (0..array.geometry.size() / CHUNK)
        .find(|chunk| array.copy(*chunk, 0).0 == array.paths[0] && array.copy(*chunk, 1).0 == array.paths[2]);
    let (chunk, range) =
        chunk.map(|chunk| (chunk, (chunk * CHUNK) as usize..((chunk + 1) * CHUNK) as usize)).unwrap();
    let (path, at) = array.copy(chunk, 0);
    flip(&path, at, CHUNK as usize);
    assert_eq!(volume.mend(chunk * CHUNK, content.slice(range)).await.unwrap(), 1);
    volume.remove(&"1".parse().unwrap()).await.unwrap();
    // Its rebuild and mends of all of the array at the same time.
    let mut events = volume.events();
    volume.add(open(&array.paths[1]), false).await.unwrap();
    for _ in 0..20 {
        volume.mend(0, content.clone()).await.unwrap();
    }
    next(&mut events, |event| matches!(event, Event::SpareActive { .. }).then_some(())).await;
    array.stop(volume).await;
    for copy in array.contents(&array.geometry) {
        assert!(copy == content);
    }
}

/// A rebuild copies what its source holds, noise too, before the copy counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mend_reaches_what_a_rebuild_has_copied_already() {
    let (array, content) = filled("n2", 2).await;
    let volume = array.start().await;
    volume.fail(&"1".parse().unwrap()).await.unwrap();
    volume.remove(&"1".parse().unwrap()).await.unwrap();
    std::fs::remove_file(&array.paths[1]).unwrap();
    raid::create::make_image(&array.paths[1], MEMBER).unwrap();
    let mut events = volume.events();
    volume.set_speed(SpeedLimits { min: 1, max: 8 * MIB });
    volume.add(open(&array.paths[1]), false).await.unwrap();
    let chunks = array.geometry.size() / CHUNK;
    for round in 0..80 {
        let chunk = round * 37 % chunks;
        let (path, at) = array.copy(chunk, 0);
        flip(&path, at, CHUNK as usize);
        // Time enough for the rebuild to come by, or not.
        tokio::task::yield_now().await;
        let range = (chunk * CHUNK) as usize..((chunk + 1) * CHUNK) as usize;
        assert!(volume.mend(chunk * CHUNK, content.slice(range)).await.unwrap() > 0);
    }
    next(&mut events, |event| matches!(event, Event::SpareActive { .. }).then_some(())).await;
    array.stop(volume).await;
    for copy in array.contents(&array.geometry) {
        assert!(copy == content);
    }
}

/// A member that returns copies what is dirty only: what was mended without it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_returns_by_bitmap_gets_what_was_mended_meanwhile() {
    let (array, content) = filled("n2", 2).await;
    // Noise on both copies of a chunk, which somebody above knows better.
    let (chunk, range) = (5, 5 * CHUNK as usize..6 * CHUNK as usize);
    for copy in 0..2 {
        let (path, at) = array.copy(chunk, copy);
        flip(&path, at, CHUNK as usize);
    }
    let volume = array.start().await;
    volume.fail(&"1".parse().unwrap()).await.unwrap();
    assert_eq!(volume.mend(chunk * CHUNK, content.slice(range)).await.unwrap(), 1);
    volume.remove(&"1".parse().unwrap()).await.unwrap();
    let mut events = volume.events();
    volume.add(open(&array.paths[1]), false).await.unwrap();
    next(&mut events, |event| matches!(event, Event::SpareActive { .. }).then_some(())).await;
    array.stop(volume).await;
    for copy in array.contents(&array.geometry) {
        assert!(copy == content);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_back_resync_leaves_a_good_second_copy_to_be_mended_from() {
    let (array, content) = filled("n2", 2).await;
    let volume = array.start().await;
    // Dirty regions, and then no clean stop.
    volume.write(0, content.clone(), Durability::Stable).await.unwrap();
    array.crash(volume).await;
    let (path, at) = array.copy(1, 0);
    flip(&path, at, 100);
    let options = AssembleOptions { hold_resync: true, ..AssembleOptions::default() };
    let volume = array.try_start(array.devices(), options).await.unwrap();
    let range = CHUNK as usize..CHUNK as usize + 100;
    assert!(volume.may_differ(CHUNK, 100));
    assert_ne!(way(&volume, CHUNK, 100, 0).await, content[range.clone()]);
    assert_eq!(way(&volume, CHUNK, 100, 1).await, content[range.clone()]);
    assert_eq!(volume.mend(CHUNK, content.slice(range)).await.unwrap(), 1);
    let mut events = volume.events();
    volume.release_resync();
    next(&mut events, |event| (event == Event::ResyncFinished).then_some(())).await;
    let read = volume.read(0, buffer(content.len())).await.unwrap();
    assert!(read == content);
    array.stop(volume).await;
    for copy in array.contents(&array.geometry) {
        assert!(copy == content);
    }
}

#[tokio::test]
async fn a_plain_device_mends_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plain");
    raid::create::make_image(&path, MIB).unwrap();
    let device = open(&path);
    let good = pattern(1, 5000);
    assert_eq!(device.copies(), 1);
    assert!(device.read_copy(0, buffer(1), 1).await.is_err());
    assert_eq!(device.mend(100, good.clone()).await.unwrap(), 1);
    assert_eq!(device.mend(100, good.clone()).await.unwrap(), 0);
    assert_eq!(device.read_copy(100, buffer(5000), 0).await.unwrap(), good);
    assert!(device.mend(MIB - 1, good).await.is_err());
}
