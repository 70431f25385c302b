//! The least that a server can do: what is left to gain for any server, with this client on this machine.
//!
//! One blocking thread a connection, no RAID, no locks, no checks worth the name. A read is answered either with zeroes out
//! of memory (`nothing`: no file is touched, all of it stays in the processor's cache: the client's own ceiling) or out of
//! a file (`file`: `pread` into what is sent anyway, and `sendfile` from [`LARGE`] on: the ceiling of whoever serves what
//! he was asked for). A write goes to two files by `pwrite`, which no mirror can do without. As many requests as have come
//! are answered with one `send`. The handshake knows `GO` and structured replies, which cost a client a tenth to a fifth of
//! its rate: with simple ones the ceiling would be one that no server reaches whom the client asks for structured ones.
//!
//! It is for measuring against, in a process of its own (`bench bare-child nothing|file SOCKET FILE FILE`).

use raid::nbd::wire::{
    DONE, FIXED_NEWSTYLE, GREETING_MAGIC, NO_ZEROES, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_LEN,
    REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, option, transmission_flags as flags,
};
use rustix::fs::sendfile;
use std::fs::File;
use std::io::{Read, Result, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};

/// Bytes of one receive.
const RECEIVED: usize = 128 << 10;
/// Replies of so many bytes are sent at once.
const SENT: usize = 256 << 10;
/// Longest request.
const LONGEST: usize = 32 << 20;
/// Reads of so many bytes go from the page cache to the socket without a copy.
const LARGE: usize = 32 << 10;
const ACK: u32 = 1;
const INFO: u32 = 3;
const UNSUPPORTED: u32 = 1 << 31 | 1;

/// Serves until it is killed.
pub fn work_as_child(arguments: &[String]) {
    let [reads, socket, files @ ..] = arguments else { panic!("bare-child is called by bench only") };
    let reads_file = reads == "file";
    let open =
        |path: &String| File::options().read(true).write(true).open(path).expect("the files are there");
    let files: Vec<File> = files.iter().map(open).collect();
    let size = files[0].metadata().expect("files have sizes").len();
    let listener = UnixListener::bind(socket).expect("the socket is new");
    std::thread::scope(|scope| {
        for stream in listener.incoming() {
            let (stream, files) = (stream.expect("a connection"), &files);
            scope.spawn(move || {
                // Clients hang up as they like.
                if let Err(ended) = serve(stream, files, size, reads_file) {
                    eprintln!("bare server: {ended}");
                }
            });
        }
    });
}

fn serve(mut stream: UnixStream, files: &[File], size: u64, reads_file: bool) -> Result<()> {
    let mut greeting = Vec::new();
    greeting.extend(GREETING_MAGIC.to_be_bytes());
    greeting.extend(OPTION_MAGIC.to_be_bytes());
    greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting)?;
    stream.read_exact(&mut [0; 4])?;
    let mut structured = false;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let asked = u32_at(&header, 8);
        std::io::copy(&mut (&mut stream).take(u64::from(u32_at(&header, 12))), &mut std::io::sink())?;
        let mut reply = |kind: u32, payload: &[u8]| {
            let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            for word in [asked, kind, payload.len() as u32] {
                bytes.extend(word.to_be_bytes());
            }
            bytes.extend(payload);
            stream.write_all(&bytes)
        };
        if asked == option::GO {
            let mut export = vec![0, 0];
            export.extend(size.to_be_bytes());
            let offered = flags::HAS_FLAGS | flags::SEND_FLUSH | flags::SEND_FUA | flags::CAN_MULTI_CONN;
            export.extend(offered.to_be_bytes());
            reply(INFO, &export)?;
            reply(ACK, &[])?;
            return transmit(stream, files, reads_file, structured);
        }
        structured |= asked == option::STRUCTURED_REPLY;
        reply(if asked == option::STRUCTURED_REPLY { ACK } else { UNSUPPORTED }, &[])?;
    }
}

fn transmit(mut stream: UnixStream, files: &[File], reads_file: bool, structured: bool) -> Result<()> {
    const READ: u16 = 0;
    const WRITE: u16 = 1;
    const DISCONNECT: u16 = 2;
    let (mut input, mut output) = (vec![0; RECEIVED + LONGEST], Vec::with_capacity(SENT + LONGEST));
    let zeroes = vec![0; LONGEST];
    let mut have = 0;
    loop {
        let received = stream.read(&mut input[have..have + RECEIVED])?;
        if received == 0 {
            return Ok(());
        }
        have += received;
        let mut at = 0;
        while have - at >= REQUEST_LEN {
            let request = &input[at..at + REQUEST_LEN];
            assert_eq!(u32_at(request, 0), REQUEST_MAGIC, "not a request");
            let command = u16::from_be_bytes([request[6], request[7]]);
            let place = u64::from(u32_at(request, 16)) << 32 | u64::from(u32_at(request, 20));
            let len = u32_at(request, 24) as usize;
            assert!(len <= LONGEST, "a request of {len} bytes");
            let end = at + REQUEST_LEN + if command == WRITE { len } else { 0 };
            if end > input.len() {
                break;
            }
            if end > have {
                if end - at <= RECEIVED {
                    break;
                }
                stream.read_exact(&mut input[have..end])?;
                have = end;
            }
            let cookie = &input[at + 8..at + 16];
            if !structured {
                output.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
                output.extend([0; 4]);
                output.extend(cookie);
            } else if command == READ {
                chunk_head(&mut output, chunk::OFFSET_DATA, cookie, 8 + len as u32);
                output.extend(place.to_be_bytes());
            } else {
                chunk_head(&mut output, chunk::NONE, cookie, 0);
            }
            match command {
                DISCONNECT => return Ok(()),
                READ if !reads_file => output.extend(&zeroes[..len]),
                READ if len < LARGE => {
                    let start = output.len();
                    output.resize(start + len, 0);
                    files[0].read_exact_at(&mut output[start..], place)?;
                }
                READ => {
                    stream.write_all(&output)?;
                    output.clear();
                    let (mut next, end) = (place, place + len as u64);
                    while next < end {
                        let left = (end - next) as usize;
                        sendfile(&stream, &files[0], Some(&mut next), left)?;
                    }
                }
                WRITE => {
                    for file in files {
                        file.write_all_at(&input[at + REQUEST_LEN..end], place)?;
                    }
                }
                // Nothing here outlives the measurement.
                _ => {}
            }
            at = end;
            if output.len() >= SENT {
                stream.write_all(&output)?;
                output.clear();
            }
        }
        stream.write_all(&output)?;
        output.clear();
        input.copy_within(at..have, 0);
        have -= at;
    }
}

/// The header of a reply's only chunk.
fn chunk_head(output: &mut Vec<u8>, kind: u16, cookie: &[u8], len: u32) {
    output.extend(STRUCTURED_REPLY_MAGIC.to_be_bytes());
    output.extend(DONE.to_be_bytes());
    output.extend(kind.to_be_bytes());
    output.extend(cookie);
    output.extend(len.to_be_bytes());
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
