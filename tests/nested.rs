//! A node that is a container itself, as in Kubernetes in Docker: with PID, mount and cgroup namespaces
//! of its own, in which the daemon sees other process ids and other cgroup paths than the machine.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use agentguard_tests::{
    Cgroup, Finished, Running, child_of,
    containerd::Inside,
    daemon::{Daemon, Prober, Reachable, grant, identity, program, scope, workload},
    run, wait_until,
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
/// The workload's cgroup, in the node's terms, and another that is nobody's.
const AGENTS: &str = "agents";
const ELSEWHERE: &str = "elsewhere";

/// The node, with the daemon in it; dropped, all of its processes end.
struct Node {
    // First: its processes are in the cgroup.
    running: Running,
    init: u32,
    // Before the daemon's installation: what goes with it is done with then.
    cgroup: Cgroup,
    daemon: Daemon,
}

impl Node {
    fn started(daemon: Daemon) -> Self {
        let cgroup = daemon.cgroup("machine");
        for name in ["node", AGENTS, ELSEWHERE] {
            fs::create_dir(cgroup.path().join(name)).unwrap();
        }
        // As a container's runtime does: the cgroups that are mounted are those of the namespace.
        let script = "umount \"$ROOT\"; mount -t cgroup2 none \"$ROOT\" || exit 1; \
            echo 0 >\"$ROOT/node/cgroup.procs\"; \"$PROGRAM\" run & echo started; wait";
        let enter = "echo $$ >\"$CGROUP/cgroup.procs\"; exec unshare --pid --mount --cgroup \
            --fork --kill-child --mount-proc sh -c \"$SCRIPT\"";
        let mut command = Command::new("sh");
        command.args(["-c", enter]);
        let root = cgroup.path().parent().expect("it is below the root");
        command.env("SCRIPT", script).env("ROOT", root).env("CGROUP", cgroup.path());
        command.env("PROGRAM", program()).env("AGENTGUARD_CONFIG", daemon.config());
        let running = Running::start(&mut command);
        running.said("started", PATIENCE);
        let init = child_of(running.pid()).expect("it has one child");
        let node = Self { running, init, cgroup, daemon };
        wait_until("the daemon answers", || node.agentguard("node", ["status"]).status.success());
        node
    }

    /// Where a container runtime of the node's belongs.
    fn inside(&self) -> Inside {
        Inside { init: self.init, cgroup: self.path("node") }
    }

    /// Ends it, and takes away what its daemon left in force.
    fn end(self) {
        let Self { running, daemon, cgroup, .. } = self;
        drop((running, cgroup));
        daemon.run(["uninstall"]).expect_success("uninstall");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cgroup.path().join(name)
    }

    /// A command in the node, in one of its cgroups.
    fn enter(&self, cgroup: &str, program: &OsStr) -> Command {
        let mut command = Command::new("sh");
        let script = "echo $$ >\"$0/cgroup.procs\"; \
            exec nsenter --target \"$INIT\" --pid --mount --cgroup -- \"$@\"";
        command.args(["-c", script]).arg(self.path(cgroup)).arg(program);
        command.env("INIT", self.init.to_string());
        command.env("AGENTGUARD_CONFIG", self.daemon.config());
        command
    }

    fn agentguard<const N: usize>(&self, cgroup: &str, arguments: [&str; N]) -> Finished {
        run(self.enter(cgroup, program().as_os_str()).args(arguments), PATIENCE)
    }

    /// Has a process of the node's own get this number there, running `sleep`.
    fn occupy(&self, pid: u32) -> Running {
        let script = format!("echo {} >/proc/sys/kernel/ns_last_pid; sleep 600 & wait", pid - 1);
        let mut command = self.enter("node", OsStr::new("sh"));
        let running = Running::start(command.args(["-c", &script]));
        let seen = format!("/proc/{}/root/proc/{pid}/exe", self.init);
        wait_until("the number is taken", || {
            fs::read_link(&seen).is_ok_and(|path| path.ends_with("sleep"))
        });
        running
    }
}

fn denials(daemon: &Daemon) -> Vec<Value> {
    let records = daemon.records().into_iter();
    records.filter(|record| record["verdict"] == "deny").collect()
}

fn move_to(cgroup: &Path, pid: u32) {
    fs::write(cgroup.join("cgroup.procs"), pid.to_string()).unwrap();
}

#[test]
fn a_node_that_is_a_container_is_guarded_by_a_daemon_in_it() {
    let daemon = Daemon::installed();
    let server = Reachable::start();
    let other = Reachable::start();
    let agent = identity("agent");
    daemon.write("workload", &[workload("agent", &format!("/{AGENTS}"), &agent, "enforce")]);
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.write("grant", &[grant("server", &agent, "test:server")]);
    let node = Node::started(daemon);
    // No process of the node's, and it ran before: procfs of the node tells nothing of it.
    let mut prober = Prober::in_cgroup(&node.path(AGENTS));
    wait_until("it is held", || !prober.reaches(other.port()));
    assert!(prober.reaches(server.port()), "what is granted");

    // Who asks has the number of a process of the node as well, which is nobody's.
    let mut third = Reachable::start();
    let go = node.daemon.path("go");
    let mut asks = Command::new("bash");
    asks.args([
        "--norc",
        "-c",
        "echo $$ >\"$CGROUP/cgroup.procs\"; while [ ! -e \"$GO\" ]; do :; done; \
         true 3<>/dev/tcp/127.0.0.1/$PORT; echo asked",
    ]);
    asks.env("CGROUP", node.path(AGENTS)).env("GO", &go).env("PORT", third.port().to_string());
    let asking = Running::start(&mut asks);
    let occupying = node.occupy(asking.pid());
    fs::write(&go, "").unwrap();
    asking.said("asked", PATIENCE);
    let mut told = None;
    wait_until("the refusal is recorded", || {
        let mut refused = denials(&node.daemon).into_iter();
        told = refused.find(|record| record["request"]["port"] == third.port());
        told.is_some()
    });
    let process = &told.expect("it was found")["process"];
    assert_eq!(process["pid"], asking.pid());
    assert!(!process.to_string().contains("sleep"), "of another process: {process}");
    drop((occupying, asking));

    // A process that is moved keeps its tag, and the hooks find it.
    move_to(&node.path(ELSEWHERE), prober.pid());
    third = Reachable::start();
    wait_until("hooks are where it is now", || !prober.reaches(third.port()));
    assert!(prober.reaches(server.port()), "what is granted");
    let mut neighbour = Prober::in_cgroup(&node.path(ELSEWHERE));
    assert!(neighbour.reaches(third.port()), "who is there too is nobody's");

    // Which of the processes there it is, nothing tells: none of them has a say.
    let refused = node.agentguard(ELSEWHERE, ["grants"]);
    assert!(refused.stderr.contains("a process of a workload may not use"), "{refused:?}");
    node.agentguard("node", ["grants"]).expect_success("grants, for the node's root");

    move_to(node.cgroup.path(), prober.pid());
    wait_until("hooks are at the node's root", || !prober.reaches(third.port()));

    let doctor = node.agentguard("node", ["doctor"]).stdout;
    assert!(doctor.contains("process ids"), "{doctor}");
    drop(prober);
    drop(neighbour);
    node.end();
}

/// What needs a container runtime.
mod containers {
    use std::net::SocketAddr;

    use agentguard_agent::{Ask, Report};
    use agentguard_tests::{
        Containerd, World,
        address::{API, GRANTED_PORT, OTHER_PORT},
        containerd::TOOL,
        daemon::scope_of,
    };
    use serde_json::json;

    use super::*;

    const API_PORT: SocketAddr = SocketAddr::new(API, GRANTED_PORT);
    const ELSEWHERE: SocketAddr = SocketAddr::new(API, OTHER_PORT);

    /// How many of so many attempts at each of these were refused.
    #[track_caller]
    fn refused<const N: usize>(report: &Report, attempts: u64) -> [u64; N] {
        let refused = report.tallies.iter().map(|tally| {
            assert_eq!(tally.allowed + tally.refused(), attempts, "{tally:?}");
            tally.refused()
        });
        refused.collect::<Vec<_>>().try_into().expect("as many as were asked for")
    }

    #[test]
    fn the_containers_of_a_node_that_is_a_container_are_held() {
        let world = World::new();
        let daemon = Daemon::installed();
        daemon.configure(|config| {
            config["mode"] = json!("enforce");
            config["containers"] = json!({
                "runtimes": [Containerd::socket_on(&world)],
                "nri": "off",
                "identity": "spiffe://{trust_domain}/{label:app}",
            });
        });
        let api = json!({
            "egress": [{
                "to": [{"ipBlock": {"cidr": format!("{API}/32")}}],
                "ports": [{"protocol": "TCP", "port": GRANTED_PORT}],
            }],
            "exec": [{"path": TOOL}],
        });
        daemon.write("scope", &[scope_of("test:api", api)]);
        daemon.write("grant", &[grant("api", &identity("agent"), "test:api")]);
        let node = Node::started(daemon);
        let containerd = Containerd::started_inside(world, node.inside());

        let pod = |name: &str, app: &str| containerd.pod(name).label("app", app).host_network();
        let pods = [("agent", "agent"), ("stranger", "stranger")]
            .map(|(name, app)| pod(name, app).label("agentguard.dev/agent", "true").run());
        let ordinary = pod("ordinary", "agent").run();
        let mut listed = Value::Null;
        wait_until("both agents are workloads", || {
            let workloads = node.agentguard("node", ["workloads", "--output", "json"]);
            let workloads = workloads.expect_success("workloads, for the node's root");
            listed = serde_json::from_str(&workloads.stdout).unwrap();
            listed.as_array().is_some_and(|listed| listed.len() == 2)
        });
        let names: Vec<_> = listed.as_array().into_iter().flatten().collect();
        assert!(
            names.iter().any(|workload| workload["name"] == "agents/agent"
                && workload["identity"] == identity("agent")
                && workload["pod"]["uid"] == pods[0].uid()),
            "{listed}"
        );

        let asks = [Ask::Tcp(API_PORT), Ask::Tcp(ELSEWHERE), Ask::Exec(TOOL.into())];
        let agent = pods[0].container("agent").start();
        wait_until("the tool in the container's own mounts may run", || {
            agent.exec([TOOL, "end"]).exit_code == 0
        });
        assert_eq!(refused(&agent.exec_attempts(20, &asks), 20), [0, 20, 0], "who has a grant");
        // From its first instruction on, since its pod is known.
        let stranger = pods[1].container("agent").attempts(20, &asks).start();
        assert_eq!(refused(&stranger.report(), 20), [20, 20, 20], "who has none");
        let ordinary = ordinary.container("agent").attempts(20, &asks).start();
        assert_eq!(refused(&ordinary.report(), 20), [0, 0, 0], "who is no agent");

        let mut told = None;
        wait_until("a refusal is recorded", || {
            let mut refused = denials(&node.daemon).into_iter();
            told = refused.find(|record| {
                record["workload"]["name"] == "agents/agent"
                    && record["request"]["port"] == OTHER_PORT
            });
            told.is_some()
        });
        let told = told.expect("it was found");
        assert_eq!(told["workload"]["pod"]["name"], "agent", "{told}");
        assert_eq!(told["workload"]["container"]["name"], "agent", "{told}");
        assert_eq!(told["workload"]["container"]["id"], agent.id(), "{told}");
        drop(containerd);
        node.end();
    }
}
