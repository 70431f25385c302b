//! Batches that are bad in one copy, in the other, in both: what is served, what is rewritten, what is told. On real
//! mirrored volumes that are damaged past the engine while they are served, and in a directory.

use super::common::{self, append, append_stable, batch, defaults, first, keyed, records};
use bytes::Bytes;
use logstore::batch::Outcome;
use logstore::{Error, Home, Partition, ReadLimit, ScrubOptions, Store, StoreOptions};
use raid::create::{Bitmap, CreateOptions, create, make_image};
use raid::device::{Device, Durability, FileDevice, OpenMode};
use raid::runtime::TokioRuntime;
use raid::superblock::{SUPER_BYTES, SUPER_OFFSET, Superblock};
use raid::volume::{AssembleOptions, Volume};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

pub(super) const MEMBER: u64 = 24 << 20;
const CHUNK: u64 = 64 << 10;

/// A mirrored volume whose images outlive it.
pub(super) struct Mirror {
    _dir: TempDir,
    pub(super) images: Vec<PathBuf>,
    /// First byte of the data area in each image.
    pub(super) data: u64,
}

impl Mirror {
    pub(super) fn new(layout: &str, members: usize) -> Self {
        let dir = TempDir::new().unwrap();
        let images: Vec<PathBuf> =
            (0..members).map(|number| dir.path().join(format!("disk{number}"))).collect();
        for image in &images {
            make_image(image, MEMBER).unwrap();
        }
        let options = CreateOptions {
            name: "mirror".to_owned(),
            layout: layout.parse().unwrap(),
            chunk: CHUNK,
            bitmap: Bitmap::STANDARD,
            assume_clean: false,
            force: false,
        };
        let runtime = runtime();
        runtime.block_on(async {
            create(&devices(&images), &options, &TokioRuntime::current()).await.unwrap();
        });
        drop(runtime);
        let mut superblock = [0; SUPER_BYTES];
        File::open(&images[0]).unwrap().read_exact_at(&mut superblock, SUPER_OFFSET).unwrap();
        let data = Superblock::decode(&superblock, MEMBER).unwrap().data_start();
        Self { _dir: dir, images, data }
    }

    /// Runs `work` on a store whose reads each check, and stops all in order or drops all at once.
    pub(super) fn run<T>(&self, in_order: bool, work: impl AsyncFnOnce(Arc<Store>, Arc<Volume>) -> T) -> T {
        self.try_run(in_order, work).unwrap()
    }

    /// The same where the store may not open.
    pub(super) fn try_run<T>(
        &self,
        in_order: bool,
        work: impl AsyncFnOnce(Arc<Store>, Arc<Volume>) -> T,
    ) -> Result<T, Error> {
        let runtime = runtime();
        let outcome = runtime.block_on(async {
            let options = AssembleOptions { hold_resync: true, ..AssembleOptions::default() };
            let tasks = Arc::new(TokioRuntime::current());
            let volume = Volume::assemble(devices(&self.images), options, tasks.clone()).await.unwrap();
            let options = StoreOptions {
                topic_defaults: defaults(),
                verify_interval: Duration::ZERO,
                scrub: ScrubOptions { bytes_per_second: 1 << 30, interval: None },
                ..StoreOptions::default()
            };
            let store = Store::open(Home::Volume(volume.clone()), options, tasks).await?;
            volume.release_resync();
            let answer = work(Arc::clone(&store), Arc::clone(&volume)).await;
            if in_order {
                store.close().await.unwrap();
                volume.stop().await.unwrap();
            }
            Ok((answer, store, volume))
        });
        // As a kill does: nobody is left to do what dropping them asks for.
        drop(runtime);
        outcome.map(|(answer, ..)| answer)
    }

    /// Where the payload stands in one image, each time that it does.
    fn find(&self, image: usize, payload: &[u8]) -> Vec<u64> {
        let bytes = std::fs::read(&self.images[image]).unwrap();
        let from = self.data as usize;
        let found = bytes[from..].windows(payload.len()).enumerate().filter(|(_, window)| *window == payload);
        found.map(|(at, _)| (from + at) as u64).collect()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap()
}

fn devices(images: &[PathBuf]) -> Vec<Arc<dyn Device>> {
    let open = |image: &PathBuf| Arc::new(FileDevice::open(image, OpenMode::ReadWrite).unwrap()) as _;
    images.iter().map(open).collect()
}

/// Changes bytes of a file past whoever has it open.
pub(super) fn change(path: &Path, at: u64, len: usize, how: impl Fn(usize, u8) -> u8) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).unwrap();
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = how(index, *byte);
    }
    file.write_all_at(&bytes, at).unwrap();
}

pub(super) fn noise(index: usize, _: u8) -> u8 {
    ((index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// A value of so many bytes that is found nowhere else.
fn value(number: usize, len: usize) -> String {
    let pieces: Vec<String> = (0..=len / 4).map(|at| format!("<{number}:{at}>")).collect();
    pieces.concat()[..len].to_owned()
}

/// Appends batches of one record each. They lie in their segments, and not in the journal, which would bring them back.
async fn fill(partition: &Arc<Partition>, count: usize, len: usize) {
    for number in 0..count {
        append(partition, &batch(&[&value(number, len)])).await;
    }
}

/// The batches from `from` on as a consumer gets them; a lost one is skipped as its error says. Returns the batches by
/// offset, and what is lost.
async fn consume(partition: &Partition, most: u32) -> (Vec<(i64, Bytes)>, Vec<(i64, i64)>) {
    let (mut at, mut found, mut lost) = (partition.offsets().log_start, Vec::new(), Vec::new());
    while at < partition.offsets().high_watermark {
        let mut bytes = match partition.read(at, most, ReadLimit::HighWatermark, true).await {
            Ok(slice) => slice.copy().await.unwrap(),
            Err(Error::LostBatch { from, next, .. }) => {
                assert_eq!(from, at, "reads up to the lost one go on");
                lost.push((from, next));
                at = next;
                continue;
            }
            Err(error) => panic!("at {at}: {error}"),
        };
        assert!(!bytes.is_empty(), "nothing at {at}");
        while !bytes.is_empty() {
            let header = logstore::batch::Header::parse(&bytes).unwrap();
            let batch = bytes.split_to(header.size as usize);
            logstore::batch::check(&header, &batch).unwrap();
            assert_eq!((header.base_offset, header.leader_epoch), (at, 0));
            found.push((at, batch));
            at = header.next_offset();
        }
    }
    (found, lost)
}

async fn all_right(partition: &Partition, count: usize, len: usize, most: u32) {
    let (found, lost) = consume(partition, most).await;
    assert_eq!(lost, []);
    assert_eq!(found.len(), count);
    for (number, (_, bytes)) in found.iter().enumerate() {
        let wanted = batch(&[&value(number, len)]).bytes();
        assert_eq!(records(bytes), records(&wanted), "batch {number}");
    }
}

/// Scrubs the logs to the end.
async fn scrubbed(store: &Arc<Store>) -> logstore::ScrubStatus {
    assert!(store.start_scrub().unwrap());
    loop {
        let status = store.scrub_status().unwrap();
        if !status.running {
            assert!(status.ended > 0);
            return status;
        }
        // Within the patience of whoever runs the tests.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn equal(mirror: &Mirror, at: u64, len: usize) -> bool {
    let part = |image: &PathBuf| {
        let mut bytes = vec![0; len];
        File::open(image).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    part(&mirror.images[0]) == part(&mirror.images[1])
}

#[test]
fn a_bit_that_flips_anywhere_in_one_copy_is_healed_while_the_log_is_served() {
    let mirror = Mirror::new("n2", 2);
    mirror.run(true, async |store, _volume| {
        let partition = common::topic(&store, "t", &[]).await;
        fill(&partition, 40, 300).await;
        let size = batch(&[&value(20, 300)]).bytes().len();
        let start = mirror.find(0, value(20, 300).as_bytes())[0] - (size as u64 - 300 - 1);
        // Sizes of values differ a little: the header begins where its own offset stands.
        let image = std::fs::read(&mirror.images[0]).unwrap();
        let start =
            (start - 80..start + 80).find(|at| image[*at as usize..][..8] == 20i64.to_be_bytes()).unwrap();
        let mut healed = 0;
        for (number, at) in (0..61).chain([61, 100, 200, 300]).enumerate() {
            for bit in [0, 5, 7] {
                for image in 0..2 {
                    change(&mirror.images[image], start + at, 1, |_, byte| byte ^ (1 << bit));
                    let most = if number % 2 == 0 { 1 } else { 100_000 };
                    all_right(&partition, 40, 300, most).await;
                    let now = store.healing().healed;
                    if now == healed {
                        // The copy that nobody reads: it is left for the scrub. By hand here.
                        change(&mirror.images[image], start + at, 1, |_, byte| byte ^ (1 << bit));
                    }
                    healed = now;
                    assert!(equal(&mirror, start - 4096, 8192), "byte {at} of image {image}");
                }
            }
        }
        // One of the two copies is the one that is read: each of its flips has been found.
        assert_eq!(healed, 65 * 3);
        assert_eq!(store.healing().unreadable, 0);
    });
    mirror.run(true, async |store, _volume| all_right(&first(&store, "t"), 40, 300, 5000).await);
}

#[test]
fn noise_over_a_whole_member_is_served_around_and_made_good() {
    for (layout, members, len) in [("n2", 2, 900), ("n2", 3, 30_000), ("f2", 4, 30_000), ("o2", 3, 200_000)] {
        let mut healed = 0;
        for noisy in 0..members {
            let mirror = Mirror::new(layout, members);
            let count = (3_000_000 / len).min(300);
            mirror.run(true, async |store, _volume| {
                let partition = common::topic(&store, "t", &[("max.message.bytes", "2000000")]).await;
                fill(&partition, count, len).await;
                // Not where the catalog lies: of that no copy is looked at again while the store is open.
                let log = mirror.find(noisy, b"<1:0>").first().copied().unwrap_or(mirror.data + (6 << 20));
                let log = log / 4096 * 4096 - 65536;
                change(&mirror.images[noisy], log, (MEMBER - log) as usize, noise);
                all_right(&partition, count, len, 50_000).await;
                healed += store.healing().healed;
                assert_eq!(store.healing().unreadable, 0);
                scrubbed(&store).await;
                assert_eq!(store.healing().unreadable, 0);
                // All copies are the same now.
                assert_eq!(scrubbed(&store).await.healed, 0);
            });
            mirror.run(true, async |store, _| {
                all_right(&first(&store, "t"), count, len, 1 << 20).await;
            });
        }
        // Of a pair, only one member is read here.
        assert!(healed > 0, "{layout}");
    }
}

#[test]
fn what_is_bad_in_both_copies_is_lost_and_nothing_else() {
    // What is damaged of batch 20 in each copy: from its first byte, so many.
    for (from, len) in [(0, 8), (8, 4), (16, 1), (17, 4), (61, 40), (0, 61), (0, 200)] {
        let mirror = Mirror::new("n2", 2);
        mirror.run(true, async |store, _volume| {
            let partition = common::topic(&store, "t", &[]).await;
            fill(&partition, 60, 2000).await;
            let image = std::fs::read(&mirror.images[0]).unwrap();
            let payload = mirror.find(0, value(20, 2000).as_bytes())[0];
            let start =
                (payload - 80..payload).find(|at| image[*at as usize..][..8] == 20i64.to_be_bytes()).unwrap();
            for image in &mirror.images {
                change(image, start + from, len, |_, byte| byte ^ 0x55);
            }
            for most in [1, 3000, 1 << 20] {
                let (found, lost) = consume(&partition, most).await;
                assert_eq!(lost, [(20, 21)], "{from} {len}");
                assert_eq!(found.len(), 59);
            }
            let told = partition.read(20, 1000, ReadLimit::LogEnd, true).await.unwrap_err().to_string();
            assert!(told.starts_with("t-0: the records at offsets 20..=20 are lost, bytes "), "{told}");
            assert!(
                told.contains(" of segment 0: ") && told.ends_with("; go on reading at offset 21"),
                "{told}"
            );
            assert_eq!(store.healing().unreadable, 1);
        });
        // A clean stop keeps what is good on both sides of it.
        mirror.run(true, async |store, _volume| {
            let (found, lost) = consume(&first(&store, "t"), 10_000).await;
            assert_eq!((found.len(), lost), (59, vec![(20, 21)]));
        });
    }
}

#[test]
fn noise_over_many_batches_of_both_copies_loses_those() {
    let mirror = Mirror::new("n2", 2);
    mirror.run(true, async |store, _volume| {
        let partition = common::topic(&store, "t", &[]).await;
        fill(&partition, 300, 10_000).await;
        let (from, to) = (
            mirror.find(0, value(50, 10_000).as_bytes())[0],
            mirror.find(0, value(199, 10_000).as_bytes())[0],
        );
        for image in &mirror.images {
            change(image, from, (to - from) as usize, noise);
        }
        let (found, lost) = consume(&partition, 100_000).await;
        assert_eq!(lost, [(50, 200)]);
        assert_eq!(found.len(), 150);
        assert_eq!(
            partition.read(120, 1, ReadLimit::LogEnd, true).await.unwrap_err().to_string().split(';').count(),
            2
        );
        assert_eq!(consume(&partition, 1).await.1, [(50, 200)]);
    });
}

#[test]
fn a_log_with_a_lost_batch_is_not_compacted_and_the_others_are() {
    // A header of which nothing is right, and records that are wrong behind a sound one.
    for (from, len) in [(0, 61), (61, 40)] {
        let mirror = Mirror::new("n2", 2);
        mirror.run(true, async |store, _volume| {
            let own = [
                ("cleanup.policy", "compact"),
                ("segment.bytes", "10000"),
                ("min.cleanable.dirty.ratio", "0.01"),
                ("file.delete.delay.ms", "0"),
            ];
            let (bad, good) =
                (common::topic(&store, "bad", &own).await, common::topic(&store, "good", &own).await);
            for number in 0..40 {
                let (key, mark) = (format!("k{}", number % 5), value(number, 900));
                append_stable(&good, &keyed(&[(&key, Some(&mark.replace('<', "[")))])).await;
                append_stable(&bad, &keyed(&[(&key, Some(&mark))])).await;
            }
            store.quiet().await;
            // The journal, which lies before all segments, may hold it too.
            let places = mirror.find(0, &value(12, 900).as_bytes()[..600]);
            let payload = *places.last().unwrap();
            let image = std::fs::read(&mirror.images[0]).unwrap();
            let start = (payload - 100..payload)
                .find(|at| image[*at as usize..][..8] == 12i64.to_be_bytes() && image[*at as usize + 16] == 2)
                .unwrap();
            let sound = image[start as usize..][..200].to_vec();
            for image in &mirror.images {
                change(image, start + from, len, |_, byte| byte ^ 0x55);
            }
            let (before, whole) = (bad.size(), good.size());
            for round in 0..3 {
                // The first time the good one is cleaned; the bad one is told of, and not tried again and again.
                assert_eq!(store.compact().await.unwrap(), usize::from(round == 0));
                assert_eq!((store.uncleanable(), bad.size(), store.healing().unreadable), (1, before, 1));
            }
            assert!(good.size() < whole / 2);
            let (found, lost) = consume(&bad, 5000).await;
            assert_eq!((found.len(), lost), (39, vec![(12, 13)]), "it is lost, and not gone");
            // A good copy comes back: whoever reads it heals the other, and that is a change.
            change(&mirror.images[1], start, 200, |at, _| sound[at]);
            assert_eq!(consume(&bad, 5000).await.1, []);
            assert_eq!(store.compact().await.unwrap(), 1);
            assert_eq!(store.uncleanable(), 0);
            assert!(bad.size() < before / 2);
            assert_eq!(store.healing().healed, 1);
        });
    }
}

#[test]
fn halves_of_two_copies_make_a_whole() {
    let mirror = Mirror::new("n2", 2);
    mirror.run(true, async |store, _volume| {
        let partition = common::topic(&store, "t", &[]).await;
        fill(&partition, 10, 20_000).await;
        let payload = mirror.find(0, value(5, 20_000).as_bytes())[0];
        change(&mirror.images[0], payload + 1000, 700, noise);
        change(&mirror.images[1], payload + 9000, 3000, noise);
        change(&mirror.images[0], payload + 15_000, 1, noise);
        all_right(&partition, 10, 20_000, 1 << 20).await;
        assert_eq!(store.healing().healed, 1);
        assert!(equal(&mirror, payload - 4096, 30_000));
    });
}

#[test]
fn recovery_keeps_what_is_good_in_either_copy_and_makes_it_the_content_of_both() {
    for image in 0..2 {
        // In the middle, at the end, and a header with its length.
        for (number, from, len) in [(10, 61, 100), (19, 0, 12), (19, 300, 400), (0, 0, 2000)] {
            let mirror = Mirror::new("n2", 2);
            mirror.run(false, async |store, _volume| {
                let partition = common::topic(&store, "t", &[]).await;
                fill(&partition, 20, 1000).await;
            });
            let payload = mirror.find(image, value(number, 1000).as_bytes())[0];
            let bytes = std::fs::read(&mirror.images[image]).unwrap();
            let start = (payload - 80..payload)
                .find(|at| {
                    bytes[*at as usize..][..8] == (number as i64).to_be_bytes()
                        && bytes[*at as usize + 16] == 2
                })
                .unwrap();
            change(&mirror.images[image], start + from, len, |_, byte| byte ^ 0x3c);
            mirror.run(true, async |store, _volume| {
                all_right(&first(&store, "t"), 20, 1000, 1 << 20).await;
                assert!(store.healing().healed > 0, "image {image}, batch {number}");
            });
            assert!(equal(&mirror, start - 4096, 65536), "image {image}, batch {number}");
        }
    }
}

#[test]
fn in_a_directory_the_error_names_what_is_lost() {
    let place = common::Place::directory();
    place.run_and_close(async |store: Arc<Store>| {
        let partition = common::topic(&store, "t", &[]).await;
        fill(&partition, 30, 1000).await;
    });
    let log = common::files(&place.partition_dir("t", 0), "log").remove(0);
    let bytes = std::fs::read(&log).unwrap();
    let payload = value(12, 1000);
    let at = bytes.windows(1000).position(|window| window == &payload.as_bytes()[..1000]).unwrap();
    change(&log, at as u64, 100, noise);
    place.run_and_close(async |store: Arc<Store>| {
        let partition = first(&store, "t");
        let (found, lost) = consume(&partition, 5000).await;
        assert_eq!((found.len(), lost), (29, vec![(12, 13)]));
        assert_eq!((store.healing().healed, store.healing().unreadable), (0, 1));
    });
}

/// Batches of a mirror, each in a record of the log; the batch with some of them is damaged in every way.
#[test]
fn batches_that_a_user_planted_are_neither_served_nor_counted() {
    let planted = |offset: i64| {
        let mut bytes = batch(&[&value(9_000, 200)]).bytes().to_vec();
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes[12..16].copy_from_slice(&[0; 4]);
        bytes
    };
    let harms: [(u64, &[u8]); 5] =
        [(0, &[0; 61]), (8, &[0, 0, 1, 200]), (8, &[0, 0, 90, 0]), (23, &[0, 0, 3, 3]), (75, b"rotten")];
    for (ahead, (from, harm)) in [1, 2, 12, 60].into_iter().flat_map(|ahead| harms.map(|harm| (ahead, harm)))
    {
        let place = common::Place::directory();
        place.run_and_close(async |store: Arc<Store>| {
            let log = common::topic(&store, "t", &[]).await;
            for number in 0..30 {
                let values = (0..4).map(|at| planted(4 * number + at + ahead)).collect();
                append_stable(&log, &common::Batch { values, ..batch(&[]) }).await;
            }
        });
        let path = common::files(&place.partition_dir("t", 0), "log").remove(0);
        let mut bytes = Bytes::from(std::fs::read(&path).unwrap());
        let start: usize = (0..12)
            .map(|_| {
                let size = logstore::batch::Header::parse(&bytes).unwrap().size as usize;
                drop(bytes.split_to(size));
                size
            })
            .sum();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(harm, start as u64 + from).unwrap();
        let what = format!("{ahead} ahead, byte {from}");
        runtime().block_on(async {
            let inspection =
                logstore::inspect::Inspection::directory(&place.dir.path().join("data")).await.unwrap();
            let options = logstore::inspect::verify::Options { now: None };
            let view = &inspection.partitions[0];
            let (counts, findings) =
                logstore::inspect::verify::verify(view, options, &mut |_| ()).await.unwrap();
            // One that keeps its frame is counted, and has no records.
            assert_eq!(counts.records, 4 * 29, "{what}: {findings:?}");
            assert!(counts.batches <= 30, "{what}");
        });
        place.run_and_close(async |store: Arc<Store>| {
            let (found, lost) = consume(&first(&store, "t"), 3000).await;
            assert_eq!((found.len(), lost), (29, vec![(48, 52)]), "{what}");
        });
    }
}

/// The marker of a transaction is lost, and whatever is derived from the log is gone: all else is read, and appended to.
#[test]
fn a_lost_marker_takes_nothing_else_with_it() {
    let place = common::Place::directory();
    let marker = place.run_and_close(async |store: Arc<Store>| {
        let log = common::topic(&store, "t", &[]).await;
        append_stable(&log, &batch(&["in a transaction"]).by(7, 0, 0).txn()).await;
        log.append_marker(7, 0, 0, Outcome::Commit, Durability::Cached).await.unwrap();
        fill(&log, 20, 300).await;
        log.read(1, 1, ReadLimit::HighWatermark, true).await.unwrap().copy().await.unwrap()
    });
    let dir = place.partition_dir("t", 0);
    // Its time is the broker's, and the batches are old: it has begun a new segment.
    let found = common::files(&dir, "log").into_iter().find_map(|log| {
        let bytes = std::fs::read(&log).unwrap();
        bytes.windows(marker.len()).position(|window| window == marker).map(|at| (log, at))
    });
    let (log, at) = found.unwrap();
    change(&log, at as u64 + 61, 10, |_, byte| byte ^ 0x55);
    for kind in ["index", "timeindex", "snapshot", "txnindex"] {
        for file in common::files(&dir, kind) {
            std::fs::remove_file(file).unwrap();
        }
    }
    place.run_and_close(async |store: Arc<Store>| {
        let log = first(&store, "t");
        let (found, lost) = consume(&log, 1000).await;
        assert_eq!((found.len(), lost), (21, vec![(1, 2)]));
        assert_eq!(log.offset_for_timestamp(common::NOW).await.unwrap(), Some((0, common::NOW)));
        assert_eq!(common::append(&log, &batch(&["more"])).await, 22);
        assert_eq!(log.offsets().last_stable, 23, "that it had ended was known at the stop");
    });
}

#[test]
fn a_scrub_finds_what_nobody_reads_and_goes_on_after_a_restart() {
    let mirror = Mirror::new("n2", 2);
    mirror.run(true, async |store, _volume| {
        for name in ["a", "b", "c"] {
            let partition = common::topic(&store, name, &[("segment.bytes", "100000")]).await;
            fill(&partition, 100, 5000).await;
        }
        // One byte of each copy, each of another batch; one is in both.
        for (image, number) in [(0, 10), (1, 20), (0, 90), (1, 90)] {
            for at in mirror.find(image, &value(number, 5000).as_bytes()[..200]) {
                change(&mirror.images[image], at + 100, 1, |_, byte| byte ^ 1);
            }
        }
        let status = scrubbed(&store).await;
        assert_eq!((status.healed, status.unreadable), (6, 3), "{status:?}");
        assert!(status.bytes > 1_500_000 && status.bytes < 1_600_000, "{status:?}");
        // All is well now but for what is lost, which stays so.
        let status = scrubbed(&store).await;
        assert_eq!((status.healed, status.unreadable), (0, 0), "{status:?}");
        for name in ["a", "b", "c"] {
            let (found, lost) = consume(&first(&store, name), 1 << 20).await;
            assert_eq!((found.len(), lost), (99, vec![(90, 91)]));
        }
        // Stopped at once: where it is, is kept.
        assert!(store.start_scrub().unwrap());
        assert!(!store.start_scrub().unwrap());
    });
    mirror.run(true, async |store, _volume| {
        let before = store.scrub_status().unwrap();
        assert!(!before.running);
        let status = scrubbed(&store).await;
        assert!(status.bytes >= before.bytes && status.ended > before.ended, "{before:?} {status:?}");
        assert!(status.bytes > 1_500_000 && status.bytes < 1_600_000, "{status:?}");
    });
}
