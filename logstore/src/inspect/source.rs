//! Where bytes of a store lie, and reading them as they are: extents of a device, files, or memory.

use crate::error::{Error, Result};
use crate::volume::extent::Extent;
use bytes::{Bytes, BytesMut};
use raid::device::{Device, FileDevice, OpenMode};
use std::path::PathBuf;
use std::sync::Arc;

/// Largest derived bytes that are read.
const LARGEST: u64 = 256 << 20;

/// Where bytes lie.
#[derive(Clone)]
pub(crate) enum Place {
    Extents { device: Arc<dyn Device>, extents: Vec<Extent> },
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
}

impl Place {
    /// Opens `len` bytes. Files are closed when the source is dropped.
    pub(crate) fn open(&self, len: u64) -> Result<Source> {
        match self {
            Self::Extents { device, extents } => {
                Ok(Source { device: Arc::clone(device), extents: extents.clone() })
            }
            Self::File(path) => {
                let device = FileDevice::open(path, OpenMode::ReadOnly)?;
                Ok(Source { device: Arc::new(device), extents: vec![Extent { at: 0, len }] })
            }
            // Only derived bytes are in memory, and those are read whole.
            Self::Memory(_) => Err(Error::Closed),
        }
    }
}

impl Source {
    /// In how many ways the bytes can be read, see [`Device::copies`].
    pub(crate) fn ways(&self) -> usize {
        self.device.copies()
    }

    /// Fills `buf` from `at` on; `way` for one way of several.
    pub(crate) async fn read(&self, at: u64, mut buf: BytesMut, way: Option<usize>) -> Result<BytesMut> {
        let (mut skip, mut done) = (at, 0);
        for extent in &self.extents {
            if done == buf.len() {
                break;
            }
            if skip >= extent.len {
                skip -= extent.len;
                continue;
            }
            let n = (extent.len - skip).min((buf.len() - done) as u64) as usize;
            let part = raid::device::buffer(n);
            let part = match way {
                Some(way) => self.device.read_copy(extent.at + skip, part, way).await?,
                None => self.device.read(extent.at + skip, part).await?,
            };
            buf[done..done + n].copy_from_slice(&part);
            done += n;
            skip = 0;
        }
        if done < buf.len() {
            let (name, len) = (self.device.name().to_owned(), buf.len() as u64);
            return Err(Error::DamagedCatalog {
                place: name,
                what: format!("{len} bytes at {at} lie in no extent"),
            });
        }
        Ok(buf)
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
    /// All of it, as it is.
    pub async fn read(&self) -> Result<Bytes> {
        if let Place::Memory(bytes) = &self.place {
            return Ok(bytes.clone());
        }
        let source = self.place.open(self.len)?;
        let buf = raid::device::buffer(self.len.min(LARGEST) as usize);
        Ok(source.read(0, buf, None).await?.freeze())
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
