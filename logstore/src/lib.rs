//! Kafka-format logs on a RAID volume, or in a directory on any file system: the storage half of a Kafka broker,
//! without its wire protocol.
//!
//! The two homes differ in one seam: where a segment's bytes live. Everything else is written once. All I/O goes
//! through [`raid::device::Device`] and [`raid::runtime::Runtime`] on a volume, so that the same code runs under a
//! simulator that cuts the power; a directory is an edge and uses the operating system's files.
//!
//! The rooms, in reading order:
//!
//! - [`error`]: what can go wrong, a variant a cause.
//! - [`config`]: topic configuration, with Kafka's names and defaults.
//! - [`batch`]: the header of a record batch; pure.
//! - [`partition`]: a log with one appender: append, read, offsets, visibility.
//! - [`store`]: topics, and the life of the whole.

pub mod batch;
pub mod config;
pub mod error;
pub mod partition;
pub mod store;

pub use config::TopicConfig;
pub use error::{Error, Result};
pub use partition::{Appended, Commit, Offsets, Partition, ReadLimit, Slice};
pub use store::{Home, Store, StoreOptions, Topic};
