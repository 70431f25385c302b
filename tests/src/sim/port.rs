//! How code in the simulated machine reaches a disk: a [`Device`] tied to one boot.

use super::disk::{Request, SimDisk};
use super::executor::Link;
use bytes::{Bytes, BytesMut};
use raid::device::{Device, Durability, Io, Piece, ZeroMode, check_range};
use raid::error::Operation;
use std::sync::Arc;
use tokio::sync::oneshot;

/// A disk as one boot of the machine sees it.
pub(super) struct Plugged {
    disk: Arc<SimDisk>,
    link: Link,
}

impl Plugged {
    pub(super) fn new(disk: Arc<SimDisk>, link: Link) -> Self {
        Self { disk, link }
    }

    /// Submits at once, not at the first poll: "completed before this call" is meant literally.
    fn submit(&self, request: Request) -> Io<'static, BytesMut> {
        if let Some(refused) = self.disk.out_of_bounds(&request) {
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
        self.disk.size()
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        self.submit(Request::Read { at, buf })
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        self.submit_unit(Request::Write { at, data, durability })
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

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        let located = check_range(Operation::Read, at, len, self.disk.size()).map(|()| None);
        Box::pin(async { located })
    }
}
