//! N2: reach an IPv4 address by a form that a list of IPv4 addresses does not hold.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use crate::{
    outcome::{Attempt, Failure},
    sockets::{self, Protocol},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The address to disguise. The forms that mean "this host" use its port only.
    #[arg(long)]
    to: SocketAddrV4,
    #[arg(long)]
    form: Form,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Form {
    /// `::ffff:a.b.c.d`
    Mapped,
    /// `::a.b.c.d`
    Compatible,
    /// `2002:aabb:ccdd::1`
    SixToFour,
    /// `64:ff9b::a.b.c.d`
    Nat64,
    /// `0.0.0.0`, which the kernel takes for loopback.
    Any4,
    /// `::`
    Any6,
    /// `::ffff:0.0.0.0`
    MappedAny,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    Tcp,
    Udp,
    /// UDP without connect.
    Sendto,
}

impl Form {
    fn of(self, address: Ipv4Addr) -> IpAddr {
        let [high, low] = {
            let [a, b, c, d] = address.octets();
            [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
        };
        match self {
            Self::Mapped => address.to_ipv6_mapped().into(),
            Self::Compatible => Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low).into(),
            Self::SixToFour => Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1).into(),
            Self::Nat64 => Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low).into(),
            Self::Any4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::Any6 => Ipv6Addr::UNSPECIFIED.into(),
            Self::MappedAny => Ipv4Addr::UNSPECIFIED.to_ipv6_mapped().into(),
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let peer = SocketAddr::new(arguments.form.of(*arguments.to.ip()), arguments.to.port());
    match arguments.how {
        How::Tcp => sockets::reach(Protocol::Tcp, peer),
        How::Udp => sockets::reach(Protocol::Udp, peer),
        How::Sendto => {
            let socket = Protocol::Udp.socket(peer)?;
            let number = sockets::number();
            socket
                .send_to(&number, &peer.into())
                .map_err(|error| Failure::at(format!("sendto {peer}"), error))?;
            sockets::await_return(&socket, &number)
        }
    }
}
