//! What a disk holds of the files below a directory, from strace's record of the processes that worked there: the contents
//! and the names that were synced, and of the rest as much as chance leaves. A power cut is then a matter of looking at it
//! between any two calls.
//!
//! What is assumed of a file system is what POSIX promises and no more: `fsync` and `fdatasync` of a file make its content
//! and length durable, not its name; `fsync` of a directory makes the names in it durable. A sync covers what was done before
//! it began, and counts when it has returned. What was done and not synced may be there after a cut or not: of a file its
//! content as a whole, of a directory its names as a whole, or each change of a name by itself (a rename is one).
//!
//! Not modelled: torn content, and more than one name of a file. `write` is taken for an append, which is how small files
//! are written here.

use crate::process::Sandbox;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The calls that change files or make them durable.
const CALLS: &str = "open,openat,creat,write,writev,pwrite64,pwritev,pwritev2,ftruncate,truncate,fallocate,fsync,fdatasync,\
                     rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,sync,syncfs,\
                     sync_file_range,copy_file_range";

/// A command under strace, which writes its record to `trace`.
#[must_use]
pub fn traced(sandbox: &Sandbox, trace: &Path, program: &Path, arguments: &[&str]) -> Command {
    let mut command = sandbox.command("strace");
    command.args(["-f", "-y", "-xx", "-s", "16777216", "-e", &format!("trace={CALLS}"), "-o"]);
    command.arg(trace).arg(program).args(arguments);
    command
}

/// What is left of what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Nothing.
    Nothing,
    /// For each file and each directory all or nothing, by dice with this seed.
    Some(u64),
    /// For each file all or nothing, and of each directory some changes and not others.
    Each(u64),
}

/// Syncs that a disk pretends to have done, so that a test can be shown to notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// Those of files with this ending.
    Files(&'static str),
    /// Those of directories.
    Directories,
    /// Those of directories in which the last that was done was to rename a file with this in its name.
    Renamed(&'static str),
}

/// A change of a directory's names that no sync has covered yet.
#[derive(Debug, Clone)]
enum Change {
    Put(String, usize),
    Remove(String),
    Rename(String, String, usize),
}

impl Change {
    fn carry_out(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Put(name, at) => drop(names.insert(name.clone(), *at)),
            Self::Remove(name) => drop(names.remove(name)),
            Self::Rename(from, to, at) => {
                names.remove(from);
                names.insert(to.clone(), *at);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Node {
    File {
        now: Vec<u8>,
        disk: Vec<u8>,
    },
    Directory {
        now: BTreeMap<String, usize>,
        disk: BTreeMap<String, usize>,
        /// What makes the one of the other, each with its number.
        since: Vec<(usize, Change)>,
    },
}

impl Node {
    fn directory() -> Self {
        Self::Directory { now: BTreeMap::new(), disk: BTreeMap::new(), since: Vec::new() }
    }
}

/// What a sync will have made durable when it returns.
#[derive(Debug)]
enum Covered {
    Content(Vec<u8>),
    /// All that was changed before this number.
    Names(BTreeMap<String, usize>, usize),
}

/// A disk with a directory on it, as processes change it.
#[derive(Debug)]
pub struct Disk {
    root: PathBuf,
    nodes: Vec<Node>,
    lie: Option<Lie>,
    /// Changes of names so far.
    changes: usize,
    /// By thread, a call that has begun, and what it covers if it is a sync.
    begun: HashMap<String, (String, Option<(usize, Covered)>)>,
}

/// What a line of the record was.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// A line on standard output.
    Said(String),
    /// The files changed.
    Changed,
    /// A sync has returned.
    Synced,
    /// Nothing that matters.
    Nothing,
}

impl Disk {
    /// One on which `root` is empty, durably.
    #[must_use]
    pub fn new(root: &Path, lie: Option<Lie>) -> Self {
        Self { root: root.to_owned(), nodes: vec![Node::directory()], lie, changes: 0, begun: HashMap::new() }
    }

    /// How many changes of names no sync has covered.
    #[must_use]
    pub fn open_names(&self) -> usize {
        let open = |node: &Node| if let Node::Directory { since, .. } = node { since.len() } else { 0 };
        self.nodes.iter().map(open).sum()
    }

    /// Follows one line of the record.
    pub fn follow(&mut self, line: &str) -> Step {
        let Some((thread, call)) = line.split_once(' ') else { return Step::Nothing };
        let mut call = call.trim_start().to_owned();
        if let Some(begun) = call.strip_suffix(" <unfinished ...>") {
            let covered = self.covered(begun);
            self.begun.insert(thread.to_owned(), (begun.to_owned(), covered));
            return Step::Nothing;
        }
        let mut covered = None;
        if call.starts_with("<... ") {
            let Some((begun, earlier)) = self.begun.remove(thread) else { return Step::Nothing };
            let rest = call.split_once("resumed>").map_or("", |(_, rest)| rest);
            call = format!("{begun}{rest}");
            covered = earlier;
        } else if let Some(found) = self.covered(&call) {
            covered = Some(found);
        }
        let Some((head, result)) = call.rsplit_once(" = ") else { return Step::Nothing };
        let Some((name, arguments)) = head.trim_end().strip_suffix(')').and_then(|head| head.split_once('('))
        else {
            return Step::Nothing;
        };
        if result.starts_with('-') || result.starts_with('?') {
            return Step::Nothing;
        }
        let arguments = split(arguments);
        self.carry_out(name, &arguments, result, covered)
    }

    fn carry_out(
        &mut self,
        name: &str,
        arguments: &[&str],
        result: &str,
        covered: Option<(usize, Covered)>,
    ) -> Step {
        let argument = |at: usize| arguments.get(at).copied().unwrap_or_default();
        match name {
            "write" if argument(0).starts_with("1<") => {
                return Step::Said(String::from_utf8_lossy(&unquoted(argument(1))).trim_end().to_owned());
            }
            "open" | "creat" => return self.open(&path_of(argument(0)), argument(1)),
            "openat" => return self.open(&path_of(argument(1)), argument(2)),
            "write" => return self.change(argument(0), |now| now.extend(unquoted(argument(1)))),
            "pwrite64" => {
                let (bytes, at) = (unquoted(argument(1)), number(argument(3)));
                return self.change(argument(0), |now| {
                    now.resize(now.len().max(at + bytes.len()), 0);
                    now[at..at + bytes.len()].copy_from_slice(&bytes);
                });
            }
            "ftruncate" => return self.change(argument(0), |now| now.resize(number(argument(1)), 0)),
            "fallocate" => {
                // Blocks are no content; only a plain one changes the length.
                let end = number(argument(2)) + number(argument(3));
                let is_plain = argument(1) == "0";
                return self.change(argument(0), |now| {
                    if is_plain {
                        now.resize(now.len().max(end), 0);
                    }
                });
            }
            "fsync" | "fdatasync" => return self.synced(covered),
            "mkdir" => return self.make_directory(&path_of(argument(0))),
            "mkdirat" => return self.make_directory(&path_of(argument(1))),
            "rename" => return self.rename(&path_of(argument(0)), &path_of(argument(1))),
            "renameat" | "renameat2" => return self.rename(&path_of(argument(1)), &path_of(argument(3))),
            "unlink" | "rmdir" => return self.remove(&path_of(argument(0))),
            "unlinkat" => {
                let (dir, path) = (argument(0), path_of(argument(1)));
                let path = if path.is_absolute() { path } else { path_of_fd(dir).join(path) };
                return self.remove(&path);
            }
            _ => {}
        }
        let is_ours =
            |word: &str| [path_of_fd(word), path_of(word)].iter().any(|path| path.starts_with(&self.root));
        let concerned = arguments.iter().any(|word| is_ours(word));
        assert!(!concerned, "{name} is not modelled: {arguments:?} = {result}");
        Step::Nothing
    }

    /// The directory's number and the name in it.
    fn parent(&self, path: &Path) -> Option<(usize, String)> {
        let inside = path.strip_prefix(&self.root).ok()?;
        let name = inside.file_name()?.to_str()?.to_owned();
        Some((self.find(path.parent()?)?, name))
    }

    fn find(&self, path: &Path) -> Option<usize> {
        let mut at = 0;
        for name in path.strip_prefix(&self.root).ok()?.components() {
            let Node::Directory { now, .. } = &self.nodes[at] else { return None };
            at = *now.get(name.as_os_str().to_str()?)?;
        }
        Some(at)
    }

    /// Changes the names in a directory.
    fn change_names(&mut self, at: usize, change: Change) -> Step {
        let Node::Directory { now, since, .. } = &mut self.nodes[at] else {
            panic!("a file was taken for a directory")
        };
        change.carry_out(now);
        since.push((self.changes, change));
        self.changes += 1;
        Step::Changed
    }

    fn named(&self, dir: usize, name: &str) -> usize {
        let Node::Directory { now, .. } = &self.nodes[dir] else {
            panic!("a file was taken for a directory")
        };
        *now.get(name).unwrap_or_else(|| panic!("{name} was not there"))
    }

    fn put(&mut self, path: &Path, node: Node) -> Step {
        let Some((dir, name)) = self.parent(path) else { return Step::Nothing };
        let at = self.nodes.len();
        self.nodes.push(node);
        self.change_names(dir, Change::Put(name, at))
    }

    fn open(&mut self, path: &Path, flags: &str) -> Step {
        match self.find(path).map(|at| &mut self.nodes[at]) {
            Some(Node::File { now, .. }) if flags.contains("O_TRUNC") => now.clear(),
            None if flags.contains("O_CREAT") => {
                return self.put(path, Node::File { now: Vec::new(), disk: Vec::new() });
            }
            _ => return Step::Nothing,
        }
        Step::Changed
    }

    fn make_directory(&mut self, path: &Path) -> Step {
        self.put(path, Node::directory())
    }

    fn change(&mut self, fd: &str, how: impl FnOnce(&mut Vec<u8>)) -> Step {
        let Some(at) = self.find(&path_of_fd(fd)) else { return Step::Nothing };
        let Node::File { now, .. } = &mut self.nodes[at] else { panic!("a directory was written to") };
        how(now);
        Step::Changed
    }

    fn rename(&mut self, from: &Path, to: &Path) -> Step {
        let (Some((old, from)), Some((new, to))) = (self.parent(from), self.parent(to)) else {
            return Step::Nothing;
        };
        let at = self.named(old, &from);
        if old == new {
            return self.change_names(new, Change::Rename(from, to, at));
        }
        self.change_names(old, Change::Remove(from));
        self.change_names(new, Change::Put(to, at))
    }

    fn remove(&mut self, path: &Path) -> Step {
        let Some((dir, name)) = self.parent(path) else { return Step::Nothing };
        self.named(dir, &name);
        self.change_names(dir, Change::Remove(name))
    }

    /// What a sync that begins now will have made durable.
    fn covered(&self, call: &str) -> Option<(usize, Covered)> {
        let rest = call.strip_prefix("fsync(").or_else(|| call.strip_prefix("fdatasync("))?;
        let at = self.find(&path_of_fd(rest))?;
        let covered = match &self.nodes[at] {
            Node::File { now, .. } => {
                let path = path_of_fd(rest);
                let lies = |ending| path.extension().is_some_and(|found| found == ending);
                if matches!(self.lie, Some(Lie::Files(ending)) if lies(ending)) {
                    return None;
                }
                Covered::Content(now.clone())
            }
            Node::Directory { .. } if self.lie == Some(Lie::Directories) => return None,
            Node::Directory { since, .. }
                if matches!((self.lie, since.last()), (Some(Lie::Renamed(part)), Some((_, Change::Rename(from, ..))))
                    if from.contains(part)) =>
            {
                return None;
            }
            Node::Directory { now, .. } => Covered::Names(now.clone(), self.changes),
        };
        Some((at, covered))
    }

    fn synced(&mut self, covered: Option<(usize, Covered)>) -> Step {
        let Some((at, covered)) = covered else { return Step::Nothing };
        match (&mut self.nodes[at], covered) {
            (Node::File { disk, .. }, Covered::Content(content)) => *disk = content,
            (Node::Directory { disk, since, .. }, Covered::Names(names, before)) => {
                *disk = names;
                since.retain(|(number, _)| *number >= before);
            }
            _ => panic!("a number stands for one node"),
        }
        Step::Synced
    }

    /// Writes what the disk holds, if the power is cut now, to an empty directory.
    pub fn after_a_cut(&self, to: &Path, left: Left) {
        self.write(0, to, left);
    }

    /// What is there without a cut: the next process may go on with it.
    pub fn now(&self, to: &Path) -> std::io::Result<()> {
        fn put(disk: &Disk, at: usize, to: &Path) -> std::io::Result<()> {
            match &disk.nodes[at] {
                Node::File { now, .. } => std::fs::write(to, now),
                Node::Directory { now, .. } => {
                    std::fs::create_dir_all(to)?;
                    now.iter().try_for_each(|(name, at)| put(disk, *at, &to.join(name)))
                }
            }
        }
        put(self, 0, to)
    }

    fn write(&self, at: usize, to: &Path, left: Left) {
        let is_kept = match left {
            Left::Nothing => false,
            Left::Some(seed) | Left::Each(seed) => is_heads(seed, at),
        };
        match &self.nodes[at] {
            Node::File { now, disk } => {
                std::fs::write(to, if is_kept { now } else { disk }).expect("the sandbox can be written");
            }
            Node::Directory { now, disk, since } => {
                let mut names = disk.clone();
                match left {
                    Left::Each(seed) => {
                        let kept = since.iter().filter(|(number, _)| is_heads(!seed, *number));
                        kept.for_each(|(_, change)| change.carry_out(&mut names));
                    }
                    _ if is_kept => names.clone_from(now),
                    _ => {}
                }
                std::fs::create_dir_all(to).expect("the sandbox can be written");
                for (name, at) in &names {
                    self.write(*at, &to.join(name), left);
                }
            }
        }
    }
}

/// A toss for a number. Splitmix64: neighbours must not get like answers.
fn is_heads(seed: u64, number: usize) -> bool {
    let mut mixed = seed.wrapping_add((number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) & 1 == 1
}

/// The arguments of a call. Commas in strings are none here: every byte of them is written in hexadecimal.
fn split(arguments: &str) -> Vec<&str> {
    arguments.split(", ").collect()
}

/// The bytes of a string, `"\x41\x42"`.
fn unquoted(word: &str) -> Vec<u8> {
    let inner = word.trim_matches('"');
    let digits: Vec<u8> = inner.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("two digits"))
        .collect()
}

fn path_of(word: &str) -> PathBuf {
    PathBuf::from(String::from_utf8_lossy(&unquoted(word)).into_owned())
}

/// The path in `5<path>`; of one that has no name any more, none.
fn path_of_fd(word: &str) -> PathBuf {
    let path = word.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
    match path {
        Some((path, rest)) if !rest.starts_with("(deleted)") => path_of(path),
        _ => PathBuf::new(),
    }
}

fn number(word: &str) -> usize {
    word.parse().unwrap_or_else(|_| panic!("{word} is no number"))
}
