//! Kafka's small formats beside a segment, read for looking at them: nothing is refused that can be shown. Pure.
//!
//! `.index` and `.timeindex` are described in [`index`](crate::index), `.snapshot` in [`producers`](crate::producers).
//! `.txnindex`, big-endian, 34 bytes an entry: i16 version = 0 · i64 producer id · i64 first offset · i64 last offset ·
//! i64 last stable offset. Checkpoints are text: a line `0`, a count, a row a line.

use bytes::Buf;
use serde::Serialize;
use uuid::Uuid;

/// An entry of an offset index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct OffsetEntry {
    /// Last offset of a batch.
    pub offset: i64,
    /// Where that batch starts.
    pub position: u32,
}

/// An entry of a time index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TimeEntry {
    /// The largest timestamp so far.
    pub timestamp: i64,
    /// Last offset of the batch that has it.
    pub offset: i64,
}

/// A transaction that was aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AbortedEntry {
    /// Of the entry; 0.
    pub version: i16,
    /// Whose it was.
    pub producer_id: i64,
    /// Its first offset.
    pub first_offset: i64,
    /// Offset of its marker.
    pub last_offset: i64,
    /// The last stable offset when it ended.
    pub last_stable_offset: i64,
}

/// A producer in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProducerEntry {
    /// Its id.
    pub producer_id: i64,
    /// Its epoch.
    pub producer_epoch: i16,
    /// Last sequence number of its last batch; −1 for none.
    pub last_sequence: i32,
    /// Last offset of its last batch; −1 for none.
    pub last_offset: i64,
    /// Records of its last batch, less one.
    pub offset_delta: i32,
    /// When it was last heard of, in milliseconds.
    pub timestamp: i64,
    /// Epoch of the coordinator that wrote its last marker; −1 for none.
    pub coordinator_epoch: i32,
    /// First offset of its open transaction; −1 for none.
    pub current_txn_first_offset: i64,
}

/// Entries, and what is wrong with the bytes behind or around them.
pub type Entries<T> = (Vec<T>, Option<String>);

fn rest<T>(entries: Vec<T>, left: usize) -> Entries<T> {
    let fault = (left > 0).then(|| format!("its last {left} bytes are no whole entry"));
    (entries, fault)
}

/// The entries of an `.index` of a segment with this base. Zeroes at its end are Kafka's room for more.
#[must_use]
pub fn offset_index(base: i64, mut bytes: &[u8]) -> Entries<OffsetEntry> {
    let mut entries = Vec::with_capacity(bytes.len() / 8);
    while bytes.len() >= 8 {
        let (relative, position) = (bytes.get_u32(), bytes.get_u32());
        if relative == 0 && position == 0 && !entries.is_empty() {
            break;
        }
        entries.push(OffsetEntry { offset: base + i64::from(relative), position });
    }
    let left = if bytes.iter().all(|&byte| byte == 0) { 0 } else { bytes.len() % 8 };
    rest(entries, left)
}

/// The entries of a `.timeindex` of a segment with this base.
#[must_use]
pub fn time_index(base: i64, mut bytes: &[u8]) -> Entries<TimeEntry> {
    let mut entries = Vec::with_capacity(bytes.len() / 12);
    while bytes.len() >= 12 {
        let (timestamp, relative) = (bytes.get_i64(), bytes.get_u32());
        if timestamp == 0 && relative == 0 && !entries.is_empty() {
            break;
        }
        entries.push(TimeEntry { timestamp, offset: base + i64::from(relative) });
    }
    let left = if bytes.iter().all(|&byte| byte == 0) { 0 } else { bytes.len() % 12 };
    rest(entries, left)
}

/// The entries of a `.txnindex`.
#[must_use]
pub fn txn_index(mut bytes: &[u8]) -> Entries<AbortedEntry> {
    let mut entries = Vec::with_capacity(bytes.len() / 34);
    while bytes.len() >= 34 {
        entries.push(AbortedEntry {
            version: bytes.get_i16(),
            producer_id: bytes.get_i64(),
            first_offset: bytes.get_i64(),
            last_offset: bytes.get_i64(),
            last_stable_offset: bytes.get_i64(),
        });
    }
    rest(entries, bytes.len())
}

/// The producers of a `.snapshot`.
#[must_use]
pub fn snapshot(mut bytes: &[u8]) -> Entries<ProducerEntry> {
    if bytes.len() < 10 {
        return (Vec::new(), Some("it is shorter than its head".to_owned()));
    }
    let (version, stored) = (bytes.get_i16(), bytes.get_u32());
    let mut fault = (version != 1).then(|| format!("its version is {version}, expected 1"));
    let computed = crc32c::crc32c(bytes);
    if computed != stored {
        fault = Some(format!("its checksum is {computed:#010x}, its head says {stored:#010x}"));
    }
    let count = bytes.get_i32();
    let mut entries = Vec::new();
    while bytes.len() >= 46 {
        entries.push(ProducerEntry {
            producer_id: bytes.get_i64(),
            producer_epoch: bytes.get_i16(),
            last_sequence: bytes.get_i32(),
            last_offset: bytes.get_i64(),
            offset_delta: bytes.get_i32(),
            timestamp: bytes.get_i64(),
            coordinator_epoch: bytes.get_i32(),
            current_txn_first_offset: bytes.get_i64(),
        });
    }
    if fault.is_none() && (entries.len() as i64 != i64::from(count) || !bytes.is_empty()) {
        fault = Some(format!("it says that it has {count} producers"));
    }
    (entries, fault)
}

/// The rows of a checkpoint file; each must have `fields` fields.
pub fn checkpoint(text: &str, fields: usize) -> Result<Vec<Vec<&str>>, String> {
    let mut lines = text.lines();
    match lines.next() {
        Some("0") => {}
        first => return Err(format!("its version is {:?}, expected 0", first.unwrap_or_default())),
    }
    let count: usize = lines.next().and_then(|line| line.parse().ok()).ok_or("its count is no number")?;
    let rows: Vec<Vec<&str>> = lines.map(|line| line.split_whitespace().collect()).collect();
    if rows.len() != count {
        return Err(format!("it says that it has {count} rows, and has {}", rows.len()));
    }
    match rows.iter().find(|row| row.len() != fields) {
        Some(row) => Err(format!("the row {:?} has not {fields} fields", row.join(" "))),
        None => Ok(rows),
    }
}

/// The epochs of a `leader-epoch-checkpoint`, each with the offset it starts at.
pub fn epochs(text: &str) -> Result<Vec<(i32, i64)>, String> {
    let parse = |row: Vec<&str>| Some((row[0].parse().ok()?, row[1].parse().ok()?));
    let parsed: Option<Vec<_>> = checkpoint(text, 2)?.into_iter().map(parse).collect();
    parsed.ok_or_else(|| "a row is not two numbers".to_owned())
}

/// The topic's id in a `partition.metadata`.
pub fn topic_id(text: &str) -> Result<Uuid, String> {
    let id = text.lines().find_map(|line| line.strip_prefix("topic_id: ")).ok_or("it has no topic_id")?;
    parse_id(id).ok_or_else(|| format!("{id:?} is no id"))
}

/// An id as Kafka prints it: 22 digits of base64 for URLs.
#[must_use]
pub fn parse_id(text: &str) -> Option<Uuid> {
    let digit = |byte: u8| -> Option<u128> {
        Some(u128::from(match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'-' => 62,
            b'_' => 63,
            _ => return None,
        }))
    };
    if text.len() != 22 {
        return None;
    }
    let mut value: u128 = 0;
    for (at, byte) in text.bytes().enumerate() {
        // 22 digits are 132 bits: of the last one, two count.
        value = if at == 21 { value << 2 | digit(byte)? >> 4 } else { value << 6 | digit(byte)? };
    }
    Some(Uuid::from_u128(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids;
    use crate::transactions::{Aborted, encode};

    #[test]
    fn ids_read_back() {
        for value in [0, 1, 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef, u128::MAX] {
            assert_eq!(parse_id(&ids::base64(Uuid::from_u128(value))), Some(Uuid::from_u128(value)));
        }
        assert_eq!(parse_id("AAAA"), None);
        assert_eq!(parse_id("!AAAAAAAAAAAAAAAAAAAAA"), None);
    }

    #[test]
    fn checkpoints_are_read_or_refused() {
        assert_eq!(epochs("0\n2\n0 0\n3 17\n"), Ok(vec![(0, 0), (3, 17)]));
        for bad in ["", "1\n0\n", "0\nx\n", "0\n2\n0 0\n", "0\n1\n0\n", "0\n1\na b\n"] {
            assert!(epochs(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn entries_are_shown_as_far_as_they_go() {
        let index = [0, 0, 0, 5, 0, 0, 1, 0, 0, 0, 0, 9, 0];
        let (entries, fault) = offset_index(100, &index);
        assert_eq!(entries, [OffsetEntry { offset: 105, position: 256 }]);
        assert!(fault.is_some());
        let aborted = AbortedEntry {
            version: 0,
            producer_id: 1,
            first_offset: 2,
            last_offset: 3,
            last_stable_offset: 4,
        };
        let list = [Aborted { producer_id: 1, first_offset: 2, last_offset: 3, last_stable: 4 }];
        let (entries, fault) = txn_index(&encode(&list));
        assert_eq!((entries, fault), (vec![aborted], None));
        assert!(snapshot(&[0; 9]).1.is_some());
        assert!(snapshot(&[0; 12]).1.is_some());
    }
}
