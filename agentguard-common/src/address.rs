//! One 128-bit form for every address, so that a destination has one spelling and one verdict.
//!
//! IPv4 is held as IPv4-mapped IPv6 (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2). The other forms
//! that carry an IPv4 destination are folded into it: what they reach is the IPv4 address, so that
//! is what must be granted.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A destination address in canonical form.
///
/// Four words in network byte order: the bytes in memory are the address as it stands in a packet,
/// and the words are what the kernel's socket contexts hand out.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct Address {
    words: [u32; 4],
}

/// `::ffff:0:0/96`, the prefix of every canonical IPv4 address.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();
/// `64:ff9b::/96`, the well-known NAT64 prefix (RFC 6052).
const NAT64: u32 = 0x0064_ff9b_u32.to_be();
/// `2002::/16`, 6to4 (RFC 3056).
const SIX_TO_FOUR: u16 = 0x2002;

impl Address {
    /// 127.0.0.1
    pub const LOOPBACK_V4: Self = Self::v4(0x7f00_0001_u32.to_be());
    /// ::1
    pub const LOOPBACK_V6: Self = Self { words: [0, 0, 0, 1_u32.to_be()] };

    const fn v4(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    /// The canonical form of an IPv4 address given as one word in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_word(word: u32) -> Self {
        Self::v4(word)
    }

    /// The canonical form of an IPv6 address given as four words in network byte order.
    ///
    /// Folded into IPv4: IPv4-mapped, IPv4-compatible (RFC 4291 2.5.5.1), IPv4-translated
    /// (RFC 2765), NAT64 with the well-known prefix (RFC 6052) and 6to4 (RFC 3056).
    #[inline(always)]
    #[must_use]
    pub const fn from_v6_words(words: [u32; 4]) -> Self {
        let [a, b, c, d] = words;
        if (u32::from_be(a) >> 16) as u16 == SIX_TO_FOUR {
            let embedded = (u32::from_be(a) << 16) | (u32::from_be(b) >> 16);
            return Self::v4(embedded.to_be());
        }
        if a == NAT64 && b == 0 && c == 0 {
            return Self::v4(d);
        }
        if a == 0 && b == 0 {
            // IPv4-compatible; `::` and `::1` are addresses of their own.
            if c == 0 && u32::from_be(d) > 1 {
                return Self::v4(d);
            }
            // IPv4-translated, `::ffff:0:a.b.c.d`.
            if c == 0xffff_0000_u32.to_be() {
                return Self::v4(d);
            }
        }
        Self { words }
    }

    /// The address a packet really goes to: the kernel takes an unspecified destination for
    /// loopback (`ip_route_output`, `tcp_v6_connect`).
    #[inline(always)]
    #[must_use]
    pub const fn destination(self) -> Self {
        let [a, b, c, d] = self.words;
        if a == 0 && b == 0 && d == 0 {
            if c == MAPPED {
                return Self::LOOPBACK_V4;
            }
            if c == 0 {
                return Self::LOOPBACK_V6;
            }
        }
        self
    }

    /// The address of words that were taken from one, by [`Address::words`].
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The four words in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// The address as user space prints it: IPv4 where it is IPv4.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        let [a, b, c, d] = self.words;
        if a == 0 && b == 0 && c == MAPPED {
            IpAddr::V4(Ipv4Addr::from(u32::from_be(d)))
        } else {
            let high = (u64::from(u32::from_be(a)) << 32) | u64::from(u32::from_be(b));
            let low = (u64::from(u32::from_be(c)) << 32) | u64::from(u32::from_be(d));
            IpAddr::V6(Ipv6Addr::from((u128::from(high) << 64) | u128::from(low)))
        }
    }

    /// Whether this is an address from which a cloud hands out credentials or configuration.
    ///
    /// Such an address is reached only by a scope that names exactly it; a wider CIDR never
    /// covers it.
    #[inline(always)]
    #[must_use]
    pub const fn is_metadata(&self) -> bool {
        let [a, b, c, d] = self.words;
        if a == 0 && b == 0 {
            return c == MAPPED && is_metadata_v4(u32::from_be(d));
        }
        let (a, b, c, d) = (u32::from_be(a), u32::from_be(b), u32::from_be(c), u32::from_be(d));
        match (a, b, c, d) {
            // AWS instance metadata and EKS pod identity, fd00:ec2::254 and fd00:ec2::23.
            (0xfd00_0ec2, 0, 0, 0x254 | 0x23)
            // Google Cloud, fd20:ce::254.
            | (0xfd20_00ce, 0, 0, 0x254)
            // Scaleway, fd00:42::42.
            | (0xfd00_0042, 0, 0, 0x42)
            // OpenStack, fe80::a9fe:a9fe, and Oracle, fd00:c1::a9fe:a9fe.
            | (0xfe80_0000 | 0xfd00_00c1, 0, 0, 0xa9fe_a9fe) => true,
            // Translators of a site's own (RFC 8215) put the IPv4 address last, as a rule.
            (0x0064_ff9b, 0x0001_0000..=0x0001_ffff, _, d) => is_metadata_v4(d),
            (_, _, _, _) => false,
        }
    }
}

const fn is_metadata_v4(address: u32) -> bool {
    const AWS_GCP_AZURE_AND_OTHERS: u32 = 0xa9fe_a9fe; // 169.254.169.254
    const ECS_TASK: u32 = 0xa9fe_aa02; // 169.254.170.2
    const EKS_POD_IDENTITY: u32 = 0xa9fe_aa17; // 169.254.170.23
    const TENCENT: u32 = 0xa9fe_0017; // 169.254.0.23
    const SCALEWAY: u32 = 0xa9fe_2a2a; // 169.254.42.42
    const AZURE_WIRE_SERVER: u32 = 0xa83f_8110; // 168.63.129.16
    const ALIBABA: u32 = 0x6464_64c8; // 100.100.100.200
    const ORACLE_CLASSIC: u32 = 0xc000_00c0; // 192.0.0.192
    matches!(
        address,
        AWS_GCP_AZURE_AND_OTHERS
            | ECS_TASK
            | EKS_POD_IDENTITY
            | TENCENT
            | SCALEWAY
            | AZURE_WIRE_SERVER
            | ALIBABA
            | ORACLE_CLASSIC
    )
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self::v4(u32::from(address).to_be())
    }
}

impl From<Ipv6Addr> for Address {
    fn from(address: Ipv6Addr) -> Self {
        let bits = u128::from(address);
        Self::from_v6_words([
            ((bits >> 96) as u32).to_be(),
            ((bits >> 64) as u32).to_be(),
            ((bits >> 32) as u32).to_be(),
            (bits as u32).to_be(),
        ])
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => address.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn every_spelling_of_an_ipv4_destination_is_the_same_address() {
        for spelling in [
            "::ffff:192.0.2.7",
            "::192.0.2.7",
            "::ffff:0:192.0.2.7",
            "64:ff9b::192.0.2.7",
            "2002:c000:0207::",
            "2002:c000:0207:1:2:3:4:5",
        ] {
            assert_eq!(address(spelling), address("192.0.2.7"), "{spelling}");
        }
    }

    #[test]
    fn an_unspecified_destination_is_loopback() {
        assert_eq!(address("0.0.0.0").destination(), address("127.0.0.1"));
        assert_eq!(address("::").destination(), address("::1"));
        assert_eq!(address("::ffff:0.0.0.0").destination(), address("127.0.0.1"));
        assert_eq!(address("2001:db8::").destination(), address("2001:db8::"));
    }

    #[test]
    fn the_canonical_form_prints_as_the_address_it_is() {
        for text in ["192.0.2.7", "::1", "::", "2001:db8::1", "fe80::1", "127.0.0.1", "0.0.0.0"] {
            assert_eq!(address(text).ip().to_string(), text);
        }
    }

    #[test]
    fn metadata_addresses_are_known_in_every_spelling() {
        for text in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "fd00:ec2::254",
            "fd20:ce::254",
            "fe80::a9fe:a9fe",
            "fd00:c1::a9fe:a9fe",
            "64:ff9b:1::a9fe:a9fe",
            "100.100.100.200",
            "168.63.129.16",
        ] {
            assert!(address(text).is_metadata(), "{text}");
        }
        for text in ["169.254.169.253", "fd00:ec2::255", "::", "::1", "0.0.0.0"] {
            assert!(!address(text).is_metadata(), "{text}");
        }
    }
}
