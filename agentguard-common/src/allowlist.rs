//! The compiled form of what the grants of one identity permit: keys and entries of the tables.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    Address, AllowlistId, FileId, GrantId, IdentityId, Mode, RuleSetId, ScopeId, UnixNameId,
    UnixSocket, WorkloadId,
};

/// `expires_at` of a permission that does not end. The upper half of the numbers is not used, so
/// that the sign of a difference tells which of two ends later.
pub const NEVER: u64 = i64::MAX as u64;

/// Which scope and grant permit something, and until when.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct Permission {
    /// Nanoseconds of boot time (`CLOCK_BOOTTIME`); [`NEVER`] for a standing grant.
    pub expires_at: u64,
    pub scope: ScopeId,
    pub grant: GrantId,
}

impl Permission {
    /// Permits nothing.
    pub const NONE: Self = Self { expires_at: 0, scope: ScopeId::NONE, grant: GrantId::NONE };
}

/// The row of one workload: what the kernel holds it to. Replacing it is the switch from one
/// generation to the next.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout,
)]
pub struct Tag {
    /// Shifts all that follows: who reads the tables of another version reads nonsense.
    #[cfg(feature = "next-abi")]
    shift: u32,
    pub allowlist: AllowlistId,
    /// Whose row it is, so that a reader who was held up knows when the row has become another's.
    workload: WorkloadId,
    /// The rules for listening.
    pub listening: RuleSetId,
    /// [`IdentityId::NONE`] while the workload is known to be an agent but not yet which: it is
    /// denied everything.
    pub identity: IdentityId,
    /// Row of the counters.
    pub counters: u16,
    mode: u8,
    /// [`STARTS_CONTAINERS`] and [`GIVES_WAY`], added up.
    flags: u8,
    /// The allow-list once more. Generations are never used again, so a row whose two ends agree
    /// was not replaced while it was read.
    seal: AllowlistId,
}

/// Container runtimes start containers in cgroups below.
const STARTS_CONTAINERS: u8 = 1;
/// The workload's cgroups become another's.
const GIVES_WAY: u8 = 2;

impl Tag {
    #[must_use]
    pub const fn new(
        identity: IdentityId,
        mode: Mode,
        allowlist: AllowlistId,
        listening: RuleSetId,
        counters: u16,
    ) -> Self {
        Self {
            #[cfg(feature = "next-abi")]
            shift: u32::MAX,
            allowlist,
            workload: WorkloadId::NONE,
            listening,
            identity,
            counters,
            mode: mode as u8,
            flags: 0,
            seal: allowlist,
        }
    }

    /// The tag as the row of a workload.
    #[must_use]
    pub const fn of(self, workload: WorkloadId) -> Self {
        Self { workload, ..self }
    }

    /// The tag of a pod: the first program that a container runtime runs in each cgroup that the host
    /// makes below is allowed.
    #[must_use]
    pub const fn starting_containers(self) -> Self {
        Self { flags: self.flags | STARTS_CONTAINERS, ..self }
    }

    #[inline(always)]
    #[must_use]
    pub const fn starts_containers(&self) -> bool {
        self.flags & STARTS_CONTAINERS != 0
    }

    /// The tag of a workload whose cgroups become another's: a task that is tied to it and lies in the
    /// other's belongs to that one already.
    #[must_use]
    pub const fn giving_way(self) -> Self {
        Self { flags: self.flags | GIVES_WAY, ..self }
    }

    #[inline(always)]
    #[must_use]
    pub const fn gives_way(&self) -> bool {
        self.flags & GIVES_WAY != 0
    }

    /// Whether this was read whole, and from the row of this workload.
    ///
    /// The kernel gives the memory of a replaced row to the next row at once
    /// (`htab_map_update_elem`, kernel/bpf/hashtab.c); a program that was held up between its
    /// look-up and its last read finds whatever is there by then.
    #[inline(always)]
    #[must_use]
    pub const fn is_whole(&self, workload: WorkloadId) -> bool {
        self.allowlist.0 == self.seal.0 && self.workload.0 == workload.0
    }

    /// Anything that is not plainly audit enforces.
    #[inline(always)]
    #[must_use]
    pub const fn mode(&self) -> Mode {
        if self.mode == Mode::Audit as u8 { Mode::Audit } else { Mode::Enforce }
    }
}

/// What is longest-prefix matched: the allow-list in full, then as much of the address as the
/// prefix is long.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct DestinationKey {
    pub allowlist: AllowlistId,
    pub address: Address,
}

impl DestinationKey {
    /// Bits of the key before the address.
    pub const ALLOWLIST_BITS: u32 = 32;
    /// Bits of the whole key.
    pub const BITS: u32 = Self::ALLOWLIST_BITS + 128;
}

/// What the longest covering prefix permits: everything that its own and all wider blocks permit
/// there, folded together when the allow-list was compiled.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct DestinationEntry {
    /// [`RuleSetId::NONE`] where a block's exception leaves nothing.
    pub rules: RuleSetId,
    /// Bits of the address, 0 to 128.
    pub prefix: u32,
}

impl DestinationEntry {
    /// No block covers what this entry covers. It stands at `::ffff:0:0/96` where a wider IPv6
    /// block would answer for IPv4 too, which an IPv6 block never permits.
    pub const UNCOVERED: Self = Self { rules: RuleSetId::NONE, prefix: u32::MAX };
}

/// One permission for a protocol and a range of ports.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct Rule {
    pub permission: Permission,
    /// First and last port, host byte order.
    pub first_port: u16,
    pub last_port: u16,
    protocol: u8,
    /// Which bits of the protocol count: all, or none where the rule is for every protocol.
    mask: u8,
    reserved: [u8; 2],
}

impl Rule {
    /// Permits nothing: no port is at least 1 and at most 0.
    pub const NOTHING: Self = Self {
        permission: Permission::NONE,
        first_port: 1,
        last_port: 0,
        protocol: 0,
        mask: 0,
        reserved: [0; 2],
    };

    /// A permission for ports `first_port` to `last_port` (host byte order, both included) of
    /// `protocol`, a canonical IP protocol number; zero for every protocol.
    #[must_use]
    pub const fn new(
        permission: Permission,
        protocol: u8,
        first_port: u16,
        last_port: u16,
    ) -> Self {
        let mask = if protocol == 0 { 0 } else { u8::MAX };
        Self { permission, first_port, last_port, protocol, mask, reserved: [0; 2] }
    }

    /// The protocol this rule is for; zero for every protocol.
    #[must_use]
    pub const fn protocol(&self) -> u8 {
        self.protocol
    }

    /// Negative unless the rule is for this protocol and port; without a branch, see
    /// [`decide`](crate::decide()).
    #[inline(always)]
    #[must_use]
    pub const fn misses(&self, protocol: u8, port: u16) -> i64 {
        let below = port as i64 - self.first_port as i64;
        let above = self.last_port as i64 - port as i64;
        let other = ((self.protocol ^ protocol) & self.mask) as i64;
        below | above | -other
    }
}

/// Rules in one row; a longer set goes on in another.
pub const RULES_PER_ROW: usize = 8;
/// Rows in one set.
pub const ROWS_PER_SET: usize = 8;
/// The most rules that one destination can have.
pub const MAX_RULES: usize = RULES_PER_ROW * ROWS_PER_SET;

/// A row of rules.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct RuleRow {
    pub rules: [Rule; RULES_PER_ROW],
    /// The row that goes on with this set.
    pub next: RuleSetId,
    pub reserved: u32,
}

/// Which file an allow-list permits to run.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct ExecutableKey {
    pub inode: u64,
    pub device: u32,
    pub allowlist: AllowlistId,
}

impl ExecutableKey {
    #[inline(always)]
    #[must_use]
    pub const fn new(allowlist: AllowlistId, file: &FileId) -> Self {
        Self { inode: file.inode, device: file.device, allowlist }
    }
}

/// The permission to run a file.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct ExecutableEntry {
    pub permission: Permission,
    /// [`FileId::generation`] when it was granted; zero where the file system could not tell.
    pub generation: u32,
    pub reserved: u32,
}

/// Which unix socket an allow-list permits to connect and send to.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct UnixSocketKey {
    pub directory: u64,
    pub device: u32,
    pub name: UnixNameId,
    pub allowlist: AllowlistId,
    pub reserved: u32,
}

impl UnixSocketKey {
    #[inline(always)]
    #[must_use]
    pub const fn new(allowlist: AllowlistId, socket: &UnixSocket) -> Self {
        let UnixSocket { directory, device, name } = *socket;
        Self { directory, device, name, allowlist, reserved: 0 }
    }
}

/// The longest name of a unix socket (`UNIX_PATH_MAX` of the kernel), in bytes.
pub const UNIX_NAME_BYTES: usize = 108;

/// A name of a unix socket that some scope mentions, as the key of its number: the last part of
/// a path, or an abstract name without its leading NUL.
#[repr(C)]
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
)]
pub struct UnixName {
    /// Zero for a path, one for an abstract name: the same bytes are two names.
    is_abstract: u16,
    length: u16,
    /// Zero beyond `length`.
    bytes: [u8; UNIX_NAME_BYTES],
}

impl UnixName {
    /// The key of a path's last part.
    ///
    /// `None`: no socket can have that name.
    #[must_use]
    pub fn path(name: &[u8]) -> Option<Self> {
        Self::new(0, name)
    }

    /// The key of an abstract name, given without its leading NUL.
    ///
    /// `None`: no socket can have that name.
    #[must_use]
    pub fn abstract_name(name: &[u8]) -> Option<Self> {
        Self::new(1, name).filter(|_| name.len() < UNIX_NAME_BYTES)
    }

    fn new(is_abstract: u16, name: &[u8]) -> Option<Self> {
        let mut bytes = [0; UNIX_NAME_BYTES];
        bytes.get_mut(..name.len())?.copy_from_slice(name);
        let length = u16::try_from(name.len()).ok()?;
        (length > 0).then_some(Self { is_abstract, length, bytes })
    }
}
