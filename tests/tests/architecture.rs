//! Holds what ARCHITECTURE.md calls invariants, as far as a look at the sources can: who depends on whom, what engine
//! and log code may not name, how a file looks. Each check is written so that a violation names file and line.

use std::path::{Path, PathBuf};
use std::process::Command;
use tests::process::{binary, repository, succeed};

/// Every Rust source file of the repository, as (path from the root, text).
fn sources() -> Vec<(PathBuf, String)> {
    let root = repository();
    let mut found = Vec::new();
    for member in ["raid", "logstore", "broker", "tests"] {
        walk(&root.join(member), &mut |path| {
            if path.extension().is_some_and(|ext| ext == "rs") {
                let text = std::fs::read_to_string(path).expect("a source file is UTF-8");
                found.push((path.strip_prefix(&root).expect("it lies under the root").to_owned(), text));
            }
        });
    }
    assert!(found.len() >= 10, "the walk found only {} files: it looks in the wrong place", found.len());
    found
}

fn walk(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("a directory can be read to its end").path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                walk(&path, visit);
            }
        } else {
            visit(&path);
        }
    }
}

/// Lines of code of a file: numbered from 1, without comments, and without its module of tests at the end.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let production = text.find(concat!("#[cfg(", "test)]\nmod tests")).map_or(text, |at| &text[..at]);
    production.lines().enumerate().filter_map(|(number, line)| {
        let line = line.split("//").next().unwrap_or("");
        (!line.trim().is_empty()).then_some((number + 1, line))
    })
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// Fails with all violations at once.
fn none(violations: &[String]) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

#[test]
fn dependencies_run_one_way() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(cargo);
    command.current_dir(repository()).args(["metadata", "--no-deps", "--format-version", "1"]);
    let metadata: serde_json::Value =
        serde_json::from_str(&succeed(&mut command)).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("a workspace has packages");
    let dependencies = |name: &str, dev: bool| -> Vec<String> {
        let package = packages.iter().find(|package| package["name"] == name);
        let all = package.unwrap_or_else(|| panic!("no crate {name}"))["dependencies"].as_array();
        let wanted = all.expect("dependencies are a list").iter().filter(|d| (d["kind"] == "dev") == dev);
        wanted.map(|d| d["name"].as_str().expect("a dependency has a name").to_owned()).collect()
    };
    let ours = ["raid", "logstore", "broker", "tests"];
    for (at, name) in ours.iter().enumerate() {
        let allowed = &ours[..at];
        for dependency in [dependencies(name, false), dependencies(name, true)].concat() {
            let fine = !ours.contains(&dependency.as_str()) || allowed.contains(&dependency.as_str());
            assert!(
                fine,
                "{name} depends on {dependency}; dependencies run tests → broker → logstore → raid"
            );
        }
    }
    for name in ["raid", "logstore"] {
        let knows = dependencies(name, false).contains(&"kafka-protocol".to_owned());
        assert!(!knows, "{name} depends on kafka-protocol; only the broker knows the wire protocol");
    }
    assert_eq!(packages.len(), ours.len(), "a new crate: say in this test what it may depend on");
}

/// The rooms at the edge, which may use tokio and the system's clock directly. All else in `raid` and `logstore` runs
/// on the simulated runtime too.
const EDGES: &[&str] = &[
    "raid/src/device/file.rs",
    "raid/src/device/write_back.rs",
    "raid/src/device/write_queue.rs",
    "raid/src/runtime/tokio_runtime.rs",
    "raid/src/nbd/",
    "raid/src/attach/",
    "raid/src/control",
    "raid/src/cli",
    "raid/src/main.rs",
    "raid/src/bin/",
    "logstore/src/directory",
];

#[test]
fn engine_and_log_reach_the_world_through_parameters() {
    let forbidden = [
        "tokio::time",
        "tokio::spawn",
        "tokio::task",
        "tokio::fs",
        "tokio::runtime",
        "spawn_blocking",
        "SystemTime",
        "Instant",
        "thread::spawn",
        "thread::sleep",
        "new_v4",
        "rand::",
        "getrandom",
    ];
    let mut violations = Vec::new();
    for (path, text) in sources() {
        let name = path.to_string_lossy().into_owned();
        let inside = name.starts_with("raid/src/") || name.starts_with("logstore/src/");
        // A module of tests in a file of its own is no part of what runs elsewhere.
        let is_tests = path.file_name().is_some_and(|name| name == "tests.rs");
        if !inside || is_tests || EDGES.iter().any(|edge| name.starts_with(edge)) {
            continue;
        }
        for (number, line) in code(&text) {
            for banned in forbidden.iter().filter(|banned| line.contains(**banned)) {
                violations
                    .push(format!("{name}:{number}: {banned}: take it from the Runtime or Device given"));
            }
        }
    }
    none(&violations);
}

#[test]
fn production_code_has_no_test_only_parts() {
    let mut violations = Vec::new();
    for (path, text) in sources() {
        for (number, line) in code(&text) {
            if line.contains(concat!("cfg(", "test)")) || line.contains(concat!("cfg!(", "test)")) {
                violations
                    .push(format!("{}:{number}: only a module `tests` at a file's end", path.display()));
            }
        }
    }
    none(&violations);
}

#[test]
fn files_are_tidy() {
    // Files that may hold `unsafe`, each for a reason given there.
    let may_be_unsafe: &[&str] = &["raid/src/device/resident.rs", "raid/src/device/write_back.rs"];
    let banned = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("dbg", "!("),
        concat!("#[", "ignore"),
        concat!("allow(", "unused"),
        concat!("allow(", "dead_code"),
    ];
    let mut violations = Vec::new();
    for (path, text) in sources() {
        let name = path.display();
        if !text.starts_with("//! ") {
            violations.push(format!("{name}:1: no head (`//!`) that says what the file owns"));
        }
        if text.lines().count() > 800 {
            violations
                .push(format!("{name}: {} lines; at most 800: it has two subjects", text.lines().count()));
        }
        for (number, line) in text.lines().enumerate().map(|(i, line)| (i + 1, line)) {
            if line.trim_end().len() != line.len() {
                violations.push(format!("{name}:{number}: white space at the end"));
            }
            for word in banned.iter().filter(|word| line.contains(**word)) {
                violations.push(format!("{name}:{number}: {word}"));
            }
        }
        let named = may_be_unsafe.contains(&path.to_string_lossy().as_ref());
        for (number, line) in code(&text).filter(|_| !named) {
            if words(line).any(|word| word == concat!("un", "safe")) {
                violations.push(format!("{name}:{number}: only files named here may"));
            }
        }
    }
    none(&violations);
}

#[test]
fn documents_are_there_and_their_links_lead_somewhere() {
    let root = repository();
    let mut violations = Vec::new();
    for name in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "images/README.md"] {
        let text = std::fs::read_to_string(root.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let home = root.join(name);
        let home = home.parent().expect("a file lies in a directory");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or("");
            if !target.contains("://") && !home.join(target).exists() {
                violations.push(format!("{name}: link to {link}, which is not there"));
            }
        }
    }
    for name in ["LICENSE-MIT", "LICENSE-APACHE", "deny.toml", "clippy.toml", "rustfmt.toml", "Cargo.lock"] {
        if !root.join(name).is_file() {
            violations.push(format!("no {name}"));
        }
    }
    none(&violations);
}

/// The shell lines of a document's shell blocks.
fn shell_lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        match line.strip_prefix("```") {
            Some(language) => inside = language == "sh",
            None if inside => lines.push(line.split(" # ").next().unwrap_or("").trim().to_owned()),
            None => {}
        }
    }
    lines.retain(|line| !line.is_empty());
    lines
}

/// A README command that no longer exists is the first thing a newcomer meets: each of our commands in it, and each
/// of its flags, must be in that command's own help.
#[test]
fn commands_of_the_readme_exist() {
    let root = repository();
    let readme = std::fs::read_to_string(root.join("README.md")).expect("README.md is there");
    let mut seen = 0;
    for line in shell_lines(&readme) {
        let line = line.replace("cargo run --release -p raid --bin raid10 --", "raid10");
        let mut words = line.split_whitespace();
        let Some(program) = words.next() else { continue };
        if program == "tests/run" {
            assert!(root.join(program).is_file(), "README: no {program}");
        }
        if program != "raid10" && program != "broker" {
            continue;
        }
        let rest: Vec<&str> = words.collect();
        let ask = |words: &[&str]| succeed(Command::new(binary(program)).args(words).arg("--help"));
        let mut depth = rest.iter().take(1).filter(|word| !word.starts_with('-')).count();
        let mut help = ask(&rest[..depth]);
        // A command may have commands of its own.
        while let Some(word) = rest.get(depth).filter(|_| depth > 0)
            && help.lines().any(|line| line.starts_with("  ") && line.split_whitespace().next() == Some(word))
            && help.contains("Commands:")
        {
            depth += 1;
            help = ask(&rest[..depth]);
        }
        for flag in rest.iter().filter(|word| word.starts_with("--")) {
            assert!(help.contains(*flag), "README: `{line}`: {program} --help does not know {flag}");
        }
        seen += 1;
    }
    assert!(seen >= 3, "README: no commands of ours found, the check looks at the wrong thing");
}
