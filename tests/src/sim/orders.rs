//! Orders to a live array, as an administrator gives them.

use super::array::Rig;
use raid::error::Error;
use raid::orders::MemberName;
use raid::status::MemberState;
use raid::volume::Volume;
use std::time::Duration;

/// One order. Disks are numbered as the rig has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Declare the member of this slot failed.
    Fail(usize),
    /// Remove this disk and add it again.
    Readd(usize),
    /// Add this disk.
    Add(usize),
    /// Copy the member of this slot to this disk, and let that take over.
    Replace(usize, usize),
    /// None for a few milliseconds: a rebuild gets somewhere.
    Rest,
    /// None until nobody is being filled any more.
    Rebuilt,
}

/// Longest time that filling a member may take here.
const PATIENCE: Duration = Duration::from_secs(120);

impl Rig {
    /// Gives an order to an array that the rig's disks make.
    pub async fn order(&self, volume: &Volume, order: Order) -> raid::Result<()> {
        let runtime = self.sim.runtime();
        match order {
            Order::Fail(slot) => volume.fail(&MemberName::Slot(slot)).await,
            Order::Readd(disk) => {
                let name = MemberName::Path(self.disks[disk].name().to_owned());
                match volume.remove(&name).await {
                    // It had left before.
                    Ok(()) | Err(Error::NoSuchSlot { .. }) => {}
                    Err(refused) => return Err(refused),
                }
                volume.add(self.plug_one(disk), false).await.map(drop)
            }
            Order::Add(disk) => volume.add(self.plug_one(disk), false).await.map(drop),
            Order::Replace(slot, disk) => volume.replace(&MemberName::Slot(slot), self.plug_one(disk)).await,
            Order::Rest => {
                runtime.sleep(Duration::from_millis(3)).await;
                Ok(())
            }
            Order::Rebuilt => {
                let until = runtime.now() + PATIENCE;
                let is_filling =
                    || volume.status().members.iter().any(|member| member.state == MemberState::Rebuilding);
                while is_filling() {
                    assert!(runtime.now() < until, "a rebuild does not end: {:?}", volume.status());
                    runtime.sleep(Duration::from_millis(50)).await;
                }
                Ok(())
            }
        }
    }
}

/// Whether an order was refused for what it asked, and nothing has changed.
#[must_use]
pub fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::AlreadyFailed { .. }
            | Error::LastCopy { .. }
            | Error::MemberInUse { .. }
            | Error::MemberTwice { .. }
            | Error::NoSuchSlot { .. }
            | Error::NotReplaceable { .. }
            | Error::ReplacedAlready { .. }
            | Error::NoNumberLeft { .. }
    )
}
