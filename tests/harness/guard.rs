//! A daemon of one's own, with its own directories and cgroups, so that tests run side by side.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    World, capabilities, cgroup,
    process::{Finished, Running, binary, run},
    server::Protocol,
    world::{PINS, address},
};

/// How long the daemon may take for a step that it is asked for.
const PATIENCE: Duration = Duration::from_secs(120);
/// The scope that every guard knows: the API, and the attack program.
pub const BASE_SCOPE: &str = "test:base";

/// What happens to a denied request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Audit,
    Enforce,
}

impl Mode {
    /// The word in records.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "audit",
            Self::Enforce => "enforce",
        }
    }
}

/// A running daemon; dropped, it stops and takes its protection away.
#[derive(Debug)]
pub struct Guard {
    program: PathBuf,
    directory: PathBuf,
    daemon: Running,
    /// Where its kernel half is pinned.
    pins: PathBuf,
    /// Whether its kernel half is left to the next guard.
    shares: bool,
}

impl Guard {
    /// Starts a daemon that knows one scope, `test:base`: the API, with `programs` to be run, and waits until it is
    /// ready.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    #[track_caller]
    #[must_use]
    pub fn start(world: &World, programs: &[PathBuf]) -> Self {
        Self::start_with(world, programs, &json!({}))
    }

    /// [`Self::start`], knowing more scopes, each with what it permits.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    #[track_caller]
    #[must_use]
    pub fn start_knowing(
        world: &World,
        programs: &[PathBuf],
        scopes: &[(&'static str, Value)],
    ) -> Self {
        Self::start_as(world, programs, &json!({}), scopes)
    }

    /// [`Self::start_with`], and nobody has counted in its tables before, nor will: not even where other
    /// guards share theirs.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    #[track_caller]
    #[must_use]
    pub fn start_alone(world: &World, programs: &[PathBuf], more: &Value) -> Self {
        Self::start_in(world, programs, more, &[], None)
    }

    /// [`Self::start`] with more keys in the configuration.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    #[track_caller]
    #[must_use]
    pub fn start_with(world: &World, programs: &[PathBuf], more: &Value) -> Self {
        Self::start_as(world, programs, more, &[])
    }

    #[track_caller]
    pub(crate) fn start_as(
        world: &World,
        programs: &[PathBuf],
        more: &Value,
        scopes: &[(&'static str, Value)],
    ) -> Self {
        Self::start_in(world, programs, more, scopes, shared_pins())
    }

    /// Pinned at `shared`, or at a place of its own.
    #[track_caller]
    fn start_in(
        world: &World,
        programs: &[PathBuf],
        more: &Value,
        scopes: &[(&'static str, Value)],
        shared: Option<PathBuf>,
    ) -> Self {
        let program = binary("agentguard", "AGENTGUARD_BIN");
        let directory = world.directory().join("guard");
        for name in ["", "manifests", "state", "run"] {
            fs::create_dir(directory.join(name)).expect("a directory can be made");
        }
        let shares = shared.is_some();
        let pins = shared.unwrap_or_else(|| Path::new(PINS).join(world.name()));
        write_config(&directory, world.name(), &pins, more);
        write_manifest(&directory, "base", &base_scope(programs));
        for (scope, permits) in scopes {
            write_scope(&directory, scope, permits);
        }
        let daemon = Self::start_daemon(&program, &directory);
        let guard = Self { program, directory, daemon, pins, shares };
        guard.wait_until_ready();
        guard
    }

    fn start_daemon(program: &Path, directory: &Path) -> Running {
        let mut command = Command::new(program);
        command.arg("run").arg("--config").arg(config_file(directory)).stdin(Stdio::null());
        capabilities::confine(&mut command, &[]);
        Running::start(&mut command)
    }

    #[track_caller]
    fn wait_until_ready(&self) {
        // A command takes as long as half a start where the kernel is emulated, and keeps it from its work.
        let socket = socket(&self.directory);
        wait_until("the daemon listens", || UnixStream::connect(&socket).is_ok());
        wait_until("the daemon is ready", || {
            let mut status = self.command(&["status", "--output", "json"]);
            run(&mut status, PATIENCE).status.success()
        });
    }

    /// The command line that launches a workload; the workload's own comes after it.
    #[must_use]
    pub fn exec_line(&self, identity: &str, scopes: &[&str], mode: Mode) -> Vec<OsString> {
        let mut line: Vec<OsString> = vec![self.program.clone().into(), "exec".into()];
        line.extend(["--config".into(), config_file(&self.directory).into()]);
        line.extend(["--identity".into(), identity.into()]);
        for scope in scopes {
            line.extend(["--scope".into(), scope.into()]);
        }
        match mode {
            Mode::Audit => line.push("--audit".into()),
            Mode::Enforce => {}
        }
        line.push("--".into());
        line
    }

    /// Runs a command as a workload on the client side of `world`.
    #[track_caller]
    pub fn exec(
        &self,
        world: &World,
        identity: &str,
        scopes: &[&str],
        mode: Mode,
        command: &[OsString],
    ) -> Finished {
        let mut enter = world.enter();
        enter.arg("--").args(self.exec_line(identity, scopes, mode)).args(command);
        run(&mut enter, PATIENCE)
    }

    /// Knows one more scope: a destination.
    pub fn define_scope(&self, scope: &str, protocol: Protocol, to: std::net::SocketAddr) {
        let length = if to.is_ipv4() { 32 } else { 128 };
        self.define(
            scope,
            &json!({"egress": [{
                "to": [{"ipBlock": {"cidr": format!("{}/{length}", to.ip())}}],
                "ports": [{"protocol": protocol.as_str().to_uppercase(), "port": to.port()}],
            }]}),
        );
    }

    /// Puts a manifest of any text into the watched directory, in one step.
    pub fn write_manifest_text(&self, name: &str, text: &[u8]) {
        write_text(&self.directory, name, text);
    }

    /// Knows one more scope: any `spec` but for its name.
    pub fn define(&self, scope: &str, spec: &Value) {
        write_scope(&self.directory, scope, spec);
    }

    /// Grants `scope` to `identity` for so long, by a manifest, and waits until it holds.
    ///
    /// # Panics
    ///
    /// When it does not in time.
    #[track_caller]
    pub fn grant(&self, name: &str, identity: &str, scope: &str, lasts: Duration) {
        let lasts = SignedDuration::try_from(lasts).expect("a test does not last that long");
        let document = json!({
            "apiVersion": "agentguard.dev/v1alpha1",
            "kind": "Grant",
            "metadata": {"name": name},
            "spec": {
                "subject": {"spiffeId": identity},
                "scopes": [scope],
                "expiresAt": (Timestamp::now() + lasts).to_string(),
                "grantedBy": "the tests",
                "reason": "a test",
            },
        });
        write_manifest(&self.directory, &format!("grant-{name}"), &document);
        wait_until("the grant holds", || {
            let grants = self.json(&["grants"]);
            let grants = grants.as_array().into_iter().flatten();
            grants.into_iter().any(|grant| grant["id"] == name && grant["state"] == "active")
        });
    }

    /// Takes a grant back, by removing its manifest.
    pub fn revoke(&self, name: &str) {
        fs::remove_file(manifest(&self.directory, &format!("grant-{name}")))
            .expect("a grant that was granted can be revoked");
    }

    /// Where the kernel half is pinned.
    #[must_use]
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// Ends the daemon as `SIGKILL` does.
    pub fn kill(&mut self) {
        self.daemon.kill();
    }

    /// Stops the daemon where it is, until [`Self::resume`].
    ///
    /// # Panics
    ///
    /// When it has ended.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it run on.
    ///
    /// # Panics
    ///
    /// When it has ended.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.daemon.pid().cast_signed());
        kill(pid, signal).expect("the daemon is there");
    }

    /// Starts the daemon again after [`Self::kill`].
    #[track_caller]
    pub fn restart(&mut self) {
        self.daemon = Self::start_daemon(&self.program, &self.directory);
        self.wait_until_ready();
    }

    /// What `agentguard status` says.
    #[track_caller]
    #[must_use]
    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// What one of agentguard's commands says to programs.
    ///
    /// # Panics
    ///
    /// When it fails.
    #[track_caller]
    #[must_use]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut command = self.command(arguments);
        let finished = run(command.args(["--output", "json"]), PATIENCE)
            .expect_success(&format!("agentguard {arguments:?}"));
        serde_json::from_str(&finished.stdout)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {}", finished.stdout))
    }

    /// The records in the audit log so far, verdicts and others.
    ///
    /// # Panics
    ///
    /// When a line is not one JSON object, or holds a control character.
    #[track_caller]
    #[must_use]
    pub fn audit_records(&self) -> Vec<Value> {
        let log = fs::read(self.audit_log()).unwrap_or_default();
        log.split_inclusive(|byte| *byte == b'\n')
            // The last line may be half written.
            .filter_map(|line| line.strip_suffix(b"\n"))
            .map(|line| {
                let text = std::str::from_utf8(line).expect("the audit log is UTF-8");
                assert!(!text.contains(char::is_control), "a control character in {text:?}");
                serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
            })
            .collect()
    }

    /// Waits until a record is there that `is_it` recognises.
    ///
    /// # Panics
    ///
    /// When there is none in time.
    #[track_caller]
    pub fn recorded(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        let in_time = eventually(|| {
            found = self.audit_records().into_iter().find(&is_it);
            found.is_some()
        });
        assert!(in_time, "no record of {what} among {:#?}", self.audit_records());
        found.expect("it was found in time")
    }

    /// Checks the hash chain of the audit log. The daemon may be writing at this moment.
    ///
    /// # Panics
    ///
    /// When the chain does not become whole.
    #[track_caller]
    pub fn assert_chain_is_whole(&self) {
        wait_until("the audit log's chain is whole", || {
            let mut command = self.command(&["audit", "verify"]);
            run(command.arg(self.audit_log()), PATIENCE).status.success()
        });
    }

    /// The audit log.
    #[must_use]
    pub fn audit_log(&self) -> PathBuf {
        self.directory.join("audit.jsonl")
    }

    /// Another of agentguard's commands, for this daemon.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(config_file(&self.directory)).args(arguments);
        command.stdin(Stdio::null());
        command
    }
}

/// Where guards are pinned that leave their kernel half to the next one: a machine that only runs tests
/// says so, where verifying every program anew for each test takes most of the time.
const SHARED_PINS: &str = "AGENTGUARD_TEST_PINS";

/// That place, where there is one.
pub(crate) fn shared_pins() -> Option<PathBuf> {
    env::var_os(SHARED_PINS).map(PathBuf::from)
}

impl Drop for Guard {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the daemon said: {}", self.daemon.stderr());
            let log = fs::read_to_string(self.audit_log()).unwrap_or_default();
            let denied: Vec<&str> = log.lines().filter(|line| line.contains("\"deny\"")).collect();
            eprintln!("of {} denials the last are:", denied.len());
            denied.iter().rev().take(5).for_each(|line| eprintln!("  {line}"));
        }
        self.daemon.kill();
        if self.shares {
            return;
        }
        let finished = self.command(&["uninstall"]).status();
        if !finished.is_ok_and(|status| status.success()) {
            eprintln!("agentguard uninstall failed; its pins may be left behind");
        }
    }
}

/// Waits until `condition` holds.
///
/// # Panics
///
/// When it does not in time.
#[track_caller]
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    assert!(eventually(condition), "in vain: {what}");
}

pub(crate) fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}

fn socket(directory: &Path) -> PathBuf {
    directory.join("run/api.sock")
}

fn config_file(directory: &Path) -> PathBuf {
    directory.join("config.yaml")
}

/// JSON is YAML too.
fn write_config(directory: &Path, name: &str, pins: &Path, more: &Value) {
    let mut config = json!({
        "node": name,
        "trust_domain": "agentguard.test",
        "manifests_directory": directory.join("manifests"),
        "state_directory": directory.join("state"),
        "runtime_directory": directory.join("run"),
        "pin_directory": pins,
        "cgroup_root": cgroup::root(),
        "cgroup_parent": format!("{name}-guard"),
        "api": {"socket": socket(directory)},
        "metrics": {"listen": "off"},
        "audit": {"output": directory.join("audit.jsonl")},
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    fs::write(config_file(directory), format!("{config:#}\n")).expect("a file can be written");
}

fn manifest(directory: &Path, name: &str) -> PathBuf {
    directory.join("manifests").join(format!("{name}.yaml"))
}

/// In one step, so that the daemon never reads half of it.
fn write_manifest(directory: &Path, name: &str, document: &Value) {
    write_text(directory, name, format!("{document:#}\n").as_bytes());
}

fn write_text(directory: &Path, name: &str, text: &[u8]) {
    let path = manifest(directory, name);
    let half = directory.join(format!("{name}.new"));
    fs::write(&half, text).expect("a file can be written");
    fs::rename(half, path).expect("a file can be moved");
}

fn write_scope(directory: &Path, scope: &str, spec: &Value) {
    let mut document = json!({
        "apiVersion": "agentguard.dev/v1alpha1",
        "kind": "Scope",
        "metadata": {"name": scope.replace(':', "-")},
        "spec": spec,
    });
    document["spec"]["scope"] = scope.into();
    document["spec"]["description"] = "of a test".into();
    write_manifest(directory, &format!("scope-{}", scope.replace(':', "-")), &document);
}

fn base_scope(programs: &[PathBuf]) -> Value {
    let blocks: Vec<Value> = [address::API, address::API6]
        .iter()
        .map(|api| {
            let length = if api.is_ipv4() { 32 } else { 128 };
            json!({"ipBlock": {"cidr": format!("{api}/{length}")}})
        })
        .collect();
    let exec: Vec<Value> = programs.iter().map(|path| json!({"path": path})).collect();
    let mut scope = json!({
        "apiVersion": "agentguard.dev/v1alpha1",
        "kind": "Scope",
        "metadata": {"name": "base"},
        "spec": {
            "scope": BASE_SCOPE,
            "description": "what every test workload may do",
            "egress": [{
                "to": blocks,
                "ports": [
                    {"protocol": "TCP", "port": address::GRANTED_PORT},
                    {"protocol": "UDP", "port": address::GRANTED_PORT},
                    {"protocol": "ICMP"},
                ],
            }],
        },
    });
    // An empty list is refused: it could be taken for all.
    if !exec.is_empty() {
        scope["spec"]["exec"] = exec.into();
    }
    scope
}
