//! Which member a person means, and opening devices that are to become members: where paths meet the file system.
//!
//! A path leads to a member if it leads to the file that the member holds open; where it leads nowhere any more, the two
//! are compared as text, made absolute. The engine itself knows the names of devices only. Nothing is asked of a member's
//! own path: what hangs there must not hold up a command about another.

use crate::device::{Caching, Device, FileDevice, Identity, OpenMode};
use crate::error::{Error, Result};
use crate::orders::MemberName;
use crate::status::{MemberState, MemberStatus, Status};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Opens a device for a volume as its other members were opened. May block.
pub type Opener = Arc<dyn Fn(&Path) -> Result<Arc<dyn Device>> + Send + Sync>;

/// The [`Opener`] of a volume that is served for reading and writing.
#[must_use]
pub fn read_write(caching: Caching) -> Opener {
    Arc::new(move |path| Ok(Arc::new(FileDevice::open_with(path, OpenMode::ReadWrite, caching)?)))
}

/// What members hold open, under the engine's names for them.
pub(super) type Held = [(String, Identity)];

/// The member that is meant, under the name the engine has for it. May block, where the path given leads.
pub(super) fn resolve(status: &Status, held: &Held, named: &MemberName) -> Result<MemberName> {
    let unknown = || Error::UnknownMember { volume: status.name.clone(), member: named.to_string() };
    match named {
        MemberName::Slot(slot) => {
            let held = |member: &MemberStatus| member.slot == Some(*slot);
            status.members.iter().any(held).then(|| named.clone()).ok_or_else(unknown)
        }
        MemberName::Path(path) => {
            let path = Named::new(Path::new(path));
            // One that is in use is meant rather than a failed one that was opened under the same path before.
            let named = |member: &&MemberStatus| path.is_that_of(&member.path, held);
            let member = status.members.iter().filter(named).min_by_key(|m| m.state == MemberState::Faulty);
            member.map(|member| MemberName::Path(member.path.clone())).ok_or_else(unknown)
        }
    }
}

/// Refuses a device that the volume holds already. May block, where the path leads.
pub(super) fn refuse_member(status: &Status, held: &Held, path: &Path) -> Result<()> {
    // A failed member's file may have been deleted and another made in its place: that one is new.
    let named = Named::new(path);
    let mut those = status.members.iter().filter(|member| named.is_that_of(&member.path, held));
    match those.find(|member| member.state != MemberState::Faulty || named.identity.is_some()) {
        Some(member) if member.state != MemberState::Missing => Err(Error::AlreadyMember {
            device: path.display().to_string(),
            volume: status.name.clone(),
            what: what(member),
            failed: member.state == MemberState::Faulty,
        }),
        _ => Ok(()),
    }
}

fn what(member: &MemberStatus) -> String {
    let state = match member.state {
        MemberState::InSync => "in sync",
        MemberState::Rebuilding => "being rebuilt",
        MemberState::Faulty => "failed",
        MemberState::Missing => "missing",
        MemberState::Spare => "a spare",
    };
    member.slot.map_or_else(|| state.to_owned(), |slot| format!("{state} in slot {slot}"))
}

/// A path that somebody gave, and where it leads now.
struct Named<'a> {
    path: &'a Path,
    identity: Option<Identity>,
}

impl<'a> Named<'a> {
    fn new(path: &'a Path) -> Self {
        let identity = rustix::fs::stat(path).ok().map(|stat| Identity::of(&stat));
        Self { path, identity }
    }

    fn is_that_of(&self, member: &str, held: &Held) -> bool {
        let theirs = held.iter().filter(|(name, _)| name == member).map(|(_, identity)| *identity);
        match self.identity {
            Some(own) if theirs.clone().next().is_some() => theirs.into_iter().any(|other| other == own),
            _ => {
                !member.is_empty()
                    && absolute(self.path).is_some_and(|own| absolute(Path::new(member)) == Some(own))
            }
        }
    }
}

fn absolute(path: &Path) -> Option<PathBuf> {
    std::path::absolute(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{BitmapStatus, SyncAction, SyncStatus, VolumeState};

    fn status(members: &[(Option<usize>, &str, MemberState)]) -> Status {
        let member = |(slot, path, state): &(Option<usize>, &str, MemberState)| MemberStatus {
            slot: *slot,
            path: (*path).to_owned(),
            state: *state,
            read_errors: 0,
            corrected: 0,
        };
        Status {
            name: "vol".to_owned(),
            uuid: uuid::Uuid::nil(),
            layout: "near=2".to_owned(),
            chunk: 4096,
            size: 4096,
            state: VolumeState::Clean,
            members: members.iter().map(member).collect(),
            sync: SyncStatus { action: SyncAction::Idle, done: 0, total: 0, speed: 0, eta_s: 0 },
            mismatches: 0,
            bitmap: BitmapStatus { chunk: 0, dirty: 0 },
        }
    }

    #[test]
    fn a_member_is_known_by_slot_and_by_every_path_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("disk"), dir.path().join("link"));
        std::fs::write(&file, b"").unwrap();
        std::os::unix::fs::symlink("disk", &link).unwrap();
        let opened = file.display().to_string();
        let open = FileDevice::open(&file, OpenMode::ReadOnly).unwrap();
        let held = [(opened.clone(), open.identity().unwrap())];
        let status =
            status(&[(Some(0), &opened, MemberState::InSync), (Some(1), "/gone", MemberState::Faulty)]);
        let path = |path: &Path| MemberName::Path(path.display().to_string());
        assert_eq!(resolve(&status, &held, &path(&link)).unwrap(), path(&file));
        assert_eq!(resolve(&status, &held, &path(Path::new("/gone"))).unwrap(), path(Path::new("/gone")));
        assert_eq!(resolve(&status, &held, &MemberName::Slot(1)).unwrap(), MemberName::Slot(1));
        for unknown in [MemberName::Slot(2), path(Path::new("/other")), path(Path::new(""))] {
            assert!(matches!(resolve(&status, &held, &unknown), Err(Error::UnknownMember { .. })));
        }
        let refused = refuse_member(&status, &held, &link).unwrap_err().to_string();
        assert!(refused.contains("in sync in slot 0"), "{refused}");
        assert!(refuse_member(&status, &held, Path::new("/other")).is_ok());
        // Its file is gone: whatever is made there next is another.
        assert!(refuse_member(&status, &held, Path::new("/gone")).is_ok());
        // Another file under a member's path is not what the member holds.
        std::fs::rename(&file, dir.path().join("moved")).unwrap();
        std::fs::write(&file, b"").unwrap();
        assert!(refuse_member(&status, &held, &file).is_ok());
        assert_eq!(resolve(&status, &held, &path(&dir.path().join("moved"))).unwrap(), path(&file));
    }

    #[test]
    fn of_two_under_one_path_the_one_in_use_is_meant() {
        let status = status(&[
            (Some(0), "/a", MemberState::InSync),
            (None, "/x", MemberState::Faulty),
            (None, "/x", MemberState::Spare),
        ]);
        assert!(resolve(&status, &[], &MemberName::Path("/x".to_owned())).is_ok());
    }
}
