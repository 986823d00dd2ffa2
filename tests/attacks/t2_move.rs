//! T2: leave for another cgroup, and connect from there.

use std::{
    fs::File,
    io::{Read, Write},
    mem,
    net::SocketAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::unistd::{ForkResult, Pid, fork};

use crate::{
    child::{self, channel, in_child},
    outcome::{Attempt, Failure},
    sockets::{Protocol, reach},
    t1_nesting::move_to,
};

/// From `linux/sched.h`; libc's own does not fit its type.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    protocol: Protocol,
    /// The directory of a cgroup outside the workload.
    #[arg(long)]
    cgroup: PathBuf,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// Write the own pid to `cgroup.procs`.
    Itself,
    /// Write a child's pid.
    Child,
    /// Have a child born there: `clone3` with `CLONE_INTO_CGROUP`.
    Birth,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let attack = || reach(arguments.protocol, arguments.to);
    match arguments.how {
        How::Itself => in_child(|| {
            move_to(&arguments.cgroup, 0)?;
            attack()
        }),
        How::Child => move_child(&arguments.cgroup, attack),
        How::Birth => born_in(&arguments.cgroup, attack),
    }
}

/// Moves a child that waits for it, then lets it run `attack`.
fn move_child(cgroup: &Path, attack: impl FnOnce() -> Attempt) -> Attempt {
    let (words, mouth) = channel()?;
    let (gate, key) = channel()?;
    // SAFETY: this process has one thread, so the child may do what this one may.
    match unsafe { fork() }.map_err(|errno| Failure::setup("fork", errno))? {
        ForkResult::Child => {
            drop((words, key));
            child::speak(mouth, || {
                // An end of file is a word too: the parent failed, so there is no attack.
                let mut word = [0];
                File::from(gate)
                    .read_exact(&mut word)
                    .map_err(|error| Failure::setup("wait for the move", error))?;
                attack()
            })
        }
        ForkResult::Parent { child } => {
            drop((mouth, gate));
            let moved = move_to(cgroup, child.as_raw());
            if moved.is_ok() {
                // A child that was killed by the move reads no more; its end says so.
                File::from(key).write_all(b"!").unwrap_or_default();
            } else {
                drop(key);
            }
            let end = child::listen(words, child)?;
            moved?;
            end.attempt.unwrap_or_else(|| Err(child::unspoken(end.status)))
        }
    }
}

/// Runs `attack` in a child that is born in `cgroup`.
fn born_in(cgroup: &Path, attack: impl FnOnce() -> Attempt) -> Attempt {
    let cgroup = File::open(cgroup).map_err(|error| Failure::setup(cgroup.display(), error))?;
    let (words, mouth) = channel()?;
    // SAFETY: all-zero is a valid `clone_args`: it asks for nothing.
    let mut request: libc::clone_args = unsafe { mem::zeroed() };
    request.flags = CLONE_INTO_CGROUP;
    request.exit_signal = libc::SIGCHLD as u64;
    request.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without `CLONE_VM` this is a fork; this process has one thread, so the child may
    // do what this one may.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw const request, size_of::<libc::clone_args>())
    };
    match pid {
        0 => {
            drop(words);
            child::speak(mouth, attack)
        }
        -1 => Err(Failure::at("clone3(CLONE_INTO_CGROUP)", std::io::Error::last_os_error())),
        pid => {
            drop(mouth);
            let end = child::listen(words, Pid::from_raw(pid as libc::pid_t))?;
            end.attempt.unwrap_or_else(|| Err(child::unspoken(end.status)))
        }
    }
}
