//! `raid10 wait`: until nothing is under way any more.

use super::progress::Progress;
use super::volume::live;
use crate::error::{Error, Result};
use crate::status::{Status, SyncAction, VolumeState};
use std::time::Duration;

/// Time between two looks at a volume that is waited for.
const LOOK: Duration = Duration::from_millis(200);

/// Wait until nothing is being made equal or compared.
///
/// Exit status 0 then, and 1 if the volume has failed.
#[derive(Debug, clap::Args)]
pub(super) struct Wait {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
}

impl Wait {
    pub(super) async fn run(self) -> Result<()> {
        let volume = live(&self.volume).await?;
        let mut progress = Progress::new();
        let mut status = Status::clone(&volume.status);
        loop {
            if status.state == VolumeState::Failed {
                return Err(Error::WaitedForFailed { name: status.name });
            }
            if status.sync.action == SyncAction::Idle {
                return Ok(());
            }
            progress.show(&status.sync);
            tokio::time::sleep(LOOK).await;
            status = volume.served(volume.client.status().await?)?;
        }
    }
}
