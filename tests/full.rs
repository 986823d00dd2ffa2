//! Row G5 of the threat model: each table of the kernel half, made small by the configuration and
//! filled. What finds no room is denied, and it is said which table is full, how large it is, and what
//! makes room.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use agentguard_tests::{
    Layer,
    daemon::{Daemon, Prober, Reachable, grant, identity, scope, scope_of, workload},
    requires, run, wait_until,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

/// An installation with a table of this size, and with what else is to be small.
fn small(maps: &Value) -> Daemon {
    let daemon = Daemon::installed();
    daemon.configure(|config| config["datapath"] = json!({"maps": maps}));
    daemon
}

fn gaps(daemon: &Daemon) -> String {
    daemon.status().expect("it answers")["gaps"].to_string()
}

/// Waits until `status` says that a table is full, how large it is and what to do. What fills the table
/// of processes comes and goes, so that the rest is looked for in the very answer that says so.
#[track_caller]
fn is_said(daemon: &Daemon, table: &str, capacity: u32, remedy: &str) {
    let mut said = String::new();
    wait_until(&format!("it is said that {table} is full"), || {
        said = gaps(daemon);
        said.contains(&format!("table {table} is full"))
    });
    for part in [&format!("room for {capacity} rows"), remedy] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
}

/// A row of a gauge of tables.
#[track_caller]
fn gauge(daemon: &Daemon, name: &str, table: &str) -> u64 {
    let rows = daemon.metrics(name);
    let label = format!("map=\"{table}\"");
    let row = rows.iter().find(|(labels, _)| labels.contains(&label));
    row.unwrap_or_else(|| panic!("{name} has no {table}: {rows:?}")).1 as u64
}

/// Records of what was denied because a table had no room.
fn without_room(daemon: &Daemon) -> usize {
    daemon.records().iter().filter(|record| record["reason"] == "missing_table").count()
}

/// A grant that is too large for a table permits nothing: not even what of it would fit, among which is
/// the port `other`. What was in force stays.
fn is_not_in_force_in_part(key: &str, table: &str, room: u32, much: impl Fn(u16) -> Value) {
    let mut daemon = small(&json!({key: room}));
    let (granted, other) = (Reachable::start(), Reachable::start());
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:granted", granted.port())]);
    daemon.write("grant", &[grant("granted", &agent, "test:granted")]);
    daemon.start();
    assert_eq!(gauge(&daemon, "agentguard_map_capacity", key), u64::from(room));
    let mut held =
        Prober::start_by(daemon.command(["exec", "--identity", &agent, "--name", "held"]));
    assert!(held.reaches(granted.port()) && !held.reaches(other.port()));
    let failures = || daemon.metric("agentguard_reconcile_failures_total");
    assert!(failures().abs() < f64::EPSILON);

    daemon.write("much", &[much(other.port()), grant("much", &agent, "test:much")]);
    is_said(&daemon, table, room, &format!("make datapath.maps.{key} larger and restart"));
    assert!(failures() > 0.0);
    assert!(daemon.said().contains(&format!("table {table} is full")), "{}", daemon.said());
    for _ in 0..20 {
        assert!(!held.reaches(other.port()), "a part of it is in force");
        assert!(held.reaches(granted.port()), "what was in force is not any more");
    }
    let mut exec = daemon.command(["exec", "--identity", &agent, "--", "bash", "-c"]);
    let ran = run(exec.arg("/usr/bin/id >/dev/null"), PATIENCE);
    assert!(!ran.status.success(), "what it permits to run does: {ran:?}");
    daemon.kill();
    assert!(!held.reaches(other.port()) && held.reaches(granted.port()));
    daemon.start();
    // The next daemon has nothing to go on from but what is granted, which finds no room.
    assert!(!held.reaches(other.port()));
    is_said(&daemon, table, room, key);

    daemon.remove("much");
    wait_until("what is granted passes", || held.reaches(granted.port()));
    assert!(!held.reaches(other.port()));
    assert!(!gaps(&daemon).contains("is full"), "{}", gaps(&daemon));
}

fn blocks(number: u32) -> Vec<Value> {
    (0..number).map(|host| json!({"ipBlock": {"cidr": format!("192.0.2.{host}/32")}})).collect()
}

/// To a port of loopback, and to run a program.
fn with_more(port: u16, mut more: Value) -> Value {
    let to = json!([{"ipBlock": {"cidr": "127.0.0.1/32"}}]);
    let here = json!({"to": to, "ports": [{"protocol": "TCP", "port": port}]});
    match more["egress"].as_array_mut() {
        Some(egress) => egress.insert(0, here),
        None => more["egress"] = json!([here]),
    }
    match more["exec"].as_array_mut() {
        Some(exec) => exec.insert(0, json!({"path": "/usr/bin/id"})),
        None => more["exec"] = json!([{"path": "/usr/bin/id"}]),
    }
    scope_of("test:much", more)
}

#[test]
fn a_grant_that_finds_no_room_for_its_destinations() {
    is_not_in_force_in_part("destinations", "DESTINATIONS", 16, |port| {
        let ports = json!([{"protocol": "TCP", "port": 9}]);
        with_more(port, json!({"egress": [{"to": blocks(20), "ports": ports}]}))
    });
}

#[test]
fn a_grant_that_finds_no_room_for_its_rules() {
    is_not_in_force_in_part("rules", "RULES", 16, |port| {
        let rule = |(port, block): (u32, Value)| json!({"to": [block], "ports": [{"protocol": "TCP", "port": port}]});
        let egress: Vec<Value> = (1..).zip(blocks(20)).map(rule).collect();
        with_more(port, json!({"egress": egress}))
    });
}

#[test]
fn a_grant_that_finds_no_room_for_its_executables() {
    let programs: Vec<Value> = fs::read_dir("/usr/bin")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| json!({"path": entry.path()}))
        .take(40)
        .collect();
    // What `exec` is asked to run has a row too.
    is_not_in_force_in_part("executables", "EXECUTABLES", 16, |port| {
        with_more(port, json!({"exec": programs}))
    });
}

/// What an earlier daemon wrote makes room for what the next one writes, and until then it is what counts:
/// a restart refuses nobody what fits by itself.
#[test]
fn a_restart_with_a_table_more_than_half_full_refuses_nobody() {
    let mut daemon = small(&json!({"destinations": 64}));
    let (granted, other) = (Reachable::start(), Reachable::start());
    let mut blocks = blocks(9);
    blocks.push(json!({"ipBlock": {"cidr": "127.0.0.1/32"}}));
    let ports = json!([{"protocol": "TCP", "port": granted.port()}]);
    let egress = json!({"egress": [{"to": blocks, "ports": ports}]});
    daemon.write("scope", &[scope_of("test:granted", egress)]);
    let agents = [0, 1, 2, 3, 4].map(|number| identity(&format!("agent-{number}")));
    let grants: Vec<Value> = agents
        .iter()
        .enumerate()
        .map(|(number, agent)| grant(&format!("granted-{number}"), agent, "test:granted"))
        .collect();
    daemon.write("grants", &grants);
    daemon.start();
    let start = |agent: &String| Prober::start_by(daemon.command(["exec", "--identity", agent]));
    let mut held: Vec<Prober> = agents.iter().map(start).collect();
    wait_until("all are permitted", || held.iter_mut().all(|held| held.reaches(granted.port())));
    assert!(gauge(&daemon, "agentguard_map_entries", "destinations") > 32, "more than half full");
    for _ in 0..2 {
        daemon.kill();
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for held in &mut held {
                scope.spawn(|| {
                    while !is_over.load(Ordering::Relaxed) {
                        assert!(held.reaches(granted.port()), "what was granted is refused");
                        assert!(!held.reaches(other.port()), "what was not passes");
                    }
                });
            }
            daemon.start();
            thread::sleep(Duration::from_secs(3));
            is_over.store(true, Ordering::Relaxed);
        });
        assert!(!gaps(&daemon).contains("full"), "{}", gaps(&daemon));
    }
}

/// A directory that goes.
fn sockets(daemon: &Daemon, number: u32) -> Vec<Value> {
    let directory = daemon.path("sockets");
    fs::create_dir_all(&directory).unwrap();
    let path = |number| directory.join(format!("{number}.sock"));
    (0..number).map(|number| json!({"path": path(number)})).collect()
}

#[test]
fn a_grant_that_finds_no_room_for_its_unix_sockets() {
    let elsewhere = Daemon::installed();
    let sockets = sockets(&elsewhere, 20);
    is_not_in_force_in_part("unix_sockets", "UNIX_SOCKETS", 16, |port| {
        with_more(port, json!({"unixSockets": sockets}))
    });
}

#[test]
fn names_of_unix_sockets_that_find_no_room_are_told_of() {
    let mut daemon = small(&json!({"unix_names": 4}));
    daemon.start();
    let sockets = sockets(&daemon, 6);
    daemon.write("scope", &[scope_of("test:sockets", json!({"unixSockets": sockets}))]);
    is_said(&daemon, "UNIX_NAMES", 4, "make datapath.maps.unix_names larger and restart");
    assert!(gaps(&daemon).contains("unix sockets are not granted"));
    assert_eq!(gauge(&daemon, "agentguard_map_entries", "unix_names"), 4);
    assert_eq!(gauge(&daemon, "agentguard_map_capacity", "unix_names"), 4);
}

#[test]
fn workloads_that_find_no_room_are_refused_everything() {
    let mut daemon = small(&json!({"workloads": 1}));
    let granted = Reachable::start();
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:granted", granted.port())]);
    daemon.write("grant", &[grant("granted", &agent, "test:granted")]);
    daemon.start();
    let cgroups = ["one", "two"].map(|name| daemon.cgroup(name));
    let mut probers = cgroups.each_ref().map(|cgroup| Prober::in_cgroup(cgroup.path()));
    let pattern = format!("/{}", daemon.cgroup_name("*"));
    daemon.write("w", &[workload("some", &pattern, &agent, "enforce")]);
    is_said(&daemon, "WORKLOADS", 1, "make datapath.maps.workloads larger and restart");
    assert!(gaps(&daemon).contains("is refused everything"));
    let reached = probers.iter_mut().filter_map(|one| one.reaches(granted.port()).then_some(()));
    assert_eq!(reached.count(), 1, "one has room, and the other nothing at all");
    // Each as what it is: in the list, and in the gauges.
    let listed = daemon.json(["workloads"]);
    let listed: Vec<&str> =
        listed.as_array().unwrap().iter().filter_map(|one| one["protection"].as_str()).collect();
    assert_eq!(listed.len(), 2, "{listed:?}");
    let whole = protection(&daemon, &agent, "portable", "full");
    let in_part = protection(&daemon, &agent, "portable", "partial");
    assert_eq!((whole, in_part), (1, 1));
    wait_until("the denials are recorded", || without_room(&daemon) > 0);
}

#[test]
fn what_takes_over_and_finds_no_room_lets_nothing_go() {
    let mut daemon = small(&json!({"cgroups": 8, "workloads": 2}));
    let (granted, other) = (Reachable::start(), Reachable::start());
    let (inner, outer) = (identity("inner"), identity("outer"));
    daemon.write("scope", &[scope("test:granted", granted.port())]);
    let grants = [("inner", &inner), ("outer", &outer)]
        .map(|(name, agent)| grant(name, agent, "test:granted"));
    daemon.write("grant", &grants);
    let around = daemon.cgroup("outer");
    let cgroup = around.child("inner");
    let pattern = format!("/{}", daemon.cgroup_name("outer"));
    let selected = workload("inner", &format!("{pattern}/inner"), &inner, "enforce");
    daemon.write("inner", &[selected]);
    daemon.start();
    let mut held = Prober::in_cgroup(&cgroup);
    assert!(held.reaches(granted.port()) && !held.reaches(other.port()));
    let names = |daemon: &Daemon| {
        let listed = daemon.json(["workloads"]);
        let names = listed.as_array().unwrap().iter().map(|one| one["name"].clone());
        names.collect::<Vec<_>>()
    };
    for is_taken_back in [true, false] {
        let more: Vec<_> = (0..24).map(|number| around.child(&format!("more-{number}"))).collect();
        daemon.write("outer", &[workload("outer", &pattern, &outer, "enforce")]);
        wait_until("it is said", || gaps(&daemon).contains("outer is refused everything"));
        for _ in 0..20 {
            assert!(!held.reaches(other.port()), "it is let go where there is no room");
        }
        if is_taken_back {
            daemon.remove("outer");
            wait_until("it is the first one's again", || names(&daemon) == ["inner"]);
            assert!(!held.reaches(other.port()) && held.reaches(granted.port()));
        }
        for cgroup in more {
            fs::remove_dir(cgroup).unwrap();
        }
    }
    wait_until("it is taken over where there is room", || names(&daemon) == ["outer"]);
    assert!(!held.reaches(other.port()) && held.reaches(granted.port()));
    let tells = daemon.said().matches("a workload is not held; trying again").count();
    assert_eq!(tells, 2, "once for each time: {}", daemon.said());
}

/// How many workloads of an identity a layer holds so far.
fn protection(daemon: &Daemon, identity: &str, layer: &str, protection: &str) -> u64 {
    let rows = daemon.metrics("agentguard_workload_protection");
    let labels = [("identity", identity), ("layer", layer), ("protection", protection)]
        .map(|(name, value)| format!("{name}=\"{value}\""));
    let row = rows.iter().find(|(row, _)| labels.iter().all(|label| row.contains(label)));
    row.unwrap_or_else(|| panic!("{labels:?} is not in {rows:?}")).1 as u64
}

#[test]
fn a_workload_is_held_though_others_made_cgroups_until_there_was_no_room() {
    let mut daemon = small(&json!({"cgroups": 4, "workloads": 3}));
    let (granted, other) = (Reachable::start(), Reachable::start());
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:granted", granted.port())]);
    daemon.write("grant", &[grant("granted", &agent, "test:granted")]);
    daemon.start();
    let first = Prober::start_by(daemon.command(["exec", "--name", "first"]));
    let cgroup = daemon.exec_cgroups().join("first");
    for number in 0..6 {
        fs::create_dir(cgroup.join(format!("child-{number}"))).unwrap();
    }
    is_said(&daemon, "CGROUPS", 4, "make datapath.maps.cgroups larger");
    assert_eq!(gauge(&daemon, "agentguard_map_entries", "cgroups"), 4);
    assert_eq!(gauge(&daemon, "agentguard_map_capacity", "cgroups"), 4);
    wait_until("it is recorded", || without_room(&daemon) > 0);

    let brought = daemon.cgroup("brought");
    let (mut prober, ran) = (Prober::in_cgroup(brought.path()), daemon.path("ran"));
    let pattern = format!("/{}", daemon.cgroup_name("brought"));
    daemon.write("w", &[workload("brought", &pattern, &agent, "enforce")]);
    wait_until("it is held", || !prober.reaches(other.port()));
    assert!(prober.reaches(granted.port()), "{}", gaps(&daemon));
    assert_eq!(runs_in(brought.path(), &ran), "no", "what it runs is judged");

    // More cgroups than places are kept: it is not held whole, and then to nothing it was granted.
    let whole = daemon.cgroup("unheld");
    for number in 0..6 {
        fs::create_dir(whole.path().join(format!("child-{number}"))).unwrap();
    }
    let mut unheld = Prober::in_cgroup(whole.path());
    let pattern = format!("/{}", daemon.cgroup_name("*"));
    daemon.write("w", &[workload("brought", &pattern, &agent, "enforce")]);
    wait_until("it is refused what is granted", || !unheld.reaches(granted.port()));
    for _ in 0..30 {
        assert!(!unheld.reaches(granted.port()), "while it is tried again too");
        assert!(prober.reaches(granted.port()));
    }
    wait_until("it is said", || gaps(&daemon).contains("is refused everything"));
    drop(first);
    for number in 0..6 {
        let _gone_already = fs::remove_dir(cgroup.join(format!("child-{number}")));
        fs::remove_dir(whole.path().join(format!("child-{number}"))).unwrap();
    }
    wait_until("it is held whole once there is room", || unheld.reaches(granted.port()));
    assert!(!unheld.reaches(other.port()));
    assert!(!gaps(&daemon).contains("is full"), "{}", gaps(&daemon));
}

/// Whether a program that is not granted runs in a cgroup.
fn runs_in(cgroup: &Path, mark: &Path) -> &'static str {
    let script =
        format!("echo $$ > {}/cgroup.procs && /usr/bin/touch {}", cgroup.display(), mark.display());
    let _refused = run(Command::new("bash").args(["-c", &script]), PATIENCE);
    if mark.exists() { "yes" } else { "no" }
}

#[test]
fn processes_that_find_no_room_are_ended_or_held_and_told_of() {
    const ROOM: u32 = 24;
    let mut daemon = small(&json!({"tasks": ROOM}));
    let (granted, other) = (Reachable::start(), Reachable::start());
    daemon.write("scope", &[scope("test:granted", granted.port())]);
    daemon.start();
    let out = daemon.path("out");
    // Twice as many as there is room for, each of which tries to get out.
    let script = format!(
        "for number in {{1..{}}}; do ( for turn in {{1..20}}; do \
         (exec 3<>/dev/tcp/127.0.0.1/{}) 2>/dev/null && echo $number >> {}; read -t 0.2 <> <(:); done ) & done; wait",
        2 * ROOM,
        other.port(),
        out.display()
    );
    let mut exec = daemon.command(["exec", "--name", "many", "--scope", "test:granted", "--"]);
    let mut running = agentguard_tests::Running::start(exec.args(["bash", "-c", &script]));
    is_said(&daemon, "TASKS", ROOM, "make datapath.maps.tasks larger");
    assert_eq!(gauge(&daemon, "agentguard_map_capacity", "tasks"), u64::from(ROOM));
    wait_until("it is recorded", || without_room(&daemon) > 0);
    let _ended = running.wait(PATIENCE);
    running.kill();
    assert!(!out.exists(), "{:?} got out", fs::read_to_string(&out));
}

#[test]
fn programs_that_run_containers_and_find_no_room_are_told_of() {
    let mut daemon = Daemon::installed();
    let programs: Vec<_> = fs::read_dir("/usr/bin")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        .map(|entry| entry.path())
        .take(90)
        .collect();
    daemon.configure(|config| config["containers"] = json!({"runtime_programs": programs}));
    daemon.start();
    is_said(&daemon, "RUNTIMES", 64, "name fewer programs in containers.runtime_programs");
    assert_eq!(gauge(&daemon, "agentguard_map_entries", "runtimes"), 64);
}

#[test]
fn identities_beyond_the_rows_of_counters_share_one_and_it_is_counted() {
    let mut daemon = Daemon::installed();
    let other = Reachable::start();
    daemon.configure(|config| config["metrics"]["max_identities"] = json!(1));
    daemon.start();
    let identities = ["one", "two", "three"].map(identity);
    let mut probers = identities
        .each_ref()
        .map(|agent| Prober::start_by(daemon.command(["exec", "--identity", agent])));
    for prober in &mut probers {
        assert!(!prober.reaches(other.port()));
    }
    assert_eq!(daemon.metric("agentguard_identities_unlabelled") as u64, 2);
    let denied: f64 = daemon
        .metrics("agentguard_verdicts_total")
        .iter()
        .filter(|(labels, _)| labels.contains("verdict=\"deny\""))
        .map(|(_, count)| count)
        .sum();
    assert!(denied >= 3.0, "what shares a row is counted: {denied}");
}

mod lsm {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_unix_socket_whose_name_finds_no_room_is_denied() {
        requires(Layer::Lsm);
        let mut daemon = small(&json!({"unix_names": 2}));
        daemon.start();
        let sockets = sockets(&daemon, 4);
        let agent = identity("agent");
        daemon.write(
            "scope",
            &[
                scope_of(
                    "test:sockets",
                    json!({"unixSockets": sockets, "exec": [{"path": "/usr/bin/perl"}]}),
                ),
                grant("sockets", &agent, "test:sockets"),
            ],
        );
        is_said(&daemon, "UNIX_NAMES", 2, "datapath.maps.unix_names");
        let servers: Vec<_> = sockets
            .iter()
            .map(|socket| UnixListener::bind(socket["path"].as_str().unwrap()).unwrap())
            .collect();
        let reached = sockets.iter().filter(|socket| {
            let script =
                "use IO::Socket::UNIX; exit(IO::Socket::UNIX->new(Peer => $ARGV[0]) ? 0 : 1)";
            let mut exec =
                daemon.command(["exec", "--identity", &agent, "--", "perl", "-e", script]);
            run(exec.arg(socket["path"].as_str().unwrap()), PATIENCE).status.success()
        });
        assert_eq!(reached.count(), 2, "those that have a number");
        drop(servers);
        let denied = |record: &Value| {
            record["verdict"] == "deny" && record["request"].to_string().contains(".sock")
        };
        wait_until("the others are recorded", || daemon.records().iter().any(denied));
    }
}
