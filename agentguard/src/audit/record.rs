//! What an audit record says, field by field.
//!
//! Names and meanings are stable: a field is never renamed or given another meaning, new ones may
//! be added. Every key is always present; what is not known, or does not apply, is `null`. Must not
//! know where records go or how lines are linked.

use std::borrow::Cow;
use std::net::IpAddr;

use agentguard_common::event::{self, Event, RequestKind, UnknownRequestKind};
use agentguard_common::protocol::Protocol as KnownProtocol;
use agentguard_common::{Action, Mode, Reason, Verdict};
use jiff::Timestamp;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::chain::{Hash, nanoseconds};
use super::family::Family;
use super::text::Text;

/// One line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    /// Number of the line in its chain, from 1, without gaps; goes on across files and restarts.
    pub seq: u64,
    /// When it happened: RFC 3339, UTC, nanoseconds. Lines stand in the order in which they were
    /// written, so the time of one may lie before that of the line above.
    #[serde(with = "nanoseconds")]
    #[schemars(with = "String")]
    pub time: Timestamp,
    /// The node that wrote it.
    pub node: Text,
    /// What happened.
    #[serde(flatten)]
    pub body: RecordBody,
    /// `hash` of the line before; 64 zeros in the first line.
    pub prev: Hash,
    /// SHA-256 of this line's bytes before `,"hash":`.
    pub hash: Hash,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RecordBody {
    /// A request of a workload was decided.
    Verdict(Box<VerdictRecord>),
    /// The daemon started.
    Start(StartRecord),
    /// The daemon stops; what is enforced stays enforced.
    Stop(StopRecord),
    /// A grant changed its state.
    Grant(Box<GrantRecord>),
    /// A workload came, changed or went.
    Workload(Box<WorkloadRecord>),
    /// A manifest was refused; what is enforced did not change.
    ManifestError(ManifestErrorRecord),
    /// Records are missing at this place.
    Loss(LossRecord),
    /// A crash had left half a line; it was closed off.
    Recovered(RecoveredRecord),
    /// A new file begins.
    Rotated(RotatedRecord),
}

impl RecordBody {
    /// What is dropped last when there is no room for all: everything but requests that were
    /// allowed.
    #[must_use]
    pub(crate) fn class(&self) -> Class {
        match self {
            Self::Verdict(record) => match record.outcome.verdict() {
                VerdictWord::Deny => Class::Denied,
                VerdictWord::Allow | VerdictWord::Unmanaged => Class::Allowed,
            },
            Self::Start(_)
            | Self::Stop(_)
            | Self::Grant(_)
            | Self::Workload(_)
            | Self::ManifestError(_)
            | Self::Loss(_)
            | Self::Recovered(_)
            | Self::Rotated(_) => Class::Other,
        }
    }
}

/// How records are told apart when some have to be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Allowed,
    Denied,
    Other,
}

/// A request of a workload, and what was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerdictRecord {
    /// Nanoseconds of boot time at which the kernel decided; orders records of one boot.
    pub boot_ns: u64,
    /// Who asked.
    pub workload: Workload,
    /// Which of its processes asked.
    pub process: Process,
    /// What was asked.
    pub request: Request,
    /// What was decided and done.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// The scope that decided: the one that allows, or the one whose grant is over; null if none.
    pub scope: Option<Text>,
    /// The grant that decided; null if none.
    pub grant: Option<Text>,
    /// The generation of the allow-list that decided.
    pub allowlist_generation: u64,
    /// The kernel hook that met the request.
    pub hook: Word<event::Hook>,
    /// The layer of the hook.
    pub layer: Layer,
    /// How many identical verdicts were folded into the previous record of the same request since
    /// that was written. They are not counted by this record itself, which stands for one.
    pub folded: u64,
}

impl VerdictRecord {
    /// Whether both tell of the same decision of the kernel: all is the same that the kernel itself tells.
    /// What was looked up may differ: words for what it knows by number, and what else is told of the process.
    #[must_use]
    pub(crate) fn is_of_one_decision_with(&self, other: &Self) -> bool {
        let when = |of: &Self| (of.boot_ns, of.hook, of.allowlist_generation, of.folded);
        let who = |of: &Self| {
            let Process { pid, tid, uid, comm, detached, .. } = of.process.clone();
            (of.workload.cgroup_id, pid, tid, uid, comm, detached)
        };
        let what = |of: &Self| (of.outcome.verdict, of.outcome.reason, of.outcome.mode);
        when(self) == when(other)
            && who(self) == who(other)
            && what(self) == what(other)
            && self.request == other.request
    }
}

/// What was decided, and what was done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Outcome {
    /// The verdict, whatever the mode.
    verdict: VerdictWord,
    /// Why it is denied; null unless it is.
    reason: Option<Word<Reason>>,
    /// The mode in force for the workload.
    mode: Word<Mode>,
    /// Whether the request was stopped. A denied request is not refused in audit mode, and neither is
    /// a process of the workload that another one sends out of it where the kernel can not end it.
    refused: bool,
}

impl Outcome {
    /// What `mode` makes of `verdict`.
    #[must_use]
    pub fn new(verdict: Verdict, mode: Mode) -> Self {
        Self {
            verdict: verdict.into(),
            reason: verdict.reason().map(Word),
            mode: Word(mode),
            refused: verdict.action(mode) == Action::Refuse,
        }
    }

    /// The same, where the kernel can not do what the mode asks for.
    #[must_use]
    pub fn let_through(self) -> Self {
        Self { refused: false, ..self }
    }

    #[must_use]
    pub fn verdict(&self) -> VerdictWord {
        self.verdict
    }

    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        self.reason.map(|Word(reason)| reason)
    }

    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode.0
    }

    #[must_use]
    pub fn refused(&self) -> bool {
        self.refused
    }
}

/// A verdict without its reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerdictWord {
    /// Granted.
    Allow,
    /// Not granted.
    Deny,
    /// Not an agent.
    Unmanaged,
}

impl From<Verdict> for VerdictWord {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Unmanaged => Self::Unmanaged,
            Verdict::Allow => Self::Allow,
            Verdict::Deny(_) => Self::Deny,
        }
    }
}

/// Which hooks.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// Hooks of every supported kernel.
    Portable,
    /// Hooks of the BPF LSM.
    Lsm,
}

impl From<event::Layer> for Layer {
    fn from(layer: event::Layer) -> Self {
        match layer {
            event::Layer::Portable => Self::Portable,
            event::Layer::Lsm => Self::Lsm,
        }
    }
}

/// The cgroup subtree whose processes act as one agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Workload {
    /// Its identity (SPIFFE ID); `null` while it is not known.
    pub identity: Option<Text>,
    /// Its name on this node.
    pub name: Text,
    /// Number of the cgroup of the process that asked (the inode of the cgroup's directory).
    pub cgroup_id: u64,
    /// Path of the workload's cgroup below the cgroup root; null when it is gone.
    pub cgroup: Option<Text>,
    /// The systemd unit; null if it is none.
    pub unit: Option<Text>,
    /// The container; null if it is none.
    pub container: Option<Container>,
    /// The pod; null if it is in none.
    pub pod: Option<Pod>,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Container {
    /// The runtime's identifier.
    pub id: Text,
    /// Its name; null where the runtime gives none.
    pub name: Option<Text>,
    /// Its image as it was asked for; null where the runtime does not say.
    pub image: Option<Text>,
}

/// A Kubernetes pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pod {
    /// Its namespace.
    pub namespace: Text,
    /// Its name there.
    pub name: Text,
    /// Tells apart pods that had the same name.
    pub uid: Text,
}

/// A process of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Process {
    /// Process id, as the host sees it.
    pub pid: u32,
    /// Thread id, as the host sees it.
    pub tid: u32,
    /// User id, as the host sees it.
    pub uid: u32,
    /// The thread's name, which it can choose freely.
    pub comm: Text,
    /// When it started; with the pid this tells it apart for ever. Null when it was gone before it
    /// could be read.
    pub start: Option<ProcessStart>,
    /// What it runs, by the path it was started by; null when that is not known.
    pub executable: Option<Text>,
    /// Its ancestors, the nearest first, at most eight.
    pub parents: Vec<Ancestor>,
    /// Whether another task stood at the hook than the one that asked, as for a packet that was
    /// queued. The process is then the one that stood there.
    pub detached: bool,
}

impl Process {
    /// Longest parent chain in a record.
    pub const MAX_PARENTS: usize = 8;

    /// The nearest [`Process::MAX_PARENTS`] of `parents`.
    #[must_use]
    pub fn with_parents(mut self, parents: impl IntoIterator<Item = Ancestor>) -> Self {
        self.parents = parents.into_iter().take(Self::MAX_PARENTS).collect();
        self
    }

    /// What the kernel's record itself says about the process that asked.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        Self {
            pid: event.pid,
            tid: event.tid,
            uid: event.uid,
            comm: Text::new(until_nul(&event.comm)),
            start: None,
            executable: None,
            parents: Vec::new(),
            detached: event.detached != 0,
        }
    }
}

/// When a process started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProcessStart {
    /// RFC 3339, UTC, nanoseconds.
    #[serde(with = "nanoseconds")]
    #[schemars(with = "String")]
    pub time: Timestamp,
    /// Nanoseconds of boot time.
    pub boot_ns: u64,
}

/// An ancestor of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Ancestor {
    /// Process id, as the host sees it.
    pub pid: u32,
    /// When it started; null when that is not known.
    pub start: Option<ProcessStart>,
    /// What it runs; null when that is not known.
    pub executable: Option<Text>,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Request {
    /// Connect a socket.
    Connect(Destination),
    /// Send a datagram to an address given with the call.
    Send(Destination),
    /// A packet that leaves a socket of the workload.
    Packet(Destination),
    /// A packet that answers on a socket others connected to.
    Reply(Endpoint),
    /// Bind a socket to a local port.
    Bind(Endpoint),
    /// Open a raw IP socket.
    RawSocket {
        /// Its IP protocol.
        protocol: IpProtocol,
    },
    /// Let others connect to a socket.
    Listen(Endpoint),
    /// Take a connection that somebody else made.
    Accept(Endpoint),
    /// Make a socket of a family other than IP's.
    Socket {
        /// Its family.
        family: Family,
        /// Its protocol within the family.
        protocol: u16,
    },
    /// Connect a unix socket.
    UnixConnect(UnixSocket),
    /// Send a datagram to a unix socket.
    UnixSend(UnixSocket),
    /// Run a file.
    Exec {
        /// Of a unix socket: the path that its server bound, in the server's mounts; null where it
        /// has none. Of an exec: the path as the caller gave it; null where the hook does not see
        /// it. The file, not the path, was decided on.
        path: Option<Text>,
        /// The file that was to run.
        file: File,
    },
    /// Leave the workload's cgroup.
    Leave,
    /// Something the hook could not read.
    Malformed,
}

impl Request {
    /// What the kernel recorded; `path` is the one of an exec, up to its NUL, or the name of a unix
    /// socket (see [`BoundName::of`]).
    ///
    /// # Errors
    /// When the record is of a kind that this version does not know.
    pub fn of(event: &Event, path: Option<&[u8]>) -> Result<Self, UnknownRequestKind> {
        let protocol = IpProtocol(event.key.protocol);
        let destination =
            || Destination { address: event.address().ip(), protocol, port: event.key.port };
        let endpoint = Endpoint { protocol, port: event.key.port };
        Ok(match RequestKind::try_from(event.kind)? {
            RequestKind::Connect => Self::Connect(destination()),
            RequestKind::Send => Self::Send(destination()),
            RequestKind::Packet => Self::Packet(destination()),
            RequestKind::Reply => Self::Reply(endpoint),
            RequestKind::Bind => Self::Bind(endpoint),
            RequestKind::RawSocket => Self::RawSocket { protocol },
            RequestKind::Listen => Self::Listen(endpoint),
            RequestKind::Accept => Self::Accept(endpoint),
            RequestKind::Socket => {
                let (family, protocol) = event.socket();
                Self::Socket { family: Family(family), protocol }
            }
            RequestKind::UnixConnect => Self::UnixConnect(UnixSocket::of(event, path)),
            RequestKind::UnixSend => Self::UnixSend(UnixSocket::of(event, path)),
            RequestKind::Exec => {
                let file = event.file();
                Self::Exec {
                    path: path.map(|path| Text::new(until_nul(path))),
                    file: File {
                        device: file.device,
                        inode: file.inode,
                        generation: file.generation,
                    },
                }
            }
            RequestKind::Leave => Self::Leave,
            RequestKind::Malformed => Self::Malformed,
        })
    }
}

/// Where a connect, a datagram or a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Destination {
    /// The address that was decided on: an IPv6 address that has an IPv4 address in it (IPv4-mapped,
    /// -compatible, -translated, 6to4, NAT64) is shown as that one.
    #[schemars(with = "String")]
    pub address: IpAddr,
    pub protocol: IpProtocol,
    /// Zero where the protocol has no ports.
    pub port: u16,
}

/// Where a socket is bound or listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Endpoint {
    pub protocol: IpProtocol,
    /// Zero lets the kernel choose.
    pub port: u16,
}

/// A unix socket at the other end, by the name that its server bound.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UnixSocket {
    /// Of a unix socket: the path that its server bound, in the server's mounts; null where it has
    /// none. Of an exec: the path as the caller gave it; null where the hook does not see it. The
    /// file, not the path, was decided on.
    pub path: Option<Text>,
    /// Its abstract name, without the leading NUL; null where it has none.
    #[serde(rename = "abstract")]
    pub abstract_name: Option<Text>,
    /// Whose it is: the workload's `own`, made by one of its processes; `unnamed`, of somebody
    /// else who never bound it to a name and handed it over; any `other`; null where that is not
    /// known.
    pub peer: Option<Peer>,
}

/// Whose the socket at the other end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    Own,
    Unnamed,
    Other,
}

impl UnixSocket {
    fn of(event: &Event, path: Option<&[u8]>) -> Self {
        let (path, abstract_name) = match BoundName::of(event, path.unwrap_or_default()) {
            BoundName::Path(path) => (Some(Text::new(path)), None),
            BoundName::Abstract(name) => (None, Some(Text::new(name))),
            BoundName::None => (None, None),
        };
        let peer = [
            (agentguard_common::Peer::Own, Peer::Own),
            (agentguard_common::Peer::Unnamed, Peer::Unnamed),
            (agentguard_common::Peer::Other, Peer::Other),
        ];
        let peer = peer.into_iter().find(|(peer, _)| *peer as u8 == event.key.protocol);
        Self { path, abstract_name, peer: peer.map(|(_, word)| word) }
    }
}

/// The name that a server bound its unix socket by, as it gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BoundName {
    Path(Vec<u8>),
    /// Without its leading NUL; it may have others.
    Abstract(Vec<u8>),
    None,
}

impl BoundName {
    /// The name in the record of a unix socket.
    #[must_use]
    pub fn of(event: &Event, path: &[u8]) -> Self {
        match path.get(..usize::from(event.name_length)) {
            None | Some([]) => Self::None,
            Some([0, name @ ..]) => Self::Abstract(name.to_vec()),
            Some(path) => Self::Path(until_nul(path).to_vec()),
        }
    }
}

/// A file as the kernel resolved it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct File {
    /// The file system: major number in the upper 12 bits, minor in the lower 20.
    pub device: u32,
    /// Its number in the file system.
    pub inode: u64,
    /// Tells apart files that had the same inode number; zero where the file system can not.
    pub generation: u32,
}

/// An IP protocol: `TCP`, `UDP`, `SCTP` or `ICMP`, or its number after `IP/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpProtocol(pub u8);

impl Serialize for IpProtocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match KnownProtocol::try_from(self.0) {
            Ok(KnownProtocol::Any) | Err(_) => {
                serializer.collect_str(&format_args!("IP/{}", self.0))
            }
            Ok(
                known @ (KnownProtocol::Icmp
                | KnownProtocol::Tcp
                | KnownProtocol::Udp
                | KnownProtocol::Sctp),
            ) => serializer.serialize_str(known.as_str()),
        }
    }
}

impl<'de> Deserialize<'de> for IpProtocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = Cow::<str>::deserialize(deserializer)?;
        KnownProtocol::ALL
            .into_iter()
            .find(|known| known.as_str() == word)
            .map(|known| known as u8)
            .or_else(|| word.strip_prefix("IP/")?.parse().ok())
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom(format!("`{word}` is no IP protocol")))
    }
}

impl JsonSchema for IpProtocol {
    fn schema_name() -> Cow<'static, str> {
        "IpProtocol".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(TCP|UDP|SCTP|ICMP|IP/[0-9]{1,3})$",
            "description": "An IP protocol: `TCP`, `UDP`, `SCTP` or `ICMP`, or its number after `IP/`.",
        })
    }
}

/// The daemon started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StartRecord {
    /// The daemon's version.
    pub version: Text,
    /// The running kernel's release.
    pub kernel: Text,
    /// Whether a previous daemon had left protection in the kernel, which this one took over.
    pub adopted: bool,
    /// What each layer can keep of the promise on this kernel.
    pub protection: Vec<LayerProtection>,
}

/// What a layer can keep of the promise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LayerProtection {
    /// The layer.
    pub layer: Layer,
    /// How much of the promise it keeps.
    pub protection: ProtectionWord,
    /// What is missing, where it is not full.
    pub missing: Vec<Missing>,
}

/// How much of the promise is kept.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum ProtectionWord {
    Full,
    Partial,
    None,
}

/// A part of the promise that is not kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Missing {
    /// What is not enforced.
    pub what: Text,
    /// Why.
    pub why: Text,
}

/// The daemon stops.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StopRecord {
    /// Why, as `SIGTERM` or an error.
    pub why: Text,
    /// Whether protection stays in the kernel; false only after `agentguard uninstall`.
    pub protection_stays: bool,
}

/// A grant changed its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GrantRecord {
    /// What became of it.
    pub change: GrantChange,
    /// The grant's name.
    pub grant: Text,
    /// The pattern of identities it is for.
    pub subject: Text,
    /// The scopes it gives.
    pub scopes: Vec<Text>,
    /// From when it holds; null: from when it was added.
    #[serde(with = "nanoseconds::option")]
    #[schemars(with = "Option<String>")]
    pub not_before: Option<Timestamp>,
    /// Until when it holds; null for a standing grant.
    #[serde(with = "nanoseconds::option")]
    #[schemars(with = "Option<String>")]
    pub expires_at: Option<Timestamp>,
    /// Who granted it, in the words of the grant; null where it does not say.
    pub granted_by: Option<Text>,
    /// Why it was granted, in the words of the grant; null where it does not say.
    pub why: Option<Text>,
    /// Who made this change; null where time did.
    pub by: Option<Actor>,
}

/// What became of a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GrantChange {
    /// It is known, and may not hold yet.
    Added,
    /// It holds from now.
    Activated,
    /// Its time is over.
    Expired,
    /// It was taken back.
    Revoked,
}

/// Who made a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Actor {
    /// By which way.
    pub source: ActorSource,
    /// The file, the custom resource, the token's identifier, or the peer's executable.
    pub name: Text,
    /// The peer's user id on the control socket; null elsewhere.
    pub uid: Option<u32>,
    /// The peer's process id on the control socket; null elsewhere.
    pub pid: Option<u32>,
}

/// By which way a change was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActorSource {
    /// A manifest in the manifests directory.
    Manifest,
    /// A Kubernetes custom resource.
    Kubernetes,
    /// The control API.
    Api,
    /// A signed token.
    Token,
}

/// A workload came, changed or went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkloadRecord {
    /// What became of it.
    pub change: WorkloadChange,
    /// Which one.
    pub workload: Workload,
    /// The mode in force for it from now.
    pub mode: Word<Mode>,
    /// How much of the promise is kept for it.
    pub protection: ProtectionWord,
    /// What is missing, where protection is not full.
    pub missing: Vec<Missing>,
    /// Network sockets that its first process would have had from before, when it came.
    #[serde(default)]
    pub inherited: Vec<Inherited>,
}

/// A network socket from before a workload came: what is sent on it is held to no scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Inherited {
    /// The number of its file descriptor.
    pub descriptor: i32,
    /// Whether it was closed before the workload's command began.
    pub closed: bool,
}

/// What became of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkloadChange {
    /// It is tagged from now.
    Added,
    /// Its identity, mode or protection is another from now.
    Changed,
    /// Its cgroup is gone.
    Removed,
}

/// A manifest was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ManifestErrorRecord {
    /// The file or custom resource.
    pub source: Text,
    /// Line in the file, from 1; null where there is none.
    pub line: Option<u64>,
    /// Column in the line, from 1; null where there is none.
    pub column: Option<u64>,
    /// What is wrong, with the field and the remedy.
    pub message: Text,
}

/// Records are missing at this place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LossRecord {
    /// Where they were lost.
    pub cause: LossCause,
    /// Records of requests that were allowed.
    pub allowed: u64,
    /// Records of requests that were denied.
    pub denied: u64,
    /// Other records; with `ring_buffer`, those of which it is not known whether allowed.
    pub other: u64,
    /// When the first was lost.
    #[serde(with = "nanoseconds")]
    #[schemars(with = "String")]
    pub since: Timestamp,
    /// When the last was lost, as far as is known.
    #[serde(with = "nanoseconds")]
    #[schemars(with = "String")]
    pub until: Timestamp,
    /// What went wrong; null when there were simply too many.
    pub error: Option<Text>,
}

/// Where records were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossCause {
    /// In the daemon, in front of the log.
    Queue,
    /// In the kernel, in front of the daemon.
    RingBuffer,
}

/// A crash had left half a line, which stays where it is; this record follows it and continues the
/// line before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RecoveredRecord {
    /// Length of what was left, in bytes, without the newline that was added to it.
    pub torn_bytes: u64,
    /// SHA-256 of what was left.
    pub torn_sha256: Hash,
    /// The beginning of what was left.
    pub torn: Text,
}

/// The first record of a file that continues another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RotatedRecord {
    /// `seq` of the oldest record that the log has not removed itself.
    pub first_kept: u64,
    /// How many files are removed at this rotation, to keep the log within its bound.
    pub removed_files: u64,
}

/// A word of the shared vocabulary, as records and manifests spell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word<T>(pub T);

/// What has a fixed set of words.
pub trait Vocabulary: Copy + 'static {
    /// The name of the set.
    const NAME: &'static str;
    /// All of it.
    const ALL: &'static [Self];
    /// The word.
    fn word(self) -> &'static str;
}

macro_rules! vocabulary {
    ($type:ty, $name:literal) => {
        impl Vocabulary for $type {
            const NAME: &'static str = $name;
            const ALL: &'static [Self] = &<$type>::ALL;

            fn word(self) -> &'static str {
                self.as_str()
            }
        }
    };
}

vocabulary!(event::Hook, "Hook");
vocabulary!(Mode, "Mode");
vocabulary!(Reason, "Reason");

impl<T: Vocabulary> Serialize for Word<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.word())
    }
}

impl<'de, T: Vocabulary> Deserialize<'de> for Word<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let word = Cow::<str>::deserialize(deserializer)?;
        T::ALL
            .iter()
            .find(|value| value.word() == word)
            .map(|value| Self(*value))
            .ok_or_else(|| serde::de::Error::custom(format!("`{word}` is no {}", T::NAME)))
    }
}

impl<T: Vocabulary> JsonSchema for Word<T> {
    fn schema_name() -> Cow<'static, str> {
        T::NAME.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let words: Vec<&str> = T::ALL.iter().map(|value| value.word()).collect();
        json_schema!({ "type": "string", "enum": words })
    }
}

/// What a fixed field of the kernel holds before its NUL.
fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or(field)
}
