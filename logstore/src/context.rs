//! What all partitions of a store share.

use crate::catalog::Catalog;
use crate::commit::Committer;
use crate::error::{Error, Result};
use crate::graveyard::Graveyard;
use crate::health::Health;
use crate::home::Home;
use crate::segment::IndexCache;
use crate::tasks::Tasks;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Shared by all partitions.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) home: Arc<dyn Home>,
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) committer: Arc<Committer>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) health: Arc<Health>,
    pub(crate) indexes: IndexCache,
    pub(crate) graveyard: Arc<Graveyard>,
    pub(crate) producer_expiration: Duration,
    /// The store is being closed: no new change starts.
    pub(crate) closing: AtomicBool,
}

impl Context {
    /// Refuses when no change may start.
    pub(crate) fn check(&self) -> Result<()> {
        if self.closing.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        self.health.check()
    }

    /// The broker's clock, in milliseconds since the epoch.
    pub(crate) fn wall_clock(&self) -> i64 {
        i64::try_from(self.tasks.runtime().wall_clock().as_millis()).unwrap_or(i64::MAX)
    }
}
