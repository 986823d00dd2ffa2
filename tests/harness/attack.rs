//! One run of one attack.

use std::{
    ffi::{OsStr, OsString},
    os::fd::OwnedFd,
    process::{Command, Stdio},
    time::Duration,
};

use serde::Deserialize;

use crate::{
    Guard, Mode, World, attack_binary,
    process::{Finished, Running, run},
};

/// Attacks that are refused end within three seconds; the rest is for a busy machine and for the launch.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long an answer may take for an attack that is to work (`sockets.rs` of the attacks).
const PATIENT: (&str, &str) = ("AGENTGUARD_ATTACK_PATIENCE_MS", "10000");

/// What to run.
#[derive(Debug)]
pub struct Attack {
    arguments: Vec<OsString>,
    /// To be found as descriptor 3.
    descriptor: Option<OwnedFd>,
    is_patient: bool,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It reached its target, and has the proof.
    Worked,
    Refused,
    /// The set-up was broken: it proves nothing.
    Error,
}

/// What an attack says of itself.
#[derive(Debug, Deserialize)]
pub struct Report {
    pub attack: String,
    pub outcome: Outcome,
    pub errno: Option<i32>,
    pub detail: String,
    /// All lines of its output but the report.
    #[serde(skip)]
    pub output: Vec<String>,
}

impl Attack {
    /// The subcommand of that name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { arguments: vec![name.into()], descriptor: None, is_patient: false }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item: AsRef<OsStr>>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Adds an option with its value.
    #[must_use]
    pub fn option(self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.arg(format!("--{name}")).arg(value)
    }

    /// Has the attack find `descriptor` as number 3, as a launcher hands sockets on.
    #[must_use]
    pub fn with_descriptor(mut self, descriptor: impl Into<OwnedFd>) -> Self {
        self.descriptor = Some(descriptor.into());
        self
    }

    /// Has it wait for answers for as long as a busy machine may take. For an attack that is to work: one
    /// that is refused may have to wait as long.
    #[must_use]
    pub const fn patient(mut self) -> Self {
        self.is_patient = true;
        self
    }

    /// Runs it on the client side, in a cgroup of its own, with no guard: it is to work there.
    #[track_caller]
    #[must_use]
    pub fn run_without_the_guard(&mut self, world: &World) -> Report {
        let mut command = world.enter();
        let cgroup = world.cgroup().child("work");
        command.arg("--cgroup").arg(cgroup);
        self.is_patient = true;
        self.finish(command, &[])
    }

    /// Runs it on the client side, as a workload; in audit mode, where it is to work, patiently.
    #[track_caller]
    #[must_use]
    pub fn run_as_workload(
        &mut self,
        world: &World,
        guard: &Guard,
        identity: &str,
        scopes: &[&str],
        mode: Mode,
    ) -> Report {
        self.is_patient |= mode == Mode::Audit;
        self.finish(world.enter(), &guard.exec_line(identity, scopes, mode))
    }

    /// Starts it as a workload, for what happens to the guard meanwhile.
    #[track_caller]
    #[must_use]
    pub fn start_as_workload(
        &mut self,
        world: &World,
        guard: &Guard,
        identity: &str,
        scopes: &[&str],
        mode: Mode,
    ) -> Running {
        let launcher = guard.exec_line(identity, scopes, mode);
        Running::start(&mut self.command(world.enter(), &launcher))
    }

    #[track_caller]
    fn finish(&mut self, command: Command, launcher: &[OsString]) -> Report {
        Report::of(&run(&mut self.command(command, launcher), PATIENCE))
    }

    fn command(&mut self, mut command: Command, launcher: &[OsString]) -> Command {
        if let Some(descriptor) = self.descriptor.take() {
            command.stdin(Stdio::from(descriptor)).arg("--hand-on-stdin");
        }
        if self.is_patient {
            let (name, milliseconds) = PATIENT;
            command.env(name, milliseconds);
        }
        command.arg("--").args(launcher).arg(attack_binary()).args(&self.arguments);
        command
    }
}

impl Report {
    /// Reads the output of an attack.
    ///
    /// # Panics
    ///
    /// When there is no report, and the attack was not killed either.
    #[track_caller]
    #[must_use]
    pub fn of(finished: &Finished) -> Self {
        let mut lines: Vec<String> = finished.stdout.lines().map(str::to_owned).collect();
        if let Some(report) = lines.last().and_then(|line| serde_json::from_str(line).ok()) {
            lines.pop();
            let report = Self { output: lines, ..report };
            let expected = match report.outcome {
                Outcome::Worked => 0,
                Outcome::Refused => 1,
                Outcome::Error => 2,
            };
            assert_eq!(finished.status.code(), Some(expected), "{finished:?}");
            return report;
        }
        assert!(finished.was_killed(), "the attack said nothing: {finished:?}");
        Self {
            attack: String::new(),
            outcome: Outcome::Refused,
            errno: None,
            detail: "the attack itself was killed".to_owned(),
            output: lines,
        }
    }
}
