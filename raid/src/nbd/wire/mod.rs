//! The bytes of the NBD protocol and the values they stand for. Pure: no sockets, no state, no allocation whose size
//! a peer chooses (every decoder looks at bytes that are already here, and callers bound how many they gather).
//!
//! All integers are big endian. Layouts, from `doc/proto.md` of the `NetworkBlockDevice` project and its extension
//! `extension-ext-header`:
//!
//! ```text
//! greeting          "NBDMAGIC" u64 · "IHAVEOPT" u64 · handshake flags u16                       server
//! client flags      u32                                                                         client
//! option            "IHAVEOPT" u64 · option u32 · length u32 · payload                          client
//! option reply      magic u64 · option u32 · type u32 · length u32 · payload                    server
//! request           magic u32 · flags u16 · command u16 · cookie u64 · offset u64 · length u32  client (+ payload of WRITE)
//! extended request  magic u32 · flags u16 · command u16 · cookie u64 · offset u64 · length u64  client (+ payload if flagged)
//! simple reply      magic u32 · error u32 · cookie u64                                          server (+ payload of READ)
//! structured chunk  magic u32 · flags u16 · type u16 · cookie u64 · length u32 · payload        server
//! extended chunk    magic u32 · flags u16 · type u16 · cookie u64 · offset u64 · length u64 · payload   server
//! ```
//!
//! Both directions of everything are here, so that a client (and every test) speaks through the same code.
//! `haggling` has the options of the handshake, `request` and `reply` the two directions of the transmission.

mod haggling;
mod reply;
mod request;

pub use haggling::{
    ALLOCATION_CONTEXT, ALLOCATION_ID, ClientOption, ExportQuery, MetaQuery, OPTION_HEADER_LEN, OptionError,
    OptionHeader, OptionReply, info, option,
};
pub use reply::{
    Chunk, ChunkHeader, DONE, Descriptor, ERROR_FIELDS, ErrorCode, HOLE_LEN, SIMPLE_REPLY_LEN, STATE_HOLE,
    STATE_ZERO, SimpleReply, chunk,
};
pub use request::{Command, EXTENDED_REQUEST_LEN, REQUEST_LEN, Request, StatusFilter};

/// First eight bytes from the server: "NBDMAGIC".
pub const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second eight bytes from the server, and the first of every option: "IHAVEOPT".
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Opens every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Opens every request of the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Opens every request once extended headers are negotiated.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Opens every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Opens every chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Opens every chunk of a reply once extended headers are negotiated.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag, and the client's answer to it: options are haggled over with replies to each.
pub const FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag, and the client's answer to it: no 124 zeroes after `EXPORT_NAME`.
pub const NO_ZEROES: u16 = 1 << 1;

/// Transmission flags: what an export can do.
pub mod transmission_flags {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// No writes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// `FUA` is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// It has the characteristics of a rotating disk.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// `TRIM` is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` and `NO_HOLE` are understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `DF` is understood; only once replies come in chunks.
    pub const SEND_DF: u16 = 1 << 7;
    /// `FLUSH` and `FUA` count for the writes of all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `CACHE` is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `FAST_ZERO` is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// `BLOCK_STATUS` may come with a payload that says which contexts are meant.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Command flag: durable before the reply.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of `WRITE_ZEROES`: keep the space allocated.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag of `READ`: all of it in one chunk.
pub const CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag of `BLOCK_STATUS`: one extent is enough.
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag of `WRITE_ZEROES`: fail rather than be as slow as a write.
pub const CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag of extended requests: the length is that of a payload that follows.
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// The longest string (export name, description, query, message) the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;
/// Most bytes that one `READ` or `WRITE` may carry; advertised as the maximum block size.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// How requests and replies are framed, as the handshake has settled it. A later one includes what the earlier can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Style {
    /// Short requests, one simple reply each: all that Linux's own client speaks.
    Simple,
    /// Short requests, replies in chunks.
    Structured,
    /// Requests with 64 bits of length, replies in chunks.
    Extended,
}

impl Style {
    /// Length of a request's header.
    #[must_use]
    pub const fn request_len(self) -> usize {
        match self {
            Self::Simple | Self::Structured => REQUEST_LEN,
            Self::Extended => EXTENDED_REQUEST_LEN,
        }
    }

    /// What a request begins with.
    #[must_use]
    pub const fn request_magic(self) -> u32 {
        match self {
            Self::Simple | Self::Structured => REQUEST_MAGIC,
            Self::Extended => EXTENDED_REQUEST_MAGIC,
        }
    }
}

/// Why bytes are not what the protocol says they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A magic number is wrong: the peer speaks something else, or has lost the place.
    #[error("wrong magic number {found:#x}, expected {expected:#x}")]
    Magic {
        /// What came.
        found: u64,
        /// What should have come.
        expected: u64,
    },
    /// Fewer bytes than the fields need.
    #[error("too short")]
    TooShort,
    /// Bytes are left after the last field.
    #[error("{0} bytes too many")]
    TrailingBytes(usize),
    /// A string is longer than [`MAX_STRING`].
    #[error("a string of {0} bytes, more than 4096")]
    StringTooLong(usize),
    /// A string is not UTF-8.
    #[error("a string that is not UTF-8")]
    NotUtf8,
    /// A chunk of a type that is not known here.
    #[error("a chunk of the unknown type {0:#x}")]
    ChunkType(u16),
}

fn expect_magic(found: u64, expected: u64) -> Result<(), Malformed> {
    if found == expected { Ok(()) } else { Err(Malformed::Magic { found, expected }) }
}

fn string(bytes: &[u8]) -> Result<String, Malformed> {
    if bytes.len() > MAX_STRING {
        return Err(Malformed::StringTooLong(bytes.len()));
    }
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Malformed::NotUtf8)
}

/// The part of a text that fits into a string of the protocol.
fn fitting(text: &str) -> &str {
    let mut end = text.len().min(MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn nothing_left(rest: &[u8]) -> Result<(), Malformed> {
    if rest.is_empty() { Ok(()) } else { Err(Malformed::TrailingBytes(rest.len())) }
}
