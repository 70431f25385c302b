//! Progress bars for people: on a terminal only; elsewhere nothing is shown.

use super::size;
use crate::status::{SyncAction, SyncStatus};
use indicatif::{ProgressBar, ProgressStyle};

/// The bar of the walk that is under way, on stderr.
#[derive(Debug)]
pub(super) struct Progress {
    bar: Option<(SyncAction, ProgressBar)>,
}

impl Progress {
    /// No bar until something is under way.
    pub(super) fn new() -> Self {
        Self { bar: None }
    }

    /// Shows how far it is; an idle volume has no bar.
    pub(super) fn show(&mut self, sync: &SyncStatus) {
        if sync.action == SyncAction::Idle {
            self.clear();
            return;
        }
        if self.bar.as_ref().is_none_or(|(action, _)| *action != sync.action) {
            self.clear();
            let style = ProgressStyle::with_template("{prefix:8} [{bar:30}] {percent:>3}%  {msg}");
            // The template is a constant that parses; the default is a bar as well.
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
            let bar = ProgressBar::new(sync.total).with_style(style).with_prefix(sync.action.to_string());
            self.bar = Some((sync.action, bar));
        }
        if let Some((_, bar)) = &self.bar {
            bar.set_length(sync.total);
            bar.set_message(amounts(sync));
            bar.set_position(sync.done);
        }
    }

    /// Runs `print`, which writes to the terminal, with the bar out of the way.
    pub(super) fn around(&self, print: impl FnOnce()) {
        match &self.bar {
            Some((_, bar)) => bar.suspend(print),
            None => print(),
        }
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// `1.2 GiB of 4 GiB, 120.0 MiB/s, 24 s left`.
pub(super) fn amounts(sync: &SyncStatus) -> String {
    let done = format!("{} of {}", size::show(sync.done), size::show(sync.total));
    if sync.speed == 0 {
        return done;
    }
    format!("{done}, {}/s, {} left", size::show(sync.speed), span(sync.eta_s))
}

/// A time for people.
fn span(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_for_people() {
        let sync =
            SyncStatus { action: SyncAction::Recover, done: 1 << 20, total: 1 << 30, speed: 0, eta_s: 0 };
        assert_eq!(amounts(&sync), "1 MiB of 1 GiB");
        let told = |eta_s| amounts(&SyncStatus { speed: 1 << 20, eta_s, ..sync.clone() });
        assert_eq!(told(5), "1 MiB of 1 GiB, 1 MiB/s, 5 s left");
        assert!(told(121).ends_with("3 min left") && told(7260).ends_with("2 h 1 min left"));
    }
}
