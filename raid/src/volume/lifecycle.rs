//! Who comes and who goes: `fail`, `remove`, `add`, `replace`, and spares that take over.
//!
//! Commands come one at a time. Each is checked whole before anything changes; a refused one has changed nothing. A
//! transition swaps the roster under the metadata mutex and is on record on all members before the command returns.
//!
//! What a power cut means:
//! - while a device is being prepared: it carries no superblock yet, or one that the others' tables do not know; it is
//!   no member;
//! - between two superblocks of the round that announces a member: whoever knows of it says that it is being filled,
//!   so nothing is read from it;
//! - between the last byte that was filled and the round that says so: it is filled again from the last checkpoint.

use super::{Entered, Inner, Order, Roster, Seat, Verdict};
use crate::bitmap::PAGE;
use crate::device::{Device, Durability, ZeroMode};
use crate::error::{Error, Operation, Result};
use crate::event::Event;
use crate::geometry::Slot;
use crate::member::{Member, Records, State, read_records, read_superblock_bytes};
use crate::orders::{Added, MemberName};
use crate::record::Relation;
use crate::superblock::{Role, SECTOR, Superblock};
use crate::volume::metadata::Meta;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// How long a member that was let go is waited for until it is closed, and the time between looks.
const CLOSING: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(1);

/// A device that was a member of this array before.
struct Former {
    superblock: Superblock,
    records: Records,
}

/// A command that is carried out, alone, while the volume is not stopped.
pub(super) struct Turn<'a> {
    _entered: Entered,
    _one_at_a_time: tokio::sync::MutexGuard<'a, ()>,
}

impl Inner {
    /// Waits until the commands before it are done.
    pub(super) async fn turn(self: &Arc<Self>) -> Result<Turn<'_>> {
        let one_at_a_time = self.commands.lock().await;
        let turn = Turn { _entered: self.enter()?, _one_at_a_time: one_at_a_time };
        self.refuse_if_unwritable()?;
        Ok(turn)
    }

    /// Declares a member failed.
    pub(crate) async fn fail(self: &Arc<Self>, name: &MemberName) -> Result<()> {
        let _turn = self.turn().await?;
        let member = self.find(name)?;
        {
            let _verdict = self.verdicts.lock();
            if member.is_faulty() {
                return Err(Error::AlreadyFailed { device: member.device.name().to_owned() });
            }
            if !self.roster().can_spare(&member) {
                return Err(Error::LastCopy { device: member.device.name().to_owned() });
            }
            self.expel(&member, "it was declared failed");
        }
        self.recorded().await
    }

    /// Lets a member go that is not in use.
    pub(crate) async fn remove(self: &Arc<Self>, name: &MemberName) -> Result<()> {
        let _turn = self.turn().await?;
        let member = self.find(name)?;
        self.settled(&member).await;
        let mut meta = self.meta.lock().await;
        if member.is_written() {
            return Err(Error::MemberInUse { device: member.device.name().to_owned() });
        }
        self.record(&mut meta).await?;
        if member.load.is_unanswered() {
            return Err(Error::Unanswered { device: member.device.name().to_owned() });
        }
        let mut roster = Roster::clone(&self.roster());
        let number = member.number() as usize;
        if let Some(role) = roster.table.get_mut(number) {
            // A failed member that returns must find itself called failed; a spare may return as one.
            *role = if member.state() == State::Spare { Role::Spare } else { Role::Faulty };
        }
        roster.forget(&member);
        self.set_roster(roster);
        meta.written.remove(&member.number());
        self.record(&mut meta).await?;
        drop(meta);
        self.closed(&member).await;
        let slot = member.slot().map(|slot| slot.0);
        self.tell(Event::MemberRemoved { slot, path: member.device.name().to_owned() });
        Ok(())
    }

    /// Takes a device in: into a vacant slot if there is one, as a spare otherwise. With `force`, whatever its
    /// superblock says of another array is overwritten.
    pub(crate) async fn add(self: &Arc<Self>, device: Arc<dyn Device>, force: bool) -> Result<Added> {
        let _turn = self.turn().await?;
        // Under the mutex: a superblock that is being written could look damaged.
        let mut meta = self.meta.lock().await;
        let former = self.look_at(&device, force).await?;
        if let Some(former) = former
            && let Some(slot) = self.returns(&meta, &former)
        {
            self.take_back(&mut meta, device, former, slot).await?;
            return Ok(Added::Readded(slot.0));
        }
        let member = self.prepare_member(device).await?;
        self.enlist(&mut meta, &member, |roster| roster.idle.push(Arc::clone(&member))).await?;
        if let Some(slot) = self.roster().vacancy() {
            self.seat(&mut meta, &member, slot, false).await?;
            return Ok(Added::Rebuilding(slot.0));
        }
        self.tell(Event::MemberAdded { slot: None, path: member.device.name().to_owned() });
        Ok(Added::Spare)
    }

    /// Takes a device in that is to hold what a member holds, and take over from it then.
    pub(crate) async fn replace(self: &Arc<Self>, name: &MemberName, device: Arc<dyn Device>) -> Result<()> {
        let _turn = self.turn().await?;
        let leaving = self.find(name)?;
        let slot = leaving.slot().filter(|_| leaving.is_in_sync());
        let slot = slot.ok_or_else(|| Error::NotReplaceable { device: leaving.device.name().to_owned() })?;
        if self.roster().seats[slot.0].replacement.as_ref().is_some_and(|one| !one.is_faulty()) {
            return Err(Error::ReplacedAlready { device: leaving.device.name().to_owned() });
        }
        let mut meta = self.meta.lock().await;
        self.look_at(&device, false).await?;
        let member = self.prepare_member(device).await?;
        self.enlist(&mut meta, &member, |roster| {
            member.take_slot(slot, false);
            // One that failed before is let go.
            let former = roster.seats[slot.0].replacement.replace(Arc::clone(&member));
            roster.idle.extend(former);
        })
        .await?;
        let path = member.device.name().to_owned();
        self.tell(Event::MemberAdded { slot: Some(slot.0), path });
        self.vacancy.notify_one();
        Ok(())
    }

    /// Gives a vacant slot to a spare, if there are both. Returns whether it did.
    pub(crate) async fn promote_spare(self: &Arc<Self>) -> Result<bool> {
        let wanted = |roster: &Roster| roster.vacancy().zip(roster.spare().cloned());
        if wanted(&self.roster()).is_none() {
            return Ok(false);
        }
        let mut meta = self.meta.lock().await;
        let Some((slot, spare)) = wanted(&self.roster()) else { return Ok(false) };
        self.seat(&mut meta, &spare, slot, false).await?;
        self.tell(Event::SpareTookOver { slot: slot.0, path: spare.device.name().to_owned() });
        Ok(true)
    }

    /// A member holds everything now: it counts from here on. Everything on it has been flushed.
    pub(crate) async fn complete(self: &Arc<Self>, member: &Arc<Member>) -> Result<()> {
        let mut meta = self.meta.lock().await;
        let Some(slot) = member.slot() else { return Ok(()) };
        self.record(&mut meta).await?;
        let roster = self.roster();
        let is_replacement =
            roster.seats[slot.0].replacement.as_ref().is_some_and(|one| Arc::ptr_eq(one, member));
        if is_replacement {
            // On record first: until then both are written, and the one that leaves counts.
            let leaving = roster.seats[slot.0].member.clone();
            meta.handover = leaving.as_ref().map(|leaving| (member.number(), leaving.number()));
            member.set_checkpoint(roster.size * SECTOR);
            let recorded = self.record(&mut meta).await;
            meta.handover = None;
            recorded?;
            let mut next = Roster::clone(&roster);
            let seat = &mut next.seats[slot.0];
            (seat.member, seat.replacement) = (seat.replacement.take(), None);
            next.idle.extend(leaving.clone());
            let _verdict = self.verdicts.lock();
            if !member.complete() {
                return Ok(());
            }
            self.set_roster(next);
            if let Some(leaving) = &leaving
                && !leaving.is_faulty()
            {
                self.expel(leaving, "it was replaced");
            }
        } else {
            // On record first: until then the others are the ones that count.
            member.set_checkpoint(roster.size * SECTOR);
            self.record(&mut meta).await?;
            let _verdict = self.verdicts.lock();
            if !member.complete() {
                return Ok(());
            }
            self.rearranged();
        }
        self.tell(Event::SpareActive { slot: slot.0, path: member.device.name().to_owned() });
        self.wake.notify_one();
        Ok(())
    }

    /// Makes it durable how far a member has been filled.
    pub(crate) async fn checkpoint(&self, member: &Arc<Member>, filled: u64) -> Result<()> {
        if let Err(failure) = self.ask(member, Order::Flush).await
            && self.judge(member, &failure) == Verdict::Kept
        {
            return Err(failure);
        }
        let mut meta = self.meta.lock().await;
        member.set_checkpoint(filled);
        self.record(&mut meta).await
    }

    /// Waits until what a member that is out was asked before has ended, or is given up (`stall`), which it soon is: nobody
    /// waits for who is out. Only then is it known whether it still owes anything.
    async fn settled(&self, member: &Arc<Member>) {
        while member.is_faulty() && !member.load.is_idle() && !member.load.is_unanswered() {
            self.runtime.sleep(LOOK).await;
        }
    }

    /// Waits until operations that began while a member was in use have let go of it: then its device is closed, and may
    /// be opened by whoever adds it again. One that hangs is not waited for for ever: until it ends, the device is refused
    /// as in use.
    async fn closed(&self, member: &Arc<Member>) {
        let begun = self.runtime.now();
        while Arc::strong_count(member) > 1 && self.runtime.now().saturating_sub(begun) < CLOSING {
            self.runtime.sleep(LOOK).await;
        }
    }

    /// Whether anything may be changed at all.
    pub(crate) fn refuse_if_unwritable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::ServedReadOnly { name: self.name.clone() });
        }
        self.refuse_if_lost()
    }

    fn find(&self, name: &MemberName) -> Result<Arc<Member>> {
        let roster = self.roster();
        let found = match name {
            MemberName::Slot(slot) => roster.seats.get(*slot).and_then(|seat| seat.member.clone()),
            MemberName::Path(path) => roster.all().find(|member| member.device.name() == path).cloned(),
        };
        found.ok_or_else(|| Error::NoSuchSlot { name: name.to_string(), volume: self.name.clone() })
    }

    /// Checks that a device may join.
    async fn look_at(&self, device: &Arc<dyn Device>, force: bool) -> Result<Option<Former>> {
        let roster = self.roster();
        let twice = |member: &Arc<Member>| Error::MemberTwice {
            device: device.name().to_owned(),
            other: member.device.name().to_owned(),
        };
        if let Some(member) = roster.enlisted().find(|member| member.device.name() == device.name()) {
            return Err(twice(member));
        }
        if roster.all().any(|one| one.load.is_unanswered() && one.device.name() == device.name()) {
            return Err(Error::Unanswered { device: device.name().to_owned() });
        }
        let like = pattern(&roster)?;
        let needed = like.data_start() + roster.size * SECTOR;
        if device.size() < needed {
            return Err(Error::TooSmall { device: device.name().to_owned(), size: device.size(), needed });
        }
        let newcomer = Arc::clone(device);
        let reading = async move { read_superblock_bytes(newcomer.as_ref()).await };
        let (found, bytes) = match self.wait_for_newcomer(device.name(), Operation::Read, reading).await {
            Ok(found) => found,
            // Nothing that was ever a member, or a damaged one: it is filled anew.
            Err(Error::Superblock { .. }) => return Ok(None),
            Err(failure) => return Err(failure),
        };
        if found.array != self.uuid {
            let (device, array) = (device.name().to_owned(), found.array);
            return if force { Ok(None) } else { Err(Error::OtherArray { device, array }) };
        }
        let same = |member: &&Arc<Member>| {
            member.number() == found.dev_number && member.superblock.device == found.device
        };
        if let Some(member) = roster.enlisted().find(same) {
            return Err(twice(member));
        }
        let newcomer = Arc::clone(device);
        let reading = async move {
            let records = read_records(newcomer.as_ref(), &found, &bytes[..]).await;
            Ok(Former { superblock: found, records })
        };
        self.wait_for_newcomer(device.name(), Operation::Read, reading).await.map(Some)
    }

    /// The slot of a former member, if it can go on with what it missed alone: its history is a part of ours, and the
    /// bitmap still has all bits that were set since it left. Else it is filled anew.
    fn returns(&self, meta: &Meta, former: &Former) -> Option<Slot> {
        let (its, roster) = (&former.superblock, self.roster());
        let Role::Active(slot) = its.own_role() else { return None };
        let is_vacant = roster.seats.get(slot.0).is_some_and(Seat::is_vacant);
        let is_its_number = roster.roles().get(its.dev_number as usize) == Some(&Role::Faulty)
            && !roster.enlisted().any(|member| member.number() == its.dev_number);
        let held_all = its.holds_everything();
        let like = pattern(&roster).ok()?;
        let same = (its.layout, its.chunk, its.raid_disks, its.size, its.bitmap_offset)
            == (like.layout, like.chunk, like.raid_disks, roster.size, like.bitmap_offset);
        let history = &former.records.current.as_ref()?.history;
        let is_known = matches!(history.relation(&meta.history), Relation::Same | Relation::Ancestor);
        let kept_since = self.intent.as_ref()?.lock().header().events_cleared;
        let fits = is_vacant && is_its_number && held_all && same && is_known && its.events >= kept_since;
        fits.then_some(slot)
    }

    /// Takes a former member back, to be given what it missed.
    async fn take_back(
        self: &Arc<Self>,
        meta: &mut Meta,
        device: Arc<dyn Device>,
        former: Former,
        slot: Slot,
    ) -> Result<()> {
        let Former { superblock, records } = former;
        let (name, sequence) = (device.name().to_owned(), records.sequence);
        let joining = async move { Member::join(device, superblock, None, &records).await };
        let member = Arc::new(self.wait_for_newcomer(&name, Operation::Read, joining).await?);
        // Not as one that lags: the others hear of it first. Its records go on counting.
        meta.sequences.insert(member.number(), sequence);
        self.seat(meta, &member, slot, true).await
    }

    /// Makes a device look like a member, but for its superblock.
    async fn prepare_member(&self, device: Arc<dyn Device>) -> Result<Arc<Member>> {
        let roster = self.roster();
        let mut superblock = pattern(&roster)?;
        let mut id = [0; 16];
        self.runtime.fill_random(&mut id);
        superblock.device = uuid::Builder::from_random_bytes(id).into_uuid();
        superblock.dev_number = free_number(&roster)?;
        superblock.data_size = (device.size() - superblock.data_start()) / SECTOR;
        (superblock.corrected, superblock.devflags) = (0, 0);
        (superblock.recovery, superblock.replacement) = (None, false);
        if let Some(log) = &mut superblock.bad_block_log {
            log.in_use = false;
        }
        let data = superblock.data_start();
        let durability = Durability::Cached;
        let zero = Order::Zero { at: 0, len: data, mode: ZeroMode::MayPunch, durability };
        self.ask_newcomer(&device, zero).await?;
        if let Some((at, len)) = superblock.bad_block_log_area() {
            let data = Bytes::from(vec![0xff; len]);
            self.ask_newcomer(&device, Order::Write { at, data, durability }).await?;
        }
        self.ask_newcomer(&device, Order::Flush).await?;
        let records = has_records(&roster).then(|| superblock.records_start()).flatten();
        Ok(Arc::new(Member::new(device, superblock, State::Spare, records)))
    }

    /// Brings a new member's bitmap up to date, lets `join` put it into the roster, and puts that on record.
    async fn enlist(
        self: &Arc<Self>,
        meta: &mut Meta,
        member: &Arc<Member>,
        join: impl FnOnce(&mut Roster),
    ) -> Result<()> {
        // Nobody lags when the roster changes: what brings them up would say what the others do not know yet.
        self.record(meta).await?;
        self.write_bitmap(member).await?;
        let mut roster = Roster::clone(&self.roster());
        join(&mut roster);
        self.set_roster(roster);
        self.record(meta).await?;
        if !member.is_faulty() {
            return Ok(());
        }
        // It failed at its first superblock: it never was a member.
        let mut roster = Roster::clone(&self.roster());
        roster.forget(member);
        self.set_roster(roster);
        self.record(meta).await?;
        Err(Error::JoinFailed { device: member.device.name().to_owned() })
    }

    /// Writes all pages of the bitmap to a member that is not written yet. The metadata mutex is held: no page changes
    /// on the others meanwhile.
    async fn write_bitmap(&self, member: &Arc<Member>) -> Result<()> {
        let (Some(start), Some(intent)) = (member.superblock.bitmap_start(), &self.intent) else {
            return Ok(());
        };
        let pages = intent.lock().encode();
        debug_assert!(pages.len().is_multiple_of(PAGE));
        let write = Order::Write { at: start, data: Bytes::from(pages), durability: Durability::Stable };
        self.ask(member, write).await.map(drop)
    }

    /// Gives a member a slot, to be filled by bitmap or wholly. Whoever held it before is kept aside, but for the
    /// member's own former self: from here on this is the one.
    async fn seat(
        self: &Arc<Self>,
        meta: &mut Meta,
        member: &Arc<Member>,
        slot: Slot,
        by_bitmap: bool,
    ) -> Result<()> {
        let is_other = |one: &Arc<Member>| one.number() != member.number();
        self.enlist(meta, member, |roster| {
            roster.idle.retain(is_other);
            let former = roster.seats[slot.0].member.replace(Arc::clone(member));
            roster.idle.extend(former.filter(is_other));
            roster.stale.retain(|(stale, _)| *stale != slot);
            member.take_slot(slot, by_bitmap);
        })
        .await?;
        self.tell(Event::MemberAdded { slot: Some(slot.0), path: member.device.name().to_owned() });
        self.vacancy.notify_one();
        Ok(())
    }
}

/// A member's superblock that tells what all have in common.
fn pattern(roster: &Roster) -> Result<Superblock> {
    let in_sync = roster.written().find(|member| member.is_in_sync());
    in_sync.map(|member| member.superblock.clone()).ok_or(Error::NoMembers)
}

/// Whether the members carry records of our own.
fn has_records(roster: &Roster) -> bool {
    roster.written().all(|member| member.records.is_some())
}

/// A device number that nobody has; one that was never given out, as long as there are any: a former member that
/// returns must not be taken for its successor.
fn free_number(roster: &Roster) -> Result<u32> {
    let roles = roster.roles();
    let taken = |number: usize| roster.all().any(|member| member.number() as usize == number);
    let free = |wanted: Role| {
        (0..roles.len())
            .find(|&number| roles[number] == wanted && !taken(number) && number >= roster.seats.len())
    };
    let free = free(Role::Spare).or_else(|| free(Role::Faulty));
    free.map(|number| number as u32).ok_or(Error::NoNumberLeft { count: roles.len() })
}
