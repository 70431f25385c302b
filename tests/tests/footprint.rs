//! What the broker costs while nobody uses it. Figures are printed; asserted are the limit on memory, and a bound on the
//! start that only a gross regression breaks, since tests share their machine. `cargo run --release -p tests --bin
//! footprint` measures in earnest.

use std::time::Duration;
use tests::clients::{Broker, client, orderly};
use tests::process::Sandbox;

#[test]
fn starts_at_once_and_stays_small() {
    if Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    let mut broker = Broker::start(&sandbox, &[]);
    std::fs::write(sandbox.join("lines"), "one\ntwo\n").expect("the sandbox can be written");
    client(&mut broker.kcat(&sandbox, "-P -t some -l lines"));
    let mut starts = Vec::new();
    for _ in 0..5 {
        broker = broker.restarted(&sandbox, orderly);
        starts.push(broker.server.ready_after());
    }
    // Idle, but connected once: a client came and went.
    client(&mut broker.kcat(&sandbox, "-C -t some -o beginning -e -q"));
    let resident = broker.server.resident();
    starts.sort_unstable();
    eprintln!("ready after {starts:?}; resident {:.1} MiB", resident as f64 / f64::from(1 << 20));
    assert!(starts[2] < Duration::from_secs(2), "ready after {starts:?}");
    assert!(resident < 64 << 20, "resident when idle: {resident} bytes");
    broker.stop();
}
