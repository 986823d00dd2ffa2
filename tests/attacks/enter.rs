//! Runs a command where a test wants it: in a network namespace, and in a cgroup.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::PathBuf,
    process::Command,
};

use nix::sched::{CloneFlags, setns};

use crate::outcome::Failure;

/// The first descriptor that `LISTEN_FDS` speaks of.
const HANDED_ON: i32 = 3;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The file of the network namespace.
    #[arg(long)]
    network: PathBuf,
    /// The directory of the cgroup.
    #[arg(long)]
    cgroup: Option<PathBuf>,
    /// Hand standard input on as descriptor 3, as a service manager hands on sockets.
    #[arg(long)]
    hand_on_stdin: bool,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// Becomes the command; returns only with the reason why it could not.
pub(crate) fn run(arguments: &Arguments) -> Failure {
    match enter(arguments) {
        Err(failure) => failure,
        Ok(()) => {
            let error = Command::new(&arguments.command[0]).args(&arguments.command[1..]).exec();
            Failure::setup(arguments.command[0].display(), error)
        }
    }
}

fn enter(arguments: &Arguments) -> Result<(), Failure> {
    if let Some(cgroup) = &arguments.cgroup {
        fs::write(cgroup.join("cgroup.procs"), "0")
            .map_err(|error| Failure::setup(cgroup.display(), error))?;
    }
    let network = File::open(&arguments.network)
        .map_err(|error| Failure::setup(arguments.network.display(), error))?;
    setns(network, CloneFlags::CLONE_NEWNET)
        .map_err(|errno| Failure::setup(arguments.network.display(), errno))?;
    if arguments.hand_on_stdin {
        duplicate(0, HANDED_ON)?;
        // Opened only now, so that it is not what had number 3.
        let nothing =
            File::open("/dev/null").map_err(|error| Failure::setup("/dev/null", error))?;
        duplicate(nothing.as_raw_fd(), 0)?;
    }
    Ok(())
}

/// Has `to` mean what `from` does; what it meant before is closed.
fn duplicate(from: i32, to: i32) -> Result<(), Failure> {
    // SAFETY: takes two numbers. Nothing here uses what they meant before.
    if unsafe { libc::dup2(from, to) } < 0 {
        return Err(Failure::setup("dup2", io::Error::last_os_error()));
    }
    Ok(())
}
