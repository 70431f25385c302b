//! The command line. What scripts rely on of it is a contract; `--help` explains the rest.

use crate::log::Log;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// The images that plain `broker` runs on.
pub const DEFAULT_IMAGES: [&str; 4] =
    ["images/disk0.img", "images/disk1.img", "images/disk2.img", "images/disk3.img"];

/// The size of an image that plain `broker` makes.
pub const DEFAULT_IMAGE_SIZE: u64 = 4 << 30;

/// A Kafka-compatible log broker that owns its disks.
#[derive(Debug, Parser)]
#[command(name = "broker", version, about, long_about = None, after_help = AFTER)]
pub struct Cli {
    /// What to do; `serve` on the default images if left out.
    #[command(subcommand)]
    pub command: Option<Command>,
}

const AFTER: &str = "Without a command: `broker serve --volume images/disk0.img … images/disk3.img`, \
    with 4G images and the array made if absent.\n\
    Exit status: 0 done, 1 failed (one line on stderr), 2 wrong usage.";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve Kafka clients from a RAID 10 volume, or from a directory; prints "ready" once it does.
    Serve(Serve),
    /// Look at segments, check them, or copy them out in Kafka's layout; offline, and without changing anything.
    #[command(subcommand)]
    Log(Log),
}

/// How to serve.
#[derive(Debug, Clone, Args)]
pub struct Serve {
    /// Member images or block devices of one RAID 10 array, in any order.
    #[arg(long, num_args = 1.., value_name = "MEMBER", conflicts_with = "data_dir")]
    pub volume: Vec<PathBuf>,
    /// Keep segments as files in this directory instead of on a volume.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// If no member exists yet, make sparse image files of this size and an array on them (say 4G).
    #[arg(long, value_name = "SIZE", value_parser = raid::cli::size::parse, conflicts_with = "data_dir")]
    pub create_size: Option<u64>,
    /// Run this program on each event of the volume, as `raid10 serve --on-event` does.
    #[arg(long, value_name = "PROGRAM", conflicts_with = "data_dir")]
    pub on_event: Option<PathBuf>,
    /// Where Kafka clients connect.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9092")]
    pub listen: String,
    /// What clients are told to connect to, if not the listening address.
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Where metrics and status are served over HTTP.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:9644")]
    pub admin: String,
    /// A properties file with Kafka's own key names.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// One setting, over those of the file.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl Cli {
    /// What to do; serving the default images where nothing else is named.
    #[must_use]
    pub fn command(self) -> Command {
        let mut serve = match self.command {
            Some(log @ Command::Log(_)) => return log,
            Some(Command::Serve(serve)) => serve,
            None => Serve {
                volume: Vec::new(),
                data_dir: None,
                create_size: None,
                on_event: None,
                listen: "127.0.0.1:9092".to_owned(),
                advertise: None,
                admin: "127.0.0.1:9644".to_owned(),
                config: None,
                set: Vec::new(),
            },
        };
        if serve.volume.is_empty() && serve.data_dir.is_none() {
            serve.volume = DEFAULT_IMAGES.iter().map(PathBuf::from).collect();
            serve.create_size = serve.create_size.or(Some(DEFAULT_IMAGE_SIZE));
        }
        Command::Serve(serve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Command {
        Cli::try_parse_from([&["broker"], arguments].concat()).unwrap().command()
    }

    #[test]
    fn nothing_named_means_the_default_images() {
        let Command::Serve(serve) = parse(&[]) else { panic!("not served") };
        assert_eq!(serve.volume.len(), 4);
        assert_eq!(serve.create_size, Some(4 << 30));
        let Command::Serve(serve) = parse(&["serve", "--data-dir", "x"]) else { panic!("not served") };
        assert!(serve.volume.is_empty());
        let Command::Serve(serve) = parse(&["serve", "--volume", "a", "b", "--set", "x=1"]) else {
            panic!("not served")
        };
        assert_eq!((serve.volume.len(), serve.create_size), (2, None));
        assert!(Cli::try_parse_from(["broker", "serve", "--volume", "a", "--data-dir", "b"]).is_err());
    }

    #[test]
    fn a_look_needs_one_place() {
        assert!(matches!(parse(&["log", "dump", "a.log", "b.index"]), Command::Log(Log::Dump(_))));
        assert!(matches!(parse(&["log", "verify", "--volume", "a", "b"]), Command::Log(Log::Verify(_))));
        let export = ["log", "export", "--data-dir", "a", "--to", "b", "--topic", "x", "--topic", "y"];
        assert!(matches!(parse(&export), Command::Log(Log::Export(export)) if export.pick.topic.len() == 2));
        for wrong in [&["log", "dump"][..], &["log", "verify"], &["log", "dump", "--data-dir", "a", "b.log"]]
        {
            assert!(Cli::try_parse_from([&["broker"], wrong].concat()).is_err(), "{wrong:?}");
        }
    }
}
