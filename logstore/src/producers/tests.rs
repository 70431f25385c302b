//! The state machine against a list of all that was appended, and the bytes of its snapshots.

use super::*;
use proptest::prelude::*;

const PLAIN: i16 = 0;
const TXN: i16 = 0x10;

fn batch(id: i64, epoch: i16, sequence: i32, records: i32, offset: i64) -> Header {
    Header {
        base_offset: offset,
        size: 100,
        leader_epoch: 0,
        crc: 0,
        attributes: PLAIN,
        last_offset_delta: records - 1,
        base_timestamp: offset,
        max_timestamp: offset,
        producer_id: id,
        producer_epoch: epoch,
        base_sequence: sequence,
        count: records,
    }
}

fn txn(id: i64, epoch: i16, sequence: i32, records: i32, offset: i64) -> Header {
    Header { attributes: TXN, ..batch(id, epoch, sequence, records, offset) }
}

fn says(outcome: Outcome, coordinator_epoch: i32) -> Marker {
    Marker { outcome, coordinator_epoch }
}

fn end(producers: &mut Producers, id: i64, epoch: i16, offset: i64, marker: Marker) -> Option<Ended> {
    let header = Header { attributes: 0x30, ..batch(id, epoch, -1, 1, offset) };
    producers.judge_marker(id, epoch, marker).unwrap();
    producers.note(&header, Some(marker), 0)
}

fn judge(producers: &Producers, header: Header) -> Result<Verdict, Refusal> {
    producers.judge(&[header], Origin::Client).map_err(|(_, refusal)| refusal)
}

#[test]
fn sequences_duplicates_gaps_and_epochs() {
    let mut producers = Producers::default();
    assert_eq!(judge(&producers, batch(7, 0, 42, 3, 0)), Ok(Verdict::Next), "unknown: any start");
    for at in 0..6 {
        let next = batch(7, 0, at * 10, 10, i64::from(at) * 10);
        assert_eq!(judge(&producers, next), Ok(Verdict::Next));
        producers.note(&next, None, 0);
    }
    for at in 1..6 {
        let repeated =
            Verdict::Duplicate { base_offset: i64::from(at) * 10, last_offset: i64::from(at) * 10 + 9 };
        assert_eq!(judge(&producers, batch(7, 0, at * 10, 10, 0)), Ok(repeated));
    }
    let gap = Err(Refusal::OutOfOrder { expected: 60 });
    assert_eq!(judge(&producers, batch(7, 0, 0, 10, 0)), gap, "a sixth");
    assert_eq!(judge(&producers, batch(7, 0, 70, 10, 0)), gap);
    assert_eq!(judge(&producers, batch(7, 0, 50, 5, 0)), gap);
    assert_eq!(judge(&producers, batch(7, 1, 60, 1, 0)), Err(Refusal::OutOfOrder { expected: 0 }));
    assert_eq!(judge(&producers, batch(7, 1, 0, 1, 0)), Ok(Verdict::Next));
    producers.note(&batch(7, 1, 0, 1, 60), None, 0);
    assert_eq!(judge(&producers, batch(7, 0, 60, 1, 0)), Err(Refusal::Fenced { current: 1 }));
    assert_eq!(judge(&producers, batch(-1, -1, -1, 1, 0)), Ok(Verdict::Next));
}

#[test]
fn sequences_wrap() {
    let mut producers = Producers::default();
    let last = batch(1, 0, i32::MAX - 1, 3, 0);
    assert_eq!(last.last_sequence(), 0);
    producers.note(&last, None, 0);
    assert_eq!(judge(&producers, batch(1, 0, 1, 1, 0)), Ok(Verdict::Next));
    assert_eq!(judge(&producers, last), Ok(Verdict::Duplicate { base_offset: 0, last_offset: 2 }));
}

#[test]
fn batches_of_one_request_follow_each_other() {
    let mut producers = Producers::default();
    let first = batch(1, 0, 0, 5, 0);
    let both = |producers: &Producers, second| producers.judge(&[first, second], Origin::Client);
    assert_eq!(both(&producers, batch(1, 0, 5, 1, 0)), Ok(Verdict::Next));
    let gap = Err((1, Refusal::OutOfOrder { expected: 5 }));
    assert_eq!(both(&producers, batch(1, 0, 6, 1, 0)), gap);
    assert_eq!(both(&producers, batch(2, 0, 6, 1, 0)), Ok(Verdict::Next));
    let twice = Err((1, Refusal::OutOfOrder { expected: 0 }));
    assert_eq!(both(&producers, first), twice, "the same batch twice in one request");
    let mixed = producers.judge(&[txn(1, 0, 0, 1, 0), batch(1, 0, 1, 1, 0)], Origin::Client);
    assert!(matches!(mixed, Err((1, Refusal::InTransaction { .. }))));
    producers.note(&batch(1, 0, 0, 5, 10), None, 0);
    producers.note(&batch(1, 0, 5, 2, 15), None, 0);
    let again = Ok(Verdict::Duplicate { base_offset: 10, last_offset: 16 });
    assert_eq!(both(&producers, batch(1, 0, 5, 2, 0)), again);
    let partly = Err((0, Refusal::OutOfOrder { expected: 7 }));
    assert_eq!(both(&producers, batch(3, 0, 0, 1, 0)), partly, "the new half would be lost unsaid");
    assert_eq!(both(&producers, batch(-1, -1, -1, 1, 0)), partly);
}

#[test]
fn a_transaction_opens_ends_and_bounds_what_is_stable() {
    let mut producers = Producers::default();
    assert_eq!(producers.note(&txn(1, 0, 0, 2, 10), None, 0), None);
    producers.note(&txn(2, 0, 0, 1, 12), None, 0);
    producers.note(&txn(1, 0, 2, 1, 13), None, 0);
    assert_eq!(producers.first_open(), Some(10));
    assert_eq!(judge(&producers, batch(1, 0, 3, 1, 0)), Err(Refusal::InTransaction { first_offset: 10 }));
    let ended = end(&mut producers, 1, 0, 14, says(Outcome::Abort, 3)).unwrap();
    let expected =
        Ended { producer_id: 1, first_offset: 10, last_offset: 14, last_stable: 12, outcome: Outcome::Abort };
    assert_eq!(ended, expected);
    let ended = end(&mut producers, 2, 0, 15, says(Outcome::Commit, 3)).unwrap();
    assert_eq!((ended.last_stable, producers.first_open()), (16, None));
    assert_eq!(end(&mut producers, 2, 0, 16, says(Outcome::Commit, 3)), None, "it has none open");
    assert_eq!(judge(&producers, batch(1, 0, 3, 1, 0)), Ok(Verdict::Next), "sequences go on");
    let repeated = Ok(Verdict::Duplicate { base_offset: 13, last_offset: 13 });
    assert_eq!(judge(&producers, txn(1, 0, 2, 1, 0)), repeated);
}

#[test]
fn markers_fence_producers_and_coordinators() {
    let mut producers = Producers::default();
    producers.note(&txn(1, 4, 0, 5, 0), None, 0);
    let abort = says(Outcome::Abort, 9);
    assert_eq!(producers.judge_marker(1, 3, abort), Err(Refusal::Fenced { current: 4 }));
    assert!(end(&mut producers, 1, 5, 5, abort).is_some());
    assert_eq!(judge(&producers, txn(1, 4, 5, 1, 0)), Err(Refusal::Fenced { current: 5 }));
    let zombie = producers.judge_marker(1, 5, says(Outcome::Commit, 8));
    assert_eq!(zombie, Err(Refusal::FencedCoordinator { current: 9 }));
    assert_eq!(judge(&producers, txn(1, 5, 5, 1, 0)), Err(Refusal::OutOfOrder { expected: 0 }));
    assert_eq!(judge(&producers, txn(1, 5, 0, 1, 0)), Ok(Verdict::Next));
    // One that nobody knew is known by its marker.
    assert_eq!(end(&mut producers, 8, 2, 6, abort), None);
    assert_eq!(judge(&producers, batch(8, 1, 0, 1, 0)), Err(Refusal::Fenced { current: 2 }));
    let states = producers.states();
    assert_eq!((states[1].last_sequence, states[1].last_offset, states[1].coordinator_epoch), (-1, -1, 9));
    // An emptied control batch says nothing.
    let header = Header { attributes: 0x30, count: 0, ..batch(9, 0, -1, 1, 7) };
    assert_eq!(producers.note(&header, None, 0), None);
    assert_eq!(producers.len(), 2);
}

#[test]
fn a_coordinators_batches_have_no_sequence() {
    let mut producers = Producers::default();
    let offsets = txn(1, 0, -1, 3, 0);
    assert_eq!(producers.judge(&[offsets], Origin::Coordinator), Ok(Verdict::Next));
    producers.note(&offsets, None, 0);
    assert_eq!(producers.judge(&[offsets], Origin::Coordinator), Ok(Verdict::Next), "never a repetition");
    let old = producers.judge(&[Header { producer_epoch: -1, ..offsets }], Origin::Coordinator);
    assert_eq!(old, Err((0, Refusal::Fenced { current: 0 })));
    let found = Producers::read_snapshot(&producers.snapshot(), 3).unwrap();
    assert_eq!((found.first_open(), found.states()), (Some(0), producers.states()));
}

#[test]
fn expiry_spares_open_transactions() {
    let mut producers = Producers::default();
    producers.note(&batch(1, 0, 0, 1, 0), None, 100);
    producers.note(&batch(2, 0, 0, 1, 1), None, 200);
    producers.note(&txn(3, 0, 0, 1, 2), None, 100);
    producers.expire(150);
    assert_eq!(producers.states().iter().map(|state| state.id).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(judge(&producers, batch(1, 0, 9, 1, 0)), Ok(Verdict::Next));
    end(&mut producers, 3, 0, 3, says(Outcome::Abort, 0));
    producers.expire(150);
    assert_eq!(producers.len(), 1);
}

#[test]
fn snapshots_are_kafkas_bytes() {
    let mut producers = Producers::default();
    producers.note(&txn(0x11, 2, 5, 3, 100), None, 0x77);
    end(&mut producers, 0x22, 1, 103, says(Outcome::Commit, 6));
    let bytes = producers.snapshot();
    let mut expected = vec![0, 1];
    expected.extend(crc32c::crc32c(&bytes[6..]).to_be_bytes());
    expected.extend(2i32.to_be_bytes());
    let mut entry =
        |id: i64, epoch: i16, (sequence, offset, delta): (i32, i64, i32), rest: (i64, i32, i64)| {
            expected.extend(id.to_be_bytes());
            expected.extend(epoch.to_be_bytes());
            expected.extend(sequence.to_be_bytes());
            expected.extend(offset.to_be_bytes());
            expected.extend(delta.to_be_bytes());
            let (timestamp, coordinator, first) = rest;
            expected.extend(timestamp.to_be_bytes());
            expected.extend(coordinator.to_be_bytes());
            expected.extend(first.to_be_bytes());
        };
    entry(0x11, 2, (7, 102, 2), (0x77, -1, 100));
    entry(0x22, 1, (-1, -1, 0), (0, 6, -1));
    assert_eq!(bytes, expected);
    assert_eq!(Producers::read_snapshot(&bytes, 104), Ok(producers));
    assert_eq!(Producers::read_snapshot(&bytes, 102), Err(SnapshotFault::Offset), "of another log");
}

/// What the state machine should be: a list of all that was appended, searched from the start each time.
#[derive(Default)]
struct Model(Vec<(Header, Option<Marker>)>);

impl Model {
    fn epoch(&self, id: i64) -> Option<i16> {
        self.0
            .iter()
            .rev()
            .find(|(header, _)| header.producer_id == id)
            .map(|(header, _)| header.producer_epoch)
    }

    /// Batches of the producer's newest epoch, with nothing of another epoch after them.
    fn batches(&self, id: i64) -> Vec<Header> {
        let epoch = self.epoch(id);
        let own = self.0.iter().rev().filter(|(header, _)| header.producer_id == id);
        let own = own.take_while(|(header, _)| Some(header.producer_epoch) == epoch);
        own.filter(|(_, marker)| marker.is_none()).map(|(header, _)| *header).collect()
    }

    fn open_from(&self, id: i64) -> Option<i64> {
        let own = self.0.iter().rev().filter(|(header, _)| header.producer_id == id);
        let open = own.take_while(|(_, marker)| marker.is_none());
        open.filter(|(header, _)| header.is_transactional()).last().map(|(header, _)| header.base_offset)
    }

    fn judge(&self, header: &Header) -> Result<Verdict, Refusal> {
        let Some(current) = self.epoch(header.producer_id) else { return Ok(Verdict::Next) };
        let batches = self.batches(header.producer_id);
        if current == header.producer_epoch {
            let same =
                |sent: &&Header| (sent.base_sequence, sent.count) == (header.base_sequence, header.count);
            if let Some(sent) = batches.iter().take(5).find(same) {
                let (base_offset, last_offset) = (sent.base_offset, sent.last_offset());
                return Ok(Verdict::Duplicate { base_offset, last_offset });
            }
        }
        if header.producer_epoch < current {
            return Err(Refusal::Fenced { current });
        }
        let newest = batches.first().filter(|_| current == header.producer_epoch);
        let expected = newest.map_or(0, |sent| sent.base_sequence + sent.count);
        if header.base_sequence != expected {
            return Err(Refusal::OutOfOrder { expected });
        }
        match self.open_from(header.producer_id) {
            Some(first_offset) if !header.is_transactional() => Err(Refusal::InTransaction { first_offset }),
            _ => Ok(Verdict::Next),
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// Producer, epoch, how far from the next sequence number, records, whether transactional.
    Send(i64, i16, i32, i32, bool),
    End(i64, i16, bool, i32),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let near = prop_oneof![4 => Just(0), 1 => -6i32..6];
    prop_oneof![
        6 => (0i64..3, 0i16..3, near, 1i32..4, any::<bool>()).prop_map(|(a, b, c, d, e)| Step::Send(a, b, c, d, e)),
        2 => (0i64..3, 0i16..3, any::<bool>(), 0i32..3).prop_map(|(a, b, c, d)| Step::End(a, b, c, d)),
        1 => Just(Step::Restart),
    ]
}

#[test]
fn what_was_noted_as_ended_is_not_open() {
    let mut producers = Producers::default();
    for (id, offset) in [(1, 10), (2, 20), (3, 30)] {
        producers.note(&Header { attributes: TXN, ..batch(id, 0, 0, 1, offset) }, None, 0);
    }
    producers.close_before(Some(20));
    assert_eq!(producers.open().collect::<Vec<_>>(), [(20, 2), (30, 3)]);
    assert_eq!(
        producers.states().iter().map(|state| state.open_from).collect::<Vec<_>>(),
        [None, Some(20), Some(30)]
    );
    producers.close_before(None);
    assert_eq!(producers.first_open(), None);
}

proptest! {
    #[test]
    fn it_does_as_the_model_says(steps in prop::collection::vec(step(), 1..60)) {
        let (mut producers, mut model) = (Producers::default(), Model::default());
        let mut offset = 0;
        for step in steps {
            match step {
                Step::Send(id, epoch, by, records, transactional) => {
                    let newest = model.batches(id).first().filter(|_| model.epoch(id) == Some(epoch)).copied();
                    let next = newest.map_or(0, |sent| sent.base_sequence + sent.count);
                    let header = batch(id, epoch, (next + by).max(0), records, offset);
                    let header = Header { attributes: if transactional { TXN } else { PLAIN }, ..header };
                    let verdict = judge(&producers, header);
                    prop_assert_eq!(verdict, model.judge(&header));
                    if verdict == Ok(Verdict::Next) {
                        producers.note(&header, None, 0);
                        model.0.push((header, None));
                        offset += i64::from(records);
                    }
                }
                Step::End(id, epoch, commit, coordinator_epoch) => {
                    let outcome = if commit { Outcome::Commit } else { Outcome::Abort };
                    let marker = says(outcome, coordinator_epoch);
                    let newest = |pick: fn(&(Header, Option<Marker>)) -> Option<Marker>| {
                        model.0.iter().rev().filter(|(header, _)| header.producer_id == id).find_map(pick)
                    };
                    let coordinator = newest(|(_, marker)| *marker).map_or(-1, |marker| marker.coordinator_epoch);
                    let refusal = match model.epoch(id) {
                        Some(current) if epoch < current => Err(Refusal::Fenced { current }),
                        Some(_) if coordinator_epoch < coordinator => {
                            Err(Refusal::FencedCoordinator { current: coordinator })
                        }
                        _ => Ok(()),
                    };
                    prop_assert_eq!(producers.judge_marker(id, epoch, marker), refusal);
                    if refusal.is_ok() {
                        let first_offset = model.open_from(id);
                        let header = Header { attributes: 0x30, ..batch(id, epoch, -1, 1, offset) };
                        model.0.push((header, Some(marker)));
                        let ended = producers.note(&header, Some(marker), 0);
                        prop_assert_eq!(ended.map(|ended| ended.first_offset), first_offset);
                        let open = (0..3).filter_map(|id| model.open_from(id)).min();
                        if let Some(ended) = ended {
                            prop_assert_eq!(ended.last_stable, open.unwrap_or(offset + 1));
                            prop_assert_eq!((ended.producer_id, ended.last_offset, ended.outcome), (id, offset, outcome));
                        }
                        offset += 1;
                    }
                }
                Step::Restart => {
                    // All but the older batches comes back; those come back from the log.
                    let found = Producers::read_snapshot(&producers.snapshot(), offset).unwrap();
                    prop_assert_eq!(found.states(), producers.states());
                    prop_assert_eq!(&found.open, &producers.open);
                    let mut replayed = Producers::default();
                    for (header, marker) in &model.0 {
                        replayed.note(header, *marker, 0);
                    }
                    prop_assert_eq!(&replayed, &producers, "the log alone gives the same");
                }
            }
            let open = (0..3).filter_map(|id| model.open_from(id)).min();
            prop_assert_eq!(producers.first_open(), open);
        }
    }

    #[test]
    fn snapshots_round_trip_and_any_damage_is_seen(ids in prop::collection::btree_set(0i64..1000, 0..20), at in 0usize..900, bit in 0u8..8) {
        let mut producers = Producers::default();
        for id in ids {
            let attributes = if id % 3 == 0 { TXN } else { PLAIN };
            let header = batch(id, (id % 7) as i16, (id * 3) as i32, 4, id * 10);
            producers.note(&Header { attributes, ..header }, None, id);
        }
        let bytes = producers.snapshot();
        prop_assert_eq!(Producers::read_snapshot(&bytes, 10_000).unwrap(), producers);
        let mut bad = bytes.to_vec();
        let at = at % bad.len();
        bad[at] ^= 1 << bit;
        prop_assert!(Producers::read_snapshot(&bad, 10_000).is_err());
        prop_assert!(Producers::read_snapshot(&bytes[..at], 10_000).is_err());
    }

    #[test]
    fn no_bytes_with_a_right_checksum_make_it_panic(count in 0i32..4, body in prop::collection::vec(any::<u8>(), 0..150), end: i64) {
        let mut bytes = vec![0, 1, 0, 0, 0, 0];
        bytes.extend(count.to_be_bytes());
        bytes.extend(body);
        let crc = crc32c::crc32c(&bytes[6..]);
        bytes[2..6].copy_from_slice(&crc.to_be_bytes());
        let _any = Producers::read_snapshot(&bytes, end);
    }
}
