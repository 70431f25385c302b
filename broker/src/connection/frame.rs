//! Frames off a socket, under the length caps of [`wire`](crate::wire), the broker's byte budget, and deadlines:
//! a silent peer is dropped after `connections.max.idle.ms`, one that stalls in the middle of a frame far sooner.

use crate::broker::Broker;
use crate::wire::{Misbehaved, admit_frame};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;

use super::End;

/// Read at once where no large frame is under way; holds a few small requests.
const READ: usize = 16 * 1024;

/// A frame must be complete after this, plus a second for each [`SLOWEST`] bytes.
const FRAME_TIME: Duration = Duration::from_secs(30);

/// The slowest peer that is served, in bytes a second.
const SLOWEST: u64 = 64 * 1024;

/// What comes next.
pub enum Next {
    /// A frame without its length, and the budget's permit for its bytes.
    Frame(Bytes, OwnedSemaphorePermit),
    /// The peer closed, was idle for too long, or the broker stops.
    Closed,
}

/// The frames of one connection.
pub struct Frames<'a> {
    broker: &'a Arc<Broker>,
    stream: &'a TcpStream,
    /// Bytes read and not yet taken: less than a whole frame, or whole small ones.
    buf: BytesMut,
    trusted: bool,
    stopping: watch::Receiver<bool>,
    hung_up: watch::Receiver<bool>,
    in_flight: &'a AtomicUsize,
}

impl<'a> Frames<'a> {
    /// Of a new connection. `hung_up` turns true when answers can no longer be sent.
    pub fn new(
        broker: &'a Arc<Broker>,
        stream: &'a TcpStream,
        hung_up: watch::Receiver<bool>,
        in_flight: &'a AtomicUsize,
    ) -> Self {
        let stopping = broker.stopping();
        Self { broker, stream, buf: BytesMut::new(), trusted: false, stopping, hung_up, in_flight }
    }

    /// The peer has sent a valid request.
    pub fn trust(&mut self) {
        self.trusted = true;
    }

    /// The next frame. Cancelling it is harmless.
    pub async fn next(&mut self) -> Result<Next, End> {
        if self.buf.is_empty() && !self.first_bytes().await? {
            return Ok(Next::Closed);
        }
        let started = Instant::now();
        let limit = self.broker.config.request_max_bytes as usize;
        let deadline = started + FRAME_TIME;
        let length = loop {
            if let Some(length) = self.buf.first_chunk().map(|b| i32::from_be_bytes(*b))
                && let Some(admitted) = admit_frame(length, &self.buf[4..], self.trusted, limit)?
            {
                break admitted;
            }
            if self.fill(deadline).await? == 0 {
                return self.cut_off(0);
            }
        };
        // The budget's queue is fair, and no frame is larger than the budget.
        let permit = tokio::select! {
            permit = Arc::clone(&self.broker.budget).acquire_many_owned(length as u32) => permit,
            () = Self::told(&mut self.stopping, &mut self.hung_up) => return Ok(Next::Closed),
        };
        let permit = permit.map_err(|_| End::Done)?;
        self.buf.advance(4);
        if self.buf.len() >= length {
            return Ok(Next::Frame(self.buf.split_to(length).freeze(), permit));
        }
        let mut body = BytesMut::with_capacity(length);
        body.put_slice(&self.buf);
        self.buf = BytesMut::new();
        let deadline = Instant::now() + FRAME_TIME + Duration::from_secs(length as u64 / SLOWEST);
        while body.len() < length {
            let missing = length - body.len();
            match self.read(&mut (&mut body).limit(missing), deadline).await {
                Ok(0) => return self.cut_off(body.len()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(Misbehaved::Stalled { got: body.len(), length }.into());
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Next::Frame(body.freeze(), permit))
    }

    /// The peer closed in the middle of a frame, or we are closing.
    fn cut_off(&self, got: usize) -> Result<Next, End> {
        if *self.stopping.borrow() || *self.hung_up.borrow() {
            return Ok(Next::Closed);
        }
        let got = got + self.buf.len();
        Err(Misbehaved::Stalled { got, length: self.announced().unwrap_or(got) }.into())
    }

    fn announced(&self) -> Option<usize> {
        self.buf.first_chunk().and_then(|b| usize::try_from(i32::from_be_bytes(*b)).ok())
    }

    /// Waits, owning no buffer, until the peer says something; false if it will not.
    async fn first_bytes(&mut self) -> Result<bool, End> {
        self.buf = BytesMut::new();
        loop {
            let idle = self.broker.config.idle();
            let patience = async move {
                match idle {
                    Some(time) => tokio::time::sleep(time).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ready = self.stream.readable() => ready?,
                () = patience => {
                    // Who waits for an answer is not idle.
                    if self.in_flight.load(Ordering::Relaxed) == 0 {
                        return Ok(false);
                    }
                    continue;
                }
                () = Self::told(&mut self.stopping, &mut self.hung_up) => return Ok(false),
            }
            self.buf.reserve(READ);
            match self.stream.try_read_buf(&mut self.buf) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.buf = BytesMut::new(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn fill(&mut self, deadline: Instant) -> Result<usize, End> {
        let mut buf = std::mem::take(&mut self.buf);
        buf.reserve(READ);
        let outcome = self.read(&mut buf, deadline).await;
        self.buf = buf;
        match outcome {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                let got = self.buf.len();
                Err(Misbehaved::Stalled { got, length: self.announced().unwrap_or(4) }.into())
            }
            other => Ok(other?),
        }
    }

    /// One read; 0 when the peer has closed or we are to stop.
    async fn read(&mut self, buf: &mut impl BufMut, deadline: Instant) -> io::Result<usize> {
        loop {
            tokio::select! {
                ready = tokio::time::timeout_at(deadline, self.stream.readable()) => match ready {
                    Ok(ready) => ready?,
                    Err(_) => return Err(io::ErrorKind::TimedOut.into()),
                },
                () = Self::told(&mut self.stopping, &mut self.hung_up) => return Ok(0),
            }
            match self.stream.try_read_buf(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    /// Completes when the broker stops, or answers can no longer be sent.
    async fn told(stopping: &mut watch::Receiver<bool>, hung_up: &mut watch::Receiver<bool>) {
        // A sender that is gone means the same.
        tokio::select! {
            _ = stopping.wait_for(|stop| *stop) => {}
            _ = hung_up.wait_for(|gone| *gone) => {}
        }
    }
}
