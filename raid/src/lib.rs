//! A userspace RAID 10 engine: stripes and mirrors over several files or block devices, in the on-disk
//! format of Linux md (metadata 1.2), served as a block device over NBD.
//!
//! **A RAID volume is a block device made of block devices.** One vocabulary ([`device::Device`]: size, read,
//! write, flush, discard, write zeroes, locate) is spoken by a file, a disk, a simulated disk and the volume
//! itself. NBD serves any of them; the log store sits on any of them.
//!
//! The rooms, in reading order:
//!
//! - [`error`]: what can go wrong, a variant a cause.
//! - [`runtime`]: time, randomness and spawning, the only way the engine reaches them.
//! - [`device`]: the vocabulary, and files and block devices that speak it.
//! - [`nbd`]: any device served to NBD clients.

pub mod device;
pub mod error;
pub mod nbd;
pub mod runtime;
mod socket;

pub use error::{Error, Result};
