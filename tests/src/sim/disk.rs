//! A simulated disk with a volatile cache, and every way of failing that real ones have.
//!
//! It is (through `port`) a real implementation of [`Device`](raid::device::Device): engine code can't tell it from a file. What it promises is what the
//! vocabulary promises, and not a bit more; within that, the seed picks what hurts most:
//!
//! - Operations complete in any order. A write reaches the cache when it is submitted, when it completes, or half
//!   then and half then; a read is taken at either end. So overlapping operations in flight see each other by chance.
//! - A flush makes durable exactly the writes that completed before it was submitted. A stable write makes itself
//!   durable, and nothing else. Everything else lives in the cache only, version over version, sector by sector.
//! - At a power cut each sector of the cache becomes durable in one of its versions, or stays as it was, or, where
//!   the options allow it, tears (front of one version, back of another) or can't be read until written again.
//! - A failed write leaves each of its sectors old or new. A failed flush makes part of what it covered durable and
//!   dooms the rest: visible until the power goes, gone then, whatever flush succeeds later (Linux marks the pages clean).
//! - A discarded sector keeps its bytes, reads as zeroes, or as garbage: per disk and operation, but for good.
//!
//! Everything is in sectors of 512 bytes. Requests may begin and end anywhere; a partial sector is merged with what
//! is visible, as a page cache does.

use super::executor::CutStyle;
use super::rng::Rng;
use super::surface::{Remains, SECTOR, Surface, digest};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use raid::device::{Durability, Extent, check_range};
use raid::error::{Error, Operation, Result};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;

/// How a simulated disk behaves when nothing is wrong, and how badly a power cut treats it.
#[derive(Debug, Clone)]
pub struct SimDiskOptions {
    /// Microseconds an operation takes.
    pub latency: Range<u64>,
    /// Of 1000 operations, how many take twenty times as long.
    pub stragglers: u64,
    /// Of 1000 reads and writes that would rather not wait, how many need not. Those fail at times, too.
    pub instant: u64,
    /// Of 1000 unflushed sectors at a power cut, how many tear inside.
    pub torn: u64,
    /// Of 1000 unflushed sectors at a power cut, how many can't be read afterwards.
    pub unreadable: u64,
}

impl Default for SimDiskOptions {
    /// Sectors are written whole or not at all, as disks promise and most engines assume.
    fn default() -> Self {
        Self { latency: 20..2000, stragglers: 20, instant: 0, torn: 0, unreadable: 0 }
    }
}

impl SimDiskOptions {
    /// The disk of `facts`: unflushed sectors may also tear or become unreadable. Some operations are done at once.
    #[must_use]
    pub fn harsh() -> Self {
        Self { torn: 30, unreadable: 30, instant: 500, ..Self::default() }
    }
}

/// An error that a disk is set up to answer with.
#[derive(Debug, Clone)]
pub struct Fault {
    /// To which operations.
    pub operations: Vec<Operation>,
    /// If the operation touches this range of bytes (flushes touch every range).
    pub within: Range<u64>,
    /// After this many operations that matched and were spared.
    pub spare: u32,
    /// For this many operations; `u32::MAX` is for ever.
    pub times: u32,
    /// With this error.
    pub errno: Errno,
    /// Parts of a write that fails may be stored all the same.
    pub lands: bool,
}

impl Fault {
    /// EIO, once, on the next of `operations`.
    #[must_use]
    pub fn once(operations: &[Operation]) -> Self {
        Self {
            operations: operations.to_vec(),
            within: 0..u64::MAX,
            spare: 0,
            times: 1,
            errno: Errno::IO,
            lands: true,
        }
    }

    /// EIO on every one of `operations` from now on.
    #[must_use]
    pub fn lasting(operations: &[Operation]) -> Self {
        Self { times: u32::MAX, ..Self::once(operations) }
    }
}

/// How a write goes wrong without telling anyone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SilentFault {
    /// Acknowledged, and stored nowhere.
    Lost,
    /// Stored this many bytes further on.
    Misdirected(u64),
}

/// A disk. Its content outlives power cuts; reach it through [`Sim::plug`](super::Sim::plug).
pub struct SimDisk {
    name: String,
    /// Grows only.
    size: AtomicU64,
    options: SimDiskOptions,
    state: Mutex<State>,
}

struct State {
    surface: Surface,
    in_flight: BTreeMap<u64, InFlight>,
    next_operation: u64,
    /// Writes completed so far: a flush covers those that completed up to its own submission.
    completed_writes: u64,
    faults: Vec<Fault>,
    silent: Vec<SilentFault>,
    extra_latency: Duration,
    hangs: bool,
    gone: bool,
    rng: Rng,
    counts: Counts,
}

/// What a power cut at some moment may leave of a disk.
#[derive(Clone)]
pub struct Wreckage {
    name: String,
    size: u64,
    options: SimDiskOptions,
    remains: Remains,
}

impl Wreckage {
    /// How many contents each sector may have that has more than one.
    pub fn open(&self) -> impl Iterator<Item = u64> {
        self.remains.open()
    }

    /// Equal digests mean equal choices.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.remains.digest()
    }

    /// The disk with one of its contents for each open sector: `choose(n)` picks one of n, 0 being the durable one.
    #[must_use]
    pub fn settle(&self, choose: impl FnMut(u64) -> u64) -> SimDisk {
        let disk = SimDisk::blank(&self.name, self.size, self.options.clone());
        disk.state.lock().surface = self.remains.settle(choose);
        disk
    }
}

/// What a disk was asked to do so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads submitted.
    pub reads: u64,
    /// Writes submitted, write zeroes included.
    pub writes: u64,
    /// Those of them that were to be durable when they completed.
    pub stable_writes: u64,
    /// Flushes submitted.
    pub flushes: u64,
    /// Discards submitted.
    pub discards: u64,
}

/// What a port asks of its disk.
pub(super) enum Request {
    Read { at: u64, buf: BytesMut },
    Write { at: u64, data: Bytes, durability: Durability },
    Zero { at: u64, len: u64, durability: Durability },
    Discard { at: u64, len: u64 },
    Flush,
}

impl Request {
    fn shape(&self) -> (Operation, u64, u64) {
        match self {
            Self::Read { at, buf } => (Operation::Read, *at, buf.len() as u64),
            Self::Write { at, data, .. } => (Operation::Write, *at, data.len() as u64),
            Self::Zero { at, len, .. } => (Operation::WriteZeroes, *at, *len),
            Self::Discard { at, len } => (Operation::Discard, *at, *len),
            Self::Flush => (Operation::Flush, 0, 0),
        }
    }

    fn is_stable(&self) -> bool {
        matches!(self, Self::Write { durability, .. } | Self::Zero { durability, .. } if *durability == Durability::Stable)
    }

    /// Refuses what reaches past the end, which is where who asks believes it to be.
    pub(super) fn check(&self, size: u64) -> Result<()> {
        let (operation, at, len) = self.shape();
        check_range(operation, at, len, size)
    }
}

struct InFlight {
    operation: Operation,
    at: u64,
    len: u64,
    work: Work,
    verdict: Option<Errno>,
    reply: oneshot::Sender<Result<BytesMut>>,
}

enum Work {
    /// `taken` is what the read saw at its submission, if it looks then.
    Read { buf: BytesMut, taken: bool },
    /// The sectors not yet in the cache, and where the write begins and ends for the rest.
    Change { left: Vec<(u64, Change)>, touched: Range<u64>, durability: Durability },
    /// Covers what had completed by then.
    Flush { covers: u64 },
}

/// New bytes for one sector.
#[derive(Clone)]
struct Change {
    from: usize,
    bytes: Bytes,
}

impl SimDisk {
    /// A disk of zeroes.
    #[must_use]
    pub fn blank(name: &str, size: u64, options: SimDiskOptions) -> Self {
        let state = State {
            surface: Surface::default(),
            in_flight: BTreeMap::new(),
            next_operation: 0,
            completed_writes: 0,
            faults: Vec::new(),
            silent: Vec::new(),
            extra_latency: Duration::ZERO,
            hangs: false,
            gone: false,
            rng: Rng::new(0),
            counts: Counts::default(),
        };
        Self { name: name.to_owned(), size: AtomicU64::new(size), options, state: Mutex::new(state) }
    }

    /// A disk with the same content (cache included), for another machine. Nothing in flight, no fault set.
    #[must_use]
    pub fn copy(&self) -> Self {
        let copy = Self::blank(&self.name, self.size(), self.options.clone());
        copy.state.lock().surface = self.state.lock().surface.clone();
        copy
    }

    pub(super) fn reseed(&self, rng: Rng) {
        self.state.lock().rng = rng;
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Adds zeroes at its end. Who has it open finds that out by [`Device::refresh`](raid::device::Device::refresh).
    pub fn grow(&self, size: u64) {
        let before = self.size.fetch_max(size, Ordering::Relaxed);
        assert!(before <= size, "{} would shrink", self.name);
    }

    /// Why its size can't be asked for now, if it can't.
    pub(super) fn absence(&self) -> Option<Error> {
        let gone = self.state.lock().gone;
        gone.then(|| Error::Size { device: self.name.clone(), errno: Errno::NODEV })
    }

    /// What it was asked to do so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.state.lock().counts
    }

    /// Sectors whose newest content is not durable.
    #[must_use]
    pub fn unflushed(&self) -> usize {
        self.state.lock().surface.unflushed()
    }

    /// Sets up an error.
    pub fn fail(&self, fault: Fault) {
        self.state.lock().faults.push(fault);
    }

    /// Sets up the next write to go wrong without an error.
    pub fn fail_silently(&self, how: SilentFault) {
        self.state.lock().silent.push(how);
    }

    /// Takes back every error, delay and absence set up (not what they did to the content).
    pub fn heal(&self) {
        let mut state = self.state.lock();
        state.faults.clear();
        state.silent.clear();
        state.extra_latency = Duration::ZERO;
        state.hangs = false;
        state.gone = false;
    }

    /// Makes the sectors of a range unreadable until they are written again.
    pub fn decay(&self, range: Range<u64>) {
        let mut state = self.state.lock();
        for sector in sectors(range.start, range.end - range.start) {
            state.surface.make_unreadable(sector);
        }
    }

    /// Flips one bit of the content, unseen by anyone.
    pub fn flip(&self, byte: u64, bit: u8) {
        let mut one = self.peek(byte, 1);
        one[0] ^= 1 << (bit % 8);
        self.state.lock().surface.poke(byte, &one);
    }

    /// Delays every later operation.
    pub fn slow(&self, extra: Duration) {
        self.state.lock().extra_latency = extra;
    }

    /// Later operations never complete (until healed).
    pub fn hang(&self) {
        self.state.lock().hangs = true;
    }

    /// Pulls the cable: operations in flight and later ones fail until [`SimDisk::come_back`].
    pub fn vanish(&self) {
        self.state.lock().gone = true;
    }

    /// Plugs the cable in again; content and cache are as they were left.
    pub fn come_back(&self) {
        self.state.lock().gone = false;
    }

    /// The visible bytes of a range, past all faults.
    #[must_use]
    pub fn peek(&self, at: u64, len: u64) -> Vec<u8> {
        self.state.lock().surface.peek(at, len)
    }

    /// The visible bytes of a range, unless some of its sectors can't be read.
    #[must_use]
    pub fn try_peek(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.state.lock().surface.read(at, &mut bytes).is_ok().then_some(bytes)
    }

    /// Where something was ever stored in a range.
    pub(super) fn extents(&self, at: u64, len: u64) -> Vec<Extent> {
        self.state.lock().surface.extents(at, len)
    }

    /// The bytes of a range that would survive a power cut now if all that is unflushed were lost.
    #[must_use]
    pub fn peek_durable(&self, at: u64, len: u64) -> Vec<u8> {
        self.state.lock().surface.peek_durable(at, len)
    }

    /// What a power cut at this moment may leave.
    #[must_use]
    pub fn wreckage(&self) -> Wreckage {
        let state = self.state.lock();
        let mut surface = state.surface.clone();
        for (number, operation) in &state.in_flight {
            let Work::Change { left, .. } = &operation.work else { continue };
            for (sector, change) in left {
                // An unreadable sector can't take a part of itself: it stays as it is.
                apply(&mut surface, *number, *sector, change).unwrap_or_default();
            }
        }
        let (name, options) = (self.name.clone(), self.options.clone());
        Wreckage { name, size: self.size(), options, remains: surface.remains() }
    }

    /// Equal digests mean disks of equal content, now and after a cut that loses all that is unflushed.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.state.lock().surface.digest()
    }

    /// Overwrites bytes, durably, past all faults.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        assert!(at + bytes.len() as u64 <= self.size(), "past the end of {}", self.name);
        self.state.lock().surface.poke(at, bytes);
    }

    /// What is submitted and not completed, for messages.
    #[must_use]
    pub fn in_flight(&self) -> Vec<String> {
        self.state.lock().in_flight.values().map(|operation| self.show(operation)).collect()
    }

    /// One of those, for the running account.
    pub(super) fn describe(&self, number: u64) -> String {
        let state = self.state.lock();
        state.in_flight.get(&number).map_or_else(String::new, |o| format!("#{number} {}", self.show(o)))
    }

    fn show(&self, asked: &InFlight) -> String {
        let stable = match &asked.work {
            Work::Change { durability: Durability::Stable, .. } => "stable ",
            _ => "",
        };
        format!("{}: {stable}{} of {} bytes at {}", self.name, asked.operation, asked.len, asked.at)
    }

    /// Whether some operations are done at once.
    pub(super) fn is_instant(&self) -> bool {
        self.options.instant > 0
    }

    /// Does an operation where it stands, if chance allows that; answers what it gave, and what to note of it.
    pub(super) fn at_once(&self, request: Request) -> Option<(BytesMut, [u64; 5])> {
        {
            let mut state = self.state.lock();
            if state.hangs || !state.rng.one_in(self.options.instant, 1000) {
                return None;
            }
        }
        let (reply, mut answer) = oneshot::channel();
        let (number, _, note) = self.accept(request, reply);
        self.complete(number)?;
        Some((answer.try_recv().ok()?.ok()?, note))
    }

    /// Takes an operation in: its number, its latency (`None`: never completes), and what to note of it.
    pub(super) fn accept(
        &self,
        request: Request,
        reply: oneshot::Sender<Result<BytesMut>>,
    ) -> (u64, Option<Duration>, [u64; 5]) {
        let (operation, at, len) = request.shape();
        let mut state = self.state.lock();
        let state = &mut *state;
        state.count(operation);
        state.counts.stable_writes += u64::from(request.is_stable());
        let number = state.next_operation;
        state.next_operation += 1;
        let struck = if state.gone { Some((Errno::NODEV, true)) } else { state.strike(operation, at, len) };
        let (mut verdict, lands) = (struck.map(|(errno, _)| errno), struck.is_none_or(|(_, lands)| lands));
        let mut hash = 0;
        let work = match request {
            Request::Read { mut buf, .. } => {
                let taken = state.rng.one_in(1, 2);
                if taken && verdict.is_none() {
                    verdict = state.surface.read(at, &mut buf).err();
                }
                Work::Read { buf, taken }
            }
            Request::Write { at, data, durability } => {
                hash = digest(&data);
                let changes = if lands { slice(at, &data) } else { Vec::new() };
                state.begin_change(number, at, changes, durability, &mut verdict)
            }
            Request::Zero { at, len, durability } => {
                let changes = if lands { fill(at, len, 0) } else { Vec::new() };
                state.begin_change(number, at, changes, durability, &mut verdict)
            }
            Request::Discard { at, len } => {
                let changes = match state.rng.below(3) {
                    // Kept, and written again as it were: a flush covers what a discard left, too.
                    0 => slice(at, &state.surface.peek(at, len).into()),
                    1 => fill(at, len, 0),
                    _ => fill(at, len, state.rng.draw() as u8),
                };
                state.begin_change(number, at, changes, Durability::Cached, &mut verdict)
            }
            Request::Flush => Work::Flush { covers: state.completed_writes },
        };
        state.in_flight.insert(number, InFlight { operation, at, len, work, verdict, reply });
        let mut micros = state.rng.within(self.options.latency.clone());
        if state.rng.one_in(self.options.stragglers, 1000) {
            micros *= 20;
        }
        let latency =
            (!state.hangs).then_some(Duration::from_micros(micros).saturating_add(state.extra_latency));
        (number, latency, [operation as u64, number, at, len, hash])
    }

    /// Ends an operation; answers a digest of the outcome, or nothing when there is no such operation any more.
    pub(super) fn complete(&self, number: u64) -> Option<u64> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let InFlight { operation, at, len, work, mut verdict, reply } = state.in_flight.remove(&number)?;
        if state.gone {
            verdict = verdict.or(Some(Errno::IO));
        }
        let mut answer = BytesMut::new();
        match work {
            Work::Read { mut buf, taken } => {
                if !taken && verdict.is_none() {
                    verdict = state.surface.read(at, &mut buf).err();
                }
                answer = buf;
            }
            Work::Change { left, touched, durability } => {
                for (sector, change) in left {
                    // What is left of a failed write reaches the disk or not, sector by sector.
                    if verdict.is_none() || state.rng.one_in(1, 2) {
                        verdict = verdict.or(state.change(number, sector, &change).err());
                    }
                }
                state.completed_writes += 1;
                let stable = durability == Durability::Stable && verdict.is_none();
                state.surface.complete(number, touched, state.completed_writes, stable);
            }
            Work::Flush { covers } => match verdict {
                None => state.surface.flush(covers),
                Some(_) => state.surface.fail_flush(covers, &mut state.rng),
            },
        }
        let outcome = match verdict {
            None => Ok(answer),
            Some(errno) => Err(Error::Io { device: self.name.clone(), operation, at, len, errno }),
        };
        let hash = match &outcome {
            Ok(bytes) => digest(bytes),
            Err(_) => u64::MAX,
        };
        drop(guard);
        // The asker may have lost interest: a dropped operation still happens.
        drop(reply.send(outcome));
        Some(hash)
    }

    /// Ends everything in flight without an answer and settles what survives.
    pub(super) fn power_cut(&self, style: CutStyle, clean: bool, rng: &mut Rng, position: &mut u32) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let in_flight = std::mem::take(&mut state.in_flight);
        let mut late: Vec<_> = in_flight.into_iter().collect();
        rng.shuffle(&mut late);
        for (number, operation) in late {
            let Work::Change { left, touched, .. } = operation.work else { continue };
            for (sector, change) in left {
                if style != CutStyle::ProcessKilled || rng.one_in(1, 2) {
                    // An unreadable sector can't take a part of itself: it stays as it is.
                    state.change(number, sector, &change).unwrap_or_default();
                }
            }
            if style == CutStyle::ProcessKilled {
                state.completed_writes += 1;
                state.surface.complete(number, touched, state.completed_writes, false);
            }
        }
        match style {
            CutStyle::ProcessKilled => {}
            CutStyle::AllLost => state.surface.settle(|_, _| 0),
            CutStyle::Subset(bits) => state.surface.settle(|_, versions| {
                let bit = bits >> (*position % 64) & 1;
                *position += 1;
                if bit == 1 { versions - 1 } else { 0 }
            }),
            CutStyle::Chance if clean => state.surface.settle(|_, versions| versions - 1),
            CutStyle::Chance => match rng.below(6) {
                0 => state.surface.settle(|_, _| 0),
                1 => state.surface.settle(|_, versions| versions - 1),
                _ => {
                    state.surface.mangle(self.options.torn, self.options.unreadable, rng);
                    state.surface.settle(|_, versions| rng.below(versions as u64) as usize);
                }
            },
        }
    }
}

impl State {
    fn count(&mut self, operation: Operation) {
        match operation {
            Operation::Read => self.counts.reads += 1,
            Operation::Write | Operation::WriteZeroes => self.counts.writes += 1,
            Operation::Flush => self.counts.flushes += 1,
            Operation::Discard => self.counts.discards += 1,
            Operation::Open => {}
        }
    }

    /// The error that was set up for such an operation, if its turn has come, and whether the operation leaves traces.
    fn strike(&mut self, operation: Operation, at: u64, len: u64) -> Option<(Errno, bool)> {
        let whole = operation == Operation::Flush;
        let fault = self.faults.iter_mut().find(|fault| {
            let overlaps = at < fault.within.end && fault.within.start < at.saturating_add(len);
            fault.times > 0 && fault.operations.contains(&operation) && (whole || overlaps)
        })?;
        if fault.spare > 0 {
            fault.spare -= 1;
            return None;
        }
        if fault.times != u32::MAX {
            fault.times -= 1;
        }
        Some((fault.errno, fault.lands))
    }

    /// Lets the front of a change reach the cache (none of it, all of it, or a part), and keeps the rest for later.
    fn begin_change(
        &mut self,
        number: u64,
        at: u64,
        mut changes: Vec<(u64, Change)>,
        durability: Durability,
        verdict: &mut Option<Errno>,
    ) -> Work {
        let mut touched = changes.first().map_or(0, |(s, _)| *s)..changes.last().map_or(0, |(s, _)| *s + 1);
        if !self.silent.is_empty() && !changes.is_empty() {
            match self.silent.remove(0) {
                SilentFault::Lost => changes.clear(),
                SilentFault::Misdirected(by) => {
                    let by = (by + at % SECTOR).div_ceil(SECTOR);
                    for (sector, _) in &mut changes {
                        *sector += by;
                    }
                    touched = touched.start + by..touched.end + by;
                }
            }
        }
        let early = match self.rng.below(3) {
            0 => 0,
            1 => changes.len(),
            _ => self.rng.below(changes.len() as u64 + 1) as usize,
        };
        let left = changes.split_off(early);
        for (sector, change) in changes {
            if verdict.is_none() || self.rng.one_in(1, 2) {
                *verdict = verdict.or(self.change(number, sector, &change).err());
            }
        }
        Work::Change { left, touched, durability }
    }

    fn change(&mut self, number: u64, sector: u64, change: &Change) -> std::result::Result<(), Errno> {
        apply(&mut self.surface, number, sector, change)
    }
}

fn apply(surface: &mut Surface, number: u64, sector: u64, change: &Change) -> std::result::Result<(), Errno> {
    let data = if change.bytes.len() as u64 == SECTOR {
        change.bytes.clone()
    } else {
        let mut merged = vec![0; SECTOR as usize];
        surface.read(sector * SECTOR, &mut merged)?;
        merged[change.from..change.from + change.bytes.len()].copy_from_slice(&change.bytes);
        Bytes::from(merged)
    };
    surface.add(sector, number, data);
    Ok(())
}

fn sectors(at: u64, len: u64) -> Range<u64> {
    if len == 0 { 0..0 } else { at / SECTOR..(at + len).div_ceil(SECTOR) }
}

/// Cuts a payload into its sectors.
fn slice(at: u64, data: &Bytes) -> Vec<(u64, Change)> {
    let end = at + data.len() as u64;
    let one = |sector: u64| {
        let from = at.max(sector * SECTOR);
        let to = end.min((sector + 1) * SECTOR);
        let bytes = data.slice((from - at) as usize..(to - at) as usize);
        (sector, Change { from: (from % SECTOR) as usize, bytes })
    };
    sectors(at, data.len() as u64).map(one).collect()
}

/// The changes that fill a range with one byte.
fn fill(at: u64, len: u64, byte: u8) -> Vec<(u64, Change)> {
    let whole = Bytes::from(vec![byte; SECTOR as usize]);
    let one = |sector: u64| {
        let from = at.max(sector * SECTOR);
        let to = (at + len).min((sector + 1) * SECTOR);
        let bytes = whole.slice(..(to - from) as usize);
        (sector, Change { from: (from % SECTOR) as usize, bytes })
    };
    sectors(at, len).map(one).collect()
}
