//! Members that behave in odd ways.

use bytes::{Bytes, BytesMut};
use raid::device::{Device, Durability, Io, Piece, ZeroMode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Semaphore;

/// A member whose changes can be held back, and whose file system may have no holes: then zeroes are written.
pub struct Odd {
    under: Arc<dyn Device>,
    has_holes: bool,
    open: Semaphore,
    longest: AtomicU64,
}

impl Odd {
    pub fn new(under: Arc<dyn Device>, has_holes: bool) -> Arc<Self> {
        Arc::new(Self { under, has_holes, open: Semaphore::new(1), longest: AtomicU64::new(0) })
    }

    /// Bytes of the longest range that it was asked to zero.
    pub fn longest_zeroes(&self) -> u64 {
        self.longest.load(Ordering::Relaxed)
    }

    /// From now on changes wait.
    pub fn hold(&self) {
        assert_eq!(self.open.forget_permits(1), 1, "nothing is under way");
    }

    pub fn let_go(&self) {
        self.open.add_permits(1);
    }
}

impl Device for Odd {
    fn name(&self) -> &str {
        self.under.name()
    }

    fn size(&self) -> u64 {
        self.under.size()
    }

    fn refresh(&self) -> Io<'_, u64> {
        self.under.refresh()
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        self.under.read(at, buf)
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        Box::pin(async move {
            let _passed = self.open.acquire().await.unwrap();
            self.under.write(at, data, durability).await
        })
    }

    fn flush(&self) -> Io<'_, ()> {
        self.under.flush()
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.under.discard(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        self.longest.fetch_max(len, Ordering::Relaxed);
        Box::pin(async move {
            let _passed = self.open.acquire().await.unwrap();
            if self.has_holes {
                self.under.write_zeroes(at, len, mode, durability).await
            } else {
                self.under.write(at, Bytes::from(vec![0; len as usize]), durability).await
            }
        })
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        self.under.locate(at, len)
    }

    fn zeroes_fast(&self, mode: ZeroMode) -> bool {
        self.has_holes && self.under.zeroes_fast(mode)
    }
}
