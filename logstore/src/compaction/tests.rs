//! Compaction against a model: the table that reading the log from its start builds.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const RETENTION: i64 = 1000;

/// Of a batch that is nothing special.
const RULES: Rules =
    Rules { now: 0, delete_retention_ms: 0, stays_empty: false, is_spent: false, is_aborted: false };

#[derive(Debug, Clone)]
struct Sent {
    key: Option<u8>,
    value: Option<Vec<u8>>,
    header: Option<Vec<u8>>,
    timestamp: i64,
}

fn field(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    put_varint(out, bytes.map_or(-1, |bytes| bytes.len() as i64));
    out.extend_from_slice(bytes.unwrap_or_default());
}

fn batch_of(base: i64, sent: &[Sent], codec: i16, producer: i64) -> Bytes {
    let base_timestamp = sent[0].timestamp;
    let mut records = Vec::new();
    for (delta, one) in sent.iter().enumerate() {
        let mut body = vec![0];
        put_varint(&mut body, one.timestamp - base_timestamp);
        put_varint(&mut body, delta as i64);
        field(&mut body, one.key.as_ref().map(std::slice::from_ref));
        field(&mut body, one.value.as_deref());
        put_varint(&mut body, i64::from(one.header.is_some()));
        if let Some(header) = &one.header {
            field(&mut body, Some(b"h"));
            field(&mut body, Some(header));
        }
        put_varint(&mut records, body.len() as i64);
        records.extend(body);
    }
    let header = Header {
        base_offset: base,
        size: 0,
        leader_epoch: 3,
        crc: 0,
        attributes: codec,
        last_offset_delta: sent.len() as i32 - 1,
        base_timestamp,
        max_timestamp: sent.iter().map(|one| one.timestamp).max().unwrap(),
        producer_id: producer,
        producer_epoch: i16::from(producer >= 0) - 1,
        base_sequence: if producer >= 0 { base as i32 } else { -1 },
        count: sent.len() as i32,
    };
    header.with_records(&compress(Codec::of(codec).unwrap(), &records).unwrap()).freeze()
}

/// What a reader sees of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    timestamp: i64,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Vec<u8>,
}

fn read(log: &[Bytes]) -> BTreeMap<i64, Seen> {
    let mut seen = BTreeMap::new();
    let mut next = 0;
    for batch in log {
        let header = Header::parse(batch).unwrap();
        crate::batch::check(&header, batch).unwrap();
        assert!(header.base_offset >= next, "batches rise");
        next = header.next_offset();
        let unpacked = unpack(&header, batch, INFLATED).unwrap();
        let mut last = -1;
        for record in Records::new(&header, &unpacked) {
            let record = record.unwrap();
            assert!(record.offset > last, "offsets rise");
            last = record.offset;
            let (timestamp, owned) = (record.timestamp, |bytes: Option<&[u8]>| bytes.map(<[u8]>::to_vec));
            let (key, value) = (owned(record.key), owned(record.value));
            seen.insert(record.offset, Seen { timestamp, key, value, headers: record.header_bytes.to_vec() });
        }
        assert!(header.count == 0 || header.is_log_append_time() || last <= header.last_offset());
    }
    seen
}

fn table(seen: &BTreeMap<i64, Seen>) -> BTreeMap<Vec<u8>, Option<Vec<u8>>> {
    let mut table = BTreeMap::new();
    for one in seen.values() {
        if let Some(key) = &one.key {
            table.insert(key.clone(), one.value.clone());
        }
    }
    table
}

fn last_of(log: &[Bytes]) -> BTreeMap<i64, i64> {
    let headers = log.iter().map(|batch| Header::parse(batch).unwrap());
    headers.filter(Header::is_idempotent).map(|header| (header.producer_id, header.last_offset())).collect()
}

/// One pass over the whole log with a map of `memory` bytes, from `dirty` on; returns the log and what is clean now.
fn pass(log: &[Bytes], dirty: i64, memory: usize, now: i64) -> (Vec<Bytes>, i64) {
    let mut map = OffsetMap::new([7; 16], memory);
    let mut clean = dirty;
    for batch in log {
        let header = Header::parse(batch).unwrap();
        if header.next_offset() <= dirty {
            continue;
        }
        let all = map.note_batch(&header, batch, dirty).unwrap();
        clean = map.latest() + 1;
        if !all {
            break;
        }
    }
    let last_of = last_of(log);
    let mut out = Vec::new();
    for batch in log {
        let header = Header::parse(batch).unwrap();
        let stays_empty = last_of.get(&header.producer_id) == Some(&header.last_offset());
        let rules = Rules { now, delete_retention_ms: RETENTION, stays_empty, is_aborted: false, ..RULES };
        match filter(&header, batch, &map, rules).unwrap() {
            Kept::Whole => out.push(batch.clone()),
            Kept::Changed(changed) => {
                let after = Header::parse(&changed).unwrap();
                assert_eq!(
                    (after.base_offset, after.last_offset(), after.base_sequence, after.leader_epoch),
                    (header.base_offset, header.last_offset(), header.base_sequence, header.leader_epoch)
                );
                assert_eq!(after.producer_id, header.producer_id);
                out.push(changed);
            }
            Kept::Nothing => {}
        }
    }
    (out, clean)
}

fn sent() -> impl Strategy<Value = Sent> {
    let value = prop::option::weighted(0.7, prop::collection::vec(any::<u8>(), 0..20));
    let header = prop::option::weighted(0.3, prop::collection::vec(any::<u8>(), 0..9));
    (0u8..12, value, header, 0i64..5000).prop_map(|(key, value, header, timestamp)| Sent {
        key: Some(key),
        value,
        header,
        timestamp,
    })
}

fn log() -> impl Strategy<Value = Vec<Bytes>> {
    let batch = (prop::collection::vec(sent(), 1..8), 0i16..5, -1i64..3);
    prop::collection::vec(batch, 1..25).prop_map(|batches| {
        let mut next = 0;
        let mut log = Vec::new();
        for (records, codec, producer) in batches {
            log.push(batch_of(next, &records, codec, producer));
            next += records.len() as i64;
        }
        log
    })
}

proptest! {
    /// However small the map, and however often it is cleaned: the table stays, every record that stays is the one that
    /// was there, at its offset; once all is clean there is one record a key; tombstones stay for their time and no longer.
    #[test]
    fn the_table_stays(log in log(), keys in 1usize..15, now in 10_000i64..20_000) {
        let before = read(&log);
        let end = Header::parse(log.last().unwrap()).unwrap().next_offset();
        let (mut now_log, mut clean) = (log.clone(), 0);
        while clean < end {
            let (next, to) = pass(&now_log, clean, keys * ENTRY, now);
            prop_assert!(to > clean, "each pass gets on");
            (now_log, clean) = (next, to);
            let seen = read(&now_log);
            prop_assert!(seen.iter().all(|(offset, one)| before.get(offset) == Some(one)));
            prop_assert_eq!(table(&seen), table(&before), "tombstones too: none has waited long enough");
        }
        let seen = read(&now_log);
        prop_assert_eq!(seen.len(), table(&before).len(), "one record a key");
        prop_assert_eq!(last_of(&now_log), last_of(&log), "sequences of producers are kept");
        // Just before the horizon nothing changes; at it, tombstones go and values stay.
        let (same, _) = pass(&now_log, 0, 1 << 20, now + RETENTION - 1);
        prop_assert_eq!(&same, &now_log);
        let (later, _) = pass(&now_log, 0, 1 << 20, now + RETENTION);
        let mut values = table(&before);
        values.retain(|_, value| value.is_some());
        prop_assert_eq!(table(&read(&later)), values);
        prop_assert_eq!(last_of(&later), last_of(&log));
        prop_assert!(read(&later).iter().all(|(offset, one)| before.get(offset) == Some(one)));
    }

    #[test]
    fn any_records_are_judged_or_refused(noise in prop::collection::vec(any::<u8>(), 0..200), attributes in any::<i16>(), count in 0i32..20) {
        let template = batch_of(0, &[Sent { key: Some(1), value: None, header: None, timestamp: 0 }], 0, -1);
        let header = Header::parse(&template).unwrap();
        let hostile = Header { attributes, count, last_offset_delta: 20, ..header }.with_records(&noise);
        let header = Header::parse(&hostile).unwrap();
        let mut map = OffsetMap::new([0; 16], 4 * ENTRY);
        drop(map.note_batch(&header, &hostile, 0));
        map.pass(&header);
        let rules = Rules { now: 0, delete_retention_ms: 0, stays_empty: true, is_aborted: false, ..RULES };
        drop(filter(&header, &hostile, &map, rules));
    }
}

#[test]
fn what_was_aborted_goes_and_markers_stay() {
    let one = |key, value: &[u8]| Sent { key, value: Some(value.to_vec()), header: None, timestamp: 5 };
    let batch = batch_of(0, &[one(Some(1), b"a"), one(Some(2), b"b")], 0, 4);
    let header = Header::parse(&batch).unwrap();
    let mut map = OffsetMap::new([0; 16], 1 << 16);
    map.pass(&header);
    let mut rules = Rules { now: 0, delete_retention_ms: 0, stays_empty: false, is_aborted: true, ..RULES };
    assert_eq!(filter(&header, &batch, &map, rules), Ok(Kept::Nothing));
    rules.stays_empty = true;
    let Ok(Kept::Changed(empty)) = filter(&header, &batch, &map, rules) else { panic!("an empty batch") };
    let after = Header::parse(&empty).unwrap();
    assert_eq!((after.count, after.last_sequence(), after.last_offset()), (0, 1, 1));
    assert_eq!(filter(&after, &empty, &map, rules), Ok(Kept::Whole), "it stays as it is from then on");
    let other = Header { attributes: 0x30, ..header }.with_records(b"anything");
    let header = Header::parse(&other).unwrap();
    rules.is_spent = true;
    assert_eq!(filter(&header, &other, &map, rules), Ok(Kept::Whole), "it is none that we know");
    rules.is_spent = false;
    // A record without a key has no place in a compacted log; one that was not looked at yet waits.
    let keyless = batch_of(2, &[one(None, b"x")], 0, -1);
    let header = Header::parse(&keyless).unwrap();
    rules.is_aborted = false;
    assert_eq!(filter(&header, &keyless, &map, rules), Ok(Kept::Whole));
    map.pass(&header);
    rules.stays_empty = false;
    assert_eq!(filter(&header, &keyless, &map, rules), Ok(Kept::Nothing));
}

#[test]
fn a_marker_goes_when_nothing_of_its_transaction_is_left_and_its_time_has_come() {
    let marker = Marker { outcome: crate::batch::Outcome::Abort, coordinator_epoch: 7 };
    let bytes = marker.batch(5, 2, 40_000).freeze();
    let header = Header::parse(&bytes).unwrap();
    let mut map = OffsetMap::new([0; 16], 1 << 16);
    let mut rules = Rules { now: 50_000, delete_retention_ms: RETENTION, is_spent: true, ..RULES };
    assert_eq!(filter(&header, &bytes, &map, rules), Ok(Kept::Whole), "it was not looked at yet");
    map.pass(&header);
    let spent = Rules { is_spent: false, ..rules };
    assert_eq!(filter(&header, &bytes, &map, spent), Ok(Kept::Whole));
    let Ok(Kept::Changed(waiting)) = filter(&header, &bytes, &map, rules) else { panic!("a horizon") };
    let after = Header::parse(&waiting).unwrap();
    crate::batch::check(&after, &waiting).unwrap();
    assert_eq!(after.delete_horizon(), Some(51_000));
    assert_eq!(Marker::read(&after, &waiting), Some(marker), "it says the same");
    assert_eq!((after.max_timestamp, after.producer_epoch, after.base_offset), (40_000, 2, 0));
    let unpacked = unpack(&after, &waiting, INFLATED).unwrap();
    assert_eq!(Records::new(&after, &unpacked).next().unwrap().unwrap().timestamp, 40_000);
    rules.now = 50_999;
    assert_eq!(filter(&after, &waiting, &map, rules), Ok(Kept::Whole));
    rules.now = 51_000;
    assert_eq!(filter(&after, &waiting, &map, rules), Ok(Kept::Nothing));
    {
        let rules = Rules { stays_empty: true, ..rules };
        let Ok(Kept::Changed(empty)) = filter(&after, &waiting, &map, rules) else {
            panic!("an empty batch")
        };
        let header = Header::parse(&empty).unwrap();
        crate::batch::check(&header, &empty).unwrap();
        assert_eq!((header.count, header.last_offset(), header.delete_horizon()), (0, 0, None));
        assert!(header.is_control() && header.is_transactional());
        assert_eq!(filter(&header, &empty, &map, rules), Ok(Kept::Whole));
        let plain = Rules { stays_empty: false, ..rules };
        assert_eq!(
            filter(&header, &empty, &map, plain),
            Ok(Kept::Nothing),
            "once it is not the last any more"
        );
    }
}

#[test]
fn a_transaction_leaves_traces_until_its_last_batch_is_gone() {
    let data = |producer_id, attributes| {
        let header = Header::parse(&batch_of(
            0,
            &[Sent { key: Some(1), value: None, header: None, timestamp: 0 }],
            0,
            1,
        ));
        Header { attributes, producer_id, ..header.unwrap() }
    };
    let mut traces = Traces::default();
    assert!(!traces.see(&data(1, 0x10)) && !traces.see(&data(2, 0)));
    assert!(
        !traces.see(&Header { count: 0, ..data(3, 0x10) }),
        "an empty one counts: it would open a transaction"
    );
    assert!(traces.see(&data(2, 0x30)), "what is no part of a transaction is no trace of one");
    assert!(!traces.see(&data(1, 0x30)) && traces.see(&data(1, 0x30)), "once");
    assert!(!traces.see(&data(3, 0x30)));
}
