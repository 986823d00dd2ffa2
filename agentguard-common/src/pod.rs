//! The shared records as aya's plain old data.

use crate::abi::{Attachment, KernelOffsets, Membership, Moved, Settings};
use crate::allowlist::{
    DestinationEntry, DestinationKey, ExecutableEntry, ExecutableKey, RuleRow, Tag,
};
use crate::event::{Process, RequestKey};
use crate::stats::Counters;
use crate::{CgroupId, RuleSetId, WorkloadId};

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
    Attachment,
    CgroupId,
    Counters,
    DestinationEntry,
    DestinationKey,
    ExecutableEntry,
    ExecutableKey,
    KernelOffsets,
    Membership,
    Moved,
    Process,
    RequestKey,
    RuleRow,
    RuleSetId,
    Settings,
    Tag,
    WorkloadId,
);
