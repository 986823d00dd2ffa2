//! Counting verdicts and writing their records.

use agentguard_common::event::{COMM_BYTES, Event, ExecEvent, Hook, PATH_BYTES, RequestKey, RequestKind};
use agentguard_common::stats::{CELLS, Counters};
use agentguard_common::{Decision, Tag, Verdict};
use aya_ebpf::helpers::generated::{
    bpf_get_current_comm, bpf_get_current_uid_gid, bpf_probe_read_kernel_str,
    bpf_ringbuf_reserve, bpf_ringbuf_submit,
};

use crate::{kernel, maps};

/// What became of the record of a verdict.
#[derive(Clone, Copy)]
pub(crate) enum Fate {
    Logged,
    Aggregated,
    Lost,
}

/// Whose doing a request is.
pub(crate) enum Origin {
    /// The calling process.
    Caller,
    /// Nobody that could be named: a packet may leave in any task's time.
    Nobody,
    /// A process that is not the caller: its process and thread id, and the cgroup it goes to.
    Task { tgid: u32, pid: u32, cgroup: u64 },
    /// The calling process, which runs the file at this path (a string in kernel memory).
    Exec { path: *const u8 },
}

/// What is to be recorded.
pub(crate) struct Record {
    pub(crate) hook: Hook,
    pub(crate) kind: RequestKind,
    pub(crate) decision: Decision,
    pub(crate) folded: u64,
    pub(crate) now: u64,
}

/// Counts a verdict and what became of its record.
#[inline(always)]
pub(crate) fn count(tag: &Tag, hook: Hook, code: u8, fate: Fate) {
    let Some(counters) = maps::counters(tag.counters) else { return };
    // The compiler knows that this is in bounds and would leave the check out; the verifier, which
    // does not know, wants to see it.
    let cell = kernel::opaque(Counters::cell_of(hook, tag.mode(), code) as u64) as usize % CELLS;
    if let Some(cell) = counters.verdicts.get_mut(cell) {
        increment(cell);
    }
    match fate {
        Fate::Logged => increment(&mut counters.logged),
        Fate::Aggregated => increment(&mut counters.aggregated),
        Fate::Lost => increment(&mut counters.lost),
    }
}

/// Adds one. Atomic although the row is this CPU's own: a program can be preempted between a load
/// and a store, and the sums must be exact.
#[inline(always)]
fn increment(counter: &mut u64) {
    let counter: *mut u64 = counter;
    // The target has no compare-and-swap, so `core` offers none of its atomics; the instruction
    // itself exists since the first BPF.
    #[cfg(target_arch = "bpf")]
    // SAFETY: a map value is aligned to 8 bytes and only ever accessed like this.
    unsafe {
        core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) 1_u64, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as above.
    unsafe {
        *counter += 1;
    }
}

/// Writes a record: denials to a ring of their own, so that nothing else can push them out.
#[inline(always)]
pub(crate) fn write(record: &Record, key: &RequestKey, tag: &Tag, origin: &Origin) -> Fate {
    let ring = match record.decision.verdict {
        Verdict::Deny(_) => maps::denied(),
        Verdict::Allow | Verdict::Unmanaged => maps::allowed(),
    };
    match origin {
        Origin::Exec { path } => {
            // SAFETY: the ring is a map; the size is a constant.
            let entry = unsafe { bpf_ringbuf_reserve(ring, size_of::<ExecEvent>() as u64, 0) }
                .cast::<ExecEvent>();
            if entry.is_null() {
                return Fate::Lost;
            }
            // SAFETY: the entry is this program's until it is submitted, and large enough; the
            // path is a string in kernel memory and the helper bounds and terminates the copy.
            unsafe {
                fill(&raw mut (*entry).event, record, key, tag, origin);
                let text = (&raw mut (*entry).path).cast::<u8>();
                text.write(0);
                bpf_probe_read_kernel_str(text.cast(), PATH_BYTES as u32, path.cast());
                bpf_ringbuf_submit(entry.cast(), 0);
            }
        }
        Origin::Caller | Origin::Nobody | Origin::Task { .. } => {
            // SAFETY: as above.
            let entry = unsafe { bpf_ringbuf_reserve(ring, size_of::<Event>() as u64, 0) }
                .cast::<Event>();
            if entry.is_null() {
                return Fate::Lost;
            }
            // SAFETY: as above.
            unsafe {
                fill(entry, record, key, tag, origin);
                bpf_ringbuf_submit(entry.cast(), 0);
            }
        }
    }
    Fate::Logged
}

/// # Safety
///
/// `event` points to room for an event that is this program's alone.
#[inline(always)]
unsafe fn fill(
    event: *mut Event,
    record: &Record,
    key: &RequestKey,
    tag: &Tag,
    origin: &Origin,
) {
    let Record { hook, kind, decision, folded, now } = record;
    // SAFETY: the caller's promise; each field is written in place, so that no copy of the record
    // stands on the program's small stack.
    unsafe {
        (&raw mut (*event).time).write(*now);
        (&raw mut (*event).folded).write(*folded);
        (&raw mut (*event).key).write(*key);
        (&raw mut (*event).identity).write(tag.identity);
        (&raw mut (*event).scope).write(decision.permission.scope);
        (&raw mut (*event).grant).write(decision.permission.grant);
        (&raw mut (*event).hook).write(*hook as u8);
        (&raw mut (*event).verdict).write(decision.verdict.code());
        (&raw mut (*event).mode).write(tag.mode() as u8);
        (&raw mut (*event).kind).write(*kind as u8);
        (&raw mut (*event).reserved).write([0; 3]);
        let comm = (&raw mut (*event).comm).cast::<[u64; COMM_BYTES / 8]>();
        comm.write([0; COMM_BYTES / 8]);
        match origin {
            Origin::Caller | Origin::Exec { .. } => {
                let ids = kernel::current_pid_tgid();
                (&raw mut (*event).cgroup).write(kernel::current_cgroup().0);
                (&raw mut (*event).pid).write((ids >> 32) as u32);
                (&raw mut (*event).tid).write(ids as u32);
                (&raw mut (*event).uid).write(bpf_get_current_uid_gid() as u32);
                (&raw mut (*event).detached).write(0);
                bpf_get_current_comm(comm.cast(), COMM_BYTES as u32);
            }
            Origin::Nobody => {
                (&raw mut (*event).cgroup).write(0);
                (&raw mut (*event).pid).write(0);
                (&raw mut (*event).tid).write(0);
                (&raw mut (*event).uid).write(u32::MAX);
                (&raw mut (*event).detached).write(1);
            }
            Origin::Task { tgid, pid, cgroup } => {
                (&raw mut (*event).cgroup).write(*cgroup);
                (&raw mut (*event).pid).write(*tgid);
                (&raw mut (*event).tid).write(*pid);
                (&raw mut (*event).uid).write(bpf_get_current_uid_gid() as u32);
                (&raw mut (*event).detached).write(0);
            }
        }
    }
}
