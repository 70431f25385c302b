//! Clients that break every rule of the NBD protocol, by intent or by accident. Each gets the protocol's own answer or
//! is hung up on; the server, and every other client, goes on.

use raid::nbd::Limits;
use raid::nbd::transmission::{Ended, MAX_REQUESTS, Timing};
use raid::nbd::wire::{ClientOption, ExportQuery, OptionHeader, SimpleReply};
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tests::nbd::{MAX, SIZE, Serving};
use tests::process::eventually;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;
const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ESHUTDOWN: u32 = 108;

/// Limits that let tests see deadlines pass.
fn impatient() -> Limits {
    let timing = Timing {
        stall: Duration::from_millis(200),
        drain: Duration::from_millis(200),
        busy: Duration::from_micros(50),
    };
    Limits { handshake: Duration::from_millis(300), timing, ..Limits::standard() }
}

#[test]
fn ranges_beyond_the_end_and_beyond_all_numbers() {
    let serving = Serving::start();
    let mut client = serving.client();
    for (offset, length) in [(SIZE - 1, 2), (SIZE, 1), (u64::MAX, 1), (u64::MAX - 10, 4096), (1 << 63, MAX)] {
        client.ask(READ, 0, 7, offset, length.into());
        client.expect(7, EINVAL);
        client.ask(TRIM, 0, 8, offset, length.into());
        client.expect(8, EINVAL);
        client.ask(WRITE_ZEROES, 0, 9, offset, length.into());
        client.expect(9, ENOSPC);
        client.ask(WRITE, 0, 10, offset, length.into());
        client.put(&vec![0x5a; length as usize]);
        client.expect(10, ENOSPC);
    }
    assert!(serving.gate.asked().is_empty(), "nothing of it reached the device");
    assert_eq!(client.read(SIZE - 1, 1), [0]);
    client.write(SIZE - 1, b"x");
    assert_eq!(client.read(SIZE - 1, 1), b"x");
}

#[test]
fn the_payload_of_a_refused_write_is_not_taken_for_requests() {
    let serving = Serving::start_with(Limits::standard(), true);
    let mut client = serving.client();
    // The payload is a write in itself: executed, it would be answered.
    let mut smuggled = Vec::new();
    raid::nbd::wire::Request { flags: 0, command: 1.into(), cookie: 666, offset: 0, length: 4 }
        .encode(&mut smuggled);
    smuggled.extend_from_slice(b"evil");
    for split in [0, 1, 17, 28, smuggled.len()] {
        client.ask(WRITE, 0, 1, 0, smuggled.len() as u64);
        client.put(&smuggled[..split]);
        std::thread::yield_now();
        client.put(&smuggled[split..]);
        client.expect(1, EPERM);
    }
    for command in [TRIM, WRITE_ZEROES] {
        client.ask(command, 0, 2, 0, 4096);
        client.expect(2, EPERM);
    }
    assert_eq!(client.read(0, 4), [0; 4]);
    client.ask(FLUSH, 0, 3, 0, 0);
    client.expect(3, 0);
}

#[test]
fn requests_too_long_are_refused_and_absurd_writes_end_the_connection() {
    let serving = Serving::start();
    let mut client = serving.client();
    client.ask(READ, 0, 1, 0, u64::from(MAX) + 1);
    client.expect(1, EINVAL);
    client.ask(WRITE, 0, 2, 0, u64::from(MAX) + 1);
    client.put(&vec![0; MAX as usize + 1]);
    client.expect(2, EINVAL);
    // The most that is allowed works, in both directions.
    let most: Vec<u8> = (0..MAX).map(|i| (i / 3) as u8).collect();
    client.write(5, &most);
    assert!(client.read(5, MAX) == most);
    // Zeroes and trims carry nothing: they may be longer.
    client.ask(WRITE_ZEROES, 0, 3, 0, SIZE);
    client.expect(3, 0);
    assert_eq!(client.read(5, 16), [0; 16]);
    client.ask(WRITE, 0, 4, 0, u32::MAX.into());
    client.assert_closed();
    serving.assert_alive();
}

#[test]
fn unknown_commands_and_flags_are_invalid_and_change_nothing() {
    let serving = Serving::start();
    let mut client = serving.client();
    // The status of blocks was not negotiated.
    for command in [7, 8, 99, u16::MAX] {
        client.ask(command, 0, 1, 0, 4096);
        client.expect(1, EINVAL);
    }
    // NO_HOLE is for zeroes only, DF and the rest were not negotiated.
    for (command, flags) in
        [(READ, 2), (READ, 4), (TRIM, 2), (FLUSH, 2), (WRITE_ZEROES, 4), (5, 2), (READ, 0x8000)]
    {
        client.ask(command, flags, 2, 0, if command == FLUSH { 0 } else { 4096 });
        client.expect(2, EINVAL);
    }
    client.ask(WRITE, 4, 3, 0, 4);
    client.put(b"evil");
    client.expect(3, EINVAL);
    for (offset, length) in [(0, 1), (1, 0)] {
        client.ask(FLUSH, 0, 4, offset, length);
        client.expect(4, EINVAL);
    }
    assert!(serving.gate.asked().is_empty());
    assert_eq!(client.read(0, 4), [0; 4]);
}

#[test]
fn nothing_is_asked_of_the_device_for_zero_bytes() {
    let serving = Serving::start();
    let mut client = serving.client();
    for command in [READ, WRITE, TRIM, WRITE_ZEROES] {
        for offset in [0, 77, SIZE] {
            client.ask(command, 1, offset, offset, 0);
            client.expect(offset, 0);
        }
    }
    client.ask(READ, 0, 5, SIZE + 1, 0);
    client.expect(5, EINVAL);
    assert!(serving.gate.asked().is_empty());
}

#[test]
fn flags_reach_the_device_as_they_were_meant() {
    let serving = Serving::start();
    let mut client = serving.client();
    client.ask(WRITE, 1, 1, 0, 4);
    client.put(b"data");
    client.expect(1, 0);
    client.ask(TRIM, 1, 2, 8192, 4096);
    client.expect(2, 0);
    client.ask(TRIM, 0, 2, 8192, 4096);
    client.expect(2, 0);
    for flags in 0..4 {
        client.ask(WRITE_ZEROES, flags, 3, 4096, 4096);
        client.expect(3, 0);
    }
    client.ask(FLUSH, 1, 4, 0, 0);
    client.expect(4, 0);
    let expected = [
        "write stable",
        "discard",
        "flush",
        "discard",
        "zero",
        "zero stable",
        "zero no hole",
        "zero no hole stable",
        "flush",
    ];
    assert_eq!(serving.gate.asked(), expected);
}

#[test]
fn requests_that_are_not_requests_end_the_connection() {
    let serving = Serving::start();
    for garbage in [&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], &[0; 28], &[0xff; 4096]] {
        let mut client = serving.client();
        client.put(garbage);
        client.assert_closed();
        let mut client = serving.connect();
        client.greet(3);
        client.put(garbage);
        client.assert_closed();
    }
    // An option after GO is garbage like any other.
    let mut client = serving.client();
    client.option(&ClientOption::Go(ExportQuery { name: String::new(), information: Vec::new() }));
    client.assert_closed();
    // What was asked before the garbage is answered all the same.
    let mut client = serving.client();
    client.ask(READ, 0, 9, 0, 1);
    client.put(&[0xee; 28]);
    client.expect(9, 0);
    assert_eq!(client.take(), [0]);
    client.assert_closed();
    serving.assert_alive();
}

#[test]
fn options_unknown_or_too_long_or_malformed_are_answered_and_the_haggling_goes_on() {
    const UNSUPPORTED: u32 = (1 << 31) + 1;
    const POLICY: u32 = (1 << 31) + 2;
    const INVALID: u32 = (1 << 31) + 3;
    const UNKNOWN: u32 = (1 << 31) + 6;
    const TOO_BIG: u32 = (1 << 31) + 9;
    let serving = Serving::start();
    let mut client = serving.connect();
    client.greet(3);
    let query = |name: String| ExportQuery { name, information: vec![1, 2, 3, 4711] };
    // (option, payload, answer): STARTTLS, structured replies, meta contexts, extended headers, and nonsense.
    let lie = [0xff, 0xff, 0xff, 0xff, 0, 0];
    for (option, payload, answer) in [
        (5, vec![], POLICY),
        (5, vec![1], INVALID),
        (8, vec![1], INVALID),
        (9, vec![0; 7], INVALID),
        // Contexts are not chosen before replies come in chunks; a list of four billion is not there.
        (10, vec![0; 8], INVALID),
        (10, vec![0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], INVALID),
        (10, vec![0; 8193], TOO_BIG),
        (11, vec![1], INVALID),
        (11, vec![0x11; 500_000], TOO_BIG),
        (4, vec![], UNSUPPORTED),
        (12, vec![0x11; 500_000], UNSUPPORTED),
        (u32::MAX, vec![1], UNSUPPORTED),
        (3, vec![1], INVALID),
        (7, vec![], INVALID),
        (7, lie.to_vec(), INVALID),
        (7, vec![0x41; 8193], TOO_BIG),
        (6, vec![0, 0, 0, 1, 0xff, 0, 0], INVALID),
    ] {
        let mut header = Vec::new();
        OptionHeader { option, length: payload.len() as u32 }.encode(&mut header);
        client.put(&header);
        client.put(&payload);
        assert_eq!(client.option_reply().0, answer, "option {option}");
    }
    client.option(&ClientOption::Info(query("nothing of that name".into())));
    assert_eq!(client.option_reply().0, UNKNOWN);
    client.option(&ClientOption::Go(query("x".repeat(4096))));
    assert_eq!(client.option_reply().0, UNKNOWN);
    client.option(&ClientOption::Go(query("x".repeat(4097))));
    assert_eq!(client.option_reply().0, INVALID);
    let (size, flags) = client.go("");
    assert_eq!((size, flags), (SIZE, 0b1101_0110_1101));
    assert_eq!(client.read(0, 1), [0]);
}

#[test]
fn handshakes_that_cannot_be_answered_are_hung_up_on() {
    let serving = Serving::start();
    let mut client = serving.connect();
    client.greet(4);
    client.assert_closed();
    // Without fixed newstyle there is EXPORT_NAME only, and it cannot say no.
    let mut client = serving.connect();
    client.greet(0);
    client.option(&ClientOption::List);
    client.assert_closed();
    for name in ["other".to_owned(), "x".repeat(4097)] {
        let mut client = serving.connect();
        client.greet(3);
        client.option(&ClientOption::ExportName(name));
        client.assert_closed();
    }
    let mut client = serving.connect();
    client.greet(3);
    for _ in 0..33 {
        client.option(&ClientOption::List);
    }
    for _ in 0..32 {
        assert_eq!([client.option_reply().0, client.option_reply().0, client.option_reply().0], [2, 2, 1]);
    }
    client.assert_closed();
    let mut client = serving.connect();
    client.greet(3);
    let mut header = Vec::new();
    OptionHeader { option: 77, length: u32::MAX }.encode(&mut header);
    client.put(&header);
    client.assert_closed();
    let mut client = serving.connect();
    client.greet(0);
    client.option(&ClientOption::ExportName("vol".into()));
    let answer: [u8; 134] = client.take();
    assert_eq!(answer[..8], SIZE.to_be_bytes());
    assert!(answer[10..].iter().all(|byte| *byte == 0));
    assert_eq!(client.read(0, 2), [0; 2]);
}

#[test]
fn a_client_that_goes_away_at_any_byte_of_its_session_costs_nothing() {
    let serving = Serving::start();
    let mut session = 3u32.to_be_bytes().to_vec();
    let query = ExportQuery { name: "vol".into(), information: vec![1, 2, 3] };
    for option in [ClientOption::List, ClientOption::Info(query.clone()), ClientOption::Go(query)] {
        option.encode(&mut session);
    }
    for (command, length) in [(WRITE, 64u64), (READ, 64)] {
        raid::nbd::wire::Request { flags: 0, command: command.into(), cookie: 5, offset: 0, length }
            .encode(&mut session);
        if command == WRITE {
            session.extend_from_slice(&[0x77; 64]);
        }
    }
    for length in 0..=session.len() {
        let mut client = serving.connect();
        client.put(&session[..length]);
        if length % 2 == 0 {
            let answers = client.rest();
            // A whole session is answered in full.
            if length == session.len() {
                // Two replies and the bytes read; which comes first is the server's choice.
                let answered = SimpleReply { error: 0, cookie: 5 }.encode();
                let tail = &answers[answers.len() - 96..];
                assert_eq!(tail.windows(16).filter(|window| **window == answered).count(), 2);
            }
        }
    }
    serving.assert_alive();
}

#[test]
fn silence_ends_a_handshake_and_only_that() {
    let serving = Serving::start_with(impatient(), false);
    let mut served = serving.client();
    let begun = Instant::now();
    let mut silent = serving.connect();
    let mut hesitant = serving.connect();
    hesitant.greet(3);
    hesitant.put(b"IHAVE");
    hesitant.assert_closed();
    let _: [u8; 18] = silent.take();
    silent.assert_closed();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    // One that is through may stay silent as long as it likes.
    assert_eq!(served.read(0, 1), [0]);
}

#[test]
fn connections_beyond_the_limit_are_turned_away_and_places_come_free() {
    // Both ends of each are this process's.
    let mut files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    files.current = files.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, files).unwrap();
    let serving = Serving::start_with(Limits { connections: 200, ..Limits::standard() }, false);
    let mut served = serving.client();
    let crowd: Vec<_> = (0..1000).map(|_| serving.connect()).collect();
    assert_eq!(served.read(0, 1), [0]);
    served.write(0, b"still served");
    let mut late = serving.connect();
    late.assert_closed();
    drop(crowd);
    eventually("a place", Duration::from_secs(30), || {
        let mut client = serving.connect();
        let mut greeting = [0; 18];
        client.stream.read_exact(&mut greeting).ok()
    });
    serving.assert_alive();
}

#[test]
fn a_client_that_never_reads_its_replies_blocks_itself_only() {
    let limits = Limits { shared_bytes: 64 << 20, ..impatient() };
    let serving = Serving::start_with(limits, false);
    let mut other = serving.client();
    let mut greedy = serving.client();
    greedy.stream.set_nonblocking(true).unwrap();
    let mut request = Vec::new();
    raid::nbd::wire::Request { flags: 0, command: 0.into(), cookie: 1, offset: 0, length: MAX.into() }
        .encode(&mut request);
    // As many reads as the server takes in: it stops at its bounds, not at ours.
    let mut asked = 0;
    while asked < 100_000 && greedy.stream.write_all(&request).is_ok() {
        asked += 1;
    }
    assert!(asked < 100_000, "the server took everything");
    eventually("the reads to begin", Duration::from_secs(10), || {
        (serving.gate.asked().len() >= 2).then_some(())
    });
    let reads = serving.gate.asked().iter().filter(|what| **what == "read").count();
    assert!(reads <= 2, "{reads} reads of 32 MiB with 64 MiB in flight allowed");
    // The small requests of others are untouched.
    for i in 0..100 {
        other.write(i * 4096, b"untouched");
        assert_eq!(other.read(i * 4096, 9), b"untouched");
    }
    // One that needs the shared memory gets it: the greedy one is sent away after a while.
    assert_eq!(other.read(0, MAX).len(), MAX as usize);
    greedy.stream.set_nonblocking(false).unwrap();
    let mut rest = Vec::new();
    let end = greedy.stream.read_to_end(&mut rest);
    assert!(end.is_err() || rest.len() < 3 * MAX as usize, "the greedy one was served on");
}

#[test]
fn a_flood_of_small_requests_is_taken_in_bounded_portions() {
    let serving = Serving::start();
    serving.gate.close();
    let mut client = serving.client();
    client.stream.set_nonblocking(true).unwrap();
    let mut flush = Vec::new();
    raid::nbd::wire::Request { flags: 0, command: 3.into(), cookie: 1, offset: 0, length: 0 }
        .encode(&mut flush);
    let mut bytes = 0;
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < Duration::from_millis(300) {
        match client.stream.write(&flush[bytes % flush.len()..]) {
            Ok(n) => {
                bytes += n;
                quiet_since = Instant::now();
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
        assert!(bytes < 100 << 20, "the server takes without bounds");
    }
    let asked = bytes / flush.len();
    client.stream.set_nonblocking(false).unwrap();
    assert!(asked > MAX_REQUESTS, "the flood was too small to show anything");
    assert_eq!(serving.gate.asked().len(), MAX_REQUESTS);
    serving.gate.let_through(asked + 1);
    for _ in 0..asked {
        client.expect(1, 0);
    }
    serving.assert_alive();
}

#[test]
fn replies_overtake_each_other_and_flush_waits_for_nobody() {
    let serving = Serving::start();
    serving.gate.close();
    let mut client = serving.client();
    client.ask(WRITE, 0, 1, 0, 4);
    client.put(b"late");
    client.ask(READ, 0, 2, 4096, 1);
    client.expect(2, 0);
    assert_eq!(client.take(), [0]);
    serving.gate.let_through(1);
    client.expect(1, 0);
    assert_eq!(client.read(0, 4), b"late");
}

#[test]
fn a_write_that_has_begun_is_finished_though_its_client_is_gone() {
    let mut serving = Serving::start();
    serving.gate.close();
    let mut client = serving.client();
    for i in 0..20u64 {
        client.ask(WRITE, 0, i, i * 4096, 4);
        client.put(b"kept");
    }
    // One with a payload of its own buffer.
    client.ask(WRITE, 0, 20, 1 << 20, 1 << 20);
    client.put(&vec![b'k'; 1 << 20]);
    eventually("all writes to begin", Duration::from_secs(10), || {
        (serving.gate.asked().len() == 21).then_some(())
    });
    drop(client);
    let stopped = serving.begin_stop();
    assert!(stopped.recv_timeout(Duration::from_millis(300)).is_err(), "stopped before its writes had ended");
    serving.gate.let_through(21);
    stopped.recv_timeout(Duration::from_secs(30)).unwrap();
    let image = std::fs::read(serving.image()).unwrap();
    for i in 0..20 {
        assert_eq!(&image[i * 4096..i * 4096 + 4], b"kept");
    }
    assert!(image[1 << 20..2 << 20].iter().all(|byte| *byte == b'k'));
}

#[test]
fn stopping_finishes_what_runs_refuses_what_comes_and_closes() {
    let mut serving = Serving::start();
    serving.gate.close();
    let (mut busy, mut idle, mut haggling) = (serving.client(), serving.client(), serving.connect());
    haggling.greet(3);
    busy.ask(WRITE, 0, 1, 0, 4);
    busy.put(b"done");
    eventually("the write to begin", Duration::from_secs(10), || {
        (!serving.gate.asked().is_empty()).then_some(())
    });
    let stopped = serving.begin_stop();
    idle.assert_closed();
    haggling.assert_closed();
    busy.ask(WRITE, 0, 2, 0, 4);
    busy.put(b"late");
    busy.expect(2, ESHUTDOWN);
    assert!(stopped.try_recv().is_err());
    serving.gate.let_through(1);
    busy.expect(1, 0);
    busy.assert_closed();
    stopped.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(&std::fs::read(serving.image()).unwrap()[..4], b"done");
    assert!(!serving.socket().exists(), "the socket's file is left behind");
}

/// A kernel's disk gives what has not been answered to the next server; refused, its users would see an error.
#[test]
fn an_adopted_connection_leaves_what_comes_after_the_stop_unanswered() {
    let serving = Serving::start();
    let (mut client, stop, ended) = serving.adopted(|_| {});
    client.write(8192, b"before");
    assert_eq!(client.read(8192, 6), b"before");
    serving.gate.close();
    client.ask(WRITE, 0, 1, 0, 4);
    client.put(b"done");
    eventually("the write to begin", Duration::from_secs(10), || {
        (serving.gate.asked().len() == 3).then_some(())
    });
    stop.send_replace(true);
    client.ask(WRITE, 0, 2, 0, 4);
    client.put(b"late");
    assert!(ended.recv_timeout(Duration::from_millis(300)).is_err(), "ended before its write had");
    serving.gate.let_through(1);
    client.expect(1, 0);
    client.assert_closed();
    assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok(Ended::Stopped));
    assert_eq!(&std::fs::read(serving.image()).unwrap()[..4], b"done");
}

/// It has asked the same on another connection by then, and perhaps something newer.
#[test]
fn an_adopted_connection_begins_nothing_for_a_client_that_has_hung_up() {
    let serving = Serving::start();
    let (_client, _stop, ended) = serving.adopted(|client| {
        client.ask(WRITE, 0, 1, 0, 4);
        client.put(b"late");
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok(Ended::HungUp));
    assert_eq!(serving.gate.asked(), Vec::<&str>::new());
}

/// A server that stands still just when it has seen that its client is there, for longer than that has patience: what it
/// does when it goes on may not come after what the client has had done elsewhere meanwhile.
#[test]
fn what_was_left_behind_in_a_server_that_stood_still_is_not_done_late() {
    let serving = Serving::start();
    let siblings = Arc::default();
    let (told, go_on) = serving.gate.stand_still();
    let (mut first, _stop, ended) = serving.adopted_among(&siblings, |_| {});
    let (mut second, _stop, _) = serving.adopted_among(&siblings, |_| {});
    // What is only read waits for nobody, nor does a change beside a connection that lives.
    first.ask(WRITE, 0, 1, 0, 4);
    first.put(b"old!");
    told.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!(second.read(8192, 4), [0; 4]);
    second.write(4096, b"else");
    first.stream.shutdown(std::net::Shutdown::Both).unwrap();
    second.ask(WRITE, 0, 2, 0, 4);
    second.put(b"old!");
    second.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(second.stream.read(&mut [0; 1]).is_err(), "answered past the one that was left behind");
    assert_eq!(serving.gate.asked(), ["read", "write"]);
    second.stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    go_on.send(()).unwrap();
    second.expect(2, 0);
    second.write(0, b"new!");
    assert!(ended.recv_timeout(Duration::from_secs(30)).is_ok());
    assert_eq!(serving.gate.asked(), ["read", "write", "write", "write", "write"]);
}

/// Told apart, since the one is the end of a kernel's disk, and the other is not.
#[test]
fn an_adopted_connection_tells_a_goodbye_from_a_hang_up() {
    let serving = Serving::start();
    // The kernel hangs up right behind its goodbye.
    let (_client, _stop, ended) = serving.adopted(|client| {
        client.ask(DISC, 0, 0, 0, 0);
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
    });
    assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok(Ended::ByClient));
    let (mut client, _stop, ended) = serving.adopted(|_| {});
    client.write(0, b"x");
    drop(client);
    assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok(Ended::HungUp));
}

#[test]
fn a_client_that_takes_nothing_cannot_hold_up_the_stop() {
    let mut serving = Serving::start_with(impatient(), false);
    let mut deaf = serving.client();
    for cookie in 0..4 {
        deaf.ask(READ, 0, cookie, 0, u64::from(MAX / 4));
    }
    let mut cut_off = serving.client();
    cut_off.ask(WRITE, 0, 1, 0, 1 << 20);
    cut_off.put(&[1; 1000]);
    eventually("the reads to begin", Duration::from_secs(10), || {
        (serving.gate.asked().len() == 4).then_some(())
    });
    serving.begin_stop().recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(serving.gate.asked().iter().all(|what| *what == "read"));
}

#[test]
fn a_thousand_requests_in_one_send_are_all_answered() {
    let serving = Serving::start();
    let mut client = serving.client();
    let mut all = Vec::new();
    for cookie in 0..1000u64 {
        let offset = (cookie % 100) * 4096;
        let request = |command: u16, length| raid::nbd::wire::Request {
            flags: 0,
            command: command.into(),
            cookie,
            offset,
            length,
        };
        if cookie < 100 {
            request(WRITE, 4096).encode(&mut all);
            all.extend_from_slice(&[cookie as u8; 4096]);
        } else {
            request(FLUSH, 0).encode(&mut all);
            let at = all.len() - 12;
            all[at..at + 8].copy_from_slice(&[0; 8]);
        }
    }
    let mut sender = client.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || sender.write_all(&all).unwrap());
    let mut seen = vec![false; 1000];
    for _ in 0..1000 {
        let SimpleReply { error, cookie } = client.reply();
        assert_eq!(error, 0);
        assert!(!std::mem::replace(&mut seen[cookie as usize], true));
    }
    sending.join().unwrap();
    for i in 0..100u8 {
        assert_eq!(client.read(u64::from(i) * 4096, 4096), [i; 4096]);
    }
}
