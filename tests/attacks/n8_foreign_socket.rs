//! N8: a connected socket that was made elsewhere.

use std::{
    io,
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::Socket;

use crate::{
    outcome::{Attempt, Failure},
    passing,
    sockets::{PATIENCE, Protocol, converse},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    protocol: Protocol,
    #[command(subcommand)]
    from: From,
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
                .set_read_timeout(Some(PATIENCE))
                .map_err(|error| Failure::setup("setsockopt", error))?;
            passing::receive(&stream)?
        }
        From::PidfdGetfd { pid, fd } => take(*pid, *fd)?,
        From::Inherited { fd } => inherited(*fd)?,
        From::Activation { fd } => accept(inherited(*fd)?)?,
    };
    converse(arguments.protocol, Socket::from(socket))
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
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::ZERO);
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
    let taken = unsafe {
        libc::syscall(libc::SYS_pidfd_getfd, std::os::fd::AsRawFd::as_raw_fd(&raw), fd, 0)
    };
    owned(taken).map_err(|error| Failure::at("pidfd_getfd", error))
}

fn owned(result: libc::c_long) -> Result<OwnedFd, io::Error> {
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
