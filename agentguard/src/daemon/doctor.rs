//! What this machine can and can not enforce, found by trying it.

use std::fs;
use std::path::Path;

use agentguard_common::Layer;
use agentguard_common::abi::Settings;

use super::{host, protection_view};
use crate::api::types::{Protection, ProtectionLevel};
use crate::cli::backend::{Check, CheckState, DoctorReport};
use crate::config::Configuration;
use crate::datapath::{Datapath, Options, Sizes, uninstall};

/// Tables that are made for a moment need no room.
const TRIAL: Sizes = Sizes {
    workloads: 16,
    cgroups: 16,
    destinations: 16,
    rules: 16,
    executables: 16,
    unix_sockets: 16,
    unix_names: 16,
    tasks: 16,
    verdicts: 64,
    counters: 2,
    denied_ring: 4096,
    allowed_ring: 4096,
};

/// Looks at everything agentguard needs, and loads every program for a moment.
#[must_use]
pub fn doctor(configuration: &Configuration) -> DoctorReport {
    let name = nix::sys::utsname::uname().ok();
    let text = |value: Option<&std::ffi::OsStr>| {
        value.map_or_else(|| "unknown".to_owned(), |value| value.to_string_lossy().into_owned())
    };
    let mut checks = vec![root(), btf(), cgroup(configuration)];
    checks.extend(layout(configuration));
    checks.push(bpffs());
    let (protection, gaps) = try_programs(configuration, &mut checks);
    if !protection.layers.is_empty() {
        checks.push(lsm(&protection));
    }
    DoctorReport {
        kernel: text(name.as_ref().map(|name| name.release())),
        architecture: text(name.as_ref().map(|name| name.machine())),
        protection,
        checks,
        gaps,
    }
}

fn check(name: &str, state: CheckState, found: impl Into<String>, remedy: Option<&str>) -> Check {
    Check { name: name.to_owned(), state, found: found.into(), remedy: remedy.map(str::to_owned) }
}

fn root() -> Check {
    if nix::unistd::geteuid().is_root() {
        check("root", CheckState::Ok, "this runs as root", None)
    } else {
        check(
            "root",
            CheckState::Failed,
            "this does not run as root",
            Some("sudo agentguard doctor"),
        )
    }
}

fn btf() -> Check {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        check("kernel types", CheckState::Ok, "the kernel describes its types (BTF)", None)
    } else {
        let remedy = "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y";
        check("kernel types", CheckState::Failed, "the kernel has no BTF", Some(remedy))
    }
}

fn cgroup(configuration: &Configuration) -> Check {
    match configuration.find_cgroup_root() {
        Ok(path) => {
            check("cgroup v2", CheckState::Ok, format!("mounted at {}", path.display()), None)
        }
        Err(error) => check(
            "cgroup v2",
            CheckState::Failed,
            error.to_string(),
            Some("mount -t cgroup2 none /sys/fs/cgroup"),
        ),
    }
}

fn bpffs() -> Check {
    let mounted = fs::read_to_string("/proc/self/mounts")
        .is_ok_and(|mounts| mounts.lines().any(|line| line.contains(" /sys/fs/bpf bpf ")));
    if mounted {
        check("BPF file system", CheckState::Ok, "mounted at /sys/fs/bpf", None)
    } else {
        let found = "not mounted at /sys/fs/bpf; the daemon mounts it";
        check("BPF file system", CheckState::Warning, found, Some("mount -t bpf bpf /sys/fs/bpf"))
    }
}

/// How cgroups are laid out: which hierarchies there are, who makes those of containers, and what
/// this process sees of them.
fn layout(configuration: &Configuration) -> Vec<Check> {
    let Ok(root) = configuration.find_cgroup_root() else { return Vec::new() };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let has_v1 = mounts.lines().any(|line| line.split(' ').nth(2) == Some("cgroup"));
    let hierarchy = if has_v1 {
        "version 2 beside version 1 (hybrid); agents are held by version 2"
    } else {
        "version 2 alone"
    };
    let driver = if root.join("kubepods.slice").exists() {
        "; pods are made by systemd (kubepods.slice)"
    } else if root.join("kubepods").exists() {
        "; pods are made by kubelet itself (kubepods)"
    } else {
        ""
    };
    let mut checks =
        vec![check("cgroup layout", CheckState::Ok, format!("{hierarchy}{driver}"), None)];
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/cgroup")).ok();
    if namespace("self") != namespace("1") {
        checks.push(check(
            "cgroup namespace",
            CheckState::Warning,
            "this process has a cgroup namespace of its own, which hides where others are",
            Some(
                "run it in the host's (hostPID and a privileged container, or without a container)",
            ),
        ));
    }
    if !host::has_the_machines_pids() {
        checks.push(check(
            "process ids",
            CheckState::Warning,
            "this is not the machine's first PID namespace, as in a node that is a container itself: \
             audit records tell processes by the machine's numbers, and have no executable of what \
             ran before agentguard did",
            Some("give a container the node's (hostPID); in such a node there is nothing to do"),
        ));
    }
    checks
}

/// That the kernel's list names `bpf` does not mean that a program can be attached: what became of
/// the programs says it.
fn lsm(protection: &Protection) -> Check {
    let layers = protection.layers.iter().filter(|layer| layer.layer == Layer::Lsm.as_str());
    let missing: Vec<_> = layers.filter(|layer| layer.reason.is_some()).collect();
    let Some(first) = missing.first() else {
        return check("BPF LSM", CheckState::Ok, "the kernel calls its programs", None);
    };
    let reason = first.reason.as_deref().unwrap_or_default();
    check(
        "BPF LSM",
        CheckState::Warning,
        format!("{} of its hooks can not be used, {} for one: {reason}", missing.len(), first.hook),
        Some("the portable layer holds without it; see the gaps below for what that leaves open"),
    )
}

fn try_programs(
    configuration: &Configuration,
    checks: &mut Vec<Check>,
) -> (Protection, Vec<String>) {
    let none = (Protection { level: ProtectionLevel::None, layers: Vec::new() }, Vec::new());
    if !nix::unistd::geteuid().is_root() {
        return none;
    }
    let mut name = configuration.pin_directory.to_path_buf().into_os_string();
    name.push(format!("-doctor-{}", std::process::id()));
    let pins = std::path::PathBuf::from(name);
    let options =
        Options { pin_directory: pins.clone(), sizes: TRIAL, settings: Settings::default() };
    let protection = match Datapath::open(&options) {
        Ok(datapath) => {
            let view = protection_view(&datapath);
            let active = view.layers.iter().filter(|layer| layer.reason.is_none()).count();
            let found = format!("{active} of {} programs load and attach", view.layers.len());
            let (state, remedy) = if active == view.layers.len() {
                (CheckState::Ok, None)
            } else {
                (CheckState::Failed, Some("see which below; a newer kernel has them all"))
            };
            checks.push(check("programs", state, found, remedy));
            (view, datapath.gaps())
        }
        Err(error) => {
            let remedy = "see the kernel's log: dmesg";
            checks.push(check("programs", CheckState::Failed, error.to_string(), Some(remedy)));
            none
        }
    };
    if let Err(error) = uninstall(&pins) {
        checks.push(check(
            "clean-up",
            CheckState::Warning,
            error.to_string(),
            Some("remove the directory named there"),
        ));
    }
    protection
}
