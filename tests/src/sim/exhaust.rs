//! Search without chance: every I/O boundary of a run, every choice a power cut has there, every start that must work
//! afterwards.
//!
//! One run gives all its boundaries: at each, what the disks may be left with and what the model permits are noted while
//! the run goes on. What was seen before (by digest of disks and model) is not looked at again, whichever run led
//! there: that is what makes long scripts affordable.
//!
//! What must hold in a wreck:
//! - The array starts from all its disks, and the model permits everything it reads.
//! - After that, and another cut that loses all that is unflushed, it does so again without any set of disks that
//!   the array itself did not need: those it called in sync cover all data without them.
//! - It starts right after the wreck, too, without disks that were not needed at the moment of the cut.

use super::array::{Holders, Rig, in_sync};
use super::clients::Witness;
use super::disk::{SimDisk, Wreckage};
use super::executor::{CutStyle, Moment};
use super::rng::{Rng, scramble};
use parking_lot::Mutex;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// A search: what was seen so far, and how far it goes.
pub struct Search<'a> {
    template: &'a Rig,
    /// Who is in sync in it.
    at_first: Holders,
    /// Choices tried at a boundary; all, where there are no more.
    most: u64,
    /// Orders of completion tried for each script.
    orders: u64,
    seen: Mutex<HashSet<u64>>,
    tally: Tally,
}

/// What a search has done.
#[derive(Debug, Default)]
pub struct Tally {
    /// Runs from the template.
    pub runs: AtomicU64,
    /// Boundaries at which the power was cut.
    pub boundaries: AtomicU64,
    /// Boundaries whose choices had all been made before.
    pub known: AtomicU64,
    /// Wrecks: boundaries and choices.
    pub wrecks: AtomicU64,
    /// Starts after a cut, each with a look at every sector.
    pub starts: AtomicU64,
}

/// A boundary of a run.
struct Cut {
    boundary: u64,
    disks: Vec<Wreckage>,
    witness: Arc<Witness>,
    /// Who was in sync then.
    current: Holders,
    digest: u64,
}

impl<'a> Search<'a> {
    /// A search from `template`, at most `most` choices a boundary, in `orders` orders of completion.
    #[must_use]
    pub fn new(template: &'a Rig, most: u64, orders: u64) -> Self {
        let at_first = template.fork(0).check_with(&template.members());
        let (most, seen, tally) = (most.max(1), Mutex::default(), Tally::default());
        Self { template, at_first, most, orders, seen, tally }
    }

    /// What it has done so far.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Runs `play` and cuts the power at every boundary. Panics at the first rule that is broken.
    pub fn exhaust(&self, play: &impl AsyncFn(&Rig)) {
        for order in 0..self.orders {
            for cut in self.run(order, play) {
                self.settle_every_way(&cut, order);
            }
        }
    }

    fn is_new(&self, digest: u64) -> bool {
        self.seen.lock().insert(digest)
    }

    /// One run; its boundaries that are new.
    fn run(&self, order: u64, play: &impl AsyncFn(&Rig)) -> Vec<Cut> {
        let rig = self.template.fork(order);
        rig.sim.stand_still(1);
        self.tally.runs.fetch_add(1, Ordering::Relaxed);
        let cuts = Arc::new(Mutex::new((0, Vec::new())));
        let (disks, witness, noted) = (rig.disks.clone(), Arc::clone(&rig.witness), Arc::clone(&cuts));
        let serving = Arc::clone(&rig.serving);
        let mut current = self.at_first.clone();
        // Reads and their like change nothing: most boundaries are as the one before.
        let mut last = 0;
        rig.sim.watch(Some(Box::new(move |moment| match moment {
            Moment::Between => {
                if let Some(volume) = serving.lock().upgrade() {
                    current = in_sync(&disks, &volume.status());
                }
            }
            Moment::Boundary => {
                let (count, noted) = &mut *noted.lock();
                *count += 1;
                let remains: Vec<Wreckage> = disks.iter().map(|disk| disk.wreckage()).collect();
                let mut digest =
                    remains.iter().fold(witness.digest_after_cut(), |sum, disk| mix(sum, disk.digest()));
                for (disk, slot) in &current {
                    digest = mix(digest, (disk << 8 | slot) as u64);
                }
                if digest != last {
                    last = digest;
                    let (boundary, witness, current) = (*count, witness.fork(), current.clone());
                    noted.push(Cut { boundary, disks: remains, witness, current, digest });
                }
            }
        })));
        rig.sim.block_on(play(&rig)).expect("no cut is set");
        rig.sim.watch(None);
        rig.witness.judge();
        let (count, mut cuts) = std::mem::take(&mut *cuts.lock());
        cuts.retain(|cut| self.is_new(cut.digest));
        self.tally.boundaries.fetch_add(count, Ordering::Relaxed);
        self.tally.known.fetch_add(count - cuts.len() as u64, Ordering::Relaxed);
        cuts
    }

    /// All choices of a boundary, or none, all and some between.
    fn settle_every_way(&self, cut: &Cut, order: u64) {
        let ways = cut.disks.iter().flat_map(Wreckage::open).fold(1u64, u64::saturating_mul);
        let mut rng = Rng::new(cut.digest);
        for way in 0..ways.min(self.most) {
            let mut rest = way;
            let choose = |n: u64| {
                if ways <= self.most {
                    let choice = rest % n;
                    rest /= n;
                    choice
                } else {
                    match way {
                        0 => 0,
                        1 => n - 1,
                        _ => rng.below(n),
                    }
                }
            };
            let disks = settle(&cut.disks, choose);
            let witness = cut.witness.fork();
            witness.power_cut();
            let wreck = self.template.with_disks(cut.digest ^ way, disks, witness);
            self.tally.wrecks.fetch_add(1, Ordering::Relaxed);
            let looked = catch_unwind(AssertUnwindSafe(|| self.inspect(&wreck, &cut.current)));
            if let Err(panic) = looked {
                eprintln!("the wreck was\n{}", wreck.describe());
                eprintln!(
                    "order {order}, boundary {}, choice {way} of {ways}, in sync then: {:?}",
                    cut.boundary, cut.current
                );
                resume_unwind(panic);
            }
        }
    }

    fn inspect(&self, wreck: &Rig, current: &Holders) {
        let here = wreck.members();
        let mut digest = wreck.digest(&here);
        for (disk, slot) in current {
            digest = mix(digest, (disk << 8 | slot) as u64);
        }
        if !self.is_new(mix(1, digest)) {
            return;
        }
        let all = wreck.fork(digest);
        all.sim.stand_still(2);
        all.sim.set_cut_style(CutStyle::AllLost);
        let in_sync = self.start(&all, &here);
        all.cut();
        self.start_without(&all, &here, &in_sync, 3);
        self.start_without(wreck, &here, current, 4);
    }

    /// Starts from every set of disks in which the `current` ones among them cover everything.
    fn start_without(&self, rig: &Rig, here: &[usize], current: &Holders, stream: u64) {
        for bits in 1..1u64 << here.len() {
            let gone =
                |disk: usize| here.iter().position(|one| *one == disk).is_none_or(|at| bits >> at & 1 == 1);
            let left: Vec<usize> = here.iter().copied().filter(|disk| !gone(*disk)).collect();
            // A disk that is in sync and does not know it yet can't be asked to start alone.
            let counts = |disk: usize| !gone(disk) && rig.knows_that_it_counts(disk);
            let slots: Vec<usize> =
                current.iter().filter(|(disk, _)| counts(*disk)).map(|(_, slot)| *slot).collect();
            if rig.covers(&slots) && self.is_new(mix(2, rig.digest(&left))) {
                let fork = rig.fork(bits);
                fork.sim.stand_still(stream);
                self.start(&fork, &left);
            }
        }
    }

    fn start(&self, rig: &Rig, disks: &[usize]) -> Holders {
        self.tally.starts.fetch_add(1, Ordering::Relaxed);
        rig.check_with(disks)
    }
}

fn settle(disks: &[Wreckage], mut choose: impl FnMut(u64) -> u64) -> Vec<SimDisk> {
    disks.iter().map(|disk| disk.settle(&mut choose)).collect()
}

fn mix(sum: u64, next: u64) -> u64 {
    scramble(scramble(sum) ^ next)
}

/// Works on every item, on all processors; the first panic names its item and ends it.
pub fn on_all_processors<T: std::fmt::Debug + Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let (next, stop, failed) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
    let one = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(item))) {
                eprintln!("failed: {item:?}");
                stop.store(true, Ordering::Relaxed);
                *failed.lock() = Some(panic);
                return;
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(one);
        }
    });
    if let Some(panic) = failed.into_inner() {
        resume_unwind(panic);
    }
}
