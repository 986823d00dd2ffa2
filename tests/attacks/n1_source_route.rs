//! N1: have packets for a granted peer go by way of another host, which the header then names.
//!
//! Needs no privilege, over IPv4 or IPv6. The other host hands the packets on to the peer, so the
//! peer's answer is a proof, where there is one.

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

use socket2::Socket;

use crate::{
    outcome::{Attempt, Failure},
    sockets::{Protocol, await_return, connect, converse, number},
};

/// A segment routing header (RFC 8754) with two segments: the peer's, which the kernel fills in, and
/// the host's on the way. In eights of bytes behind the first.
const SEGMENTS_LENGTH: u8 = 4;
const SEGMENT_ROUTING: u8 = 4;
/// Loose source and record route (RFC 791): its number, length, and where the route starts.
const LOOSE_ROUTE: [u8; 3] = [131, 7, 4];
const NO_OPERATION: u8 = 1;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The peer, which is granted.
    #[arg(long)]
    granted: SocketAddr,
    /// The port counts for nothing.
    #[arg(long)]
    by_way_of: SocketAddr,
    #[arg(long)]
    protocol: Protocol,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum How {
    /// An option of the socket, set before it connects.
    Option,
    /// The same, set on a connected socket.
    Late,
    /// Told with one call, on a connected socket; IPv4 only.
    Message,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let Arguments { granted, by_way_of, protocol, how } = *arguments;
    let (level, name, route) = match by_way_of {
        SocketAddr::V4(via) => (libc::IPPROTO_IP, libc::IP_OPTIONS, loose_route(*via.ip())),
        SocketAddr::V6(via) => (libc::IPPROTO_IPV6, libc::IPV6_RTHDR, segments(*via.ip())),
    };
    let socket = protocol.socket(granted)?;
    match how {
        How::Option => {
            set_option(&socket, level, name, &route)?;
            connect(&socket, granted)?;
            match protocol {
                Protocol::Tcp => converse(protocol, socket),
                Protocol::Udp => {
                    // The host on the way may take it for the datagram's end, and its answer is
                    // none of the peer's: that the call went through is all this side can see.
                    socket.send(&number()).map_err(|error| Failure::at("send", error))?;
                    Ok("sent; the other host knows whether it arrived".to_owned())
                }
            }
        }
        How::Late => {
            connect(&socket, granted)?;
            set_option(&socket, level, name, &route)?;
            converse(protocol, socket)
        }
        How::Message => {
            connect(&socket, granted)?;
            let number = number();
            send_with(&socket, level, libc::IP_RETOPTS, &route, &number)?;
            await_return(&socket, &number)
        }
    }
}

fn segments(via: Ipv6Addr) -> Vec<u8> {
    // Next header, length, type, segments left, the last segment's number, flags, and a tag.
    let mut header = vec![0, SEGMENTS_LENGTH, SEGMENT_ROUTING, 1, 1, 0, 0, 0];
    header.extend(Ipv6Addr::UNSPECIFIED.octets());
    header.extend(via.octets());
    header
}

fn loose_route(via: Ipv4Addr) -> Vec<u8> {
    let mut option = LOOSE_ROUTE.to_vec();
    option.extend(via.octets());
    option.push(NO_OPERATION);
    option
}

fn set_option(socket: &Socket, level: i32, name: i32, value: &[u8]) -> Result<(), Failure> {
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
    if result == 0 {
        Ok(())
    } else {
        Err(Failure::at("setsockopt of a route", io::Error::last_os_error()))
    }
}

/// Sends `text` with one control message.
fn send_with(
    socket: &Socket,
    level: i32,
    name: i32,
    value: &[u8],
    text: &[u8],
) -> Result<(), Failure> {
    // Words, because the kernel reads a header at its start.
    let mut control = [0_usize; 16];
    let mut part = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths. The control buffer
    // holds one header and the value, for which `CMSG_SPACE` is asked; everything that the message
    // points to outlives the call.
    let sent = unsafe {
        let mut message: libc::msghdr = mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(value.len() as u32) as _;
        assert!(message.msg_controllen as usize <= size_of_val(&control), "a route is short");
        let head = libc::CMSG_FIRSTHDR(&raw const message);
        (*head).cmsg_level = level;
        (*head).cmsg_type = name;
        (*head).cmsg_len = libc::CMSG_LEN(value.len() as u32) as _;
        libc::CMSG_DATA(head).copy_from_nonoverlapping(value.as_ptr(), value.len());
        libc::sendmsg(socket.as_raw_fd(), &raw const message, 0)
    };
    if sent < 0 {
        return Err(Failure::at("sendmsg with a route", io::Error::last_os_error()));
    }
    Ok(())
}
