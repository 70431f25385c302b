//! The broker's own records: a small builder and reader of v2 record batches, for the internal topics alone.
//! Users' batches never pass through here; they stay as they came.
//!
//! Layout (big-endian): the 61-byte batch header, then records of varint-framed fields; the CRC-32C covers all from
//! the attributes to the end. The log stamps base offset and leader epoch, which lie before the CRC.

use bytes::{BufMut, Bytes, BytesMut};

const HEADER: usize = 61;
const CRC_FROM: usize = 21;

/// A record of an internal topic: a key, and a value or a tombstone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What compaction goes by.
    pub key: Bytes,
    /// `None` erases the key.
    pub value: Option<Bytes>,
}

/// One uncompressed batch of `records`, stamped `timestamp` (milliseconds since the epoch). `records` is not empty.
#[must_use]
pub fn build(records: &[Record], timestamp: i64) -> Bytes {
    let payload: usize =
        records.iter().map(|r| r.key.len() + r.value.as_ref().map_or(0, Bytes::len) + 32).sum();
    let mut out = BytesMut::with_capacity(HEADER + payload);
    out.put_i64(0); // base offset, stamped by the log
    out.put_i32(0); // length, below
    out.put_i32(-1); // leader epoch, stamped by the log
    out.put_i8(2);
    out.put_u32(0); // CRC, below
    out.put_i16(0);
    out.put_i32(records.len() as i32 - 1);
    out.put_i64(timestamp);
    out.put_i64(timestamp);
    out.put_i64(-1); // no producer id
    out.put_i16(-1);
    out.put_i32(-1);
    out.put_i32(records.len() as i32);
    let mut body = BytesMut::new();
    for (delta, record) in records.iter().enumerate() {
        body.clear();
        body.put_i8(0);
        put_varint(&mut body, 0); // timestamp delta
        put_varint(&mut body, delta as i64);
        put_varint(&mut body, record.key.len() as i64);
        body.put_slice(&record.key);
        match &record.value {
            Some(value) => {
                put_varint(&mut body, value.len() as i64);
                body.put_slice(value);
            }
            None => put_varint(&mut body, -1),
        }
        put_varint(&mut body, 0); // no headers
        put_varint(&mut out, body.len() as i64);
        out.put_slice(&body);
    }
    let length = (out.len() - 12) as i32;
    out[8..12].copy_from_slice(&length.to_be_bytes());
    let crc = crc32c::crc32c(&out[CRC_FROM..]);
    out[17..21].copy_from_slice(&crc.to_be_bytes());
    out.freeze()
}

/// Reads the records of whole batches, with their offsets. What is not an uncompressed v2 data batch of ours is
/// passed over (control batches, or what another program wrote into the topic); bytes that make no batch end the
/// reading. Returns the records and the offset after the last whole batch.
#[must_use]
pub fn read(mut batches: Bytes) -> (Vec<(i64, Record)>, Option<i64>) {
    let mut out = Vec::new();
    let mut next = None;
    while batches.len() >= HEADER {
        let mut head = Cursor(&batches);
        let (Some(base), Some(length)) = (head.i64(), head.i32()) else { break };
        let whole = usize::try_from(length).ok().and_then(|l| l.checked_add(12));
        let Some(whole) = whole.filter(|w| *w >= HEADER && *w <= batches.len()) else { break };
        let batch = batches.split_to(whole);
        let last_delta = i32::from_be_bytes([batch[23], batch[24], batch[25], batch[26]]);
        next = Some(base.saturating_add(i64::from(last_delta)).saturating_add(1));
        let attributes = i16::from_be_bytes([batch[21], batch[22]]);
        let (compression, control) = (attributes & 7, attributes & 0x20 != 0);
        if batch[16] == 2 && compression == 0 && !control {
            read_records(&batch, base, &mut out);
        }
    }
    (out, next)
}

fn read_records(batch: &Bytes, base: i64, out: &mut Vec<(i64, Record)>) {
    let mut rest = Cursor(&batch[HEADER..]);
    while let Some(record) = read_record(batch, &mut rest, base) {
        out.push(record);
    }
}

fn read_record(batch: &Bytes, rest: &mut Cursor<'_>, base: i64) -> Option<(i64, Record)> {
    let length = usize::try_from(rest.varint()?).ok()?;
    let mut body = Cursor(rest.take(length)?);
    body.take(1)?;
    body.varint()?;
    let delta = body.varint()?;
    let key = body.varint_bytes()?.unwrap_or_default();
    let value = body.varint_bytes()?;
    let record = Record { key: batch.slice_ref(key), value: value.map(|v| batch.slice_ref(v)) };
    Some((base.checked_add(delta)?, record))
}

fn put_varint(out: &mut BytesMut, value: i64) {
    let mut zigzag = ((value << 1) ^ (value >> 63)) as u64;
    while zigzag >= 0x80 {
        out.put_u8(zigzag as u8 | 0x80);
        zigzag >>= 7;
    }
    out.put_u8(zigzag as u8);
}

/// Takes big-endian values off the front of a slice; `None` once it is too short.
#[derive(Debug)]
pub struct Cursor<'a>(pub &'a [u8]);

impl<'a> Cursor<'a> {
    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    /// A 16-bit integer.
    pub fn i16(&mut self) -> Option<i16> {
        self.take(2).and_then(|b| b.try_into().ok()).map(i16::from_be_bytes)
    }

    /// A 32-bit integer.
    pub fn i32(&mut self) -> Option<i32> {
        self.take(4).and_then(|b| b.try_into().ok()).map(i32::from_be_bytes)
    }

    /// A 64-bit integer.
    pub fn i64(&mut self) -> Option<i64> {
        self.take(8).and_then(|b| b.try_into().ok()).map(i64::from_be_bytes)
    }

    /// A string with a 16-bit length, -1 for null.
    pub fn nullable_string(&mut self) -> Option<Option<String>> {
        match self.i16()? {
            -1 => Some(None),
            n => {
                let text = self.take(usize::try_from(n).ok()?)?;
                Some(Some(std::str::from_utf8(text).ok()?.to_owned()))
            }
        }
    }

    /// A string with a 16-bit length.
    pub fn string(&mut self) -> Option<String> {
        self.nullable_string()?
    }

    /// Bytes with a 32-bit length.
    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let n = usize::try_from(self.i32()?).ok()?;
        self.take(n)
    }

    fn varint(&mut self) -> Option<i64> {
        let mut zigzag = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            zigzag |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64));
            }
        }
        None
    }

    #[allow(clippy::option_option)] // too short | null | there
    fn varint_bytes(&mut self) -> Option<Option<&'a [u8]>> {
        match self.varint()? {
            -1 => Some(None),
            n => self.take(usize::try_from(n).ok()?).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(key: &str, value: Option<&str>) -> Record {
        Record {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: value.map(|v| Bytes::copy_from_slice(v.as_bytes())),
        }
    }

    #[test]
    fn what_is_built_is_read_back_and_kafka_protocol_agrees() {
        let records = vec![record("a", Some("one")), record("b", None), record("", Some(""))];
        let built = build(&records, 1_700_000_000_000);
        let (read, next) = read(built.clone());
        assert_eq!(next, Some(3));
        assert_eq!(read.iter().map(|(_, r)| r.clone()).collect::<Vec<_>>(), records);
        assert_eq!(read.iter().map(|(o, _)| *o).collect::<Vec<_>>(), [0, 1, 2]);

        let mut raw = built;
        let decoded = kafka_protocol::records::RecordBatchDecoder::decode(&mut raw).unwrap();
        assert_eq!(decoded.records.len(), 3);
        assert_eq!(decoded.records[1].key.as_deref(), Some(&b"b"[..]));
        assert_eq!(decoded.records[1].value, None);
        assert_eq!(decoded.records[0].timestamp, 1_700_000_000_000);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(noise in proptest::collection::vec(any::<u8>(), 0..300)) {
            drop(read(Bytes::from(noise)));
        }

        #[test]
        fn a_flipped_byte_never_panics(at in 0usize..200, to in any::<u8>()) {
            let mut bytes = BytesMut::from(&build(&[record("key", Some("value")), record("k2", None)], 5)[..]);
            let at = at % bytes.len();
            bytes[at] = to;
            drop(read(bytes.freeze()));
        }
    }
}
