//! What a busy workload does: connects and sends to the same targets for as long as it is told to,
//! and says how each attempt ended.
//!
//! One line on standard input is one question: `report` asks for the numbers so far, `stop` for the
//! last ones; `expect` says what must come of a target from then on. Everything it needs is in its arguments, so that it runs in any cgroup and namespace.
#![forbid(unsafe_code)]

use std::{
    io::{self, BufRead as _, Write as _},
    net::SocketAddr,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            net::{SocketAddr as UnixAddress, UnixDatagram, UnixStream},
            process::ExitStatusExt as _,
        },
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use agentguard_tests::traffic::{Expected, Kind, Report, Target};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Wrong outcomes that are told one by one.
const TOLD: usize = 20;
/// How long a TCP connection may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// `SIGKILL`.
const KILL: i32 = 9;

/// A target, and what is known of it at the moment.
struct Aim {
    target: Target,
    ask: Ask,
    standing: Mutex<Standing>,
}

/// What must come of a request, and for how many times that was said: a request knows by it whether
/// the same held from its beginning to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Standing {
    expected: Expected,
    said: u64,
}

impl Aim {
    fn new(target: Target) -> Self {
        let standing = Mutex::new(Standing { expected: target.expected, said: 0 });
        Self { ask: Ask::of(&target), target, standing }
    }

    fn standing(&self) -> Standing {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, expected: Expected) {
        let mut standing = self.standing.lock().unwrap_or_else(PoisonError::into_inner);
        *standing = Standing { expected, said: standing.said + 1 };
    }

    /// Tries once. What must come of it is known where nothing else was said meanwhile.
    fn try_once(&self) -> (Attempt, Expected) {
        let before = self.standing();
        let attempt = self.ask.attempt();
        let known = if self.standing() == before { before.expected } else { Expected::Either };
        (attempt, known)
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let pause = arguments.next().and_then(|text| text.parse().ok()).map(Duration::from_micros);
    let pause = pause.expect("the first argument is a pause in microseconds");
    let aims: Arc<Vec<Aim>> = Arc::new(
        arguments
            .map(|text| Aim::new(Target::parse(&text).expect("kind,expected,place")))
            .collect(),
    );
    let reports = Arc::new(Mutex::new(vec![Report::default(); aims.len()]));
    let stop = Arc::new(AtomicBool::new(false));
    let worker = {
        let (aims, reports, stop) = (Arc::clone(&aims), Arc::clone(&reports), Arc::clone(&stop));
        thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                for (index, aim) in aims.iter().enumerate() {
                    let (attempt, known) = aim.try_once();
                    let mut reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
                    note(&mut reports[index], &aim.target, known, attempt);
                }
                if !pause.is_zero() {
                    thread::sleep(pause);
                }
            }
        })
    };
    say("ready");
    for line in io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            ["report"] => say(&told(&reports)),
            ["expect", index, expected] => {
                let index: usize = index.parse().expect("a number of a target");
                aims[index].expect(Expected::parse(expected).expect("an outcome"));
                say("expected");
            }
            _ => break,
        }
    }
    stop.store(true, Ordering::Release);
    worker.join().expect("the worker does not panic");
    say(&told(&reports));
}

fn told(reports: &Mutex<Vec<Report>>) -> String {
    let reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
    serde_json::to_string(&*reports).expect("numbers and text")
}

fn say(line: &str) {
    // Whoever started it may be gone; then it ends by the end of its input.
    let _told = writeln!(io::stdout(), "{line}");
}

/// How one attempt ended: what is asked first, and what is asked then.
struct Attempt {
    first: io::Result<()>,
    then: Option<io::Result<()>>,
}

/// What is asked of the kernel, read once.
enum Ask {
    Tcp(SocketAddr),
    Udp(SocketAddr),
    SendTo(SocketAddr),
    Bind(SocketAddr),
    Listen(SocketAddr),
    ListenUnbound(SocketAddr),
    Exec(PathBuf),
    UnixStream(UnixAddress),
    UnixDatagram(UnixAddress),
    Raw(Protocol),
    Family(Domain),
}

impl Ask {
    fn of(target: &Target) -> Self {
        let place = target.place.as_str();
        let address = || place.parse().expect("an address and a port");
        let number = || place.parse::<i32>().expect("a number");
        match target.kind {
            Kind::Tcp => Self::Tcp(address()),
            Kind::Udp => Self::Udp(address()),
            Kind::SendTo => Self::SendTo(address()),
            Kind::Bind => Self::Bind(address()),
            Kind::Listen => Self::Listen(address()),
            Kind::ListenUnbound => Self::ListenUnbound(address()),
            Kind::Exec => Self::Exec(place.into()),
            Kind::UnixStream => Self::UnixStream(unix(place)),
            Kind::UnixDatagram => Self::UnixDatagram(unix(place)),
            Kind::Raw => Self::Raw(number().into()),
            Kind::Family => Self::Family(number().into()),
        }
    }

    fn attempt(&self) -> Attempt {
        let first = match self {
            Self::Tcp(address) => connect(&socket(*address, Type::STREAM), *address),
            Self::Udp(address) => {
                let socket = socket(*address, Type::DGRAM);
                let first = socket.connect(&SockAddr::from(*address));
                let then = first.is_ok().then(|| socket.send(b"traffic").map(drop));
                return Attempt { first, then };
            }
            Self::SendTo(address) => {
                let socket = socket(*address, Type::DGRAM);
                socket.send_to(b"traffic", &SockAddr::from(*address)).map(drop)
            }
            Self::Bind(address) => bind(&socket(*address, Type::STREAM), *address),
            Self::Listen(address) => {
                let socket = socket(*address, Type::STREAM);
                let first = bind(&socket, *address);
                let then = first.is_ok().then(|| socket.listen(1));
                return Attempt { first, then };
            }
            Self::ListenUnbound(address) => socket(*address, Type::STREAM).listen(1),
            Self::Exec(path) => exec(path),
            Self::UnixStream(address) => UnixStream::connect_addr(address).map(drop),
            Self::UnixDatagram(address) => send_unix(address),
            Self::Raw(protocol) => Socket::new(Domain::IPV4, Type::RAW, Some(*protocol)).map(drop),
            Self::Family(family) => Socket::new(*family, Type::DGRAM, None).map(drop),
        };
        Attempt { first, then: None }
    }
}

/// A path, or an abstract name behind an `@`.
fn unix(place: &str) -> UnixAddress {
    match place.strip_prefix('@') {
        Some(name) => UnixAddress::from_abstract_name(name),
        None => UnixAddress::from_pathname(place),
    }
    .expect("a name that fits")
}

fn socket(address: SocketAddr, kind: Type) -> Socket {
    Socket::new(Domain::for_address(address), kind, None).expect("a socket can be made")
}

/// Connects, and closes without leaving a port behind.
fn connect(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let connected = socket.connect_timeout(&address.into(), PATIENCE);
    socket.set_linger(Some(Duration::ZERO))?;
    connected
}

fn bind(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())
}

/// Runs a program that does nothing.
fn exec(path: &PathBuf) -> io::Result<()> {
    let status = Command::new(path).stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    match status.signal() {
        None if status.success() => Ok(()),
        // Before its first instruction; it does nothing that could bring it a signal later.
        Some(KILL) => Err(io::ErrorKind::PermissionDenied.into()),
        _ => Err(io::Error::other(status.to_string())),
    }
}

/// Sends without waiting for room: the kernel would ask again each time it has waited.
fn send_unix(address: &UnixAddress) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    match socket.send_to_addr(b"traffic", address) {
        // It may be sent, but its server has not read the ones before.
        Err(full) if full.kind() == io::ErrorKind::WouldBlock => Ok(()),
        sent => sent.map(drop),
    }
}

fn note(report: &mut Report, target: &Target, known: Expected, attempt: Attempt) {
    let Attempt { first, then } = attempt;
    report.attempts += 1;
    report.sends += u64::from(then.is_some());
    for outcome in [Some(first), then].into_iter().flatten() {
        let is_wrong = match &outcome {
            Ok(()) => known == Expected::Refused,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                report.refused += 1;
                known == Expected::Passed
            }
            Err(_) => true,
        };
        report.passed += u64::from(outcome.is_ok());
        report.known += u64::from(known != Expected::Either);
        if is_wrong {
            report.wrong += 1;
            if report.told.len() < TOLD {
                let now = Instant::now();
                report.told.push(format!("{now:?} {target:?}: {outcome:?}, and not {known:?}"));
            }
        }
    }
}
