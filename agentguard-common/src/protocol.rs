//! Transport protocols as scopes name them and as IP numbers them.

/// What a port rule says about the transport.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// Every protocol; carries no port.
    Any = 0,
    /// ICMP and ICMPv6 (IP protocols 1 and 58); carries no port.
    Icmp = 1,
    Tcp = 6,
    Udp = 17,
    Sctp = 132,
}

impl Protocol {
    /// Every protocol a manifest can name.
    pub const ALL: [Self; 5] = [Self::Any, Self::Icmp, Self::Tcp, Self::Udp, Self::Sctp];

    /// Whether requests of this protocol carry a port.
    #[must_use]
    pub const fn has_ports(self) -> bool {
        match self {
            Self::Tcp | Self::Udp | Self::Sctp => true,
            Self::Any | Self::Icmp => false,
        }
    }

    /// The word used in manifests, records and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Any => "Any",
            Self::Icmp => "ICMP",
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// A code that names no [`Protocol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownProtocol(pub u8);

impl TryFrom<u8> for Protocol {
    type Error = UnknownProtocol;

    fn try_from(code: u8) -> Result<Self, UnknownProtocol> {
        Self::ALL.into_iter().find(|protocol| *protocol as u8 == code).ok_or(UnknownProtocol(code))
    }
}
