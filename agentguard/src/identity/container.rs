//! Containers of this node, and which of them are workloads.
//!
//! The runtimes and the cluster say what there is ([`Node`]); [`Rules::place`] says what follows
//! from it ([`Placement`]). Pure: who asks a runtime, and who tags a cgroup, is elsewhere.
//!
//! A pod is one workload, and the workload's cgroup is the pod's: what is made below it later (a
//! container that restarts, an ephemeral one, a process of `kubectl exec`) is born tagged. Where a
//! pod has no cgroup of its own, or the template gives its containers identities of their own, each
//! container is one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use agentguard_common::Mode;

use super::pod::{AGENT, Labels, MODE, Marked, Marking, Pod, PodUid};
use super::spiffe::SpiffeId;
use super::template::{IdentityTemplate, Values};

/// A process, told from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessRef {
    pub pid: u32,
    /// When it started, in ticks since boot (`starttime` of `proc_pid_stat(5)`).
    pub started: u64,
}

impl ProcessRef {
    /// The process that has this number now.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let process = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?;
        let stat = process.stat().ok()?;
        // One that has ended and was not waited for has no mounts and no cgroup any more.
        (stat.state != 'Z' && stat.state != 'X').then_some(Self { pid, started: stat.starttime })
    }

    /// Whether it is there still.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Its directory in `/proc`.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.pid))
    }
}

/// A pod's sandbox, as the runtime has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    pub id: String,
    /// What the runtime knows of the pod; it knows no service account.
    pub pod: Pod,
    /// The runtime handler that runs it; empty for the runtime's default.
    pub handler: String,
    /// Absolute below the cgroup v2 root.
    pub cgroup: Option<PathBuf>,
}

/// A container that is being made or runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub id: String,
    /// The sandbox it is in; `None` where there are no pods.
    pub sandbox: Option<String>,
    pub name: String,
    pub labels: Labels,
    /// The runtime that runs it where there are no pods; empty for the default, or not told.
    pub handler: String,
    /// Whether it is what a sandbox runs to be there (`/pause`), and none of the pod's own.
    pub is_sandbox: bool,
    /// Absolute below the cgroup v2 root.
    pub cgroup: PathBuf,
    pub process: ProcessRef,
    /// What will be its root, as [`Self::process`] names it: `/` once it runs.
    pub root: PathBuf,
    /// The first word of its command and its `PATH`; `None` where the runtime does not tell.
    pub command: Option<Command>,
}

impl Container {
    /// Whether its cgroup is its own: runtimes name a container's by its id. One that its runtime put
    /// nowhere of its own (as those do that know cgroups of version 1 alone) is in that of whatever
    /// started the runtime, which is not to be held for it.
    #[must_use]
    pub fn has_own_cgroup(&self) -> bool {
        let name = self.cgroup.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.contains(&self.id))
    }
}

/// What a container was made to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    pub executable: String,
    pub search_path: String,
}

/// All that is known of this node's pods and containers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Whether there is a cluster that speaks of the pods.
    pub has_cluster: bool,
    /// What the cluster says.
    pub pods: BTreeMap<PodUid, Pod>,
    /// What the cluster said last of pods that it does not know any more, and which may still run.
    pub forgotten: BTreeMap<PodUid, Pod>,
    /// Labels of the namespaces, as the cluster says.
    pub namespaces: BTreeMap<String, Labels>,
    /// Whether there was no room for some: one that is missing may have any labels.
    pub lacks_namespaces: bool,
    /// What the runtimes say.
    pub sandboxes: BTreeMap<String, Sandbox>,
    pub containers: BTreeMap<String, Container>,
    /// Cgroups that were found of pods which no runtime has told of yet ([`Rules::awaited`]).
    pub pod_cgroups: BTreeMap<PodUid, PathBuf>,
}

impl Node {
    /// The pod of a sandbox. The cluster knows more of it than the runtime, and its labels as they are now.
    fn pod_of<'a>(&'a self, sandbox: &'a Sandbox) -> &'a Pod {
        let uid = &sandbox.pod.uid;
        self.pods.get(uid).or_else(|| self.forgotten.get(uid)).unwrap_or(&sandbox.pod)
    }

    /// Where the cgroup of a pod may be, of which only its number is known: below where kubelet has
    /// put others, or where it puts them unless told otherwise.
    #[must_use]
    pub fn cgroups_of(&self, uid: &PodUid) -> Vec<PathBuf> {
        let sandboxes = self.sandboxes.values().filter_map(|sandbox| sandbox.cgroup.as_deref());
        let containers = self.containers.values().map(|container| container.cgroup.as_path());
        let known = sandboxes.chain(containers).filter_map(pods_root).map(Path::to_owned);
        let usual = [MADE_BY_KUBELET, MADE_BY_SYSTEMD].map(|name| Path::new("/").join(name));
        let roots: BTreeSet<PathBuf> = known.chain(usual).collect();
        let plain = format!("pod{}", uid.as_str());
        let slice = format!("pod{}.slice", uid.as_str().replace('-', "_"));
        let below = |root: PathBuf| {
            if let Some(all) = slices_of(&root) {
                [
                    root.join(format!("{all}-{slice}")),
                    root.join(format!("{all}-burstable.slice/{all}-burstable-{slice}")),
                    root.join(format!("{all}-besteffort.slice/{all}-besteffort-{slice}")),
                ]
            } else {
                ["", "burstable", "besteffort"].map(|class| root.join(class).join(&plain))
            }
        };
        roots.into_iter().flat_map(below).collect()
    }
}

/// Why a static pod has no identity.
const NO_ACCOUNT: &str = "a static pod has no service account, of which containers.identity makes identities; \
                          run it as another kind of pod, or write {pod} or {label:KEY} there";

/// The cgroup around those of pods (kubelet, `pkg/kubelet/cm/node_container_manager_linux.go`).
const MADE_BY_KUBELET: &str = "kubepods";
const MADE_BY_SYSTEMD: &str = "kubepods.slice";

/// The outermost such cgroup around a container's.
fn pods_root(cgroup: &Path) -> Option<&Path> {
    let is_root = |path: &&Path| path.ends_with(MADE_BY_KUBELET) || slices_of(path).is_some();
    cgroup.ancestors().filter(is_root).last()
}

/// What the slices below begin with, where systemd makes cgroups: `kubepods`, or with the slice in front
/// that kubelet was told to use (`kubelet-kubepods`, as Kubernetes in Docker does).
fn slices_of(root: &Path) -> Option<&str> {
    let name = root.file_name()?.to_str()?;
    let is_root = name == MADE_BY_SYSTEMD || name.ends_with("-kubepods.slice");
    name.strip_suffix(".slice").filter(|_| is_root)
}

/// How workloads are made of containers.
#[derive(Clone, Debug)]
pub struct Rules {
    pub marking: Marking,
    pub template: IdentityTemplate,
    pub trust_domain: String,
    /// Runtime handlers whose containers have a kernel of their own; `*` at the end of one stands for
    /// any rest.
    pub sandboxed: Vec<String>,
}

/// Why nothing of a workload is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unseen {
    /// It has a kernel of its own, and this one does not see what it does.
    Kernel,
    /// Its runtime gave it no cgroup of its own.
    Cgroup,
}

/// A pod as records name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// A workload that should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// What people call it.
    pub name: String,
    /// The identity, or why it is not known.
    pub identity: Result<SpiffeId, String>,
    pub mode: Mode,
    /// Absolute below the cgroup v2 root.
    pub cgroup: PathBuf,
    pub pod: Option<PodName>,
    /// In the order of their ids.
    pub containers: Vec<Container>,
    /// What is wrong with what its labels say.
    pub problem: Option<String>,
    /// Why this kernel does not see what it does, if so.
    pub unseen: Option<Unseen>,
    /// Whether its identity is its own alone, and gone with it.
    pub owns_identity: bool,
}

impl Rules {
    /// The workloads of a node, in the order of their cgroups.
    #[must_use]
    pub fn place(&self, node: &Node) -> Vec<Placement> {
        // Containers without a cgroup of their own share one.
        let key = |placement: &Placement| (placement.cgroup.clone(), placement.name.clone());
        let mut placements: BTreeMap<(PathBuf, String), Placement> = BTreeMap::new();
        for container in node.containers.values() {
            let placed = match &container.sandbox {
                Some(sandbox) => node
                    .sandboxes
                    .get(sandbox)
                    .and_then(|sandbox| self.place_in_pod(node, sandbox, Some(container))),
                None => self.place_alone(container),
            };
            if let Some(placement) = placed {
                placements
                    .entry(key(&placement))
                    .and_modify(|known| known.containers.push(container.clone()))
                    .or_insert(placement);
            }
        }
        // A pod whose sandbox runs is tagged before there is a container in it.
        for sandbox in node.sandboxes.values() {
            if let Some(placement) = self.place_in_pod(node, sandbox, None) {
                placements.entry(key(&placement)).or_insert(placement);
            }
        }
        // And one that kubelet has made a cgroup for before there is a sandbox.
        for pod in self.awaited(node) {
            let of_pod = node.pod_cgroups.get(&pod.uid).cloned();
            if let Some(placement) = self.place_pod(node, pod, of_pod, None, "") {
                placements.entry(key(&placement)).or_insert(placement);
            }
        }
        placements.into_values().collect()
    }

    /// The pods that the cluster says are agents, or did, and of which no runtime tells where they are:
    /// a sandbox that has ended is made anew, and its pod is nobody's as little in between. Not those
    /// with a runtime of their own, which may be one whose system calls this kernel does not see.
    pub fn awaited<'a>(&'a self, node: &'a Node) -> impl Iterator<Item = &'a Pod> {
        let told: BTreeSet<&PodUid> = node
            .sandboxes
            .values()
            .filter(|sandbox| sandbox.cgroup.is_some() || self.is_sandboxed(&sandbox.handler))
            .map(|sandbox| &sandbox.pod.uid)
            .collect();
        let by_pod = !self.template.tells_containers_apart();
        node.pods.values().chain(node.forgotten.values()).filter(move |pod| {
            by_pod
                && !told.contains(&pod.uid)
                && pod.runtime_class.is_none()
                && !matches!(self.judge(node, pod), Marked::No)
        })
    }

    /// Whether what this runtime handler runs has a kernel of its own.
    #[must_use]
    pub fn is_sandboxed(&self, handler: &str) -> bool {
        self.sandboxed.iter().any(|sandboxed| match sandboxed.strip_suffix('*') {
            Some(begin) => handler.starts_with(begin),
            None => handler == sandboxed,
        })
    }

    fn unseen(&self, handler: &str, has_own_cgroup: bool) -> Option<Unseen> {
        if self.is_sandboxed(handler) {
            Some(Unseen::Kernel)
        } else {
            (!has_own_cgroup).then_some(Unseen::Cgroup)
        }
    }

    /// Whether the pod of a sandbox is an agent.
    #[must_use]
    pub fn is_agent(&self, node: &Node, sandbox: &Sandbox) -> bool {
        let pod = node.pod_of(sandbox);
        !matches!(self.judge(node, pod), Marked::No)
    }

    fn judge(&self, node: &Node, pod: &Pod) -> Marked {
        let of_namespace = node.namespaces.get(&pod.namespace);
        // The strictest that it may say.
        let strictest =
            || [(AGENT, "true"), (MODE, "enforce")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        let assumed =
            (of_namespace.is_none() && node.lacks_namespaces).then(|| Labels::from(strictest()));
        self.marking.judge(Some(&pod.namespace), &pod.labels, of_namespace.or(assumed.as_ref()))
    }

    fn place_in_pod(
        &self,
        node: &Node,
        sandbox: &Sandbox,
        container: Option<&Container>,
    ) -> Option<Placement> {
        let pod = node.pod_of(sandbox);
        let inside = container.map(|container| container.cgroup.as_path());
        let of_pod = inside
            .or(sandbox.cgroup.as_deref())
            .and_then(|cgroup| pod_cgroup(cgroup, &sandbox.pod.uid));
        self.place_pod(node, pod, of_pod, container, &sandbox.handler)
    }

    /// `of_pod` is the pod's cgroup, where it has one of its own.
    fn place_pod(
        &self,
        node: &Node,
        pod: &Pod,
        of_pod: Option<PathBuf>,
        container: Option<&Container>,
        handler: &str,
    ) -> Option<Placement> {
        let Marked::Agent { mode, problem } = self.judge(node, pod) else { return None };
        let by_container = self.template.tells_containers_apart() || of_pod.is_none();
        let (cgroup, name, container_name, has_own_cgroup) = if by_container {
            let container = container.filter(|container| !container.is_sandbox)?;
            let name = format!("{}/{}/{}", pod.namespace, pod.name, container.name);
            let has_own_cgroup = container.has_own_cgroup();
            (container.cgroup.clone(), name, Some(container.name.as_str()), has_own_cgroup)
        } else {
            (of_pod?, format!("{}/{}", pod.namespace, pod.name), None, true)
        };
        let identity = self.template.render(&Values {
            trust_domain: &self.trust_domain,
            namespace: Some(&pod.namespace),
            service_account: pod.service_account.as_deref(),
            pod: Some(&pod.name),
            container: container_name,
            labels: &pod.labels,
        });
        // What the API server says of a static pod is all that there will be.
        let has_no_account = pod.service_account.is_none()
            && [&node.pods, &node.forgotten].iter().any(|pods| pods.contains_key(&pod.uid))
            && self.template.names_service_account();
        Some(Placement {
            name,
            identity: identity.map_err(|error| {
                if has_no_account { NO_ACCOUNT.to_owned() } else { error.to_string() }
            }),
            mode,
            cgroup,
            pod: Some(PodName {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                uid: pod.uid.as_str().to_owned(),
            }),
            containers: container.cloned().into_iter().collect(),
            problem,
            unseen: self.unseen(handler, has_own_cgroup),
            owns_identity: self.template.is_of_one_pod(),
        })
    }

    fn place_alone(&self, container: &Container) -> Option<Placement> {
        let Marked::Agent { mode, problem } = self.marking.judge(None, &container.labels, None)
        else {
            return None;
        };
        let identity = self.template.render(&Values {
            trust_domain: &self.trust_domain,
            namespace: None,
            service_account: None,
            pod: None,
            container: Some(&container.name),
            labels: &container.labels,
        });
        Some(Placement {
            name: container.name.clone(),
            identity: identity.map_err(|error| error.to_string()),
            mode,
            cgroup: container.cgroup.clone(),
            pod: None,
            containers: vec![container.clone()],
            problem,
            unseen: self.unseen(&container.handler, container.has_own_cgroup()),
            owns_identity: self.template.is_of_one_pod(),
        })
    }
}

/// The cgroup of the pod in which a container's lies, as kubelet names it: `pod<uid>`, or
/// `kubepods-<class>-pod<uid>.slice` with `_` for `-` where systemd makes cgroups (kubelet,
/// `pkg/kubelet/cm/pod_container_manager_linux.go` and `cgroup_manager_linux.go`).
#[must_use]
pub fn pod_cgroup(cgroup: &Path, uid: &PodUid) -> Option<PathBuf> {
    let plain = format!("pod{}", uid.as_str());
    let slice = format!("-pod{}.slice", uid.as_str().replace('-', "_"));
    let is_pods = |name: &str| name == plain || name.ends_with(&slice);
    cgroup
        .ancestors()
        .skip(1)
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_pods))
        // The outermost: what a container makes below its own cgroup can have any name.
        .last()
        .map(Path::to_owned)
}

/// The cgroup of a process, absolute below the cgroup v2 root.
#[must_use]
pub fn cgroup_of(pid: u32) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    // What lies outside of the cgroup namespace of whoever reads is told by `..`.
    (path.starts_with('/') && !path.contains("/..")).then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "5c1a6f0e-7e0e-4b5e-9a52-8a1f0f6f3b11";

    fn rules(template: &str) -> Rules {
        Rules {
            marking: Marking {
                selectors: Vec::new(),
                exempt: vec!["kube-system".to_owned()],
                mode: Mode::Enforce,
            },
            template: template.parse().unwrap(),
            trust_domain: "example.org".to_owned(),
            sandboxed: vec!["runsc".to_owned()],
        }
    }

    fn pod(namespace: &str, labels: &[(&str, &str)]) -> Pod {
        Pod {
            uid: PodUid::new(UID).unwrap(),
            namespace: namespace.to_owned(),
            name: "researcher-0".to_owned(),
            service_account: None,
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            host_network: false,
            runtime_class: None,
        }
    }

    fn sandbox(pod: Pod, handler: &str) -> Sandbox {
        Sandbox {
            id: "s".to_owned(),
            pod,
            handler: handler.to_owned(),
            cgroup: Some(format!("/kubepods/burstable/pod{UID}/s").into()),
        }
    }

    fn container(id: &str, sandbox: Option<&str>, cgroup: &str) -> Container {
        Container {
            id: id.to_owned(),
            sandbox: sandbox.map(str::to_owned),
            name: format!("{id}-name"),
            labels: Labels::new(),
            handler: String::new(),
            is_sandbox: false,
            cgroup: cgroup.into(),
            process: ProcessRef { pid: 1, started: 0 },
            root: "/".into(),
            command: None,
        }
    }

    fn node(pod: Pod, handler: &str) -> Node {
        let mut node = Node::default();
        node.sandboxes.insert("s".to_owned(), sandbox(pod, handler));
        for id in ["a", "b"] {
            let cgroup = format!("/kubepods/burstable/pod{UID}/{id}");
            node.containers.insert(id.to_owned(), container(id, Some("s"), &cgroup));
        }
        node
    }

    #[test]
    fn a_pod_is_one_workload_and_its_cgroup_is_tagged() {
        let mut node = node(pod("agents", &[(AGENT, "true")]), "");
        let rules = rules(IdentityTemplate::DEFAULT);
        // The runtime alone does not know the service account.
        let placed = rules.place(&node);
        assert_eq!(placed.len(), 1);
        assert!(placed[0].identity.as_ref().is_err_and(|why| why.contains("service account")));
        let known = Pod {
            service_account: Some("researcher".to_owned()),
            ..pod("agents", &[(AGENT, "true"), (MODE, "audit")])
        };
        node.pods.insert(known.uid.clone(), known);
        let placed = rules.place(&node);
        assert_eq!(placed.len(), 1);
        let placement = &placed[0];
        let identity = placement.identity.as_ref().unwrap();
        assert_eq!(identity.as_str(), "spiffe://example.org/ns/agents/sa/researcher");
        assert_eq!(placement.cgroup, PathBuf::from(format!("/kubepods/burstable/pod{UID}")));
        assert_eq!(placement.mode, Mode::Audit);
        assert_eq!(placement.name, "agents/researcher-0");
        let ids: Vec<&str> = placement.containers.iter().map(|one| one.id.as_str()).collect();
        assert_eq!(ids, ["a", "b"]);
        // Also before its first container is there, and after its last.
        node.containers.clear();
        assert_eq!(rules.place(&node).len(), 1);
    }

    #[test]
    fn containers_that_the_template_tells_apart_are_workloads_of_their_own() {
        let node = node(pod("agents", &[(AGENT, "true")]), "");
        let placed = rules("spiffe://{trust_domain}/{pod}/{container}").place(&node);
        let identities: Vec<&str> =
            placed.iter().map(|one| one.identity.as_ref().unwrap().as_str()).collect();
        assert_eq!(
            identities,
            [
                "spiffe://example.org/researcher-0/a-name",
                "spiffe://example.org/researcher-0/b-name"
            ]
        );
        assert_eq!(placed[0].cgroup, PathBuf::from(format!("/kubepods/burstable/pod{UID}/a")));
    }

    #[test]
    fn a_sandbox_is_an_agents_by_what_the_cluster_says_of_its_pod_now() {
        let (rules, mut node) = (rules("spiffe://{trust_domain}/pod/{pod}"), Node::default());
        let marked = sandbox(pod("agents", &[(AGENT, "true")]), "");
        let plain = sandbox(pod("agents", &[]), "");
        assert!(rules.is_agent(&node, &marked));
        assert!(!rules.is_agent(&node, &plain));
        node.pods.insert(plain.pod.uid.clone(), marked.pod.clone());
        assert!(rules.is_agent(&node, &plain));
        node.pods.clear();
        assert!(!rules.is_agent(&node, &sandbox(pod("kube-system", &[(AGENT, "true")]), "")));
    }

    #[test]
    fn a_pod_that_is_no_agent_or_exempt_is_no_workload() {
        let rules = rules(IdentityTemplate::DEFAULT);
        assert_eq!(rules.place(&node(pod("agents", &[]), "")), []);
        assert_eq!(rules.place(&node(pod("kube-system", &[(AGENT, "true")]), "")), []);
    }

    #[test]
    fn a_sandboxed_pod_is_told_apart() {
        let mut rules = rules(IdentityTemplate::DEFAULT);
        rules.sandboxed = vec!["runsc".to_owned(), "kata*".to_owned()];
        for (handler, unseen) in [
            ("runsc", Some(Unseen::Kernel)),
            ("runsc-kvm", None),
            ("kata", Some(Unseen::Kernel)),
            ("kata-qemu-snp", Some(Unseen::Kernel)),
            ("runc", None),
            ("", None),
        ] {
            let placed = rules.place(&node(pod("agents", &[(AGENT, "true")]), handler));
            assert_eq!(placed[0].unseen, unseen, "{handler:?}");
        }
    }

    #[test]
    fn a_container_without_a_pod_is_marked_by_its_own_labels() {
        let mut node = Node::default();
        let mut alone = container("d", None, "/docker/d");
        node.containers.insert("d".to_owned(), alone.clone());
        let rules = rules("spiffe://{trust_domain}/docker/{container}");
        assert_eq!(rules.place(&node), []);
        alone.labels.insert(AGENT.to_owned(), "true".to_owned());
        node.containers.insert("d".to_owned(), alone);
        let placed = rules.place(&node);
        assert_eq!(
            placed[0].identity.as_ref().unwrap().as_str(),
            "spiffe://example.org/docker/d-name"
        );
        assert_eq!(placed[0].cgroup, PathBuf::from("/docker/d"));
        assert_eq!(placed[0].unseen, None);
        for container in node.containers.values_mut() {
            container.handler = "runsc".to_owned();
        }
        assert_eq!(rules.place(&node)[0].unseen, Some(Unseen::Kernel));
    }

    #[test]
    fn a_container_in_a_cgroup_of_others_is_not_held_there() {
        let mut node = Node::default();
        for id in ["1d", "2e"] {
            let mut container = container(id, None, "/system.slice/docker.service");
            container.labels.insert(AGENT.to_owned(), "true".to_owned());
            node.containers.insert(id.to_owned(), container);
        }
        let placed = rules("spiffe://{trust_domain}/docker/{container}").place(&node);
        let told: Vec<_> = placed.iter().map(|one| (one.name.as_str(), one.unseen)).collect();
        let unseen = Some(Unseen::Cgroup);
        assert_eq!(told, [("1d-name", unseen), ("2e-name", unseen)]);
    }

    #[test]
    fn a_pod_of_a_namespace_that_found_no_room_is_held_as_strictly_as_it_may_say() {
        let rules = rules("spiffe://{trust_domain}/ns/{namespace}/pod/{pod}");
        let placed = |lacks_namespaces, namespace: &str, labels: &[(&str, &str)]| {
            let of_pod = Pod { namespace: namespace.to_owned(), ..pod(namespace, labels) };
            let mut node = node(of_pod, "");
            node.namespaces.remove(namespace);
            node.lacks_namespaces = lacks_namespaces;
            rules.place(&node).first().map(|placement| placement.mode)
        };
        assert_eq!(placed(false, "research", &[]), None);
        assert_eq!(placed(true, "research", &[]), Some(Mode::Enforce));
        assert_eq!(placed(true, "research", &[(MODE, "audit")]), Some(Mode::Audit));
        assert_eq!(placed(true, "research", &[(AGENT, "false")]), None);
        assert_eq!(placed(true, "kube-system", &[]), None);
    }

    #[test]
    fn a_static_pod_is_denied_with_the_reason_unless_it_is_known_by_something_else() {
        let agent = || Pod { service_account: None, ..pod("research", &[(AGENT, "true")]) };
        let mut of_cluster = node(agent(), "");
        of_cluster.pods.insert(agent().uid, agent());
        let by_account = rules("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}");
        let why = by_account.place(&of_cluster)[0].identity.clone().unwrap_err();
        assert!(why.contains("static pod") && why.contains("containers.identity"), "{why}");
        // Of one that only the runtime tells of it is not known yet.
        let why = by_account.place(&node(agent(), ""))[0].identity.clone().unwrap_err();
        assert!(why.contains("not known yet"), "{why}");
        let by_name = rules("spiffe://{trust_domain}/ns/{namespace}/pod/{pod}");
        let identity = by_name.place(&of_cluster)[0].identity.clone().unwrap();
        assert_eq!(identity.as_str(), "spiffe://example.org/ns/research/pod/researcher-0");
    }

    #[test]
    fn a_pod_is_placed_before_any_runtime_tells_of_it() {
        let rules = rules("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}");
        let uid = PodUid::new(UID).unwrap();
        let of_cluster = |pod: Pod| {
            let mut node = Node::default();
            node.pods.insert(pod.uid.clone(), pod);
            node
        };
        let agent = || pod("research", &[(AGENT, "true")]);
        let mut known = of_cluster(agent());
        assert_eq!(rules.awaited(&known).count(), 1);
        assert!(rules.place(&known).is_empty(), "its cgroup is not there");

        let cgroup = PathBuf::from(format!("/kubepods/burstable/pod{UID}"));
        assert!(known.cgroups_of(&uid).contains(&cgroup));
        known.pod_cgroups.insert(uid.clone(), cgroup.clone());
        let placed = rules.place(&known);
        assert_eq!(placed.len(), 1);
        assert_eq!(
            (&placed[0].cgroup, placed[0].name.as_str()),
            (&cgroup, "research/researcher-0")
        );
        assert!(placed[0].unseen.is_none() && placed[0].containers.is_empty());

        // Also one that the cluster has forgotten: kubelet may start it again before it knows.
        let mut forgotten = known.clone();
        forgotten.forgotten = std::mem::take(&mut forgotten.pods);
        assert_eq!((rules.awaited(&forgotten).count(), rules.place(&forgotten)), (1, placed));
        forgotten.pod_cgroups.clear();
        assert!(rules.place(&forgotten).is_empty());

        // What a runtime tells of is placed by what it tells.
        let mut told = node(agent(), "");
        told.pods.insert(uid.clone(), agent());
        assert_eq!(rules.awaited(&told).count(), 0);
        // A sandbox that has ended tells no cgroup; what runs in the pod meanwhile stays held.
        told.containers.clear();
        told.sandboxes.values_mut().for_each(|sandbox| sandbox.cgroup = None);
        assert!(rules.place(&told).is_empty());
        told.pod_cgroups.insert(uid.clone(), cgroup.clone());
        assert_eq!((rules.awaited(&told).count(), rules.place(&told).len()), (1, 1));
        for not_awaited in [
            pod("research", &[]),
            pod("kube-system", &[(AGENT, "true")]),
            Pod { runtime_class: Some("gvisor".to_owned()), ..agent() },
        ] {
            assert_eq!(rules.awaited(&of_cluster(not_awaited)).count(), 0);
        }
        let by_container = self::rules("spiffe://{trust_domain}/container/{container}");
        assert_eq!(by_container.awaited(&known).count(), 0);
    }

    #[test]
    fn a_pods_cgroup_is_looked_for_where_kubelet_puts_them() {
        let uid = PodUid::new("a-b").unwrap();
        let mut node = Node::default();
        for (around, expected) in [
            ("/kubepods/podx/c", "/kubepods/poda-b"),
            ("/nested/kubepods/besteffort/podx/c", "/nested/kubepods/burstable/poda-b"),
            (
                "/kind/kubepods.slice/kubepods-podx.slice/c",
                "/kind/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poda_b.slice",
            ),
            (
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podx.slice/c",
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                 kubelet-kubepods-burstable-poda_b.slice",
            ),
            (
                "/of/no/pod",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b.slice",
            ),
        ] {
            node.containers.insert("c".to_owned(), container("c", None, around));
            let looked_for = node.cgroups_of(&uid);
            assert!(looked_for.contains(&PathBuf::from(expected)), "{expected}: {looked_for:?}");
        }
    }

    #[test]
    fn the_cgroup_of_a_pod_is_known_by_either_driver() {
        let uid = PodUid::new(UID).unwrap();
        let under = UID.replace('-', "_");
        let slice =
            format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{under}.slice");
        for (cgroup, of_pod) in [
            (
                format!("/kubepods/besteffort/pod{UID}/c"),
                Some(format!("/kubepods/besteffort/pod{UID}")),
            ),
            (format!("{slice}/cri-containerd-c.scope"), Some(slice.clone())),
            (
                format!("/system.slice/kind/kubepods/pod{UID}/c/below"),
                Some(format!("/system.slice/kind/kubepods/pod{UID}")),
            ),
            ("/k8s.io/c".to_owned(), None),
            (format!("/kubepods/pod{UID}/c/pod{UID}/d"), Some(format!("/kubepods/pod{UID}"))),
            (format!("/kubepods/pod{UID}"), None),
        ] {
            assert_eq!(pod_cgroup(Path::new(&cgroup), &uid), of_pod.map(PathBuf::from), "{cgroup}");
        }
    }
}
