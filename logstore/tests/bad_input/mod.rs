//! Damage to a store's bytes, anywhere: bits flipped in any file, files cut, padded, missing or exchanged, batches that lie.
//! A store then opens or refuses with a sentence; nothing panics; every record that was not hit is readable, but for those
//! behind a bad batch in what recovery has to scan, which end the log; whoever asks for one that was hit is told that it is
//! lost; and the offline verification says what was wrong. On both homes, after a stop in order and after a kill.

use super::common::*;
use bytes::Bytes;
use logstore::batch::Header;
use logstore::inspect::verify::{Options, verify};
use logstore::inspect::walk::{Step, Walk};
use logstore::inspect::{Finding, Inspection, PartitionView, Severity};
use logstore::{Checkpoint, Error, Partition, ReadLimit, Result, Store};
use raid::device::{FileDevice, OpenMode};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const TOPICS: [&str; 2] = ["first", "second"];
const BATCHES: i64 = 24;
const VOLUME: u64 = 8 << 20;
/// Where the space for records begins on such a volume: before it lie headers, catalog and journal.
const SPACE: u64 = (64 << 10) + (2 << 20) + (128 << 10);

/// A batch that was acknowledged.
#[derive(Clone)]
struct Known {
    topic: &'static str,
    base: i64,
    bytes: Bytes,
    /// Where it lies: file, first byte.
    file: PathBuf,
    at: u64,
}

/// A small store that is stopped, and all that was acknowledged by it.
struct Sample {
    place: Place,
    killed: bool,
    known: Vec<Known>,
    /// From which offset on recovery scans each topic.
    scanned: BTreeMap<String, i64>,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_all(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn all_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all_files(&path, found);
        } else {
            found.push(path);
        }
    }
    found.sort();
}

impl Sample {
    fn new(place: Place, killed: bool) -> Self {
        let fill = async |log: &Arc<Partition>, name: &str, numbers: Range<i64>| {
            for at in numbers {
                let value = format!("{name} {at} ").repeat(20 + at as usize);
                let sent = batch(&[&value, "end"]).at(NOW + at * 10).by(7, 0, at as i32 * 2);
                // In its segment, and not in the journal, which would bring it back.
                append(log, &sent).await;
            }
        };
        place.run_and_close(async |store: Arc<Store>| {
            for name in TOPICS {
                let settings = [("segment.bytes", "4000"), ("index.interval.bytes", "500")];
                fill(&topic(&store, name, &settings).await, name, 0..BATCHES).await;
            }
        });
        let all = async |store: Arc<Store>| {
            let mut known = Vec::new();
            for name in TOPICS {
                for (base, bytes) in read_all(&first(&store, name)).await {
                    known.push(Known { topic: name, base, bytes, file: PathBuf::new(), at: 0 });
                }
            }
            known
        };
        let known = if killed {
            place.run(async |store: Arc<Store>| {
                for name in TOPICS {
                    fill(&first(&store, name), name, BATCHES..BATCHES + 4).await;
                }
                all(store).await
            })
        } else {
            place.run_and_close(all)
        };
        let mut sample = Self { place, killed, known, scanned: BTreeMap::new() };
        sample.locate();
        sample.scanned = runtime().block_on(scanned(&sample.place));
        sample
    }

    fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for killed in [false, true] {
            all.push(Self::new(Place::directory(), killed));
            all.push(Self::new(Place::volume(VOLUME), killed));
        }
        all
    }

    /// Finds every batch in the files.
    fn locate(&mut self) {
        let mut files = Vec::new();
        all_files(self.place.dir.path(), &mut files);
        let held: Vec<(PathBuf, Vec<u8>)> =
            files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect();
        for known in &mut self.known {
            let found = held.iter().find_map(|(path, bytes)| {
                let first = &known.bytes[..];
                let at = bytes.windows(first.len()).position(|window| window == first)?;
                Some((path, at))
            });
            let (path, at) = found.expect("every batch lies somewhere");
            known.file = path.strip_prefix(self.place.dir.path()).unwrap().to_owned();
            known.at = at as u64;
        }
    }

    /// A copy of the files to be damaged.
    fn copy(&self) -> Place {
        let place = Place { dir: tempfile::TempDir::new().unwrap(), volume: self.place.volume };
        copy_all(self.place.dir.path(), place.dir.path());
        place
    }

    fn name(&self) -> String {
        let home = if self.place.volume.is_some() { "volume" } else { "directory" };
        format!("{home}, {}", if self.killed { "killed" } else { "stopped" })
    }

    /// The acknowledged batch that a byte belongs to.
    fn owner(&self, file: &Path, at: u64) -> Option<&Known> {
        self.known
            .iter()
            .find(|known| known.file == file && (known.at..known.at + known.bytes.len() as u64).contains(&at))
    }

    fn known_of(&self, topic: &str) -> impl Iterator<Item = &Known> {
        self.known.iter().filter(move |known| known.topic == topic)
    }
}

/// Where the first segment begins that is not known to be whole.
async fn scanned(place: &Place) -> BTreeMap<String, i64> {
    let views = inspect(place).await.unwrap().partitions;
    let from = |view: &PartitionView| {
        let bases = view.segments.iter().map(|segment| segment.base);
        bases.filter(|base| *base <= view.recovery_point).max().unwrap_or(0)
    };
    views.iter().map(|view| (view.topic.clone(), from(view))).collect()
}

async fn inspect(place: &Place) -> Result<Inspection> {
    if place.volume.is_some() {
        let device = FileDevice::open(&place.image(), OpenMode::ReadOnly).unwrap();
        Inspection::volume(Arc::new(device)).await
    } else {
        Inspection::directory(&place.dir.path().join("data")).await
    }
}

/// What an offline look finds, and the sound batches it sees: topic and base offset.
async fn look(place: &Place) -> Result<(Vec<Finding>, BTreeSet<(String, i64)>)> {
    let inspection = inspect(place).await?;
    let (mut findings, mut sound) = (inspection.findings.clone(), BTreeSet::new());
    for view in &inspection.partitions {
        let options = Options { now: Some(NOW + 1_000_000) };
        findings.extend(verify(view, options, &mut |_| ()).await?.1);
        for segment in &view.segments {
            let Ok(mut walk) = Walk::new(view, segment) else { continue };
            while let Ok(Some(step)) = walk.next().await {
                if let Step::Batch { header, fault: None, .. } = step {
                    sound.insert((view.topic.clone(), header.base_offset));
                }
            }
        }
    }
    Ok((findings, sound))
}

/// Base offsets of the batches that a store serves, byte for byte as acknowledged. Of each other it says that it is lost, or
/// that the log ends before it.
async fn served(store: &Store, sample: &Sample, topic: &str, what: &str) -> BTreeSet<i64> {
    let mut got = BTreeSet::new();
    let Some(found) = store.topic(topic) else { return got };
    let log = &found.partitions()[0];
    let known: BTreeMap<i64, &Known> = sample.known_of(topic).map(|known| (known.base, known)).collect();
    for (&base, &known) in &known {
        let copied = match log.read(base, 1, ReadLimit::HighWatermark, true).await {
            Ok(slice) => slice.copy().await,
            Err(error) => Err(error),
        };
        match copied {
            Ok(bytes) if bytes == known.bytes => drop(got.insert(base)),
            // Recovery may have cut the log before it; and no checksum covers the first 16 bytes, of which the broker
            // stamps some.
            Ok(bytes) => assert!(
                bytes.is_empty()
                    || bytes[16..] == known.bytes[16..]
                    || Header::parse(&bytes).unwrap().base_offset != base
                    || !is_sound(&bytes),
                "{topic} {base}: other bytes than were acknowledged"
            ),
            Err(Error::LostBatch { from, next, .. }) => {
                assert!((from..next).contains(&base), "{what}: {topic} {base}: {from}..{next} are lost");
            }
            Err(Error::OffsetOutOfRange { log_end, .. }) => assert!(base > log_end, "{what}: {topic} {base}"),
            Err(error) => panic!("{what}: {topic} {base}: {error}"),
        }
    }
    got
}

fn is_sound(bytes: &[u8]) -> bool {
    Header::parse(bytes).is_ok_and(|header| logstore::batch::check(&header, bytes).is_ok())
}

/// What a damaged copy must still give.
struct Expected<'a> {
    /// Batches that may be lost: (topic, base offset).
    lost: BTreeSet<(&'a str, i64)>,
    /// The store may refuse to open.
    may_refuse: bool,
    /// The offline look must have found something.
    told: bool,
}

fn examine(sample: &Sample, place: &Place, expected: &Expected<'_>, what: &str) -> Vec<Finding> {
    let what = format!("{}: {what}", sample.name());
    let runtime = runtime();
    let looked = runtime.block_on(look(place));
    let findings = match looked {
        Ok((findings, sound)) => {
            for known in &sample.known {
                let hit = expected.lost.contains(&(known.topic, known.base));
                let seen = sound.contains(&(known.topic.to_owned(), known.base));
                let told = expected.may_refuse && !findings.is_empty();
                assert!(seen || hit || told, "{what}: {} {} is not seen", known.topic, known.base);
            }
            assert!(!expected.told || !findings.is_empty(), "{what}: nothing was told");
            findings
        }
        Err(error) => {
            assert!(expected.may_refuse, "{what}: {error}");
            assert!(!error.to_string().is_empty());
            Vec::new()
        }
    };
    match runtime.block_on(place.open()) {
        Ok(store) => {
            for topic in TOPICS {
                let got = runtime.block_on(served(&store, sample, topic, &what));
                // What recovery scans ends at its first bad batch: nothing says that it was whole.
                let scanned = sample.scanned.get(topic).copied().unwrap_or(0);
                let first_lost =
                    expected.lost.iter().filter(|(lost, _)| *lost == topic).map(|(_, base)| *base).min();
                for known in sample.known_of(topic) {
                    let hit = expected.lost.contains(&(topic, known.base));
                    let cut =
                        sample.killed && first_lost.is_some_and(|lost| lost >= scanned && known.base > lost);
                    assert!(
                        got.contains(&known.base) || hit || cut,
                        "{what}: {topic} {} is not served; {got:?}",
                        known.base
                    );
                }
            }
        }
        Err(error) => {
            assert!(expected.may_refuse, "{what}: {error}");
            assert!(
                !matches!(error, Error::Interrupted) && !error.to_string().is_empty(),
                "{what}: {error:?}"
            );
        }
    }
    findings
}

/// Numbers that look random and are the same in each run.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn a_flipped_bit_anywhere_costs_at_most_its_batch() {
    const FLIPS: u64 = 120;
    for sample in Sample::all() {
        let mut files = Vec::new();
        all_files(sample.place.dir.path(), &mut files);
        // Of an image, the parts that hold something; of files, each byte of those that are not empty.
        let mut parts: Vec<(PathBuf, u64, u64)> = Vec::new();
        for path in files {
            let bytes = fs::read(&path).unwrap();
            let name = path.strip_prefix(sample.place.dir.path()).unwrap().to_owned();
            if sample.place.volume.is_none() {
                if !bytes.is_empty() {
                    parts.push((name, 0, bytes.len() as u64));
                }
                continue;
            }
            let blocks =
                bytes.chunks(512).enumerate().filter(|(_, block)| block.iter().any(|&byte| byte != 0));
            parts.extend(blocks.map(|(at, block)| (name.clone(), at as u64 * 512, block.len() as u64)));
        }
        let mut seeded = Seeded(0xdeca_1096);
        let (mut in_batches, mut beside) = (0, 0);
        for _ in 0..FLIPS {
            let (file, from, len) = &parts[seeded.below(parts.len() as u64) as usize];
            let (at, bit) = (from + seeded.below(*len), seeded.below(8));
            let place = sample.copy();
            let path = place.dir.path().join(file);
            let mut bytes = fs::read(&path).unwrap();
            let before = bytes[at as usize];
            bytes[at as usize] ^= 1 << bit;
            // After a kill, a checkpoint may be older than the log: an offset that reads as another may be right, and
            // nothing else says what it was.
            let is_checkpoint = Checkpoint::ALL.iter().any(|of| file.ends_with(of.file_name()));
            let may_be_right = sample.killed
                && is_checkpoint
                && before.is_ascii_digit()
                && bytes[at as usize].is_ascii_digit();
            fs::write(&path, bytes).unwrap();
            let owner = sample.owner(file, at);
            let is_on_volume = sample.place.volume.is_some();
            let is_catalog = file.ends_with("catalog.redb") || (is_on_volume && at < SPACE);
            if owner.is_some() {
                in_batches += 1;
            } else {
                beside += 1;
            }
            let expected = Expected {
                lost: owner.iter().map(|known| (known.topic, known.base)).collect(),
                may_refuse: is_catalog,
                // On a volume it may be in space that nothing holds any more.
                told: owner.is_some()
                    || !(is_on_volume || is_catalog || may_be_right || file.ends_with("partition.metadata")),
            };
            examine(&sample, &place, &expected, &format!("byte {at}, bit {bit} of {}", file.display()));
        }
        assert!(in_batches > 5 && beside > 5, "{}: {in_batches} in batches, {beside} beside", sample.name());
    }
}

/// Changes a file of a copy, and says what must then be.
fn changed(sample: &Sample, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Place {
    let place = sample.copy();
    let path = place.dir.path().join(path);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(&path, bytes).unwrap();
    place
}

fn nothing_lost<'a>() -> Expected<'a> {
    Expected { lost: BTreeSet::new(), may_refuse: false, told: true }
}

fn losing<'a>(known: &[&'a Known]) -> Expected<'a> {
    Expected { lost: known.iter().map(|known| (known.topic, known.base)).collect(), ..nothing_lost() }
}

fn told(findings: &[Finding], word: &str, what: &str) {
    let texts: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(texts.iter().any(|text| text.contains(word)), "{what}: no {word:?} in {texts:#?}");
}

#[test]
fn batches_that_lie_are_named_and_stepped_over() {
    type Lie = (&'static str, fn(&mut [u8]), &'static str);
    let lies: [Lie; 7] = [
        ("unknown magic", |batch| batch[16] = 9, "its format (magic) is 9"),
        (
            "a length past the end",
            |batch| batch[8..12].copy_from_slice(&i32::MAX.to_be_bytes()),
            "bytes are no batch",
        ),
        (
            "a length that is too short",
            |batch| batch[8..12].copy_from_slice(&60i32.to_be_bytes()),
            "checksum",
        ),
        (
            "a negative length",
            |batch| batch[8..12].copy_from_slice(&(-5i32).to_be_bytes()),
            "length field says -5",
        ),
        ("a false count", |batch| recounted(batch, 1_000_000), "claims 1000000 records"),
        ("a false checksum", |batch| batch[17] ^= 0xff, "checksum"),
        ("zeroes", |batch| batch.fill(0), "zeroes"),
    ];
    for sample in Sample::all() {
        let of_first: Vec<&Known> = sample.known_of(TOPICS[0]).collect();
        let victim = of_first[3];
        for (what, lie, word) in lies {
            let place = changed(&sample, &victim.file, |bytes| {
                lie(&mut bytes[victim.at as usize..][..victim.bytes.len()]);
            });
            let findings = examine(&sample, &place, &losing(&[victim]), what);
            told(&findings, word, what);
            let named = findings.iter().any(|finding| {
                finding.topic.as_deref() == Some(TOPICS[0])
                    && finding
                        .offsets
                        .is_some_and(|(first, last)| first <= victim.base && victim.base <= last)
                    && finding.position.is_some()
            });
            assert!(named, "{what}: {findings:#?}");
        }
    }
}

/// Another count of records, with a right checksum.
fn recounted(batch: &mut [u8], count: i32) {
    batch[57..61].copy_from_slice(&count.to_be_bytes());
    let crc = crc32c::crc32c(&batch[21..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

#[test]
fn timestamps_from_the_future_are_noted() {
    for place in Place::both() {
        place.run_and_close(async |store: Arc<Store>| {
            let log =
                topic(&store, TOPICS[0], &[("message.timestamp.after.max.ms", "9223372036854775807")]).await;
            append_stable(&log, &batch(&["later"]).at(NOW * 2)).await;
        });
        let findings = runtime().block_on(look(&place)).unwrap().0;
        told(&findings, "lies in the future", "future");
        place.run(async |store: Arc<Store>| assert_eq!(read_all(&first(&store, TOPICS[0])).await.len(), 1));
    }
}

#[test]
fn files_that_are_cut_padded_missing_or_exchanged() {
    for killed in [false, true] {
        let sample = Sample::new(Place::directory(), killed);
        let dir = Path::new("data").join(format!("{}-0", TOPICS[0]));
        let listed = |extension| files(&sample.place.dir.path().join(&dir), extension);
        let logs = listed("log");
        let name = |path: &Path| path.strip_prefix(sample.place.dir.path()).unwrap().to_owned();
        let last = name(logs.last().unwrap());
        let in_last: Vec<&Known> = sample.known.iter().filter(|known| known.file == last).collect();
        let newest = *in_last.last().unwrap();

        // The tail: torn, followed by zeroes, followed by noise.
        let torn = changed(&sample, &last, |bytes| bytes.truncate(bytes.len() - 10));
        let findings = examine(&sample, &torn, &losing(&[newest]), "a torn tail");
        told(&findings, "bytes", "a torn tail");
        for (what, fill) in [("zeroes behind the end", 0), ("noise behind the end", 0xa5)] {
            let place = changed(&sample, &last, |bytes| bytes.extend([fill; 5000]));
            let told = !killed || fill != 0;
            examine(&sample, &place, &Expected { told, ..nothing_lost() }, what);
        }

        // Indexes and snapshots: each missing, cut, of another segment.
        for extension in ["index", "timeindex", "snapshot"] {
            let found = listed(extension);
            assert!(found.len() >= 2, "{extension}: {found:?}");
            let (one, other) = (name(&found[0]), &found[1]);
            let place = sample.copy();
            fs::remove_file(place.dir.path().join(&one)).unwrap();
            examine(&sample, &place, &Expected { told: false, ..nothing_lost() }, &format!("no {extension}"));
            let place = changed(&sample, &one, |bytes| bytes.truncate(bytes.len() - 1));
            examine(&sample, &place, &nothing_lost(), &format!("a cut {extension}"));
            let others = fs::read(other).unwrap();
            assert_ne!(others, fs::read(&found[0]).unwrap(), "{extension}");
            let place = changed(&sample, &one, |bytes| *bytes = others);
            let findings = examine(&sample, &place, &nothing_lost(), &format!("another's {extension}"));
            let word = match extension {
                "index" => "offset index",
                "timeindex" => "time index",
                _ => "snapshot",
            };
            told(&findings, word, extension);
        }
        for gone in ["partition.metadata", "leader-epoch-checkpoint"] {
            let place = sample.copy();
            let path = place.dir.path().join(&dir).join(gone);
            if path.exists() {
                fs::remove_file(path).unwrap();
            }
            examine(&sample, &place, &Expected { told: false, ..nothing_lost() }, &format!("no {gone}"));
        }

        // A segment in the middle: its batches are gone, and no others may be.
        let middle = name(&logs[1]);
        let gone: Vec<&Known> = sample.known.iter().filter(|known| known.file == middle).collect();
        let place = sample.copy();
        fs::remove_file(place.dir.path().join(&middle)).unwrap();
        let findings = examine(&sample, &place, &losing(&gone), "a segment is missing");
        told(&findings, "should follow", "a segment is missing");

        // No catalog at all: not a store any more, but a look sees everything.
        let place = sample.copy();
        fs::remove_file(place.dir.path().join("data/catalog.redb")).unwrap();
        let anything = Expected { lost: BTreeSet::new(), may_refuse: true, told: false };
        examine(&sample, &place, &anything, "no catalog");
        let (_, sound) = runtime().block_on(look(&place)).unwrap();
        assert_eq!(sound.len(), sample.known.len());
    }
}

/// Kafka's offset checkpoints are written from the catalog, and never read for it.
#[test]
fn checkpoints_that_lie_are_noted_and_written_anew() {
    let end = BATCHES * 2;
    for killed in [false, true] {
        let sample = Sample::new(Place::directory(), killed);
        let data = sample.place.dir.path().join("data");
        let text = |of: Checkpoint| fs::read_to_string(data.join(of.file_name())).unwrap();
        let both = format!("0\n2\nfirst 0 {end}\nsecond 0 {end}\n");
        assert_eq!(Checkpoint::ALL.map(text), [both.as_str(), "0\n0\n", "0\n0\n", both.as_str()]);
        let sound = runtime().block_on(look(&sample.place)).unwrap().0;
        assert!(killed || sound.is_empty(), "{sound:#?}");
        for of in Checkpoint::ALL {
            let name = of.file_name();
            let row = |topic: &str, offset: i64| format!("0\n1\n{topic} 0 {offset}\n");
            let mut lies = vec![
                (String::new(), "version"),
                ("1\n0\n".to_owned(), "version"),
                ("0\n7\nfirst 0 1\n".to_owned(), "7 rows"),
                ("0\n1\nfirst zero 1\n".to_owned(), "topic, partition and offset"),
                (format!("0\n1\nfirst 0 {}0\n", i64::MAX), "topic, partition and offset"),
                ("0\n2\nfirst 0 1\nfirst 0 1\n".to_owned(), "two rows"),
                (row("third", 0), "not here"),
                (row("first", end + 9), name),
                (row("first", i64::MAX), name),
            ];
            if !killed {
                lies.push((row("first", end - 1), name));
                lies.extend(text(of).contains(&end.to_string()).then(|| ("0\n0\n".to_owned(), name)));
            }
            for (lie, word) in lies {
                let place = sample.copy();
                let file = place.dir.path().join("data").join(name);
                fs::write(&file, &lie).unwrap();
                let what = format!("{name} that says {lie:?}");
                let findings = examine(&sample, &place, &nothing_lost(), &what);
                told(&findings, word, &what);
                let worst = findings.iter().map(|finding| finding.severity);
                assert!(worst.clone().all(|severity| severity == Severity::Note), "{what}: {findings:#?}");
                // The store was opened and dropped: the start has written it.
                assert_ne!(fs::read_to_string(&file).unwrap(), lie, "{what}");
                runtime().block_on(async { place.open().await.unwrap().close().await.unwrap() });
                assert_eq!(runtime().block_on(look(&place)).unwrap().0, [], "{what}");
            }
            // No text at all; missing, and half-written beside it.
            let noise = changed(&sample, &Path::new("data").join(name), |bytes| *bytes = vec![0xff; 5000]);
            told(&examine(&sample, &noise, &nothing_lost(), "noise"), "no text", name);
            let gone = sample.copy();
            let path = |name: &str| gone.dir.path().join("data").join(name);
            fs::remove_file(path(name)).unwrap();
            fs::write(path(&format!("{name}.tmp")), "0\n2\nfi").unwrap();
            examine(&sample, &gone, &Expected { told: false, ..nothing_lost() }, "none");
            assert!(path(name).exists() && !path(&format!("{name}.tmp")).exists(), "{name}");
        }
    }
}

#[test]
fn a_torn_catalog_page_is_refused_or_passed_over() {
    for sample in Sample::all() {
        let (file, from, to) = if sample.place.volume.is_some() {
            (PathBuf::from("volume.img"), 0, 2 << 20)
        } else {
            let path = sample.place.dir.path().join("data/catalog.redb");
            (PathBuf::from("data/catalog.redb"), 0, fs::metadata(path).unwrap().len())
        };
        let whole = fs::read(sample.place.dir.path().join(&file)).unwrap();
        let pages: Vec<u64> = (from..to)
            .step_by(4096)
            .filter(|&at| whole[at as usize..][..4096].iter().any(|&byte| byte != 0))
            .collect();
        for page in pages {
            for (what, fill) in [("zeroes", 0), ("noise", 0x5a)] {
                // The second half of the page was not written.
                let place = changed(&sample, &file, |bytes| bytes[page as usize + 2048..][..2048].fill(fill));
                let expected = Expected { lost: BTreeSet::new(), may_refuse: true, told: false };
                examine(&sample, &place, &expected, &format!("{what} in the page at {page}"));
            }
        }
    }
}
