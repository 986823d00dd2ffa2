//! G5: fill up what the guard keeps, until it can keep no more of this process.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::{ForkResult, Pid, fork, pause},
};

use crate::{
    child::in_child,
    outcome::{Attempt, Failure},
    sockets::{Protocol, reach},
    t1_nesting::{move_to, own_cgroup},
};

/// How long to fill at most.
const FILLING: Duration = Duration::from_millis(1500);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    protocol: Protocol,
    #[arg(long)]
    what: What,
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    /// Child cgroups; the attack is made from the last.
    Cgroups,
    /// Processes; the attack is made by one more.
    Processes,
    /// Peers asked for.
    Destinations,
    /// Sockets; the attack is made on one more.
    Sockets,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let attack = || reach(arguments.protocol, arguments.to);
    let deadline = Instant::now() + FILLING;
    match arguments.what {
        What::Cgroups => {
            // In a child, which may be killed for it; the cgroups go afterwards either way.
            let parent = own_cgroup()?;
            let path = |number: u32| parent.join(format!("agt-many-{number}"));
            let attempt = in_child(|| {
                let mut last: Option<PathBuf> = None;
                for number in 0..arguments.count {
                    if Instant::now() > deadline {
                        break;
                    }
                    let path = path(number);
                    fs::create_dir(&path).map_err(|error| Failure::at(path.display(), error))?;
                    last = Some(path);
                }
                let last = last.ok_or_else(|| Failure::unfit("no cgroup"))?;
                in_child(|| {
                    move_to(&last, 0)?;
                    attack()
                })
            });
            for number in 0..arguments.count {
                // Those that were never made are gone already.
                let _gone = fs::remove_dir(path(number));
            }
            attempt
        }
        What::Processes => {
            let mut sleepers = Vec::new();
            let attempt = fill_with_processes(arguments.count, deadline, &mut sleepers)
                .and_then(|()| in_child(attack));
            for sleeper in sleepers {
                // A child of ours that was not waited for: nobody else has its number.
                kill(sleeper, Signal::SIGKILL).unwrap_or_default();
                let _ended = waitpid(sleeper, None);
            }
            attempt
        }
        What::Destinations => {
            let socket = Protocol::Udp.socket(arguments.to)?;
            for number in 0..arguments.count {
                if Instant::now() > deadline {
                    break;
                }
                // All over a network that leads nowhere.
                let address = Ipv4Addr::from_bits(0x7f01_0000 + number / 60_000);
                let peer = SocketAddr::from((address, (number % 60_000) as u16 + 1));
                // What becomes of it does not matter.
                let _answer = socket.send_to(b"fill", &peer.into());
            }
            attack()
        }
        What::Sockets => {
            let mut sockets: Vec<OwnedFd> = Vec::new();
            for _ in 0..arguments.count {
                if Instant::now() > deadline {
                    break;
                }
                match Protocol::Udp.socket(arguments.to) {
                    Ok(socket) => {
                        let _answer = socket.send_to(b"fill", &arguments.to.into());
                        sockets.push(socket.into());
                    }
                    // As many as the process may have.
                    Err(_) => break,
                }
            }
            // Room for the one that counts.
            sockets.truncate(sockets.len().saturating_sub(4));
            attack()
        }
    }
}

fn fill_with_processes(
    count: u32,
    deadline: Instant,
    sleepers: &mut Vec<Pid>,
) -> Result<(), Failure> {
    for _ in 0..count {
        if Instant::now() > deadline {
            break;
        }
        // SAFETY: this process has one thread; the child only waits.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => loop {
                pause();
            },
            Ok(ForkResult::Parent { child }) => sleepers.push(child),
            Err(errno) => return Err(Failure::at("fork", io::Error::from(errno))),
        }
    }
    Ok(())
}
