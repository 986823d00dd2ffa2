//! Row G6 of the threat model: a million requests while the daemon is killed, started and replaced
//! by one of another ABI version, manifests change and generations flip, and not one wrong decision.
//!
//! Workloads know what must come of each request; the kernel's counters must agree with what they
//! saw, request for request: none decided by nobody, and none twice.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use agentguard_tests::{
    Sink, World,
    daemon::{Daemon, grant, identity, next_program, program, scope_of},
    run, tell,
    traffic::{Expected, Kind, Report, Target, Traffic, assert_reconciles, assert_right},
    wait_until,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);
/// Requests there have to be at least.
const REQUESTS: u64 = 1_000_000;
/// Rounds of kill, restart and change there have to be at least.
const ROUNDS: u32 = 12;
/// A bound for everything, should the machine be busy.
const BOUND: Duration = Duration::from_secs(150);

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

/// How many requests a report tells of.
fn requests(reports: &[Report]) -> u64 {
    reports.iter().map(|report| report.attempts + report.sends).sum()
}

/// What has been done to the daemon so far.
#[derive(Debug, Default)]
struct Done {
    kills: u32,
    starts: u32,
    upgrades: u32,
    manifests: u32,
    grants: u32,
    revocations: u32,
}

impl Done {
    fn manifest(&mut self, daemon: &Daemon, agent: &str) {
        self.manifests += 1;
        let documents = match self.manifests % 2 {
            0 => vec![],
            _ => vec![grant("flipping", agent, "test:flipping")],
        };
        daemon.write("flipping", &documents);
    }

    /// Two generations, each in force when it is answered.
    fn give_and_take(&mut self, daemon: &Daemon, agent: &str) {
        self.grants += 1;
        let name = format!("flip-{}", self.grants);
        let arguments = ["grant", "--to", agent, "--scope", "test:other", "--ttl", "1h"];
        let mut command = daemon.command(arguments);
        command.args(["--reason", "a test", "--name", &name]);
        run(&mut command, PATIENCE).expect_success("grant");
        daemon.run(["revoke", &name, "--reason", "a test"]).expect_success("revoke");
        self.revocations += 1;
    }
}

#[test]
fn a_million_requests_under_kills_upgrades_and_flips_and_none_is_decided_wrongly() {
    let mut daemon = Daemon::installed();
    let world = World::new();
    let sinks = [(); 4].map(|()| Sink::open(world.network()));
    let [always, never, flipping, other] = &sinks;
    let (datagrams, streams) = (identity("datagrams"), identity("streams"));
    daemon.write(
        "scopes",
        &[
            scope_to("test:always", always),
            scope_to("test:flipping", flipping),
            scope_to("test:other", other),
        ],
    );
    daemon.write(
        "always",
        &[grant("datagrams", &datagrams, "test:always"), grant("streams", &streams, "test:always")],
    );
    daemon.start();
    let target = |kind, expected, sink: &Sink| Target::new(kind, expected, sink.address());
    let of_datagrams = [
        target(Kind::Udp, Expected::Passed, always),
        target(Kind::SendTo, Expected::Passed, always),
        target(Kind::Udp, Expected::Refused, never),
        target(Kind::SendTo, Expected::Refused, never),
        target(Kind::Udp, Expected::Either, flipping),
        target(Kind::SendTo, Expected::Either, flipping),
        target(Kind::Udp, Expected::Either, other),
        target(Kind::SendTo, Expected::Either, other),
    ];
    let of_streams =
        [target(Kind::Tcp, Expected::Passed, always), target(Kind::Tcp, Expected::Refused, never)];
    let start = |agent: &str, pause, targets: &[Target]| {
        let mut exec = daemon.command(["exec", "--identity", agent, "--"]);
        exec.stderr(Stdio::inherit());
        Traffic::start(world.inside(&exec), pause, targets)
    };
    let mut first = start(&datagrams, Duration::ZERO, &of_datagrams);
    let mut second = start(&streams, Duration::from_micros(200), &of_streams);

    let begin = Instant::now();
    let mut done = Done::default();
    loop {
        done.manifest(&daemon, &datagrams);
        done.give_and_take(&daemon, &datagrams);
        // Killed at another moment each time, also in the middle of a change.
        done.manifest(&daemon, &datagrams);
        std::thread::sleep(Duration::from_millis(u64::from(done.kills * 7 % 40)));
        daemon.kill();
        done.kills += 1;
        done.manifest(&daemon, &datagrams);
        if done.kills % 3 == 0 {
            done.upgrades += 1;
            let next = done.upgrades % 2 == 1;
            daemon.becomes(&if next { next_program() } else { program() });
        }
        daemon.start();
        done.starts += 1;
        let (one, two) = (first.report(), second.report());
        assert_right(&of_datagrams, &one);
        assert_right(&of_streams, &two);
        let enough = requests(&one) + requests(&two) >= REQUESTS && done.kills >= ROUNDS;
        if enough || begin.elapsed() > BOUND {
            break;
        }
    }
    let took = begin.elapsed();
    let (one, two) = (first.stop(), second.stop());
    assert_right(&of_datagrams, &one);
    assert_right(&of_streams, &two);
    let all = requests(&one) + requests(&two);
    tell!("{all} requests in {took:?} under {done:?}");
    for (target, report) in of_datagrams.iter().zip(&one).chain(of_streams.iter().zip(&two)) {
        let Report { attempts, sends, passed, refused, known, wrong, told: _ } = report;
        tell!(
            "{target}: {attempts} attempts, {sends} sends on them: {passed} passed, {refused} refused; {known} with a known outcome, {wrong} wrong"
        );
    }
    assert!(all >= REQUESTS, "{all} requests in {took:?}");
    assert!(done.kills >= ROUNDS, "{done:?}");
    let flipped = &one[4];
    assert!(flipped.passed > 0 && flipped.refused > 0, "nothing flipped: {flipped:?}");
    assert_reconciles(&daemon, &datagrams, &of_datagrams, &one);
    assert_reconciles(&daemon, &streams, &of_streams, &two);
    let events = daemon.status().expect("it answers")["totals"]["events"].clone();
    tell!("{events}");
    let number = |name: &str| events[name].as_u64().unwrap();
    assert_eq!(number("decided"), number("logged") + number("aggregated") + number("lost"));
    wait_until("the workloads end", || daemon.workloads().is_empty());
    wait_until("the audit log's chain is whole", || {
        let verified = run(daemon.command(["audit", "verify"]).arg(daemon.audit_log()), PATIENCE);
        verified.status.success()
    });
}
