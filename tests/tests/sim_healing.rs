//! Copies of records that differ, on a simulated mirror: a tail that reached one leg only, a leg that rots in a region that an
//! unclean stop left dirty, the power going in the middle of a mend, a mend that the disk refuses. The ledger judges what
//! is read with both legs, and then with each of them alone: every copy must hold what was promised or shown.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use logstore::{Error, Home, Partition, ReadLimit, ScrubOptions, Store, StoreOptions, TopicConfig};
use parking_lot::Mutex;
use raid::device::{Device, Durability};
use raid::error::Operation;
use raid::geometry::Layout;
use raid::volume::{AssembleOptions, Volume};
use rustix::io::Errno;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;
use tests::sim::array::{DATA, Rig, Shape, in_sync};
use tests::sim::bugs::{Bug, Buggy};
use tests::sim::ledger::{Ledger, Place, Reported};
use tests::sim::{CutStyle, Fault, SimDiskOptions, at_every_boundary, for_seeds};

/// Bytes of the volume.
const SIZE: u64 = 16 << 20;
/// Both legs.
const BOTH: [usize; 2] = [0, 1];

/// Two disks with a log store on them, and what is known of it.
struct Machine {
    rig: Rig,
    ledger: Arc<Mutex<Ledger>>,
    /// The batches as they were sent, in order.
    sent: Mutex<Vec<Bytes>>,
    /// A fault of the volume as the store sees it.
    bug: Option<Bug>,
    /// Resync is released as soon as the store is open.
    hasty: bool,
}

fn place(store: &Store, partition: &Partition) -> Place {
    (store.topic(partition.topic()).unwrap().id(), partition.index())
}

fn only_log(store: &Store) -> Arc<Partition> {
    Arc::clone(&store.topic("t").unwrap().partitions()[0])
}

impl Machine {
    fn new() -> Self {
        let (chunk, disks) = (64 << 10, SimDiskOptions::default());
        let shape =
            Shape { chunk, chunks: SIZE / chunk, region: 1 << 20, disks, ..Shape::small(Layout::near(2), 2) };
        Self {
            rig: Rig::create(shape, 1),
            ledger: Ledger::shared(),
            sent: Mutex::default(),
            bug: None,
            hasty: false,
        }
    }

    /// The same disks in a machine of its own, with a ledger of its own.
    fn fork(&self, seed: u64) -> Self {
        let (rig, sent) = (self.rig.fork(seed), Mutex::new(self.sent.lock().clone()));
        Self { rig, ledger: Arc::new(Mutex::new(self.ledger.lock().clone())), sent, bug: None, hasty: false }
    }

    async fn assemble(&self, legs: &[usize]) -> Arc<Volume> {
        let options = AssembleOptions { hold_resync: true, ..AssembleOptions::default() };
        Volume::assemble(self.rig.plug(legs), options, self.rig.sim.runtime()).await.unwrap()
    }

    async fn try_open(&self, volume: &Arc<Volume>) -> Result<Arc<Store>, Error> {
        let runtime = self.rig.sim.runtime();
        let options = StoreOptions {
            verify_interval: Duration::ZERO,
            scrub: ScrubOptions { bytes_per_second: 1 << 40, interval: None },
            ..StoreOptions::default()
        };
        let device: Arc<dyn Device> = volume.clone();
        let device = match &self.bug {
            Some(bug) => Buggy::plant(device, bug.clone(), &runtime),
            None => device,
        };
        Store::open(Home::Volume(device), options, runtime).await
    }

    /// Starts as a broker does.
    async fn open(&self, legs: &[usize]) -> (Arc<Volume>, Arc<Store>) {
        let volume = self.assemble(legs).await;
        let store = self.try_open(&volume).await.unwrap_or_else(|error| panic!("it does not open: {error}"));
        if self.hasty {
            volume.release_resync();
            return (volume, store);
        }
        let (weak, runtime) = ((Arc::downgrade(&volume), Arc::downgrade(&store)), self.rig.sim.runtime());
        let settled = broker::volume::resync_when_settled(weak.0, weak.1, Arc::clone(&runtime));
        runtime.spawn(Box::pin(settled));
        (volume, store)
    }

    async fn make(&self, store: &Store) {
        // Many closed segments in a region, of a few batches each.
        let config = TopicConfig::kafka_defaults().with([("segment.bytes", "6000")]).unwrap();
        self.ledger.lock().topic_asked("t", 1);
        let topic = store.create_topic("t", 1, config).await.unwrap();
        self.ledger.lock().topic_made("t", topic.id(), 1);
    }

    async fn append(&self, store: &Store, count: usize, stable: bool) {
        let log = only_log(store);
        let here = place(store, &log);
        for _ in 0..count {
            let now = self.rig.sim.runtime().wall_clock().as_millis() as i64;
            let (id, bytes) = self.ledger.lock().append_asked(here, 2, 700, None, stable, now);
            self.sent.lock().push(bytes.clone());
            let durability = if stable { Durability::Stable } else { Durability::Cached };
            let appended = log.append(bytes, durability).await.unwrap();
            self.ledger.lock().appended(id, appended.base_offset);
            if let Some(commit) = appended.commit {
                commit.await.unwrap();
                self.ledger.lock().committed(id);
            }
        }
    }

    /// A store with closed segments and an active one, everything acknowledged, as a power cut leaves it.
    fn cut() -> Self {
        let machine = Self::new();
        let life = async {
            let (_volume, store) = machine.open(&BOTH).await;
            machine.make(&store).await;
            machine.append(&store, 22, true).await;
            store.quiet().await;
            machine.flush(&store).await;
        };
        machine.rig.sim.block_on(life).unwrap();
        machine.power_off();
        machine
    }

    /// Brings everything to its place, so that the journal has nothing to bring back: what is too long for the journal is
    /// appended beside, and only a flush makes that durable.
    async fn flush(&self, store: &Store) {
        let topic = store.create_topic("long", 1, TopicConfig::kafka_defaults()).await.unwrap();
        let now = self.rig.sim.runtime().wall_clock().as_millis() as i64;
        let sent = tests::broker::batch(&[&vec![7; 40_000]], now);
        let appended = topic.partitions()[0].append(sent, Durability::Stable).await.unwrap();
        appended.commit.unwrap().await.unwrap();
    }

    /// The same, but closed in order: nothing is dirty.
    fn closed() -> Self {
        let machine = Self::cut();
        let life = async {
            let (volume, store) = machine.open(&BOTH).await;
            store.close().await.unwrap();
            volume.stop().await.unwrap();
        };
        machine.rig.sim.block_on(life).unwrap();
        machine
    }

    fn power_off(&self) {
        self.rig.sim.set_cut_style(CutStyle::AllLost);
        self.rig.sim.cut_now();
        self.ledger.lock().power_cut();
        self.judge();
    }

    fn judge(&self) {
        if let Some(violation) = self.ledger.lock().violation() {
            panic!("{violation}");
        }
    }

    /// Reads everything from an offset on, so many bytes at a time.
    async fn read(&self, store: &Store, from: i64, most: u32) {
        let log = only_log(store);
        let (mut at, end) = (from, log.offsets().log_end);
        while at < end {
            let slice = log.read(at, most, ReadLimit::LogEnd, true).await;
            let bytes = match slice {
                Ok(slice) => slice.copy().await,
                Err(error) => Err(error),
            };
            let bytes = bytes.unwrap_or_else(|error| panic!("at {at}: {error}"));
            self.ledger.lock().read(place(store, &log), at, &bytes, false);
            self.judge();
            let mut rest = bytes;
            while !rest.is_empty() {
                let header = logstore::batch::Header::parse(&rest).unwrap();
                at = header.next_offset();
                drop(rest.split_to(header.size as usize));
            }
        }
    }

    /// Reads everything, after which nothing of it may go.
    async fn read_all(&self, store: &Store) {
        let log = only_log(store);
        self.ledger.lock().reopened(&[("t".to_owned(), store.topic("t").unwrap().id(), 1)]);
        self.read(store, log.offsets().log_start, 8192).await;
        let Offsets { start, high_watermark, end } = offsets(&log);
        self.ledger.lock().settled(place(store, &log), Reported { start, high_watermark, end });
        self.judge();
    }

    /// Starts with these legs, reads all, and loses power.
    fn check(&self, legs: &[usize]) {
        let life = async {
            let (_volume, store) = self.open(legs).await;
            self.read_all(&store).await;
        };
        self.rig.sim.block_on(life).unwrap();
        self.power_off();
    }

    /// Each leg alone has everything.
    fn check_each_leg(&self) {
        for leg in BOTH {
            self.fork(leg as u64).check(&[leg]);
        }
    }

    /// Where a batch lies on a disk, in its segment.
    fn find(&self, disk: usize, batch: usize) -> Range<u64> {
        // The journal lies before all segments.
        self.find_all(disk, batch).pop().unwrap()
    }

    /// Where a batch lies on a disk, in the journal and in its segment.
    fn find_all(&self, disk: usize, batch: usize) -> Vec<Range<u64>> {
        // All that no broker stamps.
        let (needle, disk) = (self.sent.lock()[batch].slice(16..), &self.rig.disks[disk]);
        let bytes = disk.peek(DATA, disk.size() - DATA);
        let found = bytes.windows(needle.len()).enumerate().filter(|(_, window)| *window == needle);
        let range = |at: u64| at - 16..at + needle.len() as u64;
        found.map(|(at, _)| range(at as u64 + DATA)).collect()
    }

    fn peek(&self, disk: usize, range: &Range<u64>) -> Vec<u8> {
        self.rig.disks[disk].peek(range.start, range.end - range.start)
    }

    /// Part of a batch rots on one leg.
    fn rot(&self, leg: usize, batch: usize, skip: u64, len: usize) -> Range<u64> {
        let range = self.find(leg, batch);
        self.rig.disks[leg].poke(range.start + skip, &vec![0xa5; len]);
        range
    }

    async fn resynced(&self, volume: &Arc<Volume>, range: &Range<u64>) {
        while volume.may_differ(range.start - DATA, range.end - range.start) {
            self.rig.sim.runtime().sleep(Duration::from_millis(100)).await;
        }
    }

    async fn scrubbed(&self, store: &Arc<Store>) {
        assert!(store.start_scrub().unwrap());
        while store.scrub_status().unwrap().running {
            self.rig.sim.runtime().sleep(Duration::from_millis(5)).await;
        }
    }
}

struct Offsets {
    start: i64,
    high_watermark: i64,
    end: i64,
}

fn offsets(log: &Partition) -> Offsets {
    let now = log.offsets();
    Offsets { start: now.log_start, high_watermark: now.high_watermark, end: now.log_end }
}

/// Of each leg, what of its unflushed sectors the power cut leaves: nothing, all, or chance.
fn torn_tail(template: &Machine, seed: u64, bug: Option<Bug>) {
    let machine = template.fork(seed);
    let mut rng = machine.rig.sim.fork_rng();
    let life = async {
        let (_volume, store) = machine.open(&BOTH).await;
        machine.read_all(&store).await;
        machine.append(&store, rng.within(1..6) as usize, true).await;
        machine.append(&store, rng.within(1..6) as usize, false).await;
    };
    machine.rig.sim.block_on(life).unwrap();
    // The first four seeds have each leg without what the other has.
    let fates = [[0, 2], [2, 0], [0, 1], [1, 0]];
    let fate = fates.get(seed as usize).copied().unwrap_or_else(|| [rng.below(3), rng.below(3)]);
    let wrecks: Vec<_> = machine.rig.disks.iter().map(|disk| disk.wreckage()).collect();
    let disks = wrecks.iter().zip(fate).map(|(wreck, fate)| {
        wreck.settle(|contents| match fate {
            0 => 0,
            1 => rng.below(contents),
            _ => contents - 1,
        })
    });
    let disks: Vec<_> = disks.collect();
    machine.rig.sim.cut_now();
    let rig = machine.rig.with_disks(seed, disks, machine.rig.witness.fork());
    let machine = Machine { rig, bug, ..machine };
    machine.ledger.lock().power_cut();
    // Read and cut at once: nothing was resynced in the background.
    let early = Machine { bug: machine.bug.clone(), ..machine.fork(seed) };
    early.check(&BOTH);
    early.check_each_leg();
    // Read before and after the resync.
    let life = async {
        let (volume, store) = machine.open(&BOTH).await;
        machine.read_all(&store).await;
        machine.resynced(&volume, &(DATA..DATA + SIZE)).await;
        machine.read(&store, 0, 1).await;
    };
    machine.rig.sim.block_on(life).unwrap();
    machine.power_off();
    machine.check_each_leg();
    machine.check(&BOTH);
}

#[test]
fn a_tail_that_reached_one_leg_only_is_the_same_for_good() {
    let template = Machine::cut();
    for_seeds("sim_healing::a_tail_that_reached_one_leg_only_is_the_same_for_good", 60, |seed| {
        torn_tail(&template, seed, None);
    });
}

/// A closed segment in a dirty region rots on one leg, and then the power goes.
#[derive(Debug, Clone, Copy)]
enum Then {
    /// Everything is read at once, while resync begins.
    Read,
    /// Single batches are looked up at once.
    LookUp,
    /// Nobody reads before all is resynced.
    Wait,
}

fn rots_in_a_dirty_region(template: &Machine, leg: usize, then: Then, bug: Option<&Bug>, hasty: bool) {
    // Of the first segment, of the one in the middle, and of the one before the active one.
    for (batch, skip, len) in [(0, 0, 61), (0, 61, 40), (9, 100, 700), (14, 8, 4), (17, 0, 1400)] {
        let machine = Machine { bug: bug.cloned(), hasty, ..template.fork(batch as u64) };
        let range = machine.rot(leg, batch, skip, len);
        let other = machine.peek(1 - leg, &range);
        let life = async {
            let (volume, store) = machine.open(&BOTH).await;
            assert!(volume.may_differ(range.start - DATA, 1), "nothing is dirty");
            match then {
                Then::Read => machine.read_all(&store).await,
                Then::LookUp => {
                    let end = only_log(&store).offsets().log_end;
                    for from in (0..end).rev() {
                        let slice = only_log(&store).read(from, 1, ReadLimit::LogEnd, true).await;
                        let bytes = slice.unwrap().copy().await.unwrap();
                        machine.ledger.lock().read(place(&store, &only_log(&store)), from, &bytes, true);
                        machine.judge();
                    }
                }
                Then::Wait => {}
            }
            machine.resynced(&volume, &range).await;
            machine.read_all(&store).await;
        };
        machine.rig.sim.block_on(life).unwrap();
        assert!(machine.peek(leg, &range) == other && machine.peek(1 - leg, &range) == other);
        machine.power_off();
        machine.check_each_leg();
    }
}

#[test]
fn what_rots_on_one_leg_in_a_dirty_region_is_good_on_both_before_they_are_made_equal() {
    let template = Machine::cut();
    for leg in BOTH {
        for then in [Then::Read, Then::LookUp, Then::Wait] {
            rots_in_a_dirty_region(&template, leg, then, None, false);
        }
    }
}

/// The tests above can fail: where resync is released as soon as the store is open, where the store believes that nothing
/// may differ, where nothing is mended.
#[test]
fn every_planted_bug_is_caught() {
    let template = Machine::cut();
    let fails = |run: &dyn Fn()| catch_unwind(AssertUnwindSafe(run)).is_err();
    let rots =
        |then, bug: Option<&Bug>, hasty| fails(&|| rots_in_a_dirty_region(&template, 0, then, bug, hasty));
    assert!(rots(Then::Wait, None, true), "a resync that does not wait was not caught");
    for then in [Then::Read, Then::LookUp, Then::Wait] {
        for bug in [Bug::DenyDifferences, Bug::DropMends] {
            assert!(rots(then, Some(&bug), false), "{bug:?}, {then:?}");
        }
    }
    let torn = (0..20).find(|seed| fails(&|| torn_tail(&template, *seed, Some(Bug::DropMends))));
    assert!(torn.is_some(), "a tail that is not mended was not caught");
}

/// A store that was closed in order, a leg of which is bad over several batches of closed segments and of the last one; then
/// all of it is read, and scrubbed, and the power goes at every boundary of that.
#[test]
fn the_power_goes_at_every_boundary_of_mending() {
    let template = Machine::closed();
    for leg in BOTH {
        let spoilt = template.fork(9);
        let ranges: Vec<Range<u64>> = [(1, 0, 61), (2, 300, 900), (3, 0, 1400), (12, 100, 4), (21, 9, 600)]
            .map(|(batch, skip, len)| spoilt.rot(leg, batch, skip, len))
            .to_vec();
        at_every_boundary(
            60,
            |k| spoilt.fork(k),
            |machine| &machine.rig.sim,
            |machine| {
                let life = async {
                    let (_volume, store) = machine.open(&BOTH).await;
                    machine.read_all(&store).await;
                    assert_eq!(store.healing().unreadable, 0);
                    machine.scrubbed(&store).await;
                };
                machine.rig.sim.block_on(life).is_ok()
            },
            |machine, style, whole| {
                match style {
                    CutStyle::ProcessKilled => machine.ledger.lock().process_killed(),
                    _ => machine.ledger.lock().power_cut(),
                }
                machine.rig.sim.cut_after(None);
                let good = |leg: usize| {
                    ranges.iter().all(|range| machine.peek(leg, range) == template.peek(leg, range))
                };
                assert!(good(1 - leg), "the good copy was touched");
                assert!(good(leg) || !whole, "the bad copy was not mended");
                // The next read or scrub mends what is still bad.
                let life = async {
                    let (volume, store) = machine.open(&BOTH).await;
                    machine.read_all(&store).await;
                    machine.scrubbed(&store).await;
                    assert_eq!(
                        (store.healing().unreadable, store.scrub_status().unwrap().unreadable),
                        (0, 0)
                    );
                    store.close().await.unwrap();
                    volume.stop().await.unwrap();
                };
                machine.rig.sim.block_on(life).unwrap();
                assert!(good(0) && good(1), "it was not mended the next time");
                machine.check_each_leg();
            },
        );
    }
}

/// The last segment of a log that was closed in order, and then left dirty by writes beside it, has rotted at its end on one
/// leg. What is appended behind the end lies in a window with it, and a read of that makes the window equal: not before the
/// good copy was chosen.
#[test]
fn a_read_behind_the_end_of_a_closed_segment_costs_no_good_copy() {
    for leg in BOTH {
        let machine = Machine::new();
        let life = async {
            let (volume, store) = machine.open(&BOTH).await;
            let config = TopicConfig::kafka_defaults().with([("index.interval.bytes", "0")]).unwrap();
            machine.ledger.lock().topic_asked("t", 1);
            let topic = store.create_topic("t", 1, config).await.unwrap();
            machine.ledger.lock().topic_made("t", topic.id(), 1);
            // The end is in another window than the first batch, which is read before the first append.
            machine.append(&store, 70, true).await;
            store.close().await.unwrap();
            volume.stop().await.unwrap();
        };
        machine.rig.sim.block_on(life).unwrap();
        let life = async {
            let (_volume, store) = machine.open(&BOTH).await;
            let topic = store.create_topic("beside", 1, TopicConfig::kafka_defaults()).await.unwrap();
            let now = machine.rig.sim.runtime().wall_clock().as_millis() as i64;
            let sent = tests::broker::batch(&[b"beside"], now);
            let appended = topic.partitions()[0].append(sent, Durability::Stable).await.unwrap();
            appended.commit.unwrap().await.unwrap();
        };
        machine.rig.sim.block_on(life).unwrap();
        machine.power_off();
        let range = machine.rot(leg, 69, 100, 600);
        let other = machine.peek(1 - leg, &range);
        let life = async {
            let volume = machine.assemble(&BOTH).await;
            assert!(volume.may_differ(range.start - DATA, range.end - range.start));
            let store = machine.try_open(&volume).await.unwrap();
            let end = only_log(&store).offsets().log_end;
            machine.append(&store, 1, true).await;
            machine.read(&store, end, 1).await;
        };
        machine.rig.sim.block_on(life).unwrap();
        machine.power_off();
        assert!(machine.peek(1 - leg, &range) == other, "leg {leg}: the good copy is gone");
        machine.check(&BOTH);
        machine.check_each_leg();
    }
}

/// What a disk answers to all writes of a range.
fn refuse_writes(machine: &Machine, leg: usize, range: &Range<u64>, errno: Errno) {
    let within = range.start / 4096 * 4096..range.end.next_multiple_of(4096);
    machine.rig.disks[leg].fail(Fault { within, errno, lands: false, ..Fault::lasting(&[Operation::Write]) });
}

/// The active segment has a batch that is bad on one leg, which is full. Where a resync is yet to come, the store does
/// not open, and nothing is lost.
#[test]
fn recovery_fails_where_a_bad_copy_cannot_be_mended_and_may_still_be_copied() {
    let template = Machine::cut();
    for leg in BOTH {
        let machine = template.fork(5);
        let range = machine.rot(leg, 21, 80, 100);
        let other = machine.peek(1 - leg, &range);
        refuse_writes(&machine, leg, &range, Errno::NOSPC);
        for _ in 0..2 {
            let refused = machine.rig.sim.block_on(async {
                let volume = machine.assemble(&BOTH).await;
                assert!(volume.may_differ(range.start - DATA, 1));
                machine.try_open(&volume).await.err()
            });
            assert!(matches!(refused.unwrap(), Some(Error::Device(_))), "leg {leg}");
            assert!(machine.peek(1 - leg, &range) == other, "the good copy of leg {leg} is gone");
            machine.power_off();
        }
        machine.rig.disks[leg].heal();
        machine.check(&BOTH);
        assert!(machine.peek(leg, &range) == other, "leg {leg}");
        machine.check_each_leg();
    }
}

/// The same where nothing would copy the bad one: the store opens and serves the good one, which a later scrub copies.
#[test]
fn recovery_goes_on_where_nothing_copies_the_bad_copy() {
    let template = Machine::cut();
    // The store is not closed, but the volume is stopped in order.
    let life = async {
        let (volume, store) = template.open(&BOTH).await;
        template.read_all(&store).await;
        // Not by the journal, which would write them again.
        template.append(&store, 2, false).await;
        template.resynced(&volume, &(DATA..DATA + SIZE)).await;
        volume.stop().await.unwrap();
    };
    template.rig.sim.block_on(life).unwrap();
    template.power_off();
    for leg in BOTH {
        let machine = template.fork(6);
        let range = machine.rot(leg, 23, 80, 100);
        let other = machine.peek(1 - leg, &range);
        refuse_writes(&machine, leg, &range, Errno::NOSPC);
        let life = async {
            let (volume, store) = machine.open(&BOTH).await;
            assert!(!volume.may_differ(0, SIZE), "something is dirty");
            machine.read_all(&store).await;
            assert!(machine.peek(leg, &range) != other && machine.peek(1 - leg, &range) == other);
            machine.rig.disks[leg].heal();
            machine.scrubbed(&store).await;
            store.close().await.unwrap();
            volume.stop().await.unwrap();
        };
        machine.rig.sim.block_on(life).unwrap();
        assert!(machine.peek(leg, &range) == other, "leg {leg}");
        machine.check_each_leg();
    }
}

/// A leg that cannot write at all is taken out by the mend: the store opens without it.
#[test]
fn recovery_goes_on_without_a_leg_that_fails_to_be_mended() {
    let template = Machine::cut();
    for leg in BOTH {
        let machine = template.fork(7);
        let range = machine.rot(leg, 21, 80, 100);
        refuse_writes(&machine, leg, &range, Errno::IO);
        let life = async {
            let (volume, store) = machine.open(&BOTH).await;
            machine.read_all(&store).await;
            assert_eq!(in_sync(&machine.rig.disks, &volume.status()), [(1 - leg, 1 - leg)]);
        };
        machine.rig.sim.block_on(life).unwrap();
        machine.power_off();
        machine.fork(8).check(&[1 - leg]);
    }
}

/// A closed segment in a dirty region has a bad copy that cannot be mended: it is not served rather than lost, resync waits,
/// and all is well once the disk has room.
#[test]
fn a_bad_copy_that_cannot_be_mended_is_not_copied_over_the_good_one() {
    let template = Machine::cut();
    for leg in BOTH {
        let machine = template.fork(10);
        let range = machine.rot(leg, 9, 80, 100);
        let other = machine.peek(1 - leg, &range);
        refuse_writes(&machine, leg, &range, Errno::NOSPC);
        let life = async {
            let (volume, store) = machine.open(&BOTH).await;
            let read = only_log(&store).read(18, 1, ReadLimit::LogEnd, true).await;
            assert!(matches!(read, Err(Error::Device(_))), "{read:?}");
            machine.rig.sim.runtime().sleep(Duration::from_secs(70)).await;
            assert!(volume.may_differ(range.start - DATA, 1), "resync did not wait");
            assert!(machine.peek(1 - leg, &range) == other, "the good copy is gone");
            machine.rig.disks[leg].heal();
            machine.read_all(&store).await;
            machine.resynced(&volume, &(DATA..DATA + SIZE)).await;
        };
        machine.rig.sim.block_on(life).unwrap();
        assert!(machine.peek(leg, &range) == other, "leg {leg}");
        machine.power_off();
        machine.check_each_leg();
    }
}

/// What is in the journal only has rotted there on one leg, or that leg refuses to be mended: it comes back from the other
/// one, onto both.
#[test]
fn what_rots_in_the_journal_on_one_leg_comes_back_from_the_other() {
    let template = Machine::cut();
    let life = async {
        let (_volume, store) = template.open(&BOTH).await;
        template.read_all(&store).await;
        template.append(&store, 6, true).await;
    };
    template.rig.sim.block_on(life).unwrap();
    template.power_off();
    for leg in BOTH {
        // Of the batch, or of the length of the record around it.
        for (errno, skip, len) in [(None, 30, 300), (Some(Errno::IO), 30, 300), (None, -83, 1)] {
            let machine = template.fork(11);
            let mut rotten = 0;
            for batch in 22..28 {
                // Those of a segment that was closed are in their places, too.
                if let [found] = &machine.find_all(leg, batch)[..] {
                    let at = found.start.checked_add_signed(skip).unwrap();
                    machine.rig.disks[leg].poke(at, &vec![0xa5; len]);
                    if let Some(errno) = errno {
                        refuse_writes(&machine, leg, found, errno);
                    }
                    rotten += 1;
                }
            }
            assert!(rotten >= 2, "{rotten} batches are in the journal only");
            let life = async {
                let (volume, store) = machine.open(&BOTH).await;
                machine.read_all(&store).await;
                let in_sync = in_sync(&machine.rig.disks, &volume.status());
                assert_eq!(in_sync.len(), 2 - usize::from(errno.is_some()), "{in_sync:?}");
            };
            machine.rig.sim.block_on(life).unwrap();
            machine.power_off();
            if errno.is_some() {
                machine.check(&[1 - leg]);
            } else {
                machine.check_each_leg();
            }
        }
    }
}
