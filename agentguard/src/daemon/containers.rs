//! Containers as workloads: what the runtimes, the cluster and the runtimes' hooks say, put together
//! and held.
//!
//! A source that does not answer takes nothing away: what it last said stays, and nothing is let go
//! before every source has spoken once.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentguard_common::{CgroupId, FileId};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, getsockopt};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::container_files::ContainerRef;
use super::engine::{Engine, NewWorkload, Workload, WorkloadSource, populated};
use super::launch;
use super::nri;
use super::service::Shared;
use crate::api::service::ServiceError;
use crate::api::types::{Announced, Announcement};
use crate::config::Configuration;
use crate::datapath::cgroup_id;
use crate::identity::container::{
    Command, Container, Node, Placement, PodName, ProcessRef, Rules, Sandbox, Unseen, cgroup_of,
};
use crate::identity::pod::{Labels, Marking, Pod, PodUid};
use crate::runtimes::container_cgroup;
use crate::runtimes::cri::Cri;
use crate::runtimes::docker::Docker;
use crate::runtimes::nri::{Start, StartingContainer};
use crate::runtimes::{Listing, Runtime, RuntimeError};
use crate::scope::executables::Resolver;

/// How long a runtime's hook waits until it is known whose container it is about to start.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a sandbox waits for the cluster to speak of its pod: nothing of the pod's own runs in it.
const SANDBOX_PATIENCE: Duration = Duration::from_millis(500);
/// How long a runtime that did not answer is left alone at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// What has not changed is looked at again after this time: a tag that could not be given before.
const AGAIN: Duration = Duration::from_secs(1);
/// How often it is looked for the cgroup of a pod that the cluster has told of and no runtime yet, and
/// for how long: kubelet makes it before anything else of the pod.
const LOOK: Duration = Duration::from_millis(20);
const LOOKED_FOR: Duration = Duration::from_secs(60);
/// The same for a pod that the cluster has forgotten: kubelet may start it again before it sees that.
const STARTED_AGAIN: Duration = Duration::from_secs(5);
/// What is wrong where no program is found that runs containers.
const NO_PROGRAM: &str = "none of containers.runtime_programs is on this node: its steps are judged as the \
    agents', and without the runtime's hook no container of an agent starts in enforce mode; name the \
    program there";
/// How long a container runtime that was upgraded is taken for another program.
const PROGRAMS_CHANGE: Duration = Duration::from_secs(10);
/// Containers that were announced and never listed are believed in for this long.
const BELIEVED: Duration = Duration::from_secs(600);

/// How long it is remembered what a pod was that neither the cluster nor a runtime knows any more.
const REMEMBERED: Duration = Duration::from_secs(60);

/// What is known of containers, shared by all who hear of them.
#[derive(Debug)]
pub struct Containers {
    rules: Rules,
    inputs: Mutex<Inputs>,
    /// Something was heard.
    heard: Notify,
    /// Somebody waits for what the runtimes say.
    wanted: Notify,
    /// What starting each container runs, looked up once.
    launches: Mutex<BTreeMap<String, (ProcessRef, Vec<FileId>)>>,
    report: Mutex<Report>,
    /// How it stands with the runtime that waits for the daemon.
    pub nri: nri::Health,
    /// What the kernel half was told to be programs that run containers.
    programs: Mutex<Option<BTreeSet<FileId>>>,
    /// Where the cgroups may appear of pods that no runtime has told of yet, and how long that is looked
    /// for.
    awaited: Mutex<BTreeMap<PodUid, (Instant, Vec<PathBuf>)>>,
    /// Held while what should be is compared with what is: of two views the later must stay. Up to
    /// which version of what is known that is done.
    held: Mutex<u64>,
}

/// What operators are told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Workloads in sandboxes with a kernel of their own, which this one does not see.
    pub unseen: Vec<Placement>,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
}

#[derive(Debug, Default)]
struct Inputs {
    cluster: Option<Cluster>,
    /// What the cluster said last of pods that it does not know any more, and when somebody last knew the
    /// pod.
    forgotten: BTreeMap<PodUid, (Instant, Pod)>,
    /// Whether there is a cluster to hear of.
    has_cluster: bool,
    runtimes: BTreeMap<String, RuntimeInput>,
    announced: BTreeMap<String, Heard>,
    /// Grows with everything that is heard.
    version: u64,
}

#[derive(Debug, Default)]
struct RuntimeInput {
    listing: Option<Listing>,
    failure: Option<String>,
}

#[derive(Debug)]
struct Heard {
    at: Instant,
    container: Container,
    sandbox: Option<Sandbox>,
    teller: Teller,
}

/// Who announced a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Teller {
    /// A hook, which knows a pod by its name only.
    Hook,
    /// The runtime itself, which knows of a pod what it lists of it.
    Runtime,
}

/// What the cluster says of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    pub pods: BTreeMap<PodUid, Pod>,
    pub namespaces: BTreeMap<String, Labels>,
    /// Whether there was no room for some of the namespaces.
    pub lacks_namespaces: bool,
}

impl Containers {
    #[must_use]
    pub fn new(configuration: &Configuration) -> Self {
        let containers = &configuration.containers;
        let rules = Rules {
            marking: Marking {
                selectors: containers.agent_selectors.clone(),
                exempt: containers.exempt_namespaces.clone(),
                mode: configuration.mode.into(),
            },
            template: containers.identity.get().clone(),
            trust_domain: configuration.trust_domain.to_string(),
            sandboxed: containers.sandboxed_handlers.clone(),
        };
        Self {
            rules,
            inputs: Mutex::default(),
            heard: Notify::new(),
            wanted: Notify::new(),
            launches: Mutex::default(),
            report: Mutex::default(),
            nri: nri::Health::default(),
            programs: Mutex::default(),
            awaited: Mutex::default(),
            held: Mutex::default(),
        }
    }

    /// Says that there is a cluster to be heard before anything is let go.
    pub fn expect_cluster(&self) {
        self.inputs().has_cluster = true;
    }

    /// Takes what the cluster says of this node, all of it.
    pub fn set_cluster(&self, cluster: Cluster) {
        let mut inputs = self.inputs();
        if inputs.cluster.as_ref() != Some(&cluster) {
            inputs.set_cluster(cluster);
            inputs.version += 1;
            drop(inputs);
            self.heard.notify_one();
        }
    }

    /// What operators should know.
    #[must_use]
    pub fn report(&self) -> Report {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner).clone();
        report.problems.extend(self.nri.problem());
        report
    }

    /// Has the runtimes asked what there is: something may have started meanwhile.
    pub fn ask_runtimes(&self) {
        self.wanted.notify_waiters();
    }

    fn inputs(&self) -> MutexGuard<'_, Inputs> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_runtime(&self, endpoint: &str, listing: Result<Listing, String>) {
        let mut inputs = self.inputs();
        let input = inputs.runtimes.entry(endpoint.to_owned()).or_default();
        match listing {
            Ok(listing) => {
                let untold = listing.untold.as_ref().map(ToString::to_string);
                let is_new = input.listing.as_ref() != Some(&listing) || input.failure != untold;
                input.failure = untold;
                input.listing = Some(listing);
                if !is_new {
                    return;
                }
            }
            Err(failure) => input.failure = Some(failure),
        }
        inputs.version += 1;
        drop(inputs);
        self.heard.notify_one();
    }

    /// Takes what starting each held container ran for what it was found to be first, by an earlier
    /// daemon if need be: the container may have put something else there since.
    fn recall(&self, engine: &Engine) {
        let mut known = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        let held = engine.workloads().flat_map(|workload| &workload.containers);
        for container in held.filter(|container| !container.launch.is_empty()) {
            known
                .entry(container.id.clone())
                .or_insert_with(|| (container.process, container.launch.clone()));
        }
    }

    /// What starting a container runs. Looks at files of the image, which may take any time.
    fn launch(&self, container: &Container) -> Vec<FileId> {
        let known = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((process, files)) = known.get(&container.id)
            && *process == container.process
        {
            return files.clone();
        }
        drop(known);
        let Some(Command { executable, search_path }) = &container.command else {
            return Vec::new();
        };
        let mounts = Resolver::of_container(&container.process.directory(), &container.root);
        let files = launch::of_container(&mounts, executable, search_path);
        if !container.process.is_alive() {
            return Vec::new();
        }
        let mut known = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(container.id.clone(), (container.process, files.clone()));
        files
    }

    /// Finds the cgroups of pods that no runtime has told of yet.
    fn find_pods(&self, root: &Path, node: &mut Node) {
        let now = Instant::now();
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        let mut still = BTreeMap::new();
        let mut found = BTreeMap::new();
        for Pod { uid, .. } in self.rules.awaited(node) {
            let is_known = node.pods.contains_key(uid);
            let looked_for = if is_known { LOOKED_FOR } else { STARTED_AGAIN };
            let until = awaited.get(uid).map_or(now + looked_for, |(until, _)| *until);
            let paths = node.cgroups_of(uid);
            match paths.iter().find(|path| below(root, path).is_dir()) {
                Some(path) if is_known => drop(found.insert(uid.clone(), path.clone())),
                // What kubelet leaves behind of one that nobody knows any more holds nothing.
                Some(path) => {
                    if now < until || matches!(populated(&below(root, path)), Ok(Some(true))) {
                        found.insert(uid.clone(), path.clone());
                    }
                    still.insert(uid.clone(), (until, Vec::new()));
                }
                None => {
                    let paths = paths.iter().map(|path| below(root, path)).collect();
                    still.insert(uid.clone(), (until, paths));
                }
            }
        }
        *awaited = still;
        drop(awaited);
        node.pod_cgroups = found;
    }

    /// Waits for what there is to hold: something is heard of, a cgroup appears that is waited for, or
    /// it is time to look again in any case.
    async fn something(&self) {
        let end = Instant::now() + AGAIN;
        let heard = self.heard.notified();
        tokio::pin!(heard);
        while Instant::now() < end {
            let paths: Vec<PathBuf> = {
                let awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
                let lately = awaited.values().filter(|(until, _)| Instant::now() < *until);
                lately.flat_map(|(_, paths)| paths.clone()).collect()
            };
            if paths.iter().any(|path| path.is_dir()) {
                return;
            }
            let pause = if paths.is_empty() { AGAIN } else { LOOK };
            let until = end.min(Instant::now() + pause);
            if tokio::time::timeout_at(until, heard.as_mut()).await.is_ok() {
                return;
            }
        }
    }

    /// Whether there are runtimes, and no program of theirs is known.
    fn has_no_program(&self) -> bool {
        let told = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        let has_runtimes = !self.inputs().runtimes.is_empty();
        has_runtimes && told.as_ref().is_some_and(BTreeSet::is_empty)
    }

    fn reference(&self, root: &Path, container: &Container) -> ContainerRef {
        ContainerRef {
            id: container.id.clone(),
            name: container.name.clone(),
            process: container.process,
            root: container.root.clone(),
            launch: self.launch(container),
            cgroup: cgroup_id(&below(root, &container.cgroup)).unwrap_or(CgroupId(0)),
        }
    }
}

/// How much is known of a pod whose container is about to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    No,
    /// What a runtime says of it, and the labels of its namespace; the cluster may say more.
    ByRuntime,
    /// All that there is to know.
    Whole,
}

impl Inputs {
    fn set_cluster(&mut self, cluster: Cluster) {
        let now = Instant::now();
        // Before its first word there is nothing to forget.
        let before = self.cluster.take().into_iter().flat_map(|before| before.pods);
        self.forgotten.extend(before.map(|(uid, pod)| (uid, (now, pod))));
        self.forgotten.retain(|uid, _| !cluster.pods.contains_key(uid));
        self.cluster = Some(cluster);
    }

    /// What is known of a sandbox's pod. Where there is a cluster, that is nothing as long as the
    /// labels of its namespace are not known, which can make an agent of it.
    fn knows(&self, sandbox: &Sandbox) -> Known {
        let by_runtime = || {
            let mut listings = self.runtimes.values().filter_map(|known| known.listing.as_ref());
            let mut told = self.told_by(Teller::Runtime);
            listings.any(|listing| listing.sandboxes.contains_key(&sandbox.id))
                || told.any(|told| told.sandbox.as_ref().is_some_and(|one| one.id == sandbox.id))
        };
        if !self.has_cluster {
            return if by_runtime() { Known::Whole } else { Known::No };
        }
        let Some(cluster) = &self.cluster else { return Known::No };
        let pod = cluster.pods.get(&sandbox.pod.uid);
        let namespace = pod.map_or(&sandbox.pod.namespace, |pod| &pod.namespace);
        // One that found no room is taken for the strictest there is.
        let is_labelled = cluster.namespaces.contains_key(namespace) || cluster.lacks_namespaces;
        match (is_labelled, pod) {
            (true, Some(_)) => Known::Whole,
            (true, None) if by_runtime() => Known::ByRuntime,
            (true, None) | (false, _) => Known::No,
        }
    }

    fn told_by(&self, teller: Teller) -> impl Iterator<Item = &Heard> {
        self.announced.values().filter(move |heard| heard.teller == teller)
    }

    /// Everything together: what runtimes list goes before what they announced, and that before what
    /// their hooks did.
    fn node(&self) -> Node {
        let mut node = Node::default();
        for heard in self.told_by(Teller::Runtime).chain(self.told_by(Teller::Hook)) {
            node.containers.insert(heard.container.id.clone(), heard.container.clone());
            if let Some(sandbox) = &heard.sandbox {
                let known = node.sandboxes.entry(sandbox.id.clone());
                let known = known.or_insert_with(|| sandbox.clone());
                // Only the sandbox's own announcement tells its cgroup.
                known.cgroup = known.cgroup.take().or(sandbox.cgroup.clone());
            }
        }
        for listing in self.runtimes.values().filter_map(|runtime| runtime.listing.as_ref()) {
            node.sandboxes.extend(listing.sandboxes.clone());
            for (id, listed) in &listing.containers {
                let mut container = listed.clone();
                if let Some(heard) = self.announced.get(id) {
                    // The hook has read the command; not every runtime tells.
                    container.command = container.command.or(heard.container.command.clone());
                }
                node.containers.insert(id.clone(), container);
            }
        }
        node.has_cluster = self.has_cluster;
        let forgotten = self.forgotten.iter();
        node.forgotten = forgotten.map(|(uid, (_, pod))| (uid.clone(), pod.clone())).collect();
        if let Some(Cluster { pods, namespaces, lacks_namespaces }) = &self.cluster {
            node.pods.clone_from(pods);
            node.namespaces.clone_from(namespaces);
            node.lacks_namespaces = *lacks_namespaces;
        }
        node
    }

    /// Whether every source has spoken: what none of them knows of is not there.
    fn is_complete(&self) -> bool {
        (!self.has_cluster || self.cluster.is_some())
            && self.runtimes.values().all(|runtime| {
                runtime.listing.as_ref().is_some_and(|listing| listing.untold.is_none())
            })
    }

    /// Forgets announced containers that ended, and pods that nobody has known for a while.
    fn prune(&mut self, now: Instant) {
        let listings = self.runtimes.values().filter_map(|runtime| runtime.listing.as_ref());
        let listed: BTreeSet<PodUid> = listings
            .flat_map(|listing| listing.sandboxes.values())
            .chain(self.announced.values().filter_map(|heard| heard.sandbox.as_ref()))
            .map(|sandbox| sandbox.pod.uid.clone())
            .collect();
        self.forgotten.retain(|uid, (known, _)| {
            if listed.contains(uid) {
                *known = now;
            }
            now.saturating_duration_since(*known) < REMEMBERED
        });
        let listed: BTreeSet<String> = self
            .runtimes
            .values()
            .filter_map(|runtime| runtime.listing.as_ref())
            .flat_map(|listing| listing.containers.keys().cloned())
            .collect();
        self.announced.retain(|id, heard| {
            let is_young = now.saturating_duration_since(heard.at) < BELIEVED;
            heard.container.process.is_alive() && (is_young || listed.contains(id))
        });
    }
}

/// Follows a runtime for as long as the daemon runs.
async fn follow(containers: Arc<Containers>, mut runtime: impl Runtime) {
    let mut pause = RETRY.0;
    loop {
        match runtime.list().await {
            Ok(listing) => {
                pause = RETRY.0;
                let is_short = listing.untold.is_some();
                if let Some(error) = &listing.untold
                    && !is_failing(&containers, runtime.endpoint())
                {
                    tracing::error!(%error, "nothing is let go until the runtime tells");
                }
                containers.set_runtime(runtime.endpoint(), Ok(listing));
                tokio::select! {
                    () = runtime.changed() => {}
                    () = containers.wanted.notified() => {}
                    () = tokio::time::sleep(RETRY.1), if is_short => {}
                }
            }
            Err(error) => {
                if !is_failing(&containers, runtime.endpoint()) {
                    tracing::error!(%error, "what the container runtime said last stays in force");
                }
                containers.set_runtime(runtime.endpoint(), Err(error.to_string()));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY.1);
            }
        }
    }
}

/// Whether it is known that a runtime does not say all that there is.
fn is_failing(containers: &Containers, endpoint: &str) -> bool {
    let inputs = containers.inputs();
    inputs.runtimes.get(endpoint).is_some_and(|known| known.failure.is_some())
}

/// Says that a runtime is to be heard before anything is let go.
fn expect(containers: &Containers, endpoint: &str) {
    containers.inputs().runtimes.entry(endpoint.to_owned()).or_default();
}

/// Tells the kernel half which programs of this host run containers. They are looked up where the host
/// sees files, and where each runtime does, which may be elsewhere.
pub fn tell_runtimes(shared: &Shared) {
    let configured = &shared.configuration.containers;
    let mut views = vec![shared.engine().host_mounts().clone()];
    let mut is_whole = true;
    let mut has_runtimes = false;
    for socket in configured.runtimes.iter().chain(&configured.docker) {
        has_runtimes = true;
        match serves(socket.as_ref()).filter(|process| !is_held(shared, process)) {
            Some(process) => views.push(Resolver::new(process.directory().join("root"))),
            None => is_whole = false,
        }
    }
    let mut found = BTreeSet::new();
    for view in &views {
        let programs = configured.runtime_programs.iter();
        found.extend(programs.filter_map(|path| launch::file_id(view, path.as_ref()).ok()));
    }
    let mut told = shared.containers.programs.lock().unwrap_or_else(PoisonError::into_inner);
    // Where one does not answer, its programs are what they were.
    if let Some(told) = told.as_ref().filter(|_| !is_whole) {
        found.extend(told);
    }
    shared.engine().set_runtimes(&found);
    if has_runtimes && found.is_empty() && told.as_ref().is_none_or(|told| !told.is_empty()) {
        tracing::error!("{NO_PROGRAM}");
    }
    *told = Some(found);
}

/// The process behind a runtime's socket.
fn serves(path: &Path) -> Option<ProcessRef> {
    // One that takes no connection must not hold up whoever looks.
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let stream = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None).ok()?;
    socket::connect(stream.as_raw_fd(), &UnixAddr::new(path).ok()?).ok()?;
    let peer = getsockopt(&stream, PeerCredentials).ok()?;
    ProcessRef::of(u32::try_from(peer.pid()).ok()?)
}

/// Whether a process is in the cgroup of a workload, which has no say in what runs containers.
pub fn is_held(shared: &Shared, process: &ProcessRef) -> bool {
    let Some(cgroup) = cgroup_of(process.pid) else { return true };
    let engine = shared.engine();
    let cgroup = below(engine.cgroup_root(), &cgroup);
    engine.workloads().any(|workload| cgroup.starts_with(&workload.cgroup))
}

/// Says which runtimes are to be heard before anything is let go.
pub fn expect_runtimes(containers: &Containers, configuration: &Configuration) {
    let configured = &configuration.containers;
    for socket in configured.runtimes.iter().chain(&configured.docker) {
        expect(containers, &socket.display().to_string());
    }
}

/// Follows all runtimes that are configured.
///
/// # Errors
///
/// When the socket of one can not be named.
pub fn follow_runtimes(shared: &Shared, tasks: &mut JoinSet<()>) -> Result<(), RuntimeError> {
    let configured = &shared.configuration.containers;
    for socket in &configured.runtimes {
        tasks.spawn(follow(Arc::clone(&shared.containers), Cri::new(socket.as_ref())?));
    }
    if let Some(socket) = &configured.docker {
        tasks.spawn(follow(Arc::clone(&shared.containers), Docker::new(socket.as_ref())));
    }
    Ok(())
}

/// Holds what is heard of, for as long as the daemon runs.
pub async fn watch(shared: Arc<Shared>) {
    let mut told = Instant::now();
    loop {
        if told.elapsed() >= PROGRAMS_CHANGE {
            told = Instant::now();
            let work = Arc::clone(&shared);
            if let Err(error) = tokio::task::spawn_blocking(move || tell_runtimes(&work)).await {
                tracing::error!(%error, "it was not looked which programs run containers");
            }
        }
        shared.containers.something().await;
        let work = Arc::clone(&shared);
        let held = tokio::task::spawn_blocking(move || hold(&work, u64::MAX)).await;
        match held {
            // It is in force; the next change need not wait for the disk.
            Ok(true) => {
                let work = Arc::clone(&shared);
                drop(tokio::task::spawn_blocking(move || super::save(&work)));
            }
            Ok(false) => {}
            Err(error) => {
                tracing::error!(%error, "containers were not looked at; what is in force stays");
            }
        }
    }
}

/// Takes in what should be held and lets go what should not, unless that was done since `version` of
/// what is known: of many who ask at the same time, one does it for all. Whether something changed
/// that is to be written down.
fn hold(shared: &Shared, version: u64) -> bool {
    let containers = &shared.containers;
    let mut held = containers.held.lock().unwrap_or_else(PoisonError::into_inner);
    if *held >= version {
        return false;
    }
    let (mut node, is_complete, failures, seen) = {
        let mut inputs = containers.inputs();
        inputs.prune(Instant::now());
        let failures: Vec<String> =
            inputs.runtimes.values().filter_map(|runtime| runtime.failure.clone()).collect();
        (inputs.node(), inputs.is_complete(), failures, inputs.version)
    };
    let root = {
        let engine = shared.engine();
        containers.recall(&engine);
        engine.cgroup_root().to_owned()
    };
    containers.find_pods(&root, &mut node);
    let placements = containers.rules.place(&node);
    let mut problems = failures;
    if containers.has_no_program() {
        problems.push(NO_PROGRAM.to_owned());
    }
    let mut wanted = Vec::new();
    for placement in placements.iter().filter(|placement| placement.unseen.is_none()) {
        problems.extend(
            placement.problem.as_ref().map(|problem| format!("{}: {problem}", placement.name)),
        );
        if let Err(why) = &placement.identity {
            problems.push(format!("{} is denied everything: {why}", placement.name));
        }
        // Looks at files, so that nobody else may wait for it.
        let references =
            placement.containers.iter().map(|container| containers.reference(&root, container));
        wanted.push(new_workload(placement, &root, references.collect()));
    }
    keep_said(&shared.engine(), &node, &mut wanted);
    if !is_complete {
        keep_known(&shared.engine(), &mut wanted);
    }
    let wanted_cgroups: BTreeSet<PathBuf> = wanted.iter().map(|new| new.cgroup.clone()).collect();
    let (mut has_changed, failed) = shared.engine().bring(wanted);
    for (name, error) in failed {
        tracing::error!(%error, workload = name, "a container is not held; trying again");
        problems.push(format!("{name}: {error}"));
    }
    if is_complete {
        has_changed |= let_go(shared, &node, &wanted_cgroups);
        let mut launches = containers.launches.lock().unwrap_or_else(PoisonError::into_inner);
        launches.retain(|id, _| node.containers.contains_key(id));
    }
    let unseen = placements.into_iter().filter(|placement| placement.unseen.is_some()).collect();
    let mut report = containers.report.lock().unwrap_or_else(PoisonError::into_inner);
    *report = Report { unseen, problems };
    drop(report);
    *held = seen;
    has_changed
}

/// Keeps the containers of an earlier daemon's in what is wanted, where nobody has said yet what runs: that
/// nobody has told of them does not mean that they ended.
fn keep_known(engine: &Engine, wanted: &mut [NewWorkload]) {
    for new in wanted {
        let known = engine.workload_at(&new.cgroup).map_or(&[][..], |known| &known.containers);
        let untold = untold_and_alive(known, &new.containers);
        new.containers.extend(untold);
    }
}

fn untold_and_alive(known: &[ContainerRef], told: &[ContainerRef]) -> Vec<ContainerRef> {
    let is_told = |known: &&ContainerRef| told.iter().any(|told| told.id == known.id);
    let untold = known.iter().filter(|known| !is_told(known) && known.process.is_alive());
    untold.cloned().collect()
}

/// What the cluster last said of a pod holds for as long as the pod runs. Of one that it does not know any
/// more (it was deleted by force, or grew beyond the room there is), the runtime knows only the labels that
/// it was made with. That is remembered (`Inputs::forgotten`); what only an earlier daemon was told, or what
/// was forgotten since, is known by what is held.
fn keep_said(engine: &Engine, node: &Node, wanted: &mut [NewWorkload]) {
    for new in wanted.iter_mut().filter(|new| is_unsaid(node, new.pod.as_ref())) {
        let known = engine.workload_at(&new.cgroup).filter(|known| known.pod == new.pod);
        if let Some(known) = known {
            new.identity.clone_from(&known.identity);
            new.mode = known.mode;
        }
    }
}

/// Whether there is a cluster, and it is not known what it says of this pod, or said last.
fn is_unsaid(node: &Node, pod: Option<&PodName>) -> bool {
    let is_said = |pod: &PodName| {
        PodUid::new(&pod.uid)
            .is_some_and(|uid| node.pods.contains_key(&uid) || node.forgotten.contains_key(&uid))
    };
    node.has_cluster && pod.is_some_and(|pod| !is_said(pod))
}

fn new_workload(placement: &Placement, root: &Path, containers: Vec<ContainerRef>) -> NewWorkload {
    NewWorkload {
        name: placement.name.clone(),
        identity: placement.identity.as_ref().ok().cloned(),
        cgroup: below(root, &placement.cgroup),
        mode: placement.mode,
        source: WorkloadSource::Container,
        owner: None,
        unit: None,
        launch: Vec::new(),
        inherited: Vec::new(),
        pod: placement.pod.clone(),
        containers,
        owns_identity: placement.owns_identity,
    }
}

/// The directory of a cgroup.
fn below(root: &Path, cgroup: &Path) -> PathBuf {
    root.join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

/// Whether something was let go.
fn let_go(shared: &Shared, node: &Node, wanted: &BTreeSet<PathBuf>) -> bool {
    let mut engine = shared.engine();
    let gone: Vec<_> = engine
        .workloads()
        .filter(|workload| workload.source == WorkloadSource::Container)
        .filter(|workload| !wanted.contains(&workload.cgroup))
        .filter(|workload| {
            is_no_agents(node, workload) || !matches!(populated(&workload.cgroup), Ok(Some(true)))
        })
        .map(|workload| workload.id)
        .collect();
    engine.remove_all(&gone);
    !gone.is_empty()
}

/// Whether what a workload that is not wanted was made of is still there, so that somebody says that it is
/// no agent any more. A runtime that has forgotten what still runs does not free it, and neither does a
/// cluster that has forgotten the pod.
fn is_no_agents(node: &Node, workload: &Workload) -> bool {
    let Workload { pod, containers, .. } = workload;
    let is_of =
        |pod: &PodName| node.sandboxes.values().any(|sandbox| sandbox.pod.uid.as_str() == pod.uid);
    let is_there = pod.as_ref().is_some_and(is_of)
        || containers.iter().any(|container| node.containers.contains_key(&container.id));
    is_there && !is_unsaid(node, pod.as_ref())
}

/// Takes in a container whose first process waits for the answer.
///
/// # Errors
///
/// When it is not a container, or it can not be told whose it is: it may be an agent's.
pub async fn announce(
    shared: &Arc<Shared>,
    announcement: &Announcement,
) -> Result<Announced, ServiceError> {
    let heard = hear(announcement)?;
    let containers = &shared.containers;
    let exempt = &containers.rules.marking.exempt;
    if announcement.pod.as_ref().is_some_and(|pod| exempt.contains(&pod.namespace)) {
        return Ok(NOBODYS);
    }
    take_in(shared, heard, PATIENCE).await
}

/// Takes in what a runtime is about to start, and waits for, `patience` at most.
///
/// # Errors
///
/// As [`announce`].
pub async fn start(
    shared: &Arc<Shared>,
    start: Start,
    patience: Duration,
) -> Result<Announced, ServiceError> {
    let rules = &shared.containers.rules;
    let Sandbox { pod, handler, .. } = &start.sandbox;
    if rules.marking.exempt.contains(&pod.namespace) || rules.is_sandboxed(handler) {
        return Ok(NOBODYS);
    }
    // The rest is for holding it.
    let patience = PATIENCE.min(patience / 2);
    if let (0, Some(container)) = (start.pid, &start.container) {
        return take_in_listed(shared, &start.sandbox, &container.id, patience).await;
    }
    let id = start.container.as_ref().map_or(&start.sandbox.id, |container| &container.id);
    let first = first_process(start.pid, id)?;
    take_in(shared, hear_start(start, first), patience).await
}

/// Takes in a container of which the runtime does not say what its first process is (CRI-O before it
/// told plugins), once its list does.
async fn take_in_listed(
    shared: &Arc<Shared>,
    sandbox: &Sandbox,
    id: &str,
    patience: Duration,
) -> Result<Announced, ServiceError> {
    let containers = &shared.containers;
    let until = Instant::now() + patience;
    loop {
        let (is_nobodys, is_listed, version) = {
            let inputs = containers.inputs();
            let is_known = !inputs.has_cluster || inputs.knows(sandbox) != Known::No;
            let node = inputs.node();
            let is_nobodys = is_known && !containers.rules.is_agent(&node, sandbox);
            (is_nobodys, node.containers.contains_key(id), inputs.version)
        };
        if is_nobodys {
            return Ok(NOBODYS);
        }
        if is_listed {
            put_in_force(shared, version).await?;
            return answer(shared, id);
        }
        if Instant::now() >= until {
            return Err(ServiceError::Unavailable {
                error: format!(
                    "the container runtime does not say what the process of container {id} is"
                ),
                remedy:
                    "see agentguard status; check containers.runtimes, or set containers.nri to off"
                        .to_owned(),
            });
        }
        containers.ask_runtimes();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What is no agent's.
const NOBODYS: Announced = Announced { workload: None, identity: None };

async fn take_in(
    shared: &Arc<Shared>,
    heard: Heard,
    patience: Duration,
) -> Result<Announced, ServiceError> {
    let containers = &shared.containers;
    let is_sandbox = heard.container.is_sandbox;
    let patience = if is_sandbox { SANDBOX_PATIENCE.min(patience) } else { patience };
    let until = Instant::now() + patience;
    let id = heard.container.id.clone();
    let sandbox = heard.sandbox.clone();
    {
        let mut inputs = containers.inputs();
        inputs.announced.insert(id.clone(), heard);
        inputs.version += 1;
    }
    // Whose it is must be known before it runs: by the cluster, or by the runtime's own list.
    loop {
        let is_late = Instant::now() >= until;
        let known = sandbox.as_ref().map(|sandbox| containers.inputs().knows(sandbox));
        match known {
            None | Some(Known::Whole) => break,
            Some(Known::ByRuntime) if is_late => break,
            Some(Known::ByRuntime | Known::No) => {}
        }
        if is_late {
            if is_sandbox {
                break;
            }
            return Err(ServiceError::Unavailable {
                error: format!(
                    "neither the cluster nor the container runtime has spoken of the pod of container {id}"
                ),
                remedy: "see agentguard status; check containers.runtimes and kubernetes"
                    .to_owned(),
            });
        }
        containers.ask_runtimes();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let version = containers.inputs().version;
    put_in_force(shared, version).await?;
    answer(shared, &id)
}

/// Holds what is known by `version`.
async fn put_in_force(shared: &Arc<Shared>, version: u64) -> Result<(), ServiceError> {
    let work = Arc::clone(shared);
    let held = tokio::task::spawn_blocking(move || {
        hold(&work, version);
        // Also what was held for it by another: a daemon that starts after this one knows of it.
        super::save(&work);
    });
    held.await.map_err(|error| ServiceError::Unavailable {
        error: error.to_string(),
        remedy: "see the daemon's log".to_owned(),
    })
}

/// What became of the container.
fn answer(shared: &Shared, id: &str) -> Result<Announced, ServiceError> {
    let node = shared.containers.inputs().node();
    let placements = shared.containers.rules.place(&node);
    let of_it =
        |placement: &&Placement| placement.containers.iter().any(|container| container.id == id);
    let Some(placement) = placements.iter().find(of_it) else {
        return Ok(NOBODYS);
    };
    match placement.unseen {
        None => {}
        Some(Unseen::Kernel) => return Ok(NOBODYS),
        Some(Unseen::Cgroup) => {
            return Err(ServiceError::Unavailable {
                error: format!("{} has no cgroup of version 2 of its own", placement.name),
                remedy: "have its runtime use cgroups of version 2".to_owned(),
            });
        }
    }
    let engine = shared.engine();
    let Some(workload) = engine.workload_at(&below(engine.cgroup_root(), &placement.cgroup)) else {
        return Err(ServiceError::Unavailable {
            error: format!("{} could not be held", placement.name),
            remedy: "see agentguard status".to_owned(),
        });
    };
    if let Some(why) = engine.lacks(workload, id) {
        return Err(ServiceError::Unavailable {
            error: format!("{} is not held whole: {why}", placement.name),
            remedy: "see agentguard status".to_owned(),
        });
    }
    Ok(Announced {
        workload: Some(workload.name.clone()),
        identity: workload.identity.as_ref().map(ToString::to_string),
    })
}

fn hear(announcement: &Announcement) -> Result<Heard, ServiceError> {
    let invalid = |error: String| ServiceError::Invalid(vec![error]);
    let Announcement {
        id,
        pid,
        root,
        name,
        is_sandbox,
        sandbox,
        pod,
        labels,
        command,
        search_path,
    } = announcement.clone();
    if id.is_empty() || id.len() > 256 {
        return Err(invalid(format!(
            "id: {id:?} is no container's; give the runtime's identifier"
        )));
    }
    if !root.is_absolute() {
        return Err(invalid(format!("root: {} is not absolute", root.display())));
    }
    match (&pod, &sandbox) {
        (Some(_), Some(_)) | (None, None) => {}
        // Taken for a container without a pod, it would be nobody's.
        (Some(_), None) => {
            return Err(invalid("sandbox: is missing; a pod's container is in one".to_owned()));
        }
        (None, Some(_)) => {
            return Err(invalid("pod: is missing; a sandbox is a pod's".to_owned()));
        }
    }
    let (process, cgroup) = first_process(pid, &id)?;
    let sandbox_of = match (&pod, &sandbox) {
        (None, _) | (_, None) => None,
        (Some(pod), Some(sandbox)) => Some(Sandbox {
            id: sandbox.clone(),
            pod: Pod {
                uid: PodUid::new(&pod.uid)
                    .ok_or_else(|| invalid(format!("pod.uid: {:?} is none", pod.uid)))?,
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                service_account: None,
                labels: Labels::new(),
                host_network: false,
                runtime_class: None,
            },
            handler: String::new(),
            cgroup: is_sandbox.then(|| cgroup.clone()),
        }),
    };
    let command = command.map(|executable| Command {
        executable,
        search_path: search_path.unwrap_or_else(|| launch::SEARCH_PATH.to_owned()),
    });
    let container = Container {
        id,
        sandbox,
        name,
        labels,
        handler: String::new(),
        is_sandbox,
        cgroup,
        process,
        root,
        command,
    };
    Ok(Heard { at: Instant::now(), container, sandbox: sandbox_of, teller: Teller::Hook })
}

/// What a runtime says of what it is about to start, as it lists what it has started.
fn hear_start(start: Start, (process, cgroup): (ProcessRef, PathBuf)) -> Heard {
    let Start { pid: _, mut sandbox, container } = start;
    let is_sandbox = container.is_none();
    let StartingContainer { id, name, labels, command } =
        container.unwrap_or_else(|| StartingContainer {
            id: sandbox.id.clone(),
            name: String::new(),
            labels: Labels::new(),
            command: None,
        });
    sandbox.cgroup = is_sandbox.then(|| cgroup.clone());
    let container = Container {
        id,
        sandbox: Some(sandbox.id.clone()),
        name,
        labels,
        handler: String::new(),
        is_sandbox,
        cgroup,
        process,
        // It is in place before the process waits.
        root: "/".into(),
        command,
    };
    Heard { at: Instant::now(), container, sandbox: Some(sandbox), teller: Teller::Runtime }
}

/// The first process of a container that is about to run, and the container's cgroup, which may be
/// around that of the process (crun makes one more where systemd makes cgroups).
fn first_process(pid: u32, container: &str) -> Result<(ProcessRef, PathBuf), ServiceError> {
    let invalid = |error: String| ServiceError::Invalid(vec![error]);
    let process = ProcessRef::of(pid).ok_or_else(|| {
        invalid(format!("pid: there is no process {pid}; name the container's first"))
    })?;
    let cgroup = cgroup_of(pid).ok_or_else(|| {
        invalid(format!("pid: the process {pid} is in no cgroup v2; mount it at the cgroup root"))
    })?;
    if cgroup == Path::new("/") {
        return Err(invalid(format!(
            "pid: the process {pid} is in the root cgroup; the runtime must give each container one of its own"
        )));
    }
    if !process.is_alive() {
        return Err(invalid(format!("pid: the process {pid} ended while it was looked at")));
    }
    Ok((process, container_cgroup(&cgroup, container)))
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::identity::pod::AGENT;

    const UID: &str = "5c1a6f0e-7e0e-4b5e-9a52-8a1f0f6f3b11";

    fn pod() -> Pod {
        Pod {
            uid: PodUid::new(UID).unwrap(),
            namespace: "agents".to_owned(),
            name: "researcher-0".to_owned(),
            service_account: None,
            labels: Labels::new(),
            host_network: false,
            runtime_class: None,
        }
    }

    fn sandbox() -> Sandbox {
        Sandbox { id: "s".to_owned(), pod: pod(), handler: String::new(), cgroup: None }
    }

    fn listed() -> RuntimeInput {
        let sandboxes = BTreeMap::from([("s".to_owned(), sandbox())]);
        let listing = Listing { sandboxes, ..Listing::default() };
        RuntimeInput { listing: Some(listing), failure: None }
    }

    #[test]
    fn what_was_known_and_runs_stays_until_it_is_told_of() {
        let alive = ProcessRef::of(std::process::id()).unwrap();
        let ended = ProcessRef { started: alive.started + 1, ..alive };
        let container = |id: &str, process| ContainerRef {
            id: id.to_owned(),
            name: String::new(),
            process,
            root: PathBuf::from("/"),
            launch: vec![FileId::default()],
            cgroup: CgroupId(1),
        };
        let known =
            [container("told", alive), container("untold", alive), container("gone", ended)];
        let told = [container("told", alive), container("new", alive)];
        let kept = untold_and_alive(&known, &told);
        assert_eq!(kept, [container("untold", alive)], "with the files that it was started by");
    }

    #[test]
    fn what_a_runtime_can_not_tell_of_is_not_taken_for_gone() {
        let mut inputs = Inputs::default();
        inputs.runtimes.insert("r".to_owned(), listed());
        assert!(inputs.is_complete());
        let untold =
            RuntimeError { endpoint: "r".to_owned(), what: "fails".to_owned(), remedy: "" };
        let mut short = listed();
        short.listing.as_mut().unwrap().untold = Some(untold);
        inputs.runtimes.insert("r".to_owned(), short);
        assert!(!inputs.is_complete());
        assert!(inputs.node().sandboxes.contains_key("s"), "the others are listed all the same");
    }

    /// kubelet may start a pod again whose deletion it has not seen yet.
    #[test]
    fn what_was_said_of_a_pod_is_remembered_while_it_is_listed_and_a_while_after() {
        let labels = [(AGENT.to_owned(), "true".to_owned())];
        let labelled = Pod { labels: labels.into(), ..pod() };
        let mut inputs = Inputs { has_cluster: true, ..Inputs::default() };
        inputs.set_cluster(Cluster {
            pods: [(labelled.uid.clone(), labelled.clone())].into(),
            ..Cluster::default()
        });
        assert!(inputs.node().forgotten.is_empty());
        inputs.set_cluster(Cluster::default());
        let rules = Containers::new(&Configuration::default()).rules;
        let is_agent = |inputs: &Inputs| rules.is_agent(&inputs.node(), &sandbox());
        assert!(is_agent(&inputs), "the runtime's labels say nothing");
        inputs.runtimes.insert("r".to_owned(), listed());
        let mut now = Instant::now();
        for _ in 0..10 {
            now += REMEMBERED;
            inputs.prune(now);
            assert!(is_agent(&inputs), "a runtime lists it");
        }
        inputs.runtimes.clear();
        inputs.prune(now + REMEMBERED / 2);
        assert!(is_agent(&inputs), "it may be started again");
        inputs.prune(now + REMEMBERED);
        assert!(!is_agent(&inputs) && inputs.forgotten.is_empty());
        // One that comes back is what it is said to be.
        inputs.set_cluster(Cluster {
            pods: [(labelled.uid.clone(), labelled)].into(),
            ..Cluster::default()
        });
        inputs.set_cluster(Cluster { pods: [(pod().uid, pod())].into(), ..Cluster::default() });
        assert!(inputs.forgotten.is_empty() && !is_agent(&inputs));
    }

    #[test]
    fn a_pod_that_the_cluster_has_forgotten_is_not_said_to_be_no_agents() {
        let name = |uid: &str| PodName {
            namespace: "agents".to_owned(),
            name: "researcher-0".to_owned(),
            uid: uid.to_owned(),
        };
        let mut node = Node::default();
        assert!(!is_unsaid(&node, Some(&name(UID))), "there is nobody to say it");
        node.has_cluster = true;
        assert!(is_unsaid(&node, Some(&name(UID))));
        assert!(!is_unsaid(&node, None), "it is no pod's");
        // What was said last counts, also that it is no agent any more, and before what is held.
        node.forgotten.insert(pod().uid, pod());
        assert!(!is_unsaid(&node, Some(&name(UID))));
        node.forgotten.clear();
        node.pods.insert(pod().uid, pod());
        assert!(!is_unsaid(&node, Some(&name(UID))));
    }

    #[test]
    fn a_runtime_that_takes_no_connection_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runtime.sock");
        assert_eq!(serves(&path), None, "there is none");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(serves(&path).map(|process| process.pid), Some(std::process::id()));
        socket::listen(&listener, socket::Backlog::new(0).unwrap()).unwrap();
        let mut waiting = 0;
        while serves(&path).is_some() {
            waiting += 1;
            assert!(waiting < 100, "the queue is never full");
        }
    }

    #[test]
    fn a_pod_is_known_once_the_labels_that_can_mark_it_are() {
        let mut inputs = Inputs::default();
        assert_eq!(inputs.knows(&sandbox()), Known::No);
        inputs.runtimes.insert("r".to_owned(), RuntimeInput::default());
        assert_eq!(inputs.knows(&sandbox()), Known::No);
        inputs.runtimes.insert("r".to_owned(), listed());
        assert_eq!(inputs.knows(&sandbox()), Known::Whole, "without a cluster");
        inputs.has_cluster = true;
        assert_eq!(inputs.knows(&sandbox()), Known::No, "before the cluster has spoken");
        let mut cluster = Cluster::default();
        cluster.pods.insert(pod().uid, pod());
        inputs.cluster = Some(cluster.clone());
        assert_eq!(inputs.knows(&sandbox()), Known::No, "its namespace can mark it too");
        cluster.namespaces.insert("agents".to_owned(), Labels::new());
        inputs.cluster = Some(cluster.clone());
        assert_eq!(inputs.knows(&sandbox()), Known::Whole);
        cluster.pods.clear();
        inputs.cluster = Some(cluster.clone());
        assert_eq!(inputs.knows(&sandbox()), Known::ByRuntime);
        cluster.namespaces.clear();
        inputs.cluster = Some(Cluster { lacks_namespaces: true, ..cluster });
        assert_eq!(inputs.knows(&sandbox()), Known::ByRuntime, "it is held as strictly as can be");
        inputs.runtimes.clear();
        assert_eq!(inputs.knows(&sandbox()), Known::No);
    }

    #[test]
    fn what_the_runtime_itself_tells_of_a_pod_goes_before_what_a_hook_does() {
        let labelled = Sandbox {
            pod: Pod { labels: [("app".to_owned(), "a".to_owned())].into(), ..pod() },
            ..sandbox()
        };
        let process = ProcessRef::of(std::process::id()).unwrap();
        let first = (process, PathBuf::from("/pods/s"));
        let start = |container: Option<&str>| Start {
            pid: process.pid,
            sandbox: labelled.clone(),
            container: container.map(|id| StartingContainer {
                id: id.to_owned(),
                name: "agent".to_owned(),
                labels: Labels::new(),
                command: None,
            }),
        };
        let by_hook = |id: &str| Heard {
            sandbox: Some(sandbox()),
            teller: Teller::Hook,
            ..hear_start(start(Some(id)), first.clone())
        };
        let mut inputs = Inputs::default();
        inputs.announced.insert("a".to_owned(), by_hook("a"));
        assert_eq!(inputs.knows(&sandbox()), Known::No, "a hook knows no labels");
        assert_eq!(inputs.node().sandboxes["s"].pod.labels, Labels::new());
        let told = hear_start(start(None), first.clone());
        assert!(told.container.is_sandbox && told.sandbox.as_ref().unwrap().cgroup.is_some());
        inputs.announced.insert("s".to_owned(), told);
        assert_eq!(inputs.knows(&sandbox()), Known::Whole);
        assert_eq!(inputs.node().sandboxes["s"].pod.labels, labelled.pod.labels);
        assert!(matches!(first_process(u32::MAX, "c"), Err(ServiceError::Invalid(_))));
    }

    #[test]
    fn a_pods_container_without_its_sandbox_is_refused_and_not_taken_for_nobodys() {
        let whole = Announcement {
            id: "c".to_owned(),
            pid: std::process::id(),
            root: "/".into(),
            name: "agent".to_owned(),
            is_sandbox: false,
            sandbox: Some("s".to_owned()),
            pod: Some(crate::api::types::PodView {
                namespace: "agents".to_owned(),
                name: "researcher-0".to_owned(),
                uid: UID.to_owned(),
            }),
            labels: BTreeMap::new(),
            command: None,
            search_path: None,
        };
        let refused = |announcement: &Announcement| match hear(announcement) {
            Err(ServiceError::Invalid(errors)) => errors.join("; "),
            other => panic!("{other:?}"),
        };
        let stray = Announcement { sandbox: None, ..whole.clone() };
        assert!(refused(&stray).starts_with("sandbox: is missing"));
        let stray = Announcement { pod: None, ..whole.clone() };
        assert!(refused(&stray).starts_with("pod: is missing"));
        let stray = Announcement { pid: u32::MAX, ..whole.clone() };
        assert!(refused(&stray).starts_with("pid: there is no process"));
        let stray = Announcement { root: "rootfs".into(), ..whole };
        assert!(refused(&stray).starts_with("root: rootfs is not absolute"));
    }
}
