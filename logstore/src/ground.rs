//! Which copy of a batch is good: looking for it in every way that its bytes can be read.
//!
//! Sound are bytes whose checksum is right and whose first 16 bytes, which no checksum covers, are what they must be: the
//! offset that follows, the epoch that wrote there. If no copy is sound as a whole, sectors of several are put together.
//! Nothing is changed here: [`crate::heal`] makes other copies good, [`crate::inspect`] only tells.
//! Where no copy is sound, [`crate::search`] finds where the log goes on.
//!
//! Memory: a batch of up to [`WHOLE`] bytes for each copy, a larger one only if it is sound.

use crate::batch::{self, BatchFault, HEADER, Header};
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::home::Copies;
use crate::scan::Scan;
use crate::segment::End;
use bytes::{Bytes, BytesMut};
use std::fmt::Display;
use std::ops::Range;

/// Largest batch that is taken into memory before its checksum is known to be right.
const WHOLE: u32 = 1 << 20;
/// Unit in which copies are put together.
const SECTOR: u64 = 512;
/// Ways to put copies together that are tried. With a 32-bit checksum, one in 16 million would be right by chance.
const MOST_MIXES: usize = 256;
/// Largest batch that is put together from several copies.
const LARGEST_MIX: u64 = 16 << 20;

/// The bytes in which a batch is looked for.
#[derive(Clone, Copy)]
pub(crate) struct Ground<'a> {
    /// What to call it in messages.
    pub(crate) name: &'a (dyn Display + Sync),
    pub(crate) bytes: &'a dyn Copies,
    pub(crate) base: i64,
    pub(crate) end: End,
    /// What wrote where, if it is known.
    pub(crate) epochs: Option<&'a Epochs>,
    /// An offset at which the log is known to have ended once, if more was written.
    pub(crate) ended: Option<i64>,
}

/// Sound bytes found in some way.
pub(crate) struct Sound {
    pub(crate) header: Header,
    pub(crate) bytes: Bytes,
}

impl Ground<'_> {
    /// Whether a header may stand at `position`, after batches that end at `expected`.
    pub(crate) fn fits(
        &self,
        header: &Header,
        position: u64,
        expected: Option<i64>,
    ) -> std::result::Result<(), BatchFault> {
        let (needed, available) = (u64::from(header.size), self.end.size - position);
        let found = header.base_offset;
        let least = expected.unwrap_or(self.base);
        if found < least || header.last_offset_delta < 0 || header.next_offset() > self.end.next {
            return Err(BatchFault::BaseOffset { found, expected: least });
        }
        if needed > available {
            return Err(BatchFault::Truncated { needed, available });
        }
        Ok(())
    }

    /// Whether what no checksum covers is other than expected, though it may be right.
    pub(crate) fn is_odd(&self, header: &Header, expected: Option<i64>) -> bool {
        let gap = expected.is_some_and(|expected| header.base_offset != expected);
        let epoch = self.epochs.and_then(|epochs| epochs.at(header.base_offset));
        gap || epoch.is_some_and(|epoch| epoch != header.leader_epoch)
    }

    /// Reads as everybody does (`None`), or in one way. What cannot be read is a fault of the batch.
    pub(crate) async fn read(
        &self,
        at: u64,
        len: u64,
        way: Option<usize>,
    ) -> Result<std::result::Result<Bytes, BatchFault>> {
        let buf = raid::device::buffer(len as usize);
        let read = match way {
            None => self.bytes.read(at, buf).await,
            Some(way) => self.bytes.read_copy(at, buf, way).await,
        };
        match read {
            Ok(bytes) => Ok(Ok(bytes.freeze())),
            Err(error @ (Error::Device(_) | Error::File { .. })) => {
                tracing::warn!("{}: {error}", self.name);
                Ok(Err(BatchFault::Unreadable))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether a batch may be read as a whole: one that is not sound may say any length, and takes no memory for it.
    pub(crate) async fn is_worth_memory(&self, header: &Header, position: u64) -> Result<bool> {
        Ok(header.size <= WHOLE || self.sum(position, None).await?.is_ok())
    }

    /// The header at `position` as one way has it.
    pub(crate) async fn head(
        &self,
        position: u64,
        way: Option<usize>,
    ) -> Result<std::result::Result<Header, BatchFault>> {
        let len = (HEADER as u64).min(self.end.size - position);
        Ok(self.read(position, len, way).await?.and_then(|head| Header::parse(&head)))
    }

    /// The batch at `position` as one way has it.
    pub(crate) async fn look(
        &self,
        position: u64,
        expected: Option<i64>,
        way: Option<usize>,
    ) -> Result<std::result::Result<Sound, BatchFault>> {
        let header = match self.head(position, way).await? {
            Ok(header) => header,
            Err(fault) => return Ok(Err(fault)),
        };
        if let Err(fault) = self.fits(&header, position, expected) {
            return Ok(Err(fault));
        }
        if header.size > WHOLE
            && let Err(fault) = self.sum(position, way).await?
        {
            return Ok(Err(fault));
        }
        let bytes = match self.read(position, u64::from(header.size), way).await? {
            Ok(bytes) => bytes,
            Err(fault) => return Ok(Err(fault)),
        };
        Ok(Header::parse(&bytes)
            .and_then(|header| batch::check(&header, &bytes).map(|()| Sound { header, bytes })))
    }

    /// Sums the batch at `position` chunk by chunk.
    async fn sum(
        &self,
        position: u64,
        way: Option<usize>,
    ) -> Result<std::result::Result<Header, BatchFault>> {
        match Scan::in_way(self.end.size, way).batch_at(self.bytes, position).await {
            Ok(found) => Ok(found.unwrap_or(Err(BatchFault::Empty))),
            Err(Error::Device(_) | Error::File { .. }) => Ok(Err(BatchFault::Unreadable)),
            Err(error) => Err(error),
        }
    }

    /// The ways in which to look: as everybody reads first, unless that would change something.
    pub(crate) fn ways(&self) -> Vec<Option<usize>> {
        let copies = self.bytes.copies();
        // Where copies may differ, a plain read would first make them equal, from the wrong one perhaps.
        let raw = self.bytes.may_differ(0, self.end.size);
        let plain = (!raw || copies == 1).then_some(None);
        let apart = (0..copies).map(Some).filter(|_| copies > 1);
        plain.into_iter().chain(apart).collect()
    }

    /// The best there is at `position`, over all ways; else the first fault.
    pub(crate) async fn best(
        &self,
        position: u64,
        expected: Option<i64>,
    ) -> Result<std::result::Result<Sound, BatchFault>> {
        let (mut odd, mut fault): (Option<Sound>, _) = (None, None);
        for way in self.ways() {
            match self.look(position, expected, way).await? {
                Ok(sound) if !self.is_odd(&sound.header, expected) => return Ok(Ok(sound)),
                Ok(sound) => {
                    let nearer =
                        odd.as_ref().is_none_or(|odd| sound.header.base_offset < odd.header.base_offset);
                    if nearer {
                        odd = Some(sound);
                    }
                }
                Err(found) => {
                    fault.get_or_insert(found);
                }
            }
        }
        if let Some(odd) = odd {
            return Ok(Ok(odd));
        }
        let fault = fault.unwrap_or(BatchFault::Empty);
        Ok(self.mixed(position, expected).await?.ok_or(fault))
    }

    /// The batch put together from parts of several copies, where that gives a sound one.
    async fn mixed(&self, position: u64, expected: Option<i64>) -> Result<Option<Sound>> {
        if self.bytes.copies() == 1 {
            return Ok(None);
        }
        let mut sizes: Vec<u64> = Vec::new();
        for way in self.ways() {
            let Ok(header) = self.head(position, way).await? else { continue };
            let size = u64::from(header.size);
            if size <= (self.end.size - position).min(LARGEST_MIX) && !sizes.contains(&size) {
                sizes.push(size);
            }
        }
        for size in sizes {
            let mut copies: Vec<Bytes> = Vec::new();
            for way in self.ways() {
                if let Ok(copy) = self.read(position, size, way).await?
                    && !copies.contains(&copy)
                {
                    copies.push(copy);
                }
            }
            let sound = mix(&copies, position, |bytes| {
                let header = Header::parse(bytes).ok()?;
                self.fits(&header, position, expected).ok()?;
                batch::check(&header, bytes).ok()?;
                (!self.is_odd(&header, expected)).then_some(header)
            });
            if let Some((header, bytes)) = sound {
                return Ok(Some(Sound { header, bytes }));
            }
        }
        Ok(None)
    }
}

/// Puts copies together, sector by sector where they differ, until `check` is content.
fn mix<T>(copies: &[Bytes], position: u64, check: impl Fn(&[u8]) -> Option<T>) -> Option<(T, Bytes)> {
    let (first, others) = copies.split_first()?;
    // Runs of sectors in which copies differ, each with its distinct contents.
    let mut runs: Vec<(Range<usize>, Vec<&[u8]>)> = Vec::new();
    let mut start = 0;
    while start < first.len() {
        let to_border = SECTOR - (position + start as u64) % SECTOR;
        let range = start..(start + to_border as usize).min(first.len());
        start = range.end;
        if others.iter().all(|other| other[range.clone()] == first[range.clone()]) {
            continue;
        }
        match runs.last_mut() {
            Some((last, _)) if last.end == range.start && others.len() == 1 => last.end = range.end,
            _ => runs.push((range, Vec::new())),
        }
    }
    let mut count = 1usize;
    for (range, contents) in &mut runs {
        for copy in copies {
            if !contents.contains(&&copy[range.clone()]) {
                contents.push(&copy[range.clone()]);
            }
        }
        count = count.saturating_mul(contents.len());
    }
    if count > MOST_MIXES {
        return None;
    }
    let mut mixed = BytesMut::from(&first[..]);
    for number in 0..count {
        let mut rest = number;
        for (range, contents) in &runs {
            mixed[range.clone()].copy_from_slice(contents[rest % contents.len()]);
            rest /= contents.len();
        }
        if let Some(found) = check(&mixed) {
            return Some((found, mixed.freeze()));
        }
    }
    None
}
