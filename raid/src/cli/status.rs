//! `raid10 status`: how a volume is, live from the process that serves it, or offline from one of its members.

use super::volume::{Found, find};
use super::{say, say_json, size, table};
use crate::error::Result;
use crate::examine::Examined;
use crate::status::{
    BitmapStatus, MemberState, MemberStatus, Status as Document, SyncAction, SyncStatus, VolumeState,
};
use serde::Serialize;
use std::io::IsTerminal;
use std::time::Duration;

/// Show how a volume is: served, or offline as one of its members last knew it.
#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// An array's name, its UUID, or the path of any member.
    volume: String,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    /// Show it again every second, until interrupted.
    #[arg(long, conflicts_with = "json")]
    watch: bool,
}

impl Status {
    pub(super) async fn run(self) -> Result<()> {
        loop {
            let status = match find(&self.volume).await? {
                Found::Served(_, status) => *status,
                Found::Offline(member) => offline(&member),
            };
            if self.json {
                say_json(&status);
            } else if self.watch && std::io::stdout().is_terminal() {
                // Home, the text, and nothing left over from before.
                say(&format!("\x1b[H\x1b[2J{}", show(&status)));
            } else {
                say(&show(&status));
            }
            if !self.watch {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// The document, from what one member has on record.
fn offline(member: &Examined) -> Document {
    let members = member.slots.chars().enumerate().map(|(slot, letter)| {
        let own = member.slot == Some(slot);
        let state = if letter == 'A' { MemberState::InSync } else { MemberState::Missing };
        let path = if own { member.path.clone() } else { String::new() };
        MemberStatus { slot: Some(slot), path, state, read_errors: 0, corrected: 0 }
    });
    let mut members: Vec<MemberStatus> = members.collect();
    if member.slot.is_none() {
        let state = if member.role == "spare" { MemberState::Spare } else { MemberState::Faulty };
        let path = member.path.clone();
        members.push(MemberStatus { slot: None, path, state, read_errors: 0, corrected: 0 });
    }
    let state = if member.slots.contains('.') {
        VolumeState::Degraded
    } else if member.clean {
        VolumeState::Clean
    } else {
        VolumeState::Active
    };
    let bitmap = member.bitmap.as_ref();
    Document {
        name: member.name.clone(),
        uuid: member.uuid,
        layout: member.layout.clone(),
        chunk: member.chunk,
        size: member.size,
        state,
        members,
        sync: SyncStatus { action: SyncAction::Idle, done: 0, total: 0, speed: 0, eta_s: 0 },
        mismatches: 0,
        bitmap: BitmapStatus {
            chunk: bitmap.map_or(0, |bitmap| bitmap.chunk),
            dirty: bitmap.map_or(0, |bitmap| bitmap.dirty),
        },
    }
}

fn show(status: &Document) -> String {
    let facts = table::facts([
        ("Volume", format!("{} ({})", status.name, status.uuid)),
        ("State", word(&status.state)),
        ("Size", format!("{} ({} bytes)", size::show(status.size), status.size)),
        ("Layout", format!("{}, chunk {}", status.layout, size::show(status.chunk))),
        ("Sync", sync(&status.sync)),
        ("Bitmap", format!("{} regions of {} dirty", status.bitmap.dirty, size::show(status.bitmap.chunk))),
        ("Mismatches", status.mismatches.to_string()),
    ]);
    let mut members = table::list(["Slot", "State", "Read errors", "Corrected", "Path"], &[2, 3]);
    for member in &status.members {
        members.add_row([
            member.slot.map_or_else(|| "-".to_owned(), |slot| slot.to_string()),
            word(&member.state),
            member.read_errors.to_string(),
            member.corrected.to_string(),
            if member.path.is_empty() { "-".to_owned() } else { member.path.clone() },
        ]);
    }
    format!("{}\n\n{}", table::text(&facts), table::text(&members))
}

fn sync(sync: &SyncStatus) -> String {
    if sync.action == SyncAction::Idle {
        return "idle".to_owned();
    }
    let percent = (u128::from(sync.done) * 100).checked_div(u128::from(sync.total)).unwrap_or(100);
    let (done, total) = (size::show(sync.done), size::show(sync.total));
    let (action, speed, eta) = (word(&sync.action), size::show(sync.speed), sync.eta_s);
    format!("{action} {percent}% ({done} of {total}, {speed}/s, {eta} s left)")
}

/// The word that the JSON document has for it.
fn word<T: Serialize>(value: &T) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|value| value.as_str().map(|word| word.replace('_', " ")))
        .unwrap_or_default()
}
