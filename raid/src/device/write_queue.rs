//! Writes of one file into the page cache, which share their way to a thread that may block.
//!
//! Such a write is a copy in memory unless the kernel holds the writer back, so what it costs is the way there. The first
//! one takes a blocking thread; those that come while it works are done by the same thread. So a busy file costs a
//! hop for each batch, and an idle one a hop for each write. Writes of one file go one after another, which is what its
//! inode's lock makes of them anyway; those of several files go at once.
//!
//! Invariant: while anything waits, a thread is on its way. Should the runtime end before it runs, all that waits is told.

use super::Durability;
use super::file::{Failed, check_length, write_all};
use crate::error::Operation;
use bytes::Bytes;
use parking_lot::Mutex;
use rustix::io::Errno;
use std::fs::File;
use std::sync::Arc;
use tokio::sync::oneshot;

type Outcome = Result<(), Failed>;

struct Job {
    at: u64,
    data: Bytes,
    /// The length that the file must have.
    least: u64,
    done: oneshot::Sender<Outcome>,
}

#[derive(Default)]
struct State {
    waiting: Vec<Job>,
    /// A thread works, or is on its way.
    is_served: bool,
}

/// The writes of one file.
pub(super) struct WriteQueue {
    file: Arc<File>,
    state: Mutex<State>,
}

impl std::fmt::Debug for WriteQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteQueue").field("file", &self.file).finish_non_exhaustive()
    }
}

impl WriteQueue {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self { file, state: Mutex::default() }
    }

    /// Writes `data` at `at`, into a file that must be at least `least` bytes long. The write begins at once, whatever
    /// becomes of the future.
    pub(super) fn submit(
        self: &Arc<Self>,
        at: u64,
        data: Bytes,
        least: u64,
    ) -> impl Future<Output = Outcome> + use<> {
        let (done, outcome) = oneshot::channel();
        let is_first = {
            let mut state = self.state.lock();
            state.waiting.push(Job { at, data, least, done });
            !std::mem::replace(&mut state.is_served, true)
        };
        if is_first {
            let shift = Shift { queue: Arc::clone(self), has_ended: false };
            // Its outcome is in the jobs.
            drop(tokio::task::spawn_blocking(move || shift.work()));
        }
        // Without an answer: the runtime is being shut down, and the outcome is unknown.
        async move { outcome.await.unwrap_or(Err(Failed::from(Errno::SHUTDOWN))) }
    }
}

/// The thread that serves a queue.
struct Shift {
    queue: Arc<WriteQueue>,
    has_ended: bool,
}

impl Shift {
    fn work(mut self) {
        let mut batch = Vec::new();
        loop {
            {
                let mut state = self.queue.state.lock();
                std::mem::swap(&mut state.waiting, &mut batch);
                if batch.is_empty() {
                    // What comes from now on takes a thread of its own.
                    state.is_served = false;
                    self.has_ended = true;
                    return;
                }
            }
            for Job { at, data, least, done } in batch.drain(..) {
                let outcome = check_length(&self.queue.file, least, Operation::Write)
                    .and_then(|()| write_all(&self.queue.file, at, &data, Durability::Cached));
                // Nobody may be waiting any more; it is written all the same.
                drop(done.send(outcome));
            }
        }
    }
}

impl Drop for Shift {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let mut state = self.queue.state.lock();
        state.is_served = false;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        // Who waits for one of these finds that nobody will answer.
        drop(waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use futures_util::future::join_all;
    use std::os::unix::fs::FileExt;

    const BLOCK: u64 = 4096;

    fn queue() -> (Arc<File>, Arc<WriteQueue>) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        (Arc::clone(&file), Arc::new(WriteQueue::new(file)))
    }

    fn block(n: u64) -> Bytes {
        Bytes::from(vec![n as u8 + 1; BLOCK as usize])
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn writes_that_come_at_once_are_all_done_and_the_queue_rests_afterwards() {
        let (file, queue) = queue();
        for round in 0..50 {
            let tasks = (0..32).map(|n| tokio::spawn(queue.submit(n * BLOCK, block(n + round), 0)));
            for outcome in join_all(tasks).await {
                assert!(outcome.unwrap().is_ok());
            }
            for n in 0..32 {
                let mut found = vec![0; BLOCK as usize];
                file.read_exact_at(&mut found, n * BLOCK).unwrap();
                assert_eq!(found, block(n + round));
            }
        }
        // The last one's answer comes before the thread has looked again.
        while queue.state.lock().is_served {
            tokio::task::yield_now().await;
        }
        assert!(queue.state.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_write_into_a_file_that_was_cut_short_is_refused() {
        let (file, queue) = queue();
        file.set_len(BLOCK).unwrap();
        let outcome = queue.submit(BLOCK, block(0), 2 * BLOCK).await;
        assert_eq!(outcome.unwrap_err().errno, Errno::IO);
        assert_eq!(file.metadata().unwrap().len(), BLOCK);
    }

    #[test]
    fn who_waits_when_the_runtime_ends_is_told() {
        let (_, queue) = queue();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let handle = runtime.handle().clone();
        runtime.shutdown_background();
        let _entered = handle.enter();
        for _ in 0..2 {
            let outcome = queue.submit(0, block(0), 0).now_or_never();
            assert_eq!(outcome.expect("nobody will answer").unwrap_err().errno, Errno::SHUTDOWN);
        }
    }
}
