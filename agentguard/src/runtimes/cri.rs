//! Runtimes that speak the Container Runtime Interface: containerd and CRI-O.
//!
//! Lists what there is at each call, and asks for the status of what is new only: that is where the
//! process, the cgroup and the command of a container stand. The version that a runtime speaks is
//! found out when it first answers.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use serde::Deserialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::changes::{Changes, Ended};
use super::{Listing, Runtime, RuntimeError, command, container_cgroup};
use crate::identity::ProcessRef;
use crate::identity::container::{Command, Container, Sandbox, cgroup_of};
use crate::identity::pod::{Labels, Pod, PodUid};

/// How long one call may take: a runtime that starts many containers at once is slow to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The largest answer that is taken in, which is kubelet's own limit.
const ANSWER: usize = 16 << 20;
/// Statuses that are asked for at the same time.
const AT_ONCE: usize = 16;
/// How long one listing may ask for statuses once the first has told all that there was; the rest
/// comes with the next.
const BUDGET: Duration = Duration::from_millis(300);

/// A client of one runtime.
#[derive(Debug)]
pub struct Cri {
    endpoint: String,
    channel: Channel,
    version: Option<Version>,
    sandboxes: BTreeMap<String, SandboxFacts>,
    containers: BTreeMap<String, ContainerFacts>,
    /// Those that were made and have no process before they are started; CRI-O's have one.
    idle: BTreeSet<String>,
    /// Whether everything has been told once.
    is_complete: bool,
    /// Whether something is there that was not asked for yet.
    is_behind: bool,
    /// Why it can not be told what something is.
    untold: Option<RuntimeError>,
    changes: Changes,
}

/// A version of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V1Alpha2,
}

/// A sandbox as lists have it.
struct ListedSandbox {
    id: String,
    uid: String,
    namespace: String,
    name: String,
    labels: Labels,
    handler: String,
    is_ready: bool,
}

/// A container as lists have it.
struct ListedContainer {
    id: String,
    sandbox: String,
    name: String,
    labels: Labels,
    /// Whether it was made or runs, and has not ended.
    is_there: bool,
    /// Whether it was started.
    runs: bool,
}

/// What the status of a sandbox adds.
#[derive(Clone, Debug, Default)]
struct SandboxFacts {
    host_network: bool,
    /// What runs it, where the runtime tells: `runc`, `runsc`, `kata`.
    kind: Option<String>,
    cgroup: Option<PathBuf>,
}

/// What the status of a container adds.
#[derive(Clone, Debug)]
struct ContainerFacts {
    process: ProcessRef,
    cgroup: PathBuf,
    command: Option<Command>,
}

/// What both runtimes write into the verbose part of a status, as far as it is needed (containerd,
/// `pkg/cri/server/container_status.go` and `sandbox_status.go`; CRI-O, `server/container_status.go`
/// and `sandbox_status.go`).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Info {
    pid: u32,
    #[serde(rename = "runtimeSpec")]
    spec: Option<Spec>,
    /// Of a sandbox of containerd's: `io.containerd.runc.v2`.
    #[serde(rename = "runtimeType")]
    kind: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Spec {
    process: Option<SpecProcess>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SpecProcess {
    args: Vec<String>,
    env: Vec<String>,
}

impl Cri {
    /// A client of the runtime that listens at `socket`; it connects when it is first asked, and
    /// again when the runtime was gone.
    ///
    /// # Errors
    ///
    /// When the path can not be written as an address. Must be called within a tokio runtime.
    pub fn new(socket: &Path) -> Result<Self, RuntimeError> {
        let endpoint = socket.display().to_string();
        let address =
            Endpoint::from_shared(format!("unix://{endpoint}")).map_err(|error| RuntimeError {
                endpoint: endpoint.clone(),
                what: format!("has no valid address: {error}"),
                remedy: "name a path without blanks in containers.runtimes",
            })?;
        Ok(Self {
            endpoint,
            channel: address.connect_lazy(),
            version: None,
            sandboxes: BTreeMap::new(),
            containers: BTreeMap::new(),
            idle: BTreeSet::new(),
            is_complete: false,
            is_behind: false,
            untold: None,
            changes: Changes::default(),
        })
    }

    fn failed(&self, call: &str, status: &Status) -> RuntimeError {
        let mut what = format!("does not answer {call}: {}", status.message());
        let mut cause = std::error::Error::source(status);
        while let Some(error) = cause {
            what = format!("{what}: {error}");
            cause = error.source();
        }
        let remedy = if status.code() == Code::Unimplemented {
            "update it, or take it out of containers.runtimes if it is no container runtime"
        } else if status.code() == Code::DeadlineExceeded {
            "see its log; it may be busy or stopped"
        } else {
            "see that it runs and that containers.runtimes names its socket"
        };
        RuntimeError { endpoint: self.endpoint.clone(), what, remedy }
    }

    /// Finds out which version it speaks: the present one, or the one before.
    async fn version(&mut self) -> Result<Version, RuntimeError> {
        if let Some(version) = self.version {
            return Ok(version);
        }
        let version = match v1::probe(&self.channel).await {
            Ok(()) => Version::V1,
            Err(status) if status.code() == Code::Unimplemented => {
                let older = v1alpha2::probe(&self.channel).await;
                older.map_err(|status| self.failed("Version", &status))?;
                Version::V1Alpha2
            }
            Err(status) => return Err(self.failed("Version", &status)),
        };
        self.version = Some(version);
        Ok(version)
    }

    /// Asks for what lists do not tell, of what is new; until `until`, if that is said.
    async fn ask_statuses(
        &mut self,
        version: Version,
        sandboxes: Vec<String>,
        containers: Vec<String>,
        until: Option<Instant>,
    ) -> Result<(), RuntimeError> {
        enum Asked {
            Sandbox(String, Result<Option<SandboxFacts>, Status>),
            Container(String, Result<Option<ContainerFacts>, Status>),
        }
        // Those first that say where their pods' cgroups are.
        let wanted = containers
            .into_iter()
            .map(|id| (id, false))
            .chain(sandboxes.into_iter().map(|id| (id, true)));
        let mut wanted = wanted.peekable();
        let mut asked = JoinSet::new();
        self.is_behind = false;
        self.untold = None;
        loop {
            let is_late = until.is_some_and(|until| Instant::now() >= until);
            while asked.len() < AT_ONCE && !is_late {
                let Some((id, is_sandbox)) = wanted.next() else { break };
                let channel = self.channel.clone();
                asked.spawn(async move {
                    if is_sandbox {
                        let facts = version.sandbox(&channel, &id).await;
                        Asked::Sandbox(id, facts)
                    } else {
                        let facts = version.container(&channel, &id).await;
                        Asked::Container(id, facts)
                    }
                });
            }
            // None of them panics, and none is aborted.
            let Some(Ok(answer)) = asked.join_next().await else { break };
            match answer {
                Asked::Sandbox(id, Ok(Some(facts))) => {
                    self.sandboxes.insert(id, facts);
                }
                Asked::Container(id, Ok(Some(facts))) => {
                    self.idle.remove(&id);
                    self.containers.insert(id, facts);
                }
                // It ended, or has no process yet.
                Asked::Container(id, Ok(None)) => {
                    self.idle.insert(id);
                }
                Asked::Sandbox(_, Ok(None)) => {}
                Asked::Sandbox(id, Err(status)) => {
                    self.note_untold(&format!("PodSandboxStatus of {id}"), &status)?;
                }
                Asked::Container(id, Err(status)) => {
                    self.note_untold(&format!("ContainerStatus of {id}"), &status)?;
                }
            }
        }
        self.is_behind = wanted.peek().is_some();
        Ok(())
    }

    /// One of which the runtime can not speak takes nothing from the others, and is asked for again; a
    /// runtime that does not answer is asked for nothing more.
    fn note_untold(&mut self, call: &str, status: &Status) -> Result<(), RuntimeError> {
        let error = self.failed(call, status);
        if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled) {
            return Err(error);
        }
        self.untold.get_or_insert(error);
        Ok(())
    }

    /// Has changes told, where that is known. Debian's containerd 1.6 and all that speak the older
    /// version do not know it.
    fn follow_changes(&mut self, version: Version) {
        if version != Version::V1 {
            return;
        }
        let client = RuntimeServiceClient::new(self.channel.clone());
        let mut client = client.max_decoding_message_size(ANSWER);
        self.changes.follow(|teller| async move {
            let request = k8s_cri::v1::GetEventsRequest::default();
            match client.get_container_events(request).await {
                Ok(answer) => {
                    let mut events = answer.into_inner();
                    while let Ok(Some(_event)) = events.message().await {
                        teller.tell();
                    }
                    Ended::Broken
                }
                Err(status) if status.code() == Code::Unavailable => Ended::Broken,
                Err(_not_known) => Ended::Unknown,
            }
        });
    }
}

impl Runtime for Cri {
    fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn list(&mut self) -> Result<Listing, RuntimeError> {
        let version = self.version().await?;
        self.follow_changes(version);
        let listed = version.sandboxes(&self.channel).await;
        let sandboxes = listed.map_err(|status| self.unknown(status, "ListPodSandbox"))?;
        let listed = version.containers(&self.channel).await;
        let mut containers = listed.map_err(|status| self.unknown(status, "ListContainers"))?;
        containers.retain(|container| container.is_there);
        let there: BTreeSet<&str> = containers.iter().map(|one| one.id.as_str()).collect();
        self.idle.retain(|id| there.contains(id.as_str()));
        self.containers.retain(|id, facts| there.contains(id.as_str()) && facts.process.is_alive());
        // One that is not ready has its containers still, until somebody ends them.
        let occupied: BTreeSet<&str> = containers.iter().map(|one| one.sandbox.as_str()).collect();
        let sandboxes: Vec<ListedSandbox> = sandboxes
            .into_iter()
            .filter(|sandbox| sandbox.is_ready || occupied.contains(sandbox.id.as_str()))
            .collect();
        let there: BTreeSet<&str> = sandboxes.iter().map(|one| one.id.as_str()).collect();
        self.sandboxes.retain(|id, _| there.contains(id.as_str()));

        let new_sandboxes = sandboxes
            .iter()
            .map(|sandbox| &sandbox.id)
            .filter(|id| !self.sandboxes.contains_key(*id))
            .cloned()
            .collect();
        let new_containers = containers
            .iter()
            .filter(|container| container.runs || !self.idle.contains(&container.id))
            .map(|container| &container.id)
            .filter(|id| !self.containers.contains_key(*id))
            .cloned()
            .collect();
        let until = self.is_complete.then(|| Instant::now() + BUDGET);
        self.ask_statuses(version, new_sandboxes, new_containers, until).await?;
        self.is_complete = true;

        let mut listing = Listing { untold: self.untold.clone(), ..Listing::default() };
        for listed in sandboxes {
            let facts = self.sandboxes.get(&listed.id).cloned().unwrap_or_default();
            if let Some(sandbox) = sandbox(listed, facts) {
                listing.sandboxes.insert(sandbox.id.clone(), sandbox);
            }
        }
        for listed in containers {
            if let Some(facts) = self.containers.get(&listed.id) {
                let container = container(listed, facts.clone());
                listing.containers.insert(container.id.clone(), container);
            }
        }
        Ok(listing)
    }

    async fn changed(&mut self) {
        if !self.is_behind {
            self.changes.next().await;
        }
    }
}

impl Cri {
    /// A call failed. One that was known and is not any more: another version of it was started.
    fn unknown(&mut self, status: Status, call: &str) -> RuntimeError {
        if status.code() == Code::Unimplemented {
            self.version = None;
        }
        self.failed(call, &status)
    }
}

fn sandbox(listed: ListedSandbox, facts: SandboxFacts) -> Option<Sandbox> {
    let ListedSandbox { id, uid, namespace, name, labels, handler, is_ready: _ } = listed;
    // Of a static pod, this is the hash by which kubelet names its cgroup too.
    let Some(uid) = PodUid::new(&uid) else {
        tracing::error!(sandbox = id, uid, "a pod is not held: its uid is none");
        return None;
    };
    let SandboxFacts { host_network, kind, cgroup } = facts;
    // The default handler has no name, and may be one with a kernel of its own. Where its runtime does
    // not tell (CRI-O), it is held as if it had none: what is there to hold is held.
    let handler = if handler.is_empty() { kind.unwrap_or_default() } else { handler };
    let pod = Pod {
        uid,
        namespace,
        name,
        service_account: None,
        labels,
        host_network,
        runtime_class: None,
    };
    Some(Sandbox { id, pod, handler, cgroup })
}

fn container(listed: ListedContainer, facts: ContainerFacts) -> Container {
    let ListedContainer { id, sandbox, name, labels, is_there: _, runs: _ } = listed;
    let ContainerFacts { process, cgroup, command } = facts;
    Container {
        id,
        sandbox: Some(sandbox),
        name,
        labels,
        // Its sandbox's.
        handler: String::new(),
        is_sandbox: false,
        cgroup,
        process,
        root: "/".into(),
        command,
    }
}

/// What a sandbox's status says. One without a process of its own (CRI-O makes such) has no cgroup
/// that it could tell.
fn sandbox_facts(id: &str, host_network: bool, info: &str) -> SandboxFacts {
    let Info { pid, kind, .. } = read(info).unwrap_or_else(|error| {
        // Its containers tell where their pod is.
        tracing::warn!(%error, sandbox = id, "what is said of a sandbox can not be read");
        Info::default()
    });
    let kind = kind.and_then(|kind| {
        let (name, _version) = kind.strip_prefix("io.containerd.")?.rsplit_once(".v")?;
        Some(name.to_owned())
    });
    let cgroup = (pid != 0).then(|| cgroup_of(pid)).flatten();
    let cgroup = cgroup.map(|cgroup| container_cgroup(&cgroup, id));
    SandboxFacts { host_network, kind, cgroup }
}

/// What a container's status says; `None` where it has no process.
fn container_facts(id: &str, info: &str) -> Result<Option<ContainerFacts>, Status> {
    let Info { pid, spec, kind: _ } = read(info).map_err(|error| {
        Status::internal(format!("what it says of the container {id} can not be read: {error}"))
    })?;
    if pid == 0 {
        return Ok(None);
    }
    let process = spec.and_then(|spec| spec.process);
    let command = process.and_then(|SpecProcess { args, env }| command(args, &env));
    let facts = ProcessRef::of(pid).zip(cgroup_of(pid)).map(|(process, cgroup)| ContainerFacts {
        process,
        cgroup: container_cgroup(&cgroup, id),
        command,
    });
    Ok(facts)
}

fn read(info: &str) -> Result<Info, serde_json::Error> {
    serde_json::from_str(info)
}

/// Makes one call, within a bound.
async fn call<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match timeout(PATIENCE, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_late) => {
            Err(Status::deadline_exceeded(format!("no answer within {} s", PATIENCE.as_secs())))
        }
    }
}

/// One of which nothing is known any more has ended.
fn found<T>(answer: Result<T, Status>) -> Result<Option<T>, Status> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

impl Version {
    async fn sandboxes(self, channel: &Channel) -> Result<Vec<ListedSandbox>, Status> {
        match self {
            Self::V1 => v1::sandboxes(channel).await,
            Self::V1Alpha2 => v1alpha2::sandboxes(channel).await,
        }
    }

    async fn containers(self, channel: &Channel) -> Result<Vec<ListedContainer>, Status> {
        match self {
            Self::V1 => v1::containers(channel).await,
            Self::V1Alpha2 => v1alpha2::containers(channel).await,
        }
    }

    async fn sandbox(self, channel: &Channel, id: &str) -> Result<Option<SandboxFacts>, Status> {
        match self {
            Self::V1 => v1::sandbox(channel, id).await,
            Self::V1Alpha2 => v1alpha2::sandbox(channel, id).await,
        }
    }

    async fn container(
        self,
        channel: &Channel,
        id: &str,
    ) -> Result<Option<ContainerFacts>, Status> {
        match self {
            Self::V1 => v1::container(channel, id).await,
            Self::V1Alpha2 => v1alpha2::container(channel, id).await,
        }
    }
}

/// The calls of a version. Their types have the same fields in both, and are others.
macro_rules! version {
    ($version:ident) => {
        mod $version {
            use k8s_cri::$version as api;
            use tonic::Status;
            use tonic::transport::Channel;

            use super::{
                ANSWER, ContainerFacts, ListedContainer, ListedSandbox, SandboxFacts, call,
                container_facts, found, sandbox_facts,
            };

            type Client = api::runtime_service_client::RuntimeServiceClient<Channel>;

            fn client(channel: &Channel) -> Client {
                Client::new(channel.clone()).max_decoding_message_size(ANSWER)
            }

            pub(super) async fn probe(channel: &Channel) -> Result<(), Status> {
                let mut client = client(channel);
                call(client.version(api::VersionRequest::default())).await.map(drop)
            }

            pub(super) async fn sandboxes(channel: &Channel) -> Result<Vec<ListedSandbox>, Status> {
                let mut client = client(channel);
                let request = api::ListPodSandboxRequest::default();
                let items = call(client.list_pod_sandbox(request)).await?.items.into_iter();
                Ok(items
                    .map(|item| {
                        let is_ready = item.state() == api::PodSandboxState::SandboxReady;
                        let metadata = item.metadata.unwrap_or_default();
                        ListedSandbox {
                            id: item.id,
                            uid: metadata.uid,
                            namespace: metadata.namespace,
                            name: metadata.name,
                            labels: item.labels.into_iter().collect(),
                            handler: item.runtime_handler,
                            is_ready,
                        }
                    })
                    .collect())
            }

            pub(super) async fn containers(
                channel: &Channel,
            ) -> Result<Vec<ListedContainer>, Status> {
                let mut client = client(channel);
                let request = api::ListContainersRequest::default();
                let items = call(client.list_containers(request)).await?.containers.into_iter();
                Ok(items
                    .map(|item| {
                        let (is_there, runs) = match item.state() {
                            api::ContainerState::ContainerCreated => (true, false),
                            api::ContainerState::ContainerRunning => (true, true),
                            api::ContainerState::ContainerExited
                            | api::ContainerState::ContainerUnknown => (false, false),
                        };
                        ListedContainer {
                            id: item.id,
                            sandbox: item.pod_sandbox_id,
                            name: item.metadata.unwrap_or_default().name,
                            labels: item.labels.into_iter().collect(),
                            is_there,
                            runs,
                        }
                    })
                    .collect())
            }

            pub(super) async fn sandbox(
                channel: &Channel,
                id: &str,
            ) -> Result<Option<SandboxFacts>, Status> {
                let mut client = client(channel);
                let request =
                    api::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
                let answer = found(call(client.pod_sandbox_status(request)).await)?;
                Ok(answer.map(|answer| {
                    let linux = answer.status.and_then(|status| status.linux);
                    let namespaces = linux.and_then(|linux| linux.namespaces);
                    let options = namespaces.and_then(|namespaces| namespaces.options);
                    let host_network = options
                        .is_some_and(|options| options.network() == api::NamespaceMode::Node);
                    let info = answer.info.get("info").map_or("", String::as_str);
                    sandbox_facts(id, host_network, info)
                }))
            }

            pub(super) async fn container(
                channel: &Channel,
                id: &str,
            ) -> Result<Option<ContainerFacts>, Status> {
                let mut client = client(channel);
                let request =
                    api::ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
                match found(call(client.container_status(request)).await)? {
                    Some(answer) => match answer.info.get("info") {
                        Some(info) => container_facts(id, info),
                        None => Err(Status::internal(format!(
                            "it says nothing of the process of container {id}"
                        ))),
                    },
                    None => Ok(None),
                }
            }
        }
    };
}

version!(v1);
version!(v1alpha2);

#[cfg(test)]
mod tests {
    use super::*;

    fn own_info(more: &str) -> String {
        format!(r#"{{"sandboxID": "s", "pid": {}, {more}}}"#, std::process::id())
    }

    #[test]
    fn the_process_and_the_command_of_a_container_are_read_from_its_status() {
        let spec = r#""removing": false, "runtimeType": "io.containerd.runc.v2",
            "runtimeSpec": {"ociVersion": "1.0.2", "process": {
                "args": ["python3", "-m", "agent"],
                "env": ["PATH=/first", "HOME=/root", "PATH=/usr/bin:/bin"]}}"#;
        let facts = container_facts("c", &own_info(spec)).unwrap().unwrap();
        assert_eq!(facts.process, ProcessRef::of(std::process::id()).unwrap());
        let command = facts.command.unwrap();
        assert_eq!(
            (command.executable.as_str(), command.search_path.as_str()),
            ("python3", "/usr/bin:/bin")
        );
        // A runtime that tells no command is no reason to hold nothing.
        let facts = container_facts("c", &own_info(r#""privileged": true"#)).unwrap().unwrap();
        assert_eq!(facts.command, None);
    }

    #[test]
    fn what_runs_a_sandbox_is_told_where_its_handler_has_no_name() {
        let listed = |handler: &str| ListedSandbox {
            id: "s".to_owned(),
            uid: "5c1a6f0e-7e0e-4b5e-9a52-8a1f0f6f3b11".to_owned(),
            namespace: "agents".to_owned(),
            name: "p".to_owned(),
            labels: Labels::new(),
            handler: handler.to_owned(),
            is_ready: true,
        };
        let told = |kind: &str| sandbox_facts("s", false, &own_info(kind));
        for (handler, kind, expected) in [
            ("", r#""runtimeType": "io.containerd.kata.v2""#, "kata"),
            ("", r#""runtimeType": "io.containerd.runc.v2""#, "runc"),
            ("own", r#""runtimeType": "io.containerd.runc.v2""#, "own"),
            ("", r#""runtimeType": null"#, ""),
            ("", r#""other": 1"#, ""),
        ] {
            assert_eq!(sandbox(listed(handler), told(kind)).unwrap().handler, expected, "{kind}");
        }
    }

    #[test]
    fn a_container_that_was_made_and_not_started_has_no_process() {
        assert!(container_facts("c", r#"{"pid": 0}"#).unwrap().is_none());
        assert!(container_facts("c", r#"{"pid": 4194305}"#).unwrap().is_none());
        assert!(container_facts("c", "{}").unwrap().is_none());
        assert!(container_facts("c", "no JSON").is_err());
    }
}
