//! The naive reading of the permits: what a decision means, written as directly as possible.
//!
//! The compiled tables are tested against it; enforcement never calls it. It must not know how
//! tables are compiled. Every decision looks at every permit.

use agentguard_common::{
    Address, Decision, Destination, Endpoint, FileId, Mover, Naming, Peer, Permission, Reason,
    Request, UnixSocket, Verdict, request::family,
};
use ipnet::IpNet;

use super::{Permit, PortRange, precedence, prefix::Prefix};

/// What the permits of one identity mean.
#[derive(Clone, Debug)]
pub struct Specification {
    permits: Vec<Permit>,
    reserved: Vec<IpNet>,
}

impl Specification {
    #[must_use]
    pub fn new(permits: &[Permit]) -> Self {
        Self::within(permits, &[])
    }

    /// Where the addresses in `reserved` are the cluster's own.
    #[must_use]
    pub fn within(permits: &[Permit], reserved: &[IpNet]) -> Self {
        Self { permits: permits.to_vec(), reserved: reserved.to_vec() }
    }

    /// Decides `request` at `now` (nanoseconds of boot time) for a workload whose identity is
    /// known.
    #[must_use]
    pub fn decide(&self, request: &Request, now: u64) -> Decision {
        match *request {
            Request::Connect(destination)
            | Request::Send(destination)
            | Request::Packet(destination) => self.destination(&destination, now),
            Request::Bind(Endpoint { port: 0, .. }) => Decision::ALLOW,
            Request::Bind(endpoint)
            | Request::Reply(endpoint)
            | Request::Listen(endpoint)
            | Request::Accept(endpoint) => self.listening(endpoint, now),
            Request::Socket { family, protocol } => socket(family, protocol),
            Request::UnixConnect(socket, peer) | Request::UnixSend(socket, peer) => {
                self.unix_socket(&socket, peer, now)
            }
            Request::RawSocket { .. } => Decision::deny(Reason::RawSocket),
            Request::Exec(_, Naming::Unnamed) => Decision::deny(Reason::UnnamedFile),
            Request::Exec(_, Naming::Starting) => Decision::ALLOW,
            Request::Exec(file, Naming::Named) => self.executable(&file, now),
            Request::Leave(Mover::Workload) => Decision::deny(Reason::LeftWorkload),
            Request::Leave(Mover::Host) => Decision::ALLOW,
            Request::Malformed => Decision::deny(Reason::Malformed),
        }
    }

    /// A destination is permitted by a block that covers it, does not except it, and comes with a
    /// range that covers the port. A metadata address is covered only by a block that is exactly
    /// that address, and one that is reserved is excepted from every other block.
    fn destination(&self, destination: &Destination, now: u64) -> Decision {
        let address = destination.address.destination();
        let mut covered = false;
        let mut excepted_everywhere = true;
        let mut permissions = Vec::new();
        for permit in &self.permits {
            for egress in &permit.egress {
                for block in &egress.blocks {
                    if !covers(&block.cidr, &address) {
                        continue;
                    }
                    if address.is_metadata() && !is_exactly(&block.cidr, &address) {
                        continue;
                    }
                    covered = true;
                    if block.except.iter().any(|except| covers(except, &address)) {
                        continue;
                    }
                    let is_reserved = self.reserved.iter().any(|block| covers(block, &address));
                    if is_reserved && !is_exactly(&block.cidr, &address) {
                        continue;
                    }
                    excepted_everywhere = false;
                    if permits(&egress.ports, destination.protocol, destination.port) {
                        permissions.push(permit.permission());
                    }
                }
            }
        }
        match () {
            () if !covered && address.is_metadata() => Decision::deny(Reason::Metadata),
            () if !covered => Decision::deny(Reason::NotGranted),
            () if excepted_everywhere => Decision::deny(Reason::Excepted),
            () => answer(permissions, now),
        }
    }

    fn listening(&self, endpoint: Endpoint, now: u64) -> Decision {
        if self.permits.iter().all(|permit| permit.listening.is_empty()) {
            return Decision::deny(Reason::NotGranted);
        }
        let permissions = self
            .permits
            .iter()
            .filter(|permit| permits(&permit.listening, endpoint.protocol, endpoint.port))
            .map(Permit::permission)
            .collect();
        answer(permissions, now)
    }

    /// Of the permits that name a file's device and inode the one that answers also says which
    /// generation it must have: a file has one at a time, and the permits were all resolved at the
    /// same time. Where one permit was resolved twice, the highest counts.
    fn executable(&self, file: &FileId, now: u64) -> Decision {
        let mut named = Vec::new();
        for permit in &self.permits {
            for executable in &permit.executables {
                if (executable.device, executable.inode) == (file.device, file.inode) {
                    named.push((permit.permission(), executable.generation));
                }
            }
        }
        named.sort_by_key(|(permission, generation)| {
            (precedence(permission), std::cmp::Reverse(*generation))
        });
        match named.first() {
            None => Decision::deny(Reason::NotGranted),
            Some((_, generation)) if *generation != 0 && *generation != file.generation => {
                Decision::deny(Reason::ReplacedFile)
            }
            Some((permission, _)) => answer(vec![*permission], now),
        }
    }

    /// A workload's own sockets are its own affair, and one without a name was handed to it. Any
    /// other is permitted by a permit that names its directory and name, if the name has a number:
    /// a socket without one is mentioned by no scope, whatever else it looks like.
    fn unix_socket(&self, socket: &UnixSocket, peer: Peer, now: u64) -> Decision {
        match peer {
            Peer::Own | Peer::Unnamed => return Decision::ALLOW,
            Peer::Other => {}
        }
        let permissions: Vec<Permission> = self
            .permits
            .iter()
            .filter(|permit| socket.name.is_some() && permit.unix_sockets.contains(socket))
            .map(Permit::permission)
            .collect();
        if permissions.is_empty() {
            return Decision::deny(Reason::NotGranted);
        }
        answer(permissions, now)
    }
}

/// Sockets whose every use is asked for again need no permission, nor does reading routes.
fn socket(family: u16, protocol: u16) -> Decision {
    let is_judged_later = [family::UNIX, family::INET, family::INET6].contains(&family);
    let reads_routes = (family, protocol) == (family::NETLINK, family::NETLINK_ROUTE);
    if is_judged_later || reads_routes {
        Decision::ALLOW
    } else {
        Decision::deny(Reason::SocketFamily)
    }
}

fn covers(cidr: &IpNet, address: &Address) -> bool {
    Prefix::canonical(cidr).any(|prefix| prefix.covers(address))
}

fn is_exactly(cidr: &IpNet, address: &Address) -> bool {
    Prefix::canonical(cidr).any(|prefix| prefix.covers(address) && prefix.length() == 128)
}

fn permits(ranges: &[PortRange], protocol: u8, port: u16) -> bool {
    ranges.iter().any(|range| {
        let any = agentguard_common::Protocol::Any;
        (range.protocol == any || range.protocol as u8 == protocol)
            && (range.first..=range.last).contains(&port)
    })
}

/// Of the permissions that cover a request the first in [`precedence`] answers.
fn answer(permissions: Vec<Permission>, now: u64) -> Decision {
    match permissions.into_iter().min_by_key(precedence) {
        None => Decision::deny(Reason::PortNotGranted),
        Some(permission) if permission.expires_at > now => {
            Decision { verdict: Verdict::Allow, permission }
        }
        Some(permission) => Decision { verdict: Verdict::Deny(Reason::Expired), permission },
    }
}
