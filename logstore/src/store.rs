//! The store: topics on one home, and the life of the whole.
//!
//! **Open**: the catalog is read whole (its size is that of the metadata, not of the data); partitions that were closed
//! in order are taken at their word, the others are recovered. What recovery exposes is flushed, once for all, and
//! their new records are committed, before anything is served.
//!
//! **Close**: no new change starts, running ones end, then each partition that was appended to is sealed.
//!
//! Topics are made and deleted one at a time, each by one commit of the catalog, and to the end even if whoever asked goes
//! away half-way: what the catalog says is what memory says.

use crate::catalog::records::{FORMAT, PartitionKey, PartitionRecord, Table, TopicRecord};
use crate::catalog::{Catalog, Change};
use crate::checkpoints::{self, Checkpoint};
use crate::cleaner::{Cleaner, CleanerOptions, Ground};
use crate::commit::Committer;
use crate::config::TopicConfig;
use crate::context::Context;
use crate::directory::DirectoryHome;
use crate::error::{Error, Result};
use crate::graveyard::Graveyard;
use crate::heal::HealingCounts;
use crate::health::Health;
use crate::home::{self, PartitionId, Space};
use crate::ids;
use crate::partition::Partition;
use crate::partition::compact::is_local;
use crate::partition::recovery::{self, Opened};
use crate::scrub::{Scrub, ScrubOptions};
use crate::segment::IndexCache;
use crate::tasks::Tasks;
use crate::volume::VolumeHome;
use futures_util::{StreamExt, TryStreamExt, stream};
use parking_lot::RwLock;
use raid::device::Device;
use raid::runtime::Runtime;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use uuid::Uuid;

/// Most partitions of one topic.
const MOST_PARTITIONS: u32 = 100_000;
/// Partitions opened, or closed, at the same time.
const CONCURRENCY: usize = 32;
/// Records of partitions that are put into the catalog at once when a store is opened: so many more pages are held twice.
const RECORDS_AT_ONCE: usize = 64;
/// Producer ids taken from the catalog at once, as Kafka's controller does.
const PRODUCER_BLOCK: i64 = 1000;
/// Memory for indexes of closed segments, in bytes.
const INDEX_BUDGET: usize = 8 << 20;

/// Where a store lives.
pub enum Home {
    /// On a block device of its own, usually a RAID volume.
    Volume(Arc<dyn Device>),
    /// In a directory, as Kafka-named files.
    Directory(PathBuf),
}

/// How a store is run.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// What topics get that do not set a key themselves.
    pub topic_defaults: TopicConfig,
    /// How long an idle producer's sequence numbers are remembered (Kafka's `producer.id.expiration.ms`).
    pub producer_expiration: Duration,
    /// How long the first commit of a group waits for others before its flush starts. Zero: only while another flush
    /// runs.
    pub commit_linger: Duration,
    /// For how long the check of a batch's checksum counts; until then it is read without. [`Duration::ZERO`]: each read
    /// checks. [`Duration::MAX`]: as long as the store is open and nothing bad was found.
    pub verify_interval: Duration,
    /// How the logs are scrubbed.
    pub scrub: ScrubOptions,
    /// What compaction may take.
    pub cleaner: CleanerOptions,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            topic_defaults: TopicConfig::kafka_defaults(),
            producer_expiration: Duration::from_secs(24 * 60 * 60),
            commit_linger: Duration::ZERO,
            verify_interval: Duration::MAX,
            scrub: ScrubOptions::default(),
            cleaner: CleanerOptions::default(),
        }
    }
}

/// A topic: a name, an id, a configuration and partitions.
#[derive(Debug)]
pub struct Topic {
    name: Arc<str>,
    id: Uuid,
    config: RwLock<Arc<TopicConfig>>,
    partitions: Vec<Arc<Partition>>,
}

impl Topic {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its id; never zero, never used again.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> Arc<TopicConfig> {
        Arc::clone(&self.config.read())
    }

    /// Its partitions, by number.
    #[must_use]
    pub fn partitions(&self) -> &[Arc<Partition>] {
        &self.partitions
    }

    /// A partition by number.
    #[must_use]
    pub fn partition(&self, index: i32) -> Option<&Arc<Partition>> {
        self.partitions.get(usize::try_from(index).ok()?)
    }

    fn record(&self, config: &TopicConfig) -> TopicRecord {
        TopicRecord {
            name: self.name.to_string(),
            id: self.id,
            partitions: self.partitions.len() as u32,
            config: config.overrides().clone(),
        }
    }
}

#[derive(Debug, Default)]
struct Topics {
    by_name: BTreeMap<Arc<str>, Arc<Topic>>,
    by_id: BTreeMap<Uuid, Arc<Topic>>,
}

impl Topics {
    fn insert(&mut self, topic: &Arc<Topic>) {
        self.by_name.insert(Arc::clone(&topic.name), Arc::clone(topic));
        self.by_id.insert(topic.id, Arc::clone(topic));
    }

    fn remove(&mut self, topic: &Topic) {
        self.by_name.remove(&topic.name);
        self.by_id.remove(&topic.id);
    }
}

/// Producer ids that the catalog knows as given out already.
#[derive(Debug)]
struct ProducerIds {
    next: i64,
    end: i64,
}

/// Topics on one home.
#[derive(Debug)]
pub struct Store {
    pub(crate) context: Arc<Context>,
    pub(crate) scrub: Scrub,
    cluster_id: String,
    defaults: TopicConfig,
    topics: Arc<RwLock<Topics>>,
    /// One topic is made, changed or deleted at a time.
    admin: Arc<tokio::sync::Mutex<()>>,
    producer_ids: tokio::sync::Mutex<ProducerIds>,
    cleaner: Cleaner,
}

impl Store {
    /// Opens the store at `home`; formats an all-zero volume or an empty directory, and refuses anything else that
    /// is not a log store.
    pub async fn open(home: Home, options: StoreOptions, runtime: Arc<dyn Runtime>) -> Result<Arc<Self>> {
        let health = Arc::new(Health::default());
        let tasks = Tasks::new(runtime);
        let (home, catalog): (Arc<dyn home::Home>, _) = match home {
            Home::Volume(device) => {
                let (home, catalog) =
                    VolumeHome::open(device, Arc::clone(&tasks), Arc::clone(&health)).await?;
                (Arc::new(home), catalog)
            }
            Home::Directory(path) => {
                let (home, catalog) =
                    DirectoryHome::open(path, Arc::clone(&tasks), Arc::clone(&health)).await?;
                (Arc::new(home), catalog)
            }
        };
        let interval = u64::try_from(options.verify_interval.as_millis()).unwrap_or(u64::MAX);
        home.healing().set_interval(interval);
        let cluster_id = identity(&catalog, &tasks, home.name()).await?;
        let next = catalog.record::<i64>(Table::Meta, b"next_producer_id")?.unwrap_or(0);
        let context = Arc::new(Context {
            committer: Committer::new(
                Arc::clone(&home),
                Arc::clone(&tasks),
                Arc::clone(&health),
                options.commit_linger,
            ),
            graveyard: Graveyard::new(Arc::clone(&home), Arc::clone(&tasks)),
            home,
            catalog,
            tasks,
            health,
            indexes: IndexCache::new(INDEX_BUDGET),
            producer_expiration: options.producer_expiration,
            closing: AtomicBool::new(false),
        });
        let store = Self {
            context,
            scrub: Scrub::new(options.scrub),
            cluster_id,
            defaults: options.topic_defaults.as_defaults(),
            topics: Arc::default(),
            admin: Arc::default(),
            producer_ids: tokio::sync::Mutex::new(ProducerIds { next, end: next }),
            cleaner: Cleaner::new(options.cleaner),
        };
        store.open_topics().await?;
        store.context.home.opened()?;
        write_checkpoints(&store.context, &store.topics).await;
        Ok(Arc::new(store))
    }

    async fn open_topics(&self) -> Result<()> {
        let catalog = &self.context.catalog;
        let mut records: HashMap<PartitionKey, PartitionRecord> = HashMap::new();
        for (key, record) in catalog.records(Table::Partitions)? {
            let key = PartitionKey::read(&key)
                .ok_or_else(|| catalog.damaged("a partition's key is not one".to_owned()))?;
            records.insert(key, record);
        }
        let mut opened = Vec::new();
        for (_, record) in catalog.records::<TopicRecord>(Table::Topics)? {
            opened.extend(self.open_topic(&record, &mut records).await?);
        }
        if !opened.iter().any(|opened| opened.scanned) {
            return Ok(());
        }
        // What was scanned and what was cut off: durable first, then vouched for.
        self.context.home.flush().await?;
        let recovered: Vec<_> = opened.iter().filter(|opened| opened.recovered).collect();
        if recovered.is_empty() {
            return Ok(());
        }
        // Each partition by itself: a power cut between leaves the others to be recovered once more.
        for some in recovered.chunks(RECORDS_AT_ONCE) {
            let put = |some: &[&Opened]| {
                let mut change = Change::owed();
                for opened in some {
                    opened.partition.put_record(&mut change);
                }
                catalog.submit(change)
            };
            match put(some).await {
                Err(Error::CatalogFull { .. }) => {
                    // A store that is full to the brim opens all the same: of the epochs the last is enough.
                    for opened in some {
                        opened.partition.forget_epochs();
                    }
                    put(some).await?;
                }
                outcome => outcome?,
            }
        }
        for Opened { partition, unsealed, .. } in opened.into_iter().filter(|opened| opened.recovered) {
            partition.note_epochs().await?;
            for (segment, snapshot) in unsealed {
                partition.enqueue_seal(segment, snapshot);
            }
        }
        Ok(())
    }

    async fn open_topic(
        &self,
        record: &TopicRecord,
        records: &mut HashMap<PartitionKey, PartitionRecord>,
    ) -> Result<Vec<Opened>> {
        let TopicRecord { id, partitions, .. } = *record;
        let damaged = |what: String| self.context.catalog.damaged(format!("topic {}: {what}", record.name));
        if partitions == 0 || partitions > MOST_PARTITIONS || check_name(&record.name).is_err() {
            return Err(damaged("its name or partition count is impossible".to_owned()));
        }
        let own = record.config.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let config = Arc::new(self.defaults.with(own).map_err(|error| damaged(error.to_string()))?);
        let name: Arc<str> = record.name.as_str().into();
        let opened: Vec<Opened> = stream::iter((0..partitions).map(|partition| {
            let key = PartitionKey { topic: id, partition };
            let record = records.remove(&key).unwrap_or_default();
            let partition = PartitionId { key, topic: Arc::clone(&name) };
            recovery::open(&self.context, partition, record, Arc::clone(&config))
        }))
        .buffered(CONCURRENCY)
        .try_collect()
        .await?;
        let partitions = opened.iter().map(|opened| Arc::clone(&opened.partition)).collect();
        let topic = Topic { name, id, config: RwLock::new(config), partitions };
        self.topics.write().insert(&Arc::new(topic));
        Ok(opened)
    }

    /// The cluster's id, made when the store was formatted: 22 characters, as Kafka prints it.
    #[must_use]
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// What topics get that do not set a key themselves.
    #[must_use]
    pub fn topic_defaults(&self) -> TopicConfig {
        self.defaults.clone()
    }

    /// Flushes, writes snapshots and the clean markers: the next open scans nothing. Later changes are refused; reads
    /// may go on.
    pub async fn close(&self) -> Result<()> {
        if self.context.closing.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.scrub.stop();
        self.context.tasks.end();
        let admin = self.admin.lock().await;
        self.context.committer.close();
        // It sees that the store is being closed, and ends.
        let cleaning = self.cleaner.turn.lock().await;
        self.context.tasks.idle().await;
        self.context.health.check()?;
        let partitions: Vec<_> = self.topics().iter().flat_map(|topic| topic.partitions.clone()).collect();
        let closed: Vec<Result<bool>> = stream::iter(partitions)
            .map(|partition| async move { partition.close_if_it_fits().await })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        let closed = closed.into_iter().collect::<Result<Vec<bool>>>()?;
        if closed.contains(&false) {
            // Of those the next start reads the tail again; it is durable.
            self.context.home.flush().await?;
        }
        self.context.graveyard.close();
        self.context.tasks.idle().await;
        self.context.health.check()?;
        write_checkpoints(&self.context, &self.topics).await;
        self.context.tasks.close();
        self.context.health.close();
        self.context.catalog.close().await?;
        self.context.home.closed().await?;
        drop((admin, cleaning));
        Ok(())
    }

    /// Makes a topic. It exists wholly or, after a power cut, not at all.
    pub async fn create_topic(&self, name: &str, partitions: u32, config: TopicConfig) -> Result<Arc<Topic>> {
        check_name(name)?;
        if partitions == 0 || partitions > MOST_PARTITIONS {
            return Err(Error::InvalidPartitionCount { count: partitions, max: MOST_PARTITIONS });
        }
        let one = Arc::clone(&self.admin).lock_owned().await;
        self.context.check()?;
        self.check_free(name)?;
        let id = ids::fresh(self.context.tasks.runtime().as_ref());
        let own = config.overrides().clone();
        let record = TopicRecord { name: name.to_owned(), id, partitions, config: own };
        let (context, topics) = (Arc::clone(&self.context), Arc::clone(&self.topics));
        let make = async move {
            let _one = one;
            let topic = make_topic(&context, record, config).await?;
            topics.write().insert(&topic);
            Ok(topic)
        };
        self.context.tasks.finish(make).await
    }

    /// Gives a topic another configuration, from now on.
    pub async fn configure_topic(&self, name: &str, config: TopicConfig) -> Result<()> {
        let one = Arc::clone(&self.admin).lock_owned().await;
        self.context.check()?;
        let topic = self.topic(name).ok_or_else(|| Error::UnknownTopic { name: name.to_owned() })?;
        let mut change = Change::new();
        change.put(Table::Topics, topic.id.as_bytes(), &topic.record(&config));
        let catalog = Arc::clone(&self.context.catalog);
        let configure = async move {
            let _one = one;
            catalog.submit(change).await?;
            let config = Arc::new(config);
            *topic.config.write() = Arc::clone(&config);
            for partition in &topic.partitions {
                partition.set_config(Arc::clone(&config));
            }
            Ok(())
        };
        self.context.tasks.finish(configure).await
    }

    /// Deletes a topic: at once for its users; its space is given back after its `file.delete.delay.ms`, and when no
    /// read of it is under way.
    pub async fn delete_topic(&self, name: &str) -> Result<()> {
        let one = Arc::clone(&self.admin).lock_owned().await;
        self.context.check()?;
        let topic = self.topic(name).ok_or_else(|| Error::UnknownTopic { name: name.to_owned() })?;
        let (context, topics) = (Arc::clone(&self.context), Arc::clone(&self.topics));
        let delete = async move {
            let _one = one;
            take_out(&context, &topics, topic).await?;
            // Before another topic may have its name.
            write_checkpoints(&context, &topics).await;
            Ok(())
        };
        self.context.tasks.finish(delete).await
    }

    /// A topic by name.
    #[must_use]
    pub fn topic(&self, name: &str) -> Option<Arc<Topic>> {
        self.topics.read().by_name.get(name).cloned()
    }

    /// A topic by id.
    #[must_use]
    pub fn topic_by_id(&self, id: Uuid) -> Option<Arc<Topic>> {
        self.topics.read().by_id.get(&id).cloned()
    }

    /// The topic with this id, or else the one with the next.
    pub(crate) fn topic_from(&self, id: Uuid) -> Option<Arc<Topic>> {
        self.topics.read().by_id.range(id..).next().map(|(_, topic)| Arc::clone(topic))
    }

    /// All topics, by name.
    #[must_use]
    pub fn topics(&self) -> Vec<Arc<Topic>> {
        self.topics.read().by_name.values().cloned().collect()
    }

    /// A producer id that was never given out before, whatever happens to the store later.
    pub async fn allocate_producer_id(&self) -> Result<i64> {
        let mut ids = self.producer_ids.lock().await;
        if ids.next == ids.end {
            self.context.check()?;
            let end = ids.end.saturating_add(PRODUCER_BLOCK);
            let mut change = Change::vital();
            change.put(Table::Meta, b"next_producer_id", &end);
            self.context.catalog.submit(change).await?;
            ids.end = end;
        }
        let id = ids.next;
        ids.next += 1;
        Ok(id)
    }

    /// What was checked and repaired since the store was opened.
    #[must_use]
    pub fn healing(&self) -> HealingCounts {
        self.context.home.healing().counts()
    }

    /// Deletes what the topics' retention says, and ends segments that are old enough; to be called every few minutes by whoever runs the store. A partition
    /// that fails does not keep the others from being cleaned; the first failure is returned.
    pub async fn enforce_retention(&self) -> Result<()> {
        let mut first = Ok(());
        for topic in self.topics() {
            for partition in &topic.partitions {
                self.context.check()?;
                partition.expire_producers();
                let outcome = match partition.enforce_retention().await {
                    // What has gone need not be closed.
                    Ok(()) => partition.roll_if_old().await,
                    failed => failed,
                };
                match outcome {
                    // Deleted meanwhile.
                    Ok(()) | Err(Error::UnknownTopic { .. }) => {}
                    Err(error) => {
                        tracing::warn!("retention of {}-{}: {error}", topic.name, partition.index());
                        first = first.and(Err(error));
                    }
                }
            }
        }
        first
    }

    /// Whether [`Store::checkpoint`] has something to do here.
    #[must_use]
    pub fn keeps_checkpoints(&self) -> bool {
        self.context.home.checkpoints().is_some()
    }

    /// Brings one of Kafka's offset checkpoints up to date, in a directory; to be called every minute or so by whoever runs
    /// the store. Returns whether it was written: it is where it has changed. Nothing depends on it but what others read.
    /// A stop in order, a start and the deletion of a topic see to all of them, compaction to its own.
    pub async fn checkpoint(&self, of: Checkpoint) -> Result<bool> {
        self.context.check()?;
        write_checkpoint(&self.context, &self.topics, of).await
    }

    /// Where the space of the volume is; `None` in a directory. Costs a walk over the catalog.
    pub fn space(&self) -> Result<Option<Space>> {
        self.context.home.space()
    }

    /// Waits until what is under way in the background (sealing, space given back) is done.
    pub async fn quiet(&self) {
        self.context.tasks.idle().await;
    }

    /// Compacts the partitions that are due (`cleanup.policy=compact`), the dirtiest first, one at a time; to be called
    /// every few seconds by whoever runs the store. Returns how many were compacted. One that fails does not keep the
    /// others from it; it is told of in the log.
    pub async fn compact(&self) -> Result<usize> {
        let _turn = self.cleaner.turn.lock().await;
        self.cleaner.keep(|key| self.topic_by_id(key.topic).is_some());
        let mut due = Vec::new();
        for topic in self.topics().iter().filter(|topic| topic.config().cleanup_policy.compact) {
            for partition in &topic.partitions {
                self.context.check()?;
                if self.cleaner.is_parked(partition.key(), self.ground(partition), self.now()) {
                    continue;
                }
                match partition.roll_if_old().await {
                    Ok(()) | Err(Error::UnknownTopic { .. }) => {}
                    Err(error) => self.compaction_failed(partition, error)?,
                }
                match partition.dirty_share().await {
                    Ok(Some(share)) => due.push((share, Arc::clone(partition))),
                    Ok(None) => self.cleaner.succeeded(partition.key(), || name_of(partition)),
                    Err(Error::UnknownTopic { .. }) => {}
                    Err(error) => self.compaction_failed(partition, error)?,
                }
            }
        }
        due.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let mut done = 0;
        for (_, partition) in due {
            match partition.compact(&self.cleaner).await {
                Ok(()) => {
                    done += 1;
                    self.cleaner.succeeded(partition.key(), || name_of(&partition));
                }
                // Deleted meanwhile.
                Err(Error::UnknownTopic { .. }) => {}
                Err(error) => self.compaction_failed(&partition, error)?,
            }
        }
        write_or_tell(&self.context, &self.topics, Checkpoint::Cleaner).await;
        Ok(done)
    }

    fn compaction_failed(&self, partition: &Partition, error: Error) -> Result<()> {
        if !is_local(&error) {
            return Err(error);
        }
        let (name, ground) = (name_of(partition), self.ground(partition));
        self.cleaner.failed(partition.key(), &name, &error, ground, self.now());
        Ok(())
    }

    fn now(&self) -> Duration {
        self.context.tasks.runtime().now()
    }

    /// What may change so that a partition can be compacted that could not.
    fn ground(&self, partition: &Partition) -> Ground {
        let healing = self.context.home.healing();
        Ground {
            log_start: partition.log_start(),
            healed: healing.counts().healed,
            arrangement: healing.arrangement(),
        }
    }

    /// Partitions that are not compacted because of damage, or for want of room (Kafka's `uncleanable-partitions-count`).
    #[must_use]
    pub fn uncleanable(&self) -> usize {
        self.cleaner.parked()
    }

    /// Refuses a name that is taken, or that would share its metric names with one that is.
    fn check_free(&self, name: &str) -> Result<()> {
        let plain = |name: &str| name.replace('.', "_");
        let wanted = plain(name);
        let topics = self.topics.read();
        let taken = topics.by_name.keys().find(|taken| plain(taken) == wanted);
        taken.map_or(Ok(()), |taken| Err(Error::TopicExists { name: taken.to_string() }))
    }
}

async fn make_topic(context: &Arc<Context>, record: TopicRecord, config: TopicConfig) -> Result<Arc<Topic>> {
    let TopicRecord { id, partitions, .. } = record;
    context.home.prepare_topic(&record).await?;
    let mut change = Change::new();
    change.put(Table::Topics, id.as_bytes(), &record);
    context.catalog.submit(change).await?;
    let (name, config): (Arc<str>, _) = (record.name.into(), Arc::new(config));
    let partitions = (0..partitions)
        .map(|partition| {
            let key = PartitionKey { topic: id, partition };
            let partition = PartitionId { key, topic: Arc::clone(&name) };
            recovery::create(context, partition, Arc::clone(&config))
        })
        .collect();
    Ok(Arc::new(Topic { name, id, config: RwLock::new(config), partitions }))
}

async fn take_out(context: &Context, topics: &RwLock<Topics>, topic: Arc<Topic>) -> Result<()> {
    let record = topic.record(&topic.config());
    let mut change = Change::vital();
    let mut bytes = Vec::new();
    for partition in &topic.partitions {
        bytes.extend(partition.forget(&mut change).await?);
    }
    change.delete(Table::Topics, topic.id.as_bytes());
    context.home.forget_topic(&record, &mut change);
    topics.write().remove(&topic);
    context.catalog.submit(change).await?;
    for segment in &bytes {
        segment.forgotten();
    }
    context.home.topic_forgotten(&record).await?;
    let delay = Duration::from_millis(topic.config().file_delete_delay_ms as u64);
    drop(topic);
    context.graveyard.bury(delay, bytes, Some(record)).await;
    Ok(())
}

async fn write_checkpoint(context: &Context, topics: &RwLock<Topics>, of: Checkpoint) -> Result<bool> {
    let Some(checkpoints) = context.home.checkpoints() else { return Ok(false) };
    let text = || {
        let topics: Vec<_> = topics.read().by_name.values().cloned().collect();
        let all = topics.iter().flat_map(|topic| topic.partitions.iter().map(move |part| (topic, part)));
        let rows: Vec<_> = all
            .filter_map(|(topic, part)| Some((topic.name(), part.key().partition, part.marks().row(of)?)))
            .collect();
        checkpoints::text(&rows)
    };
    checkpoints.write(of, text).await
}

/// One that cannot be written is told of: nothing depends on it here.
async fn write_or_tell(context: &Context, topics: &RwLock<Topics>, of: Checkpoint) {
    if let Err(error) = write_checkpoint(context, topics, of).await {
        tracing::warn!("{} is not up to date: {error}", of.file_name());
    }
}

async fn write_checkpoints(context: &Context, topics: &RwLock<Topics>) {
    for of in Checkpoint::ALL {
        write_or_tell(context, topics, of).await;
    }
}

fn name_of(partition: &Partition) -> String {
    format!("{}-{}", partition.topic(), partition.index())
}

/// Whether Kafka allows the name: 1 to 249 characters of `[a-zA-Z0-9._-]`, not `.` or `..`.
fn check_name(name: &str) -> Result<()> {
    let refuse = |reason| Err(Error::InvalidTopicName { name: name.chars().take(260).collect(), reason });
    if name.is_empty() {
        return refuse("it is empty");
    }
    if name == "." || name == ".." {
        return refuse("it is the name of a directory");
    }
    if name.len() > 249 {
        return refuse("it is longer than 249 characters");
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
        return refuse("only letters, digits, '.', '_' and '-' are allowed");
    }
    Ok(())
}

/// Checks the catalog's format and gives the store's cluster id, which is made at the first open.
async fn identity(catalog: &Arc<Catalog>, tasks: &Arc<Tasks>, place: &str) -> Result<String> {
    if let Some(found) = catalog.record::<u32>(Table::Meta, b"format")?
        && found > FORMAT
    {
        return Err(Error::UnsupportedFormat { place: place.to_owned(), found, supported: FORMAT });
    }
    if let Some(id) = catalog.record::<String>(Table::Meta, b"cluster_id")? {
        return Ok(id);
    }
    let id = ids::base64(ids::fresh(tasks.runtime().as_ref()));
    let mut change = Change::new();
    change.put(Table::Meta, b"format", &FORMAT);
    change.put(Table::Meta, b"cluster_id", &id);
    catalog.submit(change).await?;
    Ok(id)
}
