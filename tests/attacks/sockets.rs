//! Sockets, and the proof that a peer was really reached.
//!
//! The servers send back what they are sent, behind a greeting. An attack sends a number of its
//! own and waits for it to come back: no cached or injected answer can be mistaken for a reach.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    process,
    sync::LazyLock,
    time::{Duration, Instant},
};

use socket2::{Domain, SockAddr, Socket, Type};

use crate::outcome::{Attempt, Failure};

/// How long an answer may take, in milliseconds, for an attack that is to work.
const PATIENT: &str = "AGENTGUARD_ATTACK_PATIENCE_MS";
/// The same where nothing is said: an attack that is refused may have to wait as long as this.
const HASTE: Duration = Duration::from_millis(1200);

/// How long an answer may take before its absence counts as a refusal.
pub(crate) fn patience() -> Duration {
    static PATIENCE: LazyLock<Duration> = LazyLock::new(|| {
        let said = std::env::var(PATIENT).ok().and_then(|text| text.parse().ok());
        said.map_or(HASTE, Duration::from_millis)
    });
    *PATIENCE
}

/// Which transport an attack uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// An unconnected socket of the family of `peer`. Calls on it give up after [`patience`].
    pub(crate) fn socket(self, peer: SocketAddr) -> Result<Socket, Failure> {
        let kind = match self {
            Self::Tcp => Type::STREAM,
            Self::Udp => Type::DGRAM,
        };
        let socket = Socket::new(Domain::for_address(peer), kind, None)
            .map_err(|error| Failure::setup("socket", error))?;
        be_patient(&socket)?;
        Ok(socket)
    }
}

/// Bounds every blocking call on `socket`.
pub(crate) fn be_patient(socket: &Socket) -> Result<(), Failure> {
    socket
        .set_read_timeout(Some(patience()))
        .and_then(|()| socket.set_write_timeout(Some(patience())))
        .map_err(|error| Failure::setup("setsockopt", error))
}

/// Connects a blocking socket. Linux ends a blocking connect by `SO_SNDTIMEO` with `EINPROGRESS`.
pub(crate) fn connect(socket: &Socket, peer: SocketAddr) -> Result<(), Failure> {
    let step = format!("connect to {peer}");
    match socket.connect(&SockAddr::from(peer)) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            Err(Failure::at(step, io::Error::from_raw_os_error(libc::ETIMEDOUT)))
        }
        Err(error) => Err(Failure::at(step, error)),
    }
}

/// Connects and talks.
pub(crate) fn reach(protocol: Protocol, peer: SocketAddr) -> Attempt {
    let socket = protocol.socket(peer)?;
    connect(&socket, peer)?;
    converse(protocol, socket)
}

/// Sends a number over a connected socket and waits for it to come back.
pub(crate) fn converse(protocol: Protocol, socket: Socket) -> Attempt {
    be_patient(&socket)?;
    let number = number();
    match protocol {
        Protocol::Tcp => {
            let mut stream = TcpStream::from(OwnedFd::from(socket));
            stream.write_all(&number).map_err(|error| Failure::at("send", error))?;
            until_returned(&number, |buffer| stream.read(buffer))
        }
        Protocol::Udp => {
            let socket = UdpSocket::from(OwnedFd::from(socket));
            socket.send(&number).map_err(|error| Failure::at("send", error))?;
            until_returned(&number, |buffer| socket.recv(buffer))
        }
    }
}

/// Waits on `socket`, connected or not, for `number` to come back.
pub(crate) fn await_return(socket: &Socket, number: &[u8]) -> Attempt {
    let mut socket = socket;
    until_returned(number, |buffer| socket.read(buffer))
}

/// A number that no other attack sends, as text.
pub(crate) fn number() -> Vec<u8> {
    let time = std::time::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_nanos());
    format!("<{}.{time}>", process::id()).into_bytes()
}

fn until_returned(number: &[u8], mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> Attempt {
    let deadline = Instant::now() + patience();
    let mut received = Vec::new();
    let mut buffer = [0; 2048];
    while Instant::now() < deadline && received.len() < 1 << 20 {
        match read(&mut buffer) {
            Ok(0) => return Err(Failure::unfit("the peer closed the connection")),
            Ok(length) => received.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Failure::at("receive", error)),
        }
        if received.windows(number.len()).any(|window| window == number) {
            return Ok(String::from_utf8_lossy(&received).trim().to_owned());
        }
    }
    Err(Failure::at("receive", io::Error::from_raw_os_error(libc::ETIMEDOUT)))
}
