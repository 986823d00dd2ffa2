//! Who is calling, and what is theirs.
//!
//! A caller is known by the credentials that the kernel attached to the connection, never by
//! anything it says. The role is taken anew for each request: a process that has become a workload
//! since it connected is one.
//!
//! A process id alone names nobody for long, so the connection's process is held by its pidfd
//! (`SO_PEERPIDFD`, 6.5). Older kernels have none: there, the start time of the process is
//! remembered when the connection is accepted, and what is left is a process that dies between
//! `connect` and `accept` and whose id is given to another of the same user within that time.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use procfs::process::Process;

/// As whom a caller is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// May do everything.
    Root,
    /// Another user: may confine itself and see what is its own.
    User,
    /// A process of a workload, whatever its user: may do nothing.
    Workload,
    /// A process of another pid namespace, as of a container that sees the socket: its user
    /// number says nothing about this host, so it may do nothing.
    Foreign,
}

impl Role {
    pub const ALL: [Self; 4] = [Self::Root, Self::User, Self::Workload, Self::Foreign];

    /// The word used in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::User => "user",
            Self::Workload => "workload",
            Self::Foreign => "foreign",
        }
    }
}

/// Why a caller could not be identified; it is refused.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    #[error("the kernel gives no credentials for the connection: {0}; use the unix socket")]
    Credentials(Errno),
    #[error("the process {pid} that called is gone; call from a process that waits for the answer")]
    Gone { pid: u32 },
    #[error(
        "the process that called is not visible here; run the daemon in the host's pid namespace"
    )]
    Invisible,
}

/// The two ways to hold on to a process.
#[derive(Debug)]
enum Held {
    Pidfd(OwnedFd),
    /// Clock ticks since boot.
    StartTime(u64),
}

/// The process at the other end of a connection.
#[derive(Debug)]
pub struct Caller {
    pub pid: u32,
    /// The effective user when it connected, as the daemon's user namespace numbers it.
    pub uid: u32,
    pub gid: u32,
    held: Held,
    proc_root: PathBuf,
}

impl Caller {
    /// The process that connected `socket`.
    ///
    /// # Errors
    /// If the kernel does not say or the process is gone.
    pub fn of(socket: &impl AsFd, proc_root: &Path) -> Result<Self, CallerError> {
        let peer = getsockopt(socket, PeerCredentials).map_err(CallerError::Credentials)?;
        let pid =
            u32::try_from(peer.pid()).ok().filter(|pid| *pid != 0).ok_or(CallerError::Invisible)?;
        let held = match getsockopt(socket, PeerPidfd) {
            Ok(pidfd) => Held::Pidfd(pidfd),
            Err(Errno::ENOPROTOOPT) => {
                let start = start_time(proc_root, pid).ok_or(CallerError::Gone { pid })?;
                Held::StartTime(start)
            }
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => {
                return Err(CallerError::Gone { pid });
            }
            Err(error) => return Err(CallerError::Credentials(error)),
        };
        let caller =
            Self { pid, uid: peer.uid(), gid: peer.gid(), held, proc_root: proc_root.into() };
        if caller.is_alive() { Ok(caller) } else { Err(CallerError::Gone { pid }) }
    }

    /// Whether [`Self::pid`] still names the process that connected. What was read about the pid
    /// before this returned true was about that process.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        match &self.held {
            Held::Pidfd(pidfd) => {
                let mut set = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
                // A pidfd becomes readable when its process ends.
                matches!(poll(&mut set, PollTimeout::ZERO), Ok(0))
            }
            Held::StartTime(start) => start_time(&self.proc_root, self.pid) == Some(*start),
        }
    }

    /// Whether the caller lives in the pid namespace of this process, as far as that can be told.
    #[must_use]
    pub fn shares_pid_namespace(&self) -> bool {
        let namespace = |process: &str| fs::read_link(self.proc_root.join(process).join("ns/pid"));
        match (namespace("self"), namespace(&self.pid.to_string())) {
            (Ok(own), Ok(theirs)) => own == theirs,
            (Ok(_) | Err(_), _) => false,
        }
    }
}

fn start_time(proc_root: &Path, pid: u32) -> Option<u64> {
    let process = Process::new_with_root(proc_root.join(pid.to_string())).ok()?;
    Some(process.stat().ok()?.starttime)
}

/// What a caller may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Viewer {
    Everything,
    /// What belongs to identities that begin with `prefix`, which ends with `/`.
    Own {
        uid: u32,
        prefix: String,
    },
}

impl Viewer {
    /// Who sees what is the user's own.
    #[must_use]
    pub fn own(trust_domain: &str, uid: u32) -> Self {
        Self::Own { uid, prefix: user_prefix(trust_domain, uid) }
    }

    /// Whether what belongs to `identity` may be seen. What has no identity yet is nobody's own.
    #[must_use]
    pub fn sees(&self, identity: Option<&str>) -> bool {
        match self {
            Self::Everything => true,
            Self::Own { prefix, .. } => identity.is_some_and(|id| id.starts_with(prefix)),
        }
    }
}

/// `spiffe://<trust domain>/user/<uid>/`: below it are the identities of what a user confines.
#[must_use]
pub fn user_prefix(trust_domain: &str, uid: u32) -> String {
    format!("spiffe://{trust_domain}/user/{uid}/")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_caller_is_who_connected() {
        let (here, _there) = UnixStream::pair().unwrap();
        let caller = Caller::of(&here, Path::new("/proc")).unwrap();
        assert_eq!(caller.pid, std::process::id());
        assert_eq!(caller.uid, nix::unistd::geteuid().as_raw());
        assert!(caller.is_alive());
        assert!(caller.shares_pid_namespace());
    }

    #[test]
    fn a_process_is_told_from_a_later_one_of_the_same_id() {
        let caller = Caller {
            pid: std::process::id(),
            uid: 0,
            gid: 0,
            held: Held::StartTime(1),
            proc_root: "/proc".into(),
        };
        assert!(!caller.is_alive());
    }

    #[test]
    fn a_user_sees_only_what_is_below_its_own_prefix() {
        let viewer = Viewer::own("example.org", 1000);
        assert!(viewer.sees(Some("spiffe://example.org/user/1000/agent")));
        for other in [
            "spiffe://example.org/user/10001/agent",
            "spiffe://example.org/user/1000",
            "spiffe://example.com/user/1000/agent",
            "spiffe://example.org/ns/user/1000/agent",
        ] {
            assert!(!viewer.sees(Some(other)), "{other}");
        }
        assert!(!viewer.sees(None));
        assert!(Viewer::Everything.sees(None));
    }
}
