//! Row G6 of the threat model: a million requests while the daemon is killed, started and replaced
//! by one of another ABI version, manifests change and generations flip, and not one wrong decision.
//!
//! Workloads know what must come of each request: of what is always granted, of what never is, and
//! of what flips too, for each request that begins after one change was acknowledged and ends before the
//! next one is begun. The kernel's counters must agree with what they saw, request for request: none
//! decided by nobody, and none twice.

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

/// Places among the targets of the datagrams, of what a manifest grants and of what the control API does.
const BY_MANIFEST: [usize; 2] = [4, 5];
const BY_API: [usize; 2] = [6, 7];

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

/// Has what is right of some targets be known, or not for the time of a change.
fn expect(traffic: &mut Traffic, targets: [usize; 2], expected: Expected) {
    for target in targets {
        traffic.expect(target, expected);
    }
}

impl Done {
    /// Begins to change what a manifest grants.
    fn manifest(&mut self, daemon: &Daemon, agent: &str, traffic: &mut Traffic) {
        expect(traffic, BY_MANIFEST, Expected::Either);
        self.manifests += 1;
        let documents = match self.is_granted() {
            false => vec![],
            true => vec![grant("flipping", agent, "test:flipping")],
        };
        daemon.write("flipping", &documents);
    }

    /// Whether the manifest grants, as it was written last.
    const fn is_granted(&self) -> bool {
        self.manifests % 2 == 1
    }

    /// From now on what the manifest says is in force, as the daemon shows it.
    fn manifest_is_in_force(&self, daemon: &Daemon, traffic: &mut Traffic) {
        let is_shown = || {
            let grants = daemon.json(["grants"]);
            grants.as_array().into_iter().flatten().any(|grant| grant["id"] == "flipping")
        };
        wait_until("the manifest is in force", || is_shown() == self.is_granted());
        let expected = if self.is_granted() { Expected::Passed } else { Expected::Refused };
        expect(traffic, BY_MANIFEST, expected);
    }

    /// A generation, in force when it is answered.
    fn give(&mut self, daemon: &Daemon, agent: &str, traffic: &mut Traffic) {
        expect(traffic, BY_API, Expected::Either);
        self.grants += 1;
        let arguments = ["grant", "--to", agent, "--scope", "test:other", "--ttl", "1h"];
        let mut command = daemon.command(arguments);
        command.args(["--reason", "a test", "--name", &self.given()]);
        run(&mut command, PATIENCE).expect_success("grant");
        expect(traffic, BY_API, Expected::Passed);
    }

    /// The same the other way.
    fn take(&mut self, daemon: &Daemon, traffic: &mut Traffic) {
        expect(traffic, BY_API, Expected::Either);
        daemon.run(["revoke", &self.given(), "--reason", "a test"]).expect_success("revoke");
        self.revocations += 1;
        expect(traffic, BY_API, Expected::Refused);
    }

    /// The name of the last grant.
    fn given(&self) -> String {
        format!("flip-{}", self.grants)
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
        // These are told anew with every change: see `BY_MANIFEST` and `BY_API`.
        target(Kind::Udp, Expected::Refused, flipping),
        target(Kind::SendTo, Expected::Refused, flipping),
        target(Kind::Udp, Expected::Refused, other),
        target(Kind::SendTo, Expected::Refused, other),
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
        done.manifest(&daemon, &datagrams, &mut first);
        done.manifest_is_in_force(&daemon, &mut first);
        done.give(&daemon, &datagrams, &mut first);
        // What was given stays so over every second kill, and what was taken over the others; and half of
        // all kills come in the middle of a change of the manifest.
        let (stays_given, is_changing) = (done.kills % 2 == 0, done.kills / 2 % 2 == 0);
        if !stays_given {
            done.take(&daemon, &mut first);
        }
        if is_changing {
            done.manifest(&daemon, &datagrams, &mut first);
        }
        // At another moment each time.
        std::thread::sleep(Duration::from_millis(u64::from(done.kills * 7 % 40)));
        daemon.kill();
        done.kills += 1;
        if is_changing {
            done.manifest(&daemon, &datagrams, &mut first);
        }
        if done.kills % 3 == 0 {
            done.upgrades += 1;
            let next = done.upgrades % 2 == 1;
            daemon.becomes(&if next { next_program() } else { program() });
        }
        daemon.start();
        done.starts += 1;
        done.manifest_is_in_force(&daemon, &mut first);
        if stays_given {
            done.take(&daemon, &mut first);
        }
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
    for flipped in BY_MANIFEST.into_iter().chain(BY_API).map(|target| &one[target]) {
        assert!(flipped.passed > 0 && flipped.refused > 0, "nothing flipped: {flipped:?}");
        let all = flipped.attempts + flipped.sends;
        assert!(flipped.known > all / 3, "what is right was hardly ever known: {flipped:?}");
    }
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
