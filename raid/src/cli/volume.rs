//! What VOLUME means on the command line: an array's name, its UUID, or the path of any member, served or not.

use super::examine::examine_path;
use crate::control::{Client, client, runtime_dir};
use crate::error::{Error, Result};
use crate::examine::Examined;
use crate::status::Status;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// A volume that was found.
pub(super) enum Found {
    /// Some process serves it.
    Served(Client, Box<Status>),
    /// Nobody does; this is what the member that was named says.
    Offline(Box<Examined>),
}

/// A volume that is served.
pub(super) struct Live {
    /// Who serves it.
    pub(super) client: Client,
    /// How it was when it was found.
    pub(super) status: Box<Status>,
}

/// Finds a volume for a command that only the process that serves it can carry out.
pub(super) async fn live(volume: &str) -> Result<Live> {
    match find(volume).await? {
        Found::Served(client, status) => Ok(Live { client, status }),
        Found::Offline(_) => Err(not_served(
            volume,
            "start it with `raid10 serve` first: members are changed while the array is served, never offline",
        )),
    }
}

/// Finds a volume. A path that exists is a member; anything else is looked for among the served volumes.
pub(super) async fn find(volume: &str) -> Result<Found> {
    let path = Path::new(volume);
    // Directories and the like are never members, but a volume may have the same name.
    let may_be_member = path.metadata().is_ok_and(|found| {
        use std::os::unix::fs::FileTypeExt;
        found.is_file() || found.file_type().is_block_device()
    });
    let member = if may_be_member { Some(examine_path(path).await) } else { None };
    match member {
        Some(Ok(member)) => {
            let client = Client::of(member.uuid);
            Ok(match client.status().await? {
                Some(status) => Found::Served(client, Box::new(status)),
                None => Found::Offline(Box::new(member)),
            })
        }
        // One that has been overwritten under its array can still be named.
        Some(Err(unreadable)) => match find_served(volume).await {
            Err(Error::NotServed { .. }) => Err(unreadable),
            found => found,
        },
        None => find_served(volume).await,
    }
}

/// Finds a volume among those that are served. By its id it is asked alone.
async fn find_served(volume: &str) -> Result<Found> {
    if let Some(uuid) = parse_uuid(volume) {
        let client = Client::of(uuid);
        if let Some(status) = client.status().await? {
            return Ok(Found::Served(client, Box::new(status)));
        }
    }
    let path = Path::new(volume);
    let serving = client::served().await?;
    let mut matching: Vec<(Client, Status)> = serving
        .volumes
        .into_iter()
        .filter(|(_, status)| status.name == volume || has_member(status, path))
        .collect();
    if matching.len() > 1 {
        let uuids = matching.iter().map(|(_, status)| status.uuid.to_string()).collect();
        return Err(Error::Ambiguous { name: volume.to_owned(), uuids });
    }
    let mut unknown = serving.unknown.into_iter();
    match matching.pop() {
        Some((client, status)) => {
            // Another of the name may be among them.
            unknown.for_each(|error| tracing::warn!("{error}"));
            Ok(Found::Served(client, Box::new(status)))
        }
        None => Err(unknown.next().unwrap_or_else(|| {
            not_served(volume, "a volume that is not served is found by the path of a member only")
        })),
    }
}

pub(super) fn not_served(volume: &str, hint: &'static str) -> Error {
    Error::NotServed { volume: volume.to_owned(), dir: runtime_dir().display().to_string(), hint }
}

/// A UUID as everybody writes it, md with colons too.
fn parse_uuid(text: &str) -> Option<Uuid> {
    Uuid::parse_str(&text.replace(':', "")).ok()
}

/// Whether the path names a member that has gone since.
fn has_member(status: &Status, path: &Path) -> bool {
    let absolute = |path: &Path| -> Option<PathBuf> { std::path::absolute(path).ok() };
    let wanted = absolute(path);
    wanted.is_some() && status.members.iter().any(|member| absolute(Path::new(&member.path)) == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_in_every_spelling() {
        let uuid = Uuid::from_u128(0x1234_5678_9abc_def0_1234_5678_9abc_def0);
        for text in [
            "12345678-9abc-def0-1234-56789abcdef0",
            "123456789ABCDEF0123456789ABCDEF0",
            "12345678:9abcdef0:12345678:9abcdef0",
        ] {
            assert_eq!(parse_uuid(text), Some(uuid));
        }
        assert_eq!(parse_uuid("vol"), None);
    }
}
