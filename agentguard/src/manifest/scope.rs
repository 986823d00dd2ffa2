//! Reads the `spec` of a `Scope` manifest.

use agentguard_common::Protocol;
use ipnet::{IpNet, Ipv4Net};

use super::reader::Value;
use crate::{
    name::ResourceName,
    scope::{
        Destination, EgressRule, PortRange, ScopeDocument, UnixSocket,
        cluster::ObjectName,
        selector::{LabelSelector, Operator, Requirement},
    },
};

/// The longest DNS label, in bytes.
const MAX_LABEL_BYTES: usize = 63;

/// Why a text is no block of addresses.
#[derive(Debug, thiserror::Error)]
enum CidrError {
    #[error("has no prefix length; write {0}/{1} for this one address")]
    NoPrefix(std::net::IpAddr, u8),
    #[error(
        "is no block of IPv4 or IPv6 addresses; write one such as 192.0.2.0/24 or 2001:db8::/32"
    )]
    Grammar,
    #[error("has host bits set; write {network} for the network or {host} for the host")]
    HostBits { network: IpNet, host: IpNet },
    #[error("is a block of IPv4 addresses written as IPv6; write {0}")]
    Mapped(Ipv4Net),
}

pub(super) fn read(name: Option<ResourceName>, spec: &Value<'_>) -> Option<ScopeDocument> {
    let [scope, description, egress, exec, unix_sockets, listen] =
        spec.fields(["scope", "description", "egress", "exec", "unixSockets", "listen"])?;
    spec.check_at_least_one([&egress, &exec, &unix_sockets, &listen]);
    let scope = scope.required(|value| {
        value.note();
        value.parse()
    });
    let description = description.required(Value::text);
    let egress = egress.optional(|value| value.list(read_egress_rule));
    let exec = exec.optional(|value| {
        value.list(|item| {
            let [path] = item.fields(["path"])?;
            path.required(|path| {
                path.note();
                path.parse()
            })
        })
    });
    let unix_sockets = unix_sockets.optional(|value| value.list(read_unix_socket));
    let listen = listen.optional(|value| value.list(read_ports));
    Some(ScopeDocument {
        name: name?,
        scope: scope?,
        description: description?.to_owned(),
        egress: egress?.unwrap_or_default(),
        exec: exec?.unwrap_or_default(),
        unix_sockets: unix_sockets?.unwrap_or_default(),
        listen: listen?.unwrap_or_default(),
    })
}

fn read_egress_rule(rule: &Value<'_>) -> Option<EgressRule> {
    let [to, ports] = rule.fields(["to", "ports"])?;
    let to = to.required(|value| value.list(read_destination));
    let ports = ports.required(|value| value.list(read_ports));
    Some(EgressRule { to: to?, ports: ports? })
}

fn read_destination(destination: &Value<'_>) -> Option<Destination> {
    let [ip_block, dns_name, service, pods, namespaces] = destination.fields([
        "ipBlock",
        "dnsName",
        "service",
        "podSelector",
        "namespaceSelector",
    ])?;
    if pods.is_present() && !namespaces.is_present() {
        destination.refuse(
            "has a podSelector without a namespaceSelector, and a Scope has no namespace of its own",
            "add namespaceSelector, such as {matchLabels: {kubernetes.io/metadata.name: NAMESPACE}}",
        );
    } else {
        destination.check_exactly_one([&ip_block, &dns_name, &service, &namespaces]);
    }
    let ip_block = ip_block.optional(read_ip_block)?;
    let dns_name = dns_name.optional(|value| {
        let name = value.parse()?;
        value.refuse(
            "is a DNS name, which is not enforced yet by this version",
            "write an ipBlock with the addresses it stands for",
        );
        Some(Destination::DnsName(name))
    })?;
    let service = service.optional(|value| {
        let [namespace, name] = value.fields(["namespace", "name"])?;
        let namespace = namespace.required(read_label_name);
        let name = name.required(read_label_name);
        Some(Destination::Service(ObjectName::new(namespace?.as_str(), name?.as_str())))
    })?;
    let has_pods = pods.is_present();
    let pods = pods.optional(read_selector)?;
    let namespaces = namespaces.optional(read_selector)?;
    // A podSelector alone, or beside another destination, was refused above.
    let pods = match (namespaces, pods) {
        (Some(namespaces), pods) => Some(Destination::Pods { pods, namespaces }),
        (None, _) if has_pods => return None,
        (None, _) => None,
    };
    ip_block.or(dns_name).or(service).or(pods)
}

/// The name of a namespace or of a service: one DNS label.
pub(super) fn read_label_name(value: &Value<'_>) -> Option<ResourceName> {
    let name: ResourceName = value.parse()?;
    if name.as_str().contains('.') || name.as_str().len() > MAX_LABEL_BYTES {
        value.refuse("is no DNS label", "write the name alone, at most 63 bytes without dots");
        return None;
    }
    Some(name)
}

fn read_selector(selector: &Value<'_>) -> Option<LabelSelector> {
    let [labels, expressions] = selector.fields(["matchLabels", "matchExpressions"])?;
    selector.check_at_least_one([&labels, &expressions]);
    let labels = labels.optional(|value| {
        value.entries(|key, value| Some((value.parse_key(key)?, value.parse()?)))
    });
    let expressions = expressions.optional(|value| value.list(read_requirement));
    Some(LabelSelector {
        labels: labels?.unwrap_or_default(),
        expressions: expressions?.unwrap_or_default(),
    })
}

fn read_requirement(requirement: &Value<'_>) -> Option<Requirement> {
    let [key, operator, values] = requirement.fields(["key", "operator", "values"])?;
    let key = key.required(Value::parse);
    let operator = operator.required(|value| value.one_of(&Operator::ALL, Operator::as_str));
    let has_values = values.is_present();
    let values = values.optional(|value| value.list(Value::parse));
    let (key, operator, values) = (key?, operator?, values?);
    match (operator, values) {
        (Operator::In, Some(values)) => Some(Requirement::In(key, values)),
        (Operator::NotIn, Some(values)) => Some(Requirement::NotIn(key, values)),
        (Operator::Exists, None) => Some(Requirement::Exists(key)),
        (Operator::DoesNotExist, None) => Some(Requirement::DoesNotExist(key)),
        (Operator::In | Operator::NotIn | Operator::Exists | Operator::DoesNotExist, _) => {
            let word = operator.as_str();
            if has_values {
                let message = format!("has values, and {word} takes none");
                requirement.refuse(message, "remove values, or write In or NotIn");
            } else {
                let message = format!("has no values, and {word} needs some");
                requirement.refuse(message, "add values, or write Exists or DoesNotExist");
            }
            None
        }
    }
}

fn read_ip_block(block: &Value<'_>) -> Option<Destination> {
    let [cidr, except] = block.fields(["cidr", "except"])?;
    let cidr = cidr.required(|value| {
        value.note();
        value.parse_with(parse_cidr)
    });
    let except = except.optional(|value| {
        let nets = value.list(|item| {
            let net = item.parse_with(parse_cidr)?;
            match cidr {
                Some(cidr) if net == cidr => {
                    item.refuse(
                        format!("covers all of {cidr}"),
                        "write a smaller block, or remove the ipBlock",
                    );
                    None
                }
                Some(cidr) if !cidr.contains(&net) => {
                    item.refuse(
                        format!("is not inside {cidr}"),
                        format!("write a smaller block of {cidr}, or remove it"),
                    );
                    None
                }
                Some(_) | None => Some(net),
            }
        })?;
        match cidr {
            Some(cidr) if IpNet::aggregate(&nets).contains(&cidr) => {
                value.refuse(
                    format!("covers all of {cidr}"),
                    "leave at least one address over, or remove the ipBlock",
                );
                None
            }
            Some(_) | None => Some(nets),
        }
    });
    Some(Destination::IpBlock { cidr: cidr?, except: except?.unwrap_or_default() })
}

fn parse_cidr(text: &str) -> Result<IpNet, CidrError> {
    if let Ok(address) = text.parse::<std::net::IpAddr>() {
        return Err(CidrError::NoPrefix(address, if address.is_ipv4() { 32 } else { 128 }));
    }
    let net: IpNet = text.parse().map_err(|_| CidrError::Grammar)?;
    let network = net.trunc();
    if network != net {
        let host = IpNet::from(net.addr());
        return Err(CidrError::HostBits { network, host });
    }
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let Some(address) = v6.addr().to_ipv4_mapped()
        && let Ok(v4) = Ipv4Net::new(address, v6.prefix_len() - 96)
    {
        return Err(CidrError::Mapped(v4));
    }
    Ok(net)
}

fn read_ports(rule: &Value<'_>) -> Option<PortRange> {
    let [protocol, port, end_port] = rule.fields(["protocol", "port", "endPort"])?;
    let protocol = protocol.required(|value| value.one_of(&Protocol::ALL, Protocol::as_str));
    let refuse_for_protocol = |value: &Value<'_>| match protocol {
        Some(protocol) if !protocol.has_ports() => {
            value.refuse(
                format!("is a port, and {} has none", protocol.as_str()),
                "remove it, or name TCP, UDP or SCTP",
            );
            None
        }
        Some(_) | None => Some(()),
    };
    let port = port.optional(|value| {
        refuse_for_protocol(value)?;
        value.port()
    });
    let end_port = end_port.optional(|value| {
        refuse_for_protocol(value)?;
        let last = value.port()?;
        match port {
            Some(None) => {
                value.refuse("ends a range that has no beginning", "add port, its first port");
                None
            }
            Some(Some(first)) if last < first => {
                value.refuse(
                    format!("is below port {first}"),
                    format!("write a number from {first} to 65535, or remove endPort"),
                );
                None
            }
            // A port that was refused itself gives nothing to compare with.
            Some(Some(_)) | None => Some(last),
        }
    });
    let (protocol, port, end_port) = (protocol?, port?, end_port?);
    Some(match port {
        None => PortRange::every(protocol),
        Some(first) => PortRange { protocol, first, last: end_port.unwrap_or(first) },
    })
}

fn read_unix_socket(socket: &Value<'_>) -> Option<UnixSocket> {
    let [path, name] = socket.fields(["path", "abstract"])?;
    socket.check_exactly_one([&path, &name]);
    let path = path.optional(|value| value.parse_with(UnixSocket::at_path));
    let name = name.optional(|value| value.parse_with(UnixSocket::abstract_name));
    path?.or(name?)
}
