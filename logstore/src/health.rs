//! Whether the store may still promise anything. After a failed flush or catalog write the kernel has marked pages
//! clean that never reached the disk, so trying again would lie: the first failure is kept, and every later change is
//! refused with it until the store is opened anew. Reads go on.
//!
//! What waits for its place on a volume and cannot be written there is not such a failure: it is kept, in memory and in the
//! journal, and may well be written later, when a file system under the images has room again.

use crate::error::{Error, Result};
use parking_lot::RwLock;

/// The first failure, if there was one.
#[derive(Debug, Default)]
pub(crate) struct Health(RwLock<Option<Error>>);

impl Health {
    /// Refuses when a change can no longer be promised.
    pub(crate) fn check(&self) -> Result<()> {
        match &*self.0.read() {
            None => Ok(()),
            Some(Error::Closed) => Err(Error::Closed),
            Some(cause) => Err(Error::Poisoned { cause: Box::new(cause.clone()) }),
        }
    }

    /// Keeps the first failure.
    pub(crate) fn fail(&self, cause: &Error) {
        if matches!(cause, Error::Unplaced { .. }) {
            tracing::warn!("{cause}");
            return;
        }
        let mut first = self.0.write();
        if first.is_none() {
            tracing::error!("no further change can be promised: {cause}");
            *first = Some(cause.clone());
        }
    }

    /// The store was closed in order.
    pub(crate) fn close(&self) {
        self.0.write().get_or_insert(Error::Closed);
    }
}
