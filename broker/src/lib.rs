//! The Kafka wire protocol over the log store: requests in, `sendfile` out.
//!
//! The rooms, in reading order:
//!
//! - [`config`]: Kafka's own key names, typed.
//! - [`wire`]: frames and messages; nothing hostile gets past it.
//! - [`broker`]: what all connections share.
//! - [`server`]: the listening socket. · [`connection`]: one client. · [`dispatch`]: from request to handler.
//! - [`handlers`]: what each API does. · [`errors`]: causes to Kafka's codes.
//! - [`waiters`]: long polls. · [`send`]: responses, records by `sendfile`.
//! - [`groups`]: consumer groups and their offsets. · [`records`]: record batches of the broker's own topics.
//! - [`metrics`], [`admin`]: counters and status over HTTP.
//! - [`cli`]: the command line. · [`log`]: its offline half. · [`volume`]: opening, and making, a volume of member images.

pub mod admin;
pub mod broker;
pub mod cli;
pub mod config;
pub mod connection;
pub mod dispatch;
pub mod errors;
pub mod groups;
pub mod handlers;
pub mod log;
pub mod metrics;
pub mod records;
pub mod send;
pub mod server;
pub mod volume;
pub mod waiters;
pub mod wire;

pub use broker::{Broker, Endpoint};
pub use config::Config;
