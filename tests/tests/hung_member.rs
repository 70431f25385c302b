//! A member that hangs in the kernel: its image is a file of a FUSE process that was stopped, so that whatever is asked of it
//! neither comes back nor can be called off. What the simulation shows of a volume holds with real threads that hang:
//! reads go on, writes wait for the limit, and the server ends in order. Takes as long as the limit, half a minute.

use serde_json::Value;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tests::nbd::Client;
use tests::process::{PATIENCE, Sandbox, eventually, left_out, succeed};
use tests::volumes::{Fuse, Served, create, patterned};

const CHUNK: u64 = 64 << 10;
/// Chunks that the test writes and reads.
const CHUNKS: u64 = 64;
/// How long a member may leave unanswered what others have answered, and what the machine may take besides.
const LIMIT: Duration = Duration::from_secs(30 + 15);
/// What waits for no member that hangs takes far less.
const AT_ONCE: Duration = Duration::from_secs(10);

fn client(served: &Served) -> Client {
    let stream = UnixStream::connect(served.socket()).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
    let mut client = Client::over(stream);
    client.greet(3);
    client.go("");
    client
}

fn flush(client: &mut Client) {
    client.ask(3, 0, 3, 0, 0);
    client.expect(3, 0);
}

fn chunk(number: u64, seed: u64) -> Vec<u8> {
    patterned(CHUNK, seed << 32 | number)
}

fn within<T>(limit: Duration, what: &str, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = work();
    assert!(begun.elapsed() < limit, "{what} took {:?}", begun.elapsed());
    done
}

fn told(sandbox: &Sandbox, words: &[&str], member: &Path) -> Value {
    let told = succeed(sandbox.raid10().args(words).arg(member).arg("--json"));
    serde_json::from_str(&told).expect("one JSON document")
}

/// Of the second member.
fn state(sandbox: &Sandbox, images: &[PathBuf]) -> String {
    let status = told(sandbox, &["status"], &images[0]);
    status["members"][1]["state"].as_str().unwrap_or_else(|| panic!("{status}")).to_owned()
}

fn hangs(arguments: &str) {
    if left_out("a member that hangs in the kernel (half a minute)") {
        return;
    }
    let below = Sandbox::new();
    let halves = below.images(2);
    create(&below, &halves, "--size 64M --chunk 64K --name below");
    let disk = Served::start(&below, &halves, "");
    let fuse = Fuse::mount(&below, disk.socket());
    let sandbox = Sandbox::new();
    let mut images = sandbox.images(4);
    fuse.file().clone_into(&mut images[1]);
    // Reads of what is not known to be equal would wait for both copies. All of it is zeroes.
    create(&sandbox, &images, "--size 64M --chunk 64K --name vol --assume-clean");
    let mut served = Served::start(&sandbox, &images, arguments);
    let (mut writer, mut reader) = (client(&served), client(&served));
    for number in 0..CHUNKS {
        writer.write(number * CHUNK, &chunk(number, 1));
    }
    flush(&mut writer);

    let still = fuse.stand_still();
    // Chunk 0 lies on the members 0 and 1. From here on one client waits, and the others do not.
    let begun = Instant::now();
    let fresh = chunk(0, 2);
    writer.ask(1, 0, 1, 0, CHUNK);
    writer.put(&fresh);
    writer.stream.set_nonblocking(true).expect("it is a socket");
    let mut rounds = 0;
    let unanswered = |client: &Client| rustix::net::recv(&client.stream, &mut [0_u8; 1][..], PEEK).is_err();
    while unanswered(&writer) {
        assert!(begun.elapsed() < LIMIT, "a write waits for {:?}", begun.elapsed());
        for number in 1..CHUNKS {
            let read = within(AT_ONCE, "a read", || reader.read(number * CHUNK, CHUNK as u32));
            assert!(read == chunk(number, 1), "chunk {number}");
        }
        within(AT_ONCE, "a look", || state(&sandbox, &images));
        rounds += 1;
    }
    writer.stream.set_nonblocking(false).expect("it is a socket");
    writer.expect(1, 0);
    assert!(rounds > 1, "it was answered at once: the member does not hang");
    assert_eq!(state(&sandbox, &images), "faulty");

    // It is out, and holds up nobody any more.
    within(AT_ONCE, "reads and writes without it", || {
        for number in 0..CHUNKS {
            reader.write(number * CHUNK, &chunk(number, 3));
        }
        flush(&mut reader);
        for number in 0..CHUNKS {
            assert!(writer.read(number * CHUNK, CHUNK as u32) == chunk(number, 3), "chunk {number}");
        }
    });

    // The volume is stopped in order though it hangs; the process can end only when the kernel lets its threads go.
    served.server.signal(rustix::process::Signal::TERM);
    eventually("the array to be marked clean", AT_ONCE, || {
        let examined = told(&sandbox, &["examine"], &images[0]);
        (examined[0]["clean"] == true).then_some(())
    });
    drop(still);
    let status = served.server.wait();
    let said = served.server.stderr();
    assert!(status.success() && !said.contains("panicked at"), "{status}: {said}");
    assert!(said.contains("30"), "it was told why the member is out: {said}");
    drop(served);

    // What landed late is not served: the member is known to be out.
    let served = Served::start(&sandbox, &images, arguments);
    assert_ne!(state(&sandbox, &images), "in_sync");
    let mut reader = client(&served);
    for number in 0..CHUNKS {
        assert!(reader.read(number * CHUNK, CHUNK as u32) == chunk(number, 3), "chunk {number}");
    }
    drop(reader);
    served.stop();
    fuse.unmount();
    disk.stop();
}

const PEEK: rustix::net::RecvFlags = rustix::net::RecvFlags::PEEK.union(rustix::net::RecvFlags::DONTWAIT);

#[test]
fn a_member_that_hangs_in_the_kernel_through_the_page_cache() {
    hangs("");
}

#[test]
fn a_member_that_hangs_in_the_kernel_past_the_page_cache() {
    hangs("--direct");
}
