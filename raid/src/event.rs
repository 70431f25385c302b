//! What happens to a volume, told as it happens: to the log, to `raid10 serve --on-event`, to whoever else listens.
//!
//! An event is named as `mdadm --monitor` names it, where that has a name for it (`Fail`, `SpareActive`,
//! `RebuildStarted`, `RebuildFinished`, `DegradedArray`), so that scripts written for it read ours. Its JSON has the
//! name under `event`, and its own fields beside it.
//!
//! Invariants: telling never waits and never fails. Listeners that fall behind by more than [`BACKLOG`] events lose the
//! oldest and are told how many ([`RecvError::Lagged`](tokio::sync::broadcast::error::RecvError::Lagged)); the log
//! has them all. Events are told after what they speak of has happened, and on record where it goes on record.

use serde::{Deserialize, Serialize};
use std::fmt;
use tokio::sync::broadcast;

/// Events that are kept for a listener that is slow.
pub const BACKLOG: usize = 1024;

/// Something that happened. Paths are those under which members were opened; positions and lengths are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event")]
pub enum Event {
    /// A member failed, or was declared failed, and is taken out.
    #[serde(rename = "Fail")]
    MemberFailed {
        /// The slot it held; `None` for a spare.
        slot: Option<usize>,
        /// The member.
        path: String,
        /// Why.
        cause: String,
    },
    /// A failed member or a spare was let go; its device is closed.
    MemberRemoved {
        /// The slot it last held; `None` for a spare.
        slot: Option<usize>,
        /// The member.
        path: String,
    },
    /// A device joined.
    MemberAdded {
        /// The slot it fills or copies; `None`: it waits as a spare.
        slot: Option<usize>,
        /// The member.
        path: String,
    },
    /// A spare took the place of a failed member by itself. Its rebuild begins next.
    SpareTookOver {
        /// The slot.
        slot: usize,
        /// The former spare.
        path: String,
    },
    /// A member that was being rebuilt holds all its data now, and counts as a copy.
    SpareActive {
        /// Its slot.
        slot: usize,
        /// The member.
        path: String,
    },
    /// Filling of a member began, or went on after a restart.
    RebuildStarted {
        /// Its slot.
        slot: usize,
        /// The member.
        path: String,
        /// Bytes of its data area that are filled already.
        from: u64,
    },
    /// A member has been filled.
    RebuildFinished {
        /// Its slot.
        slot: usize,
        /// The member.
        path: String,
    },
    /// Filling of a member ended before its end.
    RebuildStopped {
        /// Its slot.
        slot: usize,
        /// The member.
        path: String,
        /// Why.
        cause: String,
    },
    /// Copies that may differ are being made equal.
    ResyncStarted {
        /// Bytes of the array to look at.
        total: u64,
    },
    /// Copies that might have differed are equal.
    ResyncFinished,
    /// Making copies equal ended before its end; it goes on by itself later.
    ResyncStopped {
        /// Why.
        cause: String,
    },
    /// Copies are being compared.
    ScrubStarted {
        /// Whether differences are made good.
        repair: bool,
    },
    /// All copies have been compared.
    ScrubFinished {
        /// Whether differences were made good.
        repair: bool,
        /// Differences found.
        mismatches: u64,
    },
    /// Comparing ended before its end.
    ScrubStopped {
        /// Why.
        cause: String,
    },
    /// Copies of a range differ.
    Mismatch(Mismatch),
    /// A copy of a range held something else than whoever stores there knows to be right, and was rewritten.
    Corrected {
        /// The member's slot.
        slot: usize,
        /// The member.
        path: String,
        /// First byte of the array.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// A range of a member cannot be used any more and is on record as bad.
    BadBlocks {
        /// Its slot.
        slot: usize,
        /// The member.
        path: String,
        /// First byte of its file or device.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Slots without a member that is in sync: found at the start, or since a member failed.
    #[serde(rename = "DegradedArray")]
    Degraded {
        /// These.
        slots: Vec<usize>,
    },
    /// Acknowledged data may be lost; the volume acknowledges nothing more.
    #[serde(rename = "FailedArray")]
    Failed {
        /// Why.
        cause: String,
    },
    /// The array has become larger.
    Grown {
        /// Bytes it holds now.
        size: u64,
    },
}

/// A range whose copies differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// First byte of the array.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Where its copies lie, in slot order.
    pub copies: Vec<Place>,
    /// Which of `copies` (by index) differs from the others that are equal; `None` where no majority tells, as with two copies.
    pub wrong: Option<usize>,
    /// Whether they have been made equal.
    pub repaired: bool,
}

/// Where a copy lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The member's slot.
    pub slot: usize,
    /// The member.
    pub path: String,
    /// First sector of the member's file or device, in units of 512 bytes.
    pub sector: u64,
    /// First byte of the member's file or device.
    pub file_offset: u64,
}

/// How bad an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// For the record.
    Info,
    /// Somebody should look: redundancy is less than it was, or something was wrong.
    Warning,
    /// Data is at stake.
    Error,
}

impl Event {
    /// Its name, which is also what its JSON has under `event`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::MemberFailed { .. } => "Fail",
            Self::MemberRemoved { .. } => "MemberRemoved",
            Self::MemberAdded { .. } => "MemberAdded",
            Self::SpareTookOver { .. } => "SpareTookOver",
            Self::SpareActive { .. } => "SpareActive",
            Self::RebuildStarted { .. } => "RebuildStarted",
            Self::RebuildFinished { .. } => "RebuildFinished",
            Self::RebuildStopped { .. } => "RebuildStopped",
            Self::ResyncStarted { .. } => "ResyncStarted",
            Self::ResyncFinished => "ResyncFinished",
            Self::ResyncStopped { .. } => "ResyncStopped",
            Self::ScrubStarted { .. } => "ScrubStarted",
            Self::ScrubFinished { .. } => "ScrubFinished",
            Self::ScrubStopped { .. } => "ScrubStopped",
            Self::Mismatch(_) => "Mismatch",
            Self::Corrected { .. } => "Corrected",
            Self::BadBlocks { .. } => "BadBlocks",
            Self::Degraded { .. } => "DegradedArray",
            Self::Failed { .. } => "FailedArray",
            Self::Grown { .. } => "Grown",
        }
    }

    /// How bad it is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::MemberRemoved { .. }
            | Self::MemberAdded { .. }
            | Self::SpareTookOver { .. }
            | Self::SpareActive { .. }
            | Self::RebuildStarted { .. }
            | Self::RebuildFinished { .. }
            | Self::ResyncStarted { .. }
            | Self::ResyncFinished
            | Self::ScrubStarted { .. }
            | Self::ScrubFinished { mismatches: 0, .. }
            | Self::Grown { .. } => Severity::Info,
            Self::MemberFailed { .. }
            | Self::RebuildStopped { .. }
            | Self::ResyncStopped { .. }
            | Self::ScrubFinished { .. }
            | Self::ScrubStopped { .. }
            | Self::Mismatch(_)
            | Self::Corrected { .. }
            | Self::BadBlocks { .. }
            | Self::Degraded { .. } => Severity::Warning,
            Self::Failed { .. } => Severity::Error,
        }
    }

    /// The member it is about, by its path; of a mismatch, the copy that is known to be wrong.
    #[must_use]
    pub fn member(&self) -> Option<&str> {
        match self {
            Self::MemberFailed { path, .. }
            | Self::MemberRemoved { path, .. }
            | Self::MemberAdded { path, .. }
            | Self::SpareTookOver { path, .. }
            | Self::SpareActive { path, .. }
            | Self::RebuildStarted { path, .. }
            | Self::RebuildFinished { path, .. }
            | Self::RebuildStopped { path, .. }
            | Self::Corrected { path, .. }
            | Self::BadBlocks { path, .. } => Some(path),
            Self::Mismatch(mismatch) => mismatch.odd_one().map(|place| place.path.as_str()),
            _ => None,
        }
    }
}

/// A sentence for people, without its full stop.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MemberFailed { slot: Some(slot), path, cause } => {
                write!(f, "{path} (slot {slot}) failed and is taken out: {cause}")
            }
            Self::MemberFailed { slot: None, path, cause } => write!(f, "the spare {path} failed: {cause}"),
            Self::MemberRemoved { path, .. } => write!(f, "{path} is removed"),
            Self::MemberAdded { slot: Some(slot), path } => write!(f, "{path} is added in slot {slot}"),
            Self::MemberAdded { slot: None, path } => write!(f, "{path} is added as a spare"),
            Self::SpareTookOver { slot, path } => write!(f, "the spare {path} takes slot {slot} over"),
            Self::SpareActive { slot, path } => write!(f, "{path} is in sync in slot {slot}"),
            Self::RebuildStarted { slot, path, from: 0 } => {
                write!(f, "rebuild of {path} (slot {slot}) begins")
            }
            Self::RebuildStarted { slot, path, from } => {
                write!(f, "rebuild of {path} (slot {slot}) goes on from byte {from} of its data")
            }
            Self::RebuildFinished { slot, path } => write!(f, "rebuild of {path} (slot {slot}) is done"),
            Self::RebuildStopped { slot, path, cause } => {
                write!(f, "rebuild of {path} (slot {slot}) stopped: {cause}")
            }
            Self::ResyncStarted { total } => write!(f, "resync of {total} bytes begins"),
            Self::ResyncFinished => f.write_str("resync is done"),
            Self::ResyncStopped { cause } => write!(f, "resync stopped: {cause}"),
            Self::ScrubStarted { repair: false } => f.write_str("check of all copies begins"),
            Self::ScrubStarted { repair: true } => f.write_str("check and repair of all copies begins"),
            Self::ScrubFinished { repair: false, mismatches } => {
                write!(f, "check of all copies is done: {mismatches} mismatches")
            }
            Self::ScrubFinished { repair: true, mismatches } => {
                write!(f, "check and repair of all copies is done: {mismatches} mismatches")
            }
            Self::ScrubStopped { cause } => write!(f, "check of all copies stopped: {cause}"),
            Self::Mismatch(mismatch) => mismatch.fmt(f),
            Self::Corrected { slot, path, at, len } => {
                write!(f, "{path} (slot {slot}) held wrong content of {len} bytes at {at}; it is rewritten")
            }
            Self::BadBlocks { slot, path, at, len } => {
                write!(f, "{path} (slot {slot}): {len} bytes at {at} are on record as bad")
            }
            Self::Degraded { slots } => {
                let slots: Vec<String> = slots.iter().map(ToString::to_string).collect();
                let slots = slots.join(", ");
                write!(
                    f,
                    "degraded: no member in sync in slot {slots}; `raid10 add VOLUME PATH` gives it a new one"
                )
            }
            Self::Failed { cause } => write!(f, "failed, and acknowledges nothing more: {cause}"),
            Self::Grown { size } => write!(f, "grown to {size} bytes"),
        }
    }
}

impl Mismatch {
    /// The copy that a majority shows to be wrong.
    #[must_use]
    pub fn odd_one(&self) -> Option<&Place> {
        self.wrong.and_then(|index| self.copies.get(index))
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "copies of {} bytes at {} differ:", self.len, self.at)?;
        for (index, place) in self.copies.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let odd = if self.wrong == Some(index) { " (the odd one)" } else { "" };
            let Place { path, sector, file_offset, .. } = place;
            write!(f, "{comma} {path} at sector {sector} (byte {file_offset}){odd}")?;
        }
        f.write_str(if self.repaired { "; made equal" } else { "; left as they are" })
    }
}

/// Where a volume tells its events.
#[derive(Debug)]
pub struct EventLog {
    volume: String,
    listeners: broadcast::Sender<Event>,
}

impl EventLog {
    /// Of the volume of that name. Nobody listens yet.
    #[must_use]
    pub fn new(volume: &str) -> Self {
        Self { volume: volume.to_owned(), listeners: broadcast::Sender::new(BACKLOG) }
    }

    /// Tells an event to all who listen, and writes it to the log as one line.
    pub fn emit(&self, event: Event) {
        let (volume, name, member) = (self.volume.as_str(), event.name(), event.member());
        match event.severity() {
            Severity::Info => tracing::info!(volume, event = name, member, "{event}"),
            Severity::Warning => tracing::warn!(volume, event = name, member, "{event}"),
            Severity::Error => tracing::error!(volume, event = name, member, "{event}"),
        }
        // An error means that nobody listens at the moment.
        drop(self.listeners.send(event));
    }

    /// All events from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.listeners.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(slot: usize) -> Place {
        Place { slot, path: format!("/disk{slot}"), sector: 2048, file_offset: 1 << 20 }
    }

    fn mismatch(copies: usize, wrong: Option<usize>) -> Mismatch {
        Mismatch { at: 4096, len: 512, copies: (0..copies).map(place).collect(), wrong, repaired: false }
    }

    fn each() -> Vec<Event> {
        let path = || "/disk1".to_owned();
        let cause = || "it smokes".to_owned();
        vec![
            Event::MemberFailed { slot: Some(1), path: path(), cause: cause() },
            Event::MemberRemoved { slot: None, path: path() },
            Event::MemberAdded { slot: None, path: path() },
            Event::SpareTookOver { slot: 1, path: path() },
            Event::SpareActive { slot: 1, path: path() },
            Event::RebuildStarted { slot: 1, path: path(), from: 0 },
            Event::RebuildFinished { slot: 1, path: path() },
            Event::RebuildStopped { slot: 1, path: path(), cause: cause() },
            Event::ResyncStarted { total: 5 },
            Event::ResyncFinished,
            Event::ResyncStopped { cause: cause() },
            Event::ScrubStarted { repair: true },
            Event::ScrubFinished { repair: true, mismatches: 1 },
            Event::ScrubStopped { cause: cause() },
            Event::Mismatch(mismatch(3, Some(2))),
            Event::BadBlocks { slot: 1, path: path(), at: 512, len: 512 },
            Event::Degraded { slots: vec![1, 2] },
            Event::Failed { cause: cause() },
            Event::Grown { size: 5 },
        ]
    }

    #[test]
    fn the_json_of_each_has_its_name_and_reads_back() {
        for event in each() {
            let json = serde_json::to_value(&event).unwrap();
            assert_eq!(json["event"], event.name());
            assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
        }
        let failed = serde_json::to_value(&each()[0]).unwrap();
        assert_eq!((&failed["slot"], &failed["path"]), (&1.into(), &"/disk1".into()));
    }

    #[test]
    fn each_is_said_in_one_line() {
        for event in each() {
            let said = event.to_string();
            assert!(!said.is_empty() && !said.contains('\n') && !said.ends_with('.'), "{said}");
        }
        assert_eq!(
            Event::Mismatch(mismatch(2, None)).to_string(),
            "copies of 512 bytes at 4096 differ: /disk0 at sector 2048 (byte 1048576), \
             /disk1 at sector 2048 (byte 1048576); left as they are"
        );
    }

    #[test]
    fn the_odd_copy_is_the_member_of_a_mismatch() {
        assert_eq!(Event::Mismatch(mismatch(3, Some(2))).member(), Some("/disk2"));
        assert_eq!(Event::Mismatch(mismatch(2, None)).member(), None);
        assert_eq!(Event::Mismatch(mismatch(2, Some(7))).member(), None);
    }

    #[test]
    fn what_costs_redundancy_is_a_warning_at_least() {
        let clean = Event::ScrubFinished { repair: false, mismatches: 0 };
        assert_eq!(clean.severity(), Severity::Info);
        assert!(Event::ScrubFinished { repair: false, mismatches: 1 }.severity() > Severity::Info);
        assert!(each()[0].severity() > Severity::Info);
        assert_eq!(Event::Failed { cause: String::new() }.severity(), Severity::Error);
    }

    #[test]
    fn listeners_hear_what_is_told_after_they_came() {
        let log = EventLog::new("vol");
        log.emit(Event::ResyncFinished);
        let mut listener = log.subscribe();
        log.emit(Event::Grown { size: 5 });
        assert_eq!(listener.try_recv().unwrap(), Event::Grown { size: 5 });
        assert!(listener.try_recv().is_err());
    }

    #[test]
    fn a_listener_that_sleeps_is_told_how_much_it_missed() {
        let log = EventLog::new("vol");
        let mut listener = log.subscribe();
        for _ in 0..BACKLOG + 3 {
            log.emit(Event::ResyncFinished);
        }
        assert!(matches!(listener.try_recv(), Err(broadcast::error::TryRecvError::Lagged(3))));
        assert_eq!(listener.try_recv().unwrap(), Event::ResyncFinished);
    }
}
