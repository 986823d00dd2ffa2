//! Counters of verdicts, one row for each workload identity, per CPU.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::event::Hook;
use crate::{Mode, Verdict};

/// Cells in a row: every hook, verdict, mode and fate has its own.
pub const CELLS: usize = Verdict::CODES * Hook::ALL.len() * Mode::ALL.len() * Fate::ALL.len();

/// The row for identities that have none of their own.
pub const OTHER: u16 = 0;

/// What became of the record of a verdict.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Written to a ring buffer, as a record of its own.
    Logged = 0,
    /// Folded into an earlier record of the same request.
    Aggregated = 1,
    /// Found no room in the ring buffer.
    Lost = 2,
}

impl Fate {
    pub const ALL: [Self; 3] = [Self::Logged, Self::Aggregated, Self::Lost];

    /// The word used in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Logged => "logged",
            Self::Aggregated => "aggregated",
            Self::Lost => "lost",
        }
    }
}

/// A row of counters.
///
/// A verdict is counted by one addition to one cell, which says of it all that is counted. So
/// `decided = logged + aggregated + lost` holds whenever the row is looked at, also while it is copied
/// from a processor that counts in it, and while a program is interrupted.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct Counters {
    /// Verdicts, at [`Counters::cell`].
    pub cells: [u64; CELLS],
}

impl Counters {
    pub const ZERO: Self = Self { cells: [0; CELLS] };

    /// Where verdicts of this kind are counted; always below [`CELLS`].
    #[must_use]
    pub const fn cell(hook: Hook, mode: Mode, verdict: Verdict, fate: Fate) -> usize {
        Self::cell_of(hook, mode, verdict.code(), fate)
    }

    /// As [`Counters::cell`], for a verdict's code out of a table. A code that names no verdict is
    /// counted nowhere: it has its place behind the row.
    #[inline(always)]
    #[must_use]
    pub const fn cell_of(hook: Hook, mode: Mode, code: u8, fate: Fate) -> usize {
        let of_hook = code as usize * Hook::ALL.len() + hook as usize;
        (of_hook * Mode::ALL.len() + mode as usize) * Fate::ALL.len() + fate as usize
    }

    /// What is counted in a cell: the inverse of [`Counters::cell`].
    #[must_use]
    pub fn counted_in(cell: usize) -> Option<(Hook, Mode, Verdict, Fate)> {
        let (rest, fate) = (cell / Fate::ALL.len(), Fate::ALL[cell % Fate::ALL.len()]);
        let (rest, mode) = (rest / Mode::ALL.len(), Mode::ALL[rest % Mode::ALL.len()]);
        let (code, hook) = (rest / Hook::ALL.len(), Hook::ALL[rest % Hook::ALL.len()]);
        let verdict = Verdict::try_from(u8::try_from(code).ok()?).ok()?;
        Some((hook, mode, verdict, fate))
    }

    /// All verdicts.
    #[must_use]
    pub fn decided(&self) -> u64 {
        self.cells.iter().sum()
    }

    /// Verdicts whose records had this fate.
    #[must_use]
    pub fn of(&self, fate: Fate) -> u64 {
        self.cells.iter().skip(fate as usize).step_by(Fate::ALL.len()).sum()
    }

    /// Adds another CPU's row.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.cells.iter_mut().zip(&other.cells) {
            *sum += more;
        }
    }

    /// Every kind of verdict that was given, with how often, whatever became of its records.
    pub fn iter(&self) -> impl Iterator<Item = (Hook, Mode, Verdict, u64)> + '_ {
        let kinds = self.cells.chunks_exact(Fate::ALL.len()).enumerate();
        kinds.filter_map(|(kind, fates)| {
            let count = fates.iter().sum();
            let (hook, mode, verdict, _fate) = Self::counted_in(kind * Fate::ALL.len())?;
            (count > 0).then_some((hook, mode, verdict, count))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verdict_has_a_cell_of_its_own_for_each_fate() {
        let mut counters = Counters::ZERO;
        for (cell, count) in counters.cells.iter_mut().enumerate() {
            let (hook, mode, verdict, fate) = Counters::counted_in(cell).unwrap();
            assert_eq!(Counters::cell(hook, mode, verdict, fate), cell);
            *count = cell as u64;
        }
        assert_eq!(Counters::counted_in(CELLS), None);
        assert!(
            Counters::cell_of(Hook::Connect4, Mode::Audit, Verdict::CODES as u8, Fate::Logged)
                >= CELLS
        );
        let fates = Fate::ALL.map(|fate| counters.of(fate));
        let kinds = (CELLS / Fate::ALL.len()) as u64;
        assert_eq!(fates[1] - fates[0], kinds);
        assert_eq!(fates[2] - fates[1], kinds);
        assert_eq!(fates.iter().sum::<u64>(), counters.decided());
        assert_eq!(counters.iter().map(|kind| kind.3).sum::<u64>(), counters.decided());
        assert_eq!(counters.iter().count() as u64, kinds);
        let mut twice = counters;
        twice.add(&counters);
        assert_eq!(twice.decided(), 2 * counters.decided());
    }
}
