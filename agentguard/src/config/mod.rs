//! The daemon's configuration: one YAML file in which every key has a default.
//!
//! A key that is not known, or a value that can not be meant, is refused with file, line, column,
//! key and remedy. Flags ([`Overrides`]) replace single values and are read by the same rules. The
//! types here are the reference: the default file ([`default_file()`]) is generated from them. Must
//! not know what the values are used for. Read once, at start.
//!
//! YAML is read by `serde-saphyr`: of the maintained successors of `serde_yaml` it is the one that
//! keeps line and column also for errors of our own types, refuses duplicate keys, bounds aliases
//! and depth, and reads YAML 1.2, where `off` is a word and not a boolean.

mod default_file;
pub mod value;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use procfs::FromRead;
use procfs::process::MountInfos;
use schemars::JsonSchema;
use serde::de::IntoDeserializer;
use serde::{Deserialize, Serialize};

use crate::identity::IdentityTemplate;
use crate::{audit, logging};
pub use default_file::{Key, default_file, describe};
use value::{
    AbsolutePath, AuditOutput, Capacity, FileBytes, FileCount, IdentityCount, Interval, KindBytes,
    KubernetesAccess, Listen, NodeName, NriSocket, RelativePath, RingBytes, Template,
    TrustDomainName, ValueError,
};

/// Where the configuration is looked for when no file is named.
pub const DEFAULT_PATH: &str = "/etc/agentguard/agentguard.yaml";

/// Configuration of agentguard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Configuration {
    /// Name of this node in records. Null: the host's name.
    pub node: Option<NodeName>,
    /// SPIFFE trust domain of the workload identities that are made on this node. `localhost` is
    /// for one machine by itself; give every fleet a name of its own, or identities of two
    /// fleets read alike.
    pub trust_domain: TrustDomainName,
    /// What happens to denied requests of workloads that no manifest names a mode for: `audit`
    /// records them, `enforce` refuses them too.
    pub mode: DefaultMode,
    /// The least protection with which the daemon starts: `full` needs the BPF LSM, `portable`
    /// needs all hooks that every supported kernel has, `none` starts with whatever there is. What
    /// is missing is always reported.
    pub require: Require,
    /// Directory where cgroup v2 is mounted. Null: looked up in the mount table.
    pub cgroup_root: Option<AbsolutePath>,
    /// Cgroup below the cgroup root in which `exec` makes those of its workloads. Agentguard's own:
    /// `uninstall` removes it.
    pub cgroup_parent: RelativePath,
    /// Directory on a BPF file system for programs, maps and links, which outlive the daemon.
    pub pin_directory: AbsolutePath,
    /// Directory for what the daemon keeps across restarts.
    pub state_directory: AbsolutePath,
    /// Directory for what the daemon keeps until the next boot.
    pub runtime_directory: AbsolutePath,
    /// Directory that is watched for manifests.
    pub manifests_directory: AbsolutePath,
    /// The Kubernetes cluster that this node is part of.
    pub kubernetes: Kubernetes,
    /// The control API.
    pub api: Api,
    /// Agents that run in containers.
    pub containers: Containers,
    /// Metrics for Prometheus.
    pub metrics: Metrics,
    /// The audit log.
    pub audit: Audit,
    /// The daemon's own log, on standard error.
    pub log: Log,
    /// Sizes in the kernel half. A change takes effect after `agentguard uninstall`.
    pub datapath: Datapath,
}

/// The Kubernetes cluster that this node is part of. `node` must be the name that the node has
/// there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Kubernetes {
    /// How the API server is reached: `in-cluster` by the service account of the daemon's pod, the
    /// absolute path of a kubeconfig, or `off`. While it does not answer, what was last known of it
    /// stays in force. Off, scopes with a `service` or selectors permit nothing by them.
    pub access: KubernetesAccess,
    /// Whether denials are told as events of their pods, each once in an hour and not more than
    /// somebody would read. The audit log has them all.
    pub events: bool,
    /// How much memory may be taken by what is kept of each kind of objects (pods, services, endpoints,
    /// namespaces, nodes, scopes, grants), in bytes: a pod takes about 1000. As much again is taken where it
    /// comes into force, and while a new list is read. What finds no room is left out and said in the status:
    /// no scope leads to it, and no block covers what is around its addresses.
    pub max_kind_bytes: KindBytes,
}

/// The control API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// The unix socket of the control API. Every user may connect; who calls decides what is answered.
    pub socket: AbsolutePath,
}

/// Namespaces in which nothing is an agent, unless told otherwise.
pub const EXEMPT_NAMESPACES: [&str; 2] = ["kube-system", "agentguard"];

/// Agents that run in containers: which they are, and where it is asked what there is. A pod or a
/// container is an agent if it has the label `agentguard.dev/agent: "true"`, or its namespace has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Containers {
    /// Unix sockets of container runtimes that speak CRI, as `/run/containerd/containerd.sock`.
    pub runtimes: Vec<AbsolutePath>,
    /// Unix socket of the Docker API, as `/run/docker.sock`. Null: not asked.
    pub docker: Option<AbsolutePath>,
    /// Unix socket of a runtime's Node Resource Interface, by which the runtime waits until a container
    /// is held before it runs. `auto`: `/var/run/nri/nri.sock`, as soon as it is there and `runtimes`
    /// names a runtime. `off`: not used.
    pub nri: NriSocket,
    /// Programs that run containers, where this host or the runtime sees them. What such a program has
    /// its child do in an agent's cgroup before it runs the agent is not the agent's doing.
    pub runtime_programs: Vec<AbsolutePath>,
    /// How SPIFFE IDs are made: a text with the variables `{trust_domain}`, `{namespace}`,
    /// `{service_account}`, `{pod}`, `{container}` and `{label:KEY}`. An agent of which a variable
    /// is not known is denied everything.
    pub identity: Template,
    /// Labels that mark agents beside `agentguard.dev/agent`: whoever has all labels of one entry
    /// is one.
    pub agent_selectors: Vec<BTreeMap<String, String>>,
    /// Namespaces in which nothing is an agent, whatever its labels say: those of what a node needs
    /// to run agentguard.
    pub exempt_namespaces: Vec<String>,
    /// Runtime handlers whose containers have a kernel of their own, which this one does not see
    /// into: their agents are shown with protection `none`. `*` at the end stands for any rest.
    pub sandboxed_handlers: Vec<String>,
}

/// Metrics for Prometheus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Address and port of `/metrics`, `/healthz` and `/readyz`, or `off`.
    pub listen: Listen,
    /// Workload identities that get a label of their own; the rest share the label `other`.
    /// Each takes 14 KiB of kernel memory for each processor.
    pub max_identities: IdentityCount,
}

/// The audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// `stdout`, or the path of a file. A file's hash chain goes on across restarts; standard
    /// output begins a new one at each.
    pub output: AuditOutput,
    /// Size in bytes at which a file is rotated.
    pub max_file_bytes: FileBytes,
    /// Files kept, the newest included: the log never takes more than `max_files` times
    /// `max_file_bytes` on disk.
    pub max_files: FileCount,
}

/// The daemon's own log, on standard error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: logging::Level,
    /// `text` or `json`.
    pub format: logging::Format,
}

/// Sizes in the kernel half.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Datapath {
    /// Room for records of denials, in bytes; a power of two.
    pub denied_ring_bytes: RingBytes,
    /// Room for all other records, in bytes; a power of two.
    pub events_ring_bytes: RingBytes,
    /// For how long identical verdicts are folded into the first one's record.
    pub aggregation_window: Interval,
    /// Entries of the kernel maps. A full map denies and says so.
    pub maps: Maps,
}

/// Entries of the kernel maps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Maps {
    /// Workloads on this node.
    pub workloads: Capacity,
    /// Cgroups of workloads, with all below them.
    pub cgroups: Capacity,
    /// Address blocks of all allow-lists.
    pub destinations: Capacity,
    /// Sets of ports and protocols.
    pub rules: Capacity,
    /// Files that may be run, of all allow-lists.
    pub executables: Capacity,
    /// Unix sockets that may be connected to, of all allow-lists.
    pub unix_sockets: Capacity,
    /// Names of unix sockets that scopes mention.
    pub unix_names: Capacity,
    /// Processes of workloads, by descent, and as many again that were moved.
    pub tasks: Capacity,
    /// Verdicts that are remembered; the oldest make room.
    pub verdict_cache: Capacity,
}

/// What happens to denied requests where no manifest says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DefaultMode {
    #[default]
    Audit,
    Enforce,
}

impl From<DefaultMode> for agentguard_common::Mode {
    fn from(mode: DefaultMode) -> Self {
        match mode {
            DefaultMode::Audit => Self::Audit,
            DefaultMode::Enforce => Self::Enforce,
        }
    }
}

/// The least protection with which the daemon starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Require {
    Full,
    #[default]
    Portable,
    None,
}

/// Reads a word of a flag as the file is read.
macro_rules! word {
    ($type:ty) => {
        impl std::str::FromStr for $type {
            type Err = serde::de::value::Error;

            fn from_str(word: &str) -> Result<Self, Self::Err> {
                Self::deserialize(word.into_deserializer())
            }
        }
    };
}

word!(DefaultMode);
word!(Require);

/// What flags replace. Every value was read by the same rules as the file's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    pub node: Option<NodeName>,
    pub trust_domain: Option<TrustDomainName>,
    pub mode: Option<DefaultMode>,
    pub require: Option<Require>,
    pub cgroup_root: Option<AbsolutePath>,
    pub pin_directory: Option<AbsolutePath>,
    pub state_directory: Option<AbsolutePath>,
    pub runtime_directory: Option<AbsolutePath>,
    pub manifests_directory: Option<AbsolutePath>,
    pub api_socket: Option<AbsolutePath>,
    pub metrics_listen: Option<Listen>,
    pub audit_output: Option<AuditOutput>,
    pub log_level: Option<logging::Level>,
    pub log_format: Option<logging::Format>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    #[error("configuration {path}: {source}; name a readable file, or none for the defaults")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}:{line}:{column}: {message}", path = .path.display())]
    Invalid { path: PathBuf, line: u64, column: u64, message: String },
}

/// Why a value that is looked up on this host is not known.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("the host's name can not be read ({0}); set node")]
    Name(String),
    #[error("the host's name can not be used: {0}; set node")]
    BadName(#[from] ValueError),
    #[error("the mount table can not be read ({0}); set cgroup_root")]
    Mounts(String),
    #[error("cgroup v2 is not mounted; mount it or set cgroup_root")]
    NoCgroup2,
}

/// A path that is known to be absolute.
fn absolute(path: &str) -> AbsolutePath {
    match path.parse() {
        Ok(path) => path,
        // Called with constants of this module, which a test reads all.
        Err(error) => unreachable!("{error}"),
    }
}

impl Default for Configuration {
    fn default() -> Self {
        Self {
            node: None,
            trust_domain: match "localhost".parse() {
                Ok(name) => name,
                // A constant, which a test reads.
                Err(error) => unreachable!("{error}"),
            },
            mode: DefaultMode::default(),
            require: Require::default(),
            cgroup_root: None,
            cgroup_parent: match "agentguard".parse() {
                Ok(path) => path,
                // A constant, which a test reads.
                Err(error) => unreachable!("{error}"),
            },
            pin_directory: absolute("/sys/fs/bpf/agentguard"),
            state_directory: absolute("/var/lib/agentguard"),
            runtime_directory: absolute("/run/agentguard"),
            manifests_directory: absolute("/etc/agentguard/manifests"),
            kubernetes: Kubernetes::default(),
            api: Api::default(),
            containers: Containers::default(),
            metrics: Metrics::default(),
            audit: Audit::default(),
            log: Log::default(),
            datapath: Datapath::default(),
        }
    }
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self { access: KubernetesAccess::Off, events: true, max_kind_bytes: KindBytes::MIB_16 }
    }
}

impl Default for Api {
    fn default() -> Self {
        Self { socket: absolute("/run/agentguard/agentguard.sock") }
    }
}

/// Where runc and crun are installed, by distributions, by CRI-O, by k3s and by RKE2.
const RUNTIME_PROGRAMS: [&str; 14] = [
    "/usr/bin/runc",
    "/usr/bin/crun",
    "/usr/sbin/runc",
    "/usr/sbin/crun",
    "/usr/local/bin/runc",
    "/usr/local/bin/crun",
    "/usr/local/sbin/runc",
    "/usr/local/sbin/crun",
    "/usr/libexec/crio/runc",
    "/usr/libexec/crio/crun",
    "/var/lib/rancher/k3s/data/current/bin/runc",
    "/var/lib/rancher/k3s/data/current/bin/crun",
    "/var/lib/rancher/rke2/bin/runc",
    "/var/lib/rancher/rke2/bin/crun",
];

impl Default for Containers {
    fn default() -> Self {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        Self {
            runtimes: Vec::new(),
            docker: None,
            nri: NriSocket::Auto,
            runtime_programs: RUNTIME_PROGRAMS.iter().map(|path| absolute(path)).collect(),
            identity: match IdentityTemplate::DEFAULT.parse() {
                Ok(template) => template,
                // A constant, which a test reads.
                Err(error) => unreachable!("{error}"),
            },
            agent_selectors: Vec::new(),
            exempt_namespaces: words(&EXEMPT_NAMESPACES),
            sandboxed_handlers: words(&["runsc*", "gvisor*", "kata*"]),
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        let listen = std::net::SocketAddr::from(([127, 0, 0, 1], 9469));
        Self { listen: Listen::At(listen), max_identities: IdentityCount::DEFAULT }
    }
}

impl Default for Audit {
    fn default() -> Self {
        Self {
            output: AuditOutput::File(absolute("/var/log/agentguard/audit.log")),
            max_file_bytes: FileBytes::MIB_64,
            max_files: FileCount::EIGHT,
        }
    }
}

impl Default for Datapath {
    fn default() -> Self {
        Self {
            denied_ring_bytes: RingBytes::MIB_2,
            events_ring_bytes: RingBytes::KIB_512,
            aggregation_window: Interval::SECOND,
            maps: Maps::default(),
        }
    }
}

impl Default for Maps {
    fn default() -> Self {
        Self {
            workloads: Capacity::KIB_1,
            cgroups: Capacity::KIB_4,
            destinations: Capacity::KIB_64,
            rules: Capacity::KIB_16,
            executables: Capacity::KIB_64,
            unix_sockets: Capacity::KIB_64,
            unix_names: Capacity::KIB_8,
            tasks: Capacity::KIB_256,
            verdict_cache: Capacity::KIB_64,
        }
    }
}

impl Configuration {
    /// Reads the file at `path`, and lets flags replace values. Without a path, the file at
    /// [`DEFAULT_PATH`] is read if there is one.
    ///
    /// # Errors
    /// When the file can not be read, or says something that can not be meant.
    pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Self, ConfigurationError> {
        Self::load_or_default(path, Path::new(DEFAULT_PATH), overrides)
    }

    fn load_or_default(
        named: Option<&Path>,
        fallback: &Path,
        overrides: &Overrides,
    ) -> Result<Self, ConfigurationError> {
        let path = named.unwrap_or(fallback);
        let mut configuration = match fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text)?,
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
                Self::default()
            }
            Err(source) => {
                return Err(ConfigurationError::Read { path: path.to_owned(), source });
            }
        };
        configuration.replace(overrides);
        Ok(configuration)
    }

    /// Reads `text`, which errors call `path`.
    ///
    /// # Errors
    /// When it says something that can not be meant.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigurationError> {
        let mut key = None;
        let read = serde_saphyr::with_deserializer_from_str(text, |yaml| {
            serde_path_to_error::deserialize(yaml).map_err(|error| {
                key = Some(error.path().to_string()).filter(|key| key != ".");
                error.into_inner()
            })
        });
        // A file without any key asks for nothing else than the defaults.
        let read = match read {
            Ok(configuration) => return Ok(configuration),
            Err(_) if is_blank(text) => return Ok(Self::default()),
            Err(error) => error,
        };
        let (line, column) = read.location().map_or((0, 0), |at| (at.line(), at.column()));
        let message = match (read.without_snippet(), key) {
            (serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. }, _) => {
                format!("{key}: the key is there twice; leave one")
            }
            (error, key) => {
                let message = error.to_string();
                // The place is said in front, once.
                let message = message.split(" at line ").next().unwrap_or(&message);
                key.map_or_else(|| message.to_owned(), |key| format!("{key}: {message}"))
            }
        };
        Err(ConfigurationError::Invalid { path: path.to_owned(), line, column, message })
    }

    fn replace(&mut self, overrides: &Overrides) {
        fn put<T: Clone>(value: &mut T, replacement: &Option<T>) {
            if let Some(replacement) = replacement {
                value.clone_from(replacement);
            }
        }
        let Overrides {
            node,
            trust_domain,
            mode,
            require,
            cgroup_root,
            pin_directory,
            state_directory,
            runtime_directory,
            manifests_directory,
            api_socket,
            metrics_listen,
            audit_output,
            log_level,
            log_format,
        } = overrides;
        if node.is_some() {
            self.node.clone_from(node);
        }
        if cgroup_root.is_some() {
            self.cgroup_root.clone_from(cgroup_root);
        }
        put(&mut self.trust_domain, trust_domain);
        put(&mut self.mode, mode);
        put(&mut self.require, require);
        put(&mut self.pin_directory, pin_directory);
        put(&mut self.state_directory, state_directory);
        put(&mut self.runtime_directory, runtime_directory);
        put(&mut self.manifests_directory, manifests_directory);
        put(&mut self.api.socket, api_socket);
        put(&mut self.metrics.listen, metrics_listen);
        put(&mut self.audit.output, audit_output);
        put(&mut self.log.level, log_level);
        put(&mut self.log.format, log_format);
    }

    /// The name of this node: the configured one, or the host's.
    ///
    /// # Errors
    /// When the host has none that can be used.
    pub fn node_name(&self) -> Result<NodeName, HostError> {
        if let Some(node) = &self.node {
            return Ok(node.clone());
        }
        let name =
            nix::unistd::gethostname().map_err(|error| HostError::Name(error.to_string()))?;
        Ok(name.to_string_lossy().parse()?)
    }

    /// The cgroup in which `exec` makes those of its workloads.
    ///
    /// # Errors
    /// When cgroup v2 is mounted nowhere.
    pub fn find_cgroup_parent(&self) -> Result<PathBuf, HostError> {
        Ok(self.find_cgroup_root()?.join(&self.cgroup_parent))
    }

    /// Where cgroup v2 is mounted: the configured directory, or what the mount table says.
    ///
    /// # Errors
    /// When it is mounted nowhere.
    pub fn find_cgroup_root(&self) -> Result<PathBuf, HostError> {
        match &self.cgroup_root {
            Some(path) => Ok(path.as_ref().to_owned()),
            None => cgroup2_mount(Path::new("/proc/self/mountinfo")),
        }
    }
}

impl Audit {
    /// What the audit log is opened with.
    #[must_use]
    pub fn options(&self) -> audit::Options {
        let output = match &self.output {
            AuditOutput::Stdout => audit::Output::Stdout,
            AuditOutput::File(path) => audit::Output::File {
                path: path.as_ref().to_owned(),
                limits: audit::Limits {
                    max_file_bytes: self.max_file_bytes.get(),
                    max_files: self.max_files.get(),
                },
            },
        };
        audit::Options { output, queue: audit::Options::QUEUE }
    }
}

/// Whether a file has nothing but comments.
fn is_blank(text: &str) -> bool {
    text.lines()
        .map(str::trim)
        .all(|line| line.is_empty() || line.starts_with('#') || line == "---")
}

/// The mount point of the whole cgroup v2 hierarchy with the shortest path.
fn cgroup2_mount(mountinfo: &Path) -> Result<PathBuf, HostError> {
    let mounts =
        MountInfos::from_file(mountinfo).map_err(|error| HostError::Mounts(error.to_string()))?;
    mounts
        .0
        .into_iter()
        .filter(|mount| mount.fs_type == "cgroup2" && mount.root == "/")
        .map(|mount| mount.mount_point)
        .min_by_key(|path| path.as_os_str().len())
        .ok_or(HostError::NoCgroup2)
}

#[cfg(test)]
mod tests;
