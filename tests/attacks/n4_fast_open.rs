//! N4: TCP Fast Open, where the call that sends data is also the one that connects.

use std::{io, net::SocketAddr, os::fd::AsRawFd};

use socket2::Socket;

use crate::{
    outcome::{Attempt, Failure},
    sockets::{Protocol, await_return, connect, number},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// `sendto(MSG_FASTOPEN)`
    Sendto,
    /// `TCP_FASTOPEN_CONNECT`: the connect waits for the first send.
    Connect,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let to = arguments.to;
    let socket = Protocol::Tcp.socket(to)?;
    let number = number();
    let (step, sent) = match arguments.how {
        How::Sendto => (
            "sendto(MSG_FASTOPEN)",
            socket.send_to_with_flags(&number, &to.into(), libc::MSG_FASTOPEN),
        ),
        How::Connect => {
            wait_for_data(&socket).map_err(|error| Failure::setup("setsockopt", error))?;
            connect(&socket, to)?;
            ("the first send", socket.send(&number))
        }
    };
    match sent {
        Ok(_) => await_return(&socket, &number),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            Err(Failure::at(step, io::Error::from_raw_os_error(libc::ETIMEDOUT)))
        }
        Err(error) => Err(Failure::at(step, error)),
    }
}

/// Sets `TCP_FASTOPEN_CONNECT`, for which no wrapper has a name.
fn wait_for_data(socket: &Socket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the value outlives the call and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN_CONNECT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
