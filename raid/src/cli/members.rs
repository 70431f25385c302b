//! `raid10 fail`, `remove`, `add`, `replace`, `grow`, `limit`: commands that change a volume while it is served.

use super::volume::{Live, live};
use super::{absolute, say, size};
use crate::attach::disk;
use crate::error::{Error, Result};
use crate::orders::{Added, MemberName};
use std::path::PathBuf;

/// Declare a member failed: it is neither read nor written any more, and a spare takes over.
///
/// The last good copy of any data is never given up.
#[derive(Debug, clap::Args)]
pub(super) struct Fail {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
    /// The member: its path or its slot number.
    member: String,
}

impl Fail {
    pub(super) async fn run(self) -> Result<()> {
        let volume = live(&self.volume).await?;
        let done = volume.client.fail(member(&self.member)?).await?;
        volume.served(done)
    }
}

/// Let a failed member or a spare go: it is closed, and not part of the array any more.
#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
    /// The member: its path or its slot number.
    member: String,
}

impl Remove {
    pub(super) async fn run(self) -> Result<()> {
        let volume = live(&self.volume).await?;
        let done = volume.client.remove(member(&self.member)?).await?;
        volume.served(done)
    }
}

/// Add a device: it takes a slot that has no member and is rebuilt, or waits as a spare.
///
/// A member that was away is caught up with what it missed, if that is known. The process that serves the volume
/// opens the device.
#[derive(Debug, clap::Args)]
pub(super) struct Add {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
    /// A file or block device, at least as large as the members.
    path: PathBuf,
    /// Destroy what is on it.
    #[arg(long)]
    force: bool,
}

impl Add {
    pub(super) async fn run(self) -> Result<()> {
        let volume = live(&self.volume).await?;
        let path = absolute(&self.path)?;
        let added = volume.client.add(path, self.force).await?;
        let path = self.path.display();
        say(&match volume.served(added)? {
            Added::Rebuilding(slot) => format!("{path} is being rebuilt in slot {slot}"),
            Added::Readded(slot) => format!("{path} is back in slot {slot}; what it missed is being copied"),
            Added::Spare => format!("{path} is a spare"),
        });
        Ok(())
    }
}

/// Put a device in the place of a member that still works: it is copied first, and goes when that is done.
#[derive(Debug, clap::Args)]
pub(super) struct Replace {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
    /// The member to be replaced: its path or its slot number.
    member: String,
    /// The file or block device that takes its place.
    path: PathBuf,
}

impl Replace {
    pub(super) async fn run(self) -> Result<()> {
        let volume = live(&self.volume).await?;
        let done = volume.client.replace(member(&self.member)?, absolute(&self.path)?).await?;
        volume.served(done)
    }
}

/// Make the array as large as its members have become.
///
/// Where it is attached, its device grows with it; a file system on it is the next to be grown (`resize2fs`, `xfs_growfs`).
#[derive(Debug, clap::Args)]
pub(super) struct Grow {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
}

impl Grow {
    pub(super) async fn run(self) -> Result<()> {
        let volume = live(&self.volume).await?;
        let grown = volume.client.grow().await?;
        let bytes = volume.served(grown)?;
        // A disk that waits for this server is made larger when that takes it over.
        if volume.served(volume.client.attached().await?)?.is_some()
            && let Some(attachment) = disk::find(volume.status.uuid)?
        {
            attachment.resize(bytes)?;
        }
        say(&format!("{} ({bytes} bytes)", size::show(bytes)));
        Ok(())
    }
}

/// Set how fast members are made equal; without limits to set, show them.
#[derive(Debug, clap::Args)]
pub(super) struct Limit {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
    /// Bytes a second that are kept up even under load.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    min: Option<u64>,
    /// Bytes a second that are never exceeded; `none` for no limit.
    #[arg(long, value_name = "SIZE", value_parser = size::parse_limit)]
    max: Option<u64>,
}

impl Limit {
    pub(super) async fn run(self) -> Result<()> {
        let volume = live(&self.volume).await?;
        let limits = volume.client.limit(self.min, self.max).await?;
        let limits = volume.served(limits)?;
        let max = match limits.max {
            u64::MAX => "no limit".to_owned(),
            max => format!("{}/s", size::show(max)),
        };
        say(&format!("min {}/s, max {max}", size::show(limits.min)));
        Ok(())
    }
}

/// A member as it was typed; a path is made absolute, since the server lives in another directory.
fn member(text: &str) -> Result<MemberName> {
    match text.parse() {
        Ok(MemberName::Path(path)) => Ok(MemberName::Path(absolute(path.as_ref())?.display().to_string())),
        Ok(slot) => Ok(slot),
        Err(never) => match never {},
    }
}

impl Live {
    /// What was answered; an error where the server has gone since.
    pub(super) fn served<T>(&self, answer: Option<T>) -> Result<T> {
        answer.ok_or_else(|| self.gone())
    }

    /// The server has gone.
    pub(super) fn gone(&self) -> Error {
        Error::Gone { name: self.status.name.clone() }
    }
}
