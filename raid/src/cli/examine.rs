//! `raid10 examine`: what members say of themselves, offline.

use super::{say, say_json, size, table};
use crate::device::{FileDevice, OpenMode};
use crate::error::Result;
use crate::examine::{Examined, examine};
use std::path::{Path, PathBuf};

/// Show the superblock, bitmap and role of members, offline.
#[derive(Debug, clap::Args)]
pub(super) struct Examine {
    /// Files or block devices.
    #[arg(required = true, value_name = "MEMBER")]
    members: Vec<PathBuf>,
    /// Print one JSON document: an array with an object a member.
    #[arg(long)]
    json: bool,
}

impl Examine {
    pub(super) async fn run(self) -> Result<()> {
        let mut found = Vec::with_capacity(self.members.len());
        for path in &self.members {
            found.push(examine_path(path).await?);
        }
        if self.json {
            say_json(&found);
        } else {
            let tables: Vec<String> = found.iter().map(show).collect();
            say(&tables.join("\n\n"));
        }
        Ok(())
    }
}

/// Examines what lies at a path. It may be in use at the time.
pub(super) async fn examine_path(path: &Path) -> Result<Examined> {
    examine(&FileDevice::open(path, OpenMode::ReadOnly)?).await
}

fn show(member: &Examined) -> String {
    let bitmap = member.bitmap.as_ref().map_or_else(
        || "none".to_owned(),
        |bitmap| {
            let (dirty, regions) = (bitmap.dirty, bitmap.regions);
            format!(
                "{dirty} of {regions} regions of {} dirty, events {}",
                size::show(bitmap.chunk),
                bitmap.events
            )
        },
    );
    let facts = table::facts([
        ("Array", format!("{} ({})", member.name, member.uuid)),
        ("Layout", format!("{}, chunk {}", member.layout, size::show(member.chunk))),
        ("Size", format!("{} ({} bytes)", size::show(member.size), member.size)),
        ("Members", format!("{} ({})", member.members, member.slots)),
        ("Role", member.role.clone()),
        ("Device", member.device_uuid.to_string()),
        ("State", if member.clean { "clean" } else { "active" }.to_owned()),
        ("Events", member.events.to_string()),
        ("Bitmap", bitmap),
        ("Bad blocks", size::show(member.bad_blocks)),
        ("Data", format!("{} from byte {}", size::show(member.used), member.data_offset)),
        ("Created", moment(member.created)),
        ("Updated", moment(member.updated)),
    ]);
    format!("{}\n{}", member.path, table::text(&facts))
}

/// Seconds since the epoch as a date and time in UTC (the civil calendar, by counting 400-year cycles).
fn moment(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March 0000, so that leap days come last in each year.
    let day = days + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::moment;

    #[test]
    fn moments_in_the_civil_calendar() {
        assert_eq!(moment(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(moment(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(moment(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(moment(1_709_251_199), "2024-02-29 23:59:59 UTC");
        assert_eq!(moment(4_102_444_800), "2100-01-01 00:00:00 UTC");
    }
}
