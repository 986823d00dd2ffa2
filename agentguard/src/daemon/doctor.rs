//! What this machine can and can not enforce, found by trying it.

use std::path::Path;
use std::{fs, io};

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

/// Where cgroup v2 is, as the daemon finds it, and what there is in its place where it is nowhere.
fn cgroup(configuration: &Configuration) -> Check {
    match configuration.find_cgroup_root() {
        Ok(path) => {
            check("cgroup v2", CheckState::Ok, format!("mounted at {}", path.display()), None)
        }
        Err(error) => {
            let mut error = error.to_string();
            let mut read = |process: &str| {
                mounts_of(process).unwrap_or_else(|unreadable| {
                    error += &format!("; /proc/{process}/mounts can not be read: {unreadable}");
                    String::new()
                })
            };
            let own = read("self");
            let node = host::has_own_mounts().then(|| read("1"));
            missing_cgroup2(&error, &own, node.as_deref())
        }
    }
}

/// The mount table of a process.
fn mounts_of(process: &str) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{process}/mounts"))
}

/// Where file systems of this type are mounted.
fn mounted<'a>(mounts: &'a str, kind: &str) -> Vec<&'a str> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let of_kind = fields.filter(|fields| fields.get(2) == Some(&kind));
    of_kind.filter_map(|fields| fields.get(1).copied()).collect()
}

/// What a machine, or a container on one, has in place of cgroup v2, what that means, and what to do.
fn missing_cgroup2(error: &str, mounts: &str, node: Option<&str>) -> Check {
    let means = "workloads are told by their cgroups of version 2, so the daemon does not start";
    let of_node = node.map(|mounts| mounted(mounts, "cgroup2")).unwrap_or_default();
    let v1 = mounted(mounts, "cgroup");
    let (found, remedy) = if let Some(path) = of_node.first() {
        (
            format!("not mounted in this container, though the node has it at {path}; {means}"),
            format!("give the container the node's {path} as a volume"),
        )
    } else if let Some(path) = v1.first() {
        (
            format!(
                "not mounted: this machine has version 1 only, {} hierarchies of it ({path} is \
                 one); {means}",
                v1.len()
            ),
            "boot with systemd.unified_cgroup_hierarchy=1, and let container runtimes use version \
             2; or mount it beside version 1 (mkdir -p /sys/fs/cgroup/unified; mount -t cgroup2 \
             none /sys/fs/cgroup/unified), where containers that a runtime puts into version 1 \
             alone are shown with protection none"
                .to_owned(),
        )
    } else {
        (format!("{error}; {means}"), "mount -t cgroup2 none /sys/fs/cgroup".to_owned())
    };
    check("cgroup v2", CheckState::Failed, found, Some(&remedy))
}

fn bpffs() -> Check {
    let found = match mounts_of("self") {
        Ok(mounts) if mounted(&mounts, "bpf").contains(&"/sys/fs/bpf") => {
            return check("BPF file system", CheckState::Ok, "mounted at /sys/fs/bpf", None);
        }
        Ok(_) => "not mounted at /sys/fs/bpf; the daemon mounts it".to_owned(),
        Err(unreadable) => format!("not known: /proc/self/mounts can not be read: {unreadable}"),
    };
    check("BPF file system", CheckState::Warning, found, Some("mount -t bpf bpf /sys/fs/bpf"))
}

/// How cgroups are laid out: which hierarchies there are, who makes those of containers, and what
/// this process sees of them.
fn layout(configuration: &Configuration) -> Vec<Check> {
    // In a container, its mounts say what it was given, and the node's how the node is laid out.
    let of = if host::has_own_mounts() { "1" } else { "self" };
    let mut checks = Vec::new();
    match mounts_of(of).map(|mounts| hierarchies(&mounts)) {
        Ok(None) => {}
        Ok(Some(hierarchies)) => {
            // That it is not found is what the check of cgroup v2 tells.
            let root = configuration.find_cgroup_root();
            let driver = root.map_or_else(|_| String::new(), |root| driver(&root));
            let found = format!("{hierarchies}{driver}");
            checks.push(check("cgroup layout", CheckState::Ok, found, None));
        }
        Err(error) => checks.push(check(
            "cgroup layout",
            CheckState::Warning,
            format!("not known: /proc/{of}/mounts can not be read: {error}"),
            Some("run it as root, in a container with the node's process ids (hostPID)"),
        )),
    }
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

/// Which hierarchies of cgroups there are; nothing without version 2, of which another check tells.
fn hierarchies(mounts: &str) -> Option<&'static str> {
    match (mounted(mounts, "cgroup2").is_empty(), mounted(mounts, "cgroup").is_empty()) {
        (true, _) => None,
        (false, true) => Some("version 2 alone"),
        (false, false) => Some("version 2 beside version 1 (hybrid); agents are held by version 2"),
    }
}

/// Who makes the cgroups of pods.
fn driver(root: &Path) -> String {
    // The second is that of a kubelet with a slice of its own, as in Kubernetes in Docker.
    let slices = ["kubepods.slice", "kubelet.slice/kubelet-kubepods.slice"];
    if let Some(slice) = slices.iter().find(|slice| root.join(slice).exists()) {
        format!("; cgroups of pods are made by systemd ({slice})")
    } else if root.join("kubepods").exists() {
        "; cgroups of pods are made by kubelet itself (kubepods)".to_owned()
    } else {
        String::new()
    }
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
                (CheckState::Failed, Some("see which below, and why; a newer kernel has them all"))
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

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
        proc /proc proc rw 0 0\n";
    const V2: &str = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";

    #[test]
    fn a_machine_with_version_1_alone_is_told_what_that_means_and_what_to_do() {
        let told = missing_cgroup2("no", V1, None);
        assert_eq!(told.state, CheckState::Failed);
        for part in ["version 1 only", "2 hierarchies", "/sys/fs/cgroup/cpu", "does not start"] {
            assert!(told.found.contains(part), "{part}: {}", told.found);
        }
        let remedy = told.remedy.unwrap();
        for part in ["systemd.unified_cgroup_hierarchy=1", "mount -t cgroup2", "protection none"] {
            assert!(remedy.contains(part), "{part}: {remedy}");
        }
        assert_eq!(hierarchies(V1), None);
    }

    #[test]
    fn a_container_without_the_nodes_cgroups_is_told_where_they_are() {
        let told = missing_cgroup2("no", "proc /proc proc rw 0 0\n", Some(V2));
        assert!(told.found.contains("the node has it at /sys/fs/cgroup"), "{}", told.found);
        assert!(told.remedy.unwrap().contains("give the container the node's /sys/fs/cgroup"));
        // A node that has none is no better.
        let told = missing_cgroup2("no", V1, Some(V1));
        assert!(told.found.contains("version 1 only"), "{}", told.found);
    }

    #[test]
    fn a_machine_without_cgroups_is_told_to_mount_them() {
        let told = missing_cgroup2("cgroup v2 is not mounted", "", None);
        assert!(told.found.contains("cgroup v2 is not mounted; workloads are"), "{}", told.found);
        assert_eq!(told.remedy.as_deref(), Some("mount -t cgroup2 none /sys/fs/cgroup"));
    }

    #[test]
    fn layouts_are_told_apart() {
        assert_eq!(hierarchies(V2), Some("version 2 alone"));
        assert!(hierarchies(&format!("{V1}{V2}")).unwrap().contains("hybrid"));
    }
}
