//! Time, randomness and task spawning: the only way engine code reaches them, so that the same code runs under
//! tokio on real files and under a deterministic single-threaded executor on simulated disks, in virtual time.
//!
//! Invariant: nothing in the engine (`geometry` … `sync`) or in the log store names tokio's clock, its `spawn`,
//! `SystemTime::now` or a random number generator. Synchronisation primitives of `tokio::sync` are allowed: they
//! run on any executor. Edges (file devices, sockets, signal handling) may use tokio directly.

mod tokio_runtime;

pub use tokio_runtime::TokioRuntime;

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// A future that owns or borrows what it needs for `'a`, and may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What engine code may ask of the world besides its devices.
pub trait Runtime: Send + Sync + 'static {
    /// Time since an arbitrary fixed moment; never goes back.
    fn now(&self) -> Duration;
    /// Time since the Unix epoch, as the superblock and `LogAppendTime` record it; may jump.
    fn wall_clock(&self) -> Duration;
    /// Fills `out` with random bytes (for UUIDs and generation ids).
    fn fill_random(&self, out: &mut [u8]);
    /// Runs `task` to its end, concurrently with the caller.
    fn spawn(&self, task: BoxFuture<'static, ()>);
    /// Completes after `time` has passed.
    fn sleep(&self, time: Duration) -> BoxFuture<'static, ()>;
}
