//! Leader epochs of a partition: from which offset on which epoch wrote. Pure.
//!
//! In directory mode they stand in `leader-epoch-checkpoint`, in Kafka's text form: a version line `0`, a count, and
//! a line `epoch start-offset` each.

use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// Epochs that are remembered at most: the list is written with each change of the partition's record. Of those before,
/// nothing is known.
const MOST: usize = 64;

/// Epochs in rising order, each with the offset it starts at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epochs(Vec<(i32, i64)>);

impl Epochs {
    /// Takes note that `epoch` writes from `start` on, where the log ends. An epoch that wrote nothing gives way to its
    /// successor, as does one of which nothing is left.
    pub fn begin(&mut self, epoch: i32, start: i64) {
        if self.0.last().is_some_and(|&(last, _)| last >= epoch) {
            return;
        }
        while self.0.last().is_some_and(|&(_, from)| from >= start) {
            self.0.pop();
        }
        self.0.push((epoch, start));
        self.keep_last(MOST);
    }

    /// Forgets all but the last so many.
    pub fn keep_last(&mut self, most: usize) {
        self.0.drain(..self.0.len().saturating_sub(most));
    }

    /// Drops what lies before `log_start`, but for the epoch that `log_start` itself belongs to.
    pub fn trim_start(&mut self, log_start: i64) {
        let after = self.0.partition_point(|&(_, start)| start <= log_start);
        if after > 1 {
            self.0.drain(..after - 1);
        }
        if let Some(first) = self.0.first_mut() {
            first.1 = first.1.max(log_start);
        }
    }

    /// The largest known epoch up to `epoch`, and the offset at which it ended (KIP-101, KIP-279). An epoch before the
    /// first is answered with where the first began; one that is negative or has not begun, with `None`.
    #[must_use]
    pub fn end_offset(&self, epoch: i32, log_end: i64) -> Option<(i32, i64)> {
        if epoch < 0 || self.0.last().is_none_or(|&(last, _)| epoch > last) {
            return None;
        }
        let after = self.0.partition_point(|&(known, _)| known <= epoch);
        let found = after.checked_sub(1).map_or(epoch, |at| self.0[at].0);
        Some((found, self.0.get(after).map_or(log_end, |&(_, start)| start)))
    }

    /// The epoch that wrote at `offset`, where that is known.
    #[must_use]
    pub fn at(&self, offset: i64) -> Option<i32> {
        let after = self.0.partition_point(|&(_, start)| start <= offset);
        self.0.get(after.checked_sub(1)?).map(|&(epoch, _)| epoch)
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What cannot be right about the list itself, for a log that ends at `log_end`.
    #[must_use]
    pub fn fault(&self, log_end: i64) -> Option<String> {
        if !self.0.is_sorted_by(|one, next| one.0 < next.0 && one.1 <= next.1) {
            return Some("its list of leader epochs does not rise".to_owned());
        }
        let &(epoch, start) = self.0.last().filter(|&&(_, start)| start > log_end)?;
        Some(format!("leader epoch {epoch} is listed from offset {start} on, and the log ends at {log_end}"))
    }

    /// The text of `leader-epoch-checkpoint`.
    #[must_use]
    pub fn checkpoint(&self) -> String {
        let mut text = format!("0\n{}\n", self.0.len());
        for (epoch, start) in &self.0 {
            // Writing to a String cannot fail.
            let _infallible = writeln!(text, "{epoch} {start}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_begin_end_and_are_trimmed() {
        let mut epochs = Epochs::default();
        epochs.begin(0, 0);
        epochs.begin(1, 100);
        epochs.begin(2, 100);
        epochs.begin(2, 150);
        epochs.begin(5, 300);
        assert_eq!(epochs.0, [(0, 0), (2, 100), (5, 300)]);
        assert_eq!(epochs.end_offset(0, 400), Some((0, 100)));
        assert_eq!(epochs.end_offset(1, 400), Some((0, 100)));
        assert_eq!(epochs.end_offset(4, 400), Some((2, 300)));
        assert_eq!(epochs.end_offset(5, 400), Some((5, 400)));
        assert_eq!(epochs.end_offset(9, 400), None, "it has not begun");
        assert_eq!(epochs.end_offset(-1, 400), None);
        assert_eq!(Epochs::default().end_offset(0, 0), None);
        let mut cut = epochs.clone();
        cut.begin(6, 250);
        assert_eq!(cut.0, [(0, 0), (2, 100), (6, 250)], "a log that was cut at 250 has lost all of epoch 5");
        assert_eq!(
            [-1, 0, 99, 100, 299, 300].map(|offset| epochs.at(offset)),
            [None, Some(0), Some(0), Some(2), Some(2), Some(5)]
        );
        assert_eq!(epochs.fault(300), None);
        assert!(epochs.fault(299).is_some_and(|what| what.contains("offset 300")));
        assert!(
            Epochs(vec![(2, 0), (2, 5)]).fault(9).is_some()
                && Epochs(vec![(0, 7), (1, 5)]).fault(9).is_some()
        );
        let mut many = Epochs::default();
        (0..1000).for_each(|epoch| many.begin(epoch, i64::from(epoch) * 10));
        assert_eq!((many.0.len(), many.0[0]), (MOST, (936, 9360)));
        many.keep_last(1);
        assert_eq!(many.0, [(999, 9990)]);
        epochs.trim_start(120);
        assert_eq!(epochs.end_offset(1, 400), Some((1, 120)), "what it wrote is gone");
        assert_eq!(epochs.checkpoint(), "0\n2\n2 120\n5 300\n");
    }
}
