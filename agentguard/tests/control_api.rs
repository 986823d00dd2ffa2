//! The control API and the command line from end to end: a service in memory behind the real server
//! on a real unix socket, called by the real client, as root, as another user, as a process of a
//! workload and from another pid namespace.
//!
//! Needs root: it starts callers of other users. Children are this program again, which runs the
//! ignored tests at the end of this file.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agentguard::api::caller::{Caller, Role, Viewer};
use agentguard::api::client::{Client, ClientError};
use agentguard::api::route::Route;
use agentguard::api::server::{BindError, Limits, bind, serve_control, serve_metrics};
use agentguard::api::service::{EventFilter, Outcome, Service, ServiceError};
use agentguard::api::ttl::parse_ttl;
use agentguard::api::types::*;
use agentguard::cli;
use agentguard::cli::backend::*;
use agentguard::cli::exit::{Exit, Failure};
use agentguard::cli::output::{Colour, Console};
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

const USER: u32 = 12345;
const MINE: &str = "spiffe://example.org/user/12345/mine";
const THEIRS: &str = "spiffe://example.org/ns/agents/sa/researcher";
/// A child with this in its environment counts as a process of a workload.
const MARK: &str = "AGENTGUARD_TEST_WORKLOAD";

// ---------------------------------------------------------------------------------------------
// The service

/// A daemon in memory. Scopes: `github:read` permits 192.0.2.0/24, TCP 443.
struct Memory {
    workloads: Mutex<Vec<WorkloadView>>,
    grants: Mutex<Vec<GrantView>>,
    records: Mutex<Vec<Arc<str>>>,
    live: broadcast::Sender<Arc<str>>,
    confined: Mutex<HashSet<u32>>,
    outcomes: Mutex<Vec<Outcome>>,
    ready: Mutex<Result<(), String>>,
    /// Happens while the past is being read.
    meanwhile: Mutex<Option<Arc<str>>>,
}

fn workload(name: &str, identity: &str, owner: Option<u32>) -> WorkloadView {
    WorkloadView {
        name: name.into(),
        identity: Some(identity.into()),
        cgroup: format!("agentguard/{name}"),
        mode: Mode::Enforce,
        protection: ProtectionLevel::Partial,
        source: "exec".into(),
        processes: 2,
        generation: 7,
        created: "2026-11-22T09:00:00Z".parse().unwrap(),
        owner,
        pod: None,
        containers: Vec::new(),
        denied: 3,
    }
}

fn grant(id: &str, subject: &str, expires_at: Expiry) -> GrantView {
    GrantView {
        id: id.into(),
        subject: subject.into(),
        scopes: vec!["github:read".into()],
        not_before: None,
        expires_at,
        state: GrantState::Active,
        source: "file".into(),
        granted_by: "platform-team".into(),
        reason: "OPS-1234".into(),
    }
}

fn record(workload: &str, identity: &str, verdict: &str, number: u32) -> Arc<str> {
    json!({
        "time": "2026-11-22T09:00:00Z", "kind": "verdict", "number": number,
        "workload": {"name": workload, "identity": identity, "cgroup": format!("agentguard/{workload}")},
        "process": {"pid": 4711, "executable": "/usr/bin/curl"},
        "request": {"action": "connect", "target": {"address": "192.0.2.7", "port": 22, "protocol": "TCP"}},
        "verdict": verdict, "reason": "not_granted", "mode": "enforce", "refused": true,
        "hook": "cgroup/connect4", "layer": "portable", "generation": 7, "folded": 0,
    })
    .to_string()
    .into()
}

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            workloads: Mutex::new(vec![
                workload("mine", MINE, Some(USER)),
                workload("theirs", THEIRS, None),
            ]),
            grants: Mutex::new(vec![
                grant("g-mine", MINE, Expiry::At("2026-11-22T17:00:00Z".parse().unwrap())),
                grant("g-theirs", THEIRS, Expiry::Never),
            ]),
            records: Mutex::new(vec![
                record("mine", MINE, "deny", 1),
                record("mine", MINE, "allow", 2),
                record("theirs", THEIRS, "deny", 3),
            ]),
            live: broadcast::channel(16).0,
            confined: Mutex::default(),
            outcomes: Mutex::default(),
            ready: Mutex::new(Ok(())),
            meanwhile: Mutex::default(),
        })
    }

    fn publish(&self, line: Arc<str>) {
        self.records.lock().unwrap().push(line.clone());
        let _ = self.live.send(line);
    }

    /// How often requests ended with `status`.
    fn counted(&self, status: u16) -> usize {
        self.outcomes.lock().unwrap().iter().filter(|outcome| outcome.status == status).count()
    }

    fn decide(&self, identity: &str, target: &Target) -> (Verdict, Option<String>) {
        let covered = match target {
            Target::Connect { host, port, protocol } | Target::Send { host, port, protocol } => {
                matches!(host.parse(), Ok(IpAddr::V4(ip)) if ip.octets()[..3] == [192, 0, 2])
                    && *port == 443
                    && *protocol == Protocol::Tcp
            }
            Target::Bind { .. }
            | Target::Listen { .. }
            | Target::Unix { .. }
            | Target::Abstract { .. }
            | Target::Socket { .. }
            | Target::Exec { .. } => false,
        };
        let grants = self.grants.lock().unwrap();
        let active = |grant: &&GrantView| {
            grant.subject == identity && grant.state == GrantState::Active && covered
        };
        match grants.iter().find(active) {
            Some(grant) => (Verdict::Allow, Some(grant.id.clone())),
            None => (Verdict::Deny, None),
        }
    }

    fn explained(&self, name: &str, identity: &str, target: Target) -> Explanation {
        let (verdict, grant) = self.decide(identity, &target);
        let denied = verdict == Verdict::Deny;
        Explanation {
            workload: name.into(),
            identity: Some(identity.into()),
            verdict,
            reason: denied.then(|| "not_granted".into()),
            mode: Mode::Enforce,
            refused: denied,
            scope: grant.as_ref().map(|_| "github:read".into()),
            grant,
            expires_at: None,
            hook: Some("cgroup/connect4".into()),
            layer: Some("portable".into()),
            because: if denied { "no grant covers it" } else { "a grant covers it" }.into(),
            permitting_scopes: if denied { vec!["github:read".into()] } else { vec![] },
            remedy: vec![],
            target,
        }
    }
}

fn no_grant(id: &str) -> ServiceError {
    ServiceError::NotFound { what: "grant", name: id.into() }
}

impl Service for Memory {
    fn trust_domain(&self) -> &str {
        "example.org"
    }

    fn caller_workload(&self, pid: u32) -> Result<Option<String>, ServiceError> {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let is_marked =
            environment.split(|byte| *byte == 0).any(|v| v.starts_with(MARK.as_bytes()));
        let is_confined = self.confined.lock().unwrap().contains(&pid);
        Ok((is_marked || is_confined).then(|| "a workload".into()))
    }

    async fn status(&self) -> Result<Status, ServiceError> {
        Ok(Status {
            version: "0.1.0".into(),
            node: "node-1".into(),
            uptime_seconds: 3723,
            mode: Mode::Enforce,
            protection: protection(),
            gaps: vec!["sockets received over SCM_RIGHTS are held per packet only".into()],
            generation: 7,
            totals: Some(Totals {
                workloads: 2,
                grants: GrantCounts { active: 2, ..GrantCounts::default() },
                standing_grants: 1,
                manifests: Manifests {
                    directory: "/etc/agentguard/manifests".into(),
                    last_load: None,
                    errors: vec![ManifestErrorView {
                        file: "a.yaml".into(),
                        line: 9,
                        column: 15,
                        field: "spec.scopes".into(),
                        message: "empty list".into(),
                    }],
                    held: vec![],
                },
                events: EventCounts { decided: 9, logged: 6, aggregated: 2, lost: 1 },
                starts: Some(Starts {
                    state: StartsState::Wait,
                    runtime: Some("containerd 2.1.0".into()),
                }),
            }),
        })
    }

    async fn workloads(&self) -> Result<Vec<WorkloadView>, ServiceError> {
        Ok(self.workloads.lock().unwrap().clone())
    }

    async fn workload(&self, name: &str) -> Result<WorkloadView, ServiceError> {
        let workloads = self.workloads.lock().unwrap();
        let found = workloads.iter().find(|workload| {
            workload.name == name
                || workload.identity.as_deref() == Some(name)
                || workload.cgroup == name
        });
        found.cloned().ok_or(ServiceError::NotFound { what: "workload", name: name.into() })
    }

    async fn grants(&self) -> Result<Vec<GrantView>, ServiceError> {
        Ok(self.grants.lock().unwrap().clone())
    }

    async fn grant(&self, id: &str) -> Result<GrantView, ServiceError> {
        let grants = self.grants.lock().unwrap();
        grants.iter().find(|grant| grant.id == id).cloned().ok_or_else(|| no_grant(id))
    }

    async fn add_grant(&self, _: &Caller, manifest: &[u8]) -> Result<GrantView, ServiceError> {
        let invalid = |line: &str| ServiceError::Invalid(vec![line.into()]);
        let manifest: Value =
            serde_json::from_slice(manifest).map_err(|error| invalid(&error.to_string()))?;
        let (spec, id) = (&manifest["spec"], &manifest["metadata"]["name"]);
        let scopes: Vec<String> =
            serde_json::from_value(spec["scopes"].clone()).map_err(|_| invalid("spec.scopes"))?;
        if let Some(unknown) = scopes.iter().find(|scope| *scope != "github:read") {
            return Err(ServiceError::Invalid(vec![
                format!("spec.scopes[0]: {unknown:?} is no scope"),
                "spec: one more".into(),
            ]));
        }
        let subject =
            spec["subject"]["spiffeId"].as_str().or(spec["subject"]["spiffeIdPrefix"].as_str());
        let expires_at = match (spec["ttl"].as_str(), spec["expiresAt"].as_str()) {
            (Some(ttl), None) => Expiry::At(jiff::Timestamp::now() + parse_ttl(ttl).unwrap()),
            (None, Some("never")) => Expiry::Never,
            (None, Some(time)) => Expiry::At(time.parse().unwrap()),
            (_, _) => return Err(invalid("spec: exactly one of expiresAt and ttl")),
        };
        let mut grants = self.grants.lock().unwrap();
        let id = id.as_str().ok_or_else(|| invalid("metadata.name"))?;
        if grants.iter().any(|grant| grant.id == id) {
            return Err(ServiceError::Conflict {
                error: format!("there is a grant {id:?} already"),
                remedy: "choose another --name".into(),
            });
        }
        let mut added = grant(id, subject.ok_or_else(|| invalid("spec.subject"))?, expires_at);
        added.source = "api".into();
        added.granted_by = spec["grantedBy"].as_str().unwrap_or_default().into();
        added.reason = spec["reason"].as_str().unwrap_or_default().into();
        grants.push(added.clone());
        Ok(added)
    }

    async fn revoke_grant(&self, _: &Caller, id: &str, _: &str) -> Result<GrantView, ServiceError> {
        let mut grants = self.grants.lock().unwrap();
        let found = grants.iter_mut().find(|grant| grant.id == id);
        let grant = found.ok_or_else(|| no_grant(id))?;
        grant.state = GrantState::Revoked;
        Ok(grant.clone())
    }

    async fn explain(&self, request: &ExplainRequest) -> Result<Explanation, ServiceError> {
        let workload = self.workload(&request.workload).await?;
        let identity = workload.identity.unwrap();
        Ok(self.explained(&workload.name, &identity, request.target.clone()))
    }

    async fn last_denial(
        &self,
        viewer: &Viewer,
        workload: Option<&str>,
    ) -> Result<Option<LastDenial>, ServiceError> {
        let records = self.records.lock().unwrap();
        let last = records.iter().rev().find_map(|line| {
            let record: Value = serde_json::from_str(line).unwrap();
            let (name, identity) = (&record["workload"]["name"], &record["workload"]["identity"]);
            (record["verdict"] == "deny"
                && viewer.sees(identity.as_str())
                && workload.is_none_or(|wanted| name == wanted))
            .then_some(record)
        });
        let Some(record) = last else { return Ok(None) };
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let target = &record["request"]["target"];
        let target =
            Target::Connect { host: text(&target["address"]), port: 22, protocol: Protocol::Tcp };
        let workload = &record["workload"];
        Ok(Some(LastDenial {
            time: text(&record["time"]).parse().unwrap(),
            pid: 4711,
            executable: Some("/usr/bin/curl".into()),
            explanation: self.explained(
                &text(&workload["name"]),
                &text(&workload["identity"]),
                target,
            ),
        }))
    }

    async fn confine(
        &self,
        caller: &Caller,
        identity: &str,
        request: &Confine,
    ) -> Result<Confined, ServiceError> {
        assert!(caller.is_alive());
        if request.scopes.iter().any(|scope| scope != "github:read") {
            return Err(ServiceError::Invalid(vec!["scopes[0]: is no scope".into()]));
        }
        self.confined.lock().unwrap().insert(caller.pid);
        let name = identity.rsplit('/').next().unwrap_or_default();
        let name = format!("{name}-{}", caller.pid);
        let view = workload(&name, identity, Some(caller.uid));
        self.workloads.lock().unwrap().push(view.clone());
        Ok(Confined {
            workload: name,
            identity: identity.into(),
            grant: None,
            cgroup: view.cgroup,
            expires_at: None,
            warnings: vec![],
        })
    }

    async fn announce(&self, announcement: &Announcement) -> Result<Announced, ServiceError> {
        Ok(Announced { workload: Some(announcement.id.clone()), identity: None })
    }

    async fn set_diagnostics(&self, _: bool) -> Result<(), ServiceError> {
        Ok(())
    }

    async fn refresh_executables(&self) -> Result<Refreshed, ServiceError> {
        Ok(Refreshed { generation: 8, executables: 3 })
    }

    /// Gives what the viewer may not see, too: the server must not rely on it.
    async fn recent_events(
        &self,
        _: &Viewer,
        filter: &EventFilter,
    ) -> Result<Vec<Arc<str>>, ServiceError> {
        if let Some(line) = self.meanwhile.lock().unwrap().take() {
            self.publish(line);
        }
        let records = self.records.lock().unwrap();
        Ok(records[records.len().saturating_sub(filter.limit)..].to_vec())
    }

    fn subscribe(&self) -> broadcast::Receiver<Arc<str>> {
        self.live.subscribe()
    }

    fn render_metrics(&self) -> String {
        "agentguard_up 1\n".into()
    }

    fn ready(&self) -> Result<(), String> {
        self.ready.lock().unwrap().clone()
    }

    fn record_request(&self, outcome: Outcome) {
        self.outcomes.lock().unwrap().push(outcome);
    }
}

fn protection() -> Protection {
    Protection {
        level: ProtectionLevel::Partial,
        layers: vec![
            Layer {
                layer: "portable".into(),
                hook: "cgroup/connect4".into(),
                state: LayerState::Active,
                reason: None,
                remedy: None,
            },
            Layer {
                layer: "lsm".into(),
                hook: "lsm/socket_connect".into(),
                state: LayerState::Unavailable,
                reason: Some("the kernel refuses trampolines".into()),
                remedy: Some("boot with lsm=…,bpf".into()),
            },
        ],
    }
}

/// What `main.rs` would plug in.
struct Plugged;

impl Backend for Plugged {
    fn socket(&self, _: Option<&Path>) -> Result<PathBuf, Failure> {
        Ok(agentguard::api::client::DEFAULT_SOCKET.into())
    }

    fn run(&self, options: &RunOptions) -> Result<(), Failure> {
        match &options.config {
            Some(path) => Err(Failure::new(
                Exit::InvalidConfiguration,
                format!("{}: unknown field", path.display()),
            )),
            None => Ok(()),
        }
    }

    fn exec_standalone(&self, _: Option<&Path>, request: &Confine) -> Result<Exit, Failure> {
        assert_eq!(request.executable, Path::new("/bin/true"));
        Ok(Exit::Command(42))
    }

    fn doctor(&self, _: Option<&Path>) -> Result<DoctorReport, Failure> {
        Ok(DoctorReport {
            kernel: "6.18.0".into(),
            architecture: "x86_64".into(),
            protection: protection(),
            checks: vec![Check {
                name: "cgroup v2".into(),
                state: CheckState::Ok,
                found: "/sys/fs/cgroup".into(),
                remedy: None,
            }],
            gaps: vec![],
        })
    }

    fn uninstall(&self, _: Option<&Path>) -> Result<UninstallReport, Failure> {
        Ok(UninstallReport { removed: vec!["/sys/fs/bpf/agentguard".into()], left: vec![] })
    }

    fn check(&self, paths: &[PathBuf]) -> Result<CheckReport, Failure> {
        let error = ManifestErrorView {
            file: paths[0].clone(),
            line: 9,
            column: 15,
            field: "spec.egress".into(),
            message: "bad \x1b[31m".into(),
        };
        let errors = if paths[0].ends_with("bad.yaml") { vec![error] } else { vec![] };
        Ok(CheckReport { documents: 1, errors, warnings: vec![] })
    }

    fn audit_verify(&self, files: &[PathBuf]) -> Result<Vec<VerifiedLog>, Failure> {
        let broken = BrokenChain { line: 3, reason: "a line is missing before it".into() };
        Ok(vec![VerifiedLog {
            file: files[0].clone(),
            records: 5,
            broken: files[0].ends_with("broken").then_some(broken),
            last_hash: Some("ab12".into()),
        }])
    }
}

// ---------------------------------------------------------------------------------------------
// The daemon around it, and its callers

struct Daemon {
    service: Arc<Memory>,
    socket: PathBuf,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        Self::with(Limits::default())
    }

    fn with(limits: Limits) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests start callers of other users: run as root"
        );
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let socket = directory.path().join("agentguard.sock");
        let (service, stop) = (Memory::new(), CancellationToken::new());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let entered = runtime.enter();
        let listener = bind(&socket).unwrap();
        drop(entered);
        let serving = serve_control(listener, service.clone(), limits, stop.clone());
        let thread = Some(std::thread::spawn(move || runtime.block_on(serving)));
        Self { service, socket, stop, thread, _directory: directory }
    }

    fn client(&self) -> Client {
        Client::new(&self.socket)
    }

    /// Sends `bytes` as they are and reads what comes, as this process.
    fn raw(&self, bytes: &[u8]) -> String {
        raw(&self.socket, bytes)
    }

    /// The status of each request, and its body, as a child of `role` gets them.
    fn ask_as(&self, role: Role, requests: &[Ask]) -> Vec<(u16, String)> {
        let requests: Vec<Value> =
            requests.iter().map(|(method, path, body)| json!([method, path, body])).collect();
        let output = child(role, "a_caller", |command| {
            command.env("SOCKET", &self.socket).env("REQUESTS", Value::from(requests).to_string());
        });
        let text = String::from_utf8(output.stdout).unwrap();
        let answers = text.lines().filter_map(|line| line.strip_prefix("ANSWER "));
        answers.map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Runs a command line as a child of `role`.
    fn cli_as(&self, role: Role, words: &[&str]) -> Output {
        child(role, "a_command_line", |command| {
            command.env("AGENTGUARD_SOCKET", &self.socket).env("WORDS", json!(words).to_string());
        })
    }

    /// Runs a command line in this process.
    fn cli(&self, words: &[&str]) -> (Exit, String, String) {
        let socket = self.socket.to_str().unwrap();
        command_line(&[&["--socket", socket], words].concat())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

type Ask = (&'static str, &'static str, Option<Value>);

fn command_line(words: &[&str]) -> (Exit, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut console = Console {
        out: &mut out,
        err: &mut err,
        colour: Colour::Plain,
        err_colour: Colour::Plain,
        width: None,
    };
    let words = ["agentguard"].iter().chain(words).map(OsString::from);
    let exit = cli::run(words, &Plugged, &mut console);
    (exit, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

fn raw(socket: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The server may answer, and hang up, before all is written.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn status_of(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
}

fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: agentguard\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Runs the ignored test `entry` of this program as `role`.
fn child(role: Role, entry: &str, prepare: impl FnOnce(&mut Command)) -> Output {
    spawn(role, entry, prepare).wait_with_output().unwrap()
}

fn spawn(role: Role, entry: &str, prepare: impl FnOnce(&mut Command)) -> std::process::Child {
    let mut command = match role {
        Role::Foreign => {
            let mut command = Command::new("unshare");
            command.args(["--pid", "--fork"]).arg(std::env::current_exe().unwrap());
            command
        }
        // Not by its path, which another user may not be allowed to walk.
        Role::Root | Role::User | Role::Workload => Command::new("/proc/self/exe"),
    };
    match role {
        Role::User => {
            command.uid(USER).gid(USER);
        }
        Role::Workload => {
            command.env(MARK, "1");
        }
        Role::Root | Role::Foreign => {}
    }
    command.args(["--exact", entry, "--ignored", "--nocapture"]);
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    prepare(&mut command);
    command.spawn().unwrap()
}

#[test]
#[ignore = "started by other tests as a child process"]
fn a_caller() {
    let socket = PathBuf::from(std::env::var_os("SOCKET").unwrap());
    let requests: Vec<(String, String, Option<Value>)> =
        serde_json::from_str(&std::env::var("REQUESTS").unwrap()).unwrap();
    println!();
    for (method, path, body) in requests {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let answer = raw(&socket, &request(&method, &path, &body));
        let text = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        println!("ANSWER {}", json!([status_of(&answer), text]));
    }
}

#[test]
#[ignore = "started by other tests as a child process"]
fn a_command_line() {
    let words: Vec<String> = serde_json::from_str(&std::env::var("WORDS").unwrap()).unwrap();
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    let mut console = Console {
        out: &mut out,
        err: &mut err,
        colour: Colour::Plain,
        err_colour: Colour::Plain,
        width: None,
    };
    let words = ["agentguard".to_owned()].into_iter().chain(words).map(OsString::from);
    std::process::exit(cli::run(words, &Plugged, &mut console).code().into());
}

fn confine_body(identity: Option<&str>) -> Value {
    json!({
        "identity": identity, "scopes": ["github:read"], "ttl": "1h", "mode": "enforce",
        "command": ["true"], "executable": "/bin/true",
    })
}

fn explain_body(workload: &str) -> Value {
    json!({
        "workload": workload,
        "target": {"action": "connect", "host": "192.0.2.7", "port": 22, "protocol": "TCP"},
    })
}

fn grant_body() -> Value {
    json!({
        "apiVersion": "agentguard.dev/v1alpha1", "kind": "Grant", "metadata": {"name": "new"},
        "spec": {
            "subject": {"spiffeId": MINE}, "scopes": ["github:read"], "ttl": "1h",
            "grantedBy": "me", "reason": "test",
        },
    })
}

// ---------------------------------------------------------------------------------------------
// Who may do what

#[test]
fn each_role_may_do_what_the_table_says_and_no_more() {
    let theirs = "spiffe://example.org/user/1/x";
    let escaping = "spiffe://example.org/user/12345/../1/x";
    // Each with the status for root and for another user; a process of a workload and one of
    // another pid namespace are refused all of it.
    let table: Vec<(Option<Route>, Ask, u16, u16)> = vec![
        (Some(Route::Status), ("GET", "/v1/status", None), 200, 200),
        (Some(Route::Workloads), ("GET", "/v1/workloads", None), 200, 200),
        (Some(Route::Workload), ("GET", "/v1/workloads/mine", None), 200, 200),
        (Some(Route::Workload), ("GET", "/v1/workloads/theirs", None), 200, 404),
        (Some(Route::Workload), ("GET", "/v1/workloads/nobody", None), 404, 404),
        (Some(Route::Grants), ("GET", "/v1/grants", None), 200, 200),
        (Some(Route::Grant), ("GET", "/v1/grants/g-mine", None), 200, 200),
        (Some(Route::Grant), ("GET", "/v1/grants/g-theirs", None), 200, 404),
        (Some(Route::AddGrant), ("POST", "/v1/grants", Some(grant_body())), 201, 403),
        (
            Some(Route::RevokeGrant),
            ("POST", "/v1/grants/g-mine/revoke", Some(json!({"reason": "over"}))),
            200,
            403,
        ),
        (Some(Route::Explain), ("POST", "/v1/explain", Some(explain_body("mine"))), 200, 200),
        (Some(Route::Explain), ("POST", "/v1/explain", Some(explain_body("theirs"))), 200, 404),
        (Some(Route::ExplainLast), ("GET", "/v1/explain/last", None), 200, 200),
        (Some(Route::Events), ("GET", "/v1/events", None), 200, 200),
        (
            Some(Route::Diagnostics),
            ("PUT", "/v1/diagnostics", Some(json!({"enabled": true}))),
            204,
            403,
        ),
        (
            Some(Route::Announce),
            ("POST", "/v1/containers", Some(json!({"id": "c", "pid": 1, "root": "/"}))),
            200,
            403,
        ),
        (Some(Route::RefreshExecutables), ("POST", "/v1/executables/refresh", None), 200, 403),
        (Some(Route::OpenApi), ("GET", "/v1/openapi.json", None), 200, 200),
        (None, ("GET", "/v1/nothing", None), 404, 404),
        (None, ("DELETE", "/v1/status", None), 405, 405),
        (
            Some(Route::Confine),
            ("POST", "/v1/confine", Some(confine_body(Some(escaping)))),
            200,
            403,
        ),
        // Root's process is a workload from here on.
        (Some(Route::Confine), ("POST", "/v1/confine", Some(confine_body(Some(theirs)))), 403, 403),
        (Some(Route::Confine), ("POST", "/v1/confine", Some(confine_body(None))), 403, 200),
        // And so is the user's.
        (Some(Route::Confine), ("POST", "/v1/confine", Some(confine_body(None))), 403, 403),
        (Some(Route::Status), ("GET", "/v1/status", None), 403, 403),
        (Some(Route::AddGrant), ("POST", "/v1/grants", Some(grant_body())), 403, 403),
    ];
    for route in Route::ALL {
        assert!(table.iter().any(|(tried, ..)| *tried == Some(route)), "{route:?} is not tried");
    }
    let asks: Vec<Ask> = table.iter().map(|(_, ask, ..)| ask.clone()).collect();
    for role in Role::ALL {
        let daemon = Daemon::start();
        let answers = daemon.ask_as(role, &asks);
        assert_eq!(answers.len(), table.len(), "{role:?}");
        for ((_, ask, root, user), (status, body)) in table.iter().zip(answers) {
            let expected = match role {
                Role::Root => *root,
                Role::User => *user,
                Role::Workload | Role::Foreign => 403,
            };
            assert_eq!(status, expected, "{role:?} {ask:?}: {body}");
            if status >= 400 {
                let problem: Problem = serde_json::from_str(&body).unwrap();
                assert!(!problem.error.is_empty() && problem.remedy.is_some(), "{body}");
            }
        }
        let outcomes = daemon.service.outcomes.lock().unwrap();
        let counted = |outcome: &&Outcome| outcome.role == Some(role) && outcome.route.is_some();
        assert!(outcomes.iter().filter(counted).count() >= 18, "{role:?} was taken for another");
        assert!(outcomes.iter().any(|outcome| outcome.status == 403));
    }
}

#[test]
fn a_user_sees_only_what_is_its_own() {
    let daemon = Daemon::start();
    let answers = daemon.ask_as(
        Role::User,
        &[
            ("GET", "/v1/workloads", None),
            ("GET", "/v1/grants", None),
            ("GET", "/v1/events", None),
            ("GET", "/v1/explain/last", None),
            ("GET", "/v1/status", None),
            ("GET", "/v1/events?workload=theirs", None),
            ("GET", "/v1/explain/last?workload=theirs", None),
        ],
    );
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(json(&answers[0].1).as_array().unwrap().len(), 1);
    assert_eq!(json(&answers[0].1)[0]["name"], "mine");
    assert_eq!(json(&answers[1].1).as_array().unwrap().len(), 1);
    assert_eq!(json(&answers[1].1)[0]["id"], "g-mine");
    assert_eq!(answers[2].1.lines().count(), 2);
    assert_eq!(json(&answers[3].1)["explanation"]["workload"], "mine");
    assert!(json(&answers[4].1).get("totals").is_none());
    assert_eq!(answers[5].1, "");
    assert_eq!(answers[6].0, 404);
    for (_, body) in answers {
        assert!(!body.contains(THEIRS) && !body.contains("g-theirs"), "{body}");
    }
}

#[test]
fn what_is_hidden_is_answered_as_what_is_not_there() {
    let daemon = Daemon::start();
    let answers = daemon.ask_as(
        Role::User,
        &[
            ("GET", "/v1/workloads/theirs", None),
            ("GET", "/v1/workloads/nobody", None),
            ("POST", "/v1/explain", Some(explain_body("theirs"))),
            ("POST", "/v1/explain", Some(explain_body("nobody"))),
        ],
    );
    assert_eq!(answers[0].1.replace("theirs", "nobody"), answers[1].1);
    assert_eq!(answers[2].1.replace("theirs", "nobody"), answers[3].1);
}

#[test]
fn a_connection_made_before_confinement_is_a_workloads_after_it() {
    let daemon = Daemon::start();
    let mut stream = UnixStream::connect(&daemon.socket).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    daemon.service.confined.lock().unwrap().insert(std::process::id());
    stream.write_all(&request("GET", "/v1/grants", "")).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(status_of(&answer), 403, "{answer}");
}

// ---------------------------------------------------------------------------------------------
// Limits

#[test]
fn malformed_requests_are_refused_and_counted() {
    let daemon = Daemon::start();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let long = "a".repeat(20_000);
    let many = "x: y\r\n".repeat(100);
    let explain = |body: &str| request("POST", "/v1/explain", body);
    let cases: Vec<(Vec<u8>, u16)> = vec![
        (b"\x16\x03\x01 not http\r\n\r\n".to_vec(), 400),
        (b"GET / HTTP/9.9\r\n\r\n".to_vec(), 400),
        (format!("GET /v1/status HTTP/1.1\r\nx: {long}\r\n\r\n").into_bytes(), 431),
        (format!("GET /v1/status HTTP/1.1\r\n{many}\r\n").into_bytes(), 431),
        (explain("{"), 400),
        (explain("[]"), 400),
        (explain(""), 400),
        (explain(&deep), 400),
        (explain("\u{0}"), 400),
        (explain(r#"{"workload":"mine","target":{"action":"fly"}}"#), 400),
        (explain(r#"{"workload":"mine","extra":1,"target":{"action":"exec","path":"/x"}}"#), 400),
        (
            explain(
                r#"{"workload":"mine","target":{"action":"bind","port":65536,"protocol":"TCP"}}"#,
            ),
            400,
        ),
        (request("GET", "/v1/events?limit=-1", ""), 400),
        (request("GET", "/v1/events?unknown=1", ""), 400),
        (request("GET", "/v1/workloads/%ff", ""), 400),
        (request("POST", "/v1/grants/g-mine/revoke", r#"{"reason":" "}"#), 422),
        (request("POST", "/v1/grants", "not json"), 422),
        (request("POST", "/v1/grants", &"x".repeat((1 << 20) + 1)), 413),
        (
            request(
                "POST",
                "/v1/confine",
                r#"{"scopes":["github:read"],"mode":"enforce","command":["x"],"executable":"/x"}"#,
            ),
            422,
        ),
        (
            request(
                "POST",
                "/v1/confine",
                r#"{"name":"../x","scopes":[],"mode":"enforce","command":["x"],"executable":"/x"}"#,
            ),
            422,
        ),
    ];
    for (bytes, expected) in cases {
        let before = daemon.service.outcomes.lock().unwrap().len();
        let answer = daemon.raw(&bytes);
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
        assert_eq!(status_of(&answer), expected, "{start:?}: {answer}");
        wait_for(|| daemon.service.outcomes.lock().unwrap().len() > before);
    }
    assert_eq!(daemon.client().workload(MINE).unwrap().name, "mine", "it still serves");
}

fn wait_for(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(10), "it did not happen within 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_caller_who_sends_nothing_or_only_half_is_cut_off() {
    let limits = Limits {
        head_time: Duration::from_millis(200),
        request_time: Duration::from_millis(200),
        connection_time: Duration::from_secs(2),
        ..Limits::default()
    };
    let daemon = Daemon::with(limits);
    let start = Instant::now();
    daemon.raw(b"");
    daemon.raw(b"GET /v1/status HTTP/1.1\r\n");
    let answer = daemon.raw(b"POST /v1/grants HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n{");
    assert_eq!(status_of(&answer), 408, "{answer}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    wait_for(|| daemon.service.counted(408) >= 3);
}

#[test]
fn users_can_not_use_up_the_connections_of_root() {
    let limits = Limits { user_connections: 2, root_connections: 3, ..Limits::default() };
    let daemon = Daemon::with(limits);
    let held: Vec<_> = (0..3).map(|_| UnixStream::connect(&daemon.socket).unwrap()).collect();
    let answer = daemon.raw(b"");
    assert_eq!(status_of(&answer), 503, "{answer}");
    assert_eq!(daemon.ask_as(Role::User, &[("GET", "/v1/workloads", None)])[0].0, 200);
    assert_eq!(daemon.ask_as(Role::Workload, &[("GET", "/v1/workloads", None)])[0].0, 403);
    drop(held);
    wait_for(|| daemon.client().status().is_ok());
}

#[test]
fn the_socket_is_made_only_where_it_is_safe() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/agentguard.sock");
    let listener = bind(&path).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o666, 0o755));
    assert!(matches!(bind(&path), Err(BindError::InUse { .. })));
    drop(listener);
    drop(bind(&path).expect("a stale socket is replaced"));
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    assert!(matches!(bind(&path), Err(BindError::NotASocket { .. })));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(bind(&path), Err(BindError::UnsafeDirectory { .. })));
}

// ---------------------------------------------------------------------------------------------
// Events, metrics

#[test]
fn a_stream_gives_the_past_once_and_then_what_happens() {
    let daemon = Daemon::with(Limits { heartbeat: Duration::from_millis(50), ..Limits::default() });
    let client = daemon.client();
    let (service, stop) = (daemon.service.clone(), daemon.stop.clone());
    let filter = EventFilter { denied: true, workload: None, limit: 10 };
    *service.meanwhile.lock().unwrap() = Some(record_of(4, "deny"));
    let mut numbers = Vec::new();
    client
        .events(&filter, true, |line| {
            let record: Value = serde_json::from_str(line)?;
            numbers.push(record["number"].as_u64().unwrap());
            match numbers.len() {
                3 => {
                    service.publish(record_of(5, "allow"));
                    service.publish(record_of(6, "deny"));
                }
                4 => stop.cancel(),
                _ => {}
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(numbers, [1, 3, 4, 6]);
}

fn record_of(number: u32, verdict: &str) -> Arc<str> {
    record("mine", MINE, verdict, number)
}

#[test]
fn a_user_s_stream_has_only_its_own_records_and_says_what_was_missed() {
    let daemon = Daemon::start();
    let child = spawn(Role::User, "a_command_line", |command| {
        command
            .env("AGENTGUARD_SOCKET", &daemon.socket)
            .env("WORDS", json!(["events", "-f", "-n", "0", "--output", "json"]).to_string());
    });
    wait_for(|| daemon.service.live.receiver_count() == 1);
    daemon.service.publish(record("theirs", THEIRS, "deny", 10));
    daemon.service.publish(record("mine", MINE, "deny", 11));
    // Made before they are sent: the server, which reads each of them, can not keep up with so
    // many at once in a channel of 16.
    let flood: Vec<_> = (100..20_000).map(|number| record("mine", MINE, "deny", number)).collect();
    for line in flood {
        let _ = daemon.service.live.send(line);
    }
    std::thread::sleep(Duration::from_millis(500));
    daemon.stop.cancel();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(MINE) && !text.contains(THEIRS), "{text}");
    assert!(text.contains(r#""kind":"missed""#), "{text}");
}

#[test]
fn metrics_and_health_are_all_that_tcp_serves() {
    let service = Memory::new();
    let stop = CancellationToken::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(serve_metrics(listener, service.clone(), Limits::default(), stop));
    let ask = |method: &str, path: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(&request(method, path, "")).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(ask("GET", "/metrics").ends_with("agentguard_up 1\n"));
    assert_eq!(status_of(&ask("GET", "/healthz")), 200);
    assert_eq!(status_of(&ask("GET", "/readyz")), 200);
    *service.ready.lock().unwrap() = Err("no hook is attached".into());
    let answer = ask("GET", "/readyz");
    assert_eq!(status_of(&answer), 503);
    assert!(answer.contains("no hook is attached"));
    for route in Route::ALL {
        assert_eq!(status_of(&ask(route.method().as_str(), route.path())), 404);
    }
    assert_eq!(status_of(&ask("POST", "/metrics")), 405);
}

// ---------------------------------------------------------------------------------------------
// The command line

#[test]
fn exec_becomes_the_command() {
    let daemon = Daemon::start();
    for role in [Role::Root, Role::User] {
        let child = spawn(role, "a_command_line", |command| {
            let words =
                ["exec", "--scope", "github:read", "--", "sh", "-c", "echo PID $$ $0; exit 7", "x"];
            command.env("AGENTGUARD_SOCKET", &daemon.socket).env("WORDS", json!(words).to_string());
        });
        let pid = child.id();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(7), "{output:?}");
        assert!(text.contains(&format!("PID {pid} x")), "{text}");
        assert!(daemon.service.confined.lock().unwrap().contains(&pid));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    }
    let names = daemon.service.workloads.lock().unwrap();
    let last = names.last().unwrap();
    assert_eq!(last.identity.as_deref(), Some("spiffe://example.org/user/12345/sh"));
    assert_eq!(last.owner, Some(USER));
}

#[test]
fn exec_passes_on_how_the_command_ends() {
    let daemon = Daemon::start();
    let killed = daemon.cli_as(Role::User, &["exec", "--", "sh", "-c", "kill -TERM $$"]);
    assert_eq!(killed.status.signal(), Some(15));
    for (words, code) in [
        (&["exec", "--", "/bin/true"][..], 0),
        (&["exec", "--", "no-such-command"], 127),
        (&["exec", "--", "/etc/passwd"], 126),
        (&["exec", "--", "/"], 126),
        (&["exec", "--scope", "unknown", "--", "/bin/true"], 65),
        (&["exec", "--identity", THEIRS, "--", "/bin/true"], 77),
        (&["exec", "--ttl", "soon", "--", "/bin/true"], 2),
        (&["exec"], 2),
    ] {
        let output = daemon.cli_as(Role::User, words);
        assert_eq!(output.status.code(), Some(code), "{words:?} {output:?}");
    }
    let inside = daemon.cli_as(Role::Workload, &["exec", "--", "/bin/true"]);
    assert_eq!(inside.status.code(), Some(77), "a workload can not confine itself anew");
}

#[test]
fn without_a_daemon_root_runs_it_alone_and_others_are_told_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none.sock");
    let exec = |role| {
        child(role, "a_command_line", |command| {
            command
                .env("AGENTGUARD_SOCKET", &socket)
                .env("WORDS", r#"["exec", "--", "/bin/true"]"#);
        })
    };
    assert_eq!(exec(Role::Root).status.code(), Some(42));
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let other = exec(Role::User);
    assert_eq!(other.status.code(), Some(69));
    let told = String::from_utf8_lossy(&other.stderr);
    assert!(told.contains("no daemon at") && told.contains("sudo agentguard exec"), "{told}");
    let (exit, _, told) = command_line(&["--socket", socket.to_str().unwrap(), "status"]);
    assert_eq!(exit, Exit::NoDaemon);
    assert!(told.contains("start it with agentguard run"), "{told}");
}

#[test]
fn tables_are_for_people() {
    let daemon = Daemon::start();
    let (exit, out, err) = daemon.cli(&["workloads"]);
    assert_eq!((exit, err.as_str()), (Exit::Done, ""));
    assert_eq!(
        out,
        "\
NAME    IDENTITY                                      MODE     PROTECTION  SOURCE  PROCESSES  DENIED  CGROUP
mine    spiffe://example.org/user/12345/mine          enforce  partial     exec    2          3       agentguard/mine
theirs  spiffe://example.org/ns/agents/sa/researcher  enforce  partial     exec    2          3       agentguard/theirs
"
    );
    let (_, out, _) = daemon.cli(&["status"]);
    assert_eq!(
        out,
        "\
version:    0.1.0
node:       node-1
up:         1h 2m
mode:       enforce
protection: partial
generation: 7
workloads:  2
grants:     2 active (1 standing), 0 pending, 0 expired, 0 revoked
events:     9 decided = 6 logged + 2 aggregated + 1 lost
manifests:  /etc/agentguard/manifests, read never, 1 errors
starts:     wait for the daemon (NRI of containerd 2.1.0)

errors in manifests:
  a.yaml:9:15: spec.scopes: empty list

LAYER     HOOK                STATE        REASON                          REMEDY
portable  cgroup/connect4     active       -                               -
lsm       lsm/socket_connect  unavailable  the kernel refuses trampolines  boot with lsm=…,bpf

documented gaps:
  sockets received over SCM_RIGHTS are held per packet only
"
    );
    let (_, out, _) = daemon.cli(&["events", "--denied", "--workload", "mine"]);
    assert_eq!(
        out,
        "\
TIME                  WORKLOAD  ACTION   TARGET            VERDICT  REASON       SCOPE  GRANT  LAYER
2026-11-22T09:00:00Z  mine      connect  192.0.2.7:22/TCP  deny     not_granted  -      -      portable
"
    );
    let (_, out, _) = daemon.cli(&["grants", "--state", "revoked"]);
    assert_eq!(out, "no grants\n");
}

#[test]
fn a_refusal_is_explained_with_the_command_that_permits_it() {
    let daemon = Daemon::start();
    for words in [&["explain"][..], &["explain", "--last"]] {
        let (exit, out, _) = daemon.cli(words);
        assert_eq!(exit, Exit::Done);
        assert_eq!(
            out,
            "\
2026-11-22T09:00:00Z, process 4711, /usr/bin/curl
denied and refused: connect to 192.0.2.7:22/TCP by theirs
because no grant covers it

mode:     enforce
identity: spiffe://example.org/ns/agents/sa/researcher
reason:   not_granted
hook:     cgroup/connect4
layer:    portable

to permit it:
  agentguard grant --to spiffe://example.org/ns/agents/sa/researcher --scope github:read --ttl 1h --reason 'REASON'
"
        );
    }
    let target = "192.0.2.7:443/TCP";
    let (_, out, _) = daemon.cli(&["explain", "--workload", "mine", "--connect", target]);
    assert!(out.starts_with("allowed: connect to 192.0.2.7:443/TCP by mine\n"), "{out}");
    let user = daemon.cli_as(Role::User, &["explain"]);
    let out = String::from_utf8_lossy(&user.stdout);
    assert!(out.contains("agentguard exec --scope github:read --ttl 1h -- COMMAND"), "{out}");
    assert!(
        out.contains("sudo agentguard grant --to spiffe://example.org/user/12345/mine"),
        "{out}"
    );
}

#[test]
fn grants_are_made_and_taken_back() {
    let daemon = Daemon::start();
    let common =
        ["grant", "--to", MINE, "--scope", "github:read", "--reason", "OPS-1", "--by", "me"];
    let (exit, id, err) = daemon.cli(&[&common[..], &["--ttl", "1h"]].concat());
    assert_eq!((exit, err.as_str()), (Exit::Done, ""));
    let made = daemon.client().grant(id.trim()).unwrap();
    assert_eq!((made.granted_by.as_str(), made.reason.as_str()), ("me", "OPS-1"));
    assert!(matches!(made.expires_at, Expiry::At(_)));
    let (_, out, _) = daemon.cli(&["revoke", id.trim(), "--reason", "over"]);
    assert_eq!(out, format!("{} is revoked\n", id.trim()));

    let (exit, out, _) =
        daemon.cli(&[&common[..], &["--never", "--name", "standing", "--output", "json"]].concat());
    assert_eq!(exit, Exit::Done);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["expires_at"], "never");
    let again = daemon.cli(&[&common[..], &["--never", "--name", "standing"]].concat());
    assert_eq!(again.0, Exit::Failed);
    assert_eq!(
        again.2,
        "error: there is a grant \"standing\" already\nhelp: choose another --name\n"
    );
    for wrong in [&[][..], &["--ttl", "1h", "--never"], &["--until", "soon"], &["--ttl", "0s"]] {
        assert_eq!(daemon.cli(&[&common[..], wrong].concat()).0, Exit::Usage, "{wrong:?}");
    }
    let unknown = ["grant", "--to", MINE, "--scope", "x", "--reason", "r", "--ttl", "1h"];
    let (exit, _, err) = daemon.cli(&unknown);
    assert_eq!(exit, Exit::InvalidManifest);
    assert!(err.contains("  spec.scopes[0]: \"x\" is no scope\n  spec: one more\n"), "{err}");
    assert_eq!(daemon.cli_as(Role::User, &unknown).status.code(), Some(77));
    assert_eq!(daemon.cli(&["revoke", "none", "--reason", "r"]).0, Exit::Failed);
}

#[test]
fn every_command_has_json_for_programs() {
    let daemon = Daemon::start();
    for (words, pointer) in [
        (&["status"][..], "/protection/layers/1/remedy"),
        (&["workloads"], "/1/identity"),
        (&["workloads", "mine"], "/0/cgroup"),
        (&["grants"], "/0/expires_at"),
        (&["explain"], "/explanation/remedy/0"),
        (&["explain", "--workload", "mine", "--exec", "/usr/bin/git"], "/target/path"),
        (&["check", "good.yaml"], "/documents"),
        (&["doctor"], "/checks/0/state"),
        (&["audit", "verify", "log"], "/0/records"),
        (&["uninstall"], "/removed/0"),
    ] {
        let (exit, out, err) = daemon.cli(&[words, &["--output", "json"]].concat());
        assert_eq!((exit, err.as_str()), (Exit::Done, ""), "{words:?}");
        let value: Value = serde_json::from_str(&out).unwrap();
        assert!(value.pointer(pointer).is_some_and(|found| !found.is_null()), "{words:?}: {out}");
    }
    let (_, out, _) = daemon.cli(&["events", "--output", "json"]);
    assert_eq!(out.lines().count(), 3);
    assert!(out.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
    let (_, _, err) = daemon.cli(&["revoke", "none", "--reason", "r", "--output", "json"]);
    assert_eq!(serde_json::from_str::<Problem>(&err).unwrap().error, "there is no grant \"none\"");
}

#[test]
fn exit_statuses_say_what_kind_of_failure_it_was() {
    for (words, code) in [
        (&["run"][..], 0),
        (&["run", "--config", "/x"], 78),
        (&["check", "good.yaml"], 0),
        (&["check", "bad.yaml"], 65),
        (&["audit", "verify", "log"], 0),
        (&["audit", "verify", "broken"], 1),
        (&["doctor"], 0),
        (&["uninstall"], 0),
        (&["--version"], 0),
        (&["--help"], 0),
        (&["frobnicate"], 2),
        (&["explain", "--connect", "192.0.2.7:443"], 2),
        (&["generate", "/proc/no/such/directory"], 1),
    ] {
        let (exit, out, err) = command_line(words);
        assert_eq!(exit.code(), code, "{words:?}: {out}{err}");
        assert!(!(out + &err).contains('\x1b'), "{words:?}");
    }
}

#[test]
fn completions_and_man_pages_are_generated() {
    let (exit, out, _) = command_line(&["completions", "bash"]);
    assert_eq!(exit, Exit::Done);
    assert!(out.contains("agentguard__subcmd__exec") || out.contains("agentguard__exec"));
    let directory = tempfile::tempdir().unwrap();
    let (exit, ..) = command_line(&["generate", directory.path().to_str().unwrap()]);
    assert_eq!(exit, Exit::Done);
    assert!(directory.path().join("man/agentguard-exec.1").exists());
}

#[test]
fn what_a_daemon_of_another_version_says_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("other.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 1024];
        let _ = stream.read(&mut buffer).unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
    });
    let error = Client::new(&socket).status().unwrap_err();
    assert!(matches!(error, ClientError::Unreadable { .. }), "{error}");
    other.join().unwrap();
}
