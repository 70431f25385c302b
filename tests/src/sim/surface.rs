//! What a simulated disk holds: the durable content, and over it the versions of each sector that only its cache knows.
//!
//! Pure: no time, no tasks. Invariants: a sector's versions are in the order they became visible, newest last; the
//! newest is what reads see; a sector without versions is durable as it stands; the digest of the durable content is
//! always up to date. Copies share the durable content until one of them changes it.

use super::rng::{Rng, scramble};
use bytes::Bytes;
use raid::device::Extent;
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Bytes a sector.
pub const SECTOR: u64 = 512;

static ZEROES: [u8; SECTOR as usize] = [0; SECTOR as usize];

/// The content of a sector, and a digest of it: 0 for zeroes, so that a sector never written counts as one of them.
#[derive(Clone)]
struct Sector {
    data: Bytes,
    digest: u64,
}

impl Sector {
    fn new(data: Bytes) -> Self {
        let digest = if data[..] == ZEROES { 0 } else { digest(&data) };
        Self { data, digest }
    }
}

/// A hash of bytes, the same in every run.
pub(super) fn digest(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(8);
    let mut hash = bytes.len() as u64;
    for word in &mut words {
        let word: [u8; 8] = word.try_into().unwrap_or_default();
        hash = (hash ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
    }
    for byte in words.remainder() {
        hash = scramble(hash ^ u64::from(*byte));
    }
    scramble(hash)
}

#[derive(Clone, Default)]
pub(super) struct Surface {
    durable: Durable,
    cached: BTreeMap<u64, Vec<Version>>,
}

/// What a power cut leaves alone.
#[derive(Clone, Default)]
struct Durable {
    sectors: Arc<BTreeMap<u64, Sector>>,
    /// What can't be read until the sector is written again.
    unreadable: BTreeSet<u64>,
    digest: u64,
}

impl Durable {
    fn keep(&mut self, sector: u64, content: Sector) {
        // A sum, so that the order in which sectors were written does not matter.
        let mark = |digest: u64| if digest == 0 { 0 } else { scramble(sector.rotate_left(32) ^ digest) };
        self.digest = self.digest.wrapping_add(mark(content.digest));
        let old = Arc::make_mut(&mut self.sectors).insert(sector, content);
        self.digest = self.digest.wrapping_sub(mark(old.map_or(0, |old| old.digest)));
        self.unreadable.remove(&sector);
    }

    fn get(&self, sector: u64) -> &[u8] {
        self.sectors.get(&sector).map_or(&ZEROES, |content| &content.data)
    }

    fn digest(&self) -> u64 {
        self.unreadable.iter().fold(self.digest, |sum, sector| scramble(sum ^ sector))
    }
}

/// What a power cut at some moment may leave: the durable content, and what else unflushed sectors may become.
#[derive(Clone)]
pub(super) struct Remains {
    durable: Durable,
    /// Contents that differ from the durable one and from each other.
    open: Vec<(u64, Vec<Sector>)>,
}

impl Remains {
    /// How many contents each open sector may have.
    pub(super) fn open(&self) -> impl Iterator<Item = u64> {
        self.open.iter().map(|(_, contents)| contents.len() as u64 + 1)
    }

    /// Equal digests mean equal choices.
    pub(super) fn digest(&self) -> u64 {
        self.open.iter().fold(self.durable.digest(), |sum, (sector, contents)| {
            let mut each: Vec<u64> = contents.iter().map(|content| content.digest).collect();
            each.sort_unstable();
            each.iter().fold(scramble(sum ^ sector), |sum, digest| scramble(sum ^ digest))
        })
    }

    /// The surface with a choice made for each open sector; 0 is the durable content.
    pub(super) fn settle(&self, mut choose: impl FnMut(u64) -> u64) -> Surface {
        let mut durable = self.durable.clone();
        for (sector, contents) in &self.open {
            let choice = choose(contents.len() as u64 + 1);
            if let Some(n) = choice.checked_sub(1) {
                durable.keep(*sector, contents[n as usize].clone());
            }
        }
        Surface { durable, cached: BTreeMap::new() }
    }
}

#[derive(Clone)]
struct Version {
    operation: u64,
    content: Sector,
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
    pub(super) fn add(&mut self, sector: u64, operation: u64, data: Bytes) {
        let version = Version { operation, content: Sector::new(data), completed: None, doomed: false };
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
                let content = versions[last].content.clone();
                versions.drain(..=last);
                self.durable.keep(*sector, content);
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
        let durable = &mut self.durable;
        self.cached.retain(|sector, versions| {
            if !versions.iter().any(covered) {
                return true;
            }
            if !passes() {
                versions.iter_mut().filter(|v| covered(v)).for_each(|v| v.doomed = true);
                return true;
            }
            if let Some(last) = versions.iter().rposition(|v| covered(v) && !v.doomed) {
                durable.keep(*sector, versions[last].content.clone());
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
                let old = self.durable.get(*sector);
                let new = &rng.pick(versions).content.data;
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
                Some(data) => self.durable.keep(sector, Sector::new(data)),
                None => {
                    self.durable.unreadable.insert(sector);
                }
            }
        }
    }

    /// Ends the cache: `choose(sector, n)` says which of its n contents a sector keeps, 0 being the durable one and
    /// n − 1 the newest.
    pub(super) fn settle(&mut self, mut choose: impl FnMut(u64, usize) -> usize) {
        for (sector, versions) in std::mem::take(&mut self.cached) {
            let mut keepable = versions.into_iter().filter(|v| !v.doomed).map(|v| v.content);
            let choice = choose(sector, keepable.clone().count() + 1);
            if let Some(content) = choice.checked_sub(1).and_then(|n| keepable.nth(n)) {
                self.durable.keep(sector, content);
            }
        }
    }

    /// What a power cut now may leave.
    pub(super) fn remains(&self) -> Remains {
        let mut open = Vec::new();
        for (sector, versions) in &self.cached {
            let readable = !self.durable.unreadable.contains(sector);
            let old = self.durable.sectors.get(sector).map_or(0, |content| content.digest);
            let mut seen: Vec<u64> = readable.then_some(old).into_iter().collect();
            let mut contents = Vec::new();
            for version in versions.iter().filter(|version| !version.doomed) {
                if !seen.contains(&version.content.digest) {
                    seen.push(version.content.digest);
                    contents.push(version.content.clone());
                }
            }
            if !contents.is_empty() {
                open.push((*sector, contents));
            }
        }
        Remains { durable: self.durable.clone(), open }
    }

    /// Equal digests mean surfaces that read the same now, and after a cut that loses all that is unflushed.
    pub(super) fn digest(&self) -> u64 {
        self.cached.iter().fold(self.durable.digest(), |sum, (sector, versions)| {
            let newest = versions.last().map_or(0, |version| version.content.digest);
            scramble(scramble(sum ^ sector) ^ newest)
        })
    }

    pub(super) fn make_unreadable(&mut self, sector: u64) {
        self.cached.remove(&sector);
        self.durable.unreadable.insert(sector);
    }

    /// Reads what is visible; fails if a sector in the way can't be read.
    pub(super) fn read(&self, at: u64, out: &mut [u8]) -> Result<(), Errno> {
        let touched = at / SECTOR..(at + out.len() as u64).div_ceil(SECTOR);
        let mut bad = self.durable.unreadable.range(touched);
        if !out.is_empty() && bad.any(|sector| !self.cached.contains_key(sector)) {
            return Err(Errno::IO);
        }
        copy_out(at, out, |sector| self.visible(sector));
        Ok(())
    }

    /// Where something was ever stored, and where not: those are holes.
    pub(super) fn extents(&self, at: u64, len: u64) -> Vec<Extent> {
        let (end, sectors) = (at + len, at / SECTOR..(at + len).div_ceil(SECTOR));
        let cached = self.cached.range(sectors.clone()).map(|(sector, _)| sector);
        let durable = self.durable.sectors.range(sectors.clone()).map(|(sector, _)| sector);
        let stored: BTreeSet<_> =
            cached.chain(durable).chain(self.durable.unreadable.range(sectors)).collect();
        let mut extents: Vec<Extent> = Vec::new();
        let mut told = at;
        let mut tell = |until: u64, hole| {
            let len = until - std::mem::replace(&mut told, until);
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.len += len,
                _ if len > 0 => extents.push(Extent { len, hole }),
                _ => {}
            }
        };
        for &sector in stored {
            tell((sector * SECTOR).max(at), true);
            tell(((sector + 1) * SECTOR).min(end), false);
        }
        tell(end, true);
        extents
    }

    pub(super) fn peek(&self, at: u64, len: u64) -> Vec<u8> {
        let mut out = vec![0; len as usize];
        copy_out(at, &mut out, |sector| self.visible(sector));
        out
    }

    pub(super) fn peek_durable(&self, at: u64, len: u64) -> Vec<u8> {
        let mut out = vec![0; len as usize];
        copy_out(at, &mut out, |sector| self.durable.get(sector));
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
            self.durable.keep(sector, Sector::new(data.into()));
        }
    }

    fn visible(&self, sector: u64) -> &[u8] {
        let newest = self.cached.get(&sector).and_then(|versions| versions.last());
        newest.map_or_else(|| self.durable.get(sector), |version| &version.content.data)
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
