//! The array as a block device: assembly, reads, writes, flush, and what becomes of members that fail.
//!
//! The rules, each held in one place:
//!
//! - *Dirty before data.* The bits of the regions a write touches, and the superblocks' "active", are durable on all
//!   live members before its data is submitted (`metadata::prepare`). A write into a region that is dirty already
//!   costs no bitmap I/O and no await; concurrent writers to new regions share one bitmap write.
//! - *One writer a place.* Writes, resync and read repair hold a range lock over what they change (`range_lock`), so
//!   overlapping writes reach all legs in one order.
//! - *Failures before acknowledgements.* A leg that failed is recorded on the survivors, durably, before any write or
//!   flush that it missed is acknowledged, and all later ones wait for that (`metadata::recorded`).
//! - *The last copy stays.* A member is taken out only if every set of mirrors it belongs to has another live one
//!   (`Inner::judge`). What the last copy cannot do is an error for the client. If its *flush* fails, acknowledged
//!   data may be lost: the volume goes on read-only and acknowledges nothing more.
//! - *The client's errors are the client's.* A refused request or a full disk evicts nobody. As legs may differ
//!   then, the range becomes *unsynced*.
//! - *Unsynced ranges are made equal before they are read* (`sync`), durably, so that a block once read after an
//!   unclean stop never changes, whichever member is lost later.
//! - *A change runs to its end.* The body of a write, flush or repair is a task of its own, spawned through
//!   [`Runtime`]: a client that drops the future half-way leaves no leg behind, and no error of a flush unseen.
//!
//! Lock order: range lock → metadata mutex → plain mutexes (never held over an await).
//!
//! Hot-path cost. *Read* within a chunk: two atomic loads, one boxed future, then the member's read straight into the
//! caller's buffer; no lock. A read over several chunks splits that buffer (no copy) and reads its parts at once. *Write*
//! into a dirty region: one task and one oneshot, three plain mutexes (gate, range lock, bitmap) taken twice each,
//! and a future a leg; the payload is shared between legs, not copied.

mod assemble;
mod metadata;
mod range_lock;
mod read;
mod status;
mod write;

pub(crate) use crate::range_set::RangeSet;
pub use crate::status::Status;
pub use assemble::AssembleOptions;

use crate::bitmap::Intent;
use crate::device::{Device, Durability, Io, Piece, ZeroMode, check_range};
use crate::error::{Error, Operation, Result};
use crate::geometry::{Geometry, MemberOffset, Slot, Span};
use crate::member::Member;
use crate::runtime::Runtime;
use bytes::{Bytes, BytesMut};
use metadata::Meta;
use parking_lot::Mutex;
use range_lock::RangeLocks;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::{Notify, oneshot};
use uuid::Uuid;
use write::Change;

/// Range locks and unsynced ranges are kept in units of this, so that a sector is never shared by two writers.
pub(crate) const BLOCK: u64 = 4096;

/// A RAID 10 array that has been assembled. It is a [`Device`]; dropping it without [`Volume::stop`] is like a
/// crash: nothing acknowledged is lost, and dirty regions are made equal at the next start.
pub struct Volume {
    inner: Arc<Inner>,
}

/// What the volume's tasks share.
pub(crate) struct Inner {
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) geometry: Geometry,
    pub(crate) uuid: Uuid,
    /// The array's name, or its UUID where it has none.
    pub(crate) name: String,
    pub(crate) read_only: bool,
    /// By slot: members that were current when the array was assembled.
    pub(crate) members: Vec<Option<Member>>,
    /// Members that were given but are out of date: (slot, path).
    stale: Vec<(Slot, String)>,
    /// Which members hold copies together.
    sets: Vec<Vec<Slot>>,
    /// Serialises the decision who is taken out, so that two copies never leave each other behind.
    verdicts: Mutex<()>,
    /// Members found to have failed, or missing at assembly; and how many of these are on record.
    noticed: AtomicU64,
    recorded: AtomicU64,
    pub(crate) locks: RangeLocks,
    /// `None` where the array has no bitmap.
    pub(crate) intent: Option<Mutex<Intent>>,
    /// Whether the superblocks say, durably, that the array is in use.
    active: AtomicBool,
    meta: tokio::sync::Mutex<Meta>,
    pub(crate) unsynced: Mutex<RangeSet>,
    /// Whether `unsynced` holds anything, so that reads need not lock it.
    pub(crate) any_unsynced: AtomicBool,
    pub(crate) progress: Mutex<Progress>,
    /// A flush of a last copy failed.
    lost: AtomicBool,
    pub(crate) gate: Gate,
    /// Wakes the background task: there is something to resync, or the volume is being stopped.
    pub(crate) wake: Arc<Notify>,
}

/// How far the current resync is.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub(crate) total: u64,
    pub(crate) started: std::time::Duration,
    pub(crate) running: bool,
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

    /// The member of a slot, while it is in sync.
    pub(crate) fn live(&self, slot: Slot) -> Option<&Member> {
        self.members[slot.0].as_ref().filter(|member| member.is_in_sync())
    }

    /// All members that are in sync, in slot order.
    pub(crate) fn live_members(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().flatten().filter(|member| member.is_in_sync())
    }

    /// Whether a slot has no member in sync.
    pub(crate) fn is_degraded(&self) -> bool {
        self.members.iter().any(|member| !member.as_ref().is_some_and(Member::is_in_sync))
    }

    /// Decides what a member's failure means. It is taken out if the failure is its own and others hold copies of
    /// all that it holds; then the operation may count it as gone. Otherwise the failure is the operation's.
    #[must_use]
    pub(crate) fn judge(&self, member: &Member, failure: &Error) -> Verdict {
        if failure.spares_device() {
            return Verdict::Kept;
        }
        let _one_at_a_time = self.verdicts.lock();
        if !member.is_in_sync() {
            return Verdict::Evicted;
        }
        let has_partner =
            |set: &Vec<Slot>| set.iter().any(|&slot| slot != member.slot && self.live(slot).is_some());
        if !self.sets.iter().filter(|set| set.contains(&member.slot)).all(has_partner) {
            tracing::error!(volume = %self.name, member = member.device.name(), %failure, "last copy failed");
            if matches!(failure, Error::Io { operation: Operation::Flush, .. }) {
                self.lost.store(true, Ordering::Release);
            }
            return Verdict::Kept;
        }
        // Noticed before it is out: whoever sees it out also sees that this is not on record yet.
        self.noticed.fetch_add(1, Ordering::AcqRel);
        member.expel();
        tracing::warn!(volume = %self.name, member = member.device.name(), slot = member.slot.0, %failure,
            "member failed and is taken out");
        Verdict::Evicted
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
        self.wake.notify_one();
    }

    /// Rounds a range of the array out to whole blocks.
    pub(crate) fn blocks(&self, at: u64, len: u64) -> Range<u64> {
        at / BLOCK * BLOCK..(at + len).next_multiple_of(BLOCK).min(self.geometry.size())
    }

    /// The copies of a span that are live, in slot order: the member and the position on its device. With
    /// `readable`, only those that hold good data.
    pub(crate) fn copies(&self, span: Span, readable: bool) -> Vec<(&Member, u64)> {
        let mut copies: Vec<(&Member, u64)> = self
            .geometry
            .places(span.chunk)
            .filter_map(|place| {
                let at = MemberOffset(place.at.0 + span.within);
                let member = self.live(place.slot)?;
                (!readable || member.is_readable(at, span.len)).then(|| (member, member.position(at)))
            })
            .collect();
        copies.sort_by_key(|(member, _)| member.slot);
        copies
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

/// Runs `body` as a task of its own, to its end, whatever becomes of the returned future.
pub(crate) fn run_to_end<T: Send + 'static>(
    inner: &Arc<Inner>,
    body: impl Future<Output = Result<T>> + Send + 'static,
) -> Io<'static, T> {
    let inner = Arc::clone(inner);
    Box::pin(async move {
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
        let inner = Arc::new(assemble::assemble(members, options, runtime).await?);
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

    /// Refuses new changes, waits for those in flight, flushes, and marks the array clean. Reads go on until the
    /// volume is dropped. An error means that it could not be marked clean: the next start resyncs.
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
            check_range(operation, at, len, inner.geometry.size())
        };
        if refused.is_err() || len == 0 {
            return Box::pin(async { refused });
        }
        let body = Arc::clone(inner);
        run_to_end(inner, async move { body.change(at, change, durability).await })
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.inner.gate.close();
        self.inner.wake.notify_one();
    }
}

impl Device for Volume {
    fn name(&self) -> &str {
        &self.inner.name
    }

    fn size(&self) -> u64 {
        self.inner.geometry.size()
    }

    /// The array's size is what its superblocks say, whatever its members have become.
    fn refresh(&self) -> Io<'_, u64> {
        let size = self.size();
        Box::pin(async move { Ok(size) })
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        Box::pin(self.inner.read(at, buf))
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        self.change(Operation::Write, at, Change::Data(data), durability)
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

    /// Zeroes the range with holes, on all legs alike: a plain discard may leave each leg something else.
    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.change(Operation::Discard, at, Change::Zeroes(len, ZeroMode::MayPunch), Durability::Cached)
    }

    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        self.change(Operation::WriteZeroes, at, Change::Zeroes(len, mode), durability)
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        Box::pin(self.inner.locate(at, len))
    }
}
