//! NRI's messages, as far as they are needed: what is not named here is skipped when it is read
//! (containerd/nri, `pkg/api/api.proto`, package `nri.pkg.api.v1alpha1`).

use std::collections::BTreeMap;

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct RegisterPluginRequest {
    #[prost(string, tag = "1")]
    pub(super) plugin_name: String,
    #[prost(string, tag = "2")]
    pub(super) plugin_idx: String,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct ConfigureRequest {
    #[prost(string, tag = "2")]
    pub(super) runtime_name: String,
    #[prost(string, tag = "3")]
    pub(super) runtime_version: String,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct ConfigureResponse {
    /// A bit for each event that is asked for.
    #[prost(int32, tag = "2")]
    pub(super) events: i32,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SynchronizeRequest {
    /// Whether it is told in several parts, and this is not the last.
    #[prost(bool, tag = "3")]
    pub(super) more: bool,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SynchronizeResponse {
    #[prost(bool, tag = "2")]
    pub(super) more: bool,
}

/// The events that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum Event {
    Unknown = 0,
    RunPodSandbox = 1,
    StartContainer = 6,
}

impl Event {
    /// Its bit among those that are asked for.
    pub(super) const fn bit(self) -> i32 {
        1 << (self as i32 - 1)
    }
}

/// How runtimes told of events that a plugin does not change, before each had a call of its own.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct StateChangeEvent {
    #[prost(enumeration = "Event", tag = "1")]
    pub(super) event: i32,
    #[prost(message, optional, tag = "2")]
    pub(super) pod: Option<PodSandbox>,
    #[prost(message, optional, tag = "3")]
    pub(super) container: Option<Container>,
}

/// `RunPodSandboxRequest`, which has the pod only, and `StartContainerRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct StartRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) pod: Option<PodSandbox>,
    #[prost(message, optional, tag = "2")]
    pub(super) container: Option<Container>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct PodSandbox {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) name: String,
    #[prost(string, tag = "3")]
    pub(super) uid: String,
    #[prost(string, tag = "4")]
    pub(super) namespace: String,
    #[prost(btree_map = "string, string", tag = "5")]
    pub(super) labels: BTreeMap<String, String>,
    #[prost(string, tag = "7")]
    pub(super) runtime_handler: String,
    #[prost(message, optional, tag = "8")]
    pub(super) linux: Option<LinuxPodSandbox>,
    #[prost(uint32, tag = "9")]
    pub(super) pid: u32,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct LinuxPodSandbox {
    #[prost(message, repeated, tag = "5")]
    pub(super) namespaces: Vec<LinuxNamespace>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct LinuxNamespace {
    #[prost(string, tag = "1")]
    pub(super) r#type: String,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Container {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) pod_sandbox_id: String,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(btree_map = "string, string", tag = "5")]
    pub(super) labels: BTreeMap<String, String>,
    #[prost(string, repeated, tag = "7")]
    pub(super) args: Vec<String>,
    #[prost(string, repeated, tag = "8")]
    pub(super) env: Vec<String>,
    #[prost(uint32, tag = "12")]
    pub(super) pid: u32,
}
