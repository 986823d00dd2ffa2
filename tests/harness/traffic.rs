//! A workload that never rests: requests whose right outcome is known, and how they ended.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::{daemon::Daemon, process::binary};

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TCP connect to an address.
    Tcp,
    /// A connect of a datagram socket to an address, then a send on it.
    Udp,
    /// A send to an address on a datagram socket that is not connected.
    SendTo,
    /// A bind of a stream socket to an address.
    Bind,
    /// The same, then a listen.
    Listen,
    /// A listen on a stream socket of the address's family that is not bound.
    ListenUnbound,
    /// An exec of a file, to its end.
    Exec,
    /// A connect of a stream socket to a path, or to an abstract name behind an `@`.
    UnixStream,
    /// A send to a path or name on a datagram socket that is not connected.
    UnixDatagram,
    /// Making a raw socket of an IP protocol, by its number.
    Raw,
    /// Making a datagram socket of a family, by its number.
    Family,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Tcp,
        Self::Udp,
        Self::SendTo,
        Self::Bind,
        Self::Listen,
        Self::ListenUnbound,
        Self::Exec,
        Self::UnixStream,
        Self::UnixDatagram,
        Self::Raw,
        Self::Family,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::SendTo => "sendto",
            Self::Bind => "bind",
            Self::Listen => "listen",
            Self::ListenUnbound => "listen-unbound",
            Self::Exec => "exec",
            Self::UnixStream => "unix-stream",
            Self::UnixDatagram => "unix-datagram",
            Self::Raw => "raw",
            Self::Family => "family",
        }
    }
}

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// It is granted.
    Passed,
    /// It is not granted.
    Refused,
    /// It is being granted or taken away, and so far nobody has said that it is done.
    Either,
}

impl Expected {
    const ALL: [Self; 3] = [Self::Passed, Self::Refused, Self::Either];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Refused => "refused",
            Self::Either => "either",
        }
    }

    /// Reads what its `Display` writes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|expected| expected.as_str() == text)
    }
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One target of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub kind: Kind,
    /// At first; see [`Traffic::expect`].
    pub expected: Expected,
    /// Whom, as the kind says.
    pub place: String,
}

impl Target {
    #[must_use]
    pub fn new(kind: Kind, expected: Expected, place: impl std::fmt::Display) -> Self {
        Self { kind, expected, place: place.to_string() }
    }

    /// Reads what its `Display` writes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ',');
        let kind = parts.next()?;
        let kind = Kind::ALL.into_iter().find(|known| known.as_str() == kind)?;
        let expected = Expected::parse(parts.next()?)?;
        Some(Self { kind, expected, place: parts.next()?.to_owned() })
    }

    /// The hooks of which one decides the first request of an attempt, and once.
    fn first_hooks(&self) -> &'static [&'static str] {
        let by_family = |v4, v6| if self.place.starts_with('[') { v6 } else { v4 };
        match self.kind {
            Kind::Tcp | Kind::Udp => by_family(&["cgroup/connect4"], &["cgroup/connect6"]),
            Kind::SendTo => by_family(&["cgroup/sendmsg4"], &["cgroup/sendmsg6"]),
            Kind::Bind | Kind::Listen => by_family(&["cgroup/bind4"], &["cgroup/bind6"]),
            Kind::ListenUnbound => &["lsm/socket_listen"],
            Kind::Exec => &EXEC,
            Kind::UnixStream => &["lsm/unix_stream_connect"],
            Kind::UnixDatagram => &["lsm/unix_may_send"],
            Kind::Raw => &["cgroup/sock_create"],
            Kind::Family => &["lsm/socket_create"],
        }
    }

    /// The same for the request that follows.
    const fn then_hooks(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Udp => &[EGRESS],
            Kind::Listen => &["lsm/socket_listen"],
            Kind::Tcp
            | Kind::SendTo
            | Kind::Bind
            | Kind::ListenUnbound
            | Kind::Exec
            | Kind::UnixStream
            | Kind::UnixDatagram
            | Kind::Raw
            | Kind::Family => &[],
        }
    }
}

/// By which an exec is decided: the one where the BPF LSM is active, else the other.
const EXEC: [&str; 2] = ["lsm/bprm_check_security", "tp_btf/sched_process_exec"];
const EGRESS: &str = "cgroup_skb/egress";

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{},{},{}", self.kind.as_str(), self.expected, self.place)
    }
}

/// How the attempts on one target ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whatever a kind asks first.
    pub attempts: u64,
    /// What it asks then: sends on what was connected, listens on what was bound.
    pub sends: u64,
    /// Of both.
    pub passed: u64,
    /// Of both, with `EPERM`; an exec also by `SIGKILL` before the first instruction.
    pub refused: u64,
    /// Of both: begun and ended while one thing only was right.
    pub known: u64,
    /// Of those: what must not be; and of all, an error that is none of the guard's.
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

    /// Has the outcome of a target be another one: of every request that begins once this returns and
    /// ends before the next call of it.
    ///
    /// So whoever changes what is granted says [`Expected::Either`] before, and what is right from then
    /// on once the change is acknowledged.
    ///
    /// # Panics
    ///
    /// When it does not listen.
    #[track_caller]
    pub fn expect(&mut self, target: usize, expected: Expected) {
        writeln!(self.ask, "expect {target} {expected}").expect("it listens");
        assert_eq!(self.answer(), "expected");
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

/// What the kernel counted at each hook for one identity: allowed and denied.
#[track_caller]
fn counted(daemon: &Daemon, identity: &str) -> BTreeMap<String, (u64, u64)> {
    let mut hooks = BTreeMap::<String, (u64, u64)>::new();
    for (labels, value) in daemon.metrics("agentguard_verdicts_total") {
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            rest.split_once('"').map(|(value, _)| value)
        };
        if label("identity") != Some(identity) || value == 0.0 {
            continue;
        }
        let counts = hooks.entry(label("hook").unwrap_or_default().to_owned()).or_default();
        match label("verdict") {
            Some("allow") => counts.0 += value as u64,
            Some("deny") => counts.1 += value as u64,
            other => panic!("a workload's request is {other:?}: {labels}"),
        }
    }
    hooks
}

/// Fails when what the kernel counted is not what the workload saw of it, request for request: one that
/// nobody decided, one that two decided, or one that nobody made.
///
/// # Panics
///
/// Then.
#[track_caller]
pub fn assert_reconciles(daemon: &Daemon, identity: &str, targets: &[Target], reports: &[Report]) {
    let counted = counted(daemon, identity);
    println!("the kernel counted (allowed, denied): {counted:?}");
    let of = |hooks: &[&str]| {
        let counts = hooks.iter().filter_map(|hook| counted.get(*hook));
        counts.fold((0, 0), |(allowed, denied), more| (allowed + more.0, denied + more.1))
    };
    // What started the workload is an exec of its own.
    let mut asked = BTreeMap::from([(EXEC.as_slice(), 1)]);
    for (target, report) in targets.iter().zip(reports) {
        *asked.entry(target.first_hooks()).or_default() += report.attempts;
        *asked.entry(target.then_hooks()).or_default() += report.sends;
    }
    // A datagram that may be sent is a packet too. What a stream sends nobody can count from here.
    let datagrams = ["cgroup/sendmsg4", "cgroup/sendmsg6"].map(|hook| of(&[hook]).0);
    *asked.entry(&[EGRESS]).or_default() += datagrams.iter().sum::<u64>();
    let has_streams = targets.iter().any(|target| target.kind == Kind::Tcp);
    for (hooks, asked) in &asked {
        let (allowed, denied) = of(hooks);
        if has_streams && *hooks == [EGRESS] {
            assert!(allowed + denied >= *asked, "each datagram is decided: {counted:?}");
        } else {
            assert_eq!(allowed + denied, *asked, "{hooks:?} decides each once: {counted:?}");
        }
    }
    let refused: u64 = reports.iter().map(|report| report.refused).sum();
    let denied: u64 = counted.values().map(|(_, denied)| denied).sum();
    assert_eq!(denied, refused, "what is denied is refused, and only that: {counted:?}");
    let is_asked = |hook: &str| {
        (has_streams && hook == EGRESS)
            || asked.iter().any(|(hooks, asked)| *asked > 0 && hooks.contains(&hook))
    };
    let other = counted.keys().find(|hook| !is_asked(hook));
    assert_eq!(other, None, "no other hook had anything to decide: {counted:?}");
}

fn traffic_binary() -> PathBuf {
    binary("agentguard-traffic", "AGENTGUARD_TRAFFIC_BIN")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_read_as_it_is_written() {
        for kind in Kind::ALL {
            for expected in Expected::ALL {
                for place in ["127.0.0.1:1", "[::1]:2", "/bin/true", "@a,name", "17"] {
                    let target = Target::new(kind, expected, place);
                    assert_eq!(Target::parse(&target.to_string()), Some(target));
                }
            }
        }
        for text in ["tcp,passed", "tcp,maybe,127.0.0.1:1", "smtp,passed,127.0.0.1:1"] {
            assert_eq!(Target::parse(text), None);
        }
    }
}
