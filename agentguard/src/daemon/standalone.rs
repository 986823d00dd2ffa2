//! `exec` with no daemon beside it: the kernel half for one command, with its supervisor.
//!
//! The command is a child that waits until tag and hooks are in force. The supervisor stays with
//! it as a shell would: it passes on what it is sent, stops and goes on with it, and ends with its
//! status. If the supervisor is killed, what is pinned goes on holding the command.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use tokio::signal::unix::{SignalKind, signal};

use super::confine::{Candidate, confine, launch_files};
use super::engine::{Cgroups, Engine, remove_cgroup};
use super::names::Names;
use super::witness::Denials;
use super::{
    DaemonError, end_witness, require_root, settings, sizes, standalone_pins, start_witness,
};
use crate::api::service::ServiceError;
use crate::api::types::Confine;
use crate::audit::{self, AuditLog};
use crate::config::Configuration;
use crate::datapath::{Datapath, Options, held_cgroups, uninstall};
use crate::grant::clock::Clock;
use crate::manifest::{assemble, parse_paths};

/// The first argument of the child that waits.
pub const LAUNCH: &str = "launch-when-told";

/// The command was not run, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error("{0}")]
    Refused(String),
    #[error("the command can not be started: {0}")]
    Start(io::Error),
    #[error("the command can not be waited for: {0}")]
    Wait(io::Error),
}

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Exited(u8),
    Killed(Signal),
}

/// Runs a command as a workload, held to the manifests' scopes, and waits for its end.
///
/// # Errors
///
/// Why it was not run.
pub fn exec_standalone(
    configuration: &Configuration,
    request: &Confine,
) -> Result<Ended, StandaloneError> {
    require_root()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| StandaloneError::Daemon(DaemonError::Runtime(error)))?;
    runtime.block_on(supervise(configuration, request))
}

async fn supervise(
    configuration: &Configuration,
    request: &Confine,
) -> Result<Ended, StandaloneError> {
    let own = std::process::id();
    let _cleared = clear_leftovers(configuration);
    let pins = standalone_pins(configuration, own);
    let cleared = Cleared(pins.clone());
    let datapath = Datapath::open(&Options {
        pin_directory: pins,
        sizes: sizes(configuration),
        settings: settings(configuration),
    })
    .map_err(DaemonError::from)?;
    let datapath = super::check_required(configuration.require, datapath)?;
    let cgroups = Cgroups::of(configuration).map_err(DaemonError::from)?;
    let node = configuration.node_name().map_err(DaemonError::from)?.to_string();
    let audit =
        AuditLog::open(audit_options(configuration, own), &node).map_err(DaemonError::from)?;
    super::record_start(&audit, &datapath);
    let names = Arc::new(Names::default());
    let clock = Clock::read().map_err(DaemonError::from)?;
    let mut engine =
        Engine::new(datapath, cgroups, audit.clone(), names, clock, PathBuf::from("/"));
    let denials = Arc::new(Denials::default());
    let stop = Arc::new(AtomicBool::new(false));
    let witness = start_witness(&engine, &audit, &denials, &stop)?;
    read_manifests(configuration, &mut engine);

    // Before the child is there, so that nothing it causes is missed.
    let mut signals = Signals::new().map_err(StandaloneError::Start)?;
    let mut child = Waiting::spawn(request)?;
    let identity = request.identity.clone().unwrap_or_else(|| {
        let name = request.executable.file_name().and_then(|name| name.to_str());
        let name = request.name.as_deref().or(name).unwrap_or("command");
        format!("spiffe://{}/user/0/{name}", configuration.trust_domain)
    });
    let candidate = Candidate { pid: child.pid(), uid: 0 };
    let launch = launch_files(&candidate, request);
    let confined =
        confine(&mut engine, &candidate, &identity, request, launch).map_err(|error| {
            StandaloneError::Refused(match &error {
                ServiceError::Invalid(errors) => errors.join("\n"),
                ServiceError::NotFound { .. }
                | ServiceError::Forbidden { .. }
                | ServiceError::Conflict { .. }
                | ServiceError::Unavailable { .. } => error.to_string(),
            })
        })?;
    child.tell().map_err(StandaloneError::Start)?;
    let ended = signals.until_end(&child, &mut engine).await;
    let left = end_rest(&engine, &confined.workload);
    let workload = engine.workloads().find(|found| found.name == confined.workload).map(|w| w.id);
    stop.store(true, Ordering::Release);
    end_witness(witness).await;
    engine.look_for_losses();
    summarize(&engine, &denials, left);
    if let Some(id) = workload {
        engine.remove(id);
    }
    // Others run there, or it is gone already.
    let _parent = fs::remove_dir(engine.exec_parent());
    if let Err(error) = audit.close().await {
        tracing::error!(%error, "the last audit records may not be written");
    }
    drop(engine);
    drop(cleared);
    ended
}

/// Scopes and grants of the manifest directory; what is wrong there is shown and left out.
fn read_manifests(configuration: &Configuration, engine: &mut Engine) {
    let directory = configuration.manifests_directory.to_path_buf();
    if !directory.exists() {
        return;
    }
    let (manifests, mut errors) = parse_paths(&[directory]);
    let (set, contradictions) = assemble(manifests);
    errors.extend(contradictions);
    for error in &errors {
        tracing::error!(%error, "a manifest is not valid and left out");
    }
    engine.apply_manifests(set, errors, Vec::new());
}

/// A chain of its own: two writers of one chain would break it.
fn audit_options(configuration: &Configuration, pid: u32) -> audit::Options {
    let mut options = configuration.audit.options();
    options.output = match options.output {
        audit::Output::Stdout => audit::Output::Stdout,
        audit::Output::File { path, limits } => {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let path = path.with_file_name(format!("{stem}-exec-{pid}.log"));
            audit::Output::File { path, limits }
        }
    };
    options
}

/// The child, before it runs the command.
struct Waiting {
    child: std::process::Child,
    go: Option<File>,
}

impl Waiting {
    fn spawn(request: &Confine) -> Result<Self, StandaloneError> {
        let start = |error: nix::Error| StandaloneError::Start(error.into());
        let (wait, go) = pipe2(OFlag::O_CLOEXEC).map_err(start)?;
        fcntl(&wait, FcntlArg::F_SETFD(FdFlag::empty())).map_err(start)?;
        let mut words = request.command.iter();
        let arg0 = words.next().map_or("", String::as_str);
        let child = Command::new("/proc/self/exe")
            .arg(LAUNCH)
            .arg(wait.as_raw_fd().to_string())
            .arg(&request.executable)
            .arg(arg0)
            .args(words)
            .spawn()
            .map_err(StandaloneError::Start)?;
        Ok(Self { child, go: Some(go.into()) })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn nix_pid(&self) -> Pid {
        // A pid of Linux is positive and fits.
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
    }

    /// Lets it run the command.
    fn tell(&mut self) -> io::Result<()> {
        match self.go.take() {
            Some(mut go) => go.write_all(b"g"),
            None => Ok(()),
        }
    }
}

impl Drop for Waiting {
    /// A child that was never told ends by itself when the pipe does.
    fn drop(&mut self) {
        if self.go.is_some() {
            // Before the pipe ends, so that it does not complain of what is told elsewhere.
            let _ended = self.child.kill();
            let _status = self.child.wait();
        }
    }
}

/// The child's part: waits until it is told, then becomes the command. Returns what kept it.
#[must_use]
pub fn launch(arguments: &[OsString]) -> String {
    let [descriptor, executable, arg0, rest @ ..] = arguments else {
        return "this is for agentguard itself; use agentguard exec".to_owned();
    };
    let path = Path::new("/proc/self/fd").join(descriptor);
    let mut told = [0];
    let read = File::open(path).and_then(|mut pipe| {
        if let Some(raw) = descriptor.to_str().and_then(|text| text.parse::<i32>().ok()) {
            nix::unistd::close(raw)?;
        }
        pipe.read_exact(&mut told)
    });
    match read {
        Ok(()) => {
            let error = Command::new(executable).arg0(arg0).args(rest).exec();
            format!("{}: {error}", Path::new(executable).display())
        }
        Err(_closed) => "the supervisor is gone before the command was held".to_owned(),
    }
}

/// What the supervisor is sent.
struct Signals {
    child: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
    stop: tokio::signal::unix::Signal,
    tick: tokio::time::Interval,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let mut tick = tokio::time::interval(super::TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Ok(Self {
            child: signal(SignalKind::child())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
            stop: signal(SignalKind::from_raw(Signal::SIGTSTP as i32))?,
            tick,
        })
    }

    /// Waits for the command's end. What the terminal sends reaches the command by itself, since
    /// it is of the same process group; what is sent to the supervisor alone is passed on.
    async fn until_end(
        &mut self,
        child: &Waiting,
        engine: &mut Engine,
    ) -> Result<Ended, StandaloneError> {
        let pid = child.nix_pid();
        loop {
            tokio::select! {
                _ = self.child.recv() => {}
                _ = self.tick.tick() => engine.tick(),
                _ = self.interrupt.recv() => {}
                _ = self.quit.recv() => {}
                _ = self.stop.recv() => {}
                _ = self.terminate.recv() => pass_on(pid, Signal::SIGTERM),
                _ = self.hangup.recv() => pass_on(pid, Signal::SIGHUP),
            }
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED;
            match waitpid(pid, Some(flags)) {
                Ok(WaitStatus::Exited(_, code)) => {
                    return Ok(Ended::Exited(u8::try_from(code).unwrap_or(u8::MAX)));
                }
                Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(Ended::Killed(signal)),
                Ok(WaitStatus::Stopped(_, _)) => {
                    // The shell sees its job stopped; when it goes on, so does the command.
                    pass_on(nix::unistd::getpid(), Signal::SIGSTOP);
                    pass_on(pid, Signal::SIGCONT);
                }
                Ok(_) => {}
                Err(error) => return Err(StandaloneError::Wait(error.into())),
            }
        }
    }
}

fn pass_on(pid: Pid, signal: Signal) {
    if let Err(error) = kill(pid, signal) {
        tracing::debug!(%error, %pid, %signal, "a signal was not passed on");
    }
}

/// Ends what the command left running: without the supervisor nothing would hold it. Returns how
/// many processes that were.
fn end_rest(engine: &Engine, workload: &str) -> usize {
    let Some(workload) = engine.workloads().find(|found| found.name == workload) else { return 0 };
    let pids = fs::read_to_string(workload.cgroup.join("cgroup.procs")).unwrap_or_default();
    let left = pids.lines().count();
    if left == 0 {
        return 0;
    }
    // Since 5.14; before, one by one.
    if fs::write(workload.cgroup.join("cgroup.kill"), "1").is_err() {
        for pid in pids.lines().filter_map(|pid| pid.parse().ok()) {
            pass_on(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    for _ in 0..100 {
        let events = fs::read_to_string(workload.cgroup.join("cgroup.events")).unwrap_or_default();
        if events.lines().any(|line| line == "populated 0") {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    left
}

/// What was denied, each once, for whoever ran the command.
fn summarize(engine: &Engine, denials: &Denials, left: usize) {
    let mut told: BTreeMap<String, usize> = BTreeMap::new();
    for line in super::service::describe_denials(engine, denials) {
        *told.entry(line).or_default() += 1;
    }
    let mut err = io::stderr().lock();
    // Where standard error is closed, nobody wants to know.
    if left > 0 {
        let _ = writeln!(
            err,
            "agentguard: {left} background processes of the command were ended with it"
        );
    }
    for (line, count) in told {
        let times = if count > 1 { format!(" ({count} times)") } else { String::new() };
        let _ = writeln!(err, "agentguard: {line}{times}");
    }
}

/// Takes away the protection of supervisors that were killed, where the command has ended too.
/// Returns of how many.
pub(super) fn clear_leftovers(configuration: &Configuration) -> usize {
    let pins: PathBuf = configuration.pin_directory.to_path_buf();
    let (Some(parent), Some(name), Ok(cgroups)) = (
        pins.parent(),
        pins.file_name().and_then(|name| name.to_str()),
        configuration.find_cgroup_parent(),
    ) else {
        return 0;
    };
    let prefix = format!("{name}-exec-");
    let is_alive = |pid: &str| Path::new("/proc").join(pid).exists();
    let mut cleared = 0;
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        if pid.is_none_or(is_alive) || !end_leftover(&entry.path(), &cgroups) {
            continue;
        }
        match uninstall(&entry.path()) {
            Ok(_builds) => cleared += 1,
            Err(error) => tracing::debug!(%error, "pins of a supervisor that was killed stay"),
        }
    }
    cleared
}

/// Removes the cgroups that the pins hold; false while one of them has processes.
fn end_leftover(pins: &Path, cgroups: &Path) -> bool {
    let held = held_cgroups(pins);
    let found = fs::read_dir(cgroups).into_iter().flatten().flatten();
    let left: Vec<PathBuf> = found
        .filter(|entry| entry.metadata().is_ok_and(|entry| held.contains(&entry.ino())))
        .map(|entry| entry.path())
        .collect();
    left.iter().all(|path| remove_cgroup(path).is_ok())
}

/// The supervisor's own pins, gone with it.
struct Cleared(PathBuf);

impl Drop for Cleared {
    fn drop(&mut self) {
        if let Err(error) = uninstall(&self.0) {
            tracing::error!(%error, "pins stay");
        }
    }
}
