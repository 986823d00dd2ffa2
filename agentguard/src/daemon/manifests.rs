//! What manifests say, from all grant sources; the manifest directory, watched; and the workloads
//! its manifests select.
//!
//! Every file, and every object of the cluster, stands for itself: one that has an error, or contradicts what is in force, keeps
//! saying what it last said without one, so that a slip of the pen changes nothing that is enforced
//! and a new file takes nothing over from an old one. What each last said is kept across restarts,
//! and written down before it is in force: a restart never goes back behind it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentguard_common::WorkloadId;
use jiff::Timestamp;
use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind};
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::Notify;

use super::custom_resources::CustomResources;
use super::engine::{Engine, EngineError, NewWorkload, WorkloadSource, are_nested};
use super::last_good::{self, Files, Said};
use super::service::Shared;
use crate::audit::record::{ManifestErrorRecord, RecordBody};
use crate::audit::text::Text;
use crate::fault;
use crate::identity::WorkloadDocument;
use crate::identity::cgroup::{CgroupSource, CgroupWatch};
use crate::identity::source::{Discovered, IdentityEvent, IdentitySource as _};
use crate::kubernetes::manifests::Objects;
use crate::manifest::{self, Creation, ManifestError, ManifestSet, assemble, files, parse_text};

/// Changes that come together are taken together.
const SETTLE: Duration = Duration::from_millis(15);
/// The same of objects of the cluster, of which each kind is told of for itself.
const SETTLE_OBJECTS: Duration = Duration::from_millis(60);
/// A change that no notification told of is found after this time, and so is a new cgroup.
const RESCAN: Duration = Duration::from_secs(1);

/// Where manifests come from. All sources together say one thing: documents of one may name those
/// of another, and contradict them.
pub trait GrantSource: Send {
    /// Whether `name` is that of a document of this source; no two sources have one name.
    fn owns(&self, name: &Path) -> bool;

    /// What every document says now. One with an error says what it said in `last`, which holds
    /// documents of this source only.
    fn read(&self, last: &Files) -> (Files, Vec<ManifestError>);
}

/// The manifest directory.
struct Directory {
    path: PathBuf,
    writing: Arc<Writing>,
}

impl GrantSource for Directory {
    fn owns(&self, name: &Path) -> bool {
        name.is_absolute()
    }

    fn read(&self, last: &Files) -> (Files, Vec<ManifestError>) {
        read(&self.path, last, &self.writing)
    }
}

/// What is known of the documents, and of the cgroups their workloads select.
pub struct Sources {
    sources: Vec<Box<dyn GrantSource>>,
    /// The objects of the cluster, where they are one of the sources.
    objects: Option<Arc<Objects>>,
    sound: Files,
    /// Whether what files said before this start is known; otherwise one with an error may be the
    /// one that selects a workload.
    remembers: bool,
    /// Whether `sound` still has to be written down.
    unsaved: bool,
    told: Vec<String>,
    cgroups: CgroupSource,
    selectors: Vec<WorkloadDocument>,
    /// Found, but not held yet.
    waiting: Vec<Discovered>,
    /// No longer selected, and held until the one that lies around or in it is.
    leaving: Vec<PathBuf>,
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
    /// The manifest directory, and the objects of the cluster where there is one.
    #[must_use]
    pub fn new(shared: &Shared, custom_resources: Option<CustomResources>) -> Self {
        let writing: Arc<Writing> = Arc::default();
        let path = shared.configuration.manifests_directory.to_path_buf();
        let mut sources: Vec<Box<dyn GrantSource>> =
            vec![Box::new(Directory { path, writing: Arc::clone(&writing) })];
        let objects = custom_resources.as_ref().map(CustomResources::objects);
        if let Some(custom_resources) = custom_resources {
            sources.push(Box::new(custom_resources));
        }
        let last = last_good::load(shared.configuration.state_directory.as_ref());
        let last = last.unwrap_or_else(|error| {
            tracing::error!(%error, "what manifests said before is not known");
            None
        });
        Self {
            sources,
            objects,
            remembers: last.is_some(),
            unsaved: last.is_none(),
            sound: last.unwrap_or_default(),
            told: Vec::new(),
            cgroups: super::cgroup_source(shared),
            selectors: Vec::new(),
            waiting: Vec::new(),
            leaving: Vec::new(),
            writing,
        }
    }
}

/// Reads all sources and puts what they say in force.
pub fn load(shared: &Shared, sources: &mut Sources) {
    load_documents(shared, sources);
    scan(shared, sources);
}

/// Reads all sources and puts in force what they say of scopes and grants.
pub fn load_documents(shared: &Shared, sources: &mut Sources) {
    let (files, mut errors) = read_all(&sources.sources, &sources.sound);
    let (files, set, contradictions) = settle(files, &sources.sound);
    sources.unsaved |= files != sources.sound;
    sources.sound = files;
    errors.extend(contradictions);
    keep(shared, sources);
    tell(shared, sources, &errors);
    let held = held(&sources.sound, &errors);
    let selectors = set.workloads.clone();
    shared.engine().apply_manifests(set, errors, held);
    if selectors != sources.selectors {
        sources.cgroups.set_selectors(selectors.clone());
        sources.selectors = selectors;
    }
}

/// Writes down what the files say, for a restart that finds one of them broken.
fn keep(shared: &Shared, sources: &mut Sources) {
    if !sources.unsaved {
        return;
    }
    match last_good::save(shared.configuration.state_directory.as_ref(), &sources.sound) {
        Ok(()) => sources.unsaved = false,
        Err(error) => tracing::error!(%error, "what manifests say is in force, and not kept"),
    }
}

/// The files with an error that are held to what they said before.
fn held(sound: &Files, errors: &[ManifestError]) -> Vec<(PathBuf, Timestamp)> {
    let wrong: BTreeSet<&Path> = errors.iter().map(|error| Path::new(&error.file)).collect();
    let held = sound.iter().filter(|(path, _)| wrong.contains(path.as_path()));
    held.map(|(path, said)| (path.clone(), said.since)).collect()
}

/// What every document of every source says.
fn read_all(sources: &[Box<dyn GrantSource>], sound: &Files) -> (Files, Vec<ManifestError>) {
    let (mut now, mut errors) = (Files::new(), Vec::new());
    for source in sources {
        let own = sound.iter().filter(|(name, _)| source.owns(name));
        let own = own.map(|(name, said)| (name.clone(), said.clone())).collect();
        let (said, wrong) = source.read(&own);
        now.extend(said);
        errors.extend(wrong);
    }
    (now, errors)
}

/// What every file of the directory says: one with an error what it last said without one.
fn read(directory: &Path, sound: &Files, writing: &Writing) -> (Files, Vec<ManifestError>) {
    let mut errors = Vec::new();
    let mut now = Files::new();
    let paths = match files(directory) {
        Ok(paths) => paths,
        // There is nothing to hold on to before the directory could be read once.
        Err(error) => return (sound.clone(), vec![error]),
    };
    for path in paths {
        if writing.contains(&path) {
            // Its end is told, and read then.
            if let Some(last) = sound.get(&path) {
                now.insert(path, last.clone());
            }
            continue;
        }
        match say(&path) {
            Ok(said) => {
                let same = sound.get(&path).filter(|last| **last == said).cloned();
                now.insert(path, same.unwrap_or(said));
            }
            Err(wrong) => {
                errors.extend(wrong);
                if let Some(last) = sound.get(&path) {
                    now.insert(path, last.clone());
                }
            }
        }
    }
    (now, errors)
}

/// What a file says, if it has no error.
fn say(path: &Path) -> Result<Said, Vec<ManifestError>> {
    let text = manifest::read(path).map_err(|error| vec![error])?;
    let (manifests, errors) = parse_text(&path.display().to_string(), &text, Creation::Unknown);
    if errors.is_empty() { Ok(Said::new(&text, manifests, Timestamp::now())) } else { Err(errors) }
}

/// Puts files together. One that has changed and contradicts the others goes back to what it said
/// before, or is left out; those that did not change come first, so they are never the ones.
fn settle(mut now: Files, sound: &Files) -> (Files, ManifestSet, Vec<ManifestError>) {
    let mut errors = Vec::new();
    loop {
        let has_changed = |path: &Path| now.get(path) != sound.get(path);
        let (changed, same): (Vec<_>, Vec<_>) =
            now.iter().partition(|(path, _)| has_changed(path.as_path()));
        let said = same.into_iter().chain(changed);
        let manifests = said.flat_map(|(_, said)| said.manifests.iter().cloned());
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
pub fn scan(shared: &Shared, sources: &mut Sources) {
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
    let mut gone = std::mem::take(&mut sources.leaving);
    let mut appeared = std::mem::take(&mut sources.waiting);
    let told: BTreeSet<PathBuf> = appeared.iter().map(|found| found.cgroup.clone()).collect();
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
    let has_changed = !gone.is_empty() || !appeared.is_empty();
    // So is what comes around one that goes, or in it: the new one takes its cgroups over. All others
    // go first, and leave their room.
    let (taken_over, gone) = nested_in(gone, &appeared);
    let_go(shared, &gone);
    for workload in appeared {
        if let Err(error) = take_in(&mut shared.engine(), &workload) {
            // Once, since an agent can have the tree looked through as often as it makes a cgroup.
            if !told.contains(&workload.cgroup) {
                tracing::error!(%error, workload = workload.name, "a workload is not held; trying again");
            }
            sources.waiting.push(workload);
        }
    }
    let (leaving, gone) = nested_in(taken_over, &sources.waiting);
    let_go(shared, &gone);
    sources.leaving = leaving;
    if has_changed {
        // One that a restart does not know is held for as long as its cgroup is there, whatever the
        // manifests say by then.
        super::save(shared);
    }
}

/// The cgroups that lie around one of `others` or in one, and those that do not.
fn nested_in(cgroups: Vec<PathBuf>, others: &[Discovered]) -> (Vec<PathBuf>, Vec<PathBuf>) {
    cgroups.into_iter().partition(|cgroup| {
        let is_nested = |other: &Discovered| are_nested(cgroup, &other.cgroup);
        others.iter().any(is_nested)
    })
}

/// Lets go the workloads that manifests selected, each by itself, so that others get their turn while many
/// go.
fn let_go(shared: &Shared, cgroups: &[PathBuf]) {
    for cgroup in cgroups {
        let mut engine = shared.engine();
        let cgroup = below(&engine, cgroup);
        let id = engine
            .workload_at(&cgroup)
            .filter(|workload| workload.source == WorkloadSource::Manifest)
            .map(|workload| workload.id);
        if let Some(id) = id {
            engine.remove(id);
        }
    }
}

/// Lets go the workloads of an earlier daemon that no manifest selects any more. With an error in
/// a manifest of which it is not known what it said before, it is not known which those are, and
/// all stay held.
pub fn let_go_unselected(shared: &Shared, sources: &mut Sources) {
    let mut engine = shared.engine();
    if !sources.remembers && !engine.manifests.errors.is_empty() {
        return;
    }
    let selected: BTreeSet<PathBuf> =
        sources.cgroups.reported().map(|found| below(&engine, &found.cgroup)).collect();
    let unselected: Vec<_> = engine
        .workloads()
        .filter(|workload| workload.source == WorkloadSource::Manifest)
        .filter(|workload| !selected.contains(&workload.cgroup))
        .map(|workload| (workload.id, workload.cgroup.clone()))
        .collect();
    for (id, cgroup) in unselected {
        // As a scan names it.
        let path = cgroup.strip_prefix(engine.cgroup_root()).map(|path| Path::new("/").join(path));
        let gives_way =
            |path: &PathBuf| sources.waiting.iter().any(|found| are_nested(path, &found.cgroup));
        match path.ok().filter(gives_way) {
            Some(path) => sources.leaving.push(path),
            None => engine.remove(id),
        }
    }
}

fn take_in(engine: &mut Engine, found: &Discovered) -> Result<(), EngineError> {
    let cgroup = below(engine, &found.cgroup);
    let before = engine.nested(&cgroup);
    let held = engine
        .let_give_way(&before, true)
        .and_then(|()| hold(engine, found, cgroup, !before.is_empty()));
    match held {
        // It may hold part of their cgroups by now. They give way until it has all, and are let go then.
        Ok(id) if !before.is_empty() => {
            fault::point("give_way.added");
            engine.must_be_whole(id)
        }
        Ok(_) => Ok(()),
        Err(error) => {
            engine.let_give_way(&before, false)?;
            Err(error)
        }
    }
}

/// Makes a cgroup a workload's, or brings the workload there up to date, whose cgroups may be another's
/// by now where there are others around it or in it.
fn hold(
    engine: &mut Engine,
    found: &Discovered,
    cgroup: PathBuf,
    are_others: bool,
) -> Result<WorkloadId, EngineError> {
    let known = engine
        .workload_at(&cgroup)
        .map(|known| (known.id, known.cgroup_id, known.gives_way || are_others));
    match known {
        Some((id, cgroup_id, may_be_anothers)) if cgroup_id == found.id => {
            engine.change(id, Some(found.identity.clone()), found.mode)?;
            if may_be_anothers {
                engine.hold_again(id);
            }
            Ok(id)
        }
        known => {
            if let Some((id, ..)) = known {
                // Another cgroup of the same name; the one that was held is gone.
                engine.remove(id);
            }
            engine.add(NewWorkload {
                name: found.name.clone(),
                identity: Some(found.identity.clone()),
                cgroup,
                mode: found.mode,
                source: WorkloadSource::Manifest,
                owner: found.owner_uid,
                unit: None,
                launch: Vec::new(),
                inherited: Vec::new(),
                pod: None,
                containers: Vec::new(),
                owns_identity: false,
            })
        }
    }
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
    let objects = sources.objects.clone();
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
            () = objects_changed(objects.as_deref()) => {
                // A grant may be told of before its scope.
                tokio::time::sleep(SETTLE_OBJECTS).await;
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
                keep(&shared, &mut sources);
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

/// Waits until objects of the cluster have changed; where there are none, for ever.
async fn objects_changed(objects: Option<&Objects>) {
    match objects {
        Some(objects) => objects.changed().await,
        None => std::future::pending().await,
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
        let (now, mut errors) = read(directory, sound, &Writing::default());
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
