//! The machine that the cluster's one node believes to be on.
//!
//! Its one job is to run programs with a file system view, a network and a cgroup of their own, and
//! to end all of them, with all that they started, when it is dropped. Inside, the usual paths are
//! a node's: `/run`, `/etc`, `/var`, and the BPF file system are its own, and what is done there is
//! gone afterwards. Processes are the machine's: process ids mean the same inside and outside, as
//! they do on any node.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{interrupt, netns::Namespace, run::copy_environment, setup::cgroup_root};

/// The network namespace, and the cgroup below which everything is.
pub(super) const NAME: &str = "agentguard-e2e";

/// The node's address, to which its API server and kubelet are bound.
pub(super) const ADDRESS: &str = "10.99.0.1";

/// An address outside of the cluster, and one of a service that comes later. The node has them, so that
/// a connection is refused at once: the kernel tells of an address without a route once in a second.
pub(super) const NOBODIES: [&str; 2] = ["192.0.2.1", "10.96.77.77"];

/// How long processes may take to be gone once they are killed.
const GONE: Duration = Duration::from_secs(20);

/// Makes the file system view and stays, so that there is one. In `sh`, with the scratch directory
/// as the first argument.
///
/// `/etc`, `/opt` and `/var` are laid over the machine's. What containers are made of must not be on such a
/// file system, and is bound over it. Mounts are shared inside, so that volumes may be propagated.
const VIEW: &str = r#"
set -e
mount --make-rshared /
for directory in etc opt var; do
    mkdir -p "$1/$directory/upper" "$1/$directory/work"
    mount -t overlay -o "lowerdir=/$directory,upperdir=$1/$directory/upper,workdir=$1/$directory/work" \
        overlay "/$directory"
done
mkdir -p /etc/cni/net.d
for directory in run var/lib/containerd var/lib/kubelet var/lib/agentguard var/lib/etcd var/log/pods; do
    mkdir -p "$1/own/$directory" "/$directory"
    mount --bind "$1/own/$directory" "/$directory"
done
mkdir -p /run/lock
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
echo 1 >/proc/sys/net/ipv4/ip_forward
echo ready
exec sleep 86400
"#;

/// A node without anything that runs on it. Dropping it ends what does.
pub(super) struct Node {
    scratch: PathBuf,
    /// Holds the mount namespace.
    view: Child,
    /// In the order in which they were started.
    running: Vec<(String, Child)>,
    /// Every directory of ours in a cgroup hierarchy.
    cgroups: Vec<PathBuf>,
    unified: PathBuf,
    path: String,
    _network: Namespace,
}

impl Node {
    /// Makes one, with `scratch` for what it writes, after taking away one that an interrupted run
    /// left.
    ///
    /// # Errors
    ///
    /// Something of an earlier run cannot be taken away, or the kernel refuses a namespace.
    pub(super) fn new(scratch: &Path, path: String) -> Result<Self> {
        let unified = cgroup_root()?.join(NAME);
        let cgroups: Vec<_> =
            hierarchies()?.into_iter().map(|hierarchy| hierarchy.join(NAME)).collect();
        clear_away(scratch, &unified, &cgroups)?;
        fs::create_dir_all(scratch)?;
        let scratch = scratch.canonicalize()?;
        for cgroup in &cgroups {
            fs::create_dir_all(cgroup)
                .with_context(|| format!("{}: cannot be made", cgroup.display()))?;
            inherit_cpuset(cgroup)?;
        }
        delegate(&unified)?;
        // Beside what the kubelet makes, so that neither is in the other's way.
        fs::create_dir_all(unified.join("system"))?;

        let network = Namespace::new(NAME)?;
        network.ip(&["link", "add", "node0", "type", "veth", "peer", "name", "node1"])?;
        network.ip(&["address", "add", &format!("{ADDRESS}/24"), "dev", "node0"])?;
        for address in NOBODIES {
            network.ip(&["address", "add", &format!("{address}/32"), "dev", "node0"])?;
        }
        network.ip(&["link", "set", "node0", "up"])?;
        network.ip(&["link", "set", "node1", "up"])?;

        let mut view = Command::new("unshare");
        view.args(["--mount", "--propagation", "private", "--", "sh", "-c", VIEW, "sh"]);
        view.arg(&scratch);
        let mut view = wrapped(&unified, &network.inside(&view))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("the node's view of the file system cannot be made")?;
        let mut said = String::new();
        if let Some(stdout) = view.stdout.take() {
            BufReader::new(stdout).read_line(&mut said)?;
        }
        let node =
            Self { scratch, view, running: Vec::new(), cgroups, unified, path, _network: network };
        ensure!(said.trim() == "ready", "the node's view of the file system cannot be made");
        Ok(node)
    }

    /// Where what it writes goes, and its logs.
    pub(super) fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Where a path of the node's own is on this machine, without a slash in front.
    pub(super) fn outside(&self, path: &str) -> PathBuf {
        self.scratch.join("own").join(path)
    }

    /// The same command, on the node.
    pub(super) fn inside(&self, command: &Command) -> Command {
        let id = self.view.id();
        let mut nsenter = Command::new("nsenter");
        nsenter
            .arg(format!("--mount=/proc/{id}/ns/mnt"))
            .arg(format!("--net=/proc/{id}/ns/net"))
            // Not where the caller is: that is outside.
            .arg("--wdns=/")
            .arg("--")
            .arg(command.get_program())
            .args(command.get_args())
            .env("PATH", &self.path);
        copy_environment(command, &mut nsenter);
        nsenter
    }

    /// Starts a program that stays, with its log in `<name>.log`.
    pub(super) fn start(&mut self, name: &str, command: &Command) -> Result<()> {
        let log = File::create(self.log(name))?;
        let child = wrapped(&self.unified, &self.inside(command))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        self.running.push((name.to_owned(), child));
        Ok(())
    }

    /// Ends one program as a service manager does, and waits until it is gone.
    pub(super) fn stop(&mut self, name: &str) -> Result<()> {
        let mut child = self.taken(name)?;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let begin = Instant::now();
        while child.try_wait()?.is_none() {
            if begin.elapsed() > GONE {
                child.kill()?;
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Ends one program that is started again when it fails, at once: what would start it first. Neither
    /// ends by `SIGTERM`: this process has it blocked for the shell, and a `kube-controller-manager` that
    /// elects no leader passes over it.
    pub(super) fn kill(&mut self, name: &str) -> Result<()> {
        let mut shell = self.taken(name)?;
        let id = shell.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        shell.kill()?;
        shell.wait()?;
        for child in children.split_whitespace() {
            let child = nix::unistd::Pid::from_raw(child.parse()?);
            nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL)?;
        }
        Ok(())
    }

    /// One program, which is not watched any more.
    fn taken(&mut self, name: &str) -> Result<Child> {
        let at = self.running.iter().position(|(running, _)| running == name);
        let (_, child) = self.running.remove(at.with_context(|| format!("{name} is not running"))?);
        Ok(child)
    }

    /// Returns when `done` says so.
    ///
    /// # Errors
    ///
    /// It does not within the limit, or one of the programs has ended.
    pub(super) fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&Self) -> Result<bool>,
    ) -> Result<Duration> {
        let begin = Instant::now();
        loop {
            let asked = Instant::now();
            if done(self)? {
                return Ok(begin.elapsed());
            }
            // What is waited for shall have more of the processors than the asking.
            let rest = asked.elapsed().max(Duration::from_millis(200));
            for index in 0..self.running.len() {
                if let Some(status) = self.running[index].1.try_wait()? {
                    let name = self.running[index].0.clone();
                    bail!("{name} ended ({status}):\n{}", self.end_of_log(&name));
                }
            }
            ensure!(
                begin.elapsed() < limit,
                "{what}: not within {} s; logs are in {}",
                limit.as_secs(),
                self.scratch.display()
            );
            interrupt::sleep(rest)?;
        }
    }

    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.log"))
    }

    /// The last lines of a program's log, or those from where it says why it gave up: Kubernetes's
    /// programs add what each of their threads was doing.
    pub(super) fn end_of_log(&self, name: &str) -> String {
        let log = fs::read(self.log(name)).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        // `F1127 07:37:40.123456   12345 hooks.go:202] …`
        let is_fatal = |line: &&str| {
            let month_and_day = line.strip_prefix('F').and_then(|line| line.get(..4));
            month_and_day.is_some_and(|date| date.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let end = lines.len().saturating_sub(END_OF_LOG);
        let begin = lines.iter().rposition(is_fatal).unwrap_or(end);
        lines[begin..].iter().take(END_OF_LOG).copied().collect::<Vec<_>>().join("\n")
    }

    /// The cgroup below which the kubelet makes those of pods, from the root of each hierarchy.
    pub(super) fn cgroup() -> String {
        format!("/{NAME}")
    }

    /// What the cgroup of each process in a pod begins with.
    pub(super) fn cgroup_of_pods() -> String {
        format!("{}/kubepods", Self::cgroup())
    }

    /// Ends everything and takes the node away; the logs stay.
    pub(super) fn take_away(&mut self) -> Result<()> {
        kill_all(&self.unified)?;
        for (_, child) in &mut self.running {
            child.wait()?;
        }
        self.running.clear();
        self.view.wait()?;
        remove_cgroups(&self.cgroups)?;
        remove_all_but_logs(&self.scratch)
    }
}

/// How many lines of a log are shown.
const END_OF_LOG: usize = 20;

/// What there still is of a node, by name; nothing, once one was taken away.
///
/// # Errors
///
/// `/proc` cannot be read.
pub(super) fn left_over(scratch: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let cgroups = hierarchies()?.into_iter().map(|hierarchy| hierarchy.join(NAME));
    let network = Path::new("/run/netns").join(NAME);
    for path in cgroups.chain([network]).filter(|path| path.exists()) {
        found.push(path.display().to_string());
    }
    let scratch = scratch.display().to_string();
    for line in fs::read_to_string("/proc/self/mounts")?.lines() {
        if line.contains(&scratch) {
            found.push(format!("the mount {line}"));
        }
    }
    for entry in fs::read_dir("/proc")? {
        let process = entry?.path();
        // A process may end at any time, and most of what is in /proc is none.
        let Ok(cgroups) = fs::read_to_string(process.join("cgroup")) else { continue };
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        // One that has ended waits for its parent, which may be the machine's first process.
        let ended = status.lines().any(|line| line.starts_with("State:\tZ"));
        if cgroups.contains(&format!("/{NAME}")) && !ended {
            let name = status.lines().next().unwrap_or_default();
            found.push(format!("the process {} ({name})", process.display()));
        }
    }
    Ok(found)
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.take_away() {
            eprintln!("the cluster's node is left over in {}: {error:#}", self.scratch.display());
        }
    }
}

/// The same command, in our cgroup from its first instruction, and killed if we are.
fn wrapped(unified: &Path, command: &Command) -> Command {
    let mut sh = Command::new("sh");
    sh.args(["-c", "echo 0 >\"$0\" && exec setpriv --pdeathsig KILL -- \"$@\""])
        .arg(unified.join("system/cgroup.procs"))
        .arg(command.get_program())
        .args(command.get_args());
    copy_environment(command, &mut sh);
    sh
}

/// Where each cgroup hierarchy is mounted.
fn hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc is not mounted")?;
    let mut found: Vec<PathBuf> = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|fields| matches!(fields.get(2), Some(&"cgroup" | &"cgroup2")))
        .filter_map(|fields| fields.get(1).map(PathBuf::from))
        .collect();
    found.dedup();
    Ok(found)
}

/// A version 1 cpuset takes no process before it has processors and memory.
fn inherit_cpuset(cgroup: &Path) -> Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let own = cgroup.join(name);
        let Some(parent) = cgroup.parent().map(|parent| parent.join(name)) else { continue };
        // In version 2 the parent is the root, which has no such file.
        if own.exists() && parent.exists() && fs::read_to_string(&own)?.trim().is_empty() {
            fs::write(&own, fs::read_to_string(parent)?.trim())?;
        }
    }
    Ok(())
}

/// Lets the cgroups below ours have what controllers there are in version 2, where nothing else has them.
fn delegate(unified: &Path) -> Result<()> {
    let Some(root) = unified.parent() else { return Ok(()) };
    let there = fs::read_to_string(root.join("cgroup.controllers"))?;
    if !there.contains("memory") {
        return Ok(());
    }
    for controller in there.split_whitespace() {
        for cgroup in [root, unified] {
            fs::write(cgroup.join("cgroup.subtree_control"), format!("+{controller}"))
                .with_context(|| format!("{}: has no {controller}", cgroup.display()))?;
        }
    }
    Ok(())
}

/// Kills every process of the cgroup and those below it, and waits until there is none.
fn kill_all(unified: &Path) -> Result<()> {
    let kill = unified.join("cgroup.kill");
    if !unified.exists() {
        return Ok(());
    }
    fs::write(&kill, "1").with_context(|| format!("{}: cannot be written", kill.display()))?;
    let begin = Instant::now();
    while fs::read_to_string(unified.join("cgroup.events"))?.contains("populated 1") {
        ensure!(begin.elapsed() < GONE, "processes are left in {}", unified.display());
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Removes cgroups with all below them. None has a process.
fn remove_cgroups(cgroups: &[PathBuf]) -> Result<()> {
    fn remove(cgroup: &Path) -> Result<()> {
        for entry in fs::read_dir(cgroup)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                remove(&entry.path())?;
            }
        }
        let begin = Instant::now();
        // A process that was killed is counted until it is reaped.
        while let Err(error) = fs::remove_dir(cgroup) {
            ensure!(begin.elapsed() < GONE, "{}: cannot be removed: {error}", cgroup.display());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
    cgroups.iter().filter(|cgroup| cgroup.exists()).try_for_each(|cgroup| remove(cgroup))
}

fn remove_all_but_logs(scratch: &Path) -> Result<()> {
    for entry in fs::read_dir(scratch)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())
                .with_context(|| format!("{}: cannot be removed", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Takes away what an interrupted run left.
fn clear_away(scratch: &Path, unified: &Path, cgroups: &[PathBuf]) -> Result<()> {
    kill_all(unified)?;
    remove_cgroups(cgroups)?;
    if scratch.exists() {
        fs::remove_dir_all(scratch)
            .with_context(|| format!("{}: in the way", scratch.display()))?;
    }
    Ok(())
}
