//! Segments as files in a directory, named and formatted as Kafka names and formats them, so that Kafka's own tools
//! read them. An edge: it uses the operating system's files on tokio's blocking threads.
//!
//! ```text
//! catalog.redb   .lock
//! recovery-point-offset-checkpoint   log-start-offset-checkpoint   cleaner-offset-checkpoint
//! replication-offset-checkpoint                          written from the catalog, and never read for it: `checkpoints`
//! <topic>-<partition>/<base offset, 20 digits>.log .index .timeindex .txnindex
//!                     <end offset, 20 digits>.snapshot
//!                     leader-epoch-checkpoint   partition.metadata
//!                     <base offset>.log.<turn>.cleaned        compaction at work
//!                     <base offset>.<kind>.<end offset>.<turn>.swap
//!                                                             about to take the place of all from base to end: `swap`
//! <topic>-<partition>.<topic id>-delete/        a deleted topic's directory, until its space is given back
//! ```
//!
//! Order of events: a topic's directories are made before its record, so a stop in between leaves directories without
//! records, which the next start removes. A deleted topic's record moves to the table `dying` in one commit; then its
//! directories are renamed away and, when their time has come, removed; a start finishes what was left.
//!
//! Compaction writes a `.cleaned` file, makes it durable with its indexes, and renames it to `.swap`; then the partition's
//! record says so, in the catalog, and that decides: each `.swap` gets its name, the neighbours up to its end are removed.
//! A start finishes what the record says, and removes every other `.cleaned` and `.swap`.
//!
//! A flush syncs every file written since the flush before, and the directories in which files appeared. It costs a
//! sync a file: that is what a volume saves.
//!
//! One `syncfs` instead, measured on ext4 on a busy machine of two cores, medians of five by turns, 4 KiB new in each
//! file, four syncs at once:
//!
//! ```text
//! dirty files                       1     10    100   1000
//! fdatasync each, ms              5.8   16.0   10.5  159.1
//! syncfs, ms                      9.1    9.9    4.8   18.0
//! the same with 256 MiB that others dirtied
//! fdatasync each, ms             10.8   35.8   22.8  181.6
//! syncfs, ms                     75.1   94.0   81.6  108.1
//! ```
//!
//! So it wins for certain only where many hundred files are dirty at once, and loses by much where a flush is small
//! and the file system is shared. It is not used: whether it reaches the disk's cache, and reports what was lost,
//! depends on the file system and the kernel, which would have to be known first. `bench log sync` measures it anew.

pub(crate) mod checkpoints;
pub(crate) mod names;
pub(crate) mod offline;
mod place;
mod segment;
mod swap;

use crate::catalog::records::{PartitionKey, Swap, Table, TopicRecord};
use crate::catalog::{Catalog, Change};
use crate::epochs::Epochs;
use crate::error::{Error, Result};
use crate::heal::Healing;
use crate::health::Health;
use crate::home::{Found, Home, Io, PartitionId, SegmentBytes, Space};
use crate::tasks::Tasks;
use checkpoints::Checkpoints;
use parking_lot::Mutex;
use place::PartitionDir;
use segment::FileSegment;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use uuid::Uuid;

const CATALOG: &str = "catalog.redb";
/// The catalog while it is being made.
const CATALOG_FRESH: &str = "catalog.redb.new";
const LOCK: &str = ".lock";
/// What a data directory may hold before it is one: an empty file system has `lost+found`.
const BLANK: [&str; 3] = [LOCK, CATALOG_FRESH, "lost+found"];
/// Bytes of the file system that compaction leaves to the rest, the catalog above all, less what it writes at once.
const KEPT_FREE: u64 = 4 << 20;
/// Files synced at the same time in a flush.
const SYNCS: usize = 4;

/// Runs blocking file work on a thread made for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    // A join error means that the runtime is going away: the outcome is unknown.
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(Error::Interrupted))
}

/// Turns a file system's answer into one that names the file.
pub(crate) fn at<T>(action: &'static str, path: &Path, outcome: io::Result<T>) -> Result<T> {
    outcome.map_err(|source| Error::File { action, path: path.to_owned(), source: Arc::new(source) })
}

/// Makes the entries of a directory durable.
fn sync_dir(path: &Path) -> Result<()> {
    let dir = at("open", path, File::open(path))?;
    at("sync", path, dir.sync_all())
}

/// Writes a small file whole, durably but for its name.
fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = at("create", path, File::create(path))?;
    at("write", path, file.write_all(bytes))?;
    at("sync", path, file.sync_all())
}

/// Replaces a small file: it holds the old or the new bytes, whatever happens.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut fresh = path.to_owned().into_os_string();
    fresh.push(".tmp");
    let fresh = PathBuf::from(fresh);
    let renamed = write_file(&fresh, bytes).and_then(|()| at("rename", &fresh, fs::rename(&fresh, path)));
    if let Err(error) = renamed {
        // There may be no room: what is there of it takes some. The first failure is the one to tell of.
        drop(fs::remove_file(&fresh));
        return Err(error);
    }
    path.parent().map_or(Ok(()), sync_dir)
}

/// Bytes that are free to us on the file system that holds `path`.
pub(crate) fn free_space(path: &Path) -> Result<u64> {
    let found = at("look for room in", path, rustix::fs::statvfs(path).map_err(io::Error::from))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Removes a directory and all in it; that it is gone already is fine.
fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => at("remove", path, outcome),
    }
}

/// Removes a file; that it is gone already is fine.
fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => at("remove", path, outcome),
    }
}

fn entries(path: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in at("list", path, fs::read_dir(path))? {
        let entry = at("list", path, entry)?;
        found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
    }
    Ok(found)
}

/// A data directory with a log store in it.
pub(crate) struct DirectoryHome {
    path: PathBuf,
    name: String,
    /// Locked for as long as the store is open.
    _lock: File,
    tasks: Arc<Tasks>,
    healing: Arc<Healing>,
    catalog: OnceLock<Arc<Catalog>>,
    /// Where the partitions are of topics that are not deleted.
    places: Mutex<HashMap<PartitionKey, Arc<PartitionDir>>>,
    checkpoints: Checkpoints,
    /// Files written since they were last synced. One that is gone was deleted.
    dirty: Mutex<Vec<Weak<FileSegment>>>,
    /// Directories in which a file was made since they were last synced.
    dirty_dirs: Mutex<BTreeSet<PathBuf>>,
    /// One flush at a time: a second must not return before the files that the first took are synced.
    flushing: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for DirectoryHome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirectoryHome").field("path", &self.path).finish_non_exhaustive()
    }
}

impl DirectoryHome {
    /// Opens the store in `path`, or makes one when the directory is empty or absent.
    pub(crate) async fn open(
        path: PathBuf,
        tasks: Arc<Tasks>,
        health: Arc<Health>,
    ) -> Result<(Arc<Self>, Arc<Catalog>)> {
        let lock = blocking({
            let path = path.clone();
            move || claim(&path)
        })
        .await?;
        let checkpoints = Checkpoints::open(&path).await?;
        let home = Arc::new(Self {
            name: path.display().to_string(),
            path,
            _lock: lock,
            tasks: Arc::clone(&tasks),
            healing: Healing::new(None, Arc::clone(&tasks)),
            catalog: OnceLock::new(),
            places: Mutex::default(),
            checkpoints,
            dirty: Mutex::new(Vec::new()),
            dirty_dirs: Mutex::new(BTreeSet::new()),
            flushing: tokio::sync::Mutex::new(()),
        });
        let file = home.path.join(CATALOG);
        let fresh = home.path.join(CATALOG_FRESH);
        let exists = file.clone();
        let catalog = if blocking(move || Ok(exists.exists())).await? {
            Catalog::in_file(&file, tasks, health).await?
        } else {
            // Made under another name first, so that a half-made one is never taken for a catalog.
            let left = fresh.clone();
            blocking(move || remove_file(&left)).await?;
            Catalog::in_file(&fresh, Arc::clone(&tasks), Arc::clone(&health)).await?.close().await?;
            let (from, to, dir) = (fresh, file.clone(), home.path.clone());
            blocking(move || {
                at("rename", &from, fs::rename(&from, &to))?;
                sync_dir(&dir)
            })
            .await?;
            Catalog::in_file(&file, tasks, health).await?
        };
        let catalog = home.catalog.get_or_init(|| catalog).clone();
        home.clean_up(&catalog).await?;
        Ok((home, catalog))
    }

    /// Finishes deletions, and removes what creations left that never became true.
    async fn clean_up(&self, catalog: &Arc<Catalog>) -> Result<()> {
        let dying = catalog.records::<TopicRecord>(Table::Dying)?;
        let mut known = BTreeSet::new();
        for (_, record) in catalog.records::<TopicRecord>(Table::Topics)? {
            for partition in 0..record.partitions {
                known.insert(names::partition_dir(&self.path, &record.name, partition));
            }
        }
        let (root, gone) = (self.path.clone(), dying.clone());
        blocking(move || {
            for (_, record) in &gone {
                rename_away(&root, record, &known)?;
            }
            for (name, path) in entries(&root)? {
                if name.ends_with(names::DELETED) && path.is_dir() {
                    remove_dir(&path)?;
                } else if names::is_partition_dir(&name) && path.is_dir() && !known.contains(&path) {
                    remove_half_made(&path)?;
                }
            }
            sync_dir(&root)
        })
        .await?;
        if dying.is_empty() {
            return Ok(());
        }
        let mut change = Change::vital();
        for (key, _) in &dying {
            change.delete(Table::Dying, key);
        }
        catalog.submit(change).await
    }

    /// A partition has this directory, for as long as its topic exists.
    fn settle_in(&self, key: PartitionKey, topic: &str) -> Arc<PartitionDir> {
        let path = names::partition_dir(&self.path, topic, key.partition);
        let place = Arc::new(PartitionDir::new(path));
        self.places.lock().insert(key, Arc::clone(&place));
        place
    }

    /// Where a partition is.
    fn place_of(&self, id: &PartitionId) -> Arc<PartitionDir> {
        let known = self.places.lock().get(&id.key).cloned();
        // Of a topic that was deleted meanwhile.
        known.unwrap_or_else(|| {
            let path = names::deleted_dir(&self.path, &id.topic, id.key.topic, id.key.partition);
            Arc::new(PartitionDir::new(path))
        })
    }

    /// Renames the directories of a deleted topic, so that a new one may take its name. What still goes by a name in
    /// them follows.
    fn move_away(&self, record: &TopicRecord) -> Result<()> {
        let mut first = Ok(());
        for partition in 0..record.partitions {
            let key = PartitionKey { topic: record.id, partition };
            let from = names::partition_dir(&self.path, &record.name, partition);
            let to = names::deleted_dir(&self.path, &record.name, record.id, partition);
            let place = self.places.lock().remove(&key);
            let outcome = match place {
                Some(place) => place.rename(to),
                None => fs::rename(&from, to),
            };
            first = first.and(renamed(&from, outcome));
        }
        first.and(sync_dir(&self.path))
    }

    /// Takes note that a file was written.
    fn soil(&self, file: Weak<FileSegment>) {
        self.dirty.lock().push(file);
    }

    /// Takes note that a file appeared.
    fn soil_dir(&self, dir: &Path) {
        self.dirty_dirs.lock().insert(dir.to_owned());
    }

    async fn sync_all(&self) -> Result<()> {
        let _only = self.flushing.lock().await;
        let files = std::mem::take(&mut *self.dirty.lock());
        let dirs = std::mem::take(&mut *self.dirty_dirs.lock());
        let mut files = files.iter().filter_map(Weak::upgrade);
        loop {
            let some: Vec<_> =
                files.by_ref().take(SYNCS).map(|file| async move { file.sync().await }).collect();
            if some.is_empty() {
                break;
            }
            futures_util::future::try_join_all(some).await?;
        }
        if dirs.is_empty() {
            return Ok(());
        }
        blocking(move || dirs.iter().try_for_each(|dir| sync_dir_or_gone(dir))).await
    }
}

/// A directory that was deleted with its topic needs no sync.
fn sync_dir_or_gone(dir: &Path) -> Result<()> {
    match sync_dir(dir) {
        Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Makes sure that the directory is a data directory or may become one, and locks it.
fn claim(path: &Path) -> Result<File> {
    at("create", path, fs::create_dir_all(path))?;
    let entries = entries(path)?;
    let is_store = entries.iter().any(|(name, _)| name == CATALOG);
    if let Some((name, _)) = entries.iter().find(|(name, _)| !is_store && !BLANK.contains(&name.as_str())) {
        let (place, found) = (path.display().to_string(), format!("it contains {name} and no {CATALOG}"));
        return Err(Error::NotALogStore { place, found });
    }
    let file = path.join(LOCK);
    let lock = at("open", &file, File::options().create(true).truncate(false).write(true).open(&file))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse { path: path.to_owned() }),
        Err(errno) => at("lock", &file, Err(errno.into())),
    }
}

/// Renames the directories of a topic that was deleted before the start.
fn rename_away(root: &Path, record: &TopicRecord, keep: &BTreeSet<PathBuf>) -> Result<()> {
    for partition in 0..record.partitions {
        let from = names::partition_dir(root, &record.name, partition);
        let to = names::deleted_dir(root, &record.name, record.id, partition);
        // Once it has been renamed, whatever bears its old name is another topic's, perhaps one that was never made to the end.
        if keep.contains(&from) || at("look at", &to, to.try_exists())? {
            continue;
        }
        renamed(&from, fs::rename(&from, to))?;
    }
    sync_dir(root)
}

/// What came of renaming a directory; one that is gone is no failure.
fn renamed(from: &Path, outcome: io::Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => at("rename", from, outcome),
    }
}

/// Removes a partition's directory that belongs to no topic, unless it holds records: those are not ours to judge.
fn remove_half_made(path: &Path) -> Result<()> {
    let is_log = |name: &str| Path::new(name).extension().is_some_and(|extension| extension == "log");
    if entries(path)?.iter().any(|(name, _)| is_log(name)) {
        tracing::warn!("{} belongs to no topic of this store and is left alone", path.display());
        return Ok(());
    }
    remove_dir(path)
}

/// Says durably in a partition's directory whose it is.
fn write_metadata(dir: &Path, topic: Uuid) -> Result<()> {
    write_file(&dir.join("partition.metadata"), names::partition_metadata(topic).as_bytes())?;
    sync_dir(dir)
}

/// Makes the directory of a partition that exists, if it is missing.
fn make_anew(root: &Path, dir: &Path, id: &PartitionId) -> Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        outcome => {
            at("create", dir, outcome)?;
            tracing::error!("{} was missing and is made anew: what records it had are lost", dir.display());
            write_metadata(dir, id.key.topic)?;
            sync_dir(root)
        }
    }
}

/// Makes the directories of a topic, durably. What a creation left that failed makes way; and of one that fails nothing is
/// left.
fn make_dirs(root: &Path, record: &TopicRecord) -> Result<()> {
    let mut made = Vec::new();
    let mut create = |partition| {
        let dir = names::partition_dir(root, &record.name, partition);
        if dir.exists() {
            remove_half_made(&dir)?;
        }
        at("create", &dir, fs::create_dir(&dir))?;
        made.push(dir.clone());
        write_metadata(&dir, record.id)
    };
    let outcome = (0..record.partitions).try_for_each(&mut create).and_then(|()| sync_dir(root));
    if outcome.is_err() {
        for dir in &made {
            if let Err(error) = remove_dir(dir) {
                tracing::warn!("what a failed creation left is there until the next one: {error}");
            }
        }
    }
    outcome
}

impl Home for Arc<DirectoryHome> {
    fn name(&self) -> &str {
        &self.name
    }

    fn segments<'a>(&'a self, id: &'a PartitionId, swap: Option<Swap>) -> Io<'a, Vec<Found>> {
        let dir = self.settle_in(id.key, &id.topic);
        let (home, id) = (Arc::clone(self), id.clone());
        Box::pin(blocking(move || {
            make_anew(&home.path, &dir.path(), &id)?;
            segment::find(&home, &id, &dir, swap)
        }))
    }

    fn healing(&self) -> &Arc<Healing> {
        &self.healing
    }

    fn new_segment(&self, id: &PartitionId, base: i64) -> Arc<dyn SegmentBytes> {
        FileSegment::new(self, id, self.place_of(id), base)
    }

    fn cleaned_segment(&self, id: &PartitionId, base: i64, turn: u64) -> Arc<dyn SegmentBytes> {
        FileSegment::beside(self, id, self.place_of(id), base, turn)
    }

    fn space(&self) -> Result<Option<Space>> {
        Ok(None)
    }

    fn room_to_clean(&self) -> Io<'_, ()> {
        let (path, place) = (self.path.clone(), self.name.clone());
        Box::pin(blocking(move || {
            let free = free_space(&path)?;
            if free < KEPT_FREE {
                return Err(Error::NoSpace { place, free: 0, wanted: KEPT_FREE - free });
            }
            Ok(())
        }))
    }

    fn checkpoints(&self) -> Option<&Checkpoints> {
        Some(&self.checkpoints)
    }

    fn flush(&self) -> Io<'_, ()> {
        Box::pin(self.sync_all())
    }

    fn prepare_topic<'a>(&'a self, record: &'a TopicRecord) -> Io<'a, ()> {
        let (home, record) = (Arc::clone(self), record.clone());
        Box::pin(blocking(move || {
            make_dirs(&home.path, &record)?;
            for partition in 0..record.partitions {
                home.settle_in(PartitionKey { topic: record.id, partition }, &record.name);
            }
            Ok(())
        }))
    }

    fn forget_topic(&self, record: &TopicRecord, change: &mut Change) {
        change.put(Table::Dying, record.id.as_bytes(), record);
    }

    fn topic_forgotten<'a>(&'a self, record: &'a TopicRecord) -> Io<'a, ()> {
        let (home, record) = (Arc::clone(self), record.clone());
        Box::pin(blocking(move || home.move_away(&record)))
    }

    fn remove_topic<'a>(&'a self, record: &'a TopicRecord) -> Io<'a, ()> {
        Box::pin(async move {
            let (root, gone) = (self.path.clone(), record.clone());
            blocking(move || {
                (0..gone.partitions)
                    .map(|partition| names::deleted_dir(&root, &gone.name, gone.id, partition))
                    .try_for_each(|dir| remove_dir(&dir))
            })
            .await?;
            let Some(catalog) = self.catalog.get() else { return Ok(()) };
            let mut change = Change::vital();
            change.delete(Table::Dying, record.id.as_bytes());
            catalog.submit(change).await
        })
    }

    fn note_epochs<'a>(&'a self, id: &'a PartitionId, epochs: &'a Epochs) -> Io<'a, ()> {
        let dir = names::partition_dir(&self.path, &id.topic, id.key.partition);
        let text = epochs.checkpoint();
        Box::pin(blocking(move || replace(&dir.join("leader-epoch-checkpoint"), text.as_bytes())))
    }
}
