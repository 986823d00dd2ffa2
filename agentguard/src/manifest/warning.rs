//! What the author of valid manifests should know: grants that are over or standing, and rules that
//! reach further than they seem to.

use agentguard_common::Mode;
use ipnet::{IpNet, Ipv6Net};
use jiff::Timestamp;

use super::{Located, Manifest, ManifestWarning};
use crate::{
    grant::{Expiry, GrantDocument},
    identity::{Selector, WorkloadDocument},
    scope::{Destination, ExecutablePatternKind, ScopeDocument},
};

/// The well-known NAT64 prefix (RFC 6052): the last 32 bits are an IPv4 address.
const NAT64: &str = "64:ff9b::/96";
/// 6to4 (RFC 3056): the 32 bits that follow are an IPv4 address.
const SIX_TO_FOUR: &str = "2002::/16";
/// The shortest prefix that names one 6to4 address' worth of space.
const SIX_TO_FOUR_SITE: u8 = 48;

/// The warnings of all of `manifests`, as of `now`.
#[must_use]
pub fn warnings(manifests: &[Manifest], now: Timestamp) -> Vec<ManifestWarning> {
    manifests
        .iter()
        .flat_map(|manifest| match manifest {
            Manifest::Scope(scope) => of_scope(scope),
            Manifest::Grant(grant) => of_grant(grant, now).into_iter().collect(),
            Manifest::Workload(workload) => of_workload(workload).into_iter().collect(),
        })
        .collect()
}

fn of_grant(grant: &Located<GrantDocument>, now: Timestamp) -> Option<ManifestWarning> {
    let (message, remedy) = match grant.document.expiry {
        Expiry::Never => (
            "makes this a standing grant, which only revocation ends".to_owned(),
            "write a time unless that is meant",
        ),
        Expiry::At(end) if end <= now => (
            "is in the past, so the grant is over".to_owned(),
            "remove the grant, or give it a later time",
        ),
        Expiry::At(_) => return None,
    };
    let value = grant.document.expiry.to_string();
    Some(warn(grant, "spec.expiresAt", &value, message, remedy))
}

fn of_scope(scope: &Located<ScopeDocument>) -> Vec<ManifestWarning> {
    let mut warnings = Vec::new();
    for (rule_index, rule) in scope.document.egress.iter().enumerate() {
        for (index, destination) in rule.to.iter().enumerate() {
            let Destination::IpBlock { cidr: cidr @ IpNet::V6(block), except: _ } = destination
            else {
                continue;
            };
            let covered = embedding_prefixes(*block);
            if !covered.is_empty() {
                warnings.push(warn(
                    scope,
                    &format!("spec.egress[{rule_index}].to[{index}].ipBlock.cidr"),
                    &cidr.to_string(),
                    format!(
                        "covers {}, whose addresses are judged by the IPv4 address inside them",
                        covered.join(" and ")
                    ),
                    "add an ipBlock for those IPv4 addresses if they are meant",
                ));
            }
        }
    }
    for (index, pattern) in scope.document.exec.iter().enumerate() {
        if matches!(pattern.kind(), ExecutablePatternKind::Tree { directory } if directory.is_root())
        {
            warnings.push(warn(
                scope,
                &format!("spec.exec[{index}].path"),
                &pattern.to_string(),
                "permits every executable".to_owned(),
                "name the directories that are meant",
            ));
        }
    }
    warnings
}

fn of_workload(workload: &Located<WorkloadDocument>) -> Option<ManifestWarning> {
    let pattern = match &workload.document.selector {
        Selector::Cgroup(pattern) => pattern,
        Selector::SystemdUnit(_) => return None,
    };
    if pattern.pattern().names().next() != Some("*") {
        return None;
    }
    let effect = match workload.document.mode {
        Mode::Enforce => "restricts",
        Mode::Audit => "records",
    };
    Some(warn(
        workload,
        "spec.select.cgroup",
        &pattern.to_string(),
        format!("{effect} services of the host too, as it begins with `*`"),
        "begin with the name of a slice",
    ))
}

/// The prefixes with IPv4 addresses inside that `block` covers more than one such address of.
fn embedding_prefixes(block: Ipv6Net) -> Vec<&'static str> {
    let covers = |prefix: &str, one_address: u8| {
        prefix.parse().is_ok_and(|prefix: Ipv6Net| {
            block.prefix_len() < one_address && (block.contains(&prefix) || prefix.contains(&block))
        })
    };
    let mut covered = Vec::new();
    if covers(NAT64, 96) {
        covered.push(NAT64);
    }
    if covers(SIX_TO_FOUR, SIX_TO_FOUR_SITE) {
        covered.push(SIX_TO_FOUR);
    }
    covered
}

fn warn<D>(
    at: &Located<D>,
    field: &str,
    value: &str,
    message: String,
    remedy: &str,
) -> ManifestWarning {
    ManifestWarning(at.error(field, Some(value), message, remedy.to_owned()))
}
