//! Receiving: bytes become requests, and those that pass the check are started.

use super::super::wire::{self, Command, EXTENDED_REQUEST_LEN, Malformed, REQUEST_LEN, Request, Style};
use super::admit::{Admitted, admit};
use super::memory::Lease;
use super::reply::{Refusal, Reply, To};
use super::siblings::Turn;
use super::stream::{Plain, Stream};
use super::{Connection, Ended, MAX_REQUESTS, busy, coalesce};
use crate::device::room;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::io::AsyncReadExt;
use tokio::task::coop::has_budget_remaining;

/// Capacity for one receive.
pub(super) const RECEIVE_BYTES: usize = 128 << 10;
/// The payload of a refused short request is drained up to this length.
const MAX_DRAIN: u64 = 2 * wire::MAX_PAYLOAD as u64;
/// That of an extended one: its clients know the maximum.
const MAX_DRAIN_EXTENDED: u64 = wire::MAX_PAYLOAD as u64;

/// What the next received bytes are.
pub(super) enum Receiving {
    /// The header of a request, or nothing more.
    Header,
    /// The rest of a payload. `data.len() < length`, and memory has been taken for all of it.
    Payload { admitted: Admitted, to: To, lease: Lease, data: BytesMut, length: usize },
    /// The rest of a refused request's payload, `left > 0`, and the answer it gets then.
    Drain { left: u64, to: To, refusal: Refusal },
    /// Nothing: no more requests are taken.
    Closed(Ended),
}

impl<S: Stream> Connection<'_, S> {
    /// Understands what has been received, starts what it asks for; whether anything was understood.
    pub(super) fn start_requests(&mut self, cx: &mut Context<'_>) -> bool {
        let line = self.line.take();
        let moved = self.start_in(&mut Turn::of(line.as_ref()), cx);
        self.line = line;
        moved
    }

    fn start_in(&mut self, turn: &mut Turn<'_>, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        loop {
            let step = match self.receiving {
                Receiving::Header => self.take_request(turn, cx),
                Receiving::Payload { .. } => self.take_payload(turn, cx),
                Receiving::Drain { .. } => self.take_refused_payload(),
                Receiving::Closed(_) => false,
            };
            if !step {
                return moved;
            }
            moved = true;
        }
    }

    /// The header at the head of the input, if it is there as a whole.
    fn next_header(&self) -> Option<Result<Request, Malformed>> {
        match self.session.style {
            Style::Simple | Style::Structured => {
                let (header, _) = self.input.split_first_chunk::<REQUEST_LEN>()?;
                Some(Request::decode(header))
            }
            Style::Extended => {
                let (header, _) = self.input.split_first_chunk::<EXTENDED_REQUEST_LEN>()?;
                Some(Request::decode_extended(header))
            }
        }
    }

    /// Whether a whole request header was there and could be taken.
    fn take_request(&mut self, turn: &mut Turn<'_>, cx: &mut Context<'_>) -> bool {
        if self.running.len() + self.replies.len() >= MAX_REQUESTS {
            return false;
        }
        if self.stopping() && turn.is_shared() {
            self.receiving = Receiving::Closed(Ended::Stopped);
            return true;
        }
        let request = match self.next_header() {
            None => return self.part_of_request(),
            Some(Ok(request)) => request,
            Some(Err(malformed)) => {
                self.receiving = Receiving::Closed(malformed.into());
                return true;
            }
        };
        if request.command == Command::Disconnect {
            self.receiving = Receiving::Closed(Ended::ByClient);
            return true;
        }
        let style = self.session.style;
        let to = To { style, cookie: request.cookie, offset: request.offset };
        let payload = request.payload_len(style);
        let admitted = match admit(&self.session, &request, self.stopping()) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                self.input.advance(style.request_len());
                self.purse.stop_waiting();
                self.refuse(to, payload, refusal);
                return true;
            }
        };
        // Admitted: no payload is longer than the maximum.
        let payload = payload as u32;
        let Poll::Ready(lease) = self.purse.poll_take(cx, admitted.charge(payload)) else { return false };
        self.input.advance(style.request_len());
        self.habit.took();
        if payload > 0 {
            self.begin_payload(turn, cx, admitted, to, lease, payload as usize);
        } else {
            self.begin(turn, cx, admitted, Bytes::new(), to, lease);
        }
        true
    }

    /// Starts what all of has come, unless it is a change that its client asks elsewhere by now.
    fn begin(
        &mut self,
        turn: &mut Turn<'_>,
        cx: &mut Context<'_>,
        admitted: Admitted,
        payload: Bytes,
        to: To,
        lease: Lease,
    ) {
        if admitted.is_change() && !turn.take() {
            self.abandon(Ended::HungUp);
        } else {
            self.start(cx, admitted, payload, to, lease);
        }
    }

    /// Less than a header is there. What cannot become one (an option after `GO`, say) is not waited for.
    fn part_of_request(&mut self) -> bool {
        if let Some((found, _)) = self.input.split_first_chunk() {
            let (found, expected) = (u32::from_be_bytes(*found), self.session.style.request_magic());
            if found != expected {
                let malformed = Malformed::Magic { found: found.into(), expected: expected.into() };
                self.receiving = Receiving::Closed(malformed.into());
                return true;
            }
        }
        self.end_of_input(self.input.is_empty())
    }

    fn refuse(&mut self, to: To, payload: u64, refusal: Refusal) {
        let most = if to.style == Style::Extended { MAX_DRAIN_EXTENDED } else { MAX_DRAIN };
        if payload > most {
            self.receiving = Receiving::Closed(Ended::AbsurdPayload(payload));
        } else if payload > 0 {
            self.receiving = Receiving::Drain { left: payload, to, refusal };
        } else {
            self.replies.push_back(Reply::refused(to, refusal, Lease::Private(0)));
        }
    }

    /// The header of a request with a payload is taken. A payload that is here already stays where it lies; the others get
    /// a page-aligned buffer of their own.
    fn begin_payload(
        &mut self,
        turn: &mut Turn<'_>,
        cx: &mut Context<'_>,
        admitted: Admitted,
        to: To,
        lease: Lease,
        length: usize,
    ) {
        if self.input.len() >= length {
            let payload = self.input.split_to(length).freeze();
            self.begin(turn, cx, admitted, payload, to, lease);
            return;
        }
        let mut data = room(length);
        data.put(self.input.split_to(self.input.len()));
        self.receiving = Receiving::Payload { admitted, to, lease, data, length };
    }

    /// Starts what waited for a payload once all of it has come.
    fn take_payload(&mut self, turn: &mut Turn<'_>, cx: &mut Context<'_>) -> bool {
        if !matches!(&self.receiving, Receiving::Payload { data, length, .. } if data.len() == *length) {
            return self.end_of_input(false);
        }
        let whole = std::mem::replace(&mut self.receiving, Receiving::Header);
        if let Receiving::Payload { admitted, to, lease, data, .. } = whole {
            self.begin(turn, cx, admitted, data.freeze(), to, lease);
        }
        true
    }

    fn take_refused_payload(&mut self) -> bool {
        let Receiving::Drain { left, .. } = &mut self.receiving else { return false };
        let taken = self.input.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
        self.input.advance(taken);
        *left -= taken as u64;
        if *left > 0 {
            return taken > 0 || self.end_of_input(false);
        }
        let drained = std::mem::replace(&mut self.receiving, Receiving::Header);
        if let Receiving::Drain { to, refusal, .. } = drained {
            self.replies.push_back(Reply::refused(to, refusal, Lease::Private(0)));
        }
        true
    }

    /// Called when the input is used up: if nothing more will come, takes no more; whether that is so. A client that
    /// has closed its sending end may still read: what it asked for whole has been started, and is answered.
    fn end_of_input(&mut self, between_requests: bool) -> bool {
        if self.eof {
            let broken = Ended::Broken(std::io::ErrorKind::UnexpectedEof);
            self.receiving = Receiving::Closed(if between_requests { Ended::HungUp } else { broken });
        }
        self.eof
    }

    /// Receives once; whether anything came (the end of the stream included).
    pub(super) fn poll_receive(&mut self, cx: &mut Context<'_>) -> bool {
        if self.eof {
            return false;
        }
        let received = match &mut self.receiving {
            Receiving::Closed(_) => return false,
            Receiving::Payload { data, length, .. } => {
                let left = *length - data.len();
                pin!(self.stream.read_buf(&mut data.limit(left))).poll(cx)
            }
            _ => {
                if self.input.len() >= RECEIVE_BYTES {
                    return false;
                }
                // Room for a good batch; reuses the buffer when its payloads have been let go.
                if self.input.capacity() - self.input.len() < RECEIVE_BYTES / 2 {
                    self.input.reserve(RECEIVE_BYTES);
                }
                pin!(self.stream.read_buf(&mut self.input)).poll(cx)
            }
        };
        // Out of turn is not out of requests: then it is asked again.
        self.drained = received.is_pending() && has_budget_remaining();
        match received {
            Poll::Pending => return false,
            Poll::Ready(Ok(0)) => self.eof = true,
            Poll::Ready(Ok(_)) => self.habit.received(Instant::now),
            Poll::Ready(Err(error)) => self.abandon(Ended::Broken(error.kind())),
        }
        true
    }

    /// Called when nothing is left to do, and the waker is set: looks for a request a little longer, or lets some more come,
    /// if that pays; whether anything was found.
    pub(super) fn wait(&mut self) -> bool {
        let (now, requests) = (Instant::now(), self.habit.requests());
        let is_alone = self.present.is_alone();
        let between_requests = self.input.is_empty() && matches!(self.receiving, Receiving::Header);
        let may_look = is_alone && between_requests && self.stream.plain().is_some();
        let Some(limit) = self.habit.rests(now, may_look) else {
            if is_alone {
                coalesce::rest(self.coalescing.rests(now, requests, coalesce::spent));
            }
            return false;
        };
        let found = match self.stream.plain() {
            Some(Plain::Unix(socket)) => busy::look(socket, now, limit, &mut self.input),
            Some(Plain::Tcp(socket)) => busy::look(socket, now, limit, &mut self.input),
            None => false,
        };
        if found {
            self.habit.received(Instant::now);
        }
        found
    }
}
