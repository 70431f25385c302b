//! One timer for all who wait for a member, instead of one each.
//!
//! A timer that is set for every operation and hardly ever fires is not free: each one that is due before all others wakes a
//! sleeping thread to be told so. Here whoever waits looks at the clock at each beat, and beats come as long as anybody waits,
//! and a little longer.
//!
//! Invariants: who waits is woken within a beat of its limit; nothing beats for a volume that nobody uses.
//!
//! Cost of a wait: nothing where there is nothing to wait for; else a place in a list, taken and left under a plain mutex,
//! and two atomic operations. The task that beats is
//! spawned at the first wait after [`REST`] beats without one.

use crate::runtime::Runtime;
use futures_util::future::{Either, select};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::sync::Notify;

/// Time between two beats: a half of the shortest limit of a read.
const BEAT: Duration = Duration::from_millis(10);
/// Beats that nobody waited for, after which there are no more.
const REST: u32 = 100;

/// A clock that ticks while it is looked at.
pub(super) struct Pulse {
    runtime: Arc<dyn Runtime>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    beat: Notify,
    /// A task makes the beats.
    is_beating: AtomicBool,
    /// Somebody has begun to wait for a beat since the last one.
    is_wanted: AtomicBool,
}

impl Pulse {
    pub(super) fn new(runtime: Arc<dyn Runtime>) -> Self {
        Self { runtime, shared: Arc::default() }
    }

    /// Waits for `work`; gives it back where it is not done within `limit` and a beat.
    pub(super) async fn wait<W: Future + Unpin>(
        &self,
        mut work: W,
        limit: Duration,
    ) -> std::result::Result<W::Output, W> {
        if let Poll::Ready(done) = futures_util::poll!(&mut work) {
            return Ok(done);
        }
        let begun = self.runtime.now();
        loop {
            // In this order: it hears of every beat from here on, polled or not.
            let beat = pin!(self.shared.beat.notified());
            self.want();
            match select(work, beat).await {
                Either::Left((done, _)) => return Ok(done),
                Either::Right(((), unfinished)) => work = unfinished,
            }
            if self.runtime.now().saturating_sub(begun) >= limit {
                return Err(work);
            }
        }
    }

    /// Sees to it that there is a next beat.
    fn want(&self) {
        // Mostly both are so already: no write to what other processors read.
        if !self.shared.is_wanted.load(Ordering::SeqCst) {
            self.shared.is_wanted.store(true, Ordering::SeqCst);
        }
        if !self.shared.is_beating.load(Ordering::SeqCst)
            && !self.shared.is_beating.swap(true, Ordering::SeqCst)
        {
            let (runtime, shared) = (Arc::clone(&self.runtime), Arc::clone(&self.shared));
            self.runtime.spawn(Box::pin(async move { beat(runtime.as_ref(), &shared).await }));
        }
    }
}

async fn beat(runtime: &dyn Runtime, shared: &Shared) {
    let mut unwanted = 0;
    loop {
        runtime.sleep(BEAT).await;
        // Before the beat: who waits for the next one says so after it.
        unwanted = if shared.is_wanted.swap(false, Ordering::SeqCst) { 0 } else { unwanted + 1 };
        shared.beat.notify_waiters();
        if unwanted < REST {
            continue;
        }
        shared.is_beating.store(false, Ordering::SeqCst);
        // Who saw it beating a moment ago has said before that it waits.
        if !shared.is_wanted.load(Ordering::SeqCst) || shared.is_beating.swap(true, Ordering::SeqCst) {
            return;
        }
        unwanted = 0;
    }
}
