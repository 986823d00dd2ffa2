//! The shape of manifests as types: what documents are written as, and what the schemas are
//! generated from.
//!
//! Reading does not go through these types: `serde` stops at the first error and has no positions.
//! A test holds the two together: what the reader accepts is what the schemas accept.

use agentguard_common::{Mode, Protocol};
use schemars::JsonSchema;
use serde::Serialize;

use crate::{
    grant::GrantDocument,
    identity::{Selector, Subject, WorkloadDocument},
    scope::{
        Destination, EgressRule, PortRange, ScopeDocument, UnixSocket,
        cluster::ObjectName,
        selector::{LabelKey, LabelSelector, LabelValue, Requirement},
    },
};

/// A named capability, like an OAuth scope, and what it permits.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ScopeManifest {
    /// The version of this form.
    api_version: ApiVersion,
    /// What the document is.
    kind: ScopeKind,
    /// What it is called.
    metadata: Metadata,
    /// What the scope permits.
    spec: ScopeSpec,
}

/// Scopes for a subject within a time window.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GrantManifest {
    /// The version of this form.
    api_version: ApiVersion,
    /// What the document is.
    kind: GrantKind,
    /// What it is called.
    metadata: GrantMetadata,
    /// What is granted to whom.
    spec: GrantSpec,
}

/// Scopes for a subject within a time window, whatever namespace the subject is of. Where there are
/// no namespaces, the same as a Grant.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterGrantManifest {
    /// The version of this form.
    api_version: ApiVersion,
    /// What the document is.
    kind: ClusterGrantKind,
    /// What it is called.
    metadata: Metadata,
    /// What is granted to whom.
    spec: GrantSpec,
}

/// Which processes of a node act as which identity.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadManifest {
    /// The version of this form.
    api_version: ApiVersion,
    /// What the document is.
    kind: WorkloadKind,
    /// What it is called.
    metadata: Metadata,
    /// Which processes, and as whom.
    spec: WorkloadSpec,
}

#[derive(Serialize, JsonSchema)]
enum ApiVersion {
    #[serde(rename = "agentguard.dev/v1alpha1")]
    V1Alpha1,
}

#[derive(Serialize, JsonSchema)]
enum ScopeKind {
    Scope,
}

#[derive(Serialize, JsonSchema)]
enum GrantKind {
    Grant,
}

#[derive(Serialize, JsonSchema)]
#[expect(dead_code, reason = "a grant is written as what it is where there are no namespaces")]
enum ClusterGrantKind {
    ClusterGrant,
}

#[derive(Serialize, JsonSchema)]
enum WorkloadKind {
    Workload,
}

#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Metadata {
    /// An RFC 1123 subdomain, unique per kind.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
    )]
    name: String,
}

#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct GrantMetadata {
    /// An RFC 1123 subdomain, unique per kind and namespace.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
    )]
    name: String,
    /// In a cluster, the namespace whose subjects the grant may name. Elsewhere part of its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    namespace: Option<String>,
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("anyOf" = [{"required": ["egress"]}, {"required": ["exec"]}, {"required": ["unixSockets"]}, {"required": ["listen"]}]))]
struct ScopeSpec {
    /// What grants and tokens say, such as `github:read`; unique.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[a-z0-9]+([:._/-][a-z0-9]+)*$"))]
    scope: String,
    /// What the scope is for, on one line.
    #[schemars(regex(pattern = r"\S"))]
    description: String,
    /// Where connections and datagrams may go.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    egress: Option<Vec<Egress>>,
    /// What may be executed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    exec: Option<Vec<Exec>>,
    /// Which unix sockets of others may be connected and sent to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    unix_sockets: Option<Vec<WireUnixSocket>>,
    /// Where the workload may listen.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    listen: Option<Vec<Ports>>,
}

/// Every destination in `to`, at every port in `ports`.
#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Egress {
    /// Where to.
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    to: Vec<To>,
    /// At which ports; each is one port, a range of ports, or without `port` the whole protocol.
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    ports: Vec<Ports>,
}

/// Where to: exactly one of `ipBlock`, `service`, and `namespaceSelector` with or without
/// `podSelector`.
#[derive(Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend(
    "oneOf" = [{"required": ["ipBlock"]}, {"required": ["service"]}, {"required": ["namespaceSelector"]}],
    "dependentRequired" = {"podSelector": ["namespaceSelector"]},
))]
struct To {
    #[serde(skip_serializing_if = "Option::is_none")]
    ip_block: Option<IpBlock>,
    /// Refused by this version, so not in the schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    dns_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<WireService>,
    /// Which pods of the selected namespaces; without it, all of them. Pods on their node's network
    /// are never among them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pod_selector: Option<WireSelector>,
    /// The namespaces of the pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace_selector: Option<WireSelector>,
}

/// A Kubernetes service at those of its own ports that are among `ports`. Its endpoints are
/// permitted with it, at the ports that these lead to, as they come and go.
#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct WireService {
    /// The namespace of the service.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    namespace: String,
    /// The name of the service.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    name: String,
}

/// What all labels must be, as in a NetworkPolicy. One that asks for nothing is refused.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("anyOf" = [{"required": ["matchLabels"]}, {"required": ["matchExpressions"]}]))]
struct WireSelector {
    /// Labels and the values they must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend(
        "minProperties" = 1,
        "additionalProperties" = {"type": "string", "minLength": 1, "maxLength": 63, "pattern": "^[a-zA-Z0-9]([-a-zA-Z0-9_.]*[a-zA-Z0-9])?$"},
    ))]
    match_labels: Option<std::collections::BTreeMap<String, String>>,
    /// What else must hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), extend("uniqueItems" = true))]
    match_expressions: Option<Vec<WireRequirement>>,
}

/// What must hold of one label.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend(
    "if" = {"properties": {"operator": {"enum": ["In", "NotIn"]}}},
    "then" = {"required": ["values"]},
    "else" = {"not": {"required": ["values"]}},
))]
struct WireRequirement {
    /// The key of the label.
    #[schemars(
        length(min = 1, max = 317),
        regex(
            pattern = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[a-zA-Z0-9]([-a-zA-Z0-9_.]*[a-zA-Z0-9])?$"
        )
    )]
    key: String,
    /// `In` and `NotIn` take values, the others none.
    operator: WireOperator,
    /// The values it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1, max = 63), regex(pattern = r"^[a-zA-Z0-9]([-a-zA-Z0-9_.]*[a-zA-Z0-9])?$")), extend("uniqueItems" = true))]
    values: Option<Vec<String>>,
}

#[derive(Serialize, JsonSchema)]
enum WireOperator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

/// The addresses in `cidr` that are in none of `except`.
#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct IpBlock {
    /// IPv4 or IPv6 with a prefix length; host bits are zero.
    #[schemars(regex(pattern = r"^[0-9a-fA-F.:]+/[0-9]{1,3}$"))]
    cidr: String,
    /// Blocks inside `cidr` that are not permitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")), extend("uniqueItems" = true))]
    except: Option<Vec<String>>,
}

/// One port, a range of ports, or without `port` the whole protocol.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend(
    "dependentRequired" = {"endPort": ["port"]},
    "if" = {"properties": {"protocol": {"enum": ["ICMP", "Any"]}}},
    "then" = {"not": {"required": ["port"]}},
))]
struct Ports {
    /// The IP protocol; `ICMP` and `Any` have no ports.
    protocol: WireProtocol,
    /// The port, or the first one of a range; without it every port.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    port: Option<u16>,
    /// The last port of a range that begins at `port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65535))]
    end_port: Option<u16>,
}

#[derive(Serialize, JsonSchema)]
enum WireProtocol {
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "UDP")]
    Udp,
    #[serde(rename = "SCTP")]
    Sctp,
    #[serde(rename = "ICMP")]
    Icmp,
    Any,
}

#[derive(Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Exec {
    /// An absolute path in the workload's mounts; `*` within one name, `/**` at the end for a tree.
    #[schemars(regex(pattern = "^/[^/]"))]
    path: String,
}

/// A unix socket by the address that its server binds.
#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum WireUnixSocket {
    /// An absolute path in the workload's mounts, without wildcards; its directory is what is looked
    /// up, so the server may make the socket anew.
    Path(#[schemars(regex(pattern = "^/[^/*]"))] String),
    /// A name in the abstract namespace without its leading NUL, at most 107 bytes, without
    /// wildcards.
    Abstract(#[schemars(length(min = 1, max = 107), regex(pattern = r"^[^*]*\S[^*]*$"))] String),
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(extend("oneOf" = [{"required": ["expiresAt"]}, {"required": ["ttl"]}]))]
struct GrantSpec {
    /// Whose identity the grant is for.
    subject: WireSubject,
    /// The scopes, each defined by a Scope.
    #[schemars(length(min = 1), inner(length(min = 1, max = 128), regex(pattern = r"^[a-z0-9]+([:._/-][a-z0-9]+)*$")), extend("uniqueItems" = true))]
    scopes: Vec<String>,
    /// From when it holds: RFC 3339 with offset. Without it, from when it is added.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(
        pattern = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})$"
    ))]
    not_before: Option<String>,
    /// Until when it holds: RFC 3339 with offset, or `never` for a standing grant.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(
        pattern = r"^(never|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2}))$"
    ))]
    expires_at: Option<String>,
    /// Instead of `expiresAt` where the time of creation is known; an error in a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), regex(pattern = "^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?$"))]
    ttl: Option<String>,
    /// Who granted it.
    #[schemars(regex(pattern = r"\S"))]
    granted_by: String,
    /// Why, such as the number of a ticket.
    #[schemars(regex(pattern = r"\S"))]
    reason: String,
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum WireSubject {
    /// One workload identity.
    SpiffeId(
        #[schemars(
            length(max = 2048),
            regex(pattern = r"^spiffe://[a-z0-9._-]+(/[a-zA-Z0-9._-]+)+$")
        )]
        String,
    ),
    /// Every workload identity below a path that ends with `/`.
    SpiffeIdPrefix(
        #[schemars(
            length(max = 2048),
            regex(pattern = r"^spiffe://[a-z0-9._-]+/([a-zA-Z0-9._-]+/)*$")
        )]
        String,
    ),
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WorkloadSpec {
    /// Which processes of the node.
    select: Select,
    /// The identity that the selected processes have.
    #[schemars(length(max = 2048), regex(pattern = r"^spiffe://[a-z0-9._-]+(/[a-zA-Z0-9._-]+)+$"))]
    spiffe_id: String,
    /// What happens to denied requests.
    mode: WireMode,
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
enum Select {
    /// A path below the cgroup v2 root; `*` within one name.
    Cgroup(#[schemars(regex(pattern = "^/[^/]"))] String),
    /// A unit that owns a cgroup.
    SystemdUnit(
        #[schemars(regex(pattern = r"^[a-zA-Z0-9:_.\\@-]+\.(service|scope|slice)$"))] String,
    ),
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
enum WireMode {
    /// Record, let through.
    Audit,
    /// Record, refuse.
    Enforce,
}

impl From<&ScopeDocument> for ScopeManifest {
    fn from(document: &ScopeDocument) -> Self {
        let ScopeDocument { name, scope, description, egress, exec, unix_sockets, listen } =
            document;
        let spec = ScopeSpec {
            scope: scope.to_string(),
            description: description.clone(),
            egress: some_list(egress, Egress::from),
            exec: some_list(exec, |pattern| Exec { path: pattern.to_string() }),
            unix_sockets: some_list(unix_sockets, WireUnixSocket::from),
            listen: some_list(listen, Ports::from),
        };
        let metadata = Metadata { name: name.to_string() };
        Self { api_version: ApiVersion::V1Alpha1, kind: ScopeKind::Scope, metadata, spec }
    }
}

impl From<&GrantDocument> for GrantManifest {
    fn from(document: &GrantDocument) -> Self {
        let GrantDocument { id, subject, scopes, not_before, expiry, granted_by, reason } =
            document;
        let spec = GrantSpec {
            subject: match subject {
                Subject::Exact(id) => WireSubject::SpiffeId(id.to_string()),
                Subject::Prefix(prefix) => WireSubject::SpiffeIdPrefix(prefix.to_string()),
            },
            scopes: scopes.iter().map(ToString::to_string).collect(),
            not_before: not_before.map(|time| time.to_string()),
            expires_at: Some(expiry.to_string()),
            ttl: None,
            granted_by: granted_by.clone(),
            reason: reason.clone(),
        };
        let (namespace, name) = id.parts();
        let metadata =
            GrantMetadata { name: name.to_owned(), namespace: namespace.map(str::to_owned) };
        Self { api_version: ApiVersion::V1Alpha1, kind: GrantKind::Grant, metadata, spec }
    }
}

impl From<&WorkloadDocument> for WorkloadManifest {
    fn from(document: &WorkloadDocument) -> Self {
        let WorkloadDocument { name, selector, spiffe_id, mode } = document;
        let spec = WorkloadSpec {
            select: match selector {
                Selector::Cgroup(pattern) => Select::Cgroup(pattern.to_string()),
                Selector::SystemdUnit(unit) => Select::SystemdUnit(unit.to_string()),
            },
            spiffe_id: spiffe_id.to_string(),
            mode: match mode {
                Mode::Audit => WireMode::Audit,
                Mode::Enforce => WireMode::Enforce,
            },
        };
        let metadata = Metadata { name: name.to_string() };
        Self { api_version: ApiVersion::V1Alpha1, kind: WorkloadKind::Workload, metadata, spec }
    }
}

impl From<&EgressRule> for Egress {
    fn from(rule: &EgressRule) -> Self {
        let EgressRule { to, ports } = rule;
        Self {
            to: to.iter().map(To::from).collect(),
            ports: ports.iter().map(Ports::from).collect(),
        }
    }
}

impl From<&Destination> for To {
    fn from(destination: &Destination) -> Self {
        match destination {
            Destination::IpBlock { cidr, except } => {
                let except = some_list(except, ToString::to_string);
                let block = IpBlock { cidr: cidr.to_string(), except };
                Self { ip_block: Some(block), ..Self::default() }
            }
            Destination::DnsName(name) => {
                Self { dns_name: Some(name.to_string()), ..Self::default() }
            }
            Destination::Service(ObjectName { namespace, name }) => {
                let service = WireService { namespace: namespace.clone(), name: name.clone() };
                Self { service: Some(service), ..Self::default() }
            }
            Destination::Pods { pods, namespaces } => Self {
                pod_selector: pods.as_ref().map(WireSelector::from),
                namespace_selector: Some(namespaces.into()),
                ..Self::default()
            },
        }
    }
}

impl From<&LabelSelector> for WireSelector {
    fn from(selector: &LabelSelector) -> Self {
        let LabelSelector { labels, expressions } = selector;
        let pair = |(key, value): &(LabelKey, LabelValue)| (key.to_string(), value.to_string());
        Self {
            match_labels: (!labels.is_empty()).then(|| labels.iter().map(pair).collect()),
            match_expressions: some_list(expressions, WireRequirement::from),
        }
    }
}

impl From<&Requirement> for WireRequirement {
    fn from(requirement: &Requirement) -> Self {
        let (key, operator, values) = match requirement {
            Requirement::In(key, values) => (key, WireOperator::In, Some(values)),
            Requirement::NotIn(key, values) => (key, WireOperator::NotIn, Some(values)),
            Requirement::Exists(key) => (key, WireOperator::Exists, None),
            Requirement::DoesNotExist(key) => (key, WireOperator::DoesNotExist, None),
        };
        let values = values.map(|values| values.iter().map(ToString::to_string).collect());
        Self { key: key.to_string(), operator, values }
    }
}

impl From<&PortRange> for Ports {
    fn from(range: &PortRange) -> Self {
        let PortRange { protocol, first, last } = *range;
        let every = range.is_every_port();
        Self {
            protocol: match protocol {
                Protocol::Any => WireProtocol::Any,
                Protocol::Icmp => WireProtocol::Icmp,
                Protocol::Tcp => WireProtocol::Tcp,
                Protocol::Udp => WireProtocol::Udp,
                Protocol::Sctp => WireProtocol::Sctp,
            },
            port: (!every).then_some(first),
            end_port: (!every && last != first).then_some(last),
        }
    }
}

impl From<&UnixSocket> for WireUnixSocket {
    fn from(socket: &UnixSocket) -> Self {
        match socket {
            UnixSocket::Path(path) => Self::Path(path.to_string()),
            UnixSocket::Abstract(name) => Self::Abstract(name.clone()),
        }
    }
}

/// Gives a document its way back to the manifest it could have been read from.
macro_rules! written_as {
    ($document:ty, $manifest:ty) => {
        impl $document {
            /// The document as a manifest: reading it again gives the same document.
            #[must_use]
            pub fn to_manifest_json(&self) -> serde_json::Value {
                // Maps with text keys, lists, text and small numbers: nothing that JSON lacks.
                serde_json::to_value(<$manifest>::from(self)).unwrap_or_default()
            }
        }

        impl Serialize for $document {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                <$manifest>::from(self).serialize(serializer)
            }
        }
    };
}

written_as!(ScopeDocument, ScopeManifest);
written_as!(GrantDocument, GrantManifest);
written_as!(WorkloadDocument, WorkloadManifest);

/// The list as an optional field: one that is empty is left out, as it may not be written.
fn some_list<'a, T, W>(items: &'a [T], wire: impl FnMut(&'a T) -> W) -> Option<Vec<W>> {
    (!items.is_empty()).then(|| items.iter().map(wire).collect())
}
