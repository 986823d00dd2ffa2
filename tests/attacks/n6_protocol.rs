//! N6: what travels over IP and is neither TCP nor UDP.

use std::{mem, net::SocketAddr, os::fd::AsRawFd, thread, time::Duration};

use socket2::{SockAddr, Socket};

use crate::{
    outcome::{Attempt, Failure},
    sockets::{await_return, connect, number},
    transport::{Transport, option},
};

const SOL_SCTP: i32 = 132;
const SCTP_SNDRCV: i32 = 1;
const SCTP_SOCKOPT_CONNECTX: i32 = 110;
/// `SCTP_ADDR_OVER`: the message goes to the address that it names, not to the primary one.
const SCTP_ADDR_OVER: u16 = 2;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    transport: Transport,
    #[arg(long)]
    how: How,
    /// A peer that is granted, for the ways that begin with one.
    #[arg(long)]
    granted: Option<SocketAddr>,
    /// How often to talk on the connection, with a tenth of a second between.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: u32,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    Connect,
    /// Name the peer with the first message, which connects.
    Send,
    /// `SCTP_SOCKOPT_CONNECTX`: a list of the peer's addresses.
    Connectx,
    /// Connected to a peer, name another of its addresses with a message.
    OtherAddress,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let to = arguments.to;
    let socket = arguments.transport.socket(to)?;
    let number = number();
    match arguments.how {
        How::Connect => {
            connect(&socket, to)?;
            for _ in 1..arguments.rounds {
                let first = crate::sockets::number();
                send(&socket, &first)?;
                await_return(&socket, &first)?;
                thread::sleep(Duration::from_millis(100));
            }
            send(&socket, &number)?;
        }
        How::Send => send_to(&socket, to, &number)?,
        How::Connectx => {
            connect_all(&socket, &[to])?;
            send(&socket, &number)?;
        }
        How::OtherAddress => {
            let granted =
                arguments.granted.ok_or_else(|| Failure::unfit("no peer that is granted"))?;
            let first = crate::sockets::number();
            send_to(&socket, granted, &first)?;
            await_return(&socket, &first)?;
            send_over(&socket, to, &number)?;
        }
    }
    await_return(&socket, &number)
}

fn send(socket: &Socket, number: &[u8]) -> Result<(), Failure> {
    socket.send(number).map(drop).map_err(|error| Failure::at("send", error))
}

fn send_to(socket: &Socket, to: SocketAddr, number: &[u8]) -> Result<(), Failure> {
    socket
        .send_to(number, &to.into())
        .map(drop)
        .map_err(|error| Failure::at(format!("sendto {to}"), error))
}

fn connect_all(socket: &Socket, peers: &[SocketAddr]) -> Result<(), Failure> {
    let mut packed = Vec::new();
    for peer in peers {
        let address = SockAddr::from(*peer);
        // SAFETY: that many bytes of the address are written.
        packed.extend_from_slice(unsafe {
            std::slice::from_raw_parts(address.as_ptr().cast::<u8>(), address.len() as usize)
        });
    }
    option(socket, SOL_SCTP, SCTP_SOCKOPT_CONNECTX, &packed).map(drop).map_err(|error| match error
        .raw_os_error()
    {
        // What a call that waited in vain ends with.
        Some(libc::EINPROGRESS) => Failure::refused(format!("connectx: {error}")),
        Some(_) | None => Failure::at("connectx", error),
    })
}

/// `struct sctp_sndrcvinfo` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Info {
    stream: u16,
    sequence: u16,
    flags: u16,
    payload: u32,
    context: u32,
    lifetime: u32,
    number: u32,
    cumulative: u32,
    association: i32,
}

/// Sends to that address of the peer.
fn send_over(socket: &Socket, to: SocketAddr, number: &[u8]) -> Result<(), Failure> {
    let address = SockAddr::from(to);
    let info = Info { flags: SCTP_ADDR_OVER, ..Info::default() };
    let mut part =
        libc::iovec { iov_base: number.as_ptr().cast_mut().cast(), iov_len: number.len() };
    let mut control = [0_u64; 8];
    // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_name = address.as_ptr().cast_mut().cast();
    message.msg_namelen = address.len();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: only computes a length.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<Info>() as u32) } as usize;
    // SAFETY: the buffer is aligned and has room for one header and the information.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = SOL_SCTP;
        (*header).cmsg_type = SCTP_SNDRCV;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<Info>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<Info>().write_unaligned(info);
    }
    // SAFETY: the message points to values that outlive the call.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) };
    if sent < 0 {
        return Err(Failure::at(format!("sendmsg to {to}"), std::io::Error::last_os_error()));
    }
    Ok(())
}
