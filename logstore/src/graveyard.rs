//! Removed segments and topics that wait for `file.delete.delay.ms`. They are in no record any more; what is left is
//! to drop the last hold on their space. One task sleeps until the next is due, while there is one.

use crate::catalog::records::TopicRecord;
use crate::home::{Home, SegmentBytes};
use crate::tasks::Tasks;
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug)]
struct Grave {
    due: Duration,
    /// Dropped when due.
    _segments: Vec<Arc<dyn SegmentBytes>>,
    topic: Option<TopicRecord>,
}

#[derive(Debug, Default)]
struct State {
    graves: Vec<Grave>,
    running: bool,
}

/// What waits for its space to be given back.
#[derive(Debug)]
pub(crate) struct Graveyard {
    home: Arc<dyn Home>,
    tasks: Arc<Tasks>,
    state: Mutex<State>,
}

impl Graveyard {
    pub(crate) fn new(home: Arc<dyn Home>, tasks: Arc<Tasks>) -> Arc<Self> {
        Arc::new(Self { home, tasks, state: Mutex::default() })
    }

    /// Lets go of segments, and of a topic they were the whole of, after `delay`.
    pub(crate) async fn bury(
        self: &Arc<Self>,
        delay: Duration,
        segments: Vec<Arc<dyn SegmentBytes>>,
        topic: Option<TopicRecord>,
    ) {
        let due = self.tasks.runtime().now().saturating_add(delay);
        let grave = Grave { due, _segments: segments, topic };
        if delay.is_zero() {
            return self.release(grave).await;
        }
        let mut state = self.state.lock();
        state.graves.push(grave);
        if !std::mem::replace(&mut state.running, true) {
            drop(state);
            // Not counted among the tasks that closing waits for: it mostly sleeps, and what it has not done by then
            // the next start does.
            let (yard, runtime) = (Arc::downgrade(self), Arc::clone(self.tasks.runtime()));
            self.tasks.runtime().spawn(Box::pin(async move {
                while let Some(wait) = yard.upgrade().and_then(|yard| yard.next()) {
                    runtime.sleep(wait).await;
                    let Some(yard) = yard.upgrade() else { return };
                    for grave in yard.due() {
                        yard.release(grave).await;
                    }
                }
            }));
        }
    }

    /// Time until the next is due; `None` ends the task.
    fn next(&self) -> Option<Duration> {
        let mut state = self.state.lock();
        let next = state.graves.iter().map(|grave| grave.due).min();
        state.running = next.is_some();
        Some(next?.saturating_sub(self.tasks.runtime().now()))
    }

    fn due(&self) -> Vec<Grave> {
        let now = self.tasks.runtime().now();
        let mut state = self.state.lock();
        let (due, rest) = std::mem::take(&mut state.graves).into_iter().partition(|grave| grave.due <= now);
        state.graves = rest;
        due
    }

    async fn release(&self, grave: Grave) {
        let topic = grave.topic.clone();
        drop(grave);
        if let Some(record) = topic
            && let Err(error) = self.home.remove_topic(&record).await
        {
            tracing::warn!(
                "what is left of deleted topic {} stays until the next start: {error}",
                record.name
            );
        }
    }

    /// Forgets all without waiting; the next start finishes it.
    pub(crate) fn close(&self) {
        let graves = std::mem::take(&mut self.state.lock().graves);
        drop(graves);
    }
}
