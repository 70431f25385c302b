//! A live volume through the worst week of its life: while fio writes, reads and verifies over three connections and a
//! fourth client keeps a diary of what was acknowledged, members fail, spares take over, images are deleted, truncated
//! and overwritten under the server, members are replaced, and the server is killed, twice. No error reaches a client
//! but by the kills, no byte is ever wrong, and at the end each member can be done without.
//!
//! Each step waits for what `raid10 status` says, or for clients to have got on, never for a time.
//!
//! Costs: about fifteen seconds a layout, next to no CPU of them in the test itself; fio's rate is limited.

use bytes::Bytes;
use parking_lot::Mutex;
use raid::nbd::wire::{CMD_FLAG_FUA, Request, SIMPLE_REPLY_LEN, SimpleReply};
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tests::nbd::Client;
use tests::process::{Sandbox, Server, bytes_of, eventually, left_out, succeed};
use tests::volumes::{Served, create, pattern, sha256};

const MEMBER: u64 = 64 << 20;
/// Where the volume is filled once and never written again; fio's jobs have 16 MiB each behind it.
const CANARY: u64 = 16 << 20;
/// Where the diarist writes: behind fio's.
const DIARY: u64 = 64 << 20;
const BLOCK: usize = 4096;
const BLOCKS: u64 = 512;
const PATIENCE: Duration = Duration::from_secs(60);

/// One volume and those at work on it.
struct Life {
    sandbox: Sandbox,
    served: Option<Served>,
    clients: Option<Clients>,
    diary: Arc<Mutex<Diary>>,
    /// Who the disks are that no slot needs now.
    shelf: Vec<PathBuf>,
    slots: usize,
    canary: Vec<u8>,
}

impl Life {
    fn begin(layout: &str, slots: usize) -> Self {
        let sandbox = Sandbox::new();
        let images = sandbox.images(slots);
        let spare = sandbox.join("spare.img");
        let arguments =
            format!("--size 64M --chunk 64K --name vol --layout {layout} --spare {}", spare.display());
        create(&sandbox, &images, &arguments);
        let all: Vec<PathBuf> = images.iter().chain([&spare]).cloned().collect();
        let served = Served::start(&sandbox, &all, "");
        let source = sandbox.join("canary");
        pattern(&source, CANARY, 3);
        served.fill(&source);
        let canary = bytes_of(&source);
        let diary = Arc::default();
        let mut life =
            Self { sandbox, served: Some(served), clients: None, diary, shelf: vec![], slots, canary };
        life.work();
        life
    }

    fn served(&self) -> &Served {
        self.served.as_ref().expect("it is served")
    }

    fn raid10(&self, words: &[&str]) -> String {
        succeed(self.sandbox.raid10().args(words))
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.raid10(&["status", "vol", "--json"])).expect("one JSON document")
    }

    /// Clients begin to work.
    fn work(&mut self) {
        self.clients = Some(Clients::start(&self.sandbox, self.served(), &self.diary));
        self.get_on();
    }

    /// Waits until clients have got on with what is now.
    fn get_on(&self) {
        let written = &self.clients.as_ref().expect("at work").written;
        let goal = written.load(Ordering::Relaxed) + 100;
        eventually("100 more blocks to be written", PATIENCE, || {
            (written.load(Ordering::Relaxed) >= goal).then_some(())
        });
    }

    /// The path of the member in a slot.
    fn member(&self, slot: usize) -> PathBuf {
        let status = self.status();
        let members = status["members"].as_array().expect("members");
        let member = members.iter().find(|one| one["slot"] == slot && one["state"] == "in_sync");
        let member = member.unwrap_or_else(|| panic!("slot {slot}: {status}"));
        member["path"].as_str().expect("a path").into()
    }

    /// Waits until every slot has a member in sync, and the slot's is not (or just is) this one.
    fn until_whole(&self, slot: usize, path: &Path, is_it: bool) {
        let mut seen = Value::Null;
        let is_whole = || {
            seen = self.status();
            let members = seen["members"].as_array().expect("members");
            let seated = |slot: usize| {
                members.iter().any(|one| {
                    let holds = one["slot"] == slot && one["state"] == "in_sync";
                    holds && (one["path"] == path.to_str().expect("plain") || !is_it)
                })
            };
            let others = members.iter().filter(|one| one["state"] == "in_sync").count();
            let gone = is_it
                || !members
                    .iter()
                    .any(|one| one["path"] == path.to_str().expect("plain") && one["state"] == "in_sync");
            (seated(slot) && others == self.slots && gone).then_some(())
        };
        eventually(&format!("slot {slot} to be whole again"), PATIENCE, is_whole);
        self.get_on();
    }

    fn fail(&self, path: &Path) {
        self.raid10(&["fail", "vol", path.to_str().expect("plain")]);
    }

    fn remove(&self, path: &Path) {
        self.raid10(&["remove", "vol", path.to_str().expect("plain")]);
    }

    fn add(&self, path: &Path, answer: &str) {
        let said = self.raid10(&["add", "vol", path.to_str().expect("plain")]);
        assert!(said.contains(answer), "{said}");
    }

    /// The spare that waits.
    fn spare(&self) -> PathBuf {
        let status = self.status();
        let members = status["members"].as_array().expect("members");
        let spare = members.iter().find(|one| one["state"] == "spare").unwrap_or_else(|| panic!("{status}"));
        spare["path"].as_str().expect("a path").into()
    }

    /// No spare from here on, so that a slot stays vacant.
    fn shelve_spare(&mut self) {
        let spare = self.spare();
        self.remove(&spare);
        self.shelf.push(spare);
    }

    fn unshelve_spare(&mut self) {
        let spare = self.shelf.pop().expect("one was shelved");
        self.add(&spare, "is a spare");
    }

    /// A spare takes over from a failed member, which returns as the spare.
    fn a_spare_takes_over(&self, slot: usize) {
        let failed = self.member(slot);
        self.fail(&failed);
        self.until_whole(slot, &failed, false);
        self.remove(&failed);
        self.add(&failed, "is a spare");
    }

    /// An image is deleted under the server, which does not notice; then it fails, and a new file of the same name
    /// comes.
    fn an_image_is_deleted(&self, slot: usize) {
        let deleted = self.member(slot);
        std::fs::remove_file(&deleted).expect("it is there");
        self.get_on();
        self.fail(&deleted);
        self.until_whole(slot, &deleted, false);
        self.remove(&deleted);
        blank(&deleted);
        self.add(&deleted, "is a spare");
    }

    /// A member is away for a while and is given what it missed.
    fn a_member_returns(&mut self, slot: usize) {
        self.shelve_spare();
        let away = self.member(slot);
        self.fail(&away);
        self.get_on();
        self.remove(&away);
        self.get_on();
        self.add(&away, &format!("is back in slot {slot}"));
        self.until_whole(slot, &away, true);
        self.unshelve_spare();
    }

    /// A failed member is overwritten from end to end, under the server, and comes back as it is.
    fn an_image_is_overwritten(&mut self, slot: usize) {
        self.shelve_spare();
        let victim = self.member(slot);
        self.fail(&victim);
        let garbage = self.sandbox.join("garbage");
        pattern(&garbage, MEMBER, 99);
        // In place, not a new file: the server has this one open.
        let mut file = File::options().write(true).open(&victim).expect("the image is ours");
        file.write_all(&bytes_of(&garbage)).expect("the sandbox has room");
        self.get_on();
        self.remove(&victim);
        self.add(&victim, &format!("rebuilt in slot {slot}"));
        self.until_whole(slot, &victim, true);
        self.unshelve_spare();
    }

    /// A member that works is replaced by a new file, and thrown away.
    fn a_member_is_replaced(&self, slot: usize, name: &str) {
        let leaving = self.member(slot);
        let new = self.sandbox.join(name);
        blank(&new);
        self.raid10(&["replace", "vol", &slot.to_string(), new.to_str().expect("plain")]);
        self.until_whole(slot, &new, true);
        self.remove(&leaving);
        std::fs::remove_file(&leaving).expect("it is there");
    }

    /// An image loses its second half under the server, which has to find out by itself.
    fn an_image_is_truncated(&self, slot: usize) {
        let cut = self.member(slot);
        let file = File::options().write(true).open(&cut).expect("the image is ours");
        file.set_len(MEMBER / 2).expect("the image is ours");
        self.until_whole(slot, &cut, false);
        self.remove(&cut);
        file.set_len(MEMBER).expect("the image is ours");
        self.add(&cut, "is a spare");
    }

    fn scrub(&self) {
        let said = self.raid10(&["scrub", "vol", "--wait"]);
        assert!(said.contains("no mismatches"), "{said}");
    }

    /// `kill -9` while all clients write, and a start with the same disks. What was read right after the start is
    /// what is read once all is equal again.
    fn is_killed(&mut self) {
        let status = self.status();
        let members = status["members"].as_array().expect("members");
        let disks: Vec<PathBuf> =
            members.iter().filter_map(|one| one["path"].as_str()).map(PathBuf::from).collect();
        let clients = self.clients.take().expect("at work");
        clients.killed.store(true, Ordering::SeqCst);
        self.served.take().expect("it is served").server.kill();
        clients.end();
        let served = Served::start(&self.sandbox, &disks, "");
        let early = self.diary.lock().check(served.socket());
        self.served = Some(served);
        self.raid10(&["wait", "vol"]);
        let late = self.diary.lock().check(self.served().socket());
        assert!(early == late, "a block that was read changed without a write");
        self.assert_canary();
    }

    fn assert_canary(&self) {
        let copy = self.sandbox.join("copy");
        self.served().dump(&copy);
        assert!(bytes_of(&copy)[..self.canary.len()] == self.canary, "what nobody wrote has changed");
    }

    /// Clients end in order, and the array is the same whichever member is missing.
    fn end(mut self) {
        self.clients.take().expect("at work").end();
        self.diary.lock().check(self.served().socket());
        self.assert_canary();
        let disks: Vec<PathBuf> = (0..self.slots).map(|slot| self.member(slot)).collect();
        self.served.take().expect("it is served").stop();
        let served = Served::start(&self.sandbox, &disks, "");
        self.served = Some(served);
        self.scrub();
        let size = self.served().size();
        let sum = |served: Served| {
            let copy = self.sandbox.join("copy");
            served.dump(&copy);
            served.stop();
            sha256(&copy, size)
        };
        let whole = sum(self.served.take().expect("it is served"));
        for missing in 0..self.slots {
            let mut rest = disks.clone();
            rest.remove(missing);
            let served = Served::start(&self.sandbox, &rest, "--read-only");
            assert_eq!(sum(served), whole, "without slot {missing}");
        }
    }
}

fn blank(path: &Path) {
    File::create_new(path).and_then(|file| file.set_len(MEMBER)).expect("the sandbox can be written");
}

/// fio and the diarist, each on a thread.
struct Clients {
    stop: Arc<AtomicBool>,
    killed: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    fio: JoinHandle<u32>,
    diarist: JoinHandle<()>,
}

impl Clients {
    fn start(sandbox: &Sandbox, served: &Served, diary: &Arc<Mutex<Diary>>) -> Self {
        let (stop, killed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let written = Arc::new(AtomicU64::new(0));
        let mut fio = sandbox.command("fio");
        fio.args(["--name=live", "--ioengine=nbd", "--rw=randrw", "--bsrange=4k-64k", "--randrepeat=0"]);
        fio.args(["--offset=16m", "--offset_increment=16m", "--size=16m", "--numjobs=3", "--iodepth=8"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_backlog=64"]);
        fio.args(["--verify_state_save=0", "--time_based", "--runtime=3", "--rate=8m,8m", "--thread"]);
        fio.arg(format!("--uri={}", served.uri()));
        let (ends, dies) = (Arc::clone(&stop), Arc::clone(&killed));
        let fio = std::thread::spawn(move || {
            let mut rounds = 0;
            loop {
                let mut round = Server::spawn(&mut fio);
                // fio's NBD engine goes round for ever when its server dies: it is ended here then.
                let status = eventually("a round of fio, or the kill", PATIENCE, || {
                    if dies.load(Ordering::SeqCst) {
                        return Some(None);
                    }
                    (!round.is_running()).then(|| Some(round.wait()))
                });
                let said = round.stderr();
                assert!(!said.contains("verify:") && !said.contains("verify failed"), "wrong bytes: {said}");
                let Some(status) = status else { return rounds };
                assert!(status.success() || dies.load(Ordering::SeqCst), "fio: {status}: {said}");
                rounds += 1;
                if ends.load(Ordering::SeqCst) {
                    return rounds;
                }
            }
        });
        let (ends, dies) = (Arc::clone(&stop), Arc::clone(&killed));
        let (count, diary, socket) = (Arc::clone(&written), Arc::clone(diary), served.socket().to_owned());
        let diarist = std::thread::spawn(move || {
            let mut stream = connect(&socket);
            let mut diary = diary.lock();
            while !ends.load(Ordering::SeqCst) {
                if let Err(error) = diary.step(&mut stream) {
                    assert!(dies.load(Ordering::SeqCst), "the diarist was refused: {error}");
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { stop, killed, written, fio, diarist }
    }

    /// Lets them end, and fails if one has failed.
    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        let rounds = self.fio.join().expect("fio found no error");
        self.diarist.join().expect("the diarist found no error");
        let written = self.written.load(Ordering::Relaxed);
        println!("fio verified {rounds} whole rounds, the diarist wrote {written} blocks");
    }
}

/// What was written to [`DIARY`], block by block.
#[derive(Default)]
struct Diary {
    /// The newest version of each block that was sent, and the newest that was promised to last.
    blocks: Vec<(u64, u64)>,
    /// Blocks acknowledged, but not flushed.
    volatile: Vec<(u64, u64)>,
    clock: u64,
}

impl Diary {
    /// One write, stable or not, now and then a flush, and a look at some block.
    fn step(&mut self, stream: &mut UnixStream) -> std::io::Result<()> {
        self.blocks.resize(BLOCKS as usize, (0, 0));
        self.clock += 1;
        let version = self.clock;
        // An odd multiplier wanders over all blocks.
        let block = version.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 55;
        self.blocks[block as usize].0 = version;
        let is_stable = version.is_multiple_of(5);
        ask(stream, 1, if is_stable { CMD_FLAG_FUA } else { 0 }, block, &page(block, version))?;
        if is_stable {
            self.blocks[block as usize].1 = version;
        } else {
            self.volatile.push((block, version));
        }
        if version.is_multiple_of(8) {
            ask(stream, 3, 0, 0, &[])?;
            for (block, version) in self.volatile.drain(..) {
                let durable = &mut self.blocks[block as usize].1;
                *durable = version.max(*durable);
            }
        }
        let block = version.wrapping_mul(0xd1b5_4a32_d192_ed03) >> 55;
        let found = ask(stream, 0, 0, block, &[])?;
        let expected = page(block, self.blocks[block as usize].0);
        assert!(found == expected, "block {block}: wrong bytes in a live volume");
        Ok(())
    }

    /// Every block is a version that was sent, whole, and no older than what was promised. What is found counts as
    /// promised from here on.
    fn check(&mut self, socket: &Path) -> Vec<u64> {
        let mut stream = connect(socket);
        self.volatile.clear();
        let mut versions = Vec::new();
        for (block, (sent, durable)) in (0..).zip(&mut self.blocks) {
            let found = ask(&mut stream, 0, 0, block, &[]).expect("the volume can be read");
            let version = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
            assert!(found == page(block, version), "block {block}: torn, or another's");
            assert!(
                (*durable..=*sent).contains(&version),
                "block {block}: version {version}, but {durable} was promised and {sent} the last"
            );
            (*sent, *durable) = (version, version);
            versions.push(version);
        }
        versions
    }
}

/// What version of a block consists of; nothing but zeroes for the one before the first.
fn page(block: u64, version: u64) -> Bytes {
    if version == 0 {
        return vec![0; BLOCK].into();
    }
    let word = |i: u64| {
        if i == 0 { version } else { (version << 20 ^ block << 9 ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15) }
    };
    (0..BLOCK as u64 / 8).flat_map(|i| word(i).to_le_bytes()).collect()
}

/// A connection in the transmission phase.
fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
    let mut client = Client::over(stream);
    client.greet(3);
    client.go("");
    client.stream
}

/// One request on a block of the diary, answered without an error.
fn ask(
    stream: &mut UnixStream,
    command: u16,
    flags: u16,
    block: u64,
    data: &[u8],
) -> std::io::Result<Vec<u8>> {
    let is_flush = command == 3;
    let (offset, length) = if is_flush { (0, 0) } else { (DIARY + block * BLOCK as u64, BLOCK as u32) };
    let mut bytes = Vec::new();
    Request { flags, command: command.into(), cookie: 7, offset, length: length.into() }.encode(&mut bytes);
    bytes.extend_from_slice(data);
    stream.write_all(&bytes)?;
    let mut header = [0; SIMPLE_REPLY_LEN];
    stream.read_exact(&mut header)?;
    let reply = SimpleReply::decode(&header).expect("a simple reply");
    assert_eq!(reply, SimpleReply { error: 0, cookie: 7 }, "command {command} on block {block}");
    let mut answer = vec![0; if command == 0 { BLOCK } else { 0 }];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

fn live(layout: &str, slots: usize) {
    let mut life = Life::begin(layout, slots);
    life.a_spare_takes_over(1);
    life.an_image_is_deleted(2);
    life.a_member_returns(0);
    life.an_image_is_overwritten(slots - 1);
    life.a_member_is_replaced(0, "new.img");
    life.an_image_is_truncated(1);
    life.scrub();
    // In the middle of a rebuild.
    life.raid10(&["limit", "vol", "--min", "1M", "--max", "2M"]);
    let failed = life.member(2);
    life.fail(&failed);
    eventually("the rebuild to have begun", PATIENCE, || {
        let sync = &life.status()["sync"];
        (sync["action"] == "recover" && sync["done"].as_u64() > Some(0)).then_some(())
    });
    life.get_on();
    life.is_killed();
    life.work();
    life.until_whole(2, &failed, false);
    // And with all members in sync.
    life.is_killed();
    life.work();
    life.end();
}

#[test]
fn two_near_copies_on_four_members() {
    live("n2", 4);
}

#[test]
fn two_near_copies_on_three_members() {
    if !left_out("the live volume n2 on 3 members") {
        live("n2", 3);
    }
}

#[test]
fn three_near_copies() {
    if !left_out("the live volume n3 on 4 members") {
        live("n3", 4);
    }
}

#[test]
fn far_copies() {
    if !left_out("the live volume f2 on 4 members") {
        live("f2", 4);
    }
}

#[test]
fn offset_copies() {
    if !left_out("the live volume o2 on 4 members") {
        live("o2", 4);
    }
}
