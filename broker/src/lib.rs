//! The Kafka wire protocol over the log store: requests in, `sendfile` out.
//!
//! The rooms, in reading order:
//!
//! - [`config`]: Kafka's own key names, typed.
//! - [`wire`]: frames and messages; nothing hostile gets past it.
//! - [`records`]: record batches of the broker's own topics.
//! - [`groups`]: consumer groups and their offsets.

pub mod config;
pub mod groups;
pub mod records;
pub mod wire;
