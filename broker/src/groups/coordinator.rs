//! The edge of consumer groups: requests wait here for their group's state machine, timers tick it, and what must survive
//! is appended to `__consumer_offsets` before anybody is told.
//!
//! Invariants:
//!
//! - A committed offset is on stable storage before its commit is answered, and before anybody can fetch it.
//! - Of two commits for one partition the one later in the log wins, here as after a restart.
//! - A group's metadata records are appended in the order of its generations: one at a time, each a snapshot
//!   taken when its turn has come.
//! - No lock is held over an await, but for the turn-taking of metadata records, which guards no data.
//! - A group of which not all may be known is not served: a consumer that is told of no offset starts over, or skips. Records
//!   that are lost are passed over (what was committed before them counts); where a partition of the topic cannot be read,
//!   each request for one of its groups is answered with an error, and the others are served.

use super::exchange::{Effect, Join, Joined, Sync, Synced, Ticket};
use super::member::Member;
use super::records::{self, Committed, Entry, Metadata};
use super::state::{Group, Rules, State};
use crate::broker::OFFSETS_TOPIC;
use crate::config::Config;
use crate::errors;
use crate::records::{Record, build, read};
use kafka_protocol::ResponseError;
use logstore::{Partition, ReadLimit, Store, Topic};
use parking_lot::Mutex;
use raid::device::Durability;
use raid::runtime::Runtime;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// Bytes of records put into one batch of the topic.
const BATCH: usize = 256 * 1024;

/// Bytes read at a time when the topic is loaded.
const LOAD: u32 = 1024 * 1024;

/// A commit of offsets by a member, or by a consumer that assigns its partitions itself.
pub struct Commit<'a> {
    /// The group.
    pub group: &'a str,
    /// Empty without membership.
    pub member_id: &'a str,
    /// Of a static member.
    pub instance_id: Option<&'a str>,
    /// -1 without membership.
    pub generation: i32,
    /// Topic, partition, and what is committed.
    pub offsets: Vec<(String, i32, Committed)>,
}

/// A group as people see it.
pub struct Description {
    /// Its id.
    pub name: String,
    /// Kafka's name of its state.
    pub state: &'static str,
    /// `consumer`, `connect`, …, or nothing.
    pub protocol_type: String,
    /// The protocol everybody speaks, or nothing.
    pub protocol: String,
    /// Everybody.
    pub members: Vec<Member>,
}

/// The coordinator of all groups.
pub struct Coordinator {
    store: Arc<Store>,
    runtime: Arc<dyn Runtime>,
    rules: Rules,
    partitions: u32,
    segment_bytes: i32,
    /// Partitions of the topic that could not be read when it was loaded.
    unreadable: HashSet<u32>,
    groups: Mutex<HashMap<String, Arc<Cell>>>,
    /// When to look at which group. A group may stand here more than once, never later than it should.
    timers: Mutex<BinaryHeap<Reverse<(Duration, String)>>>,
    wake: Notify,
    tickets: AtomicU64,
}

/// A group and what the machine does not know of.
struct Cell {
    name: String,
    inner: Mutex<Inner>,
    /// Held while a metadata record is appended, so that records follow each other in order.
    turn: tokio::sync::Mutex<()>,
}

struct Inner {
    group: Group,
    /// Topic and partition → offset of the record in the log, and what it says.
    offsets: BTreeMap<(String, i32), (i64, Committed)>,
    joins: HashMap<Ticket, oneshot::Sender<Joined>>,
    syncs: HashMap<Ticket, oneshot::Sender<Synced>>,
    /// The earliest entry of this group in `timers`.
    scheduled: Option<Duration>,
    /// Taken off the map: whoever holds the cell must look again.
    gone: bool,
}

impl Coordinator {
    /// Reads groups and offsets from the log, if it has any.
    pub async fn load(
        config: &Config,
        store: Arc<Store>,
        runtime: Arc<dyn Runtime>,
    ) -> logstore::Result<Arc<Self>> {
        let mut coordinator = Self {
            rules: Rules {
                initial_delay: Duration::from_millis(config.group_initial_rebalance_delay_ms as u64),
                max_size: config.group_max_size as usize,
            },
            partitions: config.offsets_topic_partitions as u32,
            segment_bytes: config.offsets_topic_segment_bytes,
            unreadable: HashSet::new(),
            groups: Mutex::new(HashMap::new()),
            timers: Mutex::new(BinaryHeap::new()),
            wake: Notify::new(),
            tickets: AtomicU64::new(1),
            store,
            runtime,
        };
        let mut metadata = HashMap::new();
        if let Some(topic) = coordinator.store.topic(OFFSETS_TOPIC) {
            for partition in topic.partitions() {
                match coordinator.load_partition(partition, &mut metadata).await {
                    Ok(()) => {}
                    Err(error) if is_damage(&error) => {
                        tracing::error!(
                            "{OFFSETS_TOPIC}-{} cannot be read: {error}; until it can, and the broker is started anew, the \
                             groups that it keeps are answered with an error, and all others are served",
                            partition.index()
                        );
                        coordinator.unreadable.insert(partition.index() as u32);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        // What had been read of them by then is not all.
        metadata.retain(|name: &String, _| coordinator.check(name).is_ok());
        let known: Vec<String> = coordinator.groups.lock().keys().cloned().collect();
        for name in known.iter().filter(|name| coordinator.check(name).is_err()) {
            coordinator.groups.lock().remove(name);
        }
        let coordinator = Arc::new(coordinator);
        coordinator.restore(metadata);
        Ok(coordinator)
    }

    /// Refuses a group that is kept in a partition which could not be read.
    pub fn check(&self, group: &str) -> Result<(), ResponseError> {
        if self.unreadable.is_empty() {
            return Ok(());
        }
        let count =
            self.store.topic(OFFSETS_TOPIC).map_or(self.partitions, |topic| topic.partitions().len() as u32);
        if self.unreadable.contains(&records::partition_of(group, count)) {
            return Err(ResponseError::CoordinatorNotAvailable);
        }
        Ok(())
    }

    async fn load_partition(
        &self,
        partition: &Arc<Partition>,
        metadata: &mut HashMap<String, Option<Metadata>>,
    ) -> logstore::Result<()> {
        // What is served of it may not be all.
        partition.check_whole()?;
        let offsets = partition.offsets();
        let mut from = offsets.log_start;
        while from < offsets.log_end {
            let bytes = match partition.read(from, LOAD, ReadLimit::LogEnd, true).await {
                Ok(slice) => slice.copy().await,
                Err(error) => Err(error),
            };
            let bytes = match bytes {
                Err(error @ logstore::Error::LostBatch { next, .. }) if next > from => {
                    tracing::warn!("what groups have committed there is lost: {error}");
                    from = next;
                    continue;
                }
                outcome => outcome?,
            };
            let (entries, next) = read(bytes);
            for (offset, record) in entries.iter().filter(|(offset, _)| *offset >= from) {
                self.note(*offset, record, metadata);
            }
            // A read that gives no whole batch cannot go on; it would be a mistake of the log's.
            match next.filter(|next| *next > from) {
                Some(next) => from = next,
                None => break,
            }
        }
        Ok(())
    }

    /// Takes note of a record of the topic.
    fn note(&self, offset: i64, record: &Record, metadata: &mut HashMap<String, Option<Metadata>>) {
        match records::parse(record) {
            Some(Entry::Offset { group, topic, partition, committed }) => {
                let cell = self.cell(&group);
                let mut inner = cell.inner.lock();
                match committed {
                    Some(committed) => {
                        inner.offsets.insert((topic, partition), (offset, committed));
                    }
                    None => {
                        inner.offsets.remove(&(topic, partition));
                    }
                }
            }
            Some(Entry::Group { group, metadata: told }) => {
                metadata.insert(group, told);
            }
            None => tracing::debug!(offset, "a record of {OFFSETS_TOPIC} was passed over"),
        }
    }

    fn restore(self: &Arc<Self>, metadata: HashMap<String, Option<Metadata>>) {
        let now = self.runtime.now();
        for (name, told) in metadata {
            let Some(told) = told else { continue };
            let cell = self.cell(&name);
            let mut inner = cell.inner.lock();
            inner.group = Group::restored(
                self.rules,
                now,
                told.generation,
                Some(told.protocol_type),
                told.protocol,
                told.leader,
                told.members,
            );
            self.schedule(&cell.name, &mut inner);
        }
        let mut groups = self.groups.lock();
        groups.retain(|_, cell| {
            let inner = cell.inner.lock();
            !(inner.group.is_idle() && inner.offsets.is_empty())
        });
        tracing::info!(groups = groups.len(), "groups loaded");
    }

    /// A random id, for members.
    #[must_use]
    pub fn fresh_uuid(&self) -> uuid::Uuid {
        let mut bytes = [0; 16];
        self.runtime.fill_random(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid()
    }

    /// The topic of committed offsets, made on first use.
    pub async fn ensure_topic(&self) -> logstore::Result<Arc<Topic>> {
        if let Some(topic) = self.store.topic(OFFSETS_TOPIC) {
            return Ok(topic);
        }
        let segment_bytes = self.segment_bytes.to_string();
        let own = [
            ("cleanup.policy", "compact"),
            ("compression.type", "producer"),
            ("segment.bytes", &segment_bytes),
        ];
        let config = self.store.topic_defaults().with(own)?;
        match self.store.create_topic(OFFSETS_TOPIC, self.partitions, config).await {
            Err(logstore::Error::TopicExists { .. }) => self
                .store
                .topic(OFFSETS_TOPIC)
                .ok_or_else(|| logstore::Error::UnknownTopic { name: OFFSETS_TOPIC.to_owned() }),
            other => other,
        }
    }

    /// A `JoinGroup`; the answer comes with the rebalance.
    pub async fn join(self: &Arc<Self>, name: &str, join: Join) -> impl Future<Output = Joined> + use<> {
        let (sender, answer) = oneshot::channel();
        let ticket = self.ticket();
        let now = self.runtime.now();
        let member_id = join.member_id.clone();
        let refused = self.check(name).err();
        // A member of a group that we do not know: it has to start over.
        let known = self.find(name).is_some() || join.member_id.is_empty();
        if known && refused.is_none() {
            self.step(name, |inner| {
                inner.joins.insert(ticket, sender);
                inner.group.join(now, ticket, join)
            })
            .await;
        } else {
            drop(sender);
        }
        async move {
            let lost =
                if known { ResponseError::CoordinatorNotAvailable } else { ResponseError::UnknownMemberId };
            answer.await.unwrap_or_else(|_| Joined::refused(refused.unwrap_or(lost), &member_id))
        }
    }

    /// A `SyncGroup`; the answer comes with the leader's assignment.
    pub async fn sync(self: &Arc<Self>, name: &str, sync: Sync) -> impl Future<Output = Synced> + use<> {
        let (sender, answer) = oneshot::channel();
        let ticket = self.ticket();
        let now = self.runtime.now();
        let refused = self.check(name).err();
        let known = self.find(name).is_some();
        if known && refused.is_none() {
            self.step(name, |inner| {
                inner.syncs.insert(ticket, sender);
                inner.group.sync(now, ticket, sync)
            })
            .await;
        } else {
            drop(sender);
        }
        async move {
            let lost =
                if known { ResponseError::CoordinatorNotAvailable } else { ResponseError::UnknownMemberId };
            answer.await.unwrap_or_else(|_| Synced::refused(refused.unwrap_or(lost)))
        }
    }

    /// A `Heartbeat`.
    pub fn heartbeat(
        &self,
        name: &str,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
    ) -> Result<(), ResponseError> {
        self.check(name)?;
        let cell = self.find(name).ok_or(ResponseError::UnknownMemberId)?;
        let mut inner = cell.inner.lock();
        inner.group.heartbeat(self.runtime.now(), member_id, instance_id, generation)
    }

    /// One member's `LeaveGroup`.
    pub async fn leave(
        self: &Arc<Self>,
        name: &str,
        member_id: &str,
        instance_id: Option<&str>,
    ) -> Result<(), ResponseError> {
        self.check(name)?;
        if self.find(name).is_none() {
            return Err(ResponseError::UnknownMemberId);
        }
        let now = self.runtime.now();
        let mut verdict = Ok(());
        self.step(name, |inner| {
            let (told, effects) = inner.group.leave(now, member_id, instance_id);
            verdict = told;
            effects
        })
        .await;
        verdict
    }

    /// Commits offsets: durable when it returns.
    pub async fn commit(&self, commit: Commit<'_>) -> Result<(), ResponseError> {
        if commit.group.is_empty() {
            return Err(ResponseError::InvalidGroupId);
        }
        self.check(commit.group)?;
        // Only a consumer without membership makes a group by committing.
        if commit.generation >= 0 && self.find(commit.group).is_none() {
            return Err(ResponseError::IllegalGeneration);
        }
        let now = self.runtime.now();
        let (cell, allowed) = self.with(commit.group, |inner| {
            inner.group.may_commit(now, commit.member_id, commit.instance_id, commit.generation)
        });
        let outcome = match allowed {
            Ok(()) => self.append_offsets(&commit).await,
            Err(refused) => Err(refused),
        };
        self.forget_if_idle(&cell);
        outcome
    }

    async fn append_offsets(&self, commit: &Commit<'_>) -> Result<(), ResponseError> {
        let mut rest = &commit.offsets[..];
        while !rest.is_empty() {
            let mut size = 0;
            let fits = |(topic, _, c): &&(String, i32, Committed)| {
                size += topic.len() + c.metadata.len() + commit.group.len() + 64;
                size <= BATCH
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (batch, later) = rest.split_at(count);
            let made = |(topic, index, c): &(String, i32, Committed)| {
                records::offset(commit.group, topic, *index, Some(c))
            };
            let records: Vec<Record> = batch.iter().map(made).collect();
            let base = self.append(commit.group, &records).await.map_err(|error| {
                tracing::error!(group = commit.group, %error, "offsets could not be committed");
                coordinator_error(&error)
            })?;
            self.remember(commit.group, base, batch);
            rest = later;
        }
        Ok(())
    }

    /// What was appended can be fetched from now on.
    fn remember(&self, name: &str, base: i64, batch: &[(String, i32, Committed)]) {
        self.with(name, |inner| {
            for (delta, (topic, index, committed)) in batch.iter().enumerate() {
                let at = base + delta as i64;
                let entry = inner.offsets.entry((topic.clone(), *index)).or_insert((at, committed.clone()));
                if entry.0 <= at {
                    *entry = (at, committed.clone());
                }
            }
        });
    }

    /// The committed offset of one partition. Whoever asks has had the group checked.
    #[must_use]
    pub fn committed(&self, group: &str, topic: &str, partition: i32) -> Option<Committed> {
        let cell = self.find(group)?;
        let inner = cell.inner.lock();
        inner.offsets.get(&(topic.to_owned(), partition)).map(|(_, committed)| committed.clone())
    }

    /// All committed offsets of a group.
    #[must_use]
    pub fn all_committed(&self, group: &str) -> Vec<(String, i32, Committed)> {
        let Some(cell) = self.find(group) else { return Vec::new() };
        let inner = cell.inner.lock();
        inner.offsets.iter().map(|((topic, index), (_, c))| (topic.clone(), *index, c.clone())).collect()
    }

    /// Everything known of a group; `None` if there is nothing.
    #[must_use]
    pub fn describe(&self, name: &str) -> Option<Description> {
        let cell = self.find(name)?;
        let inner = cell.inner.lock();
        let group = &inner.group;
        Some(Description {
            name: name.to_owned(),
            state: group.state().name(),
            protocol_type: group.protocol_type().unwrap_or_default().to_owned(),
            protocol: group.protocol().unwrap_or_default().to_owned(),
            members: group.members().cloned().collect(),
        })
    }

    /// Everything known of every group.
    #[must_use]
    pub fn describe_all(&self) -> Vec<Description> {
        let mut names: Vec<String> = self.groups.lock().keys().cloned().collect();
        names.sort_unstable();
        names.iter().filter_map(|name| self.describe(name)).collect()
    }

    /// Deletes a group without members, and its offsets.
    pub async fn delete(&self, name: &str) -> Result<(), ResponseError> {
        self.check(name)?;
        let cell = self.find(name).ok_or(ResponseError::GroupIdNotFound)?;
        let tombstones: Vec<Record> = {
            let inner = cell.inner.lock();
            if inner.group.state() != State::Empty || !inner.group.is_idle() {
                return Err(ResponseError::NonEmptyGroup);
            }
            let offsets =
                inner.offsets.keys().map(|(topic, index)| records::offset(name, topic, *index, None));
            offsets.chain([records::group(name, None, 0)]).collect()
        };
        let erased = self.append(name, &tombstones).await.map_err(|error| coordinator_error(&error))?;
        // A commit that came after the tombstones stands.
        cell.inner.lock().offsets.retain(|_, (at, _)| *at > erased);
        self.forget_if_idle(&cell);
        Ok(())
    }

    /// A topic is gone: so are the offsets that groups had in it.
    pub async fn forget_topic(&self, topic: &str) {
        let cells: Vec<Arc<Cell>> = self.groups.lock().values().cloned().collect();
        for cell in cells {
            let indexes: Vec<i32> = {
                let mut inner = cell.inner.lock();
                let of_topic = |key: &&(String, i32)| key.0 == topic;
                let keys: Vec<_> = inner.offsets.keys().filter(of_topic).cloned().collect();
                keys.into_iter()
                    .map(|key| {
                        inner.offsets.remove(&key);
                        key.1
                    })
                    .collect()
            };
            if indexes.is_empty() {
                continue;
            }
            let tombstones: Vec<Record> =
                indexes.iter().map(|index| records::offset(&cell.name, topic, *index, None)).collect();
            if let Err(error) = self.append(&cell.name, &tombstones).await {
                tracing::error!(group = cell.name, topic, %error, "offsets of a deleted topic stay in the log");
            }
            self.forget_if_idle(&cell);
        }
    }

    /// Ticks the groups for as long as the broker runs.
    pub async fn run_timers(self: Arc<Self>) {
        loop {
            let next = self.timers.lock().peek().map(|Reverse((at, _))| *at);
            let now = self.runtime.now();
            match next {
                None => self.wake.notified().await,
                Some(at) if at > now => tokio::select! {
                    () = self.runtime.sleep(at.saturating_sub(now)) => {}
                    () = self.wake.notified() => {}
                },
                Some(_) => {
                    let due = self.timers.lock().pop();
                    if let Some(Reverse((_, name))) = due {
                        self.tick(&name, now).await;
                    }
                }
            }
        }
    }

    async fn tick(self: &Arc<Self>, name: &str, now: Duration) {
        if self.find(name).is_none() {
            return;
        }
        let tick = |inner: &mut Inner| {
            inner.scheduled = None;
            inner.group.tick(now)
        };
        self.step(name, tick).await;
    }

    /// One step of a group's machine: what must be durable is written, then everybody concerned is told.
    async fn step(self: &Arc<Self>, name: &str, step: impl FnOnce(&mut Inner) -> Vec<Effect>) {
        let (cell, effects) = self.with(name, |inner| {
            let effects = step(inner);
            self.schedule(name, inner);
            effects
        });
        let failed = if effects.contains(&Effect::Persist) { self.persist(&cell).await.err() } else { None };
        let mut inner = cell.inner.lock();
        for effect in effects {
            match effect {
                Effect::Joined(ticket, answer) => {
                    if let Some(sender) = inner.joins.remove(&ticket) {
                        // A client that is gone wants no answer.
                        drop(sender.send(answer));
                    }
                }
                Effect::Synced(ticket, answer) => {
                    // An assignment that would not survive us is not given out.
                    let answer = match failed {
                        Some(error) if answer.refusal.is_none() => Synced::refused(error),
                        _ => answer,
                    };
                    if let Some(sender) = inner.syncs.remove(&ticket) {
                        drop(sender.send(answer));
                    }
                }
                Effect::Persist => {}
            }
        }
        drop(inner);
        // A refused first join leaves nothing behind.
        self.forget_if_idle(&cell);
    }

    async fn persist(&self, cell: &Cell) -> Result<(), ResponseError> {
        let turn = cell.turn.lock().await;
        let now = self.runtime.wall_clock().as_millis() as i64;
        let record = records::group(&cell.name, Some(&cell.inner.lock().group), now);
        let outcome = self.append(&cell.name, &[record]).await;
        drop(turn);
        outcome.map(|_| ()).map_err(|error| {
            tracing::error!(group = cell.name, %error, "the group's members could not be written");
            coordinator_error(&error)
        })
    }

    /// Appends records of a group durably; returns the offset of the first.
    async fn append(&self, group: &str, records: &[Record]) -> logstore::Result<i64> {
        let topic = self.ensure_topic().await?;
        let index = records::partition_of(group, topic.partitions().len() as u32);
        let partition = topic
            .partition(index as i32)
            .ok_or_else(|| logstore::Error::UnknownTopic { name: OFFSETS_TOPIC.to_owned() })?;
        let now = self.runtime.wall_clock().as_millis() as i64;
        let appended = partition.append(build(records, now), Durability::Stable).await?;
        if let Some(commit) = appended.commit {
            commit.await?;
        }
        Ok(appended.base_offset)
    }

    fn schedule(&self, name: &str, inner: &mut Inner) {
        let Some(next) = inner.group.next_deadline() else { return };
        // An earlier entry will look, and schedule anew.
        if inner.scheduled.is_some_and(|at| at <= next) {
            return;
        }
        inner.scheduled = Some(next);
        self.timers.lock().push(Reverse((next, name.to_owned())));
        self.wake.notify_one();
    }

    fn ticket(&self) -> Ticket {
        self.tickets.fetch_add(1, Ordering::Relaxed)
    }

    fn find(&self, name: &str) -> Option<Arc<Cell>> {
        self.groups.lock().get(name).cloned()
    }

    /// Works on a group under its lock, making it if it is not there. One that was taken off the map in between is
    /// looked up again, so that nothing is put where nobody will look.
    fn with<T>(&self, name: &str, work: impl FnOnce(&mut Inner) -> T) -> (Arc<Cell>, T) {
        loop {
            let cell = self.cell(name);
            let mut inner = cell.inner.lock();
            if !inner.gone {
                let done = work(&mut inner);
                drop(inner);
                return (cell, done);
            }
        }
    }

    fn cell(&self, name: &str) -> Arc<Cell> {
        let mut groups = self.groups.lock();
        let cell = groups.entry(name.to_owned()).or_insert_with(|| {
            Arc::new(Cell {
                name: name.to_owned(),
                inner: Mutex::new(Inner {
                    group: Group::new(self.rules),
                    offsets: BTreeMap::new(),
                    joins: HashMap::new(),
                    syncs: HashMap::new(),
                    scheduled: None,
                    gone: false,
                }),
                turn: tokio::sync::Mutex::new(()),
            })
        });
        Arc::clone(cell)
    }

    /// Takes a group without members and offsets out of memory.
    fn forget_if_idle(&self, cell: &Arc<Cell>) {
        let mut groups = self.groups.lock();
        let mut inner = cell.inner.lock();
        let empty = inner.group.is_idle() && inner.group.state() == State::Empty;
        if empty
            && inner.offsets.is_empty()
            && inner.joins.is_empty()
            && inner.syncs.is_empty()
            && !inner.gone
        {
            inner.gone = true;
            groups.remove(&cell.name);
        }
    }
}

/// Whether a partition cannot be read, though the store is well.
fn is_damage(error: &logstore::Error) -> bool {
    use logstore::Error::{DamagedLog, Device, File, LostBatch, UnreadableLog};
    matches!(error, DamagedLog { .. } | LostBatch { .. } | UnreadableLog { .. } | Device(_) | File { .. })
}

/// What a group's client is told when the log failed: where Kafka would send it looking for another coordinator.
fn coordinator_error(error: &logstore::Error) -> ResponseError {
    match errors::kafka(error) {
        ResponseError::NotLeaderOrFollower => ResponseError::NotCoordinator,
        ResponseError::MessageTooLarge => ResponseError::InvalidCommitOffsetSize,
        _ => ResponseError::CoordinatorNotAvailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use logstore::{Home, StoreOptions};
    use raid::runtime::TokioRuntime;

    #[tokio::test]
    async fn groups_of_a_partition_that_cannot_be_read_are_refused_and_others_served() {
        let dir = tempfile::tempdir().unwrap();
        let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime::current());
        let home = Home::Directory(dir.path().join("log"));
        let store = Store::open(home, StoreOptions::default(), Arc::clone(&runtime)).await.unwrap();
        let config = Config::load(None, &["offsets.topic.num.partitions=5".to_owned()]).unwrap();
        let load = || Coordinator::load(&config, Arc::clone(&store), Arc::clone(&runtime));
        let coordinator = load().await.unwrap();
        let names: Vec<String> = (0..20).map(|number| format!("g{number}")).collect();
        let commit = |group, offset| {
            let committed = Committed { offset, leader_epoch: -1, metadata: String::new(), timestamp: 0 };
            let offsets = vec![("t".to_owned(), 0, committed)];
            Commit { group, member_id: "", instance_id: None, generation: -1, offsets }
        };
        for name in &names {
            coordinator.commit(commit(name, 7)).await.unwrap();
        }
        drop(coordinator);
        let mut coordinator = Arc::into_inner(load().await.unwrap()).unwrap();
        coordinator.unreadable.insert(records::partition_of("g0", 5));
        let coordinator = Arc::new(coordinator);
        let (refused, served): (Vec<&String>, Vec<&String>) =
            names.iter().partition(|name| coordinator.check(name).is_err());
        assert!(refused.contains(&&names[0]) && served.len() > 5, "{refused:?}");
        let lost = ResponseError::CoordinatorNotAvailable;
        for name in refused {
            assert_eq!(coordinator.commit(commit(name, 8)).await, Err(lost));
            assert_eq!(coordinator.heartbeat(name, "m", None, 1), Err(lost));
            assert_eq!(coordinator.leave(name, "m", None).await, Err(lost));
            assert_eq!(coordinator.delete(name).await, Err(lost));
        }
        for name in served {
            assert_eq!(coordinator.committed(name, "t", 0).map(|committed| committed.offset), Some(7));
            coordinator.commit(commit(name, 8)).await.unwrap();
        }
        store.close().await.unwrap();
    }
}
