//! Who an agent is, and which processes are that agent.

pub mod document;
pub mod spiffe;

pub use document::{CgroupPattern, Selector, WorkloadDocument};
pub use spiffe::{SpiffeId, SpiffePrefix, Subject, TrustDomain};
