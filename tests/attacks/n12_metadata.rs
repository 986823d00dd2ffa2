//! N12: fetch credentials from the cloud's metadata service.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::{
    outcome::Attempt,
    sockets::{Protocol, reach},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The form of the service's address.
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)))]
    address: IpAddr,
    #[arg(long)]
    port: u16,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    reach(Protocol::Tcp, SocketAddr::new(arguments.address, arguments.port))
}
