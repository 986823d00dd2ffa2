//! G3: so many denied requests that the record of one gets lost.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::{
    outcome::{Attempt, Failure},
    sockets::{Protocol, await_return, number, patience},
};

/// How long to flood at most.
const FLOOD: Duration = Duration::from_millis(1500);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The target whose denial is to get lost.
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    how: How,
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// The same request again and again.
    Identical,
    /// Each request to another port.
    Distinct,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let to = arguments.to;
    let socket = Protocol::Udp.socket(to)?;
    let start = Instant::now();
    let (mut asked, mut refused) = (0_u32, 0_u32);
    while asked < arguments.count && start.elapsed() < FLOOD {
        let peer = match arguments.how {
            How::Identical => to,
            // Every port but zero, in turn.
            How::Distinct => SocketAddr::new(to.ip(), (asked % 0xffff) as u16 + 1),
        };
        asked += 1;
        match socket.send_to(b"flood", &peer.into()) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::PermissionDenied => refused += 1,
            // The answer to an earlier datagram: that port is closed.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(Failure::at(format!("sendto {peer}"), error)),
        }
    }
    let counted = |mut failure: Failure| {
        failure.detail = format!("{}; {refused} of {asked} refused", failure.detail);
        failure
    };
    let proof = probe(to).map_err(counted)?;
    Ok(format!("{proof}; {refused} of {asked} refused"))
}

/// Reaches the target once more. The flood may still fill the queue there, so a datagram that gets
/// lost is sent again.
fn probe(to: SocketAddr) -> Attempt {
    let socket = Protocol::Udp.socket(to)?;
    socket
        .set_read_timeout(Some(patience() / 8))
        .map_err(|error| Failure::setup("setsockopt", error))?;
    let number = number();
    let mut last = Failure::unfit("no attempt");
    for _ in 0..8 {
        socket
            .send_to(&number, &to.into())
            .map_err(|error| Failure::at(format!("sendto {to}"), error))?;
        match await_return(&socket, &number) {
            Ok(proof) => return Ok(proof),
            Err(failure) => last = failure,
        }
    }
    Err(last)
}
