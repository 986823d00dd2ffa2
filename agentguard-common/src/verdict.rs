//! What the decision answers.

use crate::allowlist::Permission;

/// Why a request is denied. The codes are part of the ABI and never reused.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// No grant covers the target.
    NotGranted = 2,
    /// A grant covers the address, but not this protocol and port.
    PortNotGranted = 3,
    /// The address is excepted from the block that covers it.
    Excepted = 4,
    /// The grant that covered it is over.
    Expired = 5,
    /// A cloud's metadata address, which no scope names exactly.
    Metadata = 6,
    /// The workload is known to be an agent, but its identity is not known yet.
    Unidentified = 7,
    /// The hook could not read the request.
    Malformed = 8,
    /// A raw IP socket.
    RawSocket = 9,
    /// The file to run has no name: `memfd`, `O_TMPFILE`, deleted.
    UnnamedFile = 10,
    /// The inode is granted, but the file system has given it to another file since.
    ReplacedFile = 11,
    /// A process left, or was sent out of, its workload's cgroup by the workload itself.
    LeftWorkload = 12,
    /// The kernel's tables do not hold what the tag points to.
    MissingTable = 13,
    /// A family of sockets that no scope can grant.
    SocketFamily = 14,
}

impl Reason {
    pub const ALL: [Self; 13] = [
        Self::NotGranted,
        Self::PortNotGranted,
        Self::Excepted,
        Self::Expired,
        Self::Metadata,
        Self::Unidentified,
        Self::Malformed,
        Self::RawSocket,
        Self::UnnamedFile,
        Self::ReplacedFile,
        Self::LeftWorkload,
        Self::MissingTable,
        Self::SocketFamily,
    ];

    /// The word used in records and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotGranted => "not_granted",
            Self::PortNotGranted => "port_not_granted",
            Self::Excepted => "excepted",
            Self::Expired => "expired",
            Self::Metadata => "metadata",
            Self::Unidentified => "unidentified",
            Self::Malformed => "malformed",
            Self::RawSocket => "raw_socket",
            Self::UnnamedFile => "unnamed_file",
            Self::ReplacedFile => "replaced_file",
            Self::LeftWorkload => "left_workload",
            Self::MissingTable => "missing_table",
            Self::SocketFamily => "socket_family",
        }
    }
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not an agent: agentguard has no say.
    Unmanaged,
    Allow,
    Deny(Reason),
}

impl Verdict {
    /// How many codes there are, from 0 on.
    pub const CODES: usize = Reason::ALL.len() + 2;

    /// The number by which the kernel counts and records it.
    #[inline(always)]
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Unmanaged => 0,
            Self::Allow => 1,
            Self::Deny(reason) => reason as u8,
        }
    }

    /// The word used in records and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unmanaged => "unmanaged",
            Self::Allow => "allow",
            Self::Deny(_) => "deny",
        }
    }

    /// Why, where it is a denial.
    #[must_use]
    pub const fn reason(self) -> Option<Reason> {
        match self {
            Self::Unmanaged | Self::Allow => None,
            Self::Deny(reason) => Some(reason),
        }
    }
}

/// A code that names no [`Verdict`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownVerdict(pub u8);

impl TryFrom<u8> for Verdict {
    type Error = UnknownVerdict;

    #[inline(always)]
    fn try_from(code: u8) -> Result<Self, UnknownVerdict> {
        match code {
            0 => Ok(Self::Unmanaged),
            1 => Ok(Self::Allow),
            2 => Ok(Self::Deny(Reason::NotGranted)),
            3 => Ok(Self::Deny(Reason::PortNotGranted)),
            4 => Ok(Self::Deny(Reason::Excepted)),
            5 => Ok(Self::Deny(Reason::Expired)),
            6 => Ok(Self::Deny(Reason::Metadata)),
            7 => Ok(Self::Deny(Reason::Unidentified)),
            8 => Ok(Self::Deny(Reason::Malformed)),
            9 => Ok(Self::Deny(Reason::RawSocket)),
            10 => Ok(Self::Deny(Reason::UnnamedFile)),
            11 => Ok(Self::Deny(Reason::ReplacedFile)),
            12 => Ok(Self::Deny(Reason::LeftWorkload)),
            13 => Ok(Self::Deny(Reason::MissingTable)),
            14 => Ok(Self::Deny(Reason::SocketFamily)),
            _ => Err(UnknownVerdict(code)),
        }
    }
}

/// A verdict with the permission that decided it: the one that allows, or the one that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    pub permission: Permission,
}

impl Decision {
    /// Allowed by no permission in particular: what needs none.
    pub const ALLOW: Self = Self { verdict: Verdict::Allow, permission: Permission::NONE };

    #[inline(always)]
    #[must_use]
    pub const fn deny(reason: Reason) -> Self {
        Self { verdict: Verdict::Deny(reason), permission: Permission::NONE }
    }
}

/// What is done about a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Let it through.
    Pass,
    /// Refuse it.
    Refuse,
}

impl Verdict {
    /// What `mode` makes of this verdict.
    #[inline(always)]
    #[must_use]
    pub const fn action(self, mode: crate::Mode) -> Action {
        match (self, mode) {
            (Self::Deny(_), crate::Mode::Enforce) => Action::Refuse,
            (Self::Deny(_), crate::Mode::Audit) | (Self::Allow | Self::Unmanaged, _) => {
                Action::Pass
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip_and_fit_a_row_of_counters() {
        let all =
            [Verdict::Unmanaged, Verdict::Allow].into_iter().chain(Reason::ALL.map(Verdict::Deny));
        for verdict in all {
            assert_eq!(Verdict::try_from(verdict.code()), Ok(verdict));
            assert!(usize::from(verdict.code()) < Verdict::CODES);
        }
        assert_eq!(Verdict::try_from(200), Err(UnknownVerdict(200)));
    }
}
