//! What is known of the Kubernetes cluster around this node, and what a destination that names a
//! service or pods comes to there.
//!
//! Plain values and pure functions: knows no API server and no kernel. A view is never half of a
//! change, so whoever holds one may take it for the cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use agentguard_common::{Address, Protocol};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{
    document::{Destination, PortRange},
    selector::{LabelSelector, Labels},
};

/// The namespace and the name of the API server's own service.
const API_SERVER: (&str, &str) = ("default", "kubernetes");
/// The label by which a namespace is told by its name.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// Whether there is a cluster around this node, and what is known of it.
#[derive(Clone, Debug, Default)]
pub enum Cluster {
    /// This node is not asked to look for one.
    #[default]
    Outside,
    /// There is one, of which nothing is known yet: every block that is wider than one address may
    /// reach what it must not.
    Unknown,
    Known(std::sync::Arc<ClusterView>),
}

/// A namespaced object by its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectName {
    pub namespace: String,
    pub name: String,
}

/// The parts of a cluster that destinations rest on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterView {
    pub services: BTreeMap<ObjectName, Service>,
    /// The endpoints of each service, by the objects that list them.
    pub endpoints: BTreeMap<ObjectName, BTreeMap<String, Vec<Endpoints>>>,
    pub pods: BTreeMap<ObjectName, PodAddresses>,
    /// The labels of each namespace.
    pub namespaces: BTreeMap<String, Labels>,
    pub nodes: BTreeMap<String, NodeAddresses>,
    /// Blocks around the addresses of what there was no room for.
    pub left_out: BTreeSet<IpNet>,
}

/// The addresses by which a service is reached, and its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// None where it is headless.
    pub cluster_addresses: Vec<IpAddr>,
    /// Those that lead to it from outside of the cluster, and are translated inside it as well.
    pub external_addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServicePort {
    /// By which endpoints name it; empty where the service has one port only.
    pub name: String,
    pub protocol: PortProtocol,
    pub port: u16,
}

/// The protocols that a service can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum PortProtocol {
    Tcp,
    Udp,
    Sctp,
}

/// Some endpoints of a service: every address at every port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
}

/// Where a pod is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodAddresses {
    pub addresses: Vec<IpAddr>,
    pub labels: Labels,
    /// Whose addresses they are.
    pub network: PodNetwork,
}

/// Whose network a pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodNetwork {
    Own,
    /// Its addresses are those of its node, with all that listens there.
    Host,
}

/// The addresses of a node, and the blocks from which its pods have theirs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddresses {
    pub addresses: Vec<IpAddr>,
    pub pod_blocks: Vec<IpNet>,
}

/// Addresses, each at each of the ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Targets {
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<PortRange>,
}

/// Why a destination permits nothing, or less than it says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClusterProblem {
    #[error("{0} permits nothing, since kubernetes is off; set kubernetes, or write an ipBlock")]
    Outside(String),
    #[error("{0} permits nothing until the API server has been reached")]
    Unknown(String),
    #[error("{0} permits nothing, since there is no such service")]
    NoService(ObjectName),
    #[error(
        "{service} permits nothing, since none of its ports is among those of the rule; it has {has}"
    )]
    NoPort { service: ObjectName, has: String },
}

/// The labels of a namespace as they count: its name is one that nobody can set, as newer API
/// servers have it.
#[must_use]
pub fn namespace_labels(name: &str, mut labels: Labels) -> Labels {
    labels.insert(NAMESPACE_NAME.to_owned(), name.to_owned());
    labels
}

impl ClusterView {
    /// What no block covers that is wider than one address: nodes with all that listens on them,
    /// the API server, pods, and what is translated to pods; and whatever of them is not known.
    #[must_use]
    pub fn reserved(&self) -> Vec<IpNet> {
        let mut blocks: BTreeSet<IpNet> = self.left_out.clone();
        for node in self.nodes.values() {
            blocks.extend(node.addresses.iter().copied().map(IpNet::from));
            blocks.extend(node.pod_blocks.iter().copied());
        }
        let pods = self.pods.values().flat_map(|pod| &pod.addresses);
        let services = self.services.values().flat_map(|service| {
            service.cluster_addresses.iter().chain(&service.external_addresses)
        });
        let api_server = ObjectName::new(API_SERVER.0, API_SERVER.1);
        let api_server = self.endpoints_of(&api_server).flat_map(|endpoints| &endpoints.addresses);
        blocks.extend(pods.chain(services).chain(api_server).copied().map(IpNet::from));
        IpNet::aggregate(&blocks.into_iter().collect::<Vec<_>>())
    }

    fn endpoints_of(&self, service: &ObjectName) -> impl Iterator<Item = &Endpoints> {
        self.endpoints.get(service).into_iter().flat_map(BTreeMap::values).flatten()
    }

    /// Where a service is reached at the ports of `rule`: its own addresses at its own ports, as a
    /// process asks for them, and its endpoints at theirs, as packets have them once translated.
    fn service(
        &self,
        name: &ObjectName,
        rule: &[PortRange],
    ) -> Result<Vec<Targets>, ClusterProblem> {
        let service =
            self.services.get(name).ok_or_else(|| ClusterProblem::NoService(name.clone()))?;
        let (own, others): (Vec<_>, Vec<_>) =
            service.ports.iter().partition(|port| rule.iter().any(|range| port.is_in(range)));
        if own.is_empty() {
            let has: Vec<String> = others.iter().map(|port| port.range().to_string()).collect();
            let has = if has.is_empty() { "none".to_owned() } else { has.join(", ") };
            return Err(ClusterProblem::NoPort { service: name.clone(), has });
        }
        let mut targets = Vec::new();
        if !service.cluster_addresses.is_empty() {
            let ports = own.iter().map(|port| port.range()).collect();
            targets.push(Targets::new(service.cluster_addresses.clone(), ports));
        }
        let is_of_own = |port: &&ServicePort| {
            own.iter().any(|own| (&own.name, own.protocol) == (&port.name, port.protocol))
        };
        for endpoints in self.endpoints_of(name) {
            let ports: Vec<PortRange> =
                endpoints.ports.iter().filter(is_of_own).map(ServicePort::range).collect();
            if !ports.is_empty() {
                targets.push(Targets::new(endpoints.addresses.clone(), ports));
            }
        }
        Ok(targets)
    }

    /// The pods that are meant, at the ports of `rule`. Those on their node's network have no
    /// address of their own, and are never meant.
    fn pods(
        &self,
        pods: Option<&LabelSelector>,
        namespaces: &LabelSelector,
        rule: &[PortRange],
    ) -> Vec<Targets> {
        let is_meant = |name: &ObjectName, pod: &PodAddresses| {
            let labels = self.namespaces.get(&name.namespace);
            pod.network == PodNetwork::Own
                && labels.is_some_and(|labels| namespaces.matches(labels))
                && pods.is_none_or(|pods| pods.matches(&pod.labels))
        };
        let addresses: Vec<IpAddr> = self
            .pods
            .iter()
            .filter(|(name, pod)| is_meant(name, pod))
            .flat_map(|(_, pod)| pod.addresses.iter().copied())
            .collect();
        let targets = Targets::new(addresses, rule.to_vec());
        if targets.addresses.is_empty() { Vec::new() } else { vec![targets] }
    }
}

impl Cluster {
    /// What a destination comes to at the ports of its rule; nothing for one that is no part of a
    /// cluster.
    ///
    /// # Errors
    ///
    /// Why it comes to nothing, though it should.
    pub fn resolve(
        &self,
        destination: &Destination,
        ports: &[PortRange],
    ) -> Result<Vec<Targets>, ClusterProblem> {
        let named = match destination {
            Destination::IpBlock { .. } | Destination::DnsName(_) => return Ok(Vec::new()),
            Destination::Service(name) => format!("service {name}"),
            Destination::Pods { pods: None, namespaces } => {
                format!("namespaceSelector `{namespaces}`")
            }
            Destination::Pods { pods: Some(pods), namespaces: _ } => {
                format!("podSelector `{pods}`")
            }
        };
        let view = match self {
            Self::Outside => return Err(ClusterProblem::Outside(named)),
            Self::Unknown => return Err(ClusterProblem::Unknown(named)),
            Self::Known(view) => view,
        };
        match destination {
            Destination::IpBlock { .. } | Destination::DnsName(_) => Ok(Vec::new()),
            Destination::Service(name) => view.service(name, ports),
            Destination::Pods { pods, namespaces } => {
                Ok(view.pods(pods.as_ref(), namespaces, ports))
            }
        }
    }

    /// What no block covers that is wider than one address.
    #[must_use]
    pub fn reserved(&self) -> Vec<IpNet> {
        match self {
            Self::Outside => Vec::new(),
            Self::Unknown => {
                vec![IpNet::V4(ipnet::Ipv4Net::default()), IpNet::V6(ipnet::Ipv6Net::default())]
            }
            Self::Known(view) => view.reserved(),
        }
    }
}

impl ObjectName {
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.namespace, self.name)
    }
}

impl ServicePort {
    fn range(&self) -> PortRange {
        let protocol = self.protocol.into();
        PortRange { protocol, first: self.port, last: self.port }
    }

    fn is_in(&self, range: &PortRange) -> bool {
        let own = Protocol::from(self.protocol);
        (range.protocol == Protocol::Any || range.protocol == own)
            && (range.first..=range.last).contains(&self.port)
    }
}

impl From<PortProtocol> for Protocol {
    fn from(protocol: PortProtocol) -> Self {
        match protocol {
            PortProtocol::Tcp => Self::Tcp,
            PortProtocol::Udp => Self::Udp,
            PortProtocol::Sctp => Self::Sctp,
        }
    }
}

impl Targets {
    /// Whoever may write endpoints must not lead a scope that names their service to the node's
    /// loopback or to where a cloud hands out credentials.
    fn new(mut addresses: Vec<IpAddr>, mut ports: Vec<PortRange>) -> Self {
        addresses.retain(|address| {
            let canonical = Address::from(*address);
            let ip = canonical.destination().ip();
            !(canonical.is_metadata() || ip.is_loopback() || ip.is_multicast())
        });
        addresses.sort_unstable();
        addresses.dedup();
        ports.sort_unstable();
        ports.dedup();
        Self { addresses, ports }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::scope::selector::{LabelKey, Requirement};

    fn port(name: &str, port: u16) -> ServicePort {
        ServicePort { name: name.to_owned(), protocol: PortProtocol::Tcp, port }
    }

    fn addresses(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn selector(key: &str, value: &str) -> LabelSelector {
        let labels = vec![(key.parse().unwrap(), value.parse().unwrap())];
        LabelSelector { labels, expressions: Vec::new() }
    }

    fn tcp(first: u16, last: u16) -> Vec<PortRange> {
        vec![PortRange { protocol: Protocol::Tcp, first, last }]
    }

    fn view() -> ClusterView {
        let mut view = ClusterView::default();
        let git = ObjectName::new("tools", "git");
        view.services.insert(
            git.clone(),
            Service {
                cluster_addresses: addresses(&["10.96.0.9"]),
                external_addresses: addresses(&["203.0.113.9"]),
                ports: vec![port("http", 80), port("admin", 81)],
            },
        );
        let slice = Endpoints {
            addresses: addresses(&["10.244.1.5", "10.244.2.6"]),
            ports: vec![port("http", 8080), port("admin", 9090)],
        };
        view.endpoints.entry(git).or_default().insert("git-abc".to_owned(), vec![slice]);
        let api = ObjectName::new("default", "kubernetes");
        let own = Service {
            cluster_addresses: addresses(&["10.96.0.1"]),
            external_addresses: Vec::new(),
            ports: vec![port("https", 443)],
        };
        view.services.insert(api.clone(), own);
        let own =
            Endpoints { addresses: addresses(&["198.51.100.2"]), ports: vec![port("https", 6443)] };
        view.endpoints.entry(api).or_default().insert("kubernetes".to_owned(), vec![own]);
        for (name, given) in [
            ("tools", labels(&[("team", "a"), (NAMESPACE_NAME, "forged")])),
            ("other", labels(&[("team", "b")])),
        ] {
            view.namespaces.insert(name.to_owned(), namespace_labels(name, given));
        }
        for (namespace, name, address, network) in [
            ("tools", "git-1", "10.244.1.5", PodNetwork::Own),
            ("tools", "agent", "198.51.100.3", PodNetwork::Host),
            ("other", "git-2", "10.244.2.7", PodNetwork::Own),
        ] {
            let labels = labels(&[("app", "git")]);
            let pod = PodAddresses { addresses: addresses(&[address]), labels, network };
            view.pods.insert(ObjectName::new(namespace, name), pod);
        }
        let node = NodeAddresses {
            addresses: addresses(&["198.51.100.3"]),
            pod_blocks: vec!["10.244.1.0/24".parse().unwrap()],
        };
        view.nodes.insert("one".to_owned(), node);
        view
    }

    fn known() -> Cluster {
        Cluster::Known(Arc::new(view()))
    }

    #[test]
    fn a_service_is_its_own_pair_and_those_of_its_endpoints_and_nothing_else() {
        let git = Destination::Service(ObjectName::new("tools", "git"));
        let targets = known().resolve(&git, &tcp(80, 80)).unwrap();
        assert_eq!(
            targets,
            [
                Targets::new(addresses(&["10.96.0.9"]), tcp(80, 80)),
                Targets::new(addresses(&["10.244.1.5", "10.244.2.6"]), tcp(8080, 8080)),
            ]
        );
        let every = [PortRange::every(Protocol::Any)];
        let targets = known().resolve(&git, &every).unwrap();
        let ports: Vec<usize> = targets.iter().map(|target| target.ports.len()).collect();
        assert_eq!(ports, [2, 2], "every port of the rule is every port of the service only");
    }

    #[test]
    fn endpoints_lead_neither_to_metadata_nor_to_loopback() {
        let forged =
            ["169.254.169.254", "100.100.100.200", "127.0.0.1", "::1", "0.0.0.0", "10.0.0.1"];
        let left = Targets::new(addresses(&forged), tcp(80, 80)).addresses;
        assert_eq!(left, addresses(&["10.0.0.1"]));
    }

    #[test]
    fn what_permits_nothing_says_why() {
        let git = Destination::Service(ObjectName::new("tools", "git"));
        let told = |cluster: &Cluster, to: &Destination, ports: &[PortRange]| {
            cluster.resolve(to, ports).unwrap_err().to_string()
        };
        assert!(told(&Cluster::Outside, &git, &tcp(80, 80)).contains("kubernetes is off"));
        assert!(told(&Cluster::Unknown, &git, &tcp(80, 80)).contains("until the API server"));
        let wrong = told(&known(), &git, &tcp(8080, 8080));
        assert!(wrong.contains("tools/git") && wrong.ends_with("it has TCP 80, TCP 81"), "{wrong}");
        let missing = Destination::Service(ObjectName::new("tools", "gone"));
        assert!(told(&known(), &missing, &tcp(80, 80)).contains("tools/gone"));
        let udp = [PortRange::every(Protocol::Udp)];
        assert!(told(&known(), &git, &udp).contains("TCP 80"));
    }

    #[test]
    fn pods_are_those_of_both_selectors_and_never_those_of_the_nodes_network() {
        let pods = |pods: Option<LabelSelector>, namespaces: LabelSelector| {
            let to = Destination::Pods { pods, namespaces };
            known().resolve(&to, &tcp(1, 2)).unwrap()
        };
        let one = [Targets::new(addresses(&["10.244.1.5"]), tcp(1, 2))];
        assert_eq!(pods(Some(selector("app", "git")), selector("team", "a")), one);
        assert_eq!(pods(None, selector(NAMESPACE_NAME, "tools")), one);
        assert_eq!(pods(None, selector(NAMESPACE_NAME, "forged")), []);
        assert_eq!(pods(Some(selector("app", "web")), selector("team", "a")), []);
        let any_team: LabelKey = "team".parse().unwrap();
        let any_team =
            LabelSelector { labels: Vec::new(), expressions: vec![Requirement::Exists(any_team)] };
        assert_eq!(
            pods(Some(selector("app", "git")), any_team),
            [Targets::new(addresses(&["10.244.1.5", "10.244.2.7"]), tcp(1, 2))]
        );
    }

    #[test]
    fn nodes_pods_services_and_the_api_server_are_reserved() {
        let reserved = known().reserved();
        let is_reserved = |address: &str| {
            reserved.iter().any(|block| block.contains(&address.parse::<IpAddr>().unwrap()))
        };
        for address in [
            "198.51.100.3", // a node
            "198.51.100.2", // the API server
            "10.96.0.1",    // its service
            "10.96.0.9",    // a service
            "203.0.113.9",  // the same from outside
            "10.244.1.99",  // a pod to come
            "10.244.2.7",   // a pod outside of its node's block
        ] {
            assert!(is_reserved(address), "{address}");
        }
        for address in ["198.51.100.4", "10.96.0.2", "10.244.2.8", "192.0.2.1"] {
            assert!(!is_reserved(address), "{address}");
        }
        assert!(Cluster::Outside.reserved().is_empty());
        assert_eq!(Cluster::Unknown.reserved().len(), 2);
    }
}
