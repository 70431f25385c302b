//! The one check of a request: what it asks must make sense to this export in this session. Afterwards it is trusted.

use super::super::handshake::Session;
use super::super::wire::{self, Command, ErrorCode, Request, StatusFilter, Style};
use super::memory::MIN_CHARGE;
use super::reply::Refusal;
use crate::device::{Durability, ZeroMode, check_range};
use crate::error::{Error, Operation};

/// Extents that one block status tells at most: 64 KiB of reply.
pub(super) const MAX_EXTENTS: usize = 4096;
/// What a block status is charged.
const STATUS_CHARGE: u32 = 16 * MAX_EXTENTS as u32;

/// A request that has passed every check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admitted {
    /// `whole`: in one chunk.
    Read {
        at: u64,
        len: u32,
        whole: bool,
    },
    Write {
        at: u64,
        durability: Durability,
    },
    Flush,
    Trim {
        at: u64,
        len: u64,
        durability: Durability,
    },
    /// `fast`: or not at all.
    WriteZeroes {
        at: u64,
        len: u64,
        mode: ZeroMode,
        durability: Durability,
        fast: bool,
    },
    Cache {
        at: u64,
        len: u64,
    },
    /// `most`: extents that are told.
    Status {
        at: u64,
        len: u64,
        most: usize,
    },
    /// The same; its length comes with the payload.
    FilteredStatus {
        at: u64,
        most: usize,
    },
}

impl Admitted {
    /// Whether it changes what the device holds.
    pub(super) fn is_change(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. })
    }

    /// Bytes of memory it takes until its reply is out.
    pub(super) fn charge(&self, payload: u32) -> u32 {
        let needed = match self {
            Self::Read { len, .. } => *len,
            Self::Status { .. } | Self::FilteredStatus { .. } => STATUS_CHARGE,
            _ => payload,
        };
        needed.max(MIN_CHARGE)
    }
}

/// Flags that a command may carry. `FUA` is for all: clients are known to set it on commands that write nothing.
fn known_flags(session: &Session, command: Command) -> u16 {
    let (chunks, extended) = (session.style >= Style::Structured, session.style == Style::Extended);
    wire::CMD_FLAG_FUA
        | match command {
            Command::Read if chunks => wire::CMD_FLAG_DF,
            Command::Write if extended => wire::CMD_FLAG_PAYLOAD_LEN,
            Command::WriteZeroes => wire::CMD_FLAG_NO_HOLE | wire::CMD_FLAG_FAST_ZERO,
            Command::BlockStatus if extended => wire::CMD_FLAG_REQ_ONE | wire::CMD_FLAG_PAYLOAD_LEN,
            Command::BlockStatus => wire::CMD_FLAG_REQ_ONE,
            _ => 0,
        }
}

fn invalid(text: &'static str) -> Refusal {
    Refusal::new(ErrorCode::Invalid, text)
}

/// Checks a request once.
pub(super) fn admit(session: &Session, request: &Request, stopping: bool) -> Result<Admitted, Refusal> {
    if stopping {
        return Err(Refusal::new(ErrorCode::Shutdown, "the server is stopping"));
    }
    if request.flags & !known_flags(session, request.command) != 0 {
        return Err(invalid("a flag that the command does not have"));
    }
    let flagged = |flag| request.flags & flag != 0;
    let (at, len) = (request.offset, request.length);
    let durability = if flagged(wire::CMD_FLAG_FUA) { Durability::Stable } else { Durability::Cached };
    let carries = matches!(request.command, Command::Read | Command::Write);
    let too_long = carries && len > u64::from(wire::MAX_PAYLOAD);
    let (operation, admitted) = match request.command {
        // With replies in chunks it could be done in parts; the client is told to ask for less instead.
        Command::Read if too_long && session.style >= Style::Structured => {
            return Err(Refusal::new(ErrorCode::Overflow, "a read of more than 32 MiB"));
        }
        Command::Read => {
            let whole = flagged(wire::CMD_FLAG_DF);
            (Operation::Read, Admitted::Read { at, len: len as u32, whole })
        }
        Command::Write if session.style == Style::Extended && !flagged(wire::CMD_FLAG_PAYLOAD_LEN) => {
            return Err(invalid("a write without a payload"));
        }
        Command::Write => (Operation::Write, Admitted::Write { at, durability }),
        Command::Trim => (Operation::Discard, Admitted::Trim { at, len, durability }),
        Command::WriteZeroes => {
            let keep = flagged(wire::CMD_FLAG_NO_HOLE);
            let mode = if keep { ZeroMode::Allocate } else { ZeroMode::MayPunch };
            let fast = flagged(wire::CMD_FLAG_FAST_ZERO);
            (Operation::WriteZeroes, Admitted::WriteZeroes { at, len, mode, durability, fast })
        }
        Command::Cache => (Operation::Read, Admitted::Cache { at, len }),
        Command::BlockStatus => return admit_status(session, request),
        Command::Flush if at == 0 && len == 0 => return Ok(Admitted::Flush),
        Command::Flush => return Err(invalid("a flush has neither offset nor length")),
        Command::Disconnect | Command::Unknown(_) => return Err(invalid("the command is not known")),
    };
    if session.export.read_only && operation != Operation::Read {
        return Err(Refusal::from(&Error::ReadOnly { operation }));
    }
    // What carries nothing may have any length within the device.
    if too_long {
        return Err(invalid("more than 32 MiB in one request"));
    }
    check_range(operation, at, len, session.export.device.size()).map_err(|error| Refusal::from(&error))?;
    Ok(admitted)
}

fn admit_status(session: &Session, request: &Request) -> Result<Admitted, Refusal> {
    if !session.allocation {
        return Err(invalid("no metadata context was chosen"));
    }
    let (at, len) = (request.offset, request.length);
    let most = if request.flags & wire::CMD_FLAG_REQ_ONE == 0 { MAX_EXTENTS } else { 1 };
    if request.flags & wire::CMD_FLAG_PAYLOAD_LEN != 0 {
        if len > StatusFilter::MAX_LEN {
            return Err(invalid("more contexts than there are"));
        }
        return Ok(Admitted::FilteredStatus { at, most });
    }
    check_status(at, len, session.export.device.size())?;
    Ok(Admitted::Status { at, len, most })
}

/// The range of a block status lies within the export and is not empty.
fn check_status(at: u64, len: u64, size: u64) -> Result<(), Refusal> {
    if len == 0 {
        return Err(invalid("the status of nothing"));
    }
    check_range(Operation::Read, at, len, size).map_err(|error| Refusal::from(&error))
}

/// The length that a filtered block status asks for, from its payload.
pub(super) fn admit_filter(at: u64, size: u64, payload: &[u8]) -> Result<u64, Refusal> {
    let filter = StatusFilter::decode(payload).map_err(|_| invalid("the list of contexts is malformed"))?;
    if filter.contexts != [wire::ALLOCATION_ID] {
        return Err(invalid("a context that was not chosen, or one twice"));
    }
    check_status(at, filter.length, size)?;
    Ok(filter.length)
}
