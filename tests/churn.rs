//! Row G5 of the threat model, and the resources of a daemon that runs for long: workloads come and
//! go by the thousand and leave nothing; tables that are full deny, and say so.

use std::{
    collections::BTreeSet,
    fmt, fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use agentguard::datapath::doors;
use agentguard_tests::{
    daemon::{Daemon, Prober, Reachable, grant, identity, scope, workload},
    run, tell, wait_until,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);
/// How much a daemon's memory may grow between two equal moments: what an allocator keeps.
const SLACK: u64 = 6 << 20;

/// What a daemon keeps of the latest by design: the recent records, and room that an allocator does not
/// give back after the first 250 workloads at once.
const KEPT: u64 = 24 << 20;

/// When everything is forgotten that is gone, on a busy machine too.
const FORGOTTEN: Duration = Duration::from_secs(24);

/// What a daemon uses, and what it has put into the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Uses {
    descriptors: usize,
    resident: u64,
    threads: usize,
    pins: usize,
    cgroups: usize,
    state: u64,
    tables: Vec<(String, u64)>,
    held: Held,
}

/// What the kernel has of agentguard, whoever holds it: by the numbers that it gave, of which each is
/// given once.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    programs: BTreeSet<u64>,
    maps: BTreeSet<u64>,
    links: BTreeSet<u64>,
}

impl Held {
    fn now() -> Self {
        let list = |kind| -> Vec<Value> {
            let mut bpftool = Command::new("bpftool");
            let listed = run(bpftool.args(["--json", kind, "show"]), PATIENCE);
            let listed = listed.expect_success("bpftool (set-up installs it)").stdout;
            serde_json::from_str(&listed).unwrap_or_else(|error| panic!("{error}: {listed}"))
        };
        let number = |one: &Value| one["id"].as_u64().expect("it has a number");
        let names: BTreeSet<&str> = doors()
            .iter()
            .flat_map(|door| [Some(door.program), door.gate_program()])
            .flatten()
            .collect();
        let programs = list("prog");
        let programs = || {
            programs
                .iter()
                .filter(|program| program["name"].as_str().is_some_and(|name| names.contains(name)))
        };
        let numbers: BTreeSet<u64> = programs().map(number).collect();
        let maps = programs().flat_map(|program| program["map_ids"].as_array());
        let of_programs = |link: &&Value| {
            link["prog_id"].as_u64().is_some_and(|program| numbers.contains(&program))
        };
        Self {
            maps: maps.flatten().filter_map(Value::as_u64).collect(),
            links: list("link").iter().filter(of_programs).map(number).collect(),
            programs: numbers,
        }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { programs, maps, links } = self;
        write!(f, "{} programs, {} maps, {} links", programs.len(), maps.len(), links.len())
    }
}

impl Uses {
    fn of(daemon: &Daemon) -> Self {
        let process = PathBuf::from(format!("/proc/{}", daemon.pid()));
        let status = fs::read_to_string(process.join("status")).unwrap();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let tables = daemon.metrics("agentguard_map_entries");
        Self {
            descriptors: count(&process.join("fd")),
            resident: field("VmRSS:") << 10,
            threads: usize::try_from(field("Threads:")).unwrap(),
            pins: pins(&daemon.pins()),
            cgroups: count(&daemon.exec_cgroups()),
            state: fs::metadata(daemon.path("state/state.json")).map_or(0, |file| file.len()),
            tables: tables.into_iter().map(|(labels, value)| (labels, value as u64)).collect(),
            held: Held::now(),
        }
    }

    /// Fails when more is used than before.
    #[track_caller]
    fn assert_no_more_than(&self, before: &Self) {
        tell!("before: {before}\nafter:  {self}");
        assert!(!self.held.programs.is_empty() && !self.held.maps.is_empty(), "bpftool knows none");
        assert_eq!(self.held, before.held, "programs, maps or links leak");
        assert!(self.descriptors <= before.descriptors + 2, "descriptors leak");
        assert!(self.resident <= before.resident + SLACK, "memory leaks");
        // Threads that wait for blocking work come and go.
        assert!(self.threads <= before.threads + 16, "threads leak");
        assert_eq!(self.pins, before.pins, "pins leak");
        assert!(self.cgroups <= before.cgroups, "cgroups leak");
        assert!(self.state <= before.state + 2048, "the state grows");
        assert_eq!(self.tables, before.tables, "rows leak");
    }
}

impl fmt::Display for Uses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { descriptors, resident, threads, pins, cgroups, state, tables, held } = self;
        write!(
            f,
            "{held}, {descriptors} descriptors, {} KiB resident, {threads} threads, {pins} pins, {cgroups} cgroups, {state} bytes of state, rows",
            resident >> 10
        )?;
        for (labels, rows) in tables {
            write!(f, " {labels}={rows}")?;
        }
        Ok(())
    }
}

fn count(directory: &std::path::Path) -> usize {
    fs::read_dir(directory).into_iter().flatten().count()
}

/// Every pin, in all directories below.
fn pins(directory: &std::path::Path) -> usize {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| if entry.path().is_dir() { pins(&entry.path()) } else { 1 })
        .sum()
}

/// By the metric, which costs no command and waits for as long as the daemon is at work.
fn workloads(daemon: &Daemon) -> u64 {
    daemon.metric("agentguard_workloads") as u64
}

/// Waits until what was retired is swept.
fn settle(daemon: &Daemon) {
    wait_until("no workload is left", || workloads(daemon) == 0);
    // Rows go a second after the switch, words after twenty.
    thread::sleep(FORGOTTEN);
}

/// Makes and removes cgroups that a manifest selects; returns how many were held.
fn come_and_go(daemon: &Daemon, rounds: u32, at_once: u64) -> u64 {
    let mut held = 0;
    for _ in 0..rounds {
        let cgroups: Vec<_> =
            (0..at_once).map(|number| daemon.cgroup(&format!("churn-{number}"))).collect();
        wait_until("all are held", || workloads(daemon) == at_once);
        held += at_once;
        drop(cgroups);
        wait_until("all are gone", || workloads(daemon) == 0);
    }
    held
}

#[test]
fn five_thousand_workloads_come_and_go_and_leave_nothing() {
    const AT_ONCE: u64 = 250;
    let daemon = Daemon::started();
    let server = Reachable::start();
    let agent = identity("churn");
    let pattern = format!("/{}", daemon.cgroup_name("churn-*"));
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.write("grant", &[grant("server", &agent, "test:server")]);
    daemon.write("w", &[workload("churn", &pattern, &agent, "enforce")]);
    wait_until("the manifests are read", || daemon.metric("agentguard_manifest_errors") < 0.5);
    let first = Uses::of(&daemon);
    // What is kept of the latest has its full size after the first of them.
    let mut all = come_and_go(&daemon, 8, AT_ONCE);
    settle(&daemon);
    let before = Uses::of(&daemon);
    let start = Instant::now();
    all += come_and_go(&daemon, 12, AT_ONCE);
    tell!("{all} workloads, the last {} in {:?}", all - 8 * AT_ONCE, start.elapsed());
    assert!(all >= 5000);
    settle(&daemon);
    let after = Uses::of(&daemon);
    after.assert_no_more_than(&before);
    // Before any of them there was as much, but for what is kept of the latest.
    assert!(after.resident <= first.resident + KEPT, "memory leaks");
    let Uses { resident, .. } = first;
    Uses { resident, ..after }.assert_no_more_than(&first);
}

/// One of everything that happens to a daemon, as often as in an hour of a busy node.
fn hour(daemon: &Daemon, agent: &str, part: u32) {
    for round in 0..25 {
        let name = format!("run-{part}-{round}");
        let documents =
            if round % 2 == 0 { vec![] } else { vec![grant("g", agent, "test:server")] };
        daemon.write("flipping", &documents);
        // An identity of its own, its grant and its cgroup; with a cgroup made inside.
        let script = "mkdir $(sed -n 's,^0::,/sys/fs/cgroup/unified,p' /proc/self/cgroup)/inner 2>/dev/null; exit 0";
        let mut exec = daemon.command(["exec", "--name", &name, "--scope", "test:server", "--"]);
        run(exec.args(["bash", "-c", script]), PATIENCE).expect_success("exec");
        let ends = format!("given-{part}-{round}");
        let arguments = ["grant", "--to", agent, "--scope", "test:server", "--ttl", "1h"];
        let mut give = daemon.command(arguments);
        run(give.args(["--reason", "a test", "--name", &ends]), PATIENCE).expect_success("grant");
        let (status, _) = daemon.http("/metrics");
        assert_eq!(status, 200);
        daemon.run(["explain", "--last"]);
        daemon.run(["revoke", &ends, "--reason", "a test"]).expect_success("revoke");
        if round % 8 == 0 {
            daemon.write_text("wrong", "kind: [");
        } else if round % 8 == 4 {
            daemon.remove("wrong");
        }
    }
}

#[test]
fn a_busy_daemon_uses_no_more_after_an_hour() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:server", server.port())]);
    let mut held = Prober::start_by(daemon.command(["exec", "--identity", &agent]));
    daemon.write_text("wrong", "kind: [");
    hour(&daemon, &agent, 0);
    let settled = |daemon: &Daemon| {
        daemon.write("flipping", &[]);
        wait_until("only one workload is left", || workloads(daemon) == 1);
        thread::sleep(FORGOTTEN);
        Uses::of(daemon)
    };
    let before = settled(&daemon);
    let start = Instant::now();
    for part in 1..3 {
        hour(&daemon, &agent, part);
    }
    tell!("two more hours in {:?}", start.elapsed());
    let after = settled(&daemon);
    assert!(!held.reaches(server.port()));
    // A grant that was revoked is shown for a day, and so is in the state.
    let revoked = 50 * 700;
    let after = Uses { state: after.state.saturating_sub(revoked), ..after };
    after.assert_no_more_than(&before);
}

#[test]
fn tables_that_are_full_let_nothing_through_and_say_so() {
    let mut daemon = Daemon::installed();
    let (granted, other) = (Reachable::start(), Reachable::start());
    let agent = identity("held");
    daemon.configure(|config| {
        config["datapath"] = json!({"maps": {"cgroups": 8, "verdict_cache": 16, "workloads": 2}});
    });
    daemon.write("scope", &[scope("test:granted", granted.port())]);
    daemon.write("grant", &[grant("granted", &agent, "test:granted")]);
    daemon.start();
    let mut held =
        Prober::start_by(daemon.command(["exec", "--identity", &agent, "--name", "held"]));
    // More cgroups than the table holds, each with the process in it once.
    let cgroup = daemon.exec_cgroups().join("held");
    for number in 0..20 {
        let child = cgroup.join(format!("child-{number}"));
        fs::create_dir(&child).unwrap();
        fs::write(child.join("cgroup.procs"), held.pid().to_string()).unwrap();
        assert!(!held.reaches(other.port()), "in child {number}");
    }
    let row = |table: &str| {
        let rows = daemon.metrics("agentguard_map_entries");
        let labelled = format!("\"{table}\"");
        rows.iter().find(|(labels, _)| labels.contains(&labelled)).map(|(_, rows)| *rows as u64)
    };
    assert_eq!(row("cgroups"), Some(8), "the table is full");
    // More destinations than the cache holds.
    for port in 1..64 {
        assert!(!held.reaches(port));
    }
    fs::write(cgroup.join("cgroup.procs"), held.pid().to_string()).unwrap();
    assert!(held.reaches(granted.port()), "what is granted passes where there is room");
    // What is selected and does not fit is refused everything, and is told of.
    let outside: Vec<_> = (0..3).map(|number| daemon.cgroup(&format!("more-{number}"))).collect();
    let mut more: Vec<Prober> =
        outside.iter().map(|cgroup| Prober::in_cgroup(cgroup.path())).collect();
    let pattern = format!("/{}", daemon.cgroup_name("more-*"));
    daemon.write("more", &[workload("more", &pattern, &identity("more"), "enforce")]);
    for prober in &mut more {
        wait_until("what does not fit is refused", || !prober.reaches(other.port()));
    }
    wait_until("it is said", || {
        let gaps = daemon.status().expect("it answers")["gaps"].to_string();
        gaps.contains("is refused everything")
    });
}
