//! The options of the handshake and what they are answered.

use super::{
    MAX_STRING, Malformed, OPTION_MAGIC, OPTION_REPLY_MAGIC, expect_magic, fitting, nothing_left, string,
};
use bytes::{Buf, BufMut};

/// Length of an option's header.
pub const OPTION_HEADER_LEN: usize = 16;
/// The one metadata context that there is: what is data, and what are holes.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// The number that [`ALLOCATION_CONTEXT`] has in the transmission phase.
pub const ALLOCATION_ID: u32 = 1;

/// Numbers of the options this house knows.
pub mod option {
    /// Choose an export and start, without a reply if it fails.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Go on under TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export and start.
    pub const GO: u32 = 7;
    /// Have replies in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Have requests and replies with 64 bits of length.
    pub const EXTENDED_HEADERS: u32 = 11;
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
    /// Go on under TLS.
    StartTls,
    /// Have replies in chunks.
    StructuredReply,
    /// List metadata contexts.
    ListMetaContext(MetaQuery),
    /// Choose metadata contexts.
    SetMetaContext(MetaQuery),
    /// Have requests and replies with 64 bits of length.
    ExtendedHeaders,
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

/// The payload of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaQuery {
    /// Which export; empty for the default one.
    pub name: String,
    /// Which contexts; with none, `LIST` means all and `SET` none.
    pub queries: Vec<String>,
}

impl ClientOption {
    /// Reads the payload of option number `option`. `payload` is all of it, already bounded by the caller.
    pub fn decode(option: u32, payload: &[u8]) -> Result<Self, Malformed> {
        match option {
            option::EXPORT_NAME => Ok(Self::ExportName(string(payload)?)),
            // What comes with ABORT does not matter any more.
            option::ABORT => Ok(Self::Abort),
            option::LIST => nothing_left(payload).map(|()| Self::List),
            option::STARTTLS => nothing_left(payload).map(|()| Self::StartTls),
            option::STRUCTURED_REPLY => nothing_left(payload).map(|()| Self::StructuredReply),
            option::EXTENDED_HEADERS => nothing_left(payload).map(|()| Self::ExtendedHeaders),
            option::INFO => Ok(Self::Info(ExportQuery::decode(payload)?)),
            option::GO => Ok(Self::Go(ExportQuery::decode(payload)?)),
            option::LIST_META_CONTEXT => Ok(Self::ListMetaContext(MetaQuery::decode(payload)?)),
            option::SET_META_CONTEXT => Ok(Self::SetMetaContext(MetaQuery::decode(payload)?)),
            unknown => Ok(Self::Unknown(unknown)),
        }
    }

    /// Appends header and payload to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut payload = Vec::new();
        match self {
            Self::ExportName(name) => payload.put_slice(name.as_bytes()),
            Self::Info(query) | Self::Go(query) => query.encode(&mut payload),
            Self::ListMetaContext(query) | Self::SetMetaContext(query) => query.encode(&mut payload),
            Self::Abort
            | Self::List
            | Self::StartTls
            | Self::StructuredReply
            | Self::ExtendedHeaders
            | Self::Unknown(_) => {}
        }
        OptionHeader { option: self.number(), length: payload.len() as u32 }.encode(out);
        out.put_slice(&payload);
    }

    fn number(&self) -> u32 {
        match self {
            Self::ExportName(_) => option::EXPORT_NAME,
            Self::Abort => option::ABORT,
            Self::List => option::LIST,
            Self::Info(_) => option::INFO,
            Self::Go(_) => option::GO,
            Self::StartTls => option::STARTTLS,
            Self::StructuredReply => option::STRUCTURED_REPLY,
            Self::ListMetaContext(_) => option::LIST_META_CONTEXT,
            Self::SetMetaContext(_) => option::SET_META_CONTEXT,
            Self::ExtendedHeaders => option::EXTENDED_HEADERS,
            Self::Unknown(number) => *number,
        }
    }
}

/// Takes a string that its length precedes off `bytes`.
fn take_string(bytes: &mut &[u8]) -> Result<String, Malformed> {
    let length = bytes.try_get_u32().map_err(|_| Malformed::TooShort)? as usize;
    if length > MAX_STRING {
        return Err(Malformed::StringTooLong(length));
    }
    let (text, rest) = bytes.split_at_checked(length).ok_or(Malformed::TooShort)?;
    *bytes = rest;
    string(text)
}

fn put_string(text: &str, out: &mut Vec<u8>) {
    out.put_u32(text.len() as u32);
    out.put_slice(text.as_bytes());
}

impl MetaQuery {
    fn decode(mut payload: &[u8]) -> Result<Self, Malformed> {
        let name = take_string(&mut payload)?;
        let count = payload.try_get_u32().map_err(|_| Malformed::TooShort)?;
        // Each takes bytes that are here: the count alone allocates nothing.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(take_string(&mut payload)?);
        }
        nothing_left(payload)?;
        Ok(Self { name, queries })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_string(&self.name, out);
        out.put_u32(self.queries.len() as u32);
        for query in &self.queries {
            put_string(query, out);
        }
    }

    /// Whether [`ALLOCATION_CONTEXT`] is among what is asked for: chosen by its name, listed by that of its namespace
    /// too, or with all others.
    #[must_use]
    pub fn wants_allocation(&self, list: bool) -> bool {
        let wanted = |query: &String| query == ALLOCATION_CONTEXT || list && query == "base:";
        list && self.queries.is_empty() || self.queries.iter().any(wanted)
    }
}

impl ExportQuery {
    fn decode(mut payload: &[u8]) -> Result<Self, Malformed> {
        let name = take_string(&mut payload)?;
        let mut rest = payload;
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
        put_string(&self.name, out);
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
    /// TLS comes first.
    TlsRequired = (1 << 31) + 5,
    /// No export has that name.
    UnknownExport = (1 << 31) + 6,
    /// The server is stopping.
    Shutdown = (1 << 31) + 7,
    /// The payload is longer than the server takes.
    TooBig = (1 << 31) + 9,
    /// Extended headers stay once they are negotiated.
    ExtendedHeadersRequired = (1 << 31) + 10,
}

/// What the server answers an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// Done; the last reply to an option.
    Ack,
    /// One of the exports, in answer to `LIST`.
    Server {
        /// What to ask for it by.
        name: String,
        /// Text for people.
        description: String,
    },
    /// Size in bytes and transmission flags.
    Export {
        /// Size in bytes.
        size: u64,
        /// As the specification numbers them; see [`Export::transmission_flags`](crate::nbd::Export::transmission_flags).
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
    /// A metadata context.
    MetaContext {
        /// Its number in the transmission phase; 0 in a list.
        id: u32,
        /// Its name.
        name: String,
    },
    /// Refused, with a sentence for people.
    Error(OptionError, String),
}

const REPLY_ACK: u32 = 1;
const REPLY_SERVER: u32 = 2;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;

impl OptionReply {
    /// Appends the reply to option number `option` to `out`.
    pub fn encode(&self, option: u32, out: &mut impl BufMut) {
        let (kind, length) = match self {
            Self::Ack => (REPLY_ACK, 0),
            Self::Server { name, description } => (REPLY_SERVER, 4 + name.len() + fitting(description).len()),
            Self::Export { .. } => (REPLY_INFO, 12),
            Self::Name(text) | Self::Description(text) => (REPLY_INFO, 2 + fitting(text).len()),
            Self::BlockSize { .. } => (REPLY_INFO, 14),
            Self::MetaContext { name, .. } => (REPLY_META_CONTEXT, 4 + name.len()),
            Self::Error(error, text) => (*error as u32, fitting(text).len()),
        };
        out.put_u64(OPTION_REPLY_MAGIC);
        out.put_u32(option);
        out.put_u32(kind);
        out.put_u32(length as u32);
        match self {
            Self::Ack => {}
            Self::Server { name, description } => {
                out.put_u32(name.len() as u32);
                out.put_slice(name.as_bytes());
                out.put_slice(fitting(description).as_bytes());
            }
            Self::Export { size, flags } => {
                out.put_u16(info::EXPORT);
                out.put_u64(*size);
                out.put_u16(*flags);
            }
            Self::Name(text) => {
                out.put_u16(info::NAME);
                out.put_slice(fitting(text).as_bytes());
            }
            Self::Description(text) => {
                out.put_u16(info::DESCRIPTION);
                out.put_slice(fitting(text).as_bytes());
            }
            Self::BlockSize { minimum, preferred, maximum } => {
                out.put_u16(info::BLOCK_SIZE);
                out.put_u32(*minimum);
                out.put_u32(*preferred);
                out.put_u32(*maximum);
            }
            Self::MetaContext { id, name } => {
                out.put_u32(*id);
                out.put_slice(name.as_bytes());
            }
            Self::Error(_, text) => out.put_slice(fitting(text).as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn a_query() -> impl Strategy<Value = ExportQuery> {
        ("\\PC{0,40}", proptest::collection::vec(any::<u16>(), 0..8))
            .prop_map(|(name, information)| ExportQuery { name, information })
    }

    fn a_meta_query() -> impl Strategy<Value = MetaQuery> {
        ("\\PC{0,40}", proptest::collection::vec("\\PC{0,20}", 0..8))
            .prop_map(|(name, queries)| MetaQuery { name, queries })
    }

    fn an_option() -> impl Strategy<Value = ClientOption> {
        prop_oneof![
            "\\PC{0,40}".prop_map(ClientOption::ExportName),
            Just(ClientOption::Abort),
            Just(ClientOption::List),
            Just(ClientOption::StartTls),
            Just(ClientOption::StructuredReply),
            Just(ClientOption::ExtendedHeaders),
            a_query().prop_map(ClientOption::Info),
            a_query().prop_map(ClientOption::Go),
            a_meta_query().prop_map(ClientOption::ListMetaContext),
            a_meta_query().prop_map(ClientOption::SetMetaContext),
            (100..200u32).prop_map(ClientOption::Unknown),
        ]
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
        fn arbitrary_bytes_never_panic(
            number in 0..20u32, payload in proptest::collection::vec(any::<u8>(), 0..200),
            header in any::<[u8; OPTION_HEADER_LEN]>(),
        ) {
            // Whether it decodes does not matter here, that it returns does.
            drop(ClientOption::decode(number, &payload));
            let outcome = OptionHeader::decode(&header);
            prop_assert!(outcome.is_ok() || matches!(outcome, Err(Malformed::Magic { .. })), "another error");
        }

        #[test]
        fn a_query_cut_short_or_drawn_out_is_refused(query in a_query(), meta in a_meta_query(), cut in 0..1000usize) {
            let mut payload = Vec::new();
            query.encode(&mut payload);
            prop_assert!(ExportQuery::decode(&payload[..cut % payload.len()]).is_err());
            payload.push(0);
            prop_assert_eq!(ExportQuery::decode(&payload), Err(Malformed::TrailingBytes(1)));
            payload.clear();
            meta.encode(&mut payload);
            prop_assert!(MetaQuery::decode(&payload[..cut % payload.len()]).is_err());
            payload.push(0);
            prop_assert_eq!(MetaQuery::decode(&payload), Err(Malformed::TrailingBytes(1)));
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        assert_eq!(ExportQuery::decode(&[0xff; 4]), Err(Malformed::StringTooLong(u32::MAX as usize)));
        assert_eq!(ExportQuery::decode(&[0, 0, 0, 9, b'x']), Err(Malformed::TooShort));
        let long = vec![b'x'; MAX_STRING + 1];
        assert_eq!(ClientOption::decode(option::EXPORT_NAME, &long), Err(Malformed::StringTooLong(4097)));
        assert_eq!(ClientOption::decode(option::EXPORT_NAME, b"\xff"), Err(Malformed::NotUtf8));
        for option in [option::LIST, option::STARTTLS, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
            assert_eq!(ClientOption::decode(option, b"x"), Err(Malformed::TrailingBytes(1)));
        }
        // Four billion queries, of which none is there.
        assert_eq!(MetaQuery::decode(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), Err(Malformed::TooShort));
        let query = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0x10, 1];
        assert_eq!(MetaQuery::decode(&query), Err(Malformed::StringTooLong(4097)));
    }

    #[test]
    fn contexts_are_found_as_the_specification_says() {
        let query = |queries: &[&str]| MetaQuery {
            name: String::new(),
            queries: queries.iter().map(|&query| query.to_owned()).collect(),
        };
        for (queries, listed, set) in [
            (&[][..], true, false),
            (&["base:"], true, false),
            (&["base:allocation"], true, true),
            (&["x-other:", "base:allocation", "base:allocation"], true, true),
            (&["base:other", "qemu:", "base", "allocation", ""], false, false),
        ] {
            assert_eq!(query(queries).wants_allocation(true), listed, "{queries:?}");
            assert_eq!(query(queries).wants_allocation(false), set, "{queries:?}");
        }
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

    #[test]
    fn texts_too_long_are_cut() {
        let mut bytes = Vec::new();
        OptionReply::Description("x".repeat(5000)).encode(option::GO, &mut bytes);
        assert_eq!(bytes.len(), 20 + 2 + MAX_STRING);
    }
}
