//! Compression of record batches: Kafka's four codecs behind two functions, [`decompress`] and [`compress`]. Pure.
//!
//! Whoever must look into a batch comes here: compaction, lookups by time, and the offline tools. The broker's own way from producer to
//! consumer never does: batches are opaque to it.
//!
//! What clients really write:
//!
//! - gzip: one member or several.
//! - snappy: Java's framing (`\x82SNAPPY\0`, two versions, then blocks of `i32 length · raw snappy`), or raw snappy
//!   without any frame (librdkafka). Both are read, the framed form is written: every client reads it.
//! - lz4: the frame format; Java reads independent blocks only, so those are written, 64 KiB each.
//! - zstd: frames, with or without a content size.
//!
//! Invariant: [`decompress`] never returns, and hardly ever allocates, more than `limit` bytes, whatever the input says.

use bytes::{Buf, BufMut};
use std::io::{self, Read, Write};

/// Low three bits of a batch's attributes.
const MASK: i16 = 0x07;
/// What Java's snappy stream starts with; then two `i32` versions, of which neither matters.
const XERIAL: [u8; 8] = *b"\x82SNAPPY\0";
/// Bytes of that header.
const XERIAL_HEADER: usize = 16;
/// Bytes of a block that Java's snappy stream compresses by itself.
const XERIAL_BLOCK: usize = 32 * 1024;

/// Largest window of a zstd stream, as a power of two: 8 MiB is what the format asks every decoder to bear, and more than any
/// level below "ultra" takes.
const LARGEST_WINDOW: u32 = 23;

/// How the records of a batch are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// snappy, framed or raw.
    Snappy,
    /// lz4 frames.
    Lz4,
    /// Zstandard.
    Zstd,
}

impl Codec {
    /// The codec that a batch's attributes name; `None` for the numbers that name none.
    #[must_use]
    pub fn of(attributes: i16) -> Option<Self> {
        Some(match attributes & MASK {
            0 => Self::None,
            1 => Self::Gzip,
            2 => Self::Snappy,
            3 => Self::Lz4,
            4 => Self::Zstd,
            _ => return None,
        })
    }

    /// Kafka's name of it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Why bytes were not decompressed or compressed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecFault {
    /// They are no stream of their codec.
    #[error("its {codec} stream is damaged: {reason}")]
    Damaged {
        /// The codec.
        codec: &'static str,
        /// What the decoder said.
        reason: String,
    },
    /// They decompress to more than the caller takes. Units: bytes.
    #[error("its records decompress to more than {limit} bytes")]
    TooLarge {
        /// What the caller takes at most.
        limit: usize,
    },
    /// The encoder failed.
    #[error("its records could not be compressed with {codec}: {reason}")]
    Encoder {
        /// The codec.
        codec: &'static str,
        /// What the encoder said.
        reason: String,
    },
}

/// The records of a batch as they were before they were compressed, as a stream: whoever does not need all of them at once
/// has no more in memory than the codec's own window; raw snappy, which has none, is held whole, `limit` bytes at most. The
/// stream itself has no limit.
pub fn stream(codec: Codec, bytes: &[u8], limit: usize) -> Result<Box<dyn Read + Send + '_>, CodecFault> {
    Ok(match codec {
        Codec::None => Box::new(bytes),
        Codec::Gzip => Box::new(flate2::read::MultiGzDecoder::new(bytes)),
        Codec::Snappy => Box::new(io::Cursor::new(unsnap(bytes, limit)?)),
        Codec::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(bytes)),
        Codec::Zstd => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(bytes).map_err(|error| damaged(codec, &error))?;
            decoder.window_log_max(LARGEST_WINDOW).map_err(|error| damaged(codec, &error))?;
            Box::new(decoder)
        }
    })
}

/// The records of a batch as they were before they were compressed: at most `limit` bytes.
pub fn decompress(codec: Codec, bytes: &[u8], limit: usize) -> Result<Vec<u8>, CodecFault> {
    match codec {
        Codec::None if bytes.len() > limit => Err(CodecFault::TooLarge { limit }),
        Codec::None => Ok(bytes.to_vec()),
        Codec::Gzip => drain(codec, flate2::read::MultiGzDecoder::new(bytes), limit),
        Codec::Snappy => unsnap(bytes, limit),
        Codec::Lz4 => drain(codec, lz4_flex::frame::FrameDecoder::new(bytes), limit),
        Codec::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(bytes);
            drain(codec, decoder.map_err(|error| damaged(codec, &error))?, limit)
        }
    }
}

/// Compresses records as clients expect them, at the codec's own default level.
pub fn compress(codec: Codec, records: &[u8]) -> Result<Vec<u8>, CodecFault> {
    let failed = |reason: String| CodecFault::Encoder { codec: codec.name(), reason };
    match codec {
        Codec::None => Ok(records.to_vec()),
        Codec::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder
                .write_all(records)
                .and_then(|()| encoder.finish())
                .map_err(|error| failed(error.to_string()))
        }
        Codec::Snappy => {
            let mut out = Vec::from(XERIAL);
            out.put_i32(1);
            out.put_i32(1);
            let mut encoder = snap::raw::Encoder::new();
            for block in records.chunks(XERIAL_BLOCK) {
                let block = encoder.compress_vec(block).map_err(|error| failed(error.to_string()))?;
                // A block of 32 KiB does not grow past 31 bits.
                out.put_i32(block.len() as i32);
                out.extend_from_slice(&block);
            }
            Ok(out)
        }
        Codec::Lz4 => {
            let frame = lz4_flex::frame::FrameInfo::new()
                .block_size(lz4_flex::frame::BlockSize::Max64KB)
                .block_mode(lz4_flex::frame::BlockMode::Independent);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(frame, Vec::new());
            encoder.write_all(records).map_err(|error| failed(error.to_string()))?;
            encoder.finish().map_err(|error| failed(error.to_string()))
        }
        Codec::Zstd => zstd::stream::encode_all(records, zstd::DEFAULT_COMPRESSION_LEVEL)
            .map_err(|error| failed(error.to_string())),
    }
}

fn damaged(codec: Codec, reason: &impl ToString) -> CodecFault {
    CodecFault::Damaged { codec: codec.name(), reason: reason.to_string() }
}

/// Reads a stream to its end, but not past `limit`.
fn drain(codec: Codec, stream: impl Read, limit: usize) -> Result<Vec<u8>, CodecFault> {
    let mut out = Vec::new();
    let read: io::Result<usize> = stream.take(limit as u64 + 1).read_to_end(&mut out);
    read.map_err(|error| damaged(codec, &error))?;
    if out.len() > limit { Err(CodecFault::TooLarge { limit }) } else { Ok(out) }
}

/// One block of raw snappy, appended to `out`, which may hold `limit` bytes in all.
fn unsnap_block(block: &[u8], out: &mut Vec<u8>, limit: usize) -> Result<(), CodecFault> {
    let wrong = |error: snap::Error| damaged(Codec::Snappy, &error);
    // The length stands at the block's start: it is checked before memory is taken for it.
    let len = snap::raw::decompress_len(block).map_err(wrong)?;
    let from = out.len();
    if len > limit - from {
        return Err(CodecFault::TooLarge { limit });
    }
    // No element of snappy makes more than 64 bytes of 3.
    if len / 64 > block.len() {
        return Err(damaged(Codec::Snappy, &"it claims more bytes than it can hold"));
    }
    out.resize(from + len, 0);
    snap::raw::Decoder::new().decompress(block, &mut out[from..]).map_err(wrong)?;
    Ok(())
}

fn unsnap(bytes: &[u8], limit: usize) -> Result<Vec<u8>, CodecFault> {
    let mut out = Vec::new();
    if !bytes.starts_with(&XERIAL) {
        unsnap_block(bytes, &mut out, limit)?;
        return Ok(out);
    }
    let mut rest =
        bytes.get(XERIAL_HEADER..).ok_or_else(|| damaged(Codec::Snappy, &"its header is cut off"))?;
    while !rest.is_empty() {
        let cut = || damaged(Codec::Snappy, &"a block is cut off");
        let len = usize::try_from(rest.try_get_i32().map_err(|_| cut())?).map_err(|_| cut())?;
        unsnap_block(rest.get(..len).ok_or_else(cut)?, &mut out, limit)?;
        rest = &rest[len..];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Codec; 5] = [Codec::None, Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd];
    const LIMIT: usize = 1 << 20;

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at / 7 % 251) as u8).collect()
    }

    #[test]
    fn every_codec_reads_what_it_wrote() {
        for codec in ALL {
            for len in [0, 1, 100, XERIAL_BLOCK, 200_000] {
                let records = sample(len);
                let packed = compress(codec, &records).unwrap();
                assert_eq!(decompress(codec, &packed, len), Ok(records), "{codec:?} {len}");
                assert!(codec == Codec::None || len < 1000 || packed.len() < len);
            }
        }
        assert_eq!(Codec::of(0x14), Some(Codec::Zstd));
        assert_eq!(Codec::of(5), None);
    }

    #[test]
    fn raw_snappy_and_several_gzip_members_are_read() {
        let records = sample(5000);
        let raw = snap::raw::Encoder::new().compress_vec(&records).unwrap();
        assert_eq!(decompress(Codec::Snappy, &raw, LIMIT), Ok(records.clone()));
        let twice =
            [compress(Codec::Gzip, &records).unwrap(), compress(Codec::Gzip, &records).unwrap()].concat();
        assert_eq!(decompress(Codec::Gzip, &twice, LIMIT).map(|out| out.len()), Ok(10_000));
    }

    #[test]
    fn a_bomb_is_refused() {
        let zeroes = vec![0; 8 << 20];
        for codec in ALL {
            let packed = compress(codec, &zeroes).unwrap();
            assert_eq!(
                decompress(codec, &packed, LIMIT),
                Err(CodecFault::TooLarge { limit: LIMIT }),
                "{codec:?}"
            );
        }
        // Raw snappy whose first bytes claim 4 GiB.
        let claim = [0xff, 0xff, 0xff, 0xff, 0x0f, 0];
        assert!(decompress(Codec::Snappy, &claim, usize::MAX).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decompress_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            for codec in ALL {
                if let Ok(out) = decompress(codec, &bytes, 4096) {
                    prop_assert!(out.len() <= 4096);
                }
            }
        }

        #[test]
        fn changed_streams_are_refused_or_bounded(at in any::<usize>(), bit in 0u8..8, cut in any::<bool>()) {
            for codec in ALL {
                let mut packed = compress(codec, &sample(3000)).unwrap();
                let at = at % packed.len();
                packed[at] ^= 1 << bit;
                if cut {
                    packed.truncate(at);
                }
                if let Ok(out) = decompress(codec, &packed, 4096) {
                    prop_assert!(out.len() <= 4096);
                }
            }
        }
    }
}
