//! A simulated machine: the engine and the log store run in it unchanged, on simulated disks, in virtual time, with
//! every choice (who runs next, which operation completes first, what a power cut leaves) drawn from one seed.
//!
//! A failure prints its seed; the same seed replays it to the byte. The rooms, in reading order:
//!
//! - [`rng`]: the one source of chance.
//! - `surface`, `disk`, `port`: what a disk holds, how it fails, how code reaches it.
//! - `executor`: tasks, clock, power.
//! - [`registers`]: the model of a block device, and [`clients`] that are judged by it.
//! - [`mod@array`]: an array of simulated disks and its judge.
//! - [`orders`]: what an administrator tells it.
//! - [`exhaust`]: all boundaries of a run, all that a power cut may leave; `boundaries`: all of them, one after the other.
//! - [`ledger`]: the model of a log store.
//! - [`bugs`]: planted ones, which the model must catch.
//! - `seeds`: running many, replaying one.

pub mod array;
mod boundaries;
pub mod bugs;
pub mod clients;
mod disk;
mod executor;
pub mod exhaust;
pub mod ledger;
pub mod orders;
mod port;
pub mod registers;
pub mod rng;
mod seeds;
mod surface;

pub use boundaries::at_every_boundary;
pub use disk::{Counts, Fault, SilentFault, SimDisk, SimDiskOptions, Wreckage};
pub use executor::{CutStyle, Moment, PowerCut, Sim};
pub use rng::Rng;
pub use seeds::{for_seeds, number};
pub use surface::SECTOR;
