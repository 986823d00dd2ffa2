//! The doors of the LSM layer: allowed, attach, denied, detach, allowed.

use std::{
    fs,
    io::ErrorKind,
    net::UdpSocket,
    os::{
        fd::AsRawFd as _,
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process,
};

use agentguard::allowlist::Permit;
use agentguard_common::{Mode, Protocol, event::Hook};
use agentguard_tests::{Layer, requires};

use crate::doors::{denials, is_denied_while_attached, tcp, udp};
use crate::fixture::{Fixture, port, running, standing, to};

/// A directory of one test's own.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("agentguard-lsm-{}-{name}", process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("tool.sock")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _gone_already = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_door_of_the_layer_is_active() {
    requires(Layer::Lsm);
    let fixture = Fixture::new();
    for (door, state) in fixture.datapath.states() {
        assert_eq!(*state, agentguard::datapath::DoorState::Active, "{}", door.hook);
    }
    let gaps = fixture.datapath.gaps();
    for closed in ["T4", "N7", "N8", "N14", "E5"] {
        assert!(!gaps.iter().any(|gap| gap.contains(closed)), "{closed}: {gaps:?}");
    }
}

#[test]
fn a_family_that_no_scope_grants_is_denied_while_attached() {
    requires(Layer::Lsm);
    // AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT; then AF_PACKET, SOCK_DGRAM.
    is_denied_while_attached(Hook::SocketCreate, "socket 16 3 15", "EPERM");
    is_denied_while_attached(Hook::SocketCreate, "socket 17 2 0", "EPERM");
}

#[test]
fn routes_may_be_read_and_unix_sockets_made() {
    requires(Layer::Lsm);
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    for command in ["socket 16 3 0", "socket 1 1 0", "socket 2 1 0", "unix-own", "unix-pair"] {
        assert_eq!(worker.told(command), "ok", "{command}");
    }
}

#[test]
fn a_unix_stream_is_denied_while_attached() {
    requires(Layer::Lsm);
    let directory = Directory::new("stream");
    let _server = UnixListener::bind(directory.socket()).unwrap();
    let command = format!("unix-stream {}", directory.socket().display());
    is_denied_while_attached(Hook::UnixStreamConnect, &command, "EPERM");
}

#[test]
fn a_unix_datagram_is_denied_while_attached() {
    requires(Layer::Lsm);
    let directory = Directory::new("datagram");
    let _server = UnixDatagram::bind(directory.socket()).unwrap();
    let command = format!("unix-datagram {}", directory.socket().display());
    is_denied_while_attached(Hook::UnixMaySend, &command, "EPERM");
}

#[test]
fn an_abstract_name_is_denied_while_attached() {
    requires(Layer::Lsm);
    let name = format!("agentguard-lsm-{}", process::id());
    let _server = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    is_denied_while_attached(Hook::UnixStreamConnect, &format!("unix-stream @{name}"), "EPERM");
}

#[test]
fn listening_on_a_port_the_kernel_chose_is_denied_while_attached() {
    requires(Layer::Lsm);
    is_denied_while_attached(Hook::SocketListen, "listen 127.0.0.1:0", "EPERM");
}

#[test]
fn listening_where_it_is_granted_is_allowed() {
    requires(Layer::Lsm);
    let (server, free) = tcp("127.0.0.1:0");
    drop(server);
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    let permit = Permit { listening: vec![port(Protocol::Tcp, free.port())], ..standing() };
    fixture.attach(Mode::Enforce, &[permit]);
    assert_eq!(worker.told(&format!("listen {free}")), "ok");
    assert_eq!(denials(&fixture, Hook::SocketListen), 0);
}

#[test]
fn accepting_on_a_socket_from_elsewhere_is_denied_while_attached() {
    requires(Layer::Lsm);
    let (server, address) = tcp("127.0.0.1:0");
    let _first = std::net::TcpStream::connect(address).unwrap();
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    let take = format!("take {} {}", process::id(), server.as_raw_fd());
    assert_eq!(worker.told(&take), "ok");
    assert_eq!(worker.told("accept"), "ok", "before");
    let _second = std::net::TcpStream::connect(address).unwrap();
    fixture.attach(Mode::Enforce, &[]);
    assert_eq!(worker.told("accept"), "EPERM", "attached");
    assert_eq!(denials(&fixture, Hook::SocketAccept), 1);
    fixture.detach();
    assert_eq!(worker.told("accept"), "ok", "detached");
}

#[test]
fn sends_on_a_socket_from_elsewhere_are_denied_while_attached() {
    requires(Layer::Lsm);
    let (server, address) = udp("127.0.0.1:0");
    let foreign = UdpSocket::bind("127.0.0.1:0").unwrap();
    foreign.connect(address).unwrap();
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    let take = format!("take {} {}", process::id(), foreign.as_raw_fd());
    assert_eq!(worker.told(&take), "ok");
    assert_eq!(worker.told("flow"), "ok", "before");
    server.recv(&mut [0; 16]).unwrap();
    fixture.attach(Mode::Enforce, &[]);
    assert_eq!(worker.told("flow"), "EPERM", "attached");
    assert_eq!(worker.told(&format!("connect-flow {address}")), "EPERM");
    assert_eq!(denials(&fixture, Hook::SocketSendmsg), 1);
    assert_eq!(denials(&fixture, Hook::SocketConnect), 1);
    assert_eq!(server.recv(&mut [0; 16]).unwrap_err().kind(), ErrorKind::WouldBlock);
    fixture.permit(Mode::Enforce, &[to(Protocol::Udp, address)]);
    assert_eq!(worker.told("flow"), "ok", "granted");
    fixture.detach();
    assert_eq!(worker.told("flow"), "ok", "detached");
}

#[test]
fn receiving_a_connected_socket_is_denied_while_attached() {
    requires(Layer::Lsm);
    let (_server, address) = udp("127.0.0.1:0");
    let foreign = UdpSocket::bind("127.0.0.1:0").unwrap();
    foreign.connect(address).unwrap();
    let take = format!("take {} {}", process::id(), foreign.as_raw_fd());
    is_denied_while_attached(Hook::FileReceive, &take, "EPERM");
}

#[test]
fn receiving_a_connected_unix_socket_is_denied_while_attached() {
    requires(Layer::Lsm);
    let directory = Directory::new("received");
    let _server = UnixListener::bind(directory.socket()).unwrap();
    let foreign = UnixStream::connect(directory.socket()).unwrap();
    let take = format!("take {} {}", process::id(), foreign.as_raw_fd());
    is_denied_while_attached(Hook::FileReceive, &take, "EPERM");
    // A pair has no name that leads anywhere else.
    let (one, _other) = UnixStream::pair().unwrap();
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[]);
    assert_eq!(worker.told(&format!("take {} {}", process::id(), one.as_raw_fd())), "ok");
}

/// The workload's own sockets are judged once, by the portable layer, though both layers are active.
#[test]
fn a_request_has_one_verdict_where_both_layers_are_active() {
    requires(Layer::Lsm);
    let (_server, granted) = udp("127.0.0.1:0");
    let (_other, other) = tcp("127.0.0.1:0");
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[to(Protocol::Udp, granted), running(Path::new("/bin/true"))]);
    let before = fixture.counters().decided();
    assert_eq!(worker.told(&format!("send {granted}")), "ok");
    // The call and its packet: two requests, on one hook each.
    assert_eq!(fixture.counters().decided() - before, 2);
    let before = fixture.counters().decided();
    assert_eq!(worker.told(&format!("connect tcp {other}")), "EPERM");
    assert_eq!(fixture.counters().decided() - before, 1);
    let before = fixture.counters().decided();
    assert_eq!(worker.told("run /bin/true"), "ok");
    assert_eq!(fixture.counters().decided() - before, 1);
}

#[test]
fn a_script_needs_a_grant_of_its_own() {
    requires(Layer::Lsm);
    let directory = Directory::new("script");
    let script = directory.0.join("tool");
    fs::write(&script, "#!/bin/true\n").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    let interpreter = running(Path::new("/bin/true"));
    fixture.attach(Mode::Enforce, std::slice::from_ref(&interpreter));
    let run = format!("run {}", script.display());
    assert_eq!(worker.told(&run), "EPERM", "the interpreter alone");
    fixture.permit(Mode::Enforce, &[running(&script)]);
    assert_eq!(worker.told(&run), "EPERM", "the script alone");
    fixture.permit(Mode::Enforce, &[interpreter, running(&script)]);
    assert_eq!(worker.told(&run), "ok");
}
