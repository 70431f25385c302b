//! Long polls: waiting until one of several partitions has something new.
//!
//! `read_committed` consumers wait for the last stable offset, all others for the high watermark.
//!
//! Bounded: a waiter holds one receiver a partition of its request, whose number the request's element limit bounds, and
//! lives as long as its fetch. Nothing is registered with the partition but a wake-up.

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use logstore::{ReadLimit, Visible};
use tokio::sync::watch;

/// Waits for any of several partitions to show more than when it began to watch.
#[derive(Debug)]
pub struct Waiter {
    limit: ReadLimit,
    /// With how far each could be seen.
    watched: Vec<(watch::Receiver<Visible>, i64)>,
}

impl Waiter {
    /// One that watches nothing yet; `limit` is how far its readers see.
    #[must_use]
    pub fn new(limit: ReadLimit) -> Self {
        Self { limit, watched: Vec::new() }
    }

    /// Adds a partition: what happens from now on counts.
    pub fn watch(&mut self, visible: watch::Receiver<Visible>) {
        let now = end(self.limit, &visible.borrow());
        self.watched.push((visible, now));
    }

    /// Whether there is nothing that could ever wake it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.watched.is_empty()
    }

    /// Completes when any of them has moved, or its partition is gone.
    pub async fn wait(&mut self) {
        let limit = self.limit;
        let mut moved: FuturesUnordered<_> =
            self.watched
                .iter_mut()
                // A last stable offset that stands still is no news, however much is written behind it.
                .map(|(visible, seen)| async move {
                    visible.wait_for(|now| end(limit, now) != *seen).await.is_ok()
                })
                .collect();
        moved.next().await;
    }
}

fn end(limit: ReadLimit, visible: &Visible) -> i64 {
    match limit {
        ReadLimit::LastStable => visible.last_stable,
        ReadLimit::HighWatermark | ReadLimit::LogEnd => visible.high_watermark,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const START: Visible = Visible { high_watermark: 0, last_stable: 0 };

    async fn is_silent(waiter: &mut Waiter) -> bool {
        tokio::time::timeout(Duration::from_millis(20), waiter.wait()).await.is_err()
    }

    #[tokio::test]
    async fn it_wakes_for_any_and_for_what_came_since_it_watched() {
        let (a, b) = (watch::Sender::new(START), watch::Sender::new(START));
        let mut waiter = Waiter::new(ReadLimit::HighWatermark);
        waiter.watch(a.subscribe());
        waiter.watch(b.subscribe());
        b.send_replace(Visible { high_watermark: 1, last_stable: 0 });
        waiter.wait().await;

        let mut waiter = Waiter::new(ReadLimit::HighWatermark);
        waiter.watch(a.subscribe());
        assert!(is_silent(&mut waiter).await);
        drop(a);
        waiter.wait().await;
    }

    #[tokio::test]
    async fn who_reads_what_is_committed_wakes_for_the_last_stable_offset_alone() {
        let sender = watch::Sender::new(START);
        let mut waiter = Waiter::new(ReadLimit::LastStable);
        waiter.watch(sender.subscribe());
        sender.send_replace(Visible { high_watermark: 5, last_stable: 0 });
        assert!(is_silent(&mut waiter).await);
        sender.send_replace(Visible { high_watermark: 6, last_stable: 6 });
        waiter.wait().await;
    }
}
