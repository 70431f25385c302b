//! The memory that requests take before anything is received or read for them, and give back when their replies have
//! been sent: a little that is each connection's own, and beyond that a pool that all share. The pool knows how many share it.

use super::super::wire;
use super::pipes::Pipes;
use crate::runtime::BoxFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that each connection may hold in flight whatever the others do.
pub const PRIVATE_BYTES: u32 = 256 << 10;
/// Bytes of the shared pool that one connection may hold.
pub const SHARED_BYTES_PER_CONNECTION: u32 = 64 << 20;
/// What even a request without payload is charged, for its bookkeeping.
pub(super) const MIN_CHARGE: u32 = 4096;

/// The memory that all connections of a server share.
pub struct Pool {
    free: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    pipes: Arc<Pipes>,
    present: Arc<AtomicUsize>,
}

/// A connection that shares a pool, for as long as this lives.
pub(super) struct Present(Arc<AtomicUsize>);

impl Present {
    /// Whether no other connection shares the pool just now.
    pub(super) fn is_alone(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 1
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    /// A pool of `bytes`, which must be enough for the largest request.
    #[must_use]
    pub fn new(bytes: u32) -> Self {
        let bytes = bytes.max(wire::MAX_PAYLOAD) as usize;
        Self {
            free: Arc::new(Semaphore::new(bytes)),
            waiting: Arc::default(),
            pipes: Arc::default(),
            present: Arc::default(),
        }
    }

    /// Takes note of a connection.
    pub(super) fn enter(&self) -> Present {
        self.present.fetch_add(1, Ordering::Relaxed);
        Present(Arc::clone(&self.present))
    }

    /// Whether someone waits for memory.
    pub(super) fn contended(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    fn take(&self, bytes: u32) -> BoxFuture<'static, Lease> {
        struct Waiting(Arc<AtomicUsize>);
        impl Drop for Waiting {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting = Waiting(Arc::clone(&self.waiting));
        let free = Arc::clone(&self.free);
        Box::pin(async move {
            let permit = free.acquire_many_owned(bytes).await;
            drop(waiting);
            // The semaphore is never closed; were it, the request would go on uncharged.
            permit.map_or(Lease::Private(0), |permit| Lease::Shared(bytes, permit))
        })
    }
}

/// Bytes taken for a request, until its reply has been sent.
pub(super) enum Lease {
    /// Of the connection's own; given back by hand.
    Private(u32),
    /// Of the pool; the permit gives itself back.
    Shared(u32, #[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit),
}

/// What one connection has of its own and has taken from the pool.
pub(super) struct Purse {
    pool: Arc<Pool>,
    /// What is left of [`PRIVATE_BYTES`].
    private: u32,
    /// Taken from the pool; at most [`SHARED_BYTES_PER_CONNECTION`].
    shared: u32,
    /// Memory being waited for, for the request at the head of the input.
    taking: Option<BoxFuture<'static, Lease>>,
}

impl Purse {
    pub(super) fn new(pool: Arc<Pool>) -> Self {
        Self { pool, private: PRIVATE_BYTES, shared: 0, taking: None }
    }

    /// Whether someone waits for what all share.
    pub(super) fn contended(&self) -> bool {
        self.pool.contended()
    }

    /// The pipes that all share.
    pub(super) fn pipes(&self) -> &Arc<Pipes> {
        &self.pool.pipes
    }

    /// Takes `bytes` for the next request, of its own allowance first.
    pub(super) fn poll_take(&mut self, cx: &mut Context<'_>, bytes: u32) -> Poll<Lease> {
        if bytes <= self.private {
            self.private -= bytes;
            self.taking = None;
            return Poll::Ready(Lease::Private(bytes));
        }
        if self.taking.is_none() {
            if self.shared + bytes > SHARED_BYTES_PER_CONNECTION {
                // Its own replies must leave first; that moves this task again.
                return Poll::Pending;
            }
            self.taking = Some(self.pool.take(bytes));
        }
        let Some(taking) = self.taking.as_mut() else { return Poll::Pending };
        let lease = ready!(taking.as_mut().poll(cx));
        self.taking = None;
        if let Lease::Shared(bytes, _) = lease {
            self.shared += bytes;
        }
        Poll::Ready(lease)
    }

    /// The request that memory was waited for will not be done.
    pub(super) fn stop_waiting(&mut self) {
        self.taking = None;
    }

    pub(super) fn give_back(&mut self, lease: &Lease) {
        match lease {
            Lease::Private(bytes) => self.private += bytes,
            Lease::Shared(bytes, _) => self.shared -= bytes,
        }
    }
}
