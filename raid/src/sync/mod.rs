//! Walks over the array that make copies equal, all in windows under range locks, so that clients wait for one window
//! at most.
//!
//! - [`resync`]: ranges that may differ after an unclean stop;
//! - [`rebuild`]: members that are being filled;
//! - [`scrub`]: all of it, to find copies that differ though they should not. It runs when it is asked for.
//!
//! Each volume has two tasks in the background. One resyncs, and clears the bits of regions that have come to rest; the
//! other gives vacant slots to spares and fills members. They end when the volume is stopped or dropped; a stop waits
//! until they have let go of its members (`presence`).

mod pace;
mod presence;
mod progress;
mod rebuild;
mod resync;
pub(crate) mod scrub;

pub(crate) use pace::{Pace, Speed};
pub(crate) use presence::{Presence, Present};
pub(crate) use progress::Progress;
pub(crate) use resync::{differing_runs, due, equalise};
pub(crate) use scrub::Scrub;

use crate::error::{Error, Result};
use crate::runtime::Runtime;
use crate::volume::Inner;
use futures_util::future::select;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::Notify;

/// Time between looks for bits to clear, and before what failed is tried again.
const LOOK: Duration = Duration::from_secs(5);

/// Starts the volume's background tasks.
pub(crate) fn spawn(inner: &Arc<Inner>) {
    let (runtime, volume) = (&inner.runtime, || Arc::downgrade(inner));
    let (wake, vacancy) = (Arc::clone(&inner.wake), Arc::clone(&inner.vacancy));
    let present = || inner.background.enter();
    runtime.spawn(Box::pin(upkeep(volume(), Arc::clone(runtime), wake, present())));
    runtime.spawn(Box::pin(filling(volume(), Arc::clone(runtime), vacancy, present())));
}

// Arguments go after all that was made of them: whoever waits for `Present` finds the volume let go of.
async fn upkeep(volume: Weak<Inner>, runtime: Arc<dyn Runtime>, wake: Arc<Notify>, _present: Present) {
    // Held no longer than needed: a volume that was dropped must not live on in its own background.
    while let Some(inner) = volume.upgrade() {
        if inner.held.load(Ordering::Acquire) {
            drop(inner);
            rest(runtime.as_ref(), &wake).await;
            continue;
        }
        let walked = resync::walk(&inner).await;
        if matches!(walked, Err(Error::Stopped { .. })) {
            return;
        }
        match look(&inner).await {
            Err(Error::Stopped { .. }) => return,
            Err(failure) => {
                tracing::warn!(volume = %inner.name, %failure, "the bitmap could not be cleared");
            }
            Ok(()) => {}
        }
        drop(inner);
        // Ranges that were marked meanwhile have left word, and end the rest at once.
        rest(runtime.as_ref(), &wake).await;
    }
}

async fn look(inner: &Arc<Inner>) -> Result<()> {
    let _entered = inner.enter()?;
    inner.clear_healed_blocks().await?;
    inner.clear_idle_bits().await
}

async fn filling(volume: Weak<Inner>, runtime: Arc<dyn Runtime>, vacancy: Arc<Notify>, _present: Present) {
    while let Some(inner) = volume.upgrade() {
        if inner.held.load(Ordering::Acquire) {
            drop(inner);
            rest(runtime.as_ref(), &vacancy).await;
            continue;
        }
        let more = match fill(&inner).await {
            Ok(more) => more,
            Err(Error::Stopped { .. }) => return,
            Err(failure) => {
                tracing::warn!(volume = %inner.name, %failure, "a member could not be filled");
                false
            }
        };
        drop(inner);
        if !more {
            rest(runtime.as_ref(), &vacancy).await;
        }
    }
}

/// Fills one member, or gives one slot to a spare. Returns whether there may be more to do.
async fn fill(inner: &Arc<Inner>) -> Result<bool> {
    let promoted = {
        let _entered = inner.enter()?;
        if inner.refuse_if_unwritable().is_err() {
            return Ok(false);
        }
        inner.promote_spare().await?
    };
    Ok(rebuild::next(inner).await? || promoted)
}

/// Waits until there is a reason to look, or long enough.
async fn rest(runtime: &dyn Runtime, wake: &Notify) {
    let woken = wake.notified();
    futures_util::pin_mut!(woken);
    // Whichever comes first; both are a reason.
    drop(select(runtime.sleep(LOOK), woken).await);
}
