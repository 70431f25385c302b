//! `broker log export`: a copy in Kafka's layout.

use super::{Export, LogError, bar, counted, healed, place};
use logstore::export::export;
use logstore::inspect::{PartitionView, Severity};
use std::io::{self, Write};

pub(super) async fn run(command: &Export) -> Result<(), LogError> {
    let opened = place::open(&command.place.volume, command.place.data_dir.as_deref()).await?;
    let inspection = &opened.inspection;
    let picked = command.pick.of(inspection)?;
    let count = picked.len();
    let bar = bar("export", picked.iter().map(|view| PartitionView::bytes(view)).sum());
    let wanted = |view: &PartitionView| command.pick.takes(view);
    let found = export(inspection, &command.to, command.force, &wanted, &mut |done| bar.inc(done)).await;
    bar.finish_and_clear();
    let met = found?;
    healed(met.healed);
    let findings: Vec<_> = inspection.findings.iter().cloned().chain(met.findings).collect();
    let mut out = io::stdout().lock();
    for finding in &findings {
        writeln!(out, "{finding}")?;
    }
    writeln!(out, "{} exported to {}", counted(count, "partition"), command.to.display())?;
    out.flush()?;
    let faults = findings.iter().filter(|finding| finding.severity == Severity::Fault).count();
    if faults == 0 {
        return Ok(());
    }
    Err(LogError::Faults { faults: counted(faults, "fault"), place: inspection.place.clone() })
}
