//! Sockets that a command would inherit at its launch.
//!
//! What is sent on a socket is judged by the cgroup the socket was made in. One that was made
//! before the launch is therefore held to no scope, and does not come along.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockaddrLike as _, SockaddrStorage, getsockname};
use nix::unistd::close;
use procfs::process::{FDTarget, Process};

use super::Result;
use super::exit::{Exit, Failure};
use super::output::{Console, Tone};
use crate::api::types::{InheritedSocket, Mode};

/// The last of standard input, output and error, which are not closed under a command.
const STANDARD: i32 = 2;

/// Closes the sockets this process has that no scope would hold, and names each. In mode `audit`
/// they stay and are named.
///
/// # Errors
///
/// When standard input, output or error is one, in mode `enforce`; or when it can not be told
/// which there are.
pub(super) fn settle(mode: Mode, console: &mut Console<'_>) -> Result<Vec<InheritedSocket>> {
    let found = sockets()?;
    match mode {
        Mode::Audit => {
            for descriptor in &found {
                let text = format!(
                    "file descriptor {descriptor} is a socket that was made before; what it \
                     sends is held to no scope, and with mode enforce it is closed"
                );
                console.note("agentguard: warning:", Tone::Careful, &text);
            }
        }
        Mode::Enforce => {
            if let Some(standard) = found.iter().find(|descriptor| **descriptor <= STANDARD) {
                return Err(Failure::new(
                    Exit::Failed,
                    format!(
                        "file descriptor {standard} is a network socket that was made before; \
                         what the command sends on it would be held to no scope"
                    ),
                )
                .with_remedy("give the command a pipe, a file or a terminal in its place"));
            }
            for descriptor in &found {
                close(*descriptor).map_err(|errno| {
                    let error = format!("file descriptor {descriptor} can not be closed: {errno}");
                    Failure::new(Exit::Failed, error)
                })?;
                let text = format!(
                    "closed file descriptor {descriptor}: a network socket that was made before; \
                     what the command sends on it would be held to no scope"
                );
                console.note("agentguard: warning:", Tone::Careful, &text);
            }
        }
    }
    let closed = mode == Mode::Enforce;
    Ok(found.into_iter().map(|descriptor| InheritedSocket { descriptor, closed }).collect())
}

/// Descriptors of this process that are sockets and can reach beyond this machine's own kernel:
/// of any family but unix and netlink.
fn sockets() -> Result<Vec<i32>> {
    let unknown = |error: procfs::ProcError| {
        let error = format!("it can not be told which sockets the command would inherit: {error}");
        Failure::new(Exit::Failed, error).with_remedy("mount procfs at /proc")
    };
    let mut found = Vec::new();
    for descriptor in Process::myself().and_then(|own| own.fd()).map_err(unknown)? {
        let descriptor = descriptor.map_err(unknown)?;
        if matches!(descriptor.target, FDTarget::Socket(_)) && is_foreign(descriptor.fd) {
            found.push(descriptor.fd);
        }
    }
    Ok(found)
}

/// Whether a socket is of a family that is not judged where it is used. One whose family is not
/// known counts as such.
fn is_foreign(descriptor: i32) -> bool {
    match getsockname::<SockaddrStorage>(descriptor) {
        Ok(address) => {
            !matches!(address.family(), Some(AddressFamily::Unix | AddressFamily::Netlink))
        }
        // Closed since, or none at all.
        Err(Errno::EBADF | Errno::ENOTSOCK) => false,
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::AsRawFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn network_sockets_are_found_and_local_ones_are_left() {
        let stream = TcpListener::bind("127.0.0.1:0").unwrap();
        let datagram = UdpSocket::bind("[::1]:0").unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let found = sockets().unwrap();
        assert!(found.contains(&stream.as_raw_fd()));
        assert!(found.contains(&datagram.as_raw_fd()));
        assert!(!found.contains(&one.as_raw_fd()) && !found.contains(&other.as_raw_fd()));
    }
}
