//! Pods and containers as workloads: a real runtime, and the daemon beside it.

mod docker;
mod nri;
mod systemd;
mod v1alpha2;

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use agentguard_agent::{Ask, Report};
use agentguard_tests::{
    Containerd, Guard,
    address::{API, OTHER_PORT},
    containerd::{Container, PROGRAM, Pod, PodPlan, TOOL, agent_binary},
    daemon::program,
    tell, wait_until,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::API_PORT;

const ELSEWHERE: std::net::SocketAddr = std::net::SocketAddr::new(API, OTHER_PORT);
/// The scope of every test here: the API, and no program.
const BASE: &str = "test:base";
const AGENT: &str = "agentguard.dev/agent";
const MODE: &str = "agentguard.dev/mode";
const HOUR: Duration = Duration::from_secs(3600);
/// The pod's own name in its identity, by a label.
const BY_LABEL: &str = "spiffe://{trust_domain}/app/{label:app}";
/// Each container apart, so that no pod's cgroup is tagged.
const BY_CONTAINER: &str = "spiffe://{trust_domain}/app/{label:app}/{container}";

fn identity(path: &str) -> String {
    format!("spiffe://agentguard.test/app/{path}")
}

fn guard_with(containerd: &Containerd, template: &str) -> Guard {
    Guard::start_with(containerd.world(), &[], &configuration(containerd, template))
}

fn configuration(containerd: &Containerd, template: &str) -> Value {
    let containers = json!({
        "runtimes": [containerd.socket()],
        "nri": "off",
        "identity": template,
        "sandboxed_handlers": ["kata"],
    });
    json!({"mode": "enforce", "containers": containers})
}

fn guard(containerd: &Containerd) -> Guard {
    guard_with(containerd, BY_LABEL)
}

/// An agent whose containers the hook tells of.
fn agent<'a>(containerd: &'a Containerd, name: &str, app: &str) -> PodPlan<'a> {
    agent_of(containerd, name, app).runtime_handler(DENYING)
}

fn agent_of<'a>(containerd: &'a Containerd, name: &str, app: &str) -> PodPlan<'a> {
    containerd.pod(name).label(AGENT, "true").label("app", app)
}

/// A runtime with the hook installed, and a daemon that it leads to.
fn hooked() -> (Hook, Containerd) {
    let hook = Hook::new();
    let containerd = Containerd::started_with(&hook.configuration());
    hook.lead_to(&containerd);
    (hook, containerd)
}

/// The workload of this name, if it is one.
fn workload(guard: &Guard, name: &str) -> Option<Value> {
    let list = guard.json(&["workloads"]);
    list.as_array()?.iter().find(|workload| workload["name"] == name).cloned()
}

#[track_caller]
fn is_held(guard: &Guard, name: &str) -> Value {
    let mut found = None;
    wait_until(&format!("{name} is a workload"), || {
        found = workload(guard, name);
        found.is_some()
    });
    found.expect("it was found")
}

#[track_caller]
fn grant(guard: &Guard, name: &str, app: &str, scope: &str) {
    guard.grant(name, &identity(app), scope, HOUR);
}

/// What every agent here asks for: one thing that is granted, the rest not.
fn asks() -> Vec<Ask> {
    vec![
        Ask::Tcp(ELSEWHERE),
        Ask::Exec(TOOL.into()),
        Ask::SendTo(ELSEWHERE),
        Ask::Udp(ELSEWHERE),
        Ask::Tcp(API_PORT),
    ]
}

/// Whether all of [`asks`] ended as they are to for who has the API alone.
#[track_caller]
fn assert_held(report: &Report, whose: &str) {
    for tally in &report.tallies {
        let wanted = match &tally.ask {
            Ask::Tcp(address) if *address == API_PORT => tally.allowed,
            Ask::Tcp(_) | Ask::Udp(_) | Ask::SendTo(_) => tally.refused(),
            Ask::Exec(path) if path == Path::new(PROGRAM) => tally.allowed,
            Ask::Exec(_) => tally.refused(),
        };
        assert_eq!(wanted, tally.attempts(), "{whose}: {tally:?}");
    }
}

#[track_caller]
fn assert_free(report: &Report, whose: &str) {
    for tally in &report.tallies {
        assert_eq!(tally.allowed, tally.attempts(), "{whose}: {tally:?}");
    }
}

fn gaps(guard: &Guard) -> Vec<String> {
    let status = guard.status();
    let gaps = status["gaps"].as_array().into_iter().flatten();
    gaps.filter_map(|gap| gap.as_str().map(str::to_owned)).collect()
}

/// The hook as it is installed: a base specification of containerd's own with the hook in it, named
/// by a runtime handler.
struct Hook {
    directory: TempDir,
}

/// Refuses what it can not tell of.
const DENYING: &str = "denying";
/// Starts it.
const ALLOWING: &str = "allowing";

impl Hook {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // containerd reads it as root; nothing else needs to.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let spec = Command::new("ctr").args(["oci", "spec"]).output().unwrap();
        assert!(spec.status.success(), "{spec:?}");
        for (name, on_failure) in [(DENYING, "deny"), (ALLOWING, "allow")] {
            let mut child = Command::new(program())
                .args(["oci-hook", "--print", "base-spec", "--on-failure", on_failure])
                .arg("--socket")
                .arg(directory.path().join("agentguard.sock"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(&spec.stdout).unwrap();
            let written = child.wait_with_output().unwrap();
            assert!(written.status.success(), "{written:?}");
            fs::write(directory.path().join(name), written.stdout).unwrap();
        }
        Self { directory }
    }

    /// What containerd's configuration needs of it.
    fn configuration(&self) -> String {
        self.configuration_with("")
    }

    /// The same, with more options of the runtime that it calls.
    fn configuration_with(&self, options: &str) -> String {
        [DENYING, ALLOWING, "kata"]
            .map(|name| {
                let handler =
                    format!("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.{name}");
                let spec = self.directory.path().join(name);
                let base = if spec.exists() {
                    format!("base_runtime_spec = \"{}\"\n", spec.display())
                } else {
                    String::new()
                };
                format!(
                    "{handler}]\nruntime_type = \"io.containerd.runc.v2\"\n{base}\
                     {handler}.options]\nRoot = \"{{directory}}/runc\"\n{options}\n"
                )
            })
            .concat()
    }

    /// Leads it to a daemon.
    fn lead_to(&self, containerd: &Containerd) {
        let socket = containerd.world().directory().join("guard/run/api.sock");
        symlink(socket, self.directory.path().join("agentguard.sock")).unwrap();
    }
}

#[test]
fn pods_are_held_by_their_labels_and_others_are_not() {
    let (_hook, containerd) = hooked();
    let guard = guard(&containerd);
    grant(&guard, "researcher", "researcher", BASE);

    let pod = agent(&containerd, "researcher-0", "researcher").run();
    let workload = is_held(&guard, "agents/researcher-0");
    assert_eq!(workload["identity"], identity("researcher"));
    assert_eq!(workload["source"], "container");
    assert_eq!(workload["mode"], "enforce");
    assert_eq!(workload["pod"]["uid"], pod.uid());
    let container = pod.container("agent").attempts(20, &asks()).start();
    assert_held(&container.report(), "the agent");
    guard.recorded("a denial with the pod's name", |record| {
        let workload = &record["workload"];
        record["kind"] == "verdict"
            && record["verdict"] == "deny"
            && workload["pod"]["name"] == "researcher-0"
            && workload["identity"] == identity("researcher")
    });

    let ordinary = containerd.pod("ordinary").label("app", "researcher").run();
    let audited = agent(&containerd, "audited", "researcher").label(MODE, "audit").run();
    assert_eq!(is_held(&guard, "agents/audited")["mode"], "audit");
    for (pod, whose) in [(&ordinary, "an ordinary pod"), (&audited, "a pod in audit mode")] {
        let container = pod.container("agent").attempts(5, &asks()).start();
        assert_free(&container.report(), whose);
    }
    assert!(self::workload(&guard, "agents/ordinary").is_none());

    // Of whom it is not known which agent it is, everything is denied.
    let nameless = containerd.pod("nameless").label(AGENT, "true").run();
    assert_eq!(is_held(&guard, "agents/nameless")["identity"], Value::Null);
    let container = nameless.container("agent").attempts(3, &[Ask::Tcp(API_PORT)]).start();
    // Even its own command: there is no allow-list that could permit it.
    wait_until("it ends or is denied", || {
        !container.is_running() || container.log().contains("tcp")
    });
    assert!(!container.log().contains("\"allowed\":3"), "{}", container.log());
    assert!(gaps(&guard).iter().any(|gap| gap.contains("label app is not known")));
}

#[test]
fn executables_are_granted_in_the_containers_own_mounts() {
    let (_hook, containerd) = hooked();
    let guard = guard(&containerd);
    guard.define("test:tool", &json!({"exec": [{"path": TOOL}, {"path": "/bin/in-no-image"}]}));
    guard.define("test:data", &json!({"exec": [{"path": "/data/tool"}, {"path": "/fixed/tool"}]}));
    grant(&guard, "base", "coder", BASE);
    let pod = agent(&containerd, "coder-0", "coder").run();
    is_held(&guard, "agents/coder-0");

    // A volume that can be written to holds nothing that can be granted; one that cannot be does.
    let volume = volume_with_tool(&containerd.world().directory().join("volume"));
    let fixed = volume_with_tool(&containerd.world().directory().join("fixed"));
    let first = pod.container("init").command([PROGRAM, "end"]).start();
    wait_until("the init container has ended", || !first.is_running());
    let plan = pod.container("agent").mount(&volume, "/data");
    let container = plan.mount_read_only(&fixed, "/fixed").start();

    let run = |path: &str| container.exec([path, "end"]).exit_code;
    // What the runtime started runs again; nothing else does.
    wait_until("the container's own command may run", || run(PROGRAM) == 0);
    assert_ne!(run(TOOL), 0, "a command of exec that no scope grants");
    assert_ne!(run("/data/tool"), 0);
    assert_ne!(run("/fixed/tool"), 0);
    grant(&guard, "tool", "coder", "test:tool");
    grant(&guard, "data", "coder", "test:data");
    wait_until("the tool may run", || run(TOOL) == 0);
    wait_until("a file on a volume that is read only may run", || run("/fixed/tool") == 0);
    assert_ne!(run("/data/tool"), 0, "a file on a volume that can be written to");
    let said = gaps(&guard);
    assert!(
        said.iter().any(|gap| gap.contains("/data/tool") && gap.contains("volume")),
        "{said:?}"
    );
    assert!(!said.iter().any(|gap| gap.contains("in-no-image")), "{said:?}");
    guard.revoke("tool");
    wait_until("the tool may not run any more", || run(TOOL) != 0);

    // A container that restarts is born held, and knows its scopes.
    grant(&guard, "tool-again", "coder", "test:tool");
    container.stop();
    container.remove();
    let plan = pod.container("agent").attempt(1);
    let container = plan.attempts(10, &[Ask::Tcp(ELSEWHERE), Ask::Tcp(API_PORT)]).start();
    assert_held(&container.report(), "a container that was restarted");
    wait_until("the tool may run there too", || container.exec([TOOL, "end"]).exit_code == 0);
}

/// Waits until what the runtime started in a container may be run there again: where no hook told what
/// that is, the runtime's list does.
#[track_caller]
fn may_run_its_own(container: &Container<'_>) {
    wait_until("the container's own command may run", || {
        container.exec([PROGRAM, "end"]).exit_code == 0
    });
}

/// A directory of the node with the program of the tests in it, as `tool`.
fn volume_with_tool(directory: &Path) -> PathBuf {
    fs::create_dir(directory).unwrap();
    fs::copy(agent_binary(), directory.join("tool")).unwrap();
    directory.to_owned()
}

#[test]
fn what_is_not_held_whole_is_said() {
    let (_hook, containerd) = hooked();
    let guard = guard(&containerd);
    grant(&guard, "base", "odd", BASE);

    let of_node = agent(&containerd, "of-node", "odd").host_network().run();
    is_held(&guard, "agents/of-node");
    let container = of_node.container("agent").attempts(5, &asks()).start();
    assert_held(&container.report(), "a pod in the node's network");

    let privileged = agent(&containerd, "mighty", "odd").privileged().run();
    is_held(&guard, "agents/mighty");
    let container = privileged.container("agent").privileged().attempts(5, &asks()).start();
    assert_held(&container.report(), "a privileged pod");
    wait_until("status says that it is privileged", || {
        gaps(&guard).iter().any(|gap| gap.contains("agents/mighty") && gap.contains("CAP_"))
    });

    let _sandboxed = agent(&containerd, "sandboxed", "odd").runtime_handler("kata").run();
    let workload = is_held(&guard, "agents/sandboxed");
    assert_eq!(workload["protection"], "none", "{workload}");
    assert!(gaps(&guard).iter().any(|gap| gap.contains("agents/sandboxed")));

    let exempt = agent(&containerd, "dns", "odd").namespace("kube-system").run();
    let container = exempt.container("agent").attempts(5, &asks()).start();
    assert_free(&container.report(), "a pod that the node needs");
    assert!(self::workload(&guard, "kube-system/dns").is_none());
}

#[test]
fn pods_stay_held_while_daemon_and_runtime_restart_and_end_with_their_cgroup() {
    let (_hook, containerd) = hooked();
    stay_held(containerd, DENYING);
}

/// The same of a runtime, whose `handler` runs the pod.
#[track_caller]
fn stay_held(mut containerd: Containerd, handler: &str) {
    let mut guard = guard(&containerd);
    grant(&guard, "base", "steady", BASE);
    let id = {
        let pod = agent_of(&containerd, "steady-0", "steady").runtime_handler(handler).run();
        is_held(&guard, "agents/steady-0");
        let container = pod.container("agent").start();
        if handler.is_empty() {
            may_run_its_own(&container);
        }
        assert_held(&container.exec_attempts(5, &asks()), "before");
        container.id().to_owned()
    };
    let held = |guard: Option<&Guard>, containerd: &Containerd, when: &str| {
        let report = containerd.container(&id).exec_attempts(20, &asks());
        assert_held(&report, when);
        if let Some(guard) = guard {
            assert_eq!(is_held(guard, "agents/steady-0")["identity"], identity("steady"));
        }
    };
    guard.kill();
    held(None, &containerd, "while the daemon is dead");
    guard.restart();
    held(Some(&guard), &containerd, "after the daemon's restart");
    guard.kill();
    containerd.stop();
    guard.restart();
    // Neither listed nor forgotten: the runtime has not spoken.
    assert!(workload(&guard, "agents/steady-0").is_some());
    wait_until("status says that the runtime does not answer", || {
        gaps(&guard).iter().any(|gap| gap.contains("containerd.sock"))
    });
    containerd.start();
    held(Some(&guard), &containerd, "after the runtime's restart");
    wait_until("the runtime answers again", || {
        !gaps(&guard).iter().any(|gap| gap.contains("containerd.sock"))
    });
    let added = guard
        .audit_records()
        .into_iter()
        .filter(|record| record["kind"] == "workload" && record["change"] == "added");
    assert_eq!(added.count(), 1, "it was one workload all the time");

    containerd.remove_all();
    wait_until("the workload is gone", || workload(&guard, "agents/steady-0").is_none());
    guard.recorded("the workload's end", |record| {
        record["change"] == "removed" && record["workload"]["name"] == "agents/steady-0"
    });
}

#[test]
fn the_hook_holds_a_container_before_its_first_instruction_or_gives_up() {
    let (_hook, containerd) = hooked();
    let mut guard = guard_with(&containerd, BY_CONTAINER);
    grant(&guard, "base", "hooked/agent", BASE);
    let denying = agent(&containerd, "denying", "hooked").run();
    let allowing = agent(&containerd, "allowing", "hooked").runtime_handler(ALLOWING).run();
    let plain = containerd.pod("plain").runtime_handler(DENYING).run();
    let system = containerd.pod("dns").namespace("kube-system").runtime_handler(DENYING).run();
    for number in 0..5 {
        let plan = denying.container("agent").attempt(number).attempts(10, &asks());
        let container = plan.start();
        assert_held(&container.report(), "a container that the hook told of");
    }
    let container = plain.container("agent").attempts(2, &asks()).start();
    assert_free(&container.report(), "no agent, told of all the same");

    guard.kill();
    let refused = denying.container("late").create();
    let why = refused.try_start().unwrap_err();
    assert!(why.contains("is not held by agentguard") && why.contains("no daemon"), "{why}");
    let why = plain.container("late").create().try_start().unwrap_err();
    assert!(why.contains("pod agents/plain"), "{why}");
    let _runs = system.container("agent").start();
    let let_through = allowing.container("agent").start();
    guard.restart();
    is_held(&guard, "agents/allowing/agent");
    let report = let_through.exec_attempts(5, &asks());
    assert_held(&report, "what was started without a daemon");
    // Whoever was refused is started again, as kubelet does.
    let container = denying.container("late").attempt(1).start();
    is_held(&guard, "agents/denying/late");
    assert_ne!(container.exec([TOOL, "end"]).exit_code, 0);
}

/// A hook that is gone from a pod's cgroup would leave a door open to each container that starts in it.
#[test]
fn a_container_that_can_not_be_held_whole_is_not_started() {
    let (_hook, containerd) = hooked();
    let guard = guard(&containerd);
    let pod = agent(&containerd, "lacking", "hooked").run();
    is_held(&guard, "agents/lacking");
    let number = fs::metadata(pod.cgroup()).expect("it runs").ino();
    fs::remove_file(guard.pins().join(format!("links/{number}-connect6"))).expect("it is held");
    let refused = pod.container("agent").create();
    let why = refused.try_start().unwrap_err();
    for part in ["is not held by agentguard", "not held whole", "cgroup/connect6"] {
        assert!(why.contains(part), "{part}: {why}");
    }
}

#[test]
fn what_runs_when_the_daemon_starts_is_held_within_a_second() {
    let containerd = Containerd::started();
    let begin = Instant::now();
    let pods: Vec<Pod<'_>> = in_parallel(PODS, |number| {
        agent_of(&containerd, &format!("p-{number}"), "many").host_network().run()
    });
    let containers = in_parallel(pods.len() * CONTAINERS, |number| {
        let name = format!("agent-{}", number / pods.len());
        pods[number % pods.len()].container(&name).start()
    });
    tell!(
        "{} containers in {} pods run after {:.1} s",
        containers.len(),
        pods.len(),
        begin.elapsed().as_secs_f64()
    );
    let guard = guard(&containerd);
    let begin = Instant::now();
    let mut seen = Vec::new();
    wait_until("all are workloads", || {
        let list = guard.json(&["workloads"]);
        let now = list.as_array().map_or(0, Vec::len);
        seen.push((now, begin.elapsed().as_millis()));
        now == PODS
    });
    tell!("workloads by milliseconds since the daemon was ready: {seen:?}");
    let took = seen.last().expect("it was looked at").1;
    grant(&guard, "base", "many", BASE);
    for container in containers.iter().step_by(containers.len() / 5) {
        assert_held(&container.exec_attempts(3, &asks()), "one of many");
    }
    assert!(took < 1000, "{took} ms for {} containers", containers.len());
}

const PODS: usize = 100;
/// In each pod.
const CONTAINERS: usize = 5;

#[test]
fn nothing_of_a_storm_of_starts_is_undecided_with_the_hook() {
    let (_hook, containerd) = hooked();
    let guard = guard_with(&containerd, BY_CONTAINER);
    for number in 0..10 {
        grant(&guard, &format!("g-{number}"), &format!("storm/c-{number}"), BASE);
    }
    let pods: Vec<Pod<'_>> = in_parallel(20, |number| {
        agent(&containerd, &format!("p-{number}"), "storm").host_network().run()
    });
    storm(&guard, &pods, 10, is_as_granted);
}

/// Whether all that is granted was allowed, and nothing else.
#[track_caller]
fn is_as_granted(report: &Report, whose: &str) {
    for tally in &report.tallies {
        let is_granted = match &tally.ask {
            Ask::Tcp(address) | Ask::Udp(address) => *address == API_PORT,
            Ask::Exec(path) => path == Path::new(PROGRAM),
            Ask::SendTo(_) => false,
        };
        let as_it_should = if is_granted { tally.allowed } else { tally.refused() };
        assert_eq!(as_it_should, tally.attempts(), "{whose}: {tally:?}");
    }
}

#[test]
fn nothing_of_a_storm_of_starts_in_known_pods_is_undecided_without_the_hook() {
    let containerd = Containerd::started();
    let guard = guard(&containerd);
    grant(&guard, "base", "storm", BASE);
    let pods: Vec<Pod<'_>> = in_parallel(20, |number| {
        agent_of(&containerd, &format!("p-{number}"), "storm").host_network().run()
    });
    for number in 0..pods.len() {
        is_held(&guard, &format!("agents/p-{number}"));
    }
    storm(&guard, &pods, 10, |report, whose| {
        for tally in &report.tallies {
            let as_it_should = match &tally.ask {
                Ask::Tcp(address) | Ask::Udp(address) if *address == API_PORT => tally.allowed,
                // The container's own program starts, and may be run again once the runtime has told
                // of the container.
                Ask::Exec(path) if path == Path::new(PROGRAM) => tally.allowed + tally.refused(),
                Ask::Tcp(_) | Ask::Udp(_) | Ask::Exec(_) | Ask::SendTo(_) => tally.refused(),
            };
            assert_eq!(as_it_should, tally.attempts(), "{whose}: {tally:?}");
        }
    });
}

#[test]
fn a_container_starts_without_the_hook_and_whatever_enters_it_is_refused() {
    let containerd = Containerd::started();
    let guard = guard(&containerd);
    grant(&guard, "base", "researcher", BASE);
    let pod = agent_of(&containerd, "strict", "researcher").run();
    is_held(&guard, "agents/strict");
    let container = pod.container("agent").attempts(1, &asks()).start();
    assert_held(&container.report(), "a container that no hook told of");
    guard.recorded("the start of its command", |record| {
        record["request"]["action"] == "exec"
            && record["verdict"] == "allow"
            && record["scope"] == "agentguard:launch"
            && record["grant"] == "agentguard:launch/agents/strict"
    });
    assert_ne!(container.exec([TOOL, "end"]).exit_code, 0, "a program that its image has");
    guard.recorded("the denial of what entered it", |record| {
        record["request"]["action"] == "exec"
            && record["verdict"] == "deny"
            && record["workload"]["name"] == "agents/strict"
    });
}

/// How many start at once.
const STARTERS: usize = 8;

/// Starts so many containers in each pod at once, each of which asks for a hundred things first.
fn storm(
    guard: &Guard,
    pods: &[Pod<'_>],
    containers: usize,
    is_as_it_should: impl Fn(&Report, &str),
) {
    // What is not granted comes first.
    let mut asks = vec![Ask::Exec(TOOL.into())];
    for _ in 0..4 {
        asks.extend([Ask::Tcp(ELSEWHERE), Ask::SendTo(ELSEWHERE), Ask::Udp(ELSEWHERE)]);
        asks.extend([Ask::Tcp(API_PORT), Ask::Udp(API_PORT)]);
    }
    asks.push(Ask::Exec(PROGRAM.into()));
    let decided = || {
        let status = guard.status();
        status["totals"]["events"]["decided"].as_u64().expect("a count")
    };
    let before = decided();
    let made: Vec<Container<'_>> = in_parallel(pods.len() * containers, |number| {
        let name = format!("c-{}", number / pods.len());
        pods[number % pods.len()].container(&name).attempts(5, &asks).create()
    });
    let begin = Instant::now();
    in_parallel(made.len(), |number| made[number].start());
    let started = begin.elapsed();
    let mut requests = 0;
    for container in &made {
        let report = container.report();
        requests += report.tallies.iter().map(|tally| tally.attempts()).sum::<u64>();
        is_as_it_should(&report, container.id());
    }
    let decided = decided() - before;
    tell!(
        "{} containers were started in {:.1} s and had made {requests} requests after {:.1} s; the kernel \
         decided {decided}",
        made.len(),
        started.as_secs_f64(),
        begin.elapsed().as_secs_f64(),
    );
    assert!(requests >= 100 * made.len() as u64, "{requests}");
    assert!(decided >= requests, "{decided} of {requests}");
}

/// Does `what` for each number, several at once.
fn in_parallel<T: Send>(count: usize, what: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let mut done: Vec<(usize, T)> = thread::scope(|scope| {
        let work = || {
            let mut done = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return done;
                }
                done.push((number, what(number)));
            }
        };
        let threads: Vec<_> = (0..STARTERS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no start fails")).collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, value)| value).collect()
}
