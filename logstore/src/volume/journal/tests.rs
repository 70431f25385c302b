//! Commits, laps, damage and lives of a journal on a file.

use super::*;
use crate::catalog::records::PartitionKey;
use raid::device::{FileDevice, OpenMode};

const STORE: Uuid = Uuid::from_u128(5);
const REGION: Extent = Extent { at: 64 << 10, len: LEAST };

fn key(partition: u32) -> SegmentKey {
    SegmentKey { partition: PartitionKey { topic: Uuid::from_u128(1), partition }, base: 0 }
}

/// A device with an empty journal, for as long as its directory lives.
async fn made() -> (tempfile::TempDir, Arc<dyn Device>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let device: Arc<dyn Device> = Arc::new(FileDevice::open(&path, OpenMode::ReadWrite).unwrap());
    Journal::format(&device, REGION, STORE).await.unwrap();
    (dir, device)
}

async fn find(device: &Arc<dyn Device>) -> Found {
    Found::read(device, REGION, STORE, true).await.unwrap()
}

/// A life, in which what was there when it began is flushed.
async fn live(device: &Arc<dyn Device>, salt: u64) -> Journal {
    let journal = Journal::begin(Arc::clone(device), REGION, STORE, &find(device).await, salt).await.unwrap();
    journal.commit().await.unwrap();
    journal
}

async fn next(journal: &Journal) -> u64 {
    journal.next().await
}

/// One commit of an append of `len` bytes; returns the record's number.
async fn append(journal: &Journal, at: u64, byte: u8, len: usize) -> u64 {
    journal.gather(&key(0), at, &vec![byte; len]);
    let before = next(journal).await;
    journal.commit().await.unwrap();
    assert!(next(journal).await > before, "nothing was written");
    before
}

/// Overwrites a byte of the record with this number.
async fn damage(device: &Arc<dyn Device>, number: u64, within: u64) {
    let at = place(REGION, number) + within;
    let mut byte = device.read(at, raid::device::buffer(1)).await.unwrap();
    byte[0] ^= 0xff;
    device.write(at, byte.freeze(), Durability::Cached).await.unwrap();
}

#[tokio::test]
async fn what_was_committed_is_found_and_what_was_only_gathered_is_not() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    assert!(find(&device).await.segments.is_empty());
    journal.gather(&key(0), 0, b"ab");
    journal.gather(&key(1), 9, b"x");
    assert!(find(&device).await.segments.is_empty());
    journal.commit().await.unwrap();
    journal.gather(&key(0), 2, b"cd");
    journal.commit().await.unwrap();
    journal.gather(&key(0), 4, b"ef");
    let found = find(&device).await;
    assert_eq!((found.appends, found.gaps), (3, 0));
    assert_eq!(found.segments.of(&key(0)), [(0, BytesMut::from(&b"abcd"[..]))]);
    assert_eq!(found.segments.of(&key(1)), [(9, BytesMut::from(&b"x"[..]))]);
    // A commit without anything new writes nothing.
    let before = next(&journal).await;
    journal.commit().await.unwrap();
    assert_eq!(next(&journal).await, before + 1, "the third append");
    journal.commit().await.unwrap();
    assert_eq!(next(&journal).await, before + 1);
}

#[tokio::test]
async fn a_new_life_counts_nothing_of_the_one_before() {
    let (_dir, device) = made().await;
    append(&live(&device, 7).await, 0, 1, 10).await;
    assert_eq!(find(&device).await.appends, 1);
    let journal = live(&device, 8).await;
    assert!(find(&device).await.segments.is_empty());
    append(&journal, 10, 2, 10).await;
    assert_eq!(find(&device).await.segments.of(&key(0)), [(10, BytesMut::from(&[2; 10][..]))]);
}

#[tokio::test]
async fn only_small_appends_are_gathered_and_a_flush_covers_all_else() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    append(&journal, 0, 1, 10).await;
    for beside in [0, 1, 2] {
        journal.gather(&key(0), 10, b"small");
        match beside {
            0 => assert!(!journal.gather(&key(1), 0, &vec![0; SMALL + 1])),
            1 => journal.write_beside(),
            // More than fits one record.
            _ => assert!(!(0..LONGEST / SMALL).all(|_| journal.gather(&key(1), 0, &vec![0; SMALL]))),
        }
        journal.gather(&key(0), 15, b"behind it");
        let before = next(&journal).await;
        journal.commit().await.unwrap();
        assert_eq!(next(&journal).await, before, "a record stands for what is none ({beside})");
        assert!(find(&device).await.segments.is_empty(), "a flush covers all records before it");
        append(&journal, 20, 1, 10).await;
    }
}

/// Records of one, two and five blocks in turn, for many laps: the journal is always what was not covered yet, and no commit
/// fails for want of room.
#[tokio::test]
async fn it_goes_round_and_is_always_what_no_flush_has_covered() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    let (mut at, mut full, mut half) = (0, 0, 0);
    let mut expected: Vec<u8> = Vec::new();
    for turn in 0..300_u64 {
        let len = [100, 5000, 18_000][turn as usize % 3];
        let bytes = vec![turn as u8; len];
        journal.gather(&key(0), at, &bytes);
        let before = next(&journal).await;
        let committed = journal.commit().await.unwrap();
        at += len as u64;
        if next(&journal).await == before {
            // No room: all was flushed.
            full += 1;
            expected.clear();
        } else {
            expected.extend(&bytes);
        }
        half += u64::from(committed == Committed::HalfFull);
        let found = find(&device).await;
        assert_eq!((found.gaps, found.end), (0, next(&journal).await), "turn {turn}");
        let runs = found.segments.of(&key(0)).iter().map(|(_, run)| &run[..]).collect::<Vec<_>>().concat();
        assert_eq!(runs, expected, "turn {turn}");
        if turn % 50 == 49 {
            journal.covered(next(&journal).await).await.unwrap();
            expected.clear();
        }
    }
    assert!(full > 3 && half > 10, "{full} times full, {half} half");
    assert!(next(&journal).await > 3 * count(REGION), "no lap was made");
}

#[tokio::test]
async fn a_torn_last_record_is_no_loss_and_one_before_others_is_told_of() {
    for within in [0, 3, 40, 60, 5000] {
        let (_dir, device) = made().await;
        let journal = live(&device, 7).await;
        append(&journal, 0, 1, 9000).await;
        let second = append(&journal, 9000, 2, 9000).await;
        damage(&device, second, within).await;
        let found = find(&device).await;
        assert_eq!((found.appends, found.gaps), (1, 0), "damage at {within}");
        append(&journal, 18_000, 3, 9000).await;
        append(&journal, 27_000, 4, 9000).await;
        let found = find(&device).await;
        assert_eq!((found.appends, found.gaps), (3, 1), "damage at {within}");
        assert_eq!(found.end, next(&journal).await);
        assert_eq!(found.segments.of(&key(0)).len(), 2);
    }
}

/// A journal whose records 10 to 33 count, of one block each: those from 30 on lie before the others.
async fn gone_round() -> (tempfile::TempDir, Arc<dyn Device>) {
    assert_eq!(count(REGION), 30);
    let (dir, device) = made().await;
    let journal = live(&device, 7).await;
    for turn in 0..34 {
        if turn == 20 {
            journal.covered(10).await.unwrap();
        }
        assert_eq!(append(&journal, turn * 10, turn as u8, 10).await, turn);
    }
    (dir, device)
}

#[tokio::test]
async fn damage_where_it_goes_round_hides_nothing_behind_it() {
    let (_dir, device) = gone_round().await;
    let found = find(&device).await;
    assert_eq!((found.appends, found.gaps, found.end), (24, 0, 34));
    for (damaged, gaps) in [(15, 1), (29, 2), (30, 2), (33, 2)] {
        damage(&device, damaged, 70).await;
        let found = find(&device).await;
        // The last one may have been torn.
        assert_eq!((found.gaps, found.end), (gaps, if damaged == 33 { 33 } else { 34 }), "{damaged}");
    }
    assert_eq!(find(&device).await.appends, 20);
}

#[tokio::test]
async fn a_rotten_pointer_hides_nothing_where_it_goes_round() {
    let (_dir, device) = gone_round().await;
    for slot in [0, 1] {
        let at = REGION.at + slot * BLOCK;
        let kept = device.read(at, raid::device::buffer(BLOCK as usize)).await.unwrap().freeze();
        device.write(at, Bytes::from(vec![0xee; BLOCK as usize]), Durability::Cached).await.unwrap();
        let found = find(&device).await;
        // The older one has those count that were covered since, and that nothing lies over yet.
        let appends = if found.pointer.first == 10 { 24 } else { 30 };
        assert_eq!((found.appends, found.gaps, found.end), (appends, 0, 34), "{:?}", found.pointer);
        device.write(at, kept, Durability::Cached).await.unwrap();
    }
}

#[tokio::test]
async fn one_that_was_closed_is_not_read() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    append(&journal, 0, 1, 10).await;
    journal.close().await.unwrap();
    let found = find(&device).await;
    assert!(found.pointer.closed && found.segments.is_empty());
    // But in the next life again.
    let journal = live(&device, 8).await;
    append(&journal, 10, 2, 10).await;
    assert_eq!(find(&device).await.appends, 1);
}

/// Users' bytes may look like anything.
#[tokio::test]
async fn what_looks_like_a_record_within_a_torn_one_is_none() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    let number = next(&journal).await;
    let mut forged = record::begin(0);
    record::push(&mut forged, &key(9), 0, b"forged");
    // Of the right number, but for a salt that nobody can know.
    let forged = record::finish(forged, Name { store: STORE, salt: 8, number: number + 1 }, 1);
    let mut data = vec![0; BLOCK as usize - record::HEAD - 40];
    data.extend_from_slice(&forged);
    journal.gather(&key(0), 0, &data);
    journal.commit().await.unwrap();
    let at = place(REGION, number + 1);
    let stored = device.read(at, raid::device::buffer(BLOCK as usize)).await.unwrap();
    assert_eq!(stored[..], forged[..], "it does not lie at the beginning of a block");
    damage(&device, number, 20).await;
    let found = find(&device).await;
    assert_eq!((found.appends, found.gaps, found.end), (0, 0, number));
}

#[tokio::test]
async fn one_rotten_pointer_hides_nothing_and_two_are_an_error() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    append(&journal, 0, 1, 10).await;
    let first = next(&journal).await;
    // More than the search behind the last record goes: the other pointer is that far behind.
    for turn in 0..20 {
        append(&journal, 10 + turn, 2, 1).await;
    }
    journal.covered(next(&journal).await).await.unwrap();
    let live_from = next(&journal).await;
    append(&journal, 40, 3, 10).await;
    for (slot, expected) in [(0, 1), (1, 1)] {
        let at = REGION.at + slot * BLOCK;
        let kept = device.read(at, raid::device::buffer(BLOCK as usize)).await.unwrap().freeze();
        device.write(at, Bytes::from(vec![0xee; BLOCK as usize]), Durability::Cached).await.unwrap();
        let found = find(&device).await;
        assert!(found.appends >= expected && found.gaps == 0, "{found:?}");
        assert_eq!(found.end, live_from + 1);
        assert!(found.segments.of(&key(0)).iter().any(|(from, run)| *from == 40 && run[..] == [3; 10]));
        device.write(at, kept, Durability::Cached).await.unwrap();
    }
    assert!(first < live_from);
    device.write(REGION.at, Bytes::from(vec![0; POINTERS as usize]), Durability::Cached).await.unwrap();
    let error = Found::read(&device, REGION, STORE, true).await.unwrap_err();
    assert!(matches!(&error, Error::DamagedHeader { reason, .. } if reason.contains("journal")), "{error}");
}

/// A commit whose caller goes away half-way must not have later ones take its appends for durable.
#[tokio::test]
async fn what_a_commit_took_and_did_not_write_the_next_one_flushes() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    journal.gather(&key(0), 0, b"ab");
    drop(journal.take());
    assert!(journal.gathered.lock().beside);
    let before = next(&journal).await;
    journal.commit().await.unwrap();
    assert_eq!(next(&journal).await, before, "it was not flushed");
    assert!(!journal.gathered.lock().beside);
}

fn extent(at: u64, len: u64) -> Extent {
    Extent { at, len }
}

/// What comes to two runs of places is two writes, and is where it belongs; nothing of it is written before.
#[tokio::test]
async fn what_is_kept_comes_to_its_place_in_one_write_for_each_run() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    let unplaced = Unplaced::new(&device);
    let (here, there) = (512 << 10, 768 << 10);
    assert!(unplaced.ends_at(100), "nothing is kept, so anything leaves no gap");
    assert!(journal.keep(&unplaced, &key(0), 100, &[extent(here, 3)], b"abc"));
    assert!(journal.keep(&unplaced, &key(0), 103, &[extent(here + 3, 1), extent(there, 2)], b"def"));
    assert!(journal.keep(&unplaced, &key(0), 106, &[extent(there + 2, 1)], b"g"));
    assert!(unplaced.ends_at(107) && !unplaced.ends_at(106));
    for (range, is_kept) in
        [(0..100, false), (0..101, true), (106..200, true), (107..200, false), (105..105, false)]
    {
        assert_eq!(unplaced.has(&range), is_kept, "{range:?}");
    }
    let read = async |at, len| device.read(at, raid::device::buffer(len)).await.unwrap().freeze();
    assert_eq!(read(here, 4).await[..], [0; 4]);
    journal.place_all().await.unwrap();
    assert_eq!(read(here, 4).await[..], *b"abcd");
    assert_eq!(read(there, 3).await[..], *b"efg");
    assert!(!unplaced.has(&(0..200)) && journal.unplaced.lock().is_empty());
    // It is known anew when something is kept again, and what was abandoned is written nowhere.
    assert!(journal.keep(&unplaced, &key(0), 107, &[extent(there + 3, 1)], b"h"));
    assert_eq!(journal.unplaced.lock().len(), 1);
    unplaced.abandon().await;
    journal.place_all().await.unwrap();
    assert_eq!(read(there, 4).await[..], *b"efg\0");
    assert!(journal.unplaced.lock().is_empty());
}

/// A commit that flushes and a stop place what is kept before they let the journal begin behind it.
#[tokio::test]
async fn nothing_leaves_the_journal_before_it_is_in_its_place() {
    let (_dir, device) = made().await;
    let journal = live(&device, 7).await;
    let unplaced = Unplaced::new(&device);
    let place = 512 << 10;
    for (turn, byte) in [(0, b'a'), (1, b'b')] {
        assert!(journal.keep(&unplaced, &key(0), turn, &[extent(place + turn, 1)], &[byte]));
        journal.commit().await.unwrap();
        assert_eq!(find(&device).await.appends, 1);
        match turn {
            0 => {
                journal.write_beside();
                assert_eq!(journal.commit().await.unwrap(), Committed::Flushed);
            }
            _ => journal.close().await.unwrap(),
        }
        assert_eq!(find(&device).await.appends, 0);
        let there = device.read(place, raid::device::buffer(2)).await.unwrap();
        assert_eq!(there[turn as usize], byte);
    }
}
