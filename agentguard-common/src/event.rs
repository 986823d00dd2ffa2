//! What the kernel tells user space about a verdict.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Address, AllowlistId, FileId, GrantId, IdentityId, ScopeId, WorkloadId};

/// Where in the kernel a request was met. The codes are part of the ABI.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    Connect4 = 0,
    Connect6 = 1,
    Sendmsg4 = 2,
    Sendmsg6 = 3,
    Bind4 = 4,
    Bind6 = 5,
    SockCreate = 6,
    Egress = 7,
    Exec = 8,
    /// A task that leaves its workload's cgroup, by a move or by being born elsewhere.
    Leave = 9,
}

impl Hook {
    /// Room for hooks in the counters; a power of two, so that the verifier sees a mask.
    pub const SLOTS: usize = 16;

    pub const ALL: [Self; 10] = [
        Self::Connect4,
        Self::Connect6,
        Self::Sendmsg4,
        Self::Sendmsg6,
        Self::Bind4,
        Self::Bind6,
        Self::SockCreate,
        Self::Egress,
        Self::Exec,
        Self::Leave,
    ];

    /// The word used in records and metrics: the kernel's own name of the hook.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connect4 => "cgroup/connect4",
            Self::Connect6 => "cgroup/connect6",
            Self::Sendmsg4 => "cgroup/sendmsg4",
            Self::Sendmsg6 => "cgroup/sendmsg6",
            Self::Bind4 => "cgroup/bind4",
            Self::Bind6 => "cgroup/bind6",
            Self::SockCreate => "cgroup/sock_create",
            Self::Egress => "cgroup_skb/egress",
            Self::Exec => "tp_btf/sched_process_exec",
            Self::Leave => "tp_btf/cgroup_attach_task",
        }
    }
}

/// A code that names no [`Hook`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownHook(pub u8);

impl TryFrom<u8> for Hook {
    type Error = UnknownHook;

    fn try_from(code: u8) -> Result<Self, UnknownHook> {
        Self::ALL.into_iter().find(|hook| *hook as u8 == code).ok_or(UnknownHook(code))
    }
}

/// What was asked, as records name it. The codes are part of the ABI.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RequestKind {
    Connect = 1,
    Send = 2,
    Packet = 3,
    Reply = 4,
    Bind = 5,
    RawSocket = 6,
    Exec = 7,
    Leave = 8,
    Malformed = 9,
}

impl RequestKind {
    pub const ALL: [Self; 9] = [
        Self::Connect,
        Self::Send,
        Self::Packet,
        Self::Reply,
        Self::Bind,
        Self::RawSocket,
        Self::Exec,
        Self::Leave,
        Self::Malformed,
    ];

    /// The word used in records.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Send => "send",
            Self::Packet => "packet",
            Self::Reply => "reply",
            Self::Bind => "bind",
            Self::RawSocket => "raw_socket",
            Self::Exec => "exec",
            Self::Leave => "leave",
            Self::Malformed => "malformed",
        }
    }
}

/// A code that names no [`RequestKind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownRequestKind(pub u8);

impl TryFrom<u8> for RequestKind {
    type Error = UnknownRequestKind;

    fn try_from(code: u8) -> Result<Self, UnknownRequestKind> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == code).ok_or(UnknownRequestKind(code))
    }
}

/// What is asked, in the form by which verdicts are cached and folded together: requests with the
/// same key have the same verdict for as long as its permission lasts.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct RequestKey {
    pub workload: WorkloadId,
    pub allowlist: AllowlistId,
    /// Network: the address. Exec: the [`FileId`]. Leave: the cgroup, in the first two words, low
    /// word first. Otherwise zero.
    pub target: [u32; 4],
    /// Host byte order.
    pub port: u16,
    pub protocol: u8,
    /// Which requests share a verdict: see [`Class`].
    pub class: u8,
    /// Class [`Class::Other`]: the [`RequestKind`]. Otherwise zero.
    pub reserved: u32,
}

/// Requests of one class and the same target share a verdict.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Connect, send and packet: all ask for a destination.
    Destination = 1,
    /// Bind and reply: both ask for a local port.
    Local = 2,
    Exec = 3,
    /// What has no target.
    Other = 4,
}

/// Longest path kept of an executable, in bytes, with its terminating NUL.
pub const PATH_BYTES: usize = 256;
/// `TASK_COMM_LEN` of the kernel.
pub const COMM_BYTES: usize = 16;

/// One record. Numbers only; user space joins the names.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct Event {
    /// Nanoseconds of boot time.
    pub time: u64,
    /// Verdicts folded into the previous record of the same key since it was written.
    pub folded: u64,
    /// The cgroup of the calling task.
    pub cgroup: u64,
    /// See [`RequestKey`]; all but the workload and allow-list of it is the target.
    pub key: RequestKey,
    pub identity: IdentityId,
    pub scope: ScopeId,
    pub grant: GrantId,
    pub pid: u32,
    pub tid: u32,
    pub uid: u32,
    pub comm: [u8; COMM_BYTES],
    pub hook: u8,
    pub verdict: u8,
    pub mode: u8,
    pub kind: u8,
    /// Whether the caller is not the task that asked: the packet left in another's context.
    pub detached: u8,
    pub reserved: [u8; 3],
}

impl Event {
    /// The target of a network request.
    #[must_use]
    pub const fn address(&self) -> Address {
        Address::from_words(self.key.target)
    }

    /// The target of an exec.
    #[must_use]
    pub const fn file(&self) -> FileId {
        RequestKey::file_of(&self.key.target)
    }
}

impl RequestKey {
    /// The words of a [`FileId`].
    #[inline(always)]
    #[must_use]
    pub const fn file_words(file: &FileId) -> [u32; 4] {
        [file.inode as u32, (file.inode >> 32) as u32, file.device, file.generation]
    }

    /// The [`FileId`] of such words.
    #[inline(always)]
    #[must_use]
    pub const fn file_of(words: &[u32; 4]) -> FileId {
        let [low, high, device, generation] = *words;
        FileId { inode: (high as u64) << 32 | low as u64, device, generation }
    }
}

/// The record of an exec: an [`Event`] and the path as the caller named it.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct ExecEvent {
    pub event: Event,
    /// NUL-terminated; cut at [`PATH_BYTES`].
    pub path: [u8; PATH_BYTES],
}

/// What is kept of a process of a workload, so that a record can name its ancestors after they
/// are gone.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct Process {
    /// Nanoseconds of boot time.
    pub start: u64,
    pub parent: u32,
    pub workload: WorkloadId,
    pub file: FileId,
    /// The path it was started by, NUL-terminated.
    pub path: [u8; PATH_BYTES],
}
