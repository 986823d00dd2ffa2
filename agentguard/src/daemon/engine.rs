//! The state of the daemon and every change of it: workloads, grants, allow-lists, and what the
//! kernel holds of them.
//!
//! One value behind one lock; each verb leaves the kernel with the old or the new, never between.
//! Everything that decides what is permitted is a pure function that this calls; what it does
//! itself is order: tables first, then the tag, then the hooks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirEntryExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agentguard_common::allowlist::{NEVER, UnixName};
use agentguard_common::stats::{Counters, Fate, OTHER};
use agentguard_common::{
    AllowlistId, CgroupId, FileId, GrantId as GrantNumber, IdentityId, Layer, Mode, RuleSetId,
    ScopeId, Tag, UnixNameId, UnixSocket, WorkloadId,
};
use jiff::{SignedDuration, Timestamp};

use super::container_files::{ContainerFiles, ContainerRef};
use super::host;
use super::losses::Losses;
use super::names::{NUMBERS_AHEAD, Names, WorkloadName, pod_record};
use super::state::{SavedState, SavedWorkload};
use super::unix_names::UnixNames;
use crate::allowlist::compile::{CompileError, CompiledAllowlist, Rows, RowsError, compile_within};
use crate::allowlist::reserved::Reserved;
use crate::allowlist::tables::TableSet;
use crate::allowlist::{Block, EgressPermit, Permit, PortRange};
use crate::api::types::InheritedSocket;
use crate::audit::AuditLog;
use crate::audit::record::{
    Actor, ActorSource, GrantChange, GrantRecord, Inherited, Missing, ProtectionWord, RecordBody,
    Word, Workload as NamedWorkload, WorkloadChange, WorkloadRecord,
};
use crate::audit::text::Text;
use crate::config::{Configuration, HostError};
use crate::datapath::{Datapath, DatapathError, Door, DoorState, LoadError, Protection, cgroup_id};
use crate::fault;
use crate::grant::clock::{Clock, boot_ns};
use crate::grant::store::{GrantStore, Phase, Revocation, Source, State, StoredGrant};
use crate::grant::{Expiry, GrantId, RestoreError};
use crate::identity::container::{PodName, cgroup_of};
use crate::identity::{SpiffeId, Subject};
use crate::manifest::{ManifestError, ManifestSet};
use crate::reconcile::{self, Step};
use crate::scope::cluster::{Cluster, Targets};
use crate::scope::executables::{Admission, Pinned, Resolver};
use crate::scope::socket_directories::{DirectoryId, SocketDirectories};
use crate::scope::{Catalogue, Destination, ScopeDocument, UnixSocket as SocketAddress};

/// What is wrong as long as this build does not hold all that another one holds.
const NOT_WHOLE: &str = "another build of the kernel half stays in force until this one holds every workload whole: \
    what changes meanwhile, a revocation too, is not in force; make room in datapath.maps";
/// How long an allow-list that no tag leads to stays, so that a program that read the tag before
/// the switch still finds it. Programs run for microseconds.
const GRACE: Duration = Duration::from_secs(1);
/// How often a start waits for room that the rows of an earlier daemon take, each time for [`GRACE`].
const ROUNDS_FOR_ROOM: u32 = 10;
/// How often losses are looked for at most.
const LOOK_FOR_LOSSES: Duration = Duration::from_secs(1);
/// How long a name of unix sockets that no scope mentions keeps its number.
const NAME_GRACE: Duration = Duration::from_secs(60);
/// How often the directories of unix sockets are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// How many of them at a time.
const LOOKED_AT: usize = 256;
/// How long the end of a grant stays a reason of its own.
const REMEMBERED_END: SignedDuration = SignedDuration::from_hours(1);
/// How long a grant that was given at run time is shown after its end.
const KEPT_GRANT: Duration = Duration::from_secs(24 * 3600);
/// After how many ticks, twice, a word that nothing has any more is forgotten: ticks and not time, as
/// a daemon that was stopped has records to read first.
const TICKS_TO_FORGET: u64 = 50;
/// Reconciliations that wait to be counted.
const KEPT_RECONCILIATIONS: usize = 65_536;
/// The scope by which a command that was named to `exec`, or what a container starts with, may itself
/// be run.
pub(super) const LAUNCH: &str = "agentguard:launch";

/// A workload of this node.
#[derive(Clone, Debug)]
pub struct Workload {
    pub id: WorkloadId,
    pub name: String,
    /// `None` while it is known to be an agent but not which: it is denied everything.
    pub identity: Option<SpiffeId>,
    /// The directory of its cgroup.
    pub cgroup: PathBuf,
    pub cgroup_id: CgroupId,
    pub mode: Mode,
    pub source: WorkloadSource,
    pub created: Timestamp,
    pub owner: Option<u32>,
    pub unit: Option<String>,
    /// What `exec` was asked to run: the file and, for a script, its interpreters.
    pub launch: Vec<FileId>,
    /// Whether a process has been in it yet.
    pub populated: bool,
    /// The pod that it is, or is in.
    pub pod: Option<PodName>,
    /// The containers in it: executables are looked up in their mounts. Without one, in the host's.
    pub containers: Vec<ContainerRef>,
    /// Whether its identity is its own alone, and gone with it.
    pub owns_identity: bool,
    /// Whether its cgroups are about to be another's.
    pub gives_way: bool,
}

impl Workload {
    /// The tag by which the kernel holds it to an allow-list, if it has one.
    fn tag(&self, installed: Option<&Installed>) -> Tag {
        let tag = installed.map_or_else(
            || Tag::new(IdentityId::NONE, self.mode, AllowlistId::NONE, RuleSetId::NONE, OTHER),
            |installed| installed.tag(self.mode),
        );
        self.as_held(tag)
    }

    /// Containers are started in a pod, and nowhere else.
    fn as_held(&self, tag: Tag) -> Tag {
        let tag = if self.pod.is_some() { tag.starting_containers() } else { tag };
        if self.gives_way { tag.giving_way() } else { tag }
    }

    fn is(&self, identity: &SpiffeId) -> bool {
        self.identity.as_ref() == Some(identity)
    }

    /// All files that were named to start it: that may run without a scope.
    fn launched(&self) -> Vec<FileId> {
        let of_containers = self.containers.iter().flat_map(|container| &container.launch);
        self.launch.iter().chain(of_containers).copied().collect()
    }
}

/// In whose mounts the executables of an identity are looked up.
#[derive(Clone, Debug, Default)]
struct Homes {
    host: bool,
    containers: Vec<ContainerRef>,
}

/// Where cgroups are.
#[derive(Clone, Debug)]
pub struct Cgroups {
    /// Where cgroup v2 is mounted.
    pub root: PathBuf,
    /// The cgroup in which `exec` makes those of its workloads.
    pub exec_parent: PathBuf,
}

impl Cgroups {
    /// Those that are configured.
    ///
    /// # Errors
    ///
    /// When cgroup v2 is mounted nowhere.
    pub fn of(configuration: &Configuration) -> Result<Self, HostError> {
        let root = configuration.find_cgroup_root()?;
        Ok(Self { root, exec_parent: configuration.find_cgroup_parent()? })
    }
}

/// Where a workload comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkloadSource {
    /// A `Workload` manifest.
    Manifest,
    /// `agentguard exec`.
    Exec,
    /// A container runtime.
    Container,
}

impl WorkloadSource {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Exec => "exec",
            Self::Container => "container",
        }
    }
}

/// A workload that is to be.
#[derive(Clone, Debug)]
pub struct NewWorkload {
    pub name: String,
    pub identity: Option<SpiffeId>,
    pub cgroup: PathBuf,
    pub mode: Mode,
    pub source: WorkloadSource,
    pub owner: Option<u32>,
    pub unit: Option<String>,
    pub launch: Vec<FileId>,
    /// IP sockets that its first process had already.
    pub inherited: Vec<InheritedSocket>,
    pub pod: Option<PodName>,
    pub containers: Vec<ContainerRef>,
    pub owns_identity: bool,
}

/// What a workload was before a change that is not in the kernel yet.
struct Before {
    id: WorkloadId,
    has_another_tag: bool,
    identity: Option<SpiffeId>,
    mode: Mode,
    containers: Vec<ContainerRef>,
}

/// The allow-list of an identity, in force.
struct Installed {
    compiled: CompiledAllowlist,
    rows: Rows,
    number: IdentityId,
    counters: u16,
}

/// How much of the promise is kept for a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub all: Protection,
    /// By each layer's hooks.
    pub layers: [(Layer, Protection); 2],
}

/// A change was not made; what was in force is in force.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the allow-list of {identity} can not be compiled: {source}")]
    Compile { identity: SpiffeId, source: CompileError },
    #[error("the allow-list of {identity} can not be numbered: {source}; restart the daemon")]
    Number { identity: SpiffeId, source: RowsError },
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    #[error("the cgroup {path} can not be made: {source}")]
    MakeCgroup { path: PathBuf, source: io::Error },
    #[error("the process {pid} can not be moved to {path}: {source}")]
    Move { pid: u32, path: PathBuf, source: io::Error },
    #[error("a workload runs at {path} already")]
    Taken { path: PathBuf },
    #[error(
        "the workload at {path} is not held whole yet, `agentguard status` says why; those around it and in it are not let go until it is"
    )]
    Unfit { path: PathBuf },
}

/// A reconciliation that left something as it was; the log says what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

/// What the manifests say, and what is wrong with them.
#[derive(Default)]
pub struct Manifests {
    pub catalogue: Catalogue,
    pub errors: Vec<ManifestError>,
    /// Files that say something else in force than what they hold now, and since when they say it.
    pub held: Vec<(PathBuf, Timestamp)>,
    pub last_load: Option<Timestamp>,
}

/// Everything that changes.
pub struct Engine {
    pub datapath: Datapath,
    pub store: GrantStore,
    pub manifests: Manifests,
    /// What is known of the Kubernetes cluster around this node.
    cluster: Cluster,
    reserved: Reserved,
    pub names: Arc<Names>,
    pub clock: Clock,
    workloads: BTreeMap<WorkloadId, Workload>,
    installed: BTreeMap<SpiffeId, Installed>,
    tables: TableSet,
    executables: Pinned,
    container_files: ContainerFiles,
    socket_directories: SocketDirectories,
    /// When they were last looked at.
    looked: Instant,
    unix_names: UnixNames,
    mounts: Resolver,
    executable_problems: Vec<String>,
    audit: AuditLog,
    cgroups: Cgroups,
    next_allowlist: AllowlistId,
    next_rules: RuleSetId,
    next_workload: WorkloadId,
    /// Rows of counters are given out once: a row that changed hands would tell one identity's
    /// verdicts as another's.
    counter_rows: BTreeMap<SpiffeId, u16>,
    retired: Vec<(Instant, Rows)>,
    /// What was in force when this daemon adopted it, until its own is.
    inherited: Option<(Instant, AllowlistId, RuleSetId)>,
    /// States of grants as last recorded.
    recorded: BTreeMap<GrantId, Phase>,
    /// When a grant begins or ends next.
    next_change: Option<Timestamp>,
    /// Whether an allow-list could not be brought up to date; it is tried again.
    unsettled: bool,
    /// Workloads that are not held whole, and why: each is denied everything, and tried again.
    unfit: BTreeMap<WorkloadId, String>,
    /// Why not every program that runs containers is known to the kernel, if that is so.
    runtimes_problem: Option<String>,
    /// Why another build is in force still, where one is.
    not_in_force: Option<String>,
    /// Workloads in the kernel of which an earlier daemon wrote down nothing.
    orphans: BTreeSet<WorkloadId>,
    ticks: u64,
    /// Whether something was changed that a restart must know.
    dirty: bool,
    /// How the reconciliations went that nobody has asked about yet.
    reconciliations: Vec<Result<Duration, Failed>>,
    losses: Losses,
    /// The same, as far as it is written in the log.
    written_losses: Losses,
    /// When losses were last looked for.
    looked_for_losses: Option<Instant>,
    /// Set by the reader of the kernel's rings when records may be missing that the log does not tell of.
    pub may_have_lost: Arc<AtomicBool>,
}

impl Engine {
    /// An engine without workloads. `host` is where the host's files are.
    #[must_use]
    pub fn new(
        datapath: Datapath,
        cgroups: Cgroups,
        audit: AuditLog,
        names: Arc<Names>,
        clock: Clock,
        host: PathBuf,
    ) -> Self {
        let (allowlist, rules, workload) = datapath.highest();
        let next_allowlist = AllowlistId(allowlist.0 + 1);
        let next_rules = RuleSetId(rules.0 + 1);
        let unix_names = UnixNames::adopt(datapath.unix_names(), datapath.highest_unix_name());
        let inherited = datapath.adopted().then(|| (Instant::now(), next_allowlist, next_rules));
        Self {
            datapath,
            store: GrantStore::new(clock),
            manifests: Manifests::default(),
            cluster: Cluster::default(),
            reserved: Reserved::default(),
            names,
            clock,
            workloads: BTreeMap::new(),
            installed: BTreeMap::new(),
            tables: TableSet::default(),
            executables: Pinned::default(),
            container_files: ContainerFiles::default(),
            socket_directories: SocketDirectories::default(),
            looked: Instant::now(),
            unix_names,
            mounts: Resolver::new(host),
            executable_problems: Vec::new(),
            audit,
            cgroups,
            next_allowlist,
            next_rules,
            next_workload: WorkloadId(workload.0 + 1),
            counter_rows: BTreeMap::new(),
            retired: Vec::new(),
            inherited,
            recorded: BTreeMap::new(),
            next_change: None,
            unsettled: false,
            unfit: BTreeMap::new(),
            runtimes_problem: None,
            not_in_force: None,
            orphans: BTreeSet::new(),
            ticks: 0,
            dirty: false,
            reconciliations: Vec::new(),
            losses: Losses::default(),
            written_losses: Losses::default(),
            looked_for_losses: None,
            // An earlier daemon may not have told all.
            may_have_lost: Arc::new(AtomicBool::new(true)),
        }
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Workload> {
        self.workloads.values()
    }

    #[must_use]
    pub fn workload(&self, id: WorkloadId) -> Option<&Workload> {
        self.workloads.get(&id)
    }

    #[must_use]
    pub fn workload_at(&self, cgroup: &Path) -> Option<&Workload> {
        self.workloads.values().find(|workload| workload.cgroup == cgroup)
    }

    #[must_use]
    pub fn tables(&self) -> &TableSet {
        &self.tables
    }

    #[must_use]
    pub fn cgroup_root(&self) -> &Path {
        &self.cgroups.root
    }

    /// The cgroup in which `exec` makes those of its workloads.
    #[must_use]
    pub fn exec_parent(&self) -> &Path {
        &self.cgroups.exec_parent
    }

    /// What manifests name and can not be granted, files and directories of unix sockets among it,
    /// one sentence each.
    #[must_use]
    pub fn executable_problems(&self) -> &[String] {
        &self.executable_problems
    }

    /// The mounts in which the files of a workload are looked up: those of its containers, or the
    /// host's.
    #[must_use]
    pub fn mounts_of(&self, workload: &Workload) -> Vec<Resolver> {
        match workload.source {
            WorkloadSource::Manifest | WorkloadSource::Exec => vec![self.mounts.clone()],
            WorkloadSource::Container => {
                workload.containers.iter().map(ContainerRef::mounts).collect()
            }
        }
    }

    /// Tells the kernel which programs run containers: what each has its child do in a workload's
    /// cgroup, before anything of the workload has run there, is not the workload's.
    pub fn set_runtimes(&mut self, programs: &BTreeSet<FileId>) {
        let set = self.datapath.set_runtimes(programs);
        self.runtimes_problem = set.err().map(|error| {
            let why = format!("steps of container runtimes are judged as the agents': {error}");
            tracing::error!("{why}");
            why
        });
    }

    /// Why not every program that runs containers is known to the kernel, if that is so.
    #[must_use]
    pub fn runtimes_problem(&self) -> Option<&str> {
        self.runtimes_problem.as_deref()
    }

    /// Where the host's files are seen.
    #[must_use]
    pub const fn host_mounts(&self) -> &Resolver {
        &self.mounts
    }

    /// The generation of the newest allow-list.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.next_allowlist.0 as u64 - 1
    }

    /// Entries of all allow-lists in force.
    #[must_use]
    pub fn entries(&self) -> u64 {
        let entries = self.installed.values().map(|installed| {
            let Rows { destinations, executables, unix_sockets, .. } = &installed.rows;
            destinations.len() + executables.len() + unix_sockets.len()
        });
        entries.sum::<usize>() as u64
    }

    /// The tag of a workload, as the kernel has it.
    #[must_use]
    pub fn tag(&self, workload: &Workload) -> Option<Tag> {
        let installed = self.installed.get(workload.identity.as_ref()?)?;
        Some(workload.tag(Some(installed)))
    }

    /// Counters by identity, and those of the row that further identities share.
    ///
    /// # Errors
    ///
    /// When the kernel does not hand them out.
    pub fn counters(&self) -> Result<Vec<(Option<SpiffeId>, Counters)>, DatapathError> {
        let mut rows = vec![(None, self.datapath.counters(OTHER)?)];
        for (identity, row) in &self.counter_rows {
            if *row != OTHER {
                rows.push((Some(identity.clone()), self.datapath.counters(*row)?));
            }
        }
        Ok(rows)
    }

    /// How many identities share [`OTHER`], since there is no row left for them.
    #[must_use]
    pub fn identities_without_row(&self) -> usize {
        self.counter_rows.values().filter(|row| **row == OTHER).count()
    }

    // -- grants --------------------------------------------------------------------------------

    /// Takes the scopes and grants of the manifests.
    pub fn apply_manifests(
        &mut self,
        set: ManifestSet,
        errors: Vec<ManifestError>,
        held: Vec<(PathBuf, Timestamp)>,
    ) {
        let ManifestSet { scopes, grants, workloads: _ } = set;
        let last_load = Some(Timestamp::now());
        self.manifests = Manifests { catalogue: scopes, errors, held, last_load };
        self.store.replace_manifests(grants);
        self.reconcile();
    }

    /// Takes what is known of the cluster, and brings what rests on it up to date.
    pub fn set_cluster(&mut self, cluster: Cluster) {
        self.take_cluster(cluster);
        self.reconcile();
    }

    /// Takes what is known of the cluster, for the next reconciliation.
    pub fn take_cluster(&mut self, cluster: Cluster) {
        self.reserved = Reserved::new(&cluster.reserved());
        self.cluster = cluster;
    }

    /// What is known of the Kubernetes cluster around this node.
    #[must_use]
    pub const fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Brings the kernel to what the grants say now, and records what began and ended.
    pub fn reconcile(&mut self) {
        let started = Instant::now();
        let mut failed = false;
        let now = Timestamp::now();
        self.unsettled = false;
        let wanted = self.compile_all(now);
        let in_force = self
            .installed
            .iter()
            .map(|(identity, installed)| (identity.clone(), &installed.compiled))
            .collect();
        for step in reconcile::plan(&in_force, wanted) {
            let done = match step {
                Step::Switch { identity, allowlist } => {
                    let installed = self.install(&identity, &allowlist);
                    if installed.is_err() && self.takes_away(&identity, &allowlist) {
                        // What was taken away must end, also where there is no room for the rest.
                        self.deny_all(&identity);
                    }
                    installed
                }
                Step::Retire { identity } => {
                    self.retire(&identity);
                    Ok(())
                }
            };
            if let Err(error) = done {
                failed = true;
                tracing::error!(%error, "an allow-list was not brought up to date; trying again");
                self.executable_problems.push(error.to_string());
                self.unsettled = true;
            }
        }
        // Bounded, should nobody ask for metrics.
        if self.reconciliations.len() < KEPT_RECONCILIATIONS {
            let outcome = if failed { Err(Failed) } else { Ok(started.elapsed()) };
            self.reconciliations.push(outcome);
        }
        self.next_change = self.store.next_change(now);
        self.record_grants(now);
    }

    /// How the reconciliations went since this was last asked.
    pub fn take_reconciliations(&mut self) -> Vec<Result<Duration, Failed>> {
        std::mem::take(&mut self.reconciliations)
    }

    fn compile_all(&mut self, now: Timestamp) -> BTreeMap<SpiffeId, CompiledAllowlist> {
        let identities: BTreeSet<SpiffeId> =
            self.workloads.values().filter_map(|workload| workload.identity.clone()).collect();
        let mut wanted = BTreeMap::new();
        let mut problems = BTreeSet::new();
        self.name_unix_sockets(&mut problems);
        for identity in identities {
            let permits = self.permits(&identity, now, &mut problems);
            match compile_within(&permits, &self.reserved) {
                Ok(allowlist) => {
                    wanted.insert(identity, allowlist);
                }
                Err(source) => {
                    // What is in force stays, unless it rests on something that was taken back;
                    // and what is wrong is said.
                    let granted =
                        permits.iter().map(|permit| (permit.grant, permit.scope)).collect();
                    let in_force =
                        self.installed.get(&identity).map(|installed| &installed.compiled);
                    let stays = in_force
                        .filter(|compiled| permissions(compiled).is_subset(&granted))
                        .cloned()
                        .unwrap_or_default();
                    wanted.insert(identity.clone(), stays);
                    let error = EngineError::Compile { identity, source };
                    tracing::error!(%error, "an allow-list stays as it is");
                    problems.insert(error.to_string());
                }
            }
        }
        self.executable_problems = problems.into_iter().collect();
        wanted
    }

    /// What the grants of an identity permit: those in force, and those that ended lately, so that
    /// the verdict can say so.
    fn permits(
        &mut self,
        identity: &SpiffeId,
        now: Timestamp,
        problems: &mut BTreeSet<String>,
    ) -> Vec<Permit> {
        let grants: Vec<StoredGrant> = self
            .store
            .grants()
            .filter(|stored| stored.document.subject.matches(identity))
            .filter(|stored| match self.store.state_of(stored, now) {
                State::Active => true,
                State::Expired => match stored.document.expiry {
                    Expiry::At(end) => now.duration_since(end) < REMEMBERED_END,
                    Expiry::Never => false,
                },
                State::Pending | State::Revoked(_) => false,
            })
            .cloned()
            .collect();
        let homes = self.homes(identity);
        let mut permits = Vec::new();
        for StoredGrant { document: grant, boot_expiry: expires_at, .. } in grants {
            let number = self.names.grant(grant.id.as_str());
            for scope in &grant.scopes {
                let Some(scope) = self.manifests.catalogue.get(scope).cloned() else {
                    problems.insert(format!(
                        "grant {} names the scope {scope}, which no manifest defines",
                        grant.id
                    ));
                    continue;
                };
                permits.push(self.permit(&scope, number, expires_at, &homes, problems));
            }
        }
        let launched = self
            .workloads
            .values()
            .filter(|workload| workload.is(identity))
            .map(|workload| (workload, workload.launched()))
            .filter(|(_, launched)| !launched.is_empty());
        permits.extend(launched.map(|(workload, launched)| Permit {
            scope: self.names.scope(LAUNCH),
            grant: self.names.grant(&launch_grant(&workload.name)),
            expires_at: NEVER,
            egress: Vec::new(),
            executables: launched,
            unix_sockets: Vec::new(),
            listening: Vec::new(),
        }));
        permits
    }

    fn homes(&self, identity: &SpiffeId) -> Homes {
        let mut homes = Homes::default();
        for workload in self.workloads.values().filter(|workload| workload.is(identity)) {
            match workload.source {
                WorkloadSource::Manifest | WorkloadSource::Exec => homes.host = true,
                WorkloadSource::Container => {
                    homes.containers.extend(workload.containers.iter().cloned());
                }
            }
        }
        homes
    }

    fn permit(
        &mut self,
        scope: &ScopeDocument,
        grant: GrantNumber,
        expires_at: u64,
        homes: &Homes,
        problems: &mut BTreeSet<String>,
    ) -> Permit {
        Permit {
            scope: self.names.scope(scope.scope.as_str()),
            grant,
            expires_at,
            egress: egress(scope, &self.cluster, problems),
            executables: self.resolve(scope, homes, problems),
            unix_sockets: self.resolve_unix_sockets(scope, homes, problems),
            listening: scope.listen.iter().map(port_range).collect(),
        }
    }

    /// What each scope of the catalogue permits to a workload, for as long as anybody asks.
    #[must_use]
    pub fn scope_permits(&mut self, workload: Option<&Workload>) -> Vec<(String, Permit)> {
        let scopes: Vec<ScopeDocument> = self.manifests.catalogue.iter().cloned().collect();
        let homes = match workload.and_then(|workload| workload.identity.as_ref()) {
            Some(identity) => self.homes(identity),
            None => Homes { host: true, containers: Vec::new() },
        };
        let permits = scopes.iter().map(|scope| {
            let permit = self.permit(scope, GrantNumber::NONE, NEVER, &homes, &mut BTreeSet::new());
            (scope.scope.to_string(), permit)
        });
        permits.collect()
    }

    /// Keeps what was taken to be saved as changed: it could not be.
    pub fn mark_unsaved(&mut self) {
        self.dirty = true;
    }

    fn resolve(
        &mut self,
        scope: &ScopeDocument,
        homes: &Homes,
        problems: &mut BTreeSet<String>,
    ) -> Vec<FileId> {
        if scope.exec.is_empty() {
            return Vec::new();
        }
        let mut files: Vec<FileId> = homes
            .containers
            .iter()
            .flat_map(|container| self.container_files.executables(container, scope, problems))
            .collect();
        if homes.host {
            files.extend(self.resolve_on_host(scope, problems));
        }
        files.sort_unstable();
        files.dedup();
        files
    }

    fn resolve_on_host(
        &mut self,
        scope: &ScopeDocument,
        problems: &mut BTreeSet<String>,
    ) -> Vec<FileId> {
        let resolved = self.executables.resolve(&self.mounts, &scope.exec, Admission::OnRefresh);
        match resolved {
            Ok(resolution) => {
                let told = resolution.problems.iter();
                problems.extend(told.map(|problem| format!("scope {}: {problem}", scope.scope)));
                resolution.files.iter().map(|file| file.id).collect()
            }
            Err(error) => {
                problems.insert(format!("scope {}: {error}", scope.scope));
                Vec::new()
            }
        }
    }

    fn resolve_unix_sockets(
        &mut self,
        scope: &ScopeDocument,
        homes: &Homes,
        problems: &mut BTreeSet<String>,
    ) -> Vec<UnixSocket> {
        // Most scopes have none, and looking them up begins with reading all mounts.
        if scope.unix_sockets.is_empty() {
            return Vec::new();
        }
        let paths: Vec<PathBuf> = scope.unix_sockets.iter().filter_map(path_of).collect();
        let mut places = Vec::new();
        for container in &homes.containers {
            let found =
                self.container_files.socket_directories(container, &scope.scope, &paths, problems);
            places.push(found);
        }
        if homes.host {
            let sockets = paths.iter().map(PathBuf::as_path);
            match self.socket_directories.resolve(&self.mounts, sockets) {
                Ok((directories, told)) => {
                    let told = told.iter();
                    problems
                        .extend(told.map(|problem| format!("scope {}: {problem}", scope.scope)));
                    places.push(
                        directories.into_iter().map(|(path, id)| (path.to_owned(), id)).collect(),
                    );
                }
                Err(error) => {
                    problems.insert(format!("scope {}: {error}", scope.scope));
                }
            }
        }
        let mut granted = Vec::new();
        for socket in &scope.unix_sockets {
            // One without a number was told of when it did not get one.
            let name = name_of(socket).and_then(|name| self.unix_names.number(&name));
            let Some(name) = name else { continue };
            match path_of(socket) {
                None => granted.push(UnixSocket { directory: 0, device: 0, name }),
                Some(path) => {
                    let directories = places.iter().filter_map(|place| place.get(&path));
                    granted.extend(directories.map(|directory| UnixSocket {
                        directory: directory.inode,
                        device: directory.device,
                        name,
                    }));
                }
            }
        }
        granted.sort_unstable();
        granted.dedup();
        granted
    }

    /// Gives every name of a unix socket that scopes mention its number, in the kernel too: no row
    /// may use a number before.
    fn name_unix_sockets(&mut self, problems: &mut BTreeSet<String>) {
        let scopes = self.manifests.catalogue.iter();
        let mentioned = scopes.flat_map(|scope| &scope.unix_sockets).filter_map(name_of).collect();
        for name in self.unix_names.mention(&mentioned) {
            match self.datapath.name_unix_socket(&name, self.unix_names.next()) {
                Ok(()) => {
                    self.unix_names.named(name);
                    self.dirty = true;
                }
                Err(error) => {
                    problems.insert(format!("unix sockets are not granted: {error}"));
                    // Names that are swept may make room.
                    self.unsettled = true;
                    return;
                }
            }
        }
    }

    /// What the kernel takes the unix socket for that a server binds by `name` in `directory`.
    #[must_use]
    pub fn unix_socket(&self, directory: Option<DirectoryId>, name: &[u8]) -> UnixSocket {
        let name = UnixName::path(name).and_then(|name| self.unix_names.number(&name));
        UnixSocket {
            directory: directory.map_or(0, |directory| directory.inode),
            device: directory.map_or(0, |directory| directory.device),
            name: name.unwrap_or(UnixNameId::NONE),
        }
    }

    /// What the kernel takes the unix socket with an abstract name for.
    #[must_use]
    pub fn abstract_unix_socket(&self, name: &[u8]) -> UnixSocket {
        let number = UnixName::abstract_name(name).and_then(|name| self.unix_names.number(&name));
        UnixSocket { name: number.unwrap_or(UnixNameId::NONE), ..UnixSocket::default() }
    }

    /// Looks at every granted file and directory again and takes what is there now.
    pub fn refresh_executables(&mut self) -> usize {
        self.executables.refresh();
        self.container_files.refresh();
        self.socket_directories.refresh();
        self.reconcile();
        self.installed.values().map(|installed| installed.rows.executables.len()).sum()
    }

    /// Writes an allow-list beside the one in force, then switches the identity's workloads.
    fn install(
        &mut self,
        identity: &SpiffeId,
        compiled: &CompiledAllowlist,
    ) -> Result<(), EngineError> {
        let rows = compiled
            .rows(self.next_allowlist, self.next_rules)
            .map_err(|source| EngineError::Number { identity: identity.clone(), source })?;
        self.datapath.load_allowlist(&rows)?;
        fault::point("flip.rows");
        self.next_allowlist.0 += 1;
        self.next_rules.0 += u32::try_from(rows.rules.len()).unwrap_or(u32::MAX);
        let number = self.names.identity(identity.as_str());
        let counters = self.counter_row(identity);
        if let Err(error) = self.tables.load(rows.clone()) {
            // The kernel took it; only `explain` would not know.
            tracing::error!(%error, "explain does not know an allow-list");
        }
        let installed = Installed { compiled: compiled.clone(), rows, number, counters };
        // Records that carry its numbers must find their words after a restart too.
        self.dirty = true;
        if let Err(error) = self.switch_all(identity, &installed) {
            self.tables.remove(installed.rows.allowlist);
            self.retired.push((Instant::now(), installed.rows));
            return Err(error.into());
        }
        if let Some(old) = self.installed.insert(identity.clone(), installed) {
            self.tables.remove(old.rows.allowlist);
            self.retired.push((Instant::now(), old.rows));
        }
        fault::point("flip.retired");
        Ok(())
    }

    /// Switches every workload of an identity, or none.
    fn switch_all(
        &mut self,
        identity: &SpiffeId,
        installed: &Installed,
    ) -> Result<(), DatapathError> {
        let of_identity: Vec<&Workload> = self
            .workloads
            .values()
            .filter(|workload| workload.is(identity))
            // Those get their tag when there is room for it.
            .filter(|workload| !self.unfit.contains_key(&workload.id))
            .collect();
        for (index, workload) in of_identity.iter().enumerate() {
            if let Err(error) = self.datapath.switch(workload.id, workload.tag(Some(installed))) {
                // A row that is there is replaced in a full table too, so these go back.
                for workload in &of_identity[..index] {
                    let before = workload.tag(self.installed.get(identity));
                    self.datapath.switch(workload.id, before)?;
                }
                return Err(error);
            }
            fault::point("flip.tag");
        }
        Ok(())
    }

    /// Whether what is in force permits more than is wanted, or rests on a grant that no longer is.
    fn takes_away(&self, identity: &SpiffeId, wanted: &CompiledAllowlist) -> bool {
        let granted = permissions(wanted);
        self.installed.get(identity).is_some_and(|Installed { compiled, .. }| {
            !permissions(compiled).is_subset(&granted) || !wanted.covers(compiled, boot_ns())
        })
    }

    /// Switches the workloads of an identity to an allow-list of its own number that has no entry,
    /// which takes no room in any table.
    fn deny_all(&mut self, identity: &SpiffeId) {
        let number = self.names.identity(identity.as_str());
        let counters = self.counter_row(identity);
        let allowlist = self.next_allowlist;
        self.next_allowlist.0 += 1;
        for workload in self.workloads.values().filter(|workload| workload.is(identity)) {
            let tag = workload.as_held(Tag::new(
                number,
                workload.mode,
                allowlist,
                RuleSetId::NONE,
                counters,
            ));
            if let Err(error) = self.datapath.switch(workload.id, tag) {
                tracing::error!(%error, workload = workload.name, "a workload keeps what was revoked; trying again");
            }
        }
        self.retire(identity);
        self.dirty = true;
    }

    fn retire(&mut self, identity: &SpiffeId) {
        if let Some(old) = self.installed.remove(identity) {
            self.tables.remove(old.rows.allowlist);
            self.retired.push((Instant::now(), old.rows));
        }
    }

    fn counter_row(&mut self, identity: &SpiffeId) -> u16 {
        if let Some(row) = self.counter_rows.get(identity) {
            return *row;
        }
        let next = self.counter_rows.values().filter(|row| **row != OTHER).count() + 1;
        let row = u16::try_from(next)
            .ok()
            .filter(|row| *row < self.datapath.counter_rows())
            .unwrap_or(OTHER);
        self.counter_rows.insert(identity.clone(), row);
        self.dirty = true;
        row
    }

    // -- workloads -----------------------------------------------------------------------------

    /// Makes a cgroup a workload's: allow-list, tag and hooks, in this order.
    ///
    /// # Errors
    ///
    /// When it can not be done whole; then nothing of it is left.
    pub fn add(&mut self, new: NewWorkload) -> Result<WorkloadId, EngineError> {
        let inherited = new.inherited.clone();
        let cgroup_id = cgroup_id(&new.cgroup)?;
        let id = self.begin(new, cgroup_id)?;
        self.reconcile();
        fault::point("add.compiled");
        self.complete(id, &inherited)?;
        Ok(id)
    }

    /// The workloads that manifests selected around a cgroup, or in it. They never select both, so that
    /// those give way to a workload there.
    #[must_use]
    pub fn nested(&self, cgroup: &Path) -> Vec<WorkloadId> {
        let selected =
            self.workloads.values().filter(|known| known.source == WorkloadSource::Manifest);
        let nested = selected.filter(|known| are_nested(&known.cgroup, cgroup));
        nested.map(|known| known.id).collect()
    }

    /// Prepares workloads for another one around them, or in them, or takes that back. Of tasks that are
    /// tied to them the cgroup says whose they are, as soon as it is the other's. The hooks of both hold
    /// what lies in both until the ones that gave way are removed.
    ///
    /// # Errors
    ///
    /// When a tag can not be switched.
    pub fn let_give_way(
        &mut self,
        others: &[WorkloadId],
        gives_way: bool,
    ) -> Result<(), EngineError> {
        for other in others {
            let Some(workload) = self.workloads.get_mut(other) else { continue };
            workload.gives_way = gives_way;
            let Some(workload) = self.workloads.get(other) else { continue };
            let tag = match self.unfit.contains_key(other) {
                true => self.tag_of_nothing(workload),
                false => workload.tag(self.installed_of(workload)),
            };
            self.datapath.switch(*other, tag)?;
        }
        Ok(())
    }

    /// Holds a workload that may have given way, and whose cgroups may be another's. Where it can not be
    /// held whole, it is refused everything until it can.
    pub fn hold_again(&mut self, id: WorkloadId) {
        let Some(workload) = self.workloads.get_mut(&id) else { return };
        let gave_way = std::mem::take(&mut workload.gives_way);
        if !gave_way && self.unfit.contains_key(&id) {
            // Each tick tries that.
            return;
        }
        if let Err(error) = self.hold(id) {
            tracing::error!(%error, "a workload is refused everything; trying again");
            self.unfit.insert(id, error.to_string());
        }
    }

    /// Makes sure that a workload is held whole, so that those that give way to it can go.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn must_be_whole(&self, id: WorkloadId) -> Result<(), EngineError> {
        match self.workloads.get(&id) {
            Some(workload) if self.unfit.contains_key(&id) => {
                Err(EngineError::Unfit { path: workload.cgroup.clone() })
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Notes a workload, of which nothing is in the kernel yet.
    fn begin(&mut self, new: NewWorkload, cgroup_id: CgroupId) -> Result<WorkloadId, EngineError> {
        let NewWorkload {
            name,
            identity,
            cgroup,
            mode,
            source,
            owner,
            unit,
            launch,
            inherited: _,
            pod,
            containers,
            owns_identity,
        } = new;
        let holder = self.datapath.workload_of(cgroup_id).and_then(|id| self.workloads.get(&id));
        // What a manifest selects around it goes when this is held.
        let gives_way = |holder: &Workload| {
            (holder.source, source) == (WorkloadSource::Manifest, WorkloadSource::Manifest)
                && are_nested(&holder.cgroup, &cgroup)
        };
        if holder.is_some_and(|holder| !gives_way(holder)) {
            return Err(EngineError::Taken { path: cgroup });
        }
        let id = self.next_workload;
        self.next_workload.0 += 1;
        self.enlist(Workload {
            id,
            name,
            identity,
            cgroup,
            cgroup_id,
            mode,
            source,
            created: Timestamp::now(),
            owner,
            unit,
            launch,
            populated: false,
            pod,
            containers,
            owns_identity,
            gives_way: false,
        });
        Ok(id)
    }

    /// Holds a workload that was begun and whose allow-list is in force.
    fn complete(
        &mut self,
        id: WorkloadId,
        inherited: &[InheritedSocket],
    ) -> Result<(), EngineError> {
        if let Err(error) = self.hold(id) {
            let Some(workload) = self.workloads.get(&id) else { return Err(error) };
            let is_there = workload.cgroup.exists();
            match workload.source {
                // What a manifest selects, or a runtime started, runs already. Where there is no
                // room to hold it to its allow-list, it is held to nothing at all until there is.
                WorkloadSource::Manifest | WorkloadSource::Container if is_there => {
                    tracing::error!(%error, cgroup = %workload.cgroup.display(), "a workload is refused everything; trying again");
                    self.unfit.insert(id, error.to_string());
                }
                WorkloadSource::Manifest | WorkloadSource::Container | WorkloadSource::Exec => {
                    self.drop_workload(id);
                    // What was permitted for its sake ends with it.
                    self.reconcile();
                    return Err(error);
                }
            }
        }
        self.record_workload(id, WorkloadChange::Added, inherited);
        self.dirty = true;
        Ok(())
    }

    /// Makes workloads of what runtimes have started, and brings those up to date that are known,
    /// all by one reconciliation: where hundreds start at once, each waits for as little as it can.
    ///
    /// Whether something was changed, and which could not be held, by name.
    pub fn bring(&mut self, wanted: Vec<NewWorkload>) -> (bool, Vec<(String, EngineError)>) {
        let mut failed = Vec::new();
        let mut added = Vec::new();
        let mut changed = Vec::new();
        let known: BTreeMap<PathBuf, WorkloadId> = self
            .workloads
            .values()
            .map(|workload| (workload.cgroup.clone(), workload.id))
            .collect();
        for new in wanted {
            let name = new.name.clone();
            let found = match cgroup_id(&new.cgroup) {
                Ok(found) => found,
                // It ended; its runtime will say so.
                Err(_) if !new.cgroup.exists() => continue,
                Err(error) => {
                    failed.push((name, error.into()));
                    continue;
                }
            };
            let known = known.get(&new.cgroup).and_then(|id| self.workloads.get(id));
            let taken = match known.map(|known| (known.id, known.cgroup_id, known.source)) {
                Some((_, cgroup, source))
                    if cgroup == found && source != WorkloadSource::Container =>
                {
                    Err(EngineError::Taken { path: new.cgroup })
                }
                Some((id, cgroup, _)) if cgroup == found => {
                    changed.extend(self.replace(id, new));
                    Ok(())
                }
                // Another cgroup of the same name; the one that was held is gone.
                Some((id, _, _)) => {
                    self.take_out(id);
                    self.begin(new, found).map(|id| added.push(id))
                }
                None => self.begin(new, found).map(|id| added.push(id)),
            };
            failed.extend(taken.err().map(|error| (name, error)));
        }
        if added.is_empty() && changed.is_empty() {
            return (false, failed);
        }
        self.reconcile();
        let name_of = |engine: &Self, id: WorkloadId| {
            engine.workloads.get(&id).map(|workload| workload.name.clone()).unwrap_or_default()
        };
        for id in added {
            let name = name_of(self, id);
            failed.extend(self.complete(id, &[]).err().map(|error| (name, error)));
        }
        for before in changed {
            let name = name_of(self, before.id);
            failed.extend(self.settle(before).err().map(|error| (name, error)));
        }
        self.dirty = true;
        (true, failed)
    }

    /// Notes what has changed of a workload; `None` where nothing has.
    fn replace(&mut self, id: WorkloadId, new: NewWorkload) -> Option<Before> {
        let workload = self.workloads.get_mut(&id)?;
        let has_another_tag = (&workload.identity, workload.mode) != (&new.identity, new.mode);
        if !has_another_tag && workload.containers == new.containers {
            return None;
        }
        let before = workload.containers.iter().map(ContainerRef::record_name);
        let now = new.containers.iter().map(ContainerRef::record_name);
        self.names.name_containers(id, before, now);
        Some(Before {
            id,
            has_another_tag,
            identity: std::mem::replace(&mut workload.identity, new.identity),
            mode: std::mem::replace(&mut workload.mode, new.mode),
            containers: std::mem::replace(&mut workload.containers, new.containers),
        })
    }

    /// Switches the tag of a workload whose new allow-list is in force, or takes the change back.
    fn settle(&mut self, before: Before) -> Result<(), EngineError> {
        let Before { id, has_another_tag, identity, mode, containers } = before;
        if !has_another_tag {
            return Ok(());
        }
        if let Err(error) = self.hold(id) {
            if let Some(workload) = self.workloads.get_mut(&id) {
                (workload.identity, workload.mode, workload.containers) =
                    (identity, mode, containers);
            }
            self.reconcile();
            if let Err(error) = self.hold(id) {
                tracing::error!(%error, "a workload is refused everything; trying again");
                self.unfit.insert(id, error.to_string());
            }
            return Err(error);
        }
        self.record_workload(id, WorkloadChange::Changed, &[]);
        Ok(())
    }

    /// Gives a workload another identity or mode. Its processes are held all the time: the new
    /// allow-list is in force before the one write that switches the tag.
    ///
    /// # Errors
    ///
    /// When the tag can not be switched; it is then what it was.
    pub fn change(
        &mut self,
        id: WorkloadId,
        identity: Option<SpiffeId>,
        mode: Mode,
    ) -> Result<(), EngineError> {
        let Some(workload) = self.workloads.get_mut(&id) else { return Ok(()) };
        if (&workload.identity, workload.mode) == (&identity, mode) {
            return Ok(());
        }
        let before = Before {
            id,
            has_another_tag: true,
            identity: std::mem::replace(&mut workload.identity, identity),
            mode: std::mem::replace(&mut workload.mode, mode),
            containers: workload.containers.clone(),
        };
        // Retires the old identity's allow-list, which stays readable for as long as a program may
        // still hold the old tag.
        self.reconcile();
        self.dirty = true;
        self.settle(before)
    }

    /// Notes that a process is in the workload: it ends with its last one.
    pub fn entered(&mut self, id: WorkloadId) {
        if let Some(workload) = self.workloads.get_mut(&id) {
            workload.populated = true;
        }
    }

    fn enlist(&mut self, workload: Workload) {
        let below = workload.cgroup.strip_prefix(&self.cgroups.root).unwrap_or(&workload.cgroup);
        let cgroup = format!("/{}", below.display());
        let name = WorkloadName {
            name: workload.name.clone(),
            cgroup,
            unit: workload.unit.clone(),
            pod: workload.pod.clone(),
            containers: workload.containers.iter().map(ContainerRef::record_name).collect(),
        };
        self.names.name_workload(workload.id, name);
        self.workloads.insert(workload.id, workload);
    }

    /// Puts tag and hooks on a workload whose allow-list is in force.
    fn hold(&mut self, id: WorkloadId) -> Result<(), EngineError> {
        let Some(workload) = self.workloads.get(&id) else { return Ok(()) };
        let tag = workload.tag(self.installed_of(workload));
        let nothing = self.tag_of_nothing(workload);
        let is_unfit = self.unfit.contains_key(&id);
        let switched = self.datapath.switch(id, if is_unfit { nothing } else { tag });
        fault::point("hold.tag");
        // Also without room for its tag: who belongs to a workload without one is denied everything.
        let captured = self.datapath.capture(&workload.cgroup, id);
        fault::point("hold.captured");
        if captured.is_err() {
            // What is held of it is held to nothing, since not all of it is. Where there is no row for
            // its tag either, that is so already.
            let _no_room = self.datapath.switch(id, nothing);
        }
        switched?;
        captured?;
        if is_unfit {
            self.datapath.switch(id, tag)?;
        }
        self.unfit.remove(&id);
        Ok(())
    }

    fn installed_of(&self, workload: &Workload) -> Option<&Installed> {
        self.installed.get(workload.identity.as_ref()?)
    }

    /// The tag of a workload that is denied everything, the start of a container too, as the identity
    /// that it has.
    fn tag_of_nothing(&self, workload: &Workload) -> Tag {
        let installed = self.installed_of(workload);
        let (number, counters) = installed
            .map_or((IdentityId::NONE, OTHER), |installed| (installed.number, installed.counters));
        let nothing = Tag::new(number, workload.mode, AllowlistId::NONE, RuleSetId::NONE, counters);
        if workload.gives_way { nothing.giving_way() } else { nothing }
    }

    /// Puts this build in force in the place of another one, once it holds all that there is: at once
    /// where `is_whole`, else as soon as there is room. Until then the other one decides by what it was
    /// told.
    ///
    /// # Errors
    ///
    /// When a hook can not be taken over.
    pub fn take_over(&mut self, is_whole: bool) -> Result<(), LoadError> {
        if is_whole {
            let others = self.datapath.take_over()?;
            self.not_in_force = None;
            if others > 0 {
                tracing::info!(others, "took over from another build of the kernel half");
            }
        } else if self.datapath.has_others()? {
            tracing::error!("{NOT_WHOLE}");
            self.not_in_force = Some(NOT_WHOLE.to_owned());
        }
        Ok(())
    }

    /// Tries again to take the place of the other build, where one is in force still.
    fn take_over_at_last(&mut self) {
        if self.not_in_force.is_none() || !self.unfit.is_empty() || self.unsettled {
            return;
        }
        if let Err(error) = self.take_over(true) {
            // Hooks that were taken over stay so, and the rest is tried again; it is said once.
            let why = format!("another build of the kernel half stays in force in part: {error}");
            if self.not_in_force.as_ref() != Some(&why) {
                tracing::error!("{why}");
                self.not_in_force = Some(why);
            }
        }
    }

    /// Why not all that changes now is in force, if that is so.
    #[must_use]
    pub fn not_in_force(&self) -> Option<&str> {
        self.not_in_force.as_deref()
    }

    /// What does not fit into the kernel's tables, one sentence each.
    pub fn unfit(&self) -> impl Iterator<Item = String> {
        self.unfit.keys().filter_map(|id| self.unfit_of(self.workloads.get(id)?))
    }

    /// What of a workload does not fit into the kernel's tables.
    #[must_use]
    pub fn unfit_of(&self, workload: &Workload) -> Option<String> {
        let why = self.unfit.get(&workload.id)?;
        Some(format!("workload {} is refused everything: {why}", workload.name))
    }

    /// How much of the promise is kept for a workload. It may be less than this kernel gives: a hook may
    /// be gone from its cgroup, or a table may have no room for it.
    #[must_use]
    pub fn kept_for(&self, workload: &Workload) -> Kept {
        let states = self.states_of(workload);
        let unfit = self.unfit.get(&workload.id);
        let but_for = |protection: Protection| match unfit {
            Some(why) => protection.without(format!("what its grants permit: {why}")),
            None => protection,
        };
        Kept {
            all: but_for(self.datapath.protection_by(&states)),
            layers: Layer::ALL.map(|layer| (layer, but_for(Protection::of_layer(&states, layer)))),
        }
    }

    fn states_of(&self, workload: &Workload) -> Vec<(Door, DoorState)> {
        let states = self.datapath.states_of(workload.cgroup_id, workload.id);
        // Where the cgroup is gone, there is nothing left to hold.
        if states != self.datapath.states() && !workload.cgroup.exists() {
            return self.datapath.states().to_vec();
        }
        states
    }

    /// What this kernel gives and a workload lacks, one sentence for each.
    pub fn not_held(&self) -> impl Iterator<Item = String> {
        self.workloads.values().flat_map(|workload| self.not_held_by(workload))
    }

    fn not_held_by(&self, workload: &Workload) -> Vec<String> {
        let states = self.states_of(workload);
        let given = self.datapath.states().iter();
        let lacks = given.zip(states).filter_map(|((_, given), (door, state))| match state {
            DoorState::Unavailable(why) if *given == DoorState::Active => Some(format!(
                "workload {} is not held by {} ({}): {why}",
                workload.name, door.hook, door.closes
            )),
            DoorState::Unavailable(_) | DoorState::Active => None,
        });
        lacks.collect()
    }

    /// Why a container of a workload is not held by all that this kernel gives, if it is not.
    #[must_use]
    pub fn lacks(&self, workload: &Workload, container: &str) -> Option<String> {
        if let Some(why) = self.unfit.get(&workload.id) {
            return Some(why.clone());
        }
        if let Some(why) = self.not_held_by(workload).into_iter().next() {
            return Some(why);
        }
        let of_it = workload.containers.iter().find(|known| known.id == container)?;
        // Not known where it has gone again.
        let is_outside = of_it.cgroup != CgroupId(0)
            && self.datapath.workload_of(of_it.cgroup) != Some(workload.id);
        is_outside.then(|| format!("the kernel has no row for the cgroup of container {container}"))
    }

    /// Forgets words and rows of identities that are gone.
    fn forget_unused(&mut self) {
        let identities: BTreeSet<&SpiffeId> =
            self.workloads.values().filter_map(|workload| workload.identity.as_ref()).collect();
        // A row of its own is kept, as it would tell another's verdicts as this one's.
        self.counter_rows.retain(|identity, row| *row != OTHER || identities.contains(identity));
        let identities: BTreeSet<&str> =
            identities.into_iter().map(|identity| identity.as_str()).collect();
        let grants: BTreeSet<&str> =
            self.store.grants().map(|stored| stored.document.id.as_str()).collect();
        let containers: BTreeSet<&str> = self
            .workloads
            .values()
            .flat_map(|workload| &workload.containers)
            .map(|container| container.id.as_str())
            .collect();
        self.container_files.retain(|id| containers.contains(id));
        let launched: BTreeSet<String> =
            self.workloads.values().map(|workload| launch_grant(&workload.name)).collect();
        let catalogue = &self.manifests.catalogue;
        let scopes: BTreeSet<&str> = catalogue.iter().map(|scope| scope.scope.as_str()).collect();
        self.dirty |= self.names.forget_unused(
            |identity| identities.contains(identity),
            |scope| scope == LAUNCH || scopes.contains(scope),
            |grant| grants.contains(grant) || launched.contains(grant),
        );
    }

    /// Ends a workload: its cgroup is gone, or nobody's from now on.
    pub fn remove(&mut self, id: WorkloadId) {
        self.remove_all(&[id]);
    }

    /// Ends workloads, by one reconciliation.
    pub fn remove_all(&mut self, ids: &[WorkloadId]) {
        let there: Vec<WorkloadId> =
            ids.iter().copied().filter(|id| self.workloads.contains_key(id)).collect();
        if there.is_empty() {
            return;
        }
        for id in there {
            self.take_out(id);
        }
        self.reconcile();
        self.dirty = true;
    }

    /// Ends a workload but for its allow-list, which the next reconciliation retires.
    fn take_out(&mut self, id: WorkloadId) {
        self.record_workload(id, WorkloadChange::Removed, &[]);
        let gone = self.workloads.get(&id).filter(|workload| workload.owns_identity);
        let gone = gone.and_then(|workload| workload.identity.clone());
        self.drop_workload(id);
        if let Some(identity) = gone {
            self.end_grants_of(&identity);
        }
    }

    /// Takes back what was granted at run time to an identity that is gone for good. What manifests
    /// say is theirs to end.
    fn end_grants_of(&mut self, identity: &SpiffeId) {
        if self.workloads.values().any(|workload| workload.is(identity)) {
            return;
        }
        let now = Timestamp::now();
        let bound: Vec<GrantId> = self
            .store
            .grants()
            .filter(|stored| matches!(stored.source, Source::Api { .. }))
            .filter(|stored| stored.document.subject == Subject::Exact(identity.clone()))
            .map(|stored| stored.document.id.clone())
            .collect();
        for id in bound {
            let reason = format!("the identity {identity} is gone");
            if let Err(error) = self.store.revoke(&id, "agentguard".to_owned(), reason, now) {
                tracing::debug!(%error, "a grant was over before its identity");
            }
        }
    }

    fn drop_workload(&mut self, id: WorkloadId) {
        let Some(workload) = self.workloads.remove(&id) else { return };
        self.unfit.remove(&id);
        let released = self.datapath.release(workload.cgroup_id, id).and_then(|()| {
            fault::point("remove.released");
            self.datapath.forget(id)
        });
        if let Err(error) = released {
            tracing::error!(%error, workload = workload.name, "a workload was not let go whole");
        }
        if workload.source == WorkloadSource::Exec {
            self.end_grant(&workload.name);
            if let Err(error) = remove_cgroup(&workload.cgroup) {
                tracing::debug!(%error, path = %workload.cgroup.display(), "a cgroup stays");
            }
        }
        // Its last records may still be in a ring.
        self.names.workload_is_gone(id);
        fault::point("remove.forgotten");
    }

    /// Forgets what was granted to a workload of `exec` when it was started.
    pub fn end_grant(&mut self, workload: &str) {
        if let Ok(id) = exec_grant(workload).parse() {
            self.store.end(&id);
        }
    }

    // -- time ----------------------------------------------------------------------------------

    /// What is due: ends and beginnings of grants, workloads that are gone, allow-lists that no
    /// program reads any more.
    pub fn tick(&mut self) {
        match self.clock.refresh() {
            Ok(false) => {}
            Ok(true) => {
                tracing::warn!("the wall clock was set; the ends of all grants are reckoned anew");
                self.store.set_clock(self.clock);
                self.reconcile();
            }
            Err(error) => tracing::error!(%error, "it is not known whether the wall clock was set"),
        }
        let now = Timestamp::now();
        self.ticks += 1;
        if self.ticks.is_multiple_of(TICKS_TO_FORGET) {
            self.forget_unused();
        }
        let unfit: Vec<WorkloadId> = self.unfit.keys().copied().collect();
        for id in unfit {
            // What is wrong was said when it began.
            let _still_no_room = self.hold(id);
        }
        self.take_over_at_last();
        self.tell_losses();
        let is_due = self.next_change.is_some_and(|change| change <= now);
        if is_due {
            self.store.prune(now, KEPT_GRANT);
        }
        self.follow_moved();
        self.end_empty_workloads();
        if let Err(error) = self.datapath.keep_reserve() {
            tracing::error!(%error, "no places are kept free for the cgroups of workloads to come");
        }
        // Before anything new is written: a full table may have room again.
        self.sweep();
        if self.have_directories_changed() || is_due || self.unsettled {
            self.reconcile();
        }
    }

    /// Whether a directory of unix sockets came, went or was replaced, as far as it was its turn.
    fn have_directories_changed(&mut self) -> bool {
        if self.looked.elapsed() < LOOK {
            return false;
        }
        self.looked = Instant::now();
        self.socket_directories.have_changed(&self.mounts, LOOKED_AT).unwrap_or_else(|error| {
            tracing::error!(%error, "the directories of unix sockets can not be looked at");
            false
        })
    }

    fn follow_moved(&mut self) {
        for (pid, moved) in self.datapath.moved() {
            let Some(path) = self.cgroup_of_moved(pid, CgroupId(moved.cgroup)) else { continue };
            if let Err(error) = self.datapath.follow(&path) {
                tracing::error!(%error, workload = moved.workload.0, "a process was moved out and its cgroup has no hooks");
            }
        }
    }

    /// Where a process is that was moved; nothing if it ended, or has hooks there already and procfs
    /// knows it by another number.
    fn cgroup_of_moved(&self, pid: u32, cgroup: CgroupId) -> Option<PathBuf> {
        let root = &self.cgroups.root;
        if host::has_the_machines_pids() {
            return Some(root.join(cgroup_of(pid)?.strip_prefix("/").ok()?));
        }
        if self.datapath.follows(cgroup) { None } else { find_cgroup(root, cgroup) }
    }

    fn end_empty_workloads(&mut self) {
        // A process that the host moved out keeps its tag, and its workload, until it ends.
        let outside: BTreeSet<WorkloadId> =
            self.datapath.moved().iter().map(|(_, moved)| moved.workload).collect();
        let mut ended = Vec::new();
        for workload in self.workloads.values_mut() {
            if outside.contains(&workload.id) {
                continue;
            }
            match populated(&workload.cgroup) {
                Ok(None) => ended.push(workload.id),
                Ok(Some(true)) => workload.populated = true,
                Ok(Some(false))
                    if workload.source == WorkloadSource::Exec && workload.populated =>
                {
                    ended.push(workload.id);
                }
                Ok(Some(false)) => {}
                // Not known, as without a descriptor to look with: it is held on to.
                Err(error) => {
                    tracing::debug!(%error, path = %workload.cgroup.display(), "a cgroup can not be looked into");
                }
            }
        }
        self.remove_all(&ended);
    }

    fn sweep(&mut self) {
        let (due, kept) = std::mem::take(&mut self.retired)
            .into_iter()
            .partition(|(since, _)| since.elapsed() >= GRACE);
        self.retired = kept;
        let due: Vec<(Instant, Rows)> = due;
        for (_, rows) in due {
            if let Err(error) = self.datapath.drop_allowlist(&rows) {
                tracing::error!(%error, "rows of an old allow-list stay");
            }
            fault::point("sweep.dropped");
        }
        if let Some((since, allowlist, rules)) = self.inherited
            && since.elapsed() >= GRACE
        {
            self.inherited = None;
            match self.datapath.sweep(allowlist, rules, &BTreeSet::new()) {
                Ok(swept) => tracing::debug!(swept, "rows of an earlier daemon are gone"),
                Err(error) => tracing::error!(%error, "rows of an earlier daemon stay"),
            }
            fault::point("sweep.earlier");
        }
        self.sweep_unix_names();
        self.names.forget_gone(GRACE * 10);
        if !self.orphans.is_empty() {
            let members = self.datapath.cgroups().into_iter().map(|(_, workload)| workload);
            let outside = self.datapath.moved().into_iter().map(|(_, moved)| moved.workload);
            let alive: BTreeSet<WorkloadId> = members.chain(outside).collect();
            let (kept, gone) =
                std::mem::take(&mut self.orphans).into_iter().partition(|id| alive.contains(id));
            self.orphans = kept;
            let gone: BTreeSet<WorkloadId> = gone;
            for id in gone {
                if let Err(error) = self.datapath.forget(id) {
                    tracing::error!(%error, "the row of a workload that is gone stays");
                }
            }
        }
        let held: BTreeSet<CgroupId> =
            self.workloads.values().map(|workload| workload.cgroup_id).collect();
        let moved: BTreeSet<u64> =
            self.datapath.moved().iter().map(|(_, moved)| moved.cgroup).collect();
        // What the kernel takes for a workload's keeps its hooks, known here or not.
        let needed = |datapath: &Datapath, cgroup: CgroupId| {
            held.contains(&cgroup)
                || moved.contains(&cgroup.0)
                || datapath.workload_of(cgroup).is_some()
        };
        if let Err(error) = self.datapath.prune(needed) {
            tracing::debug!(%error, "pins of cgroups that are gone stay");
        }
    }

    /// Drops the allow-lists of an earlier daemon that no workload is held to any more, once no program reads
    /// them. Whether that made room.
    fn sweep_replaced(&mut self) -> bool {
        let Some((_, first, first_rules)) = self.inherited else { return false };
        std::thread::sleep(GRACE);
        let tags = self.datapath.workloads().into_iter().map(|(_, tag)| tag.allowlist);
        let in_force: BTreeSet<AllowlistId> = tags.filter(|number| *number < first).collect();
        match self.datapath.sweep(first, first_rules, &in_force) {
            Ok(swept) => swept > 0,
            Err(error) => {
                tracing::error!(%error, "rows of an earlier daemon stay");
                false
            }
        }
    }

    /// Forgets names of unix sockets that no scope has mentioned for a while and no row uses.
    fn sweep_unix_names(&mut self) {
        let over = self.unix_names.unmentioned(NAME_GRACE);
        if over.is_empty() || self.inherited.is_some() {
            return;
        }
        let installed = self.installed.values().map(|installed| &installed.rows);
        let rows = installed.chain(self.retired.iter().map(|(_, rows)| rows));
        let used: BTreeSet<UnixNameId> =
            rows.flat_map(|rows| &rows.unix_sockets).map(|(key, _)| key.name).collect();
        for (name, number) in over {
            if used.contains(&number) {
                continue;
            }
            match self.datapath.forget_unix_name(&name) {
                Ok(()) => self.unix_names.forget(&name),
                Err(error) => tracing::error!(%error, "the name of a unix socket stays"),
            }
        }
    }

    // -- evidence ------------------------------------------------------------------------------

    fn record_workload(
        &self,
        id: WorkloadId,
        change: WorkloadChange,
        inherited: &[InheritedSocket],
    ) {
        let Some(workload) = self.workloads.get(&id) else { return };
        let name = self.names.workload(id);
        let (protection, missing) = protection_of(&self.kept_for(workload).all);
        self.audit.append(RecordBody::Workload(Box::new(WorkloadRecord {
            change,
            workload: NamedWorkload {
                identity: workload.identity.as_ref().map(|id| Text::new(id.as_str())),
                name: Text::new(&workload.name),
                cgroup_id: workload.cgroup_id.0,
                cgroup: name.map(|name| Text::new(name.cgroup)),
                unit: workload.unit.as_ref().map(Text::new),
                container: None,
                pod: workload.pod.as_ref().map(pod_record),
            },
            mode: Word(workload.mode),
            protection,
            missing,
            inherited: inherited.iter().map(Inherited::from).collect(),
        })));
    }

    /// Records how many records of the kernel are missing, where that may be, no more than once a second:
    /// a row of counters takes kilobytes for each processor.
    fn tell_losses(&mut self) {
        self.note_losses_written();
        if self.looked_for_losses.is_none_or(|looked| looked.elapsed() >= LOOK_FOR_LOSSES)
            && self.may_have_lost.swap(false, Ordering::AcqRel)
        {
            self.look_for_losses();
        }
    }

    /// Notes what the log tells of losses, once it is written: a restart must not take for told what is not.
    pub fn note_losses_written(&mut self) {
        if self.losses == self.written_losses {
            return;
        }
        let counts = self.audit.counts();
        if counts.queued == 0 && !counts.failing {
            self.written_losses = self.losses.clone();
            self.dirty = true;
        }
    }

    /// Records how many records of the kernel are missing, if the log has not said so.
    pub fn look_for_losses(&mut self) {
        self.looked_for_losses = Some(Instant::now());
        let rows: BTreeSet<u16> = self.counter_rows.values().copied().chain([OTHER]).collect();
        let lost =
            |row: u16| self.datapath.counters(row).map(|counters| (row, counters.of(Fate::Lost)));
        match rows.into_iter().map(lost).collect::<Result<Vec<_>, _>>() {
            Ok(rows) => {
                let before = self.losses.clone();
                if let Some(loss) = self.losses.look(rows, Timestamp::now()) {
                    let lost = self.audit.counts().lost;
                    self.audit.append(RecordBody::Loss(loss));
                    if self.audit.counts().lost != lost {
                        // It, or another, found no room in front of the log.
                        self.losses = before;
                        self.may_have_lost.store(true, Ordering::Release);
                    }
                }
            }
            Err(error) => {
                tracing::error!(%error, "it is not known how many records the kernel lost");
                self.may_have_lost.store(true, Ordering::Release);
            }
        }
    }

    /// Records every grant whose state is another than when it was last recorded.
    fn record_grants(&mut self, now: Timestamp) {
        let mut seen = BTreeMap::new();
        let mut records = Vec::new();
        for stored in self.store.grants() {
            let state = self.store.state_of(stored, now);
            let phase = Phase::from(&state);
            let id = &stored.document.id;
            let before = self.recorded.get(id).copied();
            if before.is_none() {
                records.push(grant_record(stored, GrantChange::Added, None));
            }
            if before != Some(phase) {
                match state {
                    State::Pending => {}
                    State::Active => {
                        records.push(grant_record(stored, GrantChange::Activated, None));
                    }
                    State::Expired => {
                        records.push(grant_record(stored, GrantChange::Expired, None));
                    }
                    State::Revoked(by) => {
                        records.push(grant_record(stored, GrantChange::Revoked, Some(by)));
                    }
                }
            }
            seen.insert(id.clone(), phase);
        }
        self.dirty |= seen != self.recorded;
        self.recorded = seen;
        for record in records {
            self.audit.append(record);
        }
    }

    // -- restarts ------------------------------------------------------------------------------

    /// What a restart must know, if something of it has changed since it was last asked.
    pub fn take_changes(&mut self) -> Option<SavedState> {
        if !std::mem::take(&mut self.dirty) {
            return None;
        }
        Some(SavedState {
            next: (
                self.next_allowlist.0.saturating_add(NUMBERS_AHEAD),
                self.next_rules.0,
                self.next_workload.0.saturating_add(NUMBERS_AHEAD),
            ),
            next_unix_name: self.unix_names.next().0.saturating_add(NUMBERS_AHEAD),
            names: self.names.save(),
            grants: self.store.snapshot(),
            counter_rows: self
                .counter_rows
                .iter()
                .map(|(identity, row)| (identity.to_string(), *row))
                .collect(),
            workloads: self.workloads.values().map(SavedWorkload::from).collect(),
            losses: self.written_losses.clone(),
        })
    }

    /// Takes up what an earlier daemon left: its workloads that are still there, with the numbers
    /// the kernel knows them by.
    ///
    /// # Errors
    ///
    /// When grants and revocations can not be read: without them, what was revoked could be in force
    /// again.
    pub fn restore(&mut self, saved: SavedState) -> Result<(), RestoreError> {
        let SavedState {
            next: (allowlist, rules, workload),
            next_unix_name,
            names: _,
            grants,
            counter_rows,
            workloads,
            losses,
        } = saved;
        // Where the tables are new, the first look finds that its rows were begun anew.
        (self.losses, self.written_losses) = (losses.clone(), losses);
        // Numbers are never used again while anything in the kernel may remember them.
        self.next_allowlist = self.next_allowlist.max(AllowlistId(allowlist));
        self.next_rules = self.next_rules.max(RuleSetId(rules));
        self.next_workload = self.next_workload.max(WorkloadId(workload));
        self.unix_names.begin_at(UnixNameId(next_unix_name));
        if let Some(inherited) = &mut self.inherited {
            (inherited.1, inherited.2) = (self.next_allowlist, self.next_rules);
        }
        self.store.restore(grants)?;
        for (identity, row) in counter_rows {
            match identity.parse() {
                Ok(identity) => {
                    self.counter_rows.insert(identity, row);
                }
                Err(error) => tracing::error!(identity, %error, "a saved identity is not one"),
            }
        }
        let mut ended: Vec<SpiffeId> = Vec::new();
        for saved in workloads {
            let workload = match saved.restore() {
                Ok(workload) => workload,
                Err(error) => {
                    tracing::error!(error, "a saved workload can not be taken up");
                    continue;
                }
            };
            self.next_workload = self.next_workload.max(WorkloadId(workload.id.0 + 1));
            // A directory of that name made since is another cgroup.
            let is_gone = match cgroup_id(&workload.cgroup) {
                Ok(found) => found != workload.cgroup_id,
                Err(DatapathError::Cgroup { source, .. }) => is_gone(&source),
                Err(_not_known) => false,
            };
            let (id, name, source) = (workload.id, workload.name.clone(), workload.source);
            // Also one that ended meanwhile: its last records are in the rings still.
            self.enlist(workload);
            if is_gone {
                self.record_workload(id, WorkloadChange::Removed, &[]);
                let workload = self.workloads.remove(&id).filter(|gone| gone.owns_identity);
                ended.extend(workload.and_then(|workload| workload.identity));
                self.names.workload_is_gone(id);
                match source {
                    WorkloadSource::Exec => self.end_grant(&name),
                    WorkloadSource::Manifest | WorkloadSource::Container => {}
                }
            }
        }
        for identity in ended {
            self.end_grants_of(&identity);
        }
        Ok(())
    }

    /// Puts what was restored in force: allow-lists of this daemon's numbering, tags and hooks.
    ///
    /// Returns whether every workload is held whole; where not, what an earlier build of the kernel
    /// half holds must stay.
    #[must_use]
    pub fn resume(&mut self) -> bool {
        let mut whole = true;
        self.reconcile();
        // Until then they are held to what the earlier daemon left.
        for _ in 0..ROUNDS_FOR_ROOM {
            if !self.unsettled || !self.sweep_replaced() {
                break;
            }
            self.reconcile();
        }
        // What was begun and never written down goes when the last of its cgroups has gone. Tasks that are
        // tied to it may lie in what is about to be another's again.
        let in_kernel = self.datapath.workloads().into_iter();
        let unknown: Vec<(WorkloadId, Tag)> =
            in_kernel.filter(|(id, _)| !self.workloads.contains_key(id)).collect();
        for (id, tag) in &unknown {
            if let Err(error) = self.datapath.switch(*id, tag.giving_way()) {
                tracing::error!(%error, "a workload that was begun does not give way");
            }
        }
        self.orphans = unknown.into_iter().map(|(id, _)| id).collect();
        let ids: Vec<WorkloadId> = self.workloads.keys().copied().collect();
        for id in ids {
            if let Err(error) = self.hold(id) {
                tracing::error!(%error, "a workload is not held whole; trying again");
                self.unfit.insert(id, error.to_string());
                whole = false;
            }
        }
        self.dirty = true;
        whole && !self.unsettled
    }
}

/// The grants and scopes that an allow-list rests on.
fn permissions(allowlist: &CompiledAllowlist) -> BTreeSet<(GrantNumber, ScopeId)> {
    allowlist.permissions().map(|permission| (permission.grant, permission.scope)).collect()
}

/// How records name the permission to run what `exec` was asked to run, or a container starts with.
pub(super) fn launch_grant(workload: &str) -> String {
    format!("{LAUNCH}/{workload}")
}

/// The id of the grant that `exec` makes for a workload.
#[must_use]
pub fn exec_grant(workload: &str) -> String {
    format!("exec-{workload}")
}

impl Installed {
    fn tag(&self, mode: Mode) -> Tag {
        Tag::new(self.number, mode, self.rows.allowlist, self.rows.listening, self.counters)
    }
}

fn egress(
    scope: &ScopeDocument,
    cluster: &Cluster,
    problems: &mut BTreeSet<String>,
) -> Vec<EgressPermit> {
    let mut permits = Vec::new();
    for rule in &scope.egress {
        let blocks = rule.to.iter().filter_map(|to| match to {
            Destination::IpBlock { cidr, except } => {
                Some(Block { cidr: *cidr, except: except.clone() })
            }
            // Names are refused where manifests are read, until they are enforced; what is in a
            // cluster follows.
            Destination::DnsName(_) | Destination::Service(_) | Destination::Pods { .. } => None,
        });
        let blocks: Vec<Block> = blocks.collect();
        if !blocks.is_empty() {
            permits
                .push(EgressPermit { blocks, ports: rule.ports.iter().map(port_range).collect() });
        }
        for to in &rule.to {
            match cluster.resolve(to, &rule.ports) {
                Ok(targets) => permits.extend(targets.iter().map(egress_to)),
                Err(problem) => {
                    problems.insert(format!("scope {}: {problem}", scope.scope));
                }
            }
        }
    }
    permits
}

/// Each address by itself, so that it is covered though it is the cluster's own.
fn egress_to(targets: &Targets) -> EgressPermit {
    let block = |address: &IpAddr| Block { cidr: (*address).into(), except: Vec::new() };
    EgressPermit {
        blocks: targets.addresses.iter().map(block).collect(),
        ports: targets.ports.iter().map(port_range).collect(),
    }
}

/// The path of a socket that has one.
fn path_of(socket: &SocketAddress) -> Option<PathBuf> {
    match socket {
        SocketAddress::Path(path) => Some(PathBuf::from(path.to_string())),
        SocketAddress::Abstract(_) => None,
    }
}

/// The name of a socket, as the kernel finds its number. Manifests have none that is too long.
fn name_of(socket: &SocketAddress) -> Option<UnixName> {
    match socket {
        SocketAddress::Path(path) => UnixName::path(path.names().last()?.as_bytes()),
        SocketAddress::Abstract(name) => UnixName::abstract_name(name.as_bytes()),
    }
}

fn port_range(range: &crate::scope::PortRange) -> PortRange {
    PortRange { protocol: range.protocol, first: range.first, last: range.last }
}

fn grant_record(stored: &StoredGrant, change: GrantChange, by: Option<&Revocation>) -> RecordBody {
    let document = &stored.document;
    let (source, uid) = match stored.source {
        Source::Manifest => (ActorSource::Manifest, None),
        Source::Api { uid } | Source::Exec { uid } => (ActorSource::Api, Some(uid)),
    };
    let actor = match (by, change) {
        (Some(by), _) => {
            Some(Actor { source: ActorSource::Api, name: Text::new(&by.by), uid: None, pid: None })
        }
        (None, GrantChange::Added) => {
            let name = Text::new(&document.granted_by);
            Some(Actor { source, name, uid, pid: None })
        }
        (None, GrantChange::Activated | GrantChange::Expired | GrantChange::Revoked) => None,
    };
    RecordBody::Grant(Box::new(GrantRecord {
        change,
        grant: Text::new(document.id.as_str()),
        subject: Text::new(document.subject.as_str()),
        scopes: Text::list(document.scopes.iter().map(|scope| scope.as_str().as_bytes())),
        not_before: document.not_before,
        expires_at: match document.expiry {
            Expiry::At(time) => Some(time),
            Expiry::Never => None,
        },
        granted_by: Some(Text::new(&document.granted_by)),
        why: Some(Text::new(by.map_or(document.reason.as_str(), |by| by.reason.as_str()))),
        by: actor,
    }))
}

/// The words of records for how much is kept.
#[must_use]
pub fn protection_of(protection: &Protection) -> (ProtectionWord, Vec<Missing>) {
    match protection {
        Protection::Full => (ProtectionWord::Full, Vec::new()),
        Protection::None => (ProtectionWord::None, Vec::new()),
        Protection::Partial(missing) => {
            (ProtectionWord::Partial, missing.iter().map(|what| missing_of(what)).collect())
        }
    }
}

/// What is missing and why, out of one sentence.
#[must_use]
pub fn missing_of(sentence: &str) -> Missing {
    let (what, why) = sentence.split_once(": ").unwrap_or((sentence, "not in the portable layer"));
    Missing { what: Text::new(what), why: Text::new(why) }
}

/// Whether a cgroup or one below it has processes; `None` if it is gone.
pub fn populated(cgroup: &Path) -> io::Result<Option<bool>> {
    match fs::read_to_string(cgroup.join("cgroup.events")) {
        Ok(events) => Ok(Some(events.lines().any(|line| line == "populated 1"))),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether one cgroup lies in the other; none lies in itself.
pub(super) fn are_nested(one: &Path, other: &Path) -> bool {
    one != other && (one.starts_with(other) || other.starts_with(one))
}

/// Whether an error says that there is no such cgroup; one that is removed while it is read says so
/// in its own way.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(nix::errno::Errno::ENODEV as i32)
}

/// The cgroup of this number at `path` or below; nothing if it went.
fn find_cgroup(path: &Path, cgroup: CgroupId) -> Option<PathBuf> {
    if cgroup_id(path).is_ok_and(|id| id == cgroup) {
        return Some(path.to_owned());
    }
    let mut left = vec![path.to_owned()];
    while let Some(path) = left.pop() {
        // One that goes meanwhile has none below it.
        let entries = fs::read_dir(&path).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.ino() == cgroup.0 {
                return Some(entry.path());
            }
            left.push(entry.path());
        }
    }
    None
}

/// Removes a cgroup with those below it; all must be empty.
pub fn remove_cgroup(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// Now, in the clock of the kernel half.
#[must_use]
pub fn now() -> u64 {
    boot_ns()
}
