//! Addresses that no block covers unless it is exactly the one address.
//!
//! Pure. They are the cluster's own: nodes, the API server, pods. Their number is bounded, as each
//! is a row of every allow-list that has a block around it; where there are more, neighbours become
//! one block, with what lies between them. That denies more, and never less.

use ipnet::IpNet;

use super::prefix::Prefix;

/// How many blocks an allow-list may have to except.
pub const MAX_RESERVED: usize = 1024;

/// Blocks of reserved addresses, none in another of its family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Sorted.
    v4: Vec<Prefix>,
    /// Sorted. As bits, one of these may be around all of IPv4.
    v6: Vec<Prefix>,
}

impl Reserved {
    #[must_use]
    pub fn new(blocks: &[IpNet]) -> Self {
        Self::bounded(blocks, MAX_RESERVED)
    }

    fn bounded(blocks: &[IpNet], most: usize) -> Self {
        let (mut v4, mut v6): (Vec<Prefix>, Vec<Prefix>) =
            blocks.iter().flat_map(Prefix::canonical).partition(|prefix| prefix.is_v4());
        for family in [&mut v4, &mut v6] {
            family.sort_unstable();
            // A block comes before everything in it.
            family.dedup_by(|inner, outer| outer.contains(*inner));
        }
        for shared in (0..Prefix::BITS).rev() {
            if v4.len() + v6.len() <= most {
                break;
            }
            (v4, v6) = (joined(&v4, shared), joined(&v6, shared));
        }
        Self { v4, v6 }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }

    /// The blocks, as they are excepted.
    #[must_use]
    pub fn prefixes(&self) -> Vec<Prefix> {
        [&self.v4[..], &self.v6].concat()
    }

    /// Those that have an address in common with `prefix`.
    pub(super) fn around_or_in(&self, prefix: Prefix) -> &[Prefix] {
        let family = if prefix.is_v4() { &self.v4 } else { &self.v6 };
        let begin = family.partition_point(|own| *own < prefix);
        // As none is in another, only the last one before can be around it.
        if let Some(before) = begin.checked_sub(1)
            && family[before].contains(prefix)
        {
            return &family[before..begin];
        }
        let inside = family[begin..].partition_point(|own| prefix.contains(*own));
        &family[begin..begin + inside]
    }
}

/// Neighbours that share their first `shared` bits become the block of all that they
/// share.
fn joined(sorted: &[Prefix], shared: u8) -> Vec<Prefix> {
    let mut joined: Vec<Prefix> = Vec::with_capacity(sorted.len());
    for prefix in sorted {
        match joined.last_mut() {
            Some(last) if last.common(*prefix) >= shared => {
                *last = last.truncated_to(last.common(*prefix));
            }
            Some(_) | None => joined.push(*prefix),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use agentguard_common::Address;
    use proptest::prelude::*;

    use super::*;
    use crate::allowlist::agreement::any_cidr;

    fn shown(reserved: &Reserved) -> Vec<String> {
        reserved.prefixes().iter().map(ToString::to_string).collect()
    }

    fn blocks(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_nearest_neighbours_are_joined_first() {
        let all = blocks(&[
            "10.0.0.1/32",
            "10.0.0.2/32",
            "10.0.7.0/24",
            "192.0.2.1/32",
            "2001:db8::1/128",
        ]);
        assert_eq!(Reserved::bounded(&all, 5).prefixes().len(), 5);
        assert_eq!(
            shown(&Reserved::bounded(&all, 4)),
            ["10.0.0.0/30", "10.0.7.0/24", "192.0.2.1/32", "2001:db8::1/128"]
        );
        assert_eq!(
            shown(&Reserved::bounded(&all, 3)),
            ["10.0.0.0/21", "192.0.2.1/32", "2001:db8::1/128"]
        );
        // The families stay apart, whatever the bound.
        assert_eq!(shown(&Reserved::bounded(&all, 1)), ["0.0.0.0/0", "2001:db8::1/128"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn what_is_reserved_stays_reserved_whatever_the_bound(
            blocks in prop::collection::vec(any_cidr(), 0..12),
            most in 1_usize..12,
            inside in any::<u128>(),
        ) {
            let reserved = Reserved::bounded(&blocks, most);
            // One of each family can be left at least.
            prop_assert!(reserved.prefixes().len() <= most.max(2));
            for block in blocks.iter().flat_map(Prefix::canonical) {
                let address = block.nth(inside);
                let is_reserved = reserved
                    .prefixes()
                    .iter()
                    .any(|own| own.contains(address) && own.is_v4() == block.is_v4());
                prop_assert!(is_reserved, "{} of {}", address, block);
            }
            for family in [&reserved.v4, &reserved.v6] {
                let pairs = family.iter().zip(family.iter().skip(1));
                for (first, second) in pairs {
                    prop_assert!(first < second && !first.contains(*second));
                }
            }
        }

        #[test]
        fn those_around_or_in_a_block_are_found(
            blocks in prop::collection::vec(any_cidr(), 0..12),
            cidr in any_cidr(),
        ) {
            let reserved = Reserved::new(&blocks);
            for prefix in Prefix::canonical(&cidr) {
                let found = reserved.around_or_in(prefix).to_vec();
                let expected: Vec<Prefix> = reserved
                    .prefixes()
                    .into_iter()
                    .filter(|own| own.is_v4() == prefix.is_v4())
                    .filter(|own| own.contains(prefix) || prefix.contains(*own))
                    .collect();
                prop_assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn an_address_in_another_spelling_is_the_same_one() {
        let reserved = Reserved::new(&blocks(&["::ffff:192.0.2.1/128"]));
        let address: Address = "192.0.2.1".parse::<std::net::IpAddr>().unwrap().into();
        assert!(reserved.prefixes()[0].covers(&address));
    }
}
