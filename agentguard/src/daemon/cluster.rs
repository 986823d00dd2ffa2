//! The Kubernetes cluster around this node: its watches, and what is known of it across restarts.
//!
//! What was last known is written down, so that a start during an outage of the API server permits
//! what was permitted and reserves what was reserved. Where nothing was ever known, nothing wider
//! than one address is permitted until the API server has answered.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc, watch as latest};
use tokio::task::JoinSet;

use super::containers::{Cluster as OfNode, Containers};
use super::custom_resources::CustomResources;
use super::engine::Engine;
use super::service::Shared;
use super::state::replace;
use crate::config::Configuration;
use crate::config::value::KubernetesAccess;
use crate::grant::store::{Phase, Source};
use crate::identity::SpiffeId;
use crate::identity::pod::{Pod, PodUid};
use crate::kubernetes::events::{self, PodDenial};
use crate::kubernetes::manifests::{self, Here, ObjectKind, Objects};
use crate::kubernetes::pods::{self, NodePods, PodFeed};
use crate::kubernetes::services::{self, Feed};
use crate::kubernetes::status;
use crate::kubernetes::watch::Bound;
use crate::kubernetes::{AccessError, connect};
use crate::scope::cluster::{
    Cluster, ClusterView, Endpoints, NodeAddresses, ObjectName, PodAddresses, Service,
};
use crate::scope::selector::Labels;

/// The name of the file in the state directory.
const FILE: &str = "cluster.json";
/// The version of the shape below.
const VERSION: u32 = 1;
/// Changes that come together are taken together.
const SETTLE: Duration = Duration::from_millis(50);
/// How often the view is written down at most.
const SAVE: Duration = Duration::from_secs(10);
/// How long a first start waits for the API server, so that it need not deny first.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// Denials that wait to be told as events.
const WAITING_EVENTS: usize = 256;
/// How often it is looked at what is to be said of objects.
const REPORT: Duration = Duration::from_secs(1);
/// How often a way to the API server is looked for.
const LOOK: Duration = Duration::from_secs(5);

/// The watches of the API server, and what they fill.
pub struct Watches {
    pub feed: Arc<Feed>,
    pub objects: Arc<Objects>,
    /// This node's pods.
    pub pods: Arc<PodFeed>,
    /// What was known before.
    pub known: Cluster,
    known_pods: Option<NodePods>,
    /// Where denials are told that become events of pods, if they do.
    pub denials: Option<mpsc::Sender<PodDenial>>,
    tasks: JoinSet<()>,
}

/// Begins to watch, if that is configured. On a first start it waits for the API server, for a while.
pub async fn begin(configuration: &Configuration, node: String) -> Option<Watches> {
    if configuration.kubernetes.access == KubernetesAccess::Off {
        return None;
    }
    let known = match load(configuration.state_directory.as_ref()) {
        Ok(view) => view.map_or(Cluster::Unknown, |view| Cluster::Known(Arc::new(view))),
        Err(error) => {
            tracing::error!(%error, "what was known of the cluster is not known any more");
            Cluster::Unknown
        }
    };
    let known_pods = node_pods::load(configuration.state_directory.as_ref());
    let known_pods = known_pods.unwrap_or_else(|error| {
        tracing::error!(%error, "what was known of this node's pods is not known any more");
        None
    });
    let mut watches = Watches {
        feed: Arc::default(),
        objects: Arc::default(),
        pods: Arc::default(),
        known,
        known_pods,
        denials: None,
        tasks: JoinSet::new(),
    };
    let (tell, told) = mpsc::channel(WAITING_EVENTS);
    if configuration.kubernetes.events {
        watches.denials = Some(tell);
    }
    let access = configuration.kubernetes.access.clone();
    let bound = Bound::new(configuration.kubernetes.max_kind_bytes.get() as usize);
    let (feed, objects, pods) =
        (Arc::clone(&watches.feed), Arc::clone(&watches.objects), Arc::clone(&watches.pods));
    watches.tasks.spawn(watch(access, node, bound, feed, objects, pods, told));
    if matches!(watches.known, Cluster::Unknown) {
        let answers =
            tokio::time::timeout(FIRST_ANSWER, watches.first_answers(configuration)).await;
        if answers.is_err() {
            let until = match watches.known {
                Cluster::Unknown => "scopes permit single addresses only",
                Cluster::Known(_) | Cluster::Outside => {
                    "agents have what manifests of the node give them, and no grants of the cluster"
                }
            };
            tracing::warn!(until, "the API server has not told everything that a start waits for");
        }
    }
    if let Some(pods) = &watches.known_pods {
        watches.objects.concern(&namespaces(configuration, pods));
    }
    Some(watches)
}

/// Whose grants concern this node: the namespaces of its pods, agents and others, since one becomes an
/// agent by a label, and is not to be denied for as long as a list takes.
fn namespaces(configuration: &Configuration, pods: &NodePods) -> BTreeSet<String> {
    let exempt = &configuration.containers.exempt_namespaces;
    let namespaces = pods.pods.values().map(|pod| &pod.namespace);
    namespaces.filter(|namespace| !exempt.contains(*namespace)).cloned().collect()
}

impl Watches {
    /// Waits for the first answers, and keeps each that comes.
    async fn first_answers(&mut self, configuration: &Configuration) {
        let view = first(&self.feed).await;
        self.objects.see_nodes(self.feed.nodes(&view));
        self.known = Cluster::Known(Arc::new(view));
        let pods = loop {
            if let Some(pods) = self.pods.take() {
                break pods;
            }
            self.pods.changed().await;
        };
        self.objects.concern(&namespaces(configuration, &pods));
        self.known_pods = Some(pods);
        while self.objects.known().is_none() {
            self.objects.changed().await;
        }
    }

    /// The grant source that the objects are.
    #[must_use]
    pub fn custom_resources(&self, shared: &Shared) -> CustomResources {
        let template = shared.configuration.containers.identity.get().clone();
        let trust_domain = shared.configuration.trust_domain.to_string();
        CustomResources::new(Arc::clone(&self.objects), template, trust_domain)
    }

    /// Tells of this node's pods what is known, and that more is to come.
    pub fn introduce(&self, containers: &Containers) {
        containers.expect_cluster();
        if let Some(pods) = self.known_pods.clone() {
            containers.set_cluster(of_node(pods));
        }
    }

    /// What says how the watches do.
    #[must_use]
    pub fn health(&self) -> Health {
        Health {
            feed: Arc::clone(&self.feed),
            objects: Arc::clone(&self.objects),
            pods: Arc::clone(&self.pods),
        }
    }
}

/// How the watches do.
pub struct Health {
    feed: Arc<Feed>,
    objects: Arc<Objects>,
    pods: Arc<PodFeed>,
}

impl Health {
    /// How many objects found no room in what is kept of them.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.feed.left_out() + self.objects.left_out() + self.pods.left_out()
    }

    /// What can not be watched at present, and what found no room, one sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        [self.feed.problems(), self.objects.problems(), self.pods.problems()].concat()
    }
}

async fn first(feed: &Feed) -> ClusterView {
    loop {
        feed.changed().await;
        if let Some(view) = feed.take() {
            return view;
        }
    }
}

async fn watch(
    access: KubernetesAccess,
    node: String,
    bound: Bound,
    feed: Arc<Feed>,
    objects: Arc<Objects>,
    pods: Arc<PodFeed>,
    denials: mpsc::Receiver<PodDenial>,
) {
    let mut told = None;
    let client = loop {
        match connect(&access).await {
            Ok(Some(client)) => break client,
            Ok(None) => return,
            // A token or a kubeconfig may come later than the daemon.
            Err(error) => tell(&mut told, &error),
        }
        tokio::time::sleep(LOOK).await;
    };
    tokio::join!(
        services::run(client.clone(), feed, bound),
        manifests::run(client.clone(), Arc::clone(&objects), bound),
        pods::run(client.clone(), node.clone(), pods, bound),
        status::run(client.clone(), node.clone(), objects),
        events::run(client, node, denials),
    );
}

/// Tells of the denials among the lines of the audit log. One that nobody takes in time is told by the
/// log alone.
pub async fn tell_pods(denials: mpsc::Sender<PodDenial>, mut lines: broadcast::Receiver<Arc<str>>) {
    loop {
        match lines.recv().await {
            Ok(line) => {
                if let Some(denial) = PodDenial::of_line(&line) {
                    let _full = denials.try_send(denial);
                }
            }
            Err(broadcast::error::RecvError::Lagged(_missed)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

fn tell(told: &mut Option<String>, error: &AccessError) {
    let text = error.to_string();
    if told.as_ref() != Some(&text) {
        tracing::error!(error = text, "the cluster is not watched; what was known stays");
        *told = Some(text);
    }
}

/// Says of each object that concerns this node whether it is in force here, for as long as the
/// daemon runs.
pub async fn report(shared: Arc<Shared>, objects: Arc<Objects>) {
    let mut interval = tokio::time::interval(REPORT);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let (shared, objects) = (Arc::clone(&shared), Arc::clone(&objects));
        let work = tokio::task::spawn_blocking(move || {
            let words = words(&shared.engine());
            objects.say(&words);
        });
        if let Err(error) = work.await {
            tracing::error!(%error, "the status of objects is not told");
        }
    }
}

/// The objects that concern this node: the grants of its workloads, the scopes that those in force
/// name, and what is wrong.
fn words(engine: &Engine) -> BTreeMap<String, Here> {
    let mut words = BTreeMap::new();
    let now = Timestamp::now();
    let identities: BTreeSet<&SpiffeId> =
        engine.workloads().filter_map(|workload| workload.identity.as_ref()).collect();
    // Few, if any.
    let unfit: Vec<(&SpiffeId, String)> = engine
        .workloads()
        .filter_map(|workload| Some((workload.identity.as_ref()?, engine.unfit_of(workload)?)))
        .collect();
    for stored in engine.store.grants().filter(|stored| stored.source == Source::Manifest) {
        let grant = &stored.document;
        if !identities.iter().any(|identity| grant.subject.matches(identity)) {
            continue;
        }
        let (kind, name) = match grant.id.parts() {
            (Some(namespace), name) => (ObjectKind::Grant, ObjectName::new(namespace, name)),
            (None, name) => (ObjectKind::ClusterGrant, ObjectName::new("", name)),
        };
        let phase = Phase::from(&engine.store.state_of(stored, now));
        let of_grant = unfit.iter().find(|(identity, _)| grant.subject.matches(identity));
        let why = engine.not_in_force().or(of_grant.map(|(_, why)| why.as_str()));
        let why = why.map(str::to_owned);
        words.insert(kind.path(&name), Here::Grant(phase, why.clone()));
        if phase == Phase::Active {
            let scopes =
                grant.scopes.iter().filter_map(|scope| engine.manifests.catalogue.get(scope));
            for scope in scopes {
                let path = ObjectKind::Scope.path(&ObjectName::new("", scope.name.as_str()));
                // What one grant of it lacks is said, whatever is in force for others.
                if why.is_some() || !words.contains_key(&path) {
                    words.insert(path, Here::Scope(why.clone()));
                }
            }
        }
    }
    for error in &engine.manifests.errors {
        if ObjectKind::of_path(&error.file).is_some() {
            words.insert(error.file.clone(), Here::Wrong(error.to_string()));
        }
    }
    words
}

/// Brings the engine what has changed in the cluster, for as long as the daemon runs.
pub async fn follow(shared: Arc<Shared>, mut watches: Watches) {
    // What was waited for is not written down yet; writing what was read again does no harm.
    let view = match &watches.known {
        Cluster::Known(view) => Some(Arc::clone(view)),
        Cluster::Outside | Cluster::Unknown => None,
    };
    let (views, mut newest_view) = latest::channel(view);
    let (pods, mut newest_pods) = latest::channel(watches.known_pods.take().map(Arc::new));
    newest_view.mark_changed();
    newest_pods.mark_changed();
    let directory = shared.configuration.state_directory.to_path_buf();
    let mut writers = JoinSet::new();
    writers.spawn(write_down(newest_view, directory.clone(), "the cluster", SAVE, save));
    writers.spawn(write_down(newest_pods, directory, "this node's pods", SETTLE, node_pods::save));
    loop {
        tokio::select! {
            () = watches.feed.changed() => tokio::time::sleep(SETTLE).await,
            () = watches.pods.changed() => {
                if let Some(of_node) = watches.pods.take() {
                    shared.containers.set_cluster(self::of_node(of_node.clone()));
                    watches.objects.concern(&namespaces(&shared.configuration, &of_node));
                    pods.send_replace(Some(Arc::new(of_node)));
                }
                continue;
            }
            ended = watches.tasks.join_next() => {
                tracing::error!(?ended, "the cluster is not watched any more; what was known stays");
                if let Some(Err(error)) = ended
                    && error.is_panic()
                {
                    std::panic::resume_unwind(error.into_panic());
                }
                return;
            }
        }
        let Some(view) = watches.feed.take() else { continue };
        watches.objects.see_nodes(watches.feed.nodes(&view));
        let view = Arc::new(view);
        views.send_replace(Some(Arc::clone(&view)));
        let shared = Arc::clone(&shared);
        let work = tokio::task::spawn_blocking(move || {
            shared.engine().set_cluster(Cluster::Known(view));
        });
        if let Err(error) = work.await {
            tracing::error!(%error, "what changed in the cluster is not in force; trying again with the next change");
        }
    }
}

/// Writes down what is newest, with a pause after each time. Beside what comes into force: that must
/// not wait for the disk.
async fn write_down<T: Send + Sync + 'static>(
    mut newest: latest::Receiver<Option<Arc<T>>>,
    directory: PathBuf,
    what: &'static str,
    pause: Duration,
    write: fn(&Path, &T) -> Result<(), ClusterFileError>,
) {
    while newest.changed().await.is_ok() {
        let Some(value) = newest.borrow_and_update().clone() else { continue };
        let directory = directory.clone();
        let work = tokio::task::spawn_blocking(move || write(&directory, &value));
        match work.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(%error, what, "a restart would not know what is known of it");
            }
            Err(error) => {
                tracing::error!(%error, what, "a restart would not know what is known of it");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

fn of_node(NodePods { pods, namespaces, lacks_namespaces }: NodePods) -> OfNode {
    OfNode { pods, namespaces, lacks_namespaces }
}

/// The file can not be used.
#[derive(Debug, thiserror::Error)]
pub enum ClusterFileError {
    #[error(
        "{path}, which says what was known of the cluster, can not be read: {source}; it is made anew when the API server answers"
    )]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} can not be written: {source}; free the disk or set state_directory")]
    Write { path: PathBuf, source: io::Error },
}

/// The endpoints that each object lists.
type ByObject = Vec<(String, Vec<Endpoints>)>;

/// As lists: JSON has text for keys only.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    services: Vec<(ObjectName, Service)>,
    endpoints: Vec<(ObjectName, ByObject)>,
    pods: Vec<(ObjectName, PodAddresses)>,
    namespaces: Vec<(String, Labels)>,
    nodes: Vec<(String, NodeAddresses)>,
    /// Earlier versions knew no bound.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    left_out: BTreeSet<IpNet>,
}

/// Reads what an earlier daemon knew; nothing if it knew nothing.
fn load(directory: &Path) -> Result<Option<ClusterView>, ClusterFileError> {
    let path = directory.join(FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ClusterFileError::Read { path, source }),
    };
    let Saved { version, services, endpoints, pods, namespaces, nodes, left_out } =
        match serde_json::from_slice(&text) {
            Ok(saved) => saved,
            Err(error) => return Err(ClusterFileError::Read { path, source: error.into() }),
        };
    if version != VERSION {
        let other = format!("it has version {version}, and this agentguard reads {VERSION}");
        return Err(ClusterFileError::Read { path, source: io::Error::other(other) });
    }
    let endpoints =
        endpoints.into_iter().map(|(service, objects)| (service, objects.into_iter().collect()));
    Ok(Some(ClusterView {
        services: services.into_iter().collect(),
        endpoints: endpoints.collect(),
        pods: pods.into_iter().collect(),
        namespaces: namespaces.into_iter().collect(),
        nodes: nodes.into_iter().collect(),
        left_out,
    }))
}

fn save(directory: &Path, view: &ClusterView) -> Result<(), ClusterFileError> {
    fn list<K: Clone, V: Clone>(map: &BTreeMap<K, V>) -> Vec<(K, V)> {
        map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
    }
    let ClusterView { services, endpoints, pods, namespaces, nodes, left_out } = view;
    let endpoints = endpoints.iter().map(|(service, objects)| (service.clone(), list(objects)));
    let saved = Saved {
        version: VERSION,
        services: list(services),
        endpoints: endpoints.collect(),
        pods: list(pods),
        namespaces: list(namespaces),
        nodes: list(nodes),
        left_out: left_out.clone(),
    };
    let path = directory.join(FILE);
    serde_json::to_vec(&saved)
        .map_err(io::Error::from)
        .and_then(|text| replace(&path, &text, || {}))
        .map_err(|source| ClusterFileError::Write { path, source })
}

/// Removes the file.
///
/// # Errors
///
/// When it is there and stays.
pub fn remove(directory: &Path) -> io::Result<bool> {
    let pods = super::state::remove_file(&directory.join(node_pods::FILE))?;
    Ok(super::state::remove_file(&directory.join(FILE))? || pods)
}

/// This node's pods as they are written down.
mod node_pods {
    use super::*;

    /// The name of the file in the state directory.
    pub const FILE: &str = "pods.json";

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Saved {
        version: u32,
        pods: Vec<SavedPod>,
        namespaces: Vec<(String, Labels)>,
        /// Earlier versions knew no bound.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        lacks_namespaces: bool,
    }

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct SavedPod {
        uid: String,
        namespace: String,
        name: String,
        service_account: Option<String>,
        labels: Labels,
        host_network: bool,
        runtime_class: Option<String>,
    }

    impl SavedPod {
        fn restore(self) -> Option<Pod> {
            let Self { uid, namespace, name, service_account, labels, host_network, runtime_class } =
                self;
            let uid = PodUid::new(&uid)?;
            Some(Pod { uid, namespace, name, service_account, labels, host_network, runtime_class })
        }
    }

    impl From<&Pod> for SavedPod {
        fn from(pod: &Pod) -> Self {
            let Pod { uid, namespace, name, service_account, labels, host_network, runtime_class } =
                pod;
            Self {
                uid: uid.as_str().to_owned(),
                namespace: namespace.clone(),
                name: name.clone(),
                service_account: service_account.clone(),
                labels: labels.clone(),
                host_network: *host_network,
                runtime_class: runtime_class.clone(),
            }
        }
    }

    /// Reads what an earlier daemon knew; nothing if it knew nothing.
    pub fn load(directory: &Path) -> Result<Option<NodePods>, ClusterFileError> {
        let path = directory.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ClusterFileError::Read { path, source }),
        };
        let Saved { version, pods, namespaces, lacks_namespaces } =
            match serde_json::from_slice(&text) {
                Ok(saved) => saved,
                Err(error) => return Err(ClusterFileError::Read { path, source: error.into() }),
            };
        if version != VERSION {
            let other = format!("it has version {version}, and this agentguard reads {VERSION}");
            return Err(ClusterFileError::Read { path, source: io::Error::other(other) });
        }
        let pods = pods.into_iter().filter_map(SavedPod::restore);
        Ok(Some(NodePods {
            pods: pods.map(|pod| (pod.uid.clone(), pod)).collect(),
            namespaces: namespaces.into_iter().collect(),
            lacks_namespaces,
        }))
    }

    pub fn save(directory: &Path, known: &NodePods) -> Result<(), ClusterFileError> {
        let NodePods { pods, namespaces, lacks_namespaces } = known;
        let saved = Saved {
            version: VERSION,
            pods: pods.values().map(SavedPod::from).collect(),
            namespaces: namespaces.iter().map(|(n, labels)| (n.clone(), labels.clone())).collect(),
            lacks_namespaces: *lacks_namespaces,
        };
        let path = directory.join(FILE);
        serde_json::to_vec(&saved)
            .map_err(io::Error::from)
            .and_then(|text| replace(&path, &text, || {}))
            .map_err(|source| ClusterFileError::Write { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::cluster::{PodNetwork, PortProtocol, ServicePort};

    #[test]
    fn what_was_known_is_known_again_and_what_is_damaged_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        assert!(load(directory.path()).unwrap().is_none());
        let name = ObjectName::new("a", "b");
        let address = "10.0.0.1".parse().unwrap();
        let port = ServicePort { name: "http".to_owned(), protocol: PortProtocol::Udp, port: 53 };
        let mut view = ClusterView::default();
        let service = Service {
            cluster_addresses: vec![address],
            external_addresses: vec!["2001:db8::1".parse().unwrap()],
            ports: vec![port.clone()],
        };
        view.services.insert(name.clone(), service);
        let endpoints = Endpoints { addresses: vec![address], ports: vec![port] };
        view.endpoints.entry(name.clone()).or_default().insert("x".to_owned(), vec![endpoints]);
        let labels = Labels::from([("k".to_owned(), "v".to_owned())]);
        let pod = PodAddresses {
            addresses: vec![address],
            labels: labels.clone(),
            network: PodNetwork::Host,
        };
        view.pods.insert(name, pod);
        view.namespaces.insert("a".to_owned(), labels);
        let node = NodeAddresses {
            addresses: vec![address],
            pod_blocks: vec!["10.0.0.0/24".parse().unwrap()],
        };
        view.nodes.insert("n".to_owned(), node);
        view.left_out.insert("10.1.0.0/16".parse().unwrap());
        save(directory.path(), &view).unwrap();
        assert_eq!(load(directory.path()).unwrap(), Some(view));
        for damaged in ["", "{", r#"{"version":2}"#] {
            fs::write(directory.path().join(FILE), damaged).unwrap();
            assert!(matches!(load(directory.path()), Err(ClusterFileError::Read { .. })));
        }
        assert!(remove(directory.path()).unwrap());
    }

    #[test]
    fn this_nodes_pods_are_known_again() {
        let directory = tempfile::tempdir().unwrap();
        assert!(node_pods::load(directory.path()).unwrap().is_none());
        let uid = PodUid::new("2f6c").unwrap();
        let labels = Labels::from([("k".to_owned(), "v".to_owned())]);
        let pod = Pod {
            uid: uid.clone(),
            namespace: "agents".to_owned(),
            name: "a".to_owned(),
            service_account: Some("researcher".to_owned()),
            labels: labels.clone(),
            host_network: true,
            runtime_class: Some("gvisor".to_owned()),
        };
        let known = NodePods {
            pods: [(uid, pod)].into(),
            namespaces: [("agents".to_owned(), labels)].into(),
            lacks_namespaces: true,
        };
        node_pods::save(directory.path(), &known).unwrap();
        assert_eq!(node_pods::load(directory.path()).unwrap(), Some(known));
    }
}
