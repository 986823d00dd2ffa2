//! The latest lines of the audit log, for those who ask what happened.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::caller::Viewer;
use crate::api::server::is_wanted;
use crate::api::service::EventFilter;

/// Lines that are kept.
const KEPT: usize = 4096;

/// The latest lines, oldest first.
#[derive(Debug, Default)]
pub struct Recent(Mutex<VecDeque<Arc<str>>>);

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
            .filter(|line| is_wanted(line, viewer, filter))
            .take(filter.limit)
            .cloned()
            .collect();
        chosen.reverse();
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_finds_what_is_its_own() {
        let recent = Recent::default();
        for uid in [1000, 2000] {
            let identity = format!("spiffe://example.org/user/{uid}/agent");
            let line = serde_json::json!({
                "kind": "verdict", "verdict": "deny",
                "workload": {"name": "agent", "identity": identity},
            });
            recent.keep(line.to_string().into());
        }
        let filter = EventFilter { denied: true, workload: Some("agent".to_owned()), limit: 9 };
        let own = recent.select(&Viewer::own("example.org", 1000), &filter);
        assert_eq!(own.len(), 1);
        assert!(own[0].contains("/user/1000/"));
        assert_eq!(recent.select(&Viewer::Everything, &filter).len(), 2);
    }
}
