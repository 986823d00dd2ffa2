//! `exec`: makes a process that is already running a workload of its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agentguard_common::{FileId, Mode};
use jiff::Timestamp;

use super::engine::{Engine, EngineError, NewWorkload, WorkloadSource, exec_grant, remove_cgroup};
use super::launch;
use crate::api::service::ServiceError;
use crate::api::types::{Confine, Confined, Expiry as ExpiryView};
use crate::fault;
use crate::grant::store::{AddError, Source};
use crate::grant::{Expiry, GrantDocument, Ttl};
use crate::identity::{SpiffeId, Subject};
use crate::scope::ScopeName;

/// Workloads of one name that may run at once.
const NAMESAKES: u32 = 10_000;
/// Tries to make a cgroup whose parent comes and goes.
const ATTEMPTS: u32 = 8;
/// An empty cgroup that is older than this waits for no process any more.
const STALE: Duration = Duration::from_secs(10);

/// The process to be confined.
pub struct Candidate {
    pub pid: u32,
    pub uid: u32,
}

/// Holds `candidate` to what `identity` and the requested scopes permit, from now on.
///
/// # Errors
///
/// When any part of it can not be done; the process is then where and what it was.
pub fn confine(
    engine: &mut Engine,
    candidate: &Candidate,
    identity: &str,
    request: &Confine,
    launch: Vec<FileId>,
) -> Result<Confined, ServiceError> {
    let scopes = parse_scopes(engine, request)?;
    let Place { name, identity, cgroup: path } = choose(engine, candidate, identity, request)?;
    let grant = match grant_of(&name, &identity, candidate, scopes, request) {
        Ok(grant) => grant,
        Err(error) => {
            remove(&path);
            return Err(error);
        }
    };
    fault::point("confine.cgroup");
    let undo = |engine: &mut Engine| {
        engine.end_grant(&name);
        remove(&path);
    };
    let id = grant.as_ref().map(|grant| grant.id.to_string());
    let expiry = grant.as_ref().map(|grant| grant.expiry);
    if let Some(grant) = grant {
        let source = Source::Exec { uid: candidate.uid };
        if let Err(error) = add_grant(engine, grant, source) {
            undo(engine);
            return Err(ServiceError::Conflict {
                error: error.to_string(),
                remedy: "give the workload another name with --name".to_owned(),
            });
        }
    }
    let added = engine.add(NewWorkload {
        name: name.clone(),
        identity: Some(identity.clone()),
        cgroup: path.clone(),
        mode: Mode::from(request.mode),
        source: WorkloadSource::Exec,
        owner: Some(candidate.uid),
        unit: None,
        launch,
        inherited: request.inherited.clone(),
        pod: None,
        containers: Vec::new(),
        owns_identity: false,
    });
    let workload = match added {
        Ok(workload) => workload,
        Err(error) => {
            undo(engine);
            return Err(unavailable(&error));
        }
    };
    fault::point("confine.held");
    // Tag and hooks are in force; the process comes last.
    let procs = path.join("cgroup.procs");
    if let Err(source) = fs::write(&procs, candidate.pid.to_string()) {
        engine.remove(workload);
        return Err(unavailable(&EngineError::Move { pid: candidate.pid, path, source }));
    }
    engine.entered(workload);
    fault::point("confine.moved");
    let below = path.strip_prefix(engine.cgroup_root()).unwrap_or(&path);
    Ok(Confined {
        workload: name,
        identity: identity.to_string(),
        grant: id,
        cgroup: format!("/{}", below.display()),
        expires_at: expiry.map(|expiry| match expiry {
            Expiry::At(time) => ExpiryView::At(time),
            Expiry::Never => ExpiryView::Never,
        }),
        warnings: Vec::new(),
    })
}

/// What the command that `request` names runs before the workload decides anything.
///
/// Looks at files that the caller names, which may take any time: to be called without the engine.
#[must_use]
pub fn launch_files(candidate: &Candidate, request: &Confine) -> Vec<FileId> {
    launch::resolve(&launch::files(&request.executable, &search_path(candidate.pid)))
}

/// Removes cgroups that a daemon which died made for a process that it never moved there. The kernel
/// removes none that has processes; one that was made just now is somebody else's.
pub(super) fn remove_abandoned(parent: &Path, known: &[PathBuf]) -> Vec<PathBuf> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory
            && !known.contains(&path)
            && is_stale(&path)
            && fs::remove_dir(&path).is_ok()
        {
            tracing::info!(path = %path.display(), "removed a cgroup that an earlier daemon left empty");
            removed.push(path);
        }
    }
    removed
}

fn is_stale(cgroup: &Path) -> bool {
    let made = fs::metadata(cgroup).and_then(|found| found.modified());
    made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > STALE))
}

fn remove(cgroup: &Path) {
    if let Err(error) = remove_cgroup(cgroup) {
        tracing::debug!(%error, path = %cgroup.display(), "a cgroup stays");
    }
}

fn add_grant(engine: &mut Engine, grant: GrantDocument, source: Source) -> Result<(), AddError> {
    // One of an earlier workload of this name is over with it.
    engine.store.end(&grant.id);
    engine.store.add(grant, source, &engine.manifests.catalogue)
}

fn parse_scopes(engine: &Engine, request: &Confine) -> Result<Vec<ScopeName>, ServiceError> {
    let mut errors = Vec::new();
    let mut scopes = Vec::new();
    for text in &request.scopes {
        match text.parse::<ScopeName>() {
            Err(error) => errors.push(format!("scopes: {text:?} {error}")),
            Ok(scope) if engine.manifests.catalogue.get(&scope).is_none() => {
                let known: Vec<&str> =
                    engine.manifests.catalogue.iter().map(|scope| scope.scope.as_str()).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                errors.push(format!(
                    "scopes: {text:?} is no scope of this node; define it in a Scope manifest, or use one of: {known}"
                ));
            }
            Ok(scope) if scopes.contains(&scope) => {}
            Ok(scope) => scopes.push(scope),
        }
    }
    if errors.is_empty() { Ok(scopes) } else { Err(ServiceError::Invalid(errors)) }
}

/// What a workload of `exec` is called, and the cgroup that was made for it.
struct Place {
    name: String,
    identity: SpiffeId,
    cgroup: PathBuf,
}

/// The name and identity of the workload. Those that the caller did not choose are made unique, so
/// that what is granted to a second run of a command does not widen the first; those it did choose
/// are taken as they are, or refused. Making the cgroup decides: one that is there already may hold
/// processes, of another daemon or of a run whose supervisor was killed, and is never taken over.
fn choose(
    engine: &Engine,
    candidate: &Candidate,
    identity: &str,
    request: &Confine,
) -> Result<Place, ServiceError> {
    let parse = |text: &str| {
        text.parse::<SpiffeId>()
            .map_err(|error| ServiceError::Invalid(vec![format!("identity: {text:?} {error}")]))
    };
    let wanted = parse(identity)?;
    let base = resource_name(request.name.as_deref().unwrap_or_else(|| {
        request.executable.file_name().and_then(|name| name.to_str()).unwrap_or("command")
    }));
    let is_taken = |name: &str| engine.workloads().any(|workload| workload.name == name);
    let is_running =
        |id: &SpiffeId| engine.workloads().any(|workload| workload.identity.as_ref() == Some(id));
    if request.identity.is_some() && candidate.uid != 0 && is_running(&wanted) {
        return Err(ServiceError::Conflict {
            error: format!(
                "a workload with the identity {wanted} runs already, and this would widen what it may do"
            ),
            remedy: "choose another --identity, or leave it out".to_owned(),
        });
    }
    for count in 1..NAMESAKES {
        let suffix = if count == 1 { String::new() } else { format!("-{count}") };
        let name = format!("{base}{suffix}");
        let identity = if request.identity.is_some() {
            wanted.clone()
        } else {
            parse(&format!("{identity}{suffix}"))?
        };
        let is_free = !is_taken(&name) && (request.identity.is_some() || !is_running(&identity));
        if is_free && let Some(cgroup) = make_cgroup(engine, &name)? {
            return Ok(Place { name, identity, cgroup });
        }
        if request.name.is_some() {
            return Err(ServiceError::Conflict {
                error: format!("a workload {base:?} runs already"),
                remedy: "choose another --name, or leave it out".to_owned(),
            });
        }
    }
    Err(ServiceError::Conflict {
        error: format!("{NAMESAKES} workloads named {base:?} run already"),
        remedy: "choose another --name".to_owned(),
    })
}

/// Makes the cgroup of a workload; `None` where there is one already.
fn make_cgroup(engine: &Engine, name: &str) -> Result<Option<PathBuf>, ServiceError> {
    let path = engine.exec_parent().join(name);
    let error = |source| unavailable(&EngineError::MakeCgroup { path: path.clone(), source });
    for _ in 0..ATTEMPTS {
        fs::create_dir_all(engine.exec_parent()).map_err(error)?;
        match fs::create_dir(&path) {
            Ok(()) => return Ok(Some(path)),
            // Another run cleared away the parent, which was empty.
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => {}
            Err(there) if there.kind() == io::ErrorKind::AlreadyExists => {
                // Left empty by a daemon that was killed while it made it. The kernel removes none
                // that has processes; one that was made just now is somebody else's.
                if !is_stale(&path) || fs::remove_dir(&path).is_err() {
                    return Ok(None);
                }
            }
            Err(source) => return Err(error(source)),
        }
    }
    Ok(None)
}

/// A name that manifests could have, out of a file's name.
fn resource_name(text: &str) -> String {
    let mut name: String = text
        .to_ascii_lowercase()
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() || letter == '-' { letter } else { '-' })
        .take(48)
        .collect();
    name = name.trim_matches('-').to_owned();
    if name.is_empty() { "command".to_owned() } else { name }
}

fn grant_of(
    name: &str,
    identity: &SpiffeId,
    candidate: &Candidate,
    scopes: Vec<ScopeName>,
    request: &Confine,
) -> Result<Option<GrantDocument>, ServiceError> {
    if scopes.is_empty() {
        return Ok(None);
    }
    let invalid = |error: String| ServiceError::Invalid(vec![error]);
    let ttl = request.ttl.as_deref().unwrap_or_default();
    let end = ttl
        .parse::<Ttl>()
        .map_err(|error| invalid(format!("ttl: {ttl:?} {error}")))?
        .after(Timestamp::now())
        .ok_or_else(|| invalid(format!("ttl: {ttl:?} ends after the last time there is")))?;
    let id = exec_grant(name);
    Ok(Some(GrantDocument {
        id: id.parse().map_err(|error| invalid(format!("name: {id:?} {error}")))?,
        subject: Subject::Exact(identity.clone()),
        scopes,
        not_before: None,
        expiry: Expiry::At(end),
        granted_by: format!("uid {}", candidate.uid),
        reason: "agentguard exec".to_owned(),
    }))
}

/// The caller's `PATH`.
fn search_path(pid: u32) -> String {
    let environment = fs::read(PathBuf::from(format!("/proc/{pid}/environ"))).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .find_map(|entry| entry.strip_prefix(b"PATH="))
        .and_then(|path| std::str::from_utf8(path).ok())
        .filter(|path| !path.is_empty())
        .unwrap_or(launch::SEARCH_PATH)
        .to_owned()
}

fn unavailable(error: &EngineError) -> ServiceError {
    ServiceError::Unavailable {
        error: error.to_string(),
        remedy: "see agentguard doctor".to_owned(),
    }
}
