//! The host that the daemon guards, which it may see from inside a container of its own.
//!
//! A DaemonSet runs the daemon with the host's process ids and with mounts and a cgroup namespace of
//! its own. What it reads about other processes must be in the host's terms.

use std::fs::{self, File};
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns};

/// The host's first process; in a container that does not share the host's process ids, the
/// container's own, which makes everything here do nothing.
const INIT: &str = "/proc/1";

/// Makes the calling thread, and those it starts, see cgroups as the host does: in a cgroup namespace
/// of one's own `/proc/<pid>/cgroup` says nothing that could be looked up. To be called before any
/// other thread is there.
pub fn see_cgroups() {
    let namespace = |process: &str| fs::read_link(format!("{process}/ns/cgroup")).ok();
    if namespace(INIT).is_none_or(|of_host| Some(of_host) == namespace("/proc/self")) {
        return;
    }
    let entered =
        File::open(format!("{INIT}/ns/cgroup")).map_err(|error| error.to_string()).and_then(
            |host| setns(host, CloneFlags::CLONE_NEWCGROUP).map_err(|error| error.to_string()),
        );
    match entered {
        Ok(()) => tracing::info!("sees the host's cgroups from a cgroup namespace of its own"),
        Err(error) => tracing::error!(
            error,
            "cgroups of other processes can not be told; give the container CAP_SYS_ADMIN"
        ),
    }
}

/// Where the host's files are: `/`, or what the host's first process sees, where that is elsewhere.
#[must_use]
pub fn root() -> PathBuf {
    let namespace = |process: &str| fs::read_link(format!("{process}/ns/mnt")).ok();
    let of_host = PathBuf::from(format!("{INIT}/root"));
    let is_elsewhere = namespace(INIT).is_some_and(|host| Some(host) != namespace("/proc/self"));
    if is_elsewhere && of_host.join("proc").exists() { of_host } else { PathBuf::from("/") }
}
