//! One daemon in the place of another: of the same version with tables of other sizes, and of
//! another version of the ABI, there and back, with traffic running. Every request is decided by one
//! of the two, as the kernel's counters show.

use std::{
    fs,
    net::Ipv6Addr,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{net::SocketAddr, process::ExitStatusExt as _},
    },
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use agentguard::fault;
use agentguard_tests::{
    Sink, UnixSink, World,
    daemon::{Daemon, grant, identity, next_program, program, scope_of},
    run, tell,
    traffic::{Expected, Kind, Target, Traffic, assert_reconciles, assert_right},
    wait_until,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// What is granted to listen on, and what is not: below the ports that the kernel gives to clients.
const GRANTED_PORT: u16 = 8080;
const OTHER_PORT: u16 = 8081;
/// Granted too: one that is bound at the same time as the other.
const LISTENING_PORT: u16 = 8082;

/// Which kinds of requests are under way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kinds {
    /// Connects and sends over IPv4.
    Few,
    /// All that the portable layer decides.
    Portable,
    /// And all that the LSM layer decides.
    Both,
}

fn scope_to(name: &str, sink: &Sink) -> Value {
    scope_of(name, json!({"egress": [egress_to(sink)]}))
}

fn egress_to(sink: &Sink) -> Value {
    let (address, port) = (sink.address().ip(), sink.address().port());
    let cidr = format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 });
    json!({
        "to": [{"ipBlock": {"cidr": cidr}}],
        "ports": [{"protocol": "TCP", "port": port}, {"protocol": "UDP", "port": port}],
    })
}

/// A workload under traffic whose every outcome is known.
struct Busy {
    identity: String,
    targets: Vec<Target>,
    traffic: Traffic,
    /// How often each target is tried before it is said that the workload goes on.
    rounds: u64,
}

impl Busy {
    /// One that never rests for longer than `pause`.
    fn start(
        daemon: &Daemon,
        world: &World,
        name: &str,
        pause: Duration,
        targets: Vec<Target>,
    ) -> Self {
        let identity = identity(name);
        let mut exec = daemon.command(["exec", "--identity", &identity, "--"]);
        exec.stderr(Stdio::inherit());
        let traffic = Traffic::start(world.inside(&exec), pause, &targets);
        // Where a program is run in each round, one takes longer than many sends.
        let rounds = match targets.iter().any(|target| target.kind == Kind::Exec) {
            true => 5,
            false if targets.iter().any(|target| target.kind == Kind::Tcp) => 10,
            false => 50,
        };
        Self { identity, targets, traffic, rounds }
    }
}

/// What the workload of many kinds meets.
struct Others {
    granted: Sink,
    forbidden: Sink,
    unix: Option<[UnixSink; 2]>,
    /// Of the granted and of the forbidden unix sockets: a path for streams, a name for datagrams.
    unix_places: [[String; 2]; 2],
}

impl Others {
    fn open(world: &World, kinds: Kinds) -> Self {
        let sink = || Sink::open_on(world.network(), Ipv6Addr::LOCALHOST.into());
        let unix_places = ["granted", "forbidden"].map(|name| {
            let path = world.directory().join(format!("{name}.sock"));
            [path.display().to_string(), format!("{}-{name}", world.name())]
        });
        let unix = (kinds == Kinds::Both).then(|| {
            unix_places.each_ref().map(|[path, name]| {
                let path = SocketAddr::from_pathname(path).expect("a path that fits");
                let name = SocketAddr::from_abstract_name(name).expect("a name that fits");
                UnixSink::open(world.network(), path, name)
            })
        });
        Self { granted: sink(), forbidden: sink(), unix, unix_places }
    }

    fn scope(&self, name: &str) -> Value {
        let mut spec = json!({
            "egress": [egress_to(&self.granted)],
            "exec": [{"path": "/bin/true"}],
            "listen": [
                {"protocol": "TCP", "port": GRANTED_PORT},
                {"protocol": "TCP", "port": LISTENING_PORT},
            ],
        });
        if self.unix.is_some() {
            let [[path, name], _] = &self.unix_places;
            spec["unixSockets"] = json!([{"path": path}, {"abstract": name}]);
        }
        scope_of(name, spec)
    }

    fn targets(&self) -> Vec<Target> {
        use {Expected::*, Kind::*};
        let mut targets = Vec::new();
        let mut add = |kind, expected, place: &dyn std::fmt::Display| {
            targets.push(Target::new(kind, expected, place));
        };
        for (expected, sink) in [(Passed, &self.granted), (Refused, &self.forbidden)] {
            for kind in [Tcp, Udp, SendTo] {
                add(kind, expected, &sink.address());
            }
        }
        for host in ["127.0.0.1", "[::1]"] {
            add(Bind, Passed, &format!("{host}:{GRANTED_PORT}"));
            add(Bind, Refused, &format!("{host}:{OTHER_PORT}"));
        }
        add(Exec, Passed, &"/bin/true");
        add(Exec, Refused, &"/bin/false");
        add(Raw, Refused, &libc::IPPROTO_ICMP);
        if self.unix.is_some() {
            add(Listen, Passed, &format!("127.0.0.1:{LISTENING_PORT}"));
            add(ListenUnbound, Refused, &"127.0.0.1:0");
            for (expected, [path, name]) in [Passed, Refused].into_iter().zip(&self.unix_places) {
                add(UnixStream, expected, path);
                add(UnixDatagram, expected, &format!("@{name}"));
            }
            add(Family, Refused, &libc::AF_PACKET);
        }
        targets
    }
}

/// A daemon, and workloads under traffic whose every outcome is known: one of datagrams, each of
/// which is counted, one of streams, and maybe one of all other kinds.
struct Scene {
    // Dropped in this order: what runs ends before its daemon is uninstalled.
    workloads: Vec<Busy>,
    daemon: Daemon,
    _others: Others,
    _sinks: [Sink; 2],
    _world: World,
}

impl Scene {
    fn new(kinds: Kinds) -> Self {
        let mut daemon = Daemon::installed();
        let world = World::new();
        let sinks = [(); 2].map(|()| Sink::open(world.network()));
        let [always, never] = &sinks;
        let others = Others::open(&world, kinds);
        daemon.write("scope", &[scope_to("test:always", always)]);
        daemon.write(
            "always",
            &["datagrams", "streams"].map(|name| grant(name, &identity(name), "test:always")),
        );
        if kinds != Kinds::Few {
            let grant = grant("others", &identity("others"), "test:others");
            daemon.write("others", &[others.scope("test:others"), grant]);
        }
        daemon.start();
        let target = |kind, expected, sink: &Sink| Target::new(kind, expected, sink.address());
        let datagrams = vec![
            target(Kind::Udp, Expected::Passed, always),
            target(Kind::SendTo, Expected::Passed, always),
            target(Kind::Udp, Expected::Refused, never),
            target(Kind::SendTo, Expected::Refused, never),
        ];
        let streams = vec![
            target(Kind::Tcp, Expected::Passed, always),
            target(Kind::Tcp, Expected::Refused, never),
        ];
        let start = |name, pause, targets| {
            Busy::start(&daemon, &world, name, Duration::from_micros(pause), targets)
        };
        let mut workloads = vec![start("datagrams", 20, datagrams), start("streams", 200, streams)];
        if kinds != Kinds::Few {
            workloads.push(start("others", 200, others.targets()));
        }
        Self { workloads, daemon, _others: others, _sinks: sinks, _world: world }
    }

    fn goes_on(&mut self) {
        for busy in &mut self.workloads {
            busy.traffic.goes_on(busy.rounds);
        }
    }

    /// Ends the traffic, and compares what it saw with what was counted.
    fn ends_well(self) {
        let Self { daemon, workloads, .. } = self;
        for Busy { identity, targets, traffic, rounds: _ } in workloads {
            let reports = traffic.stop();
            assert_right(&targets, &reports);
            let all: u64 = reports.iter().map(|report| report.attempts + report.sends).sum();
            tell!("{identity}: {all} requests of {} kinds, none decided wrongly", targets.len());
            assert_reconciles(&daemon, &identity, &targets, &reports);
        }
        let events = daemon.status().expect("it answers")["totals"]["events"].clone();
        let number = |name: &str| events[name].as_u64().unwrap();
        assert_eq!(number("decided"), number("logged") + number("aggregated") + number("lost"));
        wait_until("the workloads end", || daemon.workloads().is_empty());
        wait_until("the audit log's chain is whole", || {
            let log = daemon.audit_log();
            let verified = run(daemon.command(["audit", "verify"]).arg(log), PATIENCE);
            verified.status.success()
        });
    }
}

/// The builds and tables that are pinned.
fn pinned(daemon: &Daemon) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(daemon.pins())
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("build-") || name.starts_with("tables-"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_daemon_of_another_version_takes_over_and_gives_back_without_a_gap() {
    takes_over_and_gives_back(Scene::new(Kinds::Portable), 2);
}

/// Once more leaves nothing of the first time in the way.
fn takes_over_and_gives_back(mut scene: Scene, times: usize) {
    let first = pinned(&scene.daemon);
    assert_eq!(first.len(), 2, "one build, one set of tables: {first:?}");
    let programs = [next_program(), program()];
    for (round, program) in programs.iter().cycle().take(2 * times).enumerate() {
        scene.goes_on();
        let begin = Instant::now();
        // With and without a chance to say farewell.
        if round % 2 == 0 {
            scene.daemon.kill();
        } else {
            scene.daemon.stop();
        }
        scene.daemon.becomes(program);
        scene.daemon.start();
        let took = begin.elapsed();
        scene.goes_on();
        let now = pinned(&scene.daemon);
        assert_eq!(now.len(), 2, "the other's are gone: {now:?}");
        let same = now == first;
        assert_eq!(same, round % 2 == 1, "{now:?} after {first:?}");
        tell!("{} took over in {took:?}: {now:?}", program.display());
    }
    scene.ends_well();
}

#[test]
fn tables_of_another_size_take_over_without_a_gap() {
    tables_of_another_size(Scene::new(Kinds::Portable));
}

fn tables_of_another_size(mut scene: Scene) {
    for destinations in [1000, 2000] {
        scene.daemon.kill();
        scene.daemon.configure(|config| {
            config["datapath"] = json!({"maps": {"destinations": destinations}});
        });
        scene.daemon.start();
        scene.goes_on();
        assert_eq!(pinned(&scene.daemon).len(), 2);
    }
    scene.ends_well();
}

#[test]
fn a_daemon_that_is_killed_and_started_leaves_no_gap() {
    is_killed_and_started(Scene::new(Kinds::Portable));
}

fn is_killed_and_started(mut scene: Scene) {
    let before = pinned(&scene.daemon);
    for _ in 0..3 {
        scene.daemon.kill();
        scene.goes_on();
        scene.daemon.start();
        scene.goes_on();
        assert_eq!(pinned(&scene.daemon), before, "it goes on with what is there");
    }
    scene.ends_well();
}

#[test]
fn a_daemon_that_can_not_hold_everything_leaves_the_other_in_force() {
    let mut scene = Scene::new(Kinds::Few);
    let before = pinned(&scene.daemon);
    scene.daemon.kill();
    // Room for one allow-list of the two.
    scene.daemon.configure(|config| config["datapath"] = json!({"maps": {"destinations": 1}}));
    scene.daemon.start();
    scene.goes_on();
    let both = pinned(&scene.daemon);
    assert!(before.iter().all(|name| both.contains(name)), "{before:?} of {both:?}");
    assert!(scene.daemon.said().contains("stays in force"), "it is said: {}", scene.daemon.said());
    scene.daemon.kill();
    scene.daemon.configure(|_| {});
    scene.daemon.start();
    scene.goes_on();
    assert_eq!(pinned(&scene.daemon), before, "what could not hold everything is gone");
    scene.ends_well();
}

#[test]
fn a_daemon_that_could_not_hold_everything_says_so_and_takes_over_once_it_can() {
    let Scene { mut daemon, workloads, _others, _sinks, _world } = Scene::new(Kinds::Few);
    let [mut datagrams, streams] = <[Busy; 2]>::try_from(workloads).ok().expect("there are two");
    let before = pinned(&daemon);
    daemon.kill();
    daemon.configure(|config| config["datapath"] = json!({"maps": {"destinations": 1}}));
    daemon.start();
    let waits = |daemon: &Daemon| {
        let status = daemon.status().expect("it answers");
        status["gaps"].to_string().contains("stays in force until this one holds every workload")
    };
    assert!(waits(&daemon), "{:?}", daemon.status());
    // What the other build has of it goes on.
    let refused = daemon.run(["revoke", "datagrams", "--reason", "a test"]);
    assert!(!refused.status.success(), "{refused:?}");
    assert!(refused.stderr.contains("not in force yet"), "{refused:?}");

    // Room for the one that is left; what was revoked is so from then on.
    assert_right(&streams.targets, &streams.traffic.stop());
    wait_until("it takes over", || !waits(&daemon));
    let now = pinned(&daemon);
    assert!(now.len() == 2 && now != before, "{now:?} after {before:?}");
    let refused = |traffic: &mut Traffic| traffic.report()[0].refused;
    wait_until("what was revoked is refused", || refused(&mut datagrams.traffic) > 0);
}

#[test]
fn a_daemon_that_dies_while_it_takes_over_leaves_one_program_to_each_request() {
    dies_while_it_takes_over(Scene::new(Kinds::Portable));
}

fn dies_while_it_takes_over(mut scene: Scene) {
    let points: Vec<&str> = fault::POINTS
        .iter()
        .copied()
        .filter(|point| ["load.", "takeover.", "start."].iter().any(|of| point.starts_with(of)))
        // Those are passed only where nothing is in force yet, or all of it.
        .filter(|point| !matches!(*point, "load.gate" | "load.adopted"))
        .collect();
    let mut programs = [next_program(), program()].into_iter().cycle();
    let other = |path: &Path| if path == program() { next_program() } else { program() };
    for point in points {
        let program = programs.next().expect("there is no end of them");
        for time in ["", "@3"] {
            // Once only, what is not done hook by hook.
            if time == "@3" && !matches!(point, "takeover.link" | "takeover.gate" | "load.pinned") {
                continue;
            }
            scene.daemon.kill();
            scene.daemon.becomes(&program);
            scene.daemon.launch(&[(fault::VARIABLE, &format!("{point}{time}"))]);
            let ended = scene.daemon.ended(PATIENCE);
            let ended = ended.unwrap_or_else(|| panic!("{point}{time} is not passed"));
            let killed = Some(Signal::SIGKILL as i32);
            assert_eq!(ended.status.signal(), killed, "{point}{time}: {ended:?}");
            scene.goes_on();
            // Either of the two can go on from there: first the one that was in force.
            for program in [other(&program), program.clone()] {
                scene.daemon.becomes(&program);
                scene.daemon.start();
                scene.goes_on();
                assert_eq!(pinned(&scene.daemon).len(), 2, "{point}{time}");
                scene.daemon.kill();
            }
            // So that the next one has something to take over.
            scene.daemon.becomes(&other(&program));
            scene.daemon.start();
            tell!("{point}{time}: whole again");
        }
        scene.daemon.becomes(&program);
        scene.daemon.kill();
        scene.daemon.start();
    }
    scene.ends_well();
}

/// The same with requests under way that only the LSM layer decides.
mod lsm {
    use agentguard_tests::{Layer, requires};

    use super::{
        Kinds, Scene, dies_while_it_takes_over, is_killed_and_started, tables_of_another_size,
        takes_over_and_gives_back,
    };

    fn scene() -> Scene {
        requires(Layer::Lsm);
        Scene::new(Kinds::Both)
    }

    #[test]
    fn a_daemon_of_another_version_takes_over_and_gives_back_without_a_gap() {
        takes_over_and_gives_back(scene(), 1);
    }

    #[test]
    fn tables_of_another_size_take_over_without_a_gap() {
        tables_of_another_size(scene());
    }

    #[test]
    fn a_daemon_that_is_killed_and_started_leaves_no_gap() {
        is_killed_and_started(scene());
    }

    #[test]
    fn a_daemon_that_dies_while_it_takes_over_leaves_one_program_to_each_request() {
        dies_while_it_takes_over(scene());
    }
}
