//! Requests: what clients ask for in the transmission phase.

use super::{CMD_FLAG_PAYLOAD_LEN, EXTENDED_REQUEST_MAGIC, Malformed, REQUEST_MAGIC, Style, expect_magic};
use bytes::{Buf, BufMut};

/// Length of a request's header.
pub const REQUEST_LEN: usize = 28;
/// Length of an extended request's header.
pub const EXTENDED_REQUEST_LEN: usize = 32;

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
    /// Bring a range into the cache.
    Cache,
    /// Write zeroes without a payload.
    WriteZeroes,
    /// Tell what is data and what are holes.
    BlockStatus,
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
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
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
            Command::Cache => 5,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
            Command::Unknown(number) => number,
        }
    }
}

/// The header of a request, short or extended.
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
    /// Bytes concerned, or of the payload that follows; 32 bits of it in a short request. A peer's word: not to be
    /// trusted for allocation.
    pub length: u64,
}

impl Request {
    /// Bytes of payload that follow the header.
    #[must_use]
    pub fn payload_len(&self, style: Style) -> u64 {
        let follows = match style {
            Style::Simple | Style::Structured => self.command == Command::Write,
            Style::Extended => self.flags & CMD_FLAG_PAYLOAD_LEN != 0,
        };
        if follows { self.length } else { 0 }
    }

    /// Appends the header of a short request, which has 32 bits of length, to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u32(REQUEST_MAGIC);
        self.encode_fields(out);
        out.put_u32(self.length as u32);
    }

    /// Appends the header of an extended request to `out`.
    pub fn encode_extended(&self, out: &mut impl BufMut) {
        out.put_u32(EXTENDED_REQUEST_MAGIC);
        self.encode_fields(out);
        out.put_u64(self.length);
    }

    fn encode_fields(&self, out: &mut impl BufMut) {
        out.put_u16(self.flags);
        out.put_u16(self.command.into());
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
    }

    /// Reads the header of a short request.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, Malformed> {
        let mut bytes = &bytes[..];
        expect_magic(bytes.get_u32().into(), REQUEST_MAGIC.into())?;
        let mut request = Self::decode_fields(&mut bytes);
        request.length = bytes.get_u32().into();
        Ok(request)
    }

    /// Reads the header of an extended request.
    pub fn decode_extended(bytes: &[u8; EXTENDED_REQUEST_LEN]) -> Result<Self, Malformed> {
        let mut bytes = &bytes[..];
        expect_magic(bytes.get_u32().into(), EXTENDED_REQUEST_MAGIC.into())?;
        let mut request = Self::decode_fields(&mut bytes);
        request.length = bytes.get_u64();
        Ok(request)
    }

    fn decode_fields(bytes: &mut &[u8]) -> Self {
        Self {
            flags: bytes.get_u16(),
            command: bytes.get_u16().into(),
            cookie: bytes.get_u64(),
            offset: bytes.get_u64(),
            length: 0,
        }
    }
}

/// The payload of an extended `BLOCK_STATUS`: which contexts are meant, and how many bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusFilter {
    /// Bytes concerned.
    pub length: u64,
    /// Numbers of contexts.
    pub contexts: Vec<u32>,
}

impl StatusFilter {
    /// Most bytes of payload that are looked at. More contexts than this has room for are not there to be named.
    pub const MAX_LEN: u64 = 8 + 4 * 8;

    /// Appends the payload to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u64(self.length);
        for context in &self.contexts {
            out.put_u32(*context);
        }
    }

    /// Reads a whole payload.
    pub fn decode(mut payload: &[u8]) -> Result<Self, Malformed> {
        let length = payload.try_get_u64().map_err(|_| Malformed::TooShort)?;
        let (contexts, rest) = payload.as_chunks::<4>();
        super::nothing_left(rest)?;
        Ok(Self { length, contexts: contexts.iter().map(|four| u32::from_be_bytes(*four)).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_survive_the_round_trip(
            flags in any::<u16>(), command in any::<u16>(), cookie in any::<u64>(),
            offset in any::<u64>(), length in any::<u64>(),
        ) {
            let wanted = Request { flags, command: command.into(), cookie, offset, length };
            let mut bytes = Vec::new();
            wanted.encode_extended(&mut bytes);
            prop_assert_eq!(Request::decode_extended(bytes.as_slice().try_into().unwrap()).unwrap(), wanted);
            let short = Request { length: length & 0xffff_ffff, ..wanted };
            bytes.clear();
            short.encode(&mut bytes);
            prop_assert_eq!(Request::decode(bytes.as_slice().try_into().unwrap()).unwrap(), short);
        }

        #[test]
        fn a_header_fails_by_its_magic_only(mut bytes in any::<[u8; EXTENDED_REQUEST_LEN]>()) {
            let short = |bytes: &[u8]| Request::decode(bytes[..REQUEST_LEN].try_into().unwrap());
            for outcome in [short(&bytes), Request::decode_extended(&bytes)] {
                prop_assert!(outcome.is_ok() || matches!(outcome, Err(Malformed::Magic { .. })), "another error");
            }
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            prop_assert!(short(&bytes).is_ok());
            bytes[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
            prop_assert!(Request::decode_extended(&bytes).is_ok());
        }

        #[test]
        fn filters_survive_the_round_trip(length in any::<u64>(), contexts in proptest::collection::vec(any::<u32>(), 0..9)) {
            let wanted = StatusFilter { length, contexts };
            let mut bytes = Vec::new();
            wanted.encode(&mut bytes);
            prop_assert_eq!(StatusFilter::decode(&bytes).unwrap(), wanted);
            bytes.push(0);
            prop_assert_eq!(StatusFilter::decode(&bytes), Err(Malformed::TrailingBytes(1)));
            prop_assert_eq!(StatusFilter::decode(&bytes[..7]), Err(Malformed::TooShort));
        }
    }

    #[test]
    fn what_follows_a_header_depends_on_the_style() {
        let request = |command, flags| Request { flags, command, cookie: 1, offset: 0, length: 9 };
        assert_eq!(request(Command::Write, 0).payload_len(Style::Simple), 9);
        assert_eq!(request(Command::Write, 0).payload_len(Style::Extended), 0);
        assert_eq!(request(Command::Read, CMD_FLAG_PAYLOAD_LEN).payload_len(Style::Structured), 0);
        assert_eq!(request(Command::Read, CMD_FLAG_PAYLOAD_LEN).payload_len(Style::Extended), 9);
    }
}
