//! `raid10 scrub`: comparing copies, and making them equal.

use super::progress::Progress;
use super::volume::live;
use super::{say, say_json};
use crate::control::{Client, ScrubReport};
use crate::error::Result;
use std::time::Duration;

/// Time between two looks at a volume that is waited for.
const LOOK: Duration = Duration::from_millis(200);

/// Compare all copies of all data; with --repair, make them equal where they differ.
///
/// Without --wait it begins, and `raid10 status` shows how far it is. With --wait, each difference is printed with the
/// member, sector and byte of every copy, and a summary. The exit status is 0 with or without differences: what
/// they mean is for the reader (of two copies, neither is known to be the right one).
#[derive(Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub(super) struct Scrub {
    /// An array's name, its UUID, or the path of any member; it must be served.
    volume: String,
    /// Make copies equal: the odd one of three or more is overwritten, else the first in slot order counts.
    #[arg(long)]
    repair: bool,
    /// Wait until it is done, and print what was found.
    #[arg(long, conflicts_with = "cancel")]
    wait: bool,
    /// Print one JSON document.
    #[arg(long, requires = "wait")]
    json: bool,
    /// End the scrub that is under way.
    #[arg(long, conflicts_with = "repair")]
    cancel: bool,
}

impl Scrub {
    pub(super) async fn run(self) -> Result<()> {
        let volume = live(&self.volume).await?;
        if self.cancel {
            let done = volume.client.cancel_scrub().await?;
            return volume.served(done);
        }
        let scrub = volume.client.scrub(self.repair, self.wait);
        if !self.wait {
            volume.served(scrub.await?)?;
            return Ok(());
        }
        let report = tokio::select! {
            report = scrub => volume.served(report?)?,
            // It only ends with an error.
            shown = show_progress(&volume.client) => return Err(shown.err().unwrap_or(volume.gone())),
        };
        if self.json {
            say_json(&report);
        } else {
            say(&summary(&report));
        }
        Ok(())
    }
}

/// Shows how far a walk is until the future is dropped.
async fn show_progress(client: &Client) -> Result<()> {
    let mut progress = Progress::new();
    loop {
        if let Some(status) = client.status().await? {
            progress.show(&status.sync);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn summary(report: &ScrubReport) -> String {
    let mut lines: Vec<String> = report.mismatches.iter().map(ToString::to_string).collect();
    let listed = report.mismatches.len() as u64;
    if listed < report.found {
        lines.push(format!("… and {} more", report.found - listed));
    }
    lines.push(match (report.found, report.repair) {
        (0, _) => "no mismatches: all copies are equal".to_owned(),
        (found, true) => {
            let repaired = report.mismatches.iter().filter(|mismatch| mismatch.repaired).count() as u64;
            if repaired == listed {
                format!("{found} mismatches, made equal")
            } else {
                format!("{found} mismatches; {} of those listed could not be made equal", listed - repaired)
            }
        }
        (found, false) => {
            format!("{found} mismatches, left as they are; `raid10 scrub --repair` makes them equal")
        }
    });
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Mismatch;

    #[test]
    fn a_summary_says_what_was_found_and_what_became_of_it() {
        let mismatch = |repaired| Mismatch { at: 0, len: 512, copies: Vec::new(), wrong: None, repaired };
        let report = |repair, found, mismatches| ScrubReport { repair, finished: true, found, mismatches };
        assert_eq!(summary(&report(false, 0, vec![])), "no mismatches: all copies are equal");
        let left = summary(&report(false, 3, vec![mismatch(false)]));
        assert_eq!(left.lines().count(), 3, "{left}");
        assert!(left.contains("… and 2 more") && left.contains("--repair"), "{left}");
        let made = summary(&report(true, 1, vec![mismatch(true)]));
        assert!(made.ends_with("1 mismatches, made equal"), "{made}");
        let failed = summary(&report(true, 2, vec![mismatch(true), mismatch(false)]));
        assert!(failed.contains("1 of those listed could not"), "{failed}");
    }
}
