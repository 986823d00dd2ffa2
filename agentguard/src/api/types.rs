//! What goes over the control socket.
//!
//! Wire types only: they carry words and numbers and know nothing of how they come about. A request
//! with an unknown field is refused, so that a misspelt restriction is never dropped in silence.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::audit::family::Family;
use crate::audit::record::Inherited;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What happens to a denied request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Record, let through.
    Audit,
    /// Record, refuse.
    Enforce,
}

impl From<agentguard_common::Mode> for Mode {
    fn from(mode: agentguard_common::Mode) -> Self {
        match mode {
            agentguard_common::Mode::Audit => Self::Audit,
            agentguard_common::Mode::Enforce => Self::Enforce,
        }
    }
}

impl From<Mode> for agentguard_common::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Audit => Self::Audit,
            Mode::Enforce => Self::Enforce,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(agentguard_common::Mode::from(*self).as_str())
    }
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Not an agent: agentguard has no say.
    Unmanaged,
    Allow,
    Deny,
}

impl From<agentguard_common::Verdict> for Verdict {
    fn from(verdict: agentguard_common::Verdict) -> Self {
        match verdict {
            agentguard_common::Verdict::Unmanaged => Self::Unmanaged,
            agentguard_common::Verdict::Allow => Self::Allow,
            agentguard_common::Verdict::Deny(_) => Self::Deny,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Unmanaged => "unmanaged",
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// How much of the promise can be kept. Ordered: less comes first.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    ToSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum ProtectionLevel {
    None,
    Partial,
    Full,
}

impl fmt::Display for ProtectionLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Partial => "partial",
            Self::Full => "full",
        })
    }
}

/// Whether one hook is in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LayerState {
    Active,
    Unavailable,
}

impl fmt::Display for LayerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Active => "active",
            Self::Unavailable => "unavailable",
        })
    }
}

/// One hook of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Layer {
    /// `portable` or `lsm`.
    pub layer: String,
    /// The kernel's own name of the hook.
    pub hook: String,
    pub state: LayerState,
    /// Why it is unavailable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How to get it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// How much of the promise this kernel keeps, hook by hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Protection {
    pub level: ProtectionLevel,
    pub layers: Vec<Layer>,
}

/// Grants by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GrantCounts {
    pub pending: u64,
    pub active: u64,
    pub expired: u64,
    pub revoked: u64,
}

/// Verdicts since the tables were made; `decided = logged + aggregated + lost`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventCounts {
    pub decided: u64,
    pub logged: u64,
    pub aggregated: u64,
    pub lost: u64,
}

/// One error in a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ManifestErrorView {
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// From 1.
    pub line: u64,
    /// From 1.
    pub column: u64,
    /// The path of the field, as `spec.egress[0].ports[0].port`; empty for the whole document.
    pub field: String,
    pub message: String,
}

impl fmt::Display for ManifestErrorView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file.display(), self.line, self.column)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// The directory of manifests as it was last read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Manifests {
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// Absent before the first reading.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub last_load: Option<Timestamp>,
    /// While there are any, what is enforced is what was valid before.
    pub errors: Vec<ManifestErrorView>,
    /// The files of which something else is in force than what they hold now.
    #[serde(default)]
    pub held: Vec<HeldManifest>,
}

/// A file with an error, which is held to what it last said without one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeldManifest {
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// When that was read first.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
}

impl fmt::Display for HeldManifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: what it said first at {} is in force", self.file.display(), self.since)
    }
}

/// The state of the daemon. A caller who may see only what is its own finds the counts of the
/// node and the manifests left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    pub version: String,
    pub node: String,
    pub uptime_seconds: u64,
    pub mode: Mode,
    pub protection: Protection,
    /// What no layer on this kernel covers, one sentence each.
    pub gaps: Vec<String>,
    /// The generation of the tables that is enforced.
    pub generation: u64,
    /// Absent for a caller who may see only what is its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub totals: Option<Totals>,
}

/// What `status` tells of the whole node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Totals {
    pub workloads: u64,
    pub grants: GrantCounts,
    /// Grants that never expire.
    pub standing_grants: u64,
    pub manifests: Manifests,
    pub events: EventCounts,
    /// Absent where no runtime is asked to wait.
    #[serde(default)]
    pub starts: Option<Starts>,
}

/// The container runtime that waits for the daemon before each start (NRI).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Starts {
    pub state: StartsState,
    /// The name and the version of the runtime; absent while it does not wait.
    pub runtime: Option<String>,
}

/// Whether the container runtime waits for the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StartsState {
    Wait,
    /// No runtime offers it here.
    Absent,
    /// One does, or should, and does not wait.
    Lost,
}

/// One workload on this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkloadView {
    pub name: String,
    /// The SPIFFE ID; absent while the workload is known to be an agent but not yet which.
    pub identity: Option<String>,
    /// Path below the cgroup v2 root.
    pub cgroup: String,
    pub mode: Mode,
    pub protection: ProtectionLevel,
    /// Which identity source found it.
    pub source: String,
    pub processes: u64,
    /// The generation of its allow-list.
    pub generation: u64,
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// Who started it with `agentguard exec`; absent for what was found.
    pub owner: Option<u32>,
    /// The pod that it is, or is in; absent for what is in none.
    #[serde(default)]
    pub pod: Option<PodView>,
    /// Names of the containers in it.
    #[serde(default)]
    pub containers: Vec<String>,
    /// Verdicts `deny`, in any mode.
    pub denied: u64,
}

/// Where a grant is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum GrantState {
    Pending,
    Active,
    Expired,
    Revoked,
}

impl fmt::Display for GrantState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        })
    }
}

/// When a grant ends: a time, or the word `never`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    At(Timestamp),
    Never,
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(time) => f.pad(&time.to_string()),
            Self::Never => f.pad("never"),
        }
    }
}

impl Serialize for Expiry {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Expiry {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "never" {
            return Ok(Self::Never);
        }
        text.parse().map(Self::At).map_err(|_| {
            serde::de::Error::custom(format_args!(
                "{text:?} is neither `never` nor a time in RFC 3339 form"
            ))
        })
    }
}

/// One grant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GrantView {
    pub id: String,
    /// An exact SPIFFE ID, or a prefix, which ends with `/`.
    pub subject: String,
    pub scopes: Vec<String>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub not_before: Option<Timestamp>,
    /// RFC 3339, or `never`.
    #[schema(value_type = String)]
    pub expires_at: Expiry,
    pub state: GrantState,
    /// Which grant source it came from: a file, the API, a token.
    pub source: String,
    pub granted_by: String,
    pub reason: String,
}

/// Why a grant is taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// Not empty.
    pub reason: String,
}

/// Transport protocols as scopes name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
    Icmp,
}

impl Protocol {
    /// Whether requests of this protocol carry a port.
    #[must_use]
    pub fn has_ports(self) -> bool {
        agentguard_common::Protocol::from(self).has_ports()
    }
}

impl From<Protocol> for agentguard_common::Protocol {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
            Protocol::Sctp => Self::Sctp,
            Protocol::Icmp => Self::Icmp,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(agentguard_common::Protocol::from(*self).as_str())
    }
}

/// What an explanation is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "action", rename_all = "lowercase", deny_unknown_fields)]
pub enum Target {
    /// Connecting a socket.
    Connect {
        /// An address, or a name that the daemon resolves.
        host: String,
        /// Zero where the protocol has no ports.
        port: u16,
        protocol: Protocol,
    },
    /// Sending a datagram.
    Send {
        /// An address, or a name that the daemon resolves.
        host: String,
        /// Zero where the protocol has no ports.
        port: u16,
        protocol: Protocol,
    },
    /// Binding a socket to a local port.
    Bind { port: u16, protocol: Protocol },
    /// Letting others connect to a local port.
    Listen { port: u16, protocol: Protocol },
    /// Connecting, or sending, to somebody else's unix socket at a path.
    Unix {
        /// Absolute, as the one who serves it sees it.
        #[schema(value_type = String)]
        path: PathBuf,
    },
    /// Connecting, or sending, to somebody else's unix socket with an abstract name.
    Abstract {
        /// Without the leading NUL.
        name: String,
    },
    /// Making a socket of a family other than IP's.
    Socket {
        /// As `AF_VSOCK`, or as `AF/40`.
        #[schema(value_type = String)]
        family: Family,
        /// The protocol within the family.
        #[serde(default)]
        protocol: u16,
    },
    /// Running a file.
    Exec {
        /// Absolute, as the workload sees it.
        #[schema(value_type = String)]
        path: PathBuf,
    },
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect { host, port, protocol } => {
                f.write_str("connect to ")?;
                write_endpoint(f, host, *port, *protocol)
            }
            Self::Send { host, port, protocol } => {
                f.write_str("send to ")?;
                write_endpoint(f, host, *port, *protocol)
            }
            Self::Bind { port, protocol } => write!(f, "bind to {port}/{protocol}"),
            Self::Listen { port, protocol } => write!(f, "listening on {port}/{protocol}"),
            Self::Unix { path } => write!(f, "connect to the unix socket {}", path.display()),
            Self::Abstract { name } => write!(f, "connect to the abstract unix socket {name}"),
            Self::Socket { family, protocol: 0 } => write!(f, "socket of family {family}"),
            Self::Socket { family, protocol } => {
                write!(f, "socket of family {family}, protocol {protocol}")
            }
            Self::Exec { path } => write!(f, "exec of {}", path.display()),
        }
    }
}

fn write_endpoint(
    f: &mut fmt::Formatter<'_>,
    host: &str,
    port: u16,
    protocol: Protocol,
) -> fmt::Result {
    if !protocol.has_ports() {
        write!(f, "{host}/{protocol}")
    } else if host.contains(':') {
        write!(f, "[{host}]:{port}/{protocol}")
    } else {
        write!(f, "{host}:{port}/{protocol}")
    }
}

/// What would happen, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExplainRequest {
    /// The name, SPIFFE ID or cgroup of a workload.
    pub workload: String,
    pub target: Target,
}

/// Why a request is, or would be, allowed or denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    pub workload: String,
    /// Absent while the workload's identity is not known.
    pub identity: Option<String>,
    pub target: Target,
    pub verdict: Verdict,
    /// The word for why it is denied, as records have it; absent where it is not denied.
    pub reason: Option<String>,
    pub mode: Mode,
    /// Whether it is really stopped: denied, in mode `enforce`, and by a hook that is active.
    pub refused: bool,
    /// The scope that permits it, or that did.
    pub scope: Option<String>,
    /// The grant that permits it, or that did.
    pub grant: Option<String>,
    #[schema(value_type = Option<String>)]
    pub expires_at: Option<Expiry>,
    /// The hook that answers; absent where none does on this kernel.
    pub hook: Option<String>,
    pub layer: Option<String>,
    /// Why, as one sentence.
    pub because: String,
    /// Scopes of the catalogue that would permit it.
    pub permitting_scopes: Vec<String>,
    /// What would permit it, one command or sentence each, best first. Filled in by the server.
    #[serde(default)]
    pub remedy: Vec<String>,
}

/// The last request of a workload that was denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LastDenial {
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// The process that asked.
    pub pid: u32,
    #[schema(value_type = Option<String>)]
    pub executable: Option<PathBuf>,
    /// As it was decided then.
    pub explanation: Explanation,
}

/// Asks that the calling process itself becomes a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Confine {
    /// Letters, digits, `.`, `_`, `-`, at most 63; absent for the executable's name.
    #[serde(default)]
    pub name: Option<String>,
    /// A SPIFFE ID; absent for `spiffe://<trust domain>/user/<uid>/<name>`. Who is not root may
    /// choose only below its own `…/user/<uid>/`.
    #[serde(default)]
    pub identity: Option<String>,
    /// Scopes granted to it for `ttl`; none leaves it what is granted to its identity otherwise.
    pub scopes: Vec<String>,
    /// As `90m` or `8h`; required where there are scopes.
    #[serde(default)]
    pub ttl: Option<String>,
    pub mode: Mode,
    /// The command with its arguments, for the record.
    pub command: Vec<String>,
    /// What will be run: absolute, as the client resolved it.
    #[schema(value_type = String)]
    pub executable: PathBuf,
    /// IP sockets the process has already, for the record: what is sent on one is judged by the
    /// cgroup it was made in, so no scope holds it.
    #[serde(default)]
    pub inherited: Vec<InheritedSocket>,
}

/// A container that a runtime is about to start: its first process waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Announcement {
    /// The runtime's identifier.
    pub id: String,
    /// Its first process, as the host sees it.
    pub pid: u32,
    /// What will be its root, as that process names it now.
    #[schema(value_type = String)]
    pub root: PathBuf,
    /// Its name; empty for a sandbox.
    #[serde(default)]
    pub name: String,
    /// Whether it is a pod's sandbox.
    #[serde(default)]
    pub is_sandbox: bool,
    /// The sandbox that it is in, or its own identifier where it is one; absent without pods.
    #[serde(default)]
    pub sandbox: Option<String>,
    /// The pod that it is of; absent without pods.
    #[serde(default)]
    pub pod: Option<PodView>,
    /// Its labels, where it is in no pod.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The first word of its command.
    #[serde(default)]
    pub command: Option<String>,
    /// Its `PATH`.
    #[serde(default)]
    pub search_path: Option<String>,
}

/// A Kubernetes pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PodView {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

/// What became of a container that was announced: it may be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Announced {
    /// The workload that it belongs to; absent where it is no agent's.
    pub workload: Option<String>,
    /// Absent where it is no agent's, or the identity is not known yet.
    pub identity: Option<String>,
}

/// An IP socket that a command would have inherited, or has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InheritedSocket {
    pub descriptor: i32,
    /// Whether it was closed before the command began.
    pub closed: bool,
}

impl From<&InheritedSocket> for Inherited {
    fn from(socket: &InheritedSocket) -> Self {
        let InheritedSocket { descriptor, closed } = *socket;
        Self { descriptor, closed }
    }
}

/// The calling process is a workload now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Confined {
    pub workload: String,
    pub identity: String,
    /// The grant that was made of the scopes; absent where there were none.
    pub grant: Option<String>,
    /// Path below the cgroup v2 root.
    pub cgroup: String,
    #[schema(value_type = Option<String>)]
    pub expires_at: Option<Expiry>,
    /// What the developer should know, one sentence each.
    pub warnings: Vec<String>,
}

/// Turns the datapath's own diagnostics on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Diagnostics {
    pub enabled: bool,
}

/// What came of looking for granted executables again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Refreshed {
    /// The generation of the tables that holds what was found.
    pub generation: u64,
    /// Files now in the tables.
    pub executables: u64,
}

/// Why a call did not do what was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// One sentence.
    pub error: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Further lines, as the errors of a manifest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
}
