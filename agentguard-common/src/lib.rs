//! The vocabulary both halves of agentguard share: records, addresses, and the one decision.
//!
//! Must not know: where tables live, who reads records, what anything is called. No allocation, no
//! `std`, no unsafe code; every record's layout is proved free of padding by the compiler.
#![no_std]
#![deny(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod abi;
pub mod address;
pub mod allowlist;
pub mod decide;
pub mod event;
pub mod id;
pub mod mode;
#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "`aya::Pod` is an unsafe trait")]
mod pod;
pub mod protocol;
pub mod request;
pub mod stats;
pub mod verdict;

pub use address::Address;
pub use allowlist::{Permission, Tag};
pub use decide::{Tables, decide};
pub use event::Layer;
pub use id::{
    AllowlistId, CgroupId, GrantId, IdentityId, RuleSetId, ScopeId, UnixNameId, WorkloadId,
};
pub use mode::Mode;
pub use protocol::Protocol;
pub use request::{Destination, Endpoint, FileId, Mover, Naming, Peer, Request, UnixSocket};
pub use verdict::{Action, Decision, Reason, Verdict};
