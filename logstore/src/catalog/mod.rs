//! The catalog: what topics there are and where their bytes lie, in an embedded ACID database (redb).
//!
//! A [`Change`] is a list of puts and deletes; it happens wholly or not at all. [`Catalog::submit`] queues one and
//! returns at once; the order of submission is the order of effect. One task, which lives only while there is work,
//! takes all that is queued, commits it as one transaction, and makes it durable: however many partitions ask, a
//! commit costs two flushes. A change counts as done only then.
//!
//! Commits are two-phase: all pages are flushed before the header that makes them current is written. On a volume the
//! first of the two flushes also covers whatever was written to the *volume* before the change was submitted, so a
//! record never becomes durable before the zeroes, index bytes or batches that it speaks of.
//!
//! In memory on a volume (see [`region`]), in a file of the data directory otherwise. A commit that fails poisons the
//! store. A change that would overfill the region is refused before it is tried, and harms nothing; one that leaves less in it
//! than before never is.
//!
//! In a file, what would grow it is refused while less than [`FILE_RESERVE`] is free on its file system: a commit that runs
//! out of room half-way would be a failed one. Changes that free space, or are needed to stop in order, are tried all the
//! same, in blocks that the file has already: they are allocated as far as it reaches.

pub(crate) mod records;
pub(crate) mod region;

use crate::directory::{at, blocking, free_space};
use crate::error::{Error, Result};
use crate::health::Health;
use crate::inspect::{Finding, Severity};
use crate::tasks::Tasks;
use crate::volume::copies::Versions;
use crate::volume::layout::Layout;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use raid::device::{Device, Durability};
use records::Table;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableHandle};
use region::Recorded;
use rustix::fs::FallocateFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::fs::File;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::sync::oneshot;

/// Memory for the database's own page cache: on a volume its file is in memory anyway, and the catalog is read once.
const CACHE: usize = 512 * 1024;
/// The database fills its pages by half at worst, and keeps the pages of the commit before: content may use this part
/// of the region before growth is refused …
const FILL: u64 = 4;
/// … this part before even changes that are needed to free space are …
const VITAL_FILL: u64 = 3;
/// … and this one, as (numerator, denominator), for what a store owes itself. What lies between is never taken by anything that
/// adds records: a recovery or a stop replaces one record of a partition, of 150 bytes at least, by one that is larger by
/// a few digits, or else the change is made smaller (see [`Change::owed`]).
const OWED_FILL: (u64, u64) = (2, 5);

/// Bytes of the file system that changes leave free which are not needed to free space.
const FILE_RESERVE: u64 = 1 << 20;

type Definition = TableDefinition<'static, &'static [u8], &'static [u8]>;
type Row = (Vec<u8>, Vec<u8>);

impl Table {
    const ALL: [Self; 6] =
        [Self::Meta, Self::Topics, Self::Partitions, Self::Segments, Self::Blobs, Self::Dying];

    fn definition(self) -> Definition {
        TableDefinition::new(match self {
            Self::Meta => "meta",
            Self::Topics => "topics",
            Self::Partitions => "partitions",
            Self::Segments => "segments",
            Self::Blobs => "blobs",
            Self::Dying => "dying",
        })
    }
}

/// Puts and deletes that happen together.
#[derive(Debug, Default)]
pub(crate) struct Change {
    ops: Vec<(Table, Vec<u8>, Option<Vec<u8>>)>,
    rank: Rank,
}

/// How much of the region a change may use.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Rank {
    #[default]
    Ordinary,
    Vital,
    Owed,
}

impl Change {
    /// A change that is refused when the region is full.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A change that frees space: it may use the reserve.
    pub(crate) fn vital() -> Self {
        Self { rank: Rank::Vital, ..Self::default() }
    }

    /// A change without which a store could not be opened, or stopped in order: it may use what is left behind the reserve,
    /// which nothing else takes. It replaces records, and whoever makes it has a smaller one for the case that it is refused.
    pub(crate) fn owed() -> Self {
        Self { rank: Rank::Owed, ..Self::default() }
    }

    pub(crate) fn put(&mut self, table: Table, key: &[u8], record: &impl Serialize) {
        // Records are plain structs with string keys: encoding them cannot fail.
        let value = serde_json::to_vec(record).expect("catalog records encode as JSON");
        self.put_bytes(table, key, value);
    }

    pub(crate) fn put_bytes(&mut self, table: Table, key: &[u8], value: Vec<u8>) {
        self.ops.push((table, key.to_vec(), Some(value)));
    }

    pub(crate) fn delete(&mut self, table: Table, key: &[u8]) {
        self.ops.push((table, key.to_vec(), None));
    }

    /// Adds what another change does.
    pub(crate) fn join(&mut self, other: Self) {
        self.ops.extend(other.ops);
    }

    fn growth(&self) -> u64 {
        let size = |(_, key, value): &(_, Vec<u8>, Option<Vec<u8>>)| {
            value.as_ref().map_or(0, |value| (key.len() + value.len()) as u64)
        };
        self.ops.iter().map(size).sum()
    }
}

/// A change on its way; completes when it is durable.
#[derive(Debug)]
pub(crate) struct Pending(oneshot::Receiver<Result<()>>);

impl Future for Pending {
    type Output = Result<()>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.0).poll(context).map(|outcome| outcome.unwrap_or(Err(Error::Interrupted)))
    }
}

/// Where the database's bytes go.
enum Backing {
    Region {
        memory: Recorded,
        device: Arc<dyn Device>,
        layout: Mutex<Layout>,
        /// As it was found.
        was_left_open: bool,
    },
    File(Arc<Blocks>),
}

/// The blocks of the database's file.
struct Blocks {
    path: PathBuf,
    /// Held as long as the database is: some file locks go with the first handle that is closed.
    file: File,
    /// Up to here the file system has been asked for them.
    allocated: AtomicU64,
}

impl Blocks {
    /// Asks for blocks up to the file's end. A file system that has none, or knows no such thing, changes nothing: what is
    /// written may then find no room.
    fn allocate(&self) -> Result<()> {
        let len = at("look at", &self.path, self.file.metadata())?.len();
        if len > self.allocated.swap(len, Ordering::AcqRel)
            && let Err(errno) = rustix::fs::fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, len)
        {
            tracing::debug!("no blocks are kept for {}: {errno}", self.path.display());
        }
        Ok(())
    }
}

struct Queue {
    changes: Vec<(Change, oneshot::Sender<Result<()>>)>,
    running: bool,
}

/// The catalog, open.
pub(crate) struct Catalog {
    place: String,
    database: RwLock<Option<Database>>,
    backing: Backing,
    /// Bytes of keys and values.
    content: Mutex<u64>,
    queue: Mutex<Queue>,
    tasks: Arc<Tasks>,
    health: Arc<Health>,
}

impl std::fmt::Debug for Catalog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalog").field("place", &self.place).finish_non_exhaustive()
    }
}

fn failed(place: &str, error: impl std::fmt::Display) -> Error {
    Error::Catalog { place: place.to_owned(), reason: error.to_string() }
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE);
    builder
}

/// Does something with a database. What damaged pages can make it do, even a panic, ends here as an error. The database
/// itself stays outside of `work`: it must not be dropped while a panic unwinds.
fn guarded<T, E: std::fmt::Display>(
    place: &str,
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> Result<T> {
    match std::panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome.map_err(|error| failed(place, error)),
        Err(_) => Err(failed(place, "its pages are damaged beyond what the database can read")),
    }
}

/// Closes a database, which writes to it.
fn let_go(place: &str, database: Database) -> Result<()> {
    guarded(place, || {
        drop(database);
        Ok::<(), Error>(())
    })
}

/// All rows of a table; none where there is no such table.
fn read_rows(database: &Database, table: Table) -> std::result::Result<Vec<Row>, redb::Error> {
    let table = match database.begin_read()?.open_table(table.definition()) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        outcome => outcome?,
    };
    let mut rows = Vec::new();
    for row in table.iter()? {
        let (key, value) = row?;
        rows.push((key.value().to_vec(), value.value().to_vec()));
    }
    Ok(rows)
}

/// All rows of a catalog, read once; see [`read_tables`].
pub(crate) struct Tables(Vec<(Table, Vec<Row>)>);

impl Tables {
    /// The rows of a table, by key.
    pub(crate) fn rows(&self, table: Table) -> &[Row] {
        self.0.iter().find(|(held, _)| *held == table).map_or(&[], |(_, rows)| rows)
    }

    /// The value of a key.
    pub(crate) fn get(&self, table: Table, key: &[u8]) -> Option<&[u8]> {
        let rows = self.rows(table);
        let at = rows.binary_search_by(|(held, _)| held.as_slice().cmp(key)).ok()?;
        Some(&rows[at].1)
    }
}

/// Reads a catalog from a copy of its bytes; what the database repairs, it repairs in the copy. Where pages are damaged,
/// what can be read is, and a finding says what cannot.
pub(crate) fn read_tables(place: &str, content: &[u8], findings: &mut Vec<Finding>) -> Result<Tables> {
    // Room for what opening writes.
    let capacity = content.len() as u64 * 2 + (64 << 20);
    let open = |check: bool| {
        let memory = Recorded::load(content, capacity);
        guarded(place, || builder().set_check_integrity_on_open(check).create_with_backend(memory))
    };
    let mut damaged = |what: String| findings.push(Finding::of_store(Severity::Fault, what));
    if content.is_empty() {
        return Ok(Tables(Vec::new()));
    }
    let database = match open(true) {
        Ok(database) => database,
        Err(error) => {
            let database = open(false).map_err(|_| error.clone())?;
            damaged(format!("{error}; what can still be read of it is used"));
            database
        }
    };
    let mut tables = Vec::new();
    for table in Table::ALL {
        match std::panic::catch_unwind(AssertUnwindSafe(|| read_rows(&database, table))) {
            Ok(Ok(rows)) => tables.push((table, rows)),
            Ok(Err(error)) => damaged(format!("the catalog's table {table:?} cannot be read: {error}")),
            Err(_) => damaged(format!("the catalog's table {table:?} cannot be read: its pages are damaged")),
        }
    }
    if let Err(error) = let_go(place, database) {
        damaged(error.to_string());
    }
    Ok(Tables(tables))
}

/// The content of a catalog, of which copies may differ: the newest one that the database takes. `None` where they do
/// and it takes none.
pub(crate) fn choose(place: &str, versions: &Versions, capacity: u64) -> Option<Bytes> {
    versions.agreed().or_else(|| {
        versions.best(|content| {
            let memory = Recorded::load(content, capacity);
            let open = || builder().set_check_integrity_on_open(true).create_with_backend(memory);
            // What it repairs or writes as it is closed, it does in a copy.
            let checked = guarded(place, open).and_then(|database| let_go(place, database));
            checked.ok().map(|()| newest_commit(content))
        })
    })
}

/// The number of the commit that a sound database speaks for. Two copies of it can both be sound, and one of them old: which
/// of its two commits counts is told by one bit that has no checksum (redb, `docs/design.md`: a byte of flags at 9, whose
/// lowest bit names the slot; slots of 128 bytes from 64 on, each with its commit's number at 104).
fn newest_commit(content: &[u8]) -> u64 {
    let slot = 64 + 128 * usize::from(content.get(9).is_some_and(|flags| flags & 1 != 0));
    let number = content.get(slot + 104..slot + 112).and_then(|bytes| bytes.try_into().ok());
    number.map_or(0, u64::from_le_bytes)
}

/// Whether a database was not closed in order (redb: bit 1 of the flags).
fn is_left_open(content: &[u8]) -> bool {
    content.get(9).is_some_and(|flags| flags & 2 != 0)
}

impl Catalog {
    /// Whether it was not closed in order, the last time that it was open; never known of one in a file.
    pub(crate) fn was_left_open(&self) -> bool {
        matches!(self.backing, Backing::Region { was_left_open: true, .. })
    }

    /// Opens the catalog on a volume, or makes it when `layout` says that nothing is there.
    pub(crate) async fn on_volume(
        device: Arc<dyn Device>,
        layout: Layout,
        tasks: Arc<Tasks>,
        health: Arc<Health>,
    ) -> Result<Arc<Self>> {
        let place = device.name().to_owned();
        // Where nothing is yet, an interrupted making may have left bytes: the region is never taken for zeroes.
        let versions = Versions::read(&device, layout.catalog.at, layout.catalog_len).await?;
        let content = match choose(&place, &versions, layout.catalog.len) {
            Some(good) => {
                versions.mend(&device, &good, "the catalog").await?;
                good
            }
            // The database says what is wrong with it.
            None => versions.any(),
        };
        let memory = Recorded::load(&content, layout.catalog.len);
        let backend = memory.clone();
        // All of it is in memory: checking every page's checksum costs little, and no damaged page is met later.
        let database =
            guarded(&place, || builder().set_check_integrity_on_open(true).create_with_backend(backend))?;
        let was_left_open = is_left_open(&content);
        let backing = Backing::Region { memory, device, layout: Mutex::new(layout), was_left_open };
        let catalog = Self::assemble(place, database, backing, tasks, health)?;
        catalog.replay().await?;
        Ok(catalog)
    }

    /// Opens or makes the catalog in a file. The caller has made sure that `path` is what it should be.
    pub(crate) async fn in_file(path: &Path, tasks: Arc<Tasks>, health: Arc<Health>) -> Result<Arc<Self>> {
        let (place, path) = (path.display().to_string(), path.to_owned());
        blocking(move || {
            // It is read whole anyway; a damaged page that is met later would end in a panic.
            let database = guarded(&place, || builder().set_check_integrity_on_open(true).create(&path))?;
            let file = match at("open", &path, File::options().read(true).write(true).open(&path)) {
                Ok(file) => file,
                Err(error) => {
                    let_go(&place, database)?;
                    return Err(error);
                }
            };
            let blocks = Arc::new(Blocks { path, file, allocated: AtomicU64::new(0) });
            let catalog = Self::assemble(place, database, Backing::File(Arc::clone(&blocks)), tasks, health)?;
            blocks.allocate()?;
            Ok(catalog)
        })
        .await
    }

    fn assemble(
        place: String,
        database: Database,
        backing: Backing,
        tasks: Arc<Tasks>,
        health: Arc<Health>,
    ) -> Result<Arc<Self>> {
        let made = guarded(&place, || -> std::result::Result<(), redb::Error> {
            let transaction = database.begin_write()?;
            for table in Table::ALL {
                transaction.open_table(table.definition())?;
            }
            Ok(transaction.commit()?)
        });
        if let Err(error) = made {
            let_go(&place, database)?;
            return Err(error);
        }
        let catalog = Self {
            place,
            database: RwLock::new(Some(database)),
            backing,
            content: Mutex::new(0),
            queue: Mutex::new(Queue { changes: Vec::new(), running: false }),
            tasks,
            health,
        };
        let mut content = 0;
        for table in Table::ALL {
            content +=
                catalog.rows(table)?.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum::<u64>();
        }
        *catalog.content.lock() = content;
        Ok(Arc::new(catalog))
    }

    fn rows(&self, table: Table) -> Result<Vec<Row>> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(Error::Closed)?;
        guarded(&self.place, || read_rows(database, table))
    }

    /// All records of a table, by key.
    pub(crate) fn records<T: DeserializeOwned>(&self, table: Table) -> Result<Vec<(Vec<u8>, T)>> {
        let rows = self.rows(table)?;
        rows.into_iter().map(|(key, value)| self.parse(table, &value).map(|record| (key, record))).collect()
    }

    /// The bytes of a record.
    pub(crate) fn bytes(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(Error::Closed)?;
        let read = || -> std::result::Result<Option<Vec<u8>>, redb::Error> {
            let table = database.begin_read()?.open_table(table.definition())?;
            Ok(table.get(key)?.map(|value| value.value().to_vec()))
        };
        guarded(&self.place, read)
    }

    /// A record.
    pub(crate) fn record<T: DeserializeOwned>(&self, table: Table, key: &[u8]) -> Result<Option<T>> {
        self.bytes(table, key)?.map(|value| self.parse(table, &value)).transpose()
    }

    fn parse<T: DeserializeOwned>(&self, table: Table, value: &[u8]) -> Result<T> {
        serde_json::from_slice(value).map_err(|error| self.damaged(format!("a record of {table:?}: {error}")))
    }

    /// An error that names this catalog.
    pub(crate) fn damaged(&self, what: String) -> Error {
        Error::DamagedCatalog { place: self.place.clone(), what }
    }

    /// Queues a change behind those before it.
    pub(crate) fn submit(self: &Arc<Self>, change: Change) -> Pending {
        let (done, pending) = oneshot::channel();
        let mut queue = self.queue.lock();
        queue.changes.push((change, done));
        if !std::mem::replace(&mut queue.running, true) {
            drop(queue);
            let catalog = Arc::clone(self);
            self.tasks.spawn(Box::pin(async move { catalog.work().await }));
        }
        Pending(pending)
    }

    /// Commits what is queued until nothing is.
    async fn work(self: Arc<Self>) {
        loop {
            let changes = {
                let mut queue = self.queue.lock();
                queue.running = !queue.changes.is_empty();
                std::mem::take(&mut queue.changes)
            };
            if changes.is_empty() {
                return;
            }
            self.commit_all(changes).await;
        }
    }

    async fn commit_all(self: &Arc<Self>, changes: Vec<(Change, oneshot::Sender<Result<()>>)>) {
        let mut batch = Change::new();
        let mut waiting = Vec::with_capacity(changes.len());
        let room = self.room(&changes).await;
        for (change, done) in changes {
            let room = if change.rank == Rank::Ordinary { room.clone() } else { Ok(()) };
            match self.health.check().and(room).and_then(|()| self.fits(&change, batch.growth())) {
                Ok(()) => {
                    batch.join(change);
                    waiting.push(done);
                }
                // The asker may have gone; nothing is owed to it then.
                Err(refused) => drop(done.send(Err(refused))),
            }
        }
        let outcome = if waiting.is_empty() { Ok(()) } else { self.commit(batch).await };
        if let Err(cause) = &outcome {
            self.health.fail(cause);
        }
        for done in waiting {
            drop(done.send(outcome.clone()));
        }
    }

    /// Whether the file system has room for changes that are not vital, if there are any.
    async fn room(&self, changes: &[(Change, oneshot::Sender<Result<()>>)]) -> Result<()> {
        let Backing::File(blocks) = &self.backing else { return Ok(()) };
        if changes.iter().all(|(change, _)| change.rank != Rank::Ordinary) {
            return Ok(());
        }
        let path = blocks.path.clone();
        let free = blocking(move || free_space(&path)).await?;
        if free < FILE_RESERVE {
            let (place, wanted) = (self.place.clone(), FILE_RESERVE - free);
            return Err(Error::NoSpace { place, free: 0, wanted });
        }
        Ok(())
    }

    fn fits(&self, change: &Change, queued: u64) -> Result<()> {
        let Backing::Region { layout, .. } = &self.backing else { return Ok(()) };
        let capacity = layout.lock().catalog.len;
        let part = match change.rank {
            Rank::Ordinary => capacity / FILL,
            Rank::Vital => capacity / VITAL_FILL,
            Rank::Owed => capacity / OWED_FILL.1 * OWED_FILL.0,
        };
        let growth = change.growth();
        let would_be = *self.content.lock() + queued + growth;
        // What is replaced and removed is looked up only where it matters.
        if growth > 0 && would_be > part && self.replaced(change)? < growth {
            return Err(Error::CatalogFull { place: self.place.clone(), capacity });
        }
        Ok(())
    }

    /// Bytes of keys and values that a change replaces or removes.
    fn replaced(&self, change: &Change) -> Result<u64> {
        let mut seen = HashSet::new();
        let mut bytes = 0;
        for (table, key, _) in &change.ops {
            if seen.insert((table.definition().name().to_owned(), key))
                && let Some(value) = self.bytes(*table, key)?
            {
                bytes += (key.len() + value.len()) as u64;
            }
        }
        Ok(bytes)
    }

    async fn commit(self: &Arc<Self>, change: Change) -> Result<()> {
        match &self.backing {
            Backing::Region { .. } => {
                self.commit_to_database(&change)?;
                self.replay().await
            }
            Backing::File(blocks) => {
                let (catalog, blocks) = (Arc::clone(self), Arc::clone(blocks));
                blocking(move || {
                    catalog.commit_to_database(&change)?;
                    blocks.allocate()
                })
                .await
            }
        }
    }

    fn commit_to_database(&self, change: &Change) -> Result<()> {
        let database = self.database.read();
        let database = database.as_ref().ok_or(Error::Closed)?;
        let write = || -> std::result::Result<i64, redb::Error> {
            let mut transaction = database.begin_write()?;
            transaction.set_two_phase_commit(true);
            let mut grown = 0;
            for (table, key, value) in &change.ops {
                let mut table = transaction.open_table(table.definition())?;
                let size = |value: &[u8]| (key.len() + value.len()) as i64;
                let before = match value {
                    Some(value) => {
                        grown += size(value);
                        table.insert(key.as_slice(), value.as_slice())?
                    }
                    None => table.remove(key.as_slice())?,
                };
                grown -= before.map_or(0, |before| size(before.value()));
            }
            transaction.commit()?;
            Ok(grown)
        };
        let grown = guarded(&self.place, write)?;
        let mut content = self.content.lock();
        *content = content.saturating_add_signed(grown);
        Ok(())
    }

    /// Writes the recorded steps to the region, in order. Only one task is ever here: `work`, or open and close.
    ///
    /// The making of a catalog takes several steps, and what lies between them is no database: its length becomes
    /// known to the header when all of them are durable. A power cut before leaves a catalog that is not made yet.
    async fn replay(&self) -> Result<()> {
        let Backing::Region { memory, device, layout, .. } = &self.backing else { return Ok(()) };
        let mut now = *layout.lock();
        let being_made = now.catalog_len == 0;
        let mut made = 0;
        while let Some(step) = memory.next_step() {
            let start = now.catalog.at;
            let mut writes: Vec<_> = step
                .runs
                .into_iter()
                .map(|(at, bytes)| device.write(start + at, bytes, Durability::Cached))
                .collect();
            if !being_made && step.len != now.catalog_len {
                now.generation += 1;
                now.catalog_len = step.len;
                writes.push(device.write(now.copy_at(), now.encode(), Durability::Cached));
            }
            futures_util::future::try_join_all(writes).await?;
            device.flush().await?;
            *layout.lock() = now;
            made = step.len;
        }
        if being_made && made > 0 {
            // Both copies: if one went on saying that there is no catalog, damage to the other would have it made anew.
            for _ in 0..2 {
                now.generation += 1;
                now.catalog_len = made;
                device.write(now.copy_at(), now.encode(), Durability::Cached).await?;
                device.flush().await?;
                *layout.lock() = now;
            }
        }
        Ok(())
    }

    /// Closes the database in order, so that the next open need not walk it. Nothing may be queued any more.
    pub(crate) async fn close(self: &Arc<Self>) -> Result<()> {
        match &self.backing {
            Backing::Region { .. } => {
                self.shut()?;
                self.replay().await
            }
            Backing::File(_) => {
                let catalog = Arc::clone(self);
                blocking(move || catalog.shut()).await
            }
        }
    }

    fn shut(&self) -> Result<()> {
        match self.database.write().take() {
            Some(database) => guarded(&self.place, || database.close()),
            None => Ok(()),
        }
    }
}

impl Drop for Catalog {
    /// One that was not closed in order: its database is let go of all the same, whatever its pages hold.
    fn drop(&mut self) {
        if let Some(database) = self.database.get_mut().take()
            && let Err(error) = let_go(&self.place, database)
        {
            tracing::warn!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use raid::device::{FileDevice, OpenMode};
    use raid::runtime::TokioRuntime;

    /// Fills the region with changes of a kind until one is refused; returns how many were taken.
    async fn fill(catalog: &Arc<Catalog>, from: u32, vital: bool) -> u32 {
        for number in from.. {
            let mut change = if vital { Change::vital() } else { Change::new() };
            change.put_bytes(Table::Segments, &number.to_be_bytes(), vec![7; 2000]);
            match catalog.submit(change).await {
                Ok(()) => {}
                Err(Error::CatalogFull { .. }) => return number,
                Err(error) => panic!("{error}"),
            }
        }
        unreachable!("a region has an end")
    }

    #[tokio::test]
    async fn a_full_region_takes_what_leaves_less_in_it() {
        let (dir, size) = (tempfile::tempdir().unwrap(), 8 << 20);
        let path = dir.path().join("volume");
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        let device: Arc<dyn Device> = Arc::new(FileDevice::open(&path, OpenMode::ReadWrite).unwrap());
        let tasks = Tasks::new(Arc::new(TokioRuntime::current()));
        let layout = Layout::plan(size, 2 << 20, 0, uuid::Uuid::from_u128(1)).unwrap();
        let catalog = Catalog::on_volume(device, layout, tasks, Arc::default()).await.unwrap();
        let some = fill(&catalog, 0, false).await;
        let all = fill(&catalog, some, true).await;
        assert!(some > 100 && all > some + 20, "{some} {all}");
        // A record that grows by as much as another that goes had; one that is replaced by a smaller one.
        for vital in [true, false] {
            let change = || if vital { Change::vital() } else { Change::new() };
            let mut swap = change();
            swap.put_bytes(Table::Segments, &u32::from(vital).to_be_bytes(), vec![8; 3900]);
            swap.delete(Table::Segments, &(2 + u32::from(vital)).to_be_bytes());
            catalog.submit(swap).await.unwrap();
            let mut less = change();
            less.put_bytes(Table::Segments, &(4 + u32::from(vital)).to_be_bytes(), vec![9; 1000]);
            catalog.submit(less).await.unwrap();
            // Growth is refused still, by whichever it is.
            let mut more = change();
            more.put_bytes(Table::Segments, &6u32.to_be_bytes(), vec![9; 9000]);
            assert!(matches!(catalog.submit(more).await, Err(Error::CatalogFull { .. })));
        }
        for number in 7..all {
            let mut change = Change::vital();
            change.delete(Table::Segments, &number.to_be_bytes());
            catalog.submit(change).await.unwrap();
        }
        assert!(fill(&catalog, all, false).await > all + 100);
    }
}
