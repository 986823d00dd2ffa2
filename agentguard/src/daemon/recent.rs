//! The latest lines of the audit log, for those who ask what happened.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

use crate::api::caller::Viewer;
use crate::api::service::EventFilter;

/// Lines that are kept.
const KEPT: usize = 4096;

/// The latest lines, oldest first.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<Arc<str>>>);

/// What of a line is needed to choose it.
#[derive(Deserialize)]
struct Seen<'a> {
    identity: Option<String>,
    verdict: Option<&'a str>,
    workload: Option<SeenWorkload>,
}

#[derive(Deserialize)]
struct SeenWorkload {
    name: String,
}

impl Recent {
    pub fn keep(&self, line: Arc<str>) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == KEPT {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// The latest lines that `viewer` may see and `filter` wants, oldest first.
    #[must_use]
    pub fn select(&self, viewer: &Viewer, filter: &EventFilter) -> Vec<Arc<str>> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut chosen: Vec<Arc<str>> = lines
            .iter()
            .rev()
            .filter(|line| {
                serde_json::from_str::<Seen<'_>>(line).is_ok_and(|seen| {
                    let name = seen.workload.map(|workload| workload.name);
                    viewer.sees(seen.identity.as_deref())
                        && (!filter.denied || seen.verdict == Some("deny"))
                        && filter.workload.as_ref().is_none_or(|wanted| {
                            name.as_ref() == Some(wanted) || seen.identity.as_ref() == Some(wanted)
                        })
                })
            })
            .take(filter.limit)
            .cloned()
            .collect();
        chosen.reverse();
        chosen
    }
}
