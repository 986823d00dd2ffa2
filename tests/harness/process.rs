//! Commands that end: each within a bound, with its output, leaving no process of its group.

use std::{
    env,
    fs::{self, File},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// What a command left.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// Whether `SIGKILL` ended it, or ended what it ran in its place and reports on.
    #[must_use]
    pub fn was_killed(&self) -> bool {
        let kill = Signal::SIGKILL as i32;
        self.status.signal() == Some(kill) || self.status.code() == Some(128 + kill)
    }

    /// Panics with the output unless the command succeeded.
    #[track_caller]
    pub fn expect_success(self, what: &str) -> Self {
        assert!(self.status.success(), "{what}: {self:?}");
        self
    }
}

/// Runs `command` to its end.
///
/// # Panics
///
/// When it cannot be started, or is still running after `patience`; it is ended then.
#[track_caller]
pub fn run(command: &mut Command, patience: Duration) -> Finished {
    let mut running = Running::start(command);
    running.wait(patience).unwrap_or_else(|| {
        panic!("{command:?} is still running after {patience:?}; it said {}", running.stdout())
    })
}

/// A command that runs; dropped, its whole process group ends.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: File,
    stderr: File,
    reaped: bool,
}

impl Running {
    /// Starts `command` in a process group of its own.
    ///
    /// # Panics
    ///
    /// When it cannot be started.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        // Files, not pipes: a descendant that holds on to its output blocks nobody.
        let [stdout, stderr] = [(); 2].map(|()| tempfile::tempfile().expect("a temporary file"));
        let [out, err] = [&stdout, &stderr].map(|file| file.try_clone().expect("a descriptor"));
        let child = command
            .stdout(Stdio::from(out))
            .stderr(Stdio::from(err))
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        Self { child, stdout, stderr, reaped: false }
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end; `None` when there is none within `patience`.
    pub fn wait(&mut self, patience: Duration) -> Option<Finished> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                self.reaped = true;
                return Some(Finished { status, stdout: self.stdout(), stderr: self.stderr() });
            }
            if Instant::now() > deadline {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it has written to standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        contents(&self.stdout)
    }

    /// What it has written to standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        contents(&self.stderr)
    }

    /// Shows the last lines that it has written to standard error, where a test fails by a panic.
    pub(crate) fn show_if_panicking(&self, name: &str) {
        if thread::panicking() {
            let said = self.stderr();
            let last: Vec<_> = said.lines().rev().take(40).collect();
            eprintln!("{name} said at last:");
            last.iter().rev().for_each(|line| eprintln!("  {line}"));
        }
    }

    /// Waits until a line of its output begins with `word`, and gives the rest of that line.
    ///
    /// # Panics
    ///
    /// When there is none within `patience`.
    #[track_caller]
    pub fn said(&self, word: &str, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        loop {
            let output = self.stdout();
            if let Some(rest) = output
                .split_inclusive('\n')
                .filter(|line| line.ends_with('\n'))
                .find_map(|line| line.strip_prefix(word))
            {
                return rest.trim().to_owned();
            }
            assert!(
                Instant::now() < deadline,
                "no {word:?} within {patience:?}: {output} {}",
                self.stderr()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the process, and only it, without a chance to clean up.
    pub fn kill(&mut self) {
        if !self.reaped {
            self.child.kill().expect("a child that was not waited for can be killed");
            self.child.wait().expect("a child can be waited for");
            self.reaped = true;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            let group = Pid::from_raw(self.child.id().cast_signed());
            // The leader is not waited for yet, so the group is still ours.
            if let Err(errno) = killpg(group, Signal::SIGKILL) {
                eprintln!("process group {group} is left behind: {errno}");
            }
            if let Err(error) = self.child.wait() {
                eprintln!("process {group} is left behind: {error}");
            }
        }
    }
}

/// Reads from the start without moving the position at which the child writes.
fn contents(file: &File) -> String {
    use std::os::unix::fs::FileExt;
    let mut bytes = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        let read = file.read_at(&mut buffer, bytes.len() as u64).expect("a temporary file reads");
        if read == 0 {
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        bytes.extend_from_slice(&buffer[..read]);
    }
}

/// The one child of a process, if it has one.
#[must_use]
pub fn child_of(pid: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.trim().parse().ok()
}

/// The attack program.
///
/// # Panics
///
/// When it was not built.
#[must_use]
pub fn attack_binary() -> PathBuf {
    binary("agentguard-attack", "AGENTGUARD_ATTACK_BIN")
}

/// A program of this workspace: from the environment, or from where this test was built.
///
/// # Panics
///
/// When it was not built.
pub(crate) fn binary(name: &str, variable: &str) -> PathBuf {
    let path = env::var_os(variable).map_or_else(
        || {
            let test = env::current_exe().expect("the path of this test");
            // target/<profile>/deps/<test>
            let directory = test.ancestors().nth(2).expect("a test lies two directories deep");
            directory.join(name)
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is missing; build {name} or set {variable}", path.display());
    path
}
