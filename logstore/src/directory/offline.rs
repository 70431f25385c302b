//! Looking at a data directory, and writing one for export, without a store: see [`inspect`](crate::inspect) and
//! [`export`](crate::export). Nothing here changes what it looks at.

use super::{
    CATALOG, LOCK, at, blocking, checkpoints, entries, names, remove_dir, replace, swap, sync_dir, write_file,
};
use crate::catalog::records::Swap;
use crate::checkpoints::Checkpoint;
use crate::error::{Error, Result};
use bytes::Bytes;
pub(crate) use names::offset_file;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest catalog that is read into memory.
const LARGEST_CATALOG: u64 = 4 << 30;

/// Takes the lock of a data directory beside other lookers; refused while a store is open there.
pub(crate) async fn lock(path: &Path) -> Result<Option<File>> {
    let path = path.to_owned();
    blocking(move || {
        let file = path.join(LOCK);
        let lock = match File::open(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            outcome => at("open", &file, outcome)?,
        };
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse { path }),
            Err(errno) => at("lock", &file, Err(errno.into())),
        }
    })
    .await
}

/// The bytes of a directory's catalog, if it has one.
pub(crate) async fn catalog(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = path.join(CATALOG);
    blocking(move || match fs::metadata(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Ok(found) if found.len() > LARGEST_CATALOG => {
            let reason = format!("it has {} bytes: no catalog is that large", found.len());
            Err(Error::Catalog { place: file.display().to_string(), reason })
        }
        outcome => {
            at("look at", &file, outcome)?;
            at("read", &file, fs::read(&file)).map(Some)
        }
    })
    .await
}

/// The directories named as partitions are, by topic and number.
pub(crate) async fn partition_dirs(path: &Path) -> Result<BTreeMap<(String, u32), PathBuf>> {
    let path = path.to_owned();
    blocking(move || {
        let mut found = BTreeMap::new();
        for (name, path) in entries(&path)? {
            let Some((topic, number)) = name.rsplit_once('-') else { continue };
            if let Ok(number) = number.parse()
                && names::is_partition_dir(&name)
                && path.is_dir()
            {
                found.insert((topic.to_owned(), number), path);
            }
        }
        Ok(found)
    })
    .await
}

/// The files of a partition.
#[derive(Debug, Default)]
pub(crate) struct PartitionFiles {
    /// Base offsets, paths and lengths of segments, in order.
    pub(crate) logs: Vec<(i64, PathBuf, u64)>,
    /// Offset, path and length of snapshots, in order.
    pub(crate) snapshots: Vec<(i64, PathBuf, u64)>,
    /// Indexes, by the paths that are theirs: where they are, and their lengths.
    pub(crate) sidecars: BTreeMap<PathBuf, (PathBuf, u64)>,
    /// A segment that was compacted has not wholly taken the place of others yet. It is shown as if it had.
    pub(crate) is_half_swapped: bool,
    /// `partition.metadata`.
    pub(crate) metadata: Option<String>,
    /// `leader-epoch-checkpoint`.
    pub(crate) epochs: Option<String>,
}

impl PartitionFiles {
    /// Shows what a start would make of it by ending what was decided.
    fn swapped(&mut self, dir: &Path, decided: Swap, there: &BTreeMap<PathBuf, u64>) {
        let Swap { base, end, .. } = decided;
        let swap = |kind| names::swap_file(dir, kind, decided);
        let len = |kind| there.get(&swap(kind)).copied();
        let before = (self.logs.len(), self.sidecars.len());
        self.logs.retain(|(at, ..)| *at <= base || *at >= end);
        let is_gone = |path: &Path, kind: &str| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            names::offset_of(&name, kind).is_some_and(|at| at > base && at < end)
        };
        self.sidecars.retain(|path, _| !swap::DERIVED.iter().any(|kind| is_gone(path, kind)));
        self.is_half_swapped = before != (self.logs.len(), self.sidecars.len());
        if let Some(len) = len("log") {
            self.logs.retain(|(at, ..)| *at != base);
            self.logs.push((base, swap("log"), len));
            for kind in swap::DERIVED {
                self.sidecars.remove(&offset_file(dir, base, kind));
            }
            self.is_half_swapped = true;
        }
        for kind in swap::DERIVED {
            if let Some(len) = len(kind) {
                self.sidecars.insert(offset_file(dir, base, kind), (swap(kind), len));
                self.is_half_swapped = true;
            }
        }
    }
}

fn text(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        outcome => Ok(Some(String::from_utf8_lossy(&at("read", path, outcome)?).into_owned())),
    }
}

/// What lies in a partition's directory. `decided` is what its record says of a compacted segment.
pub(crate) async fn partition_files(dir: &Path, decided: Option<Swap>) -> Result<PartitionFiles> {
    let dir = dir.to_owned();
    blocking(move || {
        let (mut files, mut of_compaction) = (PartitionFiles::default(), BTreeMap::new());
        for (name, path) in entries(&dir)? {
            let len = at("look at", &path, fs::metadata(&path))?.len();
            if let Some(base) = names::offset_of(&name, "log") {
                files.logs.push((base, path, len));
            } else if let Some(offset) = names::offset_of(&name, "snapshot") {
                files.snapshots.push((offset, path, len));
            } else if names::is_of_compaction(&name) {
                of_compaction.insert(path, len);
            } else {
                files.sidecars.insert(path.clone(), (path, len));
            }
        }
        if let Some(decided) = decided {
            files.swapped(&dir, decided, &of_compaction);
        }
        files.logs.sort_unstable();
        files.snapshots.sort();
        files.metadata = text(&dir.join("partition.metadata"))?;
        files.epochs = text(&dir.join("leader-epoch-checkpoint"))?;
        Ok(files)
    })
    .await
}

/// The length of a file.
pub(crate) async fn len(path: &Path) -> Result<u64> {
    let path = path.to_owned();
    blocking(move || Ok(at("look at", &path, fs::metadata(&path))?.len())).await
}

/// Makes a directory to export into. One that holds something is refused unless `force` says otherwise.
pub(crate) async fn target(path: &Path, force: bool) -> Result<()> {
    let path = path.to_owned();
    blocking(move || {
        at("create", &path, fs::create_dir_all(&path))?;
        if !force && !entries(&path)?.is_empty() {
            let what =
                "it is not empty; name another directory, or give --force to replace what has the same names";
            let source = Arc::new(io::Error::new(io::ErrorKind::DirectoryNotEmpty, what));
            return Err(Error::File { action: "export into", path, source });
        }
        if path.join(CATALOG).exists() {
            let what = "a log store lives there";
            let source = Arc::new(io::Error::new(io::ErrorKind::AlreadyExists, what));
            return Err(Error::File { action: "export into", path, source });
        }
        Ok(())
    })
    .await
}

/// Makes an empty directory, in the place of what was there.
pub(crate) async fn fresh_dir(path: &Path) -> Result<()> {
    let path = path.to_owned();
    blocking(move || {
        remove_dir(&path)?;
        at("create", &path, fs::create_dir(&path))
    })
    .await
}

/// Writes a file whole and durably, but for its name.
pub(crate) async fn write_whole(path: PathBuf, bytes: Bytes) -> Result<()> {
    blocking(move || write_file(&path, &bytes)).await
}

/// Puts a file in the place of another: it holds the old or the new bytes, whatever happens.
pub(crate) async fn replace_whole(path: PathBuf, bytes: Bytes) -> Result<()> {
    blocking(move || replace(&path, &bytes)).await
}

/// The bytes of an offset checkpoint, if there is one.
pub(crate) async fn checkpoint(root: &Path, of: Checkpoint) -> Result<Option<Vec<u8>>> {
    let root = root.to_owned();
    blocking(move || checkpoints::read(&root, of)).await
}

/// Makes the names in a directory durable.
pub(crate) async fn sync_names(path: &Path) -> Result<()> {
    let path = path.to_owned();
    blocking(move || sync_dir(&path)).await
}

/// A file that is written from its start to its end.
pub(crate) struct Writer {
    path: PathBuf,
    file: Arc<File>,
}

impl Writer {
    /// Makes the file.
    pub(crate) async fn create(path: PathBuf) -> Result<Self> {
        blocking(move || {
            let file = Arc::new(at("create", &path, File::create(&path))?);
            Ok(Self { path, file })
        })
        .await
    }

    /// Appends.
    pub(crate) async fn append(&self, bytes: Bytes) -> Result<()> {
        let (path, file) = (self.path.clone(), Arc::clone(&self.file));
        blocking(move || at("write", &path, (&*file).write_all(&bytes))).await
    }

    /// Makes it durable, but for its name.
    pub(crate) async fn finish(self) -> Result<()> {
        blocking(move || at("sync", &self.path, self.file.sync_all())).await
    }
}
