//! N9: a socket of the workload, used by a helper outside.

use std::{io::Read, net::SocketAddr, os::unix::net::UnixStream, path::PathBuf};

use crate::{
    outcome::{Attempt, Failure},
    passing,
    sockets::{Protocol, patience},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The helper's unix socket.
    #[arg(long)]
    helper: PathBuf,
    #[arg(long)]
    protocol: Protocol,
    /// Where the helper will connect it; only its family matters here.
    #[arg(long)]
    to: SocketAddr,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let socket = arguments.protocol.socket(arguments.to)?;
    let mut stream = UnixStream::connect(&arguments.helper)
        .map_err(|error| Failure::at(arguments.helper.display(), error))?;
    stream
        // Twice, because the helper waits for its peer first.
        .set_read_timeout(Some(patience() * 2))
        .map_err(|error| Failure::setup("setsockopt", error))?;
    passing::send(&stream, &socket)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(|error| Failure::setup("the answer", error))?;
    serde_json::from_slice(&answer)
        .map_err(|error| Failure::unfit(format!("the answer: {error}")))?
}
