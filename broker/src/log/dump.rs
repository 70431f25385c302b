//! `broker log dump`: lines as kafka-dump-log writes them.

use super::print::Printer;
use super::{Dump, LogError, healed, place};
use logstore::Checkpoint;
use logstore::batch::{BatchFault, Header, add_sequence};
use logstore::compression::Codec;
use logstore::inspect::source::Stored;
use logstore::inspect::walk::{Step, Walk};
use logstore::inspect::{PartitionView, SegmentView, lone_file, lone_segment, sidecars};
use logstore::records::{Record, Records, unpack};
use serde::Serialize;
use std::path::Path;

/// Most bytes that the records of a batch may unpack to.
const UNPACKED: usize = 1 << 30;
/// A compacted batch whose first timestamp is the time at which its tombstones may go.
const DELETE_HORIZON: i16 = 0x40;

/// A batch, with Kafka's names.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BatchLine {
    base_offset: i64,
    last_offset: i64,
    count: i32,
    base_sequence: i32,
    last_sequence: i32,
    producer_id: i64,
    producer_epoch: i16,
    partition_leader_epoch: i32,
    is_transactional: bool,
    is_control: bool,
    delete_horizon_ms: Option<i64>,
    position: u64,
    timestamp_type: &'static str,
    timestamp: i64,
    size: u32,
    magic: i8,
    compresscodec: String,
    crc: u32,
    isvalid: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    records: Option<Vec<RecordLine>>,
}

/// A record, with Kafka's names.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RecordLine {
    offset: i64,
    timestamp: i64,
    key_size: i64,
    value_size: i64,
    sequence: i32,
    headers: Vec<(String, Option<String>)>,
    /// Text where it is text; else lossy, and whole in `keyHex`.
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_hex: Option<String>,
    value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_hex: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    end_txn_marker: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    coordinator_epoch: Option<i32>,
}

/// Bytes that are no batch.
#[derive(Serialize)]
struct GapLine {
    position: u64,
    bytes: u64,
    fault: String,
}

/// `OptionalLong.empty`, or `OptionalLong[5]`.
fn optional(value: Option<i64>) -> String {
    value.map_or_else(|| "OptionalLong.empty".to_owned(), |value| format!("OptionalLong[{value}]"))
}

impl BatchLine {
    fn new(header: &Header, position: u64, fault: Option<BatchFault>) -> Self {
        let codec = Codec::of(header.attributes);
        let numbered = header.base_sequence >= 0;
        let horizon = header.attributes & DELETE_HORIZON != 0;
        Self {
            base_offset: header.base_offset,
            last_offset: header.last_offset(),
            count: header.count,
            base_sequence: header.base_sequence,
            last_sequence: if numbered { header.last_sequence() } else { header.base_sequence },
            producer_id: header.producer_id,
            producer_epoch: header.producer_epoch,
            partition_leader_epoch: header.leader_epoch,
            is_transactional: header.is_transactional(),
            is_control: header.is_control(),
            delete_horizon_ms: horizon.then_some(header.base_timestamp),
            position,
            timestamp_type: if header.is_log_append_time() { "LogAppendTime" } else { "CreateTime" },
            timestamp: header.max_timestamp,
            size: header.size,
            magic: 2,
            compresscodec: codec.map_or_else(|| (header.attributes & 7).to_string(), |c| c.name().to_owned()),
            crc: header.crc,
            isvalid: fault.is_none(),
            fault: fault.map(|fault| fault.to_string()),
            records: None,
        }
    }

    fn text(&self) -> String {
        let mut text = format!(
            "baseOffset: {} lastOffset: {} count: {} baseSequence: {} lastSequence: {} producerId: {} \
             producerEpoch: {} partitionLeaderEpoch: {} isTransactional: {} isControl: {} deleteHorizonMs: {} \
             position: {} {}: {} size: {} magic: {} compresscodec: {} crc: {} isvalid: {}",
            self.base_offset,
            self.last_offset,
            self.count,
            self.base_sequence,
            self.last_sequence,
            self.producer_id,
            self.producer_epoch,
            self.partition_leader_epoch,
            self.is_transactional,
            self.is_control,
            optional(self.delete_horizon_ms),
            self.position,
            self.timestamp_type,
            self.timestamp,
            self.size,
            self.magic,
            self.compresscodec,
            self.crc,
            self.isvalid
        );
        for record in self.records.iter().flatten() {
            text.push('\n');
            text.push_str(&record.text(self.timestamp_type));
        }
        if let Some(fault) = &self.fault {
            text.push_str("\n  fault: ");
            text.push_str(fault);
        }
        text
    }
}

/// Text for people, whatever the bytes; and all of them in hexadecimal where it is not exact.
fn readable(bytes: Option<&[u8]>) -> (Option<String>, Option<String>) {
    let Some(bytes) = bytes else { return (None, None) };
    if let Ok(text) = std::str::from_utf8(bytes) {
        return (Some(text.to_owned()), None);
    }
    let digit = |value: u8| char::from_digit(u32::from(value), 16).unwrap_or_default();
    let hex = bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
    (Some(String::from_utf8_lossy(bytes).into_owned()), Some(hex))
}

/// Adds text as it is, but for what would not stay on its line or not be seen.
fn push_on_one_line(out: &mut String, text: &str) {
    for char in text.chars() {
        if matches!(char, '"' | '\'' | '\\') { out.push(char) } else { out.extend(char.escape_debug()) }
    }
}

impl RecordLine {
    fn new(header: &Header, record: &Record<'_>) -> Self {
        let size = |bytes: Option<&[u8]>| bytes.map_or(-1, |bytes| bytes.len() as i64);
        let (key, key_hex) = readable(record.key);
        let (value, value_hex) = readable(record.value);
        let delta = (record.offset - header.base_offset) as i32;
        let numbered = header.base_sequence >= 0;
        let marker = record.key.filter(|_| header.is_control()).and_then(|key| key.get(2..4));
        let decided = record.value.filter(|_| matches!(marker, Some([0, 0 | 1])));
        let epoch = decided.and_then(|value| value.get(2..6)?.try_into().ok());
        Self {
            offset: record.offset,
            timestamp: record.timestamp,
            key_size: size(record.key),
            value_size: size(record.value),
            sequence: if numbered { add_sequence(header.base_sequence, delta) } else { -1 },
            headers: record
                .headers()
                .map(|(key, value)| (String::from_utf8_lossy(key).into_owned(), readable(value).0))
                .collect(),
            key,
            key_hex,
            value,
            value_hex,
            end_txn_marker: marker.map(|kind| match kind {
                [0, 0] => "ABORT",
                [0, 1] => "COMMIT",
                _ => "UNKNOWN",
            }),
            coordinator_epoch: epoch.map(i32::from_be_bytes),
        }
    }

    fn text(&self, timestamp_type: &str) -> String {
        let headers: Vec<&str> = self.headers.iter().map(|(key, _)| key.as_str()).collect();
        let mut text = format!(
            "| offset: {} {timestamp_type}: {} keySize: {} valueSize: {} sequence: {} headerKeys: [{}]",
            self.offset,
            self.timestamp,
            self.key_size,
            self.value_size,
            self.sequence,
            headers.join(",")
        );
        match self.end_txn_marker {
            Some(marker) => {
                text.extend([" endTxnMarker: ", marker]);
                if let Some(epoch) = self.coordinator_epoch {
                    text.extend([" coordinatorEpoch: ", &epoch.to_string()]);
                }
            }
            None => {
                for (name, content) in [("key", &self.key), ("payload", &self.value)] {
                    if let Some(content) = content {
                        text.extend([" ", name, ": "]);
                        push_on_one_line(&mut text, content);
                    }
                }
            }
        }
        text
    }
}

pub(super) async fn run(dump: &Dump) -> Result<(), LogError> {
    let wanted = &dump.place;
    if !wanted.files.is_empty() {
        let mut printer = Printer::new(dump.json)?;
        for path in &wanted.files {
            file(dump, path, &mut printer).await?;
        }
        return Ok(printer.finish()?);
    }
    let opened = place::open(&wanted.volume, wanted.data_dir.as_deref()).await?;
    let picked = dump.pick.of(&opened.inspection)?;
    for finding in &opened.inspection.findings {
        eprintln!("broker: {finding}");
    }
    let (mut printer, mut others) = (Printer::new(dump.json)?, 0);
    for view in picked {
        others += partition(dump, view, &mut printer).await?;
    }
    printer.finish()?;
    healed(others);
    Ok(())
}

/// Shows a partition; returns how many batches were taken from another copy than the first.
async fn partition(dump: &Dump, view: &PartitionView, printer: &mut Printer) -> Result<u64, LogError> {
    let (from, mut others) = (dump.from.unwrap_or(0), 0);
    for (at, segment) in view.segments.iter().enumerate() {
        if view.segments.get(at + 1).is_some_and(|next| next.base <= from) {
            continue;
        }
        let name = |extension: &str| format!("{}/{:020}.{extension}", view.name(), segment.base);
        others += log(dump, Walk::new(view, segment), segment, &name("log"), printer).await?;
        if dump.from.is_some() {
            continue;
        }
        for (extension, stored) in
            [("index", &segment.index), ("timeindex", &segment.time_index), ("txnindex", &segment.txn_index)]
        {
            if let Some(stored) = stored {
                derived(segment.base, extension, &name(extension), stored, printer).await?;
            }
        }
    }
    if dump.from.is_some() {
        return Ok(others);
    }
    for (offset, stored) in &view.snapshots {
        let name = format!("{}/{offset:020}.snapshot", view.name());
        derived(0, "snapshot", &name, stored, printer).await?;
    }
    let name = format!("{}/leader-epoch-checkpoint", view.name());
    checkpoint(&name, &view.epoch_checkpoint(), &["epoch", "startOffset"], printer)?;
    Ok(others)
}

/// The batches of a segment; returns how many were taken from another copy than the first.
async fn log(
    dump: &Dump,
    walk: logstore::Result<Walk>,
    segment: &SegmentView,
    name: &str,
    printer: &mut Printer,
) -> Result<u64, LogError> {
    let from = dump.from.unwrap_or(i64::MIN);
    printer.begin(name, "log", Some(segment.base))?;
    let mut walk = match walk {
        Ok(walk) => walk,
        Err(error) => {
            printer.end(Some(&error.to_string()))?;
            return Ok(0);
        }
    };
    let (mut fault, mut others) = (None, 0);
    loop {
        match walk.next().await {
            Ok(None) => break,
            Ok(Some(Step::Batch { header, .. })) if header.last_offset() < from => {}
            Ok(Some(Step::Batch { position, header, fault, healed })) => {
                others += u64::from(healed);
                let mut line = BatchLine::new(&header, position, fault);
                if dump.records && fault.is_none() {
                    let batch = walk.batch(position, &header).await?;
                    match records(&header, &batch) {
                        (records, None) => line.records = Some(records),
                        (records, Some(what)) => {
                            (line.records, line.isvalid, line.fault) = (Some(records), false, Some(what));
                        }
                    }
                }
                printer.entry(&line, || line.text())?;
            }
            // Space that was taken ahead.
            Ok(Some(Step::Gap { zeroes: true, end, .. })) if end == segment.len && !segment.exact => {}
            Ok(Some(Step::Gap { position, end, fault, .. })) => {
                let line = GapLine { position, bytes: end - position, fault: fault.to_string() };
                printer.entry(&line, || {
                    format!("position: {position} bytes: {} are no batch: {}", line.bytes, line.fault)
                })?;
            }
            Err(error) => {
                fault = Some(error.to_string());
                break;
            }
        }
    }
    printer.end(fault.as_deref())?;
    Ok(others)
}

fn records(header: &Header, batch: &[u8]) -> (Vec<RecordLine>, Option<String>) {
    let unpacked = match unpack(header, batch, UNPACKED) {
        Ok(unpacked) => unpacked,
        Err(fault) => return (Vec::new(), Some(fault.to_string())),
    };
    let mut lines = Vec::new();
    for record in Records::new(header, &unpacked) {
        match record {
            Ok(record) => lines.push(RecordLine::new(header, &record)),
            Err(fault) => return (lines, Some(fault.to_string())),
        }
    }
    (lines, None)
}

/// Something derived from a segment.
async fn derived(
    base: i64,
    extension: &str,
    name: &str,
    stored: &Stored,
    printer: &mut Printer,
) -> Result<(), LogError> {
    match stored.read().await {
        Ok(bytes) => bytes_of(base, extension, name, &bytes, stored.fault(&bytes), printer),
        Err(error) => {
            printer.begin(name, extension, None)?;
            Ok(printer.end(Some(&error.to_string()))?)
        }
    }
}

fn bytes_of(
    base: i64,
    extension: &str,
    name: &str,
    bytes: &[u8],
    stored_fault: Option<String>,
    printer: &mut Printer,
) -> Result<(), LogError> {
    printer.begin(name, extension, None)?;
    let fault = match extension {
        "index" => {
            let (entries, fault) = sidecars::offset_index(base, bytes);
            for entry in &entries {
                printer.entry(entry, || format!("offset: {} position: {}", entry.offset, entry.position))?;
            }
            fault
        }
        "timeindex" => {
            let (entries, fault) = sidecars::time_index(base, bytes);
            for entry in &entries {
                printer
                    .entry(entry, || format!("timestamp: {} offset: {}", entry.timestamp, entry.offset))?;
            }
            fault
        }
        "txnindex" => {
            let (entries, fault) = sidecars::txn_index(bytes);
            for entry in &entries {
                printer.entry(entry, || {
                    format!(
                        "version: {} producerId: {} firstOffset: {} lastOffset: {} lastStableOffset: {}",
                        entry.version,
                        entry.producer_id,
                        entry.first_offset,
                        entry.last_offset,
                        entry.last_stable_offset
                    )
                })?;
            }
            fault
        }
        _ => {
            let (entries, fault) = sidecars::snapshot(bytes);
            for entry in &entries {
                printer.entry(entry, || {
                    let open = Some(entry.current_txn_first_offset).filter(|&offset| offset >= 0);
                    let numbered = entry.last_sequence >= 0;
                    let first = if numbered { add_sequence(entry.last_sequence, -entry.offset_delta) } else { -1 };
                    format!(
                        "producerId: {} producerEpoch: {} coordinatorEpoch: {} currentTxnFirstOffset: {} \
                         lastTimestamp: {} firstSequence: {first} lastSequence: {} lastOffset: {} offsetDelta: {} \
                         timestamp: {}",
                        entry.producer_id,
                        entry.producer_epoch,
                        entry.coordinator_epoch,
                        optional(open),
                        entry.timestamp,
                        entry.last_sequence,
                        entry.last_offset,
                        entry.offset_delta,
                        entry.timestamp
                    )
                })?;
            }
            fault
        }
    };
    Ok(printer.end(stored_fault.or(fault).as_deref())?)
}

/// A checkpoint's rows.
fn checkpoint(name: &str, text: &str, fields: &[&str], printer: &mut Printer) -> Result<(), LogError> {
    printer.begin(name, "checkpoint", None)?;
    let fault = match sidecars::checkpoint(text, fields.len()) {
        Ok(rows) => {
            for row in rows {
                let pairs = || fields.iter().zip(&row);
                let value: serde_json::Map<String, serde_json::Value> =
                    pairs().map(|(&field, &text)| (field.to_owned(), number_or_text(text))).collect();
                let line =
                    || pairs().map(|(field, text)| format!("{field}: {text}")).collect::<Vec<_>>().join(" ");
                printer.entry(&value, line)?;
            }
            None
        }
        Err(fault) => Some(fault),
    };
    Ok(printer.end(fault.as_deref())?)
}

fn number_or_text(text: &str) -> serde_json::Value {
    text.parse::<i64>().map_or_else(|_| text.into(), Into::into)
}

/// A file that was named by itself.
async fn file(dump: &Dump, path: &Path, printer: &mut Printer) -> Result<(), LogError> {
    let name = path.display().to_string();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match (path.extension().and_then(|e| e.to_str()), path.file_name().and_then(|n| n.to_str())) {
        (Some("log"), _) => {
            let segment = lone_segment(path).await?;
            log(dump, Walk::lone(&segment), &segment, &name, printer).await.map(drop)
        }
        (Some(extension @ ("index" | "timeindex" | "txnindex" | "snapshot")), _) => {
            let base = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
            let bytes = lone_file(path.to_owned()).await?;
            bytes_of(base.unwrap_or(0), extension, &name, &bytes, None, printer)
        }
        (_, Some("leader-epoch-checkpoint")) => {
            let bytes = lone_file(path.to_owned()).await?;
            checkpoint(&name, &text(&bytes), &["epoch", "startOffset"], printer)
        }
        (_, Some(own)) if Checkpoint::ALL.iter().any(|of| of.file_name() == own) => {
            let bytes = lone_file(path.to_owned()).await?;
            checkpoint(&name, &text(&bytes), &["topic", "partition", "offset"], printer)
        }
        _ => Err(LogError::NoLogFile(name)),
    }
}
