//! Kafka-format logs on a RAID volume, or in a directory on any file system: the storage half of a Kafka broker,
//! without its wire protocol.
//!
//! The two homes differ in one seam: where a segment's bytes live. Everything else is written once. All I/O goes
//! through [`raid::device::Device`] and [`raid::runtime::Runtime`] on a volume, so that the same code runs under a
//! simulator that cuts the power; a directory is an edge and uses the operating system's files.
//!
//! The rooms, in reading order:
//!
//! - [`error`]: what can go wrong, a variant a cause; `health`: whether anything may still be promised.
//! - [`config`]: topic configuration, with Kafka's names and defaults.
//! - [`batch`], [`records`], [`compression`], [`compaction`], [`index`], [`producers`], [`transactions`], `epochs`: bytes and rules of the
//!   formats; pure.
//! - [`checkpoints`]: offsets of all partitions, as Kafka keeps them beside its logs; pure.
//! - `home`: the seam; `volume` (extents) and `directory` (files): its two sides.
//! - `catalog`: what exists and where it lies, in an embedded database.
//! - `scan`, `ground`, `search`: batches checked one after the other; the good copy of one among several; where the log goes on
//!   behind one that has none.
//! - [`heal`]: batches that are not sound: another copy has them, or they are lost; `unsynced`: closed segments whose copies
//!   an unclean stop left to be made equal.
//! - `segment`: bytes, end and index of one segment, `aborted`: what was aborted in it; `commit`: one flush for all
//!   partitions.
//! - [`partition`]: a log with one appender: append, read, upkeep, recovery.
//! - [`inspect`], [`export`]: offline looks at a store, and copies of it in Kafka's own layout, for tools.
//! - [`scrub`]: all of it, in all copies, in the background; `cold`: without filling the page cache.
//! - [`store`]: topics, and the life of the whole; `tasks`, `graveyard`, `context`: what partitions share.

mod aborted;
pub mod batch;
mod catalog;
pub mod checkpoints;
mod cleaner;
mod cold;
mod commit;
pub mod compaction;
pub mod compression;
pub mod config;
mod context;
mod directory;
mod epochs;
pub mod error;
pub mod export;
mod graveyard;
mod ground;
pub mod heal;
mod health;
mod home;
mod ids;
pub mod index;
pub mod inspect;
pub mod partition;
pub mod producers;
pub mod records;
mod scan;
pub mod scrub;
mod search;
mod segment;
pub mod store;
mod tasks;
pub mod transactions;
mod unsynced;
mod volume;

pub use batch::{Origin, Outcome};
pub use checkpoints::Checkpoint;
pub use cleaner::CleanerOptions;
pub use config::TopicConfig;
pub use error::{Error, Result};
pub use heal::HealingCounts;
pub use home::Space;
pub use partition::{Appended, Commit, Offsets, Partition, ReadLimit, Slice, Visible};
pub use producers::ProducerState;
pub use scrub::{ScrubOptions, ScrubStatus};
pub use store::{Home, Store, StoreOptions, Topic};
