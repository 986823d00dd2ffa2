//! The ways out over the network by TCP and UDP: rows N1 to N5 and N8 to N14 of the threat model,
//! and N6 by ping.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    path::Path,
    process::Stdio,
    time::Duration,
};

use agentguard::grant::clock::boot_ns;
use agentguard_tests::{
    Attack, BASE_SCOPE, Facility, Guard, Layer, Mode, Outcome, Proof, Protocol, Report, Running,
    WayOut, World,
    address::{
        API, API6, CLIENT, CLIENT6, DATABASE, DATABASE_6TO4, DATABASE_COMPATIBLE, DATABASE_NAT64,
        DATABASE6, GRANTED_PORT, METADATA, METADATA6, OTHER_PORT,
    },
    attack_binary, requires, ways_out,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(30);

const fn at(address: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address, port)
}

const FORBIDDEN: SocketAddr = at(DATABASE, GRANTED_PORT);
const FORBIDDEN6: SocketAddr = at(DATABASE6, GRANTED_PORT);
const GRANTED: SocketAddr = at(API, GRANTED_PORT);

fn to(name: &str, protocol: Protocol, to: SocketAddr) -> WayOut {
    let attack =
        Attack::new(name).option("to", to.to_string()).option("protocol", protocol.as_str());
    WayOut::network(attack, protocol, to)
}

ways_out! {
    /// N1
    tcp_connect_to_a_forbidden_v4_address: |_| to("n1-connect", Protocol::Tcp, FORBIDDEN);
    tcp_connect_to_a_forbidden_v6_address: |_| to("n1-connect", Protocol::Tcp, FORBIDDEN6);
    tcp_connect_to_a_forbidden_port: |_| to("n1-connect", Protocol::Tcp, at(API, OTHER_PORT));
    tcp_connect_to_a_forbidden_v6_port: |_| to("n1-connect", Protocol::Tcp, at(API6, OTHER_PORT));
}

/// N1: to the API, by way of the database.
fn source_route(world: &mut World, how: &str, protocol: Protocol, via: SocketAddr) -> WayOut {
    world.network().allow_source_routes();
    world.servers_mut().watch();
    let granted = if via.is_ipv4() { GRANTED } else { at(API6, GRANTED_PORT) };
    let attack = Attack::new("n1-source-route")
        .option("granted", granted.to_string())
        .option("by-way-of", via.to_string())
        .option("protocol", protocol.as_str())
        .option("how", how);
    WayOut::network(attack, protocol, via)
        .proved_by(Proof::Arrived(via.ip()))
        .recorded_as_malformed()
}

ways_out! {
    /// N1
    datagram_by_a_route_of_the_socket:
        |world| source_route(world, "option", Protocol::Udp, FORBIDDEN);
    datagram_by_a_route_of_the_socket_over_v6:
        |world| source_route(world, "option", Protocol::Udp, FORBIDDEN6);
    datagram_by_a_route_of_a_connected_socket:
        |world| source_route(world, "late", Protocol::Udp, FORBIDDEN);
    datagram_by_a_route_of_a_connected_socket_over_v6:
        |world| source_route(world, "late", Protocol::Udp, FORBIDDEN6);
    datagram_by_a_route_of_the_call:
        |world| source_route(world, "message", Protocol::Udp, FORBIDDEN);
    stream_by_a_route_of_the_socket_over_v6:
        |world| source_route(world, "option", Protocol::Tcp, FORBIDDEN6);
    stream_by_a_route_of_a_connected_socket_over_v6:
        |world| source_route(world, "late", Protocol::Tcp, FORBIDDEN6);
}

/// N2: `form` of the database, which is served at `reached`.
fn alias(form: &str, how: &str, reached: IpAddr) -> WayOut {
    let protocol = if how == "tcp" { Protocol::Tcp } else { Protocol::Udp };
    let reached = at(reached, OTHER_PORT);
    let attack = Attack::new("n2-alias")
        .option("to", at(DATABASE, OTHER_PORT).to_string())
        .option("form", form)
        .option("how", how);
    let way_out = WayOut::network(attack, protocol, reached);
    if reached.ip().is_loopback() {
        // A record may name the address that was asked for or the one that it stands for.
        way_out
            .proved_by(Proof::ReachedLocally(protocol, reached))
            .recorded_as(&["connect", "send", "packet"], &OTHER_PORT.to_string())
    } else {
        // A record names the address that was decided on: the one it stands for.
        way_out.recorded_as(&["connect", "send", "packet"], &DATABASE.to_string())
    }
}

const LOCAL4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const LOCAL6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

ways_out! {
    /// N2
    tcp_to_the_v4_mapped_form: |_| alias("mapped", "tcp", DATABASE);
    connected_udp_to_the_v4_mapped_form: |_| alias("mapped", "udp", DATABASE);
    sendto_the_v4_mapped_form: |_| alias("mapped", "sendto", DATABASE);
    tcp_to_the_v4_compatible_form: |_| alias("compatible", "tcp", DATABASE_COMPATIBLE);
    sendto_the_v4_compatible_form: |_| alias("compatible", "sendto", DATABASE_COMPATIBLE);
    tcp_to_the_6to4_form: |_| alias("six-to-four", "tcp", DATABASE_6TO4);
    sendto_the_6to4_form: |_| alias("six-to-four", "sendto", DATABASE_6TO4);
    tcp_to_the_nat64_form: |_| alias("nat64", "tcp", DATABASE_NAT64);
    sendto_the_nat64_form: |_| alias("nat64", "sendto", DATABASE_NAT64);
    tcp_to_any_v4: |_| alias("any4", "tcp", LOCAL4);
    connected_udp_to_any_v4: |_| alias("any4", "udp", LOCAL4);
    sendto_any_v4: |_| alias("any4", "sendto", LOCAL4);
    tcp_to_any_v6: |_| alias("any6", "tcp", LOCAL6);
    connected_udp_to_any_v6: |_| alias("any6", "udp", LOCAL6);
    sendto_any_v6: |_| alias("any6", "sendto", LOCAL6);
    tcp_to_the_mapped_form_of_any: |_| alias("mapped-any", "tcp", LOCAL4);
    sendto_the_mapped_form_of_any: |_| alias("mapped-any", "sendto", LOCAL4);
}

/// N3
fn datagram(how: &str, to: SocketAddr) -> WayOut {
    let granted = if to.is_ipv4() { GRANTED } else { at(API6, GRANTED_PORT) };
    let attack = Attack::new("n3-datagram")
        .option("to", to.to_string())
        .option("granted", granted.to_string())
        .option("how", how);
    WayOut::network(attack, Protocol::Udp, to)
}

ways_out! {
    /// N3
    connected_udp: |_| datagram("connect", FORBIDDEN);
    connected_udp_over_v6: |_| datagram("connect", FORBIDDEN6);
    sendto: |_| datagram("sendto", FORBIDDEN);
    sendto_over_v6: |_| datagram("sendto", FORBIDDEN6);
    sendto_a_forbidden_port: |_| datagram("sendto", at(API, OTHER_PORT));
    sendmsg: |_| datagram("sendmsg", FORBIDDEN);
    sendmsg_over_v6: |_| datagram("sendmsg", FORBIDDEN6);
    sendmmsg_behind_a_granted_datagram: |_| datagram("sendmmsg", FORBIDDEN);
    sendmmsg_over_v6: |_| datagram("sendmmsg", FORBIDDEN6);
    another_peer_after_dissolving_the_first: |_| datagram("dissolve", FORBIDDEN);
    another_peer_after_dissolving_over_v6: |_| datagram("dissolve", FORBIDDEN6);
    another_peer_by_connecting_again: |_| datagram("reconnect", FORBIDDEN);
    another_peer_named_on_a_connected_socket: |_| datagram("connected-sendto", FORBIDDEN);
}

/// N4
fn fast_open(how: &str, to: SocketAddr) -> WayOut {
    let attack = Attack::new("n4-fast-open").option("to", to.to_string()).option("how", how);
    WayOut::network(attack, Protocol::Tcp, to)
}

ways_out! {
    /// N4
    fast_open_by_sendto: |_| fast_open("sendto", FORBIDDEN);
    fast_open_by_sendto_over_v6: |_| fast_open("sendto", FORBIDDEN6);
    fast_open_by_a_deferred_connect: |_| fast_open("connect", FORBIDDEN);
    fast_open_by_a_deferred_connect_over_v6: |_| fast_open("connect", FORBIDDEN6);
}

const RING_SOCKET: Facility = Facility::RING_SOCKET;
const RING_LISTEN: Facility = Facility::RING_LISTEN;

/// N5
fn ring(how: &str, by: &str) -> WayOut {
    let protocol = match how {
        "connect" | "socket" => Protocol::Tcp,
        _ => Protocol::Udp,
    };
    let mut attack =
        Attack::new("n5-io-uring").option("to", FORBIDDEN.to_string()).option("how", how);
    if by != "caller" {
        attack = attack.arg(format!("--{by}"));
    }
    WayOut::network(attack, protocol, FORBIDDEN)
}

ways_out! {
    /// N5
    connect_by_a_ring: |_| ring("connect", "caller");
    connect_by_a_ring_of_a_kernel_thread: |_| ring("connect", "sqpoll");
    connect_by_a_worker_of_a_ring: |_| ring("connect", "worker");
    send_by_a_ring: |_| ring("send", "caller");
    send_by_a_ring_of_a_kernel_thread: |_| ring("send", "sqpoll");
    send_by_a_worker_of_a_ring: |_| ring("send", "worker");
    sendmsg_by_a_ring: |_| ring("sendmsg", "caller");
    sendmsg_by_a_ring_of_a_kernel_thread: |_| ring("sendmsg", "sqpoll");
    sendmsg_by_a_worker_of_a_ring: |_| ring("sendmsg", "worker");
    socket_made_by_a_ring needs [RING_SOCKET]: |_| ring("socket", "caller");
    socket_made_by_a_ring_of_a_kernel_thread needs [RING_SOCKET]: |_| ring("socket", "sqpoll");
}

/// N6
fn ping(world: &mut World) -> WayOut {
    world.network().allow_ping();
    world.servers_mut().watch();
    let attack = Attack::new("n6-ping")
        .option("to", FORBIDDEN.to_string())
        .option("granted", at(API, 9).to_string());
    WayOut::network(attack, Protocol::Udp, FORBIDDEN)
        .proved_by(Proof::Arrived(DATABASE))
        .recorded_as(&["packet"], &DATABASE.to_string())
}

ways_out! {
    /// N6
    ping_of_another_host_than_the_peer: ping;
}

/// A process outside the workload, on the client side; what it says when it is ready.
fn helper(world: &World, name: &str, protocol: Protocol, path: &Path) -> (Running, Vec<i32>) {
    helper_at(world, name, protocol, FORBIDDEN, path, &[])
}

fn helper_at(
    world: &World,
    name: &str,
    protocol: Protocol,
    at: SocketAddr,
    path: &Path,
    more: &[&str],
) -> (Running, Vec<i32>) {
    let mut command = world.enter();
    // Open for as long as the helper shall live.
    command.stdin(Stdio::piped());
    command.arg("--").arg(attack_binary()).arg(name);
    command.args(["--to", &at.to_string(), "--protocol", protocol.as_str()]);
    command.arg("--listen").arg(path).args(more);
    let helper = Running::start(&mut command);
    let numbers = helper.said("ready ", PATIENCE);
    let numbers = numbers.split(' ').map(|number| number.parse().expect("a number")).collect();
    (helper, numbers)
}

/// N8: a helper lends the attack a socket that is connected to the database.
fn lent(
    world: &World,
    protocol: Protocol,
    how: impl FnOnce(Attack, &Path, &[i32]) -> Attack,
) -> WayOut {
    lent_for(world, protocol, None, how)
}

/// N8: the same, sent on by one of the ways into it.
fn lent_for(
    world: &World,
    protocol: Protocol,
    by: Option<&str>,
    how: impl FnOnce(Attack, &Path, &[i32]) -> Attack,
) -> WayOut {
    let path = world.directory().join("lender");
    let (helper, numbers) = helper(world, "helper-lend", protocol, &path);
    let mut attack = Attack::new("n8-foreign-socket").option("protocol", protocol.as_str());
    if let Some(by) = by {
        attack = attack.option("by", by);
    }
    WayOut::network(how(attack, &path, &numbers), protocol, FORBIDDEN)
        .proved_by(Proof::Sent(protocol, FORBIDDEN))
        .with_helper(helper)
        .granted("test:lender", json!({"unixSockets": [{"path": path}]}))
        .or_gap("SCM_RIGHTS")
}

/// N8: a received socket that looks at no name, or at its packets' own, with a name that is granted.
fn decoyed(world: &World, by: &str, more: &[&str]) -> WayOut {
    let path = world.directory().join("lender");
    let to = at(DATABASE, OTHER_PORT);
    let (helper, _) = helper_at(world, "helper-lend", Protocol::Tcp, to, &path, more);
    let protocol = if by == "packet" { Protocol::Udp } else { Protocol::Tcp };
    let attack = Attack::new("n8-foreign-socket")
        .option("protocol", protocol.as_str())
        .option("by", by)
        .option("decoy", GRANTED.to_string())
        .option("to", to.to_string());
    WayOut::network(by_message(attack, &path, &[]), protocol, to)
        .proved_by(Proof::Sent(protocol, to))
        .with_helper(helper)
        .recorded_as(&["connect", "send", "packet", "raw_socket", "socket"], "")
        .granted("test:lender", json!({"unixSockets": [{"path": path}]}))
        .or_gap("SCM_RIGHTS")
}

fn received(world: &World, protocol: Protocol, by: &str) -> WayOut {
    lent_for(world, protocol, Some(by), by_message)
}

/// N8: the helper lends a socket that listens, and the database calls.
fn listener_received(world: &mut World, how: &str) -> WayOut {
    let here = at(CLIENT, 8080);
    let path = world.directory().join("lender");
    let (helper, _) = helper_at(world, "helper-lend", Protocol::Tcp, here, &path, &["--listening"]);
    called(world, here, Attack::new("n14-listen").option("how", how).option("lender", &path))
        .with_helper(helper)
        .granted("test:lender", json!({"unixSockets": [{"path": path}]}))
        .recorded_as(&["accept"], "8080")
        .or_gap("SCM_RIGHTS")
}

fn by_message(attack: Attack, path: &Path, _: &[i32]) -> Attack {
    attack.arg("scm-rights").option("path", path)
}

fn by_pidfd(attack: Attack, _: &Path, numbers: &[i32]) -> Attack {
    let [pid, fd] = numbers else { panic!("a pid and a descriptor, not {numbers:?}") };
    attack.arg("pidfd-getfd").option("pid", pid.to_string()).option("fd", fd.to_string())
}

/// N8: the socket was connected before the launch.
fn inherited(world: &World, protocol: Protocol) -> WayOut {
    let socket = world.network().connect(protocol, FORBIDDEN);
    let attack = Attack::new("n8-foreign-socket")
        .option("protocol", protocol.as_str())
        .arg("inherited")
        .option("fd", "3")
        .with_descriptor(socket);
    WayOut::network(attack, protocol, FORBIDDEN)
        .proved_by(Proof::Sent(protocol, FORBIDDEN))
        .recorded_as_inherited(3)
}

/// N8: the listening socket was made before the launch, and the database calls.
fn activated(world: &mut World) -> WayOut {
    let here = at(CLIENT, 8080);
    let listener: TcpListener = world.network().listen(here);
    let caller = at(DATABASE, 40_000);
    world.servers_mut().call(caller, here);
    let attack = Attack::new("n8-foreign-socket")
        .option("protocol", "tcp")
        .arg("activation")
        .option("fd", "3")
        .with_descriptor(listener);
    WayOut::network(attack, Protocol::Tcp, caller).recorded_as_inherited(3)
}

ways_out! {
    /// N8
    connected_stream_received_in_a_message: |world| lent(world, Protocol::Tcp, by_message);
    connected_datagram_socket_received_in_a_message: |world| lent(world, Protocol::Udp, by_message);
    connected_stream_taken_from_another_process: |world| lent(world, Protocol::Tcp, by_pidfd);
    connected_datagram_socket_taken_from_another_process:
        |world| lent(world, Protocol::Udp, by_pidfd);
    connected_stream_inherited_at_the_launch: |world| inherited(world, Protocol::Tcp);
    connected_datagram_socket_inherited_at_the_launch: |world| inherited(world, Protocol::Udp);
    listening_socket_inherited_at_the_launch: activated;
}

ways_out! {
    /// N8
    received_stream_by_write: |world| received(world, Protocol::Tcp, "write");
    received_stream_by_sendmsg: |world| received(world, Protocol::Tcp, "sendmsg");
    received_stream_by_sendmmsg: |world| received(world, Protocol::Tcp, "sendmmsg");
    received_stream_by_sendfile: |world| received(world, Protocol::Tcp, "sendfile");
    received_stream_by_splice: |world| received(world, Protocol::Tcp, "splice");
    received_stream_without_a_copy: |world| received(world, Protocol::Tcp, "zero-copy");
    received_stream_by_a_ring: |world| received(world, Protocol::Tcp, "ring");
    received_stream_by_a_worker_of_a_ring: |world| received(world, Protocol::Tcp, "ring-worker");
    received_stream_by_a_kernel_thread_of_a_ring:
        |world| received(world, Protocol::Tcp, "ring-thread");
    received_stream_by_a_splice_of_a_ring: |world| received(world, Protocol::Tcp, "ring-splice");
    received_datagram_socket_by_write: |world| received(world, Protocol::Udp, "write");
    received_datagram_socket_by_sendmmsg: |world| received(world, Protocol::Udp, "sendmmsg");
    received_datagram_socket_by_splice: |world| received(world, Protocol::Udp, "splice");
    received_datagram_socket_by_sendfile: |world| received(world, Protocol::Udp, "sendfile");
    received_datagram_socket_by_a_worker_of_a_ring:
        |world| received(world, Protocol::Udp, "ring-worker");
    received_stream_with_a_granted_name: |world| decoyed(world, "named", &[]);
    received_multipath_stream_with_a_granted_name needs [MPTCP]:
        |world| decoyed(world, "named", &["--transport", "mptcp"]);
    received_raw_socket_with_a_granted_name: |world| decoyed(world, "packet", &["--raw"]);
    received_listener: |world| listener_received(world, "received");
    received_listener_by_a_ring: |world| listener_received(world, "received-ring");
}

/// N9
fn used_outside(world: &World, protocol: Protocol) -> WayOut {
    let path = world.directory().join("user");
    let (helper, _) = helper(world, "helper-use", protocol, &path);
    let attack = Attack::new("n9-lend")
        .option("to", FORBIDDEN.to_string())
        .option("protocol", protocol.as_str())
        .option("helper", &path);
    WayOut::network(attack, protocol, FORBIDDEN)
        .with_helper(helper)
        .granted("test:helper", json!({"unixSockets": [{"path": path}]}))
}

ways_out! {
    /// N9
    stream_handed_to_a_helper_outside: |world| used_outside(world, Protocol::Tcp);
    datagram_socket_handed_to_a_helper_outside: |world| used_outside(world, Protocol::Udp);
}

/// N10
fn flow(protocol: Protocol) -> WayOut {
    let attack = Attack::new("n10-flow")
        .option("to", FORBIDDEN.to_string())
        .option("protocol", protocol.as_str())
        .option("milliseconds", "1500");
    WayOut::network(attack, protocol, FORBIDDEN)
}

ways_out! {
    /// N10
    flow_of_a_stream: |_| flow(Protocol::Tcp);
    flow_of_datagrams: |_| flow(Protocol::Udp);
}

/// The bytes that a flow reports as acknowledged, in the order of its reports.
fn acknowledged(output: &[String]) -> Vec<u64> {
    reported(output, "acknowledged")
}

/// A number of each of a flow's reports, in their order.
fn reported(output: &[String], what: &str) -> Vec<u64> {
    let number = |line: &String| {
        let progress: serde_json::Value = serde_json::from_str(line).unwrap();
        progress[what].as_u64().unwrap()
    };
    output.iter().map(number).collect()
}

#[test]
fn a_flow_shows_how_much_was_acknowledged_over_time() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let world = World::new();
        let report = flow(protocol).attack.run_without_the_guard(&world);
        let acknowledged = acknowledged(&report.output);
        assert!(acknowledged.len() >= 5, "{acknowledged:?}");
        assert!(acknowledged.windows(2).any(|pair| pair[0] < pair[1]), "{acknowledged:?}");
    }
}

const IDENTITY: &str = "spiffe://agentguard.test/flow";

/// Runs a flow to the database, which is granted for `lasts`; does `meanwhile` as soon as it
/// flows. It must have begun, and must have been stopped.
fn stopped_flow(
    protocol: Protocol,
    lasts: Duration,
    meanwhile: impl FnOnce(&mut Guard),
    afterwards: impl FnOnce(&mut Guard),
) {
    stopped_flow_from(None, protocol, lasts, meanwhile, afterwards);
}

/// [`stopped_flow`] from a port on which the workload may listen.
fn stopped_flow_from(
    port: Option<u16>,
    protocol: Protocol,
    lasts: Duration,
    meanwhile: impl FnOnce(&mut Guard),
    afterwards: impl FnOnce(&mut Guard),
) {
    requires(Layer::Portable);
    let world = World::new();
    let mut guard = Guard::start(&world, &[attack_binary()]);
    guard.define_scope("test:database", protocol, FORBIDDEN);
    let mut attack = Attack::new("n10-flow")
        .option("to", FORBIDDEN.to_string())
        .option("protocol", protocol.as_str())
        .option("milliseconds", "15000");
    let mut scopes = vec![BASE_SCOPE];
    if let Some(port) = port {
        guard.define("test:listen", &json!({"listen": [{"protocol": "TCP", "port": port}]}));
        scopes.push("test:listen");
        attack = attack.option("bind", port.to_string());
    }
    let given = boot_ns();
    guard.grant("flow", IDENTITY, "test:database", lasts);
    let mut flow = attack.start_as_workload(&world, &guard, IDENTITY, &scopes, Mode::Enforce);
    flow.said("{\"ms\":", PATIENCE);
    // When what permits it ends, and how long after that it may move.
    let (ends, within) = if lasts == LONG {
        (boot_ns(), Duration::from_millis(2500))
    } else {
        (given + lasts.as_nanos() as u64, Duration::from_secs(1))
    };
    meanwhile(&mut guard);
    let report = Report::of(&flow.wait(PATIENCE).expect("a flow that is stopped ends"));
    assert_eq!(report.outcome, Outcome::Refused, "{report:?}");
    let acknowledged = acknowledged(&report.output);
    assert!(acknowledged.last().is_some_and(|bytes| *bytes > 0), "it never began: {report:?}");
    let moved = reported(&report.output, "moved_boot_ns").last().copied().unwrap();
    let late = Duration::from_nanos(moved.saturating_sub(ends));
    assert!(late <= within, "it moved until {late:?} after the end: {report:?}");
    afterwards(&mut guard);
    guard.recorded("the flow's denial", |record| {
        record["kind"] == "verdict"
            && record["verdict"] == "deny"
            && record["refused"] == true
            && record["workload"]["identity"] == IDENTITY
            && record["request"]["address"] == FORBIDDEN.ip().to_string()
    });
}

/// Time for the flow to begin, on a busy machine too.
const SOON: Duration = Duration::from_secs(4);
const LONG: Duration = Duration::from_secs(3600);

fn nothing(_: &mut Guard) {}

/// As the operator does it.
fn revoke_by_command(guard: &mut Guard) {
    let _grant = guard.json(&["revoke", "flow", "--reason", "a test"]);
}

#[test]
fn a_stream_stops_when_its_grant_expires() {
    stopped_flow(Protocol::Tcp, SOON, nothing, nothing);
}

#[test]
fn datagrams_stop_when_their_grant_expires() {
    stopped_flow(Protocol::Udp, SOON, nothing, nothing);
}

#[test]
fn a_stream_stops_when_its_grant_is_taken_from_the_manifests() {
    stopped_flow(Protocol::Tcp, LONG, |guard| guard.revoke("flow"), nothing);
}

#[test]
fn datagrams_stop_when_their_grant_is_taken_from_the_manifests() {
    stopped_flow(Protocol::Udp, LONG, |guard| guard.revoke("flow"), nothing);
}

#[test]
fn a_stream_stops_when_its_grant_is_revoked() {
    stopped_flow(Protocol::Tcp, LONG, revoke_by_command, nothing);
}

#[test]
fn datagrams_stop_when_their_grant_is_revoked() {
    stopped_flow(Protocol::Udp, LONG, revoke_by_command, nothing);
}

/// A port on which the workload may listen.
const LISTENING: u16 = 8080;

#[test]
fn a_stream_of_a_client_that_binds_again_flows_without_the_guard() {
    let world = World::new();
    let mut flow = flow(Protocol::Tcp);
    flow.attack = flow.attack.option("bind", LISTENING.to_string());
    let report = flow.attack.run_without_the_guard(&world);
    assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
}

#[test]
fn a_stream_of_a_client_that_binds_again_stops_when_its_grant_is_revoked() {
    stopped_flow_from(Some(LISTENING), Protocol::Tcp, LONG, revoke_by_command, nothing);
}

#[test]
fn a_stream_of_a_client_that_binds_again_stops_when_its_grant_expires() {
    stopped_flow_from(Some(LISTENING), Protocol::Tcp, SOON, nothing, nothing);
}

/// What the kernel saw while no daemon was there is written down by the next one.
#[test]
fn a_stream_stops_when_its_grant_expires_and_the_daemon_is_dead() {
    stopped_flow(Protocol::Tcp, SOON, Guard::kill, Guard::restart);
}

#[test]
fn datagrams_stop_when_their_grant_expires_and_the_daemon_is_dead() {
    stopped_flow(Protocol::Udp, SOON, Guard::kill, Guard::restart);
}

#[test]
fn a_command_with_a_network_socket_as_standard_input_is_not_started() {
    requires(Layer::Portable);
    let world = World::new();
    let guard = Guard::start(&world, &[]);
    let socket = world.network().connect(Protocol::Tcp, FORBIDDEN);
    let mut command = world.enter();
    command.stdin(Stdio::from(socket)).arg("--");
    command.args(guard.exec_line(IDENTITY, &[BASE_SCOPE], Mode::Enforce)).arg("/bin/true");
    let finished = agentguard_tests::run(&mut command, PATIENCE);
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert!(finished.stderr.contains("file descriptor 0 is a network socket"), "{finished:?}");
}

#[test]
fn a_closed_socket_is_named() {
    requires(Layer::Portable);
    let world = World::new();
    let guard = Guard::start(&world, &[]);
    let socket = world.network().connect(Protocol::Tcp, FORBIDDEN);
    let mut command = world.enter();
    command.stdin(Stdio::from(socket)).args(["--hand-on-stdin", "--"]);
    command.args(guard.exec_line(IDENTITY, &[BASE_SCOPE], Mode::Enforce)).arg("/bin/true");
    let finished = agentguard_tests::run(&mut command, PATIENCE).expect_success("true");
    assert!(finished.stderr.contains("closed file descriptor 3"), "{finished:?}");
}

#[test]
fn what_is_granted_works_in_enforce_mode() {
    requires(Layer::Portable);
    let world = World::new();
    let guard = Guard::start(&world, &[attack_binary()]);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for address in [API, API6] {
            let granted = to("n1-connect", protocol, at(address, GRANTED_PORT));
            let report = granted.attack.patient().run_as_workload(
                &world,
                &guard,
                IDENTITY,
                &[BASE_SCOPE],
                Mode::Enforce,
            );
            assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
        }
    }
    let denied: Vec<_> =
        guard.audit_records().into_iter().filter(|record| record["verdict"] == "deny").collect();
    assert!(denied.is_empty(), "{denied:#?}");
}

/// N11
fn rewritten(how: &str, protocol: Protocol) -> WayOut {
    let attack = Attack::new("n11-rewrite")
        .option("granted", GRANTED.to_string())
        .option("forbidden", FORBIDDEN.to_string())
        .option("how", how);
    WayOut::network(attack, protocol, FORBIDDEN)
}

ways_out! {
    /// N11
    address_rewritten_during_connect: |_| rewritten("connect", Protocol::Udp);
    address_rewritten_during_a_tcp_connect: |_| rewritten("tcp-connect", Protocol::Tcp);
    address_rewritten_during_sendto: |_| rewritten("sendto", Protocol::Udp);
}

/// N12
fn metadata(address: IpAddr) -> WayOut {
    let attack = Attack::new("n12-metadata")
        .option("address", address.to_string())
        .option("port", GRANTED_PORT.to_string());
    WayOut::network(attack, Protocol::Tcp, at(address, GRANTED_PORT))
}

ways_out! {
    /// N12
    the_metadata_service: |_| metadata(METADATA);
    the_metadata_service_over_v6: |_| metadata(METADATA6);
}

/// N13: the node itself, by one of its addresses.
fn node(address: IpAddr, protocol: Protocol) -> WayOut {
    let service = at(address, OTHER_PORT);
    to("n1-connect", protocol, service).proved_by(Proof::ReachedLocally(protocol, service))
}

ways_out! {
    /// N13
    the_nodes_address: |_| node(CLIENT, Protocol::Tcp);
    the_nodes_address_over_v6: |_| node(CLIENT6, Protocol::Tcp);
    the_nodes_loopback: |_| node(LOCAL4, Protocol::Tcp);
    the_nodes_loopback_over_v6: |_| node(LOCAL6, Protocol::Tcp);
    datagrams_to_the_nodes_address: |_| node(CLIENT, Protocol::Udp);
    datagrams_to_the_nodes_loopback: |_| node(LOCAL4, Protocol::Udp);
    a_granted_port_on_the_nodes_address: |_| {
        let service = at(CLIENT, GRANTED_PORT);
        to("n1-connect", Protocol::Tcp, service)
            .proved_by(Proof::ReachedLocally(Protocol::Tcp, service))
    };
}

/// N14: the database calls, and the attack answers.
fn called(world: &mut World, here: SocketAddr, attack: Attack) -> WayOut {
    let caller = at(DATABASE, 40_000);
    world.servers_mut().call(caller, here);
    let attack = attack.option("port", here.port().to_string());
    WayOut::network(attack, Protocol::Tcp, caller)
        .recorded_as(&["bind", "listen", "reply"], &here.port().to_string())
}

fn listening(world: &mut World, how: &str) -> WayOut {
    called(world, at(CLIENT, 8080), Attack::new("n14-listen").option("how", how))
}

/// N14: the kernel is let choose, and has no choice.
fn listening_anywhere(world: &mut World, how: &str) -> WayOut {
    world.network().choose_port(8080);
    listening(world, how)
}

const MPTCP: Facility = Facility::MPTCP;

ways_out! {
    /// N14
    listener_on_a_port_that_is_not_granted: |world| listening(world, "bind");
    listener_for_both_families: |world| listening(world, "bind6");
    listener_that_was_never_bound: |world| listening_anywhere(world, "listen");
    listener_bound_to_no_port: |world| listening_anywhere(world, "bind-any");
    listener_made_by_a_ring needs [RING_LISTEN]: |world| listening(world, "ring");
    listener_of_multipath_tcp needs [MPTCP]: |world| listening(world, "multipath");
}

/// As a service manager hands a listener over that it made itself.
#[test]
fn a_received_listener_on_a_granted_port_serves() {
    requires(Layer::Portable);
    let mut world = World::new();
    let mut way_out = listener_received(&mut world, "received");
    let listen = json!({"listen": [{"protocol": "TCP", "port": 8080}]});
    way_out.scopes.push(("test:listen", listen));
    let guard = Guard::start_knowing(&world, &[attack_binary()], &way_out.scopes);
    let scopes = [BASE_SCOPE, "test:lender", "test:listen"];
    let report =
        way_out.attack.patient().run_as_workload(&world, &guard, IDENTITY, &scopes, Mode::Enforce);
    assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
}

#[test]
fn a_listener_on_a_granted_port_serves() {
    requires(Layer::Portable);
    for how in ["bind", "bind6"] {
        let mut world = World::new();
        let way_out = listening(&mut world, how);
        let listen = json!({"listen": [{"protocol": "TCP", "port": 8080}]});
        let guard = Guard::start_knowing(&world, &[attack_binary()], &[("test:listen", listen)]);
        let scopes = [BASE_SCOPE, "test:listen"];
        let report = way_out.attack.patient().run_as_workload(
            &world,
            &guard,
            IDENTITY,
            &scopes,
            Mode::Enforce,
        );
        assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
        let denied: Vec<_> = guard
            .audit_records()
            .into_iter()
            .filter(|record| record["verdict"] == "deny")
            .collect();
        assert!(denied.is_empty(), "{denied:#?}");
    }
}
