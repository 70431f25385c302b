//! Scrubs on real files: differences that were put into the images are found at their places, all of them and nothing
//! else, and mended where asked; whatever clients do meanwhile.

use crate::images::{Array, flip, next, open, pattern};
use bytes::{Bytes, BytesMut};
use raid::create::Bitmap;
use raid::device::{Device, Durability, Io, Piece, ZeroMode, buffer};
use raid::error::{Error, Operation};
use raid::event::{Event, Mismatch};
use raid::orders::SpeedLimits;
use raid::status::{MemberState, SyncAction};
use raid::superblock::SECTOR;
use raid::volume::{AssembleOptions, Volume};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::broadcast::Receiver;

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 64 << 10;
const MEMBER: u64 = 6 * MIB;

/// Scrubs to the end and returns the number of mismatches told at the end, and those told one by one.
async fn scrub(volume: &Volume, repair: bool) -> (u64, Vec<Mismatch>) {
    let mut events = volume.events();
    volume.scrub(repair).await.unwrap();
    let mut told = Vec::new();
    loop {
        let event = next(&mut events, |event| match event {
            Event::Mismatch(_) | Event::ScrubFinished { .. } | Event::ScrubStopped { .. } => Some(event),
            _ => None,
        });
        match event.await {
            Event::Mismatch(mismatch) => told.push(mismatch),
            Event::ScrubFinished { repair: its, mismatches } => {
                assert_eq!(its, repair);
                assert_eq!(volume.mismatches(), told);
                assert_eq!(volume.status().mismatches, mismatches);
                assert_eq!(volume.status().sync.action, SyncAction::Idle);
                return (mismatches, told);
            }
            other => panic!("{other}"),
        }
    }
}

async fn stopped(events: &mut Receiver<Event>) -> String {
    next(events, |event| match event {
        Event::ScrubStopped { cause } => Some(cause),
        Event::ScrubFinished { .. } => panic!("it came to its end"),
        _ => None,
    })
    .await
}

/// A difference put into an image.
#[derive(Clone, Copy)]
struct Plant {
    chunk: u64,
    /// Which copy, in slot order.
    copy: usize,
    within: u64,
    len: u64,
}

impl Plant {
    fn put(self, array: &Array) {
        let (path, at) = array.copy(self.chunk, self.copy);
        flip(&path, at + self.within, self.len as usize);
    }

    /// In whole sectors, as it is found.
    fn sectors(self) -> Range<u64> {
        self.within / SECTOR * SECTOR..(self.within + self.len).next_multiple_of(SECTOR)
    }

    fn assert_told(self, array: &Array, told: &Mismatch, repaired: bool, shape: &str) {
        let range = self.sectors();
        let at = self.chunk * CHUNK + range.start;
        assert_eq!((told.at, told.len), (at, range.end - range.start), "{shape}: {told}");
        assert_eq!(told.repaired, repaired, "{shape}: {told}");
        let places: Vec<(PathBuf, u64)> =
            told.copies.iter().map(|place| (place.path.clone().into(), place.file_offset)).collect();
        let expected: Vec<(PathBuf, u64)> = (0..array.geometry.copies())
            .map(|copy| array.copy(self.chunk, copy))
            .map(|(path, at)| (path, at + range.start))
            .collect();
        assert_eq!(places, expected, "{shape}: {told}");
        for place in &told.copies {
            assert_eq!(place.sector * SECTOR, place.file_offset, "{shape}");
            assert_eq!(place.path, array.paths[place.slot].display().to_string(), "{shape}");
        }
        assert_eq!(told.wrong, (array.geometry.copies() > 2).then_some(self.copy), "{shape}: {told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn differences_are_found_at_their_places_and_mended() {
    for (layout, members) in [("n2", 4), ("n2", 5), ("n3", 3), ("n3", 5), ("f2", 4), ("f3", 4), ("o2", 3)] {
        let shape = format!("{layout} on {members}");
        let array = Array::new(layout, &vec![MEMBER; members], CHUNK, Bitmap::STANDARD).await;
        let volume = array.start().await;
        let size = volume.size();
        let content = pattern(1, size);
        volume.write(0, content.clone(), Durability::Cached).await.unwrap();
        assert_eq!(scrub(&volume, false).await, (0, Vec::new()), "{shape}: nothing differs");
        array.stop(volume).await;

        let chunks = size / CHUNK;
        let copies = array.geometry.copies();
        let plants = [
            Plant { chunk: 0, copy: 0, within: 0, len: 1 },
            Plant { chunk: 0, copy: 1, within: 5 * SECTOR - 1, len: 2 },
            Plant { chunk: 7, copy: copies - 1, within: CHUNK - 1, len: 1 },
            Plant { chunk: chunks / 2, copy: 1, within: 5000, len: 20_000 },
            Plant { chunk: chunks - 1, copy: 0, within: 0, len: CHUNK },
        ];
        for plant in plants {
            plant.put(&array);
        }

        let volume = array.start().await;
        for repair in [false, true] {
            let (count, told) = scrub(&volume, repair).await;
            assert_eq!(count, plants.len() as u64, "{shape}: {told:?}");
            for (plant, told) in plants.iter().zip(&told) {
                plant.assert_told(&array, told, repair, &shape);
            }
        }
        assert_eq!(scrub(&volume, false).await, (0, Vec::new()), "{shape}: it was mended");
        array.stop(volume).await;

        // Two copies: the first in slot order counts. More: the majority.
        let mut expected = BytesMut::from(&content[..]);
        for plant in plants.iter().filter(|plant| copies == 2 && plant.copy == 0) {
            let start = plant.chunk * CHUNK + plant.within;
            expected[start as usize..(start + plant.len) as usize].iter_mut().for_each(|byte| *byte ^= 0xff);
        }
        for (copy, found) in array.contents(&array.geometry).into_iter().enumerate() {
            assert!(found == expected, "{shape}: copy {copy}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_changes_nothing() {
    let array = Array::new("n2", &[MEMBER; 2], CHUNK, Bitmap::STANDARD).await;
    let plant = Plant { chunk: 3, copy: 1, within: 100, len: 1 };
    plant.put(&array);
    let before = array.contents(&array.geometry);
    let volume = array.start().await;
    assert_eq!(scrub(&volume, false).await.0, 1);
    array.stop(volume).await;
    assert!(array.contents(&array.geometry) == before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_during_a_scrub_are_no_mismatches() {
    for layout in ["n2", "o2"] {
        let array = Array::new(layout, &[MEMBER; 3], CHUNK, Bitmap::STANDARD).await;
        let volume = array.start().await;
        let end = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let (volume, end) = (Arc::clone(&volume), Arc::clone(&end));
                tokio::spawn(async move {
                    let mut round = writer;
                    while !end.load(Ordering::Relaxed) {
                        round = round
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let len = 1 + (round >> 20) % 30_000;
                        let at = (round >> 33) % (volume.size() - len);
                        volume.write(at, pattern(round, len), Durability::Cached).await.unwrap();
                    }
                })
            })
            .collect();
        for round in 0..6 {
            let (count, told) = scrub(&volume, round % 2 == 1).await;
            assert_eq!((count, told), (0, Vec::new()), "{layout}");
        }
        end.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.await.unwrap();
        }
        volume.stop().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_differ_after_a_crash_is_made_equal_and_no_mismatch() {
    let array = Array::new("n2", &[MEMBER; 2], CHUNK, Bitmap::STANDARD).await;
    let volume = array.start().await;
    let content = pattern(2, volume.size());
    volume.write(0, content.clone(), Durability::Stable).await.unwrap();
    array.crash(volume).await;
    let plant = Plant { chunk: 5, copy: 1, within: 0, len: CHUNK };
    plant.put(&array);
    let volume = array.start().await;
    assert_eq!(scrub(&volume, false).await, (0, Vec::new()));
    array.stop(volume).await;
    assert!(array.contents(&array.geometry).iter().all(|copy| *copy == content));
}

/// A device of which some ranges cannot be read until they are written, or cannot be written.
struct Worn {
    under: Arc<dyn Device>,
    unreadable: Mutex<BTreeSet<u64>>,
    unwritable: Mutex<BTreeSet<u64>>,
}

impl Worn {
    fn new(under: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { under, unreadable: Mutex::default(), unwritable: Mutex::default() })
    }

    /// The sectors of a range.
    fn sectors(at: u64, len: u64) -> Range<u64> {
        at / SECTOR..(at + len).div_ceil(SECTOR)
    }

    fn failed<T: Send + 'static>(&self, operation: Operation, at: u64, len: u64) -> Io<'_, T> {
        let device = self.under.name().to_owned();
        Box::pin(async move { Err(Error::Io { device, operation, at, len, errno: rustix::io::Errno::IO }) })
    }
}

impl Device for Worn {
    fn name(&self) -> &str {
        self.under.name()
    }

    fn size(&self) -> u64 {
        self.under.size()
    }

    fn refresh(&self) -> Io<'_, u64> {
        self.under.refresh()
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        let len = buf.len() as u64;
        if self.unreadable.lock().unwrap().range(Self::sectors(at, len)).next().is_some() {
            return self.failed(Operation::Read, at, len);
        }
        self.under.read(at, buf)
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        let sectors = Self::sectors(at, data.len() as u64);
        if self.unwritable.lock().unwrap().range(sectors.clone()).next().is_some() {
            return self.failed(Operation::Write, at, data.len() as u64);
        }
        self.unreadable.lock().unwrap().retain(|sector| !sectors.contains(sector));
        self.under.write(at, data, durability)
    }

    fn flush(&self) -> Io<'_, ()> {
        self.under.flush()
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.under.discard(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        self.under.write_zeroes(at, len, mode, durability)
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        self.under.locate(at, len)
    }
}

async fn worn(array: &Array) -> (Arc<Volume>, Vec<Arc<Worn>>) {
    let devices: Vec<Arc<Worn>> = array.devices().into_iter().map(Worn::new).collect();
    let members = devices.iter().map(|device| Arc::clone(device) as Arc<dyn Device>).collect();
    (array.start_with(members).await, devices)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_copy_cannot_read_is_rewritten_and_what_differs_beside_it_is_told() {
    let array = Array::new("n2", &[MEMBER; 2], CHUNK, Bitmap::STANDARD).await;
    let (volume, devices) = worn(&array).await;
    let content = pattern(3, volume.size());
    volume.write(0, content.clone(), Durability::Cached).await.unwrap();
    // In one chunk: sectors that the second copy has lost, each copy one in the same block, and a difference.
    let sector = |chunk: u64, within: u64| (array.copy(chunk, 0).1 + within) / SECTOR;
    devices[1].unreadable.lock().unwrap().extend([sector(4, 0), sector(4, 30_000), sector(9, 0)]);
    devices[0].unreadable.lock().unwrap().insert(sector(9, SECTOR));
    let plant = Plant { chunk: 4, copy: 1, within: 20_000, len: 1 };
    plant.put(&array);
    let (count, told) = scrub(&volume, false).await;
    assert_eq!(count, 1, "{told:?}");
    plant.assert_told(&array, &told[0], false, "n2");
    assert!(devices.iter().all(|device| device.unreadable.lock().unwrap().is_empty()), "not rewritten");
    let status = volume.status();
    assert!(status.members.iter().all(|member| member.state == MemberState::InSync), "{status:?}");
    let counts: Vec<(u64, u64)> =
        status.members.iter().map(|member| (member.read_errors, member.corrected)).collect();
    assert_eq!(counts, [(1, 1), (2, 3)]);
    assert_eq!(scrub(&volume, true).await.0, 1);
    drop(devices);
    array.stop(volume).await;
    assert!(array.contents(&array.geometry).iter().all(|copy| *copy == content));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_cannot_be_mended_is_taken_out() {
    let array = Array::new("n3", &[MEMBER; 3], CHUNK, Bitmap::STANDARD).await;
    let (volume, devices) = worn(&array).await;
    let plant = Plant { chunk: 2, copy: 0, within: 0, len: 4096 };
    plant.put(&array);
    devices[0].unwritable.lock().unwrap().insert(array.copy(2, 0).1 / SECTOR);
    let (count, told) = scrub(&volume, true).await;
    assert_eq!(count, 1);
    plant.assert_told(&array, &told[0], true, "n3");
    let states: Vec<MemberState> = volume.status().members.iter().map(|member| member.state).collect();
    assert_eq!(states, [MemberState::Faulty, MemberState::InSync, MemberState::InSync]);
    let zeroes = volume.read(2 * CHUNK, buffer(4096)).await.unwrap();
    assert!(zeroes.iter().all(|&byte| byte == 0), "the majority counts");
    assert_eq!(scrub(&volume, false).await.0, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_rest_of_a_chunk_with_a_bad_block_is_compared() {
    let array = Array::new("n2", &[MEMBER; 2], CHUNK, Bitmap::STANDARD).await;
    let (volume, devices) = worn(&array).await;
    let bad = array.copy(1, 1).1 + 8192;
    devices[1].unwritable.lock().unwrap().insert(bad / SECTOR);
    let mut events = volume.events();
    volume.write(CHUNK, pattern(4, CHUNK), Durability::Cached).await.unwrap();
    next(&mut events, |event| matches!(event, Event::BadBlocks { at, .. } if at == bad).then_some(())).await;
    let plant = Plant { chunk: 1, copy: 1, within: 3 * 4096, len: 1 };
    plant.put(&array);
    let (count, told) = scrub(&volume, false).await;
    assert_eq!(count, 1, "{told:?}");
    plant.assert_told(&array, &told[0], false, "n2");
    volume.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_runs_at_a_time_and_ends_when_it_is_told_to() {
    let array = Array::new("n2", &[MEMBER; 2], CHUNK, Bitmap::STANDARD).await;
    Plant { chunk: 0, copy: 1, within: 0, len: 1 }.put(&array);
    let volume = array.start().await;
    let mut events = volume.events();
    volume.cancel_scrub().await.unwrap();
    // Slow enough that it rests for days after the first window.
    volume.set_speed(SpeedLimits { min: 1, max: 1 });
    volume.scrub(true).await.unwrap();
    let sync = next(&mut events, |event| match event {
        Event::Mismatch(_) => Some(volume.status().sync),
        _ => None,
    });
    assert_eq!(sync.await.action, SyncAction::Repair);
    let refused = volume.scrub(false).await.unwrap_err();
    assert!(matches!(refused, Error::ScrubRunning { .. }), "{refused}");
    volume.cancel_scrub().await.unwrap();
    assert_eq!(stopped(&mut events).await, "it was cancelled");
    assert_eq!((volume.status().mismatches, volume.status().sync.action), (1, SyncAction::Idle));

    volume.scrub(false).await.unwrap();
    assert_eq!(volume.status().mismatches, 0, "the last one's were counted on");
    volume.stop().await.unwrap();
    assert!(stopped(&mut events).await.contains("stopped"));
    assert!(matches!(volume.scrub(false).await, Err(Error::Stopped { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_does_not_keep_a_volume_that_was_dropped() {
    let array = Array::new("n2", &[MEMBER; 2], CHUNK, Bitmap::STANDARD).await;
    let volume = array.start().await;
    let mut events = volume.events();
    volume.set_speed(SpeedLimits { min: 1, max: 1 });
    volume.scrub(false).await.unwrap();
    drop(volume);
    stopped(&mut events).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_degraded_array_is_checked_and_a_read_only_one_is_not() {
    let array = Array::new("n2", &[MEMBER; 4], CHUNK, Bitmap::STANDARD).await;
    let lost = Plant { chunk: 0, copy: 1, within: 0, len: 1 };
    let found = Plant { chunk: 1, copy: 1, within: 0, len: 1 };
    lost.put(&array);
    found.put(&array);
    let volume = array.start_with([0, 2, 3].map(|slot| open(&array.paths[slot])).into()).await;
    let (count, told) = scrub(&volume, false).await;
    assert_eq!(count, 1, "{told:?}");
    found.assert_told(&array, &told[0], false, "n2");
    array.stop(volume).await;
    let read_only = AssembleOptions { read_only: true, ..AssembleOptions::default() };
    let volume = array.try_start(array.devices(), read_only).await.unwrap();
    assert!(matches!(volume.scrub(false).await, Err(Error::ServedReadOnly { .. })));
}
