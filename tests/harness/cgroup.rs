//! Cgroups of the v2 hierarchy that a test makes and takes away.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::unique;

/// A cgroup; dropped, it goes with its children, and what still runs in it is killed.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a cgroup below the root.
    pub(crate) fn new(name: &str) -> Self {
        let path = root().join(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path }
    }

    /// Makes a cgroup below this one; it goes with this one.
    #[must_use]
    pub fn child(&self, name: &str) -> PathBuf {
        let path = self.path.join(name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Where cgroup v2 is mounted.
///
/// # Panics
///
/// When it is not.
pub(crate) fn root() -> PathBuf {
    let roots = mounted("cgroup2 ").into_iter().next();
    roots.expect("cgroup v2 is not mounted; mount it on /sys/fs/cgroup")
}

/// Where file systems of a kind are mounted.
fn mounted(kind: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("procfs is mounted on /proc");
    let points = mounts.lines().filter_map(|line| {
        let (first, second) = line.split_once(" - ")?;
        second.starts_with(kind).then(|| first.split(' ').nth(4)).flatten()
    });
    points.map(PathBuf::from).collect()
}

/// Removes what killed runs left behind.
pub(crate) fn remove_stale() {
    // Version 2 first: there is what runs in any of them.
    for root in [root()].into_iter().chain(mounted("cgroup ")) {
        for name in unique::stale(&root) {
            remove(&root.join(name));
        }
    }
}

/// Removes a cgroup from the hierarchies of version 1, where container runtimes make the same ones as
/// in version 2.
pub(crate) fn remove_from_all(name: &str) {
    for root in mounted("cgroup ") {
        remove(&root.join(name));
    }
}

/// Removes a cgroup with its children, and kills what runs in them.
pub(crate) fn remove(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    // Killed processes leave their cgroup a moment later.
    for _ in 0..200 {
        match fs::remove_dir(cgroup) {
            Ok(()) => return,
            // Another run removed it meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(_) => kill_all(cgroup),
        }
        thread::sleep(Duration::from_millis(10));
    }
    eprintln!("{} is left behind", cgroup.display());
}

/// Kills what runs in a cgroup that a test made, one process after the other: `cgroup.kill` is
/// missing before Linux 5.14.
fn kill_all(cgroup: &Path) {
    let pids = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0) {
        // One that has ended already needs no signal.
        let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}
