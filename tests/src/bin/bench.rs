//! Benchmarks, side by side in one run: `cargo build --release -p raid && cargo run --release -p tests --bin bench -- raid`.
//!
//! Variants take turns (A B A B …), so that a noisy machine is as noisy for each. Told are the lowest, median and
//! highest of all rounds, the ratio of the medians, and the CPU time that the server spent per operation.

use rustix::param::clock_ticks_per_second;
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;
use tests::process::{Sandbox, run, succeed};
use tests::volumes::{Served, create, pattern};

const ROUNDS: usize = 5;
/// Seconds of one measurement.
const SECONDS: u32 = 3;
const USAGE: &str = "usage: bench raid [rebuild | bitmap | reads | layouts]...";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let known = [("rebuild", rebuild as fn()), ("bitmap", bitmap), ("reads", reads), ("layouts", layouts)];
    let wanted = arguments.get(1..).unwrap_or_default();
    let understood = arguments.first().is_some_and(|first| first == "raid")
        && wanted.iter().all(|one| known.iter().any(|(name, _)| name == one));
    if !understood {
        eprintln!("{USAGE}");
        std::process::exit(2);
    }
    if cfg!(debug_assertions) {
        eprintln!("bench: this is a debug build; its figures say nothing (use --release)");
    }
    for (name, bench) in known {
        if wanted.is_empty() || wanted.iter().any(|one| one == name) {
            bench();
        }
    }
}

/// What one measurement gave: a figure, and CPU microseconds of the server per operation where there is a server.
#[derive(Clone, Copy)]
struct Measured {
    figure: f64,
    cpu: Option<f64>,
}

/// Measures two variants by turns and prints them, and the second's median over the first's.
fn compare(
    title: &str,
    unit: &str,
    names: [&str; 2],
    goal: &str,
    mut measure: impl FnMut(usize, usize) -> Measured,
) {
    let mut all = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        // Who goes first changes, too.
        for turn in 0..2 {
            let variant = (turn + round) % 2;
            all[variant].push(measure(variant, round));
        }
    }
    println!("\n{title}, {unit}, {ROUNDS} rounds");
    println!("  {:<28} {:>10} {:>10} {:>10} {:>12}", "", "lowest", "median", "highest", "CPU µs/op");
    let mut medians = [0.0; 2];
    for (variant, measured) in all.iter().enumerate() {
        let figures = ordered(measured.iter().map(|one| one.figure));
        let cpu = ordered(measured.iter().filter_map(|one| one.cpu));
        let cpu = if cpu.is_empty() { "-".to_owned() } else { format!("{:.1}", cpu[cpu.len() / 2]) };
        medians[variant] = figures[ROUNDS / 2];
        println!(
            "  {:<28} {:>10.1} {:>10.1} {:>10.1} {cpu:>12}",
            names[variant],
            figures[0],
            medians[variant],
            figures[ROUNDS - 1]
        );
    }
    println!("  {} : {} = {:.2}   {goal}", names[1], names[0], medians[1] / medians[0]);
}

fn ordered(figures: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures
}

/// User and system time of a process so far, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    // The name, in parentheses, may hold anything: fields are counted behind it. utime and stime are 14 and 15.
    let (_, fields) = stat.rsplit_once(')').expect("the name stands in parentheses");
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|field| field.parse::<u64>().expect("times are numbers")).sum();
    ticks as f64 / clock_ticks_per_second() as f64
}

/// Runs fio against a volume; gives its `iops` or `bw` (MiB/s), and the server's CPU time per operation.
fn fio(served: &Served, rw: &str, arguments: &str) -> Measured {
    let before = cpu_seconds(served.server.pid());
    let told = succeed(
        Command::new("fio")
            .args([
                "--name=bench",
                "--ioengine=nbd",
                "--output-format=json",
                "--randrepeat=0",
                "--gtod_reduce=1",
            ])
            .args(["--rw", rw, "--uri", &served.uri()])
            .args(arguments.split_whitespace()),
    );
    let cpu = cpu_seconds(served.server.pid()) - before;
    // Warnings may stand before the document.
    let json = told.find('{').map_or(told.as_str(), |at| &told[at..]);
    let json: serde_json::Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{told}: {e}"));
    let job = &json["jobs"][0];
    assert_eq!(job["error"], 0, "fio met an error: {told}");
    let side = &job[if rw.ends_with("write") { "write" } else { "read" }];
    let number = |name: &str| side[name].as_f64().unwrap_or_else(|| panic!("no {name} in {told}"));
    let figure = if rw.starts_with("rand") { number("iops") } else { number("bw") / 1024.0 };
    Measured { figure, cpu: Some(cpu * 1e6 / number("total_ios")) }
}

fn timed() -> String {
    format!("--runtime={SECONDS} --time_based")
}

/// An array of four members of `mib` MiB each, filled, in a sandbox of its own.
fn filled(sandbox: &Sandbox, mib: u64, arguments: &str) -> Vec<PathBuf> {
    let members = sandbox.images(4);
    create(sandbox, &members, &format!("--size {mib}M --name vol {arguments}"));
    let volume = Served::start(sandbox, &members, "");
    let source = sandbox.join("source");
    pattern(&source, volume.size(), 1);
    volume.fill(&source);
    std::fs::remove_file(&source).expect("it was just written");
    volume.stop();
    members
}

/// Rebuilding one member, against `dd` of the same image.
fn rebuild() {
    const MIB: u64 = 1024;
    if !run(Sandbox::new().raid10().args(["add", "--help"])).status.success() {
        println!("\nrebuild: left out, since this raid10 cannot add a member");
        return;
    }
    let sandbox = Sandbox::new();
    let members = filled(&sandbox, MIB, "");
    compare(
        "rebuild of a member of 1 GiB",
        "seconds",
        ["dd", "rebuild"],
        "(at most 1.3)",
        |variant, round| {
            let begun;
            let mut cpu = None;
            if variant == 0 {
                let copy = sandbox.join("copy");
                let (from, to) = (format!("if={}", members[1].display()), format!("of={}", copy.display()));
                begun = Instant::now();
                succeed(Command::new("dd").args([&from, &to, "bs=1M", "conv=fsync", "status=none"]));
                let figure = begun.elapsed().as_secs_f64();
                std::fs::remove_file(&copy).expect("dd made it");
                return Measured { figure, cpu };
            }
            // The member is lost, a new one takes its place. Its name stays, so that every round is like the first.
            let rest: Vec<PathBuf> = members.iter().filter(|path| **path != members[0]).cloned().collect();
            std::fs::remove_file(&members[0]).expect("the member is there");
            let volume = Served::start(&sandbox, &rest, "");
            let blank = File::create(&members[0]).expect("the sandbox can be written");
            blank.set_len(MIB << 20).expect("the sandbox has room");
            let before = cpu_seconds(volume.server.pid());
            begun = Instant::now();
            succeed(sandbox.raid10().args(["add", "vol"]).arg(&members[0]));
            succeed(sandbox.raid10().args(["wait", "vol"]));
            let figure = begun.elapsed().as_secs_f64();
            // An operation is a MiB here.
            cpu = cpu.or(Some((cpu_seconds(volume.server.pid()) - before) * 1e6 / MIB as f64));
            let status = succeed(sandbox.raid10().args(["status", "vol", "--json"]));
            assert_eq!(status.matches("\"in_sync\"").count(), 4, "round {round} rebuilt nothing: {status}");
            volume.stop();
            Measured { figure, cpu }
        },
    );
}

/// Random writes with the write-intent bitmap and without.
fn bitmap() {
    let variants = [("without bitmap", "--bitmap none"), ("with bitmap", "")];
    let names = variants.map(|(name, _)| name);
    let write = format!("--bs=4k --iodepth=16 {}", timed());
    let arrays = variants.map(|(_, arguments)| {
        let sandbox = Sandbox::new();
        let members = filled(&sandbox, 512, arguments);
        let served = Served::start(&sandbox, &members, "");
        (sandbox, served)
    });
    // Once without counting: what is measured is the middle of a long run.
    for (_, served) in &arrays {
        fio(served, "randwrite", &write);
    }
    compare("random writes of 4 KiB, steady", "IOPS", names, "(at least 0.9)", |variant, _| {
        fio(&arrays[variant].1, "randwrite", &write)
    });
    for (_, served) in arrays {
        served.stop();
    }
    // A start after which each region is written for the first time: its bit costs a write and a flush before the data.
    compare("the same, first touch of each region", "IOPS", names, "", |variant, _| {
        let sandbox = Sandbox::new();
        let members = sandbox.images(4);
        create(&sandbox, &members, &format!("--size 512M --name vol {}", variants[variant].1));
        let served = Served::start(&sandbox, &members, "");
        let measured = fio(&served, "randwrite", "--bs=4k --iodepth=16 --number_ios=2000");
        served.stop();
        measured
    });
}

/// Reads of a whole array, and of the same array without one member.
fn reads() {
    let sandbox = Sandbox::new();
    let members = filled(&sandbox, 512, "--layout n2");
    for (cache, arguments) in [("page cache", "--read-only"), ("past the page cache", "--read-only --direct")]
    {
        let served = served_apart([&members, &members[1..]], arguments);
        for (title, rw, how) in [
            ("random reads of 4 KiB", "randread", "--bs=4k --iodepth=16"),
            ("sequential reads of 256 KiB", "read", "--bs=256k --iodepth=4"),
        ] {
            let title = format!("n2, {title}, {cache}");
            read_by_turns(&title, ["healthy", "degraded"], "(at least 0.9)", &served, rw, how);
        }
    }
}

/// Sequential reads of near and far copies.
fn layouts() {
    let sandboxes = [Sandbox::new(), Sandbox::new()];
    let near = filled(&sandboxes[0], 512, "--layout n2");
    let far = filled(&sandboxes[1], 512, "--layout f2");
    for (cache, arguments) in [("page cache", "--read-only"), ("past the page cache", "--read-only --direct")]
    {
        let served = served_apart([&near, &far], arguments);
        let title = format!("sequential reads of 256 KiB, {cache}");
        read_by_turns(&title, ["n2", "f2"], "", &served, "read", "--bs=256k --iodepth=4");
    }
}

/// Two servers at once, each in its own sandbox; of the same members if they only read.
fn served_apart(members: [&[PathBuf]; 2], arguments: &str) -> [(Sandbox, Served); 2] {
    members.map(|members| {
        let sandbox = Sandbox::new();
        let served = Served::start(&sandbox, members, arguments);
        (sandbox, served)
    })
}

fn read_by_turns(
    title: &str,
    names: [&str; 2],
    goal: &str,
    served: &[(Sandbox, Served); 2],
    rw: &str,
    how: &str,
) {
    // Read whole once: whoever has a cache has it all from now on.
    for (_, served) in served {
        succeed(Command::new("nbdcopy").args([&served.uri(), "null:"]));
    }
    let how = format!("{how} {}", timed());
    let unit = if rw.starts_with("rand") { "IOPS" } else { "MiB/s" };
    compare(title, unit, names, goal, |variant, _| fio(&served[variant].1, rw, &how));
}
