//! Background work of a store, counted, so that closing can wait for all of it: whoever opens the same volume next
//! must not meet a late write of ours.

use crate::error::{Error, Result};
use raid::runtime::{BoxFuture, Runtime};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::{oneshot, watch};

/// Spawns tasks and knows how many live.
pub(crate) struct Tasks {
    runtime: Arc<dyn Runtime>,
    live: watch::Sender<usize>,
    ending: AtomicBool,
    closed: AtomicBool,
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tasks").field("live", &*self.live.borrow()).finish_non_exhaustive()
    }
}

/// One live task; counts down even when its runtime drops it half-way.
struct Live(Arc<Tasks>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.live.send_modify(|live| *live -= 1);
    }
}

impl Tasks {
    pub(crate) fn new(runtime: Arc<dyn Runtime>) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            live: watch::Sender::new(0),
            ending: AtomicBool::default(),
            closed: AtomicBool::default(),
        })
    }

    /// The clock and the dice.
    pub(crate) fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.runtime
    }

    /// Runs a task to its end; after [`Tasks::close`] it is dropped at once.
    pub(crate) fn spawn(self: &Arc<Self>, task: BoxFuture<'static, ()>) {
        self.live.send_modify(|live| *live += 1);
        let live = Live(Arc::clone(self));
        if self.closed.load(Ordering::Acquire) {
            return;
        }
        self.runtime.spawn(Box::pin(async move {
            task.await;
            drop(live);
        }));
    }

    /// Does something to its end, even if whoever asks goes away half-way. It must not wait for a lock that is held by
    /// whoever closes: such a lock is taken before, and given along.
    pub(crate) async fn finish<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (done, outcome) = oneshot::channel();
        self.spawn(Box::pin(async move {
            // Whoever asked may be gone.
            drop(done.send(work.await));
        }));
        outcome.await.unwrap_or(Err(Error::Interrupted))
    }

    /// Asks tasks that need not come to their end to stop soon.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// Whether they are asked to.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Waits until no task lives.
    pub(crate) async fn idle(&self) {
        // The sender is ours, so waiting cannot fail.
        drop(self.live.subscribe().wait_for(|live| *live == 0).await);
    }

    /// Lets no further task start.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}
