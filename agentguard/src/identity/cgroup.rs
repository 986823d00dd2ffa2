//! Finds declared workloads in the cgroup v2 tree.
//!
//! Reads directories only; moves and tags nothing. A scan compares the tree as it is with what was
//! reported before. The tree changes while it is read: what comes after is found by the next scan.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use agentguard_common::CgroupId;
use nix::errno::Errno;
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _, event::ModifyKind};
use tokio::sync::Notify;

use super::{
    document::{Selector, SystemdUnit, WorkloadDocument},
    source::{Discovered, IdentityEvent, IdentitySource, Scan, SourceError, SourceProblem},
};
use crate::pattern::{PathPattern, name_matches};

/// How long a change can go unseen where nothing is watched.
const RESCAN: Duration = Duration::from_secs(1);
/// What systemd puts units in, and nothing else lies in.
const SLICE: &str = ".slice";
/// The word for this source.
const NAME: &str = "cgroup";

/// Workloads that manifests declare by their cgroup or systemd unit.
#[derive(Clone, Debug)]
pub struct CgroupSource {
    root: PathBuf,
    /// In the order of their names.
    documents: Vec<WorkloadDocument>,
    reported: BTreeMap<PathBuf, Discovered>,
}

/// Says when it is time to scan again.
#[derive(Debug)]
pub struct CgroupWatch {
    root: PathBuf,
    watcher: RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
    changed: Arc<Notify>,
}

/// Why the cgroup tree can not be watched.
#[derive(Debug, thiserror::Error)]
#[error("the cgroup tree at {} can not be watched: {error}; raise fs.inotify.max_user_instances", path.display())]
pub struct WatchError {
    path: PathBuf,
    error: notify::Error,
}

impl CgroupSource {
    /// A source for the cgroup v2 tree that is mounted at `cgroup_root`.
    #[must_use]
    pub fn new(cgroup_root: PathBuf) -> Self {
        Self { root: cgroup_root, documents: Vec::new(), reported: BTreeMap::new() }
    }

    /// Makes `documents` all that is declared; the next scan says what follows from it.
    pub fn set_selectors(&mut self, mut documents: Vec<WorkloadDocument>) {
        documents.sort_by(|one, other| one.name.cmp(&other.name));
        self.documents = documents;
    }

    /// The workloads that the last scan found.
    pub fn reported(&self) -> impl Iterator<Item = &Discovered> {
        self.reported.values()
    }

    /// Starts to watch the directories in which workloads are expected.
    ///
    /// # Errors
    ///
    /// When the kernel gives no inotify instance, or the root can not be watched.
    pub fn watch(&self) -> Result<CgroupWatch, WatchError> {
        let changed = Arc::new(Notify::new());
        let signal = Arc::clone(&changed);
        let refuse = |error| WatchError { path: self.root.clone(), error };
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading a directory is an event too; only names that come and go are meant. After an
            // error events may be missing.
            let is_change = event.map_or(true, |event| {
                matches!(
                    event.kind,
                    EventKind::Create(_)
                        | EventKind::Remove(_)
                        | EventKind::Modify(ModifyKind::Name(_))
                ) || event.need_rescan()
            });
            if is_change {
                signal.notify_one();
            }
        });
        let watcher = watcher.map_err(refuse)?;
        let root = self.root.clone();
        let mut watch = CgroupWatch { root, watcher, watched: BTreeSet::new(), changed };
        watch.watcher.watch(&self.root, RecursiveMode::NonRecursive).map_err(refuse)?;
        watch.follow(self);
        Ok(watch)
    }

    /// The directories whose names decide about the beginning of a selector, the root left out.
    fn directories(&self) -> BTreeSet<PathBuf> {
        let mut directories = BTreeSet::new();
        for document in &self.documents {
            match &document.selector {
                Selector::Cgroup(pattern) => {
                    let names: Vec<&str> = pattern.pattern().names().collect();
                    let mut path = self.root.clone();
                    // The last name is looked for, not looked into.
                    for name in &names[..names.len().saturating_sub(1)] {
                        if name.contains('*') {
                            break;
                        }
                        path.push(name);
                        directories.insert(path.clone());
                    }
                }
                Selector::SystemdUnit(_) => {
                    // What can not be read now is left to the scan to complain about.
                    directories.extend(
                        self.slices().unwrap_or_default().iter().map(|slice| self.at(slice)),
                    );
                }
            }
        }
        directories.remove(&self.root);
        directories
    }

    /// The cgroups that a selector means, absolute below the root.
    fn select(&self, selector: &Selector) -> Result<Vec<PathBuf>, SourceError> {
        match selector {
            Selector::Cgroup(pattern) => self.expand(pattern.pattern()),
            Selector::SystemdUnit(unit) => self.unit(unit),
        }
    }

    fn expand(&self, pattern: &PathPattern) -> Result<Vec<PathBuf>, SourceError> {
        let mut paths = vec![PathBuf::from("/")];
        for wanted in pattern.names() {
            let mut next = Vec::new();
            for path in paths {
                if wanted.contains('*') {
                    let names = self.children(&path)?;
                    let names = names.into_iter().filter(|name| name_matches(wanted, name));
                    next.extend(names.map(|name| path.join(name)));
                } else {
                    next.push(path.join(wanted));
                }
            }
            paths = next;
        }
        Ok(paths)
    }

    /// The cgroups of a unit of the system's systemd. Those lie in slices and in nothing else;
    /// below a service or a container, whoever it was delegated to can make any name.
    fn unit(&self, unit: &SystemdUnit) -> Result<Vec<PathBuf>, SourceError> {
        let slices = self.slices()?;
        let parents = slices.into_iter().chain([PathBuf::from("/")]);
        Ok(parents.map(|parent| parent.join(unit.as_str())).collect())
    }

    /// Every slice that lies in slices only.
    fn slices(&self) -> Result<Vec<PathBuf>, SourceError> {
        let mut slices = Vec::new();
        let mut left = vec![PathBuf::from("/")];
        while let Some(path) = left.pop() {
            let names = self.children(&path)?;
            let inside = names.into_iter().filter(|name| name.ends_with(SLICE));
            let inside: Vec<PathBuf> = inside.map(|name| path.join(name)).collect();
            slices.extend(inside.iter().cloned());
            left.extend(inside);
        }
        Ok(slices)
    }

    /// The names of the cgroups right inside of one; none if it is gone. A name that is not UTF-8
    /// can be in no manifest.
    fn children(&self, cgroup: &Path) -> Result<Vec<String>, SourceError> {
        let path = self.at(cgroup);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if is_gone(&error) => return Ok(Vec::new()),
            Err(error) => return Err(SourceError::Cgroup { path, error }),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if is_gone(&error) => return Ok(names),
                Err(error) => return Err(SourceError::Cgroup { path, error }),
            };
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            names.extend(entry.file_name().into_string().ok().filter(|_| is_directory));
        }
        Ok(names)
    }

    /// The number of a cgroup; nothing if there is none at this path.
    fn number(&self, cgroup: &Path) -> Result<Option<CgroupId>, SourceError> {
        let path = self.at(cgroup);
        match fs::symlink_metadata(&path) {
            Ok(status) if status.is_dir() => Ok(Some(CgroupId(status.ino()))),
            Ok(_) => Ok(None),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(SourceError::Cgroup { path, error }),
        }
    }

    fn at(&self, cgroup: &Path) -> PathBuf {
        self.root.join(cgroup.strip_prefix("/").unwrap_or(cgroup))
    }

    /// All that is declared for each cgroup that is there, the first the one that has it.
    fn candidates(&self) -> Result<BTreeMap<PathBuf, Vec<Discovered>>, SourceError> {
        let mut candidates: BTreeMap<PathBuf, Vec<Discovered>> = BTreeMap::new();
        for document in &self.documents {
            for cgroup in self.select(&document.selector)? {
                let Some(id) = self.number(&cgroup)? else { continue };
                let found = Discovered {
                    name: document.name.to_string(),
                    identity: document.spiffe_id.clone(),
                    cgroup: cgroup.clone(),
                    id,
                    mode: document.mode,
                    source: NAME,
                    owner_uid: None,
                };
                let here = candidates.entry(cgroup).or_default();
                // A declaration that is new takes nothing away from one that is in force.
                if self.reported.get(&found.cgroup) == Some(&found) {
                    here.insert(0, found);
                } else {
                    here.push(found);
                }
            }
        }
        Ok(candidates)
    }
}

impl IdentitySource for CgroupSource {
    fn name(&self) -> &'static str {
        NAME
    }

    fn scan(&mut self) -> Result<Scan, SourceError> {
        if let Err(error) = fs::read_dir(&self.root) {
            return Err(SourceError::CgroupRoot { path: self.root.clone(), error });
        }
        let mut scan = Scan::default();
        let (now, problems) = settle(self.candidates()?);
        scan.problems = problems;
        let gone = self.reported.iter().filter(|(cgroup, was)| now.get(*cgroup) != Some(*was));
        scan.events.extend(gone.map(|(cgroup, _)| IdentityEvent::Gone { cgroup: cgroup.clone() }));
        let new = now.iter().filter(|(cgroup, is)| self.reported.get(*cgroup) != Some(*is));
        scan.events.extend(new.map(|(_, found)| IdentityEvent::Appeared(found.clone())));
        self.reported = now;
        Ok(scan)
    }
}

impl CgroupWatch {
    /// Waits until it is time to scan: something came or went, or a second has passed.
    pub async fn changed(&self) {
        // Running out of time is the other way to wake up.
        drop(tokio::time::timeout(RESCAN, self.changed.notified()).await);
    }

    /// Watches what `source` looks at now. Called before each scan: a directory that came, and
    /// what was in it already, is then seen.
    pub fn follow(&mut self, source: &CgroupSource) {
        let wanted = source.directories();
        for gone in self.watched.difference(&wanted) {
            // It may be gone itself, and its watch with it.
            drop(self.watcher.unwatch(gone));
        }
        self.watched.retain(|path| wanted.contains(path) && path.exists());
        for path in wanted {
            if !self.watched.contains(&path)
                && self.watcher.watch(&path, RecursiveMode::NonRecursive).is_ok()
            {
                self.watched.insert(path);
            }
        }
    }

    /// The directories that are watched beside the root; what lies elsewhere is found by the
    /// rescan.
    pub fn watched(&self) -> impl Iterator<Item = &Path> {
        self.watched.iter().map(PathBuf::as_path)
    }

    /// The cgroup root that is watched.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

/// Gives each cgroup to one declaration, the outer before the inner.
fn settle(
    candidates: BTreeMap<PathBuf, Vec<Discovered>>,
) -> (BTreeMap<PathBuf, Discovered>, Vec<SourceProblem>) {
    let mut settled: BTreeMap<PathBuf, Discovered> = BTreeMap::new();
    let mut problems = Vec::new();
    // The order of paths, name by name, has every cgroup before what lies in it.
    for (cgroup, found) in candidates {
        let outer = cgroup.ancestors().skip(1).find_map(|above| settled.get(above));
        if let Some(outer) = outer {
            let nested = found.iter().filter(|inner| !is_same(inner, outer));
            problems.extend(nested.map(|inner| SourceProblem::Nested {
                cgroup: cgroup.clone(),
                outer: outer.cgroup.clone(),
                kept: outer.name.clone(),
                refused: inner.name.clone(),
            }));
            continue;
        }
        let mut found = found.into_iter();
        let Some(kept) = found.next() else { continue };
        let duplicates = found.filter(|other| !is_same(other, &kept));
        problems.extend(duplicates.map(|other| SourceProblem::Duplicate {
            cgroup: cgroup.clone(),
            kept: kept.name.clone(),
            refused: other.name,
        }));
        settled.insert(cgroup, kept);
    }
    (settled, problems)
}

/// Whether it makes no difference which of the two declarations counts.
fn is_same(one: &Discovered, other: &Discovered) -> bool {
    one.identity == other.identity && one.mode == other.mode
}

/// A cgroup that is removed while it is read says so in two ways.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

#[cfg(test)]
mod tests;
