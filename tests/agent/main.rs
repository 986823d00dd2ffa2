//! What runs in a container of the tests.
//!
//! `pause` holds a pod's namespaces. `attempt` asks for what it is told to, from its first
//! instructions on, and prints one line that says how each attempt ended. `end` is what attempts at
//! exec run. It needs no file but itself.
#![forbid(unsafe_code)]

use std::{
    io::{self, Write as _},
    net::SocketAddr,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use agentguard_agent::{Ask, Ended, Report, Tally};
use clap::Parser;
use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    time::{ClockId, clock_gettime},
};
use socket2::{Domain, SockAddr, Socket, Type};

/// How long a TCP connection may take.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Parser)]
enum Arguments {
    /// Wait until told to end.
    Pause,
    /// Ask, and say how it ended.
    Attempt {
        /// How often each is asked for.
        #[arg(long, default_value_t = 1)]
        times: u64,
        /// Wait afterwards until told to end.
        #[arg(long)]
        stay: bool,
        /// `tcp,<address>`, `udp,<address>`, `sendto,<address>` or `exec,<path>`.
        #[arg(required = true, value_parser = ask)]
        asks: Vec<Ask>,
    },
    /// End, and be content.
    End,
}

fn ask(text: &str) -> Result<Ask, String> {
    Ask::parse(text).ok_or_else(|| "is not <kind>,<target>".to_owned())
}

fn main() -> ExitCode {
    // Before anything else is done, so that nothing of this program is earlier.
    let began = since_boot();
    match Arguments::parse() {
        Arguments::Pause => wait_for_the_end(),
        Arguments::Attempt { times, stay, asks } => {
            let mut tallies: Vec<Tally> =
                asks.into_iter().map(|ask| Tally::begin(ask.clone(), attempt(&ask))).collect();
            for _ in 1..times {
                for tally in &mut tallies {
                    tally.add(attempt(&tally.ask));
                }
            }
            if let Err(error) = say(&Report { began, tallies }) {
                eprintln!("the report cannot be written: {error}");
                return ExitCode::FAILURE;
            }
            if stay {
                wait_for_the_end();
            }
        }
        Arguments::End => {}
    }
    ExitCode::SUCCESS
}

fn since_boot() -> u64 {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has this clock"));
    u64::try_from(now.as_nanos()).expect("the machine is younger than five centuries")
}

fn say(report: &Report) -> io::Result<()> {
    let line = serde_json::to_string(report)?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}

/// The first process of a pid namespace gets no signal that it does not ask for, and is the parent of
/// every orphan in it.
fn wait_for_the_end() {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGCHLD].into_iter().collect();
    signals.thread_block().expect("signals can be blocked");
    while signals.wait() == Ok(Signal::SIGCHLD) {
        while !matches!(
            waitpid(None, Some(WaitPidFlag::WNOHANG)),
            Ok(WaitStatus::StillAlive) | Err(_)
        ) {}
    }
}

fn attempt(ask: &Ask) -> Ended {
    let outcome = match ask {
        Ask::Tcp(address) => connect(*address),
        Ask::Udp(address) => datagram(*address).and_then(|socket| {
            socket.connect(&SockAddr::from(*address))?;
            socket.send(b"attempt").map(drop)
        }),
        Ask::SendTo(address) => datagram(*address)
            .and_then(|socket| socket.send_to(b"attempt", &SockAddr::from(*address)).map(drop)),
        Ask::Exec(path) => return execute(path),
    };
    outcome.map_or_else(|error| failed(&error), |()| Ended::Allowed)
}

/// A time limit that has passed is told by the number that the kernel has for it.
fn failed(error: &io::Error) -> Ended {
    match (error.raw_os_error(), error.kind()) {
        (Some(number), _) => Ended::Errno(number),
        (None, io::ErrorKind::TimedOut) => Ended::Errno(Errno::ETIMEDOUT as i32),
        (None, _) => Ended::Otherwise,
    }
}

/// Connects, and closes without leaving a port behind.
fn connect(address: SocketAddr) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.connect_timeout(&address.into(), PATIENCE)?;
    socket.set_linger(Some(Duration::ZERO))
}

fn datagram(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::DGRAM, None)
}

fn execute(path: &Path) -> Ended {
    let mut command = Command::new(path);
    command.arg("end").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => Ended::Allowed,
        Ok(status) if status.signal() == Some(Signal::SIGKILL as i32) => Ended::Killed,
        Ok(_) => Ended::Otherwise,
        Err(error) => failed(&error),
    }
}
