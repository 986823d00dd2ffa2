//! Calls the control API.
//!
//! One connection for each call, on a single-threaded runtime of its own: `agentguard exec` goes
//! through here before every command, so nothing is set up that is not needed, and no thread and no
//! descriptor is left when a call returns.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::route::{Method, Route};
use super::service::EventFilter;
use super::types::{
    Announced, Announcement, Confine, Confined, Diagnostics, ExplainRequest, Explanation,
    GrantView, LastDenial, Problem, Refreshed, Revoke, Status, WorkloadView,
};

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/agentguard/agentguard.sock";

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no daemon at {socket}; start it with agentguard run, or name its socket with --socket"
    )]
    NoDaemon { socket: PathBuf },
    #[error("{socket} may not be connected to: {source}; it is mode 0666 when the daemon made it")]
    NotPermitted { socket: PathBuf, source: io::Error },
    #[error("the daemon at {socket} broke off: {reason}; see its log")]
    BrokenOff { socket: PathBuf, reason: String },
    #[error("the daemon at {socket} gave an answer of another version: {reason}; restart it")]
    Unreadable { socket: PathBuf, reason: String },
    /// The daemon said no.
    #[error("{}", .problem.error)]
    Refused { status: u16, problem: Problem },
    #[error("the answer can not be passed on: {0}")]
    Output(io::Error),
}

/// A way to the daemon.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    /// How long an answer is waited for, where somebody can not wait for as long as it takes.
    patience: Option<Duration>,
}

/// How long an answer is waited for.
const PATIENCE_FOR_ANSWERS: Duration = Duration::from_secs(10);
const PATIENCE_FOR_CHANGES: Duration = Duration::from_secs(60);
/// What need not be escaped in a segment of a path or a value of a query.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

impl Client {
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), patience: None }
    }

    /// The same, waiting no longer than this for any answer.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience: Some(patience), ..self }
    }

    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// # Errors
    /// See [`ClientError`]; the same for all verbs.
    pub fn status(&self) -> Result<Status, ClientError> {
        self.ask(Route::Status, "", None)
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn workloads(&self) -> Result<Vec<WorkloadView>, ClientError> {
        self.ask(Route::Workloads, "", None)
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn workload(&self, name: &str) -> Result<WorkloadView, ClientError> {
        self.ask(Route::Workload, name, None)
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn grants(&self) -> Result<Vec<GrantView>, ClientError> {
        self.ask(Route::Grants, "", None)
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn grant(&self, id: &str) -> Result<GrantView, ClientError> {
        self.ask(Route::Grant, id, None)
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn add_grant(&self, manifest: &serde_json::Value) -> Result<GrantView, ClientError> {
        self.ask(Route::AddGrant, "", Some(self.body(manifest)?))
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn revoke_grant(&self, id: &str, reason: &str) -> Result<GrantView, ClientError> {
        self.ask(Route::RevokeGrant, id, Some(self.body(&Revoke { reason: reason.into() })?))
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn explain(&self, request: &ExplainRequest) -> Result<Explanation, ClientError> {
        self.ask(Route::Explain, "", Some(self.body(request)?))
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn explain_last(&self, workload: Option<&str>) -> Result<LastDenial, ClientError> {
        let query = workload.map(|name| format!("?workload={}", escape(name)));
        let uri = format!("{}{}", Route::ExplainLast.path(), query.unwrap_or_default());
        self.decode(&self.call(Route::ExplainLast, &uri, None)?)
    }

    /// Makes this very process a workload. It is confined when this returns; what is left to do is
    /// to `exec`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn confine(&self, request: &Confine) -> Result<Confined, ClientError> {
        self.ask(Route::Confine, "", Some(self.body(request)?))
    }

    /// Tells of a container whose first process waits for the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn announce(&self, announcement: &Announcement) -> Result<Announced, ClientError> {
        self.ask(Route::Announce, "", Some(self.body(announcement)?))
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn set_diagnostics(&self, enabled: bool) -> Result<(), ClientError> {
        let body = self.body(&Diagnostics { enabled })?;
        self.call(Route::Diagnostics, Route::Diagnostics.path(), Some(body)).map(|_| ())
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn refresh_executables(&self) -> Result<Refreshed, ClientError> {
        self.ask(Route::RefreshExecutables, "", None)
    }

    /// # Errors
    /// See [`ClientError`].
    pub fn openapi(&self) -> Result<serde_json::Value, ClientError> {
        self.ask(Route::OpenApi, "", None)
    }

    /// Gives each record, a JSON line without its newline, to `each`, until the records or, with
    /// `follow`, the daemon ends. An error of `each` ends it too.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::Output`] for an error of `each`.
    pub fn events(
        &self,
        filter: &EventFilter,
        follow: bool,
        mut each: impl FnMut(&str) -> io::Result<()>,
    ) -> Result<(), ClientError> {
        let mut uri = format!(
            "{}?follow={follow}&denied={}&limit={}",
            Route::Events.path(),
            filter.denied,
            filter.limit
        );
        if let Some(workload) = &filter.workload {
            uri.push_str("&workload=");
            uri.push_str(&escape(workload));
        }
        self.block_on(async {
            let mut response = self.send(Route::Events, &uri, None).await?;
            if !response.status().is_success() {
                return Err(self.refusal(response).await);
            }
            let mut pending: Vec<u8> = Vec::new();
            while let Some(frame) = response.body_mut().frame().await {
                let frame = frame.map_err(|error| self.broken_off(&error))?;
                let Ok(data) = frame.into_data() else { continue };
                pending.extend_from_slice(&data);
                while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = pending.drain(..=end).collect();
                    let line = String::from_utf8_lossy(&line[..end]);
                    if !line.is_empty() {
                        each(&line).map_err(ClientError::Output)?;
                    }
                }
            }
            Ok(())
        })
    }

    fn ask<T: DeserializeOwned>(
        &self,
        route: Route,
        parameter: &str,
        body: Option<Bytes>,
    ) -> Result<T, ClientError> {
        let uri = match route.path().split_once('{') {
            None => route.path().to_owned(),
            Some((before, rest)) => {
                let after = rest.split_once('}').map_or("", |(_, after)| after);
                format!("{before}{}{after}", escape(parameter))
            }
        };
        self.decode(&self.call(route, &uri, body)?)
    }

    fn body(&self, value: &impl Serialize) -> Result<Bytes, ClientError> {
        // Fails for a path that is not UTF-8.
        serde_json::to_vec(value)
            .map(Bytes::from)
            .map_err(|error| ClientError::Output(io::Error::other(error)))
    }

    fn decode<T: DeserializeOwned>(&self, answer: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(answer).map_err(|error| ClientError::Unreadable {
            socket: self.socket.clone(),
            reason: error.to_string(),
        })
    }

    fn call(&self, route: Route, uri: &str, body: Option<Bytes>) -> Result<Bytes, ClientError> {
        let patience = self.patience.unwrap_or(match route.method() {
            Method::Get => PATIENCE_FOR_ANSWERS,
            Method::Post | Method::Put => PATIENCE_FOR_CHANGES,
        });
        let answer = async {
            let response = self.send(route, uri, body).await?;
            if !response.status().is_success() {
                return Err(self.refusal(response).await);
            }
            let body = response.into_body().collect().await;
            Ok(body.map_err(|error| self.broken_off(&error))?.to_bytes())
        };
        self.block_on(async {
            // A daemon that is stopped or frozen takes connections and says nothing.
            tokio::time::timeout(patience, answer).await.unwrap_or_else(|_late| {
                let late = format!(
                    "it does not answer within {} s; see whether it is stopped or frozen",
                    patience.as_secs()
                );
                Err(self.broken_off(&io::Error::other(late)))
            })
        })
    }

    fn block_on<T>(
        &self,
        work: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|error| self.broken_off(&error))?
            .block_on(work)
    }

    async fn send(
        &self,
        route: Route,
        uri: &str,
        body: Option<Bytes>,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream =
            UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken_off(&error))?;
        // Its error is the request's as well.
        tokio::spawn(async move { connection.await.ok() });
        let request = Request::builder()
            .method(route.method().as_str())
            .uri(uri)
            .header("host", "agentguard")
            .header("content-type", "application/json")
            .body(Full::new(body.unwrap_or_default()))
            .map_err(|error| self.broken_off(&error))?;
        sender.send_request(request).await.map_err(|error| self.broken_off(&error))
    }

    async fn refusal(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status();
        let body = match response.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return self.broken_off(&error),
        };
        let problem = serde_json::from_slice(&body).unwrap_or_else(|_| Problem {
            error: format!(
                "the daemon answered {}",
                StatusCode::canonical_reason(&status).unwrap_or(status.as_str())
            ),
            ..Problem::default()
        });
        ClientError::Refused { status: status.as_u16(), problem }
    }

    fn unreachable(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        if source.kind() == io::ErrorKind::PermissionDenied {
            ClientError::NotPermitted { socket, source }
        } else {
            ClientError::NoDaemon { socket }
        }
    }

    fn broken_off(&self, error: &dyn std::error::Error) -> ClientError {
        let reason = match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        ClientError::BrokenOff { socket: self.socket.clone(), reason }
    }
}

fn escape(text: &str) -> String {
    utf8_percent_encode(text, PLAIN).to_string()
}
