//! What is asked of the decision.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Address, UnixNameId};

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

/// A unix socket as its server bound it: by a name in a directory, or by an abstract name.
///
/// The directory and not the socket's own file, since a server makes that anew at each start.
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
pub struct UnixSocket {
    /// The inode of the directory; zero for an abstract name. Where no scope mentions the name:
    /// something that tells this socket from others.
    pub directory: u64,
    /// `super_block.s_dev` of the directory, as in [`FileId::device`]; zero for an abstract name.
    pub device: u32,
    /// [`UnixNameId::NONE`]: no scope mentions the name.
    pub name: UnixNameId,
}

/// Whose the socket at the other end is. The codes are part of the ABI.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The workload's own: made by one of its processes.
    Own = 0,
    /// One that never had a name (`socketpair(2)`): a channel that whoever made it handed over.
    Unnamed = 1,
    /// Somebody else's: of the host, or of another workload.
    Other = 2,
}

/// Whether the file that will run has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    Named,
    /// No link is left or there never was one: `memfd`, `O_TMPFILE`, deleted.
    Unnamed,
    /// It has a name, and is what a container runtime starts a container with.
    Starting,
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
    /// Let others connect to a socket.
    Listen(Endpoint),
    /// Take a connection that somebody else made.
    Accept(Endpoint),
    /// Make a socket of a family other than IP's.
    Socket { family: u16, protocol: u16 },
    /// Connect a unix socket.
    UnixConnect(UnixSocket, Peer),
    /// Send a datagram to a unix socket.
    UnixSend(UnixSocket, Peer),
    /// Run a file.
    Exec(FileId, Naming),
    /// Be moved to, or be born in, a cgroup outside the workload.
    Leave(Mover),
    /// Something the hook could not read.
    Malformed,
}

/// Families of sockets that need no permission of their own (`AF_*` of the kernel's ABI).
pub mod family {
    /// Judged by whom they connect to.
    pub const UNIX: u16 = 1;
    /// Judged by where they go.
    pub const INET: u16 = 2;
    /// Judged by where they go.
    pub const INET6: u16 = 10;
    /// Only with [`NETLINK_ROUTE`], which resolvers read addresses and routes with.
    pub const NETLINK: u16 = 16;
    /// Its changes ask for `CAP_NET_ADMIN` in the network's own user namespace.
    pub const NETLINK_ROUTE: u16 = 0;
}
