//! Members that do not answer: how long they are waited for by whoever holds a lock meanwhile.
//!
//! A write, a flush, a piece of metadata and a repair hold a range lock or the metadata mutex until every member has
//! answered: one that hangs would hang the array. Such an operation is therefore an [`Order`] that [`Inner::ask`] waits
//! for. A member is taken out when
//!
//! - it has not answered for [`LIMIT`], counted from when the others that were asked the same had answered;
//! - of all it holds there are other copies in sync, whose members *do* answer: something else lately, or else a flush
//!   that is asked of them to see. What holds up all of them (a controller, a cable, much that all must bring from cache
//!   to disk) evicts nobody, and the last copy is waited for.
//!
//! That is a failure like any other ([`Inner::judge`]): on record on the survivors before the client is answered.
//!
//! *The operation may still happen.* It cannot be called back, so it is left to end by itself, as a task that holds the
//! member. While it has not ended
//! - the device is open, and so its file is locked against whoever would open it again, in this process or another;
//! - `remove` and `add` of the member are refused.
//!
//! So nothing late ever lands on a device that has come back. What lands before it comes back lies in regions whose
//! bits are set, as after any failure: those are copied.
//!
//! Client reads hold no lock and are hedged instead (`read`).
//!
//! Cost of an order: a box, a place in a list (`pulse`), four atomic operations.

use super::Inner;
use crate::device::{Device, Durability, ZeroMode, buffer};
use crate::error::{Error, Operation, Result};
use crate::member::Member;
use crate::runtime::BoxFuture;
use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, join_all, select};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a member may leave an operation unanswered that others have answered. As long as Linux gives a SCSI command:
/// much longer than disks need for their own error recovery where that is bounded (7 s), so that their error comes first.
const LIMIT: Duration = Duration::from_secs(30);
/// Time between looks.
const LOOK: Duration = Duration::from_secs(1);
/// Not answered yet.
const OPEN: u64 = u64::MAX;

/// What a member is asked to do. Positions are those on its device.
#[derive(Debug, Clone)]
pub(crate) enum Order {
    /// Read a range.
    Read { at: u64, len: u64 },
    /// Write these bytes.
    Write { at: u64, data: Bytes, durability: Durability },
    /// Make a range read as zeroes.
    Zero { at: u64, len: u64, mode: ZeroMode, durability: Durability },
    /// Make completed writes durable.
    Flush,
}

impl Order {
    fn operation(&self) -> Operation {
        match self {
            Self::Read { .. } => Operation::Read,
            Self::Write { .. } => Operation::Write,
            Self::Zero { .. } => Operation::WriteZeroes,
            Self::Flush => Operation::Flush,
        }
    }

    /// What was read, where anything was.
    async fn carry_out(self, device: &dyn Device) -> Result<BytesMut> {
        let done = match self {
            Self::Read { at, len } => return device.read(at, buffer(len as usize)).await,
            Self::Write { at, data, durability } => device.write(at, data, durability).await,
            Self::Zero { at, len, mode, durability } => device.write_zeroes(at, len, mode, durability).await,
            Self::Flush => device.flush().await,
        };
        done.map(|()| BytesMut::new())
    }
}

/// One member's part in what several are asked at once.
struct Asked<'a> {
    member: &'a Arc<Member>,
    /// Nanoseconds: when it answered.
    answered: AtomicU64,
}

impl Inner {
    /// Asks a member and waits for its answer, or until it has stalled: then it is out, and this is an error.
    pub(crate) async fn ask(&self, member: &Arc<Member>, order: Order) -> Result<BytesMut> {
        let asked = [Asked { member, answered: AtomicU64::new(OPEN) }];
        self.wait(&asked, 0, self.runtime.now(), order).await
    }

    /// Asks several members at once for parts of one thing. Answers come in the order of the orders.
    pub(crate) async fn ask_all(&self, orders: Vec<(&Arc<Member>, Order)>) -> Vec<Result<BytesMut>> {
        let since = self.runtime.now();
        let asked: Vec<Asked<'_>> =
            orders.iter().map(|(member, _)| Asked { member, answered: AtomicU64::new(OPEN) }).collect();
        let asked = &asked;
        let waits = orders.into_iter().enumerate();
        join_all(waits.map(|(number, (_, order))| self.wait(asked, number, since, order))).await
    }

    async fn wait(&self, asked: &[Asked<'_>], own: usize, since: Duration, order: Order) -> Result<BytesMut> {
        let Asked { member, answered } = &asked[own];
        let operation = order.operation();
        let stalled = || Error::Stalled { device: member.device.name().to_owned(), operation, limit: LIMIT };
        // Before the look: who takes it out meanwhile sees that it may be asked.
        let _counted = member.load.begin();
        if member.is_faulty() {
            // Out since it was chosen: nothing more is asked of it.
            return Err(stalled());
        }
        let holder = Arc::clone(member);
        let mut under_way: BoxFuture<'static, Result<BytesMut>> =
            Box::pin(async move { order.carry_out(holder.device.as_ref()).await });
        loop {
            match self.pulse.wait(under_way, LOOK).await {
                Ok(outcome) => {
                    let now = self.runtime.now();
                    answered.store(now.as_nanos() as u64, Ordering::Release);
                    member.load.was_answered(since, now);
                    return outcome;
                }
                Err(unanswered) => under_way = unanswered,
            }
            if self.gives_up(asked, member, since, &stalled) {
                self.leave(member, under_way);
                return Err(stalled());
            }
        }
    }

    /// Whether a member is out, or is put out here because it has stalled.
    fn gives_up(
        &self,
        asked: &[Asked<'_>],
        member: &Arc<Member>,
        since: Duration,
        stalled: &dyn Fn() -> Error,
    ) -> bool {
        let _one_at_a_time = self.verdicts.lock();
        if member.is_faulty() {
            return true;
        }
        let now = self.runtime.now();
        if now.saturating_sub(since) < LIMIT {
            return false;
        }
        let works = |other: &Arc<Member>| {
            let mut same = asked.iter().filter(|asked| Arc::ptr_eq(asked.member, other));
            let had_time = same.all(|asked| {
                let answered = asked.answered.load(Ordering::Acquire);
                answered != OPEN && now.saturating_sub(Duration::from_nanos(answered)) >= LIMIT
            });
            had_time && other.load.has_worked_for(LIMIT, now)
        };
        let roster = self.roster();
        if !roster.can_spare(member) {
            return false;
        }
        if !roster.is_covered(member, works) {
            let others = roster.written().filter(|other| !Arc::ptr_eq(other, member));
            others.filter(|other| other.load.is_idle()).for_each(|other| self.probe(other));
            return false;
        }
        self.expel(member, &stalled().to_string());
        true
    }

    /// Asks a member that has nothing to do for a flush, to see whether it answers. Nobody waits for it, so it runs to
    /// its end by itself, and its failure counts like that of any flush.
    fn probe(&self, member: &Arc<Member>) {
        let Some(inner) = self.own.upgrade() else { return };
        let member = Arc::clone(member);
        self.runtime.spawn(Box::pin(async move {
            // Like any other, so that it can be given up, and holds up nobody who lets the member go.
            if let Err(failure) = inner.ask(&member, Order::Flush).await {
                let verdict = inner.judge(&member, &failure);
                tracing::warn!(volume = %inner.name, member = member.device.name(), %failure, ?verdict,
                    "flush failed");
            }
        }));
    }

    /// Leaves an operation to itself. Whoever is to be let go waits for it.
    fn leave(&self, member: &Arc<Member>, under_way: BoxFuture<'static, Result<BytesMut>>) {
        let (left, name) = (Left::new(Arc::clone(member)), self.name.clone());
        self.runtime.spawn(Box::pin(async move {
            let outcome = under_way.await;
            let (member, failure) = (left.0.device.name(), outcome.err().map(|failure| failure.to_string()));
            tracing::info!(volume = %name, member, failure, "an operation has ended that was given up");
        }));
    }

    /// Asks a device that is no member yet.
    pub(super) async fn ask_newcomer(&self, device: &Arc<dyn Device>, order: Order) -> Result<()> {
        let (operation, holder) = (order.operation(), Arc::clone(device));
        let asked = async move { order.carry_out(holder.as_ref()).await };
        self.wait_for_newcomer(device.name(), operation, asked).await.map(drop)
    }

    /// Waits for what a device that is no member yet was asked, which holds the device, or what a member was asked that need
    /// not leave for being late with it. The metadata mutex may be held: it has the same limit.
    pub(super) async fn wait_for_newcomer<T: Send + 'static>(
        &self,
        name: &str,
        operation: Operation,
        asked: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let asked: BoxFuture<'static, Result<T>> = Box::pin(asked);
        match select(asked, self.runtime.sleep(LIMIT)).await {
            Either::Left((outcome, _)) => outcome,
            Either::Right(((), unanswered)) => {
                // It keeps its device open, and so locked, until it ends.
                self.runtime.spawn(Box::pin(async move { drop(unanswered.await) }));
                Err(Error::Stalled { device: name.to_owned(), operation, limit: LIMIT })
            }
        }
    }
}

/// A member with an operation that nobody waits for, until it is dropped.
struct Left(Arc<Member>);

impl Left {
    fn new(member: Arc<Member>) -> Self {
        member.load.abandon();
        Self(member)
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        self.0.load.abandoned_ended();
    }
}
