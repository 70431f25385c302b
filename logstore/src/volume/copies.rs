//! The header and the catalog as the copies of a volume hold them: read apart, chosen by those who can tell good from bad,
//! and made the content of all copies, before any plain read.
//!
//! A plain read goes to one copy. Where that has rotted, the store would not open though another copy is good; after an
//! unclean stop it would even have the bad copy put over the good one; and one that reads as zeroes would pass for a
//! blank volume. Batches have their own way out ([`crate::heal`]); what is here is for the two things without which no
//! batch is found.
//!
//! After an unclean stop copies may differ without rot: a write was on its way. Each copy by itself is then what a
//! crash may leave of one disk, so any that its reader takes will do; the newest is taken.
//!
//! A plain read is made only where it changes nothing: where copies may differ it would make a whole window of them equal, and
//! with it what lies beside the range, of which nobody has chosen the good copy yet.
//!
//! Cost: where all copies are equal, each is read once and compared, and one is read again from memory. Memory: one
//! content, and of the blocks that differ, what each way has.

use super::layout::{COPY, HeaderFault, Layout};
use crate::error::{Error, Result};
use bytes::{Bytes, BytesMut};
use raid::device::{Device, EQUALISED};
use std::ops::Range;
use std::sync::Arc;

/// Bytes that are compared at once.
const WINDOW: u64 = 1 << 20;
/// Unit in which contents are told apart and put together: the database's page, and a copy of the header.
const BLOCK: usize = 4096;
/// Ways to put contents together that are tried, each at the price of a check of the whole.
const MOST_MIXES: usize = 64;

const _: () = assert!(COPY == BLOCK as u64 && WINDOW.is_multiple_of(COPY));

/// A block in which ways differ.
struct Odd {
    /// Its first byte in the range.
    from: usize,
    /// What each way has; `None`: it cannot be read.
    by_way: Vec<Option<Bytes>>,
}

/// Whether a plain read of a range makes copies equal, of it or of what lies in one window with it.
fn may_change(device: &Arc<dyn Device>, at: u64, len: u64) -> bool {
    let (start, end) =
        (at / EQUALISED * EQUALISED, (at + len).next_multiple_of(EQUALISED).min(device.size()));
    device.may_differ(start, end - start)
}

/// A range of a volume as its copies hold it.
pub(crate) struct Versions {
    at: u64,
    /// What all agree on; in odd blocks, what the first way has that could be read.
    common: Bytes,
    /// In order.
    odd: Vec<Odd>,
    ways: usize,
}

impl Versions {
    /// Reads a range in each way that there is. Nothing is settled or repaired by it.
    pub(crate) async fn read(device: &Arc<dyn Device>, at: u64, len: u64) -> Result<Self> {
        let ways = device.copies();
        let mut versions = Self { at, common: Bytes::new(), odd: Vec::new(), ways };
        let mut common = BytesMut::with_capacity(len as usize);
        let mut from = 0;
        while from < len {
            let part = (len - from).min(WINDOW);
            // What is equal everywhere no read can change.
            if ways == 1 || !may_change(device, at + from, part) && device.agree(at + from, part).await? {
                let bytes = device.read(at + from, raid::device::buffer(part as usize)).await?;
                common.extend_from_slice(&bytes);
            } else {
                versions.read_apart(device, from, part, &mut common).await?;
            }
            from += part;
        }
        versions.common = common.freeze();
        Ok(versions)
    }

    async fn read_apart(
        &mut self,
        device: &Arc<dyn Device>,
        from: u64,
        len: u64,
        common: &mut BytesMut,
    ) -> Result<()> {
        let at = self.at + from;
        // What was never written reads as zeroes, whatever lies on the disks.
        let blank = device.blank(at, len);
        let (mut by_way, mut failure) = (Vec::with_capacity(self.ways), None);
        for way in 0..self.ways {
            match device.read_copy(at, raid::device::buffer(len as usize), way).await {
                Ok(mut bytes) => {
                    for range in &blank {
                        bytes[(range.start - at) as usize..(range.end - at) as usize].fill(0);
                    }
                    by_way.push(Some(bytes.freeze()));
                }
                Err(error) => {
                    failure = Some(error);
                    by_way.push(None);
                }
            }
        }
        if let (true, Some(error)) = (by_way.iter().all(Option::is_none), failure) {
            return Err(error.into());
        }
        for start in (0..len as usize).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(len as usize);
            let by_way: Vec<_> =
                by_way.iter().map(|bytes| bytes.as_ref().map(|bytes| bytes.slice(range.clone()))).collect();
            let mut known = by_way.iter().flatten();
            let Some(first) = known.next() else { continue };
            common.extend_from_slice(first);
            if known.any(|other| other != first) {
                self.odd.push(Odd { from: from as usize + start, by_way });
            }
        }
        Ok(())
    }

    /// The bytes, if all copies agree on them.
    pub(crate) fn agreed(&self) -> Option<Bytes> {
        self.odd.is_empty().then(|| self.common.clone())
    }

    /// The bytes of some copy, whatever they are worth.
    pub(crate) fn any(&self) -> Bytes {
        self.common.clone()
    }

    /// Whether some copy holds more than zeroes, and where the first byte is.
    fn used(&self) -> Option<u64> {
        let common = self.common.iter().position(|&byte| byte != 0);
        let odd = self.odd.iter().flat_map(|odd| {
            let nonzero = |bytes: &Bytes| bytes.iter().position(|&byte| byte != 0);
            odd.by_way.iter().flatten().filter_map(nonzero).map(|at| odd.from + at)
        });
        common.into_iter().chain(odd).min().map(|at| self.at + at as u64)
    }

    /// The distinct contents of one block.
    pub(super) fn block(&self, from: usize) -> Vec<Bytes> {
        match self.odd.iter().find(|odd| odd.from == from) {
            Some(odd) => {
                let mut distinct: Vec<Bytes> = Vec::new();
                for bytes in odd.by_way.iter().flatten() {
                    if !distinct.contains(bytes) {
                        distinct.push(bytes.clone());
                    }
                }
                distinct
            }
            None => vec![self.common.slice(from..(from + BLOCK).min(self.common.len()))],
        }
    }

    /// The content that `judge` gives the highest rank: of those that some way has as a whole, or if it takes none of
    /// them, of those that can be put together from several. `None` where it takes nothing.
    pub(crate) fn best(&self, mut judge: impl FnMut(&[u8]) -> Option<u64>) -> Option<Bytes> {
        let all = 0..self.odd.len();
        let mut best: Option<(u64, Bytes)> = None;
        let mut try_one = |content: BytesMut, best: &mut Option<(u64, Bytes)>| {
            if let Some(rank) = judge(&content)
                && best.as_ref().is_none_or(|(highest, _)| rank > *highest)
            {
                *best = Some((rank, content.freeze()));
            }
        };
        for way in self.distinct_ways(&all) {
            try_one(self.put_together(&[(all.clone(), way)]), &mut best);
        }
        if best.is_none() {
            for choice in self.mixes() {
                try_one(self.put_together(&choice), &mut best);
            }
        }
        best.map(|(_, content)| content)
    }

    /// Ways that can read all of these odd blocks, and have something else there than those before.
    fn distinct_ways(&self, odd: &Range<usize>) -> Vec<usize> {
        let mut distinct: Vec<usize> = Vec::new();
        for way in 0..self.ways {
            let of = |way: usize| self.odd[odd.clone()].iter().map(move |odd| &odd.by_way[way]);
            if of(way).all(Option::is_some) && !distinct.iter().any(|&known| of(known).eq(of(way))) {
                distinct.push(way);
            }
        }
        distinct
    }

    /// Each way to choose odd blocks, block by block if those are few, or else neighbours together.
    fn mixes(&self) -> Vec<Vec<(Range<usize>, usize)>> {
        let each = (0..self.odd.len()).map(|at| at..at + 1).collect();
        for units in [each, self.neighbours()] {
            let units: Vec<(Range<usize>, Vec<usize>)> = units
                .into_iter()
                .map(|unit| {
                    let ways = self.distinct_ways(&unit);
                    (unit, ways)
                })
                .collect();
            let count = units.iter().fold(1usize, |count, (_, ways)| count.saturating_mul(ways.len()));
            if count <= MOST_MIXES {
                let choose = |mut number: usize| {
                    let one = units.iter().map(|(unit, ways)| {
                        let way = ways[number % ways.len()];
                        number /= ways.len();
                        (unit.clone(), way)
                    });
                    one.collect()
                };
                return (0..count).map(choose).collect();
            }
        }
        Vec::new()
    }

    /// Odd blocks in runs without a gap.
    fn neighbours(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for at in 0..self.odd.len() {
            match runs.last_mut() {
                Some(run) if self.odd[at - 1].from + BLOCK == self.odd[at].from => run.end = at + 1,
                _ => runs.push(at..at + 1),
            }
        }
        runs
    }

    fn put_together(&self, choice: &[(Range<usize>, usize)]) -> BytesMut {
        let mut content = BytesMut::from(&self.common[..]);
        for (unit, way) in choice {
            for odd in &self.odd[unit.clone()] {
                if let Some(bytes) = &odd.by_way[*way] {
                    content[odd.from..odd.from + bytes.len()].copy_from_slice(bytes);
                }
            }
        }
        content
    }

    /// Makes all copies hold `good`, durably, where they differed. That one could not be made to is an error where what
    /// makes copies equal later may take the bad one; elsewhere nothing does, and the next start chooses again.
    pub(crate) async fn mend(&self, device: &Arc<dyn Device>, good: &Bytes, what: &str) -> Result<()> {
        let mut mended = 0;
        for run in self.neighbours() {
            let (first, last) = (&self.odd[run.start], &self.odd[run.end - 1]);
            let range = first.from..(last.from + BLOCK).min(good.len());
            let (at, len) = (self.at + range.start as u64, range.len() as u64);
            match device.mend(at, good.slice(range)).await {
                Ok(_) => mended += run.len(),
                Err(error) if device.may_differ(at, len) => return Err(error.into()),
                Err(error) => {
                    tracing::warn!("{}: {what} is good in some copies only: {error}", device.name());
                }
            }
        }
        if mended > 0 {
            tracing::warn!(
                "{}: {mended} blocks of {what} were not the same in all copies; they are now",
                device.name()
            );
        }
        Ok(())
    }
}

/// The header of a volume, from whichever copies have it.
pub(crate) struct Head {
    pub(crate) layout: Layout,
    versions: Versions,
    good: Bytes,
}

impl Head {
    /// Reads it; `Ok(Err(fault))` when there is none in any copy.
    pub(crate) async fn read(device: &Arc<dyn Device>) -> Result<std::result::Result<Self, HeaderFault>> {
        let versions = Versions::read(device, 0, 2 * COPY).await?;
        let (size, mut good, mut all) = (device.size(), BytesMut::new(), Vec::new());
        for from in [0, BLOCK] {
            let candidates = versions.block(from);
            let generation = |bytes: &&Bytes| Layout::decode(bytes, size).ok().map(|found| found.generation);
            good.extend(candidates.iter().max_by_key(generation).map(|bytes| &bytes[..]).unwrap_or_default());
            all.extend(candidates);
        }
        let layout = Layout::choose(all.iter().map(|bytes| &bytes[..]), size);
        Ok(layout.map(|layout| Self { layout, versions, good: good.freeze() }))
    }

    /// Makes all copies of the volume hold it.
    pub(crate) async fn mend(&self, device: &Arc<dyn Device>) -> Result<()> {
        self.versions.mend(device, &self.good, "the log store's header").await
    }
}

/// Refuses a range in which some copy holds anything but zeroes.
pub(crate) async fn look_blank(device: &Arc<dyn Device>, end: u64) -> Result<()> {
    let mut at = 0;
    while at < end {
        let len = (end - at).min(WINDOW);
        if let Some(used) = Versions::read(device, at, len).await?.used() {
            let (place, found) = (device.name().to_owned(), format!("byte {used} is not zero"));
            return Err(Error::NotALogStore { place, found });
        }
        at += len;
    }
    Ok(())
}
