//! Reads, second askings of late ones, and where data lies for `sendfile`.
//!
//! Each part of a chunk is read from one copy (`choice`). What that copy answers at once is returned at once. A read
//! that has to wait is *hedged*: if its member has not answered within a limit, another copy is asked as well, into a
//! buffer of its own, and the first answer counts; if both stay silent, one more, and so on. The other operations are
//! left to themselves; they own their buffers.
//!
//! The limit is ten times what the *other* member's waiting reads take on average, from 20 ms to 1 s: beyond it the
//! other would have answered many times over, so little is asked twice that would have come anyway. Below 20 ms, what
//! schedulers and a disk's own retries do would be taken for trouble; above 1 s a client would notice. Measured on the
//! other, because a member that grows slow must not earn itself a longer limit. While all are slow alike, all limits grow.
//! No more than [`MOST_HEDGES`] are in flight at once, so that an overload never doubles itself.
//!
//! Late is not failed: such a member stays in, and after a few late reads it is read less for a while (`load`). An
//! answer that is an error, from either copy, goes the way of all read errors (`repair`).
//!
//! Ranges whose copies may differ are never hedged: all reads of them come from one copy.

use super::choice::is_first;
use super::{Inner, Roster, run_to_end};
use crate::device::{Io, Piece, buffer, check_range};
use crate::error::{Error, Operation, Result};
use crate::geometry::Span;
use crate::member::Member;
use bytes::BytesMut;
use futures_util::future::{Either, select, select_all, try_join_all};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

/// The limit, in averages of the other member.
const AVERAGES: u32 = 10;
/// The shortest limit.
const SHORTEST: Duration = Duration::from_millis(20);
/// The longest limit, and the time between looks for one more copy.
const LONGEST: Duration = Duration::from_secs(1);
/// Reads of a volume that may be asked of more than one copy at once.
pub(super) const MOST_HEDGES: usize = 32;

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

    /// Reads a part of one chunk where that waits for nothing; returns whether it did.
    pub(super) fn read_now(&self, at: u64, buf: &mut [u8]) -> bool {
        let len = buf.len() as u64;
        let roster = self.roster.load();
        if check_range(Operation::Read, at, len, roster.geometry.size()).is_err() || self.may_differ(at, len)
        {
            return false;
        }
        let Some(span) = roster.geometry.spans(at, len).next().filter(|first| first.len == len) else {
            return false;
        };
        self.preferred(&roster, span).is_some_and(|(member, at)| member.device.read_now(at, buf))
    }

    async fn read_span(self: &Arc<Self>, roster: &Roster, span: Span, buf: BytesMut) -> Result<BytesMut> {
        let Some((member, at)) = self.preferred(roster, span) else { return Err(self.no_copy(span)) };
        let mut read = member.device.read(at, buf);
        // What is cached is there at the first look: no timer, no counter.
        let answer = match futures_util::poll!(&mut read) {
            Poll::Ready(Ok(bytes)) => return Ok(bytes),
            Poll::Ready(Err(failure)) => self.failed(member, &failure),
            // In a box of its own, so that those at once stay small.
            Poll::Pending => Box::pin(self.wait_for(span, member, read)).await,
        };
        if let Some(bytes) = answer {
            return Ok(bytes);
        }
        let body = Arc::clone(self);
        run_to_end(self, async move { body.recover(span).await }).await
    }

    /// Waits for a read, and asks other copies as well when it takes too long. `None`: one of them failed.
    async fn wait_for(&self, span: Span, member: &Arc<Member>, read: Io<'_, BytesMut>) -> Option<BytesMut> {
        let begun = self.runtime.now();
        let _counted = member.load.begin_read();
        let limit = self.limit(span, member);
        match self.pulse.wait(read, limit).await {
            Ok(Ok(bytes)) => {
                member.load.read_took(self.runtime.now().saturating_sub(begun));
                if member.load.was_in_time() {
                    tracing::info!(volume = %self.name, member = member.device.name(), "answers in time again");
                }
                Some(bytes)
            }
            Ok(Err(failure)) => self.failed(member, &failure),
            Err(read) => Box::pin(self.hedge(span, member, begun, read)).await,
        }
    }

    /// How long a member has for a read before another is asked.
    fn limit(&self, span: Span, member: &Arc<Member>) -> Duration {
        let roster = self.roster();
        match self.alternative(&roster, span, |one| Arc::ptr_eq(one, member)) {
            Some((other, _)) if !other.load.is_slow() => {
                (other.load.average() * AVERAGES).clamp(SHORTEST, LONGEST)
            }
            _ => LONGEST,
        }
    }

    /// The first answer to a read that is late, or to the same read of other copies: of one, and then of one more each
    /// time that nobody has answered for as long as the longest limit.
    async fn hedge(
        &self,
        span: Span,
        member: &Arc<Member>,
        begun: Duration,
        read: Io<'_, BytesMut>,
    ) -> Option<BytesMut> {
        let (mut asked, mut reads) = (vec![(Arc::clone(member), begun)], vec![read]);
        let mut permit = None;
        loop {
            if let Some((other, again)) = self.ask_another(span, &asked) {
                permit = permit.or_else(|| self.hedges.try_acquire().ok());
                if permit.is_some() {
                    asked.push((other, self.runtime.now()));
                    reads.push(again);
                }
            }
            match select(select_all(reads), self.runtime.sleep(LONGEST)).await {
                Either::Left(((outcome, number, _), _)) => return self.answered(&asked, number, outcome),
                Either::Right(((), unanswered)) => reads = unanswered.into_inner(),
            }
        }
    }

    /// A read of a copy that has not been asked yet, where there is one.
    fn ask_another(
        &self,
        span: Span,
        asked: &[(Arc<Member>, Duration)],
    ) -> Option<(Arc<Member>, Io<'static, BytesMut>)> {
        // As things are now: a member may have gone meanwhile, or the range may differ.
        let roster = self.roster();
        let is_asked = |one: &Arc<Member>| asked.iter().any(|(member, _)| Arc::ptr_eq(member, one));
        let (other, at) = self.alternative(&roster, span, is_asked)?;
        let holder = Arc::clone(other);
        let read = async move {
            let _counted = holder.load.begin_read();
            holder.device.read(at, buffer(span.len as usize)).await
        };
        Some((Arc::clone(other), Box::pin(read)))
    }

    /// Of those who were asked, each at some moment, this number has answered first.
    fn answered(
        &self,
        asked: &[(Arc<Member>, Duration)],
        number: usize,
        outcome: Result<BytesMut>,
    ) -> Option<BytesMut> {
        let (member, since) = &asked[number];
        let now = self.runtime.now();
        let bytes = outcome.map_or_else(|failure| self.failed(member, &failure), Some)?;
        member.load.read_took(now.saturating_sub(*since));
        for (late, _) in &asked[..number] {
            if late.load.was_late(now) {
                tracing::warn!(volume = %self.name, member = late.device.name(),
                    "slow: reads go to other copies where there are any, until it answers in time again");
            }
        }
        Some(bytes)
    }

    /// Notes that a read failed. There is no answer then.
    fn failed(&self, member: &Member, failure: &Error) -> Option<BytesMut> {
        member.count_read_error();
        tracing::warn!(volume = %self.name, member = member.device.name(), %failure, "read failed");
        None
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

    pub(super) async fn locate(self: &Arc<Self>, at: u64, len: u64) -> Result<Option<Vec<Piece>>> {
        let roster = self.roster();
        check_range(Operation::Read, at, len, roster.geometry.size())?;
        self.settle(at, len).await?;
        let mut pieces: Vec<Piece> = Vec::new();
        for span in roster.geometry.spans(at, len) {
            let Some((member, at)) = self.preferred(&roster, span) else { return Err(self.no_copy(span)) };
            let usual = member.is_in_sync() && is_first(&roster, span, member);
            let Some(found) = member.device.locate(at, span.len).await? else { return Ok(None) };
            for mut piece in found {
                piece.usual &= usual;
                match pieces.last_mut() {
                    Some(last) if Arc::ptr_eq(&last.file, &piece.file) && last.at + last.len == piece.at => {
                        last.len += piece.len;
                        last.usual &= piece.usual;
                    }
                    _ => pieces.push(piece),
                }
            }
        }
        Ok(Some(pieces))
    }
}
