//! Where the bytes of a fetch go, as the kernel sees it: from the member images to the socket by `sendfile`, and not
//! through the broker's memory.

use rustix::process::Signal;
use tests::clients::{Broker, all_lines, client, text};
use tests::process::{PATIENCE, Sandbox, Server, bytes_of, eventually};

/// Calls by which bytes can come into a process or leave it.
const CALLS: &str = "sendfile,splice,copy_file_range,read,readv,pread64,preadv,preadv2,mmap,\
                     write,writev,pwrite64,sendto,sendmsg,recvfrom,recvmsg,io_uring_enter";

/// Bytes moved, as strace tells them.
#[derive(Default, Debug)]
struct Moved {
    images_to_socket: u64,
    images_into_process: u64,
    largest_read: u64,
    process_to_socket: u64,
}

impl Moved {
    /// Adds one line of `strace -f -y`: `PID call(FD<WHAT>, …) = RESULT`. A call that another thread interrupted stands
    /// on two lines, and counts by the one with its result.
    fn add(&mut self, line: &str, pending: &mut std::collections::HashMap<String, String>) {
        let Some((pid, call)) = line.split_once(' ') else { return };
        let mut whole = call.trim_start().to_owned();
        if let Some(begun) = whole.strip_suffix(" <unfinished ...>") {
            pending.insert(pid.to_owned(), begun.to_owned());
            return;
        }
        if whole.starts_with("<... ") {
            let Some(begun) = pending.remove(pid) else { return };
            let rest = whole.split_once("resumed>").map_or("", |(_, rest)| rest);
            whole = format!("{begun}{rest}");
        }
        let Some((head, result)) = whole.rsplit_once(" = ") else { return };
        let Some(bytes) = result.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()) else {
            return;
        };
        let Some((name, arguments)) = head.split_once('(') else { return };
        let first = arguments.split(',').next().unwrap_or("");
        let second = arguments.split(',').nth(1).unwrap_or("");
        let (image, socket) = (
            |what: &str| what.contains(".img>"),
            |what: &str| what.contains("socket:") || what.contains("TCP"),
        );
        match name {
            "sendfile" if socket(first) && image(second) => {
                self.images_to_socket += bytes;
            }
            "read" | "readv" | "pread64" | "preadv" | "preadv2" if image(first) => {
                self.images_into_process += bytes;
                self.largest_read = self.largest_read.max(bytes);
            }
            "mmap" if head.contains(".img>") => panic!("an image is mapped into the process: {line}"),
            "write" | "writev" | "sendto" | "sendmsg" if socket(first) => self.process_to_socket += bytes,
            _ => {}
        }
    }
}

#[test]
fn fetched_records_go_from_the_images_to_the_socket_by_sendfile() {
    if Broker::is_kafka() {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.join("text");
    text(&source, all_lines());
    let expected = bytes_of(&source);
    let broker = Broker::start(&sandbox, &[]);
    // Not compressed: the records are at least as long as the text.
    client(broker.kcat(&sandbox, "-P -t big -z none -l").arg(&source));

    let trace = sandbox.join("trace");
    let mut strace = sandbox.command("strace");
    strace.args(["-f", "-y", "-s", "0", "-e", &format!("trace={CALLS}"), "-o"]).arg(&trace);
    let mut strace = Server::spawn(strace.args(["-p", &broker.server.pid().to_string()]));
    eventually("strace to attach", PATIENCE, || strace.stderr().contains("attached").then_some(()));
    let got = client(&mut broker.kcat(&sandbox, "-C -t big -p 0 -o beginning -e -q"));
    assert!(got.as_bytes() == expected, "{} bytes came back, not the text", got.len());
    strace.signal(Signal::INT);
    strace.wait();
    broker.stop();

    let mut moved = Moved::default();
    let mut pending = std::collections::HashMap::new();
    for line in std::fs::read_to_string(&trace).expect("strace wrote it").lines() {
        moved.add(line, &mut pending);
    }
    eprintln!("{moved:?} for {} bytes of text", expected.len());
    let text = expected.len() as u64;
    assert!(
        moved.images_to_socket >= text,
        "the records did not all go by sendfile: {moved:?}, {text} of text"
    );
    // The heads of batches are looked at, a page at a time, to find where a batch ends; records are not.
    assert!(moved.largest_read <= 4096, "more than a batch's head was read into the process: {moved:?}");
    assert!(moved.images_into_process < text / 20, "records were read into the process: {moved:?}");
    assert!(moved.process_to_socket < text / 100, "records were written from the process: {moved:?}");
}

#[test]
fn the_count_is_right_about_strace() {
    let mut moved = Moved::default();
    let mut pending = std::collections::HashMap::new();
    for line in [
        "7  sendfile(11<TCP:[127.0.0.1:9092->127.0.0.1:5000]>, 9</tmp/x/disk0.img>, [4096] => [5096], 1000) = 1000",
        "7  sendfile(11<socket:[5]>, 9</tmp/x/disk0.img>, [0], 50 <unfinished ...>",
        "8  preadv2(9</tmp/x/disk1.img>, [{iov_base=\"\"..., iov_len=64}], 1, 0, RWF_NOWAIT) = 64",
        "7  <... sendfile resumed>) = 50",
        "8  writev(11<socket:[5]>, [{iov_base=\"\"..., iov_len=20}], 1) = 20",
        "8  preadv2(9</tmp/x/disk1.img>, [{iov_base=\"\"..., iov_len=64}], 1, 0, RWF_NOWAIT) = -1 EAGAIN (Resource)",
        "8  read(4<anon_inode:[eventfd]>, \"\"..., 8) = 8",
    ] {
        moved.add(line, &mut pending);
    }
    let counted =
        (moved.images_to_socket, moved.images_into_process, moved.largest_read, moved.process_to_socket);
    assert_eq!(counted, (1050, 64, 64, 20));
}
