//! Scopes and grants as custom resources, watched.
//!
//! Holds each object as the text that a file would have, so that the one reader of manifests reads
//! both. What is valid, and what goes on saying what it said before, is not decided here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::resources::group_and_version;
use super::status::{Due, ObjectStatus, Word, shortened};
use super::watch::{Lost, Seen, everything, follow};
use crate::manifest::API_VERSION;
use crate::scope::cluster::ObjectName;

/// How many objects of each kind are held; what is above is refused and said.
const MOST: usize = 10_000;

/// The kinds that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    Scope,
    Grant,
    ClusterGrant,
}

/// One object, as it would be written in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub text: Arc<[u8]>,
    /// When it was created, from which a `ttl` counts.
    pub created: Timestamp,
    /// The namespace whose subjects it may name; `None` where it may name all.
    pub namespace: Option<String>,
}

/// The objects as they are known.
#[derive(Debug, Default)]
pub struct Objects {
    state: Mutex<State>,
    changed: Notify,
    reporting: Notify,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<ObjectKind, BTreeMap<ObjectName, Object>>,
    /// Those that have been listed whole.
    listed: BTreeSet<ObjectKind>,
    lost: Lost<ObjectKind>,
    statuses: BTreeMap<(ObjectKind, ObjectName), ObjectStatus>,
    /// What this node says of each, by what errors call it.
    words: BTreeMap<String, Word>,
    /// The nodes of the cluster, once they are known.
    nodes: Option<BTreeSet<String>>,
}

impl ObjectKind {
    pub const ALL: [Self; 3] = [Self::Scope, Self::Grant, Self::ClusterGrant];

    /// As it is written in `kind`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Scope => "Scope",
            Self::Grant => "Grant",
            Self::ClusterGrant => "ClusterGrant",
        }
    }

    /// As it is written in paths, and on the command line.
    #[must_use]
    pub const fn singular(self) -> &'static str {
        match self {
            Self::Scope => "scope",
            Self::Grant => "grant",
            Self::ClusterGrant => "clustergrant",
        }
    }

    /// As it is written in the paths of the API server.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Scope => "scopes",
            Self::Grant => "grants",
            Self::ClusterGrant => "clustergrants",
        }
    }

    /// What errors call an object instead of a file, as `kubectl get` takes it: `scope/github-read`,
    /// and with its namespace `grant/agents/researcher`.
    #[must_use]
    pub fn path(self, name: &ObjectName) -> String {
        let ObjectName { namespace, name } = name;
        match namespace.as_str() {
            "" => format!("{}/{name}", self.singular()),
            namespace => format!("{}/{namespace}/{name}", self.singular()),
        }
    }

    /// The kind of the object that errors call `path`.
    #[must_use]
    pub fn of_path(path: &str) -> Option<Self> {
        let (singular, _) = path.split_once('/')?;
        Self::ALL.into_iter().find(|kind| kind.singular() == singular)
    }

    pub(super) fn resource(self) -> ApiResource {
        let (group, version) = group_and_version();
        let kind = GroupVersionKind::gvk(group, version, self.as_str());
        ApiResource::from_gvk_with_plural(&kind, self.plural())
    }
}

impl Objects {
    /// Every object by what errors call it, once all kinds have been listed: a grant without its
    /// scope would be an error.
    #[must_use]
    pub fn known(&self) -> Option<BTreeMap<String, Object>> {
        let state = self.state();
        let all = state.objects.iter().flat_map(|(kind, objects)| {
            objects.iter().map(|(name, object)| (kind.path(name), object.clone()))
        });
        (state.listed.len() == ObjectKind::ALL.len()).then(|| all.collect())
    }

    /// Waits until something has changed.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What can not be watched at present, one sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let state = self.state();
        let lost = state.lost.iter().map(|(kind, error)| {
            format!("objects of kind {} are as they were last known: {error}", kind.as_str())
        });
        lost.collect()
    }

    /// Says of every object that concerns this node, by what errors call it, the error that keeps
    /// its newest generation from being in force; `None` where it is in force.
    pub fn say(&self, errors: &BTreeMap<String, Option<String>>) {
        let mut state = self.state();
        let State { statuses, words, .. } = &mut *state;
        let mut said = BTreeMap::new();
        for ((kind, name), status) in &*statuses {
            let path = kind.path(name);
            let word = errors.get(&path).map(|error| match error {
                None => Word { generation: Some(status.generation), error: None },
                Some(error) => Word { generation: None, error: Some(shortened(error)) },
            });
            said.extend(word.map(|word| (path, word)));
        }
        let is_same = *words == said;
        *words = said;
        drop(state);
        if !is_same {
            self.reporting.notify_one();
        }
    }

    /// Takes the names of all nodes of the cluster.
    pub fn see_nodes(&self, nodes: BTreeSet<String>) {
        let mut state = self.state();
        let nodes = Some(nodes);
        if state.nodes != nodes {
            state.nodes = nodes;
            drop(state);
            self.reporting.notify_one();
        }
    }

    /// What is to be written of the status of objects.
    pub(super) fn due(&self, node: &str, now: Timestamp) -> Vec<Due> {
        let state = self.state();
        let due = state.statuses.iter().flat_map(|((kind, name), status)| {
            let word = state.words.get(&kind.path(name));
            let due = status.due(node, word, state.nodes.as_ref(), now);
            due.into_iter().map(|(manager, status)| Due {
                kind: *kind,
                name: name.clone(),
                manager,
                status,
            })
        });
        due.collect()
    }

    /// Waits until something may have to be written.
    pub(super) async fn to_report(&self) {
        self.reporting.notified().await;
    }

    /// What was to be written was not.
    pub(super) fn report_again(&self) {
        self.reporting.notify_one();
    }

    /// Takes what was seen of the status of a kind.
    fn see_status(&self, kind: ObjectKind, seen: Seen<ObjectStatus>) {
        let mut state = self.state();
        match seen {
            Seen::Lost(_) => return,
            Seen::Whole(all) => {
                state.statuses.retain(|(other, _), _| *other != kind);
                let all = all.into_iter().take(MOST);
                state.statuses.extend(all.map(|(name, status)| ((kind, name), status)));
            }
            Seen::Put(name, status) => drop(state.statuses.insert((kind, name), status)),
            Seen::Gone(name) => drop(state.statuses.remove(&(kind, name))),
        }
        drop(state);
        self.reporting.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was seen of a kind.
    pub fn see(&self, kind: ObjectKind, seen: Seen<Object>) {
        let mut state = self.state();
        let State { objects, listed, lost, .. } = &mut *state;
        let own = objects.entry(kind).or_default();
        // A status that somebody wrote changes nothing that is said.
        let is_same = match seen {
            Seen::Lost(error) => {
                if lost.note(kind, error.clone()) {
                    tracing::warn!(
                        error,
                        kind = kind.as_str(),
                        "the API server does not answer; what was known stays"
                    );
                }
                return;
            }
            Seen::Whole(all) => {
                let is_same = !listed.insert(kind) && *own == all;
                *own = all;
                is_same
            }
            Seen::Put(name, object) => {
                let is_same = own.get(&name) == Some(&object);
                own.insert(name, object);
                is_same
            }
            Seen::Gone(name) => own.remove(&name).is_none(),
        };
        if own.len() > MOST {
            tracing::error!(
                kind = kind.as_str(),
                most = MOST,
                "there are more objects than are held; the last ones say nothing"
            );
            while own.len() > MOST {
                own.pop_last();
            }
        }
        if lost.answered(&kind) {
            tracing::info!(kind = kind.as_str(), "the API server answers again");
        }
        drop(state);
        if !is_same {
            self.changed.notify_one();
        }
    }
}

/// Fills `objects` for as long as the daemon runs.
pub async fn run(client: Client, objects: Arc<Objects>) {
    let mut watches = JoinSet::new();
    for kind in ObjectKind::ALL {
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &kind.resource());
        let objects = Arc::clone(&objects);
        let sink = move |seen| {
            let (object, status) = parted(seen);
            objects.see_status(kind, status);
            objects.see(kind, object);
        };
        watches.spawn(follow(
            api,
            everything(),
            move |object| Some((keep(kind, object), status(object))),
            sink,
        ));
    }
    while let Some(ended) = watches.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a watch broke off; what it last said stays");
        }
    }
}

/// Objects and their statuses, each by itself.
fn parted(seen: Seen<(Object, ObjectStatus)>) -> (Seen<Object>, Seen<ObjectStatus>) {
    match seen {
        Seen::Lost(error) => (Seen::Lost(error.clone()), Seen::Lost(error)),
        Seen::Gone(name) => (Seen::Gone(name.clone()), Seen::Gone(name)),
        Seen::Put(name, (object, status)) => {
            (Seen::Put(name.clone(), object), Seen::Put(name, status))
        }
        Seen::Whole(all) => {
            let (mut objects, mut statuses) = (BTreeMap::new(), BTreeMap::new());
            for (name, (object, status)) in all {
                objects.insert(name.clone(), object);
                statuses.insert(name, status);
            }
            (Seen::Whole(objects), Seen::Whole(statuses))
        }
    }
}

fn status(object: &DynamicObject) -> ObjectStatus {
    let generation = object.metadata.generation.unwrap_or_default();
    ObjectStatus::read(generation, &object.data["status"])
}

/// What a file with the same content would say. What only the API server knows is left out.
fn keep(kind: ObjectKind, object: &DynamicObject) -> Object {
    let namespace = object.namespace();
    let mut metadata = json!({"name": object.name_any()});
    if let Some(namespace) = &namespace {
        metadata["namespace"] = namespace.clone().into();
    }
    let mut manifest =
        json!({"apiVersion": API_VERSION, "kind": kind.as_str(), "metadata": metadata});
    let Value::Object(fields) = &mut manifest else { unreachable!("written as one above") };
    if let Value::Object(content) = &object.data {
        let content = content.iter().filter(|(name, _)| *name != "status");
        fields.extend(content.map(|(name, value)| (name.clone(), value.clone())));
    }
    let text = format!("{manifest:#}\n");
    // Every object has a time of creation; one without would count from the beginning of time.
    let created = object.creation_timestamp().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    Object { text: text.into_bytes().into(), created, namespace }
}
