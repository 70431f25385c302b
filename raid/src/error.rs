//! What can go wrong in this crate: one enum, a variant a cause, each carrying what the reader needs to act.
//! [`Error::errno`] is the one place where a cause becomes an errno (and from there an NBD error).

use rustix::io::Errno;

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
    /// The operating system, or a simulated disk, failed an operation.
    #[error("{device}: {operation} of {len} bytes at {at} failed: {errno}")]
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
    /// Somebody else listens there.
    #[error("cannot listen on {address}: it is in use; stop who holds it or choose another address")]
    AddressInUse {
        /// As the user wrote it.
        address: String,
    },
    /// A socket could not be set up.
    #[error("cannot listen on {address}: {errno}")]
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
         use a loopback address or unix:PATH, or allow it with --allow-plaintext-remote"
    )]
    PlaintextRemote {
        /// As the user wrote it.
        address: String,
    },
}

impl Error {
    /// The errno a client of a block device expects for this cause.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::OutOfBounds { operation: Operation::Write | Operation::WriteZeroes, .. } => Errno::NOSPC,
            Self::OutOfBounds { .. } => Errno::INVAL,
            Self::ReadOnly { .. } => Errno::PERM,
            Self::Io { errno, .. } | Self::Listen { errno, .. } => *errno,
            Self::AddressInUse { .. } => Errno::ADDRINUSE,
            Self::UnknownHost { .. } => Errno::ADDRNOTAVAIL,
            Self::PlaintextRemote { .. } => Errno::ACCESS,
        }
    }
}
