//! `raid10 attach` and `detach`: a served volume as a disk of this machine, and mounted from it.

use super::say;
use super::volume::{Found, Live, find, live};
use crate::attach::disk::{self, Attachment};
use crate::attach::{AttachError, Shown};
use crate::control::Client;
use crate::error::{Error, Result};
use std::path::PathBuf;
use uuid::Uuid;

/// Make a served volume a disk of this machine, and mount it if asked to; prints the device.
///
/// The process that serves the volume shows it as a file (FUSE), and a loop device over that is the disk. Serve with
/// `--direct` what is to carry a file system: that has a page cache of its own. Needs root. `raid10 detach` undoes all
/// of it, and so does the next `attach` after a crash.
#[derive(Debug, clap::Args)]
pub(super) struct Attach {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
    /// The kernel's network block device to attach to. Not in this version: attach with `nbd-client` instead.
    #[arg(long, value_name = "/dev/nbdN", conflicts_with = "mount")]
    device: Option<PathBuf>,
    /// Mount the file system on it on this directory. A volume that is attached already is mounted from its device.
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
}

impl Attach {
    pub(super) async fn run(self) -> Result<()> {
        disk::need_root()?;
        if let Some(device) = self.device {
            return Err(AttachError::NoNbd { device: device.display().to_string() }.into());
        }
        let volume = live(&self.volume).await?;
        let _alone = disk::alone()?;
        let (name, uuid) = (&volume.status.name, volume.status.uuid);
        let mut attachment = disk::find(uuid)?;
        let shown = volume.served(volume.client.attached().await?)?;
        if shown.is_none()
            && let Some(left) = attachment.take()
        {
            note(&left.clean_up()?);
        }
        let dir = self.mount.as_deref().map(disk::mount_point).transpose()?;
        let standing = attachment.filter(|attachment| attachment.device().is_some());
        let device = match (&standing, &dir, shown) {
            (Some(attached), Some(dir), Some(shown)) if attached.mounts().is_empty() => {
                let device = attached.device().unwrap_or(&shown.path).to_owned();
                disk::mount_on(&device, dir, name, uuid, shown.read_only)?;
                device
            }
            (Some(attached), ..) => {
                return Err(AttachError::Already { name: name.clone(), place: attached.place() }.into());
            }
            (None, ..) => {
                let shown = volume.served(volume.client.attach().await?)?;
                match set_up(&volume, &shown, dir.as_deref()) {
                    Ok(device) => {
                        note(&shown.warnings);
                        device
                    }
                    Err(error) => {
                        undo(&volume).await;
                        return Err(error);
                    }
                }
            }
        };
        say(&device.display().to_string());
        Ok(())
    }
}

/// Makes a disk of the file. After an error some steps may have been taken.
fn set_up(volume: &Live, shown: &Shown, dir: Option<&std::path::Path>) -> Result<PathBuf> {
    let device = disk::set_up(shown)?;
    if let Some(dir) = dir {
        disk::mount_on(&device, dir, &volume.status.name, volume.status.uuid, shown.read_only)?;
    }
    Ok(device)
}

/// Takes back what was done before something failed; that failure is what the user is told.
async fn undo(volume: &Live) {
    let undone = async {
        if let Some(attachment) = disk::find(volume.status.uuid)? {
            attachment.let_go()?;
        }
        volume.client.detach().await
    };
    if let Err(error) = undone.await {
        note(&[format!("what was begun is left: {error}")]);
    }
}

/// Undo `raid10 attach`: unmount, free the device, flush.
///
/// Refused, and nothing has changed, while something uses it. After a crash of the server it undoes what is left.
#[derive(Debug, clap::Args)]
pub(super) struct Detach {
    /// An array's name, its UUID, or the path of any member.
    volume: String,
}

impl Detach {
    pub(super) async fn run(self) -> Result<()> {
        disk::need_root()?;
        let (uuid, name) = self.meant().await?;
        let not_attached = || AttachError::NotAttached { name: name.clone() };
        let client = Client::of(uuid);
        let _alone = disk::alone()?;
        let attachment = disk::find(uuid)?;
        // Only now, so that it is of the same moment.
        match (client.attached().await?, attachment) {
            (Some(Some(_)), attachment) => {
                attachment.as_ref().map_or(Ok(()), Attachment::let_go)?;
                client.detach().await?.ok_or(Error::Gone { name })
            }
            // A server that died, perhaps with another one in its place, which knows nothing of it.
            (_, Some(left)) => {
                note(&left.clean_up()?);
                Ok(())
            }
            (_, None) => Err(not_attached().into()),
        }
    }

    /// The volume that is meant, served or not; its name, or what it was called.
    async fn meant(&self) -> Result<(Uuid, String)> {
        let unknown = match find(&self.volume).await {
            Ok(Found::Served(_, status)) => return Ok((status.uuid, status.name)),
            Ok(Found::Offline(member)) => return Ok((member.uuid, member.name)),
            Err(unknown) => unknown,
        };
        match disk::named(&self.volume)?.as_slice() {
            [uuid] => Ok((*uuid, self.volume.clone())),
            [] => Err(unknown),
            several => {
                let uuids = several.iter().map(Uuid::to_string).collect();
                Err(Error::Ambiguous { name: self.volume.clone(), uuids })
            }
        }
    }
}

/// Tells what the user should know of a command that goes on.
fn note(lines: &[String]) {
    for line in lines {
        eprintln!("raid10: {line}");
    }
}
