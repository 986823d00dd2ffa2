//! Counting verdicts and writing their records.

use agentguard_common::allowlist::UNIX_NAME_BYTES;
use agentguard_common::event::{
    COMM_BYTES, Event, Hook, PATH_BYTES, PathEvent, RequestKey, RequestKind,
};
use agentguard_common::stats::{Counters, Fate};
use agentguard_common::{Permission, Tag, Verdict};
use aya_ebpf::helpers::generated::{
    bpf_get_current_comm, bpf_get_current_uid_gid, bpf_probe_read_kernel,
    bpf_probe_read_kernel_str, bpf_ringbuf_reserve, bpf_ringbuf_submit,
};

use crate::{kernel, maps};

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
    /// The calling process, which connects or sends to a unix socket that was bound to this name
    /// (bytes in kernel memory, at most [`UNIX_NAME_BYTES`] of them).
    Unix { name: u64, length: u32 },
}

/// What is to be recorded.
pub(crate) struct Record {
    pub(crate) hook: Hook,
    pub(crate) kind: RequestKind,
    /// The code of the verdict.
    pub(crate) verdict: u8,
    pub(crate) permission: Permission,
    pub(crate) folded: u64,
    pub(crate) now: u64,
}

/// Counts a verdict and what became of its record.
#[inline(always)]
pub(crate) fn count(tag: &Tag, hook: Hook, code: u8, fate: Fate) {
    let cell = Counters::cell_of(hook, tag.mode(), code, fate) as u32;
    count_cell(tag.counters.into(), cell);
}

/// Counts a verdict that was given before, as aggregated. In place: here the code comes out of a
/// table, so that there is one path for all verdicts, and a call and return is dear.
#[inline(always)]
pub(crate) fn count_again(tag: &Tag, hook: Hook, code: u8) {
    let Some(counters) = maps::counters(tag.counters) else { return };
    let cell = Counters::cell_of(hook, tag.mode(), code, Fate::Aggregated);
    if let Some(cell) = counters.cells.get_mut(kernel::opaque(cell as u64) as usize) {
        increment(cell);
    }
}

/// A global function, which the verifier checks once for all arguments. Where it follows every path
/// to here, every verdict is a place of its own in the counters, and no two paths are alike.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_cell(row: u32, cell: u32) -> u32 {
    let Some(counters) = maps::counters(row as u16) else { return 0 };
    if let Some(cell) = counters.cells.get_mut(cell as usize) {
        increment(cell);
    }
    0
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
    let ring =
        if record.verdict == Verdict::Allow.code() { maps::allowed() } else { maps::denied() };
    match origin {
        Origin::Exec { path } => {
            // SAFETY: the ring is a map; the size is a constant.
            let entry = unsafe { bpf_ringbuf_reserve(ring, size_of::<PathEvent>() as u64, 0) }
                .cast::<PathEvent>();
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
        Origin::Unix { name, length } => {
            // SAFETY: as above.
            let entry = unsafe { bpf_ringbuf_reserve(ring, size_of::<PathEvent>() as u64, 0) }
                .cast::<PathEvent>();
            if entry.is_null() {
                return Fate::Lost;
            }
            // SAFETY: as above; the length is checked against the room in front of the copy.
            unsafe {
                fill(&raw mut (*entry).event, record, key, tag, origin);
                let text = (&raw mut (*entry).path).cast::<u8>();
                text.write(0);
                if *length > 0 && *length <= UNIX_NAME_BYTES as u32 {
                    // The verifier does not see through the comparison.
                    let length = kernel::opaque((*length).into()) as u32 & (PATH_BYTES as u32 - 1);
                    bpf_probe_read_kernel(text.cast(), length, *name as *const _);
                }
                bpf_ringbuf_submit(entry.cast(), 0);
            }
        }
        Origin::Caller | Origin::Nobody | Origin::Task { .. } => {
            // SAFETY: as above.
            let entry =
                unsafe { bpf_ringbuf_reserve(ring, size_of::<Event>() as u64, 0) }.cast::<Event>();
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
unsafe fn fill(event: *mut Event, record: &Record, key: &RequestKey, tag: &Tag, origin: &Origin) {
    let Record { hook, kind, verdict, permission, folded, now } = record;
    // SAFETY: the caller's promise; each field is written in place, so that no copy of the record
    // stands on the program's small stack.
    unsafe {
        (&raw mut (*event).time).write(*now);
        (&raw mut (*event).folded).write(*folded);
        (&raw mut (*event).key).write(*key);
        (&raw mut (*event).identity).write(tag.identity);
        (&raw mut (*event).scope).write(permission.scope);
        (&raw mut (*event).grant).write(permission.grant);
        (&raw mut (*event).hook).write(*hook as u8);
        (&raw mut (*event).verdict).write(*verdict);
        (&raw mut (*event).mode).write(tag.mode() as u8);
        (&raw mut (*event).kind).write(*kind as u8);
        let comm = (&raw mut (*event).comm).cast::<u64>();
        match origin {
            Origin::Caller | Origin::Exec { .. } | Origin::Unix { .. } => {
                let ids = kernel::current_pid_tgid();
                (&raw mut (*event).cgroup).write(kernel::current_cgroup().0);
                (&raw mut (*event).pid).write((ids >> 32) as u32);
                (&raw mut (*event).tid).write(ids as u32);
                (&raw mut (*event).uid).write(bpf_get_current_uid_gid() as u32);
                let name_length = match origin {
                    Origin::Unix { length, .. } => *length,
                    Origin::Caller | Origin::Exec { .. } | Origin::Nobody | Origin::Task { .. } => {
                        0
                    }
                };
                set_ends(event, false, name_length, false);
                bpf_get_current_comm(comm.cast(), COMM_BYTES as u32);
            }
            Origin::Nobody => {
                (&raw mut (*event).cgroup).write(0);
                (&raw mut (*event).pid).write(0);
                (&raw mut (*event).tid).write(0);
                (&raw mut (*event).uid).write(u32::MAX);
                set_ends(event, true, 0, false);
                clear(comm);
            }
            Origin::Task { tgid, pid, cgroup } => {
                (&raw mut (*event).cgroup).write(*cgroup);
                (&raw mut (*event).pid).write(*tgid);
                (&raw mut (*event).tid).write(*pid);
                (&raw mut (*event).uid).write(bpf_get_current_uid_gid() as u32);
                set_ends(event, false, 0, *tgid != kernel::current_tgid());
                clear(comm);
            }
        }
    }
}

/// Writes the last bytes: the flag, the length of a name, and what is reserved behind them.
///
/// # Safety
///
/// As for [`fill`].
#[inline(always)]
unsafe fn set_ends(event: *mut Event, detached: bool, name_length: u32, of_another: bool) {
    // One word: by itself an odd number of bytes becomes a call of `memset`, a loop over bytes.
    let word = u32::from(detached) | name_length << 8 | u32::from(of_another) << 16;
    // SAFETY: the caller's promise; the word is the last of the event.
    unsafe { (&raw mut (*event).detached).cast::<u32>().write(word.to_le()) };
}

/// Clears a task's name.
///
/// # Safety
///
/// `comm` points to [`COMM_BYTES`] bytes that are this program's alone.
#[inline(always)]
unsafe fn clear(comm: *mut u64) {
    // SAFETY: the caller's promise. Volatile, so that it does not become a call of `memset`.
    unsafe {
        comm.write_volatile(0);
        comm.add(1).write_volatile(0);
    }
}
