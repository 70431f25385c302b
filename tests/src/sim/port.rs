//! How code in the simulated machine reaches a disk: a [`Device`] tied to one boot.

use super::disk::{Request, SimDisk};
use super::executor::Link;
use bytes::{Bytes, BytesMut};
use raid::device::{Device, Durability, Extent, Io, Piece, ZeroMode, check_range};
use raid::error::Operation;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::oneshot;

/// A disk as one boot of the machine sees it.
pub(super) struct Plugged {
    disk: Arc<SimDisk>,
    link: Link,
    /// The disk's size when it was last looked at.
    size: AtomicU64,
}

impl Plugged {
    pub(super) fn new(disk: Arc<SimDisk>, link: Link) -> Self {
        let size = AtomicU64::new(disk.size());
        Self { disk, link, size }
    }

    /// Submits at once, not at the first poll: "completed before this call" is meant literally.
    fn submit(&self, request: Request) -> Io<'static, BytesMut> {
        if let Err(refused) = request.check(self.size()) {
            return Box::pin(async { Err(refused) });
        }
        if !self.link.alive() {
            return Box::pin(std::future::pending());
        }
        let (reply, answer) = oneshot::channel();
        let (operation, latency, note) = self.disk.accept(request, reply);
        self.link.submit(&self.disk, operation, &note, latency);
        Box::pin(async {
            match answer.await {
                Ok(outcome) => outcome,
                // The power went. Nothing that was in flight ever hears of it.
                Err(_) => std::future::pending().await,
            }
        })
    }

    /// Does it in the call, or says that it was not done, or not surely.
    fn at_once(&self, request: Request) -> Option<BytesMut> {
        if !self.is_instant() || request.check(self.size()).is_err() || !self.link.alive() {
            return None;
        }
        let (answer, note) = self.disk.at_once(request)?;
        self.link.done(&note);
        Some(answer)
    }

    fn submit_unit(&self, request: Request) -> Io<'static, ()> {
        let outcome = self.submit(request);
        Box::pin(async { outcome.await.map(drop) })
    }
}

impl Device for Plugged {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn refresh(&self) -> Io<'_, u64> {
        Box::pin(async move {
            if !self.link.alive() {
                std::future::pending::<()>().await;
            }
            if let Some(gone) = self.disk.absence() {
                return Err(gone);
            }
            self.size.store(self.disk.size(), Ordering::Relaxed);
            Ok(self.size())
        })
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        self.submit(Request::Read { at, buf })
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        self.submit_unit(Request::Write { at, data, durability })
    }

    fn is_instant(&self) -> bool {
        self.disk.is_instant()
    }

    fn read_now(&self, at: u64, buf: &mut [u8]) -> bool {
        let answer = self.at_once(Request::Read { at, buf: BytesMut::zeroed(buf.len()) });
        answer.is_some_and(|bytes| {
            buf.copy_from_slice(&bytes);
            true
        })
    }

    fn write_now(&self, at: u64, data: &[u8]) -> bool {
        let data = Bytes::copy_from_slice(data);
        self.at_once(Request::Write { at, data, durability: Durability::Cached }).is_some()
    }

    fn flush(&self) -> Io<'_, ()> {
        self.submit_unit(Request::Flush)
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.submit_unit(Request::Discard { at, len })
    }

    fn write_zeroes(&self, at: u64, len: u64, _mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        self.submit_unit(Request::Zero { at, len, durability })
    }

    fn zeroes_fast(&self, mode: ZeroMode) -> bool {
        mode == ZeroMode::MayPunch
    }

    fn extents(&self, at: u64, len: u64) -> Io<'_, Vec<Extent>> {
        // No boundary of its own: it changes nothing, and is answered from what the file system knows.
        let told = match (check_range(Operation::Read, at, len, self.size()), self.disk.absence()) {
            (Ok(()), None) => Ok(self.disk.extents(at, len)),
            (Err(refused), _) | (Ok(()), Some(refused)) => Err(refused),
        };
        Box::pin(async move {
            if !self.link.alive() {
                std::future::pending::<()>().await;
            }
            told
        })
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        let located = check_range(Operation::Read, at, len, self.size()).map(|()| None);
        Box::pin(async { located })
    }
}
