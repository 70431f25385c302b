//! A volume as `/dev/nbdN`, by the kernel's own NBD driver: the serving process's end of it.
//!
//! The serving process makes pairs of sockets, gives one end of each to the driver ([`netlink`](super::netlink)) and
//! serves the other as any NBD connection, without a handshake: netlink tells the driver size and flags. The driver
//! spreads the processors over the [`CONNECTIONS`].
//!
//! The disk outlives the server. When the server dies, its sockets close, and the driver keeps what is asked of the disk
//! until [`PATIENCE`] is over: the next server takes the disk over with fresh sockets ([`KernelDisk::take_over`]), and
//! nobody above has seen an error. What was under way is asked again once it is [`REQUEST_TIMEOUT`] old. Asked twice, it
//! must not be done late, over what was written since. Within one server the connections see to that ([`Siblings`]);
//! and a member is not open in two servers.
//!
//! The driver gives up a connection with a request that old on a server that lives, too, since it cannot tell a slow disk
//! from a dead server. So a keeper puts a fresh one in the place of each that the driver has left, though what was begun
//! on that one still runs, for as long as a member hangs; it ends with the disk. Without it, the last of the connections
//! would go in time, and with it the disk.
//!
//! A disk that was without any connection for longer than [`PATIENCE`] has lost something. It is not taken over, nor
//! mended by a keeper that stood still for so long, but ended ([`notes`](super::notes)).
//!
//! That saves what is slow now and then. What is slow each time would be asked again for ever, so nothing that the driver
//! may ask takes that long on members that work: a discard is bounded ([`bound_discards`]) and costs nothing where members
//! would have to write zeroes for it; to write zeroes is not offered to the driver at all, and then it writes them itself,
//! as much at a time as of anything else. (Flags cannot be changed while the disk stands, and members may: one that is
//! fast at it may be replaced by one that is not. A queue's limit for zeroes cannot be set.)
//!
//! Invariants: the driver's ends are open here only while it is told of them. No other client takes memory from these
//! connections: their pool is their own. At most [`MOST_UNDEAD`] connections beyond those that live are there.

use super::AttachError;
use super::kernel::{NbdDisk, bound_discards, nbd_disk};
use super::netlink::{Driver, NewDisk};
use super::notes::{BEAT, Beating, Notes};
use crate::device::Device;
use crate::error::Result;
use crate::nbd::server::SEND_BUFFER;
use crate::nbd::transmission::{Ended, Pool, Siblings};
use crate::nbd::wire::{Style, transmission_flags};
use crate::nbd::{Export, Limits, Session, adopt};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use uuid::Uuid;

/// Connections of a disk.
pub(super) const CONNECTIONS: usize = 4;
/// Without any connection, what is asked of a disk waits so long for one before it fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);
/// A request that is so old is asked again on another connection: longer than a volume waits for a member that hangs.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(45);
/// As that of a loop device, so that a file system made on one can be mounted on the other.
const BLOCK: u64 = 512;
/// Bytes in flight that the connections share.
const SHARED_BYTES: u32 = 64 << 20;
/// Connections that the driver has left and on which something still runs: each holds a little memory. Where there are so
/// many, no fresh ones are made until a member goes on; that is after twenty minutes or so of hanging.
const MOST_UNDEAD: usize = 64;
/// After a connection broke, the next is made so much later at first, and at most. The driver must have noticed, too.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long somebody may have a free device open, as udev does with what is new.
const LOOKING: Duration = Duration::from_secs(2);
/// How long connections may take to end once the driver has said goodbye.
const GOING: Duration = Duration::from_secs(10);

/// What the driver tells of whose a disk is.
const BACKEND_PREFIX: &str = "raid10:";

/// A volume's name for the driver: told in sysfs, so that the disk is found again whatever becomes of its server.
pub(super) fn backend(volume: Uuid, name: &str) -> String {
    format!("{BACKEND_PREFIX}{volume}:{name}")
}

/// The volume and the name that a backend tells; `None` if it is not one of ours.
pub(super) fn parse_backend(backend: &str) -> Option<(Uuid, &str)> {
    let (volume, name) = backend.strip_prefix(BACKEND_PREFIX)?.split_once(':')?;
    Some((Uuid::parse_str(volume).ok()?, name))
}

/// The path of a disk.
pub(super) fn path(number: u32) -> PathBuf {
    format!("/dev/nbd{number}").into()
}

/// What is to be a disk, and how.
pub(super) struct Served<'a> {
    pub(super) device: Arc<dyn Device>,
    pub(super) volume: Uuid,
    pub(super) read_only: bool,
    /// Told when the server ends: nothing more is taken then.
    pub(super) stop: watch::Sender<bool>,
    /// What the connections run on.
    pub(super) io: &'a Handle,
}

/// A disk that this process serves.
#[derive(Debug)]
pub(super) struct KernelDisk {
    number: u32,
    stop: watch::Sender<bool>,
    keeper: JoinHandle<()>,
}

impl KernelDisk {
    /// Makes the volume a disk: that of the number, or a free one; gives with it what could not be had. Blocks.
    pub(super) fn connect(served: Served<'_>, number: Option<u32>) -> Result<(Self, Vec<String>)> {
        let driver = driver()?;
        let Served { device, volume, read_only, stop, io } = served;
        let (size, name) = (device.size(), backend(volume, device.name()));
        let session = session(Arc::clone(&device), read_only);
        let flags = offered(&session);
        let wanted = NewDisk {
            number,
            size,
            block: BLOCK,
            flags,
            timeout: REQUEST_TIMEOUT,
            patience: PATIENCE,
            backend: &name,
        };
        let lines = Lines::new(session, stop);
        let mut connections = Connections::default();
        let theirs = lines.open(CONNECTIONS, &mut connections, io)?;
        let begun = Instant::now();
        let number = loop {
            match driver.connect(&wanted, &theirs) {
                Ok(number) => break number,
                Err(errno) if looked_at(number, errno, begun) => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(errno) => return Err(not_made(number, errno).into()),
            }
        };
        drop(theirs);
        let Some(made) = nbd_disk(number).filter(|disk| disk.backend == name) else {
            driver.disconnect(number).map_err(|errno| refused(Some(number), errno))?;
            return Err(AttachError::OldNbd.into());
        };
        let (disk, mut warnings) = Self::kept(&made, lines, connections, io);
        warnings.extend(as_large(&driver, number, &name, size, &*device));
        Ok((disk, warnings))
    }

    /// Takes over a disk of this volume that another server has left; gives with it what could not be had. Blocks.
    pub(super) fn take_over(served: Served<'_>, number: u32) -> Result<(Self, Vec<String>)> {
        let driver = driver()?;
        let Served { device, volume, read_only, stop, io } = served;
        let refused = |errno| refused(Some(number), errno);
        let stands = nbd_disk(number).filter(|disk| disk.volume() == Some(volume));
        let left = stands.ok_or(refused(Errno::NODEV))?;
        if read_only && !left.read_only {
            return Err(AttachError::Writable { device: path(number).display().to_string() }.into());
        }
        if let Some(lost) = Notes::of_machine()?.lost(&left)? {
            return Err(lost.error(device.name(), path(number).display().to_string()).into());
        }
        let lines = Lines::new(session(Arc::clone(&device), read_only), stop);
        let mut connections = Connections::default();
        let theirs = lines.open(CONNECTIONS, &mut connections, io)?;
        driver.reconnect(number, &left.backend, &theirs).map_err(refused)?;
        drop(theirs);
        let (disk, mut warnings) = Self::kept(&left, lines, connections, io);
        // Only now: the driver may wait for what is under way before it changes the size.
        warnings.extend(as_large(&driver, number, &left.backend, left.size, &*device));
        Ok((disk, warnings))
    }

    /// Gives the disk to a keeper; and a warning, if it cannot be noted that it has one.
    fn kept(disk: &NbdDisk, lines: Lines, connections: Connections, io: &Handle) -> (Self, Vec<String>) {
        let (number, backend) = (disk.number, disk.backend.clone());
        let noted = Notes::of_machine().and_then(|notes| notes.serve(disk));
        let (note, warning) = match noted {
            Ok(note) => (Some(note), None),
            Err(error) => {
                let device = path(number).display().to_string();
                let warning =
                    format!("nobody will know whether {device} was without a server for too long: {error}");
                (None, Some(warning))
            }
        };
        let stop = lines.stop.clone();
        let mending = JoinSet::new();
        let keeper = io.spawn(Keeper { number, backend, lines, connections, mending, note }.keep());
        (Self { number, stop, keeper }, warning.into_iter().collect())
    }

    /// N of `/dev/nbdN`.
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Whether the driver uses it still: anybody may tell it to let go.
    pub(super) fn stands(&self) -> bool {
        !self.keeper.is_finished()
    }

    /// Ends the disk. What is not written yet is lost: that nobody uses it is the caller's business.
    pub(super) fn disconnect(&self) -> Result<()> {
        // One that somebody else has ended is no more ours.
        if self.stands() {
            driver()?.disconnect(self.number).map_err(|errno| refused(Some(self.number), errno))?;
            if let Err(error) = Notes::of_machine().and_then(|notes| notes.forget(self.number)) {
                // It is of no other disk, and so harmless.
                tracing::warn!("a note is left: {error}");
            }
        }
        Ok(())
    }

    /// Waits until nothing is under way on a disk that was ended. Blocks.
    pub(super) fn wait(self) {
        let number = self.number;
        if Handle::current().block_on(tokio::time::timeout(GOING, self.leave())).is_err() {
            tracing::warn!("connections of /dev/nbd{number} have not ended yet");
        }
    }

    /// Ends the connections when what is under way has been answered. The disk waits for the next server.
    pub(super) async fn leave(self) {
        self.stop.send_replace(true);
        if let Err(error) = self.keeper.await {
            tracing::error!("the keeper of /dev/nbd{} ended badly: {error}", self.number);
        }
    }
}

/// Makes a disk as large as its volume, which may have grown since it `was` looked at, and bounds its discards. Gives what
/// could not be had.
fn as_large(driver: &Driver, number: u32, backend: &str, was: u64, volume: &dyn Device) -> Option<String> {
    let size = volume.size();
    let resized = if size == was { Ok(()) } else { driver.resize(number, backend, size) };
    bound_discards(number);
    let errno = resized.err()?;
    let refused = refused(Some(number), errno);
    Some(format!("{} is still {was} bytes large, and its volume {size}: {refused}", path(number).display()))
}

fn driver() -> Result<Driver> {
    let found = Driver::find().map_err(|errno| refused(None, errno))?;
    Ok(found.ok_or(AttachError::NoNbd)?)
}

fn refused(number: Option<u32>, errno: Errno) -> AttachError {
    let device = number.map_or_else(|| "a disk".to_owned(), |number| path(number).display().to_string());
    AttachError::Nbd { device, errno }
}

/// Whether somebody only looks at a free device at this moment, which is busy by that alone.
fn looked_at(number: Option<u32>, errno: Errno, since: Instant) -> bool {
    let free = number.is_some_and(|number| nbd_disk(number).is_none());
    errno == Errno::BUSY && free && since.elapsed() < LOOKING
}

fn not_made(number: Option<u32>, errno: Errno) -> AttachError {
    let Some(number) = number.filter(|_| errno == Errno::BUSY) else { return refused(number, errno) };
    let by = nbd_disk(number).map(|disk| disk.backend).filter(|backend| !backend.is_empty());
    let by = by.map_or_else(String::new, |backend| format!(" by {backend}"));
    AttachError::NbdBusy { device: path(number).display().to_string(), by }
}

/// What a handshake would have settled: the driver speaks simple replies.
fn session(device: Arc<dyn Device>, read_only: bool) -> Session {
    let name = device.name().to_owned();
    let export = Export { description: String::new(), name, device, read_only };
    Session { export: Arc::new(export), style: Style::Simple, allocation: false }
}

/// What the driver is told it may ask: nothing that is slow on some members, see the head.
fn offered(session: &Session) -> u16 {
    let all = session.export.transmission_flags(session.style, session.allocation);
    all & !(transmission_flags::SEND_WRITE_ZEROES | transmission_flags::SEND_FAST_ZERO)
}

/// The connections of one disk.
#[derive(Debug, Default)]
struct Connections {
    /// Those that are served: something runs on them, or may.
    served: JoinSet<Ended>,
    /// Those that the driver has not left.
    live: JoinSet<()>,
}

/// A socket that is watched for nothing but its end, and for urgent data, which is never sent here: what is received wakes
/// nobody. Must be called within a tokio runtime.
#[expect(
    deprecated,
    reason = "what is asked for instead wants a promise, for types whose descriptor may change: an owned one never does"
)]
fn watched(socket: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(socket, Interest::PRIORITY)
}

/// Waits until either end of a connection has shut it down both ways.
async fn hung_up(socket: AsyncFd<OwnedFd>) {
    if let Err(error) = socket.ready(Interest::PRIORITY).await {
        tracing::debug!("a connection of the kernel's NBD driver is no longer watched: {error}");
    }
}

/// What connections of one disk are made with.
struct Lines {
    session: Session,
    pool: Arc<Pool>,
    siblings: Arc<Siblings>,
    stop: watch::Sender<bool>,
}

impl Lines {
    fn new(session: Session, stop: watch::Sender<bool>) -> Self {
        Self { session, pool: Arc::new(Pool::new(SHARED_BYTES)), siblings: Arc::default(), stop }
    }

    /// Makes connections, which are served from now on, and gives the driver's ends.
    fn open(&self, count: usize, connections: &mut Connections, io: &Handle) -> Result<Vec<UnixStream>> {
        let _within = io.enter();
        let timing = Limits::standard().timing;
        let mut theirs = Vec::with_capacity(count);
        let failed =
            |error: std::io::Error| refused(None, Errno::from_io_error(&error).unwrap_or(Errno::MFILE));
        for _ in 0..count {
            let (ours, other) = UnixStream::pair().map_err(failed)?;
            for end in [&ours, &other] {
                set_socket_send_buffer_size(end, SEND_BUFFER).map_err(|errno| refused(None, errno))?;
            }
            ours.set_nonblocking(true).map_err(failed)?;
            let another = || ours.as_fd().try_clone_to_owned();
            let line = self.siblings.join(another().map_err(failed)?);
            connections.live.spawn_on(hung_up(watched(another().map_err(failed)?).map_err(failed)?), io);
            let ours = tokio::net::UnixStream::from_std(ours).map_err(failed)?;
            let (session, pool, stop) = (self.session.clone(), Arc::clone(&self.pool), self.stop.subscribe());
            connections.served.spawn_on(adopt(ours, session, pool, timing, stop, line), io);
            theirs.push(other);
        }
        Ok(theirs)
    }
}

/// Keeps a disk connected.
struct Keeper {
    number: u32,
    backend: String,
    lines: Lines,
    connections: Connections,
    /// Whether the driver is being told of fresh connections. An error of `None`: the disk is not this volume's any more.
    mending: JoinSet<std::result::Result<(), Option<AttachError>>>,
    /// Of this disk; `None` where there can be none.
    note: Option<Beating>,
}

impl Keeper {
    /// Ends when the driver or the server has said goodbye, with the last connection, whether or not the driver has
    /// answered by then what it was told last.
    async fn keep(mut self) {
        let mut stopping = self.lines.stop.subscribe();
        let mut over = false;
        let mut pause = FIRST_PAUSE;
        let mut mended = Instant::now();
        // When it may be mended next.
        let mut due = mended;
        let mut beats = tokio::time::interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (served, live) = (self.connections.served.len(), self.connections.live.len());
            let lacking = CONNECTIONS.saturating_sub(live);
            let may_mend = served < CONNECTIONS + MOST_UNDEAD && self.mending.is_empty() && !over;
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop), if !over => over = true,
                Some(ended) = self.connections.served.join_next() => match ended {
                    Ok(Ended::ByClient | Ended::Stopped) => over = true,
                    _ if over => {}
                    Ok(ended) => tracing::warn!("a connection of /dev/nbd{} ended: {ended}", self.number),
                    Err(error) => tracing::error!("a connection of /dev/nbd{} died: {error}", self.number),
                },
                // It is replaced, whatever still runs on it.
                Some(_) = self.connections.live.join_next() => {
                    // Those that have held for long were no failure.
                    if mended.elapsed() > 2 * LONGEST_PAUSE {
                        pause = FIRST_PAUSE;
                    }
                    due = Instant::now() + pause;
                }
                Some(told) = self.mending.join_next(), if !over => {
                    match told.unwrap_or(Err(None)) {
                        Ok(()) => tracing::info!("/dev/nbd{} has its connections again", self.number),
                        Err(None) => over = true,
                        Err(Some(error)) => {
                            tracing::warn!("/dev/nbd{} lacks {lacking} connections: {error}", self.number);
                        }
                    }
                    mended = Instant::now();
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    due = mended + pause;
                }
                () = tokio::time::sleep_until(due.into()), if lacking > 0 && may_mend => {
                    if let Err(error) = self.mend(lacking) {
                        tracing::warn!("/dev/nbd{} lacks {lacking} connections: {error}", self.number);
                        pause = (pause * 2).min(LONGEST_PAUSE);
                        due = Instant::now() + pause;
                    }
                }
                // The sockets are asked: who stood still has yet to hear that they were shut down.
                _ = beats.tick(), if !over => {
                    if let Some(note) = self.note.as_ref().filter(|_| self.lines.siblings.is_any_heard()) {
                        note.beat();
                    }
                }
                else => return,
            }
        }
    }

    /// Makes as many connections anew, and begins to tell the driver of them. That may take it long, since it carries out
    /// one order at a time: meanwhile the disk goes on.
    fn mend(&mut self, lacking: usize) -> Result<()> {
        let (number, backend) = (self.number, self.backend.clone());
        let lost = self.note.as_ref().is_some_and(Beating::is_lost);
        if lost && !self.lines.siblings.is_any_heard() {
            tracing::error!(
                "/dev/nbd{number} was without a connection for longer than it waits, and is given up"
            );
            self.mending.spawn_blocking(move || give_up(number, &backend).map_err(Some).and(Err(None)));
            return Ok(());
        }
        let theirs = self.lines.open(lacking, &mut self.connections, &Handle::current())?;
        self.mending.spawn_blocking(move || {
            let refused = |errno| Some(refused(Some(number), errno));
            let driver = Driver::find().map_err(refused)?.ok_or(AttachError::NoNbd)?;
            match driver.reconnect(number, &backend, &theirs) {
                Ok(()) => Ok(()),
                Err(Errno::INVAL) if matches!(driver.stands(number, &backend), Ok(false)) => Err(None),
                Err(errno) => Err(refused(errno)),
            }
        });
        Ok(())
    }
}

/// Ends a disk of this backend, so that it never goes on, whatever the driver thinks of it. Blocks.
pub(super) fn give_up(number: u32, backend: &str) -> std::result::Result<(), AttachError> {
    let refused = |errno| refused(Some(number), errno);
    let Some(disk) = nbd_disk(number).filter(|disk| disk.backend == backend) else { return Ok(()) };
    // First, lest it be taken over after a crash in between.
    Notes::of_machine()?.give_up(&disk)?;
    let driver = Driver::find().map_err(refused)?.ok_or(AttachError::NoNbd)?;
    driver.disconnect(number).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_tells_whose_a_disk_is() {
        let volume = Uuid::from_u128(7);
        let told = backend(volume, "my:vol ume");
        assert_eq!(parse_backend(&told), Some((volume, "my:vol ume")));
        for other in ["", "raid10:", "raid10:x:y", "nbd-server", &volume.to_string()] {
            assert_eq!(parse_backend(other), None, "{other}");
        }
    }
}
