//! Connections of one client that asks again elsewhere what one of them has not answered, and how a change that is asked
//! twice is kept from being made late.
//!
//! Such a client, the kernel's NBD driver, gives up a connection on which a request has grown too old: it shuts the
//! connection down, *then* asks the same on a sibling, and once it is answered there, it may have something newer written
//! in the same place. What it left behind on the first must not be made after that. There it is in one of three states:
//!
//! 1. not begun: it lies in the socket, or in our buffer. Before a change is begun, its connection is looked at; one that
//!    was shut down begins no more;
//! 2. in its place: the device makes changes that overlap in the order in which they were first polled (a volume by its
//!    range locks), whatever becomes of whoever asked. What is asked later on a sibling comes after it;
//! 3. between that look and that place. It takes microseconds; but a process may stand still in the midst of them (a
//!    stopped one, a paused machine), for longer than the client has patience, and when it goes on, the thread that serves
//!    the sibling may be first.
//!
//! Against the third, the look and the first poll are one turn, which its connection holds. Whoever is about to begin
//! changes looks at its siblings first: where one is in its turn and has been shut down, it waits until that turn is over.
//! Only then it takes its own turn, looks at itself, and begins. Let B begin what A has left behind. The client shut A
//! down before it asked B, so before B looked at A. Either B found A in its turn, and has waited until all that A began was
//! in its place; or A's turn was over, with the same effect; or A's turn came later, and then A's look at itself did too,
//! and A has begun nothing. (Two fences make "later" mean the same to both.)
//!
//! A sibling that was not shut down when B looked cannot be the one that left behind what B holds, so nobody waits for a
//! connection that lives. Nobody waits while in a turn: there is no circle. Waiting keeps a thread, for as long as the
//! other one needs to go on; nothing in a turn waits for a device.
//!
//! Not held: reads and flushes, which change nothing when they are late. Servers that follow each other: the members are
//! not open in two at a time.
//!
//! Cost of a batch of requests with a change among them: one system call, one lock that nobody else takes, three loads.
//! The call cannot be had for less. That the connection was shut down is to be known *within* the turn; a `recv` there gives
//! what was sent before the shutdown without a word of that, and what epoll tells comes by way of another thread, after the
//! client may have asked elsewhere. That nothing is old enough yet to be asked elsewhere could be had from a clock, but only
//! by what one version of one client does: it gives up the young requests of a connection together with an old one.

use arc_swap::ArcSwap;
use parking_lot::{Mutex, MutexGuard};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{Shutdown, shutdown};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// The connections of one client.
#[derive(Debug, Default)]
pub struct Siblings {
    lines: ArcSwap<Vec<Arc<Shared>>>,
}

/// What siblings know of a connection.
#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    turn: Mutex<()>,
}

impl Shared {
    /// Whether the client takes and sends nothing any more, whatever it sent before.
    fn is_hung_up(&self) -> bool {
        let mut asked = [PollFd::new(&self.socket, PollFlags::empty())];
        let answered = poll(&mut asked, Some(&Timespec::default()));
        answered.is_ok() && asked[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

/// A connection among its siblings. Dropped when all that was begun on it has ended: then it is shut down, if it is not.
#[derive(Debug)]
pub struct Line {
    siblings: Arc<Siblings>,
    own: Arc<Shared>,
}

impl Siblings {
    /// One more connection; `socket` is another name of its socket.
    #[must_use]
    pub fn join(self: &Arc<Self>, socket: OwnedFd) -> Line {
        let own = Arc::new(Shared { socket, turn: Mutex::new(()) });
        self.change(|lines| lines.push(Arc::clone(&own)));
        Line { siblings: Arc::clone(self), own }
    }

    /// Whether there is a connection that the client has not hung up. A system call for each that it has.
    #[must_use]
    pub fn is_any_heard(&self) -> bool {
        self.lines.load().iter().any(|line| !line.is_hung_up())
    }

    fn change(&self, change: impl Fn(&mut Vec<Arc<Shared>>)) {
        self.lines.rcu(|lines| {
            let mut lines = Vec::clone(lines);
            change(&mut lines);
            lines
        });
    }
}

impl Line {
    /// Takes the turn, to begin changes that were received before; `None`: the client has hung up.
    fn admit(&self) -> Option<MutexGuard<'_, ()>> {
        fence(Ordering::SeqCst);
        for sibling in self.siblings.lines.load().iter().filter(|line| !Arc::ptr_eq(line, &self.own)) {
            if sibling.turn.is_locked() && sibling.is_hung_up() {
                drop(sibling.turn.lock());
            }
        }
        let turn = self.own.turn.lock();
        fence(Ordering::SeqCst);
        (!self.own.is_hung_up()).then_some(turn)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.siblings.change(|lines| lines.retain(|line| !Arc::ptr_eq(line, &self.own)));
        if let Err(errno) = shutdown(&self.own.socket, Shutdown::Both) {
            tracing::debug!("an NBD connection was not shut down: {errno}");
        }
    }
}

/// The turn of a connection for one batch of requests: taken for the first change among them, held to the end.
pub(super) struct Turn<'a> {
    line: Option<&'a Line>,
    held: Option<MutexGuard<'a, ()>>,
}

impl<'a> Turn<'a> {
    /// Without a line there is nobody to wait for.
    pub(super) fn of(line: Option<&'a Line>) -> Self {
        Self { line, held: None }
    }

    /// Whether its client asks elsewhere what is not answered here.
    pub(super) fn is_shared(&self) -> bool {
        self.line.is_some()
    }

    /// Whether a change may be begun.
    pub(super) fn take(&mut self) -> bool {
        let Some(line) = self.line.filter(|_| self.held.is_none()) else { return true };
        self.held = line.admit();
        self.held.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::time::Duration;

    fn line(siblings: &Arc<Siblings>) -> (Line, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (siblings.join(ours.into()), theirs)
    }

    /// A turn that another thread asks for: told when it has it.
    fn asked_for(line: Line) -> mpsc::Receiver<bool> {
        let (told, tells) = mpsc::channel();
        std::thread::spawn(move || told.send(Turn::of(Some(&line)).take()).unwrap());
        tells
    }

    #[test]
    fn who_was_left_behind_in_its_turn_is_waited_for() {
        let siblings = Arc::<Siblings>::default();
        let ((a, client), (b, _theirs)) = (line(&siblings), line(&siblings));
        let mut turn = Turn::of(Some(&a));
        assert!(turn.take());
        // Nobody waits for one that lives.
        let (c, _other) = line(&siblings);
        assert_eq!(asked_for(c).recv_timeout(Duration::from_secs(30)), Ok(true));
        client.shutdown(std::net::Shutdown::Both).unwrap();
        let tells = asked_for(b);
        assert!(tells.recv_timeout(Duration::from_millis(200)).is_err(), "the sibling went past it");
        assert!(turn.take(), "it is one turn");
        drop(turn);
        assert_eq!(tells.recv_timeout(Duration::from_secs(30)), Ok(true));
        // And it has no other.
        assert!(!Turn::of(Some(&a)).take());
    }

    #[test]
    fn two_that_were_left_behind_do_not_wait_for_each_other() {
        let siblings = Arc::<Siblings>::default();
        let ((a, first), (b, second)) = (line(&siblings), line(&siblings));
        let mut turn = Turn::of(Some(&a));
        assert!(turn.take());
        for client in [&first, &second] {
            client.shutdown(std::net::Shutdown::Both).unwrap();
        }
        assert!(!siblings.is_any_heard());
        let tells = asked_for(b);
        drop(turn);
        assert_eq!(tells.recv_timeout(Duration::from_secs(30)), Ok(false));
    }

    #[test]
    fn a_connection_that_has_ended_is_shut_down_and_forgotten() {
        use std::io::Read;
        let siblings = Arc::<Siblings>::default();
        let (a, mut client) = line(&siblings);
        assert_eq!(siblings.lines.load().len(), 1);
        assert!(siblings.is_any_heard());
        drop(a);
        assert_eq!(siblings.lines.load().len(), 0);
        assert!(!siblings.is_any_heard());
        assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    }
}
