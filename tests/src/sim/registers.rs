//! The model of a block device: what each sector may hold, given what was asked and what was acknowledged.
//!
//! One register a sector. A register keeps the writes that may still matter, each with the time it began and ended;
//! from that follows what a read may return and what a power cut may leave. The model knows nothing of mirrors,
//! bitmaps or caches: that is why it can judge all of them.
//!
//! What it holds a device to:
//! - A read returns the newest write that ended before it began, or one that overlaps it or that newest one in time.
//! - With no write in flight a sector is one value: the first read settles which of the permitted ones.
//! - What was flushed, or written as stable, survives a power cut; of newer writes any one may.
//! - After a cut, too, the first read settles the value, and settles it for good: no later cut, no removal of a
//!   member may change it.
//! - A failed write may have reached any of its sectors. A discarded sector may hold anything, but one thing.

use super::rng::scramble;
use super::surface::{SECTOR, digest};
use bytes::Bytes;
use std::ops::Range;

/// A device did what its vocabulary forbids.
#[derive(Debug, Clone, thiserror::Error)]
#[error("sector {sector}: {what}; permitted: {permitted}")]
pub struct Violation {
    /// Where.
    pub sector: u64,
    /// What was seen.
    pub what: String,
    /// What the model allows there.
    pub permitted: String,
}

/// The registers of a device, by sector.
#[derive(Debug, Clone)]
pub struct Registers {
    each: Vec<Register>,
    /// Counts events: enough of a clock to order them.
    clock: u64,
    reads_in_flight: u64,
    torn: bool,
}

/// A write under way.
#[derive(Debug)]
pub struct WriteToken {
    id: u64,
    /// A discard may leave the sector as it was, so it heals nothing.
    discard: bool,
    sectors: Range<u64>,
}

/// A read under way.
#[derive(Debug)]
pub struct ReadToken {
    begun: u64,
    sectors: Range<u64>,
}

/// A flush under way.
#[derive(Debug)]
pub struct FlushToken {
    begun: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Is(Bytes),
    /// A discarded sector.
    Anything,
}

#[derive(Debug, Clone)]
struct Entry {
    /// The clock at its begin, unique.
    id: u64,
    value: Value,
    begun: u64,
    ended: Option<u64>,
    /// It certainly took place: what ended before it began can't be read any more.
    rules: bool,
    /// Acknowledged, and no flush has failed over it: the next one makes it durable.
    acknowledged: bool,
    /// It survives any power cut, unless something newer does.
    durable: bool,
}

#[derive(Debug, Clone)]
struct Register {
    entries: Vec<Entry>,
    /// A power cut hit it unflushed: reads that began before this time (a write healed it then; `u64::MAX` as long as
    /// none has) may find it torn or unreadable on a harsh disk.
    lost_until: u64,
}

impl Registers {
    /// A device of `sectors` zeroed sectors. With `torn`, an unflushed sector may come out of a power cut as a mixture
    /// of permitted values, or unreadable.
    #[must_use]
    pub fn zeroed(sectors: u64, torn: bool) -> Self {
        let entry = Entry {
            id: 0,
            value: Value::Is(Bytes::from_static(&[0; SECTOR as usize])),
            begun: 0,
            ended: Some(0),
            rules: true,
            acknowledged: true,
            durable: true,
        };
        let register = Register { entries: vec![entry], lost_until: 0 };
        Self { each: vec![register; sectors as usize], clock: 1, reads_in_flight: 0, torn }
    }

    /// Sectors it models.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.each.len() as u64
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write of `data` at sector `at` was submitted.
    pub fn begin_write(&mut self, at: u64, data: &Bytes) -> WriteToken {
        let sectors = at..at + data.len() as u64 / SECTOR;
        let part = |sector: u64| {
            let from = ((sector - at) * SECTOR) as usize;
            Value::Is(data.slice(from..from + SECTOR as usize))
        };
        self.begin(sectors, false, part)
    }

    /// A discard was submitted.
    pub fn begin_discard(&mut self, sectors: Range<u64>) -> WriteToken {
        self.begin(sectors, true, |_| Value::Anything)
    }

    fn begin(&mut self, sectors: Range<u64>, discard: bool, value: impl Fn(u64) -> Value) -> WriteToken {
        let now = self.tick();
        for sector in sectors.clone() {
            self.each[sector as usize].entries.push(Entry {
                id: now,
                value: value(sector),
                begun: now,
                ended: None,
                rules: false,
                acknowledged: false,
                durable: false,
            });
        }
        WriteToken { id: now, discard, sectors }
    }

    /// A write or discard was answered.
    pub fn end_write(&mut self, token: &WriteToken, ok: bool, stable: bool) {
        let now = self.tick();
        let prune = self.reads_in_flight == 0;
        for sector in token.sectors.clone() {
            let register = &mut self.each[sector as usize];
            for entry in register.entries.iter_mut().filter(|entry| entry.id == token.id) {
                entry.ended = Some(now);
                entry.rules = ok;
                entry.acknowledged = ok;
                entry.durable = ok && stable;
            }
            if ok && !token.discard {
                register.lost_until = register.lost_until.min(now);
            }
            if prune {
                register.prune();
            }
        }
    }

    /// A flush was submitted.
    pub fn begin_flush(&mut self) -> FlushToken {
        FlushToken { begun: self.tick() }
    }

    /// A flush was answered: if well, what had been acknowledged before it began is durable; if not, no later flush
    /// says anything about that any more.
    pub fn end_flush(&mut self, token: &FlushToken, ok: bool) {
        let prune = self.reads_in_flight == 0;
        for register in &mut self.each {
            let covered = |entry: &&mut Entry| entry.ended.is_some_and(|ended| ended < token.begun);
            for entry in register.entries.iter_mut().filter(covered) {
                entry.durable |= entry.acknowledged && ok;
                entry.acknowledged &= ok;
            }
            if prune {
                register.prune();
            }
        }
    }

    /// A read was submitted.
    pub fn begin_read(&mut self, sectors: Range<u64>) -> ReadToken {
        self.reads_in_flight += 1;
        ReadToken { begun: self.tick(), sectors }
    }

    /// A read was answered with these bytes.
    pub fn end_read(&mut self, token: &ReadToken, bytes: &[u8]) -> Result<(), Violation> {
        self.reads_in_flight -= 1;
        let now = self.tick();
        for (sector, seen) in token.sectors.clone().zip(bytes.chunks(SECTOR as usize)) {
            let torn = self.torn;
            self.each[sector as usize]
                .observe(token.begun, now, seen, torn)
                .map_err(|permitted| Violation { sector, what: format!("read {}", show(seen)), permitted })?;
        }
        Ok(())
    }

    /// A read was answered with an error. `excused`: the disks were made so bad that it may.
    pub fn fail_read(&mut self, token: &ReadToken, error: &str, excused: bool) -> Result<(), Violation> {
        self.reads_in_flight -= 1;
        let mut touched = token.sectors.clone();
        if excused || touched.any(|sector| self.torn && token.begun < self.each[sector as usize].lost_until) {
            return Ok(());
        }
        let sector = token.sectors.start;
        let permitted = self.each[sector as usize].show();
        Err(Violation { sector, what: format!("read failed: {error}"), permitted })
    }

    /// The power went: what was in flight is not answered, what was not durable may be gone.
    pub fn power_cut(&mut self) {
        let now = self.tick();
        self.reads_in_flight = 0;
        for register in &mut self.each {
            register.power_cut(now);
        }
    }

    /// What a power cut at this moment would permit: equal digests mean that reads after it are judged alike.
    #[must_use]
    pub fn digest_after_cut(&self) -> u64 {
        self.each.iter().fold(0, |sum, register| {
            let mut values: Vec<u64> = register
                .entries
                .iter()
                .filter(|entry| register.survives(entry))
                .map(|entry| match &entry.value {
                    Value::Is(bytes) => digest(bytes),
                    Value::Anything => 1,
                })
                .collect();
            values.sort_unstable();
            values.dedup();
            values.iter().fold(scramble(sum ^ values.len() as u64), |sum, value| scramble(sum ^ value))
        })
    }

    /// The process died, its machine did not: what was acknowledged stays, what was in flight may be there or not.
    pub fn process_killed(&mut self) {
        let now = self.tick();
        self.reads_in_flight = 0;
        for entry in self.each.iter_mut().flat_map(|register| &mut register.entries) {
            entry.ended = entry.ended.or(Some(now));
        }
    }
}

impl Register {
    /// Whether a read that began at `at` may return `entry`.
    fn readable(&self, entry: &Entry, at: u64) -> bool {
        !self.entries.iter().any(|newer| newer.rules && newer.ended < Some(at) && precedes(entry, newer))
    }

    fn survives(&self, entry: &Entry) -> bool {
        !self.entries.iter().any(|newer| newer.durable && precedes(entry, newer))
    }

    /// Forgets what can neither be read any more nor come back by a power cut.
    fn prune(&mut self) {
        if self.entries.len() > 1 {
            let keep: Vec<bool> =
                self.entries.iter().map(|e| self.readable(e, u64::MAX) || self.survives(e)).collect();
            let mut keep = keep.into_iter();
            self.entries.retain(|_| keep.next().unwrap_or(true));
        }
    }

    /// Checks what a read between `begun` and `now` saw, and settles the register on it if nothing was in flight.
    fn observe(&mut self, begun: u64, now: u64, bytes: &[u8], torn: bool) -> Result<(), String> {
        let candidates: Vec<usize> =
            (0..self.entries.len()).filter(|i| self.readable(&self.entries[*i], begun)).collect();
        let is = |i: &usize, value: &Value| self.entries[*i].value == *value;
        let seen = Value::Is(Bytes::copy_from_slice(bytes));
        let exact = candidates.iter().any(|i| is(i, &seen));
        let any = candidates.iter().any(|i| is(i, &Value::Anything));
        let mixed = torn && begun < self.lost_until && self.mixes(&candidates, bytes);
        if !exact && !any && !mixed {
            return Err(self.show_only(&candidates));
        }
        // A write that was in flight at any time during the read leaves the next read its own choice.
        let in_flight = self.entries.iter().any(|e| e.ended.is_none_or(|ended| ended > begun));
        if in_flight || candidates.len() == 1 && !any {
            return Ok(());
        }
        // Which write it was can't be told when several may have left the same: then only what all of them promise is.
        let sources = candidates.iter().map(|i| &self.entries[*i]);
        let fits = |e: &&Entry| e.value == seen || e.value == Value::Anything || !exact && !any;
        let sources: Vec<&Entry> = sources.filter(fits).collect();
        let settled = Entry {
            id: now,
            acknowledged: sources.iter().all(|e| e.acknowledged),
            durable: sources.iter().all(|e| e.durable),
            value: seen,
            begun,
            ended: Some(now),
            rules: true,
        };
        self.entries.push(settled);
        Ok(())
    }

    fn mixes(&self, candidates: &[usize], seen: &[u8]) -> bool {
        seen.chunks(8).enumerate().all(|(word, bytes)| {
            candidates.iter().any(|i| match &self.entries[*i].value {
                Value::Is(value) => value[word * 8..word * 8 + 8] == *bytes,
                Value::Anything => true,
            })
        })
    }

    fn power_cut(&mut self, now: u64) {
        let survivors: Vec<Entry> = self.entries.iter().filter(|e| self.survives(e)).cloned().collect();
        if survivors.len() > 1 {
            self.lost_until = u64::MAX;
        }
        self.entries = survivors;
        for entry in &mut self.entries {
            // None of them rules the others any more: which one it is, the first read tells. From then on it is
            // durable (`settle` takes that over from here).
            entry.begun = now;
            entry.ended = Some(now);
            entry.rules = false;
            entry.acknowledged = true;
            entry.durable = true;
        }
    }

    fn show(&self) -> String {
        self.show_only(&(0..self.entries.len()).collect::<Vec<_>>())
    }

    fn show_only(&self, which: &[usize]) -> String {
        let one = |i: &usize| match &self.entries[*i].value {
            Value::Is(value) => show(value),
            Value::Anything => "anything".to_owned(),
        };
        which.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

/// Whether `older` had ended when `newer` began.
fn precedes(older: &Entry, newer: &Entry) -> bool {
    older.ended.is_some_and(|ended| ended < newer.begun)
}

/// The content of the sectors written by write `id` at `at`: every 8 bytes name the write and the sector, so that
/// old, torn and misdirected sectors tell themselves apart.
#[must_use]
pub fn payload(id: u64, at: u64, sectors: u64) -> Bytes {
    let words = SECTOR as usize / 8;
    (at..at + sectors)
        .flat_map(|sector| std::iter::repeat_n((id << 24 | sector).to_le_bytes(), words).flatten())
        .collect()
}

fn show(sector: &[u8]) -> String {
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        match u64::from_le_bytes(word) {
            0 => "zeroes".to_owned(),
            value => format!("write {} of sector {}", value >> 24, value & 0xff_ffff),
        }
    };
    let mut words: Vec<String> = sector.chunks(8).map(word).collect();
    words.dedup();
    words.truncate(4);
    words.join(" + ")
}
