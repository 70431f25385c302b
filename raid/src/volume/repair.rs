//! Reading all copies at once, and what becomes of a read that failed: another copy answers, and the bad copy is written
//! again.
//!
//! All under the range lock, so that no write comes between the reading of the good copy and its writing over the bad
//! one. Members that do not answer here hold up who waits for the lock: they have the same limit as for writes (`stall`).

use super::choice::Copy;
use super::stall::Order;
use super::{Inner, Verdict};
use crate::device::{Durability, buffer};
use crate::error::{Error, Operation, Result};
use crate::geometry::Span;
use crate::member::Member;
use crate::superblock::SECTOR;
use bytes::{Bytes, BytesMut};
use std::ops::Range;
use std::sync::Arc;

/// What the copies of a piece hold, in the order in which they were asked: the member, and the position on its device.
#[derive(Default)]
pub(crate) struct Contents {
    /// What was read.
    pub(crate) good: Vec<(Arc<Member>, u64, BytesMut)>,
    /// What could not be.
    pub(crate) bad: Vec<(Arc<Member>, u64, Error)>,
}

impl Inner {
    /// Reads these copies at once. The caller holds the range lock.
    pub(crate) async fn read_copies(&self, copies: &[Copy<'_>], len: u64) -> Contents {
        let reads = copies.iter().map(|(member, at)| (*member, Order::Read { at: *at, len }));
        let mut contents = Contents::default();
        for ((member, at), outcome) in copies.iter().zip(self.ask_all(reads.collect()).await) {
            let member = Arc::clone(member);
            match outcome {
                Ok(bytes) => contents.good.push((member, *at, bytes)),
                Err(failure) => contents.bad.push((member, *at, failure)),
            }
        }
        contents
    }

    /// Reads a span whose preferred leg failed from another one, and rewrites the copies that cannot be read, all
    /// under the range lock. Where no copy can be read as a whole, what each still has is put together.
    pub(super) async fn recover(self: &Arc<Self>, span: Span) -> Result<BytesMut> {
        let range = self.blocks(span.at, span.len);
        let _lock = self.locks.lock(range.clone()).await;
        // Whole blocks: a part of an unreadable block cannot be rewritten. They stay within the chunk.
        let head = span.at - range.start;
        let whole =
            Span { within: span.within - head, at: range.start, len: range.end - range.start, ..span };
        let mut wanted = buffer(whole.len as usize);
        let mut left = vec![whole];
        while let Some(piece) = left.pop() {
            match self.recover_piece(piece).await {
                Ok(good) => {
                    let start = (piece.at - whole.at) as usize;
                    wanted[start..start + good.len()].copy_from_slice(&good);
                }
                Err(_) if piece.len > SECTOR => left.extend(piece.halves(SECTOR)),
                Err(failure) if piece.at < span.at + span.len && span.at < piece.at + piece.len => {
                    return Err(failure);
                }
                // Lost, but not asked for.
                Err(_) => {}
            }
        }
        let mut wanted = wanted.split_off(head as usize);
        wanted.truncate(span.len as usize);
        Ok(wanted)
    }

    /// Reads all copies of a piece, returns the first good one in slot order, and rewrites those that failed.
    /// The caller holds the range lock.
    pub(crate) async fn recover_piece(self: &Arc<Self>, piece: Span) -> Result<Bytes> {
        let Contents { good, mut bad } = self.read_copies(&self.roster().readable(piece), piece.len).await;
        let Some((.., good)) = good.into_iter().next() else {
            return Err(bad.pop().map_or_else(|| self.no_copy(piece), |(.., failure)| failure));
        };
        let good = good.freeze();
        if !bad.is_empty() && !self.read_only {
            let bad = bad.iter().map(|(member, at, _)| (member, *at));
            self.rewrite(&(piece.at..piece.at + piece.len), &good, bad.collect()).await?;
        }
        Ok(good)
    }

    /// Writes good bytes over bad copies and reads them back. A rewrite that is torn by a power cut would be a
    /// silent difference, so it is prepared like any write. That it fails is no failure of the read.
    async fn rewrite(self: &Arc<Self>, range: &Range<u64>, good: &Bytes, bad: Vec<Copy<'_>>) -> Result<()> {
        // While the volume is being stopped, or after it has failed, nothing is changed any more.
        let Ok(_entered) = self.enter() else { return Ok(()) };
        if self.refuse_if_lost().is_err() {
            return Ok(());
        }
        let _tracked = match self.prepare(range).await {
            Ok(tracked) => tracked,
            Err(failure) => {
                tracing::warn!(volume = %self.name, %failure, "a bad copy was not rewritten");
                return Ok(());
            }
        };
        for (member, at) in bad {
            let write = Order::Write { at, data: good.clone(), durability: Durability::Stable };
            let mut outcome = self.ask(member, write).await.map(drop);
            if outcome.is_ok() {
                outcome = self.verify(member, at, good).await;
            }
            match outcome {
                Ok(()) => member.count_corrected(),
                Err(failure) if self.judge(member, &failure) == Verdict::Kept => {
                    self.mark_unsynced(range.clone());
                }
                Err(_) => {}
            }
        }
        self.recorded().await
    }

    /// Reads back what was written to a member. That it reads as something else is a failure of the member.
    pub(crate) async fn verify(&self, member: &Arc<Member>, at: u64, good: &Bytes) -> Result<()> {
        let len = good.len() as u64;
        if self.ask(member, Order::Read { at, len }).await? == good {
            return Ok(());
        }
        let device = member.device.name().to_owned();
        Err(Error::Io { device, operation: Operation::Read, at, len, errno: rustix::io::Errno::IO })
    }

    pub(crate) fn no_copy(&self, span: Span) -> Error {
        Error::NoCopy { name: self.name.clone(), at: span.at, len: span.len }
    }
}
