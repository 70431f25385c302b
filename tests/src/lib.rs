//! What the tests that cross crates share: simulated disks, harnesses for real processes.
