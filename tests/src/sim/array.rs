//! An array of simulated disks with the model that judges it: made once, copied as often as a test likes.

use super::bugs::{Buggy, Plant};
use super::clients::Witness;
use super::disk::{SimDisk, SimDiskOptions};
use super::executor::{CutStyle, Moment, PowerCut, Sim};
use super::rng::{Rng, scramble};
use super::surface::SECTOR;
use parking_lot::Mutex;
use raid::create::{Bitmap, CreateOptions, create};
use raid::device::Device;
use raid::geometry::{Geometry, Layout};
use raid::status::{MemberState, Status};
use raid::superblock::{Role, Superblock};
use raid::volume::{AssembleOptions, Volume};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// Where the superblock is.
pub const SUPERBLOCK: Range<u64> = 4096..8192;
/// Where the bitmap is, as `raid::create` places it on small members.
pub const BITMAP: Range<u64> = 8192..12288;
/// Where the data area begins, as `raid::create` places it on small members.
pub const DATA: u64 = 1 << 20;
/// Disks in sync, each with the slot it holds.
pub type Holders = Vec<(usize, usize)>;

/// What an array looks like.
#[derive(Debug, Clone)]
pub struct Shape {
    /// How copies are laid out.
    pub layout: Layout,
    /// Members.
    pub members: usize,
    /// Blank disks besides, as large as a member.
    pub blanks: usize,
    /// Bytes a chunk.
    pub chunk: u64,
    /// Chunks a member holds.
    pub chunks: u64,
    /// Bytes a bitmap region.
    pub region: u64,
    /// How its disks behave.
    pub disks: SimDiskOptions,
    /// Whether its copies count as equal from the start.
    pub clean: bool,
}

impl Shape {
    /// A clean array of small chunks, its disks as they promise to be.
    #[must_use]
    pub fn small(layout: Layout, members: usize) -> Self {
        let disks = SimDiskOptions::default();
        Self { layout, members, blanks: 0, chunk: 4096, chunks: 2, region: 4096, disks, clean: true }
    }

    /// Where its chunks lie.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        let usable = self.chunks * self.chunk;
        Geometry::new(self.layout, self.members, self.chunk, usable).expect("shapes are sound")
    }

    /// Bytes the array holds.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.geometry().size()
    }
}

/// Disks in a machine, and what may be on them.
pub struct Rig {
    /// How it was made.
    pub shape: Shape,
    /// The machine.
    pub sim: Sim,
    /// The members as they were made, by slot, and then the blank disks.
    pub disks: Vec<Arc<SimDisk>>,
    /// The judge.
    pub witness: Arc<Witness>,
    /// Sets of slots that hold copies together.
    pub sets: Vec<Vec<usize>>,
    /// A bug over some of the disks, from the next time they are plugged in.
    pub plant: Option<Plant>,
    /// The array as it was assembled last, as long as it is there.
    pub serving: Arc<Mutex<Weak<Volume>>>,
    /// Slots whose members the test treats badly: the others must do without them.
    pub victims: Vec<usize>,
}

impl Rig {
    /// Makes an array on new disks.
    #[must_use]
    pub fn create(shape: Shape, seed: u64) -> Self {
        // Not the stream of chance that a fork of the same seed has: two devices would get one identity.
        let sim = Sim::new(!seed);
        let size = DATA + shape.chunks * shape.chunk;
        let name = |slot: usize| format!("disk{slot}");
        let disks: Vec<_> = (0..shape.members + shape.blanks)
            .map(|slot| sim.disk(&name(slot), size, shape.disks.clone()))
            .collect();
        let witness = Witness::new(shape.size() / SECTOR, shape.disks.torn > 0);
        let sets = shape.geometry().mirror_sets();
        let sets = sets.into_iter().map(|set| set.into_iter().map(|slot| slot.0).collect()).collect();
        let rig = Self {
            shape,
            sim,
            disks,
            witness,
            sets,
            plant: None,
            serving: Arc::default(),
            victims: Vec::new(),
        };
        let options = CreateOptions {
            name: "sim".to_owned(),
            layout: rig.shape.layout,
            chunk: rig.shape.chunk,
            bitmap: Bitmap::Internal { region: Some(rig.shape.region) },
            assume_clean: rig.shape.clean,
            force: false,
        };
        let made = create_on(&rig, &options);
        rig.sim.block_on(made).expect("no cut is set").expect("blank disks make an array");
        rig
    }

    /// The same disks, content and cache, in a machine of its own with another seed, and a witness of its own.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        self.with_disks(seed, self.disks.iter().map(|disk| disk.copy()), self.witness.fork())
    }

    /// These disks in place of its own, in a machine of their own.
    #[must_use]
    pub fn with_disks(
        &self,
        seed: u64,
        disks: impl IntoIterator<Item = SimDisk>,
        witness: Arc<Witness>,
    ) -> Self {
        let sim = Sim::new(seed);
        let disks = disks.into_iter().map(|disk| sim.install(disk)).collect();
        let (shape, sets, victims) = (self.shape.clone(), self.sets.clone(), self.victims.clone());
        Self { shape, sim, disks, witness, sets, plant: None, serving: Arc::default(), victims }
    }

    /// Devices of the present boot for some disks, in the order given.
    #[must_use]
    pub fn plug(&self, disks: &[usize]) -> Vec<Arc<dyn Device>> {
        disks.iter().map(|disk| self.plug_one(*disk)).collect()
    }

    /// A device of the present boot for one disk.
    #[must_use]
    pub fn plug_one(&self, disk: usize) -> Arc<dyn Device> {
        let device = self.sim.plug(&self.disks[disk]);
        match &self.plant {
            Some(plant) if plant.disk.is_none_or(|only| only == disk) => {
                Buggy::plant(device, plant.bug.clone(), &self.sim.runtime())
            }
            _ => device,
        }
    }

    /// The disks an administrator would give: all that carry a superblock, be it a damaged one.
    #[must_use]
    pub fn members(&self) -> Vec<usize> {
        let is_blank =
            |disk: &SimDisk| disk.try_peek(SUPERBLOCK.start, 4).is_some_and(|magic| magic == [0; 4]);
        let disks = self.disks.iter().enumerate();
        disks.filter(|(_, disk)| !is_blank(disk)).map(|(number, _)| number).collect()
    }

    /// From now on, tells which disks the array calls in sync, each with its slot: as of the last moment that it ran.
    #[must_use]
    pub fn track(&self) -> Arc<Mutex<Holders>> {
        let current = Arc::new(Mutex::new(self.slots().into_iter().map(|slot| (slot, slot)).collect()));
        let (disks, serving, noted) = (self.disks.clone(), Arc::clone(&self.serving), Arc::clone(&current));
        self.sim.watch(Some(Box::new(move |moment| {
            if moment == Moment::Between
                && let Some(volume) = serving.lock().upgrade()
            {
                *noted.lock() = in_sync(&disks, &volume.status());
            }
        })));
        current
    }

    /// All slots.
    #[must_use]
    pub fn slots(&self) -> Vec<usize> {
        (0..self.shape.members).collect()
    }

    /// Assembles the array from `members`.
    pub async fn assemble(&self, members: Vec<Arc<dyn Device>>) -> raid::Result<Arc<Volume>> {
        let options = AssembleOptions::default();
        let volume = Volume::assemble(members, options, self.sim.runtime()).await?;
        *self.serving.lock() = Arc::downgrade(&volume);
        Ok(volume)
    }

    /// Assembles the array as it must be possible; panics if it is refused. `None`: the refusal is excused, because
    /// besides the victims a power cut has destroyed the only superblock of another member.
    pub async fn start(&self, members: Vec<Arc<dyn Device>>) -> Option<Arc<Volume>> {
        let names: Vec<String> = members.iter().map(|member| member.name().to_owned()).collect();
        match self.assemble(members).await {
            Ok(volume) => Some(volume),
            Err(_) if self.is_beyond_one_failure() => None,
            Err(error) => panic!("the array does not start from {names:?}: {error}\n{}", self.describe()),
        }
    }

    /// What the disks' superblocks say, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let one = |disk: &Arc<SimDisk>| {
            let bytes = disk.peek(SUPERBLOCK.start, SUPERBLOCK.end - SUPERBLOCK.start);
            match Superblock::decode(&bytes, disk.size()) {
                Err(error) => format!("{}: {error}", disk.name()),
                Ok(found) => format!(
                    "{}: number {}, events {}, resync from {}, recovery {:?}, replacement {}, roles {:?}",
                    disk.name(),
                    found.dev_number,
                    found.events,
                    found.resync_offset,
                    found.recovery,
                    found.replacement,
                    &found.roles[..found.roles.len().min(8)],
                ),
            }
        };
        self.disks.iter().map(one).collect::<Vec<_>>().join("\n")
    }

    /// Whether a member that is no victim has lost its superblock while there are victims. A member has one
    /// superblock; while its mirrors are out of date, a harsh disk can take it away in mid-write.
    fn is_beyond_one_failure(&self) -> bool {
        let lost = |disk: &Arc<SimDisk>| {
            let bytes = disk.try_peek(SUPERBLOCK.start, SUPERBLOCK.end - SUPERBLOCK.start);
            bytes.is_none_or(|bytes| Superblock::decode(&bytes, disk.size()).is_err())
        };
        !self.victims.is_empty() && self.without(&self.victims).iter().any(|slot| lost(&self.disks[*slot]))
    }

    /// Boots, assembles from these disks and reads everything; panics if the array does not start or the model
    /// objects. Returns which disks the array then calls in sync, each with its slot (none, when its refusal to start
    /// is excused). The volume is dropped without a stop.
    #[allow(clippy::must_use_candidate, reason = "the check is what it is called for")]
    pub fn check_with(&self, disks: &[usize]) -> Holders {
        let outcome = self.sim.block_on(async {
            let volume = self.start(self.plug(disks)).await?;
            self.witness.read_all(&*volume).await;
            Some(volume.status())
        });
        if let Some(violation) = self.witness.violation() {
            panic!("with disks {disks:?}: {violation}");
        }
        outcome.expect("no cut is set").map_or_else(Vec::new, |status| in_sync(&self.disks, &status))
    }

    /// Equal digests mean that starts from these disks, in this order, are judged alike.
    #[must_use]
    pub fn digest(&self, disks: &[usize]) -> u64 {
        let disk =
            |sum: u64, disk: &usize| scramble(scramble(sum ^ self.disks[*disk].digest()) ^ *disk as u64);
        disks.iter().fold(self.witness.digest_after_cut(), disk)
    }

    /// Whether a disk's superblock gives it a slot and all that belongs there, and no newer one takes that back. Where a
    /// member has become whole or was replaced a moment ago, what the array says and what is on record may differ.
    #[must_use]
    pub fn knows_that_it_counts(&self, disk: usize) -> bool {
        let read = |disk: &Arc<SimDisk>| {
            let bytes = disk.peek(SUPERBLOCK.start, SUPERBLOCK.end - SUPERBLOCK.start);
            Superblock::decode(&bytes, disk.size()).ok()
        };
        // One that can't be read has a second copy, or is missed elsewhere.
        let Some(its) = read(&self.disks[disk]) else { return true };
        let is_whole =
            matches!(its.own_role(), Role::Active(_)) && its.recovery.is_none() && !its.replacement;
        let mut others = self.disks.iter().filter_map(read);
        let taken_back =
            |other: Superblock| other.events > its.events && other.role_of(its.dev_number) == Role::Faulty;
        is_whole && !others.any(taken_back)
    }

    /// Whether members in these slots hold a copy of everything together.
    #[must_use]
    pub fn covers(&self, slots: &[usize]) -> bool {
        self.sets.iter().all(|set| set.iter().any(|slot| slots.contains(slot)))
    }

    /// A boot is over: the power goes in this style, if it has not yet, and the model is asked.
    pub fn end<T>(&self, outcome: &Result<T, PowerCut>, style: CutStyle) {
        let killed = style == CutStyle::ProcessKilled;
        if outcome.is_ok() {
            self.sim.cut_now();
        }
        if killed {
            self.witness.process_killed();
        } else {
            self.witness.power_cut();
        }
        self.witness.judge();
    }

    /// The power goes, wherever it is.
    pub fn cut(&self) {
        self.sim.cut_now();
        self.witness.power_cut();
    }

    /// Members that may fail together: of each set of mirrors one stays.
    #[must_use]
    pub fn choose_victims(&self, rng: &mut Rng) -> Vec<usize> {
        let sets: Vec<_> = self.dispensable().into_iter().filter(|set| !set.is_empty()).collect();
        rng.pick(&sets).clone()
    }

    /// All sets of members that the array can do without, from nobody to the largest.
    #[must_use]
    pub fn dispensable(&self) -> Vec<Vec<usize>> {
        let members = self.shape.members;
        let sets = (0..1u32 << members)
            .map(|bits| (0..members).filter(|slot| bits >> slot & 1 == 1).collect::<Vec<_>>());
        sets.filter(|set| self.covers(&self.without(set))).collect()
    }

    /// All slots but these.
    #[must_use]
    pub fn without(&self, gone: &[usize]) -> Vec<usize> {
        self.slots().into_iter().filter(|slot| !gone.contains(slot)).collect()
    }
}

/// The disks that an array calls in sync, each with its slot.
#[must_use]
pub fn in_sync(disks: &[Arc<SimDisk>], status: &Status) -> Holders {
    let in_sync = status.members.iter().filter(|member| member.state == MemberState::InSync);
    let disk = |path: &str| disks.iter().position(|disk| disk.name() == path);
    in_sync.filter_map(|member| Some((disk(&member.path)?, member.slot?))).collect()
}

async fn create_on(rig: &Rig, options: &CreateOptions) -> raid::Result<()> {
    create(&rig.plug(&rig.slots()), options, &*rig.sim.runtime()).await.map(drop)
}
