//! Services, endpoints, pods, namespaces and nodes, watched: what destinations in scopes come to,
//! and which addresses are the cluster's own.
//!
//! Fills one [`ClusterView`]. It is handed out only once every kind has been listed: with a part of
//! it missing, an address that is reserved would not be known as such.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{
    EndpointPort as LegacyPort, Endpoints as LegacyEndpoints, Namespace, Node, Pod,
    Service as ApiService,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::Api;
use kube::{Client, ResourceExt as _};
use tokio::task::JoinSet;

use super::filled::{self, Change, Filled, change_map};
use super::watch::{Bound, Kept, Loss, Retry, Seen, bytes_of_texts, ended, everything, follow};
use crate::scope::cluster::{
    ClusterView, Endpoints, NodeAddresses, ObjectName, PodAddresses, PodNetwork, PortProtocol,
    Service, ServicePort, namespace_labels,
};
use crate::scope::selector::Labels;

/// The label by which an endpoint slice says whose it is.
const SLICE_OF: &str = "kubernetes.io/service-name";

/// The kinds of objects that the view is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Services,
    Endpoints,
    Pods,
    Namespaces,
    Nodes,
}

/// The view as it is being filled.
#[derive(Debug, Default)]
pub struct Feed(Filled<Part, ClusterView>);

impl filled::Part for Part {
    const ALL: &'static [Self] =
        &[Self::Services, Self::Endpoints, Self::Pods, Self::Namespaces, Self::Nodes];

    fn as_str(self) -> &'static str {
        match self {
            Self::Services => "services of the cluster",
            Self::Endpoints => "endpoints of the cluster",
            Self::Pods => "pods of the cluster",
            Self::Namespaces => "namespaces of the cluster",
            Self::Nodes => "nodes of the cluster",
        }
    }

    fn without_room(self) -> &'static str {
        match self {
            Self::Services | Self::Endpoints | Self::Pods => {
                "no scope leads to them, and no block covers what is around their addresses"
            }
            Self::Namespaces => "no namespaceSelector selects them",
            Self::Nodes => "no block covers what is around their addresses",
        }
    }
}

impl Kept for Service {
    fn bytes(&self) -> usize {
        let Self { cluster_addresses, external_addresses, ports } = self;
        let addresses = cluster_addresses.len() + external_addresses.len();
        addresses * size_of::<IpAddr>() + bytes_of_ports(ports)
    }

    fn reserved(&self) -> Vec<IpNet> {
        let addresses = self.cluster_addresses.iter().chain(&self.external_addresses);
        addresses.copied().map(IpNet::from).collect()
    }
}

impl Kept for (ObjectName, Vec<Endpoints>) {
    fn bytes(&self) -> usize {
        let (ObjectName { namespace, name }, endpoints) = self;
        let endpoints = endpoints.iter().map(|Endpoints { addresses, ports }| {
            size_of::<Endpoints>() + addresses.len() * size_of::<IpAddr>() + bytes_of_ports(ports)
        });
        bytes_of_texts([namespace, name]) + endpoints.sum::<usize>()
    }

    /// Those of most services are addresses of pods; which service it is of is not asked.
    fn reserved(&self) -> Vec<IpNet> {
        let addresses = self.1.iter().flat_map(|endpoints| &endpoints.addresses);
        addresses.copied().map(IpNet::from).collect()
    }
}

impl Kept for PodAddresses {
    fn bytes(&self) -> usize {
        let Self { addresses, labels, network: _ } = self;
        addresses.len() * size_of::<IpAddr>() + labels.bytes()
    }

    fn reserved(&self) -> Vec<IpNet> {
        self.addresses.iter().copied().map(IpNet::from).collect()
    }
}

impl Kept for Labels {
    fn bytes(&self) -> usize {
        bytes_of_texts(self.iter().flat_map(|(key, value)| [key, value]))
    }
}

impl Kept for NodeAddresses {
    fn bytes(&self) -> usize {
        let Self { addresses, pod_blocks } = self;
        addresses.len() * size_of::<IpAddr>() + pod_blocks.len() * size_of::<IpNet>()
    }

    fn reserved(&self) -> Vec<IpNet> {
        let addresses = self.addresses.iter().copied().map(IpNet::from);
        addresses.chain(self.pod_blocks.iter().copied()).collect()
    }
}

fn bytes_of_ports(ports: &[ServicePort]) -> usize {
    ports.iter().map(|port| size_of::<ServicePort>() + port.name.len()).sum()
}

impl Feed {
    /// The view, if it is whole and has changed since it was last taken.
    pub fn take(&self) -> Option<ClusterView> {
        let (mut view, left_out) = self.0.take()?;
        view.left_out = left_out.into_iter().flat_map(|left_out| left_out.reserved).collect();
        Some(view)
    }

    /// The nodes of the cluster, where there was room for all.
    #[must_use]
    pub fn nodes(&self, view: &ClusterView) -> Option<BTreeSet<String>> {
        (!self.0.is_short_of(Part::Nodes)).then(|| view.nodes.keys().cloned().collect())
    }

    /// How many objects found no room.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.0.left_out()
    }

    /// Waits until [`Self::take`] may have something.
    pub async fn changed(&self) {
        self.0.changed().await;
    }

    /// What can not be watched at present, and what found no room, one sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        self.0.problems()
    }

    fn see_service(&self, seen: Seen<Service>) {
        self.0.see(Part::Services, seen, |view, change| {
            change_map(&mut view.services, change, |name| name)
        });
    }

    fn see_endpoints(&self, seen: Seen<(ObjectName, Vec<Endpoints>)>) {
        type ByService = BTreeMap<ObjectName, BTreeMap<String, Vec<Endpoints>>>;
        /// Removes an object from whichever service it was listed for; whether it was.
        fn remove(known: &mut ByService, object: &ObjectName) -> bool {
            let mut was_there = false;
            known.retain(|service, objects| {
                if service.namespace == object.namespace {
                    was_there |= objects.remove(&object.name).is_some();
                }
                !objects.is_empty()
            });
            was_there
        }
        self.0.see(Part::Endpoints, seen, |view, change| {
            let known = &mut view.endpoints;
            match change {
                Change::All(all) => {
                    let before = std::mem::take(known);
                    for (object, (service, endpoints)) in all {
                        known.entry(service).or_default().insert(object.name, endpoints);
                    }
                    before != *known
                }
                Change::Put(object, (service, endpoints)) => {
                    let there = known.get(&service).and_then(|objects| objects.get(&object.name));
                    if there == Some(&endpoints) {
                        return false;
                    }
                    if there.is_none() {
                        remove(known, &object);
                    }
                    known.entry(service).or_default().insert(object.name, endpoints);
                    true
                }
                Change::Gone(object) => remove(known, &object),
            }
        });
    }

    fn see_pod(&self, seen: Seen<PodAddresses>) {
        self.0
            .see(Part::Pods, seen, |view, change| change_map(&mut view.pods, change, |name| name));
    }

    fn see_namespace(&self, seen: Seen<Labels>) {
        self.0.see(Part::Namespaces, seen, |view, change| {
            change_map(&mut view.namespaces, change, |name| name.name)
        });
    }

    fn see_node(&self, seen: Seen<NodeAddresses>) {
        self.0.see(Part::Nodes, seen, |view, change| {
            change_map(&mut view.nodes, change, |name| name.name)
        });
    }
}

/// Fills `feed` for as long as the daemon runs.
pub async fn run(client: Client, feed: Arc<Feed>, bound: Bound) {
    let mut watches = JoinSet::new();
    let own = Arc::clone(&feed);
    watches.spawn(follow(Api::all(client.clone()), everything(), bound, service, move |seen| {
        own.see_service(seen);
    }));
    let own = Arc::clone(&feed);
    watches.spawn(follow(Api::all(client.clone()), everything(), bound, pod, move |seen| {
        own.see_pod(seen);
    }));
    let own = Arc::clone(&feed);
    watches.spawn(follow(Api::all(client.clone()), everything(), bound, namespace, move |seen| {
        own.see_namespace(seen);
    }));
    let own = Arc::clone(&feed);
    watches.spawn(follow(Api::all(client.clone()), everything(), bound, node, move |seen| {
        own.see_node(seen);
    }));
    watches.spawn(follow_endpoints(client, feed, bound));
    while let Some(watch) = watches.join_next().await {
        ended(watch);
    }
}

/// Endpoint slices where the API server has them, else the endpoints of old.
async fn follow_endpoints(client: Client, feed: Arc<Feed>, bound: Bound) {
    let mut pauses = Retry::default();
    let has_slices = loop {
        match has_endpoint_slices(&client).await {
            Ok(has) => break has,
            Err(error) => feed.see_endpoints(Seen::Lost(Loss::from(&error))),
        }
        tokio::time::sleep(pauses.pause()).await;
    };
    if has_slices {
        let sink = move |seen| feed.see_endpoints(seen);
        follow(Api::all(client), everything(), bound, slice, sink).await;
    } else {
        let sink = move |seen| feed.see_endpoints(seen);
        follow(Api::all(client), everything(), bound, endpoints, sink).await;
    }
}

async fn has_endpoint_slices(client: &Client) -> Result<bool, kube::Error> {
    match client.list_api_group_resources("discovery.k8s.io/v1").await {
        Ok(resources) => Ok(resources.resources.iter().any(|kind| kind.name == "endpointslices")),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error),
    }
}

fn service(service: &ApiService) -> Option<Service> {
    let spec = service.spec.as_ref()?;
    let ports = spec.ports.iter().flatten().filter_map(|port| {
        let name = port.name.clone().unwrap_or_default();
        service_port(name, port.protocol.as_deref(), Some(port.port))
    });
    // A cluster address that is `None` is no address, as wanted.
    let own = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    let balanced = service
        .status
        .iter()
        .flat_map(|status| &status.load_balancer)
        .flat_map(|balancer| balancer.ingress.iter().flatten())
        .filter_map(|ingress| ingress.ip.as_ref());
    let external = spec.external_ips.iter().flatten().chain(balanced).chain(&spec.load_balancer_ip);
    Some(Service {
        cluster_addresses: addresses(own),
        external_addresses: addresses(external),
        ports: ports.collect(),
    })
}

fn slice(slice: &EndpointSlice) -> Option<(ObjectName, Vec<Endpoints>)> {
    let service = slice.metadata.labels.as_ref()?.get(SLICE_OF)?;
    let ports = slice.ports.iter().flatten().filter_map(|port| {
        let name = port.name.clone().unwrap_or_default();
        service_port(name, port.protocol.as_deref(), port.port)
    });
    // Also those that are not ready: connections to one that is ending go on.
    let addresses = addresses(slice.endpoints.iter().flat_map(|endpoint| &endpoint.addresses));
    let name = ObjectName::new(&slice.namespace()?, service);
    Some((name, vec![Endpoints { addresses, ports: ports.collect() }]))
}

fn endpoints(endpoints: &LegacyEndpoints) -> Option<(ObjectName, Vec<Endpoints>)> {
    let subsets = endpoints.subsets.iter().flatten().map(|subset| {
        let all = subset.addresses.iter().chain(&subset.not_ready_addresses).flatten();
        let port = |port: &LegacyPort| {
            let name = port.name.clone().unwrap_or_default();
            service_port(name, port.protocol.as_deref(), Some(port.port))
        };
        Endpoints {
            addresses: addresses(all.map(|address| &address.ip)),
            ports: subset.ports.iter().flatten().filter_map(port).collect(),
        }
    });
    let name = ObjectName::new(&endpoints.namespace()?, &endpoints.name_any());
    Some((name, subsets.collect()))
}

/// Nothing of one that has ended: another may have its addresses by now.
fn pod(pod: &Pod) -> Option<PodAddresses> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let several = status.pod_ips.iter().flatten().map(|address| &address.ip);
    let addresses = addresses(several.chain(&status.pod_ip));
    if addresses.is_empty() {
        return None;
    }
    let is_host = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or_default();
    Some(PodAddresses {
        addresses,
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        network: if is_host { PodNetwork::Host } else { PodNetwork::Own },
    })
}

/// The labels of a namespace, of which its name is one.
#[expect(clippy::unnecessary_wraps, reason = "kept of each object is an option")]
fn namespace(namespace: &Namespace) -> Option<Labels> {
    // Without any, the API leaves the field out.
    let labels = namespace.metadata.labels.clone().unwrap_or_default();
    Some(namespace_labels(&namespace.name_any(), labels))
}

#[expect(clippy::unnecessary_wraps, reason = "kept of each object is an option")]
fn node(node: &Node) -> Option<NodeAddresses> {
    let named = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    // A host name among them is no address.
    let addresses = addresses(named.map(|address| &address.address));
    let spec = node.spec.as_ref();
    let blocks = spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr));
    let mut pod_blocks: Vec<IpNet> = blocks.filter_map(|block| block.parse().ok()).collect();
    pod_blocks.sort_unstable();
    pod_blocks.dedup();
    Some(NodeAddresses { addresses, pod_blocks })
}

fn addresses<'a>(texts: impl Iterator<Item = &'a String>) -> Vec<IpAddr> {
    let addresses: BTreeSet<IpAddr> = texts.filter_map(|text| text.parse().ok()).collect();
    addresses.into_iter().collect()
}

fn service_port(name: String, protocol: Option<&str>, port: Option<i32>) -> Option<ServicePort> {
    let protocol = match protocol {
        None | Some("TCP") => PortProtocol::Tcp,
        Some("UDP") => PortProtocol::Udp,
        Some("SCTP") => PortProtocol::Sctp,
        Some(_) => return None,
    };
    let port = u16::try_from(port?).ok().filter(|port| *port != 0)?;
    Some(ServicePort { name, protocol, port })
}
