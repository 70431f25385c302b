//! The fuzz targets' entry functions, driven from the seeds of real sessions: each as it was recorded, and very many
//! times with something changed. libFuzzer goes on where this ends (`fuzz/README.md`).

use std::path::PathBuf;
use tests::nbd_fuzz::{handshake, replies, transmission};
use tests::process::{quick, repository};

/// Numbers that wait to be taken for lengths.
const TELLING: [u64; 8] = [0, 1, 0xff, 0x1000, 32 << 20, (32 << 20) + 1, u32::MAX as u64, u64::MAX];

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }

    /// One change: a bit, a byte, a number, a cut, something twice, something of another seed.
    fn change(&mut self, seed: &mut Vec<u8>, others: &[(PathBuf, Vec<u8>)]) {
        let at = self.below(seed.len());
        match self.below(7) {
            0 if !seed.is_empty() => seed[at] ^= 1 << self.below(8),
            1 if !seed.is_empty() => seed[at] = self.below(256) as u8,
            2 => {
                let number = TELLING[self.below(TELLING.len())].to_be_bytes();
                let width = [1, 2, 4, 8][self.below(4)];
                let end = (at + width).min(seed.len());
                seed[at..end].copy_from_slice(&number[8 - width..][..end - at]);
            }
            3 => seed.truncate(at),
            4 => {
                let len = self.below(64).min(seed.len() - at);
                let again = seed[at..at + len].to_vec();
                seed.splice(at..at, again);
            }
            5 => {
                let other = &others[self.below(others.len())].1;
                let from = self.below(other.len());
                let len = self.below(256).min(other.len() - from);
                seed.splice(at..at, other[from..from + len].iter().copied());
            }
            _ => {
                let len = self.below(40).min(seed.len() - at);
                seed.drain(at..at + len);
            }
        }
    }
}

fn seeds(phase: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = repository().join("fuzz/seeds").join(phase);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.expect("the work tree can be read").path()).collect();
    paths.sort();
    assert!(paths.len() >= 5, "only {} seeds in {}", paths.len(), dir.display());
    paths
        .into_iter()
        .map(|path| (path.clone(), std::fs::read(path).expect("the work tree can be read")))
        .collect()
}

/// Panics, naming how to get there again, if `entry` does.
fn drive(phase: &str, rounds: usize, entry: fn(&[u8])) {
    let seeds = seeds(phase);
    let rounds = if quick() { rounds / 10 } else { rounds };
    for (number, (path, seed)) in seeds.iter().enumerate() {
        for round in 0..=rounds {
            let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (number as u64) << 32 ^ (round as u64 + 1));
            let mut input = seed.clone();
            for _ in 0..round.min(1 + round % 4) {
                random.change(&mut input, &seeds);
            }
            let outcome = std::panic::catch_unwind(|| entry(&input));
            assert!(outcome.is_ok(), "{}, round {round}: {input:02x?}", path.display());
        }
    }
}

#[test]
fn handshakes_of_real_clients_and_what_becomes_of_them() {
    drive("handshake", 20_000, handshake);
}

#[test]
fn requests_of_real_clients_and_what_becomes_of_them() {
    drive("transmission", 4000, transmission);
}

#[test]
fn replies_to_real_clients_and_what_becomes_of_them() {
    drive("replies", 20_000, replies);
}
