//! What scopes name, looked up in the mounts of containers, and kept for as long as each container
//! is there.
//!
//! A container's image does not change, and what its workload puts there is another file: so what
//! was found when a scope was first looked up is what is granted, until a refresh. Nothing is looked
//! up by the number of a process that is another one by now.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use agentguard_common::FileId;

use crate::identity::ProcessRef;
use crate::scope::executables::{ResolveProblem, Resolver};
use crate::scope::socket_directories::{DirectoryId, SocketDirectories};
use crate::scope::{ExecutablePattern, ScopeDocument, ScopeName};

/// A container of a workload, as its files are looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerRef {
    /// The runtime's identifier.
    pub id: String,
    pub name: String,
    pub process: ProcessRef,
    /// Its root, as the process names it.
    pub root: PathBuf,
    /// The files that starting it runs.
    pub launch: Vec<FileId>,
}

impl ContainerRef {
    /// What it sees.
    #[must_use]
    pub fn mounts(&self) -> Resolver {
        Resolver::of_container(&self.process.directory(), &self.root)
    }
}

/// What was found in each container.
#[derive(Debug, Default)]
pub struct ContainerFiles {
    known: BTreeMap<String, Known>,
}

#[derive(Debug)]
struct Known {
    process: ProcessRef,
    root: PathBuf,
    scopes: BTreeMap<ScopeName, Looked>,
    sockets: SocketDirectories,
}

#[derive(Debug)]
struct Looked {
    patterns: Vec<ExecutablePattern>,
    files: Vec<FileId>,
    problems: Vec<String>,
    /// Whether each pattern meant something.
    is_whole: bool,
}

impl ContainerFiles {
    /// The executables of `scope` in a container; what is wrong with them goes to `problems`.
    pub fn executables(
        &mut self,
        container: &ContainerRef,
        scope: &ScopeDocument,
        problems: &mut BTreeSet<String>,
    ) -> Vec<FileId> {
        let known = self.of(container);
        let is_known =
            known.scopes.get(&scope.scope).is_some_and(|looked| looked.patterns == scope.exec);
        if !is_known {
            let Some(looked) = look_up(container, scope) else { return Vec::new() };
            known.scopes.insert(scope.scope.clone(), looked);
        }
        let Some(looked) = known.scopes.get(&scope.scope) else { return Vec::new() };
        problems.extend(looked.problems.iter().cloned());
        looked.files.clone()
    }

    /// The directories of `sockets` in a container.
    pub fn socket_directories(
        &mut self,
        container: &ContainerRef,
        scope: &ScopeName,
        sockets: &[PathBuf],
        problems: &mut BTreeSet<String>,
    ) -> BTreeMap<PathBuf, DirectoryId> {
        if !container.process.is_alive() {
            return BTreeMap::new();
        }
        let known = self.of(container);
        let paths = sockets.iter().map(PathBuf::as_path);
        match known.sockets.resolve(&container.mounts(), paths) {
            Ok((directories, told)) => {
                let name = &container.name;
                let told = told.iter();
                problems.extend(
                    told.map(|problem| format!("scope {scope}: container {name}: {problem}")),
                );
                if !container.process.is_alive() {
                    return BTreeMap::new();
                }
                directories.into_iter().map(|(path, found)| (Path::to_owned(path), found)).collect()
            }
            // It ended while it was looked at.
            Err(_gone) => BTreeMap::new(),
        }
    }

    /// Looks everything up anew when it is asked for next.
    pub fn refresh(&mut self) {
        self.known.clear();
    }

    /// Forgets containers that are in no workload any more.
    pub fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.known.retain(|id, _| is_there(id));
    }

    fn of(&mut self, container: &ContainerRef) -> &mut Known {
        let new = || Known {
            process: container.process,
            root: container.root.clone(),
            scopes: BTreeMap::new(),
            sockets: SocketDirectories::default(),
        };
        let known = self.known.entry(container.id.clone()).or_insert_with(new);
        if known.process != container.process {
            // Started again, with its file systems mounted anew.
            *known = new();
        }
        if known.root != container.root {
            // It has left the root that it was set up in. What was found there is the same file
            // still; what was not may have been looked for when that root was gone already.
            known.root.clone_from(&container.root);
            known.scopes.retain(|_, looked| looked.is_whole);
        }
        known
    }
}

/// `None` where the container ended meanwhile: what was found may be another's.
fn look_up(container: &ContainerRef, scope: &ScopeDocument) -> Option<Looked> {
    if !container.process.is_alive() {
        return None;
    }
    let tell = |problem: &dyn std::fmt::Display| {
        format!("scope {}: container {}: {problem}", scope.scope, container.name)
    };
    let mut looked = Looked {
        patterns: scope.exec.clone(),
        files: Vec::new(),
        problems: Vec::new(),
        is_whole: false,
    };
    match container.mounts().resolve_all(&scope.exec) {
        Ok(resolution) => {
            looked.is_whole = resolution.problems.is_empty();
            looked.files = resolution.files.iter().map(|file| file.id).collect();
            // A scope is granted to many, and not every image has every program of it.
            let told = resolution.problems.iter().filter(|problem| match problem {
                ResolveProblem::Missing { .. } => false,
                ResolveProblem::NotAFile { .. }
                | ResolveProblem::NotExecutable { .. }
                | ResolveProblem::OnVolume { .. }
                | ResolveProblem::TooMany { .. }
                | ResolveProblem::TooDeep { .. }
                | ResolveProblem::Unreadable { .. }
                | ResolveProblem::Changed { .. }
                | ResolveProblem::Vanished { .. }
                | ResolveProblem::Appeared { .. } => true,
            });
            looked.problems = told.map(|problem| tell(problem)).collect();
        }
        Err(error) => looked.problems.push(tell(&error)),
    }
    looked.files.sort_unstable();
    looked.files.dedup();
    container.process.is_alive().then_some(looked)
}
