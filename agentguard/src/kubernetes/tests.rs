//! The watches against an API server in this process: it lists, it streams changes, it goes away
//! and comes back.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use futures_util::stream;
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch as version;
use tokio::task::JoinHandle;

use super::events::{self, PodDenial};
use super::manifests::{self, Objects};
use super::pods::{self, PodFeed};
use super::services::{self, Feed};
use super::watch::Bound;
use crate::identity::pod::PodUid;
use crate::scope::cluster::{ClusterView, ObjectName, PodNetwork};

const EVENTS: &str = "/apis/events.k8s.io/v1/namespaces/agents/events";
const GRANTS: &str = "/apis/agentguard.dev/v1alpha1/namespaces/agents/grants";
const OTHER_GRANTS: &str = "/apis/agentguard.dev/v1alpha1/namespaces/tools/grants";
/// Room for all there is.
const ROOMY: Bound = Bound::new(1 << 20);
/// In force after a change, at the latest.
const IN_FORCE: Duration = Duration::from_secs(1);
/// Longer than any pause before the API server is asked again.
const AT_LAST: Duration = Duration::from_secs(40);

/// What the API server holds, kind by kind.
struct World {
    kinds: BTreeMap<String, Kind>,
    version: u64,
    changed: version::Sender<u64>,
}

#[derive(Default)]
struct Kind {
    objects: BTreeMap<String, Value>,
    /// The version, what happened, and to what.
    events: Vec<(u64, &'static str, Value)>,
}

type Shared = Arc<Mutex<World>>;

/// An API server of this process.
struct Server {
    world: Shared,
    address: SocketAddr,
    task: Option<JoinHandle<()>>,
}

impl Server {
    async fn start(has_slices: bool) -> Self {
        let mut paths = vec![
            "/api/v1/services",
            "/api/v1/pods",
            "/api/v1/namespaces",
            "/api/v1/nodes",
            "/apis/agentguard.dev/v1alpha1/scopes",
            GRANTS,
            OTHER_GRANTS,
            "/apis/agentguard.dev/v1alpha1/clustergrants",
            EVENTS,
        ];
        paths.push(if has_slices {
            "/apis/discovery.k8s.io/v1/endpointslices"
        } else {
            "/api/v1/endpoints"
        });
        let kinds = paths.into_iter().map(|path| (path.to_owned(), Kind::default())).collect();
        let world = World { kinds, version: 1, changed: version::Sender::new(1) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = Self { world: Arc::new(Mutex::new(world)), address, task: None };
        server.serve(listener);
        server
    }

    fn serve(&mut self, listener: TcpListener) {
        let made = axum::routing::get(answer).post(make);
        let router = Router::new().fallback(made).with_state(Arc::clone(&self.world));
        self.task = Some(tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }));
    }

    /// Ends every connection, and takes no new one.
    async fn go_away(&mut self) {
        let task = self.task.take().unwrap();
        task.abort();
        drop(task.await);
        // Streams that are being served end with the next version, which is none.
        self.world.lock().unwrap().changed.send_replace(0);
    }

    async fn come_back(&mut self) {
        let until = Instant::now() + Duration::from_secs(10);
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        {
            let world = self.world.lock().unwrap();
            world.changed.send_replace(world.version);
        }
        self.serve(listener);
    }

    fn client(&self) -> Client {
        let url = format!("http://{}", self.address).parse().unwrap();
        Client::try_from(Config::new(url)).unwrap()
    }

    fn put(&self, path: &str, mut object: Value) {
        let mut world = self.world.lock().unwrap();
        world.version += 1;
        let version = world.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let kind = world.kinds.get_mut(path).unwrap();
        let earlier = kind.objects.insert(key(&object), object.clone());
        kind.events.push((version, if earlier.is_some() { "MODIFIED" } else { "ADDED" }, object));
        world.announce();
    }

    fn delete(&self, path: &str, key: &str) {
        let mut world = self.world.lock().unwrap();
        world.version += 1;
        let version = world.version;
        let kind = world.kinds.get_mut(path).unwrap();
        let mut object = kind.objects.remove(key).unwrap();
        object["metadata"]["resourceVersion"] = version.to_string().into();
        kind.events.push((version, "DELETED", object));
        world.announce();
    }
}

impl World {
    /// While nobody serves, nobody is told.
    fn announce(&self) {
        let version = self.version;
        self.changed.send_if_modified(|told| {
            let is_served = *told != 0;
            if is_served {
                *told = version;
            }
            is_served
        });
    }
}

fn key(object: &Value) -> String {
    let metadata = &object["metadata"];
    let namespace = metadata["namespace"].as_str().unwrap_or_default();
    format!("{namespace}/{}", metadata["name"].as_str().unwrap())
}

/// Takes an object that is made in a namespace.
async fn make(State(world): State<Shared>, uri: Uri, Json(object): Json<Value>) -> Response {
    let mut world = world.lock().unwrap();
    let Some(kind) = world.kinds.get_mut(uri.path()) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    kind.objects.insert(key(&object), object.clone());
    (StatusCode::CREATED, Json(object)).into_response()
}

async fn answer(
    State(world): State<Shared>,
    Query(query): Query<BTreeMap<String, String>>,
    uri: Uri,
) -> Response {
    let locked = world.lock().unwrap();
    let path = uri.path().to_owned();
    if path == "/apis/discovery.k8s.io/v1"
        && locked.kinds.keys().any(|kind| kind.starts_with(&path))
    {
        return Json(json!({
            "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "discovery.k8s.io/v1",
            "resources": [{"name": "endpointslices", "singularName": "", "namespaced": true,
                "kind": "EndpointSlice", "verbs": ["list", "watch"]}],
        }))
        .into_response();
    }
    let version = locked.version;
    if *locked.changed.borrow() == 0 {
        // A connection from before the outage.
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let Some(kind) = locked.kinds.get(&path) else {
        let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
            "message": "not found", "reason": "NotFound", "code": 404});
        return (StatusCode::NOT_FOUND, Json(status)).into_response();
    };
    if !query.contains_key("watch") {
        let selected = |object: &&Value| match query.get("fieldSelector") {
            None => true,
            Some(selector) => {
                let node = selector.strip_prefix("spec.nodeName=").unwrap();
                object["spec"]["nodeName"] == node
            }
        };
        let items: Vec<&Value> = kind.objects.values().filter(selected).collect();
        return Json(json!({"kind": "List", "apiVersion": "v1",
            "metadata": {"resourceVersion": version.to_string()}, "items": items}))
        .into_response();
    }
    let seen: u64 = query["resourceVersion"].parse().unwrap();
    let changes = locked.changed.subscribe();
    drop(locked);
    let events = stream::unfold(
        (world, path, seen, changes),
        |(world, path, seen, mut changes)| async move {
            loop {
                let is_served = *changes.borrow_and_update() != 0;
                let (lines, latest) = {
                    let locked = world.lock().unwrap();
                    let events =
                        locked.kinds[&path].events.iter().filter(|(version, ..)| *version > seen);
                    let lines: String = events
                        .map(|(_, what, object)| {
                            format!("{}\n", json!({"type": what, "object": object}))
                        })
                        .collect();
                    (lines, locked.version)
                };
                if !is_served {
                    return None;
                }
                if !lines.is_empty() {
                    return Some((Ok::<_, std::io::Error>(lines), (world, path, latest, changes)));
                }
                changes.changed().await.ok()?;
            }
        },
    );
    Body::from_stream(events).into_response()
}

async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, future).await {
        Ok(value) => value,
        Err(_elapsed) => panic!("not within {limit:?}: {what}"),
    }
}

/// The first view of which something holds.
async fn view(feed: &Feed, holds: impl Fn(&ClusterView) -> bool) -> ClusterView {
    loop {
        if let Some(view) = feed.take()
            && holds(&view)
        {
            return view;
        }
        feed.changed().await;
    }
}

fn service(address: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "tools", "name": "git"},
        "spec": {"clusterIP": address, "clusterIPs": [address],
            "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080}]}})
}

fn pod(name: &str, node: &str, address: &str, phase: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "tools", "name": name, "uid": format!("uid-{name}"),
            "labels": {"app": "git"}},
        "spec": {"nodeName": node, "serviceAccountName": "git", "containers": []},
        "status": {"phase": phase, "podIP": address, "podIPs": [{"ip": address}]}})
}

fn fill(server: &Server) {
    server.put("/api/v1/services", service("10.96.0.9"));
    server.put("/api/v1/pods", pod("git-1", "one", "10.244.1.5", "Running"));
    server.put("/api/v1/pods", pod("done", "one", "10.244.1.6", "Succeeded"));
    server.put(
        "/api/v1/namespaces",
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "tools",
                "labels": {"team": "a", "agentguard.dev/mode": "audit"}}}),
    );
    server.put(
        "/api/v1/nodes",
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": "198.51.100.3"},
                {"type": "Hostname", "address": "one"}]}}),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_view_follows_the_cluster_through_an_outage() {
    let mut server = Server::start(false).await;
    fill(&server);
    server.put(
        "/api/v1/endpoints",
        json!({"apiVersion": "v1", "kind": "Endpoints",
            "metadata": {"namespace": "tools", "name": "git"},
            "subsets": [{"addresses": [{"ip": "10.244.1.5"}],
                "notReadyAddresses": [{"ip": "10.244.1.7"}],
                "ports": [{"name": "http", "port": 8080}]}]}),
    );
    let feed = Arc::new(Feed::default());
    let watching = tokio::spawn(services::run(server.client(), Arc::clone(&feed), ROOMY));
    let first = within(AT_LAST, "the first view", view(&feed, |_| true)).await;
    let git = ObjectName::new("tools", "git");
    assert_eq!(
        first.services[&git].cluster_addresses,
        ["10.96.0.9".parse::<std::net::IpAddr>().unwrap()]
    );
    let endpoints = &first.endpoints[&git]["git"][0];
    assert_eq!((endpoints.addresses.len(), endpoints.ports[0].port), (2, 8080));
    let names: Vec<&str> = first.pods.keys().map(|name| name.name.as_str()).collect();
    assert_eq!(names, ["git-1"], "one that has ended has no address");
    assert_eq!(first.pods[&ObjectName::new("tools", "git-1")].network, PodNetwork::Own);
    assert_eq!(first.namespaces["tools"]["kubernetes.io/metadata.name"], "tools");
    assert_eq!(first.nodes["one"].addresses.len(), 1);
    assert_eq!(feed.problems(), [""; 0]);

    server.put("/api/v1/services", service("10.96.0.10"));
    let changed =
        |view: &ClusterView| view.services[&git].cluster_addresses[0].to_string() == "10.96.0.10";
    within(IN_FORCE, "a changed service", view(&feed, changed)).await;

    server.go_away().await;
    let told = async {
        while feed.problems().len() < 5 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(AT_LAST, "the outage is told", told).await;
    assert!(feed.take().is_none(), "an outage changes nothing");
    server.delete("/api/v1/pods", "tools/git-1");
    server.put("/api/v1/pods", pod("git-2", "two", "10.244.2.5", "Running"));
    server.come_back().await;
    let caught_up = |view: &ClusterView| {
        view.pods.keys().map(|name| name.name.as_str()).eq(["git-2"]) && changed(view)
    };
    within(AT_LAST, "what happened meanwhile", view(&feed, caught_up)).await;
    let mended = async {
        while !feed.problems().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(AT_LAST, "the outage is over", mended).await;
    watching.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoint_slices_are_taken_where_there_are_any() {
    let server = Server::start(true).await;
    fill(&server);
    let path = "/apis/discovery.k8s.io/v1/endpointslices";
    let slice = |name: &str, service: &str, address: &str| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"namespace": "tools", "name": name,
                "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": [{"addresses": [address]}],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]})
    };
    server.put(path, slice("git-a", "git", "10.244.1.5"));
    server.put(path, slice("git-b", "git", "10.244.2.5"));
    let feed = Arc::new(Feed::default());
    let watching = tokio::spawn(services::run(server.client(), Arc::clone(&feed), ROOMY));
    let git = ObjectName::new("tools", "git");
    let count = |count: usize| {
        let git = git.clone();
        move |view: &ClusterView| view.endpoints.get(&git).map_or(0, BTreeMap::len) == count
    };
    within(AT_LAST, "both slices", view(&feed, count(2))).await;
    server.delete(path, "tools/git-a");
    within(IN_FORCE, "one slice", view(&feed, count(1))).await;
    // One that is given to another service is not of the first any more.
    server.put(path, slice("git-b", "other", "10.244.2.5"));
    within(IN_FORCE, "no slice", view(&feed, count(0))).await;
    watching.abort();
}

fn assert_reserved(view: &ClusterView, address: &str) {
    let address: std::net::IpAddr = address.parse().unwrap();
    let reserved = view.reserved();
    assert!(reserved.iter().any(|block| block.contains(&address)), "{address}: {reserved:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_finds_no_room_is_said_and_stays_reserved_until_there_is_room() {
    let server = Server::start(false).await;
    fill(&server);
    server.delete("/api/v1/pods", "tools/done");
    let big = |name: &str, address: &str| {
        let mut pod = pod(name, "two", address, "Running");
        for label in 0..20 {
            pod["metadata"]["labels"][format!("label-{label}")] = "x".repeat(60).into();
        }
        pod
    };
    server.put("/api/v1/pods", big("a", "10.244.2.5"));
    server.put("/api/v1/pods", big("b", "10.244.2.6"));
    server.put("/api/v1/pods", pod("c", "two", "10.244.2.7", "Running"));
    let bound = Bound::new(4000).with_pause(Duration::from_millis(200));
    let feed = Arc::new(Feed::default());
    let watching = tokio::spawn(services::run(server.client(), Arc::clone(&feed), bound));
    let names = |view: &ClusterView| {
        view.pods.keys().map(|name| name.name.clone()).collect::<Vec<_>>().join(" ")
    };
    let is = |expected: &'static str| move |view: &ClusterView| names(view) == expected;
    let first = within(AT_LAST, "what there is room for", view(&feed, is("a c git-1"))).await;
    assert_reserved(&first, "10.244.2.6");
    assert_eq!(feed.left_out(), 1);
    let problems = feed.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    for word in ["1 pods of the cluster", "kubernetes.max_kind_bytes (4000)", "raise it"] {
        assert!(problems[0].contains(word), "{problems:?}");
    }
    // A new one takes the place of none, and one that has grown beyond the room is not what it was.
    server.put("/api/v1/pods", big("d", "10.244.2.8"));
    server.put("/api/v1/pods", big("git-1", "10.244.1.5"));
    let grown = within(IN_FORCE, "what has grown", view(&feed, is("a c"))).await;
    for address in ["10.244.2.6", "10.244.2.8", "10.244.1.5"] {
        assert_reserved(&grown, address);
    }
    assert_eq!(feed.left_out(), 3);
    // Once there is room, it is found without another word of the API server.
    server.delete("/api/v1/pods", "tools/a");
    server.delete("/api/v1/pods", "tools/d");
    server.put("/api/v1/pods", pod("git-1", "one", "10.244.1.5", "Running"));
    within(AT_LAST, "what was left out", view(&feed, is("b c git-1"))).await;
    assert_eq!((feed.left_out(), feed.problems()), (0, Vec::new()));
    watching.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_and_pods_follow_the_cluster() {
    let mut server = Server::start(false).await;
    fill(&server);
    server.put("/api/v1/pods", pod("elsewhere", "two", "10.244.2.9", "Running"));
    let scopes = "/apis/agentguard.dev/v1alpha1/scopes";
    let scope = |description: &str| {
        json!({"apiVersion": "agentguard.dev/v1alpha1", "kind": "Scope",
            "metadata": {"name": "git", "creationTimestamp": "2026-11-22T09:00:00Z",
                "labels": {"of": "somebody"}, "managedFields": [{"manager": "kubectl"}]},
            "spec": {"scope": "git:read", "description": description},
            "status": {"enforced": 3}})
    };
    server.put(scopes, scope("one"));
    let grant = |namespace: &str| {
        json!({"apiVersion": "agentguard.dev/v1alpha1", "kind": "Grant",
            "metadata": {"name": "git", "namespace": namespace,
                "creationTimestamp": "2026-11-22T09:00:00Z"}, "spec": {}})
    };
    server.put(GRANTS, grant("agents"));
    server.put(OTHER_GRANTS, grant("tools"));
    let objects = Arc::new(Objects::default());
    let concern = |namespaces: &[&str]| {
        objects.concern(&namespaces.iter().map(|name| (*name).to_owned()).collect());
    };
    let feed = Arc::new(PodFeed::default());
    let watching = tokio::spawn(manifests::run(server.client(), Arc::clone(&objects), ROOMY));
    let of_node =
        tokio::spawn(pods::run(server.client(), "one".to_owned(), Arc::clone(&feed), ROOMY));
    let told = |description: &'static str| {
        let objects = Arc::clone(&objects);
        async move {
            loop {
                if let Some(known) = objects.known()
                    && known.get("scope/git").is_some_and(|object| {
                        String::from_utf8_lossy(&object.text).contains(description)
                    })
                {
                    return known;
                }
                objects.changed().await;
            }
        }
    };
    // Before it is known where the pods are, it is not known what is whole.
    let nothing = tokio::time::timeout(Duration::from_millis(300), told("one")).await;
    assert!(nothing.is_err(), "{nothing:?}");
    concern(&["agents"]);
    let known = within(AT_LAST, "the first objects", told("one")).await;
    let names: Vec<&str> = known.keys().map(String::as_str).collect();
    assert_eq!(names, ["grant/agents/git", "scope/git"], "no other namespace concerns this node");
    let object = &known["scope/git"];
    let text = String::from_utf8_lossy(&object.text);
    for unknown_to_files in ["status", "managedFields", "labels", "creationTimestamp"] {
        assert!(!text.contains(unknown_to_files), "{text}");
    }
    assert_eq!(object.created.to_string(), "2026-11-22T09:00:00Z");
    server.put(scopes, scope("two"));
    within(IN_FORCE, "a changed scope", told("two")).await;
    concern(&["agents", "tools"]);
    let has_come = async {
        while !objects.known().is_some_and(|known| known.contains_key("grant/tools/git")) {
            objects.changed().await;
        }
    };
    within(IN_FORCE, "the grants of a namespace that a pod comes to", has_come).await;

    let pods = within(AT_LAST, "the pods of this node", async {
        loop {
            if let Some(pods) = feed.take() {
                return pods;
            }
            feed.changed().await;
        }
    })
    .await;
    let uids: Vec<&str> = pods.pods.keys().map(PodUid::as_str).collect();
    assert_eq!(uids, ["uid-done", "uid-git-1"]);
    let git = &pods.pods[&PodUid::new("uid-git-1").unwrap()];
    assert_eq!(git.service_account.as_deref(), Some("git"));
    let marks = [("agentguard.dev/mode".to_owned(), "audit".to_owned())];
    assert_eq!(pods.namespaces["tools"], marks.into(), "what marks agents, and nothing else");

    server.go_away().await;
    let outage = async {
        while objects.problems().len() < 4 || feed.problems().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(AT_LAST, "the outage is told", outage).await;
    assert!(objects.known().is_some_and(|known| known.contains_key("scope/git")));
    server.delete(scopes, "/git");
    server.come_back().await;
    let gone = async {
        while objects.known().is_some_and(|known| known.contains_key("scope/git")) {
            objects.changed().await;
        }
    };
    within(AT_LAST, "a scope that was deleted meanwhile", gone).await;
    watching.abort();
    of_node.abort();
}

#[tokio::test]
async fn a_denial_becomes_an_event_of_its_pod_once() {
    let server = Server::start(true).await;
    let (denials, told) = tokio::sync::mpsc::channel(16);
    let telling = tokio::spawn(events::run(server.client(), "one".to_owned(), told));
    let denial = |path: &str| {
        let line = json!({
            "kind": "verdict", "verdict": "deny", "refused": true, "reason": "not_granted",
            "request": {"action": "exec", "path": path},
            "workload": {
                "identity": "spiffe://example.org/ns/agents/sa/a",
                "pod": {"namespace": "agents", "name": "a", "uid": "u"},
            },
        });
        PodDenial::of_line(&line.to_string()).unwrap()
    };
    for path in ["/bin/a", "/bin/a", "/bin/b", "/bin/a"] {
        denials.send(denial(path)).await.unwrap();
    }
    drop(denials);
    within(AT_LAST, "all is told", telling).await.unwrap();
    let world = server.world.lock().unwrap();
    let made = &world.kinds[EVENTS].objects;
    let notes: Vec<&str> = made.values().map(|event| event["note"].as_str().unwrap()).collect();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes[0].starts_with("exec /bin/a was refused: not_granted"), "{notes:?}");
    for event in made.values() {
        assert_eq!(event["regarding"]["uid"], "u");
        assert_eq!(event["type"], "Warning");
        assert_eq!(event["reportingInstance"], "one");
    }
}
