//! What goes into a group's machine and what comes out of it: requests, answers, effects. Values only.

use super::member::Protocol;
use bytes::Bytes;
use kafka_protocol::ResponseError;
use std::time::Duration;

/// Names a request that waits for its answer; the caller gives it out and never twice.
pub type Ticket = u64;

/// Why the coordinator says no: the codes of the group protocol.
pub type Refusal = ResponseError;

/// What a `JoinGroup` request carries.
#[derive(Debug, Clone)]
pub struct Join {
    /// Empty for a first contact.
    pub member_id: String,
    /// Of a static member.
    pub instance_id: Option<String>,
    /// `client.id` of the request header.
    pub client_id: String,
    /// The peer's address.
    pub client_host: String,
    /// The id to give if it needs one. Random, and from outside: the machine is pure.
    pub fresh_id: String,
    /// `consumer`, `connect`, …
    pub protocol_type: String,
    /// In order of preference.
    pub protocols: Vec<Protocol>,
    /// How long it may stay silent.
    pub session_timeout: Duration,
    /// How long it may take to rejoin.
    pub rebalance_timeout: Duration,
    /// From version 4: a newcomer is told its id first and joins with it (KIP-394).
    pub id_required: bool,
    /// From version 9: a leader can be told not to assign anew (KIP-814).
    pub can_skip_assignment: bool,
}

/// The answer to a `JoinGroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    /// Why not, if not.
    pub refusal: Option<Refusal>,
    /// The generation joined, -1 if refused.
    pub generation: i32,
    /// The group's protocol type.
    pub protocol_type: Option<String>,
    /// The protocol everybody speaks.
    pub protocol: Option<String>,
    /// Who assigns.
    pub leader: String,
    /// The member's id.
    pub member_id: String,
    /// The leader is not to assign anew.
    pub skip_assignment: bool,
    /// For the leader: id, instance id and metadata of each member.
    pub members: Vec<(String, Option<String>, Bytes)>,
}

impl Joined {
    /// A refusal.
    #[must_use]
    pub fn refused(refusal: Refusal, member_id: &str) -> Self {
        Self {
            refusal: Some(refusal),
            generation: -1,
            protocol_type: None,
            protocol: None,
            leader: String::new(),
            member_id: member_id.to_owned(),
            skip_assignment: false,
            members: Vec::new(),
        }
    }
}

/// What a `SyncGroup` request carries.
#[derive(Debug, Clone)]
pub struct Sync {
    /// Who asks.
    pub member_id: String,
    /// Of a static member.
    pub instance_id: Option<String>,
    /// The generation it joined.
    pub generation: i32,
    /// From version 5: what it thinks the group speaks.
    pub protocol_type: Option<String>,
    /// From version 5: what it thinks the group speaks.
    pub protocol: Option<String>,
    /// From the leader: who gets what.
    pub assignments: Vec<(String, Bytes)>,
}

/// The answer to a `SyncGroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synced {
    /// Why not, if not.
    pub refusal: Option<Refusal>,
    /// The group's protocol type.
    pub protocol_type: Option<String>,
    /// The protocol everybody speaks.
    pub protocol: Option<String>,
    /// What the member got.
    pub assignment: Bytes,
}

impl Synced {
    /// A refusal.
    #[must_use]
    pub fn refused(refusal: Refusal) -> Self {
        Self { refusal: Some(refusal), protocol_type: None, protocol: None, assignment: Bytes::new() }
    }
}

/// What the caller must do after a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Answer this `JoinGroup`.
    Joined(Ticket, Joined),
    /// Answer this `SyncGroup`.
    Synced(Ticket, Synced),
    /// The group's metadata changed: write it to the log, before the answers of this step are sent.
    Persist,
}
