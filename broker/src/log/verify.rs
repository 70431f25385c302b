//! `broker log verify`: each fault a line, and an exit status.

use super::{LogError, Verify, bar, counted, place};
use logstore::inspect::verify::{Counts, Options, verify};
use logstore::inspect::{Finding, PartitionView, Severity};
use serde::Serialize;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// A clock a little ahead is no fault of the record.
const PATIENCE: u64 = 3_600_000;

/// The document.
#[derive(Serialize)]
struct Report<'a> {
    place: &'a str,
    sound: bool,
    partitions: usize,
    #[serde(flatten)]
    counts: Counts,
    findings: &'a [Finding],
}

pub(super) async fn run(command: &Verify) -> Result<(), LogError> {
    let opened = place::open(&command.place.volume, command.place.data_dir.as_deref()).await?;
    let inspection = &opened.inspection;
    let picked = command.pick.of(inspection)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let options = Options { now: Some((now + PATIENCE) as i64) };
    let bar = bar("verify", picked.iter().map(|view| PartitionView::bytes(view)).sum());
    let mut findings = inspection.findings.clone();
    let mut total = Counts::default();
    for view in &picked {
        let (counts, found) = verify(view, options, &mut |done| bar.inc(done)).await?;
        total.segments += counts.segments;
        total.batches += counts.batches;
        total.records += counts.records;
        total.bytes += counts.bytes;
        findings.extend(found);
    }
    bar.finish_and_clear();
    let faults = findings.iter().filter(|finding| finding.severity == Severity::Fault).count();
    let mut out = io::stdout().lock();
    if command.json {
        let report = Report {
            place: &inspection.place,
            sound: faults == 0,
            partitions: picked.len(),
            counts: total,
            findings: &findings,
        };
        serde_json::to_writer(&mut out, &report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        for finding in &findings {
            let severity = if finding.severity == Severity::Fault { "fault" } else { "note" };
            writeln!(out, "{severity}: {finding}")?;
        }
        writeln!(
            out,
            "{}, {}, {}, {}, {}",
            counted(picked.len(), "partition"),
            counted(total.segments as usize, "segment"),
            if total.batches == 1 { "1 batch".to_owned() } else { format!("{} batches", total.batches) },
            counted(total.records as usize, "record"),
            if faults == 0 { "all sound".to_owned() } else { counted(faults, "fault") }
        )?;
    }
    out.flush()?;
    if faults == 0 {
        return Ok(());
    }
    Err(LogError::Faults { faults: counted(faults, "fault"), place: inspection.place.clone() })
}
