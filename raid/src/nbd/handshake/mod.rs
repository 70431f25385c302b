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
//!
//! The rooms: `session`, what can be chosen; `options`, what an option is answered. Here is the state machine around them.

mod options;
mod session;

pub use session::{Export, Exports, Session, Tls};

use super::wire::{
    self, FIXED_NEWSTYLE, Malformed, NO_ZEROES, OPTION_HEADER_LEN, OptionError, OptionHeader, OptionReply,
    Style, option,
};
use bytes::{Buf, BufMut, BytesMut};
use std::sync::Arc;

/// Options a client may send before it must have chosen.
pub const MAX_OPTIONS: u32 = 32;
/// Bytes of payload of one option that are read as a value: a name of 4096 and every number of information.
pub const MAX_OPTION: u32 = 8192;
/// Bytes of payload of one option that are drained when they are not to be read.
pub const MAX_DRAIN: u32 = 1 << 20;

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
}

#[cfg(test)]
mod tests {
    use super::super::wire::{ClientOption, ExportQuery};
    use super::*;
    use crate::device::{Device, Durability, Io, Piece, ZeroMode};
    use bytes::Bytes;
    use proptest::prelude::*;

    /// A device that is only asked for its size.
    pub(super) struct Sized(pub(super) u64);

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

    pub(super) fn exports() -> Exports {
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

    pub(super) fn opened(flags: u32) -> BytesMut {
        BytesMut::from(&flags.to_be_bytes()[..])
    }

    pub(super) fn send(input: &mut BytesMut, wanted: &ClientOption) {
        let mut bytes = Vec::new();
        wanted.encode(&mut bytes);
        input.extend_from_slice(&bytes);
    }

    pub(super) fn query(name: &str) -> ExportQuery {
        ExportQuery { name: name.into(), information: vec![1, 2, 2, 3, 99] }
    }

    /// What `options` are answered in a handshake under such rules, and where it got to.
    pub(super) fn haggle(
        tls: Tls,
        options: &[ClientOption],
    ) -> (Vec<u32>, Result<Progress, Refused>, Handshake) {
        let (mut input, mut output) = (opened(3), BytesMut::new());
        for option in options {
            send(&mut input, option);
        }
        let mut handshake = Handshake::start(exports(), tls, &mut output);
        let progress = handshake.advance(&mut input, &mut output);
        (kinds(&output), progress, handshake)
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
