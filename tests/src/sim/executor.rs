//! The simulated machine: one thread, virtual time, and every choice from one seed.
//!
//! Owns: the tasks, the clock, the calendar of what happens when (timers and completions of disk operations), the
//! count of I/O boundaries, the scheduled power cut, and the hash of everything that happened.
//!
//! Invariants:
//! - The same seed and the same code give the same [`Sim::trace`], run after run.
//! - The processor is infinitely fast: time passes only when no task can run. Among those that can, chance picks.
//! - A power cut happens at a boundary (an operation submitted, or completed): what was in flight never completes,
//!   no task runs again, and handles of that boot (its runtime, its plugged disks) are dead for ever.
//! - Nothing can run and nothing is due: that is a deadlock, and a panic that names what disks still owe.

use super::disk::{SimDisk, SimDiskOptions};
use super::rng::{Rng, scramble};
use super::seeds::tracing;
use parking_lot::Mutex;
use raid::runtime::{BoxFuture, Runtime};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

/// The future given to [`Sim::block_on`], among the ids of tasks.
const MAIN: u64 = 0;
/// Polls without virtual time passing, after which tasks are taken to be waking each other for ever.
const LIVELOCK: u64 = 1_000_000;
/// 2026-01-01, where the simulated wall clock starts.
const WALL_CLOCK_START: Duration = Duration::from_secs(1_767_225_600);

/// The power went before the future came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerCut;

/// What a power cut leaves of unflushed sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutStyle {
    /// One in ten is clean; else each sector is old or new by chance, with torn and unreadable ones where the
    /// disk's options allow them.
    Chance,
    /// `kill -9`: the operating system lives on, so every completed write survives; what is in flight may not.
    ProcessKilled,
    /// Everything that is not flushed is gone.
    AllLost,
    /// The i-th unflushed sector (disk by disk, ascending) is new if bit `i % 64` is set, else old. Never torn.
    Subset(u64),
}

/// When a watcher of a machine is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Between two polls: no code of the machine is under way, none of its locks is held.
    Between,
    /// An operation was submitted or has completed, and nobody was told yet.
    Boundary,
}

type Watcher = Box<dyn FnMut(Moment) + Send>;

/// A seeded machine with its disks. Disks and clock outlive power cuts; tasks do not.
pub struct Sim {
    shared: Arc<Shared>,
}

/// What handles of a boot hold on to.
pub(super) struct Shared {
    core: Mutex<Core>,
    /// Apart from `core`, so that a waker may run while `core` is locked.
    ready: Mutex<Vec<u64>>,
    watcher: Mutex<Option<Watcher>>,
}

impl Shared {
    fn tell(&self, moment: Moment) {
        if let Some(watcher) = &mut *self.watcher.lock() {
            watcher(moment);
        }
    }
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Core {
    seed: u64,
    boot: u64,
    now: Duration,
    /// Whether the wall clock stands still.
    still: bool,
    /// Drives scheduling and disks.
    rng: Rng,
    /// Drives [`Runtime::fill_random`]: apart, so that an engine that draws one more UUID keeps its schedule.
    random: Rng,
    tasks: BTreeMap<u64, (Task, Arc<Bell>)>,
    spawned: Vec<(u64, Task)>,
    next_id: u64,
    /// Keyed by time and then by order of entry: two entries never share a key.
    calendar: BTreeMap<(Duration, u64), Due>,
    next_entry: u64,
    boundaries: u64,
    cut_at: Option<u64>,
    cut: bool,
    style: CutStyle,
    unflushed_at_cut: u32,
    trace: u64,
    disks: Vec<Arc<SimDisk>>,
    patience: Duration,
}

enum Due {
    Wake(Waker),
    Complete { disk: Arc<SimDisk>, operation: u64 },
}

/// Wakes one task of one boot.
struct Bell {
    shared: Arc<Shared>,
    id: u64,
    rung: AtomicBool,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::Relaxed) {
            self.shared.ready.lock().push(self.id);
        }
    }
}

impl Sim {
    /// A machine whose every choice follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let core = Core {
            seed,
            boot: 0,
            now: Duration::ZERO,
            still: false,
            random: rng.fork(),
            rng,
            tasks: BTreeMap::new(),
            spawned: Vec::new(),
            next_id: MAIN + 1,
            calendar: BTreeMap::new(),
            next_entry: 0,
            boundaries: 0,
            cut_at: None,
            cut: false,
            style: CutStyle::Chance,
            unflushed_at_cut: 0,
            trace: scramble(seed),
            disks: Vec::new(),
            patience: Duration::from_secs(3600),
        };
        Self {
            shared: Arc::new(Shared {
                core: Mutex::new(core),
                ready: Mutex::new(Vec::new()),
                watcher: Mutex::new(None),
            }),
        }
    }

    /// The seed it was made with.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.shared.core.lock().seed
    }

    /// A new, blank disk of `size` bytes in this machine.
    #[must_use]
    pub fn disk(&self, name: &str, size: u64, options: SimDiskOptions) -> Arc<SimDisk> {
        self.install(SimDisk::blank(name, size, options))
    }

    /// Puts a disk in this machine, for instance a [`SimDisk::copy`] of one prepared in another.
    #[must_use]
    pub fn install(&self, disk: SimDisk) -> Arc<SimDisk> {
        let mut core = self.shared.core.lock();
        let disk = Arc::new(disk);
        disk.reseed(core.rng.fork());
        core.disks.push(Arc::clone(&disk));
        disk
    }

    /// Connects `disk` to the present boot: a [`Device`](raid::device::Device) that dies with the next power cut.
    #[must_use]
    pub fn plug(&self, disk: &Arc<SimDisk>) -> Arc<dyn raid::device::Device> {
        let boot = self.shared.core.lock().boot;
        Arc::new(super::port::Plugged::new(Arc::clone(disk), Link { shared: Arc::clone(&self.shared), boot }))
    }

    /// The runtime of the present boot; dies with the next power cut.
    #[must_use]
    pub fn runtime(&self) -> Arc<dyn Runtime> {
        let boot = self.shared.core.lock().boot;
        Arc::new(SimRuntime(Link { shared: Arc::clone(&self.shared), boot }))
    }

    /// Lets the wall clock stand still, and takes random bytes from a stream of this number: then what different
    /// seeds leave on disks differs only where it matters.
    pub fn stand_still(&self, stream: u64) {
        let mut core = self.shared.core.lock();
        core.still = true;
        core.random = Rng::new(scramble(!stream));
    }

    /// Tells `watcher` of every moment from now on, or nobody.
    pub fn watch(&self, watcher: Option<Box<dyn FnMut(Moment) + Send>>) {
        *self.shared.watcher.lock() = watcher;
    }

    /// How many operations were submitted or completed so far, on all disks together.
    #[must_use]
    pub fn boundaries(&self) -> u64 {
        self.shared.core.lock().boundaries
    }

    /// Cuts the power at the `n`-th I/O boundary from now (the next one is 1); `None` calls it off.
    pub fn cut_after(&self, n: Option<u64>) {
        let mut core = self.shared.core.lock();
        core.cut_at = n.map(|n| core.boundaries + n.max(1));
    }

    /// What the following power cuts leave of unflushed sectors.
    pub fn set_cut_style(&self, style: CutStyle) {
        self.shared.core.lock().style = style;
    }

    /// How many sectors the last cut of style [`CutStyle::Subset`] had to decide.
    #[must_use]
    pub fn unflushed_at_cut(&self) -> u32 {
        self.shared.core.lock().unflushed_at_cut
    }

    /// Cuts the power here and now, between two calls of [`Sim::block_on`], and boots again.
    pub fn cut_now(&self) {
        self.shared.core.lock().cut = true;
        self.crash();
    }

    /// A hash of all that happened: equal traces mean equal runs.
    #[must_use]
    pub fn trace(&self) -> u64 {
        self.shared.core.lock().trace
    }

    /// Virtual time since the machine was made.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.shared.core.lock().now
    }

    /// A generator for the test's own choices, following from the machine's seed.
    #[must_use]
    pub fn fork_rng(&self) -> Rng {
        self.shared.core.lock().rng.fork()
    }

    /// How much virtual time one [`Sim::block_on`] may take before it counts as hung (an hour unless set).
    pub fn set_patience(&self, patience: Duration) {
        self.shared.core.lock().patience = patience;
    }

    /// Runs `future`, and beside it every spawned task, until it ends or the power goes.
    ///
    /// Tasks that are still running when `future` ends stay, and go on in the next call.
    ///
    /// # Panics
    /// On deadlock, on livelock, and when the future needs more virtual time than the patience allows.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> Result<T, PowerCut> {
        let mut future = pin!(future);
        let main =
            Arc::new(Bell { shared: Arc::clone(&self.shared), id: MAIN, rung: AtomicBool::new(false) });
        main.wake_by_ref();
        let deadline = {
            let core = self.shared.core.lock();
            core.now + core.patience
        };
        let mut polls = 0;
        loop {
            self.adopt_spawned();
            let Some(id) = self.pick_ready() else {
                self.pass_time(deadline);
                if self.crash() {
                    return Err(PowerCut);
                }
                polls = 0;
                continue;
            };
            self.shared.tell(Moment::Between);
            polls += 1;
            if polls > LIVELOCK {
                self.give_up("livelock: tasks wake each other and no time passes");
            }
            if id == MAIN {
                main.rung.store(false, Ordering::Relaxed);
                let waker = Waker::from(Arc::clone(&main));
                if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                    // A cut that this very poll ran into came before the future's end could be seen by anyone.
                    if self.crash() {
                        return Err(PowerCut);
                    }
                    self.shared.ready.lock().retain(|ready| *ready != MAIN);
                    return Ok(done);
                }
            } else {
                self.poll_task(id);
            }
            if self.crash() {
                return Err(PowerCut);
            }
        }
    }

    /// Runs the spawned tasks for `time`.
    pub fn idle(&self, time: Duration) -> Result<(), PowerCut> {
        let sleep = self.runtime().sleep(time);
        self.block_on(sleep)
    }

    fn adopt_spawned(&self) {
        let mut core = self.shared.core.lock();
        for (id, task) in std::mem::take(&mut core.spawned) {
            let bell = Arc::new(Bell { shared: Arc::clone(&self.shared), id, rung: AtomicBool::new(false) });
            bell.wake_by_ref();
            core.tasks.insert(id, (task, bell));
        }
    }

    fn pick_ready(&self) -> Option<u64> {
        let mut ready = self.shared.ready.lock();
        if ready.is_empty() {
            return None;
        }
        let mut core = self.shared.core.lock();
        let at = core.rng.below(ready.len() as u64) as usize;
        let id = ready.swap_remove(at);
        core.note(&[1, id]);
        Some(id)
    }

    fn poll_task(&self, id: u64) {
        // A wake-up of a task that has ended finds nothing.
        let Some((mut task, bell)) = self.shared.core.lock().tasks.remove(&id) else { return };
        bell.rung.store(false, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&bell));
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
            self.shared.core.lock().tasks.insert(id, (task, bell));
        }
    }

    /// Goes to the next entry of the calendar and lets it happen.
    fn pass_time(&self, deadline: Duration) {
        let due = {
            let mut core = self.shared.core.lock();
            match core.calendar.pop_first() {
                None => None,
                Some(((at, entry), due)) => {
                    core.now = core.now.max(at);
                    let now = core.now;
                    core.note(&[2, entry, now.as_nanos() as u64]);
                    Some((now, due))
                }
            }
        };
        match due {
            None => self.give_up("deadlock: no task can run and nothing is due"),
            Some((now, _)) if now > deadline => self.give_up("hung: out of patience"),
            Some((_, Due::Wake(waker))) => waker.wake(),
            Some((_, Due::Complete { disk, operation })) => {
                let what = if tracing() { disk.describe(operation) } else { String::new() };
                if let Some(result) = disk.complete(operation) {
                    let mut core = self.shared.core.lock();
                    if tracing() {
                        let end = if result == u64::MAX { "fail" } else { "complete" };
                        eprintln!("{:?} boundary {}: {end} {what}", core.now, core.boundaries + 1);
                    }
                    core.note(&[3, operation, result]);
                    core.boundary();
                    drop(core);
                    self.shared.tell(Moment::Boundary);
                }
            }
        }
    }

    /// If the power is cut: ends every task, settles the disks, and boots again.
    fn crash(&self) -> bool {
        let (tasks, spawned, calendar, disks, style, mut rng);
        {
            let mut core = self.shared.core.lock();
            if !core.cut {
                return false;
            }
            core.cut = false;
            core.cut_at = None;
            core.boot += 1;
            tasks = std::mem::take(&mut core.tasks);
            spawned = std::mem::take(&mut core.spawned);
            calendar = std::mem::take(&mut core.calendar);
            disks = core.disks.clone();
            style = core.style;
            rng = core.rng.fork();
            let boot = core.boot;
            core.note(&[4, boot]);
        }
        // Outside the lock: what these own may wake, spawn or submit as it is dropped (and finds its boot dead).
        drop((tasks, spawned, calendar));
        if tracing() {
            eprintln!("power cut ({style:?})");
        }
        self.shared.ready.lock().clear();
        let clean = rng.one_in(1, 10);
        let mut position = 0;
        for disk in &disks {
            disk.power_cut(style, clean, &mut rng, &mut position);
        }
        self.shared.core.lock().unflushed_at_cut = position;
        true
    }

    fn give_up(&self, why: &str) -> ! {
        let (seed, now, tasks, disks) = {
            let core = self.shared.core.lock();
            (core.seed, core.now, core.tasks.len(), core.disks.clone())
        };
        let owed: Vec<String> = disks.iter().flat_map(|disk| disk.in_flight()).collect();
        panic!(
            "{why} (seed {seed}, virtual time {now:?}, {tasks} tasks waiting, in flight: {})",
            if owed.is_empty() { "nothing".to_owned() } else { owed.join("; ") }
        );
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        // Tasks hold their bells, bells hold the machine: without this cut the circle would never be freed.
        drop(self.shared.watcher.lock().take());
        let mut core = self.shared.core.lock();
        core.boot += 1;
        let held = (
            std::mem::take(&mut core.tasks),
            std::mem::take(&mut core.spawned),
            std::mem::take(&mut core.calendar),
            std::mem::take(&mut core.disks),
        );
        drop(core);
        drop(held);
    }
}

impl Core {
    fn note(&mut self, what: &[u64]) {
        for word in what {
            self.trace = scramble(self.trace ^ word);
        }
    }

    /// Counts an I/O boundary; here the power goes when that is scheduled.
    fn boundary(&mut self) {
        self.boundaries += 1;
        if self.cut_at == Some(self.boundaries) {
            self.cut = true;
        }
    }

    fn enter(&mut self, at: Duration, due: Due) {
        let entry = self.next_entry;
        self.next_entry += 1;
        self.calendar.insert((at, entry), due);
    }
}

/// A handle's tie to the boot it was made in.
#[derive(Clone)]
pub(super) struct Link {
    shared: Arc<Shared>,
    boot: u64,
}

impl Link {
    /// Counts the submission of `operation` and enters its completion in the calendar, `latency` from now (never,
    /// when that is `None`).
    pub(super) fn submit(
        &self,
        disk: &Arc<SimDisk>,
        operation: u64,
        what: &[u64],
        latency: Option<Duration>,
    ) {
        let mut core = self.shared.core.lock();
        core.note(what);
        if tracing() {
            eprintln!("{:?} boundary {}: submit {}", core.now, core.boundaries + 1, disk.describe(operation));
        }
        if let Some(latency) = latency {
            let at = core.now + latency;
            core.enter(at, Due::Complete { disk: Arc::clone(disk), operation });
        }
        core.boundary();
        drop(core);
        self.shared.tell(Moment::Boundary);
    }

    /// Counts an operation that was done where it stood.
    pub(super) fn done(&self, what: &[u64]) {
        let mut core = self.shared.core.lock();
        core.note(what);
        core.boundary();
        drop(core);
        self.shared.tell(Moment::Boundary);
    }

    /// Whether the machine still runs the boot of this handle.
    pub(super) fn alive(&self) -> bool {
        let core = self.shared.core.lock();
        core.boot == self.boot && !core.cut
    }
}

struct SimRuntime(Link);

impl Runtime for SimRuntime {
    fn now(&self) -> Duration {
        self.0.shared.core.lock().now
    }

    fn wall_clock(&self) -> Duration {
        let core = self.0.shared.core.lock();
        if core.still { WALL_CLOCK_START } else { WALL_CLOCK_START + core.now }
    }

    fn fill_random(&self, out: &mut [u8]) {
        let mut core = self.0.shared.core.lock();
        for chunk in out.chunks_mut(8) {
            let word = core.random.draw().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        let mut core = self.0.shared.core.lock();
        if core.boot != self.0.boot {
            return;
        }
        // After a cut in the midst of the spawning task's turn, it waits here to go with all others: whoever waits for
        // it has lost its power too and must not be told anything.
        let id = core.next_id;
        core.next_id += 1;
        core.spawned.push((id, task));
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        let until = self.now() + time;
        Box::pin(Sleep { link: self.0.clone(), until, entered: None })
    }
}

struct Sleep {
    link: Link,
    until: Duration,
    /// Whom the calendar will wake for this sleep.
    entered: Option<Waker>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let shared = Arc::clone(&self.link.shared);
        let mut core = shared.core.lock();
        if core.boot != self.link.boot {
            return Poll::Pending;
        }
        if core.now >= self.until {
            return Poll::Ready(());
        }
        // A sleep that moves to another task leaves its earlier entry behind: a wake-up without effect.
        if !self.entered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            core.enter(self.until, Due::Wake(cx.waker().clone()));
            self.entered = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}
