//! Group commit: one flush makes the appends of all partitions durable.
//!
//! Whoever joins before a flush starts is covered by it: joining happens after the home has taken the write, and the task
//! takes the whole queue just before it flushes. While a flush runs, the next group gathers; so the cost of
//! durability does not grow with the number of partitions or producers, and an append waits for two flushes at most.
//! With a linger (`log.commit.linger.ms`) the first of a group waits so long for company before its flush starts: an
//! append then waits for two flushes and the linger at most, and a slow disk flushes less often.
//!
//! Appends that nobody waits for become durable within their topic's `flush.ms`: their partitions are noted with the
//! time that is left, and every flush, whoever asked for it, covers all that are noted. One sleeping task watches the
//! earliest of these times, and only while there is one.
//!
//! The flushing task lives only while somebody waits. A failed flush fails its whole group and poisons the store: it
//! is never tried again. Where only the way to a flush failed ([`Error::Unplaced`](crate::Error)), the next group tries anew.
//!
//! Costs: for each append that waits, one channel and a push under one short lock, and the lock of its partition's
//! `progress` once it is durable; for one that does not, nothing, or with `flush.ms` a push for the first in a partition since
//! the last flush. For each group two lists and one flush of the home: on a volume, where all of it is small, one write to its
//! journal, a system call for each leg of that; else an `fdatasync` and a look at the length of its file for each member, all
//! at once; neither grows with the number of partitions. In a directory a sync for each file that was written.

use crate::error::Result;
use crate::health::Health;
use crate::home::Home;
use crate::partition::{Commit, Partition};
use crate::tasks::Tasks;
use futures_util::future::select;
use parking_lot::Mutex;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Longest sleep at once; clocks need not bear more.
const LONGEST_SLEEP: Duration = Duration::from_secs(60 * 60);

#[derive(Debug)]
struct Waiting {
    partition: Arc<Partition>,
    /// Offset after the last record that this commit covers.
    end: i64,
    done: oneshot::Sender<Result<()>>,
}

#[derive(Debug, Default)]
#[allow(clippy::struct_excessive_bools)] // which of two tasks live, and which of two things happened
struct Queue {
    waiting: Vec<Waiting>,
    /// When the first of them came.
    since: Duration,
    /// Partitions with appends that nobody waits for, and that must be durable by `due`. They hold this store, so it
    /// must not hold them.
    noted: Vec<Weak<Partition>>,
    due: Option<Duration>,
    /// `due` has come.
    rung: bool,
    /// The task that flushes lives.
    running: bool,
    /// The task that waits for `due` lives.
    watched: bool,
    closed: bool,
}

/// Gathers commits.
#[derive(Debug)]
pub(crate) struct Committer {
    home: Arc<dyn Home>,
    tasks: Arc<Tasks>,
    health: Arc<Health>,
    linger: Duration,
    queue: Mutex<Queue>,
    /// Tells the watching task that `due` came nearer, or that there is nothing to watch any more.
    changed: Arc<Notify>,
}

impl Committer {
    pub(crate) fn new(
        home: Arc<dyn Home>,
        tasks: Arc<Tasks>,
        health: Arc<Health>,
        linger: Duration,
    ) -> Arc<Self> {
        Arc::new(Self { home, tasks, health, linger, queue: Mutex::default(), changed: Arc::default() })
    }

    /// Asks for everything written to `partition` up to `end` to become durable.
    pub(crate) fn join(self: &Arc<Self>, partition: Arc<Partition>, end: i64) -> Commit {
        let (done, commit) = oneshot::channel();
        let mut queue = self.queue.lock();
        if queue.waiting.is_empty() && !self.linger.is_zero() {
            queue.since = self.now();
        }
        queue.waiting.push(Waiting { partition, end, done });
        let idle = !std::mem::replace(&mut queue.running, true);
        drop(queue);
        if idle {
            self.start();
        }
        Commit(commit)
    }

    /// Asks for everything written to `partition` to become durable by `due`, without anybody waiting for it.
    pub(crate) fn note(self: &Arc<Self>, partition: &Arc<Partition>, due: Duration) {
        let mut queue = self.queue.lock();
        if queue.closed {
            // Closing makes all of it durable.
            return;
        }
        queue.noted.push(Arc::downgrade(partition));
        if queue.due.is_some_and(|earliest| earliest <= due) {
            return;
        }
        queue.due = Some(due);
        let unwatched = !std::mem::replace(&mut queue.watched, true);
        drop(queue);
        if !unwatched {
            self.changed.notify_one();
            return;
        }
        // Not counted among the tasks that closing waits for: it mostly sleeps.
        let (committer, changed) = (Arc::downgrade(self), Arc::clone(&self.changed));
        let runtime = Arc::clone(self.tasks.runtime());
        self.tasks.runtime().spawn(Box::pin(async move {
            while let Some(wait) = committer.upgrade().and_then(|committer| committer.watch()) {
                let sleep = runtime.sleep(wait.min(LONGEST_SLEEP));
                // Whichever it was, what is due now is looked at anew.
                drop(select(sleep, pin!(changed.notified())).await);
            }
        }));
    }

    /// Time until `due`; when it has come, has it flushed. `None` ends the watching task.
    fn watch(self: &Arc<Self>) -> Option<Duration> {
        let mut queue = self.queue.lock();
        let wait = queue.due.map(|due| due.saturating_sub(self.now()));
        match wait {
            Some(wait) if !wait.is_zero() => return Some(wait),
            _ => queue.watched = false,
        }
        if wait.is_some() {
            (queue.due, queue.rung) = (None, true);
            if !std::mem::replace(&mut queue.running, true) {
                drop(queue);
                self.start();
            }
        }
        None
    }

    /// Ends the watching: whoever closes makes everything durable.
    pub(crate) fn close(&self) {
        let mut queue = self.queue.lock();
        (queue.closed, queue.due) = (true, None);
        queue.noted.clear();
        drop(queue);
        self.changed.notify_one();
    }

    fn now(&self) -> Duration {
        self.tasks.runtime().now()
    }

    fn start(self: &Arc<Self>) {
        let committer = Arc::clone(self);
        self.tasks.spawn(Box::pin(async move { committer.work().await }));
    }

    async fn work(&self) {
        loop {
            self.gather().await;
            let (group, noted) = {
                let mut queue = self.queue.lock();
                let rung = std::mem::take(&mut queue.rung);
                queue.running = rung || !queue.waiting.is_empty();
                if !queue.running {
                    return;
                }
                queue.due = None;
                (std::mem::take(&mut queue.waiting), std::mem::take(&mut queue.noted))
            };
            // Their ends are read before the flush starts: it covers what was written by then.
            let noted: Vec<_> = noted
                .iter()
                .filter_map(Weak::upgrade)
                .map(|partition| {
                    let end = partition.flush_starts();
                    (partition, end)
                })
                .collect();
            let outcome = self.flush().await;
            if outcome.is_ok() {
                for (partition, end) in noted {
                    partition.committed(end);
                }
            }
            for Waiting { partition, end, done } in group {
                if outcome.is_ok() {
                    partition.committed(end);
                }
                // Whoever no longer waits is owed nothing.
                drop(done.send(outcome.clone()));
            }
        }
    }

    /// Waits until the first that waits has waited for its linger.
    async fn gather(&self) {
        if self.linger.is_zero() {
            return;
        }
        let wait = {
            let queue = self.queue.lock();
            let due = queue.since.saturating_add(self.linger);
            // Whoever closes wants no company.
            if queue.waiting.is_empty() || queue.closed {
                Duration::ZERO
            } else {
                due.saturating_sub(self.now())
            }
        };
        if !wait.is_zero() {
            self.tasks.runtime().sleep(wait).await;
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

impl Drop for Committer {
    fn drop(&mut self) {
        // The watching task ends without waiting for its time.
        self.changed.notify_one();
    }
}
