//! The life of an array through the command line, while it is served: members fail, go, come, are replaced, and data
//! stays as it was. Every wrong command is refused in one line, and nothing changes.

use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;
use tests::process::{Sandbox, bytes_of, eventually, refuse, succeed};
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
