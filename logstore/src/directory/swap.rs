//! How a compacted segment takes the place of others in a directory.
//!
//! ```text
//! 1  <base>.log.<turn>.cleaned                          written, synced
//! 2  <base>.{index,timeindex,txnindex}.<end>.<turn>.swap written, synced; no txnindex where nothing was aborted
//! 3  <base>.log.<turn>.cleaned → <base>.log.<end>.<turn>.swap    the directory synced
//! 4  the partition's record says (base, end, turn)       one commit of the catalog: this decides
//! 5  files derived from the old <base>.log, where 2 has none that takes their place, removed    the directory synced
//! 6  <base>.log.<end>.<turn>.swap → <base>.log                                                  the directory synced
//! 7  <base>.<kind>.<end>.<turn>.swap → <base>.<kind>, each; the files of the others, between base and end, removed
//!                                                                                               the directory synced
//! ```
//!
//! A power cut before 4: the next start removes what 1 to 3 have left. After 4: it does what is left of 5 to 7, from what
//! it finds. Nothing is written after 4, so a full file system cannot leave it half-way.
//!
//! The turn rises with each attempt, so what is left of another one at the same segments is not taken for the one that was
//! decided, nor removed with it.
//!
//! Whether the `.swap` of the log is still there says how far it came: as long as it is, files derived from the old bytes
//! may lie beside it, and those that are to take their place have their own `.swap`; once it has its name (and that is
//! durable), what bears the base's name and has a `.swap` is old, and all else is new. So no file is ever taken for
//! the other's, nor lost: what 7 has renamed, 5 never removes.

use super::{at, entries, names, remove_file, sync_dir};
use crate::catalog::records::Swap;
use crate::error::Result;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What is derived from a segment's bytes and named by its base.
pub(super) const DERIVED: [&str; 3] = ["index", "timeindex", "txnindex"];

/// One file operation.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    /// Of the directory.
    Sync,
}

impl Step {
    fn take(&self, dir: &Path) -> Result<()> {
        match self {
            Self::Rename(from, to) => at("rename", from, fs::rename(from, to)),
            Self::Remove(path) => remove_file(path),
            Self::Sync => sync_dir(dir),
        }
    }
}

/// What is left to do of 5 to 7.
fn steps(dir: &Path, decided: Swap) -> Result<Vec<Step>> {
    let Swap { base, end, .. } = decided;
    let there: BTreeMap<String, PathBuf> = entries(dir)?.into_iter().collect();
    let exists =
        |path: &Path| path.file_name().is_some_and(|name| there.contains_key(&*name.to_string_lossy()));
    let (swap, own) =
        (|kind| names::swap_file(dir, kind, decided), |kind| names::offset_file(dir, base, kind));
    let mut steps = Vec::new();
    if exists(&swap("log")) {
        let stale = DERIVED.iter().filter(|kind| !exists(&swap(kind)) && exists(&own(kind)));
        steps.extend(stale.map(|kind| Step::Remove(own(kind))));
        if !steps.is_empty() {
            steps.push(Step::Sync);
        }
        steps.extend([Step::Rename(swap("log"), own("log")), Step::Sync]);
    }
    let before = steps.len();
    let fresh = DERIVED.iter().filter(|kind| exists(&swap(kind)));
    steps.extend(fresh.map(|kind| Step::Rename(swap(kind), own(kind))));
    let is_between = |name: &str| {
        let kinds = ["log"].iter().chain(&DERIVED);
        kinds.filter_map(|kind| names::offset_of(name, kind)).any(|at| at > base && at < end)
    };
    steps.extend(
        there.iter().filter(|(name, _)| is_between(name)).map(|(_, path)| Step::Remove(path.clone())),
    );
    if steps.len() > before {
        steps.push(Step::Sync);
    }
    Ok(steps)
}

/// Ends what was decided. Done once or again, from the beginning or from half-way: the outcome is the same.
pub(super) fn finish(dir: &Path, decided: Swap) -> Result<()> {
    steps(dir, decided)?.iter().try_for_each(|step| step.take(dir))
}

/// The names that a segment has before it has its own.
pub(super) fn names_beside(dir: &Path, swap: Swap) -> impl Iterator<Item = PathBuf> {
    let kinds = ["log"].iter().chain(&DERIVED);
    std::iter::once(names::cleaned_file(dir, swap))
        .chain(kinds.map(move |kind| names::swap_file(dir, kind, swap)))
}
