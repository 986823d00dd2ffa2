//! N7: sockets that are not TCP's or UDP's: raw IP, packets, and other families.

use std::{
    ffi::CString,
    io, mem,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::{
    outcome::{Attempt, Failure},
    sockets::{await_return, be_patient, number},
    transport::option,
};

/// The port the answer comes back to. Nobody listens there, and nobody need to.
const FROM_PORT: u16 = 40_000;
/// `SOCK_PACKET` of the kernel.
const SOCK_PACKET: i32 = 10;
/// `struct sockaddr_pkt`: family, device, protocol.
const PACKET_ADDRESS: usize = 18;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, clap::Subcommand)]
enum What {
    /// Send a datagram that was made by hand.
    Datagram {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        from: IpAddr,
        #[arg(long)]
        how: How,
    },
    /// Ask the kernel for what a netlink family knows.
    Netlink {
        #[arg(long)]
        protocol: i32,
        /// The type of the question.
        #[arg(long)]
        ask: u16,
        #[arg(long)]
        kind: Option<i32>,
    },
    /// Have the kernel hash a text.
    Hash,
    /// Make a socket of a family.
    Make {
        #[arg(long)]
        family: i32,
        #[arg(long)]
        kind: i32,
        #[arg(long)]
        protocol: i32,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum How {
    /// A raw socket of the protocol.
    Raw,
    /// The IP header by hand too.
    Header,
    /// A packet socket, above the link's header.
    Packet,
    /// A packet socket, with the link's header.
    Frame,
    /// A packet socket as it was made before there were packet sockets.
    OldPacket,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    match arguments.what {
        What::Datagram { to, from, how } => datagram(to, from, how),
        What::Netlink { protocol, ask, kind } => {
            netlink(protocol, ask, kind.unwrap_or(libc::SOCK_RAW))
        }
        What::Hash => hash(),
        What::Make { family, kind, protocol } => {
            let socket = make(family, kind, protocol)?;
            Ok(format!("made as descriptor {}", socket.as_raw_fd()))
        }
    }
}

fn make(family: i32, kind: i32, protocol: i32) -> Result<Socket, Failure> {
    let protocol = Some(Protocol::from(protocol));
    let socket = Socket::new(Domain::from(family), Type::from(kind), protocol)
        .map_err(|error| Failure::at("socket", error))?;
    be_patient(&socket)?;
    Ok(socket)
}

fn datagram(to: SocketAddr, from: IpAddr, how: How) -> Attempt {
    let number = number();
    let udp = udp(to.port(), &number);
    let every = (libc::ETH_P_IP as u16).to_be();
    let socket = match (how, to, from) {
        (How::Raw, SocketAddr::V4(v4), _) => {
            let socket = make(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_UDP)?;
            send(&socket, &udp, &SocketAddrV4::new(*v4.ip(), 0).into())?;
            socket
        }
        (How::Raw, SocketAddr::V6(v6), _) => {
            let socket = make(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_UDP)?;
            // Where the checksum is that the kernel fills in: over IPv6 there must be one.
            option(&socket, libc::IPPROTO_IPV6, libc::IPV6_CHECKSUM, &6_i32.to_ne_bytes())
                .map_err(|error| Failure::setup("setsockopt", error))?;
            send(&socket, &udp, &SocketAddrV6::new(*v6.ip(), 0, 0, 0).into())?;
            socket
        }
        (How::Header, SocketAddr::V4(v4), IpAddr::V4(from)) => {
            let socket = make(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_UDP)?;
            option(&socket, libc::IPPROTO_IP, libc::IP_HDRINCL, &1_i32.to_ne_bytes())
                .map_err(|error| Failure::setup("setsockopt", error))?;
            let peer = SocketAddrV4::new(*v4.ip(), 0).into();
            send(&socket, &packet(from, *v4.ip(), &udp), &peer)?;
            socket
        }
        (How::Packet, SocketAddr::V4(v4), IpAddr::V4(from)) => {
            let socket = make(libc::AF_PACKET, libc::SOCK_DGRAM, every.into())?;
            send(&socket, &packet(from, *v4.ip(), &udp), &link()?)?;
            socket
        }
        (How::Frame, SocketAddr::V4(v4), IpAddr::V4(from)) => {
            let socket = make(libc::AF_PACKET, libc::SOCK_RAW, every.into())?;
            send(&socket, &frame(&packet(from, *v4.ip(), &udp)), &link()?)?;
            socket
        }
        (How::OldPacket, SocketAddr::V4(v4), IpAddr::V4(from)) => {
            let socket = make(libc::AF_INET, SOCK_PACKET, every.into())?;
            send_by_name(&socket, &frame(&packet(from, *v4.ip(), &udp)))?;
            socket
        }
        (How::Header | How::Packet | How::Frame | How::OldPacket, _, _) => {
            return Err(Failure::unfit("made by hand for IPv4 only"));
        }
    };
    await_return(&socket, &number)
}

fn send(socket: &Socket, text: &[u8], to: &SockAddr) -> Result<(), Failure> {
    socket.send_to(text, to).map(drop).map_err(|error| Failure::at("send", error))
}

/// A UDP header without a checksum, and the text.
fn udp(port: u16, text: &[u8]) -> Vec<u8> {
    let length = (8 + text.len()) as u16;
    let header: [[u8; 2]; 4] =
        [FROM_PORT.to_be_bytes(), port.to_be_bytes(), length.to_be_bytes(), [0; 2]];
    [header.as_flattened(), text].concat()
}

/// An IPv4 header, and what it carries.
pub(crate) fn packet(from: Ipv4Addr, to: Ipv4Addr, carried: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend_from_slice(&((20 + carried.len()) as u16).to_be_bytes());
    packet.extend_from_slice(&[0, 1, 0, 0, 64, libc::IPPROTO_UDP as u8, 0, 0]);
    packet.extend_from_slice(&from.octets());
    packet.extend_from_slice(&to.octets());
    let sum: u32 =
        packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !(((folded & 0xffff) + (folded >> 16)) as u16);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend_from_slice(carried);
    packet
}

/// A datagram in its packet, by hand.
pub(crate) fn udp_packet(from: Ipv4Addr, to: SocketAddrV4, text: &[u8]) -> Vec<u8> {
    packet(from, *to.ip(), &udp(to.port(), text))
}

/// An Ethernet header for everyone, and the packet.
fn frame(packet: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1], &(libc::ETH_P_IP as u16).to_be_bytes(), packet].concat()
}

/// The link to the server side, and everyone on it.
fn link() -> Result<SockAddr, Failure> {
    let name = CString::from(c"near");
    // SAFETY: takes a string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Err(Failure::setup("the link", io::Error::last_os_error()));
    }
    // SAFETY: all-zero is a valid `sockaddr_ll`.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_IP as u16).to_be();
    address.sll_ifindex = index.cast_signed();
    address.sll_halen = 6;
    address.sll_addr[..6].fill(0xff);
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: a `sockaddr_ll` is one of the addresses that the storage is made for.
    unsafe { *storage.view_as::<libc::sockaddr_ll>() = address };
    // SAFETY: that much of it is a link's address.
    Ok(unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) })
}

/// Sends by the link's name, as old packet sockets do.
fn send_by_name(socket: &Socket, frame: &[u8]) -> Result<(), Failure> {
    let mut address = [0_u8; PACKET_ADDRESS];
    address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    address[2..6].copy_from_slice(b"near");
    address[16..].copy_from_slice(&(libc::ETH_P_IP as u16).to_be_bytes());
    // SAFETY: both buffers outlive the call, with their lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            address.as_ptr().cast(),
            address.len() as libc::socklen_t,
        )
    };
    if sent < 0 {
        return Err(Failure::at("send", io::Error::last_os_error()));
    }
    Ok(())
}

/// Asks for everything, and waits for the first part of the answer.
fn netlink(protocol: i32, ask: u16, kind: i32) -> Attempt {
    let socket = make(libc::AF_NETLINK, kind, protocol)?;
    // `NLM_F_REQUEST | NLM_F_DUMP`
    let flags = 0x1_u16 | 0x300;
    // Zeros behind the header are a question about everything, in every family asked here.
    let mut question = [0_u8; 16 + 56];
    let length = question.len() as u32;
    question[..4].copy_from_slice(&length.to_ne_bytes());
    question[4..6].copy_from_slice(&ask.to_ne_bytes());
    question[6..8].copy_from_slice(&flags.to_ne_bytes());
    // The first byte of a question for sockets is their family, of one for a family's commands
    // the command.
    question[16] = if protocol == libc::NETLINK_GENERIC { 3 } else { libc::AF_INET as u8 };
    question[17] = if protocol == libc::NETLINK_GENERIC { 1 } else { libc::IPPROTO_TCP as u8 };
    socket.send(&question).map_err(|error| Failure::at("ask", error))?;
    let mut answer = [mem::MaybeUninit::uninit(); 8192];
    let length = socket.recv(&mut answer).map_err(|error| Failure::at("the answer", error))?;
    Ok(format!("{length} bytes of answer"))
}

/// Hashes a text with `AF_ALG`.
fn hash() -> Attempt {
    let socket = make(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)?;
    // SAFETY: all-zero is a valid `sockaddr_alg`.
    let mut address: libc::sockaddr_alg = unsafe { mem::zeroed() };
    address.salg_family = libc::AF_ALG as u16;
    address.salg_type[..4].copy_from_slice(b"hash");
    address.salg_name[..6].copy_from_slice(b"sha256");
    let length = size_of::<libc::sockaddr_alg>() as libc::socklen_t;
    // SAFETY: the address outlives the call and the length is its size.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(Failure::at("bind", io::Error::last_os_error()));
    }
    // SAFETY: asks for no address.
    let fd =
        unsafe { libc::accept(socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    if fd < 0 {
        return Err(Failure::at("accept", io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
    let hash = Socket::from(unsafe { OwnedFd::from_raw_fd(fd) });
    hash.send(b"text").map_err(|error| Failure::at("send", error))?;
    let mut digest = [mem::MaybeUninit::uninit(); 32];
    let length = hash.recv(&mut digest).map_err(|error| Failure::at("the digest", error))?;
    Ok(format!("{length} bytes of digest"))
}
