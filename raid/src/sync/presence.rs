//! Who is at work in a volume's background: such a task holds the members, though nobody waits for what it does.
//!
//! Invariant: a task that is counted here has let go of the volume when it is counted out.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

/// Counts them.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    count: AtomicUsize,
    empty: Notify,
}

/// That a task is at work. To be dropped after all else that it has of the volume.
pub(crate) struct Present(Arc<Presence>);

impl Presence {
    /// Counts one in.
    pub(crate) fn enter(self: &Arc<Self>) -> Present {
        self.count.fetch_add(1, Ordering::AcqRel);
        Present(Arc::clone(self))
    }

    /// Waits until nobody is.
    pub(crate) async fn ended(&self) {
        loop {
            let empty = self.empty.notified();
            futures_util::pin_mut!(empty);
            empty.as_mut().enable();
            if self.count.load(Ordering::Acquire) == 0 {
                return;
            }
            empty.await;
        }
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.empty.notify_waiters();
        }
    }
}
