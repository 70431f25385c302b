//! The clients that people use, against our server: libnbd's tools and its Python binding, qemu's tools, fio, nbdkit's
//! client plugin, and an independent client in Rust.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use tests::nbd::{SIZE, Serving};
use tests::process::{bytes_of, refuse, succeed};

/// Bytes that no two places have alike, different for each `seed`.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A file of the exported size, filled with [`pattern`].
fn source(serving: &Serving, seed: u64) -> std::path::PathBuf {
    let path = serving.sandbox.join(format!("source{seed}"));
    std::fs::write(&path, pattern(SIZE as usize, seed)).expect("the sandbox is writable");
    path
}

#[test]
fn nbdinfo_tells_what_we_are() {
    let serving = Serving::start();
    let run = |args: &[&str]| succeed(serving.sandbox.command("nbdinfo").args(args).arg(serving.uri()));
    let json: serde_json::Value = serde_json::from_str(&run(&["--json"])).unwrap();
    assert_eq!(json["protocol"], "newstyle-fixed");
    assert_eq!(json["TLS"], false);
    let export = &json["exports"][0];
    assert_eq!(export["export-size"], SIZE);
    assert_eq!(export["export-name"], "vol");
    assert_eq!(export["description"], "under test");
    for (flag, expected) in [
        ("is_read_only", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_multi_conn", true),
        ("can_df", true),
        ("can_cache", true),
        ("can_fast_zero", true),
    ] {
        assert_eq!(export[flag], expected, "{flag}");
    }
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    assert_eq!(run(&["--size"]).trim(), SIZE.to_string());
    assert_eq!(json["structured"], true);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    // Nothing was written: one hole. Then data in it.
    let map = || -> Vec<(u64, u64, u64)> {
        let map: serde_json::Value = serde_json::from_str(&run(&["--map", "--json"])).unwrap();
        let number = |extent: &serde_json::Value, key: &str| extent[key].as_u64().unwrap();
        let extents = map.as_array().unwrap().iter();
        extents.map(|one| (number(one, "offset"), number(one, "length"), number(one, "type"))).collect()
    };
    assert_eq!(map(), [(0, SIZE, 3)]);
    serving.client().write(1 << 20, &[7; 4096]);
    let behind = (1 << 20) + 4096;
    assert_eq!(map(), [(0, 1 << 20, 3), (1 << 20, 4096, 0), (behind, SIZE - behind, 3)]);
    let list = run(&["--list"]);
    // Both names lead to it; the default one is shown by its canonical name.
    assert_eq!(list.matches("export=\"vol\"").count(), 2, "{list}");
    let other = serving.uri().replace("vol", "other");
    let refused = refuse(serving.sandbox.command("nbdinfo").args(["--size", &other]), 1);
    assert!(refused.contains("no export"), "{refused}");
}

#[test]
fn nbdcopy_over_four_connections_there_and_back() {
    let serving = Serving::start();
    let source = source(&serving, 1);
    let back = serving.sandbox.join("back");
    let copy = |from: &Path, to: &Path| {
        let mut command = serving.sandbox.command("nbdcopy");
        succeed(command.args(["--connections=4", "--requests=64", "--flush"]).arg(from).arg(to));
    };
    let uri = serving.uri();
    copy(&source, Path::new(&uri));
    copy(Path::new(&uri), &back);
    assert!(bytes_of(&source) == bytes_of(&back));
    assert!(bytes_of(&source) == bytes_of(&serving.image()));
}

#[test]
fn qemus_tools_write_read_discard_zero_compare_and_convert() {
    let serving = Serving::start();
    let uri = serving.uri();
    let mut io = serving.sandbox.command("qemu-io");
    io.args(["-f", "raw", &uri]);
    for step in [
        "write -P 7 0 64k",
        "read -P 7 0 64k",
        "flush",
        "write -f -P 9 1M 2M",
        "read -P 9 1M 2M",
        "discard 0 64k",
        "write -z 0 64k",
        "read -P 0 0 64k",
        "write -z -u 1M 1M",
        "read -P 0 1M 1M",
        "read -P 9 2M 1M",
        "aio_write -P 3 4M 64k",
        "aio_write -P 4 5M 64k",
        "aio_flush",
        "read -P 3 4M 64k",
        "read -P 4 5M 64k",
    ] {
        io.args(["-c", step]);
    }
    let said = succeed(&mut io);
    assert!(!said.contains("failed"), "{said}");
    let source = source(&serving, 2);
    let image = |args: &[&str]| succeed(serving.sandbox.command("qemu-img").args(args));
    let path = source.to_str().unwrap();
    // What qemu sees is what there is; whether the zeroes that were to keep their space are holes, the file system says.
    let map = image(&["map", "--output=json", "-f", "raw", &uri]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let is_data = |one: &&serde_json::Value| one["data"] == true && one["start"].as_u64() >= Some(1 << 20);
    let data: Vec<_> = map.as_array().unwrap().iter().filter(is_data).collect();
    let places: Vec<_> = data.iter().map(|one| (one["start"].as_u64(), one["length"].as_u64())).collect();
    let written = [(2 << 20, 1 << 20), (4 << 20, 64 << 10), (5 << 20, 64 << 10)];
    assert_eq!(places, written.map(|(start, length)| (Some(start), Some(length))), "{map}");
    image(&["convert", "-n", "-f", "raw", "-O", "raw", path, &uri]);
    image(&["compare", "-f", "raw", "-F", "raw", path, &uri]);
    image(&["bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", &uri]);
    image(&["bench", "-f", "raw", "-w", "-c", "500", "-d", "16", "-s", "65536", "--flush-interval=50", &uri]);
}

#[test]
fn fio_verifies_what_it_wrote() {
    let serving = Serving::start();
    let fio = |args: &[&str]| {
        let mut command = serving.sandbox.command("fio");
        command.args(["--name=t", "--ioengine=nbd", "--size=32m", "--verify=crc32c", "--verify_fatal=1"]);
        let uri = format!("--uri={}", serving.uri());
        let said = succeed(command.arg(uri).args(args));
        assert!(said.contains("err= 0"), "{said}");
    };
    fio(&["--rw=randwrite", "--bs=4k", "--iodepth=32"]);
    fio(&["--rw=randrw", "--bsrange=512-256k", "--bs_unaligned=1", "--iodepth=16"]);
    fio(&["--rw=write", "--bs=1m", "--iodepth=8", "--fsync=4"]);
}

#[test]
fn libnbds_python_binding_without_its_own_checks() {
    let serving = Serving::start();
    let script = r"
import errno, nbd, sys, os
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_uri(sys.argv[1])
names = []
h.opt_list(lambda name, description: names.append(name))
assert sorted(names) == ['', 'vol'], names
h.set_export_name('vol')
h.opt_info()
assert h.get_size() == int(sys.argv[2])
assert h.get_canonical_export_name() == 'vol'
h.opt_go()
assert h.get_structured_replies_negotiated()
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
size = h.get_size()
def fails(code, call, *args, **more):
    try:
        call(*args, **more)
    except nbd.Error as e:
        assert e.errnum == code, (call, args, e)
        return
    assert False, ('no error', call, args)
fails(errno.EINVAL, h.pread, 512, size)
fails(errno.EINVAL, h.pread, 512, 2**63 - 512)
fails(errno.ENOSPC, h.pwrite, b'x' * 512, size - 1)
fails(errno.ENOSPC, h.zero, 512, size)
fails(errno.EINVAL, h.trim, 512, size)
fails(errno.EINVAL, h.cache, 512, size)
fails(errno.EINVAL, h.block_status, 512, size, lambda *a: 0)
fails(errno.EINVAL, h.block_status, 0, 0, lambda *a: 0)
fails(errno.EINVAL, h.block_status, 512, 0, lambda *a: 0, flags=nbd.CMD_FLAG_DF)
fails(errno.EOVERFLOW, h.pread, (32 << 20) + 1, 0)
fails(errno.EINVAL, h.pread, 512, 0, flags=nbd.CMD_FLAG_NO_HOLE)
h.cache(512, 0)
assert h.pread(512, 0, flags=nbd.CMD_FLAG_DF) == bytes(512)
def extents(length, offset, flags=0):
    told = []
    def note(context, at, entries, error):
        assert (context, at, error.value) == (nbd.CONTEXT_BASE_ALLOCATION, offset, 0)
        told.extend(entries)
        return 0
    h.block_status(length, offset, note, flags=flags)
    return told
assert extents(size, 0) == [size, nbd.STATE_HOLE | nbd.STATE_ZERO]
h.pwrite(b'x' * 4096, 65536)
hole = nbd.STATE_HOLE | nbd.STATE_ZERO
assert extents(size, 0) == [65536, hole, 4096, 0, size - 69632, hole]
assert extents(size, 0, nbd.CMD_FLAG_REQ_ONE) == [65536, hole]
assert extents(512, 65536 + 512, nbd.CMD_FLAG_REQ_ONE) == [512, 0]
h.zero(4096, 65536, flags=nbd.CMD_FLAG_FAST_ZERO)
assert extents(size, 0) == [size, hole]
fails(errno.ENOTSUP, h.zero, 4096, 0, flags=nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
chunks = []
def note(data, at, status, error):
    chunks.append((len(data), at, status))
    return 0
assert h.pread_structured(4096, 512, note) == bytes(4096) and chunks == [(4096, 512, nbd.READ_DATA)], chunks
fails(errno.EINVAL, h.pwrite, b'x' * 512, 0, flags=1 << 9)
# A zero length is a request like any other, and the connection is in step after it.
h.pwrite(b'', 0)
assert h.pread(0, 0) == b''
h.zero(0, 0); h.trim(0, 0)
h.pwrite(b'abc', 1, flags=nbd.CMD_FLAG_FUA)
h.flush(flags=nbd.CMD_FLAG_FUA)
assert h.pread(5, 0) == b'\0abc\0'
h.pread(1, 0, flags=nbd.CMD_FLAG_FUA)
h.zero(2, 1, flags=nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(5, 0) == b'\0\0\0c\0'
# Many at once, read back by another connection.
data = os.urandom(1 << 20)
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[i:i + 4096])), (1 << 20) + i) for i in range(0, 1 << 20, 4096)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.flush()
other = nbd.NBD()
other.connect_uri(sys.argv[1])
assert other.pread(1 << 20, 1 << 20) == data
other.shutdown()
h.shutdown()
print('done')
";
    let size = SIZE.to_string();
    let mut python = serving.sandbox.command("/usr/bin/python3");
    assert_eq!(succeed(python.args(["-c", script, &serving.uri(), &size])).trim(), "done");
    serving.assert_alive();
}

#[test]
fn an_independent_client_in_rust() {
    let serving = Serving::start();
    let mut stream = UnixStream::connect(serving.socket()).unwrap();
    let export = nbd::client::handshake(&mut stream, b"vol").unwrap();
    assert_eq!(export.size, SIZE);
    let mut client = nbd::client::NbdClient::new(&mut stream, &export);
    let data = pattern(100_000, 3);
    client.seek(SeekFrom::Start(12_345)).unwrap();
    client.write_all(&data).unwrap();
    client.seek(SeekFrom::Start(12_345)).unwrap();
    let mut back = vec![0; data.len()];
    client.read_exact(&mut back).unwrap();
    assert!(back == data);
    let mut stored = vec![0; data.len()];
    File::open(serving.image()).unwrap().read_exact_at(&mut stored, 12_345).unwrap();
    assert!(stored == data);
}

#[test]
fn nbdkit_stacked_above() {
    let serving = Serving::start();
    let source = source(&serving, 4);
    let mut command = serving.sandbox.command("nbdkit");
    command.args(["-U", "-", "--filter=checkwrite", "--filter=blocksize", "nbd"]);
    command.arg(format!("uri={}", serving.uri())).args(["shared=1", "--run"]);
    // Its client sees our holes, and passes them on.
    let mut map = serving.sandbox.command("nbdkit");
    map.args(["-U", "-", "nbd", &format!("uri={}", serving.uri()), "--run", "nbdinfo --map --json \"$uri\""]);
    let map: serde_json::Value = serde_json::from_str(&succeed(&mut map)).unwrap();
    assert_eq!((map[0]["length"].as_u64(), map[0]["type"].as_u64()), (Some(SIZE), Some(3)), "{map}");
    // First filled past nbdkit, then compared by writing the same through it.
    let mut fill = serving.sandbox.command("nbdcopy");
    succeed(fill.arg(&source).arg(serving.uri()));
    succeed(command.arg(format!("nbdcopy {} \"$uri\"", source.display())));
}
