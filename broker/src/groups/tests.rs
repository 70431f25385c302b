//! The group protocol, scenario by scenario, and under random interleavings.

use super::exchange::{Effect, Join, Joined, Sync, Synced};
use super::member::Protocol;
use super::state::{Group, Rules, State};
use bytes::Bytes;
use kafka_protocol::ResponseError;
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

const SESSION: Duration = Duration::from_secs(10);
const REBALANCE: Duration = Duration::from_secs(60);
const DELAY: Duration = Duration::from_secs(3);

fn at(seconds: u64) -> Duration {
    Duration::from_secs(1000 + seconds)
}

/// A group under test: gives out tickets and collects answers.
struct Bench {
    group: Group,
    next: u64,
    joined: HashMap<u64, Joined>,
    synced: HashMap<u64, Synced>,
    persisted: usize,
}

impl Bench {
    fn new(delay: Duration) -> Self {
        let group = Group::new(Rules { initial_delay: delay, max_size: 100 });
        Self { group, next: 0, joined: HashMap::new(), synced: HashMap::new(), persisted: 0 }
    }

    fn take(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Joined(ticket, answer) => {
                    assert!(self.joined.insert(ticket, answer).is_none(), "answered twice");
                }
                Effect::Synced(ticket, answer) => {
                    assert!(self.synced.insert(ticket, answer).is_none(), "answered twice");
                }
                Effect::Persist => self.persisted += 1,
            }
        }
    }

    fn join(&mut self, now: Duration, join: Join) -> u64 {
        self.next += 1;
        let effects = self.group.join(now, self.next, join);
        self.take(effects);
        self.next
    }

    fn sync(&mut self, now: Duration, member: &str, assignments: &[(&str, &'static str)]) -> u64 {
        self.next += 1;
        let sync = Sync {
            member_id: member.to_owned(),
            instance_id: None,
            generation: self.group.generation(),
            protocol_type: None,
            protocol: None,
            assignments: assignments
                .iter()
                .map(|(m, a)| ((*m).to_owned(), Bytes::from_static(a.as_bytes())))
                .collect(),
        };
        let effects = self.group.sync(now, self.next, sync);
        self.take(effects);
        self.next
    }

    fn tick(&mut self, now: Duration) {
        let effects = self.group.tick(now);
        self.take(effects);
    }

    fn leave(&mut self, now: Duration, member: &str, instance: Option<&str>) -> Result<(), ResponseError> {
        let (verdict, effects) = self.group.leave(now, member, instance);
        self.take(effects);
        verdict
    }

    /// Brings members `a`, `b`, … into a stable generation; returns their ids.
    fn stable(&mut self, now: Duration, names: &[&str]) {
        let tickets: Vec<u64> = names.iter().map(|n| self.join(now, dynamic("", n))).collect();
        self.tick(now + DELAY);
        self.tick(now + DELAY + DELAY);
        for ticket in tickets {
            assert_eq!(self.joined[&ticket].refusal, None);
        }
        let leader = self.group.leader().unwrap().to_owned();
        for name in names.iter().filter(|n| **n != leader) {
            self.sync(now + DELAY + DELAY, name, &[]);
        }
        let assignments: Vec<(&str, &'static str)> = names.iter().map(|n| (*n, "some")).collect();
        self.sync(now + DELAY + DELAY, &leader, &assignments);
        assert_eq!(self.group.state(), State::Stable);
    }
}

fn protocols(names: &[&str]) -> Vec<Protocol> {
    names
        .iter()
        .map(|n| Protocol { name: (*n).to_owned(), metadata: Bytes::from_static(b"topics") })
        .collect()
}

/// A member that needs no promise of an id; `fresh` is the id it gets.
fn dynamic(id: &str, fresh: &str) -> Join {
    Join {
        member_id: id.to_owned(),
        instance_id: None,
        client_id: "client".into(),
        client_host: "/127.0.0.1".into(),
        fresh_id: fresh.to_owned(),
        protocol_type: "consumer".into(),
        protocols: protocols(&["range", "roundrobin"]),
        session_timeout: SESSION,
        rebalance_timeout: REBALANCE,
        id_required: false,
        can_skip_assignment: true,
    }
}

fn fixed(id: &str, fresh: &str, instance: &str) -> Join {
    Join { instance_id: Some(instance.to_owned()), ..dynamic(id, fresh) }
}

#[test]
fn a_lone_member_leads_after_the_initial_delay() {
    let mut bench = Bench::new(DELAY);
    let ticket = bench.join(at(0), dynamic("", "a"));
    assert_eq!(bench.group.next_deadline(), Some(at(0) + DELAY));
    assert!(!bench.joined.contains_key(&ticket));
    bench.tick(at(0) + DELAY);
    let joined = &bench.joined[&ticket];
    assert_eq!((joined.refusal, joined.generation, joined.leader.as_str()), (None, 1, "a"));
    assert_eq!(joined.protocol.as_deref(), Some("range"));
    assert_eq!(joined.members.len(), 1);
    let sync = bench.sync(at(4), "a", &[("a", "everything")]);
    assert_eq!(bench.synced[&sync].assignment, Bytes::from_static(b"everything"));
    assert_eq!((bench.group.state(), bench.persisted), (State::Stable, 1));
    assert_eq!(bench.group.heartbeat(at(5), "a", None, 1), Ok(()));
}

#[test]
fn from_version_four_a_newcomer_gets_its_id_first() {
    let mut bench = Bench::new(Duration::ZERO);
    let first = bench.join(at(0), Join { id_required: true, ..dynamic("", "a") });
    assert_eq!(bench.joined[&first].refusal, Some(ResponseError::MemberIdRequired));
    assert_eq!(bench.joined[&first].member_id, "a");
    let second = bench.join(at(1), Join { id_required: true, ..dynamic("a", "x") });
    assert_eq!((bench.joined[&second].refusal, bench.joined[&second].member_id.as_str()), (None, "a"));
    // An id that nobody was given is unknown.
    let stranger = bench.join(at(1), dynamic("nobody", "y"));
    assert_eq!(bench.joined[&stranger].refusal, Some(ResponseError::UnknownMemberId));
}

#[test]
fn a_promised_id_is_forgotten_with_its_session() {
    let mut bench = Bench::new(Duration::ZERO);
    bench.join(at(0), Join { id_required: true, ..dynamic("", "a") });
    assert!(!bench.group.is_idle());
    bench.tick(at(10));
    assert!(bench.group.is_idle());
    let late = bench.join(at(11), dynamic("a", "x"));
    assert_eq!(bench.joined[&late].refusal, Some(ResponseError::UnknownMemberId));
}

#[test]
fn newcomers_stretch_the_initial_delay_up_to_the_rebalance_timeout() {
    let mut bench = Bench::new(DELAY);
    let a = bench.join(at(0), dynamic("", "a"));
    let b = bench.join(at(2), dynamic("", "b"));
    bench.tick(at(3));
    assert!(bench.joined.is_empty(), "b came in between");
    bench.tick(at(6));
    assert_eq!((bench.joined[&a].generation, bench.joined[&b].generation), (1, 1));
    assert_eq!(bench.joined[&a].members.len(), 2);
    assert!(bench.joined[&b].members.is_empty(), "only the leader hears of the others");
}

#[test]
fn a_second_member_starts_a_rebalance_and_heartbeats_say_so() {
    let mut bench = Bench::new(DELAY);
    bench.stable(at(0), &["a"]);
    let b = bench.join(at(10), dynamic("", "b"));
    assert_eq!(bench.group.state(), State::Preparing);
    assert_eq!(bench.group.heartbeat(at(11), "a", None, 1), Err(ResponseError::RebalanceInProgress));
    let a = bench.join(at(12), dynamic("a", ""));
    assert_eq!((bench.joined[&a].generation, bench.joined[&b].generation), (2, 2));
    assert_eq!(bench.joined[&b].leader, "a");
    assert_eq!(bench.group.heartbeat(at(12), "a", None, 1), Err(ResponseError::IllegalGeneration));
    let waiting = bench.sync(at(12), "b", &[]);
    assert!(!bench.synced.contains_key(&waiting));
    bench.sync(at(12), "a", &[("a", "1"), ("b", "2")]);
    assert_eq!(bench.synced[&waiting].assignment, Bytes::from_static(b"2"));
}

#[test]
fn who_does_not_rejoin_in_time_is_left_behind() {
    let mut bench = Bench::new(DELAY);
    bench.stable(at(0), &["a", "b"]);
    let c = bench.join(at(10), dynamic("", "c"));
    // Alive but silent about joining.
    for second in (11..70).step_by(5) {
        let _alive = bench.group.heartbeat(at(second), "a", None, 1);
        let _alive = bench.group.heartbeat(at(second), "b", None, 1);
        bench.tick(at(second));
    }
    bench.tick(at(70));
    assert_eq!(bench.joined[&c].refusal, None);
    assert_eq!((bench.joined[&c].leader.as_str(), bench.joined[&c].members.len()), ("c", 1));
    assert_eq!(bench.group.heartbeat(at(71), "a", None, 1), Err(ResponseError::UnknownMemberId));
}

#[test]
fn silence_ends_a_membership_and_heartbeats_keep_it() {
    let mut bench = Bench::new(DELAY);
    bench.stable(at(0), &["a", "b"]);
    assert_eq!(bench.group.heartbeat(at(14), "a", None, 1), Ok(()));
    bench.tick(at(16));
    assert_eq!(bench.group.state(), State::Preparing);
    assert_eq!(bench.group.heartbeat(at(17), "b", None, 1), Err(ResponseError::UnknownMemberId));
    let a = bench.join(at(17), dynamic("a", ""));
    assert_eq!((bench.joined[&a].generation, bench.joined[&a].members.len()), (2, 1));
}

#[test]
fn a_leader_that_dies_between_join_and_sync_is_replaced() {
    let mut bench = Bench::new(DELAY);
    let _a = bench.join(at(0), dynamic("", "a"));
    let _b = bench.join(at(1), dynamic("", "b"));
    bench.tick(at(3));
    bench.tick(at(6));
    let waiting = bench.sync(at(6), "b", &[]);
    bench.tick(at(16));
    assert_eq!(bench.synced[&waiting].refusal, Some(ResponseError::RebalanceInProgress));
    let b = bench.join(at(17), dynamic("b", ""));
    assert_eq!((bench.joined[&b].leader.as_str(), bench.joined[&b].generation), ("b", 2));
}

#[test]
fn who_never_syncs_is_left_behind_after_the_rebalance_timeout() {
    let mut bench = Bench::new(Duration::ZERO);
    bench.join(at(0), dynamic("", "a"));
    for second in (1..60).step_by(5) {
        assert_eq!(bench.group.heartbeat(at(second), "a", None, 1), Ok(()));
        bench.tick(at(second));
    }
    assert_eq!(bench.group.state(), State::Completing);
    bench.tick(at(60));
    assert_eq!(bench.group.state(), State::Empty);
}

#[test]
fn leaving_starts_a_rebalance_and_the_last_one_empties_the_group() {
    let mut bench = Bench::new(DELAY);
    bench.stable(at(0), &["a", "b"]);
    assert_eq!(bench.leave(at(10), "nobody", None), Err(ResponseError::UnknownMemberId));
    assert_eq!(bench.leave(at(10), "a", None), Ok(()));
    assert_eq!(bench.group.heartbeat(at(10), "b", None, 1), Err(ResponseError::RebalanceInProgress));
    let b = bench.join(at(11), dynamic("b", ""));
    assert_eq!(bench.joined[&b].leader, "b");
    let before = bench.persisted;
    assert_eq!(bench.leave(at(12), "b", None), Ok(()));
    assert_eq!(bench.group.state(), State::Empty);
    assert!(bench.persisted > before);
    // And it can start over.
    let c = bench.join(at(20), dynamic("", "c"));
    bench.tick(at(23));
    assert_eq!((bench.joined[&c].refusal, bench.joined[&c].generation), (None, 4));
}

#[test]
fn a_follower_that_repeats_its_join_disturbs_nobody() {
    let mut bench = Bench::new(DELAY);
    bench.stable(at(0), &["a", "b"]);
    let again = bench.join(at(7), dynamic("b", ""));
    assert_eq!((bench.joined[&again].refusal, bench.joined[&again].generation), (None, 1));
    assert_eq!(bench.group.state(), State::Stable);
    // The leader's rejoin means that it wants a new assignment.
    bench.join(at(8), dynamic("a", ""));
    assert_eq!(bench.group.state(), State::Preparing);
}

#[test]
fn a_follower_with_new_metadata_starts_a_rebalance() {
    let mut bench = Bench::new(DELAY);
    bench.stable(at(0), &["a", "b"]);
    bench.join(at(7), Join { protocols: protocols(&["roundrobin"]), ..dynamic("b", "") });
    assert_eq!(bench.group.state(), State::Preparing);
    let a = bench.join(at(8), dynamic("a", ""));
    assert_eq!(bench.joined[&a].protocol.as_deref(), Some("roundrobin"), "the only one both speak");
}

#[test]
fn members_that_share_no_protocol_cannot_share_a_group() {
    let mut bench = Bench::new(DELAY);
    bench.stable(at(0), &["a"]);
    let b = bench.join(at(7), Join { protocols: protocols(&["sticky"]), ..dynamic("", "b") });
    assert_eq!(bench.joined[&b].refusal, Some(ResponseError::InconsistentGroupProtocol));
    let c = bench.join(at(7), Join { protocol_type: "connect".into(), ..dynamic("", "c") });
    assert_eq!(bench.joined[&c].refusal, Some(ResponseError::InconsistentGroupProtocol));
    assert_eq!(bench.group.state(), State::Stable);
    let mut bench = Bench::new(DELAY);
    let none = bench.join(at(0), Join { protocols: Vec::new(), ..dynamic("", "d") });
    assert_eq!(bench.joined[&none].refusal, Some(ResponseError::InconsistentGroupProtocol));
}

#[test]
fn a_full_group_takes_nobody_in() {
    let mut bench = Bench::new(Duration::ZERO);
    bench.group = Group::new(Rules { initial_delay: Duration::ZERO, max_size: 1 });
    bench.join(at(0), dynamic("", "a"));
    let b = bench.join(at(0), dynamic("", "b"));
    assert_eq!(bench.joined[&b].refusal, Some(ResponseError::GroupMaxSizeReached));
    let c = bench.join(at(0), Join { id_required: true, ..dynamic("", "c") });
    assert_eq!(bench.joined[&c].refusal, Some(ResponseError::GroupMaxSizeReached));
}

#[test]
fn a_static_member_that_restarts_keeps_its_place_without_a_rebalance() {
    let mut bench = Bench::new(Duration::ZERO);
    bench.join(at(0), fixed("", "a1", "one"));
    bench.sync(at(0), "a1", &[("a1", "mine")]);
    let back = bench.join(at(5), fixed("", "a2", "one"));
    let joined = bench.joined[&back].clone();
    assert_eq!((joined.refusal, joined.generation, joined.member_id.as_str()), (None, 1, "a2"));
    assert!(joined.skip_assignment, "a leader is told not to assign anew");
    assert_eq!(bench.group.state(), State::Stable);
    let sync = bench.sync(at(5), "a2", &[]);
    assert_eq!(bench.synced[&sync].assignment, Bytes::from_static(b"mine"));
    // Its former self is fenced.
    assert_eq!(bench.group.heartbeat(at(6), "a1", Some("one"), 1), Err(ResponseError::FencedInstanceId));
    assert_eq!(bench.group.heartbeat(at(6), "a1", None, 1), Err(ResponseError::UnknownMemberId));
    assert_eq!(bench.group.heartbeat(at(6), "a2", Some("one"), 1), Ok(()));
    // It leaves by its instance id alone.
    assert_eq!(bench.leave(at(7), "", Some("one")), Ok(()));
    assert_eq!(bench.group.state(), State::Empty);
}

#[test]
fn an_older_static_leader_that_restarts_believes_its_former_self_leads() {
    let mut bench = Bench::new(Duration::ZERO);
    bench.join(at(0), fixed("", "a1", "one"));
    bench.sync(at(0), "a1", &[("a1", "mine")]);
    let back = bench.join(at(5), Join { can_skip_assignment: false, ..fixed("", "a2", "one") });
    let joined = &bench.joined[&back];
    assert_eq!((joined.leader.as_str(), joined.members.len(), joined.skip_assignment), ("a1", 0, false));
}

#[test]
fn a_static_member_is_kept_through_a_rebalance_it_sleeps_through() {
    let mut bench = Bench::new(Duration::ZERO);
    let long = Duration::from_secs(300);
    bench.join(at(0), Join { session_timeout: long, ..fixed("", "a", "one") });
    bench.sync(at(0), "a", &[("a", "mine")]);
    let b = bench.join(at(1), dynamic("", "b"));
    bench.tick(at(61));
    let joined = &bench.joined[&b];
    assert_eq!((joined.leader.as_str(), joined.members.len()), ("b", 2));
}

#[test]
fn commits_are_for_members_of_the_generation_or_for_groups_without_members() {
    let mut bench = Bench::new(Duration::ZERO);
    assert_eq!(bench.group.may_commit(at(0), "", None, -1), Ok(()));
    bench.join(at(0), dynamic("", "a"));
    assert_eq!(bench.group.may_commit(at(0), "a", None, 1), Err(ResponseError::RebalanceInProgress));
    bench.sync(at(0), "a", &[("a", "x")]);
    assert_eq!(bench.group.may_commit(at(0), "a", None, 1), Ok(()));
    assert_eq!(bench.group.may_commit(at(0), "a", None, 0), Err(ResponseError::IllegalGeneration));
    assert_eq!(bench.group.may_commit(at(0), "z", None, 1), Err(ResponseError::UnknownMemberId));
    assert_eq!(bench.group.may_commit(at(0), "", None, -1), Err(ResponseError::UnknownMemberId));
    // While others join, the old generation still owns its partitions.
    bench.join(at(1), dynamic("", "b"));
    assert_eq!(bench.group.may_commit(at(1), "a", None, 1), Ok(()));
}

#[test]
fn the_protocol_most_members_like_best_wins() {
    let mut bench = Bench::new(DELAY);
    bench.join(at(0), Join { protocols: protocols(&["range", "sticky"]), ..dynamic("", "a") });
    bench.join(at(0), Join { protocols: protocols(&["sticky", "range"]), ..dynamic("", "b") });
    let c = bench.join(at(0), Join { protocols: protocols(&["sticky", "range", "odd"]), ..dynamic("", "c") });
    bench.tick(at(3));
    bench.tick(at(6));
    assert_eq!(bench.joined[&c].protocol.as_deref(), Some("sticky"));
}

#[test]
fn a_sync_that_thinks_of_another_protocol_is_refused() {
    let mut bench = Bench::new(Duration::ZERO);
    bench.join(at(0), dynamic("", "a"));
    let sync = Sync {
        member_id: "a".into(),
        instance_id: None,
        generation: 1,
        protocol_type: Some("consumer".into()),
        protocol: Some("sticky".into()),
        assignments: Vec::new(),
    };
    let effects = bench.group.sync(at(0), 99, sync);
    bench.take(effects);
    assert_eq!(bench.synced[&99].refusal, Some(ResponseError::InconsistentGroupProtocol));
}

#[test]
fn a_restored_group_goes_on_without_a_rebalance() {
    let mut bench = Bench::new(DELAY);
    bench.stable(at(0), &["a", "b"]);
    let members = bench.group.members().cloned().collect();
    let mut restored = Group::restored(
        Rules { initial_delay: DELAY, max_size: 100 },
        at(100),
        bench.group.generation(),
        bench.group.protocol_type().map(str::to_owned),
        bench.group.protocol().map(str::to_owned),
        bench.group.leader().map(str::to_owned),
        members,
    );
    assert_eq!(restored.heartbeat(at(101), "a", None, 1), Ok(()));
    assert_eq!(restored.next_deadline(), Some(at(110)), "b has a session from the start to speak up");
    assert!(restored.tick(at(109)).is_empty());
    restored.tick(at(110));
    assert_eq!(restored.state(), State::Preparing);
}

#[derive(Debug, Clone)]
enum Move {
    JoinNew { id_required: bool, instance: Option<u8> },
    Rejoin(u8),
    Sync(u8),
    Heartbeat(u8),
    Leave(u8),
    Wait(u16),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        (any::<bool>(), proptest::option::of(0u8..3))
            .prop_map(|(id_required, instance)| Move::JoinNew { id_required, instance }),
        any::<u8>().prop_map(Move::Rejoin),
        any::<u8>().prop_map(Move::Sync),
        any::<u8>().prop_map(Move::Heartbeat),
        any::<u8>().prop_map(Move::Leave),
        (0u16..20_000).prop_map(Move::Wait),
    ];
    proptest::collection::vec(one, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever members do and whenever: one leader a generation, generations only grow, every ticket is answered once
    /// and in the end, the leader alone hears of the members, and whoever is told an assignment is a member.
    #[test]
    fn no_interleaving_breaks_a_group(moves in moves(), delay in 0u64..4) {
        let mut bench = Bench::new(Duration::from_secs(delay));
        let mut now = at(0);
        let mut ids: Vec<(String, Option<String>)> = Vec::new();
        let mut serial = 0;
        let mut join_tickets = Vec::new();
        let mut sync_tickets = Vec::new();
        let mut leaders: BTreeMap<i32, HashSet<String>> = BTreeMap::new();
        let mut seen = HashSet::new();
        let mut generation = 0;
        for step in moves {
            let pick = |n: u8| (!ids.is_empty()).then(|| ids[n as usize % ids.len()].clone());
            match step {
                Move::JoinNew { id_required, instance } => {
                    serial += 1;
                    let fresh = format!("m{serial}");
                    let instance_id = instance.map(|i| format!("i{i}"));
                    ids.push((fresh.clone(), instance_id.clone()));
                    let join = Join { instance_id, id_required, ..dynamic("", &fresh) };
                    join_tickets.push(bench.join(now, join));
                }
                Move::Rejoin(n) => if let Some((id, instance_id)) = pick(n) {
                    join_tickets.push(bench.join(now, Join { instance_id, ..dynamic(&id, "unused") }));
                },
                Move::Sync(n) => if let Some((id, _)) = pick(n) {
                    let all: Vec<String> = bench.group.members().map(|m| m.id.clone()).collect();
                    let all: Vec<(&str, &'static str)> = all.iter().map(|m| (m.as_str(), "x")).collect();
                    sync_tickets.push(bench.sync(now, &id, &all));
                },
                Move::Heartbeat(n) => if let Some((id, instance)) = pick(n) {
                    let _any = bench.group.heartbeat(now, &id, instance.as_deref(), bench.group.generation());
                },
                Move::Leave(n) => if let Some((id, instance)) = pick(n) {
                    let _any = bench.leave(now, &id, instance.as_deref());
                },
                Move::Wait(ms) => {
                    now += Duration::from_millis(u64::from(ms));
                    bench.tick(now);
                }
            }
            prop_assert!(bench.group.generation() >= generation);
            generation = bench.group.generation();
            let count = bench.group.members().count();
            prop_assert_eq!(bench.group.state() == State::Empty, count == 0 && bench.group.state() != State::Preparing);
            if matches!(bench.group.state(), State::Completing | State::Stable) {
                let leader = bench.group.leader().unwrap_or_default().to_owned();
                prop_assert!(bench.group.members().any(|m| m.id == leader), "the leader is a member");
            }
            for (ticket, joined) in &bench.joined {
                if !seen.insert(*ticket) || joined.refusal.is_some() {
                    continue;
                }
                if !joined.members.is_empty() && !joined.skip_assignment {
                    prop_assert_eq!(&joined.leader, &joined.member_id);
                    leaders.entry(joined.generation).or_default().insert(joined.leader.clone());
                }
            }
        }
        for (generation, who) in &leaders {
            prop_assert_eq!(who.len(), 1, "generation {} was led by {:?}", generation, who);
        }
        // Everybody falls silent: in the end nobody waits and nobody is left.
        for _ in 0..200 {
            match bench.group.next_deadline() {
                Some(deadline) => {
                    now = now.max(deadline);
                    bench.tick(now);
                }
                None => break,
            }
        }
        prop_assert!(bench.group.is_idle());
        prop_assert_eq!(bench.group.state(), State::Empty);
        for ticket in join_tickets {
            prop_assert!(bench.joined.contains_key(&ticket), "join {} was never answered", ticket);
        }
        for ticket in sync_tickets {
            prop_assert!(bench.synced.contains_key(&ticket), "sync {} was never answered", ticket);
        }
    }
}
