//! `execve(2)`, at the point where the new program is in place and has not run yet.

use agentguard_common::Action;
use agentguard_common::event::{Hook, PATH_BYTES};
use aya_ebpf::helpers::generated::bpf_probe_read_kernel_str;
use aya_ebpf::programs::BtfTracePointContext;

use crate::cgroup;
use crate::judge::{Execs, Inquiry, judge_from};
use crate::kernel::{self, Program, Task};
use crate::maps;
use crate::record::Origin;

/// Arguments of the tracepoint: task, old pid, `struct linux_binprm`.
#[inline(always)]
pub(crate) fn exec(ctx: &BtfTracePointContext) -> Action {
    let task = Task(ctx.arg(0));
    let current = kernel::current_cgroup();
    let by_descent = cgroup::by_descent(task);
    // A thread that was not the leader takes the leader's place when it runs a program, and may
    // not be tied itself.
    let by_move = || maps::moved(task.tgid()).map(|moved| moved.workload);
    let Some(workload) = maps::member(current).or(by_descent).or_else(by_move) else {
        return Action::Pass;
    };
    if by_descent.is_none() {
        // SAFETY: an argument of the tracepoint. Without memory the cgroup's tag still holds.
        let _tied = unsafe { maps::tie(task.0, workload) };
    }
    let program = Program(ctx.arg(2));
    let (file, naming) = program.file();
    remember(task, workload, &program, file);
    let inquiry = Inquiry::exec(Hook::Exec, &file, naming);
    judge_from::<Execs>(&inquiry, workload, &Origin::Exec { path: program.path() }, 0)
}

/// Keeps the process for the records of its descendants.
#[inline(always)]
fn remember(
    task: Task,
    workload: agentguard_common::WorkloadId,
    program: &Program,
    file: agentguard_common::FileId,
) {
    let tgid = task.tgid();
    if maps::process(tgid).is_none() {
        maps::remember_new(tgid);
    }
    let Some(process) = maps::process(tgid) else { return };
    process.start = task.start();
    process.parent = task.parent_tgid();
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
