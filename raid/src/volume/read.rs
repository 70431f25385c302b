//! Reads, fail-over and read repair, and where data lies for `sendfile`.
//!
//! Each part of a chunk is read from one leg, chosen by address alone, so that the page cache holds one copy of
//! what is read. Near copies take turns every few megabytes of a member: far enough apart that read-ahead on one leg
//! does not run into what belongs to the other, close enough that streams spread over all members. Of far and offset
//! copies the first is read: those lie like RAID 0.

use super::{Inner, Roster, Verdict, run_to_end};
use crate::device::{Durability, Piece, buffer, check_range};
use crate::error::{Error, Operation, Result};
use crate::geometry::{MemberOffset, Span};
use crate::member::Member;
use crate::superblock::SECTOR;
use bytes::{Bytes, BytesMut};
use futures_util::future::{join_all, try_join_all};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Bytes of a member's data area after which another copy is preferred.
const TURN: u64 = 4 << 20;

impl Inner {
    pub(super) async fn read(self: &Arc<Self>, at: u64, mut buf: BytesMut) -> Result<BytesMut> {
        let len = buf.len() as u64;
        let roster = self.roster();
        check_range(Operation::Read, at, len, roster.geometry.size())?;
        self.settle(at, len).await?;
        let mut spans = roster.geometry.spans(at, len);
        let Some(first) = spans.next() else { return Ok(buf) };
        if first.len == len {
            return self.read_span(&roster, first, buf).await;
        }
        let mut rest = buf.split_off(first.len as usize);
        let mut parts = vec![(first, buf)];
        for span in spans {
            let tail = rest.split_off(span.len as usize);
            parts.push((span, std::mem::replace(&mut rest, tail)));
        }
        let parts = parts.into_iter().map(|(span, part)| self.read_span(&roster, span, part));
        let parts = try_join_all(parts).await?;
        let mut parts = parts.into_iter();
        let mut whole = parts.next().unwrap_or_default();
        // Parts that still lie beside each other in the caller's buffer join without a copy.
        parts.for_each(|part| whole.unsplit(part));
        Ok(whole)
    }

    async fn read_span(self: &Arc<Self>, roster: &Roster, span: Span, buf: BytesMut) -> Result<BytesMut> {
        let Some((member, at)) = self.preferred(roster, span) else { return Err(self.no_copy(span)) };
        match member.device.read(at, buf).await {
            Ok(buf) => Ok(buf),
            Err(failure) => {
                member.count_read_error();
                tracing::warn!(volume = %self.name, member = member.device.name(), %failure, "read failed");
                let body = Arc::clone(self);
                run_to_end(self, async move { body.recover(span).await }).await
            }
        }
    }

    /// The copy that is read, where any can be: by turns, and in slot order where copies may still differ.
    fn preferred<'a>(&self, roster: &'a Roster, span: Span) -> Option<(&'a Arc<Member>, u64)> {
        if self.may_differ(span.at, span.len) {
            return roster.readable(span).into_iter().next();
        }
        let geometry = &roster.geometry;
        let rows = (TURN / geometry.chunk()).max(1);
        let turn = span.chunk.0 / (geometry.period() * rows);
        geometry.read_order(span.chunk, turn).find_map(|place| {
            let at = MemberOffset(place.at.0 + span.within);
            let member = roster.at(place).find(|member| member.is_readable(at, span.len))?;
            Some((member, member.position(at)))
        })
    }

    fn may_differ(&self, at: u64, len: u64) -> bool {
        self.any_unsynced.load(Ordering::Acquire) && self.unsynced.lock().intersects(&(at..at + len))
    }

    /// Makes what may differ equal before it is read. A read-only volume reads the first copy in slot order instead.
    /// Where it cannot be done (a full disk), that order stands in too: it is at least the same on every read.
    async fn settle(self: &Arc<Self>, at: u64, len: u64) -> Result<()> {
        if len == 0 || self.read_only || !self.may_differ(at, len) {
            return Ok(());
        }
        let (body, range) = (Arc::clone(self), at..at + len);
        let outcome = run_to_end(self, async move { crate::sync::equalise(&body, range).await }).await;
        match outcome {
            // The trouble may have been with what lies around.
            Err(failure) if !failure.spares_device() && self.may_differ(at, len) => Err(failure),
            _ => Ok(()),
        }
    }

    /// Reads a span whose preferred leg failed from another one, and rewrites the copies that cannot be read, all
    /// under the range lock. Where no copy can be read as a whole, what each still has is put together.
    async fn recover(self: &Arc<Self>, span: Span) -> Result<BytesMut> {
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
        let roster = self.roster();
        let copies = roster.readable(piece);
        let reads = copies.iter().map(|(member, at)| member.device.read(*at, buffer(piece.len as usize)));
        let outcomes = join_all(reads).await;
        let (mut good, mut bad, mut last) = (None, Vec::new(), self.no_copy(piece));
        for (copy, outcome) in copies.into_iter().zip(outcomes) {
            match outcome {
                Ok(bytes) => {
                    good.get_or_insert(bytes);
                }
                Err(failure) => {
                    bad.push(copy);
                    last = failure;
                }
            }
        }
        let good = good.ok_or(last)?.freeze();
        if !bad.is_empty() && !self.read_only {
            self.rewrite(&(piece.at..piece.at + piece.len), &good, bad).await?;
        }
        Ok(good)
    }

    /// Writes good bytes over bad copies and reads them back. A rewrite that is torn by a power cut would be a
    /// silent difference, so it is prepared like any write. That it fails is no failure of the read.
    async fn rewrite(
        self: &Arc<Self>,
        range: &std::ops::Range<u64>,
        good: &Bytes,
        bad: Vec<(&Arc<Member>, u64)>,
    ) -> Result<()> {
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
            let mut outcome = member.device.write(at, good.clone(), Durability::Stable).await;
            if outcome.is_ok() {
                outcome = verify(member, at, good).await;
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

    fn no_copy(&self, span: Span) -> Error {
        Error::NoCopy { name: self.name.clone(), at: span.at, len: span.len }
    }

    pub(super) async fn locate(self: &Arc<Self>, at: u64, len: u64) -> Result<Option<Vec<Piece>>> {
        let roster = self.roster();
        check_range(Operation::Read, at, len, roster.geometry.size())?;
        self.settle(at, len).await?;
        let mut pieces: Vec<Piece> = Vec::new();
        for span in roster.geometry.spans(at, len) {
            let Some((member, at)) = self.preferred(&roster, span) else { return Err(self.no_copy(span)) };
            let Some(found) = member.device.locate(at, span.len).await? else { return Ok(None) };
            for piece in found {
                match pieces.last_mut() {
                    Some(last) if Arc::ptr_eq(&last.file, &piece.file) && last.at + last.len == piece.at => {
                        last.len += piece.len;
                    }
                    _ => pieces.push(piece),
                }
            }
        }
        Ok(Some(pieces))
    }
}

/// Reads back what was written to a member. That it reads as something else is a failure of the member.
pub(crate) async fn verify(member: &Member, at: u64, good: &Bytes) -> Result<()> {
    let back = member.device.read(at, buffer(good.len())).await?;
    if back == good {
        return Ok(());
    }
    let (device, len) = (member.device.name().to_owned(), good.len() as u64);
    Err(Error::Io { device, operation: Operation::Read, at, len, errno: rustix::io::Errno::IO })
}
