//! Parts of an attack that run in a process of their own, because a guard may kill it.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork, getppid, pipe2},
};

use crate::outcome::{Attempt, Failure};

/// How long a child may take: what it waits for itself, and what a busy machine takes to start it.
const LIFETIME: Duration = Duration::from_secs(20);
/// How long a process may take to end that has nothing more to do.
const END: Duration = Duration::from_secs(10);

/// How a child ended.
pub(crate) struct End {
    /// What it said; nothing when it was killed, or ran another program.
    pub(crate) attempt: Option<Attempt>,
    pub(crate) status: WaitStatus,
}

/// Runs `body` in a child and gives what it says; a killed child was refused.
pub(crate) fn in_child(body: impl FnOnce() -> Attempt) -> Attempt {
    match run(body)? {
        End { attempt: Some(attempt), .. } => attempt,
        End { attempt: None, status } => Err(unspoken(status)),
    }
}

/// Runs `body` in a child.
pub(crate) fn run(body: impl FnOnce() -> Attempt) -> Result<End, Failure> {
    let (reader, writer) = channel()?;
    // SAFETY: this process has one thread, so the child may do what this one may.
    match unsafe { fork() }.map_err(|errno| Failure::setup("fork", errno))? {
        ForkResult::Child => {
            drop(reader);
            speak(writer, body)
        }
        ForkResult::Parent { child } => {
            drop(writer);
            listen(reader, child)
        }
    }
}

/// Runs `body` in a grandchild whose parent is gone, so that it hangs below init.
pub(crate) fn in_orphan(body: impl FnOnce() -> Attempt) -> Attempt {
    let (reader, writer) = channel()?;
    // SAFETY: this process has one thread, so the child may do what this one may.
    match unsafe { fork() }.map_err(|errno| Failure::setup("fork", errno))? {
        ForkResult::Child => {
            drop(reader);
            let middle = nix::unistd::getpid();
            // SAFETY: as above; the child of a fork has one thread too.
            match unsafe { fork() } {
                Ok(ForkResult::Child) => speak(writer, || {
                    let deadline = Instant::now() + END;
                    while getppid() == middle {
                        if Instant::now() > deadline {
                            return Err(Failure::unfit("the parent did not go away"));
                        }
                        thread::sleep(Duration::from_millis(1));
                    }
                    body()
                }),
                Ok(ForkResult::Parent { .. }) => exit(0),
                Err(_) => exit(2),
            }
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let middle = reap(child, Instant::now() + END)?;
            let said = read_within(reader, LIFETIME)?;
            match (said, middle) {
                (Some(attempt), _) => attempt,
                // Panics are caught and said, so only a signal ends an orphan without a word.
                (None, WaitStatus::Exited(_, 0)) => {
                    Err(Failure::refused("the orphan was killed before it could say anything"))
                }
                (None, status) => Err(unspoken(status)),
            }
        }
    }
}

/// The parent's half: hears what `child` says and how it ends.
pub(crate) fn listen(reader: OwnedFd, child: Pid) -> Result<End, Failure> {
    let deadline = Instant::now() + LIFETIME;
    let attempt = read_within(reader, LIFETIME);
    let status = reap(child, deadline)?;
    Ok(End { attempt: attempt?, status })
}

/// The child's half: runs `body`, says what came of it, and ends.
pub(crate) fn speak(writer: OwnedFd, body: impl FnOnce() -> Attempt) -> ! {
    let attempt = catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|_| Err(Failure::unfit("the child panicked")));
    let said = serde_json::to_vec(&attempt)
        .map_err(io::Error::from)
        .and_then(|text| File::from(writer).write_all(&text));
    exit(if said.is_ok() { 0 } else { 2 })
}

/// Both ends of a pipe; the end a child writes to closes when it runs another program.
pub(crate) fn channel() -> Result<(OwnedFd, OwnedFd), Failure> {
    pipe2(OFlag::O_CLOEXEC).map_err(|errno| Failure::setup("pipe", errno))
}

/// A child that ended without a word.
pub(crate) fn unspoken(status: WaitStatus) -> Failure {
    if let WaitStatus::Signaled(_, Signal::SIGKILL, _) = status {
        Failure::refused("killed by SIGKILL")
    } else {
        Failure::unfit(format!("the child ended without a word: {status:?}"))
    }
}

fn exit(status: i32) -> ! {
    // SAFETY: `_exit` takes any number and only ends the process.
    unsafe { libc::_exit(status) }
}

fn read_within(reader: OwnedFd, patience: Duration) -> Result<Option<Attempt>, Failure> {
    let deadline = Instant::now() + patience;
    let mut text = Vec::new();
    let mut file = File::from(reader);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let ready = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], timeout)
            .map_err(|errno| Failure::setup("poll", errno))?;
        if ready == 0 {
            return Err(Failure::unfit("the child took too long"));
        }
        let mut buffer = [0; 4096];
        match file.read(&mut buffer) {
            Ok(0) if text.is_empty() => return Ok(None),
            Ok(0) => {
                return serde_json::from_slice(&text)
                    .map(Some)
                    .map_err(|error| Failure::unfit(format!("the child's words: {error}")));
            }
            Ok(length) => text.extend_from_slice(&buffer[..length]),
            Err(error) => return Err(Failure::setup("read from the child", error)),
        }
    }
}

/// Waits for `child` until `deadline`, then ends it.
fn reap(child: Pid, deadline: Instant) -> Result<WaitStatus, Failure> {
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {}
            Ok(status) => return Ok(status),
            Err(errno) => return Err(Failure::setup("wait for the child", errno)),
        }
        if Instant::now() > deadline {
            // The child is ours and not yet waited for, so its pid is not another's.
            kill(child, Signal::SIGKILL).map_err(|errno| Failure::setup("kill", errno))?;
            waitpid(child, None).map_err(|errno| Failure::setup("wait for the child", errno))?;
            return Err(Failure::unfit("the child took too long and was ended"));
        }
        thread::sleep(Duration::from_millis(1));
    }
}
