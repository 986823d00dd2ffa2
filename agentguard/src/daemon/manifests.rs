//! The manifest directory, watched; and the workloads its manifests select.
//!
//! Every file stands for itself: one that has an error, or contradicts what is in force, keeps
//! saying what it last said without one, so that a slip of the pen changes nothing that is enforced
//! and a new file takes nothing over from an old one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use super::engine::{Engine, EngineError, NewWorkload, WorkloadSource};
use super::service::Shared;
use crate::audit::record::{ManifestErrorRecord, RecordBody};
use crate::audit::text::Text;
use crate::identity::WorkloadDocument;
use crate::identity::cgroup::CgroupSource;
use crate::identity::source::{Discovered, IdentityEvent, IdentitySource as _};
use crate::manifest::{Manifest, ManifestError, ManifestSet, assemble, files, parse_paths};

/// Changes that come together are taken together.
const SETTLE: Duration = Duration::from_millis(15);
/// A change that no notification told of is found after this time, and so is a new cgroup.
const RESCAN: Duration = Duration::from_secs(1);

/// What each file says.
type Files = BTreeMap<PathBuf, Vec<Manifest>>;

/// What is known of the files, and of the cgroups their workloads select.
pub struct Sources {
    sound: Files,
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
    let directory = shared.configuration.manifests_directory.as_ref();
    let (files, mut errors) = read(directory, &sources.sound);
    let (files, set, contradictions) = settle(files, &sources.sound);
    sources.sound = files;
    errors.extend(contradictions);
    tell(shared, sources, &errors);
    let selectors = set.workloads.clone();
    shared.engine().apply_manifests(set, errors);
    if selectors != sources.selectors {
        sources.cgroups.set_selectors(selectors.clone());
        sources.selectors = selectors;
    }
    scan(shared, sources);
}

/// What every file of the directory says: one with an error what it last said without one.
fn read(directory: &Path, sound: &Files) -> (Files, Vec<ManifestError>) {
    let mut errors = Vec::new();
    let mut now = Files::new();
    let paths = match files(directory) {
        Ok(paths) => paths,
        // There is nothing to hold on to before the directory could be read once.
        Err(error) => return (sound.clone(), vec![error]),
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
    (now, errors)
}

/// Puts files together. One that has changed and contradicts the others goes back to what it said
/// before, or is left out; those that did not change come first, so they are never the ones.
fn settle(mut now: Files, sound: &Files) -> (Files, ManifestSet, Vec<ManifestError>) {
    let mut errors = Vec::new();
    loop {
        let has_changed = |path: &Path| now.get(path) != sound.get(path);
        let (changed, same): (Vec<_>, Vec<_>) =
            now.iter().partition(|(path, _)| has_changed(path.as_path()));
        let manifests = same.into_iter().chain(changed).flat_map(|(_, said)| said).cloned();
        let (set, contradictions) = assemble(manifests.collect());
        let (refused, lasting): (Vec<_>, Vec<_>) =
            contradictions.into_iter().partition(|error| has_changed(Path::new(&error.file)));
        if refused.is_empty() {
            errors.extend(lasting);
            return (now, set, errors);
        }
        // Each file goes back once, so this ends. What lasts is told by the last round.
        for error in &refused {
            let path = Path::new(&error.file);
            match sound.get(path) {
                Some(last) => now.insert(path.to_owned(), last.clone()),
                None => now.remove(path),
            };
        }
        errors.extend(refused);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(name: &str, scope: &str, address: &str) -> String {
        format!(
            "apiVersion: agentguard.dev/v1alpha1\nkind: Scope\nmetadata: {{name: {name}}}\n\
             spec:\n  scope: {scope}\n  description: a test\n  egress:\n    \
             - to: [{{ipBlock: {{cidr: {address}/32}}}}]\n      \
             ports: [{{protocol: TCP, port: 443}}]\n"
        )
    }

    fn look(directory: &Path, sound: &mut Files) -> (ManifestSet, Vec<String>) {
        let (now, mut errors) = read(directory, sound);
        let (now, set, contradictions) = settle(now, sound);
        *sound = now;
        errors.extend(contradictions);
        let names = errors.iter().map(|error| {
            Path::new(&error.file).file_name().unwrap_or_default().to_string_lossy().into_owned()
        });
        (set, names.collect())
    }

    #[test]
    fn a_new_file_takes_no_scope_over() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            std::fs::write(directory.path().join(file), text).unwrap();
        };
        let mut sound = Files::new();
        write("base.yaml", &scope("base", "test:base", "192.0.2.10"));
        let (first, errors) = look(directory.path(), &mut sound);
        assert_eq!(errors, [""; 0]);
        // It sorts before, by its name and by its path.
        for name in ["bad", "base"] {
            write("a.yaml", &scope(name, "test:base", "198.51.100.20"));
            for _again in 0..2 {
                assert_eq!(
                    look(directory.path(), &mut sound),
                    (first.clone(), vec!["a.yaml".into()])
                );
            }
        }
        // A file that came to contradict goes on saying what it said.
        write("a.yaml", &scope("other", "test:other", "198.51.100.20"));
        let (both, errors) = look(directory.path(), &mut sound);
        assert_eq!((both.scopes.iter().count(), errors.len()), (2, 0));
        write("a.yaml", &scope("other", "test:base", "198.51.100.20"));
        assert_eq!(look(directory.path(), &mut sound), (both, vec!["a.yaml".into()]));
        // What was in force may go; then the other's turn has come.
        std::fs::remove_file(directory.path().join("base.yaml")).unwrap();
        let (last, errors) = look(directory.path(), &mut sound);
        assert_eq!((last.scopes.iter().count(), errors.len()), (1, 0));
    }
}
