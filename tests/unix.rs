//! The ways out by unix sockets: rows T4 and T5 of the threat model, and what must go on.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use agentguard_tests::{
    Attack, BASE_SCOPE, Facility, Guard, Layer, Mode, Outcome, Running, WayOut, World,
    attack_binary, requires, ways_out,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);
const IDENTITY: &str = "spiffe://agentguard.test/unix";

/// What `status` says where nothing looks at unix sockets.
const OPEN: &str = "unix sockets";

/// How a socket is called.
#[derive(Clone)]
enum Name {
    Path(PathBuf),
    Abstract(Vec<u8>),
}

impl Name {
    fn options(&self) -> [String; 2] {
        match self {
            Self::Path(path) => ["--path".to_owned(), path.display().to_string()],
            Self::Abstract(name) => {
                let hex = name.iter().map(|byte| format!("{byte:02x}")).collect();
                ["--hex".to_owned(), hex]
            }
        }
    }
}

/// A server outside the workload.
fn server(kind: &str, name: &Name, more: &[&str]) -> Running {
    let mut command = Command::new(attack_binary());
    command.args(["serve", "unix", "--kind", kind]).args(name.options()).args(more);
    // Open for as long as it shall live.
    let server = Running::start(command.stdin(Stdio::piped()));
    server.said("ready", PATIENCE);
    server
}

/// As a daemon's socket lies: in a directory of its own.
fn docker(world: &World) -> PathBuf {
    let directory = world.directory().join("docker");
    fs::create_dir(&directory).unwrap();
    directory.join("docker.sock")
}

fn scratch(world: &World) -> PathBuf {
    let scratch = world.directory().join("scratch");
    fs::create_dir_all(&scratch).unwrap();
    scratch
}

fn attack(world: &World, kind: &str, name: &Name, by: &str, how: &str) -> Attack {
    Attack::new("t4-unix")
        .args(["--kind", kind, "--by", by, "--how", how])
        .args(name.options())
        .option("scratch", scratch(world))
}

/// T4, T5: a forbidden socket.
fn path(world: &World, kind: &str, by: &str, how: &str) -> WayOut {
    let name = Name::Path(docker(world));
    let server = server(kind, &name, &[]);
    WayOut::unix(attack(world, kind, &name, by, how), server, "docker.sock").or_gap(OPEN)
}

/// The same with a socket beside it that is granted.
fn beside(world: &World, kind: &str, by: &str, how: &str) -> WayOut {
    let granted = world.directory().join("granted/tool.sock");
    fs::create_dir(granted.parent().unwrap()).unwrap();
    let mut way_out = path(world, kind, by, how);
    way_out.helpers.push(quiet(kind, &Name::Path(granted.clone())));
    way_out.attack = way_out.attack.option("granted", &granted);
    way_out.granted("test:tool", json!({"unixSockets": [{"path": granted}]}))
}

/// A server whose word does not count: it is granted.
fn quiet(kind: &str, name: &Name) -> Running {
    let mut command = Command::new("sh");
    command.args(["-c", "\"$@\" | sed -u s/^heard/spoke/", "sh"]).arg(attack_binary());
    command.args(["serve", "unix", "--kind", kind]).args(name.options());
    let server = Running::start(command.stdin(Stdio::piped()));
    server.said("ready", PATIENCE);
    server
}

/// An abstract socket; `near` is granted.
fn abstract_name(world: &World, kind: &str, how: &str, name: &[u8], near: Option<&str>) -> WayOut {
    // Abstract names are of a network namespace: the servers must be where the workload is.
    let name = Name::Abstract([world.name().as_bytes(), name].concat());
    let mut command = world.enter();
    command.arg("--").arg(attack_binary()).args(["serve", "unix", "--kind", kind]);
    let server = Running::start(command.args(name.options()).stdin(Stdio::piped()));
    server.said("ready", PATIENCE);
    let way_out =
        WayOut::unix(attack(world, kind, &name, "name", how), server, world.name()).or_gap(OPEN);
    match near {
        None => way_out,
        Some(near) => way_out.granted(
            "test:tool",
            json!({"unixSockets": [{"abstract": format!("{}{near}", world.name())}]}),
        ),
    }
}

/// A socket that a helper outside has connected.
fn received(world: &World) -> WayOut {
    let docker = docker(world);
    let server = server("stream", &Name::Path(docker.clone()), &[]);
    let lender = world.directory().join("lender.sock");
    let mut command = Command::new(attack_binary());
    command.arg("helper-lend-unix").arg("--to").arg(docker).arg("--listen").arg(&lender);
    let helper = Running::start(command.stdin(Stdio::piped()));
    helper.said("ready ", PATIENCE);
    let attack = attack(world, "stream", &Name::Path(lender.clone()), "name", "received");
    WayOut::unix(attack, server, "")
        .with_helper(helper)
        .granted("test:lender", json!({"unixSockets": [{"path": lender}]}))
        .recorded_as(&["unix_connect", "unix_send", "send"], "")
        .or_gap("SCM_RIGHTS")
}

ways_out! {
    /// T4
    daemon_by_its_path: |world| path(world, "stream", "name", "connect");
    daemon_of_packets: |world| path(world, "packets", "name", "connect");
    daemon_by_a_relative_path: |world| path(world, "stream", "relative", "connect");
    daemon_through_proc_self_root: |world| path(world, "stream", "proc-root", "connect");
    daemon_through_a_descriptor: |world| path(world, "stream", "descriptor", "connect");
    daemon_through_a_symlink: |world| path(world, "stream", "symlink", "connect");
    daemon_through_a_hard_link: |world| path(world, "stream", "hard-link", "connect");
    symlink_where_a_granted_socket_was: |world| beside(world, "stream", "symlink-in-place", "connect");
    hard_link_where_a_granted_socket_was:
        |world| beside(world, "stream", "hard-link-in-place", "connect");
    hard_link_that_outlives_the_first_name:
        |world| beside(world, "stream", "move-by-link", "connect");
    socket_moved_where_a_granted_one_was:
        |world| beside(world, "stream", "rename-in-place", "connect");
    directory_mounted_over_a_granted_one:
        |world| beside(world, "stream", "mount-in-place", "connect");
    socket_mounted_over_a_granted_one:
        |world| beside(world, "stream", "file-mount-in-place", "connect");
    daemon_by_a_ring: |world| path(world, "stream", "name", "ring");
    daemon_by_a_worker_of_a_ring: |world| path(world, "stream", "name", "ring-worker");
    daemon_by_a_kernel_thread_of_a_ring: |world| path(world, "stream", "name", "ring-thread");
    connected_unix_socket_from_outside: |world| received(world);
    abstract_socket: |world| abstract_name(world, "stream", "connect", b"-bus", None);
    abstract_socket_of_packets: |world| abstract_name(world, "packets", "connect", b"-bus", None);
    abstract_name_that_goes_on: |world| abstract_name(world, "stream", "connect", b"-busx", Some("-bus"));
    abstract_name_that_goes_on_behind_a_nul:
        |world| abstract_name(world, "stream", "connect", b"-bus\0", Some("-bus"));
    abstract_name_with_a_nul_in_it:
        |world| abstract_name(world, "stream", "connect", b"-bus\0x", Some("-bus"));
    abstract_name_that_ends_early: |world| abstract_name(world, "stream", "connect", b"-bu", Some("-bus"));
    abstract_name_like_a_granted_path: |world| {
        let granted = world.directory().join("-bus");
        abstract_name(world, "stream", "connect", b"-bus", None)
            .granted("test:tool", json!({"unixSockets": [{"path": granted}]}))
    };
}

ways_out! {
    /// T5
    connected_datagrams: |world| path(world, "datagram", "name", "connect");
    datagram_by_sendto: |world| path(world, "datagram", "name", "sendto");
    datagram_by_sendmsg: |world| path(world, "datagram", "name", "sendmsg");
    datagram_behind_a_granted_one: |world| beside(world, "datagram", "name", "sendmmsg");
    datagram_through_a_hard_link: |world| path(world, "datagram", "hard-link", "sendto");
    datagram_to_a_directory_mounted_over_a_granted_one:
        |world| beside(world, "datagram", "mount-in-place", "sendto");
    datagram_to_a_socket_moved_where_a_granted_one_was:
        |world| beside(world, "datagram", "rename-in-place", "sendto");
    datagram_by_a_ring: |world| path(world, "datagram", "name", "ring-send");
    datagram_by_a_worker_of_a_ring: |world| path(world, "datagram", "name", "ring-send-worker");
    abstract_datagram: |world| abstract_name(world, "datagram", "sendto", b"-log", None);
    abstract_datagram_with_a_nul_in_its_name:
        |world| abstract_name(world, "datagram", "sendto", b"-log\0x", Some("-log"));
}

/// Runs the attack as a workload with `scopes`, which must let it through, unseen.
fn goes_on(world: &World, scopes: &[(&'static str, Value)], attack: Attack) {
    let guard = Guard::start_knowing(world, &[attack_binary()], scopes);
    let names: Vec<&str> =
        [BASE_SCOPE].into_iter().chain(scopes.iter().map(|(name, _)| *name)).collect();
    let report = attack.patient().run_as_workload(world, &guard, IDENTITY, &names, Mode::Enforce);
    assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
    let denied: Vec<_> =
        guard.audit_records().into_iter().filter(|record| record["verdict"] == "deny").collect();
    assert!(denied.is_empty(), "{denied:#?}");
}

/// A granted path, and all the ways that lead to it.
#[test]
fn a_granted_path_is_reached() {
    requires(Layer::Portable);
    for kind in ["stream", "packets", "datagram"] {
        for by in ["name", "relative", "symlink"] {
            let world = World::new();
            let name = Name::Path(docker(&world));
            let _server = server(kind, &name, &[]);
            let how = if kind == "datagram" { "sendto" } else { "connect" };
            let attack = attack(&world, kind, &name, by, how);
            goes_on(&world, &granted_path(&name), attack);
        }
    }
}

fn granted_path(name: &Name) -> [(&'static str, Value); 1] {
    let Name::Path(path) = name else { panic!("no path") };
    [("test:docker", json!({"unixSockets": [{"path": path}]}))]
}

#[test]
fn a_granted_abstract_name_is_reached() {
    requires(Layer::Portable);
    let world = World::new();
    let way_out = abstract_name(&world, "stream", "connect", b"-bus", Some("-bus"));
    goes_on(&world, &way_out.scopes, way_out.attack);
}

/// The daemon starts again, and makes its socket anew.
#[test]
fn a_granted_socket_that_is_made_anew_is_reached() {
    requires(Layer::Portable);
    let world = World::new();
    let name = Name::Path(docker(&world));
    let scopes = granted_path(&name);
    let guard = Guard::start_knowing(&world, &[attack_binary()], &scopes);
    for _ in 0..3 {
        let server = server("stream", &name, &["--again"]);
        let report = attack(&world, "stream", &name, "name", "connect").patient().run_as_workload(
            &world,
            &guard,
            IDENTITY,
            &[BASE_SCOPE, "test:docker"],
            Mode::Enforce,
        );
        assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
        drop(server);
        let Name::Path(path) = &name else { panic!("no path") };
        fs::remove_file(path).unwrap();
    }
}

/// The daemon starts after the workload was granted its socket.
#[test]
fn a_granted_socket_whose_daemon_starts_later_is_reached() {
    requires(Layer::Portable);
    let world = World::new();
    let path = docker(&world);
    let name = Name::Path(path.clone());
    let guard = Guard::start_knowing(&world, &[attack_binary()], &granted_path(&name));
    let mut late =
        attack(&world, "stream", &name, "name", "connect").option("wait", "3000").patient();
    let mut running = late.start_as_workload(
        &world,
        &guard,
        IDENTITY,
        &[BASE_SCOPE, "test:docker"],
        Mode::Enforce,
    );
    std::thread::sleep(Duration::from_millis(500));
    let _server = server("stream", &name, &[]);
    let report = agentguard_tests::Report::of(&running.wait(PATIENCE).expect("it ends"));
    assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
}

/// What the processes of a workload say to each other is nobody else's business.
#[test]
fn a_workloads_own_sockets_are_its_own() {
    requires(Layer::Portable);
    for (kind, how) in [
        ("stream", "connect"),
        ("packets", "connect"),
        ("datagram", "connect"),
        ("datagram", "sendto"),
        ("datagram", "sendmsg"),
        ("stream", "ring"),
        ("stream", "ring-worker"),
        ("stream", "ring-thread"),
        ("datagram", "ring-send"),
        ("datagram", "ring-send-worker"),
    ] {
        for has_path in [true, false] {
            let world = World::new();
            let own = scratch(&world).join("own.sock");
            let unseen = world.name().as_bytes().to_vec();
            let name = if has_path { Name::Path(own) } else { Name::Abstract(unseen) };
            let attack = attack(&world, kind, &name, "name", how).arg("--serve");
            goes_on(&world, &[], attack);
        }
    }
}

/// A pair needs no name, and no leave.
#[test]
fn socketpairs_work() {
    requires(Layer::Portable);
    for kind in ["stream", "packets", "datagram"] {
        let world = World::new();
        let name = Name::Path(scratch(&world).join("none"));
        let attack = attack(&world, kind, &name, "name", "pair");
        goes_on(&world, &[], attack);
    }
}

#[test]
fn a_ring_of_a_kernel_thread_is_there() {
    // The tests above need one, and every supported kernel has it.
    assert!(Facility::RING_SEND.is_there());
    assert!(Path::new("/proc/self/fd").exists());
}
