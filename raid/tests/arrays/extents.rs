//! What arrays say of their holes: never a byte of data, whatever was written, given back, lost or made different; and
//! all that was never written or was given back, as far as file systems go.

use crate::images::{Array, flip, pattern};
use crate::odd::Odd;
use bytes::Bytes;
use raid::create::Bitmap;
use raid::device::{Device, Durability, Extent, ZeroMode, buffer};
use raid::orders::MemberName;
use raid::volume::Volume;
use std::ops::Range;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 64 << 10;
const MEMBER: u64 = 6 * MIB;
const LAYOUTS: [(&str, usize); 5] = [("n2", 2), ("n2", 3), ("n3", 4), ("f2", 4), ("o2", 3)];

/// All extents of a range, asked for until its end.
async fn all(volume: &Volume, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
    let mut told: Vec<(Range<u64>, bool)> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let extents = volume.extents(at, range.end - at).await.unwrap();
        assert!(!extents.is_empty() && extents.iter().all(|extent| extent.len > 0), "{extents:?}");
        assert!(extents.windows(2).all(|two| two[0].hole != two[1].hole), "{extents:?}");
        for Extent { len, hole } in extents {
            match told.last_mut() {
                Some((last, same)) if *same == hole => last.end += len,
                _ => told.push((at..at + len, hole)),
            }
            at += len;
        }
    }
    assert_eq!(at, range.end, "past what was asked for");
    told
}

/// Panics if something that is not zero lies in a hole.
async fn assert_holes_are_zero(volume: &Volume, shape: &str) {
    for (range, hole) in all(volume, 0..volume.size()).await {
        if hole {
            let read = volume.read(range.start, buffer((range.end - range.start) as usize)).await.unwrap();
            assert!(read.iter().all(|byte| *byte == 0), "{shape}: data in a hole at {range:?}");
        }
    }
}

async fn write(volume: &Volume, at: u64, len: u64) {
    volume.write(at, pattern(at + 1, len), Durability::Cached).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_never_written_is_known_without_a_look_and_what_was_given_back_with_one() {
    for (layout, members) in LAYOUTS {
        let shape = format!("{layout} on {members}");
        let array = Array::untouched(layout, &vec![MEMBER; members], CHUNK).await;
        let volume = array.start().await;
        let size = volume.size();
        assert_eq!(all(&volume, 0..size).await, [(0..size, true)], "{shape}");
        assert_eq!(volume.blank(0, size), std::slice::from_ref(&(0..size)), "{shape}");
        assert!(volume.zeroes_fast(ZeroMode::MayPunch), "{shape}");
        // Over the border of two chunks, and a byte somewhere.
        write(&volume, 3 * CHUNK - 8192, 16384).await;
        write(&volume, 20 * CHUNK + 5, 1).await;
        let told = all(&volume, 0..size).await;
        let data: Vec<_> = told.iter().filter(|(_, hole)| !hole).map(|(range, _)| range.clone()).collect();
        let written = [3 * CHUNK - 8192..3 * CHUNK + 8192, 20 * CHUNK..20 * CHUNK + 4096];
        assert_eq!(data, written, "{shape}");
        for range in &written {
            assert!(volume.blank(range.start, 4096).is_empty(), "{shape}");
        }
        // A part of it, to no border.
        let part = all(&volume, 3 * CHUNK..3 * CHUNK + 10_000).await;
        assert_eq!(
            part,
            [(3 * CHUNK..3 * CHUNK + 8192, false), (3 * CHUNK + 8192..3 * CHUNK + 10_000, true)]
        );
        for range in &written {
            volume.discard(range.start, range.end - range.start).await.unwrap();
        }
        assert_eq!(all(&volume, 0..size).await, [(0..size, true)], "{shape}: given back");
        assert!(volume.blank(3 * CHUNK, 4096).is_empty(), "{shape}: it was written once");
        assert!(volume.extents(size, 1).await.is_err() && volume.extents(1, u64::MAX).await.is_err());
        array.stop(volume).await;
        // The records tell it again.
        let volume = array.start().await;
        assert!(volume.blank(0, size).len() > 1, "{shape}");
        assert_eq!(all(&volume, 0..size).await, [(0..size, true)], "{shape}: after a restart");
        array.stop(volume).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_back_costs_nothing_where_a_member_would_write_zeroes_for_it() {
    for holeless in [0, 1] {
        let array = Array::new("n2", &[MEMBER; 2], CHUNK, Bitmap::STANDARD).await;
        let mut members = array.devices();
        members[holeless] = Odd::new(Arc::clone(&members[holeless]), false);
        let volume = array.start_with(members).await;
        write(&volume, 0, 8 * CHUNK).await;
        volume.discard(CHUNK, 4 * CHUNK).await.unwrap();
        assert!(volume.discard(volume.size(), 1).await.is_err());
        // Neither member has changed: they hold the same still, and each what was written.
        let content = pattern(1, 8 * CHUNK);
        for copy in 0..2 {
            let read = volume.read_copy(0, buffer(content.len()), copy).await.unwrap();
            assert!(read == content, "member {holeless} has no holes, copy {copy}");
        }
        // Zeroes that were promised are written.
        volume.write_zeroes(CHUNK, CHUNK, ZeroMode::MayPunch, Durability::Cached).await.unwrap();
        for copy in 0..2 {
            let read = volume.read_copy(CHUNK, buffer(CHUNK as usize), copy).await.unwrap();
            assert!(read.iter().all(|byte| *byte == 0), "copy {copy}");
        }
        array.stop(volume).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_that_only_one_copy_has_a_hole_at_is_data() {
    for (layout, members) in LAYOUTS {
        let shape = format!("{layout} on {members}");
        let array = Array::new(layout, &vec![MEMBER; members], CHUNK, Bitmap::STANDARD).await;
        for copy in 0..array.geometry.copies() {
            // Behind the engine's back: this copy has data, the others have none.
            let (path, at) = array.copy(4 + copy as u64, copy);
            flip(&path, at, 4096);
        }
        let volume = array.start().await;
        assert!(volume.blank(0, volume.size()).is_empty(), "{shape}: promised to be equal, not to be zeroes");
        let told = all(&volume, 0..volume.size()).await;
        for copy in 0..array.geometry.copies() as u64 {
            let at = (4 + copy) * CHUNK;
            assert!(told.contains(&(at..at + 4096, false)), "{shape}: copy {copy}: {told:?}");
        }
        array.stop(volume).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holes_are_told_of_what_is_left_when_members_are_gone() {
    let array = Array::untouched("n2", &[MEMBER; 4], CHUNK).await;
    let volume = array.start().await;
    write(&volume, 0, 8 * CHUNK).await;
    volume.write_zeroes(CHUNK, CHUNK, ZeroMode::MayPunch, Durability::Cached).await.unwrap();
    let whole = all(&volume, 0..volume.size()).await;
    assert_eq!(whole[..3], [(0..CHUNK, false), (CHUNK..2 * CHUNK, true), (2 * CHUNK..8 * CHUNK, false)]);
    volume.fail(&MemberName::Slot(1)).await.unwrap();
    assert_eq!(all(&volume, 0..volume.size()).await, whole);
    assert_holes_are_zero(&volume, "degraded").await;
    array.stop(volume).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_no_hole_has_data() {
    for (layout, members) in LAYOUTS {
        let array = Array::untouched(layout, &vec![MEMBER; members], CHUNK).await;
        let mut volume = array.start().await;
        let size = volume.size();
        let mut state = 88_172_645_463_325_252_u64;
        let mut next = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for step in 0..40 {
            let at = next(size - 1) / 512 * 512;
            let len = (1 + next(3 * CHUNK)).min(size - at);
            match next(4) {
                0 => volume.discard(at, len).await.unwrap(),
                1 => {
                    let mode = if next(2) == 0 { ZeroMode::MayPunch } else { ZeroMode::Allocate };
                    volume.write_zeroes(at, len, mode, Durability::Cached).await.unwrap();
                }
                _ => volume.write(at, Bytes::from(vec![7; len as usize]), Durability::Cached).await.unwrap(),
            }
            if step % 10 == 9 {
                assert_holes_are_zero(&volume, layout).await;
                // A crash: what was written lately may differ, and is made equal.
                array.crash(volume).await;
                volume = array.start().await;
                assert_holes_are_zero(&volume, layout).await;
            }
        }
        array.stop(volume).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_answer_costs_a_bounded_look() {
    // More chunks than one call looks at, none of them blank.
    let array = Array::new("n2", &[40 * MIB; 2], 4096, Bitmap::STANDARD).await;
    let volume = array.start().await;
    assert!(volume.size() > 4096 * 4096);
    let extents = volume.extents(0, volume.size()).await.unwrap();
    let told: u64 = extents.iter().map(|extent| extent.len).sum();
    assert_eq!(told, 4096 * 4096, "{extents:?}");
    volume.prefetch(0, volume.size()).await.unwrap();
    array.stop(volume).await;
}
