//! Listens in on NBD sessions: a client connects to the recorder, which passes all bytes on to a server and back, and keeps
//! them. What is kept is cut at the end of the handshake, as seeds for fuzzers.

use crate::nbd_fuzz::circumstances;
use bytes::BytesMut;
use parking_lot::Mutex;
use raid::device::{FileDevice, OpenMode};
use raid::nbd::handshake::{Handshake, Progress};
use raid::nbd::{Export, Exports, Tls};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of one direction that are kept: seeds are small.
const KEPT: usize = 16 << 10;

/// One session: what either side has sent, from the start on.
#[derive(Debug, Default, Clone)]
pub struct Recorded {
    /// The client's bytes.
    pub client: Vec<u8>,
    /// The server's bytes.
    pub server: Vec<u8>,
}

/// The seeds that a session gives, each ready for its entry function.
#[derive(Debug)]
pub struct Seeds {
    /// For [`crate::nbd_fuzz::handshake`].
    pub handshake: Vec<u8>,
    /// For [`crate::nbd_fuzz::transmission`] and [`crate::nbd_fuzz::replies`]; `None` if it did not come to that.
    pub later: Option<(Vec<u8>, Vec<u8>)>,
}

/// A recorder at work, until the process ends.
#[derive(Debug, Clone)]
pub struct Recorder {
    server: PathBuf,
    sessions: Arc<Mutex<Vec<Arc<Mutex<Recorded>>>>>,
}

impl Recorder {
    /// For a server on a Unix socket.
    #[must_use]
    pub fn of(server: &Path) -> Self {
        Self { server: server.to_owned(), sessions: Arc::default() }
    }

    /// Takes clients on a Unix socket.
    pub fn listen(&self, path: &Path) {
        let listener = UnixListener::bind(path).expect("the address is free");
        let recorder = self.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let copy = client.try_clone().expect("a socket can be copied");
                recorder.pass(client, copy, |client| drop(client.shutdown(Shutdown::Write)));
            }
        });
    }

    /// Takes clients on a port of the loopback.
    pub fn listen_tcp(&self, port: u16) {
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
        let recorder = self.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let copy: TcpStream = client.try_clone().expect("a socket can be copied");
                recorder.pass(client, copy, |client| drop(client.shutdown(Shutdown::Write)));
            }
        });
    }

    /// What was recorded so far.
    #[must_use]
    pub fn sessions(&self) -> Vec<Recorded> {
        self.sessions.lock().iter().map(|session| session.lock().clone()).collect()
    }

    fn pass<R, W>(&self, mut from: R, mut to: W, end: fn(&W))
    where
        R: Read + Send + 'static,
        W: Write + Send + 'static,
    {
        let mut server = UnixStream::connect(&self.server).expect("the server listens");
        let mut answers = server.try_clone().expect("a socket can be copied");
        let session = Arc::new(Mutex::new(Recorded::default()));
        self.sessions.lock().push(Arc::clone(&session));
        let its = Arc::clone(&session);
        std::thread::spawn(move || {
            copy(&mut from, &mut server, |bytes| its.lock().client.extend_from_slice(bytes));
            drop(server.shutdown(Shutdown::Write));
        });
        std::thread::spawn(move || {
            copy(&mut answers, &mut to, |bytes| session.lock().server.extend_from_slice(bytes));
            end(&to);
        });
    }
}

/// Passes bytes on until either end is gone.
fn copy(from: &mut impl Read, to: &mut impl Write, mut keep: impl FnMut(&[u8])) {
    let mut bytes = [0; 8192];
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        keep(&bytes[..n]);
        if to.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
}

impl Recorded {
    /// Cuts the session at the end of its handshake; `image` is what the server served, as `vol`, without TLS.
    #[must_use]
    pub fn seeds(&self, image: &Path) -> Seeds {
        let file = FileDevice::open(image, OpenMode::ReadOnly).expect("it is served");
        let (name, description, read_only) = ("vol".to_owned(), "under test".to_owned(), false);
        let exports = Exports::single(Export { name, description, device: Arc::new(file), read_only });
        let (mut input, mut output) = (BytesMut::from(&self.client[..]), BytesMut::new());
        let progress = Handshake::start(exports, Tls::Off, &mut output).advance(&mut input, &mut output);
        let kept = |first: u8, bytes: &[u8]| {
            let mut seed = vec![first];
            seed.extend_from_slice(&bytes[..bytes.len().min(KEPT)]);
            seed
        };
        let handshake = kept(0, &self.client[..self.client.len() - input.len()]);
        let later = match progress {
            Ok(Progress::Chosen(session)) if !input.is_empty() => {
                let first = circumstances(session.style, session.allocation);
                // The server said the same as this handshake did.
                Some((kept(first, &input), kept(first, &self.server[output.len().min(self.server.len())..])))
            }
            _ => None,
        };
        Seeds { handshake, later }
    }
}
