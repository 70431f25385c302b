//! What clients get that negotiate more than the simplest: replies in chunks, holes, block status, 64 bits of length; and
//! what those get that break the rules of it.

use raid::nbd::Limits;
use raid::nbd::wire::{
    ALLOCATION_CONTEXT, ALLOCATION_ID, Chunk, Descriptor, Request, STATE_HOLE, STATE_ZERO, StatusFilter,
    Style, transmission_flags as f,
};
use tests::nbd::{Client, MAX, SIZE, Serving};

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

const CHUNKED: [Style; 2] = [Style::Structured, Style::Extended];

/// Flags of a write in this style.
fn write_flags(style: Style) -> u16 {
    if style == Style::Extended { PAYLOAD_LEN } else { 0 }
}

fn write(client: &mut Client, offset: u64, data: &[u8]) {
    client.ask(WRITE, write_flags(client.style), 1, offset, data.len() as u64);
    client.put(data);
    assert_eq!(client.chunks(1, offset), [Chunk::None]);
}

/// Panics unless the session is in step: what was sent last was understood to its end.
fn assert_in_step(client: &mut Client) {
    write(client, 8192, b"in step");
    client.ask(READ, 0, 99, 8192, 7);
    assert_eq!(client.chunks(99, 8192), [Chunk::Data { offset: 8192, data: b"in step".to_vec() }]);
}

#[test]
fn replies_come_in_chunks_whatever_becomes_of_the_request() {
    let serving = Serving::start();
    for style in CHUNKED {
        let mut client = serving.client_of(style, false);
        write(&mut client, 4096, b"data");
        for flags in [0, DF, FUA, DF | FUA] {
            client.ask(READ, flags, 2, 4095, 6);
            let data = b"\0data\0".to_vec();
            assert_eq!(client.chunks(2, 4095), [Chunk::Data { offset: 4095, data }]);
        }
        // (command, flags, offset, length, error): refused before the device is asked.
        for (command, flags, offset, length, error) in [
            (READ, NO_HOLE, 0, 512, EINVAL),
            (READ, 0, SIZE, 1, EINVAL),
            (READ, DF, SIZE - 1, 2, EINVAL),
            (READ, 0, u64::MAX, 512, EINVAL),
            (READ, 0, 0, u64::from(MAX) + 1, EOVERFLOW),
            (READ, DF, 0, u64::from(MAX) + 1, EOVERFLOW),
            (TRIM, DF, 0, 512, EINVAL),
            (TRIM, 0, SIZE, 512, EINVAL),
            (ZEROES, 0, SIZE, 512, ENOSPC),
            (ZEROES, REQ_ONE, 0, 512, EINVAL),
            (CACHE, NO_HOLE, 0, 512, EINVAL),
            (CACHE, 0, SIZE - 1, 512, EINVAL),
            (FLUSH, 0, 1, 0, EINVAL),
            (STATUS, 0, 0, 512, EINVAL),
            (8, 0, 0, 512, EINVAL),
            (u16::MAX, 0, 0, 512, EINVAL),
        ] {
            client.ask(command, flags, 3, offset, length);
            assert_eq!(client.refusal(3, offset).0, error, "{command} {flags} {offset} {length}");
        }
        // Nothing to do is done.
        for command in [READ, WRITE, TRIM, CACHE, ZEROES] {
            let flags = if command == WRITE { write_flags(style) } else { 0 };
            client.ask(command, flags, 4, SIZE, 0);
            assert_eq!(client.chunks(4, SIZE), [Chunk::None], "{command}");
        }
        client.ask(FLUSH, 0, 5, 0, 0);
        assert_eq!(client.chunks(5, 0), [Chunk::None]);
        assert_in_step(&mut client);
        client.ask(DISC, 0, 0, 0, 0);
        client.assert_closed();
    }
}

#[test]
fn what_was_never_written_is_told_as_a_hole_unless_one_chunk_is_asked_for() {
    let serving = Serving::start();
    serving.gate.pretence.lock().blank = vec![4096..12288, 16384..16896];
    for style in CHUNKED {
        let mut client = serving.client_of(style, false);
        let data = |offset, length| Chunk::Data { offset, data: vec![0; length] };
        let hole = |offset, length| Chunk::Hole { offset, length };
        client.ask(READ, 0, 1, 0, 20480);
        let all = [data(0, 4096), hole(4096, 8192), data(12288, 4096), hole(16384, 512), data(16896, 3584)];
        assert_eq!(client.chunks(1, 0), all);
        client.ask(READ, DF, 1, 0, 20480);
        assert_eq!(client.chunks(1, 0), [data(0, 20480)]);
        // All of it in one chunk either way.
        for flags in [0, DF] {
            client.ask(READ, flags, 1, 5000, 1000);
            assert_eq!(client.chunks(1, 5000), [hole(5000, 1000)]);
        }
    }
    // A simple reply has no holes.
    let mut client = serving.client();
    assert_eq!(client.read(4000, 9000), vec![0; 9000]);
    // Of very many pieces none is worth its header.
    serving.gate.pretence.lock().blank = (0..1000).map(|i| i * 1024..i * 1024 + 512).collect();
    let mut client = serving.client_of(Style::Structured, false);
    client.ask(READ, 0, 1, 0, 1 << 20);
    assert_eq!(client.chunks(1, 0), [Chunk::Data { offset: 0, data: vec![0; 1 << 20] }]);
}

#[test]
fn what_cannot_be_read_is_told_with_its_place_and_the_rest_is_sent() {
    let serving = Serving::start();
    {
        let mut pretence = serving.gate.pretence.lock();
        pretence.blank = vec![4096..8192, 12288..16384];
        pretence.broken.push(9000..9001);
    }
    for style in CHUNKED {
        let mut client = serving.client_of(style, false);
        client.ask(READ, 0, 1, 0, 20480);
        let chunks = client.chunks(1, 0);
        assert_eq!(chunks.len(), 5, "{chunks:?}");
        let Chunk::Error { code: EIO, offset: Some(offset), message } = &chunks[2] else {
            panic!("{chunks:?}")
        };
        assert_eq!(*offset, 8192);
        assert!(message.contains("gate"), "{message}");
        assert!(chunks.iter().filter(|chunk| matches!(chunk, Chunk::Error { .. })).count() == 1);
        client.ask(READ, DF, 2, 8500, 1000);
        assert_eq!(client.refusal(2, 8500), (EIO, Some(8500)));
        assert_in_step(&mut client);
    }
    let mut client = serving.client();
    client.ask(READ, 0, 1, 0, 20480);
    client.expect(1, EIO);
    serving.assert_alive();
}

/// The extents of a block status.
fn extents(client: &mut Client, flags: u16, offset: u64, length: u64) -> Vec<(u64, u64)> {
    client.ask(STATUS, flags, 6, offset, length);
    match &client.chunks(6, offset)[..] {
        [Chunk::Status { context: ALLOCATION_ID, extents }] => {
            extents.iter().map(|Descriptor { length, status }| (*length, *status)).collect()
        }
        other => panic!("no status: {other:?}"),
    }
}

#[test]
fn block_status_tells_what_is_data_and_what_are_holes() {
    let serving = Serving::start();
    let hole = STATE_HOLE | STATE_ZERO;
    for style in CHUNKED {
        let mut client = serving.client_of(style, true);
        assert_eq!(extents(&mut client, 0, 0, SIZE), [(SIZE, hole)]);
        write(&mut client, 1 << 20, &[7; 8192]);
        let told = [(1 << 20, hole), (8192, 0), (SIZE - (1 << 20) - 8192, hole)];
        assert_eq!(extents(&mut client, 0, 0, SIZE), told);
        assert_eq!(extents(&mut client, REQ_ONE, 0, SIZE), told[..1]);
        assert_eq!(extents(&mut client, REQ_ONE, 1 << 20, 512), [(512, 0)]);
        assert_eq!(extents(&mut client, FUA, (1 << 20) + 8191, 3), [(1, 0), (2, hole)]);
        for (offset, length) in [(SIZE, 1), (0, SIZE + 1), (u64::MAX, 1), (0, 0), (SIZE, 0)] {
            client.ask(STATUS, 0, 7, offset, length);
            assert_eq!(client.refusal(7, offset).0, EINVAL, "{offset} {length}");
        }
        client.ask(TRIM, 0, 8, 1 << 20, 8192);
        assert_eq!(client.chunks(8, 1 << 20), [Chunk::None]);
        assert_eq!(extents(&mut client, 0, 0, SIZE), [(SIZE, hole)]);
    }
    // Contexts of another kind are ignored, and then there is nothing to ask for.
    let mut client = serving.connect();
    client.greet(3);
    client.settle(Style::Structured);
    assert!(client.choose("vol", &["base:", "x-other:thing", "qemu:dirty-bitmap:b", ""]).is_empty());
    assert_eq!(client.choose("", &[ALLOCATION_CONTEXT, ALLOCATION_CONTEXT, "x-y:z"]), [ALLOCATION_CONTEXT]);
    assert!(client.choose("", &[]).is_empty());
    client.go("vol");
    client.ask(STATUS, 0, 7, 0, 512);
    assert_eq!(client.refusal(7, 0).0, EINVAL);
}

#[test]
fn a_status_of_very_many_extents_comes_in_bounded_parts() {
    let serving = Serving::start();
    let image = std::fs::File::options().write(true).open(serving.image()).unwrap();
    for at in (0..SIZE - 4096).step_by(16384) {
        std::os::unix::fs::FileExt::write_all_at(&image, &[1], at).unwrap();
    }
    let mut client = serving.client_of(Style::Extended, true);
    let (mut at, mut asked, mut data) = (0, 0, 0);
    while at < SIZE {
        let told = extents(&mut client, 0, at, SIZE - at);
        assert!(told.len() <= 4096, "{} extents", told.len());
        data += told.iter().filter(|(_, status)| *status == 0).map(|(length, _)| length).sum::<u64>();
        at += told.iter().map(|(length, _)| length).sum::<u64>();
        asked += 1;
    }
    assert_eq!((at, data), (SIZE, 4096 * 4096));
    assert!(asked > 1, "it came at once");
}

#[test]
fn lengths_of_64_bits_and_payloads_are_what_extended_headers_are_for() {
    let serving = Serving::start();
    let mut client = serving.client_of(Style::Extended, true);
    for (command, error) in
        [(ZEROES, ENOSPC), (TRIM, EINVAL), (CACHE, EINVAL), (STATUS, EINVAL), (READ, EOVERFLOW)]
    {
        for length in [1 << 32, (1 << 32) + 512, 1 << 63, u64::MAX] {
            client.ask(command, 0, 1, 512, length);
            assert_eq!(client.refusal(1, 512).0, error, "{command} of {length}");
        }
    }
    assert!(serving.gate.asked().is_empty(), "nothing of it reached the device");
    // A write says that it carries what it writes; without that there is nothing behind its header.
    client.ask(WRITE, 0, 2, 0, 4096);
    assert_eq!(client.refusal(2, 0).0, EINVAL);
    assert_in_step(&mut client);
    // Others may carry something, and are refused when it is there; it is not taken for requests.
    let mut smuggled = Vec::new();
    Request { flags: PAYLOAD_LEN, command: WRITE.into(), cookie: 666, offset: 0, length: 4 }
        .encode_extended(&mut smuggled);
    smuggled.extend_from_slice(b"evil");
    for command in [READ, FLUSH, TRIM, CACHE, ZEROES, 8, 99] {
        for length in [0, smuggled.len()] {
            client.ask(command, PAYLOAD_LEN, 3, 0, length as u64);
            client.put(&smuggled[..length]);
            assert_eq!(client.refusal(3, 0).0, EINVAL, "{command} with {length} bytes");
        }
    }
    assert_in_step(&mut client);
    client.ask(READ, 0, 4, 0, 4);
    assert_eq!(client.chunks(4, 0), [Chunk::Data { offset: 0, data: vec![0; 4] }]);
    // The most that is allowed passes, and a byte more ends the session.
    let most: Vec<u8> = (0..MAX).map(|i| (i / 3) as u8).collect();
    write(&mut client, 5, &most);
    client.ask(READ, 0, 5, 5, MAX.into());
    assert!(client.chunks(5, 5) == [Chunk::Data { offset: 5, data: most }]);
    client.ask(WRITE, PAYLOAD_LEN, 6, 0, u64::from(MAX) + 1);
    client.assert_closed();
    // A short request is no request here.
    let mut client = serving.client_of(Style::Extended, false);
    let mut short = Vec::new();
    Request { flags: 0, command: READ.into(), cookie: 1, offset: 0, length: 1 }.encode(&mut short);
    client.put(&short);
    client.assert_closed();
    serving.assert_alive();
}

#[test]
fn a_status_may_name_the_contexts_it_wants() {
    let serving = Serving::start();
    let mut client = serving.client_of(Style::Extended, true);
    let ask = |client: &mut Client, payload: &[u8]| {
        client.ask(STATUS, PAYLOAD_LEN, 1, 4096, payload.len() as u64);
        client.put(payload);
    };
    let filter = |length, contexts: &[u32]| {
        let mut payload = Vec::new();
        StatusFilter { length, contexts: contexts.to_vec() }.encode(&mut payload);
        payload
    };
    ask(&mut client, &filter(SIZE - 4096, &[ALLOCATION_ID]));
    let extents = vec![Descriptor { length: SIZE - 4096, status: STATE_HOLE | STATE_ZERO }];
    assert_eq!(client.chunks(1, 4096), [Chunk::Status { context: ALLOCATION_ID, extents }]);
    for payload in [
        Vec::new(),
        vec![0; 7],
        vec![0; 11],
        filter(512, &[]),
        filter(512, &[ALLOCATION_ID, ALLOCATION_ID]),
        filter(512, &[ALLOCATION_ID + 1]),
        filter(0, &[ALLOCATION_ID]),
        filter(SIZE, &[ALLOCATION_ID]),
        filter(u64::MAX, &[ALLOCATION_ID]),
        filter(512, &[ALLOCATION_ID; 9]),
        vec![0xff; 1 << 20],
    ] {
        ask(&mut client, &payload);
        assert_eq!(client.refusal(1, 4096).0, EINVAL, "{} bytes", payload.len());
    }
    assert_in_step(&mut client);
    // Who chose no context has none to name.
    let mut client = serving.client_of(Style::Extended, false);
    ask(&mut client, &filter(512, &[ALLOCATION_ID]));
    assert_eq!(client.refusal(1, 4096).0, EINVAL);
    assert_in_step(&mut client);
}

#[test]
fn zeroes_that_must_be_fast_are_fast_or_nothing() {
    let serving = Serving::start();
    let mut client = serving.client_of(Style::Structured, false);
    write(&mut client, 0, b"data");
    client.ask(ZEROES, FAST_ZERO | NO_HOLE, 1, 0, 4096);
    assert_eq!(client.refusal(1, 0).0, ENOTSUP);
    serving.gate.pretence.lock().slow_zeroes = true;
    client.ask(ZEROES, FAST_ZERO, 1, 0, 4096);
    assert_eq!(client.refusal(1, 0).0, ENOTSUP);
    client.ask(READ, 0, 2, 0, 4);
    assert_eq!(client.chunks(2, 0), [Chunk::Data { offset: 0, data: b"data".to_vec() }]);
    // Without the flag slow is fine.
    client.ask(ZEROES, 0, 1, 0, 2);
    assert_eq!(client.chunks(1, 0), [Chunk::None]);
    serving.gate.pretence.lock().slow_zeroes = false;
    client.ask(ZEROES, FAST_ZERO | FUA, 1, 0, SIZE);
    assert_eq!(client.chunks(1, 0), [Chunk::None]);
    client.ask(CACHE, 0, 1, 0, SIZE);
    assert_eq!(client.chunks(1, 0), [Chunk::None]);
    assert_eq!(serving.gate.asked(), ["write", "read", "zero", "zero stable", "prefetch"]);
    // Simple replies know of it too.
    serving.gate.pretence.lock().slow_zeroes = true;
    let mut client = serving.client();
    client.ask(ZEROES, FAST_ZERO, 1, 0, 4096);
    client.expect(1, ENOTSUP);
    client.ask(CACHE, 0, 1, 0, 4096);
    client.expect(1, 0);
}

#[test]
fn flags_say_what_this_session_can_do() {
    let flags = |serving: &Serving, style, allocation: bool| {
        let mut client = serving.connect();
        client.greet(3);
        client.settle(style);
        if allocation {
            client.choose("", &[ALLOCATION_CONTEXT]);
        }
        client.go("vol").1
    };
    let always = f::HAS_FLAGS | f::SEND_FLUSH | f::CAN_MULTI_CONN | f::SEND_CACHE;
    let changes = f::SEND_FUA | f::SEND_TRIM | f::SEND_WRITE_ZEROES | f::SEND_FAST_ZERO;
    let serving = Serving::start();
    assert_eq!(flags(&serving, Style::Simple, false), always | changes);
    assert_eq!(flags(&serving, Style::Structured, true), always | changes | f::SEND_DF);
    let extended = always | changes | f::SEND_DF;
    assert_eq!(flags(&serving, Style::Extended, false), extended);
    assert_eq!(flags(&serving, Style::Extended, true), extended | f::BLOCK_STATUS_PAYLOAD);
    serving.gate.pretence.lock().rotational = true;
    assert_eq!(flags(&serving, Style::Simple, false), always | changes | f::ROTATIONAL);
    let read_only = Serving::start_with(Limits::standard(), true);
    assert_eq!(flags(&read_only, Style::Structured, false), always | f::READ_ONLY | f::SEND_DF);
    for style in CHUNKED {
        let mut client = read_only.client_of(style, false);
        client.ask(WRITE, write_flags(style), 1, 0, 4);
        client.put(b"evil");
        assert_eq!(client.refusal(1, 0).0, EPERM);
        for command in [TRIM, ZEROES] {
            client.ask(command, 0, 1, 0, 4);
            assert_eq!(client.refusal(1, 0).0, EPERM);
        }
        client.ask(CACHE, 0, 1, 0, 4096);
        assert_eq!(client.chunks(1, 0), [Chunk::None]);
    }
}

#[test]
fn a_client_that_goes_away_at_any_byte_of_a_session_in_chunks_costs_nothing() {
    use raid::nbd::wire::{ClientOption, ExportQuery, MetaQuery};
    let serving = Serving::start();
    serving.gate.pretence.lock().blank.push(4096..8192);
    for (style, option) in
        [(Style::Structured, ClientOption::StructuredReply), (Style::Extended, ClientOption::ExtendedHeaders)]
    {
        let mut session = 3u32.to_be_bytes().to_vec();
        let meta = MetaQuery { name: "vol".into(), queries: vec![ALLOCATION_CONTEXT.into()] };
        let go = ClientOption::Go(ExportQuery { name: "vol".into(), information: vec![1] });
        for option in
            [option, ClientOption::ListMetaContext(meta.clone()), ClientOption::SetMetaContext(meta), go]
        {
            option.encode(&mut session);
        }
        let mut filter = Vec::new();
        StatusFilter { length: 8192, contexts: vec![ALLOCATION_ID] }.encode(&mut filter);
        let mut ask = |command: u16, flags, length, payload: &[u8]| {
            let request = Request { flags, command: command.into(), cookie: 5, offset: 0, length };
            if style == Style::Extended {
                request.encode_extended(&mut session);
            } else {
                request.encode(&mut session);
            }
            session.extend_from_slice(payload);
        };
        ask(WRITE, write_flags(style), 64, &[0x77; 64]);
        ask(READ, 0, 12288, &[]);
        if style == Style::Extended {
            ask(STATUS, PAYLOAD_LEN, filter.len() as u64, &filter);
        }
        ask(STATUS, 0, 8192, &[]);
        for length in 0..=session.len() {
            let mut client = serving.connect();
            client.put(&session[..length]);
            if length % 2 == 0 {
                client.rest();
            }
        }
    }
    serving.assert_alive();
}

#[test]
fn a_flush_on_one_connection_covers_what_was_answered_on_another() {
    let serving = Serving::start();
    let mut clients = CHUNKED.map(|style| serving.client_of(style, false));
    for (writes, flushes) in [(0, 1), (1, 0)] {
        let asked = serving.gate.asked().len();
        write(&mut clients[writes], 512, b"one for all");
        let other = &mut clients[flushes];
        other.ask(READ, 0, 2, 512, 11);
        assert_eq!(other.chunks(2, 512), [Chunk::Data { offset: 512, data: b"one for all".to_vec() }]);
        other.ask(FLUSH, 0, 3, 0, 0);
        assert_eq!(other.chunks(3, 0), [Chunk::None]);
        assert_eq!(serving.gate.asked()[asked..], ["write", "read", "flush"], "one device, in this order");
    }
}
