//! Starting an array: whose superblock counts, who joins, who is out of date, what may differ between copies.
//!
//! The member with the most events knows best: its table says who holds a slot. A member joins if that table gives
//! it a slot, it is behind by one event at most (a crash between two superblock writes leaves that), and its own table
//! does not call the freshest one failed. Two that call each other failed have run apart; no order of events can say
//! whose data is wanted, so that is refused.
//!
//! Nothing is written here, and no data is read: superblocks and bitmaps only.

use super::metadata::{Content, Meta, Written};
use super::pulse::Pulse;
use super::range_lock::RangeLocks;
use super::read::MOST_HEDGES;
use super::untouched::Untouched;
use super::{Gate, Inner, RangeSet, Roster};
use crate::bitmap::{BitmapHeader, Intent, PAGE};
use crate::device::{Device, buffer};
use crate::error::{Error, Result};
use crate::event::EventLog;
use crate::geometry::{Geometry, Slot};
use crate::member::{Member, Records, read_bitmap, read_records, read_superblock_bytes, search_records};
use crate::record::{Granules, History, Relation};
use crate::runtime::Runtime;
use crate::superblock::{Role, SECTOR, SUPER_BYTES, Superblock, SuperblockError};
use crate::sync::{Progress, Scrub, Speed};
use arc_swap::ArcSwap;
use futures_util::future::join_all;
use parking_lot::Mutex;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Weak};
use tokio::sync::{Notify, Semaphore};

/// How to start an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AssembleOptions {
    /// Nothing is written, not even metadata; changes are refused.
    pub read_only: bool,
    /// Nothing is resynced or filled in the background until [`Volume::release_resync`](super::Volume::release_resync):
    /// copies that may differ stay as they are, so that who knows the content can choose among them
    /// ([`Device::read_copy`], [`Device::mend`]) before the first one in slot order is copied over the others. What is
    /// *read* is made equal all the same; a scrub leaves out what may differ.
    pub hold_resync: bool,
}

/// A device and the superblock on it.
struct Candidate {
    device: Arc<dyn Device>,
    superblock: Superblock,
    /// Its bytes; `None` where it is damaged and its record had the copy that is used.
    bytes: Option<Box<[u8; SUPER_BYTES]>>,
    records: Records,
}

impl Candidate {
    fn name(&self) -> String {
        self.device.name().to_owned()
    }

    fn history(&self) -> Option<&History> {
        self.records.current.as_ref().map(|record| &record.history)
    }
}

pub(super) async fn assemble(
    devices: Vec<Arc<dyn Device>>,
    options: AssembleOptions,
    runtime: Arc<dyn Runtime>,
) -> Result<Inner> {
    let mut candidates = read_candidates(devices).await?;
    refuse_foreign_and_double(&candidates)?;
    let called_failed = called_failed(&candidates);
    // The most events first, then those that nobody calls failed, then those that hold everything, then the lowest
    // number: nothing else counts. A spare knows no more than whoever it is a spare for.
    candidates.sort_by_key(|found| {
        let its = &found.superblock;
        let is_idle = !matches!(its.own_role(), Role::Active(_));
        let is_partial = its.recovery.is_some() || its.replacement;
        (is_idle, Reverse(its.events), called_failed.contains(&its.dev_number), is_partial, its.dev_number)
    });
    let Chosen { current, spares, stale } = choose(leave_out_superseded(candidates))?;
    let freshest = current.first().map(|(_, found)| found.superblock.clone()).ok_or(Error::NoMembers)?;
    let name = if freshest.name.is_empty() { freshest.array.to_string() } else { freshest.name.clone() };
    let geometry = freshest.geometry()?;
    let history = current.first().and_then(|(_, found)| found.history().cloned()).unwrap_or_default();
    let untouched = untouched(&geometry, &current);
    let Seated { roster, written, sequences } =
        seat(&freshest, geometry.clone(), current, spares, stale).await?;
    if !roster.is_complete() {
        let missing = (0..geometry.members()).filter(|&slot| roster.in_sync(Slot(slot)).is_none()).collect();
        let stale = roster.stale.iter().map(|(_, path)| path.clone()).collect();
        return Err(Error::NotEnoughMembers { name, missing, stale });
    }
    let missing = missing_but_on_record(&roster);
    let degraded = roster.is_degraded();
    let mut intent = read_intent(&freshest, &roster).await;
    let mut unsynced = RangeSet::default();
    if !freshest.is_clean() {
        unsynced_ranges(&freshest, &geometry, intent.as_ref()).for_each(|range| unsynced.insert(range));
    } else if !degraded && let Some(intent) = &mut intent {
        // Stopped cleanly and whole: bits that are set (md sets all at creation) mean nothing.
        intent.clear_all();
    }
    if untouched.blank() {
        // Whatever a bitmap says: nothing was ever written there, and all copies read as zeroes.
        untouched.ranges().iter().for_each(|range| unsynced.remove(range));
    }
    let joined = || roster.written().map(|member| &member.superblock);
    // A stop in the middle of a resync leaves a position there: that is not enough for a write before it.
    let active = joined().all(|superblock| superblock.resync_offset == 0);
    let said = Content::of(&freshest, joined(), &history);
    let meta = Meta {
        events: freshest.events,
        content: joined()
            .all(|other| other.events == freshest.events && Content::of(other, joined(), &history) == said)
            .then_some(said),
        holders: holders(&freshest, &roster),
        history,
        handover: None,
        written,
        sequences,
        was_clean: freshest.is_clean(),
        touched: false,
    };
    tracing::info!(volume = %name, uuid = %freshest.array, events = freshest.events, degraded,
        unsynced = unsynced.len(), "assembled");
    Ok(Inner {
        own: Weak::new(),
        pulse: Pulse::new(Arc::clone(&runtime)),
        runtime,
        uuid: freshest.array,
        name: name.clone(),
        read_only: options.read_only,
        roster: ArcSwap::from_pointee(roster),
        commands: tokio::sync::Mutex::new(()),
        verdicts: Mutex::new(()),
        arrangements: AtomicU64::new(0),
        noticed: AtomicU64::new(missing),
        recorded: AtomicU64::new(0),
        locks: RangeLocks::default(),
        hedges: Semaphore::new(MOST_HEDGES),
        intent: intent.map(Mutex::new),
        active: AtomicBool::new(active),
        meta: tokio::sync::Mutex::new(meta),
        any_unsynced: AtomicBool::new(!unsynced.is_empty()),
        // Nobody walks over an array that is read only.
        marked: AtomicU64::new(u64::from(!options.read_only && !unsynced.is_empty())),
        walked: AtomicU64::new(0),
        unsynced: Mutex::new(unsynced),
        settled: AtomicBool::new(freshest.is_clean()),
        held: AtomicBool::new(options.hold_resync),
        progress: Progress::default(),
        speed: Speed::default(),
        scrub: Scrub::default(),
        events: EventLog::new(&name),
        untouched,
        lost: AtomicBool::new(false),
        gate: Gate::default(),
        background: Arc::default(),
        wake: Arc::new(Notify::new()),
        vacancy: Arc::new(Notify::new()),
    })
}

/// Who held good data when the freshest superblock was written: device numbers, of members here and absent.
fn holders(freshest: &Superblock, roster: &Roster) -> BTreeSet<u32> {
    let active = |number: &u32| matches!(freshest.role_of(*number), Role::Active(_));
    let is_partial = |number: &u32| {
        let replacements = roster.seats.iter().filter_map(|seat| seat.replacement.as_ref());
        let filled = roster.written().filter(|member| !member.is_in_sync());
        replacements.chain(filled).any(|member| member.number() == *number)
    };
    (0..freshest.roles.len() as u32).filter(|number| active(number) && !is_partial(number)).collect()
}

/// What was never written: what the records of all members agree on; one without a record knows of nothing.
fn untouched(geometry: &Geometry, current: &Current) -> Untouched {
    let mut agreed: Option<(Granules, bool)> = None;
    for (_, found) in current {
        let Some(record) = &found.records.current else { return Untouched::default() };
        match &mut agreed {
            Some((granules, blank)) => {
                granules.intersect(&record.untouched);
                *blank &= record.blank;
            }
            None => agreed = Some((record.untouched.clone(), record.blank)),
        }
    }
    let fits = |granules: &Granules| granules.ranges().all(|range| range.end <= geometry.size());
    let agreed = agreed.filter(|(granules, _)| fits(granules));
    agreed.map_or_else(Untouched::default, |(granules, blank)| Untouched::new(granules, blank))
}

/// The freshest role table without those who are here; whoever holds a slot there and is absent counts as failed from
/// now on.
fn table(freshest: &Superblock, current: &Current) -> Vec<Role> {
    let is_here =
        |number: usize| current.iter().any(|(_, found)| found.superblock.dev_number as usize == number);
    let mut table = freshest.roles.clone();
    for (number, role) in table.iter_mut().enumerate() {
        if matches!(role, Role::Active(_)) && !is_here(number) {
            *role = Role::Faulty;
        }
    }
    table
}

/// Reads all superblocks. What is damaged is left out here, if anything is left; what is no member is refused.
async fn read_candidates(devices: Vec<Arc<dyn Device>>) -> Result<Vec<Candidate>> {
    let found = join_all(devices.iter().map(|device| read_superblock_bytes(device.as_ref()))).await;
    let (mut candidates, mut damaged) = (Vec::new(), Vec::new());
    for (device, outcome) in devices.into_iter().zip(found) {
        match outcome {
            Ok((superblock, bytes)) => {
                let records = read_records(device.as_ref(), &superblock, &bytes[..]).await;
                candidates.push(Candidate { device, superblock, bytes: Some(bytes), records });
            }
            Err(failure) => damaged.push((device, failure)),
        }
    }
    let array = candidates.first().map(|found| found.superblock.clone());
    for (device, failure) in damaged {
        // A power cut tears; it makes no superblock that is whole and says something absurd.
        let may_be_torn = match &failure {
            Error::Superblock { cause, .. } => {
                matches!(cause, SuperblockError::Checksum { .. } | SuperblockError::Magic)
            }
            other => matches!(other, Error::Io { .. }),
        };
        let its_own = if may_be_torn { search_records(device.as_ref()).await } else { None };
        let its_own = its_own.filter(|(copy, _)| array.as_ref().is_none_or(|like| copy.array == like.array));
        if let Some((superblock, records)) = its_own {
            tracing::warn!(member = device.name(), %failure, "the copy in its record is used");
            candidates.push(Candidate { device, superblock, bytes: None, records });
            continue;
        }
        let Some(like) = &array else { return Err(failure) };
        let torn = match &failure {
            Error::Superblock { cause: SuperblockError::Checksum { .. }, .. } | Error::Io { .. } => true,
            // A torn superblock may have lost its magic; the bitmap behind it says whose it was.
            Error::Superblock { cause: SuperblockError::Magic, .. } => has_bitmap_of(&device, like).await,
            _ => false,
        };
        if !torn {
            return Err(failure);
        }
        tracing::warn!(member = device.name(), %failure, "left out");
    }
    if candidates.is_empty() { Err(Error::NoMembers) } else { Ok(candidates) }
}

async fn has_bitmap_of(device: &Arc<dyn Device>, like: &Superblock) -> bool {
    let (Some(start), Ok(geometry)) = (like.bitmap_start(), like.geometry()) else { return false };
    let page = device.read(start, buffer(PAGE)).await;
    page.is_ok_and(|page| {
        BitmapHeader::decode(&page, like.array, geometry.size(), like.bitmap_room()).is_ok()
    })
}

/// The numbers of members that another one with as many events calls failed. A power cut between two superblock
/// writes can leave a member one event ahead; those that go on without it record its failure with that same count.
/// What they say is newer than what it says of itself.
fn called_failed(candidates: &[Candidate]) -> Vec<u32> {
    let calls_failed = |one: &Superblock, other: &Superblock| {
        one.events == other.events && one.role_of(other.dev_number) == Role::Faulty
    };
    candidates
        .iter()
        .map(|found| &found.superblock)
        .filter(|found| candidates.iter().any(|other| calls_failed(&other.superblock, found)))
        .map(|found| found.dev_number)
        .collect()
}

/// Members in their seats, and what their metadata says.
struct Seated {
    roster: Roster,
    written: BTreeMap<u32, Written>,
    sequences: BTreeMap<u32, u64>,
}

/// Takes everybody in. One whose metadata cannot be read is left out.
async fn seat(
    freshest: &Superblock,
    geometry: Geometry,
    current: Current,
    spares: Vec<Candidate>,
    stale: Stale,
) -> Result<Seated> {
    let (mut written, mut sequences) = (BTreeMap::new(), BTreeMap::new());
    let mut roster = Roster::new(geometry, freshest.size, table(freshest, &current));
    roster.stale = stale;
    for (slot, found) in current {
        let is_replacement = found.superblock.replacement;
        sequences.insert(found.superblock.dev_number, found.records.sequence);
        written.insert(found.superblock.dev_number, Written::found(&found));
        let (path, number) = (found.name(), found.superblock.dev_number as usize);
        let member = match join(found, Some(slot), freshest.size).await {
            Ok(member) => Arc::new(member),
            Err(failure @ Error::Io { .. }) => {
                tracing::warn!(member = %path, %failure, "its metadata cannot be read: left out");
                roster.table[number] = Role::Faulty;
                roster.stale.push((slot, path));
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let seat = &mut roster.seats[slot.0];
        *(if is_replacement { &mut seat.replacement } else { &mut seat.member }) = Some(member);
    }
    for found in spares {
        sequences.insert(found.superblock.dev_number, found.records.sequence);
        written.insert(found.superblock.dev_number, Written { events: 0, ..Written::found(&found) });
        roster.idle.push(Arc::new(join(found, None, freshest.size).await?));
    }
    Ok(Seated { roster, written, sequences })
}

/// Takes a candidate in. One that a power cut kept from the news that the array has grown, to `size` sectors of each
/// member, uses its device as the others do.
async fn join(found: Candidate, slot: Option<Slot>, size: u64) -> Result<Member> {
    let room = room(found.device.as_ref(), &found.superblock);
    let member = Member::join(found.device, found.superblock, slot, &found.records).await?;
    if member.data_size() < size {
        member.set_data_size(room);
    }
    Ok(member)
}

fn refuse_foreign_and_double(candidates: &[Candidate]) -> Result<()> {
    for (i, found) in candidates.iter().enumerate() {
        for earlier in &candidates[..i] {
            if found.superblock.array != earlier.superblock.array {
                return Err(Error::MixedArrays {
                    device: found.name(),
                    array: found.superblock.array,
                    other: earlier.name(),
                    other_array: earlier.superblock.array,
                });
            }
            let (one, other) = (&found.superblock, &earlier.superblock);
            let same_number = one.dev_number == other.dev_number && one.events == other.events;
            if one.device == other.device || same_number {
                return Err(Error::MemberTwice { device: found.name(), other: earlier.name() });
            }
        }
    }
    Ok(())
}

/// Leaves out those whose number was given to somebody else after they had left. Candidates come freshest first.
fn leave_out_superseded(candidates: Vec<Candidate>) -> Vec<Candidate> {
    let mut numbers = BTreeSet::new();
    let mut left = Vec::with_capacity(candidates.len());
    for found in candidates {
        if numbers.insert(found.superblock.dev_number) {
            left.push(found);
        } else {
            tracing::warn!(member = %found.name(), "its number was given to another member since: left out");
        }
    }
    left
}

type Current = Vec<(Slot, Candidate)>;
type Stale = Vec<(Slot, String)>;

/// What becomes of the candidates.
struct Chosen {
    /// Who joins with a slot, the freshest first.
    current: Current,
    /// Who waits for one.
    spares: Vec<Candidate>,
    /// Who is out of date.
    stale: Stale,
}

/// Sorts candidates, who come freshest first.
fn choose(candidates: Vec<Candidate>) -> Result<Chosen> {
    let Some(first) = candidates.first() else { return Err(Error::NoMembers) };
    let (freshest, freshest_name) = (first.superblock.clone(), first.name());
    let history = first.history().cloned();
    let mut chosen = Chosen { current: Vec::new(), spares: Vec::new(), stale: Vec::new() };
    for found in candidates {
        let its = &found.superblock;
        let role = freshest.role_of(its.dev_number);
        // One that has not heard of its slot holds nothing, whatever others say: it waits for a slot again.
        if its.own_role() == Role::Spare && matches!(role, Role::Spare | Role::Active(_)) {
            chosen.spares.push(found);
            continue;
        }
        let of_freshest = its.role_of(freshest.dev_number);
        let relation = found.history().zip(history.as_ref()).map(|(its, other)| its.relation(other));
        let ran_apart = match relation {
            Some(Relation::Diverged) => true,
            Some(Relation::Same | Relation::Ancestor | Relation::Descendant) => false,
            // No history tells: md's tables do. Each has gone on without the other.
            Some(Relation::Unknown) | None => of_freshest == Role::Faulty && !matches!(role, Role::Active(_)),
        };
        if ran_apart {
            return Err(Error::Diverged { device: found.name(), other: freshest_name });
        }
        let knows_freshest = of_freshest == freshest.own_role();
        let slot = match role {
            Role::Active(slot) if knows_freshest && its.events.saturating_add(1) >= freshest.events => slot,
            _ => {
                tracing::warn!(member = %found.name(), events = its.events, freshest = freshest.events,
                    "out of date or failed earlier: left out");
                if let Role::Active(slot) = its.own_role() {
                    chosen.stale.push((slot, found.name()));
                }
                continue;
            }
        };
        let shape = |one: &Superblock| (one.layout, one.chunk, one.raid_disks, one.bitmap_offset.is_some());
        if shape(its) != shape(&freshest) || !has_size(&found, &freshest) {
            return Err(Error::Disagreement { device: found.name(), other: freshest_name });
        }
        let same_place = |(taken, other): &&(Slot, Candidate)| {
            *taken == slot && other.superblock.replacement == its.replacement
        };
        if let Some(at) = chosen.current.iter().position(|one| same_place(&one)) {
            // One took the place of the other, and a power cut came before the freshest knew. Whoever has that on
            // record is the one that counts.
            let other = &chosen.current[at].1;
            if other.superblock.role_of(its.dev_number) == Role::Faulty {
                chosen.stale.push((slot, found.name()));
                continue;
            }
            if its.role_of(other.superblock.dev_number) != Role::Faulty {
                return Err(Error::MemberTwice { device: found.name(), other: other.name() });
            }
            let (_, other) = chosen.current.remove(at);
            chosen.stale.push((slot, other.name()));
        }
        chosen.current.push((slot, found));
    }
    Ok(chosen)
}

/// Whether a member says of the array's size what the freshest says, or would have said so with the next event: a power
/// cut came while the array grew. Its device must be large enough in any case.
fn has_size(found: &Candidate, freshest: &Superblock) -> bool {
    let its = &found.superblock;
    its.size == freshest.size
        || its.events < freshest.events && room(found.device.as_ref(), its) >= freshest.size
}

/// Device numbers without a member here that the table of any member still gives a slot: failures that are not on
/// record everywhere yet. The freshest alone knowing of one is not enough: it may be the next that is lost.
fn missing_but_on_record(roster: &Roster) -> u64 {
    let here: BTreeSet<usize> = roster.written().map(|member| member.number() as usize).collect();
    let active = |role: &Role| matches!(role, Role::Active(_));
    let tables = roster.written().map(|member| &member.superblock.roles);
    let holders = tables.flat_map(|roles| (0..roles.len()).filter(|&number| active(&roles[number])));
    holders.filter(|number| !here.contains(number)).collect::<BTreeSet<usize>>().len() as u64
}

/// The union of the members' bitmaps; every bit set if none can be trusted. `None` where the array has none.
async fn read_intent(freshest: &Superblock, roster: &Roster) -> Option<Intent> {
    freshest.bitmap_offset?;
    let present: Vec<&Arc<Member>> = roster.written().collect();
    let size = freshest.geometry().ok()?.size();
    let read = present.iter().map(|member| read_bitmap(member.device.as_ref(), &member.superblock, size));
    let mut merged: Option<Intent> = None;
    let mut complete = true;
    for (member, outcome) in present.iter().zip(join_all(read).await) {
        let member_name = member.device.name();
        match outcome {
            Ok(Some((header, bytes))) if !header.stale && header.events >= freshest.events => {
                match &mut merged {
                    Some(intent) if intent.header().region == header.region => intent.merge(&bytes, false),
                    Some(_) => {
                        tracing::warn!(member = member_name, "bitmap with other regions: not used");
                        complete = false;
                    }
                    None => {
                        let mut intent = Intent::new(header, false);
                        intent.merge(&bytes, true);
                        merged = Some(intent);
                    }
                }
            }
            Ok(_) => {
                tracing::warn!(member = member_name, "bitmap was not kept up: not used");
                complete = false;
            }
            Err(failure) => {
                tracing::warn!(member = member_name, %failure, "bitmap not used");
                complete = false;
            }
        }
    }
    let mut intent = if let Some(intent) = merged {
        intent
    } else {
        let room = present.iter().map(|member| member.superblock.bitmap_room()).min()?;
        let header = BitmapHeader::fitting(freshest.array, size, freshest.events, room)?;
        let mut intent = Intent::new(header, false);
        intent.set_all();
        intent
    };
    if !complete {
        intent.distrust();
    }
    Some(intent)
}

/// What may differ between copies after an unclean stop.
fn unsynced_ranges(
    freshest: &Superblock,
    geometry: &Geometry,
    intent: Option<&Intent>,
) -> impl Iterator<Item = std::ops::Range<u64>> {
    let from = freshest.resync_offset.saturating_mul(SECTOR).min(geometry.size());
    let all = intent.is_none().then(|| from..geometry.size());
    let dirty = intent.into_iter().flat_map(Intent::dirty_ranges).filter(move |range| range.end > from);
    dirty.chain(all)
}

impl Written {
    /// What a member has, as it was found. A damaged superblock counts as one that was never written: it is the first to
    /// be written again.
    fn found(found: &Candidate) -> Self {
        let events = if found.bytes.is_some() { found.superblock.events } else { 0 };
        let superblock = found.bytes.clone();
        let its = &found.superblock;
        let whole = its.holds_everything();
        Self { events, whole, superblock, bad: 0 }
    }
}

/// Sectors that a device has for data.
fn room(device: &dyn Device, superblock: &Superblock) -> u64 {
    device.size().saturating_sub(superblock.data_start()) / SECTOR
}
