//! `raid10 serve`: assembles a volume, exports it over NBD, and stays until it is told to stop.
//!
//! The order matters: addresses are taken before any member is opened (a taken port must not touch the array), the
//! control socket exists before the first client can write, and `ready` is printed when both accept connections: but not
//! where all sockets were passed by a program that writes to the same stdout itself, as `nbdinfo [ raid10 serve … ]` and
//! `nbdcopy -- [ raid10 serve … ] -` do. It has no need of it, since its connections wait from before the start.

use super::tls::TlsFlags;
use super::{log_to_stderr, runtime, say, size};
use crate::attach::{self, Attacher};
use crate::control::{
    self, ControlServer, Handles, OnEvent, Program, StopHandle, make_runtime_dir, read_write, runtime_dir,
};
use crate::device::{BLOCKING_THREADS, Caching, Device, FileDevice, OpenMode};
use crate::error::{Error, Result};
use crate::nbd::{Address, Export, Exports, Limits, Listeners, Passed, Server};
use crate::orders::SpeedLimits;
use crate::runtime::TokioRuntime;
use crate::status::MemberState;
use crate::volume::{AssembleOptions, Volume};
use rustix::io::Errno;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Threads that run connections; file I/O that blocks has its own.
const WORKERS: usize = 2;
/// How long the end waits for operations that nobody waits for any more.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Serve a volume over NBD, in the foreground.
///
/// Exports it as "" and under its name, and prints "ready" once it accepts connections (not to a client's own stdout, where
/// that is what started it, as in `nbdinfo [ raid10 serve … ]`). SIGTERM, SIGINT and
/// `raid10 stop` finish what runs, flush, mark the array clean and end it with status 0. While the volume is attached
/// (`raid10 attach`) they are refused; a second signal ends it all the same. A disk of the kernel's NBD driver then waits
/// for the next server, for ten minutes, and so it does when the server dies.
#[derive(Debug, clap::Args)]
pub(super) struct Serve {
    /// The array's files or block devices, in any order. One that does not exist is done without, if that is safe.
    #[arg(required = true, value_name = "MEMBER")]
    members: Vec<PathBuf>,
    /// Where to listen: unix:PATH or tcp:HOST:PORT (at all addresses of the host). Besides, sockets that systemd passes. Default,
    /// without any of both: UUID.nbd in the runtime directory.
    #[arg(long, value_name = "ADDRESS")]
    nbd: Vec<Address>,
    /// Refuse every change; write nothing to the members.
    #[arg(long)]
    read_only: bool,
    /// Read and write the members past the page cache (`O_DIRECT`): for a volume under a mounted file system, which
    /// has a cache of its own.
    #[arg(long)]
    direct: bool,
    #[command(flatten)]
    tls: TlsFlags,
    /// Allow TCP addresses that other machines reach, though everything may be sent in plain text.
    #[arg(long)]
    insecure_tcp: bool,
    /// Make members equal at least so fast, in bytes a second, even while clients use the volume.
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = size::parse)]
    sync_min: u64,
    /// Make members equal at most so fast, in bytes a second; `none` for no limit.
    #[arg(long, value_name = "SIZE", default_value = "none", value_parser = size::parse_limit)]
    sync_max: u64,
    /// Run this program on each event: a member failed, a spare took over, a rebuild is done, …
    ///
    /// As `mdadm --monitor --program` does: with the event's name, the volume's name and, where there is one, the
    /// member's path as arguments. The whole event is on its stdin as one JSON document. One runs at a time, for a
    /// minute at most.
    #[arg(long, value_name = "PROGRAM")]
    on_event: Option<PathBuf>,
}

pub(super) fn run(serve: Serve) -> Result<()> {
    // Before there are threads: it changes the environment.
    let passed = Passed::from_environment()?;
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    // Before there are threads.
    attach::flush_for_others();
    threads.worker_threads(WORKERS).max_blocking_threads(BLOCKING_THREADS);
    let runtime = runtime(threads)?;
    let outcome = runtime.block_on(serve.run(passed));
    // Everything is closed: a member that still hangs must not hold up the end.
    runtime.shutdown_timeout(LAST_WAIT);
    outcome
}

/// Whether the process that started this one has the same stdout, as far as that can be told: then it is not read there for
/// what we say.
fn shares_stdout() -> bool {
    let of = |process: &str| {
        let stat = rustix::fs::stat(format!("/proc/{process}/fd/1")).ok()?;
        Some((stat.st_dev, stat.st_ino))
    };
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_pid().to_string());
    parent.is_some_and(|parent| of(&parent).is_some_and(|theirs| of("self") == Some(theirs)))
}

impl Serve {
    async fn run(self, passed: Option<Passed>) -> Result<()> {
        let mut signals = Signals::new()?;
        let security = self.tls.security()?;
        let remote = self.insecure_tcp || security.is_required();
        let speed = SpeedLimits::new(self.sync_min, self.sync_max)?;
        let program = self.on_event.as_deref().map(Program::find).transpose()?;
        let mut listeners = Listeners::bind(&self.nbd, remote).await?;
        let announced = !self.nbd.is_empty() || passed.is_none() || !shares_stdout();
        if let Some(passed) = passed {
            listeners.extend(Listeners::take_over(passed, remote)?);
        }
        let members = open_members(&self.members, self.read_only, self.caching())?;
        let options = AssembleOptions { read_only: self.read_only, hold_resync: false };
        let volume = Volume::assemble(members, options, Arc::new(TokioRuntime::current())).await?;
        volume.set_speed(speed);
        let on_event =
            program.map(|program| OnEvent::start(program, volume.name(), volume.uuid(), volume.events()));
        let stop = StopHandle::new();
        let attacher = Arc::new(Attacher::new(self.read_only));
        let ready = async {
            if listeners.is_empty() {
                listeners = Listeners::bind(&[default_address(&volume)?], remote).await?;
            }
            let handles = Handles {
                stop: stop.clone(),
                open: read_write(self.caching()),
                attach: Some(Arc::clone(&attacher)),
            };
            control::serve(Arc::clone(&volume), handles).await
        };
        let control = match ready.await {
            Ok(control) => control,
            Err(error) => {
                // Nobody has used the volume yet; what the start itself began is put in order.
                volume.stop().await?;
                return Err(error);
            }
        };
        if std::env::var_os(tracing_subscriber::EnvFilter::DEFAULT_ENV).is_none() {
            log_to_stderr();
        }
        announce(&volume, &listeners.uris(security.is_required()), &control);
        let exports = Exports::single(self.export(&volume));
        let server = Server::start(listeners, exports, Limits::standard(), security);
        if announced {
            say("ready");
        }
        tokio::select! {
            () = asked_to_end(&mut signals, &attacher, volume.name()) => stop.request(),
            () = stop.requested() => {}
        }
        tracing::info!("stopping");
        server.stop().await;
        attacher.leave().await;
        let outcome = volume.stop().await;
        stop.report(&outcome);
        control.close().await;
        if let Some(on_event) = on_event {
            on_event.close().await;
        }
        outcome
    }

    fn caching(&self) -> Caching {
        if self.direct { Caching::Direct } else { Caching::PageCache }
    }

    fn export(&self, volume: &Arc<Volume>) -> Export {
        let status = volume.status();
        Export {
            description: format!("RAID 10 volume {}, {}", status.uuid, status.layout),
            name: status.name,
            device: Arc::clone(volume) as Arc<dyn Device>,
            read_only: self.read_only,
        }
    }
}

/// Opens what is there. What is not is the array's to miss.
fn open_members(paths: &[PathBuf], read_only: bool, caching: Caching) -> Result<Vec<Arc<dyn Device>>> {
    let mode = if read_only { OpenMode::ReadOnly } else { OpenMode::ReadWrite };
    let mut members: Vec<Arc<dyn Device>> = Vec::with_capacity(paths.len());
    for path in paths {
        match FileDevice::open_with(path, mode, caching) {
            Ok(member) => members.push(Arc::new(member)),
            Err(Error::Open { errno: Errno::NOENT, .. }) => {
                tracing::warn!("{} does not exist: starting without it", path.display());
            }
            Err(error) => return Err(error),
        }
    }
    if members.is_empty() {
        return Err(Error::NoneExists(paths.iter().map(|path| path.display().to_string()).collect()));
    }
    Ok(members)
}

fn default_address(volume: &Volume) -> Result<Address> {
    let dir = runtime_dir();
    make_runtime_dir(&dir)?;
    Ok(Address::Unix(dir.join(format!("{}.nbd", volume.uuid()))))
}

fn announce(volume: &Volume, uris: &[String], control: &ControlServer) {
    let status = volume.status();
    tracing::info!(uuid = %status.uuid, control = %control.path().display(), "serving {}", status.name);
    for uri in uris {
        tracing::info!("export at {uri}");
    }
    for member in status.members.iter().filter(|member| member.state != MemberState::InSync) {
        let slot = member.slot.map_or_else(|| "-".to_owned(), |slot| slot.to_string());
        tracing::warn!(slot, path = member.path, "member {}", member.state);
    }
}

/// Waits for a signal to end. While the volume is attached, the first one is refused: a disk that goes takes what its
/// file system has not written yet with it. Who insists has a reason.
async fn asked_to_end(signals: &mut Signals, attacher: &Attacher, name: &str) {
    signals.any().await;
    if let Err(refused) = attacher.close(name) {
        let loss = if attacher.outlives_server() {
            "and its disk waits for the next server"
        } else {
            "and lose what is not written yet"
        };
        tracing::error!("not stopping: {refused}; or send the signal again, {loss}");
        signals.any().await;
    }
}

/// The signals that end a server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| {
            signal(kind).map_err(|error| Error::Runtime {
                errno: Errno::from_io_error(&error).unwrap_or(Errno::INVAL),
            })
        };
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
