//! The real world: tokio's timer and tasks, the system's clocks and random numbers.

use super::{BoxFuture, Runtime};
use std::time::{Duration, Instant, SystemTime};

/// A [`Runtime`] on the tokio runtime it was made in.
#[derive(Debug)]
pub struct TokioRuntime {
    handle: tokio::runtime::Handle,
    started: Instant,
}

impl TokioRuntime {
    /// The runtime that the caller runs on.
    ///
    /// # Panics
    /// When called outside a tokio runtime.
    #[must_use]
    pub fn current() -> Self {
        Self { handle: tokio::runtime::Handle::current(), started: Instant::now() }
    }
}

impl Runtime for TokioRuntime {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn wall_clock(&self) -> Duration {
        // A clock before 1970 reads as 1970: a wrong time must not stop a disk.
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
    }

    fn fill_random(&self, out: &mut [u8]) {
        for chunk in out.chunks_mut(16) {
            chunk.copy_from_slice(&uuid::Uuid::new_v4().as_bytes()[..chunk.len()]);
        }
    }

    fn spawn(&self, task: BoxFuture<'static, ()>) {
        drop(self.handle.spawn(task));
    }

    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(time))
    }
}
