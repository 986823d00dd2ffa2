//! Whether a kernel gives what its row promises.
//!
//! Its one job is to compare a promise with what `agentguard doctor` found by trying. It looks at no
//! version and no configuration of a kernel, and what `doctor` does not say counts as missing.

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::promise::Promise;

/// What stays open where a task can not be ended by another; of the sentence that `doctor` has.
const OTHERS_LIVE: &str = "but not ended before it runs on";

/// What a kernel was found to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// What `uname -r` says.
    pub(super) release: String,
    /// `full`, `partial` or `none`.
    pub(super) protection: String,
    pub(super) hooks: Vec<Hook>,
    pub(super) gaps: Vec<String>,
}

/// One hook that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    pub(super) layer: String,
    pub(super) name: String,
    pub(super) active: bool,
    /// Why not.
    pub(super) reason: String,
}

impl Found {
    /// Reads what `agentguard doctor --output json` wrote.
    pub(super) fn read(report: &str) -> Result<Self> {
        let report: Value =
            serde_json::from_str(report).context("`agentguard doctor` wrote no report")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let hook = |hook: &Value| Hook {
            layer: text(&hook["layer"]),
            name: text(&hook["hook"]),
            active: hook["state"] == "active",
            reason: text(&hook["reason"]),
        };
        Ok(Self {
            release: text(&report["kernel"]),
            protection: text(&report["protection"]["level"]),
            hooks: list(&report["protection"]["layers"]).iter().map(hook).collect(),
            gaps: list(&report["gaps"]).iter().map(text).collect(),
        })
    }

    /// The hooks of a layer: how many are active, and how many there are.
    pub(super) fn layer(&self, name: &str) -> (usize, usize) {
        let of_layer = || self.hooks.iter().filter(|hook| hook.layer == name);
        (of_layer().filter(|hook| hook.active).count(), of_layer().count())
    }

    /// Whether it gives this, wholly. What is of the machine and not of the kernel is for the tests to
    /// find.
    pub(super) fn gives(&self, promise: Promise) -> bool {
        match promise {
            Promise::Portable | Promise::Lsm => {
                let (active, all) = self.layer(promise.as_str());
                active > 0 && active == all
            }
            Promise::Systemd | Promise::Containers | Promise::Package => true,
            Promise::EndOthers => {
                !self.hooks.is_empty() && !self.gaps.iter().any(|gap| gap.contains(OTHERS_LIVE))
            }
        }
    }

    /// What is promised and missing, one sentence each.
    pub(super) fn missing(&self, promises: &[Promise]) -> Vec<String> {
        promises
            .iter()
            .filter(|promise| !self.gives(**promise))
            .map(|promise| {
                let because: Vec<_> = self
                    .hooks
                    .iter()
                    .filter(|hook| hook.layer == promise.as_str() && !hook.active)
                    .map(|hook| format!("{} ({})", hook.name, hook.reason))
                    .collect();
                let because = if because.is_empty() {
                    "`agentguard doctor` does not find it".to_owned()
                } else {
                    because.join(", ")
                };
                format!("promised and missing: {}: {because}", promise.as_str())
            })
            .collect()
    }

    /// What is there and not promised.
    pub(super) fn beyond(&self, promises: &[Promise]) -> Vec<Promise> {
        Promise::ALL
            .into_iter()
            .filter(|promise| promise.is_of_the_kernel())
            .filter(|promise| !promises.contains(promise) && self.gives(*promise))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"{
        "kernel": "6.1.0", "protection": {"level": "partial", "layers": [
            {"layer": "portable", "hook": "cgroup/connect4", "state": "active"},
            {"layer": "lsm", "hook": "lsm/socket_create", "state": "active"},
            {"layer": "lsm", "hook": "lsm/socket_listen", "state": "unavailable", "reason": "EINVAL"}
        ]},
        "gaps": ["it is recorded and followed, but not ended before it runs on (T2)"]
    }"#;

    #[test]
    fn a_layer_is_given_only_with_every_hook_of_it() {
        let found = Found::read(REPORT).unwrap();
        assert_eq!(found.layer("lsm"), (1, 2));
        assert!(found.gives(Promise::Portable) && !found.gives(Promise::Lsm));
        let missing = found.missing(&Promise::ALL);
        assert_eq!(missing.len(), 2);
        assert!(missing[0].contains("lsm/socket_listen (EINVAL)"), "{missing:?}");
    }

    #[test]
    fn a_kernel_on_which_nothing_loads_gives_nothing() {
        let report = r#"{"kernel": "5.10", "protection": {"level": "none", "layers": []}}"#;
        let found = Found::read(report).unwrap();
        assert_eq!(found.missing(&Promise::ALL).len(), Promise::ALL.len() - 3);
        assert!(Found::read("").is_err(), "a doctor that died is no report");
    }

    #[test]
    fn what_is_given_beyond_the_promise_is_told() {
        let found = Found::read(REPORT).unwrap();
        assert_eq!(found.beyond(&[]), [Promise::Portable]);
        assert_eq!(found.beyond(&[Promise::Portable]), []);
    }
}
