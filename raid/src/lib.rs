//! A userspace RAID 10 engine: stripes and mirrors over several files or block devices, in the on-disk
//! format of Linux md (metadata 1.2), served as a block device over NBD.
//!
//! **A RAID volume is a block device made of block devices.** One vocabulary ([`device::Device`]: size, read,
//! write, flush, discard, write zeroes, locate, extents) is spoken by a file, a disk, a simulated disk and the volume
//! itself. NBD serves any of them; the log store sits on any of them.
//!
//! The rooms, in reading order:
//!
//! - [`error`]: what can go wrong, a variant a cause.
//! - [`runtime`]: time, randomness and spawning, the only way the engine reaches them.
//! - [`device`]: the vocabulary, and files and block devices that speak it.
//! - [`geometry`]: where a byte of the array lies on its members; pure.
//! - [`range_set`]: a set of byte positions; pure.
//! - [`superblock`], [`bitmap`], [`badblocks`]: Linux md's metadata, bytes ↔ values; pure.
//! - [`record`]: what md's metadata has no room for, kept beside it, bytes ↔ value; pure.
//! - [`member`], `load`, `unread`: a device, its role and its state; how busy it is and how fast it answers; what it holds in
//!   memory for nobody.
//! - [`volume`]: the array as a block device: assembly, reads, writes, flush, member failures.
//! - `sync`: making copies equal after an unclean stop, filling members, comparing copies.
//! - [`status`], [`event`], [`orders`]: what a volume says about itself, what it tells as it happens, what it can be told.
//! - [`create`], [`examine`]: making arrays, and looking at members offline.
//! - [`nbd`]: any device served to NBD clients.
//! - [`attach`]: a served volume as a disk of the machine it runs on.
//! - [`control`]: steering a served volume from outside.
//! - [`cli`]: the `raid10` command.

pub mod error;
pub mod runtime;

pub mod device;

pub mod geometry;

pub mod range_set;

pub mod badblocks;
pub mod bitmap;
pub mod record;
pub mod superblock;

mod load;
pub mod member;
mod unread;

pub mod event;
pub mod orders;
pub mod status;
pub mod volume;

mod sync;

pub mod create;
pub mod examine;

pub mod nbd;
mod socket;

pub mod attach;
pub mod cli;
pub mod control;

pub use error::{Error, Result};
