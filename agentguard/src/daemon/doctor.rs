//! What this machine can and can not enforce, found by trying it.

use std::fs;
use std::path::Path;

use agentguard_common::abi::Settings;

use super::protection_view;
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
    let mut checks = vec![root(), btf(), cgroup(configuration), bpffs(), lsm()];
    let (protection, gaps) = try_programs(configuration, &mut checks);
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

/// That the list names `bpf` does not mean that a program can be attached; what can be is tried.
fn lsm() -> Check {
    let listed = fs::read_to_string("/sys/kernel/security/lsm").ok();
    let found = match &listed {
        Some(list) if list.split(',').any(|name| name.trim() == "bpf") => {
            "the kernel lists the BPF LSM; this version of agentguard has no programs for it yet"
        }
        Some(_) => "the kernel does not list the BPF LSM",
        None => "securityfs is not mounted, so it is not known which LSMs there are",
    };
    let remedy =
        "the portable layer holds without it; see the gaps below for what that leaves open";
    check("BPF LSM", CheckState::Warning, found, Some(remedy))
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
