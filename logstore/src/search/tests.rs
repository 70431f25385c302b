//! Damage in a log whose records hold batches themselves: nothing that a user planted is taken for the log's, and nothing that
//! is whole is passed over.

use super::*;
use crate::home::{Copies, Io};
use crate::segment::End;
use bytes::{BufMut, BytesMut};

/// Batches of the log, and records of each.
const BATCHES: i64 = 12;
const EACH: i64 = 4;
/// The batch that is damaged.
const BAD: i64 = 5;

/// The copies of a segment, in memory.
struct Memory(Vec<Vec<u8>>);

impl Copies for Memory {
    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        self.read_copy(at, buf, 0)
    }

    fn copies(&self) -> usize {
        self.0.len()
    }

    fn read_copy(&self, at: u64, mut buf: BytesMut, copy: usize) -> Io<'_, BytesMut> {
        let len = buf.len();
        buf.copy_from_slice(&self.0[copy][at as usize..][..len]);
        Box::pin(async { Ok(buf) })
    }
}

/// Bytes that nothing else looks like.
fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.push((seed >> 40) as u8);
    }
    bytes
}

fn zigzag(out: &mut Vec<u8>, len: usize) {
    let (bytes, count) = varint(2 * len as u64);
    out.extend(&bytes[..count]);
}

/// A batch of records without keys or headers.
fn batch(base_offset: i64, values: &[Vec<u8>]) -> Vec<u8> {
    let mut records = Vec::new();
    for (number, value) in values.iter().enumerate() {
        let mut record = vec![0, 0, 2 * number as u8, 1];
        zigzag(&mut record, value.len());
        record.extend(value);
        record.push(0);
        zigzag(&mut records, record.len());
        records.extend(record);
    }
    let count = values.len() as i32;
    let header = Header {
        base_offset,
        size: 0,
        leader_epoch: 0,
        crc: 0,
        attributes: 0,
        last_offset_delta: count - 1,
        base_timestamp: 0,
        max_timestamp: 0,
        producer_id: -1,
        producer_epoch: -1,
        base_sequence: -1,
        count,
    };
    header.with_records(&records).to_vec()
}

/// A log, and where its batches begin.
#[derive(Clone)]
struct Log {
    bytes: Vec<u8>,
    starts: Vec<usize>,
}

impl Log {
    /// The values of the batch that will be damaged, or of all, are given.
    fn new(number: i64, value: impl Fn(i64, i64) -> Option<Vec<u8>>) -> Self {
        let (mut bytes, mut starts) = (Vec::new(), Vec::new());
        for at in 0..number {
            let own = |offset: i64| value(at, offset).unwrap_or_else(|| noise(300, offset as u64));
            let values: Vec<Vec<u8>> = (at * EACH..(at + 1) * EACH).map(own).collect();
            starts.push(bytes.len());
            bytes.extend(batch(at * EACH, &values));
        }
        Self { bytes, starts }
    }

    fn damage(&mut self, at: usize, with: &[u8]) {
        self.bytes[at..at + with.len()].copy_from_slice(with);
    }

    fn end(&self) -> End {
        End { size: self.bytes.len() as u64, next: self.starts.len() as i64 * EACH }
    }
}

fn on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
}

fn ground(copies: &Memory, end: End) -> Ground<'_> {
    Ground { name: &"a log", bytes: copies, base: 0, end, epochs: None, ended: None }
}

/// What stands at a position and at those that follow, by first offset: as a reader goes who expects `next`.
fn walk(copies: Vec<Vec<u8>>, end: End, ended: Option<i64>) -> Vec<(u64, i64)> {
    let copies = Memory(copies);
    let ground = Ground { ended, ..ground(&copies, end) };
    on(async {
        let (mut at, mut next, mut found) = (0, 0, Vec::new());
        while at < end.size {
            let best = ground.best(at, Some(next)).await.unwrap().ok();
            // As recovery refuses what goes on past a gap where there can be none.
            let most = ended.unwrap_or(end.next);
            let in_place = |header: &Header| header.base_offset == next || header.next_offset() <= most;
            if let Some(sound) = best.filter(|sound| in_place(&sound.header)) {
                found.push((at, sound.header.base_offset));
                (at, next) = (at + u64::from(sound.header.size), sound.header.next_offset());
            } else {
                let before = at;
                (at, next) = ground.next_sound(at, next).await.unwrap();
                assert!(at > before);
            }
        }
        found
    })
}

/// A name, where in the batch, and what.
type Damage = (&'static str, usize, Vec<u8>);

/// What may happen to a batch of so many bytes.
fn damages(batch: &[u8]) -> Vec<Damage> {
    let length = |by: i32| {
        let length = i32::from_be_bytes(batch[8..12].try_into().unwrap());
        (length + by).to_be_bytes().to_vec()
    };
    vec![
        ("header gone", 0, vec![0; 61]),
        ("header noise", 0, noise(61, 1)),
        ("offset", 0, noise(8, 2)),
        ("longer", 8, length(700)),
        ("much longer", 8, length(1 << 20)),
        ("shorter", 8, length(-200)),
        ("length noise", 8, noise(4, 3)),
        ("checksum", 17, noise(4, 4)),
        ("counts", 23, noise(4, 5)),
        ("first record", 61, noise(3, 6)),
        ("body", 100, noise(30, 7)),
        ("last byte", batch.len() - 2, noise(2, 8)),
    ]
}

#[test]
fn batches_in_a_users_value_are_never_taken_for_the_logs() {
    let own = BAD * EACH;
    let planted = |base: i64, count: usize| batch(base, &vec![noise(90, 77); count]);
    // At offsets of the batch itself, of those behind, of the last, and of a copy of the log's own rest.
    let rest: Vec<u8> = (1..8).flat_map(|at| planted(own + at, 1)).collect();
    let values = [
        ("own offsets", planted(own + 1, 2)),
        ("a long one", batch(own + 1, &[noise(20_000, 5)])),
        ("later offsets", planted(own + EACH, 3)),
        ("the last offsets", planted(BATCHES * EACH - 1, 1)),
        ("a backup", rest),
    ];
    for (what, value) in &values {
        for record in 0..EACH {
            let log =
                Log::new(BATCHES, |at, offset| (at == BAD && offset % EACH == record).then(|| value.clone()));
            let (start, next) = (log.starts[BAD as usize], log.starts[BAD as usize + 1]);
            for (harm, at, with) in damages(&log.bytes[start..next]) {
                let mut bad = log.clone();
                bad.damage(start + at, &with);
                let what = format!("{what} in record {record}, {harm}");
                let wanted: Vec<(u64, i64)> = (0..)
                    .zip(&log.starts)
                    .filter(|(at, _)| *at != BAD)
                    .map(|(at, start)| (*start as u64, at * EACH))
                    .collect();
                assert_eq!(walk(vec![bad.bytes.clone()], log.end(), None), wanted, "{what}");
                // As recovery sees it: nothing is known of the end, and space was taken ahead; or a batch is torn.
                let mut open = bad.bytes.clone();
                open.resize(open.len() + 100_000, 0);
                let end = End { size: open.len() as u64, next: i64::MAX };
                let ended = Some(log.end().next);
                assert_eq!(walk(vec![open.clone()], end, ended), wanted, "{what}, open");
                let torn = noise(1000, 9);
                open[bad.bytes.len()..][..torn.len()].copy_from_slice(&torn);
                assert_eq!(walk(vec![open], end, ended), wanted, "{what}, torn");
                // Two copies with different damage, of which none is whole.
                let mut other = log.clone();
                other.damage(start + at, &with);
                other.damage(start + 70, &noise(150, 10));
                let copies = vec![bad.bytes, other.bytes];
                assert_eq!(walk(copies, log.end(), None), wanted, "{what}, in two copies");
            }
        }
    }
}

/// In a wrapping that does not tell their length, as long as the header of the batch says what is its own.
#[test]
fn wrapped_batches_are_told_by_what_the_damaged_header_still_says() {
    let own = BAD * EACH;
    let wrapped = |base: i64| [noise(40, 1), batch(base, &[noise(90, 7)]), noise(40, 2)].concat();
    for (base, from) in [(own + 1, 1), (own + EACH - 1, 1), (own + EACH, 0), (BATCHES * EACH - 1, 0)] {
        let log = Log::new(BATCHES, |at, offset| (at == BAD && offset % EACH == 1).then(|| wrapped(base)));
        let (start, next) = (log.starts[BAD as usize], log.starts[BAD as usize + 1]);
        for (harm, at, with) in damages(&log.bytes[start..next]) {
            if at == 0 && from == 1 {
                // It is said in the module's head that nothing tells these.
                continue;
            }
            let mut bad = log.clone();
            bad.damage(start + at, &with);
            let found = walk(vec![bad.bytes], log.end(), None);
            assert!(found.len() as i64 == BATCHES - 1, "offset {base}, {harm}: {found:?}");
            assert!(found.iter().all(|(at, _)| log.starts.contains(&(*at as usize))));
        }
    }
}

/// As many as there may be, at offsets far ahead.
#[test]
fn a_mirror_of_another_topic_hides_nothing_of_the_log() {
    let mirrored = |at: i64| [vec![7; 9], batch(30 + at, &[noise(80, at as u64)]), vec![7; 9]].concat();
    let value = (0..MOST_OPEN as i64 - 1).flat_map(|_| mirrored(5)).collect::<Vec<u8>>();
    let log = Log::new(BATCHES, |at, offset| (at == BAD && offset % EACH == 0).then(|| value.clone()));
    let mut bad = log.clone();
    bad.damage(log.starts[BAD as usize], &[0; 61]);
    assert_eq!(walk(vec![bad.bytes], log.end(), None).len() as i64, BATCHES - 1);
}

#[test]
fn what_is_whole_between_two_that_are_damaged_is_found() {
    // Headers that are gone, bodies that are bad, in all orders; every second one, and two in a row.
    for pattern in 1..1u32 << 6 {
        for bodies in 0..1u32 << 6 {
            let log = Log::new(BATCHES, |_, _| None);
            let mut bad = log.clone();
            let hit = |at: usize| (2..8).contains(&at) && pattern >> (at - 2) & 1 == 1;
            for at in (0..log.starts.len()).filter(|at| hit(*at)) {
                if bodies >> (at - 2) & 1 == 1 {
                    bad.damage(log.starts[at] + 200, &noise(50, 3));
                } else {
                    bad.damage(log.starts[at], &noise(61, 4));
                }
            }
            let wanted: Vec<u64> =
                (0..log.starts.len()).filter(|at| !hit(*at)).map(|at| log.starts[at] as u64).collect();
            let found: Vec<u64> = walk(vec![bad.bytes], log.end(), None).iter().map(|(at, _)| *at).collect();
            assert_eq!(found, wanted, "{pattern:b} {bodies:b}");
        }
    }
}

#[test]
fn damage_all_over_costs_what_it_hits() {
    // Values that hold batches everywhere; each value's length is hit now and then.
    let number = 300;
    let planted = |offset: i64| batch(offset + 7 * EACH, &[noise(60, 5)]);
    let log = Log::new(number, |_, offset| (offset % 3 == 0).then(|| planted(offset)));
    for seed in 0..40 {
        let mut bad = log.clone();
        let places = noise(1 + seed as usize * 4, seed);
        for (nth, place) in places.iter().enumerate() {
            let at = (usize::from(*place) * 4099 + nth * 15_331) % (log.bytes.len() - 700);
            bad.damage(at, &noise(20 + usize::from(*place) * 2, seed + nth as u64));
        }
        let found = walk(vec![bad.bytes.clone()], log.end(), None);
        let ends = log.starts.iter().skip(1).copied().chain([log.bytes.len()]);
        for (number, (start, end)) in (0..).zip(log.starts.iter().zip(ends)) {
            if bad.bytes[*start..end] == log.bytes[*start..end] {
                let wanted = (*start as u64, number * EACH);
                assert!(found.contains(&wanted), "seed {seed}: batch {number} is whole, and passed over");
            }
        }
        let strange = found.iter().filter(|(at, _)| !log.starts.contains(&(*at as usize))).count();
        assert_eq!(strange, 0, "seed {seed}");
    }
}

#[test]
fn lengths_are_known_as_they_are_written() {
    for len in [64, 100, 127, 128, 300, 8191, 8192, 70_000, 1 << 30] {
        let mut zig = vec![9, 9];
        zigzag(&mut zig, len);
        assert!(ends_with_length(&zig, len as u64), "{len}");
        assert!(!ends_with_length(&zig, len as u64 + 2), "{len}");
        let mut four = BytesMut::new();
        four.put_u32(len as u32);
        assert!(ends_with_length(&four, len as u64));
        assert!(!ends_with_length(&four[..3], len as u64));
    }
    assert!(!ends_with_length(&[100], 100), "one byte is no proof");
    assert!(!ends_with_length(&[], 100));
}
