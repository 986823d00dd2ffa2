//! What the daemon promises whoever runs it: manifests, grants, restarts, users, evidence.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use agentguard_tests::{
    Layer, Running, SmallDisk,
    daemon::{
        Daemon, Prober, Reachable, USER, grant, identity, program, scope, scope_of, workload,
    },
    requires, run, scrape,
    traffic::{Expected, Kind, Target, Traffic, assert_right},
    wait_until,
};
use caps::Capability;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);
/// Between the rounds of what a busy workload does.
const PAUSE: Duration = Duration::from_millis(1);
/// Within which a change of a manifest must be in force.
const IN_FORCE: Duration = Duration::from_millis(100);

/// How long `condition` took to hold.
#[track_caller]
fn until(what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn file_errors(daemon: &Daemon) -> usize {
    let status = daemon.status().expect("the daemon answers");
    status["totals"]["manifests"]["errors"].as_array().map_or(0, Vec::len)
}

#[test]
fn a_change_of_a_manifest_is_in_force_within_100_ms() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:server", server.port())]);
    let mut exec = daemon.command(["exec", "--identity", &agent]);
    exec.stderr(Stdio::inherit());
    let mut prober = Prober::start_by(exec);
    assert!(!prober.reaches(server.port()));
    let mut given = Vec::new();
    let mut taken = Vec::new();
    for _ in 0..15 {
        daemon.write("grant", &[grant("server", &agent, "test:server")]);
        given.push(until("a grant permits", || prober.reaches(server.port())));
        daemon.remove("grant");
        taken.push(until("no grant denies", || !prober.reaches(server.port())));
    }
    println!("in force: a grant after {given:?}, its end after {taken:?}");
    let (given, taken) = (median(given), median(taken));
    println!("in force, median: a grant after {given:?}, its end after {taken:?}");
    assert!(given < IN_FORCE && taken < IN_FORCE);
}

#[test]
fn what_is_wrong_in_a_manifest_changes_nothing_and_is_shown() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.write("grant", &[grant("server", &agent, "test:server")]);
    let mut prober = Prober::start_by(daemon.command(["exec", "--identity", &agent]));
    until("the grant permits", || prober.reaches(server.port()));
    assert_eq!(file_errors(&daemon), 0);
    assert!(daemon.metric("agentguard_manifest_errors").abs() < f64::EPSILON);

    daemon.write_text("grant", "kind: [not a manifest");
    daemon.write_text("other", "apiVersion: agentguard.dev/v1alpha1\nkind: Grant\nspec: {}\n");
    until("the errors are shown", || file_errors(&daemon) >= 2);
    assert!(daemon.metric("agentguard_manifest_errors") >= 2.0);
    let status = daemon.run(["status"]).expect_success("status");
    assert!(status.stdout.contains("grant.yaml:"), "{}", status.stdout);
    for _ in 0..20 {
        assert!(prober.reaches(server.port()), "the last good document is in force");
    }
    let recorded = |record: &Value| record["kind"] == "manifest_error";
    wait_until("the error is recorded", || daemon.records().iter().any(recorded));

    daemon.remove("other");
    daemon.write("grant", &[]);
    until("a valid file without grants takes them away", || !prober.reaches(server.port()));
    until("the errors are gone", || file_errors(&daemon) == 0);
}

#[test]
fn a_file_that_is_being_written_says_what_it_said_before() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:server", server.port())]);
    let document = grant("server", &agent, "test:server");
    daemon.write("grant", std::slice::from_ref(&document));
    let mut prober = Prober::start_by(daemon.command(["exec", "--identity", &agent]));
    until("the grant permits", || prober.reaches(server.port()));

    // Emptied, and for a while half written.
    let mut file = File::create(daemon.manifest("grant")).unwrap();
    let text = format!("{document:#}");
    let (first, second) = text.split_at(text.len() / 2);
    let start = Instant::now();
    for part in [first, second] {
        // The other file's change makes the daemon read while this one is not whole.
        daemon.write("unrelated", &[scope("test:unrelated", 1)]);
        while start.elapsed() < Duration::from_millis(1500) && part == first {
            assert!(prober.reaches(server.port()), "after {:?}", start.elapsed());
        }
        file.write_all(part.as_bytes()).unwrap();
        for _ in 0..50 {
            assert!(prober.reaches(server.port()));
        }
    }
    assert_eq!(file_errors(&daemon), 0);
    drop(file);
    fs::write(daemon.manifest("grant"), "").unwrap();
    until("the end of writing counts", || !prober.reaches(server.port()));
}

#[test]
fn cgroups_that_a_manifest_selects_are_held_with_what_runs_in_them() {
    let daemon = Daemon::started();
    let (server, other) = (Reachable::start(), Reachable::start());
    let agent = identity("selected");
    let first = daemon.cgroup("first");
    let mut running = Prober::in_cgroup(first.path());
    assert!(running.reaches(server.port()) && running.reaches(other.port()));
    let pattern = format!("/{}", daemon.cgroup_name("*"));
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.write("grant", &[grant("server", &agent, "test:server")]);
    daemon.write("workload", &[workload("selected", &pattern, &agent, "enforce")]);
    let held = until("what runs already is held", || !running.reaches(other.port()));
    assert!(running.reaches(server.port()), "what is granted is permitted");

    let later = daemon.cgroup("later");
    let tagged = until("a cgroup made later is a workload's", || daemon.workloads().len() == 2);
    let mut newcomer = Prober::in_cgroup(later.path());
    assert!(!newcomer.reaches(other.port()));
    assert!(newcomer.reaches(server.port()));
    println!("held after {held:?}; a cgroup made later after {tagged:?} (with one CLI run)");

    daemon.remove("workload");
    until("nobody's without the manifest", || running.reaches(other.port()));
    until("the other too", || newcomer.reaches(other.port()));
    assert_eq!(daemon.workloads(), Vec::<String>::new());
}

#[test]
fn a_cgroup_that_is_gone_is_no_workload_any_more() {
    let daemon = Daemon::started();
    let pattern = format!("/{}", daemon.cgroup_name("*"));
    daemon.write("w", &[workload("gone", &pattern, &identity("gone"), "enforce")]);
    let cgroup = daemon.cgroup("one");
    until("it is a workload", || daemon.workloads().len() == 1);
    drop(cgroup);
    until("it is gone", || daemon.workloads().is_empty());
    let _again = daemon.cgroup("one");
    until("one of the same name is another", || daemon.workloads().len() == 1);
}

#[test]
fn a_change_of_mode_or_identity_leaves_no_gap() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    let cgroup = daemon.cgroup("held");
    let mut prober = Prober::in_cgroup(cgroup.path());
    let pattern = format!("/{}", daemon.cgroup_name("held"));
    let write = |identity: &str, mode: &str| {
        daemon.write("w", &[workload("held", &pattern, identity, mode)]);
    };
    let identity_now = || daemon.json(["workloads"])[0]["identity"].clone();
    write(&identity("one"), "audit");
    until("it is a workload", || daemon.workloads().len() == 1);
    assert!(prober.reaches(server.port()), "audit lets through");
    write(&identity("one"), "enforce");
    let enforced = until("enforce refuses", || !prober.reaches(server.port()));
    println!("enforced after {enforced:?}");
    // While the identity goes back and forth, nothing gets out.
    let mut probes = 0;
    for round in 0..10 {
        let now = identity(if round % 2 == 0 { "two" } else { "one" });
        write(&now, "enforce");
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(150) {
            assert!(!prober.reaches(server.port()), "a gap in round {round}");
            probes += 1;
        }
        wait_until("the change is shown", || identity_now() == json!(now));
    }
    println!("{probes} probes, none got out");
    write(&identity("two"), "audit");
    until("audit lets through again", || prober.reaches(server.port()));
}

#[test]
fn a_workload_around_others_and_those_in_another_take_over_without_a_gap() {
    let daemon = Daemon::started();
    let (server, other) = (Reachable::start(), Reachable::start());
    let (outer, inner) = (identity("outer"), identity("inner"));
    let around = daemon.cgroup("outer");
    let cgroups = ["one", "two"].map(|name| around.child(name));
    let mut spec = scope("test:server", server.port())["spec"].clone();
    spec["exec"] = json!([{"path": "/bin/true"}]);
    daemon.write("scope", &[scope_of("test:server", spec)]);
    let granted = [("outer", &outer), ("inner", &inner)]
        .map(|(name, agent)| grant(name, agent, "test:server"));
    daemon.write("grant", &granted);
    let workload_of = |name: &str, agent: &str, below: &str| {
        let pattern = format!("/{}{below}", daemon.cgroup_name("outer"));
        workload(name, &pattern, agent, "enforce")
    };
    daemon.write("inner", &[workload_of("inner", &inner, "/*")]);
    let identities = || -> Vec<Value> {
        let workloads = daemon.json(["workloads"]);
        workloads.as_array().unwrap().iter().map(|known| known["identity"].clone()).collect()
    };
    let is_held_by = |agent: &str| {
        let number = if agent == outer { 1 } else { cgroups.len() };
        until("it is the workload's", || identities() == vec![json!(agent); number]);
    };
    is_held_by(&inner);
    let place = |port: u16| format!("127.0.0.1:{port}");
    let targets = [
        Target::new(Kind::Tcp, Expected::Passed, place(server.port())),
        Target::new(Kind::Tcp, Expected::Refused, place(other.port())),
        Target::new(Kind::Exec, Expected::Passed, "/bin/true"),
        Target::new(Kind::Exec, Expected::Refused, "/usr/bin/id"),
    ];
    // Nobody's until it is moved.
    let at_first = targets.clone().map(|target| Target { expected: Expected::Either, ..target });
    let procs = cgroups.each_ref().map(|cgroup| cgroup.join("cgroup.procs"));
    let mut traffics = procs.each_ref().map(|procs| {
        let traffic = Traffic::start(Command::new("env"), PAUSE, &at_first);
        fs::write(procs, traffic.pid().to_string()).unwrap();
        traffic
    });
    // One that runs and forks nothing until the end.
    let elsewhere = daemon.cgroup("elsewhere");
    let mut leaver = Command::new("bash")
        .args(["--norc", "-c", "echo; read -r _; echo $$ > \"$0\"; read -r _"])
        .arg(elsewhere.path().join("cgroup.procs"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    leaver.stdout.as_mut().unwrap().read_exact(&mut [0]).expect("it runs");
    fs::write(&procs[1], leaver.id().to_string()).unwrap();
    for (number, target) in targets.iter().enumerate() {
        traffics.iter_mut().for_each(|traffic| traffic.expect(number, target.expected));
    }
    for _ in 0..10 {
        daemon.write("outer", &[workload_of("outer", &outer, "")]);
        is_held_by(&outer);
        traffics.iter_mut().for_each(|traffic| traffic.goes_on(20));
        daemon.remove("outer");
        is_held_by(&inner);
        traffics.iter_mut().for_each(|traffic| traffic.goes_on(20));
    }
    for traffic in traffics {
        let reports = traffic.stop();
        assert_right(&targets, &reports);
        println!("{reports:#?}");
    }
    // It is tied to whose it is now: moving itself out ends it.
    let mut ask = leaver.stdin.take().unwrap();
    ask.write_all(b"go\n").unwrap();
    let ended = leaver.wait().unwrap();
    assert_eq!(ended.signal(), Some(9), "{ended}");
    drop(ask);
    daemon.remove("inner");
    let mut prober = Prober::in_cgroup(&cgroups[0]);
    until("nobody's without a manifest", || prober.reaches(other.port()));
}

#[test]
fn grants_revocations_and_workloads_survive_a_killed_daemon() {
    let mut daemon = Daemon::installed();
    let (server, other) = (Reachable::start(), Reachable::start());
    daemon
        .write("scopes", &[scope("test:server", server.port()), scope("test:other", other.port())]);
    daemon.start();
    let agent = identity("agent");
    let mut exec = daemon.command(["exec", "--identity", &agent, "--name", "survivor"]);
    exec.args(["--scope", "test:server"]);
    let mut prober = Prober::start_by(exec);
    assert!(prober.reaches(server.port()));
    let give = |name: &str| {
        let arguments = ["grant", "--to", &agent, "--scope", "test:other", "--ttl", "1h"];
        let mut command = daemon.command(arguments);
        command.args(["--reason", "a test", "--name", name]);
        run(&mut command, PATIENCE).expect_success("grant");
    };
    give("kept");
    give("revoked");
    daemon.run(["revoke", "revoked", "--reason", "enough"]).expect_success("revoke");
    assert!(prober.reaches(other.port()));

    daemon.kill();
    assert!(prober.reaches(server.port()) && prober.reaches(other.port()));
    let third = Reachable::start();
    assert!(!prober.reaches(third.port()), "enforced without a daemon");
    daemon.start();

    assert!(prober.reaches(server.port()) && prober.reaches(other.port()));
    assert!(!prober.reaches(third.port()));
    assert_eq!(daemon.workloads(), ["survivor"]);
    let states = || -> Vec<(String, String)> {
        let list = daemon.json(["grants"]);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let grants = list.as_array().unwrap().iter();
        grants.map(|grant| (text(&grant["id"]), text(&grant["state"]))).collect()
    };
    let expected = [("exec-survivor", "active"), ("kept", "active"), ("revoked", "revoked")];
    assert_eq!(states(), expected.map(|(id, state)| (id.to_owned(), state.to_owned())));

    daemon.run(["revoke", "kept", "--reason", "enough"]).expect_success("revoke");
    assert!(!prober.reaches(other.port()), "a revocation is in force when it is answered");
    daemon.kill();
    daemon.start();
    assert!(!prober.reaches(other.port()));

    let port = third.port();
    let meanwhile = |record: &Value| {
        record["verdict"] == "deny" && record["request"].to_string().contains(&port.to_string())
    };
    wait_until("what was denied meanwhile is recorded", || daemon.records().iter().any(meanwhile));
    for record in daemon.records().iter().filter(|record| record["kind"] == "verdict") {
        assert_eq!(record["workload"]["identity"], json!(agent), "{record}");
        assert_eq!(record["workload"]["name"], "survivor", "{record}");
    }
    let scopes: BTreeSet<String> = daemon
        .records()
        .iter()
        .filter(|record| record["verdict"] == "allow")
        .filter_map(|record| Some(record["scope"].as_str()?.to_owned()))
        .collect();
    assert!(scopes.contains("test:server") && scopes.contains("test:other"), "{scopes:?}");
    drop(prober);
    until("the workload ends with its process", || daemon.workloads().is_empty());
    daemon.stop();
    let log = daemon.audit_log();
    let verified = run(daemon.command(["audit", "verify"]).arg(&log), PATIENCE);
    assert!(verified.status.success(), "{verified:?}");
}

#[test]
fn a_workload_that_ended_while_no_daemon_was_there_is_named_in_its_last_records() {
    let mut daemon = Daemon::started();
    let server = Reachable::start();
    let mut prober = Prober::start_by(daemon.command(["exec", "--name", "short"]));
    daemon.kill();
    assert!(!prober.reaches(server.port()));
    drop(prober);
    let cgroup = daemon.exec_cgroups().join("short");
    wait_until("its cgroup is empty", || {
        let events = fs::read_to_string(cgroup.join("cgroup.events")).unwrap_or_default();
        events.is_empty() || events.contains("populated 0")
    });
    fs::remove_dir(&cgroup).unwrap();
    daemon.start();
    let denied = |record: &Value| record["verdict"] == "deny";
    wait_until("the denial is recorded", || daemon.records().iter().any(denied));
    let records = daemon.records();
    let record = records.iter().find(|record| denied(record)).unwrap();
    assert_eq!(record["workload"]["name"], "short", "{record}");
    assert_eq!(daemon.workloads(), Vec::<String>::new());
    assert_eq!(daemon.json(["grants"]), json!([]));
}

#[test]
fn a_manifest_that_went_while_no_daemon_was_there_lets_go_and_a_broken_one_does_not() {
    let mut daemon = Daemon::started();
    let server = Reachable::start();
    let cgroup = daemon.cgroup("held");
    let mut prober = Prober::in_cgroup(cgroup.path());
    let pattern = format!("/{}", daemon.cgroup_name("held"));
    daemon.write("w", &[workload("held", &pattern, &identity("held"), "enforce")]);
    until("it is held", || !prober.reaches(server.port()));
    wait_until("it is written down", || {
        fs::read_to_string(daemon.path("state/state.json"))
            .is_ok_and(|state| state.contains("held"))
    });
    daemon.kill();
    daemon.write_text("w", "kind: [broken");
    daemon.start();
    assert!(!prober.reaches(server.port()), "a slip of the pen lets nobody out");
    daemon.kill();
    daemon.remove("w");
    daemon.start();
    assert!(prober.reaches(server.port()));
    assert_eq!(daemon.workloads(), Vec::<String>::new());
}

#[test]
fn a_user_confines_what_is_its_own_and_nothing_else() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    daemon.write("scope", &[scope("test:server", server.port())]);
    let own = identity(&format!("user/{USER}/bash"));
    until("the scope is known", || {
        daemon.run_as_user(["exec", "--scope", "test:server", "--", "true"]).status.success()
    });
    let mut first = Prober::start_by(daemon.command_of_user(["exec", "--scope", "test:server"]));
    let mut second = Prober::start_by(daemon.command_of_user(["exec"]));
    assert!(first.reaches(server.port()));
    assert!(!second.reaches(server.port()), "the second is not widened by the first's scope");
    let mut root = Prober::start_by(daemon.command(["exec", "--name", "roots"]));
    assert!(!root.reaches(server.port()));

    wait_until("the command that asked for the scope is gone", || {
        !daemon.workloads().iter().any(|name| name == "true")
    });
    let listed = daemon.run_as_user(["workloads", "--output", "json"]).expect_success("workloads");
    let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
    let identities: BTreeSet<&str> =
        listed.as_array().unwrap().iter().filter_map(|one| one["identity"].as_str()).collect();
    let expected = [own.clone(), format!("{own}-2")];
    assert_eq!(identities, expected.iter().map(String::as_str).collect());

    for arguments in [
        &["exec", "--identity", "spiffe://daemon.test/ns/prod", "--", "true"][..],
        &["exec", "--identity", "spiffe://daemon.test/user/0/bash", "--", "true"],
        &["exec", "--identity", &own, "--", "true"],
        &["grant", "--to", &own, "--scope", "test:server", "--ttl", "1h", "--reason", "mine"],
        &["revoke", "exec-bash", "--reason", "mine"],
    ] {
        let refused = daemon.run_as_user(arguments);
        assert!(!refused.status.success(), "{arguments:?}: {refused:?}");
        assert!(!refused.stderr.is_empty());
    }
    let others = ["explain", "--workload", "roots", "--connect", "127.0.0.1:1/TCP"];
    assert!(!daemon.run_as_user(others).status.success());
    let denied = |daemon: &Daemon| {
        daemon.records().iter().filter(|record| record["verdict"] == "deny").count()
    };
    wait_until("both denials are recorded", || denied(&daemon) >= 2);
    let events = daemon.run_as_user(["events", "--denied", "--output", "json"]);
    let events = events.expect_success("events").stdout;
    assert!(events.contains(&own) && !events.contains("roots"), "{events}");
    let all = daemon.run(["events", "--denied", "--output", "json"]).expect_success("events");
    assert!(all.stdout.contains("roots"), "{}", all.stdout);

    drop((first, second, root));
    until("all workloads end", || daemon.workloads().is_empty());
    assert_eq!(daemon.json(["grants"]), json!([]));
}

#[test]
fn a_workload_is_refused_everything_by_the_control_socket() {
    let daemon = Daemon::started();
    let scope = scope_of("test:cli", json!({"exec": [{"path": program()}]}));
    daemon.write("scope", &[scope]);
    let arguments = ["exec", "--scope", "test:cli", "--"];
    until("the scope is known", || {
        let mut command = daemon.command(arguments);
        run(command.arg(program()).arg("--version"), PATIENCE).status.success()
    });
    for inside in [
        &["status"][..],
        &["workloads"],
        &["grants"],
        &["events"],
        &["explain", "--last"],
        &["exec", "--", "true"],
        &["grant", "--to", "spiffe://daemon.test/x", "--scope", "a", "--never", "--reason", "r"],
    ] {
        let mut command = daemon.command(arguments);
        let refused = run(command.arg(program()).args(inside), PATIENCE);
        assert_eq!(refused.status.code(), Some(77), "{inside:?}: {refused:?}");
    }
}

#[test]
fn the_last_refusal_is_explained_with_the_command_that_permits_it() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    daemon.write("scope", &[scope("test:server", server.port())]);
    let mut prober = Prober::start_by(daemon.command_of_user(["exec", "--name", "curious"]));
    until("the scope is known", || {
        daemon.run(["exec", "--scope", "test:server", "--", "true"]).status.success()
    });
    assert!(!prober.reaches(server.port()));
    let explain = || daemon.run(["explain", "--last", "--output", "json"]);
    wait_until("it is explained", || explain().stdout.contains("curious"));
    let last: Value = serde_json::from_str(&explain().stdout).unwrap();
    let last = &last["explanation"];
    assert_eq!(last["reason"], "not_granted", "{last}");
    assert_eq!(last["permitting_scopes"], json!(["test:server"]), "{last}");
    let remedy = last["remedy"][0].as_str().unwrap_or_else(|| panic!("{last}"));
    println!("{remedy}");
    let path = program();
    let mut shell = Command::new("bash");
    shell.args(["-c", remedy]).env("AGENTGUARD_CONFIG", daemon.config());
    shell.env("PATH", format!("{}:/usr/bin:/bin", path.parent().unwrap().display()));
    run(&mut shell, PATIENCE).expect_success("the remedy");
    assert!(prober.reaches(server.port()), "the remedy permits it");

    // To the user who may not grant, also when the command has ended.
    let script = "exec 3<>/dev/tcp/127.0.0.1/1";
    let ended = daemon.run_as_user(["exec", "--name", "ended", "--", "bash", "-c", script]);
    assert!(!ended.status.success());
    until("it ends", || !daemon.workloads().contains(&"ended".to_owned()));
    let explained = daemon.run_as_user(["explain", "--last", "--workload", "ended"]);
    let explained = explained.expect_success("explain").stdout;
    assert!(explained.contains("127.0.0.1:1/TCP"), "{explained}");
    assert!(explained.contains("no scope permits it"), "{explained}");
}

#[test]
fn explain_says_what_the_kernel_does() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    let port = server.port();
    let closed = json!({"protocol": "TCP", "port": port});
    daemon.write("scopes", &[
        scope_of("test:block", json!({
            "egress": [{
                "to": [{"ipBlock": {"cidr": "127.0.0.0/8", "except": ["127.0.0.66/32"]}}],
                "ports": [closed, {"protocol": "UDP", "port": port}],
            }],
            "listen": [{"protocol": "TCP", "port": 7999}],
            "exec": [{"path": "/usr/bin/env"}],
        })),
        scope_of("test:everywhere", json!({"egress": [{
            "to": [{"ipBlock": {"cidr": "160.0.0.0/3"}}, {"ipBlock": {"cidr": "192.0.2.0/24"}}],
            "ports": [{"protocol": "TCP", "port": 80}],
        }]})),
    ]);
    let agent = identity("agent");
    until("the scopes are known", || {
        let arguments = ["grant", "--to", &agent, "--scope", "test:block", "--ttl", "1h"];
        let mut command = daemon.command(arguments);
        command.args(["--reason", "a test", "--name", "block"]);
        run(&mut command, PATIENCE).status.success()
    });
    let arguments = ["grant", "--to", &agent, "--scope", "test:everywhere", "--ttl", "8s"];
    let mut command = daemon.command(arguments);
    command.args(["--reason", "a test", "--name", "everywhere"]);
    run(&mut command, PATIENCE).expect_success("grant");
    let _holder =
        Prober::start_by(daemon.command(["exec", "--identity", &agent, "--name", "held"]));

    let explain = |option: &str, target: &str| {
        let value = daemon.json(["explain", "--workload", "held", option, target]);
        let reason = value["reason"].as_str().unwrap_or("allow").to_owned();
        (reason, value)
    };
    // What perl is refused, by the kernel, in words of `explain`.
    let attempt = |code: &str| {
        let mut command = daemon.command(["exec", "--identity", &agent, "--", "perl"]);
        let script = format!(
            "use Socket; sub a {{ pack_sockaddr_in($_[1], inet_aton($_[0])) }} \
             socket(T,PF_INET,SOCK_STREAM,0); socket(U,PF_INET,SOCK_DGRAM,0); \
             $! = 0; my $ok = {code}; exit($ok ? 0 : $!{{EPERM}} ? 77 : 3);"
        );
        run(command.args(["-MSocket", "-MErrno", "-e", &script]), PATIENCE).status
    };
    let other = port.wrapping_add(1).to_string();
    for (option, target, code, expected) in [
        (
            "--connect",
            format!("127.0.0.1:{port}/TCP"),
            format!("connect(T,a('127.0.0.1',{port}))"),
            "allow",
        ),
        (
            "--connect",
            format!("127.0.0.1:{other}/TCP"),
            format!("connect(T,a('127.0.0.1',{other}))"),
            "port_not_granted",
        ),
        (
            "--connect",
            format!("127.0.0.66:{port}/TCP"),
            format!("connect(T,a('127.0.0.66',{port}))"),
            "excepted",
        ),
        (
            "--connect",
            "169.254.169.254:80/TCP".to_owned(),
            "connect(T,a('169.254.169.254',80))".to_owned(),
            "metadata",
        ),
        (
            "--send",
            format!("127.0.0.1:{port}/UDP"),
            format!("send(U,'x',0,a('127.0.0.1',{port}))"),
            "allow",
        ),
        (
            "--send",
            "192.0.2.9:53/UDP".to_owned(),
            "send(U,'x',0,a('192.0.2.9',53))".to_owned(),
            "port_not_granted",
        ),
        ("--bind", "7999/TCP".to_owned(), "bind(T,a('0.0.0.0',7999))".to_owned(), "allow"),
        (
            "--bind",
            "7998/TCP".to_owned(),
            "bind(T,a('0.0.0.0',7998))".to_owned(),
            "port_not_granted",
        ),
    ] {
        let (reason, value) = explain(option, &target);
        let status = attempt(&code);
        println!("{option} {target}: explained {reason}, the kernel {status}");
        let kernel_refused = status.code() == Some(77);
        assert_eq!(kernel_refused, reason != "allow", "{option} {target}: {status} but {value}");
        assert_eq!(value["refused"], json!(kernel_refused), "{value}");
        // Which reason that one has depends on whether the second grant has ended.
        let has_ended = target.starts_with("192") && reason == "expired";
        assert!(reason == expected || has_ended, "{option} {target}: {value}");
    }
    // Exec: what is denied is killed.
    let exec = |path: &str| {
        let mut command = daemon.command(["exec", "--identity", &agent, "--", "bash", "-c"]);
        run(command.arg(format!("{path} >/dev/null; exit $?")), PATIENCE).status.code()
    };
    assert_eq!(explain("--exec", "/usr/bin/env").0, "allow");
    assert_eq!(exec("/usr/bin/env"), Some(0));
    assert_eq!(explain("--exec", "/usr/bin/id").0, "not_granted");
    assert_ne!(exec("/usr/bin/id"), Some(0));

    until("the grant ends", || explain("--connect", "192.0.2.9:80/TCP").0 == "expired");
    assert_eq!(attempt("connect(T,a('192.0.2.9',80))").code(), Some(77));
    let expired = |record: &Value| record["reason"] == "expired";
    wait_until("the kernel says the same", || daemon.records().iter().any(expired));
    let records = daemon.records();
    let record = records.iter().find(|record| expired(record)).unwrap();
    assert_eq!(record["grant"], "everywhere", "{record}");
    let reasons: BTreeSet<&str> = records.iter().filter_map(|r| r["reason"].as_str()).collect();
    println!("reasons in the log: {reasons:?}");
    assert!(reasons.contains("excepted") && reasons.contains("metadata"), "{reasons:?}");
}

#[test]
fn a_workload_lasts_as_long_as_any_of_its_processes() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    let done = daemon.path("done");
    let script = format!(
        "(read -t 2 <> <(:); (exec 3<>/dev/tcp/127.0.0.1/{}) 2>/dev/null && echo yes > {done} || echo no > {done}; read -t 1 <> <(:)) & exit 0",
        server.port(),
        done = done.display()
    );
    let finished = daemon.run(["exec", "--name", "parent", "--", "bash", "-c", &script]);
    assert!(finished.status.success(), "{finished:?}");
    thread::sleep(Duration::from_millis(600));
    assert_eq!(daemon.workloads(), ["parent"], "its child is still there");
    wait_until("the child tried", || {
        fs::read_to_string(&done).is_ok_and(|text| text.ends_with('\n'))
    });
    assert_eq!(fs::read_to_string(&done).unwrap().trim(), "no", "the child is held");
    until("the workload ends with its last process", || daemon.workloads().is_empty());
    assert_eq!(daemon.json(["grants"]), json!([]));
    assert!(!daemon.exec_cgroups().join("parent").exists());

    for _ in 0..5 {
        daemon.run(["exec", "--name", "brief", "--", "true"]).expect_success("exec");
        until("a short command leaves nothing", || daemon.workloads().is_empty());
    }
    assert!(!daemon.exec_cgroups().join("brief").exists());
}

#[test]
fn the_commands_end_with_the_status_they_document() {
    let mut daemon = Daemon::installed();
    let code = |finished: agentguard_tests::Finished| finished.status.code();
    assert_eq!(code(daemon.run(["status"])), Some(69));
    assert_eq!(code(daemon.run_as_user(["run"])), Some(77));
    assert_eq!(code(daemon.run_as_user(["exec", "--", "true"])), Some(69));
    assert_eq!(code(daemon.run_as_user(["uninstall"])), Some(77));
    daemon.configure(|config| config["no_such_key"] = json!(1));
    let invalid = daemon.run(["run"]);
    assert_eq!(invalid.status.code(), Some(78));
    assert!(invalid.stderr.contains("no_such_key"), "{invalid:?}");
    daemon.configure(|_| {});

    let broken = daemon.path("broken.yaml");
    fs::write(&broken, "apiVersion: agentguard.dev/v1alpha1\nkind: Scope\n").unwrap();
    let broken = broken.to_str().unwrap();
    assert_eq!(code(daemon.run(["check", broken])), Some(65));
    daemon.write("scope", &[scope("test:server", 80)]);
    let manifests = daemon.path("manifests");
    assert_eq!(code(daemon.run(["check", manifests.to_str().unwrap()])), Some(0));

    let doctor = daemon.run(["doctor", "--output", "json"]);
    let report: Value =
        serde_json::from_str(&doctor.stdout).unwrap_or_else(|_| panic!("{doctor:?}"));
    assert!(report["checks"].as_array().is_some_and(|checks| !checks.is_empty()));
    assert!(!fs::read_dir("/sys/fs/bpf").unwrap().flatten().any(|entry| {
        let name = daemon.pins().file_name().unwrap().to_string_lossy().into_owned();
        entry.file_name().to_string_lossy().starts_with(&name)
    }));

    daemon.start();
    let status = daemon.status().expect("it answers");
    assert_eq!(status["totals"]["manifests"]["errors"], json!([]));
    assert!(status["protection"]["layers"].as_array().is_some_and(|layers| !layers.is_empty()));
    for table in [&["status"][..], &["workloads"], &["grants"], &["events"], &["doctor"]] {
        assert!(!daemon.run(table).stdout.is_empty(), "{table:?}");
    }
}

#[test]
fn events_are_followed() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    let mut follow = daemon.command(["events", "-f", "--denied", "--output", "json"]);
    let follower = Running::start(&mut follow);
    let mut prober = Prober::start_by(daemon.command(["exec", "--name", "seen"]));
    wait_until("the denial is shown", || {
        // The first may have come before the follower.
        assert!(!prober.reaches(server.port()));
        follower.stdout().contains("\"seen\"")
    });
    for line in follower.stdout().lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        assert_eq!(record["verdict"], "deny", "{record}");
    }
}

/// As in a pod: with the node's first process in sight, and a cgroup namespace of its own.
#[test]
fn uninstall_sees_the_hosts_cgroups_from_a_cgroup_namespace_of_its_own() {
    let mut daemon = Daemon::started();
    daemon.kill();
    let cgroup = daemon.cgroup("pod");
    let script = format!(
        "sh -c 'echo $$ >\"{}/cgroup.procs\"; exec unshare --cgroup \"{}\" uninstall'; exit $?",
        cgroup.path().display(),
        program().display()
    );
    let mut first = Command::new("unshare");
    first.args(["--pid", "--fork", "--mount-proc", "sh", "-c", &script]);
    let ended = run(first.env("AGENTGUARD_CONFIG", daemon.config()), PATIENCE);
    let said = ended.expect_success("uninstall in a cgroup namespace").stdout;
    assert!(said.contains("removed programs, tables and hooks"), "{said}");
    assert!(!daemon.pins().exists());
}

#[test]
fn uninstall_removes_everything_once() {
    let mut daemon = Daemon::started();
    let server = Reachable::start();
    let mut prober = Prober::start_by(daemon.command(["exec", "--name", "left"]));
    assert!(!prober.reaches(server.port()));
    let refused = daemon.run(["uninstall"]);
    assert!(!refused.status.success(), "a daemon is running: {refused:?}");
    assert!(!prober.reaches(server.port()), "and enforces");
    let stopped = daemon.stop();
    assert!(stopped.status.success(), "{stopped:?}");
    assert!(!prober.reaches(server.port()), "a daemon that stops leaves enforcement");

    let first = daemon.run(["uninstall"]);
    assert_eq!(first.status.code(), Some(1), "a process is left in a cgroup: {first:?}");
    assert!(first.stdout.contains("removed"), "{first:?}");
    assert!(prober.reaches(server.port()), "nothing is held any more");
    assert!(!daemon.pins().exists());
    assert!(!daemon.path("state/state.json").exists());
    let second = daemon.run(["uninstall"]).expect_success("uninstall");
    assert!(second.stdout.contains("nothing was installed"), "{second:?}");
    let cgroup = daemon.exec_cgroups().join("left");
    drop(prober);
    wait_until("the test's cgroup can go", || !cgroup.exists() || fs::remove_dir(&cgroup).is_ok());
}

#[test]
fn metrics_are_valid_and_reconcile_with_status() {
    let daemon = Daemon::started();
    let server = Reachable::start();
    assert_eq!(daemon.http("/healthz").0, 200);
    assert_eq!(daemon.http("/readyz").0, 200);
    let mut prober = Prober::start_by(daemon.command(["exec", "--name", "counted"]));
    for _ in 0..20 {
        assert!(!prober.reaches(server.port()));
    }
    let (status, text) = daemon.http("/metrics");
    assert_eq!(status, 200);
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed (package prometheus)");
    promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}\n{text}");

    let events = daemon.status().expect("it answers")["totals"]["events"].clone();
    let number = |name: &str| events[name].as_f64().unwrap();
    println!("{events}");
    assert_eq!(number("decided"), number("logged") + number("aggregated") + number("lost"));
    assert!(number("decided") >= 20.0, "{events}");
    let counted = daemon.metric("agentguard_verdicts_total");
    assert_eq!(counted, number("decided"), "{:?}", daemon.metrics("agentguard_verdicts_total"));
}

#[test]
fn a_full_disk_stops_neither_enforcement_nor_the_daemon() {
    let mut daemon = Daemon::installed();
    let server = Reachable::start();
    let path = daemon.path("small");
    let small = SmallDisk::mount(&path, "64k");
    daemon.configure(|config| config["audit"]["output"] = json!(path.join("audit.log")));
    daemon.start();
    let mut prober = Prober::start_by(daemon.command(["exec", "--name", "full"]));
    small.fill();
    for _ in 0..300 {
        assert!(!prober.reaches(server.port()));
    }
    // The page that the log has begun takes a few records still.
    wait_until("it is counted", || {
        assert!(!prober.reaches(server.port()));
        daemon.metric("agentguard_audit_write_failures_total") > 0.0
    });
    assert!(daemon.status().is_some());
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.write(
        "grant",
        &[json!({
            "apiVersion": "agentguard.dev/v1alpha1", "kind": "Grant",
            "metadata": {"name": "full"},
            "spec": {"subject": {"spiffeId": identity("user/0/full")}, "scopes": ["test:server"],
                     "expiresAt": "never", "grantedBy": "the tests", "reason": "a test"},
        })],
    );
    until("changes are still taken", || prober.reaches(server.port()));
    drop(prober);
    daemon.kill();
    drop(small);
    daemon.configure(|_| {});
}

#[test]
fn a_state_that_can_not_be_written_stops_nothing() {
    let mut daemon = Daemon::installed();
    let server = Reachable::start();
    let path = daemon.path("state");
    let small = SmallDisk::mount(&path, "16k");
    daemon.start();
    small.fill();
    let mut prober = Prober::start_by(daemon.command(["exec", "--name", "unsaved"]));
    assert!(!prober.reaches(server.port()));
    small.clear();
    wait_until("it is written once there is room", || {
        fs::read_to_string(path.join("state.json")).is_ok_and(|text| text.contains("unsaved"))
    });
    drop(prober);
    until("it ends", || daemon.workloads().is_empty());
    daemon.kill();
    daemon.run(["uninstall"]).expect_success("uninstall");
    drop(small);
}

#[test]
fn two_daemons_do_not_manage_the_same_tables() {
    let daemon = Daemon::started();
    let second = Daemon::installed();
    let pins = daemon.pins();
    second.configure(|config| config["pin_directory"] = json!(pins));
    let mut running = Running::start(&mut second.command(["run"]));
    let ended = running.wait(PATIENCE).expect("the second daemon ends");
    assert!(!ended.status.success());
    assert!(ended.stderr.contains("another agentguard manages"), "{ended:?}");
    let third = Daemon::installed();
    let state = daemon.path("state");
    third.configure(|config| config["state_directory"] = json!(state));
    let mut running = Running::start(&mut third.command(["run"]));
    let ended = running.wait(PATIENCE).expect("the third daemon ends");
    assert!(ended.stderr.contains("another agentguard manages"), "{ended:?}");
    assert!(daemon.status().is_some(), "the first goes on");
    // Their uninstall must not touch the first's.
    second.configure(|_| {});
    third.configure(|_| {});
}

#[test]
fn a_file_that_is_a_pipe_holds_nobody_up() {
    let daemon = Daemon::started();
    let pipe = daemon.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::set_permissions(&pipe, fs::Permissions::from_mode(0o777)).unwrap();
    // The control socket itself, because the command line looks first.
    let body = json!({"executable": pipe, "command": ["pipe"], "scopes": [], "mode": "enforce"});
    let body = body.to_string();
    let script = format!(
        "use IO::Socket::UNIX; $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die; \
         print $s \"POST /v1/confine HTTP/1.1\\r\\nhost: a\\r\\ncontent-type: application/json\\r\\n\
         content-length: {}\\r\\n\\r\\n$ARGV[1]\"; print <$s>;",
        body.len()
    );
    let mut command = Command::new("perl");
    command.args(["-e", &script]).arg(daemon.path("run/agentguard.sock")).arg(&body);
    let answered = run(&mut command, Duration::from_secs(10));
    println!("{answered:?}");
    assert!(answered.stdout.contains("HTTP/1.1"), "{answered:?}");
    assert!(daemon.status().is_some());
    assert!(daemon.run(["exec", "--", "true"]).status.success());
}

/// A daemon that starts only with all hooks of both layers, and has been started.
fn requiring_both_layers() -> Daemon {
    let mut daemon = Daemon::installed();
    daemon.configure(|config| config["require"] = json!("full"));
    daemon.launch(&[]);
    daemon
}

/// The hooks that are not in force on this kernel, as a daemon that requires little tells them.
fn missing_hooks() -> Vec<String> {
    let daemon = Daemon::started();
    let status = daemon.status().expect("it runs");
    let hooks = status["protection"]["layers"].as_array().expect("a list");
    hooks
        .iter()
        .filter(|hook| hook["state"] != "active")
        .filter_map(|hook| Some(hook["hook"].as_str()?.to_owned()))
        .collect()
}

/// Names in the file system of pins that are this installation's, with those of runs of `exec` beside it.
fn pins_left(daemon: &Daemon) -> Vec<String> {
    let name = daemon.pins().file_name().unwrap().to_string_lossy().into_owned();
    fs::read_dir("/sys/fs/bpf")
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|found| found.starts_with(&name))
        .collect()
}

#[test]
fn a_kernel_that_gives_less_than_is_required_is_refused_by_name_and_nothing_is_left() {
    requires(Layer::Portable);
    let missing = missing_hooks();
    let mut daemon = requiring_both_layers();
    if missing.is_empty() {
        wait_until("it runs", || daemon.status().is_some());
        return;
    }
    let by_file = daemon.ended(PATIENCE).expect("it does not run");
    assert_eq!(pins_left(&daemon), [""; 0], "of what was loaded to find out");
    daemon.configure(|_| {});
    let by_flag = Running::start(&mut daemon.command(["run", "--require", "full"]))
        .wait(PATIENCE)
        .expect("it does not run");
    // A run of `exec` without a daemon asks the same of the kernel.
    daemon.configure(|config| config["require"] = json!("full"));
    let by_exec = daemon.run(["exec", "--", "true"]);
    for ended in [by_file, by_flag, by_exec] {
        assert!(!ended.status.success(), "{ended:?}");
        assert!(ended.stderr.contains("`require: full`"), "{ended:?}");
        assert!(ended.stderr.contains("see agentguard doctor, or require less"), "{ended:?}");
        for hook in &missing {
            assert!(ended.stderr.contains(hook), "{hook} is not named: {ended:?}");
        }
        assert_eq!(pins_left(&daemon), [""; 0], "of what was loaded to find out");
    }
    assert!(!daemon.audit_log().exists(), "a start that was none is in no record");

    // Less is given, and the flag counts for more than the file.
    for less in ["portable", "none"] {
        let mut running = Running::start(&mut daemon.command(["run", "--require", less]));
        wait_until("it runs", || {
            assert!(running.wait(Duration::ZERO).is_none(), "{}", running.stderr());
            daemon.status().is_some()
        });
        running.kill();
    }
}

#[test]
fn a_daemon_that_requires_more_leaves_what_an_earlier_one_put_in_force() {
    requires(Layer::Portable);
    let server = Reachable::start();
    let mut daemon = Daemon::started();
    let mut held = Prober::start_by(daemon.command(["exec", "--name", "held"]));
    assert!(!held.reaches(server.port()));
    let is_whole = daemon.status().expect("it runs")["protection"]["layers"]
        .as_array()
        .is_some_and(|hooks| hooks.iter().all(|hook| hook["state"] == "active"));
    daemon.kill();
    daemon.configure(|config| config["require"] = json!("full"));
    daemon.launch(&[]);
    if is_whole {
        wait_until("it runs", || daemon.status().is_some());
    } else {
        let ended = daemon.ended(PATIENCE).expect("it does not run");
        assert!(ended.stderr.contains("`require: full`"), "{ended:?}");
        daemon.configure(|_| {});
    }
    assert!(!held.reaches(server.port()), "what is in force stays so");
    assert!(daemon.pins().exists());
    // The same where it would have loaded programs of its own beside those in force.
    if !is_whole {
        daemon.configure(|config| {
            config["require"] = json!("full");
            config["datapath"] = json!({"maps": {"destinations": 1000}});
        });
        let builds = || {
            let names = fs::read_dir(daemon.pins()).unwrap().flatten();
            let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
            names.filter(|name| name.starts_with("build-")).collect::<Vec<_>>()
        };
        let before = builds();
        let ended = Running::start(&mut daemon.command(["run"])).wait(PATIENCE);
        assert!(ended.expect("it does not run").stderr.contains("`require: full`"));
        assert_eq!(builds(), before);
        assert!(!held.reaches(server.port()));
        daemon.configure(|_| {});
    }
    daemon.kill();
    daemon.start();
    assert!(!held.reaches(server.port()));
}

/// A hook that is gone from a workload's cgroup is told of, of that workload and by every way; a restart
/// puts it back.
#[test]
fn a_workload_that_a_hook_does_not_hold_is_not_told_as_held() {
    let mut daemon = Daemon::started();
    let (whole, lacking) = (identity("whole"), identity("lacking"));
    let start = |name: &str, identity: &str| {
        Prober::start_by(daemon.command(["exec", "--identity", identity, "--name", name]))
    };
    let _held = [start("whole", &whole), start("lacking", &lacking)];
    let held = |daemon: &Daemon, identity: &str, protection: &str| {
        let labels = [("layer", "portable"), ("protection", protection), ("identity", identity)];
        scrape::row(daemon.metrics_address(), "agentguard_workload_protection", &labels) as u64
    };
    let of = |daemon: &Daemon| {
        [&whole, &lacking]
            .map(|identity| (held(daemon, identity, "full"), held(daemon, identity, "partial")))
    };
    assert_eq!(of(&daemon), [(1, 0), (1, 0)]);
    let cgroup = daemon.exec_cgroups().join("lacking");
    let number = std::os::unix::fs::MetadataExt::ino(&fs::metadata(cgroup).unwrap());
    for hook in ["connect4", "egress"] {
        fs::remove_file(daemon.pins().join(format!("links/{number}-{hook}"))).unwrap();
    }
    assert_eq!(of(&daemon), [(1, 0), (0, 1)]);
    let gaps = daemon.status().expect("it answers")["gaps"].to_string();
    for hook in ["cgroup/connect4 (connect over IPv4)", "cgroup_skb/egress"] {
        assert!(gaps.contains(&format!("workload lacking is not held by {hook}")), "{gaps}");
    }
    assert!(
        gaps.contains("restart the daemon") && !gaps.contains("workload whole is not held"),
        "{gaps}"
    );
    daemon.kill();
    daemon.start();
    assert_eq!(of(&daemon), [(1, 0), (1, 0)], "a restart attaches it again");
    let gaps = daemon.status().expect("it answers")["gaps"].to_string();
    assert!(!gaps.contains("is not held by"), "{gaps}");
}

/// The portable hooks that are not in force, with why, as `status` tells.
fn missing_of_portable(daemon: &Daemon) -> Vec<String> {
    let status = daemon.status().expect("it runs");
    let hooks = status["protection"]["layers"].as_array().expect("a list").iter();
    let missing = hooks.filter(|hook| hook["layer"] == "portable" && hook["state"] != "active");
    missing.map(|hook| format!("{}: {}", hook["hook"], hook["reason"])).collect()
}

/// Kernels before 6.9 ask for `CAP_NET_ADMIN` to attach the program for packets, and not to load it. A
/// daemon that lacks it there does not start as if it held everything; one that requires little tells
/// what is missing, and holds agents by the rest.
#[test]
fn a_daemon_that_may_not_attach_a_hook_anywhere_says_so_before_it_holds_anything() {
    let server = Reachable::start();
    let mut daemon = Daemon::installed();
    let without = [Capability::CAP_NET_ADMIN];
    daemon.launch_without(&without, &[]);
    let mut ended = None;
    wait_until("it runs, or it does not", || {
        ended = daemon.ended(Duration::ZERO);
        ended.is_some() || daemon.status().is_some()
    });
    if let Some(ended) = ended {
        println!("{}", ended.stderr);
        for part in ["`require: portable`", "cgroup_skb/egress", "CAP_NET_ADMIN"] {
            assert!(ended.stderr.contains(part), "{part}: {ended:?}");
        }
        assert_eq!(pins_left(&daemon), [""; 0], "of what was loaded to find out");
        daemon.configure(|config| config["require"] = json!("none"));
        daemon.launch_without(&without, &[]);
        wait_until("it runs with less", || daemon.status().is_some());
        let missing = missing_of_portable(&daemon);
        let [egress] = &missing[..] else { panic!("{missing:?}") };
        assert!(egress.contains("egress") && egress.contains("CAP_NET_ADMIN"), "{egress}");
    } else {
        println!("this kernel asks for no CAP_NET_ADMIN");
        assert_eq!(missing_of_portable(&daemon), [""; 0]);
    }
    let mut agent = Prober::start_by(daemon.command(["exec", "--name", "agent"]));
    assert!(!agent.reaches(server.port()));
    assert!(!runs_in(&daemon.exec_cgroups().join("agent")), "exec is judged");
    let gaps = daemon.status().expect("it answers")["gaps"].to_string();
    assert!(!gaps.contains("is not held by"), "{gaps}");

    // With it all is there, also upon what the lesser start left.
    daemon.kill();
    daemon.configure(|_| {});
    daemon.start();
    assert_eq!(missing_of_portable(&daemon), [""; 0]);
    assert!(!agent.reaches(server.port()));
    let gaps = daemon.status().expect("it answers")["gaps"].to_string();
    assert!(!gaps.contains("is not held by"), "{gaps}");
}

/// Whether what comes into a cgroup can run a program.
fn runs_in(cgroup: &Path) -> bool {
    let script = "echo $$ > \"$0/cgroup.procs\" && exec true";
    run(Command::new("bash").args(["-c", script]).arg(cgroup), PATIENCE).status.success()
}

/// The host may have a program in a cgroup that allows none below. An agent there may do nothing, by all
/// hooks that are left, until it can be held whole.
#[test]
fn an_agent_below_a_cgroup_that_takes_no_more_programs_may_do_nothing() {
    let server = Reachable::start();
    let daemon = Daemon::started();
    let agent = identity("agent");
    let parent = daemon.cgroup("exclusive");
    let cgroup = parent.child("agent");
    let builds = fs::read_dir(daemon.pins()).unwrap().flatten().map(|entry| entry.path());
    let program = builds.map(|build| build.join("egress")).find(|path| path.exists());
    let program = program.expect("a build is in force");
    // Without a flag it is there alone: with what is attached to no cgroup of an agent's, any program will
    // do.
    let exclusive = |verb: &str| {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["cgroup", verb]).arg(parent.path()).args(["egress", "pinned"]).arg(&program);
        run(&mut bpftool, PATIENCE).expect_success("bpftool (set-up installs it)");
    };
    exclusive("attach");

    let mut running = Prober::in_cgroup(&cgroup);
    assert!(running.reaches(server.port()) && runs_in(&cgroup));
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.write("grant", &[grant("server", &agent, "test:server")]);
    let pattern = format!("/{}/agent", daemon.cgroup_name("exclusive"));
    daemon.write("workload", &[workload("agent", &pattern, &agent, "enforce")]);
    until("what is granted is refused", || !running.reaches(server.port()));
    assert!(!runs_in(&cgroup), "exec is judged");
    let gaps = daemon.status().expect("it answers")["gaps"].to_string();
    for part in [
        "workload agent is refused everything",
        "egress can not be attached",
        "Operation not permitted",
    ] {
        assert!(gaps.contains(part), "{part}: {gaps}");
    }

    exclusive("detach");
    until("it is held whole", || running.reaches(server.port()));
    let gaps = daemon.status().expect("it answers")["gaps"].to_string();
    assert!(!gaps.contains("refused everything") && !gaps.contains("is not held by"), "{gaps}");
}

/// What a table has room for is told as the kernel has it, also where the configuration says otherwise
/// since.
#[test]
fn a_table_that_is_kept_is_told_with_the_size_that_it_has() {
    let mut daemon = Daemon::installed();
    let room = |daemon: &Daemon, table: &str| {
        let labels = [("map", table)];
        scrape::row(daemon.metrics_address(), "agentguard_map_capacity", &labels) as u64
    };
    let rooms = |daemon: &Daemon| ["tasks", "moved", "rules"].map(|table| room(daemon, table));
    daemon.configure(|config| {
        config["datapath"] = json!({"maps": {"tasks": 500, "rules": 600}});
    });
    daemon.start();
    assert_eq!(rooms(&daemon), [500, 500, 600]);
    daemon.kill();
    daemon.configure(|config| {
        config["datapath"] = json!({"maps": {"tasks": 700, "rules": 800}});
    });
    daemon.start();
    assert_eq!(rooms(&daemon), [500, 500, 800], "what the kernel half fills is kept");
    assert!(daemon.said().contains("keeps the size it was made with"), "{}", daemon.said());
}

/// On a machine with cgroups of version 1 alone, made of this one's by mounts of its own.
#[test]
fn a_machine_with_cgroups_of_version_1_alone_is_told_what_that_means() {
    let daemon = Daemon::installed();
    let inside = |arguments: &str| {
        let script = format!(
            "for path in $(awk '$3 ~ /^cgroup/ {{print $2}}' /proc/self/mounts | sort -r); do \
             umount -l $path; done; \
             mount -t tmpfs none /sys/fs/cgroup && mkdir /sys/fs/cgroup/own && \
             mount -t cgroup -o none,name=agentguard none /sys/fs/cgroup/own && \
             exec {} {arguments}",
            program().display()
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "bash", "-c", &script]);
        run(command.env("AGENTGUARD_CONFIG", daemon.config()), PATIENCE)
    };
    let doctor = inside("doctor --output json");
    let report: Value =
        serde_json::from_str(&doctor.stdout).unwrap_or_else(|error| panic!("{error}: {doctor:?}"));
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "cgroup v2").unwrap();
    assert_eq!(check["state"], "failed", "{check}");
    let (found, remedy) = (check["found"].to_string(), check["remedy"].to_string());
    println!("{found}: {remedy}");
    // The test's mounts are its own, as a container's are, and what is in their place is the machine's.
    assert!(found.contains("the daemon does not start"), "{found}");
    assert!(remedy.contains("/sys/fs/cgroup"), "{remedy}");
    let refused = inside("run");
    assert!(!refused.status.success(), "{refused:?}");
    assert!(refused.stderr.contains("cgroup v2 is not mounted"), "{refused:?}");
    assert_eq!(pins_left(&daemon), [""; 0]);
}

mod lsm {
    use super::*;

    #[test]
    fn both_layers_may_be_required() {
        requires(Layer::Lsm);
        let daemon = requiring_both_layers();
        wait_until("it runs", || daemon.status().is_some());
    }
}
