//! The model of a log store: what was asked, what was acknowledged, what was seen, and what must therefore be there.
//!
//! What it holds a store to:
//! - Every batch that is read is one that was appended, byte for byte, at the offset its producer was told (if it
//!   was told one), and only there. Offsets are contiguous.
//! - A record of an acks=all append that was acknowledged, or that a consumer saw, stays, and so does all before it.
//!   After a reopen everything that is there stays: recovery makes durable what it serves.
//! - After `kill -9` every append that was answered is there, acks=1 too, and so is all before it. One of acks=all is answered
//!   with its commit.
//! - The high watermark never goes back below what stays.
//! - No (producer, epoch, sequence) is there twice, however often it was sent. What was once lost does not come back.
//! - A topic whose creation was acknowledged is there, with its id; one whose deletion was acknowledged is not.
//!
//! Retention moves the log's start up and only up; what lies before it is out of the model's sight.

use super::seeds::tracing;
use bytes::{Buf, Bytes, BytesMut};
use kafka_protocol::records::{Compression, Record, RecordBatchEncoder, RecordEncodeOptions, TimestampType};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use uuid::Uuid;

/// A partition: its topic's id and its number.
pub type Place = (Uuid, i32);

/// An idempotent producer's stamp: producer id, epoch, base sequence.
pub type Stamp = (i64, i16, i32);

/// Bytes of a batch that the store stamps: base offset, then (after the length) the leader epoch.
const STAMPED: [std::ops::Range<usize>; 2] = [0..8, 12..16];

/// All that is known of a store.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    logs: BTreeMap<Place, Log>,
    attempts: BTreeMap<u64, Attempt>,
    topics: BTreeMap<Uuid, TopicState>,
    /// Topics asked for and not answered, by name.
    creating: BTreeMap<String, u32>,
    producer_ids: BTreeSet<i64>,
    violation: Option<String>,
}

#[derive(Debug, Clone)]
struct TopicState {
    name: String,
    partitions: u32,
    deletion: Deletion,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deletion {
    No,
    Asked,
    Done,
}

#[derive(Debug, Clone, Default)]
struct Log {
    /// Base offset → attempt, as told by an acknowledgement or seen by a reader.
    known: BTreeMap<i64, u64>,
    /// Everything below stays.
    floor: i64,
    /// Everything below was answered, in this boot or an earlier one.
    answered: i64,
    /// Everything below is there at the next reopen, if the power stays on until then.
    kept: i64,
    start: i64,
}

#[derive(Debug, Clone)]
struct Attempt {
    place: Place,
    bytes: Bytes,
    count: i64,
    all: bool,
    stamp: Option<Stamp>,
    fate: Fate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Not answered, or answered with an error: it may be in the log or not.
    Open,
    /// At this base offset.
    At(i64),
    /// Not in the log after a reopen: it must never appear.
    Lost,
}

/// The offsets a partition reports; a copy of the store's, so that the model stands alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reported {
    /// First offset held.
    pub start: i64,
    /// Records below it are visible.
    pub high_watermark: i64,
    /// Offset of the next record.
    pub end: i64,
}

impl Ledger {
    /// A new ledger, shared by the clients of a store.
    #[must_use]
    pub fn shared() -> Arc<Mutex<Self>> {
        Arc::default()
    }

    /// The first thing the store did wrong.
    #[must_use]
    pub fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    /// Notes that the store did something wrong.
    pub fn accuse(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    fn demand(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.accuse(what());
        }
    }

    /// A topic of that name is being made.
    pub fn topic_asked(&mut self, name: &str, partitions: u32) {
        self.creating.insert(name.to_owned(), partitions);
    }

    /// It was made.
    pub fn topic_made(&mut self, name: &str, id: Uuid, partitions: u32) {
        self.creating.remove(name);
        let known = self.topics.contains_key(&id);
        self.demand(!known && !id.is_nil(), || {
            format!("topic {name} got the id {id}, which was used before")
        });
        let state = TopicState { name: name.to_owned(), partitions, deletion: Deletion::No };
        self.topics.insert(id, state);
    }

    /// A topic is being deleted.
    pub fn deletion_asked(&mut self, id: Uuid) {
        if let Some(topic) = self.topics.get_mut(&id) {
            topic.deletion = Deletion::Asked;
        }
    }

    /// It was deleted.
    pub fn deletion_done(&mut self, id: Uuid) {
        if let Some(topic) = self.topics.get_mut(&id) {
            topic.deletion = Deletion::Done;
        }
    }

    /// A producer id was given out.
    pub fn producer_id(&mut self, id: i64) {
        let fresh = self.producer_ids.insert(id);
        self.demand(fresh && id >= 0, || format!("producer id {id} was given out twice"));
    }

    /// An append is about to be sent: the batch to send, and its number here. `size` is that of a record's value.
    pub fn append_asked(
        &mut self,
        place: Place,
        count: u32,
        size: usize,
        stamp: Option<Stamp>,
        all: bool,
        now: i64,
    ) -> (u64, Bytes) {
        let id = self.attempts.len() as u64 + 1;
        let bytes = batch(id, count, size, stamp, now);
        let attempt =
            Attempt { place, bytes: bytes.clone(), count: i64::from(count), all, stamp, fate: Fate::Open };
        self.attempts.insert(id, attempt);
        (id, bytes)
    }

    /// The producer is about to send a batch again, after an error or a reopen: the same bytes.
    pub fn sent_again(&mut self, id: u64) -> Bytes {
        let Some(attempt) = self.attempts.get_mut(&id) else { return Bytes::new() };
        if attempt.fate == Fate::Lost {
            attempt.fate = Fate::Open;
        }
        attempt.bytes.clone()
    }

    /// The store said where the batch went.
    pub fn appended(&mut self, id: u64, base: i64) {
        say(|| {
            format!(
                "batch {id} acknowledged at {base}: {:?}",
                self.attempts.get(&id).map(|a| (a.place, a.count, a.all, a.stamp))
            )
        });
        self.place(id, base, "acknowledged");
        let Some(attempt) = self.attempts.get(&id) else { return };
        if !attempt.all {
            let end = base + attempt.count;
            let log = self.logs.entry(attempt.place).or_default();
            log.answered = log.answered.max(end);
        }
    }

    /// The store said that it is on stable storage, at an offset it told before.
    pub fn committed(&mut self, id: u64) {
        say(|| format!("batch {id} committed"));
        let Some(Attempt { fate: Fate::At(base), place, count, .. }) = self.attempts.get(&id) else { return };
        let log = self.logs.entry(*place).or_default();
        log.floor = log.floor.max(base + count);
        log.answered = log.answered.max(log.floor);
    }

    /// Notes where an attempt is, and that nothing else is there.
    fn place(&mut self, id: u64, base: i64, how: &str) {
        let Some(attempt) = self.attempts.get_mut(&id) else {
            return self.accuse(format!("a batch at {base} that nobody sent ({id})"));
        };
        let (place, end) = (attempt.place, base + attempt.count);
        let before = std::mem::replace(&mut attempt.fate, Fate::At(base));
        let log = self.logs.entry(place).or_default();
        match before {
            Fate::At(other) if other != base => {
                return self.accuse(format!("batch {id} {how} at {base}, it was at {other} before"));
            }
            Fate::At(_) => return,
            Fate::Lost => {
                return self.accuse(format!("batch {id} {how} at {base}, after it had been lost"));
            }
            Fate::Open => {}
        }
        let clash = log.known.range(..end).next_back().map(|(at, other)| (*at, *other));
        log.known.insert(base, id);
        if let Some((at, other)) = clash {
            let other_end = at + self.attempts.get(&other).map_or(0, |a| a.count);
            self.demand(other_end <= base, || {
                format!("batch {id} {how} at {base}..{end}, where batch {other} is ({at}..{other_end})")
            });
        }
        let stamp = self.attempts.get(&id).and_then(|a| a.stamp);
        let twin = self.attempts.iter().find(|(other, a)| {
            **other != id
                && a.stamp.is_some()
                && a.stamp == stamp
                && a.place == place
                && matches!(a.fate, Fate::At(_))
        });
        if let Some((other, _)) = twin {
            let what = format!("{stamp:?} is in the log twice: batches {other} and {id}");
            self.accuse(what);
        }
    }

    /// A read answered with `bytes`, asked from `from`. `consumer`: it kept to the high watermark, and the reader
    /// may act on what it saw.
    pub fn read(&mut self, place: Place, from: i64, bytes: &[u8], consumer: bool) {
        let mut rest = bytes;
        let mut next = None;
        while !rest.is_empty() {
            let Some((base, size, id)) = look(rest) else {
                return self.accuse(format!("{place:?}: bytes that are no batch after {next:?}"));
            };
            let Some(attempt) = self.attempts.get(&id) else {
                return self.accuse(format!("{place:?}: a batch at {base} that nobody sent ({id})"));
            };
            let (count, all, home) = (attempt.count, attempt.all, attempt.place);
            let same = same_but_for_stamps(&attempt.bytes, &rest[..size]);
            self.demand(same, || format!("{place:?}: batch {id} at {base} is not what was sent"));
            self.demand(home == place, || format!("batch {id} of {home:?} is in {place:?}"));
            match next {
                None => self.demand((base..base + count).contains(&from), || {
                    format!("{place:?}: a read from {from} begins with {base}..{}", base + count)
                }),
                Some(next) => {
                    self.demand(base == next, || format!("{place:?}: {base} follows, {next} should"));
                }
            }
            self.place(id, base, "seen");
            if consumer && all {
                let log = self.logs.entry(place).or_default();
                log.floor = log.floor.max(base + count);
            }
            next = Some(base + count);
            rest = &rest[size..];
            if self.violation.is_some() {
                return;
            }
        }
    }

    /// What a partition says of itself, at any time.
    pub fn offsets(&mut self, place: Place, now: Reported) {
        let log = self.logs.entry(place).or_default().clone();
        let ordered =
            log.start <= now.start && now.start <= now.high_watermark && now.high_watermark <= now.end;
        self.demand(ordered, || {
            format!("{place:?}: offsets {now:?} out of order, the start was {}", log.start)
        });
        self.demand(now.high_watermark >= log.floor, || {
            format!("{place:?}: the high watermark is {}, {} was durable", now.high_watermark, log.floor)
        });
        self.logs.entry(place).or_default().start = now.start;
    }

    /// The power went: what was only answered may be gone.
    pub fn power_cut(&mut self) {
        for log in self.logs.values_mut() {
            log.answered = log.floor;
            log.kept = 0;
            // Where it starts is only a promise once it was read back.
            log.start = 0;
        }
    }

    /// The process was killed: what was answered is there.
    pub fn process_killed(&mut self) {
        for log in self.logs.values_mut() {
            // Only the machine's memory keeps it: a power cut before the next reopen may take it after all.
            log.kept = log.answered;
            log.start = 0;
        }
    }

    /// The store is open again, with these topics: name, id, partitions.
    pub fn reopened(&mut self, found: &[(String, Uuid, u32)]) {
        for (name, id, partitions) in found {
            if let Some(topic) = self.topics.get_mut(id) {
                let same = topic.name == *name && topic.partitions == *partitions;
                let what = format!("after a reopen {name} ({id}) has {partitions} partitions: {topic:?}");
                let holds = same && topic.deletion != Deletion::Done;
                // It was not deleted after all.
                topic.deletion = Deletion::No;
                self.demand(holds, || what);
            } else {
                let asked = self.creating.get(name) == Some(partitions);
                self.demand(asked, || format!("after a reopen there is {name} ({id}), which nobody made"));
                let (name, partitions) = (name.clone(), *partitions);
                self.topics.insert(*id, TopicState { name, partitions, deletion: Deletion::No });
            }
        }
        self.creating.clear();
        let missing: Vec<(Uuid, String, Deletion)> = self
            .topics
            .iter()
            .filter(|(id, _)| !found.iter().any(|(_, there, _)| there == *id))
            .map(|(id, topic)| (*id, topic.name.clone(), topic.deletion))
            .collect();
        for (id, name, deletion) in missing {
            self.demand(deletion != Deletion::No, || format!("after a reopen topic {name} ({id}) is gone"));
            self.deletion_done(id);
        }
    }

    /// After a reopen a partition was read from start to end (through [`Ledger::read`]): settles what is lost, and
    /// that what is there stays.
    pub fn settled(&mut self, place: Place, now: Reported) {
        say(|| format!("after a reopen {place:?} has {now:?}"));
        self.offsets(place, now);
        let log = self.logs.entry(place).or_default();
        let floor = log.floor.max(log.kept);
        log.kept = 0;
        log.floor = now.end;
        log.answered = now.end;
        let gone: Vec<i64> = log.known.range(now.end..).map(|(base, _)| *base).collect();
        for base in gone {
            log.known.remove(&base);
        }
        let kept: BTreeSet<u64> = log.known.values().copied().collect();
        self.demand(now.end >= floor, || format!("{place:?} ends at {}, {floor} was durable", now.end));
        for (id, attempt) in self.attempts.iter_mut().filter(|(_, a)| a.place == place) {
            if !kept.contains(id) {
                attempt.fate = Fate::Lost;
            }
        }
    }

    /// Whether an attempt is known to be in the log.
    #[must_use]
    pub fn is_placed(&self, id: u64) -> bool {
        self.attempts.get(&id).is_some_and(|attempt| matches!(attempt.fate, Fate::At(_)))
    }
}

/// Part of the running account.
fn say(what: impl FnOnce() -> String) {
    if tracing() {
        eprintln!("ledger: {}", what());
    }
}

/// A batch of `count` records whose values begin with the attempt's number.
fn batch(id: u64, count: u32, size: usize, stamp: Option<Stamp>, now: i64) -> Bytes {
    let mut value = vec![id as u8; size.max(8)];
    value[..8].copy_from_slice(&id.to_be_bytes());
    let value = Bytes::from(value);
    let (producer_id, producer_epoch, sequence) = stamp.unwrap_or((-1, -1, 0));
    let record = |n: u32| Record {
        transactional: false,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: -1,
        producer_id,
        producer_epoch,
        timestamp_type: TimestampType::Creation,
        offset: i64::from(n),
        sequence: sequence + n as i32,
        timestamp: now,
        key: None,
        value: Some(value.clone()),
        #[allow(
            clippy::default_trait_access,
            reason = "its type belongs to a crate that is not ours to name"
        )]
        headers: Default::default(),
    };
    let records: Vec<Record> = (0..count).map(record).collect();
    let mut out = BytesMut::new();
    let options = RecordEncodeOptions { version: 2, compression: Compression::None };
    RecordBatchEncoder::encode(&mut out, &records, &options).expect("plain records encode");
    if stamp.is_none() {
        // The encoder makes one batch only of records with consecutive sequence numbers; clients send -1.
        out[53..57].copy_from_slice(&(-1i32).to_be_bytes());
        let crc = crc32c::crc32c(&out[21..]);
        out[17..21].copy_from_slice(&crc.to_be_bytes());
    }
    out.freeze()
}

/// Base offset, size and attempt of the batch that `bytes` start with.
fn look(bytes: &[u8]) -> Option<(i64, usize, u64)> {
    /// Offset of the first record, after the batch header.
    const RECORDS: usize = 61;
    let mut head = bytes.get(..12)?;
    let base = head.get_i64();
    let size = usize::try_from(head.get_i32()).ok()? + 12;
    if bytes.len() < size || size < RECORDS {
        return None;
    }
    // The value of the first record is the last thing in it but for an empty list of headers; its number is found by
    // decoding, once.
    let mut copy = Bytes::copy_from_slice(&bytes[..size]);
    let set = kafka_protocol::records::RecordBatchDecoder::decode(&mut copy).ok()?;
    let value = set.records.first()?.value.clone()?;
    Some((base, size, u64::from_be_bytes(value.get(..8)?.try_into().ok()?)))
}

fn same_but_for_stamps(sent: &[u8], stored: &[u8]) -> bool {
    sent.len() == stored.len()
        && sent
            .iter()
            .zip(stored)
            .enumerate()
            .all(|(at, (a, b))| a == b || STAMPED.iter().any(|r| r.contains(&at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Place = (Uuid::from_u128(7), 0);

    fn at(base: i64, batch: &Bytes) -> Vec<u8> {
        let mut stored = batch.to_vec();
        stored[..8].copy_from_slice(&base.to_be_bytes());
        stored
    }

    fn reported(start: i64, end: i64) -> Reported {
        Reported { start, high_watermark: end, end }
    }

    /// A log of three appends: acks=all at 0..2, acks=1 at 2..5, and one never answered.
    fn three() -> (Ledger, [(u64, Bytes); 3]) {
        let mut ledger = Ledger::default();
        let first = ledger.append_asked(HERE, 2, 20, None, true, 0);
        ledger.appended(first.0, 0);
        ledger.committed(first.0);
        let second = ledger.append_asked(HERE, 3, 20, Some((5, 0, 0)), false, 0);
        ledger.appended(second.0, 2);
        let third = ledger.append_asked(HERE, 1, 20, Some((5, 0, 3)), false, 0);
        (ledger, [first, second, third])
    }

    #[test]
    fn what_may_be_there_after_a_power_cut_is_accepted() {
        let (ledger, [first, second, third]) = three();
        let parts = [at(0, &first.1), at(2, &second.1), at(5, &third.1)];
        for (kept, end) in [(1, 2), (2, 5), (3, 6)] {
            let mut ledger = ledger.clone();
            ledger.power_cut();
            ledger.read(HERE, 0, &parts[..kept].concat(), true);
            ledger.settled(HERE, reported(0, end));
            assert_eq!(ledger.violation(), None);
            ledger.process_killed();
            ledger.read(HERE, 1, &parts[..kept].concat(), true);
            ledger.settled(HERE, reported(0, end));
            assert_eq!(ledger.violation(), None, "what was read after the first reopen stays");
        }
    }

    #[test]
    fn what_waits_for_its_commit_goes_with_the_process_unless_something_behind_it_was_answered() {
        let (mut ledger, [_, _, third]) = three();
        ledger.appended(third.0, 5);
        let waits = ledger.append_asked(HERE, 1, 20, None, true, 0);
        ledger.appended(waits.0, 6);
        let mut without = ledger.clone();
        without.process_killed();
        without.settled(HERE, reported(0, 6));
        assert_eq!(without.violation(), None);
        let behind = ledger.append_asked(HERE, 1, 20, None, false, 0);
        ledger.appended(behind.0, 7);
        ledger.process_killed();
        ledger.settled(HERE, reported(0, 6));
        assert!(ledger.violation().is_some_and(|violation| violation.contains("8 was durable")));
    }

    #[test]
    fn every_wrong_is_named() {
        let (ledger, [first, second, third]) = three();
        let accused = |what: &str, wrong: &dyn Fn(&mut Ledger)| {
            let mut ledger = ledger.clone();
            wrong(&mut ledger);
            let violation = ledger.violation().unwrap_or_else(|| panic!("nothing said of: {what}"));
            assert!(violation.contains(what), "{violation:?} does not say {what:?}");
        };
        accused("2 was durable", &|l| {
            l.power_cut();
            l.settled(HERE, reported(0, 0));
        });
        accused("5 was durable", &|l| {
            l.process_killed();
            l.read(HERE, 0, &at(0, &first.1), true);
            l.settled(HERE, reported(0, 2));
        });
        accused("3 follows, 2 should", &|l| {
            l.read(HERE, 0, &[at(0, &first.1), at(3, &second.1)].concat(), true);
        });
        accused("it was at 2 before", &|l| l.read(HERE, 1, &at(1, &second.1), true));
        accused("where batch", &|l| l.appended(third.0, 4));
        accused("is not what was sent", &|l| {
            let mut bytes = at(0, &first.1);
            // The largest timestamp: the records still name their batch.
            bytes[42] ^= 1;
            let crc = crc32c::crc32c(&bytes[21..]);
            bytes[17..21].copy_from_slice(&crc.to_be_bytes());
            l.read(HERE, 0, &bytes, true);
        });
        accused("no batch", &|l| l.read(HERE, 0, &at(0, &first.1)[..40], true));
        accused("begins with 2..5", &|l| l.read(HERE, 0, &at(2, &second.1), true));
        accused("after it had been lost", &|l| {
            l.power_cut();
            l.read(HERE, 0, &at(0, &first.1), true);
            l.settled(HERE, reported(0, 2));
            l.read(HERE, 2, &at(2, &second.1), true);
        });
        accused("in the log twice", &|l| {
            let again = l.append_asked(HERE, 3, 20, Some((5, 0, 0)), true, 0);
            l.appended(again.0, 5);
        });
        accused("out of order", &|l| {
            l.offsets(HERE, Reported { start: 0, high_watermark: 9, end: 5 });
        });
        accused("the high watermark is 1", &|l| {
            l.offsets(HERE, Reported { start: 0, high_watermark: 1, end: 5 });
        });
        accused("given out twice", &|l| {
            l.producer_id(3);
            l.producer_id(3);
        });
        let topic = Uuid::from_u128(9);
        accused("topic t", &|l| {
            l.topic_made("t", topic, 1);
            l.reopened(&[]);
        });
        accused("after a reopen t", &|l| {
            l.topic_made("t", topic, 1);
            l.deletion_done(topic);
            l.reopened(&[("t".to_owned(), topic, 1)]);
        });
        accused("which nobody made", &|l| l.reopened(&[("t".to_owned(), topic, 1)]));
    }
}
