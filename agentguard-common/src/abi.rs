//! The contract between the halves that is not a record: its version and the offsets that depend
//! on the running kernel.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::WorkloadId;

/// Raised with every change to a shared record or to the meaning of one. State pinned under
/// another version is never read.
pub const VERSION: u32 = 1;

/// Byte offsets in structures of the running kernel, from its BTF.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct KernelOffsets {
    pub bprm_file: u32,
    pub bprm_filename: u32,
    pub file_inode: u32,
    pub inode_number: u32,
    pub inode_super_block: u32,
    pub inode_links: u32,
    pub inode_generation: u32,
    pub super_block_device: u32,
    pub task_pid: u32,
    pub task_tgid: u32,
    pub task_start_boottime: u32,
    pub task_real_parent: u32,
    pub task_signal: u32,
    pub signal_live: u32,
    pub task_group_leader: u32,
    pub task_cgroups: u32,
    pub css_set_default_cgroup: u32,
    pub cgroup_kernfs_node: u32,
    pub cgroup_parent: u32,
    pub css_cgroup: u32,
    pub cgroup_root: u32,
    pub cgroup_root_hierarchy: u32,
    pub kernfs_node_id: u32,
}

/// The entry of a cgroup: which workload its processes are.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct Membership {
    pub workload: WorkloadId,
}

/// What the network hooks find in the storage of the cgroup they are attached to.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct Attachment {
    /// The cgroup itself, so that a caller in it needs no look-up.
    pub cgroup: u64,
    /// The workload whose cgroup this is; none for a cgroup of the host that only holds tasks
    /// which the host moved there.
    pub workload: WorkloadId,
    pub reserved: u32,
}

/// A process that the host moved out of its workload's cgroup; it keeps its tag.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct Moved {
    /// The cgroup it is in now; it needs hooks.
    pub cgroup: u64,
    pub workload: WorkloadId,
    pub reserved: u32,
}

/// Call numbers that stand in the object for kernel functions; user space writes the running
/// kernel's own in their place before it loads a program.
pub mod kfunc {
    /// `bpf_send_signal_task` (6.13).
    pub const SEND_SIGNAL_TASK: u32 = 0x6167_0001;
}

/// Settings that can be changed at run time.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct Settings {
    /// Nanoseconds in which the same request leaves only one record.
    pub aggregation_window: u64,
    /// Zero: the datapath's own diagnostics are off.
    pub diagnostics: u32,
    pub reserved: u32,
}
