//! N5: the calls are made by an `io_uring`, with `SQPOLL` by a thread of the kernel.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use io_uring::{
    IoUring, opcode, squeue,
    types::{Fd, SubmitArgs, Timespec},
};
use socket2::{Domain, SockAddr, Socket};

use crate::{
    outcome::{Attempt, Failure},
    sockets::{self, PATIENCE, Protocol, await_return, number},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    how: How,
    /// Let a kernel thread submit.
    #[arg(long)]
    sqpoll: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// `IORING_OP_CONNECT` of a TCP socket.
    Connect,
    /// `IORING_OP_SEND` of a datagram, with the address.
    Send,
    /// `IORING_OP_SENDMSG` of a datagram.
    Sendmsg,
    /// `IORING_OP_SOCKET`, then `IORING_OP_CONNECT`: no system call names the socket.
    Socket,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let to = arguments.to;
    let address = SockAddr::from(to);
    let mut ring = ring(arguments.sqpoll)?;
    let number = number();
    match arguments.how {
        How::Connect => {
            let socket = Protocol::Tcp.socket(to)?;
            connect(&mut ring, &socket, &address)?;
            sockets::converse(Protocol::Tcp, socket)
        }
        How::Socket => {
            let entry = opcode::Socket::new(Domain::for_address(to).into(), libc::SOCK_STREAM, 0);
            let fd = submit(&mut ring, "IORING_OP_SOCKET", &entry.build())?;
            // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
            let socket = Socket::from(unsafe { OwnedFd::from_raw_fd(fd) });
            connect(&mut ring, &socket, &address)?;
            sockets::converse(Protocol::Tcp, socket)
        }
        How::Send => {
            let socket = Protocol::Udp.socket(to)?;
            let entry =
                opcode::Send::new(Fd(socket.as_raw_fd()), number.as_ptr(), number.len() as u32)
                    .dest_addr(address.as_ptr().cast())
                    .dest_addr_len(address.len());
            submit(&mut ring, "IORING_OP_SEND", &entry.build())?;
            await_return(&socket, &number)
        }
        How::Sendmsg => {
            let socket = Protocol::Udp.socket(to)?;
            let mut part =
                libc::iovec { iov_base: number.as_ptr().cast_mut().cast(), iov_len: number.len() };
            // SAFETY: all-zero is a valid `msghdr`: null pointers with zero lengths.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_name = address.as_ptr().cast_mut().cast();
            message.msg_namelen = address.len();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            let entry = opcode::SendMsg::new(Fd(socket.as_raw_fd()), &raw const message);
            submit(&mut ring, "IORING_OP_SENDMSG", &entry.build())?;
            await_return(&socket, &number)
        }
    }
}

fn ring(sqpoll: bool) -> Result<IoUring, Failure> {
    let mut builder = IoUring::builder();
    if sqpoll {
        builder.setup_sqpoll(100);
    }
    builder.build(4).map_err(|error| {
        let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
            .map_or_else(|error| error.to_string(), |value| value.trim().to_owned());
        Failure::setup(format!("io_uring_setup (kernel.io_uring_disabled: {disabled})"), error)
    })
}

fn connect(ring: &mut IoUring, socket: &Socket, address: &SockAddr) -> Result<(), Failure> {
    let entry =
        opcode::Connect::new(Fd(socket.as_raw_fd()), address.as_ptr().cast(), address.len());
    submit(ring, "IORING_OP_CONNECT", &entry.build()).map(drop)
}

/// Submits `entry`, whose memory outlives this call, and gives its result.
fn submit(ring: &mut IoUring, step: &str, entry: &squeue::Entry) -> Result<i32, Failure> {
    // SAFETY: callers keep what the entry points to alive until the ring is dropped, also when
    // the wait below gives up.
    unsafe { ring.submission().push(entry) }
        .map_err(|_| Failure::unfit("the submission queue is full"))?;
    let patience = Timespec::from(PATIENCE);
    match ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&patience)) {
        Ok(_) => {}
        Err(error) if error.raw_os_error() == Some(libc::ETIME) => {
            return Err(Failure::at(step, io::Error::from_raw_os_error(libc::ETIMEDOUT)));
        }
        Err(error) => return Err(Failure::setup("io_uring_enter", error)),
    }
    let result = ring
        .completion()
        .next()
        .ok_or_else(|| Failure::unfit("the ring woke without a completion"))?
        .result();
    if result < 0 {
        Err(Failure::at(step, io::Error::from_raw_os_error(-result)))
    } else {
        Ok(result)
    }
}
