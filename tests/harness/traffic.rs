//! A workload that never rests: requests whose right outcome is known, and how they ended.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{daemon::Daemon, process::binary};

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TCP connect.
    Tcp,
    /// A connect of a datagram socket, then a send on it.
    Udp,
    /// A send on a datagram socket that is not connected.
    SendTo,
}

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It is granted all the time.
    Passed,
    /// It is never granted.
    Refused,
    /// It is granted now and then.
    Either,
}

/// One target of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub kind: Kind,
    pub expected: Expected,
    pub address: SocketAddr,
}

impl Target {
    #[must_use]
    pub const fn new(kind: Kind, expected: Expected, address: SocketAddr) -> Self {
        Self { kind, expected, address }
    }

    /// Reads what its `Display` writes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ',');
        let kind = match parts.next()? {
            "tcp" => Kind::Tcp,
            "udp" => Kind::Udp,
            "sendto" => Kind::SendTo,
            _ => return None,
        };
        let expected = match parts.next()? {
            "passed" => Expected::Passed,
            "refused" => Expected::Refused,
            "either" => Expected::Either,
            _ => return None,
        };
        Some(Self { kind, expected, address: parts.next()?.parse().ok()? })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            Kind::Tcp => "tcp",
            Kind::Udp => "udp",
            Kind::SendTo => "sendto",
        };
        let expected = match self.expected {
            Expected::Passed => "passed",
            Expected::Refused => "refused",
            Expected::Either => "either",
        };
        write!(f, "{kind},{expected},{}", self.address)
    }
}

/// How the attempts on one target ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Connects, or sends without one.
    pub attempts: u64,
    /// Sends on what was connected.
    pub sends: u64,
    /// Of both.
    pub passed: u64,
    /// Of both, with `EPERM`.
    pub refused: u64,
    /// Of both: what must not be, an error that is none of the guard's included.
    pub wrong: u64,
    /// The first wrong ones, in words.
    pub told: Vec<String>,
}

/// A workload under traffic; dropped, it is killed.
#[derive(Debug)]
pub struct Traffic {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    targets: Vec<Target>,
}

impl Traffic {
    /// Starts it by `command`, whose last words it is, with a pause between two rounds.
    ///
    /// # Panics
    ///
    /// When it does not start.
    #[track_caller]
    #[must_use]
    pub fn start(mut command: Command, pause: Duration, targets: &[Target]) -> Self {
        command.arg(traffic_binary()).arg(pause.as_micros().to_string());
        command.args(targets.iter().map(Target::to_string));
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        let ask = child.stdin.take().expect("it was piped");
        let answers = BufReader::new(child.stdout.take().expect("it was piped"));
        let mut traffic = Self { child, ask, answers, targets: targets.to_vec() };
        assert_eq!(traffic.answer(), "ready", "{command:?}");
        traffic
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("it answers");
        line.trim().to_owned()
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The numbers so far, in the order of the targets.
    ///
    /// # Panics
    ///
    /// When it does not say.
    #[track_caller]
    pub fn report(&mut self) -> Vec<Report> {
        writeln!(self.ask, "report").expect("it listens");
        self.reports()
    }

    /// Ends it, and gives the last numbers.
    ///
    /// # Panics
    ///
    /// When it does not say.
    #[track_caller]
    pub fn stop(mut self) -> Vec<Report> {
        writeln!(self.ask, "stop").expect("it listens");
        let reports = self.reports();
        self.child.wait().expect("it ends");
        reports
    }

    fn reports(&mut self) -> Vec<Report> {
        let answer = self.answer();
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer:?}"))
    }

    /// Waits until each target was tried `more` times again, and nothing wrong came of it.
    ///
    /// # Panics
    ///
    /// When something wrong came of it, or nothing at all.
    #[track_caller]
    pub fn goes_on(&mut self, more: u64) {
        let before: Vec<u64> = self.report().iter().map(|report| report.attempts).collect();
        crate::wait_until("the workload goes on", || {
            let now = self.report();
            assert_right(&self.targets, &now);
            now.iter().zip(&before).all(|(now, before)| now.attempts >= before + more)
        });
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Fails when an outcome was not what it must be.
///
/// # Panics
///
/// Then.
#[track_caller]
pub fn assert_right(targets: &[Target], reports: &[Report]) {
    for (target, report) in targets.iter().zip(reports) {
        assert_eq!(report.wrong, 0, "{target}: {report:#?}");
    }
}

/// What the kernel counted at one hook for one identity: allowed and denied.
#[track_caller]
#[must_use]
pub fn counted(daemon: &Daemon, hook: &str, identity: &str) -> (u64, u64) {
    let (hook, identity) = (format!("hook=\"{hook}\""), format!("identity=\"{identity}\""));
    let rows = daemon.metrics("agentguard_verdicts_total");
    let sum = |verdict: &str| {
        let wanted = [&hook, &identity, &format!("verdict=\"{verdict}\"")];
        let rows = rows.iter().filter(|(labels, _)| wanted.iter().all(|one| labels.contains(*one)));
        rows.map(|(_, value)| *value).sum::<f64>() as u64
    };
    (sum("allow"), sum("deny"))
}

/// Fails when what the kernel counted is not what the workload saw of it, request for request.
///
/// # Panics
///
/// Then.
#[track_caller]
pub fn assert_reconciles(daemon: &Daemon, identity: &str, targets: &[Target], reports: &[Report]) {
    let of = |wanted: &[Kind], field: fn(&Report) -> u64| -> u64 {
        let pairs = targets.iter().zip(reports);
        pairs.filter(|(target, _)| wanted.contains(&target.kind)).map(|(_, one)| field(one)).sum()
    };
    let connect = counted(daemon, "cgroup/connect4", identity);
    let send = counted(daemon, "cgroup/sendmsg4", identity);
    let packet = counted(daemon, "cgroup_skb/egress", identity);
    println!(
        "the kernel counted (allowed, denied): connect {connect:?} send {send:?} packet {packet:?}"
    );
    let connects = of(&[Kind::Tcp, Kind::Udp], |report| report.attempts);
    assert_eq!(connect.0 + connect.1, connects, "each connect is decided once");
    let sends = of(&[Kind::SendTo], |report| report.attempts);
    assert_eq!(send.0 + send.1, sends, "each send is decided once");
    let datagrams = of(&[Kind::Udp], |report| report.sends) + send.0;
    let has_streams = targets.iter().any(|target| target.kind == Kind::Tcp);
    if !has_streams {
        assert_eq!(packet.0 + packet.1, datagrams, "each datagram is decided once");
    }
    let refused = of(&[Kind::Tcp, Kind::Udp, Kind::SendTo], |report| report.refused);
    assert_eq!(connect.1 + send.1 + packet.1, refused, "what is denied is refused, and only that");
}

fn traffic_binary() -> PathBuf {
    binary("agentguard-traffic", "AGENTGUARD_TRAFFIC_BIN")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_read_as_it_is_written() {
        for text in ["tcp,passed,127.0.0.1:1", "udp,refused,[::1]:2", "sendto,either,192.0.2.1:3"] {
            assert_eq!(Target::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Target::parse("tcp,passed"), None);
    }
}
