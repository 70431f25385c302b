//! What the tests that cross crates share: simulated disks, harnesses for real processes.

// A harness's panics are how a test fails; every function here may.
#![allow(clippy::missing_panics_doc)]

pub mod broker;
pub mod clients;
pub mod md;
pub mod nbd;
pub mod process;
pub mod sim;
pub mod vm;
pub mod volumes;
