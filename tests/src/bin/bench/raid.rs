//! The engine: rebuild against `dd`, the bitmap's price, degraded against healthy, near against far, what memory holds twice.

use crate::measure::{Bench, Measured, compare, cpu_seconds, timed};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tests::process::{Sandbox, run, succeed};
use tests::volumes::{Served, create, pattern, resident};

/// What there is to measure, by name.
pub fn benches() -> Vec<Bench> {
    vec![
        ("rebuild".to_owned(), Box::new(rebuild)),
        ("bitmap".to_owned(), Box::new(bitmap)),
        ("reads".to_owned(), Box::new(reads)),
        ("layouts".to_owned(), Box::new(layouts)),
        ("cache".to_owned(), Box::new(cache)),
    ]
}

fn fio(served: &Served, rw: &str, arguments: &str) -> Measured {
    crate::measure::fio(served.server.pid(), &served.uri(), rw, arguments)
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

/// What of a volume is in memory when it has been written, and when it has been read: once, or once a leg?
fn cache() {
    let sandbox = Sandbox::new();
    let members = sandbox.images(4);
    create(&sandbox, &members, "--size 512M --name vol");
    let volume = Served::start(&sandbox, &members, "");
    let (source, size) = (sandbox.join("source"), volume.size() as f64);
    pattern(&source, volume.size(), 1);
    println!(
        "\ncache: bytes of the page cache for each byte of the volume, on two legs (two where both are kept)"
    );
    let tell = |when: &str, bar: &str| {
        let held: u64 = members.iter().map(|member| resident(member)).sum();
        println!("{when:32} {:5.2}  {bar}", held as f64 / size);
    };
    volume.fill(&source);
    tell("written and flushed", "(at most 1.1)");
    volume.dump(Path::new("/dev/null"));
    tell("read, as it was cached", "(at most 1.1)");
    for member in &members {
        let file = File::open(member).expect("the member is there");
        file.sync_all().expect("it can be synced");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("its pages can be dropped");
    }
    volume.dump(Path::new("/dev/null"));
    tell("read from the disks", "(as far as the disks read ahead: see /sys/block/*/queue/read_ahead_kb)");
    volume.stop();
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
