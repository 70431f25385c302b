//! Frames and messages: bytes off a socket in, typed requests out; typed responses in, bytes for a socket out.
//!
//! - [`apis`]: which APIs are served, in which versions.
//! - [`shape`]: checks that a request is what it claims before the codec, which trusts array lengths, sees it.
//! - [`request`]: header and body of a request.
//!
//! A frame is a 32-bit length and that many bytes. Until a connection has sent one valid request, a frame over
//! [`FIRST_FRAME_MAX`] is taken only if its header names a bulk API (`Produce`): clients that know our versions
//! already may produce at once, while garbage (a TLS hello, an HTTP request) buys no memory.

pub mod apis;
pub mod request;
pub mod shape;

pub use request::{Header, Request};

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::messages::{ApiKey, ResponseHeader};
use kafka_protocol::protocol::Encodable;

/// The largest frame before a connection has shown that it speaks Kafka, but for bulk APIs.
pub const FIRST_FRAME_MAX: usize = 64 * 1024;

/// Why a peer's bytes are refused; the connection is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misbehaved {
    /// A frame length below zero or too short for a request header.
    #[error("a frame of {0} bytes is no Kafka request")]
    FrameLength(i32),
    /// A frame longer than allowed.
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    FrameTooLong {
        /// What the peer announced.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A large first frame whose header is not that of a bulk request.
    #[error("the first frame is {0} bytes long and no Produce request")]
    FirstFrame(usize),
    /// The header does not parse.
    #[error("the request header is malformed")]
    Header,
    /// An API that is not served, or not in that version.
    #[error("API key {key} version {version} is not served")]
    NotServed {
        /// As sent.
        key: i16,
        /// As sent.
        version: i16,
    },
    /// The body does not parse.
    #[error("the body of {api:?} version {version} is malformed: {cause}")]
    Body {
        /// The API.
        api: ApiKey,
        /// Its version.
        version: i16,
        /// What is wrong.
        cause: shape::Malformed,
    },
    /// The peer went away, or stalled, in the middle of a frame.
    #[error("the peer sent {got} of {length} bytes of a frame and stopped")]
    Stalled {
        /// Bytes that came.
        got: usize,
        /// Bytes that were announced.
        length: usize,
    },
}

/// How much of a request has to be seen to judge a large first frame: key and version.
pub const JUDGED: usize = 4;

/// Judges a frame by its length and, for a large first one, by the first bytes of its header.
///
/// `Ok(None)` means that [`JUDGED`] bytes of the body must be seen first.
pub fn admit_frame(
    length: i32,
    body: &[u8],
    trusted: bool,
    limit: usize,
) -> Result<Option<usize>, Misbehaved> {
    let long = usize::try_from(length).map_err(|_| Misbehaved::FrameLength(length))?;
    // Key, version and correlation id: nothing shorter is a request.
    if long < 8 {
        return Err(Misbehaved::FrameLength(length));
    }
    if long > limit {
        return Err(Misbehaved::FrameTooLong { length: long, limit });
    }
    if trusted || long <= FIRST_FRAME_MAX {
        return Ok(Some(long));
    }
    let Some(head) = body.get(..JUDGED) else { return Ok(None) };
    let key = i16::from_be_bytes([head[0], head[1]]);
    let version = i16::from_be_bytes([head[2], head[3]]);
    let bulk = key == ApiKey::Produce as i16 && apis::served(ApiKey::Produce, version);
    if bulk { Ok(Some(long)) } else { Err(Misbehaved::FirstFrame(long)) }
}

/// A response, framed: length, header, body. Two allocations at most: the size is known beforehand.
pub fn response<M: Encodable>(
    correlation: i32,
    api: ApiKey,
    version: i16,
    body: &M,
) -> Result<Bytes, EncodeError> {
    let header_version = api.response_header_version(version);
    let failed = |e| EncodeError { api, version, cause: format!("{e:#}") };
    let size = body.compute_size(version).map_err(failed)?;
    let mut out = BytesMut::with_capacity(4 + 8 + size);
    out.put_i32(0);
    ResponseHeader::default()
        .with_correlation_id(correlation)
        .encode(&mut out, header_version)
        .map_err(failed)?;
    body.encode(&mut out, version).map_err(failed)?;
    Ok(framed(out))
}

/// Fills in the length at the head of a response whose first four bytes were kept for it.
#[must_use]
pub fn framed(mut out: BytesMut) -> Bytes {
    let length = (out.len() - 4) as u32;
    out[..4].copy_from_slice(&length.to_be_bytes());
    out.freeze()
}

/// A response of ours does not fit its schema: a mistake of ours, never of the peer.
#[derive(Debug, thiserror::Error)]
#[error("cannot encode the response of {api:?} version {version}: {cause}")]
pub struct EncodeError {
    api: ApiKey,
    version: i16,
    cause: String,
}

/// Appends an unsigned varint, as compact lengths and tag counts are.
pub fn put_uvarint(out: &mut BytesMut, mut value: u32) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

#[cfg(test)]
mod tests;
