//! Records that found no room in the kernel's rings, as far as the log says that they are missing.
//!
//! The kernel half counts them, row by row; this remembers how many of each row the log has told of, over
//! restarts too: what was lost while no daemon ran is told by the next one. A daemon that dies between
//! telling and saving tells it again: rather twice than never.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::audit::record::{LossCause, LossRecord};

/// What has been told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Losses {
    /// By row of counters; only what is not zero.
    told: BTreeMap<u16, u64>,
    /// When the rows were last looked at.
    looked: Option<Timestamp>,
}

impl Losses {
    /// What the log has to say of `rows`, the kernel's totals of lost records by row of counters.
    #[must_use]
    pub fn look(
        &mut self,
        rows: impl IntoIterator<Item = (u16, u64)>,
        now: Timestamp,
    ) -> Option<LossRecord> {
        let mut lost = 0;
        for (row, total) in rows {
            let told = self.told.get(&row).copied().unwrap_or(0);
            // A total that fell was begun anew.
            lost += total.checked_sub(told).unwrap_or(total);
            if total > 0 {
                self.told.insert(row, total);
            } else {
                self.told.remove(&row);
            }
        }
        let since = self.looked.replace(now).unwrap_or(now);
        (lost > 0).then_some(LossRecord {
            cause: LossCause::RingBuffer,
            allowed: 0,
            denied: 0,
            other: lost,
            since,
            until: now,
            error: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn each_loss_is_told_once_over_restarts_and_rows_that_begin_anew() {
        let mut losses = Losses::default();
        assert_eq!(losses.look([(0, 0), (1, 0)], at(1)), None);
        let told = losses.look([(0, 2), (1, 3)], at(5)).unwrap();
        assert_eq!((told.other, told.since, told.until), (5, at(1), at(5)));
        assert_eq!(losses.look([(0, 2), (1, 3)], at(6)), None);
        let saved = serde_json::to_string(&losses).unwrap();
        let mut losses: Losses = serde_json::from_str(&saved).unwrap();
        let told = losses.look([(0, 2), (1, 7)], at(9)).unwrap();
        assert_eq!((told.other, told.since), (4, at(6)));
        assert_eq!(losses.look([(0, 0), (1, 6)], at(10)).unwrap().other, 6);
        assert_eq!(losses.look([(0, 1), (1, 6)], at(11)).unwrap().other, 1);
    }
}
