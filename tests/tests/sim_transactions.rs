//! Transactions on simulated disks: producers that open, commit and abort them, consumers at `read_committed`, and the
//! power cut anywhere.
//!
//! The oracle is double. The log itself: read whole after every start, it says which transactions are open and which were
//! aborted, by a search that shares nothing with the store's own bookkeeping. And what the clients asked for: a
//! consumer may see records of a transaction only if its producer asked to commit it, and may be told to skip them only
//! if it asked to abort it.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use kafka_protocol::records::RecordBatchDecoder;
use logstore::batch::{Header, Marker, Outcome};
use logstore::transactions::Aborted;
use logstore::{Appended, Error, Home, Partition, ReadLimit, Store, StoreOptions, TopicConfig};
use parking_lot::Mutex;
use raid::device::{Device, Durability};
use raid::runtime::Runtime;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tests::broker::batch_of;
use tests::sim::bugs::{Bug, Buggy};
use tests::sim::{CutStyle, Rng, Sim, SimDisk, SimDiskOptions, at_every_boundary, for_seeds};

const SIZE: u64 = 16 << 20;
const PRODUCERS: i64 = 3;

/// What the clients asked for and were told; it outlives every boot.
#[derive(Default)]
struct Asked {
    /// Per batch number: the transaction it belongs to; none for plain ones.
    batches: BTreeMap<u64, Option<u64>>,
    /// Per transaction: how its producer wants it to end.
    outcomes: BTreeMap<u64, Option<Outcome>>,
    /// Per producer: the transaction it is in.
    current: BTreeMap<i64, u64>,
    epochs: BTreeMap<i64, i16>,
    /// What was acknowledged, or read after a start: base offset → batch number, 0 for a marker.
    known: BTreeMap<i64, u64>,
    /// Everything below was acknowledged as durable, or read after a start.
    floor: i64,
    /// Everything below was acknowledged.
    answered: i64,
    /// Everything below is there at the next start, if the power stays on until then.
    kept: i64,
    violation: Option<String>,
}

impl Asked {
    fn demand(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.violation.get_or_insert_with(what);
        }
    }

    fn acknowledged(&mut self, appended: &Appended, id: u64, durable: bool) {
        let end = appended.last_offset + 1;
        let before = self.known.insert(appended.base_offset, id);
        self.demand(before.is_none_or(|before| before == id), || {
            format!("{} was given to {before:?} and to {id}", appended.base_offset)
        });
        if durable {
            self.floor = self.floor.max(end);
        }
        if durable || appended.commit.is_none() {
            // Else the answer is its commit.
            self.answered = self.answered.max(end);
        }
    }

    /// The process was killed: what was answered is there, until the power goes.
    fn process_killed(&mut self) {
        self.kept = self.answered;
    }

    /// The power went: what was only answered may be gone, and no kill later on can promise it again.
    fn power_cut(&mut self) {
        self.answered = self.floor;
        self.kept = 0;
    }

    /// After a start the log was read whole: this is what is there, base offset → batch number, and it stays.
    fn reopened(&mut self, there: BTreeMap<i64, u64>, log_end: i64) {
        let floor = self.floor.max(self.kept);
        assert!(log_end >= floor, "the log ends at {log_end}, {floor} was durable");
        for (at, id) in self.known.range(..floor) {
            assert_eq!(there.get(at), Some(id), "what was acknowledged at {at}");
        }
        (self.known, self.floor, self.answered) = (there, log_end, log_end);
        self.kept = 0;
    }

    /// A consumer at `read_committed` was given these batches and this list: does what a Kafka client does with them.
    fn consumed(&mut self, bytes: &Bytes, aborted: &[Aborted]) {
        let mut list = aborted.to_vec();
        list.sort_by_key(|aborted| aborted.first_offset);
        let mut list = list.into_iter().peekable();
        let mut skipping = BTreeSet::new();
        for (header, batch) in batches(bytes) {
            while let Some(begun) = list.next_if(|aborted| aborted.first_offset <= header.last_offset()) {
                skipping.insert(begun.producer_id);
            }
            if header.is_control() {
                let marker = Marker::read(&header, &batch).unwrap();
                if marker.outcome == Outcome::Abort {
                    skipping.remove(&header.producer_id);
                }
                continue;
            }
            let id = number(&batch);
            let Some(Some(txn)) = self.batches.get(&id).copied() else { continue };
            let skipped = header.is_transactional() && skipping.contains(&header.producer_id);
            let outcome = self.outcomes.get(&txn).copied().flatten();
            let right = outcome == Some(if skipped { Outcome::Abort } else { Outcome::Commit });
            self.demand(right, || {
                let what = if skipped { "was skipped" } else { "was seen" };
                format!(
                    "batch {id} of transaction {txn} at {} {what}, asked: {outcome:?}",
                    header.base_offset
                )
            });
        }
    }
}

fn batches(bytes: &Bytes) -> Vec<(Header, Bytes)> {
    let (mut rest, mut found) = (bytes.clone(), Vec::new());
    while !rest.is_empty() {
        let header = Header::parse(&rest).unwrap();
        found.push((header, rest.split_to(header.size as usize)));
    }
    found
}

/// The number in a batch's first record.
fn number(batch: &Bytes) -> u64 {
    let set = RecordBatchDecoder::decode(&mut batch.clone()).unwrap();
    let value = set.records[0].value.clone().unwrap();
    u64::from_be_bytes(value[..8].try_into().unwrap())
}

/// What a log says of its transactions, found by looking from each batch for the marker that ends it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    open: BTreeMap<i64, i64>,
    aborted: Vec<(i64, i64, i64)>,
}

fn said(log: &[(Header, Bytes)]) -> Said {
    let mut said = Said::default();
    let mut ended: BTreeMap<i64, i64> = BTreeMap::new();
    for (at, (header, _)) in log.iter().enumerate() {
        let id = header.producer_id;
        let inside = ended.get(&id).is_some_and(|&marker| marker > header.base_offset);
        if !header.is_transactional() || header.is_control() || inside || said.open.contains_key(&id) {
            continue;
        }
        let ends = log[at..].iter().find(|(later, _)| later.is_control() && later.producer_id == id);
        match ends {
            None => drop(said.open.insert(id, header.base_offset)),
            Some((marker, bytes)) => {
                ended.insert(id, marker.base_offset);
                if Marker::read(marker, bytes).unwrap().outcome == Outcome::Abort {
                    said.aborted.push((id, header.base_offset, marker.base_offset));
                }
            }
        }
    }
    said.aborted.sort_by_key(|&(_, _, marker)| marker);
    said
}

/// Whether an error is the store's fault: on good disks it has no reason for these.
fn is_fault(error: &Error) -> bool {
    !matches!(error, Error::Closed | Error::Interrupted)
}

struct World {
    sim: Sim,
    disk: Arc<SimDisk>,
    asked: Arc<Mutex<Asked>>,
    bug: Option<Bug>,
}

impl World {
    fn new(seed: u64, options: SimDiskOptions) -> Self {
        let sim = Sim::new(seed);
        let disk = sim.disk("d", SIZE, options);
        Self { sim, disk, asked: Arc::default(), bug: None }
    }

    async fn open(&self) -> (Arc<Store>, Arc<Partition>) {
        let device: Arc<dyn Device> = match &self.bug {
            Some(bug) => Buggy::plant(self.sim.plug(&self.disk), bug.clone(), &self.sim.runtime()),
            None => self.sim.plug(&self.disk),
        };
        let home = Home::Volume(device);
        let store = Store::open(home, StoreOptions::default(), self.sim.runtime()).await.unwrap();
        if store.topic("t").is_none() {
            let own = [("segment.bytes", "3000"), ("index.interval.bytes", "300")];
            let config = TopicConfig::kafka_defaults().with(own).unwrap();
            store.create_topic("t", 1, config).await.unwrap();
        }
        let topic = store.topic("t").unwrap();
        let partition = Arc::clone(&topic.partitions()[0]);
        self.examine(&partition).await;
        (store, partition)
    }

    /// Holds everything that the store says after a start against the log, and the log against what was acknowledged.
    async fn examine(&self, partition: &Arc<Partition>) {
        let offsets = partition.offsets();
        let mut log = Vec::new();
        while log.last().map_or(0, |(header, _): &(Header, Bytes)| header.next_offset()) < offsets.log_end {
            let at = log.last().map_or(0, |(header, _): &(Header, Bytes)| header.next_offset());
            let slice = partition.read(at, 10_000, ReadLimit::LogEnd, true).await.unwrap();
            log.extend(batches(&slice.copy().await.unwrap()));
        }
        let there = log
            .iter()
            .map(|(header, bytes)| (header.base_offset, if header.is_control() { 0 } else { number(bytes) }));
        self.asked.lock().reopened(there.collect(), offsets.log_end);
        let said = said(&log);
        let stable = said.open.values().min().copied().unwrap_or(offsets.log_end);
        assert_eq!(offsets.last_stable, stable, "of a log that says {said:?}");
        for from in (0..offsets.log_end).step_by(9) {
            for upper in [from + 3, from + 30, offsets.log_end] {
                let found = partition.aborted(from, upper).await.unwrap();
                let found: Vec<_> =
                    found.iter().map(|a| (a.producer_id, a.first_offset, a.last_offset)).collect();
                let overlaps = |&&(_, first, last): &&(i64, i64, i64)| last >= from && first < upper;
                let expected: Vec<_> = said.aborted.iter().filter(overlaps).copied().collect();
                assert_eq!(found, expected, "{from}..{upper}");
            }
        }
        let states = partition.producers().await.unwrap();
        let open = states.iter().filter_map(|state| state.open_from.map(|first| (state.id, first)));
        assert_eq!(open.collect::<BTreeMap<_, _>>(), said.open);
        self.repeat(partition, &log).await;
        assert_eq!(partition.offsets().log_end, offsets.log_end, "a repetition was appended");
    }

    /// Every producer sends its last batches again, as if the answers had been lost.
    async fn repeat(&self, partition: &Arc<Partition>, log: &[(Header, Bytes)]) {
        for id in 0..PRODUCERS {
            let own: Vec<_> = log.iter().rev().filter(|(header, _)| header.producer_id == id).collect();
            let Some((newest, _)) = own.first() else { continue };
            let sent = own
                .iter()
                .filter(|(header, _)| !header.is_control() && header.producer_epoch == newest.producer_epoch);
            for (n, (header, bytes)) in sent.take(5).enumerate() {
                match partition.append(bytes.clone(), Durability::Cached).await {
                    Ok(appended) => assert_eq!(appended.base_offset, header.base_offset),
                    // A snapshot keeps the last batch of each producer.
                    Err(Error::OutOfOrderSequence { .. }) if n > 0 => {}
                    Err(error) => panic!("the last batch but {n} of producer {id}: {error}"),
                }
            }
        }
    }

    fn note_end(&self, style: CutStyle) {
        let mut asked = self.asked.lock();
        match style {
            CutStyle::ProcessKilled => asked.process_killed(),
            _ => asked.power_cut(),
        }
        if let Some(violation) = &asked.violation {
            panic!("{violation}");
        }
    }
}

#[derive(Clone)]
struct Client {
    partition: Arc<Partition>,
    asked: Arc<Mutex<Asked>>,
    runtime: Arc<dyn Runtime>,
}

impl Client {
    /// Notes what came of an append; whether it was taken.
    async fn noted(&self, outcome: logstore::Result<Appended>, id: u64) -> bool {
        match outcome {
            Ok(mut appended) => {
                self.asked.lock().acknowledged(&appended, id, false);
                if let Some(commit) = appended.commit.take() {
                    match commit.await {
                        Ok(()) => self.asked.lock().acknowledged(&appended, id, true),
                        Err(error) => self.complain(&error),
                    }
                }
                true
            }
            Err(error) => {
                self.complain(&error);
                false
            }
        }
    }

    fn complain(&self, error: &Error) {
        self.asked.lock().demand(!is_fault(error), || format!("refused without a reason: {error}"));
    }

    async fn send(&self, producer: (i64, i16, i32), txn: Option<u64>, records: usize, all: bool) -> bool {
        let id = {
            let mut asked = self.asked.lock();
            let id = asked.batches.len() as u64 + 1;
            asked.batches.insert(id, txn);
            id
        };
        let mut value = id.to_be_bytes().to_vec();
        value.resize(150, 7);
        let now = self.runtime.wall_clock().as_millis() as i64;
        let values = vec![&value[..]; records];
        let mut bytes = batch_of(&values, now, producer.0, producer.1, producer.2).to_vec();
        if txn.is_some() {
            bytes[22] |= 0x10;
            let crc = crc32c::crc32c(&bytes[21..]);
            bytes[17..21].copy_from_slice(&crc.to_be_bytes());
        }
        let durability = if all { Durability::Stable } else { Durability::Cached };
        let outcome = self.partition.append(bytes.into(), durability).await;
        self.noted(outcome, id).await
    }

    async fn end(&self, id: i64, epoch: i16, outcome: Outcome, all: bool) -> bool {
        let durability = if all { Durability::Stable } else { Durability::Cached };
        let appended = self.partition.append_marker(id, epoch, 1, outcome, durability).await;
        self.noted(appended, 0).await
    }

    /// What a coordinator does when a producer comes anew: the transaction left open ends as it was to end, or is
    /// aborted, and the epoch rises.
    async fn begin(&self, id: i64) -> Option<i16> {
        let (epoch, outcome) = {
            let mut asked = self.asked.lock();
            let epoch = asked.epochs.entry(id).or_insert(-1);
            *epoch += 1;
            let epoch = *epoch;
            let left = asked.current.remove(&id);
            let outcome = left.map_or(Outcome::Abort, |txn| {
                *asked.outcomes.entry(txn).or_default().get_or_insert(Outcome::Abort)
            });
            // Until the marker is acknowledged it is still the one that is open.
            if let Some(txn) = left {
                asked.current.insert(id, txn);
            }
            (epoch, outcome)
        };
        let taken = self.end(id, epoch, outcome, true).await;
        taken.then(|| {
            self.asked.lock().current.remove(&id);
            epoch
        })
    }

    async fn transact(&self, rng: &mut Rng, id: i64, count: u64) {
        let Some(epoch) = self.begin(id).await else { return };
        let mut sequence = 0;
        for _ in 0..count {
            let txn = {
                let mut asked = self.asked.lock();
                let txn = asked.outcomes.len() as u64 + 1;
                asked.outcomes.insert(txn, None);
                asked.current.insert(id, txn);
                txn
            };
            for _ in 0..rng.within(0..5) {
                self.runtime.sleep(Duration::from_micros(rng.below(4000))).await;
                let records = rng.within(1..4) as usize;
                let taken = self.send((id, epoch, sequence), Some(txn), records, rng.one_in(1, 3)).await;
                if !taken {
                    return;
                }
                sequence += records as i32;
            }
            let outcome = if rng.one_in(1, 2) { Outcome::Abort } else { Outcome::Commit };
            self.asked.lock().outcomes.insert(txn, Some(outcome));
            // Durable before the next one begins: a coordinator waits for that.
            if !self.end(id, epoch, outcome, true).await {
                return;
            }
            self.runtime.sleep(Duration::from_micros(rng.below(3000))).await;
        }
    }

    async fn plain(&self, rng: &mut Rng, count: u64) {
        for _ in 0..count {
            self.runtime.sleep(Duration::from_micros(rng.below(6000))).await;
            self.send((-1, -1, -1), None, 1, rng.one_in(1, 3)).await;
        }
    }

    async fn consume(&self, rng: &mut Rng, count: u64) {
        for _ in 0..count {
            self.runtime.sleep(Duration::from_micros(rng.below(5000))).await;
            let stable = self.partition.offsets().last_stable;
            if stable > 0 {
                self.consume_from(rng.below(stable as u64) as i64, rng.within(1..3000) as u32).await;
            }
        }
    }

    /// The offset behind what was read.
    async fn consume_from(&self, from: i64, most: u32) -> i64 {
        let outcome = match self.partition.read_committed(from, most, true).await {
            Ok((slice, aborted)) => slice.copy().await.map(|bytes| (bytes, aborted)),
            Err(error) => Err(error),
        };
        match outcome {
            Ok((bytes, aborted)) => {
                self.asked.lock().consumed(&bytes, &aborted);
                batches(&bytes).last().map_or(from, |(header, _)| header.next_offset())
            }
            Err(error) => {
                self.complain(&error);
                from
            }
        }
    }
}

impl World {
    fn client(&self, partition: &Arc<Partition>) -> Client {
        let (partition, asked) = (Arc::clone(partition), Arc::clone(&self.asked));
        Client { partition, asked, runtime: self.sim.runtime() }
    }

    fn boot(&self, rng: &mut Rng) {
        let styles = [CutStyle::Chance, CutStyle::Chance, CutStyle::AllLost, CutStyle::ProcessKilled];
        let style = *rng.pick(&styles);
        self.sim.set_cut_style(style);
        self.sim.cut_after(rng.one_in(3, 4).then(|| rng.within(1..700)));
        let close = rng.one_in(1, 3);
        let run = async {
            let (store, partition) = self.open().await;
            let client = self.client(&partition);
            let mut ends = Vec::new();
            for role in 0..PRODUCERS + 2 {
                let (client, mut rng) = (client.clone(), rng.fork());
                let (tell, end) = tokio::sync::oneshot::channel::<()>();
                self.sim.runtime().spawn(Box::pin(async move {
                    match role {
                        0 => client.plain(&mut rng, 10).await,
                        1 => client.consume(&mut rng, 20).await,
                        _ => client.transact(&mut rng, role - 2, 8).await,
                    }
                    drop(tell);
                }));
                ends.push(end);
            }
            futures_util::future::join_all(ends).await;
            if close {
                store.close().await.unwrap();
            }
        };
        if self.sim.block_on(run).is_ok() {
            self.sim.cut_now();
        }
        self.note_end(style);
    }

    /// Opens once more, ends what is open as it was to end, and reads all that is committed.
    fn finale(&self) {
        self.sim.cut_after(None);
        self.sim.set_cut_style(CutStyle::AllLost);
        let run = async {
            let (_store, partition) = self.open().await;
            let client = self.client(&partition);
            for id in 0..PRODUCERS {
                client.begin(id).await.unwrap();
            }
            let offsets = partition.offsets();
            assert_eq!(offsets.last_stable, offsets.log_end, "nothing is open");
            let mut at = 0;
            while at < offsets.log_end {
                let next = client.consume_from(at, 2000).await;
                assert!(next > at, "nothing at {at}");
                at = next;
            }
        };
        self.sim.block_on(run).unwrap();
        self.sim.cut_now();
        self.note_end(CutStyle::AllLost);
        self.sim.block_on(self.open()).unwrap();
        self.sim.cut_now();
    }
}

fn run(seed: u64, options: SimDiskOptions, bug: Option<Bug>) {
    let world = World { bug, ..World::new(seed, options) };
    let mut rng = world.sim.fork_rng();
    for _ in 0..rng.within(1..5) {
        world.boot(&mut rng);
    }
    world.finale();
}

#[test]
fn on_a_disk() {
    for_seeds("sim_transactions::on_a_disk", 120, |seed| run(seed, SimDiskOptions::default(), None));
}

#[test]
fn on_a_disk_that_tears_sectors() {
    let options = SimDiskOptions { unreadable: 0, ..SimDiskOptions::harsh() };
    for_seeds("sim_transactions::on_a_disk_that_tears_sectors", 80, |seed| {
        // What is done at once has no journal.
        let instant = if seed % 2 == 0 { options.instant } else { 0 };
        run(seed, SimDiskOptions { instant, ..options.clone() }, None);
    });
}

/// Transactions that overlap and span segments, and a stop in order; the power goes at every I/O boundary of it.
#[test]
fn the_power_goes_at_every_boundary_of_a_few_transactions() {
    let live = |world: &World| {
        let life = async {
            let (store, partition) = world.open().await;
            let client = world.client(&partition);
            let mut next = BTreeMap::new();
            for id in 0..PRODUCERS {
                next.insert(id, (client.begin(id).await.unwrap(), 0));
            }
            for txn in 1..9u64 {
                let id = (txn as i64 * 2) % PRODUCERS;
                let (epoch, sequence) = next[&id];
                {
                    let mut asked = world.asked.lock();
                    asked.outcomes.insert(txn, None);
                    asked.current.insert(id, txn);
                }
                for n in 0..3 {
                    assert!(client.send((id, epoch, sequence + n), Some(txn), 1, n == 1).await);
                }
                next.insert(id, (epoch, sequence + 3));
                // The one before ends inside this one.
                let (before, whose) = (txn - 1, (txn as i64 - 1) * 2 % PRODUCERS);
                if before > 0 {
                    let outcome = if before % 3 == 0 { Outcome::Commit } else { Outcome::Abort };
                    world.asked.lock().outcomes.insert(before, Some(outcome));
                    assert!(client.end(whose, next[&whose].0, outcome, before % 2 == 0).await);
                }
            }
            store.close().await.unwrap();
        };
        world.sim.block_on(life).is_ok()
    };
    at_every_boundary(
        50,
        |k| World::new(k, SimDiskOptions::default()),
        |world| &world.sim,
        live,
        |world, style, _| {
            world.note_end(style);
            world.finale();
        },
    );
}

/// What was answered and not made durable, and a power cut took, is not owed by a start whose process is killed before
/// it has read the log.
#[test]
fn a_kill_does_not_ask_for_what_a_power_cut_took() {
    let mut taken = 0;
    for seed in 0..10 {
        let world = World::new(seed, SimDiskOptions::default());
        world.sim.set_cut_style(CutStyle::AllLost);
        let life = async {
            let (_store, partition) = world.open().await;
            let client = world.client(&partition);
            assert!(client.send((-1, -1, -1), None, 1, true).await);
            assert!(client.send((-1, -1, -1), None, 2, false).await);
        };
        world.sim.block_on(life).unwrap();
        world.sim.cut_now();
        world.note_end(CutStyle::AllLost);
        world.sim.set_cut_style(CutStyle::ProcessKilled);
        world.sim.cut_after(Some(seed + 1));
        assert!(world.sim.block_on(world.open()).is_err(), "the start takes more than that");
        world.note_end(CutStyle::ProcessKilled);
        world.sim.cut_after(None);
        let (_store, partition) = world.sim.block_on(world.open()).unwrap();
        taken += u32::from(partition.offsets().log_end == 1);
        assert_eq!(world.asked.lock().floor, partition.offsets().log_end);
    }
    assert!(taken > 0, "the second append was made durable in all runs");
}

/// Of two answered appends, one durable: what each kind of end, and ends in a row, leave to be asked for.
#[test]
fn what_is_owed_after_a_start_follows_from_how_lives_ended() {
    type End = fn(&mut Asked);
    /// The shortest log that is taken for whole.
    fn owed(ends: &[End]) -> Option<i64> {
        (0..=2).find(|&log_end| {
            let known = BTreeMap::from([(0, 1), (1, 2)]);
            let there = known.range(..log_end).map(|(&at, &id)| (at, id)).collect();
            let mut asked = Asked { known, floor: 1, answered: 2, ..Asked::default() };
            for end in ends {
                end(&mut asked);
            }
            std::panic::catch_unwind(AssertUnwindSafe(|| asked.reopened(there, log_end))).is_ok()
        })
    }
    let (cut, killed): (End, End) = (Asked::power_cut, Asked::process_killed);
    assert_eq!(owed(&[cut]), Some(1));
    assert_eq!(owed(&[killed]), Some(2));
    assert_eq!(owed(&[killed, killed]), Some(2));
    assert_eq!(owed(&[killed, cut]), Some(1));
    assert_eq!(owed(&[cut, killed]), Some(1));
    assert_eq!(owed(&[killed, cut, killed]), Some(1));
}

/// The oracle can fail: without the list, with a marker of the wrong kind, with a transaction that nobody has ended.
#[test]
fn what_a_consumer_must_not_see_is_noticed() {
    let world = World::new(1, SimDiskOptions::default());
    world.sim.cut_after(None);
    let (bytes, aborted) = world
        .sim
        .block_on(async {
            let (_store, partition) = world.open().await;
            let client = world.client(&partition);
            world.asked.lock().outcomes.insert(1, Some(Outcome::Abort));
            assert!(client.send((0, 0, 0), Some(1), 1, true).await);
            assert!(client.end(0, 0, Outcome::Abort, true).await);
            let (slice, aborted) = partition.read_committed(0, 1000, true).await.unwrap();
            (slice.copy().await.unwrap(), aborted)
        })
        .unwrap();
    let verdict = |outcome, aborted: &[Aborted]| {
        let mut asked = Asked::default();
        asked.batches.insert(1, Some(1));
        asked.outcomes.insert(1, outcome);
        asked.consumed(&bytes, aborted);
        asked.violation
    };
    assert_eq!(verdict(Some(Outcome::Abort), &aborted), None);
    assert!(verdict(Some(Outcome::Abort), &[]).unwrap().contains("was seen"));
    assert!(verdict(Some(Outcome::Commit), &aborted).unwrap().contains("was skipped"));
    assert!(verdict(None, &aborted).unwrap().contains("asked: None"));
}

#[test]
fn a_planted_bug_is_caught() {
    for bug in [Bug::DropFlushes, Bug::FlushLater] {
        let caught = (0..60).find(|&seed| {
            let bug = Some(bug.clone());
            std::panic::catch_unwind(|| run(seed, SimDiskOptions::default(), bug)).is_err()
        });
        println!("{bug:?}: seed {caught:?}");
        assert!(caught.is_some(), "{bug:?} was not caught");
    }
}
