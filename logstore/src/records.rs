//! The records inside a batch (magic 2): a view of decompressed bytes. Pure.
//!
//! Layout of a record, all numbers zigzag varints but the first byte of its body, from Kafka's `DefaultRecord`:
//!
//! ```text
//! length · attributes i8 (unused) · timestamp less the batch's first · offset less the base
//! key length (−1: none) · key · value length (−1: none) · value · headers: count, then key length · key · value length · value
//! ```
//!
//! For compaction, lookups by time and the offline tools; the broker's way from producer to consumer never looks inside.
//!
//! Invariant: nothing is believed. A record that does not add up ends the iteration with one [`RecordFault`].

use crate::batch::{HEADER, Header, varint};
use crate::compression::{Codec, CodecFault, decompress, stream};
use std::io::Read;

/// What is wrong with the records of a batch whose checksum is right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordFault {
    /// A codec that does not exist.
    #[error("its compression codec, {0}, does not exist")]
    Codec(i16),
    /// They cannot be decompressed.
    #[error(transparent)]
    Compression(#[from] CodecFault),
    /// A length that does not add up.
    #[error("record {index} is not well formed: {what}")]
    Record {
        /// Which, from 0.
        index: i32,
        /// What does not add up.
        what: &'static str,
    },
    /// Bytes behind the last record.
    #[error("{0} bytes follow its last record")]
    Trailing(usize),
}

/// A record, as a view of the batch's decompressed bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its offset.
    pub offset: i64,
    /// Its timestamp in milliseconds: its own, or the batch's under `LogAppendTime`.
    pub timestamp: i64,
    /// Its key.
    pub key: Option<&'a [u8]>,
    /// Its value; none makes it a tombstone.
    pub value: Option<&'a [u8]>,
    /// How many headers it has.
    pub header_count: i32,
    /// Its headers' bytes, count excluded; see [`Record::headers`].
    pub header_bytes: &'a [u8],
    /// Its first byte, which means nothing yet.
    pub attributes: u8,
    /// All that follows its timestamp, as it stands in the batch.
    pub after_timestamp: &'a [u8],
    /// The whole record with its length, as it stands in the batch.
    pub bytes: &'a [u8],
}

impl<'a> Record<'a> {
    /// Its headers, in order, doubled keys included. They were checked when the record was read.
    pub fn headers(&self) -> impl Iterator<Item = (&'a [u8], Option<&'a [u8]>)> + use<'a> {
        let (mut rest, count) = (self.header_bytes, self.header_count);
        (0..count).map_while(move |_| Some((chunk(&mut rest).ok()??, chunk(&mut rest).ok()?)))
    }
}

/// The bytes of a batch's records as they were before compression, at most `limit` of them. `batch` is the whole batch.
pub fn unpack(header: &Header, batch: &[u8], limit: usize) -> Result<Vec<u8>, RecordFault> {
    let codec = Codec::of(header.attributes).ok_or(RecordFault::Codec(header.attributes & 7))?;
    Ok(decompress(codec, batch.get(HEADER..).unwrap_or_default(), limit)?)
}

/// Goes through the decompressed records of a batch.
#[derive(Debug)]
pub struct Records<'a> {
    header: Header,
    rest: &'a [u8],
    index: i32,
    failed: bool,
}

impl<'a> Records<'a> {
    /// The records of the batch of this header, `unpacked` as [`unpack`] returned them.
    #[must_use]
    pub fn new(header: &Header, unpacked: &'a [u8]) -> Self {
        Self { header: *header, rest: unpacked, index: 0, failed: false }
    }

    fn parse(&mut self) -> Result<Record<'a>, &'static str> {
        let (header, whole) = (&self.header, self.rest);
        let length = varint(&mut self.rest).and_then(|length| usize::try_from(length).ok());
        let length = length.ok_or("its length is no length")?;
        let mut body = self.rest.get(..length).ok_or("it is longer than what is left of the batch")?;
        self.rest = &self.rest[length..];
        let bytes = &whole[..whole.len() - self.rest.len()];
        let (&attributes, rest) = body.split_first().ok_or("it is empty")?;
        body = rest;
        let since = varint(&mut body).ok_or("its timestamp is cut off")?;
        let after_timestamp = body;
        let delta = varint(&mut body).ok_or("its offset is cut off")?;
        if delta < 0 || delta > i64::from(header.last_offset_delta) {
            return Err("its offset lies outside its batch");
        }
        let key = chunk(&mut body).map_err(|Cut| "its key is longer than it")?;
        let value = chunk(&mut body).map_err(|Cut| "its value is longer than it")?;
        let count = varint(&mut body).and_then(|count| i32::try_from(count).ok()).filter(|&count| count >= 0);
        let header_count = count.ok_or("its header count is no count")?;
        let header_bytes = body;
        for _ in 0..header_count {
            chunk(&mut body).ok().flatten().ok_or("a header's key does not fit")?;
            chunk(&mut body).map_err(|Cut| "a header's value does not fit")?;
        }
        if !body.is_empty() {
            return Err("bytes follow its headers");
        }
        let timestamp = if header.is_log_append_time() {
            header.max_timestamp
        } else {
            header.base_timestamp.saturating_add(since)
        };
        let offset = header.base_offset.saturating_add(delta);
        Ok(Record {
            offset,
            timestamp,
            key,
            value,
            header_count,
            header_bytes,
            attributes,
            after_timestamp,
            bytes,
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, RecordFault>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        if self.index >= self.header.count {
            let trailing = std::mem::take(&mut self.rest).len();
            return (trailing > 0).then_some(Err(RecordFault::Trailing(trailing)));
        }
        let index = self.index;
        self.index += 1;
        let outcome = self.parse().map_err(|what| RecordFault::Record { index, what });
        self.failed = outcome.is_err();
        Some(outcome)
    }
}

/// The first record of a whole, sound batch at `from` or behind it with a timestamp of at least `timestamp`, as (offset,
/// timestamp); `None` where it has none. Of records that cannot be read, or decompress to more than `limit` bytes, the
/// answer is where they begin: never too late.
#[must_use]
pub fn first_at_or_after(
    header: &Header,
    batch: &[u8],
    timestamp: i64,
    from: i64,
    limit: usize,
) -> Option<(i64, i64)> {
    if header.max_timestamp < timestamp || header.last_offset() < from || header.count < 1 {
        return None;
    }
    let first = (header.base_offset.max(from), header.max_timestamp);
    if header.is_log_append_time() {
        // All records have the batch's timestamp.
        return Some(first);
    }
    let plain = Codec::of(header.attributes) == Some(Codec::None);
    let unpacked = if plain { Vec::new() } else { unpack(header, batch, limit).unwrap_or_default() };
    let records = if plain { batch.get(HEADER..).unwrap_or_default() } else { &unpacked };
    for record in Records::new(header, records) {
        match record {
            Ok(record) if record.offset >= from && record.timestamp >= timestamp => {
                return Some((record.offset, record.timestamp));
            }
            Ok(_) => {}
            Err(_) => return Some(first),
        }
    }
    None
}

/// Bytes of a stream of records that are read at once.
const STRIDE: usize = 64 << 10;

/// Goes through the records of a batch as they come out of their codec, without a place for any of them.
pub struct KeyCheck<'a> {
    stream: Box<dyn Read + Send + 'a>,
    held: Vec<u8>,
    /// Next byte of `held`.
    at: usize,
    /// Bytes that may still come.
    left: usize,
    records: i32,
    last_offset_delta: i32,
}

/// Takes bytes off what is left of a record.
fn spend(left: &mut usize, bytes: usize) -> Result<(), &'static str> {
    *left = left.checked_sub(bytes).ok_or("it is longer than its length")?;
    Ok(())
}

impl<'a> KeyCheck<'a> {
    /// The records of the whole batch of this header, which may decompress to `limit` bytes at most.
    pub fn new(header: &Header, batch: &'a [u8], limit: usize) -> Result<Self, RecordFault> {
        let codec = Codec::of(header.attributes).ok_or(RecordFault::Codec(header.attributes & 7))?;
        let stream = stream(codec, batch.get(HEADER..).unwrap_or_default(), limit)?;
        Ok(Self {
            stream,
            held: Vec::new(),
            at: 0,
            left: limit,
            records: header.count,
            last_offset_delta: header.last_offset_delta,
        })
    }

    /// Looks at about `STRIDE` bytes more. `Some(true)`: each record has a key; `Some(false)`: one has none; `None`: there
    /// are more.
    pub fn step(&mut self) -> Result<Option<bool>, &'static str> {
        let until = self.left.saturating_sub(STRIDE);
        while self.records > 0 {
            if self.left < until {
                return Ok(None);
            }
            self.records -= 1;
            if !self.record()? {
                return Ok(Some(false));
            }
        }
        let ends = self.at == self.held.len() && !self.refill()?;
        if ends { Ok(Some(true)) } else { Err("bytes follow the last record") }
    }

    /// Passes a record; whether it has a key.
    fn record(&mut self) -> Result<bool, &'static str> {
        let mut left = usize::try_from(self.varint()?.0).map_err(|_| "its length is no length")?;
        spend(&mut left, 1)?;
        self.skip(1)?;
        spend(&mut left, self.varint()?.1)?;
        let (delta, read) = self.varint()?;
        spend(&mut left, read)?;
        if delta < 0 || delta > i64::from(self.last_offset_delta) {
            return Err("its offset lies outside its batch");
        }
        let has_key = self.chunk(&mut left)?;
        self.chunk(&mut left)?;
        let (count, read) = self.varint()?;
        spend(&mut left, read)?;
        let count =
            i32::try_from(count).ok().filter(|&count| count >= 0).ok_or("its header count is no count")?;
        for _ in 0..count {
            if !self.chunk(&mut left)? {
                return Err("a header has no key");
            }
            self.chunk(&mut left)?;
        }
        if left > 0 { Err("bytes follow its headers") } else { Ok(has_key) }
    }

    /// Passes a length and so many bytes; whether it is one.
    fn chunk(&mut self, left: &mut usize) -> Result<bool, &'static str> {
        let (length, read) = self.varint()?;
        spend(left, read)?;
        if length == -1 {
            return Ok(false);
        }
        let length = usize::try_from(length).map_err(|_| "a length is no length")?;
        spend(left, length)?;
        self.skip(length)?;
        Ok(true)
    }

    /// A zigzag varint, and how many bytes it took.
    fn varint(&mut self) -> Result<(i64, usize), &'static str> {
        let mut value = 0u64;
        for at in 0..10 {
            if self.at == self.held.len() && !self.refill()? {
                return Err("it ends within a record");
            }
            let byte = self.held[self.at];
            self.at += 1;
            value |= u64::from(byte & 0x7f) << (7 * at);
            if byte & 0x80 == 0 {
                return Ok(((value >> 1) as i64 ^ -((value & 1) as i64), at + 1));
            }
        }
        Err("a number has no end")
    }

    fn skip(&mut self, mut bytes: usize) -> Result<(), &'static str> {
        loop {
            let here = bytes.min(self.held.len() - self.at);
            (self.at, bytes) = (self.at + here, bytes - here);
            if bytes == 0 {
                return Ok(());
            }
            if !self.refill()? {
                return Err("it ends within a record");
            }
        }
    }

    /// Reads on; `false` at the end.
    fn refill(&mut self) -> Result<bool, &'static str> {
        self.held.resize(STRIDE, 0);
        let read = self.stream.read(&mut self.held).map_err(|_| "they cannot be decompressed")?;
        self.held.truncate(read);
        self.at = 0;
        self.left = self.left.checked_sub(read).ok_or("they decompress to too much")?;
        Ok(read > 0)
    }
}

/// It does not fit into what is left.
struct Cut;

/// A length and so many bytes; −1 stands for none.
fn chunk<'a>(rest: &mut &'a [u8]) -> Result<Option<&'a [u8]>, Cut> {
    let length = varint(rest).ok_or(Cut)?;
    if length == -1 {
        return Ok(None);
    }
    let length = usize::try_from(length).map_err(|_| Cut)?;
    let bytes = rest.get(..length).ok_or(Cut)?;
    *rest = &rest[length..];
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(count: i32) -> Header {
        Header {
            base_offset: 100,
            size: 61,
            leader_epoch: 0,
            crc: 0,
            attributes: 0,
            last_offset_delta: count - 1,
            base_timestamp: 1000,
            max_timestamp: 2000,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            count,
        }
    }

    /// As small numbers stand in records.
    fn zigzag(value: i8) -> u8 {
        ((value << 1) ^ (value >> 7)) as u8
    }

    fn sample() -> Vec<u8> {
        // Attributes, 5 ms later, offset 1, key "k", no value, one header "h" without value.
        let body =
            [0, zigzag(5), zigzag(1), zigzag(1), b'k', zigzag(-1), zigzag(1), zigzag(1), b'h', zigzag(-1)];
        let mut bytes = vec![zigzag(body.len() as i8)];
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_record_is_read_with_its_headers() {
        let bytes = sample();
        let mut one = header(2);
        one.count = 1;
        let mut records = Records::new(&one, &bytes);
        let record = records.next().unwrap().unwrap();
        assert_eq!((record.offset, record.timestamp), (101, 1005));
        assert_eq!((record.key, record.value), (Some(&b"k"[..]), None));
        assert_eq!(record.headers().collect::<Vec<_>>(), [(&b"h"[..], None)]);
        assert_eq!(record.bytes, bytes);
        assert_eq!(records.next(), None);
        let more = [bytes.as_slice(), &[0]].concat();
        let mut records = Records::new(&one, &more);
        assert!(records.next().unwrap().is_ok());
        assert_eq!(records.next(), Some(Err(RecordFault::Trailing(1))));
        assert_eq!(records.next(), None);
        let outside = Records::new(&header(1), &bytes).next().unwrap();
        assert!(matches!(outside, Err(RecordFault::Record { index: 0, .. })));
    }

    fn checked(header: &Header, records: &[u8], limit: usize) -> Result<bool, &'static str> {
        let batch = header.with_records(records);
        let mut check = KeyCheck::new(header, &batch, limit).map_err(|_| "codec")?;
        loop {
            if let Some(outcome) = check.step()? {
                return Ok(outcome);
            }
        }
    }

    #[test]
    fn a_stream_of_records_is_checked_within_its_limit() {
        let mut value = vec![0, zigzag(0), zigzag(0), zigzag(1), b'k'];
        // A value of 200 000 zeroes: its length as a zigzag varint.
        value.extend([0x80, 0xb5, 0x18]);
        value.resize(value.len() + 200_000, 0);
        value.push(0);
        let mut one = vec![];
        let mut length = (value.len() as u64) << 1;
        while length >= 0x80 {
            one.push(length as u8 | 0x80);
            length >>= 7;
        }
        one.push(length as u8);
        one.extend(&value);
        let all = one.repeat(20);
        for codec in [Codec::None, Codec::Gzip, Codec::Snappy, Codec::Lz4, Codec::Zstd] {
            let number = (0..5).find(|number| Codec::of(*number) == Some(codec)).unwrap();
            let packed = crate::compression::compress(codec, &all).unwrap();
            let header = Header { attributes: number, ..header(20) };
            assert_eq!(checked(&header, &packed, all.len()), Ok(true), "{codec:?}");
            assert!(checked(&header, &packed, all.len() - 1).is_err(), "{codec:?}");
            assert!(checked(&Header { count: 19, ..header }, &packed, all.len()).is_err(), "{codec:?}");
            assert!(checked(&Header { count: 21, ..header }, &packed, all.len()).is_err(), "{codec:?}");
        }
    }

    proptest! {
        /// The stream is judged as the whole is.
        #[test]
        fn both_ways_to_read_records_say_the_same(
            kept in prop::collection::vec(any::<u8>(), 0..40),
            at in any::<prop::sample::Index>(),
            count in 1i32..4,
        ) {
            let mut bytes = sample().repeat(count as usize);
            let at = at.index(bytes.len());
            bytes.splice(at..(at + kept.len() / 8).min(bytes.len()), kept.iter().copied().take(kept.len() / 8));
            let header = header(count);
            let whole: Result<Vec<_>, _> = Records::new(&header, &bytes).collect();
            let has_keys = whole.map(|records| records.iter().all(|record| record.key.is_some()));
            match (has_keys, checked(&header, &bytes, 10_000)) {
                (Ok(whole), Ok(stream)) => prop_assert_eq!(whole, stream),
                (Err(_), Err(_) | Ok(false)) => {}
                (whole, stream) => prop_assert!(false, "{:?} {:?}", whole, stream),
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), count in -1i32..100) {
            let mut outcomes: Vec<_> = Records::new(&header(count), &bytes).collect();
            let last = outcomes.pop();
            prop_assert!(outcomes.iter().all(Result::is_ok));
            prop_assert!(last.is_none() || outcomes.len() <= count.max(0) as usize);
        }
    }
}
