//! This node's pods and all namespaces, watched: which containers are agents, and as whom.
//!
//! Kept apart from what destinations come to, since this is what a start waits for and is little:
//! the API server is asked for the pods of one node only.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Pod as ApiPod};
use kube::api::Api;
use kube::{Client, ResourceExt as _};
use tokio::task::JoinSet;

use super::filled::{self, Change, Filled, change_map};
use super::watch::{Bound, Kept, Seen, bytes_of_texts, ended, everything, follow};
use crate::identity::pod::{AGENT, Labels, MODE, Pod, PodUid};
use crate::scope::cluster::ObjectName;

/// What the API server says of this node's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePods {
    pub pods: BTreeMap<PodUid, Pod>,
    /// Those of their labels that can make an agent of a pod.
    pub namespaces: BTreeMap<String, Labels>,
    /// Whether there was no room for some of the namespaces.
    pub lacks_namespaces: bool,
}

/// The pods as they are known.
#[derive(Debug, Default)]
pub struct PodFeed(Filled<Part, Known>);

#[derive(Clone, Debug, Default)]
struct Known {
    of_node: NodePods,
    /// Which pod has a name: one that is made anew under it is another.
    names: BTreeMap<ObjectName, PodUid>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Pods,
    Namespaces,
}

impl filled::Part for Part {
    const ALL: &'static [Self] = &[Self::Pods, Self::Namespaces];

    fn as_str(self) -> &'static str {
        match self {
            Self::Pods => "pods of this node",
            Self::Namespaces => "labels of namespaces",
        }
    }

    fn without_room(self) -> &'static str {
        match self {
            Self::Pods => {
                "those of them that are agents have no identity, and may do nothing; one that was known before stays as it was until it ends"
            }
            Self::Namespaces => "their pods are held as agents in enforce mode",
        }
    }
}

impl Kept for Pod {
    fn bytes(&self) -> usize {
        let Self { uid, namespace, name, service_account, labels, host_network: _, runtime_class } =
            self;
        let optional = service_account.iter().chain(runtime_class);
        uid.as_str().len()
            + bytes_of_texts([namespace, name].into_iter().chain(optional))
            + labels.bytes()
    }
}

impl PodFeed {
    /// What is known, if both have been listed and something has changed since this was last asked.
    pub fn take(&self) -> Option<NodePods> {
        let (mut known, _) = self.0.take()?;
        known.of_node.lacks_namespaces = self.0.is_short_of(Part::Namespaces);
        Some(known.of_node)
    }

    /// Waits until [`Self::take`] may have something.
    pub async fn changed(&self) {
        self.0.changed().await;
    }

    /// How many objects found no room.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.0.left_out()
    }

    /// What can not be watched at present, and what found no room, one sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        self.0.problems()
    }

    /// Takes what was seen of pods.
    pub fn see_pod(&self, seen: Seen<Pod>) {
        self.0.see(Part::Pods, seen, |known, change| {
            let Known { of_node: NodePods { pods, .. }, names } = known;
            match change {
                Change::All(all) => {
                    let before = std::mem::take(pods);
                    names.clear();
                    for (name, pod) in all {
                        names.insert(name, pod.uid.clone());
                        pods.insert(pod.uid.clone(), pod);
                    }
                    before != *pods
                }
                Change::Put(name, pod) => {
                    let earlier = names.insert(name, pod.uid.clone());
                    if let Some(earlier) = earlier.filter(|earlier| *earlier != pod.uid) {
                        pods.remove(&earlier);
                    }
                    let uid = pod.uid.clone();
                    let before = pods.insert(uid.clone(), pod);
                    before.as_ref() != pods.get(&uid)
                }
                Change::Gone(name) => {
                    names.remove(&name).is_some_and(|uid| pods.remove(&uid).is_some())
                }
            }
        });
    }

    /// Takes what was seen of namespaces.
    pub fn see_namespace(&self, seen: Seen<Labels>) {
        self.0.see(Part::Namespaces, seen, |known, change| {
            change_map(&mut known.of_node.namespaces, change, |name| name.name)
        });
    }
}

/// Fills `feed` with the pods of `node` for as long as the daemon runs.
pub async fn run(client: Client, node: String, feed: Arc<PodFeed>, bound: Bound) {
    let mut watches = JoinSet::new();
    let own = Arc::clone(&feed);
    let of_node = everything().fields(&format!("spec.nodeName={node}"));
    watches.spawn(follow(Api::all(client.clone()), of_node, bound, pod, move |seen| {
        own.see_pod(seen);
    }));
    watches.spawn(follow(Api::all(client), everything(), bound, marks, move |seen| {
        feed.see_namespace(seen);
    }));
    while let Some(watch) = watches.join_next().await {
        ended(watch);
    }
}

/// The labels of a namespace that say something of its pods.
#[expect(clippy::unnecessary_wraps, reason = "kept of each object is an option")]
fn marks(namespace: &Namespace) -> Option<Labels> {
    let all = namespace.metadata.labels.iter().flatten();
    let marks = all.filter(|(key, _)| [AGENT, MODE].contains(&key.as_str()));
    Some(marks.map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// Also of one that has ended: its containers may not have, and who asks knows the runtime.
fn pod(pod: &ApiPod) -> Option<Pod> {
    let spec = pod.spec.as_ref()?;
    // A static pod is known to the runtime by the hash of its manifest, and to the API server by
    // the number of its mirror.
    let uid = match pod.annotations().get("kubernetes.io/config.mirror") {
        Some(hash) => hash.clone(),
        None => pod.uid()?,
    };
    Some(Pod {
        uid: PodUid::new(&uid)?,
        namespace: pod.namespace()?,
        name: pod.name_any(),
        service_account: spec.service_account_name.clone().filter(|name| !name.is_empty()),
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        host_network: spec.host_network.unwrap_or_default(),
        runtime_class: spec.runtime_class_name.clone(),
    })
}
