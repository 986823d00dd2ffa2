//! `execve(2)`: before the point of no return where the BPF LSM is active, else at the point where
//! the new program is in place and has not run yet.

use agentguard_common::event::{Hook, PATH_BYTES};
use agentguard_common::{Action, FileId, Naming, WorkloadId};
use aya_ebpf::helpers::generated::bpf_probe_read_kernel_str;
use aya_ebpf::programs::{BtfTracePointContext, LsmContext};

use crate::cgroup;
use crate::judge::{Execs, Inquiry, judge_from};
use crate::kernel::{self, Program};
use crate::maps::{self, Stage};
use crate::record::Origin;

/// Arguments of the tracepoint: task, old pid, `struct linux_binprm`.
#[inline(always)]
pub(crate) fn exec(ctx: &BtfTracePointContext) -> Action {
    // Both its hooks are called where this one may not be: see `cgroup::first_wakeup`.
    if kernel::exec_is_judged_by_lsm() {
        return Action::Pass;
    }
    let task = kernel::current_task();
    let program = Program(ctx.arg(2));
    let Some(Begun { workload, stage, file, naming }) = begun(task, &program) else {
        return Action::Pass;
    };
    let naming = naming_of_start(task, stage, workload, naming);
    let inquiry = Inquiry::exec(Hook::Exec, &file, naming);
    let action = judge_from::<Execs>(&inquiry, workload, &Origin::Exec { path: program.path() }, 0);
    maps::settle(task);
    action
}

/// Argument of the LSM hook: `struct linux_binprm`. The file is the one that [`check`] was asked about
/// last, and there is no way back.
#[inline(always)]
pub(crate) fn committed(ctx: &LsmContext) {
    let task = kernel::current_task();
    let Some(Begun { stage, .. }) = begun(task, &Program(ctx.arg(0))) else { return };
    // Where it was nobody's when the check was asked, its start was not noted.
    let _was_first = stage != Stage::NONE && maps::is_first_start(kernel::current_cgroup());
    maps::settle(task);
}

/// What the calling task has begun to run as a workload's.
struct Begun {
    workload: WorkloadId,
    stage: Stage,
    file: FileId,
    naming: Naming,
}

/// Keeps account of the program that the calling task is to run from now on. `None`: it is no workload's,
/// or a container runtime's own step.
#[inline(always)]
fn begun(task: u64, program: &Program) -> Option<Begun> {
    let by_descent = cgroup::by_descent(task);
    let Some(workload) = caller(by_descent) else {
        note_runtimes_step(task, program);
        return None;
    };
    let stage = cgroup::stage(task, workload, by_descent);
    let (file, naming) = program.file();
    remember(task, workload, program, file);
    if is_runtimes_step(stage, file, naming) {
        maps::set_stage(task, Stage::PREPARED);
        return None;
    }
    Some(Begun { workload, stage, file, naming })
}

/// Whether it is a container runtime that runs a copy of itself, in the cgroup it has just put its
/// child into: one without a name or, by a mount that only it has, its very file (`try_bindfd`,
/// libcontainer/nsenter). Nothing that the workload made has run in that task.
#[inline(always)]
fn is_runtimes_step(stage: Stage, file: FileId, naming: Naming) -> bool {
    stage == Stage::ENTERED
        && match naming {
            Naming::Unnamed => true,
            Naming::Named | Naming::Starting => maps::is_runtime(&FileId { generation: 0, ..file }),
        }
}

/// Keeps account of what a container runtime does in a cgroup that is nobody's yet. The daemon may hear
/// of its pod at any moment, and from then on only a container that was not started is.
#[inline(always)]
fn note_runtimes_step(task: u64, program: &Program) {
    let stage = maps::stage(task);
    if stage == Stage::NONE {
        return;
    }
    let (file, naming) = program.file();
    if is_runtimes_step(stage, file, naming) {
        maps::set_stage(task, Stage::PREPARED);
    } else {
        maps::settle(task);
        let _was_first = maps::is_first_start(kernel::current_cgroup());
    }
}

/// How the file has its name where a container runtime is about to run what starts a container: the
/// first program with a name that it runs in a cgroup which the host has made below a pod's. What is
/// started is in the pod's specification and the image, of which the kernel knows nothing; that a
/// container is started, and not entered, is what it can tell.
#[inline(always)]
fn naming_of_start(task: u64, stage: Stage, workload: WorkloadId, naming: Naming) -> Naming {
    if stage == Stage::NONE {
        return naming;
    }
    if stage != Stage::STARTING {
        // Whatever it runs, and whether it may: it is started by that.
        let is_first = maps::is_first_start(kernel::current_cgroup());
        if !is_first || !maps::tag(workload).is_some_and(|tag| tag.starts_containers()) {
            return naming;
        }
        // For the interpreter of a script, which is asked about next.
        maps::set_stage(task, Stage::STARTING);
    }
    match naming {
        Naming::Named | Naming::Starting => Naming::Starting,
        Naming::Unnamed => Naming::Unnamed,
    }
}

/// Argument of the LSM hook: `struct linux_binprm`. It is asked about the file that was named and
/// then, where that is a script, about each interpreter in turn; all of it must be granted.
#[inline(always)]
pub(crate) fn check(ctx: &LsmContext) -> Action {
    let task = kernel::current_task();
    let by_descent = cgroup::by_descent(task);
    let Some(workload) = caller(by_descent) else {
        return Action::Pass;
    };
    let stage = cgroup::stage(task, workload, by_descent);
    let program = Program(ctx.arg(0));
    let (file, naming) = program.file();
    if is_runtimes_step(stage, file, naming) {
        return Action::Pass;
    }
    let naming = naming_of_start(task, stage, workload, naming);
    let inquiry = Inquiry::exec(Hook::BprmCheck, &file, naming);
    judge_from::<Execs>(&inquiry, workload, &Origin::Exec { path: program.interpreter() }, 0)
}

/// The workload of the calling task. A thread that was not the leader takes the leader's place when
/// it runs a program, and may not be tied itself.
#[inline(always)]
fn caller(by_descent: Option<WorkloadId>) -> Option<WorkloadId> {
    let by_move = || maps::moved(kernel::current_tgid()).map(|moved| moved.workload);
    maps::member(kernel::current_cgroup()).or(by_descent).or_else(by_move)
}

/// Keeps the process for the records of its descendants.
#[inline(always)]
fn remember(task: u64, workload: WorkloadId, program: &Program, file: FileId) {
    let tgid = kernel::current_tgid();
    if maps::process(tgid).is_none() {
        maps::remember_new(tgid);
    }
    let Some(process) = maps::process(tgid) else { return };
    process.start = kernel::start_of(task);
    process.parent = kernel::parent_of(task);
    process.workload = workload;
    process.file = file;
    // SAFETY: the path is a string in kernel memory; the helper bounds and terminates the copy.
    unsafe {
        bpf_probe_read_kernel_str(
            process.path.as_mut_ptr().cast(),
            PATH_BYTES as u32,
            program.path().cast(),
        );
    }
}
