//! The header and the catalog of a volume, of which a copy has rotted while the store was closed: the good one is found and
//! made the content of all, after a stop in order and after a kill. Nothing that is still there in some copy is formatted
//! away, or taken for the newest when it is old.

use super::common::{self, append_stable, batch, first};
use super::healing::{MEMBER, Mirror, change, noise};
use logstore::{Error, Store};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Where the catalog begins on the volume.
const CATALOG: u64 = 64 << 10;
/// Bytes reserved for it on volumes as small as these.
const REGION: u64 = 2 << 20;
const HEADER: Range<u64> = 0..8192;

fn zero(_: usize, _: u8) -> u8 {
    0
}

fn damage(mirror: &Mirror, image: usize, part: &Range<u64>, how: impl Fn(usize, u8) -> u8) {
    change(&mirror.images[image], mirror.data + part.start, (part.end - part.start) as usize, how);
}

fn read(mirror: &Mirror, image: usize, part: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (part.end - part.start) as usize];
    File::open(&mirror.images[image]).unwrap().read_exact_at(&mut bytes, mirror.data + part.start).unwrap();
    bytes
}

/// How much of the catalog's region is used, as the newer copy of the header has it.
fn used(mirror: &Mirror, image: usize) -> u64 {
    let header = read(mirror, image, &HEADER);
    let field =
        |copy: usize, at: usize| u64::from_le_bytes(header[copy * 4096 + at..][..8].try_into().unwrap());
    let newest = usize::from(field(1, 16) > field(0, 16));
    field(newest, 56)
}

/// A mirror with a store on it that has seen a few commits.
fn made(in_order: bool) -> Mirror {
    let mirror = Mirror::new("n2", 2);
    mirror.run(in_order, async |store, _volume| {
        let log = common::topic(&store, "t", &[]).await;
        for number in 0..5 {
            append_stable(&log, &batch(&[&format!("value {number}")])).await;
        }
        common::topic(&store, "gone", &[]).await;
        store.delete_topic("gone").await.unwrap();
        common::topic(&store, "last", &[]).await;
        store.quiet().await;
    });
    mirror
}

async fn all_there(store: &Store) {
    let names: Vec<String> = store.topics().iter().map(|topic| topic.name().to_owned()).collect();
    assert_eq!(names, ["last", "t"]);
    assert_eq!(common::read_all(&first(store, "t")).await.len(), 5);
}

#[test]
fn the_store_opens_from_whichever_copy_of_its_header_and_catalog_is_good() {
    let everything = 0..CATALOG + REGION;
    for in_order in [true, false] {
        for image in 0..2 {
            for part in
                [HEADER, 4096..8192, CATALOG..CATALOG + REGION, CATALOG..CATALOG + 4096, everything.clone()]
            {
                for how in [noise, zero] {
                    let what = format!("in order: {in_order}, image {image}, {part:?}");
                    let mirror = made(in_order);
                    damage(&mirror, image, &part, how);
                    let opened = mirror.try_run(true, async |store, _volume| all_there(&store).await);
                    assert!(opened.is_ok(), "{what}: {opened:?}");
                    let catalog = CATALOG..CATALOG + used(&mirror, 1 - image);
                    assert!(read(&mirror, 0, &HEADER) == read(&mirror, 1, &HEADER), "{what}");
                    assert!(read(&mirror, 0, &catalog) == read(&mirror, 1, &catalog), "{what}");
                    // What was bad is good for all there is now.
                    damage(&mirror, 1 - image, &everything, how);
                    mirror.run(true, async |store, _volume| all_there(&store).await);
                }
            }
        }
    }
}

/// One bit of the catalog, which no checksum covers, tells the newest of its two commits.
#[test]
fn a_copy_that_speaks_for_an_old_commit_does_not_count() {
    for image in 0..2 {
        let mirror = made(false);
        damage(&mirror, image, &(CATALOG + 9..CATALOG + 10), |_, byte| byte ^ 1);
        mirror.run(true, async |store, _volume| all_there(&store).await);
    }
}

#[test]
fn pages_of_both_copies_make_a_catalog() {
    for in_order in [true, false] {
        let mirror = made(in_order);
        let region = CATALOG..CATALOG + REGION;
        let pages_with = |image: usize, text: &[u8]| {
            let bytes = read(&mirror, image, &region);
            let pages = bytes.chunks(4096).enumerate();
            let found = pages.filter(|(_, page)| page.windows(text.len()).any(|window| window == text));
            found.map(|(number, _)| CATALOG + number as u64 * 4096).collect::<Vec<_>>()
        };
        let (here, there) = (pages_with(0, b"\"name\":\"t\""), pages_with(1, b"cluster_id"));
        assert!(!here.is_empty() && !there.is_empty() && here.iter().all(|page| !there.contains(page)));
        for (image, pages) in [(0, &here), (1, &there)] {
            for page in pages {
                damage(&mirror, image, &(page + 50..page + 150), |_, byte| byte ^ 0x5a);
            }
        }
        mirror.run(true, async |store, _volume| all_there(&store).await);
        for page in here.iter().chain(&there) {
            let page = *page..page + 4096;
            assert!(read(&mirror, 0, &page) == read(&mirror, 1, &page));
        }
    }
}

#[test]
fn what_is_damaged_in_all_copies_is_refused_and_left_as_it_is() {
    for (part, how) in [
        (HEADER, noise as fn(usize, u8) -> u8),
        // The catalog says that there was something.
        (HEADER, zero),
        (CATALOG..CATALOG + REGION, noise),
        (CATALOG..CATALOG + REGION, zero),
    ] {
        let mirror = made(true);
        for image in 0..2 {
            damage(&mirror, image, &part, how);
        }
        let everything = 0..MEMBER - mirror.data;
        let before = [0, 1].map(|image| read(&mirror, image, &everything));
        let opened = mirror.try_run(true, async |_store, _volume| ());
        assert!(
            matches!(
                opened,
                Err(Error::NotALogStore { .. } | Error::DamagedHeader { .. } | Error::Catalog { .. })
            ),
            "{opened:?}"
        );
        assert!(before == [0, 1].map(|image| read(&mirror, image, &everything)));
    }
}
