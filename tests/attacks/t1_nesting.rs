//! T1: a container inside the container.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use nix::{
    mount::MsFlags,
    sched::{CloneFlags, unshare},
    unistd::{getgid, getuid},
};

use crate::{
    child::in_child,
    outcome::{Attempt, Failure},
    own_mounts::{mount_new, unshare_mounts},
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
    /// A child cgroup, made here.
    ChildCgroup,
    /// A child cgroup, made and entered in a cgroup namespace.
    CgroupNamespace,
    /// What `bwrap` does: new user, mount, PID, IPC, UTS and cgroup namespaces, shared network.
    Sandbox,
}

pub(crate) fn run(arguments: &Arguments) -> Attempt {
    let attack = || reach(arguments.protocol, arguments.to);
    match arguments.how {
        How::ChildCgroup => {
            let cgroup = Cgroup::make(&own_cgroup()?)?;
            in_child(|| {
                cgroup.enter()?;
                attack()
            })
        }
        How::CgroupNamespace => {
            in_child(|| {
                unshare(CloneFlags::CLONE_NEWCGROUP)
                    .map_err(|errno| Failure::at("unshare the cgroup namespace", errno))?;
                unshare_mounts()?;
                // Mounted anew in the namespace, the hierarchy begins at the own cgroup.
                let root = std::env::temp_dir().join(format!("agt-cgroup-{}", process::id()));
                fs::create_dir(&root).map_err(|error| Failure::setup(root.display(), error))?;
                let attempt = mount_new(Path::new("cgroup2"), &root, "cgroup2", None)
                    .and_then(|()| Cgroup::make(&root))
                    .and_then(|cgroup| {
                        in_child(|| {
                            cgroup.enter()?;
                            attack()
                        })
                    });
                nix::mount::umount(&root).map_err(|errno| Failure::setup("umount", errno))?;
                fs::remove_dir(&root).map_err(|error| Failure::setup(root.display(), error))?;
                attempt
            })
        }
        How::Sandbox => in_child(|| {
            sandbox()?;
            // The first child after the unshare is the new PID namespace's init.
            in_child(attack)
        }),
    }
}

/// New namespaces of every kind but network and time, in which this process is root.
fn sandbox() -> Result<(), Failure> {
    let (uid, gid) = (getuid(), getgid());
    unshare(
        CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .map_err(|errno| Failure::at("unshare", errno))?;
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ] {
        fs::write(file, text).map_err(|error| Failure::setup(file, error))?;
    }
    nix::mount::mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_SLAVE,
        None::<&str>,
    )
    .map_err(|errno| Failure::setup("make the mounts private", errno))
}

/// A cgroup that goes away with its value.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    pub(crate) fn make(below: &Path) -> Result<Self, Failure> {
        let path = below.join(format!("agt-nested-{}", process::id()));
        fs::create_dir(&path).map_err(|error| Failure::at(path.display(), error))?;
        Ok(Self(path))
    }

    /// Moves the calling process here.
    pub(crate) fn enter(&self) -> Result<(), Failure> {
        move_to(&self.0, 0)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that has just ended may hold it for a moment.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        eprintln!("{} is left behind", self.0.display());
    }
}

/// Moves process `pid` (zero: the caller) to `cgroup`.
pub(crate) fn move_to(cgroup: &Path, pid: i32) -> Result<(), Failure> {
    fs::write(cgroup.join("cgroup.procs"), pid.to_string())
        .map_err(|error| Failure::at(format!("move to {}", cgroup.display()), error))
}

/// The directory of the caller's cgroup.
pub(crate) fn own_cgroup() -> Result<PathBuf, Failure> {
    let read = |file| fs::read_to_string(file).map_err(|error| Failure::setup(file, error));
    let mounts = read("/proc/self/mountinfo")?;
    let root = mounts
        .lines()
        .find_map(|line| {
            let (first, second) = line.split_once(" - ")?;
            second.starts_with("cgroup2 ").then(|| first.split(' ').nth(4)).flatten()
        })
        .ok_or_else(|| Failure::unfit("cgroup v2 is not mounted"))?;
    let own = read("/proc/self/cgroup")?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .ok_or_else(|| Failure::unfit("the process is in no cgroup v2"))?;
    Ok(Path::new(root).join(own))
}
