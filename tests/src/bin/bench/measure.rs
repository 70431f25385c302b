//! Measuring by turns: rates by fio, CPU time by the process table, medians and ratios.

use rustix::param::clock_ticks_per_second;
use std::process::Command;
use std::time::Duration;
use tests::process::{eventually, succeed};

/// A benchmark and its name.
pub type Bench = (String, Box<dyn Fn()>);

/// Rounds of a comparison.
pub const ROUNDS: usize = 5;
/// Seconds of one measurement.
const SECONDS: u32 = 3;

/// What one measurement gave: a figure, and CPU microseconds of the server per operation where there is a server.
#[derive(Clone, Copy)]
pub struct Measured {
    pub figure: f64,
    pub cpu: Option<f64>,
}

/// Measures variants by turns; who goes first changes, too. Gives the rounds of each.
fn by_turns(variants: usize, mut measure: impl FnMut(usize, usize) -> Measured) -> Vec<Vec<Measured>> {
    let mut all = vec![Vec::new(); variants];
    for round in 0..ROUNDS {
        for turn in 0..variants {
            let variant = (turn + round) % variants;
            all[variant].push(measure(variant, round));
        }
    }
    all
}

/// Prints a table of all variants and gives their medians.
fn table(title: &str, unit: &str, names: &[&str], all: &[Vec<Measured>]) -> Vec<Measured> {
    println!("\n{title}, {unit}, {ROUNDS} rounds");
    println!("  {:<28} {:>10} {:>10} {:>10} {:>12}", "", "lowest", "median", "highest", "CPU µs/op");
    let mut medians = Vec::new();
    for (name, measured) in names.iter().zip(all) {
        let figures = ordered(measured.iter().map(|one| one.figure));
        let cpu = ordered(measured.iter().filter_map(|one| one.cpu));
        let cpu = cpu.get(cpu.len() / 2).copied();
        let shown = cpu.map_or_else(|| "-".to_owned(), |cpu| format!("{cpu:.1}"));
        let (lowest, median, highest) = (figures[0], figures[ROUNDS / 2], figures[ROUNDS - 1]);
        println!("  {name:<28} {lowest:>10.1} {median:>10.1} {highest:>10.1} {shown:>12}");
        medians.push(Measured { figure: median, cpu });
    }
    medians
}

/// Measures two variants by turns and prints them, and the second's median over the first's.
pub fn compare(
    title: &str,
    unit: &str,
    names: [&str; 2],
    goal: &str,
    measure: impl FnMut(usize, usize) -> Measured,
) {
    let medians = table(title, unit, &names, &by_turns(2, measure));
    let ratio = medians[1].figure / medians[0].figure;
    println!("  {} : {} = {ratio:.2}   {goal}", names[1], names[0]);
}

/// Measures the first variant against all others by turns, and prints its median and its CPU time over those of each.
pub fn against_peers(
    title: &str,
    unit: &str,
    names: &[&str],
    goal: &str,
    measure: impl FnMut(usize, usize) -> Measured,
) {
    let medians = table(title, unit, names, &by_turns(names.len(), measure));
    for (peer, name) in medians.iter().zip(names).skip(1) {
        let rate = medians[0].figure / peer.figure;
        let cpu = medians[0].cpu.zip(peer.cpu).map_or(f64::NAN, |(ours, theirs)| ours / theirs);
        println!("  {} : {name} = {rate:.2}, CPU {cpu:.2}   {goal}", names[0]);
    }
}

fn ordered(figures: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    figures
}

/// User and system time of a process and of its children that have ended, in seconds. Waits for those that are ending.
pub fn cpu_seconds(pid: u32) -> f64 {
    let children = format!("/proc/{pid}/task/{pid}/children");
    eventually("the server's children to end", Duration::from_secs(10), || {
        std::fs::read_to_string(&children).is_ok_and(|pids| pids.trim().is_empty()).then_some(())
    });
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    // The name, in parentheses, may hold anything: fields are counted behind it. utime, stime, cutime and cstime are 14
    // to 17.
    let (_, fields) = stat.rsplit_once(')').expect("the name stands in parentheses");
    let ticks = fields.split_whitespace().skip(11).take(4);
    let ticks: u64 = ticks.map(|field| field.parse::<u64>().expect("times are numbers")).sum();
    ticks as f64 / clock_ticks_per_second() as f64
}

/// Runs fio against an export of the server `pid`; gives its `iops` or `bw` (MiB/s), and the server's CPU time per
/// operation.
pub fn fio(pid: u32, uri: &str, rw: &str, arguments: &str) -> Measured {
    let before = cpu_seconds(pid);
    let told = succeed(
        Command::new("fio")
            .args([
                "--name=bench",
                "--ioengine=nbd",
                "--output-format=json",
                "--randrepeat=0",
                "--gtod_reduce=1",
                "--group_reporting",
            ])
            .args(["--rw", rw, "--uri", uri])
            .args(arguments.split_whitespace()),
    );
    let cpu = cpu_seconds(pid) - before;
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

/// The arguments that make a measurement last as long as all others.
pub fn timed() -> String {
    format!("--runtime={SECONDS} --time_based")
}
