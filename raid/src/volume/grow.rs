//! Growing: once all members have become larger, the array takes the new room (`mdadm --grow --size=max`).
//!
//! All of it happens under a lock of the whole array and the metadata mutex: no change is under way. The order, and what
//! a power cut means at each step:
//!
//! 1. the bitmap for the larger array, all that is new marked dirty, to all members: a bitmap of a larger array than the
//!    superblock's is read for what it says of the smaller one;
//! 2. superblocks with the new size, and as in use: those that lag behind by this one event are taken along at the next
//!    start, and what is new is made equal then;
//! 3. in memory, what is new is unsynced before it can be read, and then the size is known.
//!
//! In near and offset layouts what is there stays where it is. In far layouts the second half of each member would have
//! to move; md refuses that too.

use super::{Inner, Roster};
use crate::error::{Error, Operation, Result};
use crate::event::Event;
use crate::geometry::Geometry;
use crate::member::Member;
use crate::superblock::SECTOR;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Inner {
    /// Makes the array as large as its members allow. Returns the bytes it holds then.
    pub(super) async fn grow(self: &Arc<Self>) -> Result<u64> {
        let _turn = self.turn().await?;
        self.refuse_if_fixed(&self.roster())?;
        for member in self.roster().enlisted() {
            let device = Arc::clone(&member.device);
            let looked = async move { device.refresh().await };
            // One that hangs holds up no other command.
            self.wait_for_newcomer(member.device.name(), Operation::Read, looked).await?;
        }
        let _lock = self.locks.lock(0..u64::MAX).await;
        let mut meta = self.meta.lock().await;
        let roster = self.roster();
        // Somebody may have failed, or joined by himself, while this waited.
        self.refuse_if_fixed(&roster)?;
        let geometry = self.larger(&roster)?;
        let added = roster.geometry.size()..geometry.size();
        self.grow_bitmap(&roster, &added)?;
        self.write_pages(&mut meta).await?;
        self.refuse_if_fixed(&self.roster())?;

        for member in roster.enlisted() {
            member.set_data_size(room(member));
        }
        self.set_roster(self.roster().using(geometry.used() / SECTOR));
        if let Err(failure) = self.write_all(&mut meta, 0).await {
            // Some may say otherwise. They are written again before anything else is, or lag behind at the next start.
            self.set_roster(self.roster().using(roster.size));
            return Err(failure);
        }
        self.active.store(true, Ordering::Release);
        self.mark_unsynced(added.clone());
        self.set_roster(self.roster().resized(geometry));
        self.tell(Event::Grown { size: added.end });
        Ok(added.end)
    }

    /// Refuses arrays that cannot grow, or not now.
    fn refuse_if_fixed(&self, roster: &Roster) -> Result<()> {
        let (name, layout) = (self.name.clone(), roster.geometry.layout());
        if layout.is_far() {
            return Err(Error::GrowFar { name, layout });
        }
        if roster.is_degraded() || roster.written().any(|member| !member.is_in_sync()) {
            return Err(Error::GrowNotInSync { name });
        }
        Ok(())
    }

    /// The geometry that uses all the room there is on every member, spares included.
    fn larger(&self, roster: &Roster) -> Result<Geometry> {
        let old = &roster.geometry;
        let least = roster.enlisted().map(|member| room(member)).min().unwrap_or(0);
        let larger = Geometry::new(old.layout(), old.members(), old.chunk(), least * SECTOR)?;
        if larger.size() > old.size() {
            return Ok(larger);
        }
        let size = |member: &Arc<Member>| (member.device.name().to_owned(), member.device.size());
        Err(Error::NothingToGain { name: self.name.clone(), members: roster.enlisted().map(size).collect() })
    }

    /// Makes the bitmap in memory one of the larger array. It is to be written whole then.
    fn grow_bitmap(&self, roster: &Roster, added: &Range<u64>) -> Result<()> {
        let Some(intent) = &self.intent else { return Ok(()) };
        let room = |member: &&Arc<Member>| member.superblock.bitmap_room();
        let Some(tightest) = roster.enlisted().min_by_key(room) else { return Ok(()) };
        let device = || tightest.device.name().to_owned();
        let grown = intent.lock().grow(added, room(&tightest));
        grown.map_err(|cause| Error::Bitmap { device: device(), cause })
    }
}

/// Sectors that a member has for data, as large as its device is now.
fn room(member: &Member) -> u64 {
    member.device.size().saturating_sub(member.superblock.data_start()) / SECTOR
}
