//! The log store on simulated disks, judged by the ledger: producers, consumers and an operator at work, the power
//! cut or the process killed anywhere, and the store open again without anybody's help.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use logstore::{Error, Home, Partition, ReadLimit, Store, StoreOptions, Topic, TopicConfig};
use parking_lot::Mutex;
use raid::device::{Device, Durability};
use raid::geometry::Layout;
use raid::runtime::Runtime;
use std::sync::Arc;
use std::time::Duration;
use tests::sim::array::{Rig, Shape};
use tests::sim::bugs::{Bug, Buggy};
use tests::sim::ledger::{Ledger, Place, Reported};
use tests::sim::{CutStyle, Rng, Sim, SimDisk, SimDiskOptions, at_every_boundary, for_seeds};

/// Bytes of the volume.
const SIZE: u64 = 16 << 20;

/// What the store stands on.
enum Ground {
    Disk(Sim, Arc<SimDisk>),
    Array(Box<Rig>),
}

impl Ground {
    fn disk(seed: u64, options: SimDiskOptions) -> Self {
        let sim = Sim::new(seed);
        let disk = sim.disk("d", SIZE, options);
        Self::Disk(sim, disk)
    }

    fn sim(&self) -> &Sim {
        match self {
            Self::Disk(sim, _) => sim,
            Self::Array(rig) => &rig.sim,
        }
    }

    async fn device(&self, bug: Option<&Bug>) -> Arc<dyn Device> {
        let device: Arc<dyn Device> = match self {
            Self::Disk(sim, disk) => sim.plug(disk),
            Self::Array(rig) => rig.assemble(rig.plug(&rig.slots())).await.unwrap(),
        };
        match bug {
            Some(bug) => Buggy::plant(device, bug.clone(), &self.sim().runtime()),
            None => device,
        }
    }
}

/// All that outlives a boot.
struct World {
    ground: Ground,
    ledger: Arc<Mutex<Ledger>>,
    bug: Option<Bug>,
    /// Batches of idempotent producers that were not answered: sent again after the next start.
    unanswered: Arc<Mutex<Vec<(Place, u64)>>>,
}

fn place(topic: &Topic, partition: &Partition) -> Place {
    (topic.id(), partition.index())
}

fn reported(partition: &Partition) -> Reported {
    let offsets = partition.offsets();
    Reported { start: offsets.log_start, high_watermark: offsets.high_watermark, end: offsets.log_end }
}

/// Whether an error is the store's fault: on good disks it has no reason for these.
fn is_fault(error: &Error) -> bool {
    matches!(
        error,
        Error::Device(_)
            | Error::Catalog { .. }
            | Error::DamagedCatalog { .. }
            | Error::DamagedHeader { .. }
            | Error::NotALogStore { .. }
            | Error::Poisoned { .. }
    )
}

impl World {
    fn new(ground: Ground, bug: Option<Bug>) -> Self {
        Self { ground, ledger: Ledger::shared(), bug, unanswered: Arc::default() }
    }

    /// Opens the store and reads all of it: what is there now is there for good.
    async fn open(&self) -> Arc<Store> {
        let device = self.ground.device(self.bug.as_ref()).await;
        let runtime = self.ground.sim().runtime();
        let commit_linger = Duration::from_millis(self.ground.sim().seed() % 3);
        let options = StoreOptions { commit_linger, ..StoreOptions::default() };
        let store = Store::open(Home::Volume(device), options, runtime).await;
        let store = store.unwrap_or_else(|error| panic!("the store does not open: {error}"));
        let found =
            |topic: &Arc<Topic>| (topic.name().to_owned(), topic.id(), topic.partitions().len() as u32);
        let topics = store.topics();
        self.ledger.lock().reopened(&topics.iter().map(found).collect::<Vec<_>>());
        for topic in &topics {
            for partition in topic.partitions() {
                self.read_whole(topic, partition).await;
                self.ledger.lock().settled(place(topic, partition), reported(partition));
            }
        }
        store
    }

    async fn read_whole(&self, topic: &Topic, partition: &Partition) {
        let here = place(topic, partition);
        let end = partition.offsets().log_end;
        let mut at = partition.offsets().log_start;
        while at < end {
            let bytes = match partition.read(at, 8192, ReadLimit::LogEnd, true).await {
                Ok(slice) => slice.copy().await,
                Err(error) => Err(error),
            };
            let bytes = bytes.unwrap_or_else(|error| panic!("{here:?} can't be read from {at}: {error}"));
            self.ledger.lock().read(here, at, &bytes, false);
            let Some(next) = end_of(&bytes) else {
                panic!("{here:?} has nothing at {at}, and ends at {end}")
            };
            at = next;
        }
    }

    fn judge(&self) {
        if let Some(violation) = self.ledger.lock().violation() {
            panic!("{violation}");
        }
    }

    /// Ends the boot: the power goes, or only the process.
    fn note_end(&self, style: CutStyle) {
        match style {
            CutStyle::ProcessKilled => self.ledger.lock().process_killed(),
            _ => self.ledger.lock().power_cut(),
        }
        self.judge();
    }
}

/// The offset after the last batch.
fn end_of(mut bytes: &[u8]) -> Option<i64> {
    let mut end = None;
    while bytes.len() >= 61 {
        let base = i64::from_be_bytes(bytes[..8].try_into().ok()?);
        let size = u32::from_be_bytes(bytes[8..12].try_into().ok()?) as usize + 12;
        end = Some(base + i64::from(i32::from_be_bytes(bytes[23..27].try_into().ok()?)) + 1);
        bytes = bytes.get(size..)?;
    }
    end
}

/// A client's tools.
#[derive(Clone)]
struct Client {
    store: Arc<Store>,
    ledger: Arc<Mutex<Ledger>>,
    unanswered: Arc<Mutex<Vec<(Place, u64)>>>,
    runtime: Arc<dyn Runtime>,
}

impl Client {
    fn target(&self, rng: &mut Rng) -> Option<(Arc<Topic>, Arc<Partition>)> {
        let topics = self.store.topics();
        if topics.is_empty() {
            return None;
        }
        let topic = Arc::clone(rng.pick(&topics));
        let partition = Arc::clone(rng.pick(topic.partitions()));
        Some((topic, partition))
    }

    fn complain(&self, doing: &str, error: &Error) {
        if is_fault(error) {
            self.ledger.lock().accuse(format!("{doing} failed: {error}"));
        }
    }

    /// Sends a batch and notes what comes back. Whether it was taken.
    async fn send(
        &self,
        here: Place,
        partition: &Arc<Partition>,
        id: u64,
        bytes: bytes::Bytes,
        all: bool,
    ) -> bool {
        let durability = if all { Durability::Stable } else { Durability::Cached };
        match partition.append(bytes, durability).await {
            Ok(appended) => {
                self.ledger.lock().appended(id, appended.base_offset);
                if let Some(commit) = appended.commit {
                    match commit.await {
                        Ok(()) => self.ledger.lock().committed(id),
                        Err(error) => self.complain("a commit", &error),
                    }
                }
                self.ledger.lock().offsets(here, reported(partition));
                true
            }
            Err(error) => {
                self.complain("an append", &error);
                false
            }
        }
    }

    async fn produce(&self, rng: &mut Rng, count: u64) {
        let producer = match self.store.allocate_producer_id().await {
            Ok(id) => {
                self.ledger.lock().producer_id(id);
                id
            }
            Err(error) => return self.complain("a producer id", &error),
        };
        let mut sequences = std::collections::BTreeMap::<Place, i32>::new();
        for _ in 0..count {
            self.runtime.sleep(Duration::from_micros(rng.below(8000))).await;
            let Some((topic, partition)) = self.target(rng) else { continue };
            let here = place(&topic, &partition);
            let (records, size, all) =
                (rng.within(1..4) as u32, rng.within(8..900) as usize, rng.one_in(1, 2));
            let sequence = sequences.entry(here).or_default();
            let stamp = rng.one_in(2, 3).then_some((producer, 0, *sequence));
            let now = self.runtime.wall_clock().as_millis() as i64;
            let (id, bytes) = self.ledger.lock().append_asked(here, records, size, stamp, all, now);
            if stamp.is_some() {
                *sequence += records as i32;
                self.unanswered.lock().push((here, id));
            }
            let again = stamp.is_some() && rng.one_in(1, 5);
            let taken = self.send(here, &partition, id, bytes.clone(), all).await;
            if taken && again {
                // As if the answer had been lost: the same batch, at the same place.
                self.send(here, &partition, id, bytes, all).await;
            }
            if stamp.is_some() {
                self.unanswered.lock().retain(|(_, open)| *open != id);
                if !taken {
                    // What follows would be out of sequence: producers that lose one begin anew.
                    return;
                }
            }
        }
    }

    async fn consume(&self, rng: &mut Rng, count: u64) {
        for _ in 0..count {
            self.runtime.sleep(Duration::from_micros(rng.below(9000))).await;
            let Some((topic, partition)) = self.target(rng) else { continue };
            let here = place(&topic, &partition);
            let now = reported(&partition);
            self.ledger.lock().offsets(here, now);
            if now.start >= now.high_watermark {
                continue;
            }
            let from = rng.within(now.start as u64..now.high_watermark as u64) as i64;
            let most = rng.within(1..5000) as u32;
            match partition.read(from, most, ReadLimit::HighWatermark, true).await {
                Ok(slice) => match slice.copy().await {
                    Ok(bytes) => self.ledger.lock().read(here, from, &bytes, true),
                    Err(error) => self.complain("a read", &error),
                },
                // Retention may have been faster.
                Err(error) => self.complain("a read", &error),
            }
        }
    }

    async fn operate(&self, rng: &mut Rng, count: u64) {
        for _ in 0..count {
            self.runtime.sleep(Duration::from_micros(rng.below(30_000))).await;
            match rng.below(6) {
                0..3 => {
                    let name = format!("t{}", rng.below(4));
                    if self.store.topic(&name).is_none() {
                        self.create(&name, rng.within(1..4) as u32).await;
                    }
                }
                3 => {
                    let topics = self.store.topics();
                    if topics.len() > 2 {
                        self.delete(rng.pick::<Arc<Topic>>(&topics)).await;
                    }
                }
                _ => {
                    if let Err(error) = self.store.enforce_retention().await {
                        self.complain("retention", &error);
                    }
                }
            }
        }
    }

    async fn create(&self, name: &str, partitions: u32) {
        let own = [("segment.bytes", "4096"), ("retention.bytes", "16384"), ("file.delete.delay.ms", "20")];
        let mut config = TopicConfig::kafka_defaults().with(own).unwrap();
        if name == "t1" {
            // Flushes that no producer asked for.
            config = config.with([("flush.ms", "3"), ("flush.messages", "7")]).unwrap();
        }
        self.ledger.lock().topic_asked(name, partitions);
        match self.store.create_topic(name, partitions, config).await {
            Ok(topic) => self.ledger.lock().topic_made(name, topic.id(), partitions),
            Err(error) => self.complain("a topic's creation", &error),
        }
    }

    async fn delete(&self, topic: &Topic) {
        self.ledger.lock().deletion_asked(topic.id());
        match self.store.delete_topic(topic.name()).await {
            Ok(()) => self.ledger.lock().deletion_done(topic.id()),
            Err(error) => self.complain("a topic's deletion", &error),
        }
    }
}

/// One boot of random clients.
fn boot(world: &World, rng: &mut Rng) {
    let sim = world.ground.sim();
    let styles = [CutStyle::Chance, CutStyle::Chance, CutStyle::AllLost, CutStyle::ProcessKilled];
    let style = *rng.pick(&styles);
    sim.set_cut_style(style);
    sim.cut_after(rng.one_in(3, 4).then(|| rng.within(1..900)));
    let close = rng.one_in(1, 3);
    let run = async {
        let store = world.open().await;
        let client = Client {
            store: Arc::clone(&store),
            ledger: Arc::clone(&world.ledger),
            unanswered: Arc::clone(&world.unanswered),
            runtime: sim.runtime(),
        };
        let open = std::mem::take(&mut *world.unanswered.lock());
        for (here, id) in open {
            let topic = store.topic_by_id(here.0);
            let Some(partition) = topic.as_ref().and_then(|topic| topic.partition(here.1)) else { continue };
            let bytes = world.ledger.lock().sent_again(id);
            client.send(here, partition, id, bytes, true).await;
        }
        if store.topics().is_empty() {
            client.create("t0", 2).await;
        }
        let mut ends = Vec::new();
        for role in 0..6 {
            let (client, mut rng) = (client.clone(), rng.fork());
            let (tell, end) = tokio::sync::oneshot::channel::<()>();
            sim.runtime().spawn(Box::pin(async move {
                match role {
                    0..3 => client.produce(&mut rng, 15).await,
                    3..5 => client.consume(&mut rng, 20).await,
                    _ => client.operate(&mut rng, 8).await,
                }
                drop(tell);
            }));
            ends.push(end);
        }
        futures_util::future::join_all(ends).await;
        if close {
            store.close().await.unwrap_or_else(|error| panic!("the store does not close: {error}"));
        }
    };
    if sim.block_on(run).is_ok() {
        sim.cut_now();
    }
    world.note_end(style);
}

/// Opens, reads all, cuts, opens and reads all again: what was served after the first start is still there.
fn finale(world: &World) {
    let sim = world.ground.sim();
    sim.cut_after(None);
    sim.set_cut_style(CutStyle::AllLost);
    for _ in 0..2 {
        sim.block_on(world.open()).unwrap();
        sim.cut_now();
        world.note_end(CutStyle::AllLost);
    }
}

fn run(ground: Ground, bug: Option<Bug>) {
    let world = World::new(ground, bug);
    let mut rng = world.ground.sim().fork_rng();
    for _ in 0..rng.within(1..5) {
        boot(&world, &mut rng);
    }
    finale(&world);
}

#[test]
fn on_a_disk() {
    for_seeds("sim_logstore::on_a_disk", 120, |seed| {
        run(Ground::disk(seed, SimDiskOptions::default()), None);
    });
}

#[test]
fn on_a_disk_that_tears_sectors() {
    // A lone disk that loses sectors for good is more than a store without a mirror has to bear.
    let options = SimDiskOptions { unreadable: 0, ..SimDiskOptions::harsh() };
    for_seeds("sim_logstore::on_a_disk_that_tears_sectors", 80, |seed| {
        // What is done at once has no journal.
        let instant = if seed % 2 == 0 { options.instant } else { 0 };
        run(Ground::disk(seed, SimDiskOptions { instant, ..options.clone() }), None);
    });
}

#[test]
fn on_an_array() {
    let disks = SimDiskOptions::default();
    let chunk = 64 << 10;
    let shape =
        Shape { chunk, chunks: SIZE / chunk, region: 1 << 20, disks, ..Shape::small(Layout::near(2), 2) };
    let template = Rig::create(shape, 1);
    for_seeds("sim_logstore::on_an_array", 40, |seed| {
        run(Ground::Array(Box::new(template.fork(seed))), None);
    });
}

#[test]
fn the_same_seed_is_the_same_run() {
    for seed in 0..5 {
        let trace = || {
            let world = World::new(Ground::disk(seed, SimDiskOptions::default()), None);
            let mut rng = world.ground.sim().fork_rng();
            boot(&world, &mut rng);
            boot(&world, &mut rng);
            world.ground.sim().trace()
        };
        assert_eq!(trace(), trace(), "seed {seed} ran differently the second time");
    }
}

/// A short life: format, topics, appends of both kinds, a roll, retention, a deletion; the power goes at every I/O
/// boundary of it.
#[test]
fn the_power_goes_at_every_boundary_of_a_short_life() {
    let live = |world: &World| {
        let sim = world.ground.sim();
        let life = async {
            let store = world.open().await;
            let client = Client {
                store: Arc::clone(&store),
                ledger: Arc::clone(&world.ledger),
                unanswered: Arc::clone(&world.unanswered),
                runtime: sim.runtime(),
            };
            client.create("a", 1).await;
            client.create("b", 1).await;
            let topic = store.topic("a").unwrap();
            let (partition, here) = (&topic.partitions()[0], place(&topic, &topic.partitions()[0]));
            for n in 0..14 {
                let all = n % 3 == 2;
                let (id, bytes) = world.ledger.lock().append_asked(here, 2, 700, None, all, 1);
                client.send(here, partition, id, bytes, all).await;
            }
            store.enforce_retention().await.unwrap();
            client.delete(&store.topic("b").unwrap()).await;
            store.close().await.unwrap();
        };
        sim.block_on(life).is_ok()
    };
    at_every_boundary(
        50,
        |k| World::new(Ground::disk(k, SimDiskOptions::default()), None),
        |world| world.ground.sim(),
        live,
        |world, style, _| {
            world.note_end(style);
            finale(world);
        },
    );
}

#[test]
fn every_planted_bug_is_caught() {
    let everywhere = 0..u64::MAX;
    let records = SIZE / 4..u64::MAX;
    let bugs = [
        Bug::DropFlushes,
        Bug::FlushLater,
        Bug::IgnoreStable,
        Bug::WriteLater(everywhere.clone()),
        Bug::DropWrites(records.clone()),
        Bug::CutWritesShort(everywhere),
        Bug::ShiftWrites(records.clone(), 4096),
        Bug::FailReads(records),
    ];
    for bug in bugs {
        let caught = (0..60).find(|seed| {
            let ground = Ground::disk(*seed, SimDiskOptions::default());
            let bug = Some(bug.clone());
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(ground, bug))).is_err()
        });
        println!("{bug:?}: seed {caught:?}");
        assert!(caught.is_some(), "{bug:?} was not caught");
    }
}

/// Flips and noise in header, catalog and records of a store: it opens or says why not, reads or says why not, and
/// never panics, nor believes a length that its disk could not hold.
#[test]
fn no_bytes_on_a_volume_make_the_store_panic() {
    let world = World::new(Ground::disk(1, SimDiskOptions::default()), None);
    let mut rng = world.ground.sim().fork_rng();
    boot(&world, &mut rng);
    world.ground.sim().cut_after(None);
    let Ground::Disk(_, disk) = &world.ground else { return };
    let (mut opened, mut refused) = (0, 0);
    for_seeds("sim_logstore::no_bytes_on_a_volume_make_the_store_panic", 400, |seed| {
        let sim = Sim::new(seed);
        let mut rng = sim.fork_rng();
        let disk = sim.install(disk.copy());
        for _ in 0..rng.within(1..8) {
            // The two headers, the catalog, and where the first segments are.
            let at = match rng.below(3) {
                0 => rng.below(2) * 4096 + rng.below(96),
                1 => (64 << 10) + rng.below(160 << 10),
                _ => rng.below(SIZE / 2),
            };
            match rng.below(3) {
                0 => disk.flip(at, rng.below(8) as u8),
                1 => disk.poke(at, &rng.pick(&[0, 1, 0x7fff_ffff, u64::MAX, 1 << 40]).to_le_bytes()),
                _ => disk.poke(at, &[rng.draw() as u8; 32]),
            }
        }
        let outcome = sim.block_on(async {
            let home = Home::Volume(sim.plug(&disk));
            let store = Store::open(home, StoreOptions::default(), sim.runtime()).await?;
            for partition in store.topics().iter().flat_map(|topic| topic.partitions()) {
                let offsets = partition.offsets();
                for from in [offsets.log_start, offsets.log_end - 1] {
                    if let Ok(slice) = partition.read(from, 4096, ReadLimit::LogEnd, true).await {
                        drop(slice.copy().await);
                    }
                }
            }
            store.close().await
        });
        match outcome.unwrap() {
            Ok(()) => opened += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    });
    println!("{opened} opened, {refused} were refused");
}
