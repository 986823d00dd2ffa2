//! Who an agent is, and which processes are that agent.

pub mod cgroup;
pub mod document;
pub mod source;
pub mod spiffe;

pub use cgroup::{CgroupSource, CgroupWatch, WatchError};
pub use document::{CgroupPattern, Selector, WorkloadDocument};
pub use source::{Discovered, IdentityEvent, IdentitySource, Scan, SourceError, SourceProblem};
pub use spiffe::{SpiffeId, SpiffePrefix, Subject, TrustDomain};
