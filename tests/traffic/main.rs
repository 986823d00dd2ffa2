//! What a busy workload does: connects and sends to the same targets for as long as it is told to,
//! and says how each attempt ended.
//!
//! One line on standard input is one question: `report` asks for the numbers so far, `stop` for the
//! last ones. Everything it needs is in its arguments, so that it runs in any cgroup and namespace.
#![forbid(unsafe_code)]

use std::{
    io::{self, BufRead as _, Write as _},
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use agentguard_tests::traffic::{Expected, Kind, Report, Target};
use socket2::{Domain, SockAddr, Socket, Type};

/// Wrong outcomes that are told one by one.
const TOLD: usize = 20;
/// How long a TCP connection may take.
const PATIENCE: Duration = Duration::from_secs(3);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let pause = arguments.next().and_then(|text| text.parse().ok()).map(Duration::from_micros);
    let pause = pause.expect("the first argument is a pause in microseconds");
    let targets: Vec<Target> =
        arguments.map(|text| Target::parse(&text).expect("kind,expected,address")).collect();
    let reports = Arc::new(Mutex::new(vec![Report::default(); targets.len()]));
    let stop = Arc::new(AtomicBool::new(false));
    let worker = {
        let (reports, stop) = (Arc::clone(&reports), Arc::clone(&stop));
        thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                for (index, target) in targets.iter().enumerate() {
                    let attempt = attempt(*target);
                    let mut reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
                    note(&mut reports[index], *target, attempt);
                }
                if !pause.is_zero() {
                    thread::sleep(pause);
                }
            }
        })
    };
    say("ready");
    for line in io::stdin().lock().lines() {
        match line.as_deref() {
            Ok("report") => {}
            Ok(_) | Err(_) => break,
        }
        say(&told(&reports));
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

/// How one attempt ended: the connect or unconnected send, and the send on what was connected.
struct Attempt {
    first: io::Result<()>,
    then: Option<io::Result<()>>,
}

fn attempt(target: Target) -> Attempt {
    let domain = Domain::for_address(target.address);
    let address = SockAddr::from(target.address);
    let socket = |kind| Socket::new(domain, kind, None).expect("a socket can be made");
    match target.kind {
        Kind::Tcp => Attempt { first: connect(&socket(Type::STREAM), target.address), then: None },
        Kind::Udp => {
            let socket = socket(Type::DGRAM);
            let first = socket.connect(&address);
            let then = first.is_ok().then(|| socket.send(b"traffic").map(drop));
            Attempt { first, then }
        }
        Kind::SendTo => {
            let first = socket(Type::DGRAM).send_to(b"traffic", &address).map(drop);
            Attempt { first, then: None }
        }
    }
}

/// Connects, and closes without leaving a port behind.
fn connect(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let connected = socket.connect_timeout(&address.into(), PATIENCE);
    socket.set_linger(Some(Duration::ZERO))?;
    connected
}

fn note(report: &mut Report, target: Target, attempt: Attempt) {
    let Attempt { first, then } = attempt;
    report.attempts += 1;
    report.sends += u64::from(then.is_some());
    for outcome in [Some(first), then].into_iter().flatten() {
        let is_wrong = match &outcome {
            Ok(()) => target.expected == Expected::Refused,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                report.refused += 1;
                target.expected == Expected::Passed
            }
            Err(_) => true,
        };
        report.passed += u64::from(outcome.is_ok());
        if is_wrong {
            report.wrong += 1;
            if report.told.len() < TOLD {
                report.told.push(format!("{:?} {target:?}: {outcome:?}", Instant::now()));
            }
        }
    }
}
