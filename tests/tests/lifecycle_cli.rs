//! The life of an array through the command line, while it is served: members fail, go, come, are replaced, and data
//! stays as it was. Every wrong command is refused in one line, and nothing changes.

use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tests::md::{spoil, superblock};
use tests::process::{Ended, Sandbox, assert_refusal, bytes_of, eventually, refuse, run, succeed};
use tests::volumes::{Served, create, pattern};

const MEMBERS: &str = "--size 16M --chunk 64K --name vol";

fn raid10(sandbox: &Sandbox, words: &[&str]) -> String {
    succeed(sandbox.raid10().args(words))
}

fn refused(sandbox: &Sandbox, words: &[&str], parts: &[&str]) {
    let said = refuse(sandbox.raid10().args(words), 1);
    for part in parts {
        assert!(said.contains(part), "{words:?}: {said}");
    }
}

fn status(sandbox: &Sandbox) -> Value {
    serde_json::from_str(&raid10(sandbox, &["status", "vol", "--json"])).expect("one JSON document")
}

/// The states of all members, in the order of the status document.
fn states(sandbox: &Sandbox) -> Vec<String> {
    let status = status(sandbox);
    let members = status["members"].as_array().expect("members");
    members.iter().map(|member| member["state"].as_str().expect("a state").to_owned()).collect()
}

/// A blank image file.
fn blank(sandbox: &Sandbox, name: &str, size: u64) -> PathBuf {
    let path = sandbox.join(name);
    let file = std::fs::File::create(&path).expect("the sandbox can be written");
    file.set_len(size).expect("the sandbox can be written");
    path
}

/// A served array of `n` members, filled; and its contents.
fn filled(sandbox: &Sandbox, n: usize, arguments: &str) -> (Vec<PathBuf>, Served, Vec<u8>) {
    let images = sandbox.images(n);
    create(sandbox, &images, MEMBERS);
    let served = Served::start(sandbox, &images, arguments);
    let source = sandbox.join("source");
    pattern(&source, served.size(), 7);
    served.fill(&source);
    (images, served, bytes_of(&source))
}

fn contents(sandbox: &Sandbox, served: &Served) -> Vec<u8> {
    let copy = sandbox.join("copy");
    served.dump(&copy);
    bytes_of(&copy)
}

#[test]
fn a_member_fails_goes_and_another_takes_its_place() {
    let sandbox = Sandbox::new();
    let (images, served, filled) = filled(&sandbox, 4, "");
    // A relative path, as typed in the directory of the images.
    raid10(&sandbox, &["fail", "vol", "disk1.img"]);
    assert_eq!(status(&sandbox)["state"], "degraded");
    raid10(&sandbox, &["remove", "vol", images[1].to_str().unwrap()]);
    assert_eq!(status(&sandbox)["members"][1]["state"], "missing");
    let human = raid10(&sandbox, &["status", "vol"]);
    assert!(human.contains("raid10 add vol PATH"), "{human}");
    blank(&sandbox, "new.img", 16 << 20);
    let said = raid10(&sandbox, &["add", "vol", "new.img"]);
    assert!(said.contains("slot 1"), "{said}");
    raid10(&sandbox, &["wait", "vol"]);
    assert_eq!(states(&sandbox), ["in_sync"; 4]);
    assert_ne!(status(&sandbox)["state"], "degraded");
    assert!(contents(&sandbox, &served) == filled);
    // What was rebuilt is what is read when its partner goes.
    raid10(&sandbox, &["fail", "vol", "0"]);
    assert!(contents(&sandbox, &served) == filled);
    served.stop();
}

#[test]
fn a_spare_takes_over_by_itself() {
    let sandbox = Sandbox::new();
    let (_, served, filled) = filled(&sandbox, 4, "");
    blank(&sandbox, "spare.img", 16 << 20);
    let said = raid10(&sandbox, &["add", "vol", "spare.img"]);
    assert!(said.contains("spare"), "{said}");
    assert_eq!(states(&sandbox)[4], "spare");
    raid10(&sandbox, &["fail", "vol", "2"]);
    let spare = sandbox.join("spare.img");
    eventually("the spare to be in sync", Duration::from_secs(60), || {
        let status = status(&sandbox);
        let member = &status["members"][2];
        (member["path"] == spare.to_str().unwrap() && member["state"] == "in_sync").then_some(())
    });
    raid10(&sandbox, &["fail", "vol", "3"]);
    assert!(contents(&sandbox, &served) == filled);
    served.stop();
}

#[test]
fn a_member_that_works_is_replaced() {
    let sandbox = Sandbox::new();
    let (_, served, filled) = filled(&sandbox, 2, "");
    blank(&sandbox, "new.img", 16 << 20);
    raid10(&sandbox, &["replace", "vol", "0", "new.img"]);
    let new = sandbox.join("new.img");
    eventually("the new member to hold the slot", Duration::from_secs(60), || {
        let status = status(&sandbox);
        let member = &status["members"][0];
        (member["path"] == new.to_str().unwrap() && member["state"] == "in_sync").then_some(())
    });
    raid10(&sandbox, &["fail", "vol", "1"]);
    assert!(contents(&sandbox, &served) == filled);
    served.stop();
}

#[test]
fn wrong_commands_are_refused_and_change_nothing() {
    let sandbox = Sandbox::new();
    let (images, served, filled) = filled(&sandbox, 2, "");
    let other = [sandbox.join("other0"), sandbox.join("other1")];
    create(&sandbox, &other, "--size 16M --name other");
    blank(&sandbox, "small.img", 4 << 20);
    blank(&sandbox, "new.img", 16 << 20);
    let new = bytes_of(&sandbox.join("new.img"));
    let before = states(&sandbox);
    let disk0 = images[0].to_str().unwrap();
    for (words, parts) in [
        (&["fail", "vol", "7"][..], &["vol", "slot 7"][..]),
        (&["fail", "vol", "no-such.img"], &["no-such.img", "raid10 status"]),
        (&["remove", "vol", "0"], &["disk0.img"]),
        (&["add", "vol", "small.img"], &["small.img", "bytes"]),
        (&["add", "vol", "other0"], &["other0", "--force"]),
        (&["add", "vol", disk0], &["in sync in slot 0"]),
        (&["add", "vol", "none.img"], &["none.img", "No such file"]),
        (&["add", "vol", "run"], &["run"]),
        (&["replace", "vol", "0", disk0], &["in sync in slot 0"]),
        (&["replace", "vol", "7", "new.img"], &["slot 7"]),
        (&["replace", "vol", "0", "small.img"], &["small.img", "bytes"]),
        (&["limit", "vol", "--min", "2M", "--max", "1M"], &["no speed is both"]),
    ] {
        refused(&sandbox, words, parts);
        assert_eq!(states(&sandbox), before, "{words:?}");
    }
    raid10(&sandbox, &["fail", "vol", "0"]);
    let before = states(&sandbox);
    refused(&sandbox, &["fail", "vol", "1"], &["disk1.img", "last good copy"]);
    assert_eq!(states(&sandbox), before);
    assert!(contents(&sandbox, &served) == filled);
    assert!(bytes_of(&sandbox.join("new.img")) == new, "a refused replacement was written to");
    served.stop();
    for words in [&["fail", disk0, "0"][..], &["add", disk0, "new.img"], &["wait", disk0], &["limit", disk0]]
    {
        refused(&sandbox, words, &["not being served", "raid10 serve"]);
    }
    for words in
        [&["fail", "vol"][..], &["add"], &["replace", "vol", "0"], &["limit", "vol", "--min", "fast"]]
    {
        refuse(sandbox.raid10().args(words), 2);
    }
}

#[test]
fn limits_are_set_at_the_start_and_live() {
    let sandbox = Sandbox::new();
    let (_, served, _) = filled(&sandbox, 2, "--sync-min 2M --sync-max 8M");
    assert_eq!(raid10(&sandbox, &["limit", "vol"]).trim(), "min 2 MiB/s, max 8 MiB/s");
    raid10(&sandbox, &["limit", "vol", "--max", "none"]);
    assert_eq!(raid10(&sandbox, &["limit", "vol", "--min", "3M"]).trim(), "min 3 MiB/s, max no limit");
    served.stop();
}

/// A program for `--on-event` that appends its arguments and its stdin to a file.
fn program(sandbox: &Sandbox) -> (PathBuf, PathBuf) {
    let (program, out) = (sandbox.join("program"), sandbox.join("events"));
    std::fs::write(&program, format!("#!/bin/sh\n{{ echo \"$@\"; cat; }} >>'{}'\n", out.display()))
        .expect("the sandbox can be written");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("the file is ours");
    (program, out)
}

#[test]
fn a_program_is_told_what_happens() {
    let sandbox = Sandbox::new();
    let (program, out) = program(&sandbox);
    let (images, served, _) = filled(&sandbox, 2, &format!("--on-event {}", program.display()));
    raid10(&sandbox, &["fail", "vol", "1"]);
    served.stop();
    let said = std::fs::read_to_string(out).expect("the program has run");
    assert!(said.contains(&format!("Fail vol {}\n", images[1].display())), "{said}");
    let document = said.lines().find(|line| line.starts_with('{') && line.contains("\"Fail\""));
    let document: Value = serde_json::from_str(document.expect("a document")).unwrap();
    assert_eq!((&document["volume"], &document["slot"]), (&"vol".into(), &1.into()));
}

#[test]
fn a_program_that_is_none_is_refused_before_the_array_is_touched() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(2);
    create(&sandbox, &images, MEMBERS);
    let before = bytes_of(&images[0]);
    for program in ["./nothing", "run", "disk0.img"] {
        let said = refuse(sandbox.raid10().arg("serve").args(&images).args(["--on-event", program]), 1);
        assert!(said.contains(program) && said.contains("executable"), "{said}");
    }
    assert!(bytes_of(&images[0]) == before);
}

/// An image file of noise.
fn noise(sandbox: &Sandbox, name: &str, size: u64) -> PathBuf {
    let path = sandbox.join(name);
    pattern(&path, size, 0xbad);
    path
}

/// Overwrites a page of a member's data area; gives where in the file.
fn plant(image: &Path, page: u64) -> u64 {
    let at = superblock(image).data_start() + page * 4096;
    spoil(image, at, 4096);
    at
}

#[test]
fn a_scrub_says_what_differs_and_where_and_mends_it() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(3);
    create(&sandbox, &images, "--size 16M --chunk 64K --name vol --layout n3");
    let served = Served::start(&sandbox, &images, "");
    let source = sandbox.join("source");
    pattern(&source, served.size(), 7);
    served.fill(&source);
    let all_equal = raid10(&sandbox, &["scrub", "vol", "--wait"]);
    assert_eq!(all_equal.trim(), "no mismatches: all copies are equal");
    // The first in slot order and another: neither is what the other two say.
    let places = [(0, plant(&images[0], 100)), (2, plant(&images[2], 1000))];
    for (repair, became) in [(&["--wait"][..], "left as they are"), (&["--repair", "--wait"], "made equal")] {
        let said = raid10(&sandbox, &[&["scrub", "vol"], repair].concat());
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 3, "{said}");
        for (line, (slot, at)) in lines.iter().zip(places) {
            let odd = format!("{} at sector {} (byte {at}) (the odd one)", images[slot].display(), at / 512);
            assert!(line.contains(&odd) && line.ends_with(became), "not `{odd}`: {said}");
            assert!(images.iter().all(|image| line.contains(image.to_str().unwrap())), "{said}");
        }
        assert!(lines[2].starts_with("2 mismatches"), "{said}");
        assert_eq!(status(&sandbox)["mismatches"], 2);
    }
    let report: Value =
        serde_json::from_str(&raid10(&sandbox, &["scrub", "vol", "--wait", "--json"])).expect("one document");
    assert_eq!((&report["found"], &report["finished"]), (&0.into(), &true.into()), "{report}");
    assert_eq!(status(&sandbox)["mismatches"], 0);
    assert!(contents(&sandbox, &served) == bytes_of(&source));
    served.stop();
}

#[test]
fn an_array_grows_with_its_members() {
    let sandbox = Sandbox::new();
    let (images, served, mut filled) = filled(&sandbox, 3, "");
    let before = served.size();
    refused(&sandbox, &["grow", "vol"], &["disk0.img", "bytes"]);
    for (at, image) in images.iter().enumerate() {
        // Until the last one has grown, there is nothing to gain.
        let size = if at == 1 { 20 << 20 } else { 24 << 20 };
        File::options().write(true).open(image).and_then(|file| file.set_len(size)).expect("it is ours");
        if at < 2 {
            refused(&sandbox, &["grow", "vol"], &["disk2.img", "16777216 bytes"]);
        }
    }
    assert_eq!(served.size(), before);
    raid10(&sandbox, &["fail", "vol", "2"]);
    refused(&sandbox, &["grow", "vol"], &["vol", "in sync"]);
    raid10(&sandbox, &["remove", "vol", "2"]);
    raid10(&sandbox, &["add", "vol", images[2].to_str().unwrap()]);
    raid10(&sandbox, &["wait", "vol"]);
    let said = raid10(&sandbox, &["grow", "vol"]);
    // Three members, two copies: what the smallest has gained, half as much again.
    let size = served.size();
    assert!(size >= before + (6 << 20) - (3 << 16) && size <= before + (6 << 20), "{before} and {size}");
    assert!(said.contains(&format!("({size} bytes)")), "{said}");
    assert_eq!(status(&sandbox)["size"], size);
    filled.resize(size as usize, 0);
    assert!(contents(&sandbox, &served) == filled);
    let source = sandbox.join("source");
    pattern(&source, size, 8);
    served.fill(&source);
    served.stop();
    let served = Served::start(&sandbox, &images, "");
    assert!(contents(&sandbox, &served) == bytes_of(&source));
    let said = raid10(&sandbox, &["scrub", "vol", "--wait"]);
    assert!(said.contains("no mismatches"), "{said}");
    served.stop();
}

#[test]
fn a_far_array_does_not_grow() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(2);
    create(&sandbox, &images, &format!("{MEMBERS} --layout f2"));
    let served = Served::start(&sandbox, &images, "");
    for image in &images {
        File::options().write(true).open(image).and_then(|file| file.set_len(24 << 20)).expect("it is ours");
    }
    let before = served.size();
    refused(&sandbox, &["grow", "vol"], &["vol", "far=2"]);
    assert_eq!(served.size(), before);
    served.stop();
}

#[test]
fn a_spare_from_the_start_takes_over_and_is_seen_to() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(3);
    let spare = sandbox.join("spare.img");
    create(&sandbox, &images[..2], &format!("{MEMBERS} --spare {}", spare.display()));
    let served = Served::start(&sandbox, &[images[..2].to_vec(), vec![spare.clone()]].concat(), "");
    let source = sandbox.join("source");
    pattern(&source, served.size(), 7);
    served.fill(&source);
    assert_eq!(states(&sandbox), ["in_sync", "in_sync", "spare"]);
    raid10(&sandbox, &["limit", "vol", "--min", "1M", "--max", "2M"]);
    raid10(&sandbox, &["fail", "vol", "0"]);
    let seat = || status(&sandbox)["members"][0].clone();
    eventually("the spare to have the slot", Duration::from_secs(60), || {
        (seat()["path"] == spare.to_str().unwrap()).then_some(())
    });
    let now = status(&sandbox);
    assert_eq!(
        (&now["state"], &now["members"][0]["state"]),
        (&"degraded".into(), &"rebuilding".into()),
        "{now}"
    );
    assert_eq!(now["sync"]["action"], "recover", "{now}");
    raid10(&sandbox, &["limit", "vol", "--max", "none"]);
    raid10(&sandbox, &["wait", "vol"]);
    assert_eq!(seat()["state"], "in_sync");
    assert_ne!(status(&sandbox)["state"], "degraded");
    raid10(&sandbox, &["fail", "vol", "1"]);
    assert!(contents(&sandbox, &served) == bytes_of(&source));
    served.stop();
}

#[test]
fn a_member_of_another_array_joins_by_force_alone() {
    let sandbox = Sandbox::new();
    let (_, served, filled) = filled(&sandbox, 2, "");
    let other = [sandbox.join("other0"), sandbox.join("other1")];
    create(&sandbox, &other, "--size 16M --name other");
    raid10(&sandbox, &["fail", "vol", "1"]);
    raid10(&sandbox, &["remove", "vol", "1"]);
    let before = bytes_of(&other[0]);
    refused(&sandbox, &["add", "vol", "other0"], &["other0", "--force"]);
    assert!(bytes_of(&other[0]) == before, "refused, but written to");
    let said = raid10(&sandbox, &["add", "vol", "other0", "--force"]);
    assert!(said.contains("other0 is being rebuilt in slot 1"), "{said}");
    raid10(&sandbox, &["wait", "vol"]);
    assert_eq!(states(&sandbox), ["in_sync"; 2]);
    raid10(&sandbox, &["fail", "vol", "0"]);
    assert!(contents(&sandbox, &served) == filled);
    served.stop();
    assert_eq!(superblock(&other[0]).name, "vol");
}

#[test]
fn a_member_that_was_away_is_given_what_it_missed_alone() {
    let sandbox = Sandbox::new();
    let images = sandbox.images(2);
    create(&sandbox, &images, &format!("{MEMBERS} --bitmap-chunk 64K"));
    let served = Served::start(&sandbox, &images, "");
    let source = sandbox.join("source");
    pattern(&source, served.size(), 7);
    served.fill(&source);
    // A stop leaves no bit set: only what comes is missing then.
    served.stop();
    // All of it would take four minutes.
    let served = Served::start(&sandbox, &images, "--sync-min 64K --sync-max 64K");
    raid10(&sandbox, &["fail", "vol", "1"]);
    raid10(&sandbox, &["remove", "vol", "1"]);
    let write = "write -P 0x77 4M 64k";
    succeed(sandbox.command("qemu-io").args(["-f", "raw", &served.uri(), "-c", write, "-c", "flush"]));
    // Whether it is looked at at all: what is wrong elsewhere on it stays so.
    let elsewhere = plant(&images[1], 100);
    let said = raid10(&sandbox, &["add", "vol", images[1].to_str().unwrap()]);
    assert!(said.contains("is back in slot 1; what it missed is being copied"), "{said}");
    raid10(&sandbox, &["wait", "vol"]);
    assert_eq!(states(&sandbox), ["in_sync"; 2]);
    raid10(&sandbox, &["limit", "vol", "--max", "none"]);
    let said = raid10(&sandbox, &["scrub", "vol", "--wait"]);
    assert!(said.contains(&format!("(byte {elsewhere})")) && said.contains("1 mismatches"), "{said}");
    served.stop();
}

#[test]
fn a_volume_that_is_served_read_only_is_not_changed() {
    let sandbox = Sandbox::new();
    let (images, served, filled) = filled(&sandbox, 3, "");
    served.stop();
    noise(&sandbox, "new.img", 16 << 20);
    let all =
        || images.iter().chain([&sandbox.join("new.img")]).map(|path| bytes_of(path)).collect::<Vec<_>>();
    let before = all();
    let served = Served::start(&sandbox, &images, "--read-only");
    for words in [
        &["fail", "vol", "0"][..],
        &["remove", "vol", "0"],
        &["add", "vol", "new.img"],
        &["add", "vol", "new.img", "--force"],
        &["replace", "vol", "0", "new.img"],
        &["scrub", "vol"],
        &["scrub", "vol", "--repair"],
        &["grow", "vol"],
    ] {
        refused(&sandbox, words, &["read-only"]);
        assert_eq!(states(&sandbox), ["in_sync"; 3], "{words:?}");
    }
    assert!(contents(&sandbox, &served) == filled);
    served.stop();
    assert!(all() == before, "something was written");
}

#[test]
fn of_two_commands_at_once_each_sees_what_the_other_did() {
    let sandbox = Sandbox::new();
    let (_, served, filled) = filled(&sandbox, 2, "");
    let at_once = |words: [&[&str]; 2]| {
        let sandbox = &sandbox;
        std::thread::scope(|threads| {
            let running = words.map(|words| threads.spawn(move || run(sandbox.raid10().args(words))));
            running.map(|one| one.join().expect("it ends"))
        })
    };
    // Either may be the first; the other would take the last good copy.
    let ended = at_once([&["fail", "vol", "0"], &["fail", "vol", "1"]]);
    let failed = usize::from(ended[0].code() == 0);
    let codes = ended.each_ref().map(Ended::code);
    assert_eq!(codes[1 - failed], 0, "{ended:?}");
    assert_refusal("fail", &ended[failed], 1);
    assert!(ended[failed].stderr.contains("last good copy"), "{ended:?}");
    // One vacant slot, two that want it: the other waits as a spare.
    raid10(&sandbox, &["remove", "vol", &(1 - failed).to_string()]);
    let (one, other) = (noise(&sandbox, "one.img", 16 << 20), noise(&sandbox, "other.img", 16 << 20));
    let (one, other) = (one.to_str().unwrap(), other.to_str().unwrap());
    let ended = at_once([&["add", "vol", one], &["add", "vol", other]]);
    assert!(ended.iter().all(|one| one.code() == 0), "{ended:?}");
    let said = |what: &str| ended.iter().filter(|one| one.stdout.contains(what)).count();
    assert_eq!((said("is being rebuilt in slot"), said("is a spare")), (1, 1), "{ended:?}");
    raid10(&sandbox, &["wait", "vol"]);
    assert_eq!(states(&sandbox), ["in_sync", "in_sync", "spare"]);
    assert!(contents(&sandbox, &served) == filled);
    served.stop();
}

#[test]
fn a_rebuild_is_no_faster_than_it_may_be() {
    const RATE: u64 = 1 << 20;
    let sandbox = Sandbox::new();
    let (_, served, filled) = filled(&sandbox, 2, "--sync-max 1M");
    raid10(&sandbox, &["fail", "vol", "1"]);
    raid10(&sandbox, &["remove", "vol", "1"]);
    noise(&sandbox, "new.img", 16 << 20);
    let begun = Instant::now();
    raid10(&sandbox, &["add", "vol", "new.img"]);
    eventually("some megabytes to be rebuilt", Duration::from_secs(60), || {
        let sync = status(&sandbox)["sync"].clone();
        assert_eq!(sync["action"], "recover", "it has ended");
        // However slow this machine is: in so much time no more than this, but for the first window.
        let most = begun.elapsed().as_millis() as u64 * RATE / 1000 + (1 << 20);
        let done = sync["done"].as_u64().expect("a number");
        assert!(done <= most, "{done} bytes are done, {most} allowed");
        (done >= 3 << 20).then_some(())
    });
    raid10(&sandbox, &["limit", "vol", "--max", "none"]);
    raid10(&sandbox, &["wait", "vol"]);
    assert_eq!(states(&sandbox), ["in_sync"; 2]);
    raid10(&sandbox, &["fail", "vol", "0"]);
    assert!(contents(&sandbox, &served) == filled);
    served.stop();
}
