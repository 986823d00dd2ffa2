//! This node's pods and all namespaces, watched: which containers are agents, and as whom.
//!
//! Kept apart from what destinations come to, since this is what a start waits for and is little:
//! the API server is asked for the pods of one node only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::{Namespace, Pod as ApiPod};
use kube::api::Api;
use kube::{Client, ResourceExt as _};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::watch::{Lost, Seen, everything, follow};
use crate::identity::pod::{Labels, Pod, PodUid};
use crate::scope::cluster::ObjectName;

/// What the API server says of this node's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePods {
    pub pods: BTreeMap<PodUid, Pod>,
    pub namespaces: BTreeMap<String, Labels>,
}

/// The pods as they are known.
#[derive(Debug, Default)]
pub struct PodFeed {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    known: NodePods,
    /// Which pod has a name: one that is made anew under it is another.
    names: BTreeMap<ObjectName, PodUid>,
    listed: BTreeSet<Part>,
    lost: Lost<Part>,
    fresh: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Pods,
    Namespaces,
}

impl Part {
    const ALL: [Self; 2] = [Self::Pods, Self::Namespaces];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Pods => "pods of this node",
            Self::Namespaces => "labels of namespaces",
        }
    }
}

impl PodFeed {
    /// What is known, if both have been listed and something has changed since this was last asked.
    pub fn take(&self) -> Option<NodePods> {
        let mut state = self.state();
        if state.listed.len() < Part::ALL.len() || !std::mem::take(&mut state.fresh) {
            return None;
        }
        Some(state.known.clone())
    }

    /// Waits until [`Self::take`] may have something.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What can not be watched at present, one sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let state = self.state();
        let lost = state.lost.iter();
        lost.map(|(part, error)| format!("{} are as they were last known: {error}", part.as_str()))
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn see<V: PartialEq>(
        &self,
        part: Part,
        seen: Seen<V>,
        change: impl FnOnce(&mut State, Change<V>) -> bool,
    ) {
        let mut state = self.state();
        let change_made = match seen {
            Seen::Lost(error) => {
                if state.lost.note(part, error.clone()) {
                    tracing::warn!(
                        error,
                        what = part.as_str(),
                        "the API server does not answer; what was known stays"
                    );
                }
                return;
            }
            Seen::Whole(all) => {
                let is_first = state.listed.insert(part);
                change(&mut state, Change::All(all)) || is_first
            }
            Seen::Put(name, kept) => change(&mut state, Change::One(name, Some(kept))),
            Seen::Gone(name) => change(&mut state, Change::One(name, None)),
        };
        if state.lost.answered(&part) {
            tracing::info!(what = part.as_str(), "the API server answers again");
        }
        // Most changes of a pod are of its status.
        if change_made {
            state.fresh = true;
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Takes what was seen of pods.
    pub fn see_pod(&self, seen: Seen<Pod>) {
        self.see(Part::Pods, seen, |state, change| match change {
            Change::All(all) => {
                let before = std::mem::take(&mut state.known.pods);
                state.names.clear();
                for (name, pod) in all {
                    state.names.insert(name, pod.uid.clone());
                    state.known.pods.insert(pod.uid.clone(), pod);
                }
                before != state.known.pods
            }
            Change::One(name, Some(pod)) => {
                let earlier = state.names.insert(name, pod.uid.clone());
                if let Some(earlier) = earlier.filter(|earlier| *earlier != pod.uid) {
                    state.known.pods.remove(&earlier);
                }
                let uid = pod.uid.clone();
                let before = state.known.pods.insert(uid.clone(), pod);
                before.as_ref() != state.known.pods.get(&uid)
            }
            Change::One(name, None) => {
                let uid = state.names.remove(&name);
                uid.is_some_and(|uid| state.known.pods.remove(&uid).is_some())
            }
        });
    }

    /// Takes what was seen of namespaces.
    pub fn see_namespace(&self, seen: Seen<Labels>) {
        self.see(Part::Namespaces, seen, |state, change| {
            let known = &mut state.known.namespaces;
            match change {
                Change::All(all) => {
                    let all = all.into_iter().map(|(name, labels)| (name.name, labels)).collect();
                    let before = std::mem::replace(known, all);
                    before != *known
                }
                Change::One(name, Some(labels)) => {
                    let is_same = known.get(&name.name) == Some(&labels);
                    known.insert(name.name, labels);
                    !is_same
                }
                Change::One(name, None) => known.remove(&name.name).is_some(),
            }
        });
    }
}

/// What becomes of what is known.
enum Change<V> {
    All(BTreeMap<ObjectName, V>),
    One(ObjectName, Option<V>),
}

/// Fills `feed` with the pods of `node` for as long as the daemon runs.
pub async fn run(client: Client, node: String, feed: Arc<PodFeed>) {
    let mut watches = JoinSet::new();
    let own = Arc::clone(&feed);
    let of_node = everything().fields(&format!("spec.nodeName={node}"));
    watches.spawn(follow(Api::all(client.clone()), of_node, pod, move |seen| own.see_pod(seen)));
    watches.spawn(follow(Api::all(client), everything(), labels, move |seen| {
        feed.see_namespace(seen);
    }));
    while let Some(ended) = watches.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a watch broke off; what it last said stays");
        }
    }
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

#[expect(clippy::unnecessary_wraps, reason = "kept of each object is an option")]
fn labels(namespace: &Namespace) -> Option<Labels> {
    Some(namespace.metadata.labels.clone().unwrap_or_default())
}
