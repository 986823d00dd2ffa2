//! The numbers both halves use in place of names.
//!
//! User space hands them out and keeps the names; the kernel sees numbers only. Zero always means
//! "none", so an all-zero record never names anything.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash,
            FromBytes, Immutable, IntoBytes, KnownLayout,
        )]
        pub struct $name(pub u32);

        impl $name {
            /// Names nothing.
            pub const NONE: Self = Self(0);

            /// Whether this names something.
            #[must_use]
            pub const fn is_some(self) -> bool {
                self.0 != 0
            }
        }
    };
}

number!(
    /// One workload on this node: the row of its [`Tag`](crate::Tag).
    WorkloadId
);
number!(
    /// One workload identity (SPIFFE ID).
    IdentityId
);
number!(
    /// One compiled allow-list. Every generation gets a number of its own, never used again while
    /// the tables live, so a stale cache entry can not match a new generation.
    AllowlistId
);
number!(
    /// One set of port rules, shared by all destinations that permit the same.
    RuleSetId
);
number!(
    /// One scope of the catalogue.
    ScopeId
);
number!(
    /// One grant.
    GrantId
);

number!(
    /// One name of a unix socket that some scope mentions.
    UnixNameId
);

/// A cgroup of the v2 hierarchy, as `bpf_get_current_cgroup_id` and the inode of its directory
/// number it.
#[repr(transparent)]
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
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
pub struct CgroupId(pub u64);
