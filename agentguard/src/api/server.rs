//! Serves the control API on a unix socket, and metrics and health on a TCP address.
//!
//! Its one job is to turn connections into calls of [`Service`], within limits that hold whoever
//! calls: sizes, times and numbers of connections. It decides nothing itself; who may do what is in
//! [`route`](super::route). Verbs that change something run to their end even when the caller hangs
//! up in the middle.

use std::collections::{HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, Path as UrlPath, Query, Request, State};
use axum::handler::Handler;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{MethodFilter, MethodRouter, get, on};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::caller::{Caller, Role, Viewer, user_prefix};
use super::openapi::openapi;
use super::remedy::remedies;
use super::route::{Access, Method, Route};
use super::service::{EventFilter, Outcome, Service, ServiceError};
use super::ttl::parse_ttl;
use super::types::{
    Announcement, Confine, Diagnostics, ExplainRequest, Explanation, Problem, Revoke, Status,
    WorkloadView,
};

/// What a caller can use up.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of a request's body.
    pub body_bytes: usize,
    /// Bytes of a request's head; at least 8,192.
    pub head_bytes: usize,
    pub headers: usize,
    /// From the connection's start to the end of the head.
    pub head_time: Duration,
    /// For one request, with its body.
    pub request_time: Duration,
    /// For one connection that is not an event stream.
    pub connection_time: Duration,
    /// Between two signs of life on a silent event stream.
    pub heartbeat: Duration,
    /// For what is under way when the server stops.
    pub drain_time: Duration,
    /// Connections of root. Users can not use these up, so root always gets through.
    pub root_connections: usize,
    /// Connections of each other user.
    pub user_connections: usize,
    /// Connections of all other users together.
    pub users_connections: usize,
    /// Connections of callers who are refused everything.
    pub refused_connections: usize,
    /// Connections to the TCP address.
    pub tcp_connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            head_bytes: 16 << 10,
            headers: 64,
            head_time: Duration::from_secs(10),
            request_time: Duration::from_secs(30),
            connection_time: Duration::from_secs(60),
            heartbeat: Duration::from_secs(15),
            drain_time: Duration::from_secs(3),
            root_connections: 64,
            user_connections: 16,
            users_connections: 128,
            refused_connections: 16,
            tcp_connections: 64,
        }
    }
}

/// Why the control socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("{path} is in use by another daemon; stop that one or choose another --socket")]
    InUse { path: PathBuf },
    #[error("{path} is there and no socket; remove it or choose another --socket")]
    NotASocket { path: PathBuf },
    #[error(
        "{directory} can be written by others than root (mode {mode:o}, owner {owner}), who could \
         put their own socket in place; make it root's with mode 0755"
    )]
    UnsafeDirectory { directory: PathBuf, mode: u32, owner: u32 },
    #[error("the control socket {path} can not be made: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// Makes the control socket.
///
/// Every user may connect (mode 0666): who is calling is taken from the kernel's credentials. The
/// directory must belong to this process' user and be writable by nobody else; it is made with mode
/// 0755 when it is missing. A socket that nobody listens on any more is replaced; anything else in
/// its place is an error.
///
/// # Errors
/// See [`BindError`].
pub fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let failed = |source| BindError::Io { path: path.into(), source };
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.exists() {
        fs::create_dir_all(directory).map_err(failed)?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).map_err(failed)?;
    }
    let found = fs::metadata(directory).map_err(failed)?;
    let mode = found.mode() & 0o7777;
    if mode & 0o022 != 0 || found.uid() != nix::unistd::geteuid().as_raw() {
        let owner = found.uid();
        return Err(BindError::UnsafeDirectory { directory: directory.into(), mode, owner });
    }
    match fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.into() });
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(failed)?;
            }
            Ok(_) | Err(_) => return Err(BindError::InUse { path: path.into() }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).map_err(failed)?;
    Ok(listener)
}

/// Serves the control API until `stop` is cancelled.
pub async fn serve_control<S: Service>(
    listener: UnixListener,
    service: Arc<S>,
    limits: Limits,
    stop: CancellationToken,
) {
    let app = Arc::new(App { service, limits, stop: stop.clone(), tasks: TaskTracker::new() });
    let router = control_router(&app);
    let slots = Arc::new(Slots::default());
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => accept(stream, &app, &router, &slots),
            // Out of file descriptors, most likely; they come back.
            Err(error) => {
                tracing::warn!(%error, "a connection to the control socket could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    app.drain().await;
}

/// Serves `/metrics`, `/healthz` and `/readyz` until `stop` is cancelled.
pub async fn serve_metrics<S: Service>(
    listener: TcpListener,
    service: Arc<S>,
    limits: Limits,
    stop: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(limits.tcp_connections));
    let app = Arc::new(App { service, limits, stop: stop.clone(), tasks: TaskTracker::new() });
    let router = Router::new()
        .route("/metrics", get(metrics::<S>))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready::<S>))
        .layer(from_fn_with_state(app.clone(), count_tcp::<S>))
        .with_state(app.clone());
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let Ok(slot) = slots.clone().try_acquire_owned() else {
                    refuse_raw(|bytes| stream.try_write(bytes));
                    app.service.record_request(Outcome { route: None, role: None, status: 503 });
                    continue;
                };
                let (app, router) = (app.clone(), router.clone());
                app.tasks.clone().spawn(async move {
                    serve_connection(stream, &app, router, None).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection for metrics could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    app.drain().await;
}

struct App<S> {
    service: Arc<S>,
    limits: Limits,
    stop: CancellationToken,
    /// One for each connection.
    tasks: TaskTracker,
}

impl<S> App<S> {
    /// Lets connections come to their end, for a while.
    async fn drain(&self) {
        self.tasks.close();
        if tokio::time::timeout(self.limits.drain_time, self.tasks.wait()).await.is_err() {
            tracing::warn!(connections = self.tasks.len(), "connections were cut off at the stop");
        }
    }
}

/// A connection, as its requests know it.
#[derive(Clone)]
struct Connection {
    caller: Arc<Caller>,
    /// Set by a request whose answer has no end.
    streaming: Arc<AtomicBool>,
}

/// What was found out about the caller of a request that may go on.
#[derive(Clone)]
struct Admitted {
    caller: Arc<Caller>,
    viewer: Viewer,
}

/// An answer that says why not.
struct Refusal {
    status: StatusCode,
    problem: Box<Problem>,
}

impl Refusal {
    fn new(status: StatusCode, error: impl Into<String>, remedy: impl Into<String>) -> Self {
        let problem =
            Problem { error: error.into(), remedy: Some(remedy.into()), details: Vec::new() };
        Self { status, problem: Box::new(problem) }
    }
}

impl From<ServiceError> for Refusal {
    fn from(error: ServiceError) -> Self {
        let sentence = error.to_string();
        let (status, remedy, details) = match error {
            ServiceError::NotFound { what, .. } => {
                (StatusCode::NOT_FOUND, Some(format!("agentguard {what}s lists them")), Vec::new())
            }
            ServiceError::Invalid(lines) => (StatusCode::UNPROCESSABLE_ENTITY, None, lines),
            ServiceError::Forbidden { remedy, .. } => {
                (StatusCode::FORBIDDEN, Some(remedy), Vec::new())
            }
            ServiceError::Conflict { remedy, .. } => {
                (StatusCode::CONFLICT, Some(remedy), Vec::new())
            }
            ServiceError::Unavailable { remedy, .. } => {
                (StatusCode::SERVICE_UNAVAILABLE, Some(remedy), Vec::new())
            }
        };
        Self { status, problem: Box::new(Problem { error: sentence, remedy, details }) }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(*self.problem)).into_response();
        let kind = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

/// How a caller's connection is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Slot {
    Root,
    User(u32),
    Refused,
}

/// The connections there are.
#[derive(Default)]
struct Slots {
    taken: Mutex<HashMap<Slot, usize>>,
}

impl Slots {
    fn take(self: &Arc<Self>, slot: Slot, limits: &Limits) -> Option<SlotGuard> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = match slot {
            Slot::Root => limits.root_connections,
            Slot::Refused => limits.refused_connections,
            Slot::User(_) => {
                let is_user = |slot: &Slot| matches!(slot, Slot::User(_));
                let all: usize =
                    taken.iter().filter(|(slot, _)| is_user(slot)).map(|(_, count)| count).sum();
                if all >= limits.users_connections {
                    return None;
                }
                limits.user_connections
            }
        };
        let count = taken.get(&slot).copied().unwrap_or(0);
        if count >= limit {
            return None;
        }
        taken.insert(slot, count + 1);
        Some(SlotGuard { slots: self.clone(), slot })
    }
}

struct SlotGuard {
    slots: Arc<Slots>,
    slot: Slot,
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(&self.slot) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) | None => {
                taken.remove(&self.slot);
            }
        }
    }
}

fn accept<S: Service>(stream: UnixStream, app: &Arc<App<S>>, router: &Router, slots: &Arc<Slots>) {
    let caller = match Caller::of(&stream, Path::new("/proc")) {
        Ok(caller) => Arc::new(caller),
        Err(error) => {
            tracing::warn!(%error, "a caller of the control socket is not known");
            app.service.record_request(Outcome { route: None, role: None, status: 403 });
            return;
        }
    };
    // Only for counting: each request asks anew.
    let slot = match role(app, &caller) {
        Ok(Role::Root) => Slot::Root,
        Ok(Role::User) => Slot::User(caller.uid),
        Ok(Role::Workload | Role::Foreign) | Err(_) => Slot::Refused,
    };
    let Some(guard) = slots.take(slot, &app.limits) else {
        refuse_raw(|bytes| stream.try_write(bytes));
        app.service.record_request(Outcome { route: None, role: None, status: 503 });
        return;
    };
    let (app, router) = (app.clone(), router.clone());
    app.tasks.clone().spawn(async move {
        serve_connection(stream, &app, router, Some(caller)).await;
        drop(guard);
    });
}

/// Answers without reading what was asked; the caller is over its limit.
fn refuse_raw(write: impl FnOnce(&[u8]) -> io::Result<usize>) {
    const BODY: &str = r#"{"error":"too many connections","remedy":"close some of yours"}"#;
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{BODY}",
        BODY.len()
    );
    // The socket is new, so its buffer has room; if the caller is gone, nobody misses the answer.
    let _ = write(answer.as_bytes());
}

async fn serve_connection<S: Service>(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    app: &App<S>,
    router: Router,
    caller: Option<Arc<Caller>>,
) {
    let limits = &app.limits;
    let streaming = Arc::new(AtomicBool::new(false));
    let connection = caller.map(|caller| Connection { caller, streaming: streaming.clone() });
    let inner = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        if let Some(connection) = &connection {
            request.extensions_mut().insert(connection.clone());
        }
        hyper::service::Service::call(&inner, request)
    });
    // One request for each connection: nothing is left for a later owner of the descriptor.
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .max_buf_size(limits.head_bytes.max(8192))
        .max_headers(limits.headers)
        .header_read_timeout(limits.head_time)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let too_long = tokio::time::sleep(limits.connection_time);
    tokio::pin!(too_long);
    let ended = loop {
        tokio::select! {
            ended = &mut serving => break ended,
            () = app.stop.cancelled() => {
                serving.as_mut().graceful_shutdown();
                break serving.await;
            }
            () = &mut too_long => {
                if streaming.load(Ordering::Relaxed) {
                    // An event stream lasts until one side ends it.
                    too_long.as_mut().reset(tokio::time::Instant::now() + limits.connection_time);
                    continue;
                }
                app.service.record_request(Outcome { route: None, role: None, status: 408 });
                return;
            }
        }
    };
    if let Err(error) = ended {
        if error.is_parse() {
            app.service.record_request(Outcome { route: None, role: None, status: 400 });
        } else if error.is_timeout() {
            app.service.record_request(Outcome { route: None, role: None, status: 408 });
        }
        tracing::debug!(%error, "a connection ended early");
    }
}

fn control_router<S: Service>(app: &Arc<App<S>>) -> Router {
    let mut router: Router<Arc<App<S>>> = Router::new();
    for route in Route::ALL {
        let handler =
            handler::<S>(route).route_layer(from_fn_with_state((app.clone(), route), admit::<S>));
        router = router.route(route.path(), handler);
    }
    router
        .fallback(no_route::<S>)
        .method_not_allowed_fallback(no_method::<S>)
        .with_state(app.clone())
}

fn handler<S: Service>(route: Route) -> MethodRouter<Arc<App<S>>> {
    fn with<S: Service, T: 'static>(
        route: Route,
        handler: impl Handler<T, Arc<App<S>>>,
    ) -> MethodRouter<Arc<App<S>>> {
        let method = match route.method() {
            Method::Get => MethodFilter::GET,
            Method::Post => MethodFilter::POST,
            Method::Put => MethodFilter::PUT,
        };
        on(method, handler)
    }
    match route {
        Route::Status => with(route, status::<S>),
        Route::Workloads => with(route, workloads::<S>),
        Route::Workload => with(route, workload::<S>),
        Route::Grants => with(route, grants::<S>),
        Route::Grant => with(route, grant::<S>),
        Route::AddGrant => with(route, add_grant::<S>),
        Route::RevokeGrant => with(route, revoke_grant::<S>),
        Route::Explain => with(route, explain::<S>),
        Route::ExplainLast => with(route, explain_last::<S>),
        Route::Confine => with(route, confine::<S>),
        Route::Announce => with(route, announce::<S>),
        Route::Events => with(route, events::<S>),
        Route::Diagnostics => with(route, diagnostics::<S>),
        Route::RefreshExecutables => with(route, refresh_executables::<S>),
        Route::OpenApi => with(route, document),
    }
}

/// As whom the caller is served at this moment.
fn role<S: Service>(app: &App<S>, caller: &Caller) -> Result<Role, Refusal> {
    let workload = app.service.caller_workload(caller.pid)?;
    let shares_pid_namespace = caller.shares_pid_namespace();
    // Asked last: what was read about the pid was then read about the caller.
    if !caller.is_alive() {
        return Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "the process that connected is gone",
            "call from a process that waits for the answer",
        ));
    }
    Ok(if workload.is_some() {
        Role::Workload
    } else if !shares_pid_namespace {
        Role::Foreign
    } else if caller.uid == 0 {
        Role::Root
    } else {
        Role::User
    })
}

/// Lets a request through to its route, or not; counts it either way.
async fn admit<S: Service>(
    State((app, route)): State<(Arc<App<S>>, Route)>,
    Extension(connection): Extension<Connection>,
    mut request: Request,
    next: Next,
) -> Response {
    let (role, response) = match role(&app, &connection.caller) {
        Err(refusal) => (None, refusal.into_response()),
        Ok(role) => {
            let viewer = match route.access(role) {
                Access::Everything => Some(Viewer::Everything),
                Access::Own => Some(Viewer::own(app.service.trust_domain(), connection.caller.uid)),
                Access::Denied => None,
            };
            let response = match viewer {
                None => forbidden(role).into_response(),
                Some(viewer) => {
                    let caller = connection.caller.clone();
                    request.extensions_mut().insert(Admitted { caller, viewer });
                    tokio::time::timeout(app.limits.request_time, next.run(request))
                        .await
                        .unwrap_or_else(|_| {
                            Refusal::new(
                                StatusCode::REQUEST_TIMEOUT,
                                "the request took too long",
                                "try again; agentguard status says what the daemon is doing",
                            )
                            .into_response()
                        })
                }
            };
            (Some(role), response)
        }
    };
    let status = response.status().as_u16();
    app.service.record_request(Outcome { route: Some(route), role, status });
    response
}

fn forbidden(role: Role) -> Refusal {
    let (error, remedy) = match role {
        Role::Workload => (
            "a process of a workload may not use the control socket",
            "ask whoever runs this node; they can run agentguard explain --last",
        ),
        Role::Foreign => (
            "a process of another pid namespace may not use the control socket",
            "call from the host, or from a pod with hostPID",
        ),
        Role::Root | Role::User => ("only root may do this", "run it with sudo"),
    };
    Refusal::new(StatusCode::FORBIDDEN, error, remedy)
}

/// What is no route is answered only to those who may speak at all.
fn unknown<S: Service>(app: &App<S>, caller: &Caller, refusal: Refusal) -> Refusal {
    let (role, refusal) = match role(app, caller) {
        Ok(role @ (Role::Workload | Role::Foreign)) => (Some(role), forbidden(role)),
        Ok(role @ (Role::Root | Role::User)) => (Some(role), refusal),
        Err(refusal) => (None, refusal),
    };
    let status = refusal.status.as_u16();
    app.service.record_request(Outcome { route: None, role, status });
    refusal
}

async fn no_route<S: Service>(
    State(app): State<Arc<App<S>>>,
    Extension(connection): Extension<Connection>,
) -> Refusal {
    let refusal =
        Refusal::new(StatusCode::NOT_FOUND, "there is no such path", "see /v1/openapi.json");
    unknown(&app, &connection.caller, refusal)
}

async fn no_method<S: Service>(
    State(app): State<Arc<App<S>>>,
    Extension(connection): Extension<Connection>,
) -> Refusal {
    let refusal = Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "the path does not take this method",
        "see /v1/openapi.json",
    );
    unknown(&app, &connection.caller, refusal)
}

/// Runs to its end, also when the caller hangs up.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::spawn(work).await {
        Ok(done) => done.map_err(Refusal::from),
        Err(error) => {
            tracing::error!(%error, "a verb of the control API broke off");
            Err(Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the daemon broke off",
                "see the daemon's log; what is enforced stays as it was",
            ))
        }
    }
}

async fn read_body<S: Service>(app: &App<S>, body: Body) -> Result<Bytes, Refusal> {
    match Limited::new(body, app.limits.body_bytes).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is longer than {} bytes", app.limits.body_bytes),
            "send less",
        )),
        Err(error) => Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the body could not be read: {error}"),
            "send all of it",
        )),
    }
}

async fn read_json<S: Service, T: DeserializeOwned>(
    app: &App<S>,
    body: Body,
) -> Result<T, Refusal> {
    let body = read_body(app, body).await?;
    serde_json::from_slice(&body).map_err(|error| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the body is not what this path takes: {error}"),
            "see /v1/openapi.json",
        )
    })
}

fn not_found(what: &'static str, name: &str) -> Refusal {
    ServiceError::NotFound { what, name: name.to_owned() }.into()
}

type Shared<S> = State<Arc<App<S>>>;

async fn status<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
) -> Result<Json<Status>, Refusal> {
    let mut status = app.service.status().await?;
    match admitted.viewer {
        Viewer::Everything => {}
        Viewer::Own { .. } => status.totals = None,
    }
    Ok(Json(status))
}

async fn workloads<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
) -> Result<Json<Vec<WorkloadView>>, Refusal> {
    let mut workloads = app.service.workloads().await?;
    workloads.retain(|workload| admitted.viewer.sees(workload.identity.as_deref()));
    Ok(Json(workloads))
}

async fn workload<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
    UrlPath(name): UrlPath<String>,
) -> Result<Json<WorkloadView>, Refusal> {
    let workload = app.service.workload(&name).await;
    hide(&admitted.viewer, workload, "workload", &name, |workload| workload.identity.as_deref())
        .map(Json)
}

/// What the caller may not see does not exist for it: the answer, and the words of it, are the
/// same whether the service knows the name, finds it ambiguous or has never heard of it.
fn hide<T>(
    viewer: &Viewer,
    found: Result<T, ServiceError>,
    what: &'static str,
    name: &str,
    identity: impl Fn(&T) -> Option<&str>,
) -> Result<T, Refusal> {
    match found {
        Ok(found) if viewer.sees(identity(&found)) => Ok(found),
        Ok(_) | Err(ServiceError::NotFound { .. }) => Err(not_found(what, name)),
        Err(
            error @ (ServiceError::Invalid(_)
            | ServiceError::Forbidden { .. }
            | ServiceError::Conflict { .. }
            | ServiceError::Unavailable { .. }),
        ) => Err(error.into()),
    }
}

async fn grants<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
) -> Result<Response, Refusal> {
    let mut grants = app.service.grants().await?;
    grants.retain(|grant| admitted.viewer.sees(Some(&grant.subject)));
    Ok(Json(grants).into_response())
}

async fn grant<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
    UrlPath(id): UrlPath<String>,
) -> Result<Response, Refusal> {
    let grant = app.service.grant(&id).await;
    hide(&admitted.viewer, grant, "grant", &id, |grant| Some(&grant.subject))
        .map(|grant| Json(grant).into_response())
}

async fn add_grant<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
    body: Body,
) -> Result<Response, Refusal> {
    let manifest = read_body(&app, body).await?;
    let service = app.service.clone();
    let added =
        detached(async move { service.add_grant(&admitted.caller, &manifest).await }).await?;
    Ok((StatusCode::CREATED, Json(added)).into_response())
}

async fn revoke_grant<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
    UrlPath(id): UrlPath<String>,
    body: Body,
) -> Result<Response, Refusal> {
    let revoke: Revoke = read_json(&app, body).await?;
    if revoke.reason.trim().is_empty() {
        return Err(ServiceError::Invalid(vec!["reason: must say why".into()]).into());
    }
    let service = app.service.clone();
    let revoked =
        detached(async move { service.revoke_grant(&admitted.caller, &id, &revoke.reason).await })
            .await?;
    Ok(Json(revoked).into_response())
}

async fn explain<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
    body: Body,
) -> Result<Json<Explanation>, Refusal> {
    let request: ExplainRequest = read_json(&app, body).await?;
    // Seen before explained: an explanation may say what is wrong with the target.
    let workload = app.service.workload(&request.workload).await;
    let workload = hide(&admitted.viewer, workload, "workload", &request.workload, |workload| {
        workload.identity.as_deref()
    })?;
    let request = ExplainRequest { workload: workload.name, target: request.target };
    let explanation = app.service.explain(&request).await;
    let mut explanation =
        hide(&admitted.viewer, explanation, "workload", &request.workload, |explanation| {
            explanation.identity.as_deref()
        })?;
    explanation.remedy = remedies(&admitted.viewer, &explanation);
    Ok(Json(explanation))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LastQuery {
    workload: Option<String>,
}

async fn explain_last<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
    query: Result<Query<LastQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(query) = query.map_err(bad_query)?;
    let last = app.service.last_denial(&admitted.viewer, query.workload.as_deref()).await?;
    let visible = last.filter(|last| admitted.viewer.sees(last.explanation.identity.as_deref()));
    let Some(mut last) = visible else {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "nothing was denied",
            "ask for a request with agentguard explain --workload … --connect HOST:PORT/PROTO",
        ));
    };
    last.explanation.remedy = remedies(&admitted.viewer, &last.explanation);
    Ok(Json(last).into_response())
}

fn bad_query(rejection: axum::extract::rejection::QueryRejection) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, rejection.body_text(), "see /v1/openapi.json")
}

async fn confine<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
    body: Body,
) -> Result<Response, Refusal> {
    let request: Confine = read_json(&app, body).await?;
    let identity = identity_for(app.service.trust_domain(), &admitted, &request)?;
    let service = app.service.clone();
    let confined =
        detached(async move { service.confine(&admitted.caller, &identity, &request).await })
            .await?;
    Ok(Json(confined).into_response())
}

async fn announce<S: Service>(State(app): Shared<S>, body: Body) -> Result<Response, Refusal> {
    let announcement: Announcement = read_json(&app, body).await?;
    let service = app.service.clone();
    // A runtime that gives up waiting leaves a container that is half made: it is tagged all the same.
    let announced = detached(async move { service.announce(&announcement).await }).await?;
    Ok(Json(announced).into_response())
}

/// The identity that a process is confined under.
fn identity_for(
    trust_domain: &str,
    admitted: &Admitted,
    request: &Confine,
) -> Result<String, Refusal> {
    let mut errors = Vec::new();
    if let Some(name) = &request.name
        && !is_name(name)
    {
        errors.push(format!(
            "name: {name:?} is not a name; use letters, digits, '.', '_', '-', at most 63"
        ));
    }
    if request.command.is_empty() {
        errors.push("command: must have at least one word".into());
    }
    if !request.executable.is_absolute() {
        errors.push(format!("executable: {:?} is not absolute", request.executable));
    }
    match &request.ttl {
        Some(ttl) => errors.extend(parse_ttl(ttl).err().map(|error| format!("ttl: {error}"))),
        None if request.scopes.is_empty() => {}
        None => errors.push("ttl: is required where there are scopes".into()),
    }
    if !errors.is_empty() {
        return Err(ServiceError::Invalid(errors).into());
    }
    let own = user_prefix(trust_domain, admitted.caller.uid);
    let Some(identity) = &request.identity else {
        let name = request.name.clone().unwrap_or_else(|| name_of(&request.executable));
        return Ok(own + &name);
    };
    let may = match &admitted.viewer {
        Viewer::Everything => true,
        Viewer::Own { prefix, .. } => {
            identity.strip_prefix(prefix.as_str()).is_some_and(|rest| rest.split('/').all(is_name))
        }
    };
    if may {
        Ok(identity.clone())
    } else {
        Err(Refusal::new(
            StatusCode::FORBIDDEN,
            format!("{identity:?} is not an identity of yours"),
            format!("choose one below {own}, or run it with sudo"),
        ))
    }
}

/// Whether this can be one segment of a SPIFFE ID's path, and the name of a cgroup.
fn is_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// The executable's name, with what a name can not hold replaced.
fn name_of(executable: &Path) -> String {
    let name = executable.file_name().unwrap_or_default().to_string_lossy();
    let fit: String = name
        .chars()
        .take(63)
        .map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' })
        .collect();
    if is_name(&fit) { fit } else { "command".into() }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    #[serde(default)]
    follow: bool,
    #[serde(default)]
    denied: bool,
    workload: Option<String>,
    limit: Option<usize>,
}

/// The most records that are sent from before the call.
const MOST_RECENT: usize = 10_000;

async fn events<S: Service>(
    State(app): Shared<S>,
    Extension(admitted): Extension<Admitted>,
    Extension(connection): Extension<Connection>,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(query) = query.map_err(bad_query)?;
    let limit = query.limit.unwrap_or(100).min(MOST_RECENT);
    let filter = EventFilter { denied: query.denied, workload: query.workload, limit };
    // Subscribed before the past is read, so that nothing falls between.
    let receiver = query.follow.then(|| app.service.subscribe());
    let mut past = app.service.recent_events(&admitted.viewer, &filter).await?;
    past.retain(|line| is_wanted(line, &admitted.viewer, &filter));
    let body = match receiver {
        None => {
            let mut text = String::new();
            for line in past {
                text.push_str(&line);
                text.push('\n');
            }
            Body::from(text)
        }
        Some(receiver) => {
            connection.streaming.store(true, Ordering::Relaxed);
            let seen = past.iter().cloned().collect();
            let viewer = admitted.viewer;
            let caller = admitted.caller;
            let following =
                Following { app, caller, viewer, filter, receiver, past: past.into(), seen };
            Body::from_stream(futures_util::stream::unfold(following, |mut following| async {
                let line = following.next().await?;
                Some((Ok::<_, Infallible>(line), following))
            }))
        }
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// An event stream.
struct Following<S> {
    app: Arc<App<S>>,
    caller: Arc<Caller>,
    viewer: Viewer,
    filter: EventFilter,
    receiver: tokio::sync::broadcast::Receiver<Arc<str>>,
    past: VecDeque<Arc<str>>,
    /// What was sent as past and may come once more as present.
    seen: HashSet<Arc<str>>,
}

impl<S: Service> Following<S> {
    /// The next line with its newline; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(line) = self.past.pop_front() {
            return Some(Bytes::from(format!("{line}\n")));
        }
        let stop = self.app.stop.clone();
        let heartbeat = tokio::time::sleep(self.app.limits.heartbeat);
        tokio::pin!(heartbeat);
        loop {
            tokio::select! {
                () = stop.cancelled() => return None,
                () = &mut heartbeat => return self.may_go_on().then(|| Bytes::from_static(b"\n")),
                received = self.receiver.recv() => match received {
                    Err(RecvError::Closed) => return None,
                    // Said, so that nobody takes the stream for complete.
                    Err(RecvError::Lagged(missed)) => {
                        let line = serde_json::json!({"kind": "missed", "records": missed});
                        return Some(Bytes::from(format!("{line}\n")));
                    }
                    Ok(line) if self.seen.remove(&line) => {}
                    Ok(line) if is_wanted(&line, &self.viewer, &self.filter) => {
                        return Some(Bytes::from(format!("{line}\n")));
                    }
                    Ok(_) => {}
                },
            }
        }
    }

    /// A caller that has become a workload, or is gone, hears no more.
    fn may_go_on(&self) -> bool {
        role(&self.app, &self.caller).is_ok_and(|role| match Route::Events.access(role) {
            Access::Everything | Access::Own => true,
            Access::Denied => false,
        })
    }
}

/// Whether a record is to be sent. One that can not be read is shown to those who may see all.
#[must_use]
pub fn is_wanted(line: &str, viewer: &Viewer, filter: &EventFilter) -> bool {
    let all = *viewer == Viewer::Everything && !filter.denied && filter.workload.is_none();
    if all {
        return true;
    }
    let Ok(record) = serde_json::from_str::<Value>(line) else {
        return *viewer == Viewer::Everything;
    };
    let workload = &record["workload"];
    viewer.sees(workload["identity"].as_str())
        && (!filter.denied || record["verdict"] == "deny")
        && filter.workload.as_ref().is_none_or(|name| {
            [&workload["name"], &workload["identity"], &workload["cgroup"]]
                .iter()
                .any(|value| value.as_str() == Some(name))
        })
}

async fn diagnostics<S: Service>(State(app): Shared<S>, body: Body) -> Result<StatusCode, Refusal> {
    let Diagnostics { enabled } = read_json(&app, body).await?;
    let service = app.service.clone();
    detached(async move { service.set_diagnostics(enabled).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn refresh_executables<S: Service>(State(app): Shared<S>) -> Result<Response, Refusal> {
    let service = app.service.clone();
    let refreshed = detached(async move { service.refresh_executables().await }).await?;
    Ok(Json(refreshed).into_response())
}

async fn document() -> Json<Value> {
    Json(openapi())
}

async fn metrics<S: Service>(State(app): Shared<S>) -> Response {
    const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, TEXT)], app.service.render_metrics()).into_response()
}

async fn ready<S: Service>(State(app): Shared<S>) -> Response {
    match app.service.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(missing) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {missing}\n")).into_response()
        }
    }
}

/// Counts what is refused; a scrape that is answered is none of the API's requests.
async fn count_tcp<S: Service>(State(app): Shared<S>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    if response.status().is_client_error() {
        let status = response.status().as_u16();
        app.service.record_request(Outcome { route: None, role: None, status });
    }
    response
}
