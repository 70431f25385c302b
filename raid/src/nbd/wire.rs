//! The bytes of the NBD protocol and the values they stand for. Pure: no sockets, no state, no allocation whose size
//! a peer chooses (every decoder looks at bytes that are already here, and callers bound how many they gather).
//!
//! All integers are big endian. Layouts, from `doc/proto.md` of the `NetworkBlockDevice` project:
//!
//! ```text
//! greeting      "NBDMAGIC" u64 · "IHAVEOPT" u64 · handshake flags u16                       server
//! client flags  u32                                                                         client
//! option        "IHAVEOPT" u64 · option u32 · length u32 · payload                          client
//! option reply  magic u64 · option u32 · type u32 · length u32 · payload                    server
//! request       magic u32 · flags u16 · command u16 · cookie u64 · offset u64 · length u32  client (+ payload of WRITE)
//! simple reply  magic u32 · error u32 · cookie u64                                          server (+ payload of READ)
//! ```
//!
//! Both directions of everything are here, so that a client (and every test) speaks through the same code.

use bytes::{Buf, BufMut};
use rustix::io::Errno;

/// First eight bytes from the server: "NBDMAGIC".
pub const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second eight bytes from the server, and the first of every option: "IHAVEOPT".
pub const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Opens every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Opens every request of the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Opens every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

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
    /// `TRIM` is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` and `NO_HOLE` are understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// `FLUSH` and `FUA` count for the writes of all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Command flag: durable before the reply.
pub const CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of `WRITE_ZEROES`: keep the space allocated.
pub const CMD_FLAG_NO_HOLE: u16 = 1 << 1;

/// The longest string (export name, description, query) the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;
/// Most bytes that one `READ` or `WRITE` may carry; advertised as the maximum block size.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Length of an option's header.
pub const OPTION_HEADER_LEN: usize = 16;
/// Length of a request's header.
pub const REQUEST_LEN: usize = 28;
/// Length of a simple reply's header.
pub const SIMPLE_REPLY_LEN: usize = 16;

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
}

/// Numbers of the options this house knows.
pub mod option {
    /// Choose an export and start, without a reply if it fails.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export and start.
    pub const GO: u32 = 7;
}

/// Which piece of information `INFO` and `GO` ask and answer.
pub mod info {
    /// Size and transmission flags; always answered.
    pub const EXPORT: u16 = 0;
    /// The export's canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// The header of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// One of [`option`], or something unknown.
    pub option: u32,
    /// Bytes of payload that follow. A peer's word: not to be trusted for allocation.
    pub length: u32,
}

impl OptionHeader {
    /// Appends the header to `out`.
    pub fn encode(self, out: &mut impl BufMut) {
        out.put_u64(OPTION_MAGIC);
        out.put_u32(self.option);
        out.put_u32(self.length);
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8; OPTION_HEADER_LEN]) -> Result<Self, Malformed> {
        let mut bytes = &bytes[..];
        expect_magic(bytes.get_u64(), OPTION_MAGIC)?;
        Ok(Self { option: bytes.get_u32(), length: bytes.get_u32() })
    }
}

/// What a client asks for during the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientOption {
    /// Start with the export of that name, or hang up.
    ExportName(String),
    /// End the session.
    Abort,
    /// List the exports.
    List,
    /// Describe an export.
    Info(ExportQuery),
    /// Start with an export.
    Go(ExportQuery),
    /// Something this house does not speak, by number.
    Unknown(u32),
}

/// The payload of `INFO` and `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportQuery {
    /// Which export; empty for the default one.
    pub name: String,
    /// What to tell about it, by the numbers of [`info`].
    pub information: Vec<u16>,
}

impl ClientOption {
    /// Reads the payload of option number `option`. `payload` is all of it, already bounded by the caller.
    pub fn decode(option: u32, payload: &[u8]) -> Result<Self, Malformed> {
        match option {
            option::EXPORT_NAME => Ok(Self::ExportName(string(payload)?)),
            // What comes with ABORT does not matter any more.
            option::ABORT => Ok(Self::Abort),
            option::LIST if payload.is_empty() => Ok(Self::List),
            option::LIST => Err(Malformed::TrailingBytes(payload.len())),
            option::INFO => Ok(Self::Info(ExportQuery::decode(payload)?)),
            option::GO => Ok(Self::Go(ExportQuery::decode(payload)?)),
            unknown => Ok(Self::Unknown(unknown)),
        }
    }

    /// Appends header and payload to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        let option = match self {
            Self::ExportName(name) => {
                payload.put_slice(name.as_bytes());
                option::EXPORT_NAME
            }
            Self::Abort => option::ABORT,
            Self::List => option::LIST,
            Self::Info(query) => {
                query.encode(&mut payload);
                option::INFO
            }
            Self::Go(query) => {
                query.encode(&mut payload);
                option::GO
            }
            Self::Unknown(number) => *number,
        };
        OptionHeader { option, length: payload.len() as u32 }.encode(out);
        out.put_slice(&payload);
    }
}

impl ExportQuery {
    fn decode(mut payload: &[u8]) -> Result<Self, Malformed> {
        let length = payload.try_get_u32().map_err(|_| Malformed::TooShort)? as usize;
        if length > MAX_STRING {
            return Err(Malformed::StringTooLong(length));
        }
        let (name, mut rest) = payload.split_at_checked(length).ok_or(Malformed::TooShort)?;
        let name = string(name)?;
        let count = usize::from(rest.try_get_u16().map_err(|_| Malformed::TooShort)?);
        match rest.len().cmp(&(2 * count)) {
            std::cmp::Ordering::Less => return Err(Malformed::TooShort),
            std::cmp::Ordering::Greater => return Err(Malformed::TrailingBytes(rest.len() - 2 * count)),
            std::cmp::Ordering::Equal => {}
        }
        let information = rest.chunks_exact(2).map(|two| u16::from_be_bytes([two[0], two[1]])).collect();
        Ok(Self { name, information })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.put_u32(self.name.len() as u32);
        out.put_slice(self.name.as_bytes());
        out.put_u16(self.information.len() as u16);
        for number in &self.information {
            out.put_u16(*number);
        }
    }
}

/// Why the server does not do what an option asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum OptionError {
    /// The option is not known here.
    Unsupported = (1 << 31) + 1,
    /// Known, but not allowed.
    Policy = (1 << 31) + 2,
    /// The payload is malformed.
    Invalid = (1 << 31) + 3,
    /// No export has that name.
    UnknownExport = (1 << 31) + 6,
    /// The server is stopping.
    Shutdown = (1 << 31) + 7,
    /// The payload is longer than the server takes.
    TooBig = (1 << 31) + 9,
}

/// What the server answers an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// Done; the last reply to an option.
    Ack,
    /// One of the exports, in answer to `LIST`.
    Server(String),
    /// Size in bytes and transmission flags.
    Export {
        /// Size in bytes.
        size: u64,
        /// See [`transmission_flags`].
        flags: u16,
    },
    /// The export's canonical name.
    Name(String),
    /// Text for people.
    Description(String),
    /// Block sizes in bytes.
    BlockSize {
        /// Smallest unit of offsets and lengths.
        minimum: u32,
        /// What performs best.
        preferred: u32,
        /// Most bytes of payload in one request.
        maximum: u32,
    },
    /// Refused, with a sentence for people.
    Error(OptionError, String),
}

const REPLY_ACK: u32 = 1;
const REPLY_SERVER: u32 = 2;
const REPLY_INFO: u32 = 3;

impl OptionReply {
    /// Appends the reply to option number `option` to `out`.
    pub fn encode(&self, option: u32, out: &mut impl BufMut) {
        let (kind, length) = match self {
            Self::Ack => (REPLY_ACK, 0),
            Self::Server(name) => (REPLY_SERVER, 4 + name.len()),
            Self::Export { .. } => (REPLY_INFO, 12),
            Self::Name(text) | Self::Description(text) => (REPLY_INFO, 2 + text.len()),
            Self::BlockSize { .. } => (REPLY_INFO, 14),
            Self::Error(error, text) => (*error as u32, text.len()),
        };
        out.put_u64(OPTION_REPLY_MAGIC);
        out.put_u32(option);
        out.put_u32(kind);
        out.put_u32(length as u32);
        match self {
            Self::Ack => {}
            Self::Server(name) => {
                out.put_u32(name.len() as u32);
                out.put_slice(name.as_bytes());
            }
            Self::Export { size, flags } => {
                out.put_u16(info::EXPORT);
                out.put_u64(*size);
                out.put_u16(*flags);
            }
            Self::Name(text) => {
                out.put_u16(info::NAME);
                out.put_slice(text.as_bytes());
            }
            Self::Description(text) => {
                out.put_u16(info::DESCRIPTION);
                out.put_slice(text.as_bytes());
            }
            Self::BlockSize { minimum, preferred, maximum } => {
                out.put_u16(info::BLOCK_SIZE);
                out.put_u32(*minimum);
                out.put_u32(*preferred);
                out.put_u32(*maximum);
            }
            Self::Error(_, text) => out.put_slice(text.as_bytes()),
        }
    }
}

/// A command of the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read a range.
    Read,
    /// Write a range; the payload follows the header.
    Write,
    /// End the session; has no reply.
    Disconnect,
    /// Make all writes replied to durable.
    Flush,
    /// Give space back.
    Trim,
    /// Write zeroes without a payload.
    WriteZeroes,
    /// Something this house does not speak, by number.
    Unknown(u16),
}

impl From<u16> for Command {
    fn from(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            6 => Self::WriteZeroes,
            unknown => Self::Unknown(unknown),
        }
    }
}

impl From<Command> for u16 {
    fn from(command: Command) -> Self {
        match command {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::WriteZeroes => 6,
            Command::Unknown(number) => number,
        }
    }
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Bits of `CMD_FLAG_…`.
    pub flags: u16,
    /// What to do.
    pub command: Command,
    /// The client's name for the request; the reply carries it.
    pub cookie: u64,
    /// First byte concerned.
    pub offset: u64,
    /// Bytes concerned. A peer's word: not to be trusted for allocation.
    pub length: u32,
}

impl Request {
    /// Appends the header to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u32(REQUEST_MAGIC);
        out.put_u16(self.flags);
        out.put_u16(self.command.into());
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        out.put_u32(self.length);
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, Malformed> {
        let mut bytes = &bytes[..];
        expect_magic(bytes.get_u32().into(), REQUEST_MAGIC.into())?;
        Ok(Self {
            flags: bytes.get_u16(),
            command: bytes.get_u16().into(),
            cookie: bytes.get_u64(),
            offset: bytes.get_u64(),
            length: bytes.get_u32(),
        })
    }
}

/// The errors that may go over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ErrorCode {
    /// Not permitted: the export is read-only.
    Permission = 1,
    /// The device failed.
    Io = 5,
    /// Out of memory.
    NoMemory = 12,
    /// The request makes no sense.
    Invalid = 22,
    /// Past the end of the device, or its storage is full.
    NoSpace = 28,
    /// Too long a request.
    Overflow = 75,
    /// Understood but not supported here.
    NotSupported = 95,
    /// The server is stopping.
    Shutdown = 108,
}

impl From<&crate::Error> for ErrorCode {
    /// The one place where a cause becomes an error of the wire.
    fn from(error: &crate::Error) -> Self {
        match error.errno() {
            Errno::PERM | Errno::ROFS | Errno::ACCESS => Self::Permission,
            Errno::NOMEM => Self::NoMemory,
            Errno::INVAL => Self::Invalid,
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Self::NoSpace,
            Errno::OVERFLOW => Self::Overflow,
            Errno::OPNOTSUPP => Self::NotSupported,
            Errno::SHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }
}

/// The header of a simple reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or an [`ErrorCode`].
    pub error: u32,
    /// The request's.
    pub cookie: u64,
}

impl SimpleReply {
    /// A reply's header for the outcome of the request that carried `cookie`.
    #[must_use]
    pub fn new(cookie: u64, outcome: Result<(), ErrorCode>) -> Self {
        Self { error: outcome.err().map_or(0, |code| code as u32), cookie }
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; SIMPLE_REPLY_LEN] {
        let mut bytes = [0; SIMPLE_REPLY_LEN];
        let mut out = &mut bytes[..];
        out.put_u32(SIMPLE_REPLY_MAGIC);
        out.put_u32(self.error);
        out.put_u64(self.cookie);
        bytes
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8; SIMPLE_REPLY_LEN]) -> Result<Self, Malformed> {
        let mut bytes = &bytes[..];
        expect_magic(bytes.get_u32().into(), SIMPLE_REPLY_MAGIC.into())?;
        Ok(Self { error: bytes.get_u32(), cookie: bytes.get_u64() })
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn a_query() -> impl Strategy<Value = ExportQuery> {
        ("\\PC{0,40}", proptest::collection::vec(any::<u16>(), 0..8))
            .prop_map(|(name, information)| ExportQuery { name, information })
    }

    fn an_option() -> impl Strategy<Value = ClientOption> {
        prop_oneof![
            "\\PC{0,40}".prop_map(ClientOption::ExportName),
            Just(ClientOption::Abort),
            Just(ClientOption::List),
            a_query().prop_map(ClientOption::Info),
            a_query().prop_map(ClientOption::Go),
            (100..200u32).prop_map(ClientOption::Unknown),
        ]
    }

    /// Fixed headers fail by their magic number only.
    fn decoded_or_not_ours<T>(outcome: &Result<T, Malformed>) -> bool {
        matches!(outcome, Ok(_) | Err(Malformed::Magic { .. }))
    }

    proptest! {
        #[test]
        fn options_survive_the_round_trip(wanted in an_option()) {
            let mut bytes = Vec::new();
            wanted.encode(&mut bytes);
            let (header, payload) = bytes.split_first_chunk().unwrap();
            let header = OptionHeader::decode(header).unwrap();
            prop_assert_eq!(header.length as usize, payload.len());
            prop_assert_eq!(ClientOption::decode(header.option, payload).unwrap(), wanted);
        }

        #[test]
        fn requests_survive_the_round_trip(
            flags in any::<u16>(), command in any::<u16>(), cookie in any::<u64>(),
            offset in any::<u64>(), length in any::<u32>(),
        ) {
            let wanted = Request { flags, command: command.into(), cookie, offset, length };
            let mut bytes = Vec::new();
            wanted.encode(&mut bytes);
            prop_assert_eq!(Request::decode(bytes.as_slice().try_into().unwrap()).unwrap(), wanted);
        }

        #[test]
        fn replies_survive_the_round_trip(error in any::<u32>(), cookie in any::<u64>()) {
            let wanted = SimpleReply { error, cookie };
            prop_assert_eq!(SimpleReply::decode(&wanted.encode()).unwrap(), wanted);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            number in 0..20u32, payload in proptest::collection::vec(any::<u8>(), 0..200),
            header in any::<[u8; OPTION_HEADER_LEN]>(), tail in any::<[u8; 12]>(),
        ) {
            // Whether they decode does not matter here, that they return does.
            drop(ClientOption::decode(number, &payload));
            prop_assert!(decoded_or_not_ours(&OptionHeader::decode(&header)));
            prop_assert!(decoded_or_not_ours(&SimpleReply::decode(&header)));
            let mut request = [0; REQUEST_LEN];
            request[..16].copy_from_slice(&header);
            request[16..].copy_from_slice(&tail);
            prop_assert!(decoded_or_not_ours(&Request::decode(&request)));
            request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            prop_assert!(Request::decode(&request).is_ok());
        }

        #[test]
        fn a_query_cut_short_or_drawn_out_is_refused(query in a_query(), cut in 0..1000usize) {
            let mut payload = Vec::new();
            query.encode(&mut payload);
            let cut = cut % payload.len();
            prop_assert!(ExportQuery::decode(&payload[..cut]).is_err());
            payload.push(0);
            prop_assert_eq!(ExportQuery::decode(&payload), Err(Malformed::TrailingBytes(1)));
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        assert_eq!(ExportQuery::decode(&[0xff; 4]), Err(Malformed::StringTooLong(u32::MAX as usize)));
        assert_eq!(ExportQuery::decode(&[0, 0, 0, 9, b'x']), Err(Malformed::TooShort));
        let long = vec![b'x'; MAX_STRING + 1];
        assert_eq!(ClientOption::decode(option::EXPORT_NAME, &long), Err(Malformed::StringTooLong(4097)));
        assert_eq!(ClientOption::decode(option::EXPORT_NAME, b"\xff"), Err(Malformed::NotUtf8));
        assert_eq!(ClientOption::decode(option::LIST, b"x"), Err(Malformed::TrailingBytes(1)));
    }

    #[test]
    fn every_cause_becomes_an_error_the_protocol_knows() {
        let of = |errno| {
            let operation = crate::error::Operation::Read;
            ErrorCode::from(&crate::Error::Io { device: "d".into(), operation, at: 0, len: 0, errno })
        };
        assert_eq!(of(Errno::IO), ErrorCode::Io);
        assert_eq!(of(Errno::ROFS), ErrorCode::Permission);
        assert_eq!(of(Errno::DQUOT), ErrorCode::NoSpace);
        assert_eq!(of(Errno::NODEV), ErrorCode::Io);
        assert_eq!(of(Errno::SHUTDOWN), ErrorCode::Shutdown);
    }

    #[test]
    fn an_option_reply_is_laid_out_as_the_specification_says() {
        let mut bytes = Vec::new();
        OptionReply::Export { size: 1 << 20, flags: 0x16d }.encode(option::GO, &mut bytes);
        let expected = [
            0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, 0, 0, 0, 7, 0, 0, 0, 3, 0, 0, 0, 12, // header
            0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 1, 0x6d, // payload
        ];
        assert_eq!(bytes, expected);
    }
}
