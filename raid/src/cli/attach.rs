//! `raid10 attach` and `detach`: a served volume as a disk of this machine, and mounted from it.

use super::say;
use super::volume::{Found, Live, find, live};
use crate::attach::disk::{self, Attachment};
use crate::attach::{AttachError, CONNECTIONS, PATIENCE, Shown, Way};
use crate::control::{Client, served_elsewhere};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Make a served volume a disk of this machine, and mount it if asked to; prints the device.
///
/// By the kernel's own NBD driver, where it is loaded (`modprobe nbd`): the disk is /dev/nbdN. It outlives its server: when
/// that dies or ends, whoever uses the disk waits, for ten minutes at most, until the volume is served and attached
/// again, and sees no error. Where there is no such driver, the serving process shows the volume as a file (FUSE), and a
/// loop device over that is the disk; it dies with its server.
///
/// Serve with `--direct` what is to carry a file system: that has a page cache of its own. Needs root. `raid10 detach`
/// undoes all of it, and the next `attach` takes over or cleans up what a crash has left.
#[derive(Debug, clap::Args)]
pub(super) struct Attach {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
    /// By the kernel's NBD driver and nothing else, as that disk.
    #[arg(long, value_name = "/dev/nbdN", value_parser = nbd_number)]
    device: Option<u32>,
    /// Through FUSE and a loop device, even where the kernel has an NBD driver.
    #[arg(long, conflicts_with = "device")]
    fuse: bool,
    /// Mount the file system on it on this directory. A volume that is attached already is mounted from its device.
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
}

/// N of `/dev/nbdN`.
fn nbd_number(path: &str) -> std::result::Result<u32, String> {
    let digits =
        path.strip_prefix("/dev/nbd").filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
    let number = digits.and_then(|digits| digits.parse().ok());
    number.ok_or_else(|| "it must be a disk of the kernel's NBD driver: /dev/nbd0, /dev/nbd1, …".to_owned())
}

impl Attach {
    pub(super) async fn run(self) -> Result<()> {
        disk::need_root()?;
        let volume = live(&self.volume).await?;
        let (name, uuid) = (&volume.status.name, volume.status.uuid);
        let _alone = disk::alone(uuid)?;
        let mut attachment = disk::find(uuid)?;
        let mut shown = volume.served(volume.client.attached().await?)?;
        let mut taken_over = false;
        if shown.is_none()
            && let Some(left) = attachment.take()
        {
            if let Some(again) = left.waiting() {
                let again = volume.served(volume.client.attach(again).await?)?;
                note(&again.warnings);
                note(&[format!("{}, which had lost its server, goes on", left.place())]);
                (shown, attachment, taken_over) = (Some(again), Some(left), true);
            } else {
                note(&left.clean_up()?);
            }
        }
        let standing = attachment.filter(|attachment| attachment.device().is_some());
        let already = |place: String| AttachError::Already { name: name.clone(), place };
        if let (Some(attached), Some(wanted)) = (&standing, self.device)
            && shown.as_ref().and_then(|shown| shown.nbd) != Some(wanted)
        {
            return Err(already(attached.place()).into());
        }
        let mounted_there = |attached: &Attachment| {
            let real = self.mount.as_ref().and_then(|dir| dir.canonicalize().ok());
            real.is_none_or(|dir| attached.mounts().contains(&dir))
        };
        let device = match (&standing, shown) {
            // What was asked for stands again.
            (Some(attached), Some(shown)) if taken_over && mounted_there(attached) => shown.path,
            (Some(attached), Some(shown)) if attached.mounts().is_empty() && self.mount.is_some() => {
                let device = attached.device().unwrap_or(&shown.path).to_owned();
                self.mount(&volume, &device, shown.read_only)?;
                device
            }
            (Some(attached), _) => return Err(already(attached.place()).into()),
            (None, _) => self.anew(&volume).await?,
        };
        say(&device.display().to_string());
        Ok(())
    }

    fn mount(&self, volume: &Live, device: &Path, read_only: bool) -> Result<()> {
        let Some(dir) = &self.mount else { return Ok(()) };
        let dir = disk::mount_point(dir)?;
        disk::mount_on(device, &dir, &volume.status.name, volume.status.uuid, read_only)
    }

    /// Attaches what is not attached.
    async fn anew(&self, volume: &Live) -> Result<PathBuf> {
        // Before anything is begun.
        self.mount.as_deref().map(disk::mount_point).transpose()?;
        let shown = self.show(volume).await?;
        let made = disk::set_up(&shown)
            .and_then(|device| self.mount(volume, &device, shown.read_only).map(|()| device));
        match made {
            Ok(device) => {
                note(&shown.warnings);
                note(&[how(volume, &shown, &device)]);
                Ok(device)
            }
            Err(error) => {
                undo(volume).await;
                Err(error)
            }
        }
    }

    /// Has the server show the volume: by the kernel's NBD driver where it can be, or must.
    async fn show(&self, volume: &Live) -> Result<Shown> {
        if self.device.is_some() || !self.fuse && disk::kernel_has_nbd() {
            match volume.client.attach(Way::Nbd { device: self.device }).await {
                Err(error) if self.device.is_none() => note(&[error.to_string()]),
                shown => return volume.served(shown?),
            }
        }
        volume.served(volume.client.attach(Way::File).await?)
    }
}

/// Which way it went, and what that means.
fn how(volume: &Live, shown: &Shown, device: &Path) -> String {
    let (name, device) = (&volume.status.name, device.display());
    if shown.nbd.is_some() {
        let minutes = PATIENCE.as_secs() / 60;
        format!(
            "{device} is {name}, by the kernel's NBD driver over {CONNECTIONS} connections; without a server it waits {minutes} \
             minutes for `raid10 serve` and `raid10 attach {name}`"
        )
    } else {
        format!("{device} is {name}, through FUSE and a loop device; it dies with its server")
    }
}

/// Takes back what was done before something failed; that failure is what the user is told.
async fn undo(volume: &Live) {
    if let Err(error) = end(&volume.client, volume.status.uuid, &volume.status.name).await {
        note(&[format!("what was begun is left: {error}")]);
    }
}

/// Undoes the attachment of a volume whose server lives and knows of it.
async fn end(client: &Client, volume: Uuid, name: &str) -> Result<()> {
    let gone = || Error::Gone { name: name.to_owned() };
    let Some(attachment) = disk::find(volume)? else { return client.detach().await?.ok_or_else(gone) };
    let held = attachment.let_go()?;
    let detached = client.detach().await.and_then(|detached| detached.ok_or_else(gone));
    // That it cannot be flushed does not keep the disk.
    let ended = attachment.await_end(held);
    detached.and(ended)
}

/// Undo `raid10 attach`: unmount, free the device, flush.
///
/// Refused, and nothing has changed, while something uses it. After a crash of the server it undoes what is left; a disk of
/// the kernel's NBD driver keeps what is not written yet for the next server, and is undone without one by --force only.
/// If not all that was written reaches the volume, it is detached all the same, and that is an error.
#[derive(Debug, clap::Args)]
pub(super) struct Detach {
    /// An array's name, its UUID, or the path of any member.
    volume: String,
    /// Undo it though its server is gone, and lose what is not written yet.
    #[arg(long)]
    force: bool,
}

impl Detach {
    pub(super) async fn run(self) -> Result<()> {
        disk::need_root()?;
        let (uuid, name) = self.meant().await?;
        let client = Client::of(uuid);
        let _alone = disk::alone(uuid)?;
        let attachment = disk::find(uuid)?;
        // Only now, so that it is of the same moment.
        let attached = client.attached().await?;
        if attached.is_none()
            && let Some(dir) = served_elsewhere(uuid)
        {
            return Err(AttachError::Elsewhere { name, dir: dir.display().to_string() }.into());
        }
        let Some(left) = attachment else {
            if let Some(Some(_)) = attached {
                return client.detach().await?.ok_or(Error::Gone { name });
            }
            return Err(AttachError::NotAttached { name }.into());
        };
        match (attached, left.waiting()) {
            (Some(Some(_)), _) => end(&client, uuid, &name).await,
            // Another server than the one that died: what is not written yet is written, and then it goes.
            (Some(None), Some(again)) if !self.force => {
                let again = client.attach(again).await?.ok_or_else(|| Error::Gone { name: name.clone() })?;
                note(&again.warnings);
                end(&client, uuid, &name).await
            }
            (None, Some(_)) if !self.force => {
                let waits = || AttachError::Waits { name: name.clone(), device: left.place() };
                Err(left.lost(&name).unwrap_or_else(waits).into())
            }
            _ => {
                note(&left.clean_up()?);
                Ok(())
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_of_the_nbd_driver_are_told_from_all_else() {
        assert_eq!(nbd_number("/dev/nbd0"), Ok(0));
        assert_eq!(nbd_number("/dev/nbd117"), Ok(117));
        for other in ["", "nbd0", "/dev/nbd", "/dev/nbd0p1", "/dev/nbd+1", "/dev/sda", "/dev/nbd99999999999"]
        {
            assert!(nbd_number(other).is_err(), "{other}");
        }
    }
}
