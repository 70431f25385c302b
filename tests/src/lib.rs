//! What the tests that cross crates share: simulated disks, harnesses for real processes.

// A harness's panics are how a test fails; every function here may.
#![allow(clippy::missing_panics_doc)]

pub mod attach;
pub mod broker;
pub mod clients;
pub mod disk_of;
pub mod md;
pub mod nbd;
pub mod nbd_fuzz;
pub mod process;
pub mod recorder;
pub mod sim;
pub mod tls;
pub mod vm;
pub mod volumes;
