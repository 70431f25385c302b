//! Replies that wait to be sent, in the style that was negotiated.
//!
//! A reply is one part or more, a part a header made here and a payload that lies where the device left it: in a buffer of
//! its own, on the connection's tray behind its header, or in a pipe. All but sparse reads are one part; a simple reply
//! costs no allocation.

use super::super::wire::{self, Chunk, ChunkHeader, DONE, ErrorCode, SimpleReply, Style, chunk};
use super::memory::Lease;
use super::pipes::{Pipes, Spliced};
use super::tray::{Laid, Tray};
use crate::device::Piece;
use bytes::{BufMut, Bytes};
use std::ops::Range;
use std::sync::Arc;

/// The longest header: an extended chunk's, and where its data begins.
pub(super) const HEAD: usize = ChunkHeader::EXTENDED_LEN + 8;

/// Which request a reply is for, and how it is to be framed.
#[derive(Debug, Clone, Copy)]
pub(super) struct To {
    pub(super) style: Style,
    pub(super) cookie: u64,
    pub(super) offset: u64,
}

/// Why a request is not done.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) code: ErrorCode,
    /// For people; goes along where the style has room for it.
    pub(super) text: String,
    /// Where in the export it failed, if that says anything.
    pub(super) at: Option<u64>,
}

impl Refusal {
    /// One that concerns the request as such.
    pub(super) fn new(code: ErrorCode, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), at: None }
    }

    /// One that concerns what lies at `offset`.
    pub(super) fn at(self, offset: u64) -> Self {
        Self { at: Some(offset), ..self }
    }
}

impl From<&crate::Error> for Refusal {
    fn from(error: &crate::Error) -> Self {
        Self::new(error.into(), error.to_string())
    }
}

/// Room that is written from its start on.
type Cursor<'a> = &'a mut [u8];

/// What follows a header.
#[derive(Debug)]
enum Payload {
    Bytes(Bytes),
    /// On the connection's tray, with the header.
    Laid(Laid),
    /// In a pipe, with so much of the header as is not to be sent before it.
    Spliced(Spliced),
}

/// A header and what follows it.
pub(super) struct Part {
    head: [u8; HEAD],
    /// Bytes of `head` that are sent from there.
    before: u8,
    /// Bytes in all.
    len: usize,
    payload: Payload,
}

impl Part {
    /// `write` writes the header, [`HEAD`] bytes at most.
    fn new(payload: Bytes, write: impl FnOnce(&mut Cursor<'_>)) -> Self {
        let mut head = [0; HEAD];
        let mut room: Cursor<'_> = &mut head;
        write(&mut room);
        let before = HEAD - room.len();
        Self { head, before: before as u8, len: before + payload.len(), payload: Payload::Bytes(payload) }
    }

    fn simple(to: To, outcome: Result<(), ErrorCode>) -> Self {
        Self::new(Bytes::new(), |head| SimpleReply::new(to.cookie, outcome).put(head))
    }

    fn chunk(to: To, kind: u16, payload: Bytes) -> Self {
        let (cookie, offset, length) = (to.cookie, to.offset, payload.len() as u64);
        Self::new(payload, |head| {
            ChunkHeader { flags: DONE, kind, cookie, offset, length }.encode(to.style, head);
        })
    }

    fn data(to: To, at: u64, data: Bytes, flags: u16) -> Self {
        let len = data.len() as u64;
        Self::new(data, |head| data_head(to, at, len, flags, head))
    }

    /// All that was read.
    fn whole(to: To, at: u64, data: Bytes) -> Self {
        let len = data.len() as u64;
        Self::new(data, |head| whole_head(to, at, len, head))
    }

    /// All that was read, by `fill`, which does not wait; `None` if it could not, or there is no room for it.
    fn laid(
        to: To,
        at: u64,
        len: usize,
        tray: &mut Tray,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> Option<Self> {
        let mut head = [0; HEAD];
        let mut room: Cursor<'_> = &mut head;
        whole_head(to, at, len as u64, &mut room);
        let before = HEAD - room.len();
        let laid = tray.lay(&head[..before], len, fill)?;
        Some(Self { head, before: 0, len: laid.len(), payload: Payload::Laid(laid) })
    }

    /// All that was read, in a pipe; `None` where it has to be copied.
    fn spliced(to: To, at: u64, pieces: &[Piece], pipes: &Arc<Pipes>) -> Option<Self> {
        let mut bytes = [0; HEAD];
        let mut room: Cursor<'_> = &mut bytes;
        let data = pieces.iter().map(|piece| piece.len).sum();
        whole_head(to, at, data, &mut room);
        let head = HEAD - room.len();
        let (before, spliced) = pipes.fill(&bytes[..head], pieces)?;
        let (before, len) = (before.len() as u8, head + data as usize);
        Some(Self { head: bytes, before, len, payload: Payload::Spliced(spliced) })
    }

    fn made(to: To, chunk: &Chunk, flags: u16) -> Self {
        let mut payload = Vec::new();
        chunk.encode(to.style, &mut payload);
        let (kind, length) = (chunk.kind(to.style), payload.len() as u64);
        Self::new(payload.into(), |head| {
            ChunkHeader { flags, kind, cookie: to.cookie, offset: to.offset, length }.encode(to.style, head);
        })
    }

    /// Its bytes in the order in which they are sent, but for those on the tray; what is in a pipe comes after them.
    pub(super) fn slices(&self) -> [&[u8]; 2] {
        let payload = if let Payload::Bytes(bytes) = &self.payload { &bytes[..] } else { &[] };
        [&self.head[..usize::from(self.before)], payload]
    }

    /// Where on the tray it lies; it has no other bytes then.
    pub(super) fn place(&self) -> Option<Range<usize>> {
        if let Payload::Laid(laid) = &self.payload { Some(laid.place()) } else { None }
    }

    /// What waits in a pipe.
    pub(super) fn pipe(&mut self) -> Option<&mut Spliced> {
        if let Payload::Spliced(spliced) = &mut self.payload { Some(spliced) } else { None }
    }

    /// Whether something of it waits in a pipe.
    pub(super) fn is_spliced(&self) -> bool {
        matches!(self.payload, Payload::Spliced(_))
    }
}

/// The header of all that was read.
fn whole_head(to: To, at: u64, len: u64, head: &mut Cursor<'_>) {
    match to.style {
        Style::Simple => SimpleReply::new(to.cookie, Ok(())).put(head),
        Style::Structured | Style::Extended => data_head(to, at, len, DONE, head),
    }
}

fn data_head(to: To, at: u64, len: u64, flags: u16, head: &mut Cursor<'_>) {
    let (cookie, offset, length) = (to.cookie, to.offset, len + 8);
    ChunkHeader { flags, kind: chunk::OFFSET_DATA, cookie, offset, length }.encode(to.style, head);
    head.put_u64(at);
}

/// A piece of what a sparse read found.
pub(super) enum Found {
    /// Data and where it begins.
    Data(u64, Bytes),
    /// Zeroes, from where and how many.
    Zeroes(u64, u32),
    /// Nothing can be told.
    Failed(Refusal),
}

/// A reply that waits to be sent.
pub(super) struct Reply {
    first: Part,
    /// What follows it; most replies have nothing.
    rest: Vec<Part>,
    pub(super) lease: Lease,
}

impl Reply {
    fn one(first: Part, lease: Lease) -> Self {
        Self { first, rest: Vec::new(), lease }
    }

    /// It is done, and there is nothing to tell.
    pub(super) fn done(to: To, lease: Lease) -> Self {
        let part = match to.style {
            Style::Simple => Part::simple(to, Ok(())),
            Style::Structured | Style::Extended => Part::chunk(to, chunk::NONE, Bytes::new()),
        };
        Self::one(part, lease)
    }

    /// All that was read, which is not empty.
    pub(super) fn data(to: To, at: u64, data: Bytes, lease: Lease) -> Self {
        Self::one(Part::whole(to, at, data), lease)
    }

    /// The same, `len` bytes that `fill` reads to the tray, which has room for them; gives the lease back if it could not.
    pub(super) fn laid(
        to: To,
        at: u64,
        len: usize,
        lease: Lease,
        tray: &mut Tray,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> Result<Self, Lease> {
        match Part::laid(to, at, len, tray, fill) {
            Some(part) => Ok(Self::one(part, lease)),
            None => Err(lease),
        }
    }

    /// All that was read, which is not empty, from where it lies; gives the lease back where it has to be copied.
    pub(super) fn spliced(
        to: To,
        at: u64,
        pieces: &[Piece],
        pipes: &Arc<Pipes>,
        lease: Lease,
    ) -> Result<Self, Lease> {
        match Part::spliced(to, at, pieces, pipes) {
            Some(part) => Ok(Self::one(part, lease)),
            None => Err(lease),
        }
    }

    /// What a sparse read found, in chunks; there must be one at least.
    pub(super) fn pieces(to: To, found: Vec<Found>, lease: Lease) -> Self {
        let last = found.len().saturating_sub(1);
        let mut parts = found.into_iter().enumerate().map(|(i, piece)| {
            let flags = if i == last { DONE } else { 0 };
            match piece {
                Found::Data(at, data) => Part::data(to, at, data, flags),
                Found::Zeroes(offset, length) => Part::made(to, &Chunk::Hole { offset, length }, flags),
                Found::Failed(Refusal { code, text: message, at: offset }) => {
                    Part::made(to, &Chunk::Error { code: code as u32, message, offset }, flags)
                }
            }
        });
        match parts.next() {
            Some(first) => Self { first, rest: parts.collect(), lease },
            None => Self::done(to, lease),
        }
    }

    /// Extents from the request's offset on.
    pub(super) fn status(to: To, extents: Vec<wire::Descriptor>, lease: Lease) -> Self {
        let chunk = Chunk::Status { context: wire::ALLOCATION_ID, extents };
        Self::one(Part::made(to, &chunk, DONE), lease)
    }

    /// It is not done.
    pub(super) fn refused(to: To, refusal: Refusal, lease: Lease) -> Self {
        let Refusal { code, text: message, at: offset } = refusal;
        let part = match to.style {
            Style::Simple => Part::simple(to, Err(code)),
            Style::Structured | Style::Extended => {
                Part::made(to, &Chunk::Error { code: code as u32, message, offset }, DONE)
            }
        };
        Self::one(part, lease)
    }

    /// What it consists of, in order.
    pub(super) fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.first).chain(&self.rest)
    }

    /// Bytes it has.
    pub(super) fn len(&self) -> usize {
        self.parts().map(|part| part.len).sum()
    }

    /// It has been sent, or will not be: gives back what it holds of the connection's.
    pub(super) fn end(self, tray: &mut Tray) -> Lease {
        if let Payload::Laid(laid) = self.first.payload {
            tray.take_away(laid);
        }
        self.lease
    }

    /// What of it waits in a pipe. Such a reply has one part.
    pub(super) fn pipe(&mut self) -> Option<&mut Spliced> {
        self.first.pipe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(reply: &Reply) -> Vec<u8> {
        let bytes = reply.parts().flat_map(|part| part.slices().concat()).collect::<Vec<_>>();
        assert_eq!(bytes.len(), reply.len());
        bytes
    }

    fn to(style: Style) -> To {
        To { style, cookie: 7, offset: 512 }
    }

    /// The chunks of an extended reply: flags and payload.
    fn chunks(mut bytes: &[u8]) -> Vec<(u16, Chunk)> {
        let mut chunks = Vec::new();
        while let Some((header, rest)) = bytes.split_first_chunk() {
            let header = ChunkHeader::decode_extended(header).unwrap();
            assert_eq!((header.cookie, header.offset), (7, 512));
            let (payload, rest) = rest.split_at(header.length as usize);
            chunks.push((header.flags, Chunk::decode(header.kind, payload).unwrap()));
            bytes = rest;
        }
        assert!(bytes.is_empty());
        chunks
    }

    #[test]
    fn a_simple_reply_is_a_header_and_the_data() {
        let bytes =
            sent(&Reply::data(to(Style::Simple), 512, Bytes::from_static(b"data"), Lease::Private(0)));
        assert_eq!(bytes, [&SimpleReply { error: 0, cookie: 7 }.encode()[..], b"data"].concat());
        let refusal = Refusal::new(ErrorCode::NoSpace, "full").at(512);
        let bytes = sent(&Reply::refused(to(Style::Simple), refusal, Lease::Private(0)));
        assert_eq!(bytes, SimpleReply { error: 28, cookie: 7 }.encode());
    }

    #[test]
    fn a_sparse_read_ends_with_its_last_chunk_only() {
        let found = vec![
            Found::Zeroes(512, 4096),
            Found::Data(4608, Bytes::from_static(b"data")),
            Found::Failed(Refusal::new(ErrorCode::Io, "broken").at(4612)),
        ];
        let bytes = sent(&Reply::pieces(to(Style::Extended), found, Lease::Private(0)));
        let expected = [
            (0, Chunk::Hole { offset: 512, length: 4096 }),
            (0, Chunk::Data { offset: 4608, data: b"data".to_vec() }),
            (DONE, Chunk::Error { code: 5, message: "broken".to_owned(), offset: Some(4612) }),
        ];
        assert_eq!(chunks(&bytes), expected);
    }

    #[test]
    fn what_has_nothing_to_tell_is_one_empty_chunk() {
        for reply in [
            Reply::done(to(Style::Extended), Lease::Private(0)),
            Reply::pieces(to(Style::Extended), Vec::new(), Lease::Private(0)),
        ] {
            assert_eq!(chunks(&sent(&reply)), [(DONE, Chunk::None)]);
        }
    }
}
