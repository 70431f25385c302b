//! A member of a group: who it is, which protocols it can speak, what it waits for.

use super::exchange::Ticket;
use bytes::Bytes;
use std::time::Duration;

/// A protocol a member can speak, with the metadata it sent for it (opaque to the broker).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protocol {
    /// The assignor's name, say `range`.
    pub name: String,
    /// What the member says to the leader under this protocol.
    pub metadata: Bytes,
}

/// A member of a group.
#[derive(Debug, Clone)]
pub struct Member {
    /// The id the coordinator gave it.
    pub id: String,
    /// `group.instance.id` of a static member (KIP-345).
    pub instance_id: Option<String>,
    /// `client.id`, for people who list groups.
    pub client_id: String,
    /// Where it connects from, for people who list groups.
    pub client_host: String,
    /// How long it may stay silent.
    pub session_timeout: Duration,
    /// How long it may take to rejoin.
    pub rebalance_timeout: Duration,
    /// In its order of preference.
    pub protocols: Vec<Protocol>,
    /// What the leader gave it in this generation.
    pub assignment: Bytes,
    /// Its `JoinGroup` that waits for the rebalance, if any.
    pub joining: Option<Ticket>,
    /// Its `SyncGroup` that waits for the leader, if any.
    pub syncing: Option<Ticket>,
    /// It joined for the first time and has not seen a generation yet.
    pub is_new: bool,
    /// When it is taken for dead, unless it waits for us.
    pub expires: Duration,
}

impl Member {
    /// Whether the coordinator owes it an answer: then its silence says nothing.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.joining.is_some() || self.syncing.is_some()
    }

    /// Its metadata for a protocol; empty if it does not speak it.
    #[must_use]
    pub fn metadata(&self, protocol: &str) -> Bytes {
        self.protocols.iter().find(|p| p.name == protocol).map(|p| p.metadata.clone()).unwrap_or_default()
    }

    /// Its first choice among `candidates`.
    #[must_use]
    pub fn vote<'a>(&'a self, candidates: &[&str]) -> Option<&'a str> {
        self.protocols.iter().map(|p| p.name.as_str()).find(|name| candidates.contains(name))
    }
}
