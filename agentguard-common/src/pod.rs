//! The shared records as aya's plain old data.

use crate::abi::{Achieved, Attachment, CachedVerdict, KernelOffsets, Membership, Moved, Settings};
use crate::allowlist::{
    DestinationEntry, DestinationKey, ExecutableEntry, ExecutableKey, Permission, RuleRow, Tag,
    UnixName, UnixSocketKey,
};
use crate::event::{Process, RequestKey};
use crate::stats::Counters;
use crate::{CgroupId, FileId, RuleSetId, UnixNameId, WorkloadId};

macro_rules! pod {
    ($($record:ty),+ $(,)?) => {
        $(
            // SAFETY: the record derives `FromBytes` and `IntoBytes`, so that every byte pattern
            // is a value and there is no padding, and it is `Copy` and holds no reference.
            unsafe impl aya::Pod for $record {}
        )+
    };
}

pod!(
    Achieved,
    Attachment,
    CachedVerdict,
    CgroupId,
    Counters,
    DestinationEntry,
    DestinationKey,
    ExecutableEntry,
    ExecutableKey,
    FileId,
    KernelOffsets,
    Membership,
    Moved,
    Permission,
    Process,
    RequestKey,
    RuleRow,
    RuleSetId,
    Settings,
    Tag,
    UnixName,
    UnixNameId,
    UnixSocketKey,
    WorkloadId,
);
