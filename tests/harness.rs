//! The harness itself: what it sets up, it takes away.

use std::{
    fs,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    time::Duration,
};

use agentguard_tests::{
    Attack, Layer, Outcome, Protocol, Running, World,
    address::{API, GRANTED_PORT},
    attack_binary, compare_with_declared, requires, tell,
};

/// What the row of a matrix declares of its kernel is there: by it, attacks that need something can not be
/// passed over as not to be made.
#[test]
fn this_kernel_has_what_is_declared_of_it() {
    requires(Layer::Portable);
    let (missing, more) = compare_with_declared();
    tell!("there and not declared, so its row may declare it: {}", more.join(" "));
    assert_eq!(missing, [""; 0], "declared of this kernel and missing");
}

/// What a world leaves traces in.
fn traces(world: &World) -> [std::path::PathBuf; 4] {
    [
        world.network().client_file(),
        world.network().server_file(),
        world.cgroup().path().to_owned(),
        world.directory().to_owned(),
    ]
}

#[test]
fn a_world_leaves_nothing_behind() {
    requires(Layer::Portable);
    let world = World::new();
    let traces = traces(&world);
    assert!(traces.iter().all(|path| path.exists()), "{traces:?}");
    drop(world);
    for path in traces {
        assert!(!path.exists(), "{} is left", path.display());
    }
}

#[test]
fn a_world_leaves_nothing_behind_after_a_panic() {
    requires(Layer::Portable);
    let mut seen = None;
    let result = catch_unwind(AssertUnwindSafe(|| {
        let world = World::new();
        let cgroup = world.cgroup().child("work");
        fs::create_dir(cgroup.join("nested")).unwrap();
        let mut command = world.enter();
        command.arg("--cgroup").arg(cgroup).args(["--", "sleep", "60"]);
        let sleeper = Running::start(&mut command);
        seen = Some((traces(&world), sleeper.pid()));
        panic!("on purpose");
    }));
    assert!(result.is_err());
    let (traces, pid) = seen.unwrap();
    for path in traces {
        assert!(!path.exists(), "{} is left", path.display());
    }
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
}

#[test]
fn the_network_leads_nowhere_else() {
    requires(Layer::Portable);
    let world = World::new();
    for option in ["-4", "-6"] {
        let mut command = world.enter();
        command.args(["--", "ip", option, "route", "show", "default"]);
        let finished = agentguard_tests::run(&mut command, Duration::from_secs(5));
        assert!(finished.status.success(), "{finished:?}");
        assert_eq!(finished.stdout, "", "a default route leads out");
    }
}

#[test]
fn a_server_remembers_who_was_reached() {
    requires(Layer::Portable);
    let world = World::new();
    let api = SocketAddr::new(API, GRANTED_PORT);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        assert_eq!(world.servers().reach(protocol, api).bytes, 0);
    }
    let mut attack =
        Attack::new("n1-connect").option("to", api.to_string()).option("protocol", "tcp");
    let report = attack.run_without_the_guard(&world);
    assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
    assert_eq!(world.servers().reach(Protocol::Tcp, api).connections, 1);
    assert!(world.servers().reach(Protocol::Tcp, api).bytes > 0);
    assert_eq!(world.servers().reach(Protocol::Udp, api).bytes, 0);
}

#[test]
fn a_target_without_a_server_is_an_error_and_no_refusal() {
    requires(Layer::Portable);
    let world = World::new();
    let nobody = SocketAddr::new(API, 9);
    let mut attack =
        Attack::new("n1-connect").option("to", nobody.to_string()).option("protocol", "tcp");
    let report = attack.run_without_the_guard(&world);
    assert_eq!(report.outcome, Outcome::Error, "{report:?}");
}

#[test]
fn attacks_end_within_three_seconds_also_when_nothing_answers() {
    requires(Layer::Portable);
    let world = World::new();
    // Nobody has this address, so nobody answers for it.
    let silent = "192.0.2.99:443";
    let start = std::time::Instant::now();
    let mut command = world.enter();
    command.arg("--").arg(attack_binary()).args(["n1-connect", "--protocol", "tcp"]);
    command.args(["--to", silent]);
    agentguard_tests::run(&mut command, Duration::from_secs(10));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}
