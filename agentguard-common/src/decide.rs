//! The one function that decides.
//!
//! Pure and generic over a read-only view of the tables: the kernel programs run it over BPF maps,
//! `explain` and the fake datapath over ordinary collections. It allocates nothing, and its loops
//! are bounded for the verifier.

use crate::allowlist::Permission;
use crate::allowlist::{
    DestinationEntry, ExecutableEntry, ROWS_PER_SET, RULES_PER_ROW, RuleRow, Tag,
};
use crate::request::{
    Destination, Endpoint, FileId, Mover, Naming, Peer, Request, UnixSocket, family,
};
use crate::verdict::{Decision, Reason, Verdict};
use crate::{Address, AllowlistId, RuleSetId};

/// A read-only view of the compiled allow-lists.
pub trait Tables {
    /// The entry with the longest prefix that covers `address`.
    fn destination(&self, allowlist: AllowlistId, address: &Address) -> Option<DestinationEntry>;

    /// A row of rules.
    fn rules(&self, id: RuleSetId) -> Option<&RuleRow>;

    /// Looks for the rule of a set that answers for a port. The kernel's tables call [`search`] as
    /// a function of its own, which the verifier then follows once instead of on every path.
    fn search(&self, rules: RuleSetId, protocol: u8, port: u16) -> Found {
        search(self, rules, protocol, port)
    }

    /// Hands a number through. The kernel's tables hide it from the compiler on the way, which does
    /// nothing of what comes after before it.
    fn opaque(&self, number: u64) -> u64 {
        number
    }

    /// The permission to run a file, found by device and inode.
    fn executable(&self, allowlist: AllowlistId, file: &FileId) -> Option<ExecutableEntry>;

    /// The permission to connect and send to a unix socket.
    fn unix_socket(&self, allowlist: AllowlistId, socket: &UnixSocket) -> Option<Permission>;
}

/// Decides `request` of a workload with `tag` at `now` (nanoseconds of boot time).
#[inline(always)]
pub fn decide<T: Tables>(tables: &T, tag: &Tag, request: &Request, now: u64) -> Decision {
    match *request {
        Request::Malformed => return Decision::deny(Reason::Malformed),
        Request::Leave(Mover::Workload) => return Decision::deny(Reason::LeftWorkload),
        Request::Leave(Mover::Host) => return Decision::ALLOW,
        Request::RawSocket { .. } => return Decision::deny(Reason::RawSocket),
        Request::Connect(_)
        | Request::Send(_)
        | Request::Packet(_)
        | Request::Reply(_)
        | Request::Bind(_)
        | Request::Listen(_)
        | Request::Accept(_)
        | Request::Socket { .. }
        | Request::UnixConnect(..)
        | Request::UnixSend(..)
        | Request::Exec(..) => {}
    }
    if !tag.identity.is_some() {
        return Decision::deny(Reason::Unidentified);
    }
    match *request {
        Request::Connect(destination)
        | Request::Send(destination)
        | Request::Packet(destination) => decide_destination(tables, tag, &destination, now),
        // The kernel chooses a port nobody could have been told: that is how clients bind.
        Request::Bind(Endpoint { port: 0, .. }) => Decision::ALLOW,
        Request::Bind(endpoint)
        | Request::Reply(endpoint)
        | Request::Listen(endpoint)
        | Request::Accept(endpoint) => {
            if !tag.listening.is_some() {
                return Decision::deny(Reason::NotGranted);
            }
            decide_rules(tables, tag.listening, endpoint.protocol, endpoint.port, now)
        }
        Request::Exec(file, naming) => decide_executable(tables, tag, &file, naming, now),
        Request::Socket { family, protocol } => decide_family(family, protocol),
        Request::UnixConnect(socket, peer) | Request::UnixSend(socket, peer) => {
            decide_unix_socket(tables, tag, &socket, peer, now)
        }
        Request::Malformed | Request::Leave(_) | Request::RawSocket { .. } => {
            Decision::deny(Reason::Malformed)
        }
    }
}

#[inline(always)]
fn decide_destination<T: Tables>(
    tables: &T,
    tag: &Tag,
    destination: &Destination,
    now: u64,
) -> Decision {
    let address = destination.address.destination();
    let entry = tables.destination(tag.allowlist, &address);
    if address.is_metadata() && entry.is_none_or(|entry| entry.prefix != 128) {
        return Decision::deny(Reason::Metadata);
    }
    let Some(entry) = entry else { return Decision::deny(Reason::NotGranted) };
    if !entry.rules.is_some() {
        let uncovered = entry.prefix == DestinationEntry::UNCOVERED.prefix;
        return Decision::deny(if uncovered { Reason::NotGranted } else { Reason::Excepted });
    }
    decide_rules(tables, entry.rules, destination.protocol, destination.port, now)
}

#[inline(always)]
fn decide_rules<T: Tables>(
    tables: &T,
    rules: RuleSetId,
    protocol: u8,
    port: u16,
    now: u64,
) -> Decision {
    let found = tables.search(rules, protocol, port);
    if found == Found::NOTHING {
        return Decision::deny(Reason::PortNotGranted);
    }
    // An incomplete set names no row either.
    let Some(row) = tables.rules(found.row()) else {
        return Decision::deny(Reason::MissingTable);
    };
    decide_permission(row.rules[found.place()].permission, now)
}

/// Which rule of a set answers for a port: its row, and its place in the row in the lowest bits.
/// One number, because that is what a function of a kernel program can return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found(pub u64);

impl Found {
    /// No rule covers the port.
    pub const NOTHING: Self = Self(0);
    /// A row of the set is missing. It has the number of no row.
    const INCOMPLETE: Self = Self(1);

    const fn at(row: RuleSetId, place: usize) -> u64 {
        row.0 as u64 * RULES_PER_ROW as u64 + place as u64
    }

    #[inline(always)]
    const fn row(self) -> RuleSetId {
        RuleSetId((self.0 / RULES_PER_ROW as u64) as u32)
    }

    /// Below [`RULES_PER_ROW`].
    #[inline(always)]
    const fn place(self) -> usize {
        (self.0 % RULES_PER_ROW as u64) as usize
    }
}

/// Of all rules that cover the port the one that lasts longest answers, so that the verdict does
/// not depend on their order.
///
/// The scan has no branch: the verifier follows both ways of each, and what it learns of the best
/// so far keeps it from seeing that the ways meet again.
#[inline(always)]
pub fn search<T: Tables + ?Sized>(tables: &T, rules: RuleSetId, protocol: u8, port: u16) -> Found {
    let mut latest = 0;
    let mut found = Found::NOTHING.0;
    let mut row_id = rules;
    for _ in 0..ROWS_PER_SET {
        let Some(row) = tables.rules(row_id) else { return Found::INCOMPLETE };
        for (place, rule) in row.rules.iter().enumerate() {
            let end = rule.permission.expires_at;
            let later = u64::wrapping_sub(latest, end) as i64;
            // Once hidden, the compiler can not choose by one sign what to do about the other.
            let takes = tables.opaque((later & !rule.misses(protocol, port)) as u64) as i64;
            let take = tables.opaque((takes >> 63) as u64);
            latest ^= (latest ^ end) & take;
            // One rule is done with before the next: a program has 512 bytes for what it keeps.
            found = tables.opaque(found ^ (found ^ Found::at(row_id, place)) & take);
        }
        row_id = row.next;
        if !row_id.is_some() {
            break;
        }
    }
    Found(found)
}

#[inline(always)]
fn decide_executable<T: Tables>(
    tables: &T,
    tag: &Tag,
    file: &FileId,
    naming: Naming,
    now: u64,
) -> Decision {
    match naming {
        Naming::Unnamed => return Decision::deny(Reason::UnnamedFile),
        // Who made the pod has said what its containers start with.
        Naming::Starting => return Decision::ALLOW,
        Naming::Named => {}
    }
    let Some(entry) = tables.executable(tag.allowlist, file) else {
        return Decision::deny(Reason::NotGranted);
    };
    if entry.generation != 0 && entry.generation != file.generation {
        return Decision::deny(Reason::ReplacedFile);
    }
    decide_permission(entry.permission, now)
}

#[inline(always)]
fn decide_permission(permission: Permission, now: u64) -> Decision {
    let verdict =
        if permission.expires_at > now { Verdict::Allow } else { Verdict::Deny(Reason::Expired) };
    Decision { verdict, permission }
}

/// What an IP socket or a unix socket may do is asked when it does it; of all other families only
/// what a resolver needs is there for the asking.
#[inline(always)]
fn decide_family(family: u16, protocol: u16) -> Decision {
    match (family, protocol) {
        (family::UNIX | family::INET | family::INET6, _)
        | (family::NETLINK, family::NETLINK_ROUTE) => Decision::ALLOW,
        (_, _) => Decision::deny(Reason::SocketFamily),
    }
}

#[inline(always)]
fn decide_unix_socket<T: Tables>(
    tables: &T,
    tag: &Tag,
    socket: &UnixSocket,
    peer: Peer,
    now: u64,
) -> Decision {
    match peer {
        // Among themselves the processes of a workload have pipes and shared memory as well.
        Peer::Own | Peer::Unnamed => return Decision::ALLOW,
        Peer::Other => {}
    }
    if !socket.name.is_some() {
        return Decision::deny(Reason::NotGranted);
    }
    match tables.unix_socket(tag.allowlist, socket) {
        Some(permission) => decide_permission(permission, now),
        None => Decision::deny(Reason::NotGranted),
    }
}
