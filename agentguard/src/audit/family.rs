//! Families of sockets by the names that manuals give them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A family of sockets: its name, as `AF_VSOCK`, or its number after `AF/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family(pub u16);

/// `AF_*` by number, without the prefix (include/linux/socket.h).
const NAMES: [&str; 46] = [
    "UNSPEC",
    "UNIX",
    "INET",
    "AX25",
    "IPX",
    "APPLETALK",
    "NETROM",
    "BRIDGE",
    "ATMPVC",
    "X25",
    "INET6",
    "ROSE",
    "DECnet",
    "NETBEUI",
    "SECURITY",
    "KEY",
    "NETLINK",
    "PACKET",
    "ASH",
    "ECONET",
    "ATMSVC",
    "RDS",
    "SNA",
    "IRDA",
    "PPPOX",
    "WANPIPE",
    "LLC",
    "IB",
    "MPLS",
    "CAN",
    "TIPC",
    "BLUETOOTH",
    "IUCV",
    "RXRPC",
    "ISDN",
    "PHONET",
    "IEEE802154",
    "CAIF",
    "ALG",
    "NFC",
    "VSOCK",
    "KCM",
    "QIPCRTR",
    "SMC",
    "XDP",
    "MCTP",
];

/// A text that names no family.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no family of sockets; write one as AF_VSOCK, or its number as AF/40")]
pub struct UnknownFamily(String);

impl fmt::Display for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.get(usize::from(self.0)) {
            Some(name) => write!(formatter, "AF_{name}"),
            None => write!(formatter, "AF/{}", self.0),
        }
    }
}

impl FromStr for Family {
    type Err = UnknownFamily;

    fn from_str(text: &str) -> Result<Self, UnknownFamily> {
        let by_name = text
            .strip_prefix("AF_")
            .and_then(|wanted| NAMES.iter().position(|name| *name == wanted))
            .and_then(|number| u16::try_from(number).ok());
        let number = by_name.or_else(|| text.strip_prefix("AF/")?.parse().ok());
        number.map(Self).ok_or_else(|| UnknownFamily(text.to_owned()))
    }
}

impl Serialize for Family {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Family {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Family {
    fn schema_name() -> Cow<'static, str> {
        "Family".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^AF(_[A-Za-z0-9]+|/[0-9]{1,5})$",
            "description": "A family of sockets: its name, as `AF_VSOCK`, or its number after `AF/`.",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_the_kernels_numbers() {
        for (number, name) in
            [(1, "AF_UNIX"), (10, "AF_INET6"), (16, "AF_NETLINK"), (17, "AF_PACKET")]
        {
            assert_eq!(Family(number).to_string(), name);
        }
        for (number, name) in [(38, "AF_ALG"), (40, "AF_VSOCK"), (44, "AF_XDP"), (46, "AF/46")] {
            assert_eq!(Family(number).to_string(), name);
        }
    }

    #[test]
    fn every_family_reads_back() {
        for number in 0..=300 {
            assert_eq!(Family(number).to_string().parse(), Ok(Family(number)));
        }
        for text in ["", "AF_", "AF_vsock", "vsock", "AF/65536", "AF/-1", "40"] {
            assert!(text.parse::<Family>().is_err(), "{text}");
        }
    }
}
