//! Tests of files as devices, on real ones.

use super::*;
use crate::device::buffer;

/// An open file of `size` bytes, and another handle on it.
fn file_of(size: u64) -> (tempfile::NamedTempFile, FileDevice) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    let device = FileDevice::open(file.path(), OpenMode::ReadWrite).unwrap();
    (file, device)
}

#[tokio::test]
async fn holes_are_told_and_their_ends_are_right() {
    let (file, device) = file_of(1 << 20);
    let hole = |len, hole| Extent { len, hole };
    assert_eq!(device.extents(0, 1 << 20).await.unwrap(), [hole(1 << 20, true)]);
    device.write(256 << 10, Bytes::from_static(&[7; 4096]), Durability::Cached).await.unwrap();
    device.write((1 << 20) - 4096, Bytes::from_static(&[7; 4096]), Durability::Cached).await.unwrap();
    let all = device.extents(0, 1 << 20).await.unwrap();
    assert_eq!(all.iter().map(|extent| extent.len).sum::<u64>(), 1 << 20);
    assert!(all.windows(2).all(|two| two[0].hole != two[1].hole), "{all:?}");
    // A part: from within the data, to within the hole.
    let part = device.extents((256 << 10) + 512, 8192).await.unwrap();
    assert_eq!(part, [hole(4096 - 512, false), hole(4096 + 512, true)]);
    assert!(device.extents(0, 0).await.unwrap().is_empty());
    assert!(matches!(device.extents(1 << 20, 1).await, Err(Error::OutOfBounds { .. })));
    device.discard(0, 1 << 20).await.unwrap();
    assert_eq!(device.extents(0, 1 << 20).await.unwrap(), [hole(1 << 20, true)]);
    // A file that was cut short has no hole there: it has nothing.
    file.as_file().set_len(4096).unwrap();
    assert!(matches!(device.extents(0, 8192).await, Err(Error::Io { .. })));
}

#[tokio::test]
async fn the_work_for_extents_is_bounded() {
    let (file, device) = file_of(64 << 20);
    for at in (0..64 << 20).step_by(16 << 10) {
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[1], at).unwrap();
    }
    let found = device.extents(0, 64 << 20).await.unwrap();
    assert!(found.len() <= MOST_EXTENTS && found.len() > 1, "{}", found.len());
    let told: u64 = found.iter().map(|extent| extent.len).sum();
    assert!(told < 64 << 20, "all of it was looked at");
}

#[tokio::test]
async fn advice_and_questions_change_nothing() {
    let (file, device) = file_of(8192);
    device.write(0, Bytes::from_static(&[7; 8192]), Durability::Cached).await.unwrap();
    device.prefetch(0, 8192).await.unwrap();
    assert!(device.prefetch(0, 8193).await.is_err());
    // Temporary files lie where holes can be punched.
    assert!(device.zeroes_fast(ZeroMode::MayPunch));
    assert!(!device.zeroes_fast(ZeroMode::Allocate));
    assert_eq!(device.is_rotational(), device.is_rotational());
    drop(device);
    let read_only = FileDevice::open(file.path(), OpenMode::ReadOnly).unwrap();
    assert!(!read_only.zeroes_fast(ZeroMode::MayPunch));
    assert_eq!(std::fs::read(file.path()).unwrap(), [7; 8192]);
}

#[test]
fn what_lies_in_memory_is_read_and_written_in_the_call() {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(8 << 20).unwrap();
    let device = FileDevice::open(file.path(), OpenMode::ReadWrite).unwrap();
    assert!(device.is_instant());
    let mut found = [0; 5];
    assert!(device.write_now(8191, &[7; 5]) && device.read_now(8191, &mut found));
    assert_eq!(found, [7; 5]);
    let long = vec![1; INSTANT as usize + 1];
    assert!(!device.write_now(0, &long) && !device.read_now(0, &mut vec![0; long.len()]), "longer ones");
    assert!(!device.write_now((8 << 20) - 1, &[7; 2]) && !device.read_now((8 << 20) - 1, &mut [0; 2]));
    // Cut short just after a look: the end would bring the length back, and is looked at each time.
    assert!(device.write_now(0, &[1]));
    file.as_file().set_len(4 << 20).unwrap();
    assert!(!device.write_now((8 << 20) - 4096, &[7; 4096]));
    assert!(!device.read_now(6 << 20, &mut found));
    drop(device);
    let read_only = FileDevice::open(file.path(), OpenMode::ReadOnly).unwrap();
    assert!(!read_only.is_instant() && !read_only.write_now(0, &[1]));
}

#[test]
fn whole_granules_are_found_within_a_range() {
    assert_eq!(within(5..20, 1), 5..20);
    assert_eq!(within(4096..8192, 4096), 4096..8192);
    assert_eq!(within(1..12289, 4096), 4096..12288);
    for none in [1..4095, 1..2, 4000..4100, 0..0, 4096..4096] {
        let found = within(none.clone(), 4096);
        assert!(
            found.is_empty() && none.start <= found.start && found.end <= none.end,
            "{none:?}: {found:?}"
        );
    }
}

#[tokio::test]
async fn growth_is_found_when_looked_for_and_can_be_used_then() {
    let (file, device) = file_of(8192);
    file.as_file().set_len(16384).unwrap();
    assert_eq!(device.size(), 8192);
    let beyond = device.write(8192, Bytes::from_static(&[7; 4096]), Durability::Cached).await;
    assert!(matches!(beyond, Err(Error::OutOfBounds { .. })), "{beyond:?}");
    assert_eq!(device.refresh().await.unwrap(), 16384);
    assert_eq!(device.size(), 16384);
    device.write(8192, Bytes::from_static(&[7; 4096]), Durability::Cached).await.unwrap();
    assert!(device.read(8192, buffer(4096)).await.unwrap().iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn a_file_that_was_cut_short_is_an_error_and_its_size_stays() {
    let (file, device) = file_of(8192);
    file.as_file().set_len(4096).unwrap();
    let outcome = device.refresh().await;
    assert!(matches!(outcome, Err(Error::Shrank { promised: 8192, size: 4096, .. })), "{outcome:?}");
    assert_eq!(device.size(), 8192);
}
