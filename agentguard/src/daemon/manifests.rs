//! The manifest directory, watched; and the workloads its manifests select.
//!
//! Every file stands for itself: one that has an error keeps saying what it last said without one,
//! so that a slip of the pen changes nothing that is enforced.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::Notify;

use super::engine::{Engine, EngineError, NewWorkload, WorkloadSource};
use super::service::Shared;
use crate::audit::record::{ManifestErrorRecord, RecordBody};
use crate::audit::text::Text;
use crate::identity::WorkloadDocument;
use crate::identity::cgroup::{CgroupSource, CgroupWatch};
use crate::identity::source::{Discovered, IdentityEvent, IdentitySource as _};
use crate::manifest::{Manifest, ManifestError, assemble, files, parse_paths};

/// Changes that come together are taken together.
const SETTLE: Duration = Duration::from_millis(15);
/// A change that no notification told of is found after this time, and so is a new cgroup.
const RESCAN: Duration = Duration::from_secs(1);

/// What is known of the files, and of the cgroups their workloads select.
pub struct Sources {
    sound: BTreeMap<PathBuf, Vec<Manifest>>,
    told: Vec<String>,
    cgroups: CgroupSource,
    selectors: Vec<WorkloadDocument>,
    /// Found, but not held yet.
    waiting: Vec<Discovered>,
    writing: Arc<Writing>,
}

/// The files that somebody is writing: what they hold so far is nothing that anybody meant.
#[derive(Debug, Default)]
struct Writing {
    files: Mutex<BTreeSet<PathBuf>>,
    settled: Notify,
}

impl Writing {
    fn files(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn contains(&self, path: &Path) -> bool {
        self.files().contains(path)
    }

    /// Takes note of what the kernel tells of the directory.
    fn note(&self, event: notify::Result<notify::Event>) {
        let Ok(event) = event else { return };
        if event.need_rescan() {
            // Ends of writing may have been missed.
            self.files().clear();
            self.settled.notify_one();
            return;
        }
        match event.kind {
            EventKind::Modify(ModifyKind::Data(_)) => {
                self.files().extend(event.paths);
            }
            EventKind::Access(AccessKind::Close(AccessMode::Write))
            | EventKind::Create(_)
            | EventKind::Remove(_)
            | EventKind::Modify(
                ModifyKind::Any | ModifyKind::Metadata(_) | ModifyKind::Name(_) | ModifyKind::Other,
            )
            | EventKind::Any
            | EventKind::Other => {
                let mut files = self.files();
                for path in &event.paths {
                    files.remove(path);
                }
                drop(files);
                self.settled.notify_one();
            }
            EventKind::Access(
                AccessKind::Any
                | AccessKind::Read
                | AccessKind::Open(_)
                | AccessKind::Close(
                    AccessMode::Any | AccessMode::Execute | AccessMode::Read | AccessMode::Other,
                )
                | AccessKind::Other,
            ) => {}
        }
    }
}

impl Sources {
    #[must_use]
    pub fn new(shared: &Shared) -> Self {
        Self {
            sound: BTreeMap::new(),
            told: Vec::new(),
            cgroups: super::cgroup_source(shared),
            selectors: Vec::new(),
            waiting: Vec::new(),
            writing: Arc::default(),
        }
    }
}

/// Reads the directory and puts what it says in force.
pub fn load(shared: &Shared, sources: &mut Sources) {
    let started = Instant::now();
    let directory = shared.configuration.manifests_directory.as_ref();
    let (manifests, mut errors) = read(directory, &mut sources.sound, &sources.writing);
    let (set, contradictions) = assemble(manifests);
    errors.extend(contradictions);
    tell(shared, sources, &errors);
    let selectors = set.workloads.clone();
    shared.engine().apply_manifests(set, errors);
    if selectors != sources.selectors {
        sources.cgroups.set_selectors(selectors.clone());
        sources.selectors = selectors;
    }
    scan(shared, sources);
    shared.metrics.reconciled(started.elapsed());
}

/// Every manifest of the directory: of a file with an error what it last said without one.
fn read(
    directory: &Path,
    sound: &mut BTreeMap<PathBuf, Vec<Manifest>>,
    writing: &Writing,
) -> (Vec<Manifest>, Vec<ManifestError>) {
    let mut errors = Vec::new();
    let mut now = BTreeMap::new();
    let paths = match files(directory) {
        Ok(paths) => paths,
        // There is nothing to hold on to before the directory could be read once.
        Err(error) => {
            return (sound.values().flatten().cloned().collect(), vec![error]);
        }
    };
    for path in paths {
        if writing.contains(&path) {
            // Its end is told, and read then.
            if let Some(last) = sound.get(&path) {
                now.insert(path, last.clone());
            }
            continue;
        }
        let (manifests, wrong) = parse_paths(std::slice::from_ref(&path));
        if wrong.is_empty() {
            now.insert(path, manifests);
        } else {
            errors.extend(wrong);
            if let Some(last) = sound.get(&path) {
                now.insert(path, last.clone());
            }
        }
    }
    *sound = now;
    (sound.values().flatten().cloned().collect(), errors)
}

/// Logs and records errors, each once for as long as it stays.
fn tell(shared: &Shared, sources: &mut Sources, errors: &[ManifestError]) {
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    for (error, text) in errors.iter().zip(&texts) {
        if sources.told.contains(text) {
            continue;
        }
        tracing::error!(error = text, "a manifest is not valid; what was in force stays");
        let position = error.position;
        shared.audit.append(RecordBody::ManifestError(ManifestErrorRecord {
            source: Text::new(&error.file),
            line: position.map(|position| position.line as u64),
            column: position.map(|position| position.column as u64),
            message: Text::new(text),
        }));
    }
    sources.told = texts;
}

/// Takes in workloads whose cgroup has appeared, and lets go those whose selector is gone.
fn scan(shared: &Shared, sources: &mut Sources) {
    let found = match sources.cgroups.scan() {
        Ok(found) => found,
        Err(error) => {
            tracing::error!(%error, "it is not known which workloads came and went");
            return;
        }
    };
    for problem in &found.problems {
        tracing::debug!(%problem, "workloads contradict each other");
    }
    let mut gone = Vec::new();
    let mut appeared = std::mem::take(&mut sources.waiting);
    for event in found.events {
        match event {
            IdentityEvent::Appeared(workload) => {
                appeared.retain(|waiting| waiting.cgroup != workload.cgroup);
                appeared.push(workload);
            }
            IdentityEvent::Gone { cgroup } => {
                appeared.retain(|waiting| waiting.cgroup != cgroup);
                gone.push(cgroup);
            }
        }
    }
    // What goes and comes in one scan is changed, and held all the while.
    gone.retain(|gone| appeared.iter().all(|found| found.cgroup != *gone));
    let mut engine = shared.engine();
    for cgroup in gone {
        let cgroup = below(&engine, &cgroup);
        let id = engine
            .workload_at(&cgroup)
            .filter(|workload| workload.source == WorkloadSource::Manifest)
            .map(|workload| workload.id);
        if let Some(id) = id {
            engine.remove(id);
        }
    }
    for workload in appeared {
        if let Err(error) = take_in(&mut engine, &workload) {
            tracing::error!(%error, workload = workload.name, "a workload is not held; trying again");
            sources.waiting.push(workload);
        }
    }
}

/// Lets go the workloads of an earlier daemon that no manifest selects any more. With an error in
/// a manifest it is not known which those are, and all stay held.
pub fn let_go_unselected(shared: &Shared, sources: &Sources) {
    let mut engine = shared.engine();
    if !engine.manifests.errors.is_empty() {
        return;
    }
    let selected: BTreeSet<PathBuf> =
        sources.cgroups.reported().map(|found| below(&engine, &found.cgroup)).collect();
    let unselected: Vec<_> = engine
        .workloads()
        .filter(|workload| workload.source == WorkloadSource::Manifest)
        .filter(|workload| !selected.contains(&workload.cgroup))
        .map(|workload| workload.id)
        .collect();
    for id in unselected {
        engine.remove(id);
    }
}

fn take_in(engine: &mut Engine, found: &Discovered) -> Result<(), EngineError> {
    let cgroup = below(engine, &found.cgroup);
    if let Some(known) = engine.workload_at(&cgroup) {
        let id = known.id;
        if known.cgroup_id == found.id {
            return engine.change(id, found.identity.clone(), found.mode);
        }
        // Another cgroup of the same name; the one that was held is gone.
        engine.remove(id);
    }
    engine.add(NewWorkload {
        name: found.name.clone(),
        identity: found.identity.clone(),
        cgroup,
        mode: found.mode,
        source: WorkloadSource::Manifest,
        owner: found.owner_uid,
        unit: None,
        launch: Vec::new(),
    })?;
    Ok(())
}

fn below(engine: &Engine, cgroup: &Path) -> PathBuf {
    engine.cgroup_root().join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

/// Watches the directory and the cgroups for as long as the daemon runs.
pub async fn watch(shared: Arc<Shared>, sources: Sources) {
    let directory = shared.configuration.manifests_directory.to_path_buf();
    let writing = Arc::clone(&sources.writing);
    let noted = Arc::clone(&writing);
    let mut watcher = match notify::recommended_watcher(move |event| noted.note(event)) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::error!(%error, "the manifest directory is read every second instead of watched");
            None
        }
    };
    let mut cgroups = match sources.cgroups.watch() {
        Ok(cgroups) => Some(cgroups),
        Err(error) => {
            tracing::error!(%error, "new cgroups are looked for every second");
            None
        }
    };
    let sources = Arc::new(Mutex::new(sources));
    let mut watched = None;
    let mut fingerprint = Vec::new();
    loop {
        // A directory that was replaced is another one.
        let there = inode(&directory);
        if watched != there
            && let Some(watcher) = &mut watcher
        {
            // The watch of a directory that is gone is gone with it.
            drop(watcher.unwatch(&directory));
            let is_watched = watcher.watch(&directory, RecursiveMode::NonRecursive).is_ok();
            watched = there.filter(|_| is_watched);
        }
        let told = tokio::select! {
            () = writing.settled.notified() => {
                // Whoever writes one file most likely writes another.
                tokio::time::sleep(SETTLE).await;
                true
            }
            () = changed(cgroups.as_ref()) => false,
        };
        let now = stamp(&directory);
        let again = told || now != fingerprint;
        fingerprint = now;
        let (shared, sources) = (Arc::clone(&shared), Arc::clone(&sources));
        let follow = cgroups.take();
        let work = tokio::task::spawn_blocking(move || {
            let mut sources = sources.lock().unwrap_or_else(PoisonError::into_inner);
            let mut follow = follow;
            if let Some(follow) = &mut follow {
                follow.follow(&sources.cgroups);
            }
            if again {
                load(&shared, &mut sources);
            } else {
                scan(&shared, &mut sources);
            }
            if let Some(follow) = &mut follow {
                follow.follow(&sources.cgroups);
            }
            follow
        });
        match work.await {
            Ok(follow) => cgroups = follow,
            Err(error) => {
                tracing::error!(%error, "the manifests could not be read; what is in force stays");
            }
        }
    }
}

/// Waits until cgroups came or went, or might have.
async fn changed(cgroups: Option<&CgroupWatch>) {
    match cgroups {
        Some(cgroups) => cgroups.changed().await,
        None => tokio::time::sleep(RESCAN).await,
    }
}

fn inode(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).ok().map(|found| found.ino())
}

/// What shows that a file was changed: its name, size and times.
fn stamp(directory: &Path) -> Vec<(PathBuf, u64, Option<std::time::SystemTime>)> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut stamps: Vec<_> = entries
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some((entry.path(), metadata.len(), metadata.modified().ok()))
        })
        .collect();
    stamps.sort();
    stamps
}
