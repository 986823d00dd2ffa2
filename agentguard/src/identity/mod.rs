//! Who an agent is, and which processes are that agent.

pub mod cgroup;
pub mod container;
pub mod document;
pub mod pod;
pub mod source;
pub mod spiffe;
pub mod template;

pub use cgroup::{CgroupSource, CgroupWatch, WatchError};
pub use container::{Container, Node, Placement, ProcessRef, Rules, Sandbox};
pub use document::{CgroupPattern, Selector, WorkloadDocument};
pub use pod::{Marking, Pod, PodUid};
pub use source::{Discovered, IdentityEvent, IdentitySource, Scan, SourceError, SourceProblem};
pub use spiffe::{SpiffeId, SpiffePrefix, Subject, TrustDomain};
pub use template::IdentityTemplate;
