//! `raid10 status`: how a volume is, live from the process that serves it, or offline from one of its members.

use super::examine::examine_path;
use super::progress::{Progress, amounts};
use super::volume::{Found, find};
use super::{say, say_json, size, table};
use crate::attach::disk;
use crate::control::served_elsewhere;
use crate::error::Result;
use crate::examine::Examined;
use crate::status::{
    BitmapStatus, MemberState, MemberStatus, Status as Document, SyncAction, SyncStatus, VolumeState,
};
use serde::Serialize;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How many files of a directory are looked at for other members.
const MOST_SIBLINGS: usize = 256;

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
        let terminal = std::io::stdout().is_terminal();
        let mut progress = Progress::new();
        loop {
            let (status, live, client) = match find(&self.volume).await? {
                Found::Served(client, status) => (*status, true, Some(client)),
                Found::Offline(member) => (offline(&with_siblings(*member).await), false, None),
            };
            let attached = match disk::look(status.uuid)? {
                None => None,
                Some(attachment) => {
                    let known = match client {
                        Some(client) => client.attached().await?.flatten().is_some(),
                        None => served_elsewhere(status.uuid).is_some(),
                    };
                    Some(Attached {
                        device: attachment.device().map(Path::to_owned),
                        mounted: attachment.mounts().to_vec(),
                        connected: known,
                        waits: attachment.waiting().is_some(),
                        lost: attachment.lost(&status.name).is_some(),
                        place: attachment.place(),
                    })
                }
            };
            if self.json {
                say_json(&Told { status: &status, attached: attached.as_ref() });
            } else if self.watch && terminal {
                // Home, the text, and nothing left over from before; the bar goes below it.
                progress
                    .around(|| say(&format!("\x1b[H\x1b[2J{}\n", show(&status, live, attached.as_ref()))));
                progress.show(&status.sync);
            } else {
                say(&show(&status, live, attached.as_ref()));
            }
            if !self.watch {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Where a volume is a disk of this machine.
#[derive(Debug, Serialize)]
struct Attached {
    device: Option<PathBuf>,
    mounted: Vec<PathBuf>,
    /// Whether a server answers for it.
    connected: bool,
    /// Whether it waits for one that does not.
    #[serde(skip)]
    waits: bool,
    /// Whether it has waited in vain.
    #[serde(skip)]
    lost: bool,
    #[serde(skip)]
    place: String,
}

/// The document, and what only the machine it is read on knows.
#[derive(Debug, Serialize)]
struct Told<'a> {
    #[serde(flatten)]
    status: &'a Document,
    #[serde(skip_serializing_if = "Option::is_none")]
    attached: Option<&'a Attached>,
}

/// The members of the array that lie in the same directory, the given one among them.
///
/// A superblock does not say where the others are. Images of one array mostly lie side by side; what is found there
/// can be shown, the rest is unknown. Only regular files are opened, and only so many.
async fn with_siblings(member: Examined) -> Vec<Examined> {
    let path = Path::new(&member.path).to_owned();
    let mut found = vec![member];
    let is_file = |path: &Path| path.metadata().is_ok_and(|meta| meta.is_file());
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !is_file(&path) {
        return found;
    }
    // Whatever cannot be listed or read is not shown; it is only a convenience.
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten().take(MOST_SIBLINGS);
    for entry in entries {
        let sibling = path.with_file_name(entry.file_name());
        if sibling == path || !is_file(&sibling) {
            continue;
        }
        if let Ok(other) = examine_path(&sibling).await
            && other.uuid == found[0].uuid
            && found.iter().all(|known| known.device_uuid != other.device_uuid)
        {
            found.push(other);
        }
    }
    found
}

/// The document, from what members have on record: the one with the most events knows best.
fn offline(found: &[Examined]) -> Document {
    let best = found.iter().max_by_key(|member| member.events).unwrap_or(&found[0]);
    // A crash between two superblock writes leaves a member one event behind.
    let current = |member: &Examined| member.events + 1 >= best.events;
    let members = best.slots.chars().enumerate().map(|(slot, letter)| {
        let held = found.iter().filter(|member| member.slot == Some(slot)).max_by_key(|member| member.events);
        let state = match (letter, &held) {
            // What lies elsewhere is as it is on record.
            ('A', None) => MemberState::InSync,
            ('A', Some(member)) if current(member) => MemberState::InSync,
            // Older than what is on record, or out on record and still here.
            (_, Some(_)) => MemberState::Faulty,
            (_, None) => MemberState::Missing,
        };
        let path = held.map(|member| member.path.clone()).unwrap_or_default();
        MemberStatus { slot: Some(slot), path, state, read_errors: 0, corrected: 0 }
    });
    let mut members: Vec<MemberStatus> = members.collect();
    for member in found.iter().filter(|member| member.slot.is_none()) {
        let state = if member.role == "spare" { MemberState::Spare } else { MemberState::Faulty };
        members.push(MemberStatus {
            slot: None,
            path: member.path.clone(),
            state,
            read_errors: 0,
            corrected: 0,
        });
    }
    let state = if best.slots.contains('.') {
        VolumeState::Degraded
    } else if best.clean {
        VolumeState::Clean
    } else {
        VolumeState::Active
    };
    let bitmap = best.bitmap.as_ref();
    Document {
        name: best.name.clone(),
        uuid: best.uuid,
        layout: best.layout.clone(),
        chunk: best.chunk,
        size: best.size,
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

fn show(status: &Document, live: bool, attached: Option<&Attached>) -> String {
    let served = if live { "" } else { " (not served: as its members have it on record)" };
    let bitmap = match status.bitmap.chunk {
        0 => "none".to_owned(),
        chunk => format!("{} regions of {} dirty", status.bitmap.dirty, size::show(chunk)),
    };
    let mut facts = vec![
        ("Volume", format!("{} ({})", status.name, status.uuid)),
        ("State", format!("{}{served}", state(status))),
        ("Size", format!("{} ({} bytes)", size::show(status.size), status.size)),
        ("Layout", format!("{}, chunk {}", status.layout, size::show(status.chunk))),
        ("Bitmap", bitmap),
    ];
    if live {
        facts.push(("Sync", sync(&status.sync)));
        facts.push(("Mismatches", status.mismatches.to_string()));
    }
    if let Some(Attached { place, connected, waits, lost, .. }) = attached {
        let name = &status.name;
        let place = match (connected, waits) {
            (true, _) => place.clone(),
            (false, true) if *lost => {
                format!("{place}, without a server for too long: `raid10 detach {name} --force` lets it go")
            }
            (false, true) if live => {
                format!("{place}, waiting: `raid10 attach {name}` connects it with its new server")
            }
            (false, true) => {
                format!(
                    "{place}, waiting for a server: serve the volume, then `raid10 attach {name}` connects it"
                )
            }
            (false, false) => format!("{place}, without a server: `raid10 detach {name}` cleans up"),
        };
        facts.push(("Attached", place));
    }
    let mut members = table::list(["Slot", "State", "Read errors", "Corrected", "Path"], &[0, 2, 3]);
    for member in &status.members {
        let path = match (member.path.as_str(), member.state) {
            ("", MemberState::Missing) => "no member",
            ("", _) => "not beside the others: name it to see it",
            (path, _) => path,
        };
        members.add_row([
            member.slot.map_or_else(|| "-".to_owned(), |slot| slot.to_string()),
            member.state.to_string(),
            member.read_errors.to_string(),
            member.corrected.to_string(),
            path.to_owned(),
        ]);
    }
    format!("{}\n\n{}", table::text(&table::facts(facts)), table::text(&members))
}

/// The state, and where it is not good what to do.
fn state(status: &Document) -> String {
    match status.state {
        VolumeState::Degraded => {
            let slots: Vec<String> = (status.members.iter())
                .filter(|member| !matches!(member.state, MemberState::InSync | MemberState::Spare))
                .filter_map(|member| member.slot.map(|slot| slot.to_string()))
                .collect();
            let rebuilding = status.members.iter().any(|member| member.state == MemberState::Rebuilding);
            let slots = slots.join(", ");
            if rebuilding {
                format!("degraded: slot {slots} not in sync, and being rebuilt")
            } else {
                format!(
                    "degraded: slot {slots} not in sync; `raid10 add {} PATH` gives it a new member",
                    status.name
                )
            }
        }
        VolumeState::Failed => {
            "failed: acknowledged data may be lost; read-only until it is started again".to_owned()
        }
        good => good.to_string(),
    }
}

fn sync(sync: &SyncStatus) -> String {
    if sync.action == SyncAction::Idle {
        return "idle".to_owned();
    }
    let percent = (u128::from(sync.done) * 100).checked_div(u128::from(sync.total)).unwrap_or(100);
    format!("{} {percent}% ({})", sync.action, amounts(sync))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examined(path: &str, slot: Option<usize>, slots: &str, events: u64) -> Examined {
        Examined {
            path: path.to_owned(),
            uuid: uuid::Uuid::nil(),
            name: "vol".to_owned(),
            device_uuid: uuid::Uuid::from_u128(u128::from(events) << 64 | path.len() as u128),
            layout: "near=2".to_owned(),
            chunk: 65536,
            size: 1 << 20,
            members: slots.len(),
            number: 0,
            role: slot.map_or("spare".to_owned(), |slot| format!("slot {slot}")),
            slot,
            slots: slots.to_owned(),
            clean: true,
            events,
            created: 0,
            updated: 0,
            data_offset: 0,
            used: 0,
            bitmap: None,
            bad_blocks: 0,
        }
    }

    #[test]
    fn the_member_with_the_most_events_tells_how_the_others_are() {
        let found = [
            examined("old", Some(0), "AAA", 3),
            examined("new", Some(1), ".AA", 9),
            examined("extra", None, ".AA", 9),
        ];
        let status = offline(&found);
        let told: Vec<_> = status.members.iter().map(|m| (m.slot, m.path.as_str(), m.state)).collect();
        assert_eq!(
            told,
            [
                (Some(0), "old", MemberState::Faulty),
                (Some(1), "new", MemberState::InSync),
                (Some(2), "", MemberState::InSync),
                (None, "extra", MemberState::Spare),
            ]
        );
        assert_eq!(status.state, VolumeState::Degraded);
        let text = show(&status, false, None);
        assert!(text.contains("slot 0 not in sync; `raid10 add vol PATH`"), "{text}");
        assert!(text.contains("not served") && !text.contains("Sync"), "{text}");
    }
}
