//! Reading batches one after the other and checking each with its records: what recovery, healing and the offline tools do.
//!
//! Memory stays bounded whatever the bytes say: checksums are computed chunk by chunk. Cost: a read for each [`CHUNK`], into
//! memory that is used again, and one pass of CRC-32C.

use crate::batch::{self, BatchFault, HEADER, Header, Marker};
use crate::error::Result;
use crate::home::Copies;
use bytes::{Bytes, BytesMut};

/// Bytes read at once.
const CHUNK: u64 = 256 * 1024;
/// Largest control batch that is looked into; those of one record have less than a hundred bytes.
const LARGEST_MARKER: u32 = 4096;

/// A place in some bytes, with a chunk of them in memory. Each call names the bytes, always the same.
pub(crate) struct Scan {
    /// Byte after the last that may hold a batch.
    reach: u64,
    /// Which way of reading, of several; `None` for the usual one.
    way: Option<usize>,
    chunk: BytesMut,
    chunk_at: u64,
}

impl Scan {
    /// Of what is usually read.
    pub(crate) fn new(reach: u64) -> Self {
        Self::in_way(reach, None)
    }

    /// Of what is read in one way.
    pub(crate) fn in_way(reach: u64, way: Option<usize>) -> Self {
        Self { reach, way, chunk: BytesMut::new(), chunk_at: 0 }
    }

    /// The bytes in memory from `position` on: at least `least`, unless they end before.
    async fn at(&mut self, bytes: &dyn Copies, position: u64, least: usize) -> Result<&[u8]> {
        let end = self.chunk_at + self.chunk.len() as u64;
        let least_end = (position + least as u64).min(self.reach);
        if position < self.chunk_at || least_end > end {
            let len = (self.reach - position).min(CHUNK) as usize;
            let mut buf = std::mem::take(&mut self.chunk);
            if buf.len() < len {
                buf = raid::device::buffer(len);
            }
            buf.truncate(len);
            // Where copies may differ, a plain read would make them equal before anybody has chosen.
            let raw = self.way.or_else(|| bytes.may_differ(position, len as u64).then_some(0));
            self.chunk = match raw {
                Some(way) => bytes.read_copy(position, buf, way).await?,
                None => bytes.read(position, buf).await?,
            };
            self.chunk_at = position;
        }
        Ok(&self.chunk[(position - self.chunk_at) as usize..])
    }

    /// Another copy has a batch good that was read bad: these bytes of it count.
    pub(crate) fn patch(&mut self, position: u64, good: Bytes) {
        self.chunk = BytesMut::from(good);
        self.chunk_at = position;
    }

    /// The whole, sound batch at `position`; what is wrong with it; or `None` at the end.
    pub(crate) async fn batch_at(
        &mut self,
        bytes: &dyn Copies,
        position: u64,
    ) -> Result<Option<std::result::Result<Header, BatchFault>>> {
        if position >= self.reach {
            return Ok(None);
        }
        let header = match Header::parse(self.at(bytes, position, HEADER).await?) {
            Ok(header) => header,
            Err(fault) => return Ok(Some(Err(fault))),
        };
        let (needed, available) = (u64::from(header.size), self.reach - position);
        if needed > available {
            return Ok(Some(Err(BatchFault::Truncated { needed, available })));
        }
        let (mut from, end, mut crc) = (position + batch::CRC_FROM as u64, position + needed, 0);
        while from < end {
            let part = self.at(bytes, from, 1).await?;
            let n = (part.len() as u64).min(end - from) as usize;
            crc = crc32c::crc32c_append(crc, &part[..n]);
            from += n as u64;
        }
        Ok(Some(batch::check_sums(&header, crc).map(|()| header)))
    }

    /// What the sound batch at `position` says if it ends a transaction.
    pub(crate) async fn marker_at(
        &mut self,
        bytes: &dyn Copies,
        position: u64,
        header: &Header,
    ) -> Result<Option<Marker>> {
        if !header.is_control() || header.size > LARGEST_MARKER {
            return Ok(None);
        }
        let bytes = self.at(bytes, position, header.size as usize).await?;
        Ok(bytes.get(..header.size as usize).and_then(|bytes| Marker::read(header, bytes)))
    }
}
