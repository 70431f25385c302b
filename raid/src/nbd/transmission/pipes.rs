//! Pages on their way from members to a socket without a copy: `splice` puts them in a pipe, and from there on the socket.
//!
//! Why not `sendfile`: a reply's header must not leave before its outcome is settled, and only a page that is in a pipe is
//! sure to come. What cannot be put there (a member was cut short, no pipe is left) is read and copied like anything else.
//!
//! Cost of a reply: a `write` for its header and one `splice` a piece to fill, one or more to send, nothing allocated once
//! the pipes are made. What waits in pipes is page cache, and counted as the request's memory like a copy would be.

use crate::device::Piece;
use parking_lot::Mutex;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use std::sync::Arc;

/// Bytes of a page. Each page in a pipe takes a slot, however much of it is meant.
const PAGE: u64 = 4096;

/// Pipes of one size.
#[derive(Debug)]
struct Size {
    slots: u64,
    /// How many there may be.
    most: usize,
}

/// Room for 64 KiB and a header.
const SMALL: Size = Size { slots: 32, most: 64 };
/// The most that any user may ask for.
const LARGE: Size = Size { slots: 256, most: 32 };
/// Below this, copying costs less.
const LEAST: u32 = 16 << 10;

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn new(slots: u64) -> Result<Self, Errno> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        fcntl_setpipe_size(&write, (slots * PAGE) as usize)?;
        Ok(Self { read, write })
    }

    /// Puts `head` and the pieces in, in this order; returns how many bytes that is. `None` if not all of it went in.
    fn fill(&self, head: &[u8], pieces: &[Piece]) -> Option<usize> {
        if !head.is_empty() && rustix::io::write(&self.write, head) != Ok(head.len()) {
            return None;
        }
        let mut filled = head.len();
        for piece in pieces {
            let (mut at, mut left) = (piece.at, piece.len);
            while left > 0 {
                // A pipe that is full, for whatever reason, says so and does not wait.
                let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
                match splice(&*piece.file, Some(&mut at), &self.write, None, left as usize, flags) {
                    Ok(0) => return None,
                    Ok(moved) => {
                        left -= moved as u64;
                        filled += moved;
                    }
                    Err(Errno::INTR) => {}
                    Err(_) => return None,
                }
            }
        }
        Some(filled)
    }
}

fn slots(piece: &Piece) -> u64 {
    (piece.at + piece.len).div_ceil(PAGE) - piece.at / PAGE
}

/// The pipes of one size: those at rest, and how many there are in all.
#[derive(Debug)]
struct Stock {
    size: Size,
    state: Mutex<(Vec<Pipe>, usize)>,
}

impl Stock {
    fn new(size: Size) -> Self {
        Self { size, state: Mutex::default() }
    }

    /// An empty pipe, unless too many are out.
    fn take(&self) -> Option<Pipe> {
        let mut state = self.state.lock();
        if let Some(pipe) = state.0.pop() {
            return Some(pipe);
        }
        if state.1 >= self.size.most {
            return None;
        }
        // No descriptors left, or the user's share of pipes is used up: others go on with what they have.
        let pipe = Pipe::new(self.size.slots).ok()?;
        state.1 += 1;
        Some(pipe)
    }
}

/// The pipes that all connections of a server share.
#[derive(Debug)]
pub(super) struct Pipes {
    small: Stock,
    large: Stock,
}

impl Default for Pipes {
    fn default() -> Self {
        Self { small: Stock::new(SMALL), large: Stock::new(LARGE) }
    }
}

impl Pipes {
    /// Whether a read of so many bytes is worth it.
    pub(super) fn are_worth(len: u32) -> bool {
        len >= LEAST
    }

    /// Puts the pieces in a pipe, behind `head` if that finds room; returns what is to be sent of `head` beforehand. `None`
    /// where no pipe holds all of it, or a piece cannot be read: then it is for a read to say why.
    pub(super) fn fill<'a>(
        self: &Arc<Self>,
        head: &'a [u8],
        pieces: &[Piece],
    ) -> Option<(&'a [u8], Spliced)> {
        let slots: u64 = pieces.iter().map(slots).sum();
        let size = if slots < SMALL.slots { SMALL } else { LARGE };
        let (before, within) = if slots < size.slots { (&[][..], head) } else { (head, &[][..]) };
        if slots > size.slots {
            return None;
        }
        let large = size.slots == LARGE.slots;
        let pipe = self.stock(large).take()?;
        let filled = pipe.fill(within, pieces);
        let all = within.len() as u64 + pieces.iter().map(|piece| piece.len).sum::<u64>();
        // A pipe that is not wholly understood is not used again.
        let left = filled.unwrap_or(usize::MAX);
        let spliced = Spliced { pipe: Some(pipe), left, large, home: Arc::clone(self) };
        (left as u64 == all).then_some((before, spliced))
    }

    fn stock(&self, large: bool) -> &Stock {
        if large { &self.large } else { &self.small }
    }
}

/// Bytes that wait in a pipe. Dropped before all have been sent, they are let go.
#[derive(Debug)]
pub(super) struct Spliced {
    /// `Some` until it is dropped.
    pipe: Option<Pipe>,
    left: usize,
    large: bool,
    home: Arc<Pipes>,
}

impl Spliced {
    /// Sends what `socket` takes now, if it is one that never waits. `more`: something follows at once.
    pub(super) fn send(&mut self, socket: impl AsFd, more: bool) -> Result<usize, Errno> {
        let Some(pipe) = &self.pipe else { return Ok(0) };
        let mut flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        flags.set(SpliceFlags::MORE, more);
        let sent = splice(&pipe.read, None, socket, None, self.left, flags)?;
        self.left -= sent;
        Ok(sent)
    }
}

impl Drop for Spliced {
    fn drop(&mut self) {
        let Some(pipe) = self.pipe.take() else { return };
        let mut state = self.home.stock(self.large).state.lock();
        if self.left == 0 {
            state.0.push(pipe);
        } else {
            // What is still in it goes with it.
            state.1 -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// A file of so many pages, no two bytes beside each other alike.
    fn file_of(pages: u64) -> (Arc<File>, Vec<u8>) {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..pages * PAGE).map(|at| (at ^ (at >> 8)) as u8).collect();
        file.write_all(&bytes).unwrap();
        (Arc::new(file), bytes)
    }

    fn piece(file: &Arc<File>, at: u64, len: u64) -> Piece {
        Piece::new(Arc::clone(file), at, len)
    }

    fn stocked(stock: &Stock) -> (usize, usize) {
        let state = stock.state.lock();
        (state.0.len(), state.1)
    }

    /// Sends all of it and returns what came out at the other end.
    fn sent(mut spliced: Spliced) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let receiving = std::thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).map(|_| all)
        });
        while spliced.left > 0 {
            // Here a thread of its own waits for it.
            match spliced.send(&ours, false) {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                sent => assert!(sent.unwrap() > 0),
            }
        }
        drop((spliced, ours));
        receiving.join().unwrap().unwrap()
    }

    #[test]
    fn pieces_arrive_in_order_behind_their_header() {
        let ((one, first), (two, second)) = (file_of(20), file_of(300));
        let pipes = Arc::new(Pipes::default());
        for (lens, large) in [([3000, 60_000], false), ([64 << 10, 64 << 10], true)] {
            let pieces = [piece(&one, 4096, lens[0]), piece(&two, 8192, lens[1])];
            let (before, spliced) = pipes.fill(b"head", &pieces).unwrap();
            assert!(before.is_empty() && spliced.large == large);
            let wanted =
                [&b"head"[..], &first[4096..][..lens[0] as usize], &second[8192..][..lens[1] as usize]];
            assert_eq!(sent(spliced), wanted.concat());
        }
        assert_eq!((stocked(&pipes.small), stocked(&pipes.large)), ((1, 1), (1, 1)));
    }

    #[test]
    fn a_header_that_finds_no_room_is_left_outside() {
        let (file, bytes) = file_of(300);
        let pipes = Arc::new(Pipes::default());
        let (before, spliced) = pipes.fill(b"head", &[piece(&file, 4096, 1 << 20)]).unwrap();
        assert_eq!(before, b"head");
        assert_eq!(sent(spliced), bytes[4096..][..1 << 20]);
        assert!(pipes.fill(b"head", &[piece(&file, 4095, 1 << 20)]).is_none(), "a page too many");
    }

    #[test]
    fn a_file_that_was_cut_short_is_for_a_read_to_tell_of() {
        let (file, _) = file_of(20);
        let pipes = Arc::new(Pipes::default());
        assert!(pipes.fill(b"head", &[piece(&file, 19 * PAGE, 2 * PAGE)]).is_none());
        // What had gone into the pipe went with it.
        assert_eq!(stocked(&pipes.small), (0, 0));
    }

    #[test]
    fn what_was_sent_in_part_leaves_nothing_behind() {
        let (file, bytes) = file_of(200);
        let pipes = Arc::new(Pipes::default());
        let filled = || pipes.fill(b"", &[piece(&file, 0, 200 * PAGE)]).unwrap().1;
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // A socket that nobody reads from takes a part at most.
        rustix::net::sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut spliced = filled();
        let part = spliced.send(&ours, false).unwrap();
        assert!(part < 200 * PAGE as usize, "{part}");
        drop(spliced);
        assert_eq!(stocked(&pipes.large), (0, 0));
        let mut came = vec![0; part];
        theirs.read_exact(&mut came).unwrap();
        assert_eq!(came, bytes[..part]);
        assert_eq!(sent(filled()), bytes);
    }

    #[test]
    fn pipes_run_out_and_come_back() {
        let (file, bytes) = file_of(16);
        let pipes = Arc::new(Pipes::default());
        let filled = || pipes.fill(b"", &[piece(&file, 0, 16 * PAGE)]).map(|(_, spliced)| spliced);
        let all: Vec<_> = std::iter::from_fn(filled).collect();
        assert_eq!(all.len(), SMALL.most);
        drop(all);
        assert_eq!(sent(filled().unwrap()), bytes);
    }
}
