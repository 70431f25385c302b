//! `broker log` on a volume of which members are damaged at known bytes: `verify` names the member's file and the bytes, and
//! says whether another copy is sound; `dump` and `export` take the sound one; what no copy has is never shown as good.

use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::{MetadataRequest, ProduceRequest, TopicName, metadata_request};
use kafka_protocol::protocol::StrBytes;
use rustix::fs::SeekFrom;
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tests::broker::{Running, Under, batch};
use tests::process::{Ended, Sandbox, bytes_of, run, succeed};

/// Batches, of one record each.
const BATCHES: i64 = 24;
/// This one lies on two chunks, and so on two pairs of members.
const LARGE: i64 = 20;
/// Where the partition epoch stands in a batch.
const EPOCH: u64 = 12;

/// What a record holds: lines that are found nowhere else.
fn value(number: i64) -> Vec<u8> {
    let size = if number == LARGE { 700_000 } else { 5_000 };
    let mut text = (0..).flat_map(|line| format!("<{number}:{line}>").into_bytes());
    text.by_ref().take(size).collect()
}

fn sent(number: i64) -> Vec<u8> {
    batch(&[&value(number)], 5).to_vec()
}

/// A volume with a log, that nobody serves any more.
struct Volume {
    sandbox: Sandbox,
    place: Arc<tempfile::TempDir>,
    members: Vec<PathBuf>,
}

/// A byte of a batch, in one copy.
#[derive(Clone)]
struct Spot {
    member: PathBuf,
    at: u64,
}

impl Spot {
    /// The same copy, so many bytes from here.
    fn moved(&self, by: i64) -> Self {
        Self { at: self.at.checked_add_signed(by).expect("it lies in the file"), ..self.clone() }
    }

    /// Changes it, or what was changed back again.
    fn flip(&self) {
        let file = File::options().read(true).write(true).open(&self.member).expect("a member");
        let mut byte = [0];
        file.read_exact_at(&mut byte, self.at).expect("it lies in the file");
        file.write_all_at(&[byte[0] ^ 0x5a], self.at).expect("written");
    }

    fn named(&self) -> String {
        format!("1 byte at {} of {}", self.at, self.member.display())
    }
}

impl Volume {
    async fn new() -> Self {
        let place = Arc::new(tempfile::tempdir().expect("a temporary directory"));
        let broker = Running::start_in(place, Under::Volume, &["message.max.bytes=2000000"]).await;
        let mut client = broker.client().await;
        let name = TopicName(StrBytes::from_static_str("t"));
        let wanted = metadata_request::MetadataRequestTopic::default().with_name(Some(name.clone()));
        let answer = client.ask(12, &MetadataRequest::default().with_topics(Some(vec![wanted]))).await;
        assert_eq!(answer.topics[0].error_code, 0);
        for number in 0..BATCHES {
            let data = PartitionProduceData::default().with_records(Some(batch(&[&value(number)], 5)));
            let topic = TopicProduceData::default().with_name(name.clone()).with_partition_data(vec![data]);
            // In its segment, and not in the journal, where the same bytes would be found first.
            let request =
                ProduceRequest::default().with_acks(1).with_timeout_ms(30_000).with_topic_data(vec![topic]);
            let answer = client.ask(9, &request).await;
            let partition = &answer.responses[0].partition_responses[0];
            assert_eq!((partition.error_code, partition.base_offset), (0, number));
        }
        drop(client);
        let (place, _) = broker.stop().await;
        let members = Running::images(place.path());
        Self { sandbox: Sandbox::new(), place, members }
    }

    /// Where a line of a batch begins, in each copy.
    fn spots(&self, number: i64, line: i64) -> Vec<Spot> {
        let wanted = format!("<{number}:{line}>");
        let found = |member: &PathBuf| {
            let at = find(member, wanted.as_bytes())?;
            Some(Spot { member: member.clone(), at })
        };
        let spots: Vec<Spot> = self.members.iter().filter_map(found).collect();
        assert_eq!(spots.len(), 2, "{wanted} lies on two members");
        spots
    }

    fn log(&self, arguments: &[&str], members: &[PathBuf]) -> Command {
        let mut command = self.sandbox.broker();
        command.arg("log").args(arguments).arg("--volume").args(members);
        command
    }

    /// `verify`, in both forms: the lines of faults, and the findings that are faults.
    fn verify(&self, members: &[PathBuf]) -> (Vec<String>, Vec<Value>) {
        verified(self.log(&["verify"], members), self.log(&["verify", "--json"], members))
    }

    /// `dump --records --json`: what it prints of each batch, by first offset, and what on stderr.
    fn dump(&self) -> (Vec<Value>, String) {
        let Ended { status, stdout, stderr } =
            run(&mut self.log(&["dump", "--records", "--json"], &self.members));
        assert!(status.success(), "{status}: {stderr}");
        let all: Value = serde_json::from_str(&stdout).expect("one JSON document");
        (all[0]["entries"].as_array().expect("a list").clone(), stderr)
    }

    /// `export` to a new directory, and the log that it wrote.
    fn export(&self, name: &str) -> (Ended, Vec<u8>) {
        let ended = run(&mut self.log(&["export", "--to", name], &self.members));
        let log = bytes_of(&self.sandbox.join(name).join("t-0/00000000000000000000.log"));
        (ended, log)
    }

    /// Holds what is dumped and exported against what was sent; `bad` is not to be had. Returns whether stderr says that
    /// other copies were taken.
    fn serves_all_but(&self, bad: Option<i64>, out: &str) -> bool {
        let (batches, told) = self.dump();
        assert_eq!(batches.len() as i64, BATCHES);
        for (number, entry) in (0..).zip(&batches) {
            assert_eq!(entry["isvalid"].as_bool(), Some(bad != Some(number)), "{number}");
            if bad == Some(number) {
                assert!(entry["records"].is_null() && entry["fault"].is_string(), "{entry}");
                continue;
            }
            let expected = String::from_utf8(value(number)).expect("it is text");
            assert!(entry["records"][0]["value"] == expected.as_str(), "{number} is not what was sent");
        }
        let (ended, log) = self.export(out);
        assert_eq!(ended.code(), i32::from(bad.is_some()), "{}{}", ended.stdout, ended.stderr);
        let mut at = 0;
        for number in 0..BATCHES {
            let sent = sent(number);
            let same = log[at + 16..at + sent.len()] == sent[16..];
            assert_eq!(same, bad != Some(number), "{number}");
            at += sent.len();
        }
        assert_eq!(at, log.len());
        let takes = |told: &str| told.matches("taken from a sound one").count();
        assert!(takes(&told) <= 1 && takes(&told) == takes(&ended.stderr), "{told}\n{}", ended.stderr);
        takes(&told) == 1
    }

    /// Opens the store, which heals what it can, and closes it again.
    async fn scrubbed(&self) {
        let settings = ["log.scrub.max.bytes.per.second=1000000000"];
        let broker = Running::start_in(Arc::clone(&self.place), Under::Volume, &settings).await;
        assert!(broker.broker.store.start_scrub().expect("it is open"));
        while broker.broker.store.scrub_status().expect("it is open").running {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        broker.stop().await;
    }
}

/// Where some bytes stand in a file of which most is holes.
fn find(path: &Path, wanted: &[u8]) -> Option<u64> {
    let file = File::open(path).expect("a member");
    let mut next = 0;
    while let Ok(start) = rustix::fs::seek(&file, SeekFrom::Data(next)) {
        next = rustix::fs::seek(&file, SeekFrom::Hole(start)).expect("data ends");
        let mut bytes = vec![0; (next - start) as usize];
        file.read_exact_at(&mut bytes, start).expect("it can be read");
        if let Some(at) = bytes.windows(wanted.len()).position(|window| window == wanted) {
            return Some(start + at as u64);
        }
    }
    None
}

/// The lines of faults, and the findings that are faults, of a verification in both forms, which must agree.
fn verified(mut text: Command, mut json: Command) -> (Vec<String>, Vec<Value>) {
    let (text, json) = (run(&mut text), run(&mut json));
    let lines: Vec<String> =
        text.stdout.lines().filter_map(|line| line.strip_prefix("fault: ")).map(str::to_owned).collect();
    let report: Value = serde_json::from_str(&json.stdout).expect("one JSON document");
    let findings = report["findings"].as_array().expect("a list").iter();
    let faults: Vec<Value> = findings.filter(|one| one["severity"] == "fault").cloned().collect();
    assert_eq!(lines.len(), faults.len(), "{}\n{}", text.stdout, json.stdout);
    for (line, fault) in lines.iter().zip(&faults) {
        assert!(line.ends_with(fault["what"].as_str().expect("a text")), "{line}\n{fault}");
    }
    let status = i32::from(!faults.is_empty());
    assert_eq!((text.code(), json.code()), (status, status), "{}{}", text.stdout, text.stderr);
    assert_eq!(report["sound"], faults.is_empty());
    assert_eq!(text.stdout.ends_with("all sound\n"), faults.is_empty(), "{}", text.stdout);
    if !faults.is_empty() {
        let told = text.stderr.trim_end();
        assert!(told.contains("found in") && told.lines().count() == 1, "{told}");
    }
    (lines, faults)
}

/// A finding's damaged places: file, first byte, number of bytes.
fn damaged(finding: &Value) -> Vec<(PathBuf, u64, u64)> {
    let number = |one: &Value, name: &str| one[name].as_u64().expect("a number");
    let all = finding["damaged"].as_array().expect("a list").iter();
    all.map(|one| (one["file"].as_str().expect("a path").into(), number(one, "at"), number(one, "len")))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_byte_of_one_copy_is_named_by_member_and_place_and_the_other_copy_is_taken() {
    let volume = Volume::new().await;
    assert_eq!(volume.verify(&volume.members), (vec![], vec![]));
    assert!(!volume.serves_all_but(None, "whole"));
    let position = |number: i64| volume.dump().0[number as usize]["position"].as_u64().expect("a number");
    // In the middle of a batch, and in the second chunk of one that lies on two.
    for (number, line, name) in [(5, 300, "small"), (LARGE, 60_000, "large")] {
        let mut taken = 0;
        for (copy, spot) in volume.spots(number, line).into_iter().enumerate() {
            spot.flip();
            let (lines, faults) = volume.verify(&volume.members);
            assert_eq!(lines.len(), 1, "{lines:?}");
            let place = format!("t-0: segment 0, byte {}, offset {number}: ", position(number));
            assert_eq!(lines[0], format!("{place}damaged: {}; another copy is sound", spot.named()));
            assert_eq!(damaged(&faults[0]), [(spot.member.clone(), spot.at, 1)]);
            assert_eq!(faults[0]["healable"], true);
            assert_eq!(faults[0]["offsets"], serde_json::json!([number, number]));
            taken += u32::from(volume.serves_all_but(None, &format!("{name}{copy}")));
            // Without the member that has it good, nobody can heal it.
            let sound = volume.spots(number, line - 1).into_iter().find(|other| other.member != spot.member);
            let sound = sound.expect("two copies").member;
            let left: Vec<PathBuf> =
                volume.members.iter().filter(|member| **member != sound).cloned().collect();
            let (lines, faults) = volume.verify(&left);
            assert_eq!(faults.len(), 1, "{lines:?}");
            assert_eq!(faults[0]["healable"], false);
            assert!(lines[0].contains("checksum") && !lines[0].contains("another copy"), "{lines:?}");
            let places = damaged(&faults[0]);
            let is_in = |(file, at, len): &(PathBuf, u64, u64)| {
                *file == spot.member && (*at..at + len).contains(&spot.at)
            };
            assert!(places.iter().any(is_in), "{places:?}");
            let total: u64 = places.iter().map(|(.., len)| len).sum();
            let size = sent(number).len() as u64;
            // A chunk of the large one has both its copies still.
            assert!(if number == LARGE { total > size } else { total == size }, "{total} of {size}");
            spot.flip();
        }
        assert_eq!(taken, 1, "one of the copies is read first");
    }
    assert_eq!(volume.verify(&volume.members), (vec![], vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_in_both_copies_is_healable_only_where_what_is_left_makes_a_sound_batch() {
    let volume = Volume::new().await;
    // In different sectors: together they still have all of it.
    let spots = volume.spots(7, 100);
    let apart = [spots[0].clone(), spots[1].moved(2048)];
    apart.iter().for_each(Spot::flip);
    let (lines, faults) = volume.verify(&volume.members);
    assert_eq!(faults.len(), 1, "{lines:?}");
    let places: Vec<_> = apart.iter().map(|spot| (spot.member.clone(), spot.at, 1)).collect();
    assert_eq!((damaged(&faults[0]), &faults[0]["healable"]), (places, &Value::Bool(true)));
    assert!(volume.serves_all_but(None, "mixed"), "no copy is good as it is");
    volume.scrubbed().await;
    assert_eq!(volume.verify(&volume.members), (vec![], vec![]), "what is healable heals");

    // The same byte of both.
    spots.iter().for_each(Spot::flip);
    let (lines, faults) = volume.verify(&volume.members);
    assert_eq!(faults.len(), 1, "{lines:?}");
    assert!(lines[0].contains("checksum") && lines[0].contains("no copy is sound: "), "{lines:?}");
    let size = sent(7).len() as u64;
    let head = sent(7).windows(5).position(|bytes| bytes == b"<7:0>").expect("its first line") as u64;
    let starts = volume.spots(7, 0);
    let places: Vec<_> = starts.iter().map(|spot| (spot.member.clone(), spot.at - head, size)).collect();
    assert_eq!((damaged(&faults[0]), &faults[0]["healable"]), (places, &Value::Bool(false)));
    assert!(!volume.serves_all_but(Some(7), "lost"));
    let listed = succeed(&mut volume.log(&["dump"], &volume.members));
    assert_eq!(listed.matches("isvalid: false").count(), 1, "{listed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_epochs_of_batches_are_held_against_the_list() {
    let volume = Volume::new().await;
    let head = sent(3).windows(5).position(|bytes| bytes == b"<3:0>").expect("its first line") as i64;
    // No checksum covers it; the list of epochs knows.
    let spots: Vec<Spot> =
        volume.spots(3, 0).iter().map(|spot| spot.moved(EPOCH as i64 + 3 - head)).collect();
    for spot in &spots {
        spot.flip();
        let (lines, faults) = volume.verify(&volume.members);
        assert_eq!(faults.len(), 1, "{lines:?}");
        assert_eq!(damaged(&faults[0]), [(spot.member.clone(), spot.at, 1)]);
        assert_eq!(faults[0]["healable"], true);
        spot.flip();
    }
    spots.iter().for_each(Spot::flip);
    let (lines, faults) = volume.verify(&volume.members);
    let epoch = |line: &String| line.contains("leader epoch 90, the list of leader epochs has 0 there");
    assert!(lines.iter().any(epoch), "{lines:?}");
    assert!(faults.iter().any(|fault| fault["offsets"] == serde_json::json!([3, 3])), "{faults:?}");
    spots.iter().for_each(Spot::flip);

    // The list itself, beside the files of an export.
    volume.export("out");
    let out = volume.sandbox.join("out");
    let check = |rows: &str| {
        std::fs::write(out.join("t-0/leader-epoch-checkpoint"), rows).expect("the sandbox can be written");
        let verify = |form: &[&str]| {
            let mut command = volume.sandbox.broker();
            command.args(["log", "verify", "--data-dir"]).arg(&out).args(form);
            command
        };
        verified(verify(&[]), verify(&["--json"])).0
    };
    assert_eq!(check("0\n1\n0 0\n"), [""; 0]);
    let wrong = check("0\n2\n0 0\n4 9\n");
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].contains("offset 9: ") && wrong[0].contains("epochs has 4 there"), "{wrong:?}");
    let late = check("0\n2\n0 0\n4 25\n");
    assert_eq!(late, ["t-0: leader epoch 4 is listed from offset 25 on, and the log ends at 24"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_member_full_of_noise_the_others_have_everything() {
    let volume = Volume::new().await;
    let first = volume.spots(0, 0);
    let mut taken = 0;
    for (copy, Spot { member, at }) in first.into_iter().enumerate() {
        let kept = bytes_of(&member);
        let from = at as usize - 100;
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(1 << 20)
        .collect();
        write(&member, from as u64, &noise);
        let (lines, faults) = volume.verify(&volume.members);
        assert!(!faults.is_empty());
        for fault in &faults {
            assert_eq!(fault["healable"], true, "{lines:?}");
            assert!(damaged(fault).iter().all(|(file, ..)| *file == member), "{lines:?}");
        }
        taken += u32::from(volume.serves_all_but(None, &format!("noise{copy}")));
        write(&member, from as u64, &kept[from..from + noise.len()]);
    }
    assert!(taken > 0);
    assert_eq!(volume.verify(&volume.members), (vec![], vec![]));
}

fn write(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).expect("a member");
    file.write_all_at(bytes, at).expect("written");
}
