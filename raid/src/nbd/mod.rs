//! The Network Block Device protocol: any [`Device`](crate::device::Device) served to any NBD client.
//!
//! The specification (`doc/proto.md` of the `NetworkBlockDevice` project) is the authority; what is spoken of it:
//! fixed newstyle negotiation (`EXPORT_NAME`, `ABORT`, `LIST`, `INFO`, `GO`), simple replies, and the commands `READ`,
//! `WRITE`, `FLUSH`, `TRIM`, `WRITE_ZEROES`, `DISC` with `FUA` and `NO_HOLE`, over many connections at once.
//!
//! The rooms, in reading order:
//!
//! - [`wire`]: bytes and values; pure, every field checked.
//! - [`handshake`]: what an option is answered; a state machine without sockets.
//! - [`transmission`]: one connection's requests and replies, batched, out of order, in bounded memory.
//! - [`server`]: listeners, connections, the graceful stop.
//!
//! This room knows the vocabulary of devices only: nothing here says "volume" or "member".

pub mod handshake;
pub mod server;
pub mod transmission;
pub mod wire;

pub use handshake::{Export, Exports};
pub use server::{Address, Limits, Listeners, Server};
