//! How much of the promise this kernel keeps, door by door.
//!
//! A door is a way out that one layer closes with one program. What is asked is every door; what is
//! available is found by trying; what is achieved is told, and what stays open is said, never
//! passed over.

use std::fmt;

use agentguard_common::Layer;

/// One kernel program and what it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Door {
    /// The program's name in the object.
    pub program: &'static str,
    /// The kernel's name of the hook.
    pub hook: &'static str,
    /// What is open without it.
    pub closes: &'static str,
    pub layer: Layer,
    /// Where the program stands behind a gate: what is attached in its place.
    pub(super) gate: Option<Gate>,
}

impl Door {
    /// The program that is attached in the place of this door's, where its hook is global.
    #[must_use]
    pub fn gate_program(&self) -> Option<&'static str> {
        self.gate.map(|gate| gate.program)
    }
}

/// What is attached to a global hook for good, and the table of one slot it looks in for the program
/// that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gate {
    pub(super) program: &'static str,
    pub(super) slot: &'static str,
}

const fn cgroup(program: &'static str, hook: &'static str, closes: &'static str) -> Door {
    Door { program, hook, closes, layer: Layer::Portable, gate: None }
}

const fn global(
    layer: Layer,
    program: &'static str,
    hook: &'static str,
    closes: &'static str,
    gate: (&'static str, &'static str),
) -> Door {
    let (attached, slot) = gate;
    Door { program, hook, closes, layer, gate: Some(Gate { program: attached, slot }) }
}

/// The LSM layer's check of exec. Where it is in force, the tracepoint leaves exec to it.
pub(super) const EXEC_CHECK: &str = "bprm_check";
/// What keeps account of what was run after [`EXEC_CHECK`], in the place of the tracepoint.
pub(super) const EXEC_ACCOUNT: &str = "bprm_committed";

/// Every program of both layers. The LSM layer's hooks of exec come before the tracepoint that
/// leaves exec to them.
const DOORS: [Door; 26] = [
    cgroup("connect4", "cgroup/connect4", "connect over IPv4"),
    cgroup("connect6", "cgroup/connect6", "connect over IPv6"),
    cgroup("sendmsg4", "cgroup/sendmsg4", "datagrams over IPv4"),
    cgroup("sendmsg6", "cgroup/sendmsg6", "datagrams over IPv6"),
    cgroup("bind4", "cgroup/bind4", "listening on IPv4"),
    cgroup("bind6", "cgroup/bind6", "listening on IPv6"),
    cgroup("sock_create", "cgroup/sock_create", "raw IP sockets"),
    cgroup("egress", "cgroup_skb/egress", "flows that outlive their grant"),
    global(
        Layer::Lsm,
        EXEC_CHECK,
        "lsm/bprm_check_security",
        "exec by the caller's own error, and scripts",
        ("gate_bprm_check", "GATE_BPRM_CHECK"),
    ),
    global(
        Layer::Lsm,
        EXEC_ACCOUNT,
        "lsm/bprm_committed_creds",
        "what is known of a process after an exec",
        ("gate_bprm_done", "GATE_BPRM_COMMITTED"),
    ),
    global(
        Layer::Portable,
        "process_exec",
        "tp_btf/sched_process_exec",
        "exec",
        ("gate_exec", "GATE_EXEC"),
    ),
    global(
        Layer::Portable,
        "process_fork",
        "tp_btf/sched_process_fork",
        "birth outside the cgroup",
        ("gate_fork", "GATE_FORK"),
    ),
    global(
        Layer::Portable,
        "process_wakeup",
        "tp_btf/sched_wakeup_new",
        "births that sched_process_fork did not tell of",
        ("gate_wakeup", "GATE_WAKEUP"),
    ),
    global(
        Layer::Portable,
        "process_free",
        "tp_btf/sched_process_free",
        "stale process tags",
        ("gate_free", "GATE_FREE"),
    ),
    global(
        Layer::Portable,
        "cgroup_attach_task",
        "tp_btf/cgroup_attach_task",
        "moves out of the cgroup",
        ("gate_attach", "GATE_ATTACH"),
    ),
    global(
        Layer::Portable,
        "cgroup_mkdir",
        "tp_btf/cgroup_mkdir",
        "untagged child cgroups",
        ("gate_mkdir", "GATE_MKDIR"),
    ),
    global(
        Layer::Portable,
        "cgroup_rmdir",
        "tp_btf/cgroup_rmdir",
        "stale cgroup tags",
        ("gate_rmdir", "GATE_RMDIR"),
    ),
    global(
        Layer::Lsm,
        "socket_create",
        "lsm/socket_create",
        "socket families other than IP and unix",
        ("gate_create", "GATE_SOCKET_CREATE"),
    ),
    global(
        Layer::Lsm,
        "socket_connect",
        "lsm/socket_connect",
        "connect of a socket received from elsewhere",
        ("gate_connect", "GATE_SOCKET_CONNECT"),
    ),
    global(
        Layer::Lsm,
        "socket_sendmsg",
        "lsm/socket_sendmsg",
        "sends on a socket received from elsewhere",
        ("gate_sendmsg", "GATE_SOCKET_SENDMSG"),
    ),
    global(
        Layer::Lsm,
        "socket_listen",
        "lsm/socket_listen",
        "listening on a port the kernel chose",
        ("gate_listen", "GATE_SOCKET_LISTEN"),
    ),
    global(
        Layer::Lsm,
        "socket_accept",
        "lsm/socket_accept",
        "accepting on a socket received from elsewhere",
        ("gate_accept", "GATE_SOCKET_ACCEPT"),
    ),
    global(
        Layer::Lsm,
        "file_receive",
        "lsm/file_receive",
        "receiving an IP socket",
        ("gate_receive", "GATE_FILE_RECEIVE"),
    ),
    global(
        Layer::Lsm,
        "unix_receive",
        "lsm/file_receive",
        "receiving a connected unix socket",
        ("gate_unix_recv", "GATE_UNIX_RECEIVE"),
    ),
    global(
        Layer::Lsm,
        "unix_connect",
        "lsm/unix_stream_connect",
        "unix stream sockets",
        ("gate_unix_conn", "GATE_UNIX_CONNECT"),
    ),
    global(
        Layer::Lsm,
        "unix_send",
        "lsm/unix_may_send",
        "unix datagram sockets",
        ("gate_unix_send", "GATE_UNIX_SEND"),
    ),
];

/// Every program of both layers.
#[must_use]
pub fn doors() -> &'static [Door] {
    &DOORS
}

/// A way out that stays open, unless every one of some doors is active.
struct Gap {
    says: &'static str,
    /// Programs of the doors that close it together; none: this version closes it nowhere.
    closed_by: &'static [&'static str],
}

const GAPS: [Gap; 10] = [
    Gap {
        says: "a socket made and connected outside and then received (SCM_RIGHTS, pidfd_getfd) is \
               not judged: no portable hook sees whose it is now (N8)",
        closed_by: &["socket_connect", "socket_sendmsg", "socket_accept", "file_receive"],
    },
    Gap {
        says: "socket families other than IP and unix are not judged (N6, N7)",
        closed_by: &["socket_create"],
    },
    Gap {
        says: "a socket may listen on a port that the kernel chose; what it accepts there is \
               answered only on a granted port (N14)",
        closed_by: &["socket_listen"],
    },
    Gap {
        says: "a script is judged by its interpreter, not by its own file (E5)",
        closed_by: &["bprm_check"],
    },
    Gap {
        says: "where the kernel may preempt a task in a tracepoint (Linux 7.0 and later), an exec may \
               pass unjudged while another that was preempted there waits on the same CPU (E1)",
        closed_by: &["bprm_check"],
    },
    Gap {
        says: "unix sockets are not judged (T4, T5)",
        closed_by: &["unix_connect", "unix_send", "unix_receive"],
    },
    Gap {
        says: "code mapped executable without exec, such as dlopen, a program given to the dynamic \
               loader or what stands in the loader's place, is judged only where the loader itself \
               is run (E6)",
        closed_by: &[],
    },
    Gap {
        says: "a workload with CAP_NET_ADMIN in its network namespace can send by a TUN device, a \
               tunnel or a rule that rewrites addresses, which no hook of a socket sees (N16)",
        closed_by: &[],
    },
    Gap { says: "ptrace, signals, mounts and bpf() are not judged (T6, G2)", closed_by: &[] },
    Gap {
        says: "a granted file whose content is overwritten in place keeps its permission (E3)",
        closed_by: &[],
    },
];

/// What is open as well where the kernel can not end another task (`bpf_send_signal_task`, 6.13): with
/// the LSM layer, which judges what the hooks of its new cgroup do not judge yet, and without.
const OTHERS_HELD: &str = "a process that another process of its workload moves out of the cgroup, or that is born \
     outside of it, is recorded, held and followed, but not ended before it runs on (T2)";
const OTHERS_FREE: &str = "a process that another process of its workload moves out of the cgroup, or that is born \
     outside of it, is recorded and followed, but not ended before it runs on, and what it does \
     before its new cgroup has hooks is not judged (T2)";
/// The doors that judge what the hooks of a cgroup judge elsewhere.
const OF_OTHERS: [&str; 5] =
    ["bprm_check", "socket_connect", "socket_sendmsg", "socket_listen", "socket_accept"];

/// What stays open where the doors are in these states, one sentence each.
pub(super) fn gaps(states: &[(Door, DoorState)], ends_others: bool) -> Vec<String> {
    let active = |program: &&str| {
        states.iter().any(|(door, state)| door.program == *program && *state == DoorState::Active)
    };
    let open =
        GAPS.iter().filter(|gap| gap.closed_by.is_empty() || !gap.closed_by.iter().all(&active));
    let of_others = match (ends_others, OF_OTHERS.iter().all(&active)) {
        (true, _) => None,
        (false, true) => Some(OTHERS_HELD),
        (false, false) => Some(OTHERS_FREE),
    };
    open.map(|gap| gap.says).chain(of_others).map(str::to_owned).collect()
}

/// Whether a door's program is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DoorState {
    Active,
    /// The kernel did not take it, or this process may not attach it; the reason, in one line.
    Unavailable(String),
}

/// How much of the promise is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Every door of both layers, and nothing is left open.
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
        let mut missing: Vec<String> =
            Layer::ALL.iter().flat_map(|layer| Self::missing_doors(states, *layer)).collect();
        missing.extend(gaps);
        if missing.is_empty() { Self::Full } else { Self::Partial(missing) }
    }

    /// What the states of one layer's doors add up to.
    #[must_use]
    pub fn of_layer(states: &[(Door, DoorState)], layer: Layer) -> Self {
        let states: Vec<_> =
            states.iter().filter(|(door, _)| door.layer == layer).cloned().collect();
        Self::of(&states, Vec::new())
    }

    /// As much as this, but for what is missing for another reason as well.
    #[must_use]
    pub fn without(self, missing: String) -> Self {
        match self {
            Self::Full => Self::Partial(vec![missing]),
            Self::Partial(mut others) => {
                others.insert(0, missing);
                Self::Partial(others)
            }
            Self::None => Self::None,
        }
    }

    /// Doors of a layer that nothing closes, with the reasons.
    #[must_use]
    pub fn missing_doors(states: &[(Door, DoorState)], layer: Layer) -> Vec<String> {
        let missing = states.iter().filter(|(door, _)| door.layer == layer);
        let missing = missing.filter_map(|(door, state)| match state {
            DoorState::Active => None,
            DoorState::Unavailable(reason) => {
                Some(format!("{} ({}): {reason}", door.hook, door.closes))
            }
        });
        missing.collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn states(lsm: &DoorState) -> Vec<(Door, DoorState)> {
        let state = |door: &Door| match door.layer {
            Layer::Portable => DoorState::Active,
            Layer::Lsm => lsm.clone(),
        };
        doors().iter().map(|door| (*door, state(door))).collect()
    }

    #[test]
    fn a_gap_is_closed_by_its_doors_alone() {
        let without = gaps(&states(&DoorState::Unavailable("no".to_owned())), true);
        assert_eq!(without.len(), GAPS.len());
        let with = gaps(&states(&DoorState::Active), true);
        assert_eq!(with.len(), GAPS.iter().filter(|gap| gap.closed_by.is_empty()).count());
        assert!(with.iter().any(|gap| gap.contains("E6")));
        assert!(!with.iter().any(|gap| gap.contains("T4")));
    }

    #[test]
    fn what_lives_on_elsewhere_is_held_by_the_other_layer() {
        let of_others = |lsm: &DoorState, ends_others| {
            let mut gaps = gaps(&states(lsm), ends_others);
            gaps.retain(|gap| gap.contains("(T2)"));
            gaps
        };
        let missing = DoorState::Unavailable("no".to_owned());
        assert_eq!(of_others(&missing, true), [""; 0]);
        assert_eq!(of_others(&missing, false), [OTHERS_FREE]);
        assert_eq!(of_others(&DoorState::Active, false), [OTHERS_HELD]);
    }

    #[test]
    fn every_door_that_closes_a_gap_exists() {
        for program in GAPS.iter().flat_map(|gap| gap.closed_by).chain(&OF_OTHERS) {
            assert!(doors().iter().any(|door| door.program == *program), "{program}");
        }
    }

    #[test]
    fn a_layer_is_full_partial_or_none() {
        let mut states = states(&DoorState::Unavailable("refused".to_owned()));
        assert_eq!(Protection::of_layer(&states, Layer::Portable), Protection::Full);
        assert_eq!(Protection::of_layer(&states, Layer::Lsm), Protection::None);
        let lsm = states.iter_mut().find(|(door, _)| door.layer == Layer::Lsm).unwrap();
        lsm.1 = DoorState::Active;
        assert!(matches!(Protection::of_layer(&states, Layer::Lsm), Protection::Partial(_)));
        let portable = Protection::of_layer(&states, Layer::Portable).without("why".to_owned());
        assert_eq!(portable, Protection::Partial(vec!["why".to_owned()]));
        assert_eq!(Protection::None.without("why".to_owned()), Protection::None);
    }
}
