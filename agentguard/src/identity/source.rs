//! What tells the daemon which workloads exist: the trait that every identity source keeps to.
//!
//! A source looks at the node and says what came and what went since it last looked. It tags
//! nothing and knows no grant.

use std::{io, path::PathBuf};

use agentguard_common::{CgroupId, Mode};

use super::spiffe::SpiffeId;

/// Finds workloads.
pub trait IdentitySource {
    /// The word for this source in records and metrics.
    fn name(&self) -> &'static str;

    /// What came and went since the last scan, and what is wrong at this moment.
    ///
    /// # Errors
    ///
    /// When the node can not be looked at; nothing counts as gone then.
    fn scan(&mut self) -> Result<Scan, SourceError>;
}

/// What one look at the node brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// What went first, then what came, each in the order of the cgroups.
    pub events: Vec<IdentityEvent>,
    /// All that is wrong now, whether or not it was said before.
    pub problems: Vec<SourceProblem>,
}

/// A workload came or went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IdentityEvent {
    Appeared(Discovered),
    /// It is gone, or is no workload any more. The path as it was when it appeared.
    Gone {
        cgroup: PathBuf,
    },
}

/// A workload that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovered {
    /// What people call it; several cgroups of one declaration share it.
    pub name: String,
    pub identity: SpiffeId,
    /// Absolute below the cgroup v2 root, never the root itself.
    pub cgroup: PathBuf,
    /// The cgroup that was there when the path was looked at.
    pub id: CgroupId,
    pub mode: Mode,
    /// The source that found it.
    pub source: &'static str,
    /// The user on whose behalf it runs, where there is one.
    pub owner_uid: Option<u32>,
}

/// Two declarations that contradict each other about a cgroup.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceProblem {
    #[error(
        "cgroup {} is workload {kept} and workload {refused} at once; {kept} keeps it, select it \
         in one of the two only",
        cgroup.display()
    )]
    Duplicate { cgroup: PathBuf, kept: String, refused: String },
    #[error(
        "cgroup {} of workload {refused} lies inside {} of workload {kept}; {kept} keeps both, \
         select cgroups that do not lie in each other",
        cgroup.display(), outer.display()
    )]
    Nested { cgroup: PathBuf, outer: PathBuf, kept: String, refused: String },
}

/// Why the node could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("cgroup v2 is not mounted at {}: {error}; mount it or set cgroup_root", path.display())]
    CgroupRoot { path: PathBuf, error: io::Error },
    #[error("cgroup {} can not be read: {error}; run as root", path.display())]
    Cgroup { path: PathBuf, error: io::Error },
}
