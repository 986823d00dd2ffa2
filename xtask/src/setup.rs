//! `cargo xtask setup`: what building, testing and the demo need.
//!
//! Its one job is to find what is there, install what is not, and check that this kernel can
//! run the programs. It may be run again at any time: what is found is left alone. It knows
//! what is needed and where it comes from; what it is used for is the other commands' matter.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{
    run::{heading, output, run, which},
    runtimes, toolchain, vm,
};

/// The linker's version: the last line that borrows the LLVM of a Rust toolchain.
const BPF_LINKER: &str = "0.10.3";

/// The version of cargo-deny that `deny.toml` is written for.
const CARGO_DENY: &str = "0.20.2";

/// Programs by the Debian package that holds them, and the least purpose that needs them. What is on
/// nobody's `PATH` is named with its directory.
const PROGRAMS: &[(Purpose, &str, &str)] = &[
    (Purpose::Build, "cc", "build-essential"),
    (Purpose::Build, "protoc", "protobuf-compiler"),
    (Purpose::Demo, "bpftool", "bpftool"),
    (Purpose::Demo, "curl", "curl"),
    (Purpose::Demo, "git", "git"),
    (Purpose::Demo, "ip", "iproute2"),
    (Purpose::Demo, "nsenter", "util-linux"),
    (Purpose::Demo, "python3", "python3"),
    (Purpose::Demo, "ssh", "openssh-client"),
    (Purpose::Demo, "sshd", "openssh-server"),
    (Purpose::Test, "/usr/lib/cni/ptp", "containernetworking-plugins"),
    (Purpose::Test, "containerd", "containerd"),
    // What it is linked to, the Docker Engine of the tests is too.
    (Purpose::Test, "dmsetup", "dmsetup"),
    (Purpose::Test, "node", "nodejs"),
    (Purpose::Test, "promtool", "prometheus"),
    (Purpose::Test, "runc", "runc"),
    (Purpose::Vm, "busybox", "busybox-static"),
    (Purpose::Vm, "depmod", "kmod"),
    (Purpose::Vm, "xz", "xz-utils"),
];

/// Packages that bring a service along, which nobody asked for here.
const SERVICES: &[(&str, &str)] = &[
    ("containerd", "containerd.service"),
    ("openssh-server", "ssh.service"),
    ("prometheus", "prometheus.service"),
];

/// What `invoke-rc.d` asks before it starts a service.
const SERVICE_POLICY: &str = "/usr/sbin/policy-rc.d";

/// Debian's packages of a compiler with a ready-built `core` for BPF, and its linter.
const DEBIAN_COMPILER: &[&str] = &["rustc-web", "libstd-rust-web-dev-bpf", "rust-web-clippy"];

/// Arguments of `cargo xtask setup`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What it shall suffice for; each includes those before it
    #[arg(long = "for", value_enum, default_value_t = Purpose::Ci)]
    pub(crate) purpose: Purpose,
}

/// What a machine is made ready for. Each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Purpose {
    /// Building both halves
    Build,
    /// Running the guard and the demo's workload on this kernel
    Demo,
    /// Every test on this kernel
    Test,
    /// The virtual machines of the kernel matrix as well
    Vm,
    /// The checks of form as well
    Ci,
}

/// Makes this machine ready for `purpose`.
///
/// # Errors
///
/// What is missing and cannot be installed from here, with the remedy.
pub(crate) fn setup(purpose: Purpose) -> Result<()> {
    heading("set-up");
    programs(purpose)?;
    compiler()?;
    if purpose >= Purpose::Ci {
        rustup_component("clippy", "clippy-driver")?;
        rustup_component("rustfmt", "rustfmt")?;
        cargo_tool("cargo-deny", CARGO_DENY)?;
    }
    if purpose >= Purpose::Demo {
        kernel()?;
    }
    if purpose >= Purpose::Test {
        runtimes::prepare()?;
    }
    if purpose >= Purpose::Vm {
        vm::prepare()?;
    }
    Ok(())
}

/// Finds every program, and installs the packages of those that are missing.
fn programs(purpose: Purpose) -> Result<()> {
    let needed = || PROGRAMS.iter().filter(|(least, _, _)| *least <= purpose);
    let mut missing: Vec<&str> = needed()
        .filter(|(_, program, _)| which(program).is_none())
        .map(|(_, _, package)| *package)
        .collect();
    missing.dedup();
    if !missing.is_empty() {
        apt_install(&missing)?;
    }
    for (_, program, package) in needed() {
        match which(program) {
            Some(path) => println!("found     {program}: {}", path.display()),
            None => bail!(
                "{program} is still missing after installing {package}; install it by hand and \
                 put it on PATH"
            ),
        }
    }
    Ok(())
}

/// Finds the compiler and the linker of the kernel half, or installs them.
fn compiler() -> Result<()> {
    cargo_tool("bpf-linker", BPF_LINKER)?;
    if let Ok(toolchain) = toolchain::find() {
        println!("found     BPF toolchain: {toolchain}");
        return Ok(());
    }
    let by_rustup = which("rustup").is_some().then(|| {
        println!("install   rustup component rust-src");
        output(Command::new("rustup").args(["component", "add", "rust-src"]))
    });
    match by_rustup {
        Some(Ok(_)) if toolchain::find().is_ok() => {}
        Some(Ok(_)) => {
            println!("passed    rust-src is there, but its toolchain does not fit the linker");
            apt_install(DEBIAN_COMPILER)?;
        }
        Some(Err(error)) => {
            println!("passed    {error:#}");
            apt_install(DEBIAN_COMPILER)?;
        }
        None => apt_install(DEBIAN_COMPILER)?,
    }
    let toolchain = toolchain::find().map_err(anyhow::Error::msg)?;
    println!("found     BPF toolchain: {toolchain}");
    Ok(())
}

/// Finds a part of the Rust toolchain, or has rustup add it.
fn rustup_component(name: &str, program: &str) -> Result<()> {
    // rustup's own stand-in exists also where the component does not: only an answer counts.
    if output(Command::new(program).arg("--version")).is_ok() {
        println!("found     {name}");
        return Ok(());
    }
    println!("install   rustup component {name}");
    output(Command::new("rustup").args(["component", "add", name])).map(drop).with_context(|| {
        format!("{name} is missing; it is part of rustup's default profile: add it by hand")
    })
}

/// Finds a program that cargo installs, or has cargo build it.
pub(crate) fn cargo_tool(name: &str, version: &str) -> Result<()> {
    if let Some(path) = which(name) {
        println!("found     {name}: {}", path.display());
        return Ok(());
    }
    println!("install   {name} {version} with cargo");
    let mut install = Command::new("cargo");
    install.args(["install", name, "--version", version, "--locked", "--quiet"]);
    // Built once and run for seconds: what it saves in optimising is never won back. The
    // linker runs at every build of the kernel half, and is small.
    if name != "bpf-linker" {
        install.arg("--debug").env("CARGO_PROFILE_DEV_DEBUG", "false");
    }
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_DIR"] {
        install.env_remove(variable);
    }
    run(&mut install).with_context(|| {
        format!(
            "{name} is missing and cargo cannot install it; `cargo install {name} --version \
             {version} --locked` needs the crate registry"
        )
    })
}

/// Installs Debian packages.
pub(crate) fn apt_install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    let remedy = format!("apt-get install --no-install-recommends {list}");
    if which("apt-get").is_none() {
        bail!("missing: {list} (Debian's names); there is no apt-get here: install them by hand");
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("missing: {list}; installing needs root: run `{remedy}` as root, then this again");
    }
    println!("install   {list} with apt-get");
    let apt = |arguments: &[&str]| {
        output(
            Command::new("apt-get")
                .args(["--quiet", "--yes", "-o", "DPkg::Lock::Timeout=300"])
                .args(arguments)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    let install = || apt(&[&["install", "--no-install-recommends"], packages].concat());
    let _no_service = NoService::begin()?;
    // A machine that has never asked for package lists knows no package: ask once, then say
    // what the second answer was.
    if install().is_err() {
        apt(&["update"])
            .context("apt-get cannot read the package lists; check /etc/apt/sources.list")?;
        install().with_context(|| format!("cannot install; try `{remedy}` by hand"))?;
    }
    for (package, unit) in SERVICES {
        if packages.contains(package) && which("systemctl").is_some() {
            output(Command::new("systemctl").args(["disable", unit])).with_context(|| {
                format!("{package} is wanted for its programs only; disable {unit} by hand")
            })?;
        }
    }
    Ok(())
}

/// While this lives, packages that are installed start no service.
pub(crate) struct NoService {
    /// Whether the policy is ours to take away again.
    ours: bool,
}

impl NoService {
    pub(crate) fn begin() -> Result<Self> {
        if Path::new(SERVICE_POLICY).exists() {
            return Ok(Self { ours: false });
        }
        fs::write(SERVICE_POLICY, "#!/bin/sh\nexit 101\n")
            .and_then(|()| fs::set_permissions(SERVICE_POLICY, Permissions::from_mode(0o755)))
            .with_context(|| format!("{SERVICE_POLICY} cannot be written"))?;
        Ok(Self { ours: true })
    }
}

impl Drop for NoService {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(SERVICE_POLICY)
        {
            eprintln!("{SERVICE_POLICY} is left over, remove it: {error}");
        }
    }
}

/// Checks what the running kernel must give.
fn kernel() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("loading kernel programs needs root: run it as root");
    }
    let root = cgroup_root()?;
    println!("found     cgroup v2: {}", root.display());
    let btf = Path::new("/sys/kernel/btf/vmlinux");
    if !btf.exists() {
        bail!(
            "{} is missing: this kernel was built without CONFIG_DEBUG_INFO_BTF; use a kernel \
             that has it, as those of all current distributions do",
            btf.display()
        );
    }
    println!("found     kernel type information: {}", btf.display());
    let bpftool = which("bpftool").context("bpftool is missing; run `cargo xtask setup`")?;
    output(Command::new(bpftool).args(["prog", "show"])).context(
        "this kernel does not answer bpf(2) calls; it needs CONFIG_BPF_SYSCALL, CAP_BPF and \
         CAP_NET_ADMIN, and no seccomp filter of a container in between",
    )?;
    println!("found     bpf(2)");
    Ok(())
}

/// Where the cgroup v2 hierarchy is mounted.
///
/// # Errors
///
/// It is mounted nowhere.
pub(crate) fn cgroup_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc is not mounted")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .and_then(|fields| fields.get(1).map(PathBuf::from))
        .context(
            "cgroup v2 is not mounted; mount it: `mount -t cgroup2 none /sys/fs/cgroup` (or on a \
             directory of its own beside version 1)",
        )
}
