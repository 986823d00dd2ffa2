//! N1: connect to an address, port or protocol outside the allow-list.

use std::net::SocketAddr;

use crate::{
    outcome::Attempt,
    sockets::{Protocol, reach},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    protocol: Protocol,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    reach(arguments.protocol, arguments.to)
}
