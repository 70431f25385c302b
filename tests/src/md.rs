//! Arrays that go back and forth between this engine and the real md: their images, their superblocks, their legs seen
//! without any engine; and arrays that are served here, with all that their clients have written.

use crate::nbd::Client;
use crate::process::{Sandbox, bytes_of, eventually, succeed};
use crate::volumes::{Served, create, patterned, sha256};
use raid::geometry::{Chunk, Geometry, Place};
use raid::superblock::{SUPER_BYTES, SUPER_OFFSET, Superblock};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long something may take that a status has to show. Many times what it needs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Paths for the images of an array of `n` members: `NAME-0` and so on.
#[must_use]
pub fn members(sandbox: &Sandbox, name: &str, n: usize) -> Vec<PathBuf> {
    (0..n).map(|slot| sandbox.join(format!("{name}-{slot}"))).collect()
}

/// What the guest's shell calls the drives of these images.
#[must_use]
pub fn guest(images: &[PathBuf]) -> String {
    let drive = |image: &PathBuf| format!("/dev/drive/{}", file_name(image));
    images.iter().map(drive).collect::<Vec<_>>().join(" ")
}

fn file_name(path: &Path) -> String {
    path.file_name().and_then(|name| name.to_str()).expect("images have plain names").to_owned()
}

/// A new file of nothing but a hole.
pub fn blank(path: &Path, size: u64) {
    File::create_new(path).and_then(|file| file.set_len(size)).expect("the sandbox can be written");
}

/// A member's superblock; panics with its path where there is none.
#[must_use]
pub fn superblock(member: &Path) -> Superblock {
    try_superblock(member).unwrap_or_else(|e| panic!("{}: {e}", member.display()))
}

/// The same of a member that may be in use, and its superblock half written.
pub fn try_superblock(member: &Path) -> Result<Superblock, raid::superblock::SuperblockError> {
    let file = File::open(member).expect("the image is there");
    let size = file.metadata().expect("a file has a size").len();
    let mut bytes = [0; SUPER_BYTES];
    file.read_exact_at(&mut bytes, SUPER_OFFSET).expect("the image has room for a superblock");
    Superblock::decode(&bytes, size)
}

/// Overwrites a range of a file with what no array of these tests holds.
pub fn spoil(image: &Path, at: u64, len: u64) {
    let file = File::options().write(true).open(image).expect("the image is there");
    file.write_all_at(&patterned(len, 0xbad), at).expect("the image can be written");
}

/// An array's images in slot order, seen without any engine.
#[derive(Debug)]
pub struct Legs {
    images: Vec<PathBuf>,
    geometry: Geometry,
    start: u64,
}

impl Legs {
    /// Of an array with all its members, as the first one describes it.
    #[must_use]
    pub fn of(images: &[PathBuf]) -> Self {
        let superblock = superblock(&images[0]);
        let geometry = superblock.geometry().expect("it was checked when decoded");
        Self { images: images.to_vec(), geometry, start: superblock.data_start() }
    }

    /// Bytes of each data area that the array uses.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.geometry.used()
    }

    /// First byte of the data area.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Where a copy of a chunk lies: slot, and position in the data area.
    #[must_use]
    pub fn place(&self, chunk: u64, copy: usize) -> Place {
        self.geometry.place(Chunk(chunk), copy)
    }

    /// Where a slot's data area holds a copy of anything of this range of the array: whole chunks.
    #[must_use]
    pub fn on_slot(&self, slot: usize, at: u64, len: u64) -> Vec<u64> {
        let chunk = self.geometry.chunk();
        let chunks = at / chunk..(at + len).div_ceil(chunk);
        let places = chunks.flat_map(|one| (0..self.geometry.copies()).map(move |copy| (one, copy)));
        let places = places.map(|(one, copy)| self.place(one, copy));
        places.filter(|place| place.slot.0 == slot).map(|place| place.at.0).collect()
    }

    /// One copy of a chunk.
    #[must_use]
    pub fn read(&self, chunk: u64, copy: usize) -> Vec<u8> {
        let place = self.place(chunk, copy);
        let mut bytes = vec![0; self.geometry.chunk() as usize];
        let file = File::open(&self.images[place.slot.0]).expect("the image is there");
        file.read_exact_at(&mut bytes, self.start + place.at.0).expect("the image is whole");
        bytes
    }

    /// Makes one copy of a chunk another than its mirror.
    pub fn spoil(&self, chunk: u64, copy: usize) {
        let place = self.place(chunk, copy);
        spoil(&self.images[place.slot.0], self.start + place.at.0 + 8192, 4096);
        assert!(!self.agree(chunk));
    }

    /// Whether all copies of a chunk are equal.
    #[must_use]
    pub fn agree(&self, chunk: u64) -> bool {
        (1..self.geometry.copies()).all(|copy| self.read(chunk, copy) == self.read(chunk, 0))
    }
}

/// An array that is served here, and what its clients have written to it.
#[derive(Debug)]
pub struct Array {
    /// Where its images are.
    pub sandbox: Sandbox,
    name: String,
    served: Option<Served>,
    content: Vec<u8>,
    writes: u64,
}

impl Array {
    /// Makes one of blank images of `member` bytes, and serves it. `made` and `served` are further arguments of the two
    /// commands, separated by white space.
    #[must_use]
    pub fn create(name: &str, layout: &str, n: usize, member: u64, made: &str, served: &str) -> Self {
        let sandbox = Sandbox::new();
        let images = members(&sandbox, name, n);
        create(
            &sandbox,
            &images,
            &format!("--size {member} --chunk 64K --layout {layout} --name {name} {made}"),
        );
        let mut array = Self { sandbox, name: name.to_owned(), served: None, content: vec![], writes: 0 };
        array.serve(&images, served);
        array.content = vec![0; array.served().size() as usize];
        array
    }

    /// One that md made in `sandbox`, of which it is known what it should hold. It is not served yet.
    #[must_use]
    pub fn known(sandbox: Sandbox, name: &str, content: Vec<u8>) -> Self {
        Self { sandbox, name: name.to_owned(), served: None, content, writes: 0 }
    }

    /// Serves it.
    pub fn serve(&mut self, images: &[PathBuf], arguments: &str) {
        self.served = Some(Served::start(&self.sandbox, images, arguments));
    }

    /// Its server.
    #[must_use]
    pub fn served(&self) -> &Served {
        self.served.as_ref().expect("it is served")
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Ends its server in order.
    pub fn stop(&mut self) {
        self.served.take().expect("it is served").stop();
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.served.take().expect("it is served").server.kill();
    }

    /// `raid10 COMMAND ARRAY WORDS…`, which must succeed; what it prints.
    #[expect(clippy::must_use_candidate, reason = "its effect may be all that is wanted")]
    pub fn raid10(&self, command: &str, words: &[&str]) -> String {
        succeed(self.sandbox.raid10().arg(command).arg(&self.name).args(words))
    }

    /// Its status document.
    #[must_use]
    pub fn status(&self) -> Value {
        serde_json::from_str(&self.raid10("status", &["--json"])).expect("one JSON document")
    }

    /// The states of all members, in the order of the status document.
    #[must_use]
    pub fn states(&self) -> Vec<String> {
        let status = self.status();
        let members = status["members"].as_array().expect("members");
        members.iter().map(|member| member["state"].as_str().expect("a state").to_owned()).collect()
    }

    /// The images of its members in slot order. Each slot has one in sync.
    #[must_use]
    pub fn images(&self) -> Vec<PathBuf> {
        let status = self.status();
        let all = status["members"].as_array().expect("members");
        let mut held: Vec<_> = all.iter().filter(|one| one["state"] == "in_sync").collect();
        held.sort_by_key(|one| one["slot"].as_u64());
        assert!(held.iter().zip(0..).all(|(one, slot)| one["slot"] == slot), "{status}");
        held.iter().map(|one| one["path"].as_str().expect("a path").into()).collect()
    }

    /// Waits until this image holds a slot in sync.
    pub fn until_in_sync(&self, slot: usize, image: &Path) {
        eventually(&format!("{} to be in sync in slot {slot}", image.display()), PATIENCE, || {
            let status = self.status();
            let all = status["members"].as_array().expect("members");
            let path = image.to_str().expect("plain");
            let is_it = |one: &Value| one["slot"] == slot && one["path"] == path && one["state"] == "in_sync";
            all.iter().any(is_it).then_some(())
        });
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.served().socket()).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
        let mut client = Client::over(stream);
        client.greet(3);
        client.go("");
        client
    }

    /// Writes all of the first `size` bytes.
    pub fn fill(&mut self, size: u64) {
        self.writes += 1;
        let bytes = patterned(size, self.writes);
        let mut client = self.client();
        for (piece, at) in bytes.chunks(1 << 20).zip((0..).step_by(1 << 20)) {
            client.write(at, piece);
        }
        self.content[..bytes.len()].copy_from_slice(&bytes);
    }

    /// Some writes of all sizes here and there, the first and the last sector among them. Gives where.
    pub fn write_more(&mut self) -> Vec<(u64, u64)> {
        let mut client = self.client();
        let sectors = self.content.len() as u64 / 512;
        let mut written = Vec::new();
        for i in 0..24 {
            self.writes += 1;
            // An odd multiplier wanders over all of it.
            let mixed = self.writes.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let (at, len) = match i {
                0 => (0, 1),
                1 => (sectors - 1, 1),
                _ => ((mixed >> 24) % sectors, 1 + (mixed >> 8) % 200),
            };
            let (at, len) = (at * 512, len.min(sectors - at) * 512);
            let bytes = patterned(len, self.writes);
            client.write(at, &bytes);
            self.content[at as usize..(at + len) as usize].copy_from_slice(&bytes);
            written.push((at, len));
        }
        written
    }

    /// Panics unless clients read what they have written, and zeroes elsewhere.
    pub fn assert_content(&self) {
        let copy = self.sandbox.join("copy");
        self.served().dump(&copy);
        let found = bytes_of(&copy);
        assert_eq!(found.len(), self.content.len(), "{}", self.name);
        let wrong = found.chunks(512).zip(self.content.chunks(512)).position(|(found, told)| found != told);
        assert_eq!(wrong, None, "{}: the first sector that is wrong", self.name);
    }

    /// The SHA-256 of what it should hold.
    #[must_use]
    pub fn sum(&self) -> String {
        let path = self.sandbox.join("content");
        std::fs::write(&path, &self.content).expect("the sandbox has room");
        sha256(&path, self.content.len() as u64)
    }

    /// The path of another device for it, as large as `size`, and not blank: what is not filled shows.
    #[must_use]
    pub fn device(&self, name: &str, size: u64) -> PathBuf {
        let path = self.sandbox.join(format!("{}-{name}", self.name));
        blank(&path, size);
        // Where a superblock would be there is none.
        spoil(&path, SUPER_OFFSET + SUPER_BYTES as u64, size - SUPER_OFFSET - SUPER_BYTES as u64);
        path
    }
}
