//! N6: a ping socket, which may name another host in each call though it is connected.

use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    outcome::{Attempt, Failure},
    sockets::{await_return, be_patient, connect, number},
};

/// Type and code of an echo request; the kernel fills in the checksum and the identifier.
const ECHO_REQUEST: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 1];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    /// A peer to be connected to, with a port, which makes the socket look like any other.
    #[arg(long)]
    granted: SocketAddr,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let Arguments { to, granted } = *arguments;
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4))
        .map_err(|error| Failure::setup("ping socket", error))?;
    be_patient(&socket)?;
    connect(&socket, granted)?;
    let number = number();
    let request = [&ECHO_REQUEST, &number[..]].concat();
    socket
        .send_to(&request, &to.into())
        .map_err(|error| Failure::at(format!("ping {to}"), error))?;
    await_return(&socket, &number)
}
