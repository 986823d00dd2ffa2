//! Scopes and grants as custom resources, watched.
//!
//! Holds each object as the text that a file would have, so that the one reader of manifests reads
//! both. What is valid, and what goes on saying what it said before, is not decided here.
//!
//! Grants are watched in the namespaces of this node's pods only: a grant names subjects of its own
//! namespace, so that no other can concern the node, however many there are in the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinSet};

use super::resources::group_and_version;
use super::status::{Due, Nodes, ObjectStatus, Watchers, Word, shortened};
use super::watch::{Bound, Kept, LeftOut, Lost, Seen, bytes_of_texts, ended, everything, follow};
use crate::grant::store::Phase;
use crate::manifest::API_VERSION;
use crate::scope::cluster::ObjectName;

/// What becomes of objects for which there is no room.
const WITHOUT_ROOM: &str = "they say nothing";
/// How long a namespace is watched after its last pod has left: the next one is not denied for as long as a
/// list takes, and what this node said of the grants is taken back.
const LINGER: Duration = Duration::from_secs(300);
/// How often it is looked at which namespaces nobody is in any more.
const LOOK: Duration = Duration::from_secs(30);

/// The kinds that are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    Scope,
    Grant,
    ClusterGrant,
}

/// What one watch lists.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Watched {
    Scopes,
    ClusterGrants,
    /// The grants of one namespace.
    Grants(String),
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

/// What an object comes to on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Here {
    /// The generation of a scope that was last taken counts; what keeps it from being in force all the same.
    Scope(Option<String>),
    /// That of a grant does, which is so far in its life.
    Grant(Phase, Option<String>),
    /// The error that keeps it from counting.
    Wrong(String),
}

/// The objects as they are known.
#[derive(Debug, Default)]
pub struct Objects {
    state: Mutex<State>,
    changed: Notify,
    reporting: Notify,
    moved: Notify,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<Watched, BTreeMap<ObjectName, Object>>,
    /// Those that have been listed whole.
    listed: BTreeSet<Watched>,
    /// Whether everything that there was to list has been.
    is_whole: bool,
    /// The namespaces in which this node has pods, or had until then. `None` until that is known.
    namespaces: Option<BTreeMap<String, Option<Instant>>>,
    lost: Lost<Watched>,
    left_out: BTreeMap<Watched, LeftOut>,
    statuses: BTreeMap<(ObjectKind, ObjectName), ObjectStatus>,
    /// The generation of each that was last brought into force, or had an error then.
    taken: BTreeMap<(ObjectKind, ObjectName), i64>,
    /// What this node says of each, by what errors call it. `None` until it has said something: what an
    /// earlier daemon said stays until then.
    words: Option<BTreeMap<String, Word>>,
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

impl Watched {
    pub const fn kind(&self) -> ObjectKind {
        match self {
            Self::Scopes => ObjectKind::Scope,
            Self::ClusterGrants => ObjectKind::ClusterGrant,
            Self::Grants(_) => ObjectKind::Grant,
        }
    }

    /// As people would say it.
    fn told(&self) -> String {
        match self {
            Self::Scopes => "scopes".to_owned(),
            Self::ClusterGrants => "cluster grants".to_owned(),
            Self::Grants(namespace) => format!("grants of namespace {namespace}"),
        }
    }

    fn api(&self, client: Client) -> Api<DynamicObject> {
        let resource = self.kind().resource();
        match self {
            Self::Scopes | Self::ClusterGrants => Api::all_with(client, &resource),
            Self::Grants(namespace) => Api::namespaced_with(client, namespace, &resource),
        }
    }

    fn has(&self, kind: ObjectKind, name: &ObjectName) -> bool {
        match self {
            Self::Scopes | Self::ClusterGrants => self.kind() == kind,
            Self::Grants(namespace) => self.kind() == kind && name.namespace == *namespace,
        }
    }
}

impl State {
    /// Everything that is to be watched; of grants none before it is known where this node's pods are.
    fn watches(&self) -> impl Iterator<Item = Watched> {
        let namespaces = self.namespaces.iter().flat_map(BTreeMap::keys);
        let grants = namespaces.map(|namespace| Watched::Grants(namespace.clone()));
        [Watched::Scopes, Watched::ClusterGrants].into_iter().chain(grants)
    }

    fn known(&mut self) -> Option<BTreeMap<String, Object>> {
        if !self.is_whole {
            let has_all = self.watches().all(|watched| self.listed.contains(&watched));
            self.is_whole = self.namespaces.is_some() && has_all;
        }
        let all = self.objects.iter().flat_map(|(watched, objects)| {
            objects.iter().map(|(name, object)| (watched.kind().path(name), object.clone()))
        });
        self.is_whole.then(|| all.collect())
    }

    /// Whether a watch is one of a namespace that nobody is in any more.
    fn is_over(&self, watched: &Watched) -> bool {
        match watched {
            Watched::Scopes | Watched::ClusterGrants => false,
            Watched::Grants(namespace) => {
                self.namespaces.as_ref().is_none_or(|known| !known.contains_key(namespace))
            }
        }
    }
}

impl Objects {
    /// Every object by what errors call it, once all that there is to list has been: a grant without
    /// its scope would be an error, and one that is missing would be taken back. A namespace that comes
    /// later holds nobody else up.
    #[must_use]
    pub fn known(&self) -> Option<BTreeMap<String, Object>> {
        self.state().known()
    }

    /// The same, for whoever brings it into force: of these generations it is said from now on.
    #[must_use]
    pub fn take(&self) -> Option<BTreeMap<String, Object>> {
        let mut state = self.state();
        let known = state.known()?;
        let State { statuses, taken, .. } = &mut *state;
        *taken = statuses.iter().map(|(key, status)| (key.clone(), status.generation)).collect();
        Some(known)
    }

    /// Takes the namespaces in which this node has pods: their grants are watched.
    pub fn concern(&self, namespaces: &BTreeSet<String>) {
        let mut state = self.state();
        let is_first = state.namespaces.is_none();
        let known = state.namespaces.get_or_insert_default();
        let mut is_new = false;
        for (namespace, left) in known.iter_mut() {
            if namespaces.contains(namespace) {
                *left = None;
            } else if left.is_none() {
                *left = Some(Instant::now());
            }
        }
        for namespace in namespaces {
            is_new |= known.insert(namespace.clone(), None).is_none();
        }
        drop(state);
        if is_new {
            self.moved.notify_one();
        }
        // The first word may be that there are none, and nothing else is to be waited for.
        if is_first {
            self.changed.notify_one();
        }
    }

    /// Forgets what nobody on this node has been concerned with for `linger`, and says what is to be
    /// watched.
    fn watches(&self, linger: Duration) -> BTreeSet<Watched> {
        let mut state = self.state();
        if let Some(known) = &mut state.namespaces {
            known.retain(|_, left| left.is_none_or(|left| left.elapsed() < linger));
        }
        let watches: BTreeSet<Watched> = state.watches().collect();
        let over: Vec<Watched> =
            state.objects.keys().filter(|known| !watches.contains(*known)).cloned().collect();
        for watched in &over {
            state.objects.remove(watched);
            state.listed.remove(watched);
            state.lost.answered(watched);
            state.left_out.remove(watched);
            state.statuses.retain(|(kind, name), _| !watched.has(*kind, name));
        }
        drop(state);
        if !over.is_empty() {
            self.changed.notify_one();
        }
        watches
    }

    /// Waits until something has changed.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What can not be watched at present, and what found no room, one sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let state = self.state();
        let lost = state.lost.iter().map(|(watched, error)| {
            format!("{} are as they were last known: {error}", watched.told())
        });
        let left_out = state.left_out.iter();
        let left_out =
            left_out.filter_map(|(watched, left_out)| left_out.told(&watched.told(), WITHOUT_ROOM));
        lost.chain(left_out).collect()
    }

    /// How many objects found no room.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.state().left_out.values().map(|left_out| left_out.count).sum()
    }

    /// Says of every object that concerns this node, by what errors call it, what it comes to there.
    pub fn say(&self, here: &BTreeMap<String, Here>) {
        let mut state = self.state();
        let State { statuses, words, taken, .. } = &mut *state;
        let mut said = BTreeMap::new();
        for key in statuses.keys() {
            let (kind, name) = key;
            let path = kind.path(name);
            let generation = taken.get(key).copied();
            let word = here.get(&path).map(|here| match here {
                Here::Scope(why) => {
                    Word { generation, error: why.as_deref().map(shortened), state: None }
                }
                Here::Grant(state, why) => {
                    Word { generation, error: why.as_deref().map(shortened), state: Some(*state) }
                }
                Here::Wrong(error) => Word { error: Some(shortened(error)), ..Word::default() },
            });
            said.extend(word.map(|word| (path, word)));
        }
        let is_same = words.as_ref() == Some(&said);
        *words = Some(said);
        drop(state);
        if !is_same {
            self.reporting.notify_one();
        }
    }

    /// Takes the names of all nodes of the cluster; `None` where not all are known.
    pub fn see_nodes(&self, nodes: Option<BTreeSet<String>>) {
        let mut state = self.state();
        if state.nodes != nodes {
            state.nodes = nodes;
            drop(state);
            self.reporting.notify_one();
        }
    }

    /// What is to be written of the status of objects.
    pub(super) fn due(&self, node: &str, now: Timestamp) -> Vec<Due> {
        let state = self.state();
        let Some(words) = &state.words else { return Vec::new() };
        let due = state.statuses.iter().flat_map(|((kind, name), status)| {
            let word = words.get(&kind.path(name));
            let nodes = Nodes {
                cluster: state.nodes.as_ref(),
                watch: match kind {
                    ObjectKind::Scope | ObjectKind::ClusterGrant => Watchers::All,
                    ObjectKind::Grant => Watchers::Concerned,
                },
            };
            let due = status.due(node, word, nodes, now);
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

    /// Takes what was seen of the status of objects.
    fn see_status(&self, watched: &Watched, seen: Seen<ObjectStatus>) {
        let kind = watched.kind();
        let mut state = self.state();
        if state.is_over(watched) {
            return;
        }
        match seen {
            Seen::Lost(_) => return,
            Seen::Whole(all, _) => {
                state.statuses.retain(|(kind, name), _| !watched.has(*kind, name));
                let all = all.into_iter();
                state.statuses.extend(all.map(|(name, status)| ((kind, name), status)));
            }
            Seen::Put(name, status) => drop(state.statuses.insert((kind, name), status)),
            Seen::Gone(name) | Seen::NoRoom(name, _) => drop(state.statuses.remove(&(kind, name))),
        }
        drop(state);
        self.reporting.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what was seen of objects.
    pub fn see(&self, watched: &Watched, seen: Seen<Object>) {
        let mut state = self.state();
        if state.is_over(watched) {
            return;
        }
        let State { objects, listed, lost, left_out, .. } = &mut *state;
        let own = objects.entry(watched.clone()).or_default();
        // A status that somebody wrote changes nothing that is said.
        let is_same = match seen {
            Seen::Lost(loss) => {
                let error = loss.error.clone();
                if lost.note(watched.clone(), loss) {
                    tracing::warn!(
                        error,
                        objects = watched.told(),
                        "the API server does not answer; what was known stays"
                    );
                }
                return;
            }
            Seen::Whole(all, without) => {
                without.note(left_out, watched.clone(), &watched.told(), WITHOUT_ROOM);
                let is_same = !listed.insert(watched.clone()) && *own == all;
                *own = all;
                is_same
            }
            Seen::Put(name, object) => {
                let is_same = own.get(&name) == Some(&object);
                own.insert(name, object);
                is_same
            }
            Seen::Gone(name) => own.remove(&name).is_none(),
            Seen::NoRoom(name, without) => {
                without.note(left_out, watched.clone(), &watched.told(), WITHOUT_ROOM);
                own.remove(&name).is_none()
            }
        };
        if lost.answered(watched) {
            tracing::info!(objects = watched.told(), "the API server answers again");
        }
        drop(state);
        if !is_same {
            self.changed.notify_one();
        }
    }
}

/// Fills `objects` for as long as the daemon runs.
pub async fn run(client: Client, objects: Arc<Objects>, bound: Bound) {
    let mut running: BTreeMap<Watched, AbortHandle> = BTreeMap::new();
    let mut watches = JoinSet::new();
    loop {
        let wanted = objects.watches(LINGER);
        running.retain(|watched, watch| {
            let is_wanted = wanted.contains(watched);
            if !is_wanted {
                watch.abort();
            }
            is_wanted
        });
        for watched in wanted {
            running.entry(watched.clone()).or_insert_with(|| {
                watches.spawn(watch(client.clone(), watched, Arc::clone(&objects), bound))
            });
        }
        tokio::select! {
            () = objects.moved.notified() => {}
            () = tokio::time::sleep(LOOK) => {}
            Some(watch) = watches.join_next() => ended(watch),
        }
    }
}

async fn watch(client: Client, watched: Watched, objects: Arc<Objects>, bound: Bound) {
    let api = watched.api(client);
    let kind = watched.kind();
    let sink = move |seen| {
        let (object, status) = parted(seen);
        objects.see_status(&watched, status);
        objects.see(&watched, object);
    };
    let keep = move |object: &DynamicObject| Some((keep(kind, object), status(object)));
    follow(api, everything(), bound, keep, sink).await;
}

impl Kept for (Object, ObjectStatus) {
    fn bytes(&self) -> usize {
        let (Object { text, created: _, namespace }, status) = self;
        text.len() + bytes_of_texts(namespace) + status.bytes()
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
        Seen::NoRoom(name, left_out) => {
            (Seen::NoRoom(name.clone(), left_out.clone()), Seen::NoRoom(name, left_out))
        }
        Seen::Whole(all, left_out) => {
            let (mut objects, mut statuses) = (BTreeMap::new(), BTreeMap::new());
            for (name, (object, status)) in all {
                objects.insert(name.clone(), object);
                statuses.insert(name, status);
            }
            (Seen::Whole(objects, left_out.clone()), Seen::Whole(statuses, left_out))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn grants(namespace: &str) -> (Watched, Seen<Object>) {
        let object = Object {
            text: b"{}".as_slice().into(),
            created: Timestamp::UNIX_EPOCH,
            namespace: Some(namespace.to_owned()),
        };
        let all = BTreeMap::from([(ObjectName::new(namespace, "g"), object)]);
        (Watched::Grants(namespace.to_owned()), Seen::Whole(all, LeftOut::default()))
    }

    fn names(objects: &Objects) -> Option<Vec<String>> {
        objects.known().map(|known| known.into_keys().collect())
    }

    #[test]
    fn grants_are_known_of_namespaces_that_concern_the_node_and_for_a_while_after() {
        let objects = Objects::default();
        let concern = |namespaces: &[&str]| {
            objects.concern(&namespaces.iter().map(|name| (*name).to_owned()).collect());
        };
        let see = |namespace: &str| {
            let (watched, seen) = grants(namespace);
            objects.see(&watched, seen);
        };
        for watched in [Watched::Scopes, Watched::ClusterGrants] {
            objects.see(&watched, Seen::Whole(BTreeMap::new(), LeftOut::default()));
        }
        // Where the pods are is not known yet.
        assert_eq!(names(&objects), None);
        concern(&["a", "b"]);
        see("a");
        assert_eq!(names(&objects), None, "what is missing is not taken for gone");
        see("b");
        assert_eq!(names(&objects).unwrap(), ["grant/a/g", "grant/b/g"]);
        // One that comes later holds nobody up.
        concern(&["b", "c"]);
        assert_eq!(names(&objects).unwrap(), ["grant/a/g", "grant/b/g"]);
        see("c");
        // Nobody is in a; what is said of it counts until it is not watched any more.
        let all = Duration::from_secs(3600);
        assert_eq!(objects.watches(all).len(), 5);
        assert_eq!(names(&objects).unwrap().len(), 3);
        let [scopes, cluster_grants] = [Watched::Scopes, Watched::ClusterGrants];
        let of = |namespace: &str| Watched::Grants(namespace.to_owned());
        let left = BTreeSet::from([scopes, cluster_grants, of("b"), of("c")]);
        assert_eq!(objects.watches(Duration::ZERO), left);
        assert_eq!(names(&objects).unwrap(), ["grant/b/g", "grant/c/g"]);
        // The watch may have had something to say yet.
        see("a");
        assert_eq!(names(&objects).unwrap(), ["grant/b/g", "grant/c/g"]);
    }

    #[test]
    fn the_generation_that_is_said_to_count_is_the_one_that_was_taken() {
        let objects = Objects::default();
        let scopes = Watched::Scopes;
        let name = ObjectName::new("", "git");
        let come = |generation| {
            let status = ObjectStatus::read(generation, &json!({}));
            objects.see_status(&scopes, Seen::Put(name.clone(), status));
            let object = Object {
                text: generation.to_string().into_bytes().into(),
                created: Timestamp::UNIX_EPOCH,
                namespace: None,
            };
            let all = BTreeMap::from([(name.clone(), object)]);
            objects.see(&scopes, Seen::Whole(all, LeftOut::default()));
        };
        let said = || {
            objects.say(&BTreeMap::from([("scope/git".to_owned(), Here::Scope(None))]));
            objects.state().words.as_ref().unwrap()["scope/git"].generation
        };
        objects.concern(&BTreeSet::new());
        come(1);
        let due = || objects.due("one", Timestamp::UNIX_EPOCH).len();
        assert_eq!(due(), 0, "before anything was said, nothing is taken back");
        assert!(objects.take().is_none(), "not all is listed");
        assert_eq!(said(), None, "what counts is what an earlier daemon was told");
        objects.see(&Watched::ClusterGrants, Seen::Whole(BTreeMap::new(), LeftOut::default()));
        assert!(objects.take().is_some());
        assert_eq!(said(), Some(1));
        come(2);
        assert_eq!(said(), Some(1), "nobody has taken the next one");
        assert!(objects.take().is_some());
        assert_eq!(said(), Some(2));
        assert_eq!(due(), 1);
    }
}
