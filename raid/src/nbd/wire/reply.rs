//! Replies: simple ones, and chunks of structured and extended ones.

use super::{
    EXTENDED_REPLY_MAGIC, MAX_STRING, Malformed, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, Style,
    expect_magic, fitting, nothing_left, string,
};
use bytes::{Buf, BufMut};
use rustix::io::Errno;

/// Length of a simple reply's header.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of the payload of a hole.
pub const HOLE_LEN: u64 = 12;
/// Length of what comes before an error's message.
pub const ERROR_FIELDS: u64 = 6;
/// Flag of a chunk: the last one of its reply.
pub const DONE: u16 = 1 << 0;
/// Status in `base:allocation`: nothing is stored there.
pub const STATE_HOLE: u64 = 1 << 0;
/// Status in `base:allocation`: it reads as zeroes.
pub const STATE_ZERO: u64 = 1 << 1;

/// Types of chunks.
pub mod chunk {
    /// Nothing more to say; always the last one.
    pub const NONE: u16 = 0;
    /// Data and where it begins.
    pub const OFFSET_DATA: u16 = 1;
    /// A range that reads as zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32 bits of length.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64 bits of length.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// The request failed.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// The request failed at some place.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
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

    /// Appends the header to `out`.
    pub fn put(self, out: &mut impl BufMut) {
        out.put_u32(SIMPLE_REPLY_MAGIC);
        out.put_u32(self.error);
        out.put_u64(self.cookie);
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(self) -> [u8; SIMPLE_REPLY_LEN] {
        let mut bytes = [0; SIMPLE_REPLY_LEN];
        self.put(&mut &mut bytes[..]);
        bytes
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8; SIMPLE_REPLY_LEN]) -> Result<Self, Malformed> {
        let mut bytes = &bytes[..];
        expect_magic(bytes.get_u32().into(), SIMPLE_REPLY_MAGIC.into())?;
        Ok(Self { error: bytes.get_u32(), cookie: bytes.get_u64() })
    }
}

/// The header of a chunk, in the style of structured or of extended replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// [`DONE`] or 0.
    pub flags: u16,
    /// One of [`chunk`], or something unknown.
    pub kind: u16,
    /// The request's.
    pub cookie: u64,
    /// The request's; extended headers only, else 0.
    pub offset: u64,
    /// Bytes of payload.
    pub length: u64,
}

impl ChunkHeader {
    /// Length of a structured chunk's header.
    pub const STRUCTURED_LEN: usize = 20;
    /// Length of an extended chunk's header.
    pub const EXTENDED_LEN: usize = 32;

    /// Appends the header to `out`. Extended if `style` is, else structured.
    pub fn encode(&self, style: Style, out: &mut impl BufMut) {
        let extended = style == Style::Extended;
        out.put_u32(if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC });
        out.put_u16(self.flags);
        out.put_u16(self.kind);
        out.put_u64(self.cookie);
        if extended {
            out.put_u64(self.offset);
            out.put_u64(self.length);
        } else {
            out.put_u32(self.length as u32);
        }
    }

    /// Reads the header of a structured chunk.
    pub fn decode_structured(bytes: &[u8; Self::STRUCTURED_LEN]) -> Result<Self, Malformed> {
        let mut bytes = &bytes[..];
        expect_magic(bytes.get_u32().into(), STRUCTURED_REPLY_MAGIC.into())?;
        let (flags, kind, cookie) = (bytes.get_u16(), bytes.get_u16(), bytes.get_u64());
        Ok(Self { flags, kind, cookie, offset: 0, length: bytes.get_u32().into() })
    }

    /// Reads the header of an extended chunk.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_LEN]) -> Result<Self, Malformed> {
        let mut bytes = &bytes[..];
        expect_magic(bytes.get_u32().into(), EXTENDED_REPLY_MAGIC.into())?;
        let (flags, kind, cookie) = (bytes.get_u16(), bytes.get_u16(), bytes.get_u64());
        Ok(Self { flags, kind, cookie, offset: bytes.get_u64(), length: bytes.get_u64() })
    }
}

/// An extent as a block status has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Bytes, at least 1.
    pub length: u64,
    /// Bits of the context; of `base:allocation`, `STATE_…`.
    pub status: u64,
}

/// The payload of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing more to say.
    None,
    /// Data and where it begins.
    Data {
        /// First byte in the export.
        offset: u64,
        /// At least one byte.
        data: Vec<u8>,
    },
    /// A range that reads as zeroes.
    Hole {
        /// First byte in the export.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// Extents from the request's offset on.
    Status {
        /// Number of the context.
        context: u32,
        /// At least one.
        extents: Vec<Descriptor>,
    },
    /// The request failed.
    Error {
        /// An [`ErrorCode`].
        code: u32,
        /// For people.
        message: String,
        /// Where, if that was told.
        offset: Option<u64>,
    },
}

impl Chunk {
    /// The type's number in this style.
    #[must_use]
    pub fn kind(&self, style: Style) -> u16 {
        match self {
            Self::None => chunk::NONE,
            Self::Data { .. } => chunk::OFFSET_DATA,
            Self::Hole { .. } => chunk::OFFSET_HOLE,
            Self::Status { .. } if style == Style::Extended => chunk::BLOCK_STATUS_EXT,
            Self::Status { .. } => chunk::BLOCK_STATUS,
            Self::Error { offset: None, .. } => chunk::ERROR,
            Self::Error { offset: Some(_), .. } => chunk::ERROR_OFFSET,
        }
    }

    /// Appends the payload to `out`. A message too long is cut.
    pub fn encode(&self, style: Style, out: &mut Vec<u8>) {
        match self {
            Self::None => {}
            Self::Data { offset, data } => {
                out.put_u64(*offset);
                out.put_slice(data);
            }
            Self::Hole { offset, length } => {
                out.put_u64(*offset);
                out.put_u32(*length);
            }
            Self::Status { context, extents } => {
                out.put_u32(*context);
                if style == Style::Extended {
                    out.put_u32(extents.len() as u32);
                }
                for Descriptor { length, status } in extents {
                    if style == Style::Extended {
                        out.put_u64(*length);
                        out.put_u64(*status);
                    } else {
                        out.put_u32(*length as u32);
                        out.put_u32(*status as u32);
                    }
                }
            }
            Self::Error { code, message, offset } => {
                let message = fitting(message);
                out.put_u32(*code);
                out.put_u16(message.len() as u16);
                out.put_slice(message.as_bytes());
                if let Some(offset) = offset {
                    out.put_u64(*offset);
                }
            }
        }
    }

    /// Reads the payload of a chunk of type `kind`; `payload` is all of it.
    pub fn decode(kind: u16, mut payload: &[u8]) -> Result<Self, Malformed> {
        let short = |_| Malformed::TooShort;
        let decoded = match kind {
            chunk::NONE => Self::None,
            chunk::OFFSET_DATA => {
                let offset = payload.try_get_u64().map_err(short)?;
                if payload.is_empty() {
                    return Err(Malformed::TooShort);
                }
                return Ok(Self::Data { offset, data: payload.to_vec() });
            }
            chunk::OFFSET_HOLE => Self::Hole {
                offset: payload.try_get_u64().map_err(short)?,
                length: payload.try_get_u32().map_err(short)?,
            },
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => return Self::decode_status(kind, payload),
            chunk::ERROR | chunk::ERROR_OFFSET => {
                let code = payload.try_get_u32().map_err(short)?;
                let length = usize::from(payload.try_get_u16().map_err(short)?);
                if length > MAX_STRING {
                    return Err(Malformed::StringTooLong(length));
                }
                let (message, rest) = payload.split_at_checked(length).ok_or(Malformed::TooShort)?;
                let message = string(message)?;
                payload = rest;
                let at = kind == chunk::ERROR_OFFSET;
                let offset = at.then(|| payload.try_get_u64()).transpose().map_err(short)?;
                Self::Error { code, message, offset }
            }
            unknown => return Err(Malformed::ChunkType(unknown)),
        };
        nothing_left(payload)?;
        Ok(decoded)
    }

    fn decode_status(kind: u16, mut payload: &[u8]) -> Result<Self, Malformed> {
        let short = |_| Malformed::TooShort;
        let context = payload.try_get_u32().map_err(short)?;
        let mut extents = Vec::new();
        let rest = if kind == chunk::BLOCK_STATUS_EXT {
            let count = payload.try_get_u32().map_err(short)? as usize;
            let (found, rest) = payload.as_chunks::<16>();
            for mut one in found.iter().map(|one| &one[..]) {
                extents.push(Descriptor { length: one.get_u64(), status: one.get_u64() });
            }
            if extents.len() != count {
                return Err(if extents.len() < count {
                    Malformed::TooShort
                } else {
                    Malformed::TrailingBytes(payload.len() - 16 * count)
                });
            }
            rest
        } else {
            let (found, rest) = payload.as_chunks::<8>();
            for mut one in found.iter().map(|one| &one[..]) {
                extents.push(Descriptor { length: one.get_u32().into(), status: one.get_u32().into() });
            }
            rest
        };
        nothing_left(rest)?;
        if extents.is_empty() {
            return Err(Malformed::TooShort);
        }
        Ok(Self::Status { context, extents })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn a_chunk() -> impl Strategy<Value = Chunk> {
        let extent =
            (1..u32::MAX, 0..4u64).prop_map(|(length, status)| Descriptor { length: length.into(), status });
        prop_oneof![
            Just(Chunk::None),
            (any::<u64>(), proptest::collection::vec(any::<u8>(), 1..50))
                .prop_map(|(offset, data)| Chunk::Data { offset, data }),
            (any::<u64>(), any::<u32>()).prop_map(|(offset, length)| Chunk::Hole { offset, length }),
            (any::<u32>(), proptest::collection::vec(extent, 1..9))
                .prop_map(|(context, extents)| Chunk::Status { context, extents }),
            (1..200u32, "\\PC{0,40}", any::<Option<u64>>())
                .prop_map(|(code, message, offset)| Chunk::Error { code, message, offset }),
        ]
    }

    proptest! {
        #[test]
        fn replies_survive_the_round_trip(error in any::<u32>(), cookie in any::<u64>()) {
            let wanted = SimpleReply { error, cookie };
            prop_assert_eq!(SimpleReply::decode(&wanted.encode()).unwrap(), wanted);
        }

        #[test]
        fn chunks_survive_the_round_trip(
            wanted in a_chunk(), flags in any::<u16>(), cookie in any::<u64>(), offset in any::<u64>(),
        ) {
            for style in [Style::Structured, Style::Extended] {
                let mut payload = Vec::new();
                wanted.encode(style, &mut payload);
                let kind = wanted.kind(style);
                prop_assert_eq!(Chunk::decode(kind, &payload).unwrap(), wanted.clone());
                let mut header =
                    ChunkHeader { flags, kind, cookie, offset, length: payload.len() as u64 };
                let mut bytes = Vec::new();
                header.encode(style, &mut bytes);
                let found = if style == Style::Extended {
                    ChunkHeader::decode_extended(bytes.as_slice().try_into().unwrap())
                } else {
                    header.offset = 0;
                    ChunkHeader::decode_structured(bytes.as_slice().try_into().unwrap())
                };
                prop_assert_eq!(found.unwrap(), header);
                if !matches!(wanted, Chunk::Data { .. }) {
                    payload.push(0);
                    prop_assert!(Chunk::decode(kind, &payload).is_err());
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(kind in 0..9u16, payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            for kind in [kind, kind | 1 << 15] {
                if let Ok(chunk) = Chunk::decode(kind, &payload) {
                    let style = if kind == chunk::BLOCK_STATUS_EXT { Style::Extended } else { Style::Structured };
                    let mut again = Vec::new();
                    chunk.encode(style, &mut again);
                    prop_assert_eq!(&again, &payload);
                }
            }
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        assert_eq!(Chunk::decode(chunk::OFFSET_DATA, &[0; 8]), Err(Malformed::TooShort));
        assert_eq!(Chunk::decode(chunk::BLOCK_STATUS, &[0; 4]), Err(Malformed::TooShort));
        let mut two = vec![0, 0, 0, 1, 0, 0, 0, 2];
        two.extend_from_slice(&[1; 16]);
        assert_eq!(Chunk::decode(chunk::BLOCK_STATUS_EXT, &two), Err(Malformed::TooShort));
        two[7] = 0;
        assert_eq!(Chunk::decode(chunk::BLOCK_STATUS_EXT, &two), Err(Malformed::TrailingBytes(16)));
        let mut long = vec![b'x'; 6 + 0xffff];
        long[..6].copy_from_slice(&[0, 0, 0, 5, 0xff, 0xff]);
        assert_eq!(Chunk::decode(chunk::ERROR, &long), Err(Malformed::StringTooLong(0xffff)));
    }

    #[test]
    fn a_message_too_long_is_cut_at_a_character() {
        let mut bytes = Vec::new();
        let message = "é".repeat(3000);
        Chunk::Error { code: 5, message, offset: None }.encode(Style::Structured, &mut bytes);
        assert_eq!(bytes.len() as u64, ERROR_FIELDS + 4096);
        assert!(Chunk::decode(chunk::ERROR, &bytes).is_ok());
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
}
