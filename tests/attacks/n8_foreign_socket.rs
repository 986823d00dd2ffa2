//! N8: a connected socket that was made elsewhere.

use std::{
    fs::File,
    io::{self, Write},
    mem,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use io_uring::{opcode, types::Fd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{MsgHdr, SockAddr, Socket};

use crate::{
    child::channel,
    n5_io_uring::{Ring, ring, with_target},
    n7_family::udp_packet,
    outcome::{Attempt, Failure},
    passing,
    sockets::{Protocol, await_return, be_patient, converse, number, patience},
    transport::option,
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    protocol: Protocol,
    /// How to send on it.
    #[arg(long)]
    by: Option<By>,
    /// A peer that is granted, to be named with what goes elsewhere.
    #[arg(long)]
    decoy: Option<SocketAddr>,
    /// Where packets go that are made by hand.
    #[arg(long)]
    to: Option<SocketAddrV4>,
    #[command(subcommand)]
    from: From,
}

/// The ways into a connected socket.
#[derive(Clone, Copy, clap::ValueEnum)]
enum By {
    Write,
    Sendmsg,
    Sendmmsg,
    /// From a file, without a copy.
    Sendfile,
    /// From a pipe, without a copy.
    Splice,
    /// `MSG_ZEROCOPY`
    ZeroCopy,
    /// A ring sends.
    Ring,
    /// A worker of a ring sends.
    RingWorker,
    /// A kernel thread submits to the ring.
    RingThread,
    /// A ring splices a pipe.
    RingSplice,
    /// With the name of a peer that is granted, which a connected stream does not look at.
    Named,
    /// By hand, with the name of a peer that is granted.
    Packet,
}

#[derive(Clone, clap::Subcommand)]
enum From {
    /// Ask for it over a unix socket.
    ScmRights {
        #[arg(long)]
        path: PathBuf,
    },
    /// Take it out of another process.
    PidfdGetfd {
        #[arg(long)]
        pid: libc::pid_t,
        #[arg(long)]
        fd: RawFd,
    },
    /// Find it open at the start.
    Inherited {
        #[arg(long)]
        fd: RawFd,
    },
    /// Find a listening socket open at the start, and answer who calls.
    Activation {
        #[arg(long)]
        fd: RawFd,
    },
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let socket = match &arguments.from {
        From::ScmRights { path } => {
            let stream =
                UnixStream::connect(path).map_err(|error| Failure::at(path.display(), error))?;
            stream
                .set_read_timeout(Some(patience()))
                .map_err(|error| Failure::setup("setsockopt", error))?;
            passing::receive(&stream)?
        }
        From::PidfdGetfd { pid, fd } => take(*pid, *fd)?,
        From::Inherited { fd } => inherited(*fd)?,
        From::Activation { fd } => accept(inherited(*fd)?)?,
    };
    let socket = Socket::from(socket);
    match arguments.by {
        None => converse(arguments.protocol, socket),
        Some(by) => {
            be_patient(&socket)?;
            let number = number();
            match by {
                By::Named => {
                    let decoy = decoy(arguments)?;
                    socket
                        .send_to(&number, &decoy)
                        .map_err(|error| Failure::at("sendto", error))?;
                }
                By::Packet => {
                    let to = arguments.to.ok_or_else(|| Failure::unfit("no destination"))?;
                    let packet = udp_packet(Ipv4Addr::new(192, 0, 2, 1), to, &number);
                    socket
                        .send_to(&packet, &decoy(arguments)?)
                        .map_err(|error| Failure::at("sendto", error))?;
                }
                By::Write
                | By::Sendmsg
                | By::Sendmmsg
                | By::Sendfile
                | By::Splice
                | By::ZeroCopy
                | By::Ring
                | By::RingWorker
                | By::RingThread
                | By::RingSplice => send(by, &socket, &number)?,
            }
            await_return(&socket, &number)
        }
    }
}

fn decoy(arguments: &Arguments) -> Result<SockAddr, Failure> {
    arguments.decoy.map(SockAddr::from).ok_or_else(|| Failure::unfit("no decoy"))
}

fn send(by: By, socket: &Socket, number: &[u8]) -> Result<(), Failure> {
    let fd = socket.as_raw_fd();
    let (step, sent) = match by {
        By::Write => {
            // SAFETY: the buffer outlives the call, with its length.
            let sent = unsafe { libc::write(fd, number.as_ptr().cast(), number.len()) };
            ("write", sent)
        }
        By::Sendmsg => {
            let parts = [io::IoSlice::new(number)];
            let sent = socket.sendmsg(&MsgHdr::new().with_buffers(&parts), 0);
            return sent.map(drop).map_err(|error| Failure::at("sendmsg", error));
        }
        By::Sendmmsg => {
            let mut part =
                libc::iovec { iov_base: number.as_ptr().cast_mut().cast(), iov_len: number.len() };
            // SAFETY: all-zero is a valid `mmsghdr`: null pointers with zero lengths.
            let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
            message.msg_hdr.msg_iov = &raw mut part;
            message.msg_hdr.msg_iovlen = 1;
            // SAFETY: the header points to a buffer that outlives the call.
            let sent = unsafe { libc::sendmmsg(fd, &raw mut message, 1, 0) };
            ("sendmmsg", sent as isize)
        }
        By::Sendfile => {
            let mut file = tempfile().map_err(|error| Failure::setup("a temporary file", error))?;
            file.write_all(number).map_err(|error| Failure::setup("a file", error))?;
            let mut from = 0;
            // SAFETY: the offset outlives the call.
            let sent = unsafe { libc::sendfile(fd, file.as_raw_fd(), &raw mut from, number.len()) };
            ("sendfile", sent)
        }
        By::Splice => {
            let pipe = filled_pipe(number)?;
            // SAFETY: no offsets are given: neither end has one.
            let sent = unsafe {
                libc::splice(
                    pipe.as_raw_fd(),
                    std::ptr::null_mut(),
                    fd,
                    std::ptr::null_mut(),
                    number.len(),
                    0,
                )
            };
            ("splice", sent)
        }
        By::ZeroCopy => {
            option(socket, libc::SOL_SOCKET, libc::SO_ZEROCOPY, &1_i32.to_ne_bytes())
                .map_err(|error| Failure::setup("setsockopt", error))?;
            let sent = socket.send_with_flags(number, libc::MSG_ZEROCOPY);
            return sent.map(drop).map_err(|error| Failure::at("send", error));
        }
        By::Ring | By::RingWorker | By::RingThread => {
            let mut ring = Ring {
                ring: ring(matches!(by, By::RingThread))?,
                worker: matches!(by, By::RingWorker),
            };
            return ring
                .on(socket, "IORING_OP_SEND", |target| {
                    with_target!(target, |fd| opcode::Send::new(
                        fd,
                        number.as_ptr(),
                        number.len() as u32
                    )
                    .build())
                })
                .map(drop);
        }
        By::RingSplice => {
            let pipe = filled_pipe(number)?;
            let mut ring = Ring { ring: ring(false)?, worker: false };
            let from = Fd(pipe.as_raw_fd());
            return ring
                .on(socket, "IORING_OP_SPLICE", |target| {
                    with_target!(target, |fd| opcode::Splice::new(
                        from,
                        -1,
                        fd,
                        -1,
                        number.len() as u32
                    )
                    .build())
                })
                .map(drop);
        }
        By::Named | By::Packet => return Err(Failure::unfit("it needs a name")),
    };
    if sent < 0 { Err(Failure::at(step, io::Error::last_os_error())) } else { Ok(()) }
}

/// A pipe with the number in it; its end to read from.
fn filled_pipe(number: &[u8]) -> Result<OwnedFd, Failure> {
    let (reader, writer) = channel()?;
    File::from(writer).write_all(number).map_err(|error| Failure::setup("the pipe", error))?;
    Ok(reader)
}

/// A file without a name.
fn tempfile() -> io::Result<File> {
    let path = std::env::temp_dir().join(format!("agt-file-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(path)?;
    Ok(file)
}

/// The descriptor that was open when this program started. One that is closed was closed by what
/// launched it: that is how a launcher refuses.
fn inherited(fd: RawFd) -> Result<OwnedFd, Failure> {
    // SAFETY: `fcntl(F_GETFD)` on any number is harmless.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        let mut failure = Failure::setup(format!("descriptor {fd}"), io::Error::last_os_error());
        failure.kind = crate::outcome::Kind::Refused;
        return Err(failure);
    }
    // SAFETY: it is open, and nothing in this program has opened descriptors of its own yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn accept(listener: OwnedFd) -> Result<OwnedFd, Failure> {
    let listener = TcpListener::from(listener);
    let timeout = PollTimeout::try_from(patience()).unwrap_or(PollTimeout::ZERO);
    let ready = poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], timeout)
        .map_err(|errno| Failure::setup("poll", errno))?;
    if ready == 0 {
        return Err(Failure::refused("nobody got through to the listening socket"));
    }
    let (stream, _): (TcpStream, _) =
        listener.accept().map_err(|error| Failure::at("accept", error))?;
    Ok(stream.into())
}

/// `pidfd_open` and `pidfd_getfd`, which no wrapper offers.
fn take(pid: libc::pid_t, fd: RawFd) -> Result<OwnedFd, Failure> {
    // SAFETY: takes two numbers; makes a descriptor or fails.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let pidfd = owned(pidfd).map_err(|error| Failure::at("pidfd_open", error))?;
    let raw: BorrowedFd<'_> = pidfd.as_fd();
    // SAFETY: takes three numbers; makes a descriptor or fails.
    let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, raw.as_raw_fd(), fd, 0) };
    owned(taken).map_err(|error| Failure::at("pidfd_getfd", error))
}

fn owned(result: libc::c_long) -> Result<OwnedFd, io::Error> {
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
