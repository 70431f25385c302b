//! Looking at a data directory, and writing one for export, without a store: see [`inspect`](crate::inspect) and
//! [`export`](crate::export). Nothing here changes what it looks at.

use super::{CATALOG, LOCK, at, blocking, entries, names, remove_dir, sync_dir, write_file};
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
    /// Base offsets and lengths of segments, in order.
    pub(crate) logs: Vec<(i64, u64)>,
    /// Offset, path and length of snapshots, in order.
    pub(crate) snapshots: Vec<(i64, PathBuf, u64)>,
    /// Indexes, with their lengths.
    pub(crate) sidecars: BTreeMap<PathBuf, u64>,
    /// `partition.metadata`.
    pub(crate) metadata: Option<String>,
    /// `leader-epoch-checkpoint`.
    pub(crate) epochs: Option<String>,
}

fn text(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        outcome => Ok(Some(String::from_utf8_lossy(&at("read", path, outcome)?).into_owned())),
    }
}

/// What lies in a partition's directory.
pub(crate) async fn partition_files(dir: &Path) -> Result<PartitionFiles> {
    let dir = dir.to_owned();
    blocking(move || {
        let mut files = PartitionFiles::default();
        for (name, path) in entries(&dir)? {
            let len = at("look at", &path, fs::metadata(&path))?.len();
            if let Some(base) = names::offset_of(&name, "log") {
                files.logs.push((base, len));
            } else if let Some(offset) = names::offset_of(&name, "snapshot") {
                files.snapshots.push((offset, path, len));
            } else {
                files.sidecars.insert(path, len);
            }
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
