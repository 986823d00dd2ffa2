//! What is asked of the decision.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Address;

/// IP protocol numbers the hooks meet (IANA; `IPPROTO_MPTCP` is Linux's own).
pub mod ip {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;
    /// Not an IP protocol: the socket's number for multipath TCP, which leaves as TCP.
    pub const MPTCP: u32 = 262;

    /// The protocol number rules are written for: ICMPv6 counts as ICMP, multipath TCP as TCP.
    /// A number that fits no IP header is `None`.
    #[inline(always)]
    #[must_use]
    pub const fn canonical(protocol: u32) -> Option<u8> {
        match protocol {
            MPTCP => Some(TCP),
            58 => Some(ICMP),
            0..=255 => Some(protocol as u8),
            _ => None,
        }
    }
}

/// Where a connect, a datagram or a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    pub address: Address,
    /// The IP protocol, canonical (see [`ip::canonical`]).
    pub protocol: u8,
    /// Host byte order; zero where the protocol has no ports.
    pub port: u16,
}

/// Where a socket is bound or listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The IP protocol, canonical (see [`ip::canonical`]).
    pub protocol: u8,
    /// Host byte order; zero lets the kernel choose.
    pub port: u16,
}

/// A file as the kernel resolved it: what will run, whatever it was called.
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
pub struct FileId {
    pub inode: u64,
    /// `super_block.s_dev`: major number in the upper 12 bits, minor in the lower 20.
    pub device: u32,
    /// `inode.i_generation`, which changes when a file system gives the inode number to a new
    /// file; zero where the file system has none.
    pub generation: u32,
}

/// Whether the file that will run has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    Named,
    /// No link is left or there never was one: `memfd`, `O_TMPFILE`, deleted.
    Unnamed,
}

/// Who moves a process out of its workload's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// A process of a workload, this one or another.
    Workload,
    /// The host: the process keeps its tag wherever it goes.
    Host,
}

/// What a workload's process asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Connect a socket.
    Connect(Destination),
    /// Send a datagram to an address given with the call.
    Send(Destination),
    /// A packet that leaves one of the workload's sockets.
    Packet(Destination),
    /// A packet that answers on a socket others connected to.
    Reply(Endpoint),
    /// Bind a socket to a local port.
    Bind(Endpoint),
    /// Open a raw IP socket.
    RawSocket { protocol: u8 },
    /// Run a file.
    Exec(FileId, Naming),
    /// Be moved to, or be born in, a cgroup outside the workload.
    Leave(Mover),
    /// Something the hook could not read.
    Malformed,
}
