//! Removes all protection: the one thing that does.

use std::path::Path;

use super::engine::remove_cgroup;
use super::{DaemonError, require_root, state};
use crate::cli::backend::UninstallReport;
use crate::config::Configuration;

/// Removes pins, state and the cgroups of `exec`; the audit log and the manifests stay.
///
/// # Errors
///
/// When nothing could be removed.
pub fn uninstall(configuration: &Configuration) -> Result<UninstallReport, DaemonError> {
    require_root()?;
    let mut report = UninstallReport::default();
    let pins: &Path = configuration.pin_directory.as_ref();
    let builds = super::remove_pins(pins)?;
    if builds > 0 {
        report.removed.push(format!("programs, tables and hooks pinned at {}", pins.display()));
    }
    let directory: &Path = configuration.state_directory.as_ref();
    match state::remove(directory) {
        Ok(true) => report.removed.push(format!("the state in {}", directory.display())),
        Ok(false) => {}
        Err(error) => report.left.push(format!("the state in {}: {error}", directory.display())),
    }
    let cgroups = configuration.find_cgroup_parent()?;
    if cgroups.exists() {
        match remove_cgroup(&cgroups) {
            Ok(()) => report.removed.push(format!("the cgroups at {}", cgroups.display())),
            Err(error) => report.left.push(format!(
                "the cgroup {}: {error}; end the processes in it, they are not held any more",
                cgroups.display()
            )),
        }
    }
    Ok(report)
}
