//! The `raid10` command.

fn main() {}
