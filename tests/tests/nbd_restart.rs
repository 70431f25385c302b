//! A restart of the server that its clients live through: those that connect again and repeat what was not answered.
//! nbdkit's `nbd` plugin below its `retry` filter is such a client, and what stands above it sees nothing.

use std::path::PathBuf;
use std::time::Duration;
use tests::process::{Sandbox, Server, eventually, run};
use tests::volumes::{Served, create};

/// Serves again what `uri` leads to, for as long as it takes to come back.
fn patient_client(sandbox: &Sandbox, uri: &str) -> (Server, String) {
    let socket = sandbox.join("patient.sock");
    let mut command = sandbox.command("nbdkit");
    command.arg("-f").arg("-U").arg(&socket).args(["--filter=retry", "nbd"]).arg(uri);
    command.args(["retry=60", "retries=60", "retry-delay=1", "retry-exponential=no"]);
    let server = Server::spawn(&mut command);
    let above = format!("nbd+unix:///?socket={}", socket.display());
    eventually("nbdkit to serve", Duration::from_secs(20), || {
        run(sandbox.command("nbdinfo").args(["--size", &above])).status.success().then_some(())
    });
    (server, above)
}

fn fio(sandbox: &Sandbox, uri: &str) -> Server {
    Server::spawn(sandbox.command("fio").args([
        "--name=through",
        "--ioengine=nbd",
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=8",
        "--size=32M",
        // Slow enough to be at work during every restart.
        "--rate=3M",
        "--fsync=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--uri",
        uri,
    ]))
}

#[test]
fn clients_that_retry_see_no_error_while_the_server_stops_is_killed_and_comes_back() {
    let sandbox = Sandbox::new();
    let members: Vec<PathBuf> = sandbox.images(4);
    create(&sandbox, &members, "--size 32M --name vol");
    let mut served = Served::start(&sandbox, &members, "");
    let (client, above) = patient_client(&sandbox, &served.uri());
    let mut work = fio(&sandbox, &above);
    for round in 0..4 {
        // Some writes have come since the last time.
        let written = || {
            std::fs::metadata(&members[0]).map_or(0, |file| std::os::unix::fs::MetadataExt::mtime_nsec(&file))
        };
        let before = written();
        eventually("a write", Duration::from_secs(20), || (written() != before).then_some(()));
        assert!(work.is_running(), "fio had nothing left to do before restart {round}");
        if round % 2 == 0 {
            served.stop();
        } else {
            served.server.kill();
        }
        served = Served::start(&sandbox, &members, "");
    }
    let ended = work.wait();
    assert!(ended.success(), "fio: {ended}: {}", work.stderr());
    client.stop();
    served.stop();
}
