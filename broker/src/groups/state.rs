//! One consumer group, as a pure state machine: requests and the passing of time go in, replies come out as
//! [`Effect`]s. It reads no clock and touches no socket, so every interleaving can be tested.
//!
//! ```text
//!            join                 all joined, or time is up             leader's sync
//!   Empty ─────────► Preparing ────────────────────────────► Completing ─────────────► Stable
//!     ▲                  ▲  ▲                                     │  join, leave,        │
//!     │ last one left    │  └─────────────────────────────────────┘  expiry              │
//!     └──────────────────┴───────────────────────────────────────────────────────────────┘
//! ```
//!
//! Invariants:
//!
//! - A generation has one leader, and its member list is told to the leader alone.
//! - The generation grows by one with each completed rebalance and never goes back.
//! - Every ticket taken in is answered exactly once.
//! - A member that waits for us is never expired for its silence, except a newcomer that waits over
//!   [`NEWCOMER_TIMEOUT`]: it got no id yet and its client may be gone.

use super::exchange::{Effect, Join, Joined, Refusal, Sync, Synced, Ticket};
use super::member::{Member, Protocol};
use bytes::Bytes;
use kafka_protocol::ResponseError;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

/// How long a first `JoinGroup` may wait before its member is forgotten (Kafka's own constant).
pub const NEWCOMER_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Where a group is in its rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// No members; it may still hold offsets.
    Empty,
    /// A rebalance has begun: waiting for members to (re)join.
    Preparing,
    /// A generation has begun: waiting for the leader's assignment.
    Completing,
    /// Everybody has an assignment.
    Stable,
}

impl State {
    /// Kafka's name for it, as `DescribeGroups` tells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "Empty",
            Self::Preparing => "PreparingRebalance",
            Self::Completing => "CompletingRebalance",
            Self::Stable => "Stable",
        }
    }
}

/// What all groups have in common, from the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// `group.initial.rebalance.delay.ms`
    pub initial_delay: Duration,
    /// `group.max.size`
    pub max_size: usize,
}

/// One group.
#[derive(Debug, Clone)]
pub struct Group {
    rules: Rules,
    state: State,
    generation: i32,
    protocol_type: Option<String>,
    protocol: Option<String>,
    leader: Option<String>,
    members: BTreeMap<String, Member>,
    /// Instance id → member id.
    instances: HashMap<String, String>,
    /// Ids given out by `MEMBER_ID_REQUIRED` that have not joined yet, and when they are forgotten.
    promised: HashMap<String, Duration>,
    /// In `Preparing`: when waiting ends.
    join_deadline: Duration,
    /// In `Preparing` from `Empty`: how much longer newcomers may stretch the initial delay.
    stretch: Option<Duration>,
    newcomer_since_deadline: bool,
    /// In `Completing`: who has not sent `SyncGroup`, and until when it may.
    unsynced: HashSet<String>,
    sync_deadline: Duration,
}

impl Group {
    /// A group that nobody has joined.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            state: State::Empty,
            generation: 0,
            protocol_type: None,
            protocol: None,
            leader: None,
            members: BTreeMap::new(),
            instances: HashMap::new(),
            promised: HashMap::new(),
            join_deadline: Duration::ZERO,
            stretch: None,
            newcomer_since_deadline: false,
            unsynced: HashSet::new(),
            sync_deadline: Duration::ZERO,
        }
    }

    /// A group as its record in the log tells it: stable with these members, who have a session from now to speak up.
    #[must_use]
    pub fn restored(
        rules: Rules,
        now: Duration,
        generation: i32,
        protocol_type: Option<String>,
        protocol: Option<String>,
        leader: Option<String>,
        members: Vec<Member>,
    ) -> Self {
        let mut group = Self::new(rules);
        group.generation = generation;
        group.protocol_type = protocol_type.filter(|t| !t.is_empty());
        if members.is_empty() {
            return group;
        }
        group.state = State::Stable;
        group.protocol = protocol;
        for mut member in members {
            member.expires = now + member.session_timeout;
            if let Some(instance) = &member.instance_id {
                group.instances.insert(instance.clone(), member.id.clone());
            }
            group.members.insert(member.id.clone(), member);
        }
        group.leader = leader.filter(|l| group.members.contains_key(l));
        group
    }

    /// Where it is in its rounds.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// The current generation.
    #[must_use]
    pub fn generation(&self) -> i32 {
        self.generation
    }

    /// `consumer`, `connect`, …
    #[must_use]
    pub fn protocol_type(&self) -> Option<&str> {
        self.protocol_type.as_deref()
    }

    /// The protocol everybody speaks.
    #[must_use]
    pub fn protocol(&self) -> Option<&str> {
        self.protocol.as_deref()
    }

    /// Who assigns.
    #[must_use]
    pub fn leader(&self) -> Option<&str> {
        self.leader.as_deref()
    }

    /// Everybody, by id.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values()
    }

    /// Whether nothing but offsets would be lost by forgetting it.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.members.is_empty() && self.promised.is_empty()
    }

    /// A `JoinGroup`. Its answer comes as an effect, now or in a later step.
    pub fn join(&mut self, now: Duration, ticket: Ticket, join: Join) -> Vec<Effect> {
        let mut out = Vec::new();
        if !self.speaks(&join.protocol_type, &join.protocols) {
            let refused = Joined::refused(ResponseError::InconsistentGroupProtocol, &join.member_id);
            out.push(Effect::Joined(ticket, refused));
        } else if join.member_id.is_empty() {
            self.join_newcomer(now, ticket, join, &mut out);
        } else {
            self.join_known(now, ticket, join, &mut out);
        }
        out
    }

    fn join_newcomer(&mut self, now: Duration, ticket: Ticket, join: Join, out: &mut Vec<Effect>) {
        let known = join.instance_id.as_ref().and_then(|instance| self.instances.get(instance)).cloned();
        if let Some(old) = known {
            self.replace_static(now, ticket, &old, join, out);
        } else if self.is_full() {
            out.push(Effect::Joined(ticket, Joined::refused(ResponseError::GroupMaxSizeReached, "")));
        } else if join.id_required && join.instance_id.is_none() {
            // The promise costs memory, so it ends with a session's time.
            self.promised.insert(join.fresh_id.clone(), now + join.session_timeout);
            let refused = Joined::refused(ResponseError::MemberIdRequired, &join.fresh_id);
            out.push(Effect::Joined(ticket, refused));
        } else {
            let id = join.fresh_id.clone();
            self.admit(now, ticket, id, join, out);
        }
    }

    fn join_known(&mut self, now: Duration, ticket: Ticket, join: Join, out: &mut Vec<Effect>) {
        if self.promised.remove(&join.member_id).is_some() {
            if self.is_full() {
                let refused = Joined::refused(ResponseError::GroupMaxSizeReached, &join.member_id);
                out.push(Effect::Joined(ticket, refused));
                return;
            }
            let id = join.member_id.clone();
            self.admit(now, ticket, id, join, out);
            return;
        }
        if let Err(refusal) = self.check_member(&join.member_id, join.instance_id.as_deref()) {
            out.push(Effect::Joined(ticket, Joined::refused(refusal, &join.member_id)));
            return;
        }
        let id = join.member_id.clone();
        let same = self.members[&id].protocols == join.protocols;
        let is_leader = self.leader.as_deref() == Some(id.as_str());
        match self.state {
            State::Preparing => {
                self.wait_for_join(now, &id, ticket, join, out);
                self.complete_join_if_all_here(now, out);
            }
            // Its answer got lost: the same again.
            State::Completing if same => self.repeat_join(now, &id, ticket, out),
            // A follower that changed nothing needs no rebalance; a leader rejoins because it wants one.
            State::Stable if same && !is_leader => self.repeat_join(now, &id, ticket, out),
            State::Completing | State::Stable => {
                self.wait_for_join(now, &id, ticket, join, out);
                self.prepare(now, out);
            }
            // Unreachable while members exist; answered rather than asserted, since it comes off the wire.
            State::Empty => {
                out.push(Effect::Joined(ticket, Joined::refused(ResponseError::UnknownMemberId, &id)));
            }
        }
    }

    /// A static member came back under its instance id, without its member id: it takes over its old place.
    fn replace_static(
        &mut self,
        now: Duration,
        ticket: Ticket,
        old: &str,
        join: Join,
        out: &mut Vec<Effect>,
    ) {
        let Some(mut member) = self.members.remove(old) else { return };
        // Whoever still uses the old id is fenced.
        if let Some(waiting) = member.joining.take() {
            let refused = Joined::refused(ResponseError::FencedInstanceId, old);
            out.push(Effect::Joined(waiting, refused));
        }
        if let Some(waiting) = member.syncing.take() {
            out.push(Effect::Synced(waiting, Synced::refused(ResponseError::FencedInstanceId)));
        }
        let id = join.fresh_id.clone();
        member.id.clone_from(&id);
        let old_protocols = std::mem::replace(&mut member.protocols, join.protocols.clone());
        member.session_timeout = join.session_timeout;
        member.rebalance_timeout = join.rebalance_timeout;
        member.client_id.clone_from(&join.client_id);
        member.client_host.clone_from(&join.client_host);
        member.expires = now + join.session_timeout;
        let was_leader = self.leader.as_deref() == Some(old);
        if was_leader {
            self.leader = Some(id.clone());
        }
        if let Some(instance) = &join.instance_id {
            self.instances.insert(instance.clone(), id.clone());
        }
        if self.unsynced.remove(old) {
            self.unsynced.insert(id.clone());
        }
        self.members.insert(id.clone(), member);
        match self.state {
            State::Stable if self.elect_protocol() == self.protocol => {
                out.push(Effect::Persist);
                let mut joined = self.joined(&id);
                if was_leader && join.can_skip_assignment {
                    joined.skip_assignment = true;
                } else if was_leader {
                    // An older client that is told it leads would assign anew in a generation that is settled:
                    // let it believe that its former self leads.
                    old.clone_into(&mut joined.leader);
                    joined.members.clear();
                }
                out.push(Effect::Joined(ticket, joined));
            }
            State::Preparing => {
                self.wait_for_join(now, &id, ticket, join, out);
                self.complete_join_if_all_here(now, out);
            }
            State::Stable | State::Completing => {
                self.wait_for_join(now, &id, ticket, join, out);
                self.prepare(now, out);
            }
            State::Empty => {
                if let Some(member) = self.members.get_mut(&id) {
                    member.protocols = old_protocols;
                }
                out.push(Effect::Joined(ticket, Joined::refused(ResponseError::UnknownMemberId, &id)));
            }
        }
    }

    /// Takes in a new member; a rebalance follows.
    fn admit(&mut self, now: Duration, ticket: Ticket, id: String, join: Join, out: &mut Vec<Effect>) {
        if self.members.is_empty() {
            self.protocol_type = Some(join.protocol_type.clone());
        }
        if let Some(instance) = &join.instance_id {
            self.instances.insert(instance.clone(), id.clone());
        }
        if self.leader.is_none() {
            self.leader = Some(id.clone());
        }
        self.members.insert(
            id.clone(),
            Member {
                id,
                instance_id: join.instance_id,
                client_id: join.client_id,
                client_host: join.client_host,
                session_timeout: join.session_timeout,
                rebalance_timeout: join.rebalance_timeout,
                protocols: join.protocols,
                assignment: Bytes::new(),
                joining: Some(ticket),
                syncing: None,
                is_new: true,
                expires: now + NEWCOMER_TIMEOUT,
            },
        );
        self.newcomer_since_deadline = true;
        if self.state == State::Preparing {
            self.complete_join_if_all_here(now, out);
        } else {
            self.prepare(now, out);
        }
    }

    /// A member rejoins: what it brought replaces what it had.
    fn wait_for_join(&mut self, now: Duration, id: &str, ticket: Ticket, join: Join, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        // The same member joins twice: its client gave up on the first and repeats it.
        if let Some(older) = member.joining.replace(ticket) {
            let refused = Joined::refused(ResponseError::RebalanceInProgress, id);
            out.push(Effect::Joined(older, refused));
        }
        member.protocols = join.protocols;
        member.session_timeout = join.session_timeout;
        member.rebalance_timeout = join.rebalance_timeout;
        member.expires = now + join.session_timeout;
    }

    fn repeat_join(&mut self, now: Duration, id: &str, ticket: Ticket, out: &mut Vec<Effect>) {
        self.touch(now, id);
        out.push(Effect::Joined(ticket, self.joined(id)));
    }

    /// A rebalance begins.
    fn prepare(&mut self, now: Duration, out: &mut Vec<Effect>) {
        for member in self.members.values_mut() {
            if let Some(waiting) = member.syncing.take() {
                out.push(Effect::Synced(waiting, Synced::refused(ResponseError::RebalanceInProgress)));
                member.expires = now + member.session_timeout;
            }
        }
        self.unsynced.clear();
        let patience = self.rebalance_timeout();
        if self.state == State::Empty {
            // Members of a starting application come one by one: a short wait saves a rebalance each (KIP-134).
            let delay = self.rules.initial_delay.min(patience);
            self.join_deadline = now + delay;
            self.stretch = Some(patience.saturating_sub(delay));
            self.newcomer_since_deadline = false;
            self.state = State::Preparing;
            if delay.is_zero() {
                self.complete_join_if_all_here(now, out);
            }
        } else {
            self.join_deadline = now + patience;
            self.stretch = None;
            self.state = State::Preparing;
            self.complete_join_if_all_here(now, out);
        }
    }

    fn complete_join_if_all_here(&mut self, now: Duration, out: &mut Vec<Effect>) {
        let delaying = self.stretch.is_some() && now < self.join_deadline;
        let all = self.promised.is_empty() && self.members.values().all(|m| m.joining.is_some());
        if self.state == State::Preparing && !delaying && all {
            self.complete_join(now, out);
        }
    }

    /// Everybody is here, or time is up: a new generation begins with those who are.
    fn complete_join(&mut self, now: Duration, out: &mut Vec<Effect>) {
        // Static members keep their place while their session lasts; the others are gone.
        let absent: Vec<String> = self
            .members
            .values()
            .filter(|m| m.joining.is_none() && m.instance_id.is_none())
            .map(|m| m.id.clone())
            .collect();
        for id in absent {
            self.forget(&id, out);
        }
        let leader_is_here =
            self.leader.as_ref().and_then(|l| self.members.get(l)).is_some_and(|m| m.joining.is_some());
        if !leader_is_here && !self.members.is_empty() {
            let Some(present) = self.members.values().find(|m| m.joining.is_some()) else {
                // Only absent static members: wait for one of them, or for their sessions to end.
                // At least a second, lest a timeout of nothing keeps us turning.
                self.join_deadline = now + self.rebalance_timeout().max(Duration::from_secs(1));
                self.stretch = None;
                return;
            };
            self.leader = Some(present.id.clone());
        }
        self.stretch = None;
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        if self.members.is_empty() {
            self.state = State::Empty;
            self.protocol = None;
            self.leader = None;
            out.push(Effect::Persist);
            return;
        }
        self.protocol = self.elect_protocol();
        self.state = State::Completing;
        self.unsynced = self.members.keys().cloned().collect();
        self.sync_deadline = now + self.rebalance_timeout();
        let ids: Vec<String> = self.members.keys().cloned().collect();
        for id in ids {
            let answer = self.joined(&id);
            if let Some(member) = self.members.get_mut(&id) {
                member.assignment = Bytes::new();
                member.is_new = false;
                if let Some(ticket) = member.joining.take() {
                    member.expires = now + member.session_timeout;
                    out.push(Effect::Joined(ticket, answer));
                }
            }
        }
    }

    /// A `SyncGroup`. Its answer comes as an effect, now or in a later step.
    pub fn sync(&mut self, now: Duration, ticket: Ticket, sync: Sync) -> Vec<Effect> {
        let mut out = Vec::new();
        if let Err(refusal) = self.check_sync(&sync) {
            out.push(Effect::Synced(ticket, Synced::refused(refusal)));
            return out;
        }
        match self.state {
            State::Empty => {
                out.push(Effect::Synced(ticket, Synced::refused(ResponseError::UnknownMemberId)));
            }
            State::Preparing => {
                self.touch(now, &sync.member_id);
                out.push(Effect::Synced(ticket, Synced::refused(ResponseError::RebalanceInProgress)));
            }
            State::Stable => {
                self.touch(now, &sync.member_id);
                out.push(Effect::Synced(ticket, self.synced(&sync.member_id)));
            }
            State::Completing => {
                self.unsynced.remove(&sync.member_id);
                if let Some(member) = self.members.get_mut(&sync.member_id)
                    && let Some(older) = member.syncing.replace(ticket)
                {
                    let refused = Synced::refused(ResponseError::RebalanceInProgress);
                    out.push(Effect::Synced(older, refused));
                }
                if self.leader.as_deref() == Some(sync.member_id.as_str()) {
                    self.settle(now, sync.assignments, &mut out);
                }
            }
        }
        out
    }

    fn check_sync(&self, sync: &Sync) -> Result<(), Refusal> {
        self.check_member(&sync.member_id, sync.instance_id.as_deref())?;
        if sync.generation != self.generation {
            return Err(ResponseError::IllegalGeneration);
        }
        let differs = |theirs: &Option<String>, ours: &Option<String>| theirs.is_some() && theirs != ours;
        if differs(&sync.protocol_type, &self.protocol_type) || differs(&sync.protocol, &self.protocol) {
            return Err(ResponseError::InconsistentGroupProtocol);
        }
        Ok(())
    }

    /// The leader has spoken.
    fn settle(&mut self, now: Duration, assignments: Vec<(String, Bytes)>, out: &mut Vec<Effect>) {
        for (id, assignment) in assignments {
            if let Some(member) = self.members.get_mut(&id) {
                member.assignment = assignment;
            }
        }
        self.state = State::Stable;
        // Whoever has not asked yet finds the assignment when it does; its session watches over it.
        self.unsynced.clear();
        out.push(Effect::Persist);
        let ids: Vec<String> = self.members.keys().cloned().collect();
        for id in ids {
            let answer = self.synced(&id);
            if let Some(member) = self.members.get_mut(&id)
                && let Some(ticket) = member.syncing.take()
            {
                member.expires = now + member.session_timeout;
                out.push(Effect::Synced(ticket, answer));
            }
        }
    }

    /// A `Heartbeat`.
    pub fn heartbeat(
        &mut self,
        now: Duration,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
    ) -> Result<(), Refusal> {
        self.check_member(member_id, instance_id)?;
        if generation != self.generation {
            return Err(ResponseError::IllegalGeneration);
        }
        self.touch(now, member_id);
        match self.state {
            State::Empty => Err(ResponseError::UnknownMemberId),
            State::Preparing => Err(ResponseError::RebalanceInProgress),
            State::Completing | State::Stable => Ok(()),
        }
    }

    /// One member's `LeaveGroup`; a static member may be named by its instance id alone.
    pub fn leave(
        &mut self,
        now: Duration,
        member_id: &str,
        instance_id: Option<&str>,
    ) -> (Result<(), Refusal>, Vec<Effect>) {
        let mut out = Vec::new();
        if self.promised.remove(member_id).is_some() {
            self.complete_join_if_all_here(now, &mut out);
            return (Ok(()), out);
        }
        let id = match instance_id {
            Some(instance) if member_id.is_empty() => self.instances.get(instance).cloned(),
            _ => None,
        }
        .unwrap_or_else(|| member_id.to_owned());
        let verdict = self.check_member(&id, instance_id);
        if verdict.is_ok() {
            self.remove(now, &id, &mut out);
        }
        (verdict, out)
    }

    /// Whether this member may commit offsets now.
    pub fn may_commit(
        &mut self,
        now: Duration,
        member_id: &str,
        instance_id: Option<&str>,
        generation: i32,
    ) -> Result<(), Refusal> {
        // A consumer that assigns its partitions itself uses the group for its offsets only.
        if generation < 0 && self.members.is_empty() && instance_id.is_none() {
            return Ok(());
        }
        self.check_member(member_id, instance_id)?;
        if generation != self.generation {
            return Err(ResponseError::IllegalGeneration);
        }
        self.touch(now, member_id);
        match self.state {
            // What it owns is being decided: its commit would be for what it may no longer own.
            State::Completing => Err(ResponseError::RebalanceInProgress),
            State::Empty | State::Preparing | State::Stable => Ok(()),
        }
    }

    /// Time has come to `now`.
    pub fn tick(&mut self, now: Duration) -> Vec<Effect> {
        let mut out = Vec::new();
        let promised = self.promised.len();
        self.promised.retain(|_, until| *until > now);
        if self.promised.len() != promised {
            self.complete_join_if_all_here(now, &mut out);
        }
        let silent: Vec<String> = self
            .members
            .values()
            .filter(|m| m.expires <= now && (!m.is_waiting() || m.is_new))
            .map(|m| m.id.clone())
            .collect();
        for id in silent {
            self.remove(now, &id, &mut out);
        }
        if self.state == State::Completing && self.sync_deadline <= now && !self.unsynced.is_empty() {
            let late: Vec<String> = self.unsynced.drain().collect();
            for id in &late {
                self.forget(id, &mut out);
            }
            self.prepare(now, &mut out);
        }
        if self.state == State::Preparing && self.join_deadline <= now {
            match self.stretch {
                Some(rest) if self.newcomer_since_deadline && !rest.is_zero() => {
                    let delay = self.rules.initial_delay.min(rest);
                    self.join_deadline = now + delay;
                    self.stretch = Some(rest.saturating_sub(delay));
                    self.newcomer_since_deadline = false;
                }
                _ => self.complete_join(now, &mut out),
            }
        }
        out
    }

    /// When [`Self::tick`] next has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let sessions = self.members.values().filter(|m| !m.is_waiting() || m.is_new).map(|m| m.expires).min();
        let promises = self.promised.values().min().copied();
        let round = match self.state {
            State::Preparing => Some(self.join_deadline),
            State::Completing if !self.unsynced.is_empty() => Some(self.sync_deadline),
            _ => None,
        };
        [sessions, promises, round].into_iter().flatten().min()
    }

    fn remove(&mut self, now: Duration, id: &str, out: &mut Vec<Effect>) {
        self.forget(id, out);
        match self.state {
            State::Stable | State::Completing => self.prepare(now, out),
            State::Preparing => self.complete_join_if_all_here(now, out),
            State::Empty => {}
        }
    }

    /// Takes a member off the list; who waits is told.
    fn forget(&mut self, id: &str, out: &mut Vec<Effect>) {
        let Some(member) = self.members.remove(id) else { return };
        self.unsynced.remove(id);
        if let Some(instance) = &member.instance_id
            && self.instances.get(instance).map(String::as_str) == Some(id)
        {
            self.instances.remove(instance);
        }
        if let Some(ticket) = member.joining {
            out.push(Effect::Joined(ticket, Joined::refused(ResponseError::UnknownMemberId, id)));
        }
        if let Some(ticket) = member.syncing {
            out.push(Effect::Synced(ticket, Synced::refused(ResponseError::UnknownMemberId)));
        }
        if self.leader.as_deref() == Some(id) {
            let heir = self.members.values().find(|m| m.joining.is_some());
            self.leader = heir.or_else(|| self.members.values().next()).map(|m| m.id.clone());
        }
    }

    fn touch(&mut self, now: Duration, id: &str) {
        if let Some(member) = self.members.get_mut(id) {
            member.expires = now + member.session_timeout;
        }
    }

    fn check_member(&self, id: &str, instance_id: Option<&str>) -> Result<(), Refusal> {
        if let Some(instance) = instance_id {
            match self.instances.get(instance) {
                None => return Err(ResponseError::UnknownMemberId),
                Some(owner) if owner != id => return Err(ResponseError::FencedInstanceId),
                Some(_) => {}
            }
        }
        if self.members.contains_key(id) { Ok(()) } else { Err(ResponseError::UnknownMemberId) }
    }

    fn is_full(&self) -> bool {
        self.members.len() + self.promised.len() >= self.rules.max_size
    }

    /// Whether a member with these protocols could talk with everybody here.
    fn speaks(&self, protocol_type: &str, protocols: &[Protocol]) -> bool {
        if self.members.is_empty() {
            return !protocol_type.is_empty() && !protocols.is_empty();
        }
        self.protocol_type.as_deref() == Some(protocol_type)
            && protocols.iter().any(|p| self.everybody_speaks(&p.name))
    }

    fn everybody_speaks(&self, protocol: &str) -> bool {
        self.members.values().all(|m| m.protocols.iter().any(|p| p.name == protocol))
    }

    /// The protocol most members like best, of those everybody speaks; the leader's order breaks ties.
    fn elect_protocol(&self) -> Option<String> {
        let judge = self.leader.as_ref().and_then(|l| self.members.get(l));
        let judge = judge.or_else(|| self.members.values().next())?;
        let candidates: Vec<&str> = judge
            .protocols
            .iter()
            .map(|p| p.name.as_str())
            .filter(|name| self.everybody_speaks(name))
            .collect();
        let votes = |name: &str| self.members.values().filter(|m| m.vote(&candidates) == Some(name)).count();
        // The last of equals wins `max_by_key`, hence the reversal.
        candidates.iter().rev().max_by_key(|name| votes(name)).map(|name| (*name).to_owned())
    }

    fn rebalance_timeout(&self) -> Duration {
        self.members.values().map(|m| m.rebalance_timeout).max().unwrap_or_default()
    }

    fn joined(&self, id: &str) -> Joined {
        let leads = self.leader.as_deref() == Some(id);
        let protocol = self.protocol.clone().unwrap_or_default();
        let members = if leads {
            let all = self.members.values();
            all.map(|m| (m.id.clone(), m.instance_id.clone(), m.metadata(&protocol))).collect()
        } else {
            Vec::new()
        };
        Joined {
            refusal: None,
            generation: self.generation,
            protocol_type: self.protocol_type.clone(),
            protocol: Some(protocol),
            leader: self.leader.clone().unwrap_or_default(),
            member_id: id.to_owned(),
            skip_assignment: false,
            members,
        }
    }

    fn synced(&self, id: &str) -> Synced {
        Synced {
            refusal: None,
            protocol_type: self.protocol_type.clone(),
            protocol: self.protocol.clone(),
            assignment: self.members.get(id).map(|m| m.assignment.clone()).unwrap_or_default(),
        }
    }
}
