//! The verbs of the daemon as the control API needs them.
//!
//! The seam between the API and the daemon. An implementation may rely on the server to have asked
//! whether the caller may; it must not decide that itself. All verbs may run at once.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::broadcast;

use super::caller::{Caller, Role, Viewer};
use super::route::Route;
use super::types::{
    Announced, Announcement, Confine, Confined, ExplainRequest, Explanation, GrantView, LastDenial,
    Refreshed, Status, WorkloadView,
};

/// Why a verb did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// There is no such thing, or none that the caller may see.
    #[error("there is no {what} {name:?}")]
    NotFound {
        /// `workload`, `grant`, …
        what: &'static str,
        name: String,
    },
    /// The document is not valid; one line per error.
    #[error("the request is not valid: {}", .0.first().map_or("no reason given", String::as_str))]
    Invalid(Vec<String>),
    #[error("{error}")]
    Forbidden { error: String, remedy: String },
    /// It contradicts what is there.
    #[error("{error}")]
    Conflict { error: String, remedy: String },
    /// The daemon can not do it now, or not on this kernel.
    #[error("{error}")]
    Unavailable { error: String, remedy: String },
}

/// Which records are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventFilter {
    /// Only verdicts `deny`.
    pub denied: bool,
    /// Only those of the workload of this name.
    pub workload: Option<String>,
    /// At most so many, the newest.
    pub limit: usize,
}

/// What the server has to say about a request, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Absent where the request reached no route.
    pub route: Option<Route>,
    /// Absent where the caller is not known, as on TCP.
    pub role: Option<Role>,
    /// The HTTP status; 503 for a connection that was over a limit, 400 for what was not HTTP.
    pub status: u16,
}

/// The daemon.
pub trait Service: Send + Sync + 'static {
    /// The trust domain of this node's identities, as `example.org`.
    fn trust_domain(&self) -> &str;

    /// The name of the workload that a process belongs to, by its tag or its cgroup; `None` for a
    /// process that is not an agent's. Must answer from the kernel, not from a cache: it decides
    /// whether the caller may speak at all.
    ///
    /// # Errors
    /// If it can not be told; the caller is then refused.
    fn caller_workload(&self, pid: u32) -> Result<Option<String>, ServiceError>;

    fn status(&self) -> impl Future<Output = Result<Status, ServiceError>> + Send;

    fn workloads(&self) -> impl Future<Output = Result<Vec<WorkloadView>, ServiceError>> + Send;

    /// The workload of this name, SPIFFE ID or cgroup.
    fn workload(
        &self,
        name: &str,
    ) -> impl Future<Output = Result<WorkloadView, ServiceError>> + Send;

    fn grants(&self) -> impl Future<Output = Result<Vec<GrantView>, ServiceError>> + Send;

    fn grant(&self, id: &str) -> impl Future<Output = Result<GrantView, ServiceError>> + Send;

    /// Adds the grant of a manifest, given as the bytes of a JSON object, as they were received.
    fn add_grant(
        &self,
        caller: &Caller,
        manifest: &[u8],
    ) -> impl Future<Output = Result<GrantView, ServiceError>> + Send;

    fn revoke_grant(
        &self,
        caller: &Caller,
        id: &str,
        reason: &str,
    ) -> impl Future<Output = Result<GrantView, ServiceError>> + Send;

    /// What would happen, by the same decision over the compiled tables. Leaves
    /// [`Explanation::remedy`] empty.
    fn explain(
        &self,
        request: &ExplainRequest,
    ) -> impl Future<Output = Result<Explanation, ServiceError>> + Send;

    /// The newest denial among the workloads `viewer` may see, or of the one named; `None` where
    /// there was none. Leaves [`Explanation::remedy`] empty.
    fn last_denial(
        &self,
        viewer: &Viewer,
        workload: Option<&str>,
    ) -> impl Future<Output = Result<Option<LastDenial>, ServiceError>> + Send;

    /// Makes the calling process a workload of `identity`: when this returns, it is in the
    /// workload's cgroup and is decided by its tag. The caller's process must still be alive
    /// ([`Caller::is_alive`]) after it was moved, else nothing stays behind.
    ///
    /// A name or identity that is running already is a conflict unless the new grant gives it
    /// nothing it has not.
    fn confine(
        &self,
        caller: &Caller,
        identity: &str,
        request: &Confine,
    ) -> impl Future<Output = Result<Confined, ServiceError>> + Send;

    /// Takes a container in that a runtime is about to start: when this returns, what its first
    /// process does is decided by the tag of its workload, if it is an agent's.
    fn announce(
        &self,
        announcement: &Announcement,
    ) -> impl Future<Output = Result<Announced, ServiceError>> + Send;

    fn set_diagnostics(
        &self,
        enabled: bool,
    ) -> impl Future<Output = Result<(), ServiceError>> + Send;

    /// Looks for the granted executables again, as after a package upgrade.
    fn refresh_executables(&self) -> impl Future<Output = Result<Refreshed, ServiceError>> + Send;

    /// The newest records as JSON lines without their newline, oldest first. Only those that
    /// `viewer` may see.
    fn recent_events(
        &self,
        viewer: &Viewer,
        filter: &EventFilter,
    ) -> impl Future<Output = Result<Vec<Arc<str>>, ServiceError>> + Send;

    /// All records from now on, as JSON lines without their newline.
    fn subscribe(&self) -> broadcast::Receiver<Arc<str>>;

    /// The metrics in the text format of Prometheus.
    fn render_metrics(&self) -> String;

    /// Whether everything that is required is in place.
    ///
    /// # Errors
    /// What is missing, as one sentence.
    fn ready(&self) -> Result<(), String>;

    /// Counts a request that was answered. Must not block.
    fn record_request(&self, outcome: Outcome);
}
