//! Which generations of the array a member took part in: how members that ran apart are told from members that are
//! merely behind. Pure.
//!
//! A generation begins whenever it changes who takes part. It is written to every member of it, then confirmed. Two
//! members whose last confirmed generations lie in one line belong together; each having one that the other lacks, the
//! array ran in two halves.

/// Generations a history keeps.
pub const MOST_GENERATIONS: usize = 64;

/// A stretch of the array's life between two changes of who takes part in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation {
    /// Random, so that two that began apart never have the same.
    pub id: u64,
    /// The superblock's event count when it began.
    pub events: u64,
}

/// The latest generations a member took part in, oldest first.
///
/// Invariants: at most [`MOST_GENERATIONS`]; an empty history is not confirmed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    generations: Vec<Generation>,
    confirmed: bool,
}

/// How a history stands to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// Both came equally far.
    Same,
    /// The other went on from where this one stopped.
    Ancestor,
    /// This one went on from where the other stopped.
    Descendant,
    /// Each went on without the other: the array ran in two halves.
    Diverged,
    /// Nothing can be said: one has no confirmed generation, or is so far behind that the other has forgotten.
    Unknown,
}

impl History {
    /// Its generations, oldest first; the last may be unconfirmed.
    #[must_use]
    pub fn generations(&self) -> &[Generation] {
        &self.generations
    }

    /// Whether the last generation stands on every member that takes part in it.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        self.confirmed
    }

    /// Begins a generation. One that was not confirmed here stays: another member may hold it confirmed, and whoever
    /// goes on without that member has still seen all that was acknowledged.
    pub fn begin(&mut self, id: u64, events: u64) {
        self.generations.push(Generation { id, events });
        if self.generations.len() > MOST_GENERATIONS {
            self.generations.remove(0);
        }
        self.confirmed = false;
    }

    /// Confirms the last generation.
    pub fn confirm(&mut self) {
        self.confirmed = !self.generations.is_empty();
    }

    /// The last confirmed generation.
    #[must_use]
    pub fn last_confirmed(&self) -> Option<Generation> {
        self.confirmed_ones().last().copied()
    }

    /// Whether a generation is among the confirmed ones.
    #[must_use]
    pub fn contains(&self, id: u64) -> bool {
        self.confirmed_ones().iter().any(|one| one.id == id)
    }

    /// How this history stands to another. Only confirmed generations count: one that was about to begin when the power
    /// went has seen no acknowledged write, so it can't set two members apart.
    #[must_use]
    pub fn relation(&self, other: &Self) -> Relation {
        let (Some(mine), Some(theirs)) = (self.last_confirmed(), other.last_confirmed()) else {
            return Relation::Unknown;
        };
        if mine.id == theirs.id {
            return Relation::Same;
        }
        match (other.contains(mine.id), self.contains(theirs.id)) {
            (true, false) => Relation::Ancestor,
            (false, true) => Relation::Descendant,
            (false, false) if other.may_have_forgotten(mine) || self.may_have_forgotten(theirs) => {
                Relation::Unknown
            }
            // Either neither is known to the other, or each stands before the other: no array lives so.
            (false, false) | (true, true) => Relation::Diverged,
        }
    }

    fn confirmed_ones(&self) -> &[Generation] {
        match self.generations.split_last() {
            Some((_, before)) if !self.confirmed => before,
            _ => &self.generations,
        }
    }

    /// Whether a generation began before all that are kept, and others may have been dropped.
    fn may_have_forgotten(&self, one: Generation) -> bool {
        self.generations.len() == MOST_GENERATIONS && one.events < self.generations[0].events
    }

    /// A history as it was recorded; `None` if none can be so.
    pub(super) fn from_parts(generations: Vec<Generation>, confirmed: bool) -> Option<Self> {
        let possible = generations.len() <= MOST_GENERATIONS && !(confirmed && generations.is_empty());
        possible.then_some(Self { generations, confirmed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A history that is confirmed but for generations of negative id.
    fn history(ids: &[i64]) -> History {
        let mut history = History::default();
        for (at, &id) in ids.iter().enumerate() {
            history.begin(id.unsigned_abs(), at as u64 * 10);
            if id > 0 {
                history.confirm();
            }
        }
        history
    }

    #[test]
    fn histories_are_related_by_what_is_confirmed() {
        let relation = |mine: &[i64], theirs: &[i64]| history(mine).relation(&history(theirs));
        for (mine, theirs, wanted) in [
            (&[1, 2][..], &[1, 2][..], Relation::Same),
            (&[1], &[1, 2], Relation::Ancestor),
            (&[1], &[1, 2, 3], Relation::Ancestor),
            (&[1, 2, 3], &[1], Relation::Descendant),
            (&[1, 2], &[1, 3], Relation::Diverged),
            (&[1, 2, 4], &[1, 3], Relation::Diverged),
            (&[1], &[2], Relation::Diverged),
            (&[1, 2], &[2, 1], Relation::Diverged),
            (&[], &[1], Relation::Unknown),
            (&[1], &[], Relation::Unknown),
            (&[], &[], Relation::Unknown),
            // Unconfirmed ones: each is as if it were not there.
            (&[-1], &[1], Relation::Unknown),
            (&[-1], &[-1], Relation::Unknown),
            (&[1, -2], &[1], Relation::Same),
            (&[1, -2], &[1, -3], Relation::Same),
            (&[1, -2], &[1, 3], Relation::Ancestor),
            (&[1, 3], &[1, -2], Relation::Descendant),
            (&[1, 2], &[1, -2], Relation::Descendant),
            (&[1, 2, -3], &[1, 2, 4, 5], Relation::Ancestor),
            (&[1, 2, -5], &[1, 3, -5], Relation::Diverged),
        ] {
            assert_eq!(relation(mine, theirs), wanted, "{mine:?} to {theirs:?}");
        }
    }

    #[test]
    fn an_unconfirmed_generation_stays_in_line() {
        let mut mine = history(&[1, -2]);
        mine.begin(3, 50);
        mine.confirm();
        assert!(mine.contains(2));
        assert_eq!(history(&[1, 2]).relation(&mine), Relation::Ancestor);
    }

    #[test]
    fn what_a_full_history_forgot_it_does_not_judge() {
        let long: Vec<i64> = (1..=100).collect();
        let full = history(&long);
        assert_eq!(full.generations().len(), 64);
        assert_eq!(full.generations()[0], Generation { id: 37, events: 360 });
        assert_eq!(full.relation(&history(&long[..37])), Relation::Descendant);
        assert_eq!(full.relation(&history(&long[..36])), Relation::Unknown, "an ancestor, long ago");
        assert_eq!(history(&long[..36]).relation(&full), Relation::Unknown);
        assert_eq!(full.relation(&history(&long[..63])), Relation::Descendant);
        let fork: Vec<i64> = long[..50].iter().copied().chain([1000]).collect();
        assert_eq!(full.relation(&history(&fork)), Relation::Diverged);
        assert_eq!(history(&fork).relation(&full), Relation::Diverged);
        assert_eq!(
            history(&long[..63]).relation(&history(&[1000])),
            Relation::Diverged,
            "nothing was dropped"
        );
        let waiting: Vec<i64> = long.iter().copied().chain([-101]).collect();
        assert_eq!(history(&waiting).generations().len(), 64);
        assert_eq!(history(&waiting).relation(&full), Relation::Same);
    }

    proptest! {
        #[test]
        fn relations_seen_from_both_sides_agree(
            mine in prop::collection::vec(-6..6i64, 0..6),
            theirs in prop::collection::vec(-6..6i64, 0..6),
        ) {
            let (mine, theirs) = (history(&mine), history(&theirs));
            let opposite = match theirs.relation(&mine) {
                Relation::Ancestor => Relation::Descendant,
                Relation::Descendant => Relation::Ancestor,
                same => same,
            };
            prop_assert_eq!(mine.relation(&theirs), opposite);
        }
    }
}
