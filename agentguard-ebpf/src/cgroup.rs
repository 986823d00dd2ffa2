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
    let parent = Task(ctx.arg(0));
    let child = Task(ctx.arg(1));
    let workload = match by_descent(parent.address()) {
        // The parent's cgroup may be another's by now, and not the child's alone.
        Some(tied) if maps::gives_way(tied) => maps::member(parent.cgroup()).or(Some(tied)),
        Some(tied) => Some(tied),
        None => maps::member(parent.cgroup()),
    };
    let Some(workload) = workload else {
        maps::untie_stale(child.address());
        let cgroup = child.cgroup();
        if cgroup != parent.cgroup() && maps::member(cgroup).is_some() {
            entered(child);
        } else if child.tgid() != parent.tgid() {
            hand_down_stage(parent, child);
        }
        return 0;
    };
    if !maps::tie(child.address(), workload) {
        return without_room(Full::Tasks, child, child.cgroup(), workload);
    }
    if child.tgid() == parent.tgid() {
        return 0;
    }
    hand_down_stage(parent, child);
    maps::inherit_process(parent.tgid(), child.tgid(), child.start());
    let cgroup = child.cgroup();
    if maps::member(cgroup) == Some(workload) {
        return 0;
    }
    if let Some(moved) = maps::moved(parent.tgid())
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
    // Also one that has ended is moved, as long as nobody has waited for it. Its exit may have been told of
    // before, and nothing would take back what was noted of it here until its address is another's. The
    // count is read last: who is counted still is told of later.
    if !task.has_threads() {
        forget(task.address());
        maps::unfollow(task.tgid());
    } else if destination.is_some() && task.is_exiting() {
        // The first thread has ended and others have not, whose tag this is, too. The last one's exit takes it
        // back, but where one of them runs a program it takes the first one's place, and nobody tells.
        maps::note_stale();
    }
    0
}

/// Forgets what is known of the task at this address.
#[inline(always)]
fn forget(task: u64) {
    maps::untie(task);
    maps::settle(task);
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
pub(crate) fn stage(
    task: u64,
    workload: WorkloadId,
    by_descent: Option<WorkloadId>,
) -> Option<Stage> {
    let stage = maps::stage(task);
    // Without room the cgroup's own tag still holds it, and nothing it runs is the runtime's.
    if by_descent.is_none()
        && maps::tie(task, workload)
        && stage.is_none()
        && is_runtimes_child(task)
    {
        maps::set_stage(task, Stage::ENTERED);
        return Some(Stage::ENTERED);
    }
    stage
}

/// A container runtime's process forks before it runs anything of the workload's (`clone` of the stages
/// of `runc init`, libcontainer/nsenter).
#[inline(always)]
fn hand_down_stage(parent: Task, child: Task) {
    if let Some(stage) = maps::stage(parent.address()) {
        let stage = if stage == Stage::STARTING { Stage::PREPARED } else { stage };
        maps::set_stage(child.address(), stage);
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

/// Forgets a task, and a process with its last thread, which need not be the one it began with.
#[inline(always)]
pub(crate) fn exit(ctx: &BtfTracePointContext) -> i32 {
    let task = Task(ctx.arg(0));
    forget(task.address());
    if !task.has_threads() {
        // Who moved the process after its first thread ended has the kernel speak of that one.
        let leader = kernel::leader_of(task.address());
        if leader != task.address() {
            forget(leader);
        }
        maps::unfollow(task.tgid());
    }
    0
}
