//! Named capabilities and what each permits.

pub mod catalogue;
pub mod cluster;
pub mod document;
pub mod executables;
pub mod selector;
pub mod socket_directories;

pub use catalogue::{Catalogue, DuplicateScope};
pub use document::{
    Destination, DnsName, EgressRule, ExecutablePattern, ExecutablePatternKind, PortRange,
    ScopeDocument, ScopeName, UnixSocket,
};
pub use executables::{
    Admission, Pinned, Resolution, ResolveError, ResolveProblem, ResolvedFile, Resolver, RootId,
};
pub use socket_directories::{DirectoryId, DirectoryProblem, SocketDirectories};
