//! The ways out by what is neither TCP nor UDP: rows N6, N7 and N16 of the threat model.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use agentguard_tests::{
    Attack, BASE_SCOPE, Facility, Guard, Layer, Mode, Outcome, Proof, Protocol, Running, WayOut,
    World,
    address::{API, CLIENT, CLIENT6, DATABASE, DATABASE6, GRANTED_PORT, OTHER_PORT},
    attack_binary, can_be_attacked_by, requires, ways_out,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(10);
const IDENTITY: &str = "spiffe://agentguard.test/family";

/// A port at which nothing serves but what a test starts.
const PORT: u16 = 4444;
const FORBIDDEN: SocketAddr = SocketAddr::new(DATABASE, PORT);
const FORBIDDEN6: SocketAddr = SocketAddr::new(DATABASE6, PORT);

const SCTP: Facility = Facility::SCTP;
const DCCP: Facility = Facility::DCCP;
const MPTCP: Facility = Facility::MPTCP;
const UDP_LITE: Facility = Facility::UDP_LITE;
const SMC: Facility = Facility::SMC_OVER_IP;

/// A server of the server side.
fn server(world: &World, transport: &str, at: SocketAddr) -> Running {
    let mut enter = Command::new(attack_binary());
    enter.arg("enter").arg("--network").arg(world.network().server_file()).arg("--");
    enter.arg(attack_binary()).args(["serve", "ip", "--transport", transport, "--at"]);
    // Open for as long as it shall live.
    let server = Running::start(enter.arg(at.to_string()).stdin(Stdio::piped()));
    server.said("ready", PATIENCE);
    server
}

/// N6
fn protocol(world: &World, transport: &str, how: &str, to: SocketAddr) -> WayOut {
    let kind = if how == "send" && transport == "sctp" { "sctp-many" } else { transport };
    let attack = Attack::new("n6-protocol")
        .option("to", to.to_string())
        .option("transport", kind)
        .option("how", how);
    WayOut::network(attack, Protocol::Tcp, to)
        .proved_by(Proof::Heard)
        .with_helper(server(world, transport, to))
}

/// N6: the peer is granted, and another of its addresses is not.
fn other_address(world: &World) -> WayOut {
    let granted = SocketAddr::new(API, PORT);
    let any = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), PORT);
    let attack = Attack::new("n6-protocol")
        .option("to", FORBIDDEN.to_string())
        .option("granted", granted.to_string())
        .option("transport", "sctp-many")
        .option("how", "other-address");
    WayOut::network(attack, Protocol::Tcp, FORBIDDEN)
        .proved_by(Proof::Arrived(DATABASE))
        .with_helper(server(world, "sctp", any))
        .granted(
            "test:sctp",
            json!({"egress": [{
                "to": [{"ipBlock": {"cidr": format!("{API}/32")}}],
                "ports": [{"protocol": "SCTP", "port": PORT}],
            }]}),
        )
}

ways_out! {
    /// N6
    multipath_tcp needs [MPTCP]: |world| protocol(world, "mptcp", "connect", FORBIDDEN);
    multipath_tcp_over_v6 needs [MPTCP]: |world| protocol(world, "mptcp", "connect", FORBIDDEN6);
    sctp_connect needs [SCTP]: |world| protocol(world, "sctp", "connect", FORBIDDEN);
    sctp_connect_over_v6 needs [SCTP]: |world| protocol(world, "sctp", "connect", FORBIDDEN6);
    sctp_connectx needs [SCTP]: |world| {
        // A call that waits in vain looks the same wherever the packets were lost.
        world.servers_mut().watch();
        protocol(world, "sctp", "connectx", FORBIDDEN).proved_by(Proof::Arrived(DATABASE))
    };
    sctp_connectx_over_v6 needs [SCTP]: |world| protocol(world, "sctp", "connectx", FORBIDDEN6);
    sctp_message_that_connects needs [SCTP]: |world| protocol(world, "sctp", "send", FORBIDDEN);
    sctp_message_to_another_address_of_the_peer needs [SCTP]: |world| {
        world.servers_mut().watch();
        other_address(world)
    };
    dccp_connect needs [DCCP]: |world| protocol(world, "dccp", "connect", FORBIDDEN);
    dccp_connect_over_v6 needs [DCCP]: |world| protocol(world, "dccp", "connect", FORBIDDEN6);
    udp_lite_connect needs [UDP_LITE]: |world| protocol(world, "udp-lite", "connect", FORBIDDEN);
    udp_lite_sendto needs [UDP_LITE]: |world| protocol(world, "udp-lite", "send", FORBIDDEN);
    udp_lite_sendto_over_v6 needs [UDP_LITE]:
        |world| protocol(world, "udp-lite", "send", FORBIDDEN6);
    smc_over_ip needs [SMC]: |world| {
        // It falls back to TCP where the peer has no such memory.
        let mut way_out = protocol(world, "tcp", "connect", FORBIDDEN);
        way_out.attack = Attack::new("n6-protocol")
            .option("to", FORBIDDEN.to_string())
            .args(["--transport", "smc", "--how", "connect"]);
        way_out
    };
}

/// N6: a granted peer offers an address that is not, and the kernel connects to it by itself.
fn joined(guarded: bool) {
    if !can_be_attacked_by(&[Facility::MultipathLimits]) {
        return;
    }
    let mut world = World::new();
    world.network().offer_another_path(DATABASE);
    world.servers_mut().watch();
    let granted = SocketAddr::new(API, PORT);
    let _server = server(&world, "mptcp", granted);
    let mut attack = Attack::new("n6-protocol").option("to", granted.to_string()).args([
        "--transport",
        "mptcp",
        "--how",
        "connect",
        "--rounds",
        "10",
    ]);
    if !guarded {
        let report = attack.run_without_the_guard(&world);
        assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
        assert!(world.servers().arrived(DATABASE) > 0, "the kernel did not join");
        return;
    }
    let permits = json!({"egress": [{
        "to": [{"ipBlock": {"cidr": format!("{API}/32")}}],
        "ports": [{"protocol": "TCP", "port": PORT}],
    }]});
    let guard = Guard::start_knowing(&world, &[attack_binary()], &[("test:mptcp", permits)]);
    let scopes = [BASE_SCOPE, "test:mptcp"];
    let report = attack.patient().run_as_workload(&world, &guard, IDENTITY, &scopes, Mode::Enforce);
    assert_eq!(report.outcome, Outcome::Worked, "{report:?}");
    assert_eq!(world.servers().arrived(DATABASE), 0, "the kernel joined");
    guard.recorded("the join", |record| {
        record["verdict"] == "deny"
            && record["refused"] == true
            && record["request"]["address"] == DATABASE.to_string()
    });
}

#[test]
fn multipath_tcp_joins_an_offered_address_without_the_guard() {
    joined(false);
}

#[test]
fn multipath_tcp_does_not_join_an_offered_address_that_is_not_granted() {
    requires(Layer::Portable);
    joined(true);
}

/// N7: a datagram to the database by a socket that makes its own headers.
fn by_hand(world: &World, how: &str, to: SocketAddr) -> WayOut {
    // The server's answer would find nobody, and say so to the server.
    let _ = world;
    let from = if to.is_ipv4() { CLIENT } else { CLIENT6 };
    let attack = Attack::new("n7-family")
        .arg("datagram")
        .option("to", to.to_string())
        .option("from", from.to_string())
        .option("how", how);
    WayOut::network(attack, Protocol::Udp, to)
}

fn raw(world: &World, how: &str, to: SocketAddr) -> WayOut {
    by_hand(world, how, to).recorded_as(&["raw_socket", "socket"], "")
}

/// What `status` says where nothing looks at families.
const OPEN: &str = "(N6, N7)";

fn packets(world: &World, how: &str) -> WayOut {
    by_hand(world, how, UDP).recorded_as(&["socket"], "AF_PACKET").or_gap(OPEN)
}

/// N7: a socket of another family, which no server hears of.
fn family(attack: Attack, name: &str) -> WayOut {
    WayOut::network(attack, Protocol::Udp, UDP)
        .proved_by(Proof::OwnWord)
        .recorded_as(&["socket"], &format!("AF_{}", name.to_uppercase()))
        .or_gap(OPEN)
}

fn made(facility: Facility, name: &str) -> WayOut {
    let Facility::Socket { family: number, kind, protocol, .. } = facility else {
        panic!("{facility:?} is no socket")
    };
    let attack = Attack::new("n7-family")
        .arg("make")
        .option("family", number.to_string())
        .option("kind", kind.to_string())
        .option("protocol", protocol.to_string());
    family(attack, name)
}

fn netlink(protocol: i32, ask: u16) -> WayOut {
    let attack = Attack::new("n7-family")
        .arg("netlink")
        .option("protocol", protocol.to_string())
        .option("ask", ask.to_string());
    family(attack, "netlink")
}

/// Served by UDP on the database.
const UDP: SocketAddr = SocketAddr::new(DATABASE, OTHER_PORT);
const UDP6: SocketAddr = SocketAddr::new(DATABASE6, OTHER_PORT);

const ALG: Facility = Facility::ALG;
const VSOCK: Facility = Facility::VSOCK;
const VSOCK_PACKETS: Facility = Facility::VSOCK_PACKETS;
const XDP: Facility = Facility::XDP;
const KEY: Facility = Facility::KEY;
const TIPC: Facility = Facility::TIPC;
const RDS: Facility = Facility::RDS;
const KCM: Facility = Facility::KCM;
const SMC_FAMILY: Facility = Facility::SMC;
const DIAG: Facility = Facility::NETLINK_DIAG;
ways_out! {
    /// N7
    raw_socket: |world| raw(world, "raw", UDP);
    raw_socket_over_v6: |world| raw(world, "raw", UDP6);
    raw_socket_with_its_own_header: |world| raw(world, "header", UDP);
    packet_socket: |world| packets(world, "packet");
    packet_socket_with_its_own_frame: |world| packets(world, "frame");
    packet_socket_by_its_old_name: |world| packets(world, "old-packet");
    netlink_of_generic_families: |_| netlink(libc::NETLINK_GENERIC, 0x10);
    netlink_of_all_sockets needs [DIAG]: |_| netlink(libc::NETLINK_SOCK_DIAG, 20);
    kernel_cryptography needs [ALG]: |_| family(Attack::new("n7-family").arg("hash"), "alg");
    virtual_machine_socket needs [VSOCK]: |_| made(VSOCK, "vsock");
    virtual_machine_socket_of_packets needs [VSOCK_PACKETS]: |_| made(VSOCK_PACKETS, "vsock");
    express_data_path_socket needs [XDP]: |_| made(XDP, "xdp");
    key_management_socket needs [KEY]: |_| made(KEY, "key");
    tipc_socket needs [TIPC]: |_| made(TIPC, "tipc");
    rds_socket needs [RDS]: |_| made(RDS, "rds");
    kcm_socket needs [KCM]: |_| made(KCM, "kcm");
    smc_socket needs [SMC_FAMILY]: |_| made(SMC_FAMILY, "smc");
}

/// N16
fn own_network(world: &mut World, how: &str, proof: Proof) -> WayOut {
    world.network().allow_forwarding();
    world.servers_mut().watch();
    let to = SocketAddr::new(DATABASE, OTHER_PORT);
    let attack = Attack::new("n16-network")
        .option("to", to.to_string())
        .option("granted", SocketAddr::new(API, GRANTED_PORT).to_string())
        .option("how", how);
    // The workload has what makes links, and may run it: what it makes is the question.
    WayOut::network(attack, Protocol::Tcp, to)
        .proved_by(proof)
        .granted("test:ip", json!({"exec": [{"path": ip()}]}))
}

fn ip() -> std::path::PathBuf {
    let found = ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip", "/bin/ip"]
        .into_iter()
        .map(Path::new)
        .find(|path| path.is_file());
    found.expect("`ip` is missing; install iproute2").canonicalize().expect("a file has a path")
}

const VETH: Facility = Facility::VETH;
const TUN: Facility = Facility::TUN;
const IPIP: Facility = Facility::IPIP;

ways_out! {
    /// N16
    network_namespace_of_its_own needs [VETH]:
        |world| own_network(world, "namespace", Proof::Reached(Protocol::Tcp, UDP));
    packets_from_a_tun_device needs [TUN]:
        |world| own_network(world, "tun", Proof::Arrived(DATABASE)).or_gap("(N16)");
    tunnel_around_a_granted_peer needs [IPIP]:
        |world| own_network(world, "tunnel", Proof::Arrived(DATABASE)).or_gap("(N16)");
}
