//! Where the kernel half is pinned, and what the pins of an installation are for.
//!
//! ```text
//! <pin directory>/state-v<version>/<NAME>   what the kernel half keeps: shared by every build
//! <pin directory>/tables-<digest>/<NAME>    what user space writes: by the ABI's version and sizes
//! <pin directory>/build-<digest>/<program>  programs of one build
//! <pin directory>/gates/<NAME>              the slots behind what is attached to global hooks
//! <pin directory>/links/<program>           what is attached to a global hook
//! <pin directory>/links/<cgroup id>-<program>  what is attached to a cgroup
//! ```
//!
//! Knows paths only; what is in force is decided by the links and the slots.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agentguard_common::abi;
use sha2::{Digest as _, Sha256};

use super::load::{LoadError, Sizes};
use super::object;
use super::protection::EXEC_CHECK;
use crate::fault;

/// Tables the kernel half keeps for itself, or writes for user space to read.
const STATE: [&str; 15] = [
    "CGROUPS",
    "MOVED",
    "MOVES",
    "FOLLOWED",
    "TASKS",
    "ROOMLESS",
    "ENTERED",
    "BORN",
    "ATTACHMENTS",
    "SOCKETS",
    "PROCESSES",
    "COUNTERS",
    "DENIED",
    "ALLOWED",
    "LSM_CALLS",
];

/// Tables that user space writes, and what is derived from them.
const TABLES: [&str; 10] = [
    "WORKLOADS",
    "DESTINATIONS",
    "RULES",
    "EXECUTABLES",
    "RUNTIMES",
    "UNIX_NAMES",
    "UNIX_SOCKETS",
    "VERDICTS",
    "SETTINGS",
    "BLANK",
];

/// Present once every program of a build is pinned.
const READY: &str = "ready";
/// Present where the programs of a build can end a task that is not the caller.
const ENDS_OTHERS: &str = "ends-others";

/// What an exec is judged by. A build has the one program or the other judge it, and never both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExecJudge {
    /// [`EXEC_CHECK`], before the point of no return.
    Lsm,
    /// `process_exec`, where the new program is in place.
    Tracepoint,
}

/// The pins of one build, among those of others in the same pin directory.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
    state: PathBuf,
    tables: PathBuf,
    build: PathBuf,
}

impl Pins {
    /// Of the build that this is, with tables of these sizes.
    pub(super) fn new(root: &Path, sizes: &Sizes) -> Self {
        let tables = digest(&[format!("{} {sizes:?}", abi::VERSION).as_bytes()]);
        let build = digest(&[object::OBJECT_DIGEST.as_bytes(), tables.as_bytes()]);
        Self {
            root: root.to_owned(),
            state: root.join(state_name()),
            tables: root.join(format!("tables-{tables}")),
            build: root.join(format!("build-{build}")),
        }
    }

    /// Where everything of every build is pinned.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Every table with where it is pinned.
    pub(super) fn maps(&self) -> impl Iterator<Item = (&'static str, PathBuf)> + '_ {
        let state = STATE.iter().map(|name| (*name, self.state.join(name)));
        let tables = TABLES.iter().map(|name| (*name, self.tables.join(name)));
        let gates = super::protection::doors()
            .iter()
            .filter_map(|door| door.gate)
            .map(|gate| (gate.slot, self.gate(gate.slot)));
        state.chain(tables).chain(gates)
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        let directory = if STATE.contains(&name) { &self.state } else { &self.tables };
        directory.join(name)
    }

    pub(super) fn gates(&self) -> PathBuf {
        self.root.join("gates")
    }

    pub(super) fn gate(&self, slot: &str) -> PathBuf {
        self.gates().join(slot)
    }

    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.build.join(name)
    }

    pub(super) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// The link of a global hook, by its door's program.
    pub(super) fn global_link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    pub(super) fn cgroup_link(&self, cgroup: u64, program: &str) -> PathBuf {
        self.links().join(format!("{cgroup}-{program}"))
    }

    /// Whether the programs of this build are there as a whole.
    pub(super) fn is_ready(&self) -> bool {
        self.build.join(READY).exists()
    }

    pub(super) fn mark_ready(&self) -> Result<(), LoadError> {
        make(&self.build.join(READY))
    }

    pub(super) fn ends_others(&self) -> bool {
        self.build.join(ENDS_OTHERS).exists()
    }

    pub(super) fn mark_ends_others(&self) -> Result<(), LoadError> {
        make(&self.build.join(ENDS_OTHERS))
    }

    /// Whether anything was kept here before.
    pub(super) fn is_in_use(&self) -> bool {
        self.tables.exists()
    }

    /// Makes the directories that are not there.
    pub(super) fn make_directories(&self) -> Result<(), LoadError> {
        let (gates, links) = (self.gates(), self.links());
        [&self.state, &self.tables, &self.build, &gates, &links].into_iter().try_for_each(|path| {
            fs::create_dir_all(path).map_err(|source| LoadError::Pin { path: path.clone(), source })
        })
    }

    /// Removes what a start of this build left behind that was cut short: programs that nothing
    /// leads to yet.
    pub(super) fn remove_unfinished(&self) -> Result<(), LoadError> {
        remove(&self.build)
    }

    /// Programs and tables of other builds.
    pub(super) fn others(&self) -> Result<Vec<PathBuf>, LoadError> {
        let mut others = entries(&self.root)?;
        others.retain(|path| {
            let is = |prefix| name_of(path).starts_with(prefix);
            (is("build-") && *path != self.build) || (is("tables-") && *path != self.tables)
        });
        // Programs before the tables that they look in.
        others.sort();
        Ok(others)
    }

    /// What other builds, of which one may be in force, have exec judged by; `None` without any.
    pub(super) fn exec_judge_of_others(&self) -> Result<Option<ExecJudge>, LoadError> {
        let mut builds = self.others()?;
        builds.retain(|path| name_of(path).starts_with("build-") && path.join(READY).exists());
        // They agree; of one that was being removed the program may be gone already.
        let by_lsm = builds.iter().any(|build| build.join(EXEC_CHECK).exists());
        Ok(match (builds.is_empty(), by_lsm) {
            (true, _) => None,
            (false, true) => Some(ExecJudge::Lsm),
            (false, false) => Some(ExecJudge::Tracepoint),
        })
    }

    /// What is kept by builds of another version of the state, which this one can not read.
    pub(super) fn foreign_state(&self) -> Result<Option<PathBuf>, LoadError> {
        let mut entries = entries(&self.root)?;
        entries.retain(|path| name_of(path).starts_with("state-") && *path != self.state);
        Ok(entries.into_iter().next())
    }
}

/// The numbers of the cgroups that hooks pinned below `pin_directory` are attached to.
#[must_use]
pub fn held_cgroups(pin_directory: &Path) -> BTreeSet<u64> {
    let links = entries(&pin_directory.join("links")).unwrap_or_default();
    links.iter().filter_map(|link| name_of(link).split_once('-')?.0.parse().ok()).collect()
}

/// Removes every pin below `root`, links before what they lead to: a program without tables would refuse
/// everything. Before them, what says that a build is whole, so that no start takes it for that where this
/// was cut short. Returns how many builds there were.
pub(super) fn remove_all(root: &Path) -> Result<usize, LoadError> {
    let entries = entries(root)?;
    let mut builds = 0;
    for build in entries.iter().filter(|path| name_of(path).starts_with("build-")) {
        remove(&build.join(READY))?;
        fault::point("uninstall.unready");
        builds += 1;
    }
    remove(&root.join("links"))?;
    fault::point("uninstall.links");
    for path in entries {
        remove(&path)?;
        fault::point("uninstall.pins");
    }
    match fs::remove_dir(root) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(LoadError::Pin { path: root.to_owned(), source: error })
        }
        Ok(()) | Err(_) => Ok(builds),
    }
}

/// Removes the programs of a build, or other pins. What says that they are whole goes first.
pub(super) fn remove_build(path: &Path) -> Result<(), LoadError> {
    remove(&path.join(READY))?;
    remove(path)
}

/// Removes a pin, or a directory with all it holds; absent is fine.
pub(super) fn remove(path: &Path) -> Result<(), LoadError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            for entry in entries(path)? {
                remove(&entry)?;
            }
            fs::remove_dir(path)
        }
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(LoadError::Pin { path: path.to_owned(), source: error })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// What is in a directory; nothing if it is not there.
pub(super) fn entries(path: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let error = |source| LoadError::Pin { path: path.to_owned(), source };
    match fs::read_dir(path) {
        Ok(entries) => {
            entries.map(|entry| entry.map(|entry| entry.path()).map_err(error)).collect()
        }
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(error(source)),
    }
}

pub(super) fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn state_name() -> String {
    format!("state-v{}", abi::STATE_VERSION)
}

fn make(path: &Path) -> Result<(), LoadError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(LoadError::Pin { path: path.to_owned(), source: error })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn digest(parts: &[&[u8]]) -> String {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update(part);
    }
    digest.finalize().iter().take(8).fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_judges_exec_is_told_by_the_whole_builds_of_others() {
        let root = tempfile::tempdir().unwrap();
        let pins = Pins::new(root.path(), &Sizes::default());
        let judge = || pins.exec_judge_of_others().unwrap();
        let make = |path: &str| fs::create_dir_all(root.path().join(path)).unwrap();
        pins.make_directories().unwrap();
        pins.mark_ready().unwrap();
        fs::create_dir(pins.program(EXEC_CHECK)).unwrap();
        assert_eq!(judge(), None, "its own says nothing of others");
        make("build-unfinished/bprm_check");
        assert_eq!(judge(), None, "what was never whole was never in force");
        make("build-first/ready");
        assert_eq!(judge(), Some(ExecJudge::Tracepoint));
        make("build-first/bprm_check");
        assert_eq!(judge(), Some(ExecJudge::Lsm));
    }
}
