//! Holding Kafka's offset checkpoints of a data directory ([`crate::checkpoints`]) against what the catalog says.
//!
//! They are derived, and the next start writes them anew: whatever is wrong with one is worth a note, and no fault. In a
//! store that was closed in order each must say what the catalog says. In any other it may be older, but not ahead of the
//! catalog; nor of the log's end, which [`verify`](super::verify) looks at when it knows it. An offset that is changed
//! within these bounds is not noticed there: nothing else says what it was.

use super::{Finding, PartitionView, Severity};
use crate::checkpoints::{Checkpoint, Row, rows};
use crate::directory::offline;
use std::collections::HashMap;
use std::path::Path;

/// Rows of a kind that are told of by name.
const NAMED: usize = 10;

/// Reads the checkpoints at `root`. The first `known` partitions are those of the catalog.
pub(super) async fn read(
    root: &Path,
    partitions: &mut [PartitionView],
    known: usize,
    findings: &mut Vec<Finding>,
) {
    let is_closed = known > 0 && partitions[..known].iter().all(|view| view.clean_end.is_some());
    for of in Checkpoint::ALL {
        let name = of.file_name();
        let mut note = |what: String| findings.push(Finding::of_store(Severity::Note, what));
        let bytes = match offline::checkpoint(root, of).await {
            Ok(None) => continue,
            Ok(Some(bytes)) => bytes,
            Err(error) => {
                note(error.to_string());
                continue;
            }
        };
        match rows(&bytes) {
            Ok(rows) => compare(of, &rows, partitions, known, is_closed, findings),
            Err(what) => note(format!("{name}: {what}")),
        }
    }
}

fn compare(
    of: Checkpoint,
    rows: &[Row<'_>],
    partitions: &mut [PartitionView],
    known: usize,
    is_closed: bool,
    findings: &mut Vec<Finding>,
) {
    let name = of.file_name();
    let (mut told, mut twice) = (HashMap::with_capacity(rows.len()), Vec::new());
    for (topic, partition, offset) in rows {
        if told.insert((*topic, *partition), *offset).is_some() {
            twice.push((*topic, *partition));
        }
    }
    few(&twice, &mut |row| format!("{name}: it has two rows for {row}"), findings);
    for (at, view) in partitions.iter_mut().enumerate() {
        let found = told.remove(&(view.topic.as_str(), view.partition));
        let is_known = at < known;
        // To Kafka, no row is offset 0.
        let (has, marks) = (found.unwrap_or(0), view.marks(view.clean_end.unwrap_or(i64::MAX)));
        let should = marks.row(of).unwrap_or(0);
        let what = match of {
            _ if !is_known => None,
            _ if is_closed && has != should => Some(format!("the catalog {should}")),
            Checkpoint::LogStart | Checkpoint::Cleaner if has > should.max(view.log_start) => {
                Some(format!("the catalog no more than {}", should.max(view.log_start)))
            }
            _ => None,
        };
        match what {
            Some(what) => {
                let what = format!("{name} says offset {has}, {what}; the next start writes it anew");
                findings.push(view.finding(None, Severity::Note, what));
            }
            None => view.checkpoints.extend(found.map(|offset| (of, offset))),
        }
    }
    let mut strange: Vec<_> = told.into_keys().collect();
    strange.sort_unstable();
    few(&strange, &mut |row| format!("{name}: it has a row for {row}, which is not here"), findings);
}

/// Names the first of some rows, and counts the others: a file can hold any number.
fn few(rows: &[(&str, u32)], told: &mut dyn FnMut(String) -> String, findings: &mut Vec<Finding>) {
    let named = rows.iter().take(NAMED).map(|(topic, partition)| {
        // Nothing says that it is a name.
        let topic: String = topic.chars().take(249).flat_map(char::escape_debug).collect();
        format!("{topic}-{partition}")
    });
    let more = rows.len().saturating_sub(NAMED);
    let rest = (more > 0).then(|| format!("{more} more"));
    for row in named.chain(rest) {
        findings.push(Finding::of_store(Severity::Note, told(row)));
    }
}
