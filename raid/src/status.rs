//! What a volume says about itself: the document of `raid10 status --json`, which scripts rely on. Sizes in bytes.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The whole document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The array's name.
    pub name: String,
    /// The array's identity.
    pub uuid: Uuid,
    /// How copies are laid out, such as `near=2`.
    pub layout: String,
    /// Bytes a chunk.
    pub chunk: u64,
    /// Bytes the array holds.
    pub size: u64,
    /// How it is.
    pub state: VolumeState,
    /// Each slot in order; members without a slot (spares) behind them.
    pub members: Vec<MemberStatus>,
    /// What is being made equal.
    pub sync: SyncStatus,
    /// Differences between copies that the last scrub found, or the one that runs has found so far.
    pub mismatches: u64,
    /// The write-intent bitmap; both fields 0 where the array has none.
    pub bitmap: BitmapStatus,
}

/// How a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Nothing was written since it was started or stopped cleanly.
    Clean,
    /// Written to; a crash now means a resync of the dirty regions.
    Active,
    /// A slot has no member that is in sync.
    Degraded,
    /// Data that was acknowledged may be lost; nothing more is acknowledged.
    Failed,
}

/// One member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its place in the array; `None` for a spare.
    pub slot: Option<usize>,
    /// Where it was opened; empty for a missing one.
    pub path: String,
    /// How it is.
    pub state: MemberState,
    /// Reads it failed.
    pub read_errors: u64,
    /// Of these, how many were made good from another copy.
    pub corrected: u64,
}

/// How a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemberState {
    /// Read and written.
    InSync,
    /// Written, and read as far as it has been rebuilt.
    Rebuilding,
    /// Failed, or stale when the array was assembled: neither read nor written.
    Faulty,
    /// Nobody has seen it.
    Missing,
    /// Waiting to take a slot over.
    Spare,
}

/// What is being made equal, and how far it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncStatus {
    /// What is under way.
    pub action: SyncAction,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes a second.
    pub speed: u64,
    /// Seconds left at that speed.
    pub eta_s: u64,
}

/// Kinds of walks over an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SyncAction {
    /// None.
    Idle,
    /// Making copies equal after an unclean stop, or for the first time.
    Resync,
    /// Filling a new member.
    Recover,
    /// Comparing copies.
    Check,
    /// Comparing copies and making them equal.
    Repair,
}

impl std::fmt::Display for VolumeState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Clean => "clean",
            Self::Active => "active",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        })
    }
}

impl std::fmt::Display for MemberState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::InSync => "in sync",
            Self::Rebuilding => "rebuilding",
            Self::Faulty => "faulty",
            Self::Missing => "missing",
            Self::Spare => "spare",
        })
    }
}

impl std::fmt::Display for SyncAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Idle => "idle",
            Self::Resync => "resync",
            Self::Recover => "recover",
            Self::Check => "check",
            Self::Repair => "repair",
        })
    }
}

/// The write-intent bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapStatus {
    /// Bytes a region.
    pub chunk: u64,
    /// Regions whose copies may differ after a crash.
    pub dirty: u64,
}
