//! The Network Block Device protocol: any [`Device`](crate::device::Device) served to any NBD client.
//!
//! The specification (`doc/proto.md` of the `NetworkBlockDevice` project, and its extension of extended headers) is the
//! authority; what is spoken of it: fixed newstyle negotiation; simple, structured and extended replies; the metadata
//! context `base:allocation`; the commands `READ`, `WRITE`, `FLUSH`, `TRIM`, `CACHE`, `WRITE_ZEROES`, `BLOCK_STATUS` and
//! `DISC` with all their flags, over many connections at once. Not spoken: `RESIZE`, which no client speaks.
//!
//! The rooms, in reading order:
//!
//! - [`wire`]: bytes and values; pure, every field checked.
//! - [`handshake`]: what an option is answered; a state machine without sockets.
//! - [`transmission`]: one connection's requests and replies, batched, out of order, in bounded memory.
//! - [`tls`]: certificates, and who may be a client.
//! - [`listen`]: addresses, and sockets that were passed to us.
//! - [`server`]: connections and the graceful stop.
//!
//! This room knows the vocabulary of devices only: nothing here says "volume" or "member".

pub mod handshake;
pub mod listen;
pub mod server;
pub mod tls;
pub mod transmission;
pub mod wire;

pub use handshake::{Export, Exports, Session, Tls};
pub use listen::{Address, Listeners, Passed};
pub use server::{Limits, Server, adopt};
pub use tls::Security;
