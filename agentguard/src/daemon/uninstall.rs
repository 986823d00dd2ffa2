//! Removes all protection: the one thing that does.

use std::fs;
use std::path::{Path, PathBuf};

use super::confine::remove_abandoned;
use super::engine::remove_cgroup;
use super::lock::Locks;
use super::{DaemonError, cluster, host, last_good, require_root, state};
use crate::cli::backend::UninstallReport;
use crate::config::Configuration;
use crate::fault;

/// Removes pins, state and the cgroups of `exec`; the audit log and the manifests stay.
///
/// # Errors
///
/// When nothing could be removed.
pub fn uninstall(configuration: &Configuration) -> Result<UninstallReport, DaemonError> {
    require_root()?;
    // In a container's own cgroup namespace the host's cgroups are mounted nowhere.
    host::see_cgroups();
    let mut report = UninstallReport::default();
    let pins: &Path = configuration.pin_directory.as_ref();
    let directory: &Path = configuration.state_directory.as_ref();
    // A daemon would put back what is taken away under it.
    let mut locks = Locks::default();
    for path in [directory, pins] {
        if path.exists() {
            locks.take(path)?;
        }
    }
    let cgroups: Vec<PathBuf> = match state::load(directory) {
        Ok(saved) => saved.exec_cgroups(),
        Err(error) => {
            report.left.push(format!("cgroups of exec that are not known: {error}"));
            Vec::new()
        }
    };
    let builds = super::remove_pins(pins)?;
    if builds > 0 {
        report.removed.push(format!("programs, tables and hooks pinned at {}", pins.display()));
    }
    let supervisors = super::standalone::clear_leftovers(configuration);
    if supervisors > 0 {
        report.removed.push(format!("what {supervisors} killed runs of exec left"));
    }
    let removed = last_good::remove(directory)
        .and_then(|manifests| Ok(cluster::remove(directory)? || manifests))
        .and_then(|earlier| Ok(state::remove(directory)? || earlier));
    fault::point("uninstall.state");
    match removed {
        Ok(true) => report.removed.push(format!("the state in {}", directory.display())),
        Ok(false) => {}
        Err(error) => report.left.push(format!("the state in {}: {error}", directory.display())),
    }
    for cgroup in cgroups.iter().filter(|cgroup| cgroup.exists()) {
        match remove_cgroup(cgroup) {
            Ok(()) => report.removed.push(format!("the cgroup {}", cgroup.display())),
            Err(error) => report.left.push(format!(
                "the cgroup {}: {error}; end the processes in it, they are not held any more",
                cgroup.display()
            )),
        }
    }
    match configuration.find_cgroup_parent() {
        Ok(parent) => {
            for path in remove_abandoned(&parent, &[]) {
                report.removed.push(format!("the cgroup {}, which was empty", path.display()));
            }
            // Others run there, or it is gone already.
            let _parent = fs::remove_dir(parent);
        }
        // What was removed is removed all the same.
        Err(error) => report.left.push(format!("cgroups of exec: {error}")),
    }
    Ok(report)
}
