//! The kinds of sockets that IP carries.

use std::{io, net::SocketAddr, os::fd::AsRawFd};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{outcome::Failure, sockets::be_patient};

/// `SOCK_DCCP` of the kernel.
const DATAGRAM_CONGESTION: i32 = 6;
const SOL_DCCP: i32 = 269;
const DCCP_SOCKOPT_SERVICE: i32 = 2;
/// `IPPROTO_SMC` of the kernel, from 6.11 on.
const IPPROTO_SMC: i32 = 256;

/// What travels over IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Transport {
    Tcp,
    Mptcp,
    /// A stream.
    Sctp,
    /// One socket for many peers.
    SctpMany,
    Dccp,
    UdpLite,
    /// Shared memory, negotiated over TCP.
    Smc,
}

impl Transport {
    /// An unconnected socket of the family of `peer`.
    pub(crate) fn socket(self, peer: SocketAddr) -> Result<Socket, Failure> {
        let (kind, protocol) = match self {
            Self::Tcp => (libc::SOCK_STREAM, libc::IPPROTO_TCP),
            Self::Mptcp => (libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
            Self::Sctp => (libc::SOCK_STREAM, libc::IPPROTO_SCTP),
            Self::SctpMany => (libc::SOCK_SEQPACKET, libc::IPPROTO_SCTP),
            Self::Dccp => (DATAGRAM_CONGESTION, libc::IPPROTO_DCCP),
            Self::UdpLite => (libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
            Self::Smc => (libc::SOCK_STREAM, IPPROTO_SMC),
        };
        let protocol = Some(Protocol::from(protocol));
        let socket = Socket::new(Domain::for_address(peer), Type::from(kind), protocol)
            .map_err(|error| Failure::at("socket", error))?;
        be_patient(&socket)?;
        if self == Self::Dccp {
            // Both ends name the service they mean.
            option(&socket, SOL_DCCP, DCCP_SOCKOPT_SERVICE, &42_u32.to_be_bytes())
                .map_err(|error| Failure::setup("the service code", error))?;
        }
        Ok(socket)
    }

    /// Whether a server takes connections from a listener.
    pub(crate) const fn listens(self) -> bool {
        match self {
            Self::Tcp | Self::Mptcp | Self::Sctp | Self::SctpMany | Self::Dccp | Self::Smc => true,
            Self::UdpLite => false,
        }
    }
}

/// `setsockopt`, for which no wrapper has a name. Some options answer with a number.
pub(crate) fn option(socket: &Socket, level: i32, name: i32, value: &[u8]) -> io::Result<i32> {
    // SAFETY: the value outlives the call and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
