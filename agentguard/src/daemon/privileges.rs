//! Which workloads are outside the promise because of what their processes may do to the host.
//!
//! A process with one of these capabilities in the host's namespaces can take the guard away
//! itself: no hook of the portable layer stands in its way. It is said, not passed over.

use std::fs;
use std::path::Path;

use procfs::process::Process;

/// `CAP_SYS_ADMIN` and `CAP_BPF` (capability.h), as bits of a capability set.
const DECISIVE: [(u64, &str); 2] = [(1 << 21, "CAP_SYS_ADMIN"), (1 << 39, "CAP_BPF")];
/// Processes of one workload that are looked at.
const LOOKED_AT: usize = 64;

/// The capabilities that put a workload outside the promise, if a process of it has any.
#[must_use]
pub fn decisive(cgroup: &Path) -> Option<String> {
    let own = fs::read_link("/proc/self/ns/user").ok()?;
    let mut found = 0;
    for pid in processes(cgroup).into_iter().take(LOOKED_AT) {
        let in_host = fs::read_link(format!("/proc/{pid}/ns/user")).is_ok_and(|ns| ns == own);
        let status = Process::new(pid).and_then(|process| process.status());
        if let (true, Ok(status)) = (in_host, status) {
            found |= status.capeff;
        }
    }
    let names: Vec<&str> =
        DECISIVE.iter().filter(|(bit, _)| found & bit != 0).map(|(_, name)| *name).collect();
    (!names.is_empty()).then(|| names.join(" and "))
}

/// Processes in a cgroup and below it.
fn processes(cgroup: &Path) -> Vec<i32> {
    let own = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = own.lines().filter_map(|pid| pid.parse().ok()).collect();
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if pids.len() < LOOKED_AT && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            pids.extend(processes(&entry.path()));
        }
    }
    pids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_root_on_the_host_is_told_and_an_ordinary_one_is_not() {
        assert!(nix::unistd::geteuid().is_root(), "run this test as root: sudo cargo xtask test");
        let directory = tempfile::tempdir().unwrap();
        let told = |pid: u32| {
            fs::write(directory.path().join("cgroup.procs"), format!("{pid}\n")).unwrap();
            decisive(directory.path())
        };
        assert!(told(std::process::id()).unwrap().contains("CAP_SYS_ADMIN"));

        let mut ordinary = std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--clear-groups", "sleep", "30"])
            .spawn()
            .unwrap();
        // It has its capabilities until it has become the other user.
        let gone = (0..200).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            told(ordinary.id()).is_none()
        });
        ordinary.kill().unwrap();
        ordinary.wait().unwrap();
        assert!(gone);
    }
}
