//! A simulated machine: the engine and the log store run in it unchanged, on simulated disks, in virtual time, with
//! every choice (who runs next, which operation completes first, what a power cut leaves) drawn from one seed.
//!
//! A failure prints its seed; the same seed replays it to the byte. The rooms, in reading order:
//!
//! - [`rng`]: the one source of chance.
//! - `surface`, `disk`, `port`: what a disk holds, how it fails, how code reaches it.
//! - `executor`: tasks, clock, power.

mod disk;
mod executor;
mod port;
pub mod rng;
mod surface;

pub use disk::{Counts, Fault, SilentFault, SimDisk, SimDiskOptions};
pub use executor::{CutStyle, PowerCut, Sim};
pub use rng::Rng;
pub use surface::SECTOR;
