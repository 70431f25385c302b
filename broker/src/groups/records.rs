//! The records of `__consumer_offsets`, byte for byte as Kafka writes them (big-endian, version first), so that
//! Kafka's own tools read them: `OffsetCommitKey` v1 → `OffsetCommitValue` v3, `GroupMetadataKey` v2 →
//! `GroupMetadataValue` v3. Read are also the older values and, of keys we do not know, nothing.

use super::member::{Member, Protocol};
use super::state::Group;
use crate::records::{Cursor, Record};
use bytes::{BufMut, Bytes, BytesMut};
use std::time::Duration;

/// A committed offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The next offset to read.
    pub offset: i64,
    /// Of the record before it, -1 if unknown.
    pub leader_epoch: i32,
    /// Whatever the consumer wants to remember.
    pub metadata: String,
    /// When, in milliseconds since the epoch.
    pub timestamp: i64,
}

/// What a record of the topic says.
#[derive(Debug)]
pub enum Entry {
    /// A group's offset of a partition, or that it was forgotten.
    Offset {
        /// Whose.
        group: String,
        /// Of which topic.
        topic: String,
        /// Of which partition.
        partition: i32,
        /// `None` for a tombstone.
        committed: Option<Committed>,
    },
    /// A group's members in a generation, or that it was forgotten.
    Group {
        /// Which.
        group: String,
        /// `None` for a tombstone.
        metadata: Option<Metadata>,
    },
}

/// A group as its record tells it.
#[derive(Debug)]
pub struct Metadata {
    /// `consumer`, `connect`, …
    pub protocol_type: String,
    /// The generation.
    pub generation: i32,
    /// The protocol everybody speaks.
    pub protocol: Option<String>,
    /// Who assigns.
    pub leader: Option<String>,
    /// Everybody.
    pub members: Vec<Member>,
}

/// The partition of `__consumer_offsets` that holds a group: Kafka hashes as Java does.
#[must_use]
pub fn partition_of(group: &str, partitions: u32) -> u32 {
    let hash = group.encode_utf16().fold(0i32, |h, unit| h.wrapping_mul(31).wrapping_add(i32::from(unit)));
    // Kafka's `Utils.abs`: the sign bit goes, which maps the smallest integer to 0.
    let positive = if hash == i32::MIN { 0 } else { hash.unsigned_abs() };
    positive % partitions.max(1)
}

/// The record of a committed offset, or its tombstone.
#[must_use]
pub fn offset(group: &str, topic: &str, partition: i32, committed: Option<&Committed>) -> Record {
    let mut key = BytesMut::new();
    key.put_i16(1);
    put_string(&mut key, group);
    put_string(&mut key, topic);
    key.put_i32(partition);
    let value = committed.map(|c| {
        let mut value = BytesMut::new();
        value.put_i16(3);
        value.put_i64(c.offset);
        value.put_i32(c.leader_epoch);
        put_string(&mut value, &c.metadata);
        value.put_i64(c.timestamp);
        value.freeze()
    });
    Record { key: key.freeze(), value }
}

/// The record of a group's metadata, or its tombstone. `timestamp` in milliseconds since the epoch.
#[must_use]
pub fn group(name: &str, group: Option<&Group>, timestamp: i64) -> Record {
    let mut key = BytesMut::new();
    key.put_i16(2);
    put_string(&mut key, name);
    let value = group.map(|group| {
        let mut value = BytesMut::new();
        value.put_i16(3);
        put_string(&mut value, group.protocol_type().unwrap_or_default());
        value.put_i32(group.generation());
        put_nullable(&mut value, group.protocol());
        put_nullable(&mut value, group.leader());
        value.put_i64(timestamp);
        value.put_i32(group.members().count() as i32);
        for member in group.members() {
            put_string(&mut value, &member.id);
            put_nullable(&mut value, member.instance_id.as_deref());
            put_string(&mut value, &member.client_id);
            put_string(&mut value, &member.client_host);
            value.put_i32(millis(member.rebalance_timeout));
            value.put_i32(millis(member.session_timeout));
            put_bytes(&mut value, &member.metadata(group.protocol().unwrap_or_default()));
            put_bytes(&mut value, &member.assignment);
        }
        value.freeze()
    });
    Record { key: key.freeze(), value }
}

/// What a record says; `None` for kinds and versions this broker does not write.
#[must_use]
pub fn parse(record: &Record) -> Option<Entry> {
    let mut key = Cursor(&record.key);
    match key.i16()? {
        0 | 1 => {
            let (group, topic, partition) = (key.string()?, key.string()?, key.i32()?);
            let committed = match &record.value {
                Some(value) => Some(parse_offset(value)?),
                None => None,
            };
            Some(Entry::Offset { group, topic, partition, committed })
        }
        2 => {
            let group = key.string()?;
            let metadata = match &record.value {
                Some(value) => Some(parse_group(value)?),
                None => None,
            };
            Some(Entry::Group { group, metadata })
        }
        _ => None,
    }
}

fn parse_offset(value: &Bytes) -> Option<Committed> {
    let mut value = Cursor(value);
    let version = value.i16()?;
    if !(0..=3).contains(&version) {
        return None;
    }
    let offset = value.i64()?;
    let leader_epoch = if version == 3 { value.i32()? } else { -1 };
    Some(Committed { offset, leader_epoch, metadata: value.string()?, timestamp: value.i64()? })
}

fn parse_group(value: &Bytes) -> Option<Metadata> {
    let mut at = Cursor(value);
    let version = at.i16()?;
    if !(0..=3).contains(&version) {
        return None;
    }
    let protocol_type = at.string()?;
    let generation = at.i32()?;
    let protocol = at.nullable_string()?;
    let leader = at.nullable_string()?;
    if version >= 2 {
        at.i64()?;
    }
    let count = at.i32()?;
    let mut members = Vec::new();
    for _ in 0..count {
        let id = at.string()?;
        let instance_id = if version >= 3 { at.nullable_string()? } else { None };
        let (client_id, client_host) = (at.string()?, at.string()?);
        let rebalance = if version >= 1 { Some(at.i32()?) } else { None };
        let session = at.i32()?;
        let metadata = value.slice_ref(at.bytes()?);
        let assignment = value.slice_ref(at.bytes()?);
        let timeout = |ms: i32| Duration::from_millis(u64::try_from(ms).unwrap_or(0));
        members.push(Member {
            id,
            instance_id,
            client_id,
            client_host,
            session_timeout: timeout(session),
            rebalance_timeout: timeout(rebalance.unwrap_or(session)),
            protocols: vec![Protocol { name: protocol.clone().unwrap_or_default(), metadata }],
            assignment,
            joining: None,
            syncing: None,
            is_new: false,
            expires: Duration::ZERO,
        });
    }
    Some(Metadata { protocol_type, generation, protocol, leader, members })
}

fn millis(time: Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
}

/// Strings here came in with 16-bit lengths, or are ids we made: they fit.
fn put_string(out: &mut BytesMut, text: &str) {
    out.put_i16(i16::try_from(text.len()).unwrap_or(i16::MAX));
    out.put_slice(&text.as_bytes()[..text.len().min(i16::MAX as usize)]);
}

fn put_nullable(out: &mut BytesMut, text: Option<&str>) {
    match text {
        Some(text) => put_string(out, text),
        None => out.put_i16(-1),
    }
}

fn put_bytes(out: &mut BytesMut, bytes: &[u8]) {
    out.put_i32(bytes.len() as i32);
    out.put_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::groups::state::Rules;

    #[test]
    fn an_offset_is_laid_out_as_kafka_lays_it_out() {
        let committed = Committed { offset: 7, leader_epoch: 1, metadata: "m".into(), timestamp: 9 };
        let record = offset("g", "t", 3, Some(&committed));
        assert_eq!(&record.key[..], b"\0\x01\0\x01g\0\x01t\0\0\0\x03");
        assert_eq!(
            record.value.as_deref(),
            Some(&b"\0\x03\0\0\0\0\0\0\0\x07\0\0\0\x01\0\x01m\0\0\0\0\0\0\0\x09"[..])
        );
        let Some(Entry::Offset { group, topic, partition, committed: back }) = parse(&record) else {
            panic!("not an offset")
        };
        assert_eq!((group.as_str(), topic.as_str(), partition, back), ("g", "t", 3, Some(committed)));
    }

    #[test]
    fn a_group_comes_back_with_its_members() {
        let rules = Rules { initial_delay: Duration::ZERO, max_size: 9 };
        let member = Member {
            id: "m-1".into(),
            instance_id: Some("i".into()),
            client_id: "c".into(),
            client_host: "/127.0.0.1".into(),
            session_timeout: Duration::from_secs(10),
            rebalance_timeout: Duration::from_secs(60),
            protocols: vec![Protocol { name: "range".into(), metadata: Bytes::from_static(b"sub") }],
            assignment: Bytes::from_static(b"all"),
            joining: None,
            syncing: None,
            is_new: false,
            expires: Duration::ZERO,
        };
        let group_of = Group::restored(
            rules,
            Duration::ZERO,
            5,
            Some("consumer".into()),
            Some("range".into()),
            Some("m-1".into()),
            vec![member],
        );
        let Some(Entry::Group { group: name, metadata: Some(back) }) = parse(&group("g", Some(&group_of), 1))
        else {
            panic!("not a group")
        };
        assert_eq!((name.as_str(), back.generation, back.leader.as_deref()), ("g", 5, Some("m-1")));
        assert_eq!(back.members[0].assignment, Bytes::from_static(b"all"));
        assert_eq!(back.members[0].instance_id.as_deref(), Some("i"));
        assert_eq!(back.members[0].metadata("range"), Bytes::from_static(b"sub"));
        assert_eq!(back.members[0].rebalance_timeout, Duration::from_secs(60));
    }

    #[test]
    fn groups_land_where_java_puts_them() {
        assert_eq!(partition_of("", 50), 0);
        assert_eq!(partition_of("a", 50), 97 % 50);
        assert_eq!(partition_of("polygenelubricants", 50), 0); // hashes to the smallest integer
    }
}
