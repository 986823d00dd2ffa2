//! What the datapath says of itself, for whoever looks for a fault; off unless the settings turn it
//! on.
//!
//! Each line is a global function: the verifier checks it once, and its formatting takes no part in
//! the paths that lead to it. Such a function takes plain numbers, and returns one. Lines are short:
//! their arguments stand on a stack that all calls share.

use agentguard_common::WorkloadId;
use aya_log_ebpf::{debug, warn};

use crate::maps;

/// The tables that can be full.
#[repr(u32)]
#[derive(Clone, Copy)]
pub(crate) enum Full {
    Cgroups = 1,
    Moved = 2,
    Tasks = 3,
}

/// A request was decided, not remembered.
#[inline(always)]
pub(crate) fn decided(workload: WorkloadId, verdict: u8) {
    say_decided(workload.0, verdict.into());
}

/// A task is in a cgroup outside its workload.
#[inline(always)]
pub(crate) fn left(pid: u32, workload: WorkloadId) {
    if maps::settings().diagnostics != 0 {
        say_left(pid, workload.0);
    }
}

/// A table took no row for this process or cgroup.
#[inline(always)]
pub(crate) fn full(table: Full, of: u64) {
    if maps::settings().diagnostics != 0 {
        say_full(table as u32, of);
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn say_decided(workload: u32, verdict: u32) -> u32 {
    debug!((), "workload {}: verdict {}", workload, verdict);
    0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn say_left(pid: u32, workload: u32) -> u32 {
    debug!((), "task {} left workload {}", pid, workload);
    0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn say_full(table: u32, of: u64) -> u32 {
    warn!((), "table {} took no row for {}", table, of);
    0
}
