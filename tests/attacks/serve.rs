//! A server outside the workload, of any kind of socket: it sends back what it is sent, and prints
//! `heard something` for it.
//!
//! It ends by itself, or when its standard input closes.

use std::{
    io::{self, Write},
    mem::MaybeUninit,
    net::SocketAddr,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{SockAddr, Socket};

use crate::{
    outcome::{Attempt, Failure},
    transport::Transport,
    unix::{Kind, Name},
};

/// How long it waits to be spoken to. Longer than an attack, which starts later.
const LIFETIME: Duration = Duration::from_secs(30);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    at: At,
}

#[derive(Clone, clap::Subcommand)]
enum At {
    /// At an IP address and port.
    Ip {
        #[arg(long)]
        at: SocketAddr,
        #[arg(long)]
        transport: Transport,
    },
    /// At a unix socket.
    Unix {
        #[arg(long)]
        kind: Kind,
        #[command(flatten)]
        name: Name,
        /// Make the socket a second time, as a server does that starts again.
        #[arg(long)]
        again: bool,
    },
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let socket = match &arguments.at {
        At::Ip { at, transport } => {
            let socket = transport.socket(*at)?;
            socket.bind(&(*at).into()).map_err(|error| Failure::setup("bind", error))?;
            socket
        }
        At::Unix { kind, name, again } => {
            if *again {
                drop(bound(*kind, name)?);
                name.remove()?;
            }
            bound(*kind, name)?
        }
    };
    let listens = match &arguments.at {
        At::Ip { transport, .. } => transport.listens(),
        At::Unix { kind, .. } => kind.listens(),
    };
    if listens {
        socket.listen(16).map_err(|error| Failure::setup("listen", error))?;
    }
    println!("ready");
    serve(&socket, listens)
}

fn bound(kind: Kind, name: &Name) -> Result<Socket, Failure> {
    let socket = kind.socket()?;
    socket.bind(&name.address()?).map_err(|error| Failure::setup("bind", error))?;
    Ok(socket)
}

fn serve(socket: &Socket, listens: bool) -> Attempt {
    let deadline = Instant::now() + LIFETIME;
    let input = io::stdin();
    let mut streams: Vec<Socket> = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let ready: Vec<bool> = {
            let mut watched: Vec<PollFd<'_>> = [input.as_fd(), socket.as_fd()]
                .into_iter()
                .chain(streams.iter().map(AsFd::as_fd))
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            let ready =
                poll(&mut watched, timeout).map_err(|errno| Failure::setup("poll", errno))?;
            if ready == 0 || watched[0].any() == Some(true) {
                return Ok("served".to_owned());
            }
            watched[1..].iter().map(|watched| watched.any() == Some(true)).collect()
        };
        let mut is_ready = ready[1..].iter();
        streams.retain(|stream| is_ready.next() != Some(&true) || hear(stream));
        match (ready[0], listens) {
            (true, true) => {
                let (stream, _) =
                    socket.accept().map_err(|error| Failure::setup("accept", error))?;
                streams.push(stream);
            }
            (true, false) => {
                hear(socket);
            }
            (false, _) => {}
        }
    }
}

/// Says what lies ready, and sends it back; whether there may be more.
fn hear(socket: &Socket) -> bool {
    let heard = echo(socket);
    if heard {
        println!("heard something");
        // What is read is whole by now; a pipe or file takes its time.
        io::stdout().flush().unwrap_or_default();
    }
    heard
}

/// Sends back what lies ready; whether there may be more.
pub(crate) fn echo(socket: &Socket) -> bool {
    let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
    let Ok((length, from)) = socket.recv_from(&mut buffer) else { return false };
    if length == 0 {
        return false;
    }
    // SAFETY: the kernel has written that many bytes.
    let text = unsafe { buffer[..length].assume_init_ref() };
    // Whoever has no name, or has gone, gets no answer.
    let _answered = if has_name(&from) {
        socket.send_to(text, &from).or_else(|_| socket.send(text))
    } else {
        socket.send(text)
    };
    true
}

fn has_name(address: &SockAddr) -> bool {
    address.len() > size_of::<libc::sa_family_t>() as libc::socklen_t
}
