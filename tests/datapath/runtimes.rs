//! What a container runtime has its child do in a workload's cgroup is not the workload's doing, up
//! to the first program that runs there.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    thread,
};

use agentguard_common::{FileId, Mode};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::fixture::{Fixture, move_to, running};

/// A copy of a program that has no name, as `runc` makes one of itself.
struct Unnamed(OwnedFd);

impl Unnamed {
    fn copy(program: &str) -> Self {
        let descriptor = memfd_create(c"copy", MFdFlags::empty()).unwrap();
        let mut file = fs::File::from(descriptor);
        file.write_all(&fs::read(program).unwrap()).unwrap();
        Self(file.into())
    }

    /// As a process that has inherited it names it.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// Runs a program in a child that is put into a cgroup between its birth and its exec; how it ends.
fn run_in(cgroup: &Path, program: &Path, arguments: &[&str]) -> String {
    let (mut born, told_pid) = io::pipe().unwrap();
    let (may_go, mut go) = io::pipe().unwrap();
    let cgroup = cgroup.to_owned();
    let runtime = thread::spawn(move || {
        let mut pid = [0; 4];
        born.read_exact(&mut pid).unwrap();
        move_to(&cgroup, u32::from_ne_bytes(pid));
        go.write_all(b".").unwrap();
    });
    let mut command = Command::new(program);
    command.args(arguments);
    let wait = move || {
        let pid = nix::unistd::getpid().as_raw().to_ne_bytes();
        nix::unistd::write(&told_pid, &pid)?;
        let mut byte = [0];
        nix::unistd::read(&may_go, &mut byte)?;
        Ok(())
    };
    // SAFETY: system calls only, on descriptors and memory of the child's own.
    unsafe { command.pre_exec(wait) };
    let outcome = command.status();
    runtime.join().unwrap();
    match outcome.map(|status: ExitStatus| (status.signal(), status.success())) {
        Ok((Some(libc::SIGKILL), _)) => "killed".to_owned(),
        Ok((_, true)) => "ok".to_owned(),
        Ok(_) => "failed".to_owned(),
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => "EPERM".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn this_program() -> BTreeSet<FileId> {
    running(&env::current_exe().unwrap()).executables.into_iter().collect()
}

#[test]
fn a_runtimes_copy_of_itself_passes_and_nothing_else_does() {
    let mut fixture = Fixture::new();
    let cgroup = fixture.cgroup.clone();
    let copy = Unnamed::copy("/bin/true");
    let shell = Unnamed::copy("/bin/sh");
    let named = Path::new("/bin/true");
    let refused = fixture.refused_exec().0;
    fixture.attach(Mode::Enforce, &[]);

    assert_eq!(run_in(&cgroup, &copy.path(), &[]), refused, "of a program that is no runtime");

    fixture.datapath.set_runtimes(&this_program()).unwrap();
    assert_eq!(run_in(&cgroup, &copy.path(), &[]), "ok");
    assert_eq!(run_in(&cgroup, named, &[]), refused, "what has a name is what the agent will be");
    // But for the runtime's own file, which it runs where it needs no copy.
    let itself: BTreeSet<FileId> =
        this_program().into_iter().chain(running(named).executables).collect();
    fixture.datapath.set_runtimes(&itself).unwrap();
    assert_eq!(run_in(&cgroup, named, &[]), "ok");
    let not_once_more = format!("exec {}", named.display());
    assert_ne!(run_in(&cgroup, &shell.path(), &["-c", &not_once_more]), "ok");
    fixture.datapath.set_runtimes(&this_program()).unwrap();
    // Once it has run something it is the workload's: neither its own next program nor its child's
    // passes.
    let again = format!("exec {}", copy.path().display());
    assert_ne!(run_in(&cgroup, &shell.path(), &["-c", &again]), "ok");
    let child = format!("{} && exit 0; exit 1", copy.path().display());
    assert_ne!(run_in(&cgroup, &shell.path(), &["-c", &child]), "ok");
    assert_eq!(run_in(&cgroup, &shell.path(), &["-c", "exit 0"]), "ok", "the shell itself runs");

    fixture.datapath.set_runtimes(&BTreeSet::new()).unwrap();
    assert_eq!(run_in(&cgroup, &copy.path(), &[]), refused, "once it is no runtime any more");
}

#[test]
fn what_a_runtime_was_granted_before_is_still_granted() {
    let mut fixture = Fixture::new();
    let cgroup = fixture.cgroup.clone();
    fixture.attach(Mode::Enforce, &[running(Path::new("/bin/echo"))]);
    fixture.datapath.set_runtimes(&this_program()).unwrap();
    // Not the program of the test above: where machines share pins, its verdict may be remembered.
    assert_eq!(run_in(&cgroup, Path::new("/bin/echo"), &[]), "ok");
    fixture.datapath.set_runtimes(&BTreeSet::new()).unwrap();
}
