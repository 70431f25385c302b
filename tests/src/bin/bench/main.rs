//! Benchmarks, side by side in one run:
//! `cargo build --release -p raid && cargo run --release -p tests --bin bench -- raid | nbd | log`.
//!
//! Variants take turns (A B A B …), so that a noisy machine is as noisy for each. Told are the lowest, median and
//! highest of all rounds, the ratio of the medians, and the CPU time that the server spent per operation.

mod bare;
mod commit;
mod log;
mod lookup;
mod measure;
mod nbd;
mod raid;

const USAGE: &str = "usage: bench raid [rebuild | bitmap | reads | layouts | cache]... | bench nbd [CASE]... \
    | bench log [append[-disk[-1 | -1-x5 | -4] | -tmpfs[-1 | -1-x5 | -4]] | recovery | commit | sync | lookup | partitions]...";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wanted = arguments.get(1..).unwrap_or_default();
    let benches: Vec<measure::Bench> = match arguments.first().map(String::as_str) {
        Some("raid") => raid::benches(),
        Some("nbd") => nbd::benches(),
        Some("log") => log::benches(),
        // Not for people: a bench starts itself so.
        Some("log-child") => return log::work_as_child(wanted),
        Some("bare-child") => return bare::work_as_child(wanted),
        _ => usage(),
    };
    // A name, or the first words of several.
    let is_one = |one: &String| benches.iter().any(|(name, _)| name == one);
    let picks = |one: &String, name: &str| {
        name.strip_prefix(one.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-') && !is_one(one))
    };
    if let Some(unknown) = wanted.iter().find(|one| !benches.iter().any(|(name, _)| picks(one, name))) {
        let known: Vec<&str> = benches.iter().map(|(name, _)| name.as_str()).collect();
        eprintln!("bench: there is no '{unknown}'; there are: {}", known.join(", "));
        usage();
    }
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; its figures say nothing (use --release)");
    }
    for (name, bench) in &benches {
        if wanted.is_empty() || wanted.iter().any(|one| picks(one, name)) {
            bench();
        }
    }
}

fn usage() -> ! {
    eprintln!("{USAGE}");
    std::process::exit(2);
}
