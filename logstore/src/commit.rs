//! Group commit: one flush makes the appends of all partitions durable.
//!
//! Whoever joins before a flush starts is covered by it: joining happens after the write completed, and the task
//! takes the whole queue just before it flushes. While a flush runs, the next group gathers; so the cost of
//! durability does not grow with the number of partitions or producers, and an append waits for two flushes at most.
//!
//! The task lives only while somebody waits. A failed flush fails its whole group and poisons the store: it is never
//! tried again.

use crate::error::Result;
use crate::health::Health;
use crate::home::Home;
use crate::partition::{Commit, Partition};
use crate::tasks::Tasks;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::oneshot;

#[derive(Debug)]
struct Waiting {
    partition: Arc<Partition>,
    /// Offset after the last record that this commit covers.
    end: i64,
    done: oneshot::Sender<Result<()>>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<Waiting>,
    running: bool,
}

/// Gathers commits.
#[derive(Debug)]
pub(crate) struct Committer {
    home: Arc<dyn Home>,
    tasks: Arc<Tasks>,
    health: Arc<Health>,
    queue: Mutex<Queue>,
}

impl Committer {
    pub(crate) fn new(home: Arc<dyn Home>, tasks: Arc<Tasks>, health: Arc<Health>) -> Arc<Self> {
        Arc::new(Self { home, tasks, health, queue: Mutex::default() })
    }

    /// Asks for everything written to `partition` up to `end` to become durable.
    pub(crate) fn join(self: &Arc<Self>, partition: Arc<Partition>, end: i64) -> Commit {
        let (done, commit) = oneshot::channel();
        let mut queue = self.queue.lock();
        queue.waiting.push(Waiting { partition, end, done });
        if !std::mem::replace(&mut queue.running, true) {
            drop(queue);
            let committer = Arc::clone(self);
            self.tasks.spawn(Box::pin(async move { committer.work().await }));
        }
        Commit(commit)
    }

    async fn work(&self) {
        loop {
            let group = {
                let mut queue = self.queue.lock();
                queue.running = !queue.waiting.is_empty();
                std::mem::take(&mut queue.waiting)
            };
            if group.is_empty() {
                return;
            }
            let outcome = self.flush().await;
            for Waiting { partition, end, done } in group {
                if outcome.is_ok() {
                    partition.committed(end);
                }
                // Whoever no longer waits is owed nothing.
                drop(done.send(outcome.clone()));
            }
        }
    }

    async fn flush(&self) -> Result<()> {
        self.health.check()?;
        let outcome = self.home.flush().await;
        if let Err(cause) = &outcome {
            self.health.fail(cause);
        }
        outcome
    }
}
