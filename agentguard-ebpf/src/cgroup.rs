//! Who belongs to a workload: cgroups by birth, tasks by descent, and what happens to those that
//! leave.

use agentguard_common::event::Hook;
use agentguard_common::{Action, CgroupId, Mover, WorkloadId};
use aya_ebpf::programs::BtfTracePointContext;

use crate::diagnostics::{self, Full};
use crate::judge::{Inquiry, Others, judge_from, judge_without_room};
use crate::kernel::{self, Cgroup, Task};
use crate::maps::{self, Stage};
use crate::record::Origin;

/// A child cgroup is born with its parent's tag, before it is visible and can hold a process.
#[inline(always)]
pub(crate) fn mkdir(ctx: &BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's first argument is the new cgroup.
    let cgroup = unsafe { Cgroup::new(ctx.arg::<*const core::ffi::c_void>(0)) };
    if !cgroup.is_v2() {
        return 0;
    }
    let Some(parent) = cgroup.parent() else { return 0 };
    let Some(workload) = maps::member(parent.id()) else {
        // It may be below a pod's of which the daemon has not heard yet.
        if kernel::current_program().is_some_and(|program| maps::is_runtime(&program)) {
            maps::born(cgroup.id());
        }
        return 0;
    };
    let maker = mover();
    if maps::adopt(cgroup.id(), workload) {
        match maker {
            Mover::Host => maps::born(cgroup.id()),
            Mover::Workload => {}
        }
        return 0;
    }
    diagnostics::full(Full::Cgroups, cgroup.id().0);
    // A workload that makes cgroups until the table is full does not get one outside. The host
    // that makes one has done nothing wrong: the hooks above hold what comes into it.
    match (judge_without_room(cgroup.id(), workload, &Origin::Caller), maker) {
        (Action::Refuse, Mover::Workload) => kernel::kill_current(),
        (Action::Refuse, Mover::Host) | (Action::Pass, _) => 0,
    }
}

#[inline(always)]
pub(crate) fn rmdir(ctx: &BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's first argument is the cgroup.
    let cgroup = unsafe { Cgroup::new(ctx.arg::<*const core::ffi::c_void>(0)) };
    if cgroup.is_v2() {
        maps::forget(cgroup.id());
    }
    0
}

/// The workload of the task at this address by descent: its own, or its process's. The threads of
/// a process that ran before its cgroup was captured are not tied themselves.
#[inline(always)]
pub(crate) fn by_descent(task: u64) -> Option<WorkloadId> {
    maps::task(task).or_else(|| maps::task(kernel::leader_of(task)))
}

/// A child belongs where its parent belongs. One that is born in a foreign cgroup
/// (`CLONE_INTO_CGROUP`) is judged as if it had been moved there.
#[inline(always)]
pub(crate) fn fork(ctx: &BtfTracePointContext) -> i32 {
    born(Task(ctx.arg(1)), false)
}

/// A child is about to run for the first time: where [`fork`] was not asked, its birth is judged here.
///
/// A kernel whose tracepoints may be preempted (7.0 on) does not call a program for a task while another
/// that it preempted is in the same one on that CPU (`prog->active`, `__bpf_trace_run`). This tracepoint is
/// called with the run queue locked (`wake_up_new_task`), so that nobody is ever preempted here.
#[inline(always)]
pub(crate) fn first_wakeup(ctx: &BtfTracePointContext) -> i32 {
    let child = Task(ctx.arg(0));
    // For a thread its process's first one speaks. Kernels that may not write here preempt nobody in a tracepoint.
    if !kernel::may_write_under_locks()
        || child.tgid() == kernel::current_tgid()
        || maps::task(child.address()).is_some()
    {
        return 0;
    }
    born(child, true)
}

/// The calling task has made a child, which has not run yet. `again`: it may have been judged before.
#[inline(always)]
fn born(child: Task, again: bool) -> i32 {
    let parent = kernel::current_task();
    let parents_cgroup = kernel::current_cgroup();
    // A number and not an `Option`: out of one the compiler would keep what is not there.
    let mut workload = by_descent(parent).unwrap_or(WorkloadId::NONE);
    // Where it gives way, the parent's cgroup may be another's by now, and not the child's alone.
    if (workload == WorkloadId::NONE || maps::gives_way(workload))
        && let Some(holder) = maps::member(parents_cgroup)
    {
        workload = holder;
    }
    let is_thread = child.tgid() == kernel::current_tgid();
    if workload == WorkloadId::NONE {
        // Of one that was at its address before.
        maps::untie(child.address());
        let cgroup = child.cgroup();
        if cgroup != parents_cgroup && maps::member(cgroup).is_some() {
            entered(child);
        } else if !is_thread {
            hand_down_stage(parent, child);
        }
        return 0;
    }
    if again && maps::found_no_room(child.address(), child.start()) {
        return 0;
    }
    if !maps::tie(child.address(), workload) {
        maps::note_no_room(child.address(), child.start());
        return without_room(Full::Tasks, child, child.cgroup(), workload);
    }
    if is_thread {
        return 0;
    }
    hand_down_stage(parent, child);
    maps::inherit_process(kernel::current_tgid(), child.tgid(), child.start());
    let cgroup = child.cgroup();
    if maps::member(cgroup) == Some(workload) {
        return 0;
    }
    if let Some(moved) = maps::moved(kernel::current_tgid())
        && moved.cgroup == cgroup.0
    {
        // The parent was moved here by the host, and the child follows.
        if !maps::follow(child.tgid(), cgroup, workload) {
            without_room(Full::Moved, child, cgroup, workload);
        }
        return 0;
    }
    leave(child, cgroup, workload, Mover::Workload);
    0
}

/// Arguments of the tracepoint: cgroup, path, task, whether the whole process moves.
#[inline(always)]
pub(crate) fn attach_task(ctx: &BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's first argument is the cgroup.
    let cgroup = unsafe { Cgroup::new(ctx.arg::<*const core::ffi::c_void>(0)) };
    if !cgroup.is_v2() {
        return 0;
    }
    let task = Task(ctx.arg(2));
    let destination = maps::member(cgroup.id());
    // One that found no room among the tasks may have found it here.
    let by_move = || maps::moved(task.tgid()).map(|moved| moved.workload);
    let origin = match by_descent(task.address()).or_else(by_move) {
        // As the daemon ties it to the workload whose the cgroup is now. Who moves itself leaves.
        Some(origin)
            if destination.is_some()
                && maps::gives_way(origin)
                && matches!(mover(), Mover::Host) =>
        {
            None
        }
        origin => origin,
    };
    match (origin, destination) {
        // The daemon may be about to hear whose the cgroup is.
        (None, None) => entered(task),
        (None, Some(workload)) => {
            if !maps::tie(task.address(), workload) {
                without_room(Full::Tasks, task, cgroup.id(), workload);
            }
            maps::unfollow(task.tgid());
            entered(task);
        }
        (Some(origin), Some(destination)) if origin == destination => {
            maps::unfollow(task.tgid());
        }
        (Some(origin), _) => {
            leave(task, cgroup.id(), origin, mover());
        }
    }
    // Who moved it may have found it before it was waited for, and be told of here after `free` was. This is
    // read last: of who is not released yet, `free` is told later.
    if task.is_released() {
        forget(task);
    }
    0
}

/// A task from outside is in a workload's cgroup now. Where a container runtime made it, it is the
/// runtime's until it runs a program: `runc` has its child run a copy of itself that has no name,
/// while or after it puts it there (`ensure_cloned_binary`, libcontainer/nsenter).
#[inline(always)]
fn entered(task: Task) {
    if is_runtimes_child(task.address()) {
        maps::set_stage(task.address(), Stage::ENTERED);
    }
}

#[inline(always)]
fn is_runtimes_child(task: u64) -> bool {
    kernel::parents_program(task).is_some_and(|program| maps::is_runtime(&program))
}

/// How far a task is that runs a program in a cgroup of `workload`. It is in that cgroup a moment before
/// [`attach_task`] is told (`cgroup_attach_task`), in which it may be as far as to run a copy of the runtime:
/// what would be noted then is noted here.
#[inline(always)]
pub(crate) fn stage(task: u64, workload: WorkloadId, by_descent: Option<WorkloadId>) -> Stage {
    let stage = maps::stage(task);
    // Without room the cgroup's own tag still holds it, and nothing it runs is the runtime's.
    if by_descent.is_none()
        && maps::tie(task, workload)
        && stage == Stage::NONE
        && is_runtimes_child(task)
    {
        maps::set_stage(task, Stage::ENTERED);
        return Stage::ENTERED;
    }
    stage
}

/// A container runtime's process forks before it runs anything of the workload's (`clone` of the stages
/// of `runc init`, libcontainer/nsenter).
#[inline(always)]
fn hand_down_stage(parent: u64, child: Task) {
    match maps::stage(parent) {
        Stage::NONE => {}
        Stage::STARTING => maps::set_stage(child.address(), Stage::PREPARED),
        stage => maps::set_stage(child.address(), stage),
    }
}

/// Whether the calling process, which moves another or itself or makes a cgroup, is a workload's.
#[inline(always)]
fn mover() -> Mover {
    let by_move = || maps::moved(kernel::current_tgid()).map(|moved| moved.workload);
    let workload = by_descent(kernel::current_task())
        .or_else(|| maps::member(kernel::current_cgroup()))
        .or_else(by_move);
    match workload {
        Some(_workload) => Mover::Workload,
        None => Mover::Host,
    }
}

/// A task of `workload` is in a cgroup outside of it.
#[inline(always)]
fn leave(task: Task, cgroup: CgroupId, workload: WorkloadId, mover: Mover) {
    diagnostics::left(task.pid(), workload);
    let inquiry = Inquiry::leave(Hook::Leave, cgroup, mover);
    match judge_from::<Others>(&inquiry, workload, &origin(task, cgroup), 0) {
        Action::Refuse => {
            if !task.kill() {
                // Where the kernel can not end another task, it is at least not let out of sight.
                let _full = maps::follow(task.tgid(), cgroup, workload);
            }
        }
        Action::Pass => {
            if !maps::follow(task.tgid(), cgroup, workload) {
                without_room(Full::Moved, task, cgroup, workload);
            }
        }
    }
}

/// A table can not hold a task of `workload`.
#[inline(always)]
fn without_room(table: Full, task: Task, cgroup: CgroupId, workload: WorkloadId) -> i32 {
    diagnostics::full(table, task.pid().into());
    match judge_without_room(cgroup, workload, &origin(task, cgroup)) {
        Action::Refuse => {
            if !task.kill() {
                // Where the kernel can not end another task, it is at least not let out of sight.
                let _full = maps::follow(task.tgid(), cgroup, workload);
            }
        }
        Action::Pass => {}
    }
    0
}

#[inline(always)]
fn origin(task: Task, cgroup: CgroupId) -> Origin {
    Origin::Task { tgid: task.tgid(), pid: task.pid(), cgroup: cgroup.0 }
}

/// Forgets a task whose address may become another's from now on.
///
/// Told of in `delayed_put_task_struct`, a callback of RCU's, which nobody preempts: as for
/// [`first_wakeup`], an exit need not be told of.
#[inline(always)]
pub(crate) fn free(ctx: &BtfTracePointContext) -> i32 {
    forget(Task(ctx.arg(0)));
    0
}

/// Forgets what is known of a task that has ended.
#[inline(always)]
fn forget(task: Task) {
    let address = task.address();
    maps::untie(address);
    maps::settle(address);
    // The process's first thread goes after all others. One whose place another thread has taken, to run a
    // program, has that one's number by now (`exchange_tids`).
    if task.pid() == task.tgid() {
        maps::unfollow(task.tgid());
    }
}
