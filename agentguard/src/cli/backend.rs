//! What the CLI needs of the rest of agentguard beside the control API.
//!
//! The seam that `main.rs` fills in: the CLI knows nothing of the daemon or the kernel.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::exit::{Exit, Failure};
use crate::api::types::{Confine, ManifestErrorView, Protection};
use crate::config::Require;
use crate::config::value::NodeName;

/// How the daemon is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// Absent: the default path, where it exists.
    pub config: Option<PathBuf>,
    /// Absent: what the configuration says.
    pub socket: Option<PathBuf>,
    /// Refuse to start with less; absent: what the configuration says.
    pub require: Option<Require>,
    /// The name of this node; absent: what the configuration says.
    pub node: Option<NodeName>,
}

/// What `doctor` says of one thing it looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    Ok,
    Warning,
    Failed,
}

/// One thing `doctor` looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: String,
    pub state: CheckState,
    /// What was found.
    pub found: String,
    pub remedy: Option<String>,
}

/// What this machine can and can not enforce.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DoctorReport {
    /// Release of the running kernel.
    pub kernel: String,
    pub architecture: String,
    pub protection: Protection,
    pub checks: Vec<Check>,
    /// What no layer on this kernel covers, one sentence each.
    pub gaps: Vec<String>,
}

/// What came of reading manifests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Documents read.
    pub documents: u64,
    pub errors: Vec<ManifestErrorView>,
    /// What is valid and most likely not meant.
    pub warnings: Vec<ManifestErrorView>,
}

/// What came of following the hash chain of one audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifiedLog {
    pub file: PathBuf,
    pub records: u64,
    /// The first place where the chain is broken; absent where it is whole.
    pub broken: Option<BrokenChain>,
    /// The hash of the last line, to compare with one that was kept elsewhere.
    pub last_hash: Option<String>,
}

/// Where a hash chain is broken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokenChain {
    /// From 1.
    pub line: u64,
    pub reason: String,
}

/// What `uninstall` did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UninstallReport {
    /// What was removed, one line each: pins, links, cgroups.
    pub removed: Vec<String>,
    /// What is left and why, one line each; not empty means that it failed.
    pub left: Vec<String>,
}

/// The parts the CLI calls. All of them block.
///
/// `config` is the configuration file the user named; absent: the default path, where it exists.
pub trait Backend {
    /// The control socket of the configuration.
    ///
    /// # Errors
    /// Why the configuration can not be read.
    fn socket(&self, config: Option<&Path>) -> Result<PathBuf, Failure>;

    /// Runs the daemon until it is told to stop.
    ///
    /// # Errors
    /// Why it did not start or broke off.
    fn run(&self, options: &RunOptions) -> Result<(), Failure>;

    /// Runs a command as a workload with no daemon, as root: tag first, then exec. Returns how the
    /// command ended.
    ///
    /// # Errors
    /// Why the command was not run.
    fn exec_standalone(&self, config: Option<&Path>, request: &Confine) -> Result<Exit, Failure>;

    /// # Errors
    /// Why nothing could be found out.
    fn doctor(&self, config: Option<&Path>) -> Result<DoctorReport, Failure>;

    /// Removes all protection from this machine.
    ///
    /// # Errors
    /// Why nothing was removed.
    fn uninstall(&self, config: Option<&Path>) -> Result<UninstallReport, Failure>;

    /// Reads manifests from files, and from directories with all below them.
    ///
    /// # Errors
    /// Why a path could not be read; what is wrong in a manifest is in the report.
    fn check(&self, paths: &[PathBuf]) -> Result<CheckReport, Failure>;

    /// # Errors
    /// Why a file could not be read; a broken chain is in the report.
    fn audit_verify(&self, files: &[PathBuf]) -> Result<Vec<VerifiedLog>, Failure>;
}
