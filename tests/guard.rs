//! Attacks on the guard itself: rows G3, G4, G5 and G8 of the threat model.

use std::{collections::BTreeSet, fs, net::SocketAddr, time::Duration};

use agentguard_tests::{
    Attack, BASE_SCOPE, Guard, Layer, Mode, Outcome, Protocol, Report, Running, WayOut, World,
    address::{API, DATABASE, GRANTED_PORT, OTHER_PORT},
    attack_binary, is_to_give,
    promise::Promise,
    requires, scrape, wait_until, ways_out,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

const FORBIDDEN: SocketAddr = SocketAddr::new(DATABASE, OTHER_PORT);

fn flood(how: &str) -> WayOut {
    let attack = Attack::new("g3-flood")
        .option("to", FORBIDDEN.to_string())
        .option("how", how)
        .option("count", "20000");
    WayOut::network(attack, Protocol::Udp, FORBIDDEN).recorded_as(&["send"], "5432")
}

ways_out! {
    /// G3
    flood_of_one_request: |_| flood("identical");
    flood_of_many_requests: |_| flood("distinct");
}

/// Reading the audit log checks that each line is one object without control characters.
fn hostile(how: &str, world: &World) -> WayOut {
    WayOut::exec(Attack::new("g4-hostile").option("how", how), &world.programs())
}

ways_out! {
    /// G4
    hostile_arguments: |world| hostile("argv", world);
    hostile_path: |world| hostile("path", world);
    hostile_thread_name: |world| hostile("comm", world);
    huge_arguments: |world| hostile("huge-argv", world);
    huge_path: |world| hostile("huge-path", world);
}

/// G5. The tables are small, so that an attack of three seconds can fill them.
fn exhausted(what: &str, count: u32) -> WayOut {
    let to = SocketAddr::new(DATABASE, GRANTED_PORT);
    let attack = Attack::new("g5-exhaust")
        .option("to", to.to_string())
        .option("protocol", "tcp")
        .option("what", what)
        .option("count", count.to_string());
    let maps = json!({"workloads": 16, "cgroups": 64, "verdict_cache": 64});
    WayOut::network(attack, Protocol::Tcp, to).configured(json!({"datapath": {"maps": maps}}))
}

ways_out! {
    /// G5
    more_cgroups_than_there_is_room_for: |_| {
        // What finds no room is denied as such, and the rest as always.
        exhausted("cgroups", 200)
            .recorded_as(&["leave", "connect", "send", "packet"], "")
    };
    more_processes_than_there_is_room_for: |_| exhausted("processes", 400);
    more_peers_than_there_is_room_for: |_| exhausted("destinations", 2_000);
    more_sockets_than_there_is_room_for: |_| exhausted("sockets", 2_000);
}

/// G3. The rings are as small as they can be, so that what is allowed does get lost.
#[test]
fn a_flood_of_allowed_requests_costs_no_denial_its_record() {
    requires(Layer::Portable);
    const DENIALS: u64 = 400;
    let world = World::new();
    let small = json!({"datapath": {"events_ring_bytes": 4096}});
    let guard = Guard::start_alone(&world, &[attack_binary()], &small);
    let api = SocketAddr::new(API, OTHER_PORT);
    guard.define(
        "test:every-port",
        &json!({"egress": [{
            "to": [{"ipBlock": {"cidr": format!("{API}/32")}}],
            "ports": [{"protocol": "UDP", "port": 1, "endPort": 65535}],
        }]}),
    );
    wait_until("the scope is known", || {
        guard
            .command(&["exec", "--scope", "test:every-port", "--name", "probe", "--", "/bin/true"])
            .status()
            .is_ok_and(|status| status.success())
    });
    let flood = |to: SocketAddr, count: u64| {
        Attack::new("g3-flood")
            .option("to", to.to_string())
            .option("how", "distinct")
            .option("count", count.to_string())
    };
    let scopes = [BASE_SCOPE, "test:every-port"];
    let mut noise = flood(api, 60_000).patient().start_as_workload(
        &world,
        &guard,
        "spiffe://agentguard.test/noise",
        &scopes,
        Mode::Enforce,
    );
    let quiet = "spiffe://agentguard.test/quiet";
    let report =
        flood(FORBIDDEN, DENIALS).run_as_workload(&world, &guard, quiet, &scopes, Mode::Enforce);
    assert_eq!(report.outcome, Outcome::Refused, "{report:?}");
    assert!(report.detail.contains(&format!("{DENIALS} of {DENIALS} refused")), "{report:?}");
    let noise = Report::of(&noise.wait(PATIENCE).expect("a flood ends"));
    assert_eq!(noise.outcome, Outcome::Worked, "{noise:?}");

    let events = settled(&guard);
    assert!(events.lost > 0, "the flood was none: {events:?}");
    assert_eq!(events.decided, events.logged + events.aggregated + events.lost, "{events:?}");
    let records = guard.audit_records();
    let ports: BTreeSet<u64> = records
        .iter()
        .filter(|record| record["verdict"] == "deny" && record["workload"]["identity"] == quiet)
        .filter_map(|record| record["request"]["port"].as_u64())
        .collect();
    // The denied port of the probe behind the flood is one more.
    let expected: BTreeSet<u64> = (1..=DENIALS).chain([u64::from(OTHER_PORT)]).collect();
    assert_eq!(ports, expected);
    guard.assert_chain_is_whole();
}

/// G3. Each of the same thousand requests is counted, and leaves a handful of records.
#[test]
fn identical_denials_are_folded_and_counted() {
    requires(Layer::Portable);
    let world = World::new();
    let guard = Guard::start_alone(&world, &[attack_binary()], &json!({}));
    let mut attack = Attack::new("g3-flood")
        .option("to", FORBIDDEN.to_string())
        .option("how", "identical")
        .option("count", "1000");
    let identity = "spiffe://agentguard.test/same";
    let report = attack.run_as_workload(&world, &guard, identity, &[BASE_SCOPE], Mode::Enforce);
    assert!(report.detail.contains("1000 of 1000 refused"), "{report:?}");
    let events = settled(&guard);
    assert_eq!(events.decided, events.logged + events.aggregated + events.lost, "{events:?}");
    // The exec, the thousand, and the probe.
    assert_eq!(events.decided, 1002, "{events:?}");
    assert_eq!(events.lost, 0, "{events:?}");
    let denials = guard.audit_records().iter().filter(|record| record["verdict"] == "deny").count();
    assert!((1..20).contains(&denials), "{denials} records of one request");
}

/// G1. The daemon is killed at once, before anything that is due now and then is done.
#[test]
fn a_revocation_and_a_workload_outlive_a_daemon_that_is_killed() {
    requires(Layer::Portable);
    let world = World::new();
    let mut guard = Guard::start(&world, &[]);
    let subject = "spiffe://agentguard.test/held";
    guard.grant("base", subject, BASE_SCOPE, Duration::from_secs(3600));
    let mut enter = world.enter();
    let line = guard.exec_line(subject, &[], Mode::Enforce);
    let _held = Running::start(enter.arg("--").args(line).args(["/bin/sleep", "600"]));
    wait_until("the workload is there", || !is_empty(&guard.json(&["workloads"])));
    let _grant = guard.json(&["revoke", "base", "--reason", "a test"]);
    guard.kill();
    guard.restart();
    let workloads = guard.json(&["workloads"]);
    assert_eq!(workloads[0]["identity"], subject, "{workloads}");
    let grants = guard.json(&["grants"]);
    let state = |grant: &Value| (grant["id"] == "base").then(|| grant["state"].clone());
    let states: Vec<Value> = grants.as_array().into_iter().flatten().filter_map(state).collect();
    assert_eq!(states, [json!("revoked")], "{grants}");
    let target = format!("{API}:{GRANTED_PORT}/TCP");
    let told = guard.json(&["explain", "--workload", "sleep", "--connect", &target]);
    assert_eq!(told["verdict"], "deny", "{told}");
}

fn is_empty(list: &Value) -> bool {
    list.as_array().is_none_or(Vec::is_empty)
}

/// What `status` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
struct Events {
    decided: u64,
    logged: u64,
    aggregated: u64,
    lost: u64,
}

/// What is counted in all, once all that was logged is in the audit log.
#[track_caller]
fn settled(guard: &Guard) -> Events {
    let mut last = None;
    wait_until("what was logged is written", || {
        let (events, written) = total(guard);
        last = Some(events);
        events.logged == written
    });
    last.expect("it was looked at")
}

/// What is counted in all, and how many verdicts are in the log, or counted there as lost.
fn total(guard: &Guard) -> (Events, u64) {
    let events = guard.status()["totals"]["events"].clone();
    let records = guard.audit_records();
    let verdicts = records.iter().filter(|record| record["kind"] == "verdict").count() as u64;
    let events = serde_json::from_value(events).expect("four counts");
    (events, verdicts + lost_by_the_log(&records))
}

/// Verdicts that the log itself had no room for, by its own count.
fn lost_by_the_log(records: &[Value]) -> u64 {
    let of = |record: &Value, class: &str| record[class].as_u64().expect("a count");
    records
        .iter()
        .filter(|record| record["kind"] == "loss" && record["cause"] != "ring_buffer")
        .map(|record| of(record, "allowed") + of(record, "denied"))
        .sum()
}

/// G8. The base scope, and what is wrong with it in each row.
fn invalid_manifests() -> Vec<(&'static str, Vec<u8>)> {
    const BASE: &str = "apiVersion: agentguard.dev/v1alpha1
kind: Scope
metadata: {name: bad}
spec:
  scope: test:bad
  description: a test
  egress:
    - to: [{ipBlock: {cidr: 198.51.100.0/24}}]
      ports: [{protocol: TCP, port: 443}]
";
    let with = |from: &str, to: &str| {
        assert!(BASE.contains(from), "{from}");
        BASE.replace(from, to).into_bytes()
    };
    let bomb = (1..40).fold("a0: &a0 [x]\n".to_owned(), |text, level| {
        let below = level - 1;
        format!("{text}a{level}: &a{level} [*a{below}, *a{below}, *a{below}]\n")
    });
    vec![
        ("no YAML", b"{{{ not: [yaml".to_vec()),
        ("no UTF-8", b"apiVersion: \xff\xfe".to_vec()),
        ("an unknown field", with("description:", "descripton:")),
        ("a duplicate key", with("  scope: test:bad\n", "  scope: test:bad\n  scope: test:bad\n")),
        ("a wrong type", with("[{protocol: TCP, port: 443}]", "everything")),
        ("no API version of ours", with("v1alpha1", "v9")),
        ("no kind of ours", with("kind: Scope", "kind: Hole")),
        ("no CIDR", with("198.51.100.0/24", "everywhere")),
        ("bits behind the prefix", with("198.51.100.0/24", "198.51.100.7/24")),
        ("a prefix that is too long", with("198.51.100.0/24", "198.51.100.0/33")),
        ("an empty list of destinations", with("[{ipBlock: {cidr: 198.51.100.0/24}}]", "[]")),
        ("port 0", with("port: 443", "port: 0")),
        ("port 65536", with("port: 443", "port: 65536")),
        ("a range that ends before it begins", with("port: 443", "port: 443, endPort: 80")),
        ("a scope that is there already", with("test:bad", BASE_SCOPE)),
        ("a cyclic anchor", b"a: &a [*a]\n".to_vec()),
        ("an alias bomb", bomb.into_bytes()),
        ("a deep document", "[".repeat(100_000).into_bytes()),
        ("a huge document", vec![b'#'; 64 << 20]),
    ]
}

#[test]
fn an_invalid_manifest_changes_nothing_that_is_enforced_and_is_shown() {
    // What is wrong is found before any kernel: one of each stage of reading does.
    let of_each_stage =
        ["no UTF-8", "an unknown field", "no CIDR", "a scope that is there already"];
    let some: Vec<_> =
        invalid_manifests().into_iter().filter(|(what, _)| of_each_stage.contains(what)).collect();
    assert_eq!(some.len(), of_each_stage.len());
    change_nothing(some);
}

#[test]
fn no_kind_of_invalid_manifest_changes_anything_that_is_enforced() {
    change_nothing(invalid_manifests());
}

/// Manifests, each with what is wrong with it, change nothing that is enforced and are shown.
#[track_caller]
fn change_nothing(invalid: Vec<(&'static str, Vec<u8>)>) {
    requires(Layer::Portable);
    let world = World::new();
    let metrics = scrape::unused_address();
    let guard = Guard::start_with(&world, &[], &json!({"metrics": {"listen": metrics}}));
    let mut enter = world.enter();
    let line = guard.exec_line("spiffe://agentguard.test/held", &[BASE_SCOPE], Mode::Enforce);
    let _held = Running::start(enter.arg("--").args(line).args(["/bin/sleep", "600"]));
    wait_until("the workload is there", || {
        guard.json(&["workloads"]).as_array().is_some_and(|all| all.len() == 1)
    });
    // Also what is wrong, as `status` shows it.
    let enforced = || {
        let explained = [API, DATABASE].map(|address| {
            let target = format!("{address}:{GRANTED_PORT}/TCP");
            let told = guard.json(&["explain", "--workload", "sleep", "--connect", &target]);
            told["verdict"].clone()
        });
        let status = guard.status();
        let errors = status["totals"]["manifests"]["errors"].as_array().expect("a list").clone();
        ((status["generation"].clone(), explained), errors)
    };
    let (before, none) = enforced();
    assert_eq!(before.1, [json!("allow"), json!("deny")]);
    assert_eq!(none, Vec::<Value>::new());
    let counted = || scrape::row(metrics, "agentguard_manifest_errors", &[]);
    for (what, text) in invalid {
        guard.write_manifest_text("bad", &text);
        wait_until(&format!("{what} is counted"), || counted() > 0.0);
        let (held, errors) = enforced();
        assert_eq!(held, before, "{what}");
        // What is wrong between two files has no file of its own, and names both in its message.
        let names_it = |part: &Value| part.as_str().is_some_and(|text| text.contains("/bad.yaml"));
        let shown =
            errors.iter().any(|error| names_it(&error["file"]) || names_it(&error["message"]));
        assert!(shown, "{what}: {errors:?}");
        assert_eq!(counted(), errors.len() as f64, "{what}");
        fs::remove_file(world.directory().join("guard/manifests/bad.yaml")).unwrap();
        wait_until(&format!("{what} is gone"), || counted() == 0.0);
    }
    let (held, errors) = enforced();
    assert_eq!((held, errors.len()), (before.clone(), 0));
    // A file that was valid goes on saying what it said.
    guard.write_manifest_text("base", b"spec: [");
    wait_until("the base is counted", || counted() > 0.0);
    assert_eq!(enforced().0, before);
    guard.recorded("the refused manifest", |record| {
        record["kind"] == "manifest_error"
            && record["source"].as_str().is_some_and(|file| file.ends_with("/base.yaml"))
            && record["line"].as_u64().is_some_and(|line| line > 0)
    });
}

/// The word by which records and gauges tell how many of a layer's hooks are in force.
fn word(hooks: &[&Value]) -> &'static str {
    match hooks.iter().filter(|hook| hook["state"] == "active").count() {
        0 => "none",
        active if active == hooks.len() => "full",
        _ => "partial",
    }
}

/// In `status`, in the start record of the audit log, in the record and the row of a workload, and in both
/// gauges, by layer: all tell the same, it is what this machine is promised to give, and what is missing is
/// named with the reason.
#[test]
fn what_is_told_of_protection_is_what_this_machine_is_to_give() {
    requires(Layer::Portable);
    let world = World::new();
    let metrics = scrape::unused_address();
    let listens = json!({"metrics": {"listen": metrics.to_string()}});
    let guard = Guard::start_with(&world, &[], &listens);
    let identity = "spiffe://agentguard.test/told";
    let line = guard.exec_line(identity, &[], Mode::Enforce);
    let mut enter = world.enter();
    let _held = Running::start(enter.arg("--").args(line).args(["/bin/sleep", "600"]));
    let added = guard.recorded("the workload", |record| {
        record["kind"] == "workload" && record["workload"]["identity"] == identity
    });
    let start = guard.recorded("the start", |record| record["kind"] == "start");
    let status = guard.status();
    let hooks = status["protection"]["layers"].as_array().expect("a list");
    let gaps: Vec<&str> =
        status["gaps"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();

    for (promise, layer) in [(Promise::Portable, "portable"), (Promise::Lsm, "lsm")] {
        let of_layer: Vec<&Value> = hooks.iter().filter(|hook| hook["layer"] == layer).collect();
        assert!(!of_layer.is_empty(), "{status}");
        let told = word(&of_layer);
        if is_to_give(promise) {
            assert_eq!(told, "full", "promised and missing: {layer}: {status}");
        }
        let recorded = start["protection"].as_array().into_iter().flatten();
        let recorded = recorded.into_iter().find(|recorded| recorded["layer"] == layer);
        let recorded = recorded.unwrap_or_else(|| panic!("no {layer} in {start}"));
        assert_eq!(recorded["protection"], told, "{start}");
        for hook in of_layer.iter().filter(|hook| hook["state"] != "active") {
            let (name, why) = (hook["hook"].as_str().unwrap(), hook["reason"].as_str());
            let why = why.unwrap_or_else(|| panic!("no reason for {name}: {status}"));
            assert!(hook["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{hook}");
            let missing = recorded["missing"].as_array().into_iter().flatten();
            let is_named = missing.into_iter().any(|missing| {
                missing["what"].as_str().is_some_and(|what| what.starts_with(name))
                    && missing["why"] == why
            });
            assert!(is_named, "{name} ({why}) is not in {recorded}");
        }
        for protection in ["full", "partial", "none"] {
            let labels = [("layer", layer), ("protection", protection)];
            let expected = if protection == told { 1.0 } else { 0.0 };
            let row = scrape::row(metrics, "agentguard_protection", &labels);
            assert!((row - expected).abs() < f64::EPSILON, "{labels:?}: {row}");
            let labels = [labels[0], labels[1], ("identity", identity)];
            let row = scrape::row(metrics, "agentguard_workload_protection", &labels);
            assert!((row - expected).abs() < f64::EPSILON, "{labels:?}: {row}");
        }
        if layer == "lsm" && told != "none" {
            let active = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
            assert!(active.trim().split(',').any(|name| name == "bpf"), "{told} with {active:?}");
        }
    }

    // What no hook closes is told alike, and nothing of it that a promised layer closes.
    let open = &start["protection"][1]["missing"];
    let open = open.as_array().into_iter().flatten().filter_map(|open| open["what"].as_str());
    let open: Vec<&str> = open.filter(|open| !hooks.iter().any(|hook| is_of(open, hook))).collect();
    assert!(!open.is_empty() && open.iter().all(|open| gaps.contains(open)), "{open:?}: {gaps:?}");
    let says = |part: &str| gaps.iter().any(|gap| gap.contains(part));
    if is_to_give(Promise::Lsm) {
        for closed in ["(T4, T5)", "(N6, N7)", "(N8)", "(N14)", "(E5)"] {
            assert!(!says(closed), "{closed} is closed here: {gaps:?}");
        }
    }
    if is_to_give(Promise::EndOthers) {
        assert!(!says("but not ended before it runs on"), "{gaps:?}");
    }
    let level = status["protection"]["level"].clone();
    let listed = guard.json(&["workloads"]);
    assert_eq!(listed[0]["protection"], level, "{listed}");
    assert_eq!(added["protection"], level, "{added}");
}

/// Whether a missing part of the promise is a hook of a layer.
fn is_of(missing: &str, hook: &Value) -> bool {
    hook["hook"].as_str().is_some_and(|hook| missing.starts_with(hook))
}
