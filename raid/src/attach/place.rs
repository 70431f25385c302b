//! Where the file or disk of a volume stands, while there is one: the state that everybody looks at.
//!
//! To make it or to take it away is a call to the kernel, and that may take for as long as some disk hangs: the kernel's NBD
//! driver carries out one order at a time for the whole machine, and each waits for what is under way on its disk. So
//! whoever changes what stands here takes it out ([`Place::begin`]), works with it and no lock, and puts back what there is
//! then ([`Change::settle`]).
//!
//! Invariants: a lock is held for no longer than it takes to look or to swap. One change at a time; a second one is
//! refused, not held up. From [`Place::close`] on nothing is put here: who comes with something is given it back, to
//! undo it. A change that is dropped, because its thread died, leaves nothing here.

use super::Shown;
use std::time::Duration;
use tokio::sync::watch;

/// A place for one thing.
#[derive(Debug)]
pub(super) struct Place<T> {
    state: watch::Sender<State<T>>,
}

/// What is there.
#[derive(Debug)]
pub(super) enum State<T> {
    /// Nothing.
    Empty,
    /// This.
    Holds(T),
    /// It is being changed.
    Changing(Changing),
    /// Nothing any more.
    Closed,
}

/// A change, as others see it.
#[derive(Debug)]
pub(super) struct Changing {
    /// What stood here when it began.
    pub(super) shown: Option<Shown>,
    /// Told when the place is closed meanwhile.
    leaving: watch::Sender<bool>,
}

/// How a change begins.
#[derive(Debug)]
pub(super) enum Begun<'a, T> {
    /// With what stood here.
    Change(Change<'a, T>, Option<T>),
    /// Not: somebody else's is under way.
    Busy,
    /// Not: the place is closed.
    Closed,
}

/// A change under way.
#[derive(Debug)]
pub(super) struct Change<'a, T> {
    place: &'a Place<T>,
    leaving: watch::Sender<bool>,
    settled: bool,
}

impl<T> Place<T> {
    /// An empty one.
    pub(super) fn new() -> Self {
        Self { state: watch::Sender::new(State::Empty) }
    }

    /// Looks at what is there.
    pub(super) fn look<R>(&self, at: impl FnOnce(&State<T>) -> R) -> R {
        at(&self.state.borrow())
    }

    /// Takes out what is there, to change it; `shown` is what others see meanwhile.
    pub(super) fn begin(&self, shown: impl FnOnce(&T) -> Option<Shown>) -> Begun<'_, T> {
        let mut begun = Begun::Busy;
        self.state.send_modify(|state| {
            let (shown, was) = match std::mem::replace(state, State::Empty) {
                kept @ (State::Changing(_) | State::Closed) => {
                    if matches!(kept, State::Closed) {
                        begun = Begun::Closed;
                    }
                    *state = kept;
                    return;
                }
                State::Empty => (None, None),
                State::Holds(thing) => (shown(&thing), Some(thing)),
            };
            let leaving = watch::Sender::new(false);
            *state = State::Changing(Changing { shown, leaving: leaving.clone() });
            begun = Begun::Change(Change { place: self, leaving, settled: false }, was);
        });
        begun
    }

    /// Closes the place if it is empty, or holds what `stands` says no of; whether it is closed now.
    pub(super) fn close_empty(&self, stands: impl FnOnce(&T) -> bool) -> bool {
        let mut closed = true;
        self.state.send_modify(|state| match state {
            State::Holds(thing) if stands(thing) => closed = false,
            State::Changing(_) => closed = false,
            _ => *state = State::Closed,
        });
        closed
    }

    /// Closes the place and gives what is there. A change under way is told, and waited for so long; in the end it keeps
    /// what it has, whenever that is.
    pub(super) async fn close(&self, patience: Duration) -> Option<T> {
        let mut was = State::Closed;
        self.state.send_modify(|state| match state {
            State::Changing(changing) => {
                changing.leaving.send_replace(true);
            }
            _ => std::mem::swap(state, &mut was),
        });
        let mut state = self.state.subscribe();
        let settled = state.wait_for(|state| !matches!(state, State::Changing(_)));
        if tokio::time::timeout(patience, settled).await.is_err() {
            tracing::warn!("the kernel has not answered yet what it was asked of the attached disk");
        }
        match was {
            State::Holds(thing) => Some(thing),
            _ => None,
        }
    }
}

impl<T> Change<'_, T> {
    /// Told `true` when the place is closed before this has settled.
    pub(super) fn leaving(&self) -> &watch::Sender<bool> {
        &self.leaving
    }

    /// Ends it with what there is now. Gives it back if the place has been closed, or is about to be.
    pub(super) fn settle(mut self, now: Option<T>) -> Option<T> {
        self.put(now)
    }

    fn put(&mut self, now: Option<T>) -> Option<T> {
        self.settled = true;
        let mut back = None;
        self.place.state.send_modify(|state| {
            if *self.leaving.borrow() {
                (*state, back) = (State::Closed, now);
            } else {
                *state = now.map_or(State::Empty, State::Holds);
            }
        });
        back
    }
}

impl<T> Drop for Change<'_, T> {
    fn drop(&mut self) {
        if !self.settled {
            self.put(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(nbd: u32) -> Shown {
        Shown { path: "/dev/x".into(), nbd: Some(nbd), read_only: false, warnings: Vec::new() }
    }

    fn begin(place: &Place<u32>) -> (Change<'_, u32>, Option<u32>) {
        match place.begin(|number| Some(shown(*number))) {
            Begun::Change(change, was) => (change, was),
            other => panic!("{other:?}"),
        }
    }

    /// What a look finds: the number, and whether it is being changed.
    fn found(place: &Place<u32>) -> Option<(u32, bool)> {
        place.look(|state| match state {
            State::Holds(number) => Some((*number, false)),
            State::Changing(changing) => Some((changing.shown.as_ref()?.nbd?, true)),
            State::Empty | State::Closed => None,
        })
    }

    #[test]
    fn who_looks_is_not_held_up_by_who_changes() {
        let place = Place::new();
        let (change, was) = begin(&place);
        assert_eq!((was, found(&place)), (None, None));
        assert!(matches!(place.begin(|_| None), Begun::Busy), "a second one is refused");
        assert!(!place.close_empty(|_| false), "what may come is not shut out");
        assert_eq!(change.settle(Some(7)), None);
        assert_eq!(found(&place), Some((7, false)));
        // On its way out it is still seen.
        let (change, was) = begin(&place);
        assert_eq!((was, found(&place)), (Some(7), Some((7, true))));
        assert_eq!(change.settle(None), None);
        assert_eq!(found(&place), None);
    }

    #[test]
    fn only_an_empty_place_is_closed_for_the_asking() {
        let place = Place::new();
        assert_eq!(begin(&place).0.settle(Some(1)), None);
        assert!(!place.close_empty(|_| true));
        assert_eq!(found(&place), Some((1, false)));
        assert!(place.close_empty(|_| false), "what has gone by itself is in nobody's way");
        assert!(matches!(place.begin(|_| None), Begun::Closed));
    }

    #[tokio::test]
    async fn what_comes_after_the_end_is_its_makers_to_undo() {
        // Settled in time: nothing is put, and nothing is there.
        let place = Place::new();
        let (change, _) = begin(&place);
        let mut told = change.leaving().subscribe();
        let maker = async {
            told.wait_for(|leaving| *leaving).await.unwrap();
            change.settle(Some(1))
        };
        assert_eq!(tokio::join!(place.close(Duration::from_secs(60)), maker), (None, Some(1)));
        assert!(matches!(place.begin(|_| None), Begun::Closed));
        // Later than anybody waits.
        let place = Place::new();
        let (change, _) = begin(&place);
        assert_eq!(place.close(Duration::from_millis(1)).await, None);
        assert_eq!(change.settle(Some(2)), Some(2));
        assert!(matches!(place.begin(|_| None), Begun::Closed));
        // Without a change, what stands there is given at once.
        let place = Place::new();
        assert_eq!(begin(&place).0.settle(Some(3)), None);
        assert_eq!(place.close(Duration::ZERO).await, Some(3));
        assert!(matches!(place.begin(|_| None), Begun::Closed));
    }

    #[test]
    fn a_change_whose_thread_dies_leaves_an_empty_place() {
        let place = Place::new();
        assert_eq!(begin(&place).0.settle(Some(1)), None);
        drop(begin(&place).0);
        assert_eq!(found(&place), None);
        assert_eq!(begin(&place).1, None);
    }
}
