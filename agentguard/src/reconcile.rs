//! What has to change so that the kernel holds what the grants say: a pure difference.
//!
//! Knows neither the kernel nor the clock. An allow-list that is the same stays where it is, so a
//! change of one identity costs the others nothing.

use std::collections::BTreeMap;

use crate::allowlist::compile::CompiledAllowlist;

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<K> {
    /// Load this allow-list beside the old one, then switch the identity's workloads to it.
    Switch { identity: K, allowlist: CompiledAllowlist },
    /// No workload has this identity any more; its allow-list can go.
    Retire { identity: K },
}

/// The steps from what is in force to what is wanted, in the order of identities, those that take
/// something away included.
#[must_use]
pub fn plan<K: Ord + Clone>(
    in_force: &BTreeMap<K, &CompiledAllowlist>,
    wanted: BTreeMap<K, CompiledAllowlist>,
) -> Vec<Step<K>> {
    let retired: Vec<Step<K>> = in_force
        .keys()
        .filter(|identity| !wanted.contains_key(identity))
        .map(|identity| Step::Retire { identity: identity.clone() })
        .collect();
    let switched = wanted.into_iter().filter_map(|(identity, allowlist)| {
        let same = in_force.get(&identity).is_some_and(|current| **current == allowlist);
        (!same).then_some(Step::Switch { identity, allowlist })
    });
    switched.chain(retired).collect()
}

#[cfg(test)]
mod tests {
    use agentguard_common::allowlist::NEVER;
    use agentguard_common::{GrantId, Protocol, ScopeId};

    use super::*;
    use crate::allowlist::compile::compile;
    use crate::allowlist::{Permit, PortRange};

    fn listening(port: u16) -> CompiledAllowlist {
        let range = PortRange { protocol: Protocol::Tcp, first: port, last: port };
        compile(&[Permit {
            scope: ScopeId(1),
            grant: GrantId(1),
            expires_at: NEVER,
            egress: Vec::new(),
            executables: Vec::new(),
            unix_sockets: Vec::new(),
            listening: vec![range],
        }])
        .unwrap()
    }

    #[test]
    fn what_is_the_same_stays() {
        let (one, two) = (listening(1), listening(2));
        let in_force = BTreeMap::from([("a", &one), ("b", &two)]);
        let wanted = BTreeMap::from([("a", one.clone()), ("b", two.clone())]);
        assert_eq!(plan(&in_force, wanted), []);
    }

    #[test]
    fn what_changed_is_switched_and_what_is_gone_is_retired() {
        let (one, two) = (listening(1), listening(2));
        let in_force = BTreeMap::from([("a", &one), ("b", &one)]);
        let wanted = BTreeMap::from([("a", two.clone()), ("c", one.clone())]);
        assert_eq!(
            plan(&in_force, wanted),
            [
                Step::Switch { identity: "a", allowlist: two },
                Step::Switch { identity: "c", allowlist: one.clone() },
                Step::Retire { identity: "b" },
            ]
        );
    }
}
