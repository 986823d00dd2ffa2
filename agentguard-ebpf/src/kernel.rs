//! Kernel memory: fields of BTF pointers, at the offsets of the running kernel, and the helpers
//! that act on tasks.

use agentguard_common::abi::{Achieved, KernelOffsets, kfunc};
use agentguard_common::{CgroupId, FileId, Naming};
use aya_ebpf::bindings::task_struct;
use aya_ebpf::helpers::generated::{
    bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_get_current_task, bpf_jiffies64,
    bpf_ktime_get_boot_ns, bpf_probe_read_kernel, bpf_send_signal,
};

/// Filled in by user space before the object is loaded; to the verifier a constant.
#[unsafe(no_mangle)]
static OFFSETS: KernelOffsets = KernelOffsets {
    bprm_file: 0,
    bprm_filename: 0,
    bprm_interpreter: 0,
    file_inode: 0,
    inode_number: 0,
    inode_super_block: 0,
    inode_links: 0,
    inode_generation: 0,
    super_block_device: 0,
    task_pid: 0,
    task_thread_pid: 0,
    task_tgid: 0,
    task_start_boottime: 0,
    task_real_parent: 0,
    task_mm: 0,
    mm_exe_file: 0,
    task_group_leader: 0,
    task_cgroups: 0,
    css_set_default_cgroup: 0,
    cgroup_kernfs_node: 0,
    cgroup_parent: 0,
    css_cgroup: 0,
    cgroup_root: 0,
    cgroup_root_hierarchy: 0,
    kernfs_node_id: 0,
    sock_family: 0,
    sock_type: 0,
    sock_state: 0,
    sock_protocol: 0,
    sock_num: 0,
    sock_dport: 0,
    sock_daddr: 0,
    sock_v6_daddr: 0,
    sock_cgroup: 0,
    socket_sk: 0,
    msghdr_name: 0,
    msghdr_namelen: 0,
    unix_address: 0,
    unix_dentry: 0,
    unix_peer: 0,
    unix_address_length: 0,
    unix_address_name: 0,
    file_private_data: 0,
    inode_mode: 0,
    dentry_inode: 0,
    dentry_parent: 0,
    dentry_name: 0,
    dentry_name_length: 0,
};

/// As [`OFFSETS`]: which layers are in force beside this one.
#[unsafe(no_mangle)]
static ACHIEVED: Achieved = Achieved { exec_by_lsm: 0, writes_under_locks: 0 };

/// Whether exec is judged by the LSM layer, before the point of no return.
#[inline(always)]
pub(crate) fn exec_is_judged_by_lsm() -> bool {
    // SAFETY: a global that is never written once the object is loaded.
    unsafe { core::ptr::read_volatile(&raw const ACHIEVED.exec_by_lsm) != 0 }
}

/// Whether a table may be given a row under any lock of the kernel's.
#[inline(always)]
pub(crate) fn may_write_under_locks() -> bool {
    // SAFETY: as above.
    unsafe { core::ptr::read_volatile(&raw const ACHIEVED.writes_under_locks) != 0 }
}

const SIGKILL: u32 = 9;
/// `PIDTYPE_TGID` of the kernel: the signal is for the whole process.
const PIDTYPE_TGID: u32 = 1;

/// Reads a field of the object `base` points to.
///
/// # Safety
///
/// `base` is a BTF pointer of the type that has this field, or one read from such a pointer: the
/// verifier checks the type and the kernel guards the load.
macro_rules! field {
    ($base:expr, $offset:ident as $type:ty) => {{
        let offset = core::ptr::read_volatile(&raw const OFFSETS.$offset) as usize;
        core::ptr::read_volatile($base.cast::<u8>().add(offset).cast::<$type>())
    }};
}

type Pointer = *const core::ffi::c_void;

/// Reads a field of the structure at an address, for structures that the verifier does not follow
/// pointers of. `None`: there is nothing to be read.
macro_rules! probe {
    ($address:expr, $offset:ident as $type:ty) => {{
        // SAFETY: a global that is never written once the object is loaded.
        let offset = unsafe { core::ptr::read_volatile(&raw const OFFSETS.$offset) };
        $crate::kernel::read_at::<$type>($address + u64::from(offset))
    }};
}

/// Reads kernel memory. `None`: nothing is there.
#[inline(always)]
pub(crate) fn read_at<T: Copy>(address: u64) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes all of `value`, whether it can read the address or not.
    let status = unsafe {
        bpf_probe_read_kernel(
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            address as *const core::ffi::c_void,
        )
    };
    // SAFETY: as above.
    if status == 0 { Some(unsafe { value.assume_init() }) } else { None }
}

/// The address in a pointer the verifier follows, as a plain number: it lets no such pointer be a
/// key.
#[inline(always)]
pub(crate) fn address_of<T>(pointer: *const T) -> u64 {
    let held = pointer;
    read_at(&raw const held as u64).unwrap_or(0)
}

/// The workload's cgroup a socket belongs to, by which the kernel chooses whose hooks its calls
/// and packets meet: an id, or zero if it has none.
#[inline(always)]
pub(crate) fn cgroup_of_socket(sock: u64) -> CgroupId {
    let Some(cgroup) = probe!(sock, sock_cgroup as u64) else { return CgroupId(0) };
    // Before 5.15 marked in the lowest bits where it is a class or priority of cgroup v1.
    if cgroup & 3 != 0 {
        return CgroupId(0);
    }
    let id = || {
        let node = probe!(cgroup, cgroup_kernfs_node as u64)?;
        probe!(node, kernfs_node_id as u64)
    };
    CgroupId(id().unwrap_or(0))
}

/// A cgroup of any hierarchy.
#[derive(Clone, Copy)]
pub(crate) struct Cgroup(Pointer);

impl Cgroup {
    /// # Safety
    ///
    /// `pointer` is a BTF pointer to a `struct cgroup`.
    #[inline(always)]
    pub(crate) unsafe fn new(pointer: Pointer) -> Self {
        Self(pointer)
    }

    /// Whether this is the v2 hierarchy: ids of other hierarchies overlap with its ids.
    #[inline(always)]
    pub(crate) fn is_v2(self) -> bool {
        // SAFETY: `new` promises a cgroup. The v2 hierarchy is registered first and is number 0
        // (`cgroup_init_early`; the `0::` of /proc/<pid>/cgroup).
        unsafe {
            let root: Pointer = field!(self.0, cgroup_root as Pointer);
            field!(root, cgroup_root_hierarchy as i32) == 0
        }
    }

    #[inline(always)]
    pub(crate) fn id(self) -> CgroupId {
        // SAFETY: `new` promises a cgroup.
        unsafe {
            let node: Pointer = field!(self.0, cgroup_kernfs_node as Pointer);
            CgroupId(field!(node, kernfs_node_id as u64))
        }
    }

    /// The cgroup above; `None` for the root.
    #[inline(always)]
    pub(crate) fn parent(self) -> Option<Self> {
        // SAFETY: `new` promises a cgroup; a css that is not null has its cgroup.
        unsafe {
            let parent: Pointer = field!(self.0, cgroup_parent as Pointer);
            if parent.is_null() { None } else { Some(Self(field!(parent, css_cgroup as Pointer))) }
        }
    }
}

/// A task.
#[derive(Clone, Copy)]
pub(crate) struct Task(pub(crate) *mut task_struct);

impl Task {
    /// Where the task's structure is: what it is known by.
    #[inline(always)]
    pub(crate) fn address(self) -> u64 {
        address_of(self.0)
    }

    #[inline(always)]
    pub(crate) fn tgid(self) -> u32 {
        // SAFETY: tasks come from tracepoint arguments only.
        unsafe { field!(self.0, task_tgid as u32) }
    }

    #[inline(always)]
    pub(crate) fn pid(self) -> u32 {
        // SAFETY: tasks come from tracepoint arguments only.
        unsafe { field!(self.0, task_pid as u32) }
    }

    /// Whether nobody is to wait for it any more: its structure may be about to be freed
    /// (`release_task`, which takes its number from it).
    #[inline(always)]
    pub(crate) fn is_released(self) -> bool {
        // SAFETY: tasks come from tracepoint arguments only.
        unsafe { field!(self.0, task_thread_pid as Pointer).is_null() }
    }

    /// Nanoseconds of boot time.
    #[inline(always)]
    pub(crate) fn start(self) -> u64 {
        // SAFETY: tasks come from tracepoint arguments only.
        unsafe { field!(self.0, task_start_boottime as u64) }
    }

    /// The task's cgroup in the v2 hierarchy.
    #[inline(always)]
    pub(crate) fn cgroup(self) -> CgroupId {
        // SAFETY: tasks come from tracepoint arguments only.
        unsafe {
            let css_set: Pointer = field!(self.0, task_cgroups as Pointer);
            let cgroup: Pointer = field!(css_set, css_set_default_cgroup as Pointer);
            Cgroup(cgroup).id()
        }
    }

    /// Ends the task's process before it runs another instruction of user space. `false`: this
    /// kernel cannot do that to another task.
    #[inline(always)]
    pub(crate) fn kill(self) -> bool {
        if self.tgid() == current_tgid() {
            kill_current();
            return true;
        }
        type SendSignalTask = unsafe extern "C" fn(*mut task_struct, i32, u32, u64) -> i32;
        // SAFETY: user space replaces the number by the kernel's own function, or by a constant
        // error where there is none; the verifier checks the arguments.
        unsafe {
            let send: SendSignalTask = core::mem::transmute(kfunc::SEND_SIGNAL_TASK as usize);
            send(self.0, SIGKILL as i32, PIDTYPE_TGID, 0) == 0
        }
    }
}

/// The file an exec is about to run.
#[derive(Clone, Copy)]
pub(crate) struct Program(pub(crate) Pointer);

impl Program {
    /// The file as the kernel resolved it.
    #[inline(always)]
    pub(crate) fn file(self) -> (FileId, Naming) {
        // SAFETY: a program comes from the exec tracepoint only; a `struct linux_binprm` has its
        // file until the call ends, and a file its inode and super block.
        unsafe {
            let file: Pointer = field!(self.0, bprm_file as Pointer);
            let inode: Pointer = field!(file, file_inode as Pointer);
            let super_block: Pointer = field!(inode, inode_super_block as Pointer);
            let id = FileId {
                inode: field!(inode, inode_number as u64),
                device: field!(super_block, super_block_device as u32),
                generation: field!(inode, inode_generation as u32),
            };
            let naming = match field!(inode, inode_links as u32) {
                0 => Naming::Unnamed,
                1.. => Naming::Named,
            };
            (id, naming)
        }
    }

    /// The path as the caller named it, a string in kernel memory.
    #[inline(always)]
    pub(crate) fn path(self) -> *const u8 {
        // SAFETY: as for `file`.
        unsafe { field!(self.0, bprm_filename as *const u8) }
    }

    /// The path of what is looked at now: the caller's, then that of each interpreter in turn.
    #[inline(always)]
    pub(crate) fn interpreter(self) -> *const u8 {
        // SAFETY: as for `file`.
        unsafe { field!(self.0, bprm_interpreter as *const u8) }
    }
}

/// An IP or unix socket that an LSM hook was given, by its address.
#[derive(Clone, Copy)]
pub(crate) struct Sock(pub(crate) u64);

impl Sock {
    /// Of a `struct socket`. `None`: it has no protocol's side (yet).
    #[inline(always)]
    pub(crate) fn of_socket(socket: u64) -> Option<Self> {
        probe!(socket, socket_sk as u64).filter(|sock| *sock != 0).map(Self)
    }

    #[inline(always)]
    pub(crate) fn family(self) -> u16 {
        probe!(self.0, sock_family as u16).unwrap_or(0)
    }

    /// `SOCK_STREAM` and its like.
    #[inline(always)]
    pub(crate) fn kind(self) -> u16 {
        probe!(self.0, sock_type as u16).unwrap_or(0)
    }

    /// Whether others connect to it.
    #[inline(always)]
    pub(crate) fn is_listening(self) -> bool {
        /// `TCP_LISTEN` of the kernel, for every protocol.
        const LISTEN: u8 = 10;
        probe!(self.0, sock_state as u8) == Some(LISTEN)
    }

    /// The other end of a connected unix socket.
    #[inline(always)]
    pub(crate) fn unix_peer(self) -> Option<Self> {
        probe!(self.0, unix_peer as u64).filter(|peer| *peer != 0).map(Self)
    }

    /// The protocol as the socket was made with, before [`ip::canonical`].
    ///
    /// [`ip::canonical`]: agentguard_common::request::ip::canonical
    #[inline(always)]
    pub(crate) fn protocol(self) -> u16 {
        probe!(self.0, sock_protocol as u16).unwrap_or(0)
    }

    /// The local port, host byte order.
    #[inline(always)]
    pub(crate) fn local_port(self) -> u16 {
        probe!(self.0, sock_num as u16).unwrap_or(0)
    }

    /// The peer's port, network byte order.
    #[inline(always)]
    pub(crate) fn peer_port(self) -> u16 {
        probe!(self.0, sock_dport as u16).unwrap_or(0)
    }

    #[inline(always)]
    pub(crate) fn peer_v4(self) -> Option<u32> {
        probe!(self.0, sock_daddr as u32)
    }

    #[inline(always)]
    pub(crate) fn peer_v6(self) -> Option<[u32; 4]> {
        probe!(self.0, sock_v6_daddr as [u32; 4])
    }

    /// The cgroup of the process that made it.
    #[inline(always)]
    pub(crate) fn cgroup(self) -> CgroupId {
        cgroup_of_socket(self.0)
    }
}

/// The socket that an open file is; `None` for every other kind of file.
#[inline(always)]
pub(crate) fn socket_of_file(file: u64) -> Option<u64> {
    /// `S_IFMT` and `S_IFSOCK` of the kernel's ABI.
    const FORMAT: u16 = 0o170_000;
    const SOCKET: u16 = 0o140_000;
    let inode = probe!(file, file_inode as u64)?;
    let mode = probe!(inode, inode_mode as u16)?;
    if mode & FORMAT != SOCKET {
        return None;
    }
    probe!(file, file_private_data as u64).filter(|socket| *socket != 0)
}

/// The address that comes with a message.
#[inline(always)]
pub(crate) fn message_address(message: u64) -> Option<(u64, u32)> {
    let address = probe!(message, msghdr_name as u64)?;
    let length = probe!(message, msghdr_namelen as u32)?;
    (address != 0 && length != 0).then_some((address, length))
}

/// What a unix socket was bound to.
#[derive(Clone, Copy)]
pub(crate) struct UnixAddress {
    /// Where `sun_path` is.
    pub(crate) name: u64,
    /// Bytes of it.
    pub(crate) length: u32,
    /// The directory entry that the bind made; zero for an abstract name.
    pub(crate) entry: u64,
}

impl UnixAddress {
    /// `None`: the socket has no name.
    #[inline(always)]
    pub(crate) fn of(sock: Sock) -> Option<Self> {
        let address = probe!(sock.0, unix_address as u64).filter(|address| *address != 0)?;
        let length = probe!(address, unix_address_length as u32)?;
        // `struct sockaddr_un` begins with the family.
        let family = size_of::<u16>() as u32;
        let entry = probe!(sock.0, unix_dentry as u64)?;
        // SAFETY: a global that is never written once the object is loaded.
        let offset = unsafe { core::ptr::read_volatile(&raw const OFFSETS.unix_address_name) };
        (length > family).then_some(Self {
            name: address + u64::from(offset) + u64::from(family),
            length: length - family,
            entry,
        })
    }
}

/// The file an entry of a directory stands for: device and inode; the rest is unknown.
#[inline(always)]
pub(crate) fn file_of_entry(entry: u64) -> Option<FileId> {
    file_of_inode(probe!(entry, dentry_inode as u64).filter(|inode| *inode != 0)?)
}

#[inline(always)]
fn file_of_inode(inode: u64) -> Option<FileId> {
    let super_block = probe!(inode, inode_super_block as u64)?;
    Some(FileId {
        inode: probe!(inode, inode_number as u64)?,
        device: probe!(super_block, super_block_device as u32)?,
        generation: 0,
    })
}

/// The directory an entry is in.
#[inline(always)]
pub(crate) fn parent_of_entry(entry: u64) -> Option<u64> {
    probe!(entry, dentry_parent as u64).filter(|parent| *parent != 0)
}

/// The name of an entry: where it is, and how many bytes.
#[inline(always)]
pub(crate) fn name_of_entry(entry: u64) -> Option<(u64, u32)> {
    Some((probe!(entry, dentry_name as u64)?, probe!(entry, dentry_name_length as u32)?))
}

/// Ends the calling process before it runs another instruction of user space.
#[inline(always)]
pub(crate) fn kill_current() -> i32 {
    // SAFETY: a helper without pointers. It fails for kernel threads only, which run no exec.
    unsafe { bpf_send_signal(SIGKILL) };
    0
}

/// Nanoseconds of boot time, which goes on while the machine sleeps.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// A clock that costs next to nothing, in units of 1 to 10 ms.
#[inline(always)]
pub(crate) fn jiffies() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() }
}

/// The calling task's cgroup in the v2 hierarchy.
#[inline(always)]
pub(crate) fn current_cgroup() -> CgroupId {
    // SAFETY: a helper without arguments.
    CgroupId(unsafe { bpf_get_current_cgroup_id() })
}

/// Where the calling task's structure is.
#[inline(always)]
pub(crate) fn current_task() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_current_task() }
}

/// The file that the calling process runs: device and inode; the rest is unknown.
#[inline(always)]
pub(crate) fn current_program() -> Option<FileId> {
    program_of(current_task())
}

/// The file that the process runs which made a task: device and inode; the rest is unknown.
#[inline(always)]
pub(crate) fn parents_program(task: u64) -> Option<FileId> {
    program_of(probe!(task, task_real_parent as u64)?)
}

#[inline(always)]
fn program_of(task: u64) -> Option<FileId> {
    // Kernel threads have no memory of their own.
    let memory = probe!(task, task_mm as u64).filter(|memory| *memory != 0)?;
    let file = probe!(memory, mm_exe_file as u64).filter(|file| *file != 0)?;
    file_of_inode(probe!(file, file_inode as u64)?)
}

/// Where the structure of the thread is that stands for a task's process.
#[inline(always)]
pub(crate) fn leader_of(task: u64) -> u64 {
    probe!(task, task_group_leader as u64).unwrap_or(0)
}

/// When a task began, in nanoseconds of boot time; 0: it can not be read.
#[inline(always)]
pub(crate) fn start_of(task: u64) -> u64 {
    probe!(task, task_start_boottime as u64).unwrap_or(0)
}

/// The id of the process that made a task; 0: it can not be read.
#[inline(always)]
pub(crate) fn parent_of(task: u64) -> u32 {
    let parent = probe!(task, task_real_parent as u64);
    parent.and_then(|parent| probe!(parent, task_tgid as u32)).unwrap_or(0)
}

/// The calling task's process id in the upper half, thread id in the lower.
#[inline(always)]
pub(crate) fn current_pid_tgid() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_current_pid_tgid() }
}

/// The calling task's process id.
#[inline(always)]
pub(crate) fn current_tgid() -> u32 {
    (current_pid_tgid() >> 32) as u32
}

/// `-EPERM` if `refused` is not zero, else 0, by a branch: from 6.12 on the verifier asks to see that
/// an LSM program returns nothing else, and what the compiler makes of it by arithmetic it does not
/// see through.
#[inline(always)]
pub(crate) fn error_if(refused: u64) -> i32 {
    #[cfg(target_arch = "bpf")]
    {
        let mut code: u64;
        // SAFETY: registers only.
        unsafe {
            core::arch::asm!(
                "{0} = 0",
                "if {1} == 0 goto +1",
                "{0} = -1",
                out(reg) code,
                in(reg) refused,
                options(nostack, nomem, pure),
            );
        }
        code as i32
    }
    #[cfg(not(target_arch = "bpf"))]
    if refused == 0 { 0 } else { -1 }
}

/// Hides what the compiler knows of a number.
#[inline(always)]
pub(crate) fn opaque(number: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut number = number;
        // SAFETY: a register is moved to itself. Without an instruction the line table of the
        // object would have two entries for the next one, which the kernel refuses.
        unsafe {
            core::arch::asm!("{0} = {0}", inout(reg) number, options(nostack, nomem, pure));
        }
        number
    }
    #[cfg(not(target_arch = "bpf"))]
    number
}

/// As [`opaque`], and never done where the program does not come by.
#[inline(always)]
pub(crate) fn barrier(number: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let mut number = number;
        // SAFETY: as for `opaque`. Not `pure`, which alone keeps it in its branch.
        unsafe {
            core::arch::asm!("{0} = {0}", inout(reg) number, options(nostack, nomem));
        }
        number
    }
    #[cfg(not(target_arch = "bpf"))]
    number
}

/// Makes the verifier forget what it knows of a number. Where many paths meet and each brings a
/// number of its own, it would follow what comes after once for each; a global function is checked
/// for itself, and may return anything.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn forgotten(number: u64) -> u64 {
    opaque(number)
}
