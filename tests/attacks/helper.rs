//! Processes outside the workload that an attack works together with.
//!
//! They end by themselves, or when their standard input closes.

use std::{
    io::{self, Write},
    net::SocketAddr,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    process,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{
    outcome::{Attempt, Failure},
    passing,
    sockets::{Protocol, connect, converse, patience},
    transport::Transport,
};

/// How long a helper waits to be asked. Longer than an attack, which starts later.
const LIFETIME: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub(crate) struct Lend {
    /// Where the socket is connected to, or where it listens.
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    protocol: Protocol,
    /// Listen there and do not connect.
    #[arg(long)]
    listening: bool,
    /// Not the protocol's own socket but one of these.
    #[arg(long, conflicts_with = "raw")]
    transport: Option<Transport>,
    /// A raw socket, which takes packets with their headers, and is not connected.
    #[arg(long)]
    raw: bool,
    /// The unix socket on which to hand out the connected socket.
    #[arg(long)]
    listen: PathBuf,
}

#[derive(clap::Args)]
pub(crate) struct Use {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    protocol: Protocol,
    /// The unix socket on which to take a socket.
    #[arg(long)]
    listen: PathBuf,
}

/// Lends a socket of the unix family that is connected to a server: the same, by another name.
#[derive(clap::Args)]
pub(crate) struct LendUnix {
    #[arg(long)]
    to: PathBuf,
    /// The unix socket on which to hand out the connected socket.
    #[arg(long)]
    listen: PathBuf,
}

/// Connects to a unix socket, says where (`ready <pid> <fd>`), and lends the socket.
pub(crate) fn lend_unix(arguments: &LendUnix) -> Attempt {
    let socket = UnixStream::connect(&arguments.to)
        .map_err(|error| Failure::setup(arguments.to.display(), error))?;
    serve(&arguments.listen, socket.as_raw_fd(), |stream| passing::send(stream, &socket))?;
    Ok("lent".to_owned())
}

/// Connects, says where (`ready <pid> <fd>`), and lends the socket to whoever asks.
pub(crate) fn lend(arguments: &Lend) -> Attempt {
    let socket = match arguments.transport {
        Some(transport) => transport.socket(arguments.to)?,
        None if arguments.raw => raw()?,
        None => arguments.protocol.socket(arguments.to)?,
    };
    if arguments.listening {
        let here = SockAddr::from(arguments.to);
        socket
            .bind(&here)
            .and_then(|()| socket.listen(1))
            .map_err(|error| Failure::setup("listen", error))?;
    } else if !arguments.raw {
        connect(&socket, arguments.to)?;
    }
    let mut lent = 0;
    serve(&arguments.listen, socket.as_raw_fd(), |stream| {
        passing::send(stream, &socket)?;
        lent += 1;
        Ok(())
    })?;
    Ok(format!("lent {lent} times"))
}

/// A socket for packets of UDP, made by hand.
fn raw() -> Result<Socket, Failure> {
    Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::UDP))
        .and_then(|socket| socket.set_header_included_v4(true).map(|()| socket))
        .map_err(|error| Failure::setup("raw socket", error))
}

/// Takes sockets, connects each, talks, and answers with what came of it.
pub(crate) fn use_lent(arguments: &Use) -> Attempt {
    let mut used = 0;
    serve(&arguments.listen, -1, |mut stream| {
        let attempt = use_socket(arguments, passing::receive(stream)?);
        let answer = serde_json::to_vec(&attempt)
            .map_err(|error| Failure::unfit(format!("the answer: {error}")))?;
        stream.write_all(&answer).map_err(|error| Failure::setup("answer", error))?;
        used += 1;
        Ok(())
    })?;
    Ok(format!("used {used} sockets"))
}

fn use_socket(arguments: &Use, fd: OwnedFd) -> Attempt {
    let socket = Socket::from(fd);
    connect(&socket, arguments.to)?;
    converse(arguments.protocol, socket)
}

fn serve(
    path: &PathBuf,
    fd: i32,
    mut answer: impl FnMut(&UnixStream) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let listener =
        UnixListener::bind(path).map_err(|error| Failure::setup(path.display(), error))?;
    println!("ready {} {fd}", process::id());
    let deadline = Instant::now() + LIFETIME;
    let input = io::stdin();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut watched = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(input.as_fd(), PollFlags::POLLIN),
        ];
        let ready = poll(&mut watched, timeout).map_err(|errno| Failure::setup("poll", errno))?;
        if ready == 0 || watched[1].any() == Some(true) {
            return Ok(());
        }
        let (stream, _) = listener.accept().map_err(|error| Failure::setup("accept", error))?;
        stream
            .set_read_timeout(Some(patience()))
            .map_err(|error| Failure::setup("setsockopt", error))?;
        answer(&stream)?;
    }
}
