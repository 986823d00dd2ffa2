//! Runtimes that offer the Node Resource Interface: containerd from 1.7 on, CRI-O from 1.26 on.
//!
//! The runtime calls its plugins before a pod's sandbox and each container runs its first instruction,
//! waits for the answer, and gives up the start when the answer is an error. The configuration of
//! containers need not be changed for it. Knows the protocol only; who a container is, and what an
//! answer depends on, is the [`Plugin`]'s.
//!
//! A plugin that does not answer in time is disconnected, and the start goes on without it. So every
//! call has an end (`MARGIN`) that comes before the runtime's own, and is then an error.

mod frames;
mod messages;

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};
use prost::Message as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::r#async::transport::{Listener, Socket};
use ttrpc::r#async::{Client, MethodHandler, Server, Service, TtrpcContext};
use ttrpc::proto::{Code, Request, Response};

use self::frames::{Carried, Ends, FrameError};
use self::messages::{
    ConfigureRequest, ConfigureResponse, Event, LinuxPodSandbox, PodSandbox, RegisterPluginRequest,
    StartRequest, StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
};
use crate::identity::container::{Command, Sandbox};
use crate::identity::pod::{Labels, Pod, PodUid};

/// By what runtimes know the plugin, and where in the row of plugins it is called.
const NAME: &str = "agentguard";
const INDEX: &str = "10";
/// The protocol's services.
const PLUGIN_SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";
/// How long a runtime may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a runtime waits for a plugin, where it does not say.
const USUAL: Duration = Duration::from_secs(2);
/// What is kept of a runtime's patience for the way back.
const MARGIN: Duration = Duration::from_millis(400);

/// What runtimes call.
pub trait Plugin: Send + Sync + 'static {
    /// Whether what this process says counts.
    ///
    /// # Errors
    ///
    /// Why it does not.
    fn trust(&self, pid: u32) -> Result<(), String>;

    /// From now on it is told of every start.
    fn connected(&self, runtime: &RuntimeName);

    /// Something is about to start, and waits for the answer, `patience` at most.
    ///
    /// # Errors
    ///
    /// Why it may not.
    fn starts(
        &self,
        start: Start,
        patience: Duration,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

/// A runtime, as it names itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeName {
    pub name: String,
    pub version: String,
}

impl fmt::Display for RuntimeName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.name, self.version)
    }
}

/// A first process that exists and waits: a sandbox's, or a container's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    pub pid: u32,
    pub sandbox: Sandbox,
    /// `None` for the sandbox's own.
    pub container: Option<StartingContainer>,
}

/// What is told of a container beside its pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartingContainer {
    pub id: String,
    pub name: String,
    pub labels: Labels,
    pub command: Option<Command>,
}

/// Why there is no plugin any more, or none yet.
#[derive(Debug, thiserror::Error)]
pub enum NriError {
    #[error("can not be connected to: {0}")]
    Connect(#[source] io::Error),
    #[error("is not trusted: {0}")]
    Untrusted(String),
    #[error("did not take the plugin: {0}")]
    Refused(String),
    #[error("can not be spoken to: {0}")]
    Protocol(#[from] ttrpc::Error),
    #[error("is not connected any more: {0}")]
    Over(#[from] FrameError),
}

/// Is a plugin of the runtime at `socket` until the connection ends.
///
/// # Errors
///
/// Why it ended.
pub async fn serve(socket: &Path, plugin: Arc<impl Plugin>) -> Result<Infallible, NriError> {
    let stream = UnixStream::connect(socket).await.map_err(NriError::Connect)?;
    let peer = stream.peer_cred().map_err(NriError::Connect)?;
    // Whoever answers here says who is an agent.
    if peer.uid() != nix::unistd::geteuid().as_raw() {
        return Err(NriError::Untrusted(format!("it runs as user {}", peer.uid())));
    }
    // One that this PID namespace does not show has the number 0.
    let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0);
    let pid = pid.ok_or_else(|| {
        NriError::Untrusted("its process is not seen from here (hostPID shows it)".to_owned())
    })?;
    plugin.trust(pid).map_err(NriError::Untrusted)?;
    talk(stream, plugin).await
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    plugin: Arc<impl Plugin>,
) -> Result<Infallible, NriError> {
    let (Ends { plugin: plugins, runtime }, carried): (Ends, Carried) = frames::connections();
    // One connection, and then none: the server would end with its listener.
    let incoming = stream::once(async { Ok::<_, io::Error>(plugins) }).chain(stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(incoming))
        .register_service(HashMap::from([(PLUGIN_SERVICE.to_owned(), service(&plugin))]));
    server.start().await?;
    let client = Client::new(Socket::new(runtime));
    let register = async {
        register(&client).await?;
        // What follows is the runtime's to say.
        std::future::pending().await
    };
    tokio::select! {
        over = frames::carry(stream, carried) => Err(over.into()),
        refused = register => refused,
    }
}

async fn register(client: &Client) -> Result<(), NriError> {
    let mut request = Request::new();
    request.set_service(RUNTIME_SERVICE.to_owned());
    request.set_method("RegisterPlugin".to_owned());
    request.set_timeout_nano(i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX));
    let plugin =
        RegisterPluginRequest { plugin_name: NAME.to_owned(), plugin_idx: INDEX.to_owned() };
    request.set_payload(plugin.encode_to_vec());
    let refused = |why: &dyn fmt::Display| NriError::Refused(why.to_string());
    match timeout(PATIENCE, client.request(request)).await {
        Ok(answer) => answer.map(drop).map_err(|error| refused(&error)),
        Err(_late) => Err(refused(&format!("no answer within {} s", PATIENCE.as_secs()))),
    }
}

/// What a runtime may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Configure,
    Synchronize,
    StateChange,
    RunPodSandbox,
    StartContainer,
    Shutdown,
}

impl Call {
    const ALL: [Self; 6] = [
        Self::Configure,
        Self::Synchronize,
        Self::StateChange,
        Self::RunPodSandbox,
        Self::StartContainer,
        Self::Shutdown,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Configure => "Configure",
            Self::Synchronize => "Synchronize",
            Self::StateChange => "StateChange",
            Self::RunPodSandbox => "RunPodSandbox",
            Self::StartContainer => "StartContainer",
            Self::Shutdown => "Shutdown",
        }
    }
}

fn service(plugin: &Arc<impl Plugin>) -> Service {
    let runtime = Arc::default();
    let method = |call: Call| {
        let method = Method { call, plugin: Arc::clone(plugin), runtime: Arc::clone(&runtime) };
        (call.as_str().to_owned(), Box::new(method) as Box<dyn MethodHandler + Send + Sync>)
    };
    Service { methods: Call::ALL.map(method).into(), streams: HashMap::new() }
}

/// One method of the plugin's service.
struct Method<P> {
    call: Call,
    plugin: Arc<P>,
    /// Who said that it is the runtime.
    runtime: Arc<std::sync::Mutex<RuntimeName>>,
}

#[async_trait]
impl<P: Plugin> MethodHandler for Method<P> {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let mut response = Response::new();
        match self.answer(patience(context.timeout_nano), &request.payload).await {
            Ok(payload) => response.set_payload(payload),
            // An error of another kind would be taken for the plugin's end.
            Err((code, why)) => response.set_status(ttrpc::get_status(code, why)),
        }
        Ok(response)
    }
}

/// How long something may wait, of what the runtime says that it waits.
fn patience(nanoseconds: i64) -> Duration {
    let told = u64::try_from(nanoseconds).ok().filter(|nanoseconds| *nanoseconds > 0);
    let of_runtime = told.map_or(USUAL, Duration::from_nanos);
    of_runtime.saturating_sub(MARGIN).max(of_runtime / 2)
}

type Failure = (Code, String);

impl<P: Plugin> Method<P> {
    async fn answer(&self, patience: Duration, payload: &[u8]) -> Result<Vec<u8>, Failure> {
        match self.call {
            Call::Configure => {
                let ConfigureRequest { runtime_name, runtime_version } = self.read(payload)?;
                *self.runtime() = RuntimeName { name: runtime_name, version: runtime_version };
                let events = Event::RunPodSandbox.bit() | Event::StartContainer.bit();
                Ok(ConfigureResponse { events }.encode_to_vec())
            }
            Call::Synchronize => {
                // What runs already, the runtime's own list tells.
                let SynchronizeRequest { more } = self.read(payload)?;
                if !more {
                    self.plugin.connected(&self.runtime().clone());
                }
                Ok(SynchronizeResponse { more }.encode_to_vec())
            }
            Call::StateChange => {
                let StateChangeEvent { event, pod, container } = self.read(payload)?;
                let request = StartRequest { pod, container };
                match Event::try_from(event) {
                    Ok(Event::RunPodSandbox) => self.sandbox(request, patience).await,
                    Ok(Event::StartContainer) => self.container(request, patience).await,
                    // It was not asked for.
                    Ok(Event::Unknown) | Err(_) => Ok(Vec::new()),
                }
            }
            Call::RunPodSandbox => self.sandbox(self.read(payload)?, patience).await,
            Call::StartContainer => self.container(self.read(payload)?, patience).await,
            Call::Shutdown => Ok(Vec::new()),
        }
    }

    fn read<M: prost::Message + Default>(&self, payload: &[u8]) -> Result<M, Failure> {
        M::decode(payload).map_err(|error| {
            let call = self.call.as_str();
            (Code::INVALID_ARGUMENT, format!("what {call} says can not be read: {error}"))
        })
    }

    fn runtime(&self) -> std::sync::MutexGuard<'_, RuntimeName> {
        self.runtime.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn sandbox(&self, request: StartRequest, patience: Duration) -> Result<Vec<u8>, Failure> {
        let pod = request.pod.ok_or("pod: is missing; a sandbox is one's");
        let pod = pod.map_err(|why| invalid(why.to_owned()))?;
        // One that is no process of this kernel runs nothing that this one sees.
        if pod.pid == 0 {
            return Ok(Vec::new());
        }
        let pid = pod.pid;
        let sandbox = sandbox(pod).map_err(invalid)?;
        self.start(Start { pid, sandbox, container: None }, patience).await
    }

    async fn container(
        &self,
        request: StartRequest,
        patience: Duration,
    ) -> Result<Vec<u8>, Failure> {
        let start = container(request).map_err(invalid)?;
        self.start(start, patience).await
    }

    async fn start(&self, start: Start, patience: Duration) -> Result<Vec<u8>, Failure> {
        match timeout(patience, self.plugin.starts(start, patience)).await {
            Ok(Ok(())) => Ok(Vec::new()),
            Ok(Err(why)) => Err((Code::FAILED_PRECONDITION, why)),
            Err(_late) => Err((
                Code::UNAVAILABLE,
                format!("{NAME} did not hold it within {} ms", patience.as_millis()),
            )),
        }
    }
}

fn invalid(why: String) -> Failure {
    (Code::INVALID_ARGUMENT, why)
}

fn sandbox(pod: PodSandbox) -> Result<Sandbox, String> {
    let PodSandbox { id, name, uid, namespace, labels, runtime_handler, linux, pid: _ } = pod;
    for (field, value) in [("id", &id), ("name", &name), ("namespace", &namespace)] {
        if value.is_empty() {
            return Err(format!("pod.{field}: is missing; a pod has one"));
        }
    }
    let uid = PodUid::new(&uid).ok_or_else(|| format!("pod.uid: {uid:?} is none"))?;
    let LinuxPodSandbox { namespaces } = linux.unwrap_or_default();
    let host_network =
        !namespaces.is_empty() && namespaces.iter().all(|namespace| namespace.r#type != "network");
    let pod = Pod {
        uid,
        namespace,
        name,
        service_account: None,
        labels,
        host_network,
        runtime_class: None,
    };
    Ok(Sandbox { id, pod, handler: runtime_handler, cgroup: None })
}

fn container(request: StartRequest) -> Result<Start, String> {
    let sandbox = sandbox(request.pod.ok_or("pod: is missing; a container is in one")?)?;
    let container = request.container.ok_or("container: is missing")?;
    let messages::Container { id, pod_sandbox_id, name, labels, args, env, pid } = container;
    if id.is_empty() {
        return Err("container.id: is missing; a container has one".to_owned());
    }
    if pod_sandbox_id != sandbox.id {
        return Err(format!(
            "container.pod_sandbox_id: {pod_sandbox_id:?} is not the pod's, {:?}",
            sandbox.id
        ));
    }
    let command = super::command(args, &env);
    let container = StartingContainer { id, name, labels, command };
    Ok(Start { pid, sandbox, container: Some(container) })
}

#[cfg(test)]
mod tests;
