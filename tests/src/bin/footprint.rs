//! Measures what the broker costs while nobody uses it: time until it is ready on an existing volume of four members,
//! and resident memory then. Run by hand: `cargo build --release && cargo run --release -p tests --bin footprint`.

use tests::clients::{Broker, client, orderly};
use tests::process::Sandbox;

const RUNS: usize = 21;

fn main() {
    let sandbox = Sandbox::new();
    let mut broker = Broker::start(&sandbox, &[]);
    std::fs::write(sandbox.join("lines"), "one\ntwo\n").expect("the sandbox can be written");
    client(&mut broker.kcat(&sandbox, "-P -t some -l lines"));
    let (mut starts, mut sizes) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        broker = broker.restarted(&sandbox, orderly);
        starts.push(broker.server.ready_after());
        sizes.push(broker.server.resident());
    }
    starts.sort_unstable();
    sizes.sort_unstable();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("of {RUNS} starts      median    lowest   highest");
    println!("ready after     {:>9.1?} {:>9.1?} {:>9.1?}", starts[RUNS / 2], starts[0], starts[RUNS - 1]);
    println!(
        "resident, MiB   {:>9.1} {:>9.1} {:>9.1}",
        mib(sizes[RUNS / 2]),
        mib(sizes[0]),
        mib(sizes[RUNS - 1])
    );
    broker.stop();
}
