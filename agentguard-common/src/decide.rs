//! The one function that decides.
//!
//! Pure and generic over a read-only view of the tables: the kernel programs run it over BPF maps,
//! `explain` and the fake datapath over ordinary collections. It allocates nothing, and its loops
//! are bounded for the verifier.

use crate::allowlist::{DestinationEntry, ExecutableEntry, Permission, ROWS_PER_SET, RuleRow, Tag};
use crate::request::{Destination, Endpoint, FileId, Mover, Naming, Request};
use crate::verdict::{Decision, Reason, Verdict};
use crate::{Address, AllowlistId, GrantId, RuleSetId, ScopeId};

/// A read-only view of the compiled allow-lists.
pub trait Tables {
    /// The entry with the longest prefix that covers `address`.
    fn destination(&self, allowlist: AllowlistId, address: &Address) -> Option<DestinationEntry>;

    /// A row of rules.
    fn rules(&self, id: RuleSetId) -> Option<&RuleRow>;

    /// Hands a number through. The kernel's tables hide it from the compiler on the way.
    fn opaque(&self, number: u64) -> u64 {
        number
    }

    /// The permission to run a file, found by device and inode.
    fn executable(&self, allowlist: AllowlistId, file: &FileId) -> Option<ExecutableEntry>;
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
        Request::Bind(endpoint) | Request::Reply(endpoint) => {
            if !tag.listening.is_some() {
                return Decision::deny(Reason::NotGranted);
            }
            decide_rules(tables, tag.listening, endpoint.protocol, endpoint.port, now)
        }
        Request::Exec(file, naming) => decide_executable(tables, tag, &file, naming, now),
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

/// Of all rules that cover the port the one that lasts longest answers, so that the verdict does
/// not depend on their order.
///
/// The scan has no branch: the verifier follows both ways of each, and what it learns of the best
/// so far keeps it from seeing that the ways meet again. With branches a set of 128 rules is too
/// much for it.
#[inline(always)]
fn decide_rules<T: Tables>(
    tables: &T,
    rules: RuleSetId,
    protocol: u8,
    port: u16,
    now: u64,
) -> Decision {
    let mut expires_at = 0;
    let mut scope = 0;
    let mut grant = 0;
    let mut row_id = rules;
    for _ in 0..ROWS_PER_SET {
        let Some(row) = tables.rules(row_id) else {
            return Decision::deny(Reason::MissingTable);
        };
        for rule in &row.rules {
            let Permission { expires_at: end, scope: of_scope, grant: of_grant } = rule.permission;
            let later = u64::wrapping_sub(expires_at, end) >> 63;
            let take = tables.opaque((later & rule.covers(protocol, port)).wrapping_neg());
            expires_at ^= (expires_at ^ end) & take;
            scope ^= (scope ^ of_scope.0) & take as u32;
            grant ^= (grant ^ of_grant.0) & take as u32;
        }
        row_id = row.next;
        if !row_id.is_some() {
            break;
        }
    }
    let permission = Permission { expires_at, scope: ScopeId(scope), grant: GrantId(grant) };
    if expires_at > now {
        Decision { verdict: Verdict::Allow, permission }
    } else if expires_at > 0 {
        Decision { verdict: Verdict::Deny(Reason::Expired), permission }
    } else {
        Decision::deny(Reason::PortNotGranted)
    }
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
        Naming::Named => {}
    }
    let Some(entry) = tables.executable(tag.allowlist, file) else {
        return Decision::deny(Reason::NotGranted);
    };
    if entry.generation != 0 && entry.generation != file.generation {
        return Decision::deny(Reason::ReplacedFile);
    }
    let verdict = if entry.permission.expires_at > now {
        Verdict::Allow
    } else {
        Verdict::Deny(Reason::Expired)
    };
    Decision { verdict, permission: entry.permission }
}
