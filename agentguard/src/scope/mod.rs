//! Named capabilities and what each permits.

pub mod catalogue;
pub mod document;

pub use catalogue::{Catalogue, DuplicateScope};
pub use document::{
    Destination, DnsName, EgressRule, ExecutablePattern, ExecutablePatternKind, PortRange,
    ScopeDocument, ScopeName, UnixSocket,
};
