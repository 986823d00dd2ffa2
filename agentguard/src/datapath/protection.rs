//! How much of the promise this kernel keeps, door by door.
//!
//! A door is a way out that the portable layer or the LSM layer closes with one program. What is
//! not closed is said, never passed over.

use std::fmt;

/// One kernel program and what it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Door {
    /// The program's name in the object.
    pub program: &'static str,
    /// The kernel's name of the hook.
    pub hook: &'static str,
    /// What is open without it.
    pub closes: &'static str,
}

/// Every program of the portable layer.
const PORTABLE: [Door; 14] = [
    Door { program: "connect4", hook: "cgroup/connect4", closes: "connect over IPv4" },
    Door { program: "connect6", hook: "cgroup/connect6", closes: "connect over IPv6" },
    Door { program: "sendmsg4", hook: "cgroup/sendmsg4", closes: "datagrams over IPv4" },
    Door { program: "sendmsg6", hook: "cgroup/sendmsg6", closes: "datagrams over IPv6" },
    Door { program: "bind4", hook: "cgroup/bind4", closes: "listening on IPv4" },
    Door { program: "bind6", hook: "cgroup/bind6", closes: "listening on IPv6" },
    Door { program: "sock_create", hook: "cgroup/sock_create", closes: "raw IP sockets" },
    Door { program: "egress", hook: "cgroup_skb/egress", closes: "flows that outlive their grant" },
    Door { program: "process_exec", hook: "tp_btf/sched_process_exec", closes: "exec" },
    Door {
        program: "process_fork",
        hook: "tp_btf/sched_process_fork",
        closes: "birth outside the cgroup",
    },
    Door {
        program: "process_exit",
        hook: "tp_btf/sched_process_exit",
        closes: "stale process tags",
    },
    Door {
        program: "cgroup_attach_task",
        hook: "tp_btf/cgroup_attach_task",
        closes: "moves out of the cgroup",
    },
    Door { program: "cgroup_mkdir", hook: "tp_btf/cgroup_mkdir", closes: "untagged child cgroups" },
    Door { program: "cgroup_rmdir", hook: "tp_btf/cgroup_rmdir", closes: "stale cgroup tags" },
];

/// Every program of the portable layer.
#[must_use]
pub fn doors() -> &'static [Door] {
    &PORTABLE
}

/// What the portable layer leaves open by its nature, on every kernel.
pub const GAPS: [&str; 5] = [
    "a socket made and connected outside and then received (SCM_RIGHTS, pidfd_getfd) is not \
     judged: no portable hook sees whose it is now (N8)",
    "a script is judged by its interpreter, not by its own file (E5)",
    "code mapped executable without exec, such as dlopen or a program given to the dynamic \
     loader, is judged only where the loader itself is run (E6)",
    "unix sockets, other socket families, ptrace, signals and bpf() are not judged (T4 to T6, N7, \
     G2)",
    "a granted file whose content is overwritten in place keeps its permission (E3)",
];

/// What is open as well where the kernel can not end another task (`bpf_send_signal_task`, 6.13).
pub(super) const GAP_OTHERS: &str = "a process that another process of its workload moves out of the cgroup, or that is born \
     outside of it, is recorded and followed, but not ended before it runs on (T2)";

/// Whether a door's program is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DoorState {
    Active,
    /// The kernel did not take it; the reason, in one line.
    Unavailable(String),
}

/// How much of the promise is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Every door of both layers.
    Full,
    /// Some doors; what is missing.
    Partial(Vec<String>),
    None,
}

impl Protection {
    /// What the states of all doors add up to, with the gaps that remain whatever their state.
    #[must_use]
    pub fn of(states: &[(Door, DoorState)], gaps: Vec<String>) -> Self {
        let active = states.iter().filter(|(_, state)| matches!(state, DoorState::Active)).count();
        if active == 0 {
            return Self::None;
        }
        let mut missing = Self::missing_doors(states);
        missing.extend(gaps);
        Self::Partial(missing)
    }

    /// Doors of the portable layer that nothing closes, with the reasons.
    #[must_use]
    pub fn missing_doors(states: &[(Door, DoorState)]) -> Vec<String> {
        let missing = states.iter().filter_map(|(door, state)| match state {
            DoorState::Active => None,
            DoorState::Unavailable(reason) => {
                Some(format!("{} ({}): {reason}", door.hook, door.closes))
            }
        });
        missing.collect()
    }

    /// Whether every portable door is active.
    #[must_use]
    pub fn is_portable_complete(states: &[(Door, DoorState)]) -> bool {
        states.iter().all(|(_, state)| matches!(state, DoorState::Active))
    }

    /// The word used in status, records and metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Partial(_) => "partial",
            Self::None => "none",
        }
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
