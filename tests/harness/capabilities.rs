//! What the daemon may do where it is installed as `deploy/` has it. The tests' daemons may do no more:
//! kernels ask for one capability or another to load and attach the same program.

use std::{os::unix::process::CommandExt as _, process::Command};

use caps::{CapSet, Capability, CapsHashSet};
use nix::{
    errno::Errno,
    sys::resource::{RLIM_INFINITY, Resource, setrlimit},
};

const UNIT: &str = include_str!("../../deploy/systemd/agentguard.service");

/// Has what `command` runs do no more than the unit's daemon, and not what `but` allows.
///
/// # Panics
///
/// When the unit names no capabilities, or not those of `but`.
#[track_caller]
pub(crate) fn confine(command: &mut Command, but: &[Capability]) {
    let all = caps::read(None, CapSet::Bounding).expect("a thread may read its own");
    let mut kept = listed(UNIT, "CapabilityBoundingSet=");
    for capability in but {
        assert!(kept.remove(capability), "the unit has no {capability}");
    }
    let dropped: Vec<_> = all.difference(&kept).copied().collect();
    let drop_them = move || {
        // Kernels before 5.11 count tables as locked memory, of which the unit allows any amount. Who may not
        // raise it has a newer one, or sees the daemon fail.
        let _denied = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
        let drop = |capability| caps::drop(None, CapSet::Bounding, capability);
        dropped.iter().copied().try_for_each(drop).map_err(|_denied| Errno::EPERM.into())
    };
    // SAFETY: system calls on memory that was there before the fork; what an error allocates, the C library
    // allows between fork and exec.
    unsafe { command.pre_exec(drop_them) };
}

/// The capabilities in a line of `text`, after `before`.
#[track_caller]
fn listed(text: &str, before: &str) -> CapsHashSet {
    let list = text.lines().find_map(|line| line.strip_prefix(before)).expect("a line of them");
    let names = list.split([' ', ',', '[', ']']).filter(|name| !name.is_empty());
    let parsed = names.map(|name| format!("CAP_{}", name.trim_start_matches("CAP_")).parse());
    parsed.collect::<Result<_, _>>().expect("names of capabilities")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_may_do_what_the_unit_may_but_make_cgroups_below_those_of_users() {
        let chart = include_str!("../../deploy/helm/agentguard/values.yaml");
        let of_unit = listed(UNIT, "CapabilityBoundingSet=");
        let mut of_pod = listed(chart, "capabilities: ");
        assert!(of_pod.insert(Capability::CAP_DAC_OVERRIDE));
        assert_eq!(of_pod, of_unit);
    }
}
