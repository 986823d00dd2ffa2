//! What a container runtime has its child do in a workload's cgroup is not the workload's doing, up
//! to the first program that runs there.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{
            fs::PermissionsExt as _,
            process::{CommandExt as _, ExitStatusExt as _},
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    thread,
};

use agentguard_common::{FileId, IdentityId, Mode, Tag, Verdict};
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
    run_in_once(cgroup, program, arguments, || ())
}

/// The same, once something was done behind its move.
fn run_in_once(
    cgroup: &Path,
    program: &Path,
    arguments: &[&str],
    behind: impl FnOnce() + Send + 'static,
) -> String {
    let (mut born, told_pid) = io::pipe().unwrap();
    let (may_go, mut go) = io::pipe().unwrap();
    let cgroup = cgroup.to_owned();
    let runtime = thread::spawn(move || {
        let mut pid = [0; 4];
        born.read_exact(&mut pid).unwrap();
        move_to(&cgroup, u32::from_ne_bytes(pid));
        behind();
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
}

/// A pod in which this program is what runs containers.
fn pod() -> Fixture {
    let mut fixture = Fixture::new();
    fixture.attach(Mode::Enforce, &[]);
    fixture.retag(Tag::starting_containers);
    fixture.datapath.set_runtimes(&this_program()).unwrap();
    fixture
}

const TRUE: &str = "/bin/true";

/// A task is in its new cgroup a moment before the kernel tells of it (`cgroup_attach_task`), and a runtime's
/// child may be as far as to run its copy then.
#[test]
fn a_runtimes_child_that_runs_something_before_its_move_is_told_is_known_for_one() {
    let mut fixture = pod();
    let (refused, hook) = fixture.refused_exec();
    let run = |fixture: &Fixture, name: &str, program: &Path, arguments: &[&str]| {
        let (cgroup, tasks) = (fixture.below(name), fixture.tasks());
        run_in_once(&cgroup, program, arguments, move || tasks.forget())
    };
    let (copy, shell) = (Unnamed::copy(TRUE), Unnamed::copy("/bin/sh"));
    assert_eq!(run(&fixture, "copy", &copy.path(), &[]), "ok");
    // What the copy runs starts the container, and what that runs does not.
    let starts = format!("exec {TRUE}");
    assert_eq!(run(&fixture, "starts", &shell.path(), &["-c", &starts]), "ok");
    assert_eq!(run(&fixture, "start", Path::new(TRUE), &[]), "ok");
    let counted: Vec<_> = fixture.counters().iter().collect();
    assert_eq!(counted, [(hook, Mode::Enforce, Verdict::Allow, 2)]);
    let twice = format!("exec {}", copy.path().display());
    assert_ne!(run(&fixture, "twice", &shell.path(), &["-c", &twice]), "ok");

    fixture.datapath.set_runtimes(&BTreeSet::new()).unwrap();
    assert_eq!(
        run(&fixture, "other", &copy.path(), &[]),
        refused,
        "of a program that is no runtime"
    );
}

#[test]
fn what_a_container_starts_with_runs_once_in_each_cgroup_that_the_host_makes_below_a_pods() {
    let mut fixture = pod();
    let named = Path::new(TRUE);
    let (refused, hook) = fixture.refused_exec();

    let one = fixture.below("one");
    assert_eq!(run_in(&one, named, &[]), "ok");
    let counted: Vec<_> = fixture.counters().iter().collect();
    assert_eq!(counted, [(hook, Mode::Enforce, Verdict::Allow, 1)]);
    assert_eq!(run_in(&one, named, &[]), refused, "what enters a container does not start it");
    assert_eq!(run_in(&fixture.cgroup, named, &[]), refused, "the pod's own cgroup");

    let other = fixture.below("other");
    fixture.datapath.set_runtimes(&BTreeSet::new()).unwrap();
    assert_eq!(run_in(&other, named, &[]), refused, "of a program that is no runtime");
    fixture.datapath.set_runtimes(&this_program()).unwrap();
    assert_eq!(run_in(&other, named, &[]), "ok", "which was not its start");

    let mut worker = fixture.worker();
    let own = fixture.cgroup.join("own");
    assert_eq!(worker.told(&format!("mkdir {}", own.display())), "ok");
    assert_eq!(run_in(&own, named, &[]), refused, "of a cgroup that the workload made");

    let (shell, copy) = (Unnamed::copy("/bin/sh"), Unnamed::copy(TRUE));
    let started = format!("exec {}", copy.path().display());
    let unnamed = fixture.below("unnamed");
    assert_ne!(run_in(&unnamed, &shell.path(), &["-c", &started]), "ok", "what has no name");

    let nobody = fixture.below("nobody-known");
    fixture.retag(|mut tag| {
        tag.identity = IdentityId::NONE;
        tag
    });
    // Not the program from above, whose verdict is still remembered for this generation.
    let refused_too = run_in(&nobody, Path::new("/bin/echo"), &[]);
    assert_eq!(refused_too, refused, "while it is not known who it is");
}

#[test]
fn what_was_made_or_started_before_the_pod_is_held_is_known() {
    let mut fixture = Fixture::new();
    fixture.datapath.set_runtimes(&this_program()).unwrap();
    let named = Path::new(TRUE);
    let made = fixture.below("made");
    let started = fixture.below("started");
    assert_eq!(run_in(&started, named, &[]), "ok", "nobody's");
    fixture.attach(Mode::Enforce, &[]);
    fixture.retag(Tag::starting_containers);
    assert_eq!(run_in(&made, named, &[]), "ok");
    let refused = fixture.refused_exec().0;
    assert_eq!(run_in(&made, named, &[]), refused, "it was started");
    // Not the program from above, whose verdict is still remembered for this generation.
    assert_eq!(run_in(&started, Path::new("/bin/echo"), &[]), refused, "it was started before");
}

#[test]
fn nothing_is_started_below_what_is_no_pod() {
    let mut fixture = Fixture::new();
    fixture.attach(Mode::Enforce, &[]);
    fixture.datapath.set_runtimes(&this_program()).unwrap();
    let below = fixture.below("below");
    assert_eq!(run_in(&below, Path::new(TRUE), &[]), fixture.refused_exec().0);
}

#[test]
fn a_runtime_may_start_a_container_by_a_copy_of_itself_and_its_child() {
    let fixture = pod();
    let shell = Unnamed::copy("/bin/sh");
    let shell = shell.path();
    for (name, script, outcome) in [
        ("itself", format!("exec {TRUE}"), "ok"),
        ("child", format!("{TRUE} && exit 0; exit 1"), "ok"),
        ("twice", format!("{TRUE} && {TRUE} && exit 0; exit 1"), "failed"),
        ("sibling", format!("{TRUE}; {TRUE} && exit 0; exit 1"), "failed"),
    ] {
        let below = fixture.below(name);
        assert_eq!(run_in(&below, &shell, &["-c", &script]), outcome, "{name}");
    }
}

#[test]
fn a_container_may_start_with_a_script_which_may_run_nothing_else() {
    let fixture = pod();
    for (name, line, outcome) in [
        ("script", "exit 0", "ok"),
        ("its-program", "/bin/true && exit 0; exit 1", "failed"),
        ("its-successor", "exec /bin/true", fixture.refused_exec().0),
    ] {
        let script = env::temp_dir().join(format!("agentguard-{}-{name}", std::process::id()));
        fs::write(&script, format!("#!/bin/sh\n{line}\n")).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let outcome = match outcome {
            // The shell itself says so, and ends.
            "EPERM" => "failed",
            outcome => outcome,
        };
        assert_eq!(run_in(&fixture.below(name), &script, &[]), outcome, "{name}");
        fs::remove_file(&script).unwrap();
    }
}
