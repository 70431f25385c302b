//! The handshake: options a client sends and what they are answered, until it has chosen an export or gone away.
//!
//! A state machine without sockets or clocks: bytes in, bytes out ([`Handshake::advance`]). The connection that drives
//! it sets the deadline.
//!
//! Invariants:
//!
//! - Nothing is gathered before its length is checked: at most [`MAX_OPTION`] bytes of one option are ever held; what
//!   is longer is drained and refused, and beyond [`MAX_DRAIN`] the client is sent away.
//! - A client may send [`MAX_OPTIONS`] options; what it can make the server say is bounded with it.
//! - Every option gets exactly one final reply, in order (`EXPORT_NAME` has none, by the protocol).
//! - What follows `GO` or `EXPORT_NAME` in the input is left there: it belongs to the transmission phase.
//! - Where TLS is required, nothing is told of the exports before it: not even whether an option is known. With TLS
//!   begins a new haggling: nothing that was settled in plain text counts ([`Handshake::secured`]), and bytes that came
//!   behind `STARTTLS` in plain text end the session ([`Refused::PlainAfterStartTls`]).

use super::wire::{
    self, ALLOCATION_CONTEXT, ALLOCATION_ID, ClientOption, ExportQuery, FIXED_NEWSTYLE, Malformed, MetaQuery,
    NO_ZEROES, OPTION_HEADER_LEN, OptionError, OptionHeader, OptionReply, Style, info, option,
    transmission_flags,
};
use crate::device::Device;
use bytes::{Buf, BufMut, BytesMut};
use std::sync::Arc;

/// Options a client may send before it must have chosen.
pub const MAX_OPTIONS: u32 = 32;
/// Bytes of payload of one option that are read as a value: a name of 4096 and every number of information.
pub const MAX_OPTION: u32 = 8192;
/// Bytes of payload of one option that are drained when they are not to be read.
pub const MAX_DRAIN: u32 = 1 << 20;

/// Block sizes that are advertised: any byte range, best in pages, and the most that one request may carry.
const BLOCK_SIZE: OptionReply =
    OptionReply::BlockSize { minimum: 1, preferred: 4096, maximum: wire::MAX_PAYLOAD };

/// A device under a name.
#[derive(Clone)]
pub struct Export {
    /// Its name, at most 4096 bytes.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// What is served.
    pub device: Arc<dyn Device>,
    /// Refuse every change.
    pub read_only: bool,
}

impl Export {
    /// What this export can do in such a session, as the protocol's flags. `FLUSH` and `FUA` of a device cover the
    /// writes of all its users, hence `CAN_MULTI_CONN`.
    #[must_use]
    pub fn transmission_flags(&self, style: Style, allocation: bool) -> u16 {
        use transmission_flags as f;
        let mut flags = f::HAS_FLAGS | f::SEND_FLUSH | f::CAN_MULTI_CONN | f::SEND_CACHE;
        flags |= if self.read_only {
            f::READ_ONLY
        } else {
            f::SEND_FUA | f::SEND_TRIM | f::SEND_WRITE_ZEROES | f::SEND_FAST_ZERO
        };
        for (holds, flag) in [
            (self.device.is_rotational(), f::ROTATIONAL),
            (style >= Style::Structured, f::SEND_DF),
            (style == Style::Extended && allocation, f::BLOCK_STATUS_PAYLOAD),
        ] {
            if holds {
                flags |= flag;
            }
        }
        flags
    }
}

/// What a handshake has settled.
#[derive(Clone)]
pub struct Session {
    /// What is served.
    pub export: Arc<Export>,
    /// How requests and replies are framed.
    pub style: Style,
    /// Whether `base:allocation` was chosen: `BLOCK_STATUS` may be asked for.
    pub allocation: bool,
}

/// Whether TLS can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// There is none.
    Off,
    /// A client may start it.
    Offered,
    /// Without it nothing is served or told.
    Required,
    /// The session is under it.
    Started,
}

/// What a server offers: the first export also answers to the empty name.
#[derive(Clone)]
pub struct Exports(Vec<Arc<Export>>);

impl Exports {
    /// One export, under its own name and as the default.
    #[must_use]
    pub fn single(export: Export) -> Self {
        Self(vec![Arc::new(export)])
    }

    fn find(&self, name: &str) -> Option<&Arc<Export>> {
        if name.is_empty() { self.0.first() } else { self.0.iter().find(|export| export.name == name) }
    }

    /// Every name that can be asked for and what it leads to, the default one first.
    fn names(&self) -> impl Iterator<Item = (&str, &Export)> {
        let named = self.0.iter().map(|export| (export.name.as_str(), &**export));
        let default = self.0.first().map(|export| ("", &**export));
        default.into_iter().chain(named.filter(|(name, _)| !name.is_empty()))
    }
}

/// Why a handshake ended without an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The bytes are not NBD's.
    #[error("not the NBD protocol: {0}")]
    Malformed(#[from] Malformed),
    /// The client wants things that were not offered.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// A client that did not agree to fixed newstyle may only send `EXPORT_NAME`.
    #[error("option {0} without fixed newstyle")]
    NotFixedNewstyle(u32),
    /// More than [`MAX_OPTIONS`].
    #[error("more than 32 options")]
    TooManyOptions,
    /// A payload beyond [`MAX_DRAIN`].
    #[error("an option of {0} bytes")]
    OptionTooLong(u32),
    /// `EXPORT_NAME` has no way to say no but to hang up.
    #[error("no export of that name")]
    UnknownExport,
    /// The same, before TLS that is required.
    #[error("an export without TLS, which is required")]
    TlsRequired,
    /// `EXPORT_NAME` does not go with extended headers.
    #[error("EXPORT_NAME after extended headers")]
    ExtendedHeaders,
    /// Whoever sends in plain text behind `STARTTLS`, before its answer, wants it to count as said under TLS.
    #[error("{0} bytes in plain text behind STARTTLS")]
    PlainAfterStartTls(usize),
}

/// Where a handshake has got to.
pub enum Progress {
    /// Send what is in the output, and bring more input.
    More,
    /// Send what is in the output, then serve this.
    Chosen(Session),
    /// Send what is in the output, then go on under TLS and call [`Handshake::secured`].
    StartTls,
    /// Send what is in the output, then close: the client said goodbye.
    Goodbye,
}

enum State {
    ClientFlags,
    Option,
    /// The payload of an option is on its way. `header.length <= MAX_OPTION`.
    Payload(OptionHeader),
    /// What is left of a payload that is not to be read, and the answer it gets then.
    Drain {
        left: u32,
        option: u32,
        answer: OptionReply,
    },
}

/// One client's handshake.
pub struct Handshake {
    exports: Exports,
    tls: Tls,
    state: State,
    options: u32,
    fixed_newstyle: bool,
    no_zeroes: bool,
    style: Style,
    /// For which export `base:allocation` was chosen.
    allocation: Option<Arc<Export>>,
}

impl Handshake {
    /// A handshake that has just begun; `output` gets the greeting.
    #[must_use]
    pub fn start(exports: Exports, tls: Tls, output: &mut BytesMut) -> Self {
        output.put_u64(wire::GREETING_MAGIC);
        output.put_u64(wire::OPTION_MAGIC);
        output.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
        Self {
            exports,
            tls,
            state: State::ClientFlags,
            options: 0,
            fixed_newstyle: false,
            no_zeroes: false,
            style: Style::Simple,
            allocation: None,
        }
    }

    /// The session is under TLS from here on, and begins anew: what was settled in plain text may be an intruder's.
    pub fn secured(&mut self) {
        self.tls = Tls::Started;
        self.style = Style::Simple;
        self.allocation = None;
    }

    /// Takes as much of `input` as there is to understand and appends the answers to `output`. After an error the
    /// connection is to be closed; what `output` holds may still be sent.
    pub fn advance(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<Progress, Refused> {
        loop {
            match self.state {
                State::ClientFlags => {
                    let Some(flags) = input.split_first_chunk().map(|(four, _)| u32::from_be_bytes(*four))
                    else {
                        return Ok(Progress::More);
                    };
                    input.advance(4);
                    self.client_flags(flags)?;
                }
                State::Option => {
                    let Some((sixteen, _)) = input.split_first_chunk::<OPTION_HEADER_LEN>() else {
                        return Ok(Progress::More);
                    };
                    let header = OptionHeader::decode(sixteen)?;
                    input.advance(OPTION_HEADER_LEN);
                    self.state = self.option_header(header)?;
                }
                State::Payload(header) => {
                    let length = header.length as usize;
                    if input.len() < length {
                        return Ok(Progress::More);
                    }
                    let payload = input.split_to(length);
                    self.state = State::Option;
                    match self.answer(header.option, &payload, output)? {
                        Progress::More => {}
                        Progress::StartTls if !input.is_empty() => {
                            return Err(Refused::PlainAfterStartTls(input.len()));
                        }
                        end => return Ok(end),
                    }
                }
                State::Drain { ref mut left, option, ref answer } => {
                    let taken = input.len().min(*left as usize);
                    input.advance(taken);
                    *left -= taken as u32;
                    if *left > 0 {
                        return Ok(Progress::More);
                    }
                    answer.encode(option, output);
                    self.state = State::Option;
                }
            }
        }
    }

    fn client_flags(&mut self, flags: u32) -> Result<(), Refused> {
        let unknown = flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES);
        if unknown != 0 {
            return Err(Refused::ClientFlags(unknown));
        }
        self.fixed_newstyle = flags & u32::from(FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        self.state = State::Option;
        Ok(())
    }

    /// Decides, by the header alone, whether the payload is read or drained.
    fn option_header(&mut self, header: OptionHeader) -> Result<State, Refused> {
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Err(Refused::TooManyOptions);
        }
        if !self.fixed_newstyle && header.option != option::EXPORT_NAME {
            return Err(Refused::NotFixedNewstyle(header.option));
        }
        if header.length > MAX_DRAIN {
            return Err(Refused::OptionTooLong(header.length));
        }
        let drain = |error, text: &str| {
            let answer = OptionReply::Error(error, text.to_owned());
            Ok(State::Drain { left: header.length, option: header.option, answer })
        };
        if self.tls == Tls::Required && !matches!(header.option, option::STARTTLS | option::ABORT) {
            if header.option == option::EXPORT_NAME {
                return Err(Refused::TlsRequired);
            }
            return drain(OptionError::TlsRequired, "this server requires TLS");
        }
        match header.option {
            option::EXPORT_NAME if header.length as usize > wire::MAX_STRING => {
                Err(Malformed::StringTooLong(header.length as usize).into())
            }
            option::EXPORT_NAME
            | option::ABORT
            | option::LIST
            | option::STARTTLS
            | option::INFO
            | option::GO
            | option::STRUCTURED_REPLY
            | option::LIST_META_CONTEXT
            | option::SET_META_CONTEXT
            | option::EXTENDED_HEADERS => {
                if header.length <= MAX_OPTION {
                    Ok(State::Payload(header))
                } else {
                    drain(OptionError::TooBig, "the option is too long")
                }
            }
            _ => drain(OptionError::Unsupported, "the option is not supported"),
        }
    }

    fn answer(&mut self, number: u32, payload: &[u8], output: &mut BytesMut) -> Result<Progress, Refused> {
        // Whatever it says: a choice of contexts takes the place of the one before, even if it fails.
        if number == option::SET_META_CONTEXT {
            self.allocation = None;
        }
        let wanted = match ClientOption::decode(number, payload) {
            Ok(wanted) => wanted,
            // EXPORT_NAME cannot be answered with an error.
            Err(malformed) if number == option::EXPORT_NAME => return Err(malformed.into()),
            Err(malformed) => {
                let text = format!("the option is malformed: {malformed}");
                OptionReply::Error(OptionError::Invalid, text).encode(number, output);
                return Ok(Progress::More);
            }
        };
        let mut say = |reply: OptionReply| reply.encode(number, output);
        let refusal = |error, text: &str| OptionReply::Error(error, text.to_owned());
        match wanted {
            ClientOption::ExportName(_) if self.style == Style::Extended => {
                return Err(Refused::ExtendedHeaders);
            }
            ClientOption::ExportName(name) => {
                let export = self.exports.find(&name).ok_or(Refused::UnknownExport)?;
                let session = self.session(export);
                output.put_u64(export.device.size());
                output.put_u16(export.transmission_flags(session.style, session.allocation));
                if !self.no_zeroes {
                    output.put_bytes(0, 124);
                }
                return Ok(Progress::Chosen(session));
            }
            ClientOption::Abort => {
                say(OptionReply::Ack);
                return Ok(Progress::Goodbye);
            }
            ClientOption::List => {
                for (name, export) in self.exports.names() {
                    let (name, description) = (name.to_owned(), export.description.clone());
                    say(OptionReply::Server { name, description });
                }
                say(OptionReply::Ack);
            }
            ClientOption::StartTls => match self.tls {
                Tls::Off => say(refusal(OptionError::Policy, "this server is not set up for TLS")),
                Tls::Started => say(refusal(OptionError::Invalid, "this session is under TLS")),
                Tls::Offered | Tls::Required => {
                    say(OptionReply::Ack);
                    return Ok(Progress::StartTls);
                }
            },
            ClientOption::StructuredReply if self.style == Style::Extended => {
                let text = "extended headers were negotiated";
                say(refusal(OptionError::ExtendedHeadersRequired, text));
            }
            ClientOption::StructuredReply => {
                self.style = Style::Structured;
                say(OptionReply::Ack);
            }
            ClientOption::ExtendedHeaders => {
                self.style = Style::Extended;
                say(OptionReply::Ack);
            }
            ClientOption::Info(query) => {
                self.describe(number, &query, output);
            }
            ClientOption::Go(query) => {
                return Ok(self.describe(number, &query, output).map_or(Progress::More, Progress::Chosen));
            }
            ClientOption::ListMetaContext(query) => self.meta_context(number, &query, true, output),
            ClientOption::SetMetaContext(query) => self.meta_context(number, &query, false, output),
            // Unknown options were drained by their header.
            ClientOption::Unknown(_) => {}
        }
        Ok(Progress::More)
    }

    fn session(&self, export: &Arc<Export>) -> Session {
        let chosen = self.allocation.as_ref().is_some_and(|chosen| Arc::ptr_eq(chosen, export));
        Session { export: Arc::clone(export), style: self.style, allocation: chosen }
    }

    /// Answers `INFO` and `GO`; the session, if there is an export of that name.
    fn describe(&self, number: u32, query: &ExportQuery, output: &mut BytesMut) -> Option<Session> {
        let Some(export) = self.exports.find(&query.name) else {
            let text = "no export of that name".to_owned();
            OptionReply::Error(OptionError::UnknownExport, text).encode(number, output);
            return None;
        };
        let session = self.session(export);
        let flags = export.transmission_flags(session.style, session.allocation);
        let mut say = |reply: OptionReply| reply.encode(number, output);
        say(OptionReply::Export { size: export.device.size(), flags });
        // Told unasked: a client that does not know of sizes ignores them, others save a round trip.
        say(BLOCK_SIZE);
        // Each at most once, however often a client repeats itself.
        if query.information.contains(&info::NAME) {
            say(OptionReply::Name(export.name.clone()));
        }
        if query.information.contains(&info::DESCRIPTION) {
            say(OptionReply::Description(export.description.clone()));
        }
        say(OptionReply::Ack);
        Some(session)
    }

    /// Answers `LIST_META_CONTEXT` and `SET_META_CONTEXT`. Queries of namespaces that are not known choose nothing.
    fn meta_context(&mut self, number: u32, query: &MetaQuery, list: bool, output: &mut BytesMut) {
        let mut say = |reply: OptionReply| reply.encode(number, output);
        if !list && self.style == Style::Simple {
            let text = "structured replies come first".to_owned();
            return say(OptionReply::Error(OptionError::Invalid, text));
        }
        let Some(export) = self.exports.find(&query.name) else {
            let text = "no export of that name".to_owned();
            return say(OptionReply::Error(OptionError::UnknownExport, text));
        };
        if query.wants_allocation(list) {
            let id = if list { 0 } else { ALLOCATION_ID };
            say(OptionReply::MetaContext { id, name: ALLOCATION_CONTEXT.to_owned() });
            if !list {
                self.allocation = Some(Arc::clone(export));
            }
        }
        say(OptionReply::Ack);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Durability, Io, Piece, ZeroMode};
    use bytes::Bytes;
    use proptest::prelude::*;

    /// A device that is only asked for its size.
    struct Sized(u64);

    impl Device for Sized {
        fn name(&self) -> &'static str {
            "sized"
        }
        fn size(&self) -> u64 {
            self.0
        }
        fn refresh(&self) -> Io<'_, u64> {
            Box::pin(async { Ok(self.0) })
        }
        fn read(&self, _: u64, buf: BytesMut) -> Io<'_, BytesMut> {
            Box::pin(async { Ok(buf) })
        }
        fn write(&self, _: u64, _: Bytes, _: Durability) -> Io<'_, ()> {
            Box::pin(async { Ok(()) })
        }
        fn flush(&self) -> Io<'_, ()> {
            Box::pin(async { Ok(()) })
        }
        fn discard(&self, _: u64, _: u64) -> Io<'_, ()> {
            Box::pin(async { Ok(()) })
        }
        fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode, _: Durability) -> Io<'_, ()> {
            Box::pin(async { Ok(()) })
        }
        fn locate(&self, _: u64, _: u64) -> Io<'_, Option<Vec<Piece>>> {
            Box::pin(async { Ok(None) })
        }
    }

    fn exports() -> Exports {
        let device = Arc::new(Sized(1 << 20));
        Exports::single(Export { name: "vol".into(), description: "text".into(), device, read_only: false })
    }

    /// The types of the replies in `output`, after the greeting.
    fn kinds(output: &[u8]) -> Vec<u32> {
        let mut rest = &output[18..];
        let mut kinds = Vec::new();
        while rest.len() >= 20 {
            assert_eq!(rest[..8], wire::OPTION_REPLY_MAGIC.to_be_bytes());
            kinds.push(u32::from_be_bytes(rest[12..16].try_into().unwrap()));
            let length = u32::from_be_bytes(rest[16..20].try_into().unwrap());
            rest = &rest[20 + length as usize..];
        }
        assert!(rest.is_empty());
        kinds
    }

    fn opened(flags: u32) -> BytesMut {
        BytesMut::from(&flags.to_be_bytes()[..])
    }

    fn send(input: &mut BytesMut, wanted: &ClientOption) {
        let mut bytes = Vec::new();
        wanted.encode(&mut bytes);
        input.extend_from_slice(&bytes);
    }

    fn query(name: &str) -> ExportQuery {
        ExportQuery { name: name.into(), information: vec![1, 2, 2, 3, 99] }
    }

    #[test]
    fn the_whole_haggling_in_one_piece_or_byte_by_byte() {
        let mut all = opened(3);
        send(&mut all, &ClientOption::Unknown(77));
        send(&mut all, &ClientOption::List);
        send(&mut all, &ClientOption::Info(query("")));
        send(&mut all, &ClientOption::Go(query("none")));
        send(&mut all, &ClientOption::Go(query("vol")));
        all.extend_from_slice(b"rest");
        let unsupported = OptionError::Unsupported as u32;
        let unknown = OptionError::UnknownExport as u32;
        let expected = [unsupported, 2, 2, 1, 3, 3, 3, 3, 1, unknown, 3, 3, 3, 3, 1];
        for step in [1, 3, all.len()] {
            let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
            let mut handshake = Handshake::start(exports(), Tls::Off, &mut output);
            let mut chosen = None;
            for piece in all.chunks(step) {
                input.extend_from_slice(piece);
                if chosen.is_none()
                    && let Progress::Chosen(export) = handshake.advance(&mut input, &mut output).unwrap()
                {
                    chosen = Some(export);
                }
            }
            assert_eq!(chosen.unwrap().export.name, "vol");
            assert_eq!(&input[..], b"rest");
            assert_eq!(kinds(&output), expected);
        }
    }

    #[test]
    fn export_name_is_answered_with_or_without_zeroes() {
        for (flags, length) in [(0, 18 + 10 + 124), (1, 18 + 10 + 124), (3, 18 + 10)] {
            let (mut input, mut output) = (opened(flags), BytesMut::new());
            send(&mut input, &ClientOption::ExportName(String::new()));
            let progress =
                Handshake::start(exports(), Tls::Off, &mut output).advance(&mut input, &mut output);
            assert!(matches!(progress, Ok(Progress::Chosen(_))));
            assert_eq!(output.len(), length);
            assert_eq!(output[18..26], (1u64 << 20).to_be_bytes());
        }
        let (mut input, mut output) = (opened(3), BytesMut::new());
        send(&mut input, &ClientOption::ExportName("other".into()));
        let progress = Handshake::start(exports(), Tls::Off, &mut output).advance(&mut input, &mut output);
        assert!(matches!(progress, Err(Refused::UnknownExport)));
    }

    /// What `options` are answered in a handshake under such rules, and where it got to.
    fn haggle(tls: Tls, options: &[ClientOption]) -> (Vec<u32>, Result<Progress, Refused>, Handshake) {
        let (mut input, mut output) = (opened(3), BytesMut::new());
        for option in options {
            send(&mut input, option);
        }
        let mut handshake = Handshake::start(exports(), tls, &mut output);
        let progress = handshake.advance(&mut input, &mut output);
        (kinds(&output), progress, handshake)
    }

    fn contexts(name: &str, query: &str) -> MetaQuery {
        MetaQuery { name: name.into(), queries: vec![query.into()] }
    }

    fn chosen(progress: Result<Progress, Refused>) -> (Style, bool) {
        match progress {
            Ok(Progress::Chosen(session)) => (session.style, session.allocation),
            _ => panic!("no session"),
        }
    }

    #[test]
    fn styles_and_contexts_are_settled_and_settled_again() {
        use ClientOption as O;
        let set = |name: &str, query: &str| O::SetMetaContext(contexts(name, query));
        let go = || O::Go(ExportQuery { name: "vol".into(), information: Vec::new() });
        let invalid = OptionError::Invalid as u32;
        let (told, progress, _) = haggle(Tls::Off, &[set("vol", "base:allocation"), go()]);
        assert_eq!((told, chosen(progress)), (vec![invalid, 3, 3, 1], (Style::Simple, false)));
        let (told, progress, _) = haggle(Tls::Off, &[O::StructuredReply, set("", "base:allocation"), go()]);
        assert_eq!((told, chosen(progress)), (vec![1, 4, 1, 3, 3, 1], (Style::Structured, true)));
        // A later choice replaces an earlier one, also if it fails or chooses nothing.
        for (again, told) in [(set("vol", "base:"), 1), (set("none", ""), OptionError::UnknownExport as u32)]
        {
            let options = [O::StructuredReply, set("vol", "base:allocation"), again, go()];
            let (all, progress, _) = haggle(Tls::Off, &options);
            assert_eq!((all, chosen(progress)), (vec![1, 4, 1, told, 3, 3, 1], (Style::Structured, false)));
        }
        let (told, progress, _) =
            haggle(Tls::Off, &[O::ExtendedHeaders, O::StructuredReply, set("vol", "base:allocation"), go()]);
        let required = OptionError::ExtendedHeadersRequired as u32;
        assert_eq!((told, chosen(progress)), (vec![1, required, 4, 1, 3, 3, 1], (Style::Extended, true)));
        let (_, progress, _) = haggle(Tls::Off, &[O::ExtendedHeaders, O::ExportName("vol".into())]);
        assert!(matches!(progress, Err(Refused::ExtendedHeaders)));
        let list = |query| O::ListMetaContext(contexts("", query));
        let (told, _, _) = haggle(Tls::Off, &[list("base:"), list("x-other:"), list("base:allocation")]);
        assert_eq!(told, [4, 1, 1, 4, 1]);
    }

    #[test]
    fn flags_follow_what_was_settled() {
        use transmission_flags as f;
        let export = exports().find("").cloned().unwrap();
        let df = |style| export.transmission_flags(style, true) & (f::SEND_DF | f::BLOCK_STATUS_PAYLOAD);
        assert_eq!(df(Style::Simple), 0);
        assert_eq!(df(Style::Structured), f::SEND_DF);
        assert_eq!(df(Style::Extended), f::SEND_DF | f::BLOCK_STATUS_PAYLOAD);
        assert_eq!(export.transmission_flags(Style::Extended, false) & f::BLOCK_STATUS_PAYLOAD, 0);
    }

    #[test]
    fn before_tls_that_is_required_nothing_is_told() {
        use ClientOption as O;
        let required = OptionError::TlsRequired as u32;
        let asked = [
            O::List,
            O::Info(query("vol")),
            O::Go(query("vol")),
            O::Unknown(99),
            O::StructuredReply,
            O::ListMetaContext(contexts("vol", "base:")),
        ];
        let (told, progress, _) = haggle(Tls::Required, &asked);
        assert_eq!(told, [required; 6]);
        assert!(matches!(progress, Ok(Progress::More)));
        let (told, progress, _) = haggle(Tls::Required, &[O::ExportName("vol".into())]);
        assert!(told.is_empty() && matches!(progress, Err(Refused::TlsRequired)));
        let (told, progress, _) = haggle(Tls::Required, &[O::Abort]);
        assert!(told == [1] && matches!(progress, Ok(Progress::Goodbye)));
        let (told, _, _) = haggle(Tls::Off, &[O::StartTls]);
        assert_eq!(told, [OptionError::Policy as u32]);
    }

    #[test]
    fn with_tls_the_haggling_begins_anew() {
        use ClientOption as O;
        let go = ClientOption::Go(query("vol"));
        let before = [O::ExtendedHeaders, O::SetMetaContext(contexts("vol", "base:allocation")), O::StartTls];
        let (told, progress, mut handshake) = haggle(Tls::Offered, &before);
        assert!(told == [1, 4, 1, 1] && matches!(progress, Ok(Progress::StartTls)));
        handshake.secured();
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        send(&mut input, &O::StartTls);
        send(&mut input, &go);
        let progress = handshake.advance(&mut input, &mut output);
        assert_eq!(chosen(progress), (Style::Simple, false));
        // A second one is refused, and the session goes on.
        assert_eq!(output[12..16], (OptionError::Invalid as u32).to_be_bytes());
        // What was sent behind STARTTLS, before its answer, is nobody's.
        let (_, progress, _) = haggle(Tls::Required, &[O::StartTls, go]);
        assert!(matches!(progress, Err(Refused::PlainAfterStartTls(_))));
    }

    #[test]
    fn what_a_client_may_not_do_ends_the_handshake() {
        let refused = |input: &mut BytesMut| {
            let mut output = BytesMut::new();
            Handshake::start(exports(), Tls::Off, &mut output).advance(input, &mut output).err().unwrap()
        };
        assert_eq!(refused(&mut opened(4)), Refused::ClientFlags(4));
        let mut input = opened(0);
        send(&mut input, &ClientOption::List);
        assert_eq!(refused(&mut input), Refused::NotFixedNewstyle(option::LIST));
        let mut input = opened(1);
        for _ in 0..=MAX_OPTIONS {
            send(&mut input, &ClientOption::List);
        }
        assert_eq!(refused(&mut input), Refused::TooManyOptions);
        let mut input = opened(1);
        OptionHeader { option: 55, length: u32::MAX }.encode(&mut input);
        assert_eq!(refused(&mut input), Refused::OptionTooLong(u32::MAX));
        let mut input = opened(1);
        OptionHeader { option: option::EXPORT_NAME, length: 4097 }.encode(&mut input);
        assert_eq!(refused(&mut input), Refused::Malformed(Malformed::StringTooLong(4097)));
        let mut input = opened(1);
        input.extend_from_slice(&[b'x'; OPTION_HEADER_LEN]);
        assert!(matches!(refused(&mut input), Refused::Malformed(Malformed::Magic { .. })));
    }

    #[test]
    fn payloads_that_are_not_read_are_drained() {
        let (mut input, mut output) = (opened(1), BytesMut::new());
        OptionHeader { option: 55, length: 100_000 }.encode(&mut input);
        input.extend_from_slice(&vec![b'x'; 100_000]);
        OptionHeader { option: option::GO, length: MAX_OPTION + 1 }.encode(&mut input);
        input.extend_from_slice(&vec![b'x'; MAX_OPTION as usize + 1]);
        OptionHeader { option: option::INFO, length: 3 }.encode(&mut input);
        input.extend_from_slice(b"xxx");
        send(&mut input, &ClientOption::Abort);
        let progress = Handshake::start(exports(), Tls::Off, &mut output).advance(&mut input, &mut output);
        assert!(matches!(progress, Ok(Progress::Goodbye)));
        let errors = [OptionError::Unsupported, OptionError::TooBig, OptionError::Invalid].map(|e| e as u32);
        assert_eq!(kinds(&output), [errors[0], errors[1], errors[2], 1]);
    }

    #[test]
    fn a_read_only_export_says_so() {
        let device = Arc::new(Sized(1));
        let export = Export { name: String::new(), description: String::new(), device, read_only: true };
        let flags = export.transmission_flags(Style::Simple, false);
        assert_ne!(flags & transmission_flags::READ_ONLY, 0);
        assert_eq!(flags & transmission_flags::SEND_TRIM, 0);
        assert_eq!(flags & (transmission_flags::SEND_DF | transmission_flags::SEND_FAST_ZERO), 0);
        assert_eq!(Exports::single(export).names().map(|(name, _)| name).collect::<Vec<_>>(), [""]);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            flags in 0..4u32, options in proptest::collection::vec((0..12u32, proptest::collection::vec(any::<u8>(), 0..50)), 0..40),
            noise in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let (mut input, mut output) = (opened(flags), BytesMut::new());
            for (option, payload) in options {
                OptionHeader { option, length: payload.len() as u32 }.encode(&mut input);
                input.extend_from_slice(&payload);
            }
            input.extend_from_slice(&noise);
            let before = input.len();
            let mut handshake = Handshake::start(exports(), Tls::Off, &mut output);
            let progress = handshake.advance(&mut input, &mut output);
            // Either it is over, or all that is left is less than one whole thing.
            if matches!(progress, Ok(Progress::More)) {
                prop_assert!(input.len() < before && input.len() <= 16 + 100);
            }
        }
    }
}
