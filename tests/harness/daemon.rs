//! A daemon as whoever installs it sees it: its files, its commands, its answers.
//!
//! Unlike a [`Guard`](crate::Guard) it knows no network and no attack; it is for what the daemon
//! itself promises. Everything of it lies in a temporary directory of its own, and goes when it is
//! dropped.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use caps::Capability;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Cgroup, Layer, capabilities, cgroup,
    guard::shared_pins,
    process::{Finished, Running, binary, run},
    requires, scrape, unique,
    world::PINS,
};

/// How long any one command may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a start may take.
const START: Duration = Duration::from_secs(90);
/// The trust domain of a daemon's workloads.
pub const TRUST_DOMAIN: &str = "daemon.test";
/// Who is not root: nobody.
pub const USER: u32 = 65534;

/// The files of an installation and, while it runs, its daemon.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    directory: TempDir,
    /// Where its kernel half is pinned.
    pins: PathBuf,
    /// Whether its kernel half is left to the next daemon.
    shares: bool,
    metrics: SocketAddr,
    running: Option<Running>,
    /// Which program runs as the daemon.
    program: PathBuf,
}

impl Daemon {
    /// An installation whose daemon does not run.
    ///
    /// # Panics
    ///
    /// Without root, or when a file can not be made.
    #[track_caller]
    #[must_use]
    pub fn installed() -> Self {
        Self::installed_with(None)
    }

    /// The same, going on with the kernel half of others where a machine has them share it: nothing may
    /// be said of what is pinned, nor of what is counted in all.
    ///
    /// # Panics
    ///
    /// As [`Self::installed`] does.
    #[track_caller]
    #[must_use]
    pub fn installed_where_others_were() -> Self {
        Self::installed_with(shared_pins())
    }

    #[track_caller]
    fn installed_with(shared: Option<PathBuf>) -> Self {
        requires(Layer::Portable);
        let name = unique::name();
        let directory = tempfile::tempdir().expect("a temporary directory");
        // Users reach the control socket in it.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("ours");
        fs::create_dir(directory.path().join("manifests")).expect("a directory can be made");
        let metrics = scrape::unused_address();
        let shares = shared.is_some();
        let pins = shared.unwrap_or_else(|| Path::new(PINS).join(&name));
        let program = program();
        let daemon = Self { name, directory, pins, shares, metrics, running: None, program };
        daemon.configure(|_| {});
        daemon
    }

    /// An installation whose daemon runs.
    #[track_caller]
    #[must_use]
    pub fn started() -> Self {
        let mut daemon = Self::installed();
        daemon.start();
        daemon
    }

    /// Writes the configuration anew, with a change.
    ///
    /// # Panics
    ///
    /// When it can not be written.
    pub fn configure(&self, change: impl FnOnce(&mut Value)) {
        let mut config = json!({
            "node": self.name,
            "trust_domain": TRUST_DOMAIN,
            "pin_directory": self.pins,
            "cgroup_parent": self.exec_parent(),
            "state_directory": self.path("state"),
            "runtime_directory": self.path("run"),
            "manifests_directory": self.path("manifests"),
            "api": {"socket": self.socket()},
            "metrics": {"listen": self.metrics.to_string()},
            "audit": {"output": self.audit_log()},
        });
        change(&mut config);
        // JSON is YAML too.
        fs::write(self.config(), format!("{config:#}\n")).expect("a file can be written");
    }

    /// A path in the installation.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn exec_parent(&self) -> String {
        format!("{}-exec", self.name)
    }

    /// The cgroup in which `exec` makes those of its workloads; this installation's own, so that
    /// names of workloads do not meet those of others.
    #[must_use]
    pub fn exec_cgroups(&self) -> PathBuf {
        cgroup::root().join(self.exec_parent())
    }

    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.path("config.yaml")
    }

    #[must_use]
    pub fn audit_log(&self) -> PathBuf {
        self.path("audit.log")
    }

    fn socket(&self) -> PathBuf {
        self.path("run/agentguard.sock")
    }

    /// Where its kernel half is pinned.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        self.pins.clone()
    }

    /// Starts the daemon and waits until it is ready.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    #[track_caller]
    pub fn start(&mut self) {
        self.launch(&[]);
        let begin = Instant::now();
        // On a busy machine the kernel takes its time to verify the programs.
        while !self.is_ready() {
            assert!(begin.elapsed() < START, "the daemon is not ready: {}", self.said());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether it answers; fails when it ended.
    #[track_caller]
    fn is_ready(&mut self) -> bool {
        let running = self.running.as_mut().expect("it was started");
        if let Some(ended) = running.wait(Duration::ZERO) {
            panic!("the daemon ended: {ended:?}");
        }
        // A command takes as long as half a start where the kernel is emulated, and keeps it from its work.
        UnixStream::connect(self.socket()).is_ok() && self.status().is_some()
    }

    /// Has another program run as the daemon from its next start on.
    pub fn becomes(&mut self, program: &Path) {
        self.program = program.to_owned();
    }

    /// Starts the daemon with more in its environment, and waits for nothing.
    pub fn launch(&mut self, environment: &[(&str, &str)]) {
        self.launch_without(&[], environment);
    }

    /// The same, without some of the capabilities that an installed daemon has.
    ///
    /// # Panics
    ///
    /// When an installed daemon does not have them.
    #[track_caller]
    pub fn launch_without(&mut self, but: &[Capability], environment: &[(&str, &str)]) {
        let mut command = Command::new(&self.program);
        command.env("AGENTGUARD_CONFIG", self.config()).arg("run").stdin(Stdio::null());
        capabilities::confine(&mut command, but);
        command.envs(environment.iter().copied());
        self.running = Some(Running::start(&mut command));
    }

    /// The end of the daemon, if it comes within `patience`.
    ///
    /// # Panics
    ///
    /// When it was not started.
    #[track_caller]
    pub fn ended(&mut self, patience: Duration) -> Option<Finished> {
        let ended = self.running.as_mut().expect("it was started").wait(patience);
        if ended.is_some() {
            self.running = None;
        }
        ended
    }

    /// The daemon's pid.
    ///
    /// # Panics
    ///
    /// When it does not run.
    #[track_caller]
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running.as_ref().expect("it runs").pid()
    }

    /// Ends the daemon as `SIGKILL` does.
    pub fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.kill();
        }
    }

    /// Asks the daemon to stop, and gives what it said.
    ///
    /// # Panics
    ///
    /// When it does not run, or goes on running.
    #[track_caller]
    pub fn stop(&mut self) -> Finished {
        let mut running = self.running.take().expect("it runs");
        let pid = nix::unistd::Pid::from_raw(running.pid().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it runs");
        running.wait(PATIENCE).expect("a daemon stops when it is asked to")
    }

    /// What the running daemon has said.
    #[must_use]
    pub fn said(&self) -> String {
        self.running.as_ref().map(Running::stderr).unwrap_or_default()
    }

    /// `agentguard` with these arguments, for this installation.
    #[must_use]
    pub fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(program());
        command.env("AGENTGUARD_CONFIG", self.config()).args(arguments).stdin(Stdio::null());
        command
    }

    /// The same, as a user who is not root.
    #[must_use]
    pub fn command_of_user<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args([&format!("--reuid={USER}"), &format!("--regid={USER}")])
            .args(["--clear-groups", "--"])
            .arg(program())
            .args(arguments)
            .env("AGENTGUARD_CONFIG", self.config())
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// Runs `agentguard` with these arguments to its end.
    #[track_caller]
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        run(&mut self.command(arguments), PATIENCE)
    }

    /// The same, as a user who is not root.
    #[track_caller]
    pub fn run_as_user<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        run(&mut self.command_of_user(arguments), PATIENCE)
    }

    /// The answer of a command that answers in JSON.
    ///
    /// # Panics
    ///
    /// When it fails.
    #[track_caller]
    #[must_use]
    pub fn json<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Value {
        let mut command = self.command(arguments);
        command.args(["--output", "json"]);
        let finished = run(&mut command, PATIENCE).expect_success("agentguard");
        serde_json::from_str(&finished.stdout)
            .unwrap_or_else(|error| panic!("{error}: {finished:?}"))
    }

    /// What `agentguard status` says, if the daemon answers.
    #[must_use]
    pub fn status(&self) -> Option<Value> {
        let finished = self.run(["status", "--output", "json"]);
        finished.status.success().then(|| serde_json::from_str(&finished.stdout).ok()).flatten()
    }

    /// The workloads there are, by name.
    #[track_caller]
    #[must_use]
    pub fn workloads(&self) -> Vec<String> {
        let list = self.json(["workloads"]);
        let names = list.as_array().into_iter().flatten();
        names.filter_map(|workload| Some(workload["name"].as_str()?.to_owned())).collect()
    }

    /// Writes a manifest in one step.
    ///
    /// # Panics
    ///
    /// When it can not be written.
    pub fn write(&self, name: &str, documents: &[Value]) {
        let text: Vec<String> = documents.iter().map(|value| format!("{value:#}")).collect();
        self.write_text(name, &text.join("\n---\n"));
    }

    /// Writes anything in place of a manifest, in one step.
    ///
    /// # Panics
    ///
    /// When it can not be written.
    pub fn write_text(&self, name: &str, text: &str) {
        let half = self.path(&format!("{name}.half"));
        fs::write(&half, text).expect("a file can be written");
        fs::rename(half, self.manifest(name)).expect("a file can be moved");
    }

    /// Takes a manifest away.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn remove(&self, name: &str) {
        fs::remove_file(self.manifest(name)).expect("it is there");
    }

    /// The path of a manifest.
    #[must_use]
    pub fn manifest(&self, name: &str) -> PathBuf {
        self.path("manifests").join(format!("{name}.yaml"))
    }

    /// A cgroup of the test's own; `name` tells it from others of this installation.
    #[must_use]
    pub fn cgroup(&self, name: &str) -> Cgroup {
        Cgroup::new(&self.cgroup_name(name))
    }

    /// The name of such a cgroup.
    #[must_use]
    pub fn cgroup_name(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    /// Every line of the audit log so far.
    ///
    /// # Panics
    ///
    /// When one is not JSON.
    #[track_caller]
    #[must_use]
    pub fn records(&self) -> Vec<Value> {
        let log = fs::read_to_string(self.audit_log()).unwrap_or_default();
        log.split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .map(|line| {
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
            })
            .collect()
    }

    /// What a path of the metrics address answers: status and body.
    ///
    /// # Panics
    ///
    /// When it does not answer.
    #[track_caller]
    #[must_use]
    pub fn http(&self, path: &str) -> (u16, String) {
        scrape::http(self.metrics, path)
    }

    /// The value of a metric without labels.
    #[track_caller]
    #[must_use]
    pub fn metric(&self, name: &str) -> f64 {
        self.metrics(name).into_iter().map(|(_, value)| value).sum()
    }

    /// All rows of a metric: labels and value.
    #[track_caller]
    #[must_use]
    pub fn metrics(&self, name: &str) -> Vec<(String, f64)> {
        scrape::metrics(self.metrics, name)
    }

    /// Where it tells its metrics.
    #[must_use]
    pub const fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the daemon said: {}", self.said());
        }
        self.kill();
        if self.shares {
            return;
        }
        // A workload that is still running is the test's: it ends with what started it.
        let _removed = self.command(["uninstall"]).stdout(Stdio::null()).status();
        if self.pins.exists() {
            eprintln!("{} is left behind", self.pins.display());
        }
    }
}

/// The program under test.
///
/// # Panics
///
/// When it was not built.
#[must_use]
pub fn program() -> PathBuf {
    binary("agentguard", "AGENTGUARD_BIN")
}

/// The daemon of the next version of the ABI (`cargo build --features next-abi`).
///
/// # Panics
///
/// When it was not built.
#[must_use]
pub fn next_program() -> PathBuf {
    binary("../next-abi/agentguard", "AGENTGUARD_NEXT_BIN")
}

/// A server on loopback that accepts and closes.
#[derive(Debug)]
pub struct Reachable(SocketAddr);

impl Reachable {
    /// # Panics
    ///
    /// When loopback is down.
    #[must_use]
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is up");
        let address = listener.local_addr().expect("it is bound");
        thread::spawn(move || {
            for stream in listener.incoming() {
                drop(stream);
            }
        });
        Self(address)
    }

    #[must_use]
    pub const fn port(&self) -> u16 {
        self.0.port()
    }
}

/// A process that says what it can reach, for as long as it lives.
#[derive(Debug)]
pub struct Prober {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Prober {
    /// A shell that connects to each port of loopback that it is told.
    const SCRIPT: &str = "echo ready; while read -r port; do \
        if (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null; then echo yes; else echo no; fi; done";

    /// One that runs in a cgroup from now on.
    ///
    /// # Panics
    ///
    /// When it can not be started or moved.
    #[track_caller]
    #[must_use]
    pub fn in_cgroup(cgroup: &Path) -> Self {
        let mut command = Command::new("bash");
        command.args(["--norc", "-c", Self::SCRIPT]);
        let prober = Self::start(command);
        fs::write(cgroup.join("cgroup.procs"), prober.child.id().to_string())
            .expect("it can be moved");
        prober
    }

    /// One that is started by `command`, whose last words it is.
    ///
    /// # Panics
    ///
    /// When it can not be started.
    #[track_caller]
    #[must_use]
    pub fn start_by(mut command: Command) -> Self {
        command.args(["--", "bash", "--norc", "-c", Self::SCRIPT]);
        Self::start(command)
    }

    #[track_caller]
    fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        let ask = child.stdin.take().expect("it was piped");
        let answers = BufReader::new(child.stdout.take().expect("it was piped"));
        let mut prober = Self { child, ask, answers };
        assert_eq!(prober.answer(), "ready", "{command:?}");
        prober
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("it answers");
        line.trim().to_owned()
    }

    /// Whether it reaches a port of loopback.
    ///
    /// # Panics
    ///
    /// When it does not say.
    #[track_caller]
    pub fn reaches(&mut self, port: u16) -> bool {
        writeln!(self.ask, "{port}").expect("it listens");
        match self.answer().as_str() {
            "yes" => true,
            "no" => false,
            other => panic!("a prober said {other:?}"),
        }
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

/// A `Scope` that permits a port of loopback.
#[must_use]
pub fn scope(name: &str, port: u16) -> Value {
    scope_of(
        name,
        json!({"egress": [{
            "to": [{"ipBlock": {"cidr": "127.0.0.1/32"}}],
            "ports": [{"protocol": "TCP", "port": port}],
        }]}),
    )
}

/// A `Scope` that permits what `spec` says.
///
/// # Panics
///
/// When `spec` is no object.
#[must_use]
pub fn scope_of(name: &str, mut spec: Value) -> Value {
    spec["scope"] = json!(name);
    spec["description"] = json!("a test");
    json!({
        "apiVersion": "agentguard.dev/v1alpha1",
        "kind": "Scope",
        "metadata": {"name": name.replace(':', "-")},
        "spec": spec,
    })
}

/// A standing `Grant`.
#[must_use]
pub fn grant(name: &str, identity: &str, scope: &str) -> Value {
    json!({
        "apiVersion": "agentguard.dev/v1alpha1",
        "kind": "Grant",
        "metadata": {"name": name},
        "spec": {
            "subject": {"spiffeId": identity},
            "scopes": [scope],
            "expiresAt": "never",
            "grantedBy": "the tests",
            "reason": "a test",
        },
    })
}

/// A `Workload` that selects cgroups by a pattern.
#[must_use]
pub fn workload(name: &str, pattern: &str, identity: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "agentguard.dev/v1alpha1",
        "kind": "Workload",
        "metadata": {"name": name},
        "spec": {"select": {"cgroup": pattern}, "spiffeId": identity, "mode": mode},
    })
}

/// An identity of the tests' trust domain.
#[must_use]
pub fn identity(path: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/{path}")
}
