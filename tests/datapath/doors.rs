//! Every door: allowed, attach, denied, detach, allowed.

use std::{
    fs,
    io::Read as _,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::symlink,
    path::Path,
    thread,
    time::Duration,
};

use agentguard::datapath::LoadError;
use agentguard_common::{Mode, Protocol, event::Hook};

use crate::fixture::{Fixture, in_boot_time, port, running, standing, to};

const TRUE: &str = "/bin/true";

/// How often a hook gave a verdict that is no permission.
pub(crate) fn denials(fixture: &Fixture, hook: Hook) -> u64 {
    let counters = fixture.counters();
    let cells = counters.iter();
    cells.filter(|cell| cell.0 == hook && cell.2.reason().is_some()).map(|cell| cell.3).sum()
}

/// Does `command` before, while and after the workload is held to nothing at all.
#[track_caller]
pub(crate) fn is_denied_while_attached(hook: Hook, command: &str, refusal: &str) {
    let fixture = Fixture::new();
    is_denied_while(fixture, hook, command, refusal);
}

#[track_caller]
fn is_denied_while(mut fixture: Fixture, hook: Hook, command: &str, refusal: &str) {
    let mut worker = fixture.worker();
    assert_eq!(worker.told(command), "ok", "before");
    fixture.attach(Mode::Enforce, &[]);
    assert_eq!(worker.told(command), refusal, "attached");
    assert_eq!(denials(&fixture, hook), 1);
    fixture.permit(Mode::Audit, &[]);
    assert_eq!(worker.told(command), "ok", "in audit mode");
    assert!(denials(&fixture, hook) >= 2);
    fixture.detach();
    assert_eq!(worker.told(command), "ok", "detached");
}

pub(crate) fn udp(address: &str) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

pub(crate) fn tcp(address: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

#[test]
fn connect4_is_denied_while_attached() {
    let (_server, address) = tcp("127.0.0.1:0");
    is_denied_while_attached(Hook::Connect4, &format!("connect tcp {address}"), "EPERM");
}

#[test]
fn connect6_is_denied_while_attached() {
    let (_server, address) = tcp("[::1]:0");
    is_denied_while_attached(Hook::Connect6, &format!("connect tcp {address}"), "EPERM");
}

#[test]
fn sendmsg4_is_denied_while_attached() {
    let (_server, address) = udp("127.0.0.1:0");
    is_denied_while_attached(Hook::Sendmsg4, &format!("send {address}"), "EPERM");
}

#[test]
fn sendmsg6_is_denied_while_attached() {
    let (_server, address) = udp("[::1]:0");
    is_denied_while_attached(Hook::Sendmsg6, &format!("send {address}"), "EPERM");
}

#[test]
fn bind4_is_denied_while_attached() {
    let (server, address) = tcp("127.0.0.1:0");
    drop(server);
    is_denied_while_attached(Hook::Bind4, &format!("bind {address}"), "EPERM");
}

#[test]
fn bind6_is_denied_while_attached() {
    let (server, address) = tcp("[::1]:0");
    drop(server);
    is_denied_while_attached(Hook::Bind6, &format!("bind {address}"), "EPERM");
}

#[test]
fn a_raw_socket_is_denied_while_attached() {
    is_denied_while_attached(Hook::SockCreate, "raw", "EPERM");
}

#[test]
fn an_exec_is_refused_or_killed_before_its_first_instruction_while_attached() {
    let fixture = Fixture::new();
    let (refusal, hook) = fixture.refused_exec();
    is_denied_while(fixture, hook, &format!("run {TRUE}"), refusal);
}

/// Puts a whole build of somebody else's into a pin directory, as far as its paths tell.
pub(crate) fn another_build(pins: &Path, has_exec_check: bool) {
    let build = pins.join("build-other");
    fs::create_dir_all(build.join("ready")).unwrap();
    if has_exec_check {
        fs::create_dir(build.join("bprm_check")).unwrap();
    }
}

#[test]
fn exec_stays_with_the_tracepoint_where_another_build_had_it_judge() {
    let mut fixture = Fixture::prepared(|pins| another_build(pins, false)).unwrap();
    let mut worker = fixture.worker();
    assert!(!fixture.is_active("bprm_check"));
    assert!(fixture.datapath.take_over().unwrap() > 0);
    fixture.attach(Mode::Enforce, &[running(Path::new(TRUE))]);
    for (program, answer) in [(TRUE, "ok"), ("/bin/false", "killed")] {
        let before = fixture.counters();
        assert_eq!(worker.told(&format!("run {program}")), answer, "{program}");
        let decided = fixture.counters().decided() - before.decided();
        assert_eq!(decided, 1, "{program} is judged once");
    }
    assert_eq!(denials(&fixture, Hook::Exec), 1);
}

/// Has the link of the LSM layer's check of exec find its place taken.
pub(crate) fn no_place_for_exec_check(pins: &Path) {
    fs::create_dir(pins.join("links")).unwrap();
    symlink("nothing", pins.join("links/bprm_check")).unwrap();
}

#[test]
fn a_build_that_can_not_have_the_lsm_judge_exec_does_not_begin_beside_one_that_does() {
    let fixture = Fixture::prepared(|pins| {
        another_build(pins, true);
        no_place_for_exec_check(pins);
    });
    let Err(error) = fixture else { panic!("what is being run would be judged twice") };
    assert!(matches!(error, LoadError::ExecJudge { .. }), "{error}");
}

#[test]
fn what_is_granted_is_allowed_and_nothing_beside_it() {
    let (_granted, granted) = udp("127.0.0.1:0");
    let (_other, other) = udp("127.0.0.1:0");
    let (_listener, free) = tcp("127.0.0.1:0");
    drop(_listener);
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    let mut listening = standing();
    listening.listening = vec![port(Protocol::Tcp, free.port())];
    let permits = [to(Protocol::Udp, granted), running(Path::new(TRUE)), listening];
    fixture.attach(Mode::Enforce, &permits);
    for (command, answer) in [
        (format!("connect udp {granted}"), "ok"),
        (format!("connect tcp {granted}"), "EPERM"),
        (format!("connect udp {other}"), "EPERM"),
        (format!("send {granted}"), "ok"),
        (format!("send {other}"), "EPERM"),
        (format!("bind {free}"), "ok"),
        (format!("run {TRUE}"), "ok"),
        ("run /bin/false".to_owned(), fixture.refused_exec().0),
    ] {
        assert_eq!(worker.told(&command), answer, "{command}");
    }
}

#[test]
fn a_datagram_flow_that_outlives_its_allow_list_is_stopped() {
    let (server, address) = udp("127.0.0.1:0");
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[to(Protocol::Udp, address)]);
    assert_eq!(worker.told(&format!("connect udp {address}")), "ok");
    assert_eq!(worker.told("flow"), "ok");
    server.recv(&mut [0; 16]).unwrap();
    fixture.permit(Mode::Enforce, &[]);
    assert_eq!(worker.told("flow"), "EPERM");
    server.recv(&mut [0; 16]).unwrap_err();
    fixture.detach();
    assert_eq!(worker.told("flow"), "ok");
    server.recv(&mut [0; 16]).unwrap();
}

#[test]
fn a_stream_that_outlives_its_allow_list_is_stopped() {
    fn moves(stream: &mut TcpStream, patience: Duration) -> bool {
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.read(&mut [0; 16]).is_ok_and(|length| length > 0)
    }
    let (server, address) = tcp("127.0.0.1:0");
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    fixture.attach(Mode::Enforce, &[to(Protocol::Tcp, address)]);
    assert_eq!(worker.told(&format!("connect tcp {address}")), "ok");
    let (mut stream, _) = server.accept().unwrap();
    assert_eq!(worker.told("flow"), "ok");
    assert!(moves(&mut stream, Duration::from_secs(5)));
    fixture.permit(Mode::Enforce, &[]);
    worker.told("flow");
    assert!(!moves(&mut stream, Duration::from_millis(500)));
    assert!(denials(&fixture, Hook::Egress) > 0);
    fixture.detach();
    // The kernel sends again what was not acknowledged.
    assert!(moves(&mut stream, Duration::from_secs(10)));
}

#[test]
fn a_grant_ends_in_the_kernel_without_anybody_doing_something() {
    let (_server, address) = udp("127.0.0.1:0");
    let mut fixture = Fixture::new();
    let mut worker = fixture.worker();
    let expires_at = in_boot_time(Duration::from_secs(4));
    let permits = [to(Protocol::Udp, address), running(Path::new(TRUE))]
        .map(|permit| agentguard::allowlist::Permit { expires_at, ..permit });
    fixture.attach(Mode::Enforce, &permits);
    let connect = format!("connect udp {address}");
    let run = format!("run {TRUE}");
    for command in [connect.as_str(), "flow", &run] {
        assert_eq!(worker.told(command), "ok", "{command}");
    }
    thread::sleep(Duration::from_millis(4_100));
    assert_eq!(worker.told("flow"), "EPERM");
    assert_eq!(worker.told(&connect), "EPERM");
    assert_eq!(worker.told(&run), fixture.refused_exec().0);
}
