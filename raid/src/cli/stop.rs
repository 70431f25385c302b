//! `raid10 stop`: ends the serving of a volume, from outside.

use super::volume::{Found, find, not_served};
use crate::error::Result;

/// Stop serving a volume: what runs is finished, everything is flushed and marked clean.
///
/// Returns when that is done; refused while the volume is attached. Serves `raid10 serve` and `broker serve` alike.
#[derive(Debug, clap::Args)]
pub(super) struct Stop {
    /// An array's name, its UUID, or the path of any member.
    volume: String,
}

impl Stop {
    pub(super) async fn run(self) -> Result<()> {
        let nobody = || not_served(&self.volume, "there is nothing to stop");
        let Found::Served(client, _) = find(&self.volume).await? else { return Err(nobody()) };
        client.stop().await?.ok_or_else(nobody)
    }
}
