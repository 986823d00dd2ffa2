//! The host that the daemon guards, which it may see from inside a container of its own.
//!
//! A DaemonSet runs the daemon with the host's process ids and with mounts and a cgroup namespace of
//! its own. What it reads about other processes must be in the host's terms.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// The host's first process; in a container that does not share the host's process ids, the
/// container's own, which makes everything here do nothing.
const INIT: &str = "/proc/1";

/// Whether pins in `directory` would be the host's: in mounts of one's own, a BPF file system that is
/// mounted here goes with the last process that sees it, and all protection with it.
#[must_use]
pub fn keeps_pins(directory: &Path) -> bool {
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let is_bpffs = statfs(existing).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    is_bpffs || !has_own_mounts()
}

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

/// Whether processes have the numbers here that the kernel half tells, which are those of the machine:
/// they have not in a node that is a container itself (Kubernetes in Docker).
#[must_use]
pub fn has_the_machines_pids() -> bool {
    /// The inode of the first PID namespace, on every kernel (`PROC_PID_INIT_INO` in its
    /// `include/linux/proc_ns.h`).
    const FIRST: u64 = 0xefff_fffc;
    fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == FIRST)
}

/// Whether this process has mounts of its own beside those of the host's first process.
#[must_use]
pub fn has_own_mounts() -> bool {
    let namespace = |process: &str| fs::read_link(format!("{process}/ns/mnt")).ok();
    namespace(INIT).is_some_and(|host| Some(host) != namespace("/proc/self"))
}

/// Where the host's files are: `/`, or what the host's first process sees, where that is elsewhere.
#[must_use]
pub fn root() -> PathBuf {
    let of_host = PathBuf::from(format!("{INIT}/root"));
    if has_own_mounts() && of_host.join("proc").exists() { of_host } else { PathBuf::from("/") }
}
