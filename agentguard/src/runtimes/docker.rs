//! The Docker Engine, over its unix socket: containers without pods.
//!
//! What is new is inspected, since lists tell no process; a container that was started again has
//! another. What is asked for is the same in all versions of the API; requests name none, so that each
//! daemon answers in its own.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::errors::Error;
use bollard::models::{ContainerInspectResponse, ContainerSummary};
use bollard::query_parameters::{EventsOptions, ListContainersOptions};
use bollard::{API_DEFAULT_VERSION, Docker as Client};
use futures_util::StreamExt as _;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::changes::{Changes, Ended};
use super::{Listing, Runtime, RuntimeError, container_cgroup};
use crate::identity::ProcessRef;
use crate::identity::container::{Command, Container, cgroup_of};
use crate::identity::pod::Labels;

/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Containers that are inspected at the same time.
const AT_ONCE: usize = 16;
/// Changes after which the containers that run may be others.
const EVENTS: [&str; 5] = ["start", "die", "rename", "pause", "unpause"];

/// A client of the Docker daemon.
#[derive(Debug)]
pub struct Docker {
    socket: PathBuf,
    endpoint: String,
    client: Option<Client>,
    containers: BTreeMap<String, Facts>,
    changes: Changes,
}

/// What inspecting a container adds.
#[derive(Clone, Debug)]
struct Facts {
    process: ProcessRef,
    cgroup: PathBuf,
    command: Option<Command>,
    handler: String,
}

impl Docker {
    /// A client of the daemon that listens at `socket`; it connects when it is first asked.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            endpoint: socket.display().to_string(),
            client: None,
            containers: BTreeMap::new(),
            changes: Changes::default(),
        }
    }

    fn failed(&self, error: &Error) -> RuntimeError {
        let mut what = format!("does not answer: {error}");
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            what = format!("{what}: {error}");
            cause = error.source();
        }
        RuntimeError {
            endpoint: self.endpoint.clone(),
            what,
            remedy: "see that Docker runs and that containers.docker names its socket",
        }
    }

    async fn client(&mut self) -> Result<Client, RuntimeError> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        let path = self.socket.to_str().ok_or_else(|| RuntimeError {
            endpoint: self.endpoint.clone(),
            what: "has a path that is not UTF-8".to_owned(),
            remedy: "name another in containers.docker",
        })?;
        let client = Client::connect_with_unix(path, PATIENCE.as_secs(), API_DEFAULT_VERSION);
        let client = client.map_err(|error| self.failed(&error))?;
        let client = within(client.negotiate_version()).await;
        let client = client.map_err(|error| self.failed(&error))?;
        self.client = Some(client.clone());
        Ok(client)
    }

    fn follow_changes(&mut self, client: &Client) {
        let client = client.clone();
        self.changes.follow(|teller| async move {
            let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
            let filters = HashMap::from([
                ("type".to_owned(), words(&["container"])),
                ("event".to_owned(), words(&EVENTS)),
            ]);
            let options = EventsOptions { filters: Some(filters), ..EventsOptions::default() };
            let mut events = std::pin::pin!(client.events(Some(options)));
            while let Some(Ok(_event)) = events.next().await {
                teller.tell();
            }
            Ended::Broken
        });
    }
}

impl Runtime for Docker {
    fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn list(&mut self) -> Result<Listing, RuntimeError> {
        let client = self.client().await?;
        self.follow_changes(&client);
        // Those that run, paused ones among them.
        let listed = within(client.list_containers(Some(ListContainersOptions::default()))).await;
        let listed = listed.map_err(|error| {
            // It may be another version that answers next.
            self.client = None;
            self.failed(&error)
        })?;
        let listed: BTreeMap<String, ContainerSummary> =
            listed.into_iter().filter_map(|one| Some((one.id.clone()?, one))).collect();
        self.containers.retain(|id, facts| listed.contains_key(id) && facts.process.is_alive());

        let mut wanted = listed.keys().filter(|id| !self.containers.contains_key(*id)).cloned();
        let mut asked = JoinSet::new();
        let mut found = Vec::new();
        loop {
            while asked.len() < AT_ONCE
                && let Some(id) = wanted.next()
            {
                let client = client.clone();
                asked.spawn(async move {
                    let answer = within(client.inspect_container(&id, None)).await;
                    (id, answer)
                });
            }
            // None of them panics, and none is aborted.
            let Some(Ok((id, answer))) = asked.join_next().await else { break };
            match answer {
                Ok(inspected) => found.extend(facts(&id, inspected).map(|facts| (id, facts))),
                // It ended and was removed.
                Err(Error::DockerResponseServerError { status_code: 404, .. }) => {}
                Err(error) => return Err(self.failed(&error)),
            }
        }
        drop(wanted);
        self.containers.extend(found);

        let mut listing = Listing::default();
        for (id, summary) in listed {
            if let Some(facts) = self.containers.get(&id) {
                let container = container(id.clone(), summary, facts.clone());
                listing.containers.insert(id, container);
            }
        }
        Ok(listing)
    }

    async fn changed(&mut self) {
        self.changes.next().await;
    }
}

fn container(id: String, summary: ContainerSummary, facts: Facts) -> Container {
    let Facts { process, cgroup, command, handler } = facts;
    let names = summary.names.unwrap_or_default();
    let name = names.first().map(|name| name.trim_start_matches('/').to_owned());
    let labels: Labels = summary.labels.unwrap_or_default().into_iter().collect();
    Container {
        name: name.unwrap_or_else(|| id.clone()),
        id,
        sandbox: None,
        labels,
        handler,
        is_sandbox: false,
        cgroup,
        process,
        root: "/".into(),
        command,
    }
}

/// What is known of a container; `None` where it has no process.
fn facts(id: &str, inspected: ContainerInspectResponse) -> Option<Facts> {
    let pid = inspected.state?.pid?;
    let pid = u32::try_from(pid).ok().filter(|pid| *pid != 0)?;
    let env = inspected.config.and_then(|config| config.env).unwrap_or_default();
    let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH="));
    let command = inspected.path.map(|executable| Command {
        executable,
        search_path: path.unwrap_or(super::SEARCH_PATH).to_owned(),
    });
    let cgroup = container_cgroup(&cgroup_of(pid)?, id);
    // The engine names its default as well. One that is not told is held as any other.
    let handler = inspected.host_config.and_then(|config| config.runtime).unwrap_or_default();
    Some(Facts { process: ProcessRef::of(pid)?, cgroup, command, handler })
}

/// Makes one call, within a bound.
async fn within<T>(call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(PATIENCE, call).await.unwrap_or(Err(Error::RequestTimeoutError))
}

#[cfg(test)]
mod tests {
    use std::process::Command as Program;
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use axum::body::Body;
    use axum::extract::{Path as Parameter, State};
    use axum::http::StatusCode;
    use axum::response::{IntoResponse, Response};
    use axum::routing::get;
    use axum::{Json, Router};
    use serde_json::{Value, json};
    use tokio::net::UnixListener;
    use tokio::sync::broadcast;

    use super::*;

    /// A Docker daemon that answers what it is told to.
    struct Stub {
        /// By id: pid and labels.
        containers: Mutex<BTreeMap<String, (u32, Value)>>,
        inspected: Mutex<Vec<String>>,
        events: broadcast::Sender<String>,
    }

    impl Stub {
        fn serve(socket: &Path) -> Arc<Self> {
            let stub = Arc::new(Self {
                containers: Mutex::default(),
                inspected: Mutex::default(),
                events: broadcast::channel(8).0,
            });
            let version = || async { Json(json!({"ApiVersion": "1.41", "MinAPIVersion": "1.12"})) };
            let router = Router::new()
                .route("/version", get(version))
                .route("/containers/json", get(list))
                .route("/containers/{id}/json", get(inspect))
                .route("/events", get(events))
                .with_state(Arc::clone(&stub));
            let listener = UnixListener::bind(socket).unwrap();
            tokio::spawn(async move { axum::serve(listener, router).await });
            stub
        }

        fn run(&self, id: &str, pid: u32, labels: Value) {
            self.containers.lock().unwrap().insert(id.to_owned(), (pid, labels));
        }

        fn take_inspected(&self) -> Vec<String> {
            std::mem::take(&mut *self.inspected.lock().unwrap())
        }
    }

    async fn list(State(stub): State<Arc<Stub>>) -> Json<Value> {
        let containers = stub.containers.lock().unwrap();
        let list = containers.iter().map(|(id, (_, labels))| {
            json!({"Id": id, "Names": [format!("/{id}-name")], "Labels": labels, "State": "running"})
        });
        Json(list.collect())
    }

    async fn inspect(State(stub): State<Arc<Stub>>, Parameter(id): Parameter<String>) -> Response {
        stub.inspected.lock().unwrap().push(id.clone());
        let Some((pid, _)) = stub.containers.lock().unwrap().get(&id).cloned() else {
            let gone = Json(json!({"message": format!("No such container: {id}")}));
            return (StatusCode::NOT_FOUND, gone).into_response();
        };
        Json(json!({
            "Id": id,
            "Path": "python3",
            "Args": ["-m", "agent"],
            "State": {"Status": "running", "Running": true, "Pid": pid},
            "Config": {"Env": ["HOME=/root", "PATH=/usr/bin"]},
        }))
        .into_response()
    }

    async fn events(State(stub): State<Arc<Stub>>) -> Body {
        let events = stub.events.subscribe();
        let stream = futures_util::stream::unfold(events, |mut events| async {
            let event = events.recv().await.ok()?;
            Some((Ok::<_, std::io::Error>(event), events))
        });
        Body::from_stream(stream)
    }

    #[tokio::test]
    async fn containers_that_run_are_told_with_their_labels_and_processes() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("docker.sock");
        let stub = Stub::serve(&socket);
        let mut docker = Docker::new(&socket);
        assert_eq!(docker.list().await.unwrap(), Listing::default());

        let mut process = Program::new("sleep").arg("60").spawn().unwrap();
        stub.run("a", process.id(), json!({"agentguard.dev/agent": "true"}));
        // Made, and without a process yet.
        stub.run("b", 0, json!({}));
        let listing = docker.list().await.unwrap();
        assert_eq!(listing.sandboxes.len(), 0);
        let container = &listing.containers["a"];
        assert_eq!(listing.containers.len(), 1);
        assert_eq!(container.name, "a-name");
        assert_eq!(container.labels["agentguard.dev/agent"], "true");
        assert_eq!(container.process, ProcessRef::of(process.id()).unwrap());
        let command = container.command.as_ref().unwrap();
        assert_eq!((&*command.executable, &*command.search_path), ("python3", "/usr/bin"));

        // What is known is not asked for again; what has another process is.
        assert_eq!(stub.take_inspected(), ["a", "b"]);
        docker.list().await.unwrap();
        assert_eq!(stub.take_inspected(), ["b"]);
        process.kill().unwrap();
        process.wait().unwrap();
        stub.run("a", std::process::id(), json!({}));
        let again = docker.list().await.unwrap();
        assert_eq!(again.containers["a"].process, ProcessRef::of(std::process::id()).unwrap());
        stub.containers.lock().unwrap().clear();
        assert_eq!(docker.list().await.unwrap(), Listing::default());
    }

    #[tokio::test]
    async fn a_change_is_told_at_once_and_a_daemon_that_is_gone_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("docker.sock");
        let mut docker = Docker::new(&socket);
        let error = docker.list().await.unwrap_err().to_string();
        assert!(error.contains("docker.sock") && error.contains("containers.docker"), "{error}");

        let stub = Stub::serve(&socket);
        docker.list().await.unwrap();
        let tell = || {
            let event = json!({"Type": "container", "Action": "start", "Actor": {"ID": "a"}});
            stub.events.send(format!("{event}\n"))
        };
        while tell().is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        docker.changed().await;
        // From now on it is believed to tell, and not asked every moment.
        let begin = Instant::now();
        tell().unwrap();
        timeout(Duration::from_secs(4), docker.changed()).await.expect("it was told");
        assert!(begin.elapsed() < Duration::from_secs(4));
    }
}
