//! The NBD server over a device of the test's choice, within the test's process, and a client that says exactly the
//! bytes it is told to, wrong ones too.

use crate::process::Sandbox;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use raid::device::{Device, Durability, Extent, FileDevice, Io, OpenMode, Piece, ZeroMode};
use raid::error::{Error, Operation};
use raid::nbd::transmission::{Ended, Pool, Siblings};
use raid::nbd::wire::{
    self, ALLOCATION_CONTEXT, Chunk, ChunkHeader, ClientOption, Command, DONE, ExportQuery, MetaQuery,
    OPTION_REPLY_MAGIC, Request, SIMPLE_REPLY_LEN, SimpleReply, Style,
};
use raid::nbd::{Address, Export, Exports, Limits, Listeners, Security, Server, Session, adopt};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// Size of the device under test: not a power of two, not a multiple of anything large.
pub const SIZE: u64 = (64 << 20) + 512;
/// How long a client waits for an answer before the test calls the server hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server at work on a Unix socket in a sandbox.
pub struct Serving {
    /// Where socket and image are.
    pub sandbox: Sandbox,
    /// Holds back what the device does, where a test wants that.
    pub gate: Arc<Gate>,
    runtime: tokio::runtime::Runtime,
    server: Option<Server>,
}

impl Serving {
    /// Serves an empty image of [`SIZE`] as `vol`, with the limits of production.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(Limits::standard(), false)
    }

    /// The same with other limits, or read-only.
    #[must_use]
    pub fn start_with(limits: Limits, read_only: bool) -> Self {
        // In memory, where the server takes the short way wherever it can.
        Self::start_at(Sandbox::in_memory(), limits, read_only, &[], Security::none())
    }

    /// The same in a sandbox that has something in it, on further addresses, under TLS.
    #[must_use]
    pub fn start_at(
        sandbox: Sandbox,
        limits: Limits,
        read_only: bool,
        further: &[Address],
        security: Security,
    ) -> Self {
        let image = sandbox.join("image");
        File::create_new(&image).and_then(|file| file.set_len(SIZE)).expect("the sandbox is writable");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime can be made");
        let file = FileDevice::open(&image, OpenMode::ReadWrite).expect("the image was just made");
        let gate = Arc::new(Gate::around(file));
        let (description, device) = ("under test".to_owned(), Arc::clone(&gate) as Arc<dyn Device>);
        let exports = Exports::single(Export { name: "vol".to_owned(), description, device, read_only });
        let mut addresses = vec![Address::Unix(sandbox.join("nbd"))];
        addresses.extend_from_slice(further);
        let server = runtime.block_on(async {
            let listeners = Listeners::bind(&addresses, false).await.expect("the addresses are free");
            Server::start(listeners, exports, limits, security)
        });
        Self { sandbox, gate, runtime, server: Some(server) }
    }

    /// The socket's path.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.sandbox.join("nbd")
    }

    /// The image that backs the device.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.sandbox.join("image")
    }

    /// What NBD tools call it.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///vol?socket={}", self.socket().display())
    }

    /// A connection on which nothing has been said.
    #[must_use]
    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.socket()).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
        stream.set_write_timeout(Some(PATIENCE)).expect("not zero");
        Client::over(stream)
    }

    /// A connection in the transmission phase, with simple replies.
    #[must_use]
    pub fn client(&self) -> Client {
        let mut client = self.connect();
        client.greet(3);
        client.go("vol");
        client
    }

    /// One of the given style; `allocation`: with `base:allocation` chosen.
    #[must_use]
    pub fn client_of(&self, style: Style, allocation: bool) -> Client {
        let mut client = self.connect();
        client.greet(3);
        client.settle(style);
        if allocation {
            client.choose("vol", &[ALLOCATION_CONTEXT]);
        }
        client.go("vol");
        client
    }

    /// A connection that is served without a handshake, what announces the stop to it, and what waits for its end. The
    /// client does `first` before it is served.
    #[must_use]
    pub fn adopted(
        &self,
        first: impl FnOnce(&mut Client),
    ) -> (Client, watch::Sender<bool>, mpsc::Receiver<Ended>) {
        self.adopted_among(&Arc::default(), first)
    }

    /// The same, as one of several connections of a client.
    #[must_use]
    pub fn adopted_among(
        &self,
        siblings: &Arc<Siblings>,
        first: impl FnOnce(&mut Client),
    ) -> (Client, watch::Sender<bool>, mpsc::Receiver<Ended>) {
        let device = Arc::clone(&self.gate) as Arc<dyn Device>;
        let export = Export { name: "gate".to_owned(), description: String::new(), device, read_only: false };
        let session = Session { export: Arc::new(export), style: Style::Simple, allocation: false };
        let (client, ours) = UnixStream::pair().expect("there are sockets");
        client.set_read_timeout(Some(PATIENCE)).expect("a socket has timeouts");
        ours.set_nonblocking(true).expect("a socket can be made so");
        let line = siblings.join(ours.try_clone().expect("it can have two names").into());
        let mut client = Client::over(client);
        first(&mut client);
        let (stop, stopping) = watch::channel(false);
        let (done, wait) = mpsc::channel();
        self.runtime.spawn(async move {
            let stream = tokio::net::UnixStream::from_std(ours).expect("within the runtime");
            let timing = Limits::standard().timing;
            let ended = adopt(stream, session, Arc::new(Pool::new(0)), timing, stopping, line).await;
            if done.send(ended).is_err() {
                eprintln!("the connection ended when the test no longer waited");
            }
        });
        (client, stop, wait)
    }

    /// Announces the stop on a thread of its own and gives what waits for it.
    pub fn begin_stop(&mut self) -> mpsc::Receiver<()> {
        let (done, wait) = mpsc::channel();
        let server = self.server.take().expect("stopped once");
        self.runtime.spawn(async move {
            server.stop().await;
            if done.send(()).is_err() {
                eprintln!("the server stopped when the test no longer waited");
            }
        });
        wait
    }

    /// Panics unless a fresh client can write, read back and leave.
    pub fn assert_alive(&self) {
        let mut client = self.client();
        client.write(4096, b"still here");
        assert_eq!(client.read(4096, 10), b"still here");
        client.send(&Request { flags: 0, command: Command::Disconnect, cookie: 0, offset: 0, length: 0 });
        client.assert_closed();
    }
}

/// A client of raw bytes.
pub struct Client {
    /// The socket.
    pub stream: UnixStream,
    /// What was negotiated.
    pub style: Style,
}

impl Client {
    /// One on which nothing has been said.
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        Self { stream, style: Style::Simple }
    }

    /// Takes the greeting and answers with `flags`.
    pub fn greet(&mut self, flags: u32) {
        let greeting: [u8; 18] = self.take();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\0\x03");
        self.put(&flags.to_be_bytes());
    }

    /// Sends bytes.
    pub fn put(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server takes what it is sent");
    }

    /// Receives exactly `N` bytes.
    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// Says that nothing more will come, and receives to the end.
    pub fn rest(&mut self) -> Vec<u8> {
        self.stream.shutdown(Shutdown::Write).expect("the server is there");
        let mut answers = Vec::new();
        self.stream.read_to_end(&mut answers).expect("the server ends in order");
        answers
    }

    /// Sends an option.
    pub fn option(&mut self, option: &ClientOption) {
        let mut bytes = Vec::new();
        option.encode(&mut bytes);
        self.put(&bytes);
    }

    /// Receives an option reply: its type and payload.
    pub fn option_reply(&mut self) -> (u32, Vec<u8>) {
        let header: [u8; 20] = self.take();
        assert_eq!(header[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let mut payload = vec![0; number(16) as usize];
        self.stream.read_exact(&mut payload).expect("the server answers");
        (number(12), payload)
    }

    /// Negotiates how requests and replies are framed.
    pub fn settle(&mut self, style: Style) {
        match style {
            Style::Simple => return,
            Style::Structured => self.option(&ClientOption::StructuredReply),
            Style::Extended => self.option(&ClientOption::ExtendedHeaders),
        }
        assert_eq!(self.option_reply().0, 1);
        self.style = style;
    }

    /// Chooses metadata contexts; gives their names, as they were acknowledged.
    pub fn choose(&mut self, name: &str, queries: &[&str]) -> Vec<String> {
        let queries = queries.iter().map(|&query| query.to_owned()).collect();
        self.option(&ClientOption::SetMetaContext(MetaQuery { name: name.to_owned(), queries }));
        let mut chosen = Vec::new();
        loop {
            match self.option_reply() {
                (1, _) => return chosen,
                (4, payload) => chosen.push(String::from_utf8_lossy(&payload[4..]).into_owned()),
                (kind, text) => panic!("refused: {kind:#x} {}", String::from_utf8_lossy(&text)),
            }
        }
    }

    /// Enters the transmission phase; gives size and transmission flags.
    pub fn go(&mut self, name: &str) -> (u64, u16) {
        self.option(&ClientOption::Go(ExportQuery { name: name.to_owned(), information: Vec::new() }));
        let mut export = None;
        loop {
            match self.option_reply() {
                (1, _) => return export.expect("the export is told before the acknowledgement"),
                (3, payload) if payload[..2] == [0, 0] => {
                    let size = u64::from_be_bytes(payload[2..10].try_into().expect("eight bytes"));
                    export = Some((size, u16::from_be_bytes([payload[10], payload[11]])));
                }
                (3, _) => {}
                (kind, text) => panic!("GO refused: {kind:#x} {}", String::from_utf8_lossy(&text)),
            }
        }
    }

    /// Sends a request's header, in the style that was negotiated.
    pub fn send(&mut self, request: &Request) {
        let mut bytes = Vec::new();
        if self.style == Style::Extended {
            request.encode_extended(&mut bytes);
        } else {
            request.encode(&mut bytes);
        }
        self.put(&bytes);
    }

    /// Sends a request's header with everything chosen.
    pub fn ask(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64) {
        self.send(&Request { flags, command: command.into(), cookie, offset, length });
    }

    /// Receives a chunk: whether it is the last one, of which request, and what it says. `offset`: the request's.
    pub fn chunk(&mut self, offset: u64) -> (bool, u64, Chunk) {
        let header = if self.style == Style::Extended {
            let header = ChunkHeader::decode_extended(&self.take()).expect("an extended chunk");
            assert_eq!(header.offset, offset, "the offset is the request's");
            header
        } else {
            ChunkHeader::decode_structured(&self.take()).expect("a structured chunk")
        };
        assert!(header.length <= u64::from(MAX) + 8, "a chunk of {} bytes", header.length);
        let mut payload = vec![0; header.length as usize];
        self.stream.read_exact(&mut payload).expect("a chunk's payload follows its header");
        let chunk = Chunk::decode(header.kind, &payload).expect("a chunk as the protocol has it");
        assert_eq!(chunk.kind(self.style), header.kind, "a type of the other style");
        (header.flags == DONE, header.cookie, chunk)
    }

    /// Receives all chunks of the reply to a request.
    pub fn chunks(&mut self, cookie: u64, offset: u64) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        loop {
            let (done, of, chunk) = self.chunk(offset);
            assert_eq!(of, cookie);
            chunks.push(chunk);
            if done {
                return chunks;
            }
        }
    }

    /// Receives a reply of one chunk that says no, with a text; gives code and offset.
    pub fn refusal(&mut self, cookie: u64, offset: u64) -> (u32, Option<u64>) {
        let mut chunks = self.chunks(cookie, offset);
        match chunks.pop() {
            Some(Chunk::Error { code, message, offset }) if chunks.is_empty() => {
                assert!(!message.is_empty(), "an error without a word");
                (code, offset)
            }
            other => panic!("not refused: {other:?} after {chunks:?}"),
        }
    }

    /// Receives a simple reply's header.
    pub fn reply(&mut self) -> SimpleReply {
        let header: [u8; SIMPLE_REPLY_LEN] = self.take();
        SimpleReply::decode(&header).expect("a simple reply")
    }

    /// Receives a reply and panics unless it is for `cookie` with `error`.
    pub fn expect(&mut self, cookie: u64, error: u32) {
        assert_eq!(self.reply(), SimpleReply { error, cookie });
    }

    /// Writes and waits for success.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.ask(1, 0, 1, offset, data.len() as u64);
        self.put(data);
        self.expect(1, 0);
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.ask(0, 0, 2, offset, length.into());
        self.expect(2, 0);
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).expect("a read's payload follows its header");
        data
    }

    /// Panics unless the server has closed the connection, with nothing more said.
    pub fn assert_closed(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert!(rest.is_empty(), "{} more bytes before the end", rest.len()),
            // It closed with bytes of ours unread.
            Err(error) => assert!(
                matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
                "not closed: {error}"
            ),
        }
    }
}

/// The most bytes one request may carry.
pub const MAX: u32 = wire::MAX_PAYLOAD;

/// A device that can hold back its operations, and remembers what it was asked.
pub struct Gate {
    inner: FileDevice,
    open: Semaphore,
    asked: Mutex<Vec<&'static str>>,
    /// Has the thread that asks for the next write stand still before anything else: tells, and waits to be told.
    standstill: Mutex<Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>>,
    /// What it says beyond what the file says.
    pub pretence: Mutex<Pretence>,
}

/// What a device is made to say.
#[derive(Debug, Default)]
pub struct Pretence {
    /// Ranges that it says were never written.
    pub blank: Vec<Range<u64>>,
    /// Ranges that cannot be read.
    pub broken: Vec<Range<u64>>,
    /// That it rotates.
    pub rotational: bool,
    /// That zeroing is slow.
    pub slow_zeroes: bool,
}

impl Gate {
    fn around(inner: FileDevice) -> Self {
        let (asked, pretence) = (Mutex::default(), Mutex::default());
        let (open, standstill) = (Semaphore::new(Semaphore::MAX_PERMITS), Mutex::default());
        Self { inner, open, asked, standstill, pretence }
    }

    /// The thread that asks for the next write stands still before it is heard: gives what tells of that, and what it
    /// waits for.
    pub fn stand_still(&self) -> (mpsc::Receiver<()>, mpsc::Sender<()>) {
        let ((tell, told), (go_on, wait)) = (mpsc::channel(), mpsc::channel());
        *self.standstill.lock() = Some((tell, wait));
        (told, go_on)
    }

    /// From now on operations wait.
    pub fn close(&self) {
        self.open.forget_permits(Semaphore::MAX_PERMITS);
    }

    /// Lets `n` waiting operations go.
    pub fn let_through(&self, n: usize) {
        self.open.add_permits(n);
    }

    /// Names of the operations asked for so far, in order.
    #[must_use]
    pub fn asked(&self) -> Vec<&'static str> {
        self.asked.lock().clone()
    }

    fn is_broken(&self, at: u64, len: u64) -> bool {
        self.pretence.lock().broken.iter().any(|broken| broken.start < at + len && at < broken.end)
    }

    async fn pass(&self) {
        // Each operation uses up its permit, so that `let_through` counts.
        self.open.acquire().await.expect("never closed for good").forget();
    }
}

impl Device for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn refresh(&self) -> Io<'_, u64> {
        self.inner.refresh()
    }

    fn read(&self, at: u64, buf: BytesMut) -> Io<'_, BytesMut> {
        // Reads pass: they show that a connection goes on while its writes wait.
        self.asked.lock().push("read");
        let len = buf.len() as u64;
        if self.is_broken(at, len) {
            let (device, operation, errno) = ("gate".to_owned(), Operation::Read, rustix::io::Errno::IO);
            return Box::pin(async move { Err(Error::Io { device, operation, at, len, errno }) });
        }
        self.inner.read(at, buf)
    }

    fn write(&self, at: u64, data: Bytes, durability: Durability) -> Io<'_, ()> {
        let standstill = self.standstill.lock().take();
        if let Some((tell, wait)) = standstill {
            tell.send(()).expect("the test waits for it");
            wait.recv().expect("the test lets it go on");
        }
        self.asked.lock().push(if durability == Durability::Stable { "write stable" } else { "write" });
        Box::pin(async move {
            self.pass().await;
            self.inner.write(at, data, durability).await
        })
    }

    fn is_instant(&self) -> bool {
        self.inner.is_instant()
    }

    /// Counts as a read if it was one: else [`Device::read`] is asked the same.
    fn read_now(&self, at: u64, buf: &mut [u8]) -> bool {
        let done = !self.is_broken(at, buf.len() as u64) && self.inner.read_now(at, buf);
        if done {
            self.asked.lock().push("read");
        }
        done
    }

    fn write_now(&self, at: u64, data: &[u8]) -> bool {
        if self.standstill.lock().is_some() {
            return false;
        }
        let Ok(permit) = self.open.try_acquire() else { return false };
        let done = self.inner.write_now(at, data);
        if done {
            permit.forget();
            self.asked.lock().push("write");
        }
        done
    }

    fn flush(&self) -> Io<'_, ()> {
        self.asked.lock().push("flush");
        Box::pin(async move {
            self.pass().await;
            self.inner.flush().await
        })
    }

    fn discard(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.asked.lock().push("discard");
        self.inner.discard(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64, mode: ZeroMode, durability: Durability) -> Io<'_, ()> {
        self.asked.lock().push(match (mode, durability) {
            (ZeroMode::MayPunch, Durability::Cached) => "zero",
            (ZeroMode::MayPunch, Durability::Stable) => "zero stable",
            (ZeroMode::Allocate, Durability::Cached) => "zero no hole",
            (ZeroMode::Allocate, Durability::Stable) => "zero no hole stable",
        });
        self.inner.write_zeroes(at, len, mode, durability)
    }

    fn locate(&self, at: u64, len: u64) -> Io<'_, Option<Vec<Piece>>> {
        // What cannot be read cannot be sent from where it lies, either.
        if self.is_broken(at, len) {
            return Box::pin(async { Ok(None) });
        }
        self.inner.locate(at, len)
    }

    fn extents(&self, at: u64, len: u64) -> Io<'_, Vec<Extent>> {
        self.asked.lock().push("extents");
        self.inner.extents(at, len)
    }

    fn blank(&self, at: u64, len: u64) -> Vec<Range<u64>> {
        let clipped = |range: &Range<u64>| range.start.max(at)..range.end.min(at + len);
        self.pretence.lock().blank.iter().map(clipped).filter(|range| !range.is_empty()).collect()
    }

    fn prefetch(&self, at: u64, len: u64) -> Io<'_, ()> {
        self.asked.lock().push("prefetch");
        self.inner.prefetch(at, len)
    }

    fn zeroes_fast(&self, mode: ZeroMode) -> bool {
        !self.pretence.lock().slow_zeroes && self.inner.zeroes_fast(mode)
    }

    fn is_rotational(&self) -> bool {
        self.pretence.lock().rotational
    }
}
