//! The canonical form of a CIDR.
//!
//! Decisions are made on [`Address`]es, which have one spelling for each destination. A CIDR is
//! brought to the same form here, so that it covers what it reaches.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
};

use agentguard_common::Address;
use ipnet::{IpNet, Ipv6Net};
use zerocopy::IntoBytes;

/// Bits of an address.
const ADDRESS_BITS: u8 = 128;
/// Bits of an IPv4 address.
const IPV4_BITS: u8 = 32;
/// Bits before the IPv4 address in the canonical form, and in all but one of the folded forms.
const MAPPED_BITS: u8 = 96;
/// Bits before the IPv4 address in a 6to4 address.
const SIX_TO_FOUR_BITS: u8 = 16;

/// A block of canonical addresses.
///
/// What a CIDR covers:
/// - An IPv4 CIDR covers its addresses in every spelling; `0.0.0.0/0` all of IPv4.
/// - An IPv6 CIDR inside a form that [`Address`] folds into IPv4 (mapped, compatible, translated,
///   NAT64, 6to4) is the IPv4 block that it spells. Every 6to4 address below one /48 reaches the
///   same IPv4 address, so a longer prefix there is still that one address.
/// - Every other IPv6 CIDR covers the addresses in it that are not folded: `::/0` covers all of
///   IPv6 and nothing of IPv4, and `2000::/3` no 6to4 address.
///
/// A destination is never the unspecified address (see [`Address::destination`]), so a block
/// that holds nothing else, as `0.0.0.0/32`, covers no destination.
///
/// Sorted, a block comes before everything in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    bits: u128,
    length: u8,
}

impl Prefix {
    /// Bits of an address.
    pub(super) const BITS: u8 = ADDRESS_BITS;
    /// All of IPv4.
    pub const IPV4: Self = Self { bits: 0xffff << IPV4_BITS, length: MAPPED_BITS };
    /// `::` and `::1`, which lie among the IPv4-compatible addresses but are no spelling of IPv4.
    const UNSPECIFIED_AND_LOOPBACK: Self = Self { bits: 0, length: ADDRESS_BITS - 1 };

    /// The blocks of canonical addresses that `cidr` covers: one, or two where it holds
    /// IPv4-compatible addresses along with `::1`.
    pub fn canonical(cidr: &IpNet) -> impl Iterator<Item = Self> + use<> {
        let (block, beside) = match cidr {
            IpNet::V4(cidr) => (Self::v4(cidr.network().into(), cidr.prefix_len()), None),
            IpNet::V6(cidr) => Self::canonical_v6(cidr),
        };
        [Some(block), beside].into_iter().flatten()
    }

    fn canonical_v6(cidr: &Ipv6Net) -> (Self, Option<Self>) {
        let own = Self { bits: cidr.network().into(), length: cidr.prefix_len() };
        let six_to_four = Self { bits: 0x2002 << 112, length: SIX_TO_FOUR_BITS };
        if six_to_four.contains(own) {
            let length = (own.length - SIX_TO_FOUR_BITS).min(IPV4_BITS);
            return (Self::v4((own.bits >> 80) as u32, length), None);
        }
        let embedded = || Self::v4(own.bits as u32, own.length - MAPPED_BITS);
        let translated = Self { bits: 0xffff << 48, length: MAPPED_BITS };
        let nat64 = Self { bits: 0x0064_ff9b << 96, length: MAPPED_BITS };
        if [Self::IPV4, translated, nat64].iter().any(|form| form.contains(own)) {
            return (embedded(), None);
        }
        let compatible = Self { bits: 0, length: MAPPED_BITS };
        if compatible.contains(own) && !Self::UNSPECIFIED_AND_LOOPBACK.contains(own) {
            let beside = Self::UNSPECIFIED_AND_LOOPBACK;
            return (embedded(), own.contains(beside).then_some(beside));
        }
        (own, None)
    }

    /// `length` is that of an IPv4 prefix; bits behind it are cut off.
    fn v4(address: u32, length: u8) -> Self {
        let length = MAPPED_BITS + length;
        Self { bits: (Self::IPV4.bits | u128::from(address)) & mask(length), length }
    }

    /// The first address of the block. As the bits stand, never folded: `2002::/15` begins at
    /// `2002::`.
    #[must_use]
    pub fn network(self) -> Address {
        let mut address = Address::default();
        address.as_mut_bytes().copy_from_slice(&self.bits.to_be_bytes());
        address
    }

    /// Bits of the address that the block fixes, 0 to 128; for IPv4 96 to 128.
    #[must_use]
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether the block is one address.
    #[must_use]
    pub const fn is_host(self) -> bool {
        self.length == ADDRESS_BITS
    }

    /// Whether the block is of IPv4 addresses.
    #[must_use]
    pub const fn is_v4(self) -> bool {
        Self::IPV4.contains(self)
    }

    /// Whether the block covers `address`.
    #[must_use]
    pub fn covers(self, address: &Address) -> bool {
        let host = Self::host(address);
        self.contains(host) && self.is_v4() == host.is_v4()
    }

    /// The block of one address.
    pub(super) fn host(address: &Address) -> Self {
        let bits = address
            .words()
            .iter()
            .fold(0, |bits, word| (bits << 32) | u128::from(u32::from_be(*word)));
        Self { bits, length: ADDRESS_BITS }
    }

    /// The part of `address` that a block of `length` bits fixes.
    pub(super) fn truncated(address: &Address, length: u8) -> Self {
        Self { bits: Self::host(address).bits & mask(length), length }
    }

    /// The block of the first `length` bits of this one.
    pub(super) const fn truncated_to(self, length: u8) -> Self {
        Self { bits: self.bits & mask(length), length }
    }

    /// How many bits both blocks fix and have in common.
    pub(super) fn common(self, other: Self) -> u8 {
        let same = (self.bits ^ other.bits).leading_zeros().min(u32::from(ADDRESS_BITS)) as u8;
        same.min(self.length).min(other.length)
    }

    /// Some address of the block.
    #[cfg(test)]
    pub(super) const fn nth(self, number: u128) -> Self {
        Self { bits: self.bits | (number & !mask(self.length)), length: ADDRESS_BITS }
    }

    /// Whether all bits that this block fixes are the same in `other`, as longest-prefix matching
    /// sees it: unlike [`Self::covers`], `::/0` contains IPv4.
    pub(super) const fn contains(self, other: Self) -> bool {
        self.length <= other.length && (self.bits ^ other.bits) & mask(self.length) == 0
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_v4() {
            let address = self.network().ip();
            write!(formatter, "{address}/{}", self.length - MAPPED_BITS)
        } else {
            write!(formatter, "{}/{}", IpAddr::V6(Ipv6Addr::from(self.bits)), self.length)
        }
    }
}

const fn mask(length: u8) -> u128 {
    if length == 0 { 0 } else { u128::MAX << (ADDRESS_BITS - length) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::allowlist::agreement::any_cidr;

    fn canonical(cidr: &str) -> Vec<String> {
        Prefix::canonical(&cidr.parse().unwrap()).map(|prefix| prefix.to_string()).collect()
    }

    fn covers(cidr: &str, address: &str) -> bool {
        let address = Address::from(address.parse::<IpAddr>().unwrap());
        Prefix::canonical(&cidr.parse().unwrap()).any(|prefix| prefix.covers(&address))
    }

    #[test]
    fn a_cidr_inside_a_folded_form_is_the_ipv4_block_it_spells() {
        for (cidr, block) in [
            ("192.0.2.77/24", "192.0.2.0/24"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::192.0.2.7/128", "192.0.2.7/32"),
            ("::ffff:0:192.0.2.0/120", "192.0.2.0/24"),
            ("64:ff9b::/96", "0.0.0.0/0"),
            ("64:ff9b::192.0.2.0/120", "192.0.2.0/24"),
            ("2002::/16", "0.0.0.0/0"),
            ("2002:c000:200::/40", "192.0.2.0/24"),
            ("2002:c000:207::/48", "192.0.2.7/32"),
            ("2002:c000:207:1::/64", "192.0.2.7/32"),
            ("2002:c000:207::1/128", "192.0.2.7/32"),
        ] {
            assert_eq!(canonical(cidr), [block], "{cidr}");
        }
    }

    #[test]
    fn a_cidr_of_ipv6_stays_what_it_is() {
        for cidr in [
            "::/0",
            "::/128",
            "::1/128",
            "::/127",
            "2002::/15",
            "2000::/3",
            "64:ff9b::/64",
            "64:ff9b:1::/48",
            "::/95",
            "2001:db8::/32",
        ] {
            assert_eq!(canonical(cidr), [cidr]);
        }
    }

    #[test]
    fn ipv4_compatible_blocks_keep_the_ipv6_loopback() {
        assert_eq!(canonical("::/96"), ["0.0.0.0/0", "::/127"]);
        assert_eq!(canonical("::/126"), ["0.0.0.0/30", "::/127"]);
        assert_eq!(canonical("::2/127"), ["0.0.0.2/31"]);
    }

    #[test]
    fn an_ipv6_block_covers_no_ipv4_address_in_any_spelling() {
        for address in ["192.0.2.7", "::ffff:192.0.2.7", "2002:c000:207::1", "64:ff9b::1.2.3.4"] {
            for cidr in ["::/0", "::/64", "::/80", "2000::/3", "64:ff9b::/64"] {
                assert!(!covers(cidr, address), "{cidr} {address}");
            }
            assert!(covers("0.0.0.0/0", address), "{address}");
        }
        assert!(covers("::/0", "::1"));
        assert!(covers("::/0", "2001:db8::1"));
        assert!(!covers("0.0.0.0/0", "::1"));
    }

    #[test]
    fn the_network_of_a_wide_block_is_not_folded() {
        let wide = Prefix::canonical(&"64:ff9b::/64".parse().unwrap()).next().unwrap();
        assert_eq!(wide.network().words()[0], 0x0064_ff9b_u32.to_be());
        assert!(covers("64:ff9b::/64", "64:ff9b::1:0:0:0"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        /// The canonical form, checked address by address on both sides of the folding.
        #[test]
        fn a_cidr_covers_the_addresses_in_it_except_ipv4_inside_a_wider_ipv6_block(
            cidr in any_cidr(),
            inside in any::<u128>(),
        ) {
            let spelling = match cidr {
                IpNet::V4(cidr) => {
                    let host = u32::from(cidr.hostmask());
                    IpAddr::V4((u32::from(cidr.network()) | (inside as u32 & host)).into())
                }
                IpNet::V6(cidr) => {
                    let host = u128::from(cidr.hostmask());
                    IpAddr::V6((u128::from(cidr.network()) | (inside & host)).into())
                }
            };
            let address = Address::from(spelling);
            let mut blocks = Prefix::canonical(&cidr);
            let of_ipv4 = Prefix::canonical(&cidr).any(Prefix::is_v4);
            let covered = blocks.any(|block| block.covers(&address));
            prop_assert_eq!(covered, of_ipv4 || !Prefix::host(&address).is_v4(), "{}", spelling);
        }
    }
}
