//! The daemon, as its users know it: a configuration file and a command line.
//!
//! Its one job is to run it beside whatever else runs on this machine: with a configuration,
//! pins and a socket of its own, and without leaving anything behind. It knows nothing of how
//! the daemon is made.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    interrupt,
    netns::Namespace,
    run::{output, run},
    setup::cgroup_root,
};

/// How long the daemon may take until it answers.
const ANSWERS: Duration = Duration::from_secs(10);

/// Where its metrics are served, inside its namespace.
pub(crate) const METRICS: &str = "127.0.0.1:9469";

/// Where the machine's BPF file system is.
const BPFFS: &str = "/sys/fs/bpf";

/// A daemon that is set up, running or not. Dropping it removes what it put into the kernel.
pub(crate) struct Guard<'a> {
    binary: PathBuf,
    directory: PathBuf,
    node: &'a Namespace,
}

impl<'a> Guard<'a> {
    /// Sets up a daemon below `directory`, which is emptied, for a directory of manifests.
    pub(crate) fn new(
        binary: &Path,
        directory: &Path,
        manifests: &Path,
        node: &'a Namespace,
    ) -> Result<Self> {
        let guard = Self { binary: binary.to_owned(), directory: directory.to_owned(), node };
        guard.clear_away()?;
        fs::create_dir_all(directory)?;
        let config = format!(
            "node: {name}\n\
             trust_domain: example.org\n\
             cgroup_root: {cgroup_root}\n\
             cgroup_parent: {name}-exec\n\
             pin_directory: {pins}\n\
             state_directory: {state}\n\
             runtime_directory: {runtime}\n\
             manifests_directory: {manifests}\n\
             api:\n  socket: {socket}\n\
             metrics:\n  listen: {METRICS}\n\
             audit:\n  output: {audit}\n",
            name = node.name(),
            cgroup_root = cgroup_root()?.display(),
            pins = guard.pins().display(),
            state = guard.at("state").display(),
            runtime = guard.at("run").display(),
            manifests = manifests.display(),
            socket = guard.socket().display(),
            audit = guard.audit_log().display(),
        );
        fs::write(guard.config(), config)?;
        Ok(guard)
    }

    /// Where the audit records go.
    pub(crate) fn audit_log(&self) -> PathBuf {
        self.at("audit.jsonl")
    }

    /// A command of the daemon's binary that talks to this daemon.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .env("AGENTGUARD_SOCKET", self.socket())
            .env("AGENTGUARD_CONFIG", self.config());
        command
    }

    /// Starts the daemon, and returns when it answers.
    pub(crate) fn start(&self) -> Result<Ending> {
        let log = self.at("daemon.log");
        let open = || File::options().create(true).append(true).open(&log);
        let mut command = self.node.inside(&self.command(&["run"]));
        command.arg("--config").arg(self.config()).stdin(Stdio::null());
        let child = command.stdout(open()?).stderr(open()?).spawn();
        let mut daemon = Ending(child.context("the daemon cannot be started")?);
        let begin = Instant::now();
        while output(&mut self.command(&["status"])).is_err() {
            interrupt::check()?;
            if let Some(status) = daemon.0.try_wait()? {
                bail!("the daemon ended ({status}):\n{}", fs::read_to_string(&log)?);
            }
            ensure!(
                begin.elapsed() < ANSWERS,
                "the daemon does not answer:\n{}",
                fs::read_to_string(&log)?
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    /// Returns when the daemon holds a workload, so that nothing is taken for guarded that is not.
    pub(crate) fn wait_for_workload(&self, name: &str) -> Result<()> {
        let begin = Instant::now();
        loop {
            let workloads = output(&mut self.command(&["workloads", "--output", "json"]))?;
            let workloads: Value = serde_json::from_str(&workloads)?;
            let mut listed = workloads.as_array().into_iter().flatten();
            if listed.any(|workload| workload["name"] == name) {
                return Ok(());
            }
            ensure!(
                begin.elapsed() < ANSWERS,
                "the daemon does not find the workload {name}: {workloads}"
            );
            interrupt::sleep(Duration::from_millis(20))?;
        }
    }

    /// Runs a command and shows it as the viewer would type it.
    pub(crate) fn show(&self, arguments: &[&str]) -> Result<()> {
        println!("$ agentguard {}", typed(arguments));
        run(&mut self.command(arguments))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Named after the namespace, so that no other daemon's pins are in it.
    pub(crate) fn pins(&self) -> PathBuf {
        Path::new(BPFFS).join(self.node.name())
    }

    fn config(&self) -> PathBuf {
        self.at("config.yaml")
    }

    fn socket(&self) -> PathBuf {
        self.at("agentguard.sock")
    }

    /// Removes what this daemon, or an interrupted one before it, left.
    fn clear_away(&self) -> Result<()> {
        if self.config().exists() {
            output(&mut self.command(&["uninstall"]))
                .context("programs may still be in the kernel; see bpftool link show")?;
        }
        if self.directory.exists() {
            fs::remove_dir_all(&self.directory)
                .with_context(|| format!("{}: in the way", self.directory.display()))?;
        }
        Ok(())
    }
}

/// Arguments as a shell takes them.
pub(crate) fn typed(arguments: &[&str]) -> String {
    let quoted = arguments.iter().map(|argument| {
        if argument.contains(' ') { format!("'{argument}'") } else { (*argument).to_owned() }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.clear_away() {
            eprintln!("{} is left over: {error:#}", self.directory.display());
        }
    }
}

/// A process that ends with this value.
#[derive(Debug)]
pub(crate) struct Ending(pub(crate) Child);

impl Ending {
    /// Kills the process, as an operator or the kernel might, and waits until it is gone.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.0.kill().context("cannot be killed")?;
        self.0.wait().map(drop).context("cannot be waited for")
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        // It may have ended by itself, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
