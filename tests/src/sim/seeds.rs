//! Running a test over many seeds, and telling which one failed.
//!
//! `SIM_SEEDS=5000` runs that many instead of the test's own modest number, `SIM_FROM=1000` starts there, and
//! `SIM_SEED=17` replays one. `SIM_TRACE=1` tells on stderr what clients and disks do.

/// Runs `test` on `count` seeds, or on those the environment asks for. `name` is `file::test`, for the replay line.
pub fn for_seeds(name: &str, count: u64, mut test: impl FnMut(u64)) {
    let seeds = match (number("SIM_SEED"), number("SIM_SEEDS"), number("SIM_FROM").unwrap_or(0)) {
        (Some(one), _, _) => one..one + 1,
        (None, Some(many), from) => from..from + many,
        (None, None, from) => from..from + count,
    };
    for seed in seeds {
        let teller = Teller { name, seed };
        test(seed);
        drop(teller);
    }
}

/// A number from the environment, for tests with knobs.
#[must_use]
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

/// Speaks only when the test panics over it.
struct Teller<'a> {
    name: &'a str,
    seed: u64,
}

impl Drop for Teller<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (file, test) = self.name.split_once("::").unwrap_or((self.name, ""));
            eprintln!("replay: SIM_SEED={} cargo test -p tests --test {file} {test}", self.seed);
        }
    }
}

/// Whether `SIM_TRACE` asks for a running account.
pub(super) fn tracing() -> bool {
    static ASKED: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| std::env::var_os("SIM_TRACE").is_some());
    *ASKED
}
