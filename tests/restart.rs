//! What a daemon knows, the next one knows: grants, revocations, manifests, numbers, evidence; and
//! what was begun and could not be ended is taken back.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use agentguard_common::allowlist::MAX_RULES;
use agentguard_tests::{
    SmallDisk,
    daemon::{Daemon, Prober, Reachable, grant, identity, scope, scope_of, workload},
    run, tell, wait_until,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

/// `agentguard grant` of one scope to one identity.
fn give(daemon: &Daemon, name: &str, to: &str, scope: &str, ttl: &str) {
    let arguments = ["grant", "--to", to, "--scope", scope, "--ttl", ttl, "--name", name];
    let mut command = daemon.command(arguments);
    run(command.args(["--reason", "a test"]), PATIENCE).expect_success("grant");
}

fn revoke(daemon: &Daemon, name: &str) {
    daemon.run(["revoke", name, "--reason", "enough"]).expect_success("revoke");
}

/// Names and states of all grants.
fn states(daemon: &Daemon) -> BTreeSet<(String, String)> {
    let list = daemon.json(["grants"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let grants = list.as_array().unwrap().iter();
    grants.map(|grant| (text(&grant["id"]), text(&grant["state"]))).collect()
}

fn pairs<const N: usize>(expected: [(&str, &str); N]) -> BTreeSet<(String, String)> {
    expected.map(|(name, state)| (name.to_owned(), state.to_owned())).into()
}

fn generation(daemon: &Daemon) -> u64 {
    daemon.status().expect("it answers")["generation"].as_u64().unwrap()
}

fn held_files(daemon: &Daemon) -> Vec<String> {
    let status = daemon.status().expect("it answers");
    let held = status["totals"]["manifests"]["held"].as_array().cloned().unwrap_or_default();
    held.iter().map(|held| held["file"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn whatever_was_given_or_taken_stays_so_over_many_restarts() {
    let mut daemon = Daemon::installed_where_others_were();
    let servers = [(); 6].map(|()| Reachable::start());
    let [kept, revoked, brief, listed, unlisted, _never] = &servers;
    let agent = identity("agent");
    daemon.write(
        "scopes",
        &[
            scope("test:kept", kept.port()),
            scope("test:revoked", revoked.port()),
            scope("test:brief", brief.port()),
            scope("test:listed", listed.port()),
            scope("test:unlisted", unlisted.port()),
        ],
    );
    daemon.write("listed", &[grant("listed", &agent, "test:listed")]);
    daemon.write("unlisted", &[grant("unlisted", &agent, "test:unlisted")]);
    daemon.start();
    let mut prober =
        Prober::start_by(daemon.command(["exec", "--identity", &agent, "--name", "agent"]));
    give(&daemon, "kept", &agent, "test:kept", "1h");
    give(&daemon, "revoked", &agent, "test:revoked", "1h");
    revoke(&daemon, "revoked");
    give(&daemon, "brief", &agent, "test:brief", "2s");
    let mut reaches = |expected: [bool; 6]| {
        let reached = [0, 1, 2, 3, 4, 5].map(|index: usize| prober.reaches(servers[index].port()));
        assert_eq!(reached, expected);
    };
    reaches([true, false, true, true, true, false]);
    let mut decided = 0;
    for restart in 0..3 {
        daemon.kill();
        let before = daemon.records();
        let last = before.last().unwrap().clone();
        match restart {
            // The end comes with nobody there, and a manifest goes.
            0 => {
                daemon.remove("unlisted");
                thread::sleep(Duration::from_millis(2100));
                reaches([true, false, false, true, true, false]);
            }
            _ => reaches([true, false, false, true, false, false]),
        }
        daemon.start();
        reaches([true, false, false, true, false, false]);
        assert_eq!(
            states(&daemon),
            pairs([
                ("kept", "active"),
                ("revoked", "revoked"),
                ("brief", "expired"),
                ("listed", "active")
            ])
        );
        // The log goes on where it was.
        let after = daemon.records();
        assert_eq!(after[before.len() - 1], last);
        let next = &after[before.len()];
        assert_eq!(next["prev"], last["hash"], "{next}");
        assert_eq!(next["seq"].as_u64().unwrap(), last["seq"].as_u64().unwrap() + 1);
        let events = daemon.status().expect("it answers")["totals"]["events"].clone();
        let number = |name: &str| events[name].as_u64().unwrap();
        assert_eq!(number("decided"), number("logged") + number("aggregated") + number("lost"));
        assert!(number("decided") > decided, "counters go on: {events}");
        decided = number("decided");
    }
    let verified = run(daemon.command(["audit", "verify"]).arg(daemon.audit_log()), PATIENCE);
    assert!(verified.status.success(), "{verified:?}");
}

#[test]
fn a_manifest_that_became_invalid_goes_on_saying_what_it_said() {
    let mut daemon = Daemon::installed();
    let (first, second, never) = (Reachable::start(), Reachable::start(), Reachable::start());
    let agent = identity("selected");
    let cgroup = daemon.cgroup("selected");
    let mut prober = Prober::in_cgroup(cgroup.path());
    let pattern = format!("/{}", daemon.cgroup_name("selected"));
    let documents = |grants: &[Value]| {
        let mut documents = vec![
            scope("test:first", first.port()),
            scope("test:second", second.port()),
            workload("selected", &pattern, &agent, "enforce"),
        ];
        documents.extend_from_slice(grants);
        documents
    };
    let (one, two) = (grant("first", &agent, "test:first"), grant("second", &agent, "test:second"));
    daemon.write("all", &documents(&[one.clone(), two]));
    daemon.start();
    assert!(prober.reaches(first.port()) && prober.reaches(second.port()));
    assert!(!prober.reaches(never.port()));
    // What it said later counts, not what it said first.
    daemon.write("all", &documents(&[one]));
    wait_until("the second grant is gone", || !prober.reaches(second.port()));

    let text = fs::read_to_string(daemon.manifest("all")).unwrap();
    let broken = text.replacen("\"Grant\"", "\"Grunt\"", 1);
    assert_ne!(text, broken);
    let file = daemon.manifest("all").display().to_string();
    let mut holds = |daemon: &Daemon, when: &str| {
        assert!(prober.reaches(first.port()), "{when}: what was granted stays so");
        assert!(!prober.reaches(second.port()), "{when}: what was taken back stays so");
        assert!(!prober.reaches(never.port()), "{when}: what was never granted stays so");
        assert_eq!(held_files(daemon), std::slice::from_ref(&file), "{when}");
        assert_eq!(daemon.workloads(), ["selected"], "{when}");
        assert_eq!(daemon.json(["workloads"])[0]["mode"], "enforce", "{when}");
        let shown = daemon.run(["status"]).expect_success("status").stdout;
        assert!(shown.contains("held to what they said before"), "{when}: {shown}");
    };
    // Broken before the eyes of a daemon, and while there is none.
    daemon.write_text("all", &broken);
    wait_until("the error is shown", || !held_files(&daemon).is_empty());
    holds(&daemon, "without a restart");
    daemon.kill();
    daemon.start();
    holds(&daemon, "after a restart");
    daemon.kill();
    daemon.write_text("all", "kind: [");
    daemon.start();
    holds(&daemon, "broken anew between two daemons");
    daemon.kill();
    // A new file takes nothing over from the one that is broken.
    daemon.write("a-new", &[scope("test:first", never.port())]);
    daemon.start();
    assert!(prober.reaches(first.port()) && !prober.reaches(never.port()));
    daemon.remove("a-new");

    daemon.write_text("all", &text);
    wait_until("it is mended", || held_files(&daemon).is_empty());
    assert!(prober.reaches(first.port()) && !prober.reaches(second.port()));
    daemon.kill();
    daemon.remove("all");
    daemon.start();
    wait_until("a manifest that is gone lets go", || prober.reaches(never.port()));
}

#[test]
fn what_was_never_valid_says_nothing_and_what_is_kept_may_be_lost() {
    let mut daemon = Daemon::started();
    let server = Reachable::start();
    let cgroup = daemon.cgroup("held");
    let mut prober = Prober::in_cgroup(cgroup.path());
    let pattern = format!("/{}", daemon.cgroup_name("held"));
    daemon.write("w", &[workload("held", &pattern, &identity("held"), "enforce")]);
    wait_until("it is held", || !prober.reaches(server.port()));
    // One that is not written down yet stays held for as long as its cgroup is there.
    wait_until("it is written down", || {
        fs::read_to_string(daemon.path("state/state.json"))
            .is_ok_and(|state| state.contains("/held\"") || state.contains("-held\""))
    });
    // A file that was never valid keeps nobody from letting go what no manifest selects.
    daemon.write_text("wrong", "kind: [");
    daemon.kill();
    daemon.remove("w");
    daemon.start();
    wait_until("it is let go", || prober.reaches(server.port()));
    daemon.write("w", &[workload("held", &pattern, &identity("held"), "enforce")]);
    // One refusal says that the first of its hooks is on; what is told is held whole, and is written
    // down or not.
    wait_until("it is held again", || daemon.workloads() == ["held"]);
    assert!(!prober.reaches(server.port()));
    // Without what was kept it is not known who selected what, and all stay held.
    daemon.kill();
    fs::write(daemon.path("state/manifests.json"), "{").unwrap();
    daemon.write_text("w", "kind: [");
    daemon.start();
    assert!(!prober.reaches(server.port()));
    assert_eq!(held_files(&daemon), [""; 0]);
    assert!(daemon.said().contains("what manifests said before is not known"), "{}", daemon.said());
}

#[test]
fn a_state_whose_revocations_can_not_be_read_stops_the_start_and_nothing_else() {
    let mut daemon = Daemon::started();
    let server = Reachable::start();
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.write("grant", &[grant("revoked", &agent, "test:server")]);
    let exec = daemon.command(["exec", "--identity", &agent, "--name", "agent"]);
    let mut prober = Prober::start_by(exec);
    wait_until("it is granted", || prober.reaches(server.port()));
    daemon.run(["revoke", "revoked", "--reason", "a test"]).expect_success("revoke");
    assert!(!prober.reaches(server.port()));
    daemon.kill();
    let file = daemon.path("state/state.json");
    let kept = fs::read_to_string(&file).unwrap();
    let mut of_another: Value = serde_json::from_str(&kept).unwrap();
    of_another["grants"]["version"] = json!(99);
    fs::write(&file, of_another.to_string()).unwrap();
    daemon.launch(&[]);
    let ended = daemon.ended(PATIENCE).expect("it does not start");
    assert!(!ended.status.success(), "{ended:?}");
    let said = &ended.stderr;
    assert!(said.contains("state.json") && said.contains("version 99"), "{said}");
    assert!(!prober.reaches(server.port()), "what was in force stays so");
    assert_eq!(fs::read_to_string(&file).unwrap(), of_another.to_string(), "nothing is lost");
    fs::write(&file, kept).unwrap();
    daemon.start();
    assert!(!prober.reaches(server.port()), "what was revoked stays so");
}

#[test]
fn a_number_is_not_used_again_though_nobody_could_write_it_down() {
    let mut daemon = Daemon::installed();
    let server = Reachable::start();
    let small = SmallDisk::mount(&daemon.path("state"), "64k");
    let agent = identity("agent");
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.start();
    let mut prober =
        Prober::start_by(daemon.command(["exec", "--identity", &agent, "--name", "first"]));
    small.fill();
    let mut used = 0;
    for round in 0..3 {
        daemon.write("grant", &[grant("server", &agent, "test:server")]);
        wait_until("it is granted", || prober.reaches(server.port()));
        daemon.remove("grant");
        wait_until("it is not granted", || !prober.reaches(server.port()));
        let now = generation(&daemon);
        assert!(now > used, "round {round}: {now} after {used}");
        used = now;
    }
    // Nothing in the kernel shows the number any more.
    drop(prober);
    wait_until("its workload ends", || daemon.workloads().is_empty());
    thread::sleep(Duration::from_millis(1500));
    daemon.kill();
    small.clear();
    daemon.start();
    let next = generation(&daemon);
    tell!("{used} was used, the next daemon goes on behind {next}");
    assert!(next >= used, "{next} after {used}");
    daemon.kill();
    daemon.run(["uninstall"]).expect_success("uninstall");
    drop(small);
}

#[test]
fn a_revocation_is_in_force_though_a_table_is_full() {
    const ROOM: usize = 24;
    let mut daemon = Daemon::installed();
    daemon.configure(|config| config["datapath"] = json!({"maps": {"destinations": ROOM}}));
    let (kept, revoked) = (Reachable::start(), Reachable::start());
    let (agent, other) = (identity("agent"), identity("other"));
    daemon
        .write("scopes", &[scope("test:kept", kept.port()), scope("test:revoked", revoked.port())]);
    daemon.write("kept", &[grant("kept", &agent, "test:kept")]);
    daemon.start();
    let mut prober =
        Prober::start_by(daemon.command(["exec", "--identity", &agent, "--name", "agent"]));
    let _other =
        Prober::start_by(daemon.command(["exec", "--identity", &other, "--name", "other"]));
    give(&daemon, "revoked", &agent, "test:revoked", "1h");
    assert!(prober.reaches(kept.port()) && prober.reaches(revoked.port()));
    let entries = || {
        let rows = daemon.metrics("agentguard_map_entries");
        let row = rows.iter().find(|(labels, _)| labels.contains("\"destinations\""));
        row.unwrap_or_else(|| panic!("{rows:?}")).1 as usize
    };
    // What is left of earlier allow-lists goes first.
    thread::sleep(Duration::from_millis(1500));
    let blocks: Vec<Value> = (entries()..ROOM)
        .map(|host| json!({"ipBlock": {"cidr": format!("192.0.2.{host}/32")}}))
        .collect();
    let egress = json!([{"to": blocks, "ports": [{"protocol": "TCP", "port": 9}]}]);
    let filling = scope_of("test:filling", json!({"egress": egress}));
    daemon.write("filling", &[filling, grant("filling", &other, "test:filling")]);
    wait_until("the table is full", || entries() == ROOM);

    revoke(&daemon, "revoked");
    assert!(!prober.reaches(revoked.port()), "what was revoked is refused at once");
    let mut denied = 0;
    let start = Instant::now();
    while !prober.reaches(kept.port()) {
        denied += 1;
        assert!(!prober.reaches(revoked.port()));
        assert!(start.elapsed() < PATIENCE, "what is granted comes back");
        thread::sleep(Duration::from_millis(10));
    }
    tell!("what is granted was denied {denied} times, for {:?}", start.elapsed());
    assert!(denied > 0, "there was room after all: this proved nothing");
    assert!(!prober.reaches(revoked.port()), "what was revoked stays so");
    assert!(daemon.said().contains("DESTINATIONS"), "it is said: {}", daemon.said());
    daemon.kill();
    assert!(!prober.reaches(revoked.port()) && prober.reaches(kept.port()));
}

#[test]
fn a_revocation_is_in_force_though_the_allow_list_does_not_compile() {
    let mut daemon = Daemon::installed();
    let (kept, revoked) = (Reachable::start(), Reachable::start());
    let agent = identity("agent");
    // Two that can not be had at once: together they have too many rules for one address.
    let many = |name: &str, first: usize| {
        let ports: Vec<Value> = (0..MAX_RULES * 3 / 4)
            .map(|port| json!({"protocol": "TCP", "port": first + 2 * port}))
            .collect();
        let to = json!([{"ipBlock": {"cidr": "127.0.0.1/32"}}]);
        scope_of(name, json!({"egress": [{"to": to, "ports": ports}]}))
    };
    daemon.write(
        "scopes",
        &[
            scope("test:kept", kept.port()),
            scope("test:revoked", revoked.port()),
            many("test:many", 1),
            many("test:more", 2001),
        ],
    );
    daemon.write("kept", &[grant("kept", &agent, "test:kept")]);
    daemon.start();
    let mut prober =
        Prober::start_by(daemon.command(["exec", "--identity", &agent, "--name", "agent"]));
    give(&daemon, "revoked", &agent, "test:revoked", "1h");
    give(&daemon, "many", &agent, "test:many", "1h");
    give(&daemon, "more", &agent, "test:more", "1h");
    let status = daemon.status().expect("it answers")["gaps"].to_string();
    assert!(status.contains("can not be compiled"), "{status}");
    assert!(prober.reaches(kept.port()) && prober.reaches(revoked.port()), "what was stays");
    revoke(&daemon, "revoked");
    assert!(!prober.reaches(revoked.port()), "what was revoked is refused at once");
    daemon.kill();
    daemon.start();
    assert!(!prober.reaches(revoked.port()), "also by the next daemon");
    revoke(&daemon, "more");
    assert!(prober.reaches(kept.port()), "what is granted is back when it compiles again");
    assert!(!prober.reaches(revoked.port()));
}

#[test]
fn an_exec_that_fails_takes_back_what_it_was_given() {
    let mut daemon = Daemon::installed();
    let server = Reachable::start();
    daemon.configure(|config| config["datapath"] = json!({"maps": {"workloads": 1}}));
    daemon.write("scope", &[scope("test:server", server.port())]);
    daemon.start();
    let first = Prober::start_by(daemon.command(["exec", "--name", "first"]));
    let exec = ["exec", "--name", "second", "--scope", "test:server", "--", "true"];
    let failed = daemon.run(exec);
    assert!(!failed.status.success(), "there is no room for it: {failed:?}");
    assert!(failed.stderr.contains("WORKLOADS"), "it says why: {failed:?}");
    assert_eq!(states(&daemon), pairs([]), "its grant is gone");
    assert_eq!(daemon.workloads(), ["first"]);
    assert!(!daemon.exec_cgroups().join("second").exists(), "its cgroup is gone");
    let left = count(&daemon.pins().join("links"));
    drop(first);
    wait_until("there is room", || daemon.workloads().is_empty());
    daemon.run(exec).expect_success("exec");
    wait_until("it ended", || daemon.workloads().is_empty());
    assert_eq!(states(&daemon), pairs([]));
    tell!("{left} links were pinned while one workload ran");
}

fn count(directory: &Path) -> usize {
    fs::read_dir(directory).into_iter().flatten().count()
}

#[test]
fn a_standalone_exec_that_fails_leaves_nothing() {
    let daemon = Daemon::installed();
    daemon.configure(|config| config["cgroup_parent"] = json!("cgroup.procs"));
    let mut exec = daemon.command(["exec", "--", "true"]);
    exec.stdout(Stdio::null());
    let failed = run(&mut exec, PATIENCE);
    assert!(!failed.status.success(), "{failed:?}");
    let name = daemon.pins().file_name().unwrap().to_string_lossy().into_owned();
    let left: Vec<String> = fs::read_dir("/sys/fs/bpf")
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|found| found.starts_with(&name))
        .collect();
    assert_eq!(left, [""; 0]);
    daemon.configure(|_| {});
}
