//! What can go wrong in this crate: one enum, a variant a cause, each carrying what the reader needs to act.
//! [`Error::errno`] is the one place where a cause becomes an errno (and from there an NBD error).

use crate::bitmap::BitmapError;
use crate::geometry::{GeometryError, Layout};
use crate::superblock::SuperblockError;
use rustix::io::Errno;
use std::time::Duration;
use uuid::Uuid;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// What an input or output operation was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Opening a file or block device.
    Open,
    /// Reading bytes.
    Read,
    /// Writing bytes.
    Write,
    /// Making completed writes durable.
    Flush,
    /// Giving space back.
    Discard,
    /// Writing zeroes without a payload.
    WriteZeroes,
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write zeroes",
        })
    }
}

/// A cause of failure.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A volume could not be attached or detached.
    #[error(transparent)]
    Attach(#[from] crate::attach::AttachError),
    /// A request reaches past the end of the device. Units: bytes.
    #[error("{operation} of {len} bytes at {at} reaches past the end of the device ({size} bytes)")]
    OutOfBounds {
        /// What was asked.
        operation: Operation,
        /// First byte asked for.
        at: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the device in bytes.
        size: u64,
    },
    /// A change was asked of a device that is open for reading only.
    #[error("{operation} refused: the device is read-only")]
    ReadOnly {
        /// What was asked.
        operation: Operation,
    },
    /// A command to a volume that is served read-only.
    #[error("volume `{name}` is served read-only: serve it without --read-only to change it")]
    ServedReadOnly {
        /// The volume's name.
        name: String,
    },
    /// The operating system, or a simulated disk, failed an operation.
    #[error("{device}: {operation} of {len} bytes at {at} failed: {}", words(*errno))]
    Io {
        /// Path or name of the device.
        device: String,
        /// What was asked.
        operation: Operation,
        /// First byte concerned.
        at: u64,
        /// Bytes concerned.
        len: u64,
        /// What the system said.
        errno: Errno,
    },
    /// A member has not answered for so long that it is taken out. What it was asked may still happen.
    #[error("{device}: {operation} was not answered within {} s", limit.as_secs())]
    Stalled {
        /// Path or name of the device.
        device: String,
        /// What was asked.
        operation: Operation,
        /// How long it was waited for.
        limit: Duration,
    },
    /// What a member was asked before it was taken out may still happen.
    #[error(
        "{device} was taken out while it did not answer, and still has not: it cannot be let go or come back before it \
             has; use another device meanwhile, or start the volume again without it"
    )]
    Unanswered {
        /// The member.
        device: String,
    },
    /// A file or block device could not be opened.
    #[error("cannot open {device}: {}{}", words(*errno), open_hint(*errno))]
    Open {
        /// Path of the device.
        device: String,
        /// What the system said.
        errno: Errno,
    },
    /// A file cannot be read and written past the page cache.
    #[error(
        "{device} cannot be opened for direct I/O (its file system has none, or in blocks over 4096 bytes); leave --direct out"
    )]
    NoDirect {
        /// Path of the device.
        device: String,
    },
    /// Somebody else listens there.
    #[error("cannot listen on {address}: it is in use; stop who holds it or choose another address")]
    AddressInUse {
        /// As the user wrote it.
        address: String,
    },
    /// A socket could not be set up.
    #[error("cannot listen on {address}: {}", words(*errno))]
    Listen {
        /// As the user wrote it.
        address: String,
        /// What the system said.
        errno: Errno,
    },
    /// A host name that means nothing here.
    #[error("cannot listen on {address}: the host is unknown")]
    UnknownHost {
        /// As the user wrote it.
        address: String,
    },
    /// Other machines would reach the data in plain text.
    #[error(
        "refusing to listen on {address}: other machines reach it and the connection is not encrypted; \
         require TLS with --tls-certificates, use a loopback address or unix:PATH, or allow it with --insecure-tcp"
    )]
    PlaintextRemote {
        /// As the user wrote it.
        address: String,
    },
    /// A file that TLS needs cannot be used.
    #[error("{path}: {cause}")]
    Certificate {
        /// The file.
        path: String,
        /// Why.
        cause: CertificateError,
    },
    /// What a service manager passed is no socket to listen on.
    #[error(
        "socket number {number} that was passed by LISTEN_FDS is no listening TCP or Unix socket: {errno}"
    )]
    PassedSocket {
        /// From 0.
        number: usize,
        /// What the system said.
        errno: Errno,
    },
    /// A service manager passed something else than a few sockets.
    #[error("LISTEN_FDS={count} is not a number of sockets from 1 to 64")]
    PassedSockets {
        /// As it was found.
        count: String,
    },
    /// Somebody else holds the device open for writing.
    #[error("{device} is in use by another process, or was named twice; stop whoever serves it first")]
    InUse {
        /// Path or name of the device.
        device: String,
    },
    /// A device has no usable superblock.
    #[error("{device}: {cause}")]
    Superblock {
        /// Path or name of the device.
        device: String,
        /// What is wrong with it.
        cause: SuperblockError,
    },
    /// A member has no usable bitmap.
    #[error("{device}: {cause}")]
    Bitmap {
        /// Path or name of the device.
        device: String,
        /// What is wrong with it.
        cause: BitmapError,
    },
    /// A new array cannot have the bitmap that was asked for.
    #[error(transparent)]
    BitmapAsked(BitmapError),
    /// A member's own record cannot be written.
    #[error("{device}: {cause}")]
    Record {
        /// Path or name of the device.
        device: String,
        /// Why not.
        cause: crate::record::RecordError,
    },
    /// An array was to be started or made from nothing.
    #[error("no members were named; name the files or block devices of one array")]
    NoMembers,
    /// The members named belong to different arrays.
    #[error(
        "{device} belongs to array {array} and {other} to array {other_array}; name the members of one array only"
    )]
    MixedArrays {
        /// A member.
        device: String,
        /// Its array.
        array: Uuid,
        /// A member of another array.
        other: String,
        /// That other array.
        other_array: Uuid,
    },
    /// The same member came twice, perhaps as a copy.
    #[error(
        "{device} and {other} are the same member of the array (one is a copy, or was named twice); leave one out"
    )]
    MemberTwice {
        /// A member.
        device: String,
        /// The same again.
        other: String,
    },
    /// A member describes the array otherwise than the member with the most events.
    #[error(
        "{device} describes the array otherwise than {other} (layout, chunk or size); leave {device} out"
    )]
    Disagreement {
        /// A member.
        device: String,
        /// The freshest member.
        other: String,
    },
    /// Two members ran apart: each has recorded the other as failed.
    #[error(
        "{device} and {other} went on apart, each without the other, and hold different data; \
             choose one and leave the other out"
    )]
    Diverged {
        /// A member.
        device: String,
        /// The freshest member.
        other: String,
    },
    /// A chunk would have no copy.
    #[error("array {name}: slots {missing:?} have no current member, and some data lies only there; \
             name more of its members{}", stale_hint(.stale))]
    NotEnoughMembers {
        /// The array's name, or its UUID where it has none.
        name: String,
        /// Slots without a current member.
        missing: Vec<usize>,
        /// Members that were named but are stale.
        stale: Vec<String>,
    },
    /// A layout or geometry is impossible.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A name that does not fit in a superblock.
    #[error("the array name `{0}` must have 1 to 32 bytes, none of them a control character or slash")]
    Name(String),
    /// A device is too small to be a member.
    #[error("{device} has {size} bytes and needs at least {needed} to be a member")]
    TooSmall {
        /// Path or name of the device.
        device: String,
        /// Its bytes.
        size: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The system does not tell how large an open device is.
    #[error("cannot tell how large {device} is: {}", words(*errno))]
    Size {
        /// Path or name of the device.
        device: String,
        /// What the system said.
        errno: Errno,
    },
    /// A device has become smaller while it was open: what lay behind its new end is lost.
    #[error(
        "{device} was cut short from {promised} to {size} bytes; what lay there is lost: take it out of the array"
    )]
    Shrank {
        /// Path or name of the device.
        device: String,
        /// Its bytes before.
        promised: u64,
        /// Its bytes now.
        size: u64,
    },
    /// A device holds something that creation would destroy.
    #[error(
        "{device} already holds {what}; creating an array destroys it: `raid10 create --force` does, if that is meant"
    )]
    HoldsData {
        /// Path or name of the device.
        device: String,
        /// What was found on it.
        what: String,
    },
    /// A member to be is not there, and nothing says how large it should be made.
    #[error("{device} does not exist; check the path, or make it with --size")]
    NoSuchMember {
        /// Path of the device.
        device: String,
    },
    /// Of all members that were named, none is there.
    #[error("none of the named members exists ({}); check the paths", .0.join(", "))]
    NoneExists(Vec<String>),
    /// The directory of served volumes cannot be used.
    #[error("cannot use the runtime directory {path}: {}; set RAID10_RUNTIME_DIR to one of your own", words(*errno))]
    RuntimeDir {
        /// Where it should be.
        path: String,
        /// What the system said.
        errno: Errno,
    },
    /// No process serves what was asked for.
    #[error("{volume} is not being served (looked in {}); {hint}", .dir)]
    NotServed {
        /// As the user named it.
        volume: String,
        /// The runtime directory.
        dir: String,
        /// What to do.
        hint: &'static str,
    },
    /// Several served volumes have the name.
    #[error("several served volumes are called {name}; use the UUID: {}", .uuids.join(", "))]
    Ambiguous {
        /// The name.
        name: String,
        /// Who has it.
        uuids: Vec<String>,
    },
    /// A control socket that cannot be connected to.
    #[error("cannot reach the process that serves the volume at {socket}: {}", words(*errno))]
    ControlUnreachable {
        /// Path of the socket.
        socket: String,
        /// What the system said.
        errno: Errno,
    },
    /// A server that does not say how its volume is.
    #[error(
        "the process that serves the volume at {socket} has not answered for {} s: it stands still, or has no time",
        .seconds
    )]
    ControlSilent {
        /// Path of the socket.
        socket: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A control connection that broke or made no sense.
    #[error("the process that serves the volume at {socket} gave no proper answer: {cause}")]
    ControlBroken {
        /// Path of the socket.
        socket: String,
        /// What went wrong.
        cause: String,
    },
    /// A command names a member that the volume does not have.
    #[error("volume {volume} has no member {member}; `raid10 status` shows its members")]
    UnknownMember {
        /// The volume's name.
        volume: String,
        /// As it was named.
        member: String,
    },
    /// A device to be added belongs to the volume already.
    #[error("{device} is a member of volume {volume} already ({what}){}", held_hint(*.failed))]
    AlreadyMember {
        /// Path of the device.
        device: String,
        /// The volume's name.
        volume: String,
        /// What it is there.
        what: String,
        /// Whether it failed and is still held.
        failed: bool,
    },
    /// Limits that contradict each other.
    #[error(
        "the speed must be at least {min} and at most {max} bytes a second: no speed is both; name both limits"
    )]
    SpeedLimits {
        /// The lower one.
        min: u64,
        /// The upper one.
        max: u64,
    },
    /// A request to the control socket that is not one.
    #[error("the request makes no sense: {0}; both sides must be of one version")]
    BadRequest(String),
    /// A volume was waited for, and is not served any more.
    #[error("volume {name} was stopped while it was waited for; serve it again, and it goes on where it was")]
    Gone {
        /// The volume's name.
        name: String,
    },
    /// A volume was waited for, and failed.
    #[error(
        "volume {name} failed: some data has no copy that is known to be good; `raid10 status` shows its members"
    )]
    WaitedForFailed {
        /// The volume's name.
        name: String,
    },
    /// A scrub did not come to its end.
    #[error("the scrub of volume {name} stopped before its end: {cause}; start it again")]
    ScrubStopped {
        /// The volume's name.
        name: String,
        /// Why.
        cause: String,
    },
    /// A program to be run on events cannot be.
    #[error("cannot run {program} on events: {}; name an executable file", words(*errno))]
    NoProgram {
        /// As the user named it.
        program: String,
        /// What the system said.
        errno: Errno,
    },
    /// The system does not give this process what it needs to run (threads, signals).
    #[error("cannot start: {}", words(*errno))]
    Runtime {
        /// What the system said.
        errno: Errno,
    },
    /// What the process that serves a volume answered.
    #[error("{0}")]
    Remote(String),
    /// The volume is being stopped.
    #[error("volume {name} is stopped")]
    Stopped {
        /// The volume's name.
        name: String,
    },
    /// The last copy failed to become durable: data that was acknowledged may be lost.
    #[error(
        "volume {name} failed: its last copy of some data could not be made durable; it is read-only until it is \
             started again"
    )]
    Failed {
        /// The volume's name.
        name: String,
    },
    /// A command names no member.
    #[error("volume {volume} has no member {name}; `raid10 status {volume}` lists them")]
    NoSuchSlot {
        /// As it was named.
        name: String,
        /// The volume's name.
        volume: String,
    },
    /// It was failed before.
    #[error("{device} has failed already; `raid10 remove` lets it go")]
    AlreadyFailed {
        /// The member.
        device: String,
    },
    /// Without it, data would be lost.
    #[error(
        "{device} holds the last good copy of some data and stays; add a device and wait for its rebuild first, or \
             replace it"
    )]
    LastCopy {
        /// The member.
        device: String,
    },
    /// It is read or written.
    #[error("{device} is in use; `raid10 fail` it first, then remove it")]
    MemberInUse {
        /// The member.
        device: String,
    },
    /// Only a member that works can be replaced.
    #[error("{device} is not in sync, so nothing can be copied from it; add the new device instead")]
    NotReplaceable {
        /// The member.
        device: String,
    },
    /// A replacement is under way.
    #[error("{device} is being replaced already; wait for that, or fail and remove its replacement first")]
    ReplacedAlready {
        /// The member.
        device: String,
    },
    /// A device that belongs elsewhere.
    #[error(
        "{device} is a member of array {array}; use another device, or add it with --force, which takes it from there"
    )]
    OtherArray {
        /// The device.
        device: String,
        /// Its array.
        array: Uuid,
    },
    /// A device failed before it was a full member.
    #[error("{device} failed while it was being filled and is taken out; its log line says why")]
    JoinFailed {
        /// The device.
        device: String,
    },
    /// Its list of bad blocks is full.
    #[error("{device} has more bad blocks than its list can hold")]
    TooManyBadBlocks {
        /// The member.
        device: String,
    },
    /// The copies of an array would have to move.
    #[error(
        "volume {name} cannot grow: the copies of its layout ({layout}) would have to move; make a new array"
    )]
    GrowFar {
        /// The volume's name.
        name: String,
        /// Its layout.
        layout: Layout,
    },
    /// A member would be left behind.
    #[error(
        "volume {name} grows only while all its slots are in sync and no member is being filled; wait for that"
    )]
    GrowNotInSync {
        /// The volume's name.
        name: String,
    },
    /// Not all members have become larger.
    #[error(
        "volume {name} cannot grow: all its members, spares too, must have grown first ({})", sizes(.members)
    )]
    NothingToGain {
        /// The volume's name.
        name: String,
        /// Each member and its bytes.
        members: Vec<(String, u64)>,
    },
    /// A scrub was asked for while one runs.
    #[error("volume {name} is being scrubbed already; wait for its end, or cancel it first")]
    ScrubRunning {
        /// The volume's name.
        name: String,
    },
    /// The role table is full.
    #[error("all {count} device numbers of the array are taken; remove failed members first")]
    NoNumberLeft {
        /// Numbers there are.
        count: usize,
    },
    /// No copy of a range could be read.
    #[error("volume {name}: no readable copy of {len} bytes at {at}")]
    NoCopy {
        /// The volume's name.
        name: String,
        /// First byte.
        at: u64,
        /// Bytes.
        len: u64,
    },
}

fn sizes(members: &[(String, u64)]) -> String {
    let sizes: Vec<String> =
        members.iter().map(|(device, bytes)| format!("{device} has {bytes} bytes")).collect();
    sizes.join(", ")
}

fn stale_hint(stale: &[String]) -> String {
    if stale.is_empty() { String::new() } else { format!(" ({} is out of date)", stale.join(", ")) }
}

fn held_hint(failed: bool) -> &'static str {
    if failed { "; `raid10 remove` lets it go first" } else { "" }
}

/// What the system calls an errno, without its number.
pub(crate) fn words(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

fn open_hint(errno: Errno) -> &'static str {
    match errno {
        Errno::NOENT => "; check the path",
        Errno::ACCESS | Errno::PERM => "; run as a user who may read and write it",
        Errno::NOTBLK | Errno::ISDIR => "; a member is a regular file or a block device",
        _ => "",
    }
}

impl Error {
    /// The errno a client of a block device expects for this cause.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::OutOfBounds { operation: Operation::Write | Operation::WriteZeroes, .. }
            | Self::NoNumberLeft { .. } => Errno::NOSPC,
            Self::ReadOnly { .. } | Self::ServedReadOnly { .. } => Errno::PERM,
            Self::Io { errno, .. }
            | Self::Open { errno, .. }
            | Self::Size { errno, .. }
            | Self::Listen { errno, .. }
            | Self::RuntimeDir { errno, .. }
            | Self::Runtime { errno }
            | Self::NoProgram { errno, .. }
            | Self::PassedSocket { errno, .. }
            | Self::Certificate { cause: CertificateError::Unreadable(errno), .. }
            | Self::ControlUnreachable { errno, .. } => *errno,
            Self::Attach(cause) => cause.errno(),
            Self::NoSuchMember { .. }
            | Self::NoneExists(_)
            | Self::NotServed { .. }
            | Self::UnknownMember { .. } => Errno::NOENT,
            Self::AddressInUse { .. } => Errno::ADDRINUSE,
            Self::UnknownHost { .. } => Errno::ADDRNOTAVAIL,
            Self::PlaintextRemote { .. } => Errno::ACCESS,
            Self::InUse { .. }
            | Self::AlreadyMember { .. }
            | Self::AlreadyFailed { .. }
            | Self::LastCopy { .. }
            | Self::MemberInUse { .. }
            | Self::ScrubRunning { .. }
            | Self::GrowNotInSync { .. }
            | Self::Unanswered { .. }
            | Self::ReplacedAlready { .. } => Errno::BUSY,
            Self::Stopped { .. } | Self::Gone { .. } => Errno::SHUTDOWN,
            Self::ControlSilent { .. } | Self::Stalled { .. } => Errno::TIMEDOUT,
            Self::OutOfBounds { .. }
            | Self::NoDirect { .. }
            | Self::Certificate { .. }
            | Self::PassedSockets { .. }
            | Self::NoMembers
            | Self::MixedArrays { .. }
            | Self::MemberTwice { .. }
            | Self::Disagreement { .. }
            | Self::Geometry(_)
            | Self::Name(_)
            | Self::Ambiguous { .. }
            | Self::SpeedLimits { .. }
            | Self::BadRequest(_)
            | Self::TooSmall { .. }
            | Self::BitmapAsked(_)
            | Self::NoSuchSlot { .. }
            | Self::NotReplaceable { .. }
            | Self::GrowFar { .. }
            | Self::NothingToGain { .. }
            | Self::OtherArray { .. }
            | Self::HoldsData { .. } => Errno::INVAL,
            Self::Superblock { .. }
            | Self::JoinFailed { .. }
            | Self::Record { .. }
            | Self::TooManyBadBlocks { .. }
            | Self::Bitmap { .. }
            | Self::Diverged { .. }
            | Self::ControlBroken { .. }
            | Self::Remote(_)
            | Self::WaitedForFailed { .. }
            | Self::ScrubStopped { .. }
            | Self::NotEnoughMembers { .. }
            | Self::Failed { .. }
            | Self::Shrank { .. }
            | Self::NoCopy { .. } => Errno::IO,
        }
    }

    /// Whether the cause lies in the request or in the space left, not in the device: such an error says nothing
    /// against a member, and must not evict it. A failed flush always speaks against it, whatever its errno: what
    /// was in the cache is lost.
    #[must_use]
    pub fn spares_device(&self) -> bool {
        match self {
            Self::OutOfBounds { .. }
            | Self::ReadOnly { .. }
            | Self::ServedReadOnly { .. }
            | Self::Stopped { .. } => true,
            Self::Io { operation: Operation::Flush, .. } => false,
            Self::Io { errno, .. } => {
                const CLIENTS: [Errno; 5] =
                    [Errno::NOSPC, Errno::DQUOT, Errno::INVAL, Errno::FBIG, Errno::OPNOTSUPP];
                // The process ends, or has no memory: the device has not been asked.
                const OURS: [Errno; 4] = [Errno::SHUTDOWN, Errno::CANCELED, Errno::NOMEM, Errno::INTR];
                CLIENTS.contains(errno) || OURS.contains(errno)
            }
            _ => false,
        }
    }
}

/// Why a file that TLS needs cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CertificateError {
    /// The system would not let us.
    #[error("cannot be read: {0}; --tls-certificates names the directory where it should be")]
    Unreadable(Errno),
    /// It is something else.
    #[error("not a PEM file: {0}")]
    NotPem(String),
    /// A PEM file without what it should hold.
    #[error("holds no certificate, key or list that can be used")]
    NothingThere,
    /// The certificate, its key or the list does not do.
    #[error("not usable: {0}")]
    Rejected(tokio_rustls::rustls::Error),
}
