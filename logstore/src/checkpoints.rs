//! Kafka's offset checkpoints: the files beside the partitions of a data directory that say, partition by partition, up to
//! where the log is on disk, where it starts, up to where it was compacted, up to where it is visible. Pure.
//!
//! ```text
//! 0                          version
//! 2                          rows
//! orders 0 4711              topic, partition, offset; "\n" behind every line
//! orders 1 815
//! ```
//!
//! They are derived. The catalog is the truth; nothing here is ever read to learn something about a log. They are for
//! whoever knows Kafka's layout and not our catalog. So all that is asked of them is that they never say more than what the
//! catalog and the log have: each offset is taken from what is durable already, and its row is at most too old.

use std::fmt::Write;

/// One of the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Checkpoint {
    /// Up to where the log is on stable storage: what Kafka need not check after an unclean stop.
    RecoveryPoint,
    /// Where the log starts, if that lies behind the start of its first segment.
    LogStart,
    /// Up to where compaction has looked at every record.
    Cleaner,
    /// Up to where consumers may read.
    HighWatermark,
}

impl Checkpoint {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::RecoveryPoint, Self::LogStart, Self::Cleaner, Self::HighWatermark];

    /// Kafka's name of the file.
    #[must_use]
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::RecoveryPoint => "recovery-point-offset-checkpoint",
            Self::LogStart => "log-start-offset-checkpoint",
            Self::Cleaner => "cleaner-offset-checkpoint",
            Self::HighWatermark => "replication-offset-checkpoint",
        }
    }
}

/// The offsets of a partition that go into checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Marks {
    /// First offset held.
    pub(crate) log_start: i64,
    /// Base offset of the first segment, if there is one.
    pub(crate) first_base: Option<i64>,
    /// Everything below is on stable storage.
    pub(crate) durable: i64,
    /// Records below it are visible.
    pub(crate) high_watermark: i64,
    /// Below it compaction has looked at every record.
    pub(crate) cleaned: i64,
}

impl Marks {
    /// The offset of this partition's row in a checkpoint; `None` where Kafka writes none.
    pub(crate) fn row(self, of: Checkpoint) -> Option<i64> {
        match of {
            Checkpoint::RecoveryPoint => Some(self.durable),
            // A log without a segment begins one where this says.
            Checkpoint::LogStart => (self.log_start > self.first_base.unwrap_or(0)).then_some(self.log_start),
            // What lies below the log's start is clean, and no offset to begin at.
            Checkpoint::Cleaner => (self.cleaned > 0).then_some(self.cleaned.max(self.log_start)),
            // What is visible and not durable may be gone after a power cut.
            Checkpoint::HighWatermark => Some(self.high_watermark.min(self.durable)),
        }
    }
}

/// A row: topic, partition, offset.
pub(crate) type Row<'a> = (&'a str, u32, i64);

/// The text of a checkpoint.
pub(crate) fn text(rows: &[Row<'_>]) -> String {
    let mut text = format!("0\n{}\n", rows.len());
    for (topic, partition, offset) in rows {
        // Writing to a String cannot fail.
        let _infallible = writeln!(text, "{topic} {partition} {offset}");
    }
    text
}

/// The rows of a checkpoint, or what is wrong with it. It must be written as Kafka writes it, to the last byte. The names in
/// them are not checked. Takes a few bytes of memory for each byte of the file, whatever it holds: it ends at the first row
/// that is none.
pub(crate) fn rows(bytes: &[u8]) -> Result<Vec<Row<'_>>, String> {
    let told = std::str::from_utf8(bytes).map_err(|_| "it is no text".to_owned())?;
    let mut lines = told.lines();
    match lines.next() {
        Some("0") => {}
        first => return Err(format!("its version is {:?}, expected 0", short(first.unwrap_or_default()))),
    }
    let count: usize = lines.next().and_then(|line| line.parse().ok()).ok_or("its count is no number")?;
    let mut rows = Vec::new();
    for line in lines {
        let row = row(line);
        rows.push(
            row.ok_or_else(|| format!("the row {:?} is not topic, partition and offset", short(line)))?,
        );
    }
    if rows.len() != count {
        return Err(format!("it says that it has {count} rows, and has {}", rows.len()));
    }
    if text(&rows) != told {
        return Err("its lines are not written as Kafka writes them".to_owned());
    }
    Ok(rows)
}

fn row(line: &str) -> Option<Row<'_>> {
    let mut fields = line.split(' ');
    let (topic, partition, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let offset = offset.parse().ok().filter(|offset| *offset >= 0)?;
    fields.next().is_none().then_some((topic, partition.parse().ok()?, offset))
}

/// As much of a line as is worth telling.
fn short(line: &str) -> String {
    line.chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_read_back_and_each_flipped_bit_is_seen_or_changes_a_name_or_number() {
        let good = [("a.b-c", 0, 0), ("t", 17, i64::MAX)];
        let told = text(&good);
        assert_eq!(told, "0\n2\na.b-c 0 0\nt 17 9223372036854775807\n");
        assert_eq!(rows(told.as_bytes()).unwrap(), good);
        assert_eq!(rows(text(&[]).as_bytes()).unwrap(), []);
        for bit in 0..told.len() * 8 {
            let mut bytes = told.clone().into_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(found) = rows(&bytes) {
                assert_ne!(found, good, "bit {bit}");
            }
        }
    }

    #[test]
    fn what_is_no_checkpoint_is_refused_with_a_reason() {
        for (bad, reason) in [
            ("", "version"),
            ("1\n0\n", "version"),
            ("0\n", "count"),
            ("0\n-1\n", "count"),
            ("0\n99999999999999999999\n", "count"),
            ("0\n2\nt 0 1\n", "2 rows"),
            ("0\n1\nt 0\n", "topic, partition and offset"),
            ("0\n1\nt 0 1 1\n", "topic, partition and offset"),
            ("0\n1\n\n", "topic, partition and offset"),
            ("0\n1\nt 0 -1\n", "topic, partition and offset"),
            ("0\n1\nt x 1\n", "topic, partition and offset"),
            ("0\n1\nt 0 9223372036854775808\n", "topic, partition and offset"),
            ("0\n1\nt 0 01\n", "as Kafka writes"),
            ("0\n1\nt  0 1\n", "topic, partition and offset"),
            ("0\n1\nt 0 1", "as Kafka writes"),
            ("0\r\n1\r\nt 0 1\r\n", "as Kafka writes"),
            ("0\n+1\nt 0 1\n", "as Kafka writes"),
        ] {
            let found = rows(bad.as_bytes()).unwrap_err();
            assert!(found.contains(reason), "{bad:?}: {found}");
        }
        assert_eq!(rows(&[0xff, 0xfe]).unwrap_err(), "it is no text");
        // What is told of it is short, whatever it holds.
        for long in ["9".repeat(1 << 20), format!("0\n1\n{}", "t ".repeat(1 << 20)), "0\n1\n".repeat(1 << 20)]
        {
            assert!(rows(long.as_bytes()).unwrap_err().len() < 400);
        }
    }

    #[test]
    fn rows_are_those_that_kafka_writes() {
        use Checkpoint::{Cleaner, HighWatermark, LogStart, RecoveryPoint};
        let fresh = Marks { log_start: 0, first_base: None, durable: 0, high_watermark: 0, cleaned: 0 };
        assert_eq!(Checkpoint::ALL.map(|of| fresh.row(of)), [Some(0), None, None, Some(0)]);
        let used = Marks { log_start: 12, first_base: Some(10), durable: 40, high_watermark: 50, cleaned: 5 };
        assert_eq!(used.row(RecoveryPoint), Some(40));
        assert_eq!(used.row(LogStart), Some(12));
        assert_eq!(used.row(Cleaner), Some(12));
        assert_eq!(used.row(HighWatermark), Some(40));
        assert_eq!(Marks { log_start: 10, ..used }.row(LogStart), None, "its first segment says it");
        assert_eq!(Marks { first_base: None, ..used }.row(LogStart), Some(12), "nothing else does");
        assert_eq!(Marks { cleaned: 30, ..used }.row(Cleaner), Some(30));
    }
}
