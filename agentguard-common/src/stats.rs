//! Counters of verdicts, one row for each workload identity, per CPU.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::event::Hook;
use crate::{Mode, Verdict};

/// Verdict cells in a row: every hook, verdict and mode has its own.
pub const CELLS: usize = Hook::SLOTS * Verdict::CODES * Mode::ALL.len();

/// The row for identities that have none of their own.
pub const OTHER: u16 = 0;

/// A row of counters. In every row `decided() = logged + aggregated + lost`, exactly.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct Counters {
    /// Verdicts, at [`Counters::cell`].
    pub verdicts: [u64; CELLS],
    /// Verdicts written to a ring buffer as records of their own.
    pub logged: u64,
    /// Verdicts folded into an earlier record of the same request.
    pub aggregated: u64,
    /// Verdicts whose record found no room in the ring buffer.
    pub lost: u64,
}

impl Counters {
    pub const ZERO: Self = Self { verdicts: [0; CELLS], logged: 0, aggregated: 0, lost: 0 };

    /// Where verdicts of this kind are counted; always below [`CELLS`].
    #[inline(always)]
    #[must_use]
    pub const fn cell(hook: Hook, mode: Mode, verdict: Verdict) -> usize {
        Self::cell_of(hook, mode, verdict.code())
    }

    /// As [`Counters::cell`], for a verdict's code out of a table.
    #[inline(always)]
    #[must_use]
    pub const fn cell_of(hook: Hook, mode: Mode, code: u8) -> usize {
        ((hook as usize) * Mode::ALL.len() + mode as usize) * Verdict::CODES
            + (code as usize) % Verdict::CODES
    }

    /// All verdicts.
    #[must_use]
    pub fn decided(&self) -> u64 {
        self.verdicts.iter().sum()
    }

    /// Whether `decided = logged + aggregated + lost`: not, when the row was copied while a verdict was
    /// being counted in it.
    #[must_use]
    pub fn reconciles(&self) -> bool {
        self.decided() == self.logged + self.aggregated + self.lost
    }

    /// Adds another CPU's row.
    pub fn add(&mut self, other: &Self) {
        let Self { verdicts, logged, aggregated, lost } = other;
        for (sum, more) in self.verdicts.iter_mut().zip(verdicts) {
            *sum += more;
        }
        self.logged += logged;
        self.aggregated += aggregated;
        self.lost += lost;
    }

    /// Every cell that is not zero, with what it counts.
    pub fn iter(&self) -> impl Iterator<Item = (Hook, Mode, Verdict, u64)> + '_ {
        Hook::ALL.into_iter().flat_map(move |hook| {
            Mode::ALL.into_iter().flat_map(move |mode| {
                (0..Verdict::CODES as u8).filter_map(move |code| {
                    let verdict = Verdict::try_from(code).ok()?;
                    let count = self.verdicts[Self::cell(hook, mode, verdict)];
                    (count > 0).then_some((hook, mode, verdict, count))
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_in_which_a_verdict_is_half_counted_does_not_reconcile() {
        let mut counters = Counters::ZERO;
        counters.verdicts[1] += 2;
        counters.logged += 1;
        assert!(!counters.reconciles());
        counters.lost += 1;
        assert!(counters.reconciles());
        counters.aggregated += 1;
        assert!(!counters.reconciles());
    }

    #[test]
    fn every_verdict_has_a_cell_of_its_own() {
        let mut counters = Counters::ZERO;
        let mut cells = 0;
        for hook in Hook::ALL {
            for mode in Mode::ALL {
                for code in 0..Verdict::CODES as u8 {
                    let Ok(verdict) = Verdict::try_from(code) else { continue };
                    counters.verdicts[Counters::cell(hook, mode, verdict)] += 1;
                    cells += 1;
                }
            }
        }
        assert_eq!(counters.iter().filter(|(.., count)| *count == 1).count(), cells);
    }
}
