//! The array as a block device: assembly, reads, writes, flush, and what becomes of members that fail.
//!
//! The rules, each held in one place:
//!
//! - *Dirty before data.* The bits of the regions a write touches, and the superblocks' "active", are durable on all
//!   live members before its data is submitted (`metadata::prepare`). A write into a region that is dirty already
//!   costs no bitmap I/O and no await; concurrent writers to new regions share one bitmap write.
//! - *One writer a place.* Writes, resync, rebuild, scrub and read repair hold a range lock over what they change (`range_lock`), so
//!   overlapping writes reach all legs in one order.
//! - *Failures before acknowledgements.* A leg that failed is recorded on the survivors, durably, before any write or
//!   flush that it missed is acknowledged, and all later ones wait for that (`metadata::recorded`).
//! - *The last copy stays.* A member is taken out only if every set of mirrors it belongs to has another live one
//!   (`Inner::judge`). What the last copy cannot do is an error for the client. If its *flush* fails, acknowledged
//!   data may be lost: the volume goes on read-only and acknowledges nothing more.
//! - *The client's errors are the client's.* A refused request or a full disk evicts nobody. As legs may differ
//!   then, the range becomes *unsynced*.
//! - *Nobody waits for ever for one of several.* Reads of a slow leg are hedged (`read`); a leg that does not answer what
//!   holds a lock is taken out after a limit, but never the last copy (`stall`).
//! - *Unsynced ranges are made equal before they are read* (`sync`), durably, so that a block once read after an
//!   unclean stop never changes, whichever member is lost later. Copies that are equal may be so in the machine's caches
//!   only, where a process was killed: all legs are flushed first, once.
//! - *A change runs to its end.* The body of a write, flush or repair that has to wait becomes a task of its own, spawned
//!   through [`Runtime`]: a client that drops the future half-way leaves no leg behind, and no error of a flush unseen.
//!
//! Lock order: range lock → metadata mutex → plain mutexes (never held over an await).
//!
//! Hot-path cost. *Read* within a chunk: a counter, a reference to the roster, atomic loads (twice whether copies may differ,
//! and of the member its state, bad blocks, reads in flight and lateness), one boxed future, then the member's read straight
//! into the caller's buffer; no lock, no clock. One that is not answered at once: a counter, a look at another copy and at
//! the clock, a box, and a place in a list under a plain mutex (`pulse`). A read over several chunks splits that buffer (no
//! copy) and reads its parts at once. *Write* into a dirty region: a counter and three looks at the roster, three plain
//! mutexes (gate, range lock, bitmap) taken twice each, and an order a leg (`stall`); the payload is shared between legs, not
//! copied. If a leg makes it wait, one task and one oneshot more.

mod assemble;
mod choice;
mod copies;
mod extents;
mod grow;
mod lifecycle;
mod metadata;
mod pulse;
mod range_lock;
mod read;
mod repair;
mod roster;
mod stall;
mod status;
mod untouched;
mod write;

pub(crate) use crate::range_set::RangeSet;
pub use crate::status::Status;
pub use assemble::AssembleOptions;
pub(crate) use choice::Copy;
pub(crate) use repair::Contents;
pub(crate) use roster::{Roster, Seat};
pub(crate) use stall::Order;

use crate::bitmap::Intent;
use crate::device::{
    Device, Durability, Extent, Holder, INSTANT, Identity, Io, Piece, ZeroMode, check_range,
};
use crate::error::{Error, Operation, Result};
use crate::event::{Event, EventLog, Mismatch};
use crate::member::Member;
use crate::orders::{Added, MemberName, SpeedLimits};
use crate::runtime::Runtime;
use crate::sync::{Presence, Progress, Scrub, Speed, scrub};
use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use metadata::Meta;
use parking_lot::Mutex;
use range_lock::RangeLocks;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::Poll;
use tokio::sync::{Notify, Semaphore, oneshot};
use uuid::Uuid;
use write::Change;

/// Range locks and unsynced ranges are kept in units of this, so that a sector is never shared by two writers.
pub(crate) const BLOCK: u64 = 4096;

/// A RAID 10 array that has been assembled. It is a [`Device`]; dropping it without [`Volume::stop`] is like a
/// crash: nothing acknowledged is lost, and dirty regions are made equal at the next start. Its background then ends by itself,
/// and lets go of the members a moment later: until then they are in use for whoever opens them.
pub struct Volume {
    inner: Arc<Inner>,
}

/// What the volume's tasks share.
pub(crate) struct Inner {
    /// Itself, for tasks that nobody waits for.
    own: Weak<Inner>,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) uuid: Uuid,
    /// The array's name, or its UUID where it has none.
    pub(crate) name: String,
    pub(crate) read_only: bool,
    /// Who is in the array, and its geometry. Replaced under `meta` only.
    roster: ArcSwap<Roster>,
    /// Commands from outside (fail, add, …) come one at a time.
    commands: tokio::sync::Mutex<()>,
    /// Serialises the decision who is taken out, so that two copies never leave each other behind.
    verdicts: Mutex<()>,
    /// Counts changes of who holds data.
    arrangements: AtomicU64,
    /// Members found to have failed, or missing at assembly; and how many of these are on record.
    noticed: AtomicU64,
    recorded: AtomicU64,
    pub(crate) locks: RangeLocks,
    /// How many more reads may be asked twice now.
    hedges: Semaphore,
    /// Tells who waits for a member how time goes by.
    pulse: pulse::Pulse,
    /// `None` where the array has no bitmap.
    pub(crate) intent: Option<Mutex<Intent>>,
    /// Whether the superblocks say, durably, that the array is in use.
    active: AtomicBool,
    meta: tokio::sync::Mutex<Meta>,
    pub(crate) unsynced: Mutex<RangeSet>,
    /// Whether `unsynced` holds anything, so that reads need not lock it.
    pub(crate) any_unsynced: AtomicBool,
    /// How often `unsynced` has grown, and how much of that the last walk in the background has seen: in between, one is due.
    pub(crate) marked: AtomicU64,
    pub(crate) walked: AtomicU64,
    /// Whether all that the legs held at the start is durable, whatever process wrote it.
    settled: AtomicBool,
    /// Whether resync and rebuild in the background are held back.
    pub(crate) held: AtomicBool,
    pub(crate) progress: Progress,
    pub(crate) speed: Speed,
    pub(crate) scrub: Scrub,
    events: EventLog,
    /// What was never written.
    pub(crate) untouched: untouched::Untouched,
    /// A flush of a last copy failed.
    lost: AtomicBool,
    pub(crate) gate: Gate,
    /// Who is at work in the background.
    pub(crate) background: Arc<Presence>,
    /// Wakes the background task: there is something to resync, or the volume is being stopped.
    pub(crate) wake: Arc<Notify>,
    /// Wakes the task that fills members: a slot is vacant, a member has joined, or the volume is being stopped.
    pub(crate) vacancy: Arc<Notify>,
}

/// Counts changes in flight, and lets none in once the volume is being stopped.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<(bool, u64)>,
    empty: Notify,
}

/// A change in flight.
pub(crate) struct Entered(Arc<Inner>);

impl Drop for Entered {
    fn drop(&mut self) {
        let mut state = self.0.gate.state.lock();
        state.1 -= 1;
        if state.1 == 0 {
            self.0.gate.empty.notify_waiters();
        }
    }
}

impl Gate {
    fn close(&self) {
        self.state.lock().0 = true;
    }

    async fn drained(&self) {
        loop {
            let empty = self.empty.notified();
            tokio::pin!(empty);
            empty.as_mut().enable();
            if self.state.lock().1 == 0 {
                return;
            }
            empty.await;
        }
    }
}

impl Inner {
    /// Lets a change in, unless the volume is being stopped.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Entered> {
        let mut state = self.gate.state.lock();
        if state.0 {
            return Err(Error::Stopped { name: self.name.clone() });
        }
        state.1 += 1;
        Ok(Entered(Arc::clone(self)))
    }

    /// Whether it lets no more changes in.
    pub(crate) fn is_stopping(&self) -> bool {
        self.gate.state.lock().0
    }

    /// Who is in the array now.
    pub(crate) fn roster(&self) -> Arc<Roster> {
        self.roster.load_full()
    }

    /// Decides what a member's failure means. It is taken out if the failure is its own and others hold copies of
    /// all that it holds; then the operation may count it as gone. Otherwise the failure is the operation's.
    #[must_use]
    pub(crate) fn judge(&self, member: &Member, failure: &Error) -> Verdict {
        if failure.spares_device() {
            return Verdict::Kept;
        }
        let _one_at_a_time = self.verdicts.lock();
        if member.is_faulty() {
            return Verdict::Evicted;
        }
        if !self.roster().can_spare(member) {
            tracing::error!(volume = %self.name, member = member.device.name(), %failure, "last copy failed");
            if matches!(failure, Error::Io { operation: Operation::Flush, .. }) {
                self.lost.store(true, Ordering::Release);
            }
            return Verdict::Kept;
        }
        self.expel(member, &failure.to_string());
        Verdict::Evicted
    }

    /// Takes a member out. The caller holds `verdicts` and has made sure that the array can spare it.
    fn expel(&self, member: &Member, cause: &str) {
        // Noticed before it is out: whoever sees it out also sees that this is not on record yet.
        self.noticed.fetch_add(1, Ordering::AcqRel);
        member.expel();
        self.rearranged();
        self.vacancy.notify_one();
        let (slot, path) = (member.slot().map(|slot| slot.0), member.device.name().to_owned());
        self.tell(Event::MemberFailed { slot, path, cause: cause.to_owned() });
    }

    /// Tells whoever listens.
    pub(crate) fn tell(&self, event: Event) {
        self.events.emit(event);
    }

    /// Replaces the roster. The caller holds the metadata mutex.
    fn set_roster(&self, roster: Roster) {
        self.roster.store(Arc::new(roster));
        self.rearranged();
    }

    /// Another copy may be the one that is usually read, from now on.
    pub(crate) fn rearranged(&self) {
        self.arrangements.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether anything has been changed since the array was clean; until then nothing needs to be on record.
    fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Refuses changes where the last copy of something could not be made durable.
    fn refuse_if_lost(&self) -> Result<()> {
        if self.lost.load(Ordering::Acquire) {
            Err(Error::Failed { name: self.name.clone() })
        } else {
            Ok(())
        }
    }

    /// Marks a range as one whose copies may differ. Its bits must be set, and stay set while it is here.
    pub(crate) fn mark_unsynced(&self, range: Range<u64>) {
        let mut unsynced = self.unsynced.lock();
        unsynced.insert(range);
        self.any_unsynced.store(true, Ordering::Release);
        self.marked.fetch_add(1, Ordering::AcqRel);
        self.wake.notify_one();
    }

    /// Rounds a range of the array out to whole blocks.
    pub(crate) fn blocks(&self, at: u64, len: u64) -> Range<u64> {
        at / BLOCK * BLOCK..(at + len).next_multiple_of(BLOCK).min(self.size())
    }

    /// Bytes the array holds.
    pub(crate) fn size(&self) -> u64 {
        self.roster.load().geometry.size()
    }
}

/// What became of a member that failed an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is out; the operation goes on without it, once that is on record.
    Evicted,
    /// It stays; the operation has failed.
    Kept,
}

/// Runs `body` to its end, whatever becomes of the returned future. It begins where it is asked for, and becomes a task
/// of its own when it has to wait for something.
pub(crate) fn run_to_end<T: Send + 'static>(
    inner: &Arc<Inner>,
    body: impl Future<Output = Result<T>> + Send + 'static,
) -> Io<'static, T> {
    let inner = Arc::clone(inner);
    let mut body = Box::pin(body);
    Box::pin(async move {
        let at_once = std::future::poll_fn(|cx| Poll::Ready(body.as_mut().poll(cx))).await;
        if let Poll::Ready(outcome) = at_once {
            return outcome;
        }
        let (done, outcome) = oneshot::channel();
        inner.runtime.spawn(Box::pin(async move {
            // Nobody may be waiting any more; the body has run all the same.
            drop(done.send(body.await));
        }));
        // A task that is gone without an answer: the executor is being shut down.
        outcome.await.unwrap_or_else(|_| Err(Error::Stopped { name: inner.name.clone() }))
    })
}

impl Volume {
    /// Starts an array from its members, given in any order. Reads superblocks and bitmaps only.
    ///
    /// A member whose superblock is damaged or unreadable, or that is out of date, is left out with a warning, if the
    /// others hold a copy of everything; other misfits are refused by name.
    pub async fn assemble(
        members: Vec<Arc<dyn Device>>,
        options: AssembleOptions,
        runtime: Arc<dyn Runtime>,
    ) -> Result<Arc<Self>> {
        let mut inner = assemble::assemble(members, options, runtime).await?;
        let inner = Arc::new_cyclic(|own| {
            inner.own = own.clone();
            inner
        });
        if !options.read_only {
            crate::sync::spawn(&inner);
        }
        Ok(Arc::new(Self { inner }))
    }

    /// The array's identity.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.inner.uuid
    }

    /// How it is, as `raid10 status` shows it.
    #[must_use]
    pub fn status(&self) -> Status {
        status::status(&self.inner)
    }

    /// Which files and disks its members hold open, each under its name: failed ones too, until they are let go.
    #[must_use]
    pub fn held(&self) -> Vec<(String, Identity)> {
        let roster = self.inner.roster();
        let held = |member: &Arc<Member>| Some((member.device.name().to_owned(), member.device.identity()?));
        roster.all().filter_map(held).collect()
    }

    /// Declares a member failed. Refused if it holds the last copy of anything.
    pub async fn fail(&self, member: &MemberName) -> Result<()> {
        let (inner, member) = (Arc::clone(&self.inner), member.clone());
        run_to_end(&self.inner, async move { inner.fail(&member).await }).await
    }

    /// Lets a failed member or a spare go.
    pub async fn remove(&self, member: &MemberName) -> Result<()> {
        let (inner, member) = (Arc::clone(&self.inner), member.clone());
        run_to_end(&self.inner, async move { inner.remove(&member).await }).await
    }

    /// Takes a device in: what it missed is copied if it was a member whose history is known, else it fills a vacant slot
    /// from the start, else it waits as a spare. `force` allows that it is a member of another array.
    pub async fn add(&self, device: Arc<dyn Device>, force: bool) -> Result<Added> {
        let inner = Arc::clone(&self.inner);
        run_to_end(&self.inner, async move { inner.add(device, force).await }).await
    }

    /// Takes a device in that is filled with what a member holds, and takes over from it then.
    pub async fn replace(&self, member: &MemberName, device: Arc<dyn Device>) -> Result<()> {
        let (inner, member) = (Arc::clone(&self.inner), member.clone());
        run_to_end(&self.inner, async move { inner.replace(&member, device).await }).await
    }

    /// Starts to compare all copies in the background, and with `repair` to make them equal. Progress is in the status,
    /// the end is an event. Refused while another one runs.
    pub async fn scrub(&self, repair: bool) -> Result<()> {
        let inner = Arc::clone(&self.inner);
        run_to_end(&self.inner, async move { scrub::start(&inner, repair) }).await
    }

    /// Ends a scrub that runs, and waits until it has ended. Without one, it has nothing to do.
    pub async fn cancel_scrub(&self) -> Result<()> {
        self.inner.scrub.cancel();
        self.inner.scrub.ended().await;
        Ok(())
    }

    /// What the last scrub found, or the one that runs has found so far: the first 1000 differences. The status has
    /// their number.
    #[must_use]
    pub fn mismatches(&self) -> Vec<Mismatch> {
        self.inner.scrub.mismatches()
    }

    /// Takes the room that all members have gained: the array becomes as large as they allow, and what is new is made
    /// equal before it is read. Returns the bytes it holds then.
    pub async fn grow(&self) -> Result<u64> {
        let inner = Arc::clone(&self.inner);
        run_to_end(&self.inner, async move { inner.grow().await }).await
    }

    /// Lets resync and rebuild begin that [`AssembleOptions::hold_resync`] held back.
    pub fn release_resync(&self) {
        self.inner.held.store(false, Ordering::Release);
        self.inner.wake.notify_one();
        self.inner.vacancy.notify_one();
    }

    /// How fast walks in the background may go.
    pub fn set_speed(&self, limits: SpeedLimits) {
        self.inner.speed.limit(limits.min, limits.max);
    }

    /// How fast walks in the background may go.
    #[must_use]
    pub fn speed(&self) -> SpeedLimits {
        let (min, max) = self.inner.speed.limits();
        SpeedLimits { min, max }
    }

    /// What happens from now on.
    #[must_use]
    pub fn events(&self) -> tokio::sync::broadcast::Receiver<Event> {
        self.inner.events.subscribe()
    }

    /// Refuses new changes, waits for those in flight, flushes, and marks the array clean. Reads go on until the
    /// volume is dropped. An error means that it could not be marked clean: the next start resyncs.
    ///
    /// When it returns, its background has let go of the members: once the volume is dropped, with the pieces and
    /// operations that came of it, they can be opened again. A member that hangs is waited for no longer than two seconds.
    pub async fn stop(&self) -> Result<()> {
        let inner = Arc::clone(&self.inner);
        run_to_end(&self.inner, async move { inner.stop().await }).await
    }

    fn change(&self, operation: Operation, at: u64, change: Change, durability: Durability) -> Io<'_, ()> {
        let inner = &self.inner;
        let len = change.len();
        let refused = if inner.read_only {
            Err(Error::ReadOnly { operation })
        } else {
            check_range(operation, at, len, inner.size())
        };
        if refused.is_err() || len == 0 {
            return Box::pin(async { refused });
        }
        inner.speed.count();
        let body = Arc::clone(inner);
        run_to_end(inner, async move { body.change_in_parts(at, change, durability).await })
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.inner.gate.close();
        self.inner.held.store(false, Ordering::Release);
        self.inner.wake.notify_one();
        self.inner.vacancy.notify_one();
        self.inner.scrub.cancel();
    }
}

impl Device for Volume {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    /// The array's size is what its superblocks say, whatever its members have become.
    fn refresh(&self) -> Io<'_, u64> {
        let size = self.size();
        Box::pin(async move { Ok(size) })
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        self.inner.speed.count();
        Box::pin(self.inner.read(at, buf))
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        self.change(Operation::Write, at, Change::Data(data), durability)
    }

    fn is_instant(&self) -> bool {
        let roster = self.inner.roster.load();
        let mut members = roster.written().peekable();
        members.peek().is_some() && members.all(|member| member.device.is_instant())
    }

    fn read_now(&self, at: u64, buf: &mut [u8]) -> bool {
        let done = self.inner.read_now(at, buf);
        if done {
            self.inner.speed.count();
        }
        done
    }

    fn write_now(&self, at: u64, data: &[u8]) -> bool {
        let inner = &self.inner;
        let is_allowed = !inner.read_only
            && (1..=INSTANT).contains(&(data.len() as u64))
            && check_range(Operation::Write, at, data.len() as u64, inner.size()).is_ok();
        let done = is_allowed && inner.write_now(at, data);
        if done {
            inner.speed.count();
        }
        done
    }

    fn flush(&self) -> Io<'_, ()> {
        if self.inner.read_only {
            return Box::pin(async { Ok(()) });
        }
        let inner = Arc::clone(&self.inner);
        run_to_end(&self.inner, async move {
            let _entered = inner.enter()?;
            inner.flush().await
        })
    }

    fn begin_write_back(&self, at: u64, len: u64) {
        if check_range(Operation::Write, at, len, self.inner.size()).is_ok() {
            self.inner.begin_write_back(at, len);
        }
    }

    /// Zeroes the range with holes, on all legs alike: a plain discard may leave each leg something else. Where a member
    /// has none, so that zeroes would be written, nothing is done: gigabytes of that would help nobody.
    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.change(Operation::Discard, at, Change::Discard(len), Durability::Cached)
    }

    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        self.change(Operation::WriteZeroes, at, Change::Zeroes(len, mode), durability)
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        Box::pin(self.inner.locate(at, len))
    }

    fn extents(&self, at: u64, len: u64) -> Io<'_, Vec<Extent>> {
        Box::pin(self.inner.extents(at, len))
    }

    fn blank(&self, at: u64, len: u64) -> Vec<Range<u64>> {
        self.inner.untouched.blank_within(&(at..at.saturating_add(len)))
    }

    fn prefetch(&self, at: u64, len: u64) -> Io<'_, ()> {
        Box::pin(self.inner.prefetch(at, len))
    }

    fn copies(&self) -> usize {
        self.inner.ways()
    }

    fn read_copy(&self, at: u64, buf: BytesMut, copy: usize) -> Io<'_, BytesMut> {
        self.inner.speed.count();
        Box::pin(self.inner.read_copy(at, buf, copy))
    }

    fn may_differ(&self, at: u64, len: u64) -> bool {
        self.inner.may_differ(at, len)
    }

    fn holders(&self, at: u64, len: u64) -> Vec<Holder> {
        self.inner.holders(at, len)
    }

    fn agree(&self, at: u64, len: u64) -> Io<'_, bool> {
        self.inner.speed.count();
        Box::pin(self.inner.agree(at, len))
    }

    fn mend(&self, at: u64, good: Bytes) -> Io<'_, u64> {
        Box::pin(self.inner.mend(at, good))
    }

    fn arrangement(&self) -> u64 {
        self.inner.arrangement()
    }

    /// A leg that is slow at it makes all slow.
    fn zeroes_fast(&self, mode: ZeroMode) -> bool {
        self.inner.zeroes_fast(mode)
    }

    fn is_rotational(&self) -> bool {
        self.inner.is_rotational()
    }
}
