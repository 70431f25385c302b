//! Rebuilds that one side left half-way and the other goes on with: this engine and the real md, in a virtual machine,
//! both ways. That the other goes on, and neither starts over nor takes the rest for done, is made to show: before it
//! has the array, what lies behind the recorded place is overwritten on the member being filled, and one page before it.
//! What lies behind must be made good; that one page must stay as it is, and be all that a check finds.
//!
//! Costs: a rebuild is held at 2 MiB/s until it has come some megabytes far, those of all arrays at once.

use serde_json::Value;
use std::fmt::Write;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::md::{Array, Legs, PATIENCE, blank, guest, members, spoil, superblock, try_superblock};
use tests::process::{Sandbox, bytes_of, eventually, left_out};
use tests::vm::{DONE, POWER_CUT, boot, drives, results};
use tests::volumes::{pattern, patterned};

/// Many times what the machine needs when it has a core to itself.
const LIMIT: Duration = Duration::from_secs(600);
const CHUNK: u64 = 64 << 10;
const PAGE: u64 = 4096;
/// Half a minute at the speed that rebuilds are held at.
const MEMBER: u64 = 64 << 20;
/// The slot that is filled.
const SLOT: usize = 1;

/// Why a member is being filled, and how its filling ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    /// Another disk, and an orderly stop.
    Stopped,
    /// Another disk, and `kill -9`.
    Killed,
    /// The same disk as before, to be given what it missed, and an orderly stop.
    ByBitmap,
}

/// An array with a member that is half filled.
struct HalfWay {
    array: Array,
    images: Vec<PathBuf>,
    /// Bytes of the target's data area that are filled.
    filled: u64,
    /// Where the data area of the target has a page that was made wrong, and what it held.
    page: (u64, Vec<u8>),
}

impl HalfWay {
    /// Of an array that nobody has open. `written`: all that was written since the member left; with `by_bitmap`, only
    /// that is missing.
    fn of(array: Array, images: Vec<PathBuf>, written: &[(u64, u64)], by_bitmap: bool) -> Self {
        let name = array.name().to_owned();
        let (target, legs) = (images[SLOT].clone(), Legs::of(&images));
        let found = superblock(&target);
        let recovery = found.recovery.unwrap_or_else(|| panic!("{name}: nothing is being filled: {found:?}"));
        assert_eq!(recovery.by_bitmap, by_bitmap, "{name}");
        let filled = recovery.offset * 512;
        assert!((PAGE..legs.used() - 8 * CHUNK).contains(&filled), "{name}: {filled} of {}", legs.used());
        for other in images.iter().filter(|image| **image != target) {
            assert!(superblock(other).holds_everything(), "{name}: {}", other.display());
        }
        let touched: Vec<u64> = written.iter().flat_map(|&(at, len)| legs.on_slot(SLOT, at, len)).collect();
        // Behind that place: all of it, or what the bitmap says is missing.
        if by_bitmap {
            let missing: Vec<&u64> = touched.iter().filter(|at| **at >= filled).collect();
            assert!(missing.len() > 8, "{name}: next to nothing is left to do");
            for at in missing {
                spoil(&target, legs.start() + at, CHUNK);
            }
        } else {
            spoil(&target, legs.start() + filled, legs.used() - filled);
        }
        // Before it: a page of a chunk that an unclean stop has nothing to do with.
        let chunks = (0..filled / CHUNK).rev().map(|chunk| chunk * CHUNK);
        let at = chunks.skip(8).find(|at| !touched.contains(at)).expect("not all was written");
        let mut held = vec![0; PAGE as usize];
        let file = File::open(&target).expect("the image is there");
        file.read_exact_at(&mut held, legs.start() + at).expect("the image is whole");
        spoil(&target, legs.start() + at, PAGE);
        Self { array, images, filled, page: (at, held) }
    }

    fn target(&self) -> &Path {
        &self.images[SLOT]
    }

    /// The position of the wrong page on the target's file.
    fn page_at(&self) -> u64 {
        superblock(self.target()).data_start() + self.page.0
    }

    /// Makes the wrong page right again.
    fn mend(&self) {
        let file = File::options().write(true).open(self.target()).expect("the image is there");
        file.write_all_at(&self.page.1, self.page_at()).expect("the image can be written");
    }

    fn assert_page_is_wrong(&self) {
        let mut found = vec![0; PAGE as usize];
        let file = File::open(self.target()).expect("the image is there");
        file.read_exact_at(&mut found, self.page_at()).expect("the image is whole");
        assert!(found == patterned(PAGE, 0xbad), "{}: filled from the start again", self.array.name());
    }
}

/// An array made here, with a rebuild that was stopped half-way here.
fn begun_here(layout: &str, n: usize, case: Case) -> HalfWay {
    let name = format!("{layout}x{n}{case:?}").to_lowercase();
    let mut array = Array::create(&name, layout, n, MEMBER, "--bitmap-chunk 64K", "--sync-max 2M");
    array.fill(array.served().size());
    let mut images = array.images();
    array.raid10("fail", &[&SLOT.to_string()]);
    let mut written = array.write_more();
    array.raid10("remove", &[&SLOT.to_string()]);
    written.extend(array.write_more());
    let said = if case == Case::ByBitmap {
        // Enough that something is missing everywhere.
        (0..20).for_each(|_| written.extend(array.write_more()));
        array.raid10("add", &[images[SLOT].to_str().expect("plain")])
    } else {
        images[SLOT] = array.device("new", MEMBER);
        array.raid10("add", &[images[SLOT].to_str().expect("plain")])
    };
    let expected = if case == Case::ByBitmap { "is back in slot 1" } else { "is being rebuilt in slot 1" };
    assert!(said.contains(expected), "{said}");
    assert_eq!(array.status()["state"], "degraded", "{name}");
    eventually("a checkpoint of the rebuild", PATIENCE, || {
        let recovery = try_superblock(&images[SLOT]).ok()?.recovery?;
        (recovery.offset > 0).then_some(())
    });
    // Before and behind the place where it is.
    written.extend(array.write_more());
    assert_eq!(array.states()[SLOT], "rebuilding", "{name}: it was not held back");
    match case {
        Case::Killed => array.kill(),
        Case::Stopped | Case::ByBitmap => array.stop(),
    }
    assert_eq!(superblock(&images[0]).is_clean(), case != Case::Killed, "{name}");
    HalfWay::of(array, images, &written, case == Case::ByBitmap)
}

/// What runs in the background of this thread's own arrays: one thread each, since all wait most of the time.
fn all_at_once<T: Send, C: Copy + Send>(cases: &[C], each: impl Fn(C) -> T + Copy + Send + Sync) -> Vec<T> {
    std::thread::scope(|threads| {
        let running: Vec<_> = cases.iter().map(|&case| threads.spawn(move || each(case))).collect();
        running.into_iter().map(|one| one.join().expect("it said why")).collect()
    })
}

#[test]
fn what_was_begun_here_is_ended_by_md() {
    if left_out("rebuilds begun here and ended by the kernel's md, in a virtual machine") {
        return;
    }
    let cases = [
        ("n2", 4, Case::Stopped),
        ("f2", 4, Case::Stopped),
        ("o2", 3, Case::Killed),
        ("n2", 3, Case::ByBitmap),
    ];
    let arrays = all_at_once(&cases, |(layout, n, case)| begun_here(layout, n, case));
    let mut script = String::new();
    for (at, half) in arrays.iter().enumerate() {
        let (drives, target) = (guest(&half.images), guest(&half.images[SLOT..][..1]));
        let page = half.page_at() / PAGE;
        let good = half.array.sandbox.join(format!("page{at}"));
        std::fs::write(&good, &half.page.1).expect("the sandbox has room");
        write!(
            script,
            "/tools/mdadm --assemble /dev/md{at} {drives}\n\
             cd /sys/block/md{at}/md\n\
             until [ $(cat degraded) = 0 ] && [ $(cat sync_action) = idle ]; do usleep 50000; done\n\
             echo RESULT states{at} $(cat dev-*/state)\n\
             echo check > sync_action\n\
             until [ $(cat sync_action) = idle ]; do usleep 50000; done\n\
             echo RESULT wrong{at} $(cat mismatch_cnt)\n\
             cd /\n\
             /tools/mdadm --stop /dev/md{at}\n\
             echo RESULT page{at} $(dd if={target} bs={PAGE} skip={page} count=1 | sha256sum)\n\
             dd if=/dev/drive/page{at} of={target} bs={PAGE} seek={page} count=1 conv=fsync\n\
             /tools/mdadm --assemble /dev/md{at} {drives}\n\
             cd /sys/block/md{at}/md\n\
             echo check > sync_action\n\
             until [ $(cat sync_action) = idle ]; do usleep 50000; done\n\
             echo RESULT mismatches{at} $(cat mismatch_cnt)\n\
             echo RESULT sum{at} $(sha256sum < /dev/md{at})\n\
             cd /\n\
             /tools/mdadm --stop /dev/md{at}\n"
        )
        .expect("a String takes all");
    }
    let mut all: Vec<PathBuf> = arrays.iter().flat_map(|half| half.images.clone()).collect();
    all.extend(arrays.iter().enumerate().map(|(at, half)| half.array.sandbox.join(format!("page{at}"))));
    let output = boot(&arrays[0].array.sandbox, &drives(&all), &script, LIMIT);
    let told = results(&output);
    for (at, half) in arrays.into_iter().enumerate() {
        let (n, name) = (half.images.len(), half.array.name().to_owned());
        let states = vec!["in_sync"; n].join(" ");
        assert_eq!(told[format!("states{at}").as_str()], states, "{name}:\n{output}");
        // md counts in units of 64 KiB at most: it is the page, and nothing else.
        let wrong: u64 = told[format!("wrong{at}").as_str()].parse().expect("a number");
        assert!((8..=128).contains(&wrong), "{name}: {wrong} sectors differ:\n{output}");
        assert_eq!(told[format!("mismatches{at}").as_str()], "0", "{name}: copies differ:\n{output}");
        let sum = told[format!("sum{at}").as_str()].split_whitespace().next();
        assert_eq!(sum, Some(half.array.sum().as_str()), "{name}: md reads other bytes");
        for image in &half.images {
            let found = superblock(image);
            assert!(found.is_clean() && found.holds_everything(), "{}: {found:?}", image.display());
        }
    }
}

/// A run of chunks that is copied to an array of md's.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// First chunk in the source.
    from: u64,
    /// First chunk in the array.
    to: u64,
    /// Chunks.
    len: u64,
}

/// Runs all over an array, in steps that are no multiple of a row.
fn runs(first: u64, step: u64, count: u64, len: u64) -> Vec<Run> {
    (0..count).map(|i| Run { from: first + 300 + i * len, to: first + i * step, len }).collect()
}

impl Case {
    /// What is written while the member is away.
    fn away(self) -> Vec<Run> {
        // Enough that something is missing everywhere.
        if self == Self::ByBitmap { runs(2, 119, 12, 60) } else { runs(2, 97, 14, 1) }
    }

    /// What is written while it is being filled.
    fn meanwhile() -> Vec<Run> {
        runs(7, 231, 6, 1)
    }

    /// Both.
    fn written(self) -> Vec<Run> {
        [self.away(), Self::meanwhile()].concat()
    }
}

/// Where an array of md's is, while the machine runs and after.
struct Theirs {
    images: Vec<PathBuf>,
    former: PathBuf,
    case: Case,
}

impl Theirs {
    fn new(sandbox: &Sandbox, at: usize, n: usize, case: Case) -> Self {
        let mut images = members(sandbox, &format!("md{at}"), n);
        for image in &images {
            blank(image, MEMBER);
        }
        let former = images[SLOT].clone();
        if case != Case::ByBitmap {
            images[SLOT] = sandbox.join(format!("md{at}-new"));
            blank(&images[SLOT], MEMBER);
            spoil(&images[SLOT], 1 << 20, MEMBER - (1 << 20));
        }
        Self { images, former, case }
    }

    fn drives(&self) -> Vec<PathBuf> {
        let new = self.images.iter().filter(|image| **image != self.former);
        new.chain([&self.former]).cloned().collect()
    }

    /// Made, filled, and written to while a member is away. A stop in between, and no bit is left in the bitmap.
    fn prepare(&self, at: usize, layout: &str) -> String {
        let n = self.images.len();
        let mut first = self.images.clone();
        first[SLOT].clone_from(&self.former);
        let (all, former) = (guest(&first), guest(&first[SLOT..][..1]));
        let mut script = format!(
            "/tools/mdadm --create /dev/md{at} --run --homehost=any --name=md{at} --metadata=1.2 --level=10 \
             --layout={layout} --chunk=64 --data-offset=1M --bitmap=internal --bitmap-chunk=64K --assume-clean \
             --raid-devices={n} {all}\n\
             dd if=/dev/drive/source of=/dev/md{at} bs=64k count=$(($(cat /sys/block/md{at}/size) / 128)) conv=fsync\n\
             /tools/mdadm --stop /dev/md{at}\n\
             /tools/mdadm --assemble /dev/md{at} {all}\n\
             /tools/mdadm /dev/md{at} --fail {former}\n"
        );
        script += &copy(at, &self.case.away());
        write!(
            script,
            "until /tools/mdadm /dev/md{at} --remove {former}; do usleep 50000; done\n\
             echo RESULT degraded{at} $(cat /sys/block/md{at}/md/degraded)\n\
             echo 1000 > /sys/block/md{at}/md/sync_speed_min\n\
             echo 2000 > /sys/block/md{at}/md/sync_speed_max\n"
        )
        .expect("a String takes all");
        script
    }

    /// A member begins to be filled.
    fn begin(&self, at: usize) -> String {
        let how = if self.case == Case::ByBitmap { "--re-add" } else { "--add" };
        format!("/tools/mdadm /dev/md{at} {how} {}\n", guest(&self.images[SLOT..][..1]))
    }

    /// It has come some way, and comes no further.
    fn hold(at: usize) -> String {
        format!(
            "while :; do\n\
             set -- $(cat /sys/block/md{at}/md/sync_completed)\n\
             case $1 in none|delayed) ;; *) [ $1 -lt 16384 ] || break;; esac\n\
             usleep 20000\n\
             done\n\
             echo 1 > /sys/block/md{at}/md/sync_speed_min\n\
             echo 1 > /sys/block/md{at}/md/sync_speed_max\n\
             echo RESULT action{at} $(cat /sys/block/md{at}/md/sync_action)\n"
        )
    }

    /// What it should hold then.
    fn content(&self, source: &[u8]) -> Vec<u8> {
        let size = superblock(&self.images[0]).geometry().expect("it was checked when decoded").size();
        let mut content = source[..size as usize].to_vec();
        for Run { from, to, len } in self.case.written() {
            let (from, to, len) = ((from * CHUNK) as usize, (to * CHUNK) as usize, (len * CHUNK) as usize);
            content[to..][..len].copy_from_slice(&source[from..][..len]);
        }
        content
    }
}

/// Copies chunks from the source to an array.
fn copy(at: usize, runs: &[Run]) -> String {
    let copy = |Run { from, to, len }: &Run| {
        format!(
            "dd if=/dev/drive/source of=/dev/md{at} bs=64k skip={from} seek={to} count={len} oflag=direct\n"
        )
    };
    runs.iter().map(copy).collect()
}

/// Ends what md has begun; a scrub finds nothing but the one page, and nothing once that is mended.
fn ended_here(half: &mut HalfWay) {
    let (images, name) = (half.images.clone(), half.array.name().to_owned());
    half.array.serve(&images, "");
    half.array.raid10("wait", &[]);
    half.array.until_in_sync(SLOT, &images[SLOT]);
    assert_eq!(half.array.states(), vec!["in_sync"; images.len()], "{name}");
    let report: Value =
        serde_json::from_str(&half.array.raid10("scrub", &["--wait", "--json"])).expect("one document");
    let found = report["mismatches"].as_array().expect("mismatches");
    let wrong = half.page_at()..half.page_at() + PAGE;
    let is_it = |one: &Value| {
        let copies = one["copies"].as_array().expect("copies");
        let at =
            copies.iter().filter(|copy| copy["slot"] == SLOT).filter_map(|copy| copy["file_offset"].as_u64());
        at.filter(|at| wrong.contains(at)).count() == 1
    };
    assert!(
        !found.is_empty() && found.iter().all(is_it),
        "{name}: page {wrong:?} of {}: {report:#}",
        half.filled
    );
    half.array.stop();
    half.assert_page_is_wrong();
    half.mend();
    half.array.serve(&images, "");
    let said = half.array.raid10("scrub", &["--wait"]);
    assert!(said.contains("no mismatches"), "{name}: {said}");
    half.array.assert_content();
    half.array.stop();
    for missing in 0..images.len() {
        let mut rest = images.clone();
        rest.remove(missing);
        half.array.serve(&rest, "--read-only");
        half.array.assert_content();
        half.array.stop();
    }
}

#[test]
fn what_md_has_begun_is_ended_here() {
    if left_out("rebuilds begun by the kernel's md, in a virtual machine, and ended here") {
        return;
    }
    let sandbox = Sandbox::new();
    let cases = [
        ("n2", 4, Case::Stopped),
        ("f2", 3, Case::Stopped),
        ("n2", 3, Case::ByBitmap),
        ("o2", 3, Case::Killed),
    ];
    let source = sandbox.join("source");
    pattern(&source, 3 * MEMBER, 5);
    let theirs: Vec<_> =
        cases.iter().enumerate().map(|(at, &(_, n, case))| Theirs::new(&sandbox, at, n, case)).collect();
    let mut script = String::new();
    let numbered = || theirs.iter().enumerate();
    numbered().for_each(|(at, one)| script += &one.prepare(at, cases[at].0));
    numbered().for_each(|(at, one)| script += &one.begin(at));
    numbered().for_each(|(at, _)| script += &Theirs::hold(at));
    let mut cut = String::new();
    for (at, one) in numbered() {
        let meanwhile = copy(at, &Case::meanwhile());
        if one.case == Case::Killed {
            cut += &meanwhile;
        } else {
            script += &meanwhile;
            writeln!(script, "/tools/mdadm --stop /dev/md{at}").expect("a String takes all");
        }
    }
    let mut images: Vec<PathBuf> = theirs.iter().flat_map(Theirs::drives).collect();
    images.push(source.clone());
    let output = boot(&sandbox, &drives(&images), &(script + DONE + &cut + POWER_CUT), LIMIT);
    let told = results(&output);
    let source = bytes_of(&source);
    for (at, one) in theirs.iter().enumerate() {
        assert_eq!(told[format!("degraded{at}").as_str()], "1", "{output}");
        assert_eq!(told[format!("action{at}").as_str()], "recover", "{output}");
        let name = one.images[0].to_str().expect("plain");
        let array = Array::known(Sandbox::new(), name, one.content(&source));
        assert_eq!(superblock(&one.images[0]).is_clean(), one.case != Case::Killed, "{name}");
        let written: Vec<_> =
            one.case.written().iter().map(|run| (run.to * CHUNK, run.len * CHUNK)).collect();
        let mut half = HalfWay::of(array, one.images.clone(), &written, one.case == Case::ByBitmap);
        ended_here(&mut half);
    }
}
