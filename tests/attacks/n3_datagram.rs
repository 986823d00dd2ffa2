//! N3: datagrams by every call that sends them.

use std::{
    io::{self, IoSlice},
    mem,
    net::SocketAddr,
    os::fd::AsRawFd,
};

use socket2::{MsgHdr, SockAddr, Socket};

use crate::{
    outcome::{Attempt, Failure},
    sockets::{self, Protocol, await_return, connect, number},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    /// A peer that is granted, for the ways that begin with one.
    #[arg(long)]
    granted: SocketAddr,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    Connect,
    Sendto,
    Sendmsg,
    Sendmmsg,
    /// Connect to the granted peer, dissolve that, connect to the other.
    Dissolve,
    /// Connect to the granted peer, then straight to the other.
    Reconnect,
    /// Connected to the granted peer, name another with the call.
    ConnectedSendto,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let to = arguments.to;
    let socket = Protocol::Udp.socket(to)?;
    let number = number();
    match arguments.how {
        How::Connect => return sockets::reach(Protocol::Udp, to),
        How::Sendto => send_to(&socket, to, &number)?,
        How::Sendmsg => {
            let peer = SockAddr::from(to);
            let parts = [IoSlice::new(&number)];
            socket
                .sendmsg(&MsgHdr::new().with_addr(&peer).with_buffers(&parts), 0)
                .map_err(|error| Failure::at(format!("sendmsg {to}"), error))?;
        }
        How::Sendmmsg => send_many(&socket, arguments.granted, to, &number)?,
        How::Dissolve => {
            connect(&socket, arguments.granted)?;
            dissolve(&socket)?;
            connect(&socket, to)?;
            return sockets::converse(Protocol::Udp, socket);
        }
        How::Reconnect => {
            connect(&socket, arguments.granted)?;
            connect(&socket, to)?;
            return sockets::converse(Protocol::Udp, socket);
        }
        How::ConnectedSendto => {
            // The answer comes from another peer than the socket is connected to, so the kernel
            // drops it: that the call went through is all this side can see.
            connect(&socket, arguments.granted)?;
            send_to(&socket, to, &number)?;
            return Ok("sent; the peer knows whether it arrived".to_owned());
        }
    }
    await_return(&socket, &number)
}

fn send_to(socket: &Socket, to: SocketAddr, number: &[u8]) -> Result<(), Failure> {
    socket
        .send_to(number, &to.into())
        .map(drop)
        .map_err(|error| Failure::at(format!("sendto {to}"), error))
}

/// One `sendmmsg`: something harmless to a granted peer, then the number to the other.
fn send_many(
    socket: &Socket,
    granted: SocketAddr,
    to: SocketAddr,
    number: &[u8],
) -> Result<(), Failure> {
    let addresses = [SockAddr::from(granted), SockAddr::from(to)];
    let mut parts = [&b"harmless"[..], number]
        .map(|text| libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() });
    let mut messages: Vec<libc::mmsghdr> = addresses
        .iter()
        .zip(&mut parts)
        .map(|(address, part)| {
            // SAFETY: all-zero is a valid `mmsghdr`: null pointers with zero lengths.
            let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
            message.msg_hdr.msg_name = address.as_ptr().cast_mut().cast();
            message.msg_hdr.msg_namelen = address.len();
            message.msg_hdr.msg_iov = &raw mut *part;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    // SAFETY: every header points to an address and a buffer that outlive the call.
    let sent = unsafe {
        libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, 0)
    };
    match sent {
        2 => Ok(()),
        // The call says how many went out before the one that failed; that one asked again, alone,
        // says why.
        1 => {
            // SAFETY: as above, for the second header.
            let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), &raw mut messages[1], 1, 0) };
            if sent == 1 {
                return Err(Failure::unfit("sendmmsg stopped once, and not when asked again"));
            }
            Err(Failure::at(format!("sendmmsg to {to}"), io::Error::last_os_error()))
        }
        _ => Err(Failure::setup(format!("sendmmsg to {granted}"), io::Error::last_os_error())),
    }
}

/// Takes the peer off a connected socket.
pub(crate) fn dissolve(socket: &Socket) -> Result<(), Failure> {
    let nobody = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: the address outlives the call and the length is its size.
    let result = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            &raw const nobody,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Failure::setup("connect AF_UNSPEC", io::Error::last_os_error()))
    }
}
