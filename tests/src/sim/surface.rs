//! What a simulated disk holds: the durable content, and over it the versions of each sector that only its cache knows.
//!
//! Pure: no time, no tasks. Invariants: a sector's versions are in the order they became visible, newest last; the
//! newest is what reads see; a sector without versions is durable as it stands.

use super::rng::Rng;
use bytes::Bytes;
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Bytes a sector.
pub const SECTOR: u64 = 512;
/// The content of a sector.
pub(super) type Sector = Bytes;

static ZEROES: [u8; SECTOR as usize] = [0; SECTOR as usize];

#[derive(Clone, Default)]
pub(super) struct Surface {
    durable: BTreeMap<u64, Sector>,
    cached: BTreeMap<u64, Vec<Version>>,
    /// Durable content that can't be read until the sector is written again.
    unreadable: BTreeSet<u64>,
}

#[derive(Clone)]
struct Version {
    operation: u64,
    data: Sector,
    /// Which completed write it belongs to, counted; `None` while in flight.
    completed: Option<u64>,
    /// A failed flush covered it: no later one will make it durable.
    doomed: bool,
}

impl Surface {
    pub(super) fn unflushed(&self) -> usize {
        self.cached.len()
    }

    /// A new version of a sector becomes visible.
    pub(super) fn add(&mut self, sector: u64, operation: u64, data: Sector) {
        let version = Version { operation, data, completed: None, doomed: false };
        self.cached.entry(sector).or_default().push(version);
    }

    /// The write `operation` completed, as the `count`-th; a stable one is durable now.
    pub(super) fn complete(&mut self, operation: u64, touched: Range<u64>, count: u64, stable: bool) {
        let mut emptied = Vec::new();
        for (sector, versions) in self.cached.range_mut(touched) {
            let Some(last) = versions.iter().rposition(|v| v.operation == operation) else { continue };
            for version in versions.iter_mut().filter(|v| v.operation == operation) {
                version.completed = Some(count);
            }
            if stable {
                let data = versions[last].data.clone();
                versions.drain(..=last);
                self.durable.insert(*sector, data);
                self.unreadable.remove(sector);
                if versions.is_empty() {
                    emptied.push(*sector);
                }
            }
        }
        for sector in emptied {
            self.cached.remove(&sector);
        }
    }

    /// Makes durable what completed up to the `covers`-th write.
    pub(super) fn flush(&mut self, covers: u64) {
        self.flush_where(covers, || true);
    }

    /// Makes some of that durable and dooms the rest.
    pub(super) fn fail_flush(&mut self, covers: u64, rng: &mut Rng) {
        self.flush_where(covers, || rng.one_in(1, 2));
    }

    fn flush_where(&mut self, covers: u64, mut passes: impl FnMut() -> bool) {
        let covered = |v: &Version| v.completed.is_some_and(|count| count <= covers);
        let (durable, unreadable) = (&mut self.durable, &mut self.unreadable);
        self.cached.retain(|sector, versions| {
            if !versions.iter().any(covered) {
                return true;
            }
            if !passes() {
                versions.iter_mut().filter(|v| covered(v)).for_each(|v| v.doomed = true);
                return true;
            }
            if let Some(last) = versions.iter().rposition(|v| covered(v) && !v.doomed) {
                durable.insert(*sector, versions[last].data.clone());
                unreadable.remove(sector);
                versions.drain(..=last);
            }
            !versions.is_empty()
        });
    }

    /// Lets some unflushed sectors tear or become unreadable; of 1000 each.
    pub(super) fn mangle(&mut self, torn: u64, unreadable: u64, rng: &mut Rng) {
        let mut wounded = Vec::new();
        for (sector, versions) in &self.cached {
            if rng.one_in(unreadable, 1000) {
                wounded.push((*sector, None));
            } else if rng.one_in(torn, 1000) {
                let old = self.durable.get(sector).map_or(&ZEROES[..], |data| &data[..]);
                let new = &rng.pick(versions).data;
                let cut = rng.within(1..SECTOR / 8) as usize * 8;
                let mixed = if rng.one_in(1, 2) {
                    [&new[..cut], &old[cut..]].concat()
                } else {
                    [&old[..cut], &new[cut..]].concat()
                };
                wounded.push((*sector, Some(Bytes::from(mixed))));
            }
        }
        for (sector, data) in wounded {
            self.cached.remove(&sector);
            match data {
                Some(data) => {
                    self.durable.insert(sector, data);
                    self.unreadable.remove(&sector);
                }
                None => {
                    self.unreadable.insert(sector);
                }
            }
        }
    }

    /// Ends the cache: `choose(sector, n)` says which of its n contents a sector keeps, 0 being the durable one and
    /// n − 1 the newest.
    pub(super) fn settle(&mut self, mut choose: impl FnMut(u64, usize) -> usize) {
        for (sector, versions) in std::mem::take(&mut self.cached) {
            let mut keepable = versions.into_iter().filter(|v| !v.doomed).map(|v| v.data);
            let choice = choose(sector, keepable.clone().count() + 1);
            if let Some(data) = choice.checked_sub(1).and_then(|n| keepable.nth(n)) {
                self.durable.insert(sector, data);
                self.unreadable.remove(&sector);
            }
        }
    }

    pub(super) fn make_unreadable(&mut self, sector: u64) {
        self.cached.remove(&sector);
        self.unreadable.insert(sector);
    }

    /// Reads what is visible; fails if a sector in the way can't be read.
    pub(super) fn read(&self, at: u64, out: &mut [u8]) -> Result<(), Errno> {
        let touched = at / SECTOR..(at + out.len() as u64).div_ceil(SECTOR);
        let mut bad = self.unreadable.range(touched);
        if !out.is_empty() && bad.any(|sector| !self.cached.contains_key(sector)) {
            return Err(Errno::IO);
        }
        copy_out(at, out, |sector| self.visible(sector));
        Ok(())
    }

    pub(super) fn peek(&self, at: u64, len: u64) -> Vec<u8> {
        let mut out = vec![0; len as usize];
        copy_out(at, &mut out, |sector| self.visible(sector));
        out
    }

    pub(super) fn peek_durable(&self, at: u64, len: u64) -> Vec<u8> {
        let mut out = vec![0; len as usize];
        copy_out(at, &mut out, |sector| self.durable.get(&sector).map_or(&ZEROES, |data| data));
        out
    }

    /// Overwrites bytes for good.
    pub(super) fn poke(&mut self, at: u64, bytes: &[u8]) {
        for sector in at / SECTOR..(at + bytes.len() as u64).div_ceil(SECTOR) {
            let start = sector * SECTOR;
            let mut data = self.visible(sector).to_vec();
            let (from, to) = (at.max(start), (at + bytes.len() as u64).min(start + SECTOR));
            data[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            self.cached.remove(&sector);
            self.unreadable.remove(&sector);
            self.durable.insert(sector, data.into());
        }
    }

    fn visible(&self, sector: u64) -> &[u8] {
        let newest = self.cached.get(&sector).and_then(|versions| versions.last()).map(|v| &v.data);
        newest.or_else(|| self.durable.get(&sector)).map_or(&ZEROES, |data| data)
    }
}

fn copy_out<'a>(at: u64, out: &mut [u8], content: impl Fn(u64) -> &'a [u8]) {
    let mut done = 0;
    while done < out.len() {
        let position = at + done as u64;
        let from = (position % SECTOR) as usize;
        let n = (SECTOR as usize - from).min(out.len() - done);
        out[done..done + n].copy_from_slice(&content(position / SECTOR)[from..from + n]);
        done += n;
    }
}
