//! A partition's directory by the name that it has now. It is renamed when its topic is deleted; from then on its old name
//! may be another topic's, whose files have the same names.
//!
//! Invariant: no segment is opened, made or removed by a name in a directory while that is renamed, nor by the old name
//! afterwards. Sealing one and putting it in another's place need no such care: whoever deletes the topic waits for them
//! (`maintenance` of [`crate::partition`]).

use parking_lot::RwLock;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A partition's directory.
#[derive(Debug)]
pub(super) struct PartitionDir(RwLock<PathBuf>);

impl PartitionDir {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(RwLock::new(path))
    }

    /// Where it is now.
    pub(super) fn path(&self) -> PathBuf {
        self.0.read().clone()
    }

    /// Does file work by its name, which stays its own for as long.
    pub(super) fn with<T>(&self, work: impl FnOnce(&Path) -> T) -> T {
        work(&self.0.read())
    }

    /// Gives it another name. If that fails, its old name is given up all the same.
    pub(super) fn rename(&self, to: PathBuf) -> io::Result<()> {
        let mut path = self.0.write();
        let outcome = fs::rename(&*path, &to);
        *path = to;
        outcome
    }
}
