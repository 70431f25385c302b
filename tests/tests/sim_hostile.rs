//! Hostile bytes on members: whatever stands in superblocks, bitmaps and bad-block logs, opening an array gives an
//! array or an error, never a panic, and takes no more memory than its disks could justify.

// A panic is how a test fails.
#![allow(clippy::unwrap_used)]

use raid::device::Device;
use raid::examine::examine;
use raid::geometry::Layout;
use raid::superblock::Superblock;
use tests::sim::array::{BITMAP, DATA, Rig, SUPERBLOCK, Shape};
use tests::sim::{Rng, for_seeds};

fn rig(members: usize) -> Rig {
    Rig::create(Shape { chunks: 8, region: 8192, ..Shape::small(Layout::near(2), members) }, 1)
}

/// Values that arithmetic trips over.
const NASTY: [u64; 8] = [0, 1, 0x7f, 0x7fff_ffff, 0x8000_0000, u32::MAX as u64, i64::MAX as u64, u64::MAX];

/// Spoils a member: bits flipped, fields overwritten, blocks replaced, in what is read at a start.
fn spoil(rig: &Rig, slot: usize, rng: &mut Rng, mend: bool) {
    let disk = &rig.disks[slot];
    for _ in 0..rng.within(1..6) {
        // Fields of the superblock, header and first bits of the bitmap, or anything before the data.
        let at = match rng.below(4) {
            0 | 1 => SUPERBLOCK.start + rng.below(272),
            2 => BITMAP.start + rng.below(288),
            _ => rng.within(SUPERBLOCK.start..DATA.min(64 << 10) - 8),
        };
        match rng.below(4) {
            0 | 1 => disk.flip(at, rng.below(8) as u8),
            2 => {
                let width = *rng.pick(&[1, 2, 4, 8]);
                let at = at / width * width;
                disk.poke(at, &rng.pick(&NASTY).to_le_bytes()[..width as usize]);
            }
            _ => {
                let noise: Vec<u8> = (0..64).map(|_| rng.draw() as u8).collect();
                disk.poke(at, &noise);
            }
        }
    }
    if mend {
        mend_checksum(rig, slot);
    }
}

/// Overwrites a field of eight bytes of a member's superblock, under a valid checksum.
fn set_field(rig: &Rig, slot: usize, at: u64, value: u64) {
    rig.disks[slot].poke(SUPERBLOCK.start + at, &value.to_le_bytes());
    mend_checksum(rig, slot);
}

/// Does as an attacker would, who computes checksums: the sum of the 32-bit words, the checksum's own field zero.
fn mend_checksum(rig: &Rig, slot: usize) {
    let disk = &rig.disks[slot];
    let at = SUPERBLOCK.start;
    let max_dev = u32::from_le_bytes(disk.peek(at + 220, 4).try_into().unwrap());
    let len = (256 + u64::from(max_dev) * 2).min(4096);
    let mut bytes = disk.peek(at, len);
    bytes[216..220].fill(0);
    let mut words = bytes.chunks_exact(4);
    let mut sum: u64 = words.by_ref().map(|w| u64::from(u32::from_le_bytes(w.try_into().unwrap()))).sum();
    if let [a, b] = words.remainder() {
        sum += u64::from(u16::from_le_bytes([*a, *b]));
    }
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    disk.poke(at + 216, &(sum as u32).to_le_bytes());
}

#[test]
fn no_bytes_on_members_make_a_start_panic() {
    let templates = [2, 3, 4].map(rig);
    let (mut started, mut refused) = (0, 0);
    for_seeds("sim_hostile::no_bytes_on_members_make_a_start_panic", 3000, |seed| {
        let rig = templates[seed as usize % 3].fork(seed);
        let mut rng = rig.sim.fork_rng();
        let mend = rng.one_in(2, 3);
        for slot in rig.slots() {
            if slot == 0 || rng.one_in(1, 3) {
                spoil(&rig, slot, &mut rng, mend);
            }
        }
        // Hostile numbers may make legal, long work: an hour of virtual time is plenty.
        let outcome = rig.sim.block_on(async {
            for device in rig.plug(&rig.slots()) {
                match examine(&*device).await {
                    Ok(examined) => drop(format!("{examined:?}")),
                    Err(error) => assert!(!error.to_string().is_empty()),
                }
            }
            let volume = rig.assemble(rig.plug(&rig.slots())).await?;
            let size = volume.size();
            // Reads and writes at both ends may fail, and must end.
            for at in [0, size.saturating_sub(4096)] {
                drop(volume.read(at, vec![0u8; 4096].as_slice().into()).await);
                let data = vec![1u8; 4096].into();
                drop(volume.write(at, data, raid::device::Durability::Stable).await);
            }
            drop(volume.status());
            drop(volume.stop().await);
            Ok::<(), raid::Error>(())
        });
        match outcome.unwrap() {
            Ok(()) => started += 1,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
            }
        }
    });
    println!("{started} started, {refused} were refused");
    assert!(started > 0 || refused > 0);
    // All members together hold less than 8 MiB: a start that believed a hostile length would stand out.
    let peak = peak_memory();
    assert!(peak < 512 << 20, "the process took {peak} bytes of memory");
}

#[test]
fn a_mended_checksum_is_one_that_the_engine_takes() {
    let rig = rig(2);
    let mut rng = Rng::new(1);
    rig.disks[0].poke(SUPERBLOCK.start + 192, &7u64.to_le_bytes());
    let decoded = |rig: &Rig| {
        let bytes = rig.disks[0].peek(SUPERBLOCK.start, 4096);
        Superblock::decode(&bytes, rig.disks[0].size())
    };
    assert!(decoded(&rig).is_err(), "the update time is covered by the checksum");
    // Spoiling may break more than the checksum; in some of many tries it breaks nothing that matters.
    let taken = (0..200).any(|_| {
        let rig = rig.fork(rng.draw());
        spoil(&rig, 0, &mut rng, true);
        decoded(&rig).is_ok()
    });
    assert!(taken, "the fuzzer never gets past the checksum");
}

/// The most memory that this process ever had resident, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Seed 4448 of the test above: an event count of all ones under a valid checksum, to which assembly added one.
#[test]
fn an_absurd_event_count_is_refused() {
    let rig = rig(2);
    for slot in rig.slots() {
        set_field(&rig, slot, 200, u64::MAX);
    }
    let refused = rig.sim.block_on(rig.assemble(rig.plug(&rig.slots()))).unwrap();
    let error = refused.err().expect("no array has seen so many events").to_string();
    assert!(error.contains("disk0") && error.contains("events"), "{error}");
}
