//! `broker log`: offline looks at a store, on a volume that nobody serves or in a directory. Nothing is ever written to
//! what is looked at.
//!
//! - this file: flags, and the way from a command to an exit status;
//! - `place`: opening what was named, under a lock that keeps servers away;
//! - `print`: text and JSON; `dump`, `verify`, `export`: the commands.

mod dump;
mod export;
mod place;
mod print;
mod verify;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use logstore::inspect::{Inspection, PartitionView};
use std::io;
use std::path::PathBuf;

/// Look at segments, check them, or copy them out in Kafka's layout; offline, and without changing anything.
#[derive(Debug, Clone, Subcommand)]
pub enum Log {
    /// Show batches, indexes, snapshots and checkpoints, as kafka-dump-log does.
    ///
    /// A line for each batch, with Kafka's names for its fields; a damaged one says `isvalid: false`, and why. Where bytes
    /// are no batch, the dump says so and goes on at the next sound one. What one copy on a volume does not have good is
    /// taken from another, and stderr says once that it was.
    Dump(Dump),
    /// Check every batch and everything derived from it; exit status 1 if anything is wrong.
    ///
    /// Checked are checksums, lengths, counts, offsets that follow each other and leader epochs of every batch, every copy
    /// of it on a volume, indexes, transaction indexes and snapshots against their log, and the catalog, with its list of
    /// leader epochs, against what is there. Each fault is a line that says topic, partition, segment, byte and offsets; which
    /// bytes of which member's file are damaged, and whether another copy is sound, so that the broker heals it when it
    /// next reads or scrubs it. Lines that begin with `note` are no faults: the torn tail after a crash, say, which the
    /// next start cuts off.
    Verify(Verify),
    /// Copy partitions into a directory, in the layout and the formats of Apache Kafka.
    ///
    /// What is written is on stable storage when the command ends. Batches are copied as they are, indexes are made anew.
    /// What one copy on a volume does not have good is taken from another; batches of which no copy is good are copied too,
    /// told, and make exit status 1.
    Export(Export),
}

/// Where a store is.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub struct Place {
    /// Member images or block devices of one RAID 10 array that nobody serves now, in any order.
    #[arg(long, num_args = 1.., value_name = "MEMBER")]
    pub volume: Vec<PathBuf>,
    /// A data directory: the broker's, one that was exported, or Apache Kafka's own.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
}

/// Where a store is, or single files.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub struct DumpPlace {
    /// Member images or block devices of one RAID 10 array that nobody serves now, in any order.
    #[arg(long, num_args = 1.., value_name = "MEMBER")]
    pub volume: Vec<PathBuf>,
    /// A data directory: the broker's, one that was exported, or Apache Kafka's own.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Files of a log: .log, .index, .timeindex, .txnindex, .snapshot, or a checkpoint.
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

/// Which partitions.
#[derive(Debug, Clone, Args)]
pub struct Pick {
    /// Only this topic; may be given several times. All topics if left out.
    #[arg(long, value_name = "TOPIC")]
    pub topic: Vec<String>,
    /// Only this partition of each topic.
    #[arg(long, value_name = "N")]
    pub partition: Option<u32>,
}

/// The flags of `broker log dump`.
#[derive(Debug, Clone, Args)]
pub struct Dump {
    /// Where to look.
    #[command(flatten)]
    pub place: DumpPlace,
    /// At what to look.
    #[command(flatten)]
    pub pick: Pick,
    /// Start at the batch that holds this offset; shows batches only.
    #[arg(long, value_name = "OFFSET")]
    pub from: Option<i64>,
    /// Show each record as well, decompressed, with its key, value and headers.
    #[arg(long)]
    pub records: bool,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// The flags of `broker log verify`.
#[derive(Debug, Clone, Args)]
pub struct Verify {
    /// Where to look.
    #[command(flatten)]
    pub place: Place,
    /// At what to look.
    #[command(flatten)]
    pub pick: Pick,
    /// Print one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// The flags of `broker log export`.
#[derive(Debug, Clone, Args)]
pub struct Export {
    /// Where to look.
    #[command(flatten)]
    pub place: Place,
    /// The directory to write; made if absent.
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// At what to look.
    #[command(flatten)]
    pub pick: Pick,
    /// Write into a directory that is not empty, and replace partitions of the same names there.
    #[arg(long)]
    pub force: bool,
}

/// Why a command did not do what was asked, or did and has bad news.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A member or a directory cannot be opened.
    #[error("cannot open {path}: {cause}")]
    Open {
        /// What was to be opened.
        path: String,
        /// What the system said.
        cause: io::Error,
    },
    /// Somebody serves it.
    #[error(
        "{path} is in use by another process: end that first (`raid10 stop`, or end the broker); this command reads \
         what nobody serves"
    )]
    InUse {
        /// The member.
        path: String,
    },
    /// None of the members exists.
    #[error("{0} does not exist, nor does any other member; name the members of one array")]
    NoMember(String),
    /// The volume cannot be assembled.
    #[error("cannot open the volume: {0}")]
    Volume(#[from] raid::Error),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] logstore::Error),
    /// There is no such topic or partition.
    #[error("there is no {wanted} here; there are: {there}")]
    NotThere {
        /// What was asked for.
        wanted: String,
        /// What there is.
        there: String,
    },
    /// A file that is no part of a log.
    #[error(
        "{0} is no file of a log: its name should end in .log, .index, .timeindex, .txnindex or .snapshot, or be a \
         checkpoint's"
    )]
    NoLogFile(String),
    /// Faults were found; they were told.
    #[error("{faults} found in {place}; see the lines above")]
    Faults {
        /// How many, in words.
        faults: String,
        /// Where.
        place: String,
    },
    /// The output went away or cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Runs a command. A reader of the output that has gone away is no failure.
pub async fn run(log: &Log) -> Result<(), LogError> {
    let outcome = match log {
        Log::Dump(dump) => dump::run(dump).await,
        Log::Verify(verify) => verify::run(verify).await,
        Log::Export(export) => export::run(export).await,
    };
    match outcome {
        Err(LogError::Output(cause)) if cause.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

impl Pick {
    fn takes(&self, view: &PartitionView) -> bool {
        (self.topic.is_empty() || self.topic.contains(&view.topic))
            && self.partition.is_none_or(|wanted| wanted == view.partition)
    }

    /// The partitions that were asked for; an error where a name has none.
    fn of<'a>(&self, inspection: &'a Inspection) -> Result<Vec<&'a PartitionView>, LogError> {
        let picked: Vec<_> = inspection.partitions.iter().filter(|view| self.takes(view)).collect();
        let without = |topic: &&String| picked.iter().all(|view| view.topic != **topic);
        let missing = match self.topic.iter().find(without) {
            Some(topic) => Some(match self.partition {
                Some(partition) => format!("partition {partition} of topic {topic}"),
                None => format!("topic {topic}"),
            }),
            None => {
                self.partition.filter(|_| picked.is_empty()).map(|partition| format!("partition {partition}"))
            }
        };
        match missing {
            Some(wanted) => Err(LogError::NotThere { wanted, there: there(inspection) }),
            None => Ok(picked),
        }
    }
}

/// The first names of what there is.
fn there(inspection: &Inspection) -> String {
    const MOST: usize = 10;
    let mut names: Vec<String> = inspection.partitions.iter().take(MOST).map(PartitionView::name).collect();
    if inspection.partitions.len() > MOST {
        names.push("…".to_owned());
    }
    if names.is_empty() { "no partitions at all".to_owned() } else { names.join(", ") }
}

/// A bar on stderr that counts bytes; nothing where there is no terminal.
fn bar(doing: &'static str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{prefix:8} [{bar:30}] {percent:>3}%  {bytes} of {total_bytes}, {eta} left",
    );
    // The template is a constant that parses; the default is a bar as well.
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
    ProgressBar::new(total).with_style(style).with_prefix(doing)
}

/// Says once, on stderr, that so many batches were taken from another copy than the first.
fn healed(batches: u64) {
    if batches > 0 {
        let (batches, are) =
            if batches == 1 { ("1 batch".to_owned(), "is") } else { (format!("{batches} batches"), "are") };
        eprintln!(
            "broker: {batches} {are} damaged in one copy, and taken from a sound one; `broker log verify` tells where"
        );
    }
}

/// `1 fault`, `2 faults`.
fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}
