//! Consumer groups: the classic group protocol and the offsets groups commit.
//!
//! - [`state`]: one group as a pure state machine; time comes in as a parameter, replies go out as effects.
//! - [`exchange`]: the requests, answers and effects it takes and gives.
//! - [`member`]: a member and what it brought.
//! - [`records`]: the records of `__consumer_offsets`, in Kafka's own formats.
//! - [`coordinator`]: the edge: tickets to sockets, timers, appends to the log, loading at start.

pub mod coordinator;
pub mod exchange;
pub mod member;
pub mod records;
pub mod state;
pub use coordinator::Coordinator;

#[cfg(test)]
mod tests;
