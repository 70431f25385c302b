//! Who is in the array: an immutable snapshot, replaced as a whole.
//!
//! Operations take one when they begin: reads at once, changes under their range lock. A member that joins is therefore
//! known to every change that begins after it did; those that began before are waited for by the rebuild, which takes
//! the range lock of each window before it copies it. Snapshots are replaced under the metadata mutex only
//! (`lifecycle`); a member's *state* changes inside all snapshots at once, because they share the member.

use crate::geometry::{Geometry, MemberOffset, Place, Slot, Span};
use crate::member::{Member, State};
use crate::superblock::Role;
use std::sync::Arc;

/// A slot's members.
#[derive(Clone, Default)]
pub(crate) struct Seat {
    /// Who holds the slot; may be faulty. `None`: nobody has been seen.
    pub(crate) member: Option<Arc<Member>>,
    /// Who is being filled to take over from `member`, which still works.
    pub(crate) replacement: Option<Arc<Member>>,
}

impl Seat {
    /// Both, whatever their state.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.member.iter().chain(&self.replacement)
    }

    /// Whether nobody fills or holds it.
    pub(crate) fn is_vacant(&self) -> bool {
        !self.all().any(|member| member.is_written())
    }
}

/// The members of an array at some moment.
#[derive(Clone)]
pub(crate) struct Roster {
    pub(crate) geometry: Geometry,
    /// Sectors of each member's data area that the array uses, as the superblocks say.
    pub(crate) size: u64,
    /// Which members hold copies together.
    mirrors: Arc<Vec<Vec<Slot>>>,
    /// By slot.
    pub(crate) seats: Vec<Seat>,
    /// Members without a slot: spares, and faulty ones whose slot was taken over.
    pub(crate) idle: Vec<Arc<Member>>,
    /// The role of each device number that no member here has.
    pub(crate) table: Vec<Role>,
    /// Members that were given at assembly but are out of date: (slot, path).
    pub(crate) stale: Vec<(Slot, String)>,
}

impl Roster {
    /// Nobody yet.
    pub(crate) fn new(geometry: Geometry, size: u64, table: Vec<Role>) -> Self {
        let seats = vec![Seat::default(); geometry.members()];
        let mirrors = Arc::new(geometry.mirror_sets());
        Self { geometry, size, mirrors, seats, idle: Vec::new(), table, stale: Vec::new() }
    }

    /// The same members, of which so many sectors are used, as the superblocks are to say.
    pub(crate) fn using(&self, size: u64) -> Self {
        Self { size, ..self.clone() }
    }

    /// The same members in a larger array.
    pub(crate) fn resized(&self, geometry: Geometry) -> Self {
        Self { mirrors: Arc::new(geometry.mirror_sets()), geometry, ..self.clone() }
    }

    /// Takes a member off the list.
    pub(crate) fn forget(&mut self, member: &Arc<Member>) {
        let stays = |one: &Arc<Member>| !Arc::ptr_eq(one, member);
        self.idle.retain(stays);
        for seat in &mut self.seats {
            seat.member = seat.member.take().filter(stays);
            seat.replacement = seat.replacement.take().filter(stays);
        }
    }

    /// Everybody, in slot order, those without a slot last.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.seats.iter().flat_map(Seat::all).chain(&self.idle)
    }

    /// Everybody who is written: in sync or being filled, in slot order.
    pub(crate) fn written(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.seats.iter().flat_map(Seat::all).filter(|member| member.is_written())
    }

    /// Everybody who has current metadata.
    pub(crate) fn enlisted(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.all().filter(|member| !member.is_faulty())
    }

    /// The member of a slot, while it is in sync.
    pub(crate) fn in_sync(&self, slot: Slot) -> Option<&Arc<Member>> {
        self.seats[slot.0].member.as_ref().filter(|member| member.is_in_sync())
    }

    /// Whether a slot has no member in sync.
    pub(crate) fn is_degraded(&self) -> bool {
        (0..self.seats.len()).any(|slot| self.in_sync(Slot(slot)).is_none())
    }

    /// Whether each set of mirrors has a member in sync.
    pub(crate) fn is_complete(&self) -> bool {
        self.mirrors.iter().all(|set| set.iter().any(|slot| self.in_sync(*slot).is_some()))
    }

    /// Whether the array would still hold everything without this member.
    pub(crate) fn can_spare(&self, member: &Member) -> bool {
        if !member.is_in_sync() {
            return true;
        }
        let Some(own) = member.slot() else { return true };
        let holds_all =
            |slot: &Slot| *slot != own && self.in_sync(*slot).is_some_and(|other| !other.has_bad());
        self.mirrors.iter().filter(|set| set.contains(&own)).all(|set| set.iter().any(holds_all))
    }

    /// Whether of all that a member holds, or is to hold, another one in sync that `works` has a copy. A spare holds
    /// nothing.
    pub(crate) fn is_covered(&self, member: &Member, works: impl Fn(&Arc<Member>) -> bool) -> bool {
        let Some(own) = member.slot() else { return true };
        let covers = |slot: &Slot| {
            self.in_sync(*slot).is_some_and(|other| !std::ptr::eq(other.as_ref(), member) && works(other))
        };
        self.mirrors.iter().filter(|set| set.contains(&own)).all(|set| set.iter().any(covers))
    }

    /// Who a replacement is to take over from; `None` for a member that is none.
    pub(crate) fn replaced_by(&self, replacement: &Arc<Member>) -> Option<&Arc<Member>> {
        let is_it = |seat: &&Seat| seat.replacement.as_ref().is_some_and(|one| Arc::ptr_eq(one, replacement));
        self.seats.iter().find(is_it)?.member.as_ref()
    }

    /// A slot that nobody fills or holds, if there is one.
    pub(crate) fn vacancy(&self) -> Option<Slot> {
        self.seats.iter().position(Seat::is_vacant).map(Slot)
    }

    /// A spare, if there is one.
    pub(crate) fn spare(&self) -> Option<&Arc<Member>> {
        self.idle.iter().find(|member| member.state() == State::Spare)
    }

    /// What each device number is.
    pub(crate) fn roles(&self) -> Vec<Role> {
        let mut roles = self.table.clone();
        for member in self.all() {
            let number = member.number() as usize;
            if number >= roles.len() {
                roles.resize(number + 1, Role::Spare);
            }
            roles[number] = member.role();
        }
        roles
    }

    /// Members that hold or get a copy at a place, those in sync first.
    pub(crate) fn at(&self, place: Place) -> impl Iterator<Item = &Arc<Member>> {
        self.seats[place.slot.0].all()
    }

    /// The copies of a span that may be read, in slot order: the member and the position on its device.
    pub(crate) fn readable(&self, span: Span) -> Vec<(&Arc<Member>, u64)> {
        let mut places: Vec<Place> = self.geometry.places(span.chunk).collect();
        places.sort_unstable();
        let mut copies = Vec::with_capacity(places.len());
        for place in places {
            let at = MemberOffset(place.at.0 + span.within);
            let good = self.at(place).filter(|member| member.is_readable(at, span.len));
            copies.extend(good.map(|member| (member, member.position(at))));
        }
        copies
    }
}
