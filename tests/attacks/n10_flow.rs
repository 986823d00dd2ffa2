//! N10: a flow that was allowed when it began, and goes on.
//!
//! Prints `{"ms", "acknowledged", "moved_boot_ns"}` every 100 ms: the bytes that the peer sent back so far,
//! and the boot time at which the last of them came. It worked when the flow still moved at the end, and is
//! refused once it stands still.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::time::TimeValLike as _,
    time::{ClockId, clock_gettime},
};
use serde::Serialize;
use socket2::Socket;

use crate::{
    outcome::{Attempt, Failure},
    sockets::{Protocol, connect, patience},
};

const TICK: Duration = Duration::from_millis(10);
const REPORT: Duration = Duration::from_millis(100);
/// A flow that moved this long ago moves still.
const MOVING: Duration = Duration::from_millis(500);
/// A flow that did not move for this long was stopped; longer where it is to go on.
const STOPPED: Duration = Duration::from_millis(1500);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    protocol: Protocol,
    /// How long to go on, unless it is stopped before.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1000..=20_000))]
    milliseconds: u64,
    /// Bind to this port before connecting, and try once more when connected.
    #[arg(long)]
    bind: Option<u16>,
}

#[derive(Serialize)]
struct Progress {
    ms: u128,
    acknowledged: usize,
    /// By `CLOCK_BOOTTIME`, as the kernel half tells its times; 0 before the first.
    moved_boot_ns: i64,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let mut socket = arguments.protocol.socket(arguments.to)?;
    if let Some(port) = arguments.bind {
        let here = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port).into();
        socket.bind(&here).map_err(|error| Failure::at("bind", error))?;
        connect(&socket, arguments.to)?;
        match socket.bind(&here) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(Failure::at("bind when connected", error)),
            Ok(()) => return Err(Failure::unfit("a connected socket was bound")),
        }
    } else {
        connect(&socket, arguments.to)?;
    }
    socket.set_nonblocking(true).map_err(|error| Failure::setup("setsockopt", error))?;
    let start = Instant::now();
    let mut reported = Duration::ZERO;
    let mut moved = Duration::ZERO;
    let mut moved_boot_ns = 0;
    let mut acknowledged = 0;
    let lasts = Duration::from_millis(arguments.milliseconds);
    let is_stopped = loop {
        let still = start.elapsed() - moved;
        if still >= STOPPED.max(patience()) {
            break true;
        }
        if still < MOVING && start.elapsed() >= lasts {
            break false;
        }
        send(&mut socket)?;
        thread::sleep(TICK);
        let heard = drain(&mut socket)?;
        if heard > 0 {
            acknowledged += heard;
            moved = start.elapsed();
            moved_boot_ns = clock_gettime(ClockId::CLOCK_BOOTTIME)
                .map_err(|errno| Failure::setup("clock_gettime", errno))?
                .num_nanoseconds();
        }
        if start.elapsed() >= reported + REPORT {
            reported = start.elapsed();
            let progress = Progress { ms: reported.as_millis(), acknowledged, moved_boot_ns };
            let line = serde_json::to_string(&progress)
                .map_err(|error| Failure::unfit(error.to_string()))?;
            println!("{line}");
        }
    };
    let detail = format!("{acknowledged} bytes, the last after {} ms", moved.as_millis());
    if acknowledged == 0 {
        Err(Failure::refused("no byte came back"))
    } else if is_stopped {
        Err(Failure::refused(detail))
    } else {
        Ok(detail)
    }
}

/// Sends what fits; a refusal does not end the flow, it may be taken back.
fn send(socket: &mut Socket) -> Result<(), Failure> {
    match socket.write(&[b'.'; 32]) {
        Ok(_) => Ok(()),
        Err(error) if is_refusal(&error) => Ok(()),
        Err(error) => Err(Failure::at("send", error)),
    }
}

fn drain(socket: &mut Socket) -> Result<usize, Failure> {
    let mut total = 0;
    let mut buffer = [0; 4096];
    // What can come back within a tick is bounded by what was sent.
    for _ in 0..64 {
        match socket.read(&mut buffer) {
            Ok(0) => return Err(Failure::unfit("the peer closed the connection")),
            Ok(length) => total += length,
            Err(error) if is_refusal(&error) => break,
            Err(error) => return Err(Failure::at("receive", error)),
        }
    }
    Ok(total)
}

fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::PermissionDenied)
}
