//! The doors of the LSM layer: allowed, attach, denied, detach, allowed.

use std::{
    fs,
    io::ErrorKind,
    net::UdpSocket,
    ops::ControlFlow,
    os::{
        fd::AsRawFd as _,
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process,
};

use agentguard::allowlist::Permit;
use agentguard::datapath::events::Rings;
use agentguard_common::{
    Mode, Protocol, Verdict,
    event::{Hook, RequestKind},
    stats::{Counters, Fate},
};
use agentguard_tests::{Layer, requires};

use crate::doors::{denials, is_denied_while_attached, no_place_for_exec_check, tcp, udp};
use crate::fixture::{Fixture, port, running, standing, to};
use crate::worker::Worker;

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

/// What one command comes to in the kernel.
struct Case {
    command: String,
    answer: &'static str,
    /// The hooks that decide, once each, and what they are asked. Of several that ask for the same the
    /// first has the record, and the others are folded into it.
    decided: Vec<(Hook, RequestKind)>,
    records: usize,
}

impl Case {
    /// Of which each verdict has a record of its own.
    fn new(
        command: impl Into<String>,
        answer: &'static str,
        decided: &[(Hook, RequestKind)],
    ) -> Self {
        let (command, records) = (command.into(), decided.len());
        Self { command, answer, decided: decided.to_vec(), records }
    }

    /// Of which the last verdict is folded into the record before.
    fn folded(self) -> Self {
        Self { records: self.records - 1, ..self }
    }
}

/// Every record that is there.
fn records(rings: &mut Rings) -> Vec<(Hook, RequestKind, bool)> {
    let mut records = Vec::new();
    while rings.drain(64, |record| {
        let event = *record.expect("a record of this version").event();
        let is_denied = Verdict::try_from(event.verdict).unwrap().reason().is_some();
        let (hook, kind) = (Hook::try_from(event.hook), RequestKind::try_from(event.kind));
        records.push((hook.unwrap(), kind.unwrap(), is_denied));
        ControlFlow::Continue(())
    }) > 0
    {}
    records
}

/// Does what each case says, and looks at all that the kernel counted and wrote of it.
#[track_caller]
fn assert_each_once(fixture: &Fixture, rings: &mut Rings, worker: &mut Worker, cases: &[Case]) {
    for Case { command, answer, decided, records: logged } in cases {
        assert_eq!(records(rings), [], "before {command}");
        let before = fixture.counters();
        assert_eq!(worker.told(command), *answer, "{command}");
        let after = fixture.counters();
        let is_denied = *answer != "ok";
        let mut counted = Vec::new();
        for hook in Hook::ALL {
            let of = |counters: &Counters| -> [u64; 2] {
                let cells = counters.iter().filter(|cell| cell.0 == hook);
                cells.fold([0; 2], |[allowed, denied], (_, _, verdict, count)| {
                    match verdict.reason() {
                        Some(_) => [allowed, denied + count],
                        None => [allowed + count, denied],
                    }
                })
            };
            let ([allowed, denied], [allowed_before, denied_before]) = (of(&after), of(&before));
            counted.extend((allowed_before..allowed).map(|_| (hook, false)));
            counted.extend((denied_before..denied).map(|_| (hook, true)));
        }
        // Of what is asked in turn only the last is refused.
        let verdict_of = |place: usize| is_denied && place + 1 == decided.len();
        let mut expected: Vec<_> =
            decided.iter().enumerate().map(|(at, (hook, _))| (*hook, verdict_of(at))).collect();
        expected.sort();
        assert_eq!(counted, expected, "{command} is decided and counted once");
        let fates = |counters: &Counters| Fate::ALL.map(|fate| counters.of(fate));
        let [was, now] = [fates(&before), fates(&after)];
        let fate: Vec<u64> = now.iter().zip(was).map(|(now, was)| now - was).collect();
        let all = decided.len();
        assert_eq!(fate, [*logged as u64, (all - logged) as u64, 0], "what became of {command}");
        let mut told = records(rings);
        let mut expected: Vec<_> = decided[..*logged]
            .iter()
            .enumerate()
            .map(|(at, (hook, kind))| (*hook, *kind, verdict_of(at)))
            .collect();
        told.sort();
        expected.sort();
        assert_eq!(told, expected, "the records of {command}");
    }
}

/// What the workload itself makes is judged once though both layers are active: what a portable hook
/// judges the LSM passes unseen, and of an exec the tracepoint.
#[test]
fn a_request_has_one_verdict_one_count_and_one_record_where_both_layers_are_active() {
    use {Hook::*, RequestKind::*};
    requires(Layer::Lsm);
    let directory = Directory::new("once");
    let name = format!("agentguard-lsm-once-{}", process::id());
    let _streams =
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let _datagrams = UnixDatagram::bind(directory.socket()).unwrap();
    let (_udp, udp4) = udp("127.0.0.1:0");
    let (_udp6, udp6) = udp("[::1]:0");
    let (listener, tcp4) = tcp("127.0.0.1:0");
    let (_tcp6, tcp6) = tcp("[::1]:0");
    let free = ["127.0.0.1:0", "[::1]:0"].map(|any| tcp(any).1);
    let [free4, free6] = free;

    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    let mut rings = fixture.datapath.rings().unwrap();
    let listening = free.map(|free| port(Protocol::Tcp, free.port())).to_vec();
    fixture.attach(
        Mode::Enforce,
        &[
            to(Protocol::Udp, udp4),
            to(Protocol::Udp, udp6),
            running(Path::new("/bin/true")),
            Permit { listening, ..standing() },
        ],
    );
    // What came before is not of this workload's.
    records(&mut rings);
    let granted = [
        Case::new(format!("connect udp {udp4}"), "ok", &[(Connect4, Connect)]),
        Case::new(format!("connect udp {udp6}"), "ok", &[(Connect6, Connect)]),
        Case::new(format!("listen {free4}"), "ok", &[(Bind4, Bind), (SocketListen, Listen)]),
        Case::new(format!("bind {free6}"), "ok", &[(Bind6, Bind)]),
        Case::new("run /bin/true", "ok", &[(BprmCheck, RequestKind::Exec)]),
        // NETLINK_ROUTE.
        Case::new("socket 16 3 0", "ok", &[(SocketCreate, Socket)]),
    ];
    assert_each_once(&fixture, &mut rings, &mut worker, &granted);
    let refused = [
        Case::new(format!("connect tcp {tcp4}"), "EPERM", &[(Connect4, Connect)]),
        Case::new(format!("connect tcp {tcp6}"), "EPERM", &[(Connect6, Connect)]),
        Case::new(format!("send 127.0.0.1:{}", tcp4.port()), "EPERM", &[(Sendmsg4, Send)]),
        Case::new(format!("send [::1]:{}", tcp6.port()), "EPERM", &[(Sendmsg6, Send)]),
        Case::new("bind 127.0.0.1:9", "EPERM", &[(Bind4, Bind)]),
        Case::new("bind [::1]:10", "EPERM", &[(Bind6, Bind)]),
        Case::new("listen 127.0.0.1:0", "EPERM", &[(Bind4, Bind), (SocketListen, Listen)]),
        Case::new("run /bin/false", "EPERM", &[(BprmCheck, RequestKind::Exec)]),
        Case::new("raw", "EPERM", &[(SockCreate, RawSocket)]),
        // AF_PACKET.
        Case::new("socket 17 2 0", "EPERM", &[(SocketCreate, Socket)]),
        Case::new(format!("unix-stream @{name}"), "EPERM", &[(UnixStreamConnect, UnixConnect)]),
        Case::new(
            format!("unix-datagram {}", directory.socket().display()),
            "EPERM",
            &[(UnixMaySend, UnixSend)],
        ),
    ];
    assert_each_once(&fixture, &mut rings, &mut worker, &refused);

    // In a generation of its own, so that nothing is folded into what was before: a call and its packet
    // ask for one destination.
    fixture.permit(Mode::Enforce, &[to(Protocol::Udp, udp4), to(Protocol::Udp, udp6)]);
    let sends = [
        Case::new(format!("send {udp4}"), "ok", &[(Sendmsg4, Send), (Egress, Packet)]).folded(),
        Case::new(format!("send {udp6}"), "ok", &[(Sendmsg6, Send), (Egress, Packet)]).folded(),
    ];
    assert_each_once(&fixture, &mut rings, &mut worker, &sends);

    // Sockets that another cgroup made, which the LSM judges alone.
    let foreign = UdpSocket::bind("127.0.0.1:0").unwrap();
    let take = |socket: i32| format!("take {} {socket}", process::id());
    fixture.permit(Mode::Enforce, &[]);
    let received = [
        Case::new(take(foreign.as_raw_fd()), "ok", &[]),
        Case::new(format!("connect-flow {udp4}"), "EPERM", &[(SocketConnect, Connect)]),
        Case::new(take(listener.as_raw_fd()), "EPERM", &[(FileReceive, Accept)]),
    ];
    assert_each_once(&fixture, &mut rings, &mut worker, &received);
    foreign.connect(udp4).unwrap();
    let flow = [Case::new("flow", "EPERM", &[(SocketSendmsg, Send)]).folded()];
    assert_each_once(&fixture, &mut rings, &mut worker, &flow);
}

#[test]
fn exec_is_left_to_the_tracepoint_where_the_check_can_not_be_attached() {
    requires(Layer::Lsm);
    let mut fixture = Fixture::prepared(no_place_for_exec_check).unwrap();
    let mut worker = fixture.worker();
    assert!(!fixture.is_active("bprm_check"));
    fixture.attach(Mode::Enforce, &[running(Path::new("/bin/true"))]);
    assert_eq!(worker.told("run /bin/true"), "ok");
    assert_eq!(worker.told("run /bin/false"), "killed");
    assert_eq!(denials(&fixture, Hook::Exec), 1);
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
