//! N14: let others come, where that was not granted.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    time::Instant,
};

use io_uring::{IoUring, opcode, types::Fd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    n5_io_uring::{ring, submit},
    outcome::{Attempt, Failure},
    passing,
    sockets::{Protocol, await_return, converse, number, patience},
    transport::Transport,
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The port to be called at.
    #[arg(long)]
    port: u16,
    #[arg(long)]
    how: How,
    /// Where a helper outside hands out a listening socket.
    #[arg(long)]
    lender: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum How {
    /// `bind`, `listen`, `accept`.
    Bind,
    /// The same for IPv6, which serves IPv4 as well.
    Bind6,
    /// `listen` without `bind`: the kernel chooses the port.
    Listen,
    /// `bind` to no port, then `listen`.
    BindAny,
    /// The calls are made by a ring.
    Ring,
    /// A multipath TCP listener.
    Multipath,
    /// An SCTP listener.
    Sctp,
    /// An SCTP listener without `bind`.
    SctpListen,
    /// A datagram socket that others may send to.
    Datagrams,
    /// Take a listener that a helper outside has made.
    Received,
    /// The same, and a ring takes the connection.
    ReceivedRing,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, arguments.port));
    let any6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, arguments.port));
    match arguments.how {
        How::Bind => serve(listener(Transport::Tcp, Some(any))?),
        How::Bind6 => serve(listener(Transport::Tcp, Some(any6))?),
        How::Multipath => serve(listener(Transport::Mptcp, Some(any))?),
        How::Listen => serve(listener(Transport::Tcp, None)?),
        How::BindAny => serve(listener(Transport::Tcp, Some((Ipv4Addr::UNSPECIFIED, 0).into()))?),
        How::Sctp => hear(listener(Transport::Sctp, Some(any))?),
        How::SctpListen => hear(listener(Transport::Sctp, None)?),
        How::Ring => serve(by_ring(any)?),
        How::Datagrams => datagrams(any),
        How::Received => serve(received(arguments)?),
        How::ReceivedRing => {
            let listener = received(arguments)?;
            let mut ring = ring(false)?;
            let entry = opcode::Accept::new(
                Fd(listener.as_raw_fd()),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            );
            let fd = submit(&mut ring, "IORING_OP_ACCEPT", &entry.build())?;
            converse(Protocol::Tcp, owned(fd))
        }
    }
}

fn owned(fd: i32) -> Socket {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
    Socket::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A listening socket of its own.
fn listener(transport: Transport, at: Option<SocketAddr>) -> Result<Socket, Failure> {
    let family = at.unwrap_or((Ipv4Addr::UNSPECIFIED, 0).into());
    let socket = transport.socket(family)?;
    if let Some(at) = at {
        socket.bind(&at.into()).map_err(|error| Failure::at("bind", error))?;
    }
    socket.listen(1).map_err(|error| Failure::at("listen", error))?;
    Ok(socket)
}

fn by_ring(at: SocketAddr) -> Result<Socket, Failure> {
    let mut ring: IoUring = ring(false)?;
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)
        .map_err(|error| Failure::setup("socket", error))?;
    let address = SockAddr::from(at);
    let fd = Fd(socket.as_raw_fd());
    let bind = opcode::Bind::new(fd, address.as_ptr().cast(), address.len());
    submit(&mut ring, "IORING_OP_BIND", &bind.build())?;
    submit(&mut ring, "IORING_OP_LISTEN", &opcode::Listen::new(fd, 1).build())?;
    Ok(socket)
}

/// A listening socket that was made outside.
fn received(arguments: &Arguments) -> Result<Socket, Failure> {
    let path = arguments.lender.as_ref().ok_or_else(|| Failure::unfit("no lender"))?;
    let stream = UnixStream::connect(path).map_err(|error| Failure::at(path.display(), error))?;
    stream
        .set_read_timeout(Some(patience()))
        .map_err(|error| Failure::setup("setsockopt", error))?;
    passing::receive(&stream).map(Socket::from)
}

/// Waits until somebody has come.
fn await_somebody(socket: &Socket) -> Result<(), Failure> {
    let timeout = PollTimeout::try_from(patience()).unwrap_or(PollTimeout::ZERO);
    let ready = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout)
        .map_err(|errno| Failure::setup("poll", errno))?;
    if ready == 0 { Err(Failure::refused("nobody got through")) } else { Ok(()) }
}

fn accept(listener: &Socket) -> Result<Socket, Failure> {
    await_somebody(listener)?;
    let (stream, _) = listener.accept().map_err(|error| Failure::at("accept", error))?;
    Ok(stream)
}

/// Takes who comes, and talks.
fn serve(listener: Socket) -> Attempt {
    converse(Protocol::Tcp, accept(&listener)?)
}

/// Takes who comes, and hears: that alone must not be.
fn hear(listener: Socket) -> Attempt {
    let stream = accept(&listener)?;
    crate::sockets::be_patient(&stream)?;
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let length = stream.recv(&mut buffer).map_err(|error| Failure::at("receive", error))?;
    Ok(format!("heard {length} bytes"))
}

/// Waits for a datagram and answers it.
fn datagrams(at: SocketAddr) -> Attempt {
    let socket = Protocol::Udp.socket(at)?;
    socket.bind(&at.into()).map_err(|error| Failure::at("bind", error))?;
    let deadline = Instant::now() + patience();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let (_, from) = socket.recv_from(&mut buffer).map_err(|error| {
        let late = Instant::now() >= deadline;
        if late { Failure::refused("nobody got through") } else { Failure::at("receive", error) }
    })?;
    let number = number();
    socket.send_to(&number, &from).map_err(|error: io::Error| Failure::at("answer", error))?;
    await_return(&socket, &number)
}
