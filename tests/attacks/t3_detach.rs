//! T3: shed session, parent or namespaces, and connect then.

use std::net::SocketAddr;

use nix::{
    sched::{CloneFlags, unshare},
    unistd::setsid,
};

use crate::{
    child::{in_child, in_orphan},
    outcome::{Attempt, Failure},
    sockets::{Protocol, reach},
};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long)]
    protocol: Protocol,
    #[arg(long)]
    how: How,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum How {
    /// A session of its own.
    Setsid,
    /// What daemons do: a session of its own, then a child whose parent is gone.
    DoubleFork,
    /// A process below init.
    Reparent,
    UnshareUser,
    UnshareMount,
    UnsharePid,
    UnshareIpc,
    UnshareUts,
    UnshareCgroup,
    UnshareTime,
}

/// `CLONE_NEWTIME`, which nix does not name.
const TIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let attack = || reach(arguments.protocol, arguments.to);
    match arguments.how {
        How::Setsid => in_child(|| {
            new_session()?;
            attack()
        }),
        How::DoubleFork => in_child(|| {
            new_session()?;
            in_orphan(attack)
        }),
        How::Reparent => in_orphan(attack),
        How::UnshareUser => apart(CloneFlags::CLONE_NEWUSER, attack),
        How::UnshareMount => apart(CloneFlags::CLONE_NEWNS, attack),
        How::UnsharePid => apart(CloneFlags::CLONE_NEWPID, attack),
        How::UnshareIpc => apart(CloneFlags::CLONE_NEWIPC, attack),
        How::UnshareUts => apart(CloneFlags::CLONE_NEWUTS, attack),
        How::UnshareCgroup => apart(CloneFlags::CLONE_NEWCGROUP, attack),
        How::UnshareTime => apart(TIME, attack),
    }
}

fn new_session() -> Result<(), Failure> {
    setsid().map(drop).map_err(|errno| Failure::setup("setsid", errno))
}

/// Runs `attack` with new namespaces. In a child's child, since the new PID and time namespaces
/// hold for children only.
fn apart(namespaces: CloneFlags, attack: impl FnOnce() -> Attempt) -> Attempt {
    in_child(|| {
        unshare(namespaces).map_err(|errno| Failure::at("unshare", errno))?;
        in_child(attack)
    })
}
