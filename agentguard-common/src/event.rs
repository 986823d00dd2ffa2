//! What the kernel tells user space about a verdict.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    Address, AllowlistId, FileId, GrantId, IdentityId, Naming, ScopeId, UnixNameId, UnixSocket,
    WorkloadId,
};

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
    BprmCheck = 10,
    SocketCreate = 11,
    SocketConnect = 12,
    SocketSendmsg = 13,
    SocketListen = 14,
    SocketAccept = 15,
    UnixStreamConnect = 16,
    UnixMaySend = 17,
    FileReceive = 18,
}

/// A layer of hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Layer {
    /// What every supported kernel has.
    Portable,
    /// What is added where the BPF LSM is active.
    Lsm,
}

impl Layer {
    pub const ALL: [Self; 2] = [Self::Portable, Self::Lsm];

    /// The word used in status, records and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Lsm => "lsm",
        }
    }
}

impl Hook {
    pub const ALL: [Self; 19] = [
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
        Self::BprmCheck,
        Self::SocketCreate,
        Self::SocketConnect,
        Self::SocketSendmsg,
        Self::SocketListen,
        Self::SocketAccept,
        Self::UnixStreamConnect,
        Self::UnixMaySend,
        Self::FileReceive,
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
            Self::BprmCheck => "lsm/bprm_check_security",
            Self::SocketCreate => "lsm/socket_create",
            Self::SocketConnect => "lsm/socket_connect",
            Self::SocketSendmsg => "lsm/socket_sendmsg",
            Self::SocketListen => "lsm/socket_listen",
            Self::SocketAccept => "lsm/socket_accept",
            Self::UnixStreamConnect => "lsm/unix_stream_connect",
            Self::UnixMaySend => "lsm/unix_may_send",
            Self::FileReceive => "lsm/file_receive",
        }
    }

    /// The layer this hook is of.
    #[must_use]
    pub const fn layer(self) -> Layer {
        match self {
            Self::Connect4
            | Self::Connect6
            | Self::Sendmsg4
            | Self::Sendmsg6
            | Self::Bind4
            | Self::Bind6
            | Self::SockCreate
            | Self::Egress
            | Self::Exec
            | Self::Leave => Layer::Portable,
            Self::BprmCheck
            | Self::SocketCreate
            | Self::SocketConnect
            | Self::SocketSendmsg
            | Self::SocketListen
            | Self::SocketAccept
            | Self::UnixStreamConnect
            | Self::UnixMaySend
            | Self::FileReceive => Layer::Lsm,
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
    Listen = 10,
    Accept = 11,
    Socket = 12,
    UnixConnect = 13,
    UnixSend = 14,
}

impl RequestKind {
    pub const ALL: [Self; 14] = [
        Self::Connect,
        Self::Send,
        Self::Packet,
        Self::Reply,
        Self::Bind,
        Self::RawSocket,
        Self::Exec,
        Self::Leave,
        Self::Malformed,
        Self::Listen,
        Self::Accept,
        Self::Socket,
        Self::UnixConnect,
        Self::UnixSend,
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
            Self::Listen => "listen",
            Self::Accept => "accept",
            Self::Socket => "socket",
            Self::UnixConnect => "unix_connect",
            Self::UnixSend => "unix_send",
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
    /// Network: the address. Exec: the [`FileId`]. Unix: the [`UnixSocket`]. Socket: family and
    /// protocol. Leave: the cgroup, in the first two words, low word first. Otherwise zero.
    pub target: [u32; 4],
    /// Host byte order.
    pub port: u16,
    /// The IP protocol. Unix: whose the socket at the other end is.
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
    /// Listen and accept: both ask for a local port that others come to.
    Serving = 5,
    /// Connect and send to a unix socket.
    Unix = 6,
    /// A socket of a family.
    Family = 7,
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
    /// Unix: how many bytes of the path are the name the server bound, as the kernel keeps it;
    /// the first byte of an abstract one is NUL.
    pub name_length: u8,
    /// Whether the task that left is not the caller, so that not every kernel can end it.
    pub of_another: u8,
    pub reserved: u8,
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

    /// Whether the exec is what a container runtime starts a container with.
    #[must_use]
    pub const fn is_start(&self) -> bool {
        self.kind == RequestKind::Exec as u8 && self.key.port == Naming::Starting as u16
    }

    /// The target of a connect or send to a unix socket.
    #[must_use]
    pub const fn unix_socket(&self) -> UnixSocket {
        RequestKey::unix_socket_of(&self.key.target)
    }

    /// Family and protocol of a socket.
    #[must_use]
    pub const fn socket(&self) -> (u16, u16) {
        let [family, protocol, ..] = self.key.target;
        (family as u16, protocol as u16)
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

    /// The words of a [`UnixSocket`].
    #[inline(always)]
    #[must_use]
    pub const fn unix_socket_words(socket: &UnixSocket) -> [u32; 4] {
        let UnixSocket { directory, device, name } = *socket;
        [directory as u32, (directory >> 32) as u32, device, name.0]
    }

    /// The [`UnixSocket`] of such words.
    #[inline(always)]
    #[must_use]
    pub const fn unix_socket_of(words: &[u32; 4]) -> UnixSocket {
        let [low, high, device, name] = *words;
        let directory = (high as u64) << 32 | low as u64;
        UnixSocket { directory, device, name: UnixNameId(name) }
    }
}

/// The record of an exec or of a unix socket: an [`Event`] and a path.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct PathEvent {
    pub event: Event,
    /// Exec: the path as the caller named it, NUL-terminated, cut at [`PATH_BYTES`]. Unix: see
    /// [`Event::name_length`].
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
