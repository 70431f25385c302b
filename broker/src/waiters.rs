//! Long polls: waiting until one of several partitions has something new.
//!
//! Bounded: a waiter holds one receiver a partition of its request, whose number the request's element limit bounds, and
//! lives as long as its fetch. Nothing is registered with the partition but a wake-up.

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;

/// Waits for the high watermark of any of several partitions to move.
#[derive(Debug, Default)]
pub struct Waiter(Vec<watch::Receiver<i64>>);

impl Waiter {
    /// One that watches nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a partition: what happens from now on counts.
    pub fn watch(&mut self, watermark: watch::Receiver<i64>) {
        self.0.push(watermark);
    }

    /// Whether there is nothing that could ever wake it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Completes when any of them has moved, or its partition is gone.
    pub async fn wait(&mut self) {
        let mut moved: FuturesUnordered<_> =
            self.0.iter_mut().map(|watermark| async move { watermark.changed().await.is_ok() }).collect();
        moved.next().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn it_wakes_for_any_and_for_what_came_since_it_watched() {
        let (a, b) = (watch::Sender::new(0), watch::Sender::new(0));
        let mut waiter = Waiter::new();
        waiter.watch(a.subscribe());
        waiter.watch(b.subscribe());
        b.send_replace(1);
        waiter.wait().await;

        let mut waiter = Waiter::new();
        waiter.watch(a.subscribe());
        let silent = tokio::time::timeout(Duration::from_millis(20), waiter.wait()).await;
        assert!(silent.is_err());
        drop(a);
        waiter.wait().await;
    }
}
