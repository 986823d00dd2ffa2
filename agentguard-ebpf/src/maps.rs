//! The tables, private to this module; callers use verbs.
//!
//! User space sets the real sizes at load.

use agentguard_common::abi::{Attachment, CachedVerdict, Membership, Moved, Settings};
use agentguard_common::allowlist::{
    DestinationEntry, DestinationKey, ExecutableEntry, ExecutableKey, RuleRow, Tag, UnixName,
    UnixSocketKey,
};
use agentguard_common::decide::{Found, search};
use agentguard_common::event::{Event, Process, RequestKey};
use agentguard_common::stats::{Counters, OTHER};
use agentguard_common::{
    Address, AllowlistId, CgroupId, FileId, Permission, RuleSetId, Tables, UnixNameId, UnixSocket,
    WorkloadId,
};
use aya_ebpf::bindings::{BPF_ANY, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::helpers::generated::{bpf_get_local_storage, bpf_sk_storage_get, bpf_tail_call};
use aya_ebpf::macros::btf_map;

/// `BPF_F_NO_PREALLOC`: entries are allocated as they come, so an empty table costs nothing.
const NO_PREALLOC: usize = 1;
/// `BPF_F_CLONE`: a socket accepted from a listener starts with a copy of the listener's value.
const CLONE: usize = 512;

#[btf_map]
static WORKLOADS: HashMap<WorkloadId, Tag, 8192> = HashMap::new();
#[btf_map]
static CGROUPS: HashMap<CgroupId, Membership, 65536, NO_PREALLOC> = HashMap::new();
#[btf_map]
static MOVED: HashMap<u32, Moved, 8192, NO_PREALLOC> = HashMap::new();
#[btf_map]
static DESTINATIONS: LpmTrie<DestinationKey, DestinationEntry, 524_288> = LpmTrie::new();
#[btf_map]
static RULES: HashMap<RuleSetId, RuleRow, 65536, NO_PREALLOC> = HashMap::new();
#[btf_map]
static EXECUTABLES: HashMap<ExecutableKey, ExecutableEntry, 262_144, NO_PREALLOC> = HashMap::new();
#[btf_map]
static UNIX_NAMES: HashMap<UnixName, UnixNameId, 8192, NO_PREALLOC> = HashMap::new();
#[btf_map]
static UNIX_SOCKETS: HashMap<UnixSocketKey, Permission, 65536, NO_PREALLOC> = HashMap::new();
#[btf_map]
static VERDICTS: LruHashMap<RequestKey, CachedVerdict, 32768> = LruHashMap::new();
#[btf_map]
static PROCESSES: LruHashMap<u32, Process, 8192> = LruHashMap::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counters, 129> = PerCpuArray::new();
#[btf_map]
static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map]
static DENIED: RingBuf<Event, 1_048_576> = RingBuf::new();
#[btf_map]
static ALLOWED: RingBuf<Event, 4_194_304> = RingBuf::new();
#[btf_map]
static ATTACHMENTS: CgroupStorage<Attachment> = CgroupStorage::new();
#[btf_map]
static SOCKETS: SocketStorage<SocketVerdict> = SocketStorage::new();
/// By the address of a task's structure: unlike its number it is the task's from birth to end, also
/// where a thread takes the place of its process's leader. Task storage would be the natural place,
/// and exists from 5.11 on only.
#[btf_map]
static TASKS: HashMap<u64, Membership, 262_144, NO_PREALLOC> = HashMap::new();
/// Tasks that were born without room in `TASKS`, by address, with when they began: of each birth one is told.
#[btf_map]
static ROOMLESS: LruHashMap<u64, u64, 1024> = LruHashMap::new();
/// What runs containers on this host: files of the host that are known by device and inode alone.
#[btf_map]
static RUNTIMES: HashMap<FileId, u32, 64> = HashMap::new();
/// How far tasks, by address, are that a container runtime has put into a workload's cgroup and
/// that have run nothing of the workload's there yet.
#[btf_map]
static ENTERED: LruHashMap<u64, u32, 4096> = LruHashMap::new();
/// Cgroups that the host has made below a workload's, and in which nothing was started yet.
#[btf_map]
static BORN: LruHashMap<CgroupId, u32, 4096> = LruHashMap::new();
/// Cgroups of the host, by id, that have hooks for what was moved there.
#[btf_map]
static FOLLOWED: LruHashMap<CgroupId, u32, 4096> = LruHashMap::new();
/// Not zero once a process was moved, so that nobody looks for what has never been.
#[btf_map]
static MOVES: Array<u64, 1> = Array::new();
/// Not zero once the BPF LSM has called a program.
#[btf_map]
static LSM_CALLS: Array<u64, 1> = Array::new();

/// A slot for the program of a global hook that is in force.
type Gate = ProgramArray<1>;

/// The gates, one for each global hook: what is attached for good only looks here, so that one
/// write replaces the program behind it and no request meets none or two.
pub(crate) mod gates {
    use super::{Gate, btf_map};

    macro_rules! gates {
        ($($name:ident),+ $(,)?) => {
            $(
                #[btf_map]
                pub(crate) static $name: Gate = Gate::new();
            )+
        };
    }

    gates!(
        GATE_EXEC,
        GATE_FORK,
        GATE_WAKEUP,
        GATE_FREE,
        GATE_ATTACH,
        GATE_MKDIR,
        GATE_RMDIR,
        GATE_BPRM_CHECK,
        GATE_BPRM_COMMITTED,
        GATE_SOCKET_CREATE,
        GATE_SOCKET_CONNECT,
        GATE_SOCKET_SENDMSG,
        GATE_SOCKET_LISTEN,
        GATE_SOCKET_ACCEPT,
        GATE_FILE_RECEIVE,
        GATE_UNIX_RECEIVE,
        GATE_UNIX_CONNECT,
        GATE_UNIX_SEND,
    );
}

/// Goes on in the program that is in force behind a gate; returns only where there is none.
#[inline(always)]
pub(crate) fn pass_through(gate: &'static Gate, context: *mut core::ffi::c_void) {
    // SAFETY: the context is the hook's own, and every program in the slot is of the same hook.
    unsafe { bpf_tail_call(context, gate.as_ptr(), 0) };
}

macro_rules! local_storage {
    ($(#[$doc:meta])* $name:ident, $map_type:literal, $key:ty, $flags:expr) => {
        $(#[$doc])*
        #[repr(C)]
        struct $name<V> {
            r#type: *const [i32; $map_type],
            key: *const $key,
            value: *const V,
            max_entries: *const [i32; 0],
            map_flags: *const [i32; $flags],
        }

        // SAFETY: the pointers only carry types to the loader and are never followed.
        unsafe impl<V> Sync for $name<V> {}

        impl<V> $name<V> {
            const fn new() -> Self {
                Self {
                    r#type: core::ptr::null(),
                    key: core::ptr::null(),
                    value: core::ptr::null(),
                    max_entries: core::ptr::null(),
                    map_flags: core::ptr::null(),
                }
            }

            #[inline(always)]
            fn as_ptr(&'static self) -> *mut core::ffi::c_void {
                core::ptr::from_ref(self).cast_mut().cast()
            }
        }
    };
}

/// `struct bpf_cgroup_storage_key` of the kernel.
#[repr(C)]
struct CgroupStorageKey {
    cgroup_inode_id: u64,
    attach_type: u32,
}

local_storage!(
    /// `BPF_MAP_TYPE_CGROUP_STORAGE`: what user space left for the programs of one attachment.
    CgroupStorage, 19, CgroupStorageKey, 0
);
local_storage!(
    /// `BPF_MAP_TYPE_SK_STORAGE`, cloned to accepted sockets; aya's own takes no other flags.
    SocketStorage, 24, i32, NO_PREALLOC | CLONE
);

/// `BPF_MAP_TYPE_PROG_ARRAY`, whose slots user space fills.
#[repr(C)]
pub(crate) struct ProgramArray<const N: usize> {
    r#type: *const [i32; 3],
    key: *const u32,
    value: *const u32,
    max_entries: *const [i32; N],
    map_flags: *const [i32; 0],
}

// SAFETY: the pointers only carry types to the loader and are never followed.
unsafe impl<const N: usize> Sync for ProgramArray<N> {}

impl<const N: usize> ProgramArray<N> {
    const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }

    #[inline(always)]
    fn as_ptr(&'static self) -> *mut core::ffi::c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

/// Which rule a socket's packets are judged by.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// By where they go.
    Client = 0,
    /// By the port that others connected to.
    Server = 1,
}

/// What is known of a socket: its role, and the verdict on its last packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SocketVerdict {
    /// Jiffies until which the verdict needs no other look.
    pub(crate) fresh_until: u64,
    /// Packets that passed on this verdict since the last look.
    pub(crate) folded: u64,
    pub(crate) target: [u32; 4],
    pub(crate) workload: WorkloadId,
    pub(crate) allowlist: AllowlistId,
    pub(crate) port: u16,
    pub(crate) protocol: u8,
    pub(crate) verdict: u8,
    pub(crate) role: u8,
    pub(crate) reserved: [u8; 3],
}

impl SocketVerdict {
    pub(crate) const NEW: Self = Self {
        fresh_until: 0,
        folded: 0,
        target: [0; 4],
        workload: WorkloadId::NONE,
        allowlist: AllowlistId::NONE,
        port: 0,
        protocol: 0,
        verdict: 0,
        role: Role::Client as u8,
        reserved: [0; 3],
    };
}

/// The compiled allow-lists, as the decision sees them.
pub(crate) struct KernelTables;

impl Tables for KernelTables {
    #[inline(always)]
    fn destination(&self, allowlist: AllowlistId, address: &Address) -> Option<DestinationEntry> {
        let key = Key::new(DestinationKey::BITS, DestinationKey { allowlist, address: *address });
        DESTINATIONS.get(&key).copied()
    }

    #[inline(always)]
    fn rules(&self, id: RuleSetId) -> Option<&RuleRow> {
        // SAFETY: a row is written once, before any tag leads to it, and deleted a grace period
        // after the last tag did.
        unsafe { RULES.get(id) }
    }

    #[inline(always)]
    fn search(&self, rules: RuleSetId, protocol: u8, port: u16) -> Found {
        Found(search_rules(rules.0, protocol.into(), port.into()))
    }

    #[inline(always)]
    fn opaque(&self, number: u64) -> u64 {
        crate::kernel::barrier(number)
    }

    #[inline(always)]
    fn executable(&self, allowlist: AllowlistId, file: &FileId) -> Option<ExecutableEntry> {
        // SAFETY: as for rules.
        unsafe { EXECUTABLES.get(ExecutableKey::new(allowlist, file)) }.copied()
    }

    #[inline(always)]
    fn unix_socket(&self, allowlist: AllowlistId, socket: &UnixSocket) -> Option<Permission> {
        // SAFETY: as for rules.
        unsafe { UNIX_SOCKETS.get(UnixSocketKey::new(allowlist, socket)) }.copied()
    }
}

/// [`search`] as a global function: one that the verifier checks for itself, for all arguments, and
/// then takes for granted wherever it is called. Such a function takes and returns plain numbers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn search_rules(rules: u32, protocol: u32, port: u32) -> u64 {
    search(&KernelTables, RuleSetId(rules), protocol as u8, port as u16).0
}

/// Looks at a row that is being replaced; the next look finds the new one.
const LOOKS: usize = 3;

/// The tag of a workload. `None` also where it changes hands faster than it can be read, so that
/// nothing is decided by a mixture.
#[inline(always)]
pub(crate) fn tag(workload: WorkloadId) -> Option<Tag> {
    for _ in 0..LOOKS {
        let row = WORKLOADS.get_ptr(workload)?;
        // SAFETY: the row stays mapped while the program runs. It may be replaced while it is
        // read, which the tag itself tells.
        let tag = unsafe { core::ptr::read_volatile(row) };
        if tag.is_whole(workload) {
            return Some(tag);
        }
    }
    None
}

/// As [`tag`], with what holds where there is none. In one go: out of an `Option` the compiler would
/// choose field by field, and read those of a tag that is not there, which old verifiers refuse.
#[inline(always)]
pub(crate) fn tag_or(workload: WorkloadId, otherwise: Tag) -> Tag {
    let Some(row) = WORKLOADS.get_ptr(workload) else { return otherwise };
    // SAFETY: as for `tag`.
    let tag = unsafe { core::ptr::read_volatile(row) };
    if tag.is_whole(workload) { tag } else { otherwise }
}

/// Whether a workload was ever granted to be reached at a local port.
#[inline(always)]
pub(crate) fn may_serve(workload: WorkloadId, protocol: u8, port: u16) -> bool {
    tag(workload).is_some_and(|tag| {
        tag.listening.is_some()
            && KernelTables.search(tag.listening, protocol, port) != Found::NOTHING
    })
}

/// The workload whose cgroup this is.
#[inline(always)]
pub(crate) fn member(cgroup: CgroupId) -> Option<WorkloadId> {
    // SAFETY: an entry never changes between its insertion and its removal.
    unsafe { CGROUPS.get(cgroup) }.map(|membership| membership.workload)
}

/// Makes a cgroup part of a workload. `false`: there is no room.
#[inline(always)]
pub(crate) fn adopt(cgroup: CgroupId, workload: WorkloadId) -> bool {
    CGROUPS.insert(cgroup, Membership { workload }, BPF_ANY.into()).is_ok()
}

/// Forgets a cgroup that is gone.
#[inline(always)]
pub(crate) fn forget(cgroup: CgroupId) {
    // Most cgroups that go were nobody's, so there is often nothing to remove.
    if member(cgroup).is_some() {
        let _absent = CGROUPS.remove(cgroup);
        let _absent = BORN.remove(cgroup);
    }
    if has_hooks(cgroup) {
        let _absent = FOLLOWED.remove(cgroup);
    }
}

/// Where a process is that the host moved out of its workload's cgroup, and whose it is.
#[inline(always)]
pub(crate) fn moved(tgid: u32) -> Option<&'static Moved> {
    if MOVES.get(0).is_none_or(|ever| *ever == 0) {
        return None;
    }
    // SAFETY: an entry is replaced as a whole.
    unsafe { MOVED.get(tgid) }
}

/// Remembers a process that left its workload's cgroup and keeps its tag. `false`: no room.
#[inline(always)]
pub(crate) fn follow(tgid: u32, cgroup: CgroupId, workload: WorkloadId) -> bool {
    let moved = Moved { cgroup: cgroup.0, workload, reserved: 0 };
    let _one = MOVES.set(0, 1, BPF_ANY.into());
    MOVED.insert(tgid, moved, BPF_ANY.into()).is_ok()
}

/// Whether a cgroup of the host has hooks for what was moved there.
#[inline(always)]
pub(crate) fn has_hooks(cgroup: CgroupId) -> bool {
    // SAFETY: only whether the entry is there is asked.
    unsafe { FOLLOWED.get(cgroup) }.is_some()
}

/// Forgets a process that ended or came back.
#[inline(always)]
pub(crate) fn unfollow(tgid: u32) {
    if moved(tgid).is_some() {
        let _absent = MOVED.remove(tgid);
    }
}

/// The verdict last given to the same request.
#[inline(always)]
pub(crate) fn cached(key: &RequestKey) -> Option<&'static mut CachedVerdict> {
    // SAFETY: the element stays mapped while the program runs. CPUs that share it race on plain
    // words only: a lost increment of `folded` makes a record's note smaller, never a counter.
    VERDICTS.get_ptr_mut(key).map(|cached| unsafe { &mut *cached })
}

/// Remembers a verdict.
#[inline(always)]
pub(crate) fn cache(key: &RequestKey, verdict: &CachedVerdict) {
    // A table of this kind makes room by itself; under contention it may refuse, and then the
    // next request is decided afresh.
    let _uncached = VERDICTS.insert(key, verdict, BPF_ANY.into());
}

/// This CPU's row of counters.
#[inline(always)]
pub(crate) fn counters(row: u16) -> Option<&'static mut Counters> {
    let counters =
        COUNTERS.get_ptr_mut(u32::from(row)).or_else(|| COUNTERS.get_ptr_mut(u32::from(OTHER)))?;
    // SAFETY: the row belongs to this CPU and outlives the program. A program that interrupts
    // another on the same CPU is never of the same attachment; the counters are added to with
    // single instructions.
    Some(unsafe { &mut *counters })
}

/// What can be changed while programs run.
#[inline(always)]
pub(crate) fn settings() -> Settings {
    const NONE: Settings = Settings { aggregation_window: 0, diagnostics: 0, reserved: 0 };
    SETTINGS.get(0).copied().unwrap_or(NONE)
}

/// The ring for records of denials.
#[inline(always)]
pub(crate) fn denied() -> *mut core::ffi::c_void {
    core::ptr::from_ref(&DENIED).cast_mut().cast()
}

/// The ring for all other records.
#[inline(always)]
pub(crate) fn allowed() -> *mut core::ffi::c_void {
    core::ptr::from_ref(&ALLOWED).cast_mut().cast()
}

/// A process of which nothing is known yet; in a map because it is half a stack.
#[btf_map]
static BLANK: Array<Process, 1> = Array::new();

/// Makes room for what is known of a process.
#[inline(always)]
pub(crate) fn remember_new(tgid: u32) {
    if let Some(blank) = BLANK.get(0) {
        // As for the cache: what does not fit is read from procfs, or said to be unknown.
        let _forgotten = PROCESSES.insert(tgid, blank, BPF_ANY.into());
    }
}

/// A child is known by what its parent runs, until it runs something else.
#[inline(always)]
pub(crate) fn inherit_process(parent: u32, child: u32, start: u64) {
    let Some(known) = process(parent) else { return };
    let _forgotten = PROCESSES.insert(child, *known, BPF_ANY.into());
    if let Some(known) = process(child) {
        known.start = start;
        known.parent = parent;
    }
}

/// What is known of a process.
#[inline(always)]
pub(crate) fn process(tgid: u32) -> Option<&'static mut Process> {
    // SAFETY: as for `cached`: the element stays mapped, and races touch a record's text only.
    PROCESSES.get_ptr_mut(tgid).map(|process| unsafe { &mut *process })
}

/// What user space left with this attachment.
#[inline(always)]
pub(crate) fn attachment() -> Attachment {
    // SAFETY: the helper never returns null for a program attached to a cgroup.
    unsafe { *bpf_get_local_storage(ATTACHMENTS.as_ptr(), 0).cast::<Attachment>() }
}

/// What is known of a socket.
///
/// # Safety
///
/// `socket` is the kernel's pointer to a full socket.
#[inline(always)]
pub(crate) unsafe fn socket(socket: *mut bpf_sock) -> Option<&'static mut SocketVerdict> {
    // SAFETY: the caller's promise; the value lives as long as the socket.
    unsafe {
        bpf_sk_storage_get(SOCKETS.as_ptr(), socket.cast(), core::ptr::null_mut(), 0)
            .cast::<SocketVerdict>()
            .as_mut()
    }
}

/// What is known of a socket, nothing yet if it is new. `None`: no memory.
///
/// # Safety
///
/// As for [`socket`].
#[inline(always)]
pub(crate) unsafe fn socket_or_new(socket: *mut bpf_sock) -> Option<&'static mut SocketVerdict> {
    let mut new = SocketVerdict::NEW;
    // SAFETY: the caller's promise; the kernel copies `new`.
    unsafe {
        bpf_sk_storage_get(
            SOCKETS.as_ptr(),
            socket.cast(),
            core::ptr::from_mut(&mut new).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
        .cast::<SocketVerdict>()
        .as_mut()
    }
}

/// The workload of the task at this address by descent, wherever it is now; none once user space
/// has forgotten the workload.
#[inline(always)]
pub(crate) fn task(address: u64) -> Option<WorkloadId> {
    // SAFETY: an entry is replaced as a whole; of a workload's row only whether it is there is asked.
    unsafe {
        TASKS
            .get(address)
            .map(|membership| membership.workload)
            .filter(|workload| WORKLOADS.get(workload).is_some())
    }
}

/// Whether a workload gives way to the one whose a cgroup is by now.
#[inline(always)]
pub(crate) fn gives_way(workload: WorkloadId) -> bool {
    tag(workload).is_some_and(|tag| tag.gives_way())
}

/// Ties the task at this address to a workload. `false`: there is no room.
#[inline(always)]
pub(crate) fn tie(address: u64, workload: WorkloadId) -> bool {
    TASKS.insert(address, Membership { workload }, BPF_ANY.into()).is_ok()
}

/// Forgets a task that is gone: its address may become another's.
#[inline(always)]
pub(crate) fn untie(address: u64) {
    // SAFETY: only whether the entry is there is asked: most tasks are nobody's.
    if unsafe { TASKS.get(address) }.is_some() {
        let _absent = TASKS.remove(address);
    }
}

/// Notes that a task, which began at `start`, was born without room.
#[inline(always)]
pub(crate) fn note_no_room(address: u64, start: u64) {
    let _full = ROOMLESS.insert(address, start, BPF_ANY.into());
}

/// Whether [`note_no_room`] noted this task, and not one that was at its address before.
#[inline(always)]
pub(crate) fn found_no_room(address: u64, start: u64) -> bool {
    // SAFETY: an entry is one word.
    unsafe { ROOMLESS.get(address) }.is_some_and(|noted| *noted == start)
}

/// Whether a file is one that runs containers on this host.
#[inline(always)]
pub(crate) fn is_runtime(file: &FileId) -> bool {
    // SAFETY: only whether the entry is there is asked.
    unsafe { RUNTIMES.get(file) }.is_some()
}

/// How far a task is that a container runtime has put into a workload's cgroup. A number and not an
/// `Option` of one: what is not there the compiler would leave unset, and read where it does no harm,
/// which the verifier refuses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stage(u32);

impl Stage {
    /// It is the workload's like any other.
    pub(crate) const NONE: Self = Self(u32::MAX);
    /// It has run nothing there yet.
    pub(crate) const ENTERED: Self = Self(0);
    /// It has run the runtime's own file.
    pub(crate) const PREPARED: Self = Self(1);
    /// It is about to run what starts the container.
    pub(crate) const STARTING: Self = Self(2);
}

/// Notes how far a task is that a container runtime put into a workload's cgroup. Of one that does
/// not fit in any more, the steps are judged as the workload's.
#[inline(always)]
pub(crate) fn set_stage(address: u64, stage: Stage) {
    let _full = ENTERED.insert(address, stage.0, BPF_ANY.into());
}

/// How far the task is.
#[inline(always)]
pub(crate) fn stage(address: u64) -> Stage {
    // SAFETY: an entry is one word.
    unsafe { ENTERED.get(address) }.map_or(Stage::NONE, |stage| Stage(*stage))
}

/// From now on the task is the workload's like any other.
#[inline(always)]
pub(crate) fn settle(address: u64) {
    if stage(address) != Stage::NONE {
        let _absent = ENTERED.remove(address);
    }
}

/// Notes a cgroup that the host has made below a workload's. In one that does not fit in any more
/// nothing is started that is not granted.
#[inline(always)]
pub(crate) fn born(cgroup: CgroupId) {
    let _full = BORN.insert(cgroup, 0, BPF_ANY.into());
}

/// Whether nothing was started yet in a cgroup that [`born`] noted: once true for one caller, never
/// again.
#[inline(always)]
pub(crate) fn is_first_start(cgroup: CgroupId) -> bool {
    BORN.remove(cgroup).is_ok()
}

/// The number of a unix socket's name; none if no scope mentions it.
#[inline(always)]
pub(crate) fn unix_name(name: &UnixName) -> UnixNameId {
    // SAFETY: an entry never changes between its insertion and its removal.
    unsafe { UNIX_NAMES.get(name) }.copied().unwrap_or(UnixNameId::NONE)
}

/// Tells user space that the BPF LSM calls programs.
#[inline(always)]
pub(crate) fn lsm_called() {
    let _one = LSM_CALLS.set(0, 1, BPF_ANY.into());
}
