//! Going over a segment's batches whatever stands between them: a batch with a wrong checksum is told and passed; where
//! no batch begins, the next one that is to be believed is searched for (`search`).
//!
//! Of a batch that is bad in the copy that is read first, or stands at an odd offset or in an odd epoch there, the good
//! copy counts (`ground`), as it does for the store.
//!
//! Memory stays bounded whatever the bytes say: checksums are computed chunk by chunk (`scan`).

use super::source::{Damaged, Source};
use super::{LARGEST_BATCH, PartitionView, SegmentView};
use crate::batch::{self, BatchFault, HEADER, Header};
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::ground::{Ground, Sound};
use crate::home::Copies;
use crate::scan::Scan;
use crate::segment::End;
use bytes::{Bytes, BytesMut};
use std::ops::Range;

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
        /// What is wrong with it, in all copies.
        fault: Option<BatchFault>,
        /// The copy that is read first does not have it good; another one does.
        healed: bool,
    },
    /// Bytes that are no batch, in any copy.
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
    name: String,
    epochs: Option<Epochs>,
    ended: Option<i64>,
    base: i64,
    len: u64,
    at: u64,
    /// Offset that should follow.
    next: i64,
    scan: Scan,
}

impl Walk {
    /// Starts at the first byte of a segment of a partition.
    pub fn new(view: &PartitionView, segment: &SegmentView) -> Result<Self> {
        let walk = Self::start(segment, view.name(), Some(view.epochs.clone()))?;
        Ok(Self { ended: Some(view.clean_end.unwrap_or(view.recovery_point)), ..walk })
    }

    /// Starts at the first byte of a segment of which nothing else is known.
    pub fn lone(segment: &SegmentView) -> Result<Self> {
        Self::start(segment, format!("segment {}", segment.base), None)
    }

    fn start(segment: &SegmentView, name: String, epochs: Option<Epochs>) -> Result<Self> {
        let source = segment.place.open(segment.len)?;
        let (base, len) = (segment.base, segment.len);
        let scan = Scan::new(len);
        Ok(Self { source, name, epochs, ended: None, base, len, at: 0, next: base, scan })
    }

    fn ground(&self) -> Ground<'_> {
        let Self { source, name, base, len, .. } = self;
        let end = End { size: *len, next: base.saturating_add(SPAN + 1) };
        Ground { name, bytes: source, base: *base, end, epochs: self.epochs.as_ref(), ended: self.ended }
    }

    /// The next step; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Step>> {
        let position = self.at;
        let found = match self.scan.batch_at(&self.source, position).await {
            Ok(None) => return Ok(None),
            Ok(Some(found)) => found,
            Err(Error::Device(_) | Error::File { .. }) => Err(BatchFault::Unreadable),
            Err(error) => return Err(error),
        };
        if let Ok(header) = &found
            && self.is_sure(header, position)
        {
            return Ok(Some(self.pass(position, *header, None, false)));
        }
        let best = self.ground().best(position, Some(self.next)).await?;
        let fault = match (best, found) {
            (Ok(Sound { header, bytes }), found) => {
                let healed = found != Ok(header);
                if healed {
                    self.scan.patch(position, bytes);
                }
                return Ok(Some(self.pass(position, header, None, healed)));
            }
            // Strange, and the same in all copies.
            (Err(_), Ok(header)) => return Ok(Some(self.pass(position, header, None, false))),
            (Err(_), Err(fault)) => fault,
        };
        for way in self.ground().ways() {
            if let Ok(header) = self.ground().head(position, way).await?
                && u64::from(header.size) <= self.len - position
                && self.goes_on_at(position + u64::from(header.size)).await?
            {
                return Ok(Some(self.pass(position, header, Some(fault), false)));
            }
        }
        let found = self.ground().search(position, self.next, self.next).await?;
        let end = found.first.map_or(self.len, |(at, _)| at);
        // The search began behind the first byte, and ended where no header fits any more.
        let edges = [
            position..(position + HEADER as u64).min(end),
            end.saturating_sub(HEADER as u64).max(position)..end,
        ];
        let zeroes = found.zeroes && self.is_zero(&edges).await;
        self.at = end;
        Ok(Some(Step::Gap { position, end, fault, zeroes }))
    }

    /// Whether a batch whose checksum is right needs no look at other copies.
    fn is_sure(&self, header: &Header, position: u64) -> bool {
        let (ground, expected) = (self.ground(), Some(self.next));
        self.source.copies() == 1
            || ground.fits(header, position, expected).is_ok() && !ground.is_odd(header, expected)
    }

    fn pass(&mut self, position: u64, header: Header, fault: Option<BatchFault>, healed: bool) -> Step {
        self.at = position + u64::from(header.size);
        // A damaged header may say anything; what follows must still be found.
        let next = header.next_offset();
        if fault.is_none() && next > self.next && next <= self.base.saturating_add(SPAN + 1) {
            self.next = next;
        }
        Step::Batch { position, header, fault, healed }
    }

    /// Whether a batch that is damaged may end here: another one starts, or the segment or its written part ends.
    async fn goes_on_at(&self, position: u64) -> Result<bool> {
        if position >= self.len {
            return Ok(true);
        }
        let ground = self.ground();
        for way in ground.ways() {
            let follows = match ground.head(position, way).await? {
                Ok(header) => {
                    let counts = 0..=i64::from(header.last_offset_delta) + 1;
                    ground.fits(&header, position, Some(self.next)).is_ok()
                        && counts.contains(&i64::from(header.count))
                }
                Err(fault) => fault == BatchFault::Zeroes,
            };
            if follows {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether there are only zeroes in these few bytes.
    async fn is_zero(&self, ranges: &[Range<u64>]) -> bool {
        for range in ranges {
            let read = self.raw(range.start, (range.end - range.start) as usize).await;
            if !read.is_ok_and(|bytes| bytes.iter().all(|&byte| byte == 0)) {
                return false;
            }
        }
        true
    }

    /// All bytes of a batch, which this walk has passed: sound ones, if any copy has them.
    pub async fn batch(&self, position: u64, header: &Header) -> Result<Bytes> {
        // Its size was found to lie within the segment.
        let len = u64::from(header.size).min(LARGEST_BATCH) as usize;
        let read = self.source.read(position, raid::device::buffer(len)).await.map(BytesMut::freeze);
        let is_it = |bytes: &[u8]| Header::parse(bytes) == Ok(*header) && batch::check(header, bytes).is_ok();
        if matches!(&read, Ok(bytes) if is_it(bytes)) || self.source.copies() == 1 {
            return read;
        }
        match self.ground().best(position, Some(header.base_offset)).await? {
            Ok(sound) if sound.header == *header => Ok(sound.bytes),
            _ => read,
        }
    }

    /// Where copies of a batch that this walk has passed, or of a gap, are not as they should be; all of them, where no
    /// good one is known. Empty where everything is kept once, and nothing is known to be wrong.
    pub(crate) async fn damaged(
        &self,
        position: u64,
        end: u64,
        sound: Option<&Header>,
    ) -> Result<Vec<Damaged>> {
        let Some(header) = sound else { return Ok(self.source.all(position, end - position).await) };
        if self.source.copies() == 1 || self.source.agree(position, end - position).await {
            return Ok(Vec::new());
        }
        Ok(self.source.apart(position, &self.batch(position, header).await?).await)
    }

    /// Whether copies may differ there without a fault: since an unclean stop, until the next start.
    pub(crate) fn may_differ(&self, position: u64, end: u64) -> bool {
        self.source.may_differ(position, end - position)
    }

    /// Bytes as they are, for copying.
    pub(crate) async fn raw(&self, position: u64, len: usize) -> Result<Bytes> {
        Ok(self.source.read(position, raid::device::buffer(len)).await?.freeze())
    }
}
