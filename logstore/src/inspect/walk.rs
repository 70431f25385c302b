//! Going over a segment's batches whatever stands between them: a batch with a wrong checksum is told and passed; where
//! no batch begins, the next sound one is searched for, byte by byte.
//!
//! Memory stays bounded whatever the bytes say: checksums are computed chunk by chunk. A search believes a place only
//! if offset, counts and length are possible there *and* the checksum is right, so it cannot be led astray by what
//! records contain; each false candidate costs a checksum, and needs eight bytes of offset that fit.

use super::source::Source;
use super::{LARGEST_BATCH, SegmentView};
use crate::batch::{self, BatchFault, HEADER, Header};
use crate::error::Result;
use bytes::{Bytes, BytesMut};

/// Bytes read at once.
const CHUNK: u64 = 256 * 1024;
/// Where the part of a batch that its checksum covers starts.
const COVERED: u64 = 21;
/// Offsets that a segment may span.
const SPAN: i64 = i32::MAX as i64;

/// What stands at a place of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A batch, whole, or with a fault that its frame survived.
    Batch {
        /// Where it starts.
        position: u64,
        /// Its header.
        header: Header,
        /// What is wrong with it.
        fault: Option<BatchFault>,
    },
    /// Bytes that are no batch.
    Gap {
        /// Where they start.
        position: u64,
        /// Where the next sound batch starts, or the segment ends.
        end: u64,
        /// Why no batch starts here.
        fault: BatchFault,
        /// There is nothing but zeroes.
        zeroes: bool,
    },
}

/// A walk over a segment.
pub struct Walk {
    source: Source,
    base: i64,
    len: u64,
    at: u64,
    /// Offset that should follow.
    next: i64,
    chunk: BytesMut,
    chunk_at: u64,
}

impl Walk {
    /// Starts at a segment's first byte.
    pub fn new(segment: &SegmentView) -> Result<Self> {
        let source = segment.place.open(segment.len)?;
        let (base, len) = (segment.base, segment.len);
        Ok(Self { source, base, len, at: 0, next: base, chunk: BytesMut::new(), chunk_at: 0 })
    }

    /// In how many ways the segment can be read.
    #[must_use]
    pub fn ways(&self) -> usize {
        self.source.ways()
    }

    /// The bytes in memory from `position` on: at least `least`, unless the segment ends before.
    async fn bytes(&mut self, position: u64, least: usize) -> Result<&[u8]> {
        let end = self.chunk_at + self.chunk.len() as u64;
        let least_end = (position + least as u64).min(self.len);
        if position < self.chunk_at || least_end > end {
            let len = (self.len - position).min(CHUNK.max(least as u64)) as usize;
            self.chunk = self.source.read(position, raid::device::buffer(len), None).await?;
            self.chunk_at = position;
        }
        Ok(&self.chunk[(position - self.chunk_at) as usize..])
    }

    /// The next step; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Step>> {
        let position = self.at;
        if position >= self.len {
            return Ok(None);
        }
        let fault = match self.judge(position).await? {
            Ok(header) => {
                self.pass(&header);
                return Ok(Some(Step::Batch { position, header, fault: None }));
            }
            Err((Some(header), fault)) => {
                if self.goes_on_at(position + u64::from(header.size)).await? {
                    self.pass(&header);
                    return Ok(Some(Step::Batch { position, header, fault: Some(fault) }));
                }
                fault
            }
            Err((None, fault)) => fault,
        };
        let (end, zeroes) = self.search(position).await?;
        self.at = end;
        Ok(Some(Step::Gap { position, end, fault, zeroes }))
    }

    fn pass(&mut self, header: &Header) {
        self.at += u64::from(header.size);
        // A damaged header may say anything; what follows must still be found.
        let next = header.next_offset();
        if next > self.next && next - self.base <= SPAN + 1 {
            self.next = next;
        }
    }

    /// The sound batch at a position, or what is wrong; with the header if there is room for what it claims.
    async fn judge(
        &mut self,
        position: u64,
    ) -> Result<std::result::Result<Header, (Option<Header>, BatchFault)>> {
        let available = self.len - position;
        let header = match Header::parse(self.bytes(position, HEADER).await?) {
            Ok(header) => header,
            Err(fault) => return Ok(Err((None, fault))),
        };
        let needed = u64::from(header.size);
        if needed > available {
            return Ok(Err((None, BatchFault::Truncated { needed, available })));
        }
        let (mut from, end, mut crc) = (position + COVERED, position + needed, 0);
        while from < end {
            let part = self.bytes(from, 1).await?;
            let n = (part.len() as u64).min(end - from) as usize;
            crc = crc32c::crc32c_append(crc, &part[..n]);
            from += n as u64;
        }
        Ok(batch::check_sums(&header, crc).map(|()| header).map_err(|fault| (Some(header), fault)))
    }

    /// Whether a batch that is damaged may end here: another one starts, or the segment or its written part ends.
    async fn goes_on_at(&mut self, position: u64) -> Result<bool> {
        if position >= self.len {
            return Ok(true);
        }
        Ok(match Header::parse(self.bytes(position, HEADER).await?) {
            Ok(header) => self.is_possible(&header, position),
            Err(fault) => fault == BatchFault::Zeroes,
        })
    }

    fn is_possible(&self, header: &Header, position: u64) -> bool {
        u64::from(header.size) <= self.len - position
            && header.base_offset >= self.next
            && header.base_offset - self.base <= SPAN
            && header.last_offset_delta >= 0
            && (0..=i64::from(header.last_offset_delta) + 1).contains(&i64::from(header.count))
    }

    /// The first sound batch after a position that has none, or the segment's end; and whether only zeroes were passed.
    async fn search(&mut self, position: u64) -> Result<(u64, bool)> {
        let (mut at, mut zeroes) = (position, true);
        while at < self.len {
            let window = self.bytes(at, HEADER).await?;
            zeroes &= window.iter().all(|&byte| byte == 0);
            if window.len() < HEADER {
                break;
            }
            let starts = window.len() - HEADER + 1;
            let skip = usize::from(at == position);
            // A batch says 2 at its byte 16; most bytes are sorted out by that.
            let candidates: Vec<(u64, Header)> = window[16..16 + starts]
                .iter()
                .enumerate()
                .skip(skip)
                .filter(|&(_, &magic)| magic == 2)
                .filter_map(|(from, _)| Some((at + from as u64, Header::parse(&window[from..]).ok()?)))
                .collect();
            for (candidate, header) in candidates {
                if self.is_possible(&header, candidate) && self.judge(candidate).await?.is_ok() {
                    // The candidate's own first bytes are not zero.
                    let clear = self.is_zero(position, candidate).await?;
                    return Ok((candidate, clear));
                }
            }
            at += starts as u64;
        }
        Ok((self.len, zeroes))
    }

    async fn is_zero(&mut self, from: u64, to: u64) -> Result<bool> {
        let mut at = from;
        while at < to {
            let part = self.bytes(at, 1).await?;
            let n = (part.len() as u64).min(to - at) as usize;
            if part[..n].iter().any(|&byte| byte != 0) {
                return Ok(false);
            }
            at += n as u64;
        }
        Ok(true)
    }

    /// All bytes of a batch; `way` for one copy of several.
    pub async fn batch(&self, position: u64, header: &Header, way: Option<usize>) -> Result<Bytes> {
        // Its size was found to lie within the segment.
        let len = u64::from(header.size).min(LARGEST_BATCH) as usize;
        Ok(self.source.read(position, raid::device::buffer(len), way).await?.freeze())
    }

    /// Bytes as they are, for copying.
    pub(crate) async fn raw(&self, position: u64, len: usize) -> Result<Bytes> {
        Ok(self.source.read(position, raid::device::buffer(len), None).await?.freeze())
    }
}
