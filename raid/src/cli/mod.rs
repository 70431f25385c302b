//! The `raid10` command: what scripts and people type. Its contract (commands, flags, JSON, exit status) is kept by
//! `tests/tests/cli_raid10.rs`.
//!
//! Exit status: 0 done; 1 failed, with one line on stderr that says what, where and what to do; 2 wrong usage.
//! stdout carries what was asked for and nothing else. Logs go to stderr, in the amount that `RUST_LOG` says; without
//! it, only a server that is ready logs.

mod attach;
mod create;
mod examine;
mod members;
mod progress;
mod scrub;
mod serve;
pub mod size;
mod status;
mod stop;
mod table;
mod tls;
mod volume;
mod wait;

use crate::error::Result;
use clap::{Parser, Subcommand};
use std::future::Future;
use std::process::ExitCode;

/// RAID 10 in user space, on Linux md's on-disk format, served over NBD.
#[derive(Debug, Parser)]
#[command(name = "raid10", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(create::Create),
    Examine(examine::Examine),
    Serve(serve::Serve),
    Status(status::Status),
    Fail(members::Fail),
    Remove(members::Remove),
    Add(members::Add),
    Replace(members::Replace),
    Scrub(scrub::Scrub),
    Wait(wait::Wait),
    Grow(members::Grow),
    Limit(members::Limit),
    Attach(attach::Attach),
    Detach(attach::Detach),
    Stop(stop::Stop),
}

/// The whole program: arguments in, exit status out.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if std::env::var_os(tracing_subscriber::EnvFilter::DEFAULT_ENV).is_some() {
        log_to_stderr();
    }
    let done = match cli.command {
        Command::Create(create) => run_small(create.run()),
        Command::Examine(examine) => run_small(examine.run()),
        Command::Serve(serve) => serve::run(serve),
        Command::Status(status) => run_small(status.run()),
        Command::Fail(fail) => run_small(fail.run()),
        Command::Remove(remove) => run_small(remove.run()),
        Command::Add(add) => run_small(add.run()),
        Command::Replace(replace) => run_small(replace.run()),
        Command::Scrub(scrub) => run_small(scrub.run()),
        Command::Wait(wait) => run_small(wait.run()),
        Command::Grow(grow) => run_small(grow.run()),
        Command::Limit(limit) => run_small(limit.run()),
        Command::Attach(attach) => run_small(attach.run()),
        Command::Detach(detach) => run_small(detach.run()),
        Command::Stop(stop) => run_small(stop.run()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("raid10: {}", one_line(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// Ends the process as clap does where flags do not go together in a way that it cannot express.
fn wrong_usage(what: &str) -> ! {
    use clap::CommandFactory;
    Cli::command().error(clap::error::ErrorKind::ArgumentConflict, what).exit()
}

/// Logs at the level of `RUST_LOG`, else `info`. Called once.
fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::filter::LevelFilter;
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

/// Runs a command that needs no threads of its own but the blocking ones.
fn run_small(work: impl Future<Output = Result<()>>) -> Result<()> {
    runtime(tokio::runtime::Builder::new_current_thread())?.block_on(work)
}

fn runtime(mut builder: tokio::runtime::Builder) -> Result<tokio::runtime::Runtime> {
    builder.enable_all().build().map_err(|error| crate::Error::Runtime {
        errno: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::AGAIN),
    })
}

/// Writes `text` and a line's end on stdout. A reader that has gone away is no failure of ours.
fn say(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
        tracing::debug!("stdout is gone: {error}");
    }
}

/// `value` as one JSON document.
fn say_json<T: serde::Serialize>(value: &T) {
    // Our documents have string keys and finite numbers: they always serialise.
    match serde_json::to_string_pretty(value) {
        Ok(text) => say(&text),
        Err(error) => tracing::error!("not serialisable: {error}"),
    }
}

/// A path that means the same in every directory.
fn absolute(path: &std::path::Path) -> Result<std::path::PathBuf> {
    std::path::absolute(path).map_err(|error| crate::Error::Open {
        device: path.display().to_string(),
        errno: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::NOENT),
    })
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
