//! The manifest directory, watched; and the workloads its manifests select.
//!
//! Every file stands for itself: one that has an error keeps saying what it last said without one,
//! so that a slip of the pen changes nothing that is enforced.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use super::engine::{Engine, EngineError, NewWorkload, WorkloadSource};
use super::service::Shared;
use crate::audit::record::{ManifestErrorRecord, RecordBody};
use crate::audit::text::Text;
use crate::identity::WorkloadDocument;
use crate::identity::cgroup::CgroupSource;
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
        }
    }
}

/// Reads the directory and puts what it says in force.
pub fn load(shared: &Shared, sources: &mut Sources) {
    let started = Instant::now();
    let directory = shared.configuration.manifests_directory.as_ref();
    let (manifests, mut errors) = read(directory, &mut sources.sound);
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
    let mut appeared = std::mem::take(&mut sources.waiting);
    let mut engine = shared.engine();
    for event in found.events {
        match event {
            IdentityEvent::Appeared(workload) => appeared.push(workload),
            IdentityEvent::Gone { cgroup } => {
                appeared.retain(|waiting| waiting.cgroup != cgroup);
                let cgroup = below(&engine, &cgroup);
                let id = engine
                    .workload_at(&cgroup)
                    .filter(|workload| workload.source == WorkloadSource::Manifest)
                    .map(|workload| workload.id);
                if let Some(id) = id {
                    engine.remove(id);
                }
            }
        }
    }
    for workload in appeared {
        if let Err(error) = take_in(&mut engine, &workload) {
            tracing::error!(%error, workload = workload.name, "a workload is not held; trying again");
            sources.waiting.push(workload);
        }
    }
}

fn take_in(engine: &mut Engine, found: &Discovered) -> Result<(), EngineError> {
    let cgroup = below(engine, &found.cgroup);
    if let Some(known) = engine.workload_at(&cgroup) {
        if known.identity == found.identity && known.mode == found.mode {
            return Ok(());
        }
        let id = known.id;
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
        inherited: Vec::new(),
    })?;
    Ok(())
}

fn below(engine: &Engine, cgroup: &Path) -> PathBuf {
    engine.cgroup_root().join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

/// Watches the directory for as long as the daemon runs.
pub async fn watch(shared: Arc<Shared>, mut sources: Sources) {
    let directory = shared.configuration.manifests_directory.to_path_buf();
    let (changed, mut changes) = mpsc::channel::<()>(1);
    let notice = move |event: notify::Result<notify::Event>| {
        let matters = event.is_ok_and(|event| !event.kind.is_access() || is_close(&event.kind));
        if matters {
            // A full channel has a change waiting already.
            let _waiting = changed.try_send(());
        }
    };
    let mut watcher = match notify::recommended_watcher(notice) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            tracing::error!(%error, "the manifest directory is read every second instead of watched");
            None
        }
    };
    let mut watched = false;
    let mut fingerprint = Vec::new();
    loop {
        if !watched && let Some(watcher) = &mut watcher {
            watched = watcher.watch(&directory, RecursiveMode::Recursive).is_ok();
        }
        let told = tokio::time::timeout(RESCAN, changes.recv()).await.is_ok();
        if told {
            tokio::time::sleep(SETTLE).await;
            while changes.try_recv().is_ok() {}
        }
        let now = stamp(&directory);
        let again = told || now != fingerprint;
        fingerprint = now;
        let shared = Arc::clone(&shared);
        let work = tokio::task::spawn_blocking(move || {
            if again {
                load(&shared, &mut sources);
            } else {
                scan(&shared, &mut sources);
            }
            sources
        });
        match work.await {
            Ok(returned) => sources = returned,
            Err(error) => {
                tracing::error!(%error, "the manifests could not be read; what is in force stays");
                return;
            }
        }
    }
}

fn is_close(kind: &notify::EventKind) -> bool {
    use notify::event::{AccessKind, AccessMode, EventKind};
    matches!(kind, EventKind::Access(AccessKind::Close(AccessMode::Write)))
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
