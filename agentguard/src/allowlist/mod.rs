//! What the grants of one identity permit, and its compiled form.
//!
//! Takes permits as plain values: knows no manifest, no name and no kernel. Everything here is a
//! pure function of its arguments.

use std::cmp::Reverse;

use agentguard_common::{FileId, GrantId, Permission, Protocol, ScopeId, UnixSocket};
use ipnet::IpNet;

#[cfg(test)]
mod agreement;
pub mod compile;
mod cover;
pub mod prefix;
pub mod reserved;
pub mod specification;
pub mod tables;

/// What one grant of one scope permits to an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    pub scope: ScopeId,
    pub grant: GrantId,
    /// Nanoseconds of boot time (`CLOCK_BOOTTIME`) at which all of it ends;
    /// [`NEVER`](agentguard_common::allowlist::NEVER) for a standing grant.
    pub expires_at: u64,
    /// Where connections, datagrams and packets may go.
    pub egress: Vec<EgressPermit>,
    /// The files that may run.
    pub executables: Vec<FileId>,
    /// The unix sockets that may be connected and sent to. One without a name's number permits
    /// nothing.
    pub unix_sockets: Vec<UnixSocket>,
    /// Where the workload may bind, listen, accept and answer.
    pub listening: Vec<PortRange>,
}

/// Every one of `blocks`, at every one of `ports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressPermit {
    pub blocks: Vec<Block>,
    pub ports: Vec<PortRange>,
}

/// Every address in `cidr` that is in none of `except`; see [`prefix::Prefix`] for what a CIDR
/// covers.
///
/// An exception takes away from its own block only: what another block permits stays permitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub cidr: IpNet,
    pub except: Vec<IpNet>,
}

/// Ports of one protocol, `first` and `last` included.
///
/// All ports, and every protocol without ports, are `0..=65535`. A range whose `first` is above
/// its `last` permits nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    pub protocol: Protocol,
    pub first: u16,
    pub last: u16,
}

impl Permit {
    /// What a decision that rests on this permit names.
    ///
    /// In the tables an end of zero means "no permission", so what ended before the machine
    /// started ends at one nanosecond instead.
    #[must_use]
    pub fn permission(&self) -> Permission {
        Permission { expires_at: self.expires_at.max(1), scope: self.scope, grant: self.grant }
    }
}

/// The order in which permissions answer for the same request, the first one first: what lasts
/// longest, then the lowest grant, then the lowest scope.
fn precedence(permission: &Permission) -> (Reverse<u64>, GrantId, ScopeId) {
    (Reverse(permission.expires_at), permission.grant, permission.scope)
}
