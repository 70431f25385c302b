//! What a fuzzer feeds to the NBD server, phase by phase, and what must hold whatever that is. One function a phase, for
//! libFuzzer (`fuzz/`) and for the mutations of recorded sessions in `tests/nbd_fuzz.rs`. It names `raid`, `tokio` and
//! `bytes` only, so that the fuzz targets need nothing else.
//!
//! The first byte of an input chooses the circumstances, the rest is what the peer sends.

use bytes::{Buf, Bytes, BytesMut};
use raid::device::{Device, Durability, Io, Piece, ZeroMode, check_range};
use raid::error::Operation;
use raid::nbd::handshake::{Handshake, MAX_OPTIONS, Progress};
use raid::nbd::transmission::{Pool, Stop, Timing, run};
use raid::nbd::wire::{Chunk, ChunkHeader, DONE, OPTION_REPLY_MAGIC, SIMPLE_REPLY_LEN, SimpleReply, Style};
use raid::nbd::{Export, Exports, Session, Tls};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes of the device.
const SIZE: usize = 1 << 20;
/// Bytes at its start that were never written.
const BLANK: u64 = 64 << 10;
/// The most that one option may make the server say: a name, a description, and what is around them, for each export.
const MOST_SAID: usize = 4 * (4096 + 4096 + 64);

/// What the first byte of an input for [`handshake`] says.
fn handshake_rules(first: u8) -> (Tls, usize) {
    let tls = [Tls::Off, Tls::Offered, Tls::Required, Tls::Started][usize::from(first) % 4];
    // Pieces of all sizes; 0: all at once.
    (tls, usize::from(first) / 4)
}

/// A client's bytes up to its choice of an export. They may come in pieces, under any rule about TLS.
pub fn handshake(input: &[u8]) {
    let Some((&first, bytes)) = input.split_first() else { return };
    let (tls, piece) = handshake_rules(first);
    let mut output = BytesMut::new();
    let mut handshake = Handshake::start(Exports::single(export(false)), tls, &mut output);
    output.advance(18);
    let mut received = BytesMut::new();
    for bytes in bytes.chunks(if piece == 0 { bytes.len().max(1) } else { piece }) {
        received.extend_from_slice(bytes);
        let progress = handshake.advance(&mut received, &mut output);
        assert!(output.len() <= (MAX_OPTIONS as usize + 1) * MOST_SAID, "{} bytes of answers", output.len());
        match progress {
            Ok(Progress::More) => assert!(received.len() <= 8192 + 16, "{} bytes are held", received.len()),
            Ok(Progress::StartTls) => {
                assert!(tls != Tls::Off && received.is_empty());
                handshake.secured();
            }
            Ok(Progress::Chosen(session)) => {
                assert!(session.style >= Style::Structured || !session.allocation);
                return;
            }
            Ok(Progress::Goodbye) | Err(_) => break,
        }
    }
    // What was said is whole replies.
    while output.has_remaining() {
        assert_eq!(output.get_u64(), OPTION_REPLY_MAGIC);
        output.advance(8);
        let length = output.get_u32() as usize;
        output.advance(length);
    }
}

/// The byte that begins an input for [`transmission`] and [`replies`].
#[must_use]
pub fn circumstances(style: Style, allocation: bool) -> u8 {
    style as u8 | u8::from(allocation) << 2
}

fn style_of(first: u8) -> Style {
    [Style::Simple, Style::Structured, Style::Extended, Style::Extended][usize::from(first) % 4]
}

/// A client's bytes from its choice of an export on. What it is answered in chunks must be whole, and no more replies than
/// it has asked for.
pub fn transmission(input: &[u8]) {
    let Some((&first, bytes)) = input.split_first() else { return };
    let style = style_of(first);
    let export = Arc::new(export(first & 8 != 0));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let answers = runtime.expect("a runtime can be made").block_on(async move {
        let (client, mut server) = tokio::io::duplex(64 << 10);
        let (mut receive, mut send) = tokio::io::split(client);
        let session = Session { export, style, allocation: first & 4 != 0 && style >= Style::Structured };
        let pool = Arc::new(Pool::new(0));
        let timing =
            Timing { stall: Duration::from_secs(10), drain: Duration::from_secs(10), busy: Duration::ZERO };
        let stop = Stop { announced: Box::pin(std::future::pending()), line: None };
        let serving = async move { run(&mut server, BytesMut::new(), session, pool, timing, stop).await };
        let sending = async move {
            // The server hangs up where it likes.
            drop(send.write_all(bytes).await);
            drop(send.shutdown().await);
        };
        let mut answers = Vec::new();
        let receiving = async { receive.read_to_end(&mut answers).await };
        let (_, (), received) = tokio::join!(serving, sending, receiving);
        received.expect("a pipe in memory does not fail");
        answers
    });
    if style >= Style::Structured {
        let (replies, rest) = chunks(style, &answers);
        assert_eq!(rest, 0, "the last reply is cut short");
        assert!(replies <= bytes.len() / style.request_len(), "{replies} replies");
    }
}

/// A server's bytes, as a client (and these tests) reads them.
pub fn replies(input: &[u8]) {
    let Some((&first, mut bytes)) = input.split_first() else { return };
    let style = style_of(first);
    if style >= Style::Structured {
        chunks(style, bytes);
        return;
    }
    while let Some((header, rest)) = bytes.split_first_chunk::<SIMPLE_REPLY_LEN>() {
        if SimpleReply::decode(header).is_err() {
            return;
        }
        bytes = rest;
    }
}

/// How many replies `bytes` end, and how many bytes are left that are no whole chunk.
fn chunks(style: Style, mut bytes: &[u8]) -> (usize, usize) {
    let mut replies = 0;
    loop {
        let header = if style == Style::Extended {
            bytes.split_first_chunk().map(|(header, rest)| (ChunkHeader::decode_extended(header), rest))
        } else {
            bytes.split_first_chunk().map(|(header, rest)| (ChunkHeader::decode_structured(header), rest))
        };
        let Some((Ok(header), rest)) = header else { break };
        let Some((payload, rest)) =
            usize::try_from(header.length).ok().and_then(|length| rest.split_at_checked(length))
        else {
            break;
        };
        if Chunk::decode(header.kind, payload).is_err() {
            break;
        }
        replies += usize::from(header.flags & DONE);
        bytes = rest;
    }
    (replies, bytes.len())
}

fn export(read_only: bool) -> Export {
    let device = Arc::new(Memory(Mutex::new(vec![0; SIZE])));
    Export { name: "vol".into(), description: "under test".into(), device, read_only }
}

/// A device in memory.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn change(
        &self,
        operation: Operation,
        at: u64,
        len: u64,
        change: impl FnOnce(&mut [u8]),
    ) -> Io<'static, ()> {
        let checked = check_range(operation, at, len, SIZE as u64);
        if checked.is_ok() {
            let mut bytes = self.0.lock().expect("nobody panics with it");
            change(&mut bytes[at as usize..(at + len) as usize]);
        }
        Box::pin(async { checked })
    }
}

impl Device for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn refresh(&self) -> Io<'_, u64> {
        Box::pin(async { Ok(SIZE as u64) })
    }

    fn read(&self, at: u64, mut buf: BytesMut) -> Io<'_, BytesMut> {
        let read = self.change(Operation::Read, at, buf.len() as u64, |bytes| buf.copy_from_slice(bytes));
        Box::pin(async { read.await.map(|()| buf) })
    }

    fn write(&self, at: u64, data: Bytes, _: Durability) -> Io<'_, ()> {
        self.change(Operation::Write, at, data.len() as u64, |bytes| bytes.copy_from_slice(&data))
    }

    fn flush(&self) -> Io<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.change(Operation::Discard, at, len, |bytes| bytes.fill(0))
    }

    fn write_zeroes(&self, at: u64, len: u64, _: ZeroMode, _: Durability) -> Io<'_, ()> {
        self.change(Operation::WriteZeroes, at, len, |bytes| bytes.fill(0))
    }

    fn locate(&self, _: u64, _: u64) -> Io<'_, Option<Vec<Piece>>> {
        Box::pin(async { Ok(None) })
    }

    fn blank(&self, at: u64, len: u64) -> Vec<Range<u64>> {
        // Every other page of the first few, so that reads are cut.
        let pages = (0..BLANK).step_by(8192).map(|start| start.max(at)..(start + 4096).min(at + len));
        pages.filter(|page| !page.is_empty()).collect()
    }
}
