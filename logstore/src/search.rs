//! Where a log goes on behind bytes that are no batch, in any copy.
//!
//! Records are the users' own: a mirror of another topic and a backup of a segment hold whole batches, with checksums that
//! are right and offsets that may fit. So a sound batch behind damage is not yet one of this log.
//!
//! **The rule.** The damaged batch stands at a known place, and `from` is the offset that should stand there.
//!
//! 1. *Its own header*, as any copy has it, says where it ends. That is believed if what stands there agrees: the segment
//!    ends; or a header stands there, of a batch that may be damaged as well, with the very offset that this one says
//!    comes next; or a sound batch with any later offset.
//! 2. Otherwise sound batches behind it are looked for byte by byte. Each is followed to where the *run* of batches ends that
//!    it begins: a batch whose body is bad is part of it, if its header has the very offset, and a sound one with the very
//!    next offset stands at its end. A run is *confirmed* if it reaches the end of the segment, or the offset at which the
//!    log is known to have ended once, or bytes that were never written. Records end with a byte of their own at least, so
//!    what lies in one does not reach there.
//! 3. The search ends at the first confirmed run. A run before it lies between two places that are damaged; the sound
//!    batches of this log may well do so, and are not to be lost. The first is believed that nothing speaks against:
//!    - its own length stands right before it, as a length of a record's value, of a field or of a message is written;
//!    - its leader epoch is not that of its offset;
//!    - it leaves no offset for the batch between it and the confirmed run, or for other such runs, which have more bytes;
//!    - the damaged batch, whose header still has the right offset, claims these bytes or these offsets for its own. A
//!      claim past the confirmed run is no claim: that header is wrong.
//! 4. Where no run is confirmed, the same holds up to the end of the segment. So it does once [`MOST_OPEN`] runs have been
//!    seen that nothing speaks against: damage is all over the place.
//!
//! **What is left.** Batches that a user has planted are believed if the header of the damaged batch is gone, their offsets
//! fall between its own first and last, their epoch is right, and they are wrapped in something that does not tell their
//! length. Nothing tells those from batches of this log between two that are lost. Indexes are not asked: they are made
//! from the log, by this very rule after a damage.
//!
//! Cost: of a batch whose length cannot be believed, a pass over what follows, with checksums, up to the end of the segment;
//! between steps of it other tasks run. Memory: a window and a chunk for each copy, and [`MOST_RUNS`] runs.

use crate::batch::{HEADER, Header};
use crate::error::{Error, Result};
use crate::ground::Ground;
use crate::heal::step_aside;
use crate::scan::Scan;
use bytes::Bytes;

/// Bytes in which a next batch is looked for at once: at first, for it may be near, and at most.
const WINDOWS: (u64, u64) = (16 << 10, 1 << 20);
/// Bytes that are checked before other tasks get their turn.
const STEP: u64 = 256 << 10;
/// Runs that nothing speaks against, after which nothing better is looked for.
const MOST_OPEN: usize = 64;
/// Runs that are remembered: of those which the damaged batch claims for its own, the first ones.
const MOST_RUNS: usize = 256;
/// Lengths up to this many bytes before a run are looked at.
const LONGEST_LENGTH: u64 = 10;

/// What a search found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Searched {
    /// Where the first batch stands that is believed, and its first offset.
    pub(crate) first: Option<(u64, i64)>,
    /// Before it, behind where the search began, there is nothing but zeroes in any copy.
    pub(crate) zeroes: bool,
}

/// Sound batches side by side.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u64,
    /// Its first offset.
    first: i64,
    end: u64,
    /// The offset that follows.
    next: i64,
    /// That of its first batch.
    epoch: i32,
    confirmed: bool,
}

/// What the header of a damaged batch says is its own: bytes before `end`, offsets before `next`.
#[derive(Debug, Clone, Copy)]
struct Claim {
    end: u64,
    next: i64,
}

impl Claim {
    /// Whether it speaks against a run before a place from which on the log is known.
    fn denies(&self, run: &Run, known: (u64, i64)) -> bool {
        self.end <= known.0 && run.start < self.end || self.next <= known.1 && run.first < self.next
    }
}

impl Ground<'_> {
    /// Where the batch at `position`, which should begin at offset `from`, ends, and the offset that stands there: a batch,
    /// which may be damaged as well, or the end.
    pub(crate) async fn next_sound(&self, position: u64, from: i64) -> Result<(u64, i64)> {
        // As long as some copy says it is, if that agrees with what follows.
        for way in self.ways() {
            let Ok(header) = self.head(position, way).await? else { continue };
            let (end, next) = (position + u64::from(header.size), header.next_offset());
            let is_it = header.base_offset == from && header.last_offset_delta >= 0;
            if end == self.end.size && header.base_offset == from {
                return Ok((self.end.size, self.end.next));
            }
            if end >= self.end.size {
                continue;
            }
            if is_it && self.frame_at(end, next).await?.is_some() {
                return Ok((end, next));
            }
            if let Ok(sound) = self.best(end, Some(from + 1)).await? {
                return Ok((end, sound.header.base_offset));
            }
        }
        let found = self.search(position, from, from + 1).await?;
        Ok(found.first.unwrap_or((self.end.size, self.end.next)))
    }

    /// Looks behind a position, at which offset `from` should stand, for a batch that is believed and begins at offset `least`
    /// or later.
    pub(crate) async fn search(&self, position: u64, from: i64, least: i64) -> Result<Searched> {
        let claims = self.claims(position, from).await?;
        let denied = |run: &Run, known| claims.iter().any(|claim| claim.denies(run, known));
        let the_end = (self.end.size, self.end.next);
        let (mut runs, mut confirmed, mut open): (Vec<Run>, Option<Run>, usize) = (Vec::new(), None, 0);
        let nearest = self.first_sound(position, least).await?;
        let mut found = nearest.first;
        while let Some((start, _)) = found {
            let followed = self.follow(start, least).await?;
            let passed = followed.map_or(start, |run| run.end - 1);
            if let Some(run) = followed
                && !self.says_its_length(&run).await?
            {
                if run.confirmed {
                    confirmed = Some(run);
                    break;
                }
                let epoch = self.epochs.and_then(|epochs| epochs.at(run.first));
                if epoch.is_none_or(|epoch| epoch == run.epoch) {
                    open += usize::from(!denied(&run, the_end));
                    if runs.len() < MOST_RUNS {
                        runs.push(run);
                    }
                }
                if open == MOST_OPEN {
                    break;
                }
            }
            found = self.first_sound(passed, least).await?.first;
        }
        runs.retain(|run| match confirmed {
            Some(Run { start, first, .. }) => run.next < first && !denied(run, (start, first)),
            None => !denied(run, the_end),
        });
        let first = heaviest(&runs).or(confirmed.as_ref()).map(|run| (run.start, run.first));
        // What was passed over is no zeroes.
        Ok(Searched { first, zeroes: nearest.zeroes && first == nearest.first })
    }

    /// What a damaged batch says of itself, in each copy that has its offset right.
    async fn claims(&self, position: u64, from: i64) -> Result<Vec<Claim>> {
        let mut claims = Vec::new();
        for way in self.ways() {
            if let Ok(header) = self.head(position, way).await?
                && header.base_offset == from
            {
                claims.push(Claim { end: position + u64::from(header.size), next: header.next_offset() });
            }
        }
        Ok(claims)
    }

    /// The header at a position, in some copy, if it has the very offset; its batch may be damaged.
    async fn frame_at(&self, position: u64, offset: i64) -> Result<Option<Header>> {
        for way in self.ways() {
            if let Ok(header) = self.head(position, way).await?
                && header.base_offset == offset
                && self.fits(&header, position, Some(offset)).is_ok()
            {
                return Ok(Some(header));
            }
        }
        Ok(None)
    }

    /// The run that begins with a sound batch.
    async fn follow(&self, start: u64, least: i64) -> Result<Option<Run>> {
        let scan = |way| Scan::in_way(self.end.size, way);
        let mut scans: Vec<Scan> = self.ways().into_iter().map(scan).collect();
        let (mut at, mut next, mut rested) = (start, least, start);
        let (mut run, mut damaged): (Option<Run>, bool) = (None, false);
        while at < self.end.size {
            if at - rested >= STEP {
                rested = at;
                step_aside().await;
            }
            let sound = self.sound_at(&mut scans, at, next).await?;
            if let Some(header) = sound.filter(|header| !damaged || header.base_offset == next) {
                let (end, epoch) = (at + u64::from(header.size), header.leader_epoch);
                let run = run.get_or_insert(Run {
                    start,
                    first: header.base_offset,
                    epoch,
                    end,
                    next,
                    confirmed: false,
                });
                (run.end, run.next) = (end, header.next_offset());
                (at, next, damaged) = (run.end, run.next, false);
                if self.ended == Some(next) {
                    break;
                }
            } else if run.is_some()
                && let Some(header) = self.frame_at(at, next).await?
            {
                (at, next, damaged) = (at + u64::from(header.size), header.next_offset(), true);
            } else {
                break;
            }
        }
        if let Some(run) = &mut run {
            let is_known = at == self.end.size || !damaged && self.ended == Some(next);
            run.confirmed = is_known || !damaged && self.is_blank_from(at).await?;
        }
        Ok(run)
    }

    async fn sound_at(&self, scans: &mut [Scan], position: u64, least: i64) -> Result<Option<Header>> {
        for scan in scans {
            let header = match scan.batch_at(self.bytes, position).await {
                Ok(found) => found.and_then(std::result::Result::ok),
                Err(Error::Device(_) | Error::File { .. }) => None,
                Err(error) => return Err(error),
            };
            let fits = |header: &Header| self.fits(header, position, Some(least)).is_ok();
            if let Some(header) = header.filter(fits) {
                return Ok(Some(header));
            }
        }
        Ok(None)
    }

    /// Whether from a position on nothing was ever written.
    async fn is_blank_from(&self, position: u64) -> Result<bool> {
        for way in self.ways() {
            let mut at = position;
            while at < self.end.size {
                let len = if at == position { HEADER as u64 } else { STEP }.min(self.end.size - at);
                let read = self.read(at, len, way).await?;
                if !read.is_ok_and(|bytes| bytes.iter().all(|&byte| byte == 0)) {
                    return Ok(false);
                }
                at += len;
            }
        }
        Ok(true)
    }

    /// Whether a run's own length stands right before it, in some way that lengths are written.
    async fn says_its_length(&self, run: &Run) -> Result<bool> {
        let from = run.start.saturating_sub(LONGEST_LENGTH);
        for way in self.ways() {
            let read = self.read(from, run.start - from, way).await?;
            if read.is_ok_and(|before| ends_with_length(&before, run.end - run.start)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The first sound batch in some copy behind a position, byte by byte, that begins at offset `least` or later.
    async fn first_sound(&self, position: u64, least: i64) -> Result<Searched> {
        let (mut at, mut zeroes, mut size) = (position + 1, true, WINDOWS.0);
        while at + (HEADER as u64) <= self.end.size {
            let len = (size + HEADER as u64).min(self.end.size - at);
            let mut seen: Vec<Bytes> = Vec::new();
            let mut first: Option<(u64, i64)> = None;
            for way in self.ways() {
                let Ok(window) = self.read(at, len, way).await? else {
                    zeroes = false;
                    continue;
                };
                if seen.contains(&window) {
                    continue;
                }
                for start in self.candidates(&window, at, least) {
                    if first.is_some_and(|(best, _)| best <= start) {
                        break;
                    }
                    if let Ok(sound) = self.look(start, Some(least), way).await? {
                        first = Some((start, sound.header.base_offset));
                        break;
                    }
                }
                let passed = first.map_or(window.len(), |(start, _)| (start - at) as usize);
                zeroes &= window[..passed].iter().all(|&byte| byte == 0);
                seen.push(window);
            }
            if first.is_some() {
                return Ok(Searched { first, zeroes });
            }
            at += size;
            size = (2 * size).min(WINDOWS.1);
        }
        Ok(Searched { first: None, zeroes })
    }

    /// Places in a window at which a header of a later batch may stand.
    fn candidates(&self, window: &[u8], at: u64, least: i64) -> Vec<u64> {
        let headers = window.windows(HEADER).enumerate();
        // The format's number first: it rules out nearly everything.
        let plausible = headers.filter(|(_, bytes)| bytes[16] == 2).filter_map(|(index, bytes)| {
            let (position, header) = (at + index as u64, Header::parse(bytes).ok()?);
            self.fits(&header, position, Some(least)).ok().map(|()| position)
        });
        plausible.collect()
    }
}

/// The first of those runs, which stand in order, that have the most bytes of all whose offsets rise.
fn heaviest(runs: &[Run]) -> Option<&Run> {
    let mut weights = vec![0; runs.len()];
    for (at, run) in runs.iter().enumerate().rev() {
        let behind = (at + 1..runs.len()).filter(|&other| run.next < runs[other].first);
        weights[at] = run.end - run.start + behind.map(|other| weights[other]).max().unwrap_or(0);
    }
    let first = (0..runs.len()).max_by_key(|&at| (weights[at], std::cmp::Reverse(at)))?;
    runs.get(first)
}

/// Whether bytes end with a length as something that holds so many bytes has it in front: a zigzag varint (Kafka's records),
/// a varint of it or of one more (protocol buffers, Kafka's messages), or four bytes, big-endian.
fn ends_with_length(before: &[u8], len: u64) -> bool {
    let four = u32::try_from(len).map(u32::to_be_bytes);
    let is_varint = |value: u64| {
        let (varint, bytes) = varint(value);
        // A single byte proves nothing.
        bytes >= 2 && before.ends_with(&varint[..bytes])
    };
    four.is_ok_and(|four| before.ends_with(&four)) || [2 * len, len, len + 1].into_iter().any(is_varint)
}

/// Seven bits a byte, the lowest first, and how many bytes that takes.
fn varint(mut rest: u64) -> ([u8; 10], usize) {
    let (mut bytes, mut count) = ([0; 10], 0);
    loop {
        bytes[count] = rest as u8 & 0x7f;
        rest >>= 7;
        count += 1;
        if rest == 0 {
            return (bytes, count);
        }
        bytes[count - 1] |= 0x80;
    }
}

#[cfg(test)]
mod tests;
