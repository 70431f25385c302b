//! Where bytes of a store lie, and reading them as they are: extents of a device, files, or memory; and which parts of
//! their copies are not what they should be.

use crate::error::{Error, Result};
use crate::home::{Copies, Io};
use crate::volume::extent::Extent;
use bytes::{Bytes, BytesMut};
use raid::device::{Device, FileDevice, Holder, OpenMode};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Largest derived bytes that are read.
const LARGEST: u64 = 256 << 20;
/// Bytes that are compared at once.
const WINDOW: u64 = 1 << 20;

/// Bytes of a file that do not hold, or cannot be shown to hold, what they should.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damaged {
    /// The file, or block device: of a volume, the member's path.
    pub file: String,
    /// The first of them in that file.
    pub at: u64,
    /// How many.
    pub len: u64,
    /// Why they cannot be read, if that is so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, at, len, unreadable } = self;
        let bytes = if *len == 1 { "1 byte".to_owned() } else { format!("{len} bytes") };
        write!(f, "{bytes} at {at} of {file}")?;
        unreadable.as_ref().map_or(Ok(()), |cause| write!(f, " ({cause})"))
    }
}

/// Adds what is damaged; what goes on where something of the same file and kind ended becomes one.
fn push(all: &mut Vec<Damaged>, next: Damaged) {
    let touches = |one: &&mut Damaged| {
        one.file == next.file
            && one.at + one.len == next.at
            && one.unreadable.is_some() == next.unreadable.is_some()
    };
    match all.iter_mut().find(touches) {
        Some(one) => one.len += next.len,
        None => all.push(next),
    }
}

/// What the journal of a volume has for a place, and the next start writes there: runs of bytes, by their position in it, in
/// the order in which they were written. Whoever reads the place sees it as if that was done.
pub(crate) type Journaled = Arc<[(u64, BytesMut)]>;

/// Puts what is journaled over the bytes at `at`.
fn replay(journaled: &Journaled, at: u64, bytes: &mut [u8]) {
    let end = at + bytes.len() as u64;
    for (from, run) in journaled.iter() {
        let (first, last) = (at.max(*from), end.min(from.saturating_add(run.len() as u64)));
        if first < last {
            let run = &run[(first - from) as usize..(last - from) as usize];
            bytes[(first - at) as usize..(last - at) as usize].copy_from_slice(run);
        }
    }
}

/// Where bytes lie.
#[derive(Clone)]
pub(crate) enum Place {
    Extents { device: Arc<dyn Device>, extents: Vec<Extent>, journaled: Journaled },
    File(PathBuf),
    Memory(Bytes),
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Extents { extents, .. } => write!(f, "{extents:?}"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Memory(bytes) => write!(f, "{} bytes in memory", bytes.len()),
        }
    }
}

/// Bytes that are open for reading.
pub(crate) struct Source {
    device: Arc<dyn Device>,
    extents: Vec<Extent>,
    journaled: Journaled,
}

impl Place {
    /// Opens `len` bytes. Files are closed when the source is dropped.
    pub(crate) fn open(&self, len: u64) -> Result<Source> {
        match self {
            Self::Extents { device, extents, journaled } => Ok(Source {
                device: Arc::clone(device),
                extents: extents.clone(),
                journaled: Arc::clone(journaled),
            }),
            Self::File(path) => {
                let device = FileDevice::open(path, OpenMode::ReadOnly)?;
                let extents = vec![Extent { at: 0, len }];
                Ok(Source { device: Arc::new(device), extents, journaled: Journaled::default() })
            }
            // Only derived bytes are in memory, and those are read whole.
            Self::Memory(_) => Err(Error::Closed),
        }
    }
}

impl Source {
    /// The places of `len` bytes from `at` on, as far as there are extents for them.
    fn places(&self, at: u64, len: u64) -> Vec<Extent> {
        let (mut skip, mut left, mut found) = (at, len, Vec::with_capacity(1));
        for extent in &self.extents {
            if left == 0 {
                break;
            }
            if skip >= extent.len {
                skip -= extent.len;
                continue;
            }
            let n = (extent.len - skip).min(left);
            found.push(Extent { at: extent.at + skip, len: n });
            (skip, left) = (0, left - n);
        }
        found
    }

    /// Fills `buf` from `at` on; `way` for one way of several.
    async fn fill(&self, at: u64, mut buf: BytesMut, way: Option<usize>) -> Result<BytesMut> {
        let mut done = 0;
        for place in self.places(at, buf.len() as u64) {
            let part = raid::device::buffer(place.len as usize);
            let part = match way {
                Some(way) => self.device.read_copy(place.at, part, way).await?,
                None => self.device.read(place.at, part).await?,
            };
            buf[done..done + part.len()].copy_from_slice(&part);
            done += part.len();
        }
        if done < buf.len() {
            let (name, len) = (self.device.name().to_owned(), buf.len() as u64);
            return Err(Error::DamagedCatalog {
                place: name,
                what: format!("{len} bytes at {at} lie in no extent"),
            });
        }
        replay(&self.journaled, at, &mut buf);
        Ok(buf)
    }

    fn holders(&self, at: u64, len: u64) -> Vec<Holder> {
        crate::volume::holders(&self.device, &self.places(at, len))
    }

    /// Whether all copies of a range can be read and hold the same. Reads each once.
    pub(crate) async fn agree(&self, at: u64, len: u64) -> bool {
        let mut next = at;
        while next < at + len {
            let part = WINDOW.min(at + len - next);
            let mut first: Option<(u64, BytesMut)> = None;
            for Holder { device, at, len, of } in self.holders(next, part) {
                let Ok(mut found) = device.read(at, raid::device::buffer(len as usize)).await else {
                    return false;
                };
                replay(&self.journaled, next + of, &mut found);
                match &first {
                    Some((place, content)) if *place == of => {
                        if *content != found {
                            return false;
                        }
                    }
                    _ => first = Some((of, found)),
                }
            }
            next += part;
        }
        true
    }

    /// The parts of copies that are not as they should be: `good` is what all should hold from `at` on.
    pub(crate) async fn apart(&self, at: u64, good: &[u8]) -> Vec<Damaged> {
        let mut all = Vec::new();
        for (start, window) in (at..).step_by(WINDOW as usize).zip(good.chunks(WINDOW as usize)) {
            for Holder { device, at, len, of } in self.holders(start, window.len() as u64) {
                let file = device.name().to_owned();
                match device.read(at, raid::device::buffer(len as usize)).await {
                    Err(error) => {
                        push(&mut all, Damaged { file, at, len, unreadable: Some(error.to_string()) });
                    }
                    Ok(mut found) => {
                        replay(&self.journaled, start + of, &mut found);
                        let wanted = &window[of as usize..(of + len) as usize];
                        let differs = |(found, wanted): (&u8, &u8)| found != wanted;
                        let first = found.iter().zip(wanted).position(differs);
                        let last = found.iter().zip(wanted).rposition(differs);
                        if let (Some(first), Some(last)) = (first, last) {
                            let (at, len) = (at + first as u64, (last - first + 1) as u64);
                            push(&mut all, Damaged { file, at, len, unreadable: None });
                        }
                    }
                }
            }
        }
        all
    }

    /// All copies of a range, of which none is good.
    pub(crate) async fn all(&self, at: u64, len: u64) -> Vec<Damaged> {
        let (mut all, mut next) = (Vec::new(), at);
        while next < at + len {
            let part = WINDOW.min(at + len - next);
            for Holder { device, at, len, .. } in self.holders(next, part) {
                let file = device.name().to_owned();
                let read = device.read(at, raid::device::buffer(len as usize)).await;
                push(
                    &mut all,
                    Damaged { file, at, len, unreadable: read.err().map(|error| error.to_string()) },
                );
            }
            next += part;
        }
        all
    }
}

impl Copies for Source {
    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        Box::pin(self.fill(at, buf, None))
    }

    fn copies(&self) -> usize {
        self.device.copies()
    }

    fn read_copy(&self, at: u64, buf: BytesMut, copy: usize) -> Io<'_, BytesMut> {
        Box::pin(self.fill(at, buf, Some(copy)))
    }

    fn may_differ(&self, at: u64, len: u64) -> bool {
        self.places(at, len).iter().any(|place| self.device.may_differ(place.at, place.len))
    }
}

/// Derived bytes that are kept beside a segment.
#[derive(Debug, Clone)]
pub struct Stored {
    pub(crate) place: Place,
    pub(crate) len: u64,
    /// What the catalog says of their checksum.
    pub(crate) crc: Option<u32>,
}

impl Stored {
    /// All of it: a good copy, if what the catalog knows tells one from a bad one; else as it is.
    pub async fn read(&self) -> Result<Bytes> {
        Ok(self.read_apart().await?.0)
    }

    /// The same, and which parts of other copies are not as they should be.
    pub(crate) async fn read_apart(&self) -> Result<(Bytes, Vec<Damaged>)> {
        if let Place::Memory(bytes) = &self.place {
            return Ok((bytes.clone(), Vec::new()));
        }
        let source = self.place.open(self.len)?;
        let buf = || raid::device::buffer(self.len.min(LARGEST) as usize);
        let mut first = source.read(0, buf()).await.map(BytesMut::freeze);
        if source.copies() == 1 || self.crc.is_none() {
            return Ok((first?, Vec::new()));
        }
        if !matches!(&first, Ok(bytes) if self.fault(bytes).is_none()) {
            for way in 0..source.copies() {
                let other = source.read_copy(0, buf(), way).await.map(BytesMut::freeze);
                if matches!(&other, Ok(bytes) if self.fault(bytes).is_none()) {
                    first = other;
                    break;
                }
            }
        }
        let bytes = first?;
        let is_good = self.fault(&bytes).is_none();
        let apart = if is_good { source.apart(0, &bytes).await } else { source.all(0, self.len).await };
        Ok((bytes, apart))
    }

    /// What is wrong with these bytes, judged by what the catalog knows of them.
    #[must_use]
    pub fn fault(&self, bytes: &[u8]) -> Option<String> {
        if bytes.len() as u64 != self.len {
            return Some(format!("it has {} bytes, {} were stored", bytes.len(), self.len));
        }
        let crc = self.crc.filter(|&crc| crc != crc32c::crc32c(bytes))?;
        Some(format!("its checksum is not {crc:#010x}, with which it was stored"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_journaled_covers_what_is_read_wherever_that_begins() {
        let runs = [(10, &b"abcd"[..]), (20, b"xyz"), (12, b"CD")];
        let journaled: Journaled = runs.iter().map(|(at, run)| (*at, BytesMut::from(*run))).collect();
        let all = b"..........abCD......xyz.......";
        for at in 0..all.len() {
            for end in at..=all.len() {
                let mut bytes = vec![b'.'; end - at];
                replay(&journaled, at as u64, &mut bytes);
                assert_eq!(bytes, all[at..end], "{at}..{end}");
            }
        }
    }
}
