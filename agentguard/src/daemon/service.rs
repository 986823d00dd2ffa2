//! The daemon's verbs, as the control API calls them.

use std::net::{IpAddr, ToSocketAddrs as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use agentguard_common::abi::Moved;
use agentguard_common::event::{self, Event, Hook, RequestKind};
use agentguard_common::request::ip;
use agentguard_common::stats::{self, Counters};
use agentguard_common::{
    Action, Address, Decision, Destination, Endpoint, FileId, Mode as RequestMode, Naming, Peer,
    Permission, Protocol, Reason, Request, Verdict, decide,
};
use jiff::Timestamp;
use tokio::sync::broadcast;

use super::cluster::Health;
use super::confine::{Candidate, confine, launch_files};
use super::containers::{self, Containers, Report};
use super::engine::{Engine, Failed, Kept, Workload, WorkloadSource, now};
use super::host;
use super::launch::file_id;
use super::nri;
use super::privileges::decisive;
use super::recent::Recent;
use super::witness::{Denial, Denials};
use crate::allowlist::Permit;
use crate::allowlist::specification::Specification;
use crate::api::caller::{Caller, Viewer};
use crate::api::service::{EventFilter, Outcome, Service, ServiceError};
use crate::api::types::{
    Announced, Announcement, Confine, Confined, EventCounts, Expiry as ExpiryView, ExplainRequest,
    Explanation, GrantCounts, GrantState, GrantView, HeldManifest, LastDenial, Layer, LayerState,
    ManifestErrorView, Manifests, Mode, PodView, Protection as ProtectionView, ProtectionLevel,
    Protocol as ProtocolView, Refreshed, Starts, StartsState, Status, Target, Totals, WorkloadView,
};
use crate::audit::AuditLog;
use crate::audit::family::Family;
use crate::audit::record::BoundName;
use crate::config::Configuration;
use crate::datapath::{Datapath, DoorState, Protection};
use crate::grant::store::{RevokeError, Source, State, StoredGrant};
use crate::grant::{Expiry, GrantId};
use crate::identity::container::{Placement, PodName, Unseen};
use crate::manifest::{Creation, Manifest, parse_text};
use crate::metrics::{self, Metrics, VerdictRow};
use crate::scope::executables::Resolver;
use crate::scope::socket_directories::{DirectoryId, SocketDirectories};
use crate::scope::{ScopeDocument, UnixSocket as SocketAddress};

/// What all parts of the daemon share.
pub struct Shared {
    pub engine: Mutex<Engine>,
    pub configuration: Configuration,
    pub node: String,
    pub metrics: Metrics,
    pub audit: AuditLog,
    pub denials: Arc<Denials>,
    pub recent: Recent,
    pub started: Instant,
    pub ready: AtomicBool,
    /// What of the cluster can not be watched, where there is one.
    pub cluster: Option<Health>,
    /// Held while the state is written: of two states the later must be the one that stays. Why the
    /// last one was not written.
    pub saving: Mutex<Option<String>>,
    pub containers: Arc<Containers>,
}

impl Shared {
    /// The engine. A verb that panicked left tables and tags as they were between two writes, and
    /// the next reconciliation puts them right.
    pub fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a restart would not know the latest changes, if that is so.
    pub fn unsaved(&self) -> Option<String> {
        self.saving.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The daemon, for the control API.
#[derive(Clone)]
pub struct Daemon(pub Arc<Shared>);

impl Daemon {
    fn give(&self, caller: &Caller, manifest: &[u8]) -> Result<GrantView, ServiceError> {
        let (mut manifests, errors) =
            parse_text("request", manifest, Creation::At(Timestamp::now()));
        if !errors.is_empty() {
            return Err(ServiceError::Invalid(errors.iter().map(ToString::to_string).collect()));
        }
        let document = match (manifests.pop(), manifests.pop()) {
            (Some(Manifest::Grant(grant)), None) => grant.document,
            (Some(other), None) => {
                return Err(ServiceError::Invalid(vec![format!(
                    "kind: a {} can not be given here; send a Grant",
                    other.kind().as_str()
                )]));
            }
            (_, _) => {
                return Err(ServiceError::Invalid(vec!["send exactly one Grant".to_owned()]));
            }
        };
        let mut engine = self.0.engine();
        let unknown: Vec<String> = document
            .scopes
            .iter()
            .filter(|scope| engine.manifests.catalogue.get(scope).is_none())
            .map(|scope| {
                format!("spec.scopes: \"{scope}\" is no scope of this node; define it in a Scope manifest")
            })
            .collect();
        if !unknown.is_empty() {
            return Err(ServiceError::Invalid(unknown));
        }
        let id = document.id.clone();
        let engine_ref = &mut *engine;
        engine_ref
            .store
            .add(document, Source::Api { uid: caller.uid }, &engine_ref.manifests.catalogue)
            .map_err(|error| ServiceError::Conflict {
                error: error.to_string(),
                remedy: "give the grant another name".to_owned(),
            })?;
        engine.reconcile();
        let stored = engine.store.get(&id).ok_or_else(|| no_grant(id.as_str()))?;
        Ok(grant_view(&engine, stored, Timestamp::now()))
    }

    fn take_back(
        &self,
        caller: &Caller,
        id: &str,
        reason: &str,
    ) -> Result<GrantView, ServiceError> {
        let mut engine = self.0.engine();
        let parsed = id.parse::<GrantId>().map_err(|_invalid| no_grant(id))?;
        let by = format!("uid {}", caller.uid);
        let now = Timestamp::now();
        engine.store.revoke(&parsed, by, reason.to_owned(), now).map_err(|error| match error {
            RevokeError::Unknown(_) => no_grant(id),
            RevokeError::AlreadyOver(_) => ServiceError::Conflict {
                error: error.to_string(),
                remedy: "nothing is left to revoke".to_owned(),
            },
        })?;
        engine.reconcile();
        let stored = engine.store.get(&parsed).ok_or_else(|| no_grant(id))?;
        Ok(grant_view(&engine, stored, now))
    }

    fn hold(
        &self,
        caller: &Caller,
        identity: &str,
        request: &Confine,
        launch: Vec<FileId>,
    ) -> Result<Confined, ServiceError> {
        let mut engine = self.0.engine();
        let candidate = Candidate { pid: caller.pid, uid: caller.uid };
        let confined = confine(&mut engine, &candidate, identity, request, launch)?;
        if caller.is_alive() {
            return Ok(confined);
        }
        // The pid may have been another process's by the time it was moved.
        let id = engine.workloads().find(|found| found.name == confined.workload).map(|w| w.id);
        if let Some(id) = id {
            engine.remove(id);
        }
        Err(ServiceError::Conflict {
            error: "the process that asked to be confined is gone".to_owned(),
            remedy: "ask from a process that waits for the answer".to_owned(),
        })
    }

    /// Writes down what has changed, before whoever changed it is told that it is done.
    async fn keep(&self) {
        let shared = Arc::clone(&self.0);
        if let Err(error) = tokio::task::spawn_blocking(move || super::save(&shared)).await {
            tracing::error!(%error, "the latest changes are written later");
        }
    }
}

impl Service for Daemon {
    fn trust_domain(&self) -> &str {
        self.0.configuration.trust_domain.as_str()
    }

    fn caller_workload(&self, pid: u32) -> Result<Option<String>, ServiceError> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let unknown = |error: std::io::Error| ServiceError::Unavailable {
            error: format!("the cgroup of the caller can not be read: {error}"),
            remedy: "mount procfs at /proc".to_owned(),
        };
        let text = std::fs::read_to_string(path).map_err(unknown)?;
        let Some(below) = text.lines().find_map(|line| line.strip_prefix("0::/")) else {
            return Ok(None);
        };
        let engine = self.0.engine();
        // Who is where the daemon does not see may be anybody.
        let cgroup = crate::datapath::cgroup_id(&engine.cgroup_root().join(below));
        let cgroup = cgroup.map_err(|error| ServiceError::Unavailable {
            error: format!("whose the caller is can not be told: {error}"),
            remedy: "call from a cgroup that the daemon sees; agentguard doctor says what it does"
                .to_owned(),
        })?;
        let by_move = || {
            let has_pids = host::has_the_machines_pids();
            // Without, nothing says which of those in this cgroup it is: none has a say.
            let is_it = |(tgid, moved): &(u32, Moved)| {
                if has_pids { *tgid == pid } else { cgroup.0 == moved.cgroup }
            };
            engine.datapath.moved().into_iter().find(is_it).map(|(_, moved)| moved.workload)
        };
        let Some(id) = engine.datapath.workload_of(cgroup).or_else(by_move) else {
            return Ok(None);
        };
        let name = engine.workload(id).map(|workload| workload.name.clone());
        Ok(Some(name.unwrap_or_else(|| format!("workload {}", id.0))))
    }

    async fn status(&self) -> Result<Status, ServiceError> {
        let shared = &self.0;
        let unwritten = unwritten(shared);
        let engine = shared.engine();
        let now = Timestamp::now();
        let counts = engine.store.counts(now);
        let counters = engine.counters().map_err(|error| internal(&error))?;
        let sum = |field: fn(&Counters) -> u64| counters.iter().map(|(_, row)| field(row)).sum();
        let mut gaps: Vec<String> = engine.datapath.gaps();
        gaps.extend(engine.executable_problems().iter().cloned());
        gaps.extend(self.0.cluster.iter().flat_map(Health::problems));
        gaps.extend(unwritten);
        gaps.extend(engine.unfit());
        gaps.extend(engine.not_held());
        gaps.extend(engine.datapath.full_tables());
        gaps.extend(engine.runtimes_problem().map(str::to_owned));
        gaps.extend(engine.not_in_force().map(str::to_owned));
        let Report { unseen, problems } = shared.containers.report();
        gaps.extend(problems);
        gaps.extend(unseen.iter().map(|placement| {
            let why = match placement.unseen {
                None | Some(Unseen::Kernel) => {
                    "runs in a sandbox with a kernel of its own: nothing of it is enforced here; give it a runtime class without one"
                }
                Some(Unseen::Cgroup) => {
                    "has no cgroup of version 2 of its own: nothing of it is enforced here; have its runtime use cgroups of version 2"
                }
            };
            format!("{} {why}", placement.name)
        }));
        let undecodable = shared.denials.undecodable();
        if undecodable > 0 {
            gaps.push(format!(
                "{undecodable} records of the kernel could not be read; restart the daemon with the build that is in force"
            ));
        }
        gaps.extend(engine.workloads().filter_map(|workload| {
            let capabilities = decisive(&workload.cgroup)?;
            Some(format!(
                "workload {} runs with {capabilities} in the host's namespaces, with which it could take the guard away; run it without",
                workload.name
            ))
        }));
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: shared.node.clone(),
            uptime_seconds: shared.started.elapsed().as_secs(),
            mode: Mode::from(agentguard_common::Mode::from(shared.configuration.mode)),
            protection: protection_view(&engine.datapath),
            gaps,
            generation: engine.generation(),
            totals: Some(Totals {
                workloads: engine.workloads().count() as u64,
                grants: GrantCounts {
                    pending: counts.pending as u64,
                    active: counts.active as u64,
                    expired: counts.expired as u64,
                    revoked: counts.revoked as u64,
                },
                standing_grants: counts.standing as u64,
                manifests: Manifests {
                    directory: shared.configuration.manifests_directory.to_path_buf(),
                    last_load: engine.manifests.last_load,
                    errors: engine.manifests.errors.iter().map(error_view).collect(),
                    held: engine.manifests.held.iter().map(held_view).collect(),
                },
                events: EventCounts {
                    decided: sum(Counters::decided),
                    logged: sum(|row| row.of(stats::Fate::Logged)),
                    aggregated: sum(|row| row.of(stats::Fate::Aggregated)),
                    lost: sum(|row| row.of(stats::Fate::Lost)),
                },
                starts: starts_view(shared.containers.nri.state()),
            }),
        })
    }

    async fn workloads(&self) -> Result<Vec<WorkloadView>, ServiceError> {
        let engine = self.0.engine();
        let held = engine.workloads().map(|workload| workload_view(&engine, workload));
        let unseen = self.0.containers.report().unseen;
        Ok(held.chain(unseen.iter().map(|placement| unseen_view(&engine, placement))).collect())
    }

    async fn workload(&self, name: &str) -> Result<WorkloadView, ServiceError> {
        let engine = self.0.engine();
        let unseen = self.0.containers.report().unseen;
        if let Some(placement) = unseen.iter().find(|placement| placement.name == name) {
            return Ok(unseen_view(&engine, placement));
        }
        find(&engine, name).map(|workload| workload_view(&engine, workload))
    }

    async fn grants(&self) -> Result<Vec<GrantView>, ServiceError> {
        let engine = self.0.engine();
        let now = Timestamp::now();
        Ok(engine.store.grants().map(|grant| grant_view(&engine, grant, now)).collect())
    }

    async fn grant(&self, id: &str) -> Result<GrantView, ServiceError> {
        let engine = self.0.engine();
        let stored = id.parse::<GrantId>().ok().and_then(|id| engine.store.get(&id));
        let stored = stored.ok_or_else(|| no_grant(id))?;
        Ok(grant_view(&engine, stored, Timestamp::now()))
    }

    async fn add_grant(&self, caller: &Caller, manifest: &[u8]) -> Result<GrantView, ServiceError> {
        let given = self.give(caller, manifest)?;
        self.keep().await;
        Ok(given)
    }

    async fn revoke_grant(
        &self,
        caller: &Caller,
        id: &str,
        reason: &str,
    ) -> Result<GrantView, ServiceError> {
        let taken = self.take_back(caller, id, reason)?;
        self.keep().await;
        // Who revokes relies on it.
        if let Some(why) = self.0.engine().not_in_force() {
            return Err(ServiceError::Unavailable {
                error: format!("{id} is revoked, which is not in force yet: {why}"),
                remedy: "see agentguard status".to_owned(),
            });
        }
        match self.0.unsaved() {
            None => Ok(taken),
            Some(why) => Err(ServiceError::Unavailable {
                error: format!(
                    "{id} is revoked, which is in force and would not be after a restart: {why}"
                ),
                remedy: "make room on the disk of state_directory; it is written as soon as there is some"
                    .to_owned(),
            }),
        }
    }

    async fn confine(
        &self,
        caller: &Caller,
        identity: &str,
        request: &Confine,
    ) -> Result<Confined, ServiceError> {
        let candidate = Candidate { pid: caller.pid, uid: caller.uid };
        let asked = request.clone();
        let files = move || launch_files(&candidate, &asked);
        let launch = tokio::task::spawn_blocking(files).await.map_err(|error| internal(&error))?;
        let confined = self.hold(caller, identity, request, launch)?;
        // A daemon that is killed from here on leaves the next one what it needs to go on.
        self.keep().await;
        Ok(confined)
    }

    async fn explain(&self, request: &ExplainRequest) -> Result<Explanation, ServiceError> {
        let target = request.target.clone();
        let mounts = {
            let engine = self.0.engine();
            engine.mounts_of(find(&engine, &request.workload)?)
        };
        let asked = tokio::task::spawn_blocking(move || resolve(&target, &mounts))
            .await
            .map_err(|error| internal(&error))??;
        let mut engine = self.0.engine();
        let resolved = asked.request(&engine);
        let workload = find(&engine, &request.workload)?.clone();
        let decision = match engine.tag(&workload) {
            Some(tag) => decide(engine.tables(), &tag, &resolved, now()),
            None => Decision::deny(Reason::Unidentified),
        };
        let whose = Whose {
            name: &workload.name,
            identity: workload.identity.as_ref().map(|identity| identity.as_str()),
            mode: workload.mode,
        };
        let hook = answering(&engine.datapath, &resolved);
        Ok(explanation(&mut engine, whose, request.target.clone(), &resolved, &decision, hook))
    }

    async fn last_denial(
        &self,
        viewer: &Viewer,
        workload: Option<&str>,
    ) -> Result<Option<LastDenial>, ServiceError> {
        let mut engine = self.0.engine();
        let running = match workload.map(|name| find(&engine, name)) {
            Some(Ok(workload)) => Some(workload.id),
            // One that has ended is known by its denials.
            Some(Err(_)) | None => None,
        };
        let denial = self.0.denials.last(|denial| {
            let is_wanted = workload.is_none_or(|wanted| {
                running == Some(denial.event.key.workload)
                    || denial.workload == wanted
                    || denial.identity.as_deref() == Some(wanted)
            });
            is_wanted && viewer.sees(denial.identity.as_deref()) && target_of(denial).is_some()
        });
        match denial {
            Some(denial) => Ok(last_denial(&mut engine, &denial)),
            None => match (workload, running) {
                (Some(name), None) => {
                    Err(ServiceError::NotFound { what: "workload", name: name.to_owned() })
                }
                (Some(_) | None, _) => Ok(None),
            },
        }
    }

    async fn announce(&self, announcement: &Announcement) -> Result<Announced, ServiceError> {
        containers::announce(&self.0, announcement).await
    }

    async fn set_diagnostics(&self, enabled: bool) -> Result<(), ServiceError> {
        let mut settings = super::settings(&self.0.configuration);
        settings.diagnostics = u32::from(enabled);
        self.0.engine().datapath.set(settings).map_err(|error| internal(&error))
    }

    async fn refresh_executables(&self) -> Result<Refreshed, ServiceError> {
        let mut engine = self.0.engine();
        let executables = engine.refresh_executables() as u64;
        Ok(Refreshed { generation: engine.generation(), executables })
    }

    async fn recent_events(
        &self,
        viewer: &Viewer,
        filter: &EventFilter,
    ) -> Result<Vec<Arc<str>>, ServiceError> {
        Ok(self.0.recent.select(viewer, filter))
    }

    fn subscribe(&self) -> broadcast::Receiver<Arc<str>> {
        self.0.audit.subscribe()
    }

    fn render_metrics(&self) -> String {
        if let Err(error) = refresh_metrics(&self.0) {
            tracing::error!(%error, "the kernel's counters can not be read");
        }
        self.0.metrics.render().unwrap_or_else(|error| {
            tracing::error!(%error, "the metrics can not be shown");
            String::new()
        })
    }

    fn ready(&self) -> Result<(), String> {
        if !self.0.ready.load(Ordering::Acquire) {
            return Err("the manifests are not in force yet".to_owned());
        }
        self.0.engine().not_in_force().map_or(Ok(()), |why| Err(why.to_owned()))
    }

    fn record_request(&self, outcome: Outcome) {
        let route = outcome.route.map_or("unknown", |route| route.path());
        self.0.metrics.api_answered(route, outcome.status);
    }
}

/// Brings all gauges and counters up to date.
fn refresh_metrics(shared: &Shared) -> Result<(), crate::datapath::DatapathError> {
    let mut engine = shared.engine();
    for reconciliation in engine.take_reconciliations() {
        match reconciliation {
            Ok(took) => shared.metrics.reconciled(took),
            Err(Failed) => shared.metrics.reconcile_failed(),
        }
    }
    let rows = engine.counters()?;
    let rows: Vec<(Option<String>, Counters)> = rows
        .into_iter()
        .map(|(identity, counters)| (identity.map(|identity| identity.to_string()), counters))
        .collect();
    let rows: Vec<VerdictRow<'_>> = rows
        .iter()
        .map(|(identity, counters)| VerdictRow { identity: identity.as_deref(), counters })
        .collect();
    let metrics = &shared.metrics;
    metrics.set_verdicts(&rows);
    metrics.set_without_row(engine.identities_without_row());
    let states = engine.datapath.states();
    let layers = event::Layer::ALL.map(|layer| (layer, kept(&Protection::of_layer(states, layer))));
    for (layer, protection) in layers {
        metrics.set_protection(layer, protection);
    }
    let unseen = shared.containers.report().unseen;
    let mut by_layer = Vec::new();
    let mut workloads = Vec::new();
    for workload in engine.workloads() {
        let identity = workload.identity.as_ref().map_or("", |identity| identity.as_str());
        let Kept { all, layers } = engine.kept_for(workload);
        workloads.push((workload.mode, kept(&all), 1));
        by_layer.extend(layers.iter().map(|(layer, held)| (*layer, kept(held), identity, 1)));
    }
    for placement in &unseen {
        let identity = placement.identity.as_ref().map_or("", |identity| identity.as_str());
        let none = metrics::Protection::None;
        workloads.push((placement.mode, none, 1));
        by_layer.extend(event::Layer::ALL.map(|layer| (layer, none, identity, 1)));
    }
    metrics.set_workload_protection(&by_layer);
    metrics.set_workloads(&workloads);
    let counts = engine.store.counts(Timestamp::now());
    metrics.set_grants(metrics::GrantCounts {
        pending: counts.pending as u64,
        active: counts.active.saturating_sub(counts.standing) as u64,
        standing: counts.standing as u64,
        expired: counts.expired as u64,
        revoked: counts.revoked as u64,
    });
    metrics.set_allowlist(engine.generation(), engine.entries());
    metrics.set_nri_connected(matches!(shared.containers.nri.state(), nri::State::Connected(_)));
    metrics.set_manifest_errors(engine.manifests.errors.len() as u64);
    metrics.set_cluster_left_out(shared.cluster.as_ref().map_or(0, Health::left_out));
    for fill in engine.datapath.fill() {
        metrics.set_map(fill.table, fill.entries as u64, fill.capacity as u64);
    }
    let counts = shared.audit.counts();
    metrics.set_audit(metrics::AuditTotals {
        written: counts.written,
        lost: counts.lost,
        bytes: counts.bytes,
        write_failures: counts.write_failures,
        rotations: counts.rotations,
        failing: counts.failing,
    });
    Ok(())
}

/// Whether the container runtime waits for the daemon.
fn starts_view(state: nri::State) -> Option<Starts> {
    let starts = |state, runtime| Some(Starts { state, runtime });
    match state {
        nri::State::Off => None,
        nri::State::Absent => starts(StartsState::Absent, None),
        nri::State::Connected(runtime) => starts(StartsState::Wait, Some(runtime.to_string())),
        nri::State::Lost(_) => starts(StartsState::Lost, None),
    }
}

fn internal(error: &impl std::fmt::Display) -> ServiceError {
    ServiceError::Unavailable {
        error: error.to_string(),
        remedy: "see the daemon's log".to_owned(),
    }
}

fn no_grant(id: &str) -> ServiceError {
    ServiceError::NotFound { what: "grant", name: id.to_owned() }
}

fn is(workload: &Workload, identity: &str) -> bool {
    workload.identity.as_ref().is_some_and(|known| known.as_str() == identity)
}

/// A workload by name, identity or cgroup.
fn find<'a>(engine: &'a Engine, wanted: &str) -> Result<&'a Workload, ServiceError> {
    let cgroup = engine.cgroup_root().join(wanted.trim_start_matches('/'));
    let by_name = engine.workloads().find(|workload| workload.name == wanted);
    by_name
        .or_else(|| engine.workloads().find(|workload| is(workload, wanted)))
        .or_else(|| engine.workload_at(&cgroup).filter(|_| wanted.starts_with('/')))
        .ok_or_else(|| ServiceError::NotFound { what: "workload", name: wanted.to_owned() })
}

/// How much of the promise is kept, door by door.
#[must_use]
pub fn protection_view(datapath: &Datapath) -> ProtectionView {
    let layers = datapath.states().iter().map(|(door, state)| {
        let (state, reason) = match state {
            DoorState::Active => (LayerState::Active, None),
            DoorState::Unavailable(reason) => (LayerState::Unavailable, Some(reason.clone())),
        };
        let remedy = reason.as_ref().map(|_| {
            format!("without it nothing closes this door: {}; see agentguard doctor", door.closes)
        });
        let layer = door.layer.as_str().to_owned();
        Layer { layer, hook: door.hook.to_owned(), state, reason, remedy }
    });
    ProtectionView { level: level(&datapath.protection()), layers: layers.collect() }
}

/// The words of metrics for how much is kept.
const fn kept(protection: &Protection) -> metrics::Protection {
    match protection {
        Protection::Full => metrics::Protection::Full,
        Protection::Partial(_) => metrics::Protection::Partial,
        Protection::None => metrics::Protection::None,
    }
}

const fn level(protection: &Protection) -> ProtectionLevel {
    match protection {
        Protection::Full => ProtectionLevel::Full,
        Protection::Partial(_) => ProtectionLevel::Partial,
        Protection::None => ProtectionLevel::None,
    }
}

/// What is not on disk that should be, one sentence each.
fn unwritten(shared: &Shared) -> Vec<String> {
    let state =
        shared.unsaved().map(|why| format!("a restart would not know the latest changes: {why}"));
    let counts = shared.audit.counts();
    let log = counts.failing.then(|| {
        format!(
            "the audit log can not be written: {} of the daemon's records wait and {} are lost, and the \
             kernel's wait in its rings; free its disk",
            counts.queued, counts.lost
        )
    });
    state.into_iter().chain(log).collect()
}

fn held_view((file, since): &(PathBuf, Timestamp)) -> HeldManifest {
    HeldManifest { file: file.clone(), since: *since }
}

fn error_view(error: &crate::manifest::ManifestError) -> ManifestErrorView {
    let position = error.position;
    let message = match &error.value {
        Some(value) => format!("{value} {}; {}", error.message, error.remedy),
        None => format!("{}; {}", error.message, error.remedy),
    };
    ManifestErrorView {
        file: PathBuf::from(&error.file),
        line: position.map_or(0, |position| position.line as u64),
        column: position.map_or(0, |position| position.column as u64),
        field: error.field.clone().unwrap_or_default(),
        message,
    }
}

fn workload_view(engine: &Engine, workload: &Workload) -> WorkloadView {
    let below = workload.cgroup.strip_prefix(engine.cgroup_root()).unwrap_or(&workload.cgroup);
    let tag = engine.tag(workload);
    let denied = tag.and_then(|tag| engine.datapath.counters(tag.counters).ok()).map_or(0, |row| {
        row.iter().filter(|(_, _, verdict, _)| verdict.reason().is_some()).map(|(.., n)| n).sum()
    });
    WorkloadView {
        name: workload.name.clone(),
        identity: workload.identity.as_ref().map(ToString::to_string),
        cgroup: format!("/{}", below.display()),
        mode: workload.mode.into(),
        protection: level(&engine.kept_for(workload).all),
        source: workload.source.as_str().to_owned(),
        processes: processes(&workload.cgroup),
        generation: tag.map_or(0, |tag| u64::from(tag.allowlist.0)),
        created: workload.created,
        owner: workload.owner,
        pod: workload.pod.as_ref().map(pod_view),
        containers: workload.containers.iter().map(|container| container.name.clone()).collect(),
        denied,
    }
}

/// A workload that this kernel does not see into.
fn unseen_view(engine: &Engine, placement: &Placement) -> WorkloadView {
    WorkloadView {
        name: placement.name.clone(),
        identity: placement.identity.as_ref().ok().map(ToString::to_string),
        cgroup: placement.cgroup.display().to_string(),
        mode: placement.mode.into(),
        protection: ProtectionLevel::None,
        source: WorkloadSource::Container.as_str().to_owned(),
        processes: processes(
            &engine
                .cgroup_root()
                .join(placement.cgroup.strip_prefix("/").unwrap_or(&placement.cgroup)),
        ),
        generation: 0,
        created: Timestamp::now(),
        owner: None,
        pod: placement.pod.as_ref().map(pod_view),
        containers: placement.containers.iter().map(|container| container.name.clone()).collect(),
        denied: 0,
    }
}

fn pod_view(pod: &PodName) -> PodView {
    let PodName { namespace, name, uid } = pod.clone();
    PodView { namespace, name, uid }
}

/// Processes in a cgroup and all below it.
fn processes(cgroup: &Path) -> u64 {
    let own = std::fs::read_to_string(cgroup.join("cgroup.procs"))
        .map_or(0, |pids| pids.lines().count() as u64);
    let below = std::fs::read_dir(cgroup).into_iter().flatten().flatten();
    let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    own + below.map(|entry| processes(&entry.path())).sum::<u64>()
}

fn grant_view(engine: &Engine, stored: &StoredGrant, now: Timestamp) -> GrantView {
    let document = &stored.document;
    GrantView {
        id: document.id.to_string(),
        subject: document.subject.as_str().to_owned(),
        scopes: document.scopes.iter().map(ToString::to_string).collect(),
        not_before: document.not_before,
        expires_at: expiry_view(document.expiry),
        state: match engine.store.state_of(stored, now) {
            State::Pending => GrantState::Pending,
            State::Active => GrantState::Active,
            State::Expired => GrantState::Expired,
            State::Revoked(_) => GrantState::Revoked,
        },
        source: stored.source.as_str().to_owned(),
        granted_by: document.granted_by.clone(),
        reason: document.reason.clone(),
    }
}

const fn expiry_view(expiry: Expiry) -> ExpiryView {
    match expiry {
        Expiry::At(time) => ExpiryView::At(time),
        Expiry::Never => ExpiryView::Never,
    }
}

/// What a target stands for, before the names of unix sockets have their numbers.
enum Asked {
    Request(Request),
    Unix { directory: Option<DirectoryId>, name: Vec<u8> },
    Abstract { name: Vec<u8> },
}

impl Asked {
    /// Of a unix socket it is asked as of somebody else's: the workload's own are its own affair.
    fn request(self, engine: &Engine) -> Request {
        match self {
            Self::Request(request) => request,
            Self::Unix { directory, name } => {
                Request::UnixConnect(engine.unix_socket(directory, &name), Peer::Other)
            }
            Self::Abstract { name } => {
                Request::UnixConnect(engine.abstract_unix_socket(&name), Peer::Other)
            }
        }
    }
}

/// The request that a target stands for.
fn resolve(target: &Target, mounts: &[Resolver]) -> Result<Asked, ServiceError> {
    let invalid = |error: String| ServiceError::Invalid(vec![error]);
    let destination = |host: &str, port: u16, protocol: ProtocolView| {
        let address = match host.parse::<IpAddr>() {
            Ok(address) => address,
            Err(_) => (host, port)
                .to_socket_addrs()
                .ok()
                .and_then(|mut addresses| addresses.next())
                .map(|address| address.ip())
                .ok_or_else(|| {
                    invalid(format!("target.host: {host:?} is no address and no name that resolves; write an address"))
                })?,
        };
        let address = Address::from(address);
        Ok(Destination { address, protocol: number(protocol), port })
    };
    Ok(Asked::Request(match target {
        Target::Connect { host, port, protocol } => {
            Request::Connect(destination(host, *port, *protocol)?)
        }
        Target::Send { host, port, protocol } => {
            Request::Send(destination(host, *port, *protocol)?)
        }
        Target::Bind { port, protocol } => {
            Request::Bind(Endpoint { protocol: number(*protocol), port: *port })
        }
        Target::Listen { port, protocol } => {
            Request::Listen(Endpoint { protocol: number(*protocol), port: *port })
        }
        Target::Socket { family: Family(family), protocol } => {
            Request::Socket { family: *family, protocol: *protocol }
        }
        Target::Unix { path } => {
            let name = path.file_name().filter(|_| path.is_absolute()).ok_or_else(|| {
                invalid(format!(
                    "target.path: {} is no absolute path of a socket; write one",
                    path.display()
                ))
            })?;
            let found = mounts.iter().map(|mounts| SocketDirectories::at_present(mounts, path));
            let directory = first(found).unwrap_or(Ok(None)).map_err(|error| internal(&error))?;
            return Ok(Asked::Unix { directory, name: name.as_bytes().to_vec() });
        }
        Target::Abstract { name } => {
            return Ok(Asked::Abstract { name: name.as_bytes().to_vec() });
        }
        Target::Exec { path } => {
            let found = mounts.iter().map(|mounts| file_id(mounts, path));
            let nowhere = || Err("the workload has no container now".to_owned());
            let file = first(found).unwrap_or_else(nowhere).map_err(|error| {
                invalid(format!(
                    "target.path: {}: {error}; name a file that is there",
                    path.display()
                ))
            })?;
            Request::Exec(file, Naming::Named)
        }
    }))
}

/// The first that was found, else why the last was not.
fn first<T, E>(found: impl Iterator<Item = Result<T, E>>) -> Option<Result<T, E>> {
    let mut last = None;
    for found in found {
        let is_found = found.is_ok();
        last = Some(found);
        if is_found {
            break;
        }
    }
    last
}

const fn number(protocol: ProtocolView) -> u8 {
    match protocol {
        ProtocolView::Tcp => ip::TCP,
        ProtocolView::Udp => ip::UDP,
        ProtocolView::Sctp => ip::SCTP,
        ProtocolView::Icmp => ip::ICMP,
    }
}

/// The target of a record, where `explain` can be asked about it.
fn target_of(denial: &Denial) -> Option<(Target, Request)> {
    let event = &denial.event;
    let kind = RequestKind::try_from(event.kind).ok()?;
    let protocol = match Protocol::try_from(event.key.protocol) {
        Ok(Protocol::Tcp) => Some(ProtocolView::Tcp),
        Ok(Protocol::Udp) => Some(ProtocolView::Udp),
        Ok(Protocol::Sctp) => Some(ProtocolView::Sctp),
        Ok(Protocol::Icmp) => Some(ProtocolView::Icmp),
        Ok(Protocol::Any) | Err(_) => None,
    };
    let host = event.address().ip().to_string();
    let port = event.key.port;
    let destination = Destination { address: event.address(), protocol: event.key.protocol, port };
    let endpoint = Endpoint { protocol: event.key.protocol, port };
    Some(match kind {
        RequestKind::Connect => {
            (Target::Connect { host, port, protocol: protocol? }, Request::Connect(destination))
        }
        RequestKind::Send | RequestKind::Packet => {
            (Target::Send { host, port, protocol: protocol? }, Request::Send(destination))
        }
        RequestKind::Bind | RequestKind::Reply => {
            (Target::Bind { port, protocol: protocol? }, Request::Bind(endpoint))
        }
        RequestKind::Listen | RequestKind::Accept => {
            (Target::Listen { port, protocol: protocol? }, Request::Listen(endpoint))
        }
        RequestKind::Socket => {
            let (family, protocol) = event.socket();
            let target = Target::Socket { family: Family(family), protocol };
            (target, Request::Socket { family, protocol })
        }
        RequestKind::UnixConnect => {
            let request = Request::UnixConnect(event.unix_socket(), Peer::Other);
            (bound_by(&denial.socket)?, request)
        }
        RequestKind::UnixSend => {
            let request = Request::UnixSend(event.unix_socket(), Peer::Other);
            (bound_by(&denial.socket)?, request)
        }
        RequestKind::Exec => {
            let path = denial.path.clone()?;
            (Target::Exec { path }, Request::Exec(event.file(), Naming::Named))
        }
        RequestKind::RawSocket | RequestKind::Leave | RequestKind::Malformed => return None,
    })
}

/// The target of the name that a server bound. What is no text is shown as near to it as can be.
fn bound_by(name: &BoundName) -> Option<Target> {
    let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    match name {
        BoundName::Path(path) => Some(Target::Unix { path: text(path).into() }),
        BoundName::Abstract(name) => Some(Target::Abstract { name: text(name) }),
        BoundName::None => None,
    }
}

fn last_denial(engine: &mut Engine, denial: &Denial) -> Option<LastDenial> {
    let (target, request) = target_of(denial)?;
    let whose = Whose {
        name: &denial.workload,
        identity: denial.identity.as_deref(),
        mode: agentguard_common::Mode::try_from(denial.event.mode).ok()?,
    };
    let verdict = Verdict::try_from(denial.event.verdict).ok()?;
    let hook = Hook::try_from(denial.event.hook).ok();
    let Event { scope, grant, .. } = denial.event;
    let decision = Decision { verdict, permission: Permission { expires_at: 0, scope, grant } };
    Some(LastDenial {
        time: denial.time,
        pid: denial.event.pid,
        executable: denial.executable.clone(),
        explanation: explanation(engine, whose, target, &request, &decision, hook),
    })
}

/// The workload that a verdict is about, which may have ended.
#[derive(Clone, Copy)]
struct Whose<'a> {
    name: &'a str,
    identity: Option<&'a str>,
    mode: agentguard_common::Mode,
}

fn explanation(
    engine: &mut Engine,
    whose: Whose<'_>,
    target: Target,
    request: &Request,
    decision: &Decision,
    hook: Option<Hook>,
) -> Explanation {
    let Decision { verdict, permission } = *decision;
    let scope = engine.names.scope_word(permission.scope);
    let grant = engine.names.grant_word(permission.grant);
    let expires_at = grant
        .as_ref()
        .and_then(|grant| engine.store.get(&grant.parse().ok()?))
        .map(|stored| expiry_view(stored.document.expiry));
    let fate = Fate::of(verdict, whose.mode, hook.is_some());
    let because = because(verdict, scope.as_deref(), grant.as_deref(), whose.identity, fate);
    let permitting_scopes = match verdict {
        Verdict::Deny(_) => permitting_scopes(engine, whose.name, &target, request),
        Verdict::Allow | Verdict::Unmanaged => Vec::new(),
    };
    Explanation {
        workload: whose.name.to_owned(),
        identity: whose.identity.map(str::to_owned),
        hook: hook.map(|hook| hook.as_str().to_owned()),
        layer: hook.map(|hook| hook.layer().as_str().to_owned()),
        target,
        verdict: verdict.into(),
        reason: verdict.reason().map(|reason| reason.as_str().to_owned()),
        mode: whose.mode.into(),
        refused: fate == Fate::Refused,
        scope,
        grant,
        expires_at,
        because,
        permitting_scopes,
        remedy: Vec::new(),
    }
}

/// What is done about a denial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Refused,
    /// In audit mode.
    LetThrough,
    /// No hook of this kernel meets it.
    Unmet,
}

impl Fate {
    fn of(verdict: Verdict, mode: RequestMode, is_met: bool) -> Self {
        match verdict.action(mode) {
            Action::Refuse if is_met => Self::Refused,
            Action::Refuse => Self::Unmet,
            Action::Pass => Self::LetThrough,
        }
    }
}

fn because(
    verdict: Verdict,
    scope: Option<&str>,
    grant: Option<&str>,
    identity: Option<&str>,
    fate: Fate,
) -> String {
    let identity = identity.unwrap_or("this workload");
    let needs_none = scope.is_none() && grant.is_none();
    let scope = scope.unwrap_or("no scope");
    let grant = grant.unwrap_or("no grant");
    let reason = match verdict {
        Verdict::Unmanaged => return "the process is no workload's".to_owned(),
        Verdict::Allow if needs_none => return "it needs no permission".to_owned(),
        Verdict::Allow => {
            return format!("scope {scope} permits it, granted to {identity} by {grant}");
        }
        Verdict::Deny(reason) => reason,
    };
    let why = match reason {
        Reason::NotGranted => format!("no scope granted to {identity} covers it"),
        Reason::PortNotGranted => {
            format!(
                "a scope granted to {identity} covers the address, but not this port and protocol"
            )
        }
        Reason::Excepted => "the address is excepted from the block that covers it".to_owned(),
        Reason::Expired => format!("scope {scope} permitted it, and grant {grant} is over"),
        Reason::Metadata => {
            "it is a cloud's metadata address, which only a scope that names exactly it permits"
                .to_owned()
        }
        Reason::Unidentified => "the workload's identity is not known yet".to_owned(),
        Reason::Malformed => "the request could not be read".to_owned(),
        Reason::RawSocket => "raw IP sockets are not granted to anybody".to_owned(),
        Reason::UnnamedFile => {
            "the file has no name: it is in memory only, or was deleted".to_owned()
        }
        Reason::ReplacedFile => "the file was replaced since it was granted".to_owned(),
        Reason::LeftWorkload => "the process left its workload's cgroup".to_owned(),
        Reason::MissingTable => "the kernel's tables do not hold what the tag points to".to_owned(),
        Reason::SocketFamily => "sockets of this family are not granted to anybody".to_owned(),
    };
    match fate {
        Fate::Refused => why,
        Fate::LetThrough => format!("{why}; in audit mode it is let through"),
        Fate::Unmet => format!("{why}; no hook of this kernel meets it, so it is let through"),
    }
}

/// The hook that answers a request on this kernel; of two the one that answers first.
fn answering(datapath: &Datapath, request: &Request) -> Option<Hook> {
    let v4_or_v6 = |destination: &Destination, v4, v6| {
        vec![if destination.address.ip().is_ipv4() { v4 } else { v6 }]
    };
    let hooks = match request {
        Request::Connect(destination) => v4_or_v6(destination, Hook::Connect4, Hook::Connect6),
        Request::Send(destination) => v4_or_v6(destination, Hook::Sendmsg4, Hook::Sendmsg6),
        Request::Packet(_) | Request::Reply(_) => vec![Hook::Egress],
        Request::Bind(_) => vec![Hook::Bind4],
        Request::RawSocket { .. } => vec![Hook::SockCreate],
        Request::Listen(_) => vec![Hook::SocketListen],
        Request::Accept(_) => vec![Hook::SocketAccept],
        Request::Socket { .. } => vec![Hook::SocketCreate],
        Request::UnixConnect(..) => vec![Hook::UnixStreamConnect],
        Request::UnixSend(..) => vec![Hook::UnixMaySend],
        Request::Exec(..) => vec![Hook::BprmCheck, Hook::Exec],
        Request::Leave(_) => vec![Hook::Leave],
        Request::Malformed => Vec::new(),
    };
    let is_active = |hook: &Hook| {
        let mut states = datapath.states().iter();
        states.any(|(door, state)| door.hook == hook.as_str() && matches!(state, DoorState::Active))
    };
    hooks.into_iter().find(is_active)
}

/// Scopes of the catalogue that would permit a request, by the naive reading of each.
fn permitting_scopes(
    engine: &mut Engine,
    workload: &str,
    target: &Target,
    request: &Request,
) -> Vec<String> {
    if let Request::UnixConnect(socket, _) | Request::UnixSend(socket, _) = request
        && !socket.name.is_some()
    {
        // No scope mentioned it then; one that does by now is known by what it says.
        let address = match target {
            Target::Unix { path } => {
                path.to_str().and_then(|path| SocketAddress::at_path(path).ok())
            }
            Target::Abstract { name } => SocketAddress::abstract_name(name).ok(),
            Target::Connect { .. }
            | Target::Send { .. }
            | Target::Bind { .. }
            | Target::Listen { .. }
            | Target::Socket { .. }
            | Target::Exec { .. } => None,
        };
        let names_it = |scope: &&ScopeDocument| {
            address.as_ref().is_some_and(|address| scope.unix_sockets.contains(address))
        };
        let scopes = engine.manifests.catalogue.iter().filter(names_it);
        return scopes.map(|scope| scope.scope.to_string()).collect();
    }
    let reserved = engine.cluster().reserved();
    let permits = |permit: Permit| {
        let specification = Specification::within(&[permit], &reserved);
        specification.decide(request, 0).verdict == Verdict::Allow
    };
    let workload = engine.workloads().find(|known| known.name == workload).cloned();
    engine
        .scope_permits(workload.as_ref())
        .into_iter()
        .filter(|(_, permit)| permits(permit.clone()))
        .map(|(scope, _)| scope)
        .collect()
}

/// What was denied, one sentence each, oldest first.
#[must_use]
pub fn describe_denials(engine: &Engine, denials: &Denials) -> Vec<String> {
    let all = denials.all();
    let described = all.iter().filter_map(|denial| {
        let mode = agentguard_common::Mode::try_from(denial.event.mode).ok()?;
        let verdict = Verdict::try_from(denial.event.verdict).ok()?;
        let fate = Fate::of(verdict, mode, true);
        let scope = engine.names.scope_word(denial.event.scope);
        let grant = engine.names.grant_word(denial.event.grant);
        let identity = denial.identity.as_deref();
        let why = because(verdict, scope.as_deref(), grant.as_deref(), identity, fate);
        let what = match target_of(denial) {
            Some((target, _)) => target.to_string(),
            None => RequestKind::try_from(denial.event.kind).ok()?.as_str().to_owned(),
        };
        Some(format!("denied: {what}: {why}"))
    });
    described.collect()
}
