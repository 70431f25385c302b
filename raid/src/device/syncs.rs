//! What a sync that failed means for those beside it and after it.
//!
//! Linux tells of a failed write-back once for each open file, to whichever sync looks first, and calls the pages clean:
//! one that runs beside it, or comes later, succeeds although what it was asked for is lost. Invariant here: no sync
//! succeeds that ran beside one that failed, or began after it, until the file is opened anew.
//!
//! Cost: a sync that is done waits for those that run beside it, and looks at a flag.

use super::file::Failed;
use parking_lot::RwLock;
use rustix::io::Errno;
use std::sync::OnceLock;

/// The syncs of one open file, writes that sync included.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    /// Shared by those that run.
    running: RwLock<()>,
    /// Why one failed.
    failed: OnceLock<Errno>,
}

impl Syncs {
    /// Runs a sync, or a write that syncs, on a thread that may block.
    pub(super) fn run(&self, sync: impl FnOnce() -> Result<(), Failed>) -> Result<(), Failed> {
        {
            let _running = self.running.read();
            self.check()?;
            let outcome = sync();
            if let Err(Failed { errno, flush: true }) = &outcome {
                // The first one counts.
                self.failed.get_or_init(|| *errno);
            }
            outcome?;
        }
        // Who ran beside it may have been told what was meant for it, and says so before it ends.
        drop(self.running.write());
        self.check()
    }

    fn check(&self) -> Result<(), Failed> {
        self.failed.get().map_or(Ok(()), |errno| Err(Failed { errno: *errno, flush: true }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn lost() -> Failed {
        Failed { errno: Errno::IO, flush: true }
    }

    #[test]
    fn one_that_ran_beside_a_failed_one_fails_too() {
        let syncs = Syncs::default();
        std::thread::scope(|scope| {
            let (begun, has_begun) = channel();
            let (go, may_go) = channel::<()>();
            let slow = scope.spawn({
                let syncs = &syncs;
                move || {
                    syncs.run(|| {
                        begun.send(()).unwrap();
                        may_go.recv().unwrap();
                        Err(lost())
                    })
                }
            });
            has_begun.recv().unwrap();
            let (done, is_done) = channel();
            let beside = scope.spawn({
                let syncs = &syncs;
                move || {
                    syncs.run(|| {
                        done.send(()).unwrap();
                        Ok(())
                    })
                }
            });
            // The kernel has told it that all is well, before the other one has ended.
            is_done.recv().unwrap();
            go.send(()).unwrap();
            assert_eq!(slow.join().unwrap().unwrap_err().errno, Errno::IO);
            assert_eq!(beside.join().unwrap().unwrap_err().errno, Errno::IO);
        });
        assert!(syncs.run(|| Ok(())).is_err(), "the kernel calls the pages clean");
    }

    #[test]
    fn a_write_that_failed_as_a_write_spoils_no_sync() {
        let syncs = Syncs::default();
        assert!(syncs.run(|| Err(Failed { errno: Errno::NOSPC, flush: false })).is_err());
        assert!(syncs.run(|| Ok(())).is_ok());
    }
}
