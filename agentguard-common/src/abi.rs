//! The contract between the halves that is not a record: its version and the offsets that depend
//! on the running kernel.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::WorkloadId;
use crate::allowlist::Permission;

/// Raised with every change to a record of the tables that user space writes (tags, allow-lists,
/// settings) and of the cache of verdicts, or to the meaning of one. Tables of another version are
/// never read: a daemon makes and fills its own beside them, and lets go of the old ones last.
pub const VERSION: u32 = CURRENT + cfg!(feature = "next-abi") as u32;

/// The version without the feature `next-abi`, with which tests build the daemon of another one.
const CURRENT: u32 = 4;

/// Raised with every change to a record that the kernel half itself keeps (membership of cgroups
/// and tasks, attachments, sockets, counters) or writes for user space (events), or to the meaning
/// of one. It goes from build to build and cannot be made anew while anything runs, so a daemon
/// refuses to begin beside one of another version.
pub const STATE_VERSION: u32 = 2;

/// Byte offsets in structures of the running kernel, from its BTF.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct KernelOffsets {
    pub bprm_file: u32,
    pub bprm_filename: u32,
    pub bprm_interpreter: u32,
    pub file_inode: u32,
    pub inode_number: u32,
    pub inode_super_block: u32,
    pub inode_links: u32,
    pub inode_generation: u32,
    pub super_block_device: u32,
    pub task_pid: u32,
    pub task_thread_pid: u32,
    pub task_tgid: u32,
    pub task_start_boottime: u32,
    pub task_real_parent: u32,
    pub task_mm: u32,
    pub mm_exe_file: u32,
    pub task_group_leader: u32,
    pub task_cgroups: u32,
    pub css_set_default_cgroup: u32,
    pub cgroup_kernfs_node: u32,
    pub cgroup_parent: u32,
    pub css_cgroup: u32,
    pub cgroup_root: u32,
    pub cgroup_root_hierarchy: u32,
    pub kernfs_node_id: u32,
    pub sock_family: u32,
    pub sock_type: u32,
    pub sock_state: u32,
    pub sock_protocol: u32,
    pub sock_num: u32,
    pub sock_dport: u32,
    pub sock_daddr: u32,
    pub sock_v6_daddr: u32,
    /// `sk_cgrp_data`, whose first word is the socket's cgroup (or, before 5.15, marked in its
    /// lowest bits where it is something else).
    pub sock_cgroup: u32,
    pub socket_sk: u32,
    pub msghdr_name: u32,
    pub msghdr_namelen: u32,
    pub unix_address: u32,
    pub unix_dentry: u32,
    pub unix_peer: u32,
    pub unix_address_length: u32,
    pub unix_address_name: u32,
    pub file_private_data: u32,
    pub inode_mode: u32,
    pub dentry_inode: u32,
    pub dentry_parent: u32,
    pub dentry_name: u32,
    pub dentry_name_length: u32,
}

/// What is in force beside the portable layer, decided once when the object is loaded; to the
/// verifier a constant.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct Achieved {
    /// Not zero: exec is judged before the point of no return (`bprm_check_security`), and the
    /// tracepoint behind it does nothing.
    pub exec_by_lsm: u32,
    /// Not zero: a table may be given a row under any lock, as its memory is not the kernel's own allocator's.
    pub writes_under_locks: u32,
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

/// A verdict that was given lately, and how many like it were folded into its record.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct CachedVerdict {
    pub permission: Permission,
    /// Boot time of the last record.
    pub logged_at: u64,
    /// Jiffies until which nothing needs to be looked at again.
    pub fresh_until: u64,
    pub folded: u64,
    /// The verdict's code; a whole word, because odd bytes are cleared by a call of `memset`.
    pub verdict: u64,
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
