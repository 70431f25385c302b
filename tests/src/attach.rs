//! A served volume as a disk of this machine, by `raid10 attach --fuse`, so that it is the same whether this machine's kernel
//! has an NBD driver or not; detached when dropped, in whatever state.

use crate::process::{Sandbox, run, run_within, succeed};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Far more than detaching takes, and far less than a person would wait.
const DETACH_LIMIT: Duration = Duration::from_secs(60);

/// An attached volume.
#[derive(Debug)]
pub struct Attached {
    device: PathBuf,
    detach: Command,
    standing: bool,
}

impl Attached {
    /// `raid10 attach VOLUME --fuse`, with further arguments; it must work.
    #[must_use]
    pub fn new(sandbox: &Sandbox, volume: &str, arguments: &[&str]) -> Self {
        let told = succeed(sandbox.raid10().args(["attach", volume, "--fuse"]).args(arguments));
        let mut detach = sandbox.raid10();
        detach.args(["detach", volume]);
        Self { device: told.trim_end().into(), detach, standing: true }
    }

    /// Mounted on the new directory `dir`.
    #[must_use]
    pub fn mounted(sandbox: &Sandbox, volume: &str, dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("the sandbox can be written");
        Self::new(sandbox, volume, &["--mount", dir.to_str().expect("UTF-8")])
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Something else has undone it.
    pub fn undone(mut self) {
        self.standing = false;
    }

    /// `raid10 detach`, which must work; gives what it said.
    #[must_use]
    pub fn detach(mut self) -> String {
        self.standing = false;
        let ended = run_within(&mut self.detach, DETACH_LIMIT);
        assert!(ended.status.success(), "{:?}: {}", self.detach, ended.stderr);
        ended.stderr
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.standing {
            let ended = run(&mut self.detach);
            if !ended.status.success() {
                eprintln!("{:?}: {}", self.detach, ended.stderr.trim_end());
            }
        }
    }
}
