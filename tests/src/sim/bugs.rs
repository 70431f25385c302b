//! Planted bugs: a device that is wrong in one way, around one that is right.
//!
//! They show that the model can fail. Production code has no switch for them: a bug sits where a faulty engine or
//! disk would, above or below the volume.

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use raid::device::{Device, Durability, Io, Piece, ZeroMode};
use raid::error::Error;
use raid::runtime::Runtime;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// What is wrong. Ranges are bytes; an operation is concerned if it begins in the range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bug {
    /// Flushes are answered and never done.
    DropFlushes,
    /// Flushes are answered at once and done later.
    FlushLater,
    /// A failed flush is tried again, and the second answer believed.
    RetryFlushes,
    /// Stable writes are treated as any other.
    IgnoreStable,
    /// Writes of the range are answered and never done.
    DropWrites(Range<u64>),
    /// Writes of the range are answered at once and done later.
    WriteLater(Range<u64>),
    /// Errors of writes and flushes are not passed on.
    SwallowErrors,
    /// Only the front of a longer write of the range is done.
    CutWritesShort(Range<u64>),
    /// Writes of the range land this many bytes further on.
    ShiftWrites(Range<u64>, u64),
    /// Reads of the range answer what the first such read saw.
    StaleReads(Range<u64>),
    /// Zeroing is answered and not done.
    DropZeroes,
    /// A discard takes one sector too many.
    DiscardTooMuch,
    /// A discarded range reads differently every time.
    DiscardUnsettled,
    /// Reads fail that could be answered.
    FailReads(Range<u64>),
    /// Every write of the range writes what the first one that began there wrote.
    RepeatWrites(Range<u64>),
    /// Writes of the range have all bits from this byte of it on cleared.
    ClearFrom(Range<u64>, u64),
    /// No range is said to be one whose copies may differ.
    DenyDifferences,
    /// Copies are said to be mended, and are not.
    DropMends,
}

/// A bug over a machine's disks.
#[derive(Debug, Clone)]
pub struct Plant {
    /// Which.
    pub bug: Bug,
    /// Over which disk; `None`: all.
    pub disk: Option<usize>,
}

/// How late what is done later is done.
const LATER: Duration = Duration::from_millis(50);

/// A device with a bug.
pub struct Buggy {
    inner: Arc<dyn Device>,
    runtime: Arc<dyn Runtime>,
    bug: Bug,
    seen: Mutex<BTreeMap<(u64, usize), BytesMut>>,
    discarded: Mutex<Vec<Range<u64>>>,
}

impl Buggy {
    /// Plants `bug` over `inner`.
    #[must_use]
    pub fn plant(inner: Arc<dyn Device>, bug: Bug, runtime: &Arc<dyn Runtime>) -> Arc<dyn Device> {
        let runtime = Arc::clone(runtime);
        let (seen, discarded) = (Mutex::default(), Mutex::default());
        Arc::new(Self { inner, runtime, bug, seen, discarded })
    }

    fn flush_later(&self) {
        let (inner, pause) = (Arc::clone(&self.inner), self.runtime.sleep(LATER));
        self.runtime.spawn(Box::pin(async move {
            pause.await;
            drop(inner.flush().await);
        }));
    }

    fn write_later(&self, at: u64, data: Bytes, durability: Durability) {
        let (inner, pause) = (Arc::clone(&self.inner), self.runtime.sleep(LATER));
        self.runtime.spawn(Box::pin(async move {
            pause.await;
            drop(inner.write(at, data, durability).await);
        }));
    }

    fn swallows(&self) -> bool {
        self.bug == Bug::SwallowErrors
    }
}

fn answered() -> Io<'static, ()> {
    Box::pin(async { Ok(()) })
}

impl Device for Buggy {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn refresh(&self) -> Io<'_, u64> {
        self.inner.refresh()
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        let key = (at, buf.len());
        let len = buf.len() as u64;
        let read = self.inner.read(at, buf);
        match &self.bug {
            Bug::FailReads(range) if range.contains(&at) => {
                let (device, errno) = (self.name().to_owned(), rustix::io::Errno::IO);
                let operation = raid::error::Operation::Read;
                Box::pin(async move { Err(Error::Io { device, operation, at, len, errno }) })
            }
            Bug::StaleReads(range) if range.contains(&at) => Box::pin(async move {
                let fresh = read.await?;
                Ok(self.seen.lock().entry(key).or_insert(fresh).clone())
            }),
            Bug::DiscardUnsettled => Box::pin(async move {
                let mut bytes = read.await?;
                for range in self.discarded.lock().iter() {
                    let (from, to) = (range.start.max(at), range.end.min(at + len));
                    if from < to {
                        self.runtime.fill_random(&mut bytes[(from - at) as usize..(to - at) as usize]);
                    }
                }
                Ok(bytes)
            }),
            _ => read,
        }
    }

    fn write(&self, at: u64, mut data: Bytes, durability: Durability) -> Io<'_, ()> {
        let end = at + data.len() as u64;
        self.discarded.lock().retain(|range| range.end <= at || end <= range.start);
        match &self.bug {
            Bug::DropWrites(range) if range.contains(&at) => answered(),
            Bug::WriteLater(range) if range.contains(&at) => {
                self.write_later(at, data, durability);
                answered()
            }
            Bug::IgnoreStable => self.inner.write(at, data, Durability::Cached),
            Bug::RepeatWrites(range) if range.contains(&at) => {
                let first =
                    self.seen.lock().entry((at, data.len())).or_insert(BytesMut::from(&data[..])).clone();
                self.inner.write(at, first.freeze(), durability)
            }
            Bug::ClearFrom(range, from) if range.contains(&at) => {
                let kept = (range.start + from).saturating_sub(at).min(data.len() as u64) as usize;
                let mut cleared = BytesMut::from(&data[..]);
                cleared[kept..].fill(0);
                self.inner.write(at, cleared.freeze(), durability)
            }
            Bug::CutWritesShort(range) if range.contains(&at) && data.len() > 512 => {
                data.truncate(data.len() / 1024 * 512);
                self.inner.write(at, data, durability)
            }
            Bug::ShiftWrites(range, by) if range.contains(&at) && end + by <= self.size() => {
                self.inner.write(at + by, data, durability)
            }
            _ if self.swallows() => {
                let write = self.inner.write(at, data, durability);
                Box::pin(async move { write.await.or(Ok(())) })
            }
            _ => self.inner.write(at, data, durability),
        }
    }

    fn flush(&self) -> Io<'_, ()> {
        match &self.bug {
            Bug::DropFlushes => answered(),
            Bug::FlushLater => {
                self.flush_later();
                answered()
            }
            Bug::RetryFlushes => Box::pin(async move {
                match self.inner.flush().await {
                    Ok(()) => Ok(()),
                    Err(_) => self.inner.flush().await,
                }
            }),
            _ if self.swallows() => Box::pin(async move { self.inner.flush().await.or(Ok(())) }),
            _ => self.inner.flush(),
        }
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        match &self.bug {
            Bug::DiscardTooMuch if at + len + 512 <= self.size() => self.inner.discard(at, len + 512),
            Bug::DiscardUnsettled => {
                self.discarded.lock().push(at..at + len);
                self.inner.discard(at, len)
            }
            _ => self.inner.discard(at, len),
        }
    }

    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        match &self.bug {
            Bug::DropZeroes => answered(),
            Bug::DropWrites(range) if range.contains(&at) => answered(),
            Bug::IgnoreStable => self.inner.write_zeroes(at, len, mode, Durability::Cached),
            _ => self.inner.write_zeroes(at, len, mode, durability),
        }
    }

    fn zeroes_fast(&self, mode: ZeroMode) -> bool {
        self.inner.zeroes_fast(mode)
    }

    fn copies(&self) -> usize {
        self.inner.copies()
    }

    /// The first way is that of all reads, with their bugs, where reads have any.
    fn read_copy(&self, at: u64, buf: BytesMut, copy: usize) -> Io<'_, BytesMut> {
        let is_of_copies = matches!(self.bug, Bug::DenyDifferences | Bug::DropMends);
        if copy == 0 && !is_of_copies { self.read(at, buf) } else { self.inner.read_copy(at, buf, copy) }
    }

    fn may_differ(&self, at: u64, len: u64) -> bool {
        self.bug != Bug::DenyDifferences && self.inner.may_differ(at, len)
    }

    fn agree(&self, at: u64, len: u64) -> Io<'_, bool> {
        self.inner.agree(at, len)
    }

    fn mend(&self, at: u64, good: Bytes) -> Io<'_, u64> {
        if self.bug == Bug::DropMends {
            return Box::pin(async { Ok(0) });
        }
        self.inner.mend(at, good)
    }

    fn arrangement(&self) -> u64 {
        self.inner.arrangement()
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        self.inner.locate(at, len)
    }
}
