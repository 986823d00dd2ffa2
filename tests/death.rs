//! Row G1 of the threat model: whatever happens to the daemon, what is in force stays in force, ends
//! when it must, is inherited, and is counted; and the next daemon goes on from there.

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use agentguard::fault;
use agentguard_tests::{
    Cgroup, Running, Sink, SmallDisk, World,
    daemon::{Daemon, Prober, Reachable, grant, identity, scope, scope_of, workload},
    run, tell,
    traffic::{Expected, Kind, Report, Target, Traffic, assert_reconciles, assert_right},
    wait_until,
};
use nix::{
    sys::{
        resource::{Resource, rlim_t},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);
/// Between two rounds of a workload that is not in a hurry.
const PAUSE: Duration = Duration::from_micros(500);
/// How long the grant lives that ends while the daemon is away.
const BRIEF: Duration = Duration::from_secs(3);

/// A daemon with a workload under traffic, whose every outcome is known.
struct Scene {
    // Dropped in this order: the workload ends before its daemon is uninstalled.
    traffic: Traffic,
    held: Prober,
    daemon: Daemon,
    granted: Reachable,
    brief: Reachable,
    other: Reachable,
    targets: Vec<Target>,
    agent: String,
    _sinks: [Sink; 3],
    _world: World,
}

/// A scope of one sink, by both transports.
fn scope_to(name: &str, sink: &Sink) -> Value {
    let port = sink.address().port();
    scope_of(
        name,
        json!({"egress": [{
            "to": [{"ipBlock": {"cidr": "127.0.0.1/32"}}],
            "ports": [{"protocol": "TCP", "port": port}, {"protocol": "UDP", "port": port}],
        }]}),
    )
}

impl Scene {
    fn new() -> Self {
        Self::of(Daemon::installed())
    }

    fn of(mut daemon: Daemon) -> Self {
        let world = World::new();
        let sinks = [(); 3].map(|()| Sink::open(world.network()));
        let [always, never, flipping] = &sinks;
        let (granted, brief, other) = (Reachable::start(), Reachable::start(), Reachable::start());
        let agent = identity("busy");
        daemon.write(
            "scopes",
            &[
                scope_to("test:always", always),
                scope_to("test:flipping", flipping),
                scope("test:granted", granted.port()),
                scope("test:brief", brief.port()),
            ],
        );
        daemon.write("always", &[grant("always", &agent, "test:always")]);
        daemon.write("granted", &[grant("granted", &identity("held"), "test:granted")]);
        daemon.start();
        let target = |kind, expected, sink: &Sink| Target::new(kind, expected, sink.address());
        let targets = vec![
            target(Kind::Udp, Expected::Passed, always),
            target(Kind::SendTo, Expected::Passed, always),
            target(Kind::Udp, Expected::Refused, never),
            target(Kind::SendTo, Expected::Refused, never),
            target(Kind::Udp, Expected::Either, flipping),
            target(Kind::SendTo, Expected::Either, flipping),
        ];
        let mut exec = daemon.command(["exec", "--identity", &agent, "--name", "busy", "--"]);
        exec.stderr(Stdio::inherit());
        let mut traffic = Traffic::start(world.inside(&exec), PAUSE, &targets);
        let mut held = Prober::start_by(daemon.command([
            "exec",
            "--identity",
            &identity("held"),
            "--name",
            "held",
        ]));
        traffic.goes_on(10);
        assert!(held.reaches(granted.port()) && !held.reaches(other.port()));
        Self {
            traffic,
            held,
            daemon,
            granted,
            brief,
            other,
            targets,
            agent,
            _sinks: sinks,
            _world: world,
        }
    }

    /// Grants what ends by itself, with nobody there to end it.
    fn grant_briefly(&mut self) -> Instant {
        let ttl = format!("{}s", BRIEF.as_secs());
        let held = identity("held");
        let arguments = ["grant", "--to", &held, "--scope", "test:brief", "--ttl", &ttl];
        let mut command = self.daemon.command(arguments);
        let name = format!("brief-{}", self.brief.port());
        command.args(["--reason", "a test", "--name", &name]);
        let given = Instant::now();
        run(&mut command, PATIENCE).expect_success("grant");
        assert!(self.held.reaches(self.brief.port()));
        given
    }

    /// What must hold while the daemon can do nothing.
    fn holds_without_a_daemon(&mut self, given: Instant) {
        self.traffic.goes_on(100);
        assert!(self.held.reaches(self.granted.port()), "what is granted passes");
        assert!(!self.held.reaches(self.other.port()), "what is not is refused");
        // A child cgroup has the tag of its parent.
        let child = self.daemon.exec_cgroups().join("held/nested/deep");
        fs::create_dir_all(&child).unwrap();
        fs::write(child.join("cgroup.procs"), self.held.pid().to_string()).unwrap();
        assert!(self.held.reaches(self.granted.port()), "also in a child cgroup");
        assert!(!self.held.reaches(self.other.port()), "also in a child cgroup");
        // The end of a grant comes in the kernel, and not before its time.
        let mut last = Instant::now();
        while self.held.reaches(self.brief.port()) {
            last = Instant::now();
            assert!(given.elapsed() < BRIEF + Duration::from_secs(2), "a grant outlives its end");
            thread::sleep(Duration::from_millis(5));
        }
        tell!("the grant of {BRIEF:?} ended {:?} after it was given", given.elapsed());
        assert!(last.duration_since(given) > BRIEF / 2);
        self.traffic.goes_on(100);
    }

    /// What the next daemon, or the same one again, must say of the time before.
    fn tells_all(self, since: usize) {
        // The daemon last, so that it is dropped last: what runs in its cgroups ends before.
        let Self { daemon, mut traffic, mut held, other, brief, targets, agent, .. } = self;
        traffic.goes_on(100);
        assert!(!held.reaches(brief.port()), "what ended meanwhile stays so");
        let port = other.port().to_string();
        let told = |record: &Value| {
            record["verdict"] == "deny"
                && record["workload"]["name"] == "held"
                && record["request"].to_string().contains(&port)
        };
        wait_until("what was refused meanwhile is in the log", || {
            daemon.records().iter().skip(since).any(told)
        });
        let over = |record: &Value| record["kind"] == "grant" && record["change"] == "expired";
        wait_until("the end of the grant is in the log", || {
            daemon.records().iter().skip(since).any(over)
        });
        let reports = traffic.stop();
        assert_right(&targets, &reports);
        print_totals(&targets, &reports);
        assert_reconciles(&daemon, &agent, &targets, &reports);
        assert_totals(&daemon);
        assert_chain(&daemon);
        wait_until(
            "the log has every record that the kernel wrote, and tells of every other",
            || is_all_told(&daemon),
        );
    }
}

/// Whether the log has as many verdicts as the kernel wrote records, and says of all others that they are
/// lost.
fn is_all_told(daemon: &Daemon) -> bool {
    let (totals, records) = (totals(daemon), daemon.records());
    let verdicts = records.iter().filter(|record| record["kind"] == "verdict").count() as u64;
    let losses = records.iter().filter(|record| record["kind"] == "loss");
    let lost: u64 = losses.filter_map(|loss| loss["other"].as_u64()).sum();
    tell!("the kernel says {totals}, the log {verdicts} verdicts and {lost} lost");
    totals["logged"] == verdicts && totals["lost"] == lost
}

fn print_totals(targets: &[Target], reports: &[Report]) {
    for (target, report) in targets.iter().zip(reports) {
        let Report { attempts, sends, passed, refused, known, wrong, told: _ } = report;
        tell!(
            "{target}: {attempts} attempts, {sends} sends on them: {passed} passed, {refused} refused; {known} with a known outcome, {wrong} wrong"
        );
    }
}

/// What was decided so far, and what became of it.
#[track_caller]
fn totals(daemon: &Daemon) -> Value {
    daemon.status().expect("it answers")["totals"]["events"].clone()
}

/// `decided = logged + aggregated + lost`.
#[track_caller]
fn assert_totals(daemon: &Daemon) {
    let events = totals(daemon);
    let number = |name: &str| events[name].as_u64().unwrap();
    tell!("{events}");
    assert_eq!(number("decided"), number("logged") + number("aggregated") + number("lost"));
}

#[track_caller]
fn assert_chain(daemon: &Daemon) {
    wait_until("the audit log's chain is whole", || {
        let verified = run(daemon.command(["audit", "verify"]).arg(daemon.audit_log()), PATIENCE);
        verified.status.success()
    });
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).unwrap();
}

#[test]
fn a_killed_daemon() {
    let mut scene = Scene::new();
    let since = scene.daemon.records().len();
    let given = scene.grant_briefly();
    scene.daemon.kill();
    scene.holds_without_a_daemon(given);
    scene.daemon.start();
    scene.tells_all(since);
}

/// What was written down before the daemon died is not written again by the next, and what was not is:
/// of both rings.
#[test]
fn a_daemon_that_dies_between_writing_a_record_and_taking_it_off_its_ring() {
    const GRANTED: u16 = 1000;
    let mut daemon = Daemon::installed();
    let permits = json!({"egress": [{
        "to": [{"ipBlock": {"cidr": "127.0.0.1/32"}}],
        "ports": [{"protocol": "TCP", "port": GRANTED, "endPort": 2 * GRANTED}],
    }]});
    daemon.write("scope", &[scope_of("test:granted", permits)]);
    daemon.write("grant", &[grant("granted", &identity("held"), "test:granted")]);
    daemon.start();
    let exec = ["exec", "--identity", &identity("held"), "--name", "held"];
    let mut held = Prober::start_by(daemon.command(exec));
    let (mut denied, mut allowed) = (1.., GRANTED..);
    for written in 1..=4_u16 {
        for ports in [&mut denied, &mut allowed] {
            wait_until("the log has all", || is_all_told(&daemon));
            daemon.kill();
            let verdicts = |daemon: &Daemon| -> Vec<Value> {
                let records = daemon.records().into_iter();
                records.filter(|record| record["kind"] == "verdict").collect()
            };
            let before = verdicts(&daemon).len();
            // Nobody listens anywhere: what is allowed is answered by a reset.
            for port in ports.by_ref().take(usize::from(written) + 2) {
                assert!(!held.reaches(port));
            }
            daemon.launch(&[(fault::VARIABLE, &format!("witness.written@{written}"))]);
            let ended = daemon.ended(3 * PATIENCE).expect("it wrote a record");
            assert_eq!(ended.status.signal(), Some(Signal::SIGKILL as i32), "{ended:?}");
            assert_eq!(verdicts(&daemon).len() - before, usize::from(written));

            daemon.start();
            wait_until("the log has all that the kernel wrote, once", || is_all_told(&daemon));
            let told: Vec<Value> = verdicts(&daemon).split_off(before);
            let mut once: Vec<String> = told
                .iter()
                .map(|record| {
                    format!("{} {} {}", record["boot_ns"], record["hook"], record["request"])
                })
                .collect();
            once.sort_unstable();
            once.dedup();
            assert_eq!(once.len(), told.len(), "{told:#?}");
        }
    }
    assert_chain(&daemon);
}

/// While no daemon reads, the rings fill up. What does not fit is counted as lost, no more and no less, and
/// is refused as all else.
#[test]
fn a_killed_daemon_for_whose_records_there_is_no_room() {
    const REQUESTS: u16 = 200;
    let mut daemon = Daemon::installed();
    daemon.configure(|config| config["datapath"] = json!({"denied_ring_bytes": 4096}));
    daemon.start();
    let mut held = Prober::start_by(daemon.command(["exec", "--name", "held"]));
    let before = totals(&daemon);
    let since = daemon.records().len();
    daemon.kill();
    for port in 1..=REQUESTS {
        assert!(!held.reaches(port));
    }
    daemon.start();
    let after = totals(&daemon);
    tell!("{before} before, {after} after");
    let more = |name: &str| after[name].as_u64().unwrap() - before[name].as_u64().unwrap();
    assert_eq!(more("decided"), u64::from(REQUESTS));
    assert_eq!(more("logged") + more("lost"), u64::from(REQUESTS), "each port is asked for once");
    assert!(more("logged") > 0 && more("lost") > 0, "there is room for some");
    let is_refusal =
        |record: &&Value| record["verdict"] == "deny" && record["workload"]["name"] == "held";
    let logged = || daemon.records().iter().skip(since).filter(is_refusal).count() as u64;
    wait_until("what was kept is in the log", || logged() >= more("logged"));
    assert_eq!(logged(), more("logged"));
    wait_until("the log says how many are missing", || is_all_told(&daemon));
    assert_chain(&daemon);
}

#[test]
fn a_stopped_daemon() {
    let mut scene = Scene::new();
    let since = scene.daemon.records().len();
    let given = scene.grant_briefly();
    signal(scene.daemon.pid(), Signal::SIGSTOP);
    let mut asked = Running::start(&mut scene.daemon.command(["status"]));
    scene.holds_without_a_daemon(given);
    let answer = asked.wait(PATIENCE).expect("nobody waits for ever");
    assert!(answer.stderr.contains("does not answer"), "{answer:?}");
    signal(scene.daemon.pid(), Signal::SIGCONT);
    scene.tells_all(since);
}

#[test]
fn a_daemon_in_a_frozen_cgroup() {
    let mut scene = Scene::new();
    let since = scene.daemon.records().len();
    let given = scene.grant_briefly();
    let cgroup = scene.daemon.cgroup("frozen");
    fs::write(cgroup.path().join("cgroup.procs"), scene.daemon.pid().to_string()).unwrap();
    let frozen = |now: &str| {
        fs::write(cgroup.path().join("cgroup.freeze"), now).unwrap();
        let state = format!("frozen {now}");
        wait_until("the cgroup is frozen, or not", || {
            let events = fs::read_to_string(cgroup.path().join("cgroup.events")).unwrap();
            events.lines().any(|line| line == state)
        });
    };
    frozen("1");
    scene.holds_without_a_daemon(given);
    frozen("0");
    scene.tells_all(since);
}

/// A cgroup of the memory controller, wherever that is; dropped, it goes.
struct MemoryCgroup {
    path: PathBuf,
    limit: &'static str,
    events: &'static str,
}

impl MemoryCgroup {
    fn new(name: &str) -> Self {
        let first = Path::new("/sys/fs/cgroup/memory");
        let (root, limit, events) = if first.join("memory.limit_in_bytes").exists() {
            (first, "memory.limit_in_bytes", "memory.oom_control")
        } else {
            let root = Path::new("/sys/fs/cgroup");
            fs::write(root.join("cgroup.subtree_control"), "+memory")
                .expect("the memory controller can be had; this kernel has none");
            (root, "memory.max", "memory.events")
        };
        let path = root.join(name);
        fs::create_dir(&path).unwrap();
        Self { path, limit, events }
    }

    fn holds(&self, pid: u32, limit: &str) {
        fs::write(self.path.join("cgroup.procs"), pid.to_string()).unwrap();
        fs::write(self.path.join(self.limit), limit).unwrap();
    }

    /// How often the kernel ended something in it for want of memory.
    fn kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join(self.events)).unwrap();
        let line = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.and_then(|count| count.parse().ok()).unwrap_or(0)
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        for _ in 0..200 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        eprintln!("{} is left behind", self.path.display());
    }
}

#[test]
fn a_daemon_that_runs_out_of_memory() {
    let mut scene = Scene::new();
    let since = scene.daemon.records().len();
    let given = scene.grant_briefly();
    let memory = MemoryCgroup::new(&scene.daemon.cgroup_name("memory"));
    memory.holds(scene.daemon.pid(), "2M");
    // More than fits to read.
    let comment = format!("# {}\n", "x".repeat(70));
    scene.daemon.write_text("large", &comment.repeat(10_000));
    let ended = scene.daemon.ended(PATIENCE).expect("the kernel ends it");
    assert_eq!(ended.status.signal(), Some(Signal::SIGKILL as i32), "{ended:?}");
    assert_eq!(memory.kills(), 1, "the kernel ended it for want of memory");
    scene.holds_without_a_daemon(given);
    scene.daemon.remove("large");
    scene.daemon.start();
    scene.tells_all(since);
}

#[test]
fn a_full_disk_under_state_and_log() {
    let daemon = Daemon::installed();
    let small = SmallDisk::mount(&daemon.path("small"), "512k");
    let log = small.path().join("audit.log");
    daemon.configure(|config| {
        config["state_directory"] = json!(small.path());
        config["audit"]["output"] = json!(log);
    });
    let mut scene = Scene::of(daemon);
    small.fill();
    let given = scene.grant_briefly();
    // Something new to write down, in each of the two.
    assert!(!scene.held.reaches(scene.other.port()));
    let gaps = |daemon: &Daemon| daemon.status().expect("it answers")["gaps"].to_string();
    wait_until("the state that is not written is shown", || {
        gaps(&scene.daemon).contains("a restart would not know the latest changes")
    });
    wait_until("the log that is not written is shown", || {
        gaps(&scene.daemon).contains("the audit log can not be written")
    });
    assert!(scene.daemon.metric("agentguard_audit_write_failures_total") > 0.0);
    // Who revokes is told that it would be forgotten.
    let held = identity("held");
    let extra = ["grant", "--to", &held, "--scope", "test:granted", "--ttl", "1h"];
    let mut extra = scene.daemon.command(extra);
    extra.args(["--reason", "a test", "--name", "extra"]);
    run(&mut extra, PATIENCE).expect_success("grant");
    let revoked = scene.daemon.run(["revoke", "extra", "--reason", "a test"]);
    assert!(!revoked.status.success(), "{revoked:?}");
    assert!(revoked.stderr.contains("would not be after a restart"), "{revoked:?}");
    scene.holds_without_a_daemon(given);
    // A revocation with nowhere to write it is in force all the same.
    let granted = scene.granted.port();
    scene.daemon.remove("granted");
    wait_until("changes are taken", || !scene.held.reaches(granted));
    small.clear();
    wait_until("there is room and all is written", || {
        let gaps = gaps(&scene.daemon);
        !gaps.contains("latest changes") && !gaps.contains("audit log")
    });
    // Killed now, the next one knows all of it.
    scene.daemon.kill();
    let log = fs::read_to_string(&log).unwrap();
    assert!(log.contains("\"expired\""), "what happened on the full disk is told");
    scene.daemon.start();
    assert!(!scene.held.reaches(granted) && !scene.held.reaches(scene.brief.port()));
    scene.traffic.goes_on(100);
    assert_totals(&scene.daemon);
    let Scene { mut daemon, traffic, held, .. } = scene;
    drop((traffic, held));
    wait_until("its workloads end", || daemon.workloads().is_empty());
    daemon.stop();
    daemon.run(["uninstall"]).expect_success("uninstall");
    drop(small);
    daemon.configure(|_| {});
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the kernel's limits are not ours")]
fn limit(pid: u32, resource: Resource, soft: rlim_t, hard: rlim_t) {
    let name = match resource {
        Resource::RLIMIT_NOFILE => "--nofile",
        Resource::RLIMIT_FSIZE => "--fsize",
        _ => unreachable!("no test limits it"),
    };
    let hard = if hard == rlim_t::MAX { "unlimited".to_owned() } else { hard.to_string() };
    let soft = if soft == rlim_t::MAX { "unlimited".to_owned() } else { soft.to_string() };
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &pid.to_string(), &format!("{name}={soft}:{hard}")]);
    run(&mut prlimit, PATIENCE).expect_success("prlimit");
}

#[test]
fn a_daemon_without_descriptors() {
    let mut scene = Scene::new();
    let since = scene.daemon.records().len();
    let given = scene.grant_briefly();
    let pid = scene.daemon.pid();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let usual: Vec<rlim_t> = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .map(|line| line.split_whitespace().filter_map(|word| word.parse().ok()).collect())
        .unwrap();
    // Nothing more can be opened: no manifest, no procfs, no connection.
    limit(pid, Resource::RLIMIT_NOFILE, 3, usual[1]);
    scene.daemon.write("other", &[grant("other", &identity("held"), "test:granted")]);
    scene.holds_without_a_daemon(given);
    assert!(scene.daemon.ended(Duration::ZERO).is_none(), "it lives on");
    limit(pid, Resource::RLIMIT_NOFILE, usual[0], usual[1]);
    wait_until("it answers again", || scene.daemon.status().is_some());
    wait_until("it takes changes again", || {
        scene.daemon.json(["grants"]).to_string().contains("\"other\"")
    });
    scene.tells_all(since);
}

#[test]
fn a_daemon_whose_files_may_not_grow() {
    let mut scene = Scene::new();
    let since = scene.daemon.records().len();
    let given = scene.grant_briefly();
    let pid = scene.daemon.pid();
    limit(pid, Resource::RLIMIT_FSIZE, 0, rlim_t::MAX);
    assert!(!scene.held.reaches(scene.other.port()));
    wait_until("the log that is not written is shown", || {
        let gaps = scene.daemon.status().expect("it lives on")["gaps"].to_string();
        gaps.contains("the audit log can not be written")
    });
    scene.holds_without_a_daemon(given);
    limit(pid, Resource::RLIMIT_FSIZE, rlim_t::MAX, rlim_t::MAX);
    scene.tells_all(since);
}

/// What is asked of a daemon until it dies of it: everything that changes what is in force.
struct Pesterer<'a> {
    daemon: &'a Daemon,
    agent: &'a str,
    round: u32,
}

impl Pesterer<'_> {
    fn pester(&mut self) {
        self.round += 1;
        let documents = match self.round % 2 {
            0 => vec![],
            _ => vec![grant("flipping", self.agent, "test:flipping")],
        };
        self.daemon.write("flipping", &documents);
        // As a user, whose `exec` goes through the daemon or not at all.
        let mut exec = self.daemon.command_of_user(["exec", "--", "true"]);
        let _answer = run(&mut exec, PATIENCE);
    }
}

/// The points that a daemon passes which finds the kernel half of its own build in force.
fn points_of_a_restart() -> impl Iterator<Item = &'static str> {
    let others = ["load.", "takeover.", "audit.", "uninstall.", "give_way."];
    let is_other = move |point: &str| others.iter().any(|of| point.starts_with(of));
    let points = fault::POINTS.iter().copied();
    points.filter(move |point| !is_other(point) || *point == "load.adopted")
}

#[test]
fn a_workload_that_gives_way_to_one_around_it_is_held_wherever_that_is_cut_short() {
    let mut daemon = Daemon::installed();
    let (granted, other) = (Reachable::start(), Reachable::start());
    let (outer, inner) = (identity("outer"), identity("inner"));
    let around = daemon.cgroup("outer");
    let cgroup = around.child("inner");
    let pattern = format!("/{}", daemon.cgroup_name("outer"));
    daemon.write("scope", &[scope("test:granted", granted.port())]);
    let grants = [("outer", &outer), ("inner", &inner)]
        .map(|(name, agent)| grant(name, agent, "test:granted"));
    daemon.write("grant", &grants);
    let selected = workload("inner", &format!("{pattern}/inner"), &inner, "enforce");
    daemon.write("inner", &[selected]);
    let identity_now = |daemon: &Daemon| daemon.json(["workloads"])[0]["identity"].clone();
    let mut held = Prober::in_cgroup(&cgroup);
    for point in ["add.compiled", "hold.tag", "hold.captured", "give_way.added", "remove.released"]
    {
        daemon.start();
        wait_until("it is held", || identity_now(&daemon) == json!(inner));
        assert!(held.reaches(granted.port()) && !held.reaches(other.port()), "{point}");
        daemon.kill();
        // With what lies around it, which a daemon finds that dies of it.
        daemon.write("outer", &[workload("outer", &pattern, &outer, "enforce")]);
        daemon.launch(&[(fault::VARIABLE, point)]);
        let ended = daemon.ended(PATIENCE).unwrap_or_else(|| panic!("{point} is not passed"));
        assert_eq!(ended.status.signal(), Some(Signal::SIGKILL as i32), "{point}: {ended:?}");
        for _ in 0..20 {
            assert!(!held.reaches(other.port()), "{point}: it got out");
            assert!(held.reaches(granted.port()), "{point}: what is granted is refused");
        }
        daemon.start();
        wait_until("it is the other's", || identity_now(&daemon) == json!(outer));
        assert_eq!(daemon.workloads().len(), 1, "{point}");
        assert!(held.reaches(granted.port()) && !held.reaches(other.port()), "{point}");
        daemon.kill();
        daemon.remove("outer");
    }
}

#[test]
fn a_daemon_that_dies_at_any_step_leaves_the_old_or_the_new() {
    let mut scene = Scene::new();
    let pattern = format!("/{}", scene.daemon.cgroup_name("extra-*"));
    let extra = workload("extra", &pattern, &identity("extra"), "enforce");
    scene.daemon.write("extra", &[extra]);
    let mut extras: Vec<(Cgroup, Prober)> = Vec::new();
    scene.daemon.kill();
    let begin = Instant::now();
    for point in points_of_a_restart() {
        // What ends and what begins: one cgroup goes, another comes.
        extras.clear();
        let cgroup = scene.daemon.cgroup(&format!("extra-{}", point.replace('.', "-")));
        let prober = Prober::in_cgroup(cgroup.path());
        extras.push((cgroup, prober));
        scene.daemon.launch(&[(fault::VARIABLE, point)]);
        let start = Instant::now();
        let mut round = 0;
        let ended = loop {
            if let Some(ended) = scene.daemon.ended(Duration::from_millis(100)) {
                break ended;
            }
            assert!(start.elapsed() < PATIENCE, "{point} is not passed: {}", scene.daemon.said());
            let mut pesterer = Pesterer { daemon: &scene.daemon, agent: &scene.agent, round };
            pesterer.pester();
            round = pesterer.round;
        };
        let died = start.elapsed();
        assert_eq!(ended.status.signal(), Some(Signal::SIGKILL as i32), "{point}: {ended:?}");
        scene.traffic.goes_on(20);
        assert!(scene.held.reaches(scene.granted.port()), "{point}");
        assert!(!scene.held.reaches(scene.other.port()), "{point}");

        scene.daemon.start();
        scene.traffic.goes_on(20);
        let (_, prober) = &mut extras[0];
        wait_until("what came meanwhile is held", || !prober.reaches(scene.other.port()));
        assert_totals(&scene.daemon);
        tell!("{point}: died after {died:?}, whole again after {:?}", start.elapsed());
        scene.daemon.kill();
    }
    scene.daemon.start();
    drop(extras);
    tell!("all points in {:?}", begin.elapsed());
    let Scene { daemon, traffic, held, targets, agent, .. } = scene;
    let reports = traffic.stop();
    assert_right(&targets, &reports);
    print_totals(&targets, &reports);
    assert_reconciles(&daemon, &agent, &targets, &reports);
    assert_chain(&daemon);
    drop(held);
    wait_until("nothing is left of what was begun", || daemon.workloads().is_empty());
    daemon.write("flipping", &[]);
    wait_until("what is left is what the manifests say", || {
        daemon.json(["grants"]).as_array().map(Vec::len) == Some(2)
    });
}

#[test]
fn a_daemon_that_dies_while_it_sets_up_is_followed_by_one_that_holds() {
    let other = Reachable::start();
    let points = fault::POINTS.iter().filter(|point| point.starts_with("load."));
    for point in points.filter(|point| **point != "load.adopted") {
        let mut daemon = Daemon::installed();
        let cgroup = daemon.cgroup("held");
        let mut prober = Prober::in_cgroup(cgroup.path());
        let pattern = format!("/{}", daemon.cgroup_name("held"));
        daemon.write("held", &[workload("held", &pattern, &identity("held"), "enforce")]);
        daemon.launch(&[(fault::VARIABLE, point)]);
        let ended = daemon.ended(PATIENCE).unwrap_or_else(|| panic!("{point} is not passed"));
        assert_eq!(ended.status.signal(), Some(Signal::SIGKILL as i32), "{point}: {ended:?}");
        daemon.start();
        wait_until("it is held", || !prober.reaches(other.port()));
        assert_totals(&daemon);
    }
}

/// What is taken away in part is whole again with the next start, and gone after the next removal.
#[test]
fn a_removal_that_is_cut_short_leaves_what_can_be_started_and_removed() {
    let other = Reachable::start();
    for point in fault::POINTS.iter().filter(|point| point.starts_with("uninstall.")) {
        let mut daemon = Daemon::started();
        let cgroup = daemon.cgroup("held");
        let mut prober = Prober::in_cgroup(cgroup.path());
        let pattern = format!("/{}", daemon.cgroup_name("held"));
        daemon.write("held", &[workload("held", &pattern, &identity("held"), "enforce")]);
        wait_until("it is held", || !prober.reaches(other.port()));
        let given = |daemon: &Daemon| daemon.status().expect("it answers")["protection"].clone();
        let before = given(&daemon);
        daemon.kill();
        let removed = run(daemon.command(["uninstall"]).env(fault::VARIABLE, point), PATIENCE);
        assert_eq!(removed.status.signal(), Some(Signal::SIGKILL as i32), "{point}: {removed:?}");
        if *point != "uninstall.unready" {
            // The kernel detaches a moment after the pin is gone.
            wait_until("nothing holds it", || prober.reaches(other.port()));
        }

        daemon.start();
        wait_until("it is held again", || !prober.reaches(other.port()));
        assert_eq!(given(&daemon), before, "{point}");
        let gaps = daemon.status().expect("it answers")["gaps"].to_string();
        assert!(!gaps.contains("is not held by"), "{point}: {gaps}");
        daemon.kill();
        daemon.run(["uninstall"]).expect_success("uninstall");
        wait_until("nothing holds it any more", || prober.reaches(other.port()));
        assert!(!daemon.pins().exists(), "{point}");
    }
}

/// Whatever a rotation of the audit log was at, `audit verify` finds nothing missing but what the log says
/// that it removed.
#[test]
fn a_daemon_that_dies_while_its_log_rotates_leaves_one_that_verifies() {
    for point in fault::POINTS.iter().filter(|point| point.starts_with("audit.")) {
        let mut daemon = Daemon::installed();
        daemon.configure(|config| {
            config["audit"]["max_file_bytes"] = json!(1_048_576);
            config["audit"]["max_files"] = json!(2);
        });
        // From the second rotation on, files are removed.
        let armed = format!("{point}@3");
        daemon.launch(&[(fault::VARIABLE, &armed)]);
        wait_until("it runs", || daemon.status().is_some());
        let mut held = Prober::start_by(daemon.command(["exec", "--name", "held"]));
        let mut ports = (1..=u16::MAX).cycle();
        let begin = Instant::now();
        let ended = loop {
            assert!(begin.elapsed() < 4 * PATIENCE, "{point} is not passed");
            for port in ports.by_ref().take(50) {
                assert!(!held.reaches(port));
            }
            if let Some(ended) = daemon.ended(Duration::ZERO) {
                break ended;
            }
        };
        assert_eq!(ended.status.signal(), Some(Signal::SIGKILL as i32), "{point}: {ended:?}");
        daemon.start();
        assert_chain(&daemon);
        let directory = daemon.audit_log().parent().expect("it is in one").to_owned();
        let names = fs::read_dir(directory).unwrap().flatten().map(|entry| entry.file_name());
        let files = names.filter(|name| name.to_string_lossy().starts_with("audit.log")).count();
        assert!(files <= 2, "{point}: {files} files");
        tell!("{point}: died after {:?}", begin.elapsed());
    }
}
